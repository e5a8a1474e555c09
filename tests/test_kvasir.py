"""`make kvasir` from download to table.

| tests | subject |
|---|---|
| make kvasir | stopped twice and continued, with the official addresses served locally |
"""

import http.server
import io
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import zipfile

import pytest
import trustme
from conftest import ENV, ROOT, SMALL_CFG, draw_pair, write_image

import download_dataset

DATASET, CHECKPOINT = download_dataset.KVASIR_URL, download_dataset.CHECKPOINT_URL.format("small")


class Internet(http.server.ThreadingHTTPServer):
    """An HTTPS proxy that answers for every host from `files`, {URL: content}.

    requests: (URL, Range) of each request so far. The answer to a URL in `stalled` stops halfway and sets `halfway`.
    """

    def __init__(self, files, authority):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.files, self.authority = files, authority
        self.requests, self.stalled, self.halfway, self.over = [], set(), threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            host = self.path.split(":")[0]
            self.send_response(200)
            self.end_headers()
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.server.authority.issue_cert(host).configure_cert(tls)
            self.connection = tls.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
            self.handle_one_request()

        def finish(self):
            super().finish()
            self.connection.close()

        def do_GET(self):
            server, url = self.server, f"https://{self.headers['Host']}{self.path}"
            content, wanted = server.files[url], self.headers.get("Range")
            server.requests.append((url, wanted))
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if url in server.stalled:
                self.wfile.write(content[:len(content) // 2])
                server.halfway.set()
                server.over.wait()
            else:
                self.wfile.write(content[start:])

        def log_message(self, *_):
            pass


@pytest.fixture
def internet(tmp_path, weights):
    """The official addresses: an archive of ten drawn pairs, and small random weights in the official form."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(10):
            for part, picture in zip(("images", "masks"), draw_pair(number)):
                write_image(tmp_path / "one.jpg", picture)
                file.write(tmp_path / "one.jpg", f"Kvasir-SEG/{part}/kvasir_{number:02}.jpg")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    site = Internet({DATASET: archive.getvalue(), CHECKPOINT: weights.read_bytes()}, authority)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.over.set()
    site.shutdown()
    site.server_close()


@pytest.fixture
def project(tmp_path):
    """A copy of what `make kvasir` needs, with an environment that counts as installed."""
    folder = tmp_path / "project"
    for name in ("Makefile", "requirements.txt", "download_dataset.py", "prepare_data.py", "train_sam2_proper.py",
                 "compare_models.py", "benchmarks/print_kvasir.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "venv").mkdir()
    (folder / "venv/.installed").touch()
    return folder


def make(project, internet, *flags, stop=None, when=lambda line: False):
    """Run `make kvasir` with the small model; returns (exit code, output).

    stop: a signal to send to all processes that make has started, as soon as when(line) is true for a line of output.
    """
    env = {name: value for name, value in ENV.items() if name.lower() not in ("no_proxy", "makeflags", "mflags")}
    env.update(HTTPS_PROXY=f"http://127.0.0.1:{internet.server_port}",
               REQUESTS_CA_BUNDLE=str(project.parent / "authority.pem"))
    process = subprocess.Popen(
        ["make", "kvasir", *flags, f"PY={shlex.quote(sys.executable)}",
         f"MODEL=--device cpu --model-cfg {SMALL_CFG}", "TRAIN=--iterations 40 --cache-dir features"],
        cwd=project, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if when(line):
            os.killpg(process.pid, stop)
    return process.wait(), "".join(lines)


def test_make_kvasir_continues_where_it_was_stopped(project, internet):
    internet.stalled.add(CHECKPOINT)

    def halfway_through_the_checkpoint(line):
        return CHECKPOINT in line and internet.halfway.wait(300)

    code, output = make(project, internet, stop=signal.SIGKILL, when=halfway_through_the_checkpoint)
    assert code == -signal.SIGKILL and "train_sam2_proper.py" not in output
    part = project / "checkpoints/sam2.1_hiera_small.pt.part"
    received = part.stat().st_size
    internet.stalled.clear()

    def after_the_validation_before_training(line):
        return line.startswith("[0/40]")

    code, output = make(project, internet, stop=signal.SIGTERM, when=after_the_validation_before_training)
    assert code != 0 and "--recipe reference" in output and "--resume" not in output.split("이어서 하려면")[0]
    assert internet.requests == [(CHECKPOINT, None), (CHECKPOINT, f"bytes={received}-"), (DATASET, None)]
    assert received and not part.exists()
    run = project / "output/kvasir/reference"
    assert (run / "sam2_last.pt").exists() and not (run / "sam2_final.pt").exists()

    code, output = make(project, internet)
    assert code == 0, output
    assert "train_sam2_proper.py --resume" in output and "회까지 진행한 학습을 이어서 합니다" in output
    assert "[40/40]" in output and len(internet.requests) == 3
    assert len(list((project / "output/kvasir/data/images/train").iterdir())) == 8
    assert not (project / "data").exists()  # belongs to the user

    summary = json.loads((run / "comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == 2 and summary["finetuned"] == "output/kvasir/reference/sam2_best.pt"
    reference, here = re.findall(r"^(?:참고 가이드|이 실행) +([\d.%+p -]+)$", output, re.MULTILINE)
    assert reference.split() == ["50", "65.92%", "83.33%", "+17.4%p"]
    assert here.split() == ["2", f"{summary['original_iou']:.2%}", f"{summary['finetuned_iou']:.2%}",
                            f"{summary['difference_pp']:+.1f}%p"]
    assert "이미지 50장, 이 실행은 2장의 평균" in output

    code, commands = make(project, internet, "--dry-run")
    assert code == 0 and "print_kvasir.py" in commands
    assert "train_sam2_proper.py" not in commands and "compare_models.py" not in commands

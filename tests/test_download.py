"""download_dataset.py, run as a user runs it, against a local server and with local archives.

| tests | subject |
|---|---|
| download | data from an archive, resuming, retries, hostile members |
| servers | ranges, wrong lengths, redirects, silence, certificates, no network |
| archives | damaged and wrong archives |
| interruption | full disk, Ctrl-C at any step, two downloads at once |
"""

import contextlib
import errno
import http.server
import io
import itertools
import os
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trustme
from conftest import assert_fails_in_one_line, draw_pair, run, write_image
from filelock import FileLock
from tqdm import tqdm

import download_dataset


@pytest.fixture
def archive(tmp_path):
    """A small archive of Kvasir-SEG's layout: ten pairs, JPEG masks, and the file of boxes beside them."""
    path = tmp_path / "source" / "kvasir-seg.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(10):
            for part, picture in zip(("images", "masks"), draw_pair(number)):
                write_image(tmp_path / "source" / "one.jpg", picture)
                file.write(tmp_path / "source" / "one.jpg", f"Kvasir-SEG/{part}/kvasir_{number:02}.jpg")
        file.writestr("Kvasir-SEG/kavsir_bboxes.json", "{}")
    return path


class Site(http.server.ThreadingHTTPServer):
    """Serves `content` at any path, and misbehaves according to its attributes.

    requests: the Range of each request so far, or None; cuts: the numbers of bytes after which the next answers
    break off; codes: the status codes of the next answers, then 200; ranges: whether it supports
    Range; length: a wrong Content-Length; silent: it sends one byte and nothing more.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.content, self.requests, self.cuts, self.codes = b"", [], [], []
        self.ranges, self.length, self.silent, self.location = True, None, False, None
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/downloads/kvasir-seg.zip"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site = self.server
            site.requests.append(self.headers.get("Range"))
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") if site.ranges else None
            start = int(asked[1]) if asked else 0
            body = site.content[start:]
            code = site.codes.pop(0) if site.codes else 200
            self.send_response(206 if asked and code == 200 else code)
            if code == 302:
                self.send_header("Location", site.location)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            self.send_header("Content-Length", str(site.length or len(body)))
            self.end_headers()
            if code != 200:
                return
            cut = site.cuts.pop(0) if site.cuts else None
            try:
                if site.silent:
                    self.wfile.write(body[:1])
                    site.over.wait()
                self.wfile.write(body[:cut])
            except OSError:
                pass  # the client has disconnected

        def log_message(self, *_):
            pass


@contextlib.contextmanager
def serve(site):
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.over.set()
    site.shutdown()
    site.server_close()


@pytest.fixture
def server():
    with serve(Site()) as site:
        yield site


@pytest.fixture
def secure_server(tmp_path):
    """A Site with a certificate; trusted: the environment in which a download trusts it."""
    site, authority = Site(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    site.url = site.url.replace("http:", "https:")
    (tmp_path / "source").mkdir(exist_ok=True)
    authority.cert_pem.write_to_path(tmp_path / "source/authority.pem")
    site.trusted = {"REQUESTS_CA_BUNDLE": str(tmp_path / "source/authority.pem")}
    with serve(site):
        yield site


def count(folder):
    return len(list(folder.iterdir()))


def assert_whole(folder):
    assert count(folder / "data/images/train") == count(folder / "data/masks/train") == 8
    assert count(folder / "data/images/val") == count(folder / "data/masks/val") == 2
    assert not list(folder.glob("*.part"))


def test_a_local_zip_becomes_the_data_folder_and_a_second_run_changes_nothing(tmp_path, archive):
    run("download_dataset.py", "--zip", archive, cwd=tmp_path)
    assert_whole(tmp_path)
    assert archive.is_file()
    before = (tmp_path / "data/masks/train/kvasir_00.png").stat().st_mtime_ns
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path)
    assert "이미 있습니다" in done.stdout and "이미 준비되어" in done.stdout
    assert (tmp_path / "data/masks/train/kvasir_00.png").stat().st_mtime_ns == before


def test_another_split_needs_no_second_download(tmp_path, archive, server):
    server.content = archive.read_bytes()
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    assert not (tmp_path / "kvasir-seg.zip").exists()
    run("download_dataset.py", "--url", server.url, "--val-ratio", "0.5", cwd=tmp_path)
    assert len(server.requests) == 1  # another split needs no second download
    assert count(tmp_path / "data/images/val") == count(tmp_path / "data/masks/val") == 5


def test_keep_zip_keeps_the_archive_and_data_dir_chooses_the_folder(tmp_path, archive, server):
    server.content = archive.read_bytes()
    run("download_dataset.py", "--url", server.url, "--keep-zip", "--data-dir", "polyps", "--shuffle-seed", "1",
        cwd=tmp_path)
    assert (tmp_path / "kvasir-seg.zip").read_bytes() == server.content
    assert count(tmp_path / "polyps/images/train") == 8 and not (tmp_path / "data").exists()


def test_an_archive_already_in_the_folder_is_used_without_a_download_and_kept(tmp_path, archive, server):
    (tmp_path / "kvasir-seg.zip").write_bytes(archive.read_bytes())
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    assert server.requests == [] and (tmp_path / "kvasir-seg.zip").is_file()


def test_an_interrupted_download_continues_at_the_byte_where_it_stopped(tmp_path, archive, server):
    server.content = archive.read_bytes()
    server.cuts = [20000, 9000]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests == [None, "bytes=20000-", "bytes=29000-"]  # every byte is kept
    assert "(1/3)" in done.stdout and "(2/3)" in done.stdout
    assert_whole(tmp_path)


def test_a_download_fails_after_three_tries_and_a_second_run_finishes_it(tmp_path, archive, server):
    server.content = archive.read_bytes()
    server.cuts = [9000, 9000, 9000]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "다시 실행하면 이어서")
    assert not (tmp_path / "kvasir-seg.zip").exists() and not (tmp_path / "data").exists()
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests[3] == "bytes=27000-"
    assert_whole(tmp_path)


def test_an_archive_member_with_a_wrong_crc_is_refused(tmp_path, archive):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        member = file.infolist()[4]
    content[member.header_offset + 60 + len(member.filename)] ^= 0xFF
    archive.write_bytes(content)
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "kvasir-seg.zip", "손상")
    assert not (tmp_path / "Kvasir-SEG").exists()


def test_archive_members_with_hostile_paths_stay_in_the_folder_and_create_no_links(tmp_path, archive):
    """unpack() relies on ZipFile.extract for this: nothing is written outside, and no link is created."""
    link = zipfile.ZipInfo("Kvasir-SEG/images/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    through_link = zipfile.ZipInfo("Kvasir-SEG/masks/folder")
    through_link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["../out.jpg", "../../out.jpg", "Kvasir-SEG/../../../out.jpg", "//server/out.jpg", "C:\\out.jpg",
             "C:out.jpg", "..\\..\\out.jpg", "Kvasir-SEG\\..\\..\\out.jpg", "./../out.jpg", "....//out.jpg",
             str(tmp_path / "out.jpg")]
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "/etc/passwd")
        file.writestr(through_link, str(tmp_path))
        for name in names:
            file.writestr(zipfile.ZipInfo(name), b"x")
    folder = tmp_path / "one" / "two" / "three"
    folder.mkdir(parents=True)
    done = run("download_dataset.py", "--zip", archive, cwd=folder)
    assert "제외: link.jpg" in done.stdout  # a file that contains the link's target: no image
    assert_whole(folder)
    assert {path.name for path in folder.iterdir()} == {"Kvasir-SEG", "data", ".Kvasir-SEG.lock"}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == sorted(
        ["source", "one", "two", "three", "Kvasir-SEG", "data", *["images", "masks"] * 2, *["train", "val"] * 2])
    assert {path.parent for path in tmp_path.rglob("*out.jpg")} == {folder / "Kvasir-SEG"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_local_archive_without_images_and_masks_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    done = run("download_dataset.py", "--zip", "other.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "images와 masks")
    (tmp_path / "page.zip").write_text("<html>")
    assert_fails_in_one_line(run("download_dataset.py", "--zip", "page.zip", cwd=tmp_path, code=1), "page.zip")


def test_a_kvasir_seg_folder_with_the_users_own_files_is_not_replaced(tmp_path, archive):
    write_image(tmp_path / "Kvasir-SEG/images/mine.jpg", np.zeros((4, 4), np.uint8))
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "Kvasir-SEG")
    assert (tmp_path / "Kvasir-SEG/images/mine.jpg").is_file()


# ----------------------------------------------------------------------------- servers and archives that misbehave

def download_again(tmp_path, archive, server):
    """A plain second run, with the server working again, succeeds and the data is complete."""
    server.content, server.ranges, server.length, server.silent = archive.read_bytes(), True, None, False
    server.cuts, server.codes = [], []
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"source", "data", "Kvasir-SEG", ".Kvasir-SEG.lock"}  # no .part, no .zip


def test_a_server_without_range_requests_sends_the_whole_file_again(tmp_path, archive, server):
    server.content, server.ranges, server.cuts = archive.read_bytes(), False, [700]
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests == [None, "bytes=700-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("wrong", [-100, 100], ids=["too short", "too long"])
def test_a_download_with_a_wrong_content_length_is_refused(tmp_path, archive, server, wrong):
    server.content = archive.read_bytes()
    server.length = len(server.content) + wrong
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, server.url)
    assert not (tmp_path / "data").exists() and not (tmp_path / "Kvasir-SEG").exists()
    download_again(tmp_path, archive, server)


def test_a_404_answer_is_not_retried(tmp_path, archive, server):
    server.codes = [404] * 5
    assert_fails_in_one_line(run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1), "404")
    assert len(server.requests) == 1
    download_again(tmp_path, archive, server)


def test_a_server_error_is_retried(tmp_path, archive, server):
    server.content, server.codes = archive.read_bytes(), [500, 503]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert "500" in done.stdout and "503" in done.stdout and len(server.requests) == 3
    assert_whole(tmp_path)


def test_a_redirect_is_followed(tmp_path, archive, server):
    server.content, server.codes = archive.read_bytes(), [302]
    server.location = server.url.replace("downloads", "elsewhere")
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)


def test_a_redirect_to_an_invalid_address_ends_in_one_line(tmp_path, server, monkeypatch):
    server.codes, server.location = [302] * 3, "http://["
    monkeypatch.setattr(download_dataset, "WAIT", 0)
    with pytest.raises(SystemExit, match="받지 못했습니다"):
        download_dataset.download(server.url, tmp_path / "nowhere.zip.part")


def test_a_redirect_from_https_to_http_is_never_followed(tmp_path, archive, server, secure_server):
    server.content = secure_server.content = archive.read_bytes()
    first = (server.url, secure_server.url.replace("https:", "HTTPS:"))  # also where the first address is http
    server.codes, server.location = [302], secure_server.url
    for url in first:
        server.requests, secure_server.codes, secure_server.location = [], [302], server.url.replace("http:", "HTTP:")
        done = run("download_dataset.py", "--url", url, cwd=tmp_path, env=secure_server.trusted, code=1)
        assert_fails_in_one_line(done, "암호화되지 않은", server.url.partition(":")[2])
        assert len(server.requests) == (url == server.url)  # no request after the redirect to https
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".Kvasir-SEG.lock"}


def test_a_redirect_from_https_to_https_is_followed(tmp_path, archive, secure_server):
    secure_server.content, secure_server.codes = archive.read_bytes(), [302]
    secure_server.location = "/elsewhere/kvasir-seg.zip"
    run("download_dataset.py", "--url", secure_server.url, cwd=tmp_path, env=secure_server.trusted)
    assert_whole(tmp_path)


def test_a_download_that_is_too_slow_is_given_up(tmp_path, monkeypatch):
    """On a simulated clock, every byte takes a second."""
    class Drip:
        read = read1 = staticmethod(lambda size: b"x")

    seconds = itertools.count()
    monkeypatch.setattr(download_dataset.time, "monotonic", lambda: next(seconds))
    file = io.BytesIO()
    with pytest.raises(download_dataset.BadDownload, match="너무 느립니다"):
        download_dataset.receive(Drip, file, tqdm(disable=True))
    assert 0 < len(file.getvalue()) < 100


def test_a_server_that_sends_nothing_is_given_up_after_three_timeouts(tmp_path, server, monkeypatch, capsys):
    server.content, server.silent = bytes(10), True
    monkeypatch.setattr(download_dataset, "TIMEOUT", (60, 0.1))
    monkeypatch.setattr(download_dataset, "WAIT", 0)
    with pytest.raises(SystemExit, match="받지 못했습니다"):
        download_dataset.download(server.url, tmp_path / "silent.zip.part")
    assert capsys.readouterr().out.count("시간 초과") == 3


EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


def broken_archives():
    """{name: (function that damages the bytes of a good archive, a word of the error message)}."""
    def with_member(add):
        def change(content):
            file = io.BytesIO(content)
            with zipfile.ZipFile(file, "a") as archive:
                add(archive)
            return file.getvalue()
        return change

    def damage(content):
        place = content.index(b"\xff\xd8") if b"\xff\xd8" in content else 200
        return content[:place] + bytes([content[place] ^ 255]) + content[place + 1:]

    def bomb(archive):
        archive.writestr("Kvasir-SEG/bomb", bytes(2 * 10**7), zipfile.ZIP_DEFLATED, 9)
        archive.infolist()[-1].file_size = 3 * 10**9  # written to the directory at the end

    def lying_bomb(archive):
        archive.writestr("Kvasir-SEG/bomb", bytes(2 * 10**7), zipfile.ZIP_DEFLATED, 9)
        archive.infolist()[-1].file_size = 10

    return {"truncated": (lambda content: content[:len(content) // 2], "zip"),
            "damaged member": (damage, "손상"),
            "bomb": (with_member(bomb), "의심스러운"), "lying bomb": (with_member(lying_bomb), "zip"),
            "file in a file": (with_member(lambda archive: archive.writestr(
                "Kvasir-SEG/kavsir_bboxes.json/x", "x")), "kavsir_bboxes.json"),
            "endless name": (with_member(lambda archive: archive.writestr("x" * 1000, "x")), "xxxx"),
            "name of the folder itself": (with_member(lambda archive: archive.writestr("..", "x")), "Kvasir-SEG.part"),
            "empty name": (lambda content: with_member(lambda archive: archive.writestr("QQQQ", "x"))(content).replace(
                b"QQQQ", b"\0QQQ"), "오류"),
            "no images": (lambda content: EMPTY_ZIP, "images와 masks")}


def test_a_web_page_instead_of_an_archive_is_refused(tmp_path, archive, server):
    server.content = b"<html>please log in</html>"
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert "zip 파일이 아니거나 손상되었습니다" in done.stdout
    assert_fails_in_one_line(done, server.url)
    download_again(tmp_path, archive, server)


@pytest.mark.parametrize("kind", broken_archives())
def test_a_damaged_or_unsuitable_archive_is_refused_with_the_reason(tmp_path, archive, server, kind):
    change, word = broken_archives()[kind]
    (tmp_path / "source/bad.zip").write_bytes(change(archive.read_bytes()))
    done = run("download_dataset.py", "--zip", "source/bad.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, word)
    assert not (tmp_path / "data").exists() and not (tmp_path / "Kvasir-SEG").exists()
    download_again(tmp_path, archive, server)


def test_a_downloaded_archive_without_images_and_masks_is_deleted(tmp_path, archive, server):
    server.content = EMPTY_ZIP
    done = run("download_dataset.py", "--url", server.url, "--keep-zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "images와 masks", "kvasir-seg.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".Kvasir-SEG.lock"}
    download_again(tmp_path, archive, server)


def test_an_untrusted_certificate_is_refused(tmp_path, archive, secure_server):
    secure_server.content = archive.read_bytes()
    done = run("download_dataset.py", "--url", secure_server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "인증서")
    assert not list(tmp_path.glob("*.zip*"))


def test_a_tls_error_other_than_an_untrusted_certificate_is_retried(tmp_path, server):
    url = server.url.replace("http:", "https:")  # the server uses plain HTTP
    done = run("download_dataset.py", "--url", url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "네트워크")
    assert done.stdout.count("보안 연결") == 3


def test_without_a_network_the_download_fails_in_one_line(tmp_path):
    done = run("download_dataset.py", "--url", "http://127.0.0.1:9/x.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "네트워크")
    assert "연결할 수 없거나" in done.stdout
    done = run("download_dataset.py", "--checkpoint", "tiny", cwd=tmp_path, code=1,
               env={"https_proxy": "http://127.0.0.1:9"})
    assert_fails_in_one_line(done, "sam2.1_hiera_tiny.pt")


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("owner, step", [("requests", "get"), ("zipfile.ZipFile", "extract"), ("subprocess", "run")],
                         ids=["downloading", "unpacking", "preparing"])
def test_a_full_disk_at_any_step_ends_in_one_line_and_loses_nothing(tmp_path, archive, server, owner, step):
    """From that step on no file can grow beyond 2,000 bytes, as on a full disk, which only root could mount."""
    server.content = archive.read_bytes()
    limit = f"""
import requests, resource, subprocess, zipfile

def limited(*args, step={owner}.{step}, **kwargs):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return step(*args, **kwargs)

{owner}.{step} = limited"""
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1, before=limit)
    assert_fails_in_one_line(done, os.strerror(errno.EFBIG))
    assert not (tmp_path / "data/images").exists()
    download_again(tmp_path, archive, server)


@pytest.mark.parametrize("owner, step", [("requests", "get"), ("time", "sleep"), ("zipfile.ZipFile", "testzip"),
                                         ("zipfile.ZipFile", "extract"), ("subprocess", "run")])
def test_ctrl_c_at_any_step_ends_in_one_line_and_loses_nothing(tmp_path, archive, server, owner, step):
    server.content, server.cuts = archive.read_bytes(), [2000]  # so that it also waits before a second try
    interrupt = (f"import os, requests, signal, subprocess, time, zipfile\n"
                 f"{owner}.{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)")
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1, before=interrupt)
    assert_fails_in_one_line(done, "중단했습니다", "이어서")
    download_again(tmp_path, archive, server)
    assert len(server.requests) == (1 if step == "get" else 2)


@pytest.mark.parametrize("keep", [[], ["--keep-zip"]], ids=["deleted", "kept"])
def test_after_a_stop_at_any_step_a_second_run_downloads_nothing_again(tmp_path, archive, server, monkeypatch, keep):
    """Runs in this process, so that Ctrl-C comes exactly after the first step, after the second, and so on."""
    server.content = archive.read_bytes()
    monkeypatch.setattr(sys, "argv", ["download_dataset.py", "--url", server.url, *keep])
    monkeypatch.setattr(download_dataset, "lock", lambda path: None)  # which is otherwise held until this process ends
    monkeypatch.setattr(download_dataset.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    steps = [(download_dataset, "download_once"), (download_dataset, "check_archive"), (download_dataset, "unpack"),
             (shutil, "rmtree"), *((Path, name) for name in ("mkdir", "rename", "exists", "replace", "unlink"))]

    def run_until(stop):
        """Run the script; KeyboardInterrupt after `stop` of its steps. Returns the number of steps."""
        taken = 0

        def counted(step):
            def wrapped(*args, **kwargs):
                nonlocal taken
                result = step(*args, **kwargs)
                taken += 1
                if taken == stop:
                    raise KeyboardInterrupt
                return result
            return wrapped

        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            with pytest.raises(KeyboardInterrupt if stop else SystemExit):
                download_dataset.main()
        return taken

    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path / "0")
    in_all = run_until(0)
    assert in_all >= 8
    for stop in range(1, in_all + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        monkeypatch.chdir(folder)
        server.requests = []
        run_until(stop)
        run_until(0)
        assert server.requests == [None]  # received once, and never again
        assert count(folder / "Kvasir-SEG/images") == count(folder / "Kvasir-SEG/masks") == 10
        assert {path.name for path in folder.iterdir()} == {"Kvasir-SEG", *(["kvasir-seg.zip"] if keep else [])}


def test_the_second_of_two_simultaneous_downloads_is_refused(tmp_path, archive, server):
    server.content = archive.read_bytes()
    with FileLock(tmp_path / ".Kvasir-SEG.lock"):
        done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "이미 실행 중")
    kill = "import os, requests, signal\nrequests.get = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    run("download_dataset.py", "--url", server.url, cwd=tmp_path, before=kill, code=-signal.SIGKILL)
    download_again(tmp_path, archive, server)  # a lock ends with its process

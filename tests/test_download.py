"""download_dataset.py against a server on loopback and with local archives, as a user runs it."""

import http.server
import io
import os
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trustme
from conftest import ENV, ROOT, assert_fails_in_one_line, draw_pair, run, write_image

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
    """Serves `content` at any path, and misbehaves as its attributes say.

    requests: the Range of each request so far, or None; cuts: the numbers of bytes after which the next answers
    break off; codes: the status codes of the next answers, 200 when they are used up; ranges: whether it
    knows Range; length: a Content-Length other than the true one; pause: seconds between single bytes.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.content, self.requests, self.cuts, self.codes = b"", [], [], []
        self.ranges, self.length, self.pause, self.location = True, None, 0, None
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
                for byte in range(len(body)) if site.pause else ():
                    self.wfile.write(body[byte:byte + 1])
                    time.sleep(site.pause)
                self.wfile.write(body[:cut])
            except OSError:
                pass  # the other side has hung up

        def log_message(self, *_):
            pass


@pytest.fixture
def server():
    site = Site()
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.shutdown()
    site.server_close()


def count(folder):
    return len(list(folder.iterdir()))


def assert_whole(folder):
    assert count(folder / "data/images/train") == count(folder / "data/masks/train") == 8
    assert count(folder / "data/images/val") == count(folder / "data/masks/val") == 2
    assert not list(folder.glob("*.part"))


def test_local_archive_becomes_data(tmp_path, archive):
    run("download_dataset.py", "--zip", archive, cwd=tmp_path)
    assert_whole(tmp_path)
    assert archive.is_file()
    before = (tmp_path / "data/masks/train/kvasir_00.png").stat().st_mtime_ns
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path)
    assert "이미 있습니다" in done.stdout and "이미 준비되어" in done.stdout
    assert (tmp_path / "data/masks/train/kvasir_00.png").stat().st_mtime_ns == before


def test_download_once_and_never_again(tmp_path, archive, server):
    server.content = archive.read_bytes()
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    assert not (tmp_path / "kvasir-seg.zip").exists()
    run("download_dataset.py", "--url", server.url, "--val-ratio", "0.5", cwd=tmp_path)
    assert len(server.requests) == 1  # another split needs no second download
    assert count(tmp_path / "data/images/val") == count(tmp_path / "data/masks/val") == 5


def test_keep_zip_and_data_dir(tmp_path, archive, server):
    server.content = archive.read_bytes()
    run("download_dataset.py", "--url", server.url, "--keep-zip", "--data-dir", "polyps", "--shuffle-seed", "1",
        cwd=tmp_path)
    assert (tmp_path / "kvasir-seg.zip").read_bytes() == server.content
    assert count(tmp_path / "polyps/images/train") == 8 and not (tmp_path / "data").exists()


def test_an_archive_that_lies_here_is_used_and_kept(tmp_path, archive, server):
    (tmp_path / "kvasir-seg.zip").write_bytes(archive.read_bytes())
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    assert server.requests == [] and (tmp_path / "kvasir-seg.zip").is_file()


def test_cut_off_download_goes_on_where_it_stopped(tmp_path, archive, server):
    server.content = archive.read_bytes()
    server.cuts = [20000, 9000]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests == [None, "bytes=20000-", "bytes=29000-"]  # every byte is kept
    assert "(1/3)" in done.stdout and "(2/3)" in done.stdout
    assert_whole(tmp_path)


def test_after_three_tries_it_gives_up_and_a_second_run_finishes(tmp_path, archive, server):
    server.content = archive.read_bytes()
    server.cuts = [9000, 9000, 9000]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "다시 실행하면 이어서")
    assert not (tmp_path / "kvasir-seg.zip").exists() and not (tmp_path / "data").exists()
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests[3] == "bytes=27000-"
    assert_whole(tmp_path)


def test_member_with_a_wrong_crc_is_not_accepted(tmp_path, archive):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        member = file.infolist()[4]
    content[member.header_offset + 60 + len(member.filename)] ^= 0xFF
    archive.write_bytes(content)
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "kvasir-seg.zip", "손상")
    assert not (tmp_path / "Kvasir-SEG").exists()


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "C:\\out.jpg", "Kvasir-SEG\\..\\..\\out.jpg"])
def test_member_that_would_leave_the_folder_is_refused(tmp_path, archive, name):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(zipfile.ZipInfo(name), b"x")
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "안전하지 않은")
    assert not list(tmp_path.rglob("out.jpg")) and not (tmp_path / "Kvasir-SEG").exists()


def test_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    done = run("download_dataset.py", "--zip", "other.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "images와 masks")
    (tmp_path / "page.zip").write_text("<html>")
    assert_fails_in_one_line(run("download_dataset.py", "--zip", "page.zip", cwd=tmp_path, code=1), "page.zip")


def test_a_folder_of_the_users_own_is_not_replaced(tmp_path, archive):
    write_image(tmp_path / "Kvasir-SEG/images/mine.jpg", np.zeros((4, 4), np.uint8))
    done = run("download_dataset.py", "--zip", archive, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "Kvasir-SEG")
    assert (tmp_path / "Kvasir-SEG/images/mine.jpg").is_file()


# ----------------------------------------------------------------------------- servers and archives that misbehave

def download_again(tmp_path, archive, server):
    """A plain second run, with the server well again, succeeds and the data is whole."""
    server.content, server.ranges, server.length, server.pause = archive.read_bytes(), True, None, 0
    server.cuts, server.codes = [], []
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"source", "data", "Kvasir-SEG", "proxy"}  # no .part, no .zip, no .lock


def test_a_server_without_range_sends_all_again(tmp_path, archive, server):
    server.content, server.ranges, server.cuts = archive.read_bytes(), False, [700]
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests == [None, "bytes=700-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("wrong", [-100, 100], ids=["too short", "too long"])
def test_a_wrong_content_length_is_noticed(tmp_path, archive, server, wrong):
    server.content = archive.read_bytes()
    server.length = len(server.content) + wrong
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, server.url)
    assert not (tmp_path / "data").exists() and not (tmp_path / "Kvasir-SEG").exists()
    download_again(tmp_path, archive, server)


def test_what_is_not_there_is_asked_for_once(tmp_path, archive, server):
    server.codes = [404] * 5
    assert_fails_in_one_line(run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1), "404")
    assert len(server.requests) == 1
    download_again(tmp_path, archive, server)


def test_a_server_that_recovers_is_asked_again(tmp_path, archive, server):
    server.content, server.codes = archive.read_bytes(), [500, 503]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert "500" in done.stdout and "503" in done.stdout and len(server.requests) == 3
    assert_whole(tmp_path)


def test_a_redirect_is_followed(tmp_path, archive, server):
    server.content, server.codes = archive.read_bytes(), [302]
    server.location = server.url.replace("downloads", "elsewhere")
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert_whole(tmp_path)


def test_an_endless_slow_drip_is_given_up(tmp_path, server, monkeypatch, capsys):
    """In this process, with a shorter patience than the minute that a user gets."""
    server.content, server.pause = bytes(10_000), 0.05
    monkeypatch.setattr(download_dataset, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(download_dataset, "WAIT", 0.01)
    with pytest.raises(SystemExit, match="받지 못했습니다"):
        download_dataset.download(server.url, tmp_path / "slow.zip.part")
    assert capsys.readouterr().out.count("너무 느립니다") == 3


def test_silence_is_given_up(tmp_path, server, monkeypatch, capsys):
    server.content, server.pause = bytes(10), 5
    monkeypatch.setattr(download_dataset, "TIMEOUT", (1, 0.3))
    monkeypatch.setattr(download_dataset, "WAIT", 0.01)
    with pytest.raises(SystemExit, match="받지 못했습니다"):
        download_dataset.download(server.url, tmp_path / "silent.zip.part")
    assert capsys.readouterr().out.count("시간 초과") == 3


def broken_archives():
    """{name: (what turns the bytes of a good archive into a bad one, a word of the answer)}."""
    def with_member(add):
        def change(content):
            file = io.BytesIO(content)
            with zipfile.ZipFile(file, "a") as archive:
                add(archive)
            return file.getvalue()
        return change

    def link(archive):
        member = zipfile.ZipInfo("Kvasir-SEG/images/link.jpg")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")

    def damage(content):
        place = content.index(b"\xff\xd8") if b"\xff\xd8" in content else 200
        return content[:place] + bytes([content[place] ^ 255]) + content[place + 1:]

    def bomb(archive):
        archive.writestr("Kvasir-SEG/bomb", bytes(2 * 10**7), zipfile.ZIP_DEFLATED, 9)
        archive.infolist()[-1].file_size = 3 * 10**9  # as the directory at the end will say

    def lying_bomb(archive):
        archive.writestr("Kvasir-SEG/bomb", bytes(2 * 10**7), zipfile.ZIP_DEFLATED, 9)
        archive.infolist()[-1].file_size = 10

    return {"truncated": (lambda content: content[:len(content) // 2], "zip"),
            "damaged member": (damage, "손상"),
            "bomb": (with_member(bomb), "의심스러운"), "lying bomb": (with_member(lying_bomb), "zip"),
            "link": (with_member(link), "심볼릭 링크"),
            "file in a file": (with_member(lambda archive: archive.writestr(
                "Kvasir-SEG/kavsir_bboxes.json/x", "x")), "풀 수 없는"),
            "endless name": (with_member(lambda archive: archive.writestr("x" * 1000, "x")), "풀 수 없는"),
            **{name: (with_member(lambda archive, name=name: archive.writestr(name, "x")), "밖을 가리키는")
               for name in ("../x", "/x", "C:\\x", "Kvasir-SEG/../../x")}}


def test_a_web_page_instead_of_an_archive_is_refused(tmp_path, archive, server):
    server.content = b"<html>please log in</html>"
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert "온전한 zip 파일이 아닙니다" in done.stdout
    assert_fails_in_one_line(done, server.url)
    download_again(tmp_path, archive, server)


@pytest.mark.parametrize("kind", broken_archives())
def test_an_archive_that_is_not_what_it_should_be_is_refused(tmp_path, archive, server, kind):
    change, word = broken_archives()[kind]
    (tmp_path / "source/bad.zip").write_bytes(change(archive.read_bytes()))
    done = run("download_dataset.py", "--zip", "source/bad.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, word, "bad.zip")
    assert not (tmp_path / "data").exists() and not (tmp_path / "Kvasir-SEG").exists()
    assert not (tmp_path.parent / "x").exists() and not (tmp_path / "x").exists()
    download_again(tmp_path, archive, server)


def test_an_unsafe_archive_from_a_server_is_not_kept(tmp_path, archive, server):
    server.content = broken_archives()["../x"][0](archive.read_bytes())
    done = run("download_dataset.py", "--url", server.url, "--keep-zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "밖을 가리키는", "kvasir-seg.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    download_again(tmp_path, archive, server)


def test_an_untrusted_certificate_is_refused(tmp_path, archive, server):
    certificate = trustme.CA().issue_cert("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    server.content = archive.read_bytes()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    assert_fails_in_one_line(run("download_dataset.py", "--url", url, cwd=tmp_path, code=1), "인증서")
    assert not list(tmp_path.glob("*.zip*"))


def test_no_network_at_all(tmp_path):
    done = run("download_dataset.py", "--url", "http://127.0.0.1:9/x.zip", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "네트워크")
    assert "연결할 수 없거나" in done.stdout
    done = run("download_dataset.py", "--checkpoint", "tiny", cwd=tmp_path, code=1,
               env={"https_proxy": "http://127.0.0.1:9"})
    assert_fails_in_one_line(done, "sam2.1_hiera_tiny.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("kilobytes", [8, 40, 64], ids=["downloading", "unpacking", "preparing"])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, archive, server, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        server.content = archive.read_bytes()
        done = run("download_dataset.py", "--url", server.url, cwd=disk, code=1)
        assert_fails_in_one_line(done, "디스크가 가득 찼습니다")
        assert not (disk / "data").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        run("download_dataset.py", "--url", server.url, cwd=disk)
        assert_whole(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("moment", [0.4, 0.8, 1.2, 2.9])
def test_ctrl_c_at_any_moment_loses_nothing(tmp_path, archive, server, moment):
    server.content, server.cuts = archive.read_bytes(), [2000]  # so that it also waits for its second try
    script = subprocess.Popen([sys.executable, str(ROOT / "download_dataset.py"), "--url", server.url], cwd=tmp_path,
                              env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    time.sleep(moment)
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode in (0, 1, -signal.SIGINT)  # -SIGINT: Python itself was still starting
    if script.returncode == 1:
        assert "Traceback" not in errors
    download_again(tmp_path, archive, server)


@pytest.mark.parametrize("keep", [[], ["--keep-zip"]], ids=["deleted", "kept"])
def test_stopped_after_any_of_its_steps_it_leaves_and_loses_nothing(tmp_path, archive, server, monkeypatch, keep):
    """In this process, so that Ctrl-C comes exactly after the first step, after the second, and so on."""
    server.content = archive.read_bytes()
    monkeypatch.setattr(sys, "argv", ["download_dataset.py", "--url", server.url, *keep])
    monkeypatch.setattr(download_dataset, "lock", lambda path: None)  # which else lasts until this process ends
    monkeypatch.setattr(download_dataset.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    steps = [(download_dataset, "fetch_once"), (download_dataset, "check_archive"), (download_dataset, "unpack"),
             (shutil, "rmtree"), *((Path, name) for name in ("mkdir", "rename", "exists", "replace", "unlink"))]

    def run_until(stop):
        """Run the script; KeyboardInterrupt after so many of its steps. Returns how many it took."""
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


def test_of_two_downloads_at_once_the_second_is_refused(tmp_path, archive, server):
    server.content, server.pause = archive.read_bytes(), 0.01
    first = subprocess.Popen([sys.executable, str(ROOT / "download_dataset.py"), "--url", server.url], cwd=tmp_path,
                             env=ENV, stdout=subprocess.DEVNULL)
    while not server.requests:
        time.sleep(0.05)
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "이미 실행 중")
    first.kill()  # a lock ends with its process
    first.wait()
    download_again(tmp_path, archive, server)

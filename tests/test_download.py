"""download_dataset.py against a server on loopback and with local archives, as a user runs it."""

import http.server
import re
import threading
import zipfile

import numpy as np
import pytest
from conftest import assert_fails_in_one_line, draw_pair, run, write_image


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


@pytest.fixture
def server():
    """Serves `server.content` at any path, with Range; counts requests; `server.cuts` ends answers early."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.requests.append(self.headers.get("Range"))
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            body = site.content[start:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = site.cuts.pop(0) if site.cuts else None
            self.wfile.write(body[:cut])

        def log_message(self, *_):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.requests, site.cuts, site.content = [], [], b""
    site.url = f"http://127.0.0.1:{site.server_port}/downloads/kvasir-seg.zip"
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
    assert server.requests == [None, "bytes=16384-", "bytes=24576-"]  # whole chunks of 8192 are kept
    assert "(1/3)" in done.stdout and "(2/3)" in done.stdout
    assert_whole(tmp_path)


def test_after_three_tries_it_gives_up_and_a_second_run_finishes(tmp_path, archive, server):
    server.content = archive.read_bytes()
    server.cuts = [9000, 9000, 9000]
    done = run("download_dataset.py", "--url", server.url, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "다시 실행하면 이어서")
    assert not (tmp_path / "kvasir-seg.zip").exists() and not (tmp_path / "data").exists()
    run("download_dataset.py", "--url", server.url, cwd=tmp_path)
    assert server.requests[3] == "bytes=24576-"
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

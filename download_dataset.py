"""Fetch Kvasir-SEG and make data/ from it, or fetch an official SAM 2.1 checkpoint.

    python download_dataset.py                       download, unpack to Kvasir-SEG/, split into data/
    python download_dataset.py --zip kvasir-seg.zip  the same from an archive that is already here
    python download_dataset.py --checkpoint small    the weights, into checkpoints/

An interrupted download goes on where it stopped. What is already done is not done again.
"""

import argparse
import atexit
import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import requests
import urllib3
from tqdm import tqdm

KVASIR_URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_{}.pt"
KVASIR_DIR = Path("Kvasir-SEG")
TRIES = 3
WAIT = 1            # seconds before the second try; doubled before each further one
TIMEOUT = (10, 30)  # seconds to connect, and without a byte arriving
SLOW_SECONDS, SLOW_BYTES = 60, 20_000  # fewer bytes than this in so long a time: the connection is given up
CHUNK = 8192        # bytes read at once, at most
BOMB = 20           # an archive that unpacks to more than so many times its size is refused ...
BOMB_FROM = 10**9   # ... if that is more than so many bytes

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising


class BadDownload(Exception):
    """What arrived cannot be used; the message says why, in the user's words."""


def fail(message):
    """End with status 1 and one line on stderr: for failures that the user can mend."""
    sys.exit(f"오류: {message}")


class Parser(argparse.ArgumentParser):
    """argparse in Korean: a wrong command line ends with one line and status 1."""

    WORDS = {
        "usage: ": "사용법: ", "options": "옵션", "show this help message and exit": "이 도움말을 보이고 끝냄",
        "argument %(argument_name)s: %(message)s": "%(argument_name)s: %(message)s",
        "invalid %(type)s value: %(value)r": "%(value)r는 쓸 수 없는 값입니다 (%(type)s이어야 함)",
        "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r는 없습니다 (고를 수 있는 값: %(choices)s)",
        "expected one argument": "값이 하나 있어야 합니다", "expected at least one argument": "값이 있어야 합니다",
        "the following arguments are required: %s": "꼭 있어야 하는 옵션이 없습니다: %s",
        "unrecognized arguments: %s": "모르는 옵션입니다: %s",
        "ambiguous option: %(option)s could match %(matches)s": "%(option)s는 %(matches)s 가운데 무엇인지 모릅니다",
        "ignored explicit argument %r": "값을 받지 않는 옵션입니다: %r",
    }

    def error(self, message):
        fail(f"{message} (도움말: python {self.prog} --help)")


argparse._ = lambda text: Parser.WORDS.get(text, text)  # where argparse looks its words up


def reason(error):
    """What an exception says, in one line; an OSError in the user's words."""
    known = {errno.ENOSPC: "디스크가 가득 찼습니다", errno.EACCES: "권한이 없습니다", errno.EPERM: "권한이 없습니다",
             errno.EROFS: "읽기 전용입니다", errno.ENOENT: "파일이나 폴더가 없습니다",
             errno.EISDIR: "파일이 아니라 폴더입니다", errno.ENOTDIR: "폴더가 아니라 파일입니다",
             errno.EEXIST: "폴더여야 하는데 파일이 있습니다", errno.ENAMETOOLONG: "이름이 너무 깁니다"}
    words = known.get(getattr(error, "errno", None)) or getattr(error, "strerror", None) or str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def fail_for(error):
    """End as fail() does, with what an exception says and the file that it names."""
    path = getattr(error, "filename", None)
    fail(f"{path}: {reason(error)}" if path else reason(error))


def lock(path):
    """Lock the file at `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")

    def unlock():
        file.close()
        path.unlink(missing_ok=True)
    atexit.register(unlock)


def fetch_once(url, part):
    """One try at `url`: append to `part` what is missing. BadDownload or a requests error if it falls short."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # Range and Content-Length count the bytes as they are stored
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing left to send, or the file there is another one: start over
            part.unlink()
            raise BadDownload("서버가 이어받기를 거절했습니다")
        response.raise_for_status()
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with part.open("ab" if have else "wb") as file, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            receive(response.raw, file, bar)
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise BadDownload(f"{total:,}바이트 중 {size:,}바이트만 받았습니다")


def receive(raw, file, bar):
    """Write what arrives to `file`; BadDownload if it comes slower than a connection that is alive would send it."""
    read = getattr(raw, "read1", raw.read)  # read1 returns what has arrived and does not wait for more
    arrived, since = 0, time.monotonic()
    while chunk := read(CHUNK):
        file.write(chunk)
        bar.update(len(chunk))
        arrived += len(chunk)
        if time.monotonic() - since > SLOW_SECONDS:
            if arrived < SLOW_BYTES:
                raise BadDownload(f"너무 느립니다 ({SLOW_SECONDS}초에 {arrived:,}바이트)")
            arrived, since = 0, time.monotonic()


def check_archive(path):
    """BadDownload unless `path` is a zip whose every member passes its CRC. (A .pt file is a zip too.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(BOMB_FROM, BOMB * path.stat().st_size):
                raise BadDownload(f"풀면 {unpacked / 1e9:,.1f} GB가 되는 의심스러운 압축 파일입니다")
            damaged = archive.testzip()
    except BadDownload:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise BadDownload(f"온전한 zip 파일이 아닙니다 ({error})") from None
    except Exception as error:  # zlib.error and its kin, which differ between Python versions
        raise BadDownload(f"zip 파일 안의 데이터가 손상되었습니다 ({error})") from None
    if damaged:
        raise BadDownload(f"zip 파일 안의 {damaged}가 손상되었습니다")


def download(url, part):
    """Download `url` to `part`, or what of it is missing there, until it is whole. Gives up after TRIES tries."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BadDownload):
        check_archive(part)
        return  # an earlier run received it and was stopped before it used it
    wait = WAIT
    for attempt in range(1, TRIES + 1):
        try:
            fetch_once(url, part)
            try:
                check_archive(part)
            except BadDownload:
                part.unlink()  # going on from damaged bytes would never mend them
                raise
            return
        except (requests.RequestException, urllib3.exceptions.HTTPError, BadDownload) as error:
            print(f"받지 못했습니다 ({attempt}/{TRIES}): {describe(error)}")
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status and 400 <= status < 500 and status not in (408, 429):
                fail(f"{url} 이 없거나 받을 수 없습니다 (서버 응답 {status}). 주소를 확인하세요")
            if isinstance(error, requests.exceptions.SSLError):
                fail(f"{url} 의 인증서를 믿을 수 없어 받지 않았습니다. "
                     "컴퓨터의 시계와 네트워크(회사 프록시 등)를 확인하세요")
        if attempt < TRIES:
            time.sleep(wait)
            wait *= 2
    fail(f"{url} 을 받지 못했습니다. 네트워크를 확인하고 같은 명령을 다시 실행하면 이어서 받습니다")


def describe(error):
    """A requests error in one line of the user's words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"서버 응답 {response.status_code} {response.reason}"
    for kind, words in ((requests.exceptions.SSLError, "인증서를 믿을 수 없습니다"),
                        (requests.exceptions.Timeout, "응답이 없습니다 (시간 초과)"),
                        (requests.exceptions.ConnectionError, "연결할 수 없거나 끊겼습니다"),
                        (urllib3.exceptions.TimeoutError, "응답이 없습니다 (시간 초과)"),
                        (urllib3.exceptions.HTTPError, "전송이 중간에 끊겼습니다")):
        if isinstance(error, kind):
            return words
    return str(error)


def member_problem(member):
    """Why a zip member must not be unpacked, or None: it would leave the target folder, or is a link."""
    name = member.filename.replace("\\", "/")
    if name.startswith("/") or PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts:
        return "폴더 밖을 가리키는 이름"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "심볼릭 링크"
    return None


def part_of(path):
    """Where a file or folder grows until it is whole."""
    return path.with_name(path.name + ".part")


def unpack(archive_path, target, source):
    """Unpack a Kvasir-SEG archive so that `target`/images and `target`/masks appear, both or neither.

    source: what read_source will return for `target` from then on. BadDownload if it is no such archive.
    """
    staging = part_of(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive_path) as archive:
            members = archive.infolist()
            for member in members:
                if problem := member_problem(member):
                    raise BadDownload(f"안전하지 않은 압축 파일입니다 ({problem}: {member.filename})")
            for member in tqdm(members, "압축 풀기", disable=None):
                archive.extract(member, staging)
        root = next((folder for folder in (staging, *sorted(staging.iterdir()))
                     if (folder / "images").is_dir() and (folder / "masks").is_dir()), None)
        if root is None:
            raise BadDownload("Kvasir-SEG 압축 파일이 아닙니다 (images와 masks 폴더가 없음)")
        (root / ".source.json").write_text(json.dumps(source), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    except BadDownload:
        raise
    except Exception as error:
        of_names = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.EINVAL)
        if isinstance(error, OSError) and error.errno not in of_names:
            raise  # the disk's fault, not the archive's
        raise BadDownload(f"풀 수 없는 압축 파일입니다 ({type(error).__name__}: {error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_source(target):
    """What `target` was unpacked from, as unpack wrote it; {} if unknown."""
    try:
        return json.loads((target / ".source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def fetch_kvasir(args):
    """Make Kvasir-SEG/ from the archive named by the arguments, unless it is there already."""
    if args.zip:
        if not args.zip.is_file():
            fail(f"파일이 없습니다: {args.zip}")
        source = {"zip": hashlib.sha256(args.zip.read_bytes()).hexdigest()}
    else:
        source = {"url": args.url}
    archive = args.zip or Path(Path(args.url.split("?")[0]).name or "kvasir-seg.zip")
    part, before = part_of(archive), read_source(KVASIR_DIR)
    if before == source:
        print(f"이미 있습니다: {KVASIR_DIR}")
    elif KVASIR_DIR.exists() and not before:
        fail(f"{KVASIR_DIR} 폴더가 이미 있는데 이 스크립트가 만든 것이 아닙니다. 옮기거나 지운 뒤 다시 실행하세요")
    else:
        given = archive.is_file()  # with --zip, or laid here by the user: it is used, and not deleted
        try:
            if given:
                check_archive(archive)
            else:
                print(f"Kvasir-SEG를 받습니다: {args.url}")
                download(args.url, part)
                if args.keep_zip:
                    part.replace(archive)
            used = archive if given or args.keep_zip else part
            unpack(used, KVASIR_DIR, source)
        except BadDownload as problem:
            if not given:
                used.unlink()
            fail(f"{archive}: {problem}")
        print(f"압축 해제 완료: {KVASIR_DIR}")
    if not args.zip:
        part.unlink(missing_ok=True)  # here, so that what a stopped run left goes too


def fetch_checkpoint(name):
    url = CHECKPOINT_URL.format(name)
    path = Path("checkpoints") / url.rsplit("/", 1)[1]
    if path.is_file():
        print(f"이미 있습니다: {path}")
        return
    print(f"체크포인트를 받습니다: {url}")
    lock(path.with_name(path.name + ".lock"))
    download(url, part_of(path))
    part_of(path).replace(path)
    print(f"저장: {path} ({path.stat().st_size / 1e6:.0f} MB)")


def parse_args():
    parser = Parser(
        description="Kvasir-SEG 데이터셋을 받아 data/를 만들거나, SAM 2.1 체크포인트를 받습니다.")
    parser.add_argument("--url", default=KVASIR_URL, help=f"데이터셋 주소 (기본: {KVASIR_URL})")
    parser.add_argument("--zip", type=Path, help="이미 받아 둔 압축 파일을 사용")
    parser.add_argument("--data-dir", default="data", help="결과 폴더 (기본: data)")
    parser.add_argument("--val-ratio", default="0.2", help="검증에 쓸 비율 (기본: 0.2)")
    parser.add_argument("--shuffle-seed", default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    parser.add_argument("--keep-zip", action="store_true", help="받은 압축 파일을 지우지 않음")
    parser.add_argument("--checkpoint", choices=["tiny", "small", "base_plus", "large"],
                        help="데이터셋 대신 공식 SAM 2.1 체크포인트를 checkpoints/에 받음")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.checkpoint:
        fetch_checkpoint(args.checkpoint)
        return
    lock(KVASIR_DIR.with_name(KVASIR_DIR.name + ".lock"))
    fetch_kvasir(args)
    command = [sys.executable, str(Path(__file__).with_name("prepare_data.py")),
               "--images", str(KVASIR_DIR / "images"), "--masks", str(KVASIR_DIR / "masks"),
               "--data-dir", args.data_dir, "--val-ratio", args.val_ratio]
    if args.shuffle_seed is not None:
        command += ["--shuffle-seed", args.shuffle_seed]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("중단했습니다. 같은 명령을 다시 실행하면 이어서 합니다")
    except OSError as error:
        fail_for(error)

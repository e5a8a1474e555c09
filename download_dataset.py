"""Download Kvasir-SEG and convert it to data/, or download an official SAM 2.1 checkpoint.

    python download_dataset.py                       download, unpack to Kvasir-SEG/, split into data/
    python download_dataset.py --zip kvasir-seg.zip  the same, from a local archive
    python download_dataset.py --checkpoint small    download the weights to checkpoints/

An interrupted download continues where it stopped. Finished steps are not repeated.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from filelock import FileLock, Timeout
from tqdm import tqdm

KVASIR_URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_{}.pt"
KVASIR_DIR = Path("Kvasir-SEG")
TRIES = 3
WAIT = 1                # seconds before the second try; doubled before each further one
TIMEOUT = (10, 30)      # seconds to connect, and seconds without a byte arriving
SLOW_SECONDS, SLOW_BYTES = 60, 20_000  # give up a connection that delivers fewer bytes in this many seconds
CHUNK = 8192            # bytes read at once
BOMB_RATIO, BOMB_BYTES = 20, 10**9  # refuse an archive that exceeds this ratio and this size when unpacked

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream lacks it
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising


class BadDownload(Exception):
    """The downloaded file cannot be used; the message gives the reason, in Korean."""


def main():
    args = parse_args()
    if args.checkpoint:
        download_checkpoint(args.checkpoint)
    else:
        make_kvasir_folder(args)
        sys.exit(prepare_data(args))


def parse_args():
    parser = argparse.ArgumentParser(
        description="Kvasir-SEG 데이터셋을 받아 data/를 만들거나, SAM 2.1 체크포인트를 받습니다.")
    parser.add_argument("--url", default=KVASIR_URL, help="데이터셋 주소 (기본: %(default)s)")
    parser.add_argument("--zip", type=Path, help="이미 받아 둔 압축 파일을 사용")
    parser.add_argument("--data-dir", default="data", help="결과 폴더 (기본: %(default)s)")
    parser.add_argument("--val-ratio", default="0.2", help="검증에 쓸 비율 (기본: %(default)s)")
    parser.add_argument("--shuffle-seed", default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    parser.add_argument("--keep-zip", action="store_true", help="받은 압축 파일을 지우지 않음")
    parser.add_argument("--checkpoint", choices=["tiny", "small", "base_plus", "large"],
                        help="데이터셋 대신 공식 SAM 2.1 체크포인트를 checkpoints/에 받음")
    return parser.parse_args()


def download_checkpoint(name):
    url = CHECKPOINT_URL.format(name)
    path = Path("checkpoints") / url.rsplit("/", 1)[1]
    if path.is_file():
        print(f"이미 있습니다: {path}")
        return
    print(f"체크포인트를 받습니다: {url}")
    lock(path.with_name(f".{path.name}.lock"))
    download(url, part_of(path))
    part_of(path).replace(path)
    print(f"저장: {path} ({path.stat().st_size / 1e6:.0f} MB)")


def make_kvasir_folder(args):
    """Create Kvasir-SEG/ from the archive given by the arguments, unless it already exists."""
    lock(Path(f".{KVASIR_DIR}.lock"))
    if args.zip and not args.zip.is_file():
        fail(f"파일이 없습니다: {args.zip}")
    source = {"zip": hashlib.sha256(args.zip.read_bytes()).hexdigest()} if args.zip else {"url": args.url}
    earlier_source = read_source(KVASIR_DIR)
    archive = args.zip or Path(Path(args.url.split("?")[0]).name or "kvasir-seg.zip")
    if earlier_source == source:
        print(f"이미 있습니다: {KVASIR_DIR}")
    elif KVASIR_DIR.exists() and not earlier_source:
        fail(f"{KVASIR_DIR} 폴더가 이미 있는데 이 스크립트가 만든 것이 아닙니다. 옮기거나 지운 뒤 다시 실행하세요")
    else:
        unpack_new_archive(args, archive, source)
        print(f"압축 해제 완료: {KVASIR_DIR}")
    if not args.zip:
        part_of(archive).unlink(missing_ok=True)  # here, so that the part of an interrupted run is removed too


def unpack_new_archive(args, archive, source):
    """Unpack `archive`; download it first unless the user provides it (with --zip, or in this folder)."""
    is_users_own = archive.is_file()
    try:
        if is_users_own:
            check_archive(archive)
        else:
            print(f"Kvasir-SEG를 받습니다: {args.url}")
            download(args.url, part_of(archive))
            if args.keep_zip:
                part_of(archive).replace(archive)
        unpack(archive if archive.is_file() else part_of(archive), KVASIR_DIR, source)
    except BadDownload as error:
        if not is_users_own:
            archive.unlink(missing_ok=True)
            part_of(archive).unlink(missing_ok=True)
        fail(f"{archive}: {error}")


def read_source(target):
    """The source of `target`, as recorded by unpack(); {} if unknown."""
    try:
        return json.loads((target / ".source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def part_of(path):
    """The temporary path of a file or folder until it is complete."""
    return path.with_name(path.name + ".part")


def download(url, part):
    """Download `url` to `part`, continuing after the bytes already received. Gives up after TRIES tries."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BadDownload):
        check_archive(part)
        return  # complete: an earlier run was stopped after the download
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return download_once(url, part)
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                fail(f"{url} 의 인증서를 믿을 수 없어 받지 않았습니다. "
                     "컴퓨터의 시계와 네트워크(회사 프록시 등)를 확인하세요")
            problem = "보안 연결(TLS)을 맺지 못했거나 끊겼습니다"
        except requests.HTTPError as error:
            status = error.response.status_code
            if 400 <= status < 500 and status not in (408, 429):
                fail(f"{url} 이 없거나 받을 수 없습니다 (서버 응답 {status}). 주소를 확인하세요")
            problem = f"서버 응답 {status} {error.response.reason}"
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            problem = "응답이 없습니다 (시간 초과)"
        except (requests.ConnectionError, urllib3.exceptions.HTTPError):
            problem = "연결할 수 없거나 끊겼습니다"
        except (requests.RequestException, BadDownload, ValueError) as error:  # ValueError: redirect without address
            problem = str(error)
        print(f"받지 못했습니다 ({attempt + 1}/{TRIES}): {problem}")
    fail(f"{url} 을 받지 못했습니다. 네트워크를 확인하고 같은 명령을 다시 실행하면 이어서 받습니다")


def download_once(url, part):
    """Try `url` once and append the missing bytes to `part`. Raises BadDownload or an error of requests or urllib3."""
    received = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # Range and Content-Length count the bytes as they are stored
    if received:
        headers["Range"] = f"bytes={received}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT,
                      hooks={"response": refuse_downgrade}) as response:
        if response.status_code == 416:  # nothing left to send, or `part` belongs to another file
            part.unlink()
            raise BadDownload("서버가 이어받기를 거절했습니다")
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {received}-"):
            received = 0  # the server sends the whole file
        length = response.headers.get("Content-Length", "")
        total = received + int(length) if length.isdigit() else None
        with part.open("ab" if received else "wb") as file, tqdm(
                total=total, initial=received, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            receive(response.raw, file, bar)
    size = part.stat().st_size
    if total is not None and size < total:
        raise BadDownload(f"{total:,}바이트 중 {size:,}바이트만 받았습니다")
    try:
        check_archive(part)
    except BadDownload:
        part.unlink()  # continuing after damaged bytes would never give a good file
        raise


def refuse_downgrade(response, **_):
    """Fail on a redirect from https to http. requests calls this for every response, before following it."""
    target = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and urlsplit(response.url).scheme == "https" and urlsplit(target).scheme != "https":
        fail(f"{response.url} 이 암호화되지 않은 주소로 넘겨 받지 않았습니다: {target}")


def receive(raw, file, bar):
    """Write the received bytes to `file`; BadDownload if they arrive too slowly (a timeout detects only silence)."""
    read = getattr(raw, "read1", raw.read)  # read1 (urllib3 2) returns the available bytes without waiting
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
    """Raise BadDownload unless `path` is a zip (as .pt files are) of plausible size whose members pass their CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size):
                raise zipfile.BadZipFile(f"풀면 {unpacked / 1e9:,.1f} GB가 되는 의심스러운 파일")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"손상된 파일: {damaged}")
    except Exception as error:  # zipfile and decompressors raise different errors in different versions
        raise BadDownload(f"zip 파일이 아니거나 손상되었습니다 ({error})") from None


def unpack(archive_path, target, source):
    """Unpack a Kvasir-SEG archive: create both `target`/images and `target`/masks, or neither.

    source: the value that read_source() will return for `target`. Raises BadDownload for any other archive.
    ZipFile.extract keeps members in the folder: it drops drives, leading slashes and "..", and creates no links.
    """
    staging = part_of(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with zipfile.ZipFile(archive_path) as archive:
            for member in tqdm(archive.infolist(), "압축 풀기", disable=None):
                archive.extract(member, staging)
        root = next((folder for folder in (staging, *sorted(staging.iterdir()))
                     if (folder / "images").is_dir() and (folder / "masks").is_dir()), None)
        if root is None:
            raise BadDownload("Kvasir-SEG 압축 파일이 아닙니다 (images와 masks 폴더가 없음)")
        (root / ".source.json").write_text(json.dumps(source), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    except (BadDownload, OSError):
        raise
    except Exception as error:  # zipfile: a member without a name, or a damaged one hidden by its namesake
        raise BadDownload(f"풀 수 없는 압축 파일입니다 ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def prepare_data(args):
    """Run prepare_data.py, which pairs and splits the files; returns its exit code."""
    command = [sys.executable, Path(__file__).with_name("prepare_data.py"), "--images", KVASIR_DIR / "images",
               "--masks", KVASIR_DIR / "masks", "--data-dir", args.data_dir, "--val-ratio", args.val_ratio]
    if args.shuffle_seed is not None:
        command += ["--shuffle-seed", args.shuffle_seed]
    return subprocess.run(command).returncode


def lock(path):
    """Hold the lock file `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # raises if the folder is read-only; errors below come from the locking itself
    file_lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a run that is killed
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")
    except OSError as error:  # Lustre without flock, SMB, NFS without lockd
        print(f"주의: 이 파일 시스템은 파일을 잠그지 못합니다 ({path}: {error.strerror}). "
              "같은 폴더에서 두 번 실행하지 마세요", file=sys.stderr)
    atexit.register(file_lock.release)  # also keeps a reference, without which the lock is released


def fail(message):
    """End with exit code 1 and one line on stderr."""
    sys.exit(f"오류: {message}")


def run_main(interrupted):
    """Call main(). An OSError prints one line and gives exit code 1; Ctrl-C prints the line `interrupted`."""
    try:
        main()
    except KeyboardInterrupt:
        fail(interrupted)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)


if __name__ == "__main__":
    run_main("중단했습니다. 같은 명령을 다시 실행하면 이어서 합니다")

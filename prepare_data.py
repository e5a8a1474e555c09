"""Bring images and masks into data/, or look through what is there.

    python prepare_data.py --images DIR --masks DIR      pairs by file name
    python prepare_data.py --images DIR --coco FILE      COCO polygons or RLE (CVAT, Roboflow, Label Studio)
    python prepare_data.py --check                       every problem in data/, by file
    python prepare_data.py --preview 12                  a contact sheet of 12 pairs
    python prepare_data.py                               empty folders, and how to fill them

What it writes:

    data/images/{train,val}/NAME.jpg|.jpeg|.png    the image's own bytes (other formats become PNG)
    data/masks/{train,val}/NAME.png                8-bit, 0 or 255, the size of the image
    data/split.json                                what it was made from, so that it is not made twice
"""

import argparse
import atexit
import errno
import hashlib
import json
import os
import random
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".bmp", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val")

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # what is wrong with a file is said once, by this script


class BadPair(Exception):
    """An image or a mask that cannot be used; the message says why, in the user's words."""


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


def write_file(path, content):
    """Write bytes beside `path`, then rename: a reader sees the old file or the new, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path, value):
    """Write a JSON file for people to read: letters as they are, escapes for a file name's bytes that are none."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def is_broken(content):
    """Whether a JPEG or PNG file ends too early or, for a PNG, has other checksums than its parts.

    OpenCV would fill the rest of a cut JPEG with grey, and make room for any length that a PNG claims.
    """
    if content.startswith(b"\x89PNG"):
        place = 8
        while place + 12 <= len(content):
            after = place + 8 + int.from_bytes(content[place:place + 4], "big")
            kind, checksum = content[place + 4:place + 8], content[after:after + 4]
            if zlib.crc32(content[place + 4:after]).to_bytes(4, "big") != checksum and kind.isupper():
                return True  # in a part that the picture cannot do without: IHDR, PLTE, IDAT, IEND
            if kind == b"IEND":
                return False
            place = after + 4
        return True
    place = 2
    while content.startswith(b"\xff\xd8") and content[place:place + 1] == b"\xff":
        marker, length = content[place + 1:place + 2], int.from_bytes(content[place + 2:place + 4], "big")
        if marker == b"\xda":  # the picture itself, in which FF D9 stands at the end only
            return content.find(b"\xff\xd9", place) < 0
        place += 2 + length
    return False


def decode(path, flags):
    """Decode an image file; BadPair if it is none, or not whole. (cv2.imread cannot open Korean paths on Windows.)"""
    try:
        content = path.read_bytes()
        decoded = None if is_broken(content) else cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except (OSError, ValueError, cv2.error):
        content, decoded = b"", None
    if decoded is None:
        raise BadPair(f"{'중간에서 잘렸거나 손상된' if is_broken(content) else '읽을 수 없는'} 파일: {path.name}")
    return decoded


def read_source_mask(path):
    """Read a mask as others draw it, as bool H x W.

    Foreground is what is brighter than 127 in any channel, so a red mask counts as well as a white one;
    JPEG masks ring around the edge, which the threshold removes. A mask of 0 and 1 is taken as such.
    """
    mask = decode(path, cv2.IMREAD_COLOR).max(axis=2)
    return mask > (0 if mask.max() == 1 else 127)


def composed(name):
    """A file name with each Korean letter as one character; macOS and its zip files take them apart."""
    return unicodedata.normalize("NFC", name)


def by_stem(folder):
    """Image files of a folder by stem: {stem: [paths]}, sorted by name; Korean letters composed (NFC)."""
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    files = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            files[composed(path.stem)].append(path)
    return files


def pairs_from_masks(image_dir, mask_dir):
    """Pair images and mask files by stem.

    Returns: {image path: a function that reads its mask, bool H x W}, and {name: problem} for the others.
    """
    images, masks = by_stem(image_dir), by_stem(mask_dir)
    readers, problems = {}, {}
    for stem in sorted(images.keys() | masks.keys()):
        found, drawn = images.get(stem, []), masks.get(stem, [])
        if len(found) > 1 or len(drawn) > 1:
            twins = found if len(found) > 1 else drawn
            problems[stem] = "이름이 같은 파일이 여럿: " + ", ".join(path.name for path in twins)
        elif not drawn:
            problems[found[0].name] = "마스크 없음"
        elif not found:
            problems[drawn[0].name] = "이미지 없음"
        else:
            readers[found[0]] = lambda path=drawn[0]: read_source_mask(path)
    return readers, problems


def uncompress(text):
    """The run lengths in COCO's compressed RLE string (cocoapi, rleFrString): 5 bits a letter, differences."""
    counts, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last letter of a number; its next bit is the sign
            value -= (bits & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def decode_segmentation(segmentation, height, width):
    """One COCO segmentation (polygons, or RLE, plain or compressed) as bool H x W; ValueError if it is none.

    Everything is checked before it is used: pycocotools' own C code crashes on runs that leave the image.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = np.array(uncompress(counts) if isinstance(counts, str) else counts, np.int64)
        if segmentation["size"] != [height, width] or counts.ndim != 1 or (counts < 0).any() or \
                counts.sum() != height * width:
            raise ValueError("RLE does not cover the image")
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        points = np.array(polygon, float)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) < 1e5).all():
            raise ValueError("not a polygon")
        for rle in coco_mask.frPyObjects([points.tolist()], height, width):
            mask |= coco_mask.decode(rle).astype(bool)
    return mask


def decode_segmentations(segmentations, height, width):
    """Union of COCO segmentations, as bool H x W; BadPair if one of them cannot be used."""
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and 0 < height * width < 2**30):
        raise BadPair(f"COCO 파일의 이미지 크기가 잘못됨 ({width}x{height})")
    union = np.zeros((height, width), bool)
    for segmentation in segmentations:
        try:
            union |= decode_segmentation(segmentation, height, width)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            raise BadPair(f"segmentation을 해석할 수 없음 ({type(error).__name__})") from None
    return union


def base_name(file_name):
    """The name in a COCO file without the folders that CVAT writes in front of it."""
    return composed(PurePosixPath(str(file_name).replace("\\", "/")).name)


def pairs_from_coco(image_dir, coco_file):
    """As pairs_from_masks, with the masks from a COCO file: the union of all objects of an image."""
    try:
        coco = json.loads(coco_file.read_text(encoding="utf-8-sig"))
        entries = {image["id"]: (base_name(image["file_name"]), image["height"], image["width"])
                   for image in coco["images"]}
        segmentations = defaultdict(list)
        for annotation in coco["annotations"]:
            if annotation.get("segmentation"):
                segmentations[annotation["image_id"]].append(annotation["segmentation"])
    except OSError as error:
        fail(f"{coco_file}: 읽을 수 없습니다 ({error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{coco_file}: COCO 형식이 아닙니다 ({type(error).__name__}: {error})")

    files = {composed(p.name): p for paths in by_stem(image_dir).values() for p in paths}
    stems = Counter(Path(name).stem for name in files)
    readers, problems = {}, {}
    for identity, (name, height, width) in sorted(entries.items(), key=lambda entry: entry[1][0]):
        if name not in files:
            problems[name] = "이미지 없음"
        elif stems[Path(name).stem] > 1:
            problems[name] = "이름이 같은 파일이 여럿"
        elif not segmentations[identity]:
            problems[name] = "마스크 없음 (annotations에 없음)"
        elif files[name] in readers:
            problems[name] = "COCO 파일에 두 번 나옴"
        else:
            readers[files[name]] = lambda found=segmentations[identity], h=height, w=width: \
                decode_segmentations(found, h, w)
    named = {name for name, _, _ in entries.values()}
    problems.update({name: "마스크 없음 (COCO 파일에 없음)" for name in files if name not in named})
    return readers, problems


def split_names(names, val_ratio, shuffle_seed):
    """Split names into {"train": [...], "val": [...]}: sorted, the first part to train, the rest to val.

    With a shuffle_seed the sorted names are shuffled first. The size of val is rounded to a whole number.
    """
    names = sorted(names)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(names)
    cut = len(names) - round(len(names) * val_ratio)
    return {"train": names[:cut], "val": names[cut:]}


def fingerprint(files, *settings):
    """A hash of the files' names and contents and of the settings: the same input gives the same one."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(files):
        digest.update(os.fsencode(f"\0{path.name}\0"))
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_pair(image_path, read_mask, target):
    """Check one pair and write it below `target` (.../images/STEM.*, .../masks/STEM.png); BadPair if bad."""
    image = decode(image_path, cv2.IMREAD_COLOR)  # applies the EXIF rotation, as the scripts that read it do
    mask = read_mask()
    if mask.shape != image.shape[:2]:
        raise BadPair("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*image.shape[:2], *mask.shape))
    if not mask.any():
        raise BadPair("마스크가 비어 있음")
    if image_path.suffix.lower() in KEPT_AS_IS:
        shutil.copyfile(image_path, target / "images" / image_path.name)
    else:
        content = cv2.imencode(".png", image)[1]
        (target / "images" / f"{image_path.stem}.png").write_bytes(content.tobytes())
    content = cv2.imencode(".png", mask.astype(np.uint8) * 255)[1]
    (target / "masks" / f"{image_path.stem}.png").write_bytes(content.tobytes())


def data_files(data_dir):
    """All files below data_dir/images and data_dir/masks, relative to data_dir, sorted."""
    return sorted(path.relative_to(data_dir).as_posix() for part in ("images", "masks")
                  for path in (data_dir / part).rglob("*") if path.is_file())


def read_record(target):
    """What data/split.json says; {} if there is none."""
    try:
        return json.loads((target / "split.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_pairs(readers, problems, folder):
    """Write the good pairs to folder/images and folder/masks; the bad ones go into `problems`, by name."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for image_path, read_mask in tqdm(sorted(readers.items()), "준비", disable=None):
        try:
            write_pair(image_path, read_mask, folder)
        except BadPair as problem:
            problems[image_path.name] = str(problem)


def put_in_place(staging, target, record):
    """Move the new images/ and masks/ to `target`; until both are there, its split.json says so."""
    target.mkdir(parents=True, exist_ok=True)
    split_file = target / "split.json"
    write_json(split_file, {"complete": False})
    for part in ("images", "masks"):
        shutil.rmtree(target / part, ignore_errors=True)
        (staging / part).rename(target / part)
    staging.rmdir()
    write_json(split_file, {**record, "files": data_files(target)})


def prepare(args):
    """Pair, check, threshold, split and write data/; prints what was done."""
    if args.coco:
        readers, problems = pairs_from_coco(args.images, args.coco)
        sources = [*readers, args.coco]
    else:
        readers, problems = pairs_from_masks(args.images, args.masks)
        sources = [*readers, *(p for paths in by_stem(args.masks).values() for p in paths)]
    target = args.data_dir
    if target.resolve() in (args.images.resolve(), *args.images.resolve().parents):
        fail(f"--images가 결과 폴더 {target} 안에 있습니다. 원본은 다른 폴더에 두세요")

    record = {"fingerprint": fingerprint(sources, args.val_ratio, args.shuffle_seed), "complete": True,
              "val_ratio": args.val_ratio, "shuffle_seed": args.shuffle_seed}
    before, files = read_record(target), data_files(target)
    if before.get("complete") and before.get("fingerprint") == record["fingerprint"] and before.get("files") == files:
        print(f"이미 준비되어 있습니다: {target} (같은 원본, 같은 분할)")
        return
    if files and not before:
        fail(f"{target}에 직접 넣은 파일이 있어 덮어쓰지 않습니다. 옮기거나 다른 --data-dir을 쓰세요")

    staging = target.with_name(target.name + ".part")
    good = staging / "all"
    lock(target.with_name(target.name + ".lock"))
    shutil.rmtree(staging, ignore_errors=True)
    write_pairs(readers, problems, good)
    for name, problem in sorted(problems.items()):
        print(f"  제외: {name} - {problem}")
    written = {path.name: path.stem for path in (good / "images").iterdir()}
    if not written:
        shutil.rmtree(staging)
        fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}")

    splits = split_names(written, args.val_ratio, args.shuffle_seed)
    for split, names in splits.items():
        for part in ("images", "masks"):
            (staging / part / split).mkdir(parents=True)
        for name in names:
            (good / "images" / name).rename(staging / "images" / split / name)
            mask_name = f"{written[name]}.png"
            (good / "masks" / mask_name).rename(staging / "masks" / split / mask_name)
    shutil.rmtree(good)
    put_in_place(staging, target, record)
    print(f"완료: {target} - 학습 {len(splits['train'])}쌍, 검증 {len(splits['val'])}쌍, 제외 {len(problems)}개")


def inspect_pair(found, drawn):
    """Size "WxH" and share of foreground of a pair as it lies in data/; BadPair if it cannot be trained on.

    found, drawn: the images and the masks of one stem.
    """
    if len(found) > 1 or len(drawn) > 1:
        raise BadPair("이름이 같은 파일이 여럿")
    if not found or found[0].suffix.lower() not in KEPT_AS_IS:
        raise BadPair("이미지 없음 (jpg, jpeg, png)")
    if not drawn or drawn[0].name != f"{found[0].stem}.png":
        raise BadPair(f"마스크 없음 ({found[0].stem}.png이어야 함)")
    image, mask = decode(found[0], cv2.IMREAD_COLOR), decode(drawn[0], cv2.IMREAD_GRAYSCALE)
    if image.shape[:2] != mask.shape:
        raise BadPair("크기가 다름 (이미지 {1}x{0}, 마스크 {3}x{2})".format(*image.shape[:2], *mask.shape))
    if not (mask > 127).any():
        raise BadPair(f"마스크가 비어 있음 (가장 밝은 값 {mask.max()}, 127보다 커야 전경)")
    return f"{image.shape[1]}x{image.shape[0]}", (mask > 127).mean()


def check(data_dir):
    """Print counts, sizes, share of foreground and every problem of data/; returns the number of problems."""
    problems, pairs = [], 0
    for split in SPLITS:
        images, masks = (by_stem(data_dir / part / split) for part in ("images", "masks"))
        sizes, shares = Counter(), []
        for stem in tqdm(sorted(images.keys() | masks.keys()), f"{split} 검사", disable=None, leave=False):
            found, drawn = images.get(stem, []), masks.get(stem, [])
            try:
                size, share = inspect_pair(found, drawn)
            except BadPair as problem:
                problems.append(f"{split}/{(found or drawn)[0].name}: {problem}")
                continue
            sizes[size] += 1
            shares.append(share)
        pairs += len(shares)
        print(f"{split}: {len(shares)}쌍")
        if shares:
            common = ", ".join(f"{size} ({count}장)" for size, count in sizes.most_common(3))
            print(f"  크기 {len(sizes)}가지: {common}{' 등' if len(sizes) > 3 else ''}")
            print(f"  전경 비율: 최소 {min(shares):.1%}, 중앙값 {np.median(shares):.1%}, 최대 {max(shares):.1%}")
    for problem in problems:
        print(f"  문제: {problem}")
    if not pairs:
        problems.append("쌍이 없음")
        print(f"  문제: {data_dir}에 이미지-마스크 쌍이 하나도 없습니다")
    print("문제 없음" if not problems else f"문제 {len(problems)}개")
    return len(problems)


def preview(data_dir, count):
    """Write data/preview.png: `count` pairs spread over data/, each with its mask drawn over the image."""
    found = [(image, data_dir / "masks" / split / f"{image.stem}.png") for split in SPLITS
             for image in sorted((data_dir / "images" / split).glob("*")) if image.suffix.lower() in KEPT_AS_IS]
    found = [(image, mask) for image, mask in found if mask.is_file()]
    if not found:
        fail(f"{data_dir}에 이미지-마스크 쌍이 없습니다. 먼저 데이터를 준비하세요")
    count = min(count, len(found))
    tile, columns = 256, min(count, 6)
    sheet = np.full((-(-count // columns) * tile, columns * tile, 3), 255, np.uint8)
    for place, index in enumerate(np.linspace(0, len(found) - 1, count).round().astype(int)):
        image_path, mask_path = found[index]
        try:
            image, mask = decode(image_path, cv2.IMREAD_COLOR), decode(mask_path, cv2.IMREAD_GRAYSCALE)
        except BadPair as problem:
            fail(f"{problem}. python prepare_data.py --check 로 확인하세요")
        scale = (tile - 8) / max(image.shape[:2])
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize((mask > 127).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        image[mask > 0] = (0.65 * image[mask > 0] + 0.35 * np.array([0, 220, 0])).astype(np.uint8)
        edges, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, edges, -1, (0, 220, 0), 1)
        top, left = (4 + place // columns * tile, 4 + place % columns * tile)
        sheet[top:top + size[1], left:left + size[0]] = image
    path = data_dir / "preview.png"
    write_file(path, cv2.imencode(".png", sheet)[1].tobytes())
    print(f"저장: {path} ({count}쌍)")


def make_empty_folders(data_dir):
    for part in ("images", "masks"):
        for split in SPLITS:
            (data_dir / part / split).mkdir(parents=True, exist_ok=True)
    print(f"""폴더를 만들었습니다: {data_dir}

직접 채우기:
  {data_dir}/images/train/이름.jpg    학습 이미지 (jpg, jpeg, png)
  {data_dir}/masks/train/이름.png     같은 이름의 마스크 (흰색 255가 전경, 검은색 0이 배경, 이미지와 같은 크기)
  {data_dir}/images/val, {data_dir}/masks/val 도 같은 방식으로 (검증용, 전체의 20% 정도)
  확인: python prepare_data.py --check

자동으로 나누기:
  python prepare_data.py --images 이미지폴더 --masks 마스크폴더
  python prepare_data.py --images 이미지폴더 --coco annotations.json

Kvasir-SEG 받기:
  python download_dataset.py""")


def ratio(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("0 이상 1 미만이어야 합니다")
    return value


def parse_args():
    parser = Parser(description="내 이미지와 마스크를 data/에 준비하고 확인합니다.")
    parser.add_argument("--images", type=Path, help="이미지 폴더")
    parser.add_argument("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    parser.add_argument("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="결과 폴더 (기본: data)")
    parser.add_argument("--val-ratio", type=ratio, default=0.2, help="검증에 쓸 비율 (기본: 0.2)")
    parser.add_argument("--shuffle-seed", type=int, default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    parser.add_argument("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    parser.add_argument("--preview", type=int, metavar="N", help="N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    if (args.masks or args.coco) and not args.images or args.images and not (args.masks or args.coco):
        parser.error("--images에는 --masks 또는 --coco가 함께 있어야 합니다")
    if args.masks and args.coco:
        parser.error("--masks와 --coco 중 하나만 쓰세요")
    if args.preview is not None and args.preview < 1:
        parser.error("--preview는 1 이상이어야 합니다")
    return args


def main():
    args = parse_args()
    if args.images:
        prepare(args)
    problems = check(args.data_dir) if args.check else 0
    if args.preview:
        preview(args.data_dir, args.preview)
    if not (args.images or args.check or args.preview):
        make_empty_folders(args.data_dir)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("중단했습니다. 같은 명령을 다시 실행하면 처음부터 다시 합니다")
    except OSError as error:
        fail_for(error)

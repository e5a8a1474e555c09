"""Bring images and masks into data/, or look through what is there.

    python prepare_data.py --images DIR --masks DIR      pairs by file name; masks of one or of numbered objects
    python prepare_data.py --images DIR --coco FILE      COCO polygons or RLE (CVAT, Roboflow, Label Studio)
    python prepare_data.py --check                       every problem in data/, by file
    python prepare_data.py --preview 12                  a contact sheet of 12 pairs
    python prepare_data.py                               empty folders, and how to fill them

What it writes:

    data/images/{train,val}/NAME.jpg|.jpeg|.png    the image's own bytes (other formats become PNG)
    data/masks/{train,val}/NAME.png                the size of the image; 8-bit, 0 or 255: one object;
                                                   16-bit: numbered objects, 0 is the background
    data/split.json                                what it was made from, so that it is not made twice
"""

import argparse
import atexit
import colorsys
import hashlib
import json
import os
import random
import re
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock, Timeout
from pycocotools import mask as coco_mask
from tqdm import tqdm

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".bmp", ".tif", ".tiff", ".webp")
LOSSLESS_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val")
SYSTEM_FILES = re.compile(r"/(\.|@eaDir/|Thumbs\.db$|desktop\.ini$)")  # hidden, of a NAS, of Windows
MAX_SIDE = 1024        # train_sam2_proper.py reduces larger images to this ...
MIN_FOREGROUND = 100   # ... and then leaves out objects with fewer pixels
TILE = 256             # pixels: the side of a picture in the preview

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's has no such thing
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script


class BadPair(Exception):
    """An image or a mask that cannot be used; the message says why, in Korean."""


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


def parse_args():
    parser = argparse.ArgumentParser(description="내 이미지와 마스크를 data/에 준비하고 확인합니다.")
    parser.add_argument("--images", type=Path, help="이미지 폴더")
    parser.add_argument("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    parser.add_argument("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--numbered", action="store_true",
                      help="--masks의 8비트 마스크도 값이 객체의 번호 (0은 배경). 16비트부터는 언제나 번호")
    kind.add_argument("--colours", action="store_true",
                      help="--masks에서 색 하나가 객체 하나 (검은색은 배경). 색이 클래스면 클래스 하나가 객체 하나")
    parser.add_argument("--category", action="append", metavar="NAME", help="--coco에서 이 범주만 씀 (여러 번 가능)")
    parser.add_argument("--merge", action="store_true", help="이미지의 객체를 모두 8비트 마스크 하나로 합침")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="결과 폴더 (기본: %(default)s)")
    parser.add_argument("--val-ratio", type=float, default=0.2, help="검증에 쓸 비율 (기본: %(default)s)")
    parser.add_argument("--shuffle-seed", type=int, default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    parser.add_argument("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    parser.add_argument("--preview", type=int, metavar="N", help="N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    if bool(args.images) != bool(args.masks or args.coco):
        parser.error("--images에는 --masks 또는 --coco가 함께 있어야 합니다")
    if args.masks and args.coco:
        parser.error("--masks와 --coco 중 하나만 쓰세요")
    if (args.numbered or args.colours) and not args.masks or args.category and not args.coco:
        parser.error("--numbered와 --colours는 --masks와, --category는 --coco와 함께 씁니다")
    if not 0 <= args.val_ratio < 1:
        parser.error("--val-ratio는 0 이상 1 미만이어야 합니다")
    if args.preview is not None and args.preview < 1:
        parser.error("--preview는 1 이상이어야 합니다")
    return args


def prepare(args):
    """Pair, check, threshold, split and write data/; prints what was done."""
    target = args.data_dir
    if target.resolve() in (args.images.resolve(), *args.images.resolve().parents):
        fail(f"--images가 결과 폴더 {target} 안에 있습니다. 원본은 다른 폴더에 두세요")
    if args.coco:
        readers, problems = pairs_from_coco(args.images, args.coco, args.category, args.merge)
        sources = [*readers, args.coco]
    else:
        readers, problems = pairs_from_masks(args.images, args.masks, args.numbered, args.colours, args.merge)
        sources = [*readers, *image_files(args.masks)]

    lock(target / ".lock")
    settings = {name: getattr(args, name) for name in (
        "val_ratio", "shuffle_seed", "numbered", "colours", "category", "merge")}
    record = {"fingerprint": fingerprint(sources, settings), "complete": True, **settings}
    earlier_record, files = read_record(target), checksums(target)
    if earlier_record == {**record, "checksums": files}:
        print(f"이미 준비되어 있습니다: {target} (같은 원본, 같은 분할)")
        return
    own = earlier_record.get("checksums", files if earlier_record else {})  # of an unfinished run: all that is there
    if by_hand := sorted(files.items() - own.items()):
        fail(f"{target}에 직접 넣거나 고친 파일이 있어 덮어쓰지 않습니다 ({by_hand[0][0]}). "
             "옮기거나 다른 --data-dir을 쓰세요")

    staging = target / ".part"
    names = write_pairs(readers, problems, staging)
    for name, problem in sorted(problems.items()):
        print(f"  제외: {name} - {problem}")
    if not names:
        shutil.rmtree(staging)
        fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}")
    splits = split_names(names, args.val_ratio, args.shuffle_seed)
    put_in_place(staging, target, splits, record)
    print(f"완료: {target} - 학습 {len(splits['train'])}쌍, 검증 {len(splits['val'])}쌍, 제외 {len(problems)}개")


def pairs_from_masks(image_dir, mask_dir, numbered, colours, merge):
    """Pair images and mask files by stem.

    Returns: {image path: a function that reads its mask as read_source_mask does}, and {name: problem} for the others.
    """
    pairs, problems = pair_by_stem(image_dir, mask_dir)
    for _, mask_path in pairs:
        if (numbered or colours) and mask_path.suffix.lower() not in LOSSLESS_SUFFIXES:
            fail(f"{mask_path}: 손실 압축은 번호와 색을 바꾸므로 --numbered와 --colours에 쓸 수 없습니다. "
                 "PNG, TIFF, BMP로 저장한 원본을 쓰세요")
    return {image: partial(read_source_mask, mask, numbered, colours, merge) for image, mask in pairs}, problems


def pair_by_stem(image_dir, mask_dir):
    """Pair the files of two folders by stem: [(image path, mask path)], and {name: problem} for the others."""
    images, masks = by_stem(image_dir), by_stem(mask_dir)
    pairs, problems = [], {}
    for stem in sorted(images.keys() | masks.keys()):
        image_paths, mask_paths = images[stem], masks[stem]
        if len(image_paths) > 1 or len(mask_paths) > 1:
            same = image_paths if len(image_paths) > 1 else mask_paths
            problems[stem] = "이름이 같은 파일이 여럿: " + ", ".join(path.name for path in same)
        elif not mask_paths:
            problems[image_paths[0].name] = f"마스크 없음 (이름이 {stem}인 파일)"
        elif not image_paths:
            problems[mask_paths[0].name] = f"이미지 없음 (이름이 {stem}인 파일)"
        else:
            pairs.append((image_paths[0], mask_paths[0]))
    return pairs, problems


def by_stem(folder):
    """Image files of a folder by composed stem: {stem: [paths]}."""
    files = defaultdict(list)
    for path in image_files(folder):
        files[composed(path.stem)].append(path)
    return files


def image_files(folder):
    """The image files of a folder, sorted by name."""
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    return sorted(path for path in folder.iterdir()  # glob() would pass over a folder that cannot be read
                  if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file())


def composed(name):
    """A file name with each Korean letter as one character (NFC); macOS and its zip files decompose them."""
    return unicodedata.normalize("NFC", name)


def read_source_mask(path, numbered, colours, merge):
    """Read a mask that any tool wrote: bool H x W is one object, uint16 H x W numbered objects (0 is the background).

    Grey with more than 8 bits is numbered, as microscopy tools write it (16 or 32 bits, also as floats); 8 bits are,
    if `numbered`. With `colours` every colour but black is one object. Otherwise the foreground is what is brighter
    than 127 in any channel, so a red mask counts as well as a white one; JPEG masks ring around the edge, which the
    threshold removes. A mask of 0 and 1 is taken as such. BadPair if it cannot be read so.
    """
    values = decode(path, cv2.IMREAD_UNCHANGED)
    if not (numbered or colours or values.ndim == 2 and values.itemsize > 1):
        mask = decode(path, cv2.IMREAD_COLOR).max(axis=2)
        if 1 < mask.max() <= 127:
            raise BadPair(f"마스크가 비어 있음 (가장 밝은 값 {mask.max()}; 값이 객체의 번호라면 --numbered)")
        return mask > (0 if mask.max() == 1 else 127)
    if path.suffix.lower() in (".tif", ".tiff"):
        _, pages = cv2.imdecodemulti(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
        if len(pages) > 1:
            raise BadPair(f"여러 장이 든 TIFF: {path.name} (한 장씩 나누어야 함)")
    labels = colours_to_labels(values) if colours else numbers_to_labels(values)
    return labels > 0 if merge else labels


def colours_to_labels(values):
    """Pixels, H x W (x 3 or 4), as uint16 labels: a number for each colour, 0 for black or transparent ones."""
    if values.dtype not in (np.uint8, np.uint16):
        raise BadPair("색 마스크가 아님 (색은 8비트나 16비트)")
    channels = np.atleast_3d(values).astype(np.int64)
    codes = sum(channels[..., index] << 16 * index for index in range(min(3, channels.shape[2])))
    if channels.shape[2] == 4:
        codes[channels[..., 3] == 0] = 0
    return renumber(codes)


def numbers_to_labels(values):
    """Object numbers of any type as uint16 labels, as they are if they fit. BadPair if they are no object numbers."""
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise BadPair("번호 마스크인데 색이 있음 (색마다 객체 하나라면 --colours)")
        values = values[..., 0]
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or values.min() < 0:
        raise BadPair("번호가 0 이상의 정수가 아님")
    return renumber(values) if values.max() > 65535 else values.astype(np.uint16)


def renumber(values):
    """Any values from 0 up, H x W, as uint16 labels 1, 2, 3, ... in their order; 0 stays 0."""
    found, indices = np.unique(values, return_inverse=True)
    labels = indices.reshape(values.shape) + (found[0] != 0)
    if labels.max() > 65535:
        raise BadPair("객체가 65,535개보다 많음")
    return labels.astype(np.uint16)


def decode(path, flags):
    """Decode an image file with OpenCV; BadPair if it cannot be. (cv2.imread cannot open Korean paths on Windows.)"""
    try:
        decoded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flags)
    except OSError as error:
        raise BadPair(f"{path.name}: {error.strerror}") from None
    except cv2.error:  # an empty file, or more pixels than OpenCV allows
        decoded = None
    if decoded is None:
        raise BadPair(f"이미지 파일이 아니거나 손상됨: {path.name}")
    return decoded


def pairs_from_coco(image_dir, coco_file, categories, merge):
    """As pairs_from_masks, with the objects of a COCO file, or only those of the named categories.

    A region marked iscrowd is several objects in one: it is left out, and counted, unless all are merged anyway.
    """
    try:
        coco = json.loads(coco_file.read_text(encoding="utf-8-sig"))
        entries = {}
        for image in coco["images"]:
            name = re.split(r"[/\\]", str(image["file_name"]))[-1]  # without the folders that CVAT writes
            entries[image["id"]] = composed(name), image["height"], image["width"]
        known = {category["id"]: str(category["name"]) for category in coco["categories"]} if categories else {}
        objects, crowds = defaultdict(list), Counter()
        for annotation in coco["annotations"]:
            if categories and known.get(annotation["category_id"]) not in categories or \
                    not annotation.get("segmentation"):
                continue
            if annotation.get("iscrowd") and not merge:
                crowds[annotation["image_id"]] += 1
            else:
                objects[annotation["image_id"]].append(annotation["segmentation"])
    except FileNotFoundError:
        fail(f"파일이 없습니다: {coco_file}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{coco_file}: COCO 형식이 아닙니다 ({type(error).__name__}: {error})")
    if missing := set(categories or ()) - set(known.values()):
        fail(f"{coco_file}에 없는 범주입니다: {', '.join(sorted(missing))} (있는 것: {', '.join(known.values())})")
    if crowds:
        print(f"  제외: iscrowd 영역 {crowds.total()}개 (이미지 {len(crowds)}장)")

    files = {composed(path.name): path for path in image_files(image_dir)}
    stems = Counter(Path(name).stem for name in files)
    in_coco = {name for name, _, _ in entries.values()}
    readers, problems = {}, {name: "마스크 없음 (COCO 파일에 없음)" for name in files if name not in in_coco}
    for identity, (name, height, width) in sorted(entries.items(), key=lambda entry: entry[1][0]):
        if name not in files:
            problems[name] = "이미지 없음"
        elif stems[Path(name).stem] > 1:
            problems[name] = "이름이 같은 파일이 여럿"
        elif not objects[identity]:
            problems[name] = f"마스크 없음 ({'iscrowd 영역뿐' if crowds[identity] else 'annotations에 없음'})"
        elif files[name] in readers:
            problems[name] = "COCO 파일에 두 번 나옴"
        else:
            readers[files[name]] = partial(draw_objects, objects[identity], height, width, merge, name)
    return readers, problems


def draw_objects(segmentations, height, width, merge, name):
    """COCO segmentations as uint16 labels H x W, 1 for the first, larger objects below smaller ones.

    With `merge`, or for one segmentation: bool H x W, their union. BadPair if one of them cannot be used.
    """
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and 0 < height * width < 2**30):
        raise BadPair(f"COCO 파일의 이미지 크기가 잘못됨 ({width}x{height})")
    if len(segmentations) > 65535 and not merge:
        raise BadPair("객체가 65,535개보다 많음")
    try:
        rles = [to_rle(segmentation, height, width) for segmentation in segmentations]
        if merge or len(rles) == 1:
            return coco_mask.decode(coco_mask.merge(rles)) > 0
        labels = np.zeros((height, width), np.uint16)
        areas = [coco_mask.area(rle) for rle in rles]  # of more than 255 at once it fails (pycocotools 2.0.11)
        for index in np.argsort(areas, kind="stable")[::-1]:
            labels[coco_mask.decode(rles[index]) > 0] = index + 1
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise BadPair(f"segmentation을 해석할 수 없음 ({type(error).__name__})") from None
    if hidden := len(segmentations) - np.count_nonzero(np.bincount(labels.ravel())[1:]):
        tqdm.write(f"  제외: {name}의 객체 {hidden}개 - 비었거나 더 작은 객체에 모두 가려짐")
    return labels


def to_rle(segmentation, height, width):
    """A COCO segmentation (polygons, or RLE, plain or compressed) as pycocotools' RLE; ValueError if it is invalid.

    Checked here, because pycocotools crashes on polygons with NaN, and leaves pixels that runs do not reach undefined.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = np.array(uncompress(counts) if isinstance(counts, str) else counts, np.int64)
        if segmentation["size"] != [height, width] or counts.ndim != 1 or (counts < 0).any() or \
                counts.sum() != height * width:
            raise ValueError("RLE does not cover the image")
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return coco_mask.encode(coco_mask.decode(rle))  # without runs of no length, at which merge() goes wrong
    polygons = [np.array(polygon, float) for polygon in segmentation]
    for points in polygons:
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) < 1e5).all():
            raise ValueError("not a polygon")
    return coco_mask.merge(coco_mask.frPyObjects([points.tolist() for points in polygons], height, width))


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


def fingerprint(files, settings):
    """A hash of the files' names and contents and of the settings: the same input gives the same one."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(files):
        digest.update(os.fsencode(f"\0{path.name}\0"))
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_record(target):
    """What data/split.json says; {} if there is none."""
    try:
        return json.loads((target / "split.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def checksums(data_dir):
    """{path relative to data_dir: CRC-32} of the files of images/ and masks/, without SYSTEM_FILES."""
    paths = [path for part in ("images", "masks") for path in (data_dir / part).rglob("*") if path.is_file()]
    names = {path.relative_to(data_dir).as_posix(): path for path in paths}
    return {name: zlib.crc32(path.read_bytes()) for name, path in names.items() if not SYSTEM_FILES.search(name)}


def write_pairs(readers, problems, folder):
    """Write the good pairs to folder/images and folder/masks, and put the bad ones into `problems`, by name.

    Returns the file names of the images that were written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for image_path, read_mask in tqdm(sorted(readers.items()), "준비", disable=None):
        try:
            write_pair(image_path, read_mask, folder)
        except BadPair as problem:
            problems[image_path.name] = str(problem)
    return [path.name for path in (folder / "images").iterdir()]


def write_pair(image_path, read_mask, folder):
    """Check one pair and write it as folder/images/STEM.* and folder/masks/STEM.png; BadPair if it is bad."""
    image = decode(image_path, cv2.IMREAD_COLOR)  # applies the EXIF rotation, as the scripts that read it do
    mask = read_mask()
    if mask.shape != image.shape[:2]:
        raise BadPair("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*image.shape[:2], *mask.shape))
    if not mask.any():
        raise BadPair("마스크가 비어 있음")
    if image_path.suffix.lower() in KEPT_AS_IS:
        shutil.copyfile(image_path, folder / "images" / image_path.name)
    else:
        (folder / "images" / f"{image_path.stem}.png").write_bytes(as_png(image))
    mask = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
    (folder / "masks" / f"{image_path.stem}.png").write_bytes(as_png(mask))


def as_png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def split_names(names, val_ratio, shuffle_seed):
    """Split names into {"train": [...], "val": [...]}: sorted, the first part to train, the rest to val.

    With a shuffle_seed the sorted names are shuffled first. The size of val is rounded to a whole number.
    """
    names = sorted(names)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(names)
    cut = len(names) - round(len(names) * val_ratio)
    return {"train": names[:cut], "val": names[cut:]}


def put_in_place(staging, target, splits, record):
    """Move the new pairs to `target`, in place of the old ones; until all are there, its split.json says so."""
    split_file = target / "split.json"
    write_json(split_file, {"complete": False})
    for part in ("images", "masks"):
        shutil.rmtree(target / part, ignore_errors=True)
        for split, names in splits.items():
            (target / part / split).mkdir(parents=True)
            for name in names if part == "images" else (f"{Path(name).stem}.png" for name in names):
                (staging / part / name).rename(target / part / split / name)
    shutil.rmtree(staging)
    write_json(split_file, {**record, "checksums": checksums(target)})


def check(data_dir):
    """Print what there is in data/, and every problem, by file; returns the number of problems."""
    problems, count = [], 0
    for split in SPLITS:
        if split == "val" and not any((data_dir / part / split).is_dir() for part in ("images", "masks")):
            print("val: 폴더가 없습니다 (학습은 검증 없이 합니다)")
            continue
        pairs, bad = pair_by_stem(data_dir / "images" / split, data_dir / "masks" / split)
        good = {}
        for image_path, mask_path in tqdm(pairs, f"{split} 검사", disable=None, leave=False):
            try:
                good[image_path.name] = measure_pair(image_path, mask_path)
            except BadPair as problem:
                bad[image_path.name] = problem
        count += len(good)
        problems += [f"{split}/{name}: {problem}" for name, problem in sorted(bad.items())]
        print(f"{split}: {len(good)}쌍")
        if good:
            print_statistics(good)
    if not count:
        problems.append(f"{data_dir}에 이미지-마스크 쌍이 하나도 없습니다")
    for problem in problems:
        print(f"  문제: {problem}")
    print(f"문제 {len(problems)}개" if problems else "문제 없음")
    return len(problems)


def measure_pair(image_path, mask_path):
    """Size "WxH", share of foreground, and pixels of each object (as training counts them) of a pair.

    BadPair if it cannot be trained on.
    """
    if image_path.suffix.lower() not in KEPT_AS_IS:
        raise BadPair("이미지 없음 (jpg, jpeg, png)")
    if mask_path.name != f"{image_path.stem}.png":
        raise BadPair(f"마스크 없음 ({image_path.stem}.png이어야 함)")
    image, labels = decode(image_path, cv2.IMREAD_COLOR), read_labels(mask_path)
    if image.shape[:2] != labels.shape:
        raise BadPair("크기가 다름 (이미지 {1}x{0}, 마스크 {3}x{2})".format(*image.shape[:2], *labels.shape))
    if not labels.any():
        raise BadPair("마스크가 비어 있음 (8비트 마스크는 127보다 밝은 곳이 전경)")
    numbers = np.unique(labels[labels > 0])
    pixels = np.bincount(reduce_to(labels, MAX_SIDE, cv2.INTER_NEAREST).ravel(), minlength=numbers[-1] + 1)
    return f"{image.shape[1]}x{image.shape[0]}", (labels > 0).mean(), pixels[numbers]


def read_labels(path):
    """Read a mask of data/ as uint16 H x W: 0 is the background, every other value one object."""
    mask = decode(path, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    return mask if mask.dtype == np.uint16 else (mask > 127).astype(np.uint16)


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(array, size, interpolation=interpolation)


def print_statistics(good):
    """Print sizes, shares of foreground and objects of {name: what measure_pair returned}."""
    sizes, shares, objects = zip(*good.values())
    sizes = Counter(sizes)
    common = ", ".join(f"{size} ({count}장)" for size, count in sizes.most_common(3))
    print(f"  크기 {len(sizes)}가지: {common}{' 등' if len(sizes) > 3 else ''}")
    print(f"  전경 비율: 최소 {min(shares):.1%}, 중앙값 {np.median(shares):.1%}, 최대 {max(shares):.1%}")
    counts, pixels = [len(each) for each in objects], np.concatenate(objects)
    print(f"  객체 {len(pixels)}개: 이미지마다 최소 {min(counts)}, 중앙값 {np.median(counts):g}, 최대 {max(counts)}개")
    print(f"  객체 크기: 최소 {pixels.min()}픽셀, 중앙값 {np.median(pixels):g}픽셀, 최대 {pixels.max()}픽셀 "
          f"(긴 변이 {MAX_SIDE}보다 크면 줄인 뒤)")
    small = {name: int((each < MIN_FOREGROUND).sum()) for name, each in zip(good, objects)}
    if named := [f"{name} {count}개" for name, count in small.items() if count]:
        print(f"  학습에서 빠지는 작은 객체 ({MIN_FOREGROUND}픽셀 미만): {sum(small.values())}개 - "
              f"{', '.join(named[:5])}{' 등' if len(named) > 5 else ''}")


def preview(data_dir, count):
    """Write data/preview.png: `count` pairs spread over data/, each with its mask drawn over the image."""
    images = [path for path in sorted(data_dir.glob("images/*/[!.]*")) if path.suffix.lower() in KEPT_AS_IS]
    pairs = [(image, data_dir / "masks" / image.parent.name / f"{image.stem}.png") for image in images]
    pairs = [(image, mask) for image, mask in pairs if mask.is_file()]
    if not pairs:
        fail(f"{data_dir}에 이미지-마스크 쌍이 없습니다. 먼저 데이터를 준비하세요")
    count = min(count, len(pairs))
    columns = min(count, 6)
    sheet = np.full((-(-count // columns) * TILE, columns * TILE, 3), 255, np.uint8)
    for place, index in enumerate(np.linspace(0, len(pairs) - 1, count).round().astype(int)):
        try:
            tile = draw_tile(*pairs[index])
        except BadPair as problem:
            fail(f"{problem}. python prepare_data.py --check 로 확인하세요")
        top, left = 4 + place // columns * TILE, 4 + place % columns * TILE
        sheet[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
    path = data_dir / "preview.png"
    write_file(path, as_png(sheet))
    print(f"저장: {path} ({count}쌍)")


def draw_tile(image_path, mask_path):
    """The image, in a size that fits into a tile, with each object in a colour of its own, the first in green."""
    image, labels = decode(image_path, cv2.IMREAD_COLOR), read_labels(mask_path)
    scale = (TILE - 8) / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    for place, number in enumerate(np.unique(labels[labels > 0])):
        hue = 1 / 6 + 2 / 3 * ((1 / 4 + 0.618 * place) % 1)  # distant hues (golden ratio), but no red, as tissue is
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue, 1, 0.86))[::-1]  # BGR, as the image
        inside = labels == number
        image[inside] = (0.65 * image[inside] + 0.35 * colour).astype(np.uint8)
        edges, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, edges, -1, colour, 1)
    return image


def make_empty_folders(data_dir):
    for part in ("images", "masks"):
        for split in SPLITS:
            (data_dir / part / split).mkdir(parents=True, exist_ok=True)
    print(f"""폴더를 만들었습니다: {data_dir}

직접 채우기:
  {data_dir}/images/train/이름.jpg    학습 이미지 (jpg, jpeg, png)
  {data_dir}/masks/train/이름.png     같은 이름, 같은 크기의 마스크
      객체가 하나면 8비트 PNG (흰색 255가 객체, 검은색 0이 배경), 여럿이면 16비트 PNG (값이 객체의 번호, 0이 배경)
  {data_dir}/images/val, {data_dir}/masks/val 도 같은 방식으로 (검증용, 전체의 20% 정도)
  확인: python prepare_data.py --check

자동으로 나누기:
  python prepare_data.py --images 이미지폴더 --masks 마스크폴더    (8비트 번호는 --numbered, 색은 --colours)
  python prepare_data.py --images 이미지폴더 --coco annotations.json

Kvasir-SEG 받기:
  python download_dataset.py""")


def lock(path):
    """Hold the lock file `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a folder that cannot be written is an error; what fails from here on is the locking itself
    file_lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a run that is killed
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")
    except OSError as error:  # Lustre without flock, SMB, NFS without lockd
        print(f"주의: 이 파일 시스템은 파일을 잠그지 못합니다 ({path}: {error.strerror}). "
              "같은 폴더에서 두 번 실행하지 마세요", file=sys.stderr)
    atexit.register(file_lock.release)  # and keeps the object, which else would let go at once


def write_file(path, content):
    """Write bytes to a temporary file beside `path` and rename it, so that `path` is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path, value):
    """Write a JSON file in UTF-8, with escapes for the bytes of a file name that are not valid UTF-8."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def fail(message):
    """End with exit code 1 and one line on stderr."""
    sys.exit(f"오류: {message}")


def run_main(interrupted):
    """Call main(). An OSError ends it in one line and exit code 1, and Ctrl-C in the line `interrupted`."""
    try:
        main()
    except KeyboardInterrupt:
        fail(interrupted)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)


if __name__ == "__main__":
    run_main("중단했습니다. 같은 명령을 다시 실행하면 처음부터 다시 합니다")

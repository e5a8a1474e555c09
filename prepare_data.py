"""Convert images and masks to data/, or check and preview data/.

    python prepare_data.py --images DIR --masks DIR      pair by file name; masks of one object or numbered objects
    python prepare_data.py --images DIR --coco FILE      COCO polygons or RLE (CVAT, Roboflow, Label Studio)
    python prepare_data.py --check                       report every problem in data/ by file
    python prepare_data.py --preview 12                  draw a contact sheet of 12 pairs
    python prepare_data.py                               create empty folders and explain how to fill them

Output:

    data/images/{train,val}/NAME.jpg|.jpeg|.png    the image's own bytes (other formats and pages become PNG)
    data/masks/{train,val}/NAME.png                of the image's size; 8-bit, 0 or 255: one object; 16-bit: numbered
                                                   objects, 0 is the background; with classes: 1000 * class + number
    data/classes.json                              {"1": name, ...}, only for two or more classes
    data/split.json                                what it was made from, so that it is not made twice; the split

Chapters:
    settings               constants and messages
    the run                main(), the command line, from two folders to data/
    finding files          the images of a folder, its own split, the pages of a TIFF file
    pairs by name          an image and the mask file of the same name
    reading masks          from the pixels of a mask file to a label map
    COCO                   polygons and RLE drawn as label maps
    writing data/          both files of a pair, EXIF orientation, transparency, groups, the split
    --check and --preview  every problem in data/, statistics, the contact sheet
    files                  images, locks, files that are never half-written, failures
"""

import argparse
import atexit
import colorsys
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import struct
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from functools import partial
from itertools import accumulate
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

# ---- settings ----

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".jfif", ".jpe", ".bmp", ".tif", ".tiff", ".webp")
TEXT_SUFFIXES = (".json", ".txt", ".xml", ".csv", ".md", ".yaml")  # common beside images, not reported as unread
VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # first three colors; written by PASCAL VOC, DAVIS and LabelMe
SPLITS = ("train", "val")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
SYSTEM_FILES = re.compile(r"/(\.|@eaDir/|Thumbs\.db$|desktop\.ini$)")  # hidden files, files of a NAS or Windows
UPLOAD_PREFIX = re.compile(r"(?=\d*[a-f])[0-9a-f]{8}-")  # Label Studio adds it to file names; not a date
AUGMENTED = re.compile(r"\.rf\.\w+(?=\.\w+$)")  # Roboflow's copies of NAME.jpg: NAME_jpg.rf.HASH.jpg
MAX_CLASSES, MAX_NUMBER = 64, 999  # with classes, a mask's values are 1000 * class + number
NOTES = {  # messages about changes to some files, by the key under which they are collected
    "outside": "train/과 val/ 밖의 폴더와 이미지 {:,}개는 그대로 두고 쓰지 않습니다",
    "subfolders": "하위 폴더 {:,}개는 읽지 않았습니다 (읽으려면 --recursive)",
    "no_background": "마스크 {:,}장에 배경(0, 검은색)이 없습니다: 배경인 값은 --void로 알려 주세요",
    "void": "void 픽셀 {:,}개를 배경으로 바꿨습니다",
    "crowds": "iscrowd 영역 {:,}개를 뺐습니다 (객체로 쓰려면 --keep-crowd)",
    "kept_crowds": "iscrowd 영역 {:,}개를 객체로 썼습니다 (빼려면 --keep-crowd 없이, 또는 --category로 다른 범주만)",
    "boxes": "상자뿐인 객체 {:,}개를 뺐습니다 (마스크 만들기: python extras/label_with_text.py --boxes)",
    "orphans": "images에 없는 이미지의 객체 {:,}개를 뺐습니다",
    "suffixes": "이름의 끝이 --mask-suffix나 --image-suffix와 다른 파일 {:,}개는 쓰지 않았습니다",
    "prefixes": "Label Studio가 이름 앞에 붙인 글자를 이미지 {:,}장에서 떼고 찾았습니다",
    "empty": "객체가 없는 이미지 {:,}장을 검은 마스크로 넣었습니다 (--allow-empty)",
    "white": "투명한 곳이 있는 이미지 {:,}장을 흰 바탕에 합쳐 PNG로 썼습니다",
    "turned": "EXIF 방향대로 이미지 {:,}장의 마스크를 돌렸습니다 (돌리기 전의 픽셀에 그린 마스크)",
    "either": "EXIF 방향이 있는 이미지 {:,}장은 마스크의 방향을 알 수 없어 그대로 씁니다. --preview로 확인하세요",
}
IMPORT = "YOLO, LabelMe, VOC 같은 다른 도구의 라벨: python extras/import_labels.py --dataset DIR"
MAX_SIDE = 1024        # train_sam2_proper.py reduces larger images to this ...
MIN_FOREGROUND = 100   # ... and then skips objects with fewer pixels
TILE, CAPTION = 256, 16  # pixels: the side of a picture in the preview, and the height of the name below it
Pair = namedtuple("Pair", "name image page read_mask")  # "SPLIT/file name", path, page or 0, function of (H, W)

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream lacks it
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
Image.MAX_IMAGE_PIXELS = None  # OpenCV has a limit of its own


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


# ---- the run ----


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
    parser = argparse.ArgumentParser(description="내 이미지와 마스크를 data/에 준비하고 확인합니다.", epilog=IMPORT)
    add, kind = parser.add_argument, parser.add_mutually_exclusive_group()
    group = parser.add_mutually_exclusive_group()
    add("--images", type=Path, help="이미지 폴더. 안에 train/과 val/(valid/)이 있으면 그 분할을 지킴")
    add("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    add("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    add("--val-images", type=Path, help="검증 이미지 폴더: 나누지 않고 이 분할을 씀")
    add("--val-masks", type=Path, help="--val-images의 마스크 폴더")
    add("--val-coco", type=Path, help="--val-images의 COCO 파일")
    add("--mask-suffix", default="", metavar="_mask", help="마스크 이름의 꼬리: a.jpg의 마스크가 a_mask.png일 때")
    add("--image-suffix", default="", metavar="_image", help="마스크 이름에 없는 이미지 이름의 꼬리")
    add("--recursive", action="store_true", help="하위 폴더도 읽음: a/b.jpg는 a__b.jpg가 됨")
    kind.add_argument("--numbered", "--colors", "--colours", action="store_true",
                      help="--masks의 8비트 값이나 색 하나가 객체 하나 (0과 검은색은 배경). 16비트부터는 언제나 번호")
    kind.add_argument("--classes", action="store_true",
                      help="--masks의 값이나 색이 클래스 (0과 검은색은 배경): 클래스마다 이어진 영역 하나가 객체 하나")
    kind.add_argument("--threshold", type=float, metavar="N", help="--masks에서 N보다 밝은 곳이 객체 하나 (기본: 127)")
    add("--void", type=int, nargs="+", action="append", default=[], metavar="N",
        help="--masks에서 배경으로 바꿀 값 N이나 색 R G B, 여러 번 가능 (VOC와 DAVIS 팔레트의 255는 저절로 바꿈)")
    add("--category", action="append", metavar="NAME", help="--coco에서 이 범주만 씀 (여러 번 가능)")
    add("--keep-crowd", action="store_true", help="--coco의 iscrowd 영역도 객체로 씀")
    add("--merge", action="store_true", help="이미지의 객체를 모두 8비트 마스크 하나로 합침")
    add("--allow-empty", action="store_true", help="객체가 없는 이미지도 검은 마스크로 넣음")
    add("--data-dir", type=Path, default=Path("data"), help="결과 폴더 (기본: %(default)s)")
    add("--val-ratio", type=float, default=0.2, help="검증에 쓸 비율 (기본: %(default)s)")
    add("--shuffle-seed", type=int, default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    group.add_argument("--group", metavar="REGEX",
                       help="이름에서 이 정규식(괄호가 있으면 그 안)이 같은 이미지는 학습과 검증에 나뉘지 않음")
    group.add_argument("--group-by-folder", dest="group", action="store_const", const=r"^([^/]+)/",
                       help="이미지 폴더 바로 아래의 같은 폴더에 있는 이미지는 나뉘지 않음")
    add("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    add("--preview", type=int, metavar="N", help="N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    for name in ("", "val_"):
        given = [getattr(args, name + part) for part in ("images", "masks", "coco")]
        if any(given) and not (given[0] and bool(given[1]) != bool(given[2])):
            flags = [f"--{name.replace('_', '-')}{part}" for part in ("images", "masks", "coco")]
            parser.error(f"{flags[0]}에는 {flags[1]}와 {flags[2]} 중 하나가 함께 있어야 합니다. {IMPORT}")
    if args.val_images and (not args.images or bool(args.coco) != bool(args.val_coco)):
        parser.error("--val-images에는 --images가 있어야 하고, 마스크는 둘 다 폴더이거나 둘 다 COCO여야 합니다")
    kinds = (args.numbered, args.classes, args.void, args.threshold is not None, args.mask_suffix, args.image_suffix)
    if any(kinds) and not args.masks or (args.category or args.keep_crowd) and not args.coco:
        parser.error("--numbered, --classes, --threshold, --void, --mask-suffix, --image-suffix는 --masks와, "
                     "--category와 --keep-crowd는 --coco와 함께 씁니다")
    if any(len(void) not in (1, 3) for void in args.void):
        parser.error("--void는 값 하나나 색 R G B여야 합니다")
    if not 0 <= args.val_ratio < 1:
        parser.error("--val-ratio는 0 이상 1 미만이어야 합니다")
    if args.preview is not None and args.preview < 1:
        parser.error("--preview는 1 이상이어야 합니다")
    try:
        re.compile(args.group or "")
    except re.error as error:
        parser.error(f"--group: 정규식이 아닙니다 ({error})")
    return args


def prepare(args):
    """Pair, check, read the masks, split and write data/; print a summary."""
    target, notes, classes = args.data_dir, defaultdict(list), {}
    parts = [("train" if args.val_images else "all", args.images, args.masks, args.coco)]
    parts += [("val", args.val_images, args.val_masks, args.val_coco)] if args.val_images else []
    pairs, problems, sources = [], {}, set()
    for split, images, masks, coco in parts:
        if target.resolve() in (images.resolve(), *images.resolve().parents):
            fail(f"--images가 결과 폴더 {target} 안에 있습니다. 원본은 다른 폴더에 두세요")
        find_pairs = partial(pairs_from_coco, classes, coco) if coco else partial(pairs_from_masks, masks)
        found, files = find_pairs(images, split, args, problems, notes)
        pairs += found
        sources.update(files, (pair.image for pair in found))
    if len(classes) < 2:
        classes.clear()
    if len(classes) > MAX_CLASSES:
        fail(f"클래스가 {len(classes)}개로 {MAX_CLASSES}개보다 많습니다. --category로 고르거나 --merge로 합치세요")

    lock(target / ".lock")
    settings = {name: value for name, value in vars(args).items()
                if not isinstance(value, Path) and name not in ("check", "preview")}
    record = {"sources": [[path.name, zlib.crc32(path.read_bytes())] for path in sorted(sources)], "complete": True,
              **settings}
    earlier_record, files = {}, checksums(target)
    with contextlib.suppress(OSError, ValueError):
        earlier_record = json.loads((target / "split.json").read_text(encoding="utf-8"))
    if {**earlier_record, "split": None} == {**record, "checksums": files, "split": None}:
        print(f"이미 준비되어 있습니다: {target} (같은 원본, 같은 분할)")
        return
    own = earlier_record.get("checksums", files if earlier_record else {})  # of an unfinished run: all files
    if by_hand := sorted(files.items() - own.items()):
        fail(f"{target}에 직접 넣거나 고친 파일이 있어 덮어쓰지 않습니다 ({by_hand[0][0]}). "
             "옮기거나 다른 --data-dir을 쓰세요")

    staging = target / ".part"
    try:
        contents, groups = write_pairs(pairs, problems, staging, args, notes)
        print_notes(notes)
        for name, problem in sorted(problems.items()):
            print(f"  제외: {name.removeprefix('all/')} - {problem}")
        if not contents:
            fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}. {IMPORT}")
        splits = {split: [name for name in contents if name.startswith(f"{split}/")] for split in SPLITS}
        if not any(splits.values()):
            splits = split_names(groups, args.val_ratio, args.shuffle_seed)
    except SystemExit:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for pair in same_images(*({Path(name).name: contents[name] for name in splits[split]} for split in SPLITS)):
        print(f"  주의: 학습과 검증에 같은 이미지가 있습니다 - {pair}")
    if files:
        print(f"{target}에 있던 {sum(name.startswith('masks/') for name in files)}쌍을 새 쌍으로 바꿉니다.")
    put_in_place(staging, target, splits, classes, record)
    print(f"완료: {target} - 학습 {len(splits['train'])}쌍, 검증 {len(splits['val'])}쌍, 제외 {len(problems)}개"
          + (f", 클래스 {', '.join(classes)}" if classes else ""))


def make_empty_folders(data_dir):
    folders = [data_dir / part / split for part in ("images", "masks") for split in SPLITS]
    new = [folder for folder in folders if not folder.is_dir()]
    for folder in new:
        folder.mkdir(parents=True)
    print(f"""{'폴더를 만들었습니다' if new else '폴더가 이미 있습니다'}: {', '.join(map(str, new or folders))}

직접 채우기 (val은 검증용, 전체의 20% 정도. 확인: python prepare_data.py --check):
  {data_dir}/images/train/이름.jpg    학습 이미지 (jpg, jpeg, png)
  {data_dir}/masks/train/이름.png     같은 이름, 같은 크기의 마스크
      객체가 하나면 8비트 PNG (흰색 255가 객체, 검은색 0이 배경), 여럿이면 16비트 PNG (값이 객체의 번호, 0이 배경)

자동으로 나누기:
  python prepare_data.py --images 이미지폴더 --masks 마스크폴더    (8비트 값이나 색이 객체의 번호면 --numbered)
  python prepare_data.py --images 이미지폴더 --coco annotations.json

Kvasir-SEG 받기:
  python download_dataset.py""")


# ---- finding files ----


def find_images(folder, split, recursive, problems, notes, subfolders=(), skip=None):
    """The image files of a folder: [("SPLIT/relative path", path)]; other files, except texts, become `problems`.

    split "all" leaves the split to split_names(), unless the folder contains train/ and val/ (or valid/), which then
    are the split. Folders inside are read if `recursive` or if named in `subfolders`; `skip`, a folder inside, is not.
    """
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    skipped = skip.resolve() if skip and folder.resolve() in skip.resolve().parents else None
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.resolve() != skipped
              and not SYSTEM_FILES.search(f"/{path.name}/")]
    own = [name for name in inside if name.lower() in SPLIT_FOLDERS] if split == "all" else []
    if len(own) > 2:
        fail(f"{folder}: 검증 폴더가 여럿입니다 ({', '.join(own)}). 하나를 --val-images로 주세요")
    own = own if {SPLIT_FOLDERS[name.lower()] for name in own} == set(SPLITS) else []
    paths = set(list_files(folder, recursive and not own, skipped)).union(
        *(list_files(folder / name, recursive, skipped) for name in [*own, *subfolders]))
    found, read = [], {*own, *(name.split("/")[0] for name in subfolders)}
    for path in sorted(paths):
        first, _, rest = path.relative_to(folder).as_posix().partition("/")
        is_image, is_outside = path.suffix.lower() in IMAGE_SUFFIXES, own and first not in own
        name = f"{SPLIT_FOLDERS[first.lower()]}/{rest}" if first in own else f"{split}/{first}{'/' if rest else ''}{rest}"
        if SYSTEM_FILES.search(f"/{name}"):
            continue
        if is_image and not is_outside:
            found.append((name, path))
        elif is_image:
            notes["outside"].append((name, 1))
        elif path.suffix.lower() not in TEXT_SUFFIXES:
            problems[name] = "읽지 않는 형식 (PNG나 JPEG로 바꾸세요)"
    if own or not recursive:
        notes["outside" if own else "subfolders"] += [(f"{name}/", 1) for name in inside if name not in read]
    return found


def list_files(folder, recursive, skipped=None):
    """The files of a folder and, if recursive, of the folders inside; OSError if one is unreadable (glob() skips it)."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif recursive and path.is_dir() and path.resolve() != skipped:
            yield from list_files(path, True, skipped)


def composed(name):
    """A file name in NFC form, with one character per Korean syllable; macOS and its zip files decompose them."""
    return unicodedata.normalize("NFC", name)


def tiff_pages(path):
    """(offset of a page's directory, place of the offset of the next one, format) of each page of a TIFF file."""
    formats = {b"II*\0": ("<H", "<I", 12), b"MM\0*": (">H", ">I", 12),
               b"II+\0": ("<Q", "<Q", 20), b"MM\0+": (">Q", ">Q", 20)}  # number of entries, offset, bytes of an entry
    pages = {}
    with path.open("rb") as file, contextlib.suppress(struct.error):  # of a truncated file
        count, offset, size = formats.get(file.read(4), (None,) * 3)
        place = 8 if size == 20 else 4
        while count:
            file.seek(place)
            directory, = struct.unpack(offset, file.read(struct.calcsize(offset)))
            if not directory or directory in pages:
                break
            file.seek(directory)
            entries, = struct.unpack(count, file.read(struct.calcsize(count)))
            place = directory + struct.calcsize(count) + entries * size
            pages[directory] = place
    return [(directory, place, offset) for directory, place in pages.items()]


def one_page(path, page, folder):
    """A file that shows one page of a TIFF file, counted from 1; `path` itself if page is 0: a file of one page."""
    if not page:
        return path
    copy = folder / str(zlib.crc32(os.fsencode(path.resolve()))) / path.name
    if not copy.exists():
        copy.parent.mkdir(parents=True)
        shutil.copyfile(path, copy)
    directory, place, offset = tiff_pages(path)[page - 1]
    with copy.open("r+b") as file:  # the header leads to this page, and this page to no other
        for position, value in ((4 if offset[1] == "I" else 8, directory), (place, 0)):
            file.seek(position)
            file.write(struct.pack(offset, value))
    return copy


# ---- pairs by name ----


def pairs_from_masks(masks, images, split, args, problems, notes):
    """Pair images and mask files by stem: [Pair], and the mask files; adds {name: problem} for the others."""
    is_one_folder = images.resolve() == masks.resolve()
    if is_one_folder and not args.mask_suffix:
        fail(f"--images와 --masks가 같은 폴더입니다: {images}. 마스크를 다른 폴더로 옮기거나 --mask-suffix를 주세요")
    image_files = find_images(images, split, args.recursive, problems, notes, skip=masks)
    if is_one_folder:
        mask_files = [(name, path) for name, path in image_files if composed(path.stem).endswith(args.mask_suffix)]
        image_files = [file for file in image_files if file not in mask_files]
    else:
        mask_files = find_images(masks, split, args.recursive, problems, notes, skip=images)
    pairs = pair_by_stem(image_files, mask_files, problems, notes, args.image_suffix, args.mask_suffix)
    if not pairs and not args.mask_suffix:
        suggest_suffix(*([composed(name.removesuffix(path.suffix)) for name, path in files]
                         for files in (image_files, mask_files)))
    pairs = [Pair(name, image, page, partial(read_source_mask, mask, args, notes, mask_page))
             for name, (image, page), (mask, mask_page) in pairs]
    return pairs, [path for _, path in mask_files]


def pair_by_stem(image_files, mask_files, problems, notes, image_suffix="", mask_suffix=""):
    """Pair files by stem, without the suffixes: [(name, (image path, page), (mask path, page))]; 0 if there is one page.

    The pages of a TIFF file are stem_p001, stem_p002, ...; files without a pair are added to `problems`.
    """
    found, pairs = defaultdict(lambda: ([], [])), []
    for part, (files, suffix) in enumerate(((image_files, image_suffix), (mask_files, mask_suffix))):
        for name, path in files:
            stem, pages = name.removesuffix(path.suffix), len(tiff_pages(path))
            if not stem.endswith(suffix):
                notes["suffixes"].append((name, 1))
                continue
            for page in range(1, pages + 1) if pages > 1 else [0]:
                mark = f"_p{page:03}" if page else ""
                found[composed(stem.removesuffix(suffix) + mark)][part].append((f"{stem}{mark}{path.suffix}", (path, page)))
    for stem, (images, masks) in sorted(found.items()):
        if len(images) > 1 or len(masks) > 1:
            named = ", ".join(path.name for _, (path, _) in max(images, masks, key=len))
            problems[stem] = f"이름이 같은 파일이 여럿: {named}"
        elif not masks:
            problems[images[0][0]] = f"마스크 없음 (이름이 {Path(stem).name}{mask_suffix}인 파일)"
        elif not images:
            problems[masks[0][0]] = f"이미지 없음 (이름이 {Path(stem).name}{image_suffix}인 파일)"
        else:
            pairs.append((*images[0], masks[0][1]))
    return pairs


def suggest_suffix(images, masks):
    """Fail with the command that pairs stems of images and masks, if one suffix pairs all images."""
    common = os.path.commonprefix([stem[::-1] for stem in images])[::-1]
    for tail in ("", *re.findall(r"[_\-. ].*", common)):
        bases = [stem.removesuffix(tail) for stem in images]
        fitting = sorted(mask[len(bases[0]):] for mask in masks if mask.startswith(bases[0]) and all(
            base + mask[len(bases[0]):] in masks for base in bases))
        if fitting:
            flags = [f"--mask-suffix={fitting[0]}", *([f"--image-suffix={tail}"] if tail else [])]
            others = f" (또는 {', '.join(fitting[1:])})" if fitting[1:] else ""
            fail(f"마스크의 이름 끝이 이미지와 다릅니다. 다시 실행: "
                 f"{shlex.join(['python', 'prepare_data.py', *sys.argv[1:], *flags])}{others}")


# ---- reading masks ----


def read_source_mask(path, args, notes, page=0, _shape=None):
    """Read a mask written by any tool: bool H x W for one object, uint16 H x W for numbered objects (0: background).

    Grey masks with more than 8 bits (microscopy tools) and PNGs with the VOC palette hold object numbers. With
    --numbered, each value or color except black is an object; with --classes, each connected region of one is. In other
    masks, pixels above 127 in any channel are foreground; in a mask of 0 and 1, pixels of 1 are. Fails if a threshold
    of 127 would lose objects and no flag selects another reading.
    """
    path = one_page(path, page, args.data_dir / ".part" / "mask pages")
    values, is_voc, void = read_pixels(path, args)
    if args.void or void.any():
        values = np.where(void if values.ndim == 2 else void[..., None], 0, values)
        notes["void"].append((path.name, int(void.sum())))
    is_deep = values.ndim == 2 and values.itemsize > 1
    if args.numbered or args.classes or args.threshold is None and (is_voc or is_deep):
        labels = to_labels(values, args.classes)
        if labels.all():
            notes["no_background"].append((path.name, 1))
        return labels > 0 if args.merge else labels
    brightness = np.atleast_3d(values).max(axis=2)
    if args.threshold is not None:
        return brightness > args.threshold
    if values.ndim == 2 and values.max() == 1:
        return values > 0
    colors = np.unique(values[::2, ::2].astype(np.int64) @ [1, 2**16, 2**32]) if values.ndim == 3 else ()
    if 2 < len(colors) < 9 or is_label_map(brightness):  # an antialiased edge has more colors
        fail(f"{path}: 127보다 밝은 곳이 객체 하나인 마스크가 아닙니다. 값이나 색마다 객체면 --numbered, 클래스면 "
             f"--classes, 밝기로 나누려면 --threshold {min(127, brightness.max() // 2)}, 무시할 값은 --void N")
    return brightness > 127


def read_pixels(path, args):
    """The pixels of a mask file, H x W or H x W x 3 (BGR); whether they are indices of the VOC palette; void pixels.

    Transparent pixels become black; if the picture has a single color, its alpha channel is the mask.
    """
    values = decode_file(path, cv2.IMREAD_UNCHANGED)
    values = upright(values, path)
    if values.ndim == 3 and values.shape[2] == 4:
        values, alpha = values[..., :3], values[..., 3] > values[..., 3].max() // 2
        is_plain = (values == values[0, 0]).all() and not alpha.all()
        values = alpha.astype(np.uint8) * 255 if is_plain else np.where(alpha[..., None], values, 0)
    colors = np.atleast_3d(values)
    values = values[..., 0].copy() if values.ndim == 3 and (colors == colors[..., :1]).all() else values
    is_jpeg, palette, tags = False, [], {}
    with contextlib.suppress(Exception), Image.open(path) as file:  # formats that Pillow cannot read have no palette
        is_jpeg = file.format == "JPEG" or file.info.get("compression") == "jpeg"
        tags = dict(getattr(file, "tag_v2", {}))
        if file.mode == "P" and args.threshold is None:
            indices, palette = np.array(file), file.getpalette()[:9]
    if is_jpeg and (args.numbered or args.classes):
        fail(f"{path}: JPEG은 번호와 색을 바꾸므로 --numbered와 --classes에 쓸 수 없습니다. PNG 원본을 쓰세요")
    is_voc = len(palette) > 3 and palette == VOC_PALETTE[:len(palette)]
    is_inverted = palette[:3] == [255] * 3 or tags.get(262) == 0 and values.dtype == np.uint8
    if is_inverted and not (args.numbered or args.classes or args.threshold is not None):
        if not str(tags.get(305)).startswith("tifffile"):  # which stores boolean arrays so
            fail(f"{path}: 0을 흰색으로 보이는 파일이라 0과 1 중 어느 쪽이 객체인지 알 수 없습니다. "
                 "0이 배경이면 --numbered, 보이는 대로 흰색이 객체면 --threshold 127")
    if palette and (is_voc or args.numbered or args.classes):
        if not ((colors == 0).all(axis=2) & (indices > 0)).any():  # else the index of black is not 0
            values = indices
    elif is_inverted and args.threshold is None:
        values = 255 - values
    void = is_voc & (values == 255) if values.ndim == 2 else np.zeros(values.shape[:2], bool)
    for value in args.void:
        void = void | ((colors if len(value) == 3 else np.atleast_3d(values)) == value[::-1]).all(axis=2)
    return values, is_voc, void


def to_labels(values, classes=False):
    """Convert object numbers (H x W) or colors (H x W x 3) to uint16 labels H x W; 0 and black are background.

    Numbers that fit into 16 bits are kept. classes: values are classes, and each connected region is an object.
    Raises ImageError if the values are not numbers, are too many, or are brightness values.
    """
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or values.min() < 0:
        raise ImageError("번호가 0 이상의 정수가 아님 (밝기면 --threshold N)")
    if values.ndim == 3:
        values = sum(values[..., channel].astype(np.int64) << 16 * channel for channel in range(3))
    if (labels := values).max() > 65535:
        found, indices = np.unique(values, return_inverse=True)
        labels = indices.reshape(values.shape) + (found[0] != 0)
    if labels.max() > 65535:
        raise ImageError("객체가 65,535개보다 많음")
    labels = labels.astype(np.uint16)
    between = (cv2.erode(labels, np.ones((3, 3))) < labels) & (labels < cv2.dilate(labels, np.ones((3, 3))))
    found, elsewhere = np.unique(labels), np.unique(labels[~between])
    if len(found) > 8 and len(elsewhere) < len(found) / 2:  # most values occur only on gradients
        raise ImageError("번호가 아니라 밝기나 번진 색인 마스크 (밝기로 나누려면 --threshold N)")
    if classes:
        regions, count = np.zeros(labels.shape, np.int32), 0
        for value in found[found > 0]:
            number, own = cv2.connectedComponents((labels == value).astype(np.uint8))
            regions[own > 0] = own[own > 0] + count
            count += number - 1
        return to_labels(regions)
    return labels


# ---- COCO ----


def pairs_from_coco(classes, coco_path, images, split, args, problems, notes):
    """Like pairs_from_masks, for the objects of a COCO file or of the given categories only; returns [Pair], [COCO file].

    The categories of the objects are added to `classes`, {name: number}, in the file's order. A region marked iscrowd
    may contain several objects; it is skipped if its category also has single objects.
    """
    objects, entries, paths, dropped, pairs = defaultdict(list), defaultdict(list), {}, set(), []
    try:
        coco = json.loads(coco_path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(coco.get(part), list) for part in ("images", "annotations")):
            raise ValueError("images와 annotations 목록이 없음")
        for image in coco["images"]:
            path = composed(str(image.get("file_name") or image["coco_url"]).replace("\\", "/"))
            if image["id"] in paths:
                fail(f"{coco_path}: 두 이미지의 번호가 같습니다: {image['id']} ({paths[image['id']][0]}, {path}). "
                     "파일을 합쳤다면 번호를 다시 매기세요")
            paths[image["id"]] = path, (image.get("height"), image.get("width"))
        known = {category["id"]: str(category["name"]) for category in coco.get("categories") or []}
        chosen = [(annotation, known.get(annotation.get("category_id"), str(annotation.get("category_id"))))
                  for annotation in coco["annotations"]]
        chosen = [(annotation, name) for annotation, name in chosen if not args.category or name in args.category]
        with_singles = {name for annotation, name in chosen if not annotation.get("iscrowd")}
        for annotation, name in chosen:
            is_crowd = annotation.get("iscrowd") and not args.merge
            is_kept = not is_crowd or args.keep_crowd or name not in with_singles
            note = ("orphans" if annotation["image_id"] not in paths else "boxes" if not annotation.get("segmentation")
                    else ("kept_crowds" if is_kept else "crowds") if is_crowd else None)
            if note:
                image_name, _ = paths.get(annotation["image_id"], (str(annotation["image_id"]), None))
                notes[note].append((image_name, 1))
            if note in (None, "kept_crowds"):
                objects[annotation["image_id"]].append((annotation["segmentation"], name))
            else:
                dropped.add(annotation["image_id"])
    except FileNotFoundError:
        fail(f"파일이 없습니다: {coco_path}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{coco_path}: COCO 형식이 아닙니다 ({type(error).__name__}: {error}). 내보낼 때 CVAT와 Label Studio에서는 "
             f"COCO, VIA에서는 Export Annotations (COCO format)을 고르세요. {IMPORT}")
    if missing := set(args.category or ()) - set(known.values()):
        fail(f"{coco_path}에 없는 범주입니다: {', '.join(sorted(missing))} (있는 것: {', '.join(known.values())})")
    if "boxes" in notes and not objects:
        fail(f"{coco_path}: segmentation이 없습니다. 상자로 마스크 만들기: "
             f"python extras/label_with_text.py --images {images} --boxes {coco_path}")
    used = {name: None for found in objects.values() for _, name in found}
    for name in [name for name in known.values() if name in used] + list(used):
        classes.setdefault(name, len(classes) + 1)

    places = defaultdict(set)
    folders = {end for path, _ in paths.values() for end in ends(path.rpartition("/")[0]) if (images / end).is_dir()}
    files = find_images(images, split, args.recursive, problems, notes, folders)
    for file in files:
        places[composed(file[1].relative_to(images).as_posix())].add(file)
        places[file[0].partition("/")[2]].add(file)  # without train/ or val/
    for identity, (path, size) in paths.items():
        found = next((places[end] for end in ends(path) if end in places), None)
        if not found and (found := places.get(UPLOAD_PREFIX.sub("", path.rpartition("/")[2], count=1))):
            notes["prefixes"].append((path, 1))
        if not found:
            problems[f"{split}/{path}"] = "이미지 없음"
        for file in found or ():
            entries[file].append((path, identity, size))
            if len(found) > 1:
                problems[file[0]] = f"COCO 파일의 {path}에 맞는 이미지가 여럿"
    for file in files:
        name, path = file
        own = entries[file]
        if not own:
            problems[name] = "마스크 없음 (COCO 파일에 없음)"
        elif len(own) > 1:
            problems[name] = f"COCO 파일에 두 번 나옴 ({own[0][0]}, {own[1][0]})"
        elif name not in problems:
            _, identity, size = own[0]
            if not objects[identity] and not (args.allow_empty and identity not in dropped):
                problems[name] = "마스크 없음 (쓸 객체가 annotations에 없음)"
            else:
                segmentations, categories = zip(*objects[identity]) if objects[identity] else ((), ())
                pairs.append(Pair(name, path, 0, partial(draw_objects, segmentations, size, args.merge, name,
                                                         categories, classes)))
    return pairs, [coco_path]


def ends(path):
    """The ends of a path, the longest first: "a/b/c", "b/c", "c"; without absolute ones and those with ".."."""
    parts = path.split("/")
    found = ["/".join(parts[start:]) for start in range(len(parts))]
    return [end for end in found if end and ".." not in end.split("/") and not Path(end).is_absolute()]


def number_objects(categories, classes, name):
    """Values of an image's objects in its mask: 1, 2, ..., or with classes, {name: number}, 1000 * class + 1, ..."""
    counts, values = Counter(), []
    for category in categories:
        counts[category] += 1
        values.append(1000 * classes[category] + counts[category] if classes else len(values) + 1)
    if classes and max(counts.values(), default=0) > MAX_NUMBER:
        fail(f"{name}: 한 클래스의 객체가 {max(counts.values())}개로 {MAX_NUMBER}개보다 많습니다. --category로 한 범주만 "
             "쓰거나 --merge로 합치세요")
    return values


def draw_objects(segmentations, size, merge, name, categories=(), classes=(), shape=None):
    """Draw COCO segmentations as uint16 labels H x W, see number_objects; smaller objects cover larger ones.

    With `merge`, or for one segmentation without classes, returns their union, bool H x W. Invalid segmentations are
    skipped and reported; ImageError if none is left. size: (H, W) in the COCO file; if missing, the image's `shape`.
    """
    height, width = (int(side) if isinstance(side, float) and side.is_integer() else side
                     for side in (shape if None in size else size))
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and 0 < height * width < 2**30):
        raise ImageError(f"COCO 파일의 이미지 크기가 잘못됨 ({width}x{height})")
    if len(segmentations) > 65535 and not merge:
        raise ImageError("객체가 65,535개보다 많음")
    rles, kept, problem = [], [], None
    for segmentation, category in zip(segmentations, categories or [None] * len(segmentations)):
        try:
            rles.append(to_rle(segmentation, height, width))
            kept.append(category)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            problem = f"segmentation을 해석할 수 없음 ({error if type(error) is ValueError else type(error).__name__})"
    if problem and not rles:
        raise ImageError(problem)
    if problem:
        tqdm.write(f"  제외: {name}의 객체 {len(segmentations) - len(rles)}개 - {problem}")
    if merge or len(rles) == 1 and not classes:
        return coco_mask.decode(coco_mask.merge(rles)) > 0
    labels, values = np.zeros((height, width), np.uint16), number_objects(kept, classes, name)
    areas = [coco_mask.area(rle) for rle in rles]  # fails for more than 255 at once (pycocotools 2.0.11)
    for index in np.argsort(areas, kind="stable")[::-1]:
        labels[coco_mask.decode(rles[index]) > 0] = values[index]
    if hidden := len(rles) - np.count_nonzero(np.unique(labels)):
        tqdm.write(f"  제외: {name}의 객체 {hidden}개 - 비었거나 더 작은 객체에 모두 가려짐")
    return labels


def to_rle(segmentation, height, width):
    """Convert a COCO segmentation (polygons, plain or compressed RLE) to pycocotools' RLE; ValueError if invalid.

    It is checked here because pycocotools crashes on polygons with NaN and leaves pixels beyond the runs undefined.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = np.array(uncompress(counts) if isinstance(counts, str) else counts, np.int64)
        if segmentation["size"] != [height, width] or counts.ndim != 1 or (counts < 0).any() or \
                counts.sum() != height * width:
            raise ValueError("RLE가 이미지 크기와 다름")
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return coco_mask.encode(coco_mask.decode(rle))  # removes empty runs, on which merge() goes wrong
    parts = segmentation if np.ndim(segmentation[0]) else [segmentation]  # VIA writes one polygon without its list
    polygons = [np.array(part, float) for part in parts if len(part) >= 6 or len(parts) == 1]  # fewer have no area
    for points in polygons:
        if points.max() <= 1:
            raise ValueError("좌표가 픽셀이 아니라 0~1의 비율")
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) < 1e5).all():
            raise ValueError("다각형이 아님")
    return coco_mask.merge(coco_mask.frPyObjects([points.tolist() for points in polygons], height, width))


def uncompress(text):
    """Decode COCO's compressed RLE string (cocoapi, rleFrString) to run lengths: 5 bits per letter, differences."""
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


# ---- writing data/ ----


def write_pairs(pairs, problems, staging, args, notes):
    """Write valid pairs as images/SPLIT/STEM.* and masks/SPLIT/STEM.png of `staging`; add invalid ones to `problems`.

    Returns {"SPLIT/FILE NAME" of a written image: hash of its pixels}, and {the same: its group, see group_of}.
    """
    shutil.rmtree(staging, ignore_errors=True)
    stems = {pair.name: "/".join([pair.name.split("/")[0], pair.name.removesuffix(pair.image.suffix).split("/", 1)[1]
                                  .replace("/", "__")]) for pair in pairs}
    repeated, contents, groups = Counter(stems.values()), {}, {}
    for pair in tqdm(sorted(pairs, key=lambda pair: pair.name), "준비", disable=None):
        path, stem = one_page(pair.image, pair.page, staging / "pages"), stems[pair.name]
        try:
            if repeated[stem] > 1:
                raise ImageError(f"이름이 같은 파일이 여럿 ({Path(stem).name})")
            image, is_changed = read_over_white(path)
            mask = fit_to_image(pair.read_mask(image.shape[:2]), path, image.shape[:2], notes, args.allow_empty)
        except ImageError as problem:
            problems[pair.name] = str(problem)
            continue
        if is_changed:
            notes["white"].append((path.name, 1))
        is_own = path.suffix.lower() in KEPT_AS_IS and not is_changed
        name = stem + (path.suffix if is_own else ".png")
        mask = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
        for file, content in ((f"images/{name}", path.read_bytes() if is_own else as_png(image[..., ::-1])),
                              (f"masks/{stem}.png", as_png(mask))):
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).write_bytes(content)
        contents[name] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
        groups[name] = group_of(pair.name.split("/", 1)[1], args.group) or AUGMENTED.sub("", name)
    if args.group and contents and all(group_of(pair.name.split("/", 1)[1], args.group) is None for pair in pairs):
        fail(f"--group {args.group!r}에 맞는 이름이 없습니다 (예: {pairs[0].name.split('/', 1)[1]})")
    return contents, groups


def group_of(name, pattern):
    """What the regular expression `pattern` (its first group, if it has any) matches in a name; None if nothing."""
    found = re.search(pattern, name) if pattern else None
    return found and found[min(1, found.re.groups)]


def read_over_white(path):
    """Read an image like read_image, with transparency composited over white; and whether there was any."""
    image = read_image(path)
    with contextlib.suppress(Exception), Image.open(path) as file:  # what Pillow cannot read has no transparency
        if file.mode[-1] in "Aa" or "transparency" in file.info:
            rgba = upright(np.array(file.convert("RGBA")), path)
            colors, alpha = rgba[..., :3], rgba[..., 3:] / 255
            if alpha.max() > 0 and alpha.min() < 1:
                colors = colors if decode_file(path, cv2.IMREAD_UNCHANGED).dtype == np.uint8 else image
                return np.rint(colors * alpha + 255 * (1 - alpha)).astype(np.uint8), True
    return image, False


def fit_to_image(mask, image_path, shape, notes, allow_empty=False):
    """The mask, fitted to an image of (H, W) `shape`; ImageError if it cannot be used.

    If the image has an EXIF orientation and the mask fits only its stored pixels, the mask is turned as well.
    """
    orientation = read_orientation(image_path)
    turned = turn(mask, orientation)
    if orientation > 1 and turned.shape == shape:
        notes["either" if mask.shape == shape else "turned"].append((image_path.name, 1))
        mask = mask if mask.shape == shape else turned
    if mask.shape != shape:
        raise ImageError("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*shape, *mask.shape))
    if not mask.any():
        if not allow_empty:
            raise ImageError("마스크가 비어 있음")
        notes["empty"].append((image_path.name, 1))
    elif mask.min() == mask.max():
        raise ImageError("마스크가 이미지 전체를 덮음")
    return mask


def read_orientation(path):
    """The EXIF orientation of an image file: 1 (upright, or not stated) to 8."""
    with contextlib.suppress(Exception), Image.open(path) as file:  # damaged metadata raise various errors
        exif = Image.Exif()
        exif.load(file.info.get("exif"))  # not getexif(): it would decode a PNG without EXIF, and it reads XMP
        return file.tag_v2.get(0x0112, 1) if file.format == "TIFF" else exif.get(0x0112, 1)
    return 1


def turn(pixels, orientation):
    """Turn stored pixels (H x W ...) upright according to the EXIF orientation."""
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels)


def upright(pixels, path):
    """Turn pixels that OpenCV or Pillow decoded as they are stored; both turn TIFF files themselves."""
    return pixels if path.suffix.lower() in (".tif", ".tiff") else turn(pixels, read_orientation(path))


def same_images(train, val):
    """The images of {name: content} that are in both splits, as "train name = val name"."""
    names = {content: name for name, content in train.items()}
    return [f"train/{names[content]} = val/{name}" for name, content in val.items() if content in names]


def as_png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def split_names(groups, val_ratio, shuffle_seed):
    """Split {name: group} into {"train": [...], "val": [...]}: sorted by group, the first part to train.

    With a shuffle_seed the sorted groups are shuffled first. The cut between two groups is the one that is nearest to
    val_ratio, and leaves no part empty if there are two groups.
    """
    members = defaultdict(list)
    for name in sorted(groups):
        members[groups[name]].append(name)
    order = sorted(members)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    names = [name for group in order for name in members[group]]
    wanted = len(names) - round(len(names) * val_ratio)
    cuts = [0, *accumulate(len(members[group]) for group in order)]
    cuts = cuts[1:-1] or cuts if 0 < wanted < len(names) else cuts
    cut = min(cuts, key=lambda cut: abs(cut - wanted))
    return {"train": names[:cut], "val": names[cut:]}


def put_in_place(staging, target, splits, classes, record):
    """Replace the old pairs in `target` with the new ones; until all are moved, split.json marks it as unfinished."""
    split_file = target / "split.json"
    write_json(split_file, {"complete": False})
    (target / "classes.json").unlink(missing_ok=True)
    for part in ("images", "masks"):
        shutil.rmtree(target / part, ignore_errors=True)
        for split, names in splits.items():
            (target / part / split).mkdir(parents=True)
            for name in names if part == "images" else [str(Path(name).with_suffix(".png")) for name in names]:
                (staging / part / name).rename(target / part / split / Path(name).name)
    if classes:
        write_json(target / "classes.json", {number: name for name, number in classes.items()})
    shutil.rmtree(staging)
    split = {split: [Path(name).name for name in names] for split, names in splits.items()}
    write_json(split_file, {**record, "split": split, "checksums": checksums(target)})


def checksums(data_dir):
    """{path relative to data_dir: CRC-32} of classes.json and the files of images/ and masks/, without SYSTEM_FILES."""
    paths = [data_dir / "classes.json", *(data_dir / "images").rglob("*"), *(data_dir / "masks").rglob("*")]
    names = {path.relative_to(data_dir).as_posix(): path for path in paths if path.is_file()}
    return {name: zlib.crc32(path.read_bytes()) for name, path in names.items() if not SYSTEM_FILES.search(name)}


def print_notes(notes):
    """Print the NOTES for {key: [(file name, count), ...]} with totals and the first file names."""
    for key, found in notes.items():
        named = ", ".join(name for name, _ in found[:3]) + (" 등" if len(found) > 3 else "")
        print(f"  {NOTES[key].format(sum(count for _, count in found))}: {named}")


# ---- --check and --preview ----


def check(data_dir):
    """Print the contents of data/ and every problem by file; returns the number of problems."""
    problems, contents, notes = [], {"train": {}, "val": {}}, defaultdict(list)
    for split in SPLITS:
        folders, bad, good = [data_dir / part / split for part in ("images", "masks")], {}, {}
        if split == "val" and not any(folder.is_dir() for folder in folders):
            print("val: 폴더가 없습니다 (학습은 검증 없이 합니다)")
            continue
        pairs = pair_by_stem(*(find_images(folder, split, False, bad, notes) for folder in folders), bad, notes)
        for _, (image_path, _), (mask_path, _) in tqdm(pairs, f"{split} 검사", disable=None, leave=False):
            try:
                good[image_path.name], contents[split][image_path.name] = measure_pair(image_path, mask_path, notes)
            except ImageError as problem:
                bad[f"{split}/{image_path.name}"] = problem
        problems += [f"{name}: {problem}" for name, problem in sorted(bad.items())]
        print(f"{split}: {len(good)}쌍")
        if good:
            print_statistics(good)
    notes.pop("turned", None)  # a problem here
    print_notes(notes)
    problems += [f"학습과 검증에 같은 이미지: {pair}" for pair in same_images(*contents.values())]
    if not any(contents.values()):
        problems.append(f"{data_dir}에 이미지-마스크 쌍이 하나도 없습니다")
    for problem in problems:
        print(f"  문제: {problem}")
    print(f"문제 {len(problems)}개" if problems else "문제 없음")
    return len(problems)


def measure_pair(image_path, mask_path, notes):
    """Measure a pair of data/: size "WxH", share of foreground, and pixels of each object (at training size).

    Returns these three and a hash of the image's pixels; raises ImageError if the pair cannot be used for training.
    """
    if image_path.suffix.lower() not in KEPT_AS_IS:
        raise ImageError("이미지 없음 (jpg, jpeg, png)")
    if mask_path.name != f"{image_path.stem}.png":
        raise ImageError(f"마스크 없음 ({image_path.stem}.png이어야 함)")
    image, labels = read_image(image_path), read_labels(mask_path)
    if fit_to_image(labels, image_path, image.shape[:2], notes) is not labels:
        raise ImageError("마스크가 돌리기 전의 픽셀에 맞음 (이미지의 EXIF 방향대로 돌려야 함)")
    pixels = np.bincount(labels.ravel())[1:]
    pixels = (pixels[pixels > 0] * min(1, MAX_SIDE / max(labels.shape)) ** 2).round().astype(int)
    return (f"{image.shape[1]}x{image.shape[0]}", (labels > 0).mean(), pixels), hashlib.sha256(image).digest()


def read_labels(path):
    """Read a mask of data/ as uint16 H x W, as training does: 0 is the background, every other value one object."""
    mask = decode_file(path, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3 and (mask == mask[..., :1]).all():
        mask = mask[..., 0]
    if mask.ndim == 3 or mask.dtype not in (np.uint8, np.uint16) or mask.dtype == np.uint8 and is_label_map(mask):
        values = "색이나 투명도" if mask.ndim == 3 else ", ".join(map(str, np.unique(mask)[:5]))
        raise ImageError(f"8비트 마스크의 값이 0과 255가 아님 ({values}): 다른 폴더에 두고 --images와 --masks로 준비 "
                         "(번호면 --numbered, 클래스면 --classes)")
    return mask if mask.dtype == np.uint16 else (mask > 127).astype(np.uint16)


def print_statistics(good):
    """Print sizes, shares of foreground and objects of {name: result of measure_pair}."""
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
    sheet = np.full((-(-count // columns) * (TILE + CAPTION), columns * TILE, 3), 255, np.uint8)
    for place, index in enumerate(np.linspace(0, len(pairs) - 1, count).round().astype(int)):
        try:
            tile = draw_tile(*pairs[index])
        except ImageError as problem:
            fail(f"{pairs[index][0].name}: {problem}. python prepare_data.py --check 로 확인하세요")
        top, left = 4 + place // columns * (TILE + CAPTION), 4 + place % columns * TILE
        sheet[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
        name = pairs[index][0].relative_to(data_dir / "images").as_posix()
        caption = f"{place + 1} {name if len(name) < 34 else name[:14] + '...' + name[-16:]}".encode("ascii", "replace")
        cv2.putText(sheet, caption.decode(), (left, top + TILE + 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0))
        if not name.isascii():  # OpenCV draws no other letters
            print(f"  {place + 1}: {name}")
    path = data_dir / "preview.png"
    write_file(path, as_png(sheet))
    print(f"저장: {path} ({count}쌍)")


def draw_tile(image_path, mask_path):
    """The image, reduced to fit a tile, with each object in its own color, the first in green."""
    image, labels = cv2.cvtColor(read_image(image_path), cv2.COLOR_RGB2BGR), read_labels(mask_path)
    scale = (TILE - 8) / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    for place, number in enumerate(np.unique(labels[labels > 0])):
        color = 255 * np.array(colorsys.hsv_to_rgb((1 / 3 + 0.618 * place) % 1, 1, 0.86))  # golden ratio: distant hues
        inside = labels == number
        image[inside] = (0.65 * image[inside] + 0.35 * color).astype(np.uint8)
        edges, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, edges, -1, color, 1)
    return image


# ---- files ----


def decode_file(path, flags):
    """Decode an image file with OpenCV, rotated upright by its EXIF; ImageError, naming the file, if that fails."""
    try:
        data, pages = np.fromfile(path, np.uint8), ()  # on Windows cv2.imread cannot open a path with Korean letters
        if data[4:8].tobytes() != b"ftyp":  # HEIC and AVIF, which OpenCV does not turn upright
            _, pages = cv2.imdecodemulti(data, flags, range=(0, 2))
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, cv2.error):  # a path with a NUL; an empty file; more pixels than OpenCV allows
        pages = ()
    if len(pages) == 1:
        return pages[0]
    raise ImageError(f"{path}: " + ("여러 장이 든 파일입니다. 한 장씩 나누세요" if pages else
                                    "손상되었거나 읽지 못하는 형식의 이미지입니다 (JPEG나 PNG로 바꾸세요)"))


def read_image(path):
    """Read an image as uint8 H x W x 3, RGB, upright: grey, RGBA, CMYK, EXIF-rotated and deeper files too."""
    pixels = decode_file(path, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype != np.uint8:  # the file's 0.1st percentile becomes black, its 99.9th white
        numbers = pixels[np.isfinite(pixels)]
        low, high = np.percentile(numbers, (0.1, 99.9)) if len(numbers) else (0, 1)
        scaled = np.clip((pixels.astype(np.float32) - low) * (255 / (high - low or 1)), 0, 255)
        pixels = np.nan_to_num(scaled).round().astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


def is_label_map(mask):
    """Whether an 8-bit mask (uint8 H x W) holds classes or numbers, not one object above 127 with a grey edge."""
    if not ((mask > 0) & (mask < 255)).any():
        return False
    if ((mask > 0) & (mask < 24)).any() and ((mask > 231) & (mask < 255)).any():  # JPEG noise
        mask = np.where(mask < 24, 0, np.where(mask > 231, 255, mask)).astype(np.uint8)
    low, high = cv2.erode(mask, np.ones((3, 3))), cv2.dilate(mask, np.ones((3, 3)))
    pixels, inner = (np.bincount(values, minlength=256) for values in (mask.ravel(), mask[low == high]))
    fills = (pixels >= 9) & (inner >= pixels / 6)  # values that fill areas
    middle = (mask >= 24) & (mask <= 231)
    flat = middle & ((mask == low) | (mask == high))  # the greys of an edge are few and lie between their neighbors
    return (0 < mask.max() <= 127 or fills[:128].sum() > 1 or fills[128:].sum() > 1 or middle.mean() > 0.25
            or flat.sum() > max(0.4 * middle.sum(), 0.05 * (mask > 127).sum()))


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


def write_file(path, content):
    """Write bytes, or what content(file) writes, beside `path` and rename it, so that `path` is never half written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        content(file) if callable(content) else file.write(content)
    for _ in range(20):  # on Windows another program may hold `path` for a moment
        with contextlib.suppress(PermissionError):
            return temporary.replace(path)
        time.sleep(0.1)
    return temporary.replace(path)


def write_json(path, value):
    """Write a JSON file in UTF-8, with escapes for the bytes of a file name that are not valid UTF-8."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


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
    run_main("중단했습니다. 같은 명령을 다시 실행하면 처음부터 다시 합니다")

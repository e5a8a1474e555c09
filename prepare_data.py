"""Convert images and masks to data/, or check and preview data/.

    python prepare_data.py --images DIR --masks DIR      pair by file name; masks of one object or numbered objects
    python prepare_data.py --images DIR --coco FILE      COCO polygons or RLE (CVAT, Roboflow, Label Studio)
    python prepare_data.py --check --preview 12          report every problem in data/; draw a contact sheet of 12 pairs
    python prepare_data.py                               create empty folders and explain how to fill them

Output in data/: images/SPLIT/NAME.jpg|.jpeg|.png, the image's own bytes (other formats, pages and transparency become
PNG); masks/SPLIT/NAME.png, 8-bit, 0 or 255: one object, or 16-bit: numbered objects, 0 is background; classes.json for
two or more classes, {"1": name}: values are 1000 * class + number; split.json, the sources and the split.

Chapters:
    settings               constants and messages
    the run                main(), the command line, from two folders to data/
    finding pairs          an image and the mask file of the same name, folders, pages of a TIFF file
    reading masks          from the pixels of a mask file to a label map
    COCO                   polygons and RLE drawn as label maps
    writing data/          both files of a pair, EXIF orientation, transparency, the split, notes
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
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, namedtuple
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, TiffImagePlugin
from pycocotools import mask as coco_mask
from tqdm import tqdm

# ---- settings ----

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".jfif", ".jpe", ".bmp", ".tif", ".tiff", ".webp")
SILENT_SUFFIXES = (".json", ".txt", ".xml", ".csv", ".md", ".yaml", ".pt")  # common beside images, not reported
VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # first three colors; written by PASCAL VOC, DAVIS and LabelMe
SPLITS = ("train", "val")
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SYSTEM_FILES = re.compile(r"/(\.|@eaDir/|Thumbs\.db$|desktop\.ini$)")  # hidden files, files by a NAS or Windows
UPLOAD_PREFIX = re.compile(r"^(?=\d*[a-f])[0-9a-f]{8}-")  # Label Studio adds it to file names; not a date
AUGMENTED = re.compile(r"\.rf\.\w+(?=\.\w+$)")  # Roboflow's copies of NAME.jpg are NAME_jpg.rf.HASH.jpg
IMPORT = "YOLO, LabelMe, VOC 같은 다른 도구의 라벨: python extras/import_labels.py --dataset DIR"
NOTES = {  # messages about changes to some files, by the key under which they are collected
    "unread": "하위 폴더 {:,}개는 읽지 않고 둡니다 (--recursive로 읽음. train/ 옆의 test/, train/과 val/의 밖은 제외)",
    "suffixes": "이름의 끝이 --mask-suffix나 --image-suffix와 다른 파일 {:,}개는 쓰지 않았습니다",
    "ungrouped": "--group에 맞지 않는 이미지 {:,}장은 한 장씩 따로 묶음이 됩니다",
    "no_background": "마스크 {:,}장에 배경(0, 검은색)이 없습니다. 배경으로 쓸 값을 --void로 지정하세요",
    "void": "void 픽셀 {:,}개를 배경으로 바꿨습니다",
    "crowds": "iscrowd 영역 {:,}개를 뺐습니다 (객체로 쓰려면 --keep-crowd)",
    "kept_crowds": "iscrowd 영역 {:,}개를 객체로 썼습니다 (빼려면 --keep-crowd 없이, 또는 --category로 다른 범주만)",
    "boxes": "상자뿐인 객체 {:,}개를 뺐습니다 (마스크 만들기: python extras/label_with_text.py --boxes)",
    "orphans": "images에 없는 이미지의 객체 {:,}개를 뺐습니다",
    "unnamed": "categories에 없는 category_id의 객체 {:,}개: 번호를 클래스의 이름으로 씁니다",
    "prefixes": "Label Studio가 이름 앞에 붙인 글자를 이미지 {:,}장에서 떼고 찾았습니다",
    "empty": "객체가 없는 이미지 {:,}장 (검은 마스크, --allow-empty)",
    "duplicates": "픽셀이 같은 이미지 {:,}장이 한쪽에 더 있습니다",
    "cut": "가장자리에서 잘린 객체 {:,}개",
    "small": "학습에서 빠지는 작은 객체 (100픽셀 미만) {:,}개",
    "white": "투명한 이미지 {:,}장은 흰 바탕에 합쳐 PNG로 썼습니다",
    "turned": "EXIF 방향대로 이미지 {:,}장의 마스크를 돌렸습니다 (돌리기 전의 픽셀에 그린 마스크)",
    "either": "EXIF 방향이 있는 이미지 {:,}장은 마스크의 방향을 알 수 없어 그대로 씁니다. --preview로 확인하세요",
}
TIFF_TAGS = (256, 257, 258, 262, 270, 277, 284, 305, 338, 32997)  # width ... samples ... software ... image depth
COLOR_AND_DEPTH = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH  # of the file, without alpha, upright
MAX_SIDE, MIN_FOREGROUND = 1024, 100  # train_sam2_proper.py reduces larger images, then skips objects of fewer pixels
MAX_CLASSES, MAX_NUMBER = 64, 999  # what 1000 * class + number has room for
TILE, CAPTION = 256, 16  # pixels: the side of a picture in the preview, and the height of the name below it
REASONS = ("problem", "duplicate", "EXIF", "no_background", "empty", "cut", "small")  # to look at a pair, worst first
Row = namedtuple("Row", "name image mask size share objects content reasons")  # see measure_pair()
CocoImage = namedtuple("CocoImage", "path size objects left_out")  # size: (H, W); objects: [(category, segmentation)]
Pair = namedtuple("Pair", "name image page read_mask")  # "SPLIT/NAME", path, page (0: the file), function of (H, W)

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream lacks it
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
Image.MAX_IMAGE_PIXELS = None  # OpenCV has a limit of its own
warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata
composed = partial(unicodedata.normalize, "NFC")  # macOS and its zip files decompose the syllables of file names


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


# ---- the run ----


def main():
    args = parse_args()
    if args.images:
        prepare(args)
    if args.check or args.preview:
        rows, problems, notes, classes = survey(args.data_dir, args.allow_empty)
    if args.check:
        print_check(rows, problems, notes, classes)
    if args.preview:
        preview(args.data_dir, rows, args.preview)
    if not (args.images or args.check or args.preview):
        make_empty_folders(args.data_dir)
    sys.exit(1 if args.check and problems else 0)


def parse_args():
    parser = argparse.ArgumentParser(description="내 이미지와 마스크를 data/에 준비하고 확인합니다.", epilog=IMPORT)
    add, kind, group = parser.add_argument, *(parser.add_mutually_exclusive_group() for _ in range(2))
    add("--images", type=Path, help="이미지 폴더. 안에 train/과 val/(또는 valid/)이 있으면 그 분할을 지킴")
    add("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    add("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    add("--val-images", type=Path, help="검증 이미지 폴더: 나누지 않고 이 분할을 씀")
    add("--val-masks", type=Path, help="--val-images의 마스크 폴더")
    add("--val-coco", type=Path, help="--val-images의 COCO 파일")
    add("--mask-suffix", default="", metavar="TEXT", help="마스크 이름의 접미사: a.jpg의 마스크가 a_mask.png이면 _mask")
    add("--image-suffix", default="", metavar="TEXT", help="마스크 이름에는 없는 이미지 이름의 접미사")
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
                       help="이름에서 이 정규식에 맞는 부분(괄호가 있으면 첫 괄호)이 같은 이미지는 한쪽에만 둠")
    group.add_argument("--group-by-folder", dest="group", action="store_const", const="^([^/]+)/",
                       help="--images 바로 아래의 폴더가 같은 이미지는 한쪽에만 둠")
    add("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    add("--preview", type=int, metavar="N", help="문제가 있을 만한 쌍부터 N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    sets = (args.images, args.masks, args.coco), (args.val_images, args.val_masks, args.val_coco)
    kinds = (args.numbered, args.classes, args.void, args.threshold is not None, args.mask_suffix, args.image_suffix)
    for is_wrong, message in (
            (any(bool(images) != bool(masks) + bool(coco) for images, masks, coco in sets),
             f"--images와 --val-images에는 저마다 마스크 폴더 또는 --coco 파일 하나만 함께 있어야 합니다. {IMPORT}"),
            (args.val_images and [*map(bool, sets[0])] != [*map(bool, sets[1])],
             "--val-images는 --images와 함께, --masks와 --val-masks나 --coco와 --val-coco로 씁니다"),
            (any(kinds) and not args.masks or (args.category or args.keep_crowd) and not args.coco,
             "--numbered, --classes, --threshold, --void, --mask-suffix, --image-suffix는 --masks와, "
             "--category와 --keep-crowd는 --coco와 함께 씁니다"),
            (any(len(void) not in (1, 3) for void in args.void), "--void는 값 하나나 색 R G B여야 합니다"),
            (not 0 <= args.val_ratio < 1, "--val-ratio는 0 이상 1 미만이어야 합니다"),
            (args.preview is not None and args.preview < 1, "--preview는 1 이상이어야 합니다")):
        if is_wrong:
            parser.error(message)
    try:
        re.compile(args.group or "")
    except re.error as error:
        parser.error(f"--group: 정규식이 아닙니다 ({error})")
    return args


def prepare(args):
    """Pair, check, read the masks, split and write data/; print a summary."""
    target, staging, problems, notes = args.data_dir, args.data_dir / ".part", {}, defaultdict(list)
    pairs, sources, classes = collect_pairs(args, problems, notes)
    lock(target / ".lock")
    settings = {name: value for name, value in vars(args).items()
                if not isinstance(value, Path) and name not in ("check", "preview")}
    record = {"sources": sources, "complete": True, **settings}
    replaced = files_to_replace(target, record)
    if replaced is None:
        print(f"이미 준비되어 있습니다: {target} (같은 원본, 같은 분할)")
        return
    atexit.register(shutil.rmtree, staging, ignore_errors=True)
    contents, groups = write_pairs(pairs, problems, staging, args, notes)
    print_notes(notes, problems, "제외")
    if not contents:
        fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}. {IMPORT}")
    if args.group and len(notes["ungrouped"]) == len(contents):
        fail(f"--group에 맞는 이름이 없습니다 (이름의 예: {notes['ungrouped'][0][0]})")
    splits = {split: [name for name in contents if name.startswith(f"{split}/")] for split in SPLITS}
    is_own = any(splits.values())
    splits = splits if is_own else split_names(groups, args.val_ratio, args.shuffle_seed)
    warn_about_split(splits, contents, groups, args.group)
    if replaced:
        print(f"{target}에 있던 {sum(name.startswith('masks/') for name in replaced)}쌍을 새 쌍으로 바꿉니다.")
    put_in_place(staging, target, splits, classes, record)
    print(f"완료: {target} - 학습 {len(splits['train'])}쌍, 검증 {len(splits['val'])}쌍, 제외 {len(problems)}개"
          + (" (원본 폴더의 분할)" if is_own else "") + (f", 클래스 {', '.join(classes)}" if classes else ""))


def collect_pairs(args, problems, notes):
    """The pairs of the command line: ([Pair], [[source file, CRC-32]], {class name: number in the masks})."""
    pairs, sources, classes = [], set(), {}
    parts = [("all", args.images, args.masks, args.coco)]
    if args.val_images:
        parts = [("train", *parts[0][1:]), ("val", args.val_images, args.val_masks, args.val_coco)]
    for split, images, masks, coco in parts:
        if args.data_dir.resolve() in (images.resolve(), *images.resolve().parents):
            fail(f"--images가 결과 폴더 {args.data_dir} 안에 있습니다. 원본은 다른 폴더에 두세요")
        find = partial(pairs_from_coco, coco, classes) if coco else partial(pairs_from_masks, masks)
        found, files = find(images, split, args, problems, notes)
        pairs += found
        sources.update((f"{split}/{path.name}", path) for path in files)
        sources.update((pair.name, pair.image) for pair in found)
    if missing := [name for name in args.category or () if name not in classes]:
        fail(f"{args.coco}에 없는 범주입니다: {', '.join(missing)} (있는 것: {', '.join(classes)})")
    used = [name for name, is_used in classes.items() if is_used]
    if len(used) > MAX_CLASSES and not args.merge:
        fail(f"클래스가 {len(used)}개로 {MAX_CLASSES}개보다 많습니다. --category로 고르거나 --merge로 합치세요")
    classes.clear()  # the pairs share this dictionary: draw_objects() reads the numbers
    if len(used) > 1 and not args.merge:
        classes.update({name: number for number, name in enumerate(used, start=1)})
    return pairs, [[name, zlib.crc32(path.read_bytes())] for name, path in sorted(sources)], classes


def files_to_replace(target, record):
    """The files in data/ that an earlier run wrote, {path: CRC-32}; None if they are what `record` describes.

    Fails if a file was added or edited by hand.
    """
    earlier, files = {}, checksums(target)
    with contextlib.suppress(OSError, ValueError, TypeError):
        earlier = dict(json.loads((target / "split.json").read_text(encoding="utf-8")))
    if {**earlier, "split": 0} == {**record, "checksums": files, "split": 0}:
        return None
    own = earlier.get("checksums", files if earlier else {})  # after an unfinished run: all files
    if by_hand := sorted(files.items() - own.items()):
        fail(f"{target}에 직접 넣거나 고친 파일이 있어 덮어쓰지 않습니다 ({by_hand[0][0]}). "
             "옮기거나 다른 --data-dir을 쓰세요")
    return files


def make_empty_folders(data_dir):
    folders = [data_dir / part / split for part in ("images", "masks") for split in SPLITS]
    new = [folder for folder in folders if not folder.is_dir()]
    for folder in new:
        folder.mkdir(parents=True)
    print(f"""{'폴더를 만들었습니다' if new else '폴더가 이미 있습니다'}: {', '.join(map(str, new or folders))}
직접 채우기: {data_dir}/images/train/이름.jpg (png)와 {data_dir}/masks/train/이름.png, val은 검증용 (전체의 20% 정도)
  마스크는 객체가 하나면 8비트 PNG (255가 객체, 0이 배경), 여럿이면 16비트 PNG (값이 객체의 번호, 0이 배경)
  확인: python prepare_data.py --check
자동으로 나누기: python prepare_data.py --images 이미지폴더 --masks 마스크폴더 (8비트 값이나 색이 번호면 --numbered)
  또는 python prepare_data.py --images 이미지폴더 --coco annotations.json
{IMPORT}
Kvasir-SEG 받기: python download_dataset.py""")


# ---- finding pairs ----


def images_in(folder, split, recursive, problems, notes, subfolders=(), skip=None):
    """The image files of a folder: [("SPLIT/relative path", path)]; other files, except texts, become `problems`.

    split "all": the split is made later, unless the folder contains train/ and val/ (or valid/), which then define it.
    Folders inside are read if `recursive`, if named in `subfolders` or if inside train/ or val/; `skip` is never read.
    """
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.resolve() != skip
              and not SYSTEM_FILES.search(f"/{path.name}/")]
    own = {name: SPLIT_FOLDERS[name.lower()] for name in inside if split == "all" and name.lower() in SPLIT_FOLDERS}
    tests = {name for name in inside if own and name.lower() in ("test", "testing")}
    own = own if set(own.values()) == set(SPLITS) else {}
    folders = {*own, *subfolders, *({*inside} - tests if recursive and not own else ())}
    paths = set(walk_files(folder, False)).union(*(
        walk_files(folder / name, recursive or name in own, skip) for name in folders))
    found = []
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        first, _, rest = name.partition("/")
        if path.suffix.lower() in SILENT_SUFFIXES or SYSTEM_FILES.search(f"/{name}"):
            continue
        name = f"{own[first]}/{rest}" if first in own else f"{split}/{name}"
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            problems[name] = "읽지 않는 형식 (PNG나 JPEG로 바꾸세요)"
        elif own and first not in own:
            problems[name] = "train/과 val/ 밖에 있음"
        else:
            found.append((name, path))
    notes["unread"] += [(f"{name}/", 1) for name in inside if name not in {path.split("/")[0] for path in folders}]
    return found


def walk_files(folder, recursive, skip=None):
    """The files of a folder, and of those inside if recursive; OSError if one is unreadable (glob() would skip it)."""
    for path in folder.iterdir():
        if not path.is_dir():  # a broken link, too
            yield path
        elif recursive and path.resolve() not in (skip, folder.resolve(), *folder.resolve().parents):
            yield from walk_files(path, True, skip)


def pairs_from_masks(masks, images, split, args, problems, notes):
    """Pair images and mask files by stem: [Pair], and the mask files; adds {name: problem} for the others."""
    find = partial(images_in, split=split, recursive=args.recursive, problems=problems, notes=notes)
    if images.resolve() != masks.resolve():
        image_files, mask_files = find(images, skip=masks.resolve()), find(masks, skip=images.resolve())
    elif args.mask_suffix:
        image_files, mask_files = [], []
        for name, path in find(images):
            is_mask = composed(path.stem).endswith(composed(args.mask_suffix))
            (mask_files if is_mask else image_files).append((name, path))
    else:
        fail(f"--images와 --masks가 같은 폴더입니다: {images}. 마스크를 다른 폴더로 옮기거나 --mask-suffix를 주세요")
    pairs = pair_by_stem(image_files, mask_files, problems, notes, args.image_suffix, args.mask_suffix)
    if image_files and not pairs and not args.mask_suffix:
        suggest_suffix(*([composed(name.partition("/")[2].removesuffix(path.suffix)) for name, path in files]
                         for files in (image_files, mask_files)))
    pairs = [Pair(name, *image, partial(read_source_mask, *mask, args, notes)) for name, image, mask in pairs]
    return pairs, [path for _, path in mask_files]


def pair_by_stem(image_files, mask_files, problems, notes, image_suffix="", mask_suffix=""):
    """Pair files by stem: [(name, (image path, page), (mask path, page))]; files without a pair become `problems`.

    Pages of a TIFF file with several are named stem_p001, stem_p002, ...; page is 0 for other files.
    """
    found, pairs = defaultdict(lambda: ([], [])), []
    is_one_mask_folder = all(name.startswith("all/") for name, _ in mask_files)  # for images with a split of their own
    for part, (files, suffix) in enumerate(((image_files, image_suffix), (mask_files, mask_suffix))):
        for name, path in files:
            stem = name.removesuffix(path.suffix)
            key = composed(stem.partition("/")[2] if is_one_mask_folder else stem)
            if not key.endswith(composed(suffix)):
                notes["suffixes"].append((name, 1))
                continue
            pages = tiff_pages(path)
            for page in pages:
                mark = f"_p{page:03}" if page else ""
                files_of_key = found[key.removesuffix(composed(suffix)) + mark]
                files_of_key[part].append((f"{stem}{mark}{path.suffix}", (path, page), len(pages)))
    for stem, (images, masks) in sorted(found.items()):
        if len(images) > 1 or len(masks) > 1:
            same = [name for name, *_ in max(images, masks, key=len)]
            problems[same[0]] = "이름이 같은 파일이 여럿: " + ", ".join(Path(name).name for name in same)
        elif not masks:
            problems[images[0][0]] = f"마스크 없음 (이름이 {Path(stem).name}{mask_suffix}인 파일)"
        elif not images:
            problems[masks[0][0]] = f"이미지 없음 (이름이 {Path(stem).name}{image_suffix}인 파일)"
        elif 1 < images[0][2] != masks[0][2] > 1:  # the pages of several channels would get masks of other slices
            problems[images[0][0]] = f"장수가 다름: 이미지 {images[0][2]}장, 마스크 {masks[0][2]}장"
        else:
            pairs.append((*images[0][:2], masks[0][1]))
    return pairs


def suggest_suffix(images, masks):
    """Fail with the command that pairs all images, [stem], if the masks' stems differ from theirs by one suffix."""
    suffixes = [mask.removeprefix(images[0]) for mask in sorted(masks) if mask.startswith(images[0])]
    fitting = [suffix for suffix in suffixes if suffix and {stem + suffix for stem in images} <= set(masks)]
    if fitting:
        fail("마스크와 이미지는 이름의 끝이 다릅니다. 다시 실행: "
             + shlex.join(["python", "prepare_data.py", *sys.argv[1:], f"--mask-suffix={fitting[0]}"])
             + (f" (또는 {', '.join(fitting[1:])})" if fitting[1:] else ""))


def tiff_pages(path):
    """The numbers of the pages of a TIFF file of several, from 1 on; [0], the file itself, for other files."""
    with contextlib.suppress(Exception), Image.open(path, formats=["TIFF"]) as file:  # decode_file() reports bad files
        return range(1, file.n_frames + 1) if file.n_frames > 1 else [0]
    return [0]


def read_tags(path):
    """TIFF_TAGS of the first page of a TIFF file, {number: value}, even if Pillow cannot open it; {} for other files.

    Raises ImageError if they are damaged. "next" is the place of the second page, 0 if there is none.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0"):  # the last one is BigTIFF
            return {}
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8) if head[2] == 43 else head)
            file.seek(tags.next)
            tags.load(file)
            return {**{number: tags[number] for number in TIFF_TAGS if number in tags}, "next": tags.next}
        except Exception:  # Pillow raises many types for damaged tags
            raise ImageError(f"{path}: 손상된 TIFF입니다") from None


def check_tiff(path):
    """ImageError if OpenCV would mix up the channels of a TIFF file, or see only the first picture of its page."""
    tags = read_tags(path)
    if not tags:
        return
    try:
        bits, channels, note = max(tags.get(258, (1,))), tags.get(277, 1), str(tags.get(270))
        has_alpha, is_planar = (bits, channels) == (8, 2) and tags.get(338) in ((1,), (2,)), tags.get(284) == 2
        is_larger = path.stat().st_size > 2 * tags[256] * tags[257] * channels * bits / 8  # than one picture
        is_stack = is_larger and not tags["next"] and re.search(r'^images=(?!1$)\d|"truncated": true', note, re.M)
        is_stack = is_stack or tags.get(32997, 1) > 1
        is_mixed = channels > 1 and (is_planar and bits > 8 or tags.get(262, 2) < 2 and bits <= 16 and not has_alpha)
    except (KeyError, TypeError):  # width or height is missing; several numbers in place of one
        raise ImageError(f"{path}: 손상된 TIFF입니다") from None
    if is_stack:  # ImageJ writes it so above 4 GB
        raise ImageError(f"{path}: 스택을 한 장에 담은 TIFF입니다. 여러 장으로 저장하세요")
    if is_mixed:
        raise ImageError(f"{path}: 채널을 뒤섞어 읽게 되는 TIFF입니다. 채널마다 (색이면 8비트 RGB로) 저장하세요")


def one_page(path, page, folder):
    """Write a page of a TIFF file, counted from 1, to a file in `folder`; returns `path` for page 0. See check_tiff."""
    check_tiff(path)
    if not page:
        return path
    stack = np.memmap(path, np.uint8, "r")  # not read as a whole for each page
    _, pages = cv2.imdecodemulti(stack, COLOR_AND_DEPTH, range=(page - 1, page))
    if not pages:
        raise ImageError(f"{path}: {page}번째 장을 읽을 수 없습니다")
    copy = folder / f"{path.stem}.tif"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(cv2.imencode(".tif", pages[0])[1].tobytes())
    return copy


# ---- reading masks ----


def read_source_mask(path, page, args, notes, _shape=None):
    """Read a mask written by any tool: bool H x W for one object, uint16 H x W for numbered objects (0: background).

    Grey masks with more than 8 bits (microscopy tools) and PNGs with the VOC palette hold object numbers. With
    --numbered, each value or color except black is an object; with --classes, each connected region of one is. In other
    masks, pixels above 127 in any channel are foreground; in a mask of 0 and 1, pixels of 1 are. Fails if a threshold
    of 127 would lose objects and no flag selects another reading.
    """
    values, is_voc, void = read_pixels(path, page, args)
    if args.void or void.any():
        values = np.where(void if values.ndim == 2 else void[..., None], 0, values)
        notes["void"].append((path.name, int(void.sum())))
        if void.any() and not values.any():
            raise ImageError("void뿐인 마스크")
    is_deep = values.ndim == 2 and values.dtype != np.uint8
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
    is_without_black = 0 < brightness.min() < 8 and len(np.unique(brightness)) == 2  # 1 and 255: which is void?
    if is_label_map(brightness) or is_without_black or values.ndim == 3 and has_several_hues(values):
        fail(f"{path}: 127보다 밝은 곳이 객체 하나인 마스크가 아닙니다. 값이나 색마다 객체면 --numbered, 클래스면 "
             f"--classes, 밝기로 나누려면 --threshold {min(127, brightness.max() // 2)}, 무시할 값은 --void N")
    return brightness > 127


def read_pixels(path, page, args):
    """The pixels of a mask file, H x W or H x W x 3 (BGR); whether they are indices of the VOC palette; void pixels.

    Transparent pixels become black; if the picture has a single color, its alpha channel is the mask.
    """
    values = decode_file(one_page(path, page, args.data_dir / ".part" / "mask pages"), COLOR_AND_DEPTH)
    rgba = read_transparent(path, page)
    if rgba is not None:
        alpha = rgba[..., 3] > rgba[..., 3].max() // 2
        is_plain = (values == values[0, 0]).all() and not alpha.all()
        colors = np.where(alpha[..., None], np.atleast_3d(values), 0)
        values = alpha.astype(np.uint8) * 255 if is_plain else colors
    colors = np.atleast_3d(values)
    values = colors[..., 0].copy() if (colors == colors[..., :1]).all() else values
    is_jpeg, indices, palette, tags = False, None, [], read_tags(path)
    with contextlib.suppress(Exception), path.open("rb") as source, Image.open(source) as file:  # else no palette
        file.seek(max(page - 1, 0))
        is_jpeg = file.format == "JPEG" or file.info.get("compression") == "jpeg"
        if file.mode == "P" and args.threshold is None:
            indices, palette = upright(np.array(file), path), file.getpalette()[:9]
    is_numbered, is_voc = args.numbered or args.classes, len(palette) > 3 and palette == VOC_PALETTE[:len(palette)]
    if is_jpeg and is_numbered:
        fail(f"{path}: JPEG은 번호와 색을 바꾸므로 --numbered와 --classes에 쓸 수 없습니다. PNG 원본을 쓰세요")
    is_inverted = palette[:3] == [255] * 3 or tags.get(262) == 0 and values.dtype == np.uint8  # tifffile: booleans
    if is_inverted and not (is_numbered or args.threshold is not None or str(tags.get(305)).startswith("tifffile")):
        fail(f"{path}: 0을 흰색으로 보이는 파일이라 0과 1 중 어느 쪽이 객체인지 알 수 없습니다. "
             "0이 배경이면 --numbered, 보이는 대로 흰색이 객체면 --threshold 127")
    if palette and (is_voc or is_numbered):
        if not ((colors == 0).all(axis=2) & (indices > 0)).any():  # else the index of black is not 0
            values = indices
    elif is_inverted and args.threshold is None:
        values = 255 - values
    void = is_voc & (np.atleast_3d(values) == 255).all(axis=2)
    for value in args.void:
        void |= ((colors if len(value) == 3 else np.atleast_3d(values)) == value[::-1]).all(axis=2)
    return values, is_voc, void


def has_several_hues(colors):
    """Whether a color mask (H x W x 3) has up to eight colors, but not two, or areas above 127 of different hues."""
    if 2 < len(np.unique(colors[::2, ::2].astype(np.int64) @ [1, 2**16, 2**32])) < 9:  # a blurred edge has more
        return True
    brightness = colors.max(axis=2)
    hues = colors / np.maximum(brightness, 1)[..., None].astype(np.float32)
    usual = np.median(hues[brightness > 127], axis=0) if (brightness > 127).any() else 0
    differs = (brightness > 127) & (np.abs(hues - usual).max(axis=2) > 0.3)
    return cv2.erode(differs.astype(np.uint8), np.ones((5, 5))).any()  # thinner ones are blurred edges


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
    is_white = labels.max() == 65535 and found[found > 0][0] > 255 and len(elsewhere) < len(found)  # with a grey edge
    if is_white or len(found) > 8 and len(elsewhere) < len(found) / 2:  # most values occur only on gradients
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


def read_annotations(coco_path, args, notes):
    """Read a COCO file, or the given categories of it: ({image id: CocoImage}, names of all categories).

    A region marked iscrowd, which may contain several objects, is left out if its category also has single objects.
    """
    images, sides = {}, ("height", "width")
    try:
        coco = json.loads(coco_path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(coco.get(part), list) for part in ("images", "annotations")):
            raise ValueError("images와 annotations 목록이 없음")
        for image in coco["images"]:
            path = composed(str(image.get("file_name") or image["coco_url"]).replace("\\", "/"))
            if image["id"] in images:
                fail(f"{coco_path}: 두 이미지의 번호가 같습니다: {image['id']} ({images[image['id']].path}, {path}). "
                     "파일을 합쳤다면 번호를 다시 매기세요")
            images[image["id"]] = CocoImage(path, [float(image.get(side) or 0) for side in sides], [], [])
        known = {category["id"]: str(category["name"]) for category in coco.get("categories") or []}
        chosen = [(name, annotation) for annotation in coco["annotations"]
                  if (name := known.get(annotation.get("category_id"), str(annotation.get("category_id"))))
                  in (args.category or [name])]
        with_singles = {name for name, annotation in chosen if not annotation.get("iscrowd")}
        for name, annotation in chosen:
            image, is_crowd = images.get(annotation["image_id"]), annotation.get("iscrowd") and not args.merge
            is_kept = not is_crowd or args.keep_crowd or name not in with_singles
            note = ("orphans" if not image else "boxes" if not (segmentation := annotation.get("segmentation"))
                    else ("kept_crowds" if is_kept else "crowds") if is_crowd else "")
            if known and annotation.get("category_id") not in known:
                notes["unnamed"].append((f"category_id {name}", 1))
            if note:
                notes[note].append((image.path if image else str(annotation["image_id"]), 1))
            if image:
                (image.objects if note in ("", "kept_crowds") else image.left_out).append((name, segmentation))
    except FileNotFoundError:
        fail(f"파일이 없습니다: {coco_path}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{coco_path}: COCO 형식이 아닙니다 ({type(error).__name__}: {error}). CVAT와 Label Studio에서는 COCO, "
             f"VIA에서는 Export Annotations (COCO format)로 내보내세요. {IMPORT}")
    return images, [*known.values()]


def pairs_from_coco(coco_path, classes, images, split, args, problems, notes):
    """Like pairs_from_masks, for a COCO file; adds its categories to `classes`: {name: whether it has objects}."""
    entries, categories = read_annotations(coco_path, args, notes)
    used = {name for entry in entries.values() for name, _ in entry.objects}
    if "boxes" in notes and not used:
        fail(f"{coco_path}: segmentation이 없습니다. 상자로 마스크 만들기: "
             f"python extras/label_with_text.py --images {images} --boxes {coco_path}")
    for name in [*categories, *sorted(used)]:
        classes[name] = classes.get(name) or name in used
    folders = {end for entry in entries.values() for end in ends(entry.path.rpartition("/")[0])
               if (images / end).is_dir()}
    files, places = images_in(images, split, args.recursive, problems, notes, folders), defaultdict(set)
    for file in files:  # by its path in the folder, and without train/ or val/
        for place in (file[1].relative_to(images).as_posix(), file[0].partition("/")[2]):
            places[composed(place)].add(file)
    entries_of, pairs = defaultdict(list), []
    for entry in entries.values():
        found = next((places[end] for end in ends(entry.path) if end in places), ())  # CVAT writes folders before it
        without = (places.get(UPLOAD_PREFIX.sub("", end)) for end in ends(entry.path))
        if not found and (found := next(filter(None, without), ())):
            notes["prefixes"].append((entry.path, 1))
        if len(found) == 1:
            entries_of[min(found)].append(entry)
        else:
            problems[f"{split}/{entry.path}"] = "이미지 없음" if not found else (
                f"이미지가 여럿: {', '.join(name for name, _ in sorted(found))}")
    for name, path in files:
        entry, *others = entries_of[name, path] or [None]
        if not entry:
            problems[name] = "마스크 없음 (COCO 파일에 없음)"
        elif others:
            problems[name] = f"COCO 파일에 두 번 나옴 ({entry.path}, {others[0].path})"
        elif not entry.objects and (entry.left_out or not args.allow_empty):
            problems[name] = "마스크 없음 (쓸 객체가 annotations에 없음)"
        else:
            read_mask = partial(draw_objects, entry.objects, entry.size, args.merge, entry.path, classes)
            pairs.append(Pair(name, path, 0, read_mask))
    return pairs, [coco_path]


def ends(path):
    """The ends of a path, the longest first: "a/b/c", "b/c", "c"; none that could lead out of a folder."""
    decoded = composed(unquote(path))  # Label Studio writes %20 for a blank
    parts = re.sub(r".*(^|/)\.\.(/|$)", "", path).split("/")
    found = [end for start in range(len(parts)) if (end := "/".join(parts[start:])) and not Path(end).is_absolute()]
    return found + (ends(decoded) if decoded != path else [])


def draw_objects(objects, size, merge, name, classes, shape):
    """Draw COCO objects, [(class name, segmentation)], as uint16 labels H x W; smaller objects cover larger ones.

    Labels are 1, 2, ... in their order; with `classes`, {name: number}, 1000 * class + 1, ... in each class. With
    `merge`, or for one object without classes, returns the union, bool H x W. Invalid segmentations are skipped and
    reported; ImageError if none is left. size: (H, W) in the COCO file, 0 if unknown; shape: that of the image, upright
    """
    if any(size) and [*size] not in ([*shape], [*shape[::-1]]):  # reversed: of an image before its EXIF turn
        raise ImageError(f"크기가 다름: 이미지 {shape[1]}x{shape[0]}, COCO 파일 {float(size[1]):g}x{float(size[0]):g}")
    height, width = map(int, size if any(size) else shape)
    rles, values, counts, problem = [], [], Counter(), ""
    for category, segmentation in objects:
        try:
            rles.append(to_rle(segmentation, height, width))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            problem = f"segmentation을 해석할 수 없음 ({error if type(error) is ValueError else type(error).__name__})"
            continue
        counts[category if classes else None] += 1
        values.append(1000 * classes[category] + counts[category] if classes else len(rles))
    if problem and not rles:
        raise ImageError(problem)
    if problem:
        tqdm.write(f"  제외: {name}의 객체 {len(objects) - len(rles)}개 - {problem}")
    if rles and (merge or len(rles) == 1 and not classes):
        return coco_mask.decode(coco_mask.merge(rles)) > 0
    if not classes and len(rles) > 65535:
        raise ImageError("객체가 65,535개보다 많음")
    if classes and max(counts.values(), default=0) > MAX_NUMBER:
        fail(f"{name}: 한 클래스의 객체가 {MAX_NUMBER}개보다 많습니다. --category로 고르거나 --merge로 합치세요")
    labels = np.zeros((height, width), np.uint16)
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
        is_cut = isinstance(counts := segmentation["counts"], str) and not re.fullmatch("[0-o]*[0-O]", counts)
        if is_cut or segmentation["size"] != [height, width]:  # see rleFrString() of cocoapi
            raise ValueError("RLE가 이미지 크기와 다름")
        rle = {"counts": counts} if isinstance(counts, str) else coco_mask.frPyObjects(segmentation, height, width)
        try:
            coco_mask.decode({**rle, "size": [height * width - 1, 1]})
        except ValueError:  # the runs are longer than that, as they should be; merge() fails on empty runs
            return coco_mask.encode(coco_mask.decode({**rle, "size": [height, width]}))
        raise ValueError("RLE가 이미지 크기와 다름")
    parts = segmentation if np.ndim(segmentation[0]) else [segmentation]  # VIA writes one polygon without its list
    polygons = [np.array(part, float) for part in parts if len(part) >= 6 or len(parts) == 1]  # fewer have no area
    for points in polygons:
        if points.max() <= 1:
            raise ValueError("좌표가 픽셀이 아니라 0~1의 비율")
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) < 1e5).all():
            raise ValueError("다각형이 아님")
    return coco_mask.merge(coco_mask.frPyObjects([points.tolist() for points in polygons], height, width))


# ---- writing data/ ----


def write_pairs(pairs, problems, staging, args, notes):
    """Write valid pairs as images/SPLIT/NAME and masks/SPLIT/STEM.png of `staging`; the others become `problems`.

    Returns {"SPLIT/NAME": hash of the image's pixels} and {"SPLIT/NAME": group}; a group is not split.
    """
    shutil.rmtree(staging, ignore_errors=True)
    contents, groups, stems = {}, {}, {}
    for pair in pairs:
        split, _, name = pair.name.removesuffix(pair.image.suffix).partition("/")
        stems.setdefault(f"{split}/{name.replace('/', '__')}", []).append(pair)
    for stem, (pair, *others) in tqdm(sorted(stems.items()), "준비", disable=None):
        try:
            if others:
                raise ImageError("이름이 같은 파일이 여럿: " + ", ".join(
                    other.name.partition("/")[2] for other in (pair, *others)))
            path = pair.image
            image, is_flattened = read_over_white(path, pair.page, staging / "image pages")
            mask = fit_to_image(pair.read_mask(image.shape[:2]), path, image.shape[:2], notes, args.allow_empty)
        except ImageError as problem:
            problems[pair.name] = str(problem)
            continue
        is_own = path.suffix.lower() in KEPT_AS_IS and not is_flattened
        name = stem + (path.suffix if is_own else ".png")
        mask = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
        for file, content in ((staging / "images" / name, path.read_bytes() if is_own else as_png(image[..., ::-1])),
                              (staging / "masks" / f"{stem}.png", as_png(mask))):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        found = re.search(args.group, pair.name.partition("/")[2]) if args.group else None
        group = found and (found[min(1, found.re.groups)] or found[0])
        notes["white"] += [(path.name, 1)] * is_flattened
        notes["ungrouped"] += [(pair.name.partition("/")[2], 1)] * bool(args.group and not group)
        contents[name] = f"{image.shape} {hashlib.sha256(image).hexdigest()}"
        groups[name] = group or (AUGMENTED.sub("", name).partition("/")[2] if AUGMENTED.search(name) else name)
    return contents, groups


def read_over_white(path, page, folder):
    """Read an image like read_image, with transparency composited over white; also returns whether there was any."""
    file = one_page(path, page, folder)
    image, rgba = read_image(file), read_transparent(path, page)
    if rgba is None or not rgba[..., 3].any():
        return image, False
    is_deep = decode_file(file, COLOR_AND_DEPTH).dtype != np.uint8
    colors, alpha = image if is_deep else rgba[..., :3], rgba[..., 3:] / 255
    return np.rint(colors * alpha + 255 * (1 - alpha)).astype(np.uint8), True


def read_transparent(path, page):
    """Read a file with transparent pixels as RGBA, uint8 H x W x 4, upright; None if it has none."""
    with contextlib.suppress(Exception), path.open("rb") as source, Image.open(source) as file:
        file.seek(max(page - 1, 0))  # Pillow reads every format with transparency that OpenCV reads
        if file.mode[-1] in "Aa" or "transparency" in file.info:
            rgba = upright(np.array(file.convert("RGBA")), path)
            return rgba if (rgba[..., 3] < 255).any() else None
    return None


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
        raise ImageError("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*shape, *mask.shape)
                         + " (90도 돌아간 마스크?)" * (mask.shape == shape[::-1]))
    if mask.min() == mask.max() > 0:
        raise ImageError("마스크가 이미지 전체를 덮음")
    if not mask.any() and not allow_empty:
        raise ImageError("마스크가 비어 있음 (객체가 없는 이미지로 넣으려면 --allow-empty)")
    notes["empty"] += [] if mask.any() else [(image_path.name, 1)]
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
    """Turn pixels upright that Pillow read; it has turned those of a TIFF file, unless it opened it by its path."""
    return pixels if path.suffix.lower() in (".tif", ".tiff") else turn(pixels, read_orientation(path))


def same_images(contents):
    """Groups of equal images in {name: content}: [[name, name, ...]]."""
    found = defaultdict(list)
    for name, content in contents.items():
        found[content].append(name)
    return [names for names in found.values() if len(names) > 1]


def as_png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def split_names(groups, val_ratio, shuffle_seed):
    """Split {name: group} into {"train": [...], "val": [...]}: sorted by group, the first part to train.

    With a shuffle_seed the sorted groups are shuffled first. The cut is the one between two groups that is nearest to
    val_ratio.
    """
    order = sorted(set(groups.values()))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    places = {group: place for place, group in enumerate(order)}
    names = sorted(groups, key=lambda name: (places[groups[name]], name))
    wanted = len(names) - round(len(names) * val_ratio)
    cuts = [cut for cut in range(1, len(names)) if groups[names[cut - 1]] != groups[names[cut]]]
    cuts = [0, *cuts, len(names)] if wanted in (0, len(names)) or not cuts else cuts
    cut = min(cuts, key=lambda cut: abs(cut - wanted))
    return {"train": names[:cut], "val": names[cut:]}


def warn_about_split(splits, contents, groups, pattern):
    """Print what the two splits share: images, groups, and names that look like the frames of a few videos."""
    sides = {name: f"{split}/{Path(name).name}" for split in SPLITS for name in splits[split]}
    for names in same_images(contents):
        if len({sides[name].split("/")[0] for name in names}) == 2:
            print(f"  주의: 학습과 검증에 같은 이미지가 있습니다 - {' = '.join(sorted(sides[name] for name in names))}")
    train, val = ({groups[name] for name in splits[split]} for split in SPLITS)
    if pattern and len({*groups.values()}) == 1:
        print("  주의: 묶음이 하나라 검증에 둘 이미지가 없습니다")
    for group in sorted(train & val):
        print(f"  주의: 학습과 검증에 같은 묶음이 있습니다 - {group}")
    stems = [Path(name).stem for name in contents if name.startswith("all/") and not pattern]
    train, val = ({Path(name).stem.rstrip("0123456789") for name in splits[split]} for split in SPLITS)
    is_numbered, videos, cut = all(stem[-1].isdecimal() for stem in stems), train | val, sorted(train & val)
    if is_numbered and cut and 2 <= len(videos) <= len(stems) / 10:
        print(f"  주의: 이름이 영상 {len(videos)}개의 프레임 같고, {cut[0]}의 프레임이 학습과 검증에 모두 있습니다. "
              r"그렇다면 다시 실행할 때 --group '^(.*?)\d+\.\w+$'을 더하세요")


def put_in_place(staging, target, splits, classes, record):
    """Replace the old pairs in `target` with the new ones; until all are moved, split.json marks it as unfinished."""
    write_json(target / "split.json", {"complete": False})
    (target / "classes.json").unlink(missing_ok=True)
    for part in ("images", "masks"):
        shutil.rmtree(target / part, ignore_errors=True)
        for split, names in splits.items():
            (target / part / split).mkdir(parents=True)
            for name in names:
                path = staging / part / (name if part == "images" else Path(name).with_suffix(".png"))
                path.rename(target / part / split / path.name)
    if classes:
        write_json(target / "classes.json", {number: name for name, number in classes.items()})
    split = {split: [Path(name).name for name in names] for split, names in splits.items()}
    write_json(target / "split.json", {**record, "split": split, "checksums": checksums(target)})


def checksums(data_dir):
    """{path relative to data_dir: CRC-32} of classes.json and the files of images/ and masks/, without SYSTEM_FILES."""
    paths = [data_dir / "classes.json", *(data_dir / "images").rglob("*"), *(data_dir / "masks").rglob("*")]
    names = {path.relative_to(data_dir).as_posix(): path for path in paths if path.is_file()}
    return {name: zlib.crc32(path.read_bytes()) for name, path in names.items() if not SYSTEM_FILES.search(name)}


def print_notes(notes, problems, word):
    """Print NOTES for {key: [(file name, count), ...]}, with totals and first file names, then {name: problem}."""
    for key, found in notes.items():
        named = ", ".join(name.removeprefix("all/") for name, _ in found[:3]) + (" 등" if len(found) > 3 else "")
        if found:
            print(f"  {NOTES[key].format(sum(count for _, count in found))}: {named}")
    for name, problem in sorted(problems.items()):
        print(f"  {word}: {name.removeprefix('all/')} - {problem}")


# ---- --check and --preview ----


def survey(data_dir, allow_empty):
    """Measure every pair of data/; returns [Row], {name: problem}, notes and the classes, {number as text: name}."""
    rows, problems, notes, classes = [], {}, defaultdict(list), {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # accepted images without an object are no problem
        allow_empty |= bool(json.loads((data_dir / "split.json").read_text(encoding="utf-8")).get("allow_empty"))
    with contextlib.suppress(FileNotFoundError):
        try:
            found = json.loads((data_dir / "classes.json").read_text(encoding="utf-8")).items()
            classes = {str(int(number)): str(name) for number, name in found}
        except (ValueError, AttributeError):
            problems["classes.json"] = '{"1": "이름", ...} 꼴이 아님'
    for split in SPLITS:
        folders = [data_dir / part / split for part in ("images", "masks")]
        if split == "val" and not any(folder.is_dir() for folder in folders):
            print("val: 폴더가 없습니다 (학습은 검증 없이 합니다)")
            continue
        pairs = pair_by_stem(*(images_in(folder, split, False, problems, notes) for folder in folders), problems, notes)
        for name, (image, _), (mask, _) in tqdm(pairs, f"{split} 검사", disable=None, leave=False):
            try:
                rows.append(measure_pair(name, image, mask, classes, allow_empty, notes))
            except ImageError as problem:
                problems[name] = problem
                rows.append(Row(name, image, mask, None, 0, {}, name, ["problem"]))
    by_name = {row.name: row for row in rows}
    for names in same_images({row.name: row.content for row in rows}):
        for name in names:
            by_name[name].reasons.append("duplicate")
        if names[0].split("/")[0] != names[-1].split("/")[0]:
            problems[" = ".join(names)] = "학습과 검증에 같은 이미지"
        else:
            notes["duplicates"].append((" = ".join(names), len(names) - 1))
    return rows, problems, notes, classes


def measure_pair(name, image_path, mask_path, classes, allow_empty, notes):
    """Measure a pair of data/ as a Row; raises ImageError if the pair cannot be used for training."""
    if image_path.suffix.lower() not in KEPT_AS_IS:
        raise ImageError("이미지 없음 (jpg, jpeg, png)")
    if mask_path.name != f"{image_path.stem}.png":
        raise ImageError(f"마스크 없음 ({image_path.stem}.png이어야 함)")
    image, labels = read_image(image_path), read_labels(mask_path)
    if fit_to_image(labels, image_path, image.shape[:2], notes, allow_empty) is not labels:
        raise ImageError("마스크가 돌리기 전의 픽셀에 맞음 (이미지의 EXIF 방향대로 돌려야 함)")
    areas = np.bincount(labels.ravel())
    numbers = np.flatnonzero(areas[1:]) + 1
    if wrong := [number for number in numbers if classes and (str(number // 1000) not in classes or not number % 1000)]:
        raise ImageError(f"classes.json에 없는 클래스의 값 {wrong[0]} (1000 * 클래스 + 번호여야 함)")
    pixels = (areas[numbers] * min(1, MAX_SIDE / max(labels.shape)) ** 2).round().astype(int)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    found = {"empty": not len(numbers), "EXIF": read_orientation(image_path) > 1, "cut": np.count_nonzero(border),
             "small": (pixels < MIN_FOREGROUND).sum(), "no_background": labels.all()}
    for key in ("cut", "small", "no_background"):
        notes[key] += [(name, int(found[key]))] * bool(found[key])
    return Row(name, image_path, mask_path, image.shape[:2], (labels > 0).mean(), dict(zip(numbers.tolist(), pixels)),
               f"{image.shape} {hashlib.sha256(image).hexdigest()}", [key for key, value in found.items() if value])


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


def print_check(rows, problems, notes, classes):
    """Print sizes, shares of foreground and objects of both splits, then the notes and every problem by file."""
    spread = partial(np.quantile, q=(0, 0.5, 1))
    for split in SPLITS:
        good = [row for row in rows if row.size and row.name.startswith(f"{split}/")]
        filled, sizes = [row for row in good if row.objects], Counter(row.size for row in good).most_common()
        print(f"{split}: {len(good)}쌍")
        if not filled:
            continue
        common = ", ".join(f"{width}x{height} ({count}장)" for (height, width), count in sizes[:3])
        pixels = np.concatenate([[*row.objects.values()] for row in filled])
        print(f"  크기 {len(sizes)}가지: {common}{' 등' if len(sizes) > 3 else ''}")
        print("  전경 비율: 최소 {:.1%}, 중앙값 {:.1%}, 최대 {:.1%}".format(*spread([row.share for row in filled])))
        print("  객체 {}개: 이미지마다 최소 {:g}, 중앙값 {:g}, 최대 {:g}개".format(
            len(pixels), *spread([len(row.objects) for row in filled])))
        small = [(pixels < limit).sum() for limit in (100, 1000)]
        print("  객체 크기: 최소 {:.0f}픽셀, 중앙값 {:.0f}픽셀, 최대 {:.0f}픽셀, 100픽셀 미만 {}개, "
              "1,000픽셀 미만 {}개 (긴 변이 {}보다 크면 줄인 뒤)".format(*spread(pixels), *small, MAX_SIDE))
        found = Counter(str(number // 1000) for row in filled for number in row.objects)
        if classes:
            print("  클래스: " + ", ".join(f"{name} {found[number]}개" for number, name in classes.items()))
    print_notes({key: found for key, found in notes.items() if key != "turned"}, problems, "문제")  # a problem here
    print(f"문제 {len(problems)}개" if problems else "문제 없음")


def preview(data_dir, rows, count):
    """Write data/preview.png: `count` pairs spread over data/, those with a reason to look at them first."""
    if not rows:
        fail(f"{data_dir}에 이미지-마스크 쌍이 없습니다. 먼저 데이터를 준비하세요")
    count, chosen = min(count, len(rows)), []
    for part in ([row for row in rows if row.reasons], [row for row in rows if not row.reasons]):
        part = sorted(part, key=lambda row: min(map(REASONS.index, row.reasons), default=0))
        places = np.linspace(0, len(part) - 1, min(count - len(chosen), len(part))).round().astype(int)
        chosen += [part[place] for place in places]
    columns = min(count, 6)
    sheet = np.full((-(-count // columns) * (TILE + CAPTION), columns * TILE, 3), 255, np.uint8)
    for place, row in enumerate(chosen):
        try:
            tile = draw_tile(row.image, row.mask)
        except ImageError:
            tile = np.full((TILE - 8, TILE - 8, 3), 128, np.uint8)  # an unreadable file is grey
        top, left = 4 + place // columns * (TILE + CAPTION), 4 + place % columns * TILE
        sheet[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
        name = row.name if len(row.name) < 34 else row.name[:14] + "..." + row.name[-16:]
        caption = " ".join([str(place + 1), *sorted(row.reasons, key=REASONS.index)[:1], name])[:36]
        caption = caption.encode("ascii", "replace").decode()
        cv2.putText(sheet, caption, (left, top + TILE + 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0))
        if not row.name.isascii():  # OpenCV draws no other letters
            print(f"  {place + 1}: {row.name}")
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

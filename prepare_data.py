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
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".bmp", ".tif", ".tiff", ".webp")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".svg", ".psd", ".dng", ".dcm", ".npy", ".nii")
LOSSLESS_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # its first three colors; PASCAL VOC, DAVIS and LabelMe write it
SPLITS = ("train", "val")
SYSTEM_FILES = re.compile(r"/(\.|@eaDir/|Thumbs\.db$|desktop\.ini$)")  # hidden, of a NAS, of Windows
UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")  # that Label Studio puts before the name of an uploaded file
NOTES = {  # what prepare() did beyond pairing, by the key under which it is counted
    "void": "void 픽셀 {:,}개를 배경으로 바꿨습니다",
    "crowds": "iscrowd 영역 {:,}개를 뺐습니다 (객체로 쓰려면 --keep-crowd)",
    "kept_crowds": "iscrowd 영역 {:,}개를 객체로 썼습니다 (빼려면 --category로 다른 범주만 고르세요)",
    "boxes": "상자뿐인 객체 {:,}개를 뺐습니다 (마스크 만들기: python extras/label_with_text.py --boxes)",
    "turned": "EXIF 방향대로 이미지 {:,}장의 마스크를 돌렸습니다 (돌리기 전의 픽셀에 그린 마스크)",
    "either": "EXIF 방향이 있는 이미지 {:,}장은 마스크의 방향을 알 수 없어 그대로 씁니다. --preview로 확인하세요",
}
MAX_SIDE = 1024        # train_sam2_proper.py reduces larger images to this ...
MIN_FOREGROUND = 100   # ... and then leaves out objects with fewer pixels
TILE, CAPTION = 256, 16  # pixels: the side of a picture in the preview, and the height of the name below it

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's has no such thing
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
Image.MAX_IMAGE_PIXELS = None  # Pillow only looks at headers and palettes; OpenCV has a limit of its own


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


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
    add, kind = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--images", type=Path, help="이미지 폴더")
    add("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    add("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    kind.add_argument("--numbered", "--colors", "--colours", action="store_true",
                      help="--masks의 8비트 값이나 색 하나가 객체 하나 (0과 검은색은 배경). 16비트부터는 언제나 번호")
    kind.add_argument("--classes", action="store_true",
                      help="--masks의 값이나 색이 클래스 (0과 검은색은 배경): 클래스마다 이어진 영역 하나가 객체 하나")
    kind.add_argument("--threshold", type=int, metavar="N", help="--masks에서 N보다 밝은 곳이 객체 하나 (기본: 127)")
    add("--void", type=int, nargs="+", metavar="N",
        help="--masks에서 배경으로 바꿀 값 N, 또는 색 R G B (VOC와 DAVIS 팔레트의 255는 저절로 바꿈)")
    add("--category", action="append", metavar="NAME", help="--coco에서 이 범주만 씀 (여러 번 가능)")
    add("--keep-crowd", action="store_true", help="--coco의 iscrowd 영역도 객체로 씀")
    add("--merge", action="store_true", help="이미지의 객체를 모두 8비트 마스크 하나로 합침")
    add("--data-dir", type=Path, default=Path("data"), help="결과 폴더 (기본: %(default)s)")
    add("--val-ratio", type=float, default=0.2, help="검증에 쓸 비율 (기본: %(default)s)")
    add("--shuffle-seed", type=int, default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    add("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    add("--preview", type=int, metavar="N", help="N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    if bool(args.images) != bool(args.masks or args.coco):
        parser.error("--images에는 --masks 또는 --coco가 함께 있어야 합니다")
    if args.masks and args.coco:
        parser.error("--masks와 --coco 중 하나만 쓰세요")
    kinds = (args.numbered, args.classes, args.void, args.threshold is not None)
    if any(kinds) and not args.masks or (args.category or args.keep_crowd) and not args.coco:
        parser.error("--numbered, --classes, --threshold, --void는 --masks와, "
                     "--category와 --keep-crowd는 --coco와 함께 씁니다")
    if len(args.void or [0]) not in (1, 3):
        parser.error("--void는 값 하나나 색 R G B여야 합니다")
    if not 0 <= args.val_ratio < 1:
        parser.error("--val-ratio는 0 이상 1 미만이어야 합니다")
    if args.preview is not None and args.preview < 1:
        parser.error("--preview는 1 이상이어야 합니다")
    return args


def prepare(args):
    """Pair, check, read the masks, split and write data/; prints what was done."""
    target, counts = args.data_dir, Counter()
    if target.resolve() in (args.images.resolve(), *args.images.resolve().parents):
        fail(f"--images가 결과 폴더 {target} 안에 있습니다. 원본은 다른 폴더에 두세요")
    readers, problems = (pairs_from_coco if args.coco else pairs_from_masks)(args, counts)
    sources = [*readers, *([args.coco] if args.coco else image_files(args.masks, {}))]

    lock(target / ".lock")
    settings = {name: getattr(args, name) for name in (
        "val_ratio", "shuffle_seed", "numbered", "classes", "threshold", "void", "category", "keep_crowd", "merge")}
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
    contents = write_pairs(readers, problems, staging, counts)
    print_notes(counts)
    for name, problem in sorted(problems.items()):
        print(f"  제외: {name} - {problem}")
    if not contents:
        shutil.rmtree(staging)
        fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}")
    splits = split_names(contents, args.val_ratio, args.shuffle_seed)
    for pair in same_images(*({name: contents[name] for name in splits[split]} for split in SPLITS)):
        print(f"  주의: 학습과 검증에 같은 이미지가 있습니다 - {pair}")
    if files:
        print(f"{target}에 있던 {sum(name.startswith('masks/') for name in files)}쌍을 새 쌍으로 바꿉니다.")
    put_in_place(staging, target, splits, record)
    print(f"완료: {target} - 학습 {len(splits['train'])}쌍, 검증 {len(splits['val'])}쌍, 제외 {len(problems)}개")


def pairs_from_masks(args, counts):
    """Pair images and mask files by stem.

    Returns: {image path: a function of the image's (H, W) that returns what read_source_mask does}, and {name: problem}
    for the others.
    """
    if args.images.resolve() == args.masks.resolve():
        fail(f"--images와 --masks가 같은 폴더입니다: {args.images}. 마스크를 다른 폴더로 옮기세요")
    pairs, problems = pair_by_stem(args.images, args.masks)
    for _, mask_path in pairs:
        if (args.numbered or args.classes) and mask_path.suffix.lower() not in LOSSLESS_SUFFIXES:
            fail(f"{mask_path}: 손실 압축은 번호와 색을 바꾸므로 --numbered와 --classes에 쓸 수 없습니다. "
                 "PNG, TIFF, BMP로 저장한 원본을 쓰세요")
    return {image: partial(read_source_mask, mask, args, counts) for image, mask in pairs}, problems


def pair_by_stem(image_dir, mask_dir):
    """Pair the files of two folders by stem: [(image path, mask path)], and {name: problem} for the others."""
    stems, pairs, problems = defaultdict(lambda: ([], [])), [], {}
    for part, folder in enumerate((image_dir, mask_dir)):
        for path in image_files(folder, problems):
            stems[composed(path.stem)][part].append(path)
    for stem, (images, masks) in sorted(stems.items()):
        if len(images) > 1 or len(masks) > 1:
            problems[stem] = "이름이 같은 파일이 여럿: " + ", ".join(path.name for path in max(images, masks, key=len))
        elif not masks:
            problems[images[0].name] = f"마스크 없음 (이름이 {stem}인 파일)"
        elif not images:
            problems[masks[0].name] = f"이미지 없음 (이름이 {stem}인 파일)"
        else:
            pairs.append((images[0], masks[0]))
    return pairs, problems


def image_files(folder, problems):
    """The image files of a folder, sorted by name; those of formats that are not read here go into `problems`."""
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    paths = sorted(path for path in folder.iterdir()  # glob() would pass over a folder that cannot be read
                   if path.is_file() and not path.name.startswith("."))
    problems.update({path.name: "읽지 않는 형식 (PNG나 JPEG로 바꾸세요)" for path in paths
                     if path.suffix.lower() in UNREAD_SUFFIXES})
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def print_notes(counts):
    for key, text in NOTES.items():
        if counts.get(key):
            print("  " + text.format(counts[key]))


def composed(name):
    """A file name with each Korean letter as one character (NFC); macOS and its zip files decompose them."""
    return unicodedata.normalize("NFC", name)


def read_source_mask(path, args, counts, _shape=None):
    """Read a mask that any tool wrote: bool H x W is one object, uint16 H x W numbered objects (0 is the background).

    Grey with more than 8 bits is numbered, as microscopy tools write it (16 or 32 bits, also as floats), and so is a
    PNG with the palette of VOC. With --numbered every value or color but black is one object, with --classes every
    connected region of one. Otherwise the foreground is what is brighter than 127 in any channel, so a red mask counts
    as well as a white one, and what rings around the edge of a JPEG is removed. A mask of 0 and 1 is taken as such.
    Fails if other values fill areas and no flag says what they are.
    """
    values, is_voc = read_pixels(path, args)
    if void := args.void or is_voc * [255]:
        is_void = (np.atleast_3d(values) == void[::-1]).all(axis=2)
        values[is_void] = 0
        counts["void"] += int(is_void.sum())
    is_deep = values.ndim == 2 and values.itemsize > 1
    if args.numbered or args.classes or args.threshold is None and (is_voc or is_deep):
        labels = to_labels(values, args.classes)
        return labels > 0 if args.merge else labels
    brightness = np.atleast_3d(values).max(axis=2)
    if args.threshold is not None:
        return brightness > args.threshold
    if brightness.max() == 1:
        return brightness > 0
    if 0 < brightness.max() <= 127 or has_many_values(values if values.ndim == 2 else to_labels(values)):
        fail(f"{path}: 값이나 색이 여럿인 마스크라 밝기로 나누면 객체를 잃습니다. 값이나 색마다 객체면 --numbered, "
             "클래스면 --classes, 밝기로 나누려면 --threshold 127, 무시할 값은 --void N")
    return brightness > 127


def read_pixels(path, args):
    """The pixels of a mask file, H x W or H x W x 3 (BGR), and whether they are numbers in the palette of VOC.

    Transparent pixels are black; in a picture of one color, transparency is the mask.
    """
    values = decode_file(path, cv2.IMREAD_UNCHANGED)
    with contextlib.suppress(Exception), Image.open(path) as file:  # kinds that Pillow cannot read have no palette
        if file.mode == "P":
            palette = file.getpalette()[:9]
            is_voc = palette == VOC_PALETTE[:len(palette)] and len(palette) > 3
            if is_voc or args.numbered or args.classes:
                return np.array(file), is_voc
        if getattr(file, "tag_v2", {}).get(262) == 0 and args.threshold is None:  # a TIFF that shows 0 as white
            if not (args.numbered or str(file.tag_v2.get(305)).startswith("tifffile")):  # so it writes boolean arrays
                fail(f"{path}: 0을 흰색으로 보이는 TIFF(MINISWHITE)라 객체가 0인지 알 수 없습니다. "
                     "0이 배경이면 --numbered, 보이는 대로 흰색이 객체면 --threshold 127")
            values = 255 - values
    if values.ndim == 3 and values.shape[2] == 4:
        values, alpha = values[..., :3], values[..., 3]
        is_plain = (values == values[0, 0]).all() and (alpha != alpha[0, 0]).any()
        values = alpha if is_plain else np.where(alpha[..., None] > 0, values, 0)
    is_grey = values.ndim == 3 and (values == values[..., :1]).all()
    return values[..., 0].copy() if is_grey else values, False


def to_labels(values, classes=False):
    """Object numbers (H x W, any type) or colors (H x W x 3) as uint16 labels H x W; 0 and black are the background.

    Numbers that fit into 16 bits stay. classes: values are classes, and each of their connected regions is an object.
    ImageError if the values are no numbers, or too many.
    """
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or values.min() < 0:
        raise ImageError("번호가 0 이상의 정수가 아님")
    if values.ndim == 3:
        values = sum(values[..., channel].astype(np.int64) << 16 * channel for channel in range(3))
    if classes:
        labels = np.zeros(values.shape, np.int32)
        for value in np.unique(values[values > 0]):
            _, regions = cv2.connectedComponents((values == value).astype(np.uint8))
            labels[regions > 0] = regions[regions > 0] + labels.max()
    elif (labels := values).max() > 65535:
        found, indices = np.unique(values, return_inverse=True)
        labels = indices.reshape(values.shape) + (found[0] != 0)
    if labels.max() > 65535:
        raise ImageError("객체가 65,535개보다 많음")
    return labels.astype(np.uint16)


def decode_file(path, flags):
    """Decode an image file with OpenCV, which also turns it upright as its EXIF says.

    Raises ImageError, naming the file, if it cannot be decoded or holds several pictures. The bytes are read first,
    because cv2.imread cannot open a path with Korean letters on Windows.
    """
    try:
        data = np.fromfile(path, np.uint8)
        is_heif = data[4:8].tobytes() == b"ftyp"  # HEIC and AVIF: not every OpenCV reads them, none turns them upright
        _, pages = (False, ()) if is_heif else cv2.imdecodemulti(data, flags, range=(0, 2))
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, cv2.error):  # a path with a NUL; an empty file; more pixels than OpenCV allows
        pages = ()
    if len(pages) != 1:
        raise ImageError(f"{path}: " + ("여러 장이 든 파일입니다. 한 장씩 나누세요" if pages else
                                        "이미지 파일이 아니거나 손상되었습니다 (HEIC와 AVIF는 JPEG나 PNG로 바꾸세요)"))
    return pages[0]


def read_image(path):
    """Read an image as uint8 H x W x 3, RGB, upright: grey, RGBA, CMYK and EXIF-rotated files too.

    Deeper pixels (12 and 16 bits, floats) become 8 bits by one rule: 0.1 % of the file's values are black, 0.1 % white.
    """
    pixels = decode_file(path, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels, posinf=0, neginf=0)
        low, high = np.percentile(pixels, (0.1, 99.9))
        pixels = (255 * np.clip((pixels - low) / (high - low or 1), 0, 1)).round().astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


def has_many_values(mask):
    """Whether more than two values of a mask (uint8 or uint16, H x W) fill areas, as in a map of classes or objects.

    The greys of an antialiased or JPEG-compressed edge fill none: few such pixels have neighbours of their own value.
    """
    if not ((mask > 0) & (mask < 255)).any():
        return False
    inside = cv2.erode(mask, np.ones((3, 3))) == cv2.dilate(mask, np.ones((3, 3)))
    pixels, inner = (np.bincount(values, minlength=2**16) for values in (mask.ravel(), mask[inside]))
    return np.count_nonzero((pixels >= 9) & (inner >= pixels / 6)) > 2


def pairs_from_coco(args, counts):
    """As pairs_from_masks, with the objects of a COCO file, or only those of the named categories.

    A region marked iscrowd may be several objects in one: it is left out if its category has single objects as well.
    """
    objects, entries, readers, problems = defaultdict(list), defaultdict(list), {}, {}
    files = {composed(path.name): path for path in image_files(args.images, problems)}
    try:
        coco = json.loads(args.coco.read_text(encoding="utf-8-sig"))
        if not all(isinstance(coco.get(part), list) for part in ("images", "annotations")):
            fail(f"{args.coco}: COCO 형식이 아닙니다 (images와 annotations 목록이 없음). "
                 "내보낼 때 CVAT와 Label Studio에서는 COCO, VIA에서는 Export Annotations (COCO format)을 고르세요")
        known = {category["id"]: str(category["name"]) for category in coco["categories"]} if args.category else {}
        chosen = [annotation for annotation in coco["annotations"]
                  if not args.category or known.get(annotation["category_id"]) in args.category]
        with_singles = {annotation.get("category_id") for annotation in chosen if not annotation.get("iscrowd")}
        for annotation in chosen:
            is_crowd = bool(annotation.get("iscrowd")) and not args.merge
            is_kept = not is_crowd or args.keep_crowd or annotation.get("category_id") not in with_singles
            if not annotation.get("segmentation"):
                counts["boxes"] += 1
            elif is_kept:
                objects[annotation["image_id"]].append(annotation["segmentation"])
            counts["kept_crowds" if is_kept else "crowds"] += is_crowd
        for image in coco["images"]:
            path = str(image["file_name"]).replace("\\", "/")
            name = composed(path.rsplit("/", 1)[-1])  # without the folders that CVAT writes
            name = name if name in files else UPLOAD_PREFIX.sub("", name, count=1)
            entries[name].append((path, image["id"], image.get("height"), image.get("width")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{args.coco}: COCO 형식이 아닙니다 ({type(error).__name__}: {error})")
    if missing := set(args.category or ()) - set(known.values()):
        fail(f"{args.coco}에 없는 범주입니다: {', '.join(sorted(missing))} (있는 것: {', '.join(known.values())})")
    if counts["boxes"] and not objects:
        fail(f"{args.coco}: 상자만 있고 segmentation이 없습니다. 마스크 만들기: "
             f"python extras/label_with_text.py --images {args.images} --boxes {args.coco}")

    stems = Counter(Path(name).stem for name in files)
    problems.update({name: "마스크 없음 (COCO 파일에 없음)" for name in files if name not in entries})
    for name, ((path, identity, height, width), *others) in entries.items():
        if name not in files:
            problems[path] = "이미지 없음"
        elif others:
            problems[name] = f"COCO 파일에 두 번 나옴 ({path}, {others[0][0]})"
        elif stems[Path(name).stem] > 1:
            problems[name] = "이름이 같은 파일이 여럿"
        elif not objects[identity]:
            problems[name] = "마스크 없음 (쓸 객체가 annotations에 없음)"
        else:
            readers[files[name]] = partial(draw_objects, objects[identity], (height, width), args.merge, name)
    return readers, problems


def draw_objects(segmentations, size, merge, name, shape=None):
    """COCO segmentations as uint16 labels H x W, 1 for the first, larger objects below smaller ones.

    With `merge`, or for one segmentation: bool H x W, their union. What cannot be used is left out and named;
    ImageError if nothing is left. size: the file's (H, W); without it, the image's own `shape` counts.
    """
    height, width = shape if None in size else size
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and 0 < height * width < 2**30):
        raise ImageError(f"COCO 파일의 이미지 크기가 잘못됨 ({width}x{height})")
    if len(segmentations) > 65535 and not merge:
        raise ImageError("객체가 65,535개보다 많음")
    rles, problem = [], None
    for segmentation in segmentations:
        try:
            rles.append(to_rle(segmentation, height, width))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            problem = f"segmentation을 해석할 수 없음 ({error if type(error) is ValueError else type(error).__name__})"
    if not rles:
        raise ImageError(problem)
    if problem:
        tqdm.write(f"  제외: {name}의 객체 {len(segmentations) - len(rles)}개 - {problem}")
    if merge or len(rles) == 1:
        return coco_mask.decode(coco_mask.merge(rles)) > 0
    labels = np.zeros((height, width), np.uint16)
    areas = [coco_mask.area(rle) for rle in rles]  # of more than 255 at once it fails (pycocotools 2.0.11)
    for index in np.argsort(areas, kind="stable")[::-1]:
        labels[coco_mask.decode(rles[index]) > 0] = index + 1
    if hidden := len(rles) - np.count_nonzero(np.bincount(labels.ravel())[1:]):
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


def write_pairs(readers, problems, folder, counts):
    """Write the good pairs as folder/images/STEM.* and folder/masks/STEM.png; the bad ones go into `problems`.

    Returns {file name of an image that was written: a hash of its pixels}.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    contents = {}
    for image_path, read_mask in tqdm(sorted(readers.items()), "준비", disable=None):
        try:
            image = read_image(image_path)
            mask = fit_to_image(read_mask(image.shape[:2]), image_path, image.shape[:2], counts)
        except ImageError as problem:
            problems[image_path.name] = str(problem)
            continue
        name = image_path.name if image_path.suffix.lower() in KEPT_AS_IS else f"{image_path.stem}.png"
        content = image_path.read_bytes() if name == image_path.name else as_png(image[..., ::-1])
        (folder / "images" / name).write_bytes(content)
        mask = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
        (folder / "masks" / f"{image_path.stem}.png").write_bytes(as_png(mask))
        contents[name] = hashlib.sha256(image).digest()
    return contents


def fit_to_image(mask, image_path, shape, counts):
    """The mask of an image of the (H, W) `shape`; ImageError if it cannot be used.

    If the image has an EXIF orientation, and the mask only fits its pixels as they are stored, it is turned likewise.
    """
    orientation = 1
    with contextlib.suppress(Exception), Image.open(image_path) as file:  # damaged metadata raise several kinds
        if "exif" in file.info or file.format == "TIFF":  # asking a PNG without them would decode all of it
            orientation = file.getexif().get(0x0112, 1)
    turned = mask.T if orientation >= 5 else mask
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    if orientation > 1 and turned.shape == shape:
        counts["either" if mask.shape == shape else "turned"] += 1
        mask = mask if mask.shape == shape else np.ascontiguousarray(turned)
    if mask.shape != shape:
        raise ImageError("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*shape, *mask.shape))
    if not mask.any():
        raise ImageError("마스크가 비어 있음")
    if mask.min() == mask.max():
        raise ImageError("마스크가 이미지 전체를 덮음")
    return mask


def same_images(train, val):
    """The images of {name: content} that stand in both splits, as "train name = val name"."""
    names = {content: name for name, content in train.items()}
    return [f"train/{names[content]} = val/{name}" for name, content in val.items() if content in names]


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
    problems, contents, counts = [], {"train": {}, "val": {}}, Counter()
    for split in SPLITS:
        folders = data_dir / "images" / split, data_dir / "masks" / split
        if split == "val" and not any(folder.is_dir() for folder in folders):
            print("val: 폴더가 없습니다 (학습은 검증 없이 합니다)")
            continue
        pairs, bad = pair_by_stem(*folders)
        good = {}
        for image_path, mask_path in tqdm(pairs, f"{split} 검사", disable=None, leave=False):
            try:
                good[image_path.name], contents[split][image_path.name] = measure_pair(image_path, mask_path, counts)
            except ImageError as problem:
                bad[image_path.name] = problem
        problems += [f"{split}/{name}: {problem}" for name, problem in sorted(bad.items())]
        print(f"{split}: {len(good)}쌍")
        if good:
            print_statistics(good)
    print_notes({"either": counts["either"]})
    problems += [f"학습과 검증에 같은 이미지: {pair}" for pair in same_images(*contents.values())]
    if not any(contents.values()):
        problems.append(f"{data_dir}에 이미지-마스크 쌍이 하나도 없습니다")
    for problem in problems:
        print(f"  문제: {problem}")
    print(f"문제 {len(problems)}개" if problems else "문제 없음")
    return len(problems)


def measure_pair(image_path, mask_path, counts):
    """Size "WxH", share of foreground, and pixels of each object (at the size of training) of a pair of data/.

    Returns these three, and a hash of the image's pixels; ImageError if the pair cannot be trained on.
    """
    if image_path.suffix.lower() not in KEPT_AS_IS:
        raise ImageError("이미지 없음 (jpg, jpeg, png)")
    if mask_path.name != f"{image_path.stem}.png":
        raise ImageError(f"마스크 없음 ({image_path.stem}.png이어야 함)")
    image, labels = read_image(image_path), read_labels(mask_path)
    if fit_to_image(labels, image_path, image.shape[:2], counts) is not labels:
        raise ImageError("마스크가 돌리기 전의 픽셀에 맞음 (이미지의 EXIF 방향대로 돌려야 함)")
    pixels = np.bincount(labels.ravel())[1:]
    pixels = (pixels[pixels > 0] * min(1, MAX_SIDE / max(labels.shape)) ** 2).round().astype(int)
    return (f"{image.shape[1]}x{image.shape[0]}", (labels > 0).mean(), pixels), hashlib.sha256(image).digest()


def read_labels(path):
    """Read a mask of data/ as uint16 H x W: 0 is the background, every other value one object."""
    mask = decode_file(path, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    if mask.dtype != np.uint16 and (0 < mask.max() <= 127 or has_many_values(mask)):
        values = ", ".join(map(str, np.unique(mask)[:5]))
        raise ImageError(f"8비트 마스크의 값이 0과 255가 아님 ({values}{' 등' if mask.max() > 4 else ''}): "
                         "다른 폴더에 두고 --images, --masks로 다시 준비 (번호면 --numbered, 클래스면 --classes)")
    return mask if mask.dtype == np.uint16 else (mask > 127).astype(np.uint16)


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
    """The image, in a size that fits into a tile, with each object in a color of its own, the first in green."""
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
    """Write bytes, or what content(file) writes, to a temporary file and rename it: `path` is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        content(file) if callable(content) else file.write(content)
    for _ in range(20):  # on Windows, another program may hold `path` for a moment
        with contextlib.suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(0.1)
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

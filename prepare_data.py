"""Convert images and masks to data/, or check and preview data/.

    python prepare_data.py --images DIR --masks DIR      pair by file name; masks of one object or numbered objects
    python prepare_data.py --images DIR --coco FILE      COCO polygons or RLE (CVAT, Roboflow, Label Studio)
    python prepare_data.py --check --preview 12          report every problem in data/; draw a contact sheet of 12 pairs
    python prepare_data.py                               create empty folders and explain how to fill them

Output in data/: images/SPLIT/NAME.jpg|.jpeg|.png, the image's own bytes (other formats, pages and transparency become
PNG); masks/SPLIT/NAME.png, 8-bit, 0 or 255: one object, or 16-bit: numbered objects, 0 is background; classes.json for
two or more classes, {"1": name}: values are 1000 * class + number; split.json, the sources and the split.

Chapters:
    settings               constants, messages, what a run reports
    the run                main(), the command line, from two folders to data/
    finding pairs          files and pages, an image and the mask file or the COCO entry of its name
    reading masks          from the pixels of a mask file, or from COCO polygons and RLE, to a label map
    writing data/          both files of a pair, EXIF orientation, transparency, the split
    --check and --preview  every problem in data/, statistics, the contact sheet
    files                  images, locks, files that are never half-written, failures
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import random
import re
import shlex
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, ImageSequence
from pycocotools import mask as coco_mask
from tqdm import tqdm

# ---- settings ----

KEPT_AS_IS = (".jpg", ".jpeg", ".png")
IMAGE_SUFFIXES = (*KEPT_AS_IS, ".jfif", ".jpe", ".bmp", ".tif", ".tiff", ".webp")
SILENT_SUFFIXES = (".json", ".txt", ".xml", ".csv", ".md", ".yaml", ".pt")  # common beside images, not reported
VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # first three colors; written by PASCAL VOC, DAVIS and LabelMe
SPLITS = ("train", "val")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
SYSTEM_FILES = re.compile(r"/(\.|@eaDir/|Thumbs\.db$|desktop\.ini$)")  # hidden files, files by a NAS or Windows
UPLOAD_PREFIX = re.compile(r"(?=\d*[a-f])[0-9a-f]{8}-")  # Label Studio adds it to file names; not a date
AUGMENTED = re.compile(r"\.rf\.\w+(?=\.\w+$)")  # Roboflow's copies of NAME.jpg are NAME_jpg.rf.HASH.jpg
COLOR_AND_DEPTH = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH  # of the file, without alpha, upright
MAX_SIDE = 1024        # train_sam2_proper.py reduces larger images to this ...
MIN_FOREGROUND = 100   # ... and then skips objects with fewer pixels
MAX_CLASSES, MAX_NUMBER = 64, 999  # what 1000 * class + number has room for
Pair = namedtuple("Pair", "name image label")  # "SPLIT/NAME", path, path of the mask or CocoImage
CocoImage = namedtuple("CocoImage", "path size objects left_out")  # size: (H, W); objects: [(category, segmentation)]
Row = namedtuple("Row", "size share objects content")  # (H, W), share of foreground, {number: area}, hash of pixels
IMPORT = "YOLO, LabelMe, VOC 같은 다른 도구의 라벨: python extras/import_labels.py --dataset DIR"
NOTES = {  # messages by the key of `notes`; --preview shows the pairs of the first ones first
    "duplicate": "픽셀이 같은 이미지 {:,}장이 한쪽에 더 있습니다",
    "EXIF": "EXIF 방향이 있는 이미지 {:,}장은 마스크의 방향을 알 수 없어 그대로 씁니다. --preview로 확인하세요",
    "no_background": "마스크 {:,}장에 배경(0, 검은색)이 없습니다. 배경으로 쓸 값을 --void로 지정하세요",
    "empty": "객체가 없는 이미지 {:,}장 (검은 마스크, --allow-empty)",
    "cut": "가장자리에서 잘린 객체 {:,}개",
    "small": "학습에서 빠지는 작은 객체 (100픽셀 미만) {:,}개",
    "unread": "하위 폴더 {:,}개는 읽지 않고 둡니다 (--recursive는 모두 읽고, train/과 val/이 있으면 그 둘만)",
    "suffixes": "이름의 끝이 --mask-suffix나 --image-suffix와 다른 파일 {:,}개는 쓰지 않았습니다",
    "ungrouped": "--group에 맞지 않는 이미지 {:,}장은 한 장씩 따로 묶음이 됩니다",
    "void": "void 픽셀 {:,}개를 배경으로 바꿨습니다",
    "crowds": "iscrowd 영역 {:,}개를 뺐습니다 (객체로 쓰려면 --keep-crowd)",
    "kept_crowds": "iscrowd 영역 {:,}개를 객체로 썼습니다 (빼려면 --keep-crowd 없이, 또는 --category로 다른 범주만)",
    "boxes": "상자뿐인 객체 {:,}개를 뺐습니다 (마스크 만들기: python extras/label_with_text.py --boxes)",
    "orphans": "images에 없는 이미지의 객체 {:,}개를 뺐습니다",
    "unnamed": "categories에 없는 category_id의 객체 {:,}개: 번호를 클래스의 이름으로 씁니다",
    "prefixes": "Label Studio가 이름 앞에 붙인 글자를 이미지 {:,}장에서 떼고 찾았습니다",
    "white": "투명한 이미지 {:,}장은 흰 바탕에 합쳐 PNG로 썼습니다",
    "turned": "EXIF 방향대로 이미지 {:,}장의 마스크를 돌렸습니다 (돌리기 전의 픽셀에 그린 마스크)",
}
problems, notes = {}, defaultdict(list)  # what a run reports: {file name: problem}, {key: [(file name, count)]}

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream lacks it
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
Image.MAX_IMAGE_PIXELS = None  # OpenCV has a limit of its own
composed = partial(unicodedata.normalize, "NFC")  # macOS and its zip files decompose the syllables of file names


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


# ---- the run ----


def main():
    args = parse_args()
    if args.images:
        prepare(args)
    if args.check or args.preview:
        pairs, rows, classes = survey(args.data_dir, args.allow_empty)
    if args.check:
        print_check(rows, classes)
    if args.preview:
        preview(args.data_dir, pairs, args.preview)
    if not (args.images or args.check or args.preview):
        make_empty_folders(args.data_dir)
    sys.exit(1 if args.check and problems else 0)


def parse_args():
    parser = argparse.ArgumentParser(description="내 이미지와 마스크를 data/에 준비하고 확인합니다.", epilog=IMPORT)
    add, kind, group = (each.add_argument for each in (
        parser, parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()))
    add("--images", type=Path, help="이미지 폴더. 안에 train/과 val/(또는 valid/)이 있으면 그 분할을 지킴")
    add("--masks", type=Path, help="마스크 폴더: 이미지와 이름(확장자 제외)이 같은 파일")
    add("--coco", type=Path, help="마스크 대신 COCO annotations.json (다각형 또는 RLE)")
    add("--val-images", type=Path, help="검증 이미지 폴더: 나누지 않고 이 분할을 씀")
    add("--val-masks", type=Path, help="--val-images의 마스크 폴더")
    add("--val-coco", type=Path, help="--val-images의 COCO 파일")
    add("--mask-suffix", default="", metavar="TEXT", help="마스크 이름의 접미사: a.jpg의 마스크가 a_mask.png이면 _mask")
    add("--image-suffix", default="", metavar="TEXT", help="마스크 이름에는 없는 이미지 이름의 접미사")
    add("--recursive", action="store_true", help="하위 폴더도 읽음: a/b.jpg는 a__b.jpg가 됨")
    kind("--numbered", "--colors", "--colours", action="store_true",
         help="--masks의 8비트 값이나 색 하나가 객체 하나 (0과 검은색은 배경). 16비트부터는 언제나 번호")
    kind("--classes", action="store_true", help="--masks의 값이나 색이 클래스: 클래스의 이어진 영역 하나가 객체 하나")
    kind("--threshold", type=float, metavar="N", help="--masks에서 N보다 밝은 곳이 객체 하나 (기본: 127)")
    add("--void", type=int, nargs="+", action="append", default=[], metavar="N",
        help="--masks에서 배경으로 바꿀 값 N이나 색 R G B, 여러 번 가능 (VOC와 DAVIS 팔레트의 255는 저절로 바꿈)")
    add("--category", action="append", metavar="NAME", help="--coco에서 이 범주만 씀 (여러 번 가능)")
    add("--keep-crowd", action="store_true", help="--coco의 iscrowd 영역도 객체로 씀")
    add("--merge", action="store_true", help="이미지의 객체를 모두 8비트 마스크 하나로 합침")
    add("--allow-empty", action="store_true", help="객체가 없는 이미지도 검은 마스크로 넣음")
    add("--data-dir", type=Path, default=Path("data"), help="결과 폴더 (기본: %(default)s)")
    add("--val-ratio", type=float, default=0.2, help="검증에 쓸 비율 (기본: %(default)s)")
    add("--shuffle-seed", type=int, default=None, help="이 시드로 섞은 뒤 나눔 (기본: 이름순 그대로)")
    group("--group", metavar="REGEX", help="이름에서 이 정규식(또는 그 첫 괄호)에 맞는 곳이 같은 이미지는 한쪽에만 둠")
    group("--group-by-folder", dest="group", action="store_const", const="^([^/]+)/",
          help="--images 바로 아래의 폴더가 같은 이미지는 한쪽에만 둠")
    add("--check", action="store_true", help="data/를 검사: 문제가 있으면 종료 코드 1")
    add("--preview", type=int, metavar="N", help="문제가 있을 만한 쌍부터 N쌍을 한 장에 모아 data/preview.png로 저장")
    args = parser.parse_args()
    own, val = (args.images, args.masks, args.coco), (args.val_images, args.val_masks, args.val_coco)
    of_masks = (args.numbered, args.classes, args.void, args.threshold is not None, args.mask_suffix, args.image_suffix)
    for is_wrong, message in (
            (bool(own[0]) != sum(map(bool, own[1:])) or any(val) and [*map(bool, own)] != [*map(bool, val)],
             f"--images에는 --masks나 --coco를, --val-images에는 --val-masks나 --val-coco를 함께 주세요. {IMPORT}"),
            (any(of_masks) and not args.masks or (args.category or args.keep_crowd) and not args.coco,
             "--numbered, --classes, --threshold, --void, --mask-suffix, --image-suffix는 --masks와, "
             "--category와 --keep-crowd는 --coco와 함께 씁니다"),
            (any(len(void) not in (1, 3) for void in args.void), "--void는 값 하나나 색 R G B여야 합니다"),
            (not 0 <= args.val_ratio < 1, "--val-ratio는 0 이상 1 미만이어야 합니다"),
            (args.preview is not None and not 1 <= args.preview <= 1000, "--preview는 1에서 1,000까지입니다")):
        if is_wrong:
            parser.error(message)
    try:
        re.compile(args.group or "")
    except re.error as error:
        parser.error(f"--group: 정규식이 아닙니다 ({error})")
    return args


def prepare(args):
    """Pair the files, split the pairs, check and write them to data/; print a summary."""
    target, staging = args.data_dir, args.data_dir / ".part"
    lock(target / ".lock")
    atexit.register(shutil.rmtree, staging, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)
    pairs, sources, classes = collect_pairs(args)
    settings = {name: value for name, value in vars(args).items()
                if not isinstance(value, Path) and name not in ("check", "preview")}
    record, earlier, files = {"sources": sources, "complete": True, **settings}, {}, checksums(target)
    with contextlib.suppress(OSError, ValueError, TypeError):
        earlier = dict(json.loads((target / "split.json").read_text(encoding="utf-8")))
    if {**earlier, "split": 0} == {**record, "checksums": files, "split": 0}:
        print(f"이미 준비되어 있습니다: {target} (같은 원본, 같은 분할)")
        return
    own = earlier.get("checksums", files if earlier else {})  # after an unfinished run: all files
    if by_hand := sorted(files.items() - own.items()):
        fail(f"직접 넣거나 고친 파일은 덮어쓰지 않습니다: {target / by_hand[0][0]}. 다른 --data-dir을 쓰세요")

    names = write_pairs(split_pairs(pairs, args), classes, staging, args)
    print_report("제외")
    if not any(names.values()):
        fail(f"쓸 수 있는 이미지-마스크 쌍이 하나도 없습니다: {args.images}. {IMPORT}")
    if files:
        print(f"{target}에 있던 {sum(name.startswith('masks/') for name in files)}쌍을 새 쌍으로 바꿉니다.")
    replace_json(target / "split.json", {"complete": False})
    (target / "classes.json").unlink(missing_ok=True)
    for part in ("images", "masks"):
        shutil.rmtree(target / part, ignore_errors=True)
        (staging / part).rename(target / part)
    if classes:
        replace_json(target / "classes.json", {number: name for name, number in classes.items()})
    replace_json(target / "split.json", {**record, "split": names, "checksums": checksums(target)})
    print(f"완료: {target} - 학습 {len(names['train'])}쌍, 검증 {len(names['val'])}쌍, 제외 {len(problems)}개"
          + (f", 클래스 {', '.join(classes)}" if classes else "")
          + ("" if pairs[0].name.startswith("all/") else " (원본 폴더의 분할)"))


def collect_pairs(args):
    """The pairs of the command line: ([Pair], [[source file, CRC-32]], {class name: number in the masks})."""
    pairs, sources, categories = [], set(), {}
    sets = [("all", args.images, args.masks, args.coco)]
    if args.val_images:
        sets = [("train", *sets[0][1:]), ("val", args.val_images, args.val_masks, args.val_coco)]
    for split, images, masks, coco in sets:
        if args.data_dir.resolve() in (images.resolve(), *images.resolve().parents):
            fail(f"--images가 결과 폴더 {args.data_dir} 안에 있습니다. 원본은 다른 폴더에 두세요")
        found = pairs_from_coco(coco, images, split, args, categories) if coco else pairs_from_masks(
            masks, images, split, args)
        pairs += found
        sources.update((f"{split}/{path.name}", path) for path in ([coco] if coco else [pair.label for pair in found]))
        sources.update((pair.name, pair.image) for pair in found)
    if missing := [name for name in args.category or () if name not in categories]:
        fail(f"{args.coco}에 없는 범주입니다: {', '.join(missing)} (있는 것: {', '.join(categories)})")
    used = [name for name, is_used in categories.items() if is_used and not args.merge]
    if len(used) > MAX_CLASSES:
        fail(f"클래스가 {len(used)}개로 {MAX_CLASSES}개보다 많습니다. --category로 고르거나 --merge로 합치세요")
    classes = {name: number for number, name in enumerate(used, start=1)} if len(used) > 1 else {}
    return pairs, [[name, zlib.crc32(path.read_bytes())] for name, path in sorted(sources)], classes


def make_empty_folders(data_dir):
    folders = [data_dir / part / split for part in ("images", "masks") for split in SPLITS]
    new = [folder for folder in folders if not folder.is_dir()]
    for folder in new:
        folder.mkdir(parents=True)
    print(f"""{'폴더를 만들었습니다' if new else '폴더가 이미 있습니다'}: {', '.join(map(str, new or folders))}
직접 채우기: {data_dir}/images/train/이름.jpg (png)와 {data_dir}/masks/train/이름.png, val은 검증용 (전체의 20% 정도)
  마스크는 객체가 하나면 8비트 PNG (255가 객체, 0이 배경), 여럿이면 16비트 PNG (값이 객체의 번호, 0이 배경)
  확인: python prepare_data.py --check
자동으로 나누기: python prepare_data.py --images 이미지폴더 --masks 마스크폴더 (또는 --coco annotations.json)
{IMPORT}
Kvasir-SEG 받기: python download_dataset.py""")


# ---- finding pairs ----


def images_in(folder, split, recursive=False, subfolders=(), skip=None):
    """The image files of a folder: [("SPLIT/relative path", path)]; other files, except texts, become problems.

    split "all": the split is made later, unless the folder contains train/ and val/ (or valid/), which then define it.
    Folders inside are read if `recursive` or if named in `subfolders`; `skip`, a folder inside, is never read.
    """
    if not folder.is_dir():
        fail(f"폴더가 없습니다: {folder}")
    inside = [path.name for path in sorted(folder.iterdir())
              if path.is_dir() and path.resolve() != skip and not SYSTEM_FILES.search(f"/{path.name}/")]
    own = {name: SPLIT_FOLDERS[name.lower()] for name in inside if split == "all" and name.lower() in SPLIT_FOLDERS}
    own = own if set(own.values()) == set(SPLITS) else {}
    unread = [name for name in inside if name not in {*own, *subfolders} and (own or not recursive)]
    notes["unread"] += [(f"{name}/", 1) for name in unread]
    found = []
    for path in sorted(walk_files(folder, {skip, *((folder / name).resolve() for name in unread)})):
        name = path.relative_to(folder).as_posix()
        first, _, rest = name.partition("/")
        if path.suffix.lower() in SILENT_SUFFIXES:
            continue
        name = f"{own[first]}/{rest}" if first in own else f"{split}/{name}"
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            problems[name] = "읽지 않는 형식 (PNG나 JPEG로 바꾸세요)"
        elif own and first not in own:
            problems[name] = "train/과 val/ 밖에 있음"
        else:
            found.append((name, path))
    return found


def walk_files(folder, skipped):
    """The files of a folder and of those inside but `skipped`; OSError if one is unreadable (glob() would skip it)."""
    for path in folder.iterdir():
        if SYSTEM_FILES.search(f"/{path.name}/" if path.is_dir() else f"/{path.name}"):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in {*skipped, folder.resolve(), *folder.resolve().parents}:
            yield from walk_files(path, skipped)


def pages_of(path, folder):
    """[("", path)], or for a TIFF file of several pages ("_p001", its copy in `folder`), ("_p002", ...), ..."""
    pages = []
    with contextlib.suppress(Exception), path.open("rb") as source, Image.open(source, formats=["TIFF"]) as file:
        for number, page in enumerate(ImageSequence.Iterator(file) if file.n_frames > 1 else (), start=1):
            pages.append((f"_p{number:03}", folder / f"{path.stem}_p{number:03}.tif"))
            folder.mkdir(parents=True, exist_ok=True)
            tags = {tag: page.tag_v2[tag] for tag in (262, 305) if tag in page.tag_v2}  # see read_pixels()
            tags[270] = str(page.info.get("compression"))
            page.save(pages[-1][1], tiffinfo=tags, compression=None)
            if len(page.getbands()) > 1 and page.tag_v2[258][0] > 8:  # Pillow reduces such colors to 8 bits
                _, pixels = cv2.imdecodemulti(np.memmap(path), COLOR_AND_DEPTH, range=(number - 1, number))
                cv2.imencode(".tif", pixels[0])[1].tofile(pages[-1][1])
        return pages or [("", path)]
    return [("", path)]


def pairs_from_masks(masks, images, split, args):
    """Pair images and mask files by their stems, without suffixes: [Pair]."""
    suffix, is_same = composed(args.mask_suffix), images.resolve() == masks.resolve()
    if is_same and not suffix:
        fail(f"--images와 --masks가 같은 폴더입니다: {images}. 마스크를 다른 폴더로 옮기거나 --mask-suffix를 주세요")
    image_files = images_in(images, split, args.recursive, skip=masks.resolve())
    if is_same:
        mask_files = [file for file in image_files if composed(file[1].stem).endswith(suffix)]
        image_files = sorted({*image_files} - {*mask_files})
    else:
        mask_files = images_in(masks, split, args.recursive, skip=images.resolve())
    has_splits = not all(name.startswith("all/") for name, _ in mask_files)  # else one folder of masks for both
    pages = args.data_dir / ".part"
    by_image = by_stem(image_files, composed(args.image_suffix), has_splits, pages / "image pages")
    by_mask = by_stem(mask_files, suffix, has_splits, pages / "mask pages")
    if image_files and not suffix and not by_image.keys() & by_mask.keys():
        stems, mask_stems = ({composed(name.partition("/")[2]).removesuffix(path.suffix) for name, path in files}
                             for files in (image_files, mask_files))
        first = min(stems)
        for suffix in sorted(stem.removeprefix(first) for stem in mask_stems if stem.startswith(first)):
            if suffix and {stem + suffix for stem in stems} <= mask_stems:
                command = ["python", "prepare_data.py", *sys.argv[1:], f"--mask-suffix={suffix}"]
                fail(f"마스크와 이미지는 이름의 끝이 다릅니다. 다시 실행: {shlex.join(command)}")
    return pair_up(by_image, by_mask)


def by_stem(files, suffix="", has_splits=True, folder=None):
    """Group [(name, path)] by name without suffixes; with a `folder`, a page of a TIFF file is a file of its own."""
    found = defaultdict(list)
    for name, path in files:
        stem = composed(name if has_splits else name.partition("/")[2]).removesuffix(path.suffix)
        if not stem.endswith(suffix):
            notes["suffixes"].append((name, 1))
            continue
        for mark, page in pages_of(path, (folder / name).parent) if folder else [("", path)]:
            own_name = name.removesuffix(path.suffix) + mark + page.suffix
            found[stem.removesuffix(suffix) + mark].append((own_name, page))
    return found


def pair_up(images, labels):
    """Pair images and masks (or COCO images) of one key, {key: [(name, value)]}: [Pair]; the others become problems."""
    pairs = []
    for key in sorted({*images, *labels}):
        found, drawn = images.get(key, []), labels.get(key, [])
        if not drawn or not found:
            problems.update({name: "이미지 없음" if drawn else "마스크 없음" for name, _ in found or drawn})
        elif len(found) > 1 or len(drawn) > 1:
            same = [name.partition("/")[2] for name, _ in max(found, drawn, key=len)]
            problems[found[0][0]] = f"이름이 같은 파일이 여럿: {', '.join(same)}"
        else:
            pairs.append(Pair(*found[0], drawn[0][1]))
    return pairs


def pairs_from_coco(coco_path, images, split, args, categories):
    """Pair images with the entries of a COCO file: [Pair]; adds to `categories`: {name: whether it has objects}."""
    entries = read_annotations(coco_path, args, categories)
    if "boxes" in notes and not any(categories.values()):
        fail(f"{coco_path}: segmentation이 없습니다. 상자로 마스크 만들기: "
             f"python extras/label_with_text.py --images {images} --boxes {coco_path}")
    folders = {folder for entry in entries for folder in entry.path.split("/")[:-1]}
    files, places, labels = images_in(images, split, args.recursive, folders), defaultdict(set), defaultdict(list)
    for name, path in files:  # by its path in the folder, and without train/ or val/
        for place in (path.relative_to(images).as_posix(), name.partition("/")[2]):
            places[composed(place)].add(name)
    for entry in entries:
        parts = entry.path.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]  # CVAT writes folders before it
        found = next((places[end] for end in ends if end in places), ())
        if not found and (found := places.get(UPLOAD_PREFIX.sub("", parts[-1], count=1), ())):
            notes["prefixes"].append((entry.path, 1))
        name, *others = sorted(found) or [f"{split}/{entry.path}"]
        if others:
            problems[f"{split}/{entry.path}"] = f"이미지가 여럿: {', '.join((name, *others))}"
        else:
            labels[name].append((f"{split}/{entry.path}", entry))
    return pair_up({name: [(name, path)] for name, path in files}, labels)


def read_annotations(coco_path, args, categories):
    """Read a COCO file, or the given categories of it: [CocoImage]; adds to `categories`: {name: has it objects}.

    A region marked iscrowd, which may contain several objects, is left out if its category also has single objects;
    an image of which all objects are left out is no image without objects and is left out, too.
    """
    images = {}
    try:
        coco = json.loads(coco_path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(coco.get(part), list) for part in ("images", "annotations")):
            raise ValueError("images와 annotations 목록이 없음")
        for image in coco["images"]:
            path = composed(str(image.get("file_name") or image["coco_url"]).replace("\\", "/"))
            if image["id"] in images:
                fail(f"{coco_path}: {images[image['id']].path}, {path}의 번호가 같습니다. 번호를 다시 매기세요")
            images[image["id"]] = CocoImage(path, (image.get("height"), image.get("width")), [], [])
        known = {category["id"]: str(category["name"]) for category in coco.get("categories") or []}
        categories.update({name: categories.get(name, False) for name in known.values()})
        annotations = [(known.get(each.get("category_id"), str(each.get("category_id"))), each)
                       for each in coco["annotations"]]
        with_singles = {name for name, annotation in annotations if not annotation.get("iscrowd")}
        for name, annotation in annotations:
            if args.category and name not in args.category:
                continue
            image, is_crowd = images.get(annotation["image_id"]), annotation.get("iscrowd") and not args.merge
            kind = ("orphans" if not image else "boxes" if not annotation.get("segmentation")
                    else "objects" if not is_crowd
                    else "kept_crowds" if args.keep_crowd or name not in with_singles else "crowds")
            if kind != "objects":
                notes[kind].append((image.path if image else str(annotation["image_id"]), 1))
            if known and annotation.get("category_id") not in known:
                notes["unnamed"].append((f"category_id {name}", 1))
            if kind in ("objects", "kept_crowds"):
                image.objects.append((name, annotation["segmentation"]))
                categories[name] = True
            elif image:
                image.left_out.append(annotation)
    except FileNotFoundError:
        fail(f"파일이 없습니다: {coco_path}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{coco_path}: COCO 형식이 아닙니다 ({type(error).__name__}: {error}). CVAT와 Label Studio에서는 COCO, "
             f"VIA에서는 Export Annotations (COCO format)로 내보내세요. {IMPORT}")
    return [image for image in images.values() if image.objects or not image.left_out]


# ---- reading masks ----


def read_source_mask(path, args):
    """Read a mask written by any tool: bool H x W for one object, uint16 H x W for numbered objects (0: background).

    Grey masks of more than 8 bits (microscopy) and PNGs with the VOC palette hold object numbers. With --numbered, each
    value or color except black is an object; with --classes, each connected region of one. In other masks, pixels above
    127 in any channel are foreground, or those of 1 if the others are 0. Fails if this would lose objects.
    """
    values, is_voc = read_pixels(path, args)
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
    if is_label_map(brightness) or values.ndim == 3 and has_several_hues(values):
        fail(f"{path}: 127보다 밝은 곳이 객체 하나인 마스크가 아닙니다. 값이나 색마다 객체면 --numbered, 클래스면 "
             f"--classes, 밝기로 나누려면 --threshold {min(127, brightness.max() // 2)}, 무시할 값은 --void N")
    return brightness > 127


def read_pixels(path, args):
    """The pixels of a mask, H x W or H x W x 3 (BGR), without void; whether they are indices of the VOC palette.

    Transparent pixels become black; if the picture has a single color, its alpha channel is the mask.
    """
    values, rgba = decode_file(path, COLOR_AND_DEPTH), read_transparent(path)
    if rgba is not None:
        alpha = rgba[..., 3] > rgba[..., 3].max() // 2
        is_plain = (values == values[0, 0]).all() and not alpha.all()
        values = alpha.astype(np.uint8) * 255 if is_plain else np.where(alpha[..., None], np.atleast_3d(values), 0)
    colors = np.atleast_3d(values)
    values = colors[..., 0].copy() if (colors == colors[..., :1]).all() else values
    is_jpeg, indices, palette, tags = False, None, [], {}
    with contextlib.suppress(Exception), path.open("rb") as source, Image.open(source) as file:  # else no palette
        tags = dict(getattr(file, "tag_v2", {}))
        is_jpeg = file.format == "JPEG" or "jpeg" in (file.info.get("compression"), tags.get(270))
        if file.mode == "P" and args.threshold is None:
            indices, palette = np.array(ImageOps.exif_transpose(file)), file.getpalette()[:9]
    is_numbered, is_voc = args.numbered or args.classes, len(palette) > 3 and palette == VOC_PALETTE[:len(palette)]
    if is_jpeg and is_numbered:
        fail(f"{path}: JPEG은 번호와 색을 바꾸므로 --numbered와 --classes에 쓸 수 없습니다. PNG 원본을 쓰세요")
    is_inverted = palette[:3] == [255] * 3 or tags.get(262) == 0 and values.dtype == np.uint8
    is_boolean = str(tags.get(305)).startswith("tifffile")  # which stores boolean arrays inverted
    if is_inverted and not is_numbered and not is_boolean and args.threshold is None:
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
    if args.void or void.any():
        values = np.where(void if values.ndim == 2 else void[..., None], 0, values)
        notes["void"].append((path.name, int(void.sum())))
        if void.any() and not values.any():
            raise ImageError("void뿐인 마스크")
    return values, is_voc


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
        values = values.astype(np.int64) @ [1, 2**16, 2**32]
    if values.max() > 65535:
        found, indices = np.unique(values, return_inverse=True)
        values = indices.reshape(values.shape) + (found[0] != 0)
    if values.max() > 65535:
        raise ImageError("객체가 65,535개보다 많음")
    labels = values.astype(np.uint16)
    between = (cv2.erode(labels, np.ones((3, 3))) < labels) & (labels < cv2.dilate(labels, np.ones((3, 3))))
    found, elsewhere = np.unique(labels), np.unique(labels[~between])
    if len(found) > 8 and len(elsewhere) < len(found) / 2:  # most values occur only on gradients
        raise ImageError("번호가 아니라 밝기나 번진 색인 마스크 (밝기로 나누려면 --threshold N)")
    if not classes:
        return labels
    regions = np.zeros(labels.shape, np.int32)
    for value in found[found > 0]:
        _, own = cv2.connectedComponents((labels == value).astype(np.uint8))
        regions = np.where(own > 0, own + regions.max(), regions)
    return to_labels(regions)


def draw_objects(entry, shape, classes, merge):
    """Draw the objects of a CocoImage as uint16 labels H x W; smaller objects cover larger ones.

    Labels are 1, 2, ...; with `classes`, {name: number}, 1000 * class + 1, ... With `merge`, or for one object without
    classes, returns the union, bool H x W. shape: (H, W) of the image, upright. Invalid segmentations are skipped and
    reported; ImageError if none is left.
    """
    size, drawn, counts, problem = entry.size, [], Counter(), ""  # drawn: [(value, RLE)]
    if None not in size and [*size] not in ([*shape], [*shape[::-1]]):  # reversed: of an image before its EXIF turn
        raise ImageError(f"크기가 다름: 이미지 {shape[1]}x{shape[0]}, COCO 파일 {size[1]}x{size[0]}")
    height, width = shape if None in size else map(int, size)
    for category, segmentation in entry.objects:
        try:
            rle = to_rle(segmentation, height, width)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            problem = f"segmentation을 해석할 수 없음 ({error if type(error) is ValueError else type(error).__name__})"
            continue
        number = classes.get(category, 0)
        counts[number] += 1
        drawn.append((1000 * number + counts[number], rle))
    if problem and not drawn:
        raise ImageError(problem)
    if problem:
        tqdm.write(f"  제외: {entry.path}의 객체 {len(entry.objects) - len(drawn)}개 - {problem}")
    if drawn and (merge or len(drawn) == 1 and not classes):
        return coco_mask.decode(coco_mask.merge([rle for _, rle in drawn])) > 0
    if max(counts.values(), default=0) > (most := MAX_NUMBER if classes else 65535):
        fail(f"{entry.path}: 한 클래스의 객체가 {most}개보다 많습니다. --category로 고르거나 --merge로 합치세요")
    labels = np.zeros((height, width), np.uint16)
    for value, rle in sorted(drawn[::-1], key=lambda each: coco_mask.area(each[1]), reverse=True):
        labels[coco_mask.decode(rle) > 0] = value
    if hidden := len(drawn) - np.count_nonzero(np.unique(labels)):
        tqdm.write(f"  제외: {entry.path}의 객체 {hidden}개 - 비었거나 더 작은 객체에 모두 가려짐")
    return labels


def to_rle(segmentation, height, width):
    """Convert a COCO segmentation (polygons, plain or compressed RLE) to pycocotools' RLE; ValueError if invalid.

    It is checked here because pycocotools crashes on polygons with NaN and leaves pixels beyond the runs undefined.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        is_cut = isinstance(counts, str) and not re.fullmatch("[0-o]*[0-O]", counts)  # see rleFrString() of cocoapi
        if is_cut or segmentation["size"] != [height, width]:
            raise ValueError("RLE가 이미지 크기와 다름")
        rle = {"counts": counts} if isinstance(counts, str) else coco_mask.frPyObjects(segmentation, height, width)
        try:
            coco_mask.decode({**rle, "size": [height * width - 1, 1]})
        except ValueError:  # the runs are longer than this, as they should be
            return coco_mask.encode(coco_mask.decode({**rle, "size": [height, width]}))  # merge() fails on empty runs
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


def write_pairs(splits, classes, staging, args):
    """Write the usable ones of {split: [Pair]} to images/ and masks/ of `staging`; returns {split: [file name]}."""
    names, copies = {split: [] for split in splits}, defaultdict(list)
    for split, pairs in splits.items():
        for part in ("images", "masks"):
            (staging / part / split).mkdir(parents=True)
        stems = [pair.name.removesuffix(pair.image.suffix).partition("/")[2].replace("/", "__") for pair in pairs]
        counts = Counter(stems)
        for pair, stem in zip(tqdm(pairs, f"{split} 준비", disable=None), stems):
            try:
                if counts[stem] > 1:
                    raise ImageError(f"이름이 같아지는 파일이 여럿: {stem}")
                image, is_flattened = read_over_white(pair.image)
                mask = (draw_objects(pair.label, image.shape[:2], classes, args.merge) if args.coco
                        else read_source_mask(pair.label, args))
                mask = fit_to_image(mask, pair, image.shape[:2], args.allow_empty)
            except ImageError as problem:
                problems[pair.name] = problem
                continue
            if is_flattened:
                notes["white"].append((pair.name, 1))
            is_own = pair.image.suffix.lower() in KEPT_AS_IS and not is_flattened
            name = stem + (pair.image.suffix if is_own else ".png")
            if is_own:
                shutil.copyfile(pair.image, staging / "images" / split / name)
            else:
                cv2.imencode(".png", image[..., ::-1])[1].tofile(staging / "images" / split / name)
            mask = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
            cv2.imencode(".png", mask)[1].tofile(staging / "masks" / split / f"{stem}.png")
            names[split].append(name)
            copies[image.shape, hashlib.sha256(image).digest()].append(f"{split}/{name}")
    for same in copies.values():
        if len({name.split("/")[0] for name in same}) == 2:
            print(f"  주의: 학습과 검증에 같은 이미지가 있습니다 - {' = '.join(same)}")
    return names


def read_over_white(path):
    """Read an image like read_image, with transparency composited over white; also returns whether there was any."""
    image, rgba = read_image(path), read_transparent(path)
    if rgba is None or not rgba[..., 3].any():
        return image, False
    is_deep = decode_file(path, COLOR_AND_DEPTH).dtype != np.uint8
    colors, alpha = image if is_deep else rgba[..., :3], rgba[..., 3:] / 255
    return np.rint(colors * alpha + 255 * (1 - alpha)).astype(np.uint8), True


def read_transparent(path):
    """Read a file with transparent pixels as RGBA, uint8 H x W x 4, upright; None if it has none."""
    with contextlib.suppress(Exception), path.open("rb") as source, Image.open(source) as file:
        if file.mode[-1] in "Aa" or "transparency" in file.info:  # in every format that OpenCV reads
            rgba = np.array(ImageOps.exif_transpose(file).convert("RGBA"))
            return rgba if (rgba[..., 3] < 255).any() else None
    return None


def fit_to_image(mask, pair, shape, allow_empty):
    """The mask of a pair, fitted to its image of (H, W) `shape`; ImageError if it cannot be used.

    If the image has an EXIF orientation and the mask fits only its stored pixels, the mask is turned as well.
    """
    orientation = 1
    with contextlib.suppress(Exception), Image.open(pair.image) as file:  # damaged metadata raise various errors
        if "exif" in file.info or file.format == "TIFF":  # else getexif() would decode a PNG
            orientation = file.getexif().get(0x0112, 1)
    if orientation > 1:
        picture = Image.fromarray(mask)
        picture.getexif()[0x0112] = orientation
        turned = np.array(ImageOps.exif_transpose(picture))
        if turned.shape == shape:
            notes["EXIF" if mask.shape == shape else "turned"].append((pair.name, 1))
            mask = mask if mask.shape == shape else turned
    if mask.shape != shape:
        raise ImageError("크기가 다름: 이미지 {1}x{0}, 마스크 {3}x{2}".format(*shape, *mask.shape)
                         + " (90도 돌아간 마스크?)" * (mask.shape == shape[::-1]))
    if mask.min() == mask.max() > 0:
        raise ImageError("마스크가 이미지 전체를 덮음")
    if not mask.any():
        if not allow_empty:
            raise ImageError("마스크가 비어 있음 (객체가 없는 이미지로 넣으려면 --allow-empty)")
        notes["empty"].append((pair.name, 1))
    return mask


def split_pairs(pairs, args):
    """Split pairs, by the folders they come from or by groups: {split: [Pair]}; warns about what both splits share."""
    groups, by_name = {}, {pair.name: pair for pair in pairs}
    for name in by_name:
        relative = name.partition("/")[2]
        groups[name] = AUGMENTED.sub("", relative) if AUGMENTED.search(relative) else name
        if args.group and (found := re.search(args.group, relative)):
            groups[name] = found[min(1, found.re.groups)] or found[0]
        elif args.group:
            notes["ungrouped"].append((relative, 1))
    if pairs and len(notes["ungrouped"]) == len(pairs):
        fail(f"--group에 맞는 이름이 없습니다 (이름의 예: {notes['ungrouped'][0][0]})")
    if args.group and len({*groups.values()}) == 1:
        print("  주의: 묶음이 하나라 검증에 둘 이미지가 없습니다")
    splits = {split: [name for name in groups if name.startswith(f"{split}/")] for split in SPLITS}
    if not any(splits.values()):
        splits = split_names(groups, args.val_ratio, args.shuffle_seed)
        stems = [Path(name).stem for name in groups]
        train, val = ({Path(name).stem.rstrip("0123456789") for name in splits[split]} for split in SPLITS)
        is_numbered, videos, shared = all(stem[-1].isdecimal() for stem in stems), train | val, sorted(train & val)
        if is_numbered and shared and 2 <= len(videos) <= len(stems) / 10 and not args.group:
            print(f"  주의: 이름이 영상 {len(videos)}개의 프레임 같고, {shared[0]}의 프레임이 양쪽에 모두 있습니다. "
                  r"그렇다면 다시 실행할 때 --group '^(.*?)\d+\.\w+$'을 더하세요")
    train, val = ({groups[name] for name in splits[split]} for split in SPLITS)
    for group in sorted(train & val):
        print(f"  주의: 학습과 검증에 같은 묶음이 있습니다 - {group}")
    return {split: [by_name[name] for name in names] for split, names in splits.items()}


def split_names(groups, val_ratio, shuffle_seed):
    """Split {name: group} into {"train": [...], "val": [...]}: sorted by group, or shuffled, the first part to train.

    The cut is the one between two groups that is nearest to val_ratio.
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


def checksums(data_dir):
    """{path relative to data_dir: CRC-32} of classes.json and the files of images/ and masks/, without SYSTEM_FILES."""
    paths = [data_dir / "classes.json", *(data_dir / "images").rglob("*"), *(data_dir / "masks").rglob("*")]
    names = {path.relative_to(data_dir).as_posix(): path for path in paths if path.is_file()}
    return {name: zlib.crc32(path.read_bytes()) for name, path in names.items() if not SYSTEM_FILES.search(name)}


def print_report(word):
    """Print the line of NOTES for each key of `notes`, with totals and first file names, then each problem."""
    for key, found in notes.items():
        named = ", ".join(name.removeprefix("all/") for name, _ in found[:3]) + (" 등" if len(found) > 3 else "")
        if found:
            print(f"  {NOTES[key].format(sum(count for _, count in found))}: {named}")
    for name, problem in sorted(problems.items()):
        print(f"  {word}: {name.removeprefix('all/')} - {problem}")


# ---- --check and --preview ----


def survey(data_dir, allow_empty):
    """Measure every pair of data/: [Pair], {name: Row} of the usable ones, the classes, {number as text: name}."""
    problems.clear()
    notes.clear()
    pairs, rows, classes, copies = [], {}, {}, defaultdict(list)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # accepted images without an object are no problem
        allow_empty |= bool(json.loads((data_dir / "split.json").read_text(encoding="utf-8")).get("allow_empty"))
    try:
        classes = json.loads((data_dir / "classes.json").read_text(encoding="utf-8"))
        classes = {str(int(number)): str(name) for number, name in classes.items()}
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError):
        problems["classes.json"] = '{"1": "이름", ...} 꼴이 아님'
    for split in SPLITS:
        folders = [data_dir / part / split for part in ("images", "masks")]
        if split == "val" and not any(folder.is_dir() for folder in folders):
            print("val: 폴더가 없습니다 (학습은 검증 없이 합니다)")
            continue
        pairs += pair_up(*(by_stem(images_in(folder, split)) for folder in folders))
    for pair in tqdm(pairs, "검사", disable=None, leave=False):
        try:
            rows[pair.name] = row = measure_pair(pair, classes, allow_empty)
            copies[row.content].append(pair.name)
        except ImageError as problem:
            problems[pair.name] = problem
    for names in copies.values():
        if len({name.split("/")[0] for name in names}) == 2:
            problems[" = ".join(names)] = "학습과 검증에 같은 이미지"
        elif len(names) > 1:
            notes["duplicate"].append((" = ".join(names), len(names) - 1))
    return pairs, rows, classes


def measure_pair(pair, classes, allow_empty):
    """Measure a pair of data/ as a Row; raises ImageError if the pair cannot be used for training."""
    if pair.image.suffix.lower() not in KEPT_AS_IS or pair.label.name != f"{pair.image.stem}.png":
        raise ImageError(f"이미지는 jpg, jpeg, png, 마스크는 {pair.image.stem}.png여야 함")
    image, labels = read_image(pair.image), read_labels(pair.label)
    if fit_to_image(labels, pair, image.shape[:2], allow_empty) is not labels:
        raise ImageError("마스크가 돌리기 전의 픽셀에 맞음 (이미지의 EXIF 방향대로 돌려야 함)")
    areas = np.bincount(labels.ravel())
    numbers = np.flatnonzero(areas[1:]) + 1
    if wrong := [number for number in numbers if classes and (str(number // 1000) not in classes or not number % 1000)]:
        raise ImageError(f"classes.json에 없는 클래스의 값 {wrong[0]} (1000 * 클래스 + 번호여야 함)")
    pixels = (areas[numbers] * min(1, MAX_SIDE / max(labels.shape)) ** 2).round().astype(int)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    for key, count in (("cut", np.count_nonzero(border)), ("small", (pixels < MIN_FOREGROUND).sum()),
                       ("no_background", labels.all())):
        if count:
            notes[key].append((pair.name, int(count)))
    content = image.shape, hashlib.sha256(image).digest()
    return Row(labels.shape, (labels > 0).mean(), dict(zip(numbers.tolist(), pixels)), content)


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


def print_check(rows, classes):
    """Print sizes, shares of foreground and objects of both splits, then the notes and every problem by file."""
    for split in SPLITS:
        good = [row for name, row in rows.items() if name.startswith(f"{split}/")]
        filled, sizes = [row for row in good if row.objects], Counter(row.size for row in good).most_common()
        print(f"{split}: {len(good)}쌍")
        if not filled:
            continue
        pixels = np.concatenate([[*row.objects.values()] for row in filled])
        common = ", ".join(f"{width}x{height} ({count}장)" for (height, width), count in sizes[:3])
        shares, numbers, areas = (np.quantile(values, (0, 0.5, 1)) for values in (
            [row.share for row in filled], [len(row.objects) for row in filled], pixels))
        small = f"100픽셀 미만 {(pixels < 100).sum()}개, 1,000픽셀 미만 {(pixels < 1000).sum()}개"
        print(f"  크기 {len(sizes)}가지: {common}{' 등' if len(sizes) > 3 else ''}")
        print("  전경 비율: 최소 {:.1%}, 중앙값 {:.1%}, 최대 {:.1%}".format(*shares))
        print("  객체 {}개: 이미지마다 최소 {:g}, 중앙값 {:g}, 최대 {:g}개".format(len(pixels), *numbers))
        print("  객체 크기: 최소 {:.0f}픽셀, 중앙값 {:.0f}픽셀, 최대 {:.0f}픽셀, ".format(*areas)
              + f"{small} (긴 변이 {MAX_SIDE}보다 크면 줄인 뒤)")
        found = Counter(str(number // 1000) for row in filled for number in row.objects)
        if classes:
            print("  클래스: " + ", ".join(f"{name} {found[number]}개" for number, name in classes.items()))
    notes.pop("turned", None)  # a problem here
    print_report("문제")
    print(f"문제 {len(problems)}개" if problems else "문제 없음")


def preview(data_dir, pairs, count):
    """Write data/preview.png: `count` pairs, those with a problem or a note first, then others spread over data/."""
    if not pairs:
        fail(f"{data_dir}에 이미지-마스크 쌍이 없습니다. 먼저 데이터를 준비하세요")
    from matplotlib.figure import Figure  # takes as long to import as all the rest

    found = [("problem", joined) for joined in problems] + [(key, joined) for key in NOTES for joined, _ in notes[key]]
    reasons = {name: key for key, joined in reversed(found) for name in joined.split(" = ")}  # the worst of each pair
    order = ["problem", *NOTES, ""]
    ranked = sorted(pairs, key=lambda pair: order.index(reasons.get(pair.name, "")))
    first = min(count, sum(pair.name in reasons for pair in pairs))
    places = np.linspace(first, len(pairs) - 1, min(count, len(pairs)) - first).round().astype(int)
    chosen = [*ranked[:first], *(ranked[place] for place in places)]
    columns = min(len(chosen), 6)
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.7 * rows))
    figure.subplots_adjust(0.01, 0.01 / rows, 0.99, 1 - 0.12 / rows, wspace=0.03, hspace=0.16)
    for place, pair in enumerate(chosen, start=1):
        axes = figure.add_subplot(rows, columns, place, xticks=[], yticks=[], facecolor="grey")
        title = f"{place} {reasons.get(pair.name, '')}\n{pair.name[-36:]}".encode("ascii", "replace").decode()
        axes.set_title(title, fontsize=7)  # without Hangul, which matplotlib's own font lacks
        print(f"  {place}: {pair.name}")
        with contextlib.suppress(ImageError):  # an unreadable file is grey
            image, labels = read_image(pair.image), read_labels(pair.label)
            step = -(-max(labels.shape) // 500)
            image, labels = image[::step, ::step], labels[::step, ::step]
            axes.imshow(image)
            order_in_image = np.searchsorted(np.unique(labels[labels > 0]), labels)
            hues = np.ma.masked_array((1 / 3 + 0.618 * order_in_image) % 1, labels == 0)  # golden ratio: distant hues
            axes.imshow(hues, "hsv", vmin=0, vmax=1, alpha=0.4, interpolation="nearest")
    figure.savefig(data_dir / "preview.png", dpi=100)
    print(f"저장: {data_dir / 'preview.png'} ({len(chosen)}쌍)")


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


def replace_json(path, value):
    """Write a JSON file in UTF-8 beside `path` and rename it, so that `path` is never half written."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.with_suffix(".tmp").write_bytes(text.encode(errors="backslashreplace"))  # of file names that are not UTF-8
    path.with_suffix(".tmp").replace(path)


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

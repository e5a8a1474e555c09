"""Files for import_labels.py: finding images and labels, reading settings, polygons and masks as COCO's RLE.

Chapters:
    finding files      images, labels, splits, texts and JSON; files of other tools
    YOLO               data.yaml, the text file of an image, a line of it
    VOC                names and splits, palette PNGs
    masks              the size of an image, polygons and shapes, COCO's RLE
"""

import base64
import contextlib
import functools
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import yaml
from files import FORMATS, fail, read_image
from PIL import Image
from pycocotools import mask as coco_mask

SPLIT = re.compile(r"(?:stage1_)?(train|val|test)(?:ing|id|idation)?(?:20\d\d)?", re.IGNORECASE)
MASK_FOLDER = re.compile("Segmentation(Class|Object)|Visualization|^masks$")  # pictures of labels
VOID = 255  # in VOC: borders and regions without a class
VOC_NAMES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
             "pottedplant sheep sofa train tvmonitor").split()
UPLOAD_PREFIX = re.compile(r"^(?=\d*[a-f])[0-9a-f]{8}-")  # Label Studio adds it to file names
Image.MAX_IMAGE_PIXELS = None  # OpenCV has a limit of its own
OTHER_TOOLS = {  # what a file contains: what it is, and what to do
    "<annotations>": "CVAT XML입니다. CVAT에서 COCO 1.0으로 내보내세요",
    "<bndbox>": "상자만 있는 VOC XML입니다. COCO로 내보내 마스크를 만드세요: "
                "python extras/label_with_text.py --images 이미지폴더 --boxes annotations.json",
    "<annotation>": "XML로 쓴 라벨입니다. 쓴 도구에서 COCO로 내보내세요",
    '"(_via_settings|shape_attributes)"': "VIA JSON입니다. VIA에서 Export Annotations (COCO format)으로 내보내세요",
    '[a-z]labels"|"(completions|original_width)"':
        "Label Studio JSON입니다. 다각형은 COCO로, 브러시는 Brush labels to PNG로 내보내세요 "
        "(PNG는 python prepare_data.py --images 이미지폴더 --masks PNG폴더)"}


# ---- finding files ----


@functools.cache
def list_files(folder, *suffixes):
    """The files with these suffixes below a folder, sorted, without hidden ones and those that macOS adds to zips."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(parent, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


@functools.cache
def images_by_name(folder):
    """{file name or stem, in NFC form: paths of images}, without pictures of masks."""
    found = defaultdict(list)
    for path in list_files(folder, *FORMATS):
        for name in {path.name, path.stem} if not MASK_FOLDER.search(path.parent.name) else ():
            found[composed(name)].append(path)
    return found


def other_images(folder, used):
    """The images of the folder that are not in `used`, without pictures of masks."""
    return [path for path in list_files(folder, *FORMATS)
            if path not in used and not MASK_FOLDER.search(path.parent.name)]


def find_image(folder, label, name, stem=""):
    """The image that a label file calls `name`, at that path or elsewhere in the folder; ValueError if ambiguous.

    Of images with the same name, one with the same folders as `name`, of the same split or nearer to `label` is used.
    """
    name, known = composed(name).replace("\\", "/"), images_by_name(folder)
    exact, base = Path(os.path.normpath(label.parent / name)), name.rsplit("/", 1)[-1]
    is_image = exact.suffix.lower() in FORMATS and exact.is_file()
    if is_image and not Path(name).is_absolute():
        return exact
    keys = [key for each in (base, composed(unquote(base)))  # Label Studio writes %20 for a blank
            for key in (each, UPLOAD_PREFIX.sub("", each), Path(each).stem)]
    found = next(filter(None, map(known.get, [*keys, composed(stem)])), [exact] if is_image else [])
    ranks = {path: (path.as_posix().endswith(f"/{name}"), split_of(path, folder) == split_of(label / "", folder),
                    len(os.path.commonpath([path, label]))) for path in found}
    best = [path for path in found if ranks[path] == max(ranks.values())]
    if len(best) != 1:
        raise ValueError(f"{name}: " + ("같은 이름의 이미지가 여럿" if best else "이미지가 없음"))
    return best[0]


def split_of(path, folder):
    """The split that the folders of a path, or words in the name of a JSON file, name: "train", "val", "test" or ""."""
    parts = Path(relative(path, folder)).parts
    words = [*parts[:-1], *(re.split(r"\W|_", parts[-1]) if parts[-1].endswith(".json") else ())]
    return next((match[1].lower() for word in reversed(words) if (match := SPLIT.fullmatch(word))), "")


def relative(path, folder):
    return Path(os.path.relpath(path, folder)).as_posix()


def composed(name):
    """A name in Unicode's NFC form, in which a Korean syllable is one character; macOS decomposes it."""
    return unicodedata.normalize("NFC", name)


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark; ValueError if it is another file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: UTF-8 텍스트가 아님 (UTF-8로 다시 저장하세요)") from None


@functools.cache
def read_json(path):
    """The contents of a JSON file, without an image in it; ValueError if it is damaged."""
    try:
        data = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("JSON이 아님") from None
    return {key: data[key] for key in data if key != "imageData"} if isinstance(data, dict) else data


def refuse_other_tools(folder):
    """Fail with what to export instead if the folder has a file of a tool that import_labels.py does not read."""
    for path in list_files(folder, ".xml", ".json"):
        for pattern, advice in OTHER_TOOLS.items():
            if re.search(pattern, path.read_text(encoding="utf-8", errors="replace")):
                fail(f"{path}: {advice}")


# ---- YOLO ----


def yolo_files(folder, problems):
    """({class number: name} or None, {image path: (split, its text file or None)}); the latter is empty without labels.

    Adds images without a text file, and text files without an image, to `problems`.
    """
    path, config, names = yolo_config(folder)
    images = yolo_images(folder, path, config, problems)
    known = {composed(text.as_posix()): text for text in list_files(folder, ".txt")}
    texts = {image: yolo_text(image, known) for image in images}
    used = {*texts.values()} - {None}
    if not config and not used:
        return names, {}
    missing = [image for image in images if not texts[image]]
    orphans = [text for text in known.values() if "labels" in text.parts and text not in used]
    for paths, problem in (missing, "라벨 파일이 없어 객체가 없는 것으로 봄"), (orphans, "라벨에 맞는 이미지가 없음"):
        problems += [(f"{relative(paths[0], folder)} 등 {len(paths)}개", problem)] if paths else []
    return names, {image: (split, texts[image]) for image, split in images.items()}


def yolo_config(folder):
    """Path and contents of the YAML file with names nearest to the top, and {class number: name} or None."""
    for path in sorted(list_files(folder, ".yaml", ".yml"), key=lambda path: len(path.parts)):
        try:
            config = yaml.load(read_text(path), yaml.BaseLoader)  # only texts: a class may be named "no"
            if isinstance(config, dict) and "names" in config:
                if "kpt_shape" in config:
                    raise ValueError("자세(kpt_shape) 라벨에는 마스크가 없음. 분할(segmentation)로 내보내세요")
                if not isinstance(names := config["names"], (list, dict)):
                    raise ValueError("names가 목록이 아님")
                items = names.items() if isinstance(names, dict) else enumerate(names)
                return path, config, {int(number): str(name) for number, name in items}
        except (yaml.YAMLError, ValueError) as error:
            fail(f"{path}: 쓸 수 없는 YAML입니다 ({' '.join(str(error).split())[:200]})")
    for path in list_files(folder, ".txt", ".names"):
        if path.name in ("classes.txt", "obj.names"):
            return path, {}, dict(enumerate(map(str.strip, read_text(path).split("\n"))))
    return folder, {}, None


def yolo_images(folder, path, config, problems):
    """{image path: split}: the images that data.yaml lists, or all images of the folder, split by folder names."""
    if not config.get("train") and not config.get("val"):
        return {image: split_of(image, folder) for image in list_files(folder, *FORMATS)}
    found, bases = {}, (path.parent, folder, path.parent / str(config.get("path") or ""))
    for split in ("test", "val", "train"):
        entries = config.get(split) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            place = locate(entry, bases)
            if place and folder not in (place, *place.parents):
                print(f"주의: 데이터 폴더 밖에 있는 {split}: {place}")
            if place and place.is_file():  # a list of images
                lines = filter(None, map(str.strip, read_text(place).split("\n")))
                images = [locate(line, (place.parent, *bases)) for line in lines]
            else:
                images = list_files(place, *FORMATS) if place else [None]
            if None in images and split != "test":
                problems.append((f"{path.name}의 {split}: {entry}", f"없는 폴더나 파일 {images.count(None)}개"))
            if split == "train" and (both := [image for image in images if found.get(image) == "val"]):
                problems.append((f"{both[0].name} 등 val의 이미지 {len(both)}장", "train에도 있어 학습에만 씀"))
            found.update(dict.fromkeys(filter(None, images), split))
    return found


def yolo_text(image, known):
    """The text file of an image: in labels/ if the image is in images/, or beside the image; None without one."""
    before, found, after = composed(image.as_posix()).rpartition("/images/")
    places = [Path(f"{before}/labels/{after}"), image] if found else [image]
    texts = [composed(place.with_suffix(".txt").as_posix()) for place in places]
    return next((known.get(text) or Path(text) for text in texts if text in known or Path(text).is_file()), None)


def yolo_object(words, names, height, width):
    """The object of a line; ValueError if it is neither a polygon in the image nor a box, or of an unknown class."""
    number, *values = map(float, words)
    name = names.get(number) if names else f"class {number:g}"
    if not name:
        raise ValueError(f"이름이 없는 클래스 번호 {number:g}")
    if not all(-0.5 <= value <= 1.5 for value in values):
        raise ValueError("좌표가 0~1의 비율이 아님")
    if len(values) == 4:
        x, y, *sides = (values * np.array([width, height] * 2)).tolist()
        return {"category": name, "rank": number, "bbox": [x - sides[0] / 2, y - sides[1] / 2, *sides]}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"점이 셋 이상인 다각형이 아님 (좌표 {len(values)}개)")
    polygon = np.reshape(values, (-1, 2)) * (width, height)
    return {"category": name, "rank": number, "segmentation": encode_mask(draw_polygon(polygon, height, width))}


def locate(entry, bases):
    """The existing path that an entry of YOLO's data.yaml means, or None.

    Such paths are often those of another computer: leading folders are dropped as needed, down to two names.
    """
    names = [part for part in Path(str(entry).replace("\\", "/")).parts if part not in (".", "..")]
    choices = [base.joinpath(*names[start:]) for start in range(max(1, len(names) - 1)) for base in bases]
    return next((Path(os.path.normpath(path)) for path in [*choices, bases[-1] / str(entry)] if path.exists()), None)


# ---- VOC ----


@functools.cache
def voc_settings(root):
    """{index: class name} and {stem: split} of a VOC folder; the latter is empty if it does not list train or val."""
    if (root / "labelmap.txt").is_file():
        fail(f"{root}: CVAT의 Segmentation mask입니다. CVAT에서 COCO 1.0으로 내보내세요")
    names, splits = dict(enumerate(VOC_NAMES, 1)), {}
    if (root / "class_names.txt").is_file():
        names = dict(enumerate(map(str.strip, read_text(root / "class_names.txt").split("\n"))))
    else:
        print("class_names.txt가 없어 클래스 번호를 Pascal VOC의 이름으로 부릅니다")
    for split in ("test", "val", "train"):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        lines = composed(read_text(path)).splitlines() if path.is_file() else ()
        splits.update({name: split for line in lines if line.strip()
                       for name in (line.strip(' "\t'), re.sub(r"\s+-?[01]\s*$", "", line))})
    return names, splits if {"train", "val"} & {*splits.values()} else {}


def read_indices(path):
    """The indices of a palette or grey PNG, int32 H x W; ValueError for other files and masks of one object."""
    with Image.open(path) as file:
        if file.format != "PNG" or file.mode not in ("P", "L", "I", "I;16"):
            raise ValueError(f"팔레트 PNG가 아님 ({file.format}, {file.mode}; 색이면 prepare_data.py --masks --colors)")
        values = np.array(file).astype(np.int32)
    if file.mode == "L" and {*np.unique(values)} <= {0, VOID}:
        raise ValueError("0과 255뿐인 마스크 (python prepare_data.py --images --masks로 읽으세요)")
    return values


def number_regions(classes):
    """Number the connected regions of each class, from 256 on; 0 and VOID stay."""
    numbers, count = np.where(classes == VOID, VOID, 0), VOID
    for index in np.unique(classes[(classes > 0) & (classes != VOID)]):
        found, own = cv2.connectedComponents((classes == index).astype(np.uint8))
        numbers[own > 0] = own[own > 0] + count
        count += found - 1
    return numbers


# ---- masks ----


def header_size(path):
    """(H, W) of an image, turned upright as OpenCV does; ValueError if it cannot be read."""
    try:
        with Image.open(path) as file:
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # damaged metadata raise various errors
                exif.load(file.info.get("exif"))  # not getexif(), which also reads XMP
            if file.format != "TIFF":  # Pillow turns the size of some TIFF files
                return file.size if exif.get(0x0112, 1) >= 5 else file.size[::-1]
        return read_image(path).shape[:2]
    except (OSError, SyntaxError) as error:
        raise ValueError(f"읽을 수 없는 이미지 ({error})") from None


def draw_polygon(polygon, height, width):
    """Fill a polygon (N x 2; x, y in pixels), with the pixels of its edge, as YOLO and LabelMe do: uint8 H x W.

    Where it returns to a point, it is split there: YOLO joins the parts of an object by lines, which are not drawn.
    """
    path, places, parts = [], {}, []
    for point in [*map(tuple, polygon), tuple(polygon[0])]:
        if point in places:
            parts.append(path[places[point]:])
            for passed in path[places[point] + 1:]:
                del places[passed]
            del path[places[point] + 1:]
        else:
            places[point] = len(path)
            path.append(point)
    starts = {part[0] for part in parts if len(part) > 2}
    parts = [part for part in parts if len(part) > 2 or part[-1] not in starts]  # keep thin ends
    points = [np.floor(np.array(part) + 0.05).astype(np.int32) for part in parts]  # 0.05: rounded fractions
    return cv2.fillPoly(np.zeros((height, width), np.uint8), points, 1)


def draw_shape(shape, height, width):
    """Draw a shape of LabelMe: uint8 H x W; ValueError if it has no area or does not fit into the image."""
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], float).reshape(-1, 2)
    if not (np.abs(points) < 1e5).all():
        raise ValueError("좌표가 이미지의 픽셀이 아님")
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as file:
            pixels, (left, top) = np.array(file.convert("L")) > 0, points[0].astype(int)
        bottom, right = height - top - pixels.shape[0], width - left - pixels.shape[1]
        if min(top, left, bottom, right) < 0:
            raise ValueError("mask가 이미지 밖에 있음")
        return np.pad(pixels, ((top, bottom), (left, right))).astype(np.uint8)
    if kind == "circle" and len(points) == 2:  # its center and a point of its edge
        angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = np.rint(points[0] + np.hypot(*(points[1] - points[0])) * circle)
    elif kind == "rectangle" and len(points) == 2:
        points = np.array([points[0], (points[1, 0], points[0, 1]), points[1], (points[0, 0], points[1, 1])])
    elif kind not in ("polygon", "rectangle", "oriented_rectangle") or len(points) < 3:
        raise ValueError(f"넓이가 없는 도형: {kind}, 점 {len(points)}개")
    return draw_polygon(points, height, width)


def encode_mask(mask):
    """A mask, H x W, as COCO's RLE; ValueError if it is empty."""
    if not mask.any():
        raise ValueError("이미지 안에 픽셀이 없음")
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def unite(rles):
    """The union of masks as COCO's RLE."""
    united = coco_mask.merge(rles)
    return {**united, "counts": united["counts"].decode("ascii")}

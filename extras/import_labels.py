"""Import data labeled with another tool into data/: its folder becomes COCO JSON, which prepare_data.py reads.

    python extras/import_labels.py --dataset DIR                         find the format, convert, run prepare_data.py
    python extras/import_labels.py --dataset DIR -- --merge              options after -- go to prepare_data.py
    python extras/import_labels.py --dataset DIR --output labels.json    keep the COCO JSON too

A reader takes a folder and returns {image path: (split, (H, W) or None, objects)}, empty for other layouts. A split is
"train", "val", "test" or "". An object is a COCO annotation without ids, with the name of its class as "category" and,
where the format has an order of classes, its place there as "rank"; one without "segmentation" is a box. A reader adds
what it skips to `problems`, [(name, problem)].

Chapters:
    the run            main(), the command line, the layout, COCO JSON for prepare_data.py
    YOLO               data.yaml and one text file per image
    LabelMe            one JSON file per image
    VOC and DSB2018    masks as image files
    COCO               the objects of existing COCO files
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from os.path import commonpath
from pathlib import Path

import numpy as np
from files import FORMATS, fail, run, write_json
from label_files import (
    VOID,
    composed,
    draw_shape,
    encode_mask,
    find_image,
    header_size,
    images_by_name,
    list_files,
    number_regions,
    other_images,
    read_indices,
    read_json,
    read_text,
    refuse_other_tools,
    relative,
    split_of,
    unite,
    voc_settings,
    yolo_files,
    yolo_object,
)
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

# ---- the run ----


def main():
    args = parse_args()
    folder = args.dataset.resolve()
    if not folder.is_dir():
        fail(f"폴더가 아닙니다: {folder} (압축 파일은 먼저 푸세요)")
    layout, labels, problems = recognise(folder, args.layout)
    splits = report(folder, layout, labels, problems)
    labels = {image: labels[image] for images in splits.values() for image in images}
    with tempfile.TemporaryDirectory(prefix="import_labels-") as temporary:
        flags = stage(Path(temporary), splits, labels, args.output)
        if not any("segmentation" in each for _, _, objects in labels.values() for each in objects):
            fail(f"{args.dataset}: 상자만 있습니다. --output boxes.json으로 남겨 마스크를 만드세요: python extras/"
                 f"label_with_text.py --images {next(iter(labels)).parent} --boxes {args.output or 'boxes.json'}")
        sys.stdout.flush()  # keeps the output of both processes in order
        command = [sys.executable, str(ROOT / "prepare_data.py"), *flags, *args.options]
        sys.exit(subprocess.run(command).returncode)


def parse_args():
    parser = argparse.ArgumentParser(description="다른 도구의 라벨 폴더를 알아보고 COCO로 바꾸어 data/에 준비합니다.")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR",
                        help="라벨링 도구가 내보낸 그대로의 폴더 (필수)")
    parser.add_argument("--layout", choices=READERS, help="라벨의 형식 (기본: 폴더를 보고 알아냄)")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="COCO JSON도 남김 (검증은 이름 뒤에 _val)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="-- 뒤의 옵션은 prepare_data.py에 넘김")
    args = parser.parse_args()
    if args.output and args.dataset.resolve() in args.output.resolve().parents:
        parser.error(f"--output {args.output}: --dataset 폴더 밖에 쓰세요")
    return args


def recognise(folder, layout=None):
    """Read a folder with each reader, or with that of `layout`: (layout, labels, problems) of the one with objects."""
    found, problems = {}, defaultdict(list)
    for name in [layout] if layout else READERS:
        labels = READERS[name](folder, problems[name])
        if any(objects for _, _, objects in labels.values()):
            found[name] = labels
    if len(found) > 1:
        fail(f"{folder}에 라벨이 여러 형식으로 있습니다. 하나를 고르세요: --layout {' 또는 --layout '.join(found)}")
    for name, labels in found.items():
        return name, labels, problems[name]
    refuse_other_tools(folder)
    for name in READERS:
        for file, problem in problems[name][:3]:
            print(f"  {name} 형식으로 읽으면: {file} - {problem}")
    fail(f"{folder}에서 라벨을 찾지 못했습니다 (읽는 형식: {', '.join(READERS)}). 다른 형식이면 COCO로 내보내세요. "
         "마스크 이미지면: python prepare_data.py --images 이미지폴더 --masks 마스크폴더")


def report(folder, layout, labels, problems):
    """Print what was found and what is not used; returns {split: image paths}, with "train", "val" or both."""
    splits = defaultdict(list)
    for image, (split, _, _) in sorted(labels.items()):
        splits[split].append(image)
    counts = Counter(each["category"] for _, _, objects in labels.values() for each in objects)
    shares = ", ".join(f"{split or '나뉘지 않음'} {len(images)}" for split, images in sorted(splits.items()))
    print(f"{folder}: {layout} 형식, 이미지 {len(labels)}장 ({shares}), 객체 {counts.total()}개 "
          f"({', '.join(f'{name} {count}' for name, count in counts.most_common(9))}{' 등' * (len(counts) > 9)})")
    for name, problem in problems:
        print(f"  제외: {name} - {problem}")
    unread = other_images(folder, labels)
    for what, images in (("라벨이 없거나 읽지 못한", unread), ("test의", splits.pop("test", []))):
        if images:
            print(f"  {what} 이미지 {len(images)}장은 쓰지 않습니다: {', '.join(path.name for path in images[:3])}"
                  f"{' 등' if len(images) > 3 else ''}")
    if splits.keys() > {""}:
        print(f"  train과 val 밖의 이미지 {len(splits[''])}장은 학습에 씁니다: {splits[''][0].name} 등")
    splits["train"] += splits.pop("", [])
    if not (splits := {split: images for split, images in splits.items() if images}):
        fail(f"{folder}: 학습에 쓸 이미지가 없습니다 (이름이 test인 폴더와 JSON은 쓰지 않습니다)")
    return splits


def stage(folder, splits, labels, output):
    """Link the images of each split into `folder` and write its COCO JSON; returns the flags for prepare_data.py."""
    ranks = {each["category"]: each.pop("rank", 0) for _, _, objects in labels.values() for each in objects}
    categories = sorted(ranks, key=lambda name: (ranks[name], name))
    flags = ["--recursive"]
    for split, images in splits.items():
        top, annotations, entries = commonpath([image.parent for image in images]), [], []
        for number, image in enumerate(images, 1):
            place, (_, size, objects) = folder / split / relative(image, top), labels[image]
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(image.resolve())
            except OSError:  # Windows needs special rights for links
                shutil.copyfile(image, place)
            sides = dict(zip(("height", "width"), size or ()))
            entries.append({"id": number, "file_name": relative(image, top), **sides})
            annotations += [{"iscrowd": 0, **each, "id": identity, "image_id": number,
                             "category_id": categories.index(each["category"]) + 1}
                            for identity, each in enumerate(objects, len(annotations) + 1)]
        coco = {"images": entries, "annotations": annotations,
                "categories": [{"id": number, "name": name} for number, name in enumerate(categories, 1)]}
        suffix, prefix = ("_val", "--val-") if split == "val" and len(splits) > 1 else ("", "--")
        write_json(folder / f"{split}.json", coco)
        flags += [f"{prefix}images", str(folder / split), f"{prefix}coco", str(folder / f"{split}.json")]
        if output:
            write_json(output.with_stem(output.stem + suffix), coco)
            print(f"저장: {output.with_stem(output.stem + suffix)} (이미지 폴더: {top})")
    return flags


# ---- YOLO ----


def read_yolo(folder, problems):
    """Read Ultralytics labels: a line is a class number and a polygon, x and y as fractions of width and height.

    An image without a text file has no objects, as in Ultralytics.
    """
    labels, lengths = {}, set()
    try:
        names, files = yolo_files(folder, problems)
    except ValueError as error:  # the names or a list of images are no text
        problems.append((folder.name, error))
        return {}
    for image, (split, text) in tqdm(files.items(), "YOLO", disable=None):
        objects, before = [], len(problems)
        try:
            size, lines = header_size(image), read_text(text).splitlines() if text else ()
        except ValueError as error:
            problems.append((relative(image, folder), error))
            continue
        for number, line in enumerate(lines, 1):
            try:
                objects += [yolo_object(line.split(), names, *size)] if line.strip() else []
                lengths.add(len(line.split()))
            except ValueError as error:
                problems.append((f"{relative(text, folder)} {number}번째 줄", error))
        if objects or len(problems) == before:
            labels[image] = split, size, objects
    if lengths - {0} == {9}:
        print("주의: YOLO의 모든 다각형이 사각형입니다. 회전 상자(OBB) 라벨이면 상자의 모양을 학습하게 됩니다")
    return labels


# ---- LabelMe ----


def read_labelme(folder, problems):
    """Read LabelMe's JSON files. Shapes of one label and group_id are one object; imageData is ignored."""
    labels, sources = {}, {}
    for path in tqdm(list_files(folder, ".json"), "LabelMe", disable=None):
        name, masks, before = relative(path, folder), defaultdict(list), len(problems)
        try:
            data = read_json(path)
            if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
                raise ValueError("LabelMe JSON이 아님")
            image = find_image(folder, path, str(data.get("imagePath")), path.stem)
            own, others = composed(path.stem), images_by_name(folder)
            if own in others and own != composed(image.stem):
                raise ValueError(f"라벨할 이미지가 {image.name}인지 {others[own][0].name}인지 알 수 없음")
            if image in sources:
                raise ValueError(f"imagePath의 {image.name}에 다른 라벨이 있음: {sources[image]}")
            size = data.get("imageHeight"), data.get("imageWidth")
            size = size if all(type(side) is int and 0 < side < 2**15 for side in size) else header_size(image)
            for number, shape in enumerate(data["shapes"], 1):
                try:
                    group = number if shape.get("group_id") is None else f"group {shape['group_id']}"
                    rle = encode_mask(draw_shape(shape, *size))
                    masks[str(shape["label"]), group].append(rle)
                except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                    problems.append((f"{name} {number}번째 도형", f"읽을 수 없음 ({error})"))
            objects = [{"category": label, "segmentation": unite(parts)} for (label, _), parts in masks.items()]
            sources[image] = name
            if objects or len(problems) == before:
                labels[image] = split_of(path.parent / image.name, folder), size, objects
        except ValueError as error:
            problems.append((name, error))
    return labels


# ---- VOC and DSB2018 ----


def read_voc(folder, problems):
    """Read palette PNGs: classes in SegmentationClass, objects in SegmentationObject, else regions of a class.

    ImageSets/Segmentation gives the split, class_names.txt the names (LabelMe's labelme2voc.py; else VOC's own).
    """
    masks, labels, left_out = defaultdict(dict), {}, defaultdict(Counter)
    for path in list_files(folder, *FORMATS):
        if kind := re.fullmatch("Segmentation(Class|Object)(PNG)?", path.parent.name):
            masks[path.parent.parent, composed(path.stem)][kind[1]] = path
    for (root, stem), files in tqdm(masks.items(), "VOC", disable=None):
        name = relative(path := files.get("Object") or files["Class"], folder)
        try:
            (names, splits), objects = voc_settings(root), []
            if splits and stem not in splits:
                raise ValueError("ImageSets/Segmentation의 목록에 없음")
            image = find_image(folder, path, f"../JPEGImages/{stem}.jpg")
            classes, numbers = (read_indices(files[kind]) if kind in files else None for kind in ("Class", "Object"))
            classes = np.where(numbers == VOID, VOID, numbers > 0) if classes is None else classes
            numbers = number_regions(classes) if numbers is None else numbers
            is_void, has_both = (classes == VOID) | (numbers == VOID), (classes > 0) & (numbers > 0)
            left_out["void"][name] += np.count_nonzero(is_void)
            left_out["객체나 클래스가 0인"][name] += np.count_nonzero((classes != numbers) & ~is_void & ~has_both)
            for number in np.unique(numbers[has_both & ~is_void]):
                mask = (numbers == number) & has_both & ~is_void
                index = np.bincount(classes[mask]).argmax()
                category = names.get(index, f"class {index}") if "Class" in files else "object"
                objects.append({"category": category, "rank": int(index), "segmentation": encode_mask(mask)})
            if not objects and (classes | numbers).any():
                raise ValueError("쓸 객체가 없음 (void뿐이거나 클래스와 객체가 맞지 않음)")
            labels[image] = splits.get(stem) or split_of(path, folder), numbers.shape, objects
        except (ValueError, OSError) as error:
            problems.append((name, error))
    for what, counts in left_out.items():
        if counts.total():
            print(f"{what} 픽셀 {counts.total():,}개를 배경으로 바꿨습니다: {', '.join(list(+counts)[:3])} 등")
    return labels


def read_folders(folder, problems):
    """Read one folder per image, as in the Data Science Bowl 2018: NAME/images/NAME.png and NAME/masks/*.png."""
    images, masks, labels = defaultdict(list), defaultdict(list), {}
    for path in list_files(folder, *FORMATS):
        if path.parent.name in ("images", "masks"):
            (images if path.parent.name == "images" else masks)[path.parent.parent].append(path)
    if 2 * sum(len(images[root]) == 1 for root in masks) <= len(masks):
        return {}  # one images/ and one masks/ for all images
    for root in tqdm(sorted({*images, *masks}), "DSB2018", disable=None):
        split, objects, before = split_of(root / "", folder), [], len(problems)
        try:
            if len(images[root]) != 1 or not (masks[root] or split == "test"):
                raise ValueError(f"images에 이미지가 {len(images[root])}장, masks에 {len(masks[root])}장")
            size = header_size(images[root][0])
        except ValueError as error:
            problems.append((relative(root, folder), error))
            continue
        for path in masks[root]:
            try:
                with Image.open(path) as file:
                    pixels = np.array(file.convert("L"))
                    is_transparent = file.mode[-1] in "Aa" or "transparency" in file.info
                    if is_transparent and np.array(file.convert("RGBA"))[..., 3].min() < 255:
                        raise ValueError("투명한 곳이 있는 마스크 (흑백 PNG로 바꾸세요)")
                if pixels.shape != size or len(np.unique(pixels)) > 2:
                    raise ValueError("이미지와 크기가 다르거나 값이 둘이 아닌 마스크")
                objects.append({"category": "object", "segmentation": encode_mask(pixels > 0)})
            except (ValueError, OSError) as error:
                problems.append((relative(path, folder), error))
        if objects or len(problems) == before:
            labels[images[root][0]] = split, size, objects
    return labels


# ---- COCO ----


def read_coco(folder, problems):
    """Read COCO files; their objects stay as they are, because prepare_data.py checks them."""
    labels, sources = {}, {}
    for path in list_files(folder, ".json"):
        name = relative(path, folder)
        try:
            coco, objects = read_json(path), defaultdict(list)
            names = {category["id"]: (str(category["name"]), rank)
                     for rank, category in enumerate(coco.get("categories") or ())}
            for each in coco["annotations"]:
                kept = {key: each[key] for key in ("segmentation", "bbox", "iscrowd") if each.get(key)}
                category, rank = names.get(number := each.get("category_id"), (f"category_id {number}", len(names)))
                objects[each["image_id"]].append({**kept, "category": category, "rank": rank})
            if len({entry["id"] for entry in coco["images"]}) < len(coco["images"]):
                raise ValueError("두 이미지의 id가 같음")
            for entry in coco["images"]:
                own, size = objects.pop(entry["id"], []), (entry.get("height"), entry.get("width"))
                try:
                    image = find_image(folder, path, str(entry["file_name"]))
                except ValueError as error:
                    problems.append((name, error))
                    continue
                if image in labels:
                    fail(f"{image}: 라벨이 둘입니다 ({sources[image]}, {name}). 쓸 COCO JSON만 남기세요")
                split, sources[image] = split_of(path, folder) or split_of(image, folder), name
                labels[image] = split, size if any(size) else None, own
            if objects:
                problems.append((name, f"images에 없는 이미지의 객체 {sum(map(len, objects.values()))}개"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append((name, f"COCO JSON이 아님 ({type(error).__name__}: {error})"))
    return labels


READERS = {"yolo": read_yolo, "labelme": read_labelme, "voc": read_voc, "folders": read_folders, "coco": read_coco}

if __name__ == "__main__":
    run(main, "이미지를 나누어 실행해 보세요")

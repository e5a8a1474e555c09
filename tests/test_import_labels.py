"""extras/import_labels.py, run as a user runs it, on files written by the labeling tools or their libraries.

| tests | subject |
|---|---|
| YOLO | zips of Roboflow, paths in data.yaml, invalid lines, boxes |
| LabelMe | shapes drawn as LabelMe draws them, files that cannot be placed |
| VOC, DSB2018 | palettes, regions of a class, one folder per image |
| COCO | folders of Roboflow and CVAT, two files for one image |
| all | other formats, names, a training on imported labels |
"""

import base64
import json
import unicodedata
import zlib

import cv2
import import_labels
import numpy as np
import pytest
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, draw_pair, run, write_image
from files import read_image
from label_files import draw_polygon, header_size, other_images
from PIL import Image
from pycocotools import mask as coco_mask

SCRIPT = "extras/import_labels.py"
HEIGHT, WIDTH = 48, 64


def circle():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    return cv2.circle(mask, (15, 15), 9, 1, -1) > 0


def ellipse():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    return cv2.ellipse(mask, (45, 30), (12, 8), 30, 0, 360, 1, -1) > 0


def two_parts():
    mask = ellipse()
    mask[2:9, 50:60] = True
    return mask


# Ultralytics 8.4.190: convert_segment_masks_to_yolo_seg() of circle() as class 0, and convert_coco(use_segments=True)
# of cv2's contours of two_parts() as class 1, which joins the parts
YOLO_CIRCLE = (
    "0 0.234375 0.125 0.21875 0.145833 0.171875 0.145833 0.109375 0.229167 0.109375 0.291667 0.09375 0.3125 "
    "0.109375 0.333333 0.109375 0.395833 0.171875 0.479167 0.21875 0.479167 0.234375 0.5 0.25 0.479167 0.296875 "
    "0.479167 0.359375 0.395833 0.359375 0.333333 0.375 0.3125 0.359375 0.291667 0.359375 0.229167 0.296875 "
    "0.145833 0.25 0.145833\n")
YOLO_TWO_PARTS = (
    "1 0.703125 0.4375 0.59375 0.4375 0.578125 0.458333 0.5625 0.458333 0.546875 0.479167 0.546875 0.5 0.53125 "
    "0.520833 0.53125 0.604167 0.546875 0.625 0.546875 0.645833 0.5625 0.666667 0.5625 0.6875 0.609375 0.75 0.625 "
    "0.75 0.640625 0.770833 0.65625 0.770833 0.671875 0.791667 0.6875 0.791667 0.703125 0.8125 0.8125 0.8125 "
    "0.828125 0.791667 0.84375 0.791667 0.875 0.75 0.875 0.645833 0.859375 0.625 0.859375 0.604167 0.84375 "
    "0.583333 0.84375 0.5625 0.796875 0.5 0.78125 0.5 0.75 0.458333 0.71875 0.458333 0.703125 0.4375 0.78125 "
    "0.166667 0.921875 0.166667 0.921875 0.0416667 0.78125 0.0416667 0.78125 0.166667\n")
# supervision 0.31.2: DetectionDataset.as_yolo(), which writes five decimals
SUPERVISION_CIRCLE = (
    "0 0.23438 0.12500 0.21875 0.14583 0.17188 0.14583 0.10938 0.22917 0.10938 0.29167 0.09375 0.31250 0.10938 "
    "0.33333 0.10938 0.39583 0.17188 0.47917 0.21875 0.47917 0.23438 0.50000 0.25000 0.47917 0.29688 0.47917 "
    "0.35938 0.39583 0.35938 0.33333 0.37500 0.31250 0.35938 0.29167 0.35938 0.22917 0.29688 0.14583 0.25000 "
    "0.14583")

# LabelMe 6.3.1: LabelFile.save(); below, what its shapes_to_label() draws for these shapes
LABELME = {"version": "6.3.1", "flags": {}, "shapes": [
    {"label": "폴립", "points": [[5.5, 6.25], [20.0, 4.0], [24.75, 18.5], [9.0, 22.0]], "group_id": None,
     "description": "", "shape_type": "polygon", "flags": {}, "mask": None},
    {"label": "tool", "points": [[30.0, 5.0], [40.0, 12.0]], "group_id": 3, "description": "",
     "shape_type": "rectangle", "flags": {}, "mask": None},
    {"label": "tool", "points": [[50.0, 30.0], [50.0, 37.0]], "group_id": 3, "description": "", "shape_type": "circle",
     "flags": {}, "mask": None},
    {"label": "폴립", "points": [[10.0, 30.0], [18.0, 36.0]], "group_id": None, "description": "", "shape_type": "mask",
     "flags": {}, "mask": "iVBORw0KGgoAAAANSUhEUgAAAAkAAAAHCAAAAAD/8Di8AAAAIklEQVR4nF3IsQ0AMAzDMDr//5xO9RBNhPiFgJ"
                          "2+ga1SnR5XlgIKIK+W2QAAAABJRU5ErkJggg=="},
    {"label": "폴립", "points": [[40.0, 20.0]], "group_id": None, "description": "", "shape_type": "point", "flags": {},
     "mask": None}], "imagePath": "p.png", "imageData": None, "imageHeight": 48, "imageWidth": 64}
LABELME_DRAWS = ["f72^14L4L4L3MO1000O10O10000O1000O12M5L3M4Loi1",
                 "U]18X10000000000000000000g3MZL4M2N2O0O2O00000001N101N2N3LV8", "ob05[100MfN0Z130000QT2"]

# imgviz 2.1.0, which labelme2voc.py uses: the files that io.lblsave() writes of VOC_CLASS, and of the same without void
# as object numbers; compressed here because of VOC's palette
VOC_CLASS = np.select([circle(), two_parts()], [1, 2]).astype(np.uint8)
VOC_CLASS[44:46, 3:30] = 255
VOC_CLASS_FILE = (
    "eNolkz+IVlcQxQ+7iH9AIVVAIQw2qQSNKRKLOMqqWZF1FQmYaqxMkcIuNpGDGERIIZhENFFHBLESVBBNkRzBYkkaWQSxcjqxyBYW"
    "UUkR7zffhfvu3Ddz7pzf5b1ziwv71q/buA7A+vkv5w6P1cfcumZ2PH/5+cctwCwWDxzZM7bsyV7Y0RijWkNDiENJgU6KvekcO82u"
    "GAl3yOGCBHfK6aKGeHKGt3oiYyuHoGu9qybSofNJ+fSd925Swj5xZNx9OqehOhrDgASMSMLABI1MMoACgigiwAKDLNIc6TAhBXOm"
    "08QUw1GOEEoIZzlDLNHgCTd60g1KyKikAl7woBc9oIKCKsrc093kKTdXukxKKdzLPeQlD1e5QqrBPUw3AxuDTcJps+6tbq92MBpP"
    "YJqNjccm5NREe1LbUjsbhiaQzczGZpNzaq69qu2qHQ+jE/i+C/Z1sG+EU9PNoMZQkwwAM6TBEpkwYxotmckwlCESlQhjGSNZSQtk"
    "wApZsGAGrZjFCFQgClWIYAWjWEUzT3NLz3QzpclSmQrzMo/0Sg9TmSJVKQvPcCvPcgtlyEpZivAKj/Iqj1CFolSlyyt39o4P/9T8"
    "3K4jJ3/75+mhDRw/yeLv/704+uenf5/Zte/pg+f///HtWnv96KftF2aW8Nkna7Dt0Qxv5eqltd/c++jEq5er7u6cPX917viHuz9+"
    "vHJxxwfXn73ZcOnfd8s3D779/qtFLDzB/ger317TzLtDSwdvbD6Phxe+2LZ8sY59vf3XK2f53b3ZvzZ9vvLD8v2zwwnm9yzM3d4d"
    "p98D9b2LmQ==")
VOC_OBJECT_FILE = (
    "eNolkjFol1cUxS9EaYyk0KVKcbgUBxdr5hLoiSSaQBqjuDnkTm6FDg52aHrMIoKrbQgN3EHoVqgdW/HYKZnagqPIXS0mg7i29f3v"
    "/8H93nvfvefd83u8B5sbV+fnPpkzs/m11eUbY8aIhdmZ8f3+0cOLZjO2uX5zZWzZwZ7YqzFGtYaGJg4lZQQp9qZz7DS7YiQAEwwy"
    "yQAKhKghnpyBVk9kbOUQdC26aiIdOkzKp//Qu0kJ+8SRATCN6VK9GsPN0sxpSXNjGp1MMszKLGhFC2MZgyzSYQlzWcocTNDFFANW"
    "sJCVLMACQyzRDWlwIgk3pcmppMJQhiCKCFOZgirKgQRcSMGhhFxKKYACQighoIJCqsE9TDcDG4NNwmmz7q1ur3YwGk9gmo2Nxybk"
    "1ER7UttSOxuGJpDNzMZmk3Nqrr2q7aodD6MT+L4L9nWwb4RT082gxlCTDAB3SzdPyzR3ptOTmQy3cou0SgtnOSNZSQ/LMC/LMg9m"
    "0ItZjLAKi7Iqi2AFo1hFd6TDE5lwV7o8lalwlCMSlQhXuSJVKQ9kwAtZ8FCGvJSlCFQgClWIUIWiVKW941+ujId/d2156ebdH49e"
    "PP9QPjuz+c//373buPXx/ctfLa4fPb20Z7e/WP/myQU7qf0lOzh10Q7mtu1L7P/La1tnDv6b4+KD55893lj9bevV4ezT7TsHv//5"
    "w+fffnr8687M1zsfbP5xrhbvnXx3/a+f/v5olS8Pd8++vvV2Yf/N7umHxyfOv372ZHt4sLWVjeWfL8fOe+pNh4o=")

# Datumaro 1.13.12, with which CVAT exports: coco_instances; it marks masks as iscrowd
DATUMARO = {"categories": [{"id": 1, "name": "polyp", "supercategory": ""},
                           {"id": 2, "name": "tool", "supercategory": ""}],
            "images": [{"id": 2, "width": 64, "height": 48, "file_name": "p.jpg", "license": 0, "flickr_url": "",
                        "coco_url": "", "date_captured": 0}],
            "annotations": [
                {"id": 1, "image_id": 2, "category_id": 1, "segmentation": {"size": [48, 64], "counts": [
                    303, 1, 43, 9, 38, 11, 36, 13, 34, 15, 32, 17, 31, 17, 31, 17, 31, 17, 30, 19, 30, 17, 31, 17, 31,
                    17, 31, 17, 32, 15, 34, 13, 36, 11, 38, 9, 43, 1, 1904]}, "area": 253.0,
                 "bbox": [6.0, 6.0, 19.0, 19.0], "iscrowd": 1},
                {"id": 2, "image_id": 2, "category_id": 2, "segmentation": {"size": [48, 64], "counts": [
                    1657, 5, 41, 9, 38, 12, 36, 13, 34, 15, 33, 16, 32, 16, 32, 17, 31, 17, 31, 18, 30, 18, 30, 19, 30,
                    18, 30, 18, 30, 18, 31, 17, 32, 16, 32, 16, 33, 15, 34, 13, 36, 12, 38, 9, 41, 6, 347]},
                 "area": 333.0, "bbox": [34.0, 21.0, 23.0, 19.0], "iscrowd": 1}]}


def put(folder, *names, seed=0):
    """Write images of WIDTH x HEIGHT with different noise."""
    for number, name in enumerate(names):
        noise = np.random.default_rng(1000 * seed + number).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        write_image(folder / name, noise)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def convert(folder, *flags, code=0):
    """Run the script on folder/set, in `folder`; returns its output."""
    return run(SCRIPT, "--dataset", folder / "set", *flags, cwd=folder, code=code)


def mask_in(folder, name):
    return cv2.imread(str(folder / "data/masks" / name), cv2.IMREAD_UNCHANGED)


def names_of(folder):
    return {split: sorted(path.name for path in (folder / "data/images" / split).iterdir())
            for split in ("train", "val")}


def read(layout, folder):
    """The result of a reader and its problems as lines."""
    problems = []
    labels = import_labels.READERS[layout](folder, problems)
    return labels, [f"{name} - {problem}" for name, problem in problems]


def decoded(objects):
    return [(each["category"], coco_mask.decode(each["segmentation"]) > 0) for each in objects]


def make_yolo(folder, label=YOLO_CIRCLE + YOLO_TWO_PARTS):
    put(folder, "train/images/p.png", "train/images/n.png", "valid/images/p.png", "test/images/t.png")
    for name in ("train/labels/p.txt", "valid/labels/p.txt", "test/labels/t.txt"):
        write(folder, name, label)
    write(folder, "train/labels/n.txt", "")
    write(folder, "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
                               "names: ['polyp', 'a tool']\n\nroboflow:\n  license: CC BY 4.0\n")


def test_a_yolo_export_of_roboflow_keeps_its_split_and_class_order(tmp_path):
    make_yolo(tmp_path / "set")
    done = convert(tmp_path, "--", "--allow-empty")
    assert "yolo 형식, 이미지 4장 (test 1, train 2, val 1), 객체 6개 (polyp 3, a tool 3)" in done.stdout
    assert "test의 이미지 1장은 쓰지 않습니다: t.png" in done.stdout
    assert names_of(tmp_path) == {"train": ["n.png", "p.png"], "val": ["p.png"]}
    assert json.loads((tmp_path / "data/classes.json").read_text()) == {"1": "polyp", "2": "a tool"}  # its own order
    assert (mask_in(tmp_path, "val/p.png") == np.select([circle(), two_parts()], [1001, 2001])).all()
    assert not mask_in(tmp_path, "train/n.png").any()
    assert "이미 준비되어 있습니다" in convert(tmp_path, "--", "--allow-empty").stdout


def test_the_flag_output_writes_coco_files_whose_image_paths_exist(tmp_path):
    make_yolo(tmp_path / "set")
    done = convert(tmp_path, "--output", "labels.json", "--", "--merge")
    assert (mask_in(tmp_path, "val/p.png") == np.where(circle() | two_parts(), 255, 0)).all()
    for name, split in (("labels.json", "train"), ("labels_val.json", "valid")):
        assert f"저장: {name} (이미지 폴더: {tmp_path / 'set' / split / 'images'})" in done.stdout
        coco = json.loads((tmp_path / name).read_text())
        assert all((tmp_path / "set" / split / "images" / image["file_name"]).is_file() for image in coco["images"])
        assert [category["name"] for category in coco["categories"]] == ["polyp", "a tool"]
    assert_fails_in_one_line(run(SCRIPT, "--dataset", "set", "--output", "a.json", "--layout", "coco", cwd=tmp_path,
                                 code=1), "라벨을 찾지 못했습니다")


@pytest.mark.parametrize(("settings", "expected"), [
    ("path: ../datasets/set\ntrain: images/train\nval: images/val\nnames:\n  0: a\n  1: b\n", "train val"),
    ("path: /content/drive/set\r\ntrain: images/train\r\nval: images/val\r\nnames: {0: a, 1: b}\r\n", "train val"),
    ("\ufefftrain: C:\\\\data\\\\set\\\\images\\\\train\nval: /x/set/images/val\nnames: [a, b]\n", "train val"),
    ("train: [images/train]\nval: list.txt\nnames: {'0': a, '1': b}\n", "train val"),
    ("train: images\nval: images\nnames: [a, b]\n", "train train"),
    ("names: [a, b]\n", "train val"),
])
def test_images_are_found_although_data_yaml_has_paths_of_another_computer(tmp_path, settings, expected):
    put(tmp_path, "images/train/p.png", "images/val/q.png", seed=1)
    for name in ("labels/train/p.txt", "labels/val/q.txt"):
        write(tmp_path, name, YOLO_CIRCLE.replace("\n", "\r\n\r\n"))
    (tmp_path / "data.yaml").write_bytes(settings.encode())
    write(tmp_path, "list.txt", "./images/val/q.png\n\ndata/images/val/none.png\n")
    labels, problems = read("yolo", tmp_path)
    found = {path.name: split for path, (split, _, _) in labels.items()}
    assert found == dict(zip(("p.png", "q.png"), expected.split()))
    for _, size, objects in labels.values():
        (category, mask), = decoded(objects)
        assert size == (HEIGHT, WIDTH) and category == "a" and (mask == circle()).all()
    assert len(problems) == ("list" in settings or expected == "train train")


def test_invalid_yolo_lines_are_named_and_the_others_kept(tmp_path):
    lines = {"0 0.1 0.2": "좌표 2개", "0 0.1 0.1 0.5 0.1 0.5": "좌표 5개", "7 0 0 1 0 1 1": "클래스 번호 7",
             "0 10 10 50 10 50 40": "비율이 아님", "0 a b c d e f": "could not convert",
             "0 nan 0 1 0 1 1": "비율이 아님", "0 1.1 1.1 1.4 1.1 1.4 1.4": "픽셀이 없음"}
    put(tmp_path, "images/p.png", "images/broken.png", "images/none.png", "images/twin.jpg")
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    write(tmp_path, "labels/p.txt", "\ufeff" + SUPERVISION_CIRCLE + "\n" + "\n".join(lines) + "\n0 0.5 0.5 0.2 0.4\n")
    write(tmp_path, "labels/orphan.txt", YOLO_CIRCLE)
    (tmp_path / "labels/twin.txt").write_bytes(b"\xff\xfe0 \xb0")
    write(tmp_path, "labels/broken.txt", YOLO_CIRCLE)
    write(tmp_path, "classes.txt", "polyp\r\n")
    labels, problems = read("yolo", tmp_path)
    _, _, (polygon, box) = labels[tmp_path / "images/p.png"]
    assert (decoded([polygon])[0][1] == circle()).all()
    assert box == {"category": "polyp", "rank": 0, "bbox": pytest.approx([25.6, 14.4, 12.8, 19.2])}
    for number, words in enumerate(lines.values(), 2):
        own, = (problem for problem in problems if problem.startswith(f"labels/p.txt {number}번째 줄 - "))
        assert words in own
    assert labels[tmp_path / "images/none.png"] == ("", (HEIGHT, WIDTH), [])
    for words in ("images/broken.png - 읽을 수 없는 이미지", "images/twin.jpg - twin.txt: UTF-8",
                  "images/none.png 등 1개", "labels/orphan.txt 등 1개 - 라벨에 맞는 이미지가 없음"):
        assert any(problem.startswith(words) for problem in problems), problems
    assert len(problems) == len(lines) + 4


def test_class_names_in_yaml_stay_text_and_folders_match_in_both_unicode_forms(tmp_path):
    folder = unicodedata.normalize("NFD", "훈련")
    put(tmp_path, f"{folder}/images/p.png")
    write(tmp_path, "훈련/labels/p.txt", YOLO_CIRCLE + YOLO_TWO_PARTS)
    write(tmp_path, "data.yaml", "names: [no, 1.10]\n")
    labels, problems = read("yolo", tmp_path)
    assert [each["category"] for each in labels[tmp_path / folder / "images/p.png"][2]] == ["no", "1.10"]
    assert not problems


def test_an_image_whose_objects_cannot_be_read_is_not_treated_as_empty(tmp_path):
    put(tmp_path / "set", "images/p1/good.png", "images/p1/empty.png", "images/p2/bad.png", "images/p2/box.png")
    for name, text in (("p1/good", YOLO_CIRCLE), ("p1/empty", ""), ("p2/bad", "0 5 5 9 9 5 9\n"),
                       ("p2/box", "0 .5 .5 .2 .2\n")):
        write(tmp_path / "set", f"labels/{name}.txt", text)
    done = convert(tmp_path, "--", "--allow-empty", "--val-ratio", "0")
    assert names_of(tmp_path) == {"train": ["p1__empty.png", "p1__good.png"], "val": []}
    assert "labels/p2/bad.txt 1번째 줄" in done.stdout and "p2/box.png - 마스크 없음" in done.stdout


@pytest.mark.parametrize(("name", "content", "words"), [
    ("data.yaml", "names: [a]\nkpt_shape: [17, 3]\ntrain: images\n", ["kpt_shape", "segmentation"]),
    ("data.yaml", "names: classes.txt\ntrain: images\n", ["data.yaml", "names가 목록이 아님"]),
    ("data.yaml", "names: [a\n", ["data.yaml", "YAML"]),
    ("annotations.xml", '<?xml version="1.0"?>\n<annotations>\n<version>1.1</version></annotations>', ["COCO 1.0"]),
    ("Annotations/p.xml", "<annotation><object><bndbox></bndbox></object></annotation>", ["--boxes", "상자만"]),
    ("export.json", [{"id": 1, "annotations": [{"result": [{"type": "brushlabels", "original_width": 5}]}]}],
     ["COCO", "Brush labels to PNG"]),
    ("via.json", {"_via_settings": {}, "_via_img_metadata": {}}, ["Export Annotations (COCO format)"]),
    ("notes.json", {"a": 1}, ["라벨을 찾지 못했습니다", "COCO로 내보내세요", "--masks"]),
])
def test_unsupported_exports_are_refused_with_what_to_export_instead(tmp_path, name, content, words):
    put(tmp_path, "images/p.png")
    write(tmp_path, name, content)
    with pytest.raises(SystemExit) as failure:
        import_labels.recognise(tmp_path)
    line, = str(failure.value).splitlines()
    assert all(word in line for word in words)


def test_labels_that_are_only_boxes_are_refused_with_the_command_of_label_with_text(tmp_path):
    put(tmp_path / "set", "images/p.png")
    write(tmp_path / "set", "labels/p.txt", "0 0.5 0.5 0.25 0.5\n")
    assert_fails_in_one_line(convert(tmp_path, code=1), "상자만", "--output boxes.json", "label_with_text.py --images")
    done = convert(tmp_path, "--output", "boxes.json", code=1)
    assert_fails_in_one_line(done, f"--images {tmp_path / 'set/images'} --boxes boxes.json")
    annotation, = json.loads((tmp_path / "boxes.json").read_text())["annotations"]
    assert annotation["bbox"] == [24, 12, 16, 24] and "segmentation" not in annotation


def test_a_folder_with_two_formats_needs_the_flag_layout(tmp_path):
    put(tmp_path / "set", "images/p.png")
    write(tmp_path / "set", "labels/p.txt", YOLO_CIRCLE)
    write(tmp_path / "set", "images/p.json", LABELME)
    assert_fails_in_one_line(convert(tmp_path, code=1), "--layout yolo 또는 --layout labelme")
    assert import_labels.recognise(tmp_path / "set", "labelme")[0] == "labelme"


def test_labelme_shapes_become_the_masks_that_labelme_draws(tmp_path):
    name = unicodedata.normalize("NFD", "폴립") + ".png"
    put(tmp_path / "set", name)
    write(tmp_path / "set", "폴립.json", {**LABELME, "imagePath": "..\\사진\\폴립.png", "imageData": "AAAA"})
    done = convert(tmp_path, "--", "--val-ratio", "0")
    assert "폴립.json 5번째 도형 - 읽을 수 없음 (넓이가 없는 도형: point" in done.stdout
    assert json.loads((tmp_path / "data/classes.json").read_text(encoding="utf-8")) == {"1": "tool", "2": "폴립"}
    mask = mask_in(tmp_path, f"train/{name}")
    assert set(np.unique(mask)) == {0, 1001, 2001, 2002}
    for value, counts in zip((2001, 1001, 2002), LABELME_DRAWS):
        theirs = coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": counts})
        border = cv2.dilate(theirs, np.ones((3, 3))) > cv2.erode(theirs, np.ones((3, 3)))
        differs = (mask == value) != (theirs > 0)
        assert not differs[~border].any()
        assert value == 2001 or not differs.any()  # only the polygon has corners between pixels


def test_labelme_files_without_a_clear_image_and_unusable_shapes_are_named(tmp_path):
    put(tmp_path, "a.png", "b.png", "sub/c.png", "same/c.png", "images/only.jpg", "points.png")
    write(tmp_path, "a.json", {**LABELME, "imagePath": "/home/kim/photos/a.png", "imageHeight": None})
    write(tmp_path, "b.json", {**LABELME, "imagePath": "a.png"})
    write(tmp_path, "copy of a.json", {**LABELME, "imagePath": "a.png"})
    write(tmp_path, "c.json", {**LABELME, "imagePath": "c.png"})
    write(tmp_path, "gone.json", {**LABELME, "imagePath": "gone.png"})
    write(tmp_path, "points.json", {**LABELME, "imagePath": "points.png", "shapes": LABELME["shapes"][-1:]})
    write(tmp_path, "broken.json", "{")
    write(tmp_path, "coco.json", {"images": []})
    write(tmp_path, "train/only.json", {**LABELME, "imagePath": "only.png", "shapes": LABELME["shapes"][:1] + [
        {"label": "far", "points": [[90, 90], [99, 90], [99, 99]]}, {"label": "x", "points": [["a", 1]]}, 7,
        {**LABELME["shapes"][3], "points": [[-1, 2], [7, 8]]}]})
    labels, problems = read("labelme", tmp_path)
    assert {path.name: (split, size) for path, (split, size, _) in labels.items()} == {
        "a.png": ("", (HEIGHT, WIDTH)), "only.jpg": ("train", (HEIGHT, WIDTH))}
    for words in ("b.json - 라벨할 이미지가 a.png인지 b.png인지",
                  "copy of a.json - imagePath의 a.png에 다른 라벨이 있음: a.json",
                  "c.json - c.png: 같은 이름의 이미지가 여럿", "gone.json - gone.png: 이미지가 없음", "broken.json - ",
                  "coco.json - LabelMe JSON이 아님", "train/only.json 2번째 도형", "train/only.json 3번째 도형",
                  "train/only.json 4번째 도형", "train/only.json 5번째 도형 - 읽을 수 없음 (mask가 이미지 밖에 있음)"):
        assert sum(problem.startswith(words) for problem in problems) == 1, (words, problems)
    assert len(problems) == 10 + 2  # and the points of a.json and points.json


@pytest.mark.parametrize("name", ["classes.txt", "list.txt"])
def test_lists_that_are_not_utf8_are_named(tmp_path, name, capsys):
    put(tmp_path, "images/p.png")
    write(tmp_path, "labels/p.txt", YOLO_CIRCLE)
    if name == "list.txt":
        write(tmp_path, "data.yaml", "train: list.txt\nnames: [a, b]\n")
    (tmp_path / name).write_bytes("폴립\n".encode("cp949"))
    with pytest.raises(SystemExit, match="라벨을 찾지 못했습니다"):
        import_labels.recognise(tmp_path)
    assert f"{name}: UTF-8 텍스트가 아님" in capsys.readouterr().out


def test_folders_called_segmentation_percent_signs_and_large_images_are_read(tmp_path):
    put(tmp_path, "Polyp Segmentation/p q.png", "Polyp Segmentation/without label.png")
    write(tmp_path, "json/1.json", {**LABELME, "imagePath": "p%20q.png"})
    labels, _ = read("labelme", tmp_path)
    assert [path.name for path in labels] == ["p q.png"]
    Image.new("1", (15000, 13000)).save(tmp_path / "large.png")  # Pillow refuses 179 megapixels, unless told not to
    assert header_size(tmp_path / "large.png") == (13000, 15000)
    (tmp_path / "large.png").unlink()
    assert [path.name for path in other_images(tmp_path, labels)] == ["without label.png"]


def test_labelme_uses_the_image_in_the_folder_not_the_original_elsewhere(tmp_path):
    put(tmp_path, "original/a.png", "set/a.png")
    write(tmp_path, "set/a.json", {**LABELME, "imagePath": str(tmp_path / "original/a.png")})
    assert list(read("labelme", tmp_path / "set")[0]) == [tmp_path / "set/a.png"]


def test_voc_files_of_labelme2voc_keep_their_split_and_classes(tmp_path):
    for folder, text in (("SegmentationClass", VOC_CLASS_FILE), ("SegmentationObject", VOC_OBJECT_FILE)):
        content = zlib.decompress(base64.b64decode(text))
        for name in ("p.png", "q.png", "r.png", "lost.png"):
            path = tmp_path / "set" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    put(tmp_path / "set", "JPEGImages/p.jpg", "JPEGImages/q.jpg", "JPEGImages/r.jpg", "JPEGImages/s.jpg")
    write(tmp_path / "set", "class_names.txt", "_background_\npolyp\ntool")
    write(tmp_path / "set", "ImageSets/Segmentation/train.txt", "p\nlost\n")
    write(tmp_path / "set", "ImageSets/Segmentation/val.txt", "q\n")
    done = convert(tmp_path)
    for words in ("void 픽셀 108개를 배경으로", "SegmentationObject/lost.png - ../JPEGImages/lost.jpg: 이미지가 없음",
                  "SegmentationObject/r.png - ImageSets/Segmentation의 목록에 없음",
                  "이미지 2장은 쓰지 않습니다: r.jpg, s.jpg"):
        assert words in done.stdout
    assert names_of(tmp_path) == {"train": ["p.jpg"], "val": ["q.jpg"]}
    assert json.loads((tmp_path / "data/classes.json").read_text()) == {"1": "polyp", "2": "tool"}
    assert (mask_in(tmp_path, "train/p.png") == np.select([circle(), two_parts()], [1001, 2001])).all()


def test_voc_class_masks_without_object_masks_give_one_object_per_region(tmp_path):
    put(tmp_path, "JPEGImages/p.jpg", "JPEGImages/q.jpg", "JPEGImages/r.jpg")
    masks = tmp_path / "SegmentationClass"
    masks.mkdir()
    Image.fromarray(VOC_CLASS).save(masks / "p.png")
    Image.fromarray(circle().astype(np.uint8) * 255).save(masks / "q.png")
    Image.fromarray(VOC_CLASS).convert("RGB").save(masks / "r.jpg")
    labels, problems = read("voc", tmp_path)
    found = decoded(labels[tmp_path / "JPEGImages/p.jpg"][2])
    assert [name for name, _ in found] == ["aeroplane", "bicycle", "bicycle"]
    upper = two_parts() & ~ellipse()
    assert (found[0][1] == circle()).all() and (found[1][1] == upper).all() and (found[2][1] == ellipse()).all()
    assert len(problems) == 2 and "q.png - 0과 255뿐" in problems[0] and "r.jpg - 팔레트 PNG가 아님" in problems[1]
    write(tmp_path, "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\n")
    assert_fails_in_one_line(run(SCRIPT, "--dataset", tmp_path, cwd=tmp_path, code=1), "CVAT", "COCO 1.0")


def test_voc_names_with_blanks_and_dots_find_their_own_image(tmp_path):
    put(tmp_path, "JPEGImages/my p.jpg", "JPEGImages/a.jpg")
    (tmp_path / "SegmentationClass").mkdir()
    for name in ("my p.png", "a.2.png"):
        Image.fromarray(VOC_CLASS).save(tmp_path / "SegmentationClass" / name)
    write(tmp_path, "ImageSets/Segmentation/train.txt", "a.2\n")
    write(tmp_path, "ImageSets/Segmentation/val.txt", '"my p"\n')
    labels, problems = read("voc", tmp_path)
    assert {path.name: split for path, (split, _, _) in labels.items()} == {"my p.jpg": "val"}
    assert problems == ["SegmentationClass/a.2.png - ../JPEGImages/a.2.jpg: 이미지가 없음"]


def test_transparent_masks_of_dsb2018_are_refused_and_opaque_ones_read(tmp_path):
    put(tmp_path, "a/images/a.png")
    white, mask = np.full((HEIGHT, WIDTH), 255, np.uint8), circle().astype(np.uint8) * 255
    write_image(tmp_path / "a/masks/1.png", np.dstack([white, white, white, mask]))
    write_image(tmp_path / "a/masks/2.png", np.dstack([mask, mask, mask, white]))
    labels, problems = read("folders", tmp_path)
    (_, found), = decoded(labels[tmp_path / "a/images/a.png"][2])
    assert (found == circle()).all() and len(problems) == 1 and "a/masks/1.png - 투명한 곳" in problems[0]


def test_folders_of_dsb2018_with_one_mask_per_object_are_read(tmp_path):
    for name, split in (("0a1", "stage1_train"), ("0b2", "stage1_train"), ("0c3", "stage1_test")):
        folder = tmp_path / "set" / split / name
        put(folder, f"images/{name}.png", seed=int(name[1], 16))
        for number, mask in enumerate((circle(), ellipse()) if split == "stage1_train" else ()):
            write_image(folder / f"masks/{number}.png", mask.astype(np.uint8) * 255)
    masks = tmp_path / "set/stage1_train/0a1/masks"
    write_image(masks / "grey.png", np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH))
    write_image(masks / "empty.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    done = convert(tmp_path, "--", "--val-ratio", "0.5")
    assert "folders 형식, 이미지 3장 (test 1, train 2), 객체 4개 (object 4)" in done.stdout
    assert "test의 이미지 1장은 쓰지 않습니다: 0c3.png" in done.stdout
    assert "0a1/masks/grey.png - " in done.stdout and "0a1/masks/empty.png - 이미지 안에 픽셀이 없음" in done.stdout
    (name,), (other,) = names_of(tmp_path).values()
    assert "0a1" in name and "0b2" in other
    assert (mask_in(tmp_path, f"train/{name}") == np.select([circle(), ellipse()], [1, 2])).all()
    assert not (tmp_path / "data/classes.json").exists()


def test_coco_exports_of_roboflow_and_cvat_are_read(tmp_path):
    for split in ("train", "valid", "test"):
        put(tmp_path / "set", f"{split}/p.jpg", f"{split}/new.jpg", seed=len(split))
        write(tmp_path / "set", f"{split}/_annotations.coco.json", DATUMARO)
    done = convert(tmp_path)
    assert "coco 형식, 이미지 3장 (test 1, train 1, val 1), 객체 6개 (polyp 3, tool 3)" in done.stdout
    assert (mask_in(tmp_path, "val/p.png") == np.select([circle(), ellipse()], [1001, 2001])).all()
    cvat = tmp_path / "cvat"
    put(cvat, "images/train/p.jpg", "images/val/p.jpg", "images/val/deep/p.jpg", seed=9)
    for split in ("Train", "val"):
        write(cvat, f"annotations/instances_{split}.json", DATUMARO)
    write(cvat, "annotations/instances_deep.json", {**DATUMARO, "images": [
        {"id": 2, "file_name": "val\\deep\\p.jpg"}, {"id": 3, "file_name": "gone.jpg"}]})
    labels, problems = read("coco", cvat)
    assert {path.relative_to(cvat).as_posix(): split for path, (split, _, _) in labels.items()} == {
        "images/train/p.jpg": "train", "images/val/deep/p.jpg": "val"}
    gone, unclear = problems
    assert "gone.jpg: 이미지가 없음" in gone and "같은 이름의 이미지가 여럿" in unclear


def test_coco_classes_keep_their_order_and_an_unknown_category_id_becomes_a_class_name(tmp_path):
    put(tmp_path, "p.jpg")
    objects = [{"image_id": 2, "category_id": number, "bbox": [1, 2, 3, 4]} for number in (5, 1, 2, 7)]
    write(tmp_path, "a.json", {"images": DATUMARO["images"], "annotations": objects,
                               "categories": [{"id": 2, "name": "zebra"}, {"id": 1, "name": "ant"}]})
    found = read("coco", tmp_path)[0][tmp_path / "p.jpg"][2]
    assert [(each["category"], each["rank"]) for each in found] == [
        ("category_id 5", 2), ("ant", 1), ("zebra", 0), ("category_id 7", 2)]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_labels_fit_an_image_that_exif_rotates(tmp_path, compression):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (WIDTH, HEIGHT, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    noise.save(tmp_path / "images/p.tif", exif=exif, compression=compression)
    noise.save(tmp_path / "images/q.jpg", exif=exif)
    noise.rotate(90, expand=True).save(tmp_path / "images/damaged.jpg", exif=b"Exif\0\0no metadata")
    for name in ("p", "q", "damaged"):
        write(tmp_path, f"labels/{name}.txt", YOLO_CIRCLE)
    labels, problems = read("yolo", tmp_path)
    assert len(labels) == 3 and not problems
    for image, (_, size, objects) in labels.items():
        assert size == (HEIGHT, WIDTH) == read_image(image).shape[:2]
        assert (decoded(objects)[0][1] == circle()).all()


def test_rotated_yolo_boxes_are_reported_and_images_without_labels_are_counted(tmp_path, capsys):
    put(tmp_path, "images/p.png", "more/q.png", "masks/r.png")
    write(tmp_path, "labels/p.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n" * 2)
    read("yolo", tmp_path)
    assert "OBB" in capsys.readouterr().out
    write(tmp_path, "labels/p.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n" + YOLO_CIRCLE)
    labels, _ = read("yolo", tmp_path)
    assert "OBB" not in capsys.readouterr().out
    import_labels.report(tmp_path, "yolo", {tmp_path / "images/p.png": labels[tmp_path / "images/p.png"]}, [])
    assert "라벨이 없거나 읽지 못한 이미지 1장은 쓰지 않습니다: q.png" in capsys.readouterr().out


def test_two_coco_files_for_one_image_are_refused(tmp_path):
    put(tmp_path / "set", "p.jpg")
    for name in ("instances.json", "keypoints.json"):
        write(tmp_path / "set", name, DATUMARO)
    assert_fails_in_one_line(convert(tmp_path, code=1), "p.jpg", "instances.json", "keypoints.json")


def test_a_polygon_keeps_its_thin_parts():
    line = draw_polygon(np.array([[3, 4], [30, 4]]), HEIGHT, WIDTH)
    assert line.sum() == 28 and line[4, 3:31].all()
    square = np.array([[10, 10], [20, 10], [20, 20], [10, 20]])
    assert draw_polygon(square, HEIGHT, WIDTH).sum() == 11 * 11
    joined = np.concatenate([square, square[:1], square + 20, square[:1] + 20])
    assert draw_polygon(joined, HEIGHT, WIDTH).sum() == 2 * 11 * 11  # without the line between them
    whisker = np.concatenate([square, square[:1], [[4, 10]]])
    assert draw_polygon(whisker, HEIGHT, WIDTH).sum() == 11 * 11 + 6


def test_yolo_with_two_classes_is_trained_and_compared(tmp_path):
    for split, numbers in (("train", range(6)), ("val", range(100, 103))):
        for number in numbers:
            image, mask = draw_pair(number)
            write_image(tmp_path / "set/images" / split / f"{number}.png", image)
            contour, = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
            points = " ".join(f"{value:.6f}" for value in (contour[:, 0] / (80, 60)).ravel())
            write(tmp_path / "set/labels" / split, f"{number}.txt", f"{number % 2} {points}\n")
    write(tmp_path / "set", "data.yaml",
          "path: set\ntrain: images/train\nval: images/val\nnames: {0: polyp, 1: tool}\n")
    convert(tmp_path)
    model = ("--model-cfg", SMALL_CFG, "--checkpoint", ROOT / "demo/sam2_demo.pt", "--device", "cpu")
    run("train_sam2_proper.py", *model, "--iterations", 20, "--save-every", 20, cwd=tmp_path)
    run("compare_models.py", *model, cwd=tmp_path)
    rows = (tmp_path / "output/comparison/per_image.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["100.png", "1001"], ["101.png", "2001"], ["102.png", "1001"]]
    assert json.loads((tmp_path / "output/comparison/summary.json").read_text())["original_iou"] > 0.3

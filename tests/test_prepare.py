"""prepare_data.py, run as a user runs it.

| tests | subject |
|---|---|
| pairs | splitting, unpaired and damaged files, repeated runs, files added by hand |
| COCO | polygons and RLE, numbering, categories, crowds, names, invalid files |
| maps | label maps, color masks, class maps, VOC palettes, void, thresholds |
| formats | Unicode names, orientation, transparency, TIFF pages |
| --check, --preview | counts, problems, the sheet of tiles |
| own splits | folders, suffixes, groups, classes, images without an object |
"""

import argparse
import errno
import json
import os
import shutil
import signal
import struct
import unicodedata
from collections import defaultdict

import cv2
import numpy as np
import pytest
from conftest import assert_fails_in_one_line, draw_pair, make_data, run, write_image
from filelock import FileLock
from PIL import Image
from pycocotools import mask as coco_mask

import prepare_data


def make_source(folder, count=10):
    """images/*.jpg and masks/*.jpg, as Kvasir-SEG has them: JPEG masks."""
    for number in range(count):
        image, mask = draw_pair(number)
        write_image(folder / "images" / f"polyp_{number:02}.jpg", image)
        write_image(folder / "masks" / f"polyp_{number:02}.jpg", mask)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read_grey(path):
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


def test_pairs_are_split_and_jpeg_masks_become_binary_pngs(tmp_path):
    make_source(tmp_path)
    run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path)
    assert names(tmp_path / "data/images/train") == [f"polyp_{number:02}.jpg" for number in range(8)]
    assert names(tmp_path / "data/images/val") == ["polyp_08.jpg", "polyp_09.jpg"]
    for split in ("train", "val"):
        for image in (tmp_path / "data/images" / split).iterdir():
            assert image.read_bytes() == (tmp_path / "images" / image.name).read_bytes()
            path = tmp_path / "data/masks" / split / f"{image.stem}.png"
            assert path.read_bytes().startswith(b"\x89PNG")
            mask = read_grey(path)
            assert mask.shape == (60, 80) and set(np.unique(mask)) == {0, 255}
            wanted = read_grey(tmp_path / "masks" / f"{image.stem}.jpg") > 127
            assert ((mask > 0) == wanted).all()


def test_unusable_pairs_are_skipped_and_named(tmp_path):
    make_source(tmp_path, 4)
    write_image(tmp_path / "images/lonely.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/no_image.png", draw_pair(0)[1])
    write_image(tmp_path / "images/other_size.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/other_size.png", draw_pair(0, 50, 70)[1])
    write_image(tmp_path / "images/black.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/black.png", np.zeros((60, 80), np.uint8))
    (tmp_path / "images/broken.jpg").write_bytes(b"not an image")
    write_image(tmp_path / "masks/broken.png", draw_pair(0)[1])
    write_image(tmp_path / "images/polyp_00.png", draw_pair(0)[0])  # a second polyp_00
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path)
    for name in ("lonely.png", "no_image.png", "other_size.png", "black.png", "broken.jpg", "polyp_00"):
        assert f"제외: {name}" in done.stdout
    assert names(tmp_path / "data/images/train") + names(tmp_path / "data/images/val") \
        == ["polyp_01.jpg", "polyp_02.jpg", "polyp_03.jpg"]


def test_truncated_and_damaged_files_are_refused_and_intact_ones_are_not(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "FF D9 in here: \xff\xd9"
    for name, options in (("a.jpg", {"exif": exif}), ("b.jpg", {"progressive": True}), ("c.png", {})):
        picture.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        middle = len(whole) // 2
        bad = [whole[:int(share * len(whole))] for share in (0, 0.4, 0.7, 0.95, 0.999)]
        if name == "c.png":
            start = whole.index(b"IDAT") - 4
            bad += [whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:],
                    whole[:start] + b"\xff\xff\xff\xff" + whole[start + 4:]]  # a part of 4 GB
        for content in bad:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(prepare_data.ImageError, match=name):
                prepare_data.decode_file(tmp_path / name, cv2.IMREAD_COLOR)
        for content in (whole, whole + b"a film after the photo \xff\xda \x89PNG"):
            (tmp_path / name).write_bytes(content)
            assert prepare_data.decode_file(tmp_path / name, cv2.IMREAD_COLOR).shape == (60, 80, 3)


def test_a_run_without_a_usable_pair_fails_and_writes_nothing(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/b.png", draw_pair(0)[1])
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "하나도 없습니다")
    assert names(tmp_path / "data") == [".lock"]


def test_a_repeated_run_changes_nothing_and_another_split_replaces_the_first(tmp_path):
    make_source(tmp_path)
    arguments = ("prepare_data.py", "--images", "images", "--masks", "masks")
    run(*arguments, cwd=tmp_path)
    before = (tmp_path / "data/masks/train/polyp_00.png").stat().st_mtime_ns
    assert "이미 준비되어" in run(*arguments, cwd=tmp_path).stdout
    assert (tmp_path / "data/masks/train/polyp_00.png").stat().st_mtime_ns == before
    run(*arguments, "--shuffle-seed", 3, "--val-ratio", 0.5, cwd=tmp_path)
    train, val = names(tmp_path / "data/images/train"), names(tmp_path / "data/images/val")
    assert len(train) == len(val) == 5 and not set(train) & set(val)
    assert [name.replace("png", "jpg") for name in names(tmp_path / "data/masks/val")] == val


def test_files_in_data_from_elsewhere_are_never_overwritten(tmp_path):
    make_source(make_data(tmp_path))
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "덮어쓰지 않습니다")
    assert len(names(tmp_path / "data/images/train")) == 6


def test_files_added_or_edited_in_data_by_hand_stop_a_new_split_but_hidden_files_do_not(tmp_path):
    make_source(tmp_path)
    arguments = ("prepare_data.py", "--images", "images", "--masks", "masks")
    run(*arguments, cwd=tmp_path)
    for name in (".DS_Store", "Thumbs.db", "@eaDir/thumbnail.jpg"):
        (tmp_path / "data/images/train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data/images/train" / name).write_bytes(b"of a system")
    assert "이미 준비되어" in run(*arguments, cwd=tmp_path).stdout
    assert "완료" in run(*arguments, "--val-ratio", 0.5, cwd=tmp_path).stdout
    write_image(tmp_path / "data/masks/train/by_hand.png", draw_pair(50)[1])
    assert_fails_in_one_line(run(*arguments, cwd=tmp_path, code=1), "masks/train/by_hand.png", "덮어쓰지 않습니다")
    (tmp_path / "data/masks/train/by_hand.png").unlink()
    mask = tmp_path / "data/masks/train/polyp_00.png"
    corrected = draw_pair(50)[1]
    write_image(mask, corrected)
    assert_fails_in_one_line(run(*arguments, cwd=tmp_path, code=1), "masks/train/polyp_00.png", "고친")
    assert (cv2.imread(str(mask), cv2.IMREAD_UNCHANGED) == corrected).all()
    mask.unlink()
    assert "완료" in run(*arguments, cwd=tmp_path).stdout and mask.exists()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    make_source(tmp_path, 3)
    arguments = ("prepare_data.py", "--images", "images", "--masks", "masks")
    (tmp_path / "data").mkdir()
    with FileLock(tmp_path / "data/.lock"):
        assert_fails_in_one_line(run(*arguments, cwd=tmp_path, code=1), "이미 실행 중", "data/.lock")
    kill = "import cv2, os, signal\ncv2.imencode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    run(*arguments, cwd=tmp_path, before=kill, code=-signal.SIGKILL)  # a lock ends with its process
    assert "완료" in run(*arguments, cwd=tmp_path).stdout
    assert not (tmp_path / "data/.part").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_gives_a_warning_and_the_run_continues(tmp_path, number):
    make_source(tmp_path, 3)
    refuse = f"def flock(*_):\n    raise OSError({number}, {os.strerror(number)!r})\nimport fcntl\nfcntl.flock = flock"
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, before=refuse)
    line, = done.stderr.strip().splitlines()
    assert line.startswith("주의: ") and os.strerror(number) in line
    assert "완료" in done.stdout


def test_masks_of_0_and_1_and_masks_in_one_color_become_0_and_255(tmp_path):
    image, mask = draw_pair(1)
    red = np.zeros_like(image)
    red[mask > 0] = (0, 0, 255)
    for name, drawn in (("ones", mask // 255), ("red", red)):
        write_image(tmp_path / f"images/{name}.png", image)
        write_image(tmp_path / f"masks/{name}.png", drawn)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, cwd=tmp_path)
    for name in ("ones", "red"):
        assert (read_grey(tmp_path / f"data/masks/train/{name}.png") == mask).all()


def test_bmp_images_are_converted_to_png(tmp_path):
    image, mask = draw_pair(1)
    write_image(tmp_path / "images/slide.bmp", image)
    write_image(tmp_path / "masks/slide.png", mask)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, cwd=tmp_path)
    assert (cv2.imread(str(tmp_path / "data/images/train/slide.png")) == image).all()


def rle_plain(mask):
    """Uncompressed RLE, computed here: run lengths in column-major order, the first one of zeros."""
    flat = mask.T.ravel() > 0
    changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + runs}


def test_coco_polygons_and_plain_and_compressed_rle_become_masks(tmp_path):
    image, mask = draw_pair(5)
    compressed = coco_mask.encode(np.asfortranarray(mask // 255))
    compressed["counts"] = compressed["counts"].decode()
    square = [10, 10, 30, 10, 30, 25, 10, 25]
    segmentations = {"polygon": [square], "two": [square, [50, 40, 70, 40, 70, 50, 50, 50]],
                     "plain": rle_plain(mask), "compressed": compressed}
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "polyp"}]}
    for identity, (name, segmentation) in enumerate(segmentations.items()):
        write_image(tmp_path / f"images/{name}.png", image)
        coco["images"].append({"id": identity, "file_name": f"images/{name}.png", "height": 60, "width": 80})
        coco["annotations"].append({"id": identity, "image_id": identity, "segmentation": segmentation})
    write_image(tmp_path / "images/unmarked.png", image)
    coco["images"].append({"id": 99, "file_name": "unmarked.png", "height": 60, "width": 80})
    (tmp_path / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    done = run("prepare_data.py", "--images", "images", "--coco", "annotations.json", "--val-ratio", 0, cwd=tmp_path)
    assert "제외: unmarked.png" in done.stdout
    got = {path.stem: read_grey(path) > 0 for path in (tmp_path / "data/masks/train").iterdir()}
    assert set(got) == set(segmentations)
    assert (got["plain"] == (mask > 0)).all() and (got["compressed"] == (mask > 0)).all()
    assert got["polygon"][12:24, 12:29].all() and got["polygon"].sum() == pytest.approx(20 * 15, rel=0.1)
    assert got["two"].sum() == pytest.approx(20 * 15 + 20 * 10, rel=0.1)


def rectangle(top, bottom, left, right):
    mask = np.zeros((60, 80), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def write_coco(folder, images):
    """images/NAME.png and a.json from {name: [(mask or segmentation, category, iscrowd)]}."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "polyp"}, {"id": 9, "name": "도구"}]}
    for identity, (name, annotations) in enumerate(images.items()):
        write_image(folder / f"images/{name}.png", draw_pair(0)[0])
        coco["images"].append({"id": identity, "file_name": f"{name}.png", "height": 60, "width": 80})
        for segmentation, category, crowd in annotations:
            segmentation = rle_plain(segmentation) if isinstance(segmentation, np.ndarray) else segmentation
            coco["annotations"].append({"id": len(coco["annotations"]), "image_id": identity, "iscrowd": crowd,
                                        "category_id": category, "segmentation": segmentation})
    (folder / "a.json").write_text(json.dumps(coco), encoding="utf-8")


SMALL, LARGE, OTHER = rectangle(20, 30, 20, 30), rectangle(10, 40, 10, 50), rectangle(35, 50, 40, 70)
SCENE = {"scene": [(SMALL, 7, 0), (LARGE, 9, 0), (OTHER, 7, 0), (rectangle(0, 5, 0, 80), 7, 1)],
         "single": [(SMALL, 7, 0), (LARGE, 7, 1)], "crowd": [(LARGE, 7, 1)]}


def prepare_coco(folder, *arguments, **options):
    return run("prepare_data.py", "--images", "images", "--coco", "a.json", "--val-ratio", 0, *arguments, cwd=folder,
               **options)


def prepare_masks(folder, *arguments, **options):
    return run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, *arguments, cwd=folder,
               **options)


def test_overlapping_coco_objects_are_numbered_with_the_smaller_on_top(tmp_path):
    write_coco(tmp_path, SCENE)
    done = prepare_coco(tmp_path)
    labels = read_grey(tmp_path / "data/masks/train/scene.png")
    assert labels.dtype == np.uint16
    assert ((labels == 1001) == (SMALL > 0)).all() and ((labels == 1002) == (OTHER > 0)).all()
    assert (labels == 2001).sum() == 30 * 40 - 10 * 10 - 5 * 10  # the part not covered by smaller ones
    assert set(np.unique(labels)) == {0, 1001, 1002, 2001}
    assert json.loads((tmp_path / "data/classes.json").read_text("utf-8")) == {"1": "polyp", "2": "도구"}
    single = read_grey(tmp_path / "data/masks/train/single.png")
    assert single.dtype == np.uint16 and ((single == 1001) == (SMALL > 0)).all()
    assert "iscrowd 영역 3개를 뺐습니다 (객체로 쓰려면 --keep-crowd)" in done.stdout
    assert "제외: crowd.png - 마스크 없음" in done.stdout


def test_merge_unites_all_coco_objects_and_crowds_in_one_mask(tmp_path):
    write_coco(tmp_path, SCENE)
    prepare_coco(tmp_path)
    done = prepare_coco(tmp_path, "--merge")  # not "already there": other masks
    merged = read_grey(tmp_path / "data/masks/train/scene.png")
    assert merged.dtype == np.uint8
    assert (merged == (SMALL | LARGE | OTHER | rectangle(0, 5, 0, 80))).all()
    assert (read_grey(tmp_path / "data/masks/train/crowd.png") == LARGE).all()
    assert "iscrowd" not in done.stdout


def test_coco_categories_are_chosen_by_name(tmp_path):
    write_coco(tmp_path, SCENE)
    done = prepare_coco(tmp_path, "--category", "도구")
    assert names(tmp_path / "data/masks/train") == ["scene.png"] and "제외: single.png" in done.stdout
    mask = read_grey(tmp_path / "data/masks/train/scene.png")
    assert mask.dtype == np.uint8 and (mask == LARGE).all()
    assert not (tmp_path / "data/classes.json").exists()
    prepare_coco(tmp_path, "--category", "도구", "--category", "polyp")
    assert set(np.unique(read_grey(tmp_path / "data/masks/train/scene.png"))) == {0, 1001, 1002, 2001}
    done = prepare_coco(tmp_path, "--category", "cat", code=1)
    assert_fails_in_one_line(done, "cat", "polyp", "도구")


def test_a_coco_object_in_two_pieces_keeps_one_number_and_a_covered_object_is_reported(tmp_path):
    write_coco(tmp_path, {"a": [(rectangle(0, 9, 0, 9) | rectangle(50, 59, 70, 79), 7, 0), (SMALL, 7, 0)],
                          "b": [(SMALL, 7, 0), (SMALL, 7, 0), (LARGE, 7, 0)]})
    done = prepare_coco(tmp_path)
    labels = read_grey(tmp_path / "data/masks/train/a.png")
    assert (labels[:9, :9] == 1).all() and (labels[50:59, 70:79] == 1).all() and (labels == 1).sum() == 162
    line, = (line for line in done.stdout.splitlines() if "가려짐" in line)
    assert "b.png의 객체 1개" in line


def test_hundreds_of_coco_objects_are_numbered():
    squares = [rectangle(y, y + 2, x, x + 3) for y in range(0, 60, 3) for x in range(0, 80, 4)]
    objects = [("cell", rle_plain(square)) for square in squares]
    labels = prepare_data.draw_objects(objects, (60, 80), False, "a.png", {}, (60, 80))
    wanted = sum(number * (square > 0) for number, square in enumerate(squares, start=1))
    assert len(squares) == 400 and (labels == wanted).all()


def test_rle_with_runs_of_length_0_is_decoded():
    run = {"size": [20, 30], "counts": [10, 5, 0, 5, 580]}  # pixels 10 to 19 of the columns one after the other
    mask = prepare_data.draw_objects([("a", run), ("b", run)], (20, 30), True, "a.png", {}, (20, 30))
    assert mask.T.ravel().nonzero()[0].tolist() == list(range(10, 20))


LABELS = np.where(SMALL, 7, np.where(LARGE, 1, np.where(OTHER, 300, 0)))


@pytest.mark.parametrize("suffix, kind", [(".png", "uint16"), (".tif", "uint16"), (".tif", "int32"),
                                          (".tif", "float32")])
def test_label_maps_in_16_bit_png_and_in_tiff_keep_their_numbers(tmp_path, suffix, kind):
    write_image(tmp_path / "images/cells.png", draw_pair(0)[0])
    (tmp_path / "masks").mkdir()
    Image.fromarray(LABELS.astype(kind)).save(tmp_path / f"masks/cells{suffix}")
    prepare_masks(tmp_path)
    written = read_grey(tmp_path / "data/masks/train/cells.png")
    assert written.dtype == np.uint16 and (written == LABELS).all()
    prepare_masks(tmp_path, "--merge")
    written = read_grey(tmp_path / "data/masks/train/cells.png")
    assert written.dtype == np.uint8 and (written == 255 * (LABELS > 0)).all()


def test_an_8_bit_label_map_is_refused_with_the_flags_that_read_it_and_read_with_numbered(tmp_path):
    write_image(tmp_path / "images/cells.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/cells.png", (LABELS % 290).astype(np.uint8))
    assert_fails_in_one_line(prepare_masks(tmp_path, code=1), "cells.png", "--numbered", "--classes", "--threshold")
    prepare_masks(tmp_path, "--numbered")
    written = read_grey(tmp_path / "data/masks/train/cells.png")
    assert written.dtype == np.uint16 and (written == LABELS % 290).all()


def test_label_values_of_any_type_become_16_bit_numbers_or_are_refused():
    big = np.array([[0, 70_000], [70_000, 3]])
    assert prepare_data.to_labels(big).tolist() == [[0, 2], [2, 1]]
    assert prepare_data.to_labels(np.array([[5.0, 0], [65535, 5]])).tolist() == [[5, 0], [65535, 5]]
    assert prepare_data.to_labels(np.array([[[0, 0, 0], [0, 0, 9], [9, 0, 9]]])).tolist() == [[0, 1, 2]]  # colors
    for bad in ([[0.5, 1]], [[-1, 1]], [[np.nan, 1]], [[np.inf, 1]]):
        with pytest.raises(prepare_data.ImageError):
            prepare_data.to_labels(np.array(bad))
    numbers = np.random.default_rng(0).permutation(65536)[None]
    assert prepare_data.to_labels(numbers).max() == 65535
    with pytest.raises(prepare_data.ImageError, match="65,535"):
        prepare_data.to_labels(2 * np.append(numbers, [[65536]], 1))
    with pytest.raises(prepare_data.ImageError, match="밝기"):
        prepare_data.to_labels(np.arange(100)[None])  # a gradient


def test_a_multi_page_mask_for_a_single_image_is_reported(tmp_path):
    write_image(tmp_path / "images/stack.png", draw_pair(0)[0])
    (tmp_path / "masks").mkdir()
    slices = [Image.fromarray(LABELS.astype(np.uint16))] * 3
    slices[0].save(tmp_path / "masks/stack.tif", save_all=True, append_images=slices[1:])
    done = prepare_masks(tmp_path, code=1)
    for line in ("stack.png - 마스크 없음", *(f"stack_p00{page}.tif - 이미지 없음" for page in (1, 2, 3))):
        assert f"제외: {line}" in done.stdout


def test_with_numbered_each_color_is_one_object_in_any_number_of_pieces(tmp_path):
    red, blue = (0, 0, 200), (200, 0, 0)
    drawn = np.zeros((60, 80, 3), np.uint8)
    drawn[SMALL > 0], drawn[OTHER > 0], drawn[:5, :5] = blue, red, red
    see_through = np.dstack([np.where(drawn.any(2, keepdims=True), drawn, 255), drawn.max(2)])  # white is transparent
    for name, mask in (("rgb", drawn), ("rgba", see_through)):
        write_image(tmp_path / f"images/{name}.png", draw_pair(0)[0])
        write_image(tmp_path / f"masks/{name}.png", mask)
    prepare_masks(tmp_path, "--colours")
    for name in ("rgb", "rgba"):
        labels = read_grey(tmp_path / f"data/masks/train/{name}.png")
        assert labels.dtype == np.uint16 and set(np.unique(labels)) == {0, 1, 2}
        assert len(set(labels[SMALL > 0])) == 1 and (labels == labels[20, 20]).sum() == 100
        assert labels[0, 0] == labels[36, 41] and (labels == labels[0, 0]).sum() == 15 * 30 + 25


@pytest.mark.parametrize("flag", ["--numbered", "--colours"])
def test_a_jpeg_of_numbers_or_colors_is_refused_in_one_line(tmp_path, flag):
    make_source(tmp_path, 3)
    done = prepare_masks(tmp_path, flag, code=1)
    assert_fails_in_one_line(done, "masks/polyp_00.jpg".replace("/", os.sep), "--numbered", "JPEG")
    assert not done.stdout


def test_check_counts_objects_and_those_too_small_after_the_reduction(tmp_path):
    wide = np.zeros((100, 2048), np.uint16)  # halved by training: 16 x 16 becomes 64 pixels, 40 x 40 becomes 400
    wide[10:26, 100:116], wide[50:90, 200:240] = 5, 9
    for name, labels in (("wide", wide), ("one", (rectangle(0, 10, 0, 10)))):
        write_image(tmp_path / f"data/images/train/{name}.png", np.zeros((*labels.shape, 3), np.uint8))
        write_image(tmp_path / f"data/masks/train/{name}.png", labels)
    (tmp_path / "data/images/val").mkdir()
    (tmp_path / "data/masks/val").mkdir()
    done = run("prepare_data.py", "--check", cwd=tmp_path)
    assert "객체 3개: 이미지마다 최소 1, 중앙값 1.5, 최대 2개" in done.stdout
    assert "객체 크기: 최소 64픽셀, 중앙값 100픽셀, 최대 400픽셀" in done.stdout
    assert "작은 객체 (100픽셀 미만) 1개: train/wide.png" in done.stdout
    assert "100픽셀 미만 1개, 1,000픽셀 미만 3개" in done.stdout


def test_preview_draws_each_object_in_its_color(tmp_path):
    write_image(tmp_path / "data/images/train/a.png", np.full((60, 80, 3), 100, np.uint8))
    labels = np.where(SMALL, 4, 0) + np.where(OTHER, 6, 0)
    labels[50:, :10] = 4  # its second piece
    write_image(tmp_path / "data/masks/train/a.png", labels.astype(np.uint16))
    run("prepare_data.py", "--preview", 1, cwd=tmp_path)
    sheet = cv2.imread(str(tmp_path / "data/preview.png"))

    def inside(y, x):  # 80 pixels are 248 on the sheet, which begins at 4
        return sheet[round(4 + y * 3.1), round(4 + x * 3.1)].tolist()
    green = [65, 141, 65]  # 0.65 * 100, and 0.35 * 0.86 * 255 more in green
    assert inside(25, 25) == inside(56, 4) == green
    assert inside(45, 60) not in (green, [100, 100, 100]) and inside(5, 60) == [100, 100, 100]


def test_korean_file_names_pair_in_both_unicode_forms(tmp_path):
    image, mask = draw_pair(5)
    taken_apart, whole = (unicodedata.normalize(form, "용종") for form in ("NFD", "NFC"))
    assert taken_apart != whole
    write_image(tmp_path / f"images/{taken_apart}.png", image)
    write_image(tmp_path / f"masks/{whole}.png", mask)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, cwd=tmp_path)
    run("prepare_data.py", "--check", cwd=tmp_path)
    coco = {"images": [{"id": 1, "file_name": f"{whole}.png", "height": 60, "width": 80}],
            "annotations": [{"id": 1, "image_id": 1, "segmentation": rle_plain(mask)}]}
    (tmp_path / "a.json").write_text(json.dumps(coco), encoding="utf-8")
    run("prepare_data.py", "--images", "images", "--coco", "a.json", "--val-ratio", 0, "--data-dir", "d", cwd=tmp_path)
    for folder in ("data", "d"):
        assert (read_grey(tmp_path / f"{folder}/masks/train/{taken_apart}.png") == mask).all()


def test_a_file_that_is_not_coco_is_named(tmp_path):
    make_source(tmp_path, 1)
    for content in ("{", "[]", '{"images": 3, "annotations": []}', "[" * 100_000):
        (tmp_path / "a.json").write_text(content)
        done = run("prepare_data.py", "--images", "images", "--coco", "a.json", cwd=tmp_path, code=1)
        assert_fails_in_one_line(done, "a.json", "COCO")
    done = run("prepare_data.py", "--images", "images", "--coco", "none.json", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "파일이 없습니다: none.json")


def test_check_counts_and_names_every_problem(data):
    done = run("prepare_data.py", "--check", cwd=data)
    assert "train: 6쌍" in done.stdout and "val: 4쌍" in done.stdout and "80x60" in done.stdout
    (data / "data/masks/train/pair_000.png").unlink()
    (data / "data/images/train/pair_001.png").unlink()
    write_image(data / "data/masks/train/pair_002.png", np.zeros((60, 80), np.uint8))
    write_image(data / "data/masks/val/pair_100.png", draw_pair(0, 50, 70)[1])
    (data / "data/images/val/pair_101.png").write_bytes(b"broken")
    done = run("prepare_data.py", "--check", cwd=data, code=1)
    for name, problem in (("train/pair_000.png", "마스크 없음"), ("train/pair_001.png", "이미지 없음"),
                          ("train/pair_002.png", "비어 있음"), ("val/pair_100.png", "크기가 다름"),
                          ("val/pair_101.png", "손상")):
        line, = (line for line in done.stdout.splitlines() if name in line)
        assert problem in line
    assert "문제 5개" in done.stdout and "train: 3쌍" in done.stdout


def test_check_accepts_data_without_validation_but_not_masks_without_images(data):
    shutil.rmtree(data / "data/images/val")
    assert_fails_in_one_line(run("prepare_data.py", "--check", cwd=data, code=1), "data/images/val")
    shutil.rmtree(data / "data/masks/val")
    assert "val: 폴더가 없습니다" in run("prepare_data.py", "--check", cwd=data).stdout


def test_preview_is_a_sheet_of_the_given_number_of_tiles(data):
    run("prepare_data.py", "--preview", 8, cwd=data)
    sheet = cv2.imread(str(data / "data/preview.png"))
    assert sheet.shape == (2 * 272, 6 * 256, 3)
    green = (sheet[..., 1].astype(int) - sheet[..., 2] > 80).sum()
    assert green > 1000  # outlines are drawn
    assert (sheet[272:, 2 * 256:] == 255).all()  # the last four places stay empty
    assert all((sheet[196:272, 256 * column:256 * column + 100] < 128).any() for column in range(6))  # names


def save_voc(path, indices):
    """A PNG with the palette of PASCAL VOC, whose index 255 is the void border."""
    colors = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colors[index, channel] |= (index >> (3 * bit + channel) & 1) << 7 - bit
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(indices.astype(np.uint8), "L").copy()
    picture.putpalette(colors.tobytes())
    picture.save(path)
    return colors


def class_maps():
    """Masks that a threshold of 127 cannot separate, by name: classes, a trimap, numbered cells, void, colors."""
    two = np.where(SMALL, 3, np.where(LARGE, 11, 0))
    cells, lines = np.zeros((60, 80)), np.zeros((60, 80), np.uint8)
    for number in range(1, 201):
        y, x = divmod(number - 1, 20)
        cells[6 * y:6 * y + 3, 4 * x:4 * x + 2] = number
    cv2.line(lines, (5, 5), (70, 30), 100)
    cv2.line(lines, (5, 50), (70, 40), 200)
    return {"coco-stuff": two, "train-ids": np.where(two, two, 255), "cells": cells,
            "trimap": np.where(SMALL, 1, np.where(LARGE, 3, 2)), "void": np.where(SMALL, 1, np.where(LARGE, 255, 0)),
            "thin-void": np.where(SMALL, 1, np.where(cv2.dilate(SMALL, np.ones((3, 3))), 255, 0)),
            "bright": np.where(SMALL, 100, np.where(LARGE, 200, 0)),
            "lines": lines, "red and blue lines": np.dstack([lines * (lines < 150), lines * 0, lines * (lines > 150)]),
            "dark-color": np.dstack([two * 0, two * 0, np.where(two, 64, 0)]),
            "colors": np.dstack([SMALL, SMALL * 0, LARGE])}


@pytest.mark.parametrize("name", class_maps())
def test_a_mask_of_class_ids_or_object_numbers_is_refused_with_the_flags_that_read_it(tmp_path, name):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    values = class_maps()[name].astype(np.uint8)
    write_image(tmp_path / "masks/a.png", values)
    done = prepare_masks(tmp_path, code=1)
    assert_fails_in_one_line(done, "a.png", "--numbered", "--classes", "--threshold", "--void")
    assert not (tmp_path / "data/split.json").exists()
    prepare_masks(tmp_path, "--numbered")
    written = read_grey(tmp_path / "data/masks/train/a.png")
    codes = values if values.ndim == 2 else values @ [1, 256, 65536]
    assert len(np.unique(written)) == len(np.unique(codes)) and ((written > 0) == (codes > 0)).all()
    if values.ndim == 2:
        assert (written == values).all()


@pytest.mark.parametrize("kind", ["antialiased", "jpeg 20", "jpeg 50", "jpeg 90", "enlarged", "tiny", "thin"])
def test_a_mask_with_gray_edges_is_thresholded_and_not_refused_as_class_ids(tmp_path, kind):
    size = 24 if kind == "tiny" else 200
    mask = np.zeros((size, size), np.uint8)
    thickness = 2 if kind == "thin" else -1
    cv2.ellipse(mask, (size // 2, size // 2), (size // 3, size // 5), 25, 0, 360, 255, thickness, cv2.LINE_AA)
    if kind.startswith("jpeg"):  # saved as PNG again
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(kind.split()[1])]
        mask = cv2.imdecode(cv2.imencode(".jpg", mask, quality)[1], cv2.IMREAD_GRAYSCALE)
    if kind == "enlarged":
        mask = cv2.resize(mask, (700, 700), interpolation=cv2.INTER_CUBIC)
    assert len(np.unique(mask)) > 5
    write_image(tmp_path / "images/a.png", np.zeros((*mask.shape, 3), np.uint8) + 9)
    write_image(tmp_path / "masks/a.png", mask)
    prepare_masks(tmp_path)
    assert (read_grey(tmp_path / "data/masks/train/a.png") == np.where(mask > 127, 255, 0)).all()
    write_image(tmp_path / "data/masks/train/a.png", mask)  # by hand: no problem either
    assert "문제 없음" in run("prepare_data.py", "--check", cwd=tmp_path).stdout


@pytest.mark.parametrize("quality", [20, 60, 95, None])
def test_a_mask_of_two_blurred_colors_is_refused_and_one_of_a_single_color_is_thresholded(tmp_path, quality):
    def circles(*colors):
        drawn = np.zeros((120, 200, 3), np.uint8)
        for number, color in enumerate(colors):
            cv2.circle(drawn, (50 + 90 * number, 60), 40 - 25 * number, color, -1, cv2.LINE_AA)
        return drawn if quality is None else cv2.imdecode(
            cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    args = argparse.Namespace(data_dir=tmp_path, numbered=False, classes=False, threshold=None, void=[], merge=False)
    for second in ((10, 250, 20), (250, 250, 250), (0, 150, 250)):
        write_image(tmp_path / "a.png", circles((20, 10, 250), second))
        with pytest.raises(SystemExit, match="--threshold"):
            prepare_data.read_source_mask(tmp_path / "a.png", 0, args, defaultdict(list))
    for color in ((0, 0, 255), (250, 60, 120), (0, 240, 240), (250, 250, 250)):
        write_image(tmp_path / "a.png", circles(color, color))
        mask = prepare_data.read_source_mask(tmp_path / "a.png", 0, args, defaultdict(list))
        assert (mask == (circles(color, color).max(axis=2) > 127)).all()


def test_with_classes_each_connected_region_of_a_class_is_one_object(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    classes = np.where(SMALL | rectangle(40, 50, 60, 70), 3, LARGE // 255)
    write_image(tmp_path / "masks/a.png", classes.astype(np.uint8))
    prepare_masks(tmp_path, "--classes")
    labels = read_grey(tmp_path / "data/masks/train/a.png")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert len(set(labels[SMALL > 0])) == len(set(labels[40:50, 60:70].ravel())) == 1
    assert labels[22, 22] != labels[45, 65]


def test_indices_of_a_voc_palette_are_object_numbers_and_255_is_void(tmp_path):
    ring = cv2.dilate(SMALL, np.ones((5, 5))) - SMALL
    indices = np.where(ring, 255, np.where(SMALL, 1, np.where(OTHER, 2, 0)))
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    colors = save_voc(tmp_path / "masks/a.png", indices)
    for flag in ((), ("--colours",)):
        done = prepare_masks(tmp_path, *flag)
        assert (read_grey(tmp_path / "data/masks/train/a.png") == np.where(indices == 255, 0, indices)).all()
        assert f"void 픽셀 {np.count_nonzero(ring)}개" in done.stdout
    write_image(tmp_path / "masks/a.png", colors[indices][..., ::-1])  # the same, without its palette
    done = prepare_masks(tmp_path, "--numbered", "--void", 224, 224, 192)
    labels = read_grey(tmp_path / "data/masks/train/a.png")
    assert ((labels > 0) == ((SMALL | OTHER) > 0)).all() and len(np.unique(labels)) == 3
    assert f"void 픽셀 {np.count_nonzero(ring)}개" in done.stdout


def test_with_void_255_a_mask_of_0_1_and_255_becomes_a_binary_mask(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/a.png", class_maps()["void"].astype(np.uint8))
    done = prepare_masks(tmp_path, "--void", 255)
    assert (read_grey(tmp_path / "data/masks/train/a.png") == SMALL).all()
    assert "void 픽셀" in done.stdout


def test_a_void_value_that_does_not_occur_is_reported_and_255_of_a_voc_palette_is_always_void(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/a.png", SMALL)
    assert "void 픽셀 0개" in prepare_masks(tmp_path, "--void", 9).stdout
    done = prepare_masks(tmp_path, "--void", 255, "--allow-empty", "--data-dir", "other", code=1)
    assert "제외: a.png - void뿐인 마스크" in done.stdout  # not an image without an object
    save_voc(tmp_path / "masks/a.png", class_maps()["void"])
    for void in ((9,), (224, 224, 192)):
        prepare_masks(tmp_path, "--void", *void)
        assert (read_grey(tmp_path / "data/masks/train/a.png") == (SMALL > 0)).all()


def test_a_palette_that_does_not_begin_with_black_is_read_as_colors_not_numbers(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    (tmp_path / "masks").mkdir()
    drawn = np.zeros((60, 80, 3), np.uint8)
    drawn[SMALL > 0], drawn[OTHER > 0] = (0, 0, 255), (0, 255, 0)
    Image.fromarray(drawn).quantize(8).save(tmp_path / "masks/a.png")
    assert Image.open(tmp_path / "masks/a.png").getpalette()[:3] != [0, 0, 0]
    prepare_masks(tmp_path, "--numbered")
    labels = read_grey(tmp_path / "data/masks/train/a.png")
    assert ((labels > 0) == drawn.any(2)).all() and len(np.unique(labels)) == 3


def test_a_soft_edge_in_alpha_is_thresholded_in_the_middle_and_a_16_bit_gradient_is_refused(tmp_path):
    soft = cv2.GaussianBlur(SMALL, (0, 0), 3)
    for name, mask in (("soft", np.dstack([np.full((60, 80, 3), 255, np.uint8), soft])),
                       ("deep", soft.astype(np.uint16) * 257)):
        write_image(tmp_path / f"images/{name}.png", draw_pair(len(name))[0])
        write_image(tmp_path / f"masks/{name}.png", mask)
    done = prepare_masks(tmp_path)
    assert (read_grey(tmp_path / "data/masks/train/soft.png") == np.where(soft > soft.max() // 2, 255, 0)).all()
    line, = (line for line in done.stdout.splitlines() if "제외: deep.png" in line)
    assert "--threshold" in line


def test_alpha_of_a_white_picture_is_its_mask_and_a_mask_of_the_whole_image_is_reported(tmp_path):
    for name, alpha in (("cut", SMALL), ("full", np.full((60, 80), 255, np.uint8))):
        write_image(tmp_path / f"images/{name}.png", draw_pair(len(name))[0])
        write_image(tmp_path / f"masks/{name}.png", np.dstack([np.full((60, 80, 3), 255, np.uint8), alpha]))
    done = prepare_masks(tmp_path)
    assert (read_grey(tmp_path / "data/masks/train/cut.png") == SMALL).all()
    assert "제외: full.png - 마스크가 이미지 전체를 덮음" in done.stdout
    write_image(tmp_path / "data/masks/train/cut.png", np.full((60, 80), 255, np.uint8))
    assert "cut.png - 마스크가 이미지 전체를 덮음" in run("prepare_data.py", "--check", cwd=tmp_path, code=1).stdout


def test_a_1_bit_tiff_with_0_as_white_is_read_by_value_if_tifffile_wrote_it_and_else_refused(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    (tmp_path / "masks").mkdir()
    for software, code in (("tifffile.py", 0), ("scanner", 1)):
        Image.fromarray(SMALL == 0).save(tmp_path / "masks/a.tif", tiffinfo={262: 0, 305: software})  # bit 1: SMALL
        done = prepare_masks(tmp_path, code=code)
        if code:
            assert_fails_in_one_line(done, "흰색", "--numbered", "--threshold")
            prepare_masks(tmp_path, "--numbered")
        assert ((read_grey(tmp_path / "data/masks/train/a.png") > 0) == (SMALL > 0)).all()
    prepare_masks(tmp_path, "--threshold", 127)
    assert (read_grey(tmp_path / "data/masks/train/a.png") == 255 - SMALL).all()


def test_images_and_masks_in_one_folder_are_refused_and_unsupported_formats_are_named(tmp_path):
    make_source(tmp_path, 3)
    done = run("prepare_data.py", "--images", "images", "--masks", "images", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "같은 폴더")
    (tmp_path / "images/phone.HEIC").write_bytes(b"....ftypheic")
    (tmp_path / "images/scan.tga").write_bytes(b"anything")
    (tmp_path / "images/labels.txt").write_text("a text is no image that was forgotten")
    shutil.move(tmp_path / "images/polyp_00.jpg", tmp_path / "images/polyp_00.jfif")
    done = prepare_masks(tmp_path)
    assert "제외: phone.HEIC" in done.stdout and "제외: scan.tga" in done.stdout and "labels.txt" not in done.stdout
    assert "학습 3쌍" in done.stdout


def test_replaced_pairs_are_counted_and_only_new_folders_are_reported_as_created(tmp_path):
    make_source(tmp_path, 4)
    assert "바꿉니다" not in prepare_masks(tmp_path).stdout
    assert "data에 있던 4쌍을 새 쌍으로 바꿉니다" in prepare_masks(tmp_path, "--shuffle-seed", 1).stdout
    assert "폴더가 이미 있습니다" in run("prepare_data.py", cwd=tmp_path).stdout
    assert "폴더를 만들었습니다" in run("prepare_data.py", "--data-dir", "new", cwd=tmp_path).stdout


def test_the_same_image_under_two_names_in_both_splits_is_reported(tmp_path):
    make_source(tmp_path, 5)
    shutil.copy(tmp_path / "images/polyp_00.jpg", tmp_path / "images/polyp_04.jpg")
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path)
    assert "train/polyp_00.jpg = val/polyp_04.jpg" in done.stdout
    assert "train/polyp_00.jpg = val/polyp_04.jpg" in run("prepare_data.py", "--check", cwd=tmp_path, code=1).stdout


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_mask_that_fits_the_image_only_before_exif_rotation_is_rotated_with_it(tmp_path, suffix):
    stored = draw_pair(0)[0]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"images/o{orientation}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(stored).save(path, exif=exif)
        write_image(tmp_path / f"masks/o{orientation}.png", SMALL)
    done = prepare_masks(tmp_path)
    from PIL import ImageOps
    for orientation in range(1, 9):
        picture = Image.fromarray(SMALL)
        picture.getexif()[0x0112] = orientation
        wanted = np.array(ImageOps.exif_transpose(picture)) if orientation > 4 else SMALL
        assert (read_grey(tmp_path / f"data/masks/train/o{orientation}.png") == wanted).all(), orientation
        image, = (tmp_path / "data/images/train").glob(f"o{orientation}.*")
        assert prepare_data.read_image(image).shape[:2] == wanted.shape
    assert "이미지 4장의 마스크를 돌렸습니다" in done.stdout and "이미지 3장은 마스크의 방향을" in done.stdout
    assert f"확인하세요: o2.{suffix}" in done.stdout
    checked = run("prepare_data.py", "--check", cwd=tmp_path).stdout
    assert ("이미지 3장은 마스크의 방향을" in checked) == (suffix in ("jpg", "png"))  # the others became upright PNGs


@pytest.mark.parametrize("crowds, flags, kept", [("all", (), 2), ("mixed", (), 1), ("mixed", ("--keep-crowd",), 2)])
def test_coco_crowds_are_skipped_if_their_category_has_other_objects_unless_keep_crowd(tmp_path, crowds, flags, kept):
    write_coco(tmp_path, {"a": [(SMALL, 7, 1), (LARGE, 7, int(crowds == "all"))]})
    done = prepare_coco(tmp_path, *flags)
    mask = read_grey(tmp_path / "data/masks/train/a.png")
    assert (mask.dtype == np.uint16) == (kept == 2) and len(np.unique(mask)) == kept + 1
    assert ("객체로 썼습니다 (빼려면" if kept == 2 else "뺐습니다 (객체로 쓰려면 --keep-crowd)") in done.stdout


def test_coco_images_of_one_name_in_two_folders_are_skipped_and_named(tmp_path):
    write_image(tmp_path / "images/1.png", draw_pair(0)[0])
    write_image(tmp_path / "images/2.png", draw_pair(1)[0])
    polygon = [[10, 10, 40, 10, 40, 40, 10, 40]]
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": number, "file_name": name, "height": 60, "width": 80}
                   for number, name in enumerate(("a/1.png", "b/1.png", "upload/7/0123abcd-2.png"))],
        "annotations": [{"image_id": number, "category_id": 1, "segmentation": polygon} for number in range(3)]}))
    done = prepare_coco(tmp_path)
    assert "제외: 1.png - COCO 파일에 두 번 나옴 (a/1.png, b/1.png)" in done.stdout
    assert "Label Studio가 이름 앞에 붙인 글자를 이미지 1장" in done.stdout
    assert names(tmp_path / "data/masks/train") == ["2.png"]


def test_a_date_in_a_coco_name_is_no_prefix_and_repeated_or_unknown_ids_are_named(tmp_path):
    polygon = [[10, 10, 40, 10, 40, 40, 10, 40]]
    write_image(tmp_path / "images/patient_2.png", draw_pair(0)[0])
    write_image(tmp_path / "images/b.png", draw_pair(1)[0])
    coco = {"images": [{"id": 1, "file_name": "patient_20240101-2.png"}, {"id": 2, "file_name": "b.png"}],
            "annotations": [{"image_id": number, "segmentation": polygon} for number in (1, 2, 7)]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    done = prepare_coco(tmp_path)
    assert "제외: patient_2.png" in done.stdout and "제외: patient_20240101-2.png - 이미지 없음" in done.stdout
    assert "이미지의 객체 1개를 뺐습니다" in done.stdout
    coco["images"][1]["id"] = 1
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert_fails_in_one_line(prepare_coco(tmp_path, code=1), "번호가 같습니다", "b.png")


def test_coco_without_sizes_uses_those_of_the_image_and_skips_only_invalid_polygons(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    polygons = ([[10, 10, 40, 10, 40, 40, 10, 40]], [[5, 5, 6, 6]], [[50, 40, 60, 40, 60, 50, 50, 50]])
    coco = {"images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": polygon} for polygon in polygons]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    done = prepare_coco(tmp_path)
    labels = read_grey(tmp_path / "data/masks/train/a.png")
    assert labels.shape == (60, 80) and set(np.unique(labels)) == {0, 1, 2}
    assert "a.png의 객체 1개 - segmentation을 해석할 수 없음" in done.stdout


@pytest.mark.parametrize("coco, words", [
    ({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]},
     ["label_with_text.py", "--boxes"]),
    ({"images": [], "annotations": {}}, ["VIA", "COCO format"]),
    ({"a.png123": {"filename": "a.png", "regions": []}}, ["VIA", "COCO format"])])
def test_json_that_is_not_coco_is_refused_with_what_to_export_instead(tmp_path, coco, words):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert_fails_in_one_line(prepare_coco(tmp_path, code=1), "a.json", *words)


def test_check_reports_the_values_of_masks_added_by_hand_and_accepts_object_number_65535(data):
    write_image(data / "data/masks/train/pair_000.png", (draw_pair(0)[1] > 0).astype(np.uint8))
    write_image(data / "data/masks/train/pair_001.png", class_maps()["void"].astype(np.uint8))
    write_image(data / "data/masks/train/pair_002.png", np.where(SMALL, 65535, 0).astype(np.uint16))
    write_image(data / "data/masks/train/pair_003.png", np.dstack([np.full((60, 80, 3), 255, np.uint8), SMALL]))
    done = run("prepare_data.py", "--check", cwd=data, code=1)
    for name, values in (("pair_000.png", "(0, 1)"), ("pair_001.png", "(0, 1, 255)"), ("pair_003.png", "투명도")):
        line, = (line for line in done.stdout.splitlines() if name in line)
        assert "0과 255가 아님" in line and values in line
    assert "문제 3개" in done.stdout


@pytest.mark.parametrize("script, arguments, word", [
    ("prepare_data.py", ["--no-such-flag"], "--no-such-flag"),
    ("prepare_data.py", ["--val-ratio", "1"], "--val-ratio"),
    ("prepare_data.py", ["--images", "a"], "--coco"),
    ("prepare_data.py", ["--images", "a", "--masks", "b", "--coco", "c"], "--coco"),
    ("prepare_data.py", ["--preview", "0"], "--preview"),
    ("download_dataset.py", ["--checkpoint", "huge"], "base_plus")])
def test_a_wrong_command_line_is_a_usage_error(tmp_path, script, arguments, word):
    done = run(script, *arguments, cwd=tmp_path, code=2)
    assert done.stderr.startswith(f"usage: {script}") and word in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_run_without_arguments_creates_the_folders_and_explains_how_to_fill_them(tmp_path):
    done = run("prepare_data.py", cwd=tmp_path)
    for part in ("images/train", "images/val", "masks/train", "masks/val"):
        assert (tmp_path / "data" / part).is_dir()
    assert "--images" in done.stdout and "--coco" in done.stdout


def write_pairs(folder, names, images="images", masks="masks", suffix=""):
    """A drawn pair for each name, "a" or "folder/a"; all pictures differ."""
    for number, name in enumerate(names):
        image, mask = draw_pair(1000 + number)
        write_image(folder / images / f"{name}.png", image)
        write_image(folder / masks / f"{name}{suffix}.png", mask)


def split_of(folder, part="images"):
    return {split: names(folder / "data" / part / split) for split in ("train", "val")}


def prepare(folder, *arguments, masks="masks", **options):
    return run("prepare_data.py", "--images", "images", "--masks", masks, *arguments, cwd=folder, **options)


def test_folders_named_train_and_valid_are_the_split_and_test_is_not_used(tmp_path):
    write_pairs(tmp_path, ["train/a", "train/b", "train/deep/e", "valid/c", "test/d"])
    write_pairs(tmp_path, ["loose"])
    done = prepare(tmp_path)
    assert split_of(tmp_path) == {"train": ["a.png", "b.png", "deep__e.png"], "val": ["c.png"]}
    assert split_of(tmp_path, "masks") == split_of(tmp_path)
    assert json.loads((tmp_path / "data/split.json").read_text())["split"] == split_of(tmp_path)
    assert "test/" in done.stdout and "제외: loose.png - train/과 val/ 밖에 있음" in done.stdout
    shutil.rmtree(tmp_path / "masks")
    write_pairs(tmp_path, ["a", "b", "c"], images="unused")  # one folder of masks for both splits
    shutil.rmtree(tmp_path / "data")
    assert "학습 2쌍, 검증 1쌍" in prepare(tmp_path).stdout


def test_a_split_given_with_val_images_is_kept_and_recorded_in_split_json(tmp_path):
    write_pairs(tmp_path, ["a", "b", "c"])
    write_pairs(tmp_path, ["a"], "val_images", "val_masks")
    own = ("--val-images", "val_images", "--val-masks", "val_masks")
    done = prepare(tmp_path, *own)
    assert split_of(tmp_path) == {"train": ["a.png", "b.png", "c.png"], "val": ["a.png"]}
    assert "학습과 검증에 같은 이미지가 있습니다 - train/a.png = val/a.png" in done.stdout
    assert "이미 준비되어" in prepare(tmp_path, *own).stdout
    assert "학습 2쌍, 검증 1쌍" in prepare(tmp_path).stdout  # another split of the same files


def test_the_suffix_that_pairs_everything_is_printed_as_a_command(tmp_path):
    write_pairs(tmp_path, ["ISIC_1", "ISIC_12"], suffix="_segmentation")
    done = prepare(tmp_path, code=1)
    assert_fails_in_one_line(done, "python prepare_data.py --images images --masks masks --mask-suffix=_segmentation")
    prepare(tmp_path, "--mask-suffix=_segmentation")
    assert split_of(tmp_path)["train"] + split_of(tmp_path)["val"] == ["ISIC_1.png", "ISIC_12.png"]
    for path in (tmp_path / "masks").iterdir():  # masks beside the images, and a file with another suffix
        path.rename(tmp_path / "images" / path.name)
    write_image(tmp_path / "images/ISIC_1_segmentation_2.png", draw_pair(0)[1])
    shutil.rmtree(tmp_path / "data")
    done = prepare(tmp_path, "--mask-suffix=_segmentation", masks="images")
    assert "제외 1개" in done.stdout and "제외: ISIC_1_segmentation_2.png" in done.stdout


def test_subfolders_are_named_or_read_with_recursive_and_equal_names_are_skipped(tmp_path):
    stems = ["aachen/aachen_1", "bochum/bochum_1"]  # as Cityscapes
    write_pairs(tmp_path, [f"{stem}_left" for stem in stems])
    write_pairs(tmp_path, stems, images="unused", suffix="_ids")
    shutil.rmtree(tmp_path / "unused")
    for stem in stems:
        (tmp_path / f"masks/{stem}_left.png").unlink()
    assert "aachen/, bochum/" in prepare(tmp_path, code=1).stdout
    done = prepare(tmp_path, "--recursive", code=1)
    assert_fails_in_one_line(done, "하나도 없습니다")
    command = ("--mask-suffix=_ids", "--image-suffix=_left")
    (tmp_path / "images/aachen/loop").symlink_to(tmp_path / "images")  # is not followed
    assert "제외 0개" in prepare(tmp_path, "--recursive", *command, "--val-ratio", 0).stdout
    assert split_of(tmp_path)["train"] == ["aachen__aachen_1_left.png", "bochum__bochum_1_left.png"]
    write_pairs(tmp_path, ["a/b__c", "a__b/c"], masks="images/masks")  # the masks inside the images
    done = prepare(tmp_path, "--recursive", masks="images/masks", code=1)
    assert "제외: a/b__c.png - 이름이 같은 파일이 여럿: a/b__c.png, a__b/c.png" in done.stdout


def test_images_of_one_group_stay_on_one_side_of_the_split(tmp_path):
    stems = [f"{video}/{video}_f{frame:02}" for video in "abcd" for frame in range(10)]
    write_pairs(tmp_path, stems)
    done = prepare(tmp_path, "--recursive", "--val-ratio", 0.3)
    assert "주의: 이름이 영상 4개의 프레임 같고" in done.stdout and r"--group '^(.*?)\d+\.\w+$'" in done.stdout
    for flags in (["--group-by-folder"], ["--group", r"^(.*?)\d+\.\w+$"], ["--group", "[a-d]", "--shuffle-seed", "1"]):
        done = prepare(tmp_path, "--recursive", "--val-ratio", 0.3, *flags)
        sides = [{name[0] for name in split_of(tmp_path)[split]} for split in ("train", "val")]
        assert len(sides[0]) == 3 and len(sides[1]) == 1 and not sides[0] & sides[1] and "주의" not in done.stdout
    assert_fails_in_one_line(prepare(tmp_path, "--recursive", "--group", "patient", code=1), "--group", "a/a_f00.png")
    assert "묶음이 하나라" in prepare(tmp_path, "--recursive", "--group", "_f").stdout


def test_the_split_divides_no_group_and_is_nearest_to_the_ratio():
    groups = {f"{number}": f"{'aabbbbbbcc'[number]}" for number in range(10)}
    assert prepare_data.split_names(groups, 0.2, None)["val"] == ["8", "9"]
    assert prepare_data.split_names(groups, 0.6, None)["train"] == ["0", "1"]
    assert prepare_data.split_names({"1": "a", "2": "a", "3": "a"}, 0.2, None)["val"] == []
    assert prepare_data.split_names({"1": "a", "2": "b", "3": "b"}, 0.2, None)["train"] == ["1"]


def test_roboflow_copies_of_one_source_image_stay_on_one_side_of_the_split(tmp_path):
    write_pairs(tmp_path, [f"s{source}_jpg.rf.{copy * 32}" for source in range(4) for copy in "abc"])
    prepare(tmp_path)
    assert {name[:2] for name in split_of(tmp_path)["val"]} == {"s3"} and len(split_of(tmp_path)["val"]) == 3
    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(tmp_path / "masks")
    write_pairs(tmp_path, ["train/s_jpg.rf.aaa", "valid/s_jpg.rf.bbb"])
    assert "같은 묶음이 있습니다 - s_jpg.png" in prepare(tmp_path).stdout


def coco_of(folder, name, images, categories):
    """name.json with one square for each (category id, left) of {file name: [...]}; writes the images."""
    coco = {"images": [], "annotations": [], "categories": [{"id": key, "name": text} for key, text in categories]}
    for identity, (file, objects) in enumerate(images.items()):
        write_image(folder / "images" / file, draw_pair(identity + sum(name.encode()))[0])
        coco["images"].append({"id": identity, "file_name": file, "height": 60, "width": 80})
        coco["annotations"] += [{"image_id": identity, "category_id": category, "segmentation": [
            [left, 10, left + 10, 10, left + 10, 20, left, 20]]} for category, left in objects]
    (folder / f"{name}.json").write_text(json.dumps(coco), encoding="utf-8")


def test_classes_are_numbered_by_name_the_same_in_training_and_validation_coco_files(tmp_path):
    coco_of(tmp_path, "one", {"t/a.png": [(1, 5), (2, 40), (1, 60)], "t/none.png": []},
            [(0, "root"), (1, "용종"), (2, "x")])
    coco_of(tmp_path, "two", {"v/a.png": [(1, 5), (2, 40)]}, [(1, "x"), (2, "용종")])
    both = ("--images", "images", "--coco", "one.json", "--val-images", "images", "--val-coco", "two.json")
    done = run("prepare_data.py", *both, "--allow-empty", cwd=tmp_path)
    assert "클래스 용종, x" in done.stdout and "객체가 없는 이미지 1장" in done.stdout
    assert json.loads((tmp_path / "data/classes.json").read_text("utf-8")) == {"1": "용종", "2": "x"}
    labels = read_grey(tmp_path / "data/masks/train/t__a.png")
    assert [labels[15, x] for x in (10, 45, 65, 30)] == [1001, 2001, 1002, 0]
    assert [read_grey(tmp_path / "data/masks/val/v__a.png")[15, x] for x in (10, 45)] == [2001, 1001]
    checked = run("prepare_data.py", "--check", cwd=tmp_path).stdout
    assert "클래스: 용종 2개, x 1개" in checked and "객체가 없는 이미지 1장" in checked and "문제 없음" in checked
    (tmp_path / "data/classes.json").write_text('{"1": "용종"}', encoding="utf-8")
    assert "클래스의 값 2001" in run("prepare_data.py", "--check", cwd=tmp_path, code=1).stdout
    assert_fails_in_one_line(run("prepare_data.py", *both, "--merge", cwd=tmp_path, code=1), "classes.json")
    (tmp_path / "data/classes.json").unlink()
    coco = (tmp_path / "two.json").read_text("utf-8").replace('"category_id": 1', '"category_id": "1"')
    (tmp_path / "two.json").write_text(coco, encoding="utf-8")
    assert "categories에 없는 category_id의 객체 1개" in run("prepare_data.py", *both, cwd=tmp_path).stdout
    coco = coco.replace('"category_id": "1"', '"category_id": 1')
    (tmp_path / "two.json").write_text(coco, encoding="utf-8")
    run("prepare_data.py", *both, "--category", "용종", cwd=tmp_path)
    assert not (tmp_path / "data/classes.json").exists()
    assert set(np.unique(read_grey(tmp_path / "data/masks/val/v__a.png"))) == {0, 255}


@pytest.mark.parametrize("objects, classes", [(1, 65), (1001, 2)])
def test_too_many_classes_or_objects_are_refused_in_one_line(tmp_path, objects, classes):
    coco_of(tmp_path, "a", {"a.png": [(key, 5) for key in range(classes) for _ in range(objects)]},
            [(key, f"c{key}") for key in range(classes)])
    assert_fails_in_one_line(prepare_coco(tmp_path, code=1), "--category", "--merge")
    assert "학습 1쌍" in prepare_coco(tmp_path, "--merge").stdout


def test_each_page_of_a_tiff_stack_is_paired_with_its_page_of_the_mask(tmp_path):
    pairs = [draw_pair(number) for number in range(3)]
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    images = [Image.fromarray(image[..., ::-1].copy()) for image, _ in pairs]
    masks = [Image.fromarray((mask > 0).astype(np.uint16) * number) for number, (_, mask) in enumerate(pairs, start=7)]
    for path, pages in (("images/z.tif", images), ("masks/z.tif", masks)):
        pages[0].save(tmp_path / path, save_all=True, append_images=pages[1:], compression="tiff_lzw",
                      big_tiff=pages is masks)
    prepare_masks(tmp_path)
    for page, (image, mask) in enumerate(pairs, start=1):
        assert (cv2.imread(str(tmp_path / f"data/images/train/z_p{page:03}.png")) == image).all()
        written = read_grey(tmp_path / f"data/masks/train/z_p{page:03}.png")
        assert (written == (mask > 0) * (6 + page)).all()
    see_through = Image.fromarray(np.dstack([pairs[0][0], pairs[0][1]]))  # the mask is opaque
    black_is_one = [Image.fromarray(mask == 0) for _, mask in pairs]  # as tifffile writes boolean arrays:
    for page in black_is_one[1:]:
        page.encoderinfo = {"tiffinfo": {262: 0}}  # its name is in the first page only
    see_through.save(tmp_path / "images/z.tif", save_all=True, append_images=[see_through] * 2)
    black_is_one[0].save(tmp_path / "masks/z.tif", save_all=True, append_images=black_is_one[1:],
                         tiffinfo={262: 0, 305: "tifffile.py"})
    prepare_masks(tmp_path)
    for page, (_, mask) in enumerate(pairs, start=1):
        assert (read_grey(tmp_path / f"data/masks/train/z_p{page:03}.png") == mask).all()
        assert (cv2.imread(str(tmp_path / f"data/images/train/z_p{page:03}.png"))[pairs[0][1] == 0] == 255).all()
    images[0].save(tmp_path / "images/z.tif", save_all=True, append_images=images[1:])
    (tmp_path / "masks/z.tif").unlink()
    write_image(tmp_path / "masks/z_p002.png", pairs[1][1])
    done = prepare_masks(tmp_path)
    assert names(tmp_path / "data/images/train") == ["z_p002.png"]
    assert all(f"제외: z_p00{page}.tif - 마스크 없음" in done.stdout for page in (1, 3))


def with_tag(content, tag, value):
    """A little-endian TIFF file with another number in one of its tags."""
    start, = struct.unpack_from("<I", content, 4)
    places = range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12)
    place, = (place for place in places if struct.unpack_from("<H", content, place)[0] == tag)
    return content[:place + 8] + struct.pack("<I", value) + content[place + 12:]


def test_tiff_channels_and_stacks_that_opencv_misreads_are_refused(tmp_path):
    image, mask = draw_pair(0)
    for name in "abcdef":
        write_image(tmp_path / f"masks/{name}.png", mask)
    write_image(tmp_path / "images/a.tif", image.astype(np.uint16))
    deep = (tmp_path / "images/a.tif").read_bytes()
    (tmp_path / "images/b.tif").write_bytes(with_tag(deep, 262, 1))  # three grey channels, as GDAL writes them
    (tmp_path / "images/c.tif").write_bytes(with_tag(deep, 284, 2))  # channels one after the other
    for name, text in (("d", "ImageJ=1.54f\nimages=5\nslices=5\n"), ("e", '{"shape": [5, 60, 80], "truncated": true}'),
                       ("f", "ImageJ=1.54f\nimages=1\n")):
        Image.fromarray(image).save(tmp_path / f"images/{name}.tif", tiffinfo={270: text})
        with (tmp_path / f"images/{name}.tif").open("ab") as file:
            file.write(4 * image.tobytes())  # the other slices
    for folder, file in (("masks", Image.fromarray(mask)), ("images", Image.fromarray(image))):
        file.save(tmp_path / f"{folder}/i.tif", tiffinfo={270: "ImageJ=1.54f\nimages=5\n"})  # a page cut off a stack
    slices = [Image.fromarray(image[..., channel]) for channel in range(3)] * 2
    slices[0].save(tmp_path / "images/g.tif", save_all=True, append_images=slices[1:])  # three slices of two channels
    slices[0].save(tmp_path / "masks/g.tif", save_all=True, append_images=slices[1:3])
    write_image(tmp_path / "masks/h.png", mask)
    (tmp_path / "images/h.tif").write_bytes(deep[:len(deep) // 2])
    write_image(tmp_path / "masks/j.png", mask)
    (tmp_path / "images/j.tif").write_bytes(deep[:6])  # ends within the header, of which Pillow raises struct.error
    done = prepare_masks(tmp_path, "--threshold", "127", "--val-ratio", "0")
    assert "Warning" not in done.stderr  # by Pillow
    for name, words in (("b.tif", "채널을 뒤섞어"), ("c.tif", "채널을 뒤섞어"), ("d.tif", "스택을 한 장에"),
                        ("e.tif", "스택을 한 장에"), ("h.tif", "손상"), ("j.tif", "손상"),
                        ("g_p004.tif", "마스크 없음"), ("g_p001.tif", "장수가 다름: 이미지 6장, 마스크 3장")):
        assert [line for line in done.stdout.splitlines() if f"제외: {name} - " in line and words in line], name
    assert names(tmp_path / "data/images/train") == ["a.png", "f.png", "i.png"]


def test_masks_of_1_and_255_and_16_bit_masks_with_a_grey_edge_are_refused(tmp_path):
    image, mask = draw_pair(0)
    write_image(tmp_path / "images/a.png", image)
    write_image(tmp_path / "masks/a.png", np.where(mask > 0, 1, 255).astype(np.uint8))  # 255: void
    assert_fails_in_one_line(prepare_masks(tmp_path, code=1), "--void N", "--threshold 127")
    prepare_masks(tmp_path, "--void", "255", "--numbered")
    assert ((read_grey(tmp_path / "data/masks/train/a.png") > 0) == (mask > 0)).all()
    write_image(tmp_path / "masks/a.png", cv2.blur(mask, (2, 2)).astype(np.uint16) * 257)
    assert "번진 색인 마스크 (밝기로 나누려면 --threshold N)" in prepare_masks(tmp_path, code=1).stdout
    write_image(tmp_path / "masks/a.png", mask.astype(np.uint16) * 257)
    prepare_masks(tmp_path)
    assert (read_grey(tmp_path / "data/masks/train/a.png") == mask.astype(np.uint16) * 257).all()


@pytest.mark.parametrize("names_of_split", [("training", "validation"), ("train", "test")])
def test_recursive_keeps_a_split_named_training_and_does_not_train_on_test(tmp_path, names_of_split):
    for number, name in enumerate(names_of_split):
        image, mask = draw_pair(number)
        write_image(tmp_path / f"images/{name}/{name}.png", image)
        write_image(tmp_path / f"masks/{name}/{name}.png", mask)
    done = prepare_masks(tmp_path, "--recursive")
    if "test" in names_of_split:
        assert "읽지 않고 둡니다" in done.stdout and names(tmp_path / "data/images/train") == ["train__train.png"]
    assert names(tmp_path / "data/images/val") == ([] if "test" in names_of_split else ["validation.png"])


def test_links_to_files_that_are_missing_are_named(tmp_path):
    make_source(tmp_path, 2)
    for part in ("images", "masks"):
        (tmp_path / part / "absent.jpg").symlink_to("not_downloaded.jpg")  # as git-annex and DVC leave them
    assert_fails_in_one_line(prepare_masks(tmp_path, code=1), "absent.jpg")


def test_coco_names_with_percent_signs_and_sizes_of_0_or_as_text_are_read(tmp_path):
    files = {"my pic.png": ("my%20pic.png", 0, 0), "b 2.png": ("1a2b3c4d-b%202.png", "60", "80.0"),
             "c%20d.png": ("images/c%20d.png", 60.0, 80.0), "e%20f.png": ("upload/1/1a2b3c4d-e%20f.png", None, None),
             "patient_2.png": ("patient_deadbeef-2.png", 60, 80)}  # the last is of another image
    for number, name in enumerate(files):
        write_image(tmp_path / "images" / name, draw_pair(number)[0])
    polygon = [[10, 10, 40, 10, 40, 40, 10, 40]]
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": name, "file_name": name, "height": height, "width": width}
                   for name, height, width in files.values()],
        "annotations": [{"image_id": name, "category_id": 1, "segmentation": polygon}
                        for name, _, _ in files.values()]}))
    assert "제외: patient_2.png - 마스크 없음" in prepare_coco(tmp_path, "--val-ratio", "0").stdout
    for name in list(files)[:4]:
        mask = read_grey(tmp_path / "data/masks/train" / name)
        assert mask.shape == (60, 80) and (mask[10:40, 10:40] == 255).all() and (mask > 0).sum() == 900


def test_transparency_is_composited_over_white_and_cmyk_is_read(tmp_path):
    image, mask = draw_pair(3)
    rgba = np.dstack([image, np.full((60, 80), 255, np.uint8)])
    opaque = cv2.imencode(".png", rgba)[1].tobytes()
    rgba[:20, :, 3], rgba[20:30, :, 3] = 0, 102
    wanted = np.rint(image * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:].astype(float)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.webp", "c.tif"):
        Image.fromarray(rgba[..., [2, 1, 0, 3]]).save(tmp_path / "images" / name, lossless=True)
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    Image.fromarray(rgba[..., [2, 1, 0, 3]]).save(tmp_path / "images/turned.tif", exif=upside_down)
    (tmp_path / "images/opaque.png").write_bytes(opaque)
    Image.fromarray(image[..., ::-1].copy()).convert("CMYK").save(tmp_path / "images/cmyk.tif")
    for name in ("a", "b", "c", "turned", "opaque", "cmyk"):
        write_image(tmp_path / f"masks/{name}.png", mask)
    done = prepare_masks(tmp_path)
    assert "투명한 이미지 4장" in done.stdout
    for name, pixels in (("a", wanted), ("b", wanted), ("c", wanted), ("turned", wanted[::-1, ::-1]), ("cmyk", image)):
        assert np.abs(cv2.imread(str(tmp_path / f"data/images/train/{name}.png")).astype(int) - pixels).max() <= 1
    assert (tmp_path / "data/images/train/opaque.png").read_bytes() == opaque


def test_images_without_an_object_are_accepted_only_if_asked_for(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    write_image(tmp_path / "images/black.png", draw_pair(9)[0])
    write_image(tmp_path / "masks/black.png", np.zeros((60, 80), np.uint8))
    write_image(tmp_path / "images/unlabelled.png", draw_pair(8)[0])
    assert "제외: black.png - 마스크가 비어 있음" in prepare_masks(tmp_path).stdout
    done = prepare_masks(tmp_path, "--allow-empty")
    assert "객체가 없는 이미지 1장" in done.stdout and "제외: unlabelled.png" in done.stdout
    assert not read_grey(tmp_path / "data/masks/train/black.png").any()
    checked = run("prepare_data.py", "--check", cwd=tmp_path).stdout
    assert "train: 3쌍" in checked and "객체가 없는 이미지 1장" in checked and "문제 없음" in checked
    (tmp_path / "data/split.json").unlink()
    assert "train/black.png - 마스크가 비어 있음" in run("prepare_data.py", "--check", cwd=tmp_path, code=1).stdout


def test_a_coco_image_with_only_unusable_objects_is_not_accepted_as_empty(tmp_path):
    coco_of(tmp_path, "a", {"used.png": [(1, 5)], "empty.png": [], "other.png": [(2, 5)]}, [(1, "x"), (2, "y")])
    content = json.loads((tmp_path / "a.json").read_text())
    for number, annotation in enumerate(({"bbox": [1, 2, 3, 4]}, {"segmentation": [[1, 2]]},
                                         {"segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 1}), start=10):
        write_image(tmp_path / f"images/{number}.png", draw_pair(number)[0])
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        content["annotations"].append({"image_id": number, "category_id": 1, **annotation})
    (tmp_path / "a.json").write_text(json.dumps(content))
    done = prepare_coco(tmp_path, "--category", "x", "--allow-empty")
    assert split_of(tmp_path)["train"] == ["empty.png", "other.png", "used.png"]
    assert all(f"제외: {number}.png" in done.stdout for number in (10, 11, 12))


def test_check_lists_duplicate_cut_small_full_and_rotated_masks_and_preview_shows_problems_first(tmp_path):
    drawn = {"a": draw_pair(0), "b": draw_pair(0), "full": (draw_pair(1)[0], np.full((60, 80), 255, np.uint8)),
             "cut": (draw_pair(2)[0], rectangle(0, 20, 0, 20)), "tiny": (draw_pair(3)[0], rectangle(30, 33, 30, 33)),
             "turned": (draw_pair(4)[0], np.rot90(draw_pair(4)[1]).copy()), "fine": draw_pair(5)}
    for name, (image, mask) in drawn.items():
        write_image(tmp_path / f"data/images/train/{name}.png", image)
        write_image(tmp_path / f"data/masks/train/{name}.png", mask)
    done = run("prepare_data.py", "--check", "--preview", 1, cwd=tmp_path, code=1)
    for line in ("픽셀이 같은 이미지 1장이 한쪽에 더 있습니다: train/a.png = train/b.png",
                 "잘린 객체 1개: train/cut.png", "작은 객체 (100픽셀 미만) 1개: train/tiny.png",
                 "train/full.png - 마스크가 이미지 전체를 덮음",
                 "train/turned.png - 크기가 다름: 이미지 80x60, 마스크 60x80 (90도", "문제 2개"):
        assert line in done.stdout
    sheet = cv2.imread(str(tmp_path / "data/preview.png"))
    assert sheet[20, 20, 1] > sheet[20, 20, 0] + 30  # a problem comes first: `full` is green everywhere
    run("prepare_data.py", "--preview", 7, cwd=tmp_path)
    assert cv2.imread(str(tmp_path / "data/preview.png")).shape == (2 * 272, 6 * 256, 3)

"""prepare_data.py, as a user runs it."""

import errno
import json
import os
import signal
import unicodedata

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


def test_pairs_are_split_and_masks_become_true_pngs(tmp_path):
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


def test_bad_pairs_are_left_out_and_named(tmp_path):
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


def test_cut_and_damaged_files_are_refused_and_whole_ones_are_not(tmp_path):
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
            with pytest.raises(prepare_data.BadPair, match=name):
                prepare_data.decode(tmp_path / name, cv2.IMREAD_COLOR)
        for content in (whole, whole + b"a film after the photo \xff\xda \x89PNG"):
            (tmp_path / name).write_bytes(content)
            assert prepare_data.decode(tmp_path / name, cv2.IMREAD_COLOR).shape == (60, 80, 3)


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path):
    write_image(tmp_path / "images/a.png", draw_pair(0)[0])
    write_image(tmp_path / "masks/b.png", draw_pair(0)[1])
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "하나도 없습니다")
    assert names(tmp_path / "data") == [".lock"]


def test_second_run_does_nothing_and_another_split_replaces_the_first(tmp_path):
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


def test_files_put_there_by_hand_are_never_overwritten(tmp_path):
    make_source(make_data(tmp_path))
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "덮어쓰지 않습니다")
    assert len(names(tmp_path / "data/images/train")) == 6


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
def test_where_the_file_system_cannot_lock_one_line_warns_and_the_run_goes_on(tmp_path, number):
    make_source(tmp_path, 3)
    refuse = f"def flock(*_):\n    raise OSError({number}, {os.strerror(number)!r})\nimport fcntl\nfcntl.flock = flock"
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path, before=refuse)
    line, = done.stderr.strip().splitlines()
    assert line.startswith("주의: ") and os.strerror(number) in line
    assert "완료" in done.stdout


def test_masks_of_zero_and_one_and_coloured_masks_count(tmp_path):
    image, mask = draw_pair(1)
    red = np.zeros_like(image)
    red[mask > 0] = (0, 0, 255)
    for name, drawn in (("ones", mask // 255), ("red", red)):
        write_image(tmp_path / f"images/{name}.png", image)
        write_image(tmp_path / f"masks/{name}.png", drawn)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, cwd=tmp_path)
    for name in ("ones", "red"):
        assert (read_grey(tmp_path / f"data/masks/train/{name}.png") == mask).all()


def test_formats_that_the_scripts_do_not_read_become_png(tmp_path):
    image, mask = draw_pair(1)
    write_image(tmp_path / "images/slide.bmp", image)
    write_image(tmp_path / "masks/slide.png", mask)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0, cwd=tmp_path)
    assert (cv2.imread(str(tmp_path / "data/images/train/slide.png")) == image).all()


def rle_plain(mask):
    """Uncompressed RLE, worked out here: run lengths in column-major order, the first one of zeros."""
    flat = mask.T.ravel() > 0
    changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + runs}


def test_coco_polygons_and_both_kinds_of_rle(tmp_path):
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


def test_korean_names_pair_whether_macos_took_their_letters_apart_or_not(tmp_path):
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
                          ("val/pair_101.png", "손상됨")):
        line, = (line for line in done.stdout.splitlines() if name in line)
        assert problem in line
    assert "문제 5개" in done.stdout and "train: 3쌍" in done.stdout


def test_preview_is_a_sheet_of_n_tiles(data):
    run("prepare_data.py", "--preview", 8, cwd=data)
    sheet = cv2.imread(str(data / "data/preview.png"))
    assert sheet.shape == (2 * 256, 6 * 256, 3)
    green = (sheet[..., 1].astype(int) - sheet[..., 2] > 80).sum()
    assert green > 1000  # outlines are drawn
    assert (sheet[256:, 2 * 256:] == 255).all()  # the last four places stay empty


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


def test_without_arguments_it_makes_folders_and_explains(tmp_path):
    done = run("prepare_data.py", cwd=tmp_path)
    for part in ("images/train", "images/val", "masks/train", "masks/val"):
        assert (tmp_path / "data" / part).is_dir()
    assert "--images" in done.stdout and "--coco" in done.stdout

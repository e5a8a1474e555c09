"""Errors of users, networks, disks and terminals give one clear line and lose no data.

| tests | subject |
|---|---|
| images | every kind, damaged files, any size and name, unwritable folders |
| training | killed and resumed, two at once, damaged and harmful checkpoints, memory |
| arguments, terminals | any text, number or path, any encoding, a folder named sam2 |
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    ENV,
    FORK_SERVER,
    MODEL,
    ROOT,
    SMALL_CFG,
    assert_fails_in_one_line,
    draw_pair,
    make_data,
    run,
    write_image,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import compare_models
import test_my_image
import train_sam2_proper


def train(folder, weights, *arguments, **options):
    return run("train_sam2_proper.py", *MODEL, "--checkpoint", weights, *arguments, cwd=folder, **options)


def segment(folder, weights, image, *arguments, **options):
    return run("test_my_image.py", *MODEL, "--finetuned", weights, "--image", image, *arguments, cwd=folder, **options)


# ----------------------------------------------------------------------------- images

def save_kinds(folder):
    """The same picture (left half white) in every kind of file; returns their names."""
    picture = Image.new("RGB", (40, 30))
    picture.paste((255, 255, 255), (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    turned = picture.rotate(180)
    picture.save(folder / "plain.png")
    picture.save(folder / "high.jpg", quality=95)
    picture.save(folder / "progressive.jpg", progressive=True)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "rgba.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    turned.save(folder / "exif.jpg", exif=exif)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    picture.save(folder / "이름 with 🙂.webp", lossless=True)
    return sorted(path.name for path in folder.iterdir())


def test_images_of_every_format_and_depth_give_the_same_pixels(tmp_path):
    names = save_kinds(tmp_path)
    assert len(names) == 10
    for name in names:
        image = train_sam2_proper.read_image(tmp_path / name).astype(int)
        assert image.shape == (30, 40, 3), name
        assert image[:, 3:17].min() > 240 and image[:, 23:37].max() < 15, name


def test_truncated_and_damaged_files_are_refused_and_intact_ones_are_not(tmp_path):
    """By OpenCV, from version 4.13 on."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "FF D9 in here: \xff\xd9"
    for name, options in (("a.jpg", {"exif": exif}), ("b.jpg", {"progressive": True}), ("c.png", {})):
        picture.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        assert is_read(tmp_path / name, whole)
        assert is_read(tmp_path / name, whole + b"a film after the photo \xff\xda \x89PNG")
        for share in (0.4, 0.7, 0.95, 0.999):
            assert not is_read(tmp_path / name, whole[:int(share * len(whole))]), (name, share)
    middle = len(whole) // 2
    assert not is_read(tmp_path / "c.png", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    start = whole.index(b"IDAT") - 4
    assert not is_read(tmp_path / "c.png", whole[:start] + b"\xff\xff\xff\xff" + whole[start + 4:]), "a part of 4 GB"


def is_read(path, content):
    """Whether read_image accepts a file with this content."""
    path.write_bytes(content)
    try:
        return train_sam2_proper.read_image(path).size > 0
    except train_sam2_proper.ImageError:
        return False


@pytest.mark.parametrize("content", [b"", b"not an image", "cut.jpg", "cut.png"],
                         ids=["empty", "text", "jpeg", "png"])
def test_an_empty_or_truncated_image_is_named(tmp_path, weights, content):
    if isinstance(content, str):
        write_image(tmp_path / content, draw_pair(0)[0])
        content = (tmp_path / content).read_bytes()[:-1000]
    (tmp_path / "bad.jpg").write_bytes(content)
    done = segment(tmp_path, weights, "bad.jpg", "-p", "1,1", code=1)
    done.stderr = re.sub("^libpng error: .*\n", "", done.stderr)  # libpng's own message, which OpenCV passes on
    assert_fails_in_one_line(done, "bad.jpg", "손상")


@pytest.mark.parametrize("width, height", [(1, 1), (12000, 20)])
def test_tiny_and_huge_images_are_segmented(tmp_path, weights, width, height):
    write_image(tmp_path / "a.png", np.full((height, width, 3), 90, np.uint8))
    segment(tmp_path, weights, "a.png", "-p", "0,0")
    assert cv2.imread(str(tmp_path / "output/my_results/a_mask.png")).shape == (height, width, 3)


def test_an_animated_gif_is_read_as_its_first_frame_or_refused(tmp_path, weights):
    frames = [Image.new("RGB", (40, 30), color) for color in ("white", "black")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    try:
        assert train_sam2_proper.read_image(tmp_path / "moving.gif").min() > 200
    except train_sam2_proper.ImageError as error:  # OpenCV before 4.11
        assert "moving.gif" in str(error)


def test_full_and_inverted_masks_train_empty_ones_are_counted_and_other_sizes_are_refused(tmp_path, weights):
    """Full and inverted ones train, another size is named, an empty one is counted."""
    make_data(tmp_path, train=3, val=1)
    masks = tmp_path / "data/masks/train"
    write_image(masks / "pair_000.png", np.full((60, 80), 255, np.uint8))
    write_image(masks / "pair_001.png", 255 - draw_pair(1)[1])
    write_image(masks / "pair_002.png", np.zeros((60, 80), np.uint8))
    done = train(tmp_path, weights, "--iterations", 6)
    assert "학습 2장, 객체 2개 (전경 100픽셀 미만이라 뺀 객체 0개)" in done.stdout
    assert "학습 이미지 중 객체가 없는 것 1장" in done.stdout
    write_image(masks / "pair_002.png", draw_pair(2)[1][:50])
    done = train(tmp_path, weights, "--iterations", 30, code=1)
    assert_fails_in_one_line(done, "pair_002", "크기")


def test_two_images_with_the_same_stem_are_refused(data, weights):
    shutil.copy(data / "data/images/train/pair_000.png", data / "data/images/train/pair_000.jpg")
    assert_fails_in_one_line(train(data, weights, code=1), "pair_000.jpg", "pair_000.png")


def test_symbolic_links_and_any_names_work_in_every_script(tmp_path, weights):
    names = ["사 진.png", "emoji 🙂 $\\foo$.png", "link.png", "10% {0} [1].png", "-i.png"]
    if sys.platform == "linux":  # a name from a Korean Windows, not valid UTF-8
        names.append(os.fsdecode("용종.png".encode("cp949")))
    for number, name in enumerate(names):
        image, mask = draw_pair(number)
        write_image(tmp_path / "elsewhere" / f"{number}.png", image)
        write_image(tmp_path / "masks" / name, mask)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere" / f"{number}.png")
    for _ in range(2):
        done = run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0.5, cwd=tmp_path)
    assert "이미 준비되어" in done.stdout
    shutil.rmtree(tmp_path / "data/images/val")
    (tmp_path / "data/images/val").symlink_to(tmp_path / "images")
    shutil.rmtree(tmp_path / "data/masks/val")
    (tmp_path / "data/masks/val").symlink_to(tmp_path / "masks")
    train(tmp_path, weights, "--iterations", 3)
    done = run("compare_models.py", *MODEL, "--checkpoint", weights, "--num-visualize", 9, cwd=tmp_path)
    assert "Warning" not in done.stderr
    with (tmp_path / "output/comparison/per_image.csv").open(encoding="utf-8", errors="surrogateescape") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {*names, "'-i.png"} - {"-i.png"}  # not a formula
    done = segment(tmp_path, weights, "images", "-p", "5,5", "--compare", "--checkpoint", weights)
    assert "Warning" not in done.stderr
    for name in names:
        assert (tmp_path / f"output/my_results/{name.removesuffix('.png')}_result.png").is_file()
    segment(tmp_path, weights, f"images/{names[-1]}", "--everything", "--points-per-side", 2)
    coco = json.loads((tmp_path / f"output/my_results/{names[-1][:-4]}_everything.json").read_text(encoding="utf-8"))
    assert coco["images"][0]["file_name"] == names[-1]


@pytest.mark.parametrize("script, arguments", [
    ("train_sam2_proper.py", ("--iterations", 2, "--output-dir")),
    ("compare_models.py", ("--finetuned", "small.pt", "--output-dir")),
    ("test_my_image.py", ("--finetuned", "small.pt", "-i", "data/images/val/pair_100.png", "-p", "5,5", "-o"))])
@pytest.mark.parametrize("place", ["file/output", "/proc/nothing"])
def test_an_output_folder_that_cannot_be_written_is_named(data, weights, script, arguments, place):
    (data / "file").write_text("in the way")
    shutil.copy(weights, data / "small.pt")
    done = run(script, *MODEL, "--checkpoint", "small.pt", *arguments, place, cwd=data, code=1)
    assert_fails_in_one_line(done, place.split("/")[0] or "/proc")


# ----------------------------------------------------------------------------- training

KILLED_AT_STEP = """
import pathlib
import torch
steps = [0]
def count(function):
    def counted(*arguments, **options):
        steps[0] += 1
        if steps[0] == {}:
            os.kill(os.getpid(), 9)
        return function(*arguments, **options)
    return counted
for kind, name in ((pathlib.Path, "replace"), (torch.optim.AdamW, "step")):
    setattr(kind, name, count(getattr(kind, name)))
def open_counted(self, mode="r", *more, original=pathlib.Path.open, **how):
    return (count(original) if mode == "wb" else original)(self, mode, *more, **how)
pathlib.Path.open = open_counted
"""  # five iterations, then two steps for each of the files that are written


def test_a_training_killed_twenty_times_and_resumed_loses_nothing(tmp_path, weights):
    make_data(tmp_path, train=4, val=2)
    argv = [str(ROOT / "train_sam2_proper.py"), *map(str, MODEL), "--checkpoint", str(weights),
            "--iterations", "100000"]
    settings = ["--lr", "1e-3", "--save-every", "5"]
    best, reached = 0.0, 0
    for step in range(20):
        resume = ["--resume"] if (tmp_path / "output/sam2_last.pt").is_file() else settings
        done = FORK_SERVER.run([*argv, *resume], tmp_path, ENV, 600, before=KILLED_AT_STEP.format(6 + step))
        assert done.returncode == -9, done.stderr
        if not (tmp_path / "output/sam2_last.pt").is_file():
            continue
        last = torch.load(tmp_path / "output/sam2_last.pt", weights_only=True)
        torch.load(tmp_path / "output/sam2_best.pt", weights_only=True)
        assert last["best"] >= best and last["iteration"] >= reached
        best, reached = last["best"], last["iteration"]
    assert reached >= 5
    train(tmp_path, weights, "--iterations", reached + 5, "--resume")
    summary = json.loads((tmp_path / "output/training_summary.json").read_text(encoding="utf-8"))
    assert summary["best_iou"] >= best and not list((tmp_path / "output").glob("*.tmp"))
    run("compare_models.py", *MODEL, "--checkpoint", weights, cwd=tmp_path)  # sam2_best.pt has the IoU in the summary
    compared = json.loads((tmp_path / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["finetuned_iou"] == summary["best_iou"]


def test_a_second_training_in_the_same_folder_is_refused_while_the_first_lives(data, weights):
    first = subprocess.Popen([sys.executable, str(ROOT / "train_sam2_proper.py"), *map(str, MODEL), "--checkpoint",
                              str(weights), "--iterations", "100000", "--save-every", "5"], cwd=data, env=ENV,
                             stdout=subprocess.PIPE, encoding="utf-8")
    with first:
        while "[5/" not in (line := first.stdout.readline()):
            assert line  # else it has ended
        assert_fails_in_one_line(train(data, weights, "--iterations", 2, code=1), "이미 실행 중", "output")
        first.kill()
    train(data, weights, "--iterations", 2)


def test_a_checkpoint_truncated_at_any_byte_is_refused(tmp_path, weights):
    content = weights.read_bytes()
    for cut in [0, 1, 4, 100, *np.random.default_rng(0).integers(0, len(content), 12), len(content) - 1]:
        (tmp_path / "cut.pt").write_bytes(content[:cut])
        with pytest.raises(SystemExit, match="cut.pt"):
            train_sam2_proper.load_predictor(SMALL_CFG, tmp_path / "cut.pt", "cpu")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_that_would_run_code_is_refused(data, weights, tmp_path):
    torch.save({"model": torch.load(weights, weights_only=True)["model"], "extra": Harmful()}, data / "evil.pt")
    assert_fails_in_one_line(train(data, data / "evil.pt", code=1), "evil.pt")
    (data / "output").mkdir(exist_ok=True)
    shutil.copy(data / "evil.pt", data / "output/sam2_last.pt")
    assert_fails_in_one_line(train(data, weights, "--resume", code=1), "sam2_last.pt")
    for script, arguments in (("compare_models.py", ()), ("test_my_image.py", (
            "-i", "data/images/val/pair_100.png", "-p", "5,5"))):
        done = run(script, *MODEL, "--checkpoint", weights, "--finetuned", "evil.pt", *arguments, cwd=data, code=1)
        assert_fails_in_one_line(done, "evil.pt")
    assert not (data / "harm").exists()


@pytest.mark.parametrize("error", [
    "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
    "RuntimeError('MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)')",
    "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 9 bytes')"],
    ids=["cuda", "mps", "cpu"])
def test_out_of_memory_names_the_flags_that_help(data, weights, error):
    step = f"import torch\ndef step(*_):\n    raise {error}\ntorch.optim.AdamW.step = step"
    done = train(data, weights, "--iterations", 2, code=1, before=step)
    assert_fails_in_one_line(done, "메모리", "--batch-size", "--image-size 512")


# ----------------------------------------------------------------------------- arguments and terminals

NUMBERS = st.one_of(st.text("0123456789.,;-+eEinfax ", max_size=30), st.text(max_size=20))


@settings(deadline=None, max_examples=400)
@given(NUMBERS)
def test_any_text_for_the_flag_point_gives_points_or_a_usage_error(text):
    try:
        points = test_my_image.parse_points(text)
    except argparse.ArgumentTypeError as error:
        assert str(error)
    else:
        assert points and all(np.isfinite(point).all() and point[2] in (0, 1) for point in points)


@settings(deadline=None, max_examples=400)
@given(NUMBERS)
def test_any_text_for_the_flag_box_gives_boxes_or_a_usage_error(text):
    try:
        boxes = test_my_image.parse_boxes(text)
    except argparse.ArgumentTypeError as error:
        assert str(error)
    else:
        assert boxes and all(x1 < x2 and y1 < y2 and np.isfinite([x1, y1, x2, y2]).all() for x1, y1, x2, y2 in boxes)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(-10, 100)), max_size=3),
       st.integers(1, 60), st.integers(1, 60))
def test_points_outside_the_image_are_refused_with_its_size(points, width, height):
    image = np.zeros((height, width, 3), np.uint8)
    inside = all(0 <= x < width and 0 <= y < height for x, y in points)
    try:
        test_my_image.check_prompts("a.png", image, [(x, y, 1) for x, y in points], [], None)
    except test_my_image.ImageError as error:
        assert not inside and f"가로 {width}, 세로 {height}픽셀" in str(error)
    else:
        assert inside


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["--lr", "--iterations", "--seed", "--warmup", "--cache-gb", "--max-grad-norm", "--patience"]),
       st.text(max_size=12).filter(lambda text: text != "--"))  # which argparse before Python 3.13 drops
def test_any_text_for_a_numeric_flag_gives_a_number_or_a_usage_error(flag, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_sam2_proper.py", f"{flag}={text}"])
        try:
            args = train_sam2_proper.parse_args()
        except SystemExit as stop:
            assert stop.code == 2  # argparse's own
        else:
            assert getattr(args, flag[2:].replace("-", "_")) >= 0


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_any_path_without_an_image_is_named(tmp_path_factory, text):
    path = os.path.join(tmp_path_factory.getbasetemp(), "nothing", text)  # noqa: PTH118  (any text at all)
    try:
        train_sam2_proper.read_image(path)
    except train_sam2_proper.ImageError as error:
        assert str(path) in str(error)
    else:
        raise AssertionError("there is no such image")


@pytest.mark.parametrize("script", ["train_sam2_proper.py", "compare_models.py", "test_my_image.py"])
def test_a_flag_without_its_value_is_a_usage_error(tmp_path, script):
    assert "--device" in run(script, "--device", cwd=tmp_path, code=2).stderr.splitlines()[-1]  # without its value


@pytest.mark.parametrize("terminal", [
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp949"}], ids=["C", "cp949"])
def test_messages_on_a_terminal_without_utf8_are_degraded_but_never_fail(data, weights, terminal):
    environment = {name: value for name, value in ENV.items() if not name.startswith("LC_")} | terminal
    encoding = terminal.get("PYTHONIOENCODING", "ascii")
    for arguments in (["train_sam2_proper.py", "--iterations", "3"], ["prepare_data.py", "--check"]):
        model = [] if arguments[0] == "prepare_data.py" else [*map(str, MODEL), "--checkpoint", str(weights)]
        done = subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:], *model], cwd=data,
                              env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"Error" not in done.stderr and b"\r" not in done.stderr  # no bar without a terminal
        text = done.stdout.decode(encoding)
        assert ("IoU" if model else "train: 6") in text
        assert "학습" in text if encoding == "cp949" and arguments[0] == "train_sam2_proper.py" else True


def test_a_folder_named_sam2_beside_the_script_ends_in_one_line(tmp_path):
    """For example a copy of the official repository in the project, with or without the installed package."""
    shutil.copy(ROOT / "compare_models.py", tmp_path)
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2/__init__.py").write_text("")
    done = subprocess.run([sys.executable, "compare_models.py"], cwd=tmp_path, env=ENV, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 1
    assert_fails_in_one_line(done, "sam2", "이름", "-r requirements.txt")


def test_a_project_folder_named_sam2_is_warned_about(tmp_path):
    (tmp_path / "sam2").mkdir()
    shutil.copy(ROOT / "compare_models.py", tmp_path / "sam2")
    done = subprocess.run([sys.executable, "compare_models.py"], cwd=tmp_path / "sam2", env=ENV, capture_output=True,
                          encoding="utf-8")
    first, second = done.stderr.strip().splitlines()
    assert "sam2" in first and "바꾸" in first and second.startswith("오류: 파인튜닝한 모델이 없습니다")


def test_the_printed_result_box_can_be_encoded_in_cp949(data, weights):
    assert compare_models.result_box(0.5, 0.6).encode("cp949")


def test_a_checkpoint_with_a_changed_byte_is_refused(data, weights):
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    (data / "changed.pt").write_bytes(content)
    done = segment(data, data / "changed.pt", "data/images/val/pair_100.png", "--point", "40,30", code=1)
    assert_fails_in_one_line(done, "changed.pt", "CRC")

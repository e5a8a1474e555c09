"""test_my_image.py: points and boxes on the command line, and the window they replace."""

import os
import re
import shutil
import subprocess
import sys
import time

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, draw_pair, run, write_image
from matplotlib import pyplot as plt
from matplotlib.backend_bases import MouseEvent
from sam2.build_sam import build_sam2

import test_my_image

matplotlib.use("Agg")
NO_DISPLAY = {"DISPLAY": None, "WAYLAND_DISPLAY": None, "MPLBACKEND": None}


@pytest.fixture
def photo(tmp_path):
    write_image(tmp_path / "내 사진.png", draw_pair(3)[0])
    return tmp_path / "내 사진.png"


def segment(photo, weights, *arguments, **options):
    return run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--finetuned", weights,
               "--device", "cpu", *arguments, cwd=photo.parent, **options)


def read_mask(folder, name="내 사진"):
    return cv2.imdecode(np.fromfile(folder / f"{name}_mask.png", np.uint8), cv2.IMREAD_UNCHANGED)


def predict_with_sam2(photo, weights, **prompt):
    """The best mask as sam2's own predictor gives it, without this project's code but for the loading."""
    predictor = test_my_image.load_predictor(SMALL_CFG, weights, "cpu")
    image = cv2.imdecode(np.fromfile(photo, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].copy()
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(**prompt, multimask_output=True)
    return masks[int(np.argmax(scores))] > 0.5


def test_points_give_the_best_mask_that_sam2_gives(photo, weights):
    done = segment(photo, weights, "--point", "40,30,1;5,5,0", env=NO_DISPLAY)
    mask = read_mask(photo.parent / "output/my_results")
    assert mask.shape == (60, 80) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
    wanted = predict_with_sam2(photo, weights, point_coords=np.array([[40, 30], [5, 5]]),
                               point_labels=np.array([1, 0]))
    assert wanted.any() and ((mask > 0) == wanted).all()
    result = cv2.imdecode(np.fromfile(photo.parent / "output/my_results/내 사진_result.png", np.uint8), 1)
    assert result.shape[1] == 1600 and result.std() > 10
    assert "내 사진_mask.png" in done.stdout


def test_a_box_gives_the_mask_that_sam2_gives(photo, weights):
    segment(photo, weights, "--box", "60,50,20,10", "-o", "boxed", env=NO_DISPLAY)
    wanted = predict_with_sam2(photo, weights, box=np.array([20, 10, 60, 50]))
    assert ((read_mask(photo.parent / "boxed") > 0) == wanted).all()


def test_original_and_missing_model(photo, weights):
    common = ("--image", photo.name, "--model-cfg", SMALL_CFG, "--device", "cpu", "--point", "40,30")
    done = run("test_my_image.py", *common, "--checkpoint", weights, cwd=photo.parent)
    assert "아직 없어 원본 모델" in done.stdout
    before = read_mask(photo.parent / "output/my_results")
    done = run("test_my_image.py", *common, "--checkpoint", weights, "--original", cwd=photo.parent)
    assert "아직 없어" not in done.stdout and "small.pt" in done.stdout
    assert (read_mask(photo.parent / "output/my_results") == before).all()
    assert_fails_in_one_line(run("test_my_image.py", *common, cwd=photo.parent, code=1), "make demo")


def test_point_outside_the_image_is_refused_with_its_size(photo, weights):
    assert_fails_in_one_line(segment(photo, weights, "-p", "80,10", code=1), "(80, 10)", "가로 80", "세로 60")
    assert_fails_in_one_line(segment(photo, weights, "--box", "0,0,81,60", code=1), "(81, 60)", "가로 80", "세로 60")
    segment(photo, weights, "--box", "0,0,80,60")


def test_a_file_that_is_no_image_is_named(photo, weights):
    photo.write_bytes(b"not an image")
    assert_fails_in_one_line(segment(photo, weights, "-p", "8,10", code=1), "내 사진.png")


def test_without_a_display_it_says_so_before_the_model_is_loaded(photo):
    done = segment(photo, "missing.pt", env=NO_DISPLAY, code=1)
    assert_fails_in_one_line(done, "--point")
    if sys.platform == "linux":
        assert "python3-tk" in done.stderr


def test_terminal_without_hangul_degrades_and_never_raises(photo, weights):
    done = segment(photo, weights, "-p", "40,30", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii() and "?" in done.stdout
    done = segment(photo, weights, "-p", "400,30", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, code=1)
    assert done.stderr.isascii() and "80" in done.stderr


def test_the_real_architecture_runs_through_its_official_name(photo, tmp_path):
    """SAM 2.1 tiny at 1024 px with random weights: that it loads and runs, not what it finds."""
    name = "configs/sam2.1/sam2.1_hiera_t.yaml"
    torch.save({"model": build_sam2(name, device="cpu").state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
    run("test_my_image.py", "--image", photo.name, "--model-cfg", name, "--checkpoint", "sam2.1_hiera_tiny.pt",
        "--original", "--point", "40,30", "--device", "cpu", cwd=tmp_path)
    assert read_mask(tmp_path / "output/my_results").shape == (60, 80)


# ----------------------------------------------------------------------------- the window

def click(figure, x, y, button):
    """A click at image pixel (x, y), through the whole of matplotlib's event chain."""
    across, down = figure.axes[0].transData.transform((x, y))
    figure.canvas.callbacks.process("button_press_event",
                                    MouseEvent("button_press_event", figure.canvas, across, down, button))


@pytest.fixture
def window():
    """A window on an 80 x 60 image: (figure, the list of points that clicks fill)."""
    points = test_my_image.open_window(draw_pair(3)[0])
    figure = plt.gcf()
    figure.canvas.draw()
    yield figure, points
    plt.close(figure)


def test_left_is_foreground_and_right_is_background(window):
    figure, points = window
    click(figure, 40, 30, 1)
    click(figure, 5.25, 6, 3)
    assert points == [(40, 30, 1), (5.2, 6, 0)]
    assert len(figure.axes[0].collections) == 2  # both are drawn


def test_other_buttons_and_clicks_outside_the_image_place_nothing(window):
    figure, points = window
    click(figure, 40, 30, 2)
    click(figure, -20, 30, 1)
    click(figure, 40, 300, 1)
    click(figure, -0.4, 30, 1)  # inside the axes, half a pixel outside the image
    assert points == []


def test_clicks_while_the_toolbar_zooms_place_nothing(window):
    figure, points = window
    figure.canvas.toolbar = type("Toolbar", (), {"mode": "zoom rect"})()
    click(figure, 40, 30, 1)
    assert points == []


@pytest.fixture
def screen():
    """A virtual screen with a window manager: the value for DISPLAY."""
    missing = [tool for tool in ("Xvfb", "openbox", "xdotool") if not shutil.which(tool)]
    try:
        import tkinter  # noqa: F401
    except ImportError:
        missing.append("tkinter")
    if missing:
        reason = f"the real window needs {', '.join(missing)}"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    read, write = os.pipe()
    xvfb = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x1024x24"], pass_fds=[write],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        display = f":{pipe.readline().strip()}"
    manager = subprocess.Popen(["openbox"], env={**os.environ, "DISPLAY": display},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield display
    for process in (manager, xvfb):
        process.terminate()
        process.wait()


def test_real_window_two_clicks_and_close(photo, weights, screen):
    env = {**os.environ, "DISPLAY": screen, "MPLBACKEND": "TkAgg", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    script = subprocess.Popen(
        [sys.executable, str(ROOT / "test_my_image.py"), "--image", photo.name, "--model-cfg", str(SMALL_CFG),
         "--finetuned", str(weights), "--device", "cpu", "-o", "clicked"],
        cwd=photo.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    def xdotool(*arguments):
        return subprocess.run(["xdotool", *map(str, arguments)], env=env, check=True, timeout=60,
                              capture_output=True, text=True).stdout

    try:
        found = xdotool("search", "--sync", "--onlyvisible", "--name", "Figure 1").split()[0]
        time.sleep(1.5)  # until it has drawn itself
        size = dict(re.findall(r"(WIDTH|HEIGHT)=(\d+)", xdotool("getwindowgeometry", "--shell", found)))
        width, height = int(size["WIDTH"]), int(size["HEIGHT"])
        for x, y, button in ((width // 2, height // 2, 1), (width // 3, height // 3, 3)):
            xdotool("mousemove", "--window", found, x, y, "click", button)
            time.sleep(0.5)
        xdotool("key", "alt+F4")  # the window manager asks the window to close, as its button does
        output, _ = script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == 0, output
    points = re.search(r'--point "([^"]+)"', output.split("찍은 점", 1)[1])[1]
    assert [part.split(",")[2] for part in points.split(";")] == ["1", "0"]

    segment(photo, weights, "--point", points, "-o", "typed")
    assert (read_mask(photo.parent / "clicked") == read_mask(photo.parent / "typed")).all()

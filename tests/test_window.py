"""test_my_image.py: prompts on the command line, and the window they replace."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SMALL_CFG, assert_fails_in_one_line, draw_pair, run, save_small_model, write_image
from matplotlib import pyplot as plt
from matplotlib.backend_bases import KeyEvent, MouseEvent
from pycocotools import mask as coco_mask
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
    assert result.shape[1] >= 1400 and result.std() > 10
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


def test_the_real_architecture_runs_through_its_official_name(photo, tmp_path):
    """SAM 2.1 tiny at 1024 px with random weights: that it loads and runs, not what it finds."""
    name = "configs/sam2.1/sam2.1_hiera_t.yaml"
    torch.save({"model": build_sam2(name, device="cpu").state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
    run("test_my_image.py", "--image", photo.name, "--model-cfg", name, "--checkpoint", "sam2.1_hiera_tiny.pt",
        "--original", "--point", "40,30", "--device", "cpu", cwd=tmp_path)
    assert read_mask(tmp_path / "output/my_results").shape == (60, 80)


def test_points_and_a_box_together_and_several_boxes(photo, weights):
    segment(photo, weights, "--box", "10,10,60,50", "--point", "40,30,1;70,5,0", "-o", "both")
    both = predict_with_sam2(photo, weights, box=np.array([10, 10, 60, 50]),
                             point_coords=np.array([[40, 30], [70, 5]]), point_labels=np.array([1, 0]))
    assert (read_mask(photo.parent / "both") > 0).tolist() == both.tolist()
    segment(photo, weights, "--box", "10,10,40,50;45,5,75,30", "--point", "60,20", "-o", "two")
    one = predict_with_sam2(photo, weights, box=np.array([10, 10, 40, 50]))
    other = predict_with_sam2(photo, weights, box=np.array([45, 5, 75, 30]), point_coords=np.array([[60, 20]]),
                              point_labels=np.array([1]))  # the point belongs to the box around it
    assert (read_mask(photo.parent / "two") > 0).tolist() == (one | other).tolist()
    done = segment(photo, weights, "--box", "10,10,40,50;45,5,75,30", "--point", "2,2", code=1)
    assert_fails_in_one_line(done, "(2, 2)", "상자")


def test_a_rough_mask_is_the_prompt(photo, weights):
    rough = draw_pair(3)[1]
    write_image(photo.parent / "rough.png", rough)
    segment(photo, weights, "--mask", "rough.png")
    small = cv2.resize((rough > 0).astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
    wanted = predict_with_sam2(photo, weights, mask_input=20 * small[None] - 10)
    assert (read_mask(photo.parent / "output/my_results") > 0).tolist() == wanted.tolist()
    write_image(photo.parent / "rough.png", rough[:50])
    assert_fails_in_one_line(segment(photo, weights, "--mask", "rough.png", code=1), "세로 50", "세로 60")


def test_refine_gives_the_best_logits_back(photo, weights):
    segment(photo, weights, "--point", "40,30", "--refine", 2)
    predictor = test_my_image.load_predictor(SMALL_CFG, weights, "cpu")
    predictor.set_image(test_my_image.read_image(photo))
    logits = None
    for _ in range(3):
        masks, scores, low_res = predictor.predict(np.array([[40, 30]]), np.array([1]), mask_input=logits)
        logits = low_res[scores.argmax()][None]
    assert (read_mask(photo.parent / "output/my_results") > 0).tolist() == (masks[scores.argmax()] > 0).tolist()


def test_a_folder_of_images_is_segmented_and_a_bad_file_reported(photo, weights):
    folder = photo.parent / "많은 사진"
    for number in range(3):
        write_image(folder / f"{number}.png", draw_pair(number)[0])
    write_image(folder / "1.jpg", draw_pair(4)[0])  # the same stem twice
    (folder / "broken.jpg").write_bytes(b"broken")
    write_image(folder / "tiny.png", draw_pair(5)[0][:20, :20])  # the point lies outside
    (folder / "note.txt").write_text("no image")
    done = run("test_my_image.py", "--image", "많은 사진", photo.name, "--point", "40,30", "--model-cfg", SMALL_CFG,
               "--finetuned", weights, "--device", "cpu", cwd=photo.parent, code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("오류: ")]
    assert len(lines) == 3 and "broken.jpg" in lines[0] and "tiny.png" in lines[1] and "가로 20" in lines[1]
    assert "2장은 분할하지 못했습니다" in lines[2] and "이미지 5장을 분할했습니다" in done.stdout
    results = {path.name for path in (photo.parent / "output/my_results").iterdir()}
    assert results == {f"{name}_{kind}.png" for name in ("0", "1_png", "1_jpg", "2", "내 사진")
                       for kind in ("result", "mask")}
    segment(photo, weights, "--point", "40,30", "-o", "alone")
    assert (read_mask(photo.parent / "alone") == read_mask(photo.parent / "output/my_results")).all()


def test_everything_is_written_as_overlay_label_map_and_coco(photo, weights):
    image = np.full((120, 160, 3), 60, np.uint8)
    for centre, colour in (((40, 40), (200, 120, 40)), ((110, 80), (60, 60, 220))):
        cv2.circle(image, centre, 25, colour, -1)
    write_image(photo, image)
    arguments = ("--everything", "--points-per-side", 8, "--pred-iou-thresh", 0.5, "--stability-score-thresh", 0.6)
    run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--original", "--checkpoint",
        ROOT / "demo/sam2_demo.pt", "--device", "cpu", *arguments, cwd=photo.parent)
    folder = photo.parent / "output/my_results"
    coco = json.loads((folder / "내 사진_everything.json").read_text(encoding="utf-8"))
    labels = cv2.imdecode(np.fromfile(folder / "내 사진_labels.png", np.uint8), cv2.IMREAD_UNCHANGED)
    assert coco["images"] == [{"id": 1, "file_name": "내 사진.png", "width": 160, "height": 120}]
    assert labels.shape == (120, 160) and labels.dtype == np.uint16
    found = coco["annotations"]
    assert len(found) >= 2 and [item["id"] for item in found] == list(range(1, len(found) + 1))
    covered = np.zeros((120, 160), np.uint16)
    for item in found:
        mask = coco_mask.decode(item["segmentation"]) > 0
        rows, columns = np.nonzero(mask)
        assert item["area"] == mask.sum() and 0.5 < item["score"] and 0.6 <= item["stability_score"] <= 1
        assert item["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        covered[mask] = item["id"]
    assert (covered == labels).all()
    assert labels[40, 40] and labels[80, 110] and labels[40, 40] != labels[80, 110]  # both discs
    assert cv2.imdecode(np.fromfile(folder / "내 사진_everything.png", np.uint8), 1).shape == image.shape
    # what is written, prepare_data.py reads
    write_image(photo.parent / "images" / photo.name, image)
    done = run("prepare_data.py", "--images", "images", "--coco", folder / "내 사진_everything.json", "--val-ratio", 0,
               cwd=photo.parent)
    assert "학습 1쌍" in done.stdout
    done = run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--original", "--checkpoint",
               ROOT / "demo/sam2_demo.pt", "--device", "cpu", "--everything", "--pred-iou-thresh", 1, cwd=photo.parent)
    assert "0개" in done.stdout and "--pred-iou-thresh" in done.stdout


def test_compare_shows_both_models(photo, weights, tmp_path_factory):
    other = save_small_model(tmp_path_factory.mktemp("other") / "other.pt", seed=1)
    done = segment(photo, weights, "--checkpoint", other, "--compare", "--point", "40,30")
    folder = photo.parent / "output/my_results"
    point = {"point_coords": np.array([[40, 30]]), "point_labels": np.array([1])}
    assert (read_mask(folder) > 0).tolist() == predict_with_sam2(photo, weights, **point).tolist()
    assert (read_mask(folder, "내 사진_original") > 0).tolist() == predict_with_sam2(photo, other, **point).tolist()
    assert "other.pt, " in done.stdout and "small.pt" in done.stdout


@pytest.mark.parametrize("height, width", [(30, 400), (400, 30), (32, 32), (100, 250), (2000, 3000)])
def test_the_result_picture_suits_images_of_every_shape(tmp_path, height, width):
    image, mask = np.full((height, width, 3), 90, np.uint8), np.zeros((height, width), bool)
    mask[height // 4:height // 2, width // 4:width // 2] = True
    panels = [test_my_image.input_panel(image, [(width / 3, height / 3, 1)], [], None, "input"),
              *(test_my_image.mask_panel(image, mask, (30, 110, 255), f"mask {number}", number == 1)
                for number in range(3))]
    test_my_image.save_panels(tmp_path / "result.png", panels, image.shape[:2])
    result = cv2.imread(str(tmp_path / "result.png")).astype(int)
    assert 250 < result.shape[0] < 1000 and 1300 < result.shape[1] < 1700
    blue = (result[..., 0] - result[..., 2] > 60).sum()  # three masks are to be seen
    assert blue > 3 * 300
    lime = ((result[..., 1] > 240) & (result[..., 2] < 20)).sum()  # and one frame
    assert lime > 500


# ----------------------------------------------------------------------------- the window

def mouse(figure, name, x, y, button):
    """A mouse event at image pixel (x, y), through the whole of matplotlib's event chain."""
    across, down = figure.axes[0].transData.transform((x, y))
    event = MouseEvent(f"{name}_event", figure.canvas, across, down, button)
    figure.canvas.callbacks.process(f"{name}_event", event)


def click(figure, x, y, button=1):
    mouse(figure, "button_press", x, y, button)
    mouse(figure, "button_release", x, y, button)


def drag(figure, start, end, button=1):
    mouse(figure, "button_press", *start, button)
    mouse(figure, "motion_notify", *((a + b) / 2 for a, b in zip(start, end)), None)
    mouse(figure, "motion_notify", *end, None)
    mouse(figure, "button_release", *end, button)


def press(figure, key):
    figure.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", figure.canvas, key))


@pytest.fixture
def window():
    """A window on an 80 x 60 image, with a model that tells what it was asked."""
    asked = []

    def find(points, boxes):
        asked.append((points, boxes))
        masks = np.zeros((3, 60, 80), bool)
        for number in range(3):
            masks[number, :10 * (number + 1)] = True
        return masks, np.array([0.2, 0.9, 0.4])

    window = test_my_image.Window(draw_pair(3)[0], {"fine-tuned model": find}, "photo")
    window.asked = asked
    window.figure.canvas.draw()
    yield window
    plt.close(window.figure)


def shown(window):
    """How many rows of the picture are tinted: 10, 20 or 30 for candidate 1, 2 or 3, 0 for none."""
    pixels = np.asarray(window.figure.axes[0].images[0].get_array()).astype(int)
    return int(((pixels - window.image).any(2).mean(1) > 0.9).sum())


def test_each_click_segments_at_once_and_shows_the_best_mask_with_its_score(window):
    assert shown(window) == 0 and not window.asked
    click(window.figure, 40, 30)
    assert window.asked == [([(40, 30, 1)], [])] and shown(window) == 20
    assert "mask 2 of 3, score 0.900" in window.figure.axes[0].get_title()
    click(window.figure, 5.25, 6, button=3)
    points, boxes = window.asked[-1]
    assert points[0] == (40, 30, 1) and points[1] == pytest.approx((5.2, 6, 0), abs=0.2) and not boxes
    assert len(window.figure.axes[0].collections) == 2  # both are drawn
    assert "right click: background" in window.figure.get_supxlabel()


def test_dragging_with_the_left_button_draws_a_box(window):
    drag(window.figure, (60, 50), (20, 10))
    assert window.asked == [([], [[20, 10, 60, 50]])] and shown(window) == 20
    click(window.figure, 40, 30)
    drag(window.figure, (10, 10), (300, 55))  # a new box takes the old one's place and ends at the image's edge
    assert window.asked[-1] == ([(40, 30, 1)], [[10, 10, 79, 55]])
    assert len(window.figure.axes[0].patches) == 1
    drag(window.figure, (30, 30), (50, 50), button=3)  # the right button draws none: a background point
    assert window.points[-1] == (30, 30, 0) and window.boxes == [[10, 10, 79, 55]]


@pytest.mark.parametrize("key", ["u", "backspace"])
def test_undo_takes_back_the_last_prompt(window, key):
    click(window.figure, 40, 30)
    drag(window.figure, (60, 50), (20, 10))
    press(window.figure, key)
    assert (window.points, window.boxes) == ([(40, 30, 1)], []) and window.asked[-1] == ([(40, 30, 1)], [])
    press(window.figure, key)
    assert (window.points, window.boxes, window.found) == ([], [], {}) and shown(window) == 0
    press(window.figure, key)  # nothing is left to take back
    assert not window.figure.axes[0].collections


def test_reset_takes_back_all(window):
    click(window.figure, 40, 30)
    click(window.figure, 20, 30)
    press(window.figure, "r")
    assert (window.points, window.boxes, window.found) == ([], [], {}) and shown(window) == 0
    assert not window.figure.axes[0].collections and not window.figure.axes[0].patches


def test_number_keys_pick_a_candidate_until_the_next_prompt(window):
    press(window.figure, "1")  # nothing to pick from yet
    click(window.figure, 40, 30)
    assert window.choice is None
    for key, rows in (("1", 10), ("3", 30), ("2", 20)):
        press(window.figure, key)
        assert shown(window) == rows and window.choice == int(key) - 1
    assert len(window.asked) == 1  # the model is not asked again
    click(window.figure, 20, 20)
    assert window.choice is None


def test_enter_closes_the_window_once_there_is_something_to_save(window):
    press(window.figure, "enter")
    assert plt.fignum_exists(window.figure.number)
    click(window.figure, 40, 30)
    press(window.figure, "enter")
    assert not plt.fignum_exists(window.figure.number) and window.found


def test_other_buttons_and_clicks_outside_the_image_place_nothing(window):
    click(window.figure, 40, 30, button=2)
    click(window.figure, -20, 30)
    click(window.figure, 40, 300)
    click(window.figure, -0.4, 30)  # inside the axes, half a pixel outside the image
    mouse(window.figure, "button_release", 40, 30, 1)  # pressed somewhere else
    assert not window.asked and not window.points


def test_clicks_while_the_toolbar_zooms_place_nothing(window):
    window.figure.canvas.toolbar = type("Toolbar", (), {"mode": "zoom rect"})()
    click(window.figure, 40, 30)
    drag(window.figure, (10, 10), (50, 50))
    assert not window.asked


def test_two_models_share_the_prompts():
    def find(points, boxes):
        return np.ones((3, 60, 80), bool), np.array([0.1, 0.2, 0.3 * len(points)])
    both = test_my_image.Window(draw_pair(3)[0], {"original model": find, "fine-tuned model": find},
                                "photo")
    click(both.figure, 40, 30)
    titles = [axes.get_title() for axes in both.figure.axes]
    plt.close(both.figure)
    assert titles == ["original model: mask 3 of 3, score 0.300", "fine-tuned model: mask 3 of 3, score 0.300"]


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


class RealWindow:
    """test_my_image.py in a window on a virtual screen, driven with xdotool."""

    def __init__(self, photo, weights, screen, *arguments):
        self.env = {**ENV, "DISPLAY": screen, "MPLBACKEND": "TkAgg"}
        self.script = subprocess.Popen(
            [sys.executable, str(ROOT / "test_my_image.py"), "--image", photo.name, "--model-cfg", str(SMALL_CFG),
             "--finetuned", str(weights), "--device", "cpu", *arguments],
            cwd=photo.parent, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        self.id = self.xdotool("search", "--sync", "--onlyvisible", "--name", ".png").split()[0]
        time.sleep(1.5)  # until it has drawn itself
        size = dict(re.findall(r"(WIDTH|HEIGHT)=(\d+)", self.xdotool("getwindowgeometry", "--shell", self.id)))
        self.width, self.height = int(size["WIDTH"]), int(size["HEIGHT"])

    def xdotool(self, *arguments):
        done = subprocess.run(["xdotool", *map(str, arguments)], env=self.env, check=True, timeout=60,
                              capture_output=True, text=True).stdout
        time.sleep(0.5)  # until the window has answered
        return done

    def move(self, across, down):
        """To a place in the window, from 0 to 1."""
        self.xdotool("mousemove", "--window", self.id, round(across * self.width), round(down * self.height))

    def click(self, across, down, button):
        self.move(across, down)
        self.xdotool("click", button)

    def end(self):
        """Wait for the script; returns the prompts, as flags, that it says it used."""
        output, _ = self.script.communicate(timeout=60)
        assert self.script.returncode == 0, output
        return shlex.split(re.search(r"같은 결과를 얻는 명령: (.*)", output)[1])


def test_real_window_clicks_drag_undo_and_enter(photo, weights, screen):
    window = RealWindow(photo, weights, screen, "-o", "clicked")
    try:
        window.click(0.5, 0.5, 1)
        window.click(0.3, 0.3, 3)
        window.click(0.7, 0.7, 3)
        window.xdotool("key", "u")
        window.move(0.4, 0.4)
        window.xdotool("mousedown", 1)
        window.move(0.6, 0.55)
        window.move(0.65, 0.6)
        window.xdotool("mouseup", 1)
        window.xdotool("key", "Return")
        prompts = window.end()
    finally:
        window.script.kill()
    assert prompts[0] == "--point" and [point.split(",")[2] for point in prompts[1].split(";")] == ["1", "0"]
    assert prompts[2] == "--box" and len(prompts) == 4
    segment(photo, weights, *prompts, "-o", "typed")
    assert (read_mask(photo.parent / "clicked") == read_mask(photo.parent / "typed")).all()


def test_real_window_closing_saves(photo, weights, screen):
    window = RealWindow(photo, weights, screen, "-o", "clicked")
    try:
        window.click(0.45, 0.5, 1)
        window.xdotool("key", "alt+F4")  # the window manager asks the window to close, as its button does
        prompts = window.end()
    finally:
        window.script.kill()
    segment(photo, weights, *prompts, "-o", "typed")
    assert (read_mask(photo.parent / "clicked") == read_mask(photo.parent / "typed")).all()

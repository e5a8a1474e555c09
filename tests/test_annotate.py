"""extras/annotate.py: label a folder in one window.

| tests | subject |
|---|---|
| labels | masks in the format of data/, continuing, unreadable images, names that collide |
| window | order of the worker's jobs, zoom, keys, undo, colors, the status line |
| real window | label, skip, close and continue on a virtual screen |
| --learn | suggestions, resuming after a kill, when a step may start |
"""

import itertools
import math
import shlex
import sys
import textwrap
import threading
from functools import partial

import annotate
import matplotlib
import numpy as np
import pytest
import torch
import window as window_module
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, run, write_image
from filelock import FileLock
from matplotlib import pyplot as plt
from matplotlib.backend_bases import MouseEvent
from test_window import NO_DISPLAY, RealWindow, click, drag, draw_discs, masks_in, mouse, press, read_png, rounded

from test_my_image import load_predictor

matplotlib.use("Agg")
window_module.HAS_HANGUL = False  # texts in the window are English then
DEMO = ("--model-cfg", SMALL_CFG, "--finetuned", ROOT / "demo/sam2_demo.pt", "--device", "cpu")


def save_two(figure):
    for x, y in ((40, 40), (110, 80)):
        click(figure, x, y)
        press(figure, "n")
    press(figure, "enter")


def save_one(figure):
    drag(figure, (13, 13), (67, 67))
    press(figure, "enter")


def skip(figure):
    click(figure, 40, 40)
    press(figure, "ㄴ")


def close(figure):
    click(figure, 40, 40)
    press(figure, "n")
    plt.close(figure)


def settle(window):
    """Let the worker answer everything that the window waits for."""
    while window.waiting:
        window.tick()
    assert window.error is None


@pytest.fixture
def label(tmp_path, monkeypatch):
    """Label images/ into masks/ in this process; actions: functions of the figure, one for each image.

    An action does not wait for the model: the image is still being encoded when the action clicks.
    """
    def label(*actions, more=()):
        left, opened = list(actions), []

        def show(figure):
            for action in actions:
                left.remove(action)
                action(figure)
                settle(opened[0])
            assert not plt.fignum_exists(figure.number) or actions == (), "the window is still open"

        monkeypatch.setattr(window_module, "show_window", show)
        monkeypatch.setattr(annotate, "require_display", lambda web, alternative: None)
        monkeypatch.setattr(annotate.AnnotationWindow, "show", lambda self: opened.append(self) or
                            window_module.Window.show(self))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["annotate.py", "--images", "images", "--output", "masks",
                                          *map(str, (*DEMO, *more))])
        try:
            annotate.main()
        finally:
            assert not left
        return opened[0]
    return label


def test_labeling_writes_training_masks_and_a_second_run_shows_only_images_without_one(tmp_path, label, capsys):
    for number, name in enumerate("abcd"):
        image = draw_discs(tmp_path / f"images/{name}.jpg")
        image[0, :40] = 60 * number  # no two are the same image
        write_image(tmp_path / f"images/{name}.jpg", image)
    label(save_two, skip, save_one, close)
    assert "이미지 2장을 라벨링했습니다. 저장: masks" in (printed := capsys.readouterr().out) and "d.jpg" in printed
    masks = masks_in(tmp_path / "masks")
    assert list(masks) == ["a", "c"] and masks["a"].dtype == np.uint16 and masks["c"].dtype == np.uint8
    assert [masks["a"][place] for place in ((40, 40), (80, 110), (5, 5))] == [1, 2, 0]
    assert [masks["c"][place] for place in ((40, 40), (80, 110), (5, 5))] == [255, 0, 0]
    label(save_one, save_one)
    assert "4장 가운데 2장은 마스크가 있습니다" in capsys.readouterr().out
    again = masks_in(tmp_path / "masks")
    assert list(again) == list("abcd") and all((again[name] == masks[name]).all() for name in masks)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--val-ratio", 0.5, cwd=tmp_path)
    assert "객체 3개: 이미지마다 최소 1" in run("prepare_data.py", "--check", cwd=tmp_path).stdout  # a and b
    with pytest.raises(SystemExit) as stop:  # nothing is left to do
        label(more=("--finetuned", "missing.pt"))
    assert not stop.value.code and "4장 가운데 4장" in capsys.readouterr().out


def test_labeling_reports_an_unreadable_image_and_continues_with_the_next(tmp_path, label, capsys):
    for name in "ac":
        draw_discs(tmp_path / f"images/{name}.png")
    (tmp_path / "images/b.png").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="1장은 읽지 못했습니다: b.png"):
        label(save_one, save_two)
    assert list(masks_in(tmp_path / "masks")) == ["a", "c"] and "images/b.png" in capsys.readouterr().err


def test_the_annotation_log_accepts_any_file_name(tmp_path):
    for name in ("내 사진.png", "\udcff.png", "=a.png"):
        annotate.write_log_row(tmp_path / "log.csv", name, 1, 2.5, 0.5)
    _, *rows = (tmp_path / "log.csv").read_bytes().splitlines()
    assert rows == ["내 사진.png,1,2.5,0.5".encode(), b"\xff.png,1,2.5,0.5", b"'=a.png,1,2.5,0.5"]


def test_labeling_refuses_a_locked_or_shared_output_folder_and_images_with_equal_names(tmp_path, label):
    draw_discs(tmp_path / "images/a.png")
    with FileLock(tmp_path / "masks/.lock"), pytest.raises(SystemExit, match="이미 실행 중입니다"):
        label()
    with pytest.raises(SystemExit, match="마스크 폴더가 이미지 폴더와 같습니다"):
        label(more=("--output", "images"))
    draw_discs(tmp_path / "images/A.jpg")
    with pytest.raises(SystemExit, match="이름이 같은 이미지"):
        label()
    with pytest.raises(SystemExit) as stop:
        label(more=("--compare", "--original"))
    assert stop.value.code == 2


def test_the_removed_flag_annotate_of_test_my_image_prints_the_new_command(tmp_path):
    draw_discs(tmp_path / "내 사진/a.png")
    done = run("test_my_image.py", "--image", "내 사진", "--annotate", "masks", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "python extras/annotate.py --images '내 사진' --output masks")
    command = shlex.split(done.stderr.split("python ")[1])
    done = run(*command, *DEMO, cwd=tmp_path, env=NO_DISPLAY, code=1)
    assert_fails_in_one_line(done, "창을 띄울 수 없습니다", "--web")


@pytest.fixture
def window(tmp_path, monkeypatch):
    """A window on three images with two discs, none of them encoded yet; the demo's model is used as both models."""
    for name in "abc":
        draw_discs(tmp_path / f"images/{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["annotate.py", "--images", "images", "--output", "masks", "--compare",
                                      "--checkpoint", str(ROOT / "demo/sam2_demo.pt"), *map(str, DEMO)])
    args = annotate.parse_args()
    paths = annotate.find_images(args.images)
    predictors, shared = annotate.load_models(args)
    learner = annotate.Learner(predictors["fine-tuned model"], args.output)
    made = annotate.AnnotationWindow(paths, len(paths), predictors, shared, learner, args)
    made.figure.canvas.draw()
    yield made
    made.close()
    made.worker.close()


def title(window):
    return window.figure.canvas.manager.get_window_title()


def test_a_second_enter_does_not_accept_a_suggestion_that_was_not_visible_yet(window, monkeypatch):
    monkeypatch.setattr(window.learner, "is_worth_showing", lambda: True)
    settle(window)
    press(window.figure, "enter")
    press(window.figure, "enter")
    settle(window)
    assert (window.saved, window.path.name) == (1, "b.png") and window.objects()
    press(window.figure, "enter")
    settle(window)
    assert (window.saved, window.path.name) == (2, "c.png")


def test_an_image_is_shown_before_it_is_encoded_and_clicks_on_it_are_kept(window, monkeypatch):
    assert "encoding" in window.status.get_text()
    shown = window.panels[0].images[0].get_array()
    assert shown[120, 120].tolist() != shown[15, 15].tolist()  # the disc is visible, in an image enlarged to 480 x 360
    click(window.figure, 40, 40)
    click(window.figure, 100, 20, button=3)
    assert rounded(*window.current[:2]) == ([(40, 40, 1), (100, 20, 0)], None) and not window.current.candidates
    press(window.figure, "enter")  # waits for the mask
    click(window.figure, 5, 5)     # waits behind it, for an image that is gone by then
    assert window.path.name == "a.png"
    settle(window)
    assert window.path.name == "b.png" and not window.current.points
    mask, = masks_in(window.args.output).values()
    predictor = annotate.load_models(window.args)[0]["fine-tuned model"]
    predictor.set_image(annotate.read_image("images/a.png"))
    masks, scores = annotate.segment(predictor, [(40, 40, 1), (100, 20, 0)], None)
    assert (mask > 0).tolist() == masks[scores.argmax()].tolist()


def test_the_worker_runs_clicks_first_then_the_next_image_then_background_jobs():
    worker, order, hold = window_module.Worker(), [], threading.Event()
    worker.add(window_module.BACKGROUND, hold.wait)
    for name, priority in (("rest", window_module.BACKGROUND), ("next", window_module.NEXT),
                           ("click 1", window_module.CLICK), ("click 2", window_module.CLICK)):
        worker.add(priority, lambda name=name: name, order.append)
    worker.add(window_module.BACKGROUND, lambda: 1 / 0)
    hold.set()
    with pytest.raises(ZeroDivisionError):  # in the window's thread
        while True:
            worker.deliver()
    worker.close()
    assert order == ["click 1", "click 2", "next", "rest"] and not worker.thread.is_alive()


def test_clicks_stay_in_image_pixels_while_zoomed(window):
    settle(window)
    mouse(window.figure, "scroll", 110, 80, None)  # a wheel event without a step does not move
    before = window.panels[1].transData.transform((110, 80))
    across, down = window.panels[0].transData.transform((110, 80))
    for _ in range(6):
        event = MouseEvent("scroll_event", window.figure.canvas, across, down, step=1)
        window.figure.canvas.callbacks.process("scroll_event", event)
    left, right = window.panels[0].get_xlim()
    assert right - left == pytest.approx(160 * 0.8 ** 6) and left < 110 < right
    assert window.panels[1].get_xlim() == (left, right)
    assert window.panels[1].transData.transform((110, 80)) == pytest.approx(before, abs=1.5)  # about the pointer
    click(window.figure, 115, 85)
    drag(window.figure, (100, 70), (120, 90))
    points, box = window.current[:2]
    assert points[0] == pytest.approx((115, 85, 1), abs=0.4) and box == pytest.approx((100, 70, 120, 90), abs=0.4)
    settle(window)
    press(window.figure, "0")
    assert window.panels[0].get_xlim() == (-0.5, 159.5) and window.panels[0].get_ylim() == (119.5, -0.5)
    for _ in range(3):
        event = MouseEvent("scroll_event", window.figure.canvas, across, down, step=-1)
        window.figure.canvas.callbacks.process("scroll_event", event)
    assert window.panels[0].get_xlim() == (-0.5, 159.5)  # never beyond the image


def test_an_object_has_the_same_color_in_both_panels_and_the_h_key_hides_masks(window):
    def color(place, panel):
        shown = window.panels[panel].images[0].get_array()
        scale = shown.shape[0] // 120
        return shown[place[0] * scale, place[1] * scale].tolist()

    bare = [color((40, 40), 0), color((80, 110), 0)]
    click(window.figure, 40, 40)
    settle(window)
    first = color((40, 40), 0)
    press(window.figure, "n")
    click(window.figure, 110, 80)
    settle(window)
    assert color((40, 40), 0) == color((40, 40), 1) == first != bare[0]
    assert color((80, 110), 0) == color((80, 110), 1) not in (first, bare[1])
    press(window.figure, "ㅗ")  # the key of h
    assert [color((40, 40), 0), color((80, 110), 0)] == bare
    press(window.figure, "h")
    assert color((40, 40), 0) == first


def test_the_window_shows_progress_a_missing_mask_and_the_panel_that_a_number_key_changes(window):
    assert title(window) == "a.png (1/3)"
    settle(window)
    press(window.figure, "enter")
    assert "nothing drawn yet" in window.status.get_text()
    click(window.figure, 40, 40)
    settle(window)
    best = window.current.best("fine-tuned model")[0]
    press(window.figure, str((best + 1) % 3 + 1))
    assert "original model, fine-tuned model" in window.status.get_text()
    press(window.figure, str((best + 1) % 3 + 1))
    assert "no panel" in window.status.get_text()
    press(window.figure, "s")
    assert title(window) == "b.png (2/3)"
    press(window.figure, "s")
    press(window.figure, "s")
    assert not plt.fignum_exists(window.figure.number) and window.path is None and not window.args.output.exists()


def test_an_image_skipped_before_it_was_encoded_leaves_no_features_or_clicks(window):
    settle(window)
    hold = threading.Event()
    window.worker.add(window_module.CLICK, hold.wait)
    press(window.figure, "s")
    click(window.figure, 40, 40)
    press(window.figure, "s")
    hold.set()
    settle(window)
    assert window.path.name == "c.png" and window.is_encoded and not window.current.points
    assert [path.name for path in window.encoded] == ["c.png"]


def test_an_image_whose_file_is_deleted_while_it_is_open_can_still_be_labeled(window, tmp_path):
    settle(window)
    hold = threading.Event()
    window.worker.add(window_module.CLICK, hold.wait)
    for _ in range(2):
        press(window.figure, "s")
    (tmp_path / "images/c.png").unlink()
    hold.set()
    click(window.figure, 40, 40)
    settle(window)
    assert window.path.name == "c.png" and window.objects()


def test_keys_and_clicks_after_enter_on_the_last_image_are_ignored(window):
    settle(window)
    for _ in range(2):
        press(window.figure, "s")
    click(window.figure, 40, 40)
    for key in ("enter", "enter"):
        press(window.figure, key)
    click(window.figure, 110, 80)
    settle(window)
    assert window.saved == 1 and window.path is None and not plt.fignum_exists(window.figure.number)
    press(window.figure, "enter")  # a browser may send it after the window was closed
    assert window.error is None and list(masks_in(window.args.output)) == ["c"]


def test_q_after_enter_saves_the_image_before_the_window_closes(window):
    click(window.figure, 40, 40)
    for key in ("enter", "q"):  # the image is still being encoded
        press(window.figure, key)
    settle(window)
    assert window.saved == 1 and window.path is None and not plt.fignum_exists(window.figure.number)
    assert list(masks_in(window.args.output)) == ["a"]


def test_undo_returns_to_a_finished_object_and_reset_clears_the_current_one(window):
    settle(window)
    click(window.figure, 40, 40)
    settle(window)
    press(window.figure, "3")
    press(window.figure, "n")
    click(window.figure, 110, 80)
    settle(window)
    press(window.figure, "ㅕ")
    assert len(window.finished) == 1 and not window.current.points
    press(window.figure, "u")
    assert not window.finished and window.current.choice == 2
    settle(window)
    press(window.figure, "r")
    assert window.current == ([], None, {}, None)


def work(window, job, priority=window_module.BACKGROUND):
    """Let the worker run job(); returns its result."""
    results = []
    window.worker.add(priority, job, results.append)
    while not results:
        window.tick()
    return results[0]


@pytest.fixture
def labeled(window):
    """(the window on its second image, with three steps to take on the first; the weights after these steps)."""
    window.is_learning, window.learner.steps = True, 3  # only the test takes steps
    settle(window)
    reference = annotate.Learner(annotate.load_models(window.args)[0]["fine-tuned model"], window.args.output, 3)
    reference.add(window.path, window.encoded[window.path][-1]._features)
    click(window.figure, 40, 40)
    press(window.figure, "enter")
    settle(window)
    reference.finish()
    work(window, window.learner.work)  # measures
    assert window.path.name == "b.png" and window.learner.queued == 3 and reference.iteration == 3
    return window, reference.copy()


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_step_that_is_interrupted_gives_the_same_weights_to_the_bit(labeled, monkeypatch):
    window, wanted = labeled
    learner, interrupt, answers, encoded = window.learner, window.give_way, [], []
    calls = {window_module.BACKGROUND: itertools.count(), window_module.NEXT: itertools.count()}
    window.current = prompts = annotate.Segmented([(40, 40, 1)], None, {})

    def predict(is_initial):
        window.shows_initial = is_initial
        return tuple(window.predict(window.path, prompts)["fine-tuned model"][1].tolist())  # scores

    def encode_next():
        window.encoded.pop(window.paths[0], None)
        window.encode(window.paths[0])
        encoded.append(window.encoded[window.paths[0]][-1]._features["image_embed"])

    def interrupted():
        priority = window.worker.priority
        number = next(calls.get(priority, iter([1])))
        if number % 7 == 0:
            window.worker.add(window_module.CLICK, partial(predict, number % 2), answers.append)
        if number % 20 == 0 and priority == window_module.BACKGROUND:
            window.worker.add(window_module.NEXT, encode_next)
        interrupt()

    work(window, encode_next)
    monkeypatch.setattr(window, "give_way", interrupted)
    for _ in range(3):
        allowed = {work(window, partial(predict, is_initial), window_module.CLICK) for is_initial in (False, True)}
        answers.clear()
        work(window, learner.work)
        assert answers and allowed >= {*answers}  # of the weights before the step, or of the initial ones
    assert len(allowed) == 2 and len(encoded) > 2 and all(torch.equal(encoded[0], each) for each in encoded)
    assert same(learner.copy(), wanted) and not same(wanted, learner.initial)


def test_a_step_stands_still_while_the_user_is_active_and_closing_ends_it(labeled, monkeypatch):
    window, wanted = labeled
    monkeypatch.setattr(annotate, "PAUSE", math.inf)  # for ever
    window.worker.add(window_module.BACKGROUND, window.learner.work, window.on_learned)
    for place in ((40, 40), (110, 80)):
        click(window.figure, *place)
        settle(window)  # a click is answered in the middle of the step
        assert window.objects() and window.learner.iteration == 0 and window.is_learning
    press(window.figure, "s")
    settle(window)  # the next image is encoded
    assert window.path.name == "c.png" and window.is_encoded
    assert window.learner.iteration == 0 and window.is_learning
    window.close()
    window.worker.close()
    assert window.learner.iteration == 1 and not window.worker.thread.is_alive()
    window.learner.finish()
    assert same(window.learner.copy(), wanted)


def test_a_click_interrupts_the_encoding_of_the_next_image_but_not_that_of_its_own(window, monkeypatch):
    started, hold, interrupt, events = threading.Event(), threading.Event(), window.give_way, []

    def interrupted():
        if window.worker.priority == window_module.NEXT:
            started.set()
            hold.wait()
        interrupt()

    settle(window)
    work(window, window.encoded.clear)
    work(window, partial(window.encode, window.path, window.image))
    set_image = annotate.set_image_in_all
    monkeypatch.setattr(window, "give_way", interrupted)
    monkeypatch.setattr(annotate, "set_image_in_all", lambda *args: events.append("encode") or set_image(*args))
    monkeypatch.setattr(window, "on_candidates", lambda *_: events.append([path.name for path in window.encoded]))
    window.worker.add(window_module.NEXT, partial(window.encode, window.paths[0]))
    click(window.figure, 40, 40)
    hold.set()
    settle(window)
    was_encoded = events[-1]
    work(window, lambda: None)  # after b.png
    hold.clear()
    started.clear()
    press(window.figure, "s")
    settle(window)
    click(window.figure, 40, 40)
    was_started = started.wait(300)  # c.png
    press(window.figure, "s")
    click(window.figure, 40, 40)
    hold.set()
    settle(window)
    assert was_started and was_encoded == ["a.png"]
    assert window.path.name == "c.png" and events[-1] == ["c.png"] and events.count("encode") == 2


def test_models_with_different_encoders_do_not_share_features(tmp_path, label):
    draw_discs(tmp_path / "images/a.png")
    saved = torch.load(ROOT / "demo/sam2_demo.pt", weights_only=True)
    name = next(name for name in saved["model"] if name.startswith("image_encoder"))
    saved["model"][name] = saved["model"][name] + 0.01
    torch.save(saved, tmp_path / "other.pt")
    window = label(save_one, more=("--compare", "--checkpoint", "other.pt"))
    (first, last), = window.encoded.values()
    assert not torch.equal(first._features["image_embed"], last._features["image_embed"])
    assert not window.shared and list(masks_in(tmp_path / "masks")) == ["a"]


DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT / "extras")!r})
import annotate

class AnnotationWindow(annotate.AnnotationWindow):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.figure.canvas.mpl_connect("draw_event", self.tell)

    def tell(self, event):
        transform = self.panels[0].transData
        (left, top), (right, bottom) = transform.transform([(0, 0), (100, 100)])
        height = self.figure.canvas.get_width_height(physical=True)[1]
        if self.path and not self.waiting:
            print("drawn", self.figure.canvas.manager.get_window_title().split()[0], len(self.finished),
                  len(self.current.points), int(bool(self.current.box)),
                  left, height - top, right, height - bottom, self.current.points, flush=True)

    def on_learned(self, result):
        super().on_learned(result)
        print("step", self.learner.iteration, "", flush=True)

annotate.AnnotationWindow = AnnotationWindow
annotate.run(annotate.main, "")
"""


def test_real_window_labels_and_skips_images_and_continues_after_closing(tmp_path, screen):
    for name in "abcd":
        draw_discs(tmp_path / f"images/{name}.png")
    folder = ("--images", "images", "--output", "masks", "--learn")
    with RealWindow(tmp_path, screen, *folder, driver=DRIVER) as window:
        window.wait_for_window("a.png")
        window.click(40, 40)
        window.wait_for("a.png", points=1)
        window.xdotool("key", "n")
        window.wait_for("a.png", finished=1)
        window.click(110, 80)
        window.wait_for("a.png", finished=1, points=1)
        window.xdotool("key", "Return")
        window.wait_for_window("b.png")
        window.xdotool("key", "s")
        window.wait_for_window("c.png")
        window.drag((12, 12), (70, 69))
        window.wait_for("c.png", box=1)
        window.xdotool("key", "Return")
        window.wait_for_window("d.png")
        window.click(40, 40)
        window.wait_for("d.png", points=1)
        window.close()
        assert "이미지 2장을 라벨링했습니다" in window.end()
    assert {path.name for path in (tmp_path / "masks").iterdir()} - {".lock"} == {
        "a.png", "c.png", "annotation_log.csv", "learned.pt", "learned_last.pt"}
    two, one = read_png(tmp_path / "masks/a.png"), read_png(tmp_path / "masks/c.png")
    assert two.dtype == np.uint16 and (two[40, 40], two[80, 110], two[5, 5]) == (1, 2, 0)
    assert one.dtype == np.uint8 and (one[40, 40], one[80, 110], one[5, 5]) == (255, 0, 0)
    with RealWindow(tmp_path, screen, *folder, driver=DRIVER) as window:
        window.wait_for_window("b.png")
        window.click(110, 80)
        window.wait_for("b.png", points=1)
        window.xdotool("key", "Return")
        window.wait_for_window("d.png")
        window.close()
        assert "4장 가운데 2장은 마스크가 있습니다" in window.end()
    assert (read_png(tmp_path / "masks/a.png") == two).all()
    assert read_png(tmp_path / "masks/b.png")[80, 110] == 255


def watched(changes):
    """DRIVER, with changes to annotate.Learner: code of a class body."""
    return DRIVER.replace("import annotate\n", f"""import annotate
import time
import torch

class Learner(annotate.Learner):
{textwrap.indent(textwrap.dedent(changes), "    ")}
annotate.Learner = Learner
""", 1)


def wait_for_step(window, number):
    window.read_until(f"step {number} ")


LEARNED = """
    def resume(self, labelled):
        super().resume(labelled)
        torch.save(self.copy(), "resumed.pt")

    def step(self, batch):
        while self.iteration == {held}:  # until the process is killed
            time.sleep(0.01)
        super().step(batch)
"""


def test_real_window_killed_while_it_learns_resumes_from_the_last_save(tmp_path, screen):
    for name in "abcd":
        draw_discs(tmp_path / f"images/{name}.png")
    folder = ("--images", "images", "--output", "masks", "--learn")
    with RealWindow(tmp_path, screen, *folder, driver=watched(LEARNED.format(held=24))) as window:
        window.wait_for_window("a.png")
        for name, following, steps in zip("abc", "bcd", (10, 20, 24)):
            window.click(40, 40)
            window.wait_for(f"{name}.png", points=1)
            window.xdotool("key", "Return")
            window.wait_for_window(f"{following}.png")
            wait_for_step(window, steps)
        window.click(110, 80)  # in the middle of the fourth
        window.script.kill()
        window.script.wait()
    saved = torch.load(tmp_path / "masks/learned_last.pt", weights_only=True)
    assert list(masks_in(tmp_path / "masks")) == list("abc") == [*saved["learned"]]
    assert (saved["iteration"], saved["queued"]) == (20, 10)
    with RealWindow(tmp_path, screen, *folder, driver=watched(LEARNED.format(held=-1))) as window:
        window.wait_for_window("d.png")
        wait_for_step(window, 30)
        window.click(110, 80)
        window.wait_for("d.png", points=1)
        assert "3" in window.xdotool("getwindowname", window.id).removeprefix("d.png (4/4)")
        window.close()
        assert "이미지 3장에서 배운 모델" in window.end()
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert all(torch.equal(resumed[name], saved["model"][name]) for name in saved["model"])
    finished = torch.load(tmp_path / "masks/learned_last.pt", weights_only=True)
    assert (finished["iteration"], finished["queued"]) == (30, 0)
    rows = (tmp_path / "masks/annotation_log.csv").read_text("utf-8").splitlines()
    assert rows[0] == "image,clicks,seconds,first_iou" and [row.split(",")[:2] for row in rows[1:]] == [
        ["a.png", "1"], ["b.png", "1"], ["c.png", "1"]]


def test_real_window_suggestions_are_accepted_corrected_or_skipped(tmp_path, screen):
    for name in "abc":
        draw_discs(tmp_path / f"images/{name}.png")
    predictor = load_predictor(SMALL_CFG, ROOT / "demo/sam2_demo.pt", "cpu")
    predictor.set_image(annotate.read_image(tmp_path / "images/a.png"))
    masks, scores = annotate.segment(predictor, [], None)
    suggested = masks[scores.argmax()]
    driver = watched("""
        def is_worth_showing(self):
            return True
        """)
    with RealWindow(tmp_path, screen, "--images", "images", "--output", "masks", driver=driver) as window:
        window.wait_for_window("a.png")
        window.xdotool("key", "Return")
        window.wait_for_window("b.png")
        window.drag((12, 12), (70, 69))
        window.wait_for("b.png", box=1)
        window.xdotool("key", "Return")
        window.wait_for_window("c.png")
        window.xdotool("key", "s")
        assert "이미지 2장을 라벨링했습니다" in window.end()
    masks = masks_in(tmp_path / "masks")
    assert list(masks) == ["a", "b"] and not [*(tmp_path / "masks").glob("*.pt")]
    assert suggested.any() and (masks["a"] > 0).tolist() == suggested.tolist() != (masks["b"] > 0).tolist()
    rows = [row.split(",") for row in (tmp_path / "masks/annotation_log.csv").read_text("utf-8").splitlines()[1:]]
    iou = annotate.calculate_iou(suggested, masks["b"] > 0)
    assert [(name, clicks, float(first)) for name, clicks, _, first in rows] == [
        ("a.png", "0", 1), ("b.png", "1", pytest.approx(iou, abs=1e-4))]


def test_a_suggestion_can_be_corrected_undone_removed_and_compared_with_the_initial_model(window, monkeypatch):
    monkeypatch.setattr(window.learner, "is_worth_showing", lambda: True)
    settle(window)
    suggestion = window.objects()[0].best("fine-tuned model")[1]
    assert not window.current.points and "suggested" in window.status.get_text()
    click(window.figure, 40, 40)
    settle(window)
    clicked = window.objects()[0].best("fine-tuned model")[1]
    assert (clicked != suggestion).any()
    window.learner.load({name: each + 0.01 for name, each in window.learner.initial.items()})
    press(window.figure, "u")
    settle(window)
    learned = window.current.best("fine-tuned model")[1]
    assert not window.current.points and (learned != suggestion).any()
    press(window.figure, "ㅡ")  # the key of m
    settle(window)
    assert (window.current.best("fine-tuned model")[1] == suggestion).all()
    assert "before learning" in window.panels[1].get_title() and "original model" in window.panels[0].get_title()
    press(window.figure, "m")
    settle(window)
    assert (window.current.best("fine-tuned model")[1] == learned).all()
    press(window.figure, "r")
    assert not window.objects() and window.current == ([], None, {}, None)
    monkeypatch.setattr(annotate, "segment", lambda *_, **__: (np.zeros((3, 120, 160), bool), np.ones(3)))
    press(window.figure, "s")
    settle(window)
    assert "ready" in window.status.get_text() and window.is_suggested  # nothing was found


def test_a_learning_step_starts_only_while_the_user_is_idle_and_no_click_waits(window, monkeypatch):
    settle(window)
    asked, now = [], [100.0]
    window.learner.queued = 1
    with monkeypatch.context() as patch:  # the fixture ends the worker
        patch.setattr(window.worker, "add", lambda priority, job, then=None: asked.append((priority, job)))
        patch.setattr(annotate.time, "monotonic", lambda: now[0])
        mouse(window.figure, "motion_notify", 50, 50, None)
        window.tick()
        now[0] += 0.2
        window.tick()
        assert not asked
        now[0] += 0.2
        for _ in range(3):
            window.tick()
        assert asked == [(window_module.BACKGROUND, window.learner.work)]  # one at a time
        window.on_learned(True)
        window.waiting = 1  # for the answer to a click
        window.tick()
        assert len(asked) == 1

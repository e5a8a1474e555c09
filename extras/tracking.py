"""Track prompted objects with SAM 2's memory; shared by track_video.py and segment_volume.py.

A video is a sequence of frames, a volume a sequence of slices. Both are passed in as an object with len(),
indexing (uint8 H x W x 3, RGB) and `size` (H, W), which reads an item when it is indexed.

Prompts are {(frame, object): (points, box)}: points a list of (x, y, label) in pixels, label 1 (foreground) or
0 (background); box [x1, y1, x2, y2] or None; objects are numbered from 1.

Chapters:
    settings    sizes, keys of the window
    tracking    sam2's propagation with bounded memory
    prompts     numbers from the command line, checks
    drawing     colors of objects, overlays
    the window  clicks, slider, tracking while one watches
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from files import ImageError, fail
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb
from matplotlib.widgets import Slider
from PIL import Image

# ---- settings ----

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in sam2.utils.misc.load_video_frames
SHOWN_SIDE = 1000   # pixels: larger frames are reduced to this in the window
MAX_OBJECTS = 255   # the numbers that an 8-bit mask can hold
REDRAW_SECONDS = 0.3  # minimum between two redraws of the window during tracking
SAME_SHARE = 0.1    # two masks that overlap in less of the smaller one are different objects
KOREAN_KEYBOARD = {"ㅕ": "u", "ㄱ": "r"}  # the letters on the same keys
WINDOW_HELP = ("left click: object    right click: background    drag: box    {digits}u: undo    r: clear this {unit}\n"
               "slider, left, right, page up, page down: go to another {unit}    Enter: track    Esc: stop tracking")


# ---- tracking ----


def track(predictor, frames, prompts, max_gap=0):
    """Track the prompted objects through all frames, keeping only the outputs that later frames can attend to.

    Yields (frame, objects, logits, scores) from the first prompted frame to the last one, then, if there are
    frames before the first prompt, backwards from it to frame 0 (the first prompted frame a second time).
        objects: list of N object numbers; logits: float32 N x H x W tensor, above 0 inside the object;
        scores: list of N predicted probabilities, 0 to 1, that the object is visible.
    max_gap: after the last prompt and before the first, stop after this many consecutive frames without a pixel of
        any object; 0: never.
    With max_gap 0 the masks equal those of SAM2VideoPredictor.propagate_in_video after all prompts have been added,
    forwards and then with reverse=True; otherwise the backward pass lacks the frames that the forward pass skipped.
    Source of the frames that a frame attends to: SAM2Base._prepare_memory_conditioned_features.
    """
    state = start_state(predictor, frames)
    add_prompts(predictor, state, prompts)
    first, last = min(prompts)[0], max(prompts)[0]
    reach = max(predictor.num_maskmem * predictor.memory_temporal_stride_for_eval, predictor.max_obj_ptrs_in_encoder)
    for reverse in (False, True) if first > 0 else (False,):
        gap = 0
        for frame, objects, logits in without_bar(predictor.propagate_in_video(state, reverse=reverse)):
            yield frame, list(objects), logits[:, 0], object_scores(state, frame)
            for outputs in state["output_dict_per_obj"].values():
                kept = outputs["non_cond_frame_outputs"]
                for old in list(kept):
                    # the backward pass first attends to the forward pass's outputs after the first prompt
                    needed = old < frame + reach if reverse else old > frame - reach or 0 < first >= old - reach
                    if not needed:
                        del kept[old]
            if max_gap:
                gap = 0 if first <= frame <= last or (logits > 0).any() else gap + 1
                if gap == max_gap:
                    break


def start_state(predictor, frames):
    """The state that SAM2VideoPredictor.init_state returns, with frames that are read when they are needed.

    init_state can only decode a whole video into memory. It gets a single black image, which is then replaced.
    """
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as sink:
        Image.new("RGB", (8, 8)).save(Path(folder) / "0.jpg")
        with contextlib.redirect_stderr(sink):  # its progress bar
            state = predictor.init_state(folder)
    height, width = frames.size
    state.update(images=ModelInput(frames, predictor.image_size), num_frames=len(frames), video_height=height,
                 video_width=width, cached_features={})
    return state


class ModelInput:
    """Frames as input of the model: float32 3 x side x side, normalized, bit for bit as sam2's own loader does it."""

    def __init__(self, frames, side):
        levels = (np.arange(256) / 255).astype(np.float32)[None, :, None]
        self.frames, self.side = frames, side
        self.table = (levels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)  # 1 x 256 x 3

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        resized = Image.fromarray(self.frames[index]).resize((self.side, self.side))
        return torch.from_numpy(cv2.LUT(np.asarray(resized), self.table)).permute(2, 0, 1)


def add_prompts(predictor, state, prompts):
    """Add prompts to the state; every prompted frame becomes a conditioning frame.

    Returns a list of the N object numbers and their logits on the last prompted frame, float32 N x H x W.
    """
    for (frame, number), (points, box) in sorted(prompts.items()):
        _, objects, logits = predictor.add_new_points_or_box(
            state, frame, number, points=[point[:2] for point in points] if points else None,
            labels=[point[2] for point in points] if points else None, box=box)
    return list(objects), logits[:, 0]


def without_bar(propagation):
    """Iterate over a generator of sam2 without the progress bar that it opens with its first item."""
    with Path(os.devnull).open("w") as sink, contextlib.closing(propagation):
        with contextlib.redirect_stderr(sink):
            first = next(propagation)
        yield first
        yield from propagation


def object_scores(state, frame):
    """The predicted probability, 0 to 1, that each object is visible on a frame that has just been tracked."""
    found = [outputs["cond_frame_outputs"].get(frame) or outputs["non_cond_frame_outputs"][frame]
             for outputs in state["output_dict_per_obj"].values()]
    return [float(torch.sigmoid(output["object_score_logits"])) for output in found]


def label_map(objects, logits):
    """uint8 H x W: the object's number at each pixel, 0 for none; of overlapping objects the one with the highest
    logit. objects: list of N numbers; logits: N x H x W tensor."""
    best, index = logits.max(dim=0)
    numbers = torch.tensor(objects, dtype=torch.uint8, device=logits.device)
    return torch.where(best > 0, numbers[index], 0).cpu().numpy()


# ---- prompts ----


def parse_numbers(text, lengths, form):
    """Parse "1,2,3;4,5,6": a list of lists of floats, each of one of the given lengths.

    Raises argparse.ArgumentTypeError, naming the part that is wrong and the form that is expected.
    """
    found = []
    for part in text.strip().strip(";").split(";"):
        try:
            numbers = [float(number) for number in part.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in lengths or not np.isfinite(numbers).all():
            raise argparse.ArgumentTypeError(f"'{part}': {form} 형식이 아닙니다")
        found.append(numbers)
    return found


def sorted_box(x1, y1, x2, y2):
    """[x1, y1, x2, y2] of two opposite corners, with x1 <= x2 and y1 <= y2."""
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def as_label(label):
    """A point's label as int. Raises argparse.ArgumentTypeError unless it is 1 or 0."""
    if label not in (0, 1):
        raise argparse.ArgumentTypeError(f"점의 라벨은 1(전경) 또는 0(배경)이어야 합니다: {label:g}")
    return int(label)


def check_frame_prompts(prompts, frames, source, unit):
    """Raise ImageError, naming the prompt, if one does not fit the frames.

    A box may end at the edge of a frame (x2 = width); a point may not, because there is no pixel.
    source: the file to name; unit: the Korean word for a frame.
    """
    height, width = frames.size
    for (frame, number), (points, box) in prompts.items():
        if not 0 <= frame < len(frames):
            raise ImageError(f"{source}: {unit} {frame}: 없는 번호입니다. 0부터 {len(frames) - 1}까지 있습니다")
        if not 1 <= number <= MAX_OBJECTS:
            raise ImageError(f"{source}: 대상 번호 {number}: 쓸 수 없습니다. 1부터 {MAX_OBJECTS}까지입니다")
        corners = [box[:2], box[2:]] if box else []
        outside = [*((x, y) for x, y, _ in points if not (0 <= x < width and 0 <= y < height)),
                   *((x, y) for x, y in corners if not (0 <= x <= width and 0 <= y <= height))]
        if outside:
            x, y = outside[0]
            raise ImageError(f"{source}: {unit} {frame}의 좌표 ({x:g}, {y:g})가 그림 밖에 있습니다. "
                             f"크기는 가로 {width}, 세로 {height}픽셀입니다")
        if any(label not in (0, 1) for _, _, label in points):
            raise ImageError(f"{source}: {unit} {frame}: 점의 라벨은 1(전경) 또는 0(배경)이어야 합니다")
        if box and (box[0] >= box[2] or box[1] >= box[3]):
            raise ImageError(f"{source}: {unit} {frame}: 상자는 x1 < x2, y1 < y2 여야 합니다")


# ---- drawing ----


def object_color(number):
    """A color for the number-th object, RGB, 0 to 255: distant hues in turn (golden ratio), without red (tissue)."""
    return tuple(int(255 * part) for part in hsv_to_rgb((1 / 6 + 2 / 3 * (number * 0.618 % 1), 0.85, 1)))


def overlay_labels(image, labels):
    """A copy of `image`, uint8 H x W x 3, with every object of a label map, uint8 H x W, tinted and outlined."""
    drawn = image.copy()
    for number in np.unique(labels[labels > 0]):
        drawn = overlay(drawn, labels == number, object_color(int(number)))
    return drawn


def overlay(image, mask, color):
    """`image` with `mask` tinted in `color` (RGB, 0 to 255) and outlined: uint8 H x W x 3."""
    inside = mask.astype(np.uint8)
    tint = np.full_like(image, color)
    tinted = cv2.copyTo(cv2.addWeighted(image, 0.55, tint, 0.45, 0), inside, image.copy())
    edges, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(tinted, edges, -1, color, max(1, round(max(mask.shape) / 300)))


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(array, size, interpolation=interpolation)


def require_window(flags):
    """Fail if matplotlib cannot open a window. flags: the flags that the message suggests instead."""
    try:
        figure = plt.figure()
        is_interactive = figure.canvas.required_interactive_framework is not None
        plt.close(figure)
    except Exception:  # each toolkit has its own error for "no display"
        is_interactive = False
    if not is_interactive:
        advice = " (리눅스라면 python3-tk 패키지도 필요합니다)" if sys.platform == "linux" else ""
        fail(f"창을 띄울 수 없습니다. 대신 쓸 옵션: {flags}{advice}")


# ---- the window ----


class Window:
    """A matplotlib window: prompt objects on any frame, track them, correct any frame, track again.

    follow: function of prompts that tracks and yields (frame, label map), and then (None, None) while it saves; called
    when Enter is pressed.
    max_object: the highest object number; unit: the English word for a frame; aspect: height of a pixel / its width.

    After show(), prompts holds the current prompts; tracked_prompts, those of the last complete tracking, or None;
    is_tracking, whether the window was closed during tracking.

    The first click on a tracked frame also adds the box around the object's tracked mask as a prompt, so that the
    click corrects the object instead of selecting a new one. The box is omitted if the click selects something that
    the mask does not cover, because then the object was lost. The mask shown after a click is the one that tracking
    will give for this frame.
    """

    def __init__(self, frames, predictor, follow, title, max_object=MAX_OBJECTS, unit="frame", aspect=1):
        self.frames, self.predictor, self.follow = frames, predictor, follow
        self.max_object, self.unit = max_object, unit
        self.state = start_state(predictor, frames)
        self.prompts, self.history, self.frame, self.object = {}, [], 0, 1
        self.previews, self.tracked, self.tracked_prompts = {}, {}, None  # frame: label map; frame: PNG of one
        self.followed = {}  # the prompts that produced self.tracked, even if incomplete
        self.pressed, self.drawn, self.error = None, [], None
        self.is_tracking, self.is_saving, self.is_stopped, self.is_closed = False, False, False, False
        # fits a laptop of 1280 x 720
        self.figure = plt.figure(figsize=(10, min(max(10 * aspect * frames.size[0] / frames.size[1], 3.5), 4.5) + 1.6))
        self.axes = self.figure.add_axes((0.03, 0.17, 0.94, 0.77))
        self.picture = self.axes.imshow(np.zeros((1, 1, 3), np.uint8), aspect=aspect, extent=(
            -0.5, frames.size[1] - 0.5, frames.size[0] - 0.5, -0.5))
        self.axes.set(xticks=[], yticks=[])
        self.slider = Slider(self.figure.add_axes((0.12, 0.1, 0.76, 0.04)), unit, 0, max(1, len(frames) - 1),
                             valinit=0, valstep=1, valfmt="%d")
        self.slider.on_changed(self.guarded(self.on_slider))
        digits = "1 ... 9 or [ ]: object number    " if max_object > 1 else ""
        self.figure.text(0.5, 0.02, WINDOW_HELP.format(digits=digits, unit=unit), ha="center", fontsize=9)
        self.figure.canvas.manager.set_window_title(title)
        self.figure.canvas.mpl_disconnect(self.figure.canvas.manager.key_press_handler_id)  # disables its own keys
        for name, handler in (("button_press_event", self.on_press), ("motion_notify_event", self.on_motion),
                              ("button_release_event", self.on_release), ("key_press_event", self.on_key),
                              ("close_event", self.on_close)):
            self.figure.canvas.mpl_connect(name, self.guarded(handler))
        self.update()

    def guarded(self, handler):
        """Wrap an event handler: an exception closes the window and is raised by show() (a GUI toolkit would print it
        and go on)."""
        def handle(event):
            try:
                handler(event)
            except BaseException as error:  # Ctrl-C too
                self.error = error
                plt.close(self.figure)
        return handle

    def show(self):
        plt.show()
        if self.error:
            raise self.error

    def on_slider(self, value):
        frame = min(int(value), len(self.frames) - 1)
        if frame != self.frame and not self.is_tracking:
            self.frame, self.pressed = frame, None
            self.update()

    def on_close(self, _):
        self.is_closed = self.is_stopped = True

    def position(self, event):
        """(x, y) of an event in pixels of the frame, clipped to the frame and rounded to one decimal."""
        height, width = self.frames.size
        x, y = self.axes.transData.inverted().transform((event.x, event.y)).tolist()
        return round(min(max(x, 0), width - 1), 1), round(min(max(y, 0), height - 1), 1)

    def on_press(self, event):
        is_toolbar_busy = getattr(self.figure.canvas.toolbar, "mode", "")  # zooming or panning
        if event.inaxes is self.axes and event.button in (1, 3) and not is_toolbar_busy and not self.is_tracking:
            height, width = self.frames.size  # after panning, there is space beside it
            if -0.5 <= event.xdata <= width - 0.5 and -0.5 <= event.ydata <= height - 0.5:
                self.pressed = event

    def dragged_box(self, event):
        """The box from where the left button was pressed to `event`; None for a click that barely moved."""
        start = self.pressed
        moved = max(abs(event.x - start.x), abs(event.y - start.y)) / self.figure.canvas.device_pixel_ratio
        if start.button != 1 or moved < 6:
            return None
        x1, y1, x2, y2 = box = sorted_box(*self.position(start), *self.position(event))
        return box if x1 < x2 and y1 < y2 else None

    def on_motion(self, event):
        if self.pressed and not self.is_tracking and (box := self.dragged_box(event)):
            self.draw_prompts({(self.frame, self.object): ([], box)})
            self.figure.canvas.draw_idle()

    def on_release(self, event):
        if self.is_tracking:  # a click that began before tracking
            self.pressed = None
        # on macOS a Ctrl-click presses button 3 and releases button 1; the press determines the button
        if not self.pressed or event.button not in (self.pressed.button, 1):
            return
        key = (self.frame, self.object)
        if box := self.dragged_box(event):
            points, _ = self.prompts.get(key, ([], None))
            prompt = (points, box)
        else:
            click = (*self.position(self.pressed), int(self.pressed.button == 1))
            points, box = self.prompts.get(key) or ([], self.tracked_box(click))
            prompt = ([*points, click], box)
        self.pressed = None
        self.set_prompts({**self.prompts, key: prompt})

    def is_outdated(self, number):
        """Whether an object's tracked mask on this frame came from prompts that have since been removed."""
        key = (self.frame, number)
        return (key in self.followed and key not in self.prompts
                or all(number != prompted for _, prompted in self.prompts))

    def tracked_box(self, click):
        """The box around the object's tracked mask on this frame, widened to include a foreground click.

        None if there is no mask, or if a foreground click alone gives a mask of something else.
        """
        if self.frame not in self.tracked or self.is_outdated(self.object):
            return None
        tracked = decode_labels(self.tracked[self.frame]) == self.object
        rows, columns = np.nonzero(tracked)
        if not len(rows):
            return None
        x, y, label = click
        if label:
            clicked = self.segment({(self.frame, self.object): ([click], None)}) > 0
            if 0 < clicked.sum() and (clicked & tracked).sum() < SAME_SHARE * min(clicked.sum(), tracked.sum()):
                return None
        corners = [(columns.min(), rows.min()), (columns.max(), rows.max()), *([(x, y)] if label else [])]
        (x1, y1), (x2, y2) = np.min(corners, axis=0), np.max(corners, axis=0)
        return [float(x1), float(y1), float(x2), float(y2)] if x1 < x2 and y1 < y2 else None

    def segment(self, prompts):
        """The label map, uint8 H x W, for prompts on one frame, without tracking."""
        self.predictor.reset_state(self.state)
        return label_map(*add_prompts(self.predictor, self.state, prompts))

    def set_prompts(self, prompts):
        """Replace the prompts, remember the old ones for undo, and show this frame segmented with the new ones."""
        self.history.append(self.prompts)
        self.prompts = prompts
        self.previews.pop(self.frame, None)
        self.update()

    def on_key(self, event):
        steps, turns = {"left": -1, "right": 1, "pageup": -10, "pagedown": 10}, {"[": -1, "]": 1}
        key = (event.key or "").lower()  # None for a key without a name
        key = KOREAN_KEYBOARD.get(key, key)
        if key in plt.rcParams["keymap.quit"]:
            plt.close(self.figure)
        elif key == "escape":
            self.is_stopped = True
        elif self.is_tracking:
            return
        elif key in steps:
            self.slider.set_val(min(max(self.frame + steps[key], 0), len(self.frames) - 1))
        elif key in turns or key and key in "123456789":
            number = self.object + turns[key] if key in turns else int(key)
            if 1 <= number <= self.max_object:
                self.object, self.pressed = number, None
                self.update()
        elif key in ("u", "backspace") and self.history:
            self.prompts = self.history.pop()
            self.previews.clear()
            self.update()
        elif key == "r":
            self.set_prompts({key: prompt for key, prompt in self.prompts.items() if key[0] != self.frame})
        elif key == "enter" and self.prompts and not self.is_saving:
            self.run_tracking()

    def run_tracking(self):
        """Track with the current prompts and show some of the frames; Esc or closing the window stops it.

        While the results are saved, everything but tracking is possible. Closing the window does not stop the saving.
        """
        shown, redrawn = self.frame, 0
        self.is_tracking, self.is_stopped, self.tracked, self.tracked_prompts = True, False, {}, None
        self.followed = self.prompts
        with contextlib.closing(self.follow(self.followed)) as following:
            for frame, labels in following:
                if labels is None:
                    break
                self.frame, self.tracked[frame] = frame, cv2.imencode(".png", labels)[1]
                if time.monotonic() - redrawn > REDRAW_SECONDS:
                    self.slider.set_val(frame)
                    self.update()
                    self.figure.canvas.draw()
                    redrawn = time.monotonic()
                self.figure.canvas.flush_events()
                if self.is_stopped:
                    break
            if self.is_closed:
                return
            self.is_tracking, self.is_saving, self.frame = False, not self.is_stopped, shown
            self.tracked_prompts = None if self.is_stopped else self.followed
            self.slider.set_val(shown)
            self.update()
            self.figure.canvas.draw()
            for _ in following if self.is_saving else ():
                if not self.is_closed:
                    self.figure.canvas.flush_events()
        self.is_saving = False
        if not self.is_closed:
            self.update()

    def labels(self):
        """The label map to show, uint8 H x W: the tracked one, overlaid with the masks of the prompts on this frame."""
        found = decode_labels(self.tracked[self.frame]) if self.frame in self.tracked else \
            np.zeros(self.frames.size, np.uint8)
        found[np.isin(found, [number for number in np.unique(found) if self.is_outdated(number)])] = 0
        here = {key: prompt for key, prompt in self.prompts.items() if key[0] == self.frame}
        if here and not self.is_tracking:
            if self.frame not in self.previews:
                self.previews[self.frame] = self.segment(here)
            found[np.isin(found, [number for _, number in here])] = 0
            found = np.where(self.previews[self.frame] > 0, self.previews[self.frame], found)
        return found

    def draw_prompts(self, prompts):
        """Draw points as stars (foreground green, background red) and boxes in the colour of their object."""
        for artist in self.drawn:
            artist.remove()
        self.drawn = []
        for (_, number), (points, box) in prompts.items():
            edge = np.array(object_color(number)) / 255
            self.drawn += [self.axes.scatter(x, y, s=140, marker="*", color="lime" if label else "red",
                                             edgecolor=edge, linewidth=1.5, zorder=3) for x, y, label in points]
            if box:
                x1, y1, x2, y2 = box
                self.drawn.append(self.axes.add_patch(plt.Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=2)))

    def update(self):
        """Show the frame, the masks and the prompts."""
        image = reduce_to(self.frames[self.frame], SHOWN_SIDE, cv2.INTER_AREA)
        labels = cv2.resize(self.labels(), image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        self.picture.set_data(overlay_labels(image, labels))
        self.draw_prompts({key: prompt for key, prompt in self.prompts.items() if key[0] == self.frame})
        status = "tracking ..." if self.is_tracking else "saving ..." if self.is_saving else \
            "no prompts yet" if not self.prompts else \
            "tracked" if self.tracked_prompts == self.prompts else "press Enter to track"
        chosen = f"object {self.object}, " if self.max_object > 1 else ""
        self.axes.set_title(f"{self.unit} {self.frame} of 0 ... {len(self.frames) - 1}, {chosen}{status}",
                            color=np.array(object_color(self.object)) / 300)
        self.figure.canvas.draw_idle()


def decode_labels(content):
    """Decode a label map, uint8 H x W, from its PNG."""
    return cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)

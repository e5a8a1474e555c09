"""Track prompted objects with SAM 2's memory; shared by track_video.py and segment_volume.py.

A video is a sequence of frames, a volume a sequence of slices. Both are passed in as an object with len(),
indexing (uint8 H x W x 3, RGB) and `size` (H, W), which reads an item when it is indexed.

Prompts are {(frame, object): (points, box)}: points a list of (x, y, label) in pixels, label 1 (foreground) or
0 (background); box [x1, y1, x2, y2] or None; objects are numbered from 1.

Chapters:
    settings    sizes, times, the hints
    tracking    sam2's propagation with bounded memory
    prompts     numbers from the command line, checks
    the window  prompts on frames, tracking while the window stays usable
"""

import argparse
import collections
import contextlib
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from files import ImageError, fail
from matplotlib.widgets import Slider
from PIL import Image
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm
from window import Window, object_color, say, show_view

from test_my_image import check_trained_for_auto, mark_prompts, segment

# ---- settings ----

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in sam2.utils.misc.load_video_frames
MAX_OBJECTS = 255   # the highest number that an 8-bit mask can hold
REDRAW_SECONDS, PLAY_SECONDS = 0.3, 0.1  # minimum time between redraws while tracking, between played frames
FOLLOW_SECONDS = 0.1  # the window's events wait at most this long, or one frame, for tracking
SAME_SHARE = 0.1    # two masks that overlap in less of the smaller one are different objects
OBJECT_HINTS = say("1 ... 9 or [ ]: object    ", "1 ... 9, [ ]: 대상 번호    ")
VOLUME_HINTS = say("\nup, down: level    -, =: width", "\n위, 아래: 밝기의 가운데    -, =: 밝기의 폭")
HINTS = say("left click: object    right click: background    drag: box    {}u: undo    r: clear here    h: hide\n"
            "slider, left, right, page up, page down: move    space: play    wheel: zoom, 0: whole    "
            "Enter: track    Esc: stop    q: quit{}",
            "좌클릭: 대상    우클릭: 배경    끌기: 상자    {}u: 취소    r: 여기 것 모두 취소    h: 마스크 숨기기\n"
            "슬라이더, 왼쪽, 오른쪽, Page Up, Page Down: 이동    스페이스: 재생    휠: 확대, 0: 전체    "
            "Enter: 따라가기    Esc: 멈춤    q: 끝{}")


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

    prompts: {(frame, object): (points, box), or a mask as the bytes of a PNG}.
    Returns a list of the N object numbers and their logits on the last prompted frame, float32 N x H x W.
    """
    for (frame, number), prompt in sorted(prompts.items()):
        if isinstance(prompt, bytes):
            _, objects, logits = predictor.add_new_mask(state, frame, number, decode_mask(prompt))
            continue
        points, box = prompt
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
    for (frame, number), prompt in prompts.items():
        points, box = ((), None) if isinstance(prompt, bytes) else prompt
        if isinstance(prompt, bytes) and decode_mask(prompt).shape != (height, width):
            raise ImageError(f"{source}: {unit} {frame}: 마스크의 크기가 그림과 다릅니다")
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


def decode_mask(png):
    """The mask, bool H x W, in the bytes of a PNG; no pixels if they are damaged."""
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) if png else None
    return np.zeros((0, 0), bool) if mask is None else mask > 127


def find_without_prompt(predictor, frames, confident=math.inf):
    """Segment frames without a prompt: {(frame, 1): mask}, in the form of add_prompts.

    It is the first frame on which the predicted IoU reaches `confident`, or else the one where it is highest.
    Fails if nothing is found on any frame.
    """
    check_trained_for_auto(predictor)
    finder, best = SAM2ImagePredictor(predictor), (-math.inf, None, None)
    finder._bb_feat_sizes = [(predictor.image_size // stride,) * 2 for stride in (4, 8, 16)]
    for frame in tqdm(range(len(frames)), "찾기", unit="장", leave=False, disable=None):
        finder.set_image(frames[frame])
        masks, scores = segment(finder, [], None)
        if scores.max() > best[0] and masks[scores.argmax()].any():
            best = float(scores.max()), frame, masks[scores.argmax()]
        if best[0] >= confident:
            break
    score, frame, mask = best
    if frame is None:
        fail("프롬프트 없이 찾은 것이 없습니다. 프롬프트를 주세요")
    print(f"프롬프트 없이 찾음: {frame}번, 넓이 {mask.mean():.1%}, 점수 {score:.3f}")
    return {(frame, 1): cv2.imencode(".png", mask.astype(np.uint8) * 255)[1].tobytes()}


# ---- the window ----


class FrameWindow(Window):
    """A window on frames: prompt objects on any frame, track them, correct any frame, track again.

    follow: function of prompts that tracks and yields (frame, label map), and then (None, None) while it saves.
    max_object: the highest object number; first: the frame shown first; aspect: height of a pixel / its width.
    voxel_ml: volume of a voxel in ml; sides: letters drawn at the left and the right edge. Both are only for volumes,
    whose `frames` have change_window(level, width) and are called slices in the window.

    After show(), prompts holds the current prompts; tracked_prompts, those of the last complete tracking, or None;
    is_tracking, whether the window was closed during tracking. The worker encodes only the frame that is shown. Other
    uses of the model wait until it is encoded.

    The first click on a tracked frame also adds the box around the object's tracked mask as a prompt, so that the
    click corrects the object instead of selecting a new one. The box is omitted if the click selects something that
    the mask does not cover, because then the object was lost. The mask shown is the one that tracking will give.
    """

    WAITING_KEYS = ("enter",)

    def __init__(self, frames, predictor, follow, title, max_object=MAX_OBJECTS, first=0, aspect=1, voxel_ml=None,
                 sides=()):
        self.frames, self.predictor, self.follow, self.max_object = frames, predictor, follow, max_object
        self.voxel_ml, self.unit = voxel_ml, say("frame", "프레임") if voxel_ml is None else say("slice", "슬라이스")
        self.state = start_state(predictor, frames)
        self.prompts, self.history, self.frame, self.object = {}, [], first, 1
        self.previews, self.tracked, self.tracked_prompts = {}, {}, None  # frame: label map; frame: PNG of one
        self.followed = {}  # the prompts that produced self.tracked, even if incomplete
        self.following, self.encoded, self.asked, self.redrawn, self.tracked_ml = None, None, None, 0, ""
        self.is_tracking, self.is_saving, self.is_stopped, self.is_playing = False, False, False, False
        # fits a screen of 1280 x 720
        height = min(max(10 * aspect * frames.size[0] / frames.size[1], 3.5), 4.2) + 1.9
        super().__init__(1, (10, height), 0.24, HINTS.format(
            OBJECT_HINTS if max_object > 1 else "", "" if voxel_ml is None else VOLUME_HINTS), frames.size, aspect)
        self.axes, = self.panels
        for x, where, side in zip((0.01, 0.99), ("left", "right"), sides):
            self.axes.text(x, 0.5, side, color="yellow", ha=where, transform=self.axes.transAxes,
                           bbox={"facecolor": "black", "pad": 1.5})
        self.slider = Slider(self.figure.add_axes((0.12, 0.16, 0.76, 0.04)), self.unit, 0, max(1, len(frames) - 1),
                             valinit=first, valstep=1, valfmt="%d")
        self.slider.on_changed(self.guarded(self.on_slider))
        self.figure.canvas.manager.set_window_title(title)
        self.set_view()

    def show(self):
        super().show()
        if self.is_saving:
            collections.deque(self.following, maxlen=0)  # closing the window does not stop the saving
        elif self.is_tracking:
            self.following.close()

    def on_slider(self, value):
        if not self.is_tracking:
            self.act(partial(self.go_to, min(int(value), len(self.frames) - 1)), False)

    def go_to(self, frame):
        if frame != self.frame:
            self.frame, self.pressed = frame, None
            self.update()

    def on_key(self, event):
        if not (self.is_saving and event.key == "enter"):
            super().on_key(event)

    def tick(self):
        super().tick()
        if self.following:
            self.follow_on()
        elif self.is_playing and time.monotonic() > self.redrawn + PLAY_SECONDS:
            self.redrawn = time.monotonic()
            self.slider.set_val((self.frame + 1) % len(self.frames))

    def encode(self, frame, pixels):
        """In the worker: encode a frame as SAM2VideoPredictor does; returns whether it was still shown."""
        if is_shown := frame == self.frame:
            with torch.inference_mode():
                image = pixels.to(self.state["device"]).float()[None]
                self.state["cached_features"] = {frame: (image, self.predictor.forward_image(image))}
        return is_shown

    def on_encoded(self, frame, was_shown):
        if was_shown:
            self.encoded = frame
        elif self.asked == frame:
            self.asked = None  # update() asks again when it is shown again
        self.update()

    def on_press(self, event):
        if self.is_playing:
            self.press_key(" ")
        if not self.is_tracking:
            super().on_press(event)

    def add_prompt(self, point, box):
        if not self.is_tracking:  # otherwise the click began before tracking
            self.act(partial(self.prompt_object, (self.frame, self.object), point, box), True)
            self.update()

    def prompt_object(self, key, point, box):
        """Add a point, or replace the box, of an object on a frame; key: (frame, object)."""
        points, old_box = self.prompts.get(key) or ([], self.tracked_box(point) if point else None)
        self.set_prompts({**self.prompts, key: (points, box) if box else ([*points, point], old_box)})

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

    def press_key(self, key):
        steps, turns = {"left": -1, "right": 1, "pageup": -10, "pagedown": 10}, {"[": -1, "]": 1}
        levels = {"up": (1, 1), "down": (-1, 1), "-": (0, 0.8), "=": (0, 1.25), "+": (0, 1.25)}  # of the width
        if key == "escape":
            self.is_stopped, self.is_playing = True, False
        elif self.is_tracking:
            return
        elif key == " ":
            self.is_playing = not self.is_playing
            self.update()
        elif key in steps:
            self.slider.set_val(min(max(self.frame + steps[key], 0), len(self.frames) - 1))
        elif key in turns or key and key in "123456789":
            number = self.object + turns[key] if key in turns else int(key)
            if 1 <= number <= self.max_object:
                self.object, self.pressed = number, None
                self.update()
        elif key in levels and self.voxel_ml is not None:
            self.frames.change_window(*levels[key])
            self.previews, self.tracked_prompts = {}, None
            self.encoded = self.asked = None  # the model sees the slice as the user does
            self.update()
        elif key in ("u", "backspace") and self.history:
            self.prompts = self.history.pop()
            self.previews.clear()
            self.update()
        elif key == "r":
            self.set_prompts({key: prompt for key, prompt in self.prompts.items() if key[0] != self.frame})
        elif key == "enter" and not self.prompts:
            self.update(say("click an object first", "먼저 대상을 클릭하세요"))
        elif key == "enter":
            self.is_tracking, self.is_stopped, self.is_playing, self.tracked, self.tracked_prompts = \
                True, False, False, {}, None
            self.followed, self.frame_before = self.prompts, self.frame
            self.following = self.follow(self.followed)

    def follow_on(self):
        """Track, or save, for a moment; between two calls the window handles its events. Esc stops the tracking."""
        end, status = time.monotonic() + FOLLOW_SECONDS, (self.is_tracking, self.is_saving)
        while self.following and status == (self.is_tracking, self.is_saving) and time.monotonic() < end:
            found = None if self.is_tracking and self.is_stopped else next(self.following, None)
            if found and found[1] is not None:
                self.frame, self.tracked[found[0]] = found[0], cv2.imencode(".png", found[1])[1]
                continue
            if self.is_tracking:
                self.is_tracking, self.frame = False, self.frame_before
                self.tracked_prompts = None if self.is_stopped else self.followed
                voxels = sum(np.count_nonzero(decode_labels(png)) for png in self.tracked.values())
                self.tracked_ml = f", {voxels * self.voxel_ml:.3g} ml" if self.voxel_ml else ""
            if found is None:
                self.following.close()
                self.following = None
            self.is_saving = found is not None
        is_due = self.is_tracking and time.monotonic() > self.redrawn + REDRAW_SECONDS
        if is_due or status != (self.is_tracking, self.is_saving):
            self.redrawn = time.monotonic()
            self.slider.set_val(self.frame)
            self.update()

    def labels(self):
        """The label map to show, uint8 H x W: the tracked one, overlaid with the masks of the prompts on this frame."""
        found = decode_labels(self.tracked[self.frame]) if self.frame in self.tracked else \
            np.zeros(self.frames.size, np.uint8)
        found[np.isin(found, [number for number in np.unique(found) if self.is_outdated(number)])] = 0
        here = {key: prompt for key, prompt in self.prompts.items() if key[0] == self.frame}
        is_shown = self.frame in self.previews or self.encoded == self.frame and not self.waiting
        if here and not self.is_tracking and is_shown:
            if self.frame not in self.previews:
                self.previews[self.frame] = self.segment(here)
            found[np.isin(found, [number for _, number in here])] = 0
            found = np.where(self.previews[self.frame] > 0, self.previews[self.frame], found)
        return found

    def update(self, message=None):
        """Show the frame, the masks, the prompts and a message, or the state; queue the encoding of the frame."""
        image = self.frames[self.frame]
        is_free = not (self.is_tracking or self.is_playing)
        if is_free and self.frame not in (self.encoded, self.asked):
            self.asked = self.frame
            self.ask(partial(self.encode, self.frame, self.state["images"][self.frame]),
                     partial(self.on_encoded, self.frame))
        labels = self.labels()
        shown = [] if self.hides_masks else np.unique(labels[labels > 0]).tolist()
        show_view(self.axes, image, [(labels == number, object_color(number)) for number in shown])
        waiting = [(key, ([point] if point else [], box)) for key, point, box in (
            action.args for action in self.delayed if action.func == self.prompt_object)]
        self.marked = [(*prompt, np.array(object_color(number)) / 255)
                       for (frame, number), prompt in (*self.prompts.items(), *waiting) if frame == self.frame]
        mark_prompts(self.panels, self.marked)
        status = message or (
            say("tracking ...", "따라가는 중 ...") if self.is_tracking else
            say("saving ...", "저장하는 중 ...") if self.is_saving else
            say("encoding ...", "인코딩하는 중 ...") if self.waiting else
            say("no prompts yet", "아직 프롬프트가 없음") if not self.prompts else
            say("tracked", "따라갔음") + self.tracked_ml if self.tracked_prompts == self.prompts else
            say("press Enter to track", "Enter를 누르면 따라감"))
        chosen = say(f"object {self.object}, ", f"대상 {self.object}, ") if self.max_object > 1 else ""
        self.axes.set_title(say(f"{self.unit} {self.frame} of 0 ... {len(self.frames) - 1}, ",
                                f"{self.unit} {self.frame} / 0 ... {len(self.frames) - 1}, ") + chosen + status,
                            color=np.array(object_color(self.object)) / 300)
        self.figure.canvas.draw_idle()


def decode_labels(content):
    """Decode a label map, uint8 H x W, from its PNG."""
    return cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)

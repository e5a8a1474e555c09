"""Label a folder of images in a window: click, look at the mask, press Enter, and the next image opens.

    python extras/annotate.py --images photos --output photo_masks       starts, or continues
    python prepare_data.py --images photos --masks photo_masks           and train

Images open at once: a worker thread encodes the current image, answers its clicks and then encodes the next image. With
--learn, the model learns from each saved mask while the user looks at the next image (learning.py). A click interrupts
both. Once the model segments the objects without a click, each image opens with this mask as a suggestion.

Chapters:
    settings    the pause before a step, the hints
    the run     main(), the command line, the images without a mask, the log
    the window  one image after the other: prompts, keys, learning
"""

import argparse
import contextlib
import copy
import csv
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from common import add_model_flags
from files import ImageError, as_cell, calculate_iou, fail, read_image, run
from learning import STEPS, Learner, train
from tqdm import tqdm
from window import BACKGROUND, NEXT, TICK_MS, Window, add_web_flag, say, show_view

from test_my_image import (
    Segmented,
    colored_masks,
    find_images,
    load_models,
    mark_prompts,
    number_objects,
    object_color,
    require_display,
    segment,
    set_image_in_all,
    write_png,
)

# ---- settings ----

PAUSE = 0.3  # seconds without an event or a change in the window before a learning step begins or continues
HINTS = say("left click: object    right click: background    drag: box    1 2 3: candidate    n: next object\n"
            "u: undo    r: reset    Enter: save    s: skip    h: hide masks    m: initial model    "
            "wheel: zoom, 0: whole image    q: quit",
            "좌클릭: 대상    우클릭: 배경    끌기: 상자    1 2 3: 후보    n: 다음 객체    u: 취소    r: 다시\n"
            "Enter: 저장하고 다음으로    s: 건너뛰기    h: 마스크 숨기기    m: 처음 모델    휠: 확대, 0: 전체    q: 끝")


# ---- the run ----


def main():
    args = parse_args()
    paths = find_images(args.images)
    remaining = without_mask(paths, args.output)
    require_display(args.web, "화면이 있는 컴퓨터에서 실행하거나")
    with train.claim_folder(args.output):  # a second window would open images that the first one labels
        label(paths, remaining, args)


def label(paths, remaining, args):
    """Label the remaining images; with --learn, first learn what is new among the others."""
    predictors, shared = load_models(args)
    print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자, n은 다음 객체, Enter는 저장, s는 건너뛰기, q는 끝입니다.")
    learner = Learner([*predictors.values()][-1], args.output, STEPS if args.learn else 0)
    if args.learn:
        learner.resume(sorted({*paths}.difference(remaining)))
    window = AnnotationWindow(remaining, len(paths), predictors, shared, learner, args)
    window.show()
    if window.path:
        print(f"창을 닫아 끝냅니다. 저장하지 않은 이미지: {window.path.name}")
    print(f"이미지 {window.saved}장을 라벨링했습니다. 저장: {args.output}")
    learner.finish()
    if learner.is_written:
        print(f"이미지 {len(learner.learned)}장에서 배운 모델: {args.output / 'learned.pt'}")
    if window.failed:
        fail(f"{len(window.failed)}장은 읽지 못했습니다: {', '.join(path.name for path in window.failed[:5])}")


def parse_args():
    parser = argparse.ArgumentParser(description="폴더의 이미지를 창에서 하나씩 라벨링해 마스크를 씁니다.")
    parser.add_argument("--images", required=True, nargs="+", metavar="PATH",
                        help="라벨링할 이미지 폴더, 여러 개나 이미지 파일도 됨 (필수)")
    parser.add_argument("--compare", action="store_true",
                        help="원본과 파인튜닝 모델을 나란히 보기. 저장하는 것은 파인튜닝 모델의 마스크")
    parser.add_argument("--refine", type=int, default=0, metavar="N",
                        help="가장 좋은 마스크를 모델에 다시 넣어 N번 다듬기 (기본: 0)")
    parser.add_argument("--learn", action=argparse.BooleanOptionalAction, default=False,
                        help="저장한 마스크로 모델을 바로 학습함 (기본: 학습하지 않음)")
    add_web_flag(parser)
    add_model_flags(parser, "output/my_masks/폴더이름")
    args = parser.parse_args()
    if args.compare and args.original:
        parser.error("--compare와 --original은 함께 쓸 수 없습니다")
    if args.refine < 0:
        parser.error(f"--refine {args.refine}: 0 이상이어야 합니다")
    if args.output == parser.get_default("output"):
        args.output = args.output.with_name(Path(args.images[0]).resolve().name)
    return args


def without_mask(paths, mask_dir):
    """The images that have no mask mask_dir/STEM.png yet.

    Fails if a mask would be written among the images or could belong to two images; ends if no image is left.
    """
    stems = Counter(path.stem.lower() for path in paths)  # not every file system tells A.png from a.png
    for path in paths:
        if stems[path.stem.lower()] > 1:
            fail(f"이름이 같은 이미지가 둘 이상입니다: {path}. 하나만 남기세요")
        if path.parent.resolve() == mask_dir.resolve():
            fail(f"마스크 폴더가 이미지 폴더와 같습니다: {mask_dir}. 다른 폴더를 쓰세요")
    remaining = [path for path in paths if not (mask_dir / f"{path.stem}.png").exists()]
    print(f"이미지 {len(paths)}장 가운데 {len(paths) - len(remaining)}장은 마스크가 있습니다: {mask_dir}")
    return remaining or sys.exit()


def write_log_row(path, *row):
    """Add a row to annotation_log.csv."""
    rows = [row] if path.exists() else [("image", "clicks", "seconds", "first_iou"), row]
    try:
        with path.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([as_cell(value) for value in each] for each in rows)
    except PermissionError:  # on Windows, while Excel has it open
        tqdm.write(f"주의: {path}에 쓰지 못했습니다. 다른 프로그램에서 닫으세요", file=sys.stderr)


# ---- the window ----


class AnnotationWindow(Window):
    """A window that shows the images one by one, with a panel for each model, and writes a mask for each image.

    paths: the images to label; total: the number of all images, including those that have a mask; predictors: {title:
    predictor}: the masks of the last one are written, and learner trains it; shared: see set_image_in_all. After
    show(), path is the image that was still open, or None; saved, the number of masks written; failed, the unreadable
    images.
    """

    WAITING_KEYS = ("1", "2", "3", "n", "enter")

    def __init__(self, paths, total, predictors, shared, learner, args):
        self.paths, self.total, self.predictors, self.shared, self.args = list(paths), total, predictors, shared, args
        self.path, self.saved, self.failed, self.encoded = None, 0, [], {}
        self.learner, self.is_learning, self.touched, self.encoding = learner, False, 0, None
        super().__init__(len(predictors), (11.5, 5.7), 0.1, HINTS, (1, 1))  # fits a screen of 1280 x 720
        self.status = self.figure.text(0.5, 0.955, "", ha="center")
        for name in ("button_press_event", "motion_notify_event", "key_press_event", "scroll_event"):
            self.figure.canvas.mpl_connect(name, self.touch)
        for model in (predictor.model for predictor in predictors.values()):
            decoder = model.sam_mask_decoder
            for module in (*model.image_encoder.trunk.blocks, *decoder.transformer.layers, *decoder.output_upscaling):
                module.register_forward_hook(self.on_module)
        self.open_next()

    def open_next(self):
        """Open the next image; queue its encoding, then that of the image after it. After the last image, close."""
        is_last = any(action.func == self.close for action in self.delayed)  # q was pressed after Enter
        self.path, self.delayed = None, []
        self.finished, self.current, self.history, self.pressed = [], Segmented([], None, {}), [], None
        while self.paths and not (self.path or is_last):
            path = self.paths[0]
            try:
                self.image, self.path = read_image(path), path
            except ImageError as error:
                self.failed.append(path)
                tqdm.write(f"오류: {error}", file=sys.stderr)
            del self.paths[0]  # now: its features are kept while it is read
        if not self.path:
            return self.close()
        self.size = self.image.shape[:2]
        self.is_encoded = self.is_suggested = self.shows_initial = self.hides_masks = False
        self.opened, self.clicks, self.first = time.monotonic(), 0, None
        self.set_title()
        self.ask(partial(self.encode, self.path, self.image), partial(self.on_encoded, self.path))
        if self.paths:
            self.worker.add(NEXT, partial(self.encode, self.paths[0]))
        self.set_view()

    def set_title(self):
        name, count = self.path.name.encode(errors="replace").decode(), len(self.learner.learned)
        learned = say(f", learned from {count}", f", {count}장에서 배움") if self.args.learn and count else ""
        self.figure.canvas.manager.set_window_title(f"{name} ({self.total - len(self.paths)}/{self.total}){learned}")

    def touch(self, _event=None):
        self.touched = time.monotonic()

    def tick(self):
        """Also queue one learning step at a time while the user does nothing."""
        super().tick()
        if not (self.is_learning or self.waiting) and self.learner.has_work() and \
                time.monotonic() - self.touched > PAUSE:
            self.is_learning = True
            self.worker.add(BACKGROUND, self.learner.work, self.on_learned)

    def on_learned(self, _):
        self.is_learning = False
        if self.path and self.figure.canvas.manager:  # else the window has been closed
            self.set_title()

    def on_module(self, _module, _inputs, outputs):
        """In a forward pass, and once more in its backward pass: a place where the worker's job may give way."""
        self.give_way()
        for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.give_way())

    def give_way(self):
        """In the worker: run jobs of a higher priority first; a learning step stands still while the user is active.

        No job may run while the model has other weights, nor inside the encoding of what has become the current image:
        clicks need its features.
        """
        if (threading.current_thread() is not self.worker.thread or self.learner.has_other_weights
                or self.worker.priority == NEXT and self.encoding == self.path):
            return
        while not self.worker.give_way() and self.worker.priority == BACKGROUND and \
                time.monotonic() - self.touched < PAUSE:
            time.sleep(TICK_MS / 1000)

    def encode(self, path, image=None):
        """In the worker: keep a predictor with the features of an image for each model, unless it was skipped.

        image: uint8 H x W x 3; None: read it, as it is the next one.
        """
        self.encoding = path if image is None else self.encoding
        if path in {self.path, *self.paths[:1]} - self.encoded.keys():
            with contextlib.suppress(ImageError):  # open_next() reports it
                image = read_image(path) if image is None else image
                predictors = [copy.copy(each) for each in self.predictors.values()]  # no two images share their state
                set_image_in_all(predictors, image, self.shared)
                self.encoded[path] = predictors
        for old in self.encoded.keys() - {self.path, *self.paths[:1]}:
            del self.encoded[old]

    def on_encoded(self, path, _):
        self.is_encoded = self.is_encoded or path == self.path
        if path == self.path and not (self.clicks or self.history) and self.learner.is_worth_showing():
            self.delayed = [each for each in self.delayed if each.args != ("enter",)]  # pressed before it was seen
            self.set_prompts([], None, is_suggested=True)
        self.update()

    def predict(self, path, asked):
        """In the worker: the candidates for the prompts of an object; incomplete if the prompts have changed since."""
        candidates = {}
        with self.learner.using(self.learner.initial) if self.shows_initial else contextlib.nullcontext():
            for title, predictor in zip(self.predictors, self.encoded.get(path, ())):
                if asked is self.current:
                    candidates[title] = segment(predictor, asked.points, asked.box, refine=self.args.refine)
        return candidates

    def on_candidates(self, asked, candidates):
        if asked is self.current:
            self.current = asked._replace(candidates=candidates)
            self.first = self.first or (self.current.best([*self.predictors][-1])[1], self.is_suggested)
        self.update()

    def add_prompt(self, point, box):
        self.act(partial(self.prompt, point, box), False)

    def prompt(self, point, box):
        self.history.append((self.finished, self.current, self.is_suggested))
        self.clicks += 1
        self.set_prompts([*self.current.points, *([point] if point else [])], box or self.current.box)

    def set_prompts(self, points, box, choice=None, is_suggested=False):
        """Set new prompts for the current object and queue their segmentation; until it ends, the old mask is shown.

        is_suggested: segment what the model finds without prompts.
        """
        self.is_suggested, is_asked = is_suggested, points or box or is_suggested
        self.current = Segmented(points, box, self.current.candidates if is_asked else {}, choice)
        if is_asked:
            self.ask(partial(self.predict, self.path, self.current), partial(self.on_candidates, self.current))
        self.update()

    def objects(self):
        """The finished objects, and the current one if the last model predicts a pixel of it."""
        is_found = self.current.candidates and self.current.best([*self.predictors][-1])[1].any()
        return [*self.finished, self.current] if is_found else self.finished

    def press_key(self, key):
        if key in ("u", "backspace") and self.history:
            self.finished, before, is_suggested = self.history.pop()
            self.set_prompts(before.points, before.box, before.choice, is_suggested)
        elif key in ("1", "2", "3") and self.current.candidates:
            self.choose(int(key) - 1)
        elif key == "r" or key == "n" and len(self.objects()) > len(self.finished):
            self.history.append((self.finished, self.current, self.is_suggested))
            self.finished = self.objects() if key == "n" else self.finished
            self.set_prompts([], None)
        elif key == "enter" and self.objects():
            self.save(self.objects())
        elif key == "s":
            self.open_next()
        elif key == "m":
            self.shows_initial = not self.shows_initial
            self.set_prompts(*self.current[:2], self.current.choice, self.is_suggested)
        elif key in ("n", "enter"):
            self.update(say("nothing drawn yet: click an object, or press s to skip this image",
                            "아직 그린 것이 없습니다. 객체를 클릭하거나, s로 이 이미지를 건너뛰세요"))

    def choose(self, choice):
        """Pick a candidate in every panel, and show in which of them this changes the mask."""
        changed = ", ".join(title for title in self.predictors if self.current.best(title)[0] != choice)
        self.current = self.current._replace(choice=choice)
        self.update(say(f"candidate {choice + 1}, changed in: {changed or 'no panel'}",
                        f"후보 {choice + 1}, 바뀐 쪽: {changed or '없음'}"))

    def save(self, objects):
        """Write the mask in the format of data/, 8-bit for one object, else numbered, and open the next image.

        Pass the mask to the learner and add a row to annotation_log.csv. Its IoU compares the first mask shown for the
        image with what was saved: a suggestion with all objects, the mask of the first prompt with the first object.
        """
        labels = number_objects(objects, [*self.predictors][-1])
        mask_path = self.args.output / f"{self.path.stem}.png"
        write_png(mask_path, labels if len(objects) > 1 else 255 * labels.astype(np.uint8))
        print(f"객체 {len(objects)}개, 저장: {mask_path}")
        self.saved += 1
        self.learner.add(self.path, self.encoded[self.path][-1]._features)
        first, was_suggested = self.first
        iou = calculate_iou(first, labels > 0 if was_suggested else labels == 1)
        write_log_row(self.args.output / "annotation_log.csv", self.path.name, self.clicks,
                      round(time.monotonic() - self.opened, 1), round(iou, 4))
        self.open_next()

    def update(self, message=""):
        """Show the image, the objects' masks, the current one's prompts, and a message or the state."""
        objects = [*self.finished, self.current] if self.current.candidates else self.finished
        for axes, title in zip(self.panels, self.predictors):
            show_view(axes, self.image, [] if self.hides_masks else colored_masks(objects, title))
            is_initial = self.shows_initial and title == [*self.predictors][-1]
            name = say("before learning", "배우기 전") if is_initial else title
            axes.set_title(name, size=10)
            if self.current.candidates:
                number, _, score = self.current.best(title)
                found = say(f"mask {number + 1} of 3, score {score:.3f}", f"마스크 {number + 1} / 3, 점수 {score:.3f}")
                axes.set_title(f"{name}: {found}", size=10)
        self.marked = [(*self.current[:2], np.array(object_color(len(self.finished) + 1)) / 255)]
        mark_prompts(self.panels, self.marked)
        status = message or (
            say("encoding ...", "인코딩하는 중 ...") if not self.is_encoded else
            say("segmenting ...", "분할하는 중 ...") if self.waiting else
            say("suggested, Enter keeps it", "제안, Enter로 저장") if self.is_suggested and self.objects() else
            say("ready", "준비됨"))
        self.status.set_text(f"{say('object', '객체')} {len(self.finished) + 1}: {status}")
        self.figure.canvas.draw_idle()
        self.touch()  # a learning step would slow the drawing down


if __name__ == "__main__":
    run(main, "--image-size 512나 --device cpu를 써 보세요")

"""The matplotlib window of annotate.py, track_video.py and segment_volume.py: clicks, boxes, zoom, keys, a worker.

    from window import Window      Python finds this file beside the script

A window opens on this screen or, with --web, in a browser. It never waits for the model, which runs in a Worker; tick()
collects its results. Actions that depend on a result wait in Window.delayed, so that no click is lost. The functions
that open the window, draw, and distinguish clicks from drags are those of test_my_image.py.

Chapters:
    settings    sizes, keys, the language of the hints
    worker      the thread that owns the model
    drawing     the part of the image that is shown
    the window  clicks, drags, zoom, keys
"""

import itertools
import queue
import sys
import threading
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib import pyplot as plt

sys.path[1:1] = [str(Path(__file__).resolve().parent.parent)]
from test_my_image import DISPLAY_SIDE, mark_prompts, object_color, overlay, reduce_to, show_window  # noqa: E402
from test_my_image import Window as ImageWindow  # noqa: E402

# ---- settings ----

LEAST_VIEW = 16         # smallest width, in pixels of the image, that the zoom shows
TICK_MS = 10            # between two calls of tick()
CLICK, NEXT, BACKGROUND = range(3)  # priorities of jobs: what the window waits for; the next image; other
KOREAN_KEYBOARD = {"ㅕ": "u", "ㄱ": "r", "ㅜ": "n", "ㄴ": "s", "ㅂ": "q", "ㅗ": "h", "ㅡ": "m"}  # on the same keys
HAS_HANGUL = len(plt.rcParams["font.family"]) > 1  # test_my_image.py found a font with Hangul


def say(english, korean):
    """The text to draw in a window: Korean, as on the terminal, if a font has Hangul."""
    return korean if HAS_HANGUL else english


def add_web_flag(parser):
    parser.add_argument("--web", type=int, nargs="?", const=8988, metavar="PORT",
                        help="창을 브라우저에 띄움: 화면이 없는 서버에서도 됨 (PORT를 빼면 8988)")


# ---- worker ----


class Worker:
    """A thread that owns the model: it runs jobs by priority (CLICK, NEXT, BACKGROUND), oldest first.

    priority: that of the job that is running. Where a job calls give_way(), jobs of a higher priority run first.
    """

    def __init__(self):
        self.jobs, self.done, self.order = queue.PriorityQueue(), queue.SimpleQueue(), itertools.count()
        self.priority = BACKGROUND
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def add(self, priority, job, then=None):
        """Queue job(), a function; deliver() will call then(its result)."""
        self.jobs.put((priority, next(self.order), job, then))

    def run(self):
        while (entry := self.jobs.get())[2]:
            self.do(*entry)

    def do(self, priority, _, job, then):
        interrupted, self.priority = self.priority, priority
        try:
            self.done.put((then, job(), None))
        except BaseException as error:
            self.done.put((then, None, error))
        self.priority = interrupted

    def give_way(self):
        """Inside a job: run the waiting jobs of a higher priority; returns whether the thread is to end instead."""
        if not self.jobs.empty():
            entry = self.jobs.get()
            if not entry[2] or entry[0] >= self.priority:
                self.jobs.put(entry)
                return not entry[2]
            self.do(*entry)
        return False

    def deliver(self):
        """In the window's thread: pass on the results so far; raises the exception of a job that failed."""
        while not self.done.empty():
            then, result, error = self.done.get()
            if error:
                raise error
            if then:
                then(result)

    def close(self):
        """End the thread after its current job."""
        self.add(-1, None)
        self.thread.join()


# ---- drawing ----


def overlay_labels(image, labels):
    """A copy of `image`, uint8 H x W x 3, with every object of a label map, uint8 H x W, tinted and outlined."""
    drawn = image.copy()
    for number in np.unique(labels[labels > 0]):
        drawn = overlay(drawn, labels == number, object_color(int(number)))
    return drawn


def show_view(axes, image, masks):
    """Draw the part of `image` that the axes show, with `masks`, (bool H x W, color), over it, in image coordinates."""
    height, width = image.shape[:2]
    (left, right), (down, up) = axes.get_xlim(), axes.get_ylim()
    x1, y1 = (int(np.clip(np.floor(edge + 0.5), 0, side - 1)) for edge, side in ((left, width), (up, height)))
    x2, y2 = (int(np.clip(np.ceil(edge + 0.5), start + 1, side)) for edge, start, side in
              ((right, x1, width), (down, y1, height)))
    part = reduce_to(image[y1:y2, x1:x2], DISPLAY_SIDE, cv2.INTER_AREA)
    times = max(1, DISPLAY_SIDE // 2 // max(part.shape))  # outlines thinner than the pixels of a small image
    part = part.repeat(times, axis=0).repeat(times, axis=1)
    for mask, color in masks:
        inside = mask[y1:y2, x1:x2].astype(np.uint8)
        part = overlay(part, cv2.resize(inside, part.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0, color)
    axes.images[0].set(data=part, extent=(x1 - 0.5, x2 - 0.5, y2 - 0.5, y1 - 0.5))


# ---- the window ----


class Window:
    """A matplotlib window on images: clicks, dragged boxes, zoom, keys. self.worker runs the model.

    panels: number of panels, which all show the same image; figsize: in inches; bottom: lower end of the panels, as a
    share of the height; hints: text below the panels; size: (H, W) of the image shown; aspect: height of a
    pixel / its width.

    A subclass defines add_prompt(point, box), press_key(key) and update(), which sets marked to the [(points, box)]
    that it draws; and WAITING_KEYS, the keys that depend on the model's answer to the clicks before them. show() raises
    the exceptions of event handlers.
    """

    WAITING_KEYS = ()
    position, on_press, dragged_box = ImageWindow.position, ImageWindow.on_press, ImageWindow.dragged_box

    def __init__(self, panels, figsize, bottom, hints, size, aspect=1):
        self.size, self.worker, self.waiting, self.delayed = size, Worker(), 0, []
        self.pressed, self.marked, self.error, self.hides_masks = None, [], None, False
        self.figure = plt.figure(figsize=figsize)
        self.panels = list(self.figure.subplots(1, panels, squeeze=False, gridspec_kw={
            "left": 0.02, "right": 0.98, "bottom": bottom, "top": 0.9, "wspace": 0.03})[0])
        for axes in self.panels:
            axes.imshow(np.zeros((1, 1, 3), np.uint8), aspect=aspect)
            axes.set(xticks=[], yticks=[], autoscale_on=False)
            axes.callbacks.connect("ylim_changed", self.guarded(lambda axes: self.update()))  # the toolbar zooms, too
        self.figure.text(0.5, 0.015, hints, ha="center", fontsize=9)
        canvas = self.figure.canvas
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # disables matplotlib's own keys
        for name, handler in (("button_press_event", self.on_press), ("motion_notify_event", self.on_motion),
                              ("button_release_event", self.on_release), ("key_press_event", self.on_key),
                              ("scroll_event", self.on_scroll)):
            canvas.mpl_connect(name, self.guarded(handler))
        if hasattr(canvas, "set_capture_scroll"):  # a browser would scroll the page
            canvas.set_capture_scroll(True)
        self.timer = canvas.new_timer(interval=TICK_MS)
        self.timer.add_callback(self.guarded(self.tick))

    def guarded(self, handler):
        """Wrap an event handler: show() raises its exception, which closes the window (GUI toolkits only print it)."""
        def handle(*event):
            try:
                handler(*event)
            except BaseException as error:  # Ctrl-C too
                self.error = error
                self.close()
        return handle

    def show(self):
        """Show the window until it is closed."""
        try:
            self.timer.start()
            show_window(self.figure)
        finally:
            self.close()
            self.worker.close()
        if self.error:
            raise self.error

    def close(self):
        self.timer.stop()
        plt.close(self.figure)

    def ask(self, job, then):
        """Let the worker run job() and then, here, then(its result); actions that depend on the result wait."""
        def finish(result):
            self.waiting -= 1
            then(result)
        self.waiting += 1
        self.worker.add(CLICK, job, finish)

    def act(self, action, waits):
        """Do action() now or, with `waits`, once the worker has answered; always after the actions that wait."""
        if self.delayed or waits and self.waiting:
            self.delayed.append(action)
        else:
            action()

    def tick(self):
        self.worker.deliver()
        while self.delayed and not self.waiting:
            self.delayed.pop(0)()

    def on_motion(self, event):
        if self.pressed and (box := self.dragged_box(event)):
            mark_prompts(self.panels, [*self.marked, ([], box)])
            self.figure.canvas.draw_idle()

    def on_release(self, event):
        # on macOS a Ctrl-click presses button 3 and releases button 1; the press determines the button
        if not self.pressed or event.button not in (self.pressed.button, 1):
            return
        box = self.dragged_box(event)
        point = None if box else (*self.position(self.pressed), int(self.pressed.button == 1))
        self.pressed = None
        self.add_prompt(point, box)

    def on_scroll(self, event):
        """Zoom in or out around the pointer."""
        if event.inaxes in self.panels:
            (left, right), (_, top), width = event.inaxes.get_xlim(), event.inaxes.get_ylim(), self.size[1]
            share = min(max((right - left) * 0.8 ** event.step, LEAST_VIEW), width) / width
            x, y, change = event.xdata, event.ydata, share * width / (right - left)
            self.set_view(x - (x - left) * change, y - (y - top) * change, share)

    def set_view(self, left=-0.5, top=-0.5, share=1):
        """Show a part of the image in all panels: its left and top edge, kept inside; its share of the sides."""
        height, width = self.size
        left, top = (min(max(edge, -0.5), (1 - share) * side - 0.5) for edge, side in ((left, width), (top, height)))
        for axes in self.panels:
            axes.set(xlim=(left, left + share * width), ylim=(top + share * height, top))

    def on_key(self, event):
        key = (event.key or "").lower()  # None for a key without a name; lower case also with Caps Lock
        key = KOREAN_KEYBOARD.get(key, key)
        if key in plt.rcParams["keymap.quit"]:
            self.act(partial(self.close), False)  # after the clicks and keys that still wait
        elif key == "0":
            self.set_view()
        elif key == "h":
            self.hides_masks = not self.hides_masks
            self.update()
        else:
            self.act(partial(self.press_key, key), key in self.WAITING_KEYS)

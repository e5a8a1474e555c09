"""Measure the time from a click in extras/annotate.py's window to the redrawn mask, with and without --learn.

    python benchmarks/bench_annotate.py

The model is sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless for quality. A simulated person
looks at each image for one to three seconds before each click, moves the mouse for 0.7 seconds and clicks. The image
after the current one is encoded meanwhile. Events go through matplotlib's own event chain to its Agg canvas. A piece of
the learner's work is measured after the window was closed, as nothing interrupts it then.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
from matplotlib.backend_bases import KeyEvent, MouseEvent

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "benchmarks"), str(ROOT / "demo")]
import annotate  # noqa: E402
import bench_training  # noqa: E402

MOVE = 0.7  # seconds that the mouse moves before a click


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--clicks", type=int, default=5, help="in each image")
    parser.add_argument("--look", type=float, nargs=2, default=(1, 3), help="seconds, least and most, before a click")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    matplotlib.use("Agg")
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = bench_training.save_random_weights(args.model_cfg, Path(folder) / "random.pt")
        paths = [image for image, _ in bench_training.draw_pairs(Path(folder), args.images)]
        for learns in (False, True):
            seconds[learns], steps = label(paths, checkpoint, Path(folder, f"masks {learns}"), learns, args)
    frozen, learning = (np.percentile(seconds[learns], (50, 95)) for learns in (False, True))
    print(f"{args.model_cfg}, {len(seconds[True])} clicks; click to redrawn mask, median and 95th percentile: "
          f"frozen {frozen[0]:.3f} s, {frozen[1]:.3f} s; learning {learning[0]:.3f} s, {learning[1]:.3f} s\n"
          f"median {learning[0] / frozen[0]:.2f}x; 95th percentile {learning[1] - frozen[1]:+.3f} s; "
          f"{len(steps)} pieces of work by the learner, median {np.median(steps):.3f} s, longest {max(steps):.3f} s")


def label(paths, checkpoint, output, learns, args):
    """Label all images; returns the seconds of each click and of each piece of work that the learner did afterwards."""
    flags = ["--images", *map(str, paths), "--output", str(output), "--model-cfg", args.model_cfg, "--checkpoint",
             str(checkpoint), "--original", "--device", args.device, *(["--learn"] if learns else [])]
    with mock.patch.object(sys, "argv", ["annotate.py", *flags]):
        settings = annotate.parse_args()
    predictors, shared = annotate.load_models(settings)
    learner = annotate.Learner(predictors["original model"], output, annotate.STEPS if learns else 0)
    if learns:
        learner.resume([])  # as annotate.py does: hashes the weights
    clicks, steps, rng = [], [], np.random.default_rng(0)
    window = annotate.AnnotationWindow(paths, len(paths), predictors, shared, learner, settings)
    canvas = window.figure.canvas
    for _ in paths:
        wait(window, lambda: window.is_encoded)
        for _ in range(args.clicks):
            pause(window, rng.uniform(*args.look))
            height, width = window.size
            place = window.panels[0].transData.transform(rng.uniform([0, 0], [width - 1, height - 1]))
            for _ in range(round(MOVE / 0.02)):
                canvas.callbacks.process("motion_notify_event", MouseEvent("motion_notify_event", canvas, *place))
                pause(window, 0.02)
            started = time.perf_counter()
            for name in ("button_press_event", "button_release_event"):
                canvas.callbacks.process(name, MouseEvent(name, canvas, *place, 1))
            wait(window, lambda: not window.waiting)
            canvas.draw()
            clicks.append(time.perf_counter() - started)
        if not window.objects():  # random weights may predict an empty mask
            window.act(window.open_next, False)
        else:
            canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, "enter"))
    window.worker.close()
    while learns and learner.has_work():
        started = time.perf_counter()
        learner.work()
        steps.append(time.perf_counter() - started)
    return clicks, steps or [0]


def pause(window, seconds):
    end = time.perf_counter() + seconds
    wait(window, lambda: time.perf_counter() > end)


def wait(window, is_over):
    """Let the window work, as its timer does, until is_over()."""
    while not is_over():
        window.tick()
        if window.error:
            raise window.error
        time.sleep(0.01)


if __name__ == "__main__":
    main()

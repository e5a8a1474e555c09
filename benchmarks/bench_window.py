"""Measure the time from a click in test_my_image.py's window to the redrawn mask.

    python benchmarks/bench_window.py

The model is sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless for quality. Events go through
matplotlib's own event chain to its Agg canvas, which draws at once; a real window also copies the image to the screen.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backend_bases import MouseEvent

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "demo")]
import bench_training  # noqa: E402
import make_demo_data  # noqa: E402

import test_my_image as project  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--width", type=int, default=1800)
    parser.add_argument("--height", type=int, default=1200)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    matplotlib.use("Agg")
    device = project.detect_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = bench_training.save_random_weights(args.model_cfg, Path(folder) / "random.pt")
        predictor = project.load_predictor(args.model_cfg, checkpoint, device)
    image, _ = make_demo_data.draw_image(np.random.default_rng(0))
    image = project.cv2.resize(image, (args.width, args.height))
    started = time.perf_counter()
    predictor.set_image(image)
    encoding = time.perf_counter() - started
    window = project.Window(image, {"fine-tuned model": partial(project.segment, predictor)}, "benchmark")
    window.figure.canvas.draw()
    rng, seconds = np.random.default_rng(0), []
    for _ in range(args.clicks + 1):
        window.set_state([], [], None)
        place = window.panels[0].transData.transform(rng.uniform([0, 0], [args.width - 1, args.height - 1]))
        started = time.perf_counter()
        for name in ("button_press_event", "button_release_event"):
            window.figure.canvas.callbacks.process(name, MouseEvent(name, window.figure.canvas, *place, 1))
        seconds.append(time.perf_counter() - started)
    seconds = np.array(seconds[1:])  # the first warms up
    print(f"{args.model_cfg}, {args.width} x {args.height} px, {device}: encoding {encoding:.2f} s; "
          f"click to redrawn mask: median {np.median(seconds):.3f} s, slowest {seconds.max():.3f} s of {args.clicks}")


if __name__ == "__main__":
    main()

"""Time the masks of an image's boxes with one decoder call for all boxes and with one call per box.

    python benchmarks/bench_labels.py

Both encode the image once. The model is sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless
for quality. On the CPU it measures process time, which a busy machine changes little.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import supervision as sv
import torch
from bench_training import ROOT, save_random_weights

sys.path.insert(0, str(ROOT / "extras"))
from common import load_predictor  # noqa: E402
from files import detect_device  # noqa: E402
from label_with_text import GroundedSAM2  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--boxes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = detect_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save_random_weights(args.model_cfg, Path(name) / "random.pt")
        predictor = load_predictor(args.model_cfg, checkpoint, device)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1024, 1280, 3)).astype(np.uint8)
    corners = rng.uniform(0, 800, (args.boxes, 2))
    boxes = np.hstack([corners, corners + 200]).astype(np.float32)
    detector = GivenBoxes()
    together = GroundedSAM2(predictor, detector)

    def one_call():
        together.segment(image, detector.detections(boxes))

    def a_call_for_each():
        predictor.set_image(image)
        for box in boxes:
            masks, scores, _ = predictor.predict(box=box, multimask_output=True)
            masks[scores.argmax()].astype(bool)

    rows = [(timed(device, predictor.set_image, image), timed(device, one_call), timed(device, a_call_for_each))
            for _ in range(args.repeats + 1)][1:]  # the first warms up
    encoding, one, each = np.median(rows, axis=0)
    print(f"{args.model_cfg}, {predictor.model.image_size} px, image 1280 x 1024, {args.boxes} boxes, {device}, "
          f"{torch.get_num_threads()} CPU threads")
    unit = "CPU seconds" if device == "cpu" else "seconds"
    print(f"{unit} an image: one call {one:.2f}, a call for each box {each:.2f}, ratio {each / one:.2f}x")
    print(f"without the encoding ({encoding:.2f}): {one - encoding:.2f} and {each - encoding:.2f}, "
          f"ratio {(each - encoding) / (one - encoding):.2f}x")


def timed(device, function, *arguments):
    """Seconds that a call takes: process time on the CPU, else wall time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    function(*arguments)
    getattr(torch, torch.device(device).type).synchronize()  # torch.cuda, torch.mps; torch.cpu has nothing to wait for
    return clock() - started


class GivenBoxes:
    """Stands in for a detector."""

    categories = {1: "object"}

    def detections(self, boxes):
        return sv.Detections(xyxy=boxes, class_id=np.ones(len(boxes), int), confidence=np.ones(len(boxes)))


if __name__ == "__main__":
    main()

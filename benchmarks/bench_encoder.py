"""Time several ways to encode an image on this device.

    python benchmarks/bench_encoder.py

Each way alternates with plain float32, so that a busy machine slows both. The model is
sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless for quality.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_training import ROOT, save_random_weights, timed

sys.path.insert(0, str(ROOT))
import train_sam2_proper as project  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = project.detect_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save_random_weights(args.model_cfg, Path(name) / "random.pt")
        plain = project.load_predictor(args.model_cfg, checkpoint, device)
    inference, last, compiled = (copy.deepcopy(plain) for _ in range(3))
    image = np.random.default_rng(0).integers(0, 256, (512, 640, 3)).astype(np.uint8)
    last.model.image_encoder.to(memory_format=torch.channels_last)
    compiled.model.image_encoder.forward = torch.compile(compiled.model.image_encoder.forward, dynamic=False)
    started = time.perf_counter()
    compiled.set_image(image)
    print(f"torch.compile itself takes {time.perf_counter() - started:.0f} s")

    def under_inference_mode():
        with torch.inference_mode():
            inference.set_image(image)

    ways = {"inference_mode": under_inference_mode, "channels_last": lambda: last.set_image(image),
            "torch.compile": lambda: compiled.set_image(image)}
    plain.set_image(image)
    print(f"{args.model_cfg}, {plain.model.image_size} px, {device}, {torch.get_num_threads()} CPU threads")
    for name, encode in ways.items():
        encode()  # warm up
        rows = [(timed(device, plain.set_image, image), timed(device, encode)) for _ in range(args.repeats)]
        float32, other = np.median(rows, axis=0)
        print(f"{name:16} {other:.2f} s an image, plain float32 {float32:.2f} s, ratio {float32 / other:.2f}x")


if __name__ == "__main__":
    main()

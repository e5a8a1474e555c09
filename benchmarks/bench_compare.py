"""Time compare_models.py against the same comparison with two encodings per image.

    python benchmarks/bench_compare.py

Both alternate in one run, with the same weights and images. The model is sam2.1_hiera_s at 1024 px with random
weights: right for speed, meaningless for quality.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_training import ROOT, draw_pairs, save_random_weights, timed

sys.path.insert(0, str(ROOT))
import compare_models as project  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = project.detect_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        pairs = draw_pairs(Path(name), args.images)
        checkpoint = save_random_weights(args.model_cfg, Path(name) / "random.pt")
        original = project.load_predictor(args.model_cfg, checkpoint, device)
        finetuned = copy.deepcopy(original)
        assert project.same_frozen_weights(original.model, finetuned.model)
        compare_one(original, finetuned, *pairs[0], True)  # warm up
        rows = [[timed(device, compare_one, original, finetuned, *pair, shared) for shared in (False, True)]
                for pair in pairs]
    plain, ours = np.mean(rows, axis=0)
    print(f"{args.model_cfg}, {original.model.image_size} px, {device}, {torch.get_num_threads()} CPU threads, "
          f"{len(pairs)} images")
    print(f"seconds an image: encoded twice {plain:.3f}, encoded once {ours:.3f}, ratio {plain / ours:.2f}x")


def compare_one(original, finetuned, image_path, mask_path, shared):
    _, image, labels = project.read_pair((image_path, mask_path))
    _, gt_masks, _ = project.split_objects(labels, max_objects=20)
    project.set_image_in_all([original, finetuned], image, shared)
    for predictor in (original, finetuned):
        masks, _ = project.predict_objects(predictor, "point", gt_masks)
        project.calculate_iou(masks[0], gt_masks[0])


if __name__ == "__main__":
    main()

"""Train on numbered masks and on the same masks merged, and compare both models on each object.

    python benchmarks/study_objects.py

It draws 60 images (48 to train on, 12 to compare on) of 3 to 8 ellipses in two sizes and two colors, many of which
touch. Both trainings start from the same weights and take the same number of decoder passes; compare_models.py then
prompts both models for each object of the 12 images with a click in its middle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
IMAGES, VAL_IMAGES = 60, 12
WIDTH, HEIGHT = 320, 240


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default=str(ROOT / "demo/sam2_demo.yaml"))
    parser.add_argument("--checkpoint", default=str(ROOT / "demo/sam2_demo.pt"))
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="keep the data and the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        draw_data(folder, args.seed)
        results = {kind: train_and_compare(folder, kind, args) for kind in ("numbered", "merged")}
    rows = {"original model": results["merged"]["original_iou"],
            **{f"trained on {kind} masks": result["finetuned_iou"] for kind, result in results.items()}}
    print(f"{IMAGES - VAL_IMAGES} images, {args.iterations} iterations, lr {args.lr:g}, seed {args.seed}; "
          f"{results['merged']['num_objects']} objects in {VAL_IMAGES} images")
    for name, iou in rows.items():
        print(f"{name:26} mean IoU of an object {iou:.1%}")


def draw_data(folder, seed):
    """Write images/, numbered/ (16-bit masks) and merged/ (8-bit), each with train/ and val/, below `folder`."""
    for number in range(IMAGES):
        split = "train" if number < IMAGES - VAL_IMAGES else "val"
        image, labels = draw_image(np.random.default_rng([seed, number]))
        for kind, picture in (("images", image), ("numbered", labels),
                              ("merged", np.where(labels > 0, 255, 0).astype(np.uint8))):
            path = folder / kind / split / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture)


def draw_image(rng):
    """Ellipses that touch: (uint8 H x W x 3, numbered mask uint16 H x W). Later ones lie over earlier ones."""
    image = np.full((HEIGHT, WIDTH, 3), rng.uniform(60, 110, 3)) + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
    labels = np.zeros((HEIGHT, WIDTH), np.uint16)
    colors = rng.uniform(120, 220, (2, 3))
    centre = rng.uniform(0.3, 0.7, 2) * (WIDTH, HEIGHT)
    for number in range(1, rng.integers(3, 9) + 1):
        size = (34, 26) if rng.random() < 0.5 else (20, 15)
        inside = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.ellipse(inside, centre.astype(int).tolist(), size, rng.uniform(0, 180), 0, 360, 1, -1)
        shade = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 4)[..., None]
        image = np.where(inside[..., None] > 0, colors[rng.integers(2)] * (0.55 + 0.45 * shade), image)
        labels[inside > 0] = number
        step = rng.uniform(0, 2 * np.pi)
        centre = centre + 44 * np.array([np.cos(step), np.sin(step)])
        centre = np.clip(centre, 36, [WIDTH - 36, HEIGHT - 36])
    image = cv2.GaussianBlur(image, (0, 0), 0.8) + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def train_and_compare(folder, kind, args):
    """Train on one kind of masks; returns compare_models.py's summary, always on numbered masks."""
    model = ["--model-cfg", args.model_cfg, "--checkpoint", args.checkpoint]
    output = folder / f"output_{kind}"
    run("train_sam2_proper.py", *model, "--image-dir", folder / "images/train", "--mask-dir", folder / kind / "train",
        "--val-image-dir", folder / "none", "--output-dir", output, "--iterations", args.iterations, "--lr", args.lr,
        "--save-every", args.iterations, "--seed", args.seed)
    run("compare_models.py", *model, "--finetuned", output / "sam2_final.pt", "--image-dir", folder / "images/val",
        "--mask-dir", folder / "numbered/val", "--output-dir", output / "comparison")
    return json.loads((output / "comparison/summary.json").read_text(encoding="utf-8"))


def run(script, *arguments):
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

"""Copy data/ and add images without any object: squares cut from the background of its own images.

    python benchmarks/cut_background.py --data-dir data --output data_empty --train 200 --val 100

The images are visited in random order. In each, 300 random squares are drawn, and the largest is used that is at least
96 px wide, is at least 4 px away from every object, and is dark (no channel above 30, as in the corners of endoscopic
images) in at most 15 % of its area. It is resized to the size of the image. Images without such a square are skipped.
"""

import argparse
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np

LEAST = 96  # pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=100)
    args = parser.parse_args()
    for seed, (split, count) in enumerate((("train", args.train), ("val", args.val)), start=1):
        images, masks = (args.output / kind / split for kind in ("images", "masks"))
        for source, target in ((args.data_dir / "images" / split, images), (args.data_dir / "masks" / split, masks)):
            shutil.copytree(source, target)
        rng, sides = np.random.default_rng(seed), []
        paths = sorted(images.iterdir())
        for path in (paths[index] for index in rng.permutation(len(paths))):
            image, mask = cv2.imread(str(path)), cv2.imread(str(masks / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
            if len(sides) < count and (square := find_square(image, mask, rng)):
                top, left, side = square
                patch = cv2.resize(image[top:top + side, left:left + side], mask.shape[::-1],
                                   interpolation=cv2.INTER_CUBIC)
                cv2.imwrite(str(images / f"empty_{path.stem}.png"), patch)
                cv2.imwrite(str(masks / f"empty_{path.stem}.png"), np.zeros(mask.shape, np.uint8))
                sides.append(side)
        if len(sides) < count:
            sys.exit(f"only {len(sides)} of {count} images have such a square")
        print(f"{split}: {len(sides)} squares, sides {min(sides)} to {max(sides)} px, median {np.median(sides):g}")


def find_square(image, mask, rng):
    """The largest of 300 random squares of background: (top, left, side) in pixels, or None."""
    near = cv2.dilate((mask > 0).astype(np.uint8), np.ones((9, 9)))
    dark, best = image.max(2) < 30, None
    for _ in range(300 if min(mask.shape) >= LEAST else 0):
        side = int(rng.integers(LEAST, min(mask.shape) + 1))
        top, left = (int(rng.integers(length - side + 1)) for length in mask.shape)
        place = slice(top, top + side), slice(left, left + side)
        if not near[place].any() and dark[place].mean() <= 0.15 and (best is None or side > best[2]):
            best = top, left, side
    return best


if __name__ == "__main__":
    main()

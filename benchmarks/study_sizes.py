"""Train each recipe on 10, 30, 100, 300 and all images, and compare the IoU: what to choose with few images.

    python benchmarks/study_sizes.py --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt

The images of a subset are drawn from data/images/train at random; a larger subset contains the smaller ones. Every run
has the same number of decoder passes (see study_recipes.py) and is measured on data/images/val after the last
iteration: the mask with the highest score, for one click, for the box and without a prompt. One training per core runs
in parallel.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import study_recipes
from study_recipes import COLUMNS, project

RECIPES = ("reference", "improved", "strongest")
SHOWN = [COLUMNS.index(name) for name in ("point IoU", "box IoU", "none IoU")]


def main():
    parser = study_recipes.make_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 100, 300, 800])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    args = parser.parse_args()
    args.final = True
    train, val = (project.find_pairs(args.data_dir / "images" / split, args.data_dir / "masks" / split)
                  for split in ("train", "val"))
    print(f"{args.model_cfg}, up to {len(train)} images to train on, {len(val)} to measure on, {args.passes} decoder "
          f"passes, {args.seeds} seeds; IoU in percent, mean of the seeds (lowest to highest)\n"
          f"{'images':>6} {'recipe':10} {'click':>20} {'box':>20} {'no prompt':>20}", flush=True)
    rows = [(size, recipe) for size in args.sizes for recipe in args.recipes]
    jobs = [(recipe, {"flags": f"--recipe {recipe}"}, seed,
             [train[index] for index in np.random.default_rng(seed).permutation(len(train))[:size]], val, args)
            for size, recipe in rows for seed in range(args.seeds)]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(args.workers) as pool:
        args.cache_dir = Path(temporary)
        results = pool.map(study_recipes.run, jobs)
        for size, recipe in rows:
            values = np.array([next(results)[1][SHOWN] for _ in range(args.seeds)])
            cells = [f"{each.mean():.1f} ({each.min():.1f} to {each.max():.1f})" for each in values.T]
            print(f"{size:6} {recipe:10} " + " ".join(cell.rjust(20) for cell in cells), flush=True)


if __name__ == "__main__":
    main()

"""Train recipes at an equal budget and compare their IoU. --recipe improved and strongest were chosen with it.

    python benchmarks/study_recipes.py --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt
    python benchmarks/study_recipes.py --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt --final

The budget is a number of decoder passes: one prompt on one image, forward and backward. Encoder passes are
counted separately. The study trains on four fifths of data/images/train and measures on the held-back fifth;
--final, to be run once, trains only the recipes of train_sam2_proper.py, on all training images, and measures
on data/images/val. It measures the mask with the highest score after the last iteration, for one click in the
middle, for the box and without a prompt (compared with the union of an image's objects; images without any object
give the specificity). It runs one training per core in parallel.

--unet SECONDS trains MONAI's BasicUNet from scratch instead, for that CPU time, on the same images.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_sam2_proper as project  # noqa: E402

TRAINING_LOSS, PICK_PIXEL = project.training_loss, project.pick_pixel
BASE = "--dice-weight 1 --supervise all --batch-size 4 --lr 3e-4 --scheduler cosine --warmup 50"
MIXED = f"{BASE} --prompt mixed"


# name: settings, with the reason for trying them. From "base" on, each is the base with one change.
STUDY = {
    "reference": {"flags": ""},
    "reference, lr 1e-4": {"flags": "--lr 1e-4"},  # the default 1e-5 is made for long trainings of a large model
    "base": {"flags": BASE},  # less noisy steps, and overlap in the loss
    "no Dice": {"flags": f"{BASE} --dice-weight 0"},
    "Dice x 3": {"flags": f"{BASE} --dice-weight 3"},
    "focal (x 20) + Dice": {"flags": BASE, "focal": 20},  # SAM 2's own loss: easy pixels count less
    "first mask": {"flags": f"{BASE} --supervise first"},  # the others stay untrained, and may be chosen
    "score x 1": {"flags": BASE, "score_weight": 1.0},  # SAM 2's own: better choice of the mask
    "batch 1": {"flags": f"{BASE} --batch-size 1 --lr 1e-4"},
    "batch 8": {"flags": f"{BASE} --batch-size 8"},
    "lr 1e-4": {"flags": f"{BASE} --lr 1e-4"},
    "lr 6e-4": {"flags": f"{BASE} --lr 6e-4"},
    "lr 1e-3": {"flags": f"{BASE} --lr 1e-3"},
    "no cosine": {"flags": f"{BASE} --scheduler none"},
    "clicks in the middle": {"flags": BASE, "clicks": "middle"},  # as the validation clicks
    "clicks at the border": {"flags": BASE, "clicks": "border"},  # the hard ones
    "points": {"flags": f"{BASE} --prompt points"},  # corrections, negative clicks
    "mixed": {"flags": MIXED},  # and boxes
    "mixed, lr 6e-4": {"flags": f"{MIXED} --lr 6e-4"},
    "mixed, lr 1e-3": {"flags": f"{MIXED} --lr 1e-3"},
    "average of weights": {"flags": BASE, "average": 0.99},  # less noise at the end
    "flips": {"flags": BASE, "views": (0, 2, 4, 6)},  # more images for the same labels; 4x to encode
    "flips and turns": {"flags": BASE, "views": tuple(range(8))},  # 8x to encode
    "mixed, neck too": {"flags": f"{MIXED} --encoder full --encoder-lr 3e-4",
                        "trained": r"image_encoder\.neck|sam_prompt_encoder|sam_mask_decoder"},
    "mixed, lora 3e-4": {"flags": f"{MIXED} --encoder lora --encoder-lr 3e-4"},  # trains the features too; no cache
    "mixed, lora 1e-3": {"flags": f"{MIXED} --encoder lora --encoder-lr 1e-3"},
    "mixed, full 3e-5": {"flags": f"{MIXED} --encoder full --encoder-lr 3e-5"},
    "mixed, full 1e-4": {"flags": f"{MIXED} --encoder full --encoder-lr 1e-4"},
    "mixed, full 3e-4": {"flags": f"{MIXED} --encoder full --encoder-lr 3e-4"},
    "mixed, full 3e-4, augment": {"flags": f"{MIXED} --encoder full --encoder-lr 3e-4 --augment"},
    "mixed, full 3e-4, average": {"flags": f"{MIXED} --encoder full --encoder-lr 3e-4", "average": 0.99},
}
MEASURES = (project.calculate_iou, project.calculate_dice)
COLUMNS = ("point IoU", "point Dice", "box IoU", "box Dice", "first mask", "none IoU", "none Dice")
FINAL = {"reference": {"flags": "--recipe reference"}, "reference, lr 1e-4": {"flags": "--recipe reference --lr 1e-4"},
         "improved": {"flags": "--recipe improved"}, "strongest": {"flags": "--recipe strongest"},
         "strongest, lora": {"flags": "--recipe strongest --encoder lora"}}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="names of recipes, separated by ';'")
    parser.add_argument("--cache-dir", type=Path, help="features, kept for the next run")
    parser.add_argument("--unet", type=float, metavar="SECONDS", help="train a U-Net instead, for this CPU time")
    parser.add_argument("--final", action="store_true", help="train_sam2_proper.py's recipes on data/images/val")
    args = parser.parse_args()
    temporary = None if args.cache_dir else tempfile.TemporaryDirectory()
    args.cache_dir = args.cache_dir or Path(temporary.name)
    pairs = {split: project.find_pairs(args.data_dir / "images" / split, args.data_dir / "masks" / split)
             for split in (("train", "val") if args.final else ("train",))}
    if args.final:
        train, val = pairs["train"], pairs["val"]
    else:
        val = pairs["train"][::5]
        train = [pair for pair in pairs["train"] if pair not in val]
    recipes = {"original": {"flags": ""}, **(FINAL if args.final else STUDY)} if not args.unet else {"U-Net": {}}
    if args.only:
        recipes = {name: recipes[name] for name in args.only.split(";")}
    jobs = [(name, options, seed, train, val, args) for name, options in recipes.items()
            for seed in range(args.seeds if name != "original" else 1)]
    print(f"{args.model_cfg}, {len(train)} images to train on, {len(val)} to measure on, {args.passes} decoder passes, "
          f"{args.seeds} seeds; mean ± standard deviation, in percent", flush=True)
    print(f"{'recipe':24} " + "".join(f"{name:>12} " for name in COLUMNS) + f"{'specificity':>12} "
          f"{'encodings':>9} {'CPU s':>7}  point IoU by seed", flush=True)
    done = {name: [] for name in recipes}
    with ProcessPoolExecutor(args.workers) as pool:
        for name, *result in pool.map(run_unet if args.unet else run, jobs):
            done[name].append(result)
            if len(done[name]) < (args.seeds if name != "original" else 1):
                continue
            values = np.array([values for values, *_ in done[name]])
            cells = " ".join(f"{mean:6.1f} ± {spread:3.1f}" if mean >= 0 else f"{'-':>12}"  # NaN: not measured
                             for mean, spread in zip(values.mean(0), values.std(0)))
            print(f"{name:24} {cells} {done[name][0][1]:9} {np.mean([seconds for *_, seconds in done[name]]):7.0f}  "
                  + " ".join(f"{value:.1f}" for value in values[:, 0]), flush=True)
    if temporary:
        temporary.cleanup()


def make_parser(doc):
    """A parser with the flags of every study of recipes; doc: the docstring of the script."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--passes", type=int, default=3000, help="decoder passes of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser


def run(job):
    """Train one recipe with one seed: (name, measured values, encoder passes, CPU seconds)."""
    name, options, seed, pairs, val_pairs, args = job
    torch.set_num_threads(1)
    flags = ["--model-cfg", args.model_cfg, "--checkpoint", args.checkpoint, "--device", args.device,
             "--workers", "0", "--seed", str(seed), *options["flags"].split()]
    if not any(word in options["flags"] for word in ("strongest", "--encoder")):
        # in --final each run encodes its own images, because its time is reported
        flags += ["--cache-gb", "2", *([] if args.final else ["--cache-dir", str(args.cache_dir)])]
    patches = [mock.patch.object(sys, "argv", ["study", *flags])]
    if "focal" in options:
        patches.append(mock.patch.object(project, "training_loss", partial(focal_loss, options["focal"])))
    if "clicks" in options:
        patches.append(mock.patch.object(project, "pick_pixel", partial(click_by_depth, options["clicks"])))
    if "trained" in options:
        patches.append(mock.patch.dict(project.TRAINED, full=re.compile(options["trained"])))
    if "score_weight" in options:
        patches.append(mock.patch.object(project, "SCORE_WEIGHT", options["score_weight"]))
    if "views" in options:
        pairs = write_views(pairs, options["views"], args.cache_dir / "views")
    patches.append(mock.patch.object(project, "load_images", lambda settings: (
        project.LabeledImages(pairs, project.MAX_SIDE, project.MIN_FOREGROUND,
                              keep_empty=settings.prompt in ("none", "any")),
        project.LabeledImages(val_pairs, 10**9, 1, keep_empty=True))))
    patches.append(mock.patch.object(project, "tqdm", lambda items, *_, **__: items))
    started = time.process_time()
    for patch in patches:
        patch.start()
    settings = project.parse_args()
    settings.iterations = args.passes // (settings.batch_size * settings.accumulate)
    training = project.Training(settings, args.device)
    if "average" in options:
        trained = torch.nn.ParameterList(training.parameters)
        average = torch.optim.swa_utils.AveragedModel(
            trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(options["average"]))
        training.optimizer.register_step_post_hook(lambda *_: average.update_parameters(trained))
    for iteration in range(1, settings.iterations + 1) if name != "original" else ():
        training.step(iteration)
        training.fetch()  # fails if the loss is not finite
    if "average" in options:
        trained.load_state_dict(average.module.state_dict())
    encoded = settings.iterations * settings.batch_size if training.cache is None else len(training.cache.kept)
    training.close()
    values = measure(training)
    for patch in patches:
        patch.stop()
    return name, values, encoded, time.process_time() - started


def focal_loss(weight, logits, scores, gt_masks, dice_weight):
    """project.training_loss with `weight` times the focal loss (gamma 2, alpha 0.25) instead of cross-entropy."""
    prob, gt = torch.sigmoid(logits), gt_masks[:, None]
    right = prob * gt + (1 - prob) * (1 - gt)
    alpha = 0.25 * gt + 0.75 * (1 - gt)
    focal = (-alpha * (1 - right) ** 2 * torch.log(right + 1e-5)).mean((-2, -1))
    plain, iou = TRAINING_LOSS(logits, scores, gt_masks, dice_weight)
    entropy = (-torch.log(right + 1e-5)).mean((-2, -1))
    return plain + (weight * focal - entropy).mean(), iou


def click_by_depth(where, mask, rng=None):
    """A random pixel among the deepest half of the mask ("middle") or the other half ("border"); see pick_pixel."""
    if rng is None:
        return PICK_PIXEL(mask)
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    limit = np.median(depth[mask])
    half = mask & (depth >= limit if where == "middle" else depth <= limit)
    return PICK_PIXEL(half, rng)


def write_views(pairs, numbers, folder):
    """Write views of the pairs as files; returns the pairs of all of them."""
    written = []
    for image_path, mask_path in pairs:
        for number in numbers:
            image, mask = (folder / kind / f"{image_path.stem}_{number}.png" for kind in ("images", "masks"))
            if not mask.is_file():
                pixels = view(project.read_image(image_path), number)[..., ::-1]
                project.write_file(image, cv2.imencode(".png", pixels)[1].tobytes())
                pixels = view(project.read_mask(mask_path), number)
                project.write_file(mask, cv2.imencode(".png", pixels)[1].tobytes())
            written.append((image, mask))
    return written


def view(array, number):
    """One of the eight views of an image or mask: number % 2 transposes, then flips up-down and left-right."""
    array = array.swapaxes(0, 1) if number % 2 else array
    return np.ascontiguousarray(array[::-1 if number & 2 else 1, ::-1 if number & 4 else 1])


def measure(training):
    """COLUMNS and specificity on the validation images, in percent; NaN where there is nothing to measure."""
    predictor, objects, unions, right = training.predictor, [], [], []
    for image in training.val_images:
        features, labels, columns, size = training.val_cache([image]), image.labels(), [], image.size
        gt_masks, union = labels == image.objects[:, None, None], labels[None] > 0
        for kind in ("point", "box", "none") if len(image.objects) else ("none",):
            truth = union if kind == "none" else gt_masks
            with torch.no_grad():
                low_res_masks, scores = project.simulate_prompts(predictor, features, kind, truth)
            best = project.best_masks(predictor, [size] * len(truth), low_res_masks, scores)
            if kind == "none" and project.nothing_found(predictor.model):
                best[0][:] = False
            if kind == "none" and len(image.objects):
                unions.append([calculate(best[0], union[0]) for calculate in MEASURES])
            elif kind == "none":
                right.append(not best[0].any())
            else:
                columns += [[calculate(*pair) for pair in zip(best, gt_masks)] for calculate in MEASURES]
            if kind == "point":
                first = project.best_masks(predictor, [size] * len(truth), low_res_masks[:, :1], scores[:, :1])
                first = [project.calculate_iou(*pair) for pair in zip(first, gt_masks)]
        if columns:
            objects += zip(*columns, first)
    return 100 * np.array([*np.mean(objects, 0), *np.mean(unions, 0), np.mean(right) if right else np.nan])


def run_unet(job):
    """Train MONAI's BasicUNet (2.0 M parameters) at 256 px for args.unet CPU seconds; the same result as run()."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet
    name, _, seed, pairs, val_pairs, args = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = BasicUNet(2, 3, 1, features=(32, 32, 64, 128, 256, 32))
    optimizer, loss_of = torch.optim.AdamW(net.parameters(), 1e-3), DiceCELoss(sigmoid=True)

    def read(pair):
        image = cv2.resize(project.read_image(pair[0]), (256, 256), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, project.read_mask(pair[1]) > 0

    def resized(mask):
        return torch.from_numpy(cv2.resize(mask.astype(np.float32), (256, 256), interpolation=cv2.INTER_AREA))[None]

    rng, started, seen = np.random.default_rng(seed), time.process_time(), 0
    examples = [(image, resized(mask)) for image, mask in map(read, pairs)]
    while (done := (time.process_time() - started) / args.unet) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * done)) / 2
        chosen = [torch.cat(examples[index]) for index in rng.integers(len(examples), size=8)]
        flipped = [part.flip([axis for axis in (1, 2) if rng.random() < 0.5]) for part in chosen]
        batch = torch.stack(flipped)
        optimizer.zero_grad()
        loss_of(net(batch[:, :3]), batch[:, 3:]).backward()
        optimizer.step()
        seen += len(batch)
    net.eval()
    unions, right = [], []
    for pair in val_pairs:
        image, mask = read(pair)
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(net(image[None]), mask.shape, mode="bilinear")[0, 0]
        found = logits.numpy() > 0
        if mask.any():
            unions.append([calculate(found, mask) for calculate in MEASURES])
        else:
            right.append(not found.any())
    values = [np.nan] * 5 + [*np.mean(unions, 0), np.mean(right) if right else np.nan]
    return name, 100 * np.array(values), seen, time.process_time() - started


if __name__ == "__main__":
    main()

"""How many clicks an annotator needs if the model learns from each label: extras/annotate.py --learn, simulated.

    python benchmarks/study_annotation.py --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt

A stream of images in random order is labeled. The first click is in the middle of an object, each further one in the
middle of the largest error of the mask with the highest score, at most 10; a mask that does not reach an IoU with them
counts as 11 clicks. The mask in data/ is then saved and learned. The values of an image with several objects are means
over the objects. Variants: frozen never learns; learning takes steps after each image (extras/learning.py); training
runs train_sam2_proper.py --recipe improved after every --every images, on all images so far. With --split train, the
model at the end of the stream is also measured on data/images/val: the mean IoU after one click.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import learning  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import train_sam2_proper as project  # noqa: E402

CLICKS = 10
LEVELS = (0.75, 0.85)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--split", default="val", choices=["train", "val"], help="choose settings on train")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=120, help="length of the stream")
    parser.add_argument("--seed", type=int, default=11, help="of the order")
    parser.add_argument("--start", type=int, default=0, help="leave out the first images of the order")
    parser.add_argument("--order", default="random", choices=["random", "uncertain"],
                        help="uncertain: lowest score of the initial model without a prompt first")
    parser.add_argument("--variants", default="frozen,learning,training", help="which to run")
    parser.add_argument("--steps", type=int, default=learning.STEPS, help="learning: steps per image")
    parser.add_argument("--lr", type=float, default=learning.LR, help="learning")
    parser.add_argument("--every", type=int, default=25, help="training: images between two trainings")
    parser.add_argument("--iterations", type=int, default=750, help="training: of --recipe improved")
    parser.add_argument("--output", type=Path, default=Path("output/study_annotation"), help="picture, models")
    args = parser.parse_args()
    pairs = project.find_pairs(args.data_dir / "images" / args.split, args.data_dir / "masks" / args.split)
    order = np.random.default_rng(args.seed).permutation(len(pairs))[args.start:][:args.images]
    pairs = [pairs[index] for index in order]
    if args.order == "uncertain":
        pairs = sort_by_certainty(pairs, args)
    stream = project.LabeledImages(pairs, 10**9, project.MIN_FOREGROUND)
    print(f"{args.model_cfg}, {len(stream)} images of {args.split}, seed {args.seed}, order {args.order}, {args.steps} "
          f"steps per image, lr {args.lr:g}\nfirst and second half of the stream:", flush=True)
    print(f"{'':10} clicks to 0.75 IoU   clicks to 0.85 IoU   IoU after one click  s per image to label, to learn"
          + "  validation" * (args.split == "train"), flush=True)
    ious, halves, kept = {}, [], {}
    for name in args.variants.split(","):
        predictor, result, seconds = label(name, stream, pairs, kept, args)
        ious[name] = [[iou[0] for iou in image] for image in result]
        values = [[np.mean([count_clicks(iou, level) for iou in image]) for image in result] for level in LEVELS]
        values.append([100 * np.mean(image) for image in ious[name]])
        means = [[np.mean(half) for half in np.array_split(value, 2)] for value in values]
        halves.append(f"{name} {means[0][1]:.1f}")
        print(f"{name:10} " + " ".join(f"{first:10.2f}, {second:6.2f}   " for first, second in means)
              + f"{seconds[0]:9.2f}, {seconds[1]:.2f}" + (validate(predictor, args) if args.split == "train" else ""),
              flush=True)
    draw({name: np.array([np.mean(image) for image in result]) for name, result in ious.items()}, args)
    print(f"clicks to 0.75 IoU, second half: {', '.join(halves)}")


@torch.no_grad()
def sort_by_certainty(pairs, args):
    """The pairs in the order of the highest score that the initial model predicts without a prompt, lowest first."""
    predictor, certainty = project.load_predictor(args.model_cfg, args.checkpoint, args.device), {}
    for pair in pairs:
        image = project.read_image(pair[0])
        predictor.set_image(image)
        _, scores = project.simulate_prompts(predictor, predictor._features, "none", [np.ones(image.shape[:2])])
        certainty[pair] = scores.max().item()
    return sorted(pairs, key=certainty.get)


def label(name, stream, pairs, kept, args):
    """Label the stream with a variant: (predictor at the end, IoUs, seconds per image to label and to learn).

    IoUs: [[IoU after each click, for each object], for each image]; kept: features of the images, shared by the
    variants, {path: predictor._features}.
    """
    folder = args.output / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    predictor = project.load_predictor(args.model_cfg, args.checkpoint, args.device)
    learner = learning.Learner(predictor, folder, args.steps, args.lr) if name == "learning" else None
    masks_of, result, seconds = {image.stem: mask for image, mask in pairs}, [], np.zeros(2)
    for index, image in enumerate(stream):
        path = image.path
        if path not in kept:
            predictor.set_image(project.read_image(path))
            kept[path] = predictor._features
        gt_masks = [image.mask(number) for number in image.objects]
        started = time.perf_counter()
        predict = partial(predict_mask, predictor, kept[path], image.size)
        result.append([simulate(predict, gt_mask) for gt_mask in gt_masks])
        labeled = time.perf_counter()
        shutil.copy(masks_of[path.stem], folder / f"{path.stem}.png")
        if learner:
            learner.add(path, kept[path])
            while learner.work():
                pass
        elif name == "training" and (index + 1) % args.every == 0:
            train(predictor, [each.path for each in stream[:index + 1]], folder, args)
        seconds += labeled - started, time.perf_counter() - labeled
    return predictor, result, seconds / len(stream)


def validate(predictor, args):
    """The mean IoU after one click of the objects in data/images/val, in percent, as text."""
    ious = []
    pairs = project.find_pairs(args.data_dir / "images/val", args.data_dir / "masks/val")
    for image in project.LabeledImages(pairs, 10**9, 1):
        predictor.set_image(image.read())
        predict = partial(predict_mask, predictor, predictor._features, image.size)
        ious += [simulate(predict, image.mask(number), clicks=1)[0] for number in image.objects]
    return f"{100 * np.mean(ious):10.1f}"


@torch.no_grad()
def predict_mask(predictor, features, size, coords, labels):
    """The mask with the highest score, bool H x W."""
    prompts = [(np.array(coords, np.float32), np.array(labels))]
    return project.best_masks(predictor, [size], *project.predict_masks(predictor, features, [size], prompts))[0]


def simulate(predict, gt_mask, clicks=CLICKS):
    """The IoU after each click on an object, up to a number of clicks or the highest of LEVELS."""
    (point, *_), _ = project.first_prompt("point", gt_mask)
    coords, labels, ious = [point], [1], []
    while True:
        mask = predict(coords, labels)
        ious.append(project.calculate_iou(mask, gt_mask))
        if len(ious) == clicks or ious[-1] >= max(LEVELS):
            return ious
        point, label = project.correcting_click(mask, gt_mask)
        coords, labels = [*coords, point], [*labels, label]


def count_clicks(ious, level):
    """The number of the first click after which the IoU is at least `level`; CLICKS + 1 if there is none."""
    return next((number for number, iou in enumerate(ious, start=1) if iou >= level), CLICKS + 1)


def train(predictor, paths, folder, args):
    """Train the initial model on the images so far, as a person would, and load the result into the predictor."""
    with tempfile.TemporaryDirectory() as temporary:
        for path in paths:
            shutil.copy(path, temporary)
        subprocess.run([
            sys.executable, str(ROOT / "train_sam2_proper.py"), "--recipe", "improved", "--model-cfg", args.model_cfg,
            "--checkpoint", args.checkpoint, "--device", args.device, "--image-dir", temporary, "--mask-dir",
            str(folder), "--val-image-dir", f"{temporary}/none", "--iterations", str(args.iterations), "--save-every",
            str(args.iterations), "--output-dir", f"{folder}/output"], check=True, stdout=subprocess.DEVNULL)
    project.load_weights(predictor.model, folder / "output/sam2_final.pt", args.model_cfg)


def draw(ious, args):
    """Write study.png: the running mean, over 20 images, of the IoU after one click along the stream."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in ious.items():
        width = min(20, len(values))
        axes.plot(np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, "valid"), label=name)
    axes.set(xlabel="images labeled", ylabel="IoU after one click, mean of 20 images", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    project.save_figure(figure, args.output / "study.png")


if __name__ == "__main__":
    main()

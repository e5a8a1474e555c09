"""Compare the original SAM 2.1 with the fine-tuned one on every object of every validation image.

    python compare_models.py

Both models get the same prompt. Of each model's three masks, the one with the highest predicted score is
compared. If the models share a frozen encoder, each image is encoded once for both.

Chapters:
    settings      colors, measures, size classes
    the run       main() and the command line
    data          pairs of image and mask, and the objects in them
    prediction    both models' masks from the same simulated clicks and boxes
    measures      IoU, Dice and boundary F of each object; the interval of the difference
    figures       the panels of one image, the colors of objects, charts
    results       tables, the final message
    the report    report.html, with the worst objects and the largest changes
    shared block  identical in train_sam2_proper.py and test_my_image.py
"""

import argparse
import base64
import collections
import contextlib
import copy
import csv
import html
import io
import itertools
import json
import math
import os
import re
import string
import sys
import textwrap
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import cv2
import matplotlib
import numpy as np
import torch
from tqdm import tqdm

try:
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.sam2_image_predictor import SAM2ImagePredictor
except (ImportError, RuntimeError) as error:  # not installed, or shadowed by a folder of the same name
    sys.exit(f"오류: sam2를 불러올 수 없습니다 ({error}). 설치: pip install --no-build-isolation -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb

# ---- settings ----

MODELS = ("original", "finetuned")  # in the names of columns
COLORS = {"original": (255, 255, 0), "fine-tuned": (30, 110, 255)}  # of masks; also distinct for color-blind readers
CHART_COLORS = ("#d9a400", "#1e6eff")  # the same, readable on white
CHARTS = ("scatter.png", "histogram.png", "size.png")
MEASURES = {"iou": "IoU", "dice": "Dice", "boundary_f": "Boundary F"}
SIZES, SIZE_LIMITS = ("small", "medium", "large"), (32**2, 96**2)  # of COCO, in pixels of the image in its folder


# ---- the run ----


def main():
    args = parse_args()
    device = detect_device(args.device)
    if not Path(args.finetuned).is_file():
        fail(f"파인튜닝한 모델이 없습니다: {args.finetuned}. 먼저 python train_sam2_proper.py 를 실행하세요")
    pairs = find_pairs(args.image_dir, args.mask_dir)[:args.num_images]
    if not pairs:
        fail(f"비교할 쌍이 없습니다. 이미지는 {args.image_dir}, 이름이 같은 마스크는 {args.mask_dir} 폴더에 넣으세요")
    count, classes = len(pairs), read_classes(args.mask_dir)
    empty = {pair for pair in tqdm(pairs, "정답 확인", leave=False, disable=None) if not has_objects(pair[1], classes)}
    if args.prompt == "none":
        classes = {}  # the union of an image's objects has no class
    else:
        pairs = [pair for pair in pairs if pair not in empty]
    if empty.issuperset(pairs):
        fail(f"정답 마스크가 모두 비어 있습니다: {args.mask_dir}")
    original = load_predictor(args.model_cfg, args.checkpoint, device, args.image_size)
    finetuned = copy.deepcopy(original)
    load_weights(finetuned.model, args.finetuned, args.model_cfg)
    predictors = {"original": original, "fine-tuned": finetuned}
    shared = same_frozen_weights(original.model, finetuned.model)
    print("고정된 가중치가 같아 이미지를 한 번만 인코딩합니다." if shared else
          "고정된 가중치가 서로 달라 이미지를 모델마다 인코딩합니다.")

    for old in args.output_dir.glob("compare_[0-9]*.png"):  # left by an earlier run
        old.unlink()
    chosen = np.linspace(0, len(pairs) - 1, min(args.num_visualize, len(pairs))).round().astype(int).tolist()
    rows, pictures, unsampled = [], {}, 0
    right = {model: [] for model in MODELS}  # for images without any object: whether nothing was found
    for number, pair in enumerate(tqdm(read_ahead(read_pair, pairs, 1, 2), "비교", len(pairs), disable=None)):
        image_path, image, labels = pair.result()
        kind = prompt_kind(args.prompt, number)
        objects, gt_masks, left_out = ([""], labels[None] > 0, 0) if kind == "none" else \
            split_objects(labels, args.max_objects)
        unsampled += left_out
        set_image_in_all(predictors.values(), image, shared)
        results = {title: predict_objects(predictor, kind, gt_masks) for title, predictor in predictors.items()}
        if gt_masks.any():
            rows += measure(image_path.name, objects, gt_masks, results, classes)
            pictures = update_pictures(pictures, rows, image, gt_masks, results, args.report_images)
        else:
            for model, (masks, _) in zip(MODELS, results.values()):
                right[model].append(not masks.any())
        if number in chosen:
            path = args.output_dir / f"compare_{chosen.index(number) + 1}.png"
            save_comparison(path, image_path.name, image, gt_masks, results)

    specificity = {f"{model}_specificity": float(np.mean(nothing)) for model, nothing in right.items() if nothing}
    summary = save_results(rows, pictures, specificity, len(pairs), classes, args, device, original.model.image_size)
    print(result_box(summary["original_iou"], summary["finetuned_iou"], summary["difference_pp_95"]))
    print(f"이미지 {len(pairs)}장, 객체 {len(rows)}개, 프롬프트 {args.prompt}, 장치 {device}, "
          f"Dice {change(summary, 'dice')}, Boundary F {change(summary, 'boundary_f')}")
    for name, means in summary.get("by_class", {}).items():
        print(f"  {name}: 객체 {means['num_objects']}개",
              *(f"{title} {change(means, measure)}" for measure, title in MEASURES.items()), sep=", ")
    if specificity:
        print(f"객체가 없는 이미지 {len(empty)}장 가운데 아무것도 찾지 않은 비율(특이도): "
              + change(summary, "specificity"))
    if len(pairs) < count:
        print(f"정답 마스크가 비어 있어 뺀 이미지: {count - len(pairs)}장")
    if unsampled:
        print(f"이미지마다 {args.max_objects}개까지만 비교하므로 제외한 객체: {unsampled}개")
    print(f"저장: {args.output_dir} (report.html, 비교 그림 {len(chosen)}장, {', '.join(CHARTS)}, per_image.csv, "
          "summary.json)")


def parse_args():
    parser = argparse.ArgumentParser(description="원본 SAM 2.1과 파인튜닝한 모델을 검증 이미지에서 비교합니다.")

    def option(name, default, text, **options):
        parser.add_argument(name, default=default, help=text + ("" if default is None else f" (기본: {default})"),
                            **options)

    option("--model-cfg", "configs/sam2.1/sam2.1_hiera_s.yaml", "sam2 패키지의 모델 설정 이름 또는 내 YAML 파일")
    option("--checkpoint", "checkpoints/sam2.1_hiera_small.pt", "원본 체크포인트")
    option("--finetuned", "output/sam2_best.pt", "파인튜닝한 체크포인트")
    option("--image-dir", "data/images/val", "비교할 이미지 폴더")
    option("--mask-dir", "data/masks/val", "정답 마스크 폴더 (이미지와 이름이 같은 PNG)")
    option("--output-dir", Path("output/comparison"), "결과를 쓸 폴더", type=Path)
    option("--num-images", None, "앞에서부터 몇 장만 비교할지 (기본: 전부)", type=int)
    option("--num-visualize", 5, "비교 그림을 몇 장 저장할지, 고르게 뽑음", type=int)
    option("--report-images", 200, "report.html에 보여 줄 객체 수. 더 많으면 가장 나쁘거나 많이 바뀐 것", type=int)
    option("--max-objects", 20, "이미지마다 객체를 몇 개까지 비교할지. 더 많으면 무작위, 언제나 같은 객체", type=int)
    option("--prompt", "point", "프롬프트: point 마스크의 가운데 점, points 그 점과 가장 크게 틀린 곳의 점 둘, "
           "box 마스크를 둘러싼 상자, mixed 이미지마다 셋을 번갈아, none 프롬프트 없이 모든 객체를 한 마스크로",
           choices=["point", "points", "box", "mixed", "none"])
    option("--image-size", None, "모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 1024에서 학습되어 "
           "정확도가 떨어짐 (기본: 모델 설정대로)", type=int, choices=[512, 768, 1024])
    option("--device", "auto", "장치: auto, mps, cuda, cpu")
    args = parser.parse_args()
    for name, least in (("num_images", 1), ("num_visualize", 0), ("report_images", 0), ("max_objects", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {least} 이상이어야 합니다")
    return args


# ---- data ----


def find_pairs(image_dir, mask_dir):
    """Images with a mask of the same stem (mask_dir/STEM.png), as sorted (image path, mask path).

    Fails if a folder does not exist, or if two images have the same stem: the mask could belong to either.
    """
    for folder in (image_dir, mask_dir):
        if not Path(folder).is_dir():
            fail(f"폴더가 없습니다: {folder}. 데이터 준비: python download_dataset.py 또는 python prepare_data.py")
    images = sorted(path for path in Path(image_dir).iterdir()
                    if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith("."))
    by_stem = {}
    for image in images:
        if (other := by_stem.setdefault(image.stem, image)) != image:
            fail(f"이름이 같은 이미지가 둘입니다: {other}, {image.name}. 하나만 남기세요")
    return [(image, mask) for image in images if (mask := Path(mask_dir) / f"{image.stem}.png").is_file()]


def read_classes(mask_dir):
    """The class names in data/classes.json, {1: "polyp", ...}, for mask_dir data/masks/val; {} without that file."""
    path = Path(mask_dir).absolute().parent.parent / "classes.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {int(number): printable(str(name or "")) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        fail(f'{path}: {{"1": "polyp", "2": "instrument"}}처럼 클래스 번호와 이름이 있어야 합니다 ({error})')


def has_objects(mask_path, classes):
    """Whether a mask holds objects; with classes, fails at a value that is not 1000 * class + number (1 to 999)."""
    numbers = object_numbers(read_mask(mask_path))
    for number in numbers if classes else ():
        if not classes.get(number // 1000) or number % 1000 == 0:
            fail(f"{mask_path}: 값 {number}의 클래스가 classes.json에 없습니다. 값은 1000 × 클래스 + 번호(1부터)이고, "
                 f"있는 클래스는 {', '.join(map(str, classes))}입니다. 번호만 든 마스크라면 classes.json을 지우세요")
    return len(numbers) > 0


def object_numbers(labels):
    """The numbers of the objects in a mask (uint16 H x W), in order."""
    return np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1


def read_pair(pair):
    """Read (image path, mask path): the image's path, the image and its mask; ImageError if their sizes differ."""
    image_path, mask_path = pair
    image, labels = read_image(image_path), read_mask(mask_path)
    if image.shape[:2] != labels.shape:
        raise ImageError(f"{image_path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")
    return image_path, image, labels


def split_objects(labels, max_objects):
    """Split a numbered mask (uint16 H x W) into objects, see sample_objects.

    Returns: their numbers, their masks (bool N x H x W), and the number of objects left out.
    """
    numbers = object_numbers(labels)
    sample = sample_objects(numbers, max_objects)
    return sample.tolist(), labels == sample[:, None, None], len(numbers) - len(sample)


def sample_objects(numbers, max_objects):
    """At most max_objects (None: all) of an image's object numbers, in order: the same random sample every time."""
    if max_objects is None or len(numbers) <= max_objects:
        return numbers
    return np.sort(np.random.default_rng(0).choice(numbers, max_objects, replace=False))


# ---- prediction ----


def same_frozen_weights(original, finetuned):
    """Whether all weights that compute an image's features are equal in both models."""
    ours, theirs = original.state_dict(), finetuned.state_dict()
    trained = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")  # these two run in set_image
    return all(torch.equal(ours[name], theirs[name]) for name in ours if not trained.match(name))


def set_image_in_all(predictors, image, shared):
    """Set `image` in every predictor; with `shared` (equal image encoders), it is encoded only once."""
    first, *others = predictors
    first.set_image(image)
    for other in others:
        if shared:
            other._features, other._orig_hw, other._is_image_set = first._features, first._orig_hw, True
        else:
            other.set_image(image)


def prompt_kind(kind, number):
    """`kind`, or for "mixed" that of the number-th prompt: point, points and box in turn."""
    return ("point", "points", "box")[number % 3] if kind == "mixed" else kind


def predict_objects(predictor, kind, gt_masks):
    """Predict the highest-scored mask for each object in the current image, see predict_prompted.

    Returns: masks bool N x H x W, and the prompts (coordinates N x P x 2 in pixels, labels N x P).
    """
    masks, coords, labels = [], [], []
    for part in in_parts(gt_masks, gt_masks.shape[1:]):
        logits, scores, prompts = predict_prompted(predictor, kind, part)
        masks.append(logits[np.arange(len(logits)), scores.argmax(1)] > 0)
        if kind == "none" and nothing_found(predictor.model):
            masks[-1][:] = False
        coords.append(prompts[0])
        labels.append(prompts[1])
    return np.concatenate(masks), (np.concatenate(coords), np.concatenate(labels))


def in_parts(objects, shape):
    """Cut an array of objects into parts that one decoder call takes: their logits at (H, W) have 512 MB at most."""
    at_once = max(1, 2**27 // (3 * math.prod(shape)))
    return [objects[start:start + at_once] for start in range(0, len(objects), at_once)]


def predict_prompted(predictor, kind, gt_masks):
    """Predict masks for the current image, with a prompt made from each of gt_masks (bool N x H x W).

    kind: "point", the mask's middle pixel; "box", its tight box; "points", its middle pixel and then two
        clicks, one after the other, each on the largest error of the mask with the highest score; "none", the point
        with label -1 that SAM2Base._forward_sam_heads gives if there is no prompt.
    Returns: logits N x 3 x H x W, scores N x 3, and the prompts as (coordinates N x P x 2 in pixels, labels
        N x P): 1 for a click on the object, 0 outside it, 2 and 3 for a box's corners, as in SAM.
    """
    def predict(coords, labels):
        logits, scores, _ = predictor.predict(coords, labels, multimask_output=True, return_logits=True)
        return logits.reshape(-1, 3, *gt_masks.shape[1:]), scores.reshape(-1, 3)

    if kind == "box":
        coords = np.stack([mask_box(gt_mask).reshape(2, 2) for gt_mask in gt_masks])
        labels = np.tile([2, 3], (len(gt_masks), 1))
    elif kind == "none":
        coords, labels = np.zeros((len(gt_masks), 1, 2), np.float32), np.full((len(gt_masks), 1), -1)
    else:
        coords, labels = np.stack([middle_point(gt_mask) for gt_mask in gt_masks]), np.ones((len(gt_masks), 1), int)
    logits, scores = predict(coords, labels)
    for _ in range(2 if kind == "points" else 0):
        best = logits[np.arange(len(logits)), scores.argmax(1)] > 0
        points, added = zip(*map(error_click, best, gt_masks))
        coords, labels = np.concatenate([coords, points], 1), np.concatenate([labels, np.array(added)[:, None]], 1)
        logits, scores = predict(coords, labels)
    return logits, scores, (coords, labels)


def middle_point(mask):
    """The middle foreground pixel of the mask in row-major order: float32 1 x 2, (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    return np.array([[columns[middle], rows[middle]]], np.float32)


def mask_box(mask):
    """The tight box around the mask's foreground: float32 (x1, y1, x2, y2) in pixels, both ends inside."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], np.float32)


def error_click(predicted, gt_mask):
    """The most useful click: the pixel deepest inside the missed (label 1) or false (label 0) foreground.

    predicted, gt_mask: bool H x W. Returns ([[x, y]] in pixels, label). Source: the evaluation of SAM 2
    with clicks (sam2.modeling.sam2_utils.sample_one_point_from_error_center).
    """
    missed, excess = (cv2.distanceTransform(np.pad(error, 1).astype(np.uint8), cv2.DIST_L2, 0)[1:-1, 1:-1]
                      for error in (gt_mask & ~predicted, predicted & ~gt_mask))
    if not missed.any() and not excess.any():
        return middle_point(gt_mask), 1
    label = int(missed.max() > excess.max())
    y, x = np.unravel_index((missed if label else excess).argmax(), gt_mask.shape)
    return np.array([[x, y]], np.float32), label


# ---- measures ----


def measure(name, objects, gt_masks, results, classes):
    """The rows of per_image.csv for one image; results: {"original": (masks, prompts), "fine-tuned": ...}.

    objects: their numbers, or "" for a mask that is no numbered object; classes: see read_classes, {} without classes.
    """
    calculate, rows = (calculate_iou, calculate_dice, calculate_boundary_f), []
    for number, gt_mask, *predicted in zip(objects, gt_masks, *(masks for masks, _ in results.values())):
        row, area = {"image": name, "object": number}, int(gt_mask.sum())
        for title, function in zip(MEASURES, calculate):
            row |= {f"{model}_{title}": function(mask, gt_mask) for model, mask in zip(MODELS, predicted)}
        row |= {"area": area, "size": SIZES[np.searchsorted(SIZE_LIMITS, area, "right")]}
        rows.append(row | ({"class": classes[number // 1000]} if classes else {}))
    return rows


def calculate_dice(pred_mask, gt_mask):
    """Dice coefficient of two boolean masks of one shape, 0 to 1: 2|A∩B| / (|A| + |B| + 1e-6)."""
    return float(2 * np.logical_and(pred_mask, gt_mask).sum() / (pred_mask.sum() + gt_mask.sum() + 1e-6))


def calculate_boundary_f(pred_mask, gt_mask):
    """Boundary F of two boolean H x W masks, 0 to 1: the harmonic mean of the shares of each boundary's pixels that lie
    near the other boundary, within 0.8 % of the image's diagonal (rounded up to whole pixels).

    Source: F in Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation (DAVIS),
    CVPR 2016, with the values of davis2017-evaluation.
    """
    x, y, width, height = cv2.boundingRect(np.uint8(pred_mask | gt_mask))
    crop = np.s_[max(0, y - 1):y + height + 1, max(0, x - 1):x + width + 1]  # the rest has no boundary
    pred, gt = (find_boundary(mask[crop]) for mask in (pred_mask, gt_mask))
    if not pred.any() or not gt.any():
        return float(pred.any() == gt.any())
    tolerance = math.ceil(0.008 * math.hypot(*gt_mask.shape))
    near_pred, near_gt = (cv2.distanceTransform(np.uint8(~boundary), cv2.DIST_L2, 0) <= tolerance
                          for boundary in (pred, gt))
    precision, recall = float(near_gt[pred].mean()), float(near_pred[gt].mean())
    return 2 * precision * recall / (precision + recall or 1)


def find_boundary(mask):
    """The pixels of a boolean mask that differ from the pixel to the right, below, or diagonally below: bool H x W."""
    padded = np.pad(mask, (0, 1), "edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def mean_measures(rows, **values):
    """The number of the rows that hold these values, and the means of their measures (None without rows)."""
    rows = [row for row in rows if values.items() <= row.items()]
    names = [f"{model}_{measure}" for measure in MEASURES for model in MODELS]
    return {"num_objects": len(rows), **{name: float(np.mean([row[name] for row in rows])) if rows else None
                                         for name in names}}


def difference(rows):
    """The difference of the mean IoU in percentage points and its 95 % interval, [low, high] or None for one image.

    The interval is that of a paired bootstrap (percentile method, 10,000 draws) over images: the objects of one image
    are not independent.
    """
    _, images = np.unique([row["image"] for row in rows], return_inverse=True)
    counts, gains = np.bincount(images), np.bincount(images, [100 * gain(row) for row in rows])
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(counts), len(counts)) for _ in range(10_000 if len(counts) > 1 else 0))
    means = [gains[draw].sum() / counts[draw].sum() for draw in draws]
    return {"difference_pp": float(gains.sum() / len(rows)),
            "difference_pp_95": np.percentile(means, (2.5, 97.5)).tolist() if means else None}


def gain(row):
    """The difference in IoU between the models, in an object's row or in means."""
    return row["finetuned_iou"] - row["original_iou"]


# ---- figures ----


def save_comparison(path, name, image, gt_masks, results):
    """Save one row of four panels: the input with its prompts, the ground truth, and both models' masks.

    results: {"original": (masks bool N x H x W, prompts), "fine-tuned": ...}. Later clicks depend on the model and are
    drawn on its masks. A single object has the model's color; several objects have one color each.
    """
    height, width = image.shape[:2]
    title = textwrap.fill(printable(name), 18)  # a Korean letter is up to 1/6 inch wide
    size = 14, 14 / 4 * min(height / width, 2) + 0.1 + 0.2 * len(title.splitlines())  # inches
    figure, panels = plt.subplots(1, 4, figsize=size, layout="constrained",
                                  subplot_kw={"anchor": "N"})  # else titles may be cut off
    coords, labels = results["original"][1]
    shared = 2 if 2 in labels else 1
    panels[0].imshow(image)
    draw_prompts(panels[0], coords[:, :shared], labels[:, :shared])
    panels[0].set_title(title)
    panels[1].imshow(overlay_objects(image, gt_masks, (0, 200, 0)))
    single = len(gt_masks) == 1
    panels[1].set_title("ground truth" if single else f"ground truth, {len(gt_masks)} objects")
    for panel, (title, (masks, (coords, labels))) in zip(panels[2:], results.items()):
        panel.imshow(overlay_objects(image, masks, COLORS[title]))
        draw_prompts(panel, coords[:, shared:], labels[:, shared:])
        iou = np.mean([calculate_iou(mask, gt_mask) for mask, gt_mask in zip(masks, gt_masks)])
        panel.set_title(f"{title}, {'' if single else 'mean '}IoU {iou:.1%}" if gt_masks.any() else
                        f"{title}, {'something' if masks.any() else 'nothing'} found")
    for panel in panels:
        panel.axis("off")
    save_figure(figure, path)


def draw_prompts(panel, coords, labels):
    """Draw boxes, and clicks as stars (green on the object, red outside); coords N x P x 2, labels N x P."""
    for own_coords, own_labels in zip(coords, labels):
        if 2 in own_labels:
            (x1, y1), (x2, y2) = own_coords
            panel.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=2))
            continue
        for (x, y), label in zip(own_coords, own_labels):
            if label < 0:  # no prompt
                continue
            panel.scatter(x, y, s=180 if len(coords) == 1 else 70, marker="*", color="lime" if label else "red",
                          edgecolor="black", linewidth=0.8)


def printable(name):
    """A file's name with "?" for bytes that are not valid UTF-8, which matplotlib cannot draw."""
    return name.encode(errors="replace").decode()


def overlay_objects(image, masks, color):
    """Draw masks (bool N x H x W) over `image`: a single one in `color`, several in one color each."""
    for number, mask in enumerate(masks):
        image = overlay(image, mask, color if len(masks) == 1 else object_color(number))
    return image


def object_color(number):
    """A color for the number-th object, RGB, 0 to 255: distant hues in turn (golden ratio), without red (tissue)."""
    return tuple(int(255 * part) for part in hsv_to_rgb((1 / 6 + 2 / 3 * (number * 0.618 % 1), 0.85, 1)))


def overlay(image, mask, color):
    """`image` with `mask` tinted in `color` (RGB, 0 to 255) and outlined: uint8 H x W x 3."""
    inside = mask.astype(np.uint8)
    tint = np.full_like(image, color)
    tinted = cv2.copyTo(cv2.addWeighted(image, 0.55, tint, 0.45, 0), inside, image.copy())
    edges, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(tinted, edges, -1, color, max(1, round(max(mask.shape) / 300)))


def save_charts(folder, rows):
    """Write scatter.png (fine-tuned against original IoU), histogram.png and size.png (IoU against object size)."""
    ious = [[row[f"{model}_iou"] for row in rows] for model in MODELS]
    figures, (scatter, histogram, size) = zip(*(plt.subplots(figsize=(6, 6), layout="constrained") for _ in CHARTS))
    better = sum(gain(row) > 0 for row in rows)
    scatter.plot([0, 1], [0, 1], color="grey", linewidth=1)
    scatter.scatter(*ious, s=18, alpha=0.6)
    scatter.set(xlabel="original IoU", ylabel="fine-tuned IoU", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal",
                title=f"{better} of {len(rows)} objects better after fine-tuning")
    histogram.hist(ious, np.linspace(0, 1, 21), color=CHART_COLORS, label=list(COLORS))
    histogram.set(xlabel="IoU", ylabel="objects", title="distribution of IoU")
    histogram.yaxis.get_major_locator().set_params(integer=True)
    for iou, color, title in zip(ious, CHART_COLORS, COLORS):
        size.scatter([row["area"]**0.5 for row in rows], iou, s=18, alpha=0.6, color=color, label=title)
    size.vlines(np.sqrt(SIZE_LIMITS), 0, 1, color="grey", linestyle=":")
    size.set(xlabel="square root of the object's area (px; dotted: 32, 96)", ylabel="IoU", title="IoU by object size")
    histogram.legend(loc="upper left")  # where a good model has the fewest objects
    size.legend(loc="lower right")
    for figure, name in zip(figures, CHARTS):
        figure.axes[0].grid(alpha=0.3)
        save_figure(figure, folder / name)


# ---- results ----


def save_results(rows, pictures, specificity, images, classes, args, device, image_size):
    """Write per_image.csv, summary.json, the charts and report.html; returns the summary."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({name: text_cell(str(value)) for name, value in row.items()} for row in rows)
    write_file(args.output_dir / "per_image.csv", text.getvalue().encode(errors="surrogateescape"))
    groups = {"by_size": {name: mean_measures(rows, size=name) for name in SIZES}}
    if classes:
        groups["by_class"] = {name: mean_measures(rows, **{"class": name}) for name in classes.values()}
    summary = {"num_images": images, **mean_measures(rows), **specificity, **difference(rows), **groups,
               "prompt": args.prompt, "device": device, "image_size": image_size,
               "original": str(args.checkpoint), "finetuned": str(args.finetuned)}
    write_json(args.output_dir / "summary.json", summary)
    save_charts(args.output_dir, rows)
    charts = [(args.output_dir / name).read_bytes() for name in CHARTS]
    write_file(args.output_dir / "report.html", make_report(rows, summary, pictures, charts).encode())
    return summary


def text_cell(text):
    """A table cell that no spreadsheet evaluates: a text that begins with = + - @, tab or CR gets an apostrophe."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def change(means, measure):
    """Both models' values of a measure, in an object's row or in means: "65.92% → 83.33%"; "-" without objects."""
    before, after = (means[f"{model}_{measure}"] for model in MODELS)
    return "-" if before is None else f"{before:.2%} → {after:.2%}"


def result_box(original_iou, finetuned_iou, interval=None):
    """The result box that the guide shows; IoU from 0 to 1. A drop is shown as a negative difference.

    interval: of the difference, [low, high] in percentage points. Korean letters count as two columns, so that the
    frame lines up on a terminal.
    """
    difference = difference_text(100 * (finetuned_iou - original_iou), interval)
    return f"""\
┌─────────────────────────────────────────┐
│              평균 IoU 비교              │
├─────────────────────────────────────────┤
│  원본 SAM2:      {original_iou:7.2%}                │
│  파인튜닝 SAM2:  {finetuned_iou:7.2%}                │
├─────────────────────────────────────────┤
│  개선율: {difference:^31}│
└─────────────────────────────────────────┘"""


def difference_text(points, interval):
    """A difference in percentage points with its 95 % interval: "+17.4%p (95%: +14.9 … +19.8)"; interval: or None."""
    return f"{points:+.1f}%p" + (f" (95%: {interval[0]:+.1f} … {interval[1]:+.1f})" if interval else "")


# ---- the report ----


def update_pictures(pictures, rows, image, gt_masks, results, limit):
    """{index of a row: its picture} for at most `limit` rows: in turn lowest IoU, largest loss, largest gain.

    pictures: those of the images before. The last rows are the objects of `image`; results: see save_comparison.
    """
    first = len(rows) - len(gt_masks)
    candidates = [*pictures, *range(first, len(rows))]
    worst = sorted(candidates, key=lambda index: rows[index]["finetuned_iou"])
    losses = sorted(candidates, key=lambda index: gain(rows[index]))
    chosen = list(dict.fromkeys(itertools.chain(*zip(worst, losses, losses[::-1]))))[:limit]
    return {index: pictures.get(index) or draw_picture(image, gt_masks, results, index - first) for index in chosen}


def draw_picture(image, gt_masks, results, number):
    """A JPEG of an object and its surroundings: two panels of at most 512 px, one for each model.

    They show the mask, the prompt, and the outline of the ground truth. results: see save_comparison.
    """
    gt_mask = gt_masks[number]
    x, y, width, height = cv2.boundingRect(np.uint8(gt_mask))
    margin = max(width, height, 32) if width else max(image.shape)
    top, left = max(0, y - margin), max(0, x - margin)
    crop = np.s_[top:y + height + margin, left:x + width + margin]
    scale = 512 / max(gt_mask[crop].shape)
    size = [max(1, round(side * scale)) for side in gt_mask[crop].shape[::-1]]

    def resized(mask):  # a tenth of a pixel counts: thin objects stay visible
        return cv2.resize(255 * np.uint8(mask[crop]), size, interpolation=cv2.INTER_AREA) > 25

    small = cv2.resize(image[crop], size, interpolation=cv2.INTER_AREA)
    edges, _ = cv2.findContours(np.uint8(resized(gt_mask)), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    panels = []
    for title, (masks, (coords, labels)) in results.items():
        tinted = overlay(small, resized(masks[number]), COLORS[title])
        panels.append(cv2.drawContours(tinted, edges, -1, (0, 200, 0), 2))
        for (x, y), label in zip((coords[number] - (left, top)) * scale, labels[number]):
            if label >= 0:  # -1: no prompt
                color = (0, 255, 0) if label else (255, 0, 0)
                cv2.drawMarker(panels[-1], (int(x), int(y)), color, cv2.MARKER_STAR, 20, 2)
    gap = np.full((size[1], 8, 3), 255, np.uint8)
    pixels = cv2.cvtColor(np.hstack([panels[0], gap, panels[1]]), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def make_report(rows, summary, pictures, charts):
    """The text of report.html, which needs no other file. pictures: {index of a row to show: JPEG}; charts: PNG."""
    def text(value):
        return html.escape(printable(str(value)))

    def figure(kind, data, attributes="", caption=""):
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return f'<figure {attributes}><img src="{uri}" alt=""><figcaption>{caption}</figcaption></figure>\n'

    def cells(values):
        return "".join(f"<td>{change(values, measure)}" for measure in MEASURES)

    table, gallery = "", ""
    for index in sorted(pictures, key=lambda index: rows[index]["finetuned_iou"]):
        row, points = rows[index], 100 * gain(rows[index])
        name = text(f"{row['image']} {row['object']} {row.get('class', '')}".strip())
        data = f'data-name="{name}" data-row="{index}" data-iou="{row["finetuned_iou"]}" data-gain="{points}"'
        points = f'<b class="{"loss" if points < 0 else "gain"}">{points:+.1f}%p</b>'
        table += f'<tr {data}><td><a href="#row{index}">{name}</a><td>{row["area"]}<td>{points}{cells(row)}\n'
        caption = f"{name}<br>IoU {change(row, 'iou')} {points}"
        gallery += figure("jpeg", pictures[index], f'{data} id="row{index}"', caption)
    groups = [("전체", summary), *((f"크기 {name}", group) for name, group in summary["by_size"].items()),
              *((f"클래스 {name}", group) for name, group in summary.get("by_class", {}).items())]
    means = [f"<tr><td>{text(name)}<td>{group['num_objects']}{cells(group)}\n" for name, group in groups]
    interval = ("괄호 안은 차이의 95% 구간입니다. 이미지를 10,000번 다시 뽑아 구했고(paired bootstrap, percentile), "
                "0이 들어 있으면 차이가 우연일 수 있습니다.") if summary["difference_pp_95"] else \
        "이미지가 하나라 차이의 구간은 없습니다."
    empty = f"<p>객체가 없는 이미지에서 아무것도 찾지 않은 비율(특이도): {change(summary, 'specificity')}</p>" \
        if "original_specificity" in summary else ""
    return PAGE.substitute(
        {name: text(value) for name, value in summary.items()}, iou=change(summary, "iou"), means="".join(means),
        difference=difference_text(summary["difference_pp"], summary["difference_pp_95"]), shown=len(pictures),
        charts="".join(figure("png", chart) for chart in charts), interval=interval, specificity=empty, table=table,
        gallery=gallery)


PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="ko">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>원본 SAM 2.1과 파인튜닝한 모델의 비교</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
.result { font-size: 1.4rem } [hidden] { display: none }
.gain { color: light-dark(#08702c, #6fdc8c) } .loss { color: light-dark(#c01818, #ff8a80) }
.scroll { overflow: auto; max-height: 70vh; white-space: nowrap } table { border-collapse: collapse }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: right }
:is(td, th):first-child { text-align: left } thead th { position: sticky; top: 0; background: Canvas }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; padding: .5rem; border: 1px solid #8886; border-radius: .5rem } img { width: 100% }
</style>
<h1>원본 SAM 2.1과 파인튜닝한 모델의 비교</h1>
<p class="result">평균 IoU $iou<br>차이 $difference</p>
<p>이미지 $num_images장, 객체 $num_objects개, 프롬프트 $prompt, 모델 입력 $image_size px, 장치 $device.
원본: $original, 파인튜닝: $finetuned.</p>
<p>$interval</p>
<div class="scroll"><table><thead><tr><th><th>객체<th>IoU<th>Dice<th>Boundary F</thead>$means</table></div>
$specificity
<p>객체마다 잰 값의 평균입니다. 객체의 크기는 COCO처럼 small이 32², medium이 96² 픽셀 미만입니다(줄이지 않은 이미지의
픽셀). Boundary F는 DAVIS의 것으로, 이미지 대각선의 0.8% 안에서 서로 맞는 경계의 비율입니다.</p>
<div class="grid">$charts</div>
<h2>객체 $num_objects개 가운데 $shown개</h2>
<p><a href="#worst">나쁜 순서</a> · <a href="#gain">많이 나아진 순서</a> · <a href="#loss">많이 나빠진 순서</a> ·
<a href="#row">이름 순서</a> · <input type="search" placeholder="이름으로 찾기" aria-label="이름으로 찾기"></p>
<div class="scroll"><table><thead><tr><th>객체<th>넓이(px)<th>차이<th>IoU<th>Dice<th>Boundary F</thead>
<tbody>$table</table></div>
<p>왼쪽이 원본, 오른쪽이 파인튜닝한 모델의 마스크입니다. 초록 선은 정답, 별은 클릭이나 상자의 두 모서리입니다.</p>
<div class="grid">$gallery</div>
<script>
const items = [...document.querySelectorAll("[data-name]")];
const keys = { worst: d => d.iou, gain: d => -d.gain, loss: d => d.gain, row: d => d.row };
function sort() {
  const key = keys[location.hash.slice(1)];
  if (key) items.sort((a, b) => key(a.dataset) - key(b.dataset)).forEach(item => item.parentNode.append(item));
}
addEventListener("hashchange", sort);
sort();
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.normalize().toLowerCase();
  for (const item of items) item.hidden = !item.dataset.name.normalize().toLowerCase().includes(words);
});
</script>
""")


# ---- shared block: the same, letter for letter, in train_sam2_proper.py, compare_models.py, test_my_image.py ----

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream has no such method
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
if Path(__file__).resolve().parent.name == "sam2":
    print("주의: 프로젝트 폴더 이름이 sam2라 sam2 패키지와 혼동될 수 있습니다. 다른 이름으로 바꾸세요", file=sys.stderr)
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # file names may contain "$"
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # called inside sam2


def read_ahead(function, items, workers, window):
    """Futures of function(item), in order; `workers` threads compute up to `window` results before they are needed."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        queue = collections.deque()
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > window:
                yield queue.popleft()
        yield from (queue.popleft() for _ in range(len(queue)))  # none is kept here


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


def run(main, advice):
    """Call main(). An expected failure ends in one line on stderr and exit code 1; advice: if memory runs out."""
    words = "out of (shared )?memory|not enough memory|can't allocate memory|killed by signal: Killed"
    try:
        main()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except KeyboardInterrupt:
        fail("중단했습니다")
    except (RuntimeError, MemoryError) as error:  # CUDA, MPS and the CPU have different messages
        if isinstance(error, RuntimeError) and not re.search(words, str(error)):
            raise
        fail(f"메모리가 부족합니다. {advice}")


def fail(message):
    """End with exit code 1 and one line on stderr."""
    sys.exit(f"오류: {message}")


def write_file(path, content):
    """Write bytes, or what content(file) writes, beside `path` and rename it, so that `path` is never half written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        content(file) if callable(content) else file.write(content)
    for _ in range(20):  # on Windows another program may hold `path` for a moment
        with contextlib.suppress(PermissionError):
            return temporary.replace(path)
        time.sleep(0.1)
    return temporary.replace(path)


def write_json(path, value):
    """Write a JSON file in UTF-8, with escapes for the bytes of a file name that are not valid UTF-8."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def save_figure(figure, path):
    """Write a matplotlib figure as a PNG at 100 dots an inch, and close it."""
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)


def detect_device(requested="auto"):
    """The device to run on: as requested ("cuda", "cuda:1", "mps", "cpu"; fails if it is not available) or the best."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    usable = ["mps"] * torch.backends.mps.is_available() + ["cuda"] * bool(gpus) + ["cpu", *gpus]
    if requested not in ("auto", *usable):
        fail(f"장치 '{requested}'를 쓸 수 없습니다. 이 컴퓨터에서 쓸 수 있는 장치: {', '.join(usable)}")
    return usable[0] if requested == "auto" else requested


def calculate_iou(pred_mask, gt_mask):
    """Intersection over union of two boolean H x W masks, 0 to 1: |A∩B| / (|A∪B| + 1e-6)."""
    return float(np.logical_and(pred_mask, gt_mask).sum() / (np.logical_or(pred_mask, gt_mask).sum() + 1e-6))


def decode_file(path, flags):
    """Decode an image file with OpenCV, rotated upright by its EXIF; ImageError, naming the file, if that fails."""
    try:
        data, pages = np.fromfile(path, np.uint8), ()  # on Windows cv2.imread cannot open a path with Korean letters
        if data[4:8].tobytes() != b"ftyp":  # HEIC and AVIF, which OpenCV does not turn upright
            _, pages = cv2.imdecodemulti(data, flags, range=(0, 2))
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, cv2.error):  # a path with a NUL; an empty file; more pixels than OpenCV allows
        pages = ()
    if len(pages) == 1:
        return pages[0]
    raise ImageError(f"{path}: " + ("여러 장이 든 파일입니다. 한 장씩 나누세요" if pages else
                                    "손상되었거나 읽지 못하는 형식의 이미지입니다 (JPEG나 PNG로 바꾸세요)"))


def read_image(path):
    """Read an image as uint8 H x W x 3, RGB, upright: grey, RGBA, CMYK, EXIF-rotated and deeper files too."""
    pixels = decode_file(path, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype != np.uint8:  # the file's 0.1st percentile becomes black, its 99.9th white
        numbers = pixels[np.isfinite(pixels)]
        low, high = np.percentile(numbers, (0.1, 99.9)) if len(numbers) else (0, 1)
        scaled = np.clip((pixels.astype(np.float32) - low) * (255 / (high - low or 1)), 0, 255)
        pixels = np.nan_to_num(scaled).round().astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


def read_mask(path):
    """Read a mask as uint16 H x W: 0 is the background, every other value one object.

    A 16-bit file holds these numbers, an 8-bit file object 1 above 127; ImageError for others, see is_label_map.
    """
    mask = decode_file(path, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3 and (mask == mask[..., :1]).all():
        mask = mask[..., 0]
    if mask.ndim == 3 or mask.dtype not in (np.uint8, np.uint16) or mask.dtype == np.uint8 and is_label_map(mask):
        raise ImageError(f"{path}: 0과 255의 8비트나 16비트 마스크가 아닙니다. 확인: python prepare_data.py --check")
    return mask if mask.dtype == np.uint16 else (mask > 127).astype(np.uint16)


def is_label_map(mask):
    """Whether an 8-bit mask (uint8 H x W) holds classes or numbers, not one object above 127 with a grey edge."""
    if not ((mask > 0) & (mask < 255)).any():
        return False
    if ((mask > 0) & (mask < 24)).any() and ((mask > 231) & (mask < 255)).any():  # JPEG noise
        mask = np.where(mask < 24, 0, np.where(mask > 231, 255, mask)).astype(np.uint8)
    low, high = cv2.erode(mask, np.ones((3, 3))), cv2.dilate(mask, np.ones((3, 3)))
    pixels, inner = (np.bincount(values, minlength=256) for values in (mask.ravel(), mask[low == high]))
    fills = (pixels >= 9) & (inner >= pixels / 6)  # values that fill areas
    middle = (mask >= 24) & (mask <= 231)
    flat = middle & ((mask == low) | (mask == high))  # the greys of an edge are few and lie between their neighbors
    return (0 < mask.max() <= 127 or fills[:128].sum() > 1 or fills[128:].sum() > 1 or middle.mean() > 0.25
            or flat.sum() > max(0.4 * middle.sum(), 0.05 * (mask > 127).sum()))


def read_config(model_cfg):
    """A model's config: a YAML file, or the name of one in the sam2 package ("configs/sam2.1/sam2.1_hiera_s.yaml")."""
    try:
        config = OmegaConf.load(model_cfg if Path(model_cfg).is_file() else Path(sam2.__file__).parent / model_cfg)
        return OmegaConf.create(OmegaConf.to_container(config.model, resolve=True))
    except Exception as error:  # OmegaConf and YAML raise their own error types
        fail(f"모델 설정을 열 수 없습니다: {model_cfg} ({textwrap.shorten(str(error), 200)}). "
             "예: configs/sam2.1/sam2.1_hiera_s.yaml")


def load_predictor(model_cfg, checkpoint, device, image_size=None):
    """A SAM2ImagePredictor on `device`, in eval mode; image_size: its input's side in pixels, if not the config's."""
    config = read_config(model_cfg)
    config.image_size = image_size or config.image_size
    model = instantiate(config, _recursive_=True).eval()
    load_weights(model, checkpoint, model_cfg)
    predictor = SAM2ImagePredictor(model.to(device))
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


def nothing_found(model):
    """Whether, at its last prediction without a prompt, a model that was trained on empty images found no object."""
    return model.knows_absence and model.sam_mask_decoder.pred_obj_score_head.last.item() < 0


def load_weights(model, checkpoint, model_cfg):
    """Load a checkpoint, {"model": state_dict} or a bare state dict, into a SAM 2 of the config `model_cfg`.

    Fails if it is missing, damaged, of another model or not finite; warns if it was trained at another image size.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        official = re.fullmatch(r"sam2\.1_hiera_(tiny|small|base_plus|large)\.pt", checkpoint.name)
        command = f" 받기: python download_dataset.py --checkpoint {official[1]}" if official else ""
        fail(f"체크포인트가 없습니다: {checkpoint}.{command} (체크포인트 없이 체험하려면: make demo)")
    try:
        if zipfile.is_zipfile(checkpoint) and (damaged := zipfile.ZipFile(checkpoint).testzip()):
            raise ValueError(f"{damaged}: CRC")  # torch.load does not check it
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = dict(saved.get("model", saved))
        if "state_dict" in weights:
            raise ValueError("가중치가 'state_dict' 항목에 있습니다 (PyTorch Lightning)")
        model.load_state_dict(weights)
        if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"유한하지 않은 가중치: {', '.join(wrong[:3])}")
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise  # not the file's fault
    except Exception as error:  # torch.load raises many error types for a damaged file
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f"가중치가 아닌 값 {refused[1]}이(가) 들어 있습니다" if refused else textwrap.shorten(str(error), 400)
        fail(f"체크포인트 {checkpoint}가 손상되었거나 설정 {model_cfg}와 맞지 않습니다: {reason}. "
             '다른 도구의 파일이면 가중치만 저장하세요: torch.save({"model": model.state_dict()}, 파일)')
    model.trained_prompt, model.knows_absence = saved.get("prompt"), bool(saved.get("knows_absence"))
    if model.pred_obj_scores:  # predict() does not return the object score
        model.sam_mask_decoder.pred_obj_score_head.register_forward_hook(
            lambda head, _, scores: setattr(head, "last", scores))
    trained_size = saved.get("image_size", model.image_size)
    if trained_size != model.image_size:
        print(f"주의: {checkpoint}는 --image-size {trained_size}로 학습했는데 {model.image_size}로 실행합니다.")

# ---- end of shared block ----


if __name__ == "__main__":
    run(main, "--image-size 512나 --device cpu를 써 보세요")

"""Segment your own images with the fine-tuned SAM 2.1: from points, boxes or a rough mask, or in a window.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg                    # a window
    python test_my_image.py --image test_images/dog.jpg --web              # the window in a browser
    python test_my_image.py --image test_images --auto                     # what the model was trained to find
    python test_my_image.py --image test_images --everything

Chapters:
    settings      sizes, file names, the keys of the window
    the run       main(), the command line, the two models, the images and the names of their results
    segmenting    masks from prompts, from none (--auto), or --everything: sam2's automatic mask generator
    the window    on a screen or in a browser; clicks and keys
    results       the output files, masks and prompts over an image
    shared block  identical in train_sam2_proper.py and compare_models.py
"""

import argparse
import collections
import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import cv2
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask
from tqdm import tqdm

try:
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from sam2.utils.amg import remove_small_regions
except (ImportError, RuntimeError) as error:  # not installed, or shadowed by a folder of the same name
    sys.exit(f"오류: sam2를 불러올 수 없습니다 ({error}). 설치: pip install --no-build-isolation -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")
if "cv2" in os.environ.get("QT_QPA_PLATFORM_PLUGIN_PATH", ""):  # matplotlib's Qt cannot start with OpenCV's plugins
    del os.environ["QT_QPA_PLATFORM_PLUGIN_PATH"]

# ---- settings ----

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff")  # read from folders
DISPLAY_SIDE = 1024  # pixels: larger images are reduced to this in windows and pictures, and for --everything
RESULTS = ("result.png", "mask.png", "objects.png", "original_mask.png",  # of prompts
           "everything.png", "labels.png", "everything.json")             # of --everything
WINDOW_HELP = ("left click: object    right click: background    drag: box    1 2 3: candidate\n"
               "u: undo    r: reset    n: next object    Enter: save")
KOREAN_KEYBOARD = {"ㅕ": "u", "ㄱ": "r", "ㅜ": "n", "ㅂ": "q"}  # the letters on the same keys

# ---- the run ----


def main():
    args = parse_args()
    paths = find_images(args.image, args.mask)
    if args.interactive:
        require_display(args.web, '--point "x,y"로 좌표를 주거나, --auto로 찾거나')
        print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자, n은 다음 객체, Enter나 창 닫기는 저장입니다")
    if args.mask and not (mask := read_mask(args.mask) > 0).any():
        raise ImageError(f"{args.mask}: 마스크가 비어 있습니다 (8비트 마스크는 127보다 밝은 곳이 전경)")
    args.mask = mask if args.mask else None
    if len(paths) == 1:  # errors of a single image are reported before the model is loaded
        check_prompts(paths[0], read_image(paths[0]), args.point, args.box, args.mask)
    predictors, args.shared = load_models(args)
    if args.auto:
        check_trained_for_auto([*predictors.values()][-1].model)
    failed, args.rows = [], []
    bar = tqdm(paths, "분할", disable=True if len(paths) == 1 else None)
    for path, name, image in zip(bar, result_names(paths), read_ahead(read_image, paths, 1, 2)):
        try:
            check_prompts(path, image.result(), args.point, args.box, args.mask)
            lines = (run_everything if args.everything else run_prompts)(path, name, image.result(), predictors, args)
            if len(paths) == 1 or args.interactive:
                tqdm.write("\n".join(lines))
        except ImageError as error:
            if len(paths) == 1:
                raise
            failed.append(path)
            tqdm.write(f"오류: {error}", file=sys.stderr)
    if args.rows:
        print(f"{len(args.rows)}장 가운데 {sum(row[1] for row in args.rows)}장에서 찾음: {args.output / 'auto.csv'}")
    if len(paths) > 1:
        print(f"이미지 {len(paths) - len(failed)}장을 분할했습니다. 저장: {args.output}")
    if failed:
        fail(f"{len(failed)}장은 분할하지 못했습니다: {', '.join(path.name for path in failed[:5])}")


def parse_args():
    parser = argparse.ArgumentParser(description="내 이미지를 파인튜닝한 SAM 2.1로 분할합니다.")
    add = parser.add_argument
    add("--image", "-i", required=True, nargs="+", metavar="PATH", help="이미지 경로, 여러 개나 폴더도 됨 (필수)")
    models = parser.add_mutually_exclusive_group().add_argument
    models("--original", action="store_true", help="파인튜닝 모델 대신 원본 모델 사용")
    models("--compare", action="store_true", help="원본과 파인튜닝 모델의 결과를 나란히 보기")
    add("--point", "-p", type=parse_points, default=[], help='점: "x,y" 또는 "x,y,라벨;..." (라벨 1 전경, 0 배경)')
    add("--box", type=parse_boxes, default=[], help='상자 좌표: "x1,y1,x2,y2", 객체가 여럿이면 ";"로 이어서')
    add("--mask", metavar="FILE", help="대강 그린 마스크 파일을 프롬프트로 사용 (이미지와 같은 크기)")
    add("--refine", type=int, default=0, metavar="N", help="마스크를 다시 넣어 N번 다듬기 (기본: %(default)s)")
    add("--web", type=int, nargs="?", const=8988, metavar="PORT", help="창을 브라우저에 띄움 (PORT를 빼면 8988)")
    add("--annotate", metavar="DIR", help=argparse.SUPPRESS)  # earlier versions
    add("--auto", action="store_true", help="프롬프트 없이 찾아 분할 (--recipe strongest나 --prompt any로 학습한 모델)")
    add("--everything", action="store_true", help="프롬프트 없이 이미지 속의 모든 것을 분할")
    for flag, kind, default, text in (("points-per-side", int, 32, "한 변에 찍을 점의 수"),
                                      ("pred-iou-thresh", float, 0.88, "예측 점수가 이보다 낮은 마스크를 버림"),
                                      ("stability-score-thresh", float, 0.95, "안정성이 이보다 낮은 마스크를 버림"),
                                      ("min-mask-region-area", int, 100, "이 픽셀 수보다 작은 조각과 구멍을 없앰")):
        add(f"--{flag}", type=kind, default=default, help=f"--everything: {text} (기본: %(default)s)")
    add("--output", "-o", type=Path, default=Path("output/my_results"), help="결과 폴더 (기본: %(default)s)")
    add("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml", help="설정 이름이나 YAML 경로 (기본: %(default)s)")
    add("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt", help="원본 체크포인트 (기본: %(default)s)")
    add("--finetuned", default="output/sam2_best.pt", help="파인튜닝한 체크포인트 (기본: %(default)s)")
    add("--image-size", type=int, choices=[512, 768, 1024], help="모델 입력 한 변, 픽셀 (기본: 모델 설정대로)")
    add("--device", default="auto", help="장치: auto, mps, cuda, cpu (기본: %(default)s)")
    args = parser.parse_args()
    if sum((bool(args.point or args.box or args.mask), args.auto, args.everything, args.web is not None)) > 1:
        parser.error("프롬프트(--point, --box, --mask), --auto, --everything, --web은 함께 쓸 수 없습니다")
    if args.everything and (args.compare or args.refine):
        parser.error("--everything은 --refine, --compare와 함께 쓸 수 없습니다")
    if args.annotate:
        fail("--annotate 대신: python extras/annotate.py --images "
             + shlex.join([*args.image, "--output", args.annotate]))
    args.interactive = not (args.point or args.box or args.mask or args.everything or args.auto)
    for name, least in (("refine", 0), ("points_per_side", 1), ("min_mask_region_area", 0), ("web", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: {least} 이상이어야 합니다")
    return args


def parse_points(text):
    """Parse "x,y" or "x,y,label;x,y,label": a list of (x, y, label), in pixels; label 1 (the default) or 0."""
    points = []
    for part in text.strip().strip(";").split(";"):
        try:
            x, y, label = map(float, (part + ",1" if part.count(",") == 1 else part).split(","))
        except ValueError:
            label = None
        if label not in (0, 1) or not np.isfinite([x, y]).all():
            raise argparse.ArgumentTypeError(f"'{part}': \"x,y\" 또는 \"x,y,라벨\"이어야 합니다 (라벨 1 전경, 0 배경)")
        points.append((x, y, int(label)))
    return points


def parse_boxes(text):
    """Parse "x1,y1,x2,y2" or several of them, separated by ";": a list of [x1, y1, x2, y2] in pixels, in order."""
    boxes = []
    for part in text.strip().strip(";").split(";"):
        try:
            x1, y1, x2, y2 = map(float, part.split(","))
        except ValueError:
            x1 = x2 = 0
        if x1 == x2 or y1 == y2 or not np.isfinite([x1, y1, x2, y2]).all():
            raise argparse.ArgumentTypeError(f"'{part}': 넓이가 있는 상자 \"x1,y1,x2,y2\"여야 합니다")
        boxes.append([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)])
    return boxes


def load_models(args):
    """Load the models, {title: SAM2ImagePredictor}, two with --compare; also whether their image encoders are equal."""
    if not args.original and not Path(args.finetuned).is_file():
        print(f"파인튜닝한 모델이 아직 없어 원본 모델을 사용합니다: {args.finetuned}")
        args.original, args.compare = True, False
    checkpoints = {"original model": args.checkpoint, "fine-tuned model": args.finetuned}
    if not args.compare:
        del checkpoints["fine-tuned model" if args.original else "original model"]
    device = detect_device(args.device)
    predictors = {title: load_predictor(args.model_cfg, checkpoint, device, args.image_size)
                  for title, checkpoint in checkpoints.items()}
    print(f"모델: {', '.join(checkpoints.values())}, 장치: {device}")
    return predictors, args.compare and same_frozen_weights(*(predictor.model for predictor in predictors.values()))


def check_trained_for_auto(model):
    """Warn if a model was not trained to find objects without a prompt."""
    if model.trained_prompt not in ("none", "any"):
        print("주의: 프롬프트 없이 찾도록 학습한 모델이 아닙니다. 먼저: train_sam2_proper.py --recipe strongest")


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


def find_images(names, *others):
    """The image files of --image, and those in its folders, sorted; lists other files; fails if one is missing."""
    for path in filter(None, [*names, *others]):
        if not Path(path).exists():
            fail(f"파일이 없습니다: {path}")
    paths, unread = [], []
    for path in map(Path, names):
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            if file.is_file() and not file.name.startswith("."):  # macOS writes ._a.jpg beside a.jpg
                (paths if file.suffix.lower() in IMAGE_SUFFIXES else unread).append(file)
        paths += [] if path.is_dir() else [path]
    if unread:
        print(f"읽지 않는 파일 {len(unread)}개: {', '.join(file.name for file in unread[:5])}")
    if not paths:
        fail(f"이미지가 없습니다: {', '.join(map(str, names))}")
    return paths


def result_names(paths):
    """A name for each image's results: its stem, made unique if several images share it, also but for upper case."""
    stems, names = collections.Counter(path.stem.lower() for path in paths), {}
    for path in paths:
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.stem}_{path.suffix[1:]}"
        while (key := name.lower()) in names or key.endswith("_original") and key.removesuffix("_original") in stems:
            name += "_"  # --compare also writes NAME_original_mask.png for NAME
        names[key] = name
    return list(names.values())


# ---- segmenting ----


def run_everything(path, name, image, predictors, args):
    """Segment everything in one image; write a picture, a label map (k: annotation k) and a COCO file."""
    height, width = image.shape[:2]
    picture = reduce_to(image, DISPLAY_SIDE, cv2.INTER_AREA)
    found = segment_everything(*predictors.values(), picture, (height, width), args)
    labels = np.zeros(picture.shape[:2], np.uint16)
    for number, (annotation, mask) in enumerate(found, start=1):  # smaller ones are drawn over larger ones
        annotation["id"] = labels[mask] = number
        picture = overlay(picture, mask, object_color(number))
    labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    coco = {"images": [{"id": 1, "file_name": path.name, "width": width, "height": height}],
            "categories": [{"id": 1, "name": "object"}], "annotations": [annotation for annotation, _ in found]}
    advice = "" if found else ". --pred-iou-thresh나 --stability-score-thresh를 낮춰 보세요"
    return [f"찾은 것: {len(found)}개{advice}", write_results(args.output, name, {
        "everything.png": partial(write_png, array=picture[..., ::-1]),
        "labels.png": partial(write_png, array=labels), "everything.json": partial(write_json, value=coco)})]


def segment_everything(predictor, reduced, size, args):
    """Run SAM 2's automatic mask generator on `reduced`, h x w: [(COCO annotation, mask bool h x w)], largest first.

    Annotations are in pixels of the full image, whose size is (H, W); score is the predicted IoU.
    """
    generator = SAM2AutomaticMaskGenerator(
        predictor.model, points_per_side=args.points_per_side, pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh)
    generator.predictor = predictor  # its own assumes an image_size of 1024
    least = args.min_mask_region_area * reduced[..., 0].size / math.prod(size)  # in pixels of `reduced`
    found = []
    for item in generator.generate(reduced):
        mask = item["segmentation"]
        for kind in ("holes", "islands"):  # the generator's own min_mask_region_area needs CUDA
            mask, _ = remove_small_regions(mask, least, kind)
        columns = cv2.resize(mask.T.astype(np.uint8, order="C"), size, interpolation=cv2.INTER_NEAREST_EXACT)
        rle = coco_mask.encode(columns.T)  # RLE runs down the columns
        found.append(({
            "image_id": 1, "category_id": 1,
            "bbox": [int(number) for number in coco_mask.toBbox(rle)], "area": int(coco_mask.area(rle)),
            "score": round(item["predicted_iou"], 4), "stability_score": round(item["stability_score"], 4),
            "segmentation": {**rle, "counts": rle["counts"].decode()}, "iscrowd": 0}, mask))
    return sorted(found, key=lambda pair: -pair[0]["area"])


def run_prompts(path, name, image, predictors, args):
    """Segment an image by prompts or in the window; write the last model's masks."""
    set_image_in_all(predictors.values(), image, args.shared)
    models = {title: partial(segment, predictor, rough=args.mask, refine=args.refine)
              for title, predictor in predictors.items()}
    shown_name = path.name.encode(errors="replace").decode()  # matplotlib cannot draw what is not valid UTF-8
    if args.interactive:
        window = Window(image, models, shown_name)
        show_window(window.figure)
        objects = window.objects()
        if not objects:
            raise ImageError(f"{path}: 분할한 것이 없습니다. 창에서 분할할 곳을 클릭하거나 --point \"x,y\"를 쓰세요")
    else:
        objects = [Segmented(points, box, {title: predict(points, box) for title, predict in models.items()})
                   for points, box in split_prompts(args.point, args.box)]
    labels = {title: number_objects(objects, title) for title in models}
    *_, title = models
    writers = {"result.png": partial(save_result, image=image, name=shown_name, objects=objects, rough=args.mask),
               "mask.png": partial(write_png, array=255 * np.uint8(labels[title] > 0))}
    if len(objects) > 1:
        writers["objects.png"] = partial(write_png, array=labels[title])
    if args.compare:
        writers["original_mask.png"] = partial(write_png, array=255 * np.uint8(labels["original model"] > 0))
    lines = [f"창에서 준 프롬프트: {prompts_as_flags(*item[:2])}" for item in objects] if args.interactive else []
    number, mask, score = objects[0].best(title)
    found = f"마스크 {number + 1}번 (점수 {score:.3f})" if len(objects) == 1 else f"객체 {len(objects)}개"
    lines += [f"{found}, 이미지의 {(labels[title] > 0).mean():.1%}", write_results(args.output, name, writers)]
    if args.auto:  # the table is written after each image: an interrupted run keeps its rows
        cell = "'" * path.name.startswith(("=", "+", "-", "@", "\t", "\r")) + path.name  # no spreadsheet evaluates it
        args.rows.append((cell, int(mask.any()), mask.sum(), round(mask.mean(), 6), round(score, 4)))
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("image", "found", "area", "area_share", "score"), *args.rows])
        write_file(args.output / "auto.csv", text.getvalue().encode(errors="surrogateescape"))
    return lines


class Segmented(NamedTuple):
    """An object: its prompts in pixels, points (x, y, label) and box [x1, y1, x2, y2] or None, and its predictions.

    candidates: {title of the model: (masks bool N x H x W, scores N)}; choice: index of a candidate, None for the best.
    """
    points: list
    box: list | None
    candidates: dict
    choice: int | None = None

    def best(self, title):
        """The candidate picked for the model `title`: its number, mask and score."""
        masks, scores = self.candidates[title]
        number = int(scores.argmax()) if self.choice is None else self.choice
        return number, masks[number], float(scores[number])


def check_prompts(path, image, points, boxes, rough):
    """Raise ImageError, with the image's size, if a prompt does not fit: a box may end at its edge, a point may not."""
    height, width = image.shape[:2]
    size = f"이미지 크기는 가로 {width}, 세로 {height}픽셀입니다"
    outside = [(x, y) for x, y, _ in points if not (0 <= x < width and 0 <= y < height)]
    outside += [(x, y) for box in boxes for x, y in (box[:2], box[2:]) if not (0 <= x <= width and 0 <= y <= height)]
    if outside:
        raise ImageError(f"{path}: 좌표 ({outside[0][0]:g}, {outside[0][1]:g})가 이미지 밖에 있습니다. {size}")
    of_objects = [point for own, _ in split_prompts(points, boxes) for point in own]
    if lost := [point for point in points if point not in of_objects]:
        raise ImageError(f"{path}: 상자가 여럿인데 어느 상자에도 없는 점입니다: ({lost[0][0]:g}, {lost[0][1]:g})")
    if rough is not None and rough.shape != (height, width):
        raise ImageError(f"{path}: --mask는 가로 {rough.shape[1]}, 세로 {rough.shape[0]}픽셀인데 {size}")


def split_prompts(points, boxes):
    """(points, box) of each object: several boxes are several objects, each with the points in it."""
    if len(boxes) > 1:
        return [([(x, y, label) for x, y, label in points if x1 <= x <= x2 and y1 <= y <= y2], [x1, y1, x2, y2])
                for x1, y1, x2, y2 in boxes]
    return [(points, boxes[0] if boxes else None)]


def segment(predictor, points, box, rough=None, refine=0):
    """Segment one object in the current image: bool masks 3 x H x W and scores 3. points and box: as in Segmented.

    Without any prompt, the model segments what it was trained to find: the point has label -1, as in SAM2Base.
    rough: a mask to start from, bool H x W, or None; refine: how many times the best mask is fed back as a prompt.
    """
    logits, prompted = None, points or box or rough is not None
    points = points if prompted else [(0, 0, -1)]
    if rough is not None:  # as logits, with the values of SAM2Base._use_mask_as_output
        height, width = predictor.model.sam_prompt_encoder.mask_input_size
        logits = 20 * cv2.resize(rough.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)[None] - 10
    for number in range(refine + 1):
        # always three masks: fine-tuning trains these, not SAM 2's single-mask output
        masks, scores, low_res = predictor.predict(
            np.array([point[:2] for point in points], np.float32) if points else None,
            np.array([point[2] for point in points]) if points else None,
            np.array(box, np.float32) if box else None, mask_input=logits, multimask_output=True)
        logits = low_res[scores.argmax()][None]
        if number == 0:  # the object score was not trained for a mask that is fed back
            is_found = bool(prompted or not nothing_found(predictor.model))
    return (masks > 0) & is_found, scores * is_found


def number_objects(objects, title):
    """The objects' masks of one model as uint16 H x W: 0 background, k the k-th object; smaller ones lie on top."""
    masks = [item.best(title)[1] for item in objects]
    labels = np.zeros(masks[0].shape, np.uint16)
    for index in np.argsort([-mask.sum() for mask in masks], kind="stable"):
        labels[masks[index]] = index + 1
    return labels


# ---- the window ----


def require_display(web, alternative):
    """Let windows open on this screen or, with `web` (a port), in a browser, at a secret address on this machine."""
    if web is None and plt.get_backend().lower() != "webagg":
        with contextlib.suppress(Exception):  # each toolkit has its own error for "no display"
            framework = plt.figure().canvas.required_interactive_framework
            plt.close()
            if framework:
                return
        fail(f"창을 띄울 수 없습니다. {alternative}, --web으로 브라우저에 띄우세요"
             + " (리눅스라면 python3-tk 패키지도 필요합니다)" * (sys.platform == "linux"))
    if web is not None and not 0 < web < 65536:  # getaddrinfo() takes it modulo 65536
        fail(f"--web {web}: 포트는 1부터 65535까지입니다")
    try:
        plt.switch_backend("WebAgg")
        from matplotlib.backends.backend_webagg import WebAggApplication as Server
        from tornado.log import access_log
        access_log.setLevel("ERROR")  # prints no line for each /favicon.ico that a browser requests
        plt.rcParams.update({"webagg.port": web or 8988, "webagg.address": "127.0.0.1"})
        Server.initialize(url_prefix=f"/{os.urandom(16).hex()}")  # takes a port nearby if this one is in use
    except (ImportError, RuntimeError, OSError) as error:  # OSError: a port that needs an administrator
        fail(f"브라우저에 창을 띄울 수 없습니다 ({error}). tornado가 없으면: pip install tornado")
    print(f"브라우저에서 여세요: http://127.0.0.1:{Server.port}{Server.url_prefix}/ (끝내려면 q나 Ctrl-C)\n"
          f"다른 컴퓨터에서 보려면 거기서 먼저: ssh -L {Server.port}:127.0.0.1:{Server.port} 사용자@서버", flush=True)


def show_window(figure):
    """Show a window and wait until it is closed; in a browser only plt.close() closes it, not the end of a tab."""
    if plt.get_backend().lower() != "webagg":
        return plt.show()
    from tornado import gen, ioloop
    loop, manager = ioloop.IOLoop.current(), figure.canvas.manager
    while plt.fignum_exists(figure.number):
        loop.run_sync(partial(gen.sleep, 0.05))
    manager.set_window_title("끝났습니다. 다음 이미지가 있으면 새로 고치세요")
    loop.run_sync(partial(gen.sleep, 0.1))


class Window:
    """A matplotlib window in which each click and each dragged box segments the image again.

    models: {title: function of (points, box) that returns masks 3 x H x W and scores 3}; one panel each.
    title: title of the window. After show_window(), objects() returns the segmented objects.
    """

    numbers = itertools.count(1)  # with equal numbers, clicks in an old browser tab would reach the new figure

    def __init__(self, image, models, title):
        self.image, self.models, self.size = image, models, image.shape[:2]
        self.finished, self.current, self.history, self.pressed = [], Segmented([], None, {}), [], None
        height, width = self.size
        panel_width = min(12 / len(models), 4.8 * width / height)  # inches: the window fits a screen of 1280 x 720
        self.figure = plt.figure(next(self.numbers), layout="constrained", figsize=(
            max(max(panel_width, 4.8) * len(models), 8), panel_width * height / width + 1))
        self.panels = self.figure.subplots(1, len(models), squeeze=False)[0]
        canvas = self.figure.canvas
        canvas.manager.set_window_title(title)
        self.figure.supxlabel(WINDOW_HELP, fontsize=10)
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # disables matplotlib's own keys
        for name, handler in (("button_press_event", self.on_press), ("motion_notify_event", self.on_motion),
                              ("button_release_event", self.on_release), ("key_press_event", self.on_key)):
            canvas.mpl_connect(name, handler)
        self.update()

    def objects(self):
        """The finished objects, and the current one if any model predicts a pixel of it."""
        is_found = any(self.current.best(title)[1].any() for title in self.current.candidates)
        return [*self.finished, self.current] if is_found else self.finished

    def position(self, event):
        """Position of an event in the image that was pressed: (x, y) to one decimal, clipped to the image."""
        place = self.pressed.inaxes.transData.inverted().transform((event.x, event.y))
        return tuple(np.clip(place, 0, np.subtract(self.size[::-1], 1)).round(1).tolist())

    def on_press(self, event):
        toolbar_mode = getattr(self.figure.canvas.toolbar, "mode", "")  # zooming or panning
        is_extra = event.dblclick and plt.get_backend().lower() == "webagg"  # beside the two clicks, without a release
        if event.inaxes in self.panels and event.button in (1, 3) and not toolbar_mode and not is_extra:
            if event.inaxes.images[0].contains(event)[0]:  # after panning, there is space beside the image
                self.pressed = event

    def dragged_box(self, event):
        """The box from where the left button was pressed to `event`; None for a click that barely moved."""
        start = self.pressed
        moved = max(abs(event.x - start.x), abs(event.y - start.y)) / self.figure.canvas.device_pixel_ratio
        if start.button != 1 or moved < 6:
            return None
        (x1, y1), (x2, y2) = self.position(start), self.position(event)
        return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)] if x1 != x2 and y1 != y2 else None

    def on_motion(self, event):
        if self.pressed and (box := self.dragged_box(event)):
            mark_prompts(self.panels, [(self.current.points, box)])
            self.figure.canvas.draw_idle()

    def on_release(self, event):
        # on macOS a Ctrl-click presses button 3 and releases button 1; the press determines the button
        if not self.pressed or event.button not in (self.pressed.button, 1):
            return
        box = self.dragged_box(event)
        points = [] if box else [(*self.position(self.pressed), int(self.pressed.button == 1))]
        self.pressed = None
        self.set_state(self.finished, [*self.current.points, *points], box or self.current.box)

    def on_key(self, event):
        key = (event.key or "").lower()  # with Caps Lock too
        key = KOREAN_KEYBOARD.get(key, key)
        if key in ("u", "backspace") and self.history:
            self.set_state(*self.history.pop())
            self.history.pop()  # the state that was left
        elif key in ("1", "2", "3") and self.current.candidates:
            self.current = self.current._replace(choice=int(key) - 1)
            self.update()
        elif key == "r" or key == "n" and len(self.objects()) > len(self.finished):
            self.set_state(self.objects() if key == "n" else self.finished, [], None)
        elif key in ("1", "2", "3", "n") or key == "enter" and not self.objects():
            self.update("nothing found here yet: click an object")
        elif key == "enter" or key in plt.rcParams["keymap.quit"]:
            plt.close(self.figure)

    def set_state(self, finished, points, box, choice=None):
        """Take the finished objects and the current one's prompts, segment with these and show the result."""
        self.history.append((self.finished, self.current.points, self.current.box, self.current.choice))
        candidates = {title: predict(points, box) for title, predict in self.models.items()} if points or box else {}
        self.finished, self.current = finished, Segmented(points, box, candidates, choice)
        self.update()

    def update(self, message=""):
        """Show the image, the finished objects, the current one's mask, its prompts, and a message."""
        objects = [*self.finished, self.current] if self.current.candidates else self.finished
        for axes, title in zip(self.panels, self.models):
            text = message or (f"{title}, object {len(self.finished) + 1}" if self.finished else title)
            if self.current.candidates and not message:
                number, _, score = self.current.best(title)
                text += f": mask {number + 1} of 3, score {score:.3f}"
            show(axes, self.image, colored_masks(objects, title))
            axes.set_title(text, fontsize=10)
        mark_prompts(self.panels, [self.current[:2]])
        self.figure.canvas.draw_idle()


# ---- results ----


def save_result(path, image, name, objects, rough):
    """Write a picture: the image with all prompts; the candidates of one object, or each model's masks of several."""
    (title, candidates), *others = objects[0].candidates.items()
    if len(objects) == 1 and not others:
        name, chosen = title, objects[0].best(title)[0]  # the panels are named after their masks
        panels = [(f"mask {number + 1}, score {score:.3f}" + "  (best)" * (number == chosen),
                   [(mask, object_color(1))], number == chosen)
                  for number, (mask, score) in enumerate(zip(*candidates))]
    else:
        count = f": {len(objects)} objects" if len(objects) > 1 else ", score {:.3f}"
        panels = [(title + count.format(objects[0].best(title)[2]), colored_masks(objects, title), False)
                  for title in objects[0].candidates]
    panels = [(name, [] if rough is None else [(rough, (0, 255, 0))], False), *panels]
    flatness = image.shape[1] / image.shape[0]
    columns = len(panels) if flatness < 1.6 else 1 if flatness > 5 else 2  # wide images are put below each other
    rows = math.ceil(len(panels) / columns)
    width = max(4, 14 / columns)  # inches a panel
    height = min(max(width / flatness, 1), 9) + 0.4
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")  # not pyplot's: no window
    for number, (title, masks, framed) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        show(axes, image, masks)
        axes.set_title(textwrap.fill(title, int(5 * width)))  # a Korean letter is up to 1/6 inch wide
        axes.spines[:].set(visible=framed, color="lime", linewidth=4)
    mark_prompts(figure.axes[:1], [item[:2] for item in objects])
    save_figure(figure, path)


def write_results(folder, name, writers):
    """Write an image's results, {kind: function of the path}, as NAME_KIND; returns the line that lists them."""
    paths = {kind: folder / f"{name}_{kind}" for kind in RESULTS}
    for kind, write in writers.items():
        write(paths[kind])
    if others := [path.name for kind, path in paths.items() if kind not in writers and path.is_file()]:
        # earlier results stay, because masks may have been edited by hand
        tqdm.write(f"이번 실행이 쓰지 않은 이전 파일이 남아 있습니다: {', '.join(others)}")
    return "저장: " + ", ".join(str(paths[kind]) for kind in writers)


def prompts_as_flags(points, box):
    """The points and the box of an object as command-line flags."""
    given = {"point": ";".join(f"{x:g},{y:g},{label}" for x, y, label in points),
             "box": ",".join(f"{edge:g}" for edge in box or [])}
    return " ".join(f'--{flag} "{text}"' for flag, text in given.items() if text)


def write_png(path, array):
    """Write uint8 or uint16 H x W, or uint8 H x W x 3 (BGR), as a PNG."""
    write_file(path, cv2.imencode(".png", array)[1].tobytes())


def show(axes, image, masks=()):
    """Draw `image`, with `masks`, (bool H x W, color), over it, in the image's own pixel coordinates."""
    height, width = image.shape[:2]
    reduced = reduce_to(image, DISPLAY_SIDE, cv2.INTER_AREA)
    for mask, color in masks:
        small = cv2.resize(mask.astype(np.uint8), reduced.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        reduced = overlay(reduced, small > 0, color)
    if axes.images:
        return axes.images[0].set_data(reduced)
    axes.imshow(reduced, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], anchor="N")  # anchored elsewhere, a title may be cut off


def mark_prompts(panels, prompts):
    """Mark [(points, box) or (points, box, its color)] in place of those before: stars, red for label 0, and boxes."""
    for artist in [artist for axes in panels for artist in (*axes.collections, *axes.patches)]:
        artist.remove()
    for axes, (points, box, *color) in itertools.product(panels, prompts):
        for x, y, label in points:
            size = 3 * min(axes.figure.get_size_inches() / axes.get_subplotspec().get_geometry()[1::-1])  # / 72 inch
            axes.scatter(x, y, np.clip(size, 6, 13)**2, color="lime" if label else "red", marker="*", ec="k", zorder=3)
        if box:
            x1, y1, x2, y2 = box
            axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=(*color, "lime")[0], lw=2))


def colored_masks(objects, title):
    """The masks of one model's objects, [(bool H x W, RGB)]: a color belongs to the object's number, from 1."""
    return [(item.best(title)[1], object_color(number)) for number, item in enumerate(objects, start=1)]


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


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    scale = min(1, max_side / max(array.shape[:2]))
    size = [max(1, round(side * scale)) for side in array.shape[1::-1]]
    return cv2.resize(array, size, interpolation=interpolation)


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

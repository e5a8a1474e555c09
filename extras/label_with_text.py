"""Make training labels from words or from boxes: a detector or a COCO file gives boxes, SAM 2 gives the masks.

    python extras/label_with_text.py --images photos --detector florence2 --category "polyp"
    python extras/label_with_text.py --images photos --detector grounding-dino --category "polyp. instrument."
    python extras/label_with_text.py --images photos --boxes annotations.json

Writes COCO JSON with boxes and masks, which prepare_data.py --coco reads. From Python:

    from common import load_predictor
    from files import read_image
    from label_with_text import Florence2, GroundedSAM2

    predictor = load_predictor("configs/sam2.1/sam2.1_hiera_s.yaml", "output/sam2_best.pt", "cuda")
    model = GroundedSAM2(predictor, Florence2("models/florence2", ["polyp"], "cuda"))
    detections = model.predict(read_image("photo.jpg"))   # sv.Detections with masks
    model.label("photos", "output/my_labels")

Chapters:
    settings          detectors, their flags, limits
    the run           main(), the command line, several processes
    detectors         boxes from words: Florence-2, Grounding DINO
    boxes of a file   boxes from COCO JSON
    masks and labels  SAM 2's masks in the boxes, the COCO output
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
import unicodedata
from collections import ChainMap, Counter, defaultdict
from datetime import timedelta
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import supervision as sv
import torch
import torch.distributed
from common import add_model_flags, choose_checkpoint, load_predictor
from files import (
    FORMATS,
    ImageError,
    detect_device,
    fail,
    list_images,
    read_image,
    run,
    write_file,
    write_json,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from matplotlib import font_manager
from matplotlib import pyplot as plt
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import (
    AutoModelForZeroShotObjectDetection,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoProcessor,
)
from transformers.utils import logging

# ---- settings ----

ROOT = Path(__file__).resolve().parent.parent
REPOSITORIES = {"florence2": "florence-community/Florence-2-base",
                "grounding-dino": "IDEA-Research/grounding-dino-tiny"}
OPTIONS = {"florence2": ["detector_dir", "task"],  # flags that only this detector has
           "grounding-dino": ["detector_dir", "box_threshold", "text_threshold"]}
TASKS = {"detection": "<OPEN_VOCABULARY_DETECTION>", "grounding": "<CAPTION_TO_PHRASE_GROUNDING>"}
NMS_IOU = 0.7       # if boxes of one category overlap more, the one with the lower score is dropped
MAX_TOKENS = 1024   # of Florence-2's answer: the length of its decoder's context, enough for some 200 boxes
DECODER_BATCH = 64  # boxes in one decoder call, as in sam2's own mask generator


# ---- the run ----


def main():
    args = parse_args()
    rank, processes, device = join_ranks(args.device)
    detector, checkpoint = make_detector(args, device), choose_checkpoint(args)
    predictor = load_predictor(args.model_cfg, checkpoint, device, args.image_size)
    print(f"모델: {checkpoint}, 장치: {device}")
    annotations = GroundedSAM2(predictor, detector).label(args.images, args.output, args.plot, rank, processes)
    if rank == 0:
        command = ["prepare_data.py", "--images", str(args.images), "--coco", str(annotations)]
        if args.preprocess:
            sys.stdout.flush()  # keeps the output of both processes in order
            sys.exit(subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode)
        print(f"다음: {shlex.join(['python', *command])}")


def parse_args():
    parser = argparse.ArgumentParser(description="단어나 상자로 이미지 폴더의 마스크 라벨을 만듭니다.")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="이미지 폴더 (필수)")
    parser.add_argument("--detector", choices=REPOSITORIES, help="--category를 찾을 검출기")
    parser.add_argument("--category", type=parse_categories, metavar="WORDS",
                        help='찾을 것, 영어로; 여럿이면 마침표로 구분: "polyp. instrument."')
    parser.add_argument("--detector-dir", type=Path, metavar="DIR",
                        help="검출기 가중치 폴더 (기본: models/검출기이름, 없으면 Hugging Face 캐시)")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="검출기 대신 상자가 든 COCO JSON")
    parser.add_argument("--task", choices=TASKS,
                        help="florence2의 과제: detection 개방 어휘 검출, grounding 구절의 위치 찾기 (기본: detection)")
    parser.add_argument("--box-threshold", type=parse_score, metavar="SCORE",
                        help="grounding-dino: 상자의 점수가 이보다 높아야 함, 0-1 (기본: 0.3)")
    parser.add_argument("--text-threshold", type=parse_score, metavar="SCORE",
                        help="grounding-dino: 상자와 범주 단어의 일치 점수가 이보다 높아야 함, 0-1 (기본: 0.25)")
    parser.add_argument("--plot", action="store_true", help="마스크와 상자를 그린 그림을 결과 폴더의 plots/에 저장")
    parser.add_argument("--preprocess", action="store_true", help="끝나면 prepare_data.py로 data/를 만듦")
    add_model_flags(parser, "output/my_labels")
    args = parser.parse_args()
    if bool(args.boxes) == bool(args.detector):
        parser.error("--detector와 --boxes 가운데 하나를 쓰세요")
    if bool(args.category) != bool(args.detector):
        parser.error("--detector와 --category는 함께 씁니다")
    for option in sum(OPTIONS.values(), []):
        if getattr(args, option) is not None and option not in OPTIONS.get(args.detector, []):
            parser.error(f"{args.detector or '--boxes'}에는 --{option.replace('_', '-')} 옵션을 쓸 수 없습니다")
    if args.boxes and args.boxes.resolve() == (args.output / "annotations.json").resolve():
        parser.error(f"--boxes {args.boxes}: 결과를 쓸 자리에 있습니다. 다른 --output을 쓰세요")
    return args


def parse_categories(text):
    """Split "polyp. instrument." into ["polyp", "instrument"]; duplicates are dropped."""
    names = list(dict.fromkeys(name.strip() for name in text.split(".") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("찾을 것이 없습니다")
    return names


def parse_score(text):
    """Parse a number from 0 to 1."""
    score = float(text)
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"0에서 1 사이여야 합니다: {text}")
    return score


def join_ranks(requested):
    """Join the processes of torchrun; returns (rank, number of processes, device), (0, 1, device) without torchrun.

    With CUDA, each process gets its own GPU. Only rank 0 prints.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = detect_device(requested)
    if processes > 1:
        if device not in ("cuda", "cpu"):
            fail(f"torchrun에서는 쓸 수 없는 장치입니다: {device}. --device cuda나 cpu로 실행하세요")
        device = detect_device(f"cuda:{os.environ['LOCAL_RANK']}") if device == "cuda" else device
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # waits for the slowest process
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (stays open until the process ends)
    return rank, processes, device


# ---- detectors ----


def make_detector(args, device):
    """The detector selected by the flags: an object with the method find()."""
    if args.boxes:
        return CocoBoxes(args.boxes)
    if not all(name.isascii() for name in args.category):
        print("주의: 두 검출기는 영어로 학습되었습니다. --category를 영어로 쓰세요")
    given = {name: getattr(args, name) for name in OPTIONS[args.detector] if getattr(args, name) is not None}
    folder = find_weights(args.detector, given.pop("detector_dir", None))
    detector_class = {"florence2": Florence2, "grounding-dino": GroundingDino}[args.detector]
    return detector_class(folder, args.category, device, **given)


def find_weights(detector, folder=None):
    """The folder with a detector's weights: the given one, else models/NAME, else the one in Hugging Face's cache.

    Nothing is downloaded. Without weights it fails with the command that downloads them.
    """
    if folder or Path("models", detector).is_dir():
        return folder or Path("models", detector)
    try:
        return Path(snapshot_download(REPOSITORIES[detector], local_files_only=True))
    except LocalEntryNotFoundError:
        fail(f"{detector}의 가중치가 없습니다. {how_to_fetch(detector)}")


def how_to_fetch(detector):
    """The part of an error message that explains how to download a detector's weights."""
    return f"받기: hf download {REPOSITORIES[detector]} --local-dir models/{detector} (받은 폴더는 --detector-dir로)"


def load_detector(model_class, processor_class, kinds, folder, device):
    """Load a detector's model and processor from a folder that save_pretrained wrote.

    kinds: model types that config.json may name, the first one a key of REPOSITORIES. No code from the folder is run
    (trust_remote_code=False) and only safetensors are read. A folder of another model or with missing weights is an
    error that names the command to download the right one.
    """
    fetch = how_to_fetch(kinds[0])
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or textwrap.shorten(str(error), 100)
        fail(f"{folder}: 검출기의 config.json을 읽을 수 없습니다 ({reason}). {fetch}")
    if kind not in kinds:
        fail(f"{folder}: {kind} 모델의 폴더입니다. 여기에 쓸 수 있는 것: {', '.join(kinds)}. {fetch}")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = model_class.from_pretrained(folder, use_safetensors=True, dtype=torch.float32,
                                                  output_loading_info=True, **local)
        processor = processor_class.from_pretrained(folder, **local)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own errors
        # e.g. microsoft/Florence-2-base, whose config only its own code can read
        reason = ("자기 코드로 여는 저장소의 폴더인데, 그 코드는 실행하지 않습니다" if "auto_map" in config
                  else textwrap.shorten(str(error), 200))
        fail(f"{folder}: {kind} 모델을 열 수 없습니다 ({reason}). {fetch}")
    if info["missing_keys"]:  # transformers initializes them with random numbers
        fail(f"{folder}: transformers의 {kind} 가중치가 아닙니다. 없는 항목 {len(info['missing_keys'])}개: "
             f"{', '.join(sorted(info['missing_keys'])[:2])}. {fetch}")
    return model.to(device).eval(), processor


class Florence2:
    """Boxes from Florence-2, one prompt for each category. Its boxes have no score: the confidence is 1.

    folder: weights of a Florence2ForConditionalGeneration; categories: list of names in English; task: key of TASKS.
    """

    def __init__(self, folder, categories, device, task="detection"):
        self.model, self.processor = load_detector(Florence2ForConditionalGeneration, Florence2Processor,
                                                   ["florence2"], folder, device)
        self.categories = dict(enumerate(categories, 1))
        self.task = TASKS[task]

    @torch.inference_mode()
    def find(self, image, name=""):
        """Find boxes in an image, uint8 H x W x 3, RGB: sv.Detections in pixels, class_id a key of self.categories.

        name: file name of the image, used only by CocoBoxes.
        """
        boxes, class_ids = [], []
        for class_id, category in self.categories.items():
            inputs = self.processor(text=self.task + category, images=image, return_tensors="pt").to(self.model.device)
            answer = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, num_beams=3, do_sample=False)
            text = self.processor.batch_decode(answer, skip_special_tokens=False)[0]
            found = self.read_answer(text, image.shape)
            boxes += found
            class_ids += [class_id] * len(found)
        return sv.Detections(xyxy=np.array(boxes, np.float32).reshape(-1, 4), class_id=np.array(class_ids, int),
                             confidence=np.ones(len(boxes), np.float32))

    def read_answer(self, text, shape):
        """Parse Florence-2's answer into boxes [x1, y1, x2, y2] in pixels: its <loc_…> are thousandths of the image.

        Open-vocabulary detection may answer with polygons, whose bounding boxes are returned. shape: (H, W, ...).
        """
        height, width = shape[:2]
        answer = self.processor.post_process_generation(text, task=self.task, image_size=(width, height))[self.task]
        outlines = [np.reshape(sum(polygons, []), (-1, 2)) for polygons in answer.get("polygons", [])]
        return [*answer["bboxes"], *([*outline.min(0), *outline.max(0)] for outline in outlines if len(outline))]


class GroundingDino:
    """Boxes from Grounding DINO, one forward pass for all categories.

    folder: weights of model type grounding-dino or mm-grounding-dino; categories: list of names in English;
    box_threshold, text_threshold: scores, 0 to 1, that a box and the best token of its category must exceed.
    """

    def __init__(self, folder, categories, device, box_threshold=0.3, text_threshold=0.25):
        self.model, self.processor = load_detector(AutoModelForZeroShotObjectDetection, GroundingDinoProcessor,
                                                   ["grounding-dino", "mm-grounding-dino"], folder, device)
        self.categories = dict(enumerate(categories, 1))
        self.box_threshold, self.text_threshold = box_threshold, text_threshold
        # lower case and a full stop after each category, as in its training
        self.text = "".join(f"{category.lower()}. " for category in categories).strip()
        tokens = len(self.processor.tokenizer(self.text)["input_ids"])
        if tokens > self.model.config.max_text_len:
            fail(f"--category가 너무 깁니다: 토큰 {tokens}개 ({self.model.config.max_text_len}개까지)")

    @torch.inference_mode()
    def find(self, image, name=""):
        """Like Florence2.find, with the scores as confidence."""
        inputs = self.processor(images=image, text=self.text, return_tensors="pt").to(self.model.device)
        return self.read_outputs(self.model(**inputs), inputs["input_ids"], image.shape)

    def read_outputs(self, outputs, input_ids, shape):
        """sv.Detections from the model's logits (1 x queries x tokens) and boxes. shape: (H, W, ...) of the image.

        The category of a box is the one whose tokens have the highest score. The phrase that transformers decodes is
        not used, because it may be part of a word or contain words of two categories.
        """
        result = self.processor.post_process_grounded_object_detection(
            outputs, input_ids, threshold=self.box_threshold, text_threshold=self.text_threshold,
            target_sizes=[shape[:2]])[0]
        scores = outputs.logits[0].sigmoid()
        scores = scores[scores.amax(1) > self.box_threshold]  # of the boxes in the result
        of_category = torch.stack([scores[:, tokens].amax(1) for tokens in self.tokens_of_categories()], 1)
        best, index = of_category.max(1)
        detections = sv.Detections(xyxy=result["boxes"].float().cpu().numpy().reshape(-1, 4),
                                   confidence=result["scores"].float().cpu().numpy(),
                                   class_id=index.cpu().numpy() + 1)
        return detections[(best > self.text_threshold).cpu().numpy()]

    def tokens_of_categories(self):
        """For each category a list of the indices of its tokens in self.text."""
        offsets = self.processor.tokenizer(self.text, return_offsets_mapping=True)["offset_mapping"]
        tokens, start = [], 0
        for category in self.categories.values():
            end = start + len(category.lower())
            tokens.append([place for place, (first, last) in enumerate(offsets) if start <= first < last <= end])
            start = end + len(". ")
        return tokens


# ---- boxes of a file ----


class CocoBoxes:
    """Boxes from a COCO file, made by any detector or by hand, without those marked iscrowd.

    If every box has a score, the boxes are treated as detections and NMS is applied; if not, all of them are kept. A
    box with a non-finite number is replaced by one without area, so that it is dropped and counted.
    """

    def __init__(self, path):
        self.images, self.boxes, crowds = defaultdict(list), defaultdict(list), 0
        try:
            coco = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            self.categories = {int(category["id"]): str(category["name"]) for category in coco["categories"]}
            for image in coco["images"]:
                size = image.get("width"), image.get("height")
                self.images[base_name(image["file_name"])].append((image["id"], size))
                self.boxes[image["id"]] = []
            for annotation in coco["annotations"]:
                bbox = np.array(annotation["bbox"], float)
                bbox = bbox.clip(-1e9, 1e9) if np.isfinite(bbox).all() else np.zeros_like(bbox)  # fits into float32
                x, y, width, height = bbox.tolist()
                class_id, score = int(annotation["category_id"]), annotation.get("score")
                self.categories[class_id]  # raises if the file does not list the category
                crowds += bool(annotation.get("iscrowd"))
                if not annotation.get("iscrowd"):
                    self.boxes[annotation["image_id"]].append(([x, y, x + width, y + height], class_id, score))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            fail(f"{path}: 상자가 든 COCO 형식이 아닙니다 "
                 f"({type(error).__name__}: {textwrap.shorten(str(error), 100)})")
        scores = [score for found in self.boxes.values() for _, _, score in found]
        missing = sum(not (isinstance(score, (int, float)) and abs(score) < 1e9) for score in scores)  # or not finite
        self.has_scores = not missing
        if 0 < missing < len(scores):
            print(f"주의: {path}의 상자 {missing}개에 점수(score)가 없어, 점수가 있는 {len(scores) - missing}개도 "
                  "사람이 그린 것으로 봅니다 (모두 1, NMS 없음)")
        if crowds:
            print(f"주의: {path}의 iscrowd 상자 {crowds}개는 뺍니다")

    def report_absent(self, names):
        """Print which images of the file are not among `names`, the file names in a folder."""
        present = {base_name(name) for name in names}
        absent = sorted(name for name in self.images if name not in present)
        if absent:
            more = f" 외 {len(absent) - 5}장" if len(absent) > 5 else ""
            print(f"주의: COCO 파일에 있지만 폴더에 없는 이미지 {len(absent)}장: {', '.join(absent[:5])}{more}")

    def find(self, image, name):
        """Like Florence2.find, for the image of this file name. Raises ImageError if the boxes do not fit the image."""
        entries = self.images.get(base_name(name), [])
        if len(entries) != 1:
            raise ImageError(f"COCO 파일에 {'두 번 나옴' if entries else '없음'}")
        (identity, listed), size = entries[0], (image.shape[1], image.shape[0])
        if None not in listed and listed != size:
            raise ImageError("크기가 다름: 이미지 {}x{}, COCO 파일 {}x{}".format(*size, *listed))
        found = self.boxes[identity]
        return sv.Detections(xyxy=np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
                             class_id=np.array([class_id for _, class_id, _ in found], int),
                             confidence=np.array([score for _, _, score in found], np.float32) if self.has_scores
                             else None)


def base_name(file_name):
    """A file name without folders, which CVAT adds, and in Unicode's NFC form (macOS decomposes accents and Hangul)."""
    return unicodedata.normalize("NFC", PurePosixPath(str(file_name).replace("\\", "/")).name)


# ---- masks and labels ----


class GroundedSAM2:
    """Gets boxes from a detector and masks from SAM 2.

    predictor: a SAM2ImagePredictor. detector: Florence2, GroundingDino, CocoBoxes, or an object of your own with
    `categories` ({class_id: name}) and `find(image, name)`, which returns sv.Detections with xyxy, class_id and, if
    NMS is wanted, confidence.
    """

    def __init__(self, predictor, detector):
        self.predictor, self.detector = predictor, detector

    def predict(self, image, name=""):
        """Find and segment the objects of an image.

        image: uint8 H x W x 3, RGB; name: file name of the image, used only by CocoBoxes.
        Returns sv.Detections with xyxy (inside the image), mask (bool N x H x W), confidence (1 where the detector
        gives none), class_id, data["class_name"] and data["predicted_iou"] (SAM 2's score of the mask).
        """
        return self.segment(image, suppress(clip_to_image(self.detector.find(image, name), image.shape)))

    @torch.inference_mode()
    def segment(self, image, detections):
        """Add masks to the boxes of sv.Detections; returns the same as predict().

        The image is encoded once, and up to DECODER_BATCH boxes are decoded in one call. For each box, the mask with
        the highest score is used.
        """
        predictor, height, width = self.predictor, *image.shape[:2]
        masks, scores = np.zeros((len(detections), height, width), bool), np.zeros(len(detections), np.float32)
        if len(detections):
            predictor.set_image(image)
        for start in range(0, len(detections), DECODER_BATCH):
            low_res, predicted = self.decode(detections.xyxy[start:start + DECODER_BATCH])
            best = predicted.argmax(1)
            for number, (candidates, place) in enumerate(zip(low_res, best), start):
                # only the best mask is resized, one at a time: predict() resizes all three of every box at once
                logits = predictor._transforms.postprocess_masks(candidates[None, place, None], (height, width))
                masks[number] = (logits[0, 0] > predictor.mask_threshold).cpu().numpy()
            scores[start:start + len(best)] = predicted.amax(1).float().cpu().numpy()
        names = np.array([self.detector.categories[class_id] for class_id in detections.class_id], dtype=object)
        return sv.Detections(xyxy=detections.xyxy, mask=masks, confidence=detections.confidence,
                             class_id=detections.class_id, data={"class_name": names, "predicted_iou": scores})

    def decode(self, boxes):
        """Decode boxes, N x 4 in pixels of the current image: logits N x 3 x h x w and scores N x 3.

        These are the steps of SAM2ImagePredictor.predict() before it resizes the masks.
        """
        predictor, model = self.predictor, self.predictor.model
        _, _, _, corners = predictor._prep_prompts(None, None, boxes, None, True)
        corners = corners.reshape(-1, 2, 2)
        labels = torch.tensor([[2, 3]], dtype=torch.int, device=corners.device).expand(len(corners), -1)
        sparse, dense = model.sam_prompt_encoder(points=(corners, labels), boxes=None, masks=None)
        logits, scores, _, _ = model.sam_mask_decoder(
            image_embeddings=predictor._features["image_embed"],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=True,
            high_res_features=predictor._features["high_res_feats"],
        )
        return logits, scores

    def label(self, folder, output, plot=False, rank=0, processes=1):
        """Label the images of a folder; writes output/annotations.json (COCO) and, with plot, output/plots/NAME.png.

        With torchrun each process labels a share of the images, and rank 0 writes the JSON. Images that cannot be
        used are skipped and listed at the end; it is an error if there is no label at all. Returns the path of the
        JSON.
        """
        paths, problems = images_to_label(folder)
        target = Path(output, "annotations.json")
        if rank == 0:
            Path(output).mkdir(parents=True, exist_ok=True)  # fails before any work is done, not at the end
            if target.exists():
                print(f"이전 결과를 덮어씁니다: {target}", flush=True)
            if isinstance(self.detector, CocoBoxes):
                self.detector.report_absent([*problems, *(path.name for path in paths)])
        entries = {}
        for path in tqdm(paths[rank::processes], "라벨", disable=True if rank else None):
            try:
                entries[path.name], note = self.label_image(path, Path(output, "plots") if plot else None)
            except ImageError as error:
                note = str(error).removeprefix(f"{path}: ")
            if note:
                problems[path.name] = note
        if processes > 1:
            shares = [None] * processes
            torch.distributed.all_gather_object(shares, (entries, problems))
            entries, problems = (dict(ChainMap(*parts)) for parts in zip(*shares))
        if rank == 0:
            self.write_coco(target, entries, problems)
        return target

    def label_image(self, path, plots):
        """Label one image: ({"size": (H, W), "annotations": list as in COCO}, note about dropped boxes or "").

        plots: folder for the picture with the labels drawn, or None. Raises ImageError.
        """
        image = read_image(path)
        found = self.detector.find(image, path.name)
        inside = clip_to_image(found, image.shape)
        kept = suppress(inside)
        segmented = self.segment(image, kept)
        detections = segmented[segmented.mask.any(axis=(1, 2))]
        if plots:
            write_file(plots / f"{path.stem}.png", draw(image, detections))
        left_out = {"이미지 밖이거나 1픽셀보다 작은 상자": len(found) - len(inside), "다른 상자와 겹치는 상자":
                    len(inside) - len(kept), "빈 마스크": len(segmented) - len(detections)}
        notes = [f"{what} {count}개 제외" for what, count in left_out.items() if count]
        return ({"size": image.shape[:2], "annotations": list(map(to_coco, detections))},
                ", ".join(notes) if len(found) else "상자 없음")

    def write_coco(self, path, entries, problems):
        """Write the COCO JSON of label() and print a summary. Fails if there is no label at all.

        entries: {file name: first value of label_image()}; problems: {file name: note}.
        """
        for name, problem in sorted(problems.items()):
            print(f"  {name} - {problem}")
        images, annotations = [], []
        for identity, (name, entry) in enumerate(sorted(entries.items()), 1):
            height, width = entry["size"]
            images.append({"id": identity, "file_name": name, "height": height, "width": width})
            annotations += [{"id": number, "image_id": identity, **annotation}
                            for number, annotation in enumerate(entry["annotations"], len(annotations) + 1)]
        if not annotations:
            fail("라벨을 하나도 만들지 못했습니다")
        names = self.detector.categories
        write_json(path, {"images": images, "annotations": annotations,
                          "categories": [{"id": class_id, "name": name} for class_id, name in names.items()]})
        labelled = len({annotation["image_id"] for annotation in annotations})
        counts = Counter(names[annotation["category_id"]] for annotation in annotations)
        print(f"저장: {path} (라벨이 있는 이미지 {labelled}장, 객체 {len(annotations)}개: "
              f"{', '.join(f'{name} {count}' for name, count in counts.most_common(5))})")


def clip_to_image(detections, shape):
    """Clip boxes to an image of shape (H, W, ...) and drop those that are then narrower or lower than a pixel."""
    boxes = sv.clip_boxes(detections.xyxy, (shape[1], shape[0]))
    large = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    return sv.Detections(xyxy=boxes, confidence=detections.confidence, class_id=detections.class_id)[large]


def suppress(detections):
    """Apply class-wise NMS to boxes with scores. Boxes without scores are all kept, with confidence 1."""
    if detections.confidence is not None:
        return detections.with_nms(NMS_IOU)
    detections.confidence = np.ones(len(detections), np.float32)
    return detections


def images_to_label(folder):
    """List the images of a folder: (sorted paths, {name: problem} of images that share their stem with another one,
    because both would have the same mask file in data/). Fails without images."""
    if not Path(folder).is_dir():
        fail(f"폴더가 없습니다: {folder}")
    paths = list_images(folder)
    if not paths:
        fail(f"{folder}에 이미지가 없습니다 ({', '.join(FORMATS)})")
    stems = {path: unicodedata.normalize("NFC", path.stem) for path in paths}
    counts = Counter(stems.values())
    return ([path for path in paths if counts[stems[path]] == 1],
            {path.name: "이름이 같은 파일이 여럿" for path in paths if counts[stems[path]] > 1})


def to_coco(detection):
    """Convert one detection, a tuple from iterating over sv.Detections, to a COCO annotation without ids."""
    (x1, y1, x2, y2), mask, confidence, class_id, _, data = detection
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"category_id": int(class_id), "bbox": [round(float(value), 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            "area": int(coco_mask.area(rle)), "iscrowd": 0, "score": round(float(confidence), 4),
            "predicted_iou": round(float(data["predicted_iou"]), 4),
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")}}


def draw(image, detections):
    """Draw masks, boxes, names and scores on an image, uint8 H x W x 3, RGB; returns the bytes of a PNG."""
    height, width = image.shape[:2]
    lookup = {"color_lookup": sv.ColorLookup.INDEX}  # a colour for each object, not for each category
    picture = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    picture = sv.MaskAnnotator(opacity=0.45, **lookup).annotate(picture, detections)
    picture = sv.BoxAnnotator(thickness=sv.calculate_optimal_line_thickness((width, height)),
                              **lookup).annotate(picture, detections)
    labels = [f"{name} {confidence:.2f}" for name, confidence in zip(detections["class_name"], detections.confidence)]
    font = font_manager.findfont(plt.rcParams["font.family"][-1])  # with Hangul, if installed: see files.py
    picture = sv.RichLabelAnnotator(font_path=font, font_size=max(10, min(height, width) // 40), text_padding=2,
                                    smart_position=True, **lookup).annotate(picture, detections, labels)
    return cv2.imencode(".png", picture)[1].tobytes()


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(main, "--image-size 512나 --device cpu를 써 보세요")

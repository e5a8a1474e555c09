"""Fine-tune SAM 2.1's mask decoder and prompt encoder, and optionally its image encoder, on your own images.

    python train_sam2_proper.py                      the reference guide's loss and settings
    python train_sam2_proper.py --recipe improved    higher IoU from the same number of training examples
    python train_sam2_proper.py --recipe strongest   highest IoU: trains the image encoder too, which takes longer
    python train_sam2_proper.py --encoder lora       the guide's loss, with low-rank updates of the image encoder
    python train_sam2_proper.py --test               check the setup: read all images, run one step, save no model
    python train_sam2_proper.py --resume             continue an interrupted training

By default the image encoder is frozen, so each image is encoded once, at its first visit, and its features are kept if
they fit in memory (not with --augment).
Training calls the prompt encoder and the mask decoder itself, on what predictor._features holds, as sagieppel's
"Fine-tune SAM2 in 60 lines" does: predictor.predict() runs under no_grad, so nothing would be learned through it.

Chapters:
    settings             every flag with its default, the recipes, the constants
    the run              main(), the command line, the output folder, trackers, --test
    the training loop    train(), Ctrl-C, one step, the optimizer
    data                 batches that follow from (seed, iteration), augmentation; images, masks and their objects
    features             the encoded images, kept in memory and in files
    prompts and loss     simulated clicks and boxes, the decoder, the loss
    the image encoder    what --encoder trains beside the decoder: nothing, low-rank updates or all weights
    validation           the numbers of compare_models.py
    files                checkpoints, --resume, log, curve, summary
    shared block         what compare_models.py and test_my_image.py contain too
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import signal
import sys
import textwrap
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import cv2
import numpy as np
import psutil
import torch
import torch.distributed
import torch.utils.checkpoint
import torchvision
from filelock import FileLock, Timeout
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.modeling.sam2_utils import sample_one_point_from_error_center
    from sam2.sam2_image_predictor import SAM2ImagePredictor
except (ImportError, RuntimeError) as error:  # not installed, or hidden by a folder of that name
    sys.exit(f"오류: sam2를 불러올 수 없습니다 ({error}). 설치: pip install --no-build-isolation -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")

Image.MAX_IMAGE_PIXELS = None  # the limit is OpenCV's

# ---- settings ----

SETTINGS = [  # the flags: (name, default, kind, help); kind: a type, (type, minimum) or the list of choices
    # model
    ("checkpoint", "checkpoints/sam2.1_hiera_small.pt", str, "원본 SAM 2.1 체크포인트"),
    ("model_cfg", "configs/sam2.1/sam2.1_hiera_s.yaml", str, "sam2 패키지 안의 모델 설정 이름 또는 내 YAML 파일 경로"),
    ("image_size", None, [512, 768, 1024], "모델 입력 한 변(픽셀): 작으면 빠르지만 덜 정확함 (기본: 모델 설정대로)"),
    # data
    ("image_dir", "data/images/train", str, "학습 이미지 폴더"),
    ("mask_dir", "data/masks/train", str, "학습 마스크 폴더 (이미지와 이름이 같은 PNG)"),
    ("val_image_dir", "data/images/val", str, "검증 이미지 폴더"),
    ("val_mask_dir", "data/masks/val", str, "검증 마스크 폴더"),
    ("max_objects", 20, (int, 1), "이미지마다 객체를 몇 개까지 검증할지. 더 많으면 무작위로 뽑되 언제나 같은 객체"),
    # training
    ("recipe", "reference", ["reference", "improved", "strongest"], "학습 방법: reference 원래 가이드의 손실, "
     "improved 더 높은 IoU, strongest 거기에 이미지 인코더도 학습. 따로 준 옵션이 우선"),
    ("iterations", 3000, (int, 1), "총 학습 반복 횟수"),
    ("save_every", 500, (int, 1), "몇 번 반복할 때마다 검증하고 저장할지"),
    ("patience", 0, (int, 0), "검증 IoU가 이 횟수만큼 연속으로 나아지지 않으면 일찍 끝냄, 0이면 끝까지"),
    ("batch_size", 1, (int, 1), "한 번에 디코딩할 이미지 수 (프로세스마다)"),
    ("accumulate", 1, (int, 1), "몇 배치의 기울기를 모아 가중치를 한 번 갱신할지: 메모리를 더 쓰지 않고 배치를 키움"),
    ("seed", 0, (int, 0), "난수 시드: 같은 값이면 같은 순서로 학습"),
    # optimizer
    ("lr", 1e-5, (float, 0), "학습률"),
    ("weight_decay", 4e-5, (float, 0), "가중치 감쇠"),
    ("scheduler", "none", ["none", "cosine"], "학습률 스케줄러: none 일정하게, cosine 코사인 곡선을 따라 0까지 줄임"),
    ("warmup", 0, (int, 0), "처음 몇 번 반복하는 동안 학습률을 0 가까이에서부터 올릴지"),
    ("max_grad_norm", 0.0, (float, 0), "기울기 노름을 이 값 이하로 제한, 0이면 제한하지 않음"),
    ("amp", True, bool, "CUDA에서 혼합 정밀도를 쓸지, 다른 장치에서는 늘 꺼짐"),
    # prompts and loss
    ("prompt", "point", ["point", "points", "box", "mixed", "none", "any"], "학습할 프롬프트: point 마스크 안의 점, "
     "points 틀린 곳의 점을 더함, box 조금 흔든 상자, mixed 셋을 섞음, none 없이 모든 객체, any 넷을 섞음"),
    ("val_prompt", "point", ["point", "points", "box", "mixed", "none"], "검증할 프롬프트: compare_models.py와 같음"),
    ("dice_weight", 0.0, (float, 0), "Dice 손실에 곱해 교차 엔트로피에 더할 값, 0이면 더하지 않음"),
    ("supervise", "first", ["first", "all"], "손실을 계산할 마스크: first 첫째만, all 셋 모두"),
    # image encoder
    ("encoder", "frozen", ["frozen", "lora", "full"], "이미지 인코더: frozen 고정하고 특징을 캐시, "
     "lora 저랭크 행렬을 더해 학습, full 전부 학습. lora와 full은 캐시가 없어 느림"),
    ("encoder_lr", None, (float, 0), "이미지 인코더의 학습률 (기본: full은 --lr과 같고 lora는 그 3배)"),
    ("lora_rank", 8, (int, 1), "--encoder lora의 랭크"),
    ("grad_checkpointing", False, bool, "인코더의 중간값을 저장하지 않고 다시 계산: 느린 대신 메모리를 덜 씀"),
    ("augment", False, bool, "학습 이미지를 뒤집고 돌리고 자르고 색을 바꿈. 특징을 캐시할 수 없어 느려짐"),
    ("workers", 2, (int, 0), "이미지를 미리 읽을 프로세스 수, 캐시를 쓸 때는 스레드 수"),
    # output and system
    ("output_dir", "output", str, "결과를 쓸 폴더"),
    ("device", "auto", str, "장치: auto, mps, cuda, cpu"),
    ("cache_gb", None, (float, 0), "특징을 메모리에 둘 한도(GB, 프로세스마다), 0이면 끔 (기본: 남은 메모리의 절반)"),
    ("cache_dir", None, str, "이미지 특징을 파일로도 남겨 다음 실행에 쓸 폴더 (기본: 쓰지 않음)"),
    ("tensorboard", False, bool, "결과 폴더의 tensorboard/에 TensorBoard 로그도 쓰기"),
    ("wandb", None, str, "Weights & Biases의 이 프로젝트에도 기록 (기본: 쓰지 않음)"),
]
CONFIG = {name: default for name, default, *_ in SETTINGS}
IMPROVED = {"dice_weight": 1.0, "supervise": "all", "prompt": "mixed", "batch_size": 4, "iterations": 750,
            "save_every": 125, "lr": 3e-4, "scheduler": "cosine", "warmup": 50}
RECIPES = {  # what --recipe sets, unless a flag is given
    # the same 3000 training examples in all three; chosen by benchmarks/study_recipes.py, see the guide
    "reference": {},
    "improved": IMPROVED,
    "strongest": {**IMPROVED, "encoder": "full", "prompt": "any"},
}
ENCODER_LR = {"lora": 3, "full": 1}  # times --lr, unless --encoder-lr is given
FREE_ON_RESUME = {"checkpoint", "model_cfg", "image_dir", "mask_dir", "val_image_dir", "val_mask_dir", "iterations",
                  "patience", "grad_checkpointing", "workers", "output_dir", "device", "cache_gb", "cache_dir",
                  "tensorboard", "wandb", "resume", "test"}  # flags that may be combined with --resume
MAX_SIDE = 1024        # pixels; larger images are reduced to this before training, as in the reference
MIN_FOREGROUND = 100   # pixels; smaller objects are skipped
ANY = ("point", "points", "box", "none")  # kinds of --prompt any, drawn with equal probability
MAX_POINTS = 3         # most clicks of --prompt points in training; validation and compare_models.py give this many
BOX_JITTER = 0.1       # standard deviation of a box's sides, as a share of its size, at most 20 px (as in SAM)
SCORE_WEIGHT = 0.05    # weight of the score loss relative to the mask loss
OBJECT_WEIGHT = 0.5    # weight of the object score's loss; it is trained if images without any object are in the data
LOG_EVERY = 10         # iterations between two rows of train_log.csv
AT_ONCE = 16           # images that a GPU encodes at once for the cache
SMOOTHING = 0.98       # running mean of loss and IoU; it starts with the first value
DECODER = r"sam_prompt_encoder\.|sam_mask_decoder\."
TRAINED = {            # names of the weights that --encoder trains
    # conv_s0 and conv_s1 belong to the decoder but run with the encoder: cached features include their output
    "frozen": re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)"),
    "lora": re.compile(rf"{DECODER}|image_encoder\..*\.parametrizations\.weight\.0\."),
    "full": re.compile(rf"{DECODER}|image_encoder\."),
}

# ---- the run ----


def main():
    """Train with the settings of the command line; returns the finished Training, for callers from Python."""
    args = parse_args()
    rank, processes, device = join_processes(args.device)
    with contextlib.ExitStack() as at_end:
        if rank == 0:
            at_end.enter_context(claim_folder(Path(args.output_dir)))
        trackers = open_trackers(args, at_end) if rank == 0 else []
        training = Training(args, device, rank, processes)
        print_setup(training)
        with contextlib.closing(training):
            check_images_and_step(training) if args.test else train(training, trackers)
        if rank == 0 and not args.test:
            finish(training)
    if processes > 1:
        torch.distributed.destroy_process_group()
    return training


def parse_args():
    """The settings: CONFIG, updated by those of the recipe or of the training to resume, then by the given flags."""
    parser = argparse.ArgumentParser(description="SAM 2.1의 디코더와 프롬프트 인코더를 내 데이터로 파인튜닝합니다.",
                                     argument_default=argparse.SUPPRESS)  # so that only given flags are in the result
    for name, default, kind, text in SETTINGS:
        options = {"type": kind[0] if isinstance(kind, tuple) else kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, list):
            options = {"choices": kind, "type": type(kind[0])}
        shown = "" if default is None or kind is bool else f" (기본: {default})"
        parser.add_argument("--" + name.replace("_", "-"), help=text + shown, **options)
    parser.add_argument("--resume", action="store_true", default=False,
                        help="결과 폴더의 중단된 학습을 저장된 설정으로 이어서 하기. 학습을 바꾸지 않는 옵션만 함께 줌")
    parser.add_argument("--test", action="store_true", default=False, help="모든 이미지를 읽고 한 번 학습해 보기만")
    given = vars(parser.parse_args())
    settings = RECIPES[given.get("recipe", CONFIG["recipe"])]
    if given["resume"]:
        if fixed := sorted(given.keys() - FREE_ON_RESUME):
            fail("--resume은 저장된 설정으로 이어서 하므로 함께 줄 수 없는 옵션입니다: "
                 f"--{', --'.join(fixed).replace('_', '-')}")
        given.setdefault("output_dir", CONFIG["output_dir"])  # not the saved one: the folder may have been moved
        settings = load_last(given["output_dir"])["settings"]
    args = argparse.Namespace(**{**CONFIG, **settings, **given})
    for name, _, kind, _ in SETTINGS:
        value = getattr(args, name)
        if isinstance(kind, tuple) and value is not None and not kind[1] <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: {kind[1]} 이상이어야 합니다")
    if args.encoder == "frozen" and (args.encoder_lr is not None or args.grad_checkpointing):
        parser.error("--encoder-lr과 --grad-checkpointing은 --encoder lora나 full과 함께 쓰는 옵션입니다")
    if args.encoder != "frozen" and (args.cache_gb or args.cache_dir):
        parser.error("--cache-gb와 --cache-dir은 --encoder frozen과 함께 쓰는 옵션입니다")
    if args.encoder != "frozen" and args.encoder_lr is None:
        args.encoder_lr = args.lr * ENCODER_LR[args.encoder]
    return args


def join_processes(requested):
    """(rank, number of processes, device): 0, 1 and the device, or torchrun's. Only rank 0 prints."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = detect_device(requested)
    if processes > 1 and device not in ("cuda", "cpu"):
        fail(f"torchrun에서는 쓸 수 없는 장치입니다: {device}. --device cuda나 cpu로 실행하세요")
    if processes > 1 and device == "cuda":
        device = detect_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the GPU that torch.cuda.is_bf16_supported() checks
    if processes > 1:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: PTH123, SIM115  (stays open to the end)
    return rank, processes, device


def claim_folder(folder):
    """Make a folder and lock it, for a `with`; fail if another process holds it or it cannot be written."""
    path = folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    path.touch()  # fails if the folder is not writable: an OSError below is about locking only
    try:
        held = FileLock(path, fallback_to_soft=False).acquire(blocking=False)  # a soft lock would outlive a kill
    except Timeout:
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")
    except OSError as error:  # Lustre without flock, SMB, NFS without lockd
        print(f"주의: 이 파일 시스템은 파일을 잠그지 못합니다 ({path}: {error.strerror}). "
              "같은 폴더에서 두 번 실행하지 마세요", file=sys.stderr)
        return contextlib.nullcontext()
    for leftover in folder.glob("*.[0-9]*.tmp"):  # left by a run that was killed while writing
        leftover.unlink()
    return held


def open_trackers(args, at_end):
    """Functions that write a row of the log to TensorBoard and W&B, as asked for; at_end: an ExitStack, closes them."""
    trackers = []
    try:
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = at_end.enter_context(SummaryWriter(Path(args.output_dir, "tensorboard")))
            trackers.append(lambda row: [board.add_scalar(key, row[key], row["iteration"]) for key in row])
        if args.wandb:
            import wandb
            run = wandb.init(project=args.wandb, dir=args.output_dir, config=vars(args))
            at_end.callback(run.finish)
            trackers.append(lambda row: run.log(row, step=row["iteration"]))
    except ImportError as error:
        fail(f"따로 설치해야 하는 패키지입니다 ({error}): pip install {error.name or 'tensorboard'}")
    except Exception as error:  # W&B: no login, no network, no such project
        fail(f"--tensorboard나 --wandb를 시작할 수 없습니다 ({textwrap.shorten(str(error), 200)}). "
             "W&B 로그인: wandb login, 로그인 없이: 환경 변수 WANDB_MODE=offline")
    return trackers


def print_setup(training):
    """Print the device, the data, the number of trained weights and the size of the cache."""
    args, images, val_images, processes = training.args, training.images, training.val_images, training.processes
    cache, val_cache = training.cache, training.val_cache
    unsampled = f" (이미지마다 {args.max_objects}개까지만 검증하므로 제외한 객체 {val_images.unsampled}개)" \
        if val_images.unsampled else ""
    encoder = {"frozen": "이미지 인코더와 conv_s0, conv_s1은 고정", "full": "이미지 인코더도 모두 학습",
               "lora": f"이미지 인코더의 블록은 랭크 {args.lora_rank}의 LoRA로 학습하고 neck은 고정"}[args.encoder]
    print(f"장치: {training.device}" + (f", 프로세스 {processes}개" if processes > 1 else ""))
    print(f"학습 {len(images)}장, 객체 {images.count}개 (전경 {MIN_FOREGROUND}픽셀 미만이라 뺀 객체 "
          f"{images.left_out}개), 검증 {len(val_images)}장, 객체 {val_images.count}개{unsampled}")
    for name, each, prompts in (("학습", images, args.prompt), ("검증", val_images, args.val_prompt)):
        if each.empty:
            print(f"{name} 이미지 중 객체가 없는 것 {each.empty}장: 프롬프트가 없을 때만 쓰므로 "
                  f"{name}에 {'씁니다' if prompts in ('none', 'any') else '쓰지 않습니다'}")
    trained, total = (sum(map(torch.numel, weights)) for weights in (training.parameters, training.model.parameters()))
    print(f"학습하는 가중치: {trained:,} / {total:,} ({encoder})")
    if cache is None:
        print("학습 이미지의 특징은 캐시하지 않고 쓸 때마다 인코딩합니다.")
    else:
        print(f"특징 캐시: 학습 {len(images)}장 중 {min(len(images), cache.capacity)}장, 검증 {len(val_images)}장 중 "
              f"{min(len(val_images), processes * val_cache.capacity)}장이 들어갑니다 "
              f"(한 장 {cache.bytes_per_image / 1e6:.2g} MB, 한도 {sum(val_cache.limits) / 1e9:.3g} GB)"
              + (f", 파일로도 남깁니다: {cache.folder}" if cache.folder else ""))
    if same := same_files(images, val_images):
        print(f"주의: 검증 이미지 {len(same)}장이 학습 이미지와 같은 파일입니다 ({', '.join(same[:3])}). "
              "검증 IoU가 실제보다 높게 나옵니다")
    if not val_images:
        print("검증 데이터가 없어 학습 IoU(이동 평균)로 최고 모델을 고릅니다.")
    if training.model.knows_absence and not training.teaches_absence:
        print("주의: 이 체크포인트는 객체가 없는 이미지를 가려내지만, 그런 이미지 없이 학습하면 그 능력을 잃습니다. "
              "지키려면 그런 이미지도 데이터에 넣고 --prompt any로 학습하세요")
    if not (args.resume or args.test) and Path(args.output_dir, "sam2_last.pt").exists():
        print(f"주의: 처음 저장할 때 {args.output_dir}의 이전 학습을 덮어씁니다. 이어서 하려면 --resume")


def check_images_and_step(training):
    """--test, once the setup has succeeded: decode every image and run one step."""
    free, problems, started = free_memory()[1], [], time.time()
    if free < 2e9:
        fail(f"메모리가 {free / 1e9:.1f} GB 남았습니다. 2 GB 이상 필요합니다. 다른 프로그램을 닫아 보세요")
    images = [*training.images, *training.val_images]
    for image in tqdm(images, "이미지 검사", leave=False, disable=None):
        try:
            image.read()
        except ImageError as error:
            problems.append(str(error))
    if problems:
        fail(f"쓸 수 없는 이미지 {len(problems)}장: {', '.join(problems)}")
    training.step(training.iteration + 1)
    training.fetch()
    print(f"이미지 {len(images)}장을 모두 읽고 한 번 학습했습니다: loss {training.mean[0]:.4f}, "
          f"{time.time() - started:.1f}초, 남은 메모리 {free / 1e9:.1f} GB")
    print("버전: " + ", ".join(" ".join(pair) for pair in versions().items()))


def versions():
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
             "sam2": "?", "numpy": np.__version__, "opencv-python": cv2.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Meta's own checkout has another name
        found["sam2"] = importlib.metadata.version("sam2")
    return found


# ---- the training loop ----


def train(training, trackers):
    """Run all iterations. Ctrl-C or an error (with several processes, in the first) ends the program after saving.

    Before the first iteration, the model is validated as it is. --resume first validates what an interruption left out.
    """
    args, rank, patience = training.args, training.rank, training.args.patience or math.inf
    bar = tqdm(desc="학습", initial=training.iteration, total=args.iterations, disable=True if rank else None)
    with contextlib.closing(bar), deferred_interrupts(training.processes) as training.interrupted:
        try:
            record(training, trackers, bar)
            while training.iteration < args.iterations and training.validations_since_best < patience:
                training.step(training.iteration + 1)
                bar.update()
                record(training, trackers, bar)
            if training.iteration < args.iterations:
                bar.write(f"{training.iteration}회에 일찍 끝냅니다: "
                          f"{training.best_iteration}회 이후로 나아지지 않았습니다.")
        except (Exception, KeyboardInterrupt) as error:  # also a damaged image, a full memory, a tracker's failure
            if rank == 0 and training.iteration:
                if training.pending and training.processes == 1:  # other processes would not join its all_reduce
                    training.fetch()
                save(training, better=training.best_iteration == training.iteration, unfinished=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            if not training.iteration:
                print("아직 학습하지 않아 저장하지 않았습니다.")
            if training.processes > 1:
                torch.distributed.barrier()  # torchrun ends the others when the first one has ended
            sys.exit(130)


def record(training, trackers, bar):
    """Log, validate and save what is due after an iteration; raises KeyboardInterrupt if the user stopped training."""
    args, iteration = training.args, training.iteration
    validating = iteration % args.save_every == 0 or iteration == args.iterations
    log_due = validating or iteration % LOG_EVERY == 0 or iteration == 1
    # fetch() waits for the GPU, so not after each iteration; but several processes agree on Ctrl-C there
    fetch_due = log_due or training.device == "cpu" or training.processes > 1 and training.cache is None
    if training.pending and (fetch_due or training.processes == 1 and training.interrupted):
        any_interrupted = training.fetch()
        bar.set_postfix(loss=f"{training.mean[0]:.4f}", IoU=f"{training.mean[1]:.1%}", refresh=False)
        if any_interrupted:
            raise KeyboardInterrupt
    logged_before_resume = training.rows and training.rows[-1]["iteration"] == iteration
    nothing_to_log = iteration == 0 and not training.val_images
    if not log_due or logged_before_resume or nothing_to_log:
        return
    log(training, trackers, validating)
    if validating and iteration > 0:
        better = training.update_best()
        if training.rank == 0:
            save(training, better)


def log(training, trackers, validating):
    """Add a row to the log: running means, learning rates and, if validating, what compare_models.py would measure."""
    if validating and not training.iteration:
        tqdm.write(f"학습하기 전의 모델부터 검증합니다 (이미지 {len(training.val_images)}장).")
    row = {"iteration": training.iteration, **dict(zip(("loss", "train_iou"), training.mean or ())),
           **dict(zip(("lr", "encoder_lr"), (group["lr"] for group in training.optimizer.param_groups))),
           "seconds": round(time.time() - training.started, 1)}
    if validating:
        row.update(validate(training))
        means = f"loss {row['loss']:.4f}, 학습 IoU {row['train_iou']:.2%}" if training.mean else "학습 전"
        measured = f"IoU {row['val_iou']:.2%}, Dice {row['val_dice']:.2%}" if "val_iou" in row else "없음"
        measured += f", 특이도 {row['val_specificity']:.2%}" if "val_specificity" in row else ""
        tqdm.write(f"[{training.iteration}/{training.args.iterations}] {means}, 검증 {measured}")
    for track in trackers:
        track(row)
    training.rows.append(row)  # last: if something failed, --resume logs and validates this iteration again


@contextlib.contextmanager
def deferred_interrupts(processes):
    """A list that gets an entry on Ctrl-C or SIGTERM. record() reads it after each step, validate() after each image.

    Several processes read it together, in fetch(): after up to LOG_EVERY iterations if features are cached.
    """
    interrupted = []

    def on_interrupt(*_):
        interrupted.append(True)  # a second Ctrl-C ends the program; not under torchrun, which sends a second one
        signal.signal(signal.SIGINT, signal.SIG_IGN if processes > 1 else signal.SIG_DFL)
        with contextlib.suppress(OSError, RuntimeError):  # if Ctrl-C also ended `tee`, or interrupted another print()
            print("이번 반복을 마치고 저장합니다." + " 바로 끝내려면 Ctrl-C를 한 번 더 누르세요." * (processes == 1))

    before = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python


class Training:
    """The state of a run: model, data, optimizer and progress, made from the settings. step() is one iteration."""

    def __init__(self, args, device, rank=0, processes=1):
        self.args, self.device, self.rank, self.processes = args, device, rank, processes
        last = load_last(args.output_dir) if args.resume else None
        checkpoint = Path(args.output_dir, "sam2_last.pt") if args.resume else args.checkpoint
        self.predictor = load_predictor(args.model_cfg, checkpoint, device, args.image_size)
        self.model = self.predictor.model
        self.images, self.val_images = load_images(args)
        self.data = {f"{split}/{image.path.name}": image.mask_hash  # for --resume to compare
                     for split, images in (("train", self.images), ("val", self.val_images)) for image in images}
        cached = args.encoder == "frozen" and not args.augment  # the features of training images stay the same
        self.dataset = Batches(self.images, args, None if cached else self.model.image_size, rank, processes,
                               start=last["iteration"] * args.accumulate if last else 0)
        self.cache, self.val_cache = make_caches(self.predictor, self.dataset, self.val_images[rank::processes], args)
        prepare_weights(self.model, args)
        self.teaches_absence = self.model.pred_obj_scores and self.images.filled < len(self.images)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.batch_loss = BatchLoss(self.predictor, self.cache, args)
        if processes > 1:  # the weights of masks that are not in the loss get no gradient
            self.batch_loss = DistributedDataParallel(self.batch_loss, find_unused_parameters=True)
        self.optimizer = make_optimizer(self.model, args)
        half = torch.device(device).type == "cuda" and args.amp and autocast_dtype() == torch.float16
        self.scaler = torch.amp.GradScaler("cuda", enabled=half)
        self.model.image_encoder.register_forward_hook(self.count_encoded)
        self.started = time.time()
        self.iteration, self.rows, self.mean, self.encoded = 0, [], None, 0  # encoded: images, by this process
        self.pending = []  # a tensor (loss, IoU) on the device for each iteration since the last fetch()
        self.interrupted = []  # see deferred_interrupts()
        self.best, self.best_iteration, self.validations_since_best = -1.0, 0, 0
        if last:
            restore(self, last)

    def count_encoded(self, _encoder, inputs, _outputs):
        self.encoded += len(inputs[0])

    @functools.cached_property
    def batches(self):
        """An iterator over each Batch from the next iteration on, read ahead by --workers if nothing is cached."""
        return iter(DataLoader(self.dataset, sampler=itertools.count(self.dataset.start),
                               collate_fn=operator.itemgetter(0), worker_init_fn=ignore_interrupts,
                               num_workers=self.args.workers if self.dataset.image_size else 0,
                               pin_memory=self.predictor.device.type == "cuda"))

    def close(self):
        """End the worker processes: they ignore signals, so Python would wait for them when it exits."""
        self.__dict__.pop("batches", None)

    def step(self, iteration):
        """One step of the optimizer; the loss and the IoU stay on the device until fetch() gets them."""
        args, total = self.args, 0
        self.model.knows_absence = self.teaches_absence  # not before: the original model is validated as it is
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(args, iteration)
        for number in range(1, args.accumulate + 1):
            batch = next(self.batches)
            synchronize = number == args.accumulate or self.processes == 1
            with contextlib.nullcontext() if synchronize else self.batch_loss.no_sync():
                loss, iou = self.batch_loss(batch)
                self.scaler.scale(loss / args.accumulate).backward()
            total = total + torch.stack([loss.detach(), iou.detach()]) / args.accumulate
        if args.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # frees the memory of the gradients for validation and saving
        self.pending.append(total)
        self.iteration = iteration

    def fetch(self):
        """Wait for the device and add the steps since the last call to the running means of loss and IoU.

        Returns whether any process was interrupted. Fails if a loss is not finite: record() calls it before it saves,
        so nothing that was learned from such a loss is saved.
        """
        flag = torch.full_like(self.pending[-1], bool(self.interrupted))  # as a last row, for the same all_reduce
        values = torch.stack([*self.pending, flag])
        if self.processes > 1:
            torch.distributed.all_reduce(values)
        *steps, (stopping, _) = (values.cpu() / self.processes).tolist()
        for iteration, now in enumerate(steps, self.iteration + 1 - len(steps)):
            if not math.isfinite(now[0]):
                numbers = range((iteration - 1) * self.args.accumulate, iteration * self.args.accumulate)
                names = ", ".join(image.path.name for number in numbers for image in self.dataset.draw(number)[0])
                fail(f"손실이 유한하지 않습니다 ({iteration}회, 이미지 {names}). --lr을 낮춰 보세요. "
                     "마지막으로 저장한 뒤의 학습은 저장하지 않았고, 전에 저장한 모델은 그대로입니다")
            self.mean = now if self.mean is None else [SMOOTHING * old + (1 - SMOOTHING) * new
                                                       for old, new in zip(self.mean, now)]
        self.pending = []
        return bool(stopping)

    def update_best(self):
        """Count a validation; returns whether its IoU (without validation images: the training IoU) is the best yet."""
        iou = self.rows[-1].get("val_iou", self.mean[1])
        self.validations_since_best += 1
        if better := iou > self.best:
            self.best, self.best_iteration, self.validations_since_best = iou, self.iteration, 0
        return better


def make_optimizer(model, args):
    """AdamW over the trained weights; those of the image encoder have their own learning rate."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decoder = [parameter for name, parameter in trained if not name.startswith("image_encoder.")]
    encoder = [parameter for name, parameter in trained if name.startswith("image_encoder.")]
    groups = [{"params": parameters, "lr": lr, "initial_lr": lr}
              for parameters, lr in ((decoder, args.lr), (encoder, args.encoder_lr)) if parameters]
    fused = next(model.parameters()).device.type != "mps"  # on MPS, fused AdamW is untested
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)


def learning_rate_factor(args, iteration):
    """The factor of --warmup and --scheduler on the learning rates in an iteration, counted from 1."""
    cosine = (1 + math.cos(math.pi * (iteration - 1) / args.iterations)) / 2 if args.scheduler == "cosine" else 1
    return cosine * min(1, iteration / (args.warmup + 1))


# ---- data ----


def load_images(args):
    """The images for training and for validation (none, if there is no folder of validation images): LabeledImages."""
    images = LabeledImages(find_pairs(args.image_dir, args.mask_dir), MAX_SIDE, MIN_FOREGROUND,
                           keep_empty=args.prompt in ("none", "any"))
    if not images.filled:
        fail(f"학습할 쌍이 없습니다: {args.image_dir}, {args.mask_dir}. 확인: python prepare_data.py --check")
    val_pairs = find_pairs(args.val_image_dir, args.val_mask_dir) if Path(args.val_image_dir).is_dir() else []
    limit = None if args.val_prompt == "none" else args.max_objects  # "none" uses all objects of an image
    return images, LabeledImages(val_pairs, math.inf, 1, limit, keep_empty=args.val_prompt == "none")


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


class Batch(NamedTuple):
    """The examples of one forward pass: one object and one prompt in each of N images."""

    images: list                        # N LabeledImage, if their features are cached, else empty
    kind: str                           # of the prompts: point, points, box or none
    corrections: int                    # further clicks, one after the other, on wrong pixels
    rngs: list                          # a Generator for each image: draws the object, augmentation, then the prompt
    gt_masks: list                      # for each image bool tensor 1 x H x W
    pixels: torch.Tensor | None = None  # uint8 N x 3 x S x S, if features are not cached


class Batches(Dataset):
    """Item i is a run's i-th Batch (from 0) and follows from the settings and i: resuming needs no random state.

    image_size: read the images and resize them to this side; None if their features are cached. start: the first item
    that the run needs.
    """

    def __init__(self, images, args, image_size=None, rank=0, processes=1, start=0):
        self.images, self.args, self.image_size, self.start = images, args, image_size, start
        self.rank, self.processes = rank, processes

    def draw(self, number):
        """What the seed determines of a Batch: its images, kind, corrections and generators."""
        args = self.args
        iteration, part = number // args.accumulate + 1, number % args.accumulate
        rng = np.random.default_rng([args.seed, iteration])  # the same in every process and part of an iteration
        part_size = args.batch_size * self.processes
        size = args.accumulate * part_size  # of the batches of all parts and processes
        indices = rng.integers(self.images.filled, size=size)  # the others show no object
        kind = ANY[rng.integers(len(ANY))] if args.prompt == "any" else prompt_kind(args.prompt, rng.integers(3))
        if kind == "none":
            indices = rng.integers(len(self.images), size=size)
        corrections = int(rng.integers(MAX_POINTS)) if kind == "points" else 0
        places = range(part * part_size + self.rank, (part + 1) * part_size, self.processes)  # of this process
        # + 1, because NumPy seeds [a, b, 0] like [a, b]
        rngs = [np.random.default_rng([args.seed, iteration, place + 1]) for place in places]
        return [self.images[indices[place]] for place in places], kind, corrections, rngs

    def __getitem__(self, number):
        """The Batch, or an ImageError: raised in a worker process, it would print many lines."""
        gt_masks, resized = [], []
        images, kind, corrections, rngs = self.draw(number)
        for image, rng in zip(images, rngs):
            label = None if kind == "none" else image.objects[rng.permutation(len(image.objects))[0]]
            gt_mask = torch.from_numpy(image.mask(label))[None]
            if self.image_size is not None:
                try:
                    pixels = torch.from_numpy(image.read()).permute(2, 0, 1)
                except ImageError as error:
                    return error
                if self.args.augment:
                    pixels, gt_mask = augment_example(rng, pixels, gt_mask)
                resized.append(v2.functional.resize(pixels, [self.image_size] * 2))
            gt_masks.append(gt_mask)
        if resized:  # without the images: what a worker process returns is copied
            return Batch([], kind, corrections, rngs, gt_masks, torch.stack(resized))
        return Batch(images, kind, corrections, rngs, gt_masks)


def augment_example(rng, image, gt_masks):
    """Flip, crop, scale and turn an image (uint8 3 x H x W) and its masks (bool K x H x W); vary the image's color.

    Masks are resampled like the image and thresholded at one half: torchvision's nearest neighbor shifts them by half a
    pixel. A view with fewer than MIN_FOREGROUND pixels of an object is drawn again; after five, nothing is changed.
    """
    height, width = image.shape[1:]
    recolor = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)  # hue would take four times as long
    move = v2.Compose([
        v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
        v2.RandomResizedCrop((height, width), scale=(0.5, 1), ratio=(3 / 4 * width / height, 4 / 3 * width / height)),
        v2.RandomChoice([v2.Identity(), v2.RandomRotation((90, 90), expand=True)])])
    layers = gt_masks.to(torch.uint8) * 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        for _ in range(5):
            moved = move(torch.cat([recolor(image), layers]))
            masks = moved[3:] > 127
            if not gt_masks.any() or (masks.sum((1, 2)) >= MIN_FOREGROUND).all():
                return moved[:3], masks
    return image, gt_masks


def ignore_interrupts(_worker):
    """Ctrl-C also reaches the worker processes; they continue until the training ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class LabeledImages(list):
    """A LabeledImage for each pair (image path, mask path). Masks are read; images are only checked for their size.

    Objects with fewer than min_foreground pixels after the reduction to max_side are skipped (`left_out`), as are all
    but a sample of max_objects in an image (`unsampled`), and images whose objects are all too small; `count` objects
    are left. Images with a black mask (`empty`) are skipped or, with keep_empty, follow the `filled` ones.
    """

    def __init__(self, pairs, max_side, min_foreground, max_objects=None, keep_empty=False):
        self.left_out = self.unsampled = self.count = 0
        filled, empty = [], []
        for image_path, mask_path in tqdm(pairs, "마스크 읽기", disable=None, leave=False):
            labels = read_mask(mask_path)
            check_header(image_path, labels.shape)
            size = reduced_size(labels.shape, max_side)
            values, lengths = runs = run_lengths(labels)
            areas = np.bincount(values, lengths) * math.prod(size) / labels.size  # of all numbers, reduced
            areas[0] = 0  # the background
            large = np.flatnonzero(areas >= min_foreground).astype(np.uint16)
            objects = sample_objects(large, max_objects)
            self.left_out += np.count_nonzero(areas) - len(large)
            self.unsampled += len(large) - len(objects)
            self.count += len(objects)
            mask_hash = hashlib.sha256(repr(labels.shape).encode() + values.tobytes() + lengths.tobytes()).hexdigest()
            image = LabeledImage(image_path, labels.shape, size, objects, mask_hash, runs)
            if len(objects):
                filled.append(image)
            elif not areas.any():
                empty.append(image)
        self.filled, self.empty = len(filled), len(empty)
        super().__init__(filled + (empty if keep_empty else []))


@dataclasses.dataclass(eq=False)
class LabeledImage:
    """An image and its numbered mask, which is kept in memory as runs of equal pixels."""

    path: Path           # of the image
    shape: tuple         # (H, W) of image and mask
    size: tuple          # the same, reduced to max_side
    objects: np.ndarray  # the numbers of the objects to train or validate
    mask_hash: str
    runs: tuple = dataclasses.field(repr=False)  # of the numbered mask, see run_lengths()
    masks: dict = dataclasses.field(default_factory=dict, repr=False)  # the runs of each mask that mask() has reduced

    def read(self):
        """The image, reduced to `size`: uint8 H x W x 3; ImageError if its proportions differ from the mask's."""
        image = read_image(self.path)
        if reduced_size(image.shape, max(self.size)) != self.size:
            raise ImageError(f"{self.path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")
        if image.shape[:2] != self.size:
            image = cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)
        return image

    def labels(self):
        """The numbered mask: uint16 H x W."""
        return np.repeat(*self.runs).reshape(self.shape)

    def mask(self, number=None):
        """One object's mask or, without a number, the union of all, reduced to `size`: bool H x W."""
        if number not in self.masks:
            labels = self.labels()
            self.masks[number] = run_lengths(reduce_mask(labels > 0 if number is None else labels == number, self.size))
        return np.repeat(*self.masks[number]).reshape(self.size)


def run_lengths(labels):
    """Values and lengths of an array's runs of equal values: np.repeat(values, lengths) is labels.ravel()."""
    pixels = labels.ravel()
    starts = np.append(0, np.flatnonzero(pixels[1:] != pixels[:-1]) + 1)
    return pixels[starts], np.diff(starts, append=len(pixels)).astype(np.int32)


def check_header(path, shape):
    """ImageError if a file's header is not that of an image of (H, W) `shape`, upright or rotated by EXIF."""
    try:
        with Image.open(path) as image:
            size = image.size
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or '손상되었거나 읽지 못하는 형식의 이미지입니다'}") from None
    if shape not in (size, size[::-1]):
        raise ImageError(f"{path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")


def sample_objects(numbers, max_objects):
    """At most max_objects (None: all) of an image's object numbers, in order: the same random sample every time."""
    if max_objects is None or len(numbers) <= max_objects:
        return numbers
    return np.sort(np.random.default_rng(0).choice(numbers, max_objects, replace=False))


def reduced_size(shape, max_side):
    """(H, W) of an array (H, W, ...) when its longer side is reduced to at most max_side pixels; never larger."""
    scale = min(1, max_side / max(shape[:2]))
    return tuple(max(1, round(side * scale)) for side in shape[:2])


def reduce_mask(mask, size):
    """Reduce a mask (bool H x W) to `size`. A broad object keeps its area. A thin line is neither lost nor broken, but
    may lose a pixel where it meets a broad object.

    A pixel is kept if its coverage is at least m**2 / 2, where m is the largest coverage in its 3 x 3 neighborhood: one
    half beside a full pixel (m = 1), less along a thin line (m < 1). Specks below coverage.max() / 8 are dropped.
    """
    if mask.shape == size:
        return mask
    coverage = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    largest_nearby = cv2.dilate(coverage, np.ones((3, 3)))
    return (coverage >= largest_nearby**2 / 2) & (coverage > coverage.max() / 8)


def same_files(images, val_images):
    """The names of the validation images whose file is, byte for byte, that of a training image."""
    sizes = {image.path.stat().st_size for image in images} & {image.path.stat().st_size for image in val_images}
    train, val = ({image.path.name: hashlib.sha256(image.path.read_bytes()).digest() for image in each
                   if image.path.stat().st_size in sizes} for each in (images, val_images))
    known = set(train.values())
    return [name for name, digest in val.items() if digest in known]


# ---- features ----


def make_caches(predictor, dataset, val_images, args):
    """Caches of the features of training and of validation images: (FeatureCache or None, FeatureCache).

    dataset: the run's Batches; val_images: of this process, in the order in which validate() uses them.
    None if training images are encoded at every visit: by a trained encoder, or augmented. Validation images get
    their memory first, as every validation needs all of them, and full precision, as in compare_models.py.
    """
    if args.encoder != "frozen":
        return None, FeatureCache(predictor, args, (0, 0), full_precision=True)  # features change all the time
    free_device, free_host = free_memory(predictor.device)
    limits = free_device // 2, free_host // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.cache_gb is not None:
        wanted = int(args.cache_gb * 1e9)
        limits = min(limits[0], wanted), min(limits[1], max(0, wanted - limits[0]))
    val_cache = FeatureCache(predictor, args, limits, val_images, full_precision=True)
    if dataset.image_size:
        return None, val_cache
    on_device = min(len(val_images), val_cache.on_device)  # images
    on_host = min(len(val_images), val_cache.capacity) - on_device
    rest = [limit - count * val_cache.bytes_per_image for limit, count in zip(limits, (on_device, on_host))]
    return FeatureCache(predictor, args, rest, first_visits(dataset)), val_cache


def free_memory(device="cpu"):
    """Bytes of free memory: of the device, if it has its own, and of the machine or its container (cgroup 2)."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(statistics["inactive_file"])  # cached files: freed when memory is needed
        free = max(0, min(free, limit - used))
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else 0, free


def first_visits(dataset):
    """The images of a run, in the order in which its Batches use them first."""
    seen = set()
    for number in range(dataset.start, dataset.args.iterations * dataset.args.accumulate):
        for image in dataset.draw(number)[0]:
            if image not in seen:
                seen.add(image)
                yield image
        if len(seen) == len(dataset.images):
            return


class FeatureCache:
    """The features in predictor._features of each image: encoded at its first visit and kept from then on.

    limits: bytes to keep on the device and, when that is full, in the memory of the machine. Other images are encoded
        at each visit and converted to the same type, so that results do not depend on the memory (on a GPU, up to the
        rounding errors of encoding them in groups).
    visits: images in the order of their first visits; they are read ahead by `--workers` threads and, on a GPU, encoded
        AT_ONCE at a time.
    full_precision: keep float32, encoded without mixed precision; else float16.
    With --cache-dir, features are also kept there as files, across runs. A file's name is a hash of everything that its
    content depends on; a damaged file is written again.
    """

    def __init__(self, predictor, args, limits, visits=(), full_precision=False):
        model = predictor.model
        self.predictor, self.limits, self.folder, self.kept = predictor, limits, args.cache_dir, {}
        self.dtype, self.amp = (torch.float32, False) if full_precision else (torch.float16, args.amp)
        # C, C / 8 and C / 4 channels at the strides 16, 4 and 8: C * S**2 / 64 numbers in all
        self.bytes_per_image = self.dtype.itemsize * model.hidden_dim * model.image_size**2 // 64
        self.on_device = limits[0] // self.bytes_per_image  # images
        self.capacity = self.on_device + limits[1] // self.bytes_per_image  # with those in the machine's memory
        self.at_once = 1 if predictor.device.type == "cpu" else AT_ONCE  # 1 gives the same bits as set_image()
        self.ahead = read_ahead(self.read, itertools.islice(visits, self.capacity), args.workers, 2 * self.at_once)
        if self.folder:
            precision = autocast_dtype() if self.amp and predictor.device.type == "cuda" else None
            self.identity = hashlib.sha256(repr([model.image_size, self.dtype, predictor.device.type, precision,
                                                 OmegaConf.to_yaml(read_config(args.model_cfg)), versions()]).encode())
            for name, tensor in model.state_dict().items():
                if not TRAINED["frozen"].match(name):
                    self.identity.update(name.encode() + tensor.cpu().numpy().tobytes())

    def __call__(self, images):
        """Features of a list of N LabeledImage: {"image_embed": N x C x h x w, "high_res_feats": [2 such]}."""
        found = [self.kept.get(image.path) or self.encode_up_to(image) for image in images]
        embeddings, *others = (torch.cat([to_device(level, self.predictor.device) for level in levels]).float()
                               for levels in zip(*found))
        return {"image_embed": embeddings, "high_res_feats": others}

    def encode_up_to(self, image):
        """Features of an image that is not kept. Encodes and keeps the next images of `visits` up to it; these fit in
        memory, so when they are used up, each other image is encoded alone."""
        encoded = {}
        while image.path not in encoded:
            group = [future.result() for future in itertools.islice(self.ahead, self.at_once)]
            encoded = self.encode(group or [self.read(image)])
            for path, levels in encoded.items():
                if len(self.kept) < self.capacity:
                    place = self.predictor.device if len(self.kept) < self.on_device else "cpu"
                    self.kept[path] = [level.to(place) for level in levels]
        return encoded[image.path]

    def read(self, image):
        """(path, file of its features or None, the features in that file or None, uint8 H x W x 3 or None)."""
        entry = None
        if self.folder:
            key = self.identity.copy()
            key.update(repr(image.size).encode() + image.path.read_bytes())
            entry = Path(self.folder, f"{key.hexdigest()}.npz")
            with contextlib.suppress(Exception), np.load(entry) as stored:  # missing or damaged: many error types
                return image.path, entry, [torch.from_numpy(stored[f"arr_{number}"]) for number in range(3)], None
        return image.path, entry, None, image.read()

    @torch.no_grad()
    def encode(self, group):
        """{path: [image_embed, stride 4, stride 8]} of what read() gave: each 1 x C x h x w in self.dtype."""
        transforms, device = self.predictor._transforms.transforms, self.predictor.device
        results = {path: levels for path, _, levels, _ in group}
        if new := [(path, entry, pixels) for path, entry, levels, pixels in group if levels is None]:
            with mixed_precision(device, self.amp):
                inputs = torch.stack([transforms(torch.from_numpy(pixels).to(device).permute(2, 0, 1).contiguous()
                                                 .float() / 255) for _, _, pixels in new])
                features = encode_images(self.predictor, inputs)
            levels = [level.to(self.dtype).split(1) for level in (features["image_embed"], *features["high_res_feats"])]
            for number, (path, entry, _) in enumerate(new):
                results[path] = [level[number] for level in levels]
                if entry:
                    write_file(entry, lambda file: np.savez(file, *(each.cpu().numpy() for each in results[path])))  # noqa: B023
        return results


def to_device(tensor, device):
    """Copy a tensor to a device, without waiting on CUDA; on MPS that may read freed memory (PyTorch issue 189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def mixed_precision(device, wanted=True):
    """Autocast on CUDA, without its cache: weights cast under no_grad lose their gradients (PyTorch issue 112583)."""
    on_cuda = torch.device(device).type == "cuda"
    return torch.autocast("cuda", autocast_dtype(), enabled=wanted and on_cuda, cache_enabled=False)


def autocast_dtype():
    """bfloat16 where the GPU has it (older ones only emulate it), else float16."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# ---- prompts and loss ----


class BatchLoss(torch.nn.Module):
    """A batch's mean training_loss, plus the loss of the object score; the one module that DDP wraps."""

    def __init__(self, predictor, cache, args):
        super().__init__()
        self.predictor, self.cache, self.args = predictor, cache, args
        self.model = predictor.model  # a part of this module, so that DistributedDataParallel finds its weights

    def forward(self, batch):
        """(loss, IoU), scalars. If the data has images without any object, prompt "none" adds OBJECT_WEIGHT times the
        binary cross-entropy of the object score; such an image trains only that, and its IoU is 1 if the score is
        negative, else 0. Raises a damaged image's ImageError, which Batches returns in place of a Batch."""
        if isinstance(batch, ImageError):
            raise batch
        args, predictor = self.args, self.predictor
        with mixed_precision(predictor.device, args.amp):
            if self.cache is not None:
                features = self.cache(batch.images)
            else:
                pixels = to_device(batch.pixels, predictor.device).float() / 255
                pixels = v2.functional.normalize(pixels, predictor._transforms.mean, predictor._transforms.std)
                features = encode_images(predictor, pixels)
            objects = [gt_mask[0].numpy() for gt_mask in batch.gt_masks]
            low_res_masks, scores = simulate_prompts(predictor, features, batch.kind, objects, batch.rngs,
                                                     batch.corrections)
        examples = zip(low_res_masks.split(1), scores.split(1), batch.gt_masks)
        losses, ious = map(torch.stack, zip(*(image_loss(predictor, *each, args) for each in examples)))
        if batch.kind != "none" or not self.model.knows_absence:
            return losses.mean(), ious.mean()
        # an image without an object trains only the object score: learning empty masks lowers the IoU elsewhere
        object_scores = self.model.sam_mask_decoder.pred_obj_score_head.last.float()[:, 0]  # kept by load_weights()
        visible = torch.tensor([float(gt_mask.any()) for gt_mask in batch.gt_masks]).to(object_scores.device)
        loss = (losses * visible).mean() + OBJECT_WEIGHT * torch.nn.functional.binary_cross_entropy_with_logits(
            object_scores, visible)
        return loss, torch.where(visible > 0, ious, (object_scores < 0).float()).mean()


def prompt_kind(kind, number):
    """`kind`, or for "mixed" that of the number-th prompt: point, points and box in turn."""
    return ("point", "points", "box")[number % 3] if kind == "mixed" else kind


def simulate_prompts(predictor, features, kind, gt_masks, rngs=None, corrections=MAX_POINTS - 1):
    """Prompt for each of N objects, decode, and correct the result with further clicks where kind is "points".

    features: see predict_masks; gt_masks: the N objects, bool H x W each. rngs: a Generator for each object; None: the
    click, box and corrections of compare_models.py, without randomness.
    Returns: low-resolution logits N x 3 x h x w and predicted scores N x 3, with gradients.
    """
    sizes, rngs = [mask.shape for mask in gt_masks], rngs or [None] * len(gt_masks)
    prompts = [first_prompt(kind, mask, rng) for mask, rng in zip(gt_masks, rngs)]
    for _ in range(corrections if kind == "points" else 0):
        with torch.no_grad():
            found = best_masks(predictor, sizes, *predict_masks(predictor, features, sizes, prompts))
        clicks = map(correcting_click, found, gt_masks, rngs)
        prompts = [(np.vstack([coords, point]), np.append(labels, label))
                   for (coords, labels), (point, label) in zip(prompts, clicks)]
    return predict_masks(predictor, features, sizes, prompts)


def first_prompt(kind, mask, rng=None):
    """A box (jittered with rng) or a click on a bool H x W mask: (float32 P x 2 (x, y) in pixels, int32 P labels).

    For "none", the point with label -1 that SAM2Base._forward_sam_heads gives if there is no prompt.
    """
    if kind == "none":
        return np.zeros((1, 2), np.float32), np.array([-1], np.int32)
    if kind != "box":
        return pick_pixel(mask, rng)[None], np.ones(1, np.int32)
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    box = np.array([x, y, x + width - 1, y + height - 1], np.float32)
    if rng is not None:
        spread = BOX_JITTER * np.tile(box[2:] - box[:2], 2)
        limits = np.array([mask.shape[1], mask.shape[0]] * 2) - 1
        box = np.clip(box + np.clip(rng.normal(0, spread), -20, 20), 0, limits).astype(np.float32)
    return box.reshape(2, 2), np.array([2, 3], np.int32)  # SAM's labels of a box's corners


def pick_pixel(mask, rng=None):
    """A random true pixel of a bool H x W mask, or without rng the middle one in row-major order: float32 (x, y)."""
    pixels = np.flatnonzero(mask)
    y, x = divmod(pixels[len(pixels) // 2] if rng is None else rng.choice(pixels, 1)[0], mask.shape[1])
    return np.array([x, y], np.float32)


def correcting_click(predicted, gt_mask, rng=None):
    """One more click, on a wrong pixel: (float32 (x, y), label), 1 on the object, 0 beside it.

    predicted, gt_mask: bool H x W. With rng a random wrong pixel, as in SAM 2's training; else the one deepest in the
    largest error, as in SAM 2's evaluation. If none is wrong: a pixel of gt_mask.
    """
    wrong = gt_mask != predicted
    if rng is None and wrong.any():
        point, label = sample_one_point_from_error_center(
            *(torch.from_numpy(mask)[None, None] for mask in (gt_mask, predicted)))
        return point[0, 0].numpy(), label.item()
    x, y = point = pick_pixel(wrong if wrong.any() else gt_mask, rng)
    return point, int(gt_mask[int(y), int(x)])


def predict_masks(predictor, features, sizes, prompts):
    """Decode N prompts with gradients: what predictor.predict() does, without its no_grad.

    features: of N images, or of one image for all prompts, as in predictor._features; sizes: N (H, W) of the images;
    prompts: N (coordinates P x 2 in the image's pixels, labels P), P the same for all.
    Returns: low-resolution logits N x 3 x h x w and predicted scores N x 3.
    """
    model = predictor.model
    predictor._features, predictor._orig_hw, predictor._is_image_set = features, sizes, True
    prepared = [predictor._prep_prompts(*prompt, None, None, True, img_idx=number)
                for number, prompt in enumerate(prompts)]
    coords, labels = (torch.cat([prompt[part] for prompt in prepared]) for part in (1, 2))
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    embeddings, *others = (level.expand(len(prompts), -1, -1, -1)
                           for level in (features["image_embed"], *features["high_res_feats"]))
    return model.sam_mask_decoder(
        image_embeddings=embeddings, image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True, repeat_image=False,
        high_res_features=others)[:2]


def best_masks(predictor, sizes, low_res_masks, scores):
    """The masks with the highest score that predict_masks gave, at their N images' sizes: N arrays, bool H x W."""
    found = []
    for masks, best, size in zip(low_res_masks.split(1), scores.float().cpu().numpy().argmax(1), sizes):
        logits = predictor._transforms.postprocess_masks(masks, size)  # scaling all three gives the bits of predict()
        found.append((logits[0, best] > 0).cpu().numpy())
    return found


def image_loss(predictor, low_res_masks, scores, gt_masks, args):
    """training_loss of the K prompts on one image, at the size of gt_masks, bool tensor K x H x W."""
    count = 1 if args.supervise == "first" else 3  # masks in the loss; the others are not enlarged
    logits = predictor._transforms.postprocess_masks(low_res_masks[:, :count], gt_masks.shape[1:])
    target = to_device(gt_masks, logits.device).float()
    return training_loss(logits, scores[:, :count].float(), target, args.dice_weight)


def training_loss(logits, scores, gt_masks, dice_weight=0.0):
    """(loss, IoU), scalars: means over K prompts on one image.

    logits: K x M x H x W, M masks for each prompt at the image's size; scores: K x M predicted IoUs; gt_masks: float
    K x H x W, 0 or 1. The loss is the binary cross-entropy with 1e-5 inside the logarithms (the guide's), plus
    dice_weight times 1 - Dice of the probabilities, plus SCORE_WEIGHT times |score - IoU|: the mean of the M masks.
    The IoU is that of the mask with the highest score among the M.
    """
    prob, gt = torch.sigmoid(logits), gt_masks[:, None]
    mask_loss = (-gt * torch.log(prob + 1e-5) - (1 - gt) * torch.log(1 - prob + 1e-5)).mean((-2, -1))
    if dice_weight:
        dice = (2 * (gt * prob).sum((-2, -1)) + 1) / (gt.sum((-2, -1)) + prob.sum((-2, -1)) + 1)
        mask_loss = mask_loss + dice_weight * (1 - dice)
    predicted = (prob > 0.5).float()
    intersection = (gt * predicted).sum((-2, -1))
    iou = intersection / (gt.sum((-2, -1)) + predicted.sum((-2, -1)) - intersection + 1e-6)
    chosen_iou = iou.gather(1, scores.argmax(1, keepdim=True))
    return mask_loss.mean() + SCORE_WEIGHT * torch.abs(scores - iou).mean(), chosen_iou.mean()


# ---- the image encoder ----


def prepare_weights(model, args):
    """Add what --encoder lora and --grad-checkpointing need, and freeze all weights that --encoder does not train."""
    trunk = model.image_encoder.trunk
    if args.encoder == "lora":
        torch.manual_seed(args.seed % 2**63)
        for block in trunk.blocks:
            for layer in (block.attn.qkv, block.attn.proj, *block.mlp.layers):
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, args.lora_rank))
    if args.grad_checkpointing:  # compute what happens inside the blocks again in the backward pass
        for block in trunk.blocks:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)  # nothing is random in eval mode
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[args.encoder].match(name) is not None)


class LowRank(torch.nn.Module):
    """weight + 8 / rank * up @ down: a low-rank update, initially zero, of a linear layer's weight.

    The factor makes one learning rate suit all ranks. Source: LoRA, Hu et al., arXiv:2106.09685.
    """

    def __init__(self, weight, rank):
        super().__init__()
        self.scale = 8 / rank
        self.down = torch.nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        torch.nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, weight):
        return weight + self.scale * self.up @ self.down


def encode_images(predictor, images):
    """What predictor.set_image() computes, without its no_grad, for a normalized batch (float N x 3 x S x S)."""
    model = predictor.model
    levels = model.forward_image(images)["backbone_fpn"][-3:]
    if model.directly_add_no_mem_embed:
        levels[-1] = levels[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    return {"image_embed": levels[-1].float(), "high_res_feats": [level.float() for level in levels[:-1]]}


# ---- validation ----


MEASURES = "val_loss", "val_iou", "val_dice", "val_specificity"  # of validate()


def validate(training):
    """The loss, and what compare_models.py would measure now: "val_loss", "val_iou", "val_dice" and, without prompts,
    "val_specificity": the share of images without any object in which nothing is found. Without validation: {}."""
    share = range(training.rank, len(training.val_images), training.processes)
    results = []
    for index in tqdm(share, "검증", leave=False, disable=True if training.rank else None):
        if training.interrupted:
            break
        results += validate_image(training, index)
    own = bool(training.interrupted), results
    shares = [own] * training.processes
    if training.processes > 1:
        torch.distributed.all_gather_object(shares, own)
    if any(interrupted for interrupted, _ in shares):
        raise KeyboardInterrupt
    values = {name: [each[name] for _, part in shares for each in part if name in each]
              for name in MEASURES}
    return {name: float(np.mean(each)) for name, each in values.items() if each}


@torch.no_grad()
def validate_image(training, index):
    """The values of validate() for each object of the index-th validation image: dicts.

    Objects that are decoded together share one loss, their mean, on masks reduced to MAX_SIDE. Without prompts, the
    union of the objects counts as one; if there is none, the only value is whether nothing is found.
    """
    args, predictor, image, results = training.args, training.predictor, training.val_images[index], []
    features = training.val_cache([image])
    kind, labels, numbers = prompt_kind(args.val_prompt, index), image.labels(), image.objects
    if kind == "none":
        labels, numbers = (labels > 0).astype(np.uint16), np.ones(1, np.uint16)
    for part in in_parts(numbers, labels.shape):
        gt_masks = labels == part[:, None, None]
        low_res_masks, scores = simulate_prompts(predictor, features, kind, gt_masks)
        reduced = np.stack([reduce_mask(mask, reduced_size(mask.shape, MAX_SIDE)) for mask in gt_masks])
        loss, _ = image_loss(predictor, low_res_masks, scores, torch.from_numpy(reduced), args)
        best = best_masks(predictor, [labels.shape] * len(part), low_res_masks, scores)
        if kind == "none" and nothing_found(predictor.model):
            best[0][:] = False
        for mask, gt_mask in zip(best, gt_masks):
            results.append({"val_loss": loss.item(), "val_iou": calculate_iou(mask, gt_mask),
                            "val_dice": calculate_dice(mask, gt_mask)} if gt_mask.any() else
                           {"val_specificity": not mask.any()})
    return results


def in_parts(objects, shape):
    """Cut an array of objects into parts that one decoder call takes: their logits at (H, W) have 512 MB at most."""
    at_once = max(1, 2**27 // (3 * math.prod(shape)))
    return [objects[start:start + at_once] for start in range(0, len(objects), at_once)]


def calculate_dice(pred_mask, gt_mask):
    """Dice coefficient of two boolean masks of one shape, 0 to 1: 2|A∩B| / (|A| + |B| + 1e-6)."""
    return float(2 * np.logical_and(pred_mask, gt_mask).sum() / (pred_mask.sum() + gt_mask.sum() + 1e-6))


# ---- files ----

# attributes of Training that sam2_last.pt keeps beside the weights, the optimizer and the settings
PROGRESS = ("iteration", "rows", "mean", "best", "best_iteration", "validations_since_best", "encoded")
COLUMNS = ("iteration", "loss", "train_iou", "lr", "encoder_lr", *MEASURES, "seconds")  # of train_log.csv, if not empty


def save(training, better, unfinished=False):
    """Write sam2_last.pt (all that --resume needs), the log and, if the model is the best so far, sam2_best.pt.

    unfinished: the training ends before its last iteration, so the command line that continues it is printed.
    """
    folder, state = Path(training.args.output_dir), training.model.state_dict()
    if better:
        save_model(training, folder / "sam2_best.pt")
    save_model(training, folder / "sam2_last.pt", optimizer=training.optimizer.state_dict(),
               unmerged={name: state[name].cpu() for name in state if ".parametrizations." in name},
               scaler=training.scaler.state_dict(), **{name: getattr(training, name) for name in PROGRESS},
               seconds=time.time() - training.started, settings={name: getattr(training.args, name) for name in CONFIG},
               processes=training.processes, data=training.data)
    for write in (save_log, save_curve) if training.rows else ():
        try:
            write(training.rows, folder)
        except PermissionError as error:  # on Windows, while Excel has the file open; sam2_last.pt has the rows
            tqdm.write(f"주의: {error.filename2 or error.filename}: 쓰지 못했습니다 ({error.strerror}). "
                       "다른 프로그램에서 닫으세요", file=sys.stderr)
    if unfinished:
        processes = os.environ.get("LOCAL_WORLD_SIZE", training.processes)
        command = f"torchrun --nproc-per-node={processes}" if training.processes > 1 else "python"
        tqdm.write(f"{training.iteration}회까지 저장했습니다. 이어서 하려면: "
                   f'{command} "{sys.argv[0]}" --resume --output-dir "{folder}"')
        names = ["sam2_final.pt", "training_summary.json"] + ["sam2_best.pt"] * (not training.best_iteration)
        if earlier := [name for name in names if (folder / name).exists()]:
            tqdm.write(f"주의: 이번 학습의 결과가 아닌, 이전에 끝난 학습의 파일입니다: {', '.join(earlier)}")


def save_model(training, path, **more):
    """Save official_weights in the official form {"model": ...}, `more` beside it; fails if they are not finite."""
    weights = official_weights(training.model)
    more.update(image_size=training.model.image_size, prompt=training.args.prompt,
                knows_absence=training.model.knows_absence)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail("가중치가 유한하지 않아 저장하지 않습니다. --lr을 낮춰 보세요. 전에 저장한 모델은 그대로입니다")
    write_file(path, lambda file: torch.save({"model": weights, **more}, file))


def official_weights(model):
    """A model's weights on the CPU under their official names, with low-rank updates merged into plain weights."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            weights[f"{name}.weight"] = module.weight.detach()
    return {name: tensor.cpu() for name, tensor in weights.items()}


def load_last(output_dir):
    """The content of sam2_last.pt, as save() wrote it; fails, with the reason, if it cannot be resumed."""
    path = Path(output_dir, "sam2_last.pt")
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        complete = last.keys() >= {"optimizer", "unmerged", "scaler", "seconds", "processes", "data", *PROGRESS}
        if complete and last["settings"].keys() == CONFIG.keys():
            return last
    except FileNotFoundError:
        fail(f"이어서 할 학습이 없습니다: {path}")
    except Exception as error:  # torch.load raises many error types for a damaged file
        fail(f"{path}: 읽을 수 없습니다 ({type(error).__name__})")
    fail(f"{path}: 이 스크립트의 다른 버전이 저장한 것이라 이어서 할 수 없습니다")


def restore(training, last):
    """Continue from the content of sam2_last.pt; fails if masks, names or the number of processes differ."""
    before, now = last["data"], training.data
    changes = {"없어짐": before.keys() - now.keys(), "새로 생김": now.keys() - before.keys(),
               "바뀜": {name for name in before.keys() & now.keys() if before[name] != now[name]}}
    if named := [f"{how} {', '.join(sorted(names)[:5])}{f' 외 {len(names) - 5}개' if len(names) > 5 else ''}"
                 for how, names in changes.items() if names]:
        fail(f"학습하던 데이터와 달라 이어서 할 수 없습니다. 마스크: {'; '.join(named)}")
    if last["processes"] != training.processes:
        fail(f"프로세스 {last['processes']}개로 한 학습이라 {training.processes}개로 이어서 할 수 없습니다")
    if last["iteration"] > training.args.iterations:
        fail(f"이미 {last['iteration']}회까지 학습했습니다. --iterations를 더 크게 주세요")
    print(f"{last['iteration']}회까지 진행한 학습을 이어서 합니다.")
    rows, iterations, planned = last["rows"], training.args.iterations, last["settings"]["iterations"]
    if training.args.scheduler == "cosine" and iterations != planned:
        print(f"주의: 이제부터 학습률은 {iterations}회에 맞춘 cosine을 따릅니다.")
    is_new_end = iterations != planned and iterations % training.args.save_every
    if is_new_end and rows and rows[-1]["iteration"] == iterations and not rows[-1].keys() & set(MEASURES):
        rows.pop()  # it was logged without a validation
    # --encoder lora: load_predictor() took the merged weights for the base; restore the base and its low-rank updates
    training.model.load_state_dict(last["unmerged"], strict=False)
    for group in last["optimizer"]["param_groups"]:
        group["fused"] = training.optimizer.defaults["fused"]  # depends on the device
    training.optimizer.load_state_dict(last["optimizer"])
    if last["scaler"]:  # empty if the earlier run needed no scaler (bfloat16, or another device)
        training.scaler.load_state_dict(last["scaler"])
    for name in PROGRESS:
        setattr(training, name, last[name])
    training.started = time.time() - last["seconds"]


def save_log(rows, output_dir):
    """Write train_log.csv: the rows logged so far."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [name for name in COLUMNS if any(name in row for row in rows)])
    writer.writeheader()
    writer.writerows(rows)
    write_file(output_dir / "train_log.csv", text.getvalue().encode())


def save_curve(rows, output_dir):
    """Write training_curve.png: loss and IoU of the rows logged so far."""
    figure = Figure(figsize=(11, 4))  # not pyplot's: callers from Python keep their backend
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.13, top=0.91, wspace=0.17)
    for axes, name, train, val in ((left, "loss", "loss", "val_loss"), (right, "IoU", "train_iou", "val_iou")):
        for key, style, label in ((train, "-", "training (running mean)"), (val, "o-", "validation")):
            points = [(row["iteration"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points), style, label=label)
        axes.set(xlabel="iteration", ylabel=name)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    right.set_ylim(0, 1)
    save_figure(figure, output_dir / "training_curve.png")


def finish(training):
    """Write sam2_final.pt and training_summary.json; print how long the training took and what it reached."""
    rows, folder = training.rows, Path(training.args.output_dir)
    save_model(training, folder / "sam2_final.pt")
    seconds, start = time.time() - training.started, rows[0].get("val_iou")
    by_validation = any("val_iou" in row for row in rows)  # not if no validation image has an object
    write_json(folder / "training_summary.json", {
        "settings": {**vars(training.args), "processes": training.processes}, "device": training.device,
        "versions": versions(), "train_images": len(training.images), "train_objects": training.images.count,
        "val_images": len(training.val_images), "val_objects": training.val_images.count,
        "trained_weights": sum(map(torch.numel, training.parameters)), "encodings_per_process": training.encoded,
        "iterations": training.iteration, "start_iou": start, "best_iou": training.best,
        "best_iteration": training.best_iteration,
        "best_chosen_by": "validation IoU" if by_validation else "training IoU", "seconds": round(seconds, 1)})
    trained = [row["train_iou"] for row in rows if "train_iou" in row]
    print(f"학습 시간 {round(seconds) // 60}분 {round(seconds) % 60}초, "
          f"학습 IoU(이동 평균) {trained[0]:.1%} → {trained[-1]:.1%}, "
          f"{'검증' if by_validation else '학습'} 최고 IoU {training.best:.2%} ({training.best_iteration}회)")
    print(f"저장: {folder / 'sam2_best.pt'}, {folder / 'sam2_final.pt'}")
    if start is not None and training.best <= start:
        print(f"주의: 검증 IoU가 학습 전({start:.2%})보다 나아지지 않았습니다. sam2_best.pt보다 원본 모델이 낫습니다. "
              "--lr을 낮춰 보세요")


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
    run(main, "--workers 0이나 --cache-gb로, 새로 시작한다면 작은 --batch-size나 --image-size 512로, "
              "인코더도 학습한다면 --grad-checkpointing으로 줄이세요")

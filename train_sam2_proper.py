"""Fine-tune SAM 2.1's mask decoder and prompt encoder, and if asked its image encoder, on your own images.

    python train_sam2_proper.py                      the reference guide's loss and settings
    python train_sam2_proper.py --recipe improved    more IoU from as many training examples
    python train_sam2_proper.py --recipe strongest   most IoU: the image encoder learns too, which takes longer
    python train_sam2_proper.py --encoder lora       the guide's loss, and low-rank updates of the image encoder
    python train_sam2_proper.py --test               is everything there that a training needs?

By default the image encoder is frozen, so an image is encoded at its first visit only and its features are kept.
Training calls the model's parts through predictor._features, as sagieppel's "Fine-tune SAM2 in 60 lines"
does: predictor.predict() runs under no_grad, nothing could be learnt through it.
"""

import argparse
import atexit
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import cv2
import matplotlib
import numpy as np
import psutil
import torch
import torch.distributed
import torch.utils.checkpoint
import torchvision
from filelock import FileLock, Timeout
from pycocotools import mask as coco_mask
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

try:
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.sam2_image_predictor import SAM2ImagePredictor
except (ImportError, RuntimeError) as error:  # not installed, or hidden by a folder of that name
    sys.exit(f"오류: sam2 패키지를 불러올 수 없습니다 ({error}). "
             "설치: pip install --no-build-isolation -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

SETTINGS = [  # each is a flag: name, default, what it may be (type, (type, least value) or choices), help
    # model
    ("checkpoint", "checkpoints/sam2.1_hiera_small.pt", str, "원본 SAM 2.1 체크포인트"),
    ("model_cfg", "configs/sam2.1/sam2.1_hiera_s.yaml", str, "sam2 패키지 안의 모델 설정 이름 또는 내 YAML 파일 경로"),
    ("image_size", None, [512, 768, 1024], "모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 "
     "1024에서 학습되어 정확도가 떨어짐 (기본: 모델 설정대로)"),
    # data
    ("image_dir", "data/images/train", str, "학습 이미지 폴더"),
    ("mask_dir", "data/masks/train", str, "학습 마스크 폴더 (이미지와 이름이 같은 PNG)"),
    ("val_image_dir", "data/images/val", str, "검증 이미지 폴더"),
    ("val_mask_dir", "data/masks/val", str, "검증 마스크 폴더"),
    ("max_objects", 20, (int, 1), "이미지마다 번호가 작은 객체부터 몇 개까지 검증할지"),
    # training
    ("recipe", "reference", ["reference", "improved", "strongest"], "학습 방법: reference 원래 가이드의 손실 그대로, "
     "improved 같은 수의 예제로 IoU를 더 올리는 설정 묶음, strongest 거기에 이미지 인코더도 학습(따로 준 옵션이 우선)"),
    ("iterations", 3000, (int, 1), "총 학습 반복 횟수"),
    ("save_every", 500, (int, 1), "몇 번 반복할 때마다 검증하고 저장할지"),
    ("patience", 0, (int, 0), "검증을 몇 번 하는 동안 나아지지 않으면 일찍 끝낼지, 0이면 끝까지"),
    ("batch_size", 1, (int, 1), "한 번에 디코딩할 이미지 수 (프로세스마다)"),
    ("accumulate", 1, (int, 1), "기울기를 몇 배치 모아 한 번 학습할지: 메모리를 더 쓰지 않고 배치를 키움"),
    ("seed", 0, (int, 0), "난수 시드: 같은 값이면 같은 순서로 학습"),
    # optimizer
    ("lr", 1e-5, (float, 0), "학습률"),
    ("weight_decay", 4e-5, (float, 0), "가중치 감쇠"),
    ("scheduler", "none", ["none", "cosine", "step", "plateau"], "학습률을 바꾸는 방법: none 그대로, cosine "
     "끝에서 0까지 부드럽게, step 3분의 1이 지날 때마다 10분의 1, plateau 검증이 두 번 나아지지 않으면 절반"),
    ("warmup", 0, (int, 0), "처음 몇 번 반복하는 동안 학습률을 0 가까이에서부터 올릴지"),
    ("max_grad_norm", 0.0, (float, 0), "기울기 노름을 이 값 이하로 제한, 0이면 제한하지 않음"),
    ("amp", True, bool, "CUDA에서 혼합 정밀도를 쓸지, 다른 장치에서는 늘 꺼짐"),
    # loss
    ("dice_weight", 0.0, (float, 0), "교차 엔트로피에 더할 Dice 손실의 배수, 0이면 더하지 않음"),
    ("supervise", "first", ["first", "all", "best"], "손실에 넣을 마스크: first 첫째, all 셋 모두, best 가장 맞는 것"),
    # prompts
    ("prompt", "point", ["point", "points", "box", "mixed"], "학습할 프롬프트: point 마스크 안의 점 하나, "
     "points 거기에 틀린 곳의 점을 더함, box 조금 흔든 상자, mixed 셋을 섞음"),
    ("val_prompt", "point", ["point", "points", "box", "mixed"], "검증할 프롬프트: compare_models.py --prompt와 같음"),
    ("clicks", 1, (int, 1), "이미지마다 한 번에 디코딩할 프롬프트 수, 객체가 여럿이면 서로 다른 객체에"),
    ("max_points", 3, (int, 1), "--prompt points에서 찍을 점의 최대 수"),
    # image encoder
    ("encoder", "frozen", ["frozen", "lora", "full"], "이미지 인코더: frozen 고정하고 특징을 캐시, "
     "lora 저랭크 행렬만 학습, full 전부 학습. lora와 full은 캐시가 없어 느리고, 메모리는 "
     "--grad-checkpointing으로 줄임"),
    ("encoder_lr", None, (float, 0), "이미지 인코더의 학습률 (기본: full은 --lr과 같고 lora는 그 3배)"),
    ("lora_rank", 8, (int, 1), "--encoder lora의 랭크"),
    ("grad_checkpointing", False, bool, "인코더의 중간값을 저장하지 않고 다시 계산: 느린 대신 메모리를 덜 씀"),
    ("augment", False, bool, "학습 이미지를 뒤집고 돌리고 자르고 색을 바꿈. 캐시를 쓰지 않게 됨"),
    ("workers", 2, (int, 0), "캐시가 없을 때 이미지를 미리 읽을 프로세스 수, 0이면 미리 읽지 않음"),
    # output and system
    ("output_dir", "output", Path, "결과를 쓸 폴더"),
    ("device", "auto", str, "장치: auto, mps, cuda, cpu"),
    ("cache_gb", None, (float, 0), "--encoder frozen: 이미지 특징을 메모리에 둘 한도(GB), 0이면 끔 "
     "(기본: 남은 메모리의 절반)"),
    ("cache_dir", None, Path, "--encoder frozen: 이미지 특징을 파일로도 남겨 다음 실행에 쓸 폴더 (기본: 쓰지 않음)"),
    ("cache_dtype", "float16", ["float16", "float32"], "남겨 둘 특징의 정밀도"),
]
CONFIG = {name: default for name, default, *_ in SETTINGS}
IMPROVED = {"dice_weight": 1.0, "supervise": "all", "prompt": "mixed", "batch_size": 4, "iterations": 750,
            "save_every": 125, "lr": 3e-4, "scheduler": "cosine", "warmup": 50}
RECIPES = {  # what --recipe sets, where a flag does not say otherwise
    # the same 3000 training examples in all three; chosen by benchmarks/study_recipes.py, see the guide
    "reference": {},
    "improved": IMPROVED,
    "strongest": {**IMPROVED, "encoder": "full"},
}
ENCODER_LR = {"lora": 3, "full": 1}  # times --lr, if --encoder-lr does not say otherwise
FREE_ON_RESUME = {"resume", "test", "iterations", "patience", "output_dir", "device", "cache_gb", "cache_dir",
                  "workers", "grad_checkpointing", "tensorboard", "wandb"}  # may differ from the run before
PROGRESS = ("iteration", "rows", "mean", "best", "best_iteration", "validations_since_best", "halvings",
            "encoded")  # of a Training: what sam2_last.pt keeps beside the weights, the optimizer and the settings
MAX_SIDE = 1024        # larger images are reduced to this before training, as in the reference
MIN_FOREGROUND = 100   # pixels; objects with fewer are left out
SCORE_WEIGHT = 0.05    # of the score loss beside the mask loss
BOX_JITTER = 0.1       # standard deviation of a box's sides, as a share of its size, at most 20 px (as in SAM)
LOG_EVERY = 10         # iterations between two rows of train_log.csv
SMOOTHING = 0.98       # running mean of loss and IoU; it starts at the first value
DECODER = r"sam_prompt_encoder\.|sam_mask_decoder\."
TRAINED = {            # names of the weights that --encoder trains
    # conv_s0 and conv_s1 belong to the decoder, but run with the encoder: if its features are cached, they are fixed
    "frozen": re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)"),
    "lora": re.compile(rf"{DECODER}|image_encoder\..*\.parametrizations\.weight\.0\."),
    "full": re.compile(rf"{DECODER}|image_encoder\."),
}


def main():
    """Train as the command line says; returns the finished Training, for whoever calls this from Python."""
    args = parse_args()
    if args.test:
        sys.exit(not system_check(args))
    rank, processes, device = join_processes(args.device)
    if rank == 0:
        lock(args.output_dir / ".lock")
        for leftover in args.output_dir.glob("*.[0-9]*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        if not args.resume and (args.output_dir / "sam2_last.pt").exists():
            print(f"주의: 처음 저장할 때 {args.output_dir}의 이전 학습을 덮어씁니다. 이어서 하려면 --resume")
    trackers = [] if rank else open_trackers(args)
    training = Training(args, device, rank, processes)
    print_setup(training, device)
    if args.resume:
        training.load(args.output_dir / "sam2_last.pt")
        print(f"{training.iteration}회까지 진행한 학습을 이어서 합니다.")
    with contextlib.closing(training):
        train(training, trackers)

    if rank == 0:
        finish(training, device)
    if processes > 1:
        torch.distributed.destroy_process_group()
    return training


def parse_args():
    parser = argparse.ArgumentParser(
        description="SAM 2.1의 마스크 디코더와 프롬프트 인코더(원하면 이미지 인코더까지)를 내 데이터로 파인튜닝합니다.")
    for name, default, kind, text in SETTINGS:
        options = {"default": default, "help": text + ("" if default is None else f" (기본: {default})")}
        if kind is bool:
            options.update(action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, list):
            options.update(choices=kind, type=type(kind[0]))
        else:
            options.update(type=kind[0] if isinstance(kind, tuple) else kind)
        parser.add_argument("--" + name.replace("_", "-"), **options)
    parser.add_argument("--resume", action="store_true", help="중단된 학습을 결과 폴더의 sam2_last.pt에서 이어서 하기")
    parser.add_argument("--test", action="store_true", help="학습하지 않고, 필요한 것이 다 있는지 검사하기")
    parser.add_argument("--tensorboard", action="store_true", help="결과 폴더의 tensorboard/에 TensorBoard 로그도 쓰기")
    parser.add_argument("--wandb", metavar="PROJECT", help="Weights & Biases의 이 프로젝트에도 기록")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    for name, _, kind, _ in SETTINGS:
        value = getattr(args, name)
        if isinstance(kind, tuple) and value is not None and not kind[1] <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: {kind[1]} 이상이어야 합니다")
    if args.encoder == "frozen" and (args.encoder_lr is not None or args.grad_checkpointing):
        parser.error("--encoder-lr와 --grad-checkpointing은 --encoder lora나 full과 함께 쓰는 옵션입니다")
    if args.encoder != "frozen" and (args.cache_gb or args.cache_dir):
        parser.error("--cache-gb와 --cache-dir은 --encoder frozen과 함께 쓰는 옵션입니다")
    if args.encoder != "frozen" and args.encoder_lr is None:
        args.encoder_lr = args.lr * ENCODER_LR[args.encoder]
    return args


def system_check(args):
    """--test: try all that a training needs, one line each. Returns whether all of it is there."""
    def memory():
        free = free_memory() / 1e9
        if free < 2:
            fail(f"{free:.1f} GB 남음. 2 GB는 있어야 합니다: 다른 프로그램을 닫아 보세요")
        device = detect_device(args.device)
        on_gpu = f", GPU {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB 남음" if device.startswith("cuda") else ""
        return f"{free:.1f} GB 남음{on_gpu}"

    def checkpoint():
        model = load_predictor(args.model_cfg, args.checkpoint, "cpu", args.image_size).model
        return f"{args.checkpoint}, 가중치 {count_weights(model.parameters()):,}개"

    def output():
        write_file(args.output_dir / "check.tmp", b"")
        (args.output_dir / "check.tmp").unlink()
        return str(args.output_dir)

    def iteration():
        training, started = Training(args, join_processes(args.device)[2]), time.time()
        with contextlib.closing(training):
            training.step(1)
        return f"loss {training.mean[0]:.4f}, {time.time() - started:.1f}초 (이미지를 처음 인코딩하는 시간 포함)"

    passed = True
    for name, check in (("장치", lambda: detect_device(args.device)), ("메모리", memory),
                        ("버전", lambda: ", ".join(" ".join(pair) for pair in versions().items())),
                        ("체크포인트", checkpoint), ("데이터", lambda: describe_data(*load_masks(args))),
                        ("결과 폴더", output), ("학습 1회", iteration)):
        try:
            print(f"✓ {name}: {check()}", flush=True)
        except (SystemExit, OSError, RuntimeError) as error:
            print(f"✗ {name}: {str(error).removeprefix('오류: ')}", flush=True)
            passed = False
    return passed


def versions():
    """The versions of Python and of the packages that a result depends on."""
    try:
        sam2 = importlib.metadata.version("sam2")
    except importlib.metadata.PackageNotFoundError:  # installed from a checkout of Meta's, under another name
        sam2 = "?"
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "sam2": sam2, "numpy": np.__version__, "opencv-python": cv2.__version__}


def free_memory():
    """Bytes of memory that are free: of the machine, or of the container (cgroup 2) if that has a lower limit."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(statistics["inactive_file"])  # files that were read; their memory is given back when needed
        free = max(0, min(free, limit - used))
    return free


def join_processes(requested):
    """(rank, number of processes, device): 0, 1 and the device, or as torchrun says. Only rank 0 prints."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = detect_device(requested)
    if processes > 1 and device not in ("cuda", "cpu"):
        fail(f"torchrun에서는 쓸 수 없는 장치입니다: {device}. --device cuda나 cpu로 실행하세요")
    if processes > 1 and device == "cuda":
        device = detect_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # torch.cuda.is_bf16_supported() is about the GPU that is set
    if processes > 1:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: PTH123, SIM115  (stays open to the end)
    return rank, processes, device


def lock(path):
    """Hold the lock file `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a folder that cannot be written is an error; what fails from here on is the locking itself
    file_lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a run that is killed
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")
    except OSError as error:  # Lustre without flock, SMB, NFS without lockd
        print(f"주의: 이 파일 시스템은 파일을 잠그지 못합니다 ({path}: {error.strerror}). "
              "같은 폴더에서 두 번 실행하지 마세요", file=sys.stderr)
    atexit.register(file_lock.release)  # and keeps the object, which else would let go at once


def open_trackers(args):
    """Functions that take (iteration, values by name), for --tensorboard and --wandb; fail if not installed."""
    trackers = []
    if args.tensorboard:
        writer = import_or_fail("torch.utils.tensorboard", "tensorboard").SummaryWriter(args.output_dir / "tensorboard")

        def track(iteration, values):
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            writer.flush()
        trackers.append(track)
    if args.wandb:
        tracked = import_or_fail("wandb", "wandb").init(project=args.wandb, dir=args.output_dir, config=vars(args))
        trackers.append(lambda iteration, values: tracked.log(values, step=iteration))
    return trackers


def import_or_fail(module, package):
    """Import a module that one flag alone needs, --tensorboard or --wandb; package: what to install for it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fail(f"--{package}에는 {package} 패키지가 필요합니다 ({error}): pip install {package}")


class Training:
    """All that a run consists of: made from the settings, saved to and loaded from sam2_last.pt."""

    def __init__(self, args, device, rank=0, processes=1):
        self.args, self.rank, self.processes = args, rank, processes
        self.predictor = load_predictor(args.model_cfg, args.checkpoint, device, args.image_size)
        self.model = self.predictor.model
        self.masks, self.val_masks = load_masks(args)
        self.settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        self.settings["processes"] = processes
        self.cache, self.val_cache = make_caches(self.predictor, math.ceil(len(self.val_masks) / processes), args)

        if args.encoder == "lora":
            add_low_rank_updates(self.model.image_encoder.trunk, args.lora_rank, args.seed)
        if args.grad_checkpointing:
            checkpoint_blocks(self.model.image_encoder.trunk)
        freeze_all_but(self.model, TRAINED[args.encoder])
        self.model.sam_mask_decoder.train()
        self.model.sam_prompt_encoder.train()
        self.batch_loss = BatchLoss(self.predictor, self.masks, self.cache, args)
        if processes > 1:  # unused: what belongs to the masks that are not in the loss
            self.batch_loss = DistributedDataParallel(self.batch_loss, find_unused_parameters=True)
        self.optimizer = make_optimizer(self.model, args)
        half = torch.device(device).type == "cuda" and args.amp and autocast_dtype() == torch.float16
        self.scaler = torch.amp.GradScaler("cuda", enabled=half)
        self.encoded = 0  # images, by this process
        self.model.image_encoder.register_forward_hook(self.count_encoded)
        self.started = time.time()
        self.iteration, self.rows, self.mean = 0, [], None
        self.best, self.best_iteration, self.validations_since_best, self.halvings = -1.0, 0, 0, 0

    def count_encoded(self, _encoder, inputs, _outputs):
        self.encoded += len(inputs[0])

    @property
    def parameters(self):
        """The weights that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @functools.cached_property
    def batches(self):
        """The batches of Examples from the next iteration on, read ahead by --workers if nothing is cached.

        See draw_iteration; each process takes its share of an iteration's examples, cut into batches.
        """
        args, rank, processes, images = self.args, self.rank, self.processes, len(self.masks)
        count = args.batch_size * args.accumulate * processes
        shares = (draw_iteration(args, iteration, count, images)[rank::processes]
                  for iteration in range(self.iteration + 1, args.iterations + 1))
        batches = (share[start:start + args.batch_size] for share in shares
                   for start in range(0, len(share), args.batch_size))
        is_cached = self.cache is not None
        dataset = Examples(self.masks, args.clicks, None if is_cached else self.model.image_size, args.augment)
        return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=list, worker_init_fn=ignore_interrupts,
                               num_workers=0 if is_cached else args.workers))

    def close(self):
        """End the processes that read ahead: they ignore signals, so that Python would wait for them at its end."""
        self.__dict__.pop("batches", None)

    def step(self, iteration, interrupted=()):
        """One step of the optimizer. Returns whether any process was interrupted: its `interrupted` is not empty."""
        args = self.args
        total = torch.zeros(3)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(args, iteration, self.halvings)
        for number in range(1, args.accumulate + 1):
            examples = next(self.batches)
            synchronize = number == args.accumulate or self.processes == 1
            with contextlib.nullcontext() if synchronize else self.batch_loss.no_sync():
                loss, iou = self.batch_loss(examples)
                values = [loss.item(), iou.item(), 0]
                if not math.isfinite(values[0]):
                    names = ", ".join(self.masks.paths[example.index].name for example in examples)
                    fail(f"손실이 유한하지 않습니다 ({iteration}회, 이미지 {names}). --lr을 낮춰 보세요. "
                         "이번 반복은 적용하지 않았고, 전에 저장한 모델은 그대로입니다")
                self.scaler.scale(loss / args.accumulate).backward()
            total += torch.tensor(values) / args.accumulate
        if args.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # their memory is free while the model is validated and saved
        total[2] = bool(interrupted)
        if self.processes > 1:
            total = total.to(self.predictor.device)
            torch.distributed.all_reduce(total)
            total = total.cpu() / self.processes
        now = total[:2].tolist()
        self.mean = now if self.mean is None else [SMOOTHING * old + (1 - SMOOTHING) * new
                                                   for old, new in zip(self.mean, now)]
        self.iteration = iteration
        return bool(total[2])

    def log(self):
        """Add a row with the running means and the learning rates to the log."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rows.append({"iteration": self.iteration, "loss": self.mean[0], "train_iou": self.mean[1],
                          **dict(zip(("lr", "encoder_lr"), rates)), "seconds": round(time.time() - self.started, 1)})

    def validate(self):
        """Add what compare_models.py would measure now, and the loss, to the log's last row.

        Returns whether the model is the best so far: by its IoU or, without validation images, by the
        running mean of the training IoU.
        """
        results = []  # with several processes each takes its share of the images
        for index in tqdm(range(self.rank, len(self.val_masks), self.processes), "검증", leave=False,
                          disable=True if self.rank else None):
            results += self.validate_image(index)
        if self.processes > 1:
            shares = [None] * self.processes
            torch.distributed.all_gather_object(shares, results)
            results = sum(shares, [])
        if results:
            means = (float(np.mean(values)) for values in zip(*results))
            self.rows[-1].update(zip(("val_loss", "val_iou", "val_dice"), means))
        iou = self.rows[-1].get("val_iou", self.mean[1])
        if iou > self.best:
            self.best, self.best_iteration, self.validations_since_best = iou, self.iteration, 0
            return True
        self.validations_since_best += 1
        if self.validations_since_best % 2 == 0:
            self.halvings += 1
        return False

    def validate_image(self, index):
        """(loss, IoU, Dice) of each object of the index-th validation image."""
        args, size, results = self.args, self.val_masks.sizes[index], []
        self.predictor._features = self.val_cache([(self.val_masks.paths[index], size)])
        self.predictor._orig_hw, self.predictor._is_image_set = [size], True
        for gt_masks in in_parts(self.val_masks.decode(index)):
            logits, scores, _ = predict_prompted(self.predictor, prompt_kind(args.val_prompt, index), gt_masks)
            loss, _ = training_loss(torch.from_numpy(logits), torch.from_numpy(scores),
                                    torch.from_numpy(gt_masks).float(), args.dice_weight, args.supervise)
            best = logits[np.arange(len(logits)), scores.argmax(1)] > 0
            results += [(loss.item(), calculate_iou(mask, gt_mask), calculate_dice(mask, gt_mask))
                        for mask, gt_mask in zip(best, gt_masks)]
        return results

    def save(self, better):
        """Write sam2_last.pt (all that --resume needs), the log and, if the model is the best so far, sam2_best.pt."""
        folder, state = self.args.output_dir, self.model.state_dict()
        if better:
            save_model(self.model, folder / "sam2_best.pt")
        save_model(self.model, folder / "sam2_last.pt", optimizer=self.optimizer.state_dict(),
                   low_rank={name: state[name].cpu() for name in state if ".parametrizations." in name},
                   scaler=self.scaler.state_dict(), **{name: getattr(self, name) for name in PROGRESS},
                   seconds=time.time() - self.started, settings=self.settings,
                   masks=hash_of_masks(self.masks, self.val_masks))
        for write in (save_log, save_curve):
            try:
                write(self.rows, folder)
            except PermissionError as error:  # on Windows, of a file that Excel has open; sam2_last.pt has the rows
                tqdm.write(f"주의: {error.filename2 or error.filename}: 쓰지 못했습니다 ({error.strerror}). "
                           "다른 프로그램에서 닫으세요", file=sys.stderr)

    def load(self, path):
        """Load what save() wrote; fail, with the reason, if it belongs to another training."""
        try:
            last = torch.load(path, map_location="cpu", weights_only=True)
            before, masks = dict(last["settings"]), last["masks"]
            progress = {name: last[name] for name in PROGRESS}
        except FileNotFoundError:
            fail(f"이어서 할 학습이 없습니다: {path}")
        except (KeyError, ValueError, TypeError):
            fail(f"{path}: 이 스크립트의 다른 버전이 저장한 것이라 이어서 할 수 없습니다")
        except Exception as error:  # torch.load raises a dozen kinds for a damaged file
            fail(f"{path}: 읽을 수 없습니다 ({type(error).__name__})")
        fixed = {"iterations"} if self.args.scheduler in ("cosine", "step") else set()  # their length is the run's
        changed = [f"{name} {before.get(name)} → {value}" for name, value in self.settings.items()
                   if name not in FREE_ON_RESUME - fixed and before.get(name) != value]
        if changed:
            fail(f"{path}: 설정이 다른 학습이라 이어서 할 수 없습니다: {', '.join(changed)}")
        if masks != hash_of_masks(self.masks, self.val_masks):
            fail(f"{path}: 다른 데이터로 한 학습이라 이어서 할 수 없습니다: 학습이나 검증의 마스크가 바뀌었습니다")
        weights = {**last["model"], **last["low_rank"]}
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        for group in last["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # a matter of the device
        self.optimizer.load_state_dict(last["optimizer"])
        if last["scaler"]:  # empty if the run before needed none: bfloat16, or another device
            self.scaler.load_state_dict(last["scaler"])
        for name in PROGRESS:
            setattr(self, name, progress[name])
        self.started = time.time() - last["seconds"]


def load_masks(args):
    """The training masks and the validation masks (none, if there is no folder of validation images)."""
    masks = Masks(find_pairs(args.image_dir, args.mask_dir), MAX_SIDE, MIN_FOREGROUND)
    if not masks:
        fail(f"학습할 쌍이 없습니다: {args.image_dir}, {args.mask_dir}. 확인: python prepare_data.py --check")
    val_pairs = find_pairs(args.val_image_dir, args.val_mask_dir) if Path(args.val_image_dir).is_dir() else []
    return masks, Masks(val_pairs, math.inf, 1, args.max_objects)


class Masks:
    """The objects of a folder's masks, decoded once and kept as run lengths (COCO's RLE).

    Larger masks are reduced to max_side. Objects with fewer than min_foreground pixels are left out, and counted in
    `left_out` (an empty mask as one); so are, without counting, all but the first max_objects of an image. `paths` are
    the images that have an object, `sizes` their (H, W), `count` is the number of objects.
    """

    def __init__(self, pairs, max_side, min_foreground, max_objects=None):
        self.paths, self.objects, self.sizes, self.left_out, self.count = [], [], [], 0, 0
        for image_path, mask_path in tqdm(pairs, "마스크 읽기", disable=None, leave=False):
            labels = reduce_to(read_mask(mask_path), max_side, cv2.INTER_NEAREST)
            pixels = np.bincount(labels.ravel())
            pixels[0] = 0  # the background
            numbers = np.flatnonzero(pixels >= min_foreground)
            self.left_out += max(np.count_nonzero(pixels), 1) - len(numbers)
            if len(numbers):
                self.paths.append(image_path)
                columns = np.asfortranarray(labels)  # the order of RLE
                self.objects.append([coco_mask.encode((columns == number).view(np.uint8))
                                     for number in numbers[:max_objects].astype(np.uint16)])
                self.sizes.append(labels.shape)
                self.count += len(self.objects[-1])

    def __len__(self):
        return len(self.paths)

    def decode(self, index, chosen=None):
        """Masks of the chosen objects (all, by default) of the index-th image: bool N x H x W."""
        objects = self.objects[index]
        masks = coco_mask.decode(objects if chosen is None else [objects[number] for number in chosen])
        return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


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


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(array, size, interpolation=interpolation)


def make_caches(predictor, val_images, args):
    """Caches of the features of training and of val_images validation images: (FeatureCache or None, FeatureCache).

    None if training images are encoded at every visit: by an encoder that learns, or augmented. Validation images
    get their memory first: all of them are needed at every validation. They are encoded in full precision, as
    compare_models.py does it, so that its numbers are the same.
    """
    available = free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit = available if args.cache_gb is None else int(min(available, args.cache_gb * 1e9))
    folder = args.cache_dir
    if args.encoder != "frozen":  # features change with every iteration
        limit, folder = 0, None
    val_cache = FeatureCache(predictor, limit, torch.float32, False, folder, args.model_cfg)
    if args.encoder != "frozen" or args.augment:
        return None, val_cache
    val_cache.limit = min(limit, val_images * val_cache.bytes_per_image)
    dtype = torch.float32 if args.cache_gb == 0 and not folder else getattr(torch, args.cache_dtype)
    return FeatureCache(predictor, limit - val_cache.limit, dtype, args.amp, folder, args.model_cfg), val_cache


class FeatureCache:
    """What predictor._features holds for each image, encoded at the first visit and kept from then on.

    limit: bytes to keep in memory. What no longer fits is encoded again at each visit, and rounded to
        `dtype` all the same, so that a result does not depend on what happened to fit.
    amp: encode in mixed precision where the device has it.
    folder: if given, features are also kept there as files, across runs. A file's name is a hash of all
        that its content depends on; a damaged file is made anew.
    """

    def __init__(self, predictor, limit, dtype=torch.float16, amp=True, folder=None, model_cfg=None):
        self.predictor, self.limit, self.dtype, self.amp, self.folder = predictor, limit, dtype, amp, folder
        self.kept = {}
        model = predictor.model  # has all, an eighth and a quarter of its channels at the strides 16, 4 and 8
        self.bytes_per_image = dtype.itemsize * model.hidden_dim * model.image_size**2 // 64
        if folder:
            self.identity = self.hash_of_the_encoder(model_cfg)

    def hash_of_the_encoder(self, model_cfg):
        """A hash of everything that features depend on but the image: config, frozen weights, precision, versions."""
        autocast = autocast_dtype() if self.amp and self.predictor.device.type == "cuda" else None
        settings = [self.predictor.model.image_size, self.dtype, self.predictor.device.type, autocast,
                    OmegaConf.to_yaml(read_config(model_cfg)), versions()]
        digest = hashlib.sha256(repr(settings).encode())
        for name, tensor in self.predictor.model.state_dict().items():
            if not TRAINED["frozen"].match(name):
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.digest()

    def images_that_fit(self, count, processes=1):
        """How many of `count` images can be kept in memory; processes: that share the images, each with a cache."""
        return min(count, processes * (self.limit // self.bytes_per_image))

    def __call__(self, images):
        """Features of a batch on the model's device: {"image_embed": N x C x h x w, "high_res_feats": [2 such]}.

        images: list of (path, (H, W) of its mask). A larger image is reduced to its mask's size before it
        is encoded; ImageError if its proportions are others.
        """
        batch = [torch.cat(levels) for levels in zip(*(self.levels(path, size) for path, size in images))]
        batch = [level.to(self.predictor.device).float() for level in batch]
        return {"image_embed": batch[0], "high_res_feats": batch[1:]}

    def levels(self, path, size):
        """Features of one image: [image_embed, stride 4, stride 8], each 1 x C x h x w in self.dtype."""
        if path in self.kept:
            return self.kept[path]
        levels = self.read_or_encode(path, size) if self.folder else self.encode(path, size)
        if (len(self.kept) + 1) * self.bytes_per_image <= self.limit:
            self.kept[path] = levels
        return levels

    def encode(self, path, size):
        with mixed_precision(self.predictor.device, self.amp):
            self.predictor.set_image(read_reduced(path, size))
        levels = [self.predictor._features["image_embed"], *self.predictor._features["high_res_feats"]]
        return [level.to(self.dtype).cpu() for level in levels]

    def read_or_encode(self, path, size):
        key = hashlib.sha256(self.identity + repr(size).encode() + path.read_bytes()).hexdigest()
        entry = self.folder / f"{key}.npz"
        with contextlib.suppress(Exception):  # not there, or damaged: that raises half a dozen kinds
            with np.load(io.BytesIO(entry.read_bytes())) as stored:
                if stored.zip.testzip() is None:  # no checksum is wrong
                    return [torch.from_numpy(stored[f"arr_{number}"]) for number in range(3)]
        levels = self.encode(path, size)
        buffer = io.BytesIO()
        np.savez(buffer, *(level.numpy() for level in levels))
        write_file(entry, buffer.getbuffer())
        return levels


def read_reduced(path, size):
    """Read an image and reduce it to its mask's (H, W); ImageError if its proportions are others."""
    image = reduce_to(read_image(path), max(size), cv2.INTER_AREA)
    if image.shape[:2] != size:
        raise ImageError(f"{path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")
    return image


def mixed_precision(device, wanted=True):
    """Autocast on CUDA; does nothing on MPS and CPU.

    Weights that were cast under no_grad must not be used again with gradients (PyTorch issue 112583): no cache.
    """
    on_cuda = wanted and torch.device(device).type == "cuda"
    return torch.autocast("cuda", autocast_dtype() if on_cuda else torch.float16, enabled=on_cuda, cache_enabled=False)


def autocast_dtype():
    """bfloat16 where the GPU has it (older ones only emulate it), else float16."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class LowRank(torch.nn.Module):
    """weight + 8 / rank * up @ down: a low-rank update, at first zero, of a linear layer's weight.

    The factor lets one learning rate serve all ranks. Source: LoRA, Hu et al., arXiv:2106.09685.
    """

    def __init__(self, weight, rank):
        super().__init__()
        self.scale = 8 / rank
        self.down = torch.nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        torch.nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, weight):
        return weight + self.scale * self.up @ self.down


def add_low_rank_updates(trunk, rank, seed):
    """Give the attention and MLP weights of all blocks a low-rank update."""
    torch.manual_seed(seed % 2**63)
    for block in trunk.blocks:
        for layer in (block.attn.qkv, block.attn.proj, *block.mlp.layers):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def checkpoint_blocks(trunk):
    """Compute what happens inside the trunk's blocks again in the backward pass instead of keeping it."""
    for block in trunk.blocks:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)  # nothing is random: the encoder is in eval mode


def freeze_all_but(model, names):
    """Train the weights whose names match, freeze the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names.match(name) is not None)


class Example(NamedTuple):
    """One image of a batch: how its objects are prompted and, once it is read, what the loss is computed from."""

    index: int                          # in Masks
    rng: np.random.Generator            # what is random about its view and its prompts
    kind: str                           # of the prompts: point, points or box; the same in a batch
    further_clicks: int                 # one after the other on what the model got wrong; the same in a batch
    image: torch.Tensor | None = None   # uint8 3 x S x S; None if its features are cached
    gt_masks: np.ndarray | None = None  # bool K x H x W, one for each prompt


class Examples(Dataset):
    """Reads Examples; `clicks` prompts each, on different objects where there are enough.

    image_size: read and resize images to this; None if their features are cached.
    """

    def __init__(self, masks, clicks, image_size=None, augment=False):
        self.masks, self.clicks, self.image_size, self.augment = masks, clicks, image_size, augment

    def __getitem__(self, example):
        """The Example with its masks and image, or an ImageError: raised in a worker, it would be many lines."""
        index, rng, image = example.index, example.rng, None
        gt_masks = self.masks.decode(index, np.resize(rng.permutation(len(self.masks.objects[index])), self.clicks))
        if self.image_size is not None:
            try:
                image = read_reduced(self.masks.paths[index], self.masks.sizes[index])
            except ImageError as error:
                return error
            image = torch.from_numpy(image).permute(2, 0, 1)
            if self.augment:
                image, gt_masks = augment_example(rng, image, gt_masks)
            image = v2.functional.resize(image, [self.image_size] * 2)
        return example._replace(image=image, gt_masks=gt_masks)


def augment_example(rng, image, gt_masks):
    """Flip, crop, scale, recolour and turn an image (uint8 3 x H x W) and its masks (bool K x H x W) alike.

    A view with fewer than MIN_FOREGROUND pixels of an object is drawn again, five times at most; then nothing is
    changed.
    """
    height, width = image.shape[1:]
    transform = v2.Compose([
        v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
        v2.RandomResizedCrop((height, width), scale=(0.5, 1), ratio=(3 / 4 * width / height, 4 / 3 * width / height)),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),  # hue would take four times as long as these
        v2.RandomChoice([v2.Identity(), v2.RandomRotation((90, 90), expand=True)])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        for _ in range(5):
            picture, masks = transform(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(gt_masks)))
            if (masks.numpy().sum((1, 2)) >= MIN_FOREGROUND).all():
                return picture.as_subclass(torch.Tensor), masks.numpy()
    return image, gt_masks


def draw_iteration(args, iteration, count, images):
    """The `count` Examples, not read yet, that an iteration trains on, out of so many images.

    All of it follows from the seed and the iteration: so it is the same however many processes share the
    batch, it can be read ahead, and a resumed training needs no saved random state.
    """
    rng = np.random.default_rng([args.seed, iteration])
    indices = rng.integers(images, size=count)
    kind = prompt_kind(args.prompt, rng.integers(3))
    further_clicks = int(rng.integers(args.max_points)) if kind == "points" else 0
    return [Example(index, np.random.default_rng([args.seed, iteration, place]), kind, further_clicks)
            for place, index in enumerate(indices, start=1)]


def prompt_kind(kind, number):
    """The kind of the number-th prompt: with "mixed", point, points and box in turn."""
    return ("point", "points", "box")[number % 3] if kind == "mixed" else kind


class BatchLoss(torch.nn.Module):
    """The mean training_loss of some images, as the one module that DistributedDataParallel wraps."""

    def __init__(self, predictor, masks, cache, args):
        super().__init__()
        self.predictor, self.masks, self.cache, self.args = predictor, masks, cache, args
        self.model = predictor.model  # a part of this module, so that its weights are found

    def forward(self, examples):
        """(loss, IoU), scalars, for random prompts on each example's objects."""
        for example in examples:
            if isinstance(example, ImageError):
                raise example
        args, predictor = self.args, self.predictor
        sizes = [example.gt_masks.shape[1:] for example in examples]
        prompts = [random_prompts(example.rng, example.kind, example.gt_masks) for example in examples]
        enlarge = predictor._transforms.postprocess_masks
        with mixed_precision(predictor.device, args.amp):
            features = self.features(examples)
            for _ in range(examples[0].further_clicks):
                with torch.no_grad():
                    low_res_masks, scores = predict_masks(predictor, features, sizes, prompts)
                best = low_res_masks[range(len(scores)), scores.argmax(1)][:, None]
                predicted = [(enlarge(masks, size)[:, 0] > 0).cpu().numpy()
                             for masks, size in zip(best.split(args.clicks), sizes)]
                prompts = [with_clicks_on_errors(example.rng, earlier, masks, example.gt_masks)
                           for example, earlier, masks in zip(examples, prompts, predicted)]
            low_res_masks, scores = predict_masks(predictor, features, sizes, prompts)
        if args.supervise == "first":  # masks that are not in the loss are not enlarged
            low_res_masks = low_res_masks[:, :1]
        results = []
        for example, own_masks, own_scores in zip(examples, low_res_masks.split(args.clicks),
                                                  scores.float().split(args.clicks)):
            logits = enlarge(own_masks, example.gt_masks.shape[1:])
            target = torch.from_numpy(example.gt_masks).to(logits.device).float()
            results.append(torch.stack(training_loss(logits, own_scores, target, args.dice_weight, args.supervise)))
        return torch.stack(results).mean(0).unbind()

    def features(self, examples):
        """What predictor._features holds, for a batch: from the cache, or encoded now."""
        if self.cache is not None:
            return self.cache([(self.masks.paths[example.index], self.masks.sizes[example.index])
                               for example in examples])
        images = torch.stack([example.image for example in examples])
        with torch.set_grad_enabled(self.args.encoder != "frozen"):
            return encode_images(self.predictor, images)


def encode_images(predictor, images):
    """What predictor.set_image() computes, without its no_grad, for a batch (uint8 N x 3 x S x S)."""
    model, transforms = predictor.model, predictor._transforms
    images = v2.functional.normalize(images.to(predictor.device).float() / 255, transforms.mean, transforms.std)
    levels = model.forward_image(images)["backbone_fpn"][-3:]
    if model.directly_add_no_mem_embed:
        levels[-1] = levels[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    return {"image_embed": levels[-1].float(), "high_res_feats": [level.float() for level in levels[:-1]]}


def random_prompts(rng, kind, gt_masks):
    """A random prompt for each of the masks (bool K x H x W): (coordinates K x P x 2 in pixels, labels K x P).

    kind: "box", a mask's box with jittered sides (the corners' labels are 2 and 3, as SAM has them), else a
        random click on it.
    """
    if kind != "box":
        return np.stack([random_pixel(rng, gt_mask) for gt_mask in gt_masks]), np.ones((len(gt_masks), 1))
    height, width = gt_masks.shape[1:]
    boxes = np.stack([mask_box(gt_mask) for gt_mask in gt_masks])
    spread = BOX_JITTER * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + np.clip(rng.normal(0, spread), -20, 20)
    boxes = np.clip(boxes, 0, [width - 1, height - 1, width - 1, height - 1])
    return boxes.reshape(-1, 2, 2).astype(np.float32), np.tile([2.0, 3.0], (len(gt_masks), 1))


def random_pixel(rng, mask):
    """A random true pixel of a bool H x W mask: float32 1 x 2, (x, y) in pixels."""
    y, x = np.divmod(rng.choice(np.flatnonzero(mask), 1), mask.shape[1])
    return np.stack([x, y], 1).astype(np.float32)


def mask_box(mask):
    """The tight box around the mask's foreground: float32 (x1, y1, x2, y2) in pixels, both ends inside."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], np.float32)


def with_clicks_on_errors(rng, prompts, predicted, gt_masks):
    """`prompts` with one more click each, on a random wrong pixel: label 1 if it was missed, 0 if too much.

    prompts: (K x P x 2, K x P); predicted, gt_masks: bool K x H x W. Source: SAM 2's training.
    """
    coords, labels = prompts
    errors = [mask != gt_mask for mask, gt_mask in zip(predicted, gt_masks)]
    added = np.stack([random_pixel(rng, error if error.any() else gt_mask)
                      for error, gt_mask in zip(errors, gt_masks)])
    x, y = added[:, 0].astype(int).T
    return np.concatenate([coords, added], 1), np.concatenate([labels, gt_masks[range(len(y)), y, x][:, None]], 1)


def predict_masks(predictor, features, sizes, prompts):
    """Decode prompts with gradients: what predictor.predict() does, without its no_grad.

    features: of N images, as in predictor._features; sizes: their N (H, W); prompts: for each image
    (coordinates K x P x 2 in its pixels, labels K x P), as random_prompts makes them.
    Returns: low-resolution logits N*K x 3 x h x w and predicted scores N*K x 3.
    """
    model = predictor.model
    predictor._features, predictor._orig_hw, predictor._is_image_set = features, sizes, True
    prepared = [predictor._prep_prompts(coords, labels, None, None, True, img_idx=number)
                for number, (coords, labels) in enumerate(prompts)]
    coords, labels = (torch.cat([prompt[part] for prompt in prepared]) for part in (1, 2))
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)

    def for_each_prompt(level):
        return level[:, None].expand(-1, len(coords) // len(sizes), -1, -1, -1).flatten(0, 1)

    low_res_masks, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=for_each_prompt(features["image_embed"]),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=False,
        high_res_features=[for_each_prompt(level) for level in features["high_res_feats"]],
    )
    return low_res_masks, scores


def training_loss(logits, scores, gt_masks, dice_weight=0.0, supervise="first"):
    """The loss of the guide ("reference"), or more of it, for the prompts on one image.

    logits: K x 3 x H x W, at the image's size; scores: K x 3 IoUs that the model predicts; with "first",
    only the first mask is looked at, and the others may be left out. gt_masks: float K x H x W, 0 or 1.
    Returns: (loss, IoU), scalars, means over K. The loss is the binary cross-entropy with 1e-5 inside the
    logarithms, plus dice_weight times 1 - Dice (of probabilities), plus SCORE_WEIGHT times the distance
    between the predicted IoU and the real one: of the first mask, of "all" three on average, or of the
    mask that fits "best" (the scores of all three, as in SAM 2's training). The IoU is that of the mask
    with the highest score among those in the loss.
    """
    if supervise == "first":
        logits, scores = logits[:, :1], scores[:, :1]
    prob, gt = torch.sigmoid(logits), gt_masks[:, None]
    mask_loss = (-gt * torch.log(prob + 1e-5) - (1 - gt) * torch.log(1 - prob + 1e-5)).mean((-2, -1))
    if dice_weight:
        dice = (2 * (gt * prob).sum((-2, -1)) + 1) / (gt.sum((-2, -1)) + prob.sum((-2, -1)) + 1)
        mask_loss = mask_loss + dice_weight * (1 - dice)
    predicted = (prob > 0.5).float()
    intersection = (gt * predicted).sum((-2, -1))
    iou = intersection / (gt.sum((-2, -1)) + predicted.sum((-2, -1)) - intersection + 1e-6)
    score_loss = torch.abs(scores - iou).mean()
    if supervise == "best":
        mask_loss = mask_loss.min(1).values
    chosen_iou = iou.gather(1, scores.argmax(1, keepdim=True))
    return mask_loss.mean() + SCORE_WEIGHT * score_loss, chosen_iou.mean()


def make_optimizer(model, args):
    """AdamW over what is trained; the image encoder's weights have a learning rate of their own."""
    groups = {"decoder": [], "encoder": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["encoder" if name.startswith("image_encoder.") else "decoder"].append(parameter)
    rates = {"decoder": args.lr, "encoder": args.encoder_lr}
    on_mps = next(model.parameters()).device.type == "mps"  # where the fused step has not been tried
    return torch.optim.AdamW([{"params": groups[name], "lr": rates[name], "initial_lr": rates[name]}
                              for name in groups if groups[name]], weight_decay=args.weight_decay, fused=not on_mps)


def learning_rate_factor(args, iteration, halvings=0):
    """What --warmup and --scheduler multiply the learning rates by in an iteration, counted from 1.

    halvings: how often "plateau" has halved them so far; the rest follows from the iteration.
    """
    done = iteration - 1
    factor = {"none": 1, "cosine": (1 + math.cos(math.pi * done / args.iterations)) / 2,
              "step": 0.1 ** (done // math.ceil(args.iterations / 3)), "plateau": 0.5**halvings}[args.scheduler]
    return factor * min(1, iteration / (args.warmup + 1))


def print_setup(training, device):
    """Print what is about to be trained, on what."""
    args, masks, val_masks = training.args, training.masks, training.val_masks
    cache, val_cache, processes = training.cache, training.val_cache, training.processes
    encoder = {"frozen": "이미지 인코더와 conv_s0, conv_s1은 고정", "full": "이미지 인코더도 모두 학습",
               "lora": f"이미지 인코더의 블록은 랭크 {args.lora_rank}의 LoRA로 학습하고 neck은 고정"}[args.encoder]
    print(f"장치: {device}" + (f", 프로세스 {processes}개" if processes > 1 else ""))
    print(describe_data(masks, val_masks))
    trained, total = count_weights(training.parameters), count_weights(training.model.parameters())
    print(f"학습하는 가중치: {trained:,} / {total:,} ({encoder})")
    if cache is None:
        print("학습 이미지의 특징은 캐시하지 않고 쓸 때마다 인코딩합니다.")
    else:
        print(f"특징 캐시: 학습 {len(masks)}장 중 {cache.images_that_fit(len(masks))}장, "
              f"검증 {len(val_masks)}장 중 {val_cache.images_that_fit(len(val_masks), processes)}장이 들어갑니다 "
              f"(한 장 {cache.bytes_per_image / 1e6:.2g} MB, 한도 {(cache.limit + val_cache.limit) / 1e9:.3g} GB)"
              + (f", 파일로도 남깁니다: {cache.folder}" if cache.folder else ""))
    if not val_masks:
        print("검증 데이터가 없어 학습 IoU(이동 평균)로 최고 모델을 고릅니다.")


def count_weights(parameters):
    return sum(parameter.numel() for parameter in parameters)


def describe_data(masks, val_masks):
    return (f"학습 {len(masks)}장, 객체 {masks.count}개 (전경 {MIN_FOREGROUND}픽셀 미만이라 뺀 객체 "
            f"{masks.left_out}개), 검증 {len(val_masks)}장, 객체 {val_masks.count}개")


def train(training, trackers):
    """All iterations; log, validate, save as the settings say. Ends the program after the iteration of a Ctrl-C."""
    args, rank, processes = training.args, training.rank, training.processes
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: on_interrupt(interrupted, processes))
    bar = tqdm(range(training.iteration + 1, args.iterations + 1), "학습", initial=training.iteration,
               total=args.iterations, disable=True if rank else None)
    for iteration in bar:
        if 0 < args.patience <= training.validations_since_best:
            bar.close()
            print(f"{training.iteration}회에 일찍 끝냅니다: {training.best_iteration}회 이후로 나아지지 않았습니다.")
            break
        stopping, better = training.step(iteration, interrupted), False
        bar.set_postfix(loss=f"{training.mean[0]:.4f}", IoU=f"{training.mean[1]:.1%}", refresh=False)
        validating = iteration % args.save_every == 0 or iteration == args.iterations
        if validating or iteration % LOG_EVERY == 0 or iteration == 1:
            training.log()
            if validating:
                better = training.validate()
                row = training.rows[-1]
                line = f"[{iteration}/{args.iterations}] loss {row['loss']:.4f}, 학습 IoU {row['train_iou']:.2%}, 검증 "
                line += f"IoU {row['val_iou']:.2%}, Dice {row['val_dice']:.2%}" if "val_iou" in row else "없음"
                bar.write(line)
            for track in trackers:
                track(iteration, training.rows[-1])
        if (validating or stopping) and rank == 0:
            training.save(better)
        if stopping:
            bar.close()
            print(f"{iteration}회까지 저장했습니다. 이어서 하려면: {resume_command(processes)}")
            sys.exit(130)


def ignore_interrupts(_worker):
    """Ctrl-C reaches the processes that read images as well; they go on until the training ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def on_interrupt(interrupted, processes):
    """Ctrl-C: let the iteration end and be saved; a second one ends the program at once.

    Below torchrun every process gets two, one of them from torchrun, and only the first may count.
    """
    interrupted.append(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN if processes > 1 else signal.SIG_DFL)
    print("이번 반복을 마치고 저장합니다." + (" 바로 끝내려면 Ctrl-C를 한 번 더 누르세요." if processes == 1 else ""))


def in_parts(gt_masks):
    """Cut masks, bool N x H x W, into parts that one decoder call takes: their logits have 512 MB at most."""
    at_once = max(1, 2**27 // (3 * math.prod(gt_masks.shape[1:])))
    return [gt_masks[start:start + at_once] for start in range(0, len(gt_masks), at_once)]


def predict_prompted(predictor, kind, gt_masks):
    """Masks for the image that is set, with a prompt made from each of gt_masks (bool N x H x W).

    kind: "point", the mask's middle pixel; "box", its tight box; "points", its middle pixel and then two
        clicks, one after the other, each on the largest error of the mask with the highest score.
    Returns: logits N x 3 x H x W, scores N x 3, and the prompts as (coordinates N x P x 2 in pixels, labels
        N x P): 1 for a click on the object, 0 beside it, 2 and 3 for a box's corners, as SAM has them.
    """
    def predict(coords, labels):
        logits, scores, _ = predictor.predict(coords, labels, multimask_output=True, return_logits=True)
        return logits.reshape(-1, 3, *gt_masks.shape[1:]), scores.reshape(-1, 3)

    if kind == "box":
        coords = np.stack([mask_box(gt_mask).reshape(2, 2) for gt_mask in gt_masks])
        labels = np.tile([2, 3], (len(gt_masks), 1))
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
    """The middle one of the mask's foreground pixels in row-major order: float32 1 x 2, (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    return np.array([[columns[middle], rows[middle]]], np.float32)


def error_click(predicted, gt_mask):
    """The click that corrects most: the pixel deepest inside what is missed (label 1) or too much (label 0).

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


def calculate_dice(pred_mask, gt_mask):
    """Dice coefficient of two boolean H x W masks, 0 to 1: 2|A∩B| / (|A| + |B| + 1e-6)."""
    return float(2 * np.logical_and(pred_mask, gt_mask).sum() / (pred_mask.sum() + gt_mask.sum() + 1e-6))


def save_model(model, path, **more):
    """Save in the official form {"model": state_dict}, which every SAM 2 tool opens; `more` goes beside it.

    Weights that are not finite are never saved.
    """
    weights = official_weights(model)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail("가중치가 유한하지 않아 저장하지 않습니다. --lr을 낮춰 보세요. 전에 저장한 모델은 그대로입니다")
    buffer = io.BytesIO()
    torch.save({"model": weights, "image_size": model.image_size, **more}, buffer)
    write_file(path, buffer.getbuffer())


def official_weights(model):
    """A model's weights on the CPU under their official names, with low-rank updates merged into plain weights."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            weights[f"{name}.weight"] = module.weight.detach()
    return {name: tensor.cpu() for name, tensor in weights.items()}


def hash_of_masks(*sets):
    """A hash of the names of some sets' images and of their masks."""
    digest = hashlib.sha256()
    for masks in sets:
        digest.update(f"{len(masks)} images".encode())
        for path, objects, size in zip(masks.paths, masks.objects, masks.sizes):
            digest.update(os.fsencode(f"{path.name} {size}") + b" ".join(rle["counts"] for rle in objects))
    return digest.hexdigest()


def save_log(rows, output_dir):
    """Write train_log.csv: the rows logged so far."""
    text = io.StringIO(newline="")
    rates = ["lr", "encoder_lr"] if "encoder_lr" in rows[0] else ["lr"]
    writer = csv.DictWriter(text, ["iteration", "loss", "train_iou", *rates, "val_loss", "val_iou", "val_dice",
                                   "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_file(output_dir / "train_log.csv", text.getvalue().encode())


def save_curve(rows, output_dir):
    """Write training_curve.png: loss and IoU of the rows logged so far."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.13, top=0.91, wspace=0.17)
    validated = [row for row in rows if "val_iou" in row]
    for axes, name, train, val in ((left, "loss", "loss", "val_loss"), (right, "IoU", "train_iou", "val_iou")):
        axes.plot([row["iteration"] for row in rows], [row[train] for row in rows], label="training (running mean)")
        if validated:
            axes.plot([row["iteration"] for row in validated], [row[val] for row in validated], "o-",
                      label="validation")
        axes.set(xlabel="iteration", ylabel=name)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    right.set_ylim(0, 1)
    save_figure(figure, output_dir / "training_curve.png")


def resume_command(processes):
    """The command line that goes on with this training."""
    per_node = os.environ.get("LOCAL_WORLD_SIZE", processes)
    start = ["torchrun", f"--nproc-per-node={per_node}"] if processes > 1 else [Path(sys.executable).name]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*start, *sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])])


def finish(training, device):
    """Write sam2_final.pt and training_summary.json; print how long the training took and what it reached."""
    rows, folder = training.rows, training.args.output_dir
    save_model(training.model, folder / "sam2_final.pt")
    seconds = time.time() - training.started
    write_json(folder / "training_summary.json", {
        "settings": training.settings, "device": device, "versions": versions(),
        "train_images": len(training.masks), "train_objects": training.masks.count,
        "val_images": len(training.val_masks), "val_objects": training.val_masks.count,
        "trained_weights": count_weights(training.parameters), "encodings_per_process": training.encoded,
        "iterations": training.iteration, "best_iou": training.best, "best_iteration": training.best_iteration,
        "best_chosen_by": "validation IoU" if training.val_masks else "training IoU", "seconds": round(seconds, 1)})
    chosen_by = "검증" if training.val_masks else "학습"
    print(f"학습 시간 {round(seconds) // 60}분 {round(seconds) % 60}초, "
          f"학습 IoU(이동 평균) {rows[0]['train_iou']:.1%} → {rows[-1]['train_iou']:.1%}, "
          f"{chosen_by} 최고 IoU {training.best:.2%} ({training.best_iteration}회)")
    print(f"저장: {folder / 'sam2_best.pt'}, {folder / 'sam2_final.pt'}")


# ---- shared block: the same, letter for letter, in train_sam2_proper.py, compare_models.py, test_my_image.py ----

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's has no such thing
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
if Path(__file__).resolve().parent.name == "sam2":
    print("주의: 프로젝트 폴더 이름이 sam2라 sam2 패키지와 혼동될 수 있습니다. 다른 이름으로 바꾸세요", file=sys.stderr)
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # file names may contain "$"
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by this script
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # called inside sam2


class ImageError(OSError):
    """An image or mask that cannot be used; the message names the file."""


def run(main, advice):
    """Call main(). An expected failure ends in one line on stderr and exit code 1; advice: if memory runs out."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except KeyboardInterrupt:
        fail("중단했습니다")
    except (RuntimeError, MemoryError) as error:  # CUDA, MPS and the CPU report it in different words
        words = "out of (shared )?memory|not enough memory|can't allocate memory|killed by signal: Killed"
        if isinstance(error, RuntimeError) and not re.search(words, str(error)):
            raise
        fail(f"메모리가 부족합니다. {advice}")


def fail(message):
    """End with exit code 1 and one line on stderr."""
    sys.exit(f"오류: {message}")


def write_file(path, content):
    """Write bytes to a temporary file beside `path` and rename it, so that `path` is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path, value):
    """Write a JSON file in UTF-8, with escapes for the bytes of a file name that are not valid UTF-8."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def save_figure(figure, path):
    """Write a matplotlib figure as a PNG at 100 dots an inch, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    write_file(path, buffer.getvalue())


def detect_device(requested="auto"):
    """The device to run on: as requested ("cuda", "cuda:1", "mps", "cpu"; fails if it is not available) or the best."""
    is_available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    usable = [name for name in is_available if is_available[name]]
    usable += [f"cuda:{number}" for number in range(torch.cuda.device_count() if is_available["cuda"] else 0)]
    if requested not in ("auto", *usable):
        fail(f"장치 '{requested}'를 쓸 수 없습니다. 이 컴퓨터에서 쓸 수 있는 장치: {', '.join(usable)}")
    return usable[0] if requested == "auto" else requested


def calculate_iou(pred_mask, gt_mask):
    """Intersection over union of two boolean H x W masks, 0 to 1: |A∩B| / (|A∪B| + 1e-6)."""
    intersection = np.logical_and(pred_mask, gt_mask).sum()
    union = np.logical_or(pred_mask, gt_mask).sum()
    return float(intersection / (union + 1e-6))


def decode_file(path, flags):
    """Decode an image file with OpenCV. Raises ImageError, naming the file, if it cannot be decoded.

    The bytes are read first, because cv2.imread cannot open a path with Korean letters on Windows.
    """
    try:
        decoded = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, cv2.error):  # a path with a NUL; an empty file; more pixels than OpenCV allows
        decoded = None
    if decoded is None:
        raise ImageError(f"{path}: 이미지 파일이 아니거나 손상되었습니다")
    return decoded


def read_image(path):
    """Read an image as uint8 H x W x 3, RGB, upright: grey, RGBA, CMYK, 16-bit and EXIF-rotated files too."""
    return cv2.cvtColor(decode_file(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_mask(path):
    """Read a mask as uint16 H x W: 0 is the background, every other value one object.

    A 16-bit file holds these numbers. An 8-bit file holds one object, number 1, where its value is above 127.
    """
    mask = decode_file(path, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    return mask if mask.dtype == np.uint16 else (mask > 127).astype(np.uint16)


def read_config(model_cfg):
    """A model's config: a name inside the sam2 package ("configs/sam2.1/sam2.1_hiera_s.yaml"), or a YAML file."""
    try:
        config = OmegaConf.load(model_cfg) if Path(model_cfg).is_file() else compose(config_name=str(model_cfg))
        return OmegaConf.create(OmegaConf.to_container(config.model, resolve=True))
    except Exception as error:  # hydra, OmegaConf and YAML each raise their own kinds
        fail(f"모델 설정을 열 수 없습니다: {model_cfg} ({textwrap.shorten(str(error), 200)}). "
             "예: configs/sam2.1/sam2.1_hiera_s.yaml")


def load_predictor(model_cfg, checkpoint, device, image_size=None):
    """A SAM2ImagePredictor on `device`, in eval mode: see read_config and load_weights.

    image_size: the side in pixels that images are resized to, if not the config's own.
    """
    config = read_config(model_cfg)
    config.image_size = image_size or config.image_size
    config.sam_mask_decoder_extra_args = dict(  # as sam2.build_sam.build_sam2 sets them
        dynamic_multimask_via_stability=True, dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98)
    model = instantiate(config, _recursive_=True).eval()
    load_weights(model, checkpoint, model_cfg)
    predictor = SAM2ImagePredictor(model.to(device))
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


def load_weights(model, checkpoint, model_cfg):
    """Load a checkpoint into a SAM 2: the official form {"model": state_dict}, or a bare state dict.

    Fails if the file is missing, damaged or made for another config than `model_cfg`; warns if the weights were
    trained at another image size.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        official = re.fullmatch(r"sam2\.1_hiera_(tiny|small|base_plus|large)\.pt", checkpoint.name)
        command = f" 받기: python download_dataset.py --checkpoint {official[1]}" if official else ""
        fail(f"체크포인트가 없습니다: {checkpoint}.{command} (체크포인트 없이 체험하려면: make demo)")
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(saved.get("model", saved)))
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise  # not the file's fault
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        fail(f"체크포인트 {checkpoint}가 손상되었거나 설정 {model_cfg}와 맞지 않습니다: "
             f"{textwrap.shorten(str(error), 400)}")
    trained_size = saved.get("image_size", model.image_size)
    if trained_size != model.image_size:
        print(f"주의: {checkpoint}는 --image-size {trained_size}로 학습했는데 {model.image_size}로 실행합니다.")

# ---- end of shared block ----


if __name__ == "__main__":
    run(main, "--batch-size나 --clicks를 줄이거나, --grad-checkpointing, --image-size 512, --workers 0을 쓰세요")

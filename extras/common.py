"""Shared code of the scripts in extras/ that run SAM 2: loading it for images or videos, its flags, a test image.

    from common import load_predictor      Python finds this file beside the script

The first three functions are the end of the shared block of the scripts at the top level; a test fails if they differ.
files.py has the rest of the block.
"""

import os
import re
import textwrap
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import numpy as np
import sam2
import torch
from files import fail
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor

warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # called inside sam2


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


def load_video_predictor(model_cfg, checkpoint, device, image_size=None):
    """Build a SAM 2 for videos and load its weights; returns a SAM2VideoPredictor on `device`, in eval mode.

    Arguments as in load_predictor. Holes in masks are not filled, because sam2 needs its CUDA extension for that,
    which not every installation has.
    """
    config = read_config(model_cfg)
    config.image_size = image_size or config.image_size
    config._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    config.sam_mask_decoder_extra_args = dict(  # as sam2.build_sam.build_sam2_video_predictor sets them
        dynamic_multimask_via_stability=True, dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98)
    config.binarize_mask_from_pts_for_mem_enc = True
    config.fill_hole_area = 0
    model = instantiate(config, _recursive_=True).eval()
    model.memory_attention.register_forward_pre_hook(convert_memory, with_kwargs=True)
    load_weights(model, checkpoint, model_cfg)
    return model.to(device)


def convert_memory(_, args, kwargs):
    """Convert the memory to the type of the current features (a forward pre-hook of sam2's MemoryAttention).

    sam2 stores memories as bfloat16. Concatenating them with float32 object pointers makes them float32, but an object
    has no pointer yet on frames before its first prompt, and there sam2 would fail without autocast.
    """
    return args, {**kwargs, "memory": kwargs["memory"].to(kwargs["curr"][0].dtype)}


def trained_image_size(checkpoint):
    """The input size in pixels that train_sam2_proper.py saves in a checkpoint; None without one."""
    try:
        size = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["image_size"]
    except Exception:  # an official checkpoint; or missing or damaged, which load_predictor reports
        return None
    return size if isinstance(size, int) else None


def probe_image(side):
    """A bright disc on a colour gradient, uint8 side x side x 3."""
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([x, y, 1 - x], axis=-1) * 120 + 20
    image[(x - 0.45) ** 2 + (y - 0.5) ** 2 < 0.04] = (220, 180, 90)
    return image.astype(np.uint8)


def add_model_flags(parser, output):
    """Add the flags of every script that runs SAM 2. output: default of --output."""
    parser.add_argument("--original", action="store_true", help="파인튜닝 모델 대신 원본 모델 사용")
    parser.add_argument("--output", "-o", type=Path, default=Path(output), help=f"결과 폴더 (기본: {output})")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml",
                        help="모델 설정 이름 또는 YAML 경로 (기본: configs/sam2.1/sam2.1_hiera_s.yaml)")
    parser.add_argument("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt",
                        help="원본 체크포인트 (기본: checkpoints/sam2.1_hiera_small.pt)")
    parser.add_argument("--finetuned", default="output/sam2_best.pt",
                        help="파인튜닝한 체크포인트 (기본: output/sam2_best.pt)")
    parser.add_argument("--image-size", type=int, choices=[512, 768, 1024],
                        help="모델 입력 한 변, 픽셀 (기본: 모델 설정대로)")
    parser.add_argument("--device", default="auto", help="장치: auto, mps, cuda, cpu (기본: auto)")


def choose_checkpoint(args):
    """Path of the checkpoint to load: --finetuned, or --checkpoint with --original or without a fine-tuned file."""
    if args.original:
        return args.checkpoint
    if not Path(args.finetuned).is_file():
        print(f"파인튜닝한 모델이 아직 없어 원본 모델을 사용합니다: {args.finetuned}")
        return args.checkpoint
    return args.finetuned

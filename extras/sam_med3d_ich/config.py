"""The settings of train.py: flags with their defaults, checks, and warnings."""

import argparse
from pathlib import Path

MODELS = {
    # SAM-Med3D as published: 100.5 M parameters, 128³ voxels
    "full": {"image_size": 128},
    # 3.4 M parameters, for the demo and the tests. All blocks use global attention, because windows of 14 tokens would
    # pad the side of 6 tokens to 14 and take 17 times as long. prompt_embed_dim must be a multiple of 3 (positional
    # encoding) and of 8 (heads of the decoder).
    "small": {"image_size": 48, "vit_patch_size": 8, "encoder_embed_dim": 192, "encoder_depth": 4,
              "encoder_num_heads": 6, "encoder_global_attn_indexes": [0, 1, 2, 3], "prompt_embed_dim": 96},
}
BRAIN_WINDOW = (40.0, 80.0)  # level and width in Hounsfield units
# GB that a training step with batch 1 takes at most; half of it with --freeze_encoder or gradient checkpointing
MEMORY = {"full": 9, "small": 1}
FREE_ON_RESUME = {"epochs", "patience", "output_dir", "device", "num_workers", "keep_in_memory", "use_wandb",
                  "wandb_project", "wandb_entity", "log_images", "log_freq", "resume", "test", "sam_checkpoint",
                  "image_size"}  # determined by model_size, which is compared


def window_type(text):
    """Parse --window: "brain" -> (40.0, 80.0); "none" -> None; "level,width" in Hounsfield units -> two floats."""
    if text in ("brain", "none"):
        return BRAIN_WINDOW if text == "brain" else None
    try:
        level, width = map(float, text.split(","))
        if abs(level) < 1e5 and 0 < width < 1e5:
            return level, width
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: brain, none, 또는 '레벨,폭'이어야 합니다. 예: 40,80 (폭은 0보다 큰 수)")


def at_least(least, kind):
    """An argparse type for finite numbers that are `least` or larger. kind: int or float."""
    def convert(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: {least} 이상이어야 합니다")
        return value
    convert.__name__ = kind.__name__
    return convert


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description="SAM-Med3D를 머리 CT의 뇌출혈(ICH) 분할에 맞게 파인튜닝합니다.")

    def add(name, kind, default, text, **options):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (기본: {default})", **options)

    parser.add_argument("--train_csv", type=Path, help="학습 CSV: 열 path, ich, patient_id")
    parser.add_argument("--val_csv", type=Path, help="검증 CSV: 학습 CSV에 없는 환자만")
    parser.add_argument("--mask_dir", type=Path, help="마스크 폴더: 볼륨과 이름이 같은 .nii 또는 .nii.gz")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="결과를 쓸 폴더 (기본: ./outputs)")
    parser.add_argument("--window", type=window_type, default="brain", help="Hounsfield 창: brain(레벨 40, 폭 80), "
                        "'레벨,폭', 또는 none(값 그대로). 레벨이 음수면 --window=-600,1500처럼 = 로 (기본: brain)")
    add("--spacing", at_least(0.1, float), 1.5, "모델이 보는 복셀 한 변(mm)")
    add("--augmentation_prob", at_least(0, float), 0.5, "좌우 뒤집기, 회전, 잡음 각각의 확률")
    add("--num_workers", at_least(0, int), 2, "데이터를 읽는 프로세스 수")
    parser.add_argument("--keep_in_memory", action="store_true", help="읽고 변환한 볼륨을 메모리에 두고 다시 씀")

    add("--epochs", at_least(1, int), 200, "에포크 수")
    add("--batch_size", at_least(1, int), 2, "배치 크기")
    add("--lr", at_least(0, float), 1e-4, "학습률")
    add("--weight_decay", at_least(0, float), 1e-4, "가중치 감쇠")
    add("--patience", at_least(0, int), 15, "검증 Dice가 이 에포크 수만큼 나아지지 않으면 일찍 끝냄, 0이면 끝까지")
    add("--seed", at_least(0, int), 0, "난수 시드")
    parser.add_argument("--use_mixed_precision", action="store_true", help="혼합 정밀도(CUDA에서만)")
    add("--gradient_accumulation_steps", at_least(1, int), 4, "몇 배치의 기울기를 모아 가중치를 한 번 갱신할지")
    add("--max_grad_norm", at_least(0, float), 1.0, "기울기 노름의 상한, 0이면 제한하지 않음")
    add("--scheduler_type", str, "reduce_on_plateau", "학습률을 바꾸는 방법",
        choices=["reduce_on_plateau", "cosine", "step"])
    add("--num_clicks", at_least(1, int), 3, "학습할 때 볼륨마다 찍는 점의 수: 첫 점은 출혈 안에, 다음 점은 틀린 곳에")

    parser.add_argument("--sam_checkpoint", type=Path, help="시작할 SAM-Med3D 가중치, 예: sam_med3d_turbo.pth")
    add("--model_size", str, "full", "full은 공개된 SAM-Med3D(1억 개), small은 데모용(340만 개)", choices=list(MODELS))
    add("--visual_tokens", at_least(1, int), 256, "visual token의 차원")
    parser.add_argument("--freeze_encoder", action="store_true", help="SAM encoder를 고정")
    parser.add_argument("--use_gradient_checkpointing", action="store_true",
                        help="encoder의 중간값을 저장하지 않고 다시 계산: 메모리를 덜 쓰고 느려짐")

    parser.add_argument("--use_wandb", action="store_true", help="Weights & Biases에 기록")
    add("--wandb_project", str, "sam-med3d-ich", "WandB 프로젝트")
    parser.add_argument("--wandb_entity", help="WandB 팀 또는 사용자 이름")
    parser.add_argument("--log_images", action="store_true", help="검증 그림도 WandB에 기록")
    add("--log_freq", at_least(1, int), 10, "그림을 몇 에포크마다 기록할지")

    add("--device", str, "auto", "장치: auto, mps, cuda, cpu")
    parser.add_argument("--resume", action="store_true", help="결과 폴더의 latest_model.pth에서 이어서 하기")
    parser.add_argument("--test", action="store_true", help="학습하지 않고 시스템, 데이터, 학습 한 번을 검사하기")
    args = parser.parse_args(arguments)
    if args.augmentation_prob > 1:
        parser.error("argument --augmentation_prob: 0 ~ 1")
    missing = [f"--{name}" for name in ("train_csv", "val_csv", "mask_dir") if getattr(args, name) is None]
    if missing and not args.test:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    args.image_size = MODELS[args.model_size]["image_size"]
    return args


def warnings_about(args, device):
    """Warnings about settings that are probably a mistake, a list of Korean sentences."""
    warnings = []
    if not args.sam_checkpoint and not args.resume:
        warnings.append("--sam_checkpoint가 없어 무작위 가중치에서 시작합니다")
    if args.use_mixed_precision and not device.startswith("cuda"):
        warnings.append(f"혼합 정밀도는 CUDA에서만 씁니다. {device}에서는 끕니다")
    if args.freeze_encoder and args.use_gradient_checkpointing:
        warnings.append("encoder를 고정하면 --use_gradient_checkpointing은 줄일 메모리가 없습니다")
    if args.freeze_encoder and not args.sam_checkpoint and not args.resume:
        warnings.append("--freeze_encoder가 무작위 가중치의 encoder를 고정합니다")
    if args.sam_checkpoint and args.spacing != 1.5:
        warnings.append(f"공식 가중치는 1.5 mm 복셀로 학습되었습니다 (--spacing {args.spacing:g})")
    if args.log_images and not args.use_wandb:
        warnings.append("--log_images는 --use_wandb와 함께 써야 기록됩니다")
    return warnings


def settings_of(args):
    """The settings as plain JSON values, for config.json and the checkpoints."""
    return {name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in vars(args).items()}


def differing_settings(args, before):
    """The settings that --resume must not change but that differ from `before`: a list of the flags to give instead."""
    now = settings_of(args)

    def same(name):
        if isinstance(getattr(args, name), Path):
            return Path(now[name]).resolve() == Path(before[name]).resolve()
        return now[name] == before.get(name)

    return [as_flag(name, before.get(name)) for name in now if name not in FREE_ON_RESUME and not same(name)]


def as_flag(name, value):
    """The flag for a setting as in settings_of(): "--window=40,80", "--freeze_encoder 없이" (without it)."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--{name} 없이"
    if name == "window":
        return f"--window={','.join(f'{number:g}' for number in value) if value else 'none'}"
    return f"--{name} {value}"

"""Fine-tune SAM-Med3D to segment brain haemorrhages in CT and to predict whether there is one.

    python train.py --train_csv train.csv --val_csv val.csv --mask_dir masks --sam_checkpoint sam_med3d_turbo.pth
    python train.py --test                           check the setup without training

config.py has the settings, dataloader.py reads and transforms volumes, model.py is SAM-Med3D with a representation
head, trainer.py trains and validates, utils.py has shared functions.
"""

import os
import sys
import time

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import matplotlib
import torch

matplotlib.use("Agg")
from config import MEMORY, parse_args, settings_of, warnings_about
from dataloader import Volumes, check_patients, read_rows
from matplotlib import pyplot as plt
from model import build_model
from trainer import Trainer
from utils import (
    DataError,
    choose_device,
    draw_curve,
    duration,
    fail,
    free_gigabytes,
    lock,
    package_versions,
    peak_memory,
    run_training,
    save_figure,
    write_file,
    write_json,
)


def main():
    args = parse_args()
    if args.test:
        sys.exit(not system_check(args))
    lock(args.output_dir / ".lock")
    for leftover in args.output_dir.glob("*.[0-9]*.tmp"):  # left by a run that was killed while writing
        leftover.unlink()
    device = choose_device(args.device)
    for warning in warnings_about(args, device):
        print(f"주의: {warning}")
    if not args.resume and (args.output_dir / "latest_model.pth").exists():
        print(f"주의: 첫 에포크가 끝나면 {args.output_dir}의 이전 학습을 덮어씁니다. 이어서 하려면 --resume")
    train, val = open_data(args)
    model = build_model(args)
    trainer = Trainer(model, train, val, args, device)
    if args.resume:
        trainer.load()
        print(f"에포크 {trainer.epoch}까지 한 학습을 이어서 합니다.")
    if args.use_wandb:
        trainer.on_epoch = open_wandb(trainer)
    write_json(args.output_dir / "config.json", settings_of(args))
    print_setup(trainer)

    started = time.time()
    try:
        early = trainer.fit()
    except KeyboardInterrupt:
        if not (trainer.epoch and (args.output_dir / "latest_model.pth").is_file()):
            raise
        fail("중단했습니다. 같은 명령에 --resume을 붙이면 마지막으로 마친 에포크부터 이어서 합니다")
    save_figure(draw_curve(trainer.history), args.output_dir / "training_curve.png")
    save_summary(trainer, early)
    if early:
        print(f"일찍 끝냅니다: 에포크 {trainer.best_epoch} 뒤로 나아지지 않았습니다.")
    best = trainer.best
    print(f"학습 시간 {duration(time.time() - started)}. 최고 에포크 {trainer.best_epoch}: "
          f"검증 Dice {best['dice']:.3f}, IoU {best['iou']:.3f}, 부피 오차 {best['volume_error_ml']:.1f} ml, "
          f"라벨 정확도 {best['label_accuracy']:.0%}. 메모리 {peak_memory(device):.2f} GB")
    print(f"저장: {args.output_dir}/ (best_model.pth, sam_encoder.pth, patients.csv, patients.png)")


def open_data(args):
    """[training Volumes, validation Volumes], all read once. Prints each problem and then raises DataError."""
    train, problems = read_rows(args.train_csv, args.mask_dir)
    val, more = read_rows(args.val_csv, args.mask_dir)
    problems += more + check_patients(train, val)
    if not problems and not any(row.ich for row in val):
        problems.append(f"{args.val_csv}: ich가 1인 행이 없어 검증할 수 없습니다")
    if not problems and not any(row.ich for row in train):
        problems.append(f"{args.train_csv}: ich가 1인 행이 없어 배울 마스크가 없습니다")
    volumes = []
    for title, rows in (("학습", train), ("검증", val)) if not problems else ():
        volumes.append(Volumes(rows, args))
        found, sizes = volumes[-1].check(f"{title} 데이터 확인", args.num_workers, args.keep_in_memory)
        problems += found
        for doubt, files in volumes[-1].doubts.items():
            more = f" 외 {len(files) - 1}개" if len(files) > 1 else ""
            print(f"주의: {files[0]}{more}: {doubt}")
        if sizes:
            print(f"{title}: 환자 {len({row.patient_id for row in rows})}명, 볼륨 {len(rows)}개, 출혈 {len(sizes)}개 "
                  f"({min(sizes):.1f} ~ {max(sizes):.1f} ml, 중앙값 {sorted(sizes)[len(sizes) // 2]:.1f} ml)")
    if problems:
        for problem in problems:
            print(f"✗ {problem}")
        raise DataError(problems[0] if len(problems) == 1 else f"데이터에 문제가 {len(problems)}개 있습니다. "
                        f"위에 모두 적었습니다. 처음 것: {problems[0]}")
    return volumes


def print_setup(trainer):
    """Print device, number of parameters and the main settings."""
    args, precision = trainer.args, str(trainer.precision or torch.float32).removeprefix("torch.")
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"장치: {trainer.device} ({precision}), 학습하는 가중치 {trained:,} / {total:,}"
          f"{', SAM encoder 고정' if args.freeze_encoder else ''}")
    print(f"배치 {args.batch_size} x 누적 {args.gradient_accumulation_steps}, {args.image_size}^3 복셀, "
          f"{args.spacing:g} mm, 스케줄러 {args.scheduler_type}", flush=True)


def save_summary(trainer, early):
    """Write training_summary_DATE_TIME.json: settings, versions, scores of the best epoch, and the whole history."""
    name = f"training_summary_{time.strftime('%Y%m%d_%H%M%S')}.json"
    write_json(trainer.args.output_dir / name, {
        "settings": settings_of(trainer.args), "device": trainer.device, "versions": package_versions(),
        "train_volumes": len(trainer.train), "val_volumes": len(trainer.val), "epochs": trainer.epoch,
        "stopped_early": early, "best_epoch": trainer.best_epoch, "best": trainer.best,
        "seconds": round(sum(row["seconds"] for row in trainer.history), 1),
        "peak_memory_gb": round(peak_memory(trainer.device), 2), "history": trainer.history})


def open_wandb(trainer):
    """Start or resume a run of Weights & Biases; returns the function for Trainer.on_epoch, which logs an epoch."""
    try:
        import wandb
    except ImportError:
        fail("--use_wandb를 쓰려면 wandb 패키지가 필요합니다: pip install wandb")
    args = trainer.args
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tracker = wandb.init(project=args.wandb_project, entity=args.wandb_entity, dir=args.output_dir,
                         config=settings_of(args), id=trainer.run_id, resume="allow")
    trainer.run_id = tracker.id

    def log(history, draw):
        values = {name: value for name, value in history[-1].items() if value is not None}
        if args.log_images and history[-1]["epoch"] % args.log_freq == 0:
            figure = draw()
            values["patients"] = wandb.Image(figure)
            plt.close(figure)
        tracker.log(values, step=history[-1]["epoch"])
    return log


def system_check(args):
    """--test: check everything that a training needs and print a line for each. Returns whether all checks passed."""
    def memory():
        return f"{free_gigabytes(choose_device(args.device)):.1f} GB 남음"

    def required(name):
        value = getattr(args, name)
        if value is None:
            fail(f"--{name} 옵션이 없습니다")
        if not (value.is_dir() if name == "mask_dir" else value.is_file()):
            fail(f"{'폴더가' if name == 'mask_dir' else '파일이'} 없습니다: {value}")
        return str(value)

    def data():
        if None in (args.train_csv, args.val_csv, args.mask_dir):
            fail("위의 세 가지가 있어야 확인할 수 있습니다")
        return f"볼륨 {sum(map(len, open_data(args)))}개"

    def model():
        built = build_model(args)
        return f"{args.sam_checkpoint or '무작위 가중치'}, {sum(weight.numel() for weight in built.parameters()):,}개"

    def output():
        write_file(args.output_dir / "check.tmp", b"")
        (args.output_dir / "check.tmp").unlink()
        return str(args.output_dir)

    def step():
        started, device = time.time(), choose_device(args.device)
        saving = args.freeze_encoder or args.use_gradient_checkpointing
        free, needed = free_gigabytes(device), MEMORY[args.model_size] / (2 if saving else 1)
        if free < needed:
            fail(f"메모리가 {free:.1f} GB 남아 해 보지 않았습니다. {needed:g} GB까지 들 수 있습니다")
        args.num_workers, args.batch_size = 0, 1
        trainer = Trainer(build_model(args), [0], [0], args, device)
        size = (1, 1, *[args.image_size] * 3)
        batch = {"image": torch.randn(size), "mask": torch.zeros(size), "number": torch.tensor([0]),
                 "label": torch.tensor([1])}
        batch["mask"][..., :8] = 1
        mask_loss, label_loss = trainer.losses(batch, epoch=1)
        trainer.scaler.scale((mask_loss + label_loss).mean()).backward()
        trainer.step()
        return f"{time.time() - started:.1f}초, 메모리 {peak_memory(device):.1f} GB (배치 1, 무작위 값)"

    passed = True
    for name, check in (
            ("장치", lambda: choose_device(args.device)), ("메모리", memory),
            ("버전", lambda: ", ".join(" ".join(pair) for pair in package_versions().items())),
            *((f"--{name}", lambda name=name: required(name)) for name in ("train_csv", "val_csv", "mask_dir")),
            ("데이터", data), ("SAM-Med3D", model), ("결과 폴더", output), ("학습 1회", step)):
        try:
            print(f"✓ {name}: {check()}", flush=True)
        except (SystemExit, DataError, OSError, RuntimeError, MemoryError) as error:
            print(f"✗ {name}: {str(error).removeprefix('오류: ')}", flush=True)
            passed = False
    return passed


if __name__ == "__main__":
    run_training(main)

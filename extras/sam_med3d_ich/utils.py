"""Shared functions of the other modules: one-line errors, checkpoints, system, figures, and those of ../files.py."""

import argparse
import atexit
import contextlib
import errno
import functools
import importlib.metadata
import os
import pickle
import platform
import re
import sys
import textwrap
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from matplotlib import pyplot as plt

sys.path.append(str(Path(__file__).resolve().parents[1]))
from files import (  # noqa: E402, F401  (the other modules import them from here: this one adds the folder)
    as_cell,
    detect_device,
    fail,
    run,
    save_figure,
    write_file,
    write_json,
)


class DataError(Exception):
    """A CSV, volume or mask that cannot be used; the message names the file and, if known, the row of the CSV."""


def reason(error):
    """The message of an exception in one line; that of an OSError names its file."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return last_line.removeprefix("utils.DataError: ")  # from a DataLoader worker, which sends the whole traceback


def run_training(main):
    """Call main() as run() does; what a worker of a DataLoader raises, with its traceback, ends in one line too."""
    def call():
        try:
            main()
        except (DataError, OSError) as error:
            fail(reason(error))

    run(call, "--batch_size를 줄이고 --gradient_accumulation_steps를 늘리거나 "
              "--use_gradient_checkpointing, --freeze_encoder, --num_workers 0을 쓰세요")


# ---- locks and checkpoints ----

def lock(path):
    """Hold the lock file `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # raises if the folder is read-only; errors below come from the locking itself
    file_lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a run that is killed
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")
    except OSError as error:  # Lustre without flock, SMB, NFS without lockd
        print(f"주의: 이 파일 시스템은 파일을 잠그지 못합니다 ({path}: {error.strerror}). "
              "같은 폴더에서 두 번 실행하지 마세요", file=sys.stderr)
    atexit.register(file_lock.release)  # also keeps a reference, without which the lock is released


def save_checkpoint(path, value):
    """torch.save to a temporary file beside `path`, not through memory as in write_file: it may exceed 1 GB.

    Raises OSError, naming the file, if the disk is full or a quota is used up (torch.save raises RuntimeError).
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(value, temporary)
    except RuntimeError:
        temporary.unlink(missing_ok=True)
        strerror = "끝까지 쓰지 못했습니다. 디스크에 남은 자리를 확인하세요"
        raise OSError(errno.EIO, strerror, str(path)) from None
    temporary.replace(path)


def load_checkpoint(path):
    """torch.load with weights_only=True, which runs no code from the file; fail() if it cannot be read.

    argparse.Namespace is allowed as well, because SAM-Med3D's official checkpoints hold their settings in one.
    """
    if not Path(path).is_file():
        fail(f"체크포인트가 없습니다: {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message, which advises weights_only=False, is not shown
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"가중치가 아닌 것이 들어 있습니다: {refused[1]}" if refused else "체크포인트가 아닙니다"
        fail(f"체크포인트를 열지 않았습니다: {path} ({what})")
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        what = textwrap.shorten(str(error), 200) or type(error).__name__
        fail(f"체크포인트를 읽을 수 없습니다: {path} ({what})")


# ---- the system ----

@functools.cache  # --test calls it three times: the warning is printed once
def choose_device(requested="auto"):
    """The device to run on, see detect_device(); the CPU instead of an MPS that lacks the decoder's ConvTranspose3d.

    MPS has it since torch 2.8 (github.com/pytorch/pytorch/pull/154696). Older versions run the whole model on the CPU,
    because their fallback does not cover this operation.
    """
    if requested in ("auto", "mps") and torch.backends.mps.is_available() and torch.__version__ < "2.8":
        print(f"주의: torch {torch.__version__}의 MPS에는 ConvTranspose3d가 없어 CPU에서 실행합니다. "
              "torch 2.8 이상을 설치하면 MPS를 씁니다")
        return "cpu"
    return detect_device(requested)


def package_versions():
    """{name: version} of Python and of the packages that a result depends on."""
    packages = ("torch", "medim", "monai", "nibabel", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def free_gigabytes(device):
    """Free memory in GB: on CUDA of the GPU, else of the machine, or of the container (cgroup 2) if that has less."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 1e9
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(statistics["inactive_file"])  # page cache, which the kernel frees when memory is needed
        free = max(0, min(free, limit - used))
    return free / 1e9


def peak_memory(device):
    """Peak memory in GB: on CUDA of all tensors, else of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def duration(seconds):
    """Seconds as text: "1시간 2분", "3분 20초"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}시간 {minutes}분" if hours else f"{minutes}분 {seconds}초" if minutes else f"{seconds}초"


# ---- figures ----

def draw_curve(history):
    """A figure of the training losses and of the validation's Dice and label accuracy by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.13, top=0.9, wspace=0.17)
    epochs = [row["epoch"] for row in history]
    for axes, lines in ((left, {"mask_loss": "mask loss", "label_loss": "label loss"}),
                        (right, {"dice": "validation Dice, by patient", "label_accuracy": "label accuracy"})):
        for name, label in lines.items():
            axes.plot(epochs, [row[name] for row in history], ".-", label=label)
        axes.set(xlabel="epoch", ylabel="training loss" if axes is left else "validation")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1.02)
    return figure


def draw_patients(pictures):
    """A figure of the patients with the lowest, the median and the highest Dice: scan with click, truth, prediction.

    pictures: dicts with patient_id, dice (of the patient), click (x, y) and image, truth, prediction (X x Y, one axial
    slice; x increases to the patient's right, y to the front).
    """
    ranked = sorted(pictures, key=lambda picture: picture["dice"])
    chosen = list(dict.fromkeys([0, len(ranked) // 2, len(ranked) - 1]))
    figure, rows = plt.subplots(len(chosen), 3, figsize=(9, 3.2 * len(chosen)), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.1 / len(chosen), wspace=0.02, hspace=0.12)
    for axes, picture in zip(rows, (ranked[number] for number in chosen)):
        for column, (name, mask) in enumerate((("scan and click", None), ("truth", "truth"),
                                               (f"prediction; patient's Dice {picture['dice']:.2f}", "prediction"))):
            axes[column].imshow(picture["image"].T, cmap="gray", origin="lower")
            if mask and picture[mask].any():
                axes[column].contour(picture[mask].T, [0.5], colors="lime" if mask == "truth" else "red",
                                     linewidths=1.2)
            axes[column].set_title(f"{picture['patient_id']}: {name}" if column == 0 else name, fontsize=10)
            axes[column].axis("off")
            for side, place in (("L", 0.02), ("R", 0.94)):  # left is left, unlike in radiological view
                axes[column].text(place, 0.49, side, color="yellow", transform=axes[column].transAxes)
        axes[0].plot(*picture["click"], "*", color="cyan", markersize=11)
    return figure

"""What the other modules share: failing in one line, writing files, checkpoints, the system, figures.

extras/common.py has the first few as well, but Python does not find it from this folder.
"""

import argparse
import importlib.metadata
import io
import json
import os
import pickle
import platform
import re
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import torch

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot as plt  # noqa: E402, I001  (the backend is chosen first)

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # names of files and patients may contain "$"
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)


class DataError(Exception):
    """A CSV, volume or mask that cannot be used; the message names the file and, where there is one, the row."""


def fail(message):
    """End with status 1 and one line on stderr, for failures that the user can correct."""
    sys.exit(f"오류: {message}")


def reason(error):
    """What an exception says, in one line; an OSError names its file."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def run(main):
    """Run main(); expected failures end in one line on stderr with status 1."""
    try:
        main()
    except (DataError, OSError) as error:
        fail(reason(error))
    except KeyboardInterrupt:
        fail("중단했습니다. 같은 명령에 --resume을 붙이면 마지막으로 마친 에포크부터 이어서 합니다")
    except (RuntimeError, MemoryError) as error:
        words = re.search("out of memory|not enough memory|can't allocate memory", str(error))
        if not words and not isinstance(error, MemoryError):
            raise
        fail("메모리가 부족합니다. --batch_size를 줄이고 --gradient_accumulation_steps를 늘리거나 "
             "--use_gradient_checkpointing, --use_mixed_precision, --freeze_encoder를 쓰세요")


# ---- files ----

def beside(path):
    """The name under which a file is written before it is renamed to `path`: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_file(path, content):
    """Write bytes beside `path`, then rename."""
    temporary = beside(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def save_figure(figure, path):
    """Write a matplotlib figure as a PNG at 100 dots an inch, and close it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    write_file(path, picture.getvalue())


def save_checkpoint(path, value):
    """torch.save beside `path`, then rename; straight to disk, because latest_model.pth takes more than 1 GB."""
    temporary = beside(path)
    torch.save(value, temporary)
    temporary.replace(path)


def load_checkpoint(path):
    """torch.load with weights_only=True: nothing in the file is run. fail() if it cannot be read.

    Of Python's classes only argparse.Namespace is let in: SAM-Med3D's own checkpoints hold their settings in one.
    """
    if not Path(path).is_file():
        fail(f"체크포인트가 없습니다: {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to load the file all the same
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"가중치가 아닌 것이 들어 있습니다: {refused[1]}" if refused else "체크포인트가 아닙니다"
        fail(f"체크포인트를 열지 않았습니다: {path} ({what})")
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        what = textwrap.shorten(str(error), 200) or type(error).__name__
        fail(f"체크포인트를 읽을 수 없습니다: {path} ({what})")


# ---- the system ----

def detect_device(requested="auto"):
    """Name of the device to run on: "mps" if available, else "cuda", else "cpu"; fail() for one that is not there."""
    available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if requested == "auto":
        return next(name for name, there in available.items() if there)
    if not available.get(requested.split(":")[0]):
        usable = ", ".join(name for name, there in available.items() if there)
        fail(f"장치 '{requested}'를 쓸 수 없습니다. 이 컴퓨터에서 쓸 수 있는 장치: {usable}")
    return requested


def versions():
    """The versions of Python and of the packages that a result depends on."""
    packages = ("torch", "medim", "monai", "nibabel", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def free_memory(device):
    """Memory that is free now, in GB: the GPU's on CUDA, else the computer's."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return psutil.virtual_memory().available / 1e9


def peak_memory(device):
    """The most memory used so far, in GB: by tensors on CUDA, else by the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def duration(seconds):
    """Seconds as people say them: "1시간 2분", "3분 20초"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}시간 {minutes}분" if hours else f"{minutes}분 {seconds}초" if minutes else f"{seconds}초"


# ---- figures ----

def draw_curve(history):
    """Loss, and the validation's Dice and label accuracy, over the epochs; returns a figure."""
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
    """The lowest, the median and the highest Dice of a validation: scan with click, truth, prediction; a figure.

    pictures: dicts with title, dice, image, truth, prediction (X x Y, of one axial slice), click (x, y) or None.
    """
    ranked = sorted(pictures, key=lambda picture: picture["dice"])
    chosen = list(dict.fromkeys([0, len(ranked) // 2, len(ranked) - 1]))
    figure, rows = plt.subplots(len(chosen), 3, figsize=(9, 3.2 * len(chosen)), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.1 / len(chosen), wspace=0.02, hspace=0.12)
    for axes, picture in zip(rows, (ranked[number] for number in chosen)):
        for column, (name, mask) in enumerate((("scan and click", None), ("truth", "truth"),
                                               (f"prediction, Dice {picture['dice']:.2f}", "prediction"))):
            axes[column].imshow(picture["image"].T, cmap="gray", origin="lower")
            if mask and picture[mask].any():
                axes[column].contour(picture[mask].T, [0.5], colors="lime" if mask == "truth" else "red",
                                     linewidths=1.2)
            axes[column].set_title(f"{picture['title']}: {name}" if column == 0 else name, fontsize=10)
            axes[column].axis("off")
        axes[0].plot(*picture["click"], "*", color="cyan", markersize=11)
    return figure


def best_slice(mask):
    """Number of the axial slice (last axis) of a bool X x Y x Z mask with the largest area."""
    return int(np.argmax(mask.sum((0, 1))))

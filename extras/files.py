"""Shared code of extras/ and sam_med3d_ich that does not need sam2: files, images, one-line errors, the device.

    from files import read_image, write_file      Python finds this file beside the script

Most of it is the first part of the shared block of the scripts at the top level; a test fails if they differ.
"""

import contextlib
import csv
import io
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import cv2

if "cv2" in os.environ.get("QT_QPA_PLATFORM_PLUGIN_PATH", ""):  # matplotlib's Qt cannot start with OpenCV's plugins
    del os.environ["QT_QPA_PLATFORM_PLUGIN_PATH"]

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream lacks it
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # file names may contain "$"
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by the script
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)

FORMATS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff")  # suffixes of images


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


def list_images(folder):
    """Paths of the images in a folder, sorted; hidden files are skipped (macOS writes ._a.jpg beside a.jpg)."""
    return sorted(path for path in Path(folder).iterdir()
                  if path.is_file() and path.suffix.lower() in FORMATS and not path.name.startswith("."))


def write_csv(path, rows):
    """Write rows, of which the first holds the column names, as a UTF-8 CSV file; cells as in as_cell()."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([as_cell(value) for value in row] for row in rows)
    write_file(path, text.getvalue().encode())


def as_cell(value):
    """A value for a CSV. A text that a spreadsheet would evaluate as a formula gets an apostrophe in front of it."""
    is_number = re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", str(value))
    return f"'{value}" if str(value).startswith(tuple("=+-@\t\r")) and not is_number else value

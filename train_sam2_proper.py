"""Fine-tune SAM 2.1's mask decoder and prompt encoder on one's own images and masks.

    python train_sam2_proper.py                      the reference guide's loss and settings
    python train_sam2_proper.py --recipe improved    more IoU from as many decoder passes
    python train_sam2_proper.py --test               is everything there that a training needs?

The image encoder stays frozen, so an image is encoded at its first visit only and its features are kept.
Training calls the model's parts through predictor._features, as sagieppel's "Fine-tune SAM2 in 60 lines"
does: predictor.predict() runs under no_grad, nothing could be learnt through it.
"""

import argparse
import atexit
import contextlib
import csv
import errno
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
import sys
import time
import warnings
import zlib
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import psutil
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

try:
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.sam2_image_predictor import SAM2ImagePredictor
except (ImportError, RuntimeError) as error:  # not installed, or hidden by a folder of that name
    sys.exit(f"오류: sam2 패키지를 불러올 수 없습니다 ({error}). 설치: pip install -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot as plt  # noqa: E402, I001  (the backend is chosen first)

# Every setting is also a flag: --lr 1e-4, --image-dir my/images, ...
CONFIG = {
    # model
    "checkpoint": "checkpoints/sam2.1_hiera_small.pt",
    "model_cfg": "configs/sam2.1/sam2.1_hiera_s.yaml",
    "image_size": None,    # None: as the model has it (1024)
    # data
    "image_dir": "data/images/train",
    "mask_dir": "data/masks/train",
    "val_image_dir": "data/images/val",
    "val_mask_dir": "data/masks/val",
    # training
    "recipe": "reference",
    "train_encoder": False,
    "iterations": 3000,    # steps of the optimizer
    "save_every": 500,     # validate and save after so many iterations
    "patience": 0,         # stop after so many validations without a better one; 0: never
    "batch_size": 1,       # images decoded at once, in each process
    "accumulate": 1,       # batches whose gradients make one iteration
    "seed": 0,
    # optimizer
    "lr": 1e-5,
    "weight_decay": 4e-5,
    "scheduler": "none",
    "warmup": 0,           # iterations over which the learning rate grows to lr
    "max_grad_norm": 0.0,  # longer gradients are shortened to this; 0: never
    "amp": True,           # mixed precision, on CUDA
    # loss
    "dice_weight": 0.0,    # of 1 - Dice beside the cross-entropy
    "supervise": "first",  # of the three masks
    # prompts
    "prompt": "point",
    "val_prompt": "point",
    "clicks": 1,           # prompts on each image, decoded at once, each on its own
    "max_points": 3,       # of --prompt points
    # output and system
    "output_dir": "output",
    "device": "auto",
    "cache_gb": None,      # features kept in memory; None: half of the memory that is free
    "cache_dir": None,     # features kept on disk, across runs
    "cache_dtype": "float16",
}
RECIPES = {  # what --recipe sets, where a flag does not say otherwise
    "reference": {},
    # the same 3000 decoder passes; chosen by benchmarks/study_recipes.py, see the guide
    "improved": {"dice_weight": 1.0, "supervise": "all", "prompt": "mixed", "batch_size": 4, "iterations": 750,
                 "save_every": 125, "lr": 3e-4, "scheduler": "cosine", "warmup": 50},
}
FREE_ON_RESUME = {"resume", "test", "iterations", "patience", "output_dir", "device", "cache_gb", "cache_dir",
                  "tensorboard", "wandb"}  # may differ from the run before
MAX_SIDE = 1024        # larger images are reduced to this before training, as in the reference
MIN_FOREGROUND = 100   # pixels; masks with fewer are left out
SCORE_WEIGHT = 0.05    # of the score loss beside the mask loss
BOX_JITTER = 0.1       # standard deviation of a box's sides, as a share of its size, at most 20 px (as in SAM)
LOG_EVERY = 10         # iterations between two rows of train_log.csv
TRAINED = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")  # names of weights
WITH_ENCODER = re.compile(r"image_encoder\.|sam_prompt_encoder\.|sam_mask_decoder\.")  # with --train-encoder
SMOOTHING = 0.98       # running mean of loss and IoU; it starts at the first value

# ---- shared block: the same, letter for letter, in train_sam2_proper.py, compare_models.py, test_my_image.py ----

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
if Path(__file__).resolve().parent.name == "sam2":
    print("주의: 프로젝트 폴더 이름이 sam2라 sam2 패키지와 혼동될 수 있습니다. 다른 이름으로 바꾸세요", file=sys.stderr)
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # a "$" in a file's name is one
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
cv2.utils.logging.setLogLevel(0)  # what is wrong with a file is said once, by this script
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # sam2's own use of it


class ImageError(Exception):
    """An image or mask that cannot be used; the message names the file."""


def fail(message):
    """End with status 1 and one line on stderr: for failures that the user can mend."""
    sys.exit(f"오류: {message}")


class Parser(argparse.ArgumentParser):
    """argparse in Korean: a wrong command line ends with one line and status 1."""

    WORDS = {
        "usage: ": "사용법: ", "options": "옵션", "show this help message and exit": "이 도움말을 보이고 끝냄",
        "argument %(argument_name)s: %(message)s": "%(argument_name)s: %(message)s",
        "invalid %(type)s value: %(value)r": "%(value)r는 쓸 수 없는 값입니다 (%(type)s이어야 함)",
        "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r는 없습니다 (고를 수 있는 값: %(choices)s)",
        "expected one argument": "값이 하나 있어야 합니다", "expected at least one argument": "값이 있어야 합니다",
        "the following arguments are required: %s": "꼭 있어야 하는 옵션이 없습니다: %s",
        "unrecognized arguments: %s": "모르는 옵션입니다: %s",
        "ambiguous option: %(option)s could match %(matches)s": "%(option)s는 %(matches)s 가운데 무엇인지 모릅니다",
        "ignored explicit argument %r": "값을 받지 않는 옵션입니다: %r",
    }

    def error(self, message):
        fail(f"{message} (도움말: python {self.prog} --help)")


argparse._ = lambda text: Parser.WORDS.get(text, text)  # where argparse looks its words up


def reason(error):
    """What an exception says, in one line; an OSError in the user's words."""
    known = {errno.ENOSPC: "디스크가 가득 찼습니다", errno.EACCES: "권한이 없습니다", errno.EPERM: "권한이 없습니다",
             errno.EROFS: "읽기 전용입니다", errno.ENOENT: "파일이나 폴더가 없습니다",
             errno.EISDIR: "파일이 아니라 폴더입니다", errno.ENOTDIR: "폴더가 아니라 파일입니다",
             errno.EEXIST: "폴더여야 하는데 파일이 있습니다", errno.ENAMETOOLONG: "이름이 너무 깁니다"}
    words = known.get(getattr(error, "errno", None)) or getattr(error, "strerror", None) or str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def fail_for(error):
    """End as fail() does, with what an exception says and the file that it names."""
    path = getattr(error, "filename", None)
    fail(f"{path}: {reason(error)}" if path else reason(error))


def out_of_memory(error):
    """Whether an exception says that memory ran out: CUDA, MPS and the CPU each say so in other words."""
    words = re.search("out of memory|not enough memory|can't allocate memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and words is not None)


def write_file(path, content):
    """Write bytes beside `path`, then rename: a reader sees the old file or the new, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path, value):
    """Write a JSON file for people to read: letters as they are, escapes for a file name's bytes that are none."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def save_figure(figure, path):
    """Write a matplotlib figure as a PNG at 100 dots an inch, and close it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    write_file(path, picture.getvalue())


def detect_device(requested="auto"):
    """Name of the device to run on: "mps" if available, else "cuda", else "cpu".

    A device asked for by name ("cuda", "cuda:1", "mps", "cpu") that is not there is an error.
    """
    available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if requested == "auto":
        return next(name for name, there in available.items() if there)
    if not available.get(requested.split(":")[0]):
        usable = ", ".join(name for name, there in available.items() if there)
        fail(f"장치 '{requested}'를 쓸 수 없습니다. 이 컴퓨터에서 쓸 수 있는 장치: {usable}")
    return requested


def calculate_iou(pred_mask, gt_mask):
    """Intersection over union of two boolean H x W masks, 0 to 1: |A∩B| / (|A∪B| + 1e-6)."""
    intersection = np.logical_and(pred_mask, gt_mask).sum()
    union = np.logical_or(pred_mask, gt_mask).sum()
    return float(intersection / (union + 1e-6))


def is_broken(content):
    """Whether a JPEG or PNG file ends too early or, for a PNG, has other checksums than its parts.

    OpenCV would fill the rest of a cut JPEG with grey, and make room for any length that a PNG claims.
    """
    if content.startswith(b"\x89PNG"):
        place = 8
        while place + 12 <= len(content):
            after = place + 8 + int.from_bytes(content[place:place + 4], "big")
            kind, checksum = content[place + 4:place + 8], content[after:after + 4]
            if zlib.crc32(content[place + 4:after]).to_bytes(4, "big") != checksum and kind.isupper():
                return True  # in a part that the picture cannot do without: IHDR, PLTE, IDAT, IEND
            if kind == b"IEND":
                return False
            place = after + 4
        return True
    place = 2
    while content.startswith(b"\xff\xd8") and content[place:place + 1] == b"\xff":
        marker, length = content[place + 1:place + 2], int.from_bytes(content[place + 2:place + 4], "big")
        if marker == b"\xda":  # the picture itself, in which FF D9 stands at the end only
            return content.find(b"\xff\xd9", place) < 0
        place += 2 + length
    return False


def decode_file(path, flags):
    """Decode an image file with OpenCV; ImageError if it is none, or not whole.

    The bytes are read first, because cv2.imread cannot open a path with Korean letters on Windows.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: 읽을 수 없습니다 ({reason(error)})") from None
    if not content or is_broken(content):
        raise ImageError(f"{path}: {'중간에서 잘렸거나 손상되었습니다' if content else '비어 있습니다'}")
    try:
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # for example, more pixels than OpenCV allows
        decoded = None
    if decoded is None:
        raise ImageError(f"{path}: 이미지 파일이 아니거나 손상되었습니다")
    return decoded


def read_image(path):
    """Read an image as uint8 H x W x 3, RGB, upright: grey, RGBA, 16-bit and EXIF-rotated files too.

    Raises ImageError, naming the file, if it cannot be read.
    """
    return cv2.cvtColor(decode_file(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_mask(path):
    """Read a mask as bool H x W: True where the grey value is above 127. Raises as read_image does."""
    return decode_file(path, cv2.IMREAD_GRAYSCALE) > 127


def load_predictor(model_cfg, checkpoint, device, image_size=None):
    """Build a SAM 2 and load its weights; returns a SAM2ImagePredictor on `device`, in eval mode.

    model_cfg: a config inside the sam2 package ("configs/sam2.1/sam2.1_hiera_s.yaml"), or the path of
        a YAML file of your own.
    checkpoint: the official form {"model": state_dict}, or a bare state dict. Nothing in the file is run
        (weights_only=True). A file that is missing, damaged or does not fit the config is an error.
    image_size: the side in pixels that images are resized to, if not the config's own.
    """
    checkpoint, own_config = Path(checkpoint), Path(model_cfg)
    if not checkpoint.is_file():
        official = re.fullmatch(r"sam2\.1_hiera_(tiny|small|base_plus|large)\.pt", checkpoint.name)
        fetch = f" 받기: python download_dataset.py --checkpoint {official[1]}" if official else ""
        fail(f"체크포인트가 없습니다: {checkpoint}.{fetch} (체크포인트 없이 체험하려면: make demo)")
    try:
        config = OmegaConf.load(own_config) if own_config.is_file() else compose(config_name=str(model_cfg))
        OmegaConf.set_struct(config, False)
        config.model.image_size = image_size or config.model.image_size
        config.model.sam_mask_decoder_extra_args = {  # as sam2.build_sam.build_sam2 sets them
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        }
        model = instantiate(config.model, _recursive_=True).eval()
    except Exception as error:  # hydra, OmegaConf and YAML each raise their own kinds
        fail(f"모델 설정을 열 수 없습니다: {model_cfg} ({reason(error)}). 예: configs/sam2.1/sam2.1_hiera_s.yaml")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = dict(weights.get("model", weights))
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        fail(f"체크포인트를 읽을 수 없습니다: {checkpoint} ({reason(error)})")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if differing:
        shown = ", ".join(f"{name} (설정 {expected.get(name, '없음')}, 파일 {shapes.get(name, '없음')})"
                          for name in differing[:3])
        fail(f"체크포인트 {checkpoint}가 설정 {model_cfg}와 맞지 않습니다. 다른 항목 {len(differing)}개: {shown}")
    model.load_state_dict(weights)
    predictor = SAM2ImagePredictor(model.to(device))
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor

# ---- end of shared block ----


def find_pairs(image_dir, mask_dir):
    """Images with a mask of the same stem (mask_dir/STEM.png), as sorted (image path, mask path).

    Fails if a folder is not there, or if two images have the same stem: the mask could be either's.
    """
    for folder in (image_dir, mask_dir):
        if not Path(folder).is_dir():
            fail(f"폴더가 없습니다: {folder}. 데이터 준비: python download_dataset.py 또는 python prepare_data.py")
    images = sorted(p for p in Path(image_dir).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for image, after in zip(images, images[1:]):
        if image.stem == after.stem:
            fail(f"이름이 같은 이미지가 둘입니다: {image}, {after.name}. 하나만 남기세요")
    pairs = [(image, Path(mask_dir) / f"{image.stem}.png") for image in images]
    return [(image, mask) for image, mask in pairs if mask.is_file()]


def middle_point(mask):
    """The middle one of the mask's foreground pixels in row-major order: float32 1 x 2, (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    return np.array([[columns[middle], rows[middle]]], np.float32)


def mask_box(mask):
    """The tight box around the mask's foreground: float32 (x1, y1, x2, y2) in pixels, both ends inside."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], np.float32)


def error_click(predicted, gt_mask):
    """The click that mends most: the pixel deepest inside what is missed (label 1) or too much (label 0).

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


def predict_prompted(predictor, kind, gt_mask):
    """Masks for the image that is set, with a prompt made from gt_mask (bool H x W).

    kind: "point", the mask's middle pixel; "box", its tight box; "points", its middle pixel and then two
        clicks, one after the other, each on the largest error of the mask with the highest score.
    Returns: logits 3 x H x W, scores 3, and the prompt as (coordinates P x 2 in pixels, labels P): 1 for a
        click on the object, 0 beside it, 2 and 3 for a box's corners, as SAM has them.
    """
    coords, labels = (mask_box(gt_mask).reshape(2, 2), [2, 3]) if kind == "box" else (middle_point(gt_mask), [1])
    logits, scores, _ = predictor.predict(coords, np.array(labels), multimask_output=True, return_logits=True)
    for _ in range(2 if kind == "points" else 0):
        point, label = error_click(logits[scores.argmax()] > 0, gt_mask)
        coords, labels = np.concatenate([coords, point]), [*labels, label]
        logits, scores, _ = predictor.predict(coords, np.array(labels), multimask_output=True, return_logits=True)
    return logits, scores, (coords, labels)


def prompt_kind(kind, number):
    """The kind of the number-th prompt: with "mixed", point, points and box in turn."""
    return ("point", "points", "box")[number % 3] if kind == "mixed" else kind


def calculate_dice(pred_mask, gt_mask):
    """Dice coefficient of two boolean H x W masks, 0 to 1: 2|A∩B| / (|A| + |B| + 1e-6)."""
    return float(2 * np.logical_and(pred_mask, gt_mask).sum() / (pred_mask.sum() + gt_mask.sum() + 1e-6))


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(array, size, interpolation=interpolation)


class Masks:
    """The masks of a folder, decoded once and kept as one bit a pixel.

    Larger ones are reduced to max_side. Those with fewer than min_foreground pixels are left out, and
    counted in `left_out`; `paths` are the images of the others.
    """

    def __init__(self, pairs, max_side, min_foreground):
        self.paths, self.bits, self.sizes, self.left_out = [], [], [], 0
        for image_path, mask_path in tqdm(pairs, "마스크 읽기", disable=None, leave=False):
            mask = reduce_to(read_mask(mask_path).astype(np.uint8), max_side, cv2.INTER_NEAREST)
            if mask.sum() < min_foreground:
                self.left_out += 1
                continue
            self.paths.append(image_path)
            self.bits.append(np.packbits(mask))
            self.sizes.append(mask.shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Mask of the index-th image: bool H x W."""
        height, width = self.sizes[index]
        return np.unpackbits(self.bits[index], count=height * width).reshape(height, width).astype(bool)


class FeatureCache:
    """What predictor._features holds for each image, encoded at the first visit and kept from then on.

    limit: bytes to keep in memory. What no longer fits is encoded again at each visit, and rounded to
        `dtype` all the same, so that a result does not depend on what happened to fit. With a limit
        of 0 nothing is kept or rounded.
    folder: if given, features are also kept there as files, across runs. A file's name is a hash of all
        that its content depends on; a file whose checksum is wrong is made anew.
    autocast: encode in mixed precision where the device has it.
    gradients: encode with gradients, for an encoder that is trained; limit must be 0 then.
    """

    def __init__(self, predictor, limit, dtype=torch.float16, folder=None, autocast=True, gradients=False):
        self.predictor, self.limit, self.dtype, self.folder = predictor, limit, dtype, folder
        self.autocast, self.gradients = autocast, gradients
        self.kept, self.encoded = {}, 0
        model = predictor.model
        side, channels = model.image_size, model.hidden_dim
        self.shapes = [(1, channels, side // 16, side // 16), (1, channels // 8, side // 4, side // 4),
                       (1, channels // 4, side // 8, side // 8)]
        self.bytes_per_image = dtype.itemsize * sum(math.prod(shape) for shape in self.shapes)
        if folder:
            frozen = hashlib.sha256(f"{side} {dtype} {predictor.device.type} {autocast}".encode())
            for name, tensor in model.state_dict().items():
                if not TRAINED.match(name):
                    frozen.update(name.encode() + tensor.cpu().numpy().tobytes())
            self.identity = frozen.digest()

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
        image = reduce_to(read_image(path), max(size), cv2.INTER_AREA)
        if image.shape[:2] != size:
            raise ImageError(f"{path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")
        set_image = type(self.predictor).set_image
        with mixed_precision(self.predictor.device, self.autocast):
            (set_image.__wrapped__ if self.gradients else set_image)(self.predictor, image)  # unwrapped: of no_grad
        self.encoded += 1
        levels = [self.predictor._features["image_embed"], *self.predictor._features["high_res_feats"]]
        return [level.to(self.dtype).cpu() for level in levels] if self.limit or self.folder else levels

    def read_or_encode(self, path, size):
        try:
            key = hashlib.sha256(self.identity + repr(size).encode() + path.read_bytes()).hexdigest()
        except OSError as error:
            raise ImageError(f"{path}: 읽을 수 없습니다 ({error.strerror})") from None
        entry = Path(self.folder) / f"{key}.features"
        stored = entry.read_bytes() if entry.is_file() else b""
        checksum, content = stored[:32], stored[32:]
        if len(content) == self.bytes_per_image and hashlib.sha256(content).digest() == checksum:
            values = torch.frombuffer(bytearray(content), dtype=self.dtype)
            parts = values.split([math.prod(shape) for shape in self.shapes])
            return [part.view(shape) for part, shape in zip(parts, self.shapes)]
        levels = self.encode(path, size)
        content = b"".join(level.numpy().tobytes() for level in levels)
        write_file(entry, hashlib.sha256(content).digest() + content)
        return levels


def mixed_precision(device, wanted=True):
    """Autocast on CUDA (bfloat16 where the GPU has it, else float16); does nothing on MPS and CPU."""
    on_cuda = wanted and torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_cuda and torch.cuda.is_bf16_supported() else torch.float16
    return torch.autocast("cuda", dtype, enabled=on_cuda)


def trained_parameters(model, names=TRAINED):
    """Freeze all weights but those whose names match; return what is left to train.

    TRAINED: the mask decoder and the prompt encoder. conv_s0 and conv_s1 belong to the decoder, but they run
    inside set_image, under no_grad: no gradient could ever reach them, so they are frozen too.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names.match(name) is not None)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def random_pixels(rng, mask, count):
    """`count` random true pixels of a bool H x W mask: float32 count x 1 x 2, (x, y) in pixels."""
    y, x = np.divmod(rng.choice(np.flatnonzero(mask), count), mask.shape[1])
    return np.stack([x, y], 1).astype(np.float32)[:, None]


def random_prompts(rng, kind, gt_mask, count):
    """`count` random prompts for one mask: (coordinates count x P x 2 in pixels, labels count x P).

    kind: "box", its box with jittered sides (the corners' labels are 2 and 3, as SAM has them), else a
        random click on it.
    """
    if kind != "box":
        return random_pixels(rng, gt_mask, count), np.ones((count, 1))
    box, (height, width) = mask_box(gt_mask), gt_mask.shape
    spread = BOX_JITTER * np.tile(box[2:] - box[:2], 2)
    box = box + np.clip(rng.normal(0, spread, (count, 4)), -20, 20)
    box = np.clip(box, 0, [width - 1, height - 1, width - 1, height - 1])
    return box.reshape(count, 2, 2).astype(np.float32), np.tile([2.0, 3.0], (count, 1))


def with_clicks_on_errors(rng, prompts, predicted, gt_mask):
    """`prompts` with one more click each, on a random wrong pixel: label 1 if it was missed, 0 if too much.

    prompts: (K x P x 2, K x P); predicted: bool K x H x W; gt_mask: bool H x W. Source: SAM 2's training.
    """
    coords, labels = prompts
    wrong = [mask != gt_mask for mask in predicted]
    added = np.stack([random_pixels(rng, error if error.any() else gt_mask, 1)[0] for error in wrong])
    x, y = added[:, 0].astype(int).T
    return np.concatenate([coords, added], 1), np.concatenate([labels, gt_mask[y, x, None]], 1)


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


def training_loss(logits, scores, gt_mask, dice_weight=0.0, supervise="first"):
    """The loss of the guide ("reference"), or more of it, for the prompts on one image.

    logits: K x 3 x H x W, at the image's size; scores: K x 3 IoUs that the model predicts; with "first",
    only the first mask is looked at, and the others may be left out. gt_mask: float H x W, 0 or 1.
    Returns: (loss, IoU), scalars, means over K. The loss is the binary cross-entropy with 1e-5 inside the
    logarithms, plus dice_weight times 1 - Dice (of probabilities), plus SCORE_WEIGHT times the distance
    between the predicted IoU and the real one: of the first mask, of "all" three on average, or of the
    mask that fits "best" (the scores of all three, as in SAM 2's training). The IoU is that of the mask
    with the highest score among those in the loss.
    """
    if supervise == "first":
        logits, scores = logits[:, :1], scores[:, :1]
    prob = torch.sigmoid(logits)
    mask_loss = (-gt_mask * torch.log(prob + 1e-5) - (1 - gt_mask) * torch.log(1 - prob + 1e-5)).mean((-2, -1))
    if dice_weight:
        dice = (2 * (gt_mask * prob).sum((-2, -1)) + 1) / (gt_mask.sum() + prob.sum((-2, -1)) + 1)
        mask_loss = mask_loss + dice_weight * (1 - dice)
    predicted = (prob > 0.5).float()
    intersection = (gt_mask * predicted).sum((-2, -1))
    iou = intersection / (gt_mask.sum() + predicted.sum((-2, -1)) - intersection + 1e-6)
    score_loss = torch.abs(scores - iou).mean()
    if supervise == "best":
        mask_loss = mask_loss.min(1).values
    shown = iou.gather(1, scores.argmax(1, keepdim=True))
    return mask_loss.mean() + SCORE_WEIGHT * score_loss, shown.mean()


class BatchLoss(torch.nn.Module):
    """The mean training_loss of some images, as the one module that DistributedDataParallel wraps."""

    def __init__(self, predictor, cache, masks, amp=True, dice_weight=0.0, supervise="first"):
        super().__init__()
        self.predictor, self.cache, self.masks, self.amp = predictor, cache, masks, amp
        self.loss = {"dice_weight": dice_weight, "supervise": supervise}
        self.image_encoder = predictor.model.image_encoder
        self.prompt_encoder = predictor.model.sam_prompt_encoder
        self.mask_decoder = predictor.model.sam_mask_decoder

    def forward(self, picks, kind, count, further_clicks=0):
        """(loss, IoU), scalars, for `count` random prompts of a kind on each image.

        picks: (index, random generator) of each image; further_clicks: how many are put, one after the
        other, on what the model got wrong with the prompts before.
        """
        gt_masks = [self.masks[index] for index, _ in picks]
        sizes = [gt_mask.shape for gt_mask in gt_masks]
        features = self.cache([(self.masks.paths[index], size) for (index, _), size in zip(picks, sizes)])
        prompts = [random_prompts(rng, kind, gt_mask, count) for (_, rng), gt_mask in zip(picks, gt_masks)]
        enlarge = self.predictor._transforms.postprocess_masks
        with mixed_precision(self.predictor.device, self.amp):
            for _ in range(further_clicks):
                with torch.no_grad():
                    low_res_masks, scores = predict_masks(self.predictor, features, sizes, prompts)
                best = low_res_masks.gather(1, scores.argmax(1)[:, None, None, None].expand_as(low_res_masks))[:, :1]
                predicted = [(enlarge(own, size)[:, 0] > 0).cpu().numpy()
                             for own, size in zip(best.split(count), sizes)]
                prompts = [with_clicks_on_errors(rng, *rest)
                           for (_, rng), *rest in zip(picks, prompts, predicted, gt_masks)]
            low_res_masks, scores = predict_masks(self.predictor, features, sizes, prompts)
        if self.loss["supervise"] == "first":  # masks that are not in the loss are not enlarged
            low_res_masks = low_res_masks[:, :1]
        results = []
        for gt_mask, own_masks, own_scores in zip(gt_masks, low_res_masks.split(count), scores.float().split(count)):
            logits = enlarge(own_masks, gt_mask.shape)
            target = torch.from_numpy(gt_mask).to(logits.device).float()
            results.append(torch.stack(training_loss(logits, own_scores, target, **self.loss)))
        return torch.stack(results).mean(0).unbind()


def draw_batch(seed, iteration, count, images, kind, max_points):
    """What an iteration trains on: (kind of prompt, further clicks, `count` pairs (index, random generator)).

    All of it follows from the seed and the iteration: so it is the same however many processes share the
    batch, and a resumed training needs no saved random state.
    """
    rng = np.random.default_rng([seed, iteration])
    picks = rng.integers(images, size=count)
    kind = prompt_kind(kind, rng.integers(3))
    further_clicks = int(rng.integers(max_points)) if kind == "points" else 0
    return kind, further_clicks, [(index, np.random.default_rng([seed, iteration, place]))
                                  for place, index in enumerate(picks, start=1)]


def make_schedulers(optimizer, args):
    """torch's schedulers for --scheduler and --warmup; they multiply. "plateau" steps at validations only."""
    schedulers = []
    if args.warmup:
        schedulers.append(lr_scheduler.LinearLR(optimizer, 1 / (args.warmup + 1), total_iters=args.warmup))
    if args.scheduler == "cosine":
        schedulers.append(lr_scheduler.CosineAnnealingLR(optimizer, args.iterations))
    if args.scheduler == "step":  # a tenth after each third
        schedulers.append(lr_scheduler.StepLR(optimizer, math.ceil(args.iterations / 3), gamma=0.1))
    if args.scheduler == "plateau":  # half after two validations without a better one
        schedulers.append(lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1, eps=0))
    return schedulers


def step_schedulers(schedulers, reached=None):
    """Step after an iteration or, with the IoU that it reached, after a validation ("plateau" only)."""
    for scheduler in schedulers:
        if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            if reached is None:
                scheduler.step()
        elif reached is not None:
            scheduler.step(reached)


class Training:
    """All that a run consists of: made from the settings, saved to and taken up from sam2_last.pt."""

    def __init__(self, args, device, rank=0, processes=1):
        self.args, self.rank, self.processes = args, rank, processes
        self.predictor = load_predictor(args.model_cfg, args.checkpoint, device, args.image_size)
        self.model = self.predictor.model
        self.masks, self.val_masks = load_masks(args)
        self.settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        self.settings["processes"] = processes

        free = psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.limit = free if args.cache_gb is None else int(min(free, args.cache_gb * 1e9))
        if args.train_encoder:
            self.limit, args.cache_dir = 0, None  # features change with the encoder
        self.cache = FeatureCache(self.predictor, self.limit, getattr(torch, args.cache_dtype), args.cache_dir,
                                  args.amp, gradients=args.train_encoder)
        self.fitting = min(len(self.masks), self.limit // self.cache.bytes_per_image)
        # validation sees features in full precision, as compare_models.py does, so that its numbers are the same
        val_limit = self.limit - self.fitting * self.cache.bytes_per_image
        self.val_cache = FeatureCache(self.predictor, val_limit, torch.float32, args.cache_dir, autocast=False)
        self.val_fitting = min(len(self.val_masks), val_limit // self.val_cache.bytes_per_image)

        self.parameters = trained_parameters(self.model, WITH_ENCODER if args.train_encoder else TRAINED)
        self.model.sam_mask_decoder.train()
        self.model.sam_prompt_encoder.train()
        self.batch_loss = BatchLoss(self.predictor, self.cache, self.masks, args.amp, args.dice_weight, args.supervise)
        if processes > 1:  # unused: what belongs to the masks that are not in the loss
            self.batch_loss = DistributedDataParallel(self.batch_loss, find_unused_parameters=True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay)
        self.schedulers = make_schedulers(self.optimizer, args)
        half = torch.device(device).type == "cuda" and args.amp and not torch.cuda.is_bf16_supported()
        self.scaler = torch.amp.GradScaler("cuda", enabled=half)
        self.iteration, self.rows, self.mean, self.started = 0, [], None, time.time()
        self.best, self.best_iteration = -1.0, 0

    def step(self, iteration, stop=False):
        """One step of the optimizer. Returns whether any process was asked to stop (by `stop`)."""
        args = self.args
        kind, further_clicks, picks = draw_batch(
            args.seed, iteration, args.batch_size * args.accumulate * self.processes, len(self.masks),
            args.prompt, args.max_points)
        picks = picks[self.rank::self.processes]
        total = torch.zeros(3)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        for start in range(0, len(picks), args.batch_size):
            batch, last = picks[start:start + args.batch_size], start + args.batch_size >= len(picks)
            with contextlib.nullcontext() if last or self.processes == 1 else self.batch_loss.no_sync():
                loss, iou = self.batch_loss(batch, kind, args.clicks, further_clicks)
                values = [loss.item(), iou.item(), 0]
                if not math.isfinite(values[0]):
                    names = ", ".join(self.masks.paths[index].name for index, _ in batch)
                    fail(f"손실이 유한하지 않습니다 ({iteration}회, 이미지 {names}). --lr을 낮춰 보세요. "
                         "이번 반복은 적용하지 않았고, 전에 저장한 모델은 그대로입니다")
                self.scaler.scale(loss / args.accumulate).backward()
            total += torch.tensor(values) / args.accumulate
        if args.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        step_schedulers(self.schedulers)
        total[2] = stop
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
        """Add a row with the running means to the log."""
        self.rows.append({"iteration": self.iteration, "loss": self.mean[0], "train_iou": self.mean[1],
                          "lr": self.lr, "seconds": round(time.time() - self.started, 1)})

    def validate(self):
        """Add what compare_models.py would measure now, and the loss, to the log's last row.

        Returns whether the model is the best so far: by its IoU or, without validation images, by the
        running mean of the training IoU.
        """
        own = []  # with several processes each takes its share of the images
        for index in tqdm(range(self.rank, len(self.val_masks), self.processes), "검증", leave=False,
                          disable=True if self.rank else None):
            gt_mask = self.val_masks[index]
            self.predictor._features = self.val_cache([(self.val_masks.paths[index], gt_mask.shape)])
            self.predictor._orig_hw, self.predictor._is_image_set = [gt_mask.shape], True
            logits, scores, _ = predict_prompted(self.predictor, prompt_kind(self.args.val_prompt, index), gt_mask)
            loss, _ = training_loss(torch.from_numpy(logits[None]), torch.from_numpy(scores[None]),
                                    torch.from_numpy(gt_mask).float(), self.args.dice_weight, self.args.supervise)
            best = logits[scores.argmax()] > 0
            own.append((loss.item(), calculate_iou(best, gt_mask), calculate_dice(best, gt_mask)))
        if self.processes > 1:
            shares = [None] * self.processes
            torch.distributed.all_gather_object(shares, own)
            own = sum(shares, [])
        if own:
            means = (float(np.mean(values)) for values in zip(*own))
            self.rows[-1].update(zip(("val_loss", "val_iou", "val_dice"), means))
        reached = self.rows[-1].get("val_iou", self.mean[1])
        step_schedulers(self.schedulers, reached)
        if better := reached > self.best:
            self.best, self.best_iteration = reached, self.iteration
        return better

    def write(self, better):
        """Write the log, sam2_last.pt and, if the last validation was the best so far, sam2_best.pt."""
        if better:
            save_model(self.model, self.args.output_dir / "sam2_best.pt")
        save_log(self.rows, self.args.output_dir)
        self.save(self.args.output_dir / "sam2_last.pt")

    def report(self):
        """The line that the terminal shows for the log's last row."""
        row = self.rows[-1]
        validated = (f"검증 IoU {row['val_iou']:.2%}, Dice {row['val_dice']:.2%}" if "val_iou" in row else "검증 없음")
        return (f"[{row['iteration']}/{self.args.iterations}] loss {row['loss']:.4f}, "
                f"학습 IoU {row['train_iou']:.2%}, {validated}")

    def out_of_patience(self):
        """Whether so many validations as --patience says have passed without a better one."""
        waited = self.iteration - self.best_iteration
        return 0 < self.args.patience * self.args.save_every <= waited

    def save(self, path):
        """Save all that --resume needs; the model lies in it in the official form."""
        save_model(self.model, path, optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                   schedulers=[scheduler.state_dict() for scheduler in self.schedulers],
                   iteration=self.iteration, rows=self.rows, mean=self.mean, best=self.best,
                   best_iteration=self.best_iteration, seconds=time.time() - self.started,
                   settings=json.dumps(self.settings), data=data_fingerprint(self.masks))

    def load(self, path):
        """Go on from what save() wrote; fail, with the reason, if it belongs to another training."""
        try:
            last = torch.load(path, map_location="cpu", weights_only=True)
            before = json.loads(last["settings"])
        except FileNotFoundError:
            fail(f"이어서 할 학습이 없습니다: {path}")
        except Exception as error:  # torch.load raises a dozen kinds for a damaged file
            fail(f"{path}를 읽을 수 없습니다 ({type(error).__name__})")
        fixed = {"iterations"} if self.args.scheduler in ("cosine", "step") else set()  # their length is the run's
        changed = [f"{name} {before.get(name)} → {value}" for name, value in self.settings.items()
                   if name not in FREE_ON_RESUME - fixed and before.get(name) != value]
        if changed:
            fail(f"{path}는 설정이 다른 학습이라 이어서 할 수 없습니다: {', '.join(changed)}")
        if last["data"] != data_fingerprint(self.masks):
            fail(f"{path}는 다른 데이터로 한 학습이라 이어서 할 수 없습니다: 학습 이미지나 마스크가 바뀌었습니다")
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.scaler.load_state_dict(last["scaler"])
        for scheduler, state in zip(self.schedulers, last["schedulers"]):
            scheduler.load_state_dict(state)
        for name in ("iteration", "rows", "mean", "best", "best_iteration"):
            setattr(self, name, last[name])
        self.started = time.time() - last["seconds"]


def save_model(model, path, **more):
    """Save in the official form {"model": state_dict}, which every SAM 2 tool opens; `more` goes beside it.

    Weights that are not finite are never saved.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail("가중치가 유한하지 않아 저장하지 않습니다. --lr을 낮춰 보세요. 전에 저장한 모델은 그대로입니다")
    buffer = io.BytesIO()
    torch.save({"model": weights, **more}, buffer)
    write_file(path, buffer.getbuffer())


def data_fingerprint(masks):
    """A hash of the training images' names and their masks."""
    digest = hashlib.sha256()
    for path, bits, size in zip(masks.paths, masks.bits, masks.sizes):
        digest.update(os.fsencode(f"{path.name} {size}") + bits.tobytes())
    return digest.hexdigest()


def load_masks(args):
    """The training masks and the validation masks (none, if there is no folder of validation images)."""
    masks = Masks(find_pairs(args.image_dir, args.mask_dir), MAX_SIDE, MIN_FOREGROUND)
    if not masks:
        fail(f"학습할 쌍이 없습니다: {args.image_dir}, {args.mask_dir}. 확인: python prepare_data.py --check")
    val_pairs = find_pairs(args.val_image_dir, args.val_mask_dir) if Path(args.val_image_dir).is_dir() else []
    return masks, Masks(val_pairs, math.inf, 1)


def save_log(rows, output_dir):
    """Write train_log.csv and training_curve.png from the rows logged so far."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["iteration", "loss", "train_iou", "lr", "val_loss", "val_iou", "val_dice",
                                   "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_file(output_dir / "train_log.csv", text.getvalue().encode())

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


def versions():
    """The versions of Python and of the packages that a result depends on."""
    packages = ("torchvision", "sam2", "numpy", "opencv-python")
    return {"python": platform.python_version(), "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in packages}}


def save_summary(training, device):
    """Write training_summary.json."""
    summary = {
        "settings": training.settings, "device": device, "versions": versions(),
        "train_images": len(training.masks), "val_images": len(training.val_masks),
        "trained_weights": sum(parameter.numel() for parameter in training.parameters),
        "encodings": training.cache.encoded + training.val_cache.encoded,
        "iterations": training.iteration, "best_iou": training.best, "best_iteration": training.best_iteration,
        "best_chosen_by": "validation IoU" if training.val_masks else "training IoU",
        "seconds": round(time.time() - training.started, 1),
    }
    write_json(training.args.output_dir / "training_summary.json", summary)


def open_trackers(args):
    """Functions that take (iteration, values by name), for --tensorboard and --wandb; fail if not installed."""
    trackers = []
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard를 쓰려면 tensorboard 패키지가 필요합니다: pip install tensorboard")
        writer = SummaryWriter(args.output_dir / "tensorboard")

        def track(iteration, values):
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            writer.flush()
        trackers.append(track)
    if args.wandb:
        try:
            import wandb
        except ImportError:
            fail("--wandb를 쓰려면 wandb 패키지가 필요합니다: pip install wandb")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run = wandb.init(project=args.wandb, dir=args.output_dir, config=vars(args))
        trackers.append(lambda iteration, values: run.log(values, step=iteration))
    return trackers


def lock(path):
    """Lock the file at `path` until the process ends, however it ends; fail if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"같은 폴더에서 이미 실행 중입니다 ({path}). 끝난 뒤에 다시 하거나 다른 폴더를 쓰세요")

    def unlock():
        file.close()
        path.unlink(missing_ok=True)
    atexit.register(unlock)


def join_processes(requested):
    """(rank, number of processes, device): 0, 1 and the device, or as torchrun says; only rank 0 speaks."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = detect_device(requested)
    if processes > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (stays open to the end)
    return rank, processes, device


def system_check(args):
    """--test: try all that a training needs, one line each. Returns whether all of it is there."""
    def memory():
        free = psutil.virtual_memory().available / 1e9
        if free < 2:
            fail(f"{free:.1f} GB 남음. 2 GB는 있어야 합니다: 다른 프로그램을 닫아 보세요")
        on_gpu = f", GPU {torch.cuda.mem_get_info()[0] / 1e9:.1f} GB 남음" if torch.cuda.is_available() else ""
        return f"{free:.1f} GB 남음{on_gpu}"

    def checkpoint():
        model = load_predictor(args.model_cfg, args.checkpoint, "cpu", args.image_size).model
        return f"{args.checkpoint}, 가중치 {sum(weight.numel() for weight in model.parameters()):,}개"

    def data():
        masks, val_masks = load_masks(args)
        return f"학습 {len(masks)}장 (뺀 {masks.left_out}장), 검증 {len(val_masks)}장"

    def output():
        write_file(args.output_dir / "check.tmp", b"")
        (args.output_dir / "check.tmp").unlink()
        return str(args.output_dir)

    def iteration():
        training, started = Training(args, detect_device(args.device)), time.time()
        training.step(1)
        return f"loss {training.mean[0]:.4f}, {time.time() - started:.1f}초 (이미지를 처음 인코딩하는 시간 포함)"

    passed = True
    for name, check in (("장치", lambda: detect_device(args.device)), ("메모리", memory),
                        ("버전", lambda: ", ".join(" ".join(pair) for pair in versions().items())),
                        ("체크포인트", checkpoint), ("데이터", data), ("결과 폴더", output), ("학습 1회", iteration)):
        try:
            print(f"✓ {name}: {check()}", flush=True)
        except (SystemExit, ImageError, OSError, RuntimeError) as error:
            print(f"✗ {name}: {reason(error).removeprefix('오류: ')}", flush=True)
            passed = False
    return passed


def on_interrupt(interrupted, processes):
    """Ctrl-C: let the iteration end and be saved; a second one ends the program at once.

    Below torchrun every process gets two, one of them from torchrun, and only the first may count.
    """
    interrupted.append(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN if processes > 1 else signal.SIG_DFL)
    print("이번 반복을 마치고 저장합니다. 바로 끝내려면 Ctrl-C를 한 번 더 누르세요.")


def command_to_go_on(processes):
    """The command line that goes on with this training."""
    start = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else [Path(sys.executable).name]
    return shlex.join([*start, *sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])])


def parse_args():
    parser = Parser(
        description="SAM 2.1의 마스크 디코더와 프롬프트 인코더를 내 데이터로 파인튜닝합니다.")

    def setting(name, kind, text, **options):
        default = "" if CONFIG[name] is None else f" (기본: {CONFIG[name]})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=CONFIG[name], help=text + default,
                            **options)

    setting("checkpoint", str, "원본 SAM 2.1 체크포인트")
    setting("model_cfg", str, "sam2 패키지 안의 모델 설정 이름 또는 내 YAML 파일 경로")
    setting("image_size", int, "모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 1024에서 배운 것이라 "
            "정확도가 떨어짐 (기본: 모델 설정대로)", choices=[512, 768, 1024])
    setting("image_dir", str, "학습 이미지 폴더")
    setting("mask_dir", str, "학습 마스크 폴더 (이미지와 이름이 같은 PNG)")
    setting("val_image_dir", str, "검증 이미지 폴더")
    setting("val_mask_dir", str, "검증 마스크 폴더")
    setting("recipe", str, "학습 방법: reference 원래 가이드의 손실 그대로, improved 같은 계산량으로 IoU를 더 올리는 "
            "설정 묶음(따로 준 옵션이 우선)", choices=list(RECIPES))
    parser.add_argument("--train-encoder", action="store_true",
                        help="이미지 인코더까지 학습: 캐시 없이 느리고 메모리를 훨씬 더 씀 (기본: 고정)")
    setting("iterations", int, "총 학습 반복 횟수")
    setting("save_every", int, "몇 번 반복할 때마다 검증하고 저장할지")
    setting("patience", int, "검증을 몇 번 하는 동안 나아지지 않으면 일찍 끝낼지, 0이면 끝까지")
    setting("batch_size", int, "한 번에 디코딩할 이미지 수 (프로세스마다)")
    setting("accumulate", int, "기울기를 몇 배치 모아 한 번 학습할지: 메모리를 더 쓰지 않고 배치를 키움")
    setting("seed", int, "난수 시드: 같은 값이면 같은 순서로 학습")
    setting("lr", float, "학습률")
    setting("weight_decay", float, "가중치 감쇠")
    setting("scheduler", str, "학습률을 바꾸는 방법: none 그대로, cosine 끝에서 0까지 부드럽게, step 3분의 1이 지날 "
            "때마다 10분의 1, plateau 검증이 두 번 나아지지 않으면 절반", choices=["none", "cosine", "step", "plateau"])
    setting("warmup", int, "처음 몇 번 반복하는 동안 학습률을 0 가까이에서부터 올릴지")
    setting("max_grad_norm", float, "기울기의 길이를 이 값까지 줄임, 0이면 줄이지 않음")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=CONFIG["amp"],
                        help="CUDA에서 혼합 정밀도를 쓸지, 다른 장치에서는 늘 꺼짐 (기본: 씀)")
    setting("dice_weight", float, "교차 엔트로피에 더할 Dice 손실의 배수, 0이면 더하지 않음")
    setting("supervise", str, "손실에 넣을 마스크: first 첫째만, all 셋 모두, best 가장 잘 맞는 것만",
            choices=["first", "all", "best"])
    setting("prompt", str, "학습할 프롬프트: point 마스크 안의 점 하나, points 거기에 틀린 곳의 점을 더함, "
            "box 조금 흔든 상자, mixed 셋을 섞음", choices=["point", "points", "box", "mixed"])
    setting("val_prompt", str, "검증할 프롬프트: compare_models.py --prompt와 같음",
            choices=["point", "points", "box", "mixed"])
    setting("clicks", int, "이미지마다 한 번에 디코딩할 프롬프트 수")
    setting("max_points", int, "--prompt points에서 점을 많아야 몇 개 찍을지")
    setting("output_dir", Path, "결과를 쓸 폴더")
    parser.add_argument("--resume", action="store_true", help="중단된 학습을 결과 폴더의 sam2_last.pt에서 이어서 하기")
    parser.add_argument("--test", action="store_true", help="학습하지 않고, 필요한 것이 다 있는지 1분 안에 검사하기")
    parser.add_argument("--tensorboard", action="store_true", help="결과 폴더의 tensorboard/에 TensorBoard 로그도 쓰기")
    parser.add_argument("--wandb", metavar="PROJECT", help="Weights & Biases의 이 프로젝트에도 기록")
    setting("device", str, "장치: auto, mps, cuda, cpu")
    setting("cache_gb", float, "이미지 특징을 메모리에 둘 한도(GB), 0이면 끔 (기본: 남은 메모리의 절반)")
    setting("cache_dir", Path, "이미지 특징을 파일로도 남겨 다음 실행에 다시 쓸 폴더 (기본: 쓰지 않음)")
    setting("cache_dtype", str, "남겨 둘 특징의 정밀도", choices=["float16", "float32"])
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    for least, names in ((1, ("iterations", "save_every", "batch_size", "accumulate", "clicks", "max_points")),
                         (0, ("seed", "patience", "warmup", "lr", "weight_decay", "max_grad_norm", "dice_weight",
                          "cache_gb"))):
        for name in names:
            if getattr(args, name) is not None and not getattr(args, name) >= least:
                parser.error(f"--{name.replace('_', '-')}는 {least} 이상이어야 합니다")
    return args


def print_setup(training, device):
    """Print what is about to be trained, on what."""
    masks, val_masks, cache = training.masks, training.val_masks, training.cache
    trained = sum(parameter.numel() for parameter in training.parameters)
    total = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"장치: {device}" + (f", 프로세스 {training.processes}개" if training.processes > 1 else ""))
    print(f"학습 {len(masks)}장 (전경 {MIN_FOREGROUND}픽셀 미만이라 뺀 {masks.left_out}장), 검증 {len(val_masks)}장")
    print(f"학습하는 가중치: {trained:,} / {total:,} (" + (
        "이미지 인코더도 학습하므로 특징을 캐시하지 않음" if training.args.train_encoder else
        "이미지 인코더와 conv_s0, conv_s1은 고정") + ")")
    print(f"특징 캐시: 학습 {len(masks)}장 중 {training.fitting}장, "
          f"검증 {len(val_masks)}장 중 {training.val_fitting}장이 들어갑니다 "
          f"(한 장 {cache.bytes_per_image / 1e6:.2g} MB, 한도 {cache.limit / 1e9:.3g} GB)"
          + (f", 파일로도 남깁니다: {cache.folder}" if cache.folder else ""))
    if not val_masks:
        print("검증 데이터가 없어 학습 IoU(이동 평균)로 최고 모델을 고릅니다.")


def main():
    """Train as the command line says; returns the finished Training, for whoever calls this from Python."""
    args = parse_args()
    if args.test:
        sys.exit(not system_check(args))
    rank, processes, device = join_processes(args.device)
    if rank == 0:
        lock(args.output_dir / ".lock")
        for left in args.output_dir.glob("*.[0-9]*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
    trackers = [] if rank else open_trackers(args)
    training = Training(args, device, rank, processes)
    print_setup(training, device)
    if args.resume:
        training.load(args.output_dir / "sam2_last.pt")
        print(f"{training.iteration}회까지 한 학습을 이어서 합니다.")

    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: on_interrupt(interrupted, processes))
    bar = tqdm(range(training.iteration + 1, args.iterations + 1), "학습", initial=training.iteration,
               total=args.iterations, disable=True if rank else None)
    for iteration in bar:
        stopping, better = training.step(iteration, bool(interrupted)), False
        bar.set_postfix(loss=f"{training.mean[0]:.4f}", IoU=f"{training.mean[1]:.1%}", refresh=False)
        validating = iteration % args.save_every == 0 or iteration == args.iterations
        if validating or iteration % LOG_EVERY == 0 or iteration == 1:
            training.log()
            if validating:
                better = training.validate()
                bar.write(training.report())
            for track in trackers:
                track(iteration, training.rows[-1])
        if (validating or stopping) and rank == 0:
            training.write(better)
        if stopping:
            bar.close()
            print(f"{iteration}회까지 저장했습니다. 이어서 하려면: {command_to_go_on(processes)}")
            sys.exit(130)
        if training.out_of_patience():
            bar.close()
            print(f"{iteration}회에 일찍 끝냅니다: {training.best_iteration}회 뒤로 나아지지 않았습니다.")
            break

    if rank == 0:
        save_model(training.model, args.output_dir / "sam2_final.pt")
        save_summary(training, device)
    minutes, seconds = divmod(round(time.time() - training.started), 60)
    rows, chosen_by = training.rows, "검증" if training.val_masks else "학습"
    print(f"학습 시간 {minutes}분 {seconds}초, 학습 IoU(이동 평균) {rows[0]['train_iou']:.1%} → "
          f"{rows[-1]['train_iou']:.1%}, {chosen_by} 최고 IoU {training.best:.2%} ({training.best_iteration}회)")
    print(f"저장: {args.output_dir / 'sam2_best.pt'}, {args.output_dir / 'sam2_final.pt'}")
    if processes > 1:
        torch.distributed.destroy_process_group()
    return training


if __name__ == "__main__":
    try:
        main()
    except (ImageError, OSError) as error:
        fail_for(error)
    except KeyboardInterrupt:
        fail("중단했습니다. 저장한 것이 있으면 --resume으로 이어서 할 수 있습니다")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("메모리가 부족합니다. --batch-size나 --clicks를 줄이고 --accumulate를 늘리거나, --image-size 512를 쓰세요")

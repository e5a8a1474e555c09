"""Fine-tune SAM 2.1's mask decoder and prompt encoder on one's own images and masks.

    python train_sam2_proper.py

The image encoder stays frozen, so an image is encoded at its first visit only and its features are kept.
Training calls the model's parts through predictor._features, as sagieppel's "Fine-tune SAM2 in 60 lines"
does: predictor.predict() runs under no_grad, nothing could be learnt through it.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import psutil
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)

# Every setting is also a flag: --lr 1e-4, --image-dir my/images, ...
CONFIG = {
    # model
    "checkpoint": "checkpoints/sam2.1_hiera_small.pt",
    "model_cfg": "configs/sam2.1/sam2.1_hiera_s.yaml",
    # data
    "image_dir": "data/images/train",
    "mask_dir": "data/masks/train",
    "val_image_dir": "data/images/val",
    "val_mask_dir": "data/masks/val",
    # training
    "iterations": 3000,
    "save_every": 500,    # validate and save after so many iterations
    "lr": 1e-5,
    "weight_decay": 4e-5,
    "batch_size": 1,      # images decoded at once
    "clicks": 1,          # clicks on each of them, decoded at once, each a prompt of its own
    "seed": 0,
    # system
    "output_dir": "output",
    "device": "auto",
    "image_size": None,   # None: as the model has it (1024)
    "cache_gb": None,     # features kept in memory; None: half of the memory that is free
    "cache_dir": None,    # features kept on disk, across runs
    "cache_dtype": "float16",
}
FREE_ON_RESUME = {"resume", "iterations", "output_dir", "device", "cache_gb", "cache_dir"}  # may differ from before
MAX_SIDE = 1024        # larger images are reduced to this before training, as in the reference
MIN_FOREGROUND = 100   # pixels; masks with fewer are left out
SCORE_WEIGHT = 0.05    # of the score loss beside the mask loss
LOG_EVERY = 10         # iterations between two rows of train_log.csv
TRAINED = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")  # names of weights
SMOOTHING = 0.98       # running mean of loss and IoU; it starts at the first value

# ---- shared block: the same, letter for letter, in train_sam2_proper.py, compare_models.py, test_my_image.py ----

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # sam2's own use of it


class ImageError(Exception):
    """An image or mask that cannot be used; the message names the file."""


def fail(message):
    """Print one line to stderr and exit with status 1: for failures that the user can mend."""
    print(f"오류: {message}", file=sys.stderr)
    sys.exit(1)


def write_file(path, content):
    """Write bytes beside `path`, then rename: a reader sees the old file or the new, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    beside.replace(path)


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


def decode_file(path, flags):
    """Decode an image file with OpenCV; ImageError if it is none.

    The bytes are read first, because cv2.imread cannot open a path with Korean letters on Windows.
    """
    try:
        decoded = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), flags)
    except (OSError, cv2.error) as error:
        reason = error.strerror if isinstance(error, OSError) else "이미지 파일이 아니거나 비어 있습니다"
        raise ImageError(f"{path}: 읽을 수 없습니다 ({reason})") from None
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fail(f"모델 설정을 열 수 없습니다: {model_cfg} ({reason}). 예: configs/sam2.1/sam2.1_hiera_s.yaml")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = dict(weights.get("model", weights))
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fail(f"체크포인트를 읽을 수 없습니다: {checkpoint} ({reason})")
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
    """Images with a mask of the same stem (mask_dir/STEM.png), as sorted (image path, mask path)."""
    for folder in (image_dir, mask_dir):
        if not Path(folder).is_dir():
            fail(f"폴더가 없습니다: {folder}. 데이터 준비: python download_dataset.py 또는 python prepare_data.py")
    images = sorted(p for p in Path(image_dir).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pairs = [(image, Path(mask_dir) / f"{image.stem}.png") for image in images]
    return [(image, mask) for image, mask in pairs if mask.is_file()]


def middle_point(mask):
    """The middle one of the mask's foreground pixels in row-major order: float32 1 x 2, (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    return np.array([[columns[middle], rows[middle]]], np.float32)


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
    """

    def __init__(self, predictor, limit, dtype=torch.float16, folder=None, autocast=True):
        self.predictor, self.limit, self.dtype, self.folder = predictor, limit, dtype, folder
        self.autocast = autocast
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
        with mixed_precision(self.predictor.device, self.autocast):
            self.predictor.set_image(image)
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


def trained_parameters(model):
    """Freeze everything but the mask decoder and the prompt encoder; return what is left to train.

    conv_s0 and conv_s1 belong to the decoder, but they run inside set_image, under no_grad: no gradient
    could ever reach them, so they are frozen too.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED.match(name) is not None)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def random_clicks(rng, mask, count):
    """`count` random foreground pixels of a bool H x W mask: float32 count x 1 x 2, (x, y) in pixels."""
    y, x = np.divmod(rng.choice(np.flatnonzero(mask), count), mask.shape[1])
    return np.stack([x, y], 1).astype(np.float32)[:, None]


def predict_masks(predictor, features, sizes, points):
    """Decode positive clicks with gradients: what predictor.predict() does, without its no_grad.

    features: of N images, as in predictor._features; sizes: their N (H, W); points: N arrays K x 1 x 2,
    (x, y) in pixels of the image.
    Returns: low-resolution logits N*K x 3 x h x w and predicted scores N*K x 3.
    """
    model = predictor.model
    predictor._features, predictor._orig_hw, predictor._is_image_set = features, sizes, True
    prompts = [predictor._prep_prompts(coords, np.ones(coords.shape[:2]), None, None, True, img_idx=number)
               for number, coords in enumerate(points)]
    coords, labels = (torch.cat([prompt[part] for prompt in prompts]) for part in (1, 2))
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)

    def for_each_click(level):
        return level[:, None].expand(-1, len(points[0]), -1, -1, -1).flatten(0, 1)

    low_res_masks, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=for_each_click(features["image_embed"]),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=False,
        high_res_features=[for_each_click(level) for level in features["high_res_feats"]],
    )
    return low_res_masks, scores


def training_loss(logits, scores, gt_mask):
    """The guide's loss for the clicks on one image.

    logits: (K x) H x W, at the image's size; scores: (K) IoUs that the model predicts; gt_mask: float
    H x W, 0 or 1.
    Returns: (loss, IoU), scalars, means over K: binary cross-entropy with 1e-5 inside the logarithms, plus
    SCORE_WEIGHT times the distance between the predicted IoU and the real one.
    """
    prob = torch.sigmoid(logits)
    seg_loss = (-gt_mask * torch.log(prob + 1e-5) - (1 - gt_mask) * torch.log(1 - prob + 1e-5)).mean()
    predicted = (prob > 0.5).float()
    intersection = (gt_mask * predicted).sum((-2, -1))
    iou = intersection / (gt_mask.sum() + predicted.sum((-2, -1)) - intersection + 1e-6)
    score_loss = torch.abs(scores - iou).mean()
    return seg_loss + SCORE_WEIGHT * score_loss, iou.mean()


def batch_loss(predictor, cache, masks, picks, clicks, rng):
    """Mean training_loss over the images at the indices `picks`, with random clicks on each: (loss, IoU)."""
    gt_masks = [masks[index] for index in picks]
    sizes = [gt_mask.shape for gt_mask in gt_masks]
    points = [random_clicks(rng, gt_mask, clicks) for gt_mask in gt_masks]
    features = cache([(masks.paths[index], size) for index, size in zip(picks, sizes)])
    with mixed_precision(predictor.device):
        low_res_masks, scores = predict_masks(predictor, features, sizes, points)
    results = []
    for gt_mask, own_masks, own_scores in zip(gt_masks, low_res_masks.split(clicks), scores.float().split(clicks)):
        # only the first of the three masks enters the loss, so only that one is enlarged
        logits = predictor._transforms.postprocess_masks(own_masks[:, :1], gt_mask.shape)
        target = torch.from_numpy(gt_mask).to(logits.device).float()
        results.append(torch.stack(training_loss(logits[:, 0], own_scores[:, 0], target)))
    return torch.stack(results).mean(0)


def validate(predictor, cache, masks):
    """Mean IoU and Dice, as compare_models.py measures them: middle click, mask with the highest score."""
    ious, dices = [], []
    for index in tqdm(range(len(masks)), "검증", disable=None, leave=False):
        gt_mask = masks[index]
        predictor._features, predictor._orig_hw = cache([(masks.paths[index], gt_mask.shape)]), [gt_mask.shape]
        predictor._is_image_set = True
        predicted, scores, _ = predictor.predict(middle_point(gt_mask), np.ones(1), multimask_output=True)
        best = predicted[scores.argmax()] > 0
        ious.append(calculate_iou(best, gt_mask))
        dices.append(calculate_dice(best, gt_mask))
    return float(np.mean(ious)), float(np.mean(dices))


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
        digest.update(f"{path.name} {size}".encode() + bits.tobytes())
    return digest.hexdigest()


def load_last(path, settings, data):
    """Read sam2_last.pt to go on from; fail, with the reason, if it belongs to another training.

    settings: this run's, which must equal those before but for FREE_ON_RESUME; data: its fingerprint.
    """
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        before = json.loads(last["settings"])
    except FileNotFoundError:
        fail(f"이어서 할 학습이 없습니다: {path}")
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        fail(f"{path}를 읽을 수 없습니다 ({type(error).__name__})")
    changed = [f"{name} {before.get(name)} → {value}" for name, value in settings.items()
               if name not in FREE_ON_RESUME and before.get(name) != value]
    if changed:
        fail(f"{path}는 설정이 다른 학습이라 이어서 할 수 없습니다: {', '.join(changed)}")
    if last["data"] != data:
        fail(f"{path}는 다른 데이터로 한 학습이라 이어서 할 수 없습니다: 학습 이미지나 마스크가 바뀌었습니다")
    return last


def save_log(rows, output_dir):
    """Write train_log.csv and training_curve.png from the rows logged so far."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["iteration", "loss", "train_iou", "val_iou", "val_dice", "seconds"])
    writer.writeheader()
    writer.writerows(rows)
    write_file(output_dir / "train_log.csv", text.getvalue().encode())

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    iterations = [row["iteration"] for row in rows]
    left.plot(iterations, [row["loss"] for row in rows], label="training (running mean)")
    right.plot(iterations, [row["train_iou"] for row in rows], label="training (running mean)")
    validated = [row for row in rows if "val_iou" in row]
    if validated:
        right.plot([row["iteration"] for row in validated], [row["val_iou"] for row in validated], "o-",
                   label="validation")
    for axes, name in ((left, "loss"), (right, "IoU")):
        axes.set(xlabel="iteration", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    right.set_ylim(0, 1)
    save_figure(figure, output_dir / "training_curve.png")


def on_interrupt(interrupted):
    """Ctrl-C: let the iteration end and be saved; a second one ends the program at once."""
    interrupted.append(True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("이번 반복을 마치고 저장합니다. 바로 끝내려면 Ctrl-C를 한 번 더 누르세요.")


def parse_args():
    parser = argparse.ArgumentParser(
        description="SAM 2.1의 마스크 디코더와 프롬프트 인코더를 내 데이터로 파인튜닝합니다.")

    def setting(name, kind, text, **options):
        default = "" if CONFIG[name] is None else f" (기본: {CONFIG[name]})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=CONFIG[name], help=text + default,
                            **options)

    setting("checkpoint", str, "원본 SAM 2.1 체크포인트")
    setting("model_cfg", str, "sam2 패키지 안의 모델 설정 이름 또는 내 YAML 파일 경로")
    setting("image_dir", str, "학습 이미지 폴더")
    setting("mask_dir", str, "학습 마스크 폴더 (이미지와 이름이 같은 PNG)")
    setting("val_image_dir", str, "검증 이미지 폴더")
    setting("val_mask_dir", str, "검증 마스크 폴더")
    setting("iterations", int, "총 학습 반복 횟수")
    setting("save_every", int, "몇 번 반복할 때마다 검증하고 저장할지")
    setting("lr", float, "학습률")
    setting("weight_decay", float, "가중치 감쇠")
    setting("batch_size", int, "한 번에 디코딩할 이미지 수")
    setting("clicks", int, "이미지마다 한 번에 디코딩할 클릭 수")
    setting("seed", int, "난수 시드: 같은 값이면 같은 순서로 학습")
    setting("output_dir", Path, "결과를 쓸 폴더")
    parser.add_argument("--resume", action="store_true", help="중단된 학습을 결과 폴더의 sam2_last.pt에서 이어서 하기")
    setting("device", str, "장치: auto, mps, cuda, cpu")
    setting("image_size", int, "모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 1024에서 배운 것이라 "
            "정확도가 떨어짐 (기본: 모델 설정대로)", choices=[512, 768, 1024])
    setting("cache_gb", float, "이미지 특징을 메모리에 둘 한도(GB), 0이면 끔 (기본: 남은 메모리의 절반)")
    setting("cache_dir", Path, "이미지 특징을 파일로도 남겨 다음 실행에 다시 쓸 폴더 (기본: 쓰지 않음)")
    setting("cache_dtype", str, "남겨 둘 특징의 정밀도", choices=["float16", "float32"])
    args = parser.parse_args()
    for name in ("iterations", "save_every", "batch_size", "clicks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}는 1 이상이어야 합니다")
    return args


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    device = detect_device(args.device)
    predictor = load_predictor(args.model_cfg, args.checkpoint, device, args.image_size)
    model = predictor.model

    masks = Masks(find_pairs(args.image_dir, args.mask_dir), MAX_SIDE, MIN_FOREGROUND)
    if not masks:
        fail(f"학습할 쌍이 없습니다: {args.image_dir}, {args.mask_dir}. 확인: python prepare_data.py --check")
    val_pairs = find_pairs(args.val_image_dir, args.val_mask_dir) if Path(args.val_image_dir).is_dir() else []
    val_masks = Masks(val_pairs, math.inf, 1)

    free = psutil.virtual_memory().available // 2
    limit = free if args.cache_gb is None else min(free, int(args.cache_gb * 1e9))
    cache = FeatureCache(predictor, limit, getattr(torch, args.cache_dtype), args.cache_dir)
    fitting = min(len(masks), limit // cache.bytes_per_image)
    # validation sees features in full precision, as compare_models.py does, so that its numbers are the same
    val_limit = limit - fitting * cache.bytes_per_image
    val_cache = FeatureCache(predictor, val_limit, torch.float32, args.cache_dir, autocast=False)
    val_fitting = min(len(val_masks), val_limit // val_cache.bytes_per_image)
    parameters = trained_parameters(model)
    model.sam_mask_decoder.train()
    model.sam_prompt_encoder.train()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    half = torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported()
    scaler = torch.amp.GradScaler("cuda", enabled=half)

    trained = sum(parameter.numel() for parameter in parameters)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"장치: {device}")
    print(f"학습 {len(masks)}장 (전경 {MIN_FOREGROUND}픽셀 미만이라 뺀 {masks.left_out}장), 검증 {len(val_masks)}장")
    print(f"학습하는 가중치: {trained:,} / {total:,} (이미지 인코더와 conv_s0, conv_s1은 고정)")
    print(f"특징 캐시: 학습 {len(masks)}장 중 {fitting}장, 검증 {len(val_masks)}장 중 {val_fitting}장이 들어갑니다 "
          f"(한 장 {cache.bytes_per_image / 1e6:.2g} MB, 한도 {limit / 1e9:.3g} GB)"
          + (f", 파일로도 남깁니다: {args.cache_dir}" if args.cache_dir else ""))
    if not val_masks:
        print("검증 데이터가 없어 학습 IoU(이동 평균)로 최고 모델을 고릅니다.")

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    data = data_fingerprint(masks)
    done, rows, best, mean, started = 0, [], -1.0, None, time.time()
    if args.resume:
        last = load_last(args.output_dir / "sam2_last.pt", settings, data)
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        rng.bit_generator.state = json.loads(last["rng"])
        done, rows, best, mean = last["iteration"], last["rows"], last["best"], last["mean"].to(device)
        started -= last["seconds"]
        print(f"{done}회까지 한 학습을 이어서 합니다.")

    interrupted = []
    signal.signal(signal.SIGINT, lambda *_: on_interrupt(interrupted))
    recent = []  # the losses since the last row, and their images
    bar = tqdm(range(done + 1, args.iterations + 1), "학습", initial=done, total=args.iterations, disable=None)
    for iteration in bar:
        picks = rng.integers(len(masks), size=args.batch_size)
        loss, iou = batch_loss(predictor, cache, masks, picks, args.clicks, rng)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        recent.append((loss.detach(), picks))
        now = torch.stack([loss, iou]).detach()
        mean = now if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * now
        validating = iteration % args.save_every == 0 or iteration == args.iterations
        logging = validating or iteration % LOG_EVERY == 0 or iteration == 1
        if not (logging or interrupted):
            continue  # no .item() here: on CUDA it would wait for the GPU
        row = {"iteration": iteration, "loss": mean[0].item(), "train_iou": mean[1].item(),
               "seconds": round(time.time() - started, 1)}
        if not math.isfinite(row["loss"]):
            picks = next(picks for value, picks in recent if not torch.isfinite(value))
            names = ", ".join(masks.paths[index].name for index in picks)
            fail(f"손실이 유한하지 않습니다 (이미지 {names}). --lr을 낮춰 보세요. 전에 저장한 모델은 그대로입니다")
        recent.clear()
        bar.set_postfix(loss=f"{row['loss']:.4f}", IoU=f"{row['train_iou']:.1%}")
        if logging:
            rows.append(row)
        if validating:
            if val_masks:
                row["val_iou"], row["val_dice"] = validate(predictor, val_cache, val_masks)
            reached = row.get("val_iou", row["train_iou"])
            text = f"검증 IoU {row['val_iou']:.2%}, Dice {row['val_dice']:.2%}" if val_masks else "검증 없음"
            bar.write(f"[{iteration}/{args.iterations}] loss {row['loss']:.4f}, "
                      f"학습 IoU {row['train_iou']:.2%}, {text}")
            if reached > best:
                best = reached
                save_model(model, args.output_dir / "sam2_best.pt")
            save_log(rows, args.output_dir)
        if validating or interrupted:
            save_model(model, args.output_dir / "sam2_last.pt", optimizer=optimizer.state_dict(),
                       scaler=scaler.state_dict(), rng=json.dumps(rng.bit_generator.state), mean=mean.cpu(),
                       iteration=iteration, rows=rows, best=best, seconds=row["seconds"],
                       settings=json.dumps(settings), data=data)
        if interrupted:
            bar.close()
            again = shlex.join([Path(sys.executable).name, *sys.argv, *([] if args.resume else ["--resume"])])
            print(f"{iteration}회까지 저장했습니다. 이어서 하려면: {again}")
            sys.exit(130)

    save_model(model, args.output_dir / "sam2_final.pt")
    summary = {
        "settings": settings,
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "opencv": cv2.__version__},
        "train_images": len(masks), "val_images": len(val_masks),
        "encodings": cache.encoded + val_cache.encoded,
        "best_iou": best, "best_chosen_by": "validation IoU" if val_masks else "training IoU",
        "seconds": round(time.time() - started, 1),
    }
    write_file(args.output_dir / "training_summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
    minutes, seconds = divmod(round(time.time() - started), 60)
    print(f"학습 시간 {minutes}분 {seconds}초, 학습 IoU(이동 평균) {rows[0]['train_iou']:.1%} → "
          f"{rows[-1]['train_iou']:.1%}, {'검증' if val_masks else '학습'} 최고 IoU {best:.2%}")
    print(f"저장: {args.output_dir / 'sam2_best.pt'}, {args.output_dir / 'sam2_final.pt'}")


if __name__ == "__main__":
    try:
        main()
    except (ImageError, OSError) as error:
        fail(error)

"""Compare the original SAM 2.1 with the fine-tuned one on every validation image.

    python compare_models.py

Both models get the same prompt, and of the three masks that each returns the one with the highest
predicted score counts. They share a frozen encoder, so an image is encoded once for both.
"""

import argparse
import csv
import errno
import io
import json
import os
import re
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
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


def same_frozen_weights(original, finetuned):
    """Whether all weights that make an image's features are equal in both models.

    Those are all but the prompt encoder and the mask decoder; the decoder's conv_s0 and conv_s1 run in
    set_image and count as frozen.
    """
    ours, theirs = original.state_dict(), finetuned.state_dict()
    trained = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")
    return all(torch.equal(ours[name], theirs[name]) for name in ours if not trained.match(name))


def set_image_in_both(original, finetuned, image, shared):
    """Encode `image` for both predictors: once if they share their frozen weights, else once for each."""
    original.set_image(image)
    if shared:
        finetuned._features, finetuned._orig_hw = original._features, original._orig_hw
        finetuned._is_image_set = True
    else:
        finetuned.set_image(image)


def display_width(text):
    """Columns that `text` takes on a terminal: a Korean letter takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def result_box(original_iou, finetuned_iou):
    """The box that the guide shows; IoU from 0 to 1. A drop shows as a negative difference."""
    inside = 41
    title = "평균 IoU 비교"
    difference = 100 * (finetuned_iou - original_iou)

    def line(text):
        return f"│{text}{' ' * (inside - display_width(text))}│"

    rule = "─" * inside
    return "\n".join([
        f"┌{rule}┐",
        line(" " * ((inside - display_width(title)) // 2) + title),
        f"├{rule}┤",
        line(f"  원본 SAM2:      {original_iou:7.2%}"),
        line(f"  파인튜닝 SAM2:  {finetuned_iou:7.2%}"),
        f"├{rule}┤",
        line(f"  개선율:         {difference:+6.1f}%p"),
        f"└{rule}┘",
    ])


def overlay(image, mask, colour):
    """`image` with `mask` tinted in `colour` (RGB, 0 to 255) and outlined: uint8 H x W x 3."""
    inside = mask.astype(np.uint8)
    tint = np.full_like(image, colour)
    tinted = cv2.copyTo(cv2.addWeighted(image, 0.55, tint, 0.45, 0), inside, image.copy())
    edges, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(tinted, edges, -1, colour, max(1, round(max(mask.shape) / 300)))


def printable(name):
    """A file's name with "?" for bytes that are no letters, which matplotlib cannot draw."""
    return name.encode(errors="replace").decode()


def draw_prompt(panel, coords, labels):
    """Mark clicks with stars, green on the object and red beside it, or the box between two corners."""
    if 2 in labels:
        (x1, y1), (x2, y2) = coords
        panel.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=2))
        return
    for (x, y), label in zip(coords, labels):
        panel.scatter(x, y, s=180, marker="*", color="lime" if label else "red", edgecolor="black")


def save_comparison(path, name, image, gt_mask, results):
    """One row of four panels: the input with its prompt, the ground truth, and both models' masks.

    results: {"original": (mask, IoU, prompt), "fine-tuned": ...}; prompts as predict_prompted returns them.
    Clicks after the first are each model's own, and so drawn on its mask.
    """
    height, width = gt_mask.shape
    figure, panels = plt.subplots(1, 4, figsize=(14, 14 / 4 * min(height / width, 2) + 0.6), layout="constrained")
    panels[0].imshow(image)
    coords, labels = results["original"][2]
    shared = 2 if 2 in labels else 1
    draw_prompt(panels[0], coords[:shared], labels[:shared])
    panels[0].set_title(printable(name if len(name) < 32 else name[:14] + "..." + name[-14:]))
    panels[1].imshow(overlay(image, gt_mask, (0, 200, 0)))
    panels[1].set_title("ground truth")
    for panel, (title, (mask, iou, (coords, labels))), colour in zip(panels[2:], results.items(),
                                                                     ((230, 60, 30), (30, 110, 255))):
        panel.imshow(overlay(image, mask, colour))
        draw_prompt(panel, coords[shared:], labels[shared:])
        panel.set_title(f"{title}, IoU {iou:.1%}")
    for panel in panels:
        panel.axis("off")
    save_figure(figure, path)


def save_scatter(path, rows):
    """Original IoU against fine-tuned IoU, one dot an image; above the diagonal is better."""
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.scatter([row["original_iou"] for row in rows], [row["finetuned_iou"] for row in rows], s=18, alpha=0.6)
    better = sum(row["finetuned_iou"] > row["original_iou"] for row in rows)
    axes.set(xlabel="original IoU", ylabel="fine-tuned IoU", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal",
             title=f"{better} of {len(rows)} images better after fine-tuning")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_results(rows, args, device, image_size):
    """Write per_image.csv, scatter.png and summary.json; returns the mean of each column of numbers."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(args.output_dir / "per_image.csv", text.getvalue().encode(errors="surrogateescape"))
    save_scatter(args.output_dir / "scatter.png", rows)
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "image"}
    summary = {"num_images": len(rows), **mean,
               "difference_pp": 100 * (mean["finetuned_iou"] - mean["original_iou"]),
               "prompt": args.prompt, "device": device, "image_size": image_size,
               "original": str(args.checkpoint), "finetuned": str(args.finetuned)}
    write_json(args.output_dir / "summary.json", summary)
    return mean


def parse_args():
    parser = Parser(
        description="원본 SAM 2.1과 파인튜닝한 모델을 검증 이미지에서 비교합니다.")

    def option(name, default, text, **options):
        shown = "" if default is None else f" (기본: {default})"
        parser.add_argument(name, default=default, help=text + shown, **options)

    option("--model-cfg", "configs/sam2.1/sam2.1_hiera_s.yaml", "sam2 패키지의 모델 설정 이름 또는 내 YAML 파일")
    option("--checkpoint", "checkpoints/sam2.1_hiera_small.pt", "원본 체크포인트")
    option("--finetuned", "output/sam2_best.pt", "파인튜닝한 체크포인트")
    option("--image-dir", "data/images/val", "비교할 이미지 폴더")
    option("--mask-dir", "data/masks/val", "정답 마스크 폴더 (이미지와 이름이 같은 PNG)")
    option("--output-dir", Path("output/comparison"), "결과를 쓸 폴더", type=Path)
    option("--num-images", None, "앞에서부터 몇 장만 비교할지 (기본: 전부)", type=int)
    option("--num-visualize", 5, "비교 그림을 몇 장 저장할지, 고르게 뽑음", type=int)
    option("--prompt", "point", "프롬프트: point 마스크의 가운데 점, points 거기에 가장 크게 틀린 곳의 점 둘을 더함, "
           "box 마스크를 둘러싼 상자, mixed 이미지마다 셋을 번갈아", choices=["point", "points", "box", "mixed"])
    option("--image-size", None, "모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 1024에서 배운 것이라 "
           "정확도가 떨어짐 (기본: 모델 설정대로)", type=int, choices=[512, 768, 1024])
    option("--device", "auto", "장치: auto, mps, cuda, cpu")
    args = parser.parse_args()
    if args.num_images is not None and args.num_images < 1:
        parser.error("--num-images는 1 이상이어야 합니다")
    if args.num_visualize < 0:
        parser.error("--num-visualize는 0 이상이어야 합니다")
    return args


def main():
    args = parse_args()
    device = detect_device(args.device)
    if not Path(args.finetuned).is_file():
        fail(f"파인튜닝한 모델이 없습니다: {args.finetuned}. 먼저 python train_sam2_proper.py 를 실행하세요")
    pairs = find_pairs(args.image_dir, args.mask_dir)[:args.num_images]
    if not pairs:
        fail(f"비교할 쌍이 없습니다: {args.image_dir}와 {args.mask_dir}에 이름이 같은 이미지와 마스크를 넣으세요")
    original = load_predictor(args.model_cfg, args.checkpoint, device, args.image_size)
    finetuned = load_predictor(args.model_cfg, args.finetuned, device, args.image_size)
    shared = same_frozen_weights(original.model, finetuned.model)
    print("고정된 가중치가 같아 이미지를 한 번만 인코딩합니다." if shared else
          "고정된 가중치가 서로 달라 이미지를 모델마다 인코딩합니다.")

    chosen = np.linspace(0, len(pairs) - 1, min(args.num_visualize, len(pairs))).round().astype(int).tolist()
    rows, empty, pictures = [], 0, 0
    for number, (image_path, mask_path) in enumerate(tqdm(pairs, "비교", disable=None)):
        image, gt_mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != gt_mask.shape:
            raise ImageError(f"{image_path}: 마스크와 크기가 다릅니다. python prepare_data.py --check 로 확인하세요")
        if not gt_mask.any():
            empty += 1
            continue
        set_image_in_both(original, finetuned, image, shared)
        masks, prompts, ious = {}, {}, {}
        for name, predictor in (("original", original), ("fine-tuned", finetuned)):
            logits, scores, prompts[name] = predict_prompted(predictor, prompt_kind(args.prompt, len(rows)), gt_mask)
            masks[name] = logits[scores.argmax()] > 0
            ious[name] = calculate_iou(masks[name], gt_mask)
        rows.append({
            "image": image_path.name,
            "original_iou": ious["original"],
            "finetuned_iou": ious["fine-tuned"],
            "original_dice": calculate_dice(masks["original"], gt_mask),
            "finetuned_dice": calculate_dice(masks["fine-tuned"], gt_mask),
        })
        if number in chosen:
            pictures += 1
            save_comparison(args.output_dir / f"compare_{pictures}.png", image_path.name, image, gt_mask,
                            {name: (masks[name], ious[name], prompts[name]) for name in masks})
    if not rows:
        fail(f"정답 마스크가 모두 비어 있습니다: {args.mask_dir}")

    mean = save_results(rows, args, device, original.model.image_size)
    print(result_box(mean["original_iou"], mean["finetuned_iou"]))
    print(f"이미지 {len(rows)}장, 프롬프트 {args.prompt}, 장치 {device}, "
          f"Dice {mean['original_dice']:.2%} → {mean['finetuned_dice']:.2%}")
    if empty:
        print(f"정답 마스크가 비어 있어 뺀 이미지: {empty}장")
    print(f"저장: {args.output_dir} (비교 그림 {pictures}장, per_image.csv, summary.json, scatter.png)")


if __name__ == "__main__":
    try:
        main()
    except (ImageError, OSError) as error:
        fail_for(error)
    except KeyboardInterrupt:
        fail("중단했습니다. 결과는 쓰지 않았습니다")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("메모리가 부족합니다. --image-size 512나 --device cpu를 써 보세요")

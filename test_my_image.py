"""Segment your own images with the fine-tuned SAM 2.1: from points, boxes or a rough mask, or in a window.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg
    python test_my_image.py --image test_images --everything
"""

import argparse
import errno
import io
import json
import math
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb
from pycocotools import mask as coco_mask
from tqdm import tqdm

try:
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from sam2.utils.amg import remove_small_regions
except (ImportError, RuntimeError) as error:  # not installed, or hidden by a folder of that name
    sys.exit(f"오류: sam2 패키지를 불러올 수 없습니다 ({error}). 설치: pip install -r requirements.txt. "
             "이미 설치했다면 프로젝트 폴더나 그 안의 폴더 이름이 sam2인지 보고, 그렇다면 다른 이름으로 바꾸세요")

FORMATS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # taken from a folder
SHOWN_SIDE = 1000      # pixels: larger images are reduced to this for display
EVERYTHING_SIDE = 1024  # and to this for --everything, whose masks are no finer
COLOURS = {"original model": (230, 60, 30), "fine-tuned model": (30, 110, 255)}
WINDOW_HELP = ("left click: object    right click: background    drag: box    u: undo    r: reset    "
               "1 2 3: candidate    Enter: save")

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


def parse_points(text):
    """Parse "x,y" or "x,y,label;x,y,label": a list of (x, y, label), in pixels; label 1 (the default) or 0.

    Raises argparse.ArgumentTypeError, naming the part that is wrong.
    """
    points = []
    for part in text.strip().strip(";").split(";"):
        numbers = part.split(",")
        try:
            x, y, label = map(float, numbers if len(numbers) != 2 else [*numbers, 1])
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{part}'는 \"x,y\" 또는 \"x,y,라벨\" 형식이 아닙니다") from None
        if label not in (0, 1) or not np.isfinite([x, y]).all():
            raise argparse.ArgumentTypeError(f"'{part}': 라벨은 1(전경) 또는 0(배경), 좌표는 숫자여야 합니다")
        points.append((x, y, int(label)))
    return points


def parse_boxes(text):
    """Parse "x1,y1,x2,y2" or several of them, separated by ";": a list of [x1, y1, x2, y2] in pixels, in order."""
    boxes = []
    for part in text.strip().strip(";").split(";"):
        try:
            x1, y1, x2, y2 = map(float, part.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{part}'는 \"x1,y1,x2,y2\" 형식이 아닙니다") from None
        if not np.isfinite([x1, y1, x2, y2]).all() or x1 == x2 or y1 == y2:
            raise argparse.ArgumentTypeError(f"'{part}': 넓이가 있는 상자여야 합니다")
        boxes.append([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)])
    return boxes


def is_inside(point, box):
    """Whether (x, y, ...) lies in [x1, y1, x2, y2], edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def check_prompts(path, image, points, boxes, rough):
    """Raise ImageError, with the image's size, if a prompt does not fit the image.

    A box may end at the image's very edge (x2 = width), a point may not: there is no pixel. With several
    boxes each point must lie in one, to say which of the objects it belongs to.
    """
    height, width = image.shape[:2]
    outside = [(x, y) for x, y, _ in points if not (0 <= x < width and 0 <= y < height)]
    outside += [(x, y) for box in boxes for x, y in (box[:2], box[2:]) if not (0 <= x <= width and 0 <= y <= height)]
    for x, y in outside:
        raise ImageError(f"{path}: 좌표 ({x:g}, {y:g})가 이미지 밖에 있습니다. "
                         f"이미지 크기는 가로 {width}, 세로 {height}픽셀입니다")
    for x, y, _ in points:
        if len(boxes) > 1 and not any(is_inside((x, y), box) for box in boxes):
            raise ImageError(f"{path}: 점 ({x:g}, {y:g})가 어느 상자에도 들어 있지 않습니다. "
                             "상자가 여럿이면 점은 자기 상자 안에 있어야 합니다")
    if rough is not None and rough.shape != (height, width):
        raise ImageError(f"{path}: --mask의 크기가 이미지와 다릅니다. 마스크는 가로 {rough.shape[1]}, "
                         f"세로 {rough.shape[0]}픽셀, 이미지는 가로 {width}, 세로 {height}픽셀입니다")


def find_images(names):
    """The image files that --image names: files as they are, folders as the images in them, sorted."""
    paths = []
    for path in map(Path, names):
        paths += sorted(p for p in path.iterdir() if p.suffix.lower() in FORMATS) if path.is_dir() else [path]
    if not paths:
        fail(f"이미지가 없습니다: {', '.join(map(str, names))}")
    return paths


def result_names(paths):
    """A name for each image's results: its stem, or, where several have the same, one that tells them apart."""
    stems, names = Counter(path.stem for path in paths), {}
    for path in paths:
        name = path.stem if stems[path.stem] == 1 else f"{path.stem}_{path.suffix[1:]}"
        while name in names:
            name += "_"
        names[name] = path
    return list(names)


def segment(predictor, points, boxes, rough=None, refine=0):
    """Segment in the image that is set: bool masks 3 x H x W and scores 3.

    points: (x, y, label) in pixels; boxes: [x1, y1, x2, y2]; rough: a mask to start from, bool H x W, or None;
    refine: how often the best mask is given back to the model as a prompt.
    Several boxes are several objects, each with the points inside it: the first mask unites what is best
    for each, the second what is second best, and the scores are means.
    """
    start = None
    if rough is not None:  # as logits, the way SAM 2 itself writes a given mask (SAM2Base._use_mask_as_output)
        height, width = predictor.model.sam_prompt_encoder.mask_input_size
        share = cv2.resize(rough.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        start = 20 * share[None] - 10
    objects = []
    for box in boxes or [None]:
        own = points if len(boxes) < 2 else [point for point in points if is_inside(point, box)]
        logits = start
        for _ in range(refine + 1):
            # always the three masks: fine-tuning trains those, not the single one that SAM 2 would give instead
            masks, scores, low_res = predictor.predict(
                point_coords=np.array([point[:2] for point in own], np.float32) if own else None,
                point_labels=np.array([point[2] for point in own]) if own else None,
                box=np.array(box, np.float32) if box else None,
                mask_input=logits, multimask_output=True)
            logits = low_res[scores.argmax()][None]
        order = np.argsort(-scores, kind="stable") if len(boxes) > 1 else np.arange(3)
        objects.append((masks[order] > 0, scores[order]))
    return np.any([masks for masks, _ in objects], axis=0), np.mean([scores for _, scores in objects], axis=0)


def segment_everything(predictor, image, args):
    """All that SAM 2's automatic mask generator finds: COCO annotations, the largest first.

    Each holds bbox [x, y, width, height] and area in pixels of `image`, score (the predicted IoU),
    stability_score, and segmentation as compressed RLE.
    """
    reduced = reduce_to(image, EVERYTHING_SIDE, cv2.INTER_AREA)
    height, width = image.shape[:2]
    generator = SAM2AutomaticMaskGenerator(
        predictor.model, points_per_side=args.points_per_side, pred_iou_thresh=args.pred_iou_thresh,
        stability_score_thresh=args.stability_score_thresh)
    generator.predictor = predictor  # its own would take the model's image_size for 1024
    annotations = []
    for found in generator.generate(reduced):
        mask = found["segmentation"]
        if mask.shape != (height, width):
            mask = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        for kind in ("holes", "islands"):  # what the generator's own min_mask_region_area does on CUDA only
            mask, _ = remove_small_regions(mask, args.min_mask_region_area, kind)
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append({
            "bbox": [int(number) for number in coco_mask.toBbox(rle)], "area": int(coco_mask.area(rle)),
            "score": round(found["predicted_iou"], 4), "stability_score": round(found["stability_score"], 4),
            "segmentation": {"size": [height, width], "counts": rle["counts"].decode()}, "iscrowd": 0})
    annotations.sort(key=lambda annotation: -annotation["area"])
    return [{"id": number, "image_id": 1, "category_id": 1, **annotation}
            for number, annotation in enumerate(annotations, start=1)]


def save_everything(folder, name, path, image, annotations):
    """Write the overlay in distinct colours, the label map (0: nothing, k: annotation k) and the COCO file."""
    height, width = image.shape[:2]
    labels, overlaid = np.zeros((height, width), np.uint16), image.copy()
    for annotation in annotations:  # smaller ones lie on top
        mask = coco_mask.decode(annotation["segmentation"]) > 0
        labels[mask] = annotation["id"]
        hue = annotation["id"] * 0.618 % 1  # the golden ratio: neighbours in number are far apart in colour
        overlaid = overlay(overlaid, mask, tuple(int(255 * part) for part in hsv_to_rgb((hue, 0.85, 1))))
    write_file(folder / f"{name}_everything.png", cv2.imencode(".png", overlaid[..., ::-1])[1].tobytes())
    write_file(folder / f"{name}_labels.png", cv2.imencode(".png", labels)[1].tobytes())
    coco = {"images": [{"id": 1, "file_name": path.name, "width": width, "height": height}],
            "categories": [{"id": 1, "name": "object"}], "annotations": annotations}
    write_json(folder / f"{name}_everything.json", coco)


def same_frozen_weights(original, finetuned):
    """Whether all weights that make an image's features are equal in both models.

    Those are all but the prompt encoder and the mask decoder; the decoder's conv_s0 and conv_s1 run in
    set_image and count as frozen.
    """
    ours, theirs = original.state_dict(), finetuned.state_dict()
    trained = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")
    return all(torch.equal(ours[name], theirs[name]) for name in ours if not trained.match(name))


def set_image_in_all(predictors, image):
    """Encode `image` for each predictor: once for those that share their frozen weights."""
    predictors[0].set_image(image)
    for other in predictors[1:]:
        if same_frozen_weights(predictors[0].model, other.model):
            other._features, other._orig_hw, other._is_image_set = predictors[0]._features, [image.shape[:2]], True
        else:
            other.set_image(image)


def reduce_to(array, max_side, interpolation):
    """Shrink H x W (x 3) so that the longer side is at most max_side pixels; never enlarge."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(array, size, interpolation=interpolation)


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


def show(axes, image, mask=None, colour=None):
    """Draw `image`, with `mask` over it, in the image's own pixel coordinates, reduced to what a screen shows."""
    height, width = image.shape[:2]
    shown = reduce_to(image, SHOWN_SIDE, cv2.INTER_AREA)
    if mask is not None:
        small = cv2.resize(mask.astype(np.uint8), shown.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        shown = overlay(shown, small > 0, colour)
    if axes.images:
        axes.images[0].set_data(shown)
    else:
        axes.imshow(shown, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        axes.set(xticks=[], yticks=[])


def draw_prompts(axes, points, boxes, rough=None):
    """Mark points (x, y, label) with stars, green or red; boxes and the rough mask's outline in green.

    Returns what was drawn, so that it can be taken away again.
    """
    drawn = [axes.scatter(x, y, s=160, marker="*", color="lime" if label else "red", edgecolor="black", zorder=3)
             for x, y, label in points]
    drawn += [axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=2))
              for x1, y1, x2, y2 in boxes]
    if rough is not None and rough.any():
        axes.contour(rough, levels=[0.5], colors="lime", linewidths=2)
    return drawn


def require_display():
    """Fail if matplotlib cannot open a window here."""
    try:
        figure = plt.figure()
        interactive = figure.canvas.required_interactive_framework is not None
        plt.close(figure)
    except Exception:  # each toolkit has its own error for "no display"
        interactive = False
    if not interactive:
        advice = " (리눅스라면 python3-tk 패키지도 필요합니다)" if sys.platform == "linux" else ""
        fail(f"창을 띄울 수 없습니다. 좌표를 직접 주세요: --point \"x,y\"{advice}")


class Window:
    """A matplotlib window in which each click and each dragged box segments the image anew.

    models: {name: function of (points, boxes) that returns masks 3 x H x W and scores 3}; one panel each.
    title: of the window.
    What it holds when plt.show() returns: points (x, y, label) and boxes [x1, y1, x2, y2], in pixels to one
    decimal; choice, the candidate that a key picked (0 to 2), or None for the one with the highest score;
    found, {title: (masks, scores)}.
    """

    def __init__(self, image, models, title):
        self.image, self.models = image, models
        self.points, self.boxes, self.choice, self.found = [], [], None, {}
        self.history, self.drawn, self.pressed = [], [], None
        for action in ("home", "back"):  # matplotlib's own meaning of r and Backspace
            keys = plt.rcParams[f"keymap.{action}"]
            plt.rcParams[f"keymap.{action}"] = [key for key in keys if key not in ("r", "backspace")]
        shape = image.shape[0] / image.shape[1]
        width = 10 if len(models) == 1 else 13
        self.figure, panels = plt.subplots(1, len(models), squeeze=False, layout="constrained", figsize=(
            width, min(max(width / len(models) * shape, 4), 8) + 1))
        self.panels = panels[0]
        self.figure.canvas.manager.set_window_title(title)
        self.figure.supxlabel(WINDOW_HELP, fontsize=10)
        for name, handler in (("button_press_event", self.on_press), ("motion_notify_event", self.on_motion),
                              ("button_release_event", self.on_release), ("key_press_event", self.on_key)):
            self.figure.canvas.mpl_connect(name, handler)
        self.update()

    def position(self, event, axes):
        """Where in the image an event lies, to one decimal, moved inside if it lies beside it: (x, y)."""
        height, width = self.image.shape[:2]
        x, y = axes.transData.inverted().transform((event.x, event.y)).tolist()
        return round(min(max(x, 0), width - 1), 1), round(min(max(y, 0), height - 1), 1)

    def on_press(self, event):
        toolbar_is_busy = getattr(self.figure.canvas.toolbar, "mode", "")  # it zooms or pans
        if event.inaxes not in self.panels or event.button not in (1, 3) or toolbar_is_busy:
            return
        height, width = self.image.shape[:2]
        if 0 <= round(event.xdata, 1) < width and 0 <= round(event.ydata, 1) < height:
            self.pressed = event

    def dragged_box(self, event):
        """The box from where the left button was pressed to `event`; None for a click that barely moved."""
        start = self.pressed
        if start.button != 1 or max(abs(event.x - start.x), abs(event.y - start.y)) < 6:
            return None
        (x1, y1), (x2, y2) = self.position(start, start.inaxes), self.position(event, start.inaxes)
        return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)] if x1 != x2 and y1 != y2 else None

    def on_motion(self, event):
        if self.pressed and (box := self.dragged_box(event)):
            self.draw_prompts(self.points, [box])
            self.figure.canvas.draw_idle()

    def on_release(self, event):
        if not self.pressed or event.button != self.pressed.button:
            return
        points, boxes = self.points, self.boxes
        if box := self.dragged_box(event):
            boxes = [box]
        else:
            points = [*points, (*self.position(self.pressed, self.pressed.inaxes), int(event.button == 1))]
        self.pressed = None
        self.history.append((self.points, self.boxes))
        self.set_prompts(points, boxes)

    def on_key(self, event):
        if event.key in ("u", "backspace") and self.history:
            self.set_prompts(*self.history.pop())
        elif event.key == "r":
            self.history.clear()
            self.set_prompts([], [])
        elif event.key in ("1", "2", "3") and self.found:
            self.choice = int(event.key) - 1
            self.update()
        elif event.key == "enter" and self.found:
            plt.close(self.figure)

    def set_prompts(self, points, boxes):
        """Take over new prompts, segment with them and show it."""
        self.points, self.boxes, self.choice = points, boxes, None
        self.found = {title: find(points, boxes) for title, find in self.models.items()} if points or boxes else {}
        self.update()

    def draw_prompts(self, points, boxes):
        for artist in self.drawn:
            artist.remove()
        self.drawn = [artist for axes in self.panels for artist in draw_prompts(axes, points, boxes)]

    def update(self):
        """Show the image, the candidate and the prompts."""
        for axes, title in zip(self.panels, self.models):
            if self.found:
                masks, scores = self.found[title]
                number = int(scores.argmax()) if self.choice is None else self.choice
                show(axes, self.image, masks[number], COLOURS[title])
                axes.set_title(f"{title}: mask {number + 1} of 3, score {scores[number]:.3f}")
            else:
                show(axes, self.image)
                axes.set_title(title)
        self.draw_prompts(self.points, self.boxes)
        self.figure.canvas.draw_idle()


def save_panels(path, panels, shape):
    """Write panels, functions that draw on axes, side by side; or, for wide images, below each other.

    shape: (H, W) of the images in them.
    """
    flatness = shape[1] / shape[0]
    columns = len(panels) if flatness < 1.6 else 1 if flatness > 5 else math.ceil(len(panels) / 2)
    rows = math.ceil(len(panels) / columns)
    width = max(4, 14 / columns)  # inches a panel
    height = min(max(width / flatness, 1), 9) + 0.4
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(width * columns, height * rows),
                                layout="constrained")
    for panel, draw in zip(axes.flat, panels):
        draw(panel)
    save_figure(figure, path)


def input_panel(image, points, boxes, rough, title):
    """A panel with the image and its prompts."""
    def draw(axes):
        show(axes, image)
        draw_prompts(axes, points, boxes, rough)
        axes.set_title(title)
        axes.spines[:].set_visible(False)
    return draw


def mask_panel(image, mask, colour, title, framed):
    """A panel with a mask over the image, framed in green or not."""
    def draw(axes):
        show(axes, image, mask, colour)
        axes.set_title(title)
        axes.spines[:].set(visible=framed, color="lime", linewidth=4)
    return draw


def save_mask(path, mask):
    """Write a bool H x W mask as a PNG of 0 and 255."""
    write_file(path, cv2.imencode(".png", mask.astype(np.uint8) * 255)[1].tobytes())


def run_everything(path, name, image, predictor, args):
    """Segment all that is in one image and write it; returns the lines to print."""
    annotations = segment_everything(predictor, image, args)
    save_everything(args.output, name, path, image, annotations)
    advice = "" if annotations else ". --pred-iou-thresh나 --stability-score-thresh를 낮춰 보세요"
    return [f"찾은 것: {len(annotations)}개{advice}",
            saved_line(args.output, f"{name}_everything.png", f"{name}_labels.png", f"{name}_everything.json")]


def run_prompts(path, name, image, predictors, args):
    """Segment one image with every model, as the arguments or the window say, and write the results.

    predictors: {title: SAM2ImagePredictor}; the mask of the last one is `name`_mask.png. Returns the lines to print.
    """
    set_image_in_all(list(predictors.values()), image)
    models = {title: partial(segment, predictor, rough=args.mask, refine=args.refine)
              for title, predictor in predictors.items()}
    points, boxes, choice, lines = args.point, args.box, None, []
    if args.interactive:
        window = Window(image, models, printable(path.name))
        plt.show()
        if not window.found:
            raise ImageError(f"{path}: 찍은 점이 없습니다. 창에서 분할할 곳을 클릭하거나 --point \"x,y\"를 쓰세요")
        points, boxes, found, choice = window.points, window.boxes, window.found, window.choice
        lines.append("같은 결과를 얻는 명령: " + prompts_as_flags(points, boxes))
    else:
        found = {title: find(points, boxes) for title, find in models.items()}

    numbers = {title: int(scores.argmax()) if choice is None else choice for title, (_, scores) in found.items()}
    best = {title: (masks[numbers[title]], scores[numbers[title]]) for title, (masks, scores) in found.items()}
    title = list(found)[-1]
    mask, score = best[title]
    names = [f"{name}_result.png", f"{name}_mask.png"]
    save_mask(args.output / f"{name}_mask.png", mask)
    panels = [input_panel(image, points, boxes, args.mask, printable(path.name) if args.compare else title)]
    if args.compare:
        panels += [mask_panel(image, own_mask, COLOURS[own], f"{own}, score {own_score:.3f}", framed=False)
                   for own, (own_mask, own_score) in best.items()]
        names.append(f"{name}_original_mask.png")
        save_mask(args.output / f"{name}_original_mask.png", best["original model"][0])
    else:
        panels += [mask_panel(image, candidate, COLOURS[title], f"mask {number + 1}, score {own_score:.3f}"
                              + ("  (best)" if number == numbers[title] else ""), framed=number == numbers[title])
                   for number, (candidate, own_score) in enumerate(zip(*found[title]))]
    save_panels(args.output / f"{name}_result.png", panels, image.shape[:2])
    return [*lines, f"마스크 {numbers[title] + 1}번 (점수 {score:.3f}), 이미지의 {mask.mean():.1%}",
            saved_line(args.output, *names)]


def saved_line(folder, *names):
    return "저장: " + ", ".join(str(folder / name) for name in names)


def prompts_as_flags(points, boxes):
    """Points and boxes as they would be written on the command line."""
    flags = ["--point \"" + ";".join(f"{x:g},{y:g},{label}" for x, y, label in points) + '"'] if points else []
    flags += ["--box \"" + ";".join(",".join(f"{number:g}" for number in box) for box in boxes) + '"'] if boxes else []
    return " ".join(flags)


def parse_args():
    parser = Parser(description="내 이미지를 파인튜닝한 SAM 2.1로 분할합니다.")
    parser.add_argument("--image", "-i", required=True, nargs="+", metavar="PATH",
                        help="이미지 경로, 여러 개나 폴더도 됨 (필수)")
    parser.add_argument("--original", action="store_true", help="파인튜닝 모델 대신 원본 모델 사용")
    parser.add_argument("--compare", action="store_true", help="원본과 파인튜닝 모델의 결과를 나란히 보기")
    parser.add_argument("--point", "-p", type=parse_points, default=[],
                        help='점 좌표: "x,y" 또는 "x,y,라벨;x,y,라벨" (라벨 1 전경, 0 배경; 기본 1)')
    parser.add_argument("--box", type=parse_boxes, default=[],
                        help='상자 좌표: "x1,y1,x2,y2", 대상이 여럿이면 ";"로 이어서')
    parser.add_argument("--mask", metavar="FILE", help="대강의 마스크 파일을 프롬프트로 사용 (이미지와 같은 크기)")
    parser.add_argument("--refine", type=int, default=0, metavar="N",
                        help="가장 좋은 마스크를 모델에 다시 넣어 N번 다듬기 (기본: 0)")
    parser.add_argument("--everything", action="store_true", help="프롬프트 없이 이미지 속의 모든 것을 분할")
    parser.add_argument("--points-per-side", type=int, default=32, help="--everything: 한 변에 찍을 점의 수 (기본: 32)")
    parser.add_argument("--pred-iou-thresh", type=float, default=0.88,
                        help="--everything: 예측 점수가 이보다 낮은 마스크는 버림 (기본: 0.88)")
    parser.add_argument("--stability-score-thresh", type=float, default=0.95,
                        help="--everything: 경계가 이보다 불안정한 마스크는 버림 (기본: 0.95)")
    parser.add_argument("--min-mask-region-area", type=int, default=100,
                        help="--everything: 이보다 작은 조각과 구멍은 없앰, 픽셀 (기본: 100)")
    parser.add_argument("--output", "-o", type=Path, default=Path("output/my_results"),
                        help="결과 폴더 (기본: output/my_results)")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml",
                        help="모델 설정 이름 또는 YAML 경로 (기본: configs/sam2.1/sam2.1_hiera_s.yaml)")
    parser.add_argument("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt",
                        help="원본 체크포인트 (기본: checkpoints/sam2.1_hiera_small.pt)")
    parser.add_argument("--finetuned", default="output/sam2_best.pt",
                        help="파인튜닝한 체크포인트 (기본: output/sam2_best.pt)")
    parser.add_argument("--image-size", type=int, choices=[512, 768, 1024], default=None,
                        help="모델 입력 한 변(픽셀). 작을수록 빠르지만, 사전 학습된 가중치는 "
                             "1024에서 배운 것이라 정확도가 떨어짐 (기본: 모델 설정대로)")
    parser.add_argument("--device", default="auto", help="장치: auto, mps, cuda, cpu (기본: auto)")
    args = parser.parse_args()
    prompted = bool(args.point or args.box or args.mask)
    if args.everything and (prompted or args.compare or args.refine):
        parser.error("--everything은 --point, --box, --mask, --refine, --compare와 함께 쓸 수 없습니다")
    if args.compare and args.original:
        parser.error("--compare와 --original은 함께 쓸 수 없습니다")
    for name, least in (("refine", 0), ("points_per_side", 1), ("min_mask_region_area", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}는 {least} 이상이어야 합니다")
    args.interactive = not (prompted or args.everything)
    return args


def choose_checkpoints(args):
    """{title: checkpoint} of the models to use; the original alone if there is no fine-tuned one yet."""
    if not Path(args.finetuned).is_file() and not args.original:
        print(f"파인튜닝한 모델이 아직 없어 원본 모델을 사용합니다: {args.finetuned}")
        args.original, args.compare = True, False
    original, finetuned = {"original model": args.checkpoint}, {"fine-tuned model": args.finetuned}
    return original if args.original else {**original, **finetuned} if args.compare else finetuned


def main():
    args = parse_args()
    paths = find_images(args.image)
    if args.interactive:
        require_display()
    else:
        plt.switch_backend("Agg")
    args.mask = read_mask(args.mask) if args.mask else None
    if len(paths) == 1:  # before the model is loaded
        check_prompts(paths[0], read_image(paths[0]), args.point, args.box, args.mask)

    checkpoints = choose_checkpoints(args)
    device = detect_device(args.device)
    predictors = {title: load_predictor(args.model_cfg, checkpoint, device, args.image_size)
                  for title, checkpoint in checkpoints.items()}
    print(f"모델: {', '.join(checkpoints.values())}, 장치: {device}")
    if args.interactive:
        print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자입니다. Enter를 누르거나 창을 닫으면 저장합니다.")

    failed = []
    for path, name in zip(tqdm(paths, "분할", disable=True if len(paths) == 1 else None), result_names(paths)):
        try:
            image = read_image(path)
            check_prompts(path, image, args.point, args.box, args.mask)
            lines = run_everything(path, name, image, list(predictors.values())[-1], args) if args.everything \
                else run_prompts(path, name, image, predictors, args)
        except ImageError as error:
            if len(paths) == 1:
                raise
            failed.append(path)
            tqdm.write(f"오류: {error}", file=sys.stderr)
            continue
        if len(paths) == 1 or args.interactive:
            tqdm.write("\n".join(lines))
    if len(paths) > 1:
        print(f"이미지 {len(paths) - len(failed)}장을 분할했습니다. 저장: {args.output}")
    if failed:
        fail(f"{len(failed)}장은 분할하지 못했습니다: {', '.join(path.name for path in failed[:5])}")


if __name__ == "__main__":
    try:
        main()
    except (ImageError, OSError) as error:
        fail_for(error)
    except KeyboardInterrupt:
        fail("중단했습니다")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("메모리가 부족합니다. --image-size 512나 --device cpu를 써 보세요")

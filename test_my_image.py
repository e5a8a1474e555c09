"""Segment one image with the fine-tuned SAM 2.1, from points, a box, or clicks in a window.

    python test_my_image.py --image test_images/dog.jpg --point "320,200"
    python test_my_image.py --image test_images/dog.jpg
"""

import argparse
import io
import os
import re
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra import compose
from hydra.utils import instantiate
from matplotlib import pyplot as plt
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor

# ---- shared block: the same, letter for letter, in train_sam2_proper.py, compare_models.py, test_my_image.py ----

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # sam2's own use of it


class ImageError(Exception):
    """An image or mask that cannot be used; the message names the file."""


def fail(message):
    """End with status 1 and one line on stderr: for failures that the user can mend."""
    sys.exit(f"오류: {message}")


def write_file(path, content):
    """Write bytes beside `path`, then rename: a reader sees the old file or the new, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


def parse_box(text):
    """Parse "x1,y1,x2,y2" in pixels: a list of four floats, the corners put in order."""
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}'는 \"x1,y1,x2,y2\" 형식이 아닙니다") from None
    if not np.isfinite([x1, y1, x2, y2]).all() or x1 == x2 or y1 == y2:
        raise argparse.ArgumentTypeError(f"'{text}': 넓이가 있는 상자여야 합니다")
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def check_inside(points, box, image):
    """Fail, with the image's size, if a point (x, y, label) or a corner of the box lies outside `image`.

    A box may end at the image's very edge (x2 = width), a point may not: there is no pixel.
    """
    height, width = image.shape[:2]
    outside = [(x, y) for x, y, _ in points if not (0 <= x < width and 0 <= y < height)]
    if box:
        outside += [(x, y) for x, y in (box[:2], box[2:]) if not (0 <= x <= width and 0 <= y <= height)]
    for x, y in outside:
        fail(f"좌표 ({x:g}, {y:g})가 이미지 밖에 있습니다. 이미지 크기는 가로 {width}, 세로 {height}픽셀입니다")


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


def draw_points(axes, points):
    """Mark points (x, y, label): green stars for foreground, red ones for background."""
    for x, y, label in points:
        axes.scatter(x, y, s=160, marker="*", color="lime" if label else "red", edgecolor="black", zorder=3)


def open_window(image):
    """Open a window in which clicks place points.

    Returns: the list that the clicks fill with (x, y, label), in pixels to one decimal.
    Left click: foreground (1), right click: background (0). While the toolbar pans or zooms, and outside
    the image, clicks place nothing. The list is complete when plt.show() returns.
    """
    points = []
    height, width = image.shape[:2]
    figure, axes = plt.subplots(figsize=(10, 10 * min(max(height / width, 0.4), 0.8) + 0.8), layout="constrained")
    axes.imshow(image)
    axes.set_title("left click: foreground   right click: background   close the window: segment")
    axes.axis("off")

    def on_click(event):
        if event.inaxes is not axes or event.button not in (1, 3) or getattr(figure.canvas.toolbar, "mode", ""):
            return
        x, y = round(event.xdata, 1), round(event.ydata, 1)
        if 0 <= x < width and 0 <= y < height:
            points.append((x, y, 1 if event.button == 1 else 0))
            draw_points(axes, points[-1:])
            figure.canvas.draw_idle()

    figure.canvas.mpl_connect("button_press_event", on_click)
    return points


def save_result(path, image, points, box, masks, scores, title):
    """One row of four panels: the input with its prompts, then the three masks with their scores.

    masks: bool 3 x H x W; scores: 3. The best mask is framed.
    """
    height, width = image.shape[:2]
    figure, panels = plt.subplots(1, 4, figsize=(16, 4 * min(max(height / width, 0.3), 2) + 0.6), layout="constrained")
    panels[0].imshow(image)
    draw_points(panels[0], points)
    if box:
        panels[0].add_patch(plt.Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1],
                                          fill=False, edgecolor="lime", linewidth=2))
    panels[0].set_title(title)
    for number, (panel, mask, score) in enumerate(zip(panels[1:], masks, scores)):
        tinted = image.copy()
        tinted[mask] = (0.5 * image[mask] + 0.5 * np.array([30, 110, 255])).astype(np.uint8)
        panel.imshow(tinted)
        best = number == int(scores.argmax())
        panel.set_title(f"mask {number + 1}, score {score:.3f}" + ("  (best)" if best else ""))
        for spine in panel.spines.values():
            spine.set(visible=best, color="lime", linewidth=4)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
    for spine in panels[0].spines.values():
        spine.set_visible(False)
    save_figure(figure, path)


def parse_args():
    parser = argparse.ArgumentParser(description="내 이미지를 파인튜닝한 SAM 2.1로 분할합니다.")
    parser.add_argument("--image", "-i", required=True, help="이미지 경로 (필수)")
    parser.add_argument("--original", action="store_true", help="파인튜닝 모델 대신 원본 모델 사용")
    parser.add_argument("--point", "-p", type=parse_points, default=[],
                        help='점 좌표: "x,y" 또는 "x,y,라벨;x,y,라벨" (라벨 1 전경, 0 배경; 기본 1)')
    parser.add_argument("--box", type=parse_box, default=None, help='상자 좌표: "x1,y1,x2,y2"')
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
    return parser.parse_args()


def main():
    args = parse_args()
    image = read_image(args.image)
    points, box = args.point, args.box
    if points or box:
        plt.switch_backend("Agg")
    else:
        require_display()
    check_inside(points, box, image)

    checkpoint, title = args.finetuned, "fine-tuned model"
    if not args.original and not Path(args.finetuned).is_file():
        print(f"파인튜닝한 모델이 아직 없어 원본 모델을 사용합니다: {args.finetuned}")
    if args.original or not Path(args.finetuned).is_file():
        checkpoint, title = args.checkpoint, "original model"
    device = detect_device(args.device)
    predictor = load_predictor(args.model_cfg, checkpoint, device, args.image_size)
    print(f"모델: {checkpoint}, 장치: {device}")

    if not points and not box:
        print("창에서 좌클릭은 전경, 우클릭은 배경입니다. 창을 닫으면 분할합니다.")
        points = open_window(image)
        plt.show()
        if not points:
            fail("찍은 점이 없습니다. 창에서 분할할 곳을 클릭하거나 --point \"x,y\"를 쓰세요")
        print("찍은 점: --point \"" + ";".join(f"{x:g},{y:g},{label}" for x, y, label in points) + '"')

    predictor.set_image(image)
    masks, scores, _ = predictor.predict(
        point_coords=np.array([point[:2] for point in points], np.float32) if points else None,
        point_labels=np.array([point[2] for point in points]) if points else None,
        box=np.array(box, np.float32) if box else None,
        multimask_output=True,
    )
    masks = masks > 0
    best = int(scores.argmax())
    name = Path(args.image).stem
    result_path, mask_path = args.output / f"{name}_result.png", args.output / f"{name}_mask.png"
    save_result(result_path, image, points, box, masks, scores, title)
    write_file(mask_path, cv2.imencode(".png", masks[best].astype(np.uint8) * 255)[1].tobytes())
    print(f"마스크 {best + 1}번 (점수 {scores[best]:.3f}), 이미지의 {masks[best].mean():.1%}")
    print(f"저장: {result_path}, {mask_path}")


if __name__ == "__main__":
    try:
        main()
    except (ImageError, OSError) as error:
        fail(error)

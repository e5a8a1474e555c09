"""Shared code of the scripts in extras/ that run SAM 2: loading it for images or videos, and its flags.

    from common import load_predictor      Python finds this file beside the script

The first three functions are the end of the shared block of the scripts at the top level; a test fails if they differ.
files.py has the rest of the block.
"""

import os
import re
import textwrap
import warnings
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported

import sam2
import torch
from files import fail
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):  # a notebook's stream has no such method
        _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
_hangul = ("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans CJK JP")
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _hangul if name in font_manager.get_font_names())]
plt.rcParams["text.parse_math"] = False  # file names may contain "$"
cv2.utils.logging.setLogLevel(0)  # a damaged file is reported once, by the script
warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # called inside sam2

FORMATS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # of images, by suffix in lower case


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


def read_config(model_cfg):
    """A model's config: a YAML file, or the name of one in the sam2 package ("configs/sam2.1/sam2.1_hiera_s.yaml")."""
    try:
        config = OmegaConf.load(model_cfg if Path(model_cfg).is_file() else Path(sam2.__file__).parent / model_cfg)
        return OmegaConf.create(OmegaConf.to_container(config.model, resolve=True))
    except Exception as error:  # OmegaConf and YAML raise their own error types
        fail(f"모델 설정을 열 수 없습니다: {model_cfg} ({textwrap.shorten(str(error), 200)}). "
             "예: configs/sam2.1/sam2.1_hiera_s.yaml")


def load_predictor(model_cfg, checkpoint, device, image_size=None):
    """A SAM2ImagePredictor on `device`, in eval mode; image_size: its input's side in pixels, if not the config's."""
    config = read_config(model_cfg)
    config.image_size = image_size or config.image_size
    model = instantiate(config, _recursive_=True).eval()
    load_weights(model, checkpoint, model_cfg)
    predictor = SAM2ImagePredictor(model.to(device))
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


def load_weights(model, checkpoint, model_cfg):
    """Load a checkpoint, {"model": state_dict} or a bare state dict, into a SAM 2 of the config `model_cfg`.

    Fails if it is missing, damaged, of another model or not finite; warns if it was trained at another image size.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        official = re.fullmatch(r"sam2\.1_hiera_(tiny|small|base_plus|large)\.pt", checkpoint.name)
        command = f" 받기: python download_dataset.py --checkpoint {official[1]}" if official else ""
        fail(f"체크포인트가 없습니다: {checkpoint}.{command} (체크포인트 없이 체험하려면: make demo)")
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = dict(saved.get("model", saved))
        if "state_dict" in weights:
            raise ValueError("가중치가 'state_dict' 항목에 있습니다 (PyTorch Lightning)")
        model.load_state_dict(weights)
        if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"유한하지 않은 가중치: {', '.join(wrong[:3])}")
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise  # not the file's fault
    except Exception as error:  # torch.load raises many error types for a damaged file
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f"가중치가 아닌 값 {refused[1]}이(가) 들어 있습니다" if refused else textwrap.shorten(str(error), 400)
        fail(f"체크포인트 {checkpoint}가 손상되었거나 설정 {model_cfg}와 맞지 않습니다: {reason}. "
             '다른 도구의 파일이면 가중치만 저장하세요: torch.save({"model": model.state_dict()}, 파일)')
    trained_size = saved.get("image_size", model.image_size)
    if trained_size != model.image_size:
        print(f"주의: {checkpoint}는 --image-size {trained_size}로 학습했는데 {model.image_size}로 실행합니다.")


def load_video_predictor(model_cfg, checkpoint, device, image_size=None):
    """Build a SAM 2 for videos and load its weights; returns a SAM2VideoPredictor on `device`, in eval mode.

    Arguments as in load_predictor. Holes in masks are not filled, because sam2 needs its CUDA extension for that,
    which not every installation has.
    """
    config = read_config(model_cfg)
    config.image_size = image_size or config.image_size
    config._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    config.sam_mask_decoder_extra_args = dict(  # as sam2.build_sam.build_sam2_video_predictor sets them
        dynamic_multimask_via_stability=True, dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98)
    config.binarize_mask_from_pts_for_mem_enc = True
    config.fill_hole_area = 0
    model = instantiate(config, _recursive_=True).eval()
    model.memory_attention.register_forward_pre_hook(convert_memory, with_kwargs=True)
    load_weights(model, checkpoint, model_cfg)
    return model.to(device)


def convert_memory(_, args, kwargs):
    """Convert the memory to the type of the current features (a forward pre-hook of sam2's MemoryAttention).

    sam2 stores memories as bfloat16. Concatenating them with float32 object pointers makes them float32, but an object
    has no pointer yet on frames before its first prompt, and there sam2 would fail without autocast.
    """
    return args, {**kwargs, "memory": kwargs["memory"].to(kwargs["curr"][0].dtype)}


def add_model_flags(parser, output):
    """Add the flags of every script that runs SAM 2. output: default of --output."""
    parser.add_argument("--original", action="store_true", help="파인튜닝 모델 대신 원본 모델 사용")
    parser.add_argument("--output", "-o", type=Path, default=Path(output), help=f"결과 폴더 (기본: {output})")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml",
                        help="모델 설정 이름 또는 YAML 경로 (기본: configs/sam2.1/sam2.1_hiera_s.yaml)")
    parser.add_argument("--checkpoint", default="checkpoints/sam2.1_hiera_small.pt",
                        help="원본 체크포인트 (기본: checkpoints/sam2.1_hiera_small.pt)")
    parser.add_argument("--finetuned", default="output/sam2_best.pt",
                        help="파인튜닝한 체크포인트 (기본: output/sam2_best.pt)")
    parser.add_argument("--image-size", type=int, choices=[512, 768, 1024],
                        help="모델 입력 한 변, 픽셀 (기본: 모델 설정대로)")
    parser.add_argument("--device", default="auto", help="장치: auto, mps, cuda, cpu (기본: auto)")


def choose_checkpoint(args):
    """Path of the checkpoint to load: --finetuned, or --checkpoint with --original or without a fine-tuned file."""
    if args.original:
        return args.checkpoint
    if not Path(args.finetuned).is_file():
        print(f"파인튜닝한 모델이 아직 없어 원본 모델을 사용합니다: {args.finetuned}")
        return args.checkpoint
    return args.finetuned

"""Segment an object in a CT or MR volume with SAM 2.1: prompt one slice, track the object through the others.

    python extras/segment_volume.py --volume ct.nii.gz --point "24,310,205"      slice, x, y
    python extras/segment_volume.py --volume ct.nii.gz                           a window with a slice slider
    python extras/segment_volume.py --volume DIR --series 2                      a DICOM series

The slices are treated as the frames of a video. Indices are those of the volume in nibabel's closest canonical
orientation (RAS): x increases towards the patient's right, y towards the front, z towards the head. The model and the
window see slices in radiological view: front or head at the top, the patient's right on the left.

Chapters:
    settings         axes, windows of Hounsfield units, the mark of the masks
    the run          main() and the command line
    earlier results  which files in the output folder may be replaced
    reading          the volume, and its slices as the frames of a video
    segmenting       with the memory of other slices, or each slice on its own
    writing          mask, table, summary, montage
"""

import argparse
import gzip
import json
import math
import re
import sys
import textwrap
import zlib
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from common import add_model_flags, choose_checkpoint, load_video_predictor
from dicom_files import choose_series, is_dicom, is_own_seg, patient_of, read_series, seg_bytes
from files import (
    ImageError,
    calculate_iou,
    detect_device,
    fail,
    run,
    save_figure,
    write_csv,
    write_file,
    write_json,
)
from matplotlib import pyplot as plt
from tqdm import tqdm
from tracking import (
    FrameWindow,
    add_prompts,
    as_label,
    check_frame_prompts,
    find_without_prompt,
    object_scores,
    parse_numbers,
    sorted_box,
    start_state,
    track,
)
from volume_files import (
    TOLERANCE,
    affine_in_mm,
    doubts_about_affine,
    doubts_about_header,
    doubts_about_values,
    labels_of,
    load_nifti,
    voxels_apart,
)
from window import add_web_flag, overlay_labels

from test_my_image import require_display

# ---- settings ----

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}
WINDOWS = {"brain": (40, 80), "blood": (80, 200), "stroke": (40, 40), "bone": (600, 2800), "lung": (-600, 1500),
           "abdomen": (50, 400)}  # level, width in Hounsfield units, from radiopaedia.org/articles/windowing-ct
MONTAGE_SLICES = 20
MARK = "segment_volume.py"  # header field "descrip" of every mask written here; files without it are not overwritten.
# A checksum of the voxels follows, because some programs keep this field when they save an edited mask.


# ---- the run ----


def main():
    args = parse_args()
    if args.interactive:
        require_display(args.web, '--point "슬라이스,x,y"나 --auto를 주거나')
    else:
        plt.switch_backend("Agg")
    check_results(args)
    series = open_series(args) if args.is_dicom else None
    volume = Volume(args.volume, series)
    for doubt in (*doubts_about_values(volume.data, args.window), *doubts_about_affine(volume.image.affine),
                  *(series.doubts if series else doubts_about_header(args.volume))):
        print(f"주의: {args.volume}: {doubt}")
    slices = Slices(volume, args.axis, args.window)
    check_frame_prompts(args.prompts, slices, args.volume, "슬라이스")
    prompts = mirror(args.prompts, slices.size)
    truth = slices.of_file(args.truth, volume, args.truth_label) if args.truth else None

    checkpoint, device = choose_checkpoint(args), detect_device(args.device)
    predictor = load_video_predictor(args.model_cfg, checkpoint, device, args.image_size)
    height, width = slices.size
    print(f"모델: {checkpoint}, 장치: {device}, {args.axis} 슬라이스 {len(slices)}장, 가로 {width}, 세로 {height}픽셀")
    mask, scores = np.zeros((len(slices), height, width), bool), np.full(len(slices), np.nan)

    if args.auto:
        prompts = find_without_prompt(predictor, slices)

    def follow(prompts):
        return segment_slices(predictor, slices, prompts, args.each_slice, mask, scores, args.max_gap)

    is_done = False
    if args.interactive:
        print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자입니다. Enter를 누르면 분할하고, 창을 닫으면 저장합니다.")
        window = FrameWindow(slices, predictor, follow, args.name.encode(errors="replace").decode(), max_object=1,
                             first=len(slices) // 2, aspect=slices.aspect, voxel_ml=voxel_volume(volume) / 1000,
                             sides="AP" if args.axis == "sagittal" else "RL")
        window.show()
        args.window = slices.window
        prompts, is_done = window.prompts, window.tracked_prompts == window.prompts
        if not prompts:
            fail("프롬프트가 없습니다. 창에서 대상을 클릭하거나 --point \"슬라이스,x,y\"를 쓰세요")
        print(f"같은 결과를 얻는 옵션: {settings_as_flags(args)}{as_flags(mirror(prompts, slices.size))}")
        if window.is_tracking:
            fail("분할하는 중에 창을 닫아 멈췄습니다. 저장하지 않았습니다")
    if not is_done:
        for _ in follow(prompts):
            pass
    details = {"checkpoint": str(checkpoint), "model_cfg": args.model_cfg, "image_size": predictor.image_size}
    if series:
        details.update(series=args.series, modality=series.modality, **args.patient)
    save_volume_results(args, volume, slices, prompts, mask, scores, truth, details)


def parse_args():
    parser = argparse.ArgumentParser(
        description="CT나 MR 볼륨의 대상을 SAM 2.1로 분할합니다. 프롬프트가 없으면 창을 엽니다.")
    parser.add_argument("--volume", "-v", required=True, metavar="PATH",
                        help="NIfTI 파일(.nii, .nii.gz)이나 DICOM 시리즈가 든 폴더, 그 안의 파일, DICOMDIR")
    parser.add_argument("--series", type=int, metavar="N", help="폴더에 DICOM 시리즈가 여럿이면 쓸 것의 번호")
    parser.add_argument("--keep-patient", action="store_true",
                        help="DICOM의 환자 정보(이름, ID, 검사일 등)를 화면과 summary.json에 남김")
    parser.add_argument("--point", "-p", type=parse_slice_points, default=[],
                        help='점: "슬라이스,x,y" 또는 "슬라이스,x,y,라벨;..." (라벨 1 전경, 0 배경; 기본 1)')
    parser.add_argument("--box", type=parse_slice_boxes, default={},
                        help='상자: "슬라이스,x1,y1,x2,y2", 여러 슬라이스면 ";"로 이어서')
    parser.add_argument("--auto", action="store_true",
                        help="프롬프트 없이, 모델이 학습한 것이 가장 분명한 슬라이스에서 시작")
    parser.add_argument("--axis", choices=AXES, default="axial",
                        help="슬라이스의 방향 (기본: axial)")
    parser.add_argument("--window", type=parse_window, default="brain", metavar="이름",
                        help=f'밝기 범위: {", ".join(WINDOWS)}, "레벨,폭" (HU), 또는 MR에는 none (기본: brain)')
    parser.add_argument("--max-gap", type=int, default=3, metavar="N",
                        help="대상이 연속 N장에서 보이지 않으면 그 방향의 추적을 끝냄, 0이면 볼륨 끝까지 (기본: 3)")
    parser.add_argument("--each-slice", action="store_true",
                        help="기억으로 따라가지 않고 프롬프트가 있는 슬라이스만 하나씩 분할")
    parser.add_argument("--truth", metavar="FILE", help="정답 마스크 NIfTI: Dice와 IoU를 계산 (0.5보다 큰 값이 대상)")
    parser.add_argument("--truth-label", type=int, action="append", metavar="N",
                        help="정답 마스크에 라벨이 여럿이면 비교할 라벨, 여러 번 주면 합침")
    add_web_flag(parser)
    add_model_flags(parser, "output/my_volumes/이름")
    # after a space, because argparse takes "-600,1500" for a flag
    args = parser.parse_args([re.sub("^(?=-[0-9.]+,)", " ", argument) for argument in sys.argv[1:]])
    args.prompts = {(number, 1): ([point for own, point in args.point if own == number], args.box.get(number))
                    for number in {number for number, _ in args.point} | set(args.box)}
    args.interactive = not (args.prompts or args.auto)
    if args.web is not None and not args.interactive:
        parser.error("--web은 프롬프트 없이 창을 열 때만 씁니다")
    if args.auto and (args.prompts or args.each_slice):
        parser.error("--auto는 --point, --box, --each-slice와 함께 쓸 수 없습니다")
    if args.max_gap < 0:
        parser.error("--max-gap은 0 이상이어야 합니다")
    if args.truth_label and not args.truth:
        parser.error("--truth-label은 --truth와 함께 씁니다")
    if args.each_slice and args.max_gap != parser.get_default("max_gap"):
        parser.error("--max-gap과 --each-slice는 함께 쓸 수 없습니다")
    args.is_dicom = is_dicom(args.volume)
    if Path(args.volume).is_file() and not args.is_dicom and (args.series is not None or args.keep_patient):
        parser.error("--series와 --keep-patient는 DICOM에만 씁니다")
    args.name = Path(args.volume).name
    if args.is_dicom:
        path = Path(args.volume).resolve()
        args.name = (path if path.is_dir() else path.parent).name + (f"_{args.series}" if args.series else "")
    for suffix in (".gz", ".nii", ".img", ".hdr"):
        args.name = args.name.removesuffix(suffix)
    if args.output == parser.get_default("output"):
        args.output = args.output.with_name(args.name)
    return args


def parse_slice_points(text):
    """Parse "slice,x,y" or "slice,x,y,label;...": a list of (slice, (x, y, label)), in voxels."""
    return [(slice_number(place), (x, y, as_label(*label or [1])))
            for place, x, y, *label in parse_numbers(text, (3, 4), '"슬라이스,x,y" 또는 "슬라이스,x,y,라벨"')]


def parse_slice_boxes(text):
    """Parse "slice,x1,y1,x2,y2;...": {slice: [x1, y1, x2, y2]}, in voxels, x1 <= x2 and y1 <= y2."""
    boxes = {}
    for place, x1, y1, x2, y2 in parse_numbers(text, (5,), '"슬라이스,x1,y1,x2,y2"'):
        if slice_number(place) in boxes:
            raise argparse.ArgumentTypeError(f"슬라이스 {place:g}에 상자가 둘입니다")
        boxes[slice_number(place)] = sorted_box(x1, y1, x2, y2)
    return boxes


def slice_number(place):
    """A slice's index as int. Raises argparse.ArgumentTypeError unless it is a whole number."""
    if place != int(place):
        raise argparse.ArgumentTypeError(f"슬라이스 번호는 정수여야 합니다: {place:g}")
    return int(place)


def parse_window(text):
    """Parse a key of WINDOWS or "level,width": (lowest, highest) value to show in Hounsfield units; None for "none"."""
    if text == "none":
        return None
    (level, width), *others = [WINDOWS[text]] if text in WINDOWS else \
        parse_numbers(text, (2,), f'{", ".join(WINDOWS)}, none, "레벨,폭"')
    if others:
        raise argparse.ArgumentTypeError(f"밝기 범위는 하나여야 합니다: {text}")
    if width <= 0:
        raise argparse.ArgumentTypeError(f"폭은 0보다 커야 합니다: {width:g}")
    return level - width / 2, level + width / 2


def settings_as_flags(args):
    """The flags that set series, axis, window, --max-gap and --each-slice as `args` do; nothing for the defaults."""
    window = "none" if args.window is None else f"{sum(args.window) / 2:g},{args.window[1] - args.window[0]:g}"
    return "".join([f"--series {args.series} " if args.series else "",
                    f"--axis {args.axis} " if args.axis != "axial" else "",
                    f'--window "{window}" ' if window != "40,80" else "",
                    f"--max-gap {args.max_gap} " if args.max_gap != 3 else "",
                    "--each-slice " if args.each_slice else ""])


def as_flags(prompts):
    """The flags --point and --box that give these prompts, which are in indices of the volume."""
    points, boxes = [], []
    for (number, _), (own_points, box) in sorted(prompts.items()):
        points += [f"{number},{x:g},{y:g},{label}" for x, y, label in own_points]
        boxes += [",".join(f"{value:g}" for value in (number, *box))] if box else []
    return " ".join(f'--{name} "{";".join(found)}"' for name, found in (("point", points), ("box", boxes)) if found)


# ---- earlier results ----


def result_paths(args):
    """Paths of what save_volume_results() writes: mask, slices.csv, summary.json, montage and, of a series, SEG."""
    names = [f"{args.name}_mask.nii.gz", "slices.csv", "summary.json", f"{args.name}_montage.png"]
    return [args.output / name for name in (*names, *[f"{args.name}_seg.dcm"] * args.is_dicom)]


def check_results(args):
    """Print which results of an earlier run on this volume will be overwritten; fail if any other file would be."""
    results = result_paths(args)
    for path in filter(None, (args.volume, args.truth)):
        if Path(path).resolve() in [result.resolve() for result in results]:
            fail(f"{path}: 결과를 쓸 자리에 있습니다. 다른 --output을 쓰세요")
    found, mark = [path for path in results if path.exists()], mark_of(results[0])
    edited = [path for path in found if path.suffix == ".dcm" and not is_own_seg(path, mark)]
    if edited or found and not (mark and is_of_volume(results[2], args)):
        fail(f"{(edited or found)[0]}: 이 볼륨의 이전 결과가 아니어서 덮어쓰지 않습니다. 다른 --output을 쓰세요")
    if found:
        print(f"이전 결과를 덮어씁니다: {args.output} ({', '.join(path.name for path in found)})")


def mark_of(path):
    """The mark of a mask that is unchanged since this script wrote it, or None."""
    try:
        image = load_nifti(path)
        mark = voxel_mark(np.asarray(image.dataobj))
        return mark if bytes(image.header["descrip"]).rstrip(b"\0") == mark.encode() else None
    except Exception:  # nibabel, gzip and zlib each raise their own errors
        return None


def voxel_mark(voxels):
    """MARK and a checksum of a mask's voxels."""
    return f"{MARK} {zlib.crc32(voxels.astype(np.uint8).tobytes()):08x}"


def is_of_volume(summary_path, args):
    """Whether an earlier summary belongs to this volume and series; True if there is no summary."""
    try:
        saved = json.loads(summary_path.read_text("utf-8"))
        return (Path(saved["volume"]).resolve(), saved.get("series")) == (Path(args.volume).resolve(), args.series)
    except (OSError, ValueError, KeyError, TypeError):
        return True


# ---- reading ----


class Volume:
    """A three-dimensional NIfTI file, or a Series that was read from DICOM, in canonical (RAS) orientation.

    data: float32 X x Y x Z; affine: 4 x 4, from canonical voxel indices to millimetres. Raises ImageError, naming
    the file, if it cannot be read, is not a 3D NIfTI image of numbers, or has no valid affine.
    """

    def __init__(self, path, series=None):
        self.path, self.series = path, series
        try:
            self.image = series.image if series else load_nifti(path)
            if not isinstance(self.image, nib.Nifti1Pair):
                raise ImageError(f"{path}: NIfTI 영상이 아닙니다 ({type(self.image).__name__})")
            shape, dtype = self.image.shape, self.image.get_data_dtype()
            if len(shape) < 3 or math.prod(shape[3:]) != 1:
                raise ImageError(f"{path}: 3차원 볼륨이 아닙니다 (크기 {' x '.join(map(str, shape))}). "
                                 "여러 시점이면 하나만 따로 저장하세요")
            if dtype.kind not in "iuf":
                raise ImageError(f"{path}: 값의 형식이 {dtype}입니다. 정수나 실수여야 합니다")
            data = self.image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape[:3])
            matrix = affine_in_mm(self.image)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # nibabel, gzip and zlib each raise their own errors
            raise ImageError(f"{path}: 읽을 수 없습니다 ({textwrap.shorten(str(error), 150)})") from None
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12 or not data.size:
            raise ImageError(f"{path}: 복셀이 공간에 놓인 방향과 크기(affine)가 올바르지 않습니다")
        self.orientation = nib.io_orientation(matrix)
        self.data = nib.apply_orientation(data, self.orientation)
        self.affine = matrix @ nib.orientations.inv_ornt_aff(self.orientation, data.shape)
        if not np.isfinite(self.data).any():
            raise ImageError(f"{path}: 유한한 값이 없습니다")

    def restore(self, mask):
        """Convert a bool X x Y x Z mask to a NIfTI image on the file's own grid, with its affine and header codes.

        Fields that describe the values of the file are not copied: scaling, intent, header extensions.
        """
        back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), self.orientation)
        kind = nib.Nifti2Image if isinstance(self.image, nib.Nifti2Pair) else nib.Nifti1Image
        source = self.image.header
        header = kind.header_class(source.binaryblock, source.endianness, check=False)  # works for a .hdr/.img pair too
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
        header.set_intent("none")
        voxels = nib.apply_orientation(mask.astype(np.uint8), back).reshape(self.image.shape)
        header["descrip"] = voxel_mark(voxels)
        header["cal_min"] = header["cal_max"] = 0  # display range of the CT
        return kind(voxels, self.image.affine, header)


class Slices:
    """The slices of a volume along an axis as images, uint8 H x W x 3: the window's range of values becomes 0 to 255.

    axis: a key of AXES; window: (lowest, highest) value, or None for the 1st to the 99th percentile.
    size: (H, W); aspect: height of a pixel / its width; pixel_area in mm².
    """

    def __init__(self, volume, axis, window):
        self.axis = AXES[axis]
        self.values = self.to_pictures(volume.data)
        finite = volume.data[np.isfinite(volume.data)]
        self.low, self.high = window or np.percentile(finite, [1, 99])
        self.window = window
        self.size = self.values.shape[1:]
        across, down = (volume.affine[:3, axis] for axis in range(3) if axis != self.axis)
        self.aspect = np.linalg.norm(down) / np.linalg.norm(across)
        self.pixel_area = np.linalg.norm(np.cross(across, down))

    def change_window(self, level, width):
        """Raise the level by this many tenths of the width and multiply the width, both rounded to three digits."""
        new_width = float(f"{(self.high - self.low) * width:.3g}") or 1
        new_level = float(f"{(self.low + self.high) / 2 + (self.high - self.low) * level / 10:.3g}")
        self.low, self.high = self.window = new_level - new_width / 2, new_level + new_width / 2

    def to_pictures(self, data):
        """X x Y x Z to slices x H x W in radiological view, without copying."""
        return np.moveaxis(data, self.axis, 0).transpose(0, 2, 1)[:, ::-1, ::-1]

    def from_pictures(self, pictures):
        """The inverse of to_pictures."""
        return np.moveaxis(pictures[:, ::-1, ::-1].transpose(0, 2, 1), 0, self.axis)

    def of_file(self, path, volume, labels=None):
        """Read a mask from a NIfTI file: bool slices x H x W, True where the value is one of `labels`, or above 0.5.

        Raises ImageError if its grid is not that of `volume`, if it has several labels and none is chosen, or if it has
        none of a chosen label.
        """
        other = Volume(path)
        if other.data.shape != volume.data.shape or \
                voxels_apart(volume.affine, other.affine, volume.data.shape) >= TOLERANCE:
            raise ImageError(f"{path}: 크기나 공간에서의 위치(affine)가 볼륨과 다릅니다 ({volume.path})")
        found, values = labels_of(other.data), np.unique(other.data[other.data > 0.5])
        if len(values) > 10 and (values != np.round(values)).any():
            raise ImageError(f"{path}: 마스크가 아닌 것 같습니다: 정수가 아닌 값이 여럿입니다")
        if labels is None and len(found) > 1 or not set(labels or []) <= set(found):
            shown = ", ".join(map(str, found[:20])) + (", ..." if len(found) > 20 else "")
            raise ImageError(f"{path}: 비교할 라벨을 --truth-label로 고르세요. 이 파일의 라벨: {shown or '없음'}")
        return self.to_pictures(np.isin(np.round(other.data), labels or found))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        grey = np.clip((self.values[index] - self.low) / ((self.high - self.low) or 1), 0, 1) * 255
        return np.repeat(np.nan_to_num(grey).round().astype(np.uint8)[..., None], 3, axis=2)


def mirror(prompts, size):
    """Convert prompts from indices of the volume to pixels of the slice, or back: both axes are reversed.

    size: (H, W). Coordinates outside are clipped to the border: a box that ends at x = W would begin at -1.
    """
    height, width = size
    return {key: ([(max(0, width - 1 - x), max(0, height - 1 - y), label) for x, y, label in points],
                  [max(0, width - 1 - box[2]), max(0, height - 1 - box[3]), max(1, width - 1 - box[0]),
                   max(1, height - 1 - box[1])] if box else None)
            for key, (points, box) in prompts.items()}


def open_series(args):
    """Read the DICOM series that --volume and --series name; returns a Series.

    Sets args.patient, {name: text}, which is empty without --keep-patient, and args.window, to None instead of the
    default if the values are not Hounsfield units.
    """
    series = read_series(choose_series(args.volume, args.series))
    args.patient = patient_of(series) if args.keep_patient else {}
    for name, value in args.patient.items():
        print(f"{name}: {value}")
    if series.modality != "CT" and args.window == parse_window("brain"):
        args.window = None
        print(f"{series.modality} 영상: Hounsfield 단위(HU)의 창 대신 --window none을 씁니다")
    return series


# ---- segmenting ----


def segment_slices(predictor, slices, prompts, each_slice, mask, scores, max_gap=0):
    """Segment the volume; yields (slice, label map) and fills `mask` and `scores` in place.

    mask: bool slices x H x W; scores: float, one per slice, NaN where none was predicted.
    each_slice: segment only the prompted slices, each without memory of the others. max_gap: see track(); unlike
    an object in a video, one in a volume rarely disappears and reappears.
    """
    mask[:], scores[:] = False, np.nan
    found = segment_each(predictor, slices, prompts) if each_slice else track(predictor, slices, prompts, max_gap)
    with tqdm(total=len(prompts) if each_slice else len(slices), desc="분할", unit="장", disable=None) as bar:
        for number, _, logits, (score,) in found:
            bar.update(np.isnan(scores[number]))
            mask[number], scores[number] = (logits[0] > 0).cpu().numpy(), score
            yield number, mask[number].astype(np.uint8)


def segment_each(predictor, slices, prompts):
    """Segment every prompted slice without memory of the others; yields as track() does."""
    state = start_state(predictor, slices)
    for key, prompt in sorted(prompts.items()):
        predictor.reset_state(state)
        objects, logits = add_prompts(predictor, state, {key: prompt})
        predictor.propagate_in_video_preflight(state)
        yield key[0], objects, logits, object_scores(state, key[0])


# ---- writing ----


def save_volume_results(args, volume, slices, prompts, mask, scores, truth, details):
    """Write mask, tables and montage; print the volume in ml and, with a truth, Dice and IoU.

    details: {name: value}, the entries about model and series in summary.json.
    """
    mask_path, slices_path, summary_path, montage_path, *seg_path = paths = result_paths(args)
    restored = volume.restore(slices.from_pictures(mask))
    write_file(mask_path, gzip.compress(restored.to_bytes(), mtime=0))
    for path in seg_path:
        save_seg(path, volume.series, np.asarray(restored.dataobj))

    voxel = voxel_volume(volume)
    summary = {"volume": str(args.volume), "volume_ml": mask.sum() * voxel / 1000, "voxels": int(mask.sum()),
               "voxel_mm3": voxel, "axis": args.axis, "window": [float(slices.low), float(slices.high)],
               "each_slice": args.each_slice, "max_gap": args.max_gap,
               "prompts": "--auto" if args.auto else as_flags(mirror(prompts, slices.size)), **details}
    reached = np.flatnonzero(~np.isnan(scores))
    if not args.each_slice and len(reached) < len(slices):
        print(f"슬라이스 {reached[0]}~{reached[-1]}만 따라갔습니다. 그 밖에는 대상이 없다고 보았습니다 "
              f"(--max-gap {args.max_gap})")
    print(f"부피: {summary['volume_ml']:.3f} ml ({summary['voxels']}복셀, 복셀 하나 {voxel:.4g} mm³)")
    if truth is not None:
        summary.update(truth_label=args.truth_label, dice=calculate_dice(mask, truth), iou=calculate_iou(mask, truth),
                       truth_ml=truth.sum() * voxel / 1000)
        print(f"정답과 비교: Dice {summary['dice']:.4f}, IoU {summary['iou']:.4f}, "
              f"정답 부피 {summary['truth_ml']:.3f} ml")
    write_json(summary_path, summary)

    rows = [["slice", "area_mm2", "score", *(["dice"] if truth is not None else [])]]
    shown = ~np.isnan(scores) | (truth.any(axis=(1, 2)) if truth is not None else False)
    for number in np.flatnonzero(shown):
        score = "" if np.isnan(scores[number]) else f"{scores[number]:.4f}"
        row = [number, f"{mask[number].sum() * slices.pixel_area:.3f}", score]
        if truth is not None:
            is_empty = not (truth[number].any() or mask[number].any())
            row.append("" if is_empty else f"{calculate_dice(mask[number], truth[number]):.4f}")
        rows.append(row)
    write_csv(slices_path, rows)
    save_figure(draw_montage(slices, mask, truth), montage_path)
    print(f"저장: {args.output} ({', '.join(path.name for path in paths if path.exists())})")


def save_seg(path, series, voxels):
    """Write the mask of a series, uint8 on the grid of its image, as DICOM SEG; warn if the series lacks attributes.

    None is written for a tilted series: its slices lie correctly in a SEG, but dcmqi (3D Slicer) and SimpleITK stack
    them along the normal.
    """
    path.unlink(missing_ok=True)  # of an earlier run
    if series.is_tilted:
        return
    try:
        write_file(path, seg_bytes(series, voxels, voxel_mark(voxels)))
        print(f"{path.name}: DICOM SEG라서 시리즈의 환자 이름과 ID가 그대로 들어 있습니다")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"주의: {path.name}: 쓰지 않았습니다. 시리즈의 헤더에 DICOM SEG가 요구하는 항목이 없거나 틀렸습니다 "
              f"({type(error).__name__})")


def voxel_volume(volume):
    """The volume of a voxel in mm³; also for oblique and sheared grids."""
    return abs(np.linalg.det(volume.affine[:3, :3]))


def calculate_dice(pred_mask, gt_mask):
    """Dice coefficient of two boolean masks of one shape, 0 to 1: 2|A∩B| / (|A| + |B| + 1e-6)."""
    return float(2 * np.logical_and(pred_mask, gt_mask).sum() / (pred_mask.sum() + gt_mask.sum() + 1e-6))


def draw_montage(slices, mask, truth):
    """A figure of up to MONTAGE_SLICES slices, evenly spaced among those with the object: mask tinted, truth green."""
    shown = mask.any(axis=(1, 2)) | (truth.any(axis=(1, 2)) if truth is not None else False)
    numbers = np.flatnonzero(shown) if shown.any() else np.arange(len(slices))
    places = np.linspace(0, len(numbers) - 1, min(MONTAGE_SLICES, len(numbers))).round().astype(int)
    numbers = numbers[places]
    columns = min(5, len(numbers))
    rows = math.ceil(len(numbers) / columns)
    height = min(max(3 * slices.size[0] * slices.aspect / slices.size[1], 1), 6)
    figure, panels = plt.subplots(rows, columns, squeeze=False, figsize=(3 * columns, (height + 0.3) * rows),
                                  layout="constrained")
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, number in zip(panels.flat, numbers):
        drawn = overlay_labels(slices[number], mask[number].astype(np.uint8))
        if truth is not None:
            edges, _ = cv2.findContours(truth[number].astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
            drawn = cv2.drawContours(drawn, edges, -1, (0, 255, 0), 1)
        panel.imshow(drawn, aspect=slices.aspect)
        panel.set_title(f"slice {number}: {mask[number].sum() * slices.pixel_area:.0f} mm²", fontsize=10)
    return figure


if __name__ == "__main__":
    run(main, "--image-size 512나 --device cpu를 써 보세요")

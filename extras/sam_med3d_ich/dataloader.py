"""Read, check, transform and augment the volumes and masks of a CSV, up to the input of the model.

    read_rows -> check_patients -> Volumes -> TrainingSet, ValidationSet -> training_loader, validation_loader

A case is a dict of MetaTensors [1, X, Y, Z] in nibabel's canonical axes (x to the right, y to the front, z up):
"image" and "mask" have cubic voxels, "truth" is the mask with the voxels of its file. The published weights expect the
preprocessing of SAM-Med3D's training, which used torchio: 1.5 mm voxels, a crop around the target, padded with 0, and
a z-score over the voxels above 0.

Chapters:
    settings            columns, suffixes, the strength of the augmentation
    the CSV             rows, their masks, patients in both files
    the files           volumes and masks, pickles without running their code, cases
    input of the model  crops, normalization, augmentation, batches
"""

import csv
import math
import pickle
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CopyItemsd,
    Lambdad,
    Orientationd,
    Pad,
    RandFlipd,
    RandGaussianNoised,
    RandRotated,
    Spacingd,
    SpatialCrop,
)
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from utils import DataError, reason
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

# ---- settings ----

COLUMNS = ("path", "ich", "patient_id")
SUFFIXES = (".nii", ".nii.gz", ".npy", ".pkl")
NO_LABEL = -100    # the default ignore_index of torch's cross_entropy
ROTATION = 0.17    # radians around each axis: 10 degrees
NOISE = 0.1        # standard deviation; that of the image is 1
MOST_LABELS = 10   # a file with more different values is not a mask


# ---- the CSV ----


@dataclass(frozen=True)
class Row:
    """One volume: place of its row ("train.csv 3행"), file, label (0 or 1), patient, and file of the mask or None."""
    place: str
    path: Path
    ich: int
    patient_id: str
    mask: Path | None


def suffix_of(path):
    """The suffix of a path in lower case, with ".nii.gz" as one suffix."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def stem_of(path):
    """The file name without suffix_of(path)."""
    return Path(path).name[:-len(suffix_of(path)) or None]


def read_csv(path):
    """(line number, values by column) of each row of a UTF-8 CSV, with or without a BOM. Raises DataError."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)
    text = []
    for number, line in enumerate(lines, 1):
        try:
            text.append(line.decode())
        except UnicodeDecodeError:
            raise DataError(f"{path} {number}행: UTF-8이 아닙니다. Excel이라면 'CSV UTF-8'로 다시 저장하세요") from None
    reader = csv.DictReader(text, strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} 1행: 열이 없습니다: {', '.join(missing)} (있어야 하는 열: {', '.join(COLUMNS)})")
        rows = [(reader.line_num, {name: (values[name] or "").strip() for name in COLUMNS}) for values in reader]
    except csv.Error as error:
        raise DataError(f"{path} {reader.line_num}행: CSV로 읽을 수 없습니다 ({error})") from None
    if not rows:
        raise DataError(f"{path}: 행이 없습니다")
    return rows


def find_masks(mask_dir, path):
    """The files {stem}.nii and {stem}.nii.gz in mask_dir that exist, which may be the mask of a volume."""
    candidates = (mask_dir / f"{stem_of(path)}{suffix}" for suffix in (".nii", ".nii.gz"))
    return [candidate for candidate in candidates if candidate.is_file()]


def read_rows(csv_path, mask_dir):
    """The rows of a CSV and the problems found in them: (list of Row, list of messages). Raises DataError, OSError.

    Paths in the CSV are relative to the folder of the CSV.
    """
    rows, problems = [], []
    for number, values in read_csv(csv_path):
        place = f"{csv_path} {number}행"
        path = csv_path.parent / values["path"]
        wrong = [name for name in COLUMNS if not values[name]]
        if wrong:
            problems.append(f"{place}: 비어 있습니다: {', '.join(wrong)}")
        elif not re.fullmatch(r"[01](\.0*)?", values["ich"]):  # pandas writes a column with gaps as 1.0
            problems.append(f"{place}: ich는 0이나 1이어야 합니다: {values['ich']}")
        elif suffix_of(path) not in SUFFIXES:
            problems.append(f"{place}: {path}: 읽을 수 있는 형식은 {', '.join(SUFFIXES)}입니다")
        elif not path.is_file():
            problems.append(f"{place}: {path}: 파일이 없습니다")
        else:
            masks = find_masks(mask_dir, path)
            if len(masks) > 1:
                problems.append(f"{place}: 마스크가 둘입니다. 하나만 남기세요: {masks[0]}, {masks[1]}")
            elif masks and masks[0].samefile(path):
                problems.append(f"{place}: 마스크가 볼륨 자신입니다: {path}. 마스크는 볼륨과 다른 폴더에 두세요")
            elif not masks and values["ich"] == "1":
                problems.append(f"{place}: 마스크가 없습니다: {mask_dir / stem_of(path)}.nii 또는 .nii.gz")
            rows.append(Row(place, path, int(float(values["ich"])), values["patient_id"], masks[0] if masks else None))
    return rows, problems


def check_patients(train, val):
    """Messages about rows that conflict: a patient in both sets, a volume twice, two volumes with one mask."""
    problems = []
    patients = {row.patient_id: row.place for row in reversed(train)}
    for patient_id in dict.fromkeys(row.patient_id for row in val if row.patient_id in patients):
        place = next(row.place for row in val if row.patient_id == patient_id)
        problems.append(f"{place}: 환자 {patient_id}: 학습에도 있습니다 ({patients[patient_id]}). "
                        "한 환자의 볼륨은 모두 한쪽에 있어야 합니다")
    seen = {}
    for row in [*train, *val]:
        for what, key in (("같은 볼륨이", row.path.resolve()), ("같은 마스크를 쓰는 볼륨이", row.mask)):
            if key is not None and (before := seen.setdefault((what, key), row)) is not row:
                problems.append(f"{row.place}: {what} 또 있습니다: {row.path} ({before.place})")
                break
    return problems


# ---- the files ----


class RefusedPickle(pickle.UnpicklingError):
    """A pickle with an object that cannot be part of a volume; the message names the object."""


class StandIn:
    """Base of the classes that replace the names allowed in a pickle, so that it cannot call functions of numpy.

    All have a __setstate__. Without one a pickle could set attributes of the class itself.
    """
    array = None

    def __setstate__(self, state):
        raise RefusedPickle("unexpected state")


class PickledDtype(StandIn):
    """numpy.dtype of numbers and booleans: numpy.dtype("f4", False, True), and then a state with the byte order."""

    def __init__(self, code, align=False, copy=False):
        if not re.fullmatch("[biuf][1248]", code):
            raise RefusedPickle(f"dtype {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray(StandIn):
    """An array: numpy's _reconstruct(ndarray, (0,), b"b"), and then a state with shape, dtype and data."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class PickledBuffer(StandIn):
    """A contiguous array in pickle protocol 5: numpy's _frombuffer(content, dtype, shape, order)."""

    def __init__(self, content, dtype, shape, order):
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


class PickledScalar(StandIn):
    """A numpy scalar: scalar(dtype, content)."""

    def __new__(cls, dtype, content):
        return np.frombuffer(content, dtype.dtype)[0]


class PickledBytes(StandIn):
    """Bytes in pickle protocols 0 to 2: _codecs.encode(text, "latin1")."""

    def __new__(cls, text, encoding):
        return text.encode("latin1")


class VolumeUnpickler(pickle.Unpickler):
    """Loads numbers, strings, containers and numeric numpy arrays; raises RefusedPickle for anything else."""

    KNOWN = {"numpy.ndarray": PickledArray, "numpy.dtype": PickledDtype, "_codecs.encode": PickledBytes,
             **{f"numpy.{core}.{name}": stand_in for core in ("core", "_core") for name, stand_in in (
                 ("multiarray._reconstruct", PickledArray), ("multiarray.scalar", PickledScalar),
                 ("numeric._frombuffer", PickledBuffer))}}

    def find_class(self, module, name):
        known = self.KNOWN.get(f"{module}.{name}")
        if known is None:
            raise RefusedPickle(f"{module}.{name}")
        return known


def read_pickle(path):
    """The volume of a .pkl and its affine or None. It holds an array, or a dict of "image" and optionally "affine"."""
    with path.open("rb") as file:
        try:
            content = VolumeUnpickler(file).load()
        except RefusedPickle as error:
            raise DataError(f"{path}: 볼륨에 있을 수 없는 것이 들어 있어 열지 않았습니다: {reason(error)}") from None
    parts = content if isinstance(content, dict) else {"image": content}
    parts = {name: value.array if isinstance(value, StandIn) else value for name, value in parts.items()}
    if not isinstance(parts.get("image"), np.ndarray):
        raise DataError(f"{path}: numpy 배열도, 배열 'image'가 있는 dict도 아닙니다")
    return parts["image"], parts.get("affine")


def read_nifti(path):
    """The voxels of a NIfTI file as float32, scaled as in its header, and its affine in mm."""
    image = load_nifti(path)
    return image.get_fdata(dtype=np.float32, caching="unchanged"), affine_in_mm(image)


def read_npy(path):
    """The array of a .npy and None, because it has no affine. Raises ValueError for an array of Python objects."""
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False), None


def read_volume(path):
    """Read a volume or mask: (float32 X x Y x Z, affine, float64 4 x 4 or None). Raises DataError, naming the file."""
    read = {".npy": read_npy, ".pkl": read_pickle}.get(suffix_of(path), read_nifti)
    try:
        array, affine = read(path)
        array = np.require(array, np.float32, "W")
        affine = None if affine is None else np.require(affine, np.float64, "W")
    except DataError:
        raise
    except Exception as error:  # nibabel, numpy, zlib and pickle raise many errors for damaged files
        raise DataError(f"{path}: 읽을 수 없습니다 ({reason(error).removeprefix(f'{path}: ')})") from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(f"{path}: 3차원이 아닙니다: {' x '.join(map(str, array.shape))}")
    if not np.isfinite(array).all():
        raise DataError(f"{path}: NaN이나 무한대가 {np.count_nonzero(~np.isfinite(array))}개 있습니다")
    if affine is not None and (affine.shape != (4, 4) or not np.isfinite(affine).all()
                               or abs(np.linalg.det(affine[:3, :3])) < 1e-6):
        raise DataError(f"{path}: affine이 쓸 수 없는 값입니다")
    return array, affine


def read_pair(row):
    """Read the files of a Row: (image, float32 X x Y x Z; mask, uint8 X x Y x Z, 0 or 1; its labels; affine, 4 x 4).

    The affine is that of the mask, if there is one. Raises DataError, naming the file.
    """
    image, affine = read_volume(row.path)
    if row.mask is None:
        if affine is None:
            raise DataError(f"{row.path}: 복셀 크기를 모릅니다. {stem_of(row.path)}.nii.gz 마스크(모두 0)를 두거나, "
                            ".pkl에 'affine'을 넣거나, NIfTI로 저장하세요")
        return image, np.zeros(image.shape, np.uint8), [], affine
    mask, mask_affine = read_volume(row.mask)
    labels, values = labels_of(mask), np.unique(mask[mask > 0.5])
    if len(values) > MOST_LABELS:  # a volume, also one scaled to 0..1
        raise DataError(f"{row.mask}: 마스크가 아닌 것 같습니다: 0.5보다 큰 값이 {len(values)}가지입니다 "
                        f"({MOST_LABELS}가지까지 받습니다)")
    mask = (mask > 0.5).astype(np.uint8)
    if mask.shape != image.shape:
        raise DataError(f"{row.mask}: 마스크와 볼륨의 크기가 다릅니다: {mask.shape}, {image.shape}")
    if affine is not None and (apart := voxels_apart(affine, mask_affine, image.shape)) >= TOLERANCE:
        raise DataError(f"{row.mask}: 마스크의 affine이 볼륨과 다릅니다 (모서리가 {apart:.1f}복셀까지 어긋남)")
    if row.ich and not mask.any():
        raise DataError(f"{row.mask}: ich가 1인데 마스크가 비어 있습니다")
    if not row.ich and mask.any():
        raise DataError(f"{row.mask}: ich가 0인데 마스크에 출혈이 있습니다")
    return image, mask, labels, mask_affine


def doubts_about(row, image, labels, affine, window):
    """Warnings about files of a Row that can be read but may be wrong: (file, sentence) pairs."""
    limits = window and (window[0] - window[1] / 2, window[0] + window[1] / 2)
    doubts = [(row.path, doubt) for doubt in doubts_about_values(image, limits)]
    files = [path for path in (row.path, row.mask) if path]
    doubts += [(path, doubt) for path in files if suffix_of(path) in (".nii", ".nii.gz")
               for doubt in doubts_about_header(path)]
    doubts += [(files[-1], doubt) for doubt in doubts_about_affine(affine)]
    if len(labels) > 1:
        doubts.append((row.mask, "라벨이 여럿입니다. 0.5보다 큰 값을 모두 출혈로 봅니다"))
    return doubts


def apply_window(image, window):
    """Clip Hounsfield units to (level, width) and subtract the lower end: values above 0 are inside the window."""
    if window is None:
        return image
    level, width = window
    return (image - (level - width / 2)).clip(0, width)


def load_case(row, window, spacing):
    """Read the files of a Row as a case (see the top of this file). Raises DataError, naming row and file.

    The case also has "doubts": see doubts_about().
    """
    try:
        image, mask, labels, affine = read_pair(row)
        case = Compose([  # the window comes first, so that resampling does not mix bone or metal into the brain
            Lambdad("image", partial(apply_window, window=window)),
            Orientationd(("image", "mask"), axcodes="RAS", labels=None),
            CopyItemsd("mask", names="truth"),
            Spacingd(("image", "mask"), (spacing, spacing, spacing), mode=("bilinear", "nearest"), dtype=np.float32),
        ])({"image": MetaTensor(image[None], affine=affine), "mask": MetaTensor(mask[None], affine=affine)})
        if not (case["image"] > 0).any() or case["image"].min() == case["image"].max():
            raise DataError(f"{row.path}: 창 안에 값이 없습니다. Hounsfield 단위가 아니면 --window none을 쓰세요")
        if row.ich and not case["mask"].any():
            raise DataError(f"{row.mask}: 출혈이 너무 작아 {spacing:g} mm 복셀에서 사라집니다")
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from None
    case["doubts"] = doubts_about(row, image, labels, affine, window)
    return case


class Volumes:
    """The cases of a CSV by number, read each time or, after check() with keep, from memory."""

    def __init__(self, rows, args):
        self.rows, self.window, self.spacing, self.kept = rows, args.window, args.spacing, {}
        self.doubts = defaultdict(list)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.kept.get(number) or load_case(self.rows[number], self.window, self.spacing)

    def check(self, title, threads, keep):
        """Read every volume once; returns a list of problems and a list of the haemorrhages' volumes in ml.

        title: text of the progress bar; keep: keep the cases in memory. self.doubts becomes {sentence: [files]}.
        """
        def check(number):
            try:
                return self[number], None
            except DataError as error:
                return None, str(error)

        problems, sizes, pool = [], [], ThreadPoolExecutor(max(1, threads))
        try:
            results = pool.map(check, range(len(self)))
            for number, (case, problem) in enumerate(tqdm(results, title, len(self), disable=None, leave=False)):
                if problem:
                    problems.append(problem)
                    continue
                if self.rows[number].ich:
                    sizes.append(millilitres(case["truth"]))
                for path, doubt in case["doubts"]:
                    self.doubts[doubt].append(path)
                if keep:
                    self.kept[number] = case
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the volumes that are still queued
        return problems, sizes


def millilitres(mask):
    """The volume in ml of a mask, a MetaTensor [1, X, Y, Z] whose affine is in mm."""
    return float(mask.sum() * torch.linalg.det(mask.affine[:3, :3]).abs() / 1000)


# ---- input of the model ----


def target_centre(mask):
    """The middle of the box around a mask [1, X, Y, Z], in voxels, as in torchio's CropOrPad."""
    inside = torch.argwhere(mask[0])
    return ((inside.amin(0) + inside.amax(0) + 1) / 2).tolist()


def head_centre(image):
    """The centre of mass of the voxels above 0 of an image [1, X, Y, Z], in voxels. It does not depend on the mask, and
    the CT table or a cable hardly moves it."""
    return (torch.argwhere(image[0] > 0).float().mean(0) + 0.5).tolist()


def crop_around(tensor, centre, size):
    """Crop size x size x size voxels of a MetaTensor [1, X, Y, Z] around `centre`, in voxels, padded with 0.

    A centre between two voxels is rounded down, as torchio's CropOrPad does for a mask of an odd length.
    """
    start = [math.ceil(place - size / 2 - 0.5) for place in centre]
    before = [max(0, -place) for place in start]
    after = [max(0, place + size - length) for place, length in zip(start, tensor.shape[1:])]
    start = [place + pad for place, pad in zip(start, before)]
    padded = Pad([(0, 0), *zip(before, after)])(tensor)
    return SpatialCrop(roi_start=start, roi_end=[place + size for place in start])(padded)


def z_score(image):
    """Normalize an image so that its voxels above 0 have mean 0 and standard deviation 1."""
    above = image[image > 0]
    if above.numel() < 2 or above.std() == 0:
        return image
    return (image - above.mean()) / above.std()


def augmentation(probability):
    """MONAI's random transforms of an image and its mask, each with this probability, and z_score before the noise."""
    both = ("image", "mask")
    return Compose([
        RandFlipd(both, probability, spatial_axis=0),  # only left and right
        RandRotated(both, ROTATION, ROTATION, ROTATION, probability, mode=("bilinear", "nearest"),
                    padding_mode="zeros"),
        Lambdad("image", z_score),
        RandGaussianNoised("image", probability, std=NOISE),
    ])


class TrainingSet(Dataset):
    """Augmented crops: image and mask (float32 [1, S, S, S]), label (0, 1, or NO_LABEL), number.

    Indexed by (epoch, number). All random numbers depend only on these and the seed, not on workers or on resuming. The
    label is trained only on crops around the head's centre, which does not depend on the mask: a crop around the
    target would reveal the label, because only volumes with a haemorrhage have a target. The label is also ignored
    if the crop or the rotation has cut off the whole haemorrhage.
    """

    def __init__(self, volumes, args):
        self.volumes, self.size, self.seed = volumes, args.image_size, args.seed
        self.augment = augmentation(args.augmentation_prob)

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, key):
        epoch, number = key
        rng = np.random.default_rng([self.seed, epoch, number])
        case, ich = self.volumes[number], self.volumes.rows[number].ich
        around_target = ich and rng.random() < 0.5
        centre = target_centre(case["mask"]) if around_target else head_centre(case["image"])
        crop = {name: crop_around(case[name], centre, self.size) for name in ("image", "mask")}
        self.augment.set_random_state(int(rng.integers(2**32)))
        crop = self.augment(crop)
        without_label = around_target or (ich and not crop["mask"].any())
        return {"image": crop["image"].as_tensor(), "mask": crop["mask"].as_tensor().float(),
                "label": NO_LABEL if without_label else ich, "number": number}


class ValidationSet(Dataset):
    """One volume at a time, without augmentation.

    An item has number and head (crop around the head's centre, float32 [1, 1, S, S, S]). With a haemorrhage it also
    has image and mask (crop around the target, float32 and bool [1, 1, S, S, S]), affine (of this crop), and truth and
    truth_affine (the mask with the voxels of its file, [1, X, Y, Z]).
    """

    def __init__(self, volumes, args):
        self.volumes, self.size = volumes, args.image_size

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, number):
        case = self.volumes[number]
        head = crop_around(case["image"], head_centre(case["image"]), self.size)
        item = {"number": number, "head": z_score(head).as_tensor()[None]}
        if self.volumes.rows[number].ich:
            image, mask = (crop_around(case[name], target_centre(case["mask"]), self.size)
                           for name in ("image", "mask"))
            item |= {"image": z_score(image).as_tensor()[None], "mask": mask.as_tensor()[None] > 0,
                     "affine": image.affine, "truth": case["truth"].as_tensor(), "truth_affine": case["truth"].affine}
        return item


class EpochOrder(Sampler):
    """The (epoch, number) pairs of an epoch in a random order from seed and epoch. Set .epoch before each epoch."""

    def __init__(self, length, seed):
        self.length, self.seed, self.epoch = length, seed, 1

    def __len__(self):
        return self.length

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return iter([(self.epoch, int(number)) for number in order])


def training_loader(volumes, args, pin_memory):
    """Batches of TrainingSet items, according to args. Set .sampler.epoch before each epoch."""
    return DataLoader(TrainingSet(volumes, args), args.batch_size, sampler=EpochOrder(len(volumes), args.seed),
                      num_workers=args.num_workers, persistent_workers=args.num_workers > 0, pin_memory=pin_memory)


def validation_loader(volumes, args):
    """Items of ValidationSet, one at a time."""
    return DataLoader(ValidationSet(volumes, args), batch_size=None, num_workers=args.num_workers,
                      persistent_workers=args.num_workers > 0)

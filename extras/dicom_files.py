"""Read a DICOM series as a NIfTI image, and write a mask of it as DICOM SEG. segment_volume.py uses this file.

    series = read_series(choose_series("dicom/", number=2))             # series.image is a nibabel image
    write_file("mask_seg.dcm", seg_bytes(series, mask, "description"))  # mask: on the grid of series.image

pydicom reads the headers and decodes the pixels, highdicom writes the SEG. This file decides which slices form a
volume. A series that might be misread raises ImageError with a message that says what to do instead. A series that can
be read but may be wrong gets a line in Series.doubts.

highdicom.get_volume_from_series() is not used, for three reasons: it refuses a tilted gantry, it gives no reason if
slices are missing, and it inverts the Hounsfield units of MONOCHROME1 images.

Messages contain no data of the patient and no messages of pydicom, because those quote the header.

Chapters:
    settings   attributes of the header
    series     grouping the slices of a folder
    geometry   the order of the slices, and their place in the patient
    pixels     a series as a NIfTI image
    writing    a mask as DICOM SEG
"""

import collections
import filecmp
import io
import itertools
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from files import ImageError
from pydicom.pixels import apply_modality_lut, pixel_array
from volume_files import TOLERANCE

# ---- settings ----

pydicom.config.settings.reading_validation_mode = pydicom.config.settings.writing_validation_mode = \
    pydicom.config.IGNORE  # scanners write invalid values, and a SEG must repeat those of the patient
for _name in ("pydicom", "highdicom"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=_name)

MODALITIES = ("CT", "MR", "PT")  # others, such as SEG and RTDOSE, may be in the same folder and are skipped
DIFFERENCES = ("ImageType", "EchoTime", "EchoNumbers", "InversionTime", "DiffusionBValue", "FlipAngle",
               "TemporalPositionIdentifier", "AcquisitionNumber")  # may distinguish several images at one position
HEADER = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID",
          "Modality", "SeriesNumber", "InstanceNumber", "Rows", "Columns", "NumberOfFrames",
          "PhotometricInterpretation", "PixelRepresentation", "ImagePositionPatient", "ImageOrientationPatient",
          "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "RescaleType",
          "ModalityLUTSequence", "ConcatenationUID", "SharedFunctionalGroupsSequence",
          "PerFrameFunctionalGroupsSequence", *DIFFERENCES)
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyDescription",
           "SeriesDescription")  # what --keep-patient shows
REQUIRED = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
            "StudyTime", "ReferringPhysicianName")  # a SEG must have them; their values may be empty
DEIDENTIFIED = ("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence")


# ---- series ----


@dataclass(eq=False)
class Plane:
    """One slice: a single-frame file, or frame `frame` of an enhanced file.

    position     3, mm: the center of the first pixel in the patient's LPS coordinates
    orientation  2 x 3: the directions of rows and columns in LPS
    spacing      2, mm: between rows and between columns
    thickness    mm: the distance of slices in the header, or else their thickness; 0 if it has neither
    rescale      the dataset with slope and intercept
    order        the key by which slices are listed
    """

    path: Path
    header: pydicom.Dataset
    frame: int | None
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    thickness: float
    rescale: pydicom.Dataset
    order: tuple


@dataclass(eq=False)
class Series:
    """Slices that have the same series, orientation, size and spacing.

    number      for --series
    difference  what distinguishes these slices from others of the same series, such as an echo time
    image       see read_series(), also for is_tilted
    doubts      warnings in Korean
    """

    number: int
    planes: list
    difference: str = ""
    image: nib.Nifti1Image | None = None
    is_tilted: bool = False
    doubts: list = ()

    @property
    def modality(self):
        return self.planes[0].header.Modality

    def __str__(self):
        header, gaps = self.planes[0].header, np.diff(sorted(heights(self.planes)))
        spacing = " x ".join(f"{value:.4g}" for value in (*self.planes[0].spacing[::-1], np.median(gaps)))
        return (f"{self.number}: {self.modality}, {len(self.planes)}장, {header.Columns} x {header.Rows}픽셀, "
                f"간격 {spacing} mm, SeriesNumber {int(header.get('SeriesNumber') or 0)}{self.difference}")


def is_dicom(path):
    """Whether a path is a folder or a DICOM file: with "DICM" after 128 bytes or, if old, beginning with a tag."""
    path = Path(path)
    if not path.is_file():
        return path.is_dir()
    with path.open("rb") as file:
        start = file.read(132)
    is_old = start[:4] in (b"\x08\0\0\0", b"\x08\0\5\0", b"\x08\0\x08\0", b"\2\0\0\0")
    return start[128:] == b"DICM" or is_old and path.suffix != ".img"  # the voxels of a NIfTI pair may begin like a tag


def choose_series(path, number=None):
    """The Series at a path: a folder and those below it, a DICOMDIR, or one of the series' own files.

    Prints what is skipped and what is chosen. If there are several series and `number` chooses none, prints a list of
    them and raises ImageError.
    """
    path = Path(path)
    is_slice = path.is_file() and path.name.upper() != "DICOMDIR"
    folder = path if path.is_dir() else path.parent
    slices, skipped, left_out = scan(sorted(
        folder.glob("*") if is_slice else folder.rglob("*"), key=lambda found: (found != path, found)))
    found = []
    for planes in group(slices):
        header = planes[0].header
        if "LOCALIZER" in str(header.get("ImageType")) or len(planes) == 1:
            skipped["스카우트나 한 장뿐인 영상"] += len(planes)
            left_out[header.SeriesInstanceUID] += len(planes)
        else:
            found += [Series(len(found) + place, part, difference)
                      for place, (difference, part) in enumerate(split(planes), 1)]
    if skipped:
        print(f"건너뛴 파일: {', '.join(f'{reason} {count}개' for reason, count in skipped.items())}")
    if is_slice:
        found = [series for series in found if path in [plane.path for plane in series.planes]]
    chosen = [series for series in found if number in (None, series.number)]
    if len(chosen) == 1:
        print(f"시리즈 {chosen[0]}")  # with both numbers: the one for --series is not the SeriesNumber
        count = left_out[chosen[0].planes[0].header.SeriesInstanceUID]
        return replace(chosen[0], doubts=[
            f"이 시리즈의 영상 {count}개는 방향이나 간격이 다르거나 손상되어 뺐습니다"] * bool(count))
    for series in found:
        print(f"  {series}")
    raise ImageError(f"{path}: " + ("시리즈를 --series 번호로 고르세요" if found else
                                    "볼륨이 되는 CT, MR, PET 시리즈가 없습니다"))


def scan(paths):
    """Read the headers of files: (slices, skipped, left_out).

    slices    [Plane], sorted by the numbers of series and instance
    skipped   Counter of skipped files by reason
    left_out  Counter, by SeriesInstanceUID, of those files whose header is damaged or has no position
    """
    planes, seen, skipped, left_out = [], {}, collections.Counter(), collections.Counter()
    for path in paths:
        if not path.is_file() or path.name.upper() == "DICOMDIR":
            continue
        if not is_dicom(path):
            skipped["DICOM이 아닌 파일"] += 1
            continue
        header = {}
        try:
            header = pydicom.dcmread(path, force=True, specific_tags=list(HEADER), stop_before_pixels=True)
            if header.get("Modality", "CT") not in MODALITIES:
                skipped["CT, MR, PET 영상이 아닌 DICOM"] += 1
                continue
            list(header)  # converts all values; fails if one is invalid
            found = planes_of(path, header)
            first = seen.setdefault(header.SOPInstanceUID, path)
        except Exception:  # pydicom raises many error types for a damaged file
            skipped["위치와 간격이 없거나 손상된 DICOM"] += 1
            left_out[header.get("SeriesInstanceUID")] += 1
            continue
        if first is not path and filecmp.cmp(first, path, shallow=False):
            skipped["같은 파일의 사본"] += 1
        else:
            planes += found
    return sorted(planes, key=lambda plane: plane.order), skipped, left_out


def planes_of(path, header):
    """The slices of a file, a list of Plane. Raises an exception if it has none, or if their position is unclear."""
    frames, shared = header.get("PerFrameFunctionalGroupsSequence"), header.get("SharedFunctionalGroupsSequence")
    if (header.get("NumberOfFrames") or 1) != len(frames or [0]) or "ConcatenationUID" in header:
        raise ValueError("frames without position")
    if not (header.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2") and header.Rows and header.Columns
            and header.Modality and header.SeriesInstanceUID):
        raise ValueError("color or incomplete")
    order = (int(header.get("SeriesNumber") or 0), header.SeriesInstanceUID, int(header.get("InstanceNumber") or 0),
             header.SOPInstanceUID)
    planes = []
    for number, groups in enumerate([(frame, *(shared or ())) for frame in frames] if frames else [(header,)]):
        def holder(sequence, groups=groups):
            """The dataset with the attributes of a functional group: in the frame, shared, or the header itself."""
            found = [items[0] for items in (dataset.get(sequence) for dataset in groups) if items]
            return found[0] if found else header
        position = holder("PlanePositionSequence").ImagePositionPatient
        orientation = holder("PlaneOrientationSequence").ImageOrientationPatient
        measures = holder("PixelMeasuresSequence")
        thickness = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0)
        plane = Plane(path, header, number if frames else None, np.array(position, float),
                      np.array(orientation, float).reshape(2, 3), np.array(measures.PixelSpacing, float),
                      abs(thickness), holder("PixelValueTransformationSequence"), order)
        numbers = np.concatenate([plane.position, plane.orientation.ravel(), plane.spacing])
        is_orthonormal = np.allclose(plane.orientation @ plane.orientation.T, np.eye(2), atol=1e-3)
        if numbers.shape != (11,) or not np.isfinite(numbers).all() or not is_orthonormal or plane.spacing.min() <= 0:
            raise ValueError("invalid geometry")
        planes.append(plane)
    return planes


def group(planes):
    """Lists of slices that have series, patient, size, spacing, orientation and polarity in common."""
    groups = collections.defaultdict(list)  # by key: lists that differ in orientation or spacing
    for plane in planes:
        header = plane.header
        key = (plane.frame is not None and header.SOPInstanceUID, *(str(header.get(name)) for name in (
            "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "Modality", "Rows",
            "Columns", "PhotometricInterpretation")))
        for alike in groups[key]:
            if np.allclose(plane.orientation, alike[0].orientation, rtol=0, atol=1e-4) and \
                    np.allclose(plane.spacing, alike[0].spacing, rtol=1e-4):
                alike.append(plane)
                break
        else:
            groups[key].append([plane])
    return [planes for alike in groups.values() for planes in alike]


def split(planes):
    """Separate images of a series that were taken at the same positions, such as two echoes: [(difference, slices)].

    difference is ", NAME VALUE" of an attribute: the first of DIFFERENCES that gives parts of equal size, of at least
    two slices each, without two slices at one position. If no attribute does, or if no two slices have one position,
    all slices stay together and difference is "".
    """
    for name in DIFFERENCES if has_duplicates(planes) else ():
        parts = collections.defaultdict(list)
        for plane in planes:
            parts[str(plane.header.get(name))].append(plane)
        is_even = len(set(map(len, parts.values()))) == 1 and len(parts) < len(planes)
        if is_even and not any(map(has_duplicates, parts.values())):
            return [(f", {name} {as_text(value)}", part) for value, part in parts.items()]
    return [("", planes)]


# ---- geometry ----


def heights(planes):
    """Positions along the normal of the slices, in mm."""
    return np.array([plane.position for plane in planes]) @ np.cross(*planes[0].orientation)


def has_duplicates(planes):
    """Whether two slices have the same position, within the precision of scanners."""
    return bool((np.diff(np.sort(heights(planes))) < TOLERANCE * planes[0].spacing.min()).any())


def grid_of(planes):
    """Sort slices along their normal: (sorted slices, affine).

    affine: 4 x 4, from indices of column, row and slice to the patient's RAS coordinates in mm. If the gantry is
    tilted, each slice is shifted against the one before; the affine contains this shear. Raises ImageError if slices
    are missing, unevenly spaced, or at one position.
    """
    order = np.argsort(heights(planes), kind="stable")
    planes = [planes[number] for number in order]
    if has_duplicates(planes):
        raise ImageError(f"{planes[0].path.parent}: 같은 자리에 슬라이스가 둘 이상입니다 (여러 시점 등). "
                         "한 벌만 다른 폴더에 옮기거나 dcm2niix로 바꾼 NIfTI를 쓰세요")
    rows, columns = planes[0].orientation
    step = (planes[-1].position - planes[0].position) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([rows * planes[0].spacing[1], columns * planes[0].spacing[0], step,
                           planes[0].position]).T
    gaps = np.diff(heights(planes))
    expected = planes[0].position + np.arange(len(planes))[:, None] * step
    apart = np.linalg.inv(affine[:3, :3]) @ ([plane.position for plane in planes] - expected).T  # in voxels
    if np.abs(apart).max() >= TOLERANCE:
        steps = gaps / np.median(gaps)
        is_missing = steps.max() > 1.5 and np.allclose(steps, np.round(steps), atol=TOLERANCE)
        reason = "빠진 슬라이스가 있습니다" if is_missing else "슬라이스의 간격이나 위치가 고르지 않습니다"
        raise ImageError(f"{planes[0].path.parent}: {reason}: {len(planes)}장의 간격이 "
                         f"{gaps.min():.4g}~{gaps.max():.4g} mm. 빠진 파일을 채우거나 dcm2niix로 바꾼 NIfTI를 쓰세요")
    return planes, np.diag([-1, -1, 1, 1]) @ affine


# ---- pixels ----


def read_series(series):
    """Read the pixels of a series: a Series with sorted slices, image, is_tilted and all doubts. Raises ImageError.

    image      float32, rescaled; axes: column, row, slice (sorted by position); its affine maps to nibabel's RAS in mm
    is_tilted  the last slice is half a pixel or more away from the normal through the first

    MONOCHROME1 inverts the brightness. CT is the exception, because Hounsfield units do not depend on it.
    """
    planes, affine = grid_of(series.planes)
    slices = []
    for path, own in itertools.groupby(planes, key=lambda plane: plane.path):
        slices += decode(path, list(own))
    values, header = np.stack(slices), planes[0].header
    if header.get("PhotometricInterpretation") == "MONOCHROME1" and series.modality != "CT":
        values = values.min() + values.max() - values

    image = nib.Nifti1Image(values.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)  # code 1: the scanner's coordinates
    normal, step = np.cross(*planes[0].orientation), affine[:3, 2] * (-1, -1, 1)
    doubts, aside = [*series.doubts], step - (normal @ step) * normal
    is_tilted = bool(np.linalg.norm(aside) * (len(planes) - 1) >= planes[0].spacing.min() / 2)
    if is_tilted:
        tilt = np.degrees(np.arctan2(np.linalg.norm(aside), normal @ step))
        doubts.append(f"갠트리가 {tilt:.1f}도 기울었습니다. 부피와 NIfTI의 위치는 맞지만, coronal과 sagittal의 그림이 "
                      "비스듬하고, DICOM SEG는 쓰지 않습니다 (3D Slicer 같은 뷰어가 다른 자리에 놓음)")
    else:
        image.set_qform(affine, 1)  # a qform cannot express a tilt
    if 0 < 1.9 * planes[0].thickness <= normal @ step:  # every second slice may be missing
        doubts.append(f"슬라이스의 간격이 {normal @ step:.4g} mm인데 헤더에는 {planes[0].thickness:.4g} mm입니다. "
                      "슬라이스가 빠졌을 수 있습니다")
    if series.modality == "CT" and {plane.rescale.get("RescaleType", "HU") for plane in planes} != {"HU"}:
        doubts.append("CT인데 값의 단위가 Hounsfield 단위(HU)가 아니라고 적혀 있습니다")
    return replace(series, planes=planes, image=image, is_tilted=is_tilted, doubts=doubts)


def decode(path, planes):
    """The slices of one file in real values, a list of float32 rows x columns. Raises ImageError."""
    header = planes[0].header
    try:
        dataset = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # old files are not compressed
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        if dataset.HighBit != dataset.BitsStored - 1:  # the bits would have to be shifted, which pydicom does not do
            raise ValueError("HighBit")
        frames = pixel_array(dataset).reshape(int(header.get("NumberOfFrames") or 1), header.Rows, header.Columns)
        slices = [rescale(frames[plane.frame or 0], plane.rescale) for plane in planes]
        if not np.isfinite(slices).all():
            raise ValueError("not finite")
        return slices
    except MemoryError:
        raise
    except Exception:  # pydicom and each decoder raise their own errors
        raise ImageError(f"{path}: 픽셀을 읽을 수 없습니다. 손상되었거나 지원하지 않는 형식입니다 "
                         "(압축되었으면 gdcmconv --raw로 풀어 보세요)") from None


def rescale(values, dataset):
    """Convert stored values to real ones, float32, by the lookup table in a dataset or else its slope and intercept."""
    if "ModalityLUTSequence" in dataset:
        return apply_modality_lut(values, dataset).astype(np.float32)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept") or 0
    if slope == 0:
        raise ValueError("RescaleSlope")
    slope = 1 if slope in (None, "") else slope
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)


# ---- writing ----


def patient_of(series):
    """What --keep-patient shows: {name: text}, of the attributes that the series has."""
    header = pydicom.dcmread(series.planes[0].path, force=True, stop_before_pixels=True)
    return {name: as_text(header[name].value) for name in PATIENT if name in header}


def as_text(value):
    """A value of a header as text without control characters."""
    return "".join(filter(str.isprintable, str(value)))


def seg_bytes(series, mask, mark):
    """A DICOM SEG of a mask, as bytes. It refers to the files of the series.

    mask: columns x rows x slices, 0 and 1, on the grid of the image of read_series(). mark: the content description of
    the SEG, at most 64 characters. The SEG repeats only those attributes of patient and study that it must have.
    """
    import highdicom as hd  # here, because it takes a second and NIfTI files do not need it
    from pydicom.charset import python_encoding
    from pydicom.sr.codedict import codes

    planes = series.planes
    first = pydicom.dcmread(planes[0].path, force=True, stop_before_pixels=True,
                            specific_tags=[*HEADER, *REQUIRED, *DEIDENTIFIED])
    for name in REQUIRED:
        first.setdefault(name, "")
    encodings = first.get("SpecificCharacterSet")
    if not encodings:
        first.pop("SpecificCharacterSet", None)  # names are copied as bytes
    elif set(np.atleast_1d(encodings)) <= set(python_encoding):
        first.decode()  # highdicom refuses Korea's usual "\ISO 2022 IR 149"
        first.SpecificCharacterSet = "ISO_IR 192"  # UTF-8
    is_enhanced = planes[0].frame is not None
    sources = [first] if is_enhanced else [first, *(plane.header for plane in planes[1:])]
    for source in sources[1:]:  # highdicom requires exactly equal values
        source.ImageOrientationPatient, source.PixelSpacing = first.ImageOrientationPatient, first.PixelSpacing
    if len({source.SOPInstanceUID for source in sources}) < len(sources):
        raise ValueError("instances with one UID")
    pixels = np.zeros((int(first.NumberOfFrames) if is_enhanced else len(planes), first.Rows, first.Columns), np.uint8)
    pixels[[plane.frame for plane in planes] if is_enhanced else slice(None)] = mask.transpose(2, 1, 0)
    algorithm = hd.AlgorithmIdentificationSequence("SAM 2.1", codes.DCM.ArtificialIntelligence, "2.1")
    segment = hd.seg.SegmentDescription(1, "object", codes.SCT.Tissue, codes.SCT.Tissue, "SEMIAUTOMATIC", algorithm,
                                        display_color=hd.color.CIELabColor(53, 80, 67))  # red
    seg = hd.seg.Segmentation(
        sources, pixels, "BINARY", [segment], series_instance_uid=hd.UID(), sop_instance_uid=hd.UID(),
        series_number=1000 + int(first.get("SeriesNumber") or 0), instance_number=1, manufacturer="segment_volume.py",
        manufacturer_model_name="SAM 2.1", software_versions="2.1", device_serial_number="0",
        omit_empty_frames=len(planes) < len(pixels),  # not otherwise: SimpleITK closes the gaps that they leave
        content_label="SEGMENTATION", content_description=mark, content_creator_name="segment_volume^",
        series_description="SAM 2.1 segmentation")
    buffer = io.BytesIO()
    seg.save_as(buffer)
    return buffer.getvalue()


def is_own_seg(path, mark):
    """Whether seg_bytes() wrote a file with this mark. A program that saves an edited SEG replaces the mark."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True).ContentDescription == mark
    except Exception:  # pydicom raises many error types for a damaged file
        return False

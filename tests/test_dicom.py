"""DICOM series in segment_volume.py.

| tests | subject |
|---|---|
| place | the mask and the SEG lie where the mask of the same NIfTI file lies, tilted gantry |
| files | finding the files of a series, choosing one of several |
| values | rescaling, lookup tables, compressions, enhanced files |
| refused | series that may be misread, warnings, pydicom's test files |
| privacy | patient data in results, messages and the SEG |
"""

import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import common
import dicom_files
import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import segment_volume
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line
from files import ImageError
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.fileset import FileSet
from pydicom.pixels import get_decoder, pixel_array
from test_segment_volume import segment

SHAPE, SPACING = (24, 20, 8), (1.0, 1.5, 4.0)  # columns, rows, slices
SECRETS = "Hong^Gildong", "Gildong", "SECRET", "19700203", "headache", "Dr.Kim", "20260101"
SLANT = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.3, 0.4))[:3, :3]
PLANES = {"axial": ((1, 0, 0), (0, 1, 0)), "coronal": ((1, 0, 0), (0, 0, -1)), "sagittal": ((0, 1, 0), (0, 0, -1)),
          "oblique": (SLANT[:, 0], SLANT[:, 1]), "prone, feet first": ((1, 0, 0), (0, -1, 0))}


def draw():
    """Hounsfield units of a bright box off the middle of a dark noisy one in air, columns x rows x slices."""
    mask = np.zeros(SHAPE, bool)
    mask[13:20, 4:10, 2:7] = True
    values = np.where(mask, 70, 20) + np.random.default_rng(0).normal(0, 2, SHAPE).round()
    values[:3] = -1000
    return values


def grid(plane="axial", step=None):
    """4 x 4 from column, row, slice to the patient's LPS coordinates; step: from slice to slice, else the normal."""
    columns, rows = np.array(PLANES[plane], float)
    affine = np.eye(4)
    affine[:3] = np.stack([columns * SPACING[0], rows * SPACING[1],
                           np.cross(columns, rows) * SPACING[2] if step is None else step, (-11, 7, 23)]).T
    return affine


def to_ras(affine):
    return np.diag([-1, -1, 1, 1]) @ affine


def write_series(folder, values=None, affine=None, change=lambda dataset, number: None, order=range(8), name="IM{}.dcm",
                 modality="CT"):
    """Write slices as DICOM files in `order`; change(dataset, slice) edits each one before. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    values, affine = draw() if values is None else values, grid() if affine is None else affine
    study, series, frame = (pydicom.uid.generate_uid() for _ in range(3))
    paths = []
    for place, number in enumerate(order):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.update({
            "SOPClassUID": pydicom.uid.CTImageStorage if modality == "CT" else pydicom.uid.MRImageStorage,
            "SOPInstanceUID": pydicom.uid.generate_uid(), "StudyInstanceUID": study, "SeriesInstanceUID": series,
            "FrameOfReferenceUID": frame, "Modality": modality, "SeriesNumber": 4, "InstanceNumber": place + 1,
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PatientName": "Hong^Gildong", "PatientID": "SECRET-1",
            "PatientBirthDate": "19700203", "PatientSex": "M", "StudyDate": "20260101", "StudyTime": "101010",
            "AccessionNumber": "SECRET-2", "StudyID": "SECRET-3", "ReferringPhysicianName": "Dr.Kim",
            "SeriesDescription": "headache", "SliceThickness": 4, "RescaleSlope": 1, "RescaleIntercept": -1024,
            "Rows": SHAPE[1], "Columns": SHAPE[0], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0,
            "PixelSpacing": [SPACING[1], SPACING[0]],
            "ImageOrientationPatient": [f"{value:.10f}" for value in (affine[:3, :2] / SPACING[:2]).T.ravel()],
            "ImagePositionPatient": [f"{value:.8f}" for value in (affine @ [0, 0, number, 1])[:3]]})
        dataset.PixelData = (values[..., number].T + 1024).astype(np.uint16).tobytes()
        change(dataset, number)
        paths.append(folder / name.format(place))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def read(path, number=None):
    """(image, doubts, series) of the only series, or of a number."""
    series = dicom_files.read_series(dicom_files.choose_series(path, number))
    return series.image, series.doubts, series


def assert_is_drawn(path, values=None, affine=None, number=None):
    """Assert that a series has these values, at their place in the patient; returns its doubts."""
    image, doubts, _ = read(path, number)
    assert np.allclose(np.asarray(image.dataobj), draw() if values is None else values, atol=0.01)
    assert np.allclose(image.affine, to_ras(grid() if affine is None else affine), atol=1e-6)
    return doubts


# ----------------------------------------------------------------------------- the mask and its place

@pytest.fixture(scope="module")
def predictor():
    return common.load_video_predictor(SMALL_CFG, ROOT / "demo/sam2_demo.pt", "cpu")


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "oblique"])
def test_mask_and_seg_of_a_series_lie_where_the_mask_of_the_same_nifti_volume_lies(tmp_path, predictor, plane):
    """The affine of the NIfTI file is worked out by hand; the files of the series are in reversed order."""
    affine = grid(plane)
    paths = write_series(tmp_path / "ct", affine=affine, order=reversed(range(8)))
    nib.save(nib.Nifti1Image(draw().astype(np.float32), to_ras(affine)), tmp_path / "same.nii.gz")
    series, masks = read(tmp_path / "ct")[2], []
    for volume in segment_volume.Volume("ct", series), segment_volume.Volume(tmp_path / "same.nii.gz"):
        slices = segment_volume.Slices(volume, "axial", (0, 80))
        x, y, z = np.median(np.nonzero(volume.data > 50), axis=1).astype(int).tolist()
        prompts = segment_volume.mirror({(z, 1): ([(x, y, 1)], None)}, slices.size)
        mask, scores = np.zeros((len(slices), *slices.size), bool), np.full(len(slices), np.nan)
        for _ in segment_volume.segment_slices(predictor, slices, prompts, plane != "oblique", mask, scores):
            pass
        masks.append(volume.restore(slices.from_pictures(mask)))
        assert np.count_nonzero(slices.from_pictures(mask) & (volume.data > 50)) > 9
    wanted = np.asarray(masks[1].dataobj)
    assert (np.asarray(masks[0].dataobj) == wanted).all() and np.allclose(masks[0].affine, masks[1].affine)

    segment_volume.save_seg(tmp_path / "ct/ct_seg.dcm", series, np.asarray(masks[0].dataobj))
    seg = hd.seg.segread(tmp_path / "ct/ct_seg.dcm")
    found = seg.get_volume(combine_segments=True)
    assert (places(found.array, to_ras(found.affine)) == places(wanted, to_ras(affine))).all()
    headers = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, paths)}
    assert seg.NumberOfFrames == 8  # SimpleITK would stack the slices beside a gap without the gap
    referenced, = seg.ReferencedSeriesSequence
    first = next(iter(headers.values()))
    assert referenced.SeriesInstanceUID == first.SeriesInstanceUID and seg.PatientID == first.PatientID
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == set(headers)
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array.reshape(-1, 20, 24)):
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = np.array(headers[source].ImagePositionPatient, float)
        assert np.allclose(np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float), position)
        number = np.linalg.solve(affine[:3, :3], position - affine[:3, 3])[2].round().astype(int)
        assert (pixels == wanted[..., number].T).all()


def places(mask, affine):
    """Coordinates of a mask's voxels, rounded to 0.01 mm and sorted."""
    found = np.round(nib.affines.apply_affine(affine, np.argwhere(mask)), 2) + 0.0
    return found[np.lexsort(found.T)]


@pytest.mark.parametrize("plane", PLANES)
def test_a_series_is_placed_by_its_header_whatever_its_plane_and_file_order(tmp_path, plane):
    write_series(tmp_path / "ct", affine=grid(plane), order=[3, 1, 7, 0, 2, 6, 5, 4])
    assert not assert_is_drawn(tmp_path / "ct", affine=grid(plane))


def test_a_tilted_gantry_is_kept_in_the_affine_and_reported(tmp_path):
    affine = grid(step=(0, 1.2, 4))
    write_series(tmp_path / "ct", affine=affine)
    doubt, = assert_is_drawn(tmp_path / "ct", affine=affine)
    assert doubt.startswith("갠트리가 16.7도 기울었습니다") and "DICOM SEG는 쓰지 않습니다" in doubt
    image = read(tmp_path / "ct")[0]
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (0, 1)  # a qform has no shear
    voxel = np.linalg.det(segment_volume.Volume("ct", read(tmp_path / "ct")[2]).affine)
    assert voxel == pytest.approx(1 * 1.5 * 4)  # mm³


# ----------------------------------------------------------------------------- files

def test_slices_are_found_in_subfolders_without_a_suffix_and_among_other_files(tmp_path, capsys):
    first, *others = write_series(tmp_path / "cd/PA0/SE0", order=[3, 1, 7, 0, 2, 6, 5, 4], name="{}")
    shutil.copy(first, tmp_path / "cd/copy")
    (tmp_path / "cd/README.TXT").write_text("viewer")
    (tmp_path / "cd/autorun.exe").write_bytes(bytes(300))
    write_series(tmp_path / "cd/PA0/SE1", change=lambda dataset, _: setattr(dataset, "Modality", "SEG"))
    for path in (tmp_path / "cd", first):
        assert not assert_is_drawn(path)
    assert "같은 파일의 사본 1개" in (out := capsys.readouterr().out)
    assert "DICOM이 아닌 파일 2개" in out and "CT, MR, PET 영상이 아닌 DICOM 8개" in out
    shutil.copy(first, first.with_name("copy"))
    assert not assert_is_drawn(first.with_name("copy"))  # the other one is the copy then
    files = FileSet()
    for path in (first, *others):
        files.add(path)
    files.write(tmp_path / "disc")
    assert_is_drawn(tmp_path / "disc/DICOMDIR")


def join(dataset, **values):
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    for name, value in values.items():
        setattr(dataset, name, value)


def test_several_series_are_listed_for_the_flag_series_and_echoes_are_separate_entries(tmp_path, visible, monkeypatch):
    for number, echo in enumerate((20, 80)):
        write_series(tmp_path / "mr", draw() + number, modality="MR", name=f"{echo}_{{}}",
                     change=lambda dataset, place, echo=echo: join(dataset, EchoTime=echo, InstanceNumber=echo + place))
    write_series(tmp_path / "mr", name="ct{}", change=lambda dataset, _: setattr(dataset, "SeriesNumber", 5))
    write_series(tmp_path / "mr", draw()[..., :1], grid("coronal"), order=[0], name="scout{}", change=lambda dataset, _:
                 join(dataset))
    failed = segment(tmp_path, visible, "--point", "4,16,6", volume="mr", code=1)
    assert_fails_in_one_line(failed, "mr: 시리즈를 --series 번호로 고르세요")
    assert failed.stdout.splitlines() == [
        "건너뛴 파일: 스카우트나 한 장뿐인 영상 1개",
        "  1: MR, 8장, 24 x 20픽셀, 간격 1 x 1.5 x 4 mm, SeriesNumber 4, EchoTime 20.0",
        "  2: MR, 8장, 24 x 20픽셀, 간격 1 x 1.5 x 4 mm, SeriesNumber 4, EchoTime 80.0",
        "  3: CT, 8장, 24 x 20픽셀, 간격 1 x 1.5 x 4 mm, SeriesNumber 5"]
    doubt, = assert_is_drawn(tmp_path / "mr", draw() + 1, number=2)
    assert doubt == "이 시리즈의 영상 1개는 방향이나 간격이 다르거나 손상되어 뺐습니다"
    with pytest.raises(ImageError, match="--series"):
        read(tmp_path / "mr", 4)

    arguments = "--point", "4,7,6", "--each-slice", "-o", "out"
    done = segment(tmp_path, visible, "--series", 2, *arguments, volume="mr")
    assert "\n시리즈 2: MR, 8장, 24 x 20픽셀, 간격 1 x 1.5 x 4 mm, SeriesNumber 4, EchoTime 80.0\n" in done.stdout
    assert "MR 영상: Hounsfield 단위(HU)의 창 대신 --window none을 씁니다" in done.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["series"], summary["modality"]) == (2, "MR") and summary["window"][0] < -900
    assert (tmp_path / "out/mr_2_mask.nii.gz").is_file() and (tmp_path / "out/mr_2_seg.dcm").is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["", "--volume", "mr", "--series", "3", *arguments])
    with pytest.raises(SystemExit, match="slices.csv: 이 볼륨의 이전 결과가 아니어서"):
        segment_volume.check_results(segment_volume.parse_args())
    monkeypatch.setattr("sys.argv", ["", "--volume", "mr", "--series", "2", *arguments])
    segment_volume.check_results(segment_volume.parse_args())  # overwrites its own
    edited = pydicom.dcmread(tmp_path / "out/mr_2_seg.dcm")
    edited.ContentDescription = "corrected"
    edited.save_as(tmp_path / "out/mr_2_seg.dcm")
    with pytest.raises(SystemExit, match="mr_2_seg.dcm: 이 볼륨의 이전 결과가 아니어서"):
        segment_volume.check_results(segment_volume.parse_args())


# ----------------------------------------------------------------------------- values

def stored(dtype, factor=1, offset=1024):
    """A change that stores the values as round(value * factor + offset)."""
    def change(dataset, number):
        dataset.PixelData = np.round(draw()[..., number].T * factor + offset).astype(dtype).tobytes()
        dataset.BitsAllocated = dataset.BitsStored = np.dtype(dtype).itemsize * 8
        dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(np.dtype(dtype).kind == "i")
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 / factor, -offset / factor
    return change


def overlay_in_high_bits(dataset, _):
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) | 0x8000).tobytes()


def lookup_table(dataset, _):
    del dataset.RescaleSlope, dataset.RescaleIntercept
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [2048, 0, 16], "HU"
    table.add_new("LUTData", "OW", np.arange(2048, dtype=np.uint16).tobytes())
    dataset.ModalityLUTSequence = [table]


def signed_lookup_table(dataset, number):
    stored(np.int16, offset=0)(dataset, number)
    lookup_table(dataset, number)
    dataset.ModalityLUTSequence[0].LUTDescriptor = [2048, -1024, 16]
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # hides the descriptor's sign


def with_syntax(name):
    def change(dataset, _):
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, name)
        if name == "ExplicitVRBigEndian":
            dataset.PixelData = np.frombuffer(dataset.PixelData, np.uint16).byteswap().tobytes()
        if dataset.file_meta.TransferSyntaxUID.is_compressed and "Deflated" not in name:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            dataset.compress(getattr(pydicom.uid, name), generate_instance_uid=False)
    return change


@pytest.mark.parametrize("change", [
    stored(np.int16, offset=0), stored(np.uint32), stored(np.uint16, 20, 20480),
    lambda dataset, number: stored(np.uint16, number + 1, 9000)(dataset, number),  # each slice its slope, as in PET
    lambda dataset, _: setattr(dataset, "PhotometricInterpretation", "MONOCHROME1"),
    lambda dataset, _: dataset.pop("RescaleSlope"), overlay_in_high_bits,
    with_syntax("RLELossless"), with_syntax("JPEGLSLossless"), with_syntax("DeflatedExplicitVRLittleEndian"),
    with_syntax("ImplicitVRLittleEndian"), with_syntax("ExplicitVRBigEndian")])
def test_voxels_have_the_real_values_for_every_way_of_storing_them(tmp_path, change):
    write_series(tmp_path / "ct", change=change)
    assert not assert_is_drawn(tmp_path / "ct")


def test_lookup_tables_missing_preambles_and_inverted_mr_are_read(tmp_path):
    write_series(tmp_path / "table", change=lookup_table)
    assert_is_drawn(tmp_path / "table", draw() + 1024)
    write_series(tmp_path / "signed", change=signed_lookup_table)
    assert_is_drawn(tmp_path / "signed", draw() + 1024)
    for path in write_series(tmp_path / "old"):
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\0\x08\0CS"):])  # without preamble and file meta information
    assert_is_drawn(tmp_path / "old")
    write_series(tmp_path / "mr", modality="MR", change=lambda dataset, _: setattr(
        dataset, "PhotometricInterpretation", "MONOCHROME1"))
    assert_is_drawn(tmp_path / "mr", draw().min() + draw().max() - draw())


@pytest.mark.parametrize("name", ["JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLossless", "JPEGLosslessSV1",
                                  "JPEG2000", "JPEG2000Lossless", "JPEGLSLossless", "JPEGLSNearLossless",
                                  "RLELossless"])
def test_every_common_dicom_compression_has_a_decoder(name):
    assert get_decoder(getattr(pydicom.uid, name)).is_available


def test_lossy_jpeg_of_12_bits_is_decoded():
    assert pixel_array(get_testdata_file("JPGExtended.dcm")).max() == 264


def enhance(folder, shuffle=False):
    """Convert a series to an enhanced (multi-frame) file with highdicom; shuffle: its frames in another order."""
    def change(dataset, _):
        dataset.WindowCenter, dataset.WindowWidth = 40, 80
    datasets = [pydicom.dcmread(path) for path in write_series(folder / "single", change=change)]
    enhanced = LegacyConvertedEnhancedCTImage(
        datasets, series_instance_uid=hd.UID(), series_number=7, sop_instance_uid=hd.UID(), instance_number=1)
    if shuffle:
        order = [3, 1, 7, 0, 2, 6, 5, 4]
        frames = np.frombuffer(enhanced.PixelData, np.uint16).reshape(8, -1)
        enhanced.PixelData = frames[order].tobytes()
        groups = enhanced.PerFrameFunctionalGroupsSequence
        enhanced.PerFrameFunctionalGroupsSequence = [groups[number] for number in order]
    (folder / "enhanced").mkdir()
    enhanced.save_as(folder / "enhanced/1.dcm")
    return enhanced


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_enhanced_multi_frame_file_is_read_and_its_seg_refers_to_its_frames(tmp_path, shuffle):
    enhanced = enhance(tmp_path, shuffle)
    assert not assert_is_drawn(tmp_path / "enhanced")
    image, _, series = read(tmp_path / "enhanced")
    mask = (np.asarray(image.dataobj) > 50).astype(np.uint8)
    (tmp_path / "seg.dcm").write_bytes(dicom_files.seg_bytes(series, mask, "mark"))
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    found = seg.get_volume(combine_segments=True)
    assert (places(found.array, to_ras(found.affine)) == places(mask, image.affine)).all()
    referenced, = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert referenced.ReferencedSOPInstanceUID == enhanced.SOPInstanceUID


def test_an_enhanced_file_may_store_slope_and_intercept_outside_its_frames(tmp_path):
    enhanced = enhance(tmp_path)
    del enhanced.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    enhanced.RescaleSlope, enhanced.RescaleIntercept = 1, -1024
    enhanced.save_as(tmp_path / "enhanced/1.dcm")
    assert_is_drawn(tmp_path / "enhanced")


# ----------------------------------------------------------------------------- what is refused or reported

def at_heights(*heights):
    return lambda dataset, number: setattr(dataset, "ImagePositionPatient", [-11, 7, heights[number]])


def set_all(**values):
    return lambda dataset, _: [setattr(dataset, name, value) for name, value in values.items()]


def raw(tag, vr, value):
    return lambda dataset, _: dataset.add(pydicom.DataElement(tag, vr, value))


NO_VOLUME = "볼륨이 되는 CT, MR, PET 시리즈가 없습니다"


@pytest.mark.parametrize("change, words", [
    (at_heights(0, 4, 8, 16, 20, 24, 28, 32), "빠진 슬라이스가 있습니다: 8장의 간격이 4~8 mm"),
    (at_heights(0, 4, 8, 12, 17.5, 21.5, 25.5, 29.5), "슬라이스의 간격이나 위치가 고르지 않습니다"),
    (at_heights(0, 4, 8, 12, 12, 16, 20, 24), "같은 자리에 슬라이스가 둘 이상입니다"),
    (at_heights(*[0] * 8), "같은 자리에 슬라이스가 둘 이상입니다"),  # a mosaic, or time points
    (lambda dataset, number: set_all(ImagePositionPatient=[0, 0, 0], AcquisitionNumber=number)(dataset, number),
     "같은 자리에 슬라이스가 둘 이상입니다"),  # which would be eight volumes of one slice
    (at_heights(0, 0.02, 4, 4.02, 8, 8.02, 12, 12.02), "같은 자리에 슬라이스가 둘 이상입니다"),
    (lambda dataset, number: setattr(dataset, "PhotometricInterpretation", f"MONOCHROME{number // 4 + 1}"),
     "시리즈를 --series 번호로"),
    (lambda dataset, number: setattr(dataset, "ImagePositionPatient", [number // 4 * 3, 7, 4 * number]),
     "슬라이스의 간격이나 위치가 고르지 않습니다"),
    (lambda dataset, number: setattr(dataset, "PatientID", f"SECRET{number // 4}"), "시리즈를 --series 번호로"),
    (lambda dataset, number: setattr(dataset, "ImageOrientationPatient", [1, number / 99, 0, -number / 99, 1, 0]),
     NO_VOLUME),
    (set_all(ImageOrientationPatient=[1, 0, 0, 0.7, 0.7, 0]), NO_VOLUME),
    (set_all(ImageOrientationPatient=[0] * 6), NO_VOLUME), (set_all(PixelSpacing=[0, 1]), NO_VOLUME),
    (set_all(ImagePositionPatient=["nan", "0", "0"]), NO_VOLUME), (set_all(Modality="OT"), NO_VOLUME),
    (set_all(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), NO_VOLUME), (set_all(NumberOfFrames=8), NO_VOLUME),
    (set_all(NumberOfFrames=2000000000), NO_VOLUME), (lambda dataset, _: dataset.pop("PixelSpacing"), NO_VOLUME),
    (raw(0x00200011, "LO", "SECRET"), NO_VOLUME), (raw(0x00280030, "LO", "SECRET"), NO_VOLUME),
    (set_all(PhotometricInterpretation="PALETTE COLOR"), NO_VOLUME),
    (set_all(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0), NO_VOLUME),
    (raw(0x00281053, "LO", "SECRET"), "IM0.dcm: 픽셀을 읽을 수 없습니다"),
    (set_all(RescaleSlope="inf"), "IM0.dcm: 픽셀을"), (set_all(RescaleSlope=0), "IM0.dcm: 픽셀을"),
    (set_all(Rows=65535, Columns=65535), "IM0.dcm: 픽셀을"),
    (set_all(Rows=10), "IM0.dcm: 픽셀을"), (set_all(BitsStored=12), "IM0.dcm: 픽셀을"),
    (set_all(PixelData=b""), "IM0.dcm: 픽셀을"),
    (lambda dataset, _: dataset.pop("PixelData"), "IM0.dcm: 픽셀을"),
    (lambda dataset, number: setattr(dataset, "PixelData", dataset.PixelData[:-200 if number == 7 else None]),
     "IM7.dcm: 픽셀을")])
def test_a_series_that_may_be_misread_is_refused_in_one_line(tmp_path, change, words):
    write_series(tmp_path / "ct", change=change)
    with pytest.raises(ImageError) as failure:
        read(tmp_path / "ct")
    assert words in str(failure.value) and "\n" not in str(failure.value) and "SECRET" not in str(failure.value)


def test_an_enhanced_file_with_two_slices_at_one_position_is_refused(tmp_path):
    enhanced = enhance(tmp_path)
    groups = enhanced.PerFrameFunctionalGroupsSequence
    groups[3].PlanePositionSequence = groups[4].PlanePositionSequence
    enhanced.save_as(tmp_path / "enhanced/1.dcm")
    with pytest.raises(ImageError, match="같은 자리에 슬라이스가 둘 이상입니다"):
        read(tmp_path / "enhanced")
    del groups[7]
    enhanced.save_as(tmp_path / "enhanced/1.dcm")
    with pytest.raises(ImageError, match=NO_VOLUME):
        read(tmp_path / "enhanced")


def test_wide_gaps_and_values_that_are_not_hounsfield_units_are_reported_but_no_rounding_errors(tmp_path):
    for path in write_series(tmp_path / "gaps")[1::2]:
        path.unlink()
    doubt, = read(tmp_path / "gaps")[1]
    assert doubt.startswith("슬라이스의 간격이 8 mm인데 헤더에는 4 mm입니다")
    write_series(tmp_path / "unit", change=lambda dataset, number: setattr(
        dataset, "RescaleType", "US" if number == 5 else "HU"))
    doubt, = read(tmp_path / "unit")[1]
    assert doubt.startswith("CT인데 값의 단위가 Hounsfield 단위(HU)가 아니라고")
    jitter = write_series(tmp_path / "jitter", change=lambda dataset, number: setattr(
        dataset, "ImageOrientationPatient", [1, number % 2 * 1e-5, 0, -number % 2 * 1e-5, 1, 0]))
    assert len(jitter) == 8 and not assert_is_drawn(tmp_path / "jitter")  # of rounding, which is no doubt
    jittered = read(tmp_path / "jitter")[2]
    assert dicom_files.seg_bytes(jittered, np.ones(SHAPE, np.uint8), "mark")[128:132] == b"DICM"


def test_a_series_without_a_frame_of_reference_gives_the_mask_but_no_seg(tmp_path, visible):
    write_series(tmp_path / "ct", change=lambda dataset, _: dataset.pop("FrameOfReferenceUID"))
    done = segment(tmp_path, visible, "--point", "4,7,6", "--each-slice", "-o", "out", volume="ct")
    assert "주의: ct_seg.dcm: 쓰지 않았습니다" in done.stdout and "ct_seg.dcm" not in done.stdout.splitlines()[-1]
    assert nib.load(tmp_path / "out/ct_mask.nii.gz").shape == SHAPE and not (tmp_path / "out/ct_seg.dcm").exists()


def test_the_test_files_of_pydicom_open_or_are_refused_in_one_line(tmp_path, capsys):
    paths = [path for path in sorted((Path(pydicom.__file__).parent / "data/test_files").rglob("*")) if path.is_file()]
    assert len(paths) > 80
    for number, path in enumerate(paths):
        (tmp_path / f"{number}").mkdir()
        shutil.copy(path, tmp_path / f"{number}" / path.name)
        with pytest.raises(ImageError) as failure:
            read(tmp_path / f"{number}")
        assert "\n" not in str(failure.value)
    with pytest.raises(ImageError, match="--series"):
        read(Path(pydicom.__file__).parent / "data/test_files/dicomdirtests")
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(listed) >= 2 and all("CT" in line or "MR" in line for line in listed)


# ----------------------------------------------------------------------------- privacy

def test_patient_data_appears_only_in_the_seg_unless_keep_patient_is_given(tmp_path, visible):
    write_series(tmp_path / "ct")
    arguments = "--point", "4,7,6", "--each-slice"
    done = segment(tmp_path, visible, *arguments, "-o", "out", volume="ct")
    assert "ct_seg.dcm: DICOM SEG라서 시리즈의 환자 이름과 ID가 그대로 들어 있습니다" in done.stdout
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"ct_mask.nii.gz", "ct_seg.dcm", "ct_montage.png", "slices.csv", "summary.json"}
    seg = written.pop("ct_seg.dcm")
    assert b"Hong^Gildong" in seg and b"SECRET-1" in seg  # of the same patient, as the standard requires
    written["ct_mask.nii.gz"] = gzip.decompress(written["ct_mask.nii.gz"])
    shown = done.stdout + done.stderr + " ".join(written)
    for secret in SECRETS:
        assert secret not in shown and not any(secret.encode() in content for content in written.values())
    assert [row["slice"] for row in csv.DictReader((tmp_path / "out/slices.csv").open())] == ["4"]

    done = segment(tmp_path, visible, *arguments, "-o", "kept", "--keep-patient", volume="ct")
    summary = json.loads((tmp_path / "kept/summary.json").read_text())
    assert summary["PatientName"] == "Hong^Gildong" and "PatientName: Hong^Gildong" in done.stdout.splitlines()
    assert summary["SeriesDescription"] == "headache" and "AccessionNumber" not in summary
    (tmp_path / "ct.nii").touch()
    usage = segment(tmp_path, visible, *arguments, "--keep-patient", volume="ct.nii", code=2)
    assert "--series와 --keep-patient는 DICOM에만 씁니다" in usage.stderr


def test_the_seg_has_the_patients_name_in_any_character_set_and_no_optional_patient_data(tmp_path):
    for encoding, name in ((["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"), (None, "Hong^Gildong"),
                           ("ISO_IR 192", "홍^길동")):  # Korea's usual one, none, UTF-8
        folder = tmp_path / f"{encoding}"
        write_series(folder, change=set_all(
            SpecificCharacterSet=encoding, PatientName=name, PatientComments="PRIVATE", PatientAge="056Y",
            StudyDescription="PRIVATE", InstitutionName="PRIVATE", AdmissionID="PRIVATE", StationName="PRIVATE",
            PatientIdentityRemoved="YES"))
        seg = dicom_files.seg_bytes(read(folder)[2], np.ones(SHAPE, np.uint8), "mark")
        assert b"PRIVATE" not in seg and b"056Y" not in seg and b"headache" not in seg
        header = pydicom.dcmread(io.BytesIO(seg))
        assert (header.PatientName, header.PatientID, header.PatientIdentityRemoved) == (name, "SECRET-1", "YES")


def test_values_of_a_hostile_header_are_not_printed(tmp_path, visible):
    write_series(tmp_path / "ct", change=lambda dataset, _: [
        raw(0x00080008, "US", 5)(dataset, 0), raw(0x00080016, "UI", "SECRET")(dataset, 0),
        set_all(PatientName="\x1b[31mSECRET\x07", PatientBirthDate="SECRET", PatientID="SECRET" * 90)(dataset, 0)])
    done = segment(tmp_path, visible, "--point", "4,7,6", "--each-slice", "-o", "out", volume="ct")
    assert "SECRET" not in done.stdout + done.stderr and not done.stderr
    assert "주의: ct_seg.dcm: 쓰지 않았습니다" in done.stdout
    shown = dicom_files.patient_of(read(tmp_path / "ct")[2])  # for --keep-patient
    assert shown["PatientName"] == "[31mSECRET"

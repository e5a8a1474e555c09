"""extras/segment_volume.py on NIfTI files. DICOM: test_dicom.py.

| tests | subject |
|---|---|
| geometry | the mask lies on the object for every axis order |
| numbers | milliliters, Dice, units, truth on other grids, windows |
| files | value types, damaged files, doubtful values |
| the script | tracking across slices, errors, results of others, the window |
| demo, --auto | the drawn volume, starting without a prompt |
"""

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import re
import shlex
from pathlib import Path

import common
import cv2
import files
import matplotlib
import nibabel as nib
import numpy as np
import pytest
import segment_volume
import torch
import tracking
import volume_files
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, run
from test_track_video import Hand, TrackingWindow, numbers_in

SHAPE, SPACING = (24, 20, 8), (1.0, 1.5, 4.0)


def draw_volume():
    """A bright box in a dark noisy volume, off the middle: float32 X x Y x Z in RAS order, bool mask."""
    mask = np.zeros(SHAPE, bool)
    mask[13:20, 4:10, 2:7] = True
    return np.where(mask, 70, 20) + np.random.default_rng(0).normal(0, 2, SHAPE).astype(np.float32), mask


def oblique_affine():
    """4 x 4 for SHAPE in RAS order, turned by 10 degrees around two axes; origin off the middle."""
    turn, sine = np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))
    around_x = np.array([[1, 0, 0], [0, turn, -sine], [0, sine, turn]])
    around_z = np.array([[turn, -sine, 0], [sine, turn, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = around_x @ around_z @ np.diag(SPACING), (-11, 7, 23)
    return affine


def save(path, data, affine, **header):
    image = nib.Nifti1Image(data, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def store(path, data, orientation):
    """Save an array in RAS order with its axes in another order or direction: the same object at the same place."""
    back = nib.orientations.inv_ornt_aff(orientation, data.shape)
    return save(path, nib.apply_orientation(data, orientation), oblique_affine() @ back)


def segment(folder, checkpoint, *arguments, volume="ct.nii.gz", **how):
    return run("extras/segment_volume.py", "--volume", volume, "--model-cfg", SMALL_CFG, "--checkpoint", checkpoint,
               "--original", "--device", "cpu", *arguments, cwd=folder, **how)


def centre_in_mm(image):
    places = np.array(np.nonzero(np.asarray(image.dataobj))).mean(axis=1)
    return nib.affines.apply_affine(image.affine, places)


# ----------------------------------------------------------------------------- geometry

ORIENTATIONS = [np.array([(axis, flip) for axis, flip in zip(axes, flips)])
                for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


def test_for_all_48_axis_orders_the_pictures_are_the_same_and_the_mask_lies_on_the_object(tmp_path):
    data, truth = draw_volume()
    wanted = {axis: segment_volume.Slices(segment_volume.Volume(store(tmp_path / "ras.nii", data, ORIENTATIONS[0])),
                                          axis, (0, 80)) for axis in segment_volume.AXES}
    assert len(ORIENTATIONS) == 48
    for number, orientation in enumerate(ORIENTATIONS):
        path = store(tmp_path / f"{number}.nii", data, orientation)
        volume = segment_volume.Volume(path)
        for axis, same in wanted.items():
            slices = segment_volume.Slices(volume, axis, (0, 80))
            assert all((slices[index] == same[index]).all() for index in range(len(same)))
            assert slices.aspect == pytest.approx(same.aspect) and slices.pixel_area == pytest.approx(same.pixel_area)
            mask = np.array([slices[index][..., 0] > 130 for index in range(len(slices))])
            restored = volume.restore(slices.from_pictures(mask))
            assert (np.asarray(restored.dataobj) == nib.apply_orientation(truth, orientation)).all()
            assert centre_in_mm(restored) == pytest.approx(
                nib.affines.apply_affine(oblique_affine(), [16, 6.5, 4]), abs=1e-3)


def test_slices_are_shown_in_radiological_orientation(tmp_path):
    data = np.zeros((5, 6, 7), np.float32)
    data[4, 5, 6] = 80  # right, front, top
    volume = segment_volume.Volume(save(tmp_path / "v.nii", data, np.eye(4)))
    axial, coronal, sagittal = (segment_volume.Slices(volume, axis, (0, 80)) for axis in
                                ("axial", "coronal", "sagittal"))
    assert axial[6].shape == (6, 5, 3) and axial[6][0, 0, 0] == 255    # front at the top, right on the left
    assert coronal[5].shape == (7, 5, 3) and coronal[5][0, 0, 0] == 255  # head at the top, right on the left
    assert sagittal[4].shape == (7, 6, 3) and sagittal[4][0, 0, 0] == 255  # head at the top, front on the left


def test_prompts_in_voxels_are_mirrored_into_the_picture_and_back():
    prompts = {(3, 1): ([(1, 2, 1), (0, 0, 0)], [1.0, 2.0, 4.0, 5.0])}
    mirrored = segment_volume.mirror(prompts, (20, 10))
    assert mirrored == {(3, 1): ([(8, 17, 1), (9, 19, 0)], [5.0, 14.0, 8.0, 17.0])}
    assert segment_volume.mirror(mirrored, (20, 10)) == prompts
    at_the_border = {(3, 1): ([(9.5, 19.5, 1)], [9, 19, 10, 20])}  # outside once mirrored, so that it is moved
    assert segment_volume.mirror(at_the_border, (20, 10)) == {(3, 1): ([(0, 0, 1)], [0, 0, 1, 1])}
    assert segment_volume.as_flags(prompts) == '--point "3,1,2,1;3,0,0,0" --box "3,1,2,4,5"'


def test_the_written_mask_has_the_shape_affine_and_header_codes_of_the_input(tmp_path, visible):
    data, _ = draw_volume()
    image = nib.Nifti1Image(np.round(data).astype(np.int16)[..., None], oblique_affine() @ np.diag([-1, 1, 1, 1]))
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header["cal_max"] = 80
    image.header["descrip"] = "head CT"
    image.header.set_intent("estimate")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"about the CT's values"))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "ct.nii.gz")
    done = segment(tmp_path, visible, "--point", "4,7,6")
    mask = nib.load(tmp_path / "output/my_volumes/ct/ct_mask.nii.gz")
    assert mask.shape == image.shape == (24, 20, 8, 1) and mask.get_data_dtype() == np.uint8
    assert (mask.affine == nib.load(tmp_path / "ct.nii.gz").affine).all()
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (4, 1)
    assert mask.header.get_xyzt_units() == ("mm", "sec") and mask.header["cal_max"] == 0
    assert mask.header.get_intent()[0] == "none" and not mask.header.extensions
    values = np.asarray(mask.dataobj)
    assert re.fullmatch(b"segment_volume.py [0-9a-f]{8}", mask.header["descrip"].item())
    assert set(np.unique(values)) <= {0, 1} and values.any()
    summary = json.loads((tmp_path / "output/my_volumes/ct/summary.json").read_text())
    assert summary["voxels"] == values.sum() and summary["volume_ml"] == pytest.approx(values.sum() * 6 / 1000)
    assert re.search(r"부피: [\d.]+ ml", done.stdout)
    rows = list(csv.DictReader((tmp_path / "output/my_volumes/ct/slices.csv").open()))
    assert [int(row["slice"]) for row in rows] == list(range(8))
    assert sum(float(row["area_mm2"]) for row in rows) * 4 == pytest.approx(summary["volume_ml"] * 1000, rel=1e-3)
    assert (tmp_path / "output/my_volumes/ct/ct_montage.png").stat().st_size > 1000


# ----------------------------------------------------------------------------- numbers

class FakeArgs:
    """The flags that save() needs."""

    def __init__(self, output):
        self.name, self.output, self.volume, self.axis, self.each_slice, self.max_gap, self.truth = (
            "ct", output, "ct.nii", "axial", False, 3, "truth.nii")
        self.truth_label, self.auto, self.is_dicom = None, False, False


@pytest.mark.parametrize("axis, area", [("axial", 1.5), ("coronal", 4.0), ("sagittal", 6.0)])
def test_volume_area_dice_and_iou_are_right_on_a_mask_worked_out_by_hand(tmp_path, capsys, axis, area):
    """Voxels of 1 x 1.5 x 4 mm, turned: 6 mm³ each; 7 x 6 x 5 = 210 of them are 1.26 ml."""
    data, truth = draw_volume()
    volume = segment_volume.Volume(save(tmp_path / "ct.nii", data, oblique_affine()))
    slices = segment_volume.Slices(volume, axis, (0, 80))
    assert slices.pixel_area == pytest.approx(area)
    mask = truth.copy()
    mask[13:15] = False  # 150 of the 210 voxels are left
    args = FakeArgs(tmp_path)
    args.axis = axis
    segment_volume.save_volume_results(args, volume, slices, {}, slices.to_pictures(mask), np.ones(len(slices)),
                        slices.to_pictures(truth), {"checkpoint": "a.pt"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["volume_ml"] == pytest.approx(0.9) and summary["truth_ml"] == pytest.approx(1.26)
    assert summary["checkpoint"] == "a.pt"
    assert summary["dice"] == pytest.approx(300 / 360) and summary["iou"] == pytest.approx(150 / 210)
    assert "부피: 0.900 ml (150복셀" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "slices.csv").open()))
    filled = slices.to_pictures(truth).any(axis=(1, 2))
    for row in rows:
        inside = slices.to_pictures(mask)[int(row["slice"])].sum()
        assert float(row["area_mm2"]) == pytest.approx(inside * area, abs=1e-3)
        assert (row["dice"] != "") == filled[int(row["slice"])]


def test_units_of_the_header_are_converted_to_millimeters(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([200, 200, 500, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "micro.nii")
    assert np.diag(segment_volume.Volume(tmp_path / "micro.nii").affine) == pytest.approx([0.2, 0.2, 0.5, 1])


def test_voxels_of_micrometers_and_very_small_values_are_shown(tmp_path):
    """Units of meters with voxels of 10 µm; apparent diffusion coefficients in m²/s."""
    values = np.linspace(0, 3e-9, 120).reshape(4, 5, 6).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([1e-5, 1e-5, 1e-5, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "small.nii")
    volume = segment_volume.Volume(tmp_path / "small.nii")
    assert np.diag(volume.affine) == pytest.approx([0.01, 0.01, 0.01, 1])
    slices = segment_volume.Slices(volume, "axial", None)
    assert slices[0].min() == 0 and slices[5].max() == 255
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 7, np.float32), np.eye(4)), tmp_path / "same.nii")
    assert not segment_volume.Slices(segment_volume.Volume(tmp_path / "same.nii"), "axial", None)[0].any()


def test_truth_with_other_axes_is_compared_at_the_same_place_and_another_grid_is_refused(tmp_path):
    data, truth = draw_volume()
    volume = segment_volume.Volume(store(tmp_path / "ct.nii", data, ORIENTATIONS[0]))
    slices = segment_volume.Slices(volume, "axial", (0, 80))
    path = store(tmp_path / "truth.nii", truth.astype(np.uint8) * 3, ORIENTATIONS[29])
    assert (slices.of_file(path, volume) == slices.to_pictures(truth)).all()
    moved = save(tmp_path / "moved.nii", truth.astype(np.uint8), oblique_affine() + np.eye(4)[:, [3, 0, 1, 2]])
    affine = oblique_affine()
    affine[2, 3] += 0.45  # of a slice of 4 mm: 0.11 voxels
    near = save(tmp_path / "near.nii", truth.astype(np.uint8), affine)
    for wrong in (moved, near, save(tmp_path / "small.nii", truth.astype(np.uint8)[1:], oblique_affine())):
        with pytest.raises(files.ImageError, match="크기나 공간에서의 위치"):
            slices.of_file(wrong, volume)
    affine[2, 3] -= 0.43
    rounded = save(tmp_path / "rounded.nii", truth.astype(np.uint8), affine)
    assert (slices.of_file(rounded, volume) == slices.to_pictures(truth)).all()


def test_the_distance_of_two_grids_is_measured_in_voxels():
    affine = np.diag([0.5, 0.5, 5, 1])
    for axis, shift, apart in ((0, 0.002, 0.004), (0, 0.05, 0.1), (2, 0.05, 0.01), (2, 0.5, 0.1)):
        moved = affine.copy()
        moved[axis, 3] += shift
        assert volume_files.voxels_apart(affine, moved, (512, 512, 30)) == pytest.approx(apart)
    assert volume_files.voxels_apart(affine, np.diag([0.5, 0.5, 5.1, 1]), (512, 512, 31)) == pytest.approx(0.6)


def test_a_truth_with_several_labels_needs_the_flag_truth_label(tmp_path):
    data, truth = draw_volume()
    volume = segment_volume.Volume(save(tmp_path / "ct.nii", data, oblique_affine()))
    slices, labels = segment_volume.Slices(volume, "axial", (0, 80)), truth.astype(np.float32)
    labels[13:15] *= 2
    labels[0, 0, :3] = 0.3, 5, np.nan
    path = save(tmp_path / "labels.nii", labels, oblique_affine())
    for chosen, wanted in (([1], truth & (labels == 1)), ([2], labels == 2), ([1, 2], truth), ([5], labels == 5)):
        assert (slices.of_file(path, volume, chosen) == slices.to_pictures(wanted)).all()
    for chosen in (None, [3], [1, 3]):
        with pytest.raises(files.ImageError, match="labels.nii: 비교할 라벨을 --truth-label로 고르세요. .*: 1, 2, 5"):
            slices.of_file(path, volume, chosen)
    soft = save(tmp_path / "soft.nii", truth * np.float32(0.51) + (labels == 2) * np.float32(0.4), oblique_affine())
    assert (slices.of_file(soft, volume) == slices.to_pictures(truth)).all()  # probabilities
    with pytest.raises(files.ImageError, match="ct.nii: 마스크가 아닌"):
        slices.of_file(tmp_path / "ct.nii", volume)
    assert not slices.of_file(save(tmp_path / "no.nii", truth * np.uint8(0), oblique_affine()), volume).any()


@pytest.mark.parametrize("text, wanted", [("brain", (0, 80)), ("bone", (-800, 2000)), ("-600,1500", (-1350, 150)),
                                          ("none", None)])
def test_window_names_and_level_and_width_give_the_range_of_values(text, wanted):
    assert segment_volume.parse_window(text) == wanted


# ----------------------------------------------------------------------------- files

def test_slices_look_the_same_for_every_data_type(tmp_path):
    values = np.arange(-40, 120, dtype=np.float64).reshape(4, 5, 8) * 0.5
    path = tmp_path / "v.nii"
    wanted = np.round(np.clip(values / 80, 0, 1) * 255)[::-1, ::-1].transpose(2, 1, 0)
    for dtype in (np.float32, np.float64, ">f4"):
        save(path, values.astype(dtype), np.eye(4))
        slices = segment_volume.Slices(segment_volume.Volume(path), "axial", (0, 80))
        assert all((np.abs(slices[number][..., 1] - wanted[number]) <= 1).all() for number in range(8))
    scaled = nib.Nifti1Image((values * 2 + 100).astype(np.int16), np.eye(4))
    scaled.header.set_slope_inter(0.5, -50)  # as a scanner stores it
    scaled.header["vox_offset"] = 352
    stored = (values * 2 + 100).astype(np.int16).tobytes("F")
    path.write_bytes(scaled.header.binaryblock + bytes(4) + stored)
    slices = segment_volume.Slices(segment_volume.Volume(path), "axial", (0, 80))
    assert all((np.abs(slices[number][..., 1] - wanted[number]) <= 1).all() for number in range(8))
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    slices = segment_volume.Slices(segment_volume.Volume(save(path, values, np.eye(4))), "axial", None)
    assert slices[0][-1, -1, 0] == 0 and slices[1][-2, -2, 0] == 255
    assert (slices.low, slices.high) == pytest.approx(np.percentile(values[np.isfinite(values)], [1, 99]))


def test_files_that_cannot_be_used_are_named(tmp_path):
    data, _ = draw_volume()
    whole = save(tmp_path / "whole.nii.gz", data, np.eye(4)).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.nii.gz").write_text("not a volume")
    (tmp_path / "zipped_text.nii.gz").write_bytes(gzip.compress(b"not a volume"))
    (tmp_path / "cut.nii").write_bytes(gzip.decompress(whole)[:2000])
    (tmp_path / "empty.nii").touch()
    save(tmp_path / "times.nii", np.zeros((4, 5, 6, 7), np.float32), np.eye(4))
    save(tmp_path / "flat.nii", np.zeros((4, 5), np.float32), np.eye(4))
    save(tmp_path / "colour.nii", np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4))
    save(tmp_path / "complex.nii", np.zeros((4, 5, 6), np.complex64), np.eye(4))
    save(tmp_path / "nan.nii", np.full((4, 5, 6), np.nan, np.float32), np.eye(4))
    nib.save(nib.MGHImage(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "brain.mgz")
    places = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4))
    places.header["sform_code"], places.header["srow_x"] = 1, np.nan
    (tmp_path / "places.nii").write_bytes(places.header.binaryblock + bytes(4 + 4 * 4 * 5 * 6))
    for name in ("cut.nii.gz", "text.nii.gz", "zipped_text.nii.gz", "cut.nii", "empty.nii", "times.nii", "flat.nii",
                 "colour.nii", "complex.nii", "nan.nii", "brain.mgz", "places.nii", "missing.nii"):
        with pytest.raises(files.ImageError, match=name) as failure:
            segment_volume.Volume(tmp_path / name)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("suffix, compress", [(".gz", lambda content: gzip.compress(content, 0)),
                                              (".gz", gzip.compress), (".bz2", bz2.compress)])
def test_a_compressed_file_with_a_wrong_checksum_is_refused(tmp_path, suffix, compress):
    """nibabel alone reads it: it stops before the checksum, which is at the end."""
    path = save(tmp_path / "ct.nii", draw_volume()[0], oblique_affine())
    content = bytearray(compress(path.read_bytes()))
    damaged = tmp_path / f"ct.nii{suffix}"
    damaged.write_bytes(content)
    volume = segment_volume.Volume(damaged)
    place = -len(content) // 2 if len(content) > path.stat().st_size else -5  # a voxel that is stored as it is
    content[place] ^= 1
    damaged.write_bytes(content)
    with contextlib.suppress(OSError):  # bzip2 may notice
        nib.load(damaged).get_fdata()
    with pytest.raises(files.ImageError, match=f"ct.nii{suffix}: 읽을 수 없습니다"):
        segment_volume.Volume(damaged)
    with pytest.raises(files.ImageError, match=f"ct.nii{suffix}: 읽을 수 없습니다"):
        segment_volume.Slices(volume, "axial", None).of_file(damaged, volume)


def test_values_that_are_not_hounsfield_units_are_detected():
    head = np.full((20, 20, 20), -1000.0)
    head[2:18, 2:18, 2:18], head[2:18, 2:18, 2:6] = 35, 1000  # brain; a quarter of the head is bone
    padded = head + 1024
    padded[:2], padded[18:] = -2000, -2000  # outside the field of view
    ringing = np.clip(head, 0, None)
    ringing[0, 0, 0] = -200
    for values, doubtful in ((head, False), (head + 1024, True), (padded, True), (ringing, True), (head * 0, True)):
        assert bool(volume_files.doubts_about_values(values, (0, 80))) == doubtful
        assert not volume_files.doubts_about_values(values, (1024, 1104))  # chosen for + 1024
        assert not volume_files.doubts_about_values(values, None)


def test_doubtful_headers_and_values_are_reported_with_file_and_flag(tmp_path):
    data, _ = draw_volume()
    plain = nib.Nifti1Image(data.astype(np.float32), np.eye(4))
    nib.save(plain, tmp_path / "plain.nii.gz")
    other = nib.Nifti1Image(data.astype(np.float32), oblique_affine())
    other.set_qform(np.diag([-1, 1, 1, 1]) @ oblique_affine(), 1)
    nib.save(other, tmp_path / "other.nii")
    nib.save(nib.Nifti1Image(data.astype(np.float32), None), tmp_path / "bare.nii")
    hounsfield = "값이 Hounsfield 단위(HU)가 아닌 것 같습니다. MR이면 --window none을"
    for name, flags, words in (("plain.nii.gz", [], [hounsfield, "affine이 단위 행렬("]),
                               ("other.nii", ["--window", "none"], ["qform과 sform이 서로 다릅니다"])):
        done = segment(tmp_path, "missing.pt", "--point", "4,16,6", *flags, volume=name, code=1)
        lines = [line for line in done.stdout.splitlines() if line.startswith("주의")]
        assert len(lines) == len(words) and all(
            line.startswith(f"주의: {name}: {start}") for line, start in zip(lines, words)), lines
    assert volume_files.doubts_about_header(tmp_path / "bare.nii")[0].startswith("qform과 sform이 없습니다")
    assert not volume_files.doubts_about_header(tmp_path / "plain.nii.gz")
    for diagonal, doubtful in (((-1, -1, 1, 1), True), ((1, 1, 5, 1), False)):  # LPS, as SimpleITK writes it
        assert bool(volume_files.doubts_about_affine(np.diag(diagonal))) == doubtful


def test_the_test_files_of_nibabel_open_or_are_refused_in_one_line(tmp_path):
    opened = []
    for path in sorted((Path(nib.__file__).parent / "tests" / "data").iterdir()):
        if path.is_dir():
            continue
        try:
            volume = segment_volume.Volume(path)
        except files.ImageError as error:
            assert path.name in str(error) and "\n" not in str(error)
            continue
        opened.append(path.name)
        slices = segment_volume.Slices(volume, "axial", None)
        mask = np.zeros((len(slices), *slices.size), bool)
        mask[0, 0, 0] = True
        restored = volume.restore(slices.from_pictures(mask))
        nib.save(restored, tmp_path / "mask.nii.gz")
        again = nib.load(tmp_path / "mask.nii.gz")
        assert again.shape == volume.image.shape and np.allclose(again.affine, volume.image.affine)
        assert type(again) is type(volume.image) and np.asarray(again.dataobj).sum() == 1
        for code in ("sform_code", "qform_code"):
            assert again.header[code] == volume.image.header[code]
    assert {"anatomical.nii", "reoriented_anat_moved.nii", "standard.nii.gz"} <= set(opened)


def test_an_img_and_hdr_pair_gives_a_nifti_mask_with_its_header_codes(tmp_path):
    pair = nib.Nifti1Pair(np.ones((4, 5, 6), np.float32), np.diag([2, 3, 4, 1]))
    pair.set_sform(pair.affine, 3)
    nib.save(pair, tmp_path / "pair.img")
    volume = segment_volume.Volume(tmp_path / "pair.img")
    restored = volume.restore(np.ones((4, 5, 6), bool))
    assert type(restored) is nib.Nifti1Image and int(restored.header["sform_code"]) == 3
    nib.save(restored, tmp_path / "mask.nii.gz")
    assert np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj).sum() == 120


# ----------------------------------------------------------------------------- the script

def test_each_slice_segments_only_the_slices_with_a_prompt(tmp_path, visible):
    data, truth = draw_volume()
    store(tmp_path / "ct.nii.gz", data, ORIENTATIONS[5])
    store(tmp_path / "truth.nii.gz", truth.astype(np.uint8), ORIENTATIONS[5])
    done = segment(tmp_path, visible, "--point", "3,16,7;5,16,7", "--box", "4,12,3,20,10", "--each-slice",
                   "--truth", "truth.nii.gz", "-o", "out")
    rows = list(csv.DictReader((tmp_path / "out/slices.csv").open()))
    assert [int(row["slice"]) for row in rows if row["score"]] == [3, 4, 5]
    shown = {3, 4, 5, *np.flatnonzero(truth.any(axis=(0, 1)))}  # with all slices that the truth has
    assert [int(row["slice"]) for row in rows] == sorted(shown) and all(row["dice"] for row in rows)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["prompts"] == '--point "3,16,7,1;5,16,7,1" --box "4,12,3,20,10"' and 0 <= summary["dice"] <= 1
    assert re.search(r"정답과 비교: Dice [\d.]+, IoU [\d.]+", done.stdout)
    segment(tmp_path, visible, "--point", "5,16,7", "--each-slice", "-o", "alone")
    alone = nib.load(tmp_path / "alone/ct_mask.nii.gz").get_fdata()
    both = nib.load(tmp_path / "out/ct_mask.nii.gz").get_fdata()
    back = segment_volume.Volume(tmp_path / "alone/ct_mask.nii.gz").data[..., 5]
    assert alone.any() and (segment_volume.Volume(tmp_path / "out/ct_mask.nii.gz").data[..., 5] == back).all()
    assert both.sum() > alone.sum()


def test_max_gap_ends_tracking_in_both_directions_and_the_tracked_slices_are_reported(tmp_path, visible):
    """The model finds nothing: with --max-gap 1 it tracks one slice beyond the prompt on each side."""
    hidden = torch.load(visible, weights_only=True)
    hidden["model"]["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] -= 40
    torch.save(hidden, tmp_path / "hidden.pt")
    data, truth = draw_volume()
    save(tmp_path / "ct.nii.gz", data, oblique_affine())
    save(tmp_path / "truth.nii.gz", truth.astype(np.uint8), oblique_affine())
    flags = "--point", "4,16,6", "--truth", "truth.nii.gz"
    done = segment(tmp_path, "hidden.pt", *flags, "--max-gap", 1, "-o", "out")
    assert "슬라이스 3~5만 따라갔습니다" in done.stdout and "--max-gap 1" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/slices.csv").open()))
    assert [int(row["slice"]) for row in rows if row["score"]] == [3, 4, 5]
    unseen = [row for row in rows if not row["score"]]
    assert {int(row["slice"]) for row in unseen} == {*np.flatnonzero(truth.any(axis=(0, 1)))} - {3, 4, 5} != set()
    assert all(row["dice"] == "0.0000" for row in unseen)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["max_gap"], summary["checkpoint"], summary["image_size"]) == (1, "hidden.pt", 256)
    done = segment(tmp_path, "hidden.pt", *flags, "--max-gap", 0, "-o", "all")
    assert "따라갔습니다" not in done.stdout
    assert all(row["score"] for row in csv.DictReader((tmp_path / "all/slices.csv").open()))
    assert "--max-gap" in segment(tmp_path, "hidden.pt", *flags, "--max-gap", -1, code=2).stderr
    assert "함께" in segment(tmp_path, "hidden.pt", *flags, "--max-gap", 1, "--each-slice", code=2).stderr


def test_settings_are_printed_as_flags_unless_they_are_defaults(monkeypatch):
    def flags(*arguments):
        monkeypatch.setattr(segment_volume.sys, "argv", ["segment_volume.py", "--volume", "ct.nii", *arguments])
        return segment_volume.settings_as_flags(segment_volume.parse_args())

    assert flags() == ""
    assert flags("--window", "lung", "--axis", "coronal") == '--axis coronal --window "-600,1500" '
    assert flags("--window", "none", "--max-gap", "0") == '--window "none" --max-gap 0 '
    assert flags("--each-slice") == "--each-slice "
    with pytest.raises(SystemExit):
        flags("--truth-label", "1")  # without --truth


def test_invalid_input_fails_in_one_line_before_the_model_is_loaded(tmp_path):
    save(tmp_path / "ct.nii.gz", draw_volume()[0], oblique_affine())
    for arguments, words in (
            (("--point", "8,1,1"), ("슬라이스 8", "0부터 7까지")),
            (("--point", "7,24,1"), ("(24, 1)", "가로 24", "세로 20")),
            (("--point", "20,1,8", "--axis", "sagittal"), ("(1, 8)", "가로 20", "세로 8")),
            (("--point", "7,3,1", "--truth", "none.nii"), ("none.nii",)), (("--point", "7,3,1"), ("missing.pt",))):
        assert_fails_in_one_line(segment(tmp_path, "missing.pt", *arguments, code=1), *words)
    done = segment(tmp_path, "missing.pt", code=1, env={"DISPLAY": None, "MPLBACKEND": None})
    assert_fails_in_one_line(done, "--point")
    for wrong in (("--point", "1,2"), ("--point", "1.5,2,3"), ("--box", "1,2,3,4"), ("--box", "1,2,3,4,5;1,2,3,4,6"),
                  ("--window", "brian"), ("--window", "40,0"), ("--window", "40,80;1,2"), ("--window", "-600,x"),
                  ("--point", "1,2,3,0.9")):
        assert "usage" in segment(tmp_path, "missing.pt", *wrong, code=2).stderr


def test_a_window_with_a_negative_level_is_parsed(tmp_path, visible):
    save(tmp_path / "ct.nii.gz", draw_volume()[0], oblique_affine())
    segment(tmp_path, visible, "--point", "4,16,6", "--each-slice", "--window", "-600,1500", "-o", "out")
    assert json.loads((tmp_path / "out/summary.json").read_text())["window"] == [-1350, 150]


@pytest.mark.parametrize("truth, name, words", [
    ("ct_mask.nii.gz", "ct_mask.nii.gz", "결과를 쓸 자리에 있습니다"),
    ("truth.nii.gz", "ct_mask.nii.gz", "이전 결과가 아니어서"),
    ("truth.nii.gz", "summary.json", "이전 결과가 아니어서")])
def test_files_that_the_script_did_not_write_are_not_overwritten(tmp_path, truth, name, words):
    data, mask = draw_volume()
    save(tmp_path / "ct.nii.gz", data, oblique_affine())
    for path in {truth, name}:
        save(tmp_path / "mask.nii.gz", mask.astype(np.uint8), oblique_affine()).rename(tmp_path / path)
    before = (tmp_path / name).read_bytes()
    failed = segment(tmp_path, "missing.pt", "--point", "4,16,6", "--truth", truth, "-o", ".", code=1)
    assert_fails_in_one_line(failed, name, words)
    assert (tmp_path / name).read_bytes() == before


def test_own_results_are_overwritten_with_a_notice_unless_they_were_edited(tmp_path, visible):
    save(tmp_path / "ct.nii.gz", draw_volume()[0], oblique_affine())
    arguments = "--point", "4,16,6", "--each-slice", "-o", "out"
    assert "이전 결과" not in segment(tmp_path, visible, *arguments).stdout
    done = segment(tmp_path, visible, *arguments)
    assert "이전 결과를 덮어씁니다: out (ct_mask.nii.gz, slices.csv, summary.json, ct_montage.png)" in done.stdout
    mask = np.asarray(nib.load(tmp_path / "out/ct_mask.nii.gz").dataobj)
    ours = nib.load(tmp_path / "out/ct_mask.nii.gz")
    for corrected in (nib.Nifti1Image(mask, oblique_affine()),
                      nib.Nifti1Image(1 - mask, ours.affine, ours.header)):  # keeps the field "descrip"
        nib.save(corrected, tmp_path / "new.nii.gz")
        (tmp_path / "new.nii.gz").replace(tmp_path / "out/ct_mask.nii.gz")
        failed = segment(tmp_path, visible, *arguments, code=1)
        assert_fails_in_one_line(failed, "out/ct_mask.nii.gz: 이 볼륨의 이전 결과가 아니어서")


def test_results_of_another_volume_of_that_name_are_not_overwritten(tmp_path, visible):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "ct.nii.gz", draw_volume()[0], oblique_affine())
    segment(tmp_path, visible, "--point", "4,16,6", "--each-slice", volume="a/ct.nii.gz")
    failed = segment(tmp_path, visible, "--point", "4,16,6", "--each-slice", volume="b/ct.nii.gz", code=1)
    assert_fails_in_one_line(failed, "my_volumes/ct/ct_mask.nii.gz: 이 볼륨의 이전 결과가 아니어서")


def test_the_window_for_a_volume_has_one_object(tmp_path, visible):
    matplotlib.use("Agg")
    volume = segment_volume.Volume(save(tmp_path / "ct.nii", draw_volume()[0], oblique_affine()))
    slices = segment_volume.Slices(volume, "coronal", (0, 80))
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    mask, scores = np.zeros((20, 8, 24), bool), np.full(20, np.nan)
    window = tracking.FrameWindow(slices, predictor, lambda prompts: segment_volume.segment_slices(
        predictor, slices, prompts, False, mask, scores), "ct", max_object=1, first=10, aspect=slices.aspect,
        voxel_ml=0.5, sides="RL")
    hand = Hand(window)
    hand.press("2", "]", "left", "left")
    hand.click((7, 4))
    assert window.object == 1 and list(window.prompts) == [(8, 1)]
    left, right = sorted(window.axes.texts, key=lambda text: text.get_position())
    assert (left.get_text(), right.get_text()) == ("R", "L")
    shown = window.labels() > 0
    hand.press("enter")
    assert window.tracked_prompts == window.prompts and not np.isnan(scores).any() and (mask[8] == shown).all()
    assert window.axes.get_title().endswith(f"tracked, {mask.sum() * 0.5:.3g} ml")

    before, picture = mask.copy(), slices[8]
    hand.press("up", "=")  # the model sees what the user sees
    assert slices.window == segment_volume.parse_window("48,100") == (-2, 98) and slices[8].mean() != picture.mean()
    assert "press Enter" in window.axes.get_title() and window.encoded == 8
    hand.press("enter")
    assert window.tracked_prompts == window.prompts and (mask != before).any()
    hand.press("-", "down")
    assert slices.window == (0, 80)
    window.close()
    window.worker.close()


def test_real_window_goes_to_a_slice_with_the_slider_clicks_segments_and_saves(tmp_path, screen):
    save(tmp_path / "ct.nii.gz", draw_volume()[0], oblique_affine())
    with TrackingWindow(tmp_path, screen, "segment_volume", "--volume", "ct.nii.gz", "-o", "clicked") as window:
        window.wait_for_window("ct", 4)  # the middle slice
        window.slide(5 / 7)
        window.wait_for("ct", 5)
        window.click(23 - 16, 19 - 6)  # voxel (16, 6): both axes are reversed in the picture
        window.wait_for("ct", 5, 1, 1)
        window.xdotool("key", "Return")
        window.wait_for("ct", 5, 1, 1, "tracked")
        window.xdotool("key", "Left")
        window.wait_for("ct", 4, 1, 1, "tracked")
        window.close()
        flags = shlex.split(re.search("같은 결과를 얻는 옵션: (.*)", window.end())[1])
    (number, (x, y, label)), = segment_volume.parse_slice_points(flags[1])
    assert flags[0] == "--point" and (number, label) == (5, 1) and (x, y) == pytest.approx((16, 6), abs=1)
    segment(tmp_path, ROOT / "demo/sam2_demo.pt", *flags, "-o", "typed")
    clicked, typed = (nib.load(tmp_path / name / "ct_mask.nii.gz").get_fdata() for name in ("clicked", "typed"))
    assert clicked[13:20, 4:10, 5].any() and (clicked == typed).all()


# ----------------------------------------------------------------------------- demo

def test_the_demo_volume_shows_its_hemorrhage_and_one_click_segments_it(tmp_path):
    done = run("extras/demo/make_demo_volume.py", "--output", "data", cwd=tmp_path)
    volume = segment_volume.Volume(tmp_path / "data/ct.nii.gz")
    truth = segment_volume.Volume(tmp_path / "data/ct_truth.nii.gz").data > 0
    assert nib.aff2axcodes(volume.image.affine) == ("L", "P", "S") and volume.data.shape == truth.shape
    assert np.abs(volume.image.affine[:3, :3]).min() == 0 and volume.image.affine[1, 2] != 0  # tilted
    assert volume.image.header.get_zooms() == pytest.approx((0.8, 0.8, 3.0))
    assert volume.image.get_data_dtype() == np.int16
    near = (cv2.dilate(truth.astype(np.uint8), np.ones((7, 7))) > 0) & ~truth
    assert volume.data[truth].mean() - volume.data[near].mean() > 25  # Hounsfield units
    number, x1, y1, x2, y2 = (int(value) for value in numbers_in(done.stdout, "--box"))
    rows, columns = np.nonzero(truth[..., number])
    assert (x1, y1, x2, y2) == (rows.min(), columns.min(), rows.max(), columns.max())
    for points in re.findall(r'--point "([\d,;]+)"', done.stdout):
        places = [tuple(map(int, point.split(","))) for point in points.split(";")]
        assert all(truth[x, y, z] for z, x, y in places)
    assert [z for z, _, _ in places] == list(np.flatnonzero(truth.any(axis=(0, 1))))
    command = re.search(r'ct\.nii\.gz \\\n\s+(--point) "([\d,]+)"', (ROOT / "Makefile").read_text("utf-8"))
    segment(tmp_path, ROOT / "demo/sam2_demo.pt", *command.groups(), "-o", "out", volume="data/ct.nii.gz")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = segment_volume.Volume(tmp_path / "out/ct_mask.nii.gz").data > 0
    assert summary["voxels"] == found.sum() and 2 * (found & truth).sum() / (found.sum() + truth.sum()) >= 0.7


def test_values_that_are_not_hounsfield_units_are_detected_despite_padding():
    y, x = np.mgrid[-30:30, -30:30]
    body, scanned = (x / 21) ** 2 + (y / 14) ** 2 < 1, x ** 2 + y ** 2 < 900
    slice_ = np.where(body, 40, -1000)  # a small body in a large field of view
    chest = np.repeat(np.where(scanned, slice_, -2000)[..., None], 6, 2)
    assert not volume_files.doubts_about_values(np.where(chest == -2000, -1024, chest), (0, 80))
    shifted = np.where(chest == -2000, chest, chest + 1024)
    assert len(volume_files.doubts_about_values(shifted, (0, 80))) == 1


# ----------------------------------------------------------------------------- --auto

def test_auto_starts_from_the_slice_with_the_highest_score(tmp_path, visible):
    save(tmp_path / "ct.nii.gz", draw_volume()[0], oblique_affine())
    done = segment(tmp_path, visible, "--auto", "--window", "40,80")
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    slices = segment_volume.Slices(segment_volume.Volume(tmp_path / "ct.nii.gz"), "axial", (0, 80))
    (number, _), = tracking.find_without_prompt(predictor, slices)
    assert f"프롬프트 없이 찾음: {number}번" in done.stdout
    summary = json.loads((tmp_path / "output/my_volumes/ct/summary.json").read_text(encoding="utf-8"))
    assert summary["prompts"] == "--auto" and summary["voxels"] > 0
    refused = segment(tmp_path, visible, "--auto", "--point", "4,10,10", code=2)
    assert "--auto" in refused.stderr

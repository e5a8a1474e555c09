"""segment_volume.py: the mask lies where the object does, whatever the file's axes; millilitres; all kinds of files."""

import csv
import gzip
import itertools
import json
import re
from pathlib import Path

import common
import nibabel as nib
import numpy as np
import pytest
import segment_volume
from conftest import SMALL_CFG, assert_fails_in_one_line, run
from test_track_video import make_visible

SHAPE, SPACING = (24, 20, 8), (1.0, 1.5, 4.0)


@pytest.fixture(scope="module")
def visible(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("visible") / "visible.pt"
    path.write_bytes(weights.read_bytes())
    return make_visible(path)


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


def test_the_picture_is_the_one_that_radiologists_look_at(tmp_path):
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
    assert segment_volume.as_flags(prompts) == '--point "3,1,2,1;3,0,0,0" --box "3,1,2,4,5"'


def test_the_written_mask_has_shape_affine_and_codes_of_the_input(tmp_path, visible):
    data, truth = draw_volume()
    image = nib.Nifti1Image(np.round(data).astype(np.int16)[..., None], oblique_affine() @ np.diag([-1, 1, 1, 1]))
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header["cal_max"] = 80
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "ct.nii.gz")
    save(tmp_path / "truth.nii.gz", truth.astype(np.uint8)[::-1], oblique_affine())  # other axes, the same place? no
    done = segment(tmp_path, visible, "--point", "4,7,6", "--point", "4,7,6")
    mask = nib.load(tmp_path / "output/my_volumes/ct/ct_mask.nii.gz")
    assert mask.shape == image.shape == (24, 20, 8, 1) and mask.get_data_dtype() == np.uint8
    assert (mask.affine == nib.load(tmp_path / "ct.nii.gz").affine).all()
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (4, 1)
    assert mask.header.get_xyzt_units() == ("mm", "sec") and mask.header["cal_max"] == 0
    values = np.asarray(mask.dataobj)
    assert set(np.unique(values)) <= {0, 1} and values.any()
    summary = json.loads((tmp_path / "output/my_volumes/ct/summary.json").read_text())
    assert summary["voxels"] == values.sum() and summary["volume_ml"] == pytest.approx(values.sum() * 6 / 1000)
    assert re.search(r"부피: [\d.]+ ml", done.stdout)
    rows = list(csv.DictReader((tmp_path / "output/my_volumes/ct/slices.csv").open()))
    assert [int(row["slice"]) for row in rows] == list(range(8))
    assert sum(float(row["area_mm2"]) for row in rows) * 4 == pytest.approx(summary["volume_ml"] * 1000, rel=1e-3)
    assert (tmp_path / "output/my_volumes/ct/ct_montage.png").stat().st_size > 1000

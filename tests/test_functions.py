"""Pure functions, on values worked out by hand."""

import argparse
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import write_image

import compare_models
import prepare_data
import test_my_image
import train_sam2_proper


def test_iou_and_dice_by_hand():
    a = np.array([[1, 1, 0], [1, 0, 0]], bool)
    b = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert compare_models.calculate_iou(a, b) == pytest.approx(2 / 4, abs=1e-6)
    assert compare_models.calculate_dice(a, b) == pytest.approx(2 * 2 / (3 + 3), abs=1e-6)
    nothing = np.zeros_like(a)
    assert compare_models.calculate_iou(nothing, nothing) == compare_models.calculate_iou(a, nothing) == 0
    assert compare_models.calculate_iou(a, a) == pytest.approx(1, abs=1e-6)


def test_loss_by_hand():
    third = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4
    logits = torch.tensor([[0.0, third], [-third, 0.0]])
    gt_mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    loss, iou = train_sam2_proper.training_loss(logits, torch.tensor(0.8), gt_mask)
    cross_entropy = -(2 * math.log(0.5 + 1e-5) + 2 * math.log(0.75 + 1e-5)) / 4
    assert iou.item() == pytest.approx(1 / 2, abs=1e-6)  # one pixel is above 0.5, two are right
    assert loss.item() == pytest.approx(cross_entropy + 0.05 * abs(0.8 - 0.5), abs=1e-6)


def test_loss_of_a_sure_and_wrong_pixel_is_finite():
    loss, _ = train_sam2_proper.training_loss(torch.tensor([[200.0]]), torch.tensor(0.0), torch.tensor([[0.0]]))
    assert loss.item() == pytest.approx(-math.log(1e-5), rel=1e-3)


def test_middle_point_is_the_middle_foreground_pixel_in_row_major_order():
    mask = np.zeros((4, 5), bool)
    mask[1, 2:5] = True   # pixels 0, 1, 2
    mask[3, 0:2] = True   # pixels 3, 4: five in all, the middle one is pixel 2
    assert compare_models.middle_point(mask).tolist() == [[4, 1]]
    mask[3, 2] = True     # six: pixel 3
    assert compare_models.middle_point(mask).tolist() == [[0, 3]]


def test_mask_box_is_tight():
    mask = np.zeros((10, 20), bool)
    mask[3:6, 7:15] = True
    assert compare_models.mask_box(mask).tolist() == [7, 3, 14, 5]


def test_box_lines_up_for_every_value():
    for original, finetuned in ((0.6592, 0.8333), (1.0, 0.0), (0.0, 1.0), (0.051, 0.049)):
        lines = compare_models.result_box(original, finetuned).splitlines()
        assert {compare_models.display_width(line) for line in lines} == {43}
    assert "+17.4%p" in compare_models.result_box(0.6592, 0.8333)
    assert "-100.0%p" in compare_models.result_box(1.0, 0.0)  # a drop is shown as a drop


@pytest.mark.parametrize("count, ratio, train, val", [(1000, 0.2, 800, 200), (10, 0.2, 8, 2), (3, 0.2, 2, 1),
                                                      (2, 0.2, 2, 0), (7, 0.5, 3, 4), (5, 0.0, 5, 0)])
def test_split_takes_the_first_names_to_train(count, ratio, train, val):
    names = [f"{number:04}" for number in range(count)]
    splits = prepare_data.split_names(reversed(names), ratio, None)
    assert splits == {"train": names[:train], "val": names[train:]} and len(splits["val"]) == val


def test_shuffled_split_is_another_one_and_the_same_every_time():
    names = [f"{number:04}" for number in range(50)]
    first = prepare_data.split_names(names, 0.2, 7)
    assert first == prepare_data.split_names(list(reversed(names)), 0.2, 7)
    assert first != prepare_data.split_names(names, 0.2, None)
    assert sorted(first["train"] + first["val"]) == names


def test_points_are_parsed():
    parse = test_my_image.parse_points
    assert parse("500,375") == [(500, 375, 1)]
    assert parse(" 1.5, 2 ,1; 300,400,0;") == [(1.5, 2, 1), (300, 400, 0)]
    for wrong in ("", "1", "1,2,3", "1,2,1,1", "a,b", "nan,1", "1;2", "1e999,2"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(wrong)


def test_boxes_are_parsed_and_put_in_order():
    assert test_my_image.parse_box("30,5,10,25") == [10, 5, 30, 25]
    for wrong in ("", "1,2,3", "1,2,3,4,5", "1,2,1,4", "inf,1,2,3"):
        with pytest.raises(argparse.ArgumentTypeError):
            test_my_image.parse_box(wrong)


def test_reduce_to_shrinks_the_longer_side_and_never_enlarges():
    reduce_to = train_sam2_proper.reduce_to
    assert reduce_to(np.zeros((3000, 1500), np.uint8), 1024, cv2.INTER_NEAREST).shape == (1024, 512)
    assert reduce_to(np.zeros((1024, 10, 3), np.uint8), 1024, cv2.INTER_AREA).shape == (1024, 10, 3)
    assert reduce_to(np.zeros((5000, 1), np.uint8), 1024, cv2.INTER_NEAREST).shape == (1024, 1)


def test_images_of_every_kind_are_read_as_rgb(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 2] = 200  # OpenCV writes BGR
    alpha = np.full((20, 30, 1), 255, np.uint8)
    for name, image in (("빨강 폴립.png", red), ("rgba.png", np.concatenate([red, alpha], 2)),
                        ("deep.png", red.astype(np.uint16) * 257), ("red.jpg", red)):
        write_image(tmp_path / name, image)
        read = train_sam2_proper.read_image(tmp_path / name)
        assert read.shape == (20, 30, 3) and read.dtype == np.uint8
        assert np.abs(read[10, 15].astype(int) - [200, 0, 0]).max() <= 3, name
    write_image(tmp_path / "grey.png", red[..., 2])
    assert (train_sam2_proper.read_image(tmp_path / "grey.png") == 200).all()


def test_an_exif_rotated_photo_comes_out_upright(tmp_path):
    from PIL import Image
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned 90 degrees clockwise
    image.save(tmp_path / "phone.jpg", exif=exif)
    read = train_sam2_proper.read_image(tmp_path / "phone.jpg")
    assert read.shape == (40, 20, 3)
    assert read[:15].min() > 200 and read[25:].max() < 50  # what was left is now on top


def test_masks_are_cut_at_127(tmp_path):
    write_image(tmp_path / "mask.png", np.array([[0, 127, 128, 255]], np.uint8))
    assert train_sam2_proper.read_mask(tmp_path / "mask.png").tolist() == [[False, False, True, True]]


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "note.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("note.png", "empty.png", "missing.png"):
        with pytest.raises(train_sam2_proper.ImageError, match=name):
            train_sam2_proper.read_image(tmp_path / name)


def test_device_that_is_not_there_is_an_error(capsys):
    assert train_sam2_proper.detect_device("cpu") == "cpu"
    assert train_sam2_proper.detect_device() in ("cpu", "cuda", "mps")
    with pytest.raises(SystemExit) as stop:
        train_sam2_proper.detect_device("tpu")
    assert stop.value.code == 1 and "tpu" in capsys.readouterr().err

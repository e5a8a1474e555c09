"""Pure functions, on values computed by hand.

| tests | subject |
|---|---|
| losses, IoU | of one mask, all masks, several prompts |
| prompts | middle, random and correcting clicks, boxes, parsing |
| splits, names, tables | shuffling, result names, CSV cells, learning rates |
| masks | reducing objects, numbered masks, colors, RLE |
| images | kinds, depth, orientation, files that are refused |
| devices, environment | devices that are missing, package versions, notebooks |
"""

import argparse
import importlib.metadata
import io
import math
import os
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, display_width, draw_pair, write_image
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

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


THIRD = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4
FIRST = [[0.0, THIRD], [-THIRD, 0.0]]         # probabilities 1/2 3/4 / 1/4 1/2
SECOND = [[THIRD, THIRD], [-THIRD, -THIRD]]   # 3/4 3/4 / 1/4 1/4
THIRD_MASK = [[-THIRD] * 2, [THIRD] * 2]      # 1/4 1/4 / 3/4 3/4: all wrong
GT = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
ENTROPY = [-(2 * math.log(0.5 + 1e-5) + 2 * math.log(0.75 + 1e-5)) / 4, -math.log(0.75 + 1e-5),
           -math.log(0.25 + 1e-5)]
SCORES = [0.8, 0.9, 0.1]  # real IoUs: 1/2 (one pixel is above 0.5, two are right), 1, 0


def loss_of(count, **options):
    loss, iou = train_sam2_proper.training_loss(torch.tensor([[FIRST, SECOND, THIRD_MASK][:count]]),
                                                torch.tensor([SCORES[:count]]), GT[None], **options)
    return loss.item(), iou.item()


def test_loss_of_the_reference_recipe_by_hand():
    loss, iou = loss_of(1)
    assert iou == pytest.approx(1 / 2, abs=1e-6)
    assert loss == pytest.approx(ENTROPY[0] + 0.05 * abs(0.8 - 0.5), abs=1e-6)


@pytest.mark.parametrize("supervise, count", [("first", 1), ("all", 3)])
def test_supervise_chooses_the_masks_in_the_loss(supervise, count):
    predictor = argparse.Namespace(_transforms=argparse.Namespace(postprocess_masks=lambda masks, size: masks))
    args = argparse.Namespace(supervise=supervise, dice_weight=0.0)
    loss, iou = train_sam2_proper.image_loss(predictor, torch.tensor([[FIRST, SECOND, THIRD_MASK]]),
                                             torch.tensor([SCORES]), GT[None] > 0, args)
    assert (loss.item(), iou.item()) == loss_of(count)


def test_loss_of_all_masks_by_hand():
    score_loss = (abs(0.8 - 0.5) + abs(0.9 - 1) + abs(0.1 - 0)) / 3
    loss, iou = loss_of(3)
    assert loss == pytest.approx(sum(ENTROPY) / 3 + 0.05 * score_loss, abs=1e-6)
    assert iou == pytest.approx(1, abs=1e-6)  # of the mask with the highest score


def test_dice_loss_by_hand():
    dice = (2 * (0.5 + 0.75) + 1) / (2 + 2 + 1)  # of the first mask: overlap 1.25, areas 2 and 2
    assert loss_of(1, dice_weight=3)[0] - loss_of(1)[0] == pytest.approx(3 * (1 - dice), abs=1e-5)


def test_loss_of_several_prompts_is_their_mean():
    two = torch.tensor([[FIRST], [SECOND]])
    loss, iou = train_sam2_proper.training_loss(two, torch.tensor([[0.8], [0.9]]),
                                                GT.expand(2, 2, 2))
    score_loss = (abs(0.8 - 0.5) + abs(0.9 - 1)) / 2
    assert loss.item() == pytest.approx((ENTROPY[0] + ENTROPY[1]) / 2 + 0.05 * score_loss, abs=1e-6)
    assert iou.item() == pytest.approx(3 / 4, abs=1e-6)


def test_loss_of_a_confidently_wrong_pixel_is_finite():
    loss, _ = train_sam2_proper.training_loss(torch.tensor([[[[200.0]]]]), torch.tensor([[0.0]]), torch.zeros(1, 1, 1))
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


def test_the_next_click_lies_deepest_inside_the_largest_error():
    gt_mask, predicted = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    gt_mask[2:9, 2:9] = True        # 7 x 7 missed: its middle is (5, 5), 4 pixels deep
    predicted[12:17, 20:25] = True  # 5 x 5 too much: its middle is (22, 14), 3 pixels deep
    point, label = compare_models.error_click(predicted, gt_mask)
    assert point.tolist() == [[5, 5]] and label == 1
    predicted[2:9, 2:9] = True
    point, label = compare_models.error_click(predicted, gt_mask)
    assert point.tolist() == [[22, 14]] and label == 0
    point, label = compare_models.error_click(gt_mask, gt_mask)  # nothing is wrong: the middle again
    assert point.tolist() == [[5, 5]] and label == 1


def test_an_error_at_the_image_border_is_clicked_in_the_middle_of_its_pixels():
    gt_mask = np.zeros((10, 10), bool)
    gt_mask[:3] = True
    point, label = compare_models.error_click(np.zeros_like(gt_mask), gt_mask)
    assert point[0, 1] == 1 and label == 1


def test_random_clicks_fall_on_the_foreground():
    mask, rng = draw_pair(0)[1] > 0, np.random.default_rng(0)
    prompts = [train_sam2_proper.first_prompt("point", mask, rng) for _ in range(500)]
    assert all(coords.shape == (1, 2) and labels.tolist() == [1] for coords, labels in prompts)
    x, y = np.concatenate([coords for coords, _ in prompts]).astype(int).T
    assert mask[y, x].all() and len(set(zip(x, y))) > 200


def test_random_boxes_lie_around_the_mask_and_inside_the_image():
    mask, rng = np.zeros((100, 200), bool), np.random.default_rng(0)
    mask[0:51, 40:141] = True  # 100 wide, 50 tall, at the upper edge
    prompts = [train_sam2_proper.first_prompt("box", mask, rng) for _ in range(2000)]
    assert all(coords.shape == (2, 2) and labels.tolist() == [2, 3] for coords, labels in prompts)
    x1, y1, x2, y2 = np.stack([coords.ravel() for coords, _ in prompts]).T
    assert x1.mean() == pytest.approx(40, abs=1) and x2.mean() == pytest.approx(140, abs=1)
    assert x1.std() == pytest.approx(10, abs=1) and y2.std() == pytest.approx(5, abs=0.5)  # a tenth of the side
    assert x1.min() >= 20 and x1.max() <= 60  # at most 20 pixels
    assert y1.min() == 0


def test_correcting_clicks_fall_on_errors_with_the_label_that_corrects_them():
    gt_mask, predicted = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    gt_mask[2:9, 2:9] = True
    rng = np.random.default_rng(0)
    (x, y), label = train_sam2_proper.correcting_click(predicted, gt_mask, rng)  # everything is missed
    assert gt_mask[int(y), int(x)] and label == 1
    predicted[2:9, 2:9] = predicted[12:17, 20:25] = True  # too much
    (x, y), label = train_sam2_proper.correcting_click(predicted, gt_mask, rng)
    assert predicted[int(y), int(x)] and not gt_mask[int(y), int(x)] and label == 0
    (x, y), label = train_sam2_proper.correcting_click(gt_mask, gt_mask, rng)  # nothing is wrong
    assert gt_mask[int(y), int(x)] and label == 1


def test_prompts_without_a_random_generator_equal_those_of_compare_models():
    rng = np.random.default_rng(0)
    for _ in range(50):
        gt_mask, predicted = (cv2.blur(rng.random((30, 40)), (9, 9)) > 0.5 for _ in range(2))
        coords, labels = train_sam2_proper.first_prompt("point", gt_mask)
        assert np.array_equal(coords, compare_models.middle_point(gt_mask)) and labels.tolist() == [1]
        assert coords.dtype == np.float32 and labels.dtype == np.int32  # MPS has no float64
        coords, labels = train_sam2_proper.first_prompt("box", gt_mask)
        assert coords.ravel().tolist() == compare_models.mask_box(gt_mask).tolist() and labels.tolist() == [2, 3]
        for mask in (predicted, gt_mask):
            point, label = train_sam2_proper.correcting_click(mask, gt_mask)
            expected, expected_label = compare_models.error_click(mask, gt_mask)
            assert point.tolist() == expected[0].tolist() and label == expected_label
            assert point.dtype == train_sam2_proper.correcting_click(mask, gt_mask, rng)[0].dtype == np.float32


def test_mixed_prompts_alternate_between_point_points_and_box():
    assert [compare_models.prompt_kind("mixed", number) for number in range(4)] == ["point", "points", "box", "point"]
    assert [compare_models.prompt_kind("box", number) for number in range(2)] == ["box", "box"]


def learning_rates(scheduler, warmup=0):
    """The factor of the learning rate in each of 12 iterations."""
    args = argparse.Namespace(iterations=12, scheduler=scheduler, warmup=warmup)
    return [train_sam2_proper.learning_rate_factor(args, iteration) for iteration in range(1, 13)]


def test_learning_rate_follows_the_scheduler():
    warm = [min(1, (number + 1) / 5) for number in range(12)]
    half_wave = [(1 + math.cos(math.pi * number / 12)) / 2 for number in range(12)]
    assert learning_rates("none") == [1] * 12
    assert learning_rates("none", warmup=4) == pytest.approx(warm)
    assert learning_rates("cosine") == pytest.approx(half_wave)
    assert learning_rates("cosine", warmup=4) == pytest.approx([a * b for a, b in zip(warm, half_wave)])


def test_the_printed_result_box_is_aligned_for_every_value():
    for original, finetuned in ((0.6592, 0.8333), (1.0, 0.0), (0.0, 1.0), (0.051, 0.049)):
        lines = compare_models.result_box(original, finetuned).splitlines()
        assert {display_width(line) for line in lines} == {43}
    assert "+17.4%p" in compare_models.result_box(0.6592, 0.8333)
    assert "-100.0%p" in compare_models.result_box(1.0, 0.0)  # a drop is shown as a drop


def test_file_names_in_csv_tables_are_not_read_as_formulas():
    for name in ("=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@SUM(A1).png", "\t=1.png", "\r=1.png"):
        assert compare_models.text_cell(name) == f"'{name}"
    for name in ("a=1.png", "'=1.png", "용종.png"):
        assert compare_models.text_cell(name) == name


@pytest.mark.parametrize("count, ratio, train, val", [(1000, 0.2, 800, 200), (10, 0.2, 8, 2), (3, 0.2, 2, 1),
                                                      (2, 0.2, 2, 0), (7, 0.5, 3, 4), (5, 0.0, 5, 0)])
def test_the_split_takes_the_first_names_for_training(count, ratio, train, val):
    names = [f"{number:04}" for number in range(count)]
    splits = prepare_data.split_names({name: name for name in reversed(names)}, ratio, None)
    assert splits == {"train": names[:train], "val": names[train:]} and len(splits["val"]) == val


def test_a_shuffled_split_differs_from_the_sorted_one_and_is_reproducible():
    names = {f"{number:04}": f"{number:04}" for number in range(50)}
    first = prepare_data.split_names(names, 0.2, 7)
    assert first == prepare_data.split_names(dict(reversed(names.items())), 0.2, 7)
    assert first != prepare_data.split_names(names, 0.2, None)
    assert sorted(first["train"] + first["val"]) == [*names]


def test_stars_at_clicks_follow_the_size_of_the_panel():
    panels = [Figure(figsize=(2 * side, 3 * side)).subplots(1, 2)[0] for side in (1, 3, 9)]
    test_my_image.mark_prompts(panels, [([(3, 4, 1), (5, 6, 0)], None)])
    assert [[star.get_sizes()[0] for star in panel.collections] for panel in panels] == [[36] * 2, [81] * 2, [169] * 2]
    colors = [[star.get_facecolor()[0].tolist(), star.get_edgecolor()[0].tolist()] for star in panels[0].collections]
    assert colors == [[[0, 1, 0, 1], [0, 0, 0, 1]], [[1, 0, 0, 1], [0, 0, 0, 1]]]


def test_boxes_are_green_or_of_the_color_given_with_them_and_replace_those_before():
    panel = Figure().subplots()
    for prompts in ([([], [1, 2, 3, 4])], [([], [1, 2, 3, 4]), ([], [5, 6, 7, 8], np.array([0.5, 0, 1]))]):
        test_my_image.mark_prompts([panel], prompts)
    assert [patch.get_edgecolor() for patch in panel.patches] == [(0, 1, 0, 1), (0.5, 0, 1, 1)]


def test_points_are_parsed():
    parse = test_my_image.parse_points
    assert parse("500,375") == [(500, 375, 1)]
    assert parse(" 1.5, 2 ,1; 300,400,0;") == [(1.5, 2, 1), (300, 400, 0)]
    for wrong in ("", "1", "1,2,3", "1,2,1,1", "a,b", "nan,1", "1;2", "1e999,2"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(wrong)


def test_boxes_are_parsed_and_their_corners_sorted():
    assert test_my_image.parse_boxes("30,5,10,25") == [[10, 5, 30, 25]]
    assert test_my_image.parse_boxes("1,2,3,4; 5,6,7,8;") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    for wrong in ("", "1,2,3", "1,2,3,4,5", "1,2,1,4", "inf,1,2,3", "1,2,3,4;;5,6,7,8"):
        with pytest.raises(argparse.ArgumentTypeError):
            test_my_image.parse_boxes(wrong)


DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]


def lab(rgb, simulated=None):
    """CIE L*a*b* of an sRGB color, 0 to 255; simulated: Machado et al. (2009), on linear RGB, severity 1."""
    linear = (np.asarray(rgb) / 255) ** 2.2
    linear = np.clip(linear if simulated is None else simulated @ linear, 0, 1)
    return cv2.cvtColor((linear ** (1 / 2.2)).astype(np.float32)[None, None], cv2.COLOR_RGB2Lab)[0, 0]


@pytest.mark.parametrize("script, colors", [(test_my_image, [test_my_image.object_color(1)]),
                                            (compare_models, [*compare_models.COLORS.values()])])
@pytest.mark.parametrize("simulated", [None, np.array(DEUTERANOPIA)], ids=["all colours", "no red and green"])
def test_mask_colors_stand_out_from_tissue_and_each_other_even_without_red_and_green(script, colors, simulated):
    def distance(first, second):
        return np.linalg.norm(lab(first, simulated) - lab(second, simulated))

    for tissue in ((145, 67, 46), (180, 100, 80), (205, 130, 115), (90, 30, 20), (150, 15, 12)):
        image, mask = np.full((40, 40, 3), tissue, np.uint8), np.zeros((40, 40), bool)
        mask[10:30, 10:30] = True
        for color in colors:
            drawn = script.overlay(image, mask, color)
            assert distance(drawn[20, 20], tissue) > 25 and distance(drawn[10, 20], tissue) > 45, (tissue, color)
    assert len(colors) == 1 or distance(*colors) > 100


@pytest.mark.parametrize("object_color", [test_my_image.object_color, compare_models.object_color])
def test_no_object_is_drawn_in_red(object_color):
    colors = [object_color(number) for number in range(1, 60)]
    assert all(max(green, blue) == 255 for _, green, blue in colors) and len(set(colors)) > 50


def test_results_of_images_with_the_same_stem_get_different_names():
    paths = [Path(name) for name in ("a.jpg", "b.png", "a.png", "other/a.png")]
    assert test_my_image.result_names(paths) == ["a_jpg", "b", "a_png", "a_png_"]
    paths = [Path("b_original.png"), *paths]  # --compare writes b_original_mask.png for b
    assert test_my_image.result_names(paths)[0] == "b_original_"
    paths = [Path("1/A.png"), Path("2/a.png"), Path("c.png")]  # one file on Windows and macOS
    assert test_my_image.result_names(paths) == ["A_png", "a_png_", "c"]


def test_prompts_are_printed_as_flags_that_parse_to_the_same_prompts():
    points, box = [(1.5, 2, 1), (3, 4.2, 0)], [1, 2, 30.5, 40]
    flags = test_my_image.prompts_as_flags(points, box)
    assert flags == '--point "1.5,2,1;3,4.2,0" --box "1,2,30.5,40"'
    point_text, box_text = re.findall('"(.*?)"', flags)
    assert test_my_image.parse_points(point_text) == points and test_my_image.parse_boxes(box_text) == [box]


def test_reduced_size_shrinks_the_longer_side_and_never_enlarges():
    reduced_size = train_sam2_proper.reduced_size
    assert reduced_size((3000, 1500), 1024) == (1024, 512)
    assert reduced_size((1024, 10, 3), 1024) == (1024, 10)
    assert reduced_size((5000, 1), 1024) == (1024, 1)


def test_run_lengths_give_the_pixels_back():
    values, lengths = train_sam2_proper.run_lengths(np.array([[0, 7, 7], [7, 0, 9]], np.uint16))
    assert values.tolist() == [0, 7, 0, 9] and lengths.tolist() == [1, 3, 1, 1]
    assert [part.tolist() for part in train_sam2_proper.run_lengths(np.zeros((2, 2), np.uint16))] == [[0], [4]]


@pytest.mark.parametrize("side", [2999, 3000, 4096])
def test_a_reduced_object_stays_centered_and_has_the_pixels_that_it_covers_by_half(side):
    mask = np.zeros((side * 3 // 4, side), np.uint8)
    cv2.circle(mask, (1513, 815), 151, 1, -1)
    size = train_sam2_proper.reduced_size(mask.shape, 1024)
    reduced = train_sam2_proper.reduce_mask(mask > 0, size)
    scale = side / 1024
    for found, wanted in zip(np.nonzero(reduced), (815, 1513)):  # pixel centers: (i + 0.5) / scale - 0.5
        assert abs(found.mean() - ((wanted + 0.5) / scale - 0.5)) < 0.1
    coverage = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    assert np.array_equal(reduced, coverage >= 0.5)


@pytest.mark.parametrize("shape", [(3000, 4000), (2999, 3999), (1500, 1280)])
def test_small_reduced_objects_have_the_pixels_that_they_cover_by_half(shape):
    rng, size = np.random.default_rng(0), train_sam2_proper.reduced_size(shape, 1024)
    for _ in range(5):
        mask = np.zeros(shape, np.uint8)
        center = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        cv2.ellipse(mask, center, (60, 25), int(rng.integers(180)), 0, 360, 1, -1)
        reduced = train_sam2_proper.reduce_mask(mask > 0, size)
        coverage = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
        assert not (reduced ^ (coverage >= 0.5))[(coverage >= 0.5) | (coverage < 0.45)].any()


def test_a_thin_line_that_meets_a_broad_object_loses_a_pixel_at_most():
    mask = np.zeros((3000, 4000), np.uint8)
    cv2.circle(mask, (1000, 1500), 400, 1, -1)
    mask[1500, 1000:3600] = 1
    reduced = train_sam2_proper.reduce_mask(mask > 0, (768, 1024))
    row = reduced[384, 256:921]
    assert row.sum() >= len(row) - 1 and reduced.sum() - row.sum() > 30_000


@pytest.mark.parametrize("side", [1500, 3000, 4096, 9000])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("end", [0.1, 0.12, 0.4, 0.49])
def test_a_thin_line_stays_in_one_piece_when_reduced(side, width, end):
    mask = np.zeros((side // 2, side), np.uint8)
    cv2.line(mask, (side // 20, side // 10), (side * 9 // 10, int(side * end)), 1, width)
    reduced = train_sam2_proper.reduce_mask(mask > 0, train_sam2_proper.reduced_size(mask.shape, 1024))
    pieces, _, stats, _ = cv2.connectedComponentsWithStats(reduced.astype(np.uint8))
    assert pieces == 2 and stats[1, cv2.CC_STAT_WIDTH] >= 1024 * 0.84


def test_each_object_is_reduced_on_its_own_and_a_stray_pixel_is_dropped():
    lines = np.zeros((4096, 4096), np.uint16)
    for number in range(1, 5):  # four lines of one pixel that fall into one row of the reduced mask
        lines[99 + number, 200:3000] = number
    for number in range(1, 5):
        assert np.argwhere(train_sam2_proper.reduce_mask(lines == number, (1024, 1024))).tolist() == [
            [25, x] for x in range(50, 750)]
    blob = np.zeros((3000, 4000), np.uint8)
    cv2.circle(blob, (2000, 1500), 700, 1, -1)
    alone = train_sam2_proper.reduce_mask(blob > 0, (768, 1024))
    blob[100, 100] = 1
    assert np.array_equal(train_sam2_proper.reduce_mask(blob > 0, (768, 1024)), alone)
    half = np.zeros((4096, 4096), bool)
    half[:, :2048] = True
    assert np.array_equal(train_sam2_proper.reduce_mask(half, (1024, 1024)), half[::4, ::4])
    assert not train_sam2_proper.reduce_mask(np.zeros((2000, 2000), bool), (1024, 1024)).any()


def test_images_of_every_kind_are_read_as_rgb(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 2] = 200  # OpenCV writes BGR
    alpha = np.full((20, 30, 1), 255, np.uint8)
    for name, image in (("빨강 폴립.png", red), ("rgba.png", np.concatenate([red, alpha], 2)),
                        ("red.jpg", red)):
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
    assert read[:15].min() > 200 and read[25:].max() < 50  # the left half is now on top


@pytest.mark.parametrize("suffix, kind", [(".png", "uint16"), (".tif", "uint16"), (".tif", "int32"),
                                          (".tif", "float32")])
def test_deep_images_are_scaled_to_8_bits_by_their_own_percentiles(tmp_path, suffix, kind):
    from PIL import Image
    deep = np.linspace(100, 4000, 10_000).reshape(100, 100).astype(kind)  # a 12-bit camera
    Image.fromarray(deep).save(tmp_path / f"deep{suffix}")
    for script in (train_sam2_proper, prepare_data):
        read = script.read_image(tmp_path / f"deep{suffix}")
        assert read.shape == (100, 100, 3) and read.dtype == np.uint8
        assert read[0, 0, 0] == 0 and read[-1, -1, 0] == 255 and abs(int(read[50, 0, 0]) - 128) <= 1


def test_images_with_nan_infinite_or_constant_pixels_are_read(tmp_path):
    from PIL import Image
    deep = np.full((10, 10), np.nan, np.float32)
    Image.fromarray(deep).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((10, 10), 0.5, np.float32)).save(tmp_path / "plain.tif")
    deep[:, 5:], deep[0, 0] = np.linspace(290, 310, 5), np.inf  # half of it has no value
    Image.fromarray(deep).save(tmp_path / "half.tif")
    assert not train_sam2_proper.read_image(tmp_path / "nan.tif").any()
    assert not train_sam2_proper.read_image(tmp_path / "plain.tif").any()
    assert train_sam2_proper.read_image(tmp_path / "half.tif")[5, :, 0].tolist() == [0] * 6 + [64, 128, 191, 255]


@pytest.mark.parametrize("name", ["stack.tif", "film.gif", "moving.png", "photo.heic"])
def test_multi_page_and_heic_images_are_refused(tmp_path, name):
    from PIL import Image
    if name == "photo.heic":
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    else:
        frames = [Image.new("RGB", (20, 10), color) for color in ("black", "red")]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(train_sam2_proper.ImageError, match="형식" if name == "photo.heic" else "여러 장"):
        train_sam2_proper.read_image(tmp_path / name)


@pytest.mark.parametrize("values", [[0, 1], [0, 100, 200], [0, 1, 255], [1, 2, 3]])
def test_training_and_comparison_refuse_8_bit_masks_with_values_other_than_0_and_255(tmp_path, values):
    mask = np.repeat(np.repeat(np.array([values], np.uint8), 20, 0), 20, 1)
    write_image(tmp_path / "mask.png", mask)
    for script in (train_sam2_proper, compare_models):
        with pytest.raises(script.ImageError, match="--check"):
            script.read_mask(tmp_path / "mask.png")


def test_gray_edges_of_8_bit_masks_are_thresholded_at_127(tmp_path):
    grey = np.zeros((20, 20), np.uint8)
    grey[:, 8:12], grey[:, 12:] = [60, 127, 128, 200], 255
    write_image(tmp_path / "mask.png", grey)
    mask = train_sam2_proper.read_mask(tmp_path / "mask.png")
    assert mask.dtype == np.uint16 and (mask == (grey > 127)).all()


def test_sixteen_bit_masks_hold_the_numbers_of_their_objects(tmp_path):
    write_image(tmp_path / "mask.png", np.array([[0, 1, 2, 300, 65535]], np.uint16))
    assert train_sam2_proper.read_mask(tmp_path / "mask.png").tolist() == [[0, 1, 2, 300, 65535]]
    objects, masks, left_out = compare_models.split_objects(train_sam2_proper.read_mask(tmp_path / "mask.png"), 4)
    assert objects == [1, 2, 300, 65535] and masks.shape == (4, 1, 5) and masks[2].tolist() == [[0, 0, 0, 1, 0]]
    assert left_out == 0


def test_a_sample_of_objects_is_spread_over_all_numbers_and_reproducible():
    numbers = np.arange(1, 601)
    sample = train_sam2_proper.sample_objects(numbers, 20)
    assert len(set(sample)) == 20 and sorted(sample) == sample.tolist() and sample.max() > 400
    assert sample.tolist() == compare_models.sample_objects(numbers, 20).tolist()
    assert train_sam2_proper.sample_objects(numbers, None) is numbers
    labels = np.repeat(np.arange(601, dtype=np.uint16), 3)[None]
    objects, masks, left_out = compare_models.split_objects(labels, 20)
    assert objects == sample.tolist() and masks.shape == (20, 1, 1803) and left_out == 580


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "note.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("note.png", "empty.png", "missing.png"):
        with pytest.raises(train_sam2_proper.ImageError, match=name):
            train_sam2_proper.read_image(tmp_path / name)


def test_a_device_that_is_not_available_is_an_error():
    assert train_sam2_proper.detect_device("cpu") == "cpu"
    assert train_sam2_proper.detect_device() in ("cpu", "cuda", "mps")
    with pytest.raises(SystemExit) as stop:
        train_sam2_proper.detect_device("tpu")
    assert stop.value.code.startswith("오류: ") and "tpu" in stop.value.code


def test_a_gpu_number_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [train_sam2_proper.detect_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(SystemExit, match="cuda:2.*cuda, cpu, cuda:0, cuda:1"):
        train_sam2_proper.detect_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")  # torchrun with more processes than GPUs
    with pytest.raises(SystemExit, match="cuda:2"):
        train_sam2_proper.join_processes("cuda")


def test_the_version_of_opencv_is_found_under_any_package_name(monkeypatch):
    def version(name, installed=importlib.metadata.version):
        if name.startswith("opencv"):  # as with opencv-python-headless
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert train_sam2_proper.versions()["opencv-python"] == cv2.__version__


def test_the_version_of_sam2_is_unknown_if_its_package_has_another_name(monkeypatch):
    """Meta's repository installs under another name."""
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert train_sam2_proper.versions()["sam2"] == "?"


@pytest.mark.parametrize("script", ["train_sam2_proper", "prepare_data", "download_dataset", "files", "utils"])
def test_scripts_can_be_imported_where_stdout_cannot_be_reconfigured(script, monkeypatch):
    path = next(path for folder in ("", "extras", "extras/sam_med3d_ich")
                if (path := ROOT / folder / f"{script}.py").is_file())
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: it has no reconfigure()
    assert "fail" in runpy.run_path(str(path))


def test_windows_do_not_use_the_qt_plugins_of_opencv(monkeypatch):
    name = "QT_QPA_PLATFORM_PLUGIN_PATH"
    for script in (ROOT / "test_my_image.py", ROOT / "extras/files.py"):
        for before, after in ((f"{cv2.__path__[0]}/qt/plugins", None), ("/opt/qt", "/opt/qt")):
            monkeypatch.setenv(name, before)  # as `import cv2` does where OpenCV has Qt
            runpy.run_path(str(script), run_name="imported")
            assert os.environ.get(name) == after


def test_compressed_rle_of_pycocotools_is_decoded():
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.1, 0.5, 0.99, 1):
        mask = rng.random((61, 83)) < share
        if share == 0.1:
            mask = cv2.blur(mask.astype(np.float32), (15, 15)) > 0.1  # long runs
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [61, 83], "counts": rle["counts"].decode()}
        assert (coco_mask.decode(prepare_data.to_rle(segmentation, 61, 83)) == mask).all()
    plain = {"size": [2, 3], "counts": [1, 2, 3]}  # down the columns: 0 11 000
    assert coco_mask.decode(prepare_data.to_rle(plain, 2, 3)).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_invalid_rle_polygons_and_sizes_are_refused():
    for wrong in ({"size": [2, 3], "counts": [1, 2]}, {"size": [2, 3], "counts": [-1, 7]}, {"counts": [6]},
                  {"size": [2, 3], "counts": "zzzz"}, {"size": [3, 2], "counts": [6]}, [[0, 0, 1, 1]],
                  [[0, 0, 1, 1, float("nan"), 1]], [[0, 0, 1e9, 1, 1, 1]], [["a"] * 6], "abc", 5):
        with pytest.raises(prepare_data.ImageError):
            prepare_data.draw_objects([("a", wrong)], (2, 3), False, "a.png", {}, (2, 3))
    for height, width in ((-1, 5), (0, 5), (2.5, 2), ("3", 3), (10**6, 10**6)):
        with pytest.raises(prepare_data.ImageError):
            prepare_data.draw_objects([], (height, width), False, "a.png", {}, (60, 80))

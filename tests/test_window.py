"""test_my_image.py: prompts on the command line and in the window. The window in a browser: test_web.py.

| tests | subject |
|---|---|
| command line | points, boxes, masks, --refine, folders, errors |
| results | --everything, --compare, names, titles and colors |
| window | clicks, drags, keys, objects, candidates |
| on a screen | a real window on a virtual screen |
"""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from unittest.mock import Mock, create_autospec

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    ENV,
    ROOT,
    SMALL_CFG,
    assert_fails_in_one_line,
    draw_pair,
    kill_if_it_hangs,
    run,
    save_small_model,
    write_image,
)
from matplotlib import pyplot as plt
from matplotlib.backend_bases import KeyEvent, MouseEvent
from pycocotools import mask as coco_mask
from sam2.build_sam import build_sam2
from sam2.utils.amg import remove_small_regions

import compare_models
import test_my_image

matplotlib.use("Agg")
NO_DISPLAY = {"DISPLAY": None, "WAYLAND_DISPLAY": None, "MPLBACKEND": None}


@pytest.fixture
def photo(tmp_path):
    write_image(tmp_path / "내 사진.png", draw_pair(3)[0])
    return tmp_path / "내 사진.png"


def segment(photo, weights, *arguments, **options):
    return run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--finetuned", weights,
               "--device", "cpu", *arguments, cwd=photo.parent, **options)


def draw_discs(path):
    """A 160 x 120 image with two discs around (40, 40) and (110, 80)."""
    image = np.full((120, 160, 3), 60, np.uint8)
    for centre, color in (((40, 40), (200, 120, 40)), ((110, 80), (60, 60, 220))):
        cv2.circle(image, centre, 25, color, -1)
    write_image(path, image)
    return image


def read_png(path):
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)


def masks_in(folder):
    return {path.stem: read_png(path) for path in sorted(folder.glob("*.png"))}


def read_mask(folder, name="내 사진"):
    return read_png(folder / f"{name}_mask.png")


def predict_with_sam2(photo, weights, **prompt):
    """The best mask of sam2's own predictor; only the loading uses this project's code."""
    predictor = test_my_image.load_predictor(SMALL_CFG, weights, "cpu")
    image = cv2.imdecode(np.fromfile(photo, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].copy()
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(**prompt, multimask_output=True)
    return masks[int(np.argmax(scores))] > 0.5


def test_points_give_the_best_mask_that_sam2_gives(photo, weights):
    done = segment(photo, weights, "--point", "40,30,1;5,5,0", env=NO_DISPLAY)
    mask = read_mask(photo.parent / "output/my_results")
    assert mask.shape == (60, 80) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
    wanted = predict_with_sam2(photo, weights, point_coords=np.array([[40, 30], [5, 5]]),
                               point_labels=np.array([1, 0]))
    assert wanted.any() and ((mask > 0) == wanted).all()
    result = cv2.imdecode(np.fromfile(photo.parent / "output/my_results/내 사진_result.png", np.uint8), 1)
    assert result.shape[1] >= 1400 and result.std() > 10
    assert "내 사진_mask.png" in done.stdout


def test_a_box_gives_the_mask_that_sam2_gives(photo, weights):
    segment(photo, weights, "--box", "60,50,20,10", "-o", "boxed", env=NO_DISPLAY)
    wanted = predict_with_sam2(photo, weights, box=np.array([20, 10, 60, 50]))
    assert ((read_mask(photo.parent / "boxed") > 0) == wanted).all()


def test_without_a_finetuned_model_the_original_one_is_used_as_with_the_flag_original(photo, weights):
    common = ("--image", photo.name, "--model-cfg", SMALL_CFG, "--device", "cpu", "--point", "40,30")
    done = run("test_my_image.py", *common, "--checkpoint", weights, cwd=photo.parent)
    assert "아직 없어 원본 모델" in done.stdout
    before = read_mask(photo.parent / "output/my_results")
    done = run("test_my_image.py", *common, "--checkpoint", weights, "--original", cwd=photo.parent)
    assert "아직 없어" not in done.stdout and "small.pt" in done.stdout
    assert (read_mask(photo.parent / "output/my_results") == before).all()
    assert_fails_in_one_line(run("test_my_image.py", *common, cwd=photo.parent, code=1), "make demo")


def test_point_outside_the_image_is_refused_with_its_size(photo, weights):
    assert_fails_in_one_line(segment(photo, weights, "-p", "80,10", code=1), "(80, 10)", "가로 80", "세로 60")
    assert_fails_in_one_line(segment(photo, weights, "--box", "0,0,81,60", code=1), "(81, 60)", "가로 80", "세로 60")
    segment(photo, weights, "--box", "0,0,80,60")


def test_a_file_that_is_no_image_is_named(photo, weights):
    photo.write_bytes(b"not an image")
    assert_fails_in_one_line(segment(photo, weights, "-p", "8,10", code=1), "내 사진.png")


def test_a_missing_display_is_reported_before_the_model_is_loaded(photo):
    done = segment(photo, "missing.pt", env=NO_DISPLAY, code=1)
    assert_fails_in_one_line(done, "--point", "--auto", "--web")
    if sys.platform == "linux":
        assert "python3-tk" in done.stderr


def test_the_official_config_of_sam2_1_tiny_loads_and_runs(photo, tmp_path):
    """Checks that SAM 2.1 tiny at 1024 px with random weights loads and runs, not its masks."""
    name = "configs/sam2.1/sam2.1_hiera_t.yaml"
    torch.save({"model": build_sam2(name, device="cpu").state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
    run("test_my_image.py", "--image", photo.name, "--model-cfg", name, "--checkpoint", "sam2.1_hiera_tiny.pt",
        "--original", "--point", "40,30", "--device", "cpu", cwd=tmp_path)
    assert read_mask(tmp_path / "output/my_results").shape == (60, 80)


def test_a_box_with_points_is_one_object_and_several_boxes_are_several_objects(photo, weights):
    segment(photo, weights, "--box", "10,10,60,50", "--point", "40,30,1;70,5,0", "-o", "both")
    both = predict_with_sam2(photo, weights, box=np.array([10, 10, 60, 50]),
                             point_coords=np.array([[40, 30], [70, 5]]), point_labels=np.array([1, 0]))
    assert (read_mask(photo.parent / "both") > 0).tolist() == both.tolist()
    segment(photo, weights, "--box", "10,10,40,50;45,5,75,30", "--point", "60,20", "-o", "two")
    one = predict_with_sam2(photo, weights, box=np.array([10, 10, 40, 50]))
    other = predict_with_sam2(photo, weights, box=np.array([45, 5, 75, 30]), point_coords=np.array([[60, 20]]),
                              point_labels=np.array([1]))  # the point belongs to the box around it
    assert (read_mask(photo.parent / "two") > 0).tolist() == (one | other).tolist()
    objects = read_png(photo.parent / "two/내 사진_objects.png")  # the smaller one lies on top
    order = [(1, one), (2, other)] if one.sum() >= other.sum() else [(2, other), (1, one)]
    wanted = np.zeros((60, 80), np.uint16)
    for number, mask in order:
        wanted[mask] = number
    assert objects.dtype == np.uint16 and (objects == wanted).all() and len(np.unique(wanted)) == 3
    done = segment(photo, weights, "--box", "10,10,40,50;45,5,75,30", "--point", "2,2", code=1)
    assert_fails_in_one_line(done, "(2, 2)", "상자")


def test_the_flag_mask_gives_a_rough_mask_as_the_prompt(photo, weights):
    rough = draw_pair(3)[1]
    write_image(photo.parent / "rough.png", rough)
    segment(photo, weights, "--mask", "rough.png")
    small = cv2.resize((rough > 0).astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
    wanted = predict_with_sam2(photo, weights, mask_input=20 * small[None] - 10)
    assert (read_mask(photo.parent / "output/my_results") > 0).tolist() == wanted.tolist()
    write_image(photo.parent / "rough.png", rough // 255)  # 0 and 1
    assert_fails_in_one_line(segment(photo, weights, "--mask", "rough.png", code=1), "rough.png", "0과 255")
    write_image(photo.parent / "rough.png", rough[:50])
    assert_fails_in_one_line(segment(photo, weights, "--mask", "rough.png", code=1), "세로 50", "세로 60")


def test_refine_feeds_the_logits_of_the_best_mask_back(photo, weights):
    segment(photo, weights, "--point", "40,30", "--refine", 2)
    predictor = test_my_image.load_predictor(SMALL_CFG, weights, "cpu")
    predictor.set_image(test_my_image.read_image(photo))
    logits = None
    for _ in range(3):
        masks, scores, low_res = predictor.predict(np.array([[40, 30]]), np.array([1]), mask_input=logits)
        logits = low_res[scores.argmax()][None]
    assert (read_mask(photo.parent / "output/my_results") > 0).tolist() == (masks[scores.argmax()] > 0).tolist()


def test_a_folder_of_images_is_segmented_and_a_bad_file_reported(photo, weights):
    folder = photo.parent / "많은 사진"
    for number in range(3):
        write_image(folder / f"{number}.png", draw_pair(number)[0])
    write_image(folder / "1.jpg", draw_pair(4)[0])  # the same stem twice
    (folder / "broken.jpg").write_bytes(b"broken")
    write_image(folder / "tiny.png", draw_pair(5)[0][:20, :20])  # the point lies outside
    (folder / "phone.heic").write_text("no image")
    done = run("test_my_image.py", "--image", "많은 사진", photo.name, "--point", "40,30", "--model-cfg", SMALL_CFG,
               "--finetuned", weights, "--device", "cpu", cwd=photo.parent, code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("오류: ")]
    assert len(lines) == 3 and "broken.jpg" in lines[0] and "tiny.png" in lines[1] and "가로 20" in lines[1]
    assert "2장은 분할하지 못했습니다" in lines[2] and "이미지 5장을 분할했습니다" in done.stdout
    results = {path.name for path in (photo.parent / "output/my_results").iterdir()}
    assert results == {f"{name}_{kind}.png" for name in ("0", "1_png", "1_jpg", "2", "내 사진")
                       for kind in ("result", "mask")}
    segment(photo, weights, "--point", "40,30", "-o", "alone")
    assert (read_mask(photo.parent / "alone") == read_mask(photo.parent / "output/my_results")).all()


def test_everything_is_written_as_overlay_label_map_and_coco(photo, weights):
    image = draw_discs(photo)
    arguments = ("--everything", "--points-per-side", 8, "--pred-iou-thresh", 0.5, "--stability-score-thresh", 0.6)
    run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--original", "--checkpoint",
        ROOT / "demo/sam2_demo.pt", "--device", "cpu", *arguments, cwd=photo.parent)
    folder = photo.parent / "output/my_results"
    coco = json.loads((folder / "내 사진_everything.json").read_text(encoding="utf-8"))
    labels = read_png(folder / "내 사진_labels.png")
    assert coco["images"] == [{"id": 1, "file_name": "내 사진.png", "width": 160, "height": 120}]
    assert labels.shape == (120, 160) and labels.dtype == np.uint16
    found = coco["annotations"]
    assert len(found) >= 2 and [item["id"] for item in found] == list(range(1, len(found) + 1))
    covered = np.zeros((120, 160), np.uint16)
    for item in found:
        mask = coco_mask.decode(item["segmentation"]) > 0
        rows, columns = np.nonzero(mask)
        assert item["area"] == mask.sum() and 0.5 < item["score"] and 0.6 <= item["stability_score"] <= 1
        assert item["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        covered[mask] = item["id"]
    assert (covered == labels).all()
    assert labels[40, 40] and labels[80, 110] and labels[40, 40] != labels[80, 110]  # both discs
    assert cv2.imdecode(np.fromfile(folder / "내 사진_everything.png", np.uint8), 1).shape == image.shape
    # prepare_data.py reads the result
    write_image(photo.parent / "images" / photo.name, image)
    done = run("prepare_data.py", "--images", "images", "--coco", folder / "내 사진_everything.json", "--val-ratio", 0,
               cwd=photo.parent)
    assert "학습 1쌍" in done.stdout
    write_image(photo.parent / "masks" / photo.name, labels)
    run("prepare_data.py", "--images", "images", "--masks", "masks", "--data-dir", "numbered", "--val-ratio", 0,
        cwd=photo.parent)
    assert (read_png(photo.parent / "numbered/masks/train" / photo.name) == labels).all()
    done = run("test_my_image.py", "--image", photo.name, "--model-cfg", SMALL_CFG, "--original", "--checkpoint",
               ROOT / "demo/sam2_demo.pt", "--device", "cpu", "--everything", "--pred-iou-thresh", 1, cwd=photo.parent)
    assert "0개" in done.stdout and "--pred-iou-thresh" in done.stdout


def test_everything_equals_enlarging_each_mask_before_small_regions_are_removed(tmp_path, monkeypatch):
    """The photo has twice the generator's size: 24 pixels of the generator are 96 of the photo, 25 are 100."""
    image = np.random.default_rng(0).integers(0, 255, (1536, 2048, 3), dtype=np.uint8)
    large, small = np.zeros((768, 1024), np.uint8), np.zeros((768, 1024), np.uint8)
    cv2.circle(large, (400, 300), 200, 1, -1)
    cv2.circle(small, (500, 350), 60, 1, -1)
    for x, filled, width in ((300, 0, 24), (340, 0, 25), (800, 1, 24), (850, 1, 25)):  # holes and islands
        large[250, x:x + width] = small[700, x:x + width] = filled
    found = [{"segmentation": mask > 0, "predicted_iou": 0.9, "stability_score": 0.95} for mask in (small, large)]
    monkeypatch.setattr(test_my_image, "SAM2AutomaticMaskGenerator", lambda *_, **__: Mock(generate=lambda _: found))
    args = Mock(output=tmp_path, min_mask_region_area=100)
    test_my_image.run_everything(tmp_path / "a.png", "a", image, {"model": Mock()}, args)

    labels, drawn = np.zeros((1536, 2048), np.uint16), image
    annotations = json.loads((tmp_path / "a_everything.json").read_text())["annotations"]
    for number, mask in enumerate((large, small)):
        mask = cv2.resize(mask, (2048, 1536), interpolation=cv2.INTER_NEAREST_EXACT) > 0
        for kind in ("holes", "islands"):
            mask, _ = remove_small_regions(mask, 100, kind)
        assert (coco_mask.decode(annotations[number]["segmentation"]) == mask).all()
        assert annotations[number]["area"] == mask.sum()
        labels[mask] = number + 1
        drawn = test_my_image.overlay(drawn, mask, test_my_image.object_color(number + 1))
    assert (read_png(tmp_path / "a_labels.png") == labels).all()
    assert [labels[500, x] for x in (610, 690)] == [1, 0] and [labels[500, x] for x in (1610, 1710)] == [0, 1]
    picture = read_png(tmp_path / "a_everything.png")[..., ::-1].astype(int)  # at the generator's size
    difference = np.abs(picture - cv2.resize(drawn, (1024, 768), interpolation=cv2.INTER_AREA)).max(2)
    assert picture.shape == (768, 1024, 3) and (difference <= 3).mean() > 0.98  # outlines are a little thinner


def test_compare_writes_the_masks_of_both_models(photo, weights, tmp_path_factory):
    other = save_small_model(tmp_path_factory.mktemp("other") / "other.pt", seed=1)
    done = segment(photo, weights, "--checkpoint", other, "--compare", "--point", "40,30")
    folder = photo.parent / "output/my_results"
    point = {"point_coords": np.array([[40, 30]]), "point_labels": np.array([1])}
    assert (read_mask(folder) > 0).tolist() == predict_with_sam2(photo, weights, **point).tolist()
    assert (read_mask(folder, "내 사진_original") > 0).tolist() == predict_with_sam2(photo, other, **point).tolist()
    assert "other.pt, " in done.stdout and "small.pt" in done.stdout


def main(monkeypatch, folder, *arguments):
    """Run main() in this process, in `folder`, with the demo's model."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["test_my_image.py", "--model-cfg", str(SMALL_CFG), "--device", "cpu",
                                      "--finetuned", str(ROOT / "demo/sam2_demo.pt"), *map(str, arguments)])
    test_my_image.main()


def test_compare_encodes_each_image_once_and_compares_the_frozen_weights_once(tmp_path, monkeypatch, capsys):
    names = ("load_predictor", "same_frozen_weights")
    spies = {name: Mock(side_effect=getattr(test_my_image, name)) for name in names}
    for name in names:
        monkeypatch.setattr(test_my_image, name, spies[name])
    predictor = test_my_image.SAM2ImagePredictor
    spies["set_image"] = create_autospec(predictor.set_image, side_effect=predictor.set_image)
    monkeypatch.setattr(predictor, "set_image", spies["set_image"])
    for name in "ab":
        draw_discs(tmp_path / f"images/{name}.png")
    saved = torch.load(ROOT / "demo/sam2_demo.pt", weights_only=True)
    torch.save(saved | {"image_size": 512}, tmp_path / "trained_at_512.pt")
    main(monkeypatch, tmp_path, "--image", "images", "--compare", "--box", "15,15,65,65;85,55,135,105",
         "--checkpoint", ROOT / "demo/sam2_demo.pt", "--finetuned", "trained_at_512.pt")
    assert {name: spy.call_count for name, spy in spies.items()} == {
        "load_predictor": 2, "same_frozen_weights": 1, "set_image": 2}
    assert "trained_at_512.pt는 --image-size 512로 학습했는데" in capsys.readouterr().out
    for name in "ab":
        mask, original = (read_mask(tmp_path / "output/my_results", name) for name in (name, f"{name}_original"))
        objects = read_png(tmp_path / f"output/my_results/{name}_objects.png")
        assert (mask == original).all() and ((objects > 0) == (mask > 0)).all()
        assert (objects[40, 40], objects[80, 110]) == (1, 2)


def test_results_of_an_earlier_run_are_named_and_kept(tmp_path, monkeypatch, capsys):
    draw_discs(tmp_path / "a.png")
    demo = ("--image", "a.png", "--checkpoint", ROOT / "demo/sam2_demo.pt", "-o", "out")
    main(monkeypatch, tmp_path, *demo, "--compare", "--box", "15,15,65,65;85,55,135,105")
    earlier = masks_in(tmp_path / "out")
    assert set(earlier) == {"a_result", "a_mask", "a_objects", "a_original_mask"}
    assert "이전 파일" not in capsys.readouterr().out
    main(monkeypatch, tmp_path, *demo, "--everything", "--points-per-side", 2)
    assert "이전 파일이 남아 있습니다: a_result.png, a_mask.png, a_objects.png, a_original_mask.png\n" in (
        capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "out").iterdir()} - {f"{name}.png" for name in earlier} == {
        "a_everything.png", "a_labels.png", "a_everything.json"}
    assert all((picture == earlier[name]).all() for name, picture in masks_in(tmp_path / "out").items()
               if name in earlier)
    (tmp_path / "out/ab_objects.png").touch()  # of another image
    main(monkeypatch, tmp_path, *demo, "--box", "15,15,65,65")
    assert ("남아 있습니다: a_objects.png, a_original_mask.png, a_everything.png, a_labels.png, a_everything.json\n"
            in capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["--image", "none.png"], ["--image", "a.png", "none.png"],
                                       ["--image", "a.png", "--mask", "none.png"]])
def test_a_file_that_does_not_exist_is_named_in_korean_before_the_model_is_loaded(tmp_path, monkeypatch, arguments):
    draw_discs(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="^오류: 파일이 없습니다: none.png$"):
        main(monkeypatch, tmp_path, "--point", "5,5", "--finetuned", "none.pt", *arguments)


def test_smaller_objects_are_numbered_on_top_of_larger_ones():
    small, large, other = np.zeros((3, 4, 6), bool)
    small[0, :2], large[:3, :4], other[3, 5] = True, True, True
    objects = [test_my_image.Segmented([], None, {"model": ([mask], np.ones(1))}) for mask in (small, large, other)]
    assert test_my_image.number_objects(objects, "model").tolist() == [
        [1, 1, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0], [0, 0, 0, 0, 0, 3]]


@pytest.mark.parametrize("height, width", [(30, 400), (400, 30), (32, 32), (100, 250), (2000, 3000)])
def test_the_result_figure_shows_masks_and_frame_for_images_of_every_shape(tmp_path, height, width):
    image, mask = np.full((height, width, 3), 90, np.uint8), np.zeros((height, width), bool)
    mask[height // 4:height // 2, width // 4:width // 2] = True
    candidates = {"fine-tuned model": (np.array([mask] * 3), np.array([0.2, 0.9, 0.4]))}
    item = test_my_image.Segmented([(width / 3, height / 3, 1)], None, candidates)
    test_my_image.save_result(tmp_path / "result.png", image, "photo.png", [item], None)
    result = cv2.imread(str(tmp_path / "result.png")).astype(int)
    assert 250 < result.shape[0] < 1000 and 1300 < result.shape[1] < 1700
    blue = (result[..., 0] - result[..., 2] > 60).sum()  # three masks are visible
    assert blue > 3 * 300
    lime = ((result[..., 1] > 240) & (result[..., 2] < 20)).sum()  # and one frame
    assert lime > 500


LONG_NAME = "KakaoTalk_20261128_사진_" + "폴립" * 12 + ".jpg"


def assert_whole_titles(figure):
    """Every title of a figure as it is saved lies inside it, in its own column."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        title, columns = axes.title.get_window_extent(), figure.bbox.width / axes.get_gridspec().ncols
        assert title.ymax <= figure.bbox.height and title.width <= columns
        assert title.xmin >= 0 and title.xmax <= figure.bbox.width


@pytest.mark.parametrize("height, width", [(1000, 426), (600, 300), (1000, 748), (100, 533)])
def test_titles_of_result_pictures_are_not_cut_off(monkeypatch, height, width):
    """Without the panels' anchor, the layout cuts titles off at one of these shapes or another."""
    def save_figure(figure, path):
        assert_whole_titles(figure)
        plt.close(figure)

    monkeypatch.setattr(test_my_image, "save_figure", save_figure)
    monkeypatch.setattr(compare_models, "save_figure", save_figure)
    image, masks = np.zeros((height, width, 3), np.uint8), np.ones((3, height, width), bool)
    for titles in (["fine-tuned model"], ["original model", "fine-tuned model"]):
        item = test_my_image.Segmented([], None, {title: (masks, np.array([0.2, 0.9, 0.4])) for title in titles})
        test_my_image.save_result("", image, LONG_NAME, [item], None)
    prompts = np.ones((3, 1, 2)), np.ones((3, 1), int)
    compare_models.save_comparison("", LONG_NAME, image, masks, {title: (masks, prompts) for title in
                                                                 ("original", "fine-tuned")})


# ----------------------------------------------------------------------------- the window

def mouse(figure, name, x, y, button):
    """A mouse event at image pixel (x, y), through the whole of matplotlib's event chain, which cuts off fractions."""
    across, down = figure.axes[0].transData.transform((x, y))
    event = MouseEvent(f"{name}_event", figure.canvas, across + 0.5, down + 0.5, button)
    figure.canvas.callbacks.process(f"{name}_event", event)


def click(figure, x, y, button=1):
    mouse(figure, "button_press", x, y, button)
    mouse(figure, "button_release", x, y, button)


def drag(figure, start, end, button=1):
    mouse(figure, "button_press", *start, button)
    mouse(figure, "motion_notify", *((a + b) / 2 for a, b in zip(start, end)), None)
    mouse(figure, "motion_notify", *end, None)
    mouse(figure, "button_release", *end, button)


def press(figure, key):
    figure.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", figure.canvas, key))


def rounded(points, box, *_):
    """Prompts rounded to whole image pixels; a screen pixel is a tenth of one."""
    return [tuple(map(round, point)) for point in points], box and [round(number) for number in box]


def find(points, box, asked):
    """A model that records its prompts. Its masks are the upper 10, 20 and 30 rows, within a box's columns.

    A point in the lowest rows finds nothing.
    """
    asked.append(rounded(points, box))
    masks = np.zeros((3, 60, 80), bool)
    left, right = (round(box[0]), round(box[2])) if box else (0, 80)
    for number in range(3):
        masks[number, :10 * (number + 1), left:right] = not any(y > 55 for _, y, _ in points)
    return masks, np.array([0.2, 0.9, 0.4])


@pytest.fixture
def window():
    """A window on an 80 x 60 image, with the model above."""
    asked = []
    window = test_my_image.Window(draw_pair(3)[0], {"fine-tuned model": partial(find, asked=asked)}, "photo")
    window.asked = asked
    window.figure.canvas.draw()
    yield window
    plt.close(window.figure)


def tinted_rows(window):
    """How many rows of the picture are tinted: 10, 20 or 30 for candidate 1, 2 or 3, 0 for none."""
    pixels = np.asarray(window.figure.axes[0].images[0].get_array()).astype(int)
    return int(((pixels - window.image).any(2).mean(1) > 0.9).sum())


def test_each_click_segments_at_once_and_shows_the_best_mask_with_its_score(window):
    assert tinted_rows(window) == 0 and not window.asked
    click(window.figure, 40, 30)
    assert window.asked == [([(40, 30, 1)], None)] and tinted_rows(window) == 20
    assert "mask 2 of 3, score 0.900" in window.figure.axes[0].get_title()
    click(window.figure, 5.25, 6, button=3)
    assert window.asked[-1] == ([(40, 30, 1), (5, 6, 0)], None)
    assert window.current.points[1] == pytest.approx((5.25, 6, 0), abs=0.15)
    assert len(window.figure.axes[0].collections) == 2  # both are drawn
    assert "right click: background" in window.figure.get_supxlabel()


def test_dragging_with_the_left_button_draws_a_box(window):
    drag(window.figure, (60, 50), (20, 10))
    assert window.asked == [([], [20, 10, 60, 50])]
    click(window.figure, 40, 30)
    drag(window.figure, (10, 10), (300, 55))  # a new box takes the old one's place and ends at the image's edge
    assert window.asked[-1] == ([(40, 30, 1)], [10, 10, 79, 55])
    assert len(window.figure.axes[0].patches) == 1
    drag(window.figure, (30, 30), (50, 50), button=3)  # the right button draws none: a background point
    assert rounded(*window.current) == ([(40, 30, 1), (30, 30, 0)], [10, 10, 79, 55])


def test_a_ctrl_click_on_macos_is_a_background_point(window):
    mouse(window.figure, "button_press", 40, 30, 3)  # its backend presses button 3 and releases button 1
    mouse(window.figure, "button_release", 40, 30, 1)
    assert window.asked == [([(40, 30, 0)], None)]


@pytest.mark.parametrize("ratio, is_box", [(1, True), (2, False)])
def test_a_press_that_moves_by_up_to_six_screen_pixels_is_a_click(window, monkeypatch, ratio, is_box):
    monkeypatch.setattr(type(window.figure.canvas), "device_pixel_ratio", ratio)
    (x, y), (right, down) = window.panels[0].transData.transform([(40, 30), (41, 31)])
    drag(window.figure, (40, 30), (40 + 9 / (right - x), 30 - 9 / (y - down)))  # 9 pixels of the device
    assert bool(window.current.box) == is_box and bool(window.current.points) != is_box


@pytest.mark.parametrize("key", ["u", "backspace", "ㅕ"])
def test_undo_takes_back_the_last_prompt(window, key):
    click(window.figure, 40, 30)
    drag(window.figure, (60, 50), (20, 10))
    press(window.figure, key)
    assert window.asked[-1] == rounded(*window.current) == ([(40, 30, 1)], None)
    press(window.figure, key)
    assert window.current == ([], None, {}, None) and tinted_rows(window) == 0
    press(window.figure, key)  # nothing is left to undo
    assert not window.figure.axes[0].collections


@pytest.mark.parametrize("key", ["r", "ㄱ"])
def test_reset_clears_all_prompts_and_can_be_undone(window, key):
    click(window.figure, 40, 30)
    click(window.figure, 20, 30)
    press(window.figure, key)
    assert window.current == ([], None, {}, None) and tinted_rows(window) == 0
    assert not window.figure.axes[0].collections and not window.figure.axes[0].patches
    press(window.figure, "u")  # and that can be undone
    assert rounded(*window.current) == ([(40, 30, 1), (20, 30, 1)], None)


def test_keys_of_matplotlib_do_nothing_except_q(window):
    click(window.figure, 40, 30)
    before = window.figure.axes[0].get_yscale(), window.figure.axes[0].get_xscale(), window.current
    for key in ("l", "k", "L", "g", "G", "o", "p", "s", "f", "h", "c", "v", "ctrl+s", None):
        press(window.figure, key)
    assert (window.figure.axes[0].get_yscale(), window.figure.axes[0].get_xscale(), window.current) == before
    assert plt.fignum_exists(window.figure.number)
    press(window.figure, "q")
    assert not plt.fignum_exists(window.figure.number)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("height, width", [(30, 400), (400, 30), (32, 32), (60, 80)])
def test_the_window_fits_a_screen_of_1280_by_720(models, height, width):
    window = test_my_image.Window(np.zeros((height, width, 3), np.uint8), dict.fromkeys(range(models)), "photo")
    across, down = window.figure.get_size_inches() * 100
    plt.close(window.figure)
    assert across * 1.05 <= 1280 and down * 1.05 <= 720 - 110  # where Tk has 100 dots an inch; toolbar and frame


@pytest.mark.parametrize("key", ["n", "ㅜ"])
def test_n_finishes_an_object_and_begins_the_next(window, key):
    press(window.figure, key)  # there is none yet
    assert not window.finished
    drag(window.figure, (10, 10), (30, 50))
    press(window.figure, "1")
    press(window.figure, key)
    assert window.current == ([], None, {}, None) and "object 2" in window.figure.axes[0].get_title()
    assert not window.figure.axes[0].patches
    drag(window.figure, (40, 10), (70, 50))
    first, second = window.objects()
    assert (rounded(*first)[1], rounded(*second)[1]) == ([10, 10, 30, 50], [40, 10, 70, 50])
    assert first.best("fine-tuned model")[1].sum() == 10 * 20  # the candidate that was picked
    assert second.best("fine-tuned model")[1].sum() == 20 * 30
    pixels = np.asarray(window.figure.axes[0].images[0].get_array()).astype(int)
    tint = (pixels - window.image)[2:8]  # the finished one is drawn too, in a color of its own
    assert np.abs(tint[:, 12:28]).mean() > 20 and np.abs(tint[:, 42:68]).mean() > 20
    assert np.abs(tint[:, 12:28].mean((0, 1)) - tint[:, 42:68].mean((0, 1))).max() > 20
    assert not tint[:, 32:38].any()


def test_undo_returns_to_a_finished_object(window):
    click(window.figure, 40, 30)
    press(window.figure, "3")
    press(window.figure, "n")
    click(window.figure, 20, 20)
    press(window.figure, "u")
    assert len(window.finished) == 1 and not window.current.points
    press(window.figure, "u")
    assert not window.finished and rounded(*window.current) == ([(40, 30, 1)], None) and window.current.choice == 2


def test_an_object_with_an_empty_mask_is_not_kept(window):
    click(window.figure, 40, 58)
    assert window.current.candidates and not window.objects()
    press(window.figure, "n")
    press(window.figure, "enter")
    assert not window.finished and plt.fignum_exists(window.figure.number)


def test_number_keys_pick_a_candidate_until_the_next_prompt(window):
    press(window.figure, "1")  # nothing to pick from yet
    click(window.figure, 40, 30)
    assert window.current.choice is None
    for key, rows in (("1", 10), ("3", 30), ("2", 20)):
        press(window.figure, key)
        assert tinted_rows(window) == rows and window.current.choice == int(key) - 1
    assert len(window.asked) == 1  # the model is not asked again
    click(window.figure, 20, 20)
    assert window.current.choice is None


def test_enter_closes_the_window_once_there_is_something_to_save(window):
    for key in ("1", "n", "enter"):
        window.update()
        assert window.figure.axes[0].get_title() == "fine-tuned model"
        press(window.figure, key)
        assert plt.fignum_exists(window.figure.number) and "click an object" in window.figure.axes[0].get_title()
    click(window.figure, 40, 30)
    press(window.figure, "enter")
    assert not plt.fignum_exists(window.figure.number) and len(window.objects()) == 1


def test_other_buttons_and_clicks_outside_the_image_place_nothing(window):
    click(window.figure, 40, 30, button=2)
    click(window.figure, -20, 30)
    click(window.figure, 40, 300)
    mouse(window.figure, "button_release", 40, 30, 1)  # pressed somewhere else
    assert not window.asked and not window.current.points


def test_a_click_beside_the_image_after_panning_places_nothing(window):
    window.panels[0].set(xlim=(-40, 60), ylim=(90, -40))
    click(window.figure, -20, -20)
    click(window.figure, 20, -10)
    assert not window.asked and not window.current.points


def test_another_button_does_not_end_a_drag(window):
    mouse(window.figure, "button_press", 10, 10, 1)
    mouse(window.figure, "button_release", 20, 20, 2)
    assert not window.asked and not window.current.box
    mouse(window.figure, "button_release", 50, 50, 1)
    assert window.current.box == pytest.approx((10, 10, 50, 50), abs=1)


def test_a_click_on_the_outer_half_of_an_edge_pixel_counts_as_that_pixel(window):
    click(window.figure, -0.4, 30)
    click(window.figure, 79.4, 30)
    assert [point[0] for point in window.current.points] == [0, 79]


def test_clicks_while_the_toolbar_zooms_place_nothing(window):
    window.figure.canvas.toolbar = type("Toolbar", (), {"mode": "zoom rect"})()
    click(window.figure, 40, 30)
    drag(window.figure, (10, 10), (50, 50))
    assert not window.asked


def test_late_browser_events_of_a_closed_window_do_not_reach_the_next_window(window):
    plt.close(window.figure)
    following = test_my_image.Window(window.image, window.models, "photo")
    assert following.figure.number != window.figure.number  # matplotlib's WebAgg finds the window by its number
    plt.close(following.figure)


def test_two_models_share_the_prompts():
    def find(points, box):
        return np.ones((3, 120, 80), bool), np.array([0.1, 0.2, 0.3 * len(points)])
    both = test_my_image.Window(draw_pair(3, 120, 80)[0], {"original model": find, "fine-tuned model": find},
                                "photo")
    click(both.figure, 40, 30)
    titles = [axes.get_title() for axes in both.figure.axes]
    press(both.figure, "n")
    click(both.figure, 40, 30)
    assert_whole_titles(both.figure)
    plt.close(both.figure)
    assert titles == ["original model: mask 3 of 3, score 0.300", "fine-tuned model: mask 3 of 3, score 0.300"]


# ----------------------------------------------------------------------------- on a screen

DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import test_my_image

class Window(test_my_image.Window):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.figure.canvas.mpl_connect("draw_event", self.tell)

    def tell(self, event):
        transform = self.panels[0].transData
        (left, top), (right, bottom) = transform.transform([(0, 0), (100, 100)])
        height = self.figure.canvas.get_width_height(physical=True)[1]
        print("drawn", self.figure.canvas.manager.get_window_title().split()[0], len(self.finished),
              len(self.current.points), int(bool(self.current.box)),
              left, height - top, right, height - bottom, flush=True)

test_my_image.Window = Window
test_my_image.run(test_my_image.main, "")
"""


class RealWindow:
    """A script in a window on a virtual screen, driven with xdotool; driver: code that starts it.

    The script reports what it has drawn. After every action the test waits for the resulting drawing, so that the
    speed of the machine does not matter. A wait fails only if the script hangs, see kill_if_it_hangs.
    """

    def __init__(self, folder, screen, *arguments, driver=DRIVER):
        self.env = {**ENV, "DISPLAY": screen, "MPLBACKEND": "TkAgg"}
        self.script = subprocess.Popen(
            [sys.executable, "-c", driver, "--model-cfg", str(SMALL_CFG), "--finetuned", ROOT / "demo/sam2_demo.pt",
             "--device", "cpu", *map(str, arguments)],
            cwd=folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.script.kill()
        self.script.wait()
        self.script.stdout.close()

    def read_until(self, begin):
        """Read what the script prints up to a line that begins with `begin`; returns the rest of this line."""
        with kill_if_it_hangs(self.script):
            for line in self.script.stdout:
                self.output += line
                if line.startswith(begin):
                    return line.removeprefix(begin)
            raise AssertionError(f"{begin!r} is missing in {self.output}")

    def wait_for(self, name, finished=0, points=0, box=0):
        """Wait until the window of the image `name` shows this many objects, points and boxes."""
        drawn = self.read_until(f"drawn {name} {finished} {points} {box} ")
        self.corners = [float(number) for number in drawn.split()[:4]]

    def wait_for_window(self, name, *state):
        """Wait until the window of the image `name` is on the screen, in this state, and has the keyboard focus."""
        self.wait_for(name, *state)
        self.id = self.xdotool("search", "--sync", "--onlyvisible", "--name", name).split()[0]
        self.xdotool("windowactivate", "--sync", self.id)

    def xdotool(self, *arguments):
        return subprocess.run(["xdotool", *map(str, arguments)], env=self.env, check=True, timeout=60,
                              capture_output=True, text=True).stdout

    def at(self, x, y):
        """xdotool's arguments for moving to image pixel (x, y)."""
        left, top, right, bottom = self.corners
        return ["mousemove", "--window", self.id, round(left + x / 100 * (right - left)),
                round(top + y / 100 * (bottom - top))]

    def click(self, x, y, button=1):
        self.xdotool(*self.at(x, y), "click", button)

    def drag(self, start, end):
        middle = [(a + b) / 2 for a, b in zip(start, end)]
        self.xdotool(*self.at(*start), "mousedown", 1, *self.at(*middle), *self.at(*end), "mouseup", 1)

    def close(self):
        """Ask the window manager to close the window, as its button does, until the script has ended.

        On a busy machine openbox sometimes misses key presses.
        """
        with kill_if_it_hangs(self.script):
            while self.script.poll() is None:
                subprocess.run(["xdotool", "key", "alt+F4"], env=self.env, timeout=60)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.script.wait(5)

    def end(self, code=0):
        """Wait for the script and assert its exit code; returns what it printed."""
        with kill_if_it_hangs(self.script):
            self.output += self.script.communicate()[0]
        assert self.script.returncode == code, self.output
        return self.output


def test_a_hanging_window_fails_its_test_with_a_message():
    script = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with pytest.raises(AssertionError, match="no answer in 0.01 s"), kill_if_it_hangs(script, 0.01):
        script.wait()
    assert script.returncode


def test_real_window_clicks_drag_undo_and_enter(tmp_path, screen):
    draw_discs(tmp_path / "a.png")
    with RealWindow(tmp_path, screen, "--image", "a.png", "-o", "clicked") as window:
        window.wait_for_window("a.png")
        geometry = window.xdotool("getwindowgeometry", "--shell", window.id)
        size = {name: int(number) for name, number in re.findall(r"(WIDTH|HEIGHT)=(\d+)", geometry)}
        assert size["WIDTH"] <= 1280 and size["HEIGHT"] <= 720 - 50  # the frame and a panel of the desktop
        window.click(40, 40)
        window.wait_for("a.png", points=1)
        window.click(100, 20, 3)
        window.wait_for("a.png", points=2)
        window.click(20, 100, 3)
        window.wait_for("a.png", points=3)
        window.xdotool("key", "u")
        window.wait_for("a.png", points=2)
        window.drag((12, 12), (70, 69))
        window.wait_for("a.png", points=2, box=1)
        window.xdotool("key", "Return")
        flags = shlex.split(re.search("창에서 준 프롬프트: (.*)", window.end())[1])
    (x1, y1, label1), (x2, y2, label2) = test_my_image.parse_points(flags[1])
    assert (label1, label2) == (1, 0) and (x1, y1, x2, y2) == pytest.approx((40, 40, 100, 20), abs=1)
    box, = test_my_image.parse_boxes(flags[3])
    assert box == pytest.approx([12, 12, 70, 69], abs=1)
    run("test_my_image.py", "--image", "a.png", "--model-cfg", SMALL_CFG, "--finetuned", ROOT / "demo/sam2_demo.pt",
        "--device", "cpu", *flags, "-o", "typed", cwd=tmp_path)
    clicked, typed = read_mask(tmp_path / "clicked", "a"), read_mask(tmp_path / "typed", "a")
    assert (clicked == typed).all() and clicked[40, 40] and not clicked[80, 110]


def test_real_window_saves_when_it_is_closed(tmp_path, screen):
    draw_discs(tmp_path / "a.png")
    with RealWindow(tmp_path, screen, "--image", "a.png") as window:
        window.wait_for_window("a.png")
        window.click(110, 80)
        window.wait_for("a.png", points=1)
        window.close()
        window.end()
    mask = read_mask(tmp_path / "output/my_results", "a")
    assert mask[80, 110] and not mask[40, 40]

"""compare_models.py, as a user runs it."""

import csv
import json
import re
import signal

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    SMALL_CFG,
    assert_fails_in_one_line,
    display_width,
    run,
    save_small_model,
    signal_at,
    write_image,
)

import compare_models


def compare(folder, weights, *arguments, **options):
    return run("compare_models.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               *arguments, cwd=folder, **options)


def read_rows(folder):
    with (folder / "per_image.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_box_pictures_and_tables_agree(trained, weights):
    folder, _ = trained
    done = compare(folder, weights)
    rows = read_rows(folder / "output/comparison")
    assert list(rows[0]) == ["image", "object", "original_iou", "finetuned_iou", "original_dice", "finetuned_dice"]
    assert [row["image"] for row in rows] == [f"pair_{number}.png" for number in range(100, 104)]
    measures = list(rows[0])[2:]
    means = {name: np.mean([float(row[name]) for row in rows]) for name in measures}

    summary = json.loads((folder / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == summary["num_objects"] == 4
    assert summary["prompt"] == "point" and summary["device"] == "cpu"
    assert summary["difference_pp"] == pytest.approx(100 * (means["finetuned_iou"] - means["original_iou"]))
    for name, mean in means.items():
        assert summary[name] == pytest.approx(mean) and 0 <= mean <= 1

    box = done.stdout[done.stdout.index("┌"):done.stdout.index("┘") + 1].splitlines()
    assert len({display_width(line) for line in box}) == 1
    shown = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", "\n".join(box))]
    assert shown == [round(100 * means["original_iou"], 2), round(100 * means["finetuned_iou"], 2),
                     round(summary["difference_pp"], 1)]

    pictures = sorted((folder / "output/comparison").glob("compare_*.png"))
    assert [path.name for path in pictures] == [f"compare_{number}.png" for number in range(1, 5)]
    for path in [*pictures, folder / "output/comparison/scatter.png"]:
        assert cv2.imread(str(path)).std() > 10
    assert "한 번만 인코딩" in done.stdout


def test_iou_is_that_of_the_best_scored_mask_for_the_middle_click(trained, weights):
    """Computed again here, with sam2's own predictor."""
    folder, _ = trained
    compare(folder, weights, "--output-dir", "again")
    predictor = compare_models.load_predictor(SMALL_CFG, folder / "output/sam2_best.pt", "cpu")
    for row in read_rows(folder / "again"):
        image = cv2.imread(str(folder / "data/images/val" / row["image"]))[..., ::-1].copy()
        gt_mask = cv2.imread(str(folder / "data/masks/val" / row["image"]), cv2.IMREAD_GRAYSCALE) > 127
        foreground = np.argwhere(gt_mask)
        y, x = foreground[len(foreground) // 2]
        predictor.set_image(image)
        masks, scores, _ = predictor.predict(np.array([[x, y]]), np.array([1]), multimask_output=True)
        best = masks[int(np.argmax(scores))] > 0.5
        assert float(row["finetuned_iou"]) == pytest.approx(
            (best & gt_mask).sum() / (best | gt_mask).sum(), abs=1e-5)


def test_training_reports_exactly_the_iou_that_is_measured_here(trained, weights):
    folder, done = trained
    compared = compare(folder, weights, "--output-dir", "same")
    summary = json.loads((folder / "same/summary.json").read_text(encoding="utf-8"))
    training = json.loads((folder / "output/training_summary.json").read_text(encoding="utf-8"))
    assert summary["finetuned_iou"] == training["best_iou"]
    shown = re.search(r"파인튜닝 SAM2:\s+([\d.]+%)", compared.stdout)[1]
    assert f"검증 최고 IoU {shown}" in done.stdout


def test_a_bare_state_dict_opens_and_numbers_are_flags(trained, weights):
    folder, _ = trained
    torch.save(torch.load(folder / "output/sam2_best.pt", weights_only=True)["model"], folder / "bare.pt")
    done = compare(folder, weights, "--finetuned", "bare.pt", "--num-images", 2, "--num-visualize", 1,
                   "--prompt", "box", "--output-dir", "bare")
    summary = json.loads((folder / "bare/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == len(read_rows(folder / "bare")) == 2 and summary["prompt"] == "box"
    assert len(list((folder / "bare").glob("compare_*.png"))) == 1
    assert "이미지 2장, 객체 2개, 프롬프트 box" in done.stdout


def test_models_with_different_encoders_are_encoded_apart(trained, weights, tmp_path):
    folder, _ = trained
    other = save_small_model(tmp_path / "other.pt", seed=1)
    done = compare(folder, weights, "--finetuned", other, "--output-dir", tmp_path)
    assert "모델마다 인코딩" in done.stdout
    reverse = tmp_path / "reverse"
    compare(folder, other, "--finetuned", weights, "--output-dir", reverse)
    for one, two in zip(read_rows(tmp_path), read_rows(reverse)):
        assert one["original_iou"] == two["finetuned_iou"] and one["finetuned_iou"] == two["original_iou"]


def test_without_a_finetuned_model_it_says_what_to_run(data, weights):
    assert_fails_in_one_line(compare(data, weights, code=1), "output/sam2_best.pt", "train_sam2_proper.py")


def test_a_broken_image_is_named(data, weights):
    (data / "data/images/val/pair_101.png").write_bytes(b"broken")
    done = compare(data, weights, "--finetuned", weights, code=1)
    assert_fails_in_one_line(done, "pair_101.png")


def test_empty_masks_are_left_out_and_counted(data, weights):
    write_image(data / "data/masks/val/pair_100.png", np.zeros((60, 80), np.uint8))
    done = compare(data, weights, "--finetuned", weights)
    assert "뺀 이미지: 1장" in done.stdout and len(read_rows(data / "output/comparison")) == 3
    assert "비교 그림 3장" in done.stdout and len(list((data / "output/comparison").glob("compare_*.png"))) == 3
    compare(data, weights, "--finetuned", weights, "--num-visualize", 2)  # the first would have been the empty one
    assert len(list((data / "output/comparison").glob("compare_*.png"))) == 2


def test_ctrl_c_ends_in_one_line(data, weights):
    done = run("compare_models.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--finetuned", weights,
               "--device", "cpu", "--num-visualize", 0, cwd=data, code=1, before=signal_at("인코딩", signal.SIGINT))
    assert_fails_in_one_line(done, "중단했습니다")
    assert not (data / "output/comparison").exists()

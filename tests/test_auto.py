"""Segmentation without prompts: what train_sam2_proper.py learns with --prompt none and any, and how it is used.

| tests | subject |
|---|---|
| training | images without any object: when they are drawn, what they train |
| numbers | --val-prompt none equals compare_models.py --prompt none, specificity |
| use | test_my_image.py --auto: masks, auto.csv, models that were not trained for it |
"""

import json
import sys

import cv2
import numpy as np
import pytest
import test_window
import torch
from conftest import MODEL, SMALL_CFG, assert_fails_in_one_line, read_rows, run, write_image

import test_my_image
import train_sam2_proper


def train(data, weights, *arguments, code=0):
    return run("train_sam2_proper.py", *MODEL, "--checkpoint", weights, "--workers", 0, *arguments, cwd=data, code=code)


@pytest.fixture
def with_empty(data):
    """data/ with two images without any object in each split."""
    for split in ("train", "val"):
        for number in (1, 2):
            write_image(data / f"data/images/{split}/empty_{number}.png", np.full((60, 80, 3), 30 * number, np.uint8))
            write_image(data / f"data/masks/{split}/empty_{number}.png", np.zeros((60, 80), np.uint8))
    return data


def test_images_without_an_object_are_sampled_only_for_examples_without_a_prompt(with_empty):
    folder = with_empty / "data"
    pairs = train_sam2_proper.find_pairs(folder / "images/train", folder / "masks/train")
    images = train_sam2_proper.LabeledImages(pairs, 1024, 100, keep_empty=True)
    assert (len(images), images.filled, images.empty, images.left_out) == (8, 6, 2, 0)
    assert [image.path.stem for image in images[6:]] == ["empty_1", "empty_2"]
    assert len(train_sam2_proper.LabeledImages(pairs, 1024, 100)) == 6
    args = train_sam2_proper.argparse.Namespace(**{**train_sam2_proper.CONFIG, "prompt": "any", "batch_size": 8})
    batches, kinds, drawn = train_sam2_proper.Batches(images, args), set(), {True: set(), False: set()}
    for number in range(60):
        batch = batches[number]
        kinds.add(batch.kind)
        drawn[batch.kind == "none"] |= set(batch.images)
        for image, mask in zip(batch.images, batch.gt_masks):
            assert mask.any() == (image in images[:6])
            if batch.kind == "none":
                assert np.array_equal(mask[0].numpy(), image.labels() > 0)
    assert kinds == {"point", "points", "box", "none"} and drawn == {True: set(images), False: set(images[:6])}


def test_a_training_that_would_forget_images_without_an_object_warns(with_empty, weights):
    taught = torch.load(weights, weights_only=True)
    torch.save({**taught, "knows_absence": True}, with_empty / "taught.pt")
    arguments = ("train_sam2_proper.py", *MODEL, "--checkpoint", "taught.pt", "--test", "--prompt")
    assert "그 능력을 잃습니다" in run(*arguments, "point", cwd=with_empty).stdout
    assert "그 능력을 잃습니다" not in run(*arguments, "any", cwd=with_empty).stdout


def test_prediction_without_a_prompt_equals_that_of_sam2(data, weights):
    predictor = train_sam2_proper.load_predictor(SMALL_CFG, weights, "cpu")
    predictor.set_image(train_sam2_proper.read_image(data / "data/images/val/pair_100.png"))
    features = predictor._features
    with torch.no_grad():
        ours, scores = train_sam2_proper.simulate_prompts(
            predictor, features, "none", [np.zeros((60, 80), bool)])
        expected = predictor.model._forward_sam_heads(
            features["image_embed"], high_res_features=features["high_res_feats"], multimask_output=True)
    assert torch.equal(ours, expected[0]) and torch.equal(scores, expected[2])


def test_an_image_without_an_object_trains_only_the_object_score(with_empty, weights, monkeypatch):
    monkeypatch.chdir(with_empty)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, MODEL), "--checkpoint", str(weights), "--prompt", "none",
                                      "--batch-size", "2"])
    training = train_sam2_proper.Training(train_sam2_proper.parse_args(), "cpu")
    assert training.teaches_absence and not training.model.knows_absence  # before the first step
    training.model.knows_absence = True
    images = training.images[6:]  # the empty ones
    masks = [torch.from_numpy(image.mask()[None]) for image in images]
    loss, iou = training.batch_loss(train_sam2_proper.Batch(images, "none", 0, [None, None], masks))
    scores = training.model.sam_mask_decoder.pred_obj_score_head.last[:, 0]
    assert loss.item() == pytest.approx(0.5 * torch.log1p(scores.exp()).mean().item(), rel=1e-5)
    assert iou.item() == (scores < 0).float().mean().item()
    loss.backward()
    mask_weights = dict(training.model.sam_mask_decoder.output_hypernetworks_mlps.named_parameters())
    assert all(weight.grad is None or not weight.grad.any() for weight in mask_weights.values())


def test_validation_without_prompts_equals_compare_models(with_empty, weights):
    done = train(with_empty, weights, "--prompt", "any", "--val-prompt", "none", "--iterations", 6, "--save-every", 3,
                 "--lr", "1e-3", "--batch-size", 2)
    assert "학습 이미지 중 객체가 없는 것 2장" in done.stdout and "검증 이미지 중 객체가 없는 것 2장" in done.stdout
    first, *_, last = read_rows(with_empty / "output/train_log.csv")
    done = run("compare_models.py", *MODEL, "--checkpoint", weights, "--finetuned", "output/sam2_final.pt",
               "--prompt", "none", cwd=with_empty)
    summary = json.loads((with_empty / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["finetuned_iou"] == float(last["val_iou"])
    assert summary["finetuned_specificity"] == float(last["val_specificity"])
    assert summary["original_iou"] == float(first["val_iou"])  # before training, the object score means nothing
    assert summary["original_specificity"] == float(first["val_specificity"])
    assert (summary["num_images"], summary["num_objects"]) == (6, 4) and "특이도" in done.stdout
    rows = read_rows(with_empty / "output/comparison/per_image.csv")
    assert [row["object"] for row in rows] == [""] * 4


def test_without_a_prompt_all_objects_of_an_image_are_one_target(data, weights):
    for path in (data / "data/masks/val").iterdir():
        labels = cv2.imread(str(path), -1).astype(np.uint16)
        labels[:10, :10] = 7
        write_image(path, labels)
    train(data, weights, "--iterations", 1, "--val-prompt", "none")
    arguments = (*MODEL, "--checkpoint", weights, "--prompt")
    run("compare_models.py", *arguments, "none", cwd=data)
    assert len(read_rows(data / "output/comparison/per_image.csv")) == 4
    run("compare_models.py", *arguments, "point", cwd=data)
    assert len(read_rows(data / "output/comparison/per_image.csv")) == 8


def test_auto_writes_a_mask_a_figure_and_a_table_row_for_each_image(with_empty, weights):
    train(with_empty, weights, "--prompt", "any", "--iterations", 2)
    done = run("test_my_image.py", *MODEL, "--auto", "--image", "data/images/val", cwd=with_empty)
    assert "주의" not in done.stdout
    results = with_empty / "output/my_results"
    rows = read_rows(results / "auto.csv")
    assert [row["image"] for row in rows] == sorted(path.name for path in (with_empty / "data/images/val").iterdir())
    assert f"{len(rows)}장 가운데 {sum(row['found'] == '1' for row in rows)}장에서 찾음" in done.stdout
    for row in rows:
        mask = cv2.imread(str(results / f"{row['image'][:-4]}_mask.png"), -1)
        assert mask.shape == (60, 80) and set(np.unique(mask)) <= {0, 255}
        assert int(row["area"]) == (mask > 0).sum() and int(row["found"]) == mask.any()
        assert float(row["area_share"]) == pytest.approx((mask > 0).mean(), abs=1e-6)
        assert (results / f"{row['image'][:-4]}_result.png").is_file()


def test_an_interrupted_run_keeps_the_rows_of_auto_csv(data, monkeypatch):
    write, written = test_my_image.write_results, []

    def write_two(*results):
        written.append(results)
        if len(written) > 2:
            raise KeyboardInterrupt
        return write(*results)

    monkeypatch.setattr(test_my_image, "write_results", write_two)
    (data / "data/images/val/pair_100.png").rename(data / "data/images/val/=1+1.png")
    with pytest.raises(KeyboardInterrupt):
        test_window.main(monkeypatch, data, "--auto", "--image", "data/images/val")
    assert [row["image"] for row in read_rows(data / "output/my_results/auto.csv")] == ["'=1+1.png", "pair_101.png"]


@pytest.mark.parametrize("is_absent", [False, True])
def test_an_image_in_which_nothing_is_found_gets_empty_masks_with_score_0(data, visible, monkeypatch, is_absent):
    predictor = test_my_image.load_predictor(SMALL_CFG, visible, "cpu")
    predictor.set_image(test_my_image.read_image(data / "data/images/val/pair_100.png"))
    monkeypatch.setattr(test_my_image, "nothing_found", lambda model: is_absent)
    masks, scores = test_my_image.segment(predictor, [], None)
    assert masks.shape == (3, 60, 80) and masks.dtype == bool and masks.any() != is_absent
    assert (scores > 0).all() if not is_absent else not scores.any()
    assert test_my_image.segment(predictor, [(40, 30, 1)], None)[1].any()  # a click is always answered


def test_auto_warns_if_the_model_was_not_trained_without_prompts(data, weights):
    train(data, weights, "--iterations", 1)
    done = run("test_my_image.py", *MODEL, "--auto", "--image", "data/images/val/pair_100.png", cwd=data)
    warning, = (line for line in done.stdout.splitlines() if line.startswith("주의"))
    assert "--recipe strongest" in warning and (data / "output/my_results/auto.csv").is_file()
    refused = run("test_my_image.py", *MODEL, "--auto", "-p", "1,1", "-i", "data/images/val/pair_100.png", cwd=data,
                  code=2)
    assert "--auto" in refused.stderr


def test_training_refuses_a_folder_with_only_empty_masks(data, weights):
    for path in (data / "data/masks/train").iterdir():
        write_image(path, np.zeros((60, 80), np.uint8))
    assert_fails_in_one_line(train(data, weights, "--prompt", "any", code=1), "학습할 쌍이 없습니다")

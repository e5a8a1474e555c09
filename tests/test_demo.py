"""The demo: its data, its model, the scripts that make them, and its gain from fine-tuning.

| tests | subject |
|---|---|
| data | the same seed gives the same data, sizes of polyps, scenes and clips |
| model | size and format, clicks select objects, tracking after an occlusion |
| training | gain of a shortened demo, losses by hand, quick evaluation |
"""

import json
import re

import cv2
import make_demo_model
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from draw_scenes import draw_clip

DEMO_MODEL = ("--model-cfg", ROOT / "demo/sam2_demo.yaml", "--checkpoint", ROOT / "demo/sam2_demo.pt")


def draw(folder, *arguments):
    run("demo/make_demo_data.py", "--output", folder, *arguments, cwd=folder.parent)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_demo_data_depends_only_on_the_seed(tmp_path):
    one = draw(tmp_path / "one", "--train", 6, "--val", 2)
    assert len(one) == 16
    assert one == draw(tmp_path / "two", "--train", 6, "--val", 2)
    other = draw(tmp_path / "other", "--train", 6, "--val", 2, "--seed", 1)
    assert one.keys() == other.keys() and not any(one[name] == other[name] for name in one)
    done = run("prepare_data.py", "--data-dir", "one", "--check", cwd=tmp_path)
    assert "train: 6쌍" in done.stdout and "문제 없음" in done.stdout


def test_polyps_are_about_as_large_as_in_kvasir_seg(tmp_path):
    draw(tmp_path / "data", "--train", 60, "--val", 0)
    shares = [(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127).mean()
              for path in (tmp_path / "data/masks/train").iterdir()]
    assert 0.08 < np.median(shares) < 0.17 and min(shares) > 0.003 and max(shares) < 0.81


def test_demo_model_is_small_and_in_the_official_format():
    path = ROOT / "demo/sam2_demo.pt"
    assert path.stat().st_size < 20e6
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint) == ["model"]
    assert 2.5e6 < sum(tensor.numel() for tensor in checkpoint["model"].values()) < 5e6


def test_shortened_demo_gains_iou(tmp_path):
    """The steps of `make demo`, on half of the data and a seventh of the iterations, with its recipe."""
    draw(tmp_path / "data", "--train", 80, "--val", 30)
    run("train_sam2_proper.py", *DEMO_MODEL, "--recipe", "improved", "--prompt", "any", "--iterations", 107,
        "--save-every", 107, "--device", "cpu", cwd=tmp_path)
    run("compare_models.py", *DEMO_MODEL, "--device", "cpu", cwd=tmp_path)
    summary = json.loads((tmp_path / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == 30
    assert summary["difference_pp"] > 3
    run("test_my_image.py", *DEMO_MODEL, "--device", "cpu", "--image", "data/images/val/demo_0080.jpg",
        "--point", "160,144", cwd=tmp_path)
    assert cv2.imread(str(tmp_path / "output/my_results/demo_0080_mask.png")).shape == (288, 320, 3)
    run("test_my_image.py", *DEMO_MODEL, "--device", "cpu", "--image", "data/images/val/demo_0080.jpg",
        "data/images/val/demo_0081.jpg", "--auto", "--output", "without_click", cwd=tmp_path)
    assert len((tmp_path / "without_click/auto.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_the_click_decides_which_object_the_demo_model_segments(tmp_path):
    """Two discs, one click on each: each mask lies on its own disc."""
    image = np.full((256, 256, 3), 60, np.uint8)
    for centre, color in (((70, 70), (200, 120, 40)), ((180, 180), (60, 60, 220))):
        cv2.circle(image, centre, 40, color, -1)
    cv2.imwrite(str(tmp_path / "discs.png"), image)
    masks = []
    for number, (x, y) in enumerate(((70, 70), (180, 180))):
        run("test_my_image.py", *DEMO_MODEL, "--original", "--device", "cpu", "--image", "discs.png",
            "--point", f"{x},{y}", "-o", str(number), cwd=tmp_path)
        masks.append(cv2.imread(str(tmp_path / str(number) / "discs_mask.png"), cv2.IMREAD_GRAYSCALE) > 0)
    for mask, (x, y) in zip(masks, ((70, 70), (180, 180))):
        disc = cv2.circle(np.zeros((256, 256), np.uint8), (x, y), 40, 1, -1) > 0
        assert (mask & disc).sum() / (mask | disc).sum() > 0.7


def test_a_scene_depends_only_on_the_seed_and_parts_of_objects_have_no_parts():
    with_parts = 0
    for seed in range(8):
        frames, labels, groups = draw_clip(np.random.default_rng(seed), 96, 1)
        again = draw_clip(np.random.default_rng(seed), 96, 1)
        assert np.array_equal(frames, again[0]) and np.array_equal(labels, again[1]) and groups == again[2]
        assert frames.shape == (1, 96, 96, 3) and labels.shape == (1, 96, 96) and labels.max() <= len(groups)
        assert [group[0] for group in groups] == list(range(1, len(groups) + 1))
        for whole, *parts in groups:
            with_parts += bool(parts)
            assert all(groups[part - 1] == [part] for part in parts), f"{whole}: a part of a part"
    assert with_parts


def test_objects_in_clips_move_and_some_leave_the_frame():
    left = moved = 0
    for seed in range(12):
        _, labels, groups = draw_clip(np.random.default_rng(seed), 64, np.arange(0, 32, 4))
        for group in groups:
            seen = np.isin(labels, group)
            left += seen[0].sum() > 20 and not seen.any((1, 2)).all()
            moved += not np.array_equal(seen[0], seen[-1])
    assert left and moved > 12


def test_the_mask_loss_weights_the_best_of_three_masks_fully_and_all_three_slightly():
    """Half of 8 x 8 pixels; one mask right, two inverted, logits 10 after division: BCE 10 and Dice 64/65 of these."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    right = torch.where(mask, 10.0, -10.0) * make_demo_model.SHARPNESS
    logits = torch.stack([right, -right, -right], 1)
    loss = make_demo_model.mask_loss(logits, torch.tensor([[1.0, 0.0, 0.3]]), mask)
    assert loss.item() == pytest.approx(0.2 * 2 / 3 * (4 * 10 + 64 / 65) + 0.1, abs=0.01)


def test_the_grouping_loss_of_identical_features_equals_the_value_computed_by_hand():
    """At distance 0 two cells lie on one thing with probability sigmoid(4): -log of it is 0.018, of the rest 4.018."""
    grouping = make_demo_model.Grouping(make_demo_model.build(256))
    for parameter in grouping.parameters():
        torch.nn.init.zeros_(parameter)
    levels = [torch.ones(1, 16, 64, 64), torch.ones(1, 32, 32, 32), torch.ones(1, 128, 16, 16)]
    one_thing, a_thing_each = torch.zeros(1, 256, 256), torch.arange(256**2).view(1, 256, 256)
    assert grouping(levels, one_thing).item() == pytest.approx(0.01815, abs=1e-5)
    assert grouping(levels, a_thing_each).item() == pytest.approx(0.01815 / 256 + 4.01815 * 255 / 256, abs=1e-4)


def test_random_box_prompts_differ_from_the_mask_box_by_at_most_a_tenth_of_its_side():
    masks = torch.zeros(50, 64, 64, dtype=torch.bool)
    masks[:, 20:41, 10:51] = True
    boxes, labels = make_demo_model.box_prompt(masks)
    assert (boxes[:, 0] - torch.tensor([10, 20])).abs().amax(0).le(torch.tensor([4, 2])).all()
    assert (boxes[:, 1] - torch.tensor([50, 40])).abs().amax(0).le(torch.tensor([4, 2])).all()
    assert labels.tolist() == [[2, 3]] * 50 and boxes.std(0).min() > 0


def test_pretraining_continues_from_the_demo_weights_in_the_repository(tmp_path):
    """One step on each size; the parts that stills do not reach change as well."""
    resume = ("demo/make_demo_model.py", "--resume", "--scale", "0.0001", "--larger", 2, "--workers", 2)
    run(*resume, "--output", "new.pt", cwd=tmp_path)
    assert "held-out scenes" in run(*resume, "--seed", 13, code=1, cwd=tmp_path).stderr
    new, old = (torch.load(path, weights_only=True)["model"]
                for path in (tmp_path / "new.pt", ROOT / "demo/sam2_demo.pt"))
    assert new.keys() == old.keys() and not list(tmp_path.glob("*.part"))
    assert all(value.isfinite().all() for value in new.values())
    assert any(not torch.equal(new[name], old[name]) for name in new)


def test_quick_evaluation_prints_every_measure(tmp_path):
    done = run("demo/make_demo_model.py", "--evaluate", "--quick", cwd=tmp_path)
    figures = dict(re.findall(r"^([\w ]+): (\d\.\d{3})", done.stdout, re.MULTILINE))
    assert list(figures) == ["click IoU", "score error", "box IoU", "everything recall", "J", "absent recognised",
                             "present recognised"]
    assert float(figures["click IoU"]) > 0.5 and float(figures["box IoU"]) > 0.6


def test_demo_model_follows_an_object_that_leaves_and_comes_back():
    """SAM2VideoPredictor, with a box on the first frame, follows an orange disc that passes behind a wall."""
    frames, masks = [], []
    for t in range(16):
        image, mask = np.full((256, 256, 3), 90, np.uint8), np.zeros((256, 256), np.uint8)
        image[:, :, 2] = np.linspace(60, 140, 256, dtype=np.uint8)[:, None]
        cv2.circle(mask, (40 + 12 * t, 128), 30, 1, -1)
        image[mask > 0] = (220, 130, 40)
        image[:, 110:180], mask[:, 110:180] = (30, 60, 60), 0
        frames.append(image)
        masks.append(mask > 0)
    tracker = make_demo_model.build(256, **make_demo_model.TRACKER).eval()
    tracker.load_state_dict(torch.load(ROOT / "demo/sam2_demo.pt", weights_only=True)["model"])
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255
    ious, hidden = [], []
    with torch.inference_mode():
        for t, mask in make_demo_model.track(tracker, clip, masks[0]):
            if masks[t].sum() > 500:
                ious.append((mask & masks[t]).sum() / (mask | masks[t]).sum())
            elif not masks[t].any():
                hidden.append(mask.any())
    assert np.mean(ious) > 0.8
    assert hidden and not any(hidden)

"""The embedded demo: its data, its model, and that fine-tuning gains on it."""

import json

import cv2
import numpy as np
import torch
from conftest import ROOT, run

DEMO_MODEL = ("--model-cfg", ROOT / "demo/sam2_demo.yaml", "--checkpoint", ROOT / "demo/sam2_demo.pt")


def draw(folder, *arguments):
    run("demo/make_demo_data.py", "--output", folder, *arguments, cwd=folder.parent)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_demo_data_is_the_same_for_a_seed_and_another_for_another(tmp_path):
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


def test_demo_model_is_small_and_in_the_official_form():
    path = ROOT / "demo/sam2_demo.pt"
    assert path.stat().st_size < 10e6
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint) == ["model"]
    assert 1.5e6 < sum(tensor.numel() for tensor in checkpoint["model"].values()) < 2.5e6


def test_shortened_demo_gains_iou(tmp_path):
    """The steps of `make demo`, on a quarter of the data and a tenth of the iterations."""
    draw(tmp_path / "data", "--train", 40, "--val", 10)
    run("train_sam2_proper.py", *DEMO_MODEL, "--lr", "1e-4", "--iterations", 200, "--save-every", 200,
        "--device", "cpu", cwd=tmp_path)
    run("compare_models.py", *DEMO_MODEL, "--device", "cpu", cwd=tmp_path)
    summary = json.loads((tmp_path / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == 10
    assert summary["difference_pp"] > 3
    run("test_my_image.py", *DEMO_MODEL, "--device", "cpu", "--image", "data/images/val/demo_0040.jpg",
        "--point", "160,144", cwd=tmp_path)
    assert cv2.imread(str(tmp_path / "output/my_results/demo_0040_mask.png")).shape == (288, 320, 3)


def test_the_click_decides_which_object_the_demo_model_segments(tmp_path):
    """Two discs, one click on each: each mask lies on its own disc."""
    image = np.full((256, 256, 3), 60, np.uint8)
    for centre, colour in (((70, 70), (200, 120, 40)), ((180, 180), (60, 60, 220))):
        cv2.circle(image, centre, 40, colour, -1)
    cv2.imwrite(str(tmp_path / "discs.png"), image)
    masks = []
    for number, (x, y) in enumerate(((70, 70), (180, 180))):
        run("test_my_image.py", *DEMO_MODEL, "--original", "--device", "cpu", "--image", "discs.png",
            "--point", f"{x},{y}", "-o", str(number), cwd=tmp_path)
        masks.append(cv2.imread(str(tmp_path / str(number) / "discs_mask.png"), cv2.IMREAD_GRAYSCALE) > 0)
    for mask, (x, y) in zip(masks, ((70, 70), (180, 180))):
        disc = cv2.circle(np.zeros((256, 256), np.uint8), (x, y), 40, 1, -1) > 0
        assert (mask & disc).sum() / (mask | disc).sum() > 0.7

"""extras/learning.py: decoder steps on the labels of a folder, without a window.

| tests | subject |
|---|---|
| steps | bit-for-bit resuming, order of images, masks that are too small |
| files | learned.pt, learned_last.pt, labels changed since the last save |
| guard | restoring the last good weights |
| errors | what cannot be resumed, unreadable images, no steps |
"""

import shutil

import learning
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_CFG, draw_pair, run, write_image

import train_sam2_proper as train

DEMO = ROOT / "demo/sam2_demo.pt"


@pytest.fixture
def start(tmp_path):
    """Write images and masks of three pairs; returns a function that starts a learner on them as the demo's model."""
    for number in range(3):
        for folder, array in zip(("images", "masks"), draw_pair(number)):
            write_image(tmp_path / folder / f"{number}.png", array)

    def start(labelled=(), folder="masks", steps=learning.STEPS, checkpoint=DEMO):
        predictor = train.load_predictor(SMALL_CFG, checkpoint, "cpu")
        learner = learning.Learner(predictor, tmp_path / folder, steps)
        learner.resume([image(tmp_path, number) for number in labelled])
        return learner
    return start


def image(folder, number):
    return folder / f"images/{number}.png"


def add(learner, path):
    """Do what the window does after a mask was saved."""
    learner.predictor.set_image(train.read_image(path))
    learner.add(path, learner.predictor._features)


def read(learner, name="learned_last.pt"):
    return torch.load(learner.folder / name, weights_only=True)


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_killed_learner_continues_bit_for_bit_and_repeats_the_steps_since_the_last_save(tmp_path, start):
    shutil.copytree(tmp_path / "masks", tmp_path / "whole")
    whole = start(folder="whole")
    for number in range(3):
        add(whole, image(tmp_path, number))
        whole.finish()
    killed = start()
    for number in range(2):
        add(killed, image(tmp_path, number))
        killed.finish()
    add(killed, image(tmp_path, 2))
    for _ in range(5):  # measures and writes, then takes four steps
        killed.work()
    assert (killed.queued, killed.iteration) == (6, 24)
    assert read(killed)["queued"] == 10 and [*read(killed)["learned"]] == ["0", "1", "2"]
    resumed = start(range(3))
    assert same(resumed.copy(), read(killed)["model"]) and (resumed.queued, resumed.iteration) == (10, 20)
    assert not resumed.waiting
    resumed.finish()
    assert resumed.iteration == 30 and same(resumed.copy(), whole.copy()) and not same(resumed.copy(), resumed.initial)
    assert resumed.gains == whole.gains and len(whole.agreements) == 3


def test_learned_pt_is_a_checkpoint_that_differs_from_the_initial_one_only_in_what_was_trained(tmp_path, start):
    learner = start(steps=2)
    add(learner, image(tmp_path, 0))
    learner.finish()
    before, after = torch.load(DEMO, weights_only=True)["model"], read(learner, "learned.pt")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(train.TRAINED["frozen"].match(name) for name in changed)
    run("train_sam2_proper.py", "--test", "--model-cfg", SMALL_CFG, "--checkpoint", "masks/learned.pt", "--image-dir",
        "images", "--mask-dir", "masks", "--val-image-dir", "none", "--device", "cpu", cwd=tmp_path)
    done = run("prepare_data.py", "--images", "images", "--masks", "masks", cwd=tmp_path)
    assert "learned" not in done.stdout + done.stderr and len([*(tmp_path / "data").rglob("*.png")]) == 6


def test_labels_made_or_changed_since_the_last_save_are_learned(tmp_path, start):
    learner = start([0, 1], steps=1)
    while learner.work():
        pass
    write_image(tmp_path / "masks/0.png", draw_pair(7)[1])
    again = start([0, 1, 2], steps=1)
    assert [image.path.stem for image in again.images] == ["1"]
    assert [path.stem for path, _ in again.waiting] == ["0", "2"]
    while again.work():
        pass
    assert again.iteration == 4 and [image.path.stem for image in again.images] == ["1", "0", "2"]
    assert [image.path.stem for image in start([0, 1, 2]).images] == ["1", "0", "2"]  # the newest last


def test_the_newest_image_is_in_every_second_batch(tmp_path, start):
    learner = start()
    for number in range(3):
        learner.keep(image(tmp_path, number))
    batches = []
    for learner.iteration in range(40):
        batches.append(learner.draw())
    assert all(batch.images[0] is learner.images[2] for batch in batches[::2])
    assert {batch.images[0] for batch in batches[1::2]} == set(learner.images)
    assert {batch.kind for batch in batches} == set(train.ANY)
    assert all(len(batch.images) == 4 and mask.any() for batch in batches for mask in batch.gt_masks)


def test_masks_below_100_pixels_are_not_learned(tmp_path, start, capsys):
    mask = np.zeros((60, 80), np.uint8)
    mask[:9, :11] = 255
    write_image(tmp_path / "masks/0.png", mask)
    learner = start([0])
    assert not learner.work() and not learner.images and "0.png: 마스크가 100픽셀보다 작아" in capsys.readouterr().out


def test_a_drop_by_ten_points_restores_the_last_good_weights(tmp_path, start, capsys, monkeypatch):
    learner = start()
    good = learner.copy()
    learner.load({name: torch.zeros_like(each) for name, each in good.items()})  # what bad labels may do
    measured = iter([0.5, 0.9, 0.1, 0.5, 0.1, 0.8])  # IoU of one click: now, with good weights; no prompt
    monkeypatch.setattr(learner, "iou", lambda index, kind: next(measured) if kind == "point" else 0.7)
    for _ in range(2):
        learner.measure(0)
    assert learner.gains == pytest.approx([-0.4, -0.4]) and not same(learner.copy(), good)
    assert not learner.is_worth_showing()  # of two images only
    learner.measure(0)
    assert same(learner.copy(), good) and learner.gains == [] and learner.is_worth_showing()
    assert "첫 제안의 IoU가 10%p 떨어져" in capsys.readouterr().out


def test_weights_without_a_drop_on_ten_images_become_the_last_good_ones(start, monkeypatch):
    learner = start()
    better = {name: each + 1 for name, each in learner.copy().items()}
    learner.load(better)
    monkeypatch.setattr(learner, "iou", lambda index, kind: 0.5)
    for number in range(10):
        assert not same(learner.good, better) and len(learner.gains) == number
        learner.measure(0)
    assert same(learner.good, better)


def test_a_resume_file_of_another_model_or_a_damaged_one_is_refused(tmp_path, start):
    learner = start([0], steps=1)
    while learner.work():
        pass
    last = tmp_path / "masks/learned_last.pt"
    for name in ("image_encoder.neck.convs.0.conv.bias", "sam_mask_decoder.iou_token.weight"):
        other = torch.load(DEMO, weights_only=True)
        other["model"][name] += 0.01
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(SystemExit, match="learned_last.pt: 다른 모델로 배운 것입니다.*--no-learn"):
            start([0], checkpoint=tmp_path / "other.pt")
    assert start([0]).iteration == 1
    for content in (b"half", last.read_bytes()[:-100]):
        last.write_bytes(content)
        with pytest.raises(SystemExit, match="learned_last.pt: 읽을 수 없습니다"):
            start([0])


def test_a_labeled_image_that_became_unreadable_is_skipped_when_resuming(tmp_path, start, capsys):
    learner = start(range(2), steps=1)
    while learner.work():
        pass
    header = image(tmp_path, 0).read_bytes()[:60]
    image(tmp_path, 0).write_bytes(header)
    again = start(range(3), steps=4)
    while again.work():
        pass
    assert "images/0.png" in capsys.readouterr().err and [image.path.stem for image in again.images] == ["1", "2"]


@pytest.mark.parametrize("capacity", [0, 2])
def test_steps_are_taken_if_memory_holds_fewer_images_than_a_batch(tmp_path, start, capacity):
    learner = start()
    learner.cache.capacity = capacity
    for number in range(3):
        learner.keep(image(tmp_path, number))
    add(learner, image(tmp_path, 2))
    for _ in range(3):  # measures, then takes steps
        learner.work()
    assert learner.iteration == 2 and len(learner.cache.kept) <= capacity


def test_weights_used_temporarily_are_removed_from_the_model_after_an_error(start):
    learner = start()
    now = learner.copy()
    with pytest.raises(ZeroDivisionError), learner.using({name: each + 1 for name, each in now.items()}):
        assert not same(learner.copy(), now)
        raise ZeroDivisionError
    assert same(learner.copy(), now)


def test_with_0_steps_images_are_measured_but_not_kept_in_memory(tmp_path, start):
    learner = start(steps=0)
    for number in range(3):
        add(learner, image(tmp_path, number))
        learner.finish()
    assert len(learner.agreements) == len(learner.learned) == 3
    assert not (learner.images or learner.cache.kept or learner.queued)
    assert not (learner.folder / "learned_last.pt").exists()

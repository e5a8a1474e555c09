"""train_sam2_proper.py, run as a user runs it.

| tests | subject |
|---|---|
| training | what changes, logs, sizes, seeds, prompts, several processes |
| resuming | bit for bit, saved settings, changed data, interruptions |
| checks before training | --test, damaged files, missing packages, devices, checkpoints |
| cache | same results, memory and disk limits, reading ahead |
| recipes, objects | flags of a recipe, numbered objects, samples of many |
| encoder | LoRA, full, learning rate, checkpointing, augmentation |
"""

import argparse
import csv
import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import weakref

import cv2
import numpy as np
import psutil
import pytest
import torch
from conftest import (
    ENV,
    ROOT,
    SMALL_CFG,
    assert_fails_in_one_line,
    draw_pair,
    make_data,
    run,
    save_small_model,
    signal_at,
    write_image,
)
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from sam2.build_sam import build_sam2

import train_sam2_proper

CHANNELS = OmegaConf.load(SMALL_CFG).model.image_encoder.neck.d_model
FAILS_IN_STEP = """
import torch
def step(self, *arguments, original=torch.optim.AdamW.step, calls=[]):
    calls.append(1)
    if len(calls) == {}:
        raise RuntimeError("CUDA out of memory")
    return original(self, *arguments)
torch.optim.AdamW.step = step"""
DEFAULTS = argparse.Namespace(**train_sam2_proper.CONFIG)
TRAINED = re.compile(r"sam_prompt_encoder\.|sam_mask_decoder\.(?!conv_s[01]\.)")


def load(path):
    return torch.load(path, weights_only=True)["model"]


def read_log(folder, output="output"):
    with (folder / output / "train_log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_only_decoder_and_prompt_encoder_change(trained, weights):
    before, after = load(weights), load(trained[0] / "output/sam2_final.pt")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(TRAINED.match(name) for name in changed)
    # All weights used for one click and the first of the three masks have changed. Unchanged are the other
    # masks' heads, the object score, the embeddings of unused prompts, and the fixed Gaussian.
    idle = re.compile(r"sam_mask_decoder\.(output_hypernetworks_mlps\.[023]|pred_obj_score_head|obj_score_token)"
                      r"|sam_prompt_encoder\.(mask_downscaling|point_embeddings\.[023]|pe_layer)")
    must = {name for name in before if TRAINED.match(name) and not idle.match(name)}
    assert len(must) > 50 and must <= changed


def test_the_number_of_trained_weights_is_printed(trained, weights):
    before = load(weights)
    parameters = {name: tensor for name, tensor in before.items() if "pe_layer" not in name}
    count = sum(tensor.numel() for name, tensor in parameters.items() if TRAINED.match(name))
    assert f"{count:,} / {sum(tensor.numel() for tensor in parameters.values()):,}" in trained[1].stdout


def test_the_log_starts_before_training_and_the_best_model_has_the_highest_validation_iou(trained):
    folder, done = trained
    rows = read_log(folder)
    assert [row["iteration"] for row in rows] == ["0", "1", "10", "20", "25"]
    validated = {row["iteration"]: float(row["val_iou"]) for row in rows if row["val_iou"]}
    assert list(validated) == ["0", "10", "20", "25"] and not rows[0]["loss"]
    assert f"[0/25] 학습 전, 검증 IoU {validated.pop('0'):.2%}" in done.stdout  # the original model
    assert f"학습 IoU(이동 평균) {float(rows[1]['train_iou']):.1%} → {float(rows[-1]['train_iou']):.1%}" in done.stdout
    summary = json.loads((folder / "output/training_summary.json").read_text(encoding="utf-8"))
    assert summary["best_iou"] == max(validated.values()) and summary["best_chosen_by"] == "validation IoU"
    assert summary["settings"]["lr"] == 1e-3 and summary["train_images"] == 6 and summary["val_images"] == 4
    assert summary["settings"].keys() >= train_sam2_proper.CONFIG.keys() and summary["device"] == "cpu"
    assert summary["versions"]["sam2"].startswith("1.1") and summary["versions"]["torch"] == torch.__version__
    assert f"검증 최고 IoU {summary['best_iou']:.2%} ({summary['best_iteration']}회)" in done.stdout
    assert cv2.imread(str(folder / "output/training_curve.png")).shape[2] == 3
    assert not list((folder / "output").glob("*.tmp"))


def test_saved_checkpoints_open_in_sam2_itself(trained):
    assert_plain_sam2_opens(trained[0] / "output/sam2_best.pt")


def assert_plain_sam2_opens(path):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(SMALL_CFG.parent), version_base="1.2"):
        model = build_sam2(SMALL_CFG.name, str(path), device="cpu")
    initialize_config_module("sam2", version_base="1.2")  # as importing sam2 leaves it
    saved = load(path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def train(folder, weights, *arguments, **options):
    return run("train_sam2_proper.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               *arguments, cwd=folder, **options)


def train_images(folder):
    pairs = train_sam2_proper.find_pairs(folder / "data/images/train", folder / "data/masks/train")
    return train_sam2_proper.LabeledImages(pairs, 1024, 100)


def compare(folder, weights, *arguments):
    return run("compare_models.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               "--num-visualize", 0, *arguments, cwd=folder)


def test_masks_below_100_pixels_are_skipped_and_counted(data, weights):
    speck = np.zeros((60, 80), np.uint8)
    speck[:3, :33] = 255  # 99 pixels
    write_image(data / "data/masks/train/pair_000.png", speck)
    assert "학습 5장, 객체 5개 (전경 100픽셀 미만이라 뺀 객체 1개)" in train(data, weights, "--iterations", 1).stdout
    for path in (data / "data/masks/train").iterdir():
        write_image(path, speck)
    assert_fails_in_one_line(train(data, weights, "--iterations", 1, code=1), "prepare_data.py --check")


def test_missing_validation_images_are_announced(tmp_path, weights):
    make_data(tmp_path, val=0)
    assert "검증 데이터가 없어" in train(tmp_path, weights, "--iterations", 2).stdout
    assert (tmp_path / "output/sam2_best.pt").is_file()


def test_large_and_wide_images_train(tmp_path, weights):
    image, mask = (cv2.resize(picture, (2200, 500), interpolation=cv2.INTER_NEAREST) for picture in draw_pair(0))
    write_image(tmp_path / "data/images/train/wide.jpg", image)
    write_image(tmp_path / "data/masks/train/wide.png", mask)
    train(tmp_path, weights, "--iterations", 2)
    assert len(read_log(tmp_path)) == 2


def test_the_iou_of_a_large_validation_image_is_measured_at_full_size_and_its_loss_reduced(data, weights, monkeypatch):
    image, mask = (cv2.resize(picture, (1100, 2200), interpolation=cv2.INTER_NEAREST) for picture in draw_pair(0))
    write_image(data / "data/images/val/tall.png", image)
    write_image(data / "data/masks/val/tall.png", mask)
    train(data, weights, "--iterations", 1)
    compare(data, weights)
    summary = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["finetuned_iou"] == read_summary(data / "output")["best_iou"]
    training, sizes = make_training(data, weights, monkeypatch), []
    loss_of = train_sam2_proper.training_loss
    monkeypatch.setattr(train_sam2_proper, "training_loss",
                        lambda logits, *more: sizes.append(tuple(logits.shape[2:])) or loss_of(logits, *more))
    values, = train_sam2_proper.validate_image(training, 4)
    assert sizes == [(1024, 512)] and values["val_loss"] > 0 and 0 <= values["val_iou"] <= values["val_dice"]


def test_image_and_mask_of_different_sizes_are_named(data, weights):
    for path in (data / "data/images/train").iterdir():
        write_image(path, draw_pair(0, 60, 90)[0])
    assert_fails_in_one_line(train(data, weights, "--iterations", 1, code=1), "pair_00", "크기가 다릅니다")


def test_same_seed_gives_the_same_files(data, weights):
    for folder in ("one", "two"):
        train(data, weights, "--iterations", 6, "--lr", "1e-3", "--save-every", 3, "--output-dir", folder)
    for name in ("sam2_best.pt", "sam2_final.pt"):
        assert distance(load(data / "one" / name), load(data / "two" / name)) == 0
    assert (data / "one/training_curve.png").read_bytes() == (data / "two/training_curve.png").read_bytes()
    logs = [[{**row, "seconds": None} for row in read_log(data, folder)] for folder in ("one", "two")]
    assert logs[0] == logs[1]
    train(data, weights, "--iterations", 6, "--lr", "1e-3", "--seed", 1, "--output-dir", "three")
    assert distance(load(data / "one/sam2_final.pt"), load(data / "three/sam2_final.pt")) > 0


@pytest.mark.parametrize("more", [
    ("--scheduler", "cosine", "--warmup", 3, "--prompt", "mixed", "--accumulate", 2, "--max-grad-norm", 1),
    ("--prompt", "points")], ids=["cosine-mixed", "points"])
def test_resume_continues_bit_for_bit(data, weights, more):
    """Compares a training killed after its second validation and resumed with an uninterrupted one."""
    arguments = (*more, "--save-every", 4, "--lr", "1e-3", "--iterations", 13)
    train(data, weights, *arguments, "--output-dir", "whole")
    train(data, weights, *arguments, "--output-dir", "parts", code=-signal.SIGKILL,
          before=signal_at("[8/", signal.SIGKILL))
    last = torch.load(data / "parts/sam2_last.pt", weights_only=True)
    for group in last["optimizer"]["param_groups"]:
        group["fused"] = not group["fused"]  # as saved on a device with another optimizer implementation
    torch.save(last, data / "parts/sam2_last.pt")
    done = train(data, weights, "--output-dir", "parts", "--resume")
    assert "4회까지 진행한 학습을 이어서" in done.stdout  # the second validation was printed but not yet saved
    for name in ("sam2_final.pt", "sam2_best.pt"):
        assert distance(load(data / "whole" / name), load(data / "parts" / name)) == 0
    logs = [[{**row, "seconds": None} for row in read_log(data, folder)] for folder in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_patience_ends_a_training_that_no_longer_improves(data, weights):
    done = train(data, weights, "--iterations", 50, "--save-every", 2, "--patience", 3, "--lr", 0)
    assert "8회에 일찍 끝냅니다: 2회 이후로" in done.stdout
    assert read_log(data)[-1]["iteration"] == "8" and read_summary(data / "output")["best_iteration"] == 2
    final = (data / "output/sam2_final.pt").read_bytes()
    done = train(data, weights, "--resume")
    assert "8회에 일찍 끝냅니다: 2회 이후로" in done.stdout  # at once, without another iteration
    assert (data / "output/sam2_final.pt").read_bytes() == final
    last = torch.load(data / "output/sam2_last.pt", weights_only=True)
    for missing in ("data", "settings"):  # as an earlier version wrote it
        torch.save({name: value for name, value in last.items() if name != missing}, data / "output/sam2_last.pt")
        assert_fails_in_one_line(train(data, weights, "--resume", code=1), "sam2_last.pt")
    torch.save({**last, "settings": {**last["settings"], "clicks": 1}}, data / "output/sam2_last.pt")
    assert_fails_in_one_line(train(data, weights, "--resume", code=1), "sam2_last.pt", "다른 버전")


def test_accumulated_batches_train_as_one_batch_does(data, weights):
    arguments = ("--iterations", 6, "--lr", "1e-4")
    train(data, weights, *arguments, "--batch-size", 4, "--output-dir", "one")
    train(data, weights, *arguments, "--batch-size", 2, "--accumulate", 2, "--output-dir", "two")
    one, two, start = load(data / "one/sam2_final.pt"), load(data / "two/sam2_final.pt"), load(weights)
    assert distance(one, two) < 0.01 * distance(one, start)


def test_max_grad_norm_shortens_the_gradients(data, weights):
    """Gradients below AdamW's epsilon of 1e-8 hardly change the weights."""
    arguments = ("--iterations", 3, "--lr", "1e-3", "--weight-decay", 0)
    train(data, weights, *arguments, "--output-dir", "free")
    train(data, weights, *arguments, "--max-grad-norm", "1e-10", "--output-dir", "short")
    start = load(weights)
    moved = distance(load(data / "short/sam2_final.pt"), start)
    assert 0 < moved < 0.05 * distance(load(data / "free/sam2_final.pt"), start)


@pytest.mark.parametrize("prompt", ["points", "box"])
def test_each_prompt_trains_its_embeddings_and_is_validated_as_in_compare_models(data, weights, prompt):
    train(data, weights, "--prompt", prompt, "--val-prompt", prompt, "--iterations", 14, "--save-every", 7,
          "--batch-size", 4, "--lr", "1e-3")
    compare(data, weights, "--prompt", prompt)
    summary = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["finetuned_iou"] == read_summary(data / "output")["best_iou"] and summary["prompt"] == prompt
    before, after = load(weights), load(data / "output/sam2_final.pt")
    names = [f"sam_prompt_encoder.point_embeddings.{label}.weight" for label in range(4)]  # 2, 3: a box's corners
    changed = [(before[name] - after[name]).abs().max() > 1e-4 for name in names]
    assert changed[2] == changed[3] == (prompt != "points")
    assert changed[0] == (prompt == "points")  # a click outside the object, on false foreground


def test_the_flag_test_checks_the_setup_with_one_real_step(data, weights, tmp_path_factory):
    done = train(data, weights, "--test")
    assert "학습 6장" in done.stdout and re.search(r"이미지 10장을 모두 읽고 한 번 학습했습니다: loss \d", done.stdout)
    assert not done.stderr and not list((data / "output").glob("[!.]*"))
    empty = tmp_path_factory.mktemp("empty")
    assert_fails_in_one_line(train(empty, empty / "none.pt", "--test", code=1), "none.pt")
    assert_fails_in_one_line(train(empty, weights, "--test", code=1), "data/images/train", "prepare_data.py")
    done = train(data, weights, "--test", "--device", "tpu", code=1)
    assert_fails_in_one_line(done, "tpu")
    low = "import psutil, types\npsutil.virtual_memory = lambda: types.SimpleNamespace(available=10**9)"
    assert_fails_in_one_line(train(data, weights, "--test", code=1, before=low), "메모리가 1.0 GB")


def damage(path):
    """Cut a file, so that its header is that of an image, and its pixels cannot be decoded."""
    path.write_bytes(path.read_bytes()[:-1000])


def test_the_flag_test_decodes_every_image_and_names_the_damaged_ones(data, weights):
    damage(data / "data/images/train/pair_003.png")
    damage(data / "data/images/val/pair_102.png")
    done = without_libpng(train(data, weights, "--test", code=1))
    assert_fails_in_one_line(done, "이미지 2장", "pair_003", "pair_102")


def without_libpng(done):
    done.stderr = re.sub("^libpng error: .*\n", "", done.stderr, flags=re.MULTILINE)  # which OpenCV passes on
    return done


def test_a_file_that_is_no_image_is_named_before_anything_is_trained(data, weights):
    (data / "data/images/train/pair_004.png").write_bytes(b"no image")
    done = train(data, weights, code=1)
    assert_fails_in_one_line(done, "pair_004", "손상")
    assert not done.stdout and not list((data / "output").glob("[!.]*"))


def test_a_damaged_image_stops_training_after_saving_and_it_resumes_bit_for_bit(data, weights):
    """The training saves, and continues bit for bit when the file has been restored."""
    arguments = ("--iterations", 40, "--lr", "1e-3", "--save-every", 1000)
    train(data, weights, *arguments, "--output-dir", "whole")
    path = data / "data/images/train/pair_005.png"
    good = path.read_bytes()
    damage(path)
    done = without_libpng(train(data, weights, *arguments, code=1))
    saved = int(re.search(r"(\d+)회까지 저장했습니다", done.stdout)[1])
    assert_fails_in_one_line(done, "pair_005", "손상")
    assert torch.load(data / "output/sam2_last.pt", weights_only=True)["iteration"] == saved >= 1
    path.write_bytes(good)
    train(data, weights, "--resume")
    assert distance(load(data / "output/sam2_final.pt"), load(data / "whole/sam2_final.pt")) == 0


def test_several_processes_end_together_in_a_validation_after_saving(data, weights):
    """torchrun would kill them before a long validation has ended."""
    arguments = ("--iterations", 4, "--save-every", 2, "--lr", "1e-3", "--workers", 0)
    happens = "training.interrupted += [True] * training.rank"
    done = train(data, weights, *arguments, code=130,
                 **as_two_processes(during_the_validation_of_iteration_4(happens)))
    assert (data / "exit_code_of_rank_1").read_text() == "130"
    assert "4회까지 저장했습니다" in done.stdout and "torchrun --nproc-per-node=2" in done.stdout
    assert torch.load(data / "output/sam2_last.pt", weights_only=True)["iteration"] == 4
    assert read_log(data)[-1]["iteration"] == "2"


@pytest.mark.parametrize("reached, logged, after", [
    (1, ["0", "1"], ["0", "1"]),                 # logged without a validation: replaced
    (3, ["0", "1", "2"], ["0", "1", "2", "3"]),  # not logged: added
    (2, ["0", "1", "2"], ["0", "1", "2"]),       # validated: kept
])
def test_the_iteration_that_becomes_the_last_by_resuming_is_validated_once(data, weights, reached, logged, after):
    train(data, weights, "--iterations", 6, "--save-every", 2, "--lr", "1e-3", code=1,
          before=FAILS_IN_STEP.format(reached + 1))
    assert [row["iteration"] for row in read_log(data)] == logged
    done = train(data, weights, "--resume", "--iterations", reached)
    assert done.stdout.count(f"[{reached}/{reached}]") == (reached != 2)
    assert (data / "output/sam2_best.pt").is_file()
    assert [row["iteration"] for row in read_log(data)] == after and float(read_log(data)[-1]["val_iou"]) > 0
    last = torch.load(data / "output/sam2_last.pt", weights_only=True)
    assert (last["best_iteration"], last["validations_since_best"]) == (reached, 0)


def test_a_finished_training_that_is_extended_and_ends_where_it_was_is_not_validated_again(data, weights):
    train(data, weights, "--iterations", 3, "--save-every", 2, "--lr", "1e-3")
    before = read_log(data)
    train(data, weights, "--resume", "--iterations", 6, code=1, before=FAILS_IN_STEP.format(1))
    done = train(data, weights, "--resume", "--iterations", 3)
    assert "[3/3]" not in done.stdout and read_log(data) == before


def test_a_training_stopped_in_its_first_iteration_without_validation_images_can_end_there(data, weights):
    shutil.rmtree(data / "data/images/val")
    stop = "import torch\ntorch.optim.AdamW.step = lambda *_, step=torch.optim.AdamW.step, **__: (step(*_), " \
           "os.kill(os.getpid(), signal.SIGINT))"
    train(data, weights, "--iterations", 5, code=130, before=stop)
    assert "[1/1]" in train(data, weights, "--resume", "--iterations", 1).stdout
    assert [row["iteration"] for row in read_log(data)] == ["1"]


def during_the_validation_of_iteration_4(happens):
    """Code for run(before=...) that runs `happens` in the middle of a validation."""
    return f"""
import contextlib
def before_the_first_step(bar, close=contextlib.closing):
    import __main__ as script
    validate_image = script.validate_image
    def validate_and_more(training, index):
        if training.iteration == 4:
            {happens}
        return validate_image(training, index)
    script.validate_image, contextlib.closing = validate_and_more, close
    return close(bar)
contextlib.closing = before_the_first_step"""


@pytest.mark.parametrize("happens, code", [("training.interrupted.append(True)", 130),
                                           ("raise RuntimeError('CUDA out of memory')", 1)], ids=["Ctrl-C", "memory"])
def test_an_interrupted_validation_loses_nothing_and_resume_begins_with_it(data, weights, happens, code):
    """The log and the weights are those of a training that was not interrupted."""
    arguments = ("--iterations", 4, "--save-every", 2, "--lr", "1e-3")
    train(data, weights, *arguments, "--output-dir", "whole")
    done = train(data, weights, *arguments, before=during_the_validation_of_iteration_4(happens), code=code)
    assert "4회까지 저장했습니다" in done.stdout and [row["iteration"] for row in read_log(data)] == ["0", "1", "2"]
    if code == 1:
        assert_fails_in_one_line(done, "메모리가 부족합니다")
    train(data, weights, "--resume")
    logs = [[{**row, "seconds": None} for row in read_log(data, folder)] for folder in ("whole", "output")]
    assert logs[0] == logs[1]
    for name in ("sam2_final.pt", "sam2_best.pt"):
        assert distance(load(data / "whole" / name), load(data / "output" / name)) == 0


def test_a_best_model_that_cannot_be_written_is_not_claimed_by_sam2_last(data, weights):
    refused = """
import pathlib
def replace(self, target, original=pathlib.Path.replace):
    if target.name == "sam2_best.pt":
        raise OSError(28, "No space left on device", str(target))
    return original(self, target)
pathlib.Path.replace = replace"""
    done = train(data, weights, "--iterations", 2, before=refused, code=1)
    assert_fails_in_one_line(done, "sam2_best.pt", "No space left")
    assert not (data / "output/sam2_last.pt").exists()


def test_a_row_that_a_tracker_refuses_is_logged_again(data, weights, monkeypatch):
    training = make_training(data, weights, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        train_sam2_proper.log(training, [lambda row: 1 / 0], validating=True)
    assert not training.rows


def test_tensorboard_and_wandb_get_the_log(data, weights):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(data, weights, "--iterations", 12, "--save-every", 6, "--tensorboard", "--wandb", "polyps",
          env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    events = EventAccumulator(str(data / "output/tensorboard")).Reload()
    rows = read_log(data)
    assert [event.step for event in events.Scalars("loss")] == [1, 6, 10, 12]
    assert [int(row["iteration"]) for row in rows] == [0, 1, 6, 10, 12]
    assert [event.step for event in events.Scalars("lr")] == [0, 1, 6, 10, 12]
    assert [event.value for event in events.Scalars("val_iou")] == pytest.approx(
        [float(row["val_iou"]) for row in rows if row["val_iou"]])
    assert list((data / "output/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("flag", [("tensorboard",), ("wandb", "polyps")], ids=["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(data, weights, flag):
    name = flag[0]
    done = train(data, weights, f"--{name}", *flag[1:], code=1, before=f"sys.modules['{name}'] = None")
    assert_fails_in_one_line(done, f"pip install {name}")
    assert not done.stdout and not list((data / "output").glob("[!.]*"))


def test_wandb_without_a_login_ends_in_one_line_when_the_setup_is_checked(data, weights, tmp_path_factory):
    nobody = {"HOME": str(tmp_path_factory.mktemp("home")), "WANDB_API_KEY": None, "WANDB_MODE": None, "NETRC": None}
    done = train(data, weights, "--test", "--wandb", "polyps", env=nobody, code=1)
    assert_fails_in_one_line(done, "wandb login", "WANDB_MODE=offline")
    assert "학습 6장" not in done.stdout


def as_two_processes(before=""):
    """Options of run() for what torchrun does: a forked process is rank 1; its exit code is written to a file."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    fork = """
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
def wait_for_rank_1():
    with open("exit_code_of_rank_1", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
if child:
    atexit.register(wait_for_rank_1)
"""
    return {"before": fork + before, "env": {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}}


@pytest.mark.parametrize("encoder", ["frozen", "lora", "full"])
def test_two_processes_train_as_one_with_twice_the_batch(data, weights, encoder):
    """With gloo on the CPU; both processes must end with the same weights. torchrun starts one of the three tests; in
    the others a forked process takes its place, without importing torch three times."""
    (data / "keep_weights.py").write_text(
        f"import os, sys\nimport torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train_sam2_proper\n"
        "if __name__ == '__main__':\n"
        "    weights = train_sam2_proper.official_weights(train_sam2_proper.main().model)\n"
        "    torch.save({'model': weights}, f\"rank{os.environ['RANK']}.pt\")\n", encoding="utf-8")
    arguments = ["--model-cfg", str(SMALL_CFG), "--checkpoint", str(weights), "--device", "cpu", "--iterations", "12",
                 "--save-every", "6", "--lr", "1e-4", "--encoder", encoder, "--workers", "0"]
    if encoder == "frozen":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*torchrun, "keep_weights.py", *arguments, "--output-dir", "two"], cwd=data,
                              capture_output=True, encoding="utf-8", env=ENV, timeout=600)
        assert done.returncode == 0, done.stderr
    else:
        done = run(data / "keep_weights.py", *arguments, "--output-dir", "two", cwd=data, **as_two_processes())
        assert (data / "exit_code_of_rank_1").read_text() == "0"
    assert "프로세스 2개" in done.stdout and done.stdout.count("[12/12]") == 1  # only one process prints
    first, second, saved = load(data / "rank0.pt"), load(data / "rank1.pt"), load(data / "two/sam2_final.pt")
    assert distance(first, second) == distance(first, saved) == 0
    run("train_sam2_proper.py", *arguments, "--batch-size", 2, "--output-dir", "one", cwd=data)
    one = load(data / "one/sam2_final.pt")
    assert distance(one, saved) < 0.01 * distance(one, load(weights))
    assert float(read_log(data, "two")[-1]["val_iou"]) == pytest.approx(float(read_log(data, "one")[-1]["val_iou"]),
                                                                         abs=1e-3)


def test_ctrl_c_saves_and_prints_how_to_resume(data, weights):
    arguments = ("--lr", "1e-3", "--save-every", 20)
    done = train(data, weights, *arguments, "--iterations", 100_000, code=130, before=signal_at("[20/", signal.SIGINT))
    stopped = 21
    assert f"{stopped}회까지 저장했습니다" in done.stdout and "--resume" in done.stdout
    assert "Traceback" not in done.stderr
    train(data, weights, "--resume", "--iterations", stopped + 3)
    train(data, weights, *arguments, "--iterations", stopped + 3, "--output-dir", "whole")
    assert distance(load(data / "output/sam2_final.pt"), load(data / "whole/sam2_final.pt")) == 0


def test_an_interrupted_training_names_the_files_of_an_earlier_one(data, weights):
    train(data, weights, "--iterations", 2, "--lr", "1e-3")
    best = (data / "output/sam2_best.pt").read_bytes()
    done = train(data, weights, "--iterations", 5, "--save-every", 2, code=1, before=FAILS_IN_STEP.format(2))
    assert "파일입니다: sam2_final.pt, training_summary.json, sam2_best.pt\n" in done.stdout
    assert (data / "output/sam2_best.pt").read_bytes() == best
    done = train(data, weights, "--resume", code=1, before=FAILS_IN_STEP.format(3))  # iteration 2 has been validated
    assert "파일입니다: sam2_final.pt, training_summary.json\n" in done.stdout
    assert (data / "output/sam2_best.pt").read_bytes() != best


def test_resume_uses_the_settings_of_the_saved_training(data, weights):
    assert_fails_in_one_line(train(data, weights, "--resume", code=1), "이어서 할 학습이 없습니다")
    train(data, weights, "--recipe", "improved", "--batch-size", 2, "--iterations", 4, "--save-every", 3)
    done = train(data, weights, "--resume", "--lr", "3e-4", "--recipe", "improved", code=1)
    assert_fails_in_one_line(done, "--lr", "--recipe")
    done = train(data, weights, "--resume", "--iterations", 6)
    assert "cosine" in done.stdout and "이전 학습" not in done.stdout
    settings = read_summary(data / "output")["settings"]
    assert settings["batch_size"] == 2 and settings["prompt"] == "mixed" and settings["iterations"] == 6
    assert "output의 이전 학습을 덮어씁니다" in train(data, weights, "--iterations", 1).stdout


def test_resume_refuses_other_data_and_names_the_pairs(data, weights):
    def move(name, other):
        for kind in ("images", "masks"):
            (data / "data" / kind / name).rename(data / "data" / kind / other)

    train(data, weights, "--iterations", 2)
    write_image(data / "data/masks/train/pair_001.png", draw_pair(50)[1])
    write_image(data / "data/masks/val/pair_100.png", draw_pair(50)[1])
    move("train/pair_002.png", "train/new.png")
    done = train(data, weights, "--iterations", 4, "--resume", code=1)
    assert_fails_in_one_line(done, "학습하던 데이터와 달라", "없어짐 train/pair_002.png", "새로 생김 train/new.png",
                             "바뀜 train/pair_001.png, val/pair_100.png")
    write_image(data / "data/masks/train/pair_001.png", draw_pair(1)[1])
    write_image(data / "data/masks/val/pair_100.png", draw_pair(100)[1])
    move("train/new.png", "train/pair_002.png")
    train(data, weights, "--iterations", 4, "--resume")


def test_resume_finds_the_same_data_under_another_path(data, weights):
    arguments = ("--save-every", 2, "--lr", "1e-3")
    train(data, weights, *arguments, "--iterations", 6, "--output-dir", "whole")
    train(data, weights, *arguments, "--iterations", 4)
    (data / "data").rename(data / "moved")
    (data / "output").rename(data / "kept")
    folders = [f"--{prefix}{kind}-dir=moved/{kind}s/{split}" for prefix, split in (("", "train"), ("val-", "val"))
               for kind in ("image", "mask")]
    train(data, data / "gone.pt", "--resume", "--iterations", 6, "--output-dir", "kept", *folders)
    assert distance(load(data / "whole/sam2_final.pt"), load(data / "kept/sam2_final.pt")) == 0


def test_training_without_an_improvement_ends_with_a_warning(data):
    done = train(data, ROOT / "demo/sam2_demo.pt", "--iterations", 10, "--save-every", 5, "--lr", "0.1")
    start = read_summary(data / "output")["start_iou"]
    assert read_summary(data / "output")["best_iou"] < start > 0.4
    assert f"주의: 검증 IoU가 학습 전({start:.2%})보다 나아지지 않았습니다" in done.stdout.splitlines()[-1]


def test_validation_encodes_each_image_once(data, weights):
    train(data, weights, "--iterations", 4, "--save-every", 1, "--lr", 0)
    encoded = read_summary(data / "output")["encodings_per_process"]
    rows = read_log(data)
    assert len(rows) == 5 and len({row["val_iou"] for row in rows}) == 1
    assert encoded <= 4 + 4  # four to validate on, and at most four to train on


def test_a_second_training_in_one_process_is_not_refused(data, weights):
    """As in a notebook; another library may have cleared Hydra's global state by then."""
    (data / "notebook.py").write_text(
        f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_sam2_proper\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        "for _ in range(2):\n    train_sam2_proper.main()\n    GlobalHydra.instance().clear()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n", encoding="utf-8")
    done = run(data / "notebook.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               "--iterations", 2, cwd=data)
    assert done.stdout.count("[2/2]") == 2


def test_a_log_that_another_program_has_open_does_not_end_the_training(data, weights):
    """On Windows a file that Excel has open cannot be replaced."""
    opened = """
import pathlib

def replace(self, target, original=pathlib.Path.replace, refused=[]):
    if target.name == "train_log.csv" and len(refused) < 21:  # the first time it is written, and all further tries
        refused.append(target)
        raise PermissionError(13, "Permission denied", str(self), None, str(target))
    return original(self, target)

pathlib.Path.replace = replace"""
    done = train(data, weights, "--iterations", 4, "--save-every", 2, before=opened)
    assert done.stderr.count("주의: output/train_log.csv: 쓰지 못했습니다") == 1
    assert [row["iteration"] for row in read_log(data)] == ["0", "1", "2", "4"]


def test_a_program_that_holds_a_model_for_a_moment_does_not_end_the_training(data, weights):
    """As an antivirus program or a synchronized folder does on Windows."""
    held = """
import pathlib

def replace(self, target, original=pathlib.Path.replace, refused=[]):
    if target.name == "sam2_best.pt" and len(refused) < 3:
        refused.append(target)
        raise PermissionError(13, "Permission denied", str(self), None, str(target))
    return original(self, target)

pathlib.Path.replace = replace"""
    assert not train(data, weights, "--iterations", 2, before=held).stderr
    assert (data / "output/sam2_best.pt").is_file()


def test_a_non_finite_loss_stops_the_run_and_saved_models_stay_finite(data, weights):
    train(data, weights, "--iterations", 2)
    before = {path.name: path.read_bytes() for path in (data / "output").iterdir()}
    done = train(data, weights, "--iterations", 30, "--lr", "1e30", code=1)
    assert_fails_in_one_line(done, "유한하지 않", "--lr", "이미지 pair_00")
    for path in (data / "output").glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in load(path).values())
    assert (data / "output/sam2_best.pt").read_bytes() == before["sam2_best.pt"]


def read_summary(folder):
    return json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))


def distance(one, two):
    return sum((one[name] - two[name]).square().sum() for name in one).sqrt().item()


def test_training_with_cached_features_gives_the_same_weights(data, weights):
    arguments = ("--iterations", 15, "--save-every", 15, "--lr", "1e-4")
    fresh = train(data, weights, *arguments, "--output-dir", "fresh", "--cache-gb", 0)
    kept = train(data, weights, *arguments, "--output-dir", "kept")
    assert "학습 6장 중 0장, 검증 4장 중 0장" in fresh.stdout
    assert "학습 6장 중 6장, 검증 4장 중 4장" in kept.stdout
    assert distance(load(data / "fresh/sam2_final.pt"), load(data / "kept/sam2_final.pt")) == 0
    assert read_summary(data / "fresh")["encodings_per_process"] == 15 + 2 * 4
    assert read_summary(data / "kept")["encodings_per_process"] <= 6 + 4  # each image once


def test_features_are_cached_in_half_precision_for_training_and_in_full_for_validation(data, weights, monkeypatch):
    training = make_training(data, weights, monkeypatch)
    half, full = training.cache(training.images[:1]), training.val_cache(training.images[:1])
    training.predictor.set_image(training.images[0].read())
    exact = training.predictor._features
    assert torch.equal(full["image_embed"], exact["image_embed"])
    for one, two in zip([half["image_embed"], *half["high_res_feats"]],
                        [exact["image_embed"], *exact["high_res_feats"]]):
        assert one.dtype == torch.float32 and torch.equal(one, two.half().float())


def test_images_that_do_not_fit_the_cache_are_encoded_at_each_visit(data, weights):
    size = 2 * CHANNELS * (16**2 + 64**2 // 8 + 32**2 // 4)  # bytes an image at 256 px
    limit = (4 * 2 + 2.5) * size / 1e9  # validation's features have full precision: twice the size
    done = train(data, weights, "--iterations", 12, "--cache-gb", limit, "--output-dir", "some")
    assert "학습 6장 중 2장, 검증 4장 중 4장" in done.stdout  # validation images go first: all are seen every time
    assert read_summary(data / "some")["encodings_per_process"] > 10
    train(data, weights, "--iterations", 12, "--output-dir", "all")
    assert distance(load(data / "some/sam2_final.pt"), load(data / "all/sam2_final.pt")) == 0


def test_cache_gb_is_one_limit_for_the_memory_of_the_device_and_of_the_machine(data, weights, monkeypatch):
    monkeypatch.setattr(train_sam2_proper, "free_memory", lambda *_: (4_000_000, 4_000_000))
    assert make_training(data, weights, monkeypatch).val_cache.limits == (2_000_000, 2_000_000)
    training = make_training(data, weights, monkeypatch, "--cache-gb", "0.003")
    assert training.val_cache.limits == (2_000_000, 1_000_000)


def test_features_on_disk_are_reused_and_damaged_ones_are_encoded_again(data, weights):
    arguments = ("--iterations", 6, "--lr", "1e-4", "--cache-dir", "features")
    train(data, weights, *arguments, "--output-dir", "first")
    entries = sorted((data / "features").iterdir())
    first = read_summary(data / "first")["encodings_per_process"]
    assert len(entries) == first > 4
    train(data, weights, *arguments, "--output-dir", "second")
    assert read_summary(data / "second")["encodings_per_process"] == 0
    assert distance(load(data / "first/sam2_final.pt"), load(data / "second/sam2_final.pt")) == 0

    good = entries[0].read_bytes()
    middle = len(good) // 2
    entries[0].write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:])  # one bit
    entries[1].write_bytes(entries[1].read_bytes()[:100])      # cut short
    train(data, weights, *arguments, "--output-dir", "third")
    assert read_summary(data / "third")["encodings_per_process"] == 2 and entries[0].read_bytes() == good
    assert distance(load(data / "first/sam2_final.pt"), load(data / "third/sam2_final.pt")) == 0


def test_features_on_disk_are_not_used_for_another_image_or_model(data, weights, tmp_path_factory):
    arguments = ("--iterations", 6, "--cache-dir", "features")
    train(data, weights, *arguments, "--output-dir", "first")
    changed = data / "data/images/val/pair_100.png"
    write_image(changed, 255 - cv2.imread(str(changed)))
    train(data, weights, *arguments, "--output-dir", "second")
    assert read_summary(data / "second")["encodings_per_process"] == 1
    other = save_small_model(tmp_path_factory.mktemp("other") / "other.pt", seed=1)
    train(data, other, *arguments, "--output-dir", "third")
    first, third = (read_summary(data / name)["encodings_per_process"] for name in ("first", "third"))
    assert first == third


def test_batches_of_images_of_several_sizes_train(data, weights):
    image, mask = draw_pair(7, 100, 64)
    write_image(data / "data/images/train/tall.png", image)
    write_image(data / "data/masks/train/tall.png", mask)
    train(data, weights, "--iterations", 6, "--batch-size", 4, "--lr", "1e-3")
    before, after = load(weights), load(data / "output/sam2_final.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(TRAINED.match(name) for name in changed)


def test_a_batch_gives_the_masks_that_its_images_give_one_by_one(data, weights):
    predictor = train_sam2_proper.load_predictor(SMALL_CFG, weights, "cpu")
    cache = train_sam2_proper.FeatureCache(predictor, DEFAULTS, (0, 10**9))
    images, sizes = train_images(data)[:3], [(60, 80)] * 3
    prompts = [(np.array([point], np.float32), np.ones(1)) for point in ([10, 20], [40, 30], [70, 5])]
    with torch.no_grad():
        for own in (images, images[:1]):  # an image for each click; one for all
            together, scores = train_sam2_proper.predict_masks(predictor, cache(own), sizes, prompts)
            assert together.shape == (3, 3, 64, 64) and scores.shape == (3, 3)
            for row in range(3):
                alone, score = train_sam2_proper.predict_masks(
                    predictor, cache(own[row:row + 1] or own), sizes[:1], prompts[row:row + 1])
                torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(scores[row:row + 1], score, rtol=1e-3, atol=1e-4)


def test_image_size_is_the_side_that_the_model_sees(data, weights):
    arguments = ("--model-cfg", SMALL_CFG, "--device", "cpu", "--image-size", 512)
    done = run("train_sam2_proper.py", *arguments, "--checkpoint", weights, "--iterations", 2, cwd=data)
    assert f"한 장 {2 * CHANNELS * (32**2 + 128**2 // 8 + 64**2 // 4) / 1e6:.2g} MB" in done.stdout
    run("compare_models.py", *arguments, "--checkpoint", weights, "--num-visualize", 0, cwd=data)
    summary = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["image_size"] == 512
    assert summary["finetuned_iou"] == read_summary(data / "output")["best_iou"]
    command = ("--model-cfg", SMALL_CFG, "--device", "cpu", "--image", "data/images/val/pair_100.png", "-p", "40,30")
    done = run("test_my_image.py", *command, cwd=data)
    assert "--image-size 512로 학습했는데 256로 실행합니다" in done.stdout
    assert "주의" not in run("test_my_image.py", *command, "--image-size", 512, cwd=data).stdout


def test_a_missing_checkpoint_names_the_download_command(data):
    done = run("train_sam2_proper.py", "--device", "cpu", cwd=data, code=1)
    assert_fails_in_one_line(done, "python download_dataset.py --checkpoint small", "make demo")


def test_a_checkpoint_that_does_not_fit_the_config_names_the_keys(data, weights):
    wrong = load(weights)
    wrong["extra.weight"] = torch.zeros(3)
    del wrong["no_mem_embed"]
    torch.save({"model": wrong}, data / "wrong.pt")
    done = train(data, data / "wrong.pt", code=1)
    assert_fails_in_one_line(done, "wrong.pt", "sam2_demo.yaml", "extra.weight", "no_mem_embed")


def test_a_damaged_checkpoint_is_named(data, weights):
    (data / "cut.pt").write_bytes(weights.read_bytes()[:5000])
    assert_fails_in_one_line(train(data, data / "cut.pt", code=1), "cut.pt")


def test_checkpoints_of_other_programs_name_the_key_and_say_how_to_save_the_weights(data, weights):
    state = load(weights)
    torch.save({"epoch": 3, "state_dict": {f"sam2.{name}": tensor for name, tensor in state.items()}}, data / "a.ckpt")
    done = train(data, data / "a.ckpt", code=1)
    assert_fails_in_one_line(done, "a.ckpt", "'state_dict'", 'torch.save({"model": model.state_dict()}')
    torch.save({"model": state, "best_iou": np.float64(0.5)}, data / "b.pt")
    done = train(data, data / "b.pt", code=1)
    assert_fails_in_one_line(done, "b.pt", "multiarray.scalar", 'torch.save({"model": model.state_dict()}')
    assert "weights_only" not in done.stderr  # PyTorch's own advice would run the file's code


def test_a_checkpoint_that_is_not_finite_is_refused(data, weights):
    state = load(weights)
    state["no_mem_embed"][0] = float("nan")
    torch.save({"model": state}, data / "nan.pt")
    assert_fails_in_one_line(train(data, data / "nan.pt", code=1), "nan.pt", "no_mem_embed", "유한하지")


def test_a_missing_device_is_named_once(data, weights):
    done = run("train_sam2_proper.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--test", "--device",
               "cuda:7", cwd=data, code=1)
    assert_fails_in_one_line(done, "cuda:7")
    assert not done.stdout


def test_a_config_that_sam2_does_not_have_is_named(data, weights):
    done = run("train_sam2_proper.py", "--model-cfg", "sam2.1_hiera_s", "--checkpoint", weights, cwd=data, code=1)
    assert_fails_in_one_line(done, "sam2.1_hiera_s", "configs/sam2.1/sam2.1_hiera_s.yaml")


def test_missing_data_names_the_scripts_that_create_it(tmp_path, weights):
    assert_fails_in_one_line(train(tmp_path, weights, code=1), "download_dataset.py", "prepare_data.py")


def settings_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_sam2_proper.py", *arguments])
    return vars(train_sam2_proper.parse_args())


def test_recipe_improved_is_a_set_of_flags_that_other_flags_override(monkeypatch):
    reference, improved = settings_of(monkeypatch), settings_of(monkeypatch, "--recipe", "improved")
    assert {name: reference[name] for name in train_sam2_proper.CONFIG} == {
        **train_sam2_proper.CONFIG, "output_dir": reference["output_dir"]}
    changed = {name: value for name, value in improved.items() if value != reference[name]}
    assert changed == {"recipe": "improved", **train_sam2_proper.RECIPES["improved"]}
    passes = [each["iterations"] * each["batch_size"] for each in (reference, improved)]
    assert passes[0] == passes[1]  # the same budget
    mine = settings_of(monkeypatch, "--lr", "2e-4", "--recipe", "improved", "--iterations=10")
    assert mine["lr"] == 2e-4 and mine["iterations"] == 10 and mine["supervise"] == "all"


def test_recipe_strongest_is_improved_with_encoder_full_and_prompt_any(monkeypatch):
    improved, strongest = (settings_of(monkeypatch, "--recipe", name) for name in ("improved", "strongest"))
    assert {name: value for name, value in strongest.items() if value != improved[name]} == {
        "recipe": "strongest", "encoder": "full", "prompt": "any", "encoder_lr": 3e-4}
    low_rank = settings_of(monkeypatch, "--recipe", "strongest", "--encoder", "lora", "--lr", "1e-5")
    assert low_rank["encoder"] == "lora" and low_rank["encoder_lr"] == pytest.approx(3e-5)


def test_recipe_improved_trains_all_mask_heads_and_validates_with_the_middle_click(data, weights):
    train(data, weights, "--recipe", "improved", "--iterations", 12, "--save-every", 6, "--warmup", 2)
    summary = read_summary(data / "output")
    assert summary["settings"]["val_prompt"] == "point" and summary["settings"]["supervise"] == "all"
    compare(data, weights)
    compared = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["finetuned_iou"] == summary["best_iou"]
    idle = re.compile(r"output_hypernetworks_mlps\.0")  # of the single mask, which multimask_output never shows
    before, after = load(weights), load(data / "output/sam2_final.pt")
    heads = [name for name in before if "output_hypernetworks_mlps" in name and not idle.search(name)]
    assert len(heads) == 18 and all(not torch.equal(before[name], after[name]) for name in heads)


def make_numbered_data(folder):
    """Pairs with two objects each: the ellipse of draw_pair, number 300, and a rectangle in the corner, number 7."""
    make_data(folder)
    for path in (folder / "data/masks").glob("*/*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        labels = np.where(mask > 127, 300, 0).astype(np.uint16)
        labels[:12, :12] = 7
        labels[50, 70:75] = 9  # five pixels: too small to train on
        write_image(path, labels)
    return folder


def test_objects_of_numbered_masks_are_trained_and_compared_one_by_one(tmp_path, weights):
    make_numbered_data(tmp_path)
    done = train(tmp_path, weights, "--iterations", 6, "--save-every", 3, "--lr", "1e-3")
    assert "학습 6장, 객체 12개 (전경 100픽셀 미만이라 뺀 객체 6개), 검증 4장, 객체 12개" in done.stdout
    summary = read_summary(tmp_path / "output")
    assert summary["train_objects"] == summary["val_objects"] == 12
    compare(tmp_path, weights)
    with (tmp_path / "output/comparison/per_image.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["object"]) for row in rows] == [
        (f"pair_{number}.png", name) for number in range(100, 104) for name in ("7", "9", "300")]
    compared = json.loads((tmp_path / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["num_images"] == 4 and compared["num_objects"] == 12
    assert compared["finetuned_iou"] == summary["best_iou"]


@pytest.mark.parametrize("prompt", ["point", "points", "box", "mixed"])
def test_max_objects_validates_the_same_objects_as_compare_models(tmp_path, weights, prompt):
    make_numbered_data(tmp_path)
    done = train(tmp_path, weights, "--iterations", 2, "--max-objects", 2, "--val-prompt", prompt, "--lr", "1e-3",
                 "--dice-weight", 1, "--supervise", "all")
    assert "검증 4장, 객체 8개 (이미지마다 2개까지만 검증하므로 제외한 객체 4개)" in done.stdout
    done = compare(tmp_path, weights, "--max-objects", 2, "--prompt", prompt)
    assert "이미지마다 2개까지만 비교하므로 제외한 객체: 4개" in done.stdout
    compared = json.loads((tmp_path / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["num_objects"] == 8
    assert compared["finetuned_iou"] == read_summary(tmp_path / "output")["best_iou"]
    assert compared["original_iou"] == read_summary(tmp_path / "output")["start_iou"]
    assert compared["finetuned_dice"] == float(read_log(tmp_path)[-1]["val_dice"])


def test_each_training_example_is_one_object_and_every_object_is_drawn(tmp_path, monkeypatch):
    make_numbered_data(tmp_path)
    images = train_images(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--batch-size", "4"])
    batches = train_sam2_proper.Batches(images, train_sam2_proper.parse_args())
    seen = set()
    for number in range(20):
        batch = batches[number]
        assert len(batch.gt_masks) == len(batch.rngs) == 4 and batch.kind == "point"
        for image, rng, gt_mask in zip(batch.images, batch.rngs, batch.gt_masks):
            labels = train_sam2_proper.read_mask(tmp_path / "data/masks/train" / image.path.name)
            value, = set(labels[gt_mask[0]].tolist())
            assert (labels == value).sum() == gt_mask.sum() and gt_mask.shape == (1, 60, 80)
            (x, y), = train_sam2_proper.first_prompt("point", gt_mask[0], rng)[0].astype(int)
            assert gt_mask[0, y, x]
            seen.add((image, value))
    assert seen == {(image, value) for image in images for value in (7, 300)}


def test_a_batch_depends_only_on_its_number_and_is_divided_among_processes(data, weights, monkeypatch):
    training = make_training(data, weights, monkeypatch, "--batch-size", "2", "--accumulate", "2", "--prompt", "mixed")

    def drawn(batches, number):
        batch = batches[number]
        return batch.kind, batch.corrections, [(image.path, rng.random(), mask.sum()) for image, rng, mask in
                                               zip(batch.images, batch.rngs, batch.gt_masks)]
    alone = train_sam2_proper.Batches(training.images, training.args)
    assert drawn(alone, 7) == drawn(alone, 7) != drawn(alone, 5)
    training.args.batch_size = 1
    for number in range(6):
        shares = [drawn(train_sam2_proper.Batches(training.images, training.args, None, rank, 2), number)
                  for rank in (0, 1)]
        training.args.batch_size = 2
        whole = drawn(alone, number)
        training.args.batch_size = 1
        assert {share[:2] for share in shares} == {whole[:2]}
        assert sorted(sum((share[2] for share in shares), [])) == sorted(whole[2])


def test_masks_kept_in_memory_equal_those_of_the_files(tmp_path):
    make_numbered_data(tmp_path)
    pairs = train_sam2_proper.find_pairs(tmp_path / "data/images/val", tmp_path / "data/masks/val")
    images = train_sam2_proper.LabeledImages(pairs, 1024, 1)
    assert images.count == 12 and images.unsampled == images.left_out == 0
    for image, (path, mask_path) in zip(images, pairs):
        labels = cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED)
        assert image.path == path and image.objects.tolist() == [7, 9, 300]
        assert np.array_equal(image.labels(), labels)
        assert np.array_equal(image.mask(300), labels == 300) and np.array_equal(image.mask(), labels > 0)
    sampled = train_sam2_proper.LabeledImages(pairs, 1024, 1, 2)
    assert sampled.count == 8 and sampled.unsampled == 4
    assert all(set(image.objects.tolist()) < {7, 9, 300} for image in sampled)


def test_an_object_in_two_pieces_is_one_object_and_numbered_masks_resume_bit_for_bit(tmp_path, weights):
    make_numbered_data(tmp_path)
    for path in (tmp_path / "data/masks/train").iterdir():
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        labels[40:, :12] = 7  # the other corner
        write_image(path, labels)
    arguments = ("--save-every", 4, "--lr", "1e-3", "--iterations", 9, "--batch-size", 2, "--prompt", "mixed")
    done = train(tmp_path, weights, *arguments, "--output-dir", "whole")
    assert "학습 6장, 객체 12개" in done.stdout
    train(tmp_path, weights, *arguments, "--output-dir", "parts", code=-signal.SIGKILL,
          before=signal_at("[8/", signal.SIGKILL))
    train(tmp_path, weights, "--output-dir", "parts", "--resume")
    assert distance(load(tmp_path / "whole/sam2_final.pt"), load(tmp_path / "parts/sam2_final.pt")) == 0


def test_lora_weights_are_saved_as_an_official_checkpoint_and_resumed_bit_for_bit(data, weights):
    arguments = ("--encoder", "lora", "--lora-rank", 2, "--encoder-lr", "1e-2", "--save-every", 2, "--iterations", 5,
                 "--augment", "--prompt", "mixed", "--workers", 1)
    train(data, weights, *arguments, "--output-dir", "whole")
    train(data, weights, *arguments, "--output-dir", "parts", code=-signal.SIGKILL,
          before=signal_at("[4/", signal.SIGKILL))
    train(data, weights, "--output-dir", "parts", "--resume")
    before, after = load(weights), load(data / "whole/sam2_final.pt")
    assert before.keys() == after.keys() == load(data / "parts/sam2_last.pt").keys()
    assert distance(after, load(data / "parts/sam2_final.pt")) == 0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    in_encoder = {name for name in changed if name.startswith("image_encoder.")}
    assert {re.sub(r".*blocks\.\d+\.", "", name) for name in in_encoder} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.layers.0.weight", "mlp.layers.1.weight"}
    assert all(name.startswith("sam_") for name in changed - in_encoder)
    assert_plain_sam2_opens(data / "whole/sam2_final.pt")
    name = "image_encoder.trunk.blocks.0.attn.qkv.weight"
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 2
    # merged weights give the masks that the training validated
    compare(data, weights, "--finetuned", "whole/sam2_best.pt")
    compared = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["finetuned_iou"] == pytest.approx(read_summary(data / "whole")["best_iou"], abs=1e-6)


def test_gradient_checkpointing_and_worker_processes_change_no_weight(data, weights):
    arguments = ("--encoder", "full", "--iterations", 4, "--batch-size", 2, "--lr", "1e-3")
    train(data, weights, *arguments, "--augment", "--workers", 0, "--output-dir", "plain")
    train(data, weights, *arguments, "--augment", "--workers", 2, "--grad-checkpointing", "--output-dir", "again")
    train(data, weights, *arguments, "--workers", 0, "--output-dir", "as they are")
    plain = load(data / "plain/sam2_final.pt")
    assert distance(plain, load(data / "again/sam2_final.pt")) == 0
    assert distance(plain, load(data / "as they are/sam2_final.pt")) > 0


def make_training(data, weights, monkeypatch, *flags):
    """The Training that these flags would start, in this process."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(sys, "argv", ["train", "--model-cfg", str(SMALL_CFG), "--checkpoint", str(weights), *flags])
    return train_sam2_proper.Training(train_sam2_proper.parse_args(), "cpu")


def test_the_image_encoder_has_its_own_learning_rate(data, weights, monkeypatch):
    def rates(*flags):
        training = make_training(data, weights, monkeypatch, *flags)
        return [group["lr"] for group in training.optimizer.param_groups]
    assert rates() == [1e-5]
    assert rates("--encoder", "lora", "--lr", "1e-4") == pytest.approx([1e-4, 3e-4])
    assert rates("--encoder", "full") == [1e-5, 1e-5]
    assert rates("--encoder", "full", "--encoder-lr", "0.5") == [1e-5, 0.5]
    done = train(data, weights, "--encoder-lr", "1e-4", code=2)
    assert "--encoder lora" in done.stderr


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(data, weights, monkeypatch):
    def kept(*flags):
        training, total = make_training(data, weights, monkeypatch, "--encoder", "full", "--workers", "0", *flags), [0]

        def count(tensor):
            total[0] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            training.step(1)
        return total[0]
    assert kept("--grad-checkpointing") < 0.5 * kept()


def test_the_log_has_the_learning_rate_of_the_encoder_when_it_learns(data, weights):
    flags = ("--iterations", 2, "--workers", 0, "--scheduler", "cosine")
    train(data, weights, *flags, "--encoder", "lora", "--output-dir", "lora")
    row = read_log(data, "lora")[-1]
    assert float(row["lr"]) == pytest.approx(5e-6) and float(row["encoder_lr"]) == pytest.approx(1.5e-5)
    train(data, weights, *flags)
    assert "encoder_lr" not in read_log(data)[-1]


def children():
    return set(psutil.Process().children())


def test_a_closed_training_leaves_no_worker_process_and_no_model_in_memory(data, weights, monkeypatch):
    training, before = make_training(data, weights, monkeypatch, "--encoder", "full", "--workers", "2"), children()
    training.step(1)
    workers = children() - before
    assert len(workers) == 2
    training.close()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    model = weakref.ref(training.model)
    del training
    gc.collect()
    assert model() is None


def test_ctrl_c_reaches_the_workers_as_well_and_still_saves(data, weights):
    """As a terminal sends it: to all processes of the group."""
    group = "os.setpgrp()" + signal_at("[4/", signal.SIGINT).replace("os.kill(os.getpid(), ", "os.killpg(0, ")
    done = train(data, weights, "--encoder", "full", "--workers", 2, "--save-every", 2, "--iterations", 100, code=130,
                 before=group)
    assert done.stdout.count("이번 반복을 마치고 저장합니다") == 1 and "5회까지 저장했습니다" in done.stdout
    assert not done.stderr.strip()


def test_many_objects_are_decoded_in_parts_and_hidden_files_are_not_images(tmp_path):
    parts = train_sam2_proper.in_parts(np.arange(5), (8192, 4096))  # 2**25 pixels: one object has 384 MB of logits
    assert [len(part) for part in parts] == [1] * 5
    assert [len(part) for part in train_sam2_proper.in_parts(np.arange(50), (1024, 1024))] == [42, 8]
    make_data(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind / "train/._pair_000.png").write_bytes(b"written by macOS")
    pairs = train_sam2_proper.find_pairs(tmp_path / "data/images/train", tmp_path / "data/masks/train")
    assert [image.name for image, _ in pairs] == [f"pair_00{number}.png" for number in range(6)]


def test_a_damaged_image_read_ahead_is_named_in_one_line(data, weights):
    for path in (data / "data/images/train").iterdir():
        damage(path)
    done = train(data, weights, "--encoder", "full", "--iterations", 2, "--workers", 1, code=1)
    assert_fails_in_one_line(without_libpng(done), "pair_00", "손상")
    assert not (data / "output/sam2_last.pt").exists()  # nothing was learned, so nothing is written


def test_augmented_masks_stay_on_their_objects():
    image, mask = draw_pair(3)
    seen = set()
    for seed in range(20):
        picture, masks = train_sam2_proper.augment_example(
            np.random.default_rng(seed), torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask[None] > 0))
        masks = masks.numpy()
        inside, outside = (picture.float().mean(0).numpy()[where].mean() for where in (masks[0], ~masks[0]))
        assert picture.dtype == torch.uint8 and picture.shape[1:] == masks.shape[1:]
        assert picture.shape[1:] in ((60, 80), (80, 60))  # turned or not
        assert inside > outside + 40  # the ellipse is bright, the ground dark
        seen.add(masks.tobytes())
    assert len(seen) > 10


def test_augmented_masks_are_not_shifted_against_the_image():
    mask = np.zeros((120, 160), np.uint8)
    cv2.ellipse(mask, (90, 50), (31, 17), 20, 0, 360, 1, -1)
    image = torch.from_numpy(np.repeat(40 + 160 * mask[None], 3, 0))
    for seed in range(20):
        picture, masks = train_sam2_proper.augment_example(
            np.random.default_rng(seed), image, torch.from_numpy(mask[None] > 0))
        grey = picture.float().mean(0).numpy()
        assert train_sam2_proper.calculate_iou(masks[0].numpy(), grey > (grey.min() + grey.max()) / 2) > 0.995


def test_images_without_an_object_are_augmented_too():
    image, mask = torch.from_numpy(draw_pair(3)[0]).permute(2, 0, 1), torch.zeros(1, 60, 80, dtype=torch.bool)
    pictures, masks = zip(*(train_sam2_proper.augment_example(np.random.default_rng(seed), image, mask)
                            for seed in range(5)))
    assert len({picture.numpy().tobytes() for picture in pictures} - {image.numpy().tobytes()}) == 5
    assert not any(each.any() for each in masks)


def test_encode_images_gives_the_features_of_set_image(data, weights):
    predictor = train_sam2_proper.load_predictor(SMALL_CFG, weights, "cpu")
    images = [train_sam2_proper.read_image(data / f"data/images/train/pair_00{number}.png") for number in (0, 1)]
    side = predictor.model.image_size
    batch = torch.stack([train_sam2_proper.v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), [side, side])
                         for image in images])
    with torch.no_grad():
        batch = train_sam2_proper.v2.functional.normalize(
            batch / 255, predictor._transforms.mean, predictor._transforms.std)
        together = train_sam2_proper.encode_images(predictor, batch)
    for number, image in enumerate(images):
        predictor.set_image(image)
        for ours, theirs in zip([together["image_embed"], *together["high_res_feats"]],
                                [predictor._features["image_embed"], *predictor._features["high_res_feats"]]):
            assert (ours[number] - theirs[0]).abs().mean() < 0.02 * theirs.abs().mean()  # resized as 8-bit


def test_torchrun_refuses_a_device_that_processes_cannot_share(data, weights):
    cuda = ("import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda.device_count = lambda: 2\n"
            "sys.argv[sys.argv.index('cpu')] = 'cuda:1'")
    done = train(data, weights, env={"RANK": "0", "WORLD_SIZE": "2"}, code=1, before=cuda)
    assert_fails_in_one_line(done, "torchrun", "cuda:1")
    mps = "import torch\ntorch.backends.mps.is_available = lambda: True\nsys.argv[sys.argv.index('cpu')] = 'auto'"
    assert_fails_in_one_line(train(data, weights, env={"RANK": "0", "WORLD_SIZE": "2"}, code=1, before=mps), "mps")


def test_free_memory_respects_the_limit_of_a_container(monkeypatch):
    real = train_sam2_proper.Path.read_text
    values = {"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1500",
              "/sys/fs/cgroup/memory.stat": "anon 1000\ninactive_file 500"}
    monkeypatch.setattr(train_sam2_proper.Path, "read_text",
                        lambda path, *more, **how: values.get(str(path)) or real(path, *more, **how))
    assert train_sam2_proper.free_memory() == (0, 2000)
    values["/sys/fs/cgroup/memory.max"] = "max"
    assert train_sam2_proper.free_memory()[1] > 10**6


def test_encoder_full_trains_the_whole_image_encoder_and_caches_nothing(data, weights):
    done = train(data, weights, "--encoder", "full", "--encoder-lr", "1e-3", "--iterations", 4, "--lr", "1e-3",
                 "--workers", 0)
    assert "특징은 캐시하지 않고" in done.stdout
    refused = train(data, weights, "--encoder", "full", "--cache-dir", "features", code=2)
    assert "--cache-dir" in refused.stderr
    before, after = load(weights), load(data / "output/sam2_final.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"image_encoder.trunk.patch_embed.proj.weight", "sam_mask_decoder.conv_s0.weight",
            "sam_mask_decoder.output_hypernetworks_mlps.1.layers.2.weight"} <= changed
    assert not any(name.startswith("memory") for name in changed)
    done = compare(data, weights)
    assert "모델마다 인코딩" in done.stdout
    compared = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert compared["finetuned_iou"] == pytest.approx(read_summary(data / "output")["best_iou"], abs=1e-6)


def test_images_that_are_in_both_splits_are_reported(data, weights):
    shutil.copy(data / "data/images/train/pair_000.png", data / "data/images/val/pair_100.png")
    done = train(data, weights, "--test")
    assert "검증 이미지 1장이 학습 이미지와 같은 파일입니다 (pair_100.png)" in done.stdout


def test_lines_that_share_the_pixels_of_the_reduced_image_are_trained_one_by_one(data):
    mask = np.zeros((4096, 4096), np.uint16)
    for number in range(1, 5):
        mask[99 + number, 200:3000] = number
    write_image(data / "lines.png", mask)
    image, = train_sam2_proper.LabeledImages([(data / "lines.png",) * 2], 1024, 100)
    assert image.objects.tolist() == [1, 2, 3, 4] and image.size == (1024, 1024)
    assert [image.mask(number).sum() for number in image.objects] == [700] * 4
    assert image.mask().sum() == 700 and image.labels().shape == (4096, 4096)


def test_features_are_cached_on_the_device_then_in_memory_in_the_order_of_first_visits(data, weights):
    predictor = train_sam2_proper.load_predictor(SMALL_CFG, weights, "cpu")
    images = train_images(data)
    size = train_sam2_proper.FeatureCache(predictor, DEFAULTS, (0, 0)).bytes_per_image
    cache = train_sam2_proper.FeatureCache(predictor, DEFAULTS, (5 * size // 2, 2 * size), images)
    assert (cache.on_device, cache.capacity) == (2, 4)  # of six images
    cache.at_once = 3  # as on a GPU, where it is AT_ONCE
    encoded = []
    predictor.model.image_encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    together = cache(images[:1])
    assert encoded == [3] and list(cache.kept) == [image.path for image in images[:3]]
    cache(images[1:3])
    assert encoded == [3]
    cache(images[3:])  # the fourth is kept; the last two do not fit and are encoded at each visit
    cache(images[4:])
    assert encoded == [3, 1, 1, 1, 1, 1] and len(cache.kept) == 4
    alone = train_sam2_proper.FeatureCache(predictor, DEFAULTS, (0, 0))(images[:1])
    torch.testing.assert_close(together["image_embed"], alone["image_embed"], rtol=1e-2, atol=1e-2)


def test_read_ahead_keeps_the_order_and_reads_only_a_few_items_ahead():
    started = []
    results = train_sam2_proper.read_ahead(lambda item: started.append(item) or 10 * item, iter(range(20)), 2, 3)
    assert [next(results).result() for _ in range(5)] == [0, 10, 20, 30, 40] and set(started) <= set(range(8))
    assert [each.result() for each in results] == [10 * item for item in range(5, 20)]


def test_losses_fetched_together_give_the_same_means_and_a_nan_names_its_iteration(data, weights, monkeypatch):
    one_by_one, together = (make_training(data, weights, monkeypatch, "--lr", "1e-4") for _ in range(2))
    for iteration in range(1, 6):
        one_by_one.step(iteration)
        assert not one_by_one.fetch()
        together.step(iteration)
    assert together.mean is None and len(together.pending) == 5
    together.interrupted.append(True)
    assert together.fetch() and together.mean == one_by_one.mean and not together.pending
    together.step(6)
    together.pending[-1] = together.pending[-1] * float("nan")
    with pytest.raises(SystemExit, match="6회"):
        together.fetch()

"""extras/sam_med3d_ich.

| tests | subject |
|---|---|
| training | files, resuming, schedule, memory, logs, diverging runs |
| clicks, losses, metrics | on values computed by hand |
| geometry | points, crops, windows, the head's center |
| refused input | pickles, volumes, rows and CSV files |
| checkpoints | official ones, invalid ones, the full model |
| --test, --help, demo data | system check, flags, defaults |
"""

import argparse
import csv
import json
import math
import os
import pickle
import signal
import types
from pathlib import Path

import config
import dataloader
import files
import model
import nibabel as nib
import numpy as np
import pytest
import torch
import train as train_script
import trainer
import utils
from conftest import ForkServer, assert_fails_in_one_line, signal_at
from conftest import run as run_script
from dataloader import Row
from filelock import FileLock
from matplotlib import pyplot as plt
from medim import create_model
from utils import DataError

TRAIN = "extras/sam_med3d_ich/train.py"
SERVER = ForkServer("monai.transforms", "monai.data", "medim", "nibabel")
SHAPE, VOXEL = (26, 30, 14), (8.0, 8.0, 12.0)


def run(script, *arguments, **how):
    return run_script(script, *arguments, server=SERVER, **how)


# ---- drawn data ----

def draw_scan(number, ich):
    """A ball of brain in air, with a brighter ball in it if ich: (int16 SHAPE, uint8 SHAPE)."""
    rng = np.random.default_rng(number)
    x, y, z = (np.arange(length) * size - (length - 1) * size / 2 for length, size in zip(SHAPE, VOXEL))
    x, y, z = np.meshgrid(x, y, z, indexing="ij")
    volume = np.where(x**2 + y**2 + z**2 < 70**2, 35, -1000)
    centre = rng.uniform(-25, 25, 3)
    mask = (x - centre[0])**2 + (y - centre[1])**2 + (z - centre[2])**2 < 24**2
    if ich:
        volume[mask] = 70
    return (volume + rng.normal(0, 2, SHAPE)).astype(np.int16), (mask * ich).astype(np.uint8)


def save_nifti(path, array, axes="RAS"):
    """Write an array in RAS order as a NIfTI file with the axis directions `axes`."""
    sign = np.array([1 if letter in "RAS" else -1 for letter in axes])
    array = array[tuple(slice(None, None, step) for step in sign)]
    affine = np.diag([*(sign * VOXEL), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(array.shape) - 1) / 2
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_csv(path, rows, columns=("path", "ich", "patient_id")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def make_data(folder, train=(1, 1, 0, 1, 1), val=(1, 0)):
    """train.csv, val.csv, masks/ and scans/ below `folder`; two scans of each patient come one after the other."""
    for split, labels, first in (("train", train, 0), ("val", val, 100)):
        rows = []
        for number, ich in enumerate(labels, first):
            volume, mask = draw_scan(number, ich)
            save_nifti(folder / "scans" / f"scan_{number}.nii.gz", volume, "LPS")
            save_nifti(folder / "masks" / f"scan_{number}.nii", mask, "LPS")
            rows.append((f"scans/scan_{number}.nii.gz", ich, f"patient_{number // 2}"))
        write_csv(folder / f"{split}.csv", rows)
    return folder


DATA_FLAGS = ("--train_csv", "train.csv", "--val_csv", "val.csv", "--mask_dir", "masks")
SMALL = ("--model_size", "small", "--spacing", "4", "--num_workers", "0", "--device", "cpu", "--num_clicks", "2",
         "--gradient_accumulation_steps", "1", "--lr", "1e-3", "--augmentation_prob", "0.5", "--keep_in_memory")


def train(folder, *flags, **how):
    return run(TRAIN, *DATA_FLAGS, *SMALL, *flags, cwd=folder, **how)


def settings(*flags):
    return config.parse_args(["--test", *SMALL, *map(str, flags)])


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a training of three epochs has run; (folder, finished process)."""
    folder = make_data(tmp_path_factory.mktemp("trained"))
    return folder, train(folder, "--epochs", 3)


@pytest.fixture
def volumes(data):
    """The training volumes of `data` as Volumes, with the flags of SMALL."""
    rows, problems = dataloader.read_rows(data / "train.csv", data / "masks")
    assert not problems
    return dataloader.Volumes(rows, settings())


# ---- training ----

def test_training_writes_its_result_files(trained):
    folder, done = trained
    output = folder / "outputs"
    assert {"best_model.pth", "latest_model.pth", "sam_encoder.pth", "config.json", "patients.csv", "patients.png",
            "training_curve.png"} <= {path.name for path in output.iterdir()}
    summary = json.loads(next(output.glob("training_summary_*.json")).read_text("utf-8"))
    assert summary["epochs"] == 3 and len(summary["history"]) == 3 and not summary["stopped_early"]
    assert summary["best"]["dice"] == max(row["dice"] for row in summary["history"])
    assert json.loads((output / "config.json").read_text("utf-8"))["lr"] == 1e-3
    rows = list(csv.DictReader((output / "patients.csv").read_text("utf-8-sig").splitlines()))
    assert list(rows[0]) == list(trainer.PATIENT_COLUMNS)
    assert [(row["patient_id"], row["volumes"], row["ich"]) for row in rows] == [("patient_50", "2", "1")]
    assert "검증 Dice" in done.stdout and not done.stderr


def test_the_loss_falls(trained):
    history = load(trained[0] / "outputs/latest_model.pth")["history"]
    assert history[-1]["mask_loss"] < 0.95 * history[0]["mask_loss"]


def test_sam_encoder_loads_into_medims_encoder(trained):
    visual_encoder = create_model("SAM-Med3D", **config.MODELS["small"]).image_encoder
    checkpoint = torch.load(trained[0] / "outputs/sam_encoder.pth")
    image_encoder_state = checkpoint["image_encoder_state_dict"]
    visual_encoder.load_state_dict(image_encoder_state, strict=True)
    head = model.RepresentationHead(96, 256)
    head.load_state_dict(checkpoint["head_state_dict"])
    tokens, logits = head(visual_encoder(torch.zeros(1, 1, 48, 48, 48)))
    assert tokens.shape == (1, 6**3, 256) and logits.shape == (1, 6**3)


def test_sam_encoder_of_the_full_model_loads_into_medims_encoder(volumes):
    args = settings("--model_size", "full", "--output_dir", volumes.rows[0].path.parent / "full")
    with torch.device("meta"):
        net, visual_encoder = model.SamMed3dIch("full", 256), create_model("SAM-Med3D").image_encoder
    net = net.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.fill_(number)
    picture = {"patient_id": "a", "dice": 0.5, "click": (1, 1), **{name: np.zeros((4, 4)) for name in (
        "image", "truth", "prediction")}}
    trainer.Trainer(net, volumes, volumes, args, "cpu").save_best([], [picture])
    (args.output_dir / "best_model.pth").unlink()  # 400 MB; the encoder's 372 MB follow
    state = torch.load(args.output_dir / "sam_encoder.pth")["image_encoder_state_dict"]
    (args.output_dir / "sam_encoder.pth").unlink()
    visual_encoder.load_state_dict(state, strict=True, assign=True)
    for name, parameter in net.sam.image_encoder.named_parameters():
        assert parameter.flatten()[0] == visual_encoder.get_parameter(name).flatten()[0]
    assert sum(parameter.numel() for parameter in visual_encoder.parameters()) == pytest.approx(92.9e6, abs=1e5)


def test_best_model_opens_in_medim_and_starts_a_new_training(trained, tmp_path):
    best = trained[0] / "outputs/best_model.pth"
    weights = load(best)["model_state_dict"]
    create_model("SAM-Med3D", **config.MODELS["small"]).load_state_dict(weights, strict=True)
    started = model.build_model(settings("--sam_checkpoint", best)).sam.state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def same_weights(one, other):
    return all(torch.equal(one[part][name], other[part][name])
               for part in ("model_state_dict", "head_state_dict") for name in one[part])


@pytest.mark.parametrize("scheduler", ["reduce_on_plateau", "cosine", "step"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(scheduler, tmp_path):
    flags = ("--scheduler_type", scheduler, "--epochs", 3)
    whole, broken = make_data(tmp_path / "whole"), make_data(tmp_path / "broken")
    train(whole, *flags)
    done = train(broken, *flags, code=1, before=signal_at("에포크 1/3", signal.SIGINT))
    assert_fails_in_one_line(done, "--resume")
    assert load(broken / "outputs/latest_model.pth")["epoch"] < 3
    assert "이어서" in train(broken, *flags, "--resume").stdout
    one, other = (load(folder / "outputs/latest_model.pth") for folder in (whole, broken))
    assert same_weights(one, other)
    assert [row["dice"] for row in one["history"]] == [row["dice"] for row in other["history"]]
    assert [row["lr"] for row in one["history"]] == [row["lr"] for row in other["history"]]
    assert same_weights(*(load(folder / "outputs/best_model.pth") for folder in (whole, broken)))


KILL_IN_WRITING = """
import torch

def save_half(value, path, save=torch.save):
    save(value, path)
    if "latest_model.pth" in str(path) and value["epoch"] == 2:
        os.truncate(path, 10_000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_run_that_is_killed_while_it_writes_leaves_whole_files(data):
    train(data, "--epochs", 3, code=-signal.SIGKILL, before=KILL_IN_WRITING)
    output = data / "outputs"
    assert list(output.glob("latest_model.pth.*.tmp"))
    assert load(output / "latest_model.pth")["epoch"] == 1
    assert load(output / "best_model.pth")["epoch"] in (1, 2)
    assert load(output / "sam_encoder.pth")["image_encoder_state_dict"]
    train(data, "--epochs", 2, "--resume")
    assert load(output / "latest_model.pth")["epoch"] == 2 and not list(output.glob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE")
def test_a_full_disk_is_named_and_leaves_nothing_behind(data):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))"
    assert_fails_in_one_line(train(data, "--epochs", 1, code=1, before=limit), "best_model.pth", "디스크")
    assert not [path for path in (data / "outputs").iterdir() if path.suffix in (".pth", ".tmp")]


def test_a_second_run_in_the_same_output_folder_is_refused(data):
    (data / "outputs").mkdir()
    with FileLock(data / "outputs/.lock"):
        assert_fails_in_one_line(train(data, "--epochs", 1, code=1), "outputs/.lock")
    assert not (data / "outputs/config.json").exists()


@pytest.mark.parametrize("epochs, told", [(0, False), (1, True)])
def test_an_interrupted_run_suggests_resume_only_after_a_saved_epoch(epochs, told, data):
    before = f"""
import trainer

def train_epoch(self, epoch, original=trainer.Trainer.train_epoch):
    if epoch > {epochs}:
        raise KeyboardInterrupt
    return original(self, epoch)

trainer.Trainer.train_epoch = train_epoch"""
    done = train(data, "--epochs", 3, code=1, before=before)
    assert_fails_in_one_line(done, "중단했습니다")
    assert ("--resume" in done.stderr) == told == (data / "outputs/latest_model.pth").exists()


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2 GiB", "DataLoader worker (pid 7) is killed by signal: Killed. ",
    "unable to allocate shared memory(shm) for file </torch_7>: out of shared memory",
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_errors_end_in_one_line(message):
    def main():
        raise RuntimeError(message)
    with pytest.raises(SystemExit, match="오류: 메모리가 부족합니다"):
        utils.run_training(main)


def test_other_runtime_errors_keep_their_traceback():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        utils.run_training(main)


def test_resume_refuses_other_settings(trained):
    done = train(trained[0], "--epochs", 3, "--resume", "--weight_decay", "0.5", "--freeze_encoder", "--window",
                 "50,100", code=1)
    assert_fails_in_one_line(done, "--weight_decay 0.0001", "--freeze_encoder 없이", "--window=40,80")


def test_resume_lists_the_settings_that_differ_and_must_not():
    before = config.settings_of(settings("--train_csv", "a/../train.csv", "--window", "none", "--freeze_encoder"))
    same = settings("--train_csv", Path("train.csv").resolve(), "--window", "none", "--freeze_encoder", "--epochs", 7)
    assert config.differing_settings(same, before) == []
    other = settings("--train_csv", "b.csv", "--model_size", "full")
    assert config.differing_settings(other, before) == [
        "--train_csv a/../train.csv", "--window=none", "--model_size small", "--freeze_encoder"]


@pytest.mark.parametrize("content", [{"model_state_dict": {}}, [1, 2]])
def test_resume_refuses_a_file_of_another_program(content, data):
    (data / "outputs").mkdir()
    torch.save(content, data / "outputs/latest_model.pth")
    assert_fails_in_one_line(train(data, "--resume", code=1), "outputs/latest_model.pth")


def test_resume_with_more_epochs_follows_the_cosine_schedule_of_the_new_number(volumes, tmp_path):
    flags = ("--scheduler_type", "cosine", "--output_dir", tmp_path)
    trained = [trainer.Trainer(model.build_model(args), volumes, volumes, args, "cpu")
               for args in (settings(*flags, "--epochs", 3), settings(*flags, "--epochs", 6))]
    for _ in range(3):
        trained[0].optimizer.step()
        trained[0].scheduler.step()
    trained[0].epoch = 3
    utils.save_checkpoint(tmp_path / "latest_model.pth", trained[0].state())
    trained[1].load()
    group, = trained[1].optimizer.param_groups
    rates = [group["lr"]]
    for _ in range(3):
        trained[1].optimizer.step()
        trained[1].scheduler.step()
        rates.append(group["lr"])
    assert rates == pytest.approx([5e-4, 2.5e-4, 6.7e-5, 0], abs=1e-6)


def test_resume_without_a_saved_run_is_refused(data):
    assert_fails_in_one_line(train(data, "--resume", code=1), "latest_model.pth")


def test_training_stops_after_patience_epochs_without_improvement(data):
    done = train(data, "--epochs", 9, "--lr", 0, "--patience", 2)  # nothing is trained, so nothing improves
    assert "일찍 끝냅니다: 에포크 1 뒤로" in done.stdout
    summary = json.loads(next((data / "outputs").glob("training_summary_*.json")).read_text("utf-8"))
    assert summary["stopped_early"] and summary["epochs"] == 3


def test_freeze_encoder_leaves_the_encoder_as_it_was(data):
    done = train(data, "--epochs", 1, "--freeze_encoder")
    before = model.build_model(settings()).sam.state_dict()
    after = load(data / "outputs/best_model.pth")["model_state_dict"]
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same[name] for name in same if name.startswith("image_encoder."))
    assert not all(same[name] for name in same if name.startswith("mask_decoder."))
    assert "SAM encoder 고정" in done.stdout


def gradients_of_an_epoch(volumes, batch_size, steps):
    """The gradients before each step of the optimizer, which changes nothing here (lr 0)."""
    args = settings("--batch_size", batch_size, "--gradient_accumulation_steps", steps, "--lr", 0, "--max_grad_norm", 0)
    training = trainer.Trainer(model.build_model(args), volumes, volumes, args, "cpu")
    gradients, step = [], training.step

    def recording_step():
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.parameters
                                    if parameter.grad is not None]))
        step()
    training.step = recording_step
    training.train_epoch(1)
    return gradients


def test_accumulating_4_batches_of_1_gives_the_gradient_of_1_batch_of_4(volumes):
    accumulated, whole = gradients_of_an_epoch(volumes, 1, 4), gradients_of_an_epoch(volumes, 4, 1)
    assert len(accumulated) == len(whole) == 2  # five volumes: a step of four, and one of the one that is left
    for one, other in zip(accumulated, whole):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = model.SamMed3dIch("small", 16, use_gradient_checkpointing=recompute)
        net.encode(torch.linspace(-1, 1, 48**3).reshape(1, 1, 48, 48, 48)).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.sam.image_encoder.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size, side, least", [("small", 48, 8), ("full", 128, 50)])
def test_gradient_checkpointing_keeps_less_for_the_backward_pass(size, side, least):
    """On the meta device, where the full model takes no time: the bytes that autograd keeps, without the weights."""
    def kept(recompute):
        with torch.device("meta"):
            net = model.SamMed3dIch(size, 16, use_gradient_checkpointing=recompute)
            image = torch.zeros(1, 1, side, side, side)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net.encode(image)
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in weights)
    assert kept(False) > least * kept(True) > 0


@pytest.mark.parametrize("scheduler, expected", [
    ("cosine", [1, 0.933, 0.75, 0.5, 0.25, 0.067]), ("step", [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("reduce_on_plateau", [1, 1, 1, 1, 1, 1, 1, 0.5])])
def test_each_scheduler_gives_its_learning_rate_by_epoch(scheduler, expected):
    args = settings("--scheduler_type", scheduler, "--epochs", 6)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    rates, schedule = [], trainer.make_scheduler(optimizer, args)
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"] / args.lr)
        optimizer.step()
        schedule.step(*[0.5] if scheduler == "reduce_on_plateau" else [])
    assert rates == pytest.approx(expected, abs=1e-3)


def test_mixed_precision_is_off_without_cuda(volumes):
    args = settings("--use_mixed_precision")
    assert trainer.Trainer(model.build_model(args), volumes, volumes, args, "cpu").precision is None
    assert any("CUDA에서만" in warning for warning in config.warnings_about(args, "cpu"))
    assert not any("CUDA에서만" in warning for warning in config.warnings_about(args, "cuda"))


@pytest.mark.parametrize("batch_size", [2, 5])  # three steps an epoch; one, after which there is no further loss
@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_a_run_that_diverges_stops_and_saves_nothing(batch_size, max_grad_norm, data):
    done = train(data, "--epochs", 1, "--lr", "1e30", "--max_grad_norm", max_grad_norm, "--batch_size", batch_size,
                 code=1)
    assert_fails_in_one_line(done, "--lr")
    assert not list((data / "outputs").glob("*.pth"))


@pytest.mark.parametrize("what, max_grad_norm, named", [
    ("gradient", 0, "기울기"), ("gradient", 1, "기울기"), ("weight", 1, "가중치"), ("prediction", 1, "예측")])
def test_non_finite_numbers_stop_the_run_and_are_not_saved(what, max_grad_norm, named, volumes, tmp_path):
    args = settings("--batch_size", 5, "--max_grad_norm", max_grad_norm, "--epochs", 1, "--output_dir", tmp_path)
    training = trainer.Trainer(model.build_model(args), volumes, volumes, args, "cpu")
    weight = training.model.head.project.weight
    if what == "gradient":
        weight.register_hook(lambda gradient: gradient * torch.inf)
    elif what == "weight":
        training.optimizer.register_step_post_hook(lambda *_: weight.data.view(-1)[:1].fill_(torch.inf))
    else:
        training.optimizer.register_step_post_hook(lambda *_: weight.data.fill_(3e38))
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with pytest.raises(SystemExit, match=f"오류: .*{named}에 NaN"):
        training.fit()
    assert not list(tmp_path.glob("*.pth"))
    if what == "gradient":
        assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())


def test_samples_from_worker_processes_equal_those_read_in_the_main_process(volumes):
    args = settings("--num_workers", 1)
    training = trainer.Trainer(model.build_model(args), volumes, volumes, args, "cpu")
    training.train_loader.sampler.epoch = 7
    here = dataloader.TrainingSet(volumes, args)
    for batch in training.train_loader:
        for image, number in zip(batch["image"], batch["number"]):
            assert torch.equal(image, here[7, int(number)]["image"])


def test_a_file_that_a_worker_cannot_read_is_named_in_one_line(volumes):
    args = settings("--num_workers", 1)
    volumes.rows[0].path.write_bytes(b"damaged since it was checked")
    with pytest.raises(DataError) as caught:
        list(dataloader.training_loader(volumes, args, pin_memory=False))
    assert utils.reason(caught.value).startswith(f"{volumes.rows[0].place}: {volumes.rows[0].path}: ")


def test_wandb_receives_the_log_and_the_figures(data):
    train(data, "--epochs", 1, "--use_wandb", "--log_images", "--log_freq", 1, env={"WANDB_MODE": "offline"})
    assert list((data / "outputs/wandb").glob("offline-run-*/*.wandb"))
    assert list((data / "outputs/wandb").glob("offline-run-*/files/media/images/patients_*.png"))


def test_figures_for_wandb_are_closed(tmp_path, monkeypatch):
    tracker = types.SimpleNamespace(id="a", log=lambda values, step: logged.append(values))
    monkeypatch.setitem(utils.sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: tracker, Image=id))
    logged, args = [], settings("--output_dir", tmp_path, "--log_images", "--log_freq", 1)
    log = train_script.open_wandb(types.SimpleNamespace(args=args, run_id=None))
    before = plt.get_fignums()
    log([{"epoch": 1, "dice": 0.5, "specificity": None}], plt.figure)
    assert set(logged[0]) == {"epoch", "dice", "patients"} and plt.get_fignums() == before


def test_a_missing_wandb_package_names_the_pip_command(data):
    done = train(data, "--use_wandb", code=1, before="sys.modules['wandb'] = None")
    assert_fails_in_one_line(done, "pip install wandb")


# ---- clicks, losses, metrics ----

def test_clicks_fall_where_the_prediction_is_wrong():
    truth, predicted = torch.zeros(3, 1, 8, 8, 8, dtype=torch.bool), torch.zeros(3, 1, 8, 8, 8, dtype=torch.bool)
    truth[:, :, 2, 3, 4] = True           # x, y, z
    truth[1, :, 5, 6, 7] = True
    predicted[1, :, 2, 3, 4] = True       # misses the other voxel
    predicted[2, :, 2, 3, 4] = True
    predicted[2, :, 1, 0, 6] = True       # one too many
    points, labels = trainer.next_clicks(predicted, truth, [np.random.default_rng(0)] * 3)
    assert points[:, 0].tolist() == [[2, 3, 4], [5, 6, 7], [1, 0, 6]]
    assert labels[:, 0].tolist() == [1, 1, 0]


def test_click_on_a_right_prediction_falls_in_the_target():
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    truth[0, 0, 3, 1, 2] = True
    points, labels = trainer.next_clicks(truth, truth, [np.random.default_rng(0)])
    assert points.tolist() == [[[3, 1, 2]]] and labels.tolist() == [[1]]


def test_medim_encodes_positions_with_the_first_two_axes_exchanged():
    """SamMed3dIch.decode relies on this order of points. A medim without it would misread the weights."""
    encoder = model.SamMed3dIch("small", 16).sam.prompt_encoder.pe_layer
    dense = encoder((48, 48, 48))
    point = encoder.forward_with_coords(torch.tensor([[[5, 20, 33]]]) + 0.5, (48, 48, 48))[0, 0]
    torch.testing.assert_close(point, dense[:, 20, 5, 33])
    assert (point - dense[:, 5, 20, 33]).abs().max() > 0.1


def test_mask_losses_are_dice_with_squared_terms_plus_cross_entropy_per_volume():
    truth = torch.zeros(2, 1, 2, 2, 2)
    truth[:, 0, 0, 0] = 1                                           # 2 of 8 voxels
    logits = torch.zeros(2, 1, 2, 2, 2)                             # p = 1/2 everywhere in the first volume
    logits[1] = math.log(3) * (2 * truth[1] - 1)                    # p = 3/4 in the target, 1/4 beside it
    dice = [1 - 2 * 1 / (8 / 4 + 2), 1 - 2 * 1.5 / (2 * 9 / 16 + 6 / 16 + 2)]  # 1/2, 1/7
    expected = [dice[0] + math.log(2), dice[1] + math.log(4 / 3)]
    assert trainer.mask_losses(logits, truth).tolist() == pytest.approx(expected, abs=1e-5)


def test_label_losses_cover_the_volume_and_its_tokens_and_are_0_without_a_label():
    logits, mask = torch.zeros(3, 8), torch.zeros(3, 1, 4, 4, 4)
    mask[1:, 0, 3, 0, 2] = 1              # in the patch 1, 0, 1 of 2 x 2 x 2: token 5
    logits[0] = logits[1] = -2
    logits[1, 5] = 3
    losses = trainer.label_losses(logits, mask, torch.tensor([0, 1, dataloader.NO_LABEL]))
    wrong, right = np.log1p(np.exp(-2)), np.log1p(np.exp(-3))
    expected = [wrong + trainer.TOKEN_WEIGHT * wrong, right + trainer.TOKEN_WEIGHT * (7 * wrong + right) / 8, 0]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_metrics_of_a_patient_combine_all_its_volumes():
    def row(patient_id, ich):
        return Row("", Path(), ich, patient_id, None)

    rows = [row("a", 1), row("b", 0), row("a", 1), row("c", 0), row("a", 0)]
    results = [{"probability": 0.9, "overlap": 4.0, "predicted": 8.0, "true": 4.0}, {"probability": 0.2},
               {"probability": 0.3, "overlap": 2.0, "predicted": 2.0, "true": 6.0}, {"probability": 0.8},
               {"probability": 0.1}]
    table = trainer.by_patient(rows, results)
    assert table[0] == {"patient_id": "a", "volumes": 3, "ich": 1, "predicted_ich": 1, "ich_probability": 0.9,
                        "dice": 0.6, "iou": pytest.approx(6 / 14), "true_ml": 5, "predicted_ml": 5,
                        "volume_error_ml": 0}
    assert [entry["predicted_ich"] for entry in table[1:]] == [0, 1] and "dice" not in table[1]
    assert trainer.summarize(table) == {"dice": 0.6, "iou": pytest.approx(6 / 14), "volume_error_ml": 0,
                                        "label_accuracy": pytest.approx(2 / 3), "sensitivity": 1, "specificity": 0.5}
    assert trainer.summarize(table[:1])["specificity"] is None


def test_figures_show_the_patients_dice_and_the_slice_of_the_click(data):
    volume, mask = draw_scan(7, 1)
    for number in (1, 2):
        save_nifti(data / f"scans/again_{number}.nii.gz", volume, "LPS")
        save_nifti(data / f"masks/again_{number}.nii", mask, "LPS")
    rows, _ = dataloader.read_rows(write_csv(data / "val.csv", [
        ("scans/again_1.nii.gz", 1, "a"), ("scans/again_2.nii.gz", 1, "a"), ("scans/scan_2.nii.gz", 0, "b"),
        ("scans/scan_100.nii.gz", 1, "c")]), data / "masks")
    args = settings()
    val = dataloader.Volumes(rows, args)
    training = trainer.Trainer(model.build_model(args), val, val, args, "cpu")
    table, pictures = training.validate()
    assert [picture["patient_id"] for picture in pictures] == ["a", "c"]
    assert [picture["dice"] for picture in pictures] == [entry["dice"] for entry in table if entry["ich"]]
    for picture in pictures:
        assert picture["truth"][picture["click"]]  # the click, which lies in the truth, is in this slice
    figure = utils.draw_patients([{**picture, "dice": dice} for picture, dice in zip(pictures, (0.9, 0.25))])
    titles = [axes.get_title() for axes in figure.axes]
    plt.close(figure)
    assert titles[0].startswith("c:") and titles[2].endswith("0.25") and titles[3].startswith("a:")


def test_a_perfect_prediction_has_a_dice_near_1_in_the_voxels_of_the_file(data):
    rows, _ = dataloader.read_rows(data / "val.csv", data / "masks")
    args = settings("--spacing", 2)
    args.image_size = 64
    item = dataloader.ValidationSet(dataloader.Volumes(rows, args), args)[0]
    result = trainer.measure(item["mask"][0].float(), item)
    _, mask = draw_scan(100, 1)
    assert result["true"] == pytest.approx(mask.sum() * np.prod(VOXEL) / 1000)
    assert trainer.dice_and_iou(result["overlap"], result["predicted"], result["true"])[0] > 0.97


# ---- geometry ----

@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "RPI"])
@pytest.mark.parametrize("kind", [".nii.gz", ".npy", ".pkl"])
def test_a_point_lands_on_its_voxel_for_any_axis_order(axes, kind, tmp_path):
    """The click falls on the one bright voxel, and at the same place in mm, for any axes of the file."""
    volume, mask = np.full(SHAPE, 20, np.int16), np.zeros(SHAPE, np.uint8)
    volume[17, 9, 4], mask[17, 9, 4] = 75, 1
    mask_path = save_nifti(tmp_path / "mask.nii", mask, axes)
    path = tmp_path / f"volume{kind}"
    stored = nib.load(save_nifti(tmp_path / "volume.nii.gz", volume, axes)).get_fdata().astype(np.int16)
    if kind == ".npy":
        np.save(path, stored)
    elif kind == ".pkl":
        path.write_bytes(pickle.dumps(stored))
    case = dataloader.load_case(Row("", path, 1, "a", mask_path), (40, 80), 4)
    assert nib.aff2axcodes(case["image"].affine.numpy()) == ("R", "A", "S")
    image, crop = (dataloader.crop_around(case[name], dataloader.target_centre(case["mask"]), 48)
                   for name in ("image", "mask"))
    (point,), (label,) = trainer.next_clicks(torch.zeros_like(crop[None]), crop[None] > 0, [np.random.default_rng(0)])
    x, y, z = point[0].long().tolist()
    assert label == 1 and image[0, x, y, z] > 25 and abs(x - 24) < 3 and abs(y - 24) < 3 and abs(z - 24) < 3
    meant = (np.array([17, 9, 4]) - (np.array(SHAPE) - 1) / 2) * VOXEL
    there = crop.affine.numpy() @ [x, y, z, 1]
    assert (np.abs(there[:3] - meant) <= np.array(VOXEL) / 2).all()


def test_the_window_comes_before_the_resampling(tmp_path):
    volume = np.full(SHAPE, -1000, np.int16)
    volume[:, :, 6:8] = 3000  # metal: resampling alone would create brain values between it and air
    path = save_nifti(tmp_path / "a.nii.gz", volume)
    image = dataloader.load_case(Row("", path, 0, "a", None), (40, 80), 4)["image"]
    assert image.max().item() == pytest.approx(80) and image.min() == 0
    profile = image[0, 5, 5]
    assert profile.diff().abs().max().item() == pytest.approx(80 / 3, abs=0.1)  # 12 mm in 3 steps


def test_apply_window_clips_values_and_moves_the_lower_bound_to_0():
    values = np.array([-1000, 0, 10, 80, 90, 3000], np.float32)
    assert dataloader.apply_window(values, (40, 80)).tolist() == [0, 0, 10, 80, 80, 80]
    assert dataloader.apply_window(values, (50, 100)).tolist() == [0, 0, 10, 80, 90, 100]
    assert dataloader.apply_window(values, (40, 200)).tolist() == [0, 60, 70, 140, 150, 200]
    assert dataloader.apply_window(values, None) is values


def test_z_score_is_taken_over_the_voxels_above_0():
    image = torch.tensor([0.0, 0, 0, 1, 2, 3])
    assert dataloader.z_score(image).tolist() == [-2, -2, -2, -1, 0, 1]
    assert dataloader.z_score(torch.zeros(3)).tolist() == [0, 0, 0]
    assert dataloader.z_score(torch.tensor([0.0, 5, 5])).tolist() == [0, 5, 5]


def test_crop_around_pads_with_0_where_the_volume_ends():
    volume = dataloader.MetaTensor(torch.arange(1.0, 61).reshape(1, 3, 4, 5), affine=np.diag([2.0, 2, 2, 1]))
    crop = dataloader.crop_around(volume, (0.5, 2, 4.5), 4)
    assert crop.shape == (1, 4, 4, 4)
    assert (crop[0, :2] == 0).all() and (crop[0, :, :, 3] == 0).all()
    assert torch.equal(crop[0, 2:, :, :3].as_tensor(), volume[0, :2, :, 2:].as_tensor())
    assert (crop.affine @ torch.tensor([2.0, 0, 0, 1], dtype=torch.double)).tolist() == [0, 0, 4, 1]


@pytest.mark.parametrize("length, first", [(4, 8), (5, 8), (6, 7), (7, 7)])
def test_a_mask_of_an_odd_length_lies_where_torchio_puts_it(length, first):
    """The middle of an odd length lies between two voxels of the crop: CropOrPad always takes the lower one."""
    mask = dataloader.MetaTensor(torch.zeros(1, 40, 40, 40), affine=np.eye(4))
    mask[0, 14:14 + length, 14, 14] = 1
    crop = dataloader.crop_around(mask, dataloader.target_centre(mask), 20)
    assert torch.argwhere(crop[0])[0, 0] == first


def test_a_crop_that_misses_the_hemorrhage_trains_no_label(data):
    """The head's center is far from a hemorrhage at the rim, so a small crop around the center shows none."""
    volume, mask = draw_scan(0, 0)
    mask[20, 15, 7] = 1
    path = save_nifti(data / "masks/rim.nii", mask, "RAS")
    scan = save_nifti(data / "scans/rim.nii.gz", volume, "RAS")
    args = settings("--augmentation_prob", 0)
    rim = dataloader.TrainingSet(dataloader.Volumes([Row("", scan, 1, "a", path)], args), args)
    assert {rim[epoch, 0]["label"] for epoch in range(20)} == {1, dataloader.NO_LABEL}
    rim.size = 8
    seen = [rim[epoch, 0] for epoch in range(20)]
    assert {item["label"] for item in seen} == {dataloader.NO_LABEL}
    assert {bool(item["mask"].any()) for item in seen} == {True, False}


def test_crops_that_train_the_label_do_not_depend_on_the_mask(data):
    """With and without the mask of a scan, the network sees the same voxels wherever the label is trained."""
    (data / "empty").mkdir()
    without = save_nifti(data / "empty/scan_0.nii", np.zeros(SHAPE, np.uint8), "LPS")
    args = settings("--augmentation_prob", 0)
    scan = data / "scans/scan_0.nii.gz"
    bleeding, healthy = (dataloader.TrainingSet(dataloader.Volumes([row], args), args) for row in (
        Row("", scan, 1, "a", data / "masks/scan_0.nii"), Row("", scan, 0, "a", without)))
    seen = [(bleeding[epoch, 0], healthy[epoch, 0]) for epoch in range(20)]
    assert {item["label"] for item, _ in seen} == {1, dataloader.NO_LABEL}
    assert {item["label"] for _, item in seen} == {0}
    assert all(torch.equal(item["image"], other["image"]) for item, other in seen if item["label"] == 1)
    assert not any(torch.equal(item["image"], other["image"]) for item, other in seen if item["label"] != 1)


# ---- refused input ----

class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithState(Call):
    def __init__(self, state, function, *arguments):
        self.call = function, arguments, state


HOSTILE = {
    "os.system": (Call(os.system, "touch hostile"), r"(posix|nt)\.system"),
    "eval": (Call(eval, "open('hostile', 'w')"), r"__builtin__\.eval|builtins\.eval"),
    "nested": ({"image": [Call(getattr, Call(__import__, "os"), "system")]}, r"__builtin__\.getattr|builtins\.getattr"),
    "in an array": (np.array([Call(os.system, "touch hostile")], object), "dtype O"),
    "torch": ({"image": torch.zeros(2)}, r"torch\._utils\._rebuild_tensor_v2"),
    "state of a dtype": (WithState((3, "|", None, None, None, -1, -1, 63), np.dtype, "O", False, True), "dtype O"),
    "class": (argparse.Namespace(image=np.zeros((2, 2, 2))), r"copy_reg\._reconstructor|argparse\.Namespace"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_with_anything_but_arrays_and_plain_values_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, named = HOSTILE[name]
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        Path("scan.pkl").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(DataError, match=rf"scan\.pkl.*({named})"):
            dataloader.read_volume(Path("scan.pkl"))
    assert not Path("hostile").exists()


def test_a_torch_file_is_refused_as_a_volume(tmp_path):
    torch.save(torch.zeros(2, 2, 2), tmp_path / "scan.pkl")
    with pytest.raises(DataError, match=r"scan\.pkl"):
        dataloader.read_volume(tmp_path / "scan.pkl")


def test_a_pickle_cannot_set_attributes_of_the_classes_that_read_it(tmp_path):
    """BUILD on a class sets its attributes, unless the class has a __setstate__."""
    hostile = b"cnumpy.core.multiarray\n_reconstruct\n}S'array'\nI1\nsb."
    (tmp_path / "scan.pkl").write_bytes(hostile)
    with pytest.raises(DataError):
        dataloader.read_volume(tmp_path / "scan.pkl")
    assert dataloader.PickledArray.array is None and dataloader.StandIn.array is None


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"PK\x03\x04", pickle.dumps(np.zeros(9))[:-20]])
def test_a_damaged_pickle_is_reported_as_unreadable_not_as_unsafe(content, tmp_path):
    (tmp_path / "scan.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"scan\.pkl: 읽을 수 없습니다"):
        dataloader.read_volume(tmp_path / "scan.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int16", ">i2", "uint8", "float32", "float64", "bool"])
def test_pickled_arrays_keep_their_values_for_every_protocol_and_dtype(protocol, dtype, tmp_path):
    array = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        content = {"image": stored, "affine": np.diag([0.5, 0.5, 5, 1]), "note": ["x", None, np.float32(1)]}
        (tmp_path / "scan.pkl").write_bytes(pickle.dumps(content, protocol))
        image, affine = dataloader.read_volume(tmp_path / "scan.pkl")
        assert np.array_equal(image, array.astype(np.float32)) and np.diag(affine).tolist() == [0.5, 0.5, 5, 1]


def problems_of(folder, rows, mask_dir="masks"):
    """The problems found when reading a CSV with these rows and all of its volumes."""
    path = write_csv(folder / "test.csv", rows)
    found, problems = dataloader.read_rows(path, folder / mask_dir)
    if not problems:
        problems, _ = dataloader.Volumes(found, settings()).check("", 1, keep=False)
    return problems


def spoil(folder, what):
    """Make the second of two good rows a bad one; returns the words that its message must have."""
    scan, mask = folder / "scans/scan_1.nii.gz", folder / "masks/scan_1.nii"
    volume, truth = draw_scan(1, 1)
    if what == "other shape":
        save_nifti(mask, truth[:, :, :-1], "LPS")
        return ["scan_1.nii", "(26, 30, 13)", "(26, 30, 14)"]
    if what == "other place":
        save_nifti(mask, truth, "RAS")
        return ["scan_1.nii", "affine"]
    if what == "empty mask":
        save_nifti(mask, truth * 0, "LPS")
        return ["scan_1.nii", "ich가 1인데"]
    if what == "too small for the voxels":
        truth[:], truth[13, 15, 7] = 0, 1
        affine = np.diag([0.5, 0.5, 0.5, 1])
        for path, array in ((scan, volume), (mask, truth)):
            nib.save(nib.Nifti1Image(array, affine), path)
        return ["scan_1.nii", "4 mm"]
    if what == "NaN":
        volume = volume.astype(np.float32)
        volume[3, 4, 5:7] = np.nan
        save_nifti(scan, volume, "LPS")
        return ["scan_1.nii.gz", "NaN", "2개"]
    if what == "not in Hounsfield units":
        save_nifti(scan, volume * 0 - 1000, "LPS")
        return ["scan_1.nii.gz", "--window none"]
    if what == "truncated":
        scan.write_bytes(scan.read_bytes()[:500])
        return ["scan_1.nii.gz", "읽을 수 없습니다"]
    if what == "wrong checksum":
        content = scan.read_bytes()
        scan.write_bytes(content[:-8] + bytes(4) + content[-4:])
        assert nib.load(scan).get_fdata().any()  # which does not read that far
        return ["scan_1.nii.gz", "읽을 수 없습니다", "CRC"]
    if what == "a tenth of a voxel off":
        affine = nib.load(mask).affine.copy()
        affine[0, 3] += 0.85  # of 8 mm
        nib.save(nib.Nifti1Image(truth, affine), mask)
        return ["scan_1.nii", "affine", "0.1복셀"]
    if what == "two-dimensional":
        np.save(scan.with_name("scan_1.npy"), volume[0])
        return ["scan_1.npy", "30 x 14"]
    if what == "array of objects":
        np.save(scan.with_name("scan_1.npy"), np.array([Call(os.system, "touch hostile")], object), allow_pickle=True)
        return ["scan_1.npy", "읽을 수 없습니다"]
    if what == "no file":
        scan.unlink()
        return ["scan_1.nii.gz", "파일이 없습니다"]
    if what == "no mask":
        mask.unlink()
        return ["masks/scan_1.nii", "마스크가 없습니다"]
    if what == "two masks":
        save_nifti(mask.with_suffix(".nii.gz"), truth, "LPS")
        return ["masks/scan_1.nii, ", "masks/scan_1.nii.gz", "둘"]
    if what == "a volume as its mask":
        mask.unlink()
        mask.with_suffix(".nii.gz").hardlink_to(scan)
        return ["scan_1.nii.gz", "볼륨 자신"]
    if what == "another volume as the mask":
        save_nifti(mask, volume, "LPS")
        return ["masks/scan_1.nii", "가지"]
    if what == "another volume, scaled to 0..1, as the mask":
        save_nifti(mask, ((volume - volume.min()) / np.ptp(volume)).astype(np.float32), "LPS")
        return ["masks/scan_1.nii", "가지"]


@pytest.mark.parametrize("what", [
    "other shape", "other place", "empty mask", "too small for the voxels", "NaN", "not in Hounsfield units",
    "truncated", "wrong checksum", "a tenth of a voxel off", "two-dimensional", "array of objects", "no file",
    "no mask", "two masks", "a volume as its mask", "another volume as the mask",
    "another volume, scaled to 0..1, as the mask"])
def test_an_unusable_volume_is_named_with_its_row(what, data):
    words = spoil(data, what)
    name = next((word for word in words if word.endswith(".npy")), "scan_1.nii.gz")
    problem, = problems_of(data, [("scans/scan_0.nii.gz", 1, "a"), (f"scans/{name}", 1, "b")])
    for word in ("test.csv 3행", *words):
        assert word in problem


@pytest.mark.parametrize("row, words", [
    (("scans/scan_1.nii.gz", 0, "b"), ["ich가 0인데"]), (("scans/scan_1.nii.gz", 2, "b"), ["ich", "2"]),
    (("scans/scan_1.nii.gz", 1, ""), ["patient_id"]), (("", 1, "b"), ["path"]),
    (("scans/scan_1.mha", 1, "b"), [".mha", ".nii.gz"])])
def test_an_invalid_row_is_named(row, words, data):
    problem, = problems_of(data, [("scans/scan_0.nii.gz", 1, "a"), row])
    for word in ("test.csv 3행", *words):
        assert word in problem


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_with_a_few_labels_is_accepted(value, data):
    _, mask = draw_scan(1, 1)
    mask[mask > 0] = value
    mask[0, 0, :3] = [2, 3, 4]
    save_nifti(data / "masks/scan_1.nii", mask, "LPS")
    assert not problems_of(data, [("scans/scan_1.nii.gz", 1, "a")])


@pytest.mark.parametrize("ich", ["1.0", "1.", "01", "1.5", "nan"])
def test_the_column_ich_may_hold_1_0_as_pandas_writes_it(ich, data):
    rows, problems = dataloader.read_rows(write_csv(data / "test.csv", [("scans/scan_1.nii.gz", ich, "a")]),
                                          data / "masks")
    assert [row.ich for row in rows] == ([1] if ich in ("1.0", "1.") else []) and bool(problems) == (not rows)


def test_doubtful_volumes_and_masks_give_one_warning_for_each_kind(data, capsys):
    for number in (0, 1, 3):
        volume, mask = draw_scan(number, 1)
        save_nifti(data / f"scans/scan_{number}.nii.gz", volume + 1024, "LPS")
        mask[0, 0, 0] = 2
        save_nifti(data / f"masks/scan_{number}.nii", mask, "LPS")
    unplaced = nib.Nifti1Image(draw_scan(2, 0)[0], np.eye(4))
    unplaced.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(unplaced, data / "scans/scan_2.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)), data / "masks/scan_2.nii")
    args = settings()
    args.train_csv, args.val_csv, args.mask_dir = data / "train.csv", data / "val.csv", data / "masks"
    train_script.open_data(args)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("주의")]
    starts = ["scans/scan_0.nii.gz 외 2개: 값이 Hounsfield", "masks/scan_0.nii 외 2개: 라벨이 여럿입니다",
              "scans/scan_2.nii.gz: qform과 sform이 서로 다릅니다", "masks/scan_2.nii: affine이 단위 행렬"]
    assert len(lines) == 4 and all(line.startswith(f"주의: {data}/{start}") for line, start in zip(lines, starts))
    args.window = None
    train_script.open_data(args)
    assert "Hounsfield" not in capsys.readouterr().out


def test_units_of_the_header_are_converted_to_millimeters(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([1e-3, 1e-3, 5e-3, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    assert np.diag(dataloader.read_volume(tmp_path / "metres.nii")[1]) == pytest.approx([1, 1, 5, 1])


def test_patient_ids_in_csv_tables_are_not_read_as_formulas(tmp_path):
    ids = ["=1+1", "+a", "-b", "@c", "\td", "-5", "환자 -1", ""]
    trainer.write_patients(tmp_path / "patients.csv", [{"patient_id": name, "volume_error_ml": -1.5} for name in ids])
    rows = list(csv.DictReader((tmp_path / "patients.csv").read_text("utf-8-sig").splitlines()))
    assert [row["patient_id"] for row in rows] == ["'=1+1", "'+a", "'-b", "'@c", "'\td", "-5", "환자 -1", ""]
    assert {row["volume_error_ml"] for row in rows} == {"-1.5000"}
    files.write_csv(tmp_path / "table.csv", [["=name", 1], ["-0.5", -2]])
    assert (tmp_path / "table.csv").read_bytes() == b"'=name,1\r\n-0.5,-2\r\n"


def test_a_volume_without_a_mask_and_without_a_voxel_size_is_refused(data):
    volume, _ = draw_scan(7, 0)
    np.save(data / "scans/scan_7.npy", volume)
    (data / "scans/scan_8.pkl").write_bytes(pickle.dumps({"image": volume, "affine": np.diag([8, 8, 12, 1])}))
    rows = [("scans/scan_7.npy", 0, "a"), ("scans/scan_8.pkl", 0, "b")]
    problem, = problems_of(data, rows)
    assert "test.csv 2행" in problem and "복셀 크기" in problem


@pytest.mark.parametrize("content, words", [
    (b"path,ich\nscans/scan_0.nii.gz,1\n", ["patient_id"]), (b"", ["path, ich, patient_id"]),
    (b"path,ich,patient_id\n", ["행이 없습니다"]),
    ("path,ich,patient_id\na.nii,1,a\nb.nii,1,환자\n".encode("cp949"), ["3행", "UTF-8"]),
    (b'path,ich,patient_id\n"a.nii,1,a\n', ["CSV로 읽을 수 없습니다"])])
def test_an_invalid_csv_is_named(content, words, tmp_path):
    (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        dataloader.read_rows(tmp_path / "test.csv", tmp_path)
    for word in ("test.csv", *words):
        assert word in str(caught.value)


def test_a_csv_with_a_bom_further_columns_and_windows_line_ends_is_read(data):
    text = "\ufeffpatient_id,path,note,ich\r\n환자 1,scans/scan_0.nii.gz,\"x, y\",1\r\n"
    (data / "test.csv").write_bytes(text.encode())
    (row,), problems = dataloader.read_rows(data / "test.csv", data / "masks")
    assert not problems and row.patient_id == "환자 1" and row.ich == 1 and row.mask == data / "masks/scan_0.nii"


def test_a_patient_in_both_splits_and_a_repeated_volume_are_refused(data):
    rows = [("scans/scan_100.nii.gz", 1, "patient_1"), ("scans/scan_2.nii.gz", 0, "patient_9"),
            ("scans/scan_100.nii.gz", 1, "patient_8")]
    write_csv(data / "val.csv", rows)
    done = train(data, code=1)
    assert_fails_in_one_line(done, "3개", "patient_1")
    for words in (("val.csv 2행", "patient_1", "train.csv 4행"), ("val.csv 3행", "scan_2", "train.csv 4행"),
                  ("val.csv 4행", "scan_100", "val.csv 2행")):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"✗ {words[0]}"))
        assert all(word in line for word in words)
    assert [path.name for path in (data / "outputs").iterdir()] == [".lock"]


def test_two_volumes_with_one_mask_are_refused(data):
    volume, _ = draw_scan(0, 1)
    save_nifti(data / "other/scan_0.nii.gz", volume, "LPS")
    rows, _ = dataloader.read_rows(write_csv(data / "test.csv", [
        ("scans/scan_0.nii.gz", 1, "a"), ("other/scan_0.nii.gz", 1, "b")]), data / "masks")
    problem, = dataloader.check_patients(rows, [])
    assert "test.csv 3행" in problem and "test.csv 2행" in problem and "마스크" in problem


def test_a_hostile_pickle_ends_the_run_with_its_row(data):
    (data / "scans/scan_0.pkl").write_bytes(pickle.dumps(Call(os.system, "touch hostile")))
    write_csv(data / "train.csv", [("scans/scan_1.nii.gz", 1, "a"), ("scans/scan_0.pkl", 1, "b")])
    assert_fails_in_one_line(train(data, code=1), "train.csv 3행", "scan_0.pkl", ".system")
    assert not (data / "hostile").exists()


@pytest.mark.parametrize("side", ["train", "val"])
def test_data_without_a_hemorrhage_is_refused(side, data):
    healthy = {"train": "scans/scan_2.nii.gz", "val": "scans/scan_101.nii.gz"}
    write_csv(data / f"{side}.csv", [(healthy[side], 0, "z")])
    assert "ich가 1인 행이 없어" in train(data, code=1).stderr


# ---- checkpoints ----

def official(tmp_path, weights, **more):
    """Write a checkpoint in the format of SAM-Med3D's training."""
    sam = create_model("SAM-Med3D", **config.MODELS["small"])
    optimizer = torch.optim.AdamW(sam.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120, 180])
    content = {"epoch": 1, "model_state_dict": weights, "optimizer_state_dict": optimizer.state_dict(),
               "lr_scheduler_state_dict": schedule.state_dict(), "losses": [0.5], "dices": [0.5], "best_loss": 0.5,
               "best_dice": 0.5, "args": argparse.Namespace(lr=8e-4, step_size=[120, 180]), "used_datas": ["a"], **more}
    path = tmp_path / "sam_med3d_turbo.pth"
    torch.save(content, path)
    return path


def test_training_starts_from_an_official_checkpoint(data, tmp_path):
    weights = create_model("SAM-Med3D", **config.MODELS["small"]).state_dict()
    path = official(tmp_path, weights)
    train(data, "--sam_checkpoint", path, "--epochs", 1, "--lr", 0)
    saved = load(data / "outputs/best_model.pth")["model_state_dict"]
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("what", ["truncated", "other sizes", "hostile", "no weights", "not finite", "absent"])
def test_an_invalid_checkpoint_is_refused_in_one_line(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = create_model("SAM-Med3D", **config.MODELS["small"]).state_dict()
    name = "mask_decoder.iou_token.weight"
    if what == "truncated":
        path = official(tmp_path, weights)
        path.write_bytes(path.read_bytes()[:100_000])
        words = []
    elif what == "other sizes":
        path = official(tmp_path, {**weights, name: torch.zeros(1, 384)})
        words = [name, "(1, 96)", "(1, 384)"]
    elif what == "hostile":
        path = official(tmp_path, weights, hook=Call(os.system, "touch hostile"))
        words = [".system"]
    elif what == "no weights":
        path, words = tmp_path / "a.pth", ["model_state_dict"]
        torch.save({"model": weights}, path)
    elif what == "not finite":
        path, words = official(tmp_path, {**weights, name: torch.full((1, 96), torch.nan)}), ["NaN"]
    else:
        path, words = tmp_path / "a.pth", ["없습니다"]
    with pytest.raises(SystemExit) as caught:
        model.build_model(settings("--sam_checkpoint", path))
    for word in (f"{path}", *words):
        assert word in caught.value.code
    assert caught.value.code.startswith("오류: ") and "\n" not in caught.value.code
    assert not Path("hostile").exists()


def test_the_full_model_has_the_size_of_the_published_sam_med3d():
    with torch.device("meta"):
        net = model.SamMed3dIch("full", 256)
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) / 1e6
              for name, part in (("all", net.sam), ("encoder", net.sam.image_encoder))}
    assert counts == {"all": pytest.approx(100.5, abs=0.1), "encoder": pytest.approx(92.9, abs=0.1)}
    assert net.low_res == 32 and net.sam.image_encoder.pos_embed.shape == (1, 8, 8, 8, 768)


# ---- --test, --help, the demo's data ----

def test_system_check_without_data_names_what_is_missing(tmp_path):
    done = run(TRAIN, "--test", "--model_size", "small", "--val_csv", "val.csv", cwd=tmp_path, code=1)
    lines = done.stdout.splitlines()
    assert any(line.startswith("✓ 장치") for line in lines) and any(line.startswith("✓ 학습 1회") for line in lines)
    for start in ("✗ --train_csv: --train_csv 옵션이 없습니다", "✗ --val_csv: 파일이 없습니다: val.csv",
                  "✗ --mask_dir: --mask_dir 옵션이 없습니다", "✗ 데이터"):
        assert any(line.startswith(start) for line in lines), start
    assert not done.stderr


def test_system_check_skips_the_training_step_if_memory_is_too_small(tmp_path):
    done = run(TRAIN, "--test", "--model_size", "small", cwd=tmp_path, code=1,
               before="import utils; utils.free_gigabytes = lambda device: 0.4")
    assert any(line.startswith("✗ 학습 1회: 메모리가 0.4 GB") for line in done.stdout.splitlines())


def test_mps_without_transposed_convolutions_is_not_chosen(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for version, chosen in (("2.7.1", "cpu"), ("2.8.0", "mps"), ("2.14.1", "mps")):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        for requested in ("auto", "mps"):
            assert utils.choose_device.__wrapped__(requested) == chosen
            assert ("ConvTranspose3d" in capsys.readouterr().out) == (chosen == "cpu")


def test_free_memory_respects_the_limit_of_a_container(monkeypatch):
    files = {"memory.max": "3000000000", "memory.current": "1500000000",
             "memory.stat": "anon 1\ninactive_file 500000000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    monkeypatch.setattr(utils.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=16e9))
    assert utils.free_gigabytes("cpu") == 2.0
    files["memory.max"] = "max"
    assert utils.free_gigabytes("cpu") == 16.0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_system_check_with_data_passes_on_any_terminal(encoding, data):
    done = run(TRAIN, "--test", *DATA_FLAGS, *SMALL, cwd=data, before=(
        f"[stream.reconfigure(encoding={encoding!r}, errors='strict') for stream in (sys.stdout, sys.stderr)]"))
    assert sum(line.startswith("✓" if encoding == "utf-8" else "? ") for line in done.stdout.splitlines()) == 10
    assert not done.stderr
    assert not (data / "outputs/latest_model.pth").exists()


def test_missing_required_flags_are_named(tmp_path):
    done = run(TRAIN, "--train_csv", "a.csv", cwd=tmp_path, code=2)
    assert "--val_csv, --mask_dir" in done.stderr


@pytest.mark.parametrize("window", ["foo", "40", "1,2,3", "40,0", "nan,80", "40,x"])
def test_an_invalid_window_is_a_usage_error_that_shows_the_valid_forms(window, capsys):
    with pytest.raises(SystemExit):
        config.parse_args(["--test", "--window", window])
    assert f"argument --window: {window}: brain, none, 또는 '레벨,폭'" in capsys.readouterr().err


def test_window_accepts_a_name_none_or_level_and_width():
    windows = [config.parse_args(["--test", f"--window={text}"]).window for text in ("brain", "none", "-600,1500")]
    assert windows == [(40, 80), None, (-600, 1500)]


def test_the_flags_have_the_documented_defaults():
    args = config.parse_args(["--test"])
    expected = {"epochs": 200, "batch_size": 2, "lr": 1e-4, "weight_decay": 1e-4, "patience": 15,
                "gradient_accumulation_steps": 4, "max_grad_norm": 1.0, "visual_tokens": 256, "window": (40, 80),
                "spacing": 1.5, "image_size": 128, "use_mixed_precision": False, "freeze_encoder": False,
                "use_gradient_checkpointing": False, "use_wandb": False, "log_images": False,
                "scheduler_type": "reduce_on_plateau", "output_dir": Path("outputs")}
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_synthetic_ct_data_set_is_valid_and_reproducible(tmp_path):
    for folder in ("one", "other"):
        run("extras/demo/draw_ich_dataset.py", "--train", 6, "--val", 6, "--output", tmp_path / folder, cwd=tmp_path)
    one = tmp_path / "one"
    train_rows, problems = dataloader.read_rows(one / "train.csv", one / "masks")
    val_rows, more = dataloader.read_rows(one / "val.csv", one / "masks")
    assert not problems + more + dataloader.check_patients(train_rows, val_rows)
    rows = train_rows + val_rows
    assert {dataloader.suffix_of(row.path) for row in rows} == {".nii.gz", ".npy", ".pkl"}
    assert len({row.patient_id for row in rows}) == 12 < len(rows) and {row.ich for row in rows} == {0, 1}
    assert not dataloader.Volumes(rows, settings()).check("", 1, keep=False)[0]
    for path in one.rglob("*.*"):
        if not path.name.endswith(".gz"):  # gzip writes the time
            assert path.read_bytes() == (tmp_path / "other" / path.relative_to(one)).read_bytes()


@pytest.mark.parametrize("foreign", ["volumes/mine.nii.gz", "masks/other/patient_001_0.nii.gz", "notes.txt"])
def test_the_synthetic_ct_data_set_replaces_no_other_files(foreign, tmp_path):
    path = tmp_path / "mine" / foreign
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    flags = ("--train", 1, "--val", 1, "--output")
    done = run("extras/demo/draw_ich_dataset.py", *flags, tmp_path / "mine", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, str(path.relative_to(tmp_path)).split("/")[1])
    assert [path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [b"precious"]
    path.unlink()
    for _ in range(2):  # an empty folder, then its own files
        run("extras/demo/draw_ich_dataset.py", *flags, tmp_path / "own", cwd=tmp_path)

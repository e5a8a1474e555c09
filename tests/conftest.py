"""Helpers of the tests: run a script as a user does, on a small SAM 2 and on small drawn images."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SMALL_CFG = ROOT / "demo" / "sam2_demo.yaml"  # the demo's model; here with random weights


def run(script, *arguments, cwd, env=None, code=0, timeout=120):
    """Run a script of the project in `cwd`; assert its exit code; return the finished process.

    env: variables to set; None takes one away.
    """
    variables = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "2", **(env or {})}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, timeout=timeout,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True, encoding="utf-8")
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def assert_fails_in_one_line(done, *words):
    """The failure of a finished process is one line, without a traceback, that holds all `words`."""
    line, = done.stderr.strip().splitlines()
    assert line.startswith("오류: ")
    for word in words:
        assert word in line


def write_image(path, image):
    """Write an array as the format of the path's suffix (BGR for colour)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def draw_pair(number, height=60, width=80):
    """A bright ellipse on a dark noisy ground: (uint8 H x W x 3, uint8 mask H x W of 0 and 255)."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(rng.integers(25, width - 25)), int(rng.integers(20, height - 20)))
    cv2.ellipse(mask, centre, (18, 12), int(rng.integers(180)), 0, 360, 255, -1)
    image[mask > 0] = (90, 160, 220)
    return image, mask


def make_data(folder, train=6, val=4):
    """Write data/ as prepare_data.py would, below `folder`."""
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for number in numbers:
            image, mask = draw_pair(number)
            write_image(folder / "data" / "images" / split / f"pair_{number:03}.png", image)
            write_image(folder / "data" / "masks" / split / f"pair_{number:03}.png", mask)
    return folder


def save_small_model(path, seed):
    torch.manual_seed(seed)
    model = instantiate(OmegaConf.load(SMALL_CFG).model, _recursive_=True)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A small SAM 2 with random weights, saved in the official form."""
    return save_small_model(tmp_path_factory.mktemp("weights") / "small.pt", seed=0)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, weights):
    """A folder in which train_sam2_proper.py has run; (folder, finished process)."""
    folder = make_data(tmp_path_factory.mktemp("trained"))
    done = run("train_sam2_proper.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               "--iterations", 25, "--save-every", 10, "--lr", "1e-3", cwd=folder)
    return folder, done

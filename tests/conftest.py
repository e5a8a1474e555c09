"""Helpers of the tests: run a script as a user does, on a small SAM 2 and on small drawn images."""

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SMALL_CFG = ROOT / "demo" / "sam2_demo.yaml"  # the demo's model; here with random weights
MODEL = ("--model-cfg", SMALL_CFG, "--device", "cpu")


torch.set_num_threads(1)  # as in the scripts below: sums in another order differ in their bits
if not hasattr(signal, "SIGKILL"):
    signal.SIGKILL = 9  # on Windows, where the tests that name it are skipped: see ForkServer.run
ENV = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


class ForkServer:
    """Client of tests/fork_server.py, which preloads large packages and `modules`; started at the first job."""

    def __init__(self, *modules):
        self.modules, self.process = modules, None

    def run(self, argv, cwd, env, timeout, before=""):
        if sys.platform != "linux":  # macOS's own libraries may crash after a fork
            pytest.skip("the script is changed before it starts, which takes a fork")
        if not self.process:
            own = {name: value for name, value in ENV.items() if name != "MPLBACKEND"}
            self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "fork_server.py"), *self.modules],
                                            env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
                                            start_new_session=True)
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            job = {"argv": argv, "cwd": str(cwd), "env": env, "stdout": str(out), "stderr": str(err),
                   "before": before}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            watchdog = threading.Timer(timeout, os.killpg, (self.process.pid, signal.SIGKILL))
            watchdog.start()
            answer = self.process.stdout.readline()
            watchdog.cancel()
            if not answer:
                self.process = None  # the next run starts another
            assert answer, f"no answer in {timeout} s"
            return subprocess.CompletedProcess(argv, int(answer), out.read_text("utf-8"), err.read_text("utf-8"))


FORK_SERVER = ForkServer()


def run(script, *arguments, cwd, env=None, code=0, timeout=600, before="", server=FORK_SERVER):
    """Run a script of the project in `cwd`; assert its exit code; return the finished process.

    env: variables to set; None removes one. On Linux the process is forked from one that has imported the large
    packages, except if one of the variables is read by Python at its start. before: code that the fork runs first;
    on other systems the test is skipped. timeout: only ends a run that hangs.
    """
    argv = [str(ROOT / script), *map(str, arguments)]
    variables = {name: value for name, value in {**ENV, **(env or {})}.items() if value is not None}
    if (before or sys.platform == "linux") and not any(name.startswith("PYTHON") for name in env or {}):
        done = server.run(argv, cwd, variables, timeout, before)
    else:
        assert not before, "only a forked process does this"
        done = subprocess.run([sys.executable, *argv], cwd=cwd, timeout=timeout, env=variables,
                              capture_output=True, encoding="utf-8")
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def signal_at(text, number):
    """Code for run(before=...): the process sends itself a signal as soon as it has printed `text`."""
    return f"""
def print_and_signal(printed, write=sys.stdout.write):
    count = write(printed)
    if {text!r} in printed:
        sys.stdout.flush()
        os.kill(os.getpid(), {int(number)})
    return count
sys.stdout.write = print_and_signal"""


def assert_fails_in_one_line(done, *words):
    """Assert that a finished process failed with one line, without a traceback, that contains all `words`."""
    line, = done.stderr.strip().splitlines()
    assert line.startswith("오류: ")
    for word in words:
        assert word in line


@contextlib.contextmanager
def kill_if_it_hangs(process, seconds=300):
    """Kill `process` and fail if the body takes longer: a test that waits forever shows no message and blocks CI."""
    is_hanging = threading.Event()
    watchdog = threading.Timer(seconds, lambda: (is_hanging.set(), process.kill()))
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        assert not is_hanging.is_set(), f"no answer in {seconds} s: the process was killed"


def display_width(text):
    """Columns that `text` takes on a terminal: a Korean letter takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def read_rows(path):
    """The rows of a CSV file, a list of dicts."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_image(path, image):
    """Write an array in the format of the path's suffix (BGR for color)."""
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


def make_visible(checkpoint):
    """Raise the object score, because a model with random weights often predicts that no object is visible."""
    weights = torch.load(checkpoint, weights_only=True)
    weights["model"]["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 10
    torch.save(weights, checkpoint)
    return checkpoint


@pytest.fixture(scope="session")
def visible(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("visible") / "visible.pt"
    path.write_bytes(weights.read_bytes())
    return make_visible(path)


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


def require_tools(purpose, *tools, module):
    """Skip the test, in CI on Linux fail, if a program or a Python module is missing."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    missing += [] if importlib.util.find_spec(module) else [module]
    if missing:
        reason = f"{purpose} needs {', '.join(missing)}"
        assert sys.platform != "linux" or not os.environ.get("CI"), reason
        pytest.skip(reason)


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, driven by selenium."""
    require_tools("the window in a browser", "chromium", "chromedriver", module="selenium")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,900",
                 f"user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def screen(tmp_path):
    """A virtual screen with a window manager: the value for DISPLAY."""
    require_tools("the real window", "Xvfb", "openbox", "xdotool", module="tkinter")
    read, write = os.pipe()
    xvfb = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x720x24",
                             "-dpi", "96"], pass_fds=[write],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        display = f":{pipe.readline().strip()}"
    ready = tmp_path / "openbox is ready"
    manager = subprocess.Popen(["openbox", "--startup", f"touch '{ready}'"], env={**os.environ, "DISPLAY": display},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with kill_if_it_hangs(manager):
        while not ready.exists():
            assert manager.poll() is None and xvfb.poll() is None
            time.sleep(0.01)
    yield display
    for process in (manager, xvfb):
        process.terminate()
        process.wait()

"""Training, comparison and prediction use nothing that Apple's GPU (MPS) lacks, as far as a CPU can tell.

| tests | subject |
|---|---|
| scripts | a training step, a validation, a comparison, a prediction |
| copies | finished before the source is freed |
| the check itself | what MPS lacks is found |
"""

from unittest import mock

import numpy as np
import pytest
import torch
from as_on_mps import AsOnMPS, operators_that_mps_lacks
from conftest import ROOT, SMALL_CFG, run

import train_sam2_proper

LACKING = operators_that_mps_lacks()


def operators_of(script, *arguments, cwd):
    """Run a script as on MPS; returns the names of the operators that it used."""
    watch = f"sys.path.append({str(ROOT / 'tests')!r})\nimport as_on_mps\nas_on_mps.watch({LACKING})"
    done = run(script, "--model-cfg", SMALL_CFG, "--device", "cpu", *arguments, cwd=cwd, before=watch)
    return set(done.stdout.splitlines()[-1].removeprefix("operators: ").split())


@pytest.mark.parametrize("flags", [(), ("--recipe", "strongest", "--workers", 0)], ids=["reference", "strongest"])
def test_a_training_step_and_a_validation_work_on_mps(data, weights, flags):
    operators = operators_of("train_sam2_proper.py", "--checkpoint", weights, *flags, "--iterations", 1, cwd=data)
    assert {"aten::convolution_backward", "aten::native_layer_norm_backward"} <= operators
    assert (data / "output/sam2_best.pt").is_file()


def test_a_comparison_works_on_mps(data, weights):
    operators = operators_of("compare_models.py", "--checkpoint", weights, "--finetuned", weights, "--num-images", 1,
                             cwd=data)
    assert "aten::convolution" in operators


def test_segmenting_an_image_works_on_mps(data, weights):
    operators = operators_of("test_my_image.py", "--checkpoint", weights, "--original", "--image",
                             "data/images/val/pair_100.png", "--point", "40,30", "--box", "10,10,60,50", "--refine", 1,
                             cwd=data)
    assert "aten::convolution" in operators


def test_copies_to_mps_are_waited_for():
    """PyTorch issue 189690: such a copy may read memory that has been freed."""
    for name, waits in (("cuda", False), ("mps", True), ("cpu", True)):
        tensor = mock.Mock()
        train_sam2_proper.to_device(tensor, torch.device(name))
        tensor.to.assert_called_once_with(torch.device(name), non_blocking=not waits)
    scripts = [path for folder in (".", "extras", "extras/sam_med3d_ich") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 20
    assert not [path for path in scripts if "non_blocking=True" in path.read_text(encoding="utf-8")]


def test_float64_and_operators_that_mps_lacks_are_detected():
    numbers = np.ones((2, 2))
    with AsOnMPS(LACKING) as mode:
        assert torch.as_tensor(numbers, dtype=torch.float32, device="cpu").dtype == torch.float32
        with pytest.raises(AssertionError, match="float64 in aten::_to_copy"):
            torch.from_numpy(numbers).to("cpu").float()
        with pytest.raises(AssertionError, match="float64 in aten::ones"):
            torch.ones(2, dtype=torch.float64)
        with pytest.raises(AssertionError, match="float64 in aten::sum"):
            torch.ones(2).sum(dtype=torch.float64)
        with pytest.raises(AssertionError, match="MPS has no aten::_scaled_dot_product_flash_attention_for_cpu"):
            torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4))
    assert "aten::ones" in mode.seen
    assert not {"aten::add.Tensor", "aten::add.out", "aten::convolution", "aten::linear"} & LACKING

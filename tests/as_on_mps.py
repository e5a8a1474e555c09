"""Fails where Apple's GPU (MPS) would, as far as a CPU can tell: see AsOnMPS. Not a test; tests/test_mps.py uses it."""

import atexit
import contextlib
from pathlib import Path

import torch
import torchgen
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey


def operators_that_mps_lacks():
    """Names such as "aten::add.Tensor" of the operators that have neither a kernel for MPS nor a decomposition.

    Source: native_functions.yaml of the installed PyTorch, which ships with torchgen.
    """
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    kernels = [parsed.backend_indices[key] for key in (
        DispatchKey.MPS, DispatchKey.CompositeImplicitAutograd, DispatchKey.CompositeExplicitAutograd,
        DispatchKey.CompositeExplicitAutogradNonFunctional)]
    functions = {str(function.func.name): function for function in parsed.native_functions}
    return {f"aten::{name}" for name, function in functions.items()
            if not any(index.has_kernel(functions[str(function.structured_delegate or name)]) for index in kernels)}


class AsOnMPS(TorchDispatchMode):
    """Fails at a float64 tensor and at an operator in `lacking`; `seen`: the names of the operators so far.

    The scripts set PYTORCH_ENABLE_MPS_FALLBACK=1, with which an operator that MPS lacks runs on the CPU: slow, but no
    error. A float64 tensor is an error. NumPy's float64 may enter through one call that gives both the dtype and the
    device, as in torch.as_tensor(numbers, dtype=torch.float32, device=device): MPS converts before it copies
    (copy_to_mps_ in PyTorch's Copy.mm). Complex tensors of double precision count as float64.
    """

    def __init__(self, lacking):
        super().__init__()
        self.lacking, self.seen = lacking, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result, name = function(*arguments, **keywords), function.name()
        self.seen.add(name)
        assert name not in self.lacking, f"MPS has no {name}"
        if name != "aten::lift_fresh":  # a tensor that has just been made from NumPy's or Python's numbers
            converts = name == "aten::_to_copy" and {"dtype", "device"} <= keywords.keys()
            tensors = tree_leaves(result if converts else (arguments, keywords, result))
            assert not any(isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128)
                           for tensor in tensors), f"float64 in {name}"
        return result


def watch(lacking):
    """Check operations as on MPS until the process ends, then print the names of the operators used."""
    to_the_end = contextlib.ExitStack()
    to_the_end.enter_context(sdpa_kernel(SDPBackend.MATH))  # not the attention kernel that only the CPU has
    mode = to_the_end.enter_context(AsOnMPS(lacking))
    atexit.register(to_the_end.close)
    to_the_end.callback(lambda: print("operators:", *sorted(mode.seen)))

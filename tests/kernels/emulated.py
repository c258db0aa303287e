"""What tests of the CUDA kernels share: kernels that run on this CPU, and small problems for them."""

from __future__ import annotations

import warnings
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.harness import build_ops, ops_unavailable
from tests.cuda_on_cpu.problems import Problem, problem, visible_keys
from vargpt.kernels import cuda

SIDES = (1, 2, 3, 5)
DTYPES = [torch.bfloat16, torch.float16]
no_emulation = pytest.mark.skipif(ops_unavailable() is not None, reason=f"no emulated kernels: {ops_unavailable()}")
ON_GPU = cuda.kernels.missing is None and torch.cuda.is_available()
DEVICES = [pytest.param("cpu", marks=no_emulation), *(["cuda"] if ON_GPU else [])]


@lru_cache(maxsize=1)
def emulated_kernels() -> cuda.Kernels:
    with warnings.catch_warnings():  # kernels that were built refuse tensors on CPUs, and are overridden for them
        warnings.simplefilter("ignore")
        return cuda.load(str(build_ops()), "cpu")


def small(dtype: torch.dtype = torch.bfloat16, width: int = 64, cosine: bool = True) -> Problem:
    return problem(dtype, width, visible_keys(SIDES), batch=2, key_heads=2, share=2, cosine=cosine)


def error(output: Tensor, exact: Tensor) -> float:
    return float((output.double().cpu() - exact).abs().max())


def two_units(dtype: torch.dtype, exact: Tensor) -> float:
    """Outputs of 16 bits may be off by these: weights and output are rounded once each."""
    return 2 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one further in memory."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

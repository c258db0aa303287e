"""The backend ``cuda`` under torch.compile, in one piece: ``python -m tests.kernels.compiled BACKEND DEVICE``.

A process of its own, since the checks of shapes under pytest cannot be compiled. Prints the largest difference to what
is computed without torch.compile.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from tests.kernels.emulated import emulated_kernels
from tests.models import numbers
from vargpt.kernels import attention, cuda, using
from vargpt.scales import ScaleSchedule

LIMITS = ScaleSchedule((1, 2, 3)).visible_limits()


def block(x_BLC: Tensor, temperature: Tensor) -> Tensor:
    """As in the visual decoder: slices of a fused projection go in, rows for the next projection come out."""
    batch, length, _ = x_BLC.shape
    q, k, v = x_BLC.view(batch, length, 3, -1, 64).permute(2, 0, 3, 1, 4)
    y = attention(q, k, v, limits=LIMITS, cosine=temperature.exp())
    return y.transpose(1, 2).reshape(batch, length, -1) * math.pi


def main(backend: str, device: str) -> None:
    if device == "cpu":
        cuda.kernels = emulated_kernels()
    x, temperature = numbers(2, 14, 3 * 2 * 64).bfloat16().to(device), torch.tensor([0.5, 1.5], device=device)
    leaves = [x.requires_grad_(), temperature.requires_grad_()]
    with using("cuda"):
        outputs = [run(*leaves) for run in (torch.compile(block, fullgraph=True, backend=backend), block)]
    gradients = [torch.autograd.grad(y, leaves, numbers(*y.shape, seed=1).to(y)) for y in outputs]
    pairs = zip(*([y, *found] for y, found in zip(outputs, gradients, strict=True)), strict=True)
    print(max(float((ours - expected).detach().abs().max()) for ours, expected in pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])

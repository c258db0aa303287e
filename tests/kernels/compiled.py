"""The backend ``cuda`` under torch.compile, in one piece: ``python -m tests.kernels.compiled BACKEND DEVICE``.

A process of its own, since the checks of shapes under pytest cannot be compiled. Prints the largest difference to what
is computed without torch.compile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tests.kernels.emulated import emulated_kernels
from tests.models import numbers
from vargpt.kernels import KVCache, attention, cuda, using
from vargpt.scales import ScaleSchedule

SCHEDULE = ScaleSchedule((1, 2, 3))
LIMITS, SPANS = SCHEDULE.visible_limits(), [SCHEDULE.span(scale) for scale in range(len(SCHEDULE))]
BATCH, HEADS, LENGTH, WIDTH = 2, 2, SCHEDULE.total, 64


def heads_of(x_BLC: Tensor) -> Tensor:
    """Queries, keys and values, as in the models: slices of a fused projection."""
    batch, length, _ = x_BLC.shape
    return x_BLC.view(batch, length, 3, -1, WIDTH).permute(2, 0, 3, 1, 4)


def rows_of(y_BHLK: Tensor) -> Tensor:
    """And what comes out, for the next projection."""
    return y_BHLK.transpose(1, 2).flatten(2) * math.pi


def block(x_BLC: Tensor, temperature: Tensor) -> Tensor:
    """As a visual decoder learns."""
    q, k, v = heads_of(x_BLC)
    return rows_of(attention(q, k, v, limits=LIMITS, cosine=temperature.exp()))


def scale_by_scale(x_BLC: Tensor, temperature: Tensor, cache: KVCache) -> Tensor:
    """As it draws."""
    rows = []
    for span in SPANS:
        q, k, v = heads_of(x_BLC[:, span])
        rows.append(rows_of(attention(q, k, v, cosine=temperature.exp(), cache=cache)))
        cache.advance(q.shape[2])
    return torch.cat(rows, 1)


def token_by_token(x_BLC: Tensor, angles_LK: Tensor, cache: KVCache) -> Tensor:
    """As a language model answers."""
    rows = []
    for token in range(LENGTH):
        q, k, v = heads_of(x_BLC[:, token : token + 1])
        angles = angles_LK[None, None, token : token + 1]
        rows.append(rows_of(attention(q, k, v, rotary=(angles.cos(), angles.sin()), cache=cache)))
        cache.advance(1)
    return torch.cat(rows, 1)


def differences(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Iterator[Tensor]:
    for x, y in zip(ours, expected, strict=True):
        yield (x.float() - y.float()).detach().abs().max()


def main(backend: str, device: str) -> None:
    if device == "cpu":
        cuda.kernels = emulated_kernels()
    x = numbers(BATCH, LENGTH, 3 * HEADS * WIDTH).bfloat16().to(device)
    temperature, angles = torch.tensor([0.5, 1.5], device=device), numbers(LENGTH, WIDTH, seed=2).to(device)

    def learned(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), temperature.clone().requires_grad_()]
        y = run(*leaves)
        return [y, *torch.autograd.grad(y, leaves, numbers(*y.shape, seed=1).to(y))]

    @torch.no_grad()
    def drawn(run: Callable[..., Tensor], given: Tensor) -> list[Tensor]:
        cache = KVCache(1, BATCH, HEADS, LENGTH, WIDTH, device=x.device, dtype=x.dtype)
        return [run(x, given, cache), *cache.with_room(0, 0)]

    def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(run, fullgraph=True, backend=backend)

    with using("cuda"):
        found = [*differences(learned(compiled(block)), learned(block))]
        for run, given in ((scale_by_scale, temperature), (token_by_token, angles)):
            found += differences(drawn(compiled(run), given), drawn(run, given))
    print(float(torch.stack(found).max()))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The scale schedule: one source of the sizes, offsets and visibility of next-scale tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class ScaleSchedule:
    """Side lengths, in tokens, of the token maps drawn one after the other (VAR, section 3.2).

    ``patch_nums = (1, 2, 3)`` means a 1x1 map, then 2x2, then 3x3: S = 3 scales, L = 14 tokens.
    The last side is the side of the latent that the image tokenizer decodes.
    """

    patch_nums: tuple[int, ...]

    def __init__(self, patch_nums: Sequence[int]) -> None:
        sides = tuple(int(p) for p in patch_nums)
        if not sides or any(p < 1 for p in sides) or any(a > b for a, b in pairwise(sides)):
            raise ValueError(f"patch_nums must be positive and must not decrease, for example (1, 2, 4), not {sides}")
        object.__setattr__(self, "patch_nums", sides)

    def __len__(self) -> int:
        return len(self.patch_nums)

    @property
    def latent_side(self) -> int:
        return self.patch_nums[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale (N_s)."""
        return tuple(p * p for p in self.patch_nums)

    @property
    def total(self) -> int:
        """Tokens of all scales (L)."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each scale, and L at the end: scale s is ``offsets[s]:offsets[s + 1]``."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return tuple(ends)

    def span(self, scale: int) -> slice:
        """Where the tokens of one scale lie among all L."""
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def position(self, scale: int) -> float:
        """s / (S - 1): 0 at the first scale, 1 at the last. Ramps of guidance and the choice of phi use it."""
        return scale / (len(self) - 1) if len(self) > 1 else 0.0

    def level_ids(self, device: torch.device | str | None = None) -> Int[Tensor, " L"]:
        """The scale that every token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(len(self), device=device), lengths, output_size=self.total)

    def visible_limits(self, scales: int | None = None) -> Limits:
        """Block-causal visibility of the first ``scales`` (or all): a token sees its own scale and those before."""
        ends = self.offsets[1:][:scales]
        return Limits(tuple(zip(self.lengths, ends, strict=False)))


@dataclass(frozen=True)
class Limits:
    """How many of the first keys each query sees, as runs of queries that see as many: ((queries, keys), ...).

    Plain numbers, so that who reads them waits for no device; :meth:`tensor` has them a query each.

    Raises:
        ValueError: limits that decrease, or a run without queries or keys.
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        keys = [keys for _, keys in self.runs]
        if not self.runs or min(min(run) for run in self.runs) < 1 or any(a > b for a, b in pairwise(keys)):
            raise ValueError(f"limits must be positive and must not decrease, not {keys} for runs {self.runs}")

    @classmethod
    def of(cls, limits: Sequence[int]) -> Limits:
        """From one limit a query."""
        return cls(tuple((len(list(run)), keys) for keys, run in groupby(int(limit) for limit in limits)))

    @property
    def queries(self) -> int:
        return sum(queries for queries, _ in self.runs)

    def tensor(self, device: torch.device | str | None = None) -> Int[Tensor, " L"]:
        """One limit a query, as int32, which kernels read; the same tensor at every call."""
        # torch.compile sees through a cache, and warns that it does. A mode in which tensors are fakes can read no real
        # one, and leaves fakes that nothing else can read.
        plain = not torch.compiler.is_compiling() and type(torch.empty(0)) is Tensor
        return (_cached_limits_tensor if plain else _limits_tensor)(self, torch.device(device or "cpu"))


def _limits_tensor(limits: Limits, device: torch.device) -> Tensor:
    each = [keys for queries, keys in limits.runs for _ in range(queries)]
    return torch.tensor(each, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _cached_limits_tensor(limits: Limits, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what inference mode makes, training could not save for its backward pass
        return _limits_tensor(limits, device)

"""KVCache: what was appended is what is read, in every layer; copies are copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import numbers
from vargpt.kernels import KVCache

SHAPE = (2, 3, 1, 4)  # layers, rows, heads, head width


def cache_of(length: int) -> KVCache:
    layers, rows, heads, width = SHAPE
    return KVCache(layers, rows, heads, length, width, device=torch.device("cpu"), dtype=torch.float32)


def fill(cache: KVCache, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    read = [cache.append(layer, keys[layer], values[layer]) for layer in range(SHAPE[0])]
    cache.advance(keys.shape[3])
    return read


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_every_layer_reads_all_it_was_given(chunks: list[int], spare: int) -> None:
    layers, rows, heads, width = SHAPE
    keys, values = (numbers(layers, rows, heads, sum(chunks), width, seed=seed) for seed in (0, 1))
    cache, end = cache_of(sum(chunks) + spare), 0
    for chunk in chunks:
        start, end = end, end + chunk
        for layer, (k, v) in enumerate(fill(cache, keys[..., start:end, :], values[..., start:end, :])):
            assert torch.equal(k, keys[layer, ..., :end, :])
            assert torch.equal(v, values[layer, ..., :end, :])
        assert cache.length == end


def test_a_selection_is_a_copy_with_rows_in_any_order() -> None:
    first, more = numbers(*SHAPE[:3], 2, SHAPE[3]), numbers(*SHAPE[:3], 1, SHAPE[3], seed=1)
    cache = cache_of(4)
    fill(cache, first, -first)
    rows = torch.tensor([2, 0, 2])
    copy = cache.select(rows)
    assert (copy.length, copy.capacity) == (2, 4)
    fill(cache, 0 * more, 0 * more)
    for layer, (k, v) in enumerate(fill(copy, more, -more)):
        expected = torch.cat((first[layer, rows], more[layer]), dim=2)
        assert torch.equal(k, expected)
        assert torch.equal(v, -expected)
    for k, _ in fill(cache, more, more):
        assert not k[:, :, 2].any(), "writing to the copy changed the original"


def test_a_full_cache_says_so() -> None:
    cache = cache_of(3)
    fill(cache, numbers(*SHAPE[:3], 2, SHAPE[3]), numbers(*SHAPE[:3], 2, SHAPE[3]))
    with pytest.raises(ValueError, match="holds 3 tokens; token 4 does not fit"):
        cache.append(0, numbers(*SHAPE[1:3], 2, SHAPE[3]), numbers(*SHAPE[1:3], 2, SHAPE[3]))

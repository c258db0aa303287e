"""Weights in another order in memory are the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings

from tests.models import close, llm_sizes, small_llm, words
from vargpt.llm import columns_first


@settings(max_examples=30)
@given(llm_sizes)
@torch.no_grad()
def test_another_order_in_memory_gives_the_same_states(sizes: dict[str, Any]) -> None:
    llm = small_llm(**sizes)
    other = columns_first(copy.deepcopy(llm))
    ids = words(2, 9)
    expected = llm(llm.embed(ids))
    close(other(other.embed(ids)), expected, 1e-5)
    cache = other.new_cache(2, 9)
    for token in range(9):
        state = other(other.embed(ids[:, token : token + 1]), cache=cache)[:, 0]
        close(state, expected[:, token])
        close(other.logits(state), llm.logits(expected[:, token]))


def test_names_shapes_and_values_stay() -> None:
    llm = small_llm()
    other = columns_first(copy.deepcopy(llm))
    before, after = llm.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if not after[name].is_contiguous()} == {
        "head.weight",
        *(f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn.q", "attn.out", "mlp.gate", "mlp.up")),
    }

"""Folded conditions give what the Linears gave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.models import close, numbers, small_var, var_sizes
from vargpt.var import fold_conditions


@settings(max_examples=40)
@given(var_sizes)
@torch.no_grad()
def test_a_folded_decoder_gives_the_same_logits(sizes: dict[str, Any]) -> None:
    var = small_var(**sizes)
    folded = fold_conditions(copy.deepcopy(var))
    condition = var.condition(torch.tensor([var.null_class, var.image_class, var.null_class]))
    x = numbers(3, var.schedule.total, var.width)
    close(folded(x, condition), var(x, condition), 1e-5)
    caches = var.new_cache(3), folded.new_cache(3)
    for scale in range(len(var.schedule)):
        part = x[:, var.schedule.span(scale)]
        ours, expected = folded(part, condition, cache=caches[1]), var(part, condition, cache=caches[0])
        close(ours, expected, 1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_the_linears_are_gone_and_every_other_name_stays(shared: bool) -> None:
    var = small_var(shared_adaln=shared)
    folded = fold_conditions(copy.deepcopy(var))
    gone = var.state_dict().keys() - folded.state_dict().keys()
    assert gone
    assert all("ada" in name for name in gone)
    assert not [name for name in folded.state_dict() if "ada" in name]
    assert not folded.state_dict().keys() - var.state_dict().keys()


@torch.no_grad()
def test_only_folded_classes_are_known() -> None:
    var = small_var()
    x, other = numbers(1, var.schedule.total, var.width), var.condition(torch.tensor([0]))
    expected = var(x, other)
    with pytest.raises(ValueError, match="knows only the conditions it was folded for"):
        fold_conditions(copy.deepcopy(var))(x, other)
    close(fold_conditions(copy.deepcopy(var), [0])(x, other), expected, 1e-5)
    with pytest.raises(ValueError, match="already folded"):
        fold_conditions(fold_conditions(var))

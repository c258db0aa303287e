"""ScaleSchedule against its definition, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vargpt.scales import Limits, ScaleSchedule

patch_nums = st.lists(st.integers(1, 7), min_size=1, max_size=8).map(sorted)


@given(patch_nums)
def test_tokens_lie_scale_after_scale(sides: list[int]) -> None:
    schedule = ScaleSchedule(sides)
    owners = [scale for scale, side in enumerate(sides) for _ in range(side * side)]  # written out, token by token
    assert len(schedule) == len(sides)
    assert schedule.latent_side == sides[-1]
    assert schedule.total == len(owners) == sum(schedule.lengths)
    assert schedule.level_ids().tolist() == owners
    assert schedule.offsets == (*(owners.index(scale) for scale in range(len(sides))), len(owners))
    for scale, side in enumerate(sides):
        assert owners[schedule.span(scale)] == [scale] * side * side == [scale] * schedule.lengths[scale]


@given(patch_nums)
def test_a_token_sees_its_own_and_all_earlier_scales(sides: list[int]) -> None:
    schedule = ScaleSchedule(sides)
    owners = schedule.level_ids()
    seen = torch.arange(schedule.total) < schedule.visible_limits().tensor()[:, None]
    assert torch.equal(seen, owners <= owners[:, None])
    for scales in range(1, len(sides) + 1):
        first = schedule.offsets[scales]
        assert torch.equal(schedule.visible_limits(scales).tensor(), schedule.visible_limits().tensor()[:first])


@given(patch_nums)
def test_positions_run_from_0_to_1(sides: list[int]) -> None:
    schedule = ScaleSchedule(sides)
    positions = [schedule.position(scale) for scale in range(len(schedule))]
    assert positions == [s / max(len(sides) - 1, 1) for s in range(len(sides))]
    assert positions[0] == 0.0
    assert positions[-1] == (1.0 if len(sides) > 1 else 0.0)


def test_the_released_schedule() -> None:
    schedule = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert (schedule.total, schedule.latent_side, schedule.offsets[-2]) == (680, 16, 424)


def test_equal_sides_make_equal_schedules_that_can_be_keys() -> None:
    assert ScaleSchedule([1, 2]) == ScaleSchedule((1, 2)) != ScaleSchedule((1, 3))
    first = ScaleSchedule([1, 2])
    assert first.total == 5
    assert first.offsets == (0, 1, 5)  # what is cached does not count
    assert {first: "found"}[ScaleSchedule((1, 2))] == "found"


def test_no_values_are_needed_on_the_meta_device() -> None:
    schedule = ScaleSchedule((1, 2, 3))
    assert schedule.level_ids("meta").shape == schedule.visible_limits().tensor("meta").shape == (14,)


@pytest.mark.parametrize("sides", [(), (0,), (-1, 2), (2, 1), (1, 3, 2)])
def test_sides_that_shrink_or_vanish_are_refused(sides: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="must be positive and must not decrease"):
        ScaleSchedule(sides)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9).map(sorted))
def test_limits_are_runs_of_queries_that_see_as_many_keys(limits: list[int]) -> None:
    runs = Limits.of(limits)
    assert runs.tensor().tolist() == limits
    assert runs.queries == len(limits)
    assert len(runs.runs) == len(set(limits))
    assert runs == Limits.of(limits)
    assert runs.tensor() is Limits.of(limits).tensor()  # made once


def test_limits_first_needed_in_inference_mode_can_be_saved_for_a_backward_pass() -> None:
    runs = Limits(((1, 1), (977, 978)))  # that no other test keeps
    with torch.inference_mode():
        runs.tensor()
    x = torch.ones(978, requires_grad=True)
    (x * runs.tensor()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == runs.tensor().tolist()


def test_limits_of_fake_tensors_are_fake_and_are_not_kept() -> None:
    runs = Limits(((1, 1), (978, 979)))  # that no other test keeps
    for _ in range(2):  # before the real ones are kept, and after
        with FakeTensorMode():
            assert isinstance(runs.tensor(), FakeTensor)
        assert not isinstance(runs.tensor(), FakeTensor)


@pytest.mark.parametrize("runs", [(), ((1, 0),), ((0, 1),), ((1, 2), (1, 1))])
def test_limits_that_decrease_or_hold_nothing_are_refused(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="limits must be positive and must not decrease"):
        Limits(runs)

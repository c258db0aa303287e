"""Attention: the reference against its definition written as loops, and every backend against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import close, numbers, seeds
from vargpt.kernels import attention


@dataclass
class Case:
    """Inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def run(self, backend: str = "reference") -> Tensor:
        return attention(self.q, self.k, self.v, backend=backend, **self.options)  # pyright: ignore[reportArgumentType]

    def gradients(self, backend: str) -> tuple[Tensor, ...]:
        inputs = tuple(x.clone().requires_grad_() for x in (self.q, self.k, self.v))
        y = replace(self, q=inputs[0], k=inputs[1], v=inputs[2]).run(backend)
        return torch.autograd.grad((y * numbers(*y.shape, seed=1)).sum(), inputs)


@st.composite
def cases(draw: st.DrawFn, padded: bool | None = None) -> Case:
    batch, groups, share, width = (draw(st.integers(1, n)) for n in (3, 2, 3, 6))
    keys = draw(st.integers(1, 9))
    queries = draw(st.integers(1, keys))
    options: dict[str, Any] = {}
    seen = draw(st.sampled_from(["all", "causal", "limits"]))
    if seen == "causal":
        options["causal"] = True
    elif seen == "limits":  # a query's own key at least
        limits = [draw(st.integers(keys - queries + i + 1, keys)) for i in range(queries)]
        options["limits"] = torch.tensor(limits)
    if draw(st.booleans()) if padded is None else padded:
        rows = [[draw(st.booleans()) for _ in range(keys)] for _ in range(batch)]
        options["key_mask"] = torch.tensor(rows)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.1, 1.0, 3.0]))
    seed = draw(seeds)
    return Case(
        numbers(batch, groups * share, queries, width, seed=seed),
        numbers(batch, groups, keys, width, seed=seed + 1),
        numbers(batch, groups, keys, width, seed=seed + 2),
        options,
    )


def by_definition(case: Case) -> Tensor:
    """softmax(scale q k^T) v, one query at a time, in float64."""
    q, k, v, o = case.q.double(), case.k.double(), case.v.double(), case.options
    (batch, heads, queries, width), (groups, keys) = q.shape, k.shape[1:3]
    y = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                own, g = keys - queries + i, h // (heads // groups)
                end = own + 1 if o.get("causal") else int(o["limits"][i]) if "limits" in o else keys
                seen = [j for j in range(end) if "key_mask" not in o or o["key_mask"][b, j] or j == own]
                logits = torch.stack([q[b, h, i] @ k[b, g, j] for j in seen]) * o.get("scale", width**-0.5)
                y[b, h, i] = logits.softmax(0) @ v[b, g, seen]
    return y


@settings(max_examples=60)
@given(cases())
def test_reference_is_the_definition(case: Case) -> None:
    close(case.run(), by_definition(case).float(), 1e-5)


@settings(max_examples=300)
@given(cases())
def test_sdpa_equals_the_reference(case: Case) -> None:
    close(case.run("sdpa"), case.run(), 1e-5)
    for ours, expected in zip(case.gradients("sdpa"), case.gradients("reference"), strict=True):
        close(ours, expected, 1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@given(case=cases(padded=True))
def test_rows_of_padding_stay_finite_and_are_never_read(backend: str, case: Case) -> None:
    case.options["key_mask"][0] = False
    assert case.run(backend).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in case.gradients(backend))

    mask, (queries, keys) = case.options["key_mask"], (case.q.shape[2], case.k.shape[2])
    real, padding = mask[:, None, keys - queries :, None], ~mask[:, None, :, None]  # queries; keys
    changed = replace(case, k=case.k.masked_fill(padding, 7.0), v=case.v.masked_fill(padding, -1e4))
    assert torch.equal(changed.run(backend) * real, case.run(backend) * real)


@given(st.integers(1, 9), st.data())
def test_causal_and_full_are_choices_of_the_limits(keys: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, keys))
    q, k, v = numbers(1, 2, queries, 4), numbers(1, 2, keys, 4, seed=1), numbers(1, 2, keys, 4, seed=2)
    limits = torch.arange(keys - queries, keys) + 1
    close(attention(q, k, v, causal=True), attention(q, k, v, limits=limits), 1e-6)
    close(attention(q, k, v), attention(q, k, v, limits=torch.full((queries,), keys)), 1e-6)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"limits": torch.tensor([1, 4, 4, 4])}])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference(options: dict[str, Any]) -> None:
    q, k, v = (numbers(2, 4, 4, 16, seed=i) for i in range(3))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = Case(q.to(dtype), k.to(dtype), v.to(dtype), options)
        truth = Case(rounded.q.float(), rounded.k.float(), rounded.v.float(), options).run()
        errors = []
        for backend in ("reference", "sdpa"):
            y = rounded.run(backend)
            assert y.dtype == dtype
            errors.append(float((y.float() - truth).abs().max()))
        assert errors[1] <= 2 * errors[0] + 1e-3


def test_arguments_that_contradict_each_other_are_refused() -> None:
    q, limits = numbers(1, 3, 2, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="both say what a query sees"):
        attention(q, q, q, causal=True, limits=limits)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="2 queries cannot be the last of 1 keys"):
        attention(q, q[:, :, :1], q[:, :, :1])


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_backend_is_refused() -> None:
    q = numbers(1, 1, 1, 4)
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        attention(q, q, q, backend="magic")  # pyright: ignore[reportArgumentType]

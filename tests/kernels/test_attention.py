"""Attention: the reference against its definition written as loops, and every backend against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.models import close, numbers, seeds
from vargpt.kernels import BACKENDS, KVCache, attention, using, watching
from vargpt.scales import Limits, ScaleSchedule

ON_CPUS = [name for name in BACKENDS if name not in ("flex", "cuda")]
"""Those that compute every width on a CPU, with gradients. For ``cuda`` see test_cuda.py."""
EXACT = [name for name in ON_CPUS if name != "reference"]


@dataclass
class Case:
    """Inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def run(self, backend: str = "reference") -> Tensor:
        options = {**self.options}
        if "limits" in options:  # not made in the strategy: beartype looks at random elements of what it is given
            options["limits"] = Limits.of(options["limits"])
        return attention(self.q, self.k, self.v, backend=backend, **options)

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
        limits = sorted(draw(st.integers(keys - queries + i + 1, keys)) for i in range(queries))
        options["limits"] = limits
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
                end = own + 1 if o.get("causal") else o["limits"][i] if "limits" in o else keys
                seen = [j for j in range(end) if "key_mask" not in o or o["key_mask"][b, j] or j == own]
                logits = torch.stack([q[b, h, i] @ k[b, g, j] for j in seen]) * o.get("scale", width**-0.5)
                y[b, h, i] = logits.softmax(0) @ v[b, g, seen]
    return y


@settings(max_examples=60)
@given(cases())
def test_reference_is_the_definition(case: Case) -> None:
    close(case.run(), by_definition(case).float(), 1e-5)


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=150)
@given(case=cases())
def test_backends_equal_the_reference(backend: str, case: Case) -> None:
    if backend == "scales" and ("limits" not in case.options or "key_mask" in case.options):
        with pytest.raises(ValueError, match="attention backend 'scales' cannot compute this: it"):
            case.run(backend)
        return
    close(case.run(backend), case.run(), 1e-5)
    for ours, expected in zip(case.gradients(backend), case.gradients("reference"), strict=True):
        close(ours, expected, 1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("backend", ["reference", "matmul", "sdpa"])
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
    limits = Limits.of(range(keys - queries + 1, keys + 1))
    close(attention(q, k, v, causal=True), attention(q, k, v, limits=limits), 1e-6)
    close(attention(q, k, v), attention(q, k, v, limits=Limits(((queries, keys),))), 1e-6)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"limits": [1, 4, 4, 4]}])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference(options: dict[str, Any]) -> None:
    q, k, v = (numbers(2, 4, 4, 16, seed=i) for i in range(3))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = Case(q.to(dtype), k.to(dtype), v.to(dtype), options)
        truth = Case(rounded.q.float(), rounded.k.float(), rounded.v.float(), options).run()
        errors = {}
        for backend in set(ON_CPUS) - ({"scales"} if "limits" not in options else set()):
            y = rounded.run(backend)
            assert y.dtype == dtype
            errors[backend] = float((y.float() - truth).abs().max())
        plain = errors.pop("matmul")  # rounds the logits too
        assert plain <= 4 * torch.finfo(dtype).eps
        assert all(error <= 2 * errors["reference"] + 1e-3 for error in errors.values())


@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_cosine_brings_queries_and_keys_to_length_one(heads: int, tokens: int, seed: int) -> None:
    q, k, v = (numbers(2, heads, tokens, 4, seed=seed + i) for i in range(3))
    temperature = numbers(heads, seed=seed).exp()
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    expected = attention(unit_q * temperature[:, None, None], unit_k, v, scale=1.0, backend="reference")
    close(attention(q, k, v, cosine=temperature), expected, 1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_cache_receives_the_new_keys_and_gives_all_so_far(cosine: bool) -> None:
    schedule = ScaleSchedule((1, 2, 3))
    q, k, v = (numbers(2, 3, schedule.total, 8, seed=i) for i in range(3))
    rule: dict[str, Any] = {"cosine": torch.tensor([1.0, 2.0, 9.0])} if cosine else {"scale": 0.3}
    whole = attention(q, k, v, limits=schedule.visible_limits(), backend="reference", **rule)
    cache = KVCache(2, 2, 3, schedule.total, 8, device=q.device, dtype=q.dtype)
    for scale in range(len(schedule)):
        new = [x[:, :, schedule.span(scale)] for x in (q, k, v)]
        for y in [attention(*new, cache=cache, layer=layer, **rule) for layer in range(2)]:
            close(y, whole[:, :, schedule.span(scale)], 1e-5)
        cache.advance(new[0].shape[2])


def test_the_choice_is_told_with_its_reasons() -> None:
    schedule = ScaleSchedule((1, 2, 3))
    q = numbers(1, 2, schedule.total, 4)
    with watching() as choices:
        attention(q, q, q)
        attention(q, q, q, limits=schedule.visible_limits())
        attention(q, q, q, backend="reference")
        attention(*(q.bfloat16().requires_grad_() for _ in range(3)), causal=True)
    attention(q, q, q)
    assert [choice.backend for choice in choices] == ["sdpa", "scales", "reference", "matmul"]
    assert "needs limits" in choices[0].refused["scales"]
    assert choices[2].refused == {}


def test_many_short_runs_are_one_call_with_a_mask() -> None:
    q = numbers(1, 1, 40, 4)
    with watching() as choices:
        attention(q, q, q, limits=Limits.of(range(1, 41)))
    (choice,) = choices
    assert choice.backend == "sdpa"
    assert choice.refused["scales"] == "limits in 40 runs (at most 32)"


def test_a_backend_can_be_named_for_all_calls() -> None:
    q = numbers(1, 2, 3, 4)
    with watching() as choices, using("matmul"):
        attention(q, q, q)
        attention(q, q, q, backend="sdpa")
        with using("reference"):
            attention(q, q, q)
    assert [choice.backend for choice in choices] == ["matmul", "sdpa", "reference"]
    with using("scales"), pytest.raises(ValueError, match="'scales' cannot compute this: it computes block-causal"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"), using("magic"):
        pass


def test_a_backend_is_named_for_other_threads_too() -> None:
    q = numbers(1, 2, 3, 4).requires_grad_()
    with watching() as choices, using("matmul"):
        y = checkpoint(attention, q, q, q, use_reentrant=False)
        other = Thread(target=y.sum().backward)  # as on GPUs
        other.start()
        other.join()
    assert [choice.backend for choice in choices] == ["matmul", "matmul"]
    assert q.grad is not None


def test_the_environment_names_a_backend() -> None:
    code = "import torch; from vargpt.kernels import *; q = torch.ones(1, 1, 2, 2)\n"
    code += "with watching() as choices: attention(q, q, q)\nprint(choices[0].backend)"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "VARGPT_ATTENTION": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("matmul").stdout == "matmul\n"
    assert "unknown attention backend 'magic': use one of 'reference'" in run("magic").stderr


def test_the_reference_is_in_float32_under_autocast_too() -> None:
    q = numbers(1, 2, 5, 8)
    rounded = q.bfloat16()
    expected = attention(*(rounded.float() for _ in range(3)), causal=True, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("reference", "matmul", "sdpa"):
            y = attention(q, q, q, causal=True, backend=backend)  # given in float32, as rotated queries are
            assert y.dtype == torch.bfloat16
            close(y.float(), expected, 1e-2)
        close(attention(q, q, q, causal=True, backend="reference").float(), expected.bfloat16().float(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"limits": Limits(((1, 1), (4, 5), (9, 14)))}])
@pytest.mark.parametrize("padded", [False, True])
def test_flex_equals_the_reference_forward(options: dict[str, Any], padded: bool) -> None:
    q, k, v = numbers(2, 4, 14, 16), numbers(2, 2, 14, 16, seed=1), numbers(2, 2, 14, 16, seed=2)
    if padded:
        options = {**options, "key_mask": torch.arange(14) < torch.tensor([[14], [9]])}
    close(attention(q, k, v, backend="flex", **options), attention(q, k, v, backend="reference", **options), 1e-5)


def test_flex_says_what_it_cannot_do() -> None:
    q = numbers(1, 1, 4, 16)
    with pytest.raises(ValueError, match="'flex' cannot compute this: FlexAttention has no backward pass on CPUs"):
        attention(q.requires_grad_(), q, q, backend="flex")
    with pytest.raises(ValueError, match="powers of two from 16 on, not 12"):
        attention(*(numbers(1, 1, 4, 12) for _ in range(3)), backend="flex")


def test_arguments_that_contradict_each_other_are_refused() -> None:
    q, limits = numbers(1, 3, 2, 4), Limits.of([1, 2])
    with pytest.raises(ValueError, match="both say what a query sees"):
        attention(q, q, q, causal=True, limits=limits)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="2 queries cannot be the last of 1 keys"):
        attention(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(ValueError, match="both say what logits are multiplied by"):
        attention(q, q, q, scale=1.0, cosine=torch.ones(3))
    with pytest.raises(ValueError, match="a query that is key 2 of 2 cannot see the first 1"):
        attention(q, q, q, limits=Limits.of([1, 1]))
    with pytest.raises(ValueError, match="a query that is key 2 of 2 cannot see the first 3"):
        attention(q, q, q, limits=Limits.of([1, 3]))
    with pytest.raises(ValueError, match="limits of 3 queries do not fit 2 queries"):
        attention(q, q, q, limits=Limits.of([1, 2, 3]))
    with pytest.raises(ValueError, match=r"key_mask has shape \[1, 3\], and must have \[1, 2\]"):
        attention(q, q, q, key_mask=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": (1, 2, 3, 4)}, "k_BGMK has shape [1, 2, 3, 4], and must have [2, 2, 3, 4]"),
        ({"k": (2, 2, 3, 1), "v": (2, 2, 3, 1)}, "k_BGMK has shape [2, 2, 3, 1], and must have [2, 2, 3, 4]"),
        ({"v": (2, 1, 3, 4)}, "v_BGMK has shape [2, 1, 3, 4], and must have [2, 2, 3, 4]"),
        ({"v": (2, 2, 1, 4)}, "v_BGMK has shape [2, 2, 1, 4], and must have [2, 2, 3, 4]"),
        ({"key_mask": (1, 3)}, "key_mask has shape [1, 3], and must have [2, 3]"),
        ({"cosine": (1,)}, "cosine has shape [1], and must have [4]"),
        ({"cosine": (2,)}, "cosine has shape [2], and must have [4]"),
        ({"cos": (2, 1, 1, 4)}, "cosines has shape [2, 1, 1, 4], and must have [2, 1, 3, 4]"),
        ({"sin": (3, 1, 3, 4)}, "sines has shape [3, 1, 3, 4], and must have [2, 1, 3, 4]"),
        ({"cache": (3, 2, 4)}, "the cache has shape [3, 2, 5, 4], and must have [2, 2, 5, 4]"),
        ({"cache": (2, 4, 4)}, "the cache has shape [2, 4, 5, 4], and must have [2, 2, 5, 4]"),
        ({"cache": (2, 2, 8)}, "the cache has shape [2, 2, 5, 8], and must have [2, 2, 5, 4]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused_before_a_backend_is_chosen(
    wrong: dict[str, tuple[int, ...]], message: str
) -> None:
    keys = (2, 2, 3, 4)
    q, k, v = torch.ones(2, 4, 3, 4), torch.ones(wrong.get("k", keys)), torch.ones(wrong.get("v", keys))
    options: dict[str, Any] = {}
    if "key_mask" in wrong:
        options["key_mask"] = torch.ones(wrong["key_mask"], dtype=torch.bool)
    if "cosine" in wrong:
        options["cosine"] = torch.ones(wrong["cosine"])
    if "cos" in wrong or "sin" in wrong:
        options["rotary"] = tuple(torch.ones(wrong.get(name, (1, 1, 3, 4))) for name in ("cos", "sin"))
    if "cache" in wrong:
        rows, heads, width = wrong["cache"]
        options["cache"] = KVCache(1, rows, heads, 5, width, device=q.device, dtype=q.dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(q, k, v, **options)


def test_an_unknown_backend_is_refused() -> None:
    q = numbers(1, 1, 1, 4)
    with pytest.raises(ValueError, match="unknown attention backend 'magic': use one of 'reference', 'matmul'"):
        attention(q, q, q, backend="magic")

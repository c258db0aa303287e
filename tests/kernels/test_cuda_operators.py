"""The operators of the CUDA kernels: around emulated kernels on a CPU, and around the real ones where a GPU is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.problems import Problem, with_all_sides
from tests.kernels.emulated import DTYPES, ON_GPU, error, no_emulation, shifted, small, two_units
from tests.models import numbers
from vargpt.kernels import KVCache, attention

Arguments = dict[str, Any]


def arguments(case: Problem, device: str = "cpu") -> Arguments:
    """What attention_forward takes."""
    inputs = {
        "queries": case.q_BHLK,
        "keys": case.k_BGNK,
        "values": case.v_BGNK,
        "limits": torch.tensor(case.limits, dtype=torch.int32),
        "head_scales": None if case.cosine is None else case.cosine.float(),
    }
    return {**{name: None if x is None else x.to(device) for name, x in inputs.items()}, "scale": case.scale}


def forward(given: Arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.vargpt.attention_forward(*given.values())


# ---- attention_forward ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_operator_computes_attention(device: str, dtype: torch.dtype, width: int, cosine: bool) -> None:
    case = with_all_sides(dtype, width, cosine)
    output, log_sum_exp = forward(arguments(case, device))
    exact, exact_log_sum_exp = case.exact()
    assert output.dtype == dtype
    assert error(output, exact) <= two_units(dtype, exact)
    assert error(log_sum_exp, exact_log_sum_exp) <= 1e-4
    assert output.transpose(1, 2).is_contiguous()  # no copy before the projection


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("cosine", [True, False])
def test_torch_finds_nothing_wrong_with_the_operators(device: str, cosine: bool) -> None:
    given = arguments(small(cosine=cosine), device)
    output, log_sum_exp = forward(given)
    torch.library.opcheck(torch.ops.vargpt.attention_backward.default, (output, *given.values(), output, log_sum_exp))
    leaves = (x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given.values())
    torch.library.opcheck(torch.ops.vargpt.attention_forward.default, tuple(leaves))


def test_numbers_beyond_the_first_two_billion_are_found(device: str) -> None:
    given, far = arguments(small(), device), 2**31 + 8
    expected = forward(given)
    # 4 GiB, which a CPU lends without having them: few of them are ever touched.
    room, begin = torch.empty(far + 2**18, dtype=torch.bfloat16, device=device), 0
    for name in ("queries", "keys", "values"):
        x = given[name]
        length, width = x.shape[2:]
        given[name] = room.as_strided(x.shape, (far, length * width, width, 1), begin).copy_(x)
        begin += x[0].numel()
    for ours, theirs in zip(forward(given), expected, strict=True):
        assert torch.equal(ours, theirs)


def meta_rows(x: Tensor, *shape: int) -> Tensor:
    """A tensor of any size around one number."""
    return x.flatten()[:1].expand(*shape)


def same_vectors(x: Tensor, *shape: int) -> Tensor:
    """The same around one vector, whose numbers lie side by side."""
    return x[:1, :1, :1].expand(*shape, -1)


BAD: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "numbers of 64 bits": (
        {"queries": Tensor.double},
        r"queries holds Double, and kernels take BFloat16 or Half: convert it with .bfloat16\(\) or .half\(\)",
    ),
    "numbers of 32 bits": ({"queries": Tensor.float}, "queries holds Float, and kernels take"),
    "two formats": ({"keys": Tensor.half}, r"keys holds Half, not BFloat16: convert it with .to\(\)"),
    "two formats, of the values": ({"values": Tensor.float}, "values holds Float, not BFloat16"),
    "another width": (
        {"queries": lambda x: x[..., :32]},
        "queries has vectors of 32 numbers, and kernels are built for",
    ),
    "keys of another width": (
        {"keys": lambda x: torch.cat((x, x), -1)},
        r"keys has shape \[2, 2, 39, 128\], and must have \[2, 2, 39, 64\]",
    ),
    "three axes": ({"queries": lambda x: x[0]}, r"queries has shape \[4, 39, 64\], and must have four axes"),
    "nothing": ({"queries": lambda x: x[:, :, :0]}, r"queries has shape \[2, 4, 0, 64\], and must hold something"),
    "numbers that do not lie side by side": (
        {"keys": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
        r"keys has vectors whose numbers lie 39 apart, not side by side: call .contiguous\(\)",
    ),
    "a row off the grid": ({"values": shifted}, r"values begins 2 bytes off a multiple of 16: call .clone\(\)"),
    "a stride off the grid": (
        {"queries": lambda x: torch.cat((x, x[..., :4]), -1)[..., :64]},
        r"queries has a stride of 2652 along axis 1, not a multiple of 8: call .clone\(memory_format",
    ),
    "more heads than a grid has": (
        {"queries": lambda x: meta_rows(x, 2, 65536, 39, 64)},
        "queries has 65536 heads, and at most 65535 can be computed at once",
    ),
    "more rows than a grid has": (
        {"queries": lambda x: meta_rows(x, 65536, 4, 39, 64)},
        "queries has 65536 rows, and at most 65535 can be computed at once: split the batch",
    ),
    "two billion tokens": (
        {"keys": lambda x: meta_rows(x, 2, 2, 2**31, 64)},
        "keys has 2147483648 tokens, and at most 1073741824 are counted",
    ),
    "another batch": ({"keys": lambda x: x[:1]}, r"keys has shape \[1, 2, 39, 64\], and must have \[2, 2, 39, 64\]"),
    "fewer values than keys": ({"values": lambda x: x[:, :, 1:]}, r"values has shape \[2, 2, 38, 64\], and must have"),
    "heads that do not divide": (
        {"queries": lambda x: x[:, :3]},
        "queries has 3 heads, and keys 2: query heads share key heads evenly",
    ),
    "limits of 64 bits": ({"limits": Tensor.long}, "limits holds Long, not Int"),
    "a limit too few": ({"limits": lambda x: x[1:]}, r"limits has shape \[38\], and must have \[39\]"),
    "limits apart": (
        {"limits": lambda x: x.repeat_interleave(2)[::2]},
        r"limits does not lie in memory without gaps: call .contiguous\(\)",
    ),
    "limits that decrease": (
        {"limits": lambda x: x.flip(0)},
        r"limits\[25\] is 14, and must be at least 39: limits are positive and never decrease",
    ),
    "a limit of nothing": ({"limits": lambda x: x - 1}, r"limits\[0\] is 0, and must be at least 1"),
    "a limit beyond the keys": (
        {"limits": lambda x: x + 1},
        r"limits\[14\] is 40, but there are 39 keys: a query sees these at most",
    ),
    "scales of 16 bits": ({"head_scales": Tensor.bfloat16}, "head_scales holds BFloat16, not Float"),
    "a scale too few": ({"head_scales": lambda x: x[1:]}, r"head_scales has shape \[3\], and must have \[4\]"),
}


@no_emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    changes, message = BAD[what]
    given = arguments(small())
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"^attention_forward: (?:{message})"):
        forward(given)


@pytest.mark.skipif(not ON_GPU, reason="no CUDA kernels were built, or no GPU")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("queries", "queries is on cpu, and these kernels run on cuda only: move it there, or call"),
        ("keys", "keys is on cpu, but queries on cuda:0: move it there"),
        ("limits", "limits is on cpu, but queries on cuda:0: move it there"),
    ],
)
def test_devices_may_not_be_mixed(name: str, message: str) -> None:
    given = arguments(small(), "cuda")
    given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=message):
        forward(given)


# ---- attention_backward ----


def backward(given: Arguments) -> tuple[Tensor, ...]:
    return torch.ops.vargpt.attention_backward(*given.values())


BAD_BACKWARD: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "numbers of 64 bits": ({"queries": Tensor.double}, "queries holds Double, and kernels take BFloat16 or Half"),
    "a gradient of another format": ({"d_output": Tensor.half}, "d_output holds Half, not BFloat16"),
    "a gradient of one number": (
        {"d_output": lambda x: meta_rows(x, *x.shape)},
        r"d_output has vectors whose numbers lie 0 apart, not side by side: call .contiguous\(\)",
    ),
    "a gradient of other queries": (
        {"d_output": lambda x: x[:, :, 1:]},
        r"d_output has shape \[2, 4, 38, 64\], and must have \[2, 4, 39, 64\]",
    ),
    "an output off the grid": ({"output": shifted}, r"output begins 2 bytes off a multiple of 16: call .clone\(\)"),
    "more heads of both kinds than a grid has": (
        {name: lambda x: same_vectors(x, 2, 32768, x.shape[2]) for name in ("queries", "keys", "values")}
        | {"head_scales": lambda x: x.repeat(8192)},
        "queries and keys have 32768 and 32768 heads, and at most 65535 together can be computed at once: split them",
    ),
    "more tokens of all rows than an int counts": (
        {name: lambda x: same_vectors(x, 65535, 1, 39) for name in ("keys", "values")}
        | {
            "queries": lambda x: same_vectors(x, 65535, 1, 32769),
            "limits": lambda x: x.new_full((32769,), 39),
            "head_scales": lambda x: x[:1],
        },
        "queries has 65535 times 32769 tokens, and at most 2147483647 can be computed at once: split the batch",
    ),
    "a log-sum-exp of 16 bits": ({"log_sum_exp": Tensor.half}, "log_sum_exp holds Half, not Float"),
    "a log-sum-exp too few": (
        {"log_sum_exp": lambda x: x[:, 1:]},
        r"log_sum_exp has shape \[2, 3, 39\], and must have \[2, 4, 39\]",
    ),
    "a log-sum-exp apart": (
        {"log_sum_exp": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
        "log_sum_exp does not lie in memory without gaps",
    ),
    "a limit beyond the keys": ({"limits": lambda x: x + 1}, r"limits\[14\] is 40, but there are 39 keys"),
}


@no_emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("what", BAD_BACKWARD)
def test_bad_input_of_the_backward_operator_is_named(what: str) -> None:
    changes, message = BAD_BACKWARD[what]
    given = arguments(small())
    output, log_sum_exp = forward(given)
    given = {"d_output": output, **given, "output": output, "log_sum_exp": log_sum_exp}
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"^attention_backward: {message}"):
        backward(given)


# ---- next_scale, decode ----


@dataclass
class Step:
    """New tokens, and a cache that holds some."""

    given: Arguments
    past: int

    @property
    def operator(self) -> Any:
        return torch.ops.vargpt.decode if "cosines" in self.given else torch.ops.vargpt.next_scale

    def run(self) -> Tensor:
        return self.operator(*self.given.values())


def step(
    count: int,
    past: int,
    *,
    decode: bool = False,
    cosine: bool = False,
    masked: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 64,
    device: str = "cpu",
) -> Step:
    """Three query heads share a key head; the cache is NaN where nothing was stored."""
    shapes = {"queries": (2, 6, count), "new_keys": (2, 2, count), "new_values": (2, 2, count)}
    given: Arguments = {
        name: numbers(*shape, width, seed=seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())
    }
    for seed, name in enumerate(("cached_keys", "cached_values"), start=10):
        given[name] = torch.full((2, 2, past + count + 3, width), math.nan, dtype=dtype)
        given[name][:, :, :past] = numbers(2, 2, past, width, seed=seed)
    given["past"] = past
    if decode:
        angles = numbers(2, width // 2, seed=20).repeat(1, 2)  # of a pair of channels
        given |= {"cosines": angles.cos(), "sines": angles.sin()}
        given["mask"] = numbers(2, past + 1, seed=21) > 0 if masked else None
    else:
        given["head_scales"] = torch.linspace(1, 9, 6) if cosine else None
    given["scale"] = 0.1
    return Step({name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}, past)


def expected(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """What the reference computes of it in float32, and all keys and values then."""
    given: Arguments = {
        name: x.detach().float().cpu() if isinstance(x, Tensor) else x for name, x in step.given.items()
    }
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    (batch, heads, count, width), end = given["new_keys"].shape, step.past + given["queries"].shape[2]
    cache = KVCache(1, batch, heads, end, width, **place)
    cache.append(0, *(given[name][:, :, : step.past] for name in ("cached_keys", "cached_values")))
    cache.advance(step.past)
    mask, scales = given.get("mask"), given.get("head_scales")
    output = attention(
        *(given[name] for name in ("queries", "new_keys", "new_values")),
        key_mask=None if mask is None else mask.bool(),
        rotary=(given["cosines"][:, None, None], given["sines"][:, None, None]) if "cosines" in given else None,
        scale=given["scale"] if scales is None else None,
        cosine=scales,
        cache=cache,
        backend="reference",
    )
    keys, values = cache.with_room(0, count)
    return output, keys, values


STEPS: dict[str, Arguments] = {
    "a scale": {"count": 9, "past": 70},
    "a scale of a cosine model": {"count": 70, "past": 5, "cosine": True},
    "the first scale": {"count": 1, "past": 0, "cosine": True},
    "a token": {"count": 1, "past": 200, "decode": True},
    "a token after padding": {"count": 1, "past": 200, "decode": True, "masked": True},
    "the first token": {"count": 1, "past": 0, "decode": True},
}
steps = pytest.mark.parametrize("which", STEPS)


@steps
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
def test_new_tokens_join_the_cache(device: str, which: str, dtype: torch.dtype, width: int) -> None:
    new = step(**STEPS[which], dtype=dtype, width=width, device=device)
    before = {name: new.given[name].clone() for name in ("cached_keys", "cached_values")}
    right, *cached = expected(new)
    output = new.run()
    assert output.dtype == dtype
    assert error(output, right.double()) <= two_units(dtype, right)
    end = new.past + output.shape[2]
    for (name, old), stored in zip(before.items(), cached, strict=True):
        now = new.given[name]
        assert torch.equal(now[:, :, : new.past], old[:, :, : new.past])
        assert torch.equal(now[:, :, new.past : end].cpu(), stored[:, :, new.past :].to(dtype))
        assert now[:, :, end:].isnan().all()


@steps
def test_torch_finds_nothing_wrong_with_new_tokens(device: str, which: str) -> None:
    new = step(**STEPS[which], device=device)
    new.given |= {name: new.given[name].nan_to_num() for name in ("cached_keys", "cached_values")}  # NaN is never equal
    torch.library.opcheck(new.operator.default, tuple(new.given.values()))


@steps
def test_new_tokens_that_learn_are_refused(device: str, which: str) -> None:
    """And nothing is stored."""
    given = step(**STEPS[which], device=device).given
    for learned in (name for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()):
        new = step(**STEPS[which], device=device)
        new.given[learned].requires_grad_()
        with pytest.raises(
            NotImplementedError, match=r"^vargpt\.(next_scale|decode)\.default has no gradients, and one"
        ):
            new.run()
        assert new.given["cached_values"][:, :, new.past :].isnan().all()
        with torch.no_grad():
            new.run()


BAD_STEPS: dict[str, tuple[str, dict[str, Callable[[Any], Any]], str]] = {
    "keys of another count": (
        "a scale",
        {"new_keys": lambda x: x[:, :, 1:], "new_values": lambda x: x[:, :, 1:]},
        r"new_keys has shape \[2, 2, 8, 64\], and must have \[2, 2, 9, 64\]",
    ),
    "a full cache": (
        "a scale",
        {"past": lambda past: past + 4},
        "cached_keys has room for 82 tokens, and 74 and 9 are too many: make a longer cache",
    ),
    "a negative past": ("a scale", {"past": lambda _: -1}, "past is -1: give the number of tokens in the cache"),
    "a cache of another format": ("a scale", {"cached_values": Tensor.half}, "cached_values holds Half, not BFloat16"),
    "a cache of other rows": (
        "a scale",
        {"cached_keys": lambda x: x[:1]},
        r"cached_keys has shape \[1, 2, 82, 64\], and must have \[2, 2, 82, 64\]",
    ),
    "a cache off the grid": ("a scale", {"cached_keys": shifted}, "cached_keys begins 2 bytes off a multiple of 16"),
    "rows of a cache in one place": (
        "a scale",
        {"cached_keys": lambda x: x[:1].expand_as(x)},
        "cached_keys has a stride of 0, so that numbers lie in the same place",
    ),
    "a mask of 64 bits": ("a token after padding", {"mask": Tensor.long}, "mask holds Long, not Bool"),
    "a mask too short": (
        "a token after padding",
        {"mask": lambda x: x[:, 1:]},
        r"mask has shape \[2, 200\], and must have \[2, 201\]",
    ),
    "a mask apart": (
        "a token after padding",
        {"mask": lambda x: x.repeat_interleave(2, 1)[:, ::2]},
        r"mask does not lie in memory without gaps: call .contiguous\(\)",
    ),
    "angles of another width": (
        "a token",
        {"cosines": lambda x: x[:, :32]},
        r"cosines has shape \[2, 32\], and must have \[2, 64\]",
    ),
    "angles of 16 bits": ("a token", {"sines": Tensor.bfloat16}, "sines holds BFloat16, not Float"),
    "angles of three rows": (
        "a token",
        {"sines": lambda x: torch.cat((x, x))[:3]},
        r"sines has shape \[3, 64\], and must have \[2, 64\]",
    ),
    "cosines off the grid": (
        "a token",
        {"cosines": shifted},
        "cosines begins 4 bytes off a multiple of 8: call .clone",
    ),
    "sines off the grid": ("a token", {"sines": shifted}, "sines begins 4 bytes off a multiple of 8: call .clone"),
    "many heads that share one": (
        "a token",
        {"queries": lambda x: x.repeat(1, 6, 1, 1)},
        "queries has 36 heads, and keys 2: at most 16 query heads may share a key head here",
    ),
    "heads that do not divide": (
        "a scale",
        {"queries": lambda x: x[:, :5]},
        "queries has 5 heads, and new_keys 2: query heads share key heads evenly",
    ),
}


@no_emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("what", BAD_STEPS)
def test_bad_new_tokens_are_named(what: str) -> None:
    which, changes, message = BAD_STEPS[what]
    new = step(**STEPS[which])
    new.given |= {name: change(new.given[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^(?:next_scale|decode): {message}"):
        new.run()


@no_emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cache", ["cached_keys", "cached_values"])
@pytest.mark.parametrize("name", ["queries", "new_keys", "new_values"])
def test_new_tokens_may_not_lie_in_the_cache(name: str, cache: str) -> None:
    new = step(9, 70)
    new.given[name] = new.given[cache][:, :1, 70:79].expand_as(new.given[name])
    with pytest.raises(ValueError, match=f"next_scale: {name} and the cache lie in the same memory"):
        new.run()


@no_emulation
@pytest.mark.usefixtures("emulated")
def test_keys_and_values_may_not_be_cached_in_one_place() -> None:
    new = step(9, 70)
    new.given["cached_values"] = new.given["cached_keys"]
    with pytest.raises(ValueError, match="next_scale: cached_values and cached_keys lie in the same memory"):
        new.run()


@no_emulation
@pytest.mark.usefixtures("emulated")
def test_one_token_is_decoded_at_a_time() -> None:
    new = step(2, 5, decode=True)
    with pytest.raises(ValueError, match="decode: queries has 2 tokens, and one is computed at a time"):
        new.run()


@pytest.mark.skipif(not ON_GPU, reason="no CUDA kernels were built, or no GPU")
def test_devices_of_a_step_may_not_be_mixed() -> None:
    for name in ("new_keys", "cached_values", "sines", "mask"):
        new = step(**STEPS["a token after padding"], device="cuda")
        new.given[name] = new.given[name].cpu()
        with pytest.raises(ValueError, match=rf"^decode: {name} is on cpu, but \w+ on cuda:0: move it there"):
            new.run()

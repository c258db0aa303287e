"""This project's own CUDA kernels: operators that autograd and torch.compile know, and the backend made of them.

The kernels are compiled when vargpt is installed (README.md, "CUDA kernels"), or are not. Their operators are declared
here in any case; csrc/*_op.cu checks their arguments and launches what computes them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vargpt.kernels.call import Call

LIBRARY = "vargpt.kernels._cuda"
WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
MOST_BLOCKS = 65535
"""Rows of a batch, or heads of queries and keys together, of one launch."""
MOST_SHARE = 16
"""Query heads that share a key head, where one new token is computed."""
CAPABILITY = 8


@dataclass(frozen=True)
class Kernels:
    """Which kernels there are: for one type of device, or none, and why."""

    device: str = "cuda"
    missing: str | None = None


def load(path: str, device: str = "cuda") -> Kernels:
    """Load a library of kernels; where that fails, warn that others take their place."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"the CUDA kernels of vargpt were built, but cannot be loaded: {error}"
        warnings.warn(f"{reason}; other backends compute attention", stacklevel=2)
        return Kernels(missing=reason)
    return Kernels(device)


def _installed() -> Kernels:
    spec = find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        return Kernels(missing="vargpt was installed without its CUDA kernels")
    return load(spec.origin)


kernels = _installed()


def _new_vectors(like: Tensor) -> Tensor:
    """As csrc/binding.cuh makes them: what belongs to a token lies side by side."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


# ---- attention_forward ----

torch.library.define(
    "vargpt::attention_forward",
    "(Tensor queries, Tensor keys, Tensor values, Tensor limits, Tensor? head_scales, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.register_fake("vargpt::attention_forward")
def _forward_fake(
    queries: Tensor, keys: Tensor, values: Tensor, limits: Tensor, head_scales: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _new_vectors(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _forward_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, output, log_sum_exp = ctx.saved_tensors
    q, k, v, head_scales = torch.ops.vargpt.attention_backward(
        laid_out(gradient), *inputs, ctx.scale, output, log_sum_exp
    )
    return q, k, v, None, None if inputs[-1] is None else head_scales, None


torch.library.register_autograd("vargpt::attention_forward", _forward_backward, setup_context=_forward_save)


# ---- attention_backward ----

torch.library.define(
    "vargpt::attention_backward",
    "(Tensor d_output, Tensor queries, Tensor keys, Tensor values, Tensor limits, Tensor? head_scales, float scale, "
    "Tensor output, Tensor log_sum_exp) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.register_fake("vargpt::attention_backward")
def _backward_fake(
    d_output: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    limits: Tensor,
    head_scales: Tensor | None,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_head_scales = log_sum_exp.new_empty(0 if head_scales is None else queries.shape[1])
    return _new_vectors(queries), _new_vectors(keys), _new_vectors(values), d_head_scales


def _backward_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the backend 'cuda' has no derivatives of gradients: name another one, with vargpt.kernels.using('matmul')"
    )


torch.library.register_autograd("vargpt::attention_backward", _backward_backward)


# ---- next_scale, decode ----

torch.library.define(
    "vargpt::next_scale",
    "(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) cached_keys, Tensor(b!) cached_values, int past, "
    "Tensor? head_scales, float scale) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
torch.library.define(
    "vargpt::decode",
    "(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) cached_keys, Tensor(b!) cached_values, int past, "
    "Tensor cosines, Tensor sines, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.register_fake("vargpt::next_scale")
def _next_scale_fake(queries: Tensor, *_: Any) -> Tensor:
    return _new_vectors(queries)


@torch.library.register_fake("vargpt::decode")
def _decode_fake(queries: Tensor, *_: Any) -> Tensor:
    return _new_vectors(queries)


def _without_gradients(op: Any) -> Any:
    """What stands where an operator's gradients would: torch's own way to register these takes no operator that
    writes to its inputs."""

    def run(keys: torch._C.DispatchKeySet, *inputs: Any) -> Tensor:
        learned = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if learned and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{op} has no gradients, and one of its inputs needs some: call it under torch.no_grad(), or "
                "vargpt.kernels.attention, which then takes other operators"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    return run


_registered = torch.library.Library("vargpt", "FRAGMENT")
for _op in (torch.ops.vargpt.next_scale.default, torch.ops.vargpt.decode.default):
    _registered.impl(_op, _without_gradients(_op), "Autograd", with_keyset=True)


# ---- The backend ----


def laid_out(x: Tensor) -> Tensor:
    """The tensor as kernels read it, in chunks of 16 bytes: itself, or a copy where it does not lie in memory so."""
    chunk = 16 // x.element_size()
    rows = x.stride(-1) == 1 and all(stride % chunk == 0 for stride in x.stride()[:-1])
    # What torch traces with (types of their own) lies nowhere yet; the operator looks again, and says what is wrong.
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter)
    begins = traced or x.data_ptr() % 16 == 0
    return x if rows and begins else x.clone(memory_format=torch.contiguous_format)


def refuses(call: Call) -> str | None:
    q, k = call.q_BHLK, call.k_BGMK
    dtypes = {x.dtype for x in (q, k, call.v_BGMK)}
    if kernels.missing is not None:
        return kernels.missing
    if q.device.type != kernels.device:
        return f"its kernels run on {kernels.device}, not on {q.device.type}"
    if q.device.type == "cuda" and torch.cuda.get_device_properties(q.device).major < CAPABILITY:
        return f"its kernels need a GPU of compute capability {CAPABILITY}.0 or later"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"its kernels compute in bfloat16 or float16, not in {', '.join(sorted(map(str, dtypes)))}"
    if q.shape[-1] not in WIDTHS:
        return f"its kernels take head widths of 64 and 128, not {q.shape[-1]}"
    if call.key_mask is not None and not decodes(call):
        return "its kernels take a key_mask only where one new token joins a cache"
    rows, heads, both = q.shape[0], q.shape[1], q.shape[1] + k.shape[1]
    if q.numel() == 0:
        return f"its kernels need at least one row, head and query, not {rows}, {heads} and {call.queries}"
    if max(rows, both) > MOST_BLOCKS:
        return (
            f"its kernels take at most {MOST_BLOCKS} rows, and as many heads of queries and keys, not {rows} and {both}"
        )
    return None


def appends(call: Call) -> bool:
    """Whether kernels fit that store new keys and values by themselves: nothing learns, the cache holds the same
    format, and every new token sees everything."""
    if call.cache is None or call.cache.dtype != call.q_BHLK.dtype:
        return False
    learned = call.cache.requires_grad or any(x.requires_grad for x in call.rotary or ())  # by earlier steps, or angles
    if call.learns or (torch.is_grad_enabled() and learned):
        return False
    sees_all = call.limits is None and (call.queries == 1 or not call.causal)
    return sees_all and call.queries == call.k_BGMK.shape[2]


def decodes(call: Call) -> bool:
    """Whether it is one new token of a language model."""
    if not appends(call) or call.queries > 1 or call.rotary is None or call.cosine is not None:
        return False
    return call.q_BHLK.shape[1] // call.k_BGMK.shape[1] <= MOST_SHARE


def attend(call: Call) -> Tensor:
    if decodes(call):
        return _decode(call)
    call = call.rotated()
    return _next_scale(call) if appends(call) else _forward(call.cached())


def _forward(call: Call) -> Tensor:
    q, k, v = (laid_out(x) for x in (call.q_BHLK, call.k_BGMK, call.v_BGMK))
    return torch.ops.vargpt.attention_forward(q, k, v, limits(call), head_scales(call), call.scale)[0]


def _next_scale(call: Call) -> Tensor:
    assert call.cache is not None
    q, k, v = (laid_out(x) for x in (call.q_BHLK, call.k_BGMK, call.v_BGMK))
    room = call.cache.with_room(call.layer, call.queries)
    return torch.ops.vargpt.next_scale(q, k, v, *room, call.cache.length, head_scales(call), call.scale)


def _decode(call: Call) -> Tensor:
    assert call.cache is not None
    assert call.rotary is not None
    q, k, v = (laid_out(x) for x in (call.q_BHLK, call.k_BGMK, call.v_BGMK))
    room = call.cache.with_room(call.layer, 1)
    angles = (laid_out(x.flatten(0, 2).float().contiguous()) for x in call.rotary)
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    return torch.ops.vargpt.decode(q, k, v, *room, call.cache.length, *angles, mask, call.scale)


def head_scales(call: Call) -> Tensor | None:
    return None if call.cosine is None else call.cosine.float().contiguous()


def limits(call: Call) -> Tensor:
    """How many keys each query sees."""
    device, end = call.q_BHLK.device, call.keys
    if call.limits is not None:
        return call.limits.tensor(device)
    if call.causal:
        return torch.arange(end - call.queries + 1, end + 1, dtype=torch.int32, device=device)
    return torch.full((call.queries,), end, dtype=torch.int32, device=device)

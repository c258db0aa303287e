"""nvcc's PTX of the kernels, interpreted: it computes the bits that the emulated source does, and mistakes in the
inline assembly, which the emulator cannot see, are noticed."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda_on_cpu.backward import attention_backward, attention_backward_ptx
from tests.cuda_on_cpu.forward import Result, attention_forward, attention_forward_ptx
from tests.cuda_on_cpu.harness import DTYPES, NVCC, planted, unavailable
from tests.cuda_on_cpu.problems import Gradients, Learning, with_all_sides
from tests.cuda_on_cpu.ptx import Machine, Memory, Program, from_bf16, fused_multiply_add, to_bf16

compiled = pytest.mark.skipif(
    NVCC is None or unavailable() is not None, reason=f"there is no nvcc, or no emulator: {unavailable()}"
)


def same_bits(ours: Result, other: Result) -> bool:
    pairs = ((ours.output_BHLK, other.output_BHLK), (ours.log_sum_exp_BHL, other.log_sum_exp_BHL))
    return all(torch.equal(a, b) for a, b in pairs)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cosine", [True, False])
def test_ptx_and_source_agree_to_the_last_bit(dtype: torch.dtype, width: int, cosine: bool) -> None:
    case = with_all_sides(dtype, width, cosine)
    assert same_bits(attention_forward_ptx(case), attention_forward(case))


@pytest.mark.slow
@compiled
def test_so_does_the_ptx_for_sm_90() -> None:
    case = with_all_sides()
    assert same_bits(attention_forward_ptx(case, arch="sm_90"), attention_forward(case))


def same_gradients(ours: Gradients, other: Gradients) -> bool:
    """Of vectors of zeros they are infinite in half precision."""
    return all(torch.equal(x, other[name]) for name, x in ours.items())


@compiled
@pytest.mark.parametrize(
    ("dtype", "width", "cosine"),
    [
        pytest.param(*variant, marks=[] if variant == (torch.bfloat16, 64, True) else pytest.mark.slow)
        for variant in itertools.product(DTYPES, (64, 128), (True, False))
    ],
)
def test_backward_ptx_and_source_agree_to_the_last_bit(dtype: torch.dtype, width: int, cosine: bool) -> None:
    learning = Learning.of(with_all_sides(dtype, width, cosine, unseen=70))
    assert same_gradients(attention_backward_ptx(learning), attention_backward(learning).gradients)


@pytest.mark.slow
@compiled
def test_so_does_the_backward_ptx_for_sm_90() -> None:
    learning = Learning.of(with_all_sides(unseen=70))
    assert same_gradients(attention_backward_ptx(learning, arch="sm_90"), attention_backward(learning).gradients)


MMA = "row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}"
MISTAKES = {
    "a pair is packed the wrong way round": ("cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1"),
    "right factors are swapped": (MMA, MMA.replace("{%8, %9}", "{%9, %8}")),
    "left factors are swapped": (MMA, MMA.replace("%5, %6", "%6, %5")),
    "values are not transposed": ("m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16"),
    "what exists is not copied": ("exists ? 16 : 0", "exists ? 0 : 16"),
    "one group more may be on its way": ('wait_group %0;" ::"n"(pending)', 'wait_group %0;" ::"n"(pending + 1)'),
    "groups are not closed": ('"cp.async.commit_group;"', '""'),
    "the second of a pair is the first": ("__uint_as_float(pair & 0xffff0000u)", "__uint_as_float(pair << 16)"),
    "the exponential is a logarithm": ("ex2.approx.ftz.f32", "lg2.approx.ftz.f32"),
}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_assembly_is_noticed(name: str, tmp_path: Path) -> None:
    old, new = MISTAKES[name]
    csrc = planted(tmp_path / "csrc", "ptx.cuh", old, new)
    case = with_all_sides()
    assert same_bits(attention_forward(case, csrc=csrc), attention_forward(case))  # the emulator does not see it
    try:
        result = attention_forward_ptx(case, csrc=csrc)
    except RuntimeError:
        return  # noticed at once
    assert not same_bits(result, attention_forward(case))


# ---- The interpreter itself ----

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@given(floats, floats, floats)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    result = fused_multiply_add(*(np.array([x], np.float32) for x in (a, b, c)))[0]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    error = abs(Fraction(float(result)) - exact)
    for neighbour in (np.nextafter(result, np.float32(np.inf)), np.nextafter(result, np.float32(-np.inf))):
        assert error <= abs(Fraction(float(neighbour)) - exact)


def test_sixteen_bit_numbers_are_those_of_torch() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(
        from_bf16(every), torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy(), equal_nan=True
    )
    floats = (
        every.astype(np.uint32)[:, None] << np.uint32(16) | np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    ).view(np.float32)
    expected = torch.from_numpy(floats).bfloat16().float().numpy()
    assert np.array_equal(from_bf16(to_bf16(floats)), expected, equal_nan=True)


def interpret(body: str, y: np.ndarray) -> None:
    """Run a body on two warps; %rd1 is the address of ``y``, %r1 the thread's number."""
    source = f"""
    .visible .entry toy(.param .align 8 .b8 toy_param_0[8])
    {{
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [toy_param_0];
    mov.u32 %r1, %tid.x;
    {body}
    ret;
    }}"""
    memory = Memory(4096, y.view(np.uint8))
    address = (4096).to_bytes(8, "little")
    Machine(
        Program.parse(source), grid=(1, 1, 1), block=64, shared_bytes=1024, parameter=address, memories=[memory]
    ).run()


def test_threads_that_parted_meet_again() -> None:
    y = np.zeros(64, np.uint32)
    interpret(
        """
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        mov.u32 %r2, 0;
        setp.lt.u32 %p1, %r1, 7;
        @%p1 bra $few;
    $again:
        add.u32 %r2, %r2, 1;
        setp.lt.u32 %p2, %r2, %r1;
        @%p2 bra $again;
    $few:
        bar.sync 0;
        st.global.u32 [%rd3], %r2;
        """,
        y,
    )
    assert y.tolist() == [0] * 7 + list(range(7, 64))


def test_unordered_comparisons_are_true_of_nan() -> None:
    y = np.zeros(64, np.uint32)
    interpret(
        """
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        mov.f32 %f1, 0f7FC00000;
        setp.ltu.f32 %p1, %f1, 0f3F800000;
        setp.lt.f32 %p2, %f1, 0f3F800000;
        setp.geu.f32 %p3, 0f40000000, 0f3F800000;
        setp.ltu.f32 %p4, 0f40000000, 0f3F800000;
        selp.u32 %r2, 1, 0, %p1;
        selp.u32 %r3, 2, 0, %p2;
        selp.u32 %r4, 4, 0, %p3;
        selp.u32 %r5, 8, 0, %p4;
        add.u32 %r2, %r2, %r3;
        add.u32 %r2, %r2, %r4;
        add.u32 %r2, %r2, %r5;
        st.global.u32 [%rd3], %r2;
        """,
        y,
    )
    assert y.tolist() == [1 + 4] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd2, %rd1, 256; st.global.u32 [%rd2], %r1;", "outside of all tensors"),
        ("add.s64 %rd2, %rd1, 2; st.global.u32 [%rd2], %r1;", "not aligned"),
        ("mov.u32 %r2, 1024; st.shared.u32 [%r2], %r1;", "outside of shared memory"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $end; bar.sync 0;\n$end:", "some of 64 threads"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $end; bar.warp.sync -1;\n$end:", "some of 32 threads"),
        ("bar.warp.sync 65535;", "whole warps"),
        ("mov.u32 %r2, 0; cp.async.cg.shared.global [%r2], [%rd1], 16, 16;", "on its way"),
        ("vote.sync.all.pred %p1, %p1, -1;", "not known"),
        ("add.sat.s32 %r2, %r1, 1;", r"modifiers \['sat'\] are not known"),
        ("add.s32 %r2, %r3, 1;", "r3"),
    ],
)
def test_what_must_not_be_is_an_error(body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        interpret(body, np.zeros(64, np.uint32))

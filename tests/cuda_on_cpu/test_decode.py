"""The kernels for a new token, on the CPU: right, free of races, the cache as it should be, in the source and in nvcc's
PTX; every planted mistake is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cuda_on_cpu.decode import Case, Watched, cases, decode, decode_ptx, divide, random_case, with_all_sides
from tests.cuda_on_cpu.harness import NVCC, Mistake, build, planted, unavailable
from tests.cuda_on_cpu.next_scale import memory_bits

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")
compiled = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

TILE = 64


def work(case: Case) -> tuple[int, int]:
    """Warp-wide products and copied bytes: every tile of keys and values once, 16 rows of queries with it."""
    (batch, key_heads, _, width), tiles = case.k_BGNK.shape, -(-case.past // TILE)
    products = batch * key_heads * tiles * 2 * TILE * 16 * width
    return products // (16 * 8 * 16), batch * key_heads * 2 * case.past * width * 2


def wrongs(case: Case, result: Watched) -> list[str]:
    """What is wrong with a result. The output may err twice as much as the plain code's, and round once; where logits
    are large, the plain code's roundings may cancel by luck (one of some thousand problems), so that what it costs to
    round the turned query and key is allowed besides. The new key may round once; the cache must hold it and the bits
    of the new value, and be as before everywhere else."""
    found = list(result.combine.reports)
    if result.attend is not None:
        found += result.attend.reports
        if (result.attend.counters.mma, result.attend.counters.copied_bytes) != work(case):
            found.append("work")
        if result.attend.counters.bank_conflicts:
            found.append("bank conflicts")
    output, key = case.exact()
    half_unit = torch.finfo(result.output_BHLK.dtype).eps / 2
    error, plain_error, turned_error = (
        (x.double() - output).abs().max() for x in (result.output_BHLK, case.plain(), case.exact(rounded=True)[0])
    )
    if not error <= 2 * plain_error + turned_error + half_unit * output.abs().max():
        found.append("output")
    past = slice(case.past, case.past + 1)
    if not ((result.cached_keys[:, :, past] - key).abs() <= half_unit * key.abs() + 1e-6).all():
        found.append("key")
    keys, values = case.caches()
    keys[:, :, past], values[:, :, past] = result.cached_keys[:, :, past], case.v_BGNK[:, :, past]
    for expected, cache in ((keys, result.cached_keys), (values, result.cached_values)):
        if not torch.equal(memory_bits(cache), memory_bits(expected)):
            found.append("cache")
    return found


VARIANTS = [(dtype, width) for dtype in (torch.bfloat16, torch.float16) for width in (64, 128)]
variants = pytest.mark.parametrize(("dtype", "width"), VARIANTS)


@variants
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 3))
def test_any_shape_is_right(dtype: torch.dtype, width: int, data: st.DataObject, seed: int) -> None:
    drawn = data.draw(cases(dtype, width))
    assert wrongs(drawn, decode(drawn, seed=seed)) == []


@variants
def test_with_an_empty_cache_a_token_sees_itself(dtype: torch.dtype, width: int) -> None:
    for masked in (False, True):
        alone = random_case(dtype, width, 0, batch=2, key_heads=2, share=2, masked=masked, spare=3)
        result = decode(alone)
        assert wrongs(alone, result) == []
        assert torch.equal(result.output_BHLK, alone.v_BGNK.repeat_interleave(2, dim=1))


@variants
def test_where_all_else_is_masked_a_token_sees_itself(dtype: torch.dtype, width: int) -> None:
    case = random_case(dtype, width, 200, masked=True, multiprocessors=1)
    assert case.mask_BN is not None
    case.mask_BN[:] = False
    result = decode(case)
    assert wrongs(case, result) == []
    assert torch.equal(result.output_BHLK, case.v_BGNK[:, :, -1:])


@pytest.mark.parametrize("past", [1, 63, 64, 65, 127, 128, 129])
def test_lengths_around_whole_tiles(past: int) -> None:
    for multiprocessors in (1, 108):
        edge = random_case(torch.bfloat16, 64, past, key_heads=8, multiprocessors=multiprocessors)  # full afterwards
        assert wrongs(edge, decode(edge)) == []


@pytest.mark.parametrize("key", [0, 70, 140, 199, 200])
def test_exponentials_neither_overflow_nor_vanish(key: int) -> None:
    case = random_case(torch.bfloat16, 64, 200, share=2)  # four splits
    case.k_BGNK[:, :, key] = 30 * case.turned(torch.float32)[0][:, 0] if key < 200 else 30 * case.q_BH1K[:, 0]
    assert wrongs(case, decode(case)) == []
    below = replace(case, scale=-case.scale)  # all others far above this one
    assert wrongs(below, decode(below)) == []


def test_all_schedules_give_the_same_numbers() -> None:
    case = with_all_sides()
    first = decode(case)
    for seed in range(1, 6):
        assert decode(case, seed=seed).same_bits(first)


@example(width=64, batch=65535, key_heads=65535, past=100, multiprocessors=1)  # more than an int counts
@given(
    width=st.sampled_from([64, 128]),
    batch=st.integers(1, 64),
    key_heads=st.integers(1, 32),
    past=st.integers(0, 10000),
    multiprocessors=st.integers(1, 150),
)
def test_splits_are_of_whole_tiles_and_cover_all_keys(
    width: int, batch: int, key_heads: int, past: int, multiprocessors: int
) -> None:
    library = build("decode.cpp", {"FORMAT": "bf16", "WIDTH": width})
    splits = divide(library, batch, key_heads, past, multiprocessors)
    assert splits.keys % TILE == 0
    assert splits.keys > 0
    assert (splits.count - 1) * splits.keys < past <= splits.count * splits.keys or (past, splits.count) == (0, 0)
    at_once, rows = multiprocessors * (8 if width == 64 else 4), batch * key_heads
    assert splits.count <= max(1, at_once // rows)
    longer = splits.keys - TILE  # shorter splits would be too many
    assert longer == 0 or -(-past // longer) > max(1, at_once // rows)


@pytest.mark.slow
@variants
def test_a_long_context_of_published_shapes(dtype: torch.dtype, width: int) -> None:
    for heads, key_heads in ((28, 4), (32, 8)):  # Qwen2 and LLaMA 3
        case = random_case(dtype, width, 2000, key_heads=key_heads, share=heads // key_heads, spare=48)
        result = decode(case, seed=1)
        assert wrongs(case, result) == []
        output, _ = case.exact()
        squares = [float((x.double() - output).square().mean()) for x in (result.output_BHLK, case.plain())]
        assert squares[0] <= squares[1]  # over many numbers, the kernels err less than the plain code


# ---- Planted mistakes: first those that tell these kernels from others, then the rest ----

KERNEL = "decode.cuh"
RACE, BLOCKS_RACE, NOT_ARRIVED = "race in shared memory", "race in a tensor", "a cp.async has not arrived"
MISTAKES = {
    "nothing is turned against the other half": Mistake(KERNEL, "pair < width / 4 ? -1.0f : 1.0f", "1.0f", "key"),
    "the mask is ignored": Mistake(KERNEL, "(!mask || mask[key])", "(!mask || mask[key] < 2)", "output"),
    "where nothing is visible, the largest logit is infinite": Mistake(
        KERNEL, "kNothing = -1e38f", "kNothing = -INFINITY", "output"
    ),
    "a split goes on to the end": Mistake(KERNEL, "min(first_key + call.split_keys, call.past)", "call.past", "work"),
    "a split does not stop at the end": Mistake(
        KERNEL, "min(first_key + call.split_keys, call.past)", "first_key + call.split_keys", "output"
    ),
    "no empty group after the last tile": Mistake(
        KERNEL, "if (key < end_key) load_tile", "if (key >= end_key) return;\n    load_tile", NOT_ARRIVED
    ),
    "keys are overwritten while others read them": Mistake(
        KERNEL, "__syncwarp();  // everybody is done with the keys", "//", RACE
    ),
    "all splits leave their results in one place": Mistake(
        KERNEL, "+ row) * call.splits + split;", "+ row) * call.splits + 0 * split;", BLOCKS_RACE
    ),
    "splits are not brought to the same largest logit": Mistake(
        KERNEL, "weight = exp2_approx(sums[split].x - largest)", "weight = 1.0f", "output"
    ),
    "the new key is read where another block writes it": Mistake(
        KERNEL, "rounded = unpack<format>(key)", "rounded = unpack<format>(*pair_of(key_to, pair))", BLOCKS_RACE
    ),
    "every query head appends": Mistake(KERNEL, "appends = head % share == 0", "appends = share > 0", BLOCKS_RACE),
    "the key is appended a row too late": Mistake(
        KERNEL, "call.past * call.cached_keys.token_stride", "(call.past + 1) * call.cached_keys.token_stride", "cache"
    ),
    "the output is written a head too far": Mistake(
        KERNEL, "call.output.tokens(batch, head)", "call.output.tokens(batch, head + 1)", "writes outside"
    ),
}
MORE_MISTAKES = {
    "neighbours are turned, and not halves": Mistake(KERNEL, "pair ^ width / 4", "pair ^ 1", "key"),
    "all rows have the first one's cosines": Mistake(
        KERNEL, "call.cosines + batch * call.angle_stride", "call.cosines", "key"
    ),
    "the mask is one key off": Mistake(KERNEL, "mask[key])", "mask[key + 1])", "output"),
    "the mask's rows lie side by side": Mistake(KERNEL, "batch * call.mask_stride", "batch * call.past", "output"),
    "splits begin one key late": Mistake(
        KERNEL, "first_key = split * call.split_keys,", "first_key = split * call.split_keys + 1,", "work"
    ),
    "the last split in part is left out": Mistake(
        KERNEL, "(tiles + tiles_each - 1) / tiles_each", "tiles / tiles_each", "output"
    ),
    "the values' stride is the keys'": Mistake(
        KERNEL,
        "cached.tokens(batch, key_head), cached.token_stride, key",
        "cached.tokens(batch, key_head), call.cached_keys.token_stride, key",
        "outside",
    ),
    "the keys' wait_group lets one group more pass": Mistake(
        KERNEL, "cp_async_wait<1>();  // this lane's part", "cp_async_wait<2>();  //", NOT_ARRIVED
    ),
    "the values' wait_group lets one group more pass": Mistake(
        KERNEL, "cp_async_wait<1>();  // the values", "cp_async_wait<2>();  //", NOT_ARRIVED
    ),
    "copies beyond the last tile": Mistake(
        KERNEL,
        "if (key < end_key) load_tile",
        "if (key < end_key + kKeyTile) load_tile",
        "ends while a cp.async is on its way",
    ),
    "lanes do not wait for the queries": Mistake(KERNEL, "__syncwarp();  // every lane has written", "//", RACE),
    "lanes do not wait for each other's keys": Mistake(
        KERNEL, "__syncwarp();        // the other lanes' keys", "//", RACE
    ),
    "lanes do not wait for each other's values": Mistake(
        KERNEL, "__syncwarp();        // the other lanes' values", "//", RACE
    ),
    "values are overwritten while others read them": Mistake(
        KERNEL, "__syncwarp();  // everybody is done with the values", "//", RACE
    ),
    "queries of other key heads are read": Mistake(
        KERNEL, "numbers = 0;\n      if (row < share)", "numbers = 0;\n      if (row <= share)", "reads outside"
    ),
    "results of no head are written": Mistake(
        KERNEL, "[half]);\n    if (row < share)", "[half]);\n    if (row <= share)", BLOCKS_RACE
    ),
    "all lanes of a quad write the total": Mistake(KERNEL, "if (lane() % 4 == 0) call", "call", BLOCKS_RACE),
    "the largest logit is the last split's": Mistake(
        KERNEL, "largest = fmaxf(largest, sums[split].x)", "largest = sums[split].x", "output"
    ),
    "totals are not brought to the same largest logit": Mistake(
        KERNEL, "fmaf(weight, sums[split].y, total)", "total + sums[split].y", "output"
    ),
    "the first split is left out": Mistake(
        KERNEL,
        "int split = 0; split < call.splits; ++split) {",
        "int split = 1; split < call.splits; ++split) {",
        "output",
    ),
    "the new token's logit is of base e": Mistake(
        KERNEL, "warp_sum(product) * (call.scale * kLog2E)", "warp_sum(product) * call.scale", "output"
    ),
    "half a warp is summed": Mistake(KERNEL, "int mask = 16; mask > 0", "int mask = 8; mask > 0", "output"),
    "one query head of all appends": Mistake(KERNEL, "appends = head % share == 0", "appends = head == 0", "cache"),
    "the value is appended by the keys' stride": Mistake(
        KERNEL, "call.past * call.cached_values.token_stride", "call.past * call.cached_keys.token_stride", "cache"
    ),
    "query heads take turns in key heads": Mistake(
        KERNEL, "key_head = head / share;", "key_head = head % call.key_heads;", "output"
    ),
}


@pytest.mark.parametrize("name", [*MISTAKES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MISTAKES)])
def test_a_planted_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    mistake = {**MISTAKES, **MORE_MISTAKES}[name]
    csrc = mistake.planted(tmp_path / "csrc")
    case = with_all_sides()
    for seed in (0, 1):
        found = wrongs(case, decode(case, seed=seed, csrc=csrc))
        assert any(mistake.noticed in each for each in found), (seed, found)


# ---- The PTX ----


@compiled
@variants
def test_ptx_and_source_agree_to_the_last_bit(dtype: torch.dtype, width: int) -> None:
    case = with_all_sides(dtype, width)
    for each in (case, replace(case, mask_BN=None), random_case(dtype, width, 0)):
        assert decode_ptx(each).same_bits(decode(each))


@pytest.mark.slow
@compiled
def test_so_does_the_ptx_for_sm_90() -> None:
    case = with_all_sides()
    assert decode_ptx(case, arch="sm_90").same_bits(decode(case))


IN_ASSEMBLY = {
    "a pair is packed the wrong way round": ("cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1"),
    "one group more may be on its way": ('wait_group %0;" ::"n"(pending)', 'wait_group %0;" ::"n"(pending + 1)'),
    "what exists is not copied": ("exists ? 16 : 0", "exists ? 0 : 16"),
    "values are not transposed": ("m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16"),
    "the exponential is a logarithm": ("ex2.approx.ftz.f32", "lg2.approx.ftz.f32"),
}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("name", IN_ASSEMBLY)
def test_a_mistake_in_the_assembly_is_noticed(name: str, tmp_path: Path) -> None:
    csrc = planted(tmp_path / "csrc", "ptx.cuh", *IN_ASSEMBLY[name])
    case = with_all_sides()
    try:
        result = decode_ptx(case, csrc=csrc)
    except RuntimeError:
        return  # noticed at once
    assert not result.same_bits(decode(case))

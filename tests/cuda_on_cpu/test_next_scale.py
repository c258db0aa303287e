"""The kernel for a new scale, on the CPU: right, free of races, the cache as it should be, in the source and in nvcc's
PTX; every planted mistake is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_on_cpu.harness import NVCC, Mistake, planted, unavailable
from tests.cuda_on_cpu.next_scale import Case, Watched, cases, memory_bits, next_scale, next_scale_ptx, with_all_sides
from tests.cuda_on_cpu.problems import problem

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")
compiled = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

TILE = 64


def tiles(length: int) -> int:
    return -(-length // TILE)


def work(case: Case) -> tuple[int, int]:
    """Warp-wide products and copied bytes: of the tiles of old and of new keys, for every tile of queries."""
    (batch, heads, count, width), past = case.problem.q_BHLK.shape, case.past
    products = tiles(count) * (tiles(past) + tiles(count)) * 2 * TILE * TILE * width
    rows = count + tiles(count) * 2 * (past + count)
    return batch * heads * products // (16 * 8 * 16), batch * heads * rows * width * 2


def wrongs(case: Case, result: Watched) -> list[str]:
    """What is wrong with a result. The output may err twice as much as the plain code's, and round once; the cache
    must hold the bits of the new keys and values, and be as before everywhere else."""
    found = list(result.run.reports)
    output, _ = case.problem.exact()
    rounding = torch.finfo(result.output_BHLK.dtype).eps / 2 * output.abs().max()
    error, plain_error = ((x.double() - output).abs().max() for x in (result.output_BHLK, case.problem.plain()))
    if not error <= 2 * plain_error + rounding:
        found.append("output")
    past, pairs = case.past, zip(case.caches(), (case.problem.k_BGNK, case.problem.v_BGNK), strict=True)
    for (expected, every), cache in zip(pairs, (result.cached_keys, result.cached_values), strict=True):
        expected[:, :, past : every.shape[2]] = every[:, :, past:]
        if not torch.equal(memory_bits(cache), memory_bits(expected)):
            found.append("cache")
    counters = result.run.counters
    if (counters.mma, counters.copied_bytes) != work(case):
        found.append("work")
    if counters.bank_conflicts:
        found.append("bank conflicts")
    return found


VARIANTS = [
    (dtype, width, cosine)
    for dtype in (torch.bfloat16, torch.float16)
    for width in (64, 128)
    for cosine in (True, False)
]
variants = pytest.mark.parametrize(("dtype", "width", "cosine"), VARIANTS)


@variants
@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 3))
def test_any_shape_is_right(dtype: torch.dtype, width: int, cosine: bool, data: st.DataObject, seed: int) -> None:
    drawn = data.draw(cases(dtype, width, cosine))
    assert wrongs(drawn, next_scale(drawn, seed=seed)) == []


@variants
def test_the_first_token_sees_itself(dtype: torch.dtype, width: int, cosine: bool) -> None:
    alone = Case(problem(dtype, width, [1], cosine=cosine), spare=3)
    result = next_scale(alone)
    assert wrongs(alone, result) == []
    assert torch.equal(result.output_BHLK, alone.problem.v_BGNK)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 65, 128])
def test_lengths_around_whole_tiles(past: int) -> None:
    for count in (1, 63, 64, 65):
        edge = Case(problem(torch.bfloat16, 64, [past + count] * count))  # and the cache is full afterwards
        assert wrongs(edge, next_scale(edge)) == []


def test_all_schedules_give_the_same_numbers() -> None:
    case = with_all_sides()
    first = next_scale(case)
    for seed in range(1, 6):
        assert next_scale(case, seed=seed).same_bits(first)


@pytest.mark.slow
@variants
def test_a_whole_picture_scale_by_scale(dtype: torch.dtype, width: int, cosine: bool) -> None:
    past = 0
    for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16):
        count = side * side
        case = Case(problem(dtype, width, [past + count] * count, batch=2, cosine=cosine), spare=680 - past - count)
        result = next_scale(case, seed=1)
        assert wrongs(case, result) == []
        output, _ = case.problem.exact()
        squares = [float((x.double() - output).square().mean()) for x in (result.output_BHLK, case.problem.plain())]
        assert past < 100 or squares[0] <= squares[1]  # over many numbers, the kernel errs less than the plain code
        past += count


# ---- Planted mistakes: first those that tell these kernels from others, then the rest ----

KERNEL = "next_scale.cuh"
RACE, BLOCKS_RACE, NOT_ARRIVED = "race in shared memory", "race in a tensor", "reads where a cp.async has not arrived"
MISTAKES = {
    "new keys are read from the cache, where other blocks write": Mistake(
        KERNEL,
        "call.cached_keys, call.new_keys);",
        "call.cached_keys, View<const uint16_t>{call.cached_keys.data + call.past * call.cached_keys.token_stride, "
        "call.cached_keys.batch_stride, call.cached_keys.head_stride, call.cached_keys.token_stride});",
        BLOCKS_RACE,
    ),
    "one cached key too many is read": Mistake(
        KERNEL, "kKeyTile, call.past);", "kKeyTile, call.past + 1);", BLOCKS_RACE
    ),
    "every query head appends": Mistake(KERNEL, "head % share == 0 ?", "true ?", BLOCKS_RACE),
    "all blocks append to the same rows": Mistake(
        KERNEL,
        "call.past + first_query,\n                  shared.values(stage)",
        "call.past,\n                  shared.values(stage)",
        BLOCKS_RACE,
    ),
    "keys are appended a row too late": Mistake(
        KERNEL,
        "call.past + first_query,\n                  shared.keys(stage)",
        "call.past + first_query + 1,\n                  shared.keys(stage)",
        "cache",
    ),
    "keys are appended by the values' stride": Mistake(
        KERNEL, "call.cached_keys.token_stride, call.past", "call.cached_values.token_stride, call.past", "cache"
    ),
    "what is appended is the tile that is being copied": Mistake(
        KERNEL, "shared.values(stage), exist);", "shared.values(1 - stage), exist);", "a cp.async has not arrived"
    ),
    "rows beyond the last new one are appended": Mistake(KERNEL, "if (row < count) *", "if (row <= count) *", "cache"),
    "keys that do not exist are not hidden": Mistake(KERNEL, "if (exist < kKeyTile) hide", "if (false) hide", "output"),
    "old keys are left out": Mistake(
        KERNEL, "int tile = 0; tile < tiles", "int tile = old_tiles; tile < tiles", "output"
    ),
    "no barrier before a tile": Mistake(KERNEL, "__syncthreads();     // everybody's is", "//", RACE),
}
MORE_MISTAKES = {
    "one new key too many is read": Mistake(KERNEL, "kKeyTile, call.count);", "kKeyTile, call.count + 1);", "output"),
    "one query head of all appends": Mistake(KERNEL, "head % share == 0 ?", "head == 0 ?", "cache"),
    "all blocks append the first tile": Mistake(KERNEL, "old_tiles + int(blockIdx.x)", "old_tiles", "cache"),
    "keys are appended as values": Mistake(
        KERNEL, "shared.values(stage), exist);", "shared.keys(stage), exist);", "cache"
    ),
    "the last old tile counts as whole": Mistake(
        KERNEL, "tile < old_tiles ? call.past - tile * kKeyTile :", "tile < old_tiles ? kKeyTile :", "output"
    ),
    "the last tile in part is left out": Mistake(
        "attention_forward.cuh", "(keys + kKeyTile - 1) / kKeyTile", "keys / kKeyTile", "output"
    ),
    "new keys lie by the cache's stride": Mistake(
        KERNEL,
        "fresh.tokens(batch, key_head), fresh.token_stride",
        "fresh.tokens(batch, key_head), old.token_stride",
        "reads outside",
    ),
    "query heads take turns in key heads": Mistake(
        KERNEL, "key_head = head / share", "key_head = head % call.key_heads", "output"
    ),
    "the queries' wait_group lets one group more pass": Mistake(
        KERNEL, "cp_async_wait<1>();", "cp_async_wait<2>();", NOT_ARRIVED
    ),
    "the tiles' wait_group lets one group pass": Mistake(
        KERNEL, "cp_async_wait<0>();", "cp_async_wait<1>();", NOT_ARRIVED
    ),
    "no barrier after the queries": Mistake(KERNEL, "__syncthreads();     // the other threads' queries", "//", RACE),
    "no barrier after the lengths": Mistake(KERNEL, "__syncthreads();  // lengths of keys", "//", RACE),
    "both stages are one": Mistake(
        KERNEL, "const int stage = tile % 2;\n    const auto", "const int stage = 0;\n    const auto", "cp.async"
    ),
    "copies beyond the last tile": Mistake(
        KERNEL, "if (tile + 1 < tiles)", "if (tile < tiles)", "ends while a cp.async is on its way"
    ),
    "rows beyond the last query are written": Mistake(
        KERNEL, "if (query < call.count)", "if (query <= call.count)", "outside"
    ),
}


@pytest.mark.parametrize("name", [*MISTAKES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MISTAKES)])
def test_a_planted_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    mistake = {**MISTAKES, **MORE_MISTAKES}[name]
    csrc = mistake.planted(tmp_path / "csrc")
    case = with_all_sides()
    for seed in (0, 1):
        found = wrongs(case, next_scale(case, seed=seed, csrc=csrc))
        assert any(mistake.noticed in each for each in found), (seed, found)


# ---- The PTX ----


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cosine", [True, False])
def test_ptx_and_source_agree_to_the_last_bit(dtype: torch.dtype, width: int, cosine: bool) -> None:
    case = with_all_sides(dtype, width, cosine)
    assert next_scale_ptx(case).same_bits(next_scale(case))


@pytest.mark.slow
@compiled
def test_so_does_the_ptx_for_sm_90() -> None:
    case = with_all_sides()
    assert next_scale_ptx(case, arch="sm_90").same_bits(next_scale(case))


IN_ASSEMBLY = {
    "a pair is packed the wrong way round": ("cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1"),
    "one group more may be on its way": ('wait_group %0;" ::"n"(pending)', 'wait_group %0;" ::"n"(pending + 1)'),
    "what exists is not copied": ("exists ? 16 : 0", "exists ? 0 : 16"),
}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("name", IN_ASSEMBLY)
def test_a_mistake_in_the_assembly_is_noticed(name: str, tmp_path: Path) -> None:
    csrc = planted(tmp_path / "csrc", "ptx.cuh", *IN_ASSEMBLY[name])
    case = with_all_sides()
    try:
        result = next_scale_ptx(case, csrc=csrc)
    except RuntimeError:
        return  # noticed at once
    assert not result.same_bits(next_scale(case))

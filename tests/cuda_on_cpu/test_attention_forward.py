"""The forward kernel, run on the CPU from its CUDA source: right, free of races, every planted mistake noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_on_cpu.forward import Watched, attention_forward
from tests.cuda_on_cpu.harness import CSRC, Mistake, planted, unavailable
from tests.cuda_on_cpu.problems import Problem, problem, problems, visible_keys, with_all_sides

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TILE = 64


def work(problem: Problem) -> tuple[int, int]:
    """Warp-wide products and copied bytes of a kernel that computes the tiles that somebody sees, and no others."""
    (batch, heads, queries, width), keys = problem.q_BHLK.shape, problem.k_BGNK.shape[2]
    seen = [problem.limits[min(first + TILE, queries) - 1] for first in range(0, queries, TILE)]  # by a block
    tiles = [-(-limit // TILE) for limit in seen]
    products = 2 * TILE * TILE * width  # queries times keys, weights times values
    rows = queries + 2 * sum(min(keys, TILE * number) for number in tiles)
    return batch * heads * sum(tiles) * products // (16 * 8 * 16), batch * heads * rows * width * 2


def wrongs(problem: Problem, result: Watched) -> list[str]:
    """What is wrong with a result. The output may err twice as much as the plain code's, and round once."""
    found = list(result.run.reports)
    output, log_sum_exp = problem.exact()
    rounding = torch.finfo(problem.q_BHLK.dtype).eps / 2 * output.abs().max()
    error, plain_error = ((x.double() - output).abs().max() for x in (result.output_BHLK, problem.plain()))
    if not error <= 2 * plain_error + rounding:
        found.append("output")
    if not ((result.log_sum_exp_BHL - log_sum_exp).abs() <= 2e-6 * (1 + log_sum_exp.abs())).all():
        found.append("log-sum-exp")
    counters = result.run.counters
    if (counters.mma, counters.copied_bytes) != work(problem):
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
@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 3))
def test_any_shape_is_right(dtype: torch.dtype, width: int, cosine: bool, data: st.DataObject, seed: int) -> None:
    drawn = data.draw(problems(dtype, width, cosine))
    assert wrongs(drawn, attention_forward(drawn, seed=seed)) == []


@variants
def test_one_token_sees_itself(dtype: torch.dtype, width: int, cosine: bool) -> None:
    alone = problem(dtype, width, [1], cosine=cosine)
    result = attention_forward(alone)
    assert wrongs(alone, result) == []
    assert torch.equal(result.output_BHLK, alone.v_BGNK)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_lengths_around_whole_tiles(length: int) -> None:
    for limits in (list(range(1, length + 1)), [length] * length, [length + 1] * length):
        edge = problem(torch.bfloat16, 64, limits)
        assert wrongs(edge, attention_forward(edge)) == []


@pytest.mark.slow
@variants
def test_the_published_256_pixel_schedule(dtype: torch.dtype, width: int, cosine: bool) -> None:
    limits = visible_keys(VAR_256)
    whole = problem(dtype, width, limits, batch=2, key_heads=2, cosine=cosine)
    result = attention_forward(whole, seed=1)
    assert wrongs(whole, result) == []
    output, _ = whole.exact()
    squares = [float((x.double() - output).square().mean()) for x in (result.output_BHLK, whole.plain())]
    assert squares[0] <= squares[1]  # over many numbers, the kernel errs less than the plain code


def test_schedules_change_neither_a_bit_nor_the_verdict() -> None:
    case = with_all_sides()
    first = attention_forward(case)
    assert wrongs(case, first) == []
    for seed in range(1, 7):
        other = attention_forward(case, seed=seed)
        assert other.run.reports == ()
        assert torch.equal(other.output_BHLK, first.output_BHLK)
        assert torch.equal(other.log_sum_exp_BHL, first.log_sum_exp_BHL)


def one_logit_far_above(dtype: torch.dtype, key: int) -> Problem:
    case = problem(dtype, 64, [201] * 3, cosine=False)
    case.k_BGNK[:, :, key] = 30 * case.q_BHLK[:, :, 0]
    return case


def all_logits_far_below_zero(dtype: torch.dtype) -> Problem:
    case = problem(dtype, 64, [201] * 3, cosine=False)
    case.k_BGNK[:] -= 30 * case.q_BHLK[:, :, :1]
    return case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exponentials_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    for key in (0, 63, 64, 200):  # the largest logit comes early or late
        case = one_logit_far_above(dtype, key)
        result = attention_forward(case)
        assert wrongs(case, result) == []
        assert float(result.log_sum_exp_BHL[0, 0, 0]) > 100
    case = all_logits_far_below_zero(dtype)
    result = attention_forward(case)
    assert wrongs(case, result) == []
    assert float(result.log_sum_exp_BHL[0, 0, 0]) < -100


def test_rows_of_a_block_that_do_not_exist_are_not_written() -> None:
    case = problem(torch.bfloat16, 64, [3, 3, 3], batch=2, key_heads=3)
    assert attention_forward(case).run.reports == ()  # the output is registered to its last number


WRONG_LIMITS = {
    "beyond the keys": lambda limits: [limit + 500 for limit in limits],
    "as large as can be": lambda limits: [2**31 - 1] * len(limits),
    "none": lambda limits: [0] * len(limits),
    "as small as can be": lambda limits: [-(2**31)] * len(limits),
    "decreasing": lambda limits: limits[::-1],
}


@pytest.mark.parametrize("wrong", WRONG_LIMITS)
def test_wrong_limits_lead_to_wrong_numbers_and_nowhere_else(wrong: str) -> None:
    """On a GPU nobody looks at them before."""
    case = with_all_sides()
    assert attention_forward(replace(case, limits=WRONG_LIMITS[wrong](case.limits))).run.reports == ()


# ---- Planted mistakes ----


FORWARD, SHARED, TILES = "attention_forward.cuh", "attention.cuh", "tiles.cuh"
RACE = "race in shared memory"
MISTAKES = {
    "the queries' wait_group lets one group more pass": Mistake(
        FORWARD, "cp_async_wait<1>();", "cp_async_wait<2>();", "reads where a cp.async has not arrived"
    ),
    "the tiles' wait_group lets one group pass": Mistake(
        FORWARD, "cp_async_wait<0>();", "cp_async_wait<1>();", "reads where a cp.async has not arrived"
    ),
    "the queries' copies are not a group of their own": Mistake(
        FORWARD, "  cp_async_commit();\n  load_keys", "  load_keys", "reads where a cp.async has not arrived"
    ),
    "no barrier after the queries": Mistake(FORWARD, "__syncthreads();     // the other threads' queries", "//", RACE),
    "no barrier before a tile": Mistake(FORWARD, "__syncthreads();     // everybody's is", "//", RACE),
    "no barrier after the lengths": Mistake(FORWARD, "__syncthreads();  // lengths of keys", "//", RACE),
    "one warp passes a barrier by": Mistake(
        FORWARD, "__syncthreads();  // lengths of keys", "if (warp()) __syncthreads();  //", "divergence"
    ),
    "both stages are one": Mistake(
        FORWARD, "const int stage = tile % 2, first_key", "const int stage = 0, first_key", "cp.async"
    ),
    "copies beyond the last tile": Mistake(
        FORWARD, "if (tile + 1 < tiles)", "if (tile < tiles)", "ends while a cp.async is on its way"
    ),
    "shared memory without room for the lengths": Mistake(
        FORWARD, "4 * key_bytes + kKeyTile * int(sizeof(float));", "4 * key_bytes;", "writes outside"
    ),
    "the lengths lie on the values": Mistake(
        FORWARD, "(data + query_bytes + 4 * key_bytes)", "(data + query_bytes + 3 * key_bytes)", "race"
    ),
    "a limit is passed by one": Mistake(FORWARD, "if (key >= limits", "if (key > limits", "output"),
    "tiles that not all queries see are not masked": Mistake(
        FORWARD, "all_see = call.limits[first_query]", "all_see = call.limits[end_query - 1]", "output"
    ),
    "the last tile in part is left out": Mistake(
        FORWARD, "tiles = tiles_of(some_see)", "tiles = some_see / kKeyTile", "output"
    ),
    "limits are read beyond the last query": Mistake(
        FORWARD,
        "call.limits[min(warp_row + row_of(half), call.query_count - 1)]",
        "call.limits[warp_row + row_of(half)]",
        "reads outside",
    ),
    "rows beyond the last query are written": Mistake(
        FORWARD, "if (query < call.query_count)", "if (query <= call.query_count)", "race in a tensor"
    ),
    "rows beyond the last key are read": Mistake(TILES, "first_row + row < end", "first_row + row <= end", "output"),
    "two blocks write the same rows": Mistake(
        FORWARD, "(gridDim.x - 1 - blockIdx.x)", "(gridDim.x - 1 - blockIdx.x / 2)", "race in a tensor"
    ),
    "all lanes of a quad write the log-sum-exp": Mistake(
        FORWARD, "if (lane() % 4 == 0) log", "log", "race in a tensor"
    ),
    "the values' stride is the keys'": Mistake(FORWARD, "call.values.token_stride", "call.keys.token_stride", "output"),
    "query heads take turns in key heads": Mistake(
        FORWARD, "head / (call.heads / call.key_heads)", "head % call.key_heads", "output"
    ),
    "the output does not shrink": Mistake(FORWARD, "output[eight][2 * half] *= shrink;", "", "output"),
    "the total does not shrink": Mistake(
        FORWARD, "fmaf(total[half], shrink, tile_total)", "total[half] + tile_total", "output"
    ),
    "the largest logit is the tile's": Mistake(
        FORWARD, "fmaxf(before, quad_max(tile_largest))", "quad_max(tile_largest)", "output"
    ),
    "each lane has a largest logit of its own": Mistake(
        FORWARD, "fmaxf(before, quad_max(tile_largest))", "fmaxf(before, tile_largest)", "output"
    ),
    "half of a quad is summed": Mistake(TILES, "return value + shfl_xor(value, 2);", "return value;", "output"),
    "half of a key is measured": Mistake(FORWARD, "squares += shfl_xor(squares, 1);", "", "output"),
    "a length of zero is divided by": Mistake(SHARED, "fmaxf(sqrtf(squares), kShortest)", "sqrtf(squares)", "output"),
    "the log-sum-exp is of base 2": Mistake(
        FORWARD, "+ log2_approx(total)) * kLn2", "+ log2_approx(total))", "log-sum-exp"
    ),
    "values are not transposed": Mistake(TILES, "ldmatrix_x4_transposed(fragment", "ldmatrix_x4(fragment", "output"),
    "a tile that nobody sees is computed": Mistake(
        FORWARD, "tiles = tiles_of(some_see)", "tiles = tiles_of(some_see) + 1", "work"
    ),
    "no swizzle": Mistake(TILES, "(chunk ^ (row % 8))", "chunk", "bank conflicts"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    csrc = mistake.planted(tmp_path / "csrc")
    case = with_all_sides()
    for seed in (0, 1):
        found = wrongs(case, attention_forward(case, seed=seed, csrc=csrc))
        assert any(mistake.noticed in each for each in found), (seed, found)


def test_a_mistake_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold 'no such text' once, not 0 times"):
        planted(tmp_path / "csrc", FORWARD, "no such text", "")
    assert (CSRC / FORWARD).read_text().count("__syncthreads();") == 3  # each of them is removed above

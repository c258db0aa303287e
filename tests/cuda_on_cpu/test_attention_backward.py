"""The backward kernels, run on the CPU from their CUDA source: right, free of races, every planted mistake noticed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_on_cpu.backward import Watched, attention_backward
from tests.cuda_on_cpu.forward import attention_forward
from tests.cuda_on_cpu.harness import CSRC, Mistake, planted, unavailable
from tests.cuda_on_cpu.problems import Gradients, Learning, Problem, problem, problems, visible_keys, with_all_sides
from tests.cuda_on_cpu.test_attention_forward import (
    VAR_256,
    WRONG_LIMITS,
    all_logits_far_below_zero,
    one_logit_far_above,
    variants,
)

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")

ROWS = 64
WALKED = {64: 64, 128: 32}  # by width: rows of the tiles that a block walks over


def work(problem: Problem) -> dict[str, tuple[int, int]]:
    """Warp-wide products and copied bytes of kernels that compute the tiles that somebody sees, and no others."""
    (batch, heads, queries, width), (key_heads, keys) = problem.q_BHLK.shape, problem.k_BGNK.shape[1:3]
    limits, walked, row = problem.limits, WALKED[width], width * 2
    product = ROWS * walked * width // (16 * 8 * 16)

    tiles, copied = 0, 0  # of the keys kernel
    for first_key in range(0, keys, ROWS):
        seeing = sum(limit > first_key for limit in limits)  # the last so many
        first = (queries - seeing) // walked * walked if seeing else queries
        tiles += -(-(queries - first) // walked) * heads
        copied += 2 * row * (min(ROWS, keys - first_key) * key_heads + (queries - first) * heads)
    keys_kernel = (batch * tiles * 4 * product, batch * (copied + tiles * walked * 16))

    tiles, copied = 0, 0  # of the queries kernel
    for first in range(0, queries, ROWS):
        seen = -(-limits[min(first + ROWS, queries) - 1] // walked) * walked
        tiles += seen // walked * heads
        copied += 2 * row * (min(ROWS, queries - first) + min(keys, seen)) * heads
    lengths = 4 * walked if problem.cosine is not None else 0
    queries_kernel = (batch * tiles * 3 * product, batch * (copied + tiles * lengths))

    others = dict.fromkeys(["prepare"] if problem.cosine is None else ["prepare", "head_scales"], (0, 0))
    return {"keys": keys_kernel, "queries": queries_kernel, **others}


@dataclass(frozen=True)
class Case:
    """A backward pass, and what should become of it."""

    learning: Learning

    @cached_property
    def exact(self) -> tuple[Gradients, Gradients]:
        return self.learning.exact()

    @cached_property
    def plain(self) -> Gradients:
        return self.learning.plain()

    def rows(self, name: str) -> list[Tensor]:
        """Which numbers are judged together: gradients of vectors that are divided by 1e-12 would hide all others."""
        x = self.learning.problem.learned[name]
        short = x.double().norm(dim=-1) < 1e-12 if x.dim() == 4 else torch.zeros(len(x), dtype=torch.bool)
        return [short, ~short] if short.any() else [~short]


def wrongs(case: Case, result: Watched) -> list[str]:
    """What is wrong with a result. Gradients may err twice as much as the plain code's, and round once; and as much
    again as is explained at :meth:`Learning.exact`. Head scales do not round: theirs are in float32."""
    found = list(result.reports)
    exact, slack = case.exact
    for name, true in exact.items():
        for rows in case.rows(name):
            rounding = torch.finfo(result.gradients[name].dtype).eps / 2 * true[rows].abs().max()
            error, plain_error = ((x[name].double() - true)[rows].abs().max() for x in (result.gradients, case.plain))
            if not error <= 2 * plain_error + rounding + slack[name][rows].max():
                found.append(name)
    counters = {name: run.counters for name, run in result.runs.items()}
    if {name: (c.mma, c.copied_bytes) for name, c in counters.items()} != work(case.learning.problem):
        found.append("work")
    if any(c.bank_conflicts for c in counters.values()):
        found.append("bank conflicts")
    return found


def right(problem: Problem, seed: int = 0) -> Watched:
    """The gradients, if nothing is wrong with them."""
    case = Case(Learning.of(problem))
    result = attention_backward(case.learning, seed=seed)
    assert wrongs(case, result) == []
    return result


@variants
@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 3))
def test_any_shape_is_right(dtype: torch.dtype, width: int, cosine: bool, data: st.DataObject, seed: int) -> None:
    right(data.draw(problems(dtype, width, cosine)), seed)


@variants
def test_one_token_sees_itself(dtype: torch.dtype, width: int, cosine: bool) -> None:
    alone = Case(Learning.of(problem(dtype, width, [1], cosine=cosine)))
    result = attention_backward(alone.learning)
    assert wrongs(alone, result) == []
    assert torch.equal(result.gradients["v_BGNK"], alone.learning.d_output_BHLK)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("width", [64, 128])
def test_lengths_around_whole_tiles(length: int, width: int) -> None:
    for limits in (list(range(1, length + 1)), [length] * length, [length + 1] * length):
        right(problem(torch.bfloat16, width, limits))


@variants
def test_keys_that_nobody_sees_have_a_gradient_of_zero(dtype: torch.dtype, width: int, cosine: bool) -> None:
    result = right(problem(dtype, width, [68, 69, 70], share=2, cosine=cosine, unseen=100))
    for name in ("k_BGNK", "v_BGNK"):
        assert (result.gradients[name][:, :, 70:] == 0).all()


@pytest.mark.slow
@variants
def test_the_published_256_pixel_schedule(dtype: torch.dtype, width: int, cosine: bool) -> None:
    whole = Case(Learning.of(problem(dtype, width, visible_keys(VAR_256), key_heads=2, share=2, cosine=cosine)))
    result = attention_backward(whole.learning, seed=1)
    assert wrongs(whole, result) == []
    for name, exact in whole.exact[0].items():
        squares = [float((x[name].double() - exact).square().mean()) for x in (result.gradients, whole.plain)]
        assert squares[0] <= squares[1], name  # over many numbers, the kernels err less than the plain code


def test_what_the_forward_kernel_keeps_will_do() -> None:
    case = with_all_sides(unseen=70)
    forward = attention_forward(case)
    learning = replace(Learning.of(case), output_BHLK=forward.output_BHLK, log_sum_exp_BHL=forward.log_sum_exp_BHL)
    assert wrongs(Case(learning), attention_backward(learning)) == []


def test_schedules_change_neither_a_bit_nor_the_verdict() -> None:
    case = Case(Learning.of(with_all_sides(unseen=70)))
    first = attention_backward(case.learning)
    assert wrongs(case, first) == []
    for seed in range(1, 4):
        other = attention_backward(case.learning, seed=seed)
        assert other.reports == []
        for name, gradient in first.gradients.items():
            assert torch.equal(other.gradients[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exponentials_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    for key in (0, 63, 64, 200):
        right(one_logit_far_above(dtype, key))
    right(all_logits_far_below_zero(dtype))


def test_hidden_logits_may_be_far_above() -> None:
    case = problem(torch.bfloat16, 64, [1, 2, 3], cosine=False)
    case.k_BGNK[:, :, 1] = 100 * case.q_BHLK[:, :, 0]  # the exponential is infinite
    right(case)


def test_vectors_that_are_too_short_to_normalize() -> None:
    case = with_all_sides()
    case.q_BHLK[:, :, 8:10] *= 1e-14
    case.k_BGNK[:, :, 31:33] *= 1e-14
    right(case)


def spoiled(case: Case, result: Watched) -> list[str]:
    """Gradients that are wrong in half precision, where some vectors are zeros, which the plain code divides by 0."""
    found = []
    for name, exact in case.exact[0].items():
        gradient = result.gradients[name].double()
        error = (gradient - exact)[case.rows(name)[-1]].abs().max()  # of all other vectors
        if gradient.isnan().any() or not error <= 2**-9 * exact[case.rows(name)[-1]].abs().max():
            found.append(name)
    return found


@pytest.mark.parametrize("width", [64, 128])
def test_zeros_in_half_precision_spoil_no_other_gradient(width: int) -> None:
    case = Case(Learning.of(with_all_sides(torch.float16, width)))
    result = attention_backward(case.learning)
    assert result.reports == []
    assert spoiled(case, result) == []


def test_more_parts_of_a_head_scale_than_lanes_that_add_them() -> None:
    right(problem(torch.bfloat16, 64, [2, 2, 3], batch=9))


@pytest.mark.parametrize("wrong", WRONG_LIMITS)
@pytest.mark.parametrize("width", [64, 128])
def test_wrong_limits_lead_to_wrong_numbers_and_nowhere_else(wrong: str, width: int) -> None:
    learning = Learning.of(with_all_sides(width=width))
    limits = WRONG_LIMITS[wrong](learning.problem.limits)
    assert attention_backward(replace(learning, problem=replace(learning.problem, limits=limits))).reports == []


# ---- Planted mistakes ----

KEYS, QUERIES, PREPARE = (f"attention_backward_{kernel}.cuh" for kernel in ("keys", "queries", "prepare"))
BACKWARD, SHARED, TILES = "attention_backward.cuh", "attention.cuh", "tiles.cuh"
LATE, RACE, OUTSIDE = "reads where a cp.async has not arrived", "race in shared memory", "writes outside"
Q, K, V, SCALES = "q_BHLK", "k_BGNK", "v_BGNK", "cosine"
MISTAKES = {
    # The keys kernel
    "keys: the first wait_group lets one group pass": Mistake(
        KEYS, "cp_async_wait<0>();  // this thread's part of the keys", "cp_async_wait<1>();  //", LATE
    ),
    "keys: the loop's wait_group lets one group pass": Mistake(
        KEYS, "cp_async_wait<0>();  // this thread's part of the next queries", "cp_async_wait<1>();  //", LATE
    ),
    "keys: no barrier before the loop": Mistake(
        KEYS, "__syncthreads();     // that of the other threads, too: all the keys", "//", RACE
    ),
    "keys: no barrier in the loop": Mistake(
        KEYS, "__syncthreads();     // everybody's is, and everybody is done with these queries", "//", RACE
    ),
    "keys: one warp passes a barrier by": Mistake(
        KEYS,
        "__syncthreads();     // everybody's is, and everybody is done with these queries",
        "if (warp()) __syncthreads();  //",
        "deadlock",
    ),
    "keys: both stages are one": Mistake(
        KEYS, "const int stage = step % 2, head", "const int stage = 0, head", "cp.async"
    ),
    "keys: copies beyond the last tile": Mistake(KEYS, "if (step + 1 < steps)", "if (step < steps)", "outside"),
    "keys: a limit is passed by one": Mistake(KEYS, "< numbers[column].limit", "<= numbers[column].limit", K),
    "keys: tiles that not all queries see are not masked": Mistake(
        KEYS, "if (numbers[0].limit < first_key + kRows)", "if (numbers[walked_rows - 1].limit < first_key)", V
    ),
    "keys: queries whose tile begins with one that sees nothing are left out": Mistake(
        KEYS, "min((middle + 1) * rows, call.query_count) - 1", "middle * rows", K
    ),
    "keys: tiles that see nothing are computed": Mistake(
        KEYS, "- 1] > first_key) {", "- 1] > first_key - kRows) {", "work"
    ),
    "keys: the last tile in part is left out": Mistake(
        KEYS,
        "(call.query_count + walked_rows - 1) / walked_rows - first",
        "call.query_count / walked_rows - first",
        V,
    ),
    "keys: only one of the heads that share them is heard": Mistake(
        KEYS, "const int steps = share * tiles;", "const int steps = tiles;", V
    ),
    "keys: query heads take turns in key heads": Mistake(
        KEYS, "key_head * share + step / tiles", "key_head + step / tiles * call.key_heads", V
    ),
    "keys: delta is missing": Mistake(KEYS, "(number - query.delta)", "number", K),
    "keys: the queries' lengths are missing": Mistake(
        KEYS, "number *= head_scale * finite<format>(query.inverse_length)", "number *= head_scale", K
    ),
    "keys: the head scale is missing": Mistake(
        KEYS, "number *= head_scale * finite<format>(query.inverse_length)", "number *= query.inverse_length", K
    ),
    "keys: weights are those of values": Mistake(
        KEYS, "multiply<format>(weights, keys, queries)", "multiply<format>(weights, values, queries)", V
    ),
    "keys: d_output's stride is the output's": Mistake(
        KEYS,
        "call.d_output.tokens(batch, head),\n                                     call.d_output.token_stride",
        "call.d_output.tokens(batch, head),\n                                     call.output.token_stride",
        V,
    ),
    "keys: two blocks write the same rows": Mistake(
        KEYS, "first_key = blockIdx.x * kRows", "first_key = blockIdx.x / 2 * kRows", "race in a tensor"
    ),
    "keys: rows beyond the last are written": Mistake(
        KEYS, "if (key < call.key_count)", "if (key <= call.key_count)", "writes"
    ),
    "keys: the stride of d_values is that of d_keys": Mistake(
        KEYS, "key * call.d_values.token_stride", "key * call.d_keys.token_stride", V
    ),
    # The queries kernel
    "queries: the first wait_group lets one group pass": Mistake(
        QUERIES, "cp_async_wait<0>();  // this thread's part of the queries", "cp_async_wait<1>();  //", LATE
    ),
    "queries: the loop's wait_group lets one group pass": Mistake(
        QUERIES, "cp_async_wait<0>();  // this thread's part of the next keys", "cp_async_wait<1>();  //", LATE
    ),
    "queries: no barrier before the loop": Mistake(
        QUERIES, "__syncthreads();     // that of the other threads, too: all the queries", "//", RACE
    ),
    "queries: no barrier in the loop": Mistake(
        QUERIES, "__syncthreads();     // everybody's is, and everybody is done with these keys", "//", RACE
    ),
    "queries: copies beyond the last tile": Mistake(QUERIES, "if (tile + 1 < tiles)", "if (tile < tiles)", "work"),
    "queries: a limit is passed by one": Mistake(
        QUERIES, "column < numbers[half].limit", "column <= numbers[half].limit", Q
    ),
    "queries: tiles that not all see are not masked": Mistake(
        QUERIES, "if (first_key + walked_rows > all_see)", "if (first_key > all_see)", Q
    ),
    "queries: a tile that nobody sees is computed": Mistake(
        QUERIES, "(some_see + walked_rows - 1) / walked_rows", "some_see / walked_rows + 2", "work"
    ),
    "queries: delta is missing": Mistake(QUERIES, "(number - numbers[half_of(element)].delta)", "number", Q),
    "queries: the keys' lengths are missing": Mistake(
        QUERIES, "number *= finite<format>(key_inverse_lengths[8 * eight + column_of(element)]);", "{}", Q
    ),
    "queries: the head scale is missing": Mistake(QUERIES, "d_queries, half, head_scale)", "d_queries, half, 1)", Q),
    "queries: two blocks write the same rows": Mistake(
        QUERIES, "(gridDim.x - 1 - blockIdx.x)", "(gridDim.x - 1 - blockIdx.x / 2)", "race in a tensor"
    ),
    "queries: rows beyond the last are written": Mistake(
        QUERIES, "if (query < call.query_count)", "if (query <= call.query_count)", "writes"
    ),
    "queries: all warps write one part of the head scale": Mistake(
        QUERIES, "to[first_query / 16 + warp()]", "to[first_query / 16]", "race in a tensor"
    ),
    "queries: parts of the head scale count every query four times": Mistake(
        QUERIES, "int mask = 4; mask < 32", "int mask = 1; mask < 32", SCALES
    ),
    # All of them
    "the gradient is not made orthogonal to its vector": Mistake(BACKWARD, ": -along[half] * inverse", ": 0.0f", K),
    "delta and lengths are sums of half": Mistake(
        BACKWARD, "mask < lanes; mask *= 2", "mask < lanes / 2; mask *= 2", Q
    ),
    "the log-sum-exp is of base e": Mistake(PREPARE, "[first + row] * kLog2E;", "[first + row];", V),
    "numbers of queries that do not exist are written": Mistake(
        PREPARE, "if (chunk == 0 && row < padded(call.query_count))", "if (chunk == 0)", "race in a tensor"
    ),
    "shared memory without room for the queries' numbers": Mistake(
        BACKWARD, "4 * walked_bytes + 2 * number_bytes;", "4 * walked_bytes;", OUTSIDE
    ),
    "not all parts of a head scale are added": Mistake(
        QUERIES, "i < parts; i += threads", "i < 20; i += threads", SCALES
    ),
    "a length of zero is divided by": Mistake(SHARED, "fmaxf(sqrtf(squares), kShortest)", "sqrtf(squares)", Q),
    "no load is transposed": Mistake(TILES, "ldmatrix_x4_transposed(fragment", "ldmatrix_x4(fragment", V),
    "no swizzle": Mistake(TILES, "(chunk ^ (row % 8))", "chunk", "bank conflicts"),
}


@pytest.fixture(scope="module")
def all_sides() -> Case:
    return Case(Learning.of(with_all_sides(unseen=70)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, all_sides: Case, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    csrc = planted(tmp_path / "csrc", mistake.file, mistake.old, mistake.new)
    for seed in (0, 1):
        found = wrongs(all_sides, attention_backward(all_sides.learning, seed=seed, csrc=csrc))
        assert any(mistake.noticed in each for each in found), (seed, found)


def test_the_scale_is_missed_where_there_is_no_cosine(tmp_path: Path) -> None:
    case = Case(Learning.of(problem(torch.bfloat16, 64, [1, 2, 3], cosine=False)))
    for file, old, name in (
        (KEYS, "cosine ? 1.0f : call.scale", K),
        (QUERIES, "cosine ? call.head_scales[head] : call.scale", Q),
    ):
        csrc = planted(tmp_path / name, file, old, old.replace("call.scale", "1.0f"))
        assert name in wrongs(case, attention_backward(case.learning, csrc=csrc))


def test_infinite_factors_are_noticed(tmp_path: Path) -> None:
    csrc = planted(tmp_path / "csrc", BACKWARD, "format == Format::fp16 && too", "false && too")
    case = Case(Learning.of(with_all_sides(torch.float16)))
    assert spoiled(case, attention_backward(case.learning, csrc=csrc)) == [Q, K, SCALES]


def test_each_barrier_is_removed_above() -> None:
    assert [(CSRC / file).read_text().count("__syncthreads();") for file in (KEYS, QUERIES, PREPARE, BACKWARD)] == [
        2,
        2,
        0,
        0,
    ]

"""The backend ``cuda``: around emulated kernels on a CPU, and around the real ones where a GPU is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda_on_cpu.problems import Gradients, Learning, Problem, problem, visible_keys
from tests.kernels.emulated import DTYPES, SIDES, error, no_emulation, shifted, small, two_units
from tests.models import index_maps, numbers, small_llm, small_var, small_vqvae, words
from vargpt.interfaces import teacher_forcing_inputs
from vargpt.kernels import KVCache, attention, cuda, using, watching
from vargpt.scales import Limits, ScaleSchedule


def call(case: Problem, device: str, backend: str | None = None, **options: Any) -> Tensor:
    """The problem, asked of the facade."""
    rule = {"scale": case.scale} if case.cosine is None else {"cosine": case.cosine.to(device)}
    seen = case.limits[-1]
    inputs = (x.to(device) for x in (case.q_BHLK, case.k_BGNK[:, :, :seen], case.v_BGNK[:, :, :seen]))
    return attention(*inputs, limits=Limits.of(case.limits), backend=backend, **rule, **options)


@pytest.mark.parametrize("cosine", [True, False])
def test_it_is_chosen_where_it_fits(device: str, cosine: bool) -> None:
    case = small(cosine=cosine)
    with watching() as choices:
        output = call(case, device)
    assert (choices[0].backend, choices[0].refused) == ("cuda", {})
    exact, _ = case.exact()
    assert error(output, exact) <= two_units(torch.bfloat16, exact)


@no_emulation
@pytest.mark.usefixtures("emulated")
def test_it_says_what_it_cannot_do_and_the_next_one_does_it() -> None:
    q = numbers(2, 4, 14, 64)
    rounded, limits = q.bfloat16(), ScaleSchedule((1, 2, 3)).visible_limits()
    refused = {
        "in bfloat16 or float16, not in torch.float32": ({}, q),
        "head widths of 64 and 128, not 32": ({}, rounded[..., :32]),
        "take a key_mask only where one new token joins a cache": (
            {"key_mask": torch.ones(2, 14, dtype=torch.bool)},
            rounded,
        ),
        "at least one row, head and query, not 0, 4 and 14": ({}, rounded[:0]),
        "at most 65535 rows, and as many heads of queries and keys, not 65536 and 2": (
            {},
            rounded[:1, :1].expand(65536, 1, 14, 64),
        ),
        "at most 65535 rows, and as many heads of queries and keys, not 1 and 65536": (
            {},
            rounded[:1, :1].expand(1, 32768, 14, 64),
        ),
        "run on cpu, not on meta": ({}, rounded.to("meta")),
    }
    for reason, (options, x) in refused.items():
        with watching() as choices:
            attention(x, x, x, limits=limits, **options)
        assert choices[0].backend != "cuda"
        assert reason in choices[0].refused["cuda"]
        with pytest.raises(ValueError, match=f"attention backend 'cuda' cannot compute this: its kernels .*{reason}"):
            attention(x, x, x, limits=limits, backend="cuda", **options)


def test_without_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", cuda.Kernels(missing="vargpt was installed without its CUDA kernels"))
    q = numbers(1, 1, 2, 64).bfloat16()
    with watching() as choices:
        attention(q, q, q)
    assert choices[0].refused["cuda"] == "vargpt was installed without its CUDA kernels"


def learned(learning: Learning, device: str) -> Gradients:
    """The gradients that autograd has of the facade's output."""
    leaves = learning.problem.with_leaves()
    output = call(leaves, device, "cuda")
    found = torch.autograd.grad(output, list(leaves.learned.values()), learning.d_output_BHLK.to(device))
    return dict(zip(leaves.learned, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("cosine", [True, False])
def test_autograd_has_the_gradients(device: str, dtype: torch.dtype, width: int, cosine: bool) -> None:
    case = problem(dtype, width, visible_keys(SIDES), batch=2, key_heads=2, share=2, cosine=cosine, unseen=3)
    learning = Learning.of(case)
    (exact, slack), plain = learning.exact(), learning.plain()
    gradients = learned(learning, device)
    for name, right in exact.items():
        assert gradients[name].dtype == case.learned[name].dtype
        allowed = 2 * error(plain[name], right) + torch.finfo(dtype).eps / 2 * float(
            right.abs().max() + slack[name].max()
        )
        assert error(gradients[name], right) <= allowed, name


def test_a_sum_has_a_gradient_of_one_number_in_memory(device: str) -> None:
    case = small()
    ones = torch.ones_like(case.q_BHLK)
    whole, one = (
        learned(Learning(case, *case.exact(), d_output), device)
        for d_output in (ones, ones.flatten()[:1].expand_as(ones))
    )
    assert all(torch.equal(whole[name], gradient) for name, gradient in one.items())


def test_gradients_have_no_gradients_and_say_so(device: str) -> None:
    q = numbers(1, 1, 4, 64).bfloat16().to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, q, q, backend="cuda").sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="the backend 'cuda' has no derivatives of gradients"):
        gradient.sum().backward()


@pytest.mark.parametrize("rule", ["causal", "all"])
def test_plain_and_causal_attention_are_limits(device: str, rule: str) -> None:
    limits = list(range(9, 49)) if rule == "causal" else [48] * 40
    case = problem(torch.bfloat16, 128, limits, key_heads=2, share=2, cosine=False)
    inputs = (x.to(device) for x in (case.q_BHLK, case.k_BGNK, case.v_BGNK))
    output = attention(*inputs, causal=rule == "causal", scale=case.scale, backend="cuda")
    exact, _ = case.exact()
    assert error(output, exact) <= two_units(torch.bfloat16, exact)


def test_inputs_that_kernels_cannot_read_are_copied(device: str) -> None:
    case = small()
    expected = call(case, device, "cuda")
    apart = case.q_BHLK.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.cat((case.v_BGNK, case.v_BGNK[..., :4]), -1)[..., :64]
    moved = Problem(apart, shifted(case.k_BGNK), wide, case.limits, case.cosine)
    assert torch.equal(call(moved, device, "cuda"), expected)


@pytest.mark.parametrize("cosine", [torch.tensor([2.0]).expand(4), torch.linspace(1, 9, 8)[::2]])
def test_so_are_temperatures(device: str, cosine: Tensor) -> None:
    case = small()
    assert not cosine.is_contiguous()
    output, expected = (call(replace(case, cosine=x), device, "cuda") for x in (cosine, cosine.clone()))
    assert torch.equal(output, expected)


def test_so_are_angles(device: str) -> None:
    x = numbers(1, 2, 5, 64).bfloat16().to(device)
    angles = numbers(1, 1, 1, 64, seed=1).to(device)

    def decoded(cosines: Tensor, sines: Tensor) -> Tensor:
        cache = KVCache(1, 1, 2, 5, 64, device=x.device, dtype=x.dtype)
        cache.append(0, x[:, :, :4], x[:, :, :4])
        cache.advance(4)
        return attention(*[x[:, :, 4:]] * 3, rotary=(cosines, sines), cache=cache, backend="cuda")

    cosines, sines = angles.cos(), angles.sin()
    assert torch.equal(decoded(shifted(cosines), shifted(sines)), decoded(cosines, sines))


def test_memory_of_others_may_begin_anywhere(device: str) -> None:
    """torch knows no offset of it."""
    case = small()
    bytes_of_keys = case.k_BGNK.contiguous().view(torch.uint8).flatten().tolist()
    keys = torch.frombuffer(bytearray([0, 0, *bytes_of_keys]), dtype=torch.bfloat16, offset=2).view_as(case.k_BGNK)
    assert (keys.storage_offset(), keys.data_ptr() % 16) == (0, 2)
    output = call(replace(case, k_BGNK=keys), device, "cuda")
    assert torch.equal(output, call(case, device, "cuda"))


def test_angles_and_a_cache_give_what_the_reference_gives(device: str) -> None:
    """With a cache, new tokens come in three steps; backends may take turns."""
    schedule = ScaleSchedule((1, 3, 5))
    length, width = schedule.total, 64
    q, k, v = (numbers(2, heads, length, width, seed=heads).bfloat16() for heads in (4, 2, 2))
    angles = numbers(1, 1, length, width, seed=9)
    temperature = torch.tensor([1.0, 3.0, 5.0, 9.0])

    def steps(backends: list[str], device: str, dtype: torch.dtype) -> Tensor:
        place = {"device": torch.device(device), "dtype": dtype}
        cache, outputs = KVCache(1, 2, 2, length, width, **place), []
        for scale, backend in enumerate(backends):
            new = schedule.span(scale)
            outputs.append(
                attention(
                    *(x[:, :, new].to(**place) for x in (q, k, v)),
                    rotary=(angles[:, :, new].cos().to(**place), angles[:, :, new].sin().to(**place)),
                    cosine=temperature.to(**place),
                    cache=cache,
                    backend=backend,
                )
            )
            cache.advance(schedule.lengths[scale])
        return torch.cat(outputs, 2).float().cpu()

    expected = steps(["reference"] * 3, "cpu", torch.float32)
    for backends in (["cuda"] * 3, ["cuda", "matmul", "cuda"], ["matmul", "cuda", "sdpa"]):
        # Rotated queries and keys are rounded to 16 bits, and their logits reach 9.
        assert float((steps(backends, device, torch.bfloat16) - expected).abs().max()) <= 0.06


@pytest.mark.parametrize("learned", ["the step before", "angles"])
def test_a_step_of_constants_passes_gradients_on(device: str, learned: str) -> None:
    """To all else that it sees: what learns is not in the step itself."""
    x = numbers(3, 1, 2, 5, 64).bfloat16()
    angles = numbers(2, 1, 1, 1, 64, seed=1)

    def gradients(backend: str, device: str) -> list[Tensor]:
        q, k, v = x.to(device, copy=True)
        turns = angles.to(device, copy=True).requires_grad_(learned == "angles")
        before = [x[:, :, :4].requires_grad_(learned != "angles") for x in (q, k, v)]
        cache = KVCache(1, 1, 2, 5, 64, device=q.device, dtype=q.dtype)
        attention(*before, cache=cache, backend=backend)
        cache.advance(4)
        rotary = (turns[0], turns[1])
        output = attention(*(x[:, :, 4:] for x in (q, k, v)), rotary=rotary, cache=cache, backend=backend)
        return list(torch.autograd.grad(output.float().sum(), [turns] if learned == "angles" else before[1:]))

    for ours, expected in zip(gradients("cuda", device), gradients("reference", "cpu"), strict=True):
        assert error(ours, expected.double()) <= 0.02 * float(expected.abs().max())


def choices_of(run: Callable[[torch.dtype], Tensor]) -> list[str]:
    """The backends that a model in bfloat16 takes by itself, where it then errs at most twice as much as with the plain
    code; the truth is what it says in float32."""
    with using("reference"):
        truth = run(torch.float32)
    with using("matmul"):
        plain = run(torch.bfloat16)
    with watching() as choices:
        ours = run(torch.bfloat16)
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()
    return [choice.backend for choice in choices]


@pytest.mark.parametrize("cosine", [True, False])
@torch.no_grad()
def test_a_visual_decoder_draws(device: str, cosine: bool) -> None:
    sides = (1, 2, 3, 5, 9)
    decoder = small_var(sides, width=128, num_heads=2, cosine_attention=cosine).bfloat16()  # the truth is theirs, too
    inputs = [None, *(numbers(2, side * side, decoder.config.latent_channels, seed=side) for side in sides[1:])]

    def run(dtype: torch.dtype) -> Tensor:
        model = decoder.to(device, dtype)
        condition, cache = model.condition(torch.arange(2, device=device)), model.new_cache(2)
        given = (None if x is None else x.to(device, dtype) for x in inputs)
        logits = [model(model.embed_scale(i, x, condition), condition, cache=cache) for i, x in enumerate(given)]
        return torch.cat(logits, 1).float()

    assert set(choices_of(run)) == {"cuda"}


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_language_model_answers(device: str, padded: bool) -> None:
    """A prompt of 70 tokens at once, then 5 one by one; with ``padded``, a row's first 20 are none."""
    llm = small_llm(width=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=128).bfloat16()
    tokens, mask = words(2, 75).to(device), torch.ones(2, 75, dtype=torch.bool, device=device)
    mask[0, :20] = not padded

    def run(dtype: torch.dtype) -> Tensor:
        model, hidden = llm.to(device, dtype), []
        cache = model.new_cache(2, 80)
        for end in (70, 71, 72, 73, 74, 75):
            new = model.embed(tokens[:, cache.length : end])
            hidden.append(model(new, attention_mask=mask[:, :end] if padded else None, cache=cache))
        return torch.cat(hidden, 1)[mask].float()

    layers, choices = len(llm.blocks), choices_of(run)
    assert choices == ["sdpa" if padded else "cuda"] * layers + ["cuda"] * 5 * layers


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [True, False])
def test_a_visual_decoder_learns_as_with_the_reference(device: str, cosine: bool) -> None:
    """Twenty steps in bfloat16, from the same weights on the same pictures: losses differ by less than that format
    rounds by (measured: a third of it)."""
    sides = (1, 2, 3, 4, 6)
    tokenizer, indices = small_vqvae(sides), index_maps(sides, 4, seed=1)
    inputs = [x.to(device) for x in teacher_forcing_inputs(tokenizer, indices)]
    targets = torch.cat(indices, 1).to(device)

    def losses(backend: str) -> list[float]:
        decoder = small_var(sides, width=128, num_heads=2, cosine_attention=cosine, drop_path=0.0).to(device)
        optimizer, found = torch.optim.AdamW(decoder.parameters(), lr=3e-3), []
        for _ in range(20):
            with torch.autocast(device, torch.bfloat16), using(backend), watching() as choices:
                condition = decoder.condition(torch.arange(4, device=device) % 3)
                logits = decoder(decoder.embed(inputs, condition), condition)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            assert [choice.backend for choice in choices] == [backend] * len(decoder.blocks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected, found = losses("reference"), losses("cuda")
    assert expected[-1] < 0.7 * expected[0]
    assert max(abs(a - b) / a for a, b in zip(expected, found, strict=True)) <= 2**-8


# ---- Loading ----


def test_a_library_that_cannot_be_loaded_is_told_once(tmp_path: Path) -> None:
    """In a process of its own: a copy of the package, beside whose files lies a library that is none."""
    package = shutil.copytree(
        Path(cuda.__file__).parents[1], tmp_path / "vargpt", ignore=shutil.ignore_patterns("assets", "*.so")
    )
    (package / "kernels" / "_cuda.abi3.so").write_text("no library")
    code = "import torch; from vargpt.kernels import attention, watching\n"
    code += "q = torch.ones(1, 1, 2, 64).bfloat16()\n"
    code += "with watching() as choices: attention(q, q, q); attention(q, q, q)\n"
    code += "print(choices[1].backend, choices[1].refused['cuda'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: the CUDA kernels of vargpt were built, but cannot be loaded: ") == 1
    assert run.stderr.count("Warning") == 1
    assert run.stdout.startswith("sdpa the CUDA kernels of vargpt were built, but cannot be loaded: ")


@pytest.mark.skipif(cuda.kernels.missing is None, reason="CUDA kernels were built here")
def test_none_built_is_no_reason_to_warn() -> None:
    code = "import vargpt.kernels.cuda as cuda; print(cuda.kernels.missing)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("vargpt was installed without its CUDA kernels\n", "")


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_in_one_piece(device: str, backend: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.compiled", backend, device]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == 0

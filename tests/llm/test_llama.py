"""LlamaDecoder: one result however the tokens arrive (at once, one by one, padded, batched), and its options."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import VOCABULARY, close, llm_sizes, numbers, small_llm, splits, words
from vargpt.interfaces import LanguageModel
from vargpt.llm import LlamaConfig, LlamaDecoder, RopeScaling
from vargpt.llm.layers import rope_frequencies

Sizes = dict[str, Any]
sides = st.sampled_from(["left", "right", "both"])


@settings(max_examples=60)
@given(llm_sizes, st.integers(1, 3), st.integers(1, 12), st.data())
@torch.no_grad()
def test_cached_equals_uncached_in_any_chunks(sizes: Sizes, batch: int, length: int, data: st.DataObject) -> None:
    llm = small_llm(**sizes)
    x = llm.embed(words(batch, length))
    cache = llm.new_cache(batch, length)
    pieces = [llm(chunk, cache=cache) for chunk in x.split(data.draw(splits(length)), dim=1)]
    close(torch.cat(pieces, dim=1), llm(x))


@torch.no_grad()
def test_cached_equals_uncached_token_by_token() -> None:
    llm, ids = small_llm(), words(2, 40)
    cache = llm.new_cache(2, 40)
    close(torch.cat([llm(llm.embed(ids[:, t : t + 1]), cache=cache) for t in range(40)], dim=1), llm(llm.embed(ids)))


@settings(max_examples=60)
@given(llm_sizes, st.lists(st.integers(1, 8), min_size=1, max_size=4), sides, st.data())
@torch.no_grad()
def test_a_padded_row_of_a_batch_equals_the_row_alone(
    sizes: Sizes, lengths: list[int], side: str, data: st.DataObject
) -> None:
    """With whatever there is at padding, with a cache or without."""
    llm = small_llm(**sizes)
    total = max(lengths) + 2
    rows = [numbers(length, llm.width, seed=i) for i, length in enumerate(lengths)]
    starts = [{"left": total - n, "right": 0, "both": (total - n) // 2}[side] for n in lengths]
    x, mask = numbers(len(rows), total, llm.width, seed=9), torch.zeros(len(rows), total, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        x[i, start : start + len(row)], mask[i, start : start + len(row)] = row, True

    whole = llm(x, attention_mask=mask)
    cache, pieces, end = llm.new_cache(len(rows), total), [], 0
    for chunk in x.split(data.draw(splits(total)), dim=1):
        end += chunk.shape[1]
        pieces.append(llm(chunk, attention_mask=mask[:, :end], cache=cache))
    for hidden in (whole, torch.cat(pieces, dim=1)):
        assert hidden.isfinite().all()
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            close(hidden[i, start : start + len(row)], llm(row[None])[0])


@given(llm_sizes, st.integers(2, 8), st.data())
@torch.no_grad()
def test_a_token_changes_itself_and_later_tokens_only(sizes: Sizes, length: int, data: st.DataObject) -> None:
    llm = small_llm(**sizes)
    x, place = numbers(1, length, llm.width), data.draw(st.integers(0, length - 1))
    changed = x.clone()
    changed[:, place] = numbers(llm.width, seed=5)
    difference = (llm(changed) - llm(x)).abs().amax(dim=(0, 2))
    close(difference[:place], torch.zeros(place), 1e-6)  # matrix products may differ in the last bit
    assert (difference[place:] > 1e-5).all()


def naive(llm: LlamaDecoder, x: Tensor) -> Tensor:
    """One row through the decoder, position by position and head by head, from the equations of the papers."""
    c = llm.config
    frequencies = rope_frequencies(c, torch.arange(len(x))[None]).tolist()
    share, half = c.num_heads // c.num_kv_heads, c.head_dim // 2

    def normed(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean() + c.norm_eps).sqrt() * weight

    def turned(v: Tensor, position: int) -> Tensor:
        turns = [torch.polar(torch.ones(()), torch.tensor(position * f)) for f in frequencies]
        z = torch.complex(v[:half], v[half:]) * torch.stack(turns)
        return torch.cat((z.real, z.imag))

    for block in llm.blocks:
        b: Any = block
        normal = [normed(v, b.attn_norm.weight) for v in x]
        q, k, v = ([m(n).split(c.head_dim) for n in normal] for m in (b.attn.q, b.attn.k, b.attn.v))
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(c.num_heads):
                logits = [turned(q[i][h], i) @ turned(k[j][h // share], j) / c.head_dim**0.5 for j in range(i + 1)]
                weights = torch.stack(logits).softmax(0)
                heads.append(sum(weights[j] * v[j][h // share] for j in range(i + 1)))
            rows.append(x[i] + b.attn.out(torch.cat(heads)))
        x = torch.stack(rows)
        n = torch.stack([normed(v, b.mlp_norm.weight) for v in x])
        gate = b.mlp.gate(n)
        x = x + b.mlp.down(gate * gate.sigmoid() * b.mlp.up(n))
    return torch.stack([normed(v, llm.norm.weight) for v in x])


@settings(max_examples=20)
@given(llm_sizes, st.integers(1, 5))
@torch.no_grad()
def test_the_equations(sizes: Sizes, length: int) -> None:
    llm = small_llm(**sizes)
    x = numbers(length, llm.width)
    close(llm(x[None])[0], naive(llm, x))


@given(llm_sizes)
def test_every_weight_learns(sizes: Sizes) -> None:
    llm = small_llm(**sizes)
    ids = words(2, 6)
    hidden = llm(llm.embed(ids))
    logits = llm.logits(hidden)
    assert logits.shape == (2, 6, VOCABULARY)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in llm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_options_add_and_remove_weights() -> None:
    plain = set(dict(small_llm(depth=1).named_parameters()))
    attn, mlp = "blocks.0.attn.", "blocks.0.mlp."
    options: dict[str, set[str]] = {
        "qkv_bias": {attn + "q.bias", attn + "k.bias", attn + "v.bias"},
        "out_bias": {attn + "out.bias"},
        "mlp_bias": {mlp + "gate.bias", mlp + "up.bias", mlp + "down.bias"},
    }
    for option, names in options.items():
        assert set(dict(small_llm(depth=1, **{option: True}).named_parameters())) - plain == names
    tied = small_llm(depth=1, tie_embeddings=True)
    assert plain - set(dict(tied.named_parameters())) == {"head.weight"}
    hidden = numbers(2, 8)
    close(tied.logits(hidden), hidden @ tied.token_embed.weight.T)


def frequencies(kind: Literal["linear", "dynamic", "llama3"] | None, length: int = 1, **changes: Any) -> Tensor:
    scaling = None if kind is None else RopeScaling(kind=kind, factor=8.0, original_positions=1024, **changes)
    return rope_frequencies(LlamaConfig(head_dim=64, rope_scaling=scaling), torch.arange(length)[None])


def test_rope_scalings() -> None:
    plain = frequencies(None)
    close(plain, torch.tensor([10000 ** (-2 * i / 64) for i in range(32)]), 1e-7)
    close(frequencies("linear"), plain / 8, 1e-7)

    # Dynamic: the slowest pair turns as far over the stretched row as it would over the original one.
    assert torch.equal(frequencies("dynamic", 1024), plain)
    stretched = frequencies("dynamic", 4096)
    stretch = 8 * 4096 / 1024 - 7
    assert float(stretched[0]) == 1
    assert float(plain[-1] / stretched[-1]) == pytest.approx(stretch, rel=1e-5)

    # Llama 3: as published with its weights (llama-models, apply_scaling), written as it is there.
    expected = []
    for f in plain.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < 1024 / 4:
            expected.append(f)
        elif wavelength > 1024 / 1:
            expected.append(f / 8)
        else:
            smooth = (1024 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    close(frequencies("llama3"), torch.tensor(expected), 1e-7)


@torch.no_grad()
def test_dynamic_scaling_counts_the_longest_real_row() -> None:
    """Padding does not stretch the frequencies: a padded batch equals its rows, beyond the trained positions too."""
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_positions=8)
    llm = small_llm(rope_scaling=scaling, max_positions=8)
    for length in (6, 12):
        x = numbers(1, length, llm.width)
        padded = torch.cat((numbers(1, 4, llm.width, seed=1), x), dim=1)
        mask = torch.arange(length + 4)[None] >= 4
        close(llm(padded, attention_mask=mask)[:, 4:], llm(x))


@torch.no_grad()
def test_linear_scaling_divides_positions() -> None:
    scaled = small_llm(rope_scaling=RopeScaling(kind="linear", factor=2.0, original_positions=8))
    plain = small_llm()
    x, every_other = numbers(1, 5, 8), torch.arange(9) % 2 == 0
    spread = torch.zeros(1, 9, 8)
    spread[:, ::2] = x
    gaps = plain(spread, attention_mask=every_other[None])[:, ::2]
    close(gaps, plain(x))  # padding does not count as a position
    assert (scaled(x) - plain(x)).abs().max() > 1e-3
    close(scaled(x[:, :1]), plain(x[:, :1]))


@torch.no_grad()
def test_a_row_longer_than_the_context_is_refused() -> None:
    llm = small_llm(max_positions=6)
    llm(numbers(1, 6, 8))
    with pytest.raises(ValueError, match="7 tokens exceed the model's context of 6: shorten"):
        llm(numbers(1, 7, 8))
    cache = llm.new_cache(1, 10)
    llm(numbers(1, 5, 8), cache=cache)
    with pytest.raises(ValueError, match="7 tokens exceed"):
        llm(numbers(1, 2, 8), cache=cache)
    llm(numbers(1, 1, 8), cache=cache)  # the refused tokens left no trace
    assert cache.length == 6


def test_context_of_a_dynamically_scaled_model() -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_positions=8)
    assert small_llm(rope_scaling=scaling, max_positions=8).context_length == 16


def test_a_mask_must_cover_cached_and_new_tokens() -> None:
    llm = small_llm()
    with pytest.raises(ValueError, match="covers 3 tokens, but there are 0 cached and 4 new ones"):
        llm(numbers(1, 4, 8), attention_mask=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: LlamaConfig(num_heads=6, num_kv_heads=4), "must be a multiple of num_kv_heads"),
        (lambda: LlamaConfig(head_dim=5), "head_dim must be even"),
        (lambda: RopeScaling(kind="linear", factor=0.5, original_positions=8), "factor must be at least 1"),
        (
            lambda: RopeScaling(kind="llama3", factor=2.0, original_positions=8, high_freq_factor=1.0),
            "must exceed low_freq_factor",
        ),
        (
            lambda: RopeScaling(kind="yarn", factor=2.0, original_positions=8),  # pyright: ignore[reportArgumentType]
            "kind must be",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_satisfies_the_protocol() -> None:
    llm: LanguageModel = small_llm()
    assert (llm.width, llm.context_length) == (8, 512)


def test_published_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        llm = LlamaDecoder(LlamaConfig(depth=2))
        hidden = llm(llm.embed(torch.zeros(1, 3, dtype=torch.long)))
        assert llm.logits(hidden).shape == (1, 3, 32064)
    assert sum(p.numel() for p in llm.parameters()) == 2 * 32064 * 4096 + 2 * 202_383_360 + 4096

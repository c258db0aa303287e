"""LlamaDecoder against transformers' LLaMA and Qwen2 on random weights, read from the files that they save."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vargpt
from vargpt.generate import Context, generate_text
from vargpt.llm import LlamaDecoder
from vargpt.model import VARGPT

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
POSITIONS = 24

ropes = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1, 8)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 32),
            "low_freq_factor": st.floats(0.5, 1.5),
            "high_freq_factor": st.floats(2, 8),
            "original_max_position_embeddings": st.integers(4, POSITIONS),
        }
    ),
).flatmap(lambda rope: st.floats(100, 1e6).map(lambda theta: {**rope, "rope_theta": theta}))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """Sizes and options of a small LLaMA or Qwen2, as transformers' own configuration."""
    groups, share, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 6, 8]))
    common = {
        "vocab_size": 40,
        "hidden_size": draw(st.sampled_from([12, 24])),
        "intermediate_size": draw(st.integers(3, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": groups * share,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_parameters": draw(ropes),
        "tie_word_embeddings": draw(st.booleans()),
        "attn_implementation": "eager",
    }
    if draw(st.booleans()):
        return transformers.Qwen2Config(**common)
    return transformers.LlamaConfig(**common, attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


def both(config: Any, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, VARGPT]:
    """Their model with random weights, and ours read from its files."""
    torch.manual_seed(seed)
    cls = transformers.Qwen2ForCausalLM if config.model_type == "qwen2" else transformers.LlamaForCausalLM
    theirs = cls(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    theirs.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        # Read back in float32: a cast would leave their rotary frequencies rounded.
        theirs = theirs if dtype == torch.float32 else cls.from_pretrained(folder, dtype=torch.float32).eval()
        return theirs, vargpt.load(folder)


def decoder(model: VARGPT) -> LlamaDecoder:
    assert isinstance(model.llm, LlamaDecoder)
    return model.llm


def largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@settings(max_examples=40, deadline=None)
@given(config=configs(), rows=st.integers(1, 3), length=st.integers(1, POSITIONS), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_hidden_states_and_logits(config: Any, rows: int, length: int, seed: int) -> None:
    theirs, model = both(config, seed)
    ours = decoder(model)
    ids = torch.randint(40, (rows, length))
    out = theirs(ids, output_hidden_states=True)
    hidden = ours(ours.embed(ids))
    assert largest(hidden, out.hidden_states[-1]) < TOLERANCE
    assert largest(ours.logits(hidden), out.logits) < TOLERANCE


@settings(max_examples=15, deadline=None)
@given(config=configs(), length=st.integers(POSITIONS + 1, 40), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_rows_longer_than_those_trained_on_stretch_the_base(config: Any, length: int, seed: int) -> None:
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    theirs, model = both(config, seed)
    ours = decoder(model)
    ids = torch.randint(40, (1, length))
    assert largest(ours.logits(ours(ours.embed(ids))), theirs(ids).logits) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(config=configs(), pads=st.lists(st.integers(0, 8), min_size=1, max_size=3), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_rows_padded_on_the_left(config: Any, pads: list[int], seed: int) -> None:
    theirs, model = both(config, seed)
    ours = decoder(model)
    length = 10
    ids = torch.randint(40, (len(pads), length))
    mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    logits = ours.logits(ours(ours.embed(ids), attention_mask=mask))
    assert largest(logits[mask], expected[mask]) < TOLERANCE


@settings(max_examples=15, deadline=None)
@given(config=configs(), prompt=st.integers(1, 8), new=st.integers(1, 10), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_greedy_text_and_its_cache(config: Any, prompt: int, new: int, seed: int) -> None:
    theirs, model = both(config, seed)
    ids = torch.randint(40, (1, prompt))
    context = Context(decoder(model), 1, prompt + new, ids.device)
    row = generate_text(model, context, context.extend_tokens(ids), max_new_tokens=new, stop=())[0]
    chosen = ids
    for token in row.ids:  # their whole forward at every step; equal up to ties
        logits = theirs(chosen).logits[0, -1]
        assert logits[token] > logits.max() - TOLERANCE
        chosen = torch.cat((chosen, torch.tensor([[token]])), dim=1)


def test_weights_in_half_precision_are_read_as_float32() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    theirs, model = both(config, 0, torch.bfloat16)
    assert {p.dtype for p in decoder(model).parameters()} == {torch.float32}
    ids = torch.randint(40, (1, 9))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert largest(decoder(model).logits(decoder(model)(decoder(model).embed(ids))), expected) < TOLERANCE


def test_gradients() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs, model = both(config, 3)
    ours = decoder(model)
    ids = torch.randint(40, (2, 9))
    nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), ids.flatten()).backward()
    nn.functional.cross_entropy(ours.logits(ours(ours.embed(ids))).flatten(0, 1), ids.flatten()).backward()
    pairs = {
        "model.embed_tokens.weight": ours.token_embed.weight,
        "model.layers.0.self_attn.k_proj.weight": ours.get_parameter("blocks.0.attn.k.weight"),
        "model.layers.1.mlp.gate_proj.weight": ours.get_parameter("blocks.1.mlp.gate.weight"),
        "lm_head.weight": ours.get_parameter("head.weight"),
    }
    for name, parameter in pairs.items():
        expected = theirs.get_parameter(name).grad
        assert parameter.grad is not None
        assert float((parameter.grad - expected).norm() / expected.norm()) < 1e-4, name

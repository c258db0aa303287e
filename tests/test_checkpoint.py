"""Loading and saving."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import vargpt
from vargpt.build import build
from vargpt.checkpoint import ASSETS, embedded_models, inventory
from vargpt.choices import PUBLISHED
from vargpt.config import NANO, PRESETS, VargptConfig
from vargpt.text import SentencePieceTokenizer
from vargpt.vision import TimmConfig


def test_a_saved_model_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model = build(NANO, seed=3)
    vargpt.save(model, tmp_path, tokenizer_from=ASSETS / "tiny")
    loaded = vargpt.load(tmp_path)
    assert loaded.config == NANO
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    assert not loaded.training


def test_the_same_seed_builds_the_same_model() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (build(NANO, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["llm.token_embed.weight"], other["llm.token_embed.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_and_draws_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    vargpt.save(build(NANO), tmp_path)
    model = vargpt.load(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert vargpt.draw(model, ["a cat"]).images[0].size == (32, 32)
    assert isinstance(vargpt.ask(model, vargpt.draw(model, ["a cat"]).images[0], "What?", 3), str)


def test_choices_are_the_checkpoints_own_unless_named(vargpt_tiny_dir: Path) -> None:
    assert vargpt.load(vargpt_tiny_dir).choices == PUBLISHED
    fixed = vargpt.load(vargpt_tiny_dir, choices="fixed")
    with safe_open(vargpt_tiny_dir / "model-00003-of-00003.safetensors", framework="pt") as file:
        recorded = file.get_tensor("image_gen_projector.ln_q.weight")
    assert torch.equal(fixed.state_dict()["gen_in.norm.weight"], recorded)
    one = vargpt.load(vargpt_tiny_dir, choices=dataclasses.replace(PUBLISHED, null="class"))
    assert one.choices.null == "class"
    assert "gen_in.norm.weight" not in one.state_dict()
    with pytest.raises(ValueError, match="unknown choices 'broken': give 'published' or 'fixed'"):
        vargpt.load(vargpt_tiny_dir, choices="broken")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tinny", r"unknown model 'tinny': did you mean 'tiny'\? give 'tiny', a checkpoint's directory, or a hub id"),
        ("/nowhere/at/all", "unknown model '/nowhere/at/all'"),
    ],
)
def test_unknown_models(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vargpt.load(name)


def test_a_hub_id_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' is neither a directory here nor to be had") as raised:
        vargpt.load("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_a_hub_id_fetches_safetensors_json_and_the_tokenizer_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    vargpt.save(build(NANO), tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model = vargpt.load("someone/vargpt", revision="v1")
    assert model.config == NANO
    assert asked == {
        "hub_id": "someone/vargpt",
        "revision": "v1",
        "allow_patterns": ["*.safetensors", "*.json", "tokenizer.model"],
    }


def test_the_embedded_model_says_that_it_is_not_trained() -> None:
    with pytest.warns(UserWarning, match="not trained yet: its weights are random"):
        model = vargpt.load("tiny")
    assert model.tokenizer is not None
    assert vargpt.draw(model, ["a red circle"]).images


def test_networks_with_buffers_that_no_file_holds(tmp_path: Path) -> None:
    config = VargptConfig(vision=TimmConfig(model_name="eva02_tiny_patch14_224", image_size=28, feature_layer=2))
    model = build(config).eval()
    vargpt.save(model, tmp_path)
    loaded = vargpt.load(tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    assert model.vision is not None
    assert loaded.vision is not None
    with torch.no_grad():
        assert torch.equal(model.vision(pixels), loaded.vision(pixels))


def test_only_what_a_configuration_describes_is_saved(tmp_path: Path) -> None:
    model = build(NANO)
    model.projector = torch.nn.Linear(96, 128)
    with pytest.raises(ValueError, match="only a model whose config describes all its parts"):
        vargpt.save(model, tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        vargpt.save(build(NANO), tmp_path / "file" / "model")


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - set(embedded_models())))
def test_an_inventory_counts_what_is_built(name: str) -> None:
    parts = {part.name: part for part in inventory(name)}
    with torch.device("meta"):
        model = build(PRESETS[name])
    assert parts["llm"].parameters == sum(p.numel() for n, p in model.named_parameters() if n.startswith("llm."))
    assert sum(p.parameters for p in parts.values()) == sum(p.numel() for p in model.parameters())

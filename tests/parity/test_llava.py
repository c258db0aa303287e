"""LLaVA-1.5 and CLIP checkpoints as transformers saves them, read by ``vargpt.load``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vargpt
from vargpt.convert import convert
from vargpt.model import VARGPT

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
IMAGE = 30


def llava(layer: int = -2, strategy: str = "default", activation: str = "quick_gelu") -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
            hidden_act=activation,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=9 if strategy == "default" else 10,
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    return model


def agree(ours: VARGPT, theirs: Any, patches: int) -> None:
    ids = torch.tensor([[1, 5, *[IMAGE] * patches, 7, 9], [1, *[IMAGE] * patches, 3, 8, 11]])
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
        logits = ours(ids, pixel_values=pixels).text_logits
    assert float((logits - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("layer", "strategy"), [(-2, "default"), (-1, "default"), (-2, "full"), (-3, "default")])
def test_a_llava_understands_as_the_original_does(tmp_path: Path, layer: int, strategy: str) -> None:
    theirs = llava(layer, strategy)
    theirs.save_pretrained(tmp_path)
    ours = vargpt.load(tmp_path)
    agree(ours, theirs, 9 if strategy == "default" else 10)
    with pytest.raises(ValueError, match="this model has no"):
        vargpt.draw(ours, ["a cat"])


def test_both_generations_of_names_are_read(tmp_path: Path) -> None:
    """The hub's llava-1.5 has the names of the library's first releases; later ones nest them otherwise."""
    theirs = llava(activation="gelu")
    theirs.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    older = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    newer = {new: old for old, new in older.items()}

    def renamed(names: dict[str, str]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in saved.items():
            start = next((s for s in names if name.startswith(s)), None)
            found[name if start is None else names[start] + name.removeprefix(start)] = tensor
        return found

    for place, tensors in (("older", renamed(older)), ("newer", renamed(newer))):
        folder = tmp_path / place
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
        agree(vargpt.load(folder), theirs, 9)


def test_a_converted_llava_is_the_same(tmp_path: Path) -> None:
    theirs = llava()
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["format"] == "vargpt"
    agree(vargpt.load(tmp_path / "ours"), theirs, 9)


@pytest.mark.parametrize("whole", [True, False])
def test_the_vision_half_of_a_clip(tmp_path: Path, whole: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(1)
    if whole:
        vision = {**sizes, "image_size": 12, "patch_size": 4}
        config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 20}, vision_config=vision)
        model = transformers.CLIPModel(config).eval()
        tower = model.vision_model
    else:
        config = transformers.CLIPVisionConfig(**sizes, image_size=12, patch_size=4)
        model = tower = transformers.CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 12, 12)
    vision_encoder = vargpt.load(tmp_path).vision
    assert vision_encoder is not None
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert float((vision_encoder(pixels) - expected).abs().max()) < TOLERANCE

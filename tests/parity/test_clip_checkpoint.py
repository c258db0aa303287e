"""CLIP checkpoints, whole or the vision half alone, opened by ``vargpt.load``, against transformers' features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vargpt
from tests.models import close, numbers
from vargpt.convert import convert

transformers = pytest.importorskip("transformers")

VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
    "attn_implementation": "eager",
}
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "projection_dim": 16,
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def random(kind: str, hidden_act: str = "quick_gelu") -> Any:
    """Their model; weights of a size at which every path matters."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**VISION, hidden_act=hidden_act)
    if kind == "vision":
        theirs = transformers.CLIPVisionModel(vision)
    else:
        text = transformers.CLIPTextConfig(**TEXT)
        config = transformers.CLIPConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=16, attn_implementation="eager"
        )
        theirs = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return theirs.eval()


@torch.no_grad()
def features(theirs: Any, pixels: torch.Tensor) -> torch.Tensor:
    vision = getattr(theirs, "vision_model", theirs)
    return vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


@pytest.mark.parametrize("kind", ["vision", "whole"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_features_are_the_penultimate_hidden_states(kind: str, hidden_act: str, tmp_path: Path) -> None:
    theirs, pixels = random(kind, hidden_act), numbers(2, 3, 28, 28)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    for directory in ("theirs", "ours"):
        model = vargpt.load(tmp_path / directory)
        assert model.vision is not None
        assert (model.llm, model.var, model.vqvae) == (None, None, None)
        with torch.no_grad():
            close(model.vision(pixels), features(theirs, pixels))


def test_names_of_older_releases(tmp_path: Path) -> None:
    """On the hub, the vision half has ``vision_model.`` before its names, and position numbers among its tensors."""
    theirs, pixels = random("vision"), numbers(2, 3, 28, 28)
    theirs.save_pretrained(tmp_path)
    tensors = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    model = vargpt.load(tmp_path)
    assert model.vision is not None
    with torch.no_grad():
        close(model.vision(pixels), features(theirs, pixels))


def test_a_config_with_few_fields(tmp_path: Path) -> None:
    """ViT-B/32's sizes are what transformers leaves out."""
    random("vision").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ValueError, match=r"pre_layrnorm\.weight \[24\] instead of \[768\]"):
        vargpt.load(tmp_path)

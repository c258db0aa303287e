"""LLaVA-1.5 checkpoints, opened by ``vargpt.load``, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vargpt
from tests.models import close, numbers
from vargpt import generate
from vargpt.convert import convert
from vargpt.model import VARGPT

transformers = pytest.importorskip("transformers")

IMAGE, VOCABULARY, PATCHES = 30, 32, 16


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def random(tie: bool = False, family: str = "llama", **fields: Any) -> Any:
    """Their model; weights of a size at which every path matters. Of a tied head only the outer config tells."""
    torch.manual_seed(0)
    text = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        tie_word_embeddings=tie,
        attn_implementation="eager",
        **fields,
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return theirs


def prompt(pictures: int, patches: int = PATCHES) -> Tensor:
    words = torch.randint(3, IMAGE, (1, 3), generator=torch.Generator().manual_seed(1))
    return torch.cat([words, *[torch.full((1, patches), IMAGE), words] * pictures], dim=1)


@torch.no_grad()
def assert_same(model: VARGPT, theirs: Any, patches: int = PATCHES, pictures: int = 2) -> None:
    ids, pixels = prompt(pictures, patches), numbers(pictures, 3, 28, 28)
    expected = theirs(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), output_hidden_states=True
    )
    ours = model(ids, pixel_values=pixels)
    close(ours.hidden, expected.hidden_states[-1])
    close(ours.text_logits, expected.logits)


@pytest.mark.parametrize(("strategy", "patches"), [("default", PATCHES), ("full", PATCHES + 1)])
@pytest.mark.parametrize("layer", [-2, -1])
def test_logits_with_pictures(strategy: str, patches: int, layer: int, tmp_path: Path) -> None:
    theirs = random(vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    for directory in ("theirs", "ours"):
        assert_same(vargpt.load(tmp_path / directory), theirs, patches)


def test_logits_without_a_picture(tmp_path: Path) -> None:
    theirs = random()
    theirs.save_pretrained(tmp_path)
    ids = prompt(0)
    with torch.no_grad():
        close(vargpt.load(tmp_path)(ids).text_logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(("tie", "family"), [(True, "llama"), (False, "qwen2"), (True, "qwen2")])
def test_other_language_models(tie: bool, family: str, tmp_path: Path) -> None:
    theirs = random(tie, family)
    theirs.save_pretrained(tmp_path)
    model = vargpt.load(tmp_path)
    assert model.config.llm.tie_embeddings is tie
    assert_same(model, theirs)


@torch.no_grad()
def test_greedy_answer(tmp_path: Path) -> None:
    theirs = random()
    theirs.save_pretrained(tmp_path)
    model = vargpt.load(tmp_path)
    assert model.llm is not None
    ids, pixels = prompt(1), numbers(1, 3, 28, 28)
    greedy = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), generation_config=greedy
    )
    context = generate.Context(model.llm, 1, ids.shape[1] + 12, torch.device("cpu"))
    hidden = context.extend(model.prompt_embeddings(ids, pixels))
    (row,) = generate.generate_text(model, context, hidden, max_new_tokens=12, stop=())
    assert row.ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["hub", "4.52", "in memory"])
def test_names_of_other_releases(kind: str, tmp_path: Path) -> None:
    """The hub's checkpoints have the classic names; later releases moved every part below ``model.``."""
    theirs = random()
    theirs.save_pretrained(tmp_path)
    classic = load_file(tmp_path / "model.safetensors")
    if kind == "in memory":
        renamed = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
        assert "model.language_model.norm.weight" in renamed
    else:
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model.")
            if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model.")
            else name: tensor
            for name, tensor in classic.items()
        }
        assert "language_model.model.norm.weight" in renamed
        assert "vision_tower.vision_model.pre_layrnorm.weight" in renamed
    if kind == "4.52":
        parts = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
        parts |= {"vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}
        renamed = {
            next(new + name.removeprefix(old) for old, new in parts.items() if name.startswith(old)): tensor
            for name, tensor in renamed.items()
        }
    save_file(renamed, tmp_path / "model.safetensors")
    assert_same(vargpt.load(tmp_path), theirs)


def test_pad_and_image_tokens_are_read(tmp_path: Path) -> None:
    theirs = random(pad_token_id=31)
    theirs.save_pretrained(tmp_path)
    tokens = vargpt.load(tmp_path).tokens
    assert (tokens.image, tokens.pad, tokens.gen_start) == (IMAGE, 31, -1)

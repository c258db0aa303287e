"""What the configuration of a published checkpoint is, told from few fields and from the tensors' shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vargpt
from tests.convert.checkpoints import contents, published_config, published_state, random_model, write, write_published
from tests.models import close, numbers, stir, words
from vargpt import generate
from vargpt.build import build
from vargpt.choices import ABSENT, TokenIds
from vargpt.config import VargptConfig
from vargpt.convert import open_published
from vargpt.llm import LlamaConfig, RopeScaling
from vargpt.model import VARGPT
from vargpt.sampling import GREEDY, Guidance
from vargpt.vision import OpenClipConfig
from vargpt.vqvae import VqvaeConfig

VARIANTS: dict[str, VargptConfig] = {
    "plain": published_config(),
    "one key head each": published_config(
        llm={"num_kv_heads": 4, "rope_scaling": RopeScaling(kind="linear", factor=2.0, original_positions=256)}
    ),
    "one key head, of a width of its own": published_config(
        llm={
            "num_kv_heads": 1,
            "head_dim": 10,
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_positions=32),
        }
    ),
    "tied head and biases": published_config(
        llm={"tie_embeddings": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
    ),
    "Qwen2, last vision layer": published_config(llm={"qkv_bias": True}, vision={"feature_layer": -1}),
    "first vision layer": published_config(vision={"feature_layer": 1, "keep_cls": True, "quick_gelu": False}),
    "one scale": published_config((3,)),
    "first scale above 1": published_config((2, 3, 4)),
    "repeated scales": published_config((1, 1, 2, 2)),
    "seven scales": published_config((1, 2, 3, 4, 5, 6, 8)),
    "shared AdaLN": published_config(var={"shared_adaln": True}),
    "no cosine attention": published_config(var={"cosine_attention": False, "width": 128, "num_heads": 2}),
    "neither": published_config(var={"cosine_attention": False, "shared_adaln": True, "width": 64, "num_heads": 1}),
    "widths and codes": published_config(
        var={"mlp_ratio": 3.5, "latent_channels": 8, "vocab_size": 33}, vqvae={"latent_channels": 8, "vocab_size": 33}
    ),
    "two-digit depths": published_config(llm={"depth": 11}, var={"depth": 12}),
    "one phi": published_config(vqvae={"num_phi": 1}),
    "no phi": published_config(vqvae={"num_phi": 0}),
    "as many phi as scales": published_config(vqvae={"num_phi": 3}),
    "deep image tokenizer": published_config(
        vqvae={"channel_multipliers": (1, 2, 4), "res_blocks": 3, "attention": False, "quant_kernel": 1}
    ),
}


def with_default_drop_path(config: VargptConfig) -> VargptConfig:
    """The published code derives the drop rate, which no checkpoint holds, from the depth."""
    assert config.var is not None
    return dataclasses.replace(config, var=dataclasses.replace(config.var, drop_path=0.1 * config.var.depth / 24))


def outputs(model: VARGPT) -> list[Tensor]:
    """Something of every part: understanding, teacher-forced drawing, and drawing."""
    assert model.vision is not None
    assert model.llm is not None
    assert model.var is not None
    assert isinstance(model.config, VargptConfig)
    assert model.config.vqvae is not None
    side = model.config.vqvae.image_size
    t, length = model.tokens, model.var.schedule.total
    asked = torch.cat((words(1, 2), torch.full((1, model.vision.num_tokens), t.image), words(1, 2)), dim=1)
    drawn = torch.cat((words(1, 2), torch.tensor([[t.gen_start]]), torch.full((1, length), t.gen_pad)), dim=1)
    with torch.no_grad():
        understood = model(asked, pixel_values=numbers(1, 3, 8, 8))
        taught = model(drawn, draw_images=numbers(1, 3, side, side).clamp(-1, 1))
        context = generate.Context(model.llm, 1, 3 + length, torch.device("cpu"))
        context.extend_tokens(drawn[:, :3])
        maps = generate.draw(
            model,
            context,
            generators=(),
            guidance=Guidance(scale=1.5),
            sampling=GREEDY,
            noise=lambda scale, shape: numbers(*shape, seed=scale),
        )
        assert model.vqvae is not None
        return [understood.text_logits, taught.image_logits, maps.f_hat, model.vqvae.decode_latent(maps.f_hat)]


@pytest.mark.parametrize(("variant", "shards"), [("plain", 3), *((variant, 1) for variant in VARIANTS)])
def test_a_published_checkpoint_loads_as_the_model_it_came_from(variant: str, shards: int, tmp_path: Path) -> None:
    model = random_model(VARIANTS[variant])
    write(tmp_path, *published_state(model), shards=shards)
    loaded = vargpt.load(tmp_path)
    assert loaded.config == with_default_drop_path(VARIANTS[variant])
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for ours, expected in zip(outputs(loaded), outputs(model), strict=True):
        close(ours, expected, 1e-5)


@pytest.mark.parametrize("variant", ["neither", "first scale above 1"])
def test_a_var_pair_converts_as_the_model_it_came_from(variant: str, tmp_path: Path) -> None:
    whole = VARIANTS[variant]
    model = stir(build(VargptConfig(var=whole.var, vqvae=whole.vqvae)))
    published, _ = published_state(random_model(whole))
    for part, file in (("vae_local.", "vae_ch32.pth"), ("vargpt_gen.", "var_d2.pth")):
        names = {n: n.removeprefix(part) for n in published if n.startswith(part)}
        torch.save({bare: published[name] for name, bare in names.items()}, tmp_path / file)
    opened = open_published(tmp_path)
    assert opened.config.var == with_default_drop_path(whole).var
    assert opened.config.vqvae == whole.vqvae
    expected = random_model(whole).state_dict()
    for name in model.state_dict():
        assert torch.equal(opened.source.read(name), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_load_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(published_config()).to(dtype)
    tensors, config = published_state(model)
    assert {t.dtype for t in tensors.values()} == {dtype, torch.int64}
    loaded = vargpt.load(write(tmp_path, tensors, config))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, tensor in model.float().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(("form", "num_phi"), [("qresi.{p}", 1), ("{i}.{p}", 3), ("{i}.{p}", 4)])
def test_every_form_of_sharing_phi_is_read(form: str, num_phi: int, tmp_path: Path) -> None:
    config = published_config(vqvae={"num_phi": num_phi})
    model = random_model(config)
    tensors, described = published_state(model)
    marked = "vae_local.quantize.quant_resi.qresi_ls."
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(marked):
            i, p = name.removeprefix(marked).split(".")
            name = "vae_local.quantize.quant_resi." + form.format(i=i, p=p)
        renamed[name] = tensor
    loaded = vargpt.load(write(tmp_path, renamed, described))
    assert loaded.config.vqvae == config.vqvae
    for ours, expected in zip(outputs(loaded), outputs(model), strict=True):
        close(ours, expected, 1e-5)


BUFFERS = [
    "vargpt_gen.attn_bias_for_masking",
    "vargpt_gen.blocks.0.attn.zero_k_bias",
    "vargpt_gen.blocks.1.attn.zero_k_bias",
    "vae_local.quantize.ema_vocab_hit_SV",
    *(f"image_gen_projector{which}.ln_q.{kind}" for which in ("", "_out") for kind in ("weight", "bias")),
]


def test_buffers_without_meaning_may_be_missing(tmp_path: Path) -> None:
    model = random_model(published_config())
    tensors, config = published_state(model)
    loaded = vargpt.load(write(tmp_path, {n: t for n, t in tensors.items() if n not in BUFFERS}, config))
    for ours, expected in zip(outputs(loaded), outputs(model), strict=True):
        close(ours, expected, 1e-5)


def test_buffers_of_older_releases_are_ignored(tmp_path: Path) -> None:
    tensors, config = published_state(random_model(published_config()))
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    vargpt.load(write(tmp_path, tensors, config))


def test_the_released_scales_are_the_default(tmp_path: Path) -> None:
    config = published_config(VqvaeConfig().patch_nums)
    tensors, described = published_state(random_model(config))
    del tensors["vargpt_gen.lvl_1L"]
    assert vargpt.load(write(tmp_path, tensors, described)).config.var.patch_nums == VqvaeConfig().patch_nums


def test_scales_that_nothing_tells_are_given(tmp_path: Path) -> None:
    tensors, described = published_state(random_model(published_config((1, 2, 4))))
    del tensors["vargpt_gen.lvl_1L"]
    write(tmp_path, tensors, described)
    assert vargpt.load(tmp_path, patch_nums=(1, 2, 4)).config.var.patch_nums == (1, 2, 4)
    with pytest.raises(ValueError, match=r"3 scales of 21 tokens in all, .* --patch-nums"):
        vargpt.load(tmp_path, patch_nums=(1, 2, 3))


def test_a_head_that_is_tied_and_stored_all_the_same(tmp_path: Path) -> None:
    tensors, config = published_state(random_model(published_config(llm={"tie_embeddings": True})))
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    assert vargpt.load(write(tmp_path, tensors, config)).config.llm.tie_embeddings
    tensors["language_model.lm_head.weight"][3, 3] += 1
    with pytest.raises(ValueError, match="sets tie_word_embeddings, but lm_head and embed_tokens differ"):
        vargpt.load(write(tmp_path, tensors, config))


def edited(tmp_path: Path, config: VargptConfig, edit: Any) -> VargptConfig:
    """What a checkpoint's configuration is after an edit of its config.json."""
    write_published(tmp_path, config)
    content = json.loads((tmp_path / "config.json").read_text())
    edit(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return open_published(tmp_path).config


def test_few_fields_mean_the_defaults_of_the_family(tmp_path: Path) -> None:
    config = published_config(
        llm={"num_kv_heads": 4, "head_dim": 4, "norm_eps": 1e-6, "max_positions": 2048},
        vision={"mlp_width": 12},
    )

    def edit(content: dict[str, Any]) -> None:
        text, vision = content["text_config"], content["vision_config"]
        for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_scaling"):
            del text[name]
        for name in ("model_type", "rope_theta", "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id"):
            del text[name]
        for name in ("model_type", "layer_norm_eps", "hidden_act"):
            del vision[name]
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "vocab_size"):
            del content[name]

    assert edited(tmp_path, config, edit) == with_default_drop_path(config)


def test_null_fields_mean_the_defaults_too(tmp_path: Path) -> None:
    config = published_config(llm={"num_kv_heads": 4, "head_dim": 4})

    def edit(content: dict[str, Any]) -> None:
        content["text_config"] |= {"num_key_value_heads": None, "head_dim": None, "rope_theta": None}

    assert edited(tmp_path, config, edit) == with_default_drop_path(config)


def config_of(directory: Path, content: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> VargptConfig:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors or {"x": torch.zeros(1)}, directory / "model.safetensors")
    return open_published(directory).config


TEXT = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama_tensors(config: LlamaConfig) -> dict[str, Tensor]:
    whole, _ = published_state(random_model(published_config(llm={f: getattr(config, f) for f in config.__dict__})))
    return {n.removeprefix("language_model."): t for n, t in whole.items() if n.startswith("language_model.")}


def llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"vocab_size": 300, "width": 16, "mlp_width": 20, "depth": 1, "num_heads": 2}
    sizes |= {"num_kv_heads": 2, "head_dim": 8, "max_positions": 2048, "norm_eps": 1e-6}
    return LlamaConfig(**sizes | changes)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama"}, llama()),
        ({"model_type": "llama", "num_key_value_heads": 1}, llama(num_kv_heads=1)),
        ({"model_type": "llama", "attention_bias": True}, llama(qkv_bias=True, out_bias=True)),
        ({"model_type": "qwen2"}, llama(qkv_bias=True, max_positions=32768)),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 500},
            llama(rope_theta=500.0, rope_scaling=RopeScaling(kind="linear", factor=4.0, original_positions=2048)),
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 70.0},
                "max_position_embeddings": 64,
            },
            llama(
                max_positions=64,
                rope_theta=70.0,
                rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_positions=64),
            ),
        ),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 7}}, llama(rope_theta=7.0)),
    ],
)
def test_a_language_model_alone(fields: dict[str, Any], expected: LlamaConfig, tmp_path: Path) -> None:
    config = config_of(tmp_path, TEXT | fields, llama_tensors(expected))
    assert config == VargptConfig(llm=expected, tokens=config.tokens)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, TokenIds(bos=1, eos=2, image=ABSENT, pad=ABSENT, gen_start=ABSENT, gen_end=ABSENT, gen_pad=ABSENT)),
        (
            {"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 0},
            TokenIds(bos=5, eos=7, image=ABSENT, pad=0, gen_start=ABSENT, gen_end=ABSENT, gen_pad=ABSENT),
        ),
    ],
)
def test_tokens_that_a_model_lacks_are_absent(fields: dict[str, Any], expected: TokenIds, tmp_path: Path) -> None:
    assert config_of(tmp_path, TEXT | {"model_type": "llama"} | fields, llama_tensors(llama())).tokens == expected


@pytest.mark.parametrize("part", ["vision", "whole"])
def test_a_vision_encoder_alone(part: str, tmp_path: Path) -> None:
    tensors, described = published_state(random_model(published_config()))
    bare = {n.removeprefix("vision_tower."): t for n, t in tensors.items() if n.startswith("vision_tower.")}
    content = described["vision_config"]
    if part == "whole":
        content = {"model_type": "clip", "vision_config": content}
        bare |= {"text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    expected = published_config().vision
    assert isinstance(expected, OpenClipConfig)
    assert config_of(tmp_path, content, bare).vision == expected


@pytest.mark.parametrize("newer", ["4.52", "5 in memory", "5 on disk"])
def test_names_of_newer_libraries(newer: str, tmp_path: Path) -> None:
    model = random_model(published_config())
    tensors, described = published_state(model)

    def rename(name: str) -> str:
        if newer != "4.52":
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if newer != "5 on disk":
            for part in ("vision_tower.", "multi_modal_projector."):
                name = name.replace(part, "model." + part)
            name = name.replace("language_model.lm_head.", "lm_head.")
            name = name.replace("language_model.model.", "model.language_model.")
        return name

    loaded = vargpt.load(write(tmp_path, {rename(n): t for n, t in tensors.items()}, described))
    assert contents(tmp_path).keys() != tensors.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

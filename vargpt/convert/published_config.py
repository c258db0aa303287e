"""Published configurations and tensor shapes as ours, and back."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from vargpt.choices import ABSENT, FIXED, PUBLISHED, TokenIds
from vargpt.config import ProjectorConfig, VargptConfig
from vargpt.config_json import to_json
from vargpt.convert.fields import Fields
from vargpt.llm import LlamaConfig, RopeScaling
from vargpt.scales import ScaleSchedule
from vargpt.tensorfiles import TensorSource, TensorSpec
from vargpt.var import VarConfig
from vargpt.vision import OpenClipConfig
from vargpt.vqvae import VqvaeConfig

VAR_HEAD_WIDTH = 64
"""Head width of every published VAR; only needed where no per-head tensor tells."""

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
    "bos_token_id": ABSENT, "eos_token_id": ABSENT,
}  # fmt: skip
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5,
}  # fmt: skip
_CLIP_OF_LLAVA = _CLIP | {  # where LLaVA's config.json says nothing at all of its vision encoder
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def _llama(get: Fields, *, tied: bool) -> LlamaConfig:
    """A LLaMA, Vicuna or Qwen2 configuration; absent fields take the defaults of that family."""
    family = get.word("model_type", "llama", "qwen2")
    get = get.or_defaults(_LLAMA if family == "llama" else _QWEN2)
    get.word("hidden_act", "silu")
    if family == "qwen2" and get.flag("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window is not supported: the decoder sees all earlier tokens")
    width, heads = get.size("hidden_size"), get.size("num_attention_heads")
    positions = get.size("max_position_embeddings")
    rope = get.inner("rope_parameters") or get.inner("rope_scaling")
    return LlamaConfig(
        vocab_size=get.size("vocab_size"),
        width=width,
        depth=get.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=get.size("num_key_value_heads", heads),
        head_dim=get.size("head_dim", max(width // heads, 1)),
        mlp_width=get.size("intermediate_size"),
        max_positions=positions,
        norm_eps=get.real("rms_norm_eps"),
        rope_theta=rope.real("rope_theta", get.real("rope_theta")),
        rope_scaling=_rope_scaling(rope, positions),
        tie_embeddings=tied,
        qkv_bias=family == "qwen2" or get.flag("attention_bias"),
        out_bias=family == "llama" and get.flag("attention_bias"),
        mlp_bias=get.flag("mlp_bias"),
    )


def _rope_scaling(rope: Fields, positions: int) -> RopeScaling | None:
    name = "type" if "type" in rope and "rope_type" not in rope else "rope_type"  # the older name, and the newer
    kind: Literal["default", "linear", "dynamic", "llama3"]
    kind = rope.word(name, "default", "linear", "dynamic", "llama3")
    if rope.real("partial_rotary_factor", 1.0) != 1:
        raise ValueError("config.json: partial_rotary_factor is not supported: all channels are turned")
    if kind == "default":
        return None
    # Only llama3 reads the original length; the other two mean max_position_embeddings.
    original = rope.size("original_max_position_embeddings", positions) if kind == "llama3" else positions
    return RopeScaling(
        kind=kind,
        factor=rope.real("factor"),
        original_positions=original,
        low_freq_factor=rope.real("low_freq_factor", 1.0),
        high_freq_factor=rope.real("high_freq_factor", 4.0),
    )


def _clip(get: Fields, feature_layer: int = -2, *, keep_cls: bool = False) -> OpenClipConfig:
    """The vision half of a CLIP."""
    get.word("model_type", "clip_vision_model", "clip")
    return OpenClipConfig(
        image_size=get.size("image_size"),
        patch_size=get.size("patch_size"),
        width=get.size("hidden_size"),
        depth=get.size("num_hidden_layers"),
        num_heads=get.size("num_attention_heads"),
        mlp_width=get.size("intermediate_size"),
        quick_gelu=get.word("hidden_act", "quick_gelu", "gelu") == "quick_gelu",
        norm_eps=get.real("layer_norm_eps"),
        feature_layer=feature_layer,
        keep_cls=keep_cls,
    )


def llama_only(config: Mapping[str, Any]) -> VargptConfig:
    """A LLaMA checkpoint as a model with one part."""
    get = Fields(config, {})
    return VargptConfig(llm=_llama(get, tied=get.flag("tie_word_embeddings")), tokens=_token_ids(get, get))


def clip_only(config: Mapping[str, Any]) -> VargptConfig:
    """A CLIP checkpoint (whole, or its vision half) as a model with one part: penultimate features, no CLS."""
    get = Fields(config, {})
    return VargptConfig(vision=_clip((get.inner("vision_config") or get).or_defaults(_CLIP)))


def llava(config: Mapping[str, Any], source: TensorSource) -> VargptConfig:
    """A LLaVA-1.5: a model that understands and does not draw."""
    get = Fields(config, {})
    text, vision = get.inner("text_config"), get.inner("vision_config")
    get.word("projector_hidden_act", "gelu")
    strategy = get.word("vision_feature_select_strategy", "default", "full")
    layer = get.index("vision_feature_layer", -2)
    # Releases differ in where they say that the head is tied; one that is there is not, unless its own model says so.
    headless = not any(name.endswith("lm_head.weight") for name in source.specs)
    tied = text.flag("tie_word_embeddings") or (headless and get.flag("tie_word_embeddings"))
    llm = _llama(text, tied=tied)
    return VargptConfig(
        llm=llm,
        vision=_clip(vision.or_defaults(_CLIP if vision else _CLIP_OF_LLAVA), layer, keep_cls=strategy == "full"),
        projector=ProjectorConfig(hidden=llm.width),
        tokens=_token_ids(get, text, image=32000),
        choices=replace(FIXED, training_template="llava", inference_template="llava"),
    )


def vargpt(config: Mapping[str, Any], source: TensorSource, patch_nums: tuple[int, ...] | None) -> VargptConfig:
    """A published VARGPT: what ``config.json`` says, and what only the tensors tell."""
    understanding, specs = llava(config, source), source.specs
    for name, number in dataclasses.asdict(understanding.tokens).items():
        if name.startswith("gen_") and number == ABSENT:
            raise ValueError(f"config.json: special_tokens.image_{name}_token_id is missing")
    vqvae = _vqvae(specs, find_patch_nums(source, patch_nums))
    # The class embedding has a row per token up to image_gen_start, and one more.
    var = _var(specs, vqvae, num_classes=understanding.tokens.gen_start + 1)
    inner, outer = (rf"image_gen_projector{which}\.mlp\." for which in ("", "_out"))
    return dataclasses.replace(
        understanding,
        var=var,
        vqvae=vqvae,
        gen_in=ProjectorConfig(hidden=_size(specs, (inner + r"0\.(?:weight|bias)", 0), (inner + r"2\.weight", 1))),
        gen_out=ProjectorConfig(hidden=_size(specs, (outer + r"0\.(?:weight|bias)", 0), (outer + r"2\.weight", 1))),
        choices=PUBLISHED,
    )


def var_pair(source: TensorSource, patch_nums: tuple[int, ...] | None) -> VargptConfig:
    """VAR's two files: a class-conditional model without a language model."""
    vqvae = _vqvae(source.specs, find_patch_nums(source, patch_nums))
    classes = _size(source.specs, (_VAR + r"class_emb\.weight", 0)) - 1
    return VargptConfig(var=_var(source.specs, vqvae, num_classes=classes), vqvae=vqvae)


def _token_ids(get: Fields, text: Fields, image: int = ABSENT) -> TokenIds:
    special = get.inner("special_tokens")
    defaults = _QWEN2 if text.word("model_type", "llama", "qwen2") == "qwen2" else _LLAMA

    def number(name: str, default: int = ABSENT) -> int:
        return next((n for n in (get.token(name), text.token(name)) if n != ABSENT), default)

    return TokenIds(
        bos=number("bos_token_id", defaults["bos_token_id"]),
        eos=number("eos_token_id", defaults["eos_token_id"]),
        image=number("image_token_index", number("image_token_id", image)),
        pad=number("pad_token_id"),
        gen_start=special.token("image_gen_start_token_id"),
        gen_end=special.token("image_gen_end_token_id"),
        gen_pad=special.token("image_gen_pad_token_id"),
    )


# Patterns of tensor names below; both parts stand alone in VAR's two files, and below longer prefixes in VARGPT.
_VAE, _VAR = r"vae(?:_local)?\.", r"var(?:gpt_gen)?\."
_BLOCK = _VAR + r"blocks\.\d+\."


def find_patch_nums(source: TensorSource, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The scales of a published checkpoint: from its buffer of level numbers, else those given or the released ones.

    Raises:
        ValueError: the scales contradict the tensors, or nothing tells them.
    """
    levels = next((name for name in source.specs if re.fullmatch(_VAR + "lvl_1L", name)), None)
    if levels is not None:
        lengths = torch.bincount(source.read(levels).flatten().long()).tolist()
        found = tuple(round(length**0.5) for length in lengths)
        if [side * side for side in found] != lengths:
            raise ValueError(f"{levels} does not count square scales: their lengths would be {lengths}")
        if given is not None and given != found:
            raise ValueError(f"patch_nums {given} contradict the checkpoint's own {found}: leave the option out")
        return found
    found = given or VqvaeConfig().patch_nums
    scales = _size(source.specs, (_VAR + r"lvl_embed\.weight", 0), (_VAE + r"quantize\.ema_vocab_hit_SV", 0))
    total = _size(source.specs, (_VAR + "pos_1LC", 1))
    if len(found) != scales or ScaleSchedule(found).total != total:
        raise ValueError(
            f"the checkpoint has {scales} scales of {total} tokens in all, which patch_nums {found} are not: "
            "name its own with --patch-nums"
        )
    return found


def _var(specs: Mapping[str, TensorSpec], vqvae: VqvaeConfig, num_classes: int) -> VarConfig:
    """Sizes of a published visual decoder, from its tensors."""
    width = _size(specs, (_BLOCK + r"attn\.[qv]_bias", 0))
    depth = _count(specs, _VAR + r"blocks\.(\d+)\.")
    cosine = any(re.fullmatch(_BLOCK + r"attn\.scale_mul_1H11", name) for name in specs)
    return VarConfig(
        patch_nums=vqvae.patch_nums,
        vocab_size=vqvae.vocab_size,
        latent_channels=vqvae.latent_channels,
        width=width,
        depth=depth,
        num_heads=_size(specs, (_BLOCK + r"attn\.scale_mul_1H11", 1)) if cosine else max(width // VAR_HEAD_WIDTH, 1),
        mlp_ratio=_size(specs, (_BLOCK + r"ffn\.fc1\.(?:weight|bias)", 0)) / width,
        num_classes=num_classes,
        shared_adaln=any(re.fullmatch(_BLOCK + "ada_gss", name) for name in specs),
        cosine_attention=cosine,
        drop_path=0.1 * depth / 24,
    )


def _vqvae(specs: Mapping[str, TensorSpec], patch_nums: tuple[int, ...]) -> VqvaeConfig:
    """Sizes of a published image tokenizer, from its tensors."""
    levels = _count(specs, _VAE + r"encoder\.down\.(\d+)\.")
    channels = _size(
        specs,
        (_VAE + r"encoder\.conv_in\.(?:weight|bias)", 0),
        (_VAE + r"encoder\.down\.0\.block\.0\.norm1\.(?:weight|bias)", 0),
    )
    widths = [
        _size(specs, (rf"{_VAE}encoder\.down\.{level}\.block\.\d+\.conv\d\.(?:weight|bias)", 0))
        for level in range(levels)
    ]
    phi = _VAE + r"quantize\.quant_resi\."
    shared = any(re.match(phi + r"qresi\.", name) for name in specs)
    return VqvaeConfig(
        patch_nums=patch_nums,
        vocab_size=_size(
            specs,
            (_VAE + r"quantize\.embedding\.weight", 0),
            (_VAE + r"quantize\.ema_vocab_hit_SV", 1),
            (_VAR + r"head\.(?:weight|bias)", 0),
        ),
        latent_channels=_size(
            specs,
            (_VAE + r"quantize\.embedding\.weight", 1),
            (_VAE + r"(?:post_)?quant_conv\.(?:weight|bias)", 0),
            (_VAR + r"word_embed\.weight", 1),
        ),
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        res_blocks=_count(specs, _VAE + r"encoder\.down\.0\.block\.(\d+)\."),
        attention=any(re.match(rf"{_VAE}encoder\.down\.{levels - 1}\.attn\.", name) for name in specs),
        num_phi=_count(specs, phi + r"(?:qresi_ls\.)?(\d+)\.") or int(shared),
        quant_kernel=_size(specs, (_VAE + r"(?:post_)?quant_conv\.weight", 2)),
    )


def _size(specs: Mapping[str, TensorSpec], *places: tuple[str, int]) -> int:
    """The size that most of the tensors at these places (name pattern, axis) have, so that a wrong one stands out."""
    votes = Counter(
        spec.shape[axis]
        for pattern, axis in places
        for name, spec in specs.items()
        if axis < len(spec.shape) and re.fullmatch(pattern, name)
    )
    if not votes:
        wanted = " or ".join(re.sub(r"\(.*?\)|\\d\+|\\", "*", pattern) for pattern, _ in places)
        raise ValueError(f"missing tensors in the checkpoint: {wanted}")
    return votes.most_common(1)[0][0]


def _count(specs: Mapping[str, TensorSpec], pattern: str) -> int:
    """How many numbers from 0 on the names hold where the pattern has its group."""
    numbers = {int(m[1]) for name in specs if (m := re.match(pattern, name))}
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def to_vargpt_json(config: VargptConfig) -> dict[str, Any]:
    """The published ``config.json`` of a model that has all parts.

    Raises:
        ValueError: a part that the published layout cannot hold.
    """
    llm, vision, tokens = config.llm, config.vision, config.tokens
    if not (llm and vision and config.projector and config.var and config.vqvae and config.gen_in and config.gen_out):
        raise ValueError("the published VARGPT layout holds whole models only: this one lacks a part")
    if not isinstance(vision, OpenClipConfig):
        raise ValueError("the published VARGPT layout holds CLIP vision encoders only")
    text = {
        "model_type": "llama",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.width,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.mlp_width,
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": llm.tie_embeddings,
        "attention_bias": llm.qkv_bias,
        "mlp_bias": llm.mlp_bias,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
    }
    if llm.qkv_bias and not llm.out_bias:
        text["model_type"] = "qwen2"
    if llm.rope_scaling is not None:
        scaling = llm.rope_scaling
        text["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    return {
        "architectures": ["VARGPTLlavaForConditionalGeneration"],
        "model_type": "vargpt_llava",
        "hidden_size": llm.width,
        "ignore_index": -100,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "image_token_index": tokens.image,
        "pad_token_id": tokens.pad,
        "projector_hidden_act": "gelu",
        "special_tokens": {
            "image_gen_start_token_id": tokens.gen_start,
            "image_gen_end_token_id": tokens.gen_end,
            "image_gen_pad_token_id": tokens.gen_pad,
        },
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "quick_gelu" if vision.quick_gelu else "gelu",
        },
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "full" if vision.keep_cls else "default",
        "vocab_size": llm.vocab_size,
    }


def check_same(config: VargptConfig, back: VargptConfig) -> None:
    """Compare a configuration with what the published layout makes of it.

    Raises:
        ValueError: fields of it that the published layout cannot hold.
    """
    if config.choices.projector_norm:
        raise ValueError("the published code skips the generation projectors' norm, which this model applies")
    given, held = _flat(to_json(config)), _flat(to_json(back))
    for name, value in given.items():
        # Of training alone, or of how the model is used.
        if name in ("var.drop_path", "vqvae.commitment") or name.startswith("choices."):
            continue
        if held.get(name) != value:
            raise ValueError(f"the published layout cannot hold {name} = {value!r}: it would be {held.get(name)!r}")


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat

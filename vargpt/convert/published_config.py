"""Published configurations and tensor shapes as ours, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from vargpt.choices import FIXED, PUBLISHED, TokenIds
from vargpt.config import ProjectorConfig, VargptConfig
from vargpt.llm import LlamaConfig, RopeScaling
from vargpt.scales import ScaleSchedule
from vargpt.tensorfiles import TensorSource, TensorSpec
from vargpt.var import VarConfig
from vargpt.vision import OpenClipConfig
from vargpt.vqvae import VqvaeConfig

ABSENT = -1
"""Number of a special token that a model does not have."""
VAR_HEAD_WIDTH = 64
"""Head width of every published VAR; only needed where no per-head tensor tells."""


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """A LLaMA, Vicuna or Qwen2 ``config.json``; absent fields take the defaults of that family.

    Raises:
        ValueError: a family, activation or rotary scaling that the decoder does not have.
    """
    family = config.get("model_type", "llama")
    if family not in ("llama", "qwen2"):
        raise ValueError(f"language model type {family!r} is not supported: use a 'llama' or 'qwen2' checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"language model activation {config['hidden_act']!r} is not supported: only 'silu' is")
    get = _with_defaults(config, _LLAMA_DEFAULTS if family == "llama" else _QWEN2_DEFAULTS)
    heads, positions = get("num_attention_heads"), get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return LlamaConfig(
        vocab_size=get("vocab_size"),
        width=get("hidden_size"),
        depth=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or get("hidden_size") // heads,
        mlp_width=get("intermediate_size"),
        max_positions=positions,
        norm_eps=get("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta") or get("rope_theta")),
        rope_scaling=_rope_scaling(rope, positions),
        tie_embeddings=get("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or get("attention_bias"),
        out_bias=family == "llama" and get("attention_bias"),
        mlp_bias=get("mlp_bias"),
    )


_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
}  # fmt: skip
_CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip


def _with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    return lambda name: config.get(name, defaults[name])


def _rope_scaling(rope: Mapping[str, Any], positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3"):
        raise ValueError(f"rope scaling {kind!r} is not supported: only linear, dynamic and llama3 are")
    return RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        original_positions=int(rope.get("original_max_position_embeddings") or positions),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
    )


def clip_config(config: Mapping[str, Any], feature_layer: int, keep_cls: bool) -> OpenClipConfig:
    """The vision half of a CLIP ``config.json``."""
    get = _with_defaults(config, _CLIP_DEFAULTS)
    if get("hidden_act") not in ("quick_gelu", "gelu"):
        raise ValueError(f"vision activation {get('hidden_act')!r} is not supported: only quick_gelu and gelu are")
    return OpenClipConfig(
        image_size=get("image_size"),
        patch_size=get("patch_size"),
        width=get("hidden_size"),
        depth=get("num_hidden_layers"),
        num_heads=get("num_attention_heads"),
        mlp_width=get("intermediate_size"),
        quick_gelu=get("hidden_act") == "quick_gelu",
        norm_eps=get("layer_norm_eps"),
        feature_layer=feature_layer,
        keep_cls=keep_cls,
    )


def llama_only(config: Mapping[str, Any]) -> VargptConfig:
    """A LLaMA checkpoint as a model with one part."""
    return VargptConfig(llm=llama_config(config), tokens=_token_ids(config, config))


def clip_only(config: Mapping[str, Any]) -> VargptConfig:
    """A CLIP checkpoint (whole, or its vision half) as a model with one part: penultimate features, no CLS."""
    return VargptConfig(vision=clip_config(config.get("vision_config", config), -2, keep_cls=False))


def llava(config: Mapping[str, Any]) -> VargptConfig:
    """A LLaVA-1.5 ``config.json``: a model that understands and does not draw."""
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy must be 'default' or 'full', not {strategy!r}")
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"projector activation {config['projector_hidden_act']!r} is not supported: only 'gelu' is")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one number, not {layer!r}")
    text = config.get("text_config", {})
    llm = llama_config(text)
    return VargptConfig(
        llm=llm,
        vision=clip_config(config.get("vision_config", {}), layer, keep_cls=strategy == "full"),
        projector=ProjectorConfig(hidden=llm.width),
        tokens=_token_ids(config, text),
        choices=FIXED,
    )


def vargpt(config: Mapping[str, Any], source: TensorSource, patch_nums: tuple[int, ...] | None) -> VargptConfig:
    """A published VARGPT: what ``config.json`` says, and what only the tensors tell."""
    understanding = llava(config)
    patch_nums = find_patch_nums(source, "vargpt_gen.", "vae_local.", patch_nums)
    specs = source.specs
    return VargptConfig(
        llm=understanding.llm,
        vision=understanding.vision,
        projector=understanding.projector,
        var=var_config(specs, "vargpt_gen.", patch_nums),
        vqvae=vqvae_config(specs, "vae_local.", patch_nums),
        gen_in=ProjectorConfig(hidden=_shape(specs, "image_gen_projector.mlp.0.weight")[0]),
        gen_out=ProjectorConfig(hidden=_shape(specs, "image_gen_projector_out.mlp.0.weight")[0]),
        tokens=understanding.tokens,
        choices=PUBLISHED,
    )


def var_pair(source: TensorSource, patch_nums: tuple[int, ...] | None) -> VargptConfig:
    """VAR's two files: a class-conditional model without a language model."""
    patch_nums = find_patch_nums(source, "var.", "vae.", patch_nums)
    return VargptConfig(
        var=var_config(source.specs, "var.", patch_nums), vqvae=vqvae_config(source.specs, "vae.", patch_nums)
    )


def _token_ids(config: Mapping[str, Any], text: Mapping[str, Any]) -> TokenIds:
    special = config.get("special_tokens", {})

    def number(*values: Any) -> int:
        return next((v for v in values if isinstance(v, int)), ABSENT)

    return TokenIds(
        bos=number(config.get("bos_token_id"), text.get("bos_token_id"), 1),
        eos=number(config.get("eos_token_id"), text.get("eos_token_id"), 2),
        image=number(config.get("image_token_index"), config.get("image_token_id")),
        pad=number(config.get("pad_token_id"), text.get("pad_token_id")),
        gen_start=number(special.get("image_gen_start_token_id")),
        gen_end=number(special.get("image_gen_end_token_id")),
        gen_pad=number(special.get("image_gen_pad_token_id")),
    )


def find_patch_nums(source: TensorSource, var: str, vqvae: str, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The scales of a published checkpoint: from its buffer of level numbers, else those given or the released ones.

    Raises:
        ValueError: the scales contradict the tensors, or nothing tells them.
    """
    total = _shape(source.specs, var + "pos_1LC")[1]
    scales = _shape(source.specs, var + "lvl_embed.weight")[0]
    if var + "lvl_1L" in source.specs:
        lengths = torch.bincount(source.read(var + "lvl_1L").flatten().long()).tolist()
        found = tuple(round(length**0.5) for length in lengths)
        if given is not None and given != found:
            raise ValueError(f"patch_nums {given} contradict the checkpoint's own {found}: leave the option out")
    else:
        found = given or VqvaeConfig().patch_nums
    if len(found) != scales or ScaleSchedule(found).total != total:
        raise ValueError(
            f"the checkpoint has {scales} scales of {total} tokens in all, which patch_nums {found} are not: "
            "name its own with --patch-nums"
        )
    counted = source.specs.get(vqvae + "quantize.ema_vocab_hit_SV")
    if counted is not None and counted.shape[0] != scales:
        raise ValueError(f"the image tokenizer has {counted.shape[0]} scales, the visual decoder {scales}")
    return found


def var_config(specs: Mapping[str, TensorSpec], prefix: str, patch_nums: tuple[int, ...]) -> VarConfig:
    """Sizes of a published visual decoder, from its tensors."""
    rows, width = _shape(specs, prefix + "class_emb.weight")
    vocab = _shape(specs, prefix + "head.weight")[0]
    depth = _count(specs, prefix + r"blocks\.(\d+)\.")
    scale = specs.get(prefix + "blocks.0.attn.scale_mul_1H11")
    return VarConfig(
        patch_nums=patch_nums,
        vocab_size=vocab,
        latent_channels=_shape(specs, prefix + "word_embed.weight")[1],
        width=width,
        depth=depth,
        num_heads=width // VAR_HEAD_WIDTH if scale is None else scale.shape[1],
        mlp_ratio=_shape(specs, prefix + "blocks.0.ffn.fc1.weight")[0] / width,
        num_classes=rows - 1,
        shared_adaln=prefix + "blocks.0.ada_gss" in specs,
        cosine_attention=scale is not None,
        drop_path=0.1 * depth / 24,
    )


def vqvae_config(specs: Mapping[str, TensorSpec], prefix: str, patch_nums: tuple[int, ...]) -> VqvaeConfig:
    """Sizes of a published image tokenizer, from its tensors."""
    vocab, latent = _shape(specs, prefix + "quantize.embedding.weight")
    channels = _shape(specs, prefix + "encoder.conv_in.weight")[0]
    levels = _count(specs, prefix + r"encoder\.down\.(\d+)\.")
    widths = [_shape(specs, f"{prefix}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    phi = prefix + "quantize.quant_resi."
    partly, separate = _count(specs, phi + r"qresi_ls\.(\d+)\."), _count(specs, phi + r"(\d+)\.")
    return VqvaeConfig(
        patch_nums=patch_nums,
        vocab_size=vocab,
        latent_channels=latent,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        res_blocks=_count(specs, prefix + r"encoder\.down\.0\.block\.(\d+)\."),
        attention=f"{prefix}encoder.down.{levels - 1}.attn.0.norm.weight" in specs,
        num_phi=partly or separate or int(phi + "qresi.weight" in specs),
        quant_kernel=_shape(specs, prefix + "quant_conv.weight")[-1],
    )


def _shape(specs: Mapping[str, TensorSpec], name: str) -> tuple[int, ...]:
    if name not in specs:
        raise ValueError(f"missing tensors in the checkpoint: 1 ({name})")
    return specs[name].shape


def _count(specs: Mapping[str, TensorSpec], pattern: str) -> int:
    numbers = {int(m[1]) for name in specs if (m := re.match(pattern, name))}
    return max(numbers, default=-1) + 1


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

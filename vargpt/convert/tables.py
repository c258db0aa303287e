"""The key tables of the published layouts, one each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vargpt.convert.rules import PER_HEAD, SIX, STACK, Ignored, Rebuilding, Rule, Table
from vargpt.scales import ScaleSchedule


def _rebuild_level_ids(given: Rebuilding) -> Mapping[str, Tensor]:
    assert given.patch_nums is not None
    return {"lvl_1L": ScaleSchedule(given.patch_nums).level_ids()[None]}


def _rebuild_attention_bias(given: Rebuilding) -> Mapping[str, Tensor]:
    assert given.patch_nums is not None
    levels = ScaleSchedule(given.patch_nums).level_ids()
    bias = torch.zeros(1, 1, len(levels), len(levels), dtype=given.specs["head.weight"].dtype)
    return {"attn_bias_for_masking": bias.masked_fill(levels[:, None] < levels, float("-inf"))}


def _rebuild_key_bias(given: Rebuilding) -> Mapping[str, Tensor]:
    like = {name: spec for name, spec in given.specs.items() if name.endswith(".attn.q_bias")}
    return {
        name.replace("q_bias", "zero_k_bias"): torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in like.items()
    }


LLAMA_HF = Table(
    (
        Rule("model.embed_tokens.weight", "llm.token_embed.weight"),
        Rule("model.layers.{i}.input_layernorm.weight", "llm.blocks.{i}.attn_norm.weight"),
        Rule("model.layers.{i}.self_attn.q_proj.{p}", "llm.blocks.{i}.attn.q.{p}"),
        Rule("model.layers.{i}.self_attn.k_proj.{p}", "llm.blocks.{i}.attn.k.{p}"),
        Rule("model.layers.{i}.self_attn.v_proj.{p}", "llm.blocks.{i}.attn.v.{p}"),
        Rule("model.layers.{i}.self_attn.o_proj.{p}", "llm.blocks.{i}.attn.out.{p}"),
        Rule("model.layers.{i}.post_attention_layernorm.weight", "llm.blocks.{i}.mlp_norm.weight"),
        Rule("model.layers.{i}.mlp.gate_proj.{p}", "llm.blocks.{i}.mlp.gate.{p}"),
        Rule("model.layers.{i}.mlp.up_proj.{p}", "llm.blocks.{i}.mlp.up.{p}"),
        Rule("model.layers.{i}.mlp.down_proj.{p}", "llm.blocks.{i}.mlp.down.{p}"),
        Rule("model.norm.weight", "llm.norm.weight"),
        Rule("lm_head.weight", "llm.head.weight"),
    ),
    (Ignored("model.layers.{i}.self_attn.rotary_emb.inv_freq", "follows from the configuration"),),
)

_QKV = ("q_proj", "k_proj", "v_proj")
_CLIP = "vision_model.encoder.layers.{i}."
_BLOCK = "vision.visual.transformer.resblocks.{i}."
CLIP_VISION_HF = Table(
    (
        Rule("vision_model.embeddings.class_embedding", "vision.visual.class_embedding"),
        Rule("vision_model.embeddings.patch_embedding.weight", "vision.visual.conv1.weight"),
        Rule("vision_model.embeddings.position_embedding.weight", "vision.visual.positional_embedding"),
        Rule("vision_model.pre_layrnorm.{p}", "vision.visual.ln_pre.{p}"),  # their spelling
        Rule(tuple(f"{_CLIP}self_attn.{x}.weight" for x in _QKV), _BLOCK + "attn.in_proj_weight", STACK),
        Rule(tuple(f"{_CLIP}self_attn.{x}.bias" for x in _QKV), _BLOCK + "attn.in_proj_bias", STACK),
        Rule(_CLIP + "self_attn.out_proj.{p}", _BLOCK + "attn.out_proj.{p}"),
        Rule(_CLIP + "layer_norm1.{p}", _BLOCK + "ln_1.{p}"),
        Rule(_CLIP + "layer_norm2.{p}", _BLOCK + "ln_2.{p}"),
        Rule(_CLIP + "mlp.fc1.{p}", _BLOCK + "mlp.c_fc.{p}"),
        Rule(_CLIP + "mlp.fc2.{p}", _BLOCK + "mlp.c_proj.{p}"),
        Rule("vision_model.post_layernorm.{p}", "vision.visual.ln_post.{p}"),
    ),
    (Ignored("vision_model.embeddings.position_ids", "counts 0, 1, 2, ..."),),
)

CLIP_HF = CLIP_VISION_HF + Table(
    (),
    (
        Ignored("text_model.{rest}", "the text tower is not used"),
        Ignored("text_projection.weight", "the text tower is not used"),
        Ignored("visual_projection.weight", "belongs to the contrastive loss"),
        Ignored("logit_scale", "belongs to the contrastive loss"),
    ),
    # transformers 5 saves the vision half alone without the prefix.
    ((r"(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", "vision_model."),),
)

LLAVA_HF = (
    CLIP_VISION_HF.prefixed("vision_tower.")
    + LLAMA_HF.prefixed("language_model.")
    + Table(
        (
            Rule("multi_modal_projector.linear_1.{p}", "projector.layers.0.{p}"),
            Rule("multi_modal_projector.linear_2.{p}", "projector.layers.2.{p}"),
        ),
        # The same names in the checkpoints of transformers 4.52 and later, and of 5.
        aliases=(
            (r"model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
            (r"language_model\.(?!model\.|lm_head\.)", "language_model.model."),
            (r"lm_head\.", "language_model.lm_head."),
            (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
    )
)

VQVAE_OFFICIAL = Table(
    (
        Rule("encoder.{rest}", "vqvae.encoder.{rest}"),
        Rule("decoder.{rest}", "vqvae.decoder.{rest}"),
        Rule("quant_conv.{p}", "vqvae.quant_conv.{p}"),
        Rule("post_quant_conv.{p}", "vqvae.post_quant_conv.{p}"),
        Rule("quantize.embedding.weight", "vqvae.quantizer.codebook.weight"),
        # Three forms of sharing phi: among some scales (the released one), among all, or not at all.
        Rule("quantize.quant_resi.qresi_ls.{i}.{p}", "vqvae.quantizer.phi.{i}.{p}"),
        Rule("quantize.quant_resi.qresi.{p}", "vqvae.quantizer.phi.0.{p}"),
        Rule("quantize.quant_resi.{i}.{p}", "vqvae.quantizer.phi.{i}.{p}"),
        Rule("quantize.ema_vocab_hit_SV", "vqvae.quantizer.usage_SV"),
    )
)

VAR_OFFICIAL = Table(
    (
        Rule("class_emb.weight", "var.class_embed.weight"),
        Rule("word_embed.{p}", "var.word_embed.{p}"),
        Rule("lvl_embed.weight", "var.level_embed.weight"),
        Rule("pos_1LC", "var.pos_embed"),
        Rule("pos_start", "var.pos_start"),
        Rule("shared_ada_lin.1.{p}", "var.shared_ada.{p}"),
        Rule("blocks.{i}.ada_gss", "var.blocks.{i}.ada_offset", SIX),
        Rule("blocks.{i}.ada_lin.1.{p}", "var.blocks.{i}.ada.{p}"),
        Rule("blocks.{i}.attn.mat_qkv.weight", "var.blocks.{i}.attn.qkv.weight"),
        Rule("blocks.{i}.attn.q_bias", "var.blocks.{i}.attn.q_bias"),
        Rule("blocks.{i}.attn.v_bias", "var.blocks.{i}.attn.v_bias"),
        Rule("blocks.{i}.attn.scale_mul_1H11", "var.blocks.{i}.attn.log_scale", PER_HEAD),
        Rule("blocks.{i}.attn.proj.{p}", "var.blocks.{i}.attn.proj.{p}"),
        Rule("blocks.{i}.ffn.{rest}", "var.blocks.{i}.mlp.{rest}"),
        Rule("head_nm.ada_lin.1.{p}", "var.head_ada.{p}"),
        Rule("head.{p}", "var.head.{p}"),
    ),
    (
        Ignored("lvl_1L", "follows from the scales", _rebuild_level_ids),
        Ignored("attn_bias_for_masking", "follows from the scales", _rebuild_attention_bias),
        Ignored("blocks.{i}.attn.zero_k_bias", "always zero", _rebuild_key_bias),
    ),
)

VAR_PAIR = VQVAE_OFFICIAL.prefixed("vae.") + VAR_OFFICIAL.prefixed("var.")
"""VAR's two files, read as one: ``vae.`` and ``var.`` stand before the names of each."""

VARGPT_HF = (
    LLAVA_HF
    + VQVAE_OFFICIAL.prefixed("vae_local.")
    + VAR_OFFICIAL.prefixed("vargpt_gen.")
    + Table(
        (
            Rule("image_gen_projector.ln_q.{p}", "gen_in.norm.{p}"),
            Rule("image_gen_projector.mlp.{i}.{p}", "gen_in.layers.{i}.{p}"),
            Rule("image_gen_projector_out.ln_q.{p}", "gen_out.norm.{p}"),
            Rule("image_gen_projector_out.mlp.{i}.{p}", "gen_out.layers.{i}.{p}"),
        )
    )
)

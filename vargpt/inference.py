"""A loaded model made ready to do nothing but draw and answer."""

from __future__ import annotations

import torch

from vargpt.llm import LlamaDecoder, columns_first
from vargpt.model import VARGPT
from vargpt.var import NextScaleTransformer, fold_conditions
from vargpt.vqvae import MultiScaleVQVAE, fold_upsampling


def for_inference(model: VARGPT) -> VARGPT:
    """Rearrange those parts that are this project's own, for the same results up to rounding with less work.

    The visual decoder's conditions are folded (``vargpt.var.fold_conditions``), the image tokenizer's upsampling too
    (``vargpt.vqvae.fold_upsampling``), and float32 weights of the language model are laid out for decoding on CPUs
    (``vargpt.llm.columns_first``). Each can be called alone. The model is changed in place: it can draw, ask and chat,
    but neither learn nor be saved any more.
    """
    if isinstance(model.var, NextScaleTransformer) and model.var.folded is None:
        fold_conditions(model.var)
    if isinstance(model.vqvae, MultiScaleVQVAE):
        fold_upsampling(model.vqvae)
    if isinstance(model.llm, LlamaDecoder):
        weight = model.llm.token_embed.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            columns_first(model.llm)
    return model

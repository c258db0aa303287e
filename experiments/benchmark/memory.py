"""How much memory a case will take, roughly: what does not fit is not begun."""

from __future__ import annotations

import torch

from experiments.benchmark.counting import Sizes
from vargpt.build import build
from vargpt.config import VargptConfig
from vargpt.vqvae import VqvaeConfig

PROCESS = 0.6e9
"""Bytes that a process brings with it: Python, torch and the libraries."""


def weights(config: VargptConfig, *parts: str) -> int:
    """Numbers in the parts named, or in all."""
    with torch.device("meta"):
        model = build(config)
    return sum(p.numel() for name, p in model.named_parameters() if not parts or name.split(".")[0] in parts)


def text_memory(config: VargptConfig, *, rows: int, tokens: int, size: int) -> float:
    """Bytes to generate text: weights and a cache of ``tokens`` tokens a row."""
    c = config.llm
    assert c is not None
    cache = 2 * c.depth * rows * c.num_kv_heads * c.head_dim * tokens
    return PROCESS + size * (weights(config) + cache)


def drawing_memory(config: VargptConfig, *, batch: int, prompt: int, size: int) -> float:
    """Bytes to draw: weights, the caches of both decoders with guidance, and what decoding a picture holds."""
    s = Sizes.of(config)
    total = s.schedule.total
    llm_rows = batch if config.choices.null == "noise" else 2 * batch
    caches = 2 * s.llm.depth * llm_rows * s.llm.num_kv_heads * s.llm.head_dim * (prompt + total)
    caches += 2 * s.var.depth * 2 * batch * s.var.width * total
    return PROCESS + size * (weights(config) + caches) + tokenizer_memory(s.vqvae, batch=batch)


def tokenizer_memory(c: VqvaeConfig, *, batch: int) -> float:
    """Bytes of what the image tokenizer holds at its peak, in float32: some tensors of the highest resolution."""
    return 4 * TENSORS * batch * c.channels * c.image_size**2


TENSORS = 6
"""As many tensors of full resolution are held at the same time, what convolutions need for themselves included."""


def training_memory(config: VargptConfig, *, text: int) -> float:
    """Bytes of a training step on one drawing, in float32: what is trained four times (weights, gradients and AdamW's
    two moments), the image tokenizer, and the activations that the backward pass reads."""
    s = Sizes.of(config)
    trained = weights(config, "llm", "var", "gen_in", "gen_out")
    llm = s.llm.depth * (text + s.schedule.total) * (12 * s.llm.width + 4 * s.llm.mlp_width)
    var = s.var.depth * s.schedule.total * (14 + 3 * s.var.mlp_ratio) * s.var.width
    return PROCESS + 4 * (4 * trained + weights(config, "vqvae") + llm + var)

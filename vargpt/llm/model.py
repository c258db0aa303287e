"""A LLaMA-style decoder that starts from embeddings and ends at hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vargpt.kernels import KVCache
from vargpt.llm.config import LlamaConfig
from vargpt.llm.layers import Block, rope_frequencies, rotations


class LlamaDecoder(nn.Module):
    """Decoder of LLaMA (arXiv 2302.13971); with ``qkv_bias`` also of Qwen2. Satisfies ``LanguageModel``.

    Example::

        llm = LlamaDecoder(LlamaConfig(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=2, head_dim=16,
                                       mlp_width=128))
        hidden = llm(llm.embed(input_ids))           # [B, T, 64]
        next_logits = llm.logits(hidden[:, -1])      # [B, 512]
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_init_weights)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def context_length(self) -> int:
        scaling = self.config.rope_scaling
        if scaling is None or scaling.kind == "llama3":  # which counts the stretched positions
            return self.config.max_positions
        return int(self.config.max_positions * scaling.factor)

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.token_embed(input_ids)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``length`` tokens, padding included."""
        c, weight = self.config, self.token_embed.weight
        return KVCache(c.depth, batch, c.num_kv_heads, length, c.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        attention_mask: Bool[Tensor, "B M"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm; causal, no logits.

        Args:
            x_BTD: embeddings of the new tokens, :meth:`embed` or any other part's output of this width.
            attention_mask: false at padding, over the M = cached + T tokens; left and right padding both work.
                Positions count real tokens only.
            cache: keys and values of earlier tokens; the new ones are appended.

        Raises:
            ValueError: a row longer than the context, or a mask of another length.
        """
        new, past = x_BTD.shape[1], 0 if cache is None else cache.length
        if past + new > self.context_length:
            raise ValueError(
                f"{past + new} tokens exceed the model's context of {self.context_length}: shorten the prompt"
            )
        if attention_mask is None:
            positions = torch.arange(past, past + new, device=x_BTD.device)[None]
        else:
            if attention_mask.shape[1] != past + new:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} tokens, "
                    f"but there are {past} cached and {new} new ones"
                )
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        cos, sin = rotations(rope_frequencies(self.config, positions), positions, x_BTD.dtype)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, cos, sin, attention_mask, cache, layer)
        if cache is not None:
            cache.advance(new)
        return self.norm(x_BTD)

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Next-token logits of the hidden states the caller chose."""
        return F.linear(hidden, self.token_embed.weight) if self.head is None else self.head(hidden)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

"""The next-scale transformer (VAR, arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vargpt.kernels import KVCache
from vargpt.scales import ScaleSchedule
from vargpt.var.config import VarConfig
from vargpt.var.layers import Block, modulate


class NextScaleTransformer(nn.Module):
    """Predicts every token map from all smaller ones. Satisfies ``VisualDecoder``.

    It reads embedded inputs, so that a language model can rewrite them on the way (VARGPT); used alone, with
    :meth:`embed`, it is the class-conditional VAR::

        x = var.embed(next_inputs, var.condition(labels))     # teacher forcing: [B, L, C]
        logits = var(x, var.condition(labels))                # [B, L, V]
    """

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule = ScaleSchedule(config.patch_nums)
        width = config.width
        self.class_embed = nn.Embedding(config.num_classes + 1, width)
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.level_embed = nn.Embedding(len(schedule), width)
        self.pos_embed = nn.Parameter(torch.empty(1, schedule.total, width))
        self.pos_start = nn.Parameter(torch.empty(1, schedule.lengths[0], width))
        self.shared_ada = nn.Linear(width, 6 * width) if config.shared_adaln else None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_ada = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.vocab_size)
        self.folded: nn.Module | None = None
        """Takes the place of :meth:`modulations` after ``fold_conditions``."""
        self._init_weights()

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def image_class(self) -> int:
        return self.config.num_classes - 1

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    def condition(self, classes: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        return self.class_embed(classes)

    def embed_scale(
        self, scale: int, next_input: Float[Tensor, "B N Z"] | None, condition: Float[Tensor, "B C"]
    ) -> Float[Tensor, "B N C"]:
        """Inputs of one scale, with their level and position added.

        Args:
            next_input: running latent at this scale's size; None at scale 0, whose tokens start from the condition.
        """
        span = self.schedule.span(scale)
        x = condition[:, None] + self.pos_start if next_input is None else self.word_embed(next_input)
        return x + self.level_embed.weight[scale] + self.pos_embed[:, span]

    def embed(
        self, next_inputs: Sequence[Float[Tensor, "B _ Z"]], condition: Float[Tensor, "B C"]
    ) -> Float[Tensor, "B L C"]:
        """Inputs of all scales for teacher forcing: ``next_inputs`` are those of scales 1 .. S-1."""
        return torch.cat([self.embed_scale(scale, x, condition) for scale, x in enumerate((None, *next_inputs))], dim=1)

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for all L tokens of ``batch`` rows."""
        c, weight = self.config, self.head.weight
        head_dim = c.width // c.num_heads
        return KVCache(
            c.depth, batch, c.num_heads, self.schedule.total, head_dim, device=weight.device, dtype=weight.dtype
        )

    def forward(
        self, x_BLC: Float[Tensor, "B L C"], condition: Float[Tensor, "B C"], *, cache: KVCache | None = None
    ) -> Float[Tensor, "B L V"]:
        """Logits of the tokens whose inputs are given.

        Args:
            x_BLC: inputs of all scales, or of the first few (block-causal attention); with a cache, of the one
                scale that follows those in it. No mask is needed then: all it sees is what it may see.
            condition: what the adaptive norms read, :meth:`condition` of a class or any vector of this width.
        """
        limits = None
        if cache is None:
            ends = self.schedule.offsets[1:]
            if x_BLC.shape[1] not in ends:
                raise ValueError(f"{x_BLC.shape[1]} inputs end inside a scale; whole scales end at {ends}")
            limits = self.schedule.visible_limits(ends.index(x_BLC.shape[1]) + 1)
        find = self.modulations if self.folded is None else self.folded
        *sixes, (scale, shift) = find(condition)
        for layer, (block, six) in enumerate(zip(self.blocks, sixes, strict=True)):
            x_BLC = block(x_BLC, six, limits, cache, layer)
        if cache is not None:
            cache.advance(x_BLC.shape[1])
        return self.head(modulate(x_BLC, scale, shift, self.config.norm_eps))

    def modulations(self, condition: Float[Tensor, "B C"]) -> list[Float[Tensor, "_ B 1 C"]]:
        """What the condition says to every norm: six vectors to each block, scale and shift to the head."""
        if not self.config.adaptive:
            condition = torch.zeros_like(condition)  # which leaves the modulations' biases
        condition = F.silu(condition)
        shared = None
        if self.shared_ada is not None:
            shared = rearrange(self.shared_ada(condition), "B (six C) -> B six C", six=6)
        sixes = [block.modulation(condition, shared) for block in self.blocks]  # pyright: ignore[reportCallIssue]
        return [*sixes, rearrange(self.head_ada(condition), "B (two C) -> two B 1 C", two=2)]

    @torch.no_grad()
    def _init_weights(self) -> None:
        """VAR's initialisation: the blocks' own gates near zero (a shared modulation is not scaled)."""
        width, std = self.config.width, (1 / self.config.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        nn.init.trunc_normal_(self.pos_start, std=std)
        self.head.weight.mul_(0.02)
        self.head_ada.weight.mul_(0.5)
        for module in self.blocks:
            assert isinstance(module, Block)
            module.attn.proj.weight.div_((2 * self.config.depth) ** 0.5)
            module.mlp.fc2.weight.div_((2 * self.config.depth) ** 0.5)
            gates, rest = (
                (module.ada_offset[:2], module.ada_offset[2:])
                if self.config.shared_adaln
                else (module.ada.weight[: 2 * width], module.ada.weight[2 * width :])
            )
            gates.mul_(1e-5)
            rest.mul_(0.5)

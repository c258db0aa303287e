"""Configuration of the whole model: the parts' own configurations, checks across them, and presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vargpt.choices import FIXED, PUBLISHED, Choices, TokenIds
from vargpt.llm.config import LlamaConfig
from vargpt.var.config import VarConfig
from vargpt.vision.config import OpenClipConfig, TimmConfig
from vargpt.vqvae.config import VqvaeConfig


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A projector's inside; its two ends follow from the parts it joins."""

    hidden: int
    depth: int = 2


@dataclass(frozen=True, kw_only=True)
class VargptConfig:
    """The whole model, or as many of its parts as are given."""

    llm: LlamaConfig | None = None
    vision: OpenClipConfig | TimmConfig | None = None
    projector: ProjectorConfig | None = None
    var: VarConfig | None = None
    vqvae: VqvaeConfig | None = None
    gen_in: ProjectorConfig | None = None
    gen_out: ProjectorConfig | None = None
    tokens: TokenIds = TokenIds()
    choices: Choices = FIXED

    def __post_init__(self) -> None:
        if self.projector and not (self.llm and self.vision):
            raise ValueError("a projector needs a language model and a vision encoder to join")
        if (self.gen_in is None) != (self.gen_out is None):
            raise ValueError("gen_in and gen_out come together: give both or neither")
        if self.gen_in and not (self.llm and self.var):
            raise ValueError("gen_in and gen_out need a language model and a visual decoder to join")
        if self.var and self.vqvae:
            for field in ("patch_nums", "vocab_size", "latent_channels"):
                ours, theirs = getattr(self.var, field), getattr(self.vqvae, field)
                if ours != theirs:
                    raise ValueError(f"var.{field} is {ours} but vqvae.{field} is {theirs}: they must agree")
        if self.llm:
            used = dataclasses.asdict(self.tokens)
            for name, number in used.items():
                if not 0 <= number < self.llm.vocab_size:
                    raise ValueError(f"tokens.{name} = {number} lies outside the vocabulary of {self.llm.vocab_size}")


VARGPT_7B = VargptConfig(
    llm=LlamaConfig(),
    vision=OpenClipConfig(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_width=4096),
    projector=ProjectorConfig(hidden=4096),
    var=VarConfig(num_classes=32003),
    vqvae=VqvaeConfig(),
    gen_in=ProjectorConfig(hidden=1920),
    gen_out=ProjectorConfig(hidden=4096),
    choices=PUBLISHED,
)
"""The released model (arXiv 2501.12327): 9.28 B parameters."""


def _square(
    *, patch_nums: tuple[int, ...], vocab: int, latent: int, channels: tuple[int, tuple[int, ...]], groups: int,
    llm: tuple[int, int], var: tuple[int, int], image: tuple[int, int], vision: tuple[int, int],
) -> VargptConfig:  # fmt: skip
    """A small model from few numbers; pairs are (width, depth), (side, patch) and (channels, multipliers)."""
    width, depth = llm
    return VargptConfig(
        llm=LlamaConfig(
            vocab_size=SMALL_VOCABULARY,
            width=width,
            depth=depth,
            num_heads=width // 32,
            num_kv_heads=width // 32,
            head_dim=32,
            mlp_width=width * 8 // 3 // 32 * 32,
            max_positions=1024,
        ),
        vision=OpenClipConfig(
            image_size=image[0],
            patch_size=image[1],
            width=vision[0],
            depth=vision[1],
            num_heads=vision[0] // 32,
            mlp_width=vision[0] * 4,
            quick_gelu=False,
        ),
        projector=ProjectorConfig(hidden=width),
        var=VarConfig(
            patch_nums=patch_nums,
            vocab_size=vocab,
            latent_channels=latent,
            width=var[0],
            depth=var[1],
            num_heads=var[0] // 32,
            drop_path=0.0,
        ),
        vqvae=VqvaeConfig(
            patch_nums=patch_nums,
            vocab_size=vocab,
            latent_channels=latent,
            channels=channels[0],
            channel_multipliers=channels[1],
            norm_groups=groups,
        ),
        gen_in=ProjectorConfig(hidden=width),
        gen_out=ProjectorConfig(hidden=width),
        tokens=SMALL_TOKENS,
    )


SMALL_VOCABULARY = 640
SMALL_TOKENS = TokenIds(image=635, pad=636, gen_start=637, gen_end=638, gen_pad=639)  # of assets/tiny/tokenizer.model

PRESETS = {
    "nano": _square(
        patch_nums=(1, 2, 3, 4), vocab=256, latent=8, channels=(32, (1, 1, 2, 2)), groups=16,
        llm=(128, 3), var=(128, 3), image=(32, 8), vision=(96, 3),
    ),
    "tiny": _square(
        patch_nums=(1, 2, 3, 4, 6, 8), vocab=512, latent=16, channels=(32, (1, 2, 3, 4)), groups=16,
        llm=(256, 6), var=(256, 6), image=(64, 8), vision=(160, 5),
    ),
    "small": _square(
        patch_nums=(1, 2, 3, 4, 5, 6, 8), vocab=1024, latent=16, channels=(64, (1, 1, 2, 2, 4)), groups=32,
        llm=(512, 8), var=(512, 8), image=(128, 16), vision=(384, 8),
    ),
    "vargpt-7b": VARGPT_7B,
}  # fmt: skip
"""Named sizes: ``nano`` trains in minutes, ``vargpt-7b`` is the released model."""

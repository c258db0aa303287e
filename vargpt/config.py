"""Configuration of the whole model: the parts' own configurations, checks across them, and presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vargpt.choices import ABSENT, FIXED, PUBLISHED, Choices, TokenIds
from vargpt.llm.config import LlamaConfig
from vargpt.text import TEMPLATES
from vargpt.var.config import VarConfig
from vargpt.vision.config import OpenClipConfig, TimmConfig
from vargpt.vqvae.config import VqvaeConfig


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A projector's inside; its two ends follow from the parts it joins."""

    hidden: int
    depth: int = 2

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.depth < 1:
            raise ValueError(f"a projector needs a width and at least one layer, not {self.hidden} and {self.depth}")


@dataclass(frozen=True, kw_only=True)
class ImportedConfig:
    """A projector of the user's own, from outside this package: built as ``Class(in_width, out_width, **options)``.

    Its module must be imported before such a model is built or loaded: a model's file never makes code run.
    """

    kind: str
    """``module:Class``."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.kind):
            raise ValueError(f"kind must be the place of a class, module:Class, not {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What a model of a small world was trained on, for the user who asks for more."""

    summary: str
    """One sentence: what it draws."""
    words: tuple[str, ...]
    """All words it has read in requests, in lower case."""

    def unknown(self, text: str) -> list[str]:
        """The words of a text that it has never read."""
        return [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower())) if word not in self.words]


@dataclass(frozen=True, kw_only=True)
class VargptConfig:
    """The whole model, or as many of its parts as are given."""

    llm: LlamaConfig | None = None
    vision: OpenClipConfig | TimmConfig | None = None
    projector: ProjectorConfig | ImportedConfig | None = None
    var: VarConfig | None = None
    vqvae: VqvaeConfig | None = None
    gen_in: ProjectorConfig | ImportedConfig | None = None
    gen_out: ProjectorConfig | ImportedConfig | None = None
    tokens: TokenIds = TokenIds()
    choices: Choices = FIXED
    knows: Knowledge | None = None

    def __post_init__(self) -> None:
        for template in (self.choices.training_template, self.choices.inference_template):
            if template not in TEMPLATES:
                raise ValueError(f"unknown chat template {template!r}: choose one of {', '.join(TEMPLATES)}")
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
                if number != ABSENT and not 0 <= number < self.llm.vocab_size:
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


SMALL_VOCABULARY = 640
SMALL_TOKENS = TokenIds(image=635, pad=636, gen_start=637, gen_end=638, gen_pad=639)  # of assets/tiny/tokenizer.model
SMALL_CHOICES = dataclasses.replace(FIXED, training_template="plain", inference_template="plain")


def _small(
    vqvae: VqvaeConfig, *, width: int, depth: int, vision_width: int, vision_depth: int, patch_size: int
) -> VargptConfig:
    """A model around an image tokenizer: both decoders of one size, pictures to understand as large as those drawn."""
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
            image_size=vqvae.image_size,
            patch_size=patch_size,
            width=vision_width,
            depth=vision_depth,
            num_heads=vision_width // 32,
            mlp_width=4 * vision_width,
            quick_gelu=False,
        ),
        projector=ProjectorConfig(hidden=width),
        var=VarConfig(
            patch_nums=vqvae.patch_nums,
            vocab_size=vqvae.vocab_size,
            latent_channels=vqvae.latent_channels,
            width=width,
            depth=depth,
            num_heads=width // 32,
            drop_path=0.0,
        ),
        vqvae=vqvae,
        gen_in=ProjectorConfig(hidden=width),
        gen_out=ProjectorConfig(hidden=width),
        tokens=SMALL_TOKENS,
        choices=SMALL_CHOICES,
    )


NANO = _small(
    VqvaeConfig(
        patch_nums=(4, 4),
        vocab_size=32,
        latent_channels=16,
        channels=32,
        channel_multipliers=(1, 1, 2, 2),
        res_blocks=1,
        local=True,
        num_phi=0,
        quant_kernel=1,
    ),
    width=128,
    depth=4,
    vision_width=96,
    vision_depth=4,
    patch_size=8,
)
TINY = _small(
    VqvaeConfig(
        patch_nums=(8, 8),
        vocab_size=64,
        latent_channels=16,
        channels=16,
        channel_multipliers=(1, 2, 4, 6),
        res_blocks=1,
        local=True,
        num_phi=0,
        quant_kernel=1,
    ),
    width=192,
    depth=5,
    vision_width=128,
    vision_depth=5,
    patch_size=8,
)
SMALL = _small(
    VqvaeConfig(
        patch_nums=(1, 2, 3, 4, 5, 6, 8),
        vocab_size=1024,
        latent_channels=16,
        channels=64,
        channel_multipliers=(1, 1, 2, 2, 4),
    ),
    width=512,
    depth=8,
    vision_width=384,
    vision_depth=8,
    patch_size=16,
)
BENCH_MID = VargptConfig(
    llm=LlamaConfig(width=768, depth=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_width=2048),
    vision=OpenClipConfig(image_size=224, patch_size=16, width=384, depth=12, num_heads=6, mlp_width=1536),
    projector=ProjectorConfig(hidden=768),
    var=VarConfig(width=768, depth=12, num_heads=12, drop_path=0.0),
    vqvae=VqvaeConfig(),
    gen_in=ProjectorConfig(hidden=768),
    gen_out=ProjectorConfig(hidden=768),
    choices=dataclasses.replace(PUBLISHED, training_template="plain", inference_template="plain"),
)
"""For measurements: small decoders with the released image tokenizer, and short prompts, since its tokens are bytes."""
PRESETS = {"nano": NANO, "tiny": TINY, "small": SMALL, "bench-mid": BENCH_MID, "vargpt-7b": VARGPT_7B}
"""Named sizes: ``nano`` trains in minutes, ``bench-mid`` is for measurements, ``vargpt-7b`` is the released model."""

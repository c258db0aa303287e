"""From a configuration to a model: the only wiring."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vargpt.config import PRESETS, ImportedConfig, ProjectorConfig, VargptConfig
from vargpt.interfaces import Projector
from vargpt.llm import LlamaDecoder
from vargpt.model import VARGPT
from vargpt.projector import MLPProjector
from vargpt.text import Tokenizer
from vargpt.var import NextScaleTransformer
from vargpt.vision import OpenClipConfig, OpenClipEncoder, TimmConfig, TimmEncoder
from vargpt.vqvae import MultiScaleVQVAE

VISION: dict[type, Callable[[Any], nn.Module]] = {OpenClipConfig: OpenClipEncoder, TimmConfig: TimmEncoder}


def build(config: VargptConfig, *, seed: int = 0, tokenizer: Tokenizer | None = None) -> VARGPT:
    """A model with random weights; the same seed gives the same weights.

    Under ``torch.device("meta")`` it has shapes only and costs nothing, at any size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(config, tokenizer)


def _build(config: VargptConfig, tokenizer: Tokenizer | None) -> VARGPT:
    c = config
    llm = LlamaDecoder(c.llm) if c.llm else None
    vision: Any = VISION[type(c.vision)](c.vision) if c.vision else None
    var = NextScaleTransformer(c.var) if c.var else None
    norm = c.choices.projector_norm
    return VARGPT(
        llm=llm,
        vision=vision,
        projector=_projector(c.projector, vision, llm, norm=False),
        var=var,
        vqvae=MultiScaleVQVAE(c.vqvae) if c.vqvae else None,
        gen_in=_projector(c.gen_in, var, llm, norm=norm),
        gen_out=_projector(c.gen_out, llm, var, norm=norm),
        tokens=c.tokens,
        choices=c.choices,
        tokenizer=tokenizer,
        config=c,
    )


def _projector(
    config: ProjectorConfig | ImportedConfig | None, source: Any, target: Any, *, norm: bool
) -> Projector | None:
    """A projector from the width of one part to that of another."""
    if config is None:
        return None
    if isinstance(config, ImportedConfig):
        try:
            return _imported(config.kind)(source.width, target.width, **config.options)
        except TypeError as error:
            raise ValueError(f"{config.kind} cannot be built: {error}") from error
    return MLPProjector(source.width, config.hidden, target.width, depth=config.depth, norm=norm)


def _imported(kind: str) -> Callable[..., Projector]:
    """A class of a module that is already imported; it may come from a stranger's file, so nothing is imported here."""
    module, _, name = kind.partition(":")
    if module not in sys.modules:
        raise ValueError(f"the model has a part of {module!r}, code that is not this package's: import it first")
    if not hasattr(sys.modules[module], name):
        raise ValueError(f"the module {module!r} has no {name!r}")
    return getattr(sys.modules[module], name)


def preset(name: str) -> VargptConfig:
    """A named configuration.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]

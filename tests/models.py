"""Small random models for the tests, and hypothesis strategies of their sizes.

Freshly built networks are tame: VAR's gates start near zero, so that its blocks do nothing yet. :func:`stir` gives
every weight a size at which every path matters, so that a wrong path shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from vargpt.build import build
from vargpt.choices import FIXED, Choices, TokenIds
from vargpt.config import ProjectorConfig, VargptConfig
from vargpt.llm import LlamaConfig, LlamaDecoder, RopeScaling
from vargpt.model import VARGPT
from vargpt.var import NextScaleTransformer, VarConfig
from vargpt.vision import OpenClipConfig
from vargpt.vqvae import MultiScaleVQVAE, VqvaeConfig

TOKENS = TokenIds(bos=1, eos=2, image=3, pad=4, gen_start=5, gen_end=6, gen_pad=7)
FIRST_WORD, VOCABULARY = 8, 24  # ordinary tokens lie between
CODES = 12
LATENT = 4

seeds = st.integers(0, 2**31 - 1)
schedules = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda sides: tuple(sorted(sides)))
"""Patch numbers; first sides above 1 and repeated sides are among them."""

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def stir(module: Module, seed: int = 0) -> Module:
    """Random weights of a size that keeps activations near 1; the module itself, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.2 * noise)  # norms stay near 1
        else:
            inputs = parameter.shape[1:].numel() if parameter.dim() == 4 else parameter.shape[-1]
            parameter.copy_(noise / inputs**0.5)
    return module.eval()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int, seed: int = 0) -> Tensor:
    """Ordinary tokens of the small vocabulary."""
    return torch.randint(FIRST_WORD, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def index_maps(patch_nums: Sequence[int], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(CODES, (batch, side * side), generator=generator) for side in patch_nums)


def splits(length: int) -> st.SearchStrategy[list[int]]:
    """Chunk lengths, at least 1 each, that add up to ``length``."""
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    return cuts.map(lambda inner: [b - a for a, b in zip([0, *sorted(inner)], [*sorted(inner), length], strict=True)])


kinds: tuple[Literal["linear", "dynamic", "llama3"], ...] = ("linear", "dynamic", "llama3")
ropes = st.sampled_from([None, *(RopeScaling(kind=kind, factor=4.0, original_positions=64) for kind in kinds)])
"""Rotary scalings, or none. Dynamic ones stay within the trained positions: beyond, every row depends on the longest,
and a cache holds keys of an earlier base."""

# Strategies give sizes, and the tests build from them: beartype checks a random item of every list it meets, and
# hypothesis wants no random module inside strategies.

heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (3, 1)])
"""Query heads and key heads."""

llm_sizes = st.fixed_dictionaries(
    {
        "seed": seeds,
        "width": st.sampled_from([6, 8]),
        "depth": st.integers(1, 3),
        "num_heads": st.shared(heads, key="heads").map(lambda pair: pair[0]),
        "num_kv_heads": st.shared(heads, key="heads").map(lambda pair: pair[1]),
        "head_dim": st.sampled_from([4, 8]),
        "rope_scaling": ropes,
        "tie_embeddings": st.booleans(),
        "qkv_bias": st.booleans(),
        "out_bias": st.booleans(),
        "mlp_bias": st.booleans(),
    }
)
"""Arguments of :func:`small_llm`."""

var_sizes = st.fixed_dictionaries(
    {
        "seed": seeds,
        "patch_nums": schedules,
        "depth": st.integers(1, 3),
        "num_heads": st.sampled_from([1, 2]),
        "shared_adaln": st.booleans(),
        "cosine_attention": st.booleans(),
        "drop_path": st.sampled_from([0.0, 0.5]),
    }
)
"""Arguments of :func:`small_var`."""


def vqvae_config(patch_nums: Sequence[int], **changes: Any) -> VqvaeConfig:
    sizes: dict[str, Any] = {
        "patch_nums": tuple(patch_nums),
        "vocab_size": CODES,
        "latent_channels": LATENT,
        "channels": 4,
        "channel_multipliers": (1, 2),
        "res_blocks": 1,
        "norm_groups": 2,
    }
    return VqvaeConfig(**(sizes | changes))


def small_llm(seed: int = 0, **changes: Any) -> LlamaDecoder:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "width": 8,
        "depth": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "mlp_width": 16,
        "max_positions": 512,
    }
    return stir(LlamaDecoder(LlamaConfig(**(sizes | changes))), seed)


def small_var(patch_nums: Sequence[int] = (1, 2, 3), seed: int = 0, **changes: Any) -> NextScaleTransformer:
    sizes: dict[str, Any] = {
        "patch_nums": tuple(patch_nums),
        "vocab_size": CODES,
        "latent_channels": LATENT,
        "width": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_classes": 3,
    }
    return stir(NextScaleTransformer(VarConfig(**(sizes | changes))), seed)


def small_vqvae(patch_nums: Sequence[int] = (1, 2, 3), seed: int = 0, **changes: Any) -> MultiScaleVQVAE:
    return stir(MultiScaleVQVAE(vqvae_config(patch_nums, **changes)), seed)


def whole_config(
    patch_nums: Sequence[int] = (1, 2, 3), *, vision: bool = False, choices: Choices = FIXED, **var: Any
) -> VargptConfig:
    """All five parts (without ``vision``, four) at their smallest."""
    return VargptConfig(
        llm=small_llm().config,
        vision=OpenClipConfig(image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_width=8)
        if vision
        else None,
        projector=ProjectorConfig(hidden=6) if vision else None,
        var=small_var(patch_nums, **var).config,
        vqvae=vqvae_config(patch_nums),
        gen_in=ProjectorConfig(hidden=10),
        gen_out=ProjectorConfig(hidden=6),
        tokens=TOKENS,
        choices=choices,
    )


def whole_model(
    patch_nums: Sequence[int] = (1, 2, 3),
    *,
    vision: bool = False,
    choices: Choices = FIXED,
    seed: int = 0,
    **var: Any,
) -> VARGPT:
    return stir(build(whole_config(patch_nums, vision=vision, choices=choices, **var)), seed)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest absolute error, in the units of the tensors themselves (activations are near 1)."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)

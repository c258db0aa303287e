"""Upsampling as one transposed convolution gives the same pictures."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import close, numbers, seeds, small_vqvae, stir
from vargpt.vqvae import fold_upsampling
from vargpt.vqvae.fold import FoldedUpsample
from vargpt.vqvae.layers import Upsample


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), seeds)
@torch.no_grad()
def test_one_transposed_convolution_is_both(channels: int, height: int, width: int, seed: int) -> None:
    """At the borders too."""
    upsample = stir(Upsample(channels), seed)
    x = numbers(2, channels, height, width, seed=seed)
    close(FoldedUpsample(upsample.conv)(x), upsample(x), 1e-5)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_folded_tokenizer_decodes_the_same_pictures(local: bool, dtype: torch.dtype) -> None:
    vqvae = small_vqvae((1, 2, 4), channel_multipliers=(1, 2, 2), local=local).to(dtype)
    folded = fold_upsampling(copy.deepcopy(vqvae))
    assert sum(isinstance(m, FoldedUpsample) for m in folded.modules()) == 2
    assert not any(isinstance(m, Upsample) for m in folded.modules())
    images = torch.rand(3, 3, 16, 16).to(dtype) * 2 - 1
    indices = vqvae.encode(images).indices
    close(folded.decode(indices), vqvae.decode(indices), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(folded.encode(images).indices, indices, strict=True))

"""MultiScaleVQVAE: shapes, agreement of its ways to and from indices, and the quantizer against its definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import CODES, LATENT, close, index_maps, numbers, schedules, seeds, small_vqvae, vqvae_config
from vargpt.interfaces import ImageTokenizer, teacher_forcing_inputs
from vargpt.scales import ScaleSchedule
from vargpt.vqvae import MultiScaleQuantizer, MultiScaleVQVAE, VqvaeConfig
from vargpt.vqvae.quantizer import phi_index

Sizes = dict[str, Any]

sizes = st.fixed_dictionaries(
    {
        "seed": seeds,
        "patch_nums": schedules,
        "channel_multipliers": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "res_blocks": st.integers(1, 2),
        "attention": st.booleans(),
        "num_phi": st.sampled_from([0, 1, 2, 4]),
        "phi_ratio": st.sampled_from([0.0, 0.5, 1.0]),
        "quant_kernel": st.sampled_from([1, 3]),
    }
)


def pictures(vqvae: MultiScaleVQVAE, batch: int = 2, seed: int = 0) -> Tensor:
    return numbers(batch, 3, vqvae.image_size, vqvae.image_size, seed=seed).clamp(-1, 1)


@settings(max_examples=50)
@given(sizes, st.integers(1, 3))
@torch.no_grad()
def test_shapes(sizes: Sizes, batch: int) -> None:
    vqvae = small_vqvae(**sizes)
    schedule = vqvae.schedule
    assert vqvae.image_size == sizes["patch_nums"][-1] * 2 ** (len(sizes["channel_multipliers"]) - 1)
    maps = vqvae.encode(pictures(vqvae, batch))
    assert [tuple(m.shape) for m in maps.indices] == [(batch, n) for n in schedule.lengths]
    assert all(((m >= 0) & (m < CODES)).all() for m in maps.indices)
    assert maps.f_hat.shape == (batch, LATENT, schedule.latent_side, schedule.latent_side)
    assert [tuple(x.shape) for x in teacher_forcing_inputs(vqvae, maps.indices)] == [
        (batch, n, LATENT) for n in schedule.lengths[1:]
    ]
    images = vqvae.decode(maps.indices)
    assert images.shape == (batch, 3, vqvae.image_size, vqvae.image_size)
    assert images.abs().max() <= 1


@dataclass
class Naive:
    """What the definition gives for one latent."""

    indices: list[list[int]]
    f_hats: list[Tensor]
    """After each scale."""
    next_inputs: list[Tensor]


def naive(quantizer: MultiScaleQuantizer, f: Tensor, patch_nums: tuple[int, ...]) -> Naive:
    """One latent [Z, h, w] through multi-scale residual quantization, position by position."""
    codes, full, last = quantizer.codebook.weight, patch_nums[-1], len(patch_nums) - 1
    phis = list(quantizer.phi)
    out, residual, f_hat = Naive([], [], []), f, torch.zeros_like(f)
    for s, side in enumerate(patch_nums):
        small = residual if s == last else F.adaptive_avg_pool2d(residual, side)
        nearest = [int((codes - small[:, y, x]).square().sum(1).argmin()) for y in range(side) for x in range(side)]
        h = codes[nearest].T.reshape(1, -1, side, side)
        if s < last:
            h = F.interpolate(h, size=(full, full), mode="bicubic")
        if phis:
            count = len(phis)
            edge = 1 / 3 / count if count == 4 else 1 / 2 / count
            ticks = np.linspace(edge, 1 - edge, count)
            phi = phis[int(np.abs(ticks - (s / last if last else 0.0)).argmin())]
            h = h * (1 - quantizer.phi_ratio) + phi(h) * quantizer.phi_ratio
        residual, f_hat = residual - h[0], f_hat + h[0]
        out.indices.append(nearest)
        out.f_hats.append(f_hat)
        if s < last:
            pooled = F.adaptive_avg_pool2d(f_hat, patch_nums[s + 1]) if s + 1 < last else f_hat
            out.next_inputs.append(pooled.flatten(1).T)
    return out


@settings(max_examples=50)
@given(sizes)
@torch.no_grad()
def test_quantization_is_its_definition(sizes: Sizes) -> None:
    vqvae = small_vqvae(**sizes)
    f = vqvae.latent(pictures(vqvae))
    indices, f_hat = vqvae.quantizer.encode(f)
    inputs = teacher_forcing_inputs(vqvae, indices)
    for row in range(2):
        expected = naive(vqvae.quantizer, f[row], vqvae.schedule.patch_nums)
        assert [m[row].tolist() for m in indices] == expected.indices
        close(f_hat[row], expected.f_hats[-1], 1e-5)
        for ours, theirs in zip(inputs, expected.next_inputs, strict=True):
            close(ours[row], theirs, 1e-5)


@settings(max_examples=50)
@given(sizes)
@torch.no_grad()
def test_all_ways_to_a_picture_agree(sizes: Sizes) -> None:
    vqvae = small_vqvae(**sizes)
    images = pictures(vqvae)
    maps = vqvae.encode(images)
    close(vqvae.decode(maps.indices), vqvae.decode_latent(maps.f_hat), 1e-5)
    quantized = vqvae.quantizer(vqvae.latent(images))
    assert all(torch.equal(a, b) for a, b in zip(quantized.indices, maps.indices, strict=True))
    close(quantized.f_hat, maps.f_hat, 1e-5)
    close(vqvae(images).images.clamp(-1, 1), vqvae.decode_latent(quantized.f_hat), 1e-5)
    f_hat = None
    for scale, indices in enumerate(maps.indices):  # the pictures seen while drawing
        f_hat = vqvae.add_scale(scale, indices, f_hat)
        close(vqvae.decode(maps.indices[: scale + 1]), vqvae.decode_latent(f_hat), 1e-5)


@given(schedules)
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(patch_nums: tuple[int, ...]) -> None:
    vqvae = small_vqvae(patch_nums)
    images = pictures(vqvae, 3)
    together, alone = vqvae.encode(images), vqvae.encode(images[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together.indices, alone.indices, strict=True))
    close(together.f_hat[1:2], alone.f_hat, 1e-5)
    close(vqvae.decode(together.indices)[1:2], vqvae.decode(alone.indices), 1e-5)


@settings(max_examples=30)
@given(sizes)
def test_training_losses_are_their_definition(sizes: Sizes) -> None:
    """Per scale beta mse(f_hat.detach(), f) + mse(f_hat, f.detach()), averaged over the scales; and the pictures'."""
    vqvae = small_vqvae(**sizes, commitment=0.3)
    images = pictures(vqvae)
    out, f = vqvae(images), vqvae.latent(images)
    running = [naive(vqvae.quantizer, row, vqvae.schedule.patch_nums).f_hats for row in f.detach()]
    f_hats = [torch.stack(rows) for rows in zip(*running, strict=True)]
    vq = torch.stack([F.mse_loss(f_hat, f.detach()) for f_hat in f_hats]).mean()
    commitment = torch.stack([F.mse_loss(f_hat.detach(), f) for f_hat in f_hats]).mean()
    close(out.vq_loss, vq, 1e-5)
    close(out.commitment_loss, commitment, 1e-5)
    close(out.l1, (out.images - images).abs().mean(), 1e-6)
    close(out.l2, (out.images - images).square().mean(), 1e-6)
    close(out.loss, out.l1 + out.l2 + vq + 0.3 * commitment, 1e-5)

    # The vq loss moves codes and phi, the commitment the latent; neither moves the other's.
    quantized, codes = vqvae.quantizer(f), list(vqvae.quantizer.parameters())
    for ours, theirs, moved, still in (
        (quantized.vq_loss, vq, codes, [f]),
        (quantized.commitment_loss, commitment, [f], codes),
    ):
        gradients = (torch.autograd.grad(loss, moved, allow_unused=True, retain_graph=True) for loss in (ours, theirs))
        for gradient, expected in zip(*gradients, strict=True):
            assert (gradient is None) == (expected is None)
            if expected is not None:
                close(gradient, expected, 1e-5 * max(1.0, float(expected.abs().max())))
        reached = torch.autograd.grad(ours, still, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in reached)


@given(schedules, seeds)
def test_the_gradient_goes_straight_through(patch_nums: tuple[int, ...], seed: int) -> None:
    quantizer = small_vqvae(patch_nums).quantizer
    f = numbers(2, LATENT, patch_nums[-1], patch_nums[-1], seed=seed).requires_grad_()
    direction = numbers(*f.shape, seed=1)
    (gradient,) = torch.autograd.grad((quantizer(f).f_hat * direction).sum(), f)
    assert torch.equal(gradient, direction)


@torch.no_grad()
def test_fewer_scales_can_be_kept_per_picture() -> None:
    vqvae = small_vqvae((1, 2, 2, 3))
    images = pictures(vqvae, 3)
    whole, some = vqvae(images), vqvae(images, torch.tensor([1, 4, 2]))
    maps = vqvae.encode(images).indices
    for row, scales in enumerate((1, 4, 2)):
        expected = vqvae.decode([m[row : row + 1] for m in maps[:scales]])
        close(some.images[row : row + 1].clamp(-1, 1), expected, 1e-5)
    assert (some.images[0] - whole.images[0]).abs().max() > 1e-3
    for name in ("vq_loss", "commitment_loss"):
        assert torch.equal(getattr(some, name), getattr(whole, name))


@given(schedules, st.integers(1, 3))
@torch.no_grad()
def test_hits_count_every_token(patch_nums: tuple[int, ...], batch: int) -> None:
    vqvae = small_vqvae(patch_nums)
    out = vqvae(pictures(vqvae, batch))
    assert out.hits_SV.sum(1).tolist() == [batch * n for n in vqvae.schedule.lengths]
    for scale, indices in enumerate(out.indices):
        for code in range(CODES):
            assert out.hits_SV[scale, code] == (indices == code).sum()


@torch.no_grad()
def test_usage_follows_training_only() -> None:
    vqvae = small_vqvae((1, 3))
    first, second = pictures(vqvae, 4), pictures(vqvae, 4, seed=1)
    vqvae(first)
    assert not vqvae.quantizer.usage_SV.any()
    assert vqvae.usage().tolist() == [0, 0]
    vqvae.train()
    hits = vqvae(first).hits_SV
    assert torch.equal(vqvae.quantizer.usage_SV, hits)
    expected = [(row > 0.08 * row.mean()).sum().item() / CODES for row in hits]
    assert vqvae.usage().tolist() == pytest.approx(expected)
    assert 0 < expected[0] < expected[1] <= 1  # one token against nine
    more = vqvae(second).hits_SV
    close(vqvae.quantizer.usage_SV, 0.99 * hits + 0.01 * more, 1e-5)


def test_every_weight_learns() -> None:
    vqvae = small_vqvae((1, 2, 3, 4))
    vqvae(pictures(vqvae, 4)).loss.backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@given(st.integers(1, 8), st.integers(1, 12))
def test_a_scale_uses_the_nearest_phi(num_phi: int, scales: int) -> None:
    schedule = ScaleSchedule([1] * scales)
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    for scale in range(scales):
        position = schedule.position(scale)
        assert phi_index(num_phi, position) == np.argmin(np.abs(ticks - position))


def test_phi_of_the_released_scales() -> None:
    """Ticks 1/12, 13/36, 23/36, 11/12: 2/9 and 7/9 lie in the middle of two, and rounding in float64 decides."""
    assert [phi_index(4, s / 9) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(1, s / 4) for s in range(5)] == [0] * 5
    assert phi_index(2, 0.5) == 0  # a tie of exact numbers: the first


def test_scales_share_phi_and_its_ratio() -> None:
    """Ratio 0 leaves the codes alone, as no phi does."""
    maps = index_maps((1, 2, 3), 2)
    plain = small_vqvae(num_phi=0)
    still = small_vqvae(phi_ratio=0.0)
    still.load_state_dict(plain.state_dict() | {k: v for k, v in still.state_dict().items() if ".phi." in k})
    assert len(still.quantizer.phi) == 4
    close(plain.decode(maps), still.decode(maps), 1e-6)


def test_pictures_of_another_size_are_refused() -> None:
    vqvae = small_vqvae()
    for shape in ((1, 3, 8, 8), (1, 3, 6, 8), (1, 3, 12, 6)):
        with pytest.raises(ValueError, match=f"reads 6 x 6 pictures, not {shape[2]} x {shape[3]}: resize"):
            vqvae.encode(numbers(*shape))


def test_no_scale_is_no_picture() -> None:
    with pytest.raises(ValueError, match="at least one scale"):
        small_vqvae().decode([])


def test_channels_must_split_into_groups() -> None:
    with pytest.raises(ValueError, match="6 x 3 channels do not split into norm_groups = 4"):
        vqvae_config((1, 2), channels=6, channel_multipliers=(2, 3), norm_groups=4)


def test_satisfies_the_protocol() -> None:
    vqvae: ImageTokenizer = small_vqvae()
    assert (vqvae.vocab_size, vqvae.image_size, vqvae.schedule) == (CODES, 6, ScaleSchedule((1, 2, 3)))


def test_released_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        vqvae = MultiScaleVQVAE(VqvaeConfig())
        assert vqvae.latent(torch.empty(1, 3, 256, 256)).shape == (1, 32, 16, 16)
        assert vqvae.decode_latent(torch.empty(1, 32, 16, 16)).shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in vqvae.parameters()) == 108_948_355


def test_a_prefix_of_scales_is_what_is_kept() -> None:
    vqvae = small_vqvae(patch_nums=(1, 2, 4)).train()
    images = pictures(vqvae, batch=5)
    latent = vqvae.latent(images)
    keep = torch.tensor([1, 2, 3, 4, 3])  # of 3 scales: 4 stands for the latent itself
    kept, whole = vqvae.quantizer(latent, keep), vqvae.quantizer(latent)
    f_hat, prefixes = None, []
    for scale, indices in enumerate(whole.indices):
        f_hat = vqvae.add_scale(scale, indices, f_hat)
        prefixes.append(f_hat)
    expected = torch.stack([[*prefixes, latent][count - 1][row] for row, count in enumerate(keep.tolist())])
    close(kept.f_hat, expected)
    assert not torch.equal(kept.f_hat[0], whole.f_hat[0])
    close(kept.vq_loss, whole.vq_loss)
    close(kept.commitment_loss, whole.commitment_loss)
    upstream = numbers(*latent.shape, seed=3)
    (gradient,) = torch.autograd.grad((kept.f_hat * upstream).sum(), latent)
    close(gradient, upstream)  # straight through, whatever is kept


@pytest.mark.parametrize("local", [True, False])
@torch.no_grad()
def test_local_tokenizers_keep_places_apart(local: bool) -> None:
    vqvae = small_vqvae((2, 24), local=local, quant_kernel=1)
    plain, (top, left) = pictures(vqvae, 1), (5, 20)
    changed, cell = plain.clone(), vqvae.config.downsampling
    changed[..., top * cell : (top + 1) * cell, left * cell : (left + 1) * cell] *= -1
    moved = (vqvae.encoder(plain) != vqvae.encoder(changed)).any(1)[0]
    assert moved[top, left]
    assert (moved.sum() == 1) == local  # no latent but the cell's own
    f_hat = numbers(1, LATENT, 24, 24)
    other = f_hat.clone()
    other[..., :2, :2] += 1
    far = [vqvae.decode_latent(f)[..., 36:, 36:] for f in (f_hat, other)]
    assert torch.equal(*far) == local

"""NextScaleTransformer: cached equals teacher-forced, block causality, drop-path, and class-conditional drawing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.drawing import Record
from tests.models import CODES, LATENT, close, index_maps, numbers, seeds, small_var, small_vqvae, stir, var_sizes
from vargpt.interfaces import VisualDecoder, teacher_forcing_inputs
from vargpt.sampling import GREEDY, Guidance, Sampling
from vargpt.scales import ScaleSchedule
from vargpt.var import NextScaleTransformer, VarConfig, draw_classes
from vargpt.var.layers import drop_path

Sizes = dict[str, Any]


def latents(schedule: ScaleSchedule, batch: int, seed: int = 0) -> list[Tensor]:
    """Next-scale inputs of scales 1 .. S-1."""
    return [numbers(batch, n, LATENT, seed=seed + i) for i, n in enumerate(schedule.lengths[1:])]


@settings(max_examples=60)
@given(var_sizes, st.integers(1, 3))
@torch.no_grad()
def test_scale_by_scale_equals_all_at_once(sizes: Sizes, batch: int) -> None:
    var = small_var(**sizes)
    inputs = latents(var.schedule, batch)
    condition = var.condition(torch.arange(batch))
    whole = var(var.embed(inputs, condition), condition)
    cache = var.new_cache(batch)
    for scale, x in enumerate((None, *inputs)):
        logits = var(var.embed_scale(scale, x, condition), condition, cache=cache)
        assert logits.shape == (batch, var.schedule.lengths[scale], CODES)
        close(logits, whole[:, var.schedule.span(scale)])
        end = var.schedule.offsets[scale + 1]
        close(var(var.embed(inputs[:scale], condition), condition), whole[:, :end])


@given(var_sizes, st.data())
@torch.no_grad()
def test_an_input_changes_its_own_and_later_scales_only(sizes: Sizes, data: st.DataObject) -> None:
    var = small_var(**sizes)
    x, condition = numbers(1, var.schedule.total, var.width), var.condition(torch.tensor([0]))
    token = data.draw(st.integers(0, var.schedule.total - 1))
    changed = x.clone()
    changed[:, token] = numbers(var.width, seed=7)
    difference = (var(changed, condition) - var(x, condition)).abs().amax(dim=(0, 2))
    start = var.schedule.offsets[var.schedule.level_ids()[token]]
    close(difference[:start], torch.zeros(start), 1e-6)  # matrix products may differ in the last bit
    assert (difference[start:] > 1e-6).all()  # the whole of its scale, earlier tokens of it too


def naive(var: NextScaleTransformer, x: Tensor, condition: Tensor) -> Tensor:
    """The network from its equations (reference: VAR, section 3.2, and DiT's adaptive norm), one head at a time."""
    c, six = var.config, 6 * var.width
    owners = var.schedule.level_ids()
    visible = owners[:, None] >= owners
    silu = condition * condition.sigmoid()

    def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    for module in var.blocks:
        block: Any = module
        if var.shared_ada is not None:
            vectors = (var.shared_ada(silu) + block.ada_offset.reshape(six)).split(var.width, dim=1)
        else:
            vectors = block.ada(silu).split(var.width, dim=1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors
        h = modulated(x, scale1, shift1)
        w_q, w_k, w_v = block.attn.qkv.weight.chunk(3)
        q, k, v = h @ w_q.T + block.attn.q_bias, h @ w_k.T, h @ w_v.T + block.attn.v_bias
        heads = []
        for i, (q_h, k_h, v_h) in enumerate(zip(*(t.chunk(c.num_heads, dim=2) for t in (q, k, v)), strict=True)):
            if c.cosine_attention:
                temperature = min(float(block.attn.log_scale[i].exp()), 100.0)
                logits = temperature * F.cosine_similarity(q_h[:, :, None], k_h[:, None], dim=-1)
            else:
                logits = 0.25 / (c.width // c.num_heads) ** 0.5 * (q_h @ k_h.mT)
            heads.append(logits.masked_fill(~visible, float("-inf")).softmax(-1) @ v_h)
        x = x + gamma1[:, None] * block.attn.proj(torch.cat(heads, dim=2))
        h = block.mlp.fc1(modulated(x, scale2, shift2))
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + gamma2[:, None] * block.mlp.fc2(h)
    scale, shift = var.head_ada(silu).chunk(2, dim=1)
    return var.head(modulated(x, scale, shift))


@given(var_sizes, st.integers(1, 2))
@torch.no_grad()
def test_the_equations(sizes: Sizes, batch: int) -> None:
    var = small_var(**sizes)
    x, condition = numbers(batch, var.schedule.total, var.width), numbers(batch, var.width, seed=1)
    close(var(x, condition), naive(var, x, condition))


@pytest.mark.parametrize("shared", [False, True])
def test_norms_that_are_not_adaptive_are_the_same_for_every_condition(shared: bool) -> None:
    """And they learn: from what initialisation makes of them, gates open and scales and shifts move."""
    var = NextScaleTransformer(dataclasses.replace(small_var().config, adaptive=False, shared_adaln=shared))
    x, one, other = numbers(2, 14, 8), numbers(2, 8, seed=1), numbers(2, 8, seed=2)
    close(var(x, one), var(x, other), 1e-6)
    stir(var)
    with torch.no_grad():
        close(var(x, one), naive(var, x, torch.zeros_like(one)))
    var(x, one).square().sum().backward()
    linears = [var.shared_ada] if shared else [block.ada for block in var.blocks]
    for linear in [*linears, var.head_ada]:
        assert isinstance(linear, nn.Linear)
        assert linear.bias.grad is not None
        assert (linear.bias.grad.abs() > 0).all()


@torch.no_grad()
def test_the_temperature_of_cosine_attention_is_at_most_100() -> None:
    var, x, condition = small_var(), numbers(1, 14, 8), numbers(1, 8, seed=1)
    results = []
    for log_scale in (0.0, 4.7, 5.0):  # log 100 = 4.605
        for name, parameter in var.named_parameters():
            if name.endswith("log_scale"):
                parameter.fill_(log_scale)
        results.append(var(x, condition))
    close(results[1], results[2], 0)
    assert (results[0] - results[1]).abs().max() > 1e-3


@torch.no_grad()
def test_inputs_are_condition_or_latent_plus_level_and_position() -> None:
    var = small_var((2, 2, 3))
    condition, x = var.condition(torch.tensor([0, 2])), numbers(2, 4, LATENT)
    first = condition[:, None] + var.pos_start + var.level_embed.weight[0] + var.pos_embed[:, :4]
    second = var.word_embed(x) + var.level_embed.weight[1] + var.pos_embed[:, 4:8]
    close(var.embed([x], condition), torch.cat((first, second), dim=1), 1e-6)


@given(var_sizes)
def test_every_weight_learns(sizes: Sizes) -> None:
    var = small_var(**sizes)
    labels = torch.tensor([0, 1, 2, 3])  # the last row stands for "no condition"
    condition = var.condition(labels)
    logits = var(var.embed(latents(var.schedule, 4), condition), condition)
    targets = torch.cat(index_maps(var.schedule.patch_nums, 4), dim=1)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    unused = {"word_embed.weight", "word_embed.bias"} if len(var.schedule) == 1 else set()
    if var.schedule.total == 1:  # attention to one token is the same whatever the query and the key
        unused |= {f"blocks.{i}.attn.{n}" for i in range(var.config.depth) for n in ("q_bias", "log_scale")}
    for name, parameter in var.named_parameters():
        if name not in unused:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_a_new_network_starts_as_the_identity() -> None:
    """Gates start near zero (VAR): logits depend on a token's own input, hardly on the blocks."""
    var = NextScaleTransformer(small_var().config)
    x, condition = numbers(1, 14, 8), numbers(1, 8, seed=1)
    scale, shift = var.head_ada(F.silu(condition))[:, None].chunk(2, dim=-1)
    close(var(x, condition), var.head(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift), 1e-5)


@given(st.integers(1, 4), st.sampled_from([0.1, 0.5, 0.9]))
def test_drop_path_drops_whole_rows_and_keeps_the_mean(width: int, rate: float) -> None:
    torch.manual_seed(0)
    x = numbers(1, 2, width).expand(20_000, -1, -1)
    dropped = drop_path(x, rate, training=True)
    kept = (dropped != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    close(dropped[kept.all(1)], x[kept.all(1)] / (1 - rate), 1e-5)
    # Five deviations of a mean of 20000 rows, each 0 or x / (1 - rate).
    deviation = x[0].abs() * (rate / (1 - rate) / 20_000) ** 0.5
    assert ((dropped.mean(0) - x[0]).abs() < 5 * deviation).all()
    assert drop_path(x, rate, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_drop_path_is_for_training_and_grows_with_depth() -> None:
    var = small_var(depth=3, drop_path=0.5)
    assert [block.drop_rate for block in var.blocks] == [0.0, 0.25, 0.5]
    x, condition = numbers(8, 14, 8), numbers(8, 8, seed=1)
    assert torch.equal(var(x, condition), var(x, condition))
    var.train()
    assert not torch.equal(var(x, condition), var(x, condition))
    still = small_var(depth=3, drop_path=0.0).train()
    assert torch.equal(still(x, condition), still(x, condition))


@settings(max_examples=40)
@given(var_sizes, st.lists(st.integers(0, 2), min_size=1, max_size=3), seeds, st.sampled_from([0.0, 2.0]))
def test_a_picture_does_not_depend_on_its_batch(sizes: Sizes, labels: list[int], seed: int, cfg: float) -> None:
    var = small_var(**sizes)
    vqvae = small_vqvae(var.schedule.patch_nums)
    options: dict[str, Any] = {"guidance": Guidance(scale=cfg), "sampling": Sampling(top_k=6, top_p=0.9)}
    together, record = draw_classes(var, vqvae, labels, seed=seed, **options), Record()
    again = draw_classes(var, vqvae, labels, seed=seed, on_scale=record, **options)
    for first, second in zip(together.indices, again.indices, strict=True):
        assert torch.equal(first, second)
    for i, label in enumerate(labels):
        single = Record()
        alone = draw_classes(var, vqvae, [label], seed=seed + i, on_scale=single, **options)
        close(record.logits[i : i + 1], single.logits)
        for scale, indices in enumerate(alone.indices):
            assert torch.equal(indices[0], together.indices[scale][i])
        close(together.f_hat[i], alone.f_hat[0])


@settings(max_examples=40)
@given(var_sizes, st.lists(st.integers(0, 2), min_size=1, max_size=3), st.sampled_from(["linear", "constant"]))
@torch.no_grad()
def test_guidance_combines_the_class_with_no_condition(sizes: Sizes, labels: list[int], ramp: Any) -> None:
    """The recorded logits of drawing, recomputed from the drawn picture by teacher forcing."""
    var = small_var(**sizes)
    vqvae = small_vqvae(var.schedule.patch_nums)
    for cfg in (0.0, 1.5):
        record, guidance = Record(), Guidance(scale=cfg, ramp=ramp)
        maps = draw_classes(var, vqvae, labels, guidance=guidance, sampling=Sampling(), on_scale=record)
        inputs = teacher_forcing_inputs(vqvae, maps.indices)
        with_class, without = (
            var(var.embed(inputs, condition), condition)
            for condition in (var.condition(torch.tensor(labels)), var.condition(torch.full((len(labels),), 3)))
        )
        t = torch.tensor([guidance.weight(var.schedule, s) for s in var.schedule.level_ids().tolist()])[:, None]
        close(record.logits, (1 + t) * with_class - t * without)
        if cfg == 0:
            close(record.logits, with_class)


def test_greedy_drawing_needs_no_luck() -> None:
    var, vqvae = small_var(), small_vqvae()
    first, second = (draw_classes(var, vqvae, [1], seed=seed, sampling=GREEDY) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.indices, second.indices, strict=True))
    drawn = [draw_classes(var, vqvae, [1], seed=seed, sampling=Sampling()) for seed in (0, 1)]
    assert not torch.equal(drawn[0].indices[-1], drawn[1].indices[-1])


@pytest.mark.parametrize("labels", [[3], [-1], [0, 4], []])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"3 classes|nothing to draw"):
        draw_classes(small_var(), small_vqvae(), labels)


def test_parts_of_different_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draws scales \(1, 2, 3\), the image tokenizer reads \(1, 3\)"):
        draw_classes(small_var(), small_vqvae((1, 3)), [0])


def test_inputs_that_end_inside_a_scale_are_refused() -> None:
    var = small_var()
    for length in (2, 13, 15):
        with pytest.raises(ValueError, match=rf"{length} inputs end inside a scale; whole scales end at \(1, 5, 14\)"):
            var(numbers(1, length, 8), numbers(1, 8))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": 9}, "width .9. must be a multiple"),
        ({"drop_path": 1.0}, "drop_path must lie"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"patch_nums": (2, 1)}, "must not decrease"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        small_var(**changes)


def test_satisfies_the_protocol() -> None:
    var: VisualDecoder = small_var()
    assert (var.width, var.image_class, var.null_class, var.schedule) == (8, 2, 3, ScaleSchedule((1, 2, 3)))


def test_published_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        var = NextScaleTransformer(VarConfig(num_classes=32003, depth=2))
        x = torch.empty(1, 680, 1920)
        assert var(x, var.condition(torch.zeros(1, dtype=torch.long))).shape == (1, 680, 4096)

"""Which optimizer steps what, and bfloat16."""

from __future__ import annotations

import pytest
import torch

from experiments.optimization import low_precision, optimizers
from vargpt.build import build, preset

CPU = torch.device("cpu")


def test_muon_takes_the_matrices_between_features_and_adamw_the_rest() -> None:
    model = build(preset("nano"))
    found = optimizers(model, muon=True, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    stepped = {
        kind: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in found.items()
    }
    assert stepped["muon"].isdisjoint(stepped["adamw"])
    assert stepped["muon"] | stepped["adamw"] == set(names.values())
    for name in (
        "llm.blocks.0.attn.q.weight",
        "llm.blocks.3.mlp.down.weight",
        "vision.visual.transformer.resblocks.0.attn.in_proj_weight",
        "var.blocks.0.mlp.fc1.weight",
        "gen_in.layers.0.weight",
    ):
        assert name in stepped["muon"], name
    for name in (
        "llm.token_embed.weight",
        "llm.head.weight",
        "llm.blocks.0.attn_norm.weight",
        "vision.visual.positional_embedding",
        "vision.visual.conv1.weight",
        "var.blocks.0.ada.weight",
        "var.class_embed.weight",
        "var.head.weight",
    ):
        assert name in stepped["adamw"], name
    decays = {group["weight_decay"]: group["params"] for group in found["adamw"].param_groups}
    assert all(p.ndim > 1 for p in decays[0.1])
    assert all(p.ndim <= 1 for p in decays[0.0])


def test_without_muon_adamw_takes_all_that_trains() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    (optimizer,) = optimizers(model, muon=False, weight_decay=0.0).values()
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model[1].parameters())


def test_a_torch_without_muon_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="has no Muon: take"):
        optimizers(build(preset("nano")), muon=True, weight_decay=0.0)


def test_low_precision_attends_nearly_as_whole_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 32, generator=generator, requires_grad=True) for _ in range(3))

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, k, v, is_causal=True)

    whole = torch.autograd.grad(attend(q).square().sum(), q)[0]
    with low_precision(CPU):
        out = attend(q)
        assert (q @ k.mT).dtype == torch.bfloat16
    half = torch.autograd.grad(out.float().square().sum(), q)[0]
    assert 0 < (half - whole).norm() / whole.norm() < 0.03
    assert (q @ k.mT).dtype == torch.float32  # it ends with the block

"""The released model, by names and shapes: every name is mapped, and the ``vargpt-7b`` preset is what they describe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vargpt.build import build, preset
from vargpt.config import VargptConfig
from vargpt.convert import published_config
from vargpt.convert.check import check_published, expected_tensors, published_tensors
from vargpt.convert.published import to_published
from vargpt.convert.rules import ToOurs
from vargpt.convert.tables import VARGPT_HF
from vargpt.tensorfiles import TensorSpec

# What vargpt/convert drops on purpose, as far as the released file holds it, with what it is rebuilt from.
IGNORED = re.compile(r"vargpt_gen\.(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)")
# Tensors of the released file that no feature or logit depends on: not in the model, but kept by conversion.
UNBUILT = re.compile(
    r"vision_tower\.vision_model\.(encoder\.layers\.23|post_layernorm)\..+|image_gen_projector(_out)?\.ln_q\..+"
)

# By published prefix: elements in the file, those of parameters among them (no buffers), and reference.md's number of
# parameters in millions.
PARTS = {
    "vision_tower.": (303_507_456, 303_507_456, 303.5),
    "multi_modal_projector.": (20_979_712, 20_979_712, 21.0),
    "language_model.": (6_738_939_904, 6_738_939_904, 6738.9),
    "vae_local.": (108_989_315, 108_948_355, 108.9),
    "vargpt_gen.": (2_070_066_796, 2_069_546_116, 2069.5),
    "image_gen_projector.": (11_560_576, 11_560_576, 11.6),
    "image_gen_projector_out.": (24_655_744, 24_655_744, 24.7),
}


class MetaSource:
    """Names and shapes without data, but for the scales, which are read."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs

    def read(self, name: str) -> Tensor:
        if name == "vargpt_gen.lvl_1L":
            sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
            return torch.cat([torch.full((side * side,), scale) for scale, side in enumerate(sides)])[None]
        return self.specs[name].meta()


@pytest.fixture(scope="module")
def manifest(golden_dir: Path) -> dict[str, TensorSpec]:
    tensors = json.loads((golden_dir / "vargpt_full_manifest.json").read_text())["tensors"]
    types = {"vargpt_gen.lvl_1L": torch.int64}
    return {name: TensorSpec(tuple(shape), types.get(name, torch.float32)) for name, shape in tensors.items()}


@pytest.fixture(scope="module")
def released() -> VargptConfig:
    return preset("vargpt-7b")


@pytest.fixture(scope="module")
def described(manifest: Mapping[str, TensorSpec], released: VargptConfig) -> dict[str, Any]:
    """The ``config.json`` of the released model."""
    return published_config.to_vargpt_json(released)


def test_every_name_is_mapped_or_ignored_on_purpose(manifest: Mapping[str, TensorSpec]) -> None:
    assert len(manifest) == 1424
    tensors = ToOurs(MetaSource(manifest), VARGPT_HF)
    assert tensors.unknown == []
    mapped = {name for ours in tensors.names for name in tensors.sources(ours)}
    assert {name for name in manifest if name not in mapped} == {name for name in manifest if IGNORED.fullmatch(name)}


def test_the_configuration_told_from_the_file_is_the_preset(
    manifest: Mapping[str, TensorSpec], released: VargptConfig, described: dict[str, Any]
) -> None:
    assert published_config.vargpt(described, MetaSource(manifest), None) == released


def test_every_shape_is_the_presets(manifest: Mapping[str, TensorSpec], released: VargptConfig) -> None:
    tensors = ToOurs(MetaSource(manifest), VARGPT_HF)
    check_published(released, tensors)
    expected = expected_tensors(released)
    assert {name: tensors.specs[name].shape for name in expected} == {n: s.shape for n, s in expected.items()}
    unbuilt = {name for ours in tensors.specs if ours not in expected for name in tensors.sources(ours)}
    assert unbuilt == {name for name in manifest if UNBUILT.fullmatch(name)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("vargpt_gen.blocks.29.ffn.fc2.weight", r"missing tensors: 1 \(vargpt_gen\.blocks\.29\.ffn\.fc2\.weight\)"),
        (
            "vision_tower.vision_model.encoder.layers.23.mlp.fc1.bias",
            r"missing tensors: 1 .*layers\.23\.mlp\.fc1\.bias",
        ),
        (
            "language_model.model.layers.31.self_attn.k_proj.weight",
            r"missing tensors: 1 .*layers\.31\.self_attn\.k_proj",
        ),
    ],
)
def test_nothing_may_be_missing(
    change: str, complaint: str, manifest: Mapping[str, TensorSpec], released: VargptConfig
) -> None:
    less = {name: spec for name, spec in manifest.items() if name != change}
    with pytest.raises(ValueError, match=complaint):
        check_published(released, ToOurs(MetaSource(less), VARGPT_HF))


def test_every_element_is_accounted_for(manifest: Mapping[str, TensorSpec]) -> None:
    buffers = re.compile(rf"{IGNORED.pattern}|vae_local\.quantize\.ema_vocab_hit_SV")
    for part, (elements, parameters, millions) in PARTS.items():
        sizes = {name: spec.numel for name, spec in manifest.items() if name.startswith(part)}
        assert sum(sizes.values()) == elements, part
        assert sum(size for name, size in sizes.items() if not buffers.fullmatch(name)) == parameters, part
        assert round(parameters / 1e6, 1) == millions, part
    total = sum(spec.numel for spec in manifest.values())
    assert total == sum(elements for elements, _, _ in PARTS.values()) == 9_278_699_503
    assert round(total / 1e9, 3) == 9.279


def test_the_model_holds_all_but_the_unbuilt(manifest: Mapping[str, TensorSpec], released: VargptConfig) -> None:
    with torch.device("meta"):
        held = sum(parameter.numel() for parameter in build(released).parameters())
    left = sum(spec.numel for name, spec in manifest.items() if UNBUILT.fullmatch(name))
    assert held == sum(parameters for _, parameters, _ in PARTS.values()) - left


def test_the_way_back_gives_the_same_names_and_shapes(
    manifest: Mapping[str, TensorSpec], released: VargptConfig, described: dict[str, Any]
) -> None:
    for ours in (expected_tensors(released), published_tensors(released)):
        theirs, config = to_published(released, MetaSource(ours))
        assert {name: spec.shape for name, spec in theirs.specs.items()} == {n: s.shape for n, s in manifest.items()}
        assert config == described


def test_the_buffers_of_the_way_back_are_the_published_ones(released: VargptConfig) -> None:
    theirs, _ = to_published(released, MetaSource(expected_tensors(released)))
    levels, bias = theirs.read("vargpt_gen.lvl_1L"), theirs.read("vargpt_gen.attn_bias_for_masking")
    assert levels.shape == (1, 680)
    assert levels[0].bincount().sqrt().tolist() == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    assert torch.equal(bias[0, 0] == 0, levels[0][:, None] >= levels[0])
    assert torch.equal(bias[0, 0] == -torch.inf, levels[0][:, None] < levels[0])

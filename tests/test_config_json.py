"""Configurations as JSON and back, and what is said of mistakes in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.checkpoints import published_config
from vargpt.build import preset
from vargpt.choices import PUBLISHED
from vargpt.config import PRESETS, VargptConfig
from vargpt.config_json import describe, from_json, read_config, to_json
from vargpt.llm import LlamaConfig, RopeScaling
from vargpt.var import VarConfig
from vargpt.vision import OpenClipConfig, TimmConfig
from vargpt.vqvae import VqvaeConfig

CONFIGS = {
    **PRESETS,
    "published": published_config(),
    "parts": VargptConfig(var=VarConfig(), vqvae=VqvaeConfig(), choices=PUBLISHED),
    "timm": VargptConfig(vision=TimmConfig(model_name="vit_base_patch16_siglip_224", keep_prefix=True)),
    "open_clip options": VargptConfig(
        vision=OpenClipConfig(
            image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_width=8, options={"ls_init_value": 0.1}
        )
    ),
    "rope": VargptConfig(
        llm=LlamaConfig(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_positions=8192)),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(describe(CONFIGS[name])))
    assert read_config(tmp_path) == CONFIGS[name]


def test_fields_left_out_take_their_defaults() -> None:
    assert from_json(VargptConfig, {"llm": {"width": 2048}}) == VargptConfig(llm=LlamaConfig(width=2048))


def test_every_field_is_written() -> None:
    written = to_json(preset("nano"))
    for name, part in (("llm", LlamaConfig), ("var", VarConfig), ("vqvae", VqvaeConfig)):
        assert written[name].keys() == {field.name for field in dataclasses.fields(part)}
    assert written["vision"].keys() == {"kind", *(field.name for field in dataclasses.fields(OpenClipConfig))}


def setting(*place: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *outer, last = place
        for name in outer:
            config = config[name]
        config[last] = value

    return change


def dropping(*place: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *outer, last = place
        for name in outer:
            config = config[name]
        del config[last]

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (setting("llm", value=7), r"config\.llm must be an object, not 7"),
        (setting("llm", "wdith", value=7), r"config\.llm has no field 'wdith'; its fields are vocab_size, width, "),
        (setting("llm", "kind", value="llama"), r"config\.llm has no field 'kind'"),
        (setting("llm", "width", value="wide"), r"config\.llm\.width must be int, not 'wide'"),
        (setting("llm", "width", value=128.0), r"config\.llm\.width must be int, not 128\.0"),
        (setting("llm", "width", value=True), r"config\.llm\.width must be int, not True"),
        (setting("llm", "width", value=None), r"config\.llm\.width must not be null"),
        (setting("llm", "width", value=0), r"width must be at least 1, not 0"),
        (setting("llm", "tie_embeddings", value=0), r"config\.llm\.tie_embeddings must be bool, not 0"),
        (setting("llm", "rope_scaling", value={"kind": "linear", "factor": 2.0}), r"original_positions"),
        (
            setting("llm", "rope_scaling", value={"kind": "yarn", "factor": 2.0, "original_positions": 8}),
            r"config\.llm\.rope_scaling\.kind must be one of 'linear', 'dynamic', 'llama3', not 'yarn'",
        ),
        (
            setting("vision", "kind", value="siglip"),
            r"config\.vision\.kind must be one of open_clip, timm, not 'siglip'",
        ),
        (setting("vision", "kind", value=["timm"]), r"config\.vision\.kind must be one of"),
        (dropping("vision", "kind"), r"config\.vision\.kind must be one of open_clip, timm, not None"),
        (dropping("vision", "patch_size"), r"config\.vision: .*patch_size"),
        (setting("vision", "options", value=3), r"config\.vision\.options must be an object, not 3"),
        (setting("var", "patch_nums", value=3), r"config\.var\.patch_nums must be a list, not 3"),
        (setting("var", "patch_nums", value=[1, "2"]), r"config\.var\.patch_nums\[1\] must be int, not '2'"),
        (setting("var", "patch_nums", value=[1, 2]), r"var\.patch_nums is \(1, 2\) but vqvae\.patch_nums is"),
        (setting("var", "num_heads", value=0), r"num_heads must be at least 1, not 0"),
        (setting("var", "mlp_ratio", value=-1), r"mlp_ratio must be above 0, not -1"),
        (setting("vqvae", "channel_multipliers", value=[]), r"channel_multipliers must be one or more"),
        (setting("gen_in", "depth", value=0), r"at least one layer"),
        (setting("gen_in", value=None), r"gen_in and gen_out come together"),
        (
            setting("choices", "null", value="nothing"),
            r"config\.choices\.null must be one of 'noise', 'class', 'prompt'",
        ),
        (dropping("choices", "null"), r"config\.choices: .*null"),
        (setting("tokens", "gen_pad", value=10**6), r"tokens\.gen_pad = 1000000 lies outside the vocabulary of 640"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_mistake_is_named_with_its_place(change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(describe(preset("nano"))))
    change(content["config"])
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ['{"format": "vargpt"}', '{"format": "vargpt", "config": []}'])
def test_a_file_without_a_configuration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: config must be an object"):
        read_config(tmp_path)

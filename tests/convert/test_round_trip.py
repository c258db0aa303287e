"""Published checkpoints as ours and back: every bit stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vargpt
from tests.convert.checkpoints import (
    contents,
    published_config,
    published_state,
    random_model,
    weights,
    write,
    write_published,
)
from tests.models import schedules, seeds
from vargpt.build import build
from vargpt.choices import FIXED
from vargpt.config import ImportedConfig, ProjectorConfig, VargptConfig
from vargpt.config_json import read_config
from vargpt.convert import convert, open_published, published_layout
from vargpt.convert.published import to_published
from vargpt.llm import RopeScaling
from vargpt.tensorfiles import MemorySource
from vargpt.vision import OpenClipConfig, TimmConfig


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module", params=["shards", "one file"])
def there_and_back(
    request: pytest.FixtureRequest, vargpt_tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """The recorded checkpoint, ours and the published one made of ours; in shards, or in one file each."""
    folder, source, size = tmp_path_factory.mktemp("round_trip"), vargpt_tiny_dir, 5_000_000
    if request.param == "one file":
        config = json.loads((source / "config.json").read_text())
        source, size = write(folder / "source", weights(source), config), 10**9
    convert(source, folder / "ours", max_shard_bytes=size)
    convert(folder / "ours", folder / "back", max_shard_bytes=size)
    for made in (folder / "ours", folder / "back"):
        assert (made / "model.safetensors.index.json").exists() == (request.param == "shards")
    return source, folder / "ours", folder / "back"


def test_every_tensor_comes_back_bit_by_bit(there_and_back: tuple[Path, Path, Path]) -> None:
    source, _, back = there_and_back
    assert_same(contents(back), weights(source))
    names = contents(back).keys()
    assert {
        "vargpt_gen.lvl_1L",
        "vargpt_gen.attn_bias_for_masking",
        "vargpt_gen.blocks.2.attn.zero_k_bias",
        "vae_local.quantize.ema_vocab_hit_SV",
        "image_gen_projector.ln_q.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "vision_tower.vision_model.post_layernorm.bias",
    } <= names


def test_the_configuration_comes_back_in_meaning(there_and_back: tuple[Path, Path, Path]) -> None:
    source, ours, back = there_and_back
    assert published_layout(ours) == "ours"
    assert published_layout(back) == "vargpt"
    assert open_published(source).config == read_config(ours) == open_published(back).config


def test_ours_holds_no_buffer_that_can_be_made_again(there_and_back: tuple[Path, Path, Path]) -> None:
    _, ours, _ = there_and_back
    built = build(read_config(ours)).state_dict()
    kept = {name for name in contents(ours) if name not in built}
    assert all(name.startswith(("vision.visual.", "gen_in.norm.", "gen_out.norm.")) for name in kept)
    assert kept | set(built) == contents(ours).keys()


def test_no_temporary_file_stays(there_and_back: tuple[Path, Path, Path]) -> None:
    for directory in there_and_back[1:]:
        assert [file.name for file in directory.iterdir() if file.name.startswith(".")] == []


def test_all_three_load_as_the_same_model(there_and_back: tuple[Path, Path, Path]) -> None:
    first, *others = [vargpt.load(directory) for directory in there_and_back]
    for other in others:
        assert other.config == first.config
        assert_same(other.state_dict(), first.state_dict())


def test_a_var_pair_keeps_its_weights(var_tiny_dir: Path, tmp_path: Path) -> None:
    convert(var_tiny_dir, tmp_path / "ours")
    model = vargpt.load(tmp_path / "ours")
    published = open_published(var_tiny_dir)
    assert model.config == published.config
    assert model.config.var.num_classes == 10
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, published.source.read(name)), name


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = write_published(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "added_tokens.json").write_text("{}")
    (source / "notes.txt").write_text("not ours to copy")
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for made in ("ours", "back"):
        names = {file.name for file in (tmp_path / made).iterdir()}
        assert names == {"config.json", "model.safetensors", "tokenizer.model", "added_tokens.json"}


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``published_config``; it is not called here, since checks of its types draw random numbers."""
    heads, cosine = draw(st.sampled_from([1, 2])), draw(st.booleans())
    qkv_bias = draw(st.booleans())
    kinds: list[Literal["linear", "dynamic", "llama3"]] = ["linear", "dynamic", "llama3"]
    rope = draw(st.none() | st.sampled_from(kinds))
    latent, codes = draw(st.sampled_from([2, 4])), draw(st.integers(3, 20))
    return {
        "patch_nums": draw(schedules),
        "llm": {
            "depth": draw(st.integers(1, 2)),
            "num_kv_heads": draw(st.sampled_from([1, 2, 4])),
            "head_dim": draw(st.sampled_from([2, 4])),
            "tie_embeddings": draw(st.booleans()),
            "qkv_bias": qkv_bias,
            "out_bias": qkv_bias and draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
            "rope_theta": draw(st.sampled_from([1e4, 5e5])),
            "rope_scaling": rope and RopeScaling(kind=rope, factor=2.0, original_positions=256),
        },
        "vision": {
            "depth": draw(st.integers(1, 3)),
            "feature_layer": draw(st.sampled_from([-2, -1])),
            "keep_cls": draw(st.booleans()),
        },
        "var": {
            "depth": draw(st.integers(1, 2)),
            "width": 64 * heads,
            "num_heads": heads,
            "cosine_attention": cosine,
            "shared_adaln": draw(st.booleans()),
            "latent_channels": latent,
            "vocab_size": codes,
        },
        "vqvae": {
            "latent_channels": latent,
            "vocab_size": codes,
            "channel_multipliers": draw(st.sampled_from([(1,), (1, 2), (2, 1)])),
            "num_phi": draw(st.integers(0, 4)),
            "attention": draw(st.booleans()),
        },
    }


@settings(max_examples=6, phases=[Phase.generate])  # shrinking would take minutes
@given(changes=changes(), seed=seeds, shards=st.sampled_from([1, 3]))
def test_any_model_of_ours_comes_back(
    changes: dict[str, Any], seed: int, shards: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config, folder = published_config(**changes), tmp_path_factory.mktemp("any")
    model = random_model(config, seed)
    opened = open_published(write(folder / "published", *published_state(model), shards=shards))
    assert comparable(opened.config) == comparable(config)
    state = {name: opened.source.read(name) for name in model.state_dict()}
    assert_same(state, model.state_dict())
    convert(folder / "published", folder / "ours")
    assert_same(vargpt.load(folder / "ours").state_dict(), model.state_dict())
    convert(folder / "ours", folder / "back")
    assert_same(contents(folder / "back"), contents(folder / "published"))
    shutil.rmtree(folder)


def comparable(config: VargptConfig) -> VargptConfig:
    """Without the drop rate, which no published checkpoint holds."""
    assert config.var is not None
    return dataclasses.replace(config, var=dataclasses.replace(config.var, drop_path=0.0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vqvae": {"norm_groups": 16}}, "cannot hold vqvae.norm_groups = 16: it would be 32"),
        ({"vqvae": {"phi_ratio": 0.25}}, "cannot hold vqvae.phi_ratio = 0.25"),
        ({"var": {"cosine_attention": False}}, "cannot hold var.num_heads = 3"),
        ({"var": {"norm_eps": 1e-5}}, "cannot hold var.norm_eps = 1e-05"),
        ({"var": {"num_classes": 3}}, "cannot hold var.num_classes = 3"),
        ({"llm": {"out_bias": True}}, "cannot hold llm.out_bias = True"),
        ({"vision": {"options": {"no_ln_pre": True}}}, "vision.options"),
        ({"vision": {"mean": (0.5, 0.5, 0.5)}}, "cannot hold vision.mean"),
    ],
)
def test_what_the_published_code_does_not_have_is_refused(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    vargpt.save(build(published_config(**changes)), tmp_path / "ours")
    with pytest.raises(ValueError, match=complaint):
        convert(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (dataclasses.replace(published_config(), choices=FIXED), "skips the generation projectors' norm"),
        (VargptConfig(vision=published_config().vision), "holds whole models only"),
        (
            dataclasses.replace(published_config(), vision=TimmConfig(model_name="test_vit")),
            "holds CLIP vision encoders only",
        ),
        (
            dataclasses.replace(published_config(), gen_in=ProjectorConfig(hidden=10, depth=3)),
            "cannot hold gen_in.depth = 3",
        ),
        (
            dataclasses.replace(published_config(), gen_out=ImportedConfig(kind="torch.nn:Linear")),
            r"no place for: 2 \(gen_out.bias, gen_out.weight\)",
        ),
        (published_config(var={"adaptive": False}), "cannot hold var.adaptive = False"),
    ],
)
def test_models_without_a_published_form_are_refused(config: VargptConfig, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        to_published(config, MemorySource(build(config).state_dict()))


def test_a_saved_model_goes_back_whole(tmp_path: Path) -> None:
    """Saving keeps what the model is built of; the published code also wants what it never uses."""
    config = published_config()
    model = random_model(config)
    vargpt.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    tensors = contents(tmp_path / "theirs")
    assert isinstance(config.vision, OpenClipConfig)
    last = f"vision_tower.vision_model.encoder.layers.{config.vision.depth - 1}."
    filled = {name: tensor for name, tensor in tensors.items() if name.startswith(last) or ".ln_q." in name}
    assert len(filled) == 16 + 4
    for name, tensor in filled.items():
        assert (tensor == float(("norm" in name and "weight" in name) or name.endswith("ln_q.weight"))).all(), name
    assert_same(vargpt.load(tmp_path / "theirs").state_dict(), model.state_dict())


def test_a_destination_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = write_published(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"full exists and is not an empty directory"):
        convert(source, tmp_path / "full")
    with pytest.raises(ValueError, match=r"thesis\.txt exists and is not an empty directory"):
        convert(source, tmp_path / "full" / "thesis.txt")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        convert(source, source)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("error", [ValueError("the disk gave out"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = write_published(tmp_path / "source")
    read = vargpt.tensorfiles.SafetensorsSource.read

    def fail(self: Any, name: str) -> Tensor:
        if name == "vargpt_gen.head.weight":
            raise error
        return read(self, name)

    monkeypatch.setattr(vargpt.tensorfiles.SafetensorsSource, "read", fail)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "ours", max_shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == [source]
    monkeypatch.undo()
    convert(source, tmp_path / "ours")  # nothing is in the way of another try

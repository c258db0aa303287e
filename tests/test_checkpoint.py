"""Saving and loading models, by directory, by name and from the hub."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import vargpt
from tests.convert.checkpoints import contents, published_config, published_state, random_model, write
from tests.models import stir
from vargpt import checkpoint
from vargpt.build import build, preset
from vargpt.checkpoint import find, inventory, read
from vargpt.choices import PUBLISHED
from vargpt.model import VARGPT
from vargpt.text import ByteTokenizer


@pytest.fixture(scope="module")
def nano() -> VARGPT:
    return stir(build(preset("nano")))


@pytest.fixture(scope="module")
def saved(nano: VARGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    vargpt.save(nano, directory)
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint whose generation projectors have norms worth applying."""
    tensors, config = published_state(random_model(published_config()))
    for name in tensors:
        if ".ln_q." in name:
            tensors[name] = torch.linspace(0.5, 2, tensors[name].numel())
    return write(tmp_path_factory.mktemp("published"), tensors, config)


def test_every_bit_comes_back(nano: VARGPT, saved: Path) -> None:
    loaded = vargpt.load(saved)
    assert loaded.config == nano.config
    assert (loaded.tokens, loaded.choices) == (nano.tokens, nano.choices)
    assert loaded.state_dict().keys() == nano.state_dict().keys()
    for name, tensor in nano.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_loaded_model_is_ready(saved: Path) -> None:
    loaded = vargpt.load(str(saved))
    assert not loaded.training
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert not any(buffer.is_meta for buffer in loaded.buffers())


def test_saving_again_takes_the_place_of_the_first(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    loaded = vargpt.load(tmp_path / "copy")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 1
    vargpt.save(loaded, tmp_path / "copy")  # from which it was loaded
    again = vargpt.load(tmp_path / "copy")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_come_in_the_type_asked_for(dtype: torch.dtype, nano: VARGPT, saved: Path) -> None:
    loaded = vargpt.load(saved, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, nano.state_dict()[name].to(dtype)), name


def test_half_precision_comes_back_as_float32(nano: VARGPT, tmp_path: Path) -> None:
    half = build(preset("nano")).bfloat16()
    vargpt.save(half, tmp_path)
    assert {tensor.dtype for tensor in contents(tmp_path).values()} == {torch.bfloat16}
    loaded = vargpt.load(tmp_path)
    for name, tensor in half.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name


def test_tokenizer_files_go_along(nano: VARGPT, tmp_path: Path) -> None:
    tiny = checkpoint.ASSETS / "tiny"
    vargpt.save(nano, tmp_path, tokenizer_from=tiny)
    for file in ("tokenizer.model", "added_tokens.json"):
        assert (tmp_path / file).read_bytes() == (tiny / file).read_bytes()
    loaded = vargpt.load(tmp_path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a red circle")) == "a red circle"


def test_a_vocabulary_that_cannot_be_read_gives_no_tokenizer(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert vargpt.load(tmp_path).tokenizer is None


def test_a_vocabulary_without_room_for_bytes_gives_no_tokenizer(published: Path) -> None:
    assert vargpt.load(published).tokenizer is None


# Choices


def test_choices_are_the_checkpoints_own_unless_asked(nano: VARGPT, saved: Path, published: Path) -> None:
    assert vargpt.load(saved).choices == nano.choices != PUBLISHED
    assert vargpt.load(published).choices == PUBLISHED
    own = dataclasses.replace(PUBLISHED, null="class")
    loaded = vargpt.load(published, choices=own)
    assert loaded.choices == loaded.config.choices == own


def test_the_fixed_choices_apply_the_norm_that_the_published_code_skips(published: Path) -> None:
    x = torch.randn(5, 24)
    skipping, applying = vargpt.load(published), vargpt.load(published, choices="fixed")
    assert applying.gen_in is not None
    assert skipping.gen_in is not None
    scale = shift = torch.linspace(0.5, 2, 24)
    norm = torch.nn.functional.layer_norm(x, (24,), scale, shift)
    with torch.no_grad():
        torch.testing.assert_close(applying.gen_in(x), skipping.gen_in(norm))
        assert (applying.gen_in(x) - skipping.gen_in(x)).abs().max() > 0.01
    assert "gen_in.norm.weight" in applying.state_dict()
    assert "gen_in.norm.weight" not in skipping.state_dict()


def test_choices_that_need_weights_which_are_not_there_are_refused(published: Path, tmp_path: Path) -> None:
    vargpt.save(vargpt.load(published), tmp_path)
    with pytest.raises(ValueError, match=r": missing tensors: 4 \(gen_in\.norm\.bias, gen_in\.norm\.weight, gen_out"):
        vargpt.load(tmp_path, choices="fixed")


def test_unknown_choices_are_named(saved: Path) -> None:
    with pytest.raises(ValueError, match="unknown choices 'best': give 'published' or 'fixed', or a Choices"):
        vargpt.load(saved, choices="best")


# Names


def test_an_unknown_name_brings_a_hint() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'tinny': did you mean 'tiny'\? give 'tiny', a checkpoint's"):
        vargpt.load("tinny")
    with pytest.raises(ValueError, match="unknown model 'gpt5': give 'tiny'"):
        vargpt.load("gpt5")
    with pytest.raises(ValueError, match=r"unknown model '.*nowhere'"):
        vargpt.load(Path("/nowhere"))


def test_a_directory_comes_before_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find("owner/name") == Path("owner/name")


# The hub


def test_a_hub_id_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"^'VARGPT-family/VARGPT_LLaVA-v1' is neither a directory here nor "
    ) as caught:
        vargpt.load("VARGPT-family/VARGPT_LLaVA-v1")
    assert "\n" not in str(caught.value)


def test_a_hub_id_fetches_weights_and_texts_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert vargpt.load("owner/name", revision="v1.0").config == preset("nano")
    assert asked == {
        "repo_id": "owner/name",
        "revision": "v1.0",
        "allow_patterns": ["*.safetensors", "*.json", "tokenizer.model"],
    }
    vargpt.load("owner/name")
    assert asked["revision"] is None


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("not in the cache\nand more"), ConnectionError("no route"), ValueError("bad id")]
)
def test_whatever_the_hub_says_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"'owner/name' is neither a directory here nor to be had") as caught:
        vargpt.load("owner/name")
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)


# Saving


def test_a_model_that_no_configuration_describes_is_not_saved(nano: VARGPT, tmp_path: Path) -> None:
    for model in (VARGPT(llm=nano.llm), VARGPT(llm=nano.llm, config=nano.config)):
        with pytest.raises(ValueError, match="only a model whose config describes all its parts can be saved"):
            vargpt.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_directory_that_cannot_be_made_is_named(nano: VARGPT, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*model \(Not a directory\)"):
        vargpt.save(nano, tmp_path / "file" / "model")


# Reading only headers


def test_inventory_counts_the_parts_of_a_checkpoint(nano: VARGPT, saved: Path) -> None:
    parts = inventory(saved)
    assert [part.name for part in parts] == ["llm", "vision", "projector", "var", "vqvae", "gen_in", "gen_out"]
    for part in parts:
        parameters = list(getattr(nano, part.name).parameters())
        assert part.parameters == sum(p.numel() for p in parameters)
        assert part.bytes == 4 * part.parameters
    assert "width 128" in parts[0].what


def test_inventory_of_a_preset_builds_nothing() -> None:
    parts = {part.name: part.parameters for part in inventory("vargpt-7b")}
    assert round(sum(parts.values()) / 1e9, 2) == 9.27  # without the last vision block, which no feature passes
    assert round(parts["var"] / 1e6, 1) == 2069.5


def test_reading_a_checkpoint_of_parts(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("nano"), llm=None, vision=None, projector=None, gen_in=None, gen_out=None)
    model = build(config)
    vargpt.save(model, tmp_path)
    opened, tensors = read(tmp_path)
    assert opened == config
    assert tensors.specs.keys() == model.state_dict().keys()
    assert vargpt.load(tmp_path).llm is None
    assert vargpt.load(tmp_path).tokenizer is None


def test_a_model_is_saved_with_the_tokenizer_it_was_loaded_with(tmp_path: Path) -> None:
    model = vargpt.load("tiny")
    vargpt.save(model, tmp_path)
    loaded = vargpt.load(tmp_path)
    assert model.tokenizer is not None
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("a red circle") == model.tokenizer.encode("a red circle")

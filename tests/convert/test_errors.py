"""Checkpoints that are wrong in some way: one line that names what, before anything is run or written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vargpt
from tests.convert.checkpoints import contents, published_config, published_state, random_model, write
from vargpt.cli import main
from vargpt.convert import convert

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound published checkpoint in three shards, to be copied and spoiled."""
    return write(tmp_path_factory.mktemp("sound"), *published_state(random_model(published_config())), shards=3)


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "checkpoint")


def complaint(directory: Path) -> str:
    """What loading says: one line, with the checkpoint's place."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers match it)
        vargpt.load(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def rewritten(directory: Path, edit: Callable[[Tensors], Any]) -> Path:
    """The checkpoint as one file, after an edit of its tensors."""
    tensors, config = contents(directory), json.loads((directory / "config.json").read_text())
    shutil.rmtree(directory)
    edit(tensors)
    return write(directory, tensors, config)


def set_config(directory: Path, **fields: Any) -> Path:
    """Set fields of ``config.json``; those below another are named with two underscores between."""
    file = directory / "config.json"
    content = json.loads(file.read_text())
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    file.write_text(json.dumps(content))
    return directory


def test_the_sound_one_loads(checkpoint: Path) -> None:
    vargpt.load(checkpoint)


NAMES = {
    "missing tensors": [
        "language_model.model.layers.1.self_attn.k_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.bias",  # one of three that become one of ours
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",  # after the feature layer
        "vision_tower.vision_model.post_layernorm.weight",
        "vargpt_gen.pos_1LC",
        "vargpt_gen.class_emb.weight",
        "vargpt_gen.head.weight",
        "vae_local.quantize.embedding.weight",
        "image_gen_projector_out.mlp.0.weight",
    ],
    "unknown tensors": [
        "language_model.model.layers.1.self_attn.k_proj.bias",
        "language_model.model.layers.2.input_layernorm.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "vargpt_gen.blocks.0.attn.mat_qkv.bias",
        "vargpt_gen.blocks.9.attn.q_bias",
        "optimizer.state",
    ],
    "wrong shapes": [
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.2.layer_norm1.bias",
        "vargpt_gen.class_emb.weight",
        "vargpt_gen.head.weight",
        "vargpt_gen.word_embed.weight",
        "vargpt_gen.blocks.1.attn.scale_mul_1H11",
        "vae_local.quantize.embedding.weight",
        "image_gen_projector.ln_q.weight",
        "image_gen_projector.mlp.2.weight",
    ],
}


@pytest.mark.parametrize("name", NAMES["missing tensors"])
def test_a_missing_tensor_is_named(name: str, checkpoint: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors.pop(name))
    assert complaint(checkpoint) == f"{checkpoint}: missing tensors: 1 ({name})"


@pytest.mark.parametrize("name", NAMES["unknown tensors"])
def test_an_unknown_tensor_is_named(name: str, checkpoint: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert complaint(checkpoint) == f"{checkpoint}: unknown tensors: 1 ({name})"


def grow(tensors: Tensors, name: str) -> None:
    """One more along the first axis that has more than one."""
    tensor = tensors[name]
    axis = next(axis for axis, size in enumerate(tensor.shape) if size > 1)
    tensors[name] = torch.cat((tensor, tensor.narrow(axis, 0, 1)), dim=axis)


@pytest.mark.parametrize("name", NAMES["wrong shapes"])
def test_a_wrong_shape_is_named(name: str, checkpoint: Path) -> None:
    right = list(contents(checkpoint)[name].shape)
    rewritten(checkpoint, lambda tensors: grow(tensors, name))
    wrong = list(contents(checkpoint)[name].shape)
    assert complaint(checkpoint) == f"{checkpoint}: wrong shapes: 1 ({name} {wrong} instead of {right})"


@pytest.mark.parametrize("name", ["vargpt_gen.blocks.0.attn.scale_mul_1H11", "vargpt_gen.pos_1LC"])
def test_a_wrong_number_of_axes_is_named(name: str, checkpoint: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors.update({name: tensors[name].flatten()}))
    assert f"wrong shapes: 1 ({name} [" in complaint(checkpoint)


def test_conversion_says_the_same_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors.pop("vargpt_gen.head.weight"))
    with pytest.raises(ValueError, match="missing") as caught:
        convert(checkpoint, tmp_path / "ours")
    assert str(caught.value) == complaint(checkpoint)
    assert not (tmp_path / "ours").exists()


def test_all_mistakes_are_listed_together(checkpoint: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for name in NAMES["missing tensors"][:8]:
            del tensors[name]
        for name in NAMES["unknown tensors"]:
            tensors[name] = torch.zeros(2)
        for name in NAMES["wrong shapes"][-3:]:
            grow(tensors, name)
        tensors["vargpt_gen.pos_start"] = tensors["vargpt_gen.pos_start"].int()

    message = complaint(rewritten(checkpoint, spoil))
    for name in NAMES["missing tensors"][:8] + NAMES["unknown tensors"] + NAMES["wrong shapes"][-3:]:
        assert name in message
    assert "missing tensors: 8 (" in message
    assert f"unknown tensors: {len(NAMES['unknown tensors'])} (" in message
    assert "wrong shapes: 3 (" in message
    assert "wrong types: 1 (vargpt_gen.pos_start torch.int32 instead of torch.float32)" in message


def test_a_tensor_in_two_forms_is_named(checkpoint: Path) -> None:
    form = "vae_local.quantize.quant_resi."
    rewritten(checkpoint, lambda tensors: tensors.update({f"{form}0.bias": torch.zeros(4)}))
    pair = f"{form}0.bias and {form}qresi_ls.0.bias"
    assert complaint(checkpoint) == f"{checkpoint}: tensors given twice: 1 ({pair})"


def test_many_names_are_counted(checkpoint: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(300)}))
    message = complaint(checkpoint)
    assert "unknown tensors: 300 (extra.0, extra.1, " in message
    assert "more)" in message


def test_integers_are_no_weights(checkpoint: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    rewritten(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert complaint(checkpoint) == f"{checkpoint}: wrong types: 1 ({name} torch.int8 instead of torch.float32)"


def test_a_type_that_is_not_read_is_named(checkpoint: Path) -> None:
    name = "language_model.model.norm.weight"
    rewritten(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert f"{name} has type F8_E4M3, which is not one of " in complaint(checkpoint)


# Files


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing, which model.safetensors.index.json names" in complaint(
        checkpoint
    )


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(keep: int, checkpoint: Path) -> None:
    shard = checkpoint / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert "model-00003-of-00003.safetensors is truncated or not a safetensors file" in complaint(checkpoint)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}', b"\xff"]
)
def test_a_corrupt_header_is_named(header: bytes, checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00003.safetensors"
    shard.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "model-00001-of-00003.safetensors is truncated or not a safetensors file" in complaint(checkpoint)


def test_a_header_of_absurd_length_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00003.safetensors"
    shard.write_bytes(struct.pack("<Q", 2**63) + shard.read_bytes()[8:])
    assert "model-00001-of-00003.safetensors is truncated or not a safetensors file" in complaint(checkpoint)


def edit_index(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = checkpoint / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_places_a_tensor_elsewhere_is_refused(checkpoint: Path) -> None:
    name = "vargpt_gen.head.bias"
    edit_index(checkpoint, lambda places: places.update({name: "model-00001-of-00003.safetensors"}))
    assert f"holds {name}, which {checkpoint / 'model.safetensors.index.json'} does not place there" in complaint(
        checkpoint
    )


def test_an_index_without_a_tensor_of_its_shards_is_refused(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda places: places.pop("vargpt_gen.head.bias"))
    assert "holds vargpt_gen.head.bias, which" in complaint(checkpoint)


def test_an_index_with_a_tensor_that_no_shard_holds_is_refused(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda places: places.update({"ghost": "model-00001-of-00003.safetensors"}))
    assert "places ghost in model-00001-of-00003.safetensors, which does not hold it" in complaint(checkpoint)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/part.safetensors", "..", "", 7, None])
def test_an_index_that_leads_out_of_the_directory_is_refused(file: object, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model-00001-of-00003.safetensors", checkpoint.parent / "secret.safetensors")
    edit_index(checkpoint, lambda places: places.update({"vargpt_gen.head.bias": file}))
    assert f"names {file!r}, which is not a file beside it" in complaint(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    message = complaint(checkpoint)
    assert "model.safetensors.index.json" in message
    assert "JSON" in message or "has no weight_map" in message


@pytest.fixture
def alone(checkpoint: Path) -> Path:
    """The configuration without weights."""
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    return checkpoint


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_the_bomb_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_of_safetensors_is_not_loaded(zipped: bool, alone: Path, canary: Path) -> None:
    torch.save({"x": Bomb(canary)}, alone / "model.safetensors", _use_new_zipfile_serialization=zipped)
    assert "model.safetensors is a pickle, not safetensors, and is not loaded: pickles can run code" in complaint(alone)
    assert not canary.exists()


def test_pickled_weights_are_not_loaded(alone: Path, canary: Path) -> None:
    torch.save({"x": Bomb(canary)}, alone / "pytorch_model.bin")
    assert "offers pickled weights (pytorch_model.bin), which are not loaded" in complaint(alone)
    assert not canary.exists()


def test_no_weights_at_all_are_named(alone: Path) -> None:
    assert "has no model.safetensors and no model.safetensors.index.json" in complaint(alone)


@pytest.mark.parametrize("spoiled", ["vae.pth", "var.pth"])
@pytest.mark.parametrize("how", ["zip", "plain pickle", "older torch"])
def test_a_malicious_pickle_runs_nothing(
    spoiled: str, how: str, var_tiny_dir: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("vae.pth", "var.pth"):
        shutil.copy(var_tiny_dir / file, tmp_path)
    if how == "plain pickle":
        (tmp_path / spoiled).write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"x": Bomb(canary)}, tmp_path / spoiled, _use_new_zipfile_serialization=how == "zip")
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / spoiled} is not a plain, complete file of tensors" in error
    assert error.count("\n") == 1
    assert not canary.exists()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(1)], "must hold a plain state dict of tensors"),
        ({"epoch": 3}, "must hold a plain state dict of tensors"),
        ({3: torch.zeros(1)}, "must hold a plain state dict of tensors"),
        ({"trainer": {"var": {}}}, "must hold a plain state dict of tensors"),
        ({"x": torch.zeros(1)}, "missing tensors"),
        (b"", "is not a plain, complete file of tensors"),
        (b"PK\x03\x04", "is not a plain, complete file of tensors"),
    ],
)
def test_a_pth_file_that_holds_no_weights_is_named(
    content: object, told: str, var_tiny_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(var_tiny_dir / "vae.pth", tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "var.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=told) as caught:
        convert(tmp_path, tmp_path / "ours")
    assert "\n" not in str(caught.value)


def test_a_truncated_pth_file_is_named(var_tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copy(var_tiny_dir / "vae.pth", tmp_path)
    content = (var_tiny_dir / "var.pth").read_bytes()
    (tmp_path / "var.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"var\.pth is not a plain, complete file of tensors"):
        convert(tmp_path, tmp_path / "ours")


def test_a_pth_file_of_older_torch_is_read(var_tiny_dir: Path, tmp_path: Path) -> None:
    for file in ("vae.pth", "var.pth"):
        state = torch.load(var_tiny_dir / file, weights_only=True)
        torch.save(state, tmp_path / file, _use_new_zipfile_serialization=False)
    convert(tmp_path, tmp_path / "ours")
    assert vargpt.load(tmp_path / "ours").config.var.num_classes == 10


@pytest.mark.parametrize(
    "files", [["var.pth"], ["var.pth", "vae.pth", "vae_ch160.pth"], ["var_d16.pth", "var_d20.pth"]]
)
def test_a_pair_is_two_files(files: list[str], var_tiny_dir: Path, tmp_path: Path) -> None:
    for file in files:
        shutil.copy(var_tiny_dir / f"{file[:3]}.pth", tmp_path / file)
    with pytest.raises(ValueError, match=r"must hold one va[er]\*\.pth, not \d"):
        convert(tmp_path, tmp_path / "ours")


def test_a_pair_is_converted_before_it_is_loaded(var_tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"offers pickled weights: run `vargpt convert .* DST` and load DST"):
        vargpt.load(var_tiny_dir)


# config.json


@pytest.mark.parametrize("content", ["", "not JSON", '{"a": ', "[1]", "7", "\udcff"])
def test_a_config_that_is_not_json_is_named(content: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    message = complaint(checkpoint)
    assert message.startswith(f"{checkpoint / 'config.json'} ")
    assert "JSON" in message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "vargpt_qwen2_vl"}, "has model_type 'vargpt_qwen2_vl', which is none of vargpt_llava, llava, "),
        ({"model_type": None}, "has model_type None"),
        ({"model_type": ["llama"]}, "has model_type ['llama']"),
        ({"text_config": 7}, "text_config must be an object, not 7"),
        ({"vision_config": []}, "vision_config must be an object, not []"),
        ({"special_tokens": "none"}, "special_tokens must be an object, not 'none'"),
        ({"special_tokens": {}}, "special_tokens.image_gen_start_token_id is missing"),
        ({"special_tokens__image_gen_pad_token_id": "7"}, "image_gen_pad_token_id must be a token's number, not '7'"),
        ({"special_tokens__image_gen_pad_token_id": 99}, "tokens.gen_pad = 99 lies outside the vocabulary of 24"),
        ({"image_token_index": 24}, "tokens.image = 24 lies outside the vocabulary of 24"),
        ({"text_config__hidden_size": "16"}, "text_config.hidden_size must be a whole number above 0, not '16'"),
        ({"text_config__hidden_size": 16.5}, "text_config.hidden_size must be a whole number above 0, not 16.5"),
        (
            {"text_config__num_attention_heads": 0},
            "text_config.num_attention_heads must be a whole number above 0, not 0",
        ),
        (
            {"text_config__num_hidden_layers": -1},
            "text_config.num_hidden_layers must be a whole number above 0, not -1",
        ),
        ({"text_config__num_key_value_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
        ({"text_config__head_dim": 5}, "head_dim must be even for rotary positions, not 5"),
        ({"text_config__vocab_size": True}, "text_config.vocab_size must be a whole number above 0, not True"),
        ({"text_config__rms_norm_eps": "small"}, "text_config.rms_norm_eps must be a number above 0, not 'small'"),
        ({"text_config__rope_theta": -1}, "text_config.rope_theta must be a number above 0, not -1"),
        ({"text_config__tie_word_embeddings": 1}, "text_config.tie_word_embeddings must be true or false, not 1"),
        ({"text_config__bos_token_id": [[]]}, "text_config.bos_token_id must be a token's number, not []"),
        (
            {"text_config__model_type": "mistral"},
            "text_config.model_type must be 'llama' or 'qwen2', the only supported",
        ),
        ({"text_config__hidden_act": "gelu"}, "text_config.hidden_act must be 'silu', the only supported, not 'gelu'"),
        (
            {"text_config__rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type must be 'default' or 'linear' or 'dynamic' or 'llama3', the only supported",
        ),
        ({"text_config__rope_scaling": {"type": "longrope"}}, "rope_scaling.type must be"),
        ({"text_config__rope_scaling": {"type": "linear"}}, "text_config.rope_scaling.factor is missing"),
        ({"text_config__rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, not 0.5"),
        ({"text_config__rope_scaling": "linear"}, "text_config.rope_scaling must be an object, not 'linear'"),
        (
            {"text_config__rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported",
        ),
        (
            {"text_config__model_type": "qwen2", "text_config__use_sliding_window": True},
            "use_sliding_window is not supported",
        ),
        ({"vision_config__model_type": "siglip_vision_model"}, "vision_config.model_type must be 'clip_vision_model'"),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act must be 'quick_gelu' or 'gelu', the only"),
        ({"vision_config__patch_size": 3}, "image_size 8 must be a multiple of patch_size 3"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be 'gelu', the only supported, not 'relu'"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer must be a whole number, not [-2, -5]"),
        ({"vision_feature_layer": -9}, "feature_layer must be from -4 to 3 for 3 blocks, not -9"),
        (
            {"vision_feature_select_strategy": "cls"},
            "vision_feature_select_strategy must be 'default' or 'full', the only",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], told: str, checkpoint: Path) -> None:
    assert told in complaint(set_config(checkpoint, **fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text_config__hidden_size": 32}, "language_model.model.norm.weight [16] instead of [32]"),
        ({"text_config__vocab_size": 30}, "language_model.lm_head.weight [24, 16] instead of [30, 16]"),
        ({"text_config__num_key_value_heads": 1}, "layers.0.self_attn.k_proj.weight [12, 16] instead of [6, 16]"),
        ({"text_config__intermediate_size": 21}, "layers.0.mlp.up_proj.weight [20, 16] instead of [21, 16]"),
        ({"text_config__num_hidden_layers": 3}, "missing tensors: 9 (language_model.model.layers.2."),
        ({"text_config__num_hidden_layers": 1}, "unknown tensors: 9 (language_model.model.layers.1."),
        ({"text_config__attention_bias": True}, "missing tensors: 8 (language_model.model.layers.0.self_attn."),
        ({"text_config__tie_word_embeddings": True}, "lm_head and embed_tokens differ"),
        ({"vision_config__num_hidden_layers": 4}, "missing tensors: 16 (vision_tower.vision_model.encoder.layers.3."),
        ({"vision_config__num_hidden_layers": 2}, "unknown tensors: 16 (vision_tower.vision_model.encoder.layers.2."),
        ({"vision_config__image_size": 12}, "position_embedding.weight [5, 8] instead of [10, 8]"),
        ({"special_tokens__image_gen_start_token_id": 4}, "vargpt_gen.class_emb.weight [7, 24] instead of [6, 24]"),
    ],
)
def test_a_field_that_the_tensors_contradict_is_shown_by_them(
    fields: dict[str, Any], named: str, checkpoint: Path
) -> None:
    assert named in complaint(set_config(checkpoint, **fields))


def test_scales_that_are_no_squares_are_named(checkpoint: Path) -> None:
    rewritten(checkpoint, lambda tensors: tensors["vargpt_gen.lvl_1L"][0, -1:].fill_(0))
    assert "vargpt_gen.lvl_1L does not count square scales: their lengths would be [2, 4, 8]" in complaint(checkpoint)


def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"has no config\.json: name a checkpoint's directory"):
        convert(tmp_path, tmp_path / "ours")


def test_a_destination_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*ours \(Not a directory\)"):
        convert(source, tmp_path / "file" / "ours")


def test_a_full_disk_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(ValueError, match=r"cannot write .*model\.safetensors \(No space left on device\)"):
        convert(source, tmp_path / "place" / "ours")
    assert list((tmp_path / "place").iterdir()) == []


# Ours


@pytest.fixture
def ours(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "ours")
    return tmp_path / "ours"


def test_a_checkpoint_of_ours_is_checked_too(ours: Path) -> None:
    tensors = load_file(ours / "model.safetensors")
    del tensors["var.pos_embed"]
    tensors["llm.norm.bias"] = torch.zeros(16)
    tensors["gen_in.norm.weight"] = torch.zeros(3)
    tensors["llm.norm.weight"] = tensors["llm.norm.weight"].int()
    save_file(tensors, ours / "model.safetensors")
    for use in (vargpt.load, lambda directory: convert(directory, directory.with_name("back"))):
        with pytest.raises(ValueError, match="missing") as caught:
            use(ours)
        assert str(caught.value) == (
            f"{ours}: missing tensors: 1 (var.pos_embed); unknown tensors: 1 (llm.norm.bias); "
            "wrong shapes: 1 (gen_in.norm.weight [3] instead of [24]); "
            "wrong types: 1 (llm.norm.weight torch.int32 instead of torch.float32)"
        )

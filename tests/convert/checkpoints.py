"""Small published checkpoints, made from random models of ours through the key tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import TOKENS, VOCABULARY, stir
from vargpt.build import build
from vargpt.choices import PUBLISHED
from vargpt.config import ProjectorConfig, VargptConfig
from vargpt.convert.published import to_published
from vargpt.llm import LlamaConfig
from vargpt.model import VARGPT
from vargpt.tensorfiles import MemorySource
from vargpt.var import VarConfig
from vargpt.vision import OpenClipConfig
from vargpt.vqvae import VqvaeConfig


def published_config(
    patch_nums: Sequence[int] = (1, 2, 3),
    *,
    llm: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    var: Mapping[str, Any] | None = None,
    vqvae: Mapping[str, Any] | None = None,
) -> VargptConfig:
    """A whole model as small as the published layout can hold; the arguments change single fields of its parts."""
    shared: dict[str, Any] = {"patch_nums": tuple(patch_nums), "vocab_size": 12, "latent_channels": 4}
    text: dict[str, Any] = {"vocab_size": VOCABULARY, "width": 16, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
    text |= {"head_dim": 6, "mlp_width": 20, "max_positions": 256} | dict(llm or {})
    clip: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 3, "num_heads": 2, "mlp_width": 12}
    draw: dict[str, Any] = {"width": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "drop_path": 0.0}
    draw |= {"num_classes": TOKENS.gen_start + 1}
    code: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 2), "res_blocks": 1}
    return VargptConfig(
        llm=LlamaConfig(**text),
        vision=OpenClipConfig(**clip | dict(vision or {})),
        projector=ProjectorConfig(hidden=text["width"]),
        var=VarConfig(**shared | draw | dict(var or {})),
        vqvae=VqvaeConfig(**shared | code | dict(vqvae or {})),
        gen_in=ProjectorConfig(hidden=10),
        gen_out=ProjectorConfig(hidden=14),
        tokens=TOKENS,
        choices=PUBLISHED,
    )


def random_model(config: VargptConfig, seed: int = 0) -> VARGPT:
    return stir(build(config), seed)


def published_state(model: VARGPT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ``config.json`` of a model in the published layout."""
    assert model.config is not None
    theirs, described = to_published(model.config, MemorySource(model.state_dict()))
    return {name: theirs.read(name).clone() for name in theirs.specs}, json.loads(json.dumps(described))


def write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 1) -> Path:
    """Write a checkpoint with the safetensors library's own writer, not with ours."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_published(directory: Path, config: VargptConfig | None = None, shards: int = 1) -> Path:
    """A random model's checkpoint in the published layout."""
    return write(directory, *published_state(random_model(config or published_config())), shards=shards)


def contents(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a published recording's checkpoint, without the recording beside it."""
    return {
        name: tensor
        for file in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }

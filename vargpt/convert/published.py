"""Reading published checkpoints, and converting directories."""

from __future__ import annotations

import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vargpt.config import VargptConfig
from vargpt.config_json import FORMAT, describe, read_config
from vargpt.convert import published_config
from vargpt.convert.check import check_published, check_tensors, naming, published_tensors
from vargpt.convert.rules import Table, ToOurs, ToTheirs
from vargpt.convert.tables import CLIP_HF, LLAMA_HF, LLAVA_HF, VAR_PAIR, VARGPT_HF
from vargpt.files import atomic_directory, atomic_file, read_json, write_json
from vargpt.tensorfiles import (
    MAX_SHARD_BYTES,
    CompletedSource,
    MemorySource,
    SafetensorsSource,
    TensorSource,
    write_safetensors,
)

TOKENIZER_FILES = (
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)


@dataclass(frozen=True)
class Published:
    """A published checkpoint, seen as ours."""

    config: VargptConfig
    source: TensorSource
    layout: str

    def published_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under our names (gradients, say) under their published ones."""
        patch_nums = self.config.var.patch_nums if self.config.var else None
        renamed = ToTheirs(MemorySource(tensors), _TABLES[self.layout], patch_nums)
        return {name: renamed.read(name) for name in renamed.specs}


def published_layout(directory: Path) -> str:
    """Which layout a directory holds: ``vargpt``, ``llava``, ``llama``, ``clip``, ``var`` or ``ours``.

    Raises:
        ValueError: none of these.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if not (directory / "config.json").is_file():
        if any(directory.glob("var*.pth")):
            return "var"
        raise ValueError(f"{directory} has no config.json: name a checkpoint's directory")
    config = read_json(directory / "config.json")
    if config.get("format") == FORMAT:
        return "ours"
    layout = _LAYOUT_OF_TYPE.get(str(config.get("model_type")))
    if layout is None:
        raise ValueError(
            f"{directory / 'config.json'} has model_type {config.get('model_type')!r}, "
            f"which is none of {', '.join(_LAYOUT_OF_TYPE)}"
        )
    return layout


_LAYOUT_OF_TYPE = {
    "vargpt_llava": "vargpt",
    "llava": "llava",
    "llama": "llama",
    "qwen2": "llama",
    "clip": "clip",
    "clip_vision_model": "clip",
}


def open_published(directory: Path, patch_nums: tuple[int, ...] | None = None) -> Published:
    """A checkpoint, published or ours, lazily: tensors are read and renamed one at a time.

    Args:
        patch_nums: the scales, where the checkpoint does not tell.

    Raises:
        ValueError: unknown, missing or mis-shaped tensors, all listed; a configuration that contradicts them.
    """
    layout = published_layout(directory)
    if layout == "ours":
        config, source = read_config(directory), SafetensorsSource(directory)
        with naming(directory):
            check_tensors(config, source)
        return Published(config, source, "vargpt" if config.llm else "var")
    source = _var_pair(directory) if layout == "var" else SafetensorsSource(directory)
    with naming(directory):
        config, tensors = _config(layout, directory, source, patch_nums), ToOurs(source, _TABLES[layout])
        check_published(config, tensors)
        _check_tied_head(config, tensors)
    return Published(config, CompletedSource(tensors, _statistics(config, tensors)), layout)


def _config(layout: str, directory: Path, source: TensorSource, patch_nums: tuple[int, ...] | None) -> VargptConfig:
    if layout == "var":
        return published_config.var_pair(source, patch_nums)
    config = read_json(directory / "config.json")
    if layout == "vargpt":
        return published_config.vargpt(config, source, patch_nums)
    if layout == "llava":
        return published_config.llava(config, source)
    return published_config.llama_only(config) if layout == "llama" else published_config.clip_only(config)


def _check_tied_head(config: VargptConfig, tensors: TensorSource) -> None:
    head, embed = "llm.head.weight", "llm.token_embed.weight"
    tied_twice = config.llm is not None and config.llm.tie_embeddings and head in tensors.specs
    if tied_twice and not torch.equal(tensors.read(head), tensors.read(embed)):
        raise ValueError("config.json sets tie_word_embeddings, but lm_head and embed_tokens differ")


def _statistics(config: VargptConfig, tensors: TensorSource) -> dict[str, Tensor]:
    """Counts of the image tokenizer's training, where the checkpoint leaves them out: nothing depends on them."""
    name, vqvae = "vqvae.quantizer.usage_SV", config.vqvae
    if vqvae is None or name in tensors.specs:
        return {}
    return {name: torch.zeros(len(vqvae.patch_nums), vqvae.vocab_size)}


_TABLES: dict[str, Table] = {
    "vargpt": VARGPT_HF,
    "llava": LLAVA_HF,
    "llama": LLAMA_HF,
    "clip": CLIP_HF,
    "var": VAR_PAIR,
}


def _var_pair(directory: Path) -> MemorySource:
    """VAR's two pickles, read without running any code in them."""
    tensors: dict[str, Tensor] = {}
    for part, pattern in (("vae.", "vae*.pth"), ("var.", "var*.pth")):
        files = sorted(directory.glob(pattern))
        if len(files) != 1:
            raise ValueError(f"{directory} must hold one {pattern}, not {len(files)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of protocols that torch may not know: then it fails
                # Older files than torch's zip format cannot be mapped into memory.
                state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(files[0]))
        except Exception as error:  # noqa: BLE001 (damage and refused code come as errors of a dozen types)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{files[0]} is not a plain, complete file of tensors ({reason})") from None
        plain = isinstance(state, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items())
        if not plain:
            raise ValueError(f"{files[0]} must hold a plain state dict of tensors")
        tensors |= {part + name: tensor for name, tensor in state.items()}
    return MemorySource(tensors)


def convert(
    source: Path,
    destination: Path,
    *,
    patch_nums: tuple[int, ...] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> VargptConfig:
    """Write a published checkpoint in our layout, or one of ours in the published VARGPT layout.

    One tensor is in memory at a time. All is written beside the destination, which appears only when it is complete.

    Raises:
        ValueError: see :func:`open_published`; or the destination holds other files or cannot be written.
    """
    published = open_published(source, patch_nums)
    config, tensors, described = published.config, published.source, describe(published.config)
    if published_layout(source) == "ours":
        tensors, described = to_published(config, tensors)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty directory: choose another destination")
    with atomic_directory(destination) as folder:
        write_safetensors(folder, tensors, max_shard_bytes)
        copy_tokenizer(source, folder)
        write_json(folder / "config.json", described)
    return config


def to_published(config: VargptConfig, tensors: TensorSource) -> tuple[TensorSource, dict[str, Any]]:
    """A whole model of ours in the published VARGPT layout: its tensors, and its ``config.json``.

    What published files hold and ours may lack, since nothing depends on it, is filled in: layer norms and vision
    blocks that change nothing.

    Raises:
        ValueError: something that the published layout, or the published code, does not have.
    """
    described = published_config.to_vargpt_json(config)
    dtype = tensors.specs["llm.token_embed.weight"].dtype
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    filled = {
        name: (one if re.search(r"(ln_\w+|norm)\.weight$", name) else zero).expand(spec.shape)
        for name, spec in published_tensors(config).items()
        if name not in tensors.specs and name != "llm.head.weight"
    }
    assert config.var is not None
    theirs = ToTheirs(CompletedSource(tensors, filled), VARGPT_HF, config.var.patch_nums)
    published_config.check_same(config, published_config.vargpt(described, theirs, None))
    return theirs, described


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy whatever tokenizer files there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with (source / name).open("rb") as original, atomic_file(destination / name) as copy:
                shutil.copyfileobj(original, copy)

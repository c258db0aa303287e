"""Reading published checkpoints, and converting directories."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vargpt.config import VargptConfig
from vargpt.config_json import FORMAT, describe, read_config
from vargpt.convert import published_config
from vargpt.convert.check import check_tensors
from vargpt.convert.rules import Table, ToOurs, ToTheirs
from vargpt.convert.tables import CLIP_HF, LLAMA_HF, LLAVA_HF, VAR_PAIR, VARGPT_HF
from vargpt.files import atomic_file, read_json, write_json
from vargpt.tensorfiles import MAX_SHARD_BYTES, MemorySource, SafetensorsSource, TensorSource, write_safetensors

TOKENIZER_FILES = ("tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")


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
    layout = _LAYOUT_OF_TYPE.get(config.get("model_type", ""))
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
    """A published checkpoint, lazily: tensors are read and renamed one at a time.

    Args:
        patch_nums: the scales, where the checkpoint does not tell.

    Raises:
        ValueError: unknown, missing or mis-shaped tensors, all listed; a configuration that contradicts them.
    """
    layout = published_layout(directory)
    if layout == "var":
        pair = _var_pair(directory)
        ours, tensors = published_config.var_pair(pair, patch_nums), ToOurs(pair, _TABLES[layout])
        check_tensors(ours, tensors)
        return Published(ours, tensors, layout)
    config, source = read_json(directory / "config.json"), SafetensorsSource(directory)
    try:
        if layout == "vargpt":
            ours = published_config.vargpt(config, source, patch_nums)
        elif layout == "llava":
            ours = published_config.llava(config)
        elif layout == "llama":
            ours = published_config.llama_only(config)
        else:
            ours = published_config.clip_only(config)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{directory / 'config.json'} lacks a field or has one of the wrong type: {error}") from None
    tensors = ToOurs(_Renamed(source), _TABLES[layout])
    check_tensors(ours, tensors)
    return Published(ours, tensors, layout)


_TABLES: dict[str, Table] = {
    "vargpt": VARGPT_HF,
    "llava": LLAVA_HF,
    "llama": LLAMA_HF,
    "clip": CLIP_HF,
    "var": VAR_PAIR,
}


class _Renamed:
    """LLaVA as newer releases of its library save it: the same names under other prefixes."""

    _PREFIXES = (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    )

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        newer = any(name.startswith("model.language_model.") for name in source.specs)
        self._names = {self._older(name) if newer else name: name for name in source.specs}
        self.specs = {older: source.specs[name] for older, name in self._names.items()}

    def _older(self, name: str) -> str:
        for newer, older in self._PREFIXES:
            if name.startswith(newer):
                return older + name.removeprefix(newer)
        return "language_model." + name if name == "lm_head.weight" else name

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def _var_pair(directory: Path) -> MemorySource:
    """VAR's two pickles, read without running any code in them."""
    tensors: dict[str, Tensor] = {}
    for part, pattern in (("vae.", "vae*.pth"), ("var.", "var*.pth")):
        files = sorted(directory.glob(pattern))
        if len(files) != 1:
            raise ValueError(f"{directory} must hold one {pattern}, not {len(files)}")
        try:
            state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{files[0]} is not a plain, complete file of tensors ({reason})") from None
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
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

    One tensor is in memory at a time. ``config.json`` is written last: a directory without it is unfinished.

    Raises:
        ValueError: see :func:`open_published`; or the destination holds other files or cannot be written.
    """
    layout = published_layout(source)
    if layout == "ours":
        config = read_config(source)
        ours = SafetensorsSource(source)
        check_tensors(config, ours)
        described = published_config.to_vargpt_json(config)
        tensors: TensorSource = ToTheirs(ours, VARGPT_HF, config.var.patch_nums if config.var else None)
    else:
        published = open_published(source, patch_nums)
        config, tensors, described = published.config, published.source, describe(published.config)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty directory: choose another destination")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {destination} ({error.strerror})") from None
    write_safetensors(destination, tensors, max_shard_bytes)
    copy_tokenizer(source, destination)
    write_json(destination / "config.json", described)
    return config


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy whatever tokenizer files there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with (source / name).open("rb") as original, atomic_file(destination / name) as copy:
                shutil.copyfileobj(original, copy)

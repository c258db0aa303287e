"""Named tensors on disk: lazy reading and streamed, atomic writing of safetensors directories."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vargpt.files import atomic_file, read_json, write_json

MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), tensor.dtype)


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Tensor: ...


class MemorySource:
    """Tensors that are in memory already, such as a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class CompletedSource:
    """A source with a few more tensors, which it lacks."""

    def __init__(self, source: TensorSource, more: Mapping[str, Tensor]) -> None:
        self._source, self._more = source, more
        self.specs = {**source.specs, **{name: TensorSpec.of(tensor) for name, tensor in more.items()}}

    def read(self, name: str) -> Tensor:
        return self._more[name] if name in self._more else self._source.read(name)


class SafetensorsSource:
    """The tensors of a directory: ``model.safetensors``, or the shards its index names.

    Raises:
        ValueError: no weights, a shard that is missing, truncated or not safetensors, or an index that contradicts
            its shards.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        specs: dict[str, TensorSpec] = {}
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            files = [directory / name for name in sorted(set(weight_map.values()))]
        else:
            weight_map, files = None, [directory / "model.safetensors"]
            if not files[0].is_file():
                raise ValueError(_no_weights(directory))
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing, which {index.name} names: fetch the checkpoint again")
            for name, spec in _read_header(file).items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    raise ValueError(f"{file} holds {name}, which {index} does not place there")
                specs[name] = spec
                self._files[name] = file
        lost = sorted(set(weight_map or ()) - set(specs))
        if lost:
            raise ValueError(f"{index} places {lost[0]} in {(weight_map or {})[lost[0]]}, which does not hold it")
        self.specs = specs

    def read(self, name: str) -> Tensor:
        # Opened per tensor: a mapping that stayed open would keep every page ever read resident.
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]}: {name} cannot be read ({error})") from None


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{index} names {file!r}, which is not a file beside it")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorSpec]:
    """Shapes and types of one file, after checking that its data is all there."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {
                name: TensorSpec(tuple(part.get_shape()), _dtype(file, name, part.get_dtype()))
                for name in handle.keys()  # noqa: SIM118 (not a dict)
                for part in [handle.get_slice(name)]
            }
    except SafetensorError as error:
        with file.open("rb") as raw:
            start = raw.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise ValueError(f"{file} is a pickle, not safetensors, and is not loaded: pickles can run code") from None
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None


def _dtype(file: Path, name: str, code: str) -> torch.dtype:
    if code not in _DTYPES:
        raise ValueError(f"{file}: {name} has type {code}, which is not one of {', '.join(_DTYPES)}")
    return _DTYPES[code]


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return f"{directory} offers pickled weights ({pickles[0]}), which are not loaded (convert reads VAR's .pth)"
    return f"{directory} has no model.safetensors and no model.safetensors.index.json"


def write_safetensors(directory: Path, source: TensorSource, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write all tensors of a source, holding one at a time in memory.

    Raises:
        ValueError: the directory cannot be written.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in source.specs.items():
        if shards[-1] and size + spec.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", source, shards[0])
        (directory / "model.safetensors.index.json").unlink(missing_ok=True)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, source, names)
        weight_map |= dict.fromkeys(names, file)
    total = sum(spec.bytes for spec in source.specs.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_shard(path: Path, source: TensorSource, names: list[str]) -> None:
    # safetensors' own writer wants all tensors of a file in memory; its format is a length, a JSON header and bytes.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = source.specs[name]
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in names:
            data = source.read(name).detach().cpu().contiguous()
            assert TensorSpec.of(data) == source.specs[name], name
            file.write(data.flatten().view(torch.uint8).numpy().data)

"""Tensors on disk, against the safetensors library's own reader and writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import seeds
from vargpt.tensorfiles import (
    CompletedSource,
    MemorySource,
    SafetensorsSource,
    TensorSource,
    TensorSpec,
    write_safetensors,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def assert_same(source: TensorSource, tensors: dict[str, Tensor]) -> None:
    assert source.specs == {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(
    specs=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6),
    seed=seeds,
    max_shard_bytes=st.sampled_from([1, 40, 10**9]),
)
def test_what_is_written_is_read_back(
    specs: list[tuple[tuple[int, ...], torch.dtype]],
    seed: int,
    max_shard_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    tensors = {f"t.{i}": random(shape, dtype, seed + i) for i, (shape, dtype) in enumerate(specs)}
    write_safetensors(directory, MemorySource(tensors), max_shard_bytes)
    assert_same(SafetensorsSource(directory), tensors)
    theirs = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    assert_same(MemorySource(theirs), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_as_the_library_writes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"scalar": random((), dtype), "matrix": random((3, 5), dtype), "empty": random((0, 2), dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(SafetensorsSource(tmp_path), tensors)


def test_tensors_that_are_views_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"turned": base.T, "part": base[1:3, ::2], "spread": torch.ones(()).expand(2, 3), "base": base}
    write_safetensors(tmp_path, MemorySource(tensors))
    assert_same(SafetensorsSource(tmp_path), tensors)


def test_parameters_are_written_without_their_gradient(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    write_safetensors(tmp_path, MemorySource({"p": parameter}))
    assert torch.equal(SafetensorsSource(tmp_path).read("p"), torch.ones(2))


def test_shards_hold_no_more_than_asked(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.zeros(40)}
    write_safetensors(tmp_path, MemorySource(tensors), max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == 4 * (70 + 40)
    assert set(index["weight_map"]) == set(tensors)
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= 100 or len(held) == 1


def test_files_say_that_they_are_torchs(tmp_path: Path) -> None:
    """transformers refuses files without this."""
    write_safetensors(tmp_path, MemorySource({"x": torch.zeros(1)}))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_takes_the_place_of_earlier_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path, MemorySource({"a": torch.zeros(9), "b": torch.zeros(9)}), max_shard_bytes=36)
    write_safetensors(tmp_path, MemorySource({"c": torch.ones(3)}))
    assert_same(SafetensorsSource(tmp_path), {"c": torch.ones(3)})


class Failing(MemorySource):
    def read(self, name: str) -> Tensor:
        if name == "b":
            raise ValueError("b cannot be read")
        return super().read(name)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    earlier = {"a": torch.ones(3)}
    write_safetensors(tmp_path, MemorySource(earlier))
    with pytest.raises(ValueError, match="b cannot be read"):
        write_safetensors(tmp_path, Failing({"a": torch.zeros(3), "b": torch.zeros(3)}))
    assert_same(SafetensorsSource(tmp_path), earlier)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, file)
    source = SafetensorsSource(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors: a cannot be read"):
        source.read("a")


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    tensor = SafetensorsSource(tmp_path).read("a")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tensor, torch.arange(1000.0))


def test_what_is_read_belongs_to_the_reader(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    tensor = SafetensorsSource(tmp_path).read("a")
    tensor += 1
    assert torch.equal(SafetensorsSource(tmp_path).read("a"), torch.arange(1000.0))


def test_a_completed_source_adds_and_replaces() -> None:
    source = CompletedSource(MemorySource({"a": torch.zeros(1), "b": torch.zeros(2)}), {"b": torch.ones(3)})
    assert_same(source, {"a": torch.zeros(1), "b": torch.ones(3)})


def test_specs_count_without_data() -> None:
    spec = TensorSpec((3, 4), torch.bfloat16)
    assert (spec.numel, spec.bytes) == (12, 24)
    assert spec.meta().is_meta
    assert TensorSpec.of(spec.meta()) == spec
    assert TensorSpec((), torch.int64).bytes == 8

"""Random checkpoints of the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vargpt
from experiments.synthetic_checkpoint import RandomSource, main, write
from tests.convert.checkpoints import contents, published_config, published_state, random_model
from tests.models import TOKENS, index_maps, words


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    write(folder, published_config(), max_shard_bytes=20_000)
    return folder


def test_it_is_the_published_layout_in_shards(directory: Path) -> None:
    theirs, _ = published_state(random_model(published_config()))
    written = contents(directory)
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in theirs.items()}
    assert {tensor.dtype for name, tensor in written.items() if theirs[name].is_floating_point()} == {torch.bfloat16}
    assert (directory / "model.safetensors.index.json").is_file()
    assert not list(directory.parent.glob(".*"))


def test_it_loads_and_its_outputs_are_finite(directory: Path) -> None:
    model = vargpt.load(directory)
    total = sum(side * side for side in (1, 2, 3))
    ids = torch.cat((words(1, 5), torch.tensor([[TOKENS.gen_start, *[TOKENS.gen_pad] * total]])), dim=1)
    with torch.no_grad():
        out = model(ids, draw_images=index_maps((1, 2, 3), 1))
    assert out.image_logits is not None
    for logits in (out.image_logits, out.text_logits):
        assert logits.isfinite().all()
        assert logits.std() > 0.01


def test_the_seed_decides(directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "same", published_config())
    write(tmp_path / "other", published_config(), seed=1)
    first, same, other = (contents(folder) for folder in (directory, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])


def test_matrices_are_as_wide_as_their_inputs_want() -> None:
    source = RandomSource(published_config(llm={"width": 64, "mlp_width": 256}), 0)
    down = source.read("llm.blocks.0.mlp.down.weight").float()
    assert down.std() == pytest.approx(1 / 16, rel=0.05)
    assert abs(down.mean()) < 0.005
    assert (source.read("llm.norm.weight") == 1).all()


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"error: {tmp_path} exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--preset", "nano"]) == 2
    assert "error: the published layout cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

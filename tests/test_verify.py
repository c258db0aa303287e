"""Comparing checkpoints with recordings of the published code's results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.convert.checkpoints import published_config, random_model, weights, write_published
from tests.models import words
from vargpt.cli import main
from vargpt.convert import convert
from vargpt.verify import Row, verify

INPUTS = {
    "vargpt_tiny": {
        "understanding.pixel_values",
        "understanding.input_ids",
        "text_batch.input_ids",
        "text_batch.attention_mask",
        "vqvae.image",
        "var.input_embed",
        "var.cond",
        "train.input_ids",
        "train.image",
        "generate.prompt_ids",
        *(f"generate.noise.{scale}" for scale in range(4)),
    },
    "var_tiny": {"image", "label"},
}


@pytest.fixture(scope="module", params=sorted(INPUTS))
def recorded(request: pytest.FixtureRequest, golden_dir: Path) -> Path:
    return golden_dir / request.param


@pytest.fixture(scope="module")
def rows(recorded: Path) -> list[Row]:
    return verify(recorded, recorded / "golden.safetensors")


def test_every_recorded_output_is_within_tolerance(rows: list[Row]) -> None:
    assert [(row.name, row.error) for row in rows if not row.ok] == []


def test_every_recorded_output_is_compared_once(recorded: Path, rows: list[Row]) -> None:
    outputs = load_file(recorded / "golden.safetensors").keys() - INPUTS[recorded.name]
    assert sorted(row.name for row in rows) == sorted(outputs)


def test_tolerances_are_those_of_the_recordings(rows: list[Row]) -> None:
    for row in rows:
        exact = re.search(r"idx\.\d|_ids", row.name)
        assert row.tolerance == (0 if exact else 1e-3 if row.name.startswith("train.grad.") else 1e-4), row.name


def test_the_command_prints_a_line_per_tensor(
    recorded: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(recorded), "--golden", str(recorded / "golden.safetensors")]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{len(rows)} of {len(rows)} within tolerance"
    for line, row in zip(lines, rows, strict=True):
        name, error, tolerance, verdict = line.split()
        assert (name, verdict) == (row.name, "ok")
        assert float(error) == pytest.approx(row.error, rel=0.01)
        assert float(tolerance) == row.tolerance


def spoiled(source: Path, destination: Path, **changes: Tensor | None) -> Path:
    """A recorded checkpoint as one file, with tensors replaced or left out; the recording is not copied."""
    destination.mkdir()
    shutil.copy(source / "config.json", destination)
    changed = weights(source) | changes
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, destination / "model.safetensors")
    return destination


@pytest.mark.parametrize(
    ("weight", "caught"),
    [
        ("vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias", "vision.penultimate_hidden"),
        ("multi_modal_projector.linear_2.bias", "vision.projected"),
        ("language_model.model.norm.weight", "text_batch.logits"),
        ("vae_local.post_quant_conv.bias", "vqvae.recon"),
        ("vargpt_gen.head.bias", "var.decoder_logits"),
        ("image_gen_projector.mlp.0.bias", "generate.logits.0"),
    ],
)
def test_a_perturbed_weight_is_caught(
    weight: str, caught: str, vargpt_tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = weights(vargpt_tiny_dir)[weight].clone()
    tensor[0] += 0.05
    wrong = spoiled(vargpt_tiny_dir, tmp_path / "wrong", **{weight: tensor})
    assert main(["verify", str(wrong), "--golden", str(vargpt_tiny_dir / "golden.safetensors")]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert caught in failed


def test_a_converted_checkpoint_verifies(recorded: Path, tmp_path: Path, rows: list[Row]) -> None:
    convert(recorded, tmp_path / "ours")
    again = verify(tmp_path / "ours", recorded / "golden.safetensors")
    assert [(row.name, row.ok) for row in again] == [(row.name, True) for row in rows]


@pytest.fixture
def scaleless(vargpt_tiny_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A single-file checkpoint that does not tell its scales, and the recording without its ``profile.json``."""
    checkpoint = spoiled(vargpt_tiny_dir, tmp_path / "scaleless", **{"vargpt_gen.lvl_1L": None})
    golden = tmp_path / "golden.safetensors"
    shutil.copy(vargpt_tiny_dir / "golden.safetensors", golden)
    return checkpoint, golden


def test_scales_that_nothing_tells_are_asked_for(
    scaleless: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(scaleless[0]), "--golden", str(scaleless[1])]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "4 scales of 30 tokens in all" in error
    assert "--patch-nums" in error
    assert error.count("\n") == 1
    assert main([*command, "--patch-nums", "1,2,3,4"]) == 0


def test_the_profile_beside_the_recording_tells_the_scales(scaleless: tuple[Path, Path], vargpt_tiny_dir: Path) -> None:
    assert all(row.ok for row in verify(scaleless[0], vargpt_tiny_dir / "golden.safetensors"))


def test_scales_that_contradict_the_checkpoint_are_refused(vargpt_tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"patch_nums \(1, 2, 5\) contradict the checkpoint's own \(1, 2, 3, 4\)"):
        verify(vargpt_tiny_dir, vargpt_tiny_dir / "golden.safetensors", (1, 2, 5))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_published(tmp_path / "small")


def record(directory: Path, **tensors: Tensor) -> Path:
    save_file(tensors, directory / "recording.safetensors")
    return directory / "recording.safetensors"


def test_guidance_is_the_recordings_own(var_tiny_dir: Path, tmp_path: Path) -> None:
    names = {"image", "label", "logits", "var_input", "idx", "gen_logits", "gen_idx", "generated"}
    recording = load_file(var_tiny_dir / "golden.safetensors")
    golden = record(tmp_path, **{n: t for n, t in recording.items() if n.split(".")[0] in names})
    (tmp_path / "profile.json").write_text(json.dumps({"cfg": 3.0}))
    failed = {row.name for row in verify(var_tiny_dir, golden) if not row.ok}
    assert "gen_logits.1" in failed
    assert "logits" not in failed
    assert "gen_logits.0" not in failed  # the ramp starts at 0


def test_a_shape_that_differs_is_a_failure(small: Path, tmp_path: Path) -> None:
    ids = words(1, 3)
    golden = record(
        tmp_path,
        **{
            "text_batch.input_ids": ids,
            "text_batch.attention_mask": torch.ones_like(ids),
            "text_batch.logits": torch.zeros(1, 3, 7),
        },
    )
    (row,) = verify(small, golden)
    assert not row.ok
    assert row.name.startswith("text_batch.logits (shape [3, 24], recorded [3, 7])")


def test_nan_is_a_failure() -> None:
    assert not Row("x", float("nan"), 1.0).ok


def training_record(tmp_path: Path, tie: bool, grad: str) -> tuple[Path, Path, Tensor]:
    config = published_config(llm={"tie_embeddings": tie})
    model = random_model(config)
    ids = torch.tensor([[8, 9, 5, *[7] * 14, 6]])
    image = torch.linspace(-1, 1, 3 * 6 * 6).view(1, 3, 6, 6)
    out = model(ids, draw_images=image, labels=ids)
    assert out.loss is not None
    out.loss.backward()
    gradient = model.get_parameter("llm.token_embed.weight").grad
    assert gradient is not None
    recording = {"train.input_ids": ids, "train.image": image, "train.loss": out.loss.detach()[None]}
    recording |= {"train.text_logits": out.text_logits.detach(), f"train.grad.{grad}": gradient}
    return write_published(tmp_path / "small", config), record(tmp_path, **recording), gradient


@pytest.mark.parametrize("name", ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"])
def test_a_tied_heads_gradient_goes_by_either_name(name: str, tmp_path: Path) -> None:
    checkpoint, golden, _ = training_record(tmp_path, True, name)
    rows = verify(checkpoint, golden)
    assert [row.name for row in rows if row.ok] == ["train.loss", "train.text_logits", f"train.grad.{name}"]


def test_a_gradient_that_nothing_has_is_a_failure(tmp_path: Path) -> None:
    checkpoint, golden, _ = training_record(tmp_path, False, "language_model.no.such.weight")
    assert [row.name for row in verify(checkpoint, golden) if not row.ok] == [
        "train.grad.language_model.no.such.weight"
    ]


def test_what_is_not_compared_is_named(small: Path, tmp_path: Path) -> None:
    checkpoint, golden, _ = training_record(tmp_path, False, "language_model.model.embed_tokens.weight")
    save_file(load_file(golden) | {"train.more": torch.zeros(1)}, golden)
    with pytest.warns(UserWarning, match=r"also holds train\.more, with which nothing was compared"):
        verify(checkpoint, golden)


def test_an_incomplete_recording_is_refused(small: Path, tmp_path: Path) -> None:
    golden = record(tmp_path, **{"var.input_embed": torch.zeros(1, 14, 24)})
    with pytest.raises(ValueError, match=r"the recording lacks var\.cond"):
        verify(small, golden)


def test_an_unknown_recording_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records nothing that is known"):
        verify(small, record(tmp_path, something=torch.zeros(1)))


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_recording_is_refused(content: bytes | None, small: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden.safetensors"
    if content is not None:
        golden.write_bytes(content)
    with pytest.raises(ValueError, match=r"golden\.safetensors is not a readable safetensors recording"):
        verify(small, golden)

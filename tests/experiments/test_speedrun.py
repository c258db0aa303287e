"""From nothing to a report card, and scores into the texts that quote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import vargpt
from experiments import card, speedrun
from experiments.card import BEGIN, END
from vargpt import cli
from vargpt.build import build

TOKENIZER = ["vqvae.channels=16", "vqvae.vocab_size=32", "schedule.steps=3", "batch=2", "validation=4"]
VISION = ["schedule.steps=2", "batch=2", "validation=4"]
STAGE = "{name: joint, schedule: {steps: 2, lr: 0.001}, rows: {drawing: 2, question: 1, text: 2}}"
TRAIN = [f"stages=[{STAGE}]", "validation=2"]


def run(out: Path) -> int:
    changes = ["--tokenizer", *TOKENIZER, "--vision", *VISION, "--train", *TRAIN]
    return speedrun.main(["--out", str(out), "--n", "6", *changes])


def distance_of(a: object, b: object) -> float:
    """The largest difference of two modules' weights."""
    assert isinstance(a, nn.Module)
    assert isinstance(b, nn.Module)
    theirs = b.state_dict()
    return max((x - theirs[name]).abs().max().item() for name, x in a.state_dict().items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "speedrun"
    assert run(out) == 0
    return out


def test_a_speedrun_leaves_a_report_with_its_pictures(finished: Path) -> None:
    report = (finished / "report.md").read_text()
    scores = json.loads((finished / "scores.json").read_text())
    assert all(f"| {part} |" in report for part in ("image tokenizer", "vision encoder", "model", "scores"))
    seen, trained = (vargpt.load(finished / part / "model").vision for part in ("vision", "model/joint"))
    start = build(vargpt.preset("nano")).vision
    distance = [distance_of(trained, seen), distance_of(trained, start)]
    assert distance[0] < distance[1] / 10  # the model began with the encoder that had been trained for it
    for name in ("tokenizer.exact", "questions.all", "drawing.mean", "draws_when_asked"):
        assert name in report
        assert name in scores
    pictures = [part.split(")")[0] for part in report.split("](")[1:]]
    assert len(pictures) == 3
    assert all((finished / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_finished_speedrun_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [
        "scores.json",
        "tokenizer/metrics.jsonl",
        "vision/metrics.jsonl",
        "model/joint/metrics.jsonl",
        "model/joint/model/model.safetensors",
    ]
    before = [(finished / name).stat().st_mtime_ns for name in kept]
    (finished / "report.md").unlink()
    assert run(finished) == 0
    assert [(finished / name).stat().st_mtime_ns for name in kept] == before
    assert capsys.readouterr().out.strip() == str(finished / "report.md")
    assert (finished / "report.md").is_file()


def test_mistakes_in_a_speedrun_get_one_line_before_anything_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speedrun.main(["--out", str(tmp_path / "run"), "--train", "preset=huge"]) == 2
    assert speedrun.main(["--out", str(tmp_path / "run"), "--tokenizer", "batch=many"]) == 2
    assert speedrun.main(["--out", str(tmp_path / "run"), "--vision", "world=flat"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith("error: ")
    assert "huge" in errors[0]
    assert "many" in errors[1]
    assert "flat" in errors[2]
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_card_is_filled_in_and_filled_again(finished: Path, tmp_path: Path) -> None:
    text = tmp_path / "card.md"
    text.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    model = finished / "model" / "joint" / "model"
    for n in (6, 7):
        assert card.main([str(model), "--world", "nano", "--n", str(n), "--texts", str(text)]) == 0
    filled = text.read_text()
    assert filled.startswith(f"Before.\n{BEGIN}\n")
    assert filled.endswith(f"{END}\nAfter.\n")
    assert "old" not in filled
    assert "n = 7 unseen scenes" in filled
    assert "n = 6" not in filled
    scores = json.loads((model / "scores.json").read_text())
    assert f"| draws when asked, and only then | {scores['draws_when_asked']:.3f} |" in filled
    assert (model / "drawings.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_without_a_place_for_scores_is_refused_and_kept(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "card.md"
    text.write_text("No place here.\n")
    model = finished / "model" / "joint" / "model"
    scores = model / "scores.json"
    scores.write_text("kept")
    assert card.main([str(model), "--world", "nano", "--n", "6", "--texts", str(text)]) == 2
    assert "has no place for scores" in capsys.readouterr().err
    assert text.read_text() == "No place here.\n"
    assert scores.read_text() == "kept"  # nothing was scored in vain
    assert card.main([str(model), "--texts", str(tmp_path / "nowhere.md")]) == 2
    assert "nowhere.md has no place for scores" in capsys.readouterr().err


def test_a_model_of_a_small_world_says_what_it_has_never_read(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(finished / "model" / "joint" / "model"), "--out", str(tmp_path / "a.png")]
    assert cli.main(["draw", "a red Castle beside a circle", *options]) == 0
    note = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert note == [
        "note: the model has never read 'castle', 'beside': it draws one to two shapes (circle, square, triangle), "
        "each red, green, blue or yellow"
    ]
    assert cli.main(["draw", "a red circle left of a square", *options]) == 0
    assert "note:" not in capsys.readouterr().err

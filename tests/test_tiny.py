"""The embedded model does its job with nothing to download; its scores are what the texts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import vargpt
from experiments import card
from experiments.data.shapes import FULL, render
from experiments.data.shapes_judge import PromptSpec, Wanted, judge
from experiments.data.shapes_parser import parse
from vargpt import cli
from vargpt.checkpoint import ASSETS
from vargpt.model import VARGPT

TINY = ASSETS / "tiny"


@pytest.fixture(scope="module")
def tiny() -> VARGPT:
    return vargpt.load()


def test_it_draws_what_it_is_asked_for(tiny: VARGPT) -> None:
    wants = [Wanted("circle", "red"), Wanted("star", "blue"), Wanted("square", "green"), Wanted("ring", "orange")]
    prompts = [f"{'an' if w.colour == 'orange' else 'a'} {w.name}" for w in wants]
    drawn = vargpt.draw(tiny, prompts, n=3, seed=0)
    asked = [PromptSpec(category="colours", wanted=(want,), prompt="") for want in wants for _ in range(3)]
    right = [judge(spec, parse(image, FULL)) for spec, image in zip(asked, drawn.images, strict=True)]
    assert sum(right) >= 8  # of 12, where chance is 1 in 48


def test_it_answers_about_pictures(tiny: VARGPT) -> None:
    right = 0
    for i in range(12):
        scene = FULL.sample("test", i)
        answer = vargpt.ask(tiny, Image.fromarray(render(scene, 64)), "How many objects are there?")
        right += answer == ("zero", "one", "two", "three")[len(scene.objects)]
    assert right >= 7  # of 12, where chance is 4


def test_the_commands_use_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    assert cli.main(["draw", "a red circle left of a blue square", "-o", str(picture)]) == 0
    assert "note:" not in capsys.readouterr().err
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    assert cli.main(["ask", str(picture), "How many objects are there?"]) == 0
    assert capsys.readouterr().out.strip() in ("one", "two", "three")
    assert cli.main(["draw", "a cat", "-o", str(picture)]) == 0
    assert "note: the model has never read 'cat': it draws one to three shapes" in capsys.readouterr().err


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 40 * 2**20


@pytest.mark.parametrize("text", [TINY / "README.md", card.README], ids=["card", "readme"])
def test_the_texts_quote_its_scores(text: Path) -> None:
    scores = json.loads((TINY / "scores.json").read_text())
    table = text.read_text().split(card.BEGIN)[1].split(card.END)[0]
    for name, label in card.SHOWN.items():
        assert f"| {label} | {scores[name]:.3f} |" in table

"""Scores: what is right counts, what is wrong does not, and one command writes it all down."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import vargpt
from experiments import evaluate
from experiments.data.chat import Example, Kind, collate
from experiments.data.shapes import NANO as WORLD
from experiments.data.shapes import render
from experiments.data.shapes_chat import ShapeChats
from experiments.data.shapes_judge import CATEGORIES, fulfil
from experiments.evaluate import Settings, Share
from vargpt.build import build
from vargpt.checkpoint import ASSETS
from vargpt.config import NANO
from vargpt.losses import IGNORE
from vargpt.model import VARGPT
from vargpt.text import IMAGE_GEN, SentencePieceTokenizer

SMALL = Settings(n=12, batch=6)


@pytest.fixture(scope="module")
def model() -> VARGPT:
    return build(NANO, tokenizer=SentencePieceTokenizer.from_directory(ASSETS / "tiny", vocab_size=640)).eval()


def test_an_interval_holds_the_share_and_narrows() -> None:
    few, many = Share(hits=9, of=10), Share(hits=900, of=1000)
    for share in (few, many, Share(hits=0, of=5), Share(hits=5, of=5)):
        low, high = share.interval
        assert 0 <= low <= share.value <= high <= 1
    assert few.interval[0] < many.interval[0] < many.interval[1] < few.interval[1]
    assert Share(hits=8, of=10).interval == pytest.approx((0.4902, 0.9433), abs=1e-3)  # Wilson's, from tables


def test_a_model_that_draws_what_is_asked_scores_one(model: VARGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(_: object, specs: list, *__: object) -> list[Image.Image]:
        return [Image.fromarray(render(fulfil(spec, WORLD, Random(i)), 32)) for i, spec in enumerate(specs)]

    monkeypatch.setattr(evaluate, "pictures", right)
    for heldout in (False, True):
        scores = evaluate.drawing_scores(model, WORLD, SMALL, heldout=heldout)
        assert all(share.value == 1 for share in scores.values())
    blank = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    monkeypatch.setattr(evaluate, "pictures", lambda _, specs, *__: [blank] * len(specs))
    assert evaluate.drawing_scores(model, WORLD, SMALL)["drawing.mean"].value == 0


def test_answers_and_intent_are_judged_to_the_letter(model: VARGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answering(_: object, contents: list, *, max_new_tokens: int) -> list[tuple[str, bool]]:
        asked.extend(content[-1] for content in contents)
        return [("yes", len(content) == 1) for content in contents]  # draws where there is no picture to ask about

    monkeypatch.setattr(evaluate, "respond", answering)
    scores = evaluate.question_scores(model, WORLD, Settings(n=200, batch=100))
    assert 0 < scores["questions.existence"].value < 1
    assert scores["questions.colour"].value == 0
    assert scores["questions.all"].of == 200
    assert evaluate.intent_scores(model, WORLD, SMALL)["draws_when_asked"].value == 1


def test_one_command_writes_table_scores_and_pictures(
    capsys: pytest.CaptureFixture[str], model: VARGPT, tmp_path: Path
) -> None:
    vargpt.save(model, tmp_path / "model", tokenizer_from=ASSETS / "tiny")
    scores, sheet = tmp_path / "scores.json", tmp_path / "sheet.png"
    arguments = [str(tmp_path / "model"), "--world", "nano", "--n", "12", "--seed", "3"]
    assert evaluate.main([*arguments, "--json", str(scores), "--grid", str(sheet)]) == 0
    out = capsys.readouterr().out
    written = json.loads(scores.read_text())
    for name in ("tokenizer.exact", "questions.all", "drawing.mean", "heldout.mean", "draws_when_asked"):
        assert f"| {name} | {written[name]:.3f} |" in out
    assert {f"drawing.{category}" for category in CATEGORIES} <= written.keys()
    with Image.open(sheet) as image:
        assert image.width > image.height / len(CATEGORIES) * 2
    assert evaluate.main([*arguments, "--n", "0"]) == 2
    assert "error: --n must be at least 1" in capsys.readouterr().err


def test_only_the_assistants_words_are_learned(model: VARGPT) -> None:
    source = ShapeChats("nano", 32, plan=True)
    for kind in get_args(Kind):
        examples = [source.example(kind, 0, i, "train") for i in range(4)]
        batch = collate(model, examples)
        assert model.tokenizer is not None
        for row, example in enumerate(examples):
            labels = batch.labels[row][batch.labels[row] != IGNORE].tolist()
            learned = model.tokenizer.decode([i for i in labels if i != 639])
            said = [m["content"].removesuffix(IMAGE_GEN) for m in example.messages if m["role"] == "assistant"]
            assert "".join(learned.split()) == "".join("".join(said).split())  # turns meet without a space
            assert labels.count(model.tokens.eos) == len(said)
            assert labels[-1] == model.tokens.eos
            if kind == "drawing":
                assert model.var is not None
                drawn = [637, *[639] * model.var.schedule.total, 638, 2]
                assert labels[-len(drawn) :] == drawn
                assert 639 not in labels[: -len(drawn)]
        assert (batch.drawings is not None) == (kind == "drawing")
        assert (batch.pixel_values is not None) == (kind == "question")


def test_pictures_without_marks_are_refused(model: VARGPT) -> None:
    messages = [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "<image_gen>"}]
    with pytest.raises(ValueError, match="1 <image_gen> marks do not match 0 pictures"):
        collate(model, [Example(messages=messages)])
    with pytest.raises(ValueError, match="0 <image> marks do not match 1 pictures"):
        collate(
            model,
            [Example(messages=messages, images=[Image.new("RGB", (8, 8))], drawings=[torch.zeros(3, 32, 32)])],
        )

"""Conversations from record files, in both forms, with and without cached image tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

import experiments.data
from experiments.data.chat import Mixture, collate
from experiments.data.pictures import Picture
from experiments.data.records import Record, RecordFiles, Records
from experiments.data.shapes_chat import ShapeChats
from experiments.data.token_cache import TokenCache
from experiments.run import settings
from experiments.train import Rows, Training, without_prompt
from experiments.validate_data import validate
from vargpt.build import build
from vargpt.checkpoint import ASSETS
from vargpt.config import NANO
from vargpt.model import VARGPT
from vargpt.text import SentencePieceTokenizer

PHOTOS = ("astronaut", "chelsea", "coffee")
NAMED = [f"stages.{stage}.data.{i}.records=x" for stage, count in enumerate((1, 3, 2)) for i in range(count)]
PUBLISHED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "What is this? <image>"},
        {"role": "assistant", "content": "A cat. Here is another view: <image_gen>"},
    ],
    "images": ["chelsea.png", "coffee.png"],
}
LLAVA = {
    "id": "7",
    "image": "astronaut.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWho is this?"},
        {"from": "gpt", "value": "An astronaut."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
TEXT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}


@pytest.fixture(scope="module")
def model() -> VARGPT:
    return build(NANO, tokenizer=SentencePieceTokenizer.from_directory(ASSETS / "tiny", vocab_size=640)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in PHOTOS:
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{name}.png")
    return tmp_path


def written(folder: Path, rows: list[Any], *, lines: bool = False) -> Path:
    file = folder / "records.json"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return file


def read(file: Path) -> RecordFiles:
    return RecordFiles([file])


@pytest.mark.parametrize("lines", [False, True])
def test_both_forms_become_examples(folder: Path, model: VARGPT, lines: bool) -> None:
    records = read(written(folder, [PUBLISHED, LLAVA, TEXT], lines=lines))
    assert [record.kind for record in records.scan() if isinstance(record, Record)] == ["drawing", "question", "text"]
    source = Records(records, 32)
    assert set(source.kinds()) == {"drawing", "question", "text"}
    both = source.example("drawing", 0, 0, "train")
    assert both.images[0].size == (451, 300)
    assert [d.shape for d in both.drawings if isinstance(d, torch.Tensor)] == [(3, 32, 32)]
    asked = source.example("question", 0, 0, "train")
    assert [m["role"] for m in asked.messages] == ["user", "assistant"] * 2
    assert asked.messages[1]["content"] == "An astronaut."
    batch = collate(model, [both, asked, source.example("text", 0, 0, "train")])
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == 2
    assert batch.drawings is not None
    assert len(batch.drawings[0]) == 1


def test_every_record_comes_once_each_time_through(folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}, *TEXT["messages"][1:]]} for i in range(19)]
    source = Records(read(written(folder, rows)), 32)
    first, second = (
        [source.example("text", 0, 19 * time + i, "train").messages[0]["content"] for i in range(19)]
        for time in range(2)
    )
    assert sorted(first) == sorted(second) == sorted(map(str, range(19)))
    assert first != second
    assert first != [source.example("text", 1, i, "train").messages[0]["content"] for i in range(19)]


def test_validation_records_are_not_trained_on(folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}, *TEXT["messages"][1:]]} for i in range(60)]
    source = Records(read(written(folder, rows)), 32)
    texts = {
        split: {source.example("text", 0, i, split).messages[0]["content"] for i in range(200)}
        for split in ("train", "validation")
    }
    assert len(texts["train"]) == 57
    assert len(texts["validation"]) == 3
    assert texts["train"].isdisjoint(texts["validation"])


def test_random_crops_follow_from_seed_and_number(folder: Path) -> None:
    source = Records(read(written(folder, [PUBLISHED])), 32)

    def drawing(index: int) -> torch.Tensor:
        drawn = source.example("drawing", 0, index, "train").drawings[0]
        assert isinstance(drawn, torch.Tensor)
        return drawn

    assert torch.equal(drawing(0), drawing(0))
    assert not torch.equal(drawing(0), drawing(1))


def test_cached_tokens_are_those_of_the_picture(folder: Path, model: VARGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.vqvae is not None
    paths = [Picture(record="line 1", file=folder / f"{name}.png") for name in PHOTOS]
    cache = TokenCache(folder / "tokens", paths, model.vqvae, torch.device("cpu"), batch=2)
    records = read(written(folder, [PUBLISHED]))
    batches = [
        collate(model, [Records(records, 32, kept).example("drawing", 0, 0, "validation")]).drawings
        for kept in (None, cache)
    ]
    assert batches[0] is not None
    assert batches[1] is not None
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    files = sorted((folder / "tokens").iterdir())
    monkeypatch.setattr(type(model.vqvae), "encode", lambda *_: pytest.fail("tokenized twice"))
    again = TokenCache(folder / "tokens", paths, model.vqvae, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(cache.tokens(paths[0]), again.tokens(paths[0]), strict=True))
    monkeypatch.undo()
    other = build(NANO, seed=1).vqvae  # other weights have other tokens
    assert other is not None
    TokenCache(folder / "tokens", paths, other, torch.device("cpu"))
    assert len(files) == 1
    assert len(list((folder / "tokens").iterdir())) == 2


def test_a_conversation_loses_its_prompt_and_keeps_its_drawings(folder: Path, model: VARGPT) -> None:
    several = {**PUBLISHED, "messages": [*PUBLISHED["messages"], *TEXT["messages"]]}
    example = Records(read(written(folder, [several])), 32).example("drawing", 0, 0, "train")
    silent = without_prompt(example)
    batch = collate(model, [silent])
    assert batch.pixel_values is None
    assert batch.drawings is not None
    assert [m["content"] for m in silent.messages] == ["", "<image_gen>"]


def test_a_mixture_follows_its_weights(folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "mine"}, *TEXT["messages"][1:]]}]
    records = Records(read(written(folder, rows)), 32)
    mixture = Mixture([ShapeChats("nano", 32, plan=False), records], [1.0, 3.0])
    assert set(mixture.kinds()) == {"drawing", "question", "text"}
    mine = [mixture.example("text", 0, i, "train").messages[0]["content"] == "mine" for i in range(2000)]
    assert 0.7 < sum(mine) / 2000 < 0.8
    assert mixture.example("drawing", 0, 0, "train").drawings  # of the only source that has any


def test_mixed_examples_keep_the_published_proportions(folder: Path) -> None:
    """Those of stage 2: LLaVA-1.5, OneVision and a few drawings; a kind is as frequent as the records that have it."""
    _, config = settings("train", Training, ["published", "tokenizer=x", "start=[]", *NAMED])
    kinds = ([LLAVA, LLAVA, TEXT], [LLAVA], [PUBLISHED])
    sources = []
    for i, rows in enumerate(kinds):
        file = written(folder, rows).rename(folder / f"{i}.json")
        sources.append(Records(read(file), 32))
    mixture = Mixture(sources, [data.weight for data in config.stages[1].data])
    assert config.stages[1].rows == Rows(mixed=8)
    assert [data.weight for data in config.stages[2].data] == [130, 1270]
    picked = Counter(mixture.any_example(0, i)[0] for i in range(1000))
    total = 665 + 508 + 5
    assert mixture.kinds() == pytest.approx(
        {"question": (665 * 2 / 3 + 508) / total, "text": 665 / 3 / total, "drawing": 5 / total}
    )
    for kind, share in mixture.kinds().items():
        assert picked[kind] == pytest.approx(1000 * share, abs=4 * (1000 * share) ** 0.5)
    assert mixture.any_example(0, 7) == mixture.any_example(0, 7)


def test_a_file_without_usable_records_is_refused(folder: Path) -> None:
    file = written(folder, [{"messages": []}])
    with pytest.raises(ValueError, match=r"records.json holds no record that can be trained on"):
        Records(read(file), 32, bad="skip")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "record 0 of .* has neither messages nor conversations"),
        ([1], "record 0 of .* must be an object, not list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a turn needs a role .* not 'robot' and 'x'"),
        ({**PUBLISHED, "images": ["chelsea.png"]}, r"has 2 placeholders .* for 1 pictures"),
        ({**LLAVA, "image": None}, r"has 1 placeholders .* for 0 pictures"),
    ],
)
def test_bad_records_are_named(folder: Path, row: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Records(read(written(folder, [row])), 32)


def test_the_photographs_of_scikit_image_have_records_in_both_forms() -> None:
    photographs = Path(experiments.data.__file__).parent / "photographs.jsonl"
    assert validate([str(photographs)], Path(skimage.data.__file__).parent) == 0
    text = photographs.read_text()
    assert text.count('"messages"') == text.count('"conversations"') > 10

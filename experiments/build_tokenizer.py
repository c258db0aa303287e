"""Trains the vocabulary of the embedded tiny model: ``python -m experiments.build_tokenizer [DIRECTORY]``.

LLaMA's recipe (sentencepiece BPE, byte fallback, identity normalization, no space removed) on sentences of the small
world, with more shapes and colours than it has; but numbers stay whole, so that a coordinate is one token. 635 pieces
and 5 special tokens: 640 ids. The same corpus and sentencepiece give the same file, byte for byte.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from experiments.data.shapes import LAYOUT, NUMBERS, PLACES, RELATIONS, REQUESTS, article, plural
from vargpt.checkpoint import ASSETS

PIECES = 635  # enough for every colour, shape, size, relation, number word and coordinate to be one piece
SPECIAL = ("<image>", "<pad>", "<image_gen_start>", "<image_gen_end>", "<image_gen_pad>")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = (
    *("red", "green", "blue", "yellow", "purple", "orange"),
    *("cyan", "pink", "brown", "black", "white", "grey"),
)
SIZES = ("small", "large", "tiny", "big")


def corpus(conversations: int = 3000, seed: int = 0) -> Iterator[str]:
    """Conversations as they are written down for training, one line per turn."""
    rng = random.Random(seed)
    for _, turn in zip(range(conversations), itertools.cycle((_drawing, _colour, _count, _relation, _caption, _plan))):
        question, answer = turn(rng)
        yield f"USER: {question} ASSISTANT: {answer}"


def _object(rng: random.Random) -> str:
    size, colour, shape = rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)
    return rng.choice((f"{size} {colour} {shape}", f"{colour} {shape}", f"{size} {shape}"))


def _scene(rng: random.Random) -> str:
    first, second = article(_object(rng)), article(_object(rng))
    several = f"{rng.choice(NUMBERS[2:4])} {plural(_object(rng))}"
    return rng.choice((first, several, f"{first} {rng.choice(tuple(RELATIONS))} {second}", f"{first} and {second}"))


def _drawing(rng: random.Random) -> tuple[str, str]:
    return rng.choice(REQUESTS[:-1]).format(_scene(rng)), rng.choice(("Here it is.", "Here is the drawing."))


def _colour(rng: random.Random) -> tuple[str, str]:
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    if rng.random() < 0.5:
        return f"What colour is the {shape}?", rng.choice((f"The {shape} is {colour}.", colour))
    return f"Is the {shape} {colour}?", rng.choice(("yes", "no", f"No, it is {colour}."))


def _count(rng: random.Random) -> tuple[str, str]:
    number, shape, colour = rng.randrange(len(NUMBERS)), rng.choice(SHAPES), rng.choice(COLOURS)
    what = rng.choice(("objects", plural(shape), f"{colour} {plural(shape)}", f"{colour} objects"))
    spelled = NUMBERS[number]
    there = f"There is one {shape}." if number == 1 else f"There are {spelled} {what}."
    return f"How many {what} are there?", rng.choice((there, spelled, f"{number}"))


def _relation(rng: random.Random) -> tuple[str, str]:
    first, second, relation = _object(rng), _object(rng), rng.choice(tuple(RELATIONS))
    if rng.random() < 0.5:
        return f"Where is the {first}?", f"It is {relation} the {second}."
    return f"Is the {first} {relation} the {second}?", rng.choice(("yes", "no", "Yes, it is.", "No, it is not."))


def _caption(rng: random.Random) -> tuple[str, str]:
    questions = ("What is in the picture?", "Describe the image.", "What do you see?", "What shape is this?")
    answers = ("The picture shows {}.", "There is {}.", "I see {} on a {background} background.", "It is {}.")
    return rng.choice(questions), rng.choice(answers).format(_scene(rng), background=rng.choice(COLOURS))


def _plan(rng: random.Random) -> tuple[str, str]:
    """Places in hundredths of the side, as multiples of 1/32."""
    plan = ", ".join(
        f"{100 * rng.randrange(33) / 32:.0f} {100 * rng.randrange(33) / 32:.0f} {_object(rng)}"
        for _ in range(rng.randint(1, 3))
    )
    if rng.random() < 0.5:
        return LAYOUT.format(_scene(rng)), plan
    return PLACES, plan


def build(directory: Path) -> None:
    """Writes ``tokenizer.model`` and ``added_tokens.json``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    added = {name: PIECES + i for i, name in enumerate(SPECIAL)}
    (directory / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "tiny")

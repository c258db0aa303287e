"""Trains the vocabulary of the embedded tiny model: ``python vargpt/assets/build_tokenizer.py [DIRECTORY]``.

LLaMA's recipe (sentencepiece BPE, byte fallback, identity normalization, no space removed) on sentences about coloured
shapes, made up here; but numbers stay whole, so that a coordinate is one token. 635 pieces and 5 special tokens: 640
ids. The same corpus and sentencepiece give the same file, byte for byte.
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

PIECES = 635  # enough for every colour, shape, size, relation, number word and coordinate to be one piece
SPECIAL = ("<image>", "<pad>", "<image_gen_start>", "<image_gen_end>", "<image_gen_pad>")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = (
    *("red", "green", "blue", "yellow", "purple", "orange"),
    *("cyan", "pink", "brown", "black", "white", "grey"),
)
SIZES = ("small", "large", "tiny", "big")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
REQUESTS = (
    "Please design a drawing of {}.",
    "Please create a painting of {}.",
    "Could you create an image of {}?",
    "Can you draw {}?",
    "Please draw {}.",
    "I need a picture of {}.",
    "Generate an image of {}.",
    "Draw {}.",
)


def corpus(conversations: int = 3000, seed: int = 0) -> Iterator[str]:
    """Conversations as they are written down for training, one line per turn."""
    rng = random.Random(seed)
    for _, turn in zip(range(conversations), itertools.cycle((_drawing, _colour, _count, _relation, _caption, _plan))):
        question, answer = turn(rng)
        yield f"USER: {question} ASSISTANT: {answer}"


def _object(rng: random.Random) -> str:
    size, colour, shape = rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)
    return rng.choice((f"{size} {colour} {shape}", f"{colour} {shape}", f"{size} {shape}"))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _scene(rng: random.Random) -> str:
    first, second = _article(_object(rng)), _article(_object(rng))
    several = f"{rng.choice(COUNTS[2:4])} {_plural(_object(rng))}"
    return rng.choice((first, several, f"{first} {rng.choice(RELATIONS)} {second}", f"{first} and {second}"))


def _drawing(rng: random.Random) -> tuple[str, str]:
    return rng.choice(REQUESTS).format(_scene(rng)), rng.choice(("Here it is.", "Here is the drawing."))


def _colour(rng: random.Random) -> tuple[str, str]:
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    if rng.random() < 0.5:
        return f"What colour is the {shape}?", rng.choice((f"The {shape} is {colour}.", colour))
    return f"Is the {shape} {colour}?", rng.choice(("yes", "no", f"No, it is {colour}."))


def _count(rng: random.Random) -> tuple[str, str]:
    number, shape, colour = rng.randrange(len(COUNTS)), rng.choice(SHAPES), rng.choice(COLOURS)
    what = rng.choice(("objects", _plural(shape), f"{colour} {_plural(shape)}", f"{colour} objects"))
    spelled = COUNTS[number]
    there = f"There is one {shape}." if number == 1 else f"There are {spelled} {what}."
    return f"How many {what} are there?", rng.choice((there, spelled, f"{number}"))


def _relation(rng: random.Random) -> tuple[str, str]:
    first, second, relation = _object(rng), _object(rng), rng.choice(RELATIONS)
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
        return f"Where would you put {_scene(rng)}?", plan
    return "List all objects with their places.", plan


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
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny")

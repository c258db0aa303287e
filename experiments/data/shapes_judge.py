"""Scores drawings like GenEval, with the exact parser in place of a detector.

Six categories, each a generator of prompts. One judgement for all: what was read from the picture must be what the
prompt names, one to one and nothing else, and stand as it says. GenEval forgives further objects; this does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from experiments.data.shapes import (
    NUMBERS,
    RELATIONS,
    REQUESTS,
    Object,
    Scene,
    World,
    article,
    listing,
    plural,
)


@dataclass(frozen=True)
class Wanted:
    """An object of a prompt, which leaves open what is None."""

    shape: str
    colour: str | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape

    def fits(self, o: Object) -> bool:
        return o.shape == self.shape and self.colour in (None, o.colour)


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """``prompt`` is what the model is told, ``relation`` how the first object is to stand to the second, if at all."""

    category: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    prompt: str


def stands(a: Object, b: Object, relation: str) -> bool:
    """Whether ``a`` is left of ``b`` (say): as in GenEval, the direction is within 60 degrees of it."""
    dx, dy = RELATIONS[relation]
    along, across = (a.x - b.x) * dx + (a.y - b.y) * dy, (a.x - b.x) * dy - (a.y - b.y) * dx
    return along > 0 and 3 * along**2 >= across**2


def judge(spec: PromptSpec, parsed: Sequence[Object]) -> bool:
    """Whether the picture is what the prompt says, and nothing else."""
    return len(parsed) == len(spec.wanted) and any(
        all(want.fits(o) for want, o in zip(spec.wanted, order, strict=True))
        and (spec.relation is None or stands(order[0], order[1], spec.relation))
        for order in permutations(parsed)
    )


Pairs = Sequence[tuple[str, str]]  # of colour and shape that a prompt may name
_Idea = tuple[list[Wanted], str | None, str]  # wanted, relation, caption


def _single_object(world: World, pairs: Pairs, rng: Random) -> _Idea:
    want = Wanted(rng.choice(world.shapes))
    return [want], None, article(want.name)


def _two_objects(world: World, pairs: Pairs, rng: Random) -> _Idea:
    wanted = [Wanted(shape) for shape in rng.sample(world.shapes, 2)]
    return wanted, None, listing(want.name for want in wanted)


def _counting(world: World, pairs: Pairs, rng: Random) -> _Idea:
    want, n = Wanted(rng.choice(world.shapes)), rng.randint(2, world.max_objects)
    return [want] * n, None, f"{NUMBERS[n]} {plural(want.name)}"


def _colours(world: World, pairs: Pairs, rng: Random) -> _Idea:
    colour, shape = rng.choice(pairs)
    want = Wanted(shape, colour)
    return [want], None, article(want.name)


def _position(world: World, pairs: Pairs, rng: Random) -> _Idea:
    a, b = (Wanted(shape) for shape in rng.sample(world.shapes, 2))
    relation = rng.choice(sorted(RELATIONS))
    return [a, b], relation, f"{article(a.name)} {relation} {article(b.name)}"


def _attribution(world: World, pairs: Pairs, rng: Random) -> _Idea:
    while True:
        (colour, shape), (other_colour, other_shape) = rng.sample(list(pairs), 2)
        if colour != other_colour and shape != other_shape:
            break
    wanted = [Wanted(shape, colour), Wanted(other_shape, other_colour)]
    return wanted, None, listing(want.name for want in wanted)


CATEGORIES: dict[str, Callable[[World, Pairs, Random], _Idea]] = {
    "single_object": _single_object,
    "two_objects": _two_objects,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "attribution": _attribution,
}
NAMING_PAIRS = ("colours", "attribution")
"""The categories whose prompts name pairs of colour and shape, so that they have a held-out score."""


def prompt(category: str, world: World, rng: Random, *, heldout: bool = False) -> PromptSpec:
    """A request of this category, of pairs that are seen in training or of those that never are."""
    if heldout and category not in NAMING_PAIRS:
        raise ValueError(f"prompts of {category!r} name no colours: ask for one of {', '.join(NAMING_PAIRS)}")
    wanted, relation, caption = CATEGORIES[category](world, world.heldout if heldout else world.seen, rng)
    request = rng.choice(REQUESTS).format(caption)
    return PromptSpec(category=category, wanted=tuple(wanted), relation=relation, prompt=request)


def fulfil(spec: PromptSpec, world: World, rng: Random) -> Scene:
    """A scene that is right for the prompt: rendered and read back, it tells what a tokenizer or parser costs."""
    kinds = []
    for want in spec.wanted:
        colours = [c for c, shape in world.seen if shape == want.shape]
        kinds.append((want.colour or rng.choice(colours), want.shape, rng.choice(world.sizes)))
    while not judge(spec, (scene := world.arrange(kinds, rng)).objects):
        pass
    return scene

"""A small world of coloured shapes: scenes, pictures of them, and exact things to say about them.

A scene is a set of objects on white. Scene ``i`` of a split follows from (seed, split, i) alone, so any worker can
make any scene. No scene is in two splits, whatever the seeds, and of some pairs of colour and shape no scene but those
of the split ``heldout`` has any. ``shapes_parser`` reads pictures back, ``shapes_judge`` scores drawings.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {  # far from each other and from white, thinned by white too
    "red": (220, 25, 35),
    "green": (15, 150, 45),
    "blue": (30, 60, 225),
    "yellow": (255, 225, 0),
    "purple": (150, 40, 175),
    "orange": (255, 130, 0),
    "cyan": (30, 205, 225),
    "black": (15, 15, 15),
}
RADII = {"small": 0.11, "large": 0.155}  # half the side of the bounding box, as a share of the picture's side
EDGE = 1 / 32  # at least this far from the border
QUANTUM = 1 / 32  # of positions: two pixels of 64

Plane = NDArray[np.floating]
Split = Literal["train", "validation", "test", "heldout"]


# ------------------------------------------------------------------ scenes


@dataclass(frozen=True, kw_only=True)
class Object:
    """``x``, ``y``: the middle of its bounding box, as shares of the picture's side, ``y`` downwards."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def name(self, attributes: Sequence[str] = ("size", "colour", "shape")) -> str:
        return " ".join(getattr(self, attribute) for attribute in attributes)


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """What can be in a scene: a level of difficulty.

    Objects stand on the points of a square lattice with ``pitch`` between them, the middle of the picture among them,
    plus or minus up to ``jitter``. Their bounding boxes keep ``gap`` apart. All are shares of the picture's side.
    """

    name: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    max_objects: int
    pitch: float
    jitter: float
    gap: float = 1 / 16  # two pixels of 32: blur does not close it

    @cached_property
    def heldout(self) -> tuple[tuple[str, str], ...]:
        """Pairs of colour and shape that are never trained on: one of each shape, each of another colour."""
        return tuple((self.colours[(i + 3) % len(self.colours)], shape) for i, shape in enumerate(self.shapes))

    @cached_property
    def seen(self) -> tuple[tuple[str, str], ...]:
        """All other pairs."""
        return tuple((c, s) for c in self.colours for s in self.shapes if (c, s) not in self.heldout)

    @cached_property
    def lattice(self) -> tuple[float, ...]:
        reach = 0.5 - EDGE - max(RADII[size] for size in self.sizes) - self.jitter
        steps = math.floor(reach / self.pitch)
        return tuple(0.5 + k * self.pitch for k in range(-steps, steps + 1))

    def sayable(self, levels: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Those ``levels`` of detail that say something here: no sizes where there is only one."""
        return [level for level in levels if "size" not in level or len(self.sizes) > 1]

    def scene(self, rng: Random, *, heldout: bool = False) -> Scene:
        """One object to ``max_objects``, n of them n times as often as one; a quarter of those with several, alike."""
        pairs = self.heldout if heldout else self.seen
        numbers = range(1, self.max_objects + 1)
        n = rng.choices(numbers, weights=numbers)[0]
        kinds = [(*rng.choice(pairs), rng.choice(self.sizes)) for _ in range(n)]
        if rng.random() < 1 / 4:
            kinds = kinds[:1] * n
        return self.arrange(kinds, rng)

    def arrange(self, kinds: Sequence[tuple[str, str, str]], rng: Random) -> Scene:
        """Objects of these colours, shapes and sizes, somewhere."""
        for _ in range(10_000):
            objects: list[Object] = []
            for colour, shape, size in kinds:
                x, y = self._position(rng), self._position(rng)
                if any(max(abs(x - o.x), abs(y - o.y)) < RADII[size] + RADII[o.size] + self.gap for o in objects):
                    break
                objects.append(Object(shape=shape, colour=colour, size=size, x=x, y=y))
            else:
                return Scene(tuple(objects))
        raise ValueError(f"{len(kinds)} objects do not fit into world {self.name!r}: lower gap or max_objects")

    def _position(self, rng: Random) -> float:
        reach = round(self.jitter / QUANTUM)
        return rng.choice(self.lattice) + rng.randint(-reach, reach) * QUANTUM

    def sample(self, split: Split, index: int, *, seed: int = 0) -> Scene:
        """Scene ``index`` of a split. Training has 6/8 of all scenes of seen pairs, the other two 1/8 each."""
        rng = Random(f"{self.name} {split} {seed} {index}")
        if split == "heldout":
            return self.scene(rng, heldout=True)
        while split_of(scene := self.scene(rng)) != split:
            pass
        return scene


def split_of(scene: Scene) -> Split:
    """The split that a scene of seen pairs belongs to, by its content."""
    content = repr(sorted(map(astuple, scene.objects))).encode()
    bucket = hashlib.blake2b(content, digest_size=4).digest()[0] % 8
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


NANO = World(
    name="nano",
    shapes=("circle", "square", "triangle"),
    colours=("red", "green", "blue", "yellow"),
    sizes=("large",),
    max_objects=2,
    pitch=1 / 8,
    jitter=0.0,
)
FULL = World(
    name="full",
    shapes=("circle", "square", "triangle", "star", "cross", "ring"),
    colours=("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black"),
    sizes=("small", "large"),
    max_objects=3,
    pitch=1 / 4,
    jitter=1 / 16,
)
WORLDS = {world.name: world for world in (NANO, FULL)}


# ------------------------------------------------------------------ pictures


def _star(u: Plane, v: Plane) -> NDArray[np.bool_]:
    v = v - 0.1  # of five points, one upwards: the middle of the bounding box is above the centre
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)  # to the nearest point of the star
    radius, tip, notch = np.hypot(u, v), 1.05, 0.5
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = notch * np.cos(turn / 2), notch * np.sin(turn / 2)
    return (tip - x) * notch_y >= y * (tip - notch_x)  # on the inner side of the line from the tip to the notch


# Whether a point is inside; the bounding box is at most [-1, 1] each way, v downwards.
INSIDE: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.88,
    "triangle": lambda u, v: (v <= 0.9) & (1.8 * abs(u) <= v + 0.9),
    "star": _star,
    "cross": lambda u, v: (np.maximum(abs(u), abs(v)) <= 1) & (np.minimum(abs(u), abs(v)) <= 0.36),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.52**2),
}
SUBPIXELS = 8  # each way: the resolution of coverage, and of positions in a picture


@lru_cache(maxsize=1 << 14)
def coverage(shape: str, radius: float, dx: int, dy: int, half: int) -> Plane:
    """How much of each pixel a shape covers, in a window of ``2 * half + 1`` pixels each way.

    The shape's middle lies ``dx / SUBPIXELS``, ``dy / SUBPIXELS`` pixels after the corner of the middle pixel.
    """
    side = 2 * half + 1
    at = (np.arange(side * SUBPIXELS, dtype=np.float32) + 0.5) / SUBPIXELS - half
    u, v = (at[None, :] - dx / SUBPIXELS) / radius, (at[:, None] - dy / SUBPIXELS) / radius
    inside = INSIDE[shape](u, v).astype(np.float32)
    covered = inside.reshape(side, SUBPIXELS, side, SUBPIXELS).mean((1, 3))
    covered.flags.writeable = False  # it is cached
    return covered


def window(radius: float) -> int:
    """``half`` for ``coverage``, from the radius in pixels."""
    return math.ceil(radius) + 1


def render(scene: Scene, size: int = 32) -> NDArray[np.uint8]:
    """The picture, ``size`` pixels square and RGB, with smooth edges."""
    picture = np.full((size, size, 3), 255, np.float32)
    for o in scene.objects:
        radius = RADII[o.size] * size
        half = window(radius)
        (left, dx), (top, dy) = (divmod(round(at * size * SUBPIXELS), SUBPIXELS) for at in (o.x, o.y))
        left, top = left - half, top - half
        cut = (slice(max(0, -top), size - top), slice(max(0, -left), size - left))
        covered = coverage(o.shape, radius, dx, dy, half)[cut][..., None]
        patch = picture[max(0, top) : top + 2 * half + 1, max(0, left) : left + 2 * half + 1]
        patch += covered * (np.array(COLOURS[o.colour], np.float32) - patch)
    return (picture + 0.5).astype(np.uint8)


# ------------------------------------------------------------------ captions and requests

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MARGIN = 0.1
"""By how much an offset must be larger along one axis than along the other for text to speak of it."""

REQUESTS = (  # in the style of the published instructions; the last is what people type
    "Please design a drawing of {}.",
    "Please create a painting of {}.",
    "Could you create an image of {}?",
    "Can you draw {}?",
    "Please draw {}.",
    "I need a picture of {}.",
    "Generate an image of {}.",
    "Draw {}.",
    "{}",
)
NAMES = (("shape",), ("colour", "shape"), ("size", "colour", "shape"))
"""The attributes that a name is made of, from little detail to all."""
PLACES = "List all objects with their places."
"""Asked in training only: its answer, a plan, has all that other questions ask for."""
PLACE = "Where in the picture is the {}?"
"""Asked in training only: replies about relations begin with two such answers."""
LAYOUT = "Where would you put {}?"
"""Asked in training only: it teaches to plan at a fraction of a drawing's cost."""
DESCRIBE = ("Describe the image.", "What is in the picture?", "What do you see?")


def vocabulary(world: World) -> tuple[str, ...]:
    """All words of the world's requests, in order."""
    names = [*world.shapes, *map(plural, world.shapes), *world.colours, *(world.sizes if len(world.sizes) > 1 else ())]
    texts = [*REQUESTS, *RELATIONS, *NUMBERS[2 : world.max_objects + 1], *names, "a an and"]
    return tuple(sorted({word for text in texts for word in re.findall("[a-z]+", text.lower())}))


def summary(world: World) -> str:
    """What there is, in a sentence."""
    sizes = f", {' or '.join(world.sizes)}" if len(world.sizes) > 1 else ""
    colours = f"{', '.join(world.colours[:-1])} or {world.colours[-1]}"
    return f"it draws one to {NUMBERS[world.max_objects]} shapes ({', '.join(world.shapes)}), each {colours}{sizes}"


def relation(a: Object, b: Object) -> str | None:
    """How ``a`` stands to ``b``; None where they are too near a diagonal to say."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(abs(dx) - abs(dy)) < MARGIN:
        return None
    return ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def listing(names: Iterable[str]) -> str:
    """Names with their counts: ``a red circle, two small stars and a cross``."""
    parts = [article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}" for name, n in Counter(names).items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def description(scene: Scene, world: World) -> str:
    """All that is there but the positions, in the world's order of shapes, colours and sizes: one text per content."""
    attributes = world.sayable(NAMES)[-1]
    return listing(o.name(attributes) for o in in_order(scene, world))


def plan(objects: Iterable[Object], world: World) -> str:
    """Each object's place, in hundredths of the side from the left and from above, and all that can be said of it.

    The place comes first: to whoever reads on, every word about an object then says where it belongs.
    """
    attributes = world.sayable(NAMES)[-1]
    return ", ".join(f"{_place(o)} {o.name(attributes)}" for o in objects)


def _place(o: Object) -> str:
    return f"{100 * o.x:.0f} {100 * o.y:.0f}"


def in_order(scene: Scene, world: World) -> list[Object]:
    """The world's order of shapes, colours and sizes; like objects by their place."""
    order = (*world.shapes, *world.colours, *world.sizes)
    return sorted(scene.objects, key=lambda o: [*(order.index(a) for a in (o.shape, o.colour, o.size)), o.x, o.y])


@dataclass(frozen=True)
class Caption:
    """A text, and the objects that it speaks of in its own order; those that it does not tell apart, by their place."""

    text: str
    objects: tuple[Object, ...]


def caption(scene: Scene, world: World, rng: Random) -> Caption:
    """What a user might ask for and get this scene: in any order, with more or less detail.

    Of several objects that their names tell apart, most captions say how the first two stand to each other, where that
    is clear.
    """
    attributes = rng.choice(world.sayable([*NAMES, ("colour", "shape")]))
    objects = rng.sample(scene.objects, len(scene.objects))
    names = [o.name(attributes) for o in objects]
    objects.sort(key=lambda o: (names.index(o.name(attributes)), o.x, o.y))
    text = listing(names)
    if len(set(names)) == len(names) > 1 and rng.random() < 0.75 and (stands := relation(*objects[:2])):
        first, second, *others = map(article, names)
        text = " and ".join([f"{first} {stands} {second}", *others])
    return Caption(text, tuple(objects))


def request(scene: Scene, world: World, rng: Random) -> Caption:
    """A caption in the words of someone who wants it drawn."""
    said = caption(scene, world, rng)
    return replace(said, text=rng.choice(REQUESTS).format(said.text))


# ------------------------------------------------------------------ questions

Kind = Literal["colour", "shape", "count", "relation", "existence", "caption", "places"]


@dataclass(frozen=True)
class QA:
    """A question with its answer, and with what has to be found before it can be given."""

    kind: Kind
    question: str
    answer: str
    steps: str = ""

    def reply(self, *, planned: bool) -> str:
        """The answer; ``planned``: after its steps, as plans come before drawings (grounded reasoning, as in Shikra,
        arXiv 2306.15195)."""
        return f"{self.steps}: {self.answer}" if planned and self.steps else self.answer


def conclusion(reply: str) -> str:
    """What a reply says in the end."""
    return reply.rpartition(": ")[2]


def questions(scene: Scene, world: World, rng: Random) -> list[QA]:
    """One question of every kind that has a sure answer here.

    Half of the existence questions are answered ``no``, most of those about something that is nearly there. Held-out
    pairs are named in held-out scenes only: a training that says ``no`` to them would have seen them.
    """
    return [QA(kind, *found) for kind, ask in _ASK.items() if (found := ask(scene, world, rng))]


def place_questions(scene: Scene, world: World, rng: Random) -> list[QA]:
    """Where each object is that can be named, as plans say it."""
    return [
        QA("places", PLACE.format(rng.choice(names)), _place(o))
        for o in scene.objects
        if (names := _unique_names(scene, o, world))
    ]


def relation_questions(scene: Scene, world: World, rng: Random, tries: int) -> list[QA]:
    """Different questions about how objects stand to each other, as many as come up in some tries."""
    found = [QA("relation", *asked) for _ in range(tries) if (asked := _ask_relation(scene, world, rng))]
    return list({qa.question: qa for qa in found}.values())


_Asked = tuple[str, ...] | None  # question, answer, and steps if there are any


def _unique(scene: Scene, name: str, attributes: Sequence[str]) -> bool:
    return [o.name(attributes) for o in scene.objects].count(name) == 1


def _unique_names(scene: Scene, o: Object, world: World) -> list[str]:
    """What an object can be called without being taken for another one."""
    return [name for level in world.sayable(NAMES) if _unique(scene, name := o.name(level), level)]


def _ask_about_one(scene: Scene, world: World, rng: Random, asked: str, levels: list[tuple[str, ...]]) -> _Asked:
    names = [
        (f"the {name}" + ("" if level[-1] == "shape" else " object"), o)
        for o in scene.objects
        for level in world.sayable(levels)
        if _unique(scene, name := o.name(level), level)
    ]
    if len(scene.objects) == 1:
        names.append(("it", scene.objects[0]))
    if not names:
        return None
    name, o = rng.choice(names)
    return f"What {asked} is {name}?", o.name([asked])


def _ask_colour(scene: Scene, world: World, rng: Random) -> _Asked:
    return _ask_about_one(scene, world, rng, "colour", [("shape",), ("size", "shape")])


def _ask_shape(scene: Scene, world: World, rng: Random) -> _Asked:
    return _ask_about_one(scene, world, rng, "shape", [("colour",), ("size",), ("size", "colour")])


def _pairs(scene: Scene, world: World) -> tuple[tuple[str, str], ...]:
    """The pairs that questions about this scene may name."""
    held = any((o.colour, o.shape) in world.heldout for o in scene.objects)
    return world.heldout + world.seen if held else world.seen


def _ask_count(scene: Scene, world: World, rng: Random) -> _Asked:
    present = [(o.colour, o.shape) for o in scene.objects]
    colour, shape = rng.choice(present) if rng.random() < 0.75 else rng.choice(_pairs(scene, world))
    what, n = rng.choice(
        [
            ("objects", len(present)),
            (f"{colour} objects", sum(c == colour for c, _ in present)),
            (plural(shape), sum(s == shape for _, s in present)),
            (plural(f"{colour} {shape}"), present.count((colour, shape))),
        ]
    )
    return f"How many {what} are there?", NUMBERS[n]


def _ask_relation(scene: Scene, world: World, rng: Random) -> _Asked:
    clear = [(a, b, stands) for a in scene.objects for b in scene.objects if (stands := relation(a, b))]
    rng.shuffle(clear)
    for a, b, stands in clear:
        levels = world.sayable(NAMES)
        for level in rng.sample(levels, len(levels)):
            first, second = a.name(level), b.name(level)
            if not (_unique(scene, first, level) and _unique(scene, second, level)):
                continue
            places = f"{_place(a)}, {_place(b)}"
            if len(scene.objects) == 2 and rng.random() < 0.5:
                return f"Where is the {first}?", f"{stands} the {second}", places
            asked, answer = rng.choice([(stands, "yes"), (OPPOSITE[stands], "no")])
            return f"Is the {first} {asked} the {second}?", answer, places
    return None


def _ask_existence(scene: Scene, world: World, rng: Random) -> _Asked:
    there = {(o.colour, o.shape) for o in scene.objects}
    colours, shapes = {c for c, _ in there}, {s for _, s in there}
    answer = rng.choice(["yes", "no"])
    if rng.random() < 0.25:
        names = rng.choice([world.shapes, [f"{colour} object" for colour in world.colours]])
        present = shapes | {f"{colour} object" for colour in colours}
        candidates = [name for name in names if (name in present) == (answer == "yes")]
    elif answer == "yes":
        candidates = [f"{c} {s}" for c, s in sorted(there)]
    else:
        absent = [pair for pair in _pairs(scene, world) if pair not in there]
        mixed = [(c, s) for c, s in absent if c in colours and s in shapes]  # of two objects that are there
        near = [(c, s) for c, s in absent if c in colours or s in shapes]
        candidates = [f"{c} {s}" for c, s in (mixed if rng.random() < 0.5 else []) or near or absent]
    return (f"Is there {article(rng.choice(candidates))}?", answer) if candidates else None


def _ask_caption(scene: Scene, world: World, rng: Random) -> _Asked:
    return rng.choice(DESCRIBE), description(scene, world)


_ASK: dict[Kind, Callable[[Scene, World, Random], _Asked]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "relation": _ask_relation,
    "existence": _ask_existence,
    "caption": _ask_caption,
}

"""The small world as conversations: requests to draw, questions about pictures, and text alone."""

from __future__ import annotations

from random import Random

from PIL import Image

from experiments.data.chat import Example, Kind
from experiments.data.shapes import (
    LAYOUT,
    PLACES,
    QA,
    WORLDS,
    Scene,
    Split,
    World,
    caption,
    description,
    plan,
    questions,
    render,
    request,
)
from experiments.data.shapes_pictures import as_tensor
from vargpt.text import IMAGE, IMAGE_GEN


class ShapeChats:
    """Conversations about scenes of the small world, never the same twice in training.

    Args:
        size: side of the pictures, in pixels.
        plan: whether replies say what goes where before they draw it.
    """

    def __init__(self, world: str, size: int, *, plan: bool) -> None:
        self.world: World = WORLDS[world]
        self._size, self._plan = size, plan

    def kinds(self) -> frozenset[Kind]:
        return frozenset(("drawing", "question", "text"))

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        """A drawing, a question about a picture, or one about a description, half of these for a layout of it."""
        make = {"drawing": self._drawing, "question": self._question, "text": self._text}
        return make[kind](split, seed, index)

    def _drawing(self, split: Split, seed: int, index: int) -> Example:
        scene = self._scene(split, "drawing", seed, index)
        asked = request(scene, self.world, Random(f"request {split} {seed} {index}"))
        reply = plan(scene, self.world) + IMAGE_GEN if self._plan else IMAGE_GEN
        return Example(messages=_turn(asked, reply), drawings=[as_tensor([scene], self._size)[0]])

    def _question(self, split: Split, seed: int, index: int) -> Example:
        scene = self._scene(split, "question", seed, index)
        rng = Random(f"question {split} {seed} {index}")
        qa = rng.choice([*questions(scene, self.world, rng), QA("places", PLACES, plan(scene, self.world))])
        picture = Image.fromarray(render(scene, self._size))
        return Example(messages=_turn(f"{IMAGE}\n{qa.question}", qa.answer), images=[picture])

    def _text(self, split: Split, seed: int, index: int) -> Example:
        """A question that a description answers, or the plan of a scene: shows that not all is to be drawn."""
        scene = self._scene(split, "text", seed, index)
        rng = Random(f"text {split} {seed} {index}")
        if rng.random() < 0.5:
            return Example(messages=_turn(LAYOUT.format(caption(scene, self.world, rng)), plan(scene, self.world)))
        asked = [qa for qa in questions(scene, self.world, rng) if qa.kind in ("count", "existence")]
        qa = rng.choice(asked)
        told = description(scene, self.world)
        return Example(messages=_turn(f"There is {told}. {qa.question}", qa.answer))

    def _scene(self, split: Split, purpose: str, seed: int, index: int) -> Scene:
        # Each purpose sees scenes of its own, further apart than any training counts.
        offset = {"drawing": 0, "question": 1, "text": 2}[purpose] * 1_000_000_000
        return self.world.sample(split, offset + index, seed=seed)


def _turn(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

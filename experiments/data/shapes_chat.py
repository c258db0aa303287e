"""The small world as conversations: requests to draw, questions about pictures, and text alone."""

from __future__ import annotations

from collections.abc import Mapping
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
    in_order,
    place_questions,
    plan,
    questions,
    relation_questions,
    render,
    request,
)
from experiments.data.shapes_pictures import as_tensor
from vargpt.text import IMAGE, IMAGE_GEN

SCENES = 4
"""Of one conversation without pictures."""
RELATIONS = 4
"""Most questions about relations where a scene is asked about places."""
QUESTIONS = 8
"""Most short questions about one scene: seeing it is what costs, and their answers are a word or two of signal."""


class ShapeChats:
    """Conversations about scenes of the small world, never the same twice in training.

    Args:
        size: side of the pictures, in pixels.
        plan: whether replies say what goes where before they draw it, and what is where before they compare it.
        places: share of the scenes of several objects that are asked about places and relations alone.
    """

    def __init__(self, world: str, size: int, *, plan: bool, places: float = 0.0) -> None:
        self.world: World = WORLDS[world]
        self._size, self._plan, self._places = size, plan, places

    def kinds(self) -> Mapping[Kind, float]:
        return {"drawing": 1 / 3, "question": 1 / 3, "text": 1 / 3}

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        """A drawing, questions about a picture, or turns without pictures."""
        make = {"drawing": self._drawing, "question": self._question, "text": self._text}
        return make[kind](split, seed, index)

    def _drawing(self, split: Split, seed: int, index: int) -> Example:
        scene = self._scene(split, "drawing", seed, index)
        asked = request(scene, self.world, Random(f"request {split} {seed} {index}"))
        reply = plan(asked.objects, self.world) + IMAGE_GEN if self._plan else IMAGE_GEN
        return Example(messages=_turn(asked.text, reply), drawings=[as_tensor([scene], self._size)[0]])

    def _question(self, split: Split, seed: int, index: int) -> Example:
        """Several questions about one picture: it is seen once for all of them (as in LLaVA's conversations)."""
        scene = self._scene(split, "question", seed, index)
        rng = Random(f"question {split} {seed} {index}")
        turns = self._asked(scene, f"{IMAGE}\n", rng)
        return Example(messages=turns, images=[Image.fromarray(render(scene, self._size))])

    def _text(self, split: Split, seed: int, index: int) -> Example:
        """Plans of scenes, or questions about a scene told as a plan: shows that not all is to be drawn, and teaches
        what plans of drawings and answers about pictures need, at a fraction of their cost."""
        rng = Random(f"text {split} {seed} {index}")
        scenes = [self._scene(split, "text", seed, SCENES * index + turn) for turn in range(SCENES)]
        if rng.random() < 1 / 3:
            turns = []
            for scene in scenes:
                said = caption(scene, self.world, rng)
                turns += _turn(LAYOUT.format(said.text), plan(said.objects, self.world))
            return Example(messages=turns)
        told = self._told(scenes[0], rng)
        return Example(messages=self._asked(scenes[0], told, rng))

    def _told(self, scene: Scene, rng: Random) -> str:
        """A scene as a plan, in any order."""
        return f"There is {plan(rng.sample(scene.objects, len(scene.objects)), self.world)}. "

    def _asked(self, scene: Scene, shown: str, rng: Random) -> list[dict[str, str]]:
        """Questions about a scene, the first after what shows it: of several objects, sometimes about places
        alone."""
        places = self._finding(scene, shown, rng) if len(scene.objects) > 1 and rng.random() < self._places else []
        return places or self._about(scene, shown, rng)

    def _about(self, scene: Scene, shown: str, rng: Random) -> list[dict[str, str]]:
        """Questions of all kinds."""
        asked = {qa.question: qa for _ in range(3) for qa in questions(scene, self.world, rng)}
        short = [qa for qa in asked.values() if qa.kind != "caption"]
        short = rng.sample(short, min(QUESTIONS, len(short)))
        everything = [qa for qa in asked.values() if qa.kind == "caption"]
        everything = [rng.choice([*everything, QA("places", PLACES, plan(in_order(scene, self.world), self.world))])]
        # Whoever has told everything answers from what was said, not from what is seen: mostly, that comes last.
        return self._turns(shown, everything + short if rng.random() < 1 / 3 else short + everything)

    def _finding(self, scene: Scene, shown: str, rng: Random) -> list[dict[str, str]]:
        """Questions about places; none where no object has a name of its own. Places are learned late where they are
        asked for among all else, and relations after them."""
        asked = place_questions(scene, self.world, rng) + relation_questions(scene, self.world, rng, RELATIONS)
        return self._turns(shown, rng.sample(asked, len(asked)))

    def _turns(self, shown: str, asked: list[QA]) -> list[dict[str, str]]:
        """Questions with their replies, the first after what shows the scene."""
        turns = []
        for qa in asked:
            turns += _turn(qa.question if turns else shown + qa.question, qa.reply(planned=self._plan))
        return turns

    def _scene(self, split: Split, purpose: str, seed: int, index: int) -> Scene:
        # Each purpose sees scenes of its own, further apart than any training counts.
        offset = {"drawing": 0, "question": 1, "text": 2}[purpose] * 1_000_000_000
        return self.world.sample(split, offset + index, seed=seed)


def _turn(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

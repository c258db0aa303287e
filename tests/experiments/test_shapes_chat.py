"""Conversations about the small world."""

from __future__ import annotations

import re
from random import Random

import pytest

from experiments.data.shapes import WORLDS, conclusion, place_questions, plan, relation_questions
from experiments.data.shapes_chat import ShapeChats
from tests.experiments.test_shapes import fitting

each_world = pytest.mark.parametrize("world", sorted(WORLDS))


@each_world
def test_every_conversation_asks_and_answers(world: str) -> None:
    chats = ShapeChats(world, 32, plan=True)
    for kind in chats.kinds():
        for i in range(300):
            messages = chats.example(kind, 0, i, "train").messages
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            assert messages
            assert all(m["content"] for m in messages)


@each_world
def test_a_share_of_the_scenes_of_several_objects_is_asked_about_places_alone(world: str) -> None:
    tells_all = re.compile("List all|Describe|What is in|What do you see")

    def others(places: float) -> int:
        """Conversations that tell everything, at their beginning or their end: all but those about places."""
        chats = ShapeChats(world, 32, plan=True, places=places)
        conversations = [chats.example("question", 0, i, "train").messages for i in range(300)]
        return sum(any(tells_all.search(m["content"]) for m in messages) for messages in conversations)

    # Scenes of one object have no relations, and two that look alike no names.
    assert others(0.0) == 300
    assert 150 <= others(0.5) <= 255
    assert others(1.0) < others(0.5) - 50


@each_world
def test_places_are_those_of_the_named_object(world: str) -> None:
    asked = 0
    for i in range(200):
        scene = WORLDS[world].sample("train", i)
        for qa in place_questions(scene, WORLDS[world], Random(i)):
            named = re.fullmatch("Where in the picture is the (.*)[?]", qa.question)
            assert named
            (thing,) = fitting(named[1], scene.objects)
            assert plan([thing], WORLDS[world]).startswith(qa.answer + " ")
            asked += 1
    assert asked > 200


@each_world
def test_relations_are_told_after_the_places_that_they_follow_from(world: str) -> None:
    asked = 0
    for i in range(200):
        scene = WORLDS[world].sample("train", i)
        for qa in relation_questions(scene, WORLDS[world], Random(i), 3):
            places, said = qa.reply(planned=True).split(": ")
            assert conclusion(qa.reply(planned=True)) == said == qa.answer == qa.reply(planned=False)
            (ax, ay), (bx, by) = (map(int, place.split()) for place in places.split(", "))
            stands = re.search("left of|right of|above|below", qa.question + qa.answer)
            assert stands
            true = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[stands[0]]
            assert true == (qa.answer != "no")
            asked += 1
    assert asked > 100


def test_without_plans_answers_stand_alone() -> None:
    said = [
        m["content"]
        for i in range(100)
        for m in ShapeChats("full", 32, plan=False).example("question", 0, i, "train").messages
    ]
    assert not any(": " in text for text in said)

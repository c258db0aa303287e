"""Draw, ask and chat from Python: what is said is what is read, and what is read is what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import vargpt
from vargpt import api, generate
from vargpt.api import ChatMessage, encode_messages
from vargpt.build import build
from vargpt.config import NANO
from vargpt.generate import generate_text
from vargpt.model import VARGPT
from vargpt.next_scale import ScaleStep
from vargpt.sampling import GREEDY, Guidance
from vargpt.scales import ScaleSchedule
from vargpt.text import ByteTokenizer

assert NANO.var is not None
SCHEDULE = ScaleSchedule(NANO.var.patch_nums)
SCALES, DRAWN = list(range(len(SCHEDULE))), SCHEDULE.total
TOKENS = {"<image>": 635, "<pad>": 636, "<image_gen_start>": 637, "<image_gen_end>": 638, "<image_gen_pad>": 639}


@pytest.fixture(scope="module")
def model() -> VARGPT:
    """A small random model, whose language model is made louder so that its replies vary."""
    model = build(NANO, seed=1, tokenizer=ByteTokenizer(TOKENS, vocab_size=640)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea())


def pixels(image: object) -> np.ndarray:
    assert isinstance(image, Image.Image)
    return np.asarray(image)


@pytest.mark.parametrize("plan", [False, True])
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(
    model: VARGPT, monkeypatch: pytest.MonkeyPatch, plan: bool
) -> None:
    monkeypatch.setattr(model, "choices", replace(model.choices, plan=plan))
    both = vargpt.draw(model, ["a red circle", "two blue squares and a star"], n=2, seed=5)
    assert len(both.images) == 4
    assert both.seed == 5
    again = [
        vargpt.draw(model, [prompt], seed=seed).images[0]
        for prompt in ("a red circle", "two blue squares and a star")
        for seed in (5, 6)
    ]
    for ours, theirs in zip(both.images, again, strict=True):
        assert np.abs(pixels(ours).astype(int) - pixels(theirs)).max() <= 1
    assert not np.array_equal(pixels(both.images[0]), pixels(both.images[1]))
    assert all(map(bool, both.plans)) if plan else not any(both.plans)


def test_every_prompt_may_have_its_own_seed(model: VARGPT) -> None:
    prompts = ["a red circle", "a star", "a red circle"]
    drawn = vargpt.draw(model, prompts, seed=[3, 9, 4]).images
    alone = [vargpt.draw(model, [p], seed=s).images[0] for p, s in zip(prompts, (3, 9, 4), strict=True)]
    for ours, theirs in zip(drawn, alone, strict=True):
        assert np.abs(pixels(ours).astype(int) - pixels(theirs)).max() <= 1
    assert not np.array_equal(pixels(drawn[0]), pixels(drawn[2]))
    with pytest.raises(ValueError, match="2 seeds do not match 3 prompts"):
        vargpt.draw(model, prompts, seed=[1, 2])


def test_a_plan_is_written_before_the_picture_and_read_by_it(model: VARGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "choices", replace(model.choices, plan=True))
    monkeypatch.setattr(api, "PLAN_LENGTH", 7)
    planned = vargpt.draw(model, ["a red circle"], temperature=0, cfg=0)
    ids, _, _ = encode_messages(model, [ChatMessage(role="user", content="a red circle")])
    context, hidden = api.read_rows(model, [ids], room=8 + DRAWN)
    special = [i for i in TOKENS.values() if i != 637]
    row = generate_text(model, context, hidden, max_new_tokens=7, stop=(637, 2), forbid=special)[0]
    assert model.tokenizer is not None
    assert planned.plans == [model.tokenizer.decode(row.ids).strip()]
    context, _ = api.read_rows(model, [[*ids, *row.ids, 637]], room=DRAWN)
    maps = generate.draw(model, context, generators=[], guidance=Guidance(scale=0.0), sampling=GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(planned.indices, maps.indices, strict=True))


def test_every_step_can_be_watched(model: VARGPT) -> None:
    steps: list[ScaleStep] = []
    out = vargpt.draw(model, ["a cat"], on_scale=steps.append)
    assert [step.scale for step in steps] == SCALES
    assert torch.equal(steps[-1].indices, out.indices[-1])
    assert steps[0].images().shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prompts": []}, "nothing to draw"),
        ({"prompts": "a cat"}, "prompts is a list"),
        ({"prompts": ["a cat", " "]}, "empty"),
        ({"prompts": ["a cat" * 300]}, "too long"),
        ({"prompts": ["a cat"], "n": 0}, "nothing to draw"),
        ({"prompts": ["a cat"], "cfg": -1.0}, "cfg must be 0"),
        ({"prompts": ["a cat"], "top_p": 0.0}, "top_p must lie"),
        ({"prompts": ["<image>"]}, "must not contain <image>"),
        ({"prompts": ["a cat"], "null": "nothing"}, "null must be"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn(model: VARGPT, arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vargpt.draw(model, **arguments)


def test_an_answer_is_streamed_as_it_is_returned(model: VARGPT, cat: Image.Image) -> None:
    pieces: list[str] = []
    answer = vargpt.ask(model, cat, "What is this?", 30, on_text=pieces.append)
    assert "".join(pieces).strip() == answer
    assert vargpt.ask(model, cat, "What is this?", 30) == answer
    other = vargpt.ask(model, cat.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "What is this?", 30)
    assert other != answer or vargpt.ask(model, None, "What is this?", 30) != answer


def test_sampled_answers_follow_their_seed(model: VARGPT, cat: Image.Image) -> None:
    answers = [vargpt.ask(model, cat, "What?", 20, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_bad_questions(model: VARGPT, cat: Image.Image) -> None:
    with pytest.raises(ValueError, match="empty"):
        vargpt.ask(model, cat, " ")
    with pytest.raises(ValueError, match="top_p must lie"):
        vargpt.ask(model, cat, "What?", top_p=5.0)
    with pytest.raises(ValueError, match="exceed the model's context of 1024"):
        vargpt.ask(model, cat, "What?", 1020)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        vargpt.ask(model, cat, "What?", 0)


@pytest.mark.usefixtures("unchecked")
def test_a_path_is_not_a_picture(model: VARGPT) -> None:
    path: Any = "cat.png"
    with pytest.raises(ValueError, match="image must be a PIL picture"):
        vargpt.ask(model, path, "What?")


def test_a_conversation_is_one_row_of_text_and_pictures(model: VARGPT, cat: Image.Image) -> None:
    messages = [
        ChatMessage(role="user", content=[cat, "What is this?"]),
        ChatMessage(role="assistant", content="A cat."),
        ChatMessage(role="user", content="Draw it."),
        ChatMessage(role="assistant", content=[cat.resize((32, 32)), "Here."]),
        ChatMessage(role="user", content="Thanks"),
    ]
    ids, understood, drawn = encode_messages(model, messages)
    assert (len(understood), len(drawn)) == (1, 1)
    assert ids.count(635) == 16
    assert ids.count(639) == DRAWN
    start = ids.index(637)
    assert ids[start + 1 : start + 1 + DRAWN] == [639] * DRAWN
    assert ids[start + 1 + DRAWN] == 638
    reply = vargpt.chat(model, messages, max_new_tokens=5)
    assert reply[:5] == messages
    assert reply[5]["role"] == "assistant"


@pytest.fixture
def eager(model: VARGPT) -> VARGPT:
    """The same model with a head that prefers to draw, then to stop."""
    eager = build(NANO, seed=1, tokenizer=model.tokenizer).eval()
    llm = eager.llm
    assert llm is not None
    original = llm.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = original(hidden)
        scores[..., 637] += 100  # start drawing, wherever it is allowed
        scores[..., 2] += 50  # else stop
        return scores

    llm.logits = logits  # pyright: ignore[reportAttributeAccessIssue]
    return eager


def test_a_reply_draws_where_the_model_starts_to(eager: VARGPT) -> None:
    steps: list[int] = []
    question = [{"role": "user", "content": "Draw"}]
    reply = vargpt.chat(eager, question, max_pictures=2, seed=3, on_scale=lambda step: steps.append(step.scale))
    content = reply[-1]["content"]
    assert [type(part).__name__ for part in content] == ["Image", "Image"]
    assert steps == SCALES * 2
    assert not np.array_equal(pixels(content[0]), pixels(content[1]))
    # The drawn pictures are part of the conversation that goes on.
    again = vargpt.chat(eager, [*reply, {"role": "user", "content": "More"}], max_pictures=1)
    assert [type(part).__name__ for part in again[-1]["content"]] == ["Image"]


def test_a_reply_never_outgrows_the_context(eager: VARGPT) -> None:
    long = "x" * 950
    reply = vargpt.chat(eager, [{"role": "user", "content": long}], max_pictures=4)
    drawn = len(reply[-1]["content"])
    ids, _, _ = encode_messages(eager, reply)
    assert 1 <= drawn < 4
    assert len(ids) <= 1024


def test_asking_never_draws(eager: VARGPT, cat: Image.Image) -> None:
    assert vargpt.ask(eager, cat, "Draw a cat") == ""


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "user", "content": []}], "empty"),
        ([{"role": "robot", "content": "hi"}], "role 'robot'"),
        ([{"role": "assistant", "content": "hi"}], "role 'assistant'"),
        ([{"role": "user", "content": [3]}], "texts and PIL pictures, not int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_conversations_that_make_no_sense(model: VARGPT, messages: list, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vargpt.chat(model, messages)

"""A model made ready for inference gives what it gave before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import vargpt
from tests.drawing import Null, before_drawing, drawn, read, same_maps
from tests.models import close, whole_model
from vargpt.generate import generate_text
from vargpt.model import require


@pytest.mark.parametrize("null", ["noise", "class", "prompt"])
def test_it_draws_the_same_pictures(null: Null) -> None:
    model = whole_model((1, 2, 3))
    ready = vargpt.for_inference(copy.deepcopy(model))
    rows = [[9], [12, 9, 20]]
    ours, record = drawn(ready, before_drawing(ready, rows), null=null)
    expected, plain = drawn(model, before_drawing(model, rows), null=null)
    same_maps(ours, expected)
    close(record.logits, plain.logits)
    decode = [require(m.vqvae, "").decode_latent(expected.f_hat) for m in (ready, model)]
    close(decode[0], decode[1], 1e-5)


def test_it_writes_the_same_text() -> None:
    model = whole_model()
    ready = vargpt.for_inference(copy.deepcopy(model))
    texts = []
    for m in (ready, model):
        context, hidden = read(m, [[9], [12, 9, 20]])
        texts.append(generate_text(m, context, hidden, max_new_tokens=8, stop=()))
    assert texts[0] == texts[1]


def test_it_may_be_asked_for_twice_and_for_a_part_alone() -> None:
    ready = vargpt.for_inference(vargpt.for_inference(whole_model()))
    drawn(ready, before_drawing(ready, [[9]]))
    vargpt.for_inference(vargpt.VARGPT(llm=ready.llm))


def test_it_cannot_be_saved(tmp_path: Path) -> None:
    ready = vargpt.for_inference(whole_model())
    with pytest.raises(ValueError, match="only a model whose config describes all its parts can be saved"):
        vargpt.save(ready, tmp_path)


def test_low_precision_weights_of_the_language_model_stay_as_they_are() -> None:
    ready = vargpt.for_inference(whole_model().to(torch.bfloat16))
    assert all(weight.is_contiguous() for name, weight in ready.state_dict().items() if name.startswith("llm."))

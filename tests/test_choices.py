"""Each of the choices alone does what it says, and the two presets differ in all of them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vargpt
from tests.drawing import before_drawing, drawn, teacher_forced
from tests.models import (
    TOKENS,
    close,
    index_maps,
    numbers,
    small_llm,
    small_var,
    small_vqvae,
    stir,
    whole_config,
    whole_model,
)
from vargpt.build import build
from vargpt.choices import CHOICES, FIXED, PUBLISHED, Choices, TokenIds
from vargpt.generate import draw
from vargpt.losses import IGNORE
from vargpt.model import VARGPT, require
from vargpt.sampling import GREEDY, Guidance, generators
from vargpt.text import TEMPLATES, ByteTokenizer

SIDES = (1, 2)
NAMES = [field.name for field in fields(Choices) if field.name != "plan"]  # of which the published code has none
ROW = [9, 12, TOKENS.gen_start, *[TOKENS.gen_pad] * 5, TOKENS.gen_end, 20]


def test_the_presets_differ_in_every_choice() -> None:
    assert CHOICES == {"published": PUBLISHED, "fixed": FIXED}
    for name in NAMES:
        assert getattr(PUBLISHED, name) != getattr(FIXED, name), name
    assert TEMPLATES[PUBLISHED.training_template] != TEMPLATES[FIXED.training_template]


@pytest.mark.parametrize("name", ["null", "condition_class"])
@pytest.mark.usefixtures("unchecked")
def test_an_unknown_choice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .* not 'nonsense'"):
        replace(FIXED, **{name: "nonsense"})


def greedy_logits(choices: Choices, **options: Any) -> Tensor:
    """Drawn with the model's own choices."""
    model, logits = whole_model(SIDES, choices=choices), []
    context = before_drawing(model, [[9, 12]])
    draw(
        model,
        context,
        generators=generators([0], model.device),
        guidance=Guidance(),
        sampling=GREEDY,
        on_scale=lambda step: logits.append(step.logits),
        **options,
    )
    return torch.cat(logits, dim=1)


def test_null_is_what_the_unconditional_row_reads() -> None:
    """The default of drawing; tests/test_generate.py recomputes what each of them reads."""
    zeros: list[int] = []

    def noise(scale: int, shape: torch.Size) -> Tensor:
        zeros.append(scale)
        return torch.zeros(shape)

    greedy_logits(replace(FIXED, null="class"), noise=noise)
    assert zeros == []
    greedy_logits(replace(FIXED, null="noise"), noise=noise)
    assert zeros == [0, 1]
    with pytest.raises(ValueError, match="context of the empty prompt"):
        greedy_logits(replace(FIXED, null="prompt"))


def test_condition_class_is_the_class_of_the_drawn_row() -> None:
    for choice in ("image", "null"):
        model = whole_model(SIDES, choices=replace(FIXED, condition_class=choice))
        maps, record = drawn(model, before_drawing(model, [[9, 12]]), cfg=0.0)
        close(record.logits, teacher_forced(model, [[9, 12]], maps, dropped=choice == "null"))
        assert (record.logits - teacher_forced(model, [[9, 12]], maps, dropped=choice == "image")).abs().max() > 1e-2


def test_projector_norm_comes_before_the_generation_projectors() -> None:
    for norm in (True, False):
        model = stir(build(whole_config(SIDES, vision=True, choices=replace(PUBLISHED, projector_norm=norm))))
        for projector in (model.gen_in, model.gen_out):
            part: Any = projector
            x = 3 * numbers(2, 5, 8) + 1
            expected = F.layer_norm(x, (8,), part.norm.weight, part.norm.bias) if norm else x
            close(part(x), part.layers(expected), 1e-6)
        understanding: Any = model.projector
        assert isinstance(understanding.norm, nn.Identity)


def test_supervise_drawing_prompts_overrules_the_labels_of_drawings() -> None:
    ids = torch.tensor([ROW])
    labels = ids.clone()
    labels[:, :3] = IGNORE
    for supervise in (True, False):
        model = whole_model(SIDES, choices=replace(FIXED, supervise_drawing_prompts=supervise))
        with torch.no_grad():
            out = model(ids, draw_images=index_maps(SIDES, 1), labels=labels)
            text = model(torch.tensor([[9, 12, 20]]), labels=torch.tensor([[IGNORE, IGNORE, 20]]))
        used = ids if supervise else labels
        scored = [t for t in range(1, len(ROW)) if used[0, t] not in (IGNORE, TOKENS.gen_pad)]
        losses = F.cross_entropy(out.text_logits[0, [t - 1 for t in scored]], ids[0, scored])
        close(out.text_loss, losses, 1e-5)
        assert len(scored) == (4 if supervise else 2)
        # Without a drawing, labels are labels.
        close(text.text_loss, F.cross_entropy(text.text_logits[0, 1:2], torch.tensor([20])), 1e-5)


def test_scatter_in_mixed_batches_feeds_drawings_beside_pictures() -> None:
    maps, pixels = index_maps(SIDES, 1), numbers(1, 3, 8, 8)
    mixed = torch.tensor([[9, *[TOKENS.image] * 4, *ROW[2:]]])
    for scatter in (True, False):
        model = whole_model(SIDES, vision=True, choices=replace(FIXED, scatter_in_mixed_batches=scatter))
        llm, var = require(model.llm, ""), require(model.var, "")
        with torch.no_grad():
            condition = var.condition(torch.tensor([var.image_class]))
            drawings = model.drawing_inputs(maps, condition)
            if not scatter:
                drawings = llm.embed(torch.full((1, 5), TOKENS.gen_pad))
            hidden = llm(model.prompt_embeddings(mixed, pixels, drawings))
            out = model(mixed, pixels, maps)
            close(out.hidden, hidden, 1e-5)
            close(out.image_logits, var(require(model.gen_out, "")(hidden[:, 6:11]), condition), 1e-5)
            # A batch of one kind is always fed its drawings.
            drawings = model.drawing_inputs(maps, condition)
            alone = torch.tensor([ROW])
            close(model(alone, None, maps).hidden, llm(model.prompt_embeddings(alone, None, drawings)), 1e-5)


def test_templates_are_known_and_inference_uses_its_own() -> None:
    tokens = TokenIds(image=259, pad=260, gen_start=261, gen_end=262, gen_pad=263)
    names = {"<image>": 259, "<pad>": 260, "<start>": 261, "<end>": 262, "<image_gen>": 263}
    tokenizer = ByteTokenizer(names)
    parts: dict[str, Any] = {"var": small_var(SIDES), "vqvae": small_vqvae(SIDES)}
    messages = [{"role": "user", "content": "a red ball"}]
    for name in NAMES[-2:]:
        assert {getattr(PUBLISHED, name), getattr(FIXED, name)} <= TEMPLATES.keys()
    read = {}
    for name, template in TEMPLATES.items():
        llm = small_llm(vocab_size=264)
        fed: list[list[int]] = []
        llm.token_embed.register_forward_hook(lambda _, inputs, __, fed=fed: fed.append(inputs[0][0].tolist()))
        model = VARGPT(
            llm=llm,
            **parts,
            gen_in=nn.Identity(),
            gen_out=nn.Identity(),
            tokens=tokens,
            tokenizer=tokenizer,
            choices=replace(FIXED, null="class", inference_template=name, training_template="nonsense"),
        )
        vargpt.draw(model, ["a red ball"])
        assert fed[0] == [*template.encode(tokenizer, messages).ids, tokens.gen_start]
        read[name] = fed[0]
    assert read[PUBLISHED.inference_template][0] == tokenizer.bos_id
    assert read[PUBLISHED.training_template] == read[PUBLISHED.inference_template][1:]

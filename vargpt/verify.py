"""Comparing a checkpoint with a recording of the published code's results.

A recording is one safetensors file of inputs and outputs; which comparisons run follows from the names it holds.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vargpt import generate
from vargpt.build import build
from vargpt.checkpoint import choices_named
from vargpt.convert import Published, open_published
from vargpt.files import read_json
from vargpt.interfaces import teacher_forcing_inputs
from vargpt.model import VARGPT, require
from vargpt.sampling import GREEDY, Guidance
from vargpt.var import NextScaleTransformer
from vargpt.var.sample import draw_classes
from vargpt.vqvae import MultiScaleVQVAE

ACTIVATION_TOLERANCE = 1e-4
"""Largest absolute error of activations, logits and pictures, in float32."""
GRADIENT_TOLERANCE = 1e-3
"""Largest relative error of a gradient, by norm."""
PUBLISHED_CFG = 1.5
CLASS_CFG = 4.0


class Recording(dict[str, Tensor]):
    """Inputs and outputs by name."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the recording lacks {name}, which belongs to what else it holds")


@dataclass(frozen=True)
class Row:
    """One compared tensor."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Setting:
    """What the comparisons share."""

    model: VARGPT
    recording: Recording
    published: Published
    profile: Mapping[str, Any]


def verify(checkpoint: Path, golden: Path, patch_nums: tuple[int, ...] | None = None) -> list[Row]:
    """Run a checkpoint, with the published choices, on a recording's inputs and compare every output.

    ``profile.json`` beside the recording may name the scales (which a checkpoint does not always tell) and the
    guidance. What the recording holds and nothing is compared with is warned of.

    Raises:
        ValueError: a checkpoint or recording that cannot be read, or a recording with nothing to compare.
    """
    try:
        recording = Recording(load_file(golden))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{golden} is not a readable safetensors recording ({error})") from None
    profile = _profile(golden.with_name("profile.json"))
    published = open_published(checkpoint, patch_nums or tuple(profile.get("patch_nums", ())) or None)
    model = build(dataclasses.replace(published.config, choices=choices_named("published")))
    model.load_state_dict({name: published.source.read(name).float() for name in model.state_dict()})
    setting = Setting(model.eval(), recording, published, profile)
    rows: list[Row] = []
    for needs, compare in _COMPARISONS.items():
        if needs in recording:
            rows += compare(setting)
    if not rows:
        raise ValueError(
            f"{golden} records nothing that is known: its names should start with {', '.join(_COMPARISONS)}"
        )
    compared = {row.name.split()[0] for row in rows}
    if left := [name for name in recording if name not in compared and not re.fullmatch(_INPUTS, name)]:
        warnings.warn(f"{golden} also holds {', '.join(left)}, with which nothing was compared", stacklevel=2)
    return rows


_INPUTS = (
    r"understanding\.(pixel_values|input_ids)|text_batch\.(input_ids|attention_mask)|vqvae\.image"
    r"|var\.(input_embed|cond)|train\.(input_ids|image)|generate\.(prompt_ids|noise\.\d+)|image|label"
)


def _profile(path: Path) -> dict[str, Any]:
    """What a recording's ``profile.json`` says of it: ``patch_nums`` and ``cfg``, each where it is there."""
    profile = read_json(path) if path.is_file() else {}
    profile |= profile.get("profile", {})
    return profile | ({"patch_nums": profile["PN"]} if "PN" in profile else {})


def _close(name: str, ours: Tensor, theirs: Tensor) -> Row:
    if ours.shape != theirs.shape:
        return Row(f"{name} (shape {list(ours.shape)}, recorded {list(theirs.shape)})", float("inf"), 0.0)
    if not theirs.is_floating_point():
        return Row(name, float((ours != theirs).sum()), 0.0)
    return Row(name, float((ours.float() - theirs).abs().max()), ACTIVATION_TOLERANCE)


def _understanding(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    llm = require(model.llm, "language model")
    ids, pixels = r["understanding.input_ids"], r["understanding.pixel_values"]
    with torch.no_grad():
        features = require(model.vision, "vision encoder")(pixels)
        yield _close("vision.penultimate_hidden", features, r["vision.penultimate_hidden"][:, -features.shape[1] :])
        yield _close("vision.projected", model.image_features(pixels), r["vision.projected"])
        hidden = model(ids, pixel_values=pixels).hidden
        yield _close("understanding.last_hidden", hidden, r["understanding.last_hidden"])
        yield _close("understanding.logits", llm.logits(hidden), r["understanding.logits"])
        new = r["understanding.greedy_ids"].shape[1] - ids.shape[1]
        context = generate.Context(llm, 1, ids.shape[1] + new, ids.device)
        hidden = context.extend(model.prompt_embeddings(ids, pixels))
        row = generate.generate_text(model, context, hidden, max_new_tokens=new, stop=())[0]
        greedy = torch.cat((ids, torch.tensor([row.ids])), dim=1)
        yield _close("understanding.greedy_ids", greedy, r["understanding.greedy_ids"])


def _text_batch(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    mask = r["text_batch.attention_mask"].bool()
    with torch.no_grad():
        logits = model(r["text_batch.input_ids"], attention_mask=mask).text_logits
    yield _close("text_batch.logits", logits[mask], r["text_batch.logits"][mask])


def _tokenizer(model: VARGPT, r: Recording, prefix: str) -> Iterator[Row]:
    vqvae = require(model.vqvae, "image tokenizer")
    with torch.no_grad():
        tokens = vqvae.encode(r[prefix + "image"])
        for scale, indices in enumerate(tokens.indices):
            yield _close(f"{prefix}idx.{scale}", indices, r[f"{prefix}idx.{scale}"])
        inputs = torch.cat(teacher_forcing_inputs(vqvae, tokens.indices), dim=1)
        yield _close(prefix + "var_input", inputs, r[prefix + "var_input"])


def _vqvae(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    vqvae = require(model.vqvae, "image tokenizer")
    with torch.no_grad():
        assert isinstance(vqvae, MultiScaleVQVAE)
        yield _close("vqvae.f", vqvae.latent(r["vqvae.image"]), r["vqvae.f"])
        yield from _tokenizer(model, r, "vqvae.")
        yield _close("vqvae.recon", vqvae.decode(vqvae.encode(r["vqvae.image"]).indices), r["vqvae.recon"])


def _visual_decoder(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    with torch.no_grad():
        logits = require(model.var, "visual decoder")(r["var.input_embed"], r["var.cond"])
    yield _close("var.decoder_logits", logits, r["var.decoder_logits"])


def _train(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    ids = r["train.input_ids"]
    model.zero_grad()
    out = model(ids, draw_images=r["train.image"], labels=ids)  # in eval mode: no drop-path
    assert out.loss is not None
    yield _close("train.loss", out.loss.detach()[None], r["train.loss"])
    recorded = r["train.text_logits"]
    yield _close("train.text_logits", out.text_logits[:, : recorded.shape[1]].detach(), recorded)
    out.loss.backward()
    parameters = dict(model.named_parameters())
    if model.config.llm.tie_embeddings:
        parameters["llm.head.weight"] = parameters["llm.token_embed.weight"]
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    gradients = setting.published.published_names(gradients)
    for name, recorded in r.items():
        if name.startswith("train.grad."):
            gradient, error = gradients.get(name.removeprefix("train.grad.")), torch.inf
            if gradient is not None and gradient.shape == recorded.shape:
                error = float((gradient - recorded).norm() / recorded.norm().clamp(min=1e-12))
            yield Row(name, error, GRADIENT_TOLERANCE)


def _generate(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    llm, var = require(model.llm, "language model"), require(model.var, "visual decoder")
    vqvae, ids = require(model.vqvae, "image tokenizer"), r["generate.prompt_ids"]
    context = generate.Context(llm, 1, ids.shape[1] + var.schedule.total, ids.device)
    context.extend_tokens(ids)
    rows = []
    tokens = generate.draw(
        model,
        context,
        generators=(),
        guidance=Guidance(scale=setting.profile.get("cfg", PUBLISHED_CFG)),
        sampling=GREEDY,
        noise=lambda scale, _: r[f"generate.noise.{scale}"],
        on_scale=lambda step: rows.extend(
            [
                _close(f"generate.logits.{step.scale}", step.logits, r[f"generate.logits.{step.scale}"]),
                _close(f"generate.idx.{step.scale}", step.indices, r[f"generate.idx.{step.scale}"]),
            ]
        ),
    )
    yield from rows
    yield _close("generate.f_hat", tokens.f_hat, r["generate.f_hat"])
    with torch.no_grad():
        image, recorded = vqvae.decode_latent(tokens.f_hat), r["generate.image"]
    yield _close("generate.image", image if recorded.min() < 0 else (image + 1) / 2, recorded)


def _class_conditional(setting: Setting) -> Iterator[Row]:
    model, r = setting.model, setting.recording
    var, vqvae = require(model.var, "visual decoder"), require(model.vqvae, "image tokenizer")
    assert isinstance(var, NextScaleTransformer)
    yield from _tokenizer(model, r, "")
    with torch.no_grad():
        inputs = teacher_forcing_inputs(vqvae, vqvae.encode(r["image"]).indices)
        condition = var.condition(r["label"])
        yield _close("logits", var(var.embed(inputs, condition), condition), r["logits"])
    rows = []
    tokens = draw_classes(
        var,
        vqvae,
        r["label"].tolist(),
        guidance=Guidance(scale=setting.profile.get("cfg", CLASS_CFG)),
        sampling=GREEDY,
        on_scale=lambda step: rows.extend(
            [
                _close(f"gen_logits.{step.scale}", step.logits, r[f"gen_logits.{step.scale}"]),
                _close(f"gen_idx.{step.scale}", step.indices, r[f"gen_idx.{step.scale}"]),
            ]
        ),
    )
    yield from rows
    with torch.no_grad():
        yield _close("generated", (vqvae.decode_latent(tokens.f_hat) + 1) / 2, r["generated"])


_COMPARISONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "understanding.input_ids": _understanding,
    "text_batch.input_ids": _text_batch,
    "vqvae.image": _vqvae,
    "var.input_embed": _visual_decoder,
    "train.input_ids": _train,
    "generate.prompt_ids": _generate,
    "label": _class_conditional,
}

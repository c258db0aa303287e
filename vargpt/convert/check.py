"""Does a checkpoint hold what a configuration describes?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vargpt.build import build
from vargpt.config import VargptConfig
from vargpt.convert.rules import ToOurs, listing
from vargpt.tensorfiles import TensorSource, TensorSpec
from vargpt.vision import OpenClipConfig


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Errors within begin with the place they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def expected_tensors(config: VargptConfig) -> dict[str, TensorSpec]:
    """Names and shapes of everything a model of this configuration holds.

    Raises:
        ValueError: sizes beyond what tensors can have.
    """
    try:
        with torch.device("meta"):
            return {name: TensorSpec.of(tensor) for name, tensor in build(config).state_dict().items()}
    except RuntimeError as error:
        raise ValueError(f"no model can have these sizes ({str(error).splitlines()[0]})") from None


def published_tensors(config: VargptConfig) -> dict[str, TensorSpec]:
    """The same, and what published files hold besides: vision blocks after the feature layer and the norm after them,
    layer norms that are never applied, and a head that is tied all the same."""
    whole = dataclasses.replace(config, choices=dataclasses.replace(config.choices, projector_norm=True))
    besides = {}
    if isinstance(config.vision, OpenClipConfig):
        whole = dataclasses.replace(whole, vision=dataclasses.replace(config.vision, feature_layer=-1))
        norm = TensorSpec((config.vision.width,), torch.float32)
        besides = {"vision.visual.ln_post.weight": norm, "vision.visual.ln_post.bias": norm}
    expected = expected_tensors(whole) | besides
    if config.llm and config.llm.tie_embeddings:
        expected["llm.head.weight"] = expected["llm.token_embed.weight"]
    return expected


def may_lack(ours: str, config: VargptConfig) -> bool:
    """Whether a published checkpoint may leave one of :func:`published_tensors` out."""
    unused = r"(gen_in|gen_out)\.norm\..+|vqvae\.quantizer\.usage_SV"
    tied = config.llm is not None and config.llm.tie_embeddings and ours == "llm.head.weight"
    return tied or re.fullmatch(unused, ours) is not None


def check_tensors(config: VargptConfig, source: TensorSource) -> None:
    """Compare names, shapes and kinds of type of a checkpoint of ours, without reading any tensor.

    Raises:
        ValueError: unknown, missing, mis-shaped or mistyped tensors, all listed.
    """
    allowed = published_tensors(config)
    _complain(
        missing=expected_tensors(config).keys() - source.specs.keys(),
        unknown=source.specs.keys() - allowed.keys(),
        wanted={name: spec for name, spec in allowed.items() if name in source.specs},
        given=source.specs,
    )


def check_published(config: VargptConfig, tensors: ToOurs) -> None:
    """The same for a published checkpoint, in its own names.

    Raises:
        ValueError: unknown, missing, mis-shaped or mistyped tensors, all listed.
    """
    expected, given = published_tensors(config), tensors.source.specs
    wanted = {}
    for ours, spec in expected.items():
        if ours in tensors.names or not may_lack(ours, config):
            wanted |= tensors.theirs(ours, spec)
    unasked = [name for ours in tensors.names if ours not in expected for name in tensors.sources(ours)]
    _complain(
        missing=wanted.keys() - given.keys(),
        unknown=tensors.unknown + unasked,
        twice=tensors.twice,
        wanted={name: spec for name, spec in wanted.items() if name in given},
        given=given,
    )


def _complain(
    *,
    missing: Iterable[str],
    unknown: Iterable[str],
    twice: Iterable[str] = (),
    wanted: Mapping[str, TensorSpec],
    given: Mapping[str, TensorSpec],
) -> None:
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(spec.shape)}"
        for name, spec in wanted.items()
        if given[name].shape != spec.shape
    ]
    types = [
        f"{name} {given[name].dtype} instead of {spec.dtype}"
        for name, spec in wanted.items()
        if given[name].dtype.is_floating_point != spec.dtype.is_floating_point
    ]
    problems = {
        "missing tensors": missing,
        "unknown tensors": unknown,
        "tensors given twice": twice,
        "wrong shapes": shapes,
        "wrong types": types,
    }
    told = [f"{kind}: {listing(names)}" for kind, names in problems.items() if names]
    if told:
        raise ValueError("; ".join(told))

"""Does a checkpoint hold what a configuration describes?"""

from __future__ import annotations

import re

import torch

from vargpt.build import build
from vargpt.config import VargptConfig
from vargpt.convert.rules import ToOurs, listing
from vargpt.tensorfiles import TensorSource, TensorSpec

# What a checkpoint may hold although the configuration does not build it: vision blocks after the feature layer with
# what follows them, and the layer norms that the published generation projectors never apply.
_UNBUILT = re.compile(
    r"vision\.visual\.(transformer\.resblocks\.\d+\..+|ln_post\..+|proj)|(gen_in|gen_out)\.norm\.(weight|bias)"
)


def expected_tensors(config: VargptConfig) -> dict[str, TensorSpec]:
    """Names and shapes of everything a model of this configuration holds."""
    with torch.device("meta"):
        return {name: TensorSpec.of(tensor) for name, tensor in build(config).state_dict().items()}


def check_tensors(config: VargptConfig, source: TensorSource) -> None:
    """Compare names, shapes and kinds of type, without reading any tensor.

    Raises:
        ValueError: unknown, missing, mis-shaped or mistyped tensors, all listed.
    """
    expected, given = expected_tensors(config), source.specs

    def published(name: str) -> str:
        return " + ".join(source.theirs(name)) if isinstance(source, ToOurs) and name in given else name

    problems = []
    if missing := expected.keys() - given.keys():
        problems.append(f"missing tensors in the checkpoint: {listing(missing)}")
    if unknown := [n for n in given.keys() - expected.keys() if not _UNBUILT.fullmatch(n)]:
        problems.append(f"unknown tensors in the checkpoint: {listing(map(published, unknown))}")
    shared = expected.keys() & given.keys()
    if shapes := [n for n in shared if expected[n].shape != given[n].shape]:
        told = (f"{published(n)} {list(given[n].shape)} instead of {list(expected[n].shape)}" for n in shapes)
        problems.append(f"shapes that contradict config.json: {listing(told)}")
    if types := [n for n in shared if given[n].dtype.is_floating_point != expected[n].dtype.is_floating_point]:
        told = (f"{published(n)} {given[n].dtype} instead of {expected[n].dtype}" for n in types)
        problems.append(f"types that are no weights: {listing(told)}")
    if problems:
        raise ValueError("; ".join(problems))

"""The small world as pictures for the image tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.data.shapes import WORLDS, Scene, render
from experiments.data.shapes_parser import parse, same
from vargpt.images import to_pil


def as_tensor(scenes: Sequence[Scene], size: int) -> Float[Tensor, "B 3 side side"]:
    """Scenes as pictures in [-1, 1]."""
    pixels = np.stack([render(scene, size) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class ShapePictures:
    """Scenes of the small world, never the same twice in training."""

    def __init__(self, world: str, size: int) -> None:
        self._world, self._size = WORLDS[world], size

    def training(self, seed: int, step: int, batch: int) -> Float[Tensor, "B 3 side side"]:
        indices = range(step * batch, (step + 1) * batch)
        return as_tensor([self._world.sample("train", i, seed=seed) for i in indices], self._size)

    def validation(self, count: int) -> Float[Tensor, "B 3 side side"]:
        return as_tensor(self._scenes(count), self._size)

    def _scenes(self, count: int) -> list[Scene]:
        return [self._world.sample("validation", i) for i in range(count)]

    def judge(self, reconstructions: Sequence[Float[Tensor, "B 3 side side"]]) -> dict[str, list[float]]:
        """Share of the pictures that are still read exactly right."""
        scenes = self._scenes(len(reconstructions[0]))
        exact = [
            sum(
                same(scene, parse(np.asarray(picture), self._world))
                for scene, picture in zip(scenes, to_pil(images), strict=True)
            )
            for images in reconstructions
        ]
        return {"exact_after_scale": [count / len(scenes) for count in exact]}

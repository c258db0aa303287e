"""Sources of pictures for the image tokenizer: the small world, or any folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.data.shapes_pictures import ShapePictures
from experiments.run import step_generator
from vargpt.images import for_drawing, load_image


@dataclass(frozen=True, kw_only=True)
class PictureData:
    """Which pictures to learn from: ``world`` names a level of the small world, ``folder`` a folder of files."""

    world: Literal["nano", "full"] | None = None
    folder: str | None = None
    flip: bool = True
    """Mirror half of a folder's pictures, left and right."""

    def __post_init__(self) -> None:
        if (self.world is None) == (self.folder is None):
            raise ValueError("name either a world or a folder of pictures")


class PictureSource(Protocol):
    """Pictures that follow from a step's number alone."""

    def training(self, seed: int, step: int, batch: int) -> Float[Tensor, "B 3 side side"]:
        """The pictures of one step, in [-1, 1]."""
        ...

    def validation(self, count: int) -> Float[Tensor, "B 3 side side"]:
        """The same pictures at every call, never trained on."""
        ...

    def judge(self, reconstructions: Sequence[Float[Tensor, "B 3 side side"]]) -> dict[str, list[float]]:
        """What else can be measured of the validation pictures' reconstructions, one batch per prefix of scales."""
        ...


class FolderPictures:
    """Every picture below a folder, cropped at random; every tenth, by name, is kept for validation.

    Raises:
        ValueError: a folder with fewer than two pictures.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

    def __init__(self, folder: Path, size: int, flip: bool) -> None:
        self._size, self._flip = size, flip
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in self.SUFFIXES)
        if len(files) < 2:
            raise ValueError(f"{folder} holds {len(files)} pictures; training needs at least two")
        self._held_out = files[::10]
        self._files = [f for f in files if f not in set(self._held_out)]

    def training(self, seed: int, step: int, batch: int) -> Float[Tensor, "B 3 side side"]:
        random = step_generator(seed, step)
        chosen = torch.randint(len(self._files), (batch,), generator=random).tolist()
        images = torch.stack([for_drawing(load_image(self._files[i]), self._size, random) for i in chosen])
        return mirror(images, random) if self._flip else images

    def validation(self, count: int) -> Float[Tensor, "B 3 side side"]:
        return torch.stack([for_drawing(load_image(path), self._size) for path in self._held_out[:count]])

    def judge(self, reconstructions: Sequence[Float[Tensor, "B 3 side side"]]) -> dict[str, list[float]]:
        return {}  # nobody knows what a photograph shows


def mirror(images: Float[Tensor, "B 3 side side"], random: torch.Generator) -> Float[Tensor, "B 3 side side"]:
    """Half of the pictures, left and right exchanged."""
    chosen = torch.rand(len(images), generator=random) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def picture_source(config: PictureData, size: int) -> PictureSource:
    """The pictures that a configuration names, at ``size`` pixels a side."""
    if config.world is not None:
        return ShapePictures(config.world, size)
    assert config.folder is not None
    return FolderPictures(Path(config.folder), size, config.flip)

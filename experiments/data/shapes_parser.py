"""Reads pictures of the small world back, exactly and without learning.

Blobs that differ from the background are compared, pixel by pixel, with every shape of the world in every colour and
size, at small steps about where the blob is; the nearest wins if it is near enough. What no object explains (halves,
ghosts, shapes or colours of another world) comes out as objects of unknown shape, so that no drawing passes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from experiments.data.shapes import COLOURS, RADII, SUBPIXELS, Object, Plane, Scene, World, coverage, window

UNKNOWN = "unknown"

# Distances are Euclidean, in grey levels: from white to any colour of the palette it is 235 to 420.
BLOB = 115.0  # from the background: about half covered
GHOST = 60.0  # from the background: what must be explained
MISFIT = 0.15  # the largest squared error of an object, as a share of its own squared distance from the background
FAINT = 0.75  # the least strength of an object, 1 being that of its colour
OFF_HUE = 0.05  # the largest squared error to the side of the line from background to colour, as a share likewise
REACH = 1 / 32  # how far the middle of a blob may be from the object's, as a share of the side
STEPS = 4  # between the middle and REACH, each way
SPECK = 1 / 400  # the smallest leftover that counts, as a share of the picture; about 3 pixels of 32 x 32


@dataclass(frozen=True, eq=False)
class _Templates:
    """All that could be in a window about the middle of a blob. M templates, P pixels of the window."""

    names: list[tuple[str, str]]  # M: shape, size
    offsets: list[tuple[float, float]]  # M: x, y in pixels from the middle of the window
    covered_MP: Plane  # the first half sharp, the second the same blurred
    energy_M: Plane
    half: int


@lru_cache(maxsize=8)
def _templates(world: World, size: int) -> _Templates:
    half = window(max(RADII[name] for name in world.sizes) * size) + math.ceil(REACH * size)
    step = REACH * size / STEPS
    steps = [round((0.5 + k * step) * SUBPIXELS) for k in range(-STEPS, STEPS + 1)]
    variants = list(product(world.shapes, world.sizes, steps, steps))
    sharp = np.stack([coverage(shape, RADII[s] * size, x, y, half) for shape, s, x, y in variants])
    covered = np.concatenate([sharp, _blurred(sharp, round((size / 32) ** 2))]).reshape(2 * len(variants), -1)
    return _Templates(
        names=[(shape, s) for shape, s, _, _ in variants] * 2,
        offsets=[(x / SUBPIXELS - 0.5, y / SUBPIXELS - 0.5) for _, _, x, y in variants] * 2,
        covered_MP=covered,
        energy_M=np.square(covered).sum(1),
        half=half,
    )


def _blurred(planes: Plane, times: int) -> Plane:
    """Each time by 0.7 pixels; ``times`` times by 0.7 times their root."""
    for _ in range(times):
        for axis in (1, 2):
            planes = planes / 2 + (np.roll(planes, 1, axis) + np.roll(planes, -1, axis)) / 4
    return planes


def parse(picture: ArrayLike | Image.Image, world: World) -> tuple[Object, ...]:
    """The objects of a square RGB picture (an array: values 0 to 255), from top to bottom.

    Whatever is no object of ``world`` is there too, with shape, colour and size ``"unknown"``.
    """
    pixels = np.asarray(picture, np.float32)
    size = len(pixels)
    if pixels.shape != (size, size, 3):
        raise ValueError(f"a picture to parse is square and RGB, not of shape {pixels.shape}")
    background = np.median(pixels.reshape(-1, 3), 0)
    if np.linalg.norm(255 - background) > GHOST:
        return (_unknown(0.5, 0.5),)

    templates = _templates(world, size)
    margin = templates.half + 1  # a window may reach over the border
    padded = np.pad(background - pixels, ((margin, margin), (margin, margin), (0, 0)))
    distance = np.linalg.norm(padded, axis=2)
    blobs = _labels(distance > BLOB)
    unexplained = distance > GHOST
    found = []
    for number in range(1, blobs.max() + 1):
        own = blobs == number
        ys, xs = own.any(1).nonzero()[0], own.any(0).nonzero()[0]
        if own.sum() < SPECK * size**2 or max(np.ptp(ys), np.ptp(xs)) >= 2 * templates.half:
            continue
        middle = int(xs[0] + xs[-1] + 1) // 2, int(ys[0] + ys[-1] + 1) // 2
        fitted = _fit(padded, (blobs > 0) & ~own, middle, background, world, templates)
        if fitted is None:
            continue
        name, colour, (x, y), covered = fitted
        cut = _cut(middle, templates.half)
        unexplained[cut] &= ~_grown(covered > 0, round(size / 24))
        shape, s = name
        found.append(Object(shape=shape, colour=colour, size=s, x=(x - margin) / size, y=(y - margin) / size))

    leftover = _labels(unexplained)
    for number in range(1, leftover.max() + 1):
        ys, xs = (leftover == number).nonzero()
        if len(ys) >= SPECK * size**2:
            found.append(_unknown((xs.mean() + 0.5 - margin) / size, (ys.mean() + 0.5 - margin) / size))
    return tuple(sorted(found, key=lambda o: (o.y, o.x)))


def _unknown(x: float, y: float) -> Object:
    return Object(shape=UNKNOWN, colour=UNKNOWN, size=UNKNOWN, x=float(x), y=float(y))


def _cut(middle: tuple[int, int], half: int) -> tuple[slice, slice]:
    x, y = middle
    return slice(y - half, y + half + 1), slice(x - half, x + half + 1)


def _fit(
    difference: Plane,
    others: NDArray[np.bool_],
    middle: tuple[int, int],
    background: Plane,
    world: World,
    templates: _Templates,
) -> tuple[tuple[str, str], str, tuple[float, float], Plane] | None:
    """Shape and size, colour, position in pixels, and sharp coverage of the window, where something fits."""
    cut = _cut(middle, templates.half)
    patch = difference[cut] * ~_grown(others[cut], 1)[..., None]
    contrast = np.array([background - COLOURS[c] for c in world.colours], np.float32)
    energy_of = np.square(contrast).sum(1)
    along_PC = patch.reshape(-1, 3) @ contrast.T
    overlap = templates.covered_MP @ along_PC  # of every template in every colour
    energy = templates.energy_M[:, None] * energy_of
    error = np.square(patch).sum() - 2 * overlap + energy
    best, colour = np.unravel_index(error.argmin(), error.shape)
    covered = templates.covered_MP[best % (len(error) // 2)]
    aside_P = np.square(patch).sum(2).ravel() - np.square(along_PC[:, colour]) / energy_of[colour]
    if (
        error[best, colour] > MISFIT * energy[best, colour]
        or overlap[best, colour] < FAINT * energy[best, colour]
        or aside_P[covered > 0].sum() > OFF_HUE * energy[best, colour]
    ):
        return None
    x, y = templates.offsets[best]
    covered = covered.reshape(patch.shape[:2])
    return templates.names[best], world.colours[colour], (middle[0] + 0.5 + x, middle[1] + 0.5 + y), covered


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """``mask`` and the pixels up to ``by`` steps from it, along rows and columns."""
    for _ in range(by):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask


def _labels(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers from 1 for the parts of ``mask`` that hang together, diagonals included; 0 elsewhere."""
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = (edges == 1).nonzero()
    ends = (edges == -1).nonzero()[1]
    runs = list(
        zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    )  # row, first column, one after the last
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start):
            above += 1
        j = above
        while runs[j][0] == row - 1 and runs[j][1] <= end:
            parent[root(i)] = root(j)
            j += 1
    labels = np.zeros(mask.shape, np.int64)
    numbers: dict[int, int] = {}
    for i, (row, start, end) in enumerate(runs):
        labels[row, start:end] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels


def same(scene: Scene, parsed: tuple[Object, ...], *, tolerance: float = 0.05) -> bool:
    """Whether the same objects were read, each within ``tolerance`` of its place both ways, and nothing else."""
    return len(parsed) == len(scene.objects) and any(
        all(
            (o.shape, o.colour, o.size) == (p.shape, p.colour, p.size)
            and max(abs(o.x - p.x), abs(o.y - p.y)) <= tolerance
            for o, p in zip(scene.objects, order, strict=True)
        )
        for order in permutations(parsed)
    )

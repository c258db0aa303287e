"""Pictures to draw as image tokens, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from experiments.data.pictures import BadRecord, Picture, attempt
from vargpt.files import atomic_file
from vargpt.images import for_drawing
from vargpt.interfaces import ImageTokenizer

SHARD = 4096
"""Pictures per file: what an interruption can cost."""
UNREADABLE = -1
"""What stands in place of the tokens of a picture that cannot be read."""


class TokenCache:
    """Index maps of pictures, cropped at the centre, for one image tokenizer. Memory holds a few bytes of each picture.

    Args:
        folder: where the tokens are kept. Those of other pictures, or of a tokenizer with other weights, lie beside
            them under other names.
        pictures: in an order that is always the same; what is not yet on disk is computed now, with a progress bar.
        device: of the tokenizer.
        bad: what to do about a picture that cannot be read: raise its error now, or when its tokens are asked for.

    Raises:
        BadRecord: a picture that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        pictures: Iterable[Picture],
        tokenizer: ImageTokenizer,
        device: torch.device,
        batch: int = 32,
        bad: Literal["stop", "skip"] = "stop",
    ) -> None:
        self._lengths = tokenizer.schedule.lengths
        self._shards: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(tokenizer)
        keys: list[int] = []
        unique = _unique(pictures, keys)
        with tqdm(desc="image tokens", unit="picture") as bar:
            while some := list(islice(unique, SHARD)):
                identities = "\n".join(map(_identity, some)).encode()
                named = hashlib.blake2b(identities, key=fingerprint, digest_size=12).hexdigest()
                self._shards.append(folder / f"{named}.safetensors")
                if not self._shards[-1].is_file():
                    _write(self._shards[-1], some, tokenizer, device, batch, bar, bad)
                else:
                    bar.update(len(some))
        self._rows = np.argsort(np.array(keys, np.uint64))
        self._keys = np.array(keys, np.uint64)[self._rows]

    def tokens(self, picture: Picture) -> tuple[Int[Tensor, " _"], ...]:
        """The picture's index maps, one per scale.

        Raises:
            BadRecord: it could not be read when they were computed.
        """
        shard, row = divmod(int(self._rows[np.searchsorted(self._keys, np.uint64(_key(picture)))]), SHARD)
        with safe_open(self._shards[shard], framework="pt") as opened:
            tokens = opened.get_slice("tokens")[row].long()
        if tokens[0] == UNREADABLE:
            picture.load()  # says why
            raise BadRecord(f"{picture.record}: {picture.name} could not be read when the image tokens were computed")
        return tokens.split(self._lengths)


def _unique(pictures: Iterable[Picture], keys: list[int]) -> Iterator[Picture]:
    """The pictures without repetitions; their keys are added to ``keys``."""
    seen: set[int] = set()
    for picture in pictures:
        key = _key(picture)
        if key not in seen:
            seen.add(key)
            keys.append(key)
            yield picture


@torch.no_grad()
def _write(
    file: Path,
    pictures: Sequence[Picture],
    tokenizer: ImageTokenizer,
    device: torch.device,
    batch: int,
    bar: tqdm[Any],
    bad: Literal["stop", "skip"],
) -> None:
    rows = torch.full((len(pictures), sum(tokenizer.schedule.lengths)), UNREADABLE, dtype=torch.int32)
    for start in range(0, len(pictures), batch):
        images: dict[int, Tensor] = {}
        for row, picture in enumerate(pictures[start : start + batch], start):
            image = attempt(picture.load)
            if not isinstance(image, BadRecord):
                images[row] = for_drawing(image, tokenizer.image_size)
            elif bad == "stop":
                raise image
        if images:
            indices = tokenizer.encode(torch.stack(list(images.values())).to(device)).indices
            rows[list(images)] = torch.cat(indices, dim=1).to("cpu", torch.int32)
        bar.update(len(pictures[start : start + batch]))
    with atomic_file(file) as out:
        out.write(save({"tokens": rows}))


def _key(picture: Picture) -> int:
    return int.from_bytes(hashlib.blake2b(picture.name.encode(), digest_size=8).digest(), "little")


def _identity(picture: Picture) -> str:
    """A picture as it is now: one whose file was changed is tokenized again."""
    found = picture.file.stat() if picture.file.is_file() else None
    return f"{picture.name} {found.st_size} {found.st_mtime_ns}" if found else picture.name


def _fingerprint(tokenizer: ImageTokenizer) -> bytes:
    """Tells tokenizers apart by their weights."""
    assert isinstance(tokenizer, nn.Module)
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()

"""Pictures to draw as image tokens, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from vargpt.files import atomic_file
from vargpt.images import for_drawing, load_image
from vargpt.interfaces import ImageTokenizer

SHARD = 4096
"""Pictures per file: what an interruption can cost."""


class TokenCache:
    """Index maps of picture files, cropped at the centre, for one image tokenizer.

    Args:
        folder: where the tokens are kept. Those of other pictures, or of a tokenizer with other weights, lie beside
            them under other names.
        paths: the pictures; what is not yet on disk is computed now, with a progress bar.
        device: of the tokenizer.

    Raises:
        ValueError: a picture that cannot be read.
    """

    def __init__(
        self, folder: Path, paths: Sequence[Path], tokenizer: ImageTokenizer, device: torch.device, batch: int = 32
    ) -> None:
        self._lengths = tokenizer.schedule.lengths
        unique = sorted(set(paths))
        self._row = {path: i for i, path in enumerate(unique)}
        folder.mkdir(parents=True, exist_ok=True)
        key = _fingerprint(tokenizer)
        shards = []
        with tqdm(total=len(unique), desc="image tokens", unit="picture", disable=not unique) as bar:
            for start in range(0, len(unique), SHARD):
                some = unique[start : start + SHARD]
                named = hashlib.blake2b("\n".join(map(_identity, some)).encode(), key=key, digest_size=12).hexdigest()
                file = folder / f"{named}.safetensors"
                if not file.is_file():
                    _write(file, some, tokenizer, device, batch, bar)
                else:
                    bar.update(len(some))
                with safe_open(file, framework="pt") as opened:
                    shards.append(opened.get_tensor("tokens"))
        self._tokens = torch.cat(shards) if shards else torch.zeros(0, sum(self._lengths), dtype=torch.int32)

    def tokens(self, path: Path) -> tuple[Int[Tensor, " _"], ...]:
        """The picture's index maps, one per scale."""
        return self._tokens[self._row[path]].long().split(self._lengths)


@torch.no_grad()
def _write(
    file: Path, paths: Sequence[Path], tokenizer: ImageTokenizer, device: torch.device, batch: int, bar: tqdm[Any]
) -> None:
    rows = []
    for start in range(0, len(paths), batch):
        some = paths[start : start + batch]
        images = torch.stack([for_drawing(load_image(path), tokenizer.image_size) for path in some]).to(device)
        rows.append(torch.cat(tokenizer.encode(images).indices, dim=1).to("cpu", torch.int32))
        bar.update(len(some))
    with atomic_file(file) as out:
        out.write(save({"tokens": torch.cat(rows)}))


def _identity(path: Path) -> str:
    """A file as it is now: one that was changed is tokenized again."""
    found = path.stat() if path.is_file() else None
    return f"{path} {found.st_size} {found.st_mtime_ns}" if found else str(path)


def _fingerprint(tokenizer: ImageTokenizer) -> bytes:
    """Tells tokenizers apart by their weights."""
    assert isinstance(tokenizer, nn.Module)
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()

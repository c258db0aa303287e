"""Conversations from record files: the published form, and LLaVA's.

Published: ``{"messages": [{"role": "user", "content": "..."}, ...], "images": ["a.jpg", ...]}``, where ``<image>``
stands for the next picture to understand and ``<image_gen>`` for the next one to draw. LLaVA's: ``{"conversations":
[{"from": "human", "value": "..."}, ...], "image": "a.jpg"}``. A file is a JSON list of records, or one record per line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from experiments.data.chat import Drawing, Example, Kind
from experiments.data.shapes import Split
from experiments.data.token_cache import TokenCache
from experiments.run import step_generator
from vargpt.images import for_drawing, load_image
from vargpt.text import IMAGE, IMAGE_GEN

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
VALIDATION = 20
"""One record in so many is kept for validation."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation and the files of its pictures, in the order of their placeholders."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...]

    @property
    def marks(self) -> list[str]:
        """The placeholders, in order."""
        text = "".join(message["content"] for message in self.messages)
        return re.findall(f"{IMAGE}|{IMAGE_GEN}", text)

    @property
    def drawings(self) -> list[Path]:
        return [path for mark, path in zip(self.marks, self.images, strict=True) if mark == IMAGE_GEN]

    @property
    def kind(self) -> Kind:
        """``drawing``, ``question`` (there is a picture to look at) or ``text``."""
        return "drawing" if IMAGE_GEN in self.marks else "question" if self.images else "text"


def read_records(file: Path, images: Path | None = None) -> list[Record]:
    """All records of a file; their pictures' names are taken from ``images``, by default from the file's own folder.

    Raises:
        ValueError: a file that is no list of records, or a record in neither form, with its number.
    """
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(row) for row in text.splitlines() if row]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read records from {file}: {error}") from None
    root = file.parent if images is None else images
    return [_record(row, root, f"record {number} of {file}") for number, row in enumerate(rows)]


def _record(row: Any, root: Path, name: str) -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} must be an object, not {type(row).__name__}")
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} has neither messages nor conversations")
    messages = []
    for turn in turns:
        role, content = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"{name}: a turn needs a role ({', '.join(ROLES)}) and a text, not {role!r} and {content!r}"
            )
        messages.append({"role": ROLES[role], "content": content})
    named = row.get("images", row.get("image", []))
    names = [named] if isinstance(named, str) else list(named or [])
    record = Record(messages=tuple(messages), images=tuple(root / name for name in names))
    if len(record.marks) != len(names):
        raise ValueError(
            f"{name} has {len(record.marks)} placeholders ({IMAGE} or {IMAGE_GEN}) for {len(names)} pictures"
        )
    return record


class Records:
    """The conversations of a record file, in another order each time through.

    Args:
        size: side of the pictures to draw, in pixels.
        cache: tokens of the pictures to draw; without, they are cropped at random and tokenized at every step.
    """

    def __init__(self, records: list[Record], size: int, cache: TokenCache | None = None) -> None:
        self._size, self._cache = size, cache
        self._records: dict[tuple[Split, Kind], list[Record]] = {}
        for number, record in enumerate(records):
            split: Split = "validation" if number % VALIDATION == VALIDATION - 1 else "train"
            self._records.setdefault((split, record.kind), []).append(record)

    def kinds(self) -> frozenset[Kind]:
        return frozenset(kind for split, kind in self._records if split == "train")

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        # Too few records to have any for validation: the training ones must do.
        records = self._records.get((split, kind)) or self._records["train", kind]
        time, place = divmod(index, len(records))
        record = records[_order(len(records), seed, time)[place]]
        random = step_generator(seed, index, stream=3) if split == "train" else None
        understood = [load_image(p) for mark, p in zip(record.marks, record.images, strict=True) if mark == IMAGE]
        drawings: list[Drawing] = []
        for path in record.drawings:
            if self._cache is not None:
                drawings.append(self._cache.tokens(path))
            else:
                drawings.append(for_drawing(load_image(path), self._size, random))
        return Example(messages=record.messages, images=understood, drawings=drawings)


@lru_cache(maxsize=8)
def _order(count: int, seed: int, time: int) -> list[int]:
    """The order in which ``count`` records come the ``time``-th time through."""
    return torch.randperm(count, generator=step_generator(seed, time, stream=4)).tolist()

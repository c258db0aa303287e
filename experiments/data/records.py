"""Conversations from record files: the published form, and LLaVA's.

Published: ``{"messages": [{"role": "user", "content": "..."}, ...], "images": ["a.jpg", ...]}``, where ``<image>``
stands for the next picture to understand and ``<image_gen>`` for the next one to draw. LLaVA's: ``{"conversations":
[{"from": "human", "value": "..."}, ...], "image": "a.jpg"}``. Files are JSON lists, JSON lines (a record each) or
parquet, whose pictures may lie in the table itself, as Hugging Face's ``datasets`` writes them (``{bytes, path}``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from re import findall
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from PIL.Image import Image
from tqdm import tqdm

from experiments.data.chat import Drawing, Example, Kind
from experiments.data.pictures import BadRecord, Picture, attempt
from experiments.data.record_files import GROUPS, ParquetRows, Rows, open_rows
from experiments.data.shapes import Split
from experiments.data.token_cache import TokenCache
from experiments.run import step_generator
from vargpt.images import for_drawing
from vargpt.text import IMAGE, IMAGE_GEN

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
KINDS: tuple[Kind, ...] = get_args(Kind)
VALIDATION = 20
"""One record in so many is kept for validation."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation and its pictures, in the order of their placeholders."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Picture, ...]

    @property
    def marks(self) -> list[str]:
        """The placeholders, in order."""
        text = "".join(message["content"] for message in self.messages)
        return findall(f"{IMAGE}|{IMAGE_GEN}", text)

    @property
    def drawings(self) -> list[Picture]:
        return [picture for mark, picture in zip(self.marks, self.images, strict=True) if mark == IMAGE_GEN]

    @property
    def kind(self) -> Kind:
        """``drawing``, ``question`` (there is a picture to look at) or ``text``."""
        return "drawing" if IMAGE_GEN in self.marks else "question" if self.images else "text"


class RecordFiles:
    """All records of some files, none of them held in memory.

    Args:
        images: folder of the pictures' names; by default the one that each file is in.

    Raises:
        ValueError: a file that cannot be read as records.
    """

    def __init__(self, files: Sequence[Path], images: Path | None = None) -> None:
        self._images = images
        self._rows = [open_rows(file) for file in files]
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    @property
    def name(self) -> str:
        """What people call the files."""
        return ", ".join(str(rows.file) for rows in self._rows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, number: int) -> tuple[Rows, int]:
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self._rows[file], number - (int(self._ends[file - 1]) if file else 0)

    def groups(self) -> Int[np.ndarray, " records"]:
        """For each record the number of the stretch of a file that has to be read for it; 0: none but it."""
        found: list[np.ndarray] = []
        last = 0
        for rows in self._rows:
            own = rows.groups()
            found.append(np.where(own > 0, own + last, 0))
            last = int(found[-1].max(initial=last))
        return np.concatenate(found)

    def record(self, number: int) -> Record:
        """
        Raises:
            BadRecord: it is in neither form.
        """
        rows, i = self._place(number)
        return _record(rows.row(i), rows, i, self._images)

    def scan(self) -> Iterator[Record | BadRecord]:
        """All records in order, and for bad ones what is wrong with them. Their pictures are not looked at."""
        for rows in self._rows:
            for i, row in enumerate(rows.scan()):
                bad = isinstance(row, BadRecord)
                yield row if bad else attempt(partial(_record, row, rows, i, self._images))


def _record(row: Any, rows: Rows, i: int, root: Path | None) -> Record:
    name = rows.name(i)
    if not isinstance(row, Mapping):
        raise BadRecord(f"{name} must be an object, not {type(row).__name__}")
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{name} has neither messages nor conversations")
    messages = tuple(_message(turn, name) for turn in turns)
    given = row.get("images", row.get("image"))
    values = given if isinstance(given, list) else [] if given is None else [given]
    folder = rows.file.parent if root is None else root
    images = tuple(_picture(value, k, rows, i, folder) for k, value in enumerate(values))
    record = Record(messages=messages, images=images)
    if len(record.marks) != len(images):
        raise BadRecord(
            f"{name} has {len(record.marks)} placeholders ({IMAGE} or {IMAGE_GEN}) for {len(images)} pictures"
        )
    return record


def _message(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"{name}: a turn must be an object, not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES or not isinstance(content, str):
        raise BadRecord(f"{name}: a turn needs a role ({', '.join(ROLES)}) and a text, not {role!r} and {content!r}")
    return {"role": ROLES[role], "content": content}


def _picture(value: Any, k: int, rows: Rows, i: int, folder: Path) -> Picture:
    """Picture ``k`` of row ``i``, from its name, or from what is in a table: bytes, or ``{bytes, path}``."""
    name = rows.name(i)
    if isinstance(value, str):
        return Picture(record=name, file=folder / value)
    if not isinstance(rows, ParquetRows) or not isinstance(value, Mapping | bytes):
        raise BadRecord(f"{name}: picture {k} must be a file's name, not {value!r:.80}")
    path = value.get("path") if isinstance(value, Mapping) else None
    inside = f"picture {k} ({path}) of row {i}" if path else f"picture {k} of row {i}"
    return Picture(record=name, file=rows.file, inside=inside, fetch=partial(_fetch, rows, i, k, folder))


def _fetch(rows: Rows, i: int, k: int, folder: Path) -> bytes | Path:
    """What a table holds of a picture: its bytes, or where they are."""
    row = rows.row(i)
    given = row.get("images", row.get("image"))
    value = given[k] if isinstance(given, list) else given
    if isinstance(value, bytes):
        return value
    if isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if value.get("path") is None:
        raise ValueError(f"picture {k} has neither bytes nor a path")
    return folder / value["path"]


class Records:
    """The conversations of record files, in another order each time through.

    Records of parquet files come in an order that needs few row groups at a time: row groups follow one another at
    random, and so do the records of every few of them.

    Args:
        size: side of the pictures to draw, in pixels.
        cache: tokens of the pictures to draw; without, they are cropped at random and tokenized at every step.
        bad: what to do about a record that cannot be used: raise its error, or say it on standard error, count it and
            take the next one.

    Raises:
        BadRecord: if bad ones stop it, the first that is in neither form.
        ValueError: there is none to train on.
    """

    def __init__(
        self, files: RecordFiles, size: int, cache: TokenCache | None = None, bad: Literal["stop", "skip"] = "stop"
    ) -> None:
        self._files, self._size, self._cache, self._bad = files, size, cache, bad
        self._unusable: set[int] = set()
        kinds, first = np.full(len(files), -1, np.int8), None
        for number, record in enumerate(files.scan()):
            if isinstance(record, Record):
                kinds[number] = KINDS.index(record.kind)
            elif bad == "stop":
                raise record
            else:
                first = first or record
        if first is not None:
            _say(f"{(kinds < 0).sum()} of {len(files)} records are bad and left out; the first: {first}")
        held_out = np.arange(len(files)) % VALIDATION == VALIDATION - 1
        groups = files.groups()
        parts: dict[Split, np.ndarray] = {"train": ~held_out, "validation": held_out}
        chosen: dict[tuple[Split, Kind], np.ndarray] = {
            (split, kind): np.flatnonzero((kinds == code) & part)
            for split, part in parts.items()
            for code, kind in enumerate(KINDS)
        }
        self._numbers = {key: numbers for key, numbers in chosen.items() if len(numbers)}
        self._groups = {key: groups[numbers] for key, numbers in self._numbers.items()}
        if not self.kinds():
            raise ValueError(f"{files.name} holds no record that can be trained on")
        self._order = lru_cache(maxsize=8)(self._make_order)

    def kinds(self) -> Mapping[Kind, float]:
        counts: dict[Kind, int] = {
            kind: len(numbers) for (split, kind), numbers in self._numbers.items() if split == "train"
        }
        return {kind: count / sum(counts.values()) for kind, count in counts.items()}

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        # Too few records to have any for validation: the training ones must do.
        part: Split = split if (split, kind) in self._numbers else "train"
        numbers = self._numbers[part, kind]
        time, place = divmod(index, len(numbers))
        order = self._order(part, kind, seed, time)
        for later in range(len(numbers)):
            number = int(order[(place + later) % len(numbers)])
            if number in self._unusable:
                continue
            try:
                return self._example(self._files.record(number), step_generator(seed, index, stream=3), split)
            except BadRecord as error:
                if self._bad == "stop":
                    raise
                self._unusable.add(number)
                _say(f"left out, {len(self._unusable)} so far: {error}")
        raise ValueError(f"none of {len(numbers)} records of kind {kind!r} can be used")

    def _example(self, record: Record, random: torch.Generator, split: Split) -> Example:
        understood: list[Image] = []
        drawings: list[Drawing] = []
        for mark, picture in zip(record.marks, record.images, strict=True):
            if mark == IMAGE:
                understood.append(picture.load())
            elif self._cache is not None:
                drawings.append(self._cache.tokens(picture))
            else:
                drawings.append(for_drawing(picture.load(), self._size, random if split == "train" else None))
        return Example(messages=record.messages, images=understood, drawings=drawings)

    def _make_order(self, split: Split, kind: Kind, seed: int, time: int) -> np.ndarray:
        """Numbers of the records of a kind as they come the ``time``-th time through."""
        random = step_generator(seed, time, stream=4)
        shuffled = torch.randperm(len(self._numbers[split, kind]), generator=random).numpy()
        _, group = np.unique(self._groups[split, kind], return_inverse=True)
        window = torch.randperm(int(group.max()) + 1, generator=random).numpy() // (GROUPS // 2)
        return self._numbers[split, kind][shuffled[np.argsort(window[group][shuffled], kind="stable")]]


def _say(line: str) -> None:
    tqdm.write(f"warning: {line} (python -m experiments.validate_data names them all)", file=sys.stderr)

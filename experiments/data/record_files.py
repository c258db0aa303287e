"""Rows of record files, read from where they lie: JSON lines, JSON lists and parquet.

What is held of a file of a million rows is where each of them begins. Lines are counted from 1, as editors do, rows of
parquet files and members of JSON lists from 0.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from experiments.data.pictures import BadRecord, attempt

COLUMNS = ("messages", "conversations", "images", "image")
GROUPS = 8
"""Row groups of a parquet file that are kept in memory."""


class Rows(Protocol):
    """The rows of one file."""

    file: Path

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What people call row ``i``: ``line 3 of mine.jsonl``."""
        ...

    def groups(self) -> Int[np.ndarray, " rows"]:
        """For each row the number, from 1, of the stretch of the file that has to be read for it; 0: none but it."""
        ...

    def scan(self) -> Iterator[Any]:
        """All rows in order, without the bytes of pictures; in place of one that cannot be read, a BadRecord."""
        ...

    def row(self, i: int) -> Any:
        """One row.

        Raises:
            BadRecord: it is no JSON.
        """
        ...


class JsonRows:
    """The rows of a JSON file: one per line, or the members of a list.

    Raises:
        ValueError: a list whose members cannot be told apart.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._starts, self._lengths, self._numbers = array("q"), array("q"), array("q")
        # Rows are read, not mapped: a file that is overwritten while in use then gives bad records, and no SIGBUS.
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as content:
            first = re.search(rb"\S", content)
            self._list = first is not None and first[0] == b"["
            if self._list:
                self._find_members(content)
            else:
                self._find_lines(content)

    def _add(self, start: int, end: int, number: int) -> None:
        self._starts.append(start)
        self._lengths.append(end - start)
        self._numbers.append(number)

    def _find_lines(self, content: mmap.mmap) -> None:
        start = 0
        for number, line in enumerate(iter(content.readline, b""), start=1):
            if line.strip():
                self._add(start, start + len(line), number)
            start += len(line)

    def _find_members(self, content: mmap.mmap) -> None:
        depth, start, end = 0, 0, 0
        for token in re.finditer(rb'(?s)"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', content):
            if token[0] in b"[{":
                depth += 1
                if depth == 1:
                    end = token.end()
                elif depth == 2:
                    start = token.start()
                    if content[end:start].strip() != (b"," if self._starts else b""):
                        break
            elif token[0] in b"]}":
                depth -= 1
                if depth == 1:
                    end = token.end()
                    self._add(start, end, len(self._starts))
                elif depth == 0:
                    if content[end : token.start()].strip() or content[token.end() :].strip():
                        break
                    return
        raise ValueError(
            f"cannot read records from {self.file}: after {len(self._starts)} records, at byte {max(start, end)},"
            " it is no list of JSON objects any more"
        )

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, i: int) -> str:
        return f"{'record' if self._list else 'line'} {self._numbers[i]} of {self.file}"

    def groups(self) -> Int[np.ndarray, " rows"]:
        return np.zeros(len(self), np.int64)

    def scan(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield attempt(partial(self.row, i))

    def row(self, i: int) -> Any:
        try:
            return json.loads(os.pread(self._descriptor, self._lengths[i], self._starts[i]))
        except UnicodeDecodeError:
            raise BadRecord(f"{self.name(i)} is not UTF-8") from None
        except RecursionError:
            raise BadRecord(f"{self.name(i)} is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise BadRecord(f"{self.name(i)} is not JSON ({error.msg} at character {error.pos})") from None


class ParquetRows:
    """The rows of a parquet file. To read one is to read its row group: those last read are kept.

    Raises:
        ValueError: no parquet file, one without conversations, or pyarrow is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._parquet = file, open_parquet(file)
        leaves = [self._parquet.schema.column(i).path for i in range(len(self._parquet.schema))]
        self._columns = [leaf for leaf in leaves if leaf.split(".")[0] in COLUMNS]
        if not {leaf.split(".")[0] for leaf in self._columns} & {"messages", "conversations"}:
            raise ValueError(f"{file} has no column messages or conversations, but {', '.join(leaves)}")
        # A picture's path, beside its bytes, is enough to count it.
        paths = {leaf.removesuffix(".path") for leaf in self._columns if leaf.endswith(".path")}
        self._light = [c for c in self._columns if not (c.endswith(".bytes") and c.removesuffix(".bytes") in paths)]
        metadata = self._parquet.metadata
        self._starts = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
        self._group = lru_cache(maxsize=GROUPS)(self._read)

    def _read(self, group: int) -> Any:
        with reading_parquet(self.file):
            return self._parquet.read_row_group(group, columns=self._columns)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        return f"row {i} of {self.file}"

    def groups(self) -> Int[np.ndarray, " rows"]:
        return np.repeat(np.arange(1, len(self._starts)), np.diff(self._starts))

    def scan(self) -> Iterator[Any]:
        with reading_parquet(self.file):
            for batch in self._parquet.iter_batches(1024, columns=self._light):
                yield from batch.to_pylist()

    def row(self, i: int) -> Any:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._group(group).slice(i - int(self._starts[group]), 1).to_pylist()[0]


def open_parquet(file: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises:
        ValueError: one line that says why the file cannot be read, or that pyarrow is missing.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ValueError(f"to read {file}, install pyarrow: pip install 'vargpt[data]'") from None
    with reading_parquet(file):
        return ParquetFile(file)


@contextmanager
def reading_parquet(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises into one line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        size = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
        raise ValueError(f"cannot read {file} as parquet ({size}: {str(error).splitlines()[0]})") from None


def open_rows(file: Path) -> Rows:
    """The rows of a file: parquet by its suffix, JSON otherwise.

    Raises:
        ValueError: one line that says why they cannot be read.
    """
    try:
        if file.stat().st_size == 0:
            raise ValueError(f"cannot read records from {file}: it is empty (0 bytes)")
        return ParquetRows(file) if file.suffix == ".parquet" else JsonRows(file)
    except OSError as error:
        raise ValueError(f"cannot read records from {file}: {error.strerror or error}") from None


def record_files(pattern: str) -> list[Path]:
    """The files that a name or a pattern (``data/train-*.parquet``) means, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    files = sorted(file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file())
    if not files:
        kind = "a folder: name its files (DIR/*.parquet)" if path.is_dir() else "no such file"
        raise ValueError(f"cannot read records from {pattern}: {kind}")
    return files

"""Pictures of records, read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL.Image import Image

from vargpt.images import load_image

Result = TypeVar("Result")


class BadRecord(ValueError):
    """One line that says which record is at fault, and why."""


def attempt(read: Callable[[], Result]) -> Result | BadRecord:
    """What is read, or what is wrong with its record."""
    try:
        return read()
    except BadRecord as error:
        return error


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a record: a file, or what ``fetch`` takes from inside of one."""

    record: str
    """Whose it is, for people."""
    file: Path
    inside: str = ""
    """Which of the file's pictures."""
    fetch: Callable[[], bytes | Path] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return f"{self.inside} of {self.file}" if self.inside else str(self.file)

    def load(self) -> Image:
        """
        Raises:
            BadRecord: it is no picture that can be read.
        """
        try:
            content = self.file if self.fetch is None else self.fetch()
            return load_image(content, name=self.inside if isinstance(content, bytes) else None)
        except ValueError as error:
            raise BadRecord(f"{self.record}: {error}") from None

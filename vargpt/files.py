"""Files that appear whole or not at all, and JSON that is read with one clear line for every mistake."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one clear line.

    Raises:
        ValueError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name beside ``path``; it takes its place only when all is written.

    Raises:
        ValueError: one line that says why the file cannot be written.
    """
    temporary = path.with_name(_temporary_name())
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error})") from None
    finally:  # also after KeyboardInterrupt
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Write a directory's files into a temporary one beside it, which takes its place only when all are written.

    Raises:
        ValueError: one line that says why the directory, new or empty, cannot be written.
    """
    temporary = path.absolute().with_name(_temporary_name())
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error})") from None
    finally:  # also after KeyboardInterrupt
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name() -> str:
    """A short one: a name that is as long as the file system allows must not become longer."""
    return f".{secrets.token_hex(4)}.tmp"


def write_json(path: Path, content: object) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())

"""Real vocabularies for the tests, fetched from package registries into a cache and never committed.

    python tests/vocabularies.py      # fetches both and prints where they are

- ``mistral()``: the sentencepiece file of Mistral 7B v0.1, which the PyPI package ``mistral-common`` carries.
- ``llama()``: LLaMA's, which Vicuna and VARGPT use. The npm package ``llama-tokenizer-js`` carries its pieces, in
  order, and its merges, but not the sentencepiece file. That is rebuilt: the score of a piece is minus its rank among
  the pieces after the bytes, but -1e9 for runs of spaces (Mistral's file, of the same make, has both). The merges are
  not used for that, so they remain to check the result with.

The cache is ``$VARGPT_TEST_CACHE`` or ``~/.cache/vargpt-tests``. ``Unreachable`` means that a registry gave no package;
a package with unexpected content is a ValueError, which fails a test instead of skipping it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(os.environ.get("VARGPT_TEST_CACHE") or Path.home() / ".cache" / "vargpt-tests")
MISTRAL_WHEEL, MISTRAL_FILE = "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
LLAMA_PACKAGE, LLAMA_FILE = "llama-tokenizer-js@1.2.2", "package/llama-tokenizer.js"
LLAMA_SHA256 = "34a7b9f7579d40486444590c37cba6564ef40c3dd98ecdfc2f7c886ae72c898d"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # sentencepiece's kinds of pieces


class Unreachable(Exception):
    """A registry did not hand out its package: no network, no such client, no such package."""


def mistral() -> Path:
    """``tokenizer.model`` of Mistral 7B v0.1: 32000 pieces in LLaMA's layout."""
    path = CACHE / "mistral" / "tokenizer.model"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", MISTRAL_WHEEL]
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(_fetch(pip, Path(folder), "*.whl")) as wheel:
            _store(path, _checked(wheel.read(MISTRAL_FILE), MISTRAL_SHA256, MISTRAL_WHEEL))
    return path


def llama() -> Path:
    """LLaMA's ``tokenizer.model``, rebuilt; next to it ``merges.json``, pairs of pieces in the order of merging."""
    path = CACHE / "llama" / "tokenizer.model"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            package = _fetch(["npm", "pack", "--silent", LLAMA_PACKAGE], Path(folder), "*.tgz")
            with tarfile.open(package) as archive:
                member = archive.extractfile(LLAMA_FILE)
                source = _checked(member.read() if member else b"", LLAMA_SHA256, LLAMA_PACKAGE).decode()
        pieces = _embedded(source, "llama_vocab_base64").decode().split("\n")
        packed = _embedded(source, "llama_merges_binary")  # pairs of little-endian 16-bit ids
        merges = [(pieces[left], pieces[right]) for left, right in struct.iter_unpack("<HH", packed)]
        _store(path.with_name("merges.json"), json.dumps(merges).encode())
        _store(path, sentencepiece_bpe(pieces))
    return path


def sentencepiece_bpe(pieces: list[str]) -> bytes:
    """A sentencepiece BPE model in LLaMA's layout: <unk>, <s>, </s>, 256 bytes, then pieces, most frequent first."""

    def entry(i: int, piece: str) -> bytes:
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
        score = 0 if i < 259 else -1e9 if not piece.strip("▁") else 259 - i
        return _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)

    trainer = [_field(3, 2), _field(4, len(pieces)), _field(35, 1)]  # BPE, vocab_size, byte_fallback
    normalizer = [_field(1, b"identity"), _field(3, 1), _field(4, 0), _field(5, 1)]  # dummy prefix, keep spaces, ▁
    entries = [_field(1, entry(i, piece)) for i, piece in enumerate(pieces)]
    return b"".join([*entries, _field(2, b"".join(trainer)), _field(3, b"".join(normalizer))])


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a number as a varint, bytes with their length in front."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups: list[int] = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def _fetch(command: Iterable[str], folder: Path, pattern: str) -> Path:
    """Runs a registry's client in ``folder`` and returns the package it left there."""
    try:
        done = subprocess.run(list(command), cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"{error}") from error
    found = sorted(folder.glob(pattern))
    if done.returncode or not found:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise Unreachable(f"{' '.join(command)}: {lines[-1]}")
    return found[0]


def _checked(content: bytes, sha256: str, package: str) -> bytes:
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{package} holds another file than expected: sha256 {found}, not {sha256}")
    return content


def _embedded(source: str, name: str) -> bytes:
    """A base64 constant of a JavaScript file."""
    found = re.search(name + r"\s*=\s*[\"'`]([A-Za-z0-9+/=]+)", source)
    if found is None:
        raise ValueError(f"{LLAMA_PACKAGE} has no constant {name}")
    return base64.b64decode(found[1])


def _store(path: Path, content: bytes) -> None:
    """Writes beside the file and moves it into place, since several workers may fetch at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    shutil.move(file.name, path)


if __name__ == "__main__":
    for vocabulary in (mistral, llama):
        print(vocabulary())

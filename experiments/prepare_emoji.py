"""Emoji as real pictures to train on: ``python -m experiments.prepare_emoji DIR [--out runs/emoji-data] [--skins]``.

DIR holds two npm packages, which nothing here downloads; with npm this brings them:
``npm install --prefix DIR emoji-datasource-google@16 emojibase-data@17``. The pictures are Google's (Apache-2.0), the
labels Unicode's. OUT gets ``pictures/`` and ``records.jsonl``: for each emoji a request to draw it and a question what
it is. The trainings ``emoji`` (of ``experiments.train_tokenizer`` and ``experiments.train``) read ``runs/emoji-data``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageOps
from tqdm import tqdm

from experiments.data.records import VALIDATION
from experiments.run import exit_code
from vargpt.files import atomic_file
from vargpt.images import load_image, save_image
from vargpt.text import IMAGE, IMAGE_GEN

PICTURES = Path("node_modules", "emoji-datasource-google", "img", "google", "64")
LABELS = Path("node_modules", "emojibase-data", "en", "data.json")
OUT = Path("runs", "emoji-data")
BORDER = 4
"""White pixels around a picture's 64, so that the square which training cuts out of 9/8 of its side is the picture."""


def emoji(folder: Path, *, skins: bool) -> list[tuple[str, Path]]:
    """Label and picture of every emoji that has both, in Unicode's order.

    Args:
        skins: with those that differ from another one by the colour of the skin alone.

    Raises:
        ValueError: the packages are not there.
    """
    pictures = {_code(file.stem): file for file in (folder / PICTURES).glob("*.png")}
    try:
        listed: list[dict[str, Any]] = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = []
    if not pictures or not listed:
        raise ValueError(
            f"{folder / (LABELS if pictures else PICTURES)} is not there; it comes with"
            f" npm install --prefix {folder} emoji-datasource-google@16 emojibase-data@17"
        )
    listed.sort(key=lambda one: one.get("order", 0))
    every = [one for base in listed for one in [base, *(base.get("skins", []) if skins else [])]]
    return [(one["label"], pictures[code]) for one in every if (code := _code(one["hexcode"])) in pictures]


def _code(name: str) -> str:
    """Code points that name an emoji, without FE0F ("in colour"), which one package leaves out where it can."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def records(found: list[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    """A drawing and a question of each emoji, in blocks such that both or neither are kept for validation."""
    for start in range(0, len(found), VALIDATION):
        some = found[start : start + VALIDATION]
        for label, file in some:
            yield _record(f"Please draw {label}.", IMAGE_GEN, file)
        for label, file in some:
            yield _record(f"What is this? {IMAGE}", label, file)


def _record(question: str, answer: str, file: Path) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [f"pictures/{file.name}"]}


def prepare(folder: Path, out: Path, *, skins: bool) -> None:
    """Write pictures and records."""
    found = emoji(folder, skins=skins)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for _, file in tqdm(found, unit="picture"):
        save_image(ImageOps.expand(load_image(file), BORDER, "white"), out / "pictures" / file.name)
    with atomic_file(out / "records.jsonl") as written:
        for record in records(found):
            written.write(json.dumps(record).encode() + b"\n")
    print(f"{len(found)} emoji are in {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that holds node_modules")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write ({OUT})")
    parser.add_argument("--skins", action="store_true", help="also those that differ by the colour of the skin alone")
    options = parser.parse_args(arguments)
    return exit_code(lambda: prepare(options.folder, options.out, skins=options.skins))


if __name__ == "__main__":
    sys.exit(main())

"""ImageNet as requests to draw: ``python -m experiments.prepare_imagenet DIR OUT [--names FILE] [--match FILE ...]``.

DIR holds the shards ``train-*.parquet`` of ``ILSVRC/imagenet-1k`` (columns ``image``, of ``{bytes, path}``, and
``label``). OUT gets what VARGPT's published data needs:

- ``pictures/image_SHARD_ROW.jpg``: the pictures, under the published names; shards are numbered in the order of their
  names (the published script takes them as the folder lists them);
- ``image_mapping.json`` from an image's prefix (``n01440764_10026``) to that name, and ``label_mapping.json`` from that
  name to its label;
- ``records.jsonl``: a request to draw each picture's class;
- of every record file to match: a file of its name whose pictures, named by their prefix, are those in OUT.

The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from experiments.data.pictures import BadRecord
from experiments.data.record_files import open_parquet, open_rows, reading_parquet, record_files
from experiments.run import exit_code
from vargpt.files import atomic_file, write_json
from vargpt.text import IMAGE_GEN


@dataclass(frozen=True, kw_only=True)
class LabelledPicture:
    """One row of ImageNet, and the published name of its picture."""

    name: str
    prefix: str
    label: int
    content: bytes


def prefix(path: str) -> str:
    """What names an image of ImageNet: ``n01440764_10026`` of ``n01440764_10026_n01440764.JPEG``."""
    return "_".join(PurePosixPath(path).stem.split("_")[:2])


def rows(shards: list[Path]) -> Iterator[LabelledPicture]:
    """All rows of the shards.

    Raises:
        ValueError: a shard that cannot be read, or a row without picture, path or label, with its number.
    """
    for number, shard in enumerate(shards):
        parquet, row = open_parquet(shard), 0
        with reading_parquet(shard):
            for batch in parquet.iter_batches(256, columns=["image", "label"]):
                for image, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    if not image or not image.get("bytes") or not image.get("path") or label is None:
                        raise ValueError(f"row {row} of {shard} lacks its picture's bytes or path, or its label")
                    yield LabelledPicture(
                        name=f"image_{number}_{row}.jpg",
                        prefix=prefix(image["path"]),
                        label=label,
                        content=image["bytes"],
                    )
                    row += 1


def class_names(shard: Path, file: Path | None) -> list[str]:
    """What the labels mean: lines of a file, or what ``datasets`` left in the shard; the first of several names.

    Raises:
        ValueError: neither is there.
    """
    if file is not None:
        try:
            names = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the names of classes from {file} ({error})") from None
    else:
        described = json.loads((open_parquet(shard).schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = described.get("info", {}).get("features", {}).get("label", {}).get("names", [])
    if not names:
        raise ValueError(f"{file or shard} has no names of classes: give a file with one a line (--names FILE)")
    return [name.split(",")[0].strip() for name in names]


def request(picture: LabelledPicture, names: list[str]) -> dict[str, Any]:
    """The record that asks for a picture's class.

    Raises:
        ValueError: a label without a name.
    """
    if not 0 <= picture.label < len(names):
        raise ValueError(f"{picture.name} has label {picture.label}, of {len(names)} names of classes: see --names")
    name = names[picture.label]
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return {
        "messages": [
            {"role": "user", "content": f"Please draw {article} {name}."},
            {"role": "assistant", "content": IMAGE_GEN},
        ],
        "images": [f"pictures/{picture.name}"],
    }


def prepare(folder: Path, out: Path, names_file: Path | None, match: list[Path]) -> None:
    """Write pictures, mappings and records."""
    shards = record_files(str(folder / "train-*.parquet"))
    names = class_names(shards[0], names_file)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    images: dict[str, str] = {}
    labels: dict[str, int] = {}
    with atomic_file(out / "records.jsonl") as records:
        for picture in tqdm(rows(shards), unit="picture"):
            line = json.dumps(request(picture, names))
            place = out / "pictures" / picture.name
            if not place.is_file() or place.stat().st_size != len(picture.content):
                with atomic_file(place) as file:
                    file.write(picture.content)
            images[picture.prefix], labels[picture.name] = picture.name, picture.label
            records.write(line.encode() + b"\n")
    write_json(out / "image_mapping.json", images)
    write_json(out / "label_mapping.json", labels)
    for file in match:
        matched(file, out, images)


def matched(file: Path, out: Path, images: Mapping[str, str]) -> None:
    """A published record file, with its images' prefixes replaced by the pictures' names.

    Raises:
        BadRecord: a record without a list of images, or one that names an image that is not there.
    """
    read = open_rows(file)
    with atomic_file(out / file.with_suffix(".jsonl").name) as written:
        for i, row in enumerate(read.scan()):
            if isinstance(row, BadRecord):
                raise row
            if not isinstance(row, Mapping) or not isinstance(row.get("images"), list):
                raise BadRecord(f"{read.name(i)} has no list of images")
            found = [images.get(prefix(str(name))) for name in row["images"]]
            if None in found:
                missing = row["images"][found.index(None)]
                raise BadRecord(f"{read.name(i)}: no picture in the shards is called {missing!r:.80}")
            line = json.dumps({**row, "images": [f"pictures/{name}" for name in found]})
            written.write(line.encode() + b"\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, made if need be")
    parser.add_argument("--names", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--match", type=Path, nargs="+", default=[], metavar="FILE", help="published record files")
    options = parser.parse_args(arguments)
    return exit_code(lambda: prepare(options.folder, options.out, options.names, options.match))


if __name__ == "__main__":
    sys.exit(main())

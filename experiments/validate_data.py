"""Look for bad records: ``python -m experiments.validate_data FILE ... [--images DIR] [--fast]``.

FILE is a record file (``experiments/data/records.py``) or a pattern such as ``'data/train-*.parquet'``. Every bad
record gets one line on standard output: the one that a training would stop at. Exits with 1 where there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from experiments.data.pictures import BadRecord, attempt
from experiments.data.record_files import record_files
from experiments.data.records import Record, RecordFiles
from experiments.run import exit_code

BATCH = 32
"""Records that one thread looks at together, and such batches that are held in memory."""


def faults(file: Path, images: Path | None, *, fast: bool = False) -> Iterator[BadRecord | None]:
    """What is wrong with each record of a file, in order.

    Args:
        images: folder of the pictures; by default the file's own.
        fast: only find the pictures' files, do not read them.

    Raises:
        ValueError: the file cannot be read (on), for a reason that is no single record's.
    """
    records = RecordFiles([file], images).scan()
    batches = iter(lambda: list(islice(records, BATCH)), [])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        while some := list(islice(batches, BATCH)):
            for found in pool.map(partial(_faults, fast=fast), some):
                yield from found


def _faults(records: list[Record | BadRecord], fast: bool) -> list[BadRecord | None]:
    return [record if isinstance(record, BadRecord) else _fault(record, fast) for record in records]


def _fault(record: Record, fast: bool) -> BadRecord | None:
    for picture in record.images:
        if not (fast and picture.file.is_file()):
            found = attempt(picture.load)
            if isinstance(found, BadRecord):
                return found
    return None


def validate(patterns: list[str], images: Path | None, *, fast: bool = False) -> int:
    """Print what is wrong with the records of files; returns the number of bad records and of unreadable files."""
    bad, total = 0, 0
    for file in [file for pattern in patterns for file in record_files(pattern)]:
        with tqdm(desc=str(file), unit="record") as bar:
            try:
                for fault in faults(file, images, fast=fast):
                    bar.update()
                    total += 1
                    if fault is not None:
                        bad += 1
                        bar.write(_line(fault))
            except ValueError as error:
                bad += 1
                bar.write(_line(error))
    print(f"{bad} bad of {total} records")
    return bad


def _line(error: ValueError) -> str:
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="record files, or patterns")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (each file's own)")
    parser.add_argument("--fast", action="store_true", help="only find the pictures' files, do not read them")
    options = parser.parse_args(arguments)
    bad: list[int] = []
    code = exit_code(lambda: bad.append(validate(options.files, options.images, fast=options.fast)))
    return code or int(bad[0] > 0)


if __name__ == "__main__":
    sys.exit(main())

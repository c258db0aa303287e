"""What is wrong with data is said in one line with its place, and nothing that was written is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vargpt
from experiments import train, train_tokenizer, validate_data
from experiments.data.pictures import BadRecord
from experiments.data.records import RecordFiles, Records
from experiments.data.token_cache import TokenCache
from experiments.run import Run, exit_code
from tests.experiments.test_runs import SMALL, run_tokenizer
from vargpt.build import build
from vargpt.config import NANO
from vargpt.files import write_json
from vargpt.images import save_image
from vargpt.tensorfiles import MemorySource, write_safetensors


def record(role: str, text: str, *images: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": text}], "images": images})


FAULTS = {
    3: ('{"messages": [', "is not JSON"),
    5: ("[1]", "must be an object, not list"),
    6: (record("robot", "Hello"), "a turn needs a role"),
    8: (record("user", "<image>"), "has 1 placeholders (<image> or <image_gen>) for 0 pictures"),
    9: (record("user", "<image_gen>", "good.png", "good.png"), "has 1 placeholders"),
    10: (record("user", "<image>", "absent.jpg"), "absent.jpg (no such file)"),
    12: (record("user", "<image_gen>", "cut.jpg"), "cut.jpg (image file is truncated"),
    13: (record("user", "<image>", "text.jpg"), "text.jpg (unknown or damaged format)"),
    14: (json.dumps({"messages": [{"role": "user", "content": "<image>"}], "images": [7]}), "picture 0 must be a file"),
    15: ('{"messages": [3]}', "a turn must be an object, not int"),
    16: ("[" * 100_000, "is nested too deeply"),
}


def noise(seed: int, side: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A file of good records, empty lines, and one record for every fault."""
    noise(0).save(tmp_path / "good.png")
    noise(1).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no picture")
    good = [record("user", "<image_gen>", "good.png"), record("user", "<image>", "good.png")]
    lines = [FAULTS[n][0] if n in FAULTS else "" if n % 10 == 1 else good[n % 2] for n in range(1, 40)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return tmp_path / "records.jsonl"


def test_the_validator_names_every_bad_record(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_data.main([str(faulty)]) == 1
    *named, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(FAULTS)} bad of 35 records"
    assert len(named) == len(FAULTS)
    for line, (number, (_, complaint)) in zip(named, FAULTS.items(), strict=True):
        assert line.startswith(f"line {number} of {faulty}")
        assert complaint in line
    assert validate_data.main([str(faulty), "--fast"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(FAULTS) - 2} bad of 35 records"  # it reads no picture
    (faulty.parent / "good.jsonl").write_text(record("user", "<image>", "good.png"))
    assert validate_data.main([str(faulty.parent / "good.jsonl")]) == 0
    assert validate_data.main([str(faulty.parent / "good.jsonl"), "--images", str(faulty.parent / "pictures")]) == 1
    assert validate_data.main(["absent.jsonl"]) == 2
    assert "error: cannot read records from absent.jsonl: no such file" in capsys.readouterr().err


def test_an_unreadable_file_does_not_end_the_validation(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faulty.parent / "empty.parquet").touch()
    (faulty.parent / "good.jsonl").write_text(record("user", "Hello"))
    files = [str(faulty.parent / name) for name in ("empty.parquet", "good.jsonl")]
    assert validate_data.main(files) == 1
    named, last = capsys.readouterr().out.splitlines()
    assert named == f"cannot read records from {files[0]}: it is empty (0 bytes)"
    assert last == "1 bad of 1 records"


def test_a_long_file_is_validated_in_reasonable_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, file = record("user", "What is this? " * 10), tmp_path / "long.jsonl"
    file.write_text("".join((good[:-9] if i % 100 == 7 else good) + "\n" for i in range(100_000)))
    started = time.process_time()
    assert validate_data.main([str(file)]) == 1
    assert time.process_time() - started < 60  # five seconds, where nothing else runs
    *named, last = capsys.readouterr().out.splitlines()
    assert last == "1000 bad of 100000 records"
    assert [line.split(" of ")[0] for line in named] == [f"line {i + 1}" for i in range(7, 100_000, 100)]


def test_training_stops_at_the_first_bad_record_or_goes_on(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    arguments = [
        "nano",
        f"tokenizer={tmp_path / 'tokenizer' / 'model'}",
        "start=[]",
        "stages.0.rows={drawing: 2, question: 2, text: 0}",
        "stages.0.schedule={steps: 12, lr: 0.001}",
        "validation=2",
        "plan=false",
    ]

    def trained(name: str, more: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        data = f"data=[{{records: {faulty.parent / name}{more}}}]"
        code = train.main([*arguments, data, "--out", str(tmp_path / "run")])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "warning"))]

    code, lines = trained(faulty.name, "")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: line 3 of {faulty} is not JSON")
    (faulty.parent / "empty.parquet").touch()
    assert trained("empty.parquet", ", bad: skip")[1] == [
        f"error: cannot read records from {faulty.parent / 'empty.parquet'}: it is empty (0 bytes)"
    ]
    code, lines = trained(faulty.name, ", bad: skip")
    assert code == 0, lines
    assert lines[0].startswith(f"warning: 8 of 35 records are bad and left out; the first: line 3 of {faulty}")
    assert sorted(line.split(": ")[2].split(" of ")[0] for line in lines[1:]) == ["line 10", "line 12", "line 13"]
    assert "left out, 3 so far" in lines[-1]


def test_cached_tokens_know_what_could_not_be_read(faulty: Path) -> None:
    vqvae = build(NANO).vqvae
    assert vqvae is not None
    rows = [record("user", "<image_gen>", name) for name in ("good.png", "cut.jpg", "absent.jpg")]
    faulty.write_text("\n".join(rows))
    files, folder = RecordFiles([faulty]), faulty.parent / "tokens"
    drawings = [files.record(i).drawings[0] for i in range(3)]
    caches = [TokenCache(folder, drawings, vqvae, torch.device("cpu"), bad="skip") for _ in range(2)]  # made, then read
    for cache in caches:
        assert len(cache.tokens(drawings[0])) == len(vqvae.schedule)
        for i, complaint in ((1, "line 2 of .* truncated"), (2, "line 3 of .*no such file")):
            with pytest.raises(BadRecord, match=complaint):
                cache.tokens(drawings[i])
    source = Records(files, 32, caches[1], bad="skip")
    assert len({str(source.example("drawing", 0, i, "train").drawings) for i in range(6)}) == 1
    with pytest.raises(BadRecord, match=r"line 2 of .* truncated"):
        TokenCache(faulty.parent / "others", drawings, vqvae, torch.device("cpu"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte free."""
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 512)


def weights(value: float) -> MemorySource:
    return MemorySource({"w": torch.full((200, 200), value)})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path, seed: write_json(path, [seed] * 30_000)),
        ("a.png", lambda path, seed: save_image(noise(seed), path)),
        ("model.safetensors", lambda path, seed: write_safetensors(path.parent, weights(seed))),
    ],
)
def test_a_full_disk_leaves_the_old_file(disk: Path, name: str, write: Callable[[Path, int], Any]) -> None:
    path = disk / name
    write(path, 1)
    before = path.read_bytes()
    fill(disk)
    with pytest.raises(ValueError, match=f"cannot write {path} .No space left on device"):
        write(path, 2)
    assert path.read_bytes() == before
    assert {file.name for file in disk.iterdir()} == {name, "ballast"}
    (disk / "ballast").unlink()
    write(path, 2)
    assert path.read_bytes() != before


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["schedule.steps=12", "vqvae.channels=8", "vqvae.latent_channels=4", "validation=2"]
    arguments = ["nano", *SMALL, *small]
    assert train_tokenizer.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    step = train_tokenizer.TokenizerTrainer.step

    def filling(self: train_tokenizer.TokenizerTrainer, number: int) -> Any:
        if number == 6:  # the last state is that of step 4
            fill(disk)
        return step(self, number)

    monkeypatch.setattr(train_tokenizer.TokenizerTrainer, "step", filling)
    capsys.readouterr()
    assert train_tokenizer.main([*arguments, "--out", str(disk / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line and "step/s" not in line]
    assert errors == [f"error: cannot write {disk / 'run' / 'state.safetensors'} (No space left on device)"]
    (disk / "ballast").unlink()
    monkeypatch.setattr(train_tokenizer.TokenizerTrainer, "step", step)
    assert train_tokenizer.main([*arguments, "--out", str(disk / "run")]) == 0
    ours, theirs = (vargpt.load(place / "model").state_dict() for place in (disk / "run", tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scalars_on_a_full_disk_are_one_line_too(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(disk / "run", {}, {"model": torch.nn.Linear(2, 2)})
    shutil.copy(__file__, disk / "some")

    def log() -> None:
        fill(disk)
        for run.step in range(1000):
            run.log({"loss": 0.5})

    assert exit_code(log) == 2
    assert capfd.readouterr().err == f"error: cannot write into {disk / 'run'} (No space left on device)\n"

"""Every subject runs at a small size and says what it found, in a table and in JSON. No times are tested."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmark import __main__ as command
from experiments.benchmark import attention, cases, growth, machine, text
from experiments.benchmark.cases import DRAWING, WHOLE, Options, Spent, Table, random_model
from experiments.benchmark.counting import BACKWARD, DECODING, FORWARD, LLM, OPTIMIZER, REST, VAR, Work
from experiments.benchmark.draw import benchmark_draw
from experiments.benchmark.machine import Machine
from vargpt.build import preset
from vargpt.checkpoint import save

LIMITS = Machine(rate=1e11, bandwidth=2e10)
KEYS = {"case", "part", "seconds", "floor", "ratio", "peak_bytes", "rate", "bandwidth"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases run in this process, and the machine's limits are known."""

    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(cases, "apart", here)
    monkeypatch.setattr(Machine, "measured", lambda dtype: LIMITS)


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The line of JSON, after a table with as many rows."""
    assert command.main([*arguments, "--preset", "nano", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["benchmark"] == arguments[0]
    assert (result["model"], result["repeats"], result["threads"]) == ("nano", 1, torch.get_num_threads())
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(result["rows"])
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert row["seconds"] > 0
        assert row["floor"] > 0
        assert row["ratio"] == row["seconds"] / row["floor"]
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        assert (row["part"] == WHOLE) <= (row["peak_bytes"] is not None)
    return result


def test_drawing_has_parts_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, "draw")
    parts = [LLM, VAR, DECODING, REST, WHOLE]
    assert [(row["case"], row["part"]) for row in result["rows"]] == [
        (f"batch {batch}, a picture", part) for batch in (1, 4) for part in parts
    ]
    for start in (0, 5):
        *each, whole = result["rows"][start : start + 5]
        for column in ("seconds", "floor"):
            assert sum(row[column] for row in each) == pytest.approx(whole[column])
    assert result["not_run"] == {}


def test_text_is_compared_with_its_peer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the peer is not installed")
    monkeypatch.setattr(text, "BATCHES", (2,))
    ours, theirs = found(capsys, "text")["rows"]
    assert (ours["case"], theirs["case"]) == ("batch 2", "batch 2, transformers")
    assert ours["floor"] == theirs["floor"]
    assert ours["times transformers"] == theirs["seconds"] / ours["seconds"]
    for row in (ours, theirs):
        assert row["tokens/s"] == 2 * text.TOKENS / row["seconds"]
        assert 0 < row["of bandwidth"] <= row["floor"] / row["seconds"]


def test_a_peer_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BATCHES", (1,))
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    result = found(capsys, "text")
    assert [row["case"] for row in result["rows"]] == ["batch 1"]
    reason = "transformers is not installed: pip install -e '.[parity]'"
    assert result["not_run"] == {"batch 1, transformers": reason}


def test_training_is_compared_with_the_plain_step(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "train")["rows"]
    assert [row["part"] for row in rows] == 3 * [FORWARD, BACKWARD, OPTIMIZER, WHOLE]
    assert len({row["case"] for row in rows}) == 3
    wholes = [row for row in rows if row["part"] == WHOLE]
    for row in wholes:
        assert row["memory to plain"] == row["peak_bytes"] / wholes[0]["peak_bytes"]


def test_the_image_tokenizer_has_three_formats(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "tokenizer")["rows"]
    formats = ("as loaded", "contiguous", "channels last")
    assert [row["case"] for row in rows] == [f"{job}, {name}" for job in ("encode", "decode") for name in formats]


def test_loading_is_cold_and_warm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(random_model(preset("nano")), tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert command.main(["load", "--model", str(tmp_path), "--dtype", "bfloat16", "--repeats", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["dtype"]) == (str(tmp_path), "bfloat16")
    *_, warm = result["rows"]
    assert [row["case"] for row in result["rows"]] == [*(["cold"] if hasattr(os, "posix_fadvise") else []), "warm"]
    assert warm["floor"] == size / LIMITS.bandwidth
    assert all(row["peak to files"] == row["peak_bytes"] / size for row in result["rows"])


def test_a_folder_without_weights_cannot_be_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["load", "--model", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path}")
    assert message.count("\n") == 1


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="there is no matplotlib to plot with")
def test_growth_has_a_row_for_every_size_and_a_plot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(growth, "SCHEDULES", {256: (1, 2), 512: (1, 2, 3)})
    plot = tmp_path / "plots" / "growth.png"
    rows = found(capsys, "growth", "--sides", "256", "512", "--plot", str(plot))["rows"]
    assert [row["case"] for row in rows if row["part"] == WHOLE] == ["16 px, L = 5", "24 px, L = 14"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plot = tmp_path / "file" / "growth.png"
    assert command.main(["growth", "--preset", "nano", "--plot", str(plot)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {plot} (")


def test_longer_schedules_find_room_in_the_context() -> None:
    config = growth.resized(preset("bench-mid"), attention.SCHEDULES[1024])
    assert config.llm is not None
    assert config.vqvae is not None
    assert config.llm.max_positions > 8640
    assert config.vqvae.image_size == 1024


def test_what_memory_does_not_hold_is_not_begun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 10**6)
    assert command.main(["draw", "--preset", "nano"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: nano cannot be filled with random weights here: it needs about 0.6 GB")
    table = Table("draw", Options(preset="nano"))
    assert table.run("batch 9", 3e9, measured) is None
    table.show()
    reason = "it needs about 3.0 GB of memory, and 0.0 GB are free"
    *_, said, line = capsys.readouterr().out.splitlines()
    assert said == f"not run: batch 9: {reason}"
    assert json.loads(line)["not_run"] == {"batch 9": reason}


def test_a_process_that_is_killed_ends_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> Spent:
        raise BrokenProcessPool("a process ended abruptly")

    table = Table("draw", Options(preset="nano"))
    monkeypatch.setattr(cases, "apart", killed)
    assert table.run("one", 0, measured) is None
    monkeypatch.setattr(cases, "apart", lambda function: function())
    assert table.run("two", 0, measured) == (measured(), LIMITS)
    assert table.missing == {"one": "its process was killed, perhaps for want of memory"}


def measured() -> Spent:
    return Spent(seconds={"first": 1.0, "second": 2.0, WHOLE: 4.0}, peaks={"first": 10**6, WHOLE: 2 * 10**6})


def test_a_row_is_a_share_of_what_was_measured() -> None:
    table = Table("draw", Options(preset="nano"))
    floors = {"first": [Work(flops=1e11)], "second": [Work(bytes=2e10), Work()], "third": []}
    whole = table.add("four", measured(), LIMITS, floors, share=0.5, more=3.0)
    assert (whole.seconds, whole.floor, whole.ratio, whole.peak) == (2.0, 1.0, 2.0, 2 * 10**6)
    assert table.markdown().splitlines() == [
        "| case | part | seconds | floor | ratio | peak, MB | more |",
        "|---|---|---|---|---|---|---|",
        "| four | first | 0.500 | 0.500 | 1.00 | 1 | - |",
        "| four | second | 1.000 | 0.500 | 2.00 | - | - |",
        "| four | all | 2.000 | 1.000 | 2.00 | 2 | 3.00 |",
    ]


def test_a_named_model_is_measured_as_it_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_model(Options(preset="nano").config(*DRAWING)), tmp_path)
    monkeypatch.setattr(cases, "_write", lambda config, folder: pytest.fail("random weights were written"))
    table = benchmark_draw(Options(model=str(tmp_path), repeats=1))
    assert len(table.rows) == 10
    assert json.loads(table.json())["model"] == str(tmp_path)


def test_all_goes_on_after_what_cannot_run_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def run(options: argparse.Namespace) -> bool:
        asked.append((options.what, getattr(options, "preset", None)))
        if options.what == "text":
            raise ValueError("no\nmemory")
        return options.what != "kernels"

    monkeypatch.setattr(command, "run", run)
    assert command.main(["all", "--preset", "tiny"]) == 1
    models = ["draw", "text", "train", "tokenizer", "load", "growth"]
    assert asked == [*((what, "tiny") for what in models), ("attention", None), ("kernels", None)]
    assert capsys.readouterr().out == "not run: text: no memory\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["text", "--preset", "big"], "unknown preset 'big': choose one of nano, tiny, small, bench-mid, vargpt-7b"),
        (["all", "--preset", "big"], "unknown preset 'big': choose one of nano, tiny, small, bench-mid, vargpt-7b"),
        (["load", "--model", ""], "the model's name is empty: give one, a directory or a hub id"),
    ],
)
def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"

"""Record files of every kind are read alike, from where they lie."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data.chat import Example
from experiments.data.pictures import BadRecord
from experiments.data.record_files import JsonRows, ParquetRows, open_rows, record_files
from experiments.data.records import Record, RecordFiles, Records

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def png(level: int) -> bytes:
    """A grey picture's file."""
    file = io.BytesIO()
    Image.new("RGB", (40, 36), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def asked(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"<image> {i}?"}, {"role": "assistant", "content": f"{i}. <image_gen>"}]


def parquet(file: Path, columns: dict[str, Any], rows_per_group: int) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)
    return file


@given(rows=st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=5), indent=st.sampled_from([None, 2]))
def test_members_of_a_list_are_found_without_reading_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None
) -> None:
    for ascii_only in (True, False):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        file = tmp_path_factory.getbasetemp() / "list.json"
        file.write_bytes(b" \n" + text + b"\n")
        assert list(JsonRows(file).scan()) == rows


@pytest.mark.parametrize("text", ["[{", "[{} {}]", '[{"a": 1}, 3, {}]', '[{"a": 1}] {}', "[{}", '["'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read records from .*a.json: after \d records, at byte \d+"):
        open_rows(tmp_path / "a.json")


def test_a_damaged_member_of_a_list_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": }, {"c": 3}]')
    first, second, third = open_rows(tmp_path / "a.json").scan()
    assert (first, third) == ({"a": 1}, {"c": 3})
    assert isinstance(second, BadRecord)
    assert "record 1 of" in str(second)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "other.parquet", {"text": ["a"]}, 1)
    with pytest.raises(ValueError, match=r"other.parquet has no column messages or conversations, but text"):
        open_rows(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*cut.parquet as parquet \(\d+ bytes: "):
        open_rows(tmp_path / "cut.parquet")
    (tmp_path / "data.json").write_text("")
    with pytest.raises(ValueError, match=r"data.json: it is empty \(0 bytes\)"):
        open_rows(tmp_path / "data.json")


def test_without_pyarrow_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a.parquet", {"messages": [asked(0)]}, 1)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"install pyarrow: pip install 'vargpt\[data\]'"):
        open_rows(tmp_path / "a.parquet")


def shown(example: Example) -> tuple[str, list[bytes], list[float]]:
    drawings = [float(np.asarray(drawing).mean()) for drawing in example.drawings]
    return example.messages[0]["content"], [image.tobytes() for image in example.images], drawings


def test_pictures_lie_in_folders_or_in_tables(tmp_path: Path) -> None:
    """Lists of {bytes, path}, of bare bytes and of paths, and LLaVA's single picture, mean the same records."""
    count = 7
    for i in range(2 * count):
        (tmp_path / f"{i}.png").write_bytes(png(i * 10))
    names = [[f"{2 * i}.png", f"{2 * i + 1}.png"] for i in range(count)]
    rows = [{"messages": asked(i), "images": names[i]} for i in range(count)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    messages = [asked(i) for i in range(count)]
    bare = [[png(int(Path(name).stem) * 10) for name in some] for some in names]
    paired = [
        [{"bytes": content, "path": name} for content, name in zip(*both, strict=True)]
        for both in zip(bare, names, strict=True)
    ]
    paired[3][1]["bytes"] = None  # then its path counts
    files = [tmp_path / "a.jsonl"]
    for name, images in (("bare", bare), ("paired", paired), ("names", names)):
        files.append(parquet(tmp_path / f"{name}.parquet", {"messages": messages, "images": images}, 3))
    sources = [Records(RecordFiles([file]), 32) for file in files]
    for i in range(count):
        expected, *others = ({shown(s.example("drawing", 0, j, "train"))[0]: shown(s.example("drawing", 0, j, "train"))
                              for j in range(count)} for s in sources)  # fmt: skip
        key = f"<image> {i}?"
        assert all(other[key][1] == expected[key][1] for other in others)
        assert expected[key][2] == pytest.approx([(2 * i + 1) * 10 / 127.5 - 1], abs=1e-6)
        assert all(other[key][2] == expected[key][2] for other in others)
    single = {"conversations": [[{"from": "human", "value": "<image>"}], [{"from": "human", "value": "Hello"}]]}
    llava = parquet(tmp_path / "l.parquet", {**single, "image": [{"bytes": png(9), "path": None}, None]}, 1)
    first, second = RecordFiles([llava]).scan()
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert first.images[0].load().getpixel((0, 0)) == (9, 9, 9)
    assert (first.kind, second.kind) == ("question", "text")


def test_shards_are_one_and_their_rows_are_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(2):
        texts = [[{"role": "user", "content": f"{shard} {i}"}] for i in range(200)]
        parquet(tmp_path / f"train-{shard}.parquet", {"messages": texts}, 10)
    read: list[tuple[str, int]] = []
    original = ParquetRows._read

    def counted(self: ParquetRows, group: int) -> Any:
        read.append((self.file.name, group))
        return original(self, group)

    monkeypatch.setattr(ParquetRows, "_read", counted)
    files = RecordFiles(record_files(str(tmp_path / "train-*.parquet")))
    assert len(files) == 400
    assert len(np.unique(files.groups())) == 40
    source = Records(files, 32)
    seen = [source.example("text", 0, i, "train").messages[0]["content"] for i in range(380)]
    assert len(set(seen)) == 380
    assert len(read) == 40  # each row group once, though their rows come in no order
    assert len({text.split()[0] for text in seen[:40]}) == 2
    assert seen != [source.example("text", 1, i, "train").messages[0]["content"] for i in range(380)]


def test_examples_follow_from_their_number_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where bad records are skipped: a resumed run sees what an uninterrupted one would have seen."""
    for i in range(0, 40, 3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [{"messages": [{"role": "user", "content": f"<image_gen> {i}"}], "images": [f"{i}.png"]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = Records(RecordFiles([tmp_path / "a.jsonl"]), 32, bad="skip")
    all_of_it = [shown(whole.example("drawing", 3, i, "train")) for i in range(90)]
    resumed = Records(RecordFiles([tmp_path / "a.jsonl"]), 32, bad="skip")
    assert [shown(resumed.example("drawing", 3, i, "train")) for i in range(60, 90)] == all_of_it[60:]
    said = [line for line in capsys.readouterr().err.splitlines() if "no such file" in line]
    assert said[0].startswith("warning: left out, 1 so far: line ")
    assert len(said) < 2 * 26 + 1  # each bad one at most once by each of the two


def test_a_long_file_is_not_held_in_memory(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "word " * 300}]}
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps(row) + "\n") * 10_000)
    tracemalloc.start()
    source = Records(RecordFiles([file]), 32)
    source.example("text", 0, 0, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.stat().st_size > 15_000_000
    assert peak < 2_000_000

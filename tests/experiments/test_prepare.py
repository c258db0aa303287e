"""ImageNet's shards and two npm packages become records, without a download."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from experiments import prepare_emoji, prepare_imagenet, validate_data
from experiments.data.records import Record, RecordFiles
from experiments.run import settings
from experiments.train import Training
from experiments.train_tokenizer import TokenizerTraining
from vargpt.images import for_drawing, load_image

IMAGES = ("n01440764_10026_n01440764.JPEG", "n02007558_7_n02007558.JPEG", "n01440764_11155_n01440764.JPEG")
LABELS = (0, 1, 0)


def jpeg(level: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (30, 20), (level, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def shard(folder: Path, number: int, rows: list[int], names: list[str] | None) -> Path:
    """Some rows of a small ImageNet, as ``datasets`` writes them."""
    table = pa.table({
        "image": [{"bytes": jpeg(50 * i), "path": IMAGES[i]} for i in rows],
        "label": [LABELS[i] for i in rows],
    })  # fmt: skip
    if names is not None:
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    file = folder / f"train-{number:05d}-of-00002.parquet"
    pq.write_table(table, file)
    return file


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    names = ["tench, Tinca tinca", "flamingo"]
    shard(tmp_path, 1, [2], names)
    shard(tmp_path, 0, [0, 1], names)
    return tmp_path


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_imagenet_gets_the_published_names_and_becomes_requests(imagenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    published = {"messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": "<image_gen>"}]}
    (tmp_path / "instruct.json").write_text(json.dumps([published | {"images": ["n01440764_11155"]}]))
    arguments = [str(imagenet), str(out), "--match", str(tmp_path / "instruct.json")]
    assert prepare_imagenet.main(arguments) == 0
    assert json.loads((out / "image_mapping.json").read_text()) == {
        "n01440764_10026": "image_0_0.jpg",
        "n02007558_7": "image_0_1.jpg",
        "n01440764_11155": "image_1_0.jpg",
    }
    labels = {"image_0_0.jpg": 0, "image_0_1.jpg": 1, "image_1_0.jpg": 0}
    assert json.loads((out / "label_mapping.json").read_text()) == labels
    assert [(out / "pictures" / name).read_bytes() for name in labels] == [jpeg(0), jpeg(50), jpeg(100)]
    first, second, _ = lines(out / "records.jsonl")
    assert first == {
        "messages": [
            {"role": "user", "content": "Please draw a tench."},
            {"role": "assistant", "content": "<image_gen>"},
        ],
        "images": ["pictures/image_0_0.jpg"],
    }
    assert second["messages"][0]["content"] == "Please draw a flamingo."
    assert lines(out / "instruct.jsonl") == [published | {"images": ["pictures/image_1_0.jpg"]}]
    assert validate_data.main([str(out / "*.jsonl")]) == 0


def test_imagenet_goes_on_where_a_shard_was_bad(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (imagenet / "train-00001-of-00002.parquet").write_bytes(b"")
    arguments = [str(imagenet), str(tmp_path / "out")]
    assert prepare_imagenet.main(arguments) == 2
    assert "train-00001-of-00002.parquet as parquet (0 bytes: " in capsys.readouterr().err.splitlines()[-1]
    kept = tmp_path / "out" / "pictures" / "image_0_1.jpg"
    before = kept.stat().st_mtime_ns
    shard(imagenet, 1, [2], None)
    assert prepare_imagenet.main(arguments) == 0
    assert kept.stat().st_mtime_ns == before  # not written again
    assert len(lines(tmp_path / "out" / "records.jsonl")) == 3


def test_mistakes_about_imagenet_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*more: str) -> str:
        assert prepare_imagenet.main([str(tmp_path), str(tmp_path / "out"), *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert f"cannot read records from {tmp_path / 'train-*.parquet'}: no such file" in complaint()
    shard(tmp_path, 0, [0, 1], None)
    assert "has no names of classes: give a file with one a line (--names FILE)" in complaint()
    assert "cannot read the names of classes from absent" in complaint("--names", "absent")
    (tmp_path / "names").write_text("owl\n")
    assert "image_0_1.jpg has label 1, of 1 names of classes: see --names" in complaint("--names", f"{tmp_path}/names")
    (tmp_path / "names").write_text("owl\ntench\n")
    for text, expected in (
        ('{"images": ["n9_9"]}', "line 1 of {}: no picture in the shards is called 'n9_9'"),
        ("7", "line 1 of {} has no list of images"),
        ("{", "line 1 of {} is not JSON"),
    ):
        (tmp_path / "own.jsonl").write_text(text)
        said = complaint("--names", f"{tmp_path}/names", "--match", f"{tmp_path}/own.jsonl")
        assert expected.format(tmp_path / "own.jsonl") in said
    assert lines(tmp_path / "out" / "records.jsonl")[0]["messages"][0]["content"] == "Please draw an owl."
    assert not (tmp_path / "out" / "own.jsonl").exists()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """What npm would install, of three emoji."""
    pictures, labels = tmp_path / prepare_emoji.PICTURES, tmp_path / prepare_emoji.LABELS
    for folder in (pictures, labels.parent):
        folder.mkdir(parents=True)
    for name in ("1f44b", "1f44b-1f3fb", "2639-fe0f", "1f9ff"):
        Image.new("RGBA", (64, 64), "red").save(pictures / f"{name}.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(pictures / "1f9ff.png")
    listed = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "frowning face", "hexcode": "2639", "order": 90},
        {"label": "nazar amulet", "hexcode": "1F9FF", "order": 80},
        {"label": "waving hand", "hexcode": "1F44B", "order": 188,
         "skins": [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"}]},
    ]  # fmt: skip
    labels.write_text(json.dumps(listed))
    return tmp_path


def test_emoji_become_requests_and_questions(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare_emoji.main([str(packages), "--out", str(out)]) == 0
    texts = [[turn["content"] for turn in row["messages"]] for row in lines(out / "records.jsonl")]
    labels = ["nazar amulet", "frowning face", "waving hand"]
    assert texts == [
        *([f"Please draw {label}.", "<image_gen>"] for label in labels),
        *(["What is this? <image>", label] for label in labels),
    ]
    assert validate_data.main([str(out / "records.jsonl")]) == 0
    hand = load_image(out / "pictures" / "1f44b.png")
    assert for_drawing(hand, 64).flatten(1).unique(dim=1).T.tolist() == [[1, -1, -1]]  # the border is cut off
    assert load_image(out / "pictures" / "1f9ff.png").getpixel((30, 30)) == (255, 255, 255)
    assert prepare_emoji.main([str(packages), "--out", str(out), "--skins"]) == 0
    assert "Please draw waving hand: light skin tone." in (out / "records.jsonl").read_text()


def test_emoji_have_configurations() -> None:
    _, tokenizer = settings("tokenizer", TokenizerTraining, ["emoji"])
    _, model = settings("train", Training, ["emoji"])
    assert tokenizer.vqvae.image_size == 32
    folder = prepare_emoji.OUT
    assert (tokenizer.data.folder, model.data[0].records) == (str(folder / "pictures"), str(folder / "records.jsonl"))


def test_both_records_of_an_emoji_are_kept_for_validation(packages: Path, tmp_path: Path) -> None:
    found = [(str(i), Path(f"{i}.png")) for i in range(60)]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps(r) for r in prepare_emoji.records(found)))
    held_out = [r for i, r in enumerate(RecordFiles([tmp_path / "all.jsonl"]).scan()) if i % 20 == 19]
    names = [record.images[0].file.name for record in held_out if isinstance(record, Record)]
    assert names == ["19.png", "19.png", "39.png", "39.png", "59.png", "59.png"]


def test_missing_packages_name_what_installs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_emoji.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"npm install --prefix {tmp_path} emoji-datasource-google@16 emojibase-data@17" in error
    assert not (tmp_path / "out").exists()

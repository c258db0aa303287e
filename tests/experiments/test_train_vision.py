"""A vision encoder that learns what each patch shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vargpt
from experiments import train_vision
from experiments.data.shapes import FULL, NANO, Object, Scene
from experiments.train_vision import NOTHING, PatchReader
from vargpt.build import preset
from vargpt.vision import OpenClipConfig, OpenClipEncoder

SHORT = ["schedule.warmup=1", "batch=2", "validation=4", "save_every=2", "evaluate_every=3"]


def reader_of(name: str) -> PatchReader:
    vision = preset(name).vision
    assert isinstance(vision, OpenClipConfig)
    return PatchReader(OpenClipEncoder(vision), {"nano": NANO, "tiny": FULL}[name])


def test_patches_are_labelled_with_the_object_that_covers_them() -> None:
    reader = reader_of("nano")  # 4 x 4 patches
    circle = Object(shape="circle", colour="blue", size="large", x=0.25, y=0.25)
    square = Object(shape="square", colour="red", size="large", x=0.75, y=0.5)
    labels = {name: label.view(4, 4).tolist() for name, label in reader.labels([Scene((circle, square))]).items()}
    assert labels["covered"] == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    n = NOTHING
    assert labels["shape"] == [[0, 0, n, n], [0, 0, 1, 1], [n, n, 1, 1], [n, n, n, n]]
    assert labels["colour"] == [[2, 2, n, n], [2, 2, 0, 0], [n, n, 0, 0], [n, n, n, n]]
    x, y = reader.classes["x"], reader.classes["y"]
    assert labels["x"][0][0] == x.index(0.25)
    assert labels["x"][2][2] == x.index(0.75)
    assert labels["y"][2][2] == y.index(0.5)


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_every_attribute_of_every_object_is_told_by_some_patch(name: str) -> None:
    reader, world = reader_of(name), {"nano": NANO, "tiny": FULL}[name]
    scenes = [world.sample("test", i) for i in range(100)]
    labels = reader.labels(scenes)
    for row, scene in enumerate(scenes):
        told = torch.stack([labels[attribute][row] for attribute in reader.classes])
        of_patches = {tuple(patch) for patch in told.T.tolist() if NOTHING not in patch}
        assert of_patches == {
            tuple(values.index(getattr(o, attribute)) for attribute, values in reader.classes.items())
            for o in scene.objects
        }


def test_it_learns_and_leaves_an_encoder_that_loads(tmp_path: Path) -> None:
    changes = ["schedule.steps=40", "schedule.lr=0.002", "schedule.warmup=5", "batch=32", "evaluate_every=40"]
    assert train_vision.main(["nano", *changes, "validation=32", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (accuracy,) = (line for line in lines if "validation/colour" in line)
    assert accuracy["validation/colour"] > 0.5  # chance: 0.25
    assert accuracy["validation/covered"] > 0.7
    model = vargpt.load(tmp_path / "model")
    assert model.llm is None
    assert isinstance(model.vision, OpenClipEncoder)
    assert (tmp_path / "samples" / "patches-000040.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["nano", *SHORT, "schedule.steps=5", "--out"]
    assert train_vision.main([*arguments, str(tmp_path / "whole")]) == 0
    step = train_vision.VisionTrainer.step

    def cut(self: train_vision.VisionTrainer, number: int) -> object:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(train_vision.VisionTrainer, "step", cut)
    assert train_vision.main([*arguments, str(tmp_path / "cut")]) == 2
    monkeypatch.setattr(train_vision.VisionTrainer, "step", step)
    assert train_vision.main([*arguments, str(tmp_path / "cut")]) == 0
    whole, cut_off = (vargpt.load(tmp_path / run / "model").state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut_off[name]) for name in whole)


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, complaint in (("preset=huge", "unknown preset 'huge'"), ("world=flat", "'flat'")):
        assert train_vision.main(["nano", change, "--out", str(tmp_path / "run")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert complaint in line
    assert not (tmp_path / "run").exists()

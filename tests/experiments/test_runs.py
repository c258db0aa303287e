"""Training: resumable to the same losses, refusing what it cannot do in one line, leaving models that load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

import vargpt
from experiments import train, train_tokenizer
from experiments.data.chat import collate
from experiments.data.images import PictureData, picture_source
from experiments.data.shapes_chat import ShapeChats
from experiments.optimization import low_precision
from experiments.run import Schedule, settings
from experiments.train_tokenizer import TokenizerTraining
from vargpt.build import build
from vargpt.model import VARGPT
from vargpt.text import SentencePieceTokenizer

SMALL = [
    "vqvae.channels=16",
    "vqvae.norm_groups=4",
    "vqvae.vocab_size=32",
    "batch=2",
    "schedule.warmup=2",
    "codebook.restart_every=3",
    "validation=4",
    "save_every=4",
    "evaluate_every=6",
]


def losses(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(vargpt.load(folder / "model").state_dict())


def run_tokenizer(folder: Path, *changes: str) -> int:
    return train_tokenizer.main(["nano", *SMALL, *changes, "--out", str(folder)])


@pytest.mark.parametrize("changes", [(), ("codebook.update=ema",), ("adversary={start: 3, channels: 8}",)])
def test_a_tokenizer_run_that_was_cut_off_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    changes = ("schedule.steps=12", *changes)
    assert run_tokenizer(tmp_path / "whole", *changes) == 0
    step = train_tokenizer.TokenizerTrainer.step

    def cut(self: train_tokenizer.TokenizerTrainer, number: int) -> object:
        if number == 10:  # steps 8 and 9 are lost: the last state is that of step 8
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(train_tokenizer.TokenizerTrainer, "step", cut)
    assert run_tokenizer(tmp_path / "cut", *changes) == 2
    monkeypatch.setattr(train_tokenizer.TokenizerTrainer, "step", step)
    assert run_tokenizer(tmp_path / "cut", *changes) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "cut" / "samples").iterdir()) == [
        "prefixes-000006.png",
        "prefixes-000012.png",
    ]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    changes = ["schedule.steps=300", "save_every=10", "evaluate_every=1000"]
    command = [sys.executable, "-m", "experiments.train_tokenizer", "nano", *SMALL, *changes, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    killed = subprocess.Popen([*command, str(tmp_path / "cut")], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "state.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    time.sleep(0.7)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*command, str(tmp_path / "cut")], check=True, env=environment, capture_output=True)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert whole[300] == resumed[300]
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_whole_model_trains_in_stages_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    stages = (
        "[{name: first, trains: [gen_in, gen_out, var.class_embed], schedule: {steps: 2, lr: 0.001},"
        " rows: {drawing: 2}}, {name: second, accumulate: 2, schedule: {steps: 5, lr: 0.001},"
        " rows: {drawing: 2, question: 2, text: 1}}]"
    )
    arguments = [
        "nano",
        f"tokenizer={tmp_path / 'tokenizer' / 'model'}",
        "start=[]",
        f"stages={stages}",
        "validation=2",
        "evaluate_every=100",
        "save_every=2",
    ]
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    step = train.StageTrainer.step

    def cut(self: train.StageTrainer, number: int) -> object:
        if self.stage.name == "second" and number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(train.StageTrainer, "step", cut)
    assert train.main([*arguments, "--out", str(tmp_path / "cut")]) == 2
    monkeypatch.setattr(train.StageTrainer, "step", step)
    assert train.main([*arguments, "--out", str(tmp_path / "cut")]) == 0
    first, second = weights(tmp_path / "whole" / "first"), weights(tmp_path / "whole" / "second")
    resumed = weights(tmp_path / "cut" / "second")
    assert all(torch.equal(second[name], resumed[name]) for name in second)
    start = build(vargpt.load(tmp_path / "whole" / "first" / "model").config).state_dict()
    changed = {name for name in first if not name.startswith("vqvae.") and not torch.equal(first[name], start[name])}
    assert changed
    assert all(name.startswith(("gen_in", "gen_out", "var.class_embed")) for name in changed)


def test_muon_in_half_precision_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    stage = "{name: joint, trains: [gen_in, gen_out], schedule: {steps: 4, lr: 0.001}, rows: {drawing: 2}}"
    place = [f"tokenizer={tmp_path / 'tokenizer' / 'model'}", "start=[]", f"stages=[{stage}]"]
    arguments = ["nano", *place, "muon=true", "autocast=true", "validation=2", "save_every=2", "evaluate_every=100"]
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    step = train.StageTrainer.step

    def cut(self: train.StageTrainer, number: int) -> object:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(train.StageTrainer, "step", cut)
    assert train.main([*arguments, "--out", str(tmp_path / "cut")]) == 2
    monkeypatch.setattr(train.StageTrainer, "step", step)
    assert train.main([*arguments, "--out", str(tmp_path / "cut")]) == 0
    whole, resumed = (weights(tmp_path / run / "joint") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def drawing_loss(*, recompute: bool) -> tuple[VARGPT, torch.Tensor]:
    """A small model, and its loss on drawings."""
    tokenizer = SentencePieceTokenizer.from_directory(train.TOKENIZER, vocab_size=640)
    model = build(vargpt.preset("nano"), seed=0, tokenizer=tokenizer)
    if recompute:
        train.recompute_blocks(model)
    source = ShapeChats("nano", 32, plan=True)
    loss = train.forward(model, collate(model, [source.example("drawing", 0, i, "train") for i in range(3)])).loss
    assert loss is not None
    return model, loss


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model, loss = drawing_loss(recompute=recompute)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][n], rtol=1e-5, atol=1e-7) for n, g in gradients[0].items())
    assert any(n.startswith("llm.") for n in gradients[0])


def test_recomputing_keeps_fewer_activations() -> None:
    def kept(recompute: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            drawing_loss(recompute=recompute)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


def test_photographs_train_a_tokenizer(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(photos / f"{name}.png")
    changes = ("data.world=null", f"data.folder={photos}", "schedule.steps=2", "evaluate_every=2")
    assert run_tokenizer(tmp_path / "run", *changes) == 0
    source = picture_source(PictureData(folder=str(photos)), 32)
    assert torch.equal(source.training(0, 3, 4), source.training(0, 3, 4))
    assert not torch.equal(source.training(0, 3, 4), source.training(0, 4, 4))
    assert source.validation(9).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["micro"], "unknown configuration 'micro': choose one of emoji, nano, tiny, vargpt-7b"),
        (["nano", "batch"], "'batch' must be key=value"),
        (["nano", "batchsize=3"], "nano has no field 'batchsize'"),
        (["nano", "vqvae.patch_nums=[4,2]"], "must not decrease"),
        (["nano", "data.folder=nowhere"], "name either a world or a folder"),
        (["nano", "data.world=null", "data.folder=nowhere"], "nowhere holds 0 pictures"),
        (["vargpt-7b"], "full_key: data.folder"),
        (["nano", "codebook.update=magic"], "must be one of 'gradient', 'ema', not 'magic'"),
    ],
)
def test_mistakes_get_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    assert train_tokenizer.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert complaint in lines[0]


def test_a_missing_tokenizer_names_its_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["tiny", "--out", str(tmp_path / "run")]) == 2
    assert "python -m experiments.train_tokenizer trains one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_tokenizer(tmp_path, "schedule.steps=1") == 0
    assert run_tokenizer(tmp_path, "schedule.steps=1", "seed=3") == 2
    assert "holds another run (differs in seed)" in capsys.readouterr().err


def test_the_schedule_warms_up_and_comes_down() -> None:
    schedule = Schedule(steps=110, lr=1.0, warmup=10, final=0.1)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(9) == schedule.at(10) == 1.0
    assert schedule.at(60) == pytest.approx(0.55)
    assert schedule.at(110) == pytest.approx(0.1)


def test_the_released_tokenizer_has_a_configuration() -> None:
    _, config = settings("tokenizer", TokenizerTraining, ["vargpt-7b", "data.folder=photos"])
    assert config.vqvae == vargpt.preset("vargpt-7b").vqvae
    assert config.vqvae.image_size == 256


@pytest.mark.parametrize("name", ["published", "fixed"])
def test_the_published_stages_train_what_they_say(tmp_path: Path, name: str) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    tokenizer = tmp_path / "tokenizer" / "model"
    short = [
        f"stages.{i}.{key}" for i in range(3) for key in ("schedule.steps=1", "accumulate=1", "data=[{world: nano}]")
    ]
    sizes = ["preset=nano", f"tokenizer={tokenizer}", "start=[]", "validation=2", *short]
    assert train.main([name, *sizes, "--out", str(tmp_path / "run")]) == 0
    before = build(vargpt.load(tmp_path / "run" / "stage1" / "model").config).state_dict()
    parts = {"stage1": {"gen_in", "gen_out", "var"}, "stage2": {"llm"}, "stage3": {"var", "gen_in", "gen_out"}}
    parts["stage2"] |= {"projector"} if name == "fixed" else set()
    for stage, expected in parts.items():
        after = weights(tmp_path / "run" / stage)
        changed = {n for n in after if not n.startswith("vqvae.") and not torch.equal(after[n], before[n])}
        assert {n.split(".")[0] for n in changed} == expected
        before = after
        if stage == "stage1":
            assert {n for n in changed if n.startswith("var.")} == {"var.class_embed.weight"}


def test_a_training_starts_from_the_parts_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    tokenizer = tmp_path / "tokenizer" / "model"
    arguments = ["nano", f"tokenizer={tokenizer}", "validation=2", "stages.0.rows={drawing: 1, question: 0, text: 0}"]
    first = [*arguments, "start=[]", "stages.0.schedule={steps: 1, lr: 0.001}", "--out", str(tmp_path / "first")]
    assert train.main(first) == 0
    started = [*arguments, "seed=5", f"start=[{tmp_path / 'first' / 'joint' / 'model'}]"]
    still = [*started, "stages.0.schedule={steps: 1, lr: 0.0}", "stages.0.trains=[var.head]"]
    assert train.main([*still, "--out", str(tmp_path / "second")]) == 0
    ours, theirs = weights(tmp_path / "first" / "joint"), weights(tmp_path / "second" / "joint")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run_tokenizer(tmp_path / "other", "schedule.steps=1", "vqvae.latent_channels=8") == 0
    other = tmp_path / "other" / "model"
    assert train.main([*arguments, f"start=[{other}]", "--out", str(tmp_path / "third")]) == 2
    assert f"cannot start from {other}: its vqvae is not of the same sizes" in capsys.readouterr().err


def test_record_files_train_beside_the_small_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tokenizer(tmp_path / "tokenizer", "schedule.steps=1") == 0
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{name}.png")
    drawn = {"messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": "<image_gen>"}]}
    asked = {"conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A woman."}]}
    rows = [drawn | {"images": ["chelsea.png"]}, drawn | {"images": ["coffee.png"]}, asked | {"image": "astronaut.png"}]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    arguments = [
        "nano",
        f"tokenizer={tmp_path / 'tokenizer' / 'model'}",
        "start=[]",
        "stages.0.rows={drawing: 2, question: 2, text: 0}",
        "stages.0.schedule={steps: 3, lr: 0.001}",
        "validation=2",
        "plan=false",
    ]
    records = f"{{records: {tmp_path / 'records.json'}, cache: true}}"
    mixed = [*arguments, f"data=[{records}, {{world: nano}}]", "--out", str(tmp_path / "run")]
    assert train.main(mixed) == 0
    assert len(list((tmp_path / "run" / "image_tokens").glob("*.safetensors"))) == 1
    assert vargpt.load(tmp_path / "run" / "joint" / "model").config.knows is None  # it has seen more than a world
    wanting = [*arguments, f"data=[{records}]", "stages.0.rows.text=1", "--out", str(tmp_path / "other")]
    assert train.main(wanting) == 2
    assert "stage 'joint' has no examples of kind 'text'" in capsys.readouterr().err


def test_half_precision_trains_to_nearly_the_same_loss() -> None:
    tokenizer = SentencePieceTokenizer.from_directory(train.TOKENIZER, vocab_size=640)
    model = build(vargpt.preset("nano"), seed=0, tokenizer=tokenizer)
    source = ShapeChats("nano", 32, plan=True)
    batch = collate(model, [source.example("drawing", 0, i, "train") for i in range(2)])
    whole = train.forward(model, batch).loss
    with low_precision(torch.device("cpu")):
        half = train.forward(model, batch).loss
    assert whole is not None
    assert half is not None
    half.backward()
    assert half.item() == pytest.approx(whole.item(), rel=0.01)
    assert half.item() != whole.item()  # it was at work
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)

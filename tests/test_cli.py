"""The commands as a user runs them, good input and bad, on the recorded checkpoint."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import skimage.data
from PIL import Image

import vargpt.sampling
from vargpt import cli


@pytest.fixture(scope="module")
def converted(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording, converted as a user would."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    assert cli.main(["convert", str(golden_dir / "vargpt_tiny"), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "cat.jpg"
    Image.fromarray(skimage.data.chelsea()).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and the error lines that are no progress bar."""
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    lines = [line.split("\r")[-1] for line in err.splitlines()]
    return code, out, "\n".join(line for line in lines if line.startswith(("error:", "note:")))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gets."""
    code, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_photograph_and_a_question_give_an_answer(
    capsys: pytest.CaptureFixture[str], converted: Path, photo: Path
) -> None:
    arguments = ("ask", photo, "What is this?", "--model", converted, "--max-new-tokens", 8)
    code, answer, _ = run(capsys, *arguments)
    assert code == 0
    assert answer.endswith("\n")
    assert run(capsys, *arguments)[1] == answer


def test_a_prompt_gives_a_picture_and_the_seed_decides_which(
    capsys: pytest.CaptureFixture[str], converted: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, out, _ = run(
            capsys, "draw", "a cat on a mat", "--model", converted, "-o", tmp_path / f"{name}.png", "--seed", seed
        )
        assert (code, out) == (0, f"{tmp_path / name}.png\n")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_several_pictures_and_their_steps(capsys: pytest.CaptureFixture[str], converted: Path, tmp_path: Path) -> None:
    output, steps = tmp_path / "out.png", tmp_path / "steps"
    code, out, _ = run(
        capsys, "draw", "a cat", "--model", converted, "-o", output, "--n", 2, "--steps-dir", steps, "--null", "prompt"
    )
    assert code == 0
    assert out.split() == [str(tmp_path / "out-1.png"), str(tmp_path / "out-2.png")]
    assert sorted(p.name for p in steps.iterdir()) == [
        f"out-{picture}-scale-{scale:02d}.png" for picture in (1, 2) for scale in (1, 2, 3, 4)
    ]
    assert (steps / "out-1-scale-04.png").read_bytes() == (tmp_path / "out-1.png").read_bytes()


@pytest.mark.parametrize("null", ["noise", "class", "prompt"])
@pytest.mark.parametrize("choices", ["published", "fixed"])
def test_every_unconditional_branch_draws(
    capsys: pytest.CaptureFixture[str], converted: Path, tmp_path: Path, null: str, choices: str
) -> None:
    output = tmp_path / "out.png"
    arguments = ("draw", "a cat", "--model", converted, "-o", output, "--null", null, "--choices", choices)
    assert run(capsys, *arguments)[0] == 0
    assert output.is_file()


def test_a_conversation_survives_a_mistyped_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, converted: Path, photo: Path, tmp_path: Path
) -> None:
    lines = ["/image nowhere.png", f"/image {photo}", "What is this?", "x" * 3000, "And now?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(capsys, "chat", "--model", converted, "--output-dir", tmp_path, "--max-new-tokens", 6)
    assert code == 0
    assert out.count("\n") >= 2
    assert err.count("error: not a picture: nowhere.png") == 1
    assert err.count("error: the prompt is too long") == 1
    assert err.count("text is read and written as bytes") == 1


def test_info_counts_every_part(capsys: pytest.CaptureFixture[str], converted: Path) -> None:
    code, out, _ = run(capsys, "info", converted)
    assert code == 0
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in out.splitlines()[1:]}
    assert set(counts) == {"llm", "vision", "projector", "var", "vqvae", "gen_in", "gen_out", "all"}
    assert counts["llm"] == 2 * 512 * 96 + 3 * (4 * 96 * 96 + 3 * 96 * 192 + 2 * 96) + 96
    assert counts.pop("all") == sum(counts.values())
    code, out, _ = run(capsys, "info", "vargpt-7b")
    assert "6,738,939,904" in out
    assert "2,069,546,116" in out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--top-p", "1.5"), "top_p must lie in (0, 1], not 1.5"),
        (("--top-p", "0"), "top_p must lie in (0, 1], not 0.0"),
        (("--top-k", "-1"), "top_k must be 0 (all) or more, not -1"),
        (("--temperature", "-1"), "temperature must be 0 (greedy) or more, not -1.0"),
        (("--cfg", "-1"), "cfg must be 0 (off) or more, not -1.0"),
        (("--n", "0"), "--n must be at least 1, not 0"),
        (("--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--null", "nothing"), "argument --null: invalid choice: 'nothing'"),
        (("--device", "gpu9"), "device 'gpu9' cannot be used here"),
        (("--model", "tinny"), "unknown model 'tinny': did you mean 'tiny'?"),
        (("--model", "no/such/place"), "unknown model 'no/such/place'"),
        (("-o", "nowhere/out.png"), "cannot write nowhere/out.png (no directory nowhere)"),
        (("-o", "out.txt"), "cannot write out.txt (unknown suffix '.txt')"),
        (("--patch-nums", "1,b"), "--patch-nums must be numbers with commas"),
        (("--patch-nums", "1,2"), "leave patch_nums out"),
        (("--seed", str(2**70)), "seed must lie between"),
        (("--device", "meta"), "device 'meta' cannot be used here"),
        (("--model", ""), "the model's name is empty"),
        (("--steps-dir", ""), "--steps-dir is empty"),
        (("--model", "m" * 300), "File name too long"),
        (("-o", "y" * 300 + ".png"), "File name too long"),
    ],
)
def test_options_out_of_range(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(capsys, "draw", "a cat", *options)
    assert not list(tmp_path.iterdir())


def test_prompts_that_cannot_be_read(capsys: pytest.CaptureFixture[str], converted: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    assert "the prompt is empty" in refused(capsys, "draw", "  ", "-o", output)
    endless = "a cat and " * 400
    message = refused(capsys, "draw", endless, "--model", converted, "-o", output)
    assert "the prompt is too long" in message
    assert "exceed the model's context of 2048" in message
    assert "must not contain <image>" in refused(capsys, "draw", "<image>", "-o", output)
    assert not output.exists()


def test_pictures_that_are_none(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path) -> None:
    text, half = tmp_path / "text.png", tmp_path / "half.jpg"
    text.write_text("no picture")
    half.write_bytes(photo.read_bytes()[:2000])
    for path in (text, half, tmp_path, tmp_path / "nowhere.png"):
        assert f"not a picture: {path}" in refused(capsys, "ask", path, "What?")
    assert "the question is empty" in refused(capsys, "ask", photo, " ")


def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "cannot write" in refused(capsys, "draw", "a cat", "-o", tmp_path / "file" / "out.png")
    assert "cannot write" in refused(capsys, "draw", "a cat", "-o", tmp_path / "folder.png")
    steps = refused(capsys, "draw", "a cat", "-o", tmp_path / "o.png", "--steps-dir", tmp_path / "file")
    assert "cannot write into" in steps


def test_checkpoints_that_are_damaged(capsys: pytest.CaptureFixture[str], converted: Path, tmp_path: Path) -> None:
    weights = (converted / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((converted / "config.json").read_bytes())
    assert "has no model.safetensors" in refused(capsys, "draw", "a cat", "--model", broken)
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "is truncated" in refused(capsys, "draw", "a cat", "--model", broken)
    (broken / "model.safetensors").write_bytes(b"\x80\x04 pretending")
    assert "is a pickle" in refused(capsys, "draw", "a cat", "--model", broken)
    (broken / "model.safetensors").write_bytes(weights)
    config = (converted / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"mlp_width": 192', '"mlp_width": 200'))
    assert "wrong shapes: 9" in refused(capsys, "draw", "a cat", "--model", broken)


def test_an_interrupt_leaves_no_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return vargpt.sampling.sample(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("vargpt.next_scale.sample", interrupted)
    output = tmp_path / "out.png"
    assert "interrupted" in refused(capsys, "draw", "a cat", "-o", output)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_saving_keeps_the_old_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "out.png"
    Image.new("RGB", (8, 8)).save(output)
    before = output.read_bytes()

    def half(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    assert "interrupted" in refused(capsys, "draw", "a cat", "-o", output)
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


def test_the_installed_command_answers_without_torch() -> None:
    code = (
        "import sys; from vargpt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("False")


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'paint'" in refused(capsys, "paint")

"""Score an embedded model and write down what it can do: ``python -m experiments.card [MODEL] [--world W] [--n N]``.

Writes ``scores.json`` and ``drawings.png`` beside the model, and its score table into every text that has a place for
it: the model's card (``README.md`` beside it) and this repository's README.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.data.shapes import WORLDS
from experiments.evaluate import Settings, Share, evaluate, sample_grid, write_scores
from experiments.run import exit_code
from vargpt.checkpoint import find, load
from vargpt.files import atomic_file
from vargpt.images import save_image

BEGIN, END = "<!-- scores: python -m experiments.card -->", "<!-- end of scores -->"
README = Path(__file__).parent.parent / "README.md"
SHOWN = {
    "tokenizer.exact": "image tokenizer: reconstructions read exactly right",
    "questions.all": "questions answered to the letter",
    "drawing.mean": "drawings: all six categories",
    "drawing.single_object": "single object",
    "drawing.colours": "colours",
    "drawing.two_objects": "two objects",
    "drawing.counting": "counting",
    "drawing.position": "position",
    "drawing.attribution": "attribution",
    "heldout.mean": "drawings of pairs of colour and shape never trained on",
    "draws_when_asked": "draws when asked, and only then",
}


def summary_table(scores: dict[str, Share], settings: Settings) -> str:
    """The scores that a reader asks for first, as markdown."""
    rows = [
        f"| {text} | {s.value:.3f} | {s.interval[0]:.3f} - {s.interval[1]:.3f} |"
        for name, text in SHOWN.items()
        for s in [scores[name]]
    ]
    note = f"n = {settings.n} unseen scenes, seed {settings.seed}, sampling at its defaults."
    return "\n".join([note, "", "| measure | share | 95 % interval |", "|---|---|---|", *rows])


def around(file: Path) -> tuple[str, str]:
    """What a text says before its place for scores, and after it.

    Raises:
        ValueError: a text without such a place.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{file} has no place for scores: it needs the lines {BEGIN!r} and {END!r}, once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def fill(file: Path, table: str) -> None:
    """Put the table into a text's place for scores."""
    before, after = around(file)
    with atomic_file(file) as out:
        out.write(f"{before}{BEGIN}\n{table}\n{END}{after}".encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="embedded name or directory (tiny)")
    parser.add_argument("--world", default="full", choices=sorted(WORLDS), help="level of the small world (full)")
    parser.add_argument("--n", type=int, default=1000, help="scenes, questions and prompts (1000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--texts", nargs="*", help="texts to fill in (the model's card, and the README)")
    options = parser.parse_args(arguments)

    def run() -> None:
        folder = find(options.model)
        texts = [Path(t) for t in options.texts] if options.texts is not None else [folder / "README.md", README]
        for text in texts:
            around(text)  # scores take minutes: a text without a place for them shows before
        model, world, settings = load(folder), WORLDS[options.world], Settings(n=options.n, seed=options.seed)
        scores = evaluate(model, world, settings)
        write_scores(scores, settings, folder / "scores.json")
        save_image(sample_grid(model, world, settings), folder / "drawings.png")
        for text in texts:
            fill(text, summary_table(scores, settings))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())

"""Score a model on the small world: ``python -m experiments.evaluate MODEL [--n N] [--seed S] [--json FILE]``.

Everything is read and judged exactly, on scenes that no training sees. Shares come with 95 % confidence intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from experiments.data.shapes import WORLDS, World, conclusion, questions, render, request
from experiments.data.shapes_judge import CATEGORIES, NAMING_PAIRS, PromptSpec, judge, prompt
from experiments.data.shapes_parser import parse, same
from experiments.data.shapes_pictures import as_tensor
from experiments.run import exit_code, grid
from vargpt.api import ChatMessage, draw, encode_messages, read_rows
from vargpt.checkpoint import load
from vargpt.choices import NullBranch
from vargpt.files import write_json
from vargpt.generate import generate_text
from vargpt.images import check_writable, save_image, to_pil, to_tensor
from vargpt.model import VARGPT, require

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of how many."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        if not self.of:
            return math.nan, math.nan
        z, p, n = 1.96, self.value, self.of
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: Sequence[bool]) -> Share:
    return Share(hits=sum(hits), of=len(hits))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is asked and made to draw."""

    n: int = 1000
    """Scenes, questions of each kind and prompts of all categories together."""
    seed: int = 0
    batch: int = 50
    cfg: float = 1.5
    null: NullBranch | None = None
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96


Part = Literal["tokenizer", "questions", "drawing", "heldout", "intent"]
PARTS: tuple[Part, ...] = get_args(Part)


def evaluate(model: VARGPT, world: World, settings: Settings, parts: Sequence[Part] = PARTS) -> dict[str, Share]:
    """Everything that is measured, or some parts of it, by name."""
    scores: dict[str, Share] = {}
    if "tokenizer" in parts:
        scores |= tokenizer_scores(model, world, settings)
    if "questions" in parts:
        scores |= question_scores(model, world, settings)
    if "drawing" in parts:
        scores |= drawing_scores(model, world, settings)
    if "heldout" in parts:
        scores |= drawing_scores(model, world, settings, heldout=True)
    if "intent" in parts:
        scores |= intent_scores(model, world, settings)
    return scores


@torch.no_grad()
def tokenizer_scores(model: VARGPT, world: World, settings: Settings) -> dict[str, Share]:
    """How many pictures are read exactly right after a pass through the image tokenizer (the ceiling of drawing), the
    same from each prefix of scales, and how many codes each scale uses of those that it could."""
    vqvae = require(model.vqvae, "image tokenizer")
    scales = range(len(vqvae.schedule))
    exact: list[list[bool]] = [[] for _ in scales]
    used: list[set[int]] = [set() for _ in scales]
    for part in _batches(range(settings.n), settings.batch, "tokenizer"):
        scenes = [world.sample("test", i, seed=settings.seed) for i in part]
        indices = vqvae.encode(as_tensor(scenes, vqvae.image_size).to(model.device)).indices
        for scale in scales:
            used[scale].update(indices[scale].flatten().tolist())
            images = to_pil(vqvae.decode(indices[: scale + 1]))
            exact[scale] += [same(s, parse(np.asarray(p), world)) for s, p in zip(scenes, images, strict=True)]
    reachable = [min(vqvae.vocab_size, settings.n * length) for length in vqvae.schedule.lengths]
    return {
        "tokenizer.exact": share(exact[-1]),
        **{f"tokenizer.exact_after.{scale + 1}": share(exact[scale]) for scale in scales},
        **{f"tokenizer.codes.{scale + 1}": Share(hits=len(used[scale]), of=reachable[scale]) for scale in scales},
    }


def question_scores(model: VARGPT, world: World, settings: Settings) -> dict[str, Share]:
    """Answers that are right to the letter, by kind of question; their steps do not count."""
    size = require(model.vqvae, "image tokenizer").image_size
    asked = []
    for i in range(settings.n):
        scene = world.sample("test", i, seed=settings.seed)
        rng = Random(f"evaluate {settings.seed} {i}")
        qa = rng.choice(questions(scene, world, rng))
        asked.append((qa, Image.fromarray(render(scene, size))))
    right: dict[str, list[bool]] = defaultdict(list)
    for part in _batches(asked, settings.batch, "questions"):
        replies = respond(model, [[picture, qa.question] for qa, picture in part], max_new_tokens=40)
        for (qa, _), (text, drew) in zip(part, replies, strict=True):
            right[qa.kind].append(conclusion(text) == qa.answer and not drew)
    everything = [hit for hits in right.values() for hit in hits]
    return {"questions.all": share(everything)} | {f"questions.{kind}": share(right[kind]) for kind in sorted(right)}


def drawing_scores(model: VARGPT, world: World, settings: Settings, *, heldout: bool = False) -> dict[str, Share]:
    """Drawings that show what was asked for and nothing else, by category; ``heldout``: of the categories that name
    pairs of colour and shape, with pairs never trained on."""
    name = "heldout" if heldout else "drawing"
    specs = drawing_prompts(world, settings, heldout=heldout)
    right: dict[str, list[bool]] = defaultdict(list)
    for number, part in enumerate(_batches(specs, settings.batch, name)):
        for spec, picture in zip(part, pictures(model, part, settings, number), strict=True):
            right[spec.category].append(judge(spec, parse(np.asarray(picture), world)))
    shares = {f"{name}.{category}": share(hits) for category, hits in right.items()}
    return {f"{name}.mean": share([hit for hits in right.values() for hit in hits])} | shares


def drawing_prompts(world: World, settings: Settings, *, heldout: bool = False) -> list[PromptSpec]:
    """As many prompts of every category."""
    rng = Random(f"prompts {settings.seed} {heldout}")
    categories = NAMING_PAIRS if heldout else tuple(CATEGORIES)
    each = max(1, settings.n // len(categories))
    return [prompt(category, world, rng, heldout=heldout) for category in categories for _ in range(each)]


def pictures(model: VARGPT, specs: Sequence[PromptSpec], settings: Settings, number: int = 0) -> list[Image.Image]:
    """Drawings of prompts, each with a seed of its own."""
    s = settings
    first = s.seed * 1_000_003 + number * s.batch
    drawn = draw(
        model,
        [spec.prompt for spec in specs],
        seed=range(first, first + len(specs)),
        cfg=s.cfg,
        null=s.null,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )
    return drawn.images


def intent_scores(model: VARGPT, world: World, settings: Settings) -> dict[str, Share]:
    """Whether it draws when asked to, and only then: half requests, half questions about pictures."""
    size = require(model.vqvae, "image tokenizer").image_size
    cases: list[tuple[list[str | Image.Image], bool]] = []
    for i in range(settings.n):
        scene = world.sample("test", i, seed=settings.seed + 1)
        rng = Random(f"intent {settings.seed} {i}")
        if i % 2:
            cases.append(([request(scene, world, rng).text], True))
        else:
            qa = rng.choice(questions(scene, world, rng))
            cases.append(([Image.fromarray(render(scene, size)), qa.question], False))
    hits = []
    for part in _batches(cases, settings.batch, "intent"):
        replies = respond(model, [content for content, _ in part], max_new_tokens=40)
        hits += [drew == asked for (_, asked), (_, drew) in zip(part, replies, strict=True)]
    return {"draws_when_asked": share(hits)}


@torch.no_grad()
def respond(
    model: VARGPT, contents: Sequence[Sequence[str | Image.Image]], *, max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy replies to a batch of first messages: the text, and whether the model went on to draw."""
    tokenizer, t = require(model.tokenizer, "tokenizer"), model.tokens
    encoded = [encode_messages(model, [ChatMessage(role="user", content=content)]) for content in contents]
    images = [picture for _, understood, _ in encoded for picture in understood]
    context, hidden = read_rows(model, [ids for ids, _, _ in encoded], room=max_new_tokens, pictures=images)
    rows = generate_text(model, context, hidden, max_new_tokens=max_new_tokens, stop=(t.eos, t.gen_start))
    return [(tokenizer.decode(row.ids).strip(), row.stop == t.gen_start) for row in rows]


def _batches(items: Sequence[Item], size: int, name: str) -> Iterator[Sequence[Item]]:
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=name, leave=False, file=sys.stderr):
        yield items[start : start + size]


def table(scores: dict[str, Share]) -> str:
    """The scores as a markdown table."""
    rows = [
        f"| {name} | {s.value:.3f} | {s.interval[0]:.3f} - {s.interval[1]:.3f} | {s.of} |" for name, s in scores.items()
    ]
    return "\n".join(["| measure | share | 95 % interval | n |", "|---|---|---|---|", *rows])


def write_scores(scores: dict[str, Share], settings: Settings, file: Path) -> None:
    """The scores as JSON, with their intervals and how they were taken."""
    values = {name: s.value for name, s in scores.items()}
    intervals = {name: s.interval for name, s in scores.items()}
    write_json(file, {**values, "intervals": intervals, "settings": dataclasses.asdict(settings)})


def sample_grid(model: VARGPT, world: World, settings: Settings, columns: int = 8) -> Image.Image:
    """Drawings of prompts of every category, a row each."""
    specs = drawing_prompts(world, settings)
    chosen = [s for category in CATEGORIES for s in [s for s in specs if s.category == category][:columns]]
    drawn = [to_tensor(picture) for picture in pictures(model, chosen, settings)]
    return to_pil(grid(drawn, columns, scale=2)[None])[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="embedded name, directory or hub id")
    parser.add_argument("--world", default="full", choices=sorted(WORLDS), help="level of the small world (full)")
    parser.add_argument("--n", type=int, default=1000, help="scenes, questions and prompts (1000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance (1.5)")
    parser.add_argument("--null", choices=("noise", "class", "prompt"), help="unconditional branch (the model's own)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of drawing (1)")
    parser.add_argument("--json", metavar="FILE", help="write the scores")
    parser.add_argument("--grid", metavar="FILE", help="write a sheet of drawings, a row per category")
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.n < 1:
            raise ValueError(f"--n must be at least 1, not {options.n}")
        if options.grid:
            check_writable(options.grid)
        settings = Settings(
            n=options.n, seed=options.seed, cfg=options.cfg, null=options.null, temperature=options.temperature
        )
        model, world = load(options.model), WORLDS[options.world]
        scores = evaluate(model, world, settings)
        print(table(scores))
        if options.json:
            write_scores(scores, settings, Path(options.json))
        if options.grid:
            save_image(sample_grid(model, world, settings), options.grid)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())

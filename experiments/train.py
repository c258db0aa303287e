"""Train the whole model: ``python -m experiments.train [NAME] [key=value ...] [--out DIR]``.

NAME is a file of ``experiments/configs/train``: its stages run one after the other, each a resumable run in a folder of
its own below DIR (by default ``runs/NAME``). The last stage's ``model/`` is the result. The same command resumes.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vargpt.llm.layers
import vargpt.var.layers
from experiments.data.chat import Batch, ConversationSource, Example, Kind, Mixture, collate, index_maps
from experiments.data.record_files import record_files
from experiments.data.records import Record, RecordFiles, Records
from experiments.data.shapes import WORLDS, Split, summary, vocabulary
from experiments.data.shapes_chat import ShapeChats
from experiments.data.token_cache import TokenCache
from experiments.optimization import low_precision, optimizers
from experiments.run import Ema, Run, Schedule, described, grid, step_generator, training_command
from vargpt.api import draw
from vargpt.build import build, preset
from vargpt.checkpoint import ASSETS, choices_named, find, load, save
from vargpt.config import ImportedConfig, Knowledge, VargptConfig
from vargpt.config_json import changed
from vargpt.images import to_tensor
from vargpt.model import VARGPT, VargptOutput, require
from vargpt.text import IMAGE_GEN, SentencePieceTokenizer

TOKENIZER = ASSETS / "tiny"
"""The text tokenizer of models that start from no other's."""


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Where conversations come from: ``world`` names a level of the small world, ``records`` files of records."""

    world: Literal["nano", "full"] | None = None
    places: float = 0.0
    """Share of a world's scenes of several objects that are asked about places and relations alone, which are learned
    late where they are asked for among all else."""
    records: str | None = None
    """A file, or a pattern such as ``data/train-*.parquet``."""
    images: str | None = None
    """Folder of the records' pictures; by default the one that their file is in."""
    bad: Literal["stop", "skip"] = "stop"
    """What to do about a record that cannot be used: end the training, or say it, count it and take another."""
    weight: float = 1.0
    """How often examples are taken from here, beside other sources of the same kind."""
    cache: bool = False
    """Tokenize the records' pictures once, cropped at the centre, and keep the tokens in the run's folder."""

    def __post_init__(self) -> None:
        if (self.world is None) == (self.records is None):
            raise ValueError("data names either a world or files of records")
        if not 0 <= self.places <= 1:
            raise ValueError(f"places is a share, from 0 to 1, not {self.places}")
        if self.weight <= 0:
            raise ValueError(f"the weight of data must be above 0, not {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many examples of each kind make up one step, and how many of whatever kind.

    ``mixed`` ones keep the proportions of the data: sources by their weights, kinds by their shares of each source. The
    numbers of the kinds then differ from step to step.
    """

    drawing: int = 0
    question: int = 0
    text: int = 0
    mixed: int = 0

    def kinds(self, source: ConversationSource) -> list[Kind]:
        """The kinds that are trained on."""
        return [k for k in get_args(Kind) if getattr(self, k) or (self.mixed and k in source.kinds())]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training."""

    name: str
    schedule: Schedule
    rows: Rows
    trains: tuple[str, ...] = ("llm", "vision", "projector", "var", "gen_in", "gen_out")
    """Beginnings of the names of what is trained; all else is frozen, the image tokenizer always."""
    accumulate: int = 1
    """Batches of ``rows`` that one optimiser step sums up."""
    data: tuple[ChatData, ...] = ()
    """Where this stage's conversations come from, if not from the training's ``data``."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training of a whole model, in stages."""

    preset: str
    """Sizes of all parts but the image tokenizer."""
    tokenizer: str
    """Folder of a trained image tokenizer, such as ``runs/tokenizer-nano/model``."""
    stages: tuple[Stage, ...]
    data: tuple[ChatData, ...] = ()
    start: tuple[str, ...] = ()
    """Models to start from (as ``vargpt.load`` names them): each gives the parts that it has; others are random."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model that follows from all else, as its config.json has them: ``{llm: {depth: 6}}``. A projector
    of your own is ``{projector: {kind: "my_module:MyProjector", options: {hidden: 64}}}``."""
    choices: Literal["published", "fixed"] = "fixed"
    plan: bool = False
    """Whether requests to draw are first answered by a plan in words."""
    drop: float = 0.1
    """Share of the drawings learned without condition (their class becomes "no condition")."""
    drop_prompt: bool = True
    """Whether those are learned without their prompt too; the published training kept it."""
    seed: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    muon: bool = False
    """Whether the matrices inside blocks and projectors follow Muon (torch 2.9 and later) and not AdamW."""
    autocast: bool = False
    """Matrix products in bfloat16 (for hardware that gains by it)."""
    recompute: bool = False
    """Keep no activations inside the decoders' blocks for the backward pass, but compute them again: less memory."""
    save_every: int = 250
    evaluate_every: int = 1000
    validation: int = 256

    def __post_init__(self) -> None:
        # What is not known shows here, not after the image tokenizer has trained.
        import_parts(changed(preset(self.preset), self.model))
        if "vqvae" in self.model:
            raise ValueError("the image tokenizer's sizes follow from its training: change them there")


def import_parts(config: VargptConfig) -> None:
    """Import the modules of those parts that are the user's own (only configurations of trainings make code run).

    Raises:
        ValueError: there is no such module.
    """
    for part in (config.projector, config.gen_in, config.gen_out):
        if isinstance(part, ImportedConfig):
            module = part.kind.partition(":")[0]
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"{part.kind} cannot be imported: {error}") from error


def assemble(config: Training) -> VargptConfig:
    """The preset with the trained image tokenizer's sizes in it."""
    try:
        trained = load(config.tokenizer).config.vqvae
    except ValueError as error:
        raise ValueError(f"no image tokenizer: {error}; python -m experiments.train_tokenizer trains one") from error
    if trained is None:
        raise ValueError(f"{config.tokenizer} holds no image tokenizer")
    base = preset(config.preset)
    assert base.var is not None
    var = dataclasses.replace(
        base.var,
        patch_nums=trained.patch_nums,
        vocab_size=trained.vocab_size,
        latent_channels=trained.latent_channels,
    )
    choices = dataclasses.replace(
        choices_named(config.choices),
        training_template=base.choices.training_template,
        inference_template=base.choices.inference_template,
        plan=config.plan,
    )
    # A model that has seen a single small world can say what it has never seen.
    worlds = {data.world for part in (config, *config.stages) for data in part.data}
    world = WORLDS[name] if len(worlds) == 1 and (name := worlds.pop()) is not None else None
    knows = Knowledge(summary=summary(world), words=vocabulary(world)) if world is not None else None
    return changed(dataclasses.replace(base, var=var, vqvae=trained, choices=choices, knows=knows), config.model)


class StageTrainer:
    """Everything that changes during one stage."""

    def __init__(self, config: Training, stage: Stage, model: VARGPT, source: Mixture) -> None:
        self.config, self.stage, self.model, self.source = config, stage, model, source
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trains) and not name.startswith("vqvae."))
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"stage {stage.name!r} trains nothing: no parameter begins with {', '.join(stage.trains)}")
        self.optimizers = optimizers(model, muon=config.muon, weight_decay=config.weight_decay)
        self.ema = Ema(model, config.ema)
        if config.recompute:
            recompute_blocks(model)
        model.train()
        require(model.vqvae, "image tokenizer")
        if isinstance(model.vqvae, nn.Module):
            model.vqvae.eval()

    def step(self, step: int) -> Mapping[str, float]:
        c, stage = self.config, self.stage
        torch.manual_seed(c.seed * 1_000_003 + step)
        lr = stage.schedule.at(step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for part in range(stage.accumulate):
            number = step * stage.accumulate + part
            # Each kind goes through apart: padding is work, and the many words of one would drown the few of another.
            for batch in self.batches(number):
                with low_precision(self.model.device) if c.autocast else nullcontext():
                    out = forward(self.model, batch)
                assert out.loss is not None
                if not out.loss.requires_grad:
                    raise ValueError(f"stage {stage.name!r} trains nothing that bears on all its rows: set some to 0")
                (out.loss / stage.accumulate).backward()
                for name, loss in losses(out).items():
                    sums[name] = sums.get(name, 0.0) + loss / stage.accumulate
        norm = nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), c.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.ema.update(self.model, step)
        return {"loss": sum(sums.values()), "lr": lr, "gradient": float(norm), **sums}

    def batches(self, number: int) -> list[Batch]:
        """What is learned from at once, a batch of each kind."""
        c, rows = self.config, self.stage.rows
        examples = {k: _examples(self.source, k, c.seed, number, getattr(rows, k)) for k in get_args(Kind)}
        for i in range(rows.mixed):
            kind, example = self.source.any_example(c.seed, number * rows.mixed + i)
            examples[kind].append(example)
        batches = []
        if drawings := examples.pop("drawing"):
            random = step_generator(c.seed, number, stream=2)
            dropped = (torch.rand(len(drawings), generator=random) < c.drop).tolist()
            if c.drop_prompt:
                drawings = [without_prompt(e) if d else e for e, d in zip(drawings, dropped, strict=True)]
            batches.append(collate(self.model, drawings, dropped=dropped))
        return batches + [collate(self.model, others) for others in examples.values() if others]

    def averaged(self) -> VARGPT:
        """The model with the running mean of its weights, for use."""
        assert self.model.config is not None
        model = build(self.model.config, tokenizer=self.model.tokenizer)
        model.load_state_dict(self.model.state_dict())
        self.ema.copy_to(model)
        return model.to(self.model.device).eval()


def recompute_blocks(model: VARGPT) -> None:
    """Let the decoders' blocks keep only their inputs for the backward pass (arXiv 1604.06174)."""
    for module in model.modules():
        if isinstance(module, vargpt.llm.layers.Block | vargpt.var.layers.Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _examples(
    source: ConversationSource, kind: Kind, seed: int, step: int, count: int, split: Split = "train"
) -> list[Example]:
    """The examples of one step."""
    return [source.example(kind, seed, step * count + i, split) for i in range(count)]


def without_prompt(example: Example) -> Example:
    """The same drawings in reply to one empty message, with no word of a plan and nothing to look at."""
    marks = IMAGE_GEN * len(example.drawings)
    return Example(
        messages=({"role": "user", "content": ""}, {"role": "assistant", "content": marks}), drawings=example.drawings
    )


def forward(model: VARGPT, batch: Batch) -> VargptOutput:
    return model(
        batch.input_ids,
        pixel_values=batch.pixel_values,
        draw_images=batch.drawings,
        labels=batch.labels,
        attention_mask=batch.attention_mask,
        drop_condition=batch.drop_condition,
    )


def losses(out: VargptOutput) -> dict[str, float]:
    """The losses of a batch, by the job it teaches: when and what to draw, or what to answer."""
    found: dict[str, Tensor | None] = (
        {"answer": out.text_loss}
        if out.image_loss is None
        else {"start_drawing": out.text_loss, "drawing": out.image_loss}
    )
    return {name: float(loss.detach()) for name, loss in found.items() if loss is not None}


@torch.no_grad()
def validation_losses(model: VARGPT, source: ConversationSource, rows: Rows, count: int) -> dict[str, float]:
    """Mean losses on conversations that are never trained on."""
    sums: dict[str, float] = {}
    for kind in rows.kinds(source):
        for part in range(-(-count // 32)):
            examples = _examples(source, kind, 0, part, 32, "validation")
            for name, loss in losses(forward(model, collate(model, examples))).items():
                key = f"validation/{name if name != 'answer' else kind}"
                sums[key] = sums.get(key, 0.0) + loss / -(-count // 32)
    return sums


def train(config: Training, folder: Path, device: torch.device) -> VARGPT:
    """Train all stages, or go on with them; returns the result, also saved as ``model/`` of the last stage."""
    model_config = assemble(config)
    assert model_config.vqvae is not None
    assert model_config.llm is not None
    texts = [place for place in map(find, config.start) if (place / "tokenizer.model").is_file()]
    tokenizer = SentencePieceTokenizer.from_directory([*texts, TOKENIZER][0], vocab_size=model_config.llm.vocab_size)
    model = build(model_config, seed=config.seed, tokenizer=tokenizer).to(device)
    trained = load(config.tokenizer, device)
    assert isinstance(model.vqvae, nn.Module)
    assert isinstance(trained.vqvae, nn.Module)
    for name in config.start:
        _take_over(model, load(name, device), name)
    model.vqvae.load_state_dict(trained.vqvae.state_dict())
    sources = [source_of(config, stage, model, folder) for stage in config.stages]
    for stage, source in zip(config.stages, sources, strict=True):
        place = folder / stage.name
        if (place / "model" / "config.json").is_file():
            print(f"stage {stage.name} is finished: {place / 'model'}", file=sys.stderr)
            model.load_state_dict(load(place / "model", device).state_dict())
            continue
        model = _train_stage(config, stage, model, source, place)
    return model


def _take_over(model: VARGPT, given: VARGPT, name: str) -> None:
    """Let the model start from the parts of another one."""
    for part, weights in given.named_children():
        theirs, own = weights.state_dict(), getattr(model, part)
        assert isinstance(own, nn.Module)
        if {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in own.state_dict().items()}:
            raise ValueError(f"cannot start from {name}: its {part} is not of the same sizes as the preset's")
        own.load_state_dict(theirs)


def source_of(config: Training, stage: Stage, model: VARGPT, folder: Path) -> Mixture:
    """The conversations of a stage."""
    vqvae = require(model.vqvae, "image tokenizer")
    sources: list[ConversationSource] = []
    chosen = stage.data or config.data
    for data in chosen:
        if data.world is not None:
            sources.append(ShapeChats(data.world, vqvae.image_size, plan=config.plan, places=data.places))
            continue
        assert data.records is not None
        files = RecordFiles(record_files(data.records), Path(data.images) if data.images else None)
        cache = None
        if data.cache:
            drawings = (picture for record in files.scan() if isinstance(record, Record) for picture in record.drawings)
            cache = TokenCache(folder / "image_tokens", drawings, vqvae, model.device, bad=data.bad)
        sources.append(Records(files, vqvae.image_size, cache, bad=data.bad))
    if not sources:
        raise ValueError(f"stage {stage.name!r} has no data: name a world or files of records")
    mixture = Mixture(sources, [data.weight for data in chosen])
    for kind in get_args(Kind):
        if getattr(stage.rows, kind) and kind not in mixture.kinds():
            raise ValueError(f"stage {stage.name!r} has no examples of kind {kind!r} in its data: set their rows to 0")
    return mixture


def _train_stage(config: Training, stage: Stage, model: VARGPT, source: Mixture, folder: Path) -> VARGPT:
    trainer = StageTrainer(config, stage, model, source)
    whole = {"training": described(config), "stage": stage.name}
    run = Run(folder, whole, {"model": model, "ema": trainer.ema, **trainer.optimizers})

    def evaluate() -> None:
        averaged = trainer.averaged()
        run.log(validation_losses(averaged, source, stage.rows, config.validation))
        if "drawing" in stage.rows.kinds(source):
            run.picture("drawings", drawn_grid(averaged, source))

    run.train(
        stage.schedule.steps,
        trainer.step,
        evaluate,
        batch=stage.accumulate * sum(dataclasses.astuple(stage.rows)),
        save_every=config.save_every,
        evaluate_every=config.evaluate_every,
    )
    averaged = trainer.averaged()
    save(averaged, folder / "model")
    return averaged


def drawn_grid(model: VARGPT, source: ConversationSource, count: int = 24) -> Tensor:
    """Drawings of validation requests, each under the picture that the request describes (as its tokens show it)."""
    vqvae = require(model.vqvae, "image tokenizer")
    examples = _examples(source, "drawing", 0, 0, count, "validation")
    prompts = [example.messages[0]["content"] for example in examples]
    drawn = [to_tensor(image) for image in draw(model, prompts, seed=0).images]
    wanted = vqvae.decode(index_maps(vqvae, [example.drawings[0] for example in examples], model.device)).cpu()
    rows: list[Tensor] = []
    for start in range(0, count, 12):
        rows += [*wanted[start : start + 12], *drawn[start : start + 12]]
    return grid(rows, columns=12, scale=2)


def main(arguments: list[str] | None = None) -> int:
    return training_command(arguments, __doc__, "train", Training, "runs/", train)


if __name__ == "__main__":
    sys.exit(main())

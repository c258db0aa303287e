"""Train a vision encoder on the small world: ``python -m experiments.train_vision [NAME] [key=value ...] [--out DIR]``.

NAME is a file of ``experiments/configs/vision``. Published models start from an encoder that already sees (CLIP); this
trains one for small worlds. Every patch learns to tell which object covers it, and where that object is. The folder (by
default ``runs/vision-NAME``) gets ``model/`` at the end, from which ``experiments.train`` starts. The same command
resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from experiments.data.shapes import COLOURS, RADII, WORLDS, Scene, Split, World, render
from experiments.optimization import low_precision, optimizers
from experiments.run import Ema, Run, Schedule, described, grid, training_command
from vargpt.build import preset
from vargpt.checkpoint import save
from vargpt.config import VargptConfig
from vargpt.config_json import changed
from vargpt.images import to_tensor
from vargpt.model import VARGPT
from vargpt.vision import OpenClipConfig, OpenClipEncoder

NOTHING = -100
"""Label of a patch that no object covers."""


@dataclass(frozen=True, kw_only=True)
class VisionTraining:
    """One training of a vision encoder."""

    preset: str
    """Whose vision encoder."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to it, as in the training of models: ``{vision: {width: 64}}``."""
    world: Literal["nano", "full"]
    schedule: Schedule
    batch: int = 64
    seed: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    muon: bool = False
    autocast: bool = False
    """Both as in the training of models."""
    save_every: int = 500
    evaluate_every: int = 500
    validation: int = 256


class PatchReader(nn.Module):
    """What each patch's feature says, by a linear layer for each attribute."""

    def __init__(self, encoder: OpenClipEncoder, world: World) -> None:
        super().__init__()
        places = sorted({x for i in range(1000) for o in world.sample("train", i).objects for x in (o.x, o.y)})
        self.classes: dict[str, tuple[str | float, ...]] = {
            "shape": world.shapes,
            "colour": world.colours,
            "size": world.sizes,
            "x": tuple(places),
            "y": tuple(places),
        }
        self.encoder = encoder
        self.covered = nn.Linear(encoder.width, 2)
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.width, len(c)) for name, c in self.classes.items()})

    def forward(self, pixel_values: Float[Tensor, "B 3 side side"]) -> dict[str, Float[Tensor, "B P _"]]:
        features = self.encoder(pixel_values)
        read = {name: head(features) for name, head in self.heads.items()}
        return {"covered": self.covered(features), **read}

    def labels(self, scenes: Sequence[Scene]) -> dict[str, Int[Tensor, "B P"]]:
        """The right answers. A patch belongs to the object whose bounding box reaches furthest into it."""
        side = self.encoder.config.image_size // self.encoder.config.patch_size
        middles = (torch.arange(side) + 0.5) / side
        rows = []
        for scene in scenes:
            inside = torch.stack(
                [
                    RADII[o.size] + 0.5 / side - torch.maximum((middles - o.y).abs()[:, None], (middles - o.x).abs())
                    for o in scene.objects
                ]
            ).flatten(1)
            deepest, owner = inside.max(0)
            rows.append(owner.masked_fill(deepest <= 0, NOTHING))
        owner_BP = torch.stack(rows)
        found = {"covered": (owner_BP != NOTHING).long()}
        for name, values in self.classes.items():
            found[name] = torch.full_like(owner_BP, NOTHING)
            for row, scene in enumerate(scenes):
                for number, o in enumerate(scene.objects):
                    found[name][row][owner_BP[row] == number] = values.index(getattr(o, name))
        return found


class VisionTrainer:
    """Everything that changes while a vision encoder trains."""

    def __init__(self, config: VisionTraining, vision: OpenClipConfig, device: torch.device) -> None:
        self.config, self.world, self.device = config, WORLDS[config.world], device
        torch.manual_seed(config.seed)
        self.reader = PatchReader(OpenClipEncoder(vision), self.world).to(device).train()
        self.ema = Ema(self.reader, config.ema)
        self.optimizers = optimizers(self.reader, muon=config.muon, weight_decay=config.weight_decay)

    def step(self, step: int) -> Mapping[str, float]:
        c = self.config
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = c.schedule.at(step)
            optimizer.zero_grad(set_to_none=True)
        losses = self._losses(self.reader, "train", range(step * c.batch, (step + 1) * c.batch))
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.reader.parameters(), c.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.ema.update(self.reader, step)
        return {"loss": loss.item(), "gradient": float(norm), **{name: x.item() for name, x in losses.items()}}

    def _losses(self, reader: PatchReader, split: Split, numbers: range) -> dict[str, Tensor]:
        pixels, labels = self._batch(split, numbers)
        if self.config.autocast:
            with low_precision(self.device):
                read = reader(pixels)
        else:
            read = reader(pixels)
        return {name: F.cross_entropy(read[name].float().flatten(0, 1), labels[name].flatten()) for name in read}

    def _batch(self, split: Split, numbers: range) -> tuple[Tensor, dict[str, Tensor]]:
        scenes = [self.world.sample(split, i, seed=self.config.seed) for i in numbers]
        encoder = self.reader.encoder
        pictures = [Image.fromarray(render(scene, encoder.config.image_size)) for scene in scenes]
        labels = self.reader.labels(scenes)
        pixels = torch.stack([encoder.preprocess(picture) for picture in pictures])
        return pixels.to(self.device), {name: label.to(self.device) for name, label in labels.items()}

    def averaged(self) -> PatchReader:
        """The encoder and its heads with the running mean of their weights."""
        reader = PatchReader(OpenClipEncoder(self.reader.encoder.config), self.world).to(self.device)
        reader.load_state_dict(self.reader.state_dict())
        self.ema.copy_to(reader)
        return reader.eval()

    @torch.no_grad()
    def accuracy(self, reader: PatchReader, count: int) -> dict[str, float]:
        """Share of the patches of unseen scenes that tell each attribute right."""
        pixels, labels = self._batch("validation", range(count))
        right = {}
        for name, logits in reader(pixels).items():
            asked = labels[name] != NOTHING
            right[f"validation/{name}"] = (logits.argmax(-1)[asked] == labels[name][asked]).float().mean().item()
        return right

    @torch.no_grad()
    def seen(self, reader: PatchReader, count: int = 12) -> Tensor:
        """Scenes, and below each the colours that the patches tell."""
        scenes = [self.world.sample("validation", i) for i in range(count)]
        size = reader.encoder.config.image_size
        pictures = [to_tensor(Image.fromarray(render(scene, size))) for scene in scenes]
        read = reader(self._batch("validation", range(count))[0])
        palette = torch.tensor([COLOURS[colour] for colour in self.world.colours]) / 127.5 - 1
        colours = palette[read["colour"].argmax(-1).cpu()]
        colours[read["covered"].argmax(-1).cpu() == 0] = 1.0
        side = size // reader.encoder.config.patch_size
        told = colours.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return grid([*pictures, *F.interpolate(told, (size, size))], columns=count, scale=2)


def train(config: VisionTraining, folder: Path, device: torch.device) -> OpenClipEncoder:
    """Train, or resume, in a folder; returns the averaged encoder, also saved as ``model/``.

    Raises:
        ValueError: a preset without an OpenCLIP encoder, or a folder of another run.
    """
    vision = changed(preset(config.preset), config.model).vision
    if not isinstance(vision, OpenClipConfig):
        raise ValueError(f"preset {config.preset!r} has no OpenCLIP encoder to train")
    trainer = VisionTrainer(config, vision, device)
    run = Run(folder, described(config), {"reader": trainer.reader, "ema": trainer.ema, **trainer.optimizers})

    def evaluate() -> None:
        reader = trainer.averaged()
        run.log(trainer.accuracy(reader, config.validation))
        run.picture("patches", trainer.seen(reader))

    run.train(
        config.schedule.steps,
        trainer.step,
        evaluate,
        batch=config.batch,
        save_every=config.save_every,
        evaluate_every=config.evaluate_every,
    )
    encoder = trainer.averaged().encoder
    save(VARGPT(vision=encoder, config=VargptConfig(vision=vision)), folder / "model")
    return encoder


def main(arguments: list[str] | None = None) -> int:
    return training_command(arguments, __doc__, "vision", VisionTraining, "runs/vision-", train)


if __name__ == "__main__":
    sys.exit(main())

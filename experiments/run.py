"""Resumable runs: state on disk, progress, scalars and pictures, the same for every training here.

A step's data and random numbers follow from the seed and the step's number alone, so a run that was stopped at any
moment, SIGKILL included, goes on from its last state to the same losses as one that never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from vargpt.config_json import from_json, to_json
from vargpt.files import atomic_file, read_json, write_json
from vargpt.images import save_image, to_pil

Config = TypeVar("Config")
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the steps: linear warm-up, then a cosine down to ``final`` times the peak."""

    steps: int
    lr: float
    warmup: int = 100
    final: float = 0.02

    def at(self, step: int) -> float:
        """Learning rate of one step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one step; ``stream`` tells several uses apart."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


class Ema:
    """A running mean of a module's parameters, with a warm-up so that early steps do not linger."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        parameters = dict(module.named_parameters())
        for name in self.shadow:
            self.shadow[name].lerp_(parameters[name], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the mean in the place of the parameters."""
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])


Stateful = nn.Module | torch.optim.Optimizer | Ema


def _tensors(part: Stateful) -> dict[str, Tensor]:
    """All tensors of a part, by name, not copied."""
    if isinstance(part, nn.Module):
        return dict(part.state_dict())
    if isinstance(part, Ema):
        return part.shadow
    state = part.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}


def _restore(part: Stateful, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(part, nn.Module):
        part.load_state_dict(tensors)
    elif isinstance(part, Ema):
        part.shadow = dict(tensors)
    else:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


class Run:
    """One training run in one folder: ``config.json``, ``state.safetensors``, ``metrics.jsonl``, ``samples/``, ``tb/``.

    Args:
        folder: made if need be. A folder that already holds a run is resumed.
        config: what the run is; a folder of another run is refused.
        parts: everything that changes while training.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
        self.folder, self._parts, self.step = folder, parts, 0
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "config.json"
        plain = json.loads(json.dumps(config))
        if described.exists() and read_json(described) != plain:
            changed = [k for k in plain if read_json(described).get(k) != plain[k]]
            raise ValueError(f"{folder} holds another run (differs in {', '.join(changed)}): name another folder")
        write_json(described, plain)
        if (folder / STATE).is_file():
            self._load()
        self._metrics = self._open_metrics()
        from torch.utils.tensorboard import SummaryWriter  # heavy to import

        self._board = SummaryWriter(str(folder / "tb"), purge_step=self.step)

    def _load(self) -> None:
        with safe_open(self.folder / STATE, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            names = list(file.keys())
            for part, value in self._parts.items():
                own = [n for n in names if n.startswith(part + "/")]
                _restore(value, {n.removeprefix(part + "/"): file.get_tensor(n) for n in own})

    def _open_metrics(self) -> Path:
        """The metrics file, without lines that a lost stretch of the run had written."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            with atomic_file(path) as file:
                file.write("".join(line + "\n" for line in kept).encode())
        return path

    def save(self) -> None:
        """Write the state of ``step`` finished steps."""
        tensors = {f"{part}/{n}": t for part, value in self._parts.items() for n, t in _tensors(value).items()}
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic_file(self.folder / STATE) as file:
            file.write(save(copies, metadata={"step": str(self.step)}))

    def log(self, values: Mapping[str, float | list[float]]) -> None:
        """Write scalars (and lists of them) of the current step.

        Raises:
            ValueError: one line that says why they cannot be written.
        """
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
            for name, value in values.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    self._board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, self.step)
            self._board.flush()
        except OSError as error:
            raise ValueError(f"cannot write into {self.folder} ({error.strerror or error})") from None

    def picture(self, name: str, image_3HW: Tensor) -> None:
        """Leave a picture in [-1, 1] where a person will look: ``samples/NAME-STEP.png`` and TensorBoard."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        save_image(to_pil(image_3HW[None])[0], folder / f"{name}-{self.step:06d}.png")
        self._board.add_image(name, (image_3HW.clamp(-1, 1) + 1) / 2, self.step)

    def train(
        self,
        steps: int,
        step: Callable[[int], Mapping[str, float]],
        evaluate: Callable[[], None],
        *,
        batch: int,
        save_every: int,
        evaluate_every: int,
    ) -> None:
        """Take the remaining steps, with a progress bar (loss, samples per second, time left).

        Args:
            step: takes one step and returns its scalars, "loss" among them.
            evaluate: called every so many steps and at the end; it logs what it finds.
        """
        with tqdm(total=steps, initial=self.step, unit="step", smoothing=0.05) as bar:
            sums: dict[str, float] = {}
            since, started = 0, time.monotonic()
            while self.step < steps:
                for name, value in step(self.step).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.step += 1
                since += 1
                bar.update()
                if self.step % 50 == 0 or self.step == steps:
                    means = {name: total / since for name, total in sums.items()}
                    speed = since * batch / (time.monotonic() - started)
                    self.log({**means, "samples_per_second": speed})
                    bar.set_postfix({"loss": f"{means['loss']:.3f}", "samples/s": f"{speed:.0f}"})
                    sums, since, started = {}, 0, time.monotonic()
                if self.step % evaluate_every == 0 or self.step == steps:
                    evaluate()
                    started = time.monotonic() if since == 0 else started
                if self.step % save_every == 0 or self.step == steps:
                    self.save()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut short by SIGKILL
        return 1 << 62


def grid(images: Iterable[Tensor], columns: int, scale: int = 1) -> Tensor:
    """Pictures of one size side by side, ``columns`` to a row, enlarged ``scale`` times without blur."""
    from torchvision.utils import make_grid

    sheet = make_grid(list(images), nrow=columns, padding=1, pad_value=1.0)
    return sheet.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def settings(section: str, cls: type[Config], arguments: list[str]) -> tuple[str, Config]:
    """The configuration that a command line names: ``NAME key=value ...`` over ``configs/SECTION/NAME.yaml``.

    Raises:
        ValueError: no such configuration, key or value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name, overrides = (arguments[0], arguments[1:]) if arguments and "=" not in arguments[0] else ("nano", arguments)
    changes = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} must be key=value")
        try:
            changes.append((key, OmegaConf.from_dotlist([f"value={value}"]).value))
        except OmegaConfBaseException as error:
            raise ValueError(" ".join(str(error).split())) from None
    return name, configured(section, cls, name, changes)


def configured(section: str, cls: type[Config], name: str, changes: Iterable[tuple[str, Any]]) -> Config:
    """The configuration ``configs/SECTION/NAME.yaml`` with changes to it, such as ("stages.0.schedule.steps", 100).

    Raises:
        ValueError: no such configuration, key or value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(__file__).parent / "configs" / section
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown configuration {name!r}: choose one of {', '.join(known)}")
    try:
        values = OmegaConf.load(folder / f"{name}.yaml")
        for key, value in changes:
            OmegaConf.update(values, key, value)
        values = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None
    return from_json(cls, values, name)


def exit_code(command: Callable[[], None]) -> int:
    """Run a command; a mistake, an interrupt or a full disk becomes one line and exit code 2."""
    hook = threading.excepthook

    def thread_error(error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own. Where it cannot, the run is told by its next call, and ends.
        if not isinstance(error.exc_value, OSError):
            hook(error)

    threading.excepthook = thread_error
    try:
        command()
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; a training goes on from its last saved step by the same command", file=sys.stderr)
        return 2
    finally:
        threading.excepthook = hook
    return 0


def training_command(
    arguments: list[str] | None,
    description: str | None,
    section: str,
    cls: type[Config],
    folder: str,
    train: Callable[[Config, Path, torch.device], object],
) -> int:
    """The command line of a training; returns its exit code.

    Args:
        section, cls: where its configurations are, and what they are.
        folder: of the run by default, before the configuration's name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="NAME key=value", help="configuration, and changes to it")
    parser.add_argument("--out", help=f"folder of the run ({folder}NAME)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    def run() -> None:
        name, config = settings(section, cls, options.settings)
        train(config, Path(options.out or f"{folder}{name}"), torch.device(options.device))

    return exit_code(run)


def described(config: Any) -> dict[str, Any]:
    """A configuration as JSON, for a run's folder."""
    return to_json(config) if dataclasses.is_dataclass(config) else dict(config)

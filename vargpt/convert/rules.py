"""Key tables: how the tensor names of a published layout correspond to ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from vargpt.tensorfiles import TensorSource, TensorSpec


@dataclass(frozen=True)
class Via:
    """A change of form on the way, and its exact inverse. Both must work on meta tensors too."""

    to_ours: Callable[[list[Tensor]], Tensor]
    to_theirs: Callable[[Tensor, int], list[Tensor]]


SAME = Via(lambda tensors: tensors[0], lambda tensor, _: [tensor])
STACK = Via(lambda tensors: torch.cat(tensors), lambda tensor, parts: list(tensor.chunk(parts)))
"""Several matrices one above the other (q, k and v)."""
PER_HEAD = Via(lambda tensors: tensors[0].flatten(), lambda tensor, _: [tensor.view(1, -1, 1, 1)])
"""A [1, H, 1, 1] tensor as [H]."""
SIX = Via(lambda tensors: tensors[0][0, 0], lambda tensor, _: [tensor[None, None]])
"""A [1, 1, 6, C] tensor as [6, C]."""


@dataclass(frozen=True)
class Rule:
    """One line of a key table.

    ``{i}`` stands for a number, ``{p}`` for one name between dots and ``{rest}`` for anything; the same marks must
    stand on both sides.
    """

    theirs: str | tuple[str, ...]
    ours: str
    via: Via = SAME

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Ignored:
    """A buffer with no meaning for us. ``rebuild`` makes it again for the way back, from the marks' values and the
    other tensors' specs; without it the way back leaves it out."""

    theirs: str
    why: str
    rebuild: Callable[[Rebuilding], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Rebuilding:
    """What a rebuilt buffer may depend on."""

    specs: Mapping[str, TensorSpec]
    patch_nums: tuple[int, ...] | None


@dataclass(frozen=True)
class Table:
    """The correspondence of one published layout."""

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = field(default=())

    def prefixed(self, theirs: str, ours: str = "") -> Table:
        """The same table for a part that stands below a prefix."""
        rules = tuple(
            Rule(tuple(theirs + name for name in rule.sources), ours + rule.ours, rule.via) for rule in self.rules
        )
        return Table(rules, tuple(Ignored(theirs + i.theirs, i.why, _below(i.rebuild, theirs)) for i in self.ignored))

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, self.ignored + other.ignored)


def _below(
    rebuild: Callable[[Rebuilding], Mapping[str, Tensor]] | None, prefix: str
) -> Callable[[Rebuilding], Mapping[str, Tensor]] | None:
    if rebuild is None:
        return None

    def below(given: Rebuilding) -> Mapping[str, Tensor]:
        specs = {k.removeprefix(prefix): v for k, v in given.specs.items() if k.startswith(prefix)}
        return {prefix + k: v for k, v in rebuild(Rebuilding(specs, given.patch_nums)).items()}

    return below


class ToOurs:
    """A published checkpoint under our names. A ``TensorSource``: tensors are changed as they are read.

    Raises:
        ValueError: names that the table does not know, all listed; or a group of names of which some are missing.
    """

    def __init__(self, source: TensorSource, table: Table) -> None:
        self._source = source
        found: dict[str, tuple[Rule, dict[str, str]]] = {}
        unknown = []
        for name in source.specs:
            if any(_match(i.theirs, name) is not None for i in table.ignored):
                continue
            for rule in table.rules:
                marks = next((m for t in rule.sources if (m := _match(t, name)) is not None), None)
                if marks is not None:
                    found[rule.ours.format(**marks)] = (rule, marks)
                    break
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(f"unknown tensors in the checkpoint: {listing(unknown)}")
        self._plan = {
            ours: ([t.format(**marks) for t in rule.sources], rule.via) for ours, (rule, marks) in found.items()
        }
        missing = [name for names, _ in self._plan.values() for name in names if name not in source.specs]
        if missing:
            raise ValueError(f"missing tensors in the checkpoint: {listing(missing)}")
        self.specs = {
            ours: TensorSpec.of(via.to_ours([source.specs[name].meta() for name in names]))
            for ours, (names, via) in self._plan.items()
        }

    def theirs(self, ours: str) -> list[str]:
        """The published names behind one of ours, for messages."""
        return self._plan[ours][0]

    def read(self, name: str) -> Tensor:
        names, via = self._plan[name]
        return via.to_ours([self._source.read(n) for n in names])


class ToTheirs:
    """Our tensors under the names of a published layout, its buffers made again. A ``TensorSource``."""

    def __init__(self, source: TensorSource, table: Table, patch_nums: tuple[int, ...] | None) -> None:
        self._source = source
        self._plan: dict[str, tuple[str, Via, int, int]] = {}
        specs: dict[str, TensorSpec] = {}
        unknown = []
        for ours, spec in source.specs.items():
            for rule in table.rules:
                marks = _match(rule.ours, ours)
                if marks is not None:
                    parts = rule.via.to_theirs(spec.meta(), len(rule.sources))
                    for number, (template, part) in enumerate(zip(rule.sources, parts, strict=True)):
                        name = template.format(**marks)
                        self._plan[name] = (ours, rule.via, number, len(parts))
                        specs[name] = TensorSpec.of(part)
                    break
            else:
                unknown.append(ours)
        if unknown:
            raise ValueError(f"the published layout has no place for: {listing(unknown)}")
        self._rebuilt: dict[str, Tensor] = {}
        for ignored in table.ignored:
            if ignored.rebuild is not None:
                self._rebuilt |= ignored.rebuild(Rebuilding(specs, patch_nums))
        self.specs = specs | {name: TensorSpec.of(tensor) for name, tensor in self._rebuilt.items()}

    def read(self, name: str) -> Tensor:
        if name in self._rebuilt:
            return self._rebuilt[name]
        ours, via, number, parts = self._plan[name]
        return via.to_theirs(self._source.read(ours), parts)[number]


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message: all of them where they are few."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{len(ordered)} ({', '.join(ordered[:limit])}{more})"


def _match(template: str, name: str) -> dict[str, str] | None:
    match = _pattern(template).fullmatch(name)
    return match.groupdict() if match else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    marks = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>[^.]+)", "rest": r"(?P<rest>.+)"}
    pieces: Sequence[str] = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(marks[piece] if k % 2 else re.escape(piece) for k, piece in enumerate(pieces)))

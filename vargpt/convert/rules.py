"""Key tables: how the tensor names of a published layout correspond to ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    aliases: tuple[tuple[str, str], ...] = field(default=())
    """How other releases of the same library begin a name (a regular expression), and how the rules do."""

    def prefixed(self, theirs: str, ours: str = "") -> Table:
        """The same table for a part that stands below a prefix."""
        rules = tuple(
            Rule(tuple(theirs + name for name in rule.sources), ours + rule.ours, rule.via) for rule in self.rules
        )
        return Table(rules, tuple(Ignored(theirs + i.theirs, i.why, _below(i.rebuild, theirs)) for i in self.ignored))

    def canonical(self, name: str) -> str:
        """A published name as the rules spell it."""
        for beginning, usual in self.aliases:
            name = re.sub(f"^(?:{beginning})", usual, name)
        return name

    def ignores(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self._ignored)

    def rule_for(self, name: str) -> tuple[Rule, int, str] | None:
        """The rule of a published name, which of its sources the name is, and our name."""
        for rule, number, pattern in self._theirs:
            if match := pattern.fullmatch(name):
                return rule, number, rule.ours.format(**match.groupdict())
        return None

    def rule_of_ours(self, ours: str) -> tuple[Rule, list[str]] | None:
        """The rule of one of our names, and the published names that belong to it."""
        for rule, pattern in self._ours:
            if match := pattern.fullmatch(ours):
                return rule, [source.format(**match.groupdict()) for source in rule.sources]
        return None

    @cached_property
    def _ignored(self) -> list[re.Pattern[str]]:
        return [_pattern(ignored.theirs) for ignored in self.ignored]

    @cached_property
    def _theirs(self) -> list[tuple[Rule, int, re.Pattern[str]]]:
        return [(rule, number, _pattern(name)) for rule in self.rules for number, name in enumerate(rule.sources)]

    @cached_property
    def _ours(self) -> list[tuple[Rule, re.Pattern[str]]]:
        return [(rule, _pattern(rule.ours)) for rule in self.rules]

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, self.ignored + other.ignored, self.aliases + other.aliases)


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

    It renames what is there; whether that is what should be there is for ``check_published`` to say, and only
    then may ``specs`` and ``read`` be used.
    """

    def __init__(self, source: TensorSource, table: Table) -> None:
        self.source, self._table = source, table
        self.unknown: list[str] = []
        """Published names that the table does not know."""
        self.twice: list[str] = []
        """Pairs of published names that give the same tensor of ours."""
        self._rules: dict[str, Rule] = {}
        self._names: dict[str, dict[int, str]] = {}
        self._specs: dict[str, TensorSpec] | None = None
        for name in source.specs:
            canonical = table.canonical(name)
            if table.ignores(canonical):
                continue
            found = table.rule_for(canonical)
            if found is None:
                self.unknown.append(name)
                continue
            rule, number, ours = found
            if number in self._names.get(ours, ()):
                self.twice.append(f"{self._names[ours][number]} and {name}")
                continue
            self._rules[ours] = rule
            self._names.setdefault(ours, {})[number] = name

    @property
    def names(self) -> Iterable[str]:
        """Our names of the tensors that are there, be it in part."""
        return self._rules.keys()

    def sources(self, ours: str) -> list[str]:
        """The published names behind one of ours."""
        return [name for _, name in sorted(self._names[ours].items())]

    def theirs(self, ours: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What the checkpoint should hold for one of our tensors, under its own names where it has them."""
        found = self._table.rule_of_ours(ours)
        assert found is not None, ours
        rule = self._rules.get(ours, found[0])
        parts = rule.via.to_theirs(spec.meta(), len(rule.sources))
        return {
            self._names.get(ours, {}).get(number, usual): TensorSpec.of(part)
            for number, (usual, part) in enumerate(zip(found[1], parts, strict=True))
        }

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        if self._specs is None:
            self._specs = {
                ours: TensorSpec.of(rule.via.to_ours([self.source.specs[name].meta() for name in self.sources(ours)]))
                for ours, rule in self._rules.items()
            }
        return self._specs

    def read(self, name: str) -> Tensor:
        return self._rules[name].via.to_ours([self.source.read(source) for source in self.sources(name)])


class ToTheirs:
    """Our tensors under the names of a published layout, its buffers made again. A ``TensorSource``."""

    def __init__(self, source: TensorSource, table: Table, patch_nums: tuple[int, ...] | None) -> None:
        self._source = source
        self._plan: dict[str, tuple[str, Via, int, int]] = {}
        specs: dict[str, TensorSpec] = {}
        unknown = []
        for ours, spec in source.specs.items():
            found = table.rule_of_ours(ours)
            if found is None:
                unknown.append(ours)
                continue
            rule, names = found
            parts = rule.via.to_theirs(spec.meta(), len(names))
            for number, (name, part) in enumerate(zip(names, parts, strict=True)):
                self._plan[name] = (ours, rule.via, number, len(names))
                specs[name] = TensorSpec.of(part)
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


def listing(names: Iterable[str], limit: int = 100) -> str:
    """Names for a message: all of them where they are few."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{len(ordered)} ({', '.join(ordered[:limit])}{more})"


def _pattern(template: str) -> re.Pattern[str]:
    marks = {"i": r"(?P<i>\d+)", "p": r"(?P<p>[^.]+)", "rest": r"(?P<rest>.+)"}
    pieces: Sequence[str] = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(marks[piece] if k % 2 else re.escape(piece) for k, piece in enumerate(pieces)))

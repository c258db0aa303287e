"""Runs the PTX that nvcc emits, on a CPU: it sees the inline assembly and nvcc's own work, which g++ does not.

All threads of the grid run side by side, each an entry of numpy arrays, and always those at the lowest place in the
program, so that threads which parted meet again as soon as they can. Only the instructions that our kernels use are
known; any other is an error, as is an access outside of the call's tensors.

Copies by ``cp.async`` arrive as late as they may, at their ``wait_group``; until then NaN stands in their place. Races
are left to the emulator, which looks for them in the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LANES = 32
TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16"), np.uint16),
    **dict.fromkeys(("b32", "u32"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


# ---- Programs ----


@dataclass(frozen=True)
class Instruction:
    """``@%p1 add.s32 %r1, %r2, 3;`` is guarded by %p1; its opcode is (add, s32), its operands are %r1, %r2, 3."""

    text: str
    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A kernel with one parameter, a struct."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def parse(cls, source: str) -> Program:
        """The one kernel of a .ptx file.

        Raises:
            ValueError: there is another number of kernels, or of parameters.
        """
        source = re.sub(r"//[^\n]*", "", source)
        entries = re.findall(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{(.*)\}", source, re.DOTALL)
        if source.count(".entry") != 1 or entries[0][0].count(".param") != 1:
            raise ValueError("the PTX must hold one kernel with one parameter")
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for statement in re.split(r"[;\n]", entries[0][1]):
            text = statement.strip()
            while label := re.match(r"([$\w]+):\s*", text):
                labels[label[1]] = len(instructions)
                text = text[label.end() :]
            if text and text[0] not in ".{}":
                instructions.append(_instruction(text))
        return cls(tuple(instructions), labels)


def _instruction(text: str) -> Instruction:
    parts = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if parts is None:
        raise ValueError(f"no instruction: {text}")
    opcode = tuple(parts[3].replace("::", ".").split("."))
    return Instruction(text, parts[2], parts[1] == "!", opcode, _operands(parts[4]))


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas, but not within {registers} and [addresses]."""
    return tuple(found.strip() for found in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text))


def _members(operand: str) -> tuple[str, ...]:
    """The registers of {a, b, c}; a lone one is a vector of one."""
    return tuple(part.strip() for part in operand.strip("{}").split(","))


# ---- Arithmetic ----


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once. The product is exact in double; the sum is rounded to odd there, which a second rounding
    to float does not notice (Boldo and Melquiond, 2008)."""
    product, addend = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    away_from_zero = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away_from_zero, 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


def to_bf16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_fp16(x: Array) -> Array:
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def from_fp16(x: Array) -> Array:
    return x.view(np.float16).astype(np.float32)


def flush(x: Array) -> Array:
    """.ftz: what is too small for a normal float is zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)


Approximation = Callable[[Array], Array]
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    # Unordered: true of NaN, too.
    "ltu": lambda a, b: ~np.greater_equal(a, b),
    "leu": lambda a, b: ~np.greater(a, b),
    "gtu": lambda a, b: ~np.less_equal(a, b),
    "geu": lambda a, b: ~np.less(a, b),
}


# ---- Memory ----


@dataclass(frozen=True)
class Memory:
    """Bytes that stand for those from ``address`` on."""

    address: int
    data: NDArray[np.uint8]
    writable: bool = True


@dataclass
class Copies:
    """cp.async instructions of the same moment: for some threads, from where (-1: zeros) and to where in shared
    memory, and as part of which of the thread's groups."""

    threads: Array
    sources: Array
    targets: Array
    groups: Array


class Machine:
    """One launch: registers of all threads, shared memory of all blocks, global memory."""

    def __init__(
        self,
        program: Program,
        *,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        parameter: bytes,
        memories: Sequence[Memory],
        approximations: Mapping[str, Approximation] | None = None,
    ) -> None:
        self.program = program
        self.blocks, self.threads_per_block = int(np.prod(grid)), block
        self.threads = self.blocks * block
        self.memories = sorted(memories, key=lambda memory: memory.address)
        self.parameter = np.frombuffer(parameter, np.uint8)
        self.approximations = dict(approximations or {"ex2": np.exp2, "lg2": np.log2})

        thread = np.arange(self.threads, dtype=np.uint32)
        number = thread // block
        self.shared_bytes = shared_bytes
        self.shared = np.full(self.blocks * shared_bytes, 0xFF, np.uint8)  # NaN in every format
        self.shared_base = number.astype(np.int64) * shared_bytes

        self.registers: dict[str, Array] = {
            "%tid.x": thread % block,
            "%ctaid.x": number % grid[0],
            "%ctaid.y": number // grid[0] % grid[1],
            "%ctaid.z": number // (grid[0] * grid[1]),
            **{
                f"%nctaid.{axis}": np.full(self.threads, size, np.uint32)
                for axis, size in zip("xyz", grid, strict=True)
            },
        }
        self.place = np.zeros(self.threads, np.int64)  # of the next instruction
        self.active = np.ones(self.threads, bool)  # threads that the current instruction is executed for
        self.commits = np.zeros(self.threads, np.int64)
        self.copies: list[Copies] = []

    def run(self) -> int:
        """Run all threads to their end; the number of steps.

        Raises:
            RuntimeError: an instruction that is not known, or may not be executed so.
        """
        end, steps = len(self.program.instructions), 0
        with np.errstate(all="ignore"):
            while (here := int(self.place.min())) < end:
                instruction = self.program.instructions[here]
                at_it = self.place == here
                self.place[at_it] += 1
                self.active = at_it if instruction.guard is None else at_it & self._guard(instruction)
                steps += 1
                try:
                    if self.active.any():
                        self._execute(instruction)
                except (ValueError, KeyError, IndexError) as error:
                    raise RuntimeError(f"{instruction.text}: {error}") from error
        if self.copies:
            raise RuntimeError("a thread ends while a cp.async is on its way")
        return steps

    def _guard(self, instruction: Instruction) -> Array:
        assert instruction.guard is not None
        return self.registers[instruction.guard] ^ instruction.negated

    # ---- Operands ----

    def read(self, operand: str, kind: str) -> Array:
        """An operand's value for all threads: a register, a number, or a symbol, which stands for address 0."""
        dtype = TYPES[kind]
        if operand.startswith("%"):
            value = self.registers[operand]
            if value.dtype == bool or kind == "pred":
                return value
            bits = BITS[np.dtype(dtype).itemsize]
            return value.astype(bits, copy=False).view(dtype)
        if re.match(r"0[fF]", operand):
            number = np.array([int(operand[2:], 16)], np.uint32).view(np.float32)
        elif re.match(r"-?\d", operand):
            size = np.dtype(dtype).itemsize
            number = np.array([int(operand.rstrip("U"), 0) & (1 << 8 * size) - 1], BITS[size])
        else:
            number = np.zeros(1, BITS[np.dtype(dtype).itemsize])
        return np.broadcast_to(number.view(dtype), (self.threads,))

    def write(self, register: str, value: Array) -> None:
        """Set a register of the active threads."""
        value = np.ascontiguousarray(np.broadcast_to(value, (self.threads,)))
        if value.dtype != bool:
            value = value.view(BITS[value.itemsize])
        if not self.active.all():
            before = self.registers.get(register)
            value = np.where(self.active, value, np.zeros_like(value) if before is None else before)
        self.registers[register] = value

    def addresses(self, operand: str, kind: str = "u64") -> Array:
        """Where [register + offset] points to, for the active threads."""
        parts = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if parts is None:
            raise ValueError(f"no address: {operand}")
        return self.read(parts[1], kind)[self.active].astype(np.int64) + int(parts[2] or 0)

    # ---- Memory ----

    def in_shared(self, addresses: Array, size: int, threads: Array) -> Array:
        """Indices of the first bytes in ``self.shared``."""
        if (addresses % size).any() or (addresses < 0).any() or (addresses + size > self.shared_bytes).any():
            raise ValueError("outside of shared memory, or not aligned")
        return addresses + self.shared_base[threads]

    def in_global(self, addresses: Array, size: int, writes: bool = False) -> list[tuple[Array, Memory, Array]]:
        """For every memory that is accessed: which of the addresses lie there, and the indices of their first bytes."""
        if (addresses % size).any():
            raise ValueError("not aligned")
        found: list[tuple[Array, Memory, Array]] = []
        missing = np.ones(len(addresses), bool)
        for memory in self.memories:
            first = addresses - memory.address
            inside = missing & (first >= 0) & (first + size <= len(memory.data)) & (memory.writable or not writes)
            if inside.any():
                found.append((inside, memory, first[inside]))
                missing &= ~inside
        if missing.any():
            raise ValueError("outside of all tensors")
        return found

    def load(self, space: str, operand: str, size: int) -> NDArray[np.uint8]:
        """The bytes [active threads, size] at an address."""
        window = np.arange(size)
        if space == "param":
            return self.parameter[self.addresses(operand)[:, None] + window]
        if space == "shared":
            first = self.in_shared(self.addresses(operand, "u32"), size, np.flatnonzero(self.active))
            return self.shared[first[:, None] + window]
        if space != "global":
            raise ValueError(f"loads from {space} are not known")
        return self.load_global(self.addresses(operand), size)

    def load_global(self, addresses: Array, size: int) -> NDArray[np.uint8]:
        result = np.empty((len(addresses), size), np.uint8)
        for which, memory, first in self.in_global(addresses, size):
            result[which] = memory.data[first[:, None] + np.arange(size)]
        return result

    def store(self, space: str, operand: str, data: NDArray[np.uint8]) -> None:
        window = np.arange(data.shape[1])
        if space == "shared":
            first = self.in_shared(self.addresses(operand, "u32"), len(window), np.flatnonzero(self.active))
            self.shared[first[:, None] + window] = data
            return
        if space != "global":
            raise ValueError(f"stores to {space} are not known")
        for which, memory, first in self.in_global(self.addresses(operand), len(window), writes=True):
            memory.data[first[:, None] + window] = data[which]

    # ---- Instructions ----

    def _execute(self, instruction: Instruction) -> None:
        name, operands, opcode = instruction.opcode[0], instruction.operands, instruction.opcode
        if name in BINARY:
            self._elementwise(BINARY[name], opcode, operands)
        elif name in self.approximations:
            self._approximate(name, opcode, operands)
        elif name in self.KNOWN:
            self.KNOWN[name](self, opcode, operands)
        else:
            raise ValueError("this instruction is not known")

    def _only(self, opcode: Sequence[str], *known: str) -> None:
        """Modifiers that change what an instruction does must not be overlooked."""
        if unknown := set(opcode[1:]) - set(known) - TYPES.keys():
            raise ValueError(f"modifiers {sorted(unknown)} are not known")

    def _elementwise(self, compute: Callable[..., Array], opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "rn")
        kind = opcode[-1]
        result = compute(*(self.read(operand, kind) for operand in operands[1:]))
        self.write(operands[0], result if kind == "pred" else result.astype(TYPES[kind], copy=False))

    def _approximate(self, name: str, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "approx", "ftz")
        self.write(operands[0], flush(self.approximations[name](flush(self.read(operands[1], "f32")))))

    def _ld(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "param", "shared", "global", "v2", "v4", "nc")
        dtype, registers = TYPES[opcode[-1]], _members(operands[0])
        size = np.dtype(dtype).itemsize
        loaded = self.load(opcode[1], operands[1], size * len(registers))
        for i, register in enumerate(registers):
            value = np.zeros(self.threads, dtype)
            value[self.active] = np.ascontiguousarray(loaded[:, i * size : (i + 1) * size]).view(dtype)[:, 0]
            self.write(register, value)

    def _st(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "shared", "global", "v2", "v4")
        values = np.stack([self.read(register, opcode[-1])[self.active] for register in _members(operands[1])], axis=1)
        self.store(opcode[1], operands[0], values.view(np.uint8))

    def _bra(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "uni")
        self.place[self.active] = self.program.labels[operands[0]]

    def _ret(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self.place[self.active] = len(self.program.instructions)

    def _bar(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        if opcode == ("bar", "warp", "sync"):
            if (self.read(operands[0], "u32")[self.active] != 2**32 - 1).any():
                raise ValueError("only barriers of whole warps are known")
            self._together(LANES)
        else:
            self._only(opcode, "sync")
            self._together(self.threads_per_block)

    def _together(self, size: int) -> None:
        """All or none of so many threads in succession must be here."""
        here = self.active.reshape(-1, size)
        if (here.any(1) != here.all(1)).any():
            raise ValueError(f"reached by some of {size} threads that must execute it together")

    def _mov(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        to, value = operands
        if to.startswith("{"):  # take apart
            parts = _members(to)
            whole = np.ascontiguousarray(self.read(value, opcode[1]))
            pieces = whole.view(BITS[whole.itemsize // len(parts)]).reshape(self.threads, len(parts))
            for i, part in enumerate(parts):
                self.write(part, pieces[:, i])
        elif value.startswith("{"):  # put together
            parts = _members(value)
            size = np.dtype(TYPES[opcode[1]]).itemsize // len(parts)
            pieces = np.stack([self.registers[part].astype(BITS[size]) for part in parts], axis=1)
            self.write(to, pieces.view(BITS[size * len(parts)])[:, 0])
        else:
            self.write(to, self.read(value, opcode[1]))

    def _cvta(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "to", "global", "shared")  # addresses are the same numbers in all spaces here
        self.write(operands[0], self.read(operands[1], opcode[-1]))

    def _cvt(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        if opcode[1:] in (("rn", "bf16x2", "f32"), ("rn", "f16x2", "f32")):
            narrow = to_bf16 if opcode[2] == "bf16x2" else to_fp16
            upper, lower = (narrow(self.read(operand, "f32")).astype(np.uint32) for operand in operands[1:])
            self.write(operands[0], upper << np.uint32(16) | lower)
        elif opcode[1:] == ("f32", "f16"):
            self.write(operands[0], from_fp16(np.ascontiguousarray(self.read(operands[1], "u16"))))
        elif len(opcode) == 3 and "f" not in opcode[1] + opcode[2]:
            self.write(operands[0], self.read(operands[1], opcode[2]).astype(TYPES[opcode[1]]))
        else:
            raise ValueError("this conversion is not known")

    def _mul(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        if "wide" in opcode:
            wide = {"s32": np.int64, "u32": np.uint64}[opcode[-1]]
            a, b = (self.read(operand, opcode[-1]).astype(wide) for operand in operands[1:3])
            self.write(operands[0], a * b)
        else:
            self._elementwise(np.multiply, [part for part in opcode if part != "lo"], operands)

    def _mad(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "lo")
        a, b, c = (self.read(operand, opcode[-1]) for operand in operands[1:])
        self.write(operands[0], a * b + c)

    def _fma(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "rn")
        a, b, c = (self.read(operand, "f32") for operand in operands[1:])
        self.write(operands[0], fused_multiply_add(a, b, c))

    def _div(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        if opcode[-1] == "f32":
            self._elementwise(np.divide, opcode, operands)
        else:  # towards zero
            a, b = (self.read(operand, opcode[-1])[self.active].astype(np.int64) for operand in operands[1:])
            quotient = np.zeros(self.threads, np.int64)
            quotient[self.active] = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
            self.write(operands[0], quotient.astype(TYPES[opcode[-1]]))

    def _rcp(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._elementwise(partial(np.divide, np.float32(1)), opcode, operands)

    def _sqrt(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._elementwise(np.sqrt, opcode, operands)

    def _neg(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._elementwise(np.negative, opcode, operands)

    def _not(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._elementwise(np.invert, opcode, operands)

    def _shift(self, compute: Callable[..., Array], opcode: Sequence[str], operands: Sequence[str]) -> None:
        value, count = self.read(operands[1], opcode[1]), self.read(operands[2], "u32")
        if (count[self.active] >= 8 * value.itemsize).any():
            raise ValueError("shifts by a whole register are not known")
        self.write(operands[0], compute(value, count.astype(value.dtype)))

    def _shl(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._shift(np.left_shift, opcode, operands)

    def _shr(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._shift(np.right_shift, opcode, operands)

    def _bfi(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        source, target = (self.read(operand, "u32") for operand in operands[1:3])
        first, length = (int(operand) for operand in operands[3:])
        mask = np.uint32(((1 << length) - 1) << first)
        self.write(operands[0], target & ~mask | source << np.uint32(first) & mask)

    def _setp(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        a, b = (self.read(operand, opcode[2]) for operand in operands[1:])
        self.write(operands[0], COMPARISONS[opcode[1]](a, b))

    def _selp(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        a, b = (self.read(operand, opcode[1]) for operand in operands[1:3])
        self.write(operands[0], np.where(self.read(operands[3], "pred"), a, b))

    # ---- Copies ----

    def _cp(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        if opcode[:3] == ("cp", "async", "commit_group"):
            self.commits[self.active] += 1
        elif opcode[:3] == ("cp", "async", "wait_group"):
            self._arrive(int(operands[0]))
        elif opcode == ("cp", "async", "cg", "shared", "global") and operands[2] == "16":
            self._start_copies(operands)
        else:
            raise ValueError("this copy is not known")

    def _start_copies(self, operands: Sequence[str]) -> None:
        threads = np.flatnonzero(self.active)
        size = self.read(operands[3], "u32")[self.active]
        if not np.isin(size, (0, 16)).all():
            raise ValueError("copies of a part of the 16 bytes are not known")
        sources = self.addresses(operands[1])
        self.load_global(sources[size > 0], 16)  # may it be read?
        targets = self.in_shared(self.addresses(operands[0], "u32"), 16, threads)
        self.shared[targets[:, None] + np.arange(16)] = 0xFF
        self.copies.append(Copies(threads, np.where(size > 0, sources, -1), targets, self.commits[threads]))

    def _arrive(self, pending: int) -> None:
        """The active threads' copies arrive, except those of their newest groups."""
        remaining = []
        for copies in self.copies:
            due = self.active[copies.threads] & (copies.groups < self.commits[copies.threads] - pending)
            real = due & (copies.sources >= 0)
            self.shared[copies.targets[due & ~real][:, None] + np.arange(16)] = 0
            self.shared[copies.targets[real][:, None] + np.arange(16)] = self.load_global(copies.sources[real], 16)
            if not due.all():
                left = (part[~due] for part in (copies.threads, copies.sources, copies.targets, copies.groups))
                remaining.append(Copies(*left))
        self.copies = remaining

    # ---- Warps ----

    def _shfl(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "sync", "bfly")
        self._together(LANES)
        mask, last_lane, members = (set(self.read(operand, "u32")[self.active].tolist()) for operand in operands[2:])
        if "bfly" not in opcode or last_lane != {31} or members != {2**32 - 1} or len(mask) != 1:
            raise ValueError("only xor shuffles of whole warps are known")
        partner = np.arange(LANES) ^ mask.pop()
        self.write(operands[0].split("|")[0], self.read(operands[1], "u32").reshape(-1, LANES)[:, partner].reshape(-1))

    def _ldmatrix(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        self._only(opcode, "sync", "aligned", "m8n8", "x4", "trans", "shared")
        self._together(LANES)
        first = self.in_shared(self.addresses(operands[1], "u32"), 16, np.flatnonzero(self.active))
        rows = self.shared[first[:, None] + np.arange(16)].view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        if "trans" in opcode:
            matrices = matrices.swapaxes(2, 3)
        for i, register in enumerate(_members(operands[0])):
            pairs = np.ascontiguousarray(matrices[:, i]).view(np.uint32)  # a lane's two numbers: row lane / 4
            value = np.zeros(self.threads, np.uint32)
            value[self.active] = pairs.reshape(-1)
            self.write(register, value)

    def _mma(self, opcode: Sequence[str], operands: Sequence[str]) -> None:
        layout = ("sync", "aligned", "m16n8k16", "row", "col", "f32")
        if opcode[1:7] != layout or opcode[7:] not in (("bf16", "bf16", "f32"), ("f16", "f16", "f32")):
            raise ValueError("this product is not known")
        self._together(LANES)
        widen = from_bf16 if opcode[7] == "bf16" else from_fp16

        def quarters(operand: str) -> list[Array]:
            """8x8 matrices: a register of a warp's lanes each."""
            registers = (self.registers[register][self.active] for register in _members(operand))
            return [widen(np.ascontiguousarray(x).view(np.uint16)).reshape(-1, 8, 8) for x in registers]

        top_left, bottom_left, top_right, bottom_right = quarters(operands[1])
        left = np.block([[top_left, top_right], [bottom_left, bottom_right]])  # warp, row, k
        right = np.concatenate(quarters(operands[2]), axis=2)  # warp, column, k
        product = np.zeros((len(left), 16, 8), np.float32)
        for k in range(16):  # in order, as the emulator adds
            product += left[:, :, None, k] * right[:, None, :, k]

        pairs = product.reshape(-1, 2, 8, 4, 2)  # warp, half, row, lane of the row's quad, column
        for i, (to, addend) in enumerate(zip(_members(operands[0]), _members(operands[3]), strict=True)):
            value = np.zeros(self.threads, np.float32)
            value[self.active] = self.read(addend, "f32")[self.active] + pairs[:, i // 2, :, :, i % 2].reshape(-1)
            self.write(to, value)

    # fmt: off
    KNOWN: ClassVar[dict[str, Callable[[Machine, Sequence[str], Sequence[str]], None]]] = {
        "ld": _ld, "st": _st, "cp": _cp, "bar": _bar, "bra": _bra, "ret": _ret,
        "mov": _mov, "cvt": _cvt, "cvta": _cvta, "setp": _setp, "selp": _selp,
        "mul": _mul, "mad": _mad, "fma": _fma, "div": _div, "rcp": _rcp, "sqrt": _sqrt, "neg": _neg,
        "not": _not, "shl": _shl, "shr": _shr, "bfi": _bfi,
        "shfl": _shfl, "ldmatrix": _ldmatrix, "mma": _mma,
    }
    # fmt: on

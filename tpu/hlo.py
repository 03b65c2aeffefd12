"""Reads a compiled program's scheduled HLO text: what it multiplies, moves and sends, with loops counted in full.

The compiler's own `cost_analysis` counts the body of a loop once, and our towers are loops over blocks. Here the call
graph is walked from the entry, and a loop's body counts as often as the constant in its condition says.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str  # as written, with layouts and memory spaces
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        """The computation, or the word, that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def _closing(text: str) -> int:
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(element type, sizes, layout) of each array in a shape as written."""
    return [
        (kind, tuple(int(size) for size in sizes.split(",") if size), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
        if kind in _BYTES
    ]


def size(shape: str, *, hbm_only: bool = False) -> float:
    """Bytes of a shape; with `hbm_only` those that lie in HBM, not in a memory space of the core, S(1) and above."""
    return sum(
        _BYTES[kind] * math.prod(sizes) for kind, sizes, layout in arrays(shape) if not (hbm_only and "S(" in layout)
    )


class Program:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        """`text` as `compiled.as_text()` gives it.

        Raises:
          ValueError: if it has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line.strip())):
                current[found[1]] = Instruction(*found.groups())
        if not self.entry:
            raise ValueError("this is no HLO text: it has no ENTRY computation; give compiled.as_text().")

    def executed(self, computation: str = "", times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that runs, fusions not opened."""
        computation = computation or self.entry
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                yield from self.executed(instruction.attribute("body") or "", times * trips)
            elif instruction.opcode in ("call", "async-start"):
                called = instruction.attribute("to_apply") or instruction.attribute("calls")
                yield from self.executed(called or "", times)
            else:
                yield computation, instruction, times

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: the only integer constant of its condition.

        Raises:
          ValueError: if the condition does not hold exactly one.
        """
        condition = self.computations[loop.attribute("condition") or ""]
        constants = [c for c in condition.values() if c.opcode == "constant" and c.shape.startswith("s32[]")]
        if len(constants) != 1:
            raise ValueError(
                f"loop {loop.name} has {len(constants)} constants in its condition; its length is unknown."
            )
        return int(constants[0].rest.partition(")")[0])

    def flops(self, computation: str, instruction: Instruction) -> float:
        """Floating point operations, two per multiply-add, of a matrix product or of all those inside a fusion."""
        if instruction.opcode in ("dot", "convolution"):
            inside = self.computations[computation]
            shapes = [arrays(inside[name].shape)[0][1] for name in instruction.operands[:2]]
            out = arrays(instruction.shape)[0][1]
            count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            return count(instruction.rest, shapes[0], shapes[1], out)
        if instruction.opcode == "fusion" and (called := instruction.attribute("calls")):
            return sum(self.flops(called, inner) for inner in self.computations[called].values())
        return 0.0

    def total_flops(self) -> float:
        """Floating point operations of every matrix product that one run executes, on one device."""
        return sum(times * self.flops(computation, one) for computation, one, times in self.executed())

    def collectives(self) -> dict[tuple[str, int], tuple[int, float]]:
        """(kind, devices in a group) → (how many run, bytes of their results), on one device.

        A collective that the compiler put inside a fusion to overlap it with other work counts once, at its start.
        """
        found: dict[tuple[str, int], tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
        for _, one, times in self.executed():
            inside = [one]
            if one.opcode == "fusion" and one.name.startswith("async-collective-start"):
                inside = list(self.computations[one.attribute("calls") or ""].values())
            for each in inside:
                kind = each.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    parts = arrays(each.shape)
                    # A start's tuple holds operand, result and semaphores; only the result travels.
                    moved = size(each.shape)
                    if each.opcode.endswith("-start") and len(parts) > 1:
                        kind_of, sizes, _ = parts[1]
                        moved = _BYTES[kind_of] * math.prod(sizes)
                    count, total = found[kind, group_size(each.rest)]
                    found[kind, group_size(each.rest)] = count + times, total + times * moved
        return dict(found)


def group_size(attributes: str) -> int:
    """Devices in one group of a collective, from its `replica_groups` in any of XLA's three spellings; 0 if none."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs" in attributes else 0


def _dot_flops(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    axes = [int(axis) for axis in (contracted[1] if contracted else "").split(",") if axis]
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)


def _convolution_flops(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """The TPU compiler writes batched products as convolutions over batch axes, most of whose window is padding or
    holes between dilated entries; only the places where a window meets an entry are multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, attributes[:200]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    pairs = 1.0
    for d in range(len(labels[1]) - 2):
        digit = str(d)
        side, kernel, result = (
            shape[label.index(digit)] for shape, label in zip((left, right, out), labels.groups(), strict=True)
        )

        def of(name: str, default: int, d: int = d) -> int:
            return int(window[name].split("x")[d]) if name in window else default

        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        step, holes, spread = of("stride", 1), of("lhs_dilate", 1), of("rhs_dilate", 1)
        extent = (side - 1) * holes + 1
        meets = 0
        for k in range(kernel):
            # Window place k stands at o·stride + k·spread - low for output o; count those on an entry of the input.
            meets += sum(
                1 for o in range(result) if 0 <= (place := o * step + k * spread - low) < extent and place % holes == 0
            )
        pairs *= meets
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    groups = int((re.search(r"batch_group_count=(\d+)", attributes) or [0, 1])[1])
    return 2.0 * pairs * batch * features * right[labels[2].index("i")] / groups

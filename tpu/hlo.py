"""Reads a compiled program's scheduled HLO text: what it multiplies, moves and sends, with loops counted in full.

The compiler's own `cost_analysis` counts the body of a loop once, and our towers are loops over blocks. Here the call
graph is walked from the entry, and a loop's body counts as often as the constant in its condition says.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

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

    @property
    def cycles(self) -> float:
        """The compiler's own estimate of the time on the core; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return float(found[1]) if found else 0.0


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


def size(shape: str, *, hbm_only: bool = False, padded: bool = False) -> float:
    """Bytes of a shape.

    Args:
      shape: as written, an array or a tuple.
      hbm_only: count what lies in HBM alone, not in a memory space of the core, S(1) and above.
      padded: count the tiles that the arrays are laid out in, in full.
    """
    return sum(
        nbytes((kind, sizes, layout if padded else ""))
        for kind, sizes, layout in arrays(shape)
        if not (hbm_only and "S(" in layout)
    )


def nbytes(array: tuple[str, tuple[int, ...], str]) -> float:
    """Bytes of one of `arrays`, in its tiles."""
    kind, sizes, layout = array
    return _BYTES[kind] * math.prod(tiled(sizes, layout))


def tiled(sizes: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The sizes rounded up to the layout's outermost tile: 96 of "{1,0:T(8,128)}" takes the room of 128."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if not tile or not order:
        return sizes
    grown = list(sizes)
    for axis, step in zip(order.split(","), reversed(tile[1].split(",")), strict=False):
        grown[int(axis)] = -(-grown[int(axis)] // int(step)) * int(step)
    return tuple(grown)


class Program:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        """`text` as `compiled.as_text()` gives it.

        Raises:
          ValueError: if it has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        self._frames = _Frames(text)
        # What a kernel's author notes about it stands on a line of its own, and the instruction goes on behind it.
        text = re.sub(r'\n("[^\n]*")?\n?\}\}, ', r"\1}}, ", text)
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
        """How often a loop runs: the only integer constant of its condition, less where its counter begins.

        A loop of which the compiler has put some turns before it, to overlap what they send, begins above 0.

        Raises:
          ValueError: if the condition does not hold exactly one constant.
        """
        condition = self.computations[loop.attribute("condition") or ""]
        constants = [c for c in condition.values() if c.opcode == "constant" and c.shape.startswith(("s32[]", "u32[]"))]
        if len(constants) != 1:
            raise ValueError(
                f"loop {loop.name} has {len(constants)} constants in its condition; its length is unknown."
            )
        counters = [re.search(r"index=(\d+)", c.rest) for c in condition.values() if c.opcode == "get-tuple-element"]
        inside = next(each for each in self.computations.values() if loop.name in each)
        start = inside.get(loop.operands[0]) if loop.operands else None
        if len(counters) == 1 and counters[0] and start and start.opcode == "tuple":
            first = inside.get(_through(inside, start.operands[int(counters[0][1])]))
            if first and first.opcode == "constant":
                return _integer(constants[0]) - _integer(first)
        return _integer(constants[0])

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

    def inside(self, instruction: Instruction) -> Iterable[Instruction]:
        """What a fusion is made of; any other instruction is all there is of it."""
        called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        return self.computations[called].values() if called else (instruction,)

    def sends(self, instruction: Instruction) -> "list[Collective]":
        """The collectives that an instruction is, or that a fusion begins or does on the way."""
        if instruction.opcode == "fusion" and "collective-done" in instruction.name:
            return []  # counted where it began
        if instruction.opcode == "recv":  # how a collective between slices is written, beside its send
            told = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            if not told:
                return []
            kind = told[1].lower().replace("_", "-")
            return [Collective(kind, (), nbytes(arrays(instruction.shape)[0]), between_slices=True)]
        found = []
        for each in self.inside(instruction):
            kind = each.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or each.opcode.endswith("-done"):
                continue
            parts = arrays(each.shape)
            # A start's tuple holds operand, result and semaphores; only the result travels.
            moved = size(each.shape)
            if each.opcode.endswith("-start") and len(parts) > 1:
                element, sizes, _ = parts[1]
                moved = _BYTES[element] * math.prod(sizes)
            # An all-reduce of which only a part is kept is emitted as a reduce-scatter.
            if kind == "all-reduce" and "reduce-scatter" in (instruction.attribute("calls") or ""):
                kind = "reduce-scatter"
            found.append(Collective(kind, group(each.rest), moved))
        return found

    def collectives(self) -> dict[tuple[str, int], tuple[int, float]]:
        """(kind, devices in a group) → (how many run, bytes of their whole arrays), on one device.

        A collective that the compiler put inside a fusion to overlap it with other work counts once, at its start.
        """
        found: dict[tuple[str, int], tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
        for _, one, times in self.executed():
            for each in self.sends(one):
                count, total = found[each.kind, len(each.group)]
                found[each.kind, len(each.group)] = count + times, total + times * each.moved
        return dict(found)

    def traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes that an instruction reads from HBM and writes there, arrays in their tiles.

        Of an array that a fusion only slices, the slice counts; of one that it updates in place, the update.
        """
        outer = self.computations[computation]
        if instruction.opcode in _FREE:
            return 0.0
        body = {each.name: each for each in self.inside(instruction)} if instruction.opcode == "fusion" else {}
        if not body:
            names = instruction.operands
            if instruction.opcode in ("dynamic-slice", "slice", "gather"):
                names = []
            elif instruction.opcode == "dynamic-update-slice":
                return 2 * size(outer[names[1]].shape, hbm_only=True, padded=True)
            read = sum(size(outer[n].shape, hbm_only=True, padded=True) for n in names if n in outer)
            doubled = 2 if not names else 1
            return read + doubled * size(instruction.shape, hbm_only=True, padded=True)
        total, in_place = 0.0, set()
        for each in body.values():
            if each.opcode == "dynamic-update-slice":
                in_place.add(_through(body, each.operands[0]))
                total += size(body[each.operands[1]].shape, padded=True)
        for each in body.values():
            if each.opcode != "parameter":
                continue
            number = int(each.rest.partition(")")[0])
            shape = outer[instruction.operands[number]].shape
            if each.name not in in_place and "S(" not in shape:
                total += min(self._read(body, each.name), size(shape, hbm_only=True, padded=True))
        written = [part for part in arrays(instruction.shape) if "S(" not in part[2]]
        updated = sorted(math.prod(arrays(body[name].shape)[0][1]) for name in in_place if name in body)
        for kind, sizes, layout in written:
            if math.prod(sizes) in updated:
                updated.remove(math.prod(sizes))
            else:
                total += nbytes((kind, sizes, layout))
        return total

    def _read(self, body: dict[str, Instruction], name: str) -> float:
        """Bytes of a value that the rest of a computation reads: of a slice of it only the slice."""
        total = 0.0
        for user in body.values():
            if user.opcode == "parameter" or name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += size(user.shape, padded=True)
            elif user.opcode == "bitcast":
                total += self._read(body, user.name)
            elif user.opcode == "fusion":
                inner = self.computations[user.attribute("calls") or ""]
                number = f"{user.operands.index(name)})"
                inside = next(p for p in inner.values() if p.opcode == "parameter" and p.rest.startswith(number))
                total += self._read(inner, inside.name)
            else:
                return float("inf")
        return total

    def largest_arrays(self) -> list[tuple[float, str, str]]:
        """(bytes, shape, line of source) of what the program makes in HBM, the largest first; like ones once."""
        found: dict[tuple[str, str], float] = {}
        for _, one, _ in self.executed():
            if one.opcode in _FREE:
                continue
            for kind, sizes, layout in arrays(one.shape):
                if "S(" not in layout:
                    shape = f"{kind}[{','.join(map(str, sizes))}]"
                    found[shape, self.source(one)] = nbytes((kind, sizes, layout))
        return sorted(((size, *key) for key, size in found.items()), reverse=True)

    def source(self, instruction: Instruction) -> str:
        """FILE:LINE of our own code that an instruction comes from, or what the compiler calls it."""
        for each in (instruction, *(() if instruction.opcode != "fusion" else self.inside(instruction))):
            if (found := re.search(r"stack_frame_id=(\d+)", each.rest)) and (place := self._frames.of(int(found[1]))):
                return place
        return "the compiler's own"


def _integer(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])


# They move nothing, or what they move is counted apart.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "after-all", "iota", "while",
        "conditional", "call", "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done",
        "send", "send-done", "recv", "recv-done", "opt-barrier",
    }
)  # fmt: skip


def _through(body: dict[str, Instruction], name: str) -> str:
    """The parameter that a value is only another view of."""
    while name in body and body[name].opcode in ("bitcast", "copy", "reshape", "transpose") and body[name].operands:
        name = body[name].operands[0]
    return name


@dataclasses.dataclass(frozen=True)
class Collective:
    """One sending of arrays among devices."""

    kind: str  # of `COLLECTIVES`
    group: tuple[int, ...]  # one of the groups, devices as the program counts them
    moved: float  # bytes: gathered, reduced or sent on, on one device
    between_slices: bool = False  # it crosses the network between slices; its group is not told


# Who called them says more than their own lines.
_HELPERS = frozenset(
    {"Dense.__call__", "Dense.whole", "gathered", "_gathered", "_gathered_backward", "constrain", "unit"}
)


class _Frames:
    """The tables at the head of a program's text, from a frame's number to a line of source."""

    def __init__(self, text: str):
        head = text[: text.find("\n\n%") if "\n\n%" in text else 2_000_000]
        files, _, functions = head.partition("\nFunctionNames\n")
        self._files = dict(re.findall(r'^(\d+) "([^"]*\.py)"$', files, re.M))
        helpers = {n for n, name in re.findall(r'^(\d+) "([^"]*)"$', functions, re.M) if name in _HELPERS}
        self._lines = {
            n: (file, line)
            for n, file, function, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)", head, re.M
            )
            if function not in helpers
        }
        self._stack = {
            n: (place, parent)
            for n, place, parent in re.findall(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", head, re.M)
        }

    @functools.cache  # noqa: B019
    def of(self, frame: int) -> str | None:
        """The innermost line of this repository on the way to a frame."""
        name, seen = str(frame), set()
        while name in self._stack and name not in seen:
            seen.add(name)
            place, parent = self._stack[name]
            file, line = self._lines.get(place, ("", ""))
            path = self._files.get(file, "").replace("\\", "/")
            if found := re.search(r"(?:^|/)((?:pe_jax|tpu|benchmarks)/[\w/]+\.py)$", path):
                return f"{found[1]}:{line}"
            name = parent
        return None


def group(attributes: str) -> tuple[int, ...]:
    """The first group of a collective, from its `replica_groups` in any of XLA's spellings; () if it has none."""
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    ):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        devices = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3]).reshape(list(sizes.values()))
        walked = [slice(None) if axis in re.findall(r"'(\w+)'", mesh[4]) else 0 for axis in sizes]
        return tuple(devices[tuple(walked)].ravel().tolist())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    return ()


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in a shape, its axes then in another order; both as written, "16,16" and "1,0"."""
    sizes = [int(n) for n in shape.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(n) for n in order.split(",")]) if order else devices


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


def product_sizes(opcode: str, attributes: str, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int, int]:
    """(contracted, rows, columns) of a matrix product, batches aside, from the shapes of its operands."""
    if opcode == "dot":

        def axes(name: str) -> list[int]:
            found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
            return [int(axis) for axis in (found[1] if found else "").split(",") if axis]

        sizes = []
        for side, shape in (("lhs", left), ("rhs", right)):
            gone = axes(f"{side}_contracting_dims") + axes(f"{side}_batch_dims")
            sizes.append(math.prod(n for axis, n in enumerate(shape) if axis not in gone))
        return math.prod(left[axis] for axis in axes("lhs_contracting_dims")), sizes[0], sizes[1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, attributes[:200]
    return right[labels[2].index("i")], left[labels[1].index("b")], right[labels[2].index("o")]

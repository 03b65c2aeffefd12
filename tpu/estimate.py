"""How long a compiled program takes on a slice, read off its schedule; nothing is run.

The core works through the schedule one instruction after the other, while copies and collectives that were started go
on beside it. Three readings of the same schedule make a band:

  roofline  an instruction takes the longer of its matrix FLOPs at the chip's peak (sizes rounded up to the matrix
            unit's) and its bytes at HBM's rate: what no program can beat
  middle    what the compiler itself expects (`estimated_cycles`) where there is matrix work; elsewhere, where it counts
            two to three times too much, the longest of bytes, vector operations and the roofline
  cycles    what the compiler expects throughout: the pessimist's

MFU is the model's FLOPs over the time at the chip's peak. The method's check against known figures is in tpu/README.md.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from tpu import hlo
from tpu.chips import HOP_SECONDS, Chip, Wiring

READINGS = ("roofline", "middle", "cycles")
# Vector operations per element; what is not named takes one. Measured on none: counts of the polynomials used.
_OPERATIONS = {
    "erf": 24, "tanh": 16, "exponential": 8, "exponential-minus-one": 10, "log": 12, "log-plus-one": 14, "divide": 8,
    "rsqrt": 6, "sqrt": 8, "logistic": 16, "power": 24, "cosine": 24, "sine": 24,
}  # fmt: skip
KERNEL_OPERATIONS = 20  # on the vector unit for each logit of attention: scale, maximum, exponential, sum, casts
_NO_OPERATION = frozenset(
    {
        "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "iota", "reshape", "copy",
        "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "convolution", "dot",
        "custom-call",
    }
)  # fmt: skip


@dataclasses.dataclass
class Estimate:
    """Seconds of one run on one device, by reading; and where they go."""

    seconds: dict[str, float]
    exposed: float  # of the middle reading: the core waits for a collective
    waited: float  # of the middle reading: the core waits for a copy between memories
    collectives: dict[str, float]  # seconds on the wire by kind, hidden or not
    lines: list[tuple[str, float]]  # middle seconds by line of source, the costliest first
    kernel_flops: float  # of matrix work inside kernels, which the program's text does not show

    def mfu(self, model_flops: float, peak: float) -> dict[str, float]:
        """Model FLOPs of the run per device, over what the peak would do in the estimated time."""
        return {reading: model_flops / (seconds * peak) for reading, seconds in self.seconds.items()}


def estimate(
    program: hlo.Program, wiring: Wiring, kernel_of: "Callable[[hlo.Instruction], Kernel | None] | None" = None
) -> Estimate:
    """Walks a program's schedule.

    Args:
      program: as compiled for the devices of `wiring`.
      wiring: the slice.
      kernel_of: what a custom call works, where it is a Pallas kernel; by default what its author told the compiler.
    """
    walks = {reading: _Walk(program, wiring, reading, kernel_of or Kernel.of) for reading in READINGS}
    for walk in walks.values():
        walk.run()
    middle = walks["middle"]
    return Estimate(
        {reading: walk.now for reading, walk in walks.items()},
        middle.exposed,
        middle.waited,
        dict(middle.wire),
        sorted(middle.lines.items(), key=lambda item: -item[1]),
        middle.kernel_flops,
    )


class _Walk:
    """One reading: a clock, and what is under way beside the core."""

    def __init__(self, program: hlo.Program, wiring: Wiring, reading: str, kernel_of: "Callable[..., Kernel | None]"):
        self.kernel_of = kernel_of
        self.program, self.wiring, self.chip, self.reading = program, wiring, wiring.chip, reading
        self.now = self.exposed = self.waited = self.kernel_flops = 0.0
        self.wire: collections.Counter[str] = collections.Counter()
        self.lines: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        self._computation(self.program.entry, 1)

    def _computation(self, name: str, times: int) -> None:
        """Advances the clock by one pass; counters by `times` of them."""
        copies_free = 0.0  # when the copy engine is done with what it was given
        links_free: dict[int, float] = collections.defaultdict(float)
        ready: dict[str, float] = {}  # by the name of a start: when its result is there
        label: dict[str, str] = {}  # and what is waited for
        begun: dict[str, str] = {}  # a value that only hands a start on → that start
        for one in self.program.computations[name].values():
            before, opcode = self.now, one.opcode
            handed = [begun[operand] for operand in one.operands if operand in begun]
            if opcode == "while":
                self._loop(one, times)
                continue
            if opcode in ("call", "conditional"):
                self._branches(one, times)
                continue
            if opcode in ("get-tuple-element", "tuple", "bitcast"):
                if handed and (opcode != "get-tuple-element" or _is_token(one.shape) or "start" in one.operands[0]):
                    begun[one.name] = handed[-1]
                continue
            if opcode in ("copy-start", "slice-start", "async-start"):
                copies_free = max(copies_free, self.now) + _copied(one) / self.chip.hbm_rate
                ready[one.name], begun[one.name] = copies_free, one.name
                continue
            sends = self.program.sends(one)
            asynchronous = opcode.endswith("-start") or opcode == "recv" or "collective-start" in one.name
            if sends and (asynchronous or opcode in hlo.COLLECTIVES or not self.program.flops(name, one)):
                for each in sends:
                    dimensions, seconds = self._wire_seconds(each)
                    self.wire[each.kind] += seconds * times
                    start = max([self.now, *(links_free[d] for d in dimensions)])
                    for dimension in dimensions:
                        links_free[dimension] = start + seconds
                    ready[one.name] = max(ready.get(one.name, 0.0), start + seconds)
                label[one.name] = f"waiting for {sends[0].kind}, {self.program.source(one)}"
                if asynchronous:
                    begun[one.name] = one.name
                else:
                    self.now = max(self.now, ready[one.name])
                    self.exposed += (self.now - before) * times
                    self.lines[label[one.name]] += (self.now - before) * times
                continue
            if opcode.endswith("-done") or "collective-done" in one.name:
                last = max((start for start in handed if start in ready), key=lambda start: ready[start], default=None)
                if last is not None and ready[last] > self.now:
                    wait, self.now = ready[last] - self.now, ready[last]
                    if last in label:
                        self.exposed += wait * times
                    else:
                        self.waited += wait * times
                    self.lines[label.get(last, "waiting for a copy between memories")] += wait * times
                continue
            if handed and opcode == "fusion":  # a collective goes on inside this fusion's work
                begun[one.name] = handed[-1]
            seconds, moved = self._core_seconds(name, one, times)
            self.now += seconds
            if copies_free > before:  # both draw on HBM
                copies_free += min(moved / self.chip.hbm_rate, seconds)
            if seconds:
                self.lines[self.program.source(one)] += seconds * times

    def _loop(self, one: hlo.Instruction, times: int) -> None:
        trips, start = self.program.trips(one), self.now
        self._computation(one.attribute("body") or "", times * trips)
        self.now = start + (self.now - start) * trips

    def _branches(self, one: hlo.Instruction, times: int) -> None:
        """The longest of a conditional's branches, or the one computation of a call."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        keys = ("to_apply", "true_computation", "false_computation")
        names += [name for key in keys if (name := one.attribute(key))]
        start, longest = self.now, self.now
        for name in names:
            self.now = start
            self._computation(name, times)
            longest = max(longest, self.now)
        self.now = longest

    def _wire_seconds(self, each: hlo.Collective) -> tuple[frozenset[int], float]:
        if each.between_slices:
            count = len({place[0] for place in self.wiring.coordinates})
            dimensions, rate, hops = frozenset({-1}), self.chip.dcn_rate, 100
        else:
            count = max(len(each.group), 1)
            dimensions, rate, hops = self.wiring.way(each.group or (0,))
        share = (count - 1) / count
        passes = {"all-gather": share, "reduce-scatter": share, "all-reduce": 2 * share, "all-to-all": share / 4}
        return dimensions, each.moved * passes.get(each.kind, 1.0) / rate + hops * HOP_SECONDS

    def _core_seconds(self, computation: str, one: hlo.Instruction, times: int) -> tuple[float, float]:
        """How long the core works on an instruction, and the bytes it moves through HBM."""
        moved = self.program.traffic(computation, one)
        flops = self._padded_flops(computation, one)
        if one.opcode == "custom-call" and (kernel := self.kernel_of(one)):
            self.kernel_flops += kernel.flops * times
            return kernel.seconds(self.chip, moved, self.reading), moved
        roofline = max(flops / self.chip.peak, moved / self.chip.hbm_rate)
        expected = one.cycles / self.chip.clock
        if self.reading == "roofline":
            return roofline, moved
        if self.reading == "middle" and not flops:
            vector = self._operations(one) / (self.chip.lanes * self.chip.clock)
            return (max(roofline, min(expected, vector)) if expected else roofline), moved
        return max(roofline, expected), moved

    def _padded_flops(self, computation: str, one: hlo.Instruction) -> float:
        if one.opcode == "fusion":
            called = one.attribute("calls") or ""
            inside = self.program.computations[called].values()
            return sum(self._padded_flops(called, each) for each in inside if each.opcode in ("dot", "convolution"))
        if one.opcode not in ("dot", "convolution"):
            return 0.0
        return self.program.flops(computation, one) * self._padding(computation, one)

    def _padding(self, computation: str, one: hlo.Instruction) -> float:
        """By how much the matrix unit's tiles are more than the product's own sizes."""
        inside, side = self.program.computations[computation], self.chip.tile
        left, right = (hlo.arrays(inside[name].shape)[0][1] for name in one.operands[:2])
        contracted, rows, columns = hlo.product_sizes(one.opcode, one.rest, left, right)

        def grown(n: int) -> float:
            return -(-n // side) * side / max(n, 1)

        return grown(contracted) * min(grown(rows), grown(columns))

    def _operations(self, one: hlo.Instruction) -> float:
        total = 0.0
        for each in self.program.inside(one):
            if each.opcode not in _NO_OPERATION:
                shape = one.shape if each is one else each.shape
                elements = max((math.prod(hlo.tiled(s, layout)) for _, s, layout in hlo.arrays(shape)), default=0)
                if each.opcode in ("reduce", "reduce-window"):
                    body = self.program.computations.get(one.attribute("calls") or "", {})
                    operands = [body[name].shape for name in each.operands if name in body]
                    elements = max([elements, *(math.prod(s) for shape in operands for _, s, _ in hlo.arrays(shape))])
                total += elements * _OPERATIONS.get(each.opcode, 1)
        return total


def _is_token(shape: str) -> bool:
    """Whether a value is only the sign that something asynchronous goes on."""
    return "S(2)" in shape or "S(4)" in shape


def _copied(one: hlo.Instruction) -> float:
    """Bytes of an asynchronous copy or slice: its result, the first of its two arrays or the second."""
    parts = hlo.arrays(one.shape)
    return min((hlo.nbytes(part) for part in parts if math.prod(part[1]) > 1), default=0.0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The work of one run of a Pallas kernel, whose text shows nothing but what its author told the compiler."""

    flops: float
    exponentials: float
    width: int  # the narrow side of its products, as its name ends: "_h96"

    @classmethod
    def of(cls, one: hlo.Instruction) -> "Kernel | None":
        told = re.search(r'"cost_estimate":\{([^}]*)\}', one.rest)
        if not told:
            return cls._splash(one) if one.name.startswith("splash_mqa") else None
        figures = {name: float(n) for name, n in re.findall(r'"(\w+)":"?(\d+)', told[1])}
        width = re.search(r"_h(\d+)", one.name)
        return cls(figures.get("flops", 0), figures.get("transcendentals", 0), int(width[1]) if width else 0)

    @classmethod
    def _splash(cls, one: hlo.Instruction) -> "Kernel":
        """JAX's causal kernel, whose author told nothing: of its queries and keys, the blocks up to the diagonal."""
        operands = one.rest.partition("operand_layout_constraints={")[2].partition("}}")[0]
        *heads, length, dim = next(shape for _, shape, _ in hlo.arrays(operands) if len(shape) >= 4)
        block = int(found[1]) if (found := re.search(r"block_q(?:_dkv)?\W+(\d+)", one.rest)) else 0
        pairs = math.prod(heads) * length * (length + block) / 2
        return cls(2 * pairs * dim * (5 if "dkv" in one.name else 2), pairs, dim)

    def seconds(self, chip: Chip, moved: float, reading: str) -> float:
        """Matrix work in whole tiles and bytes; but for the roofline, then the vector work on each logit, one after
        the other; and twice that for the pessimist, since nobody has timed it."""
        padding = -(-self.width // chip.tile) * chip.tile / self.width if self.width else 1.0
        matrix, stream = self.flops * padding / chip.peak, moved / chip.hbm_rate
        if reading == "roofline":
            return max(matrix, stream)
        vector = self.exponentials * KERNEL_OPERATIONS / (chip.lanes * chip.clock)
        return max(matrix + vector, stream) * (2 if reading == "cycles" else 1)

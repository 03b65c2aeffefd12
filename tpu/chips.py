"""What one chip of each TPU generation can do, and how the chips of a slice are wired.

Nominal figures of the makers' public pages and of "How to Scale Your Model"; none was measured here. A *device* is
what JAX calls one: on v4 and v5p both cores of a chip, on tpu7x one of the two.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pe_jax import metrics

HOP_SECONDS = 1e-6  # from chip to chip, before the first byte arrives


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU slice. Rates are per second."""

    name: str  # as topologies are named: "v5e"
    kind: str  # as JAX names the device, the key of `metrics.PEAK_FLOPS`
    hbm: float  # bytes that a program may take, as the compiler says
    hbm_rate: float  # bytes
    clock: float  # Hz
    lanes: float  # additions of 32 bits in one cycle, all vector units together
    tile: int  # side of the matrix unit
    link_rate: float  # bytes over one link in one direction
    dcn_rate: float  # bytes that leave one chip for another slice
    dimensions: int  # of the torus
    wraps_at: int  # a side of this many chips, or in three dimensions a multiple of it, closes to a ring

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return metrics.PEAK_FLOPS[self.kind]


_VPU = 8 * 128 * 4  # lanes of one core, four slots wide
CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v4", "TPU v4", 30.75 * 2**30, 1.228e12, 1.05e9, 2 * _VPU, 128, 45e9, 3.1e9, 3, 4),
        Chip("v5e", "TPU v5 lite", 15.75 * 2**30, 0.819e12, 1.5e9, _VPU, 128, 45e9, 3.1e9, 2, 16),
        Chip("v5p", "TPU v5", 95.74 * 2**30, 2.765e12, 1.75e9, 2 * _VPU, 128, 90e9, 6.25e9, 3, 4),
        Chip("v6e", "TPU v6 lite", 31.25 * 2**30, 1.640e12, 1.75e9, _VPU, 256, 90e9, 12.5e9, 2, 16),
        Chip("tpu7x", "TPU7x", 94.75 * 2**30, 3.690e12, 2.2e9, _VPU, 256, 90e9, 12.5e9, 3, 4),
    )
}


def of(devices: Sequence[Any]) -> Chip:
    """The chip that `devices` are.

    Raises:
      ValueError: for a kind that is not in `CHIPS`.
    """
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"nothing is known of {kind!r}; tpu/chips.py knows {', '.join(CHIPS)}: add a line there.")
    return CHIPS[kind]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Where the devices of a program sit, in the order in which the program counts them."""

    chip: Chip
    coordinates: tuple[tuple[int, ...], ...]  # slice, then the place in it
    sides: tuple[int, ...]  # of one slice, in chips

    @classmethod
    def of(cls, devices: Sequence[Any]) -> "Wiring":
        """`devices` in the order of the mesh, flattened."""
        places = tuple((getattr(d, "slice_index", 0) or 0, *d.coords) for d in devices)
        return cls(of(devices), places, tuple(max(p[i] for p in places) + 1 for i in range(1, len(places[0]))))

    def wraps(self, dimension: int) -> bool:
        """Whether the links along a dimension of the torus close to a ring."""
        if self.chip.dimensions == 2:
            return self.sides[dimension] == self.chip.wraps_at
        return all(side % self.chip.wraps_at == 0 for side in self.sides)

    def way(self, group: Sequence[int]) -> tuple[frozenset[int], float, int]:
        """How a collective among these devices travels.

        Returns:
          The dimensions it uses (-1 is the network between slices); bytes per second that one device takes in; and
          how many hops its farthest two are apart.
        """
        places = [self.coordinates[i] for i in group]
        if len({p[0] for p in places}) > 1:
            return frozenset({-1}), self.chip.dcn_rate, 100
        used = [i for i in range(len(self.sides)) if len({p[i + 1] for p in places}) > 1]
        ways = sum(2 if self.wraps(i) else 1 for i in used)
        hops = sum(self.sides[i] // (2 if self.wraps(i) else 1) for i in used)
        return frozenset(used), max(ways, 1) * self.chip.link_rate, max(hops, 1)

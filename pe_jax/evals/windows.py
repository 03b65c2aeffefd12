"""How an image of any size becomes squares that a tower takes, and how maps of the squares become one of the image.

  squash  the whole image is one square, whatever its proportions
  slide   the image is brought to the square's side at its shorter one, and squares lie along the longer one, two thirds
          of a side apart; where they overlap, their maps are averaged

Enlarging, averaging and bringing back to the image's size are linear and go along rows and columns separately: a map of
the image is the sum over squares of A · map · Bᵀ with two small matrices a square. So images of all sizes are scored by
one compiled function, which is given the matrices, and nothing but the last sum has as many numbers as the image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, UInt8

from pe_jax.data.image import Preprocess

WINDOWS = ("squash", "slide")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image


@dataclasses.dataclass(frozen=True)
class Windows:
    """Squares of `side` pixels; `kind` is one of `WINDOWS`."""

    side: int
    kind: str = "squash"

    def __post_init__(self) -> None:
        if self.kind not in WINDOWS:
            raise ValueError(f"window={self.kind!r} is unknown; choose {' or '.join(WINDOWS)}.")

    def count(self, size: tuple[int, int]) -> int:
        """How many squares an image of (height, width) has."""
        height, width = (len(starts) for _, starts in self._along(size))
        return height * width

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """Where they lie, row by row."""
        (long_y, tops), (long_x, lefts) = self._along(size)
        y, x = size[0] / long_y, size[1] / long_x
        side = self.side
        return [(left * x, top * y, (left + side) * x, (top + side) * y) for top in tops for left in lefts]

    def pixels(self, image: PIL.Image.Image, preprocess: Preprocess, count: int) -> UInt8[np.ndarray, "S H W 3"]:
        """The squares of an image, followed by black ones up to `count`."""
        out = np.zeros((count, self.side, self.side, 3), np.uint8)
        if self.kind == "squash":
            out[0] = preprocess.pixels(image)
            return out
        filter = PIL.Image.Resampling[preprocess.filter.upper()]
        image = image.convert("RGB") if preprocess.rgb_first else image
        for row, (left, top, right, bottom) in enumerate(self.boxes((image.height, image.width))):
            box = left, top, min(right, image.width), min(bottom, image.height)  # a rounding must not leave the image
            out[row] = np.array(image.resize((self.side, self.side), filter, box).convert("RGB"))
        return out

    def matrices(
        self, size: tuple[int, int], grid: int, count: int, padded: tuple[int, int]
    ) -> tuple[Float32[np.ndarray, "S H g"], Float32[np.ndarray, "S W g"]]:
        """A and B of each square, for maps of `grid` x `grid`; rows beyond the image, and squares, are zero.

        Args:
          size: (height, width) of the image.
          grid: rows, and columns, of a square's map.
          count: of squares, filled up.
          padded: (height, width) of the result, at least those of the image.
        """
        down, across = (
            [
                enlarging(long, own)[:, start : start + self.side]
                / self._shared(long, starts)[start:][: self.side]
                @ enlarging(grid, self.side)
                for start in starts
            ]
            for own, (long, starts) in zip(size, self._along(size), strict=True)
        )
        a = np.zeros((count, padded[0], grid), np.float32)
        b = np.zeros((count, padded[1], grid), np.float32)
        for row, (y, x) in enumerate((y, x) for y in down for x in across):
            a[row, : size[0]], b[row, : size[1]] = y, x
        return a, b

    def _along(self, size: tuple[int, int]) -> list[tuple[int, list[int]]]:
        """Of height and width: the length that the image is brought to, and where squares start."""
        if self.kind == "squash":
            return [(self.side, [0])] * 2
        step, found = max(1, round(self.side * 2 / 3)), []
        for own in size:
            long = max(self.side, round(own * self.side / min(size)))
            number = 1 + -(-(long - self.side) // step)
            found.append((long, [min(i * step, long - self.side) for i in range(number)]))
        return found

    def _shared(self, long: int, starts: list[int]) -> np.ndarray:
        """How many squares cover each place along one side."""
        shared = np.zeros(long)
        for start in starts:
            shared[start : start + self.side] += 1
        return shared


def enlarging(old: int, new: int) -> Float32[np.ndarray, "new old"]:
    """The matrix of bilinear resizing along one side, as PyTorch's `interpolate` without corners aligned."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(places.astype(int), max(old - 2, 0))
    out, share = np.zeros((new, old), np.float64), places - low
    out[np.arange(new), low] += 1 - share
    if old > 1:
        out[np.arange(new), low + 1] += share
    return out.astype(np.float32)


def assembled(
    a: Float[Array | np.ndarray, "S H g"],
    maps: Float[Array | np.ndarray, "S g g C"],
    b: Float[Array | np.ndarray, "S W g"],
) -> Float[Array, "H W C"]:
    """Σ A · map · Bᵀ over squares."""
    wide = jnp.einsum("swx,syxc->sywc", b, maps, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("shy,sywc->hwc", a, wide, precision=jax.lax.Precision.HIGHEST)

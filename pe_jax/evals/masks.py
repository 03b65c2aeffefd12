"""Every mask of an image: SAM 2.1 asked at the points of a grid, the good answers kept once (arXiv 2304.02643, app. B).

Thresholds and their order are those of the released generator of automatic masks, without its further crops.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from pe_jax.evals import plots
from pe_jax.models.sam2 import Sam2, grid_points


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask found in an image.

    Attributes:
      inside: [H, W] pixels of the image.
      box: x and y of the left, top, right and bottom pixel.
      iou: how well the model thinks that it fits, in [0, 1].
      stability: the share of it that stays when the threshold of its logits rises from -1 to 1.
      point: x and y of the point that was asked, in pixels of the image.
    """

    inside: Bool[np.ndarray, "H W"]
    box: tuple[int, int, int, int]
    iou: float
    stability: float
    point: tuple[float, float]

    @property
    def area(self) -> int:
        """In pixels."""
        return int(self.inside.sum())

    def runs(self) -> dict[str, Any]:
        """COCO's uncompressed run lengths, down the columns, outside first."""
        flat = self.inside.T.ravel()
        turns = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff(np.array([0, *turns, flat.size])).tolist()
        return {"size": list(self.inside.shape), "counts": [0, *counts] if flat[0] else counts}


def find(
    model: Sam2,
    pixels: UInt8[np.ndarray, "H W 3"],
    *,
    points_per_side: int = 32,
    chunk: int = 64,
    min_iou: float = 0.8,
    min_stability: float = 0.95,
    max_overlap: float = 0.7,
) -> list[Mask]:
    """The masks of an image, best first.

    Args:
      model: a SAM 2.1.
      pixels: [H, W, 3] RGB.
      points_per_side: of the grid that is asked; each point gives three masks.
      chunk: points decoded at a time; divides their number.
      min_iou: masks must be thought better than this.
      min_stability: and this stable.
      max_overlap: of two masks whose boxes' intersection over union is above it, the better one stays.

    Raises:
      ValueError: if `chunk` does not divide the points.
    """
    if points_per_side**2 % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {points_per_side**2} points; choose one that does.")
    height, width, _ = pixels.shape
    prepared = model.prepare(pixels[None])
    embedding, side = model.embed(prepared), model.config.image_size
    down, across = (_weights(side // 4, length) for length in (height, width))
    found: list[Mask] = []
    points = grid_points(points_per_side, side, side)
    for asked in points.reshape(-1, chunk, 2):
        answers = model.decode(embedding, jnp.asarray(asked)[None, :, None])
        ious = np.asarray(answers.ious[0])
        for index in np.argwhere(ious > min_iou):
            logits = down @ np.asarray(answers.masks[(0, *index)]) @ across.T
            stability = (logits > 1).sum() / max(1, (logits > -1).sum())
            if stability >= min_stability:
                inside, (x, y) = logits > 0, asked[index[0]] / side
                point = float(x * width), float(y * height)
                found.append(Mask(inside, _box(inside), float(ious[tuple(index)]), float(stability), point))
    boxes = np.array([mask.box for mask in found], int).reshape(-1, 4)
    kept = distinct(boxes, np.array([mask.iou for mask in found], float), max_overlap)
    return [found[i] for i in kept]


def distinct(boxes: Int[np.ndarray, "N 4"], scores: Float[np.ndarray, "N"], max_overlap: float) -> list[int]:
    """Which boxes stay when those that overlap a better one too much are dropped, best first."""
    left, kept = np.argsort(-scores, kind="stable"), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while left.size:
        best, left = left[0], left[1:]
        kept.append(int(best))
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.maximum(high - low, 0).prod(1)
        left = left[shared <= max_overlap * (area[best] + area[left] - shared)]
    return kept


def _box(inside: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """Of the pixels inside; zeros if there are none."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])) if rows.size else (0, 0, 0, 0)


def _weights(before: int, after: int) -> Float[np.ndarray, "A B"]:
    """[after, before] weights of bilinear resizing without antialiasing, centres aligned."""
    at = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    return np.maximum(1 - abs(at[:, None] - np.arange(before)), 0).astype(np.float32)


def painted(
    pixels: UInt8[np.ndarray, "H W 3"], masks: Sequence[Mask], opacity: float = 0.5
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with its masks in colours of their own, the small ones on top, each with a light edge."""
    out = pixels.astype(np.float32)
    for number, mask in enumerate(sorted(masks, key=lambda mask: -mask.area)):
        color = 255 * np.array(_hue(number), np.float32)
        out[mask.inside] = (1 - opacity) * pixels[mask.inside] + opacity * color
        out[_edge(mask.inside)] = 0.35 * color + 0.65 * 255
    return out.round().astype(np.uint8)


def _hue(number: int) -> tuple[float, float, float]:
    """Colours that stay apart however many there are: hues by the golden section, two brightnesses."""
    hue, value = (number * 0.618034) % 1, (1.0, 0.78)[number % 2]
    channels = (abs((6 * hue + shift) % 6 - 3) - 1 for shift in (0, 4, 2))
    red, green, blue = (value * (0.25 + 0.75 * min(max(c, 0), 1)) for c in channels)
    return red, green, blue


def _edge(inside: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels inside with a neighbour outside."""
    padded = np.pad(inside, 1, mode="edge")
    return inside & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def figure(pixels: UInt8[np.ndarray, "H W 3"], masks: Sequence[Mask], title: str | None = None) -> Any:
    """The image and, beside it, its masks."""
    height, width, _ = pixels.shape
    across = 3.4
    with plots.style() as Figure:
        drawn = Figure(figsize=(2 * across + 0.3, across * height / width + 0.45), layout="constrained")
        told = f"{len(masks)} masks" if len(masks) != 1 else "1 mask"
        for place, (shown, name) in enumerate(((pixels, title or "image"), (painted(pixels, masks), told)), 1):
            axis = drawn.add_subplot(1, 2, place)
            axis.imshow(shown, interpolation="lanczos")
            axis.set_title(name)
            axis.set_axis_off()
    return drawn

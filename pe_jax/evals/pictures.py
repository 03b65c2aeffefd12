"""Pictures of what lies inside a tower: tokens by their principal components, who is attended to, what is like a point.

`strip` computes, for some images and layers, the maps of one kind; `figure` draws them. The functions in between take
and give plain arrays. Maps are [B, Y, X] or [B, Y, X, 3], a number or a colour for each patch, row-major from the top
left, of any height and width that are multiples of the patch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.ImageOps
from jaxtyping import Float, Shaped

from pe_jax.data.image import Preprocess, decode
from pe_jax.evals import inference, plots
from pe_jax.models.layers import resolve_layers

KINDS = {
    "pca": "tokens by their principal components",
    "attention": "attention received, mean over heads and tokens",
    "similarity": "cosine similarity to the marked token",
}
PROJECTIONS = ("layer", "joint")
_VIEW = 448  # pixels of the longer side of an image in a figure
# sRGB from XYZ at the D65 white point (IEC 61966-2-1), and that white point.
_RGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
_WHITE = np.array([0.9505, 1.0, 1.089])


# ---- tokens to maps ------------------------------------------------------------------------------------------------


def pca_colors(tokens: Float[np.ndarray, "..."]) -> Float[np.ndarray, "B H W 3"]:
    """Colours of tokens, in [0, 1]: similar features get similar colours, across all the images given.

    Each grid is mixed half and half with its 3x3 Gaussian blur, then projected to the three directions of most
    variance over all tokens: the first is lightness, the other two span chroma and hue.

    Raises:
      ValueError: for tokens that are not [B, H, W, D] with D of at least 3.

    Source: PE, appendix B.3.2.
    """
    if tokens.ndim != 4 or tokens.shape[-1] < 3:
        raise ValueError(f"tokens have shape {tokens.shape}; want [B, H, W, D] with D of at least 3.")
    smooth = 0.5 * tokens + 0.5 * _blur(tokens.astype(np.float64))
    flat = smooth.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat.T @ flat)
    parts = flat @ directions[:3].T
    parts *= np.where(np.abs(parts.min(0)) > parts.max(0), -1, 1)  # a direction's sign is arbitrary: longer tail up
    low, high = np.percentile(parts, [1, 99], axis=0)
    unit = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(*tokens.shape[:-1], 3)
    return _from_lab(20 + 70 * unit[..., 0], 110 * (unit[..., 1] - 0.5), 110 * (unit[..., 2] - 0.5))


def pca_strip(
    tokens: Mapping[int, Float[np.ndarray, "B Y X D"]], projection: str = "layer"
) -> dict[int, Float[np.ndarray, "B Y X 3"]]:
    """`pca_colors` of each layer.

    Args:
      tokens: by layer.
      projection: "layer" finds each layer's own principal components, so its picture shows all that varies in it, and
        colours of different layers have nothing to do with each other. "joint" finds those of all layers together,
        each first brought to mean 0 and variance 1: a colour then means the same direction in every layer.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is unknown; choose one of {', '.join(PROJECTIONS)}.")
    if projection == "layer":
        return {layer: pca_colors(own) for layer, own in tokens.items()}
    scaled = [own - own.mean((0, 1, 2)) for own in map(np.float64, tokens.values())]
    scaled = [own / max(float(np.sqrt(np.square(own).mean())), 1e-12) for own in scaled]
    return dict(zip(tokens, np.split(pca_colors(np.concatenate(scaled)), len(scaled)), strict=True))


def similarity(tokens: Float[np.ndarray, "B Y X D"], at: Sequence[tuple[int, int]]) -> Float[np.ndarray, "B Y X"]:
    """Cosine of every token of an image to the one at (row, column), in [-1, 1]; one place an image."""
    unit = tokens / np.maximum(np.linalg.norm(tokens.astype(np.float64), axis=-1, keepdims=True), 1e-12)
    marked = np.stack([unit[image, row, column] for image, (row, column) in enumerate(at)])
    return np.einsum("byxd,bd->byx", unit, marked)


def token_at(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the token under a point (x, y), fractions from the left and from the top of what is seen.

    Raises:
      ValueError: if it is not in [0, 1].
    """
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"the point ({x:g}, {y:g}) lies outside the image; want fractions from 0 to 1.")
    rows, columns = grid
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


# ---- images to what the tower sees ---------------------------------------------------------------------------------


def image_size(image: Any, preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) in pixels of an image, turned as the transform turns it."""
    return _decoded(image, preprocess).size


def view(image: Any, preprocess: Preprocess, longest: int = _VIEW) -> Shaped[np.ndarray, "H W 3"]:
    """The part of an image that the tower sees, uint8, in the proportions of the image itself.

    A tower that squashes images to squares sees all of it; the picture is for people, who want it as it was.
    """
    width, height = image_size(image, preprocess) if preprocess.mode == "squash" else preprocess.shape[::-1]
    scale = longest / max(width, height)
    if preprocess.mode == "squash":
        scale = min(scale, 1)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return dataclasses.replace(preprocess, size=size).pixels(image)


def seen_at(point: tuple[float, float], size: tuple[int, int], preprocess: Preprocess) -> tuple[float, float]:
    """Where a point of an image lies in what the tower sees of it; both (x, y) in fractions of width and height.

    Args:
      point: in fractions of the image.
      size: (width, height) of the image in pixels.
      preprocess: its transform; a centre crop loses the borders.

    Raises:
      ValueError: for a point outside the image, or cut off.
    """
    token_at(point, (1, 1))
    if preprocess.mode == "squash":
        return point
    sides = preprocess.shape[::-1]
    scale = max(own / side for own, side in zip(sides, size, strict=True))
    x, y = ((fraction - 0.5) * side * scale / own + 0.5 for fraction, side, own in zip(point, size, sides, strict=True))
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(
            f"the point at {point[0]:.0%} of the width and {point[1]:.0%} of the height is cut off by the centre crop; "
            "choose one nearer to the centre."
        )
    return x, y


# ---- strips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Strip:
    """Maps of some images at some layers.

    Attributes:
      kind: one of `KINDS`.
      views: of each image the part that the tower sees, uint8 RGB in the image's own proportions.
      maps: {layer: [B, Y, X, 3] colours in [0, 1]} for "pca"; {layer: [B, Y, X]} else: for "attention" multiples of
        what a token would get if all got the same; for "similarity" cosines.
      points: (x, y) of the marked point of each image, in fractions of its view; None where nothing is marked.
    """

    kind: str
    views: list[Shaped[np.ndarray, "..."]]
    maps: dict[int, Float[np.ndarray, "..."]]
    points: list[tuple[float, float]] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return next(iter(self.maps.values())).shape[1:3]


def strip(
    model: inference.Model,
    images: Sequence[Any],
    layers: Sequence[int] | None = None,
    kind: str = "pca",
    *,
    size: int | tuple[int, int] | None = None,
    projection: str = "layer",
    points: Sequence[tuple[float, float]] | None = None,
    batch_size: int = 8,
) -> Strip:
    """Runs the tower over the images once and makes the maps of one kind.

    Args:
      model: on one device or any mesh.
      images: paths, encoded bytes, PIL images or uint8 arrays.
      layers: as `VisionTower.features` takes them; None takes a few from the first to the last.
      kind: "pca"; "attention", what each token receives, mean over heads and over the tokens that attend, or, with
        `points`, what the marked token gives to each; "similarity" of the tokens to the one at `points`.
      size: pixels of a side, or (height, width), that the images are brought to; the model's own by default.
      projection: see `pca_strip`.
      points: (x, y) fractions of the image's width and height, one for each image or one for all.
      batch_size: images in a forward pass.

    Raises:
      ValueError: for an unknown kind, layer or projection; a size that is no multiple of the patch; a point that is
        missing or outside; an image that cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is unknown; choose one of {', '.join(PROJECTIONS)}.")
    config = inference.vision_tower(model).config
    preprocess = inference.preprocess_of(model)
    if size is not None:
        preprocess = dataclasses.replace(preprocess, size=size)
    grid = _grid(preprocess, config.patch_size)
    layers = some_layers(config.depth) if layers is None else tuple(layers)
    resolved = resolve_layers(layers, config.depth)
    if kind == "attention" and 0 in resolved:
        raise ValueError(f"layer 0 is the patch embedding, where nothing attends; ask for blocks 1 to {config.depth}.")
    if kind == "similarity" and points is None:
        raise ValueError("similarity needs a point to compare with; give points=[(x, y)] in fractions of the image.")
    if kind == "pca" and points is not None:
        raise ValueError("a point has no use for kind 'pca'; leave it out, or choose attention or similarity.")
    at = None
    if points is not None:
        if len(points) not in (1, len(images)):
            raise ValueError(f"there are {len(points)} points for {len(images)} images; give one for all, or one each.")
        every = list(points) * (len(images) if len(points) == 1 else 1)
        points = [
            seen_at(point, image_size(image, preprocess), preprocess)
            for point, image in zip(every, images, strict=True)
        ]
        at = [token_at(point, grid) for point in points]
    own = tuple(dict.fromkeys(resolved))
    if kind == "attention":
        whole = at is not None  # a table of N x N a layer is a lot to bring to the host, so for one image at a time
        forward = _attention_forward(preprocess, own, config.class_token, whole)
        found = _run(model, forward, images, preprocess, 1 if whole else batch_size)
        if at is not None:
            found = np.stack([found[:, i, row * grid[1] + column] for i, (row, column) in enumerate(at)], 1)
        maps: Any = dict(zip(own, found.reshape(*found.shape[:2], *grid), strict=True))
    else:
        found = _run(model, _tokens_forward(preprocess, own), images, preprocess, batch_size)
        tokens = dict(zip(own, found.reshape(*found.shape[:2], *grid, -1), strict=True))
        if at is None:
            maps = pca_strip(tokens, projection)
        else:
            maps = {layer: similarity(values, at) for layer, values in tokens.items()}
    views = [view(image, preprocess) for image in images]
    return Strip(kind, views, maps, None if points is None else list(points))


def some_layers(depth: int, count: int = 6) -> tuple[int, ...]:
    """At most `count` layers from 1 to `depth`, evenly spaced."""
    return tuple(sorted({round(1 + i * (depth - 1) / max(count - 1, 1)) for i in range(count)}))


def _grid(preprocess: Preprocess, patch: int) -> tuple[int, int]:
    height, width = preprocess.shape
    if height % patch or width % patch:
        near = "x".join(str(max(patch, round(side / patch) * patch)) for side in (height, width))
        raise ValueError(
            f"the size {height}x{width} is not a multiple of the patch, {patch} pixels; the nearest that is: {near}."
        )
    return height // patch, width // patch


def _run(
    model: inference.Model,
    forward: Callable[[inference.Model, jax.Array], jax.Array],
    images: Sequence[Any],
    preprocess: Preprocess,
    batch_size: int,
) -> np.ndarray:
    """What `forward` gives of all images, [Y, B, ...]."""
    parts = inference.batches(model, forward, images, preprocess.pixels, min(batch_size, max(len(images), 1)))
    return np.concatenate([np.asarray(out)[:, :count] for out, count in parts], 1)


@functools.cache
def _tokens_forward(preprocess: Preprocess, layers: tuple[int, ...]) -> Callable[[inference.Model, jax.Array], Any]:
    """From pixels to the patch tokens of the layers, [Y, B, P, D]."""

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        images = inference.normalized(pixels, preprocess)
        found = inference.vision_tower(model).features(images, layers, class_token=False)
        return jnp.stack([found[layer] for layer in layers]).astype(jnp.float32)

    return forward


@functools.cache
def _attention_forward(
    preprocess: Preprocess, layers: tuple[int, ...], class_token: bool, whole: bool
) -> Callable[[inference.Model, jax.Array], Any]:
    """From pixels to attention in multiples of an even share, mean over heads.

    [Y, B, P] what each patch token receives from all tokens; where `whole`, [Y, B, P, P] what each gives to each.
    """
    first = int(class_token)

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        def reduce(weights: jax.Array) -> jax.Array:
            shares = weights * weights.shape[-1]
            return shares[:, first:, first:] if whole else shares.mean(1)[:, first:]

        images = inference.normalized(pixels, preprocess)
        found = inference.vision_tower(model).attention(images, layers, reduce)
        return jnp.stack([found[layer].mean(0) for layer in layers])

    return forward


def _decoded(image: Any, preprocess: Preprocess) -> Any:
    opened = decode(image)
    return PIL.ImageOps.exif_transpose(opened) if preprocess.exif else opened


# ---- figures -------------------------------------------------------------------------------------------------------

_CELL, _GAP, _TITLE, _MARGIN = 1.3, 0.07, 0.19, 0.1  # inches
_PER_LINE = 9  # layers side by side; more go on below


def figure(strip: Strip, title: str | None = None) -> Any:
    """A matplotlib Figure: an image at the left of each row, the layers in columns; more than 9 go on below.

    Raises:
      ModuleNotFoundError: without matplotlib (extra `viz`).
    """
    layers = list(strip.maps)
    per_line = min(len(layers), _PER_LINE)
    lines = math.ceil(len(layers) / per_line)
    heights = [_CELL * min(max(shape[0] / shape[1], 0.35), 2.2) for shape in (own.shape for own in strip.views)]
    numbers = strip.kind != "pca"
    note = 0.17 if strip.kind == "attention" else 0.0
    top = _MARGIN + 0.24 if title else 0.04
    bottom = _MARGIN + (0.5 if numbers else 0)
    titled = len(heights) * lines if lines > 1 else 1
    width = 2 * _MARGIN + (per_line + 1) * (_CELL + _GAP) - _GAP + 0.06
    height = top + bottom + sum(lines * (own + note + _GAP) for own in heights) - _GAP + titled * _TITLE
    with plots.style() as new:
        page = new(figsize=(width, height))

        def cell(column: int, y: float, own: float) -> Any:
            x = _MARGIN + column * (_CELL + _GAP) + (0.06 if column else 0)
            axes = page.add_axes((x / width, 1 - (y + own) / height, _CELL / width, own / height))
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            return axes

        if title:
            page.text(_MARGIN / width, 1 - _MARGIN / height, title, va="top", fontsize=10.5, fontweight="bold")
        scale = _scale(strip)
        y, drawn = top, None
        for row, own in enumerate(heights):
            for line in range(lines):
                headed = lines > 1 or row == 0
                y += _TITLE * headed
                for column in range(per_line + 1):
                    place = line * per_line + column - 1
                    if place >= len(layers) or (column == 0 and line):
                        continue
                    axes = cell(column, y, own)
                    if column == 0:
                        axes.imshow(strip.views[row], extent=(0, 1, 1, 0), aspect="auto", interpolation="antialiased")
                        heading = "image"
                    else:
                        shown = strip.maps[layers[place]][row]
                        drawn = axes.imshow(shown, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest", **scale)
                        heading = f"layer {layers[place]}"
                        if note:
                            axes.set_xlabel(
                                f"peak {_times(float(shown.max()))}", fontsize=7.5, color=plots.GREY, labelpad=2
                            )
                    if headed:
                        axes.set_title(heading, fontsize=9, loc="center", pad=3)
                    if strip.points is not None:
                        _mark(axes, strip.points[row])
                y += own + note + _GAP
        if numbers and drawn is not None:
            _bar(page, drawn, strip, width, height)
    return page


def _scale(strip: Strip) -> dict[str, Any]:
    """Colour map and range, one for all cells, so that layers can be compared."""
    if strip.kind == "pca":
        return {}
    values = np.concatenate([own.ravel() for own in strip.maps.values()])
    if strip.kind == "similarity":
        return {"cmap": "viridis", "vmin": min(0.0, float(np.percentile(values, 1))), "vmax": 1}
    from matplotlib.colors import LogNorm

    high = max(4.0, float(values.max()))
    return {"cmap": "magma", "norm": LogNorm(max(float(np.percentile(values, 1)), high / 1e3, 1e-6), high, clip=True)}


def _mark(axes: Any, point: tuple[float, float]) -> None:
    """A ring that is seen on light and on dark."""
    for color, line in (("black", 2.6), ("white", 1.3)):
        axes.plot(*point, marker="o", markersize=6.5, markeredgewidth=line, markeredgecolor=color, color="none")
    axes.set(xlim=(0, 1), ylim=(1, 0))


def _bar(page: Any, drawn: Any, strip: Strip, width: float, height: float) -> None:
    """The colour bar, under the maps, with what its numbers mean."""
    length = min(2.6, width - 2 * _MARGIN - 0.4)
    axes = page.add_axes(((width - _MARGIN - 0.2 - length) / width, 0.42 / height, length / width, 0.08 / height))
    bar = page.colorbar(drawn, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(length=2, pad=2, labelsize=7.5)
    if strip.kind == "attention":
        low, high = drawn.norm.vmin, drawn.norm.vmax
        ticks = [tick for tick in (0.001, 0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if low <= tick <= high]
        bar.set_ticks(ticks, labels=[_times(tick) for tick in ticks])
        axes.minorticks_off()
        text = "attention received" if strip.points is None else "attention from the marked token"
        axes.set_xlabel(f"{text} (1x = an even share)", fontsize=8, labelpad=2)
    else:
        axes.set_xlabel(KINDS[strip.kind], fontsize=8, labelpad=2)


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


# ---- colours -------------------------------------------------------------------------------------------------------


def _blur(x: np.ndarray) -> np.ndarray:
    """3x3 Gaussian of standard deviation 1 over axes 1 and 2; the border repeats."""
    side = np.exp(-0.5)
    weights = np.array([side, 1.0, side]) / (1 + 2 * side)
    for axis in (1, 2):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)]
        wide = np.pad(x, pad, mode="edge")
        count = x.shape[axis]
        x = np.sum([w * np.take(wide, range(i, i + count), axis) for i, w in enumerate(weights)], axis=0)
    return x


def _from_lab(lightness: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (L in 0..100) → sRGB in [0, 1], out-of-gamut colours clipped."""
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ _RGB.T, 0, 1)
    return np.clip(np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear), 0, 1)

"""What dense probes found, for people: curves over the layers, and the maps themselves."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from pe_jax.data.image import decode
from pe_jax.evals import davis, plots, tracking
from pe_jax.evals.dense_heads import IGNORED

# Of objects and classes, in order of their numbers; light and dark enough to be told apart on photographs.
_COLORS = (
    "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#f0e442", "#0072b2", "#b2182b", "#7fc97f", "#a6761d",
    "#66a61e", "#7570b3", "#1b9e77", "#e7298a", "#80b1d3", "#bc80bd", "#ccebc5", "#fb8072", "#8dd3c7", "#fdb462",
)  # fmt: skip
_CELL, _GAP, _MARGIN, _TITLE = 1.7, 0.06, 0.1, 0.2  # inches


@dataclasses.dataclass(frozen=True)
class Panel:
    """One axis of curves.

    Attributes:
      label: of the axis.
      curves: {what a curve is called: its values, a layer each}.
      lowest: whether the lowest value is the best, rather than the highest.
      scale: that values are multiplied by.
    """

    label: str
    curves: Mapping[str, Float[np.ndarray, "Y"]]
    lowest: bool = False
    scale: float = 1.0


def curves(layers: Sequence[int], panels: Sequence[Panel], title: str | None = None) -> Any:
    """Panels side by side of figures over layers, the best layer of each curve ringed and named in the legend."""
    looks = ((plots.BLUE, "o"), (plots.ORANGE, "D"), (plots.GREEN, "^"), (plots.PURPLE, "v"))
    with plots.style() as Figure:
        drawn = Figure(figsize=(0.8 + 3.6 * len(panels), 3.1), layout="constrained")
        for place, panel in enumerate(panels):
            axis = drawn.add_subplot(1, len(panels), place + 1)
            for (name, values), (color, marker) in zip(panel.curves.items(), looks, strict=False):
                shown = panel.scale * np.asarray(values)
                best = int(np.nanargmin(shown) if panel.lowest else np.nanargmax(shown))
                told = f"{shown[best]:.1f}" if panel.scale == 100 else f"{shown[best]:.3f}"
                axis.plot(layers, shown, color=color, marker=marker, label=f"{name}: {told} at layer {layers[best]}")
                ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.3}
                axis.plot([layers[best]], [shown[best]], color=color, marker="o", linestyle="none", zorder=3, **ring)
            axis.set_xlabel("layer")
            axis.set_ylabel(panel.label)
            step = max(1, -(-len(layers) // 14))
            axis.set_xticks([layer for layer in layers if (layers[-1] - layer) % step == 0])
            axis.margins(y=0.1)
            axis.grid(axis="x", visible=False)
            axis.legend(loc="best", handlelength=1.6)
            if title and place == 0:
                axis.set_title(title)
    return drawn


def masks(
    images: Sequence[Any],
    truths: Sequence[np.ndarray],
    found: Mapping[str, Sequence[np.ndarray]],
    title: str | None = None,
    background: int | None = None,
) -> Any:
    """A row an image: the image, its true classes, and those found under each of the names; `IGNORED` stays grey.

    Args:
      images: what `decode` takes.
      truths: [H, W] classes from 0 of each.
      found: {name: [H, W] classes of each image}.
      title: above.
      background: a class that is not painted.
    """
    rows = []
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        picture = np.asarray(decode(image).convert("RGB"))
        maps = {"true": truth, **{name: own[i] for name, own in found.items()}}
        cells = {name: overlaid(picture, values, background, alpha=0.75) for name, values in maps.items()}
        rows.append({"image": picture, **cells})
    return _grid(rows, title)


def depths(
    images: Sequence[Any],
    truths: Sequence[np.ndarray],
    found: Mapping[str, Sequence[np.ndarray]],
    title: str | None = None,
) -> Any:
    """A row an image: the image, its true depth, and those found; one scale for all, no measurement in white."""
    every = np.concatenate([truth[truth > 0] for truth in truths])
    low, high = np.percentile(every, [1, 99]) if len(every) else (0.0, 1.0)
    rows = []
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        maps = {"true": np.where(truth > 0, truth, np.nan), **{name: own[i] for name, own in found.items()}}
        rows.append({"image": np.asarray(decode(image).convert("RGB")), **maps})
    return _grid(rows, title, (float(low), float(high), "depth (m)"))


def tracks(found: tracking.Tracked, layers: Sequence[int], title: str | None = None) -> Any:
    """A row a layer, a column a frame of the first clip: the objects that were followed, the true outlines in white."""
    rows, clip = [], found.clip
    frames = sorted(found.shown)
    pictures = {frame: np.asarray(decode(clip.frames[frame]).convert("RGB")) for frame in frames}
    truths = {frame: clip.mask(frame) for frame in frames}
    for layer in layers:
        cells = {}
        for frame in frames:
            truth = truths[frame]
            own = tracking.nearest(found.shown[frame][found.layers.index(layer)], truth.shape)
            cell = overlaid(pictures[frame], own.astype(int), background=0)
            for number in range(1, int(truths[0].max()) + 1):
                outline = davis.dilated(davis.Contour(truth == number).pixels, max(1, round(max(truth.shape) / 500)))
                cell[outline] = 255
            cells["given" if frame == 0 else f"frame {frame}"] = cell
        rows.append(cells)
    return _grid(rows, title, names=[f"layer {layer}" for layer in layers])


def overlaid(
    picture: UInt8[np.ndarray, "H W 3"], classes: np.ndarray, background: int | None, alpha: float = 0.6
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture under the colours of the classes of its pixels; those of `background` show it as it is."""
    colors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in _COLORS], np.float32)
    grey = picture.astype(np.float32).mean(-1, keepdims=True)
    painted = (1 - alpha) * grey + alpha * colors[np.where(classes == IGNORED, 0, classes) % len(colors)]
    painted = np.where((classes == IGNORED)[..., None], 0.5 * grey + 0.5 * 225, painted)
    if background is not None:
        painted = np.where((classes == background)[..., None], picture, painted)
    return painted.round().astype(np.uint8)


def _grid(
    rows: Sequence[Mapping[str, np.ndarray]],
    title: str | None,
    scale: tuple[float, float, str] | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """Pictures in rows and columns, headed by the first row's names; [H, W] ones in the colours of a scale."""
    columns = list(rows[0])
    heights = [_CELL * min(max(len(own[columns[0]]) / own[columns[0]].shape[1], 0.4), 1.8) for own in rows]
    left = _MARGIN + (0.22 if names else 0)
    top, bottom = _MARGIN + (0.26 if title else 0) + _TITLE, _MARGIN + (0.42 if scale else 0)
    width = left + _MARGIN + len(columns) * (_CELL + _GAP) - _GAP
    height = top + bottom + sum(heights) + _GAP * (len(rows) - 1)
    with plots.style() as Figure:
        page, drawn = Figure(figsize=(width, height)), None
        if title:
            page.text(_MARGIN / width, 1 - _MARGIN / height, title, va="top", fontsize=10, fontweight="bold")
        y = top
        for row, (cells, own) in enumerate(zip(rows, heights, strict=True)):
            for column, name in enumerate(columns):
                x = left + column * (_CELL + _GAP)
                axes = page.add_axes((x / width, 1 - (y + own) / height, _CELL / width, own / height))
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set_visible(False)
                values = cells[name]
                how: dict[str, Any] = {"aspect": "auto", "interpolation": "antialiased"}
                if values.ndim == 2 and scale:
                    drawn = axes.imshow(values, cmap="viridis", vmin=scale[0], vmax=scale[1], **how)
                else:
                    axes.imshow(values, **how)
                if row == 0:
                    axes.set_title(name, fontsize=9, loc="center", pad=3)
                if names and column == 0:
                    axes.set_ylabel(names[row], fontsize=9, labelpad=3)
            y += own + _GAP
        if scale and drawn is not None:
            axes = page.add_axes(((width - _MARGIN - 2.4) / width, 0.36 / height, 2.2 / width, 0.08 / height))
            bar = page.colorbar(drawn, cax=axes, orientation="horizontal")
            bar.outline.set_visible(False)
            axes.grid(visible=False)
            axes.tick_params(length=2, pad=2, labelsize=7.5)
            axes.set_xlabel(scale[2], fontsize=8, labelpad=1)
    return page

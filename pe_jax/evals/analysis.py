"""What happens from layer to layer of a tower: where tokens become global, how features grow, which layers are alike.

One pass over the images, streamed: statistics are taken inside each block, while the tower runs, so that tokens of all
layers are never in memory, and no image's outlive its batch. Layer k is what leaves block k, and its attention is that
inside block k; layer 0 is what enters block 1. `FIGURES` says what is measured of each layer; between all pairs of
layers it is linear CKA. Global tokens are those that PE §5.1 found: from some layer on all others attend to a few.

Sources: effective rank, Roy and Vetterli 2007, of the covariance; CKA with the unbiased HSIC of minibatches, Nguyen,
Raghu and Kornblith (arXiv 2010.15327); attention distance, Dosovitskiy et al. (arXiv 2010.11929).
"""

import base64
import csv
import dataclasses
import functools
import html
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pe_jax.data.image import Preprocess
from pe_jax.evals import inference, plots, records
from pe_jax.models.layers import Step

GLOBAL = 10.0  # times an even share of attention
# Name: digits that tables show after the point, and meaning. All but norm_max and effective_rank are means over images.
FIGURES = {
    "top_share": (4, "share of the patches' attention that goes to the 1 % of them, at least one, that get most"),
    "class_share": (4, "share of all attention that goes to the class token"),
    "global_tokens": (2, f"patches that get {GLOBAL:.0f} times an even share of attention, or more"),
    "attention_outliers": (2, "patches that get more than twice the median and lie beyond Tukey's outer fence"),
    "received_entropy": (4, "of how attention is spread over the patches that get it: 1 is even, 0 all on one"),
    "given_entropy": (4, "of how a token spreads its attention, mean over tokens and heads: 1 is even, 0 all on one"),
    "distance": (2, "from a patch to those it attends to, in patches, mean over patches and heads"),
    "norm_mean": (2, "length of the patch tokens of the residual stream, mean over patches"),
    "norm_median": (2, "the same, median over patches"),
    "norm_q99": (2, "the same, 99th percentile over patches"),
    "norm_max": (2, "the same, the greatest of all images"),
    "norm_outliers": (2, "patches longer than twice the median and beyond Tukey's outer fence"),
    "class_norm": (2, "length of the class token"),
    "cosine_previous": (4, "between a patch token and itself one layer earlier, mean over patches"),
    "effective_rank": (1, "exp of the entropy of the patch tokens' variance over its principal directions, all images"),
}
_EXACT = jax.lax.Precision.HIGHEST


# ---- inside the tower ----------------------------------------------------------------------------------------------


def outliers(values: Float[Array, "B P"]) -> Float[Array, "B"]:
    """How many of each row lie beyond Tukey's outer fence, Q3 + 3 (Q3 - Q1), and above twice the median."""
    low, median, high = jnp.quantile(values, jnp.array([0.25, 0.5, 0.75]), axis=-1)
    fence = jnp.maximum(high + 3 * (high - low), 2 * median)
    return jnp.sum(values > fence[:, None], -1).astype(jnp.float32)


def distances(grid: tuple[int, int]) -> Float[np.ndarray, "P P"]:
    """Between the centres of all pairs of patches of a grid, in patches."""
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
    return np.linalg.norm(places[:, None] - places[None], axis=-1).astype(np.float32)


def attention_figures(
    weights: Callable[[Callable[[Array], Any]], Any], grid: tuple[int, int], first: int
) -> dict[str, Array]:
    """Figures of one block's attention, [B] each, and `head_distance` [B, K].

    Args:
      weights: `layers.Step.attention`, which applies a function to each head's [B, N, N].
      grid: rows and columns of patches.
      first: how many tokens come before the patches: 1 with a class token, else 0.
    """
    apart = distances(grid)

    def of_head(table: Array) -> dict[str, Array]:
        own = table[:, first:, first:]
        given = -jnp.sum(jax.scipy.special.xlogy(table, table), -1).mean(-1) / math.log(table.shape[-1])
        reach = jnp.sum(own * apart, -1) / jnp.maximum(jnp.sum(own, -1), 1e-30)
        return {"received": table.mean(1), "given": given, "distance": reach.mean(-1)}

    heads = weights(of_head)  # [K, B, ...]
    received = heads["received"].mean(0)
    patches = received[:, first:]
    shares = patches / patches.sum(-1, keepdims=True)
    top = jnp.sort(shares, -1)[:, -top_tokens(grid) :]
    found = {
        "top_share": top.sum(-1),
        "global_tokens": jnp.sum(patches * received.shape[-1] >= GLOBAL, -1).astype(jnp.float32),
        "attention_outliers": outliers(patches),
        "received_entropy": -jnp.sum(jax.scipy.special.xlogy(shares, shares), -1) / math.log(shares.shape[-1]),
        "given_entropy": heads["given"].mean(0),
        "distance": heads["distance"].mean(0),
        "head_distance": heads["distance"].T,
    }
    return found | ({"class_share": received[:, 0]} if first else {})


def top_tokens(grid: tuple[int, int]) -> int:
    """How many patches 1 % of them are, and at least one."""
    return max(1, round(0.01 * grid[0] * grid[1]))


def stream_figures(tokens: Float[Array, "B N D"], real: Float[Array, "B"], first: int) -> dict[str, Array]:
    """Figures of the residual stream at one layer: [B] each, and what covariance and CKA are made of.

    Args:
      tokens: the class token, if there is one, first.
      real: 1 for an image, 0 for a row that only fills the batch.
      first: how many tokens come before the patches.

    Returns:
      Beside the figures: `mean` [D] and `scatter` [D, D] about it of the real images' patch tokens; and `gram` [B, B],
      inner products of whole images, all their patches' channels side by side, with the batch's mean taken off.
    """
    tokens = tokens.astype(jnp.float32)
    patches = tokens[:, first:]
    norms = jnp.linalg.norm(patches, axis=-1)
    weight = real[:, None, None]
    mean = jnp.sum(weight * patches, (0, 1)) / (jnp.sum(real) * patches.shape[1])
    about = weight * (patches - mean)
    # HSIC does not see the mean, whatever it is; in float32 it would drown what differs between images.
    apart = (patches - patches.mean(0)).reshape(len(patches), -1)
    found = {
        "norm_mean": norms.mean(-1),
        "norm_median": jnp.median(norms, -1),
        "norm_q99": jnp.quantile(norms, 0.99, axis=-1),
        "norm_max": norms.max(-1),
        "norm_outliers": outliers(norms),
        "mean": mean,
        "scatter": jnp.einsum("bpd,bpe->de", about, about, precision=_EXACT),
        "gram": jnp.einsum("bd,cd->bc", apart, apart, precision=_EXACT),
    }
    return found | ({"class_norm": jnp.linalg.norm(tokens[:, 0], axis=-1)} if first else {})


@functools.cache
def _forward(preprocess: Preprocess, grid: tuple[int, int], first: int) -> Callable[[inference.Model, jax.Array], Any]:
    """From rows of pixels and a last byte, 1 where the row is an image, to figures of layer 0 and of all blocks."""

    def forward(model: inference.Model, rows: jax.Array) -> Any:
        tower = inference.vision_tower(model)
        real = rows[:, -1].astype(jnp.float32)
        images = inference.normalized(rows[:, :-1].reshape(-1, *preprocess.shape, 3), preprocess)

        def look(step: Step) -> dict[str, Array]:
            before, after = (x[:, first:].astype(jnp.float32) for x in (step.before, step.after))
            lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
            cosine = jnp.sum(before * after, -1) / jnp.maximum(lengths, 1e-12)
            return (
                stream_figures(step.after, real, first)
                | attention_figures(step.attention, grid, first)
                | {"cosine_previous": cosine.mean(-1)}
            )

        entering = tower.features(images, (0,))[0]
        return stream_figures(entering, real, first), tower.watch(images, look, range(1, tower.config.depth + 1))

    return forward


# ---- over batches --------------------------------------------------------------------------------------------------


class CKA:
    """Linear CKA between all pairs of Y layers, from the Gram matrices of minibatches that are then forgotten.

    The means over minibatches of unbiased estimates of HSIC are divided, so that the result does not hang on the size
    of the minibatches but for noise; the same examples in one minibatch give the unbiased estimate of the whole.
    """

    def __init__(self) -> None:
        self._hsic: Any = 0.0

    def add(self, grams: Shaped[np.ndarray, "Y B B"]) -> None:
        """A minibatch of B examples; fewer than 4 tell nothing and are left out."""
        count = grams.shape[-1]
        if count < 4:
            return
        off = np.asarray(grams, np.float64) * (1 - np.eye(count))
        # Off the diagonal, rows and columns without their means, as an unbiased estimate has to take them.
        rows = off.sum(-1) / (count - 2)
        off = off - rows[:, :, None] - rows[:, None, :] + (off.sum((-1, -2)) / (count - 1) / (count - 2))[:, None, None]
        off = (off * (1 - np.eye(count))).reshape(len(grams), -1)
        self._hsic = self._hsic + off @ off.T / (count * (count - 3))

    def value(self) -> Float[np.ndarray, "Y Y"]:
        """CKA, at most 1, and 1 on the diagonal; below 0 by noise alone; NaN for a layer that never varies."""
        own = np.sqrt(np.diag(self._hsic))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._hsic / np.outer(own, own)


class Spread:
    """Mean and scatter of vectors that come in parts, [Y, D] and [Y, D, D], without the loss of adding up squares."""

    def __init__(self) -> None:
        self._count, self._mean, self._scatter = 0, np.zeros(1), np.zeros(1)

    def add(self, count: int, mean: Shaped[np.ndarray, "Y D"], scatter: Shaped[np.ndarray, "Y D D"]) -> None:
        """A part of `count` vectors with their mean and their scatter about it."""
        total = self._count + count
        step = mean.astype(np.float64) - self._mean
        self._scatter = self._scatter + scatter + step[:, :, None] * step[:, None] * (self._count * count / total)
        self._mean, self._count = self._mean + step * (count / total), total

    def effective_rank(self) -> Float[np.ndarray, "Y"]:
        """exp of the entropy of the shares that principal directions have of the variance: from 1 to D."""
        return np.array([effective_rank(np.linalg.eigvalsh(own)) for own in self._scatter])


def effective_rank(variances: Float[np.ndarray, "D"]) -> float:
    """exp of the entropy of the shares of a sum; r where r of them are equal and the others 0; NaN where all are 0."""
    variances = np.maximum(variances, 0)
    if not variances.sum():
        return math.nan
    shares = variances[variances > 0] / variances.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
      figures: {name: [Y + 1] a number for each layer from 0}, NaN where a layer has none.
      head_distance: [Y, K] attention distance of each head, in patches.
      cka: [Y + 1, Y + 1] between layers.
      grid: rows and columns of patches.
      images: how many there were.
    """

    figures: dict[str, Float[np.ndarray, "L"]]
    head_distance: Float[np.ndarray, "Y K"]
    cka: Float[np.ndarray, "L L"]
    grid: tuple[int, int]
    images: int

    @property
    def layers(self) -> range:
        """From 0 to the last block."""
        return range(len(self.cka))

    def document(self) -> dict[str, Any]:
        """All numbers, fit for JSON."""
        return {
            "images": self.images,
            "grid": list(self.grid),
            "top_tokens": top_tokens(self.grid),
            "layers": [
                {"layer": layer} | {k: _plain(v[layer]) for k, v in self.figures.items()} for layer in self.layers
            ],
            "head_distance": [[_plain(value) for value in row] for row in self.head_distance],
            "cka": [[_plain(value) for value in row] for row in self.cka],
        }


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Evaluator `{"name": "analysis", "data": {...}}` → `layer_07_top_share` and the module's other figures.

    Attributes:
      data: images, see `records`; labels are not looked at.
      batch_size: images in a forward pass, which are also CKA's minibatch, of at least 4.
      image_size: as for zero-shot classification.
    """

    data: Mapping[str, Any]
    batch_size: int = 32
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 4:
            raise ValueError(f"batch_size={self.batch_size} must be at least 4, for CKA compares images of one batch.")

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = self.result(model)
        return {
            f"layer_{layer:02}_{name}": float(values[layer])
            for layer in found.layers
            for name, values in found.figures.items()
            if not math.isnan(values[layer])
        }

    def result(self, model: inference.Model, progress: Callable[[int, int], None] | None = None) -> Result:
        """All that is found, in one pass.

        Args:
          model: on one device or any mesh.
          progress: called after each batch with the images done and their total.

        Raises:
          ValueError: for fewer than 4 images or patches.
        """
        images = records.open(self.data).images
        if len(images) < 4:
            raise ValueError(
                f"the data holds {len(images)} images; an analysis needs at least 4, to compare layers by."
            )
        config, preprocess = inference.vision_tower(model).config, inference.preprocess_of(model, self.image_size)
        height, width = preprocess.shape
        grid = height // config.patch_size, width // config.patch_size
        if grid[0] * grid[1] < 4:
            raise ValueError(
                f"images of {height}x{width} pixels make {grid[0]} x {grid[1]} patches; an analysis needs at least 4."
            )
        forward = _forward(preprocess, grid, int(config.class_token))

        def load(image: Any) -> np.ndarray:
            return np.append(preprocess.pixels(image), np.uint8(1))

        cka, spread, done = CKA(), Spread(), 0
        sums: dict[str, Any] = {}
        for (entering, blocks), count in inference.batches(
            model, forward, images, load, min(self.batch_size, len(images))
        ):
            entering, blocks = jax.tree.map(np.asarray, (entering, blocks))
            whole = {name: np.concatenate([value[None], blocks[name]]) for name, value in entering.items()}
            whole |= {name: value for name, value in blocks.items() if name not in whole}
            cka.add(whole.pop("gram")[:, :count, :count])
            spread.add(count * grid[0] * grid[1], whole.pop("mean"), whole.pop("scatter"))
            for name, value in whole.items():
                own = value[:, :count].astype(np.float64)
                if name == "norm_max":
                    sums[name] = np.maximum(sums.get(name, 0), own.max(1))
                else:
                    sums[name] = sums.get(name, 0) + own.sum(1)
            done += count
            if progress is not None:
                progress(done, len(images))
        heads = sums.pop("head_distance") / done
        means = {name: value if name == "norm_max" else value / done for name, value in sums.items()}
        means["effective_rank"] = spread.effective_rank()
        depth = config.depth
        figures = {
            name: np.concatenate([np.full(depth + 1 - len(means[name]), np.nan), means[name]])
            for name in FIGURES
            if name in means
        }
        return Result(figures, heads, cka.value(), grid, done)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


# ---- for people ----------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """CSV, a row a layer."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["layer", *result.figures])
    for layer in result.layers:
        values = (_plain(own[layer]) for own in result.figures.values())
        rows.writerow([layer, *("" if value is None else value for value in values)])
    return out.getvalue()


def cka_table(result: Result) -> str:
    """CSV of CKA, a row and a column a layer."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["layer", *result.layers])
    rows.writerows([layer, *map(_plain, own)] for layer, own in zip(result.layers, result.cka, strict=True))
    return out.getvalue()


def figure(result: Result, title: str | None = None) -> Any:
    """A matplotlib Figure of one page: seven curves over the layers, and CKA.

    Raises:
      ModuleNotFoundError: without matplotlib (extra `viz`).
    """
    found, patches = result.figures, result.grid[0] * result.grid[1]
    layers = np.array(result.layers)
    with plots.style() as Figure:
        page = Figure(figsize=(12.4, 5.9), layout="constrained")
        page.get_layout_engine().set(wspace=0.04, hspace=0.06)
        axes = page.subplots(2, 4).ravel()
        letters = iter("abcdefgh")

        def panel(axis: Any, heading: str, unit: str, curves: Mapping[str, str], zero: bool = False) -> None:
            looks = ((plots.BLUE, "o"), (plots.ORANGE, "s"), (plots.GREEN, "^"), (plots.PURPLE, "D"))
            shown = [(name, label) for name, label in curves.items() if name in found]
            size = max(1.8, min(3.5, 60 / len(layers)))
            for (name, label), (color, marker) in zip(shown, looks, strict=False):
                axis.plot(layers, found[name], color=color, marker=marker, markersize=size, label=label)
            axis.set_title(f"{next(letters)}  {heading}", fontweight="bold")
            axis.set_ylabel(unit)
            if zero:
                axis.set_ylim(bottom=0)
            if len(shown) > 1:
                axis.legend(handlelength=1.4, borderaxespad=0.2)

        ticks = [layer for layer in result.layers if (result.layers[-1] - layer) % max(1, -(-len(layers) // 9)) == 0]
        for axis in axes[:7]:
            axis.set_xlim(-0.03 * len(layers), layers[-1] + 0.03 * len(layers))
            axis.set_xticks(ticks)
            axis.grid(axis="x", visible=False)
        for axis in axes[4:]:
            axis.set_xlabel("layer")

        count = top_tokens(result.grid)
        best = "most attended patch" if count == 1 else f"{count} most attended patches"
        even: dict[str, Any] = {"color": plots.GREY, "linewidth": 0.9, "linestyle": (0, (3, 3))}
        axes[0].axhline(count / patches, **even)
        panel(axes[0], "attention received", "share", {"top_share": best, "class_share": "class token"}, zero=True)
        names = {
            "global_tokens": f"attention, {GLOBAL:.0f}x an even share",
            "attention_outliers": "attention, outliers",
            "norm_outliers": "norm, outliers",
        }
        panel(axes[1], "unusual patches", "per image", names, zero=True)
        highest = max(1.0, *(float(np.nanmax(found[name])) for name in names))
        axes[1].set_ylim(-0.02 * highest, 1.5 * highest)  # the legend lies above the curves
        axes[1].legend(loc="upper left", handlelength=1.4, borderaxespad=0.2)
        panel(
            axes[2],
            "entropy of attention",
            "1 = even",
            {"received_entropy": "received", "given_entropy": "given by one token"},
        )
        panel(axes[3], "attention distance", "patches", {"distance": "mean"})
        reach = distances(result.grid).mean()
        for k, own in enumerate(result.head_distance.T):
            axes[3].plot(
                layers[1:], own, ".", color=plots.SKY, markersize=3.5, zorder=1, label="_" if k else "each head"
            )
        axes[3].axhline(reach, label="even attention", **even)
        axes[3].set_ylim(bottom=0)
        axes[3].legend(handlelength=1.4, borderaxespad=0.2)
        norms = {"norm_max": "max", "norm_q99": "99 %", "norm_median": "median", "class_norm": "class token"}
        lengths = np.concatenate([found[name] for name in norms if name in found])
        wide = lengths.min() > 0 and lengths.max() > 30 * lengths.min()
        panel(axes[4], "norm of tokens", "norm", norms, zero=not wide)
        if wide:
            axes[4].set_yscale("log")
        panel(axes[5], "cosine to the layer before", "cosine", {"cosine_previous": "patches"})
        panel(axes[6], "effective rank", "directions", {"effective_rank": "patches"}, zero=True)

        last = axes[7]
        low = float(np.nanmin(result.cka)) if np.isfinite(result.cka).any() else 0.0
        drawn = last.imshow(result.cka, origin="lower", cmap="viridis", vmin=min(max(0.0, low), 0.9), vmax=1)
        last.set_title(f"{next(letters)}  CKA between layers", fontweight="bold")
        last.set(xticks=ticks, yticks=ticks, xlabel="layer", ylabel="layer")
        last.grid(visible=False)
        bar = page.colorbar(drawn, ax=last, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        if title:
            page.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return page


_STYLE = """
body { margin: 0 auto; max-width: 1240px; padding: 24px 16px 64px; color: #0f172a; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.45rem; margin: 0 0 4px; } h2 { font-size: 1.1rem; margin: 28px 0 6px; }
p, dd { color: #475569; margin: 0 0 8px; } dt { font-weight: 600; } img { width: 100%; height: auto; margin-top: 12px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: 3px 10px 3px 0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #64748b; font-weight: 600; } tr + tr td { border-top: 1px solid #e2e8f0; }
"""


def page(result: Result, png: bytes, title: str, facts: Mapping[str, Any]) -> str:
    """The figure, the table and what its columns mean as one HTML file that needs no other."""
    escape = html.escape
    terms = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(FIGURES[name][1])}</dd>" for name in result.figures
    )
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("layer", *result.figures))
    body = "".join(
        f"<tr><td>{layer}</td>"
        + "".join(
            f"<td>{'' if math.isnan(own[layer]) else f'{own[layer]:.{FIGURES[name][0]}f}'}</td>"
            for name, own in result.figures.items()
        )
        + "</tr>"
        for layer in result.layers
    )
    said = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt>"
        f"<dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd>"
        for name, value in facts.items()
    )
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{result.images:,} images, {result.grid[0]} x {result.grid[1]} patches each. Layer k is what leaves block "
        "k, and its attention is that inside block k; layer 0 is what enters block 1.</p>"
        f'<img src="{source}" alt="{escape(title)}"><h2>Figures</h2><div class="wide">'
        f"<table><tr>{head}</tr>{body}</table></div><h2>What they mean</h2><dl>{terms}</dl>"
        f"<h2>Made from</h2><dl>{said}</dl></body></html>\n"
    )

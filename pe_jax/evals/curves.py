"""What a sweep of probes found, for people and for programs: curves over the layers, a table, and a card of facts."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from pe_jax.evals import plots, sweep

TITLES = {"knn": "k-NN", "linear": "linear", "logistic": "logistic regression", "attention": "attention"}
_LOOKS = {
    "knn": (plots.GREY, "s"),
    "linear": (plots.BLUE, "o"),
    "logistic": (plots.GREEN, "^"),
    "attention": (plots.ORANGE, "D"),
}


def layer_of(entry: str) -> int | None:
    """The number of the layer that an entry's name tells, or None of the tower's own pooling."""
    return int(entry.removeprefix("layer_")) if entry.startswith("layer_") else None


def figure(found: Mapping[str, sweep.Scores], title: str | None = None) -> Any:
    """Accuracy over layers, a curve a probe, the best layer of each ringed and named; `pooler` stands apart.

    Args:
      found: {probe: its scores}.
      title: above the figure.
    """
    layers = sorted({layer for scores in found.values() for e in scores.entries if (layer := layer_of(e)) is not None})
    pooler = any("pooler" in scores.entries for scores in found.values())
    at_pooler = layers[-1] + max(1.0, (layers[-1] - layers[0]) * 0.06)
    with plots.style() as Figure:
        drawn = Figure(figsize=(5.6, 3.4), layout="constrained")
        axis = drawn.add_subplot()
        for name, scores in found.items():
            color, marker = _LOOKS.get(name, (plots.PURPLE, "v"))
            best = {entry: 100 * value for entry, value in scores.best.items()}
            curve = {layer: value for entry, value in best.items() if (layer := layer_of(entry)) is not None}
            top = max(curve, key=lambda layer: curve[layer])
            label = f"{TITLES.get(name, name)}: {curve[top]:.1f} at layer {top}"
            axis.plot(list(curve), list(curve.values()), color=color, marker=marker, label=label)
            ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.3}
            axis.plot([top], [curve[top]], color=color, marker="o", linestyle="none", zorder=3, **ring)
            if "pooler" in best:
                axis.plot([at_pooler], [best["pooler"]], color=color, marker=marker, linestyle="none")
        axis.set_xlabel("layer")
        axis.set_ylabel("accuracy (%)")
        step = max(1, -(-len(layers) // 14))
        ticks = [layer for layer in layers if (layers[-1] - layer) % step == 0]
        axis.set_xticks([*ticks, *([at_pooler] if pooler else [])], [*map(str, ticks), *(["pooled"] if pooler else [])])
        if pooler:
            axis.axvline((layers[-1] + at_pooler) / 2, color=plots.RULE, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.margins(y=0.08)
        axis.grid(axis="x", visible=False)
        axis.legend(loc="best", handlelength=1.6)
        if title:
            axis.set_title(title)
    return drawn


def table(found: Mapping[str, sweep.Scores]) -> str:
    """CSV, a row a probe, entry and setting; `chosen` is 1 for the setting that counts."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["probe", "entry", "layer", "setting", "accuracy", "tuned_on", "chosen"])
    for name, scores in found.items():
        for y, entry in enumerate(scores.entries):
            for s, setting in enumerate(scores.settings):
                values = (f"{float(scores.accuracy[y, s]):.6g}", f"{float(scores.tuned[y, s]):.6g}")
                layer = layer_of(entry)
                rows.writerow(
                    [name, entry, "" if layer is None else layer, setting, *values, int(s == scores.chosen[y])]
                )
    return out.getvalue()


def summary(probe: Any, scores: sweep.Scores) -> dict[str, Any]:
    """A probe's part of a card: its settings, how it went, the best layer, and each entry's accuracy and setting."""
    own = {field.name for field in dataclasses.fields(sweep.Task)}
    settings = {name: value for name, value in dataclasses.asdict(probe).items() if name not in own}
    chosen = [scores.settings[at] for at in scores.chosen]
    return {
        "settings": settings,
        **scores.facts,
        "best": scores.best_entry,
        "best_accuracy": scores.best[scores.best_entry],
        "accuracy": scores.best,
        "chosen": dict(zip(scores.entries, chosen, strict=True)),
    }

"""A page about a finished contrastive run: what it learnt, what it confuses, where its best features lie.

Everything is computed from the workdir: `config.json`, `losses.csv`, `evals.csv` and the newest checkpoint. Works for
any contrastive run; what a run has no evaluator or labels for is left out and said so.
"""

import base64
import dataclasses
import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pe_jax import evals, metrics, paths
from pe_jax.evals import curves, inference, pictures, plots, probes, records, sweep, zero_shot
from pe_jax.evals.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, RULE
from pe_jax.models.clip import CLIP
from pe_jax.types import split

SHOWN = 40  # held-out images in the picture of samples
PICTURED = 6  # images whose features are pictured


@dataclasses.dataclass(frozen=True)
class Figure:
    """One picture of the page: its file name, PNG bytes, heading, and what a reader should see in it."""

    name: str
    png: bytes
    title: str
    text: str
    wide: bool = False  # too fine to be shrunk to a phone's width; scrolls there


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      losses: rows of losses.csv as numbers.
      evals: rows of evals.csv: step, name, value.
      boundaries: examples seen at the end of each phase.
    """

    config: dict[str, Any]
    losses: list[dict[str, float]]
    evals: list[tuple[int, str, float]]
    boundaries: tuple[int, ...]

    def examples(self, step: float | int) -> float:
        """Examples seen after `step` steps; phases may differ in batch size."""
        seen = 0.0
        for phase in self.config["phases"]:
            size = phase.get("batch_size", self.config["batch_size"])
            steps = phase["examples"] // size
            if step <= steps:
                return float(seen + step * size)
            seen, step = seen + steps * size, step - steps
        return seen

    def history(self, name: str) -> tuple[list[float], list[float]]:
        """Examples seen and value at each time an evaluator's figure was taken."""
        rows = [(self.examples(step), value) for step, own, value in self.evals if own == name]
        return [x for x, _ in rows], [y for _, y in rows]


def read(workdir: str | os.PathLike[str]) -> Run:
    """Reads config and metrics of a workdir.

    Raises:
      ValueError: if it is not the workdir of a contrastive run that has logged something.
    """
    folder = paths.path(workdir)
    paths.reach(folder)
    for name in ("config.json", "losses.csv"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}; give the --workdir of a run of pe_jax.train.")
    config = json.loads((folder / "config.json").read_text())
    if config.get("stage", {}).get("name") != "contrastive":
        raise ValueError(
            f"{folder} is a run of stage {config.get('stage', {}).get('name')!r}; reports are of contrastive runs."
        )
    losses = [
        {key: float(value) for key, value in row.items() if value} for row in metrics.read_rows(folder / "losses.csv")
    ]
    if not losses:
        raise ValueError(f"{folder}/losses.csv has no row yet; wait until the run has logged a step.")
    figures = metrics.read_rows(folder / "evals.csv") if (folder / "evals.csv").exists() else []
    boundaries, seen = [], 0
    for phase in config["phases"]:
        size = phase.get("batch_size", config["batch_size"])
        seen += phase["examples"] // size * size
        boundaries.append(seen)
    return Run(config, losses, [(int(r["step"]), r["name"], float(r["value"])) for r in figures], tuple(boundaries))


def write(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], epath.Path]:
    """Writes report.html, report.json and the PNG files.

    Args:
      workdir: of the run, local or gs://.
      out: the folder to write to, local or gs://, made if it is missing; WORKDIR/report by default.

    Returns:
      The figures of report.json, and the path of the page.

    Raises:
      ValueError: see `read`.
      ModuleNotFoundError: without matplotlib, saying how to install it.
    """
    plots.require()
    import pe_jax

    run = read(workdir)
    model = pe_jax.load(os.fspath(workdir))
    assert isinstance(model, CLIP)
    out = paths.path(workdir) / "report" if out is None else paths.path(out)
    out.mkdir(parents=True, exist_ok=True)
    with plots.style() as draw:
        summary, figures, notes = _gather(run, model, draw)
    for figure in figures:
        (out / figure.name).write_bytes(figure.png)
    (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = out / "report.html"
    name = "/".join(paths.absolute(workdir).parts[-2:])
    page.write_bytes(_page(name, summary, figures, notes, run.config).encode())
    return summary, page


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The figures of a summary as text, one a line."""
    return [
        f"{name.replace('_', ' ')}: {_shown(name, value)}"
        for name, value in summary.items()
        if not isinstance(value, dict)
    ]


def _gather(run: Run, model: CLIP, draw: Any) -> tuple[dict[str, Any], list[Figure], list[str]]:
    summary = _summary(run, model)
    notes: list[str] = []
    figures = [_curves(run, draw)]
    config = _first(run.config, "zero_shot")
    if config is None:
        notes.append("The config has no zero-shot evaluator, so there are no predictions to show.")
    else:
        evaluator = evals.create(config)
        assert isinstance(evaluator, zero_shot.ZeroShot)
        result = evaluator.result(model)
        images = records.open(evaluator.data).images
        scale = float(np.exp(np.asarray(model.log_scale[...])))
        summary["zero_shot_top1"] = result.figures["top1"]
        summary["zero_shot_mean_recall"] = result.figures["mean_recall"]
        summary["held_out_images"] = len(result.labels)
        summary["classes"] = len(result.classes)
        figures += [_samples(result, images, scale, draw), _confusion(result, draw)]
        figures += _features(run, model, images, result.labels, draw)
    scores = _layers(run, model)
    if scores is None:
        notes.append("No k-NN evaluator and no labelled training source, so the layers were not probed.")
    else:
        best = curves.layer_of(scores.best_entry)
        assert best is not None
        summary |= {"best_layer": best, "best_layer_accuracy": scores.best[scores.best_entry]}
        summary["layers"] = {str(curves.layer_of(entry)): value for entry, value in scores.best.items()}
        figures.insert(min(3, len(figures)), _layer_curve(scores, best))
    summary["evals"] = {name: value for _, name, value in run.evals}  # the last of each name stays
    return summary, figures, notes


def _first(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((dict(own) for own in config.get("evals", {}).values() if own["name"] == name), None)


def _summary(run: Run, model: CLIP) -> dict[str, Any]:
    _, params = split(model)
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in ("vision", "text")}
    last = run.losses[-1]
    examples = run.examples(last["step"])
    seconds, before = 0.0, 0.0
    for row in run.losses:
        seen = run.examples(row["step"])
        if row.get("examples_per_second"):
            seconds += (seen - before) / row["examples_per_second"]
        before = seen
    return {
        "vision_parameters": count["vision"],
        "text_parameters": count["text"],
        "steps": int(last["step"]),
        "examples": int(examples),
        "training_seconds": seconds,
        "examples_per_second": examples / seconds if seconds else math.nan,
        "final_loss": last["loss"],
    }


# ---- figures -------------------------------------------------------------------------------------------------------


def _curves(run: Run, draw: Any) -> Figure:
    shown = [name for name in dict.fromkeys(name for _, name, _ in run.evals) if name.split("/")[-1] in _CURVES]
    rows = 2 if shown else 1
    figure = draw(figsize=(5, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    above = axes[0, 0]
    x = [run.examples(row["step"]) for row in run.losses]
    y = [row["loss"] for row in run.losses]
    above.plot(x, y, color=BLUE, alpha=0.3 if len(y) > 20 else 1, linewidth=1)
    if len(y) > 20:
        above.plot(x, _smooth(y, max(5, len(y) // 20)), color=BLUE)
    above.set_ylabel("training loss (nats)")
    above.set_ylim(min(y) - 0.05 * (max(y) - min(y) + 1e-9), max(y) + 0.12 * (max(y) - min(y) + 1e-9))
    if shown:
        below = axes[1, 0]
        for name, color in zip(shown, (GREEN, ORANGE, PURPLE, GREY, BLUE), strict=False):
            x, y = run.history(name)
            below.plot(x, y, color=color, marker="o", label=f"{name}: {y[-1]:.1%}", clip_on=False)
        below.set_ylim(0, 1.12)
        below.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        below.set_ylabel("held-out accuracy")
        below.legend(loc="best")
    begin = 0
    for i, (phase, end) in enumerate(zip(run.config["phases"], run.boundaries, strict=True)):
        size = phase["image_size"]
        for axis in axes[:, 0]:
            if i:
                axis.axvline(begin, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        above.text((begin + end) / 2, above.get_ylim()[1], f"{size} px", ha="center", va="top", color=GREY)
        begin = end
    axes[-1, 0].set_xlabel("examples seen")
    axes[-1, 0].set_xlim(0, run.boundaries[-1])
    axes[-1, 0].xaxis.set_major_formatter(lambda value, _: _short(value))
    text = "Dashed lines are where the resolution grows."
    if shown:
        text += (
            " Accuracy is always measured at full resolution, so it lags while the training images are still smaller."
        )
    return Figure("curves.png", plots.encoded(figure), "Training", text)


_CURVES = ("top1", "image_to_text_r1", "text_to_image_r1")  # figures worth a curve


def _samples(result: zero_shot.Result, images: Sequence[Any], scale: float, draw: Any) -> Figure:
    random = np.random.default_rng(0).permutation(len(result.labels))
    wrong = [int(i) for i in random if result.predictions[i] != result.labels[i]]
    right = [int(i) for i in random if result.predictions[i] == result.labels[i]]
    most = min(SHOWN, len(random))
    mistakes = wrong[: max(most // 2, most - len(right))]
    chosen = mistakes + right[: most - len(mistakes)]
    columns = 8 if max(len(name) for name in result.classes) <= 10 else 5
    rows = math.ceil(len(chosen) / columns)
    figure = draw(figsize=(6.75, 6.75 / columns * 1.32 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, i in zip(axes.flat, chosen, strict=False):
        logits = scale * result.cosines[i]
        odds = np.exp(logits - logits.max())
        odds, guess, truth = odds / odds.sum(), result.predictions[i], result.labels[i]
        axis.imshow(_thumbnail(images[i]), interpolation="nearest")
        hit = guess == truth
        axis.set_title(
            f"{_cut(result.classes[guess])} {odds[guess]:.0%}" + ("" if hit else f"\nis {_cut(result.classes[truth])}"),
            color=INK if hit else RED,
            fontsize=7,
            pad=2,
            loc="center",
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set(visible=True, color=RULE if hit else RED, linewidth=0.8 if hit else 2.2)
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    text = (
        f"Held-out images with the predicted class and its probability. {len(wrong)} of {len(random)} are wrong; "
        f"{'all' if len(mistakes) == len(wrong) else 'the first'} {len(mistakes)} of those come first, framed in red."
        if wrong
        else f"Held-out images with the predicted class and its probability. All {len(random)} are right."
    )
    return Figure("samples.png", plots.encoded(figure), "Zero-shot predictions", text, wide=True)


def _confusion(result: zero_shot.Result, draw: Any) -> Figure:
    table = result.confusion
    count = len(result.classes)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    small = count <= 20
    side = max(3.75, 0.36 * count + 1.2) if small else min(9.75, 0.086 * count + 1.5)
    figure = draw(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.grid(visible=False)
    size = 7.5 if small else max(3.0, min(6.0, 336 / count))
    names = [_cut(name, 22) for name in result.classes]
    axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
    axis.set_yticks(range(count), names, fontsize=size)
    axis.tick_params(length=0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if small:
        for row, column in np.argwhere(table):
            color = "white" if share[row, column] > 0.5 else INK
            axis.text(column, row, str(table[row, column]), ha="center", va="center", color=color, fontsize=7.5)
    apart = table * (1 - np.eye(count, dtype=int))
    pairs = sorted(np.argwhere(apart).tolist(), key=lambda rc: -apart[rc[0], rc[1]])[:5]
    text = "Rows are true classes, columns predictions."
    if pairs:
        most = ", ".join(f"{result.classes[r]} taken for {result.classes[c]} ({apart[r, c]})" for r, c in pairs)
        text += f" Most confused: {most}."
    return Figure("confusion.png", plots.encoded(figure), "Confusion matrix", text, wide=not small)


def _layers(run: Run, model: CLIP) -> sweep.Scores | None:
    """k-NN by layer, of the run's own evaluator with its highest k, or of one made of its first labelled source."""
    config, shots = _first(run.config, "knn"), _first(run.config, "zero_shot")
    if config is None:
        if shots is None:
            return None
        source = {k: v for k, v in run.config["data"]["sources"][0].items() if k not in _PIPELINE_ONLY}
        config = {"name": "knn", "bank": source, "data": shots["data"], "classes": shots["classes"]}
        own = records.open(source)
        try:
            records.Records(own.source, limit=1).labels(zero_shot.classes(shots["classes"]))
        except ValueError:
            return None
        config["k"] = min(20, len(own))
    probe = evals.create(config)
    assert isinstance(probe, probes.KNN)
    probe = dataclasses.replace(probe, layers="all", k=(max(probe.neighbours),), pooler=False)
    return sweep.run(model, {"knn": probe})["knn"]


_PIPELINE_ONLY = ("weight", "templates", "label", "classes", "caption")


def _layer_curve(scores: sweep.Scores, best: int) -> Figure:
    last = curves.layer_of(scores.entries[-1])
    text = (
        f"Held-out images are classified by their {scores.settings[0].removeprefix('k')} nearest training images "
        "(cosine of mean patch tokens), with the features of each layer in turn; layer 0 is the patch embedding. "
        f"The best features lie {'at the last layer.' if best == last else f'at layer {best} of {last}, inside it.'}"
    )
    return Figure("layers.png", plots.encoded(curves.figure({"knn": scores})), "Where the best features lie", text)


def _features(run: Run, model: CLIP, images: Sequence[Any], labels: np.ndarray, draw: Any) -> list[Figure]:
    depth = model.vision.config.depth
    preprocess = inference.preprocess_of(model)
    patch = model.vision.config.patch_size
    grid = tuple(side // patch for side in preprocess.shape)
    if min(grid) < 2:
        return []
    layers = tuple(sorted({round(i * depth / min(4, depth)) for i in range(min(4, depth) + 1)}))
    # One image of each class in turn, so that the picture shows variety. More images than are shown make the
    # principal components those of the data and not of six pictures.
    order = np.random.default_rng(1).permutation(len(labels))
    firsts = list({int(labels[i]): int(i) for i in order[::-1]}.values())
    shown = sorted(firsts, key=lambda i: int(labels[i]))
    shown = [shown[round(j)] for j in np.linspace(0, len(shown) - 1, min(PICTURED, len(shown)))]
    chosen = shown + [int(i) for i in order if i not in shown][: 64 - len(shown)]
    pixels = np.stack([preprocess.pixels(images[i]) for i in chosen])
    found = model.vision.features(jnp.asarray(preprocess.normalize(pixels)), layers=layers, class_token=False)
    figure = draw(figsize=(1.22 * (1 + len(layers)), 1.22 * len(shown) + 0.26), layout="constrained")
    axes = figure.subplots(len(shown), 1 + len(layers), squeeze=False)
    for column, layer in enumerate((None, *layers)):
        if layer is None:
            cells: Any = pixels
        else:
            tokens = np.asarray(found[layer], np.float32)
            cells = pictures.pca_colors(tokens.reshape(len(chosen), *grid, -1))
        axes[0, column].set_title("image" if layer is None else f"layer {layer}", fontsize=8, loc="center")
        for row in range(len(shown)):
            axes[row, column].imshow(cells[row], interpolation="nearest")
            axes[row, column].set_axis_off()
    text = (
        f"Patch tokens ({grid[0]} x {grid[1]}), coloured by the three principal components of each layer over "
        f"{len(chosen)} held-out images: patches of like colour have like features."
    )
    return [Figure("features.png", plots.encoded(figure), "Features, layer by layer", text, wide=True)]


def _thumbnail(image: Any) -> np.ndarray:
    """At most 160 pixels a side, RGB, aspect ratio kept."""
    from pe_jax.data.image import decode

    picture = decode(image).convert("RGB")
    picture.thumbnail((160, 160))
    return np.asarray(picture)


def _smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Centred moving average; shorter at the ends."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _cut(text: str, longest: int = 18) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _short(number: float) -> str:
    """1500 → 1.5k, 2000000 → 2M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


# ---- the page ------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: #0f172a;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 0 0 6px; }
p { margin: 0 0 12px; color: #475569; }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: 12px; padding: 18px; margin-top: 18px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.figure { overflow-x: auto; }
@media (max-width: 640px) { .wide img { max-width: none; width: 680px; } }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin-top: 18px; }
.card { background: #fff; border: 1px solid #e2e8f0; border-radius: 12px; padding: 12px 14px; }
.card b { display: block; font-size: 1.55rem; line-height: 1.2; }
.card span { color: #64748b; font-size: .9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td { border-top: 1px solid #e2e8f0; padding: 6px 8px 6px 0; vertical-align: top; }
tr:first-child td { border-top: 0; }
td + td { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .82rem; background: #f1f5f9; padding: 12px; border-radius: 8px; }
"""

_CARDS: tuple[tuple[str, str], ...] = (
    ("zero_shot_top1", "zero-shot top-1"),
    ("best_layer", "best layer (k-NN)"),
    ("training_seconds", "training, without compiling"),
    ("examples_per_second", "examples a second"),
)


def _shown(name: str, value: Any) -> str:
    """A figure of the summary for people."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "unknown"
    if name.endswith(("top1", "recall", "accuracy")):
        return f"{value:.2%}"
    if name.endswith("_seconds"):
        return f"{value:.0f} s" if value < 120 else f"{int(value // 60)} min {value % 60:02.0f} s"
    if name == "examples_per_second":
        return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _page(
    name: str, summary: Mapping[str, Any], figures: Sequence[Figure], notes: Sequence[str], config: Mapping[str, Any]
) -> str:
    escape: Callable[[str], str] = html.escape
    cards = "".join(
        f'<div class="card"><b>{_shown(key, summary[key])}</b><span>{label}</span></div>'
        for key, label in _CARDS
        if key in summary
    )
    sections = []
    for figure in figures:
        source, title = "data:image/png;base64," + base64.b64encode(figure.png).decode(), escape(figure.title)
        sections.append(
            f"<section><h2>{title}</h2><p>{escape(figure.text)}</p>"
            f'<div class="figure{" wide" * figure.wide}"><img src="{source}" alt="{title}"></div></section>'
        )
    plain = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    rows = [(key.replace("_", " "), _shown(key, value)) for key, value in plain.items()]
    rows += [(key, f"{value:.4f}") for key, value in summary["evals"].items()]
    sections += [
        "<section><h2>Figures</h2><p>The last value of each evaluator is as the run wrote it to evals.csv.</p>"
        f"{_table(rows)}</section>",
        f"<section><h2>Settings</h2>{_table(_settings(config))}<details><summary>Whole config</summary>"
        f"<pre>{escape(json.dumps(config, indent=2))}</pre></details></section>",
    ]
    said = "".join(f"<section><p>{escape(note)}</p></section>" for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: Perception Encoder report</title><style>{_STYLE}</style></head><body><main>"
        f"<p>Perception Encoder, contrastive training</p><h1>{escape(name)}</h1>"
        f'<div class="cards">{cards}</div>{"".join(sections)}{said}</main></body></html>\n'
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="table"><table>{body}</table></div>'


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader compares runs by."""
    arch, optimizer = config["stage"]["arch"], config["optimizer"]
    rows = [("batch size", f"{config['batch_size']:,}")]
    rows.append(
        ("phases", ", ".join(f"{p['image_size']} px: {_short(p['examples'])} examples" for p in config["phases"]))
    )
    rows += [(f"optimizer: {name.replace('_', ' ')}", str(value)) for name, value in optimizer.items()]
    if isinstance(arch, str):
        rows.append(("architecture", arch))
    else:
        for part, fields in arch.items():
            rows.append(
                (
                    f"{part}",
                    ", ".join(f"{k} {v}" for k, v in fields.items()) if isinstance(fields, dict) else str(fields),
                )
            )
    rows += [
        (f"augment: {name.replace('_', ' ')}", str(value))
        for name, value in (config["data"].get("augment") or {}).items()
    ]
    rows += [
        (f"data source {i + 1}", str(source.get("path", source))) for i, source in enumerate(config["data"]["sources"])
    ]
    return rows

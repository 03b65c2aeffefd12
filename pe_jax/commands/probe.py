"""Probe every layer of a tower: where in it the classes of a data set lie apart, by k-NN, linear, logistic, attention.

  pe-jax probe --model PE-Core-B16-224 --train train.jsonl --data test.jsonl --out probes/b16
  pe-jax probe --model runs/mine --train train.npz --data test.npz --layers 2,4,-1 --probes knn,linear --out probes/mine
  pe-jax probe --model runs/mine --train train.npz --data test.npz --tune val.npz --probes attention \\
      --set attention.epochs=50 attention.rates=[1e-4,1e-3] --out probes/mine

DIR gets curves.png, curves.csv, card.json, and features/, from which the same command goes on after it was killed and
other probes begin; delete it to have the space back. Layers count from 1, as the paper does; 0 is what enters block 1,
-1 the last block, `pooler` what the tower itself pools; "all" is every one of them. Each probe's free setting (k, rate,
penalty) is the best one on --tune, or without it on --data, as in the published protocols; the table has all of them.
"""

import argparse
import json
import time
from typing import Any

from pe_jax.commands import Bars, add_model_arguments, load_model

PROBES = ("knn", "linear", "logistic", "attention")
NEIGHBOURS = (10, 20, 100, 200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--train", required=True, metavar="DATA", help="labelled images to learn from (see pe-jax data)"
    )
    parser.add_argument("--data", required=True, metavar="DATA", help="labelled images to classify")
    parser.add_argument("--tune", metavar="DATA", help="labelled images on which settings are chosen")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--layers", default="all", metavar="1,8,-1", help='numbers and `pooler`, or "all" (default)')
    parser.add_argument("--probes", default=",".join(PROBES), help="some of %(default)s")
    parser.add_argument("--set", nargs="+", default=(), metavar="PROBE.FIELD=VALUE", help="settings, values as JSON")
    parser.add_argument("--classes", help="names of the classes, where labels are names: a set or a file")
    parser.add_argument("--label", metavar="FIELD", help="of the records that holds the class (label or cls)")
    parser.add_argument(
        "--pool", default="average", help="what stands for a layer's tokens: average (default) or class"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images in a forward pass, on all devices (64)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a side; by default the model's own")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images of each, for a trial")
    parser.add_argument("--save-dtype", default="float32", help="of the features kept: float32 (default) or float16")
    parser.add_argument("--max-gb", type=float, default=100, help="features that may be written at most (100)")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def run(args: argparse.Namespace) -> int:
    names = args.probes.split(",")
    if unknown := [name for name in names if name not in PROBES]:
        raise ValueError(f"--probes has {unknown[0]!r}; there are {', '.join(PROBES)}.")
    settings = _settings(args.set, names)
    layers, pooler = _layers(args.layers)

    from pe_jax import evals, paths
    from pe_jax.data import sources
    from pe_jax.evals import curves, inference, plots, records, sweep

    plots.require()
    own = {name: value for name, value in (("label", args.label), ("limit", args.limit)) if value is not None}
    splits = {"bank": args.train, "data": args.data} | ({"tune": args.tune} if args.tune else {})
    data = {split: sources.guess(text) | own for split, text in splits.items()}
    counts = {split: len(records.open(config)) for split, config in data.items()}
    model = load_model(args)
    if pooler is None:
        pooler = inference.vision_tower(model).config.pool != "none"
    if "knn" in names:
        settings["knn"] = {"k": tuple(k for k in NEIGHBOURS if k <= counts["bank"]) or (1,)} | settings["knn"]
    task = {
        "layers": layers, "pooler": pooler, "pool": args.pool, "classes": args.classes, "batch_size": args.batch_size,
        "image_size": args.image_size,
    }  # fmt: skip
    probes: dict[str, Any] = {name: evals.create({"name": name} | data | task | settings[name]) for name in names}

    out, begun = paths.path(args.out), time.time()
    if paths.is_bucket(args.out):
        raise ValueError(f"--out {args.out} is in a bucket; features are mapped from the disk of this machine.")
    out.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        found = sweep.run(
            model, probes, out / "features", dtype=args.save_dtype, max_bytes=1e9 * args.max_gb, progress=bars
        )
    card = _card(args, model, data, counts, task, begun)
    card["probes"] = {name: curves.summary(probes[name], scores) for name, scores in found.items()}
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "curves.csv").write_text(curves.table(found))
    title = f"{args.model.rstrip('/').rpartition('/')[2]}, {counts['data']:,} images of {args.data.rpartition('/')[2]}"
    (out / "curves.png").write_bytes(plots.encoded(curves.figure(found, title)))
    if args.json:
        print(json.dumps(card, indent=2))
    else:
        _print(found, title)
        print(f"Wrote curves.png, curves.csv and card.json to {args.out}.")
    return 0


def _layers(text: str) -> tuple[Any, bool | None]:
    """ "1,8,pooler" → the layers, and whether the tower's own pooling is asked for; None where it can tell."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [part for part in parts if part not in ("all", "pooler")]
    if "all" in parts:
        if numbers:
            raise ValueError(f"--layers {text}: all layers include {numbers[0]}; leave the numbers out.")
        return "all", None
    try:
        return tuple(map(int, numbers)), "pooler" in parts
    except ValueError:
        raise ValueError(f'--layers {text}: want numbers and `pooler`, like 1,8,-1,pooler, or "all".') from None


def _settings(texts: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """["knn.k=[5,10]"] → {"knn": {"k": [5, 10]}}, with an entry for each of `names`."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        key, equals, value = text.partition("=")
        probe, dot, field = key.partition(".")
        if not (equals and dot) or probe not in found:
            raise ValueError(f"--set {text}: want PROBE.FIELD=VALUE, with a probe out of {', '.join(found)}.")
        try:
            found[probe][field] = json.loads(value)
        except ValueError:
            raise ValueError(f"--set {text}: {value} is no JSON; write numbers, [lists], true, null.") from None
    return found


def _card(args: Any, model: Any, data: Any, counts: Any, task: Any, begun: float) -> dict[str, Any]:
    import datetime
    import importlib.metadata

    import jax

    from pe_jax.evals import inference

    config = inference.vision_tower(model).config
    return {
        "model": args.model,
        "weights": inference.fingerprint(model),
        "dtype": config.dtype,
        "width": config.width,
        "depth": config.depth,
        "preprocess": inference.preprocess_of(model, args.image_size).to_dict(),
        "data": data,
        "images": counts,
        "setting_chosen_on": "tune" if "tune" in data else "data",
        **task,
        "features_dtype": args.save_dtype,
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {package: importlib.metadata.version(package) for package in ("pe-jax", "jax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - begun, 1),
    }


def _print(found: Any, title: str) -> None:
    import rich
    import rich.table

    from pe_jax.evals import curves

    table = rich.table.Table("layer")
    for name in found:
        table.add_column(curves.TITLES[name], justify="right")
    entries = list(dict.fromkeys(entry for scores in found.values() for entry in scores.entries))
    for entry in entries:
        cells = []
        for scores in found.values():
            if entry not in scores.best:
                cells.append("")
                continue
            text = f"{scores.best[entry]:.1%}"
            cells.append(f"[bold green]{text}[/]" if entry == scores.best_entry else text)
        layer = curves.layer_of(entry)
        table.add_row("pooled" if layer is None else str(layer), *cells)
    table.add_section()
    costs = [scores.facts["cost"] for scores in found.values()]
    table.add_row("seconds", *(f"{cost['seconds']:,.1f}" for cost in costs))
    table.add_row("tower TFLOPs", *(f"{cost['tower_flops'] / 1e12:,.3g}" for cost in costs))
    print(title)
    rich.print(table)
    shared = next((scores.facts["cost_shared"] for scores in found.values() if "cost_shared" in scores.facts), None)
    if shared:
        tera = shared["tower_flops"] / 1e12
        print(f"Pooled features, for all: {shared['seconds']:,.1f} s, {tera:,.3g} TFLOPs, {shared['images']:,} images.")

"""Look through a tower layer by layer: global tokens, attention distance, norms, rank, and which layers are alike.

  pe-jax analyze --model PE-Core-G14-448 --data photos/ --limit 500 --out analysis/g14
  pe-jax analyze --model runs/mine --data data/test.npz --out analysis/mine --json

DIR gets analysis.png (one page of figures), analysis.html (the same with the table, in one file), analysis.json,
layers.csv and cka.csv. One pass over the images, which need no labels; a few hundred are enough. What each figure means
stands in analysis.html. Needs the `viz` extra (matplotlib).
"""

import argparse
import json
import sys
import time
from typing import Any

from pe_jax.commands import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="images: a folder, any data set (see pe-jax data)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, local or gs://")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a pass, and CKA's minibatch (32)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a side; by default the model's own")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    import rich
    import rich.progress
    import rich.table
    from rich.console import Console

    from pe_jax import paths
    from pe_jax.data import sources
    from pe_jax.evals import analysis, inference, plots, records

    plots.require()
    data = sources.guess(args.data) | ({} if args.limit is None else {"limit": args.limit})
    asked = analysis.Analysis(data, args.batch_size, args.image_size)
    records.open(data)  # what is wrong with it is told before a model is loaded
    model = load_model(args)
    begun = time.time()
    with rich.progress.Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("images", total=None)
        found = asked.result(model, lambda done, total: bars.update(task, completed=done, total=total))
    facts: dict[str, Any] = {
        "model": args.model,
        "weights": inference.fingerprint(model),
        "dtype": inference.vision_tower(model).config.dtype,
        "preprocess": inference.preprocess_of(model, args.image_size).to_dict(),
        "data": data,
        "batch_size": args.batch_size,
        "seconds": round(time.time() - begun, 1),
    }
    out = paths.path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    title = f"{args.model.rstrip('/').rpartition('/')[2]}, {found.images:,} images of {args.data.rpartition('/')[2]}"
    png = plots.encoded(analysis.figure(found, title))
    document = facts | found.document()
    (out / "analysis.png").write_bytes(png)
    (out / "analysis.html").write_text(analysis.page(found, png, title, facts))
    (out / "analysis.json").write_text(json.dumps(document, indent=2) + "\n")
    (out / "layers.csv").write_text(analysis.table(found))
    (out / "cka.csv").write_text(analysis.cka_table(found))
    if args.json:
        print(json.dumps(document, indent=2))
        return 0
    shown = [name for name in _SHOWN if name in found.figures]
    table = rich.table.Table("layer", *(name.replace("_", " ") for name in shown), title=title)
    for column in table.columns:
        column.justify = "right"
    for layer in found.layers:
        values = {name: found.figures[name][layer] for name in shown}
        cells = ("" if value != value else f"{value:.{analysis.FIGURES[name][0]}f}" for name, value in values.items())
        table.add_row(str(layer), *cells)
    rich.print(table)
    print(f"Wrote analysis.html, analysis.png, analysis.json, layers.csv and cka.csv to {args.out}.")
    return 0


_SHOWN = ("top_share", "global_tokens", "distance", "norm_mean", "cosine_previous", "effective_rank")

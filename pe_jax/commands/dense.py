"""Dense probes of every layer: segmentation, depth, tracking, correspondence; curves, a table, and a picture.

  pe-jax dense --model PE-Core-B16-224 --task segmentation --train '{"name": "pairs", "path": "ADE/images/training",
      "maps": "ADE/annotations/training"}' --data ... --set classes=150 --out dense/ade
  pe-jax dense --model PE-Core-B16-224 --task depth --train '{"name": "listed", "path": "nyu/nyu_train.txt"}'
      --data '{"name": "listed", "path": "nyu/nyu_test.txt"}' --set head='"dpt"' eigen=true --out dense/nyu
  pe-jax dense --model PE-Core-B16-224 --task tracking --data DAVIS --out dense/davis
  pe-jax dense --model runs/mine --task correspondence --data photos --out dense/photos

DIR gets curves.png, curves.csv, card.json and, but for correspondence, picture.png. Layers count from 1, as the paper
does; 0 is what enters block 1, -1 the last block; "all" is every one of them, in one pass of the tower. Settings are
the fields of `pe_jax.evals.segmentation`, `.depth`, `.tracking` and `.correspondence`. Maps beside images are described
in `pe_jax.evals.maps`, clips in `pe_jax.evals.davis`.
"""

import argparse
import json
from typing import Any

from pe_jax.commands import Bars, add_model_arguments, load_model

TASKS = ("segmentation", "depth", "tracking", "correspondence")
SHOWN = 4  # images, and frames of a clip, in a picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--train", metavar="DATA", help="images with maps to learn from: segmentation, depth")
    parser.add_argument("--data", required=True, metavar="DATA", help="images, images with maps, or clips to judge")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--layers", default="all", metavar="1,8,-1", help='numbers, or "all" (default)')
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a side; by default the model's own")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images or clips of each, for a trial")
    parser.add_argument("--set", nargs="+", default=(), metavar="FIELD=VALUE", help="settings, values as JSON")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def run(args: argparse.Namespace) -> int:
    learns = args.task in ("segmentation", "depth")
    if learns != bool(args.train):
        raise ValueError(f"--task {args.task} {'needs --train' if learns else 'learns nothing; leave out --train'}.")
    config = {"name": args.task, "layers": _layers(args.layers)} | _settings(args.set)

    from pe_jax import evals, paths
    from pe_jax.evals import plots
    from pe_jax.evals.features import layer_name

    plots.require()
    config |= {name: _data(args, text) for name, text in (("train", args.train), ("data", args.data)) if text}
    if args.image_size is not None:
        config["image_size"] = args.image_size
    probe: Any = evals.create(config)
    out = paths.path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = load_model(args)
    with Bars() as bars:
        shown = {} if args.task == "correspondence" else {"show": 6 if args.task == "tracking" else SHOWN}
        found = probe.run(model, bars, **shown)

    title = f"{args.model.rstrip('/').rpartition('/')[2]}, {args.task}"
    names = list(map(layer_name, found.layers))
    card = _card(args, model, config, found)
    paths.write_text(out / "card.json", json.dumps(card, indent=2) + "\n")
    lines = [["layer", *found.figures]]
    lines += [[str(y), *(f"{v[i]:.6g}" for v in found.figures.values())] for i, y in enumerate(found.layers)]
    paths.write_text(out / "curves.csv", "".join(",".join(line) + "\n" for line in lines))
    pictures = {"curves.png": _curves(args.task, found, title)}
    if args.task != "correspondence":
        pictures["picture.png"] = _picture(args.task, probe, found, title)
    for name, figure in pictures.items():
        (out / name).write_bytes(plots.encoded(figure))
    if args.json:
        print(json.dumps(card, indent=2))
    else:
        _print(title, names, found)
        print(f"Wrote card.json, curves.csv, {' and '.join(pictures)} to {args.out}.")
    return 0


def _layers(text: str) -> Any:
    if text == "all":
        return "all"
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f'--layers {text}: want numbers, like 1,8,-1, or "all".') from None


def _settings(texts: Any) -> dict[str, Any]:
    """["epochs=5"] → {"epochs": 5}."""
    found = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: want FIELD=VALUE.")
        try:
            found[field] = json.loads(value)
        except ValueError:
            raise ValueError(f'--set {text}: {value} is no JSON; write numbers, [lists], "text", true, null.') from None
    return found


def _data(args: argparse.Namespace, text: str) -> Any:
    from pe_jax.data import sources

    limit = {} if args.limit is None else {"limit": args.limit}
    if args.task == "tracking":
        return (json.loads(text) if text.lstrip().startswith("{") else {"path": text}) | limit
    return sources.guess(text) | limit


def _best(task: str, found: Any) -> int:
    """The place of the layer that the paper would name."""
    values = next(iter(found.figures.values()))
    return int(values.argmin() if task == "depth" else values.argmax())


def _curves(task: str, found: Any, title: str) -> Any:
    from pe_jax.evals.dense_pictures import Panel, curves

    own = found.figures
    panels = {
        "segmentation": lambda: [Panel("share (%)", {"mIoU": own["miou"], "accuracy": own["accuracy"]}, scale=100)],
        "depth": lambda: [
            Panel("RMSE (m)", {"RMSE": own["rmse"]}, lowest=True),
            Panel("share (%)", {"delta1": own["delta1"]}, scale=100),
        ],
        "tracking": lambda: [Panel("share (%)", {"J&F": own["jf"], "J": own["j"], "F": own["f"]}, scale=100)],
        "correspondence": lambda: [
            Panel("matches (%)", {f"within {n.removeprefix('pck')} tokens": v for n, v in own.items()}, scale=100)
        ],
    }
    return curves(found.layers, panels[task](), title)


def _picture(task: str, probe: Any, found: Any, title: str) -> Any:
    from pe_jax.evals import dense_pictures, maps

    best = _best(task, found)
    places = dict.fromkeys((best, len(found.layers) - 1))
    if task == "tracking":
        title = f"{title}: {found.clip.name}"
        return dense_pictures.tracks(found, [found.layers[place] for place in places], title)
    rows = list(found.shown)
    data = maps.open(probe.data, "depth" if task == "depth" else "mask")
    images = [data.image(row) for row in rows]
    own = {f"layer {found.layers[place]}": [found.shown[row][place] for row in rows] for place in places}
    if task == "depth":
        return dense_pictures.depths(images, [data.metres(row) for row in rows], own, title)
    from pe_jax.evals.segmentation import lookup

    numbers = found.facts["classes"]
    truths = [lookup(numbers)(data.labels(row)) for row in rows]
    return dense_pictures.masks(images, truths, own, title, background=0 if numbers[0] == 0 else None)


def _card(args: argparse.Namespace, model: Any, config: Any, found: Any) -> dict[str, Any]:
    import datetime
    import importlib.metadata

    import jax

    from pe_jax.evals import inference
    from pe_jax.evals.features import layer_name

    best = _best(args.task, found)
    facts = dict(getattr(found, "facts", {}))
    if args.task == "tracking":
        facts["objects"] = {
            name: {key: values.tolist() for key, values in own.items()} for name, own in found.objects.items()
        }
    return {
        "model": args.model,
        "weights": inference.fingerprint(model),
        "dtype": inference.vision_tower(model).config.dtype,
        "preprocess": inference.preprocess_of(model, args.image_size).to_dict(),
        "evaluator": config,
        "best": layer_name(found.layers[best]),
        "figures": {
            layer_name(layer): {name: float(values[i]) for name, values in found.figures.items()}
            for i, layer in enumerate(found.layers)
        },
        **facts,
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {package: importlib.metadata.version(package) for package in ("pe-jax", "jax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _print(title: str, names: list[str], found: Any) -> None:
    import rich
    import rich.table

    table = rich.table.Table("layer")
    for name in found.figures:
        table.add_column(name, justify="right")
    for i, layer in enumerate(found.layers):
        cells = []
        for name, values in found.figures.items():
            best = values.argmin() if name in ("rmse", "absrel") or name.endswith("decay") else values.argmax()
            cells.append(f"[bold green]{values[i]:.3f}[/]" if i == best else f"{values[i]:.3f}")
        table.add_row(str(layer), *cells)
    print(title)
    rich.print(table)

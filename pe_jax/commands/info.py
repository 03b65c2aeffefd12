"""List the released models, or tell all about one model or checkpoint.

pe-jax info
pe-jax info PE-Core-L14-336
pe-jax info runs/mine --json
"""

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a released name, or the directory of a run or of weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import rich
    import rich.table

    from pe_jax.models import zoo

    if args.model is None:
        rows = [_summary(name, zoo.architecture(name)) for name in zoo.NAMES]
    elif args.model in zoo.NAMES:
        rows = [_summary(args.model, zoo.architecture(args.model))]
    else:
        from pe_jax import checkpoint

        metadata = checkpoint.metadata(args.model)
        rows = [_summary(args.model, zoo.architecture(metadata["architecture"])) | {"metadata": metadata}]
    if args.model is not None:
        config = zoo.architecture(rows[0].get("metadata", {}).get("architecture", args.model))
        rows[0]["architecture"] = zoo.to_dict(config)
    if args.json:
        print(json.dumps(rows if args.model is None else rows[0], indent=2))
        return 0
    table = rich.table.Table(title="Models" if args.model is None else args.model)
    if args.model is None:
        for column in rows[0]:
            table.add_column(column, justify="left" if column == "name" else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
    else:
        table.add_column("property")
        table.add_column("value")
        table.columns[0].no_wrap = True
        metadata = rows[0].pop("metadata", {})
        for name in ("step", "examples", "preprocess"):  # of a checkpoint; --json has all that is stored with it
            if name in metadata:
                rows[0][name] = metadata[name]
        for name, value in _flat(rows[0]):
            table.add_row(name, _cell(value))
    rich.print(table)
    return 0


def _summary(name: str, config: Any) -> dict[str, Any]:
    """What a reader compares models by; sizes of the vision tower at its native resolution."""
    from pe_jax.models import zoo
    from pe_jax.models.clip import CLIPConfig
    from pe_jax.types import split

    _, params = split(zoo.abstract(config))
    both = isinstance(config, CLIPConfig)
    vision = config.vision if both else config
    return {
        "name": name,
        "pixels": vision.image_size,
        "tokens": vision.grid**2 + vision.class_token,
        "width": vision.width,
        "blocks": vision.depth,
        "vision parameters": zoo.count(params["vision"] if both else params),
        "text parameters": zoo.count(params["text"]) if both else 0,
        "context": config.text.context_length if both else 0,
        "vision GFLOPs": float(f"{zoo.forward_flops(vision) / 1e9:.4g}"),
    }


def _flat(row: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in row.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

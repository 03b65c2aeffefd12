"""Convert weights between Orbax and other libraries' layouts, without PyTorch, checked byte for byte.

  pe-jax convert PE-Core-L14-336.pt weights/L14 --to orbax
  pe-jax convert runs/mine mine.safetensors --to meta
  pe-jax convert PE-Core-B16-224 timm_b16.pt --to timm
  pe-jax convert PE-Spatial-L14-448.pt l14.safetensors --to timm --model PE-Spatial-L14-448 --json
  pe-jax convert runs/lang PE-Lang-G14-448.safetensors --to meta --model PE-Lang-G14-448
  pe-jax convert runs/lang Perception-LM-mine/ --to hf

SRC is a .pt or .safetensors file (or folder of shards) of any layout, an Orbax weights directory, the workdir of a
run, a released name, or an hf:// or gs:// address. The suffix of DST, .pt or .safetensors, says which file to write;
with --to orbax it is a directory. timm holds the vision tower alone. Types are kept between Orbax and files; PyTorch
files are read into float32.

Of a vision-language model, a run's, transformers' Perception-LM or PLM's consolidated.pth, the tower is kept, which is
what its training was for. The whole model is written by --to hf, a folder for transformers, and --to plm, one for PLM's
own programs; neither has a tokenizer.
"""

import argparse
import json
from typing import Any

from etils import epath

_WHOLE = {"hf": "hf", "plm": "meta"}  # of vision-language models: our word, and the layout's name in `convert.vlm`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="file, directory, released name, hf:// or gs:// address")
    parser.add_argument("destination", metavar="DST", help="the .pt or .safetensors file, or the directory, to write")
    parser.add_argument(
        "--to", required=True, choices=("orbax", "meta", "timm", "open_clip", *_WHOLE), help="layout of DST"
    )
    parser.add_argument("--model", metavar="NAME", help="released name, where SRC does not say which model it is")
    parser.add_argument(
        "--resample-position", action="store_true", help="resample a position embedding of another grid (bilinear)"
    )
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from pe_jax import checkpoint, paths
    from pe_jax.convert import pe, weights
    from pe_jax.models import zoo

    destination = paths.path(args.destination)
    _check(destination, args.to)
    if args.to in _WHOLE:
        return _write_whole(args, destination)
    params, config, layout, model, record = _read(args)
    if model is not None:
        record = {"model": model} | record
    metadata: dict[str, Any] = record | {"architecture": zoo.to_dict(config)}
    if args.to == "orbax":
        written: dict[str, Any] = dict(pe.parameters(params))
        checkpoint.save_weights(destination, params, metadata)
        back = dict(pe.parameters(checkpoint.load_weights(destination)[0]))
    else:
        written = pe.from_params(params, config, args.to)
        if args.to == "timm":
            metadata["architecture"] = zoo.to_dict(_vision(config))
        weights.write(destination, written, metadata)
        back = weights.read(destination)
    differing = [name for name in written.keys() | back.keys() if not _same(written.get(name), back.get(name))]
    if differing:
        raise ValueError(f"{destination} does not hold what was written to it: {', '.join(sorted(differing)[:10])}.")
    left_out = ["text tower", "logit scale"] if args.to == "timm" and config is not _vision(config) else []
    report: dict[str, Any] = {
        "source": args.source,
        "destination": str(destination),
        "from": layout,
        "to": args.to,
        "model": model,
        "parts": _parts(written),
        "total": _total(written),
        "left_out": left_out,
        "verified": True,
        "preprocess": metadata["preprocess"],
        "preset_differences": _differences(metadata["preprocess"], {layout, args.to} & {"timm", "open_clip"}),
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def _check(destination: epath.Path, to: str) -> None:
    """What can be refused before anything is read."""
    from pe_jax import paths
    from pe_jax.convert import weights

    if to != "orbax" and paths.is_bucket(destination):
        raise ValueError(f"{destination}: a file is written on this machine; give a path here, and copy it from there.")
    paths.reach(destination)
    directory = to == "orbax" or to in _WHOLE
    if not directory and destination.suffix not in weights.SUFFIXES:
        raise ValueError(f"{destination}: with --to {to} the suffix must be one of {', '.join(weights.SUFFIXES)}.")
    if directory and destination.suffix in weights.SUFFIXES:
        raise ValueError(f"{destination}: --to {to} writes a directory; drop the suffix {destination.suffix}.")
    if directory and destination.exists():
        raise ValueError(f"{destination} exists; choose another name or delete it first.")


def _write_whole(args: argparse.Namespace, destination: epath.Path) -> int:
    """A vision-language model into a folder that other programs read."""
    from pe_jax import checkpoint, hub
    from pe_jax.convert import pe, vlm
    from pe_jax.models import zoo
    from pe_jax.models.vlm import VLMConfig

    path = hub.resolve(args.source, offline=args.offline)
    asked = zoo.architecture(args.model) if args.model else None
    if not (asked is None or isinstance(asked, VLMConfig)):
        raise ValueError(f"--model {args.model} has no decoder; --to {args.to} wants one of {', '.join(zoo.VLMS)}.")
    if checkpoint.is_checkpoint(path):
        params, found = checkpoint.load_weights(path)
        config = asked or zoo.architecture(found["architecture"])
        if not isinstance(config, VLMConfig):
            raise ValueError(f"{args.source} has no decoder; --to {args.to} is for vision-language models.")
    else:
        config, params = vlm.read(path, asked, dtype=None)
    layout = _WHOLE[args.to]
    vlm.write(destination, params, config, layout)
    written, back = (dict(pe.parameters(tree)) for tree in (params, vlm.read(destination, config, dtype=None)[1]))
    differing = [name for name in written.keys() | back.keys() if not _same(written.get(name), back.get(name))]
    if differing:
        raise ValueError(f"{destination} does not hold what was written to it: {', '.join(sorted(differing)[:10])}.")
    total = _total(written)
    if args.json:
        report = {"source": args.source, "destination": str(destination), "to": args.to, "total": total}
        print(json.dumps(report | {"model": args.model, "verified": True}, indent=2))
    else:
        print(
            f"Verified: {destination} read back, {total['parameters']:,} parameters and {total['bytes']:,} bytes equal."
        )
        print("Its programs want the tokenizer's files beside the weights.")
    return 0


def _read(args: argparse.Namespace) -> tuple[Any, Any, str, str | None, dict[str, Any]]:
    """Parameters, architecture, layout, model's name if known, and the record that travels with the weights."""
    from pe_jax import checkpoint, hub
    from pe_jax.convert import pe, vlm, weights
    from pe_jax.data.image import Preprocess
    from pe_jax.models import zoo
    from pe_jax.models.vlm import VLMConfig

    found: dict[str, Any]
    path = hub.resolve(args.source, offline=args.offline)
    name = args.model or (args.source if args.source in zoo.NAMES else None)
    if checkpoint.is_checkpoint(path):
        layout, had = "orbax", zoo.architecture(checkpoint.metadata(path)["architecture"])
        part = "vision" if isinstance(had, VLMConfig) else None  # the decoder may be too large for this machine
        params, found = checkpoint.load_weights(path, part=part)
        if isinstance(had, VLMConfig):
            params, had = params["vision"], had.vision
        config = zoo.architecture(args.model) if args.model else had
        if config != had:
            tensors = pe.from_params(params, had, "meta")
            params = pe.to_params(tensors, config, "meta", args.resample_position, dtype=None)
        name = args.model or found.get("model")
    else:
        tensors, found = weights.read(path), weights.read_metadata(path)
        if inside := vlm.tower_tensors(tensors):
            folder = epath.Path(path) if epath.Path(path).is_dir() else epath.Path(path).parent
            tensors, found = inside, {"architecture": zoo.to_dict(vlm.read_config(folder).vision)}
        if name is not None:
            config = zoo.architecture(name)
        elif "architecture" in found:
            name, config = found.get("model"), zoo.architecture(found["architecture"])
        else:
            name, config = pe.identify(tensors)
        layout, config = pe.recognise(tensors, config)
        params = pe.to_params(tensors, config, "auto", args.resample_position)
    size = _vision(config).image_size
    preprocess = Preprocess(size=size)  # PE's own, for files that carry no record
    if "preprocess" in found:
        preprocess = Preprocess.from_dict(found["preprocess"])
        if "architecture" in found and _vision(zoo.architecture(found["architecture"])).image_size != size:
            preprocess = Preprocess.from_dict({**found["preprocess"], "size": size})  # resampled to another grid
    record = {key: found[key] for key in ("step",) if key in found}
    return params, config, layout, name, record | {"preprocess": preprocess.to_dict()}


def _vision(config: Any) -> Any:
    return getattr(config, "vision", config)


def _same(one: Any, other: Any) -> bool:
    import numpy as np

    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def _total(tensors: dict[str, Any]) -> dict[str, Any]:
    types = sorted({str(tensor.dtype) for tensor in tensors.values()})
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "bytes": sum(tensor.size * tensor.dtype.itemsize for tensor in tensors.values()),
        "type": ", ".join(types),
    }


def _parts(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The totals of each part of the model, told apart by the names."""
    vision = ("visual.", "vision.")
    both = any(name.startswith(vision) for name in tensors)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        tower = "text" if both and not name.startswith(vision) else "vision"
        part = f"{tower} blocks" if "blocks." in name else f"{tower} rest"
        parts.setdefault("logit scale" if name in ("logit_scale", "log_scale") else part, {})[name] = tensor
    return {part: _total(members) for part, members in sorted(parts.items())}


def _differences(preprocess: dict[str, Any], layouts: set[str]) -> list[dict[str, Any]]:
    """Where the library's announced transform is not the one recorded with the weights."""
    from pe_jax.convert import pe

    return [
        {"library": layout, "field": field, "ours": preprocess[field], "theirs": value}
        for layout in sorted(layouts)
        for field, value in pe.PRESETS[layout].items()
        if preprocess[field] != value
    ]


def _print(report: dict[str, Any]) -> None:
    import rich
    import rich.markup
    import rich.table

    table = rich.table.Table(title=rich.markup.escape(f"{report['destination']} ({report['to']})"))
    for column in ("part", "tensors", "parameters", "bytes", "type"):
        table.add_column(column, justify="left" if column in ("part", "type") else "right")
    for part, row in {**report["parts"], "total": report["total"]}.items():
        table.add_row(part, *(f"{row[key]:,}" for key in ("tensors", "parameters", "bytes")), row["type"])
    rich.print(table)
    total = report["total"]
    print(
        f"Verified: {report['destination']} read back, {total['tensors']} tensors and {total['bytes']:,} bytes equal."
    )
    if report["left_out"]:
        print(f"Left out, as {report['to']} has no place for them: {' and '.join(report['left_out'])}.")
    fields = ", ".join(f"{name} {value}" for name, value in report["preprocess"].items())
    print(f"Preprocessing of these weights: {fields}.")
    for row in report["preset_differences"]:
        print(
            f"  {row['library']}'s preset disagrees: {row['field']} is {row['theirs']!r} there, {row['ours']!r} here."
        )

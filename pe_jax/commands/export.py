"""Export a model as StableHLO: one file with its weights that JAX runs without the model's code.

  pe-jax export --model PE-Core-B16-224 --what image --out b16-image.stablehlo
  pe-jax export --model PE-Core-B16-224 --what text --out b16-text.stablehlo --batch 100
  pe-jax export --model PE-Spatial-G14-448 --what features --layers 32,-1 --weights-beside --platforms tpu \\
      --out g14.stablehlo

What a user of the file must know (preprocessing, context length, layers, versions) goes into FILE.json beside it. Where
this machine is one of --platforms, the file is read back and compared with the model on random input. Load it by
`pe_jax.export.load(FILE)`, or by `jax.export.deserialize` where pe_jax is not installed.
"""

import argparse
import json
from typing import Any

from pe_jax.commands import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, local or gs://")
    parser.add_argument("--what", default="image", help="image (default), text, or features")
    parser.add_argument(
        "--layers", metavar="8,-1", help="of features: numbers separated by commas; the last by default"
    )
    parser.add_argument("--batch", default="any", metavar="N", help="images or texts of a call, or any (default)")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="where the file shall run (cpu,cuda,tpu)")
    parser.add_argument("--floats", action="store_true", help="images as normalised float32 instead of uint8")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a side; by default the model's own")
    parser.add_argument(
        "--weights-beside", action="store_true", help="weights in FILE.safetensors; needed above two gigabytes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.batch != "any" and not args.batch.isdigit():
        raise ValueError(f'--batch {args.batch}: want a number, or "any".')
    try:
        layers = None if args.layers is None else tuple(int(number) for number in args.layers.split(","))
    except ValueError as error:
        raise ValueError(f"--layers {args.layers}: want numbers like 8,-1 (written --layers=-1,8).") from error

    import pe_jax
    from pe_jax import export

    # On one device: the file is of a function that knows no mesh.
    model = pe_jax.load(args.model, args.weights, offline=args.offline, dtype=args.dtype)
    metadata = export.save(
        model,
        args.out,
        args.what,
        layers=layers,
        batch=None if args.batch == "any" else int(args.batch),
        platforms=tuple(args.platforms.split(",")),
        floats=args.floats,
        image_size=args.image_size,
        beside=args.weights_beside,
        name=args.model,
    )
    off = _difference(model, args.out, metadata)
    if args.json:
        print(json.dumps(metadata | {"difference": off}, indent=2))
        return 0
    given = metadata["input"]
    shape = ["any" if n is None else n for n in given["shape"]]
    size = metadata["bytes"] + (metadata["weights_bytes"] if metadata["weights"] == "beside" else 0)
    print(f"{args.out}: {given['dtype']} {shape} → {', '.join(metadata['outputs'])}, {size / 1e6:,.1f} MB")
    print(f"for {', '.join(metadata['platforms'])}; what its user must know is in {args.out}.json")
    if off is None:
        print("Not compared with the model: this machine is none of these platforms.")
    else:
        print(f"Read back and compared with the model: {off:.1e} apart at most, relative to the largest output.")
    return 0


def _difference(model: Any, path: str, metadata: dict[str, Any]) -> float | None:
    """How far the file's output on random input is from the model's; None where it does not run here."""
    import jax
    import numpy as np

    from pe_jax import export

    if not export.runs_here(metadata):
        return None
    random = np.random.default_rng(0)
    shape = [metadata["batch"] or 2, *metadata["input"]["shape"][1:]]
    if metadata["what"] == "text":
        given: Any = model.tokenize(["a photo of a cat"] * shape[0])
    elif metadata["input"]["dtype"] == "uint8":
        given = random.integers(0, 256, shape, np.uint8)
    else:
        given = random.uniform(-1, 1, shape).astype(np.float32)
    pairs = zip(
        jax.tree.leaves(export.load(path)(given)), jax.tree.leaves(export.own(model, metadata, given)), strict=True
    )
    pairs = [(np.asarray(got, np.float32), np.asarray(want, np.float32)) for got, want in pairs]
    return max(float(np.abs(got - want).max() / np.abs(want).max()) for got, want in pairs)

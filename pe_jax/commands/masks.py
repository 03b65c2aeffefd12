"""Find and draw every mask of an image with SAM 2.1, asked at the points of a grid.

  pe-jax masks --model SAM-2.1-L --weights sam2.1_hiera_large.pt street.jpg --out masks.png
  pe-jax masks --model ./sam2.1-hiera-tiny street.jpg --out masks.pdf --points 16 --json > masks.json

--model is a folder or file of weights: Meta's .pt, or safetensors of Hugging Face's Sam2Model or Sam2VideoModel; or it
is the name of the architecture, with --weights beside it. --json prints each mask with its box, scores, point and run
lengths as COCO has them. Raise --iou or --stability for fewer and surer masks. Needs the `viz` extra (matplotlib).
"""

import argparse
import dataclasses
import json
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="weights, or one of SAM-2.1-T, -S, -B+ and -L with --weights")
    parser.add_argument("--weights", help="a .pt or .safetensors file, or folder, with the weights of --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure to write: .png, .pdf or .svg")
    parser.add_argument("--points", type=int, default=32, help="along each side of the grid (32)")
    parser.add_argument("--iou", type=float, default=0.8, help="masks must be thought better than this (0.8)")
    parser.add_argument("--stability", type=float, default=0.95, help="masks must be this stable (0.95)")
    parser.add_argument("--overlap", type=float, default=0.7, help="of two boxes that share more, one stays (0.7)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import math

    import numpy as np

    from pe_jax import paths
    from pe_jax.data.image import decode
    from pe_jax.evals import masks, plots

    format = plots.format_of(args.out)
    plots.require()
    if args.points < 1:
        raise ValueError(f"--points {args.points} must be 1 or more.")
    model = _load(args)
    pixels = np.asarray(decode(args.image))
    found = masks.find(
        model,
        pixels,
        points_per_side=args.points,
        chunk=math.gcd(args.points**2, 64),
        min_iou=args.iou,
        min_stability=args.stability,
        max_overlap=args.overlap,
    )
    out = paths.path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(plots.encoded(masks.figure(pixels, found), format))
    if args.json:
        report: list[dict[str, Any]] = [
            {
                "segmentation": mask.runs(),
                "area": mask.area,
                "box": mask.box,
                "predicted_iou": mask.iou,
                "stability": mask.stability,
                "point": mask.point,
            }
            for mask in found
        ]
        print(json.dumps({"image": args.image, "picture": args.out, "masks": report}))
    else:
        print(f"{args.out}: {len(found)} masks of {3 * args.points**2} candidates")
    return 0


def _load(args: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pe_jax import hub
    from pe_jax.convert import sam2, weights
    from pe_jax.models import zoo
    from pe_jax.types import split

    named = args.model in zoo.SAM2
    if named and args.weights is None:
        raise ValueError(
            f"{args.model} says the architecture; give its weights too: --weights FILE, such as Meta's "
            "sam2.1_hiera_large.pt or a folder of facebook/sam2.1-hiera-large."
        )
    path = hub.resolve(args.weights or args.model)
    config, params = sam2.read(path, zoo.sam2(args.model) if named else None)
    if left_out := sam2.memory(weights.read(path)):
        print(f"left out {len(left_out)} tensors of the video memory, such as {left_out[0]}", file=sys.stderr)
    graphdef, _ = split(sam2.abstract(dataclasses.replace(config, dtype=args.dtype)))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))

"""Draw what lies inside a tower: principal components of tokens, attention, or likeness to a point, at any layers.

  pe-jax picture --model PE-Core-L14-336 cat.jpg dog.jpg --layers 1,8,16,24 --out features.png
  pe-jax picture --model PE-Core-G14-448 street.jpg --kind attention --layers 20,30,33,40,50 --out global.pdf
  pe-jax picture --model PE-Spatial-L14-448 cat.jpg --kind similarity --at 310,205 --size 896 --out ear.png

pca colours tokens so that like features have like colours, in each layer by itself or, with --projection joint, in all
of them alike. attention shows what each token receives from all others; with --at, what the token at that point gives.
similarity is the cosine of all tokens to the one at --at.

A point is X,Y in pixels of the image file from its top left corner, or in percent of its sides: 50%,30%. Give one for
all images, or one for each. --size is a number of pixels or HEIGHTxWIDTH, any multiples of the patch. The maps are
drawn in the image's own proportions, also where the model squashes it to a square. Needs the `viz` extra (matplotlib).
"""

import argparse
import json
from typing import Any

from pe_jax.commands import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders to search for them")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure to write: .png, .pdf or .svg")
    parser.add_argument("--kind", default="pca", help="pca (default), attention or similarity")
    parser.add_argument("--layers", metavar="1,8,-1", help='numbers separated by commas, or "all"; by default six')
    parser.add_argument("--at", nargs="+", metavar="X,Y", help="the point of similarity, or that attends")
    parser.add_argument("--size", metavar="PIXELS", help="of the model's input; by default its own")
    parser.add_argument("--projection", default="layer", help="of pca: layer (default) or joint")
    parser.add_argument("--title", help="above the figure")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from pe_jax import paths
    from pe_jax.commands.classify import find_files
    from pe_jax.evals import inference, pictures, plots

    format, size = plots.format_of(args.out), _size(args.size)
    plots.require()
    if args.kind == "similarity" and not args.at:
        raise ValueError("--kind similarity needs a point: --at X,Y in pixels of the image, or --at 50%,50%.")
    images = find_files(args.images)
    model = load_model(args)
    preprocess = inference.preprocess_of(model)
    points = None
    if args.at:
        if len(args.at) not in (1, len(images)):
            raise ValueError(f"--at has {len(args.at)} points for {len(images)} images; give one for all, or one each.")
        texts = args.at * (len(images) if len(args.at) == 1 else 1)
        points = [
            point(text, pictures.image_size(image, preprocess), image)
            for text, image in zip(texts, images, strict=True)
        ]
    layers = _layers(args.layers, inference.vision_tower(model).config.depth, args.kind)
    strip = pictures.strip(model, images, layers, args.kind, size=size, projection=args.projection, points=points)
    out = paths.path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(plots.encoded(pictures.figure(strip, args.title), format))
    report: dict[str, Any] = {"picture": args.out, "kind": args.kind, "images": images, "layers": list(strip.maps)}
    report["grid"] = list(strip.grid)
    if args.kind == "attention":
        report["peak"] = {layer: [round(float(own.max()), 3) for own in maps] for layer, maps in strip.maps.items()}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        rows, columns = strip.grid
        print(f"{args.out}: {len(images)} images, layers {', '.join(map(str, strip.maps))}, {rows} x {columns} tokens")
    return 0


def point(text: str, size: tuple[int, int], name: str) -> tuple[float, float]:
    """ "X,Y" as fractions of an image of `size` (width, height) pixels.

    Raises:
      ValueError: if it cannot be read, or lies outside the image.
    """
    parts = text.split(",")
    try:
        x, y = (
            float(part[:-1]) / 100 if part.endswith("%") else float(part) / side
            for part, side in zip(parts, size, strict=True)
        )
    except ValueError as error:
        raise ValueError(f"--at {text} must be X,Y in pixels, such as 310,205, or in percent: 50%,30%.") from error
    if not (0 <= x <= 1 and 0 <= y <= 1):
        width, height = size
        raise ValueError(
            f"--at {text} lies outside {name}, which is {width} pixels wide and {height} high; "
            "x counts from the left, y from the top."
        )
    return x, y


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        height, by, width = text.partition("x")
        return (int(height), int(width)) if by else int(height)
    except ValueError as error:
        raise ValueError(f"--size {text} must be a number of pixels, or HEIGHTxWIDTH such as 384x512.") from error


def _layers(text: str | None, depth: int, kind: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "all":
        return tuple(range(1 if kind == "attention" else 0, depth + 1))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f'--layers {text} must be numbers separated by commas, such as 1,8,-1, or "all".') from error

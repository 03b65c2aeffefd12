"""Classify images and videos zero-shot: which of your labels fits each best.

  pe-jax classify --model PE-Core-B16-224 photos/ --labels "a cat,a dog,a bird"
  pe-jax classify --model runs/mine img1.jpg img2.png --labels-file names.txt --templates imagenet --json
  pe-jax classify --model PE-Core-L14-336 clips/ --labels "juggling balls,playing piano" --templates kinetics

The probabilities are the softmax over your labels of scale * cosine, so they say which label fits best, not whether
any does; the cosine is shown beside them. A video is eight of its frames, and their mean. What cannot be read is
reported and left out.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="images and videos, or folders to search for them")
    parser.add_argument(
        "--model", required=True, help="a released PE-Core name, or the directory of a run or of weights"
    )
    parser.add_argument("--weights", help="a .pt or .safetensors file, or directory, with the weights of --model")
    parser.add_argument("--labels", help='names separated by commas: "a cat,a dog"')
    parser.add_argument("--labels-file", help="a text file with one name a line, or a JSON list")
    parser.add_argument(
        "--templates",
        default="photo",
        help="photo (default), imagenet, kinetics, none, or a file of lines such as 'a photo of a {}.'",
    )
    parser.add_argument("--top", type=int, default=5, help="labels shown for each (5)")
    parser.add_argument("--batch-size", type=int, default=32, help="images, or frames, in a forward pass (32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--offline", action="store_true", help="use only weights that are already on this machine")


def run(args: argparse.Namespace) -> int:
    from pe_jax.evals import zero_shot

    if (args.labels is None) == (args.labels_file is None):
        raise ValueError('give the labels either as --labels "a cat,a dog" or as --labels-file FILE.')
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1.")
    labels = zero_shot.classes(args.labels_file if args.labels is None else args.labels.split(","))
    templates = zero_shot.templates(args.templates)
    paths = find_files(args.files, videos=True)
    good, bad = readable(paths)
    for path, reason in bad:
        print(f"skipped {path}: {reason}", file=sys.stderr)

    import pe_jax
    from pe_jax.evals import inference

    model = inference.require_text(
        pe_jax.load(args.model, args.weights, offline=args.offline), "zero-shot classification"
    )
    results = classify(model, good, labels, templates, args.batch_size)
    if args.json:
        print(json.dumps(_document(args.model, labels, templates, results, bad, args.top), indent=2))
    else:
        _print_table(results, args.top)
    if bad:
        print(f"{len(bad)} of {len(paths)} files could not be read.", file=sys.stderr)
    return 0 if good else 1


def find_files(paths: Sequence[str], *, videos: bool = False) -> list[str]:
    """Files as they are given, folders searched at every depth for files that end like images, or videos, in order.

    Raises:
      ValueError: for a path that does not exist, or a folder without such a file.
    """
    wanted, what = SUFFIXES, "image"
    if videos:
        wanted, what = SUFFIXES + _video_suffixes(), "image or video"
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(str(file) for file in pathlib.Path(path).rglob("*") if file.suffix.lower() in wanted)
            if not inside:
                raise ValueError(f"the folder {path} holds no {what}; looked for {' '.join(wanted)}.")
            found += inside
        elif os.path.exists(path):
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist; give {what} files or folders.")
    return found


def _video_suffixes() -> tuple[str, ...]:
    from pe_jax.data.video import ENDINGS

    return tuple(f".{ending}" for ending in ENDINGS)


def _is_video(path: str) -> bool:
    return path.lower().endswith(_video_suffixes())


def readable(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths that decode, and the others each with the reason; decoded twice rather than all held in memory."""
    from pe_jax.data import image, video

    good, bad = [], []
    for path in paths:
        try:
            video.sample(path) if _is_video(path) else image.decode(path)
            good.append(path)
        except (image.BadImage, video.BadVideo) as error:
            bad.append((path, str(error)))
    return good, bad


def classify(
    model: Any, paths: Sequence[str], labels: Sequence[str], templates: Sequence[str], batch_size: int = 32
) -> list[dict[str, Any]]:
    """`{"image" or "video", "scores": [{"label", "probability", "cosine"}, ...]}` for each path, best label first."""
    import numpy as np

    from pe_jax.evals import inference, video, views, zero_shot

    if not paths:
        return []
    weights = zero_shot.classifier(model, labels, templates)
    moving = np.array([_is_video(path) for path in paths])
    cosines = np.empty((len(paths), len(weights)), np.float32)
    for kind in set(moving.tolist()):
        own = [path for path, is_video in zip(paths, moving, strict=True) if is_video == kind]
        if kind:
            found = video.embed(model, own, views.Views.of(model, None), unit_frames=False, batch_size=batch_size)
            (embedded,) = found.values()
        else:
            embedded = inference.embed_images(model, own, min(batch_size, len(own)))
        cosines[moving == kind] = embedded @ weights.T
    logits = np.exp(float(model.log_scale[...])) * cosines
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    return [
        {
            "video" if moving[row] else "image": path,
            "scores": [
                {"label": labels[i], "probability": float(probabilities[row, i]), "cosine": float(cosines[row, i])}
                for i in np.argsort(-cosines[row], kind="stable")
            ],
        }
        for row, path in enumerate(paths)
    ]


def _document(
    model: str,
    labels: Sequence[str],
    templates: Sequence[str],
    results: Sequence[dict[str, Any]],
    bad: Sequence[tuple[str, str]],
    top: int,
) -> dict[str, Any]:
    return {
        "model": model,
        "labels": list(labels),
        "templates": list(templates),
        "images": [result | {"scores": result["scores"][:top]} for result in results if "image" in result],
        "videos": [result | {"scores": result["scores"][:top]} for result in results if "video" in result],
        "skipped": [{"video" if _is_video(path) else "image": path, "reason": reason} for path, reason in bad],
    }


def _print_table(results: Sequence[dict[str, Any]], top: int) -> None:
    import rich
    import rich.markup
    import rich.table

    if not results:
        return
    table = rich.table.Table("file", "label")
    for name in ("probability", "cosine"):
        table.add_column(name, justify="right")
    for result in results:
        for place, score in enumerate(result["scores"][:top]):
            table.add_row(
                rich.markup.escape(result.get("image") or result["video"]) if place == 0 else "",
                rich.markup.escape(score["label"]),
                f"{score['probability']:.1%}",
                f"{score['cosine']:.3f}",
                style="bold" if place == 0 else None,
                end_section=place == min(top, len(result["scores"])) - 1,
            )
    rich.print(table)

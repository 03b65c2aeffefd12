"""Write the features of many images to files: any layers, in shards, going on where a killed run stopped.

  pe-jax features --model PE-Core-L14-336 photos/ --out features/photos
  pe-jax features --model PE-Spatial-L14-448 "train-{000..099}.tar" --what tokens --layers 8,-1 --save-dtype float16 \\
      --out features/train
  pe-jax features --model runs/mine data/test.jsonl --what embedding --format npz --out features/test --json

DATA is a folder of images, a file or folder of shards, or a source as JSON (see `pe-jax data`). pooled is the mean of
the patch tokens, class the class token, tokens all of them (the class token first), embedding what text is compared
with. Layers count from 1, as the paper does; 0 is what enters block 1, -1 the last block; "all" is every one of them.

On several machines start the same command on each: `--distributed` on a TPU pod, `--part 0/4` to `--part 3/4` anywhere
else. They write shards of their own into the one folder and do not talk to each other. Read the folder in Python by
`pe_jax.evals.features.open(DIR)`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from pe_jax.commands import add_model_arguments, load_model, part_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a folder of images, any data set, or a source as JSON")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, local or gs://")
    parser.add_argument("--what", default="pooled", help="pooled (default), class, tokens or embedding")
    parser.add_argument("--layers", metavar="8,-1", help='numbers separated by commas, or "all"; by default the last')
    parser.add_argument("--format", default="safetensors", help="safetensors (default), npz or array_record")
    parser.add_argument("--save-dtype", default="float32", help="float32 (default), float16 or bfloat16")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a forward pass, on all devices (64)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a side; by default the model's own")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--shards", type=int, metavar="N", help="files; by default of 10,000 images, half a GB at most")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="unreadable images to leave out (0)")
    parser.add_argument("--part", metavar="I/N", help="this is process I of N, counted from 0")
    parser.add_argument("--distributed", action="store_true", help="this is one host of a TPU pod")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    part = None if args.part is None else part_of(args.part)
    layers = _layers(args.layers)

    import jax

    if args.distributed:  # before anything asks for devices
        jax.distributed.initialize()
    from pe_jax.data import sources
    from pe_jax.evals import features

    data = sources.guess(args.data) | ({} if args.limit is None else {"limit": args.limit})
    extraction = features.Extraction(
        load_model(args, devices=jax.local_devices()),
        data,
        args.out,
        what=args.what,
        layers=layers,
        format=args.format,
        dtype=args.save_dtype,
        batch_size=args.batch_size,
        image_size=args.image_size,
        shards=args.shards,
        part=part,
        max_bad=args.max_bad,
        name=args.model,
    )
    print(plan(extraction), file=sys.stderr)
    with _progress(extraction.waiting) as progress:
        manifest = extraction.run(progress)
    bad = [{"row": row, "reason": reason} for row, reason in sorted(extraction.bad.items())]
    for entry in bad[:20]:
        print(f"left out: {entry['reason']}", file=sys.stderr)
    if bad[20:]:
        print(f"left out: {len(bad) - 20} more, see the manifest", file=sys.stderr)
    report = {
        "folder": args.out,
        "complete": manifest["complete"],
        "shards": manifest["shards"],
        "records": extraction.records,
        "left_out": len(bad),
        "arrays": manifest["arrays"],
    }
    if args.json:
        print(json.dumps(report | {"bad": bad}, indent=2))
    elif manifest["complete"]:
        print(f"{manifest['rows']:,} rows of {', '.join(manifest['arrays'])} in {args.out}")
    else:
        print(f"this part of {args.out} is done; other processes are still to finish theirs")
    return 0


def plan(extraction: Any) -> str:
    """What a run is about to write, in a line or two."""
    arrays = ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in extraction.arrays.items())
    total, left = extraction.records * extraction.row_bytes, extraction.size
    text = f"{extraction.records:,} images, each {arrays}: {_size(total)} in {extraction.shards:,} shards."
    if left != total:
        text += f"\nFor this process {len(extraction.pending):,} shards are left, {_size(left)}."
    return text


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class _progress:
    """Shows how far it is and how long it takes: a bar in a terminal, elsewhere a line every half minute."""

    def __init__(self, total: int, every_seconds: float = 30.0):
        self._total, self._every, self._bar = total, every_seconds, None

    def __enter__(self) -> Callable[[int], None]:
        self._start = self._told = time.monotonic()
        if self._total and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (progress.MofNCompleteColumn(), progress.BarColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("images", total=self._total)
            self._bar.start()
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _tell(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if now - self._told >= self._every:
            self._told = now
            print(eta(done, self._total, now - self._start), file=sys.stderr, flush=True)


def eta(done: int, total: int, seconds: float) -> str:
    """A line such as "1,280 of 50,000 images, 64.0 a second, 12:41 left"."""
    rate = done / seconds
    left = round((total - done) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
    return f"{done:,} of {total:,} images, {rate:.1f} a second, {clock} left"


def _layers(text: str | None) -> tuple[int, ...] | str | None:
    if text is None or text == "all":
        return text
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f'--layers {text}: want numbers like 8,-1 (written --layers=-1,8), or "all".') from error

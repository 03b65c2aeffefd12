"""Make, look at and convert data sets.

  pe-jax data digits data/digits
  pe-jax data inspect data/digits/train.jsonl --sheet sheet.png
  pe-jax data convert "shards/train-{000..099}.tar" data/train --shards 64

A source is a path (.jsonl, .csv, .tsv, .npz, .tar, .array_record, a folder of shards, images or videos) or a source
config as JSON, such as '{"name": "tfds", "dataset": "mnist", "split": "test"}'.
"""

import argparse
import collections
import json
import math
import sys
from typing import Any

_TILE = 160  # pixels of a picture on a sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="{digits,inspect,convert}")

    digits = actions.add_parser("digits", help="write scikit-learn's handwritten digits as images and captions")
    digits.add_argument("out", metavar="OUT", help="folder to write")
    digits.add_argument("--size", type=int, default=32, help="pixels, height and width (32)")
    digits.add_argument("--seed", type=int, default=0, help="of the split into train and test (0)")

    inspect = actions.add_parser("inspect", help="count records and bad images or videos, draw the first ones")
    inspect.add_argument("source", metavar="SOURCE", help="path or JSON")
    inspect.add_argument("--sheet", metavar="PNG", help="write the first records with their captions as a picture")
    inspect.add_argument("--show", type=int, default=24, help="records on the sheet (24)")
    inspect.add_argument("--limit", type=int, default=0, help="records to decode; 0 is all (0)")

    convert = actions.add_parser("convert", help="copy any source into sharded ArrayRecord files")
    convert.add_argument("source", metavar="SOURCE", help="path or JSON")
    convert.add_argument("out", metavar="OUT", help="folder to write; shards that are complete are kept")
    convert.add_argument("--shards", type=int, default=0, help="number of files; 0 is one per 10,000 records (0)")
    convert.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read")

    for action in (digits, inspect, convert):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    result = {"digits": _digits, "inspect": _inspect, "convert": _convert}[args.action](args)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        for name, value in result.items():
            if isinstance(value, list):
                print(f"{name}:")
                for line in value:
                    print(f"  {line}")
            else:
                print(f"{name}: {value}")
    return 1 if result.get("bad") else 0


def _digits(args: argparse.Namespace) -> dict[str, Any]:
    from pe_jax.data import digits

    counts = digits.write(args.out, size=args.size, seed=args.seed)
    return {"folder": args.out, **counts}


def _open(text: str) -> tuple[dict[str, Any], Any, Any]:
    """Config, source and captions of a SOURCE argument."""
    from pe_jax.data import sources

    config = sources.guess(text)
    captions = {k: config.pop(k) for k in ("templates", "label", "classes", "caption") if k in config}
    config.pop("weight", None)
    return config, sources.create(config), sources.Captions(**captions)


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    import PIL.Image

    from pe_jax.data import sources
    from pe_jax.data.image import BadImage, decode
    from pe_jax.data.video import BadVideo, Reader

    config, source, captions = _open(args.source)
    count = min(args.limit or len(source), len(source))
    sizes: collections.Counter = collections.Counter()
    modes: collections.Counter = collections.Counter()
    fields: collections.Counter = collections.Counter()
    codecs: collections.Counter = collections.Counter()
    frames, rates = [], []
    bad, shown = [], []
    for i in _progress(range(count), "reading", quiet=args.json):
        where = source.where(i)
        try:
            record = source[i]
            fields.update(record.keys())
            caption = captions(record, 0.0, where)
            if "video" in record:
                video = Reader(record["video"])
                pictures = [PIL.Image.fromarray(frame) for frame in video.sample()]
                frames.append(len(video))
                rates.append(video.fps)
                codecs[video.codec] += 1
                about = f"{len(video)} frames" + (f", {video.fps:.4g} a second" if video.fps else "")
            else:
                pictures, about = [decode(record["image"])], ""
        except (BadImage, BadVideo, sources.BadRecord) as error:
            message = str(error)
            bad.append(message if where in message else f"{where}: {message}")
            continue
        sizes[pictures[0].size] += 1
        modes[pictures[0].mode] += 1
        if len(shown) < args.show:
            pictures = [_scaled(picture, _TILE) for picture in pictures]  # not whole, of which there may be gigabytes
            shown.append((pictures, f"{about}: {caption}" if about else caption, caption))
    widths, heights = [w for w, _ in sizes] or [0], [h for _, h in sizes] or [0]
    result: dict[str, Any] = {
        "source": config["name"],
        "records": len(source),
        "read": count,
        "bad": len(bad),
        "fields": ", ".join(f"{name} ({n})" for name, n in fields.most_common()),
        "width": f"{min(widths)} to {max(widths)}",
        "height": f"{min(heights)} to {max(heights)}",
        "modes": ", ".join(f"{mode} ({n})" for mode, n in modes.most_common()),
    }
    if frames:
        result |= {
            "frames": f"{min(frames)} to {max(frames)}",
            "fps": f"{min(rates):.4g} to {max(rates):.4g}",
            "codecs": ", ".join(f"{codec} ({n})" for codec, n in codecs.most_common()),
        }
    result["captions"] = [caption for _, _, caption in shown[:5]]
    if bad:
        result["bad_records"] = bad if args.json else [*bad[:20], *([f"and {len(bad) - 20} more"] if bad[20:] else [])]
    if args.sheet:
        if not shown:
            raise ValueError("there is no good record to draw; leave out --sheet to see what is wrong.")
        pairs = [(pictures, text) for pictures, text, _ in shown]
        page = strips(pairs) if frames else sheet([(pictures[0], text) for pictures, text in pairs])
        page.save(args.sheet)
        result["sheet"] = args.sheet
    return result


def sheet(pairs: list[tuple[Any, str]], tile: int = _TILE) -> Any:
    """A PIL image of (image, caption) pairs in a grid, `tile` pixels each."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    columns = min(6, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    text, gap = 44, 8
    page = PIL.Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + text + gap) + gap), "white")
    draw, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(12)
    for k, (image, caption) in enumerate(pairs):
        x, y = gap + k % columns * (tile + gap), gap + k // columns * (tile + text + gap)
        small = _scaled(image, tile)
        page.paste(small, (x + (tile - small.width) // 2, y + (tile - small.height) // 2))
        draw.multiline_text((x, y + tile + 2), _wrapped(caption, font, tile), fill="black", font=font, spacing=1)
    return page


def strips(rows: list[tuple[list[Any], str]], tile: int = _TILE) -> Any:
    """A PIL image of (frames, caption) pairs, one below the other, each frame at most `tile` pixels wide and high."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    text, gap, between = 18, 8, 2
    small = [[_scaled(frame, tile) for frame in frames] for frames, _ in rows]
    widths = [sum(frame.width + between for frame in frames) - between for frames in small]
    heights = [max(frame.height for frame in frames) for frames in small]
    page = PIL.Image.new("RGB", (max(widths) + 2 * gap, sum(heights) + len(rows) * (text + gap) + gap), "white")
    draw, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(12)
    top = gap
    for frames, height, (_, caption) in zip(small, heights, rows, strict=True):
        left = gap
        for frame in frames:
            page.paste(frame, (left, top))
            left += frame.width + between
        draw.text((gap, top + height + 2), _wrapped(caption, font, max(widths), 1), fill="black", font=font)
        top += height + text + gap
    return page


def _scaled(image: Any, tile: int) -> Any:
    import PIL.Image

    scale = tile / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    how = PIL.Image.Resampling.BILINEAR if scale < 1 else PIL.Image.Resampling.NEAREST
    return image.convert("RGB").resize(size, how)


def _wrapped(text: str, font: Any, width: int, lines: int = 3) -> str:
    done, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            done.append(line)
            line = word
        else:
            line = longer
    done.append(line)
    return "\n".join(done if len(done) <= lines else [*done[: lines - 1], done[lines - 1] + " …"])


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from pe_jax import paths
    from pe_jax.data import sources

    config, source, _ = _open(args.source)
    shards = args.shards or math.ceil(len(source) / 10_000)
    if not 0 < shards <= len(source):
        raise ValueError(f"--shards {shards} must lie between 1 and the number of records, {len(source)}.")
    out = paths.path(args.out)
    paths.reach(out)
    out.mkdir(parents=True, exist_ok=True)
    # Which conversion the finished shards belong to: going on with another source must not mix the two.
    plan = {"source": config, "records": len(source), "shards": shards, "skip_bad": args.skip_bad}
    note = out / "conversion.json"
    if note.exists() and json.loads(note.read_text()) != json.loads(json.dumps(plan)):
        raise ValueError(f"{out} holds another conversion ({note.read_text().strip()}); choose an empty folder.")
    paths.write_text(note, json.dumps(plan))

    written = kept = 0
    bad: list[str] = []

    def records(begin: int, end: int):
        for i in range(begin, end):
            try:
                record = source[i]
                yield record | {kind: _encoded(record[kind], kind) for kind in ("image", "video") if kind in record}
            except ValueError as error:
                if not args.skip_bad:
                    raise ValueError(f"{error} Use --skip-bad to leave such records out.") from error
                bad.append(str(error))

    for k in _progress(range(shards), "shards", quiet=args.json):
        path = out / f"data-{k:05d}-of-{shards:05d}.array_record"
        if path.exists():
            kept += 1
            continue
        written += sources.write_shard(path, records(len(source) * k // shards, len(source) * (k + 1) // shards))
    for message in bad:
        print(f"left out: {message}", file=sys.stderr)
    return {"folder": str(out), "shards": shards, "kept": kept, "written_records": written, "left_out": len(bad)}


def _encoded(medium: Any, kind: str) -> bytes:
    """The encoded bytes of a record's image or video; an image that is an array becomes a PNG."""
    import io

    import numpy as np

    from pe_jax.data.image import decode, read_bytes

    if isinstance(medium, bytes):
        return medium
    if isinstance(medium, np.ndarray):
        if kind == "video":
            raise ValueError(f"a video of decoded frames {list(medium.shape)} cannot be converted; give its file.")
        buffer = io.BytesIO()
        decode(medium).save(buffer, "PNG")
        return buffer.getvalue()
    return read_bytes(medium)


def _progress(items: Any, what: str, quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    if quiet or not sys.stderr.isatty():
        return items
    return track(items, description=what, console=Console(stderr=True))

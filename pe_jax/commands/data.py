"""Make, look at and convert data sets.

  pe-jax data digits data/digits
  pe-jax data inspect data/digits/train.jsonl --sheet sheet.png
  pe-jax data convert "shards/train-{000..099}.tar" data/train --shards 64
  pe-jax data rows talks.jsonl --tokenizer llama/tokenizer.model --max-tiles 4 --sheet row.png

A source is a path (.jsonl, .csv, .tsv, .npz, .tar, .array_record, a folder of shards, images or videos) or a source
config as JSON, such as '{"name": "tfds", "dataset": "mnist", "split": "test"}'.
"""

import argparse
import collections
import itertools
import json
import math
import re
import sys
from typing import Any

_TILE = 160  # pixels of a picture on a sheet
# What may stand at visual places, where no model says it: of PLM, of Llama 3 (the same id), of Qwen 2 VL.
_IMAGE_TOKENS = ("<|image|>", "<|reserved_special_token_0|>", "<|image_pad|>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="{digits,inspect,convert,rows}")

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

    rows = actions.add_parser("rows", help="pack conversations into rows: how full they get, and what one looks like")
    rows.add_argument("source", metavar="SOURCE", nargs="+", help='path or JSON, with a "weight" if there are several')
    rows.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="tokenizer.json, tokenizer.model or their folder"
    )
    rows.add_argument("--template", default="llama3", help="llama3, qwen2 or plain (llama3)")
    rows.add_argument("--length", type=int, default=6144, help="tokens of a row (6144)")
    rows.add_argument("--chunks", type=int, default=24, help="image chunks of a row (24)")
    rows.add_argument("--image-size", type=int, default=448, help="pixels of a chunk (448)")
    rows.add_argument("--patch-size", type=int, default=14, help="of the model, in pixels (14)")
    rows.add_argument("--pooling", type=int, default=2, help="of the model's visual tokens, each way (2)")
    rows.add_argument("--max-tiles", type=int, default=1, help="of an image; 1 is the whole alone (1)")
    rows.add_argument("--frames", type=int, default=8, help="most frames of a video (8)")
    rows.add_argument("--groups", type=int, default=4, help="groups of 32 rows to measure (4)")
    rows.add_argument("--row", type=int, default=0, help="the row to draw (0)")
    rows.add_argument("--seed", type=int, default=0, help="of the order (0)")
    rows.add_argument("--sheet", metavar="PNG", help="draw that row: its chunks, its text, and what is asked in green")

    for action in (digits, inspect, convert, rows):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    result = {"digits": _digits, "inspect": _inspect, "convert": _convert, "rows": _rows}[args.action](args)
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

    from pe_jax.data import chat, sources
    from pe_jax.data.image import BadImage, decode
    from pe_jax.data.video import BadVideo, Reader

    config, source, captions = _open(args.source)
    count = min(args.limit or len(source), len(source))
    sizes: collections.Counter = collections.Counter()
    modes: collections.Counter = collections.Counter()
    fields: collections.Counter = collections.Counter()
    codecs: collections.Counter = collections.Counter()
    frames, rates = [], []
    bad, shown, texts = [], [], []
    for i in _progress(range(count), "reading", quiet=args.json):
        where = source.where(i)
        try:
            record = source[i]
            fields.update(record.keys())
            if "conversations" in record or "question" in record:
                caption = " / ".join(text for _, text in chat.from_record(record, where).turns)
            else:
                caption = captions(record, 0.0, where)
            if "video" in record:
                video = Reader(record["video"])
                pictures = [PIL.Image.fromarray(frame) for frame in video.sample()]
                frames.append(len(video))
                rates.append(video.fps)
                codecs[video.codec] += 1
                about = f"{len(video)} frames" + (f", {video.fps:.4g} a second" if video.fps else "")
            else:
                images = record.get("image", [])  # conversations may be of text alone
                pictures, about = [decode(one) for one in (images if isinstance(images, list) else [images])], ""
        except (BadImage, BadVideo, sources.BadRecord) as error:
            message = str(error)
            bad.append(message if where in message else f"{where}: {message}")
            continue
        texts += [caption] * (len(texts) < min(args.show, 5))
        if not pictures:
            continue
        sizes[pictures[0].size] += 1
        modes[pictures[0].mode] += 1
        if len(shown) < args.show:
            pictures = [_scaled(picture, _TILE) for picture in pictures]  # not whole, of which there may be gigabytes
            shown.append((pictures, f"{about}: {caption}" if about else caption))
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
    result["captions"] = texts
    if bad:
        result["bad_records"] = bad if args.json else [*bad[:20], *([f"and {len(bad) - 20} more"] if bad[20:] else [])]
    if args.sheet:
        if not shown:
            raise ValueError("there is no good record to draw; leave out --sheet to see what is wrong.")
        several = max(len(pictures) for pictures, _ in shown) > 1
        page = strips(shown) if several else sheet([(pictures[0], text) for pictures, text in shown])
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


def _rows(args: argparse.Namespace) -> dict[str, Any]:
    from pe_jax.data import packing, sources, tokenizers

    tokenizer = tokenizers.load(args.tokenizer)
    named = [tokenizer.specials[name] for name in _IMAGE_TOKENS if name in tokenizer.specials]
    config = {
        "sources": [sources.guess(source) for source in args.source],
        **{name: getattr(args, name) for name in ("tokenizer", "template", "length", "chunks", "max_tiles", "frames")},
        "max_bad_records": 1000,
    }
    shape = {"image_size": args.image_size, "patch_size": args.patch_size, "pooling": args.pooling}
    token = (named or [tokenizer.vocab_size])[0]
    with packing.create(config, batch_size=1, seed=args.seed, image_token=token, start=args.row, **shape) as loader:
        result: dict[str, Any] = {k: round(v, 4) for k, v in loader.survey(args.groups).items()}
        if args.sheet:
            chunk_tokens = (args.image_size // args.patch_size // args.pooling) ** 2
            row_sheet({name: value[0] for name, value in next(loader).items()}, tokenizer, chunk_tokens).save(
                args.sheet
            )
            result["sheet"] = args.sheet
        # A number of its own, since `bad` makes the command fail, and such records are replaced.
        result["bad_records"] = sum(loader.bad.values())
        result["too_long"] = sum(loader.too_long.values())
    return result


def row_sheet(row: dict[str, Any], tokenizer: Any, chunk_tokens: int, width: int = 1200, tile: int = 112) -> Any:
    """A PIL image of one packed row: of each sample its chunks, numbered, and its text, what is asked on green.

    Special tokens are grey, and a run of visual tokens is its chunks' numbers in brackets.
    """
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    text, small = PIL.ImageFont.load_default(14), PIL.ImageFont.load_default(12)
    gap, line = 12, 20
    names = {token: name for name, token in tokenizer.specials.items()}
    # First laid out, then drawn, when the height is known: (kind, left, top, what, colour).
    marks: list[tuple[str, float, int, Any, Any]] = []
    top = gap
    for segment in range(1, int(row["segments"].max()) + 1):
        here = (row["segments"] == segment).nonzero()[0]
        slots, targets = row["slots"][here].tolist(), row["targets"][here].tolist()
        chunks = sorted({slot // chunk_tokens for slot in slots if slot >= 0})
        asked = sum(target >= 0 for target in targets)
        title = f"sample {segment}: {len(here)} tokens, {asked} asked, {len(chunks)} chunks"
        marks.append(("title", gap, top, title, (40, 70, 160)))
        top += line + 4
        for k, chunk in enumerate(chunks):
            column, across = k % ((width - gap) // (tile + 6)), (width - gap) // (tile + 6)
            left = gap + column * (tile + 6)
            place = top + k // across * (tile + line)
            marks.append(("image", left, place, row["chunks"][chunk], None))
            marks.append(("note", left, place + tile, f"chunk {chunk}", (110, 110, 110)))
        if chunks:
            top += math.ceil(len(chunks) / ((width - gap) // (tile + 6))) * (tile + line) + 4
        # A target is the next place's token, or the one after the last.
        tokens = row["tokens"][here].tolist()
        tokens = [*tokens, targets[-1]]
        green = [False, *(target >= 0 for target in targets)]
        left = float(gap)
        for kind, run in _runs(tokens, green, [*slots, -1], names):
            if kind[0] == "visual":
                first, last = run[0] // chunk_tokens, run[-1] // chunk_tokens
                shown = f"[chunk {first}]" if first == last else f"[chunks {first} to {last}]"
            else:
                shown = "".join(names[token] for token in run) if kind[0] == "special" else tokenizer.decode(run)
            colour = {"visual": (40, 70, 160), "special": (130, 130, 130), "text": (0, 0, 0)}[kind[0]]
            for word in _words(shown):
                if word == "\n":
                    left, top = float(gap), top + line
                    continue
                wide = text.getlength(word)
                if left + wide > width - gap and left > gap:
                    left, top = float(gap), top + line
                marks.append(("asked" if kind[1] else "text", left, top, word, colour))
                left += wide
        top += line + gap
    page = PIL.Image.new("RGB", (width, top), "white")
    draw = PIL.ImageDraw.Draw(page)
    for kind, x, y, what, colour in marks:
        if kind == "image":
            page.paste(PIL.Image.fromarray(what).resize((tile, tile)), (int(x), y))
            continue
        if kind == "asked":
            draw.rectangle((x, y, x + text.getlength(what), y + line - 3), fill=(200, 240, 200))
        if kind == "title":
            draw.line((x, y - 4, width - gap, y - 4), fill=(200, 200, 200))
        draw.text((x, y), what, fill=colour, font=small if kind == "note" else text)
    return page


def _runs(tokens: list[int], asked: list[bool], slots: list[int], names: dict[int, str]) -> Any:
    """Neighbours of one kind: (("text", "special" or "visual", whether asked for), their tokens or slots)."""
    kinds = [
        ("visual" if slot >= 0 else "special" if token in names else "text", green)
        for token, green, slot in zip(tokens, asked, slots, strict=True)
    ]
    for kind, group in itertools.groupby(range(len(tokens)), key=kinds.__getitem__):
        places = list(group)
        yield kind, [slots[i] if kind[0] == "visual" else tokens[i] for i in places]


def _words(text: str) -> list[str]:
    """Pieces between which a line may break; a newline is one of its own."""
    return re.findall(r"\n|[^\S\n]*[^\s]{1,60}|[^\S\n]+", text)


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


def _encoded(medium: Any, kind: str) -> Any:
    """The encoded bytes of a record's image or video, or of each of its images; an array becomes a PNG."""
    import io

    import numpy as np

    from pe_jax.data.image import decode, read_bytes

    if isinstance(medium, bytes):
        return medium
    if isinstance(medium, list):  # of images
        return [_encoded(one, kind) for one in medium]
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

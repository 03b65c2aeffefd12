"""Images per second of the input pipeline beside a torch DataLoader doing the same work: python -m benchmarks.loader

Runs in the environment of `make parity`. Both read the same JPEG files, crop and resize to 224 px, change brightness
and saturation, flip, tokenise the caption and batch by 64; ours with a thread per core, torch's with a worker process
per core (PIL, torchvision's transforms, open_clip's tokenizer). What is timed is the steady state: from the first batch
of a fresh loader to the last, with no consumer behind it. The files lie in the page cache.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import turns

SIZE, BATCH, CONTEXT = 224, 64, 32
SIDES = {"1080p": (1920, 1080), "512 px": (768, 512)}  # width, height
RECORDS = 4096  # more than a run reads
SCALE, RATIO, JITTER = (0.08, 1.0), (0.75, 1.33), 0.32


def make_files(folder: Path, photos: Path, side: tuple[int, int]) -> Path:
    """The photos at one size as JPEG of quality 90, and the list of records, which names each many times."""
    import PIL.Image
    import PIL.ImageOps

    names = []
    for path in sorted(photos.glob("coco_*.jpg")):
        with PIL.Image.open(path) as image:
            name = f"{side[1]}_{path.name}"
            PIL.ImageOps.fit(image.convert("RGB"), side).save(folder / name, quality=90)
            names.append(name)
    if not names:
        raise FileNotFoundError(f"{photos} holds no photos; point PE_JAX_DATA at the sample data.")
    listing = folder / f"{side[1]}.jsonl"
    rows = ({"image": names[i % len(names)], "caption": f"a photo of thing number {i}"} for i in range(RECORDS))
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return listing


def prepare(program: str, listing: Path, batches: int) -> Callable[[], Any]:
    """What a worker runs: `batches` batches after the first one of a fresh loader."""
    start = {"ours": _ours, "torch": _torch}[program](listing)

    def run() -> dict[str, Any]:
        iterator, close = start()
        first = next(iterator)
        began = time.perf_counter()
        for _ in range(batches):
            images, tokens = next(iterator)
        seconds = time.perf_counter() - began
        close()
        return {"seconds": seconds, "shapes": [list(images.shape), list(tokens.shape)], "mean": float(first[0].mean())}

    return run


def _ours(listing: Path) -> Callable[[], tuple[Iterator[Any], Callable[[], None]]]:
    from pe_jax.data import pipeline

    config = {
        "sources": [{"name": "jsonl", "path": str(listing)}],
        "augment": {
            "crop_scale": SCALE, "crop_ratio": RATIO, "brightness": JITTER, "saturation": JITTER, "hflip": 0.5,
        },
        "threads": os.cpu_count(),
    }  # fmt: skip

    def start() -> tuple[Iterator[Any], Callable[[], None]]:
        loader = pipeline.create(config, batch_size=BATCH, image_size=SIZE, context_length=CONTEXT, seed=0)
        return ((batch["image"], batch["text"]) for batch in loader), loader.close

    return start


def _torch(listing: Path) -> Callable[[], tuple[Iterator[Any], Callable[[], None]]]:
    import torch

    from tests.parity import conftest

    assert conftest  # makes torchvision importable beside a CPU torch
    import open_clip
    import PIL.Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(SIZE, SCALE, RATIO, v2.InterpolationMode.BILINEAR, antialias=True),
            v2.ColorJitter(brightness=JITTER, saturation=JITTER),
            v2.RandomHorizontalFlip(),
        ]
    )
    tokenize = open_clip.SimpleTokenizer(context_length=CONTEXT)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            with PIL.Image.open(listing.parent / rows[index]["image"]) as image:
                return transform(image.convert("RGB")), tokenize(rows[index]["caption"])[0]

    def start() -> tuple[Iterator[Any], Callable[[], None]]:
        loader = torch.utils.data.DataLoader(
            Pairs(), BATCH, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True, worker_init_fn=_one_thread
        )
        iterator = iter(loader)
        batches = ((images.numpy(), tokens.numpy()) for images, tokens in iterator)
        return batches, iterator._shutdown_workers  # pyright: ignore[reportAttributeAccessIssue]

    return start


def _one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


def same(found: Mapping[str, Any]) -> None:
    shapes = {program: sorted(np.prod(shape) for shape in out["shapes"]) for program, out in found.items()}
    assert shapes["ours"] == shapes["torch"], shapes
    # other crops of the same photos: their mean brightness agrees roughly
    assert abs(found["ours"]["mean"] - found["torch"]["mean"]) < 15, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIDES, help="default: both")
    parser.add_argument("--batches", type=int, default=6, help="timed in a round")
    parser.add_argument("--data", default=os.environ.get("PE_JAX_DATA", "../shared/data"), help="the sample data")
    parser.add_argument("--listing", type=Path, help=argparse.SUPPRESS)
    turns.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return turns.serve(lambda: prepare(args.worker, args.listing, args.batches))
    report = turns.report("jax", "grain", "torch", "torchvision", "pillow", "numpy") | {"loader": []}
    cores, images = os.cpu_count() or 1, args.batches * BATCH
    with tempfile.TemporaryDirectory() as folder:
        for name in args.size or SIDES:
            listing = make_files(Path(folder), Path(args.data) / "photos", SIDES[name])
            print(f"{name} JPEG to {SIZE} px, {cores} cores", flush=True)
            arguments = ("--listing", str(listing), "--batches", str(args.batches))
            result = turns.measure("benchmarks.loader", ("ours", "torch"), arguments, args, same)
            report["loader"].append({"size": name, "images": images} | result)
            turns.show(result, ("ours", "torch"), "images/s a core", lambda s: f"{images / s / cores:.1f}")
    if not args.no_save:
        turns.save("loader", report)


if __name__ == "__main__":
    main()

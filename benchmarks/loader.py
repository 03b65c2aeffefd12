"""Images per second of the input pipeline beside a torch DataLoader doing the same work: python -m benchmarks.loader

Runs in the environment of `make parity`. Both read the same JPEG files, crop and resize to 224 px, change brightness
and saturation, flip, tokenise the caption and batch by 64; ours with a thread per core, torch's with a worker process
per core (PIL, torchvision's transforms, open_clip's tokenizer). What is timed is the steady state: from the first batch
of a fresh loader to the last, with no consumer behind it. The files lie in the page cache. They are made of the
photographs at $PE_JAX_DATA/photos, or where that is unset of the two that come with scikit-learn.
"""

import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.results import OURS

TORCH = "torch's DataLoader"
SIZE, BATCH, CONTEXT = 224, 64, 32
RECORDS = 4096  # more than a run reads
SCALE, RATIO, JITTER = (0.08, 1.0), (0.75, 1.33), 0.32


def photographs() -> list[Path]:
    """The sample data's at $PE_JAX_DATA/photos, or the two that come with scikit-learn."""
    if data := os.environ.get("PE_JAX_DATA"):
        found = sorted(Path(data, "photos").glob("coco_*.jpg"))
        if not found:
            raise FileNotFoundError(
                f"{data}/photos has no coco_*.jpg; point PE_JAX_DATA at the sample data, or unset it."
            )
        return found
    import sklearn.datasets

    return sorted(Path(name) for name in sklearn.datasets.load_sample_images().filenames)


def make_files(folder: Path, side: tuple[int, int]) -> Path:
    """The photographs at one size as JPEG of quality 90, and the list of records, which names each many times."""
    import PIL.Image
    import PIL.ImageOps

    names = []
    for path in photographs():
        with PIL.Image.open(path) as image:
            PIL.ImageOps.fit(image.convert("RGB"), side).save(folder / path.name, quality=90)
            names.append(path.name)
    listing = folder / "records.jsonl"
    rows = ({"image": names[i % len(names)], "caption": f"a photo of thing number {i}"} for i in range(RECORDS))
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return listing


def prepare(start: Callable[[Path], Any], side: tuple[int, int], batches: int) -> Callable[[], Any]:
    """What a worker runs: `batches` batches after the first one of a fresh loader.

    Args:
      start: from a list of records to a call that gives a fresh iterator of batches, and what closes it.
      side: width and height of the JPEG files.
      batches: how many are timed.
    """
    folder = tempfile.TemporaryDirectory()  # goes with the process, which `run` keeps it for
    fresh = start(make_files(Path(folder.name), side))

    def run(_: Any = folder) -> dict[str, Any]:
        iterator, close = fresh()
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


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    ours = found[OURS]
    for program, out in found.items():
        sizes, own = (sorted(math.prod(shape) for shape in it["shapes"]) for it in (out, ours))
        assert sizes == own, f"{program} gives batches of {out['shapes']}, ours {ours['shapes']}"
        # other crops of the same photos: their mean brightness agrees roughly
        assert abs(ours["mean"] - out["mean"]) < 15, f"{program}: mean pixel {out['mean']:.0f}, ours {ours['mean']:.0f}"


def _case(side: tuple[int, int], batches: int) -> turns.Case:
    width, height = side
    photos = "photos" if os.environ.get("PE_JAX_DATA") else "two photos"
    rate = "images/s a core", batches * BATCH / (os.cpu_count() or 1)
    settings = {"side": side, "batches": batches}
    return turns.Case(f"{photos} of {width} x {height} to {SIZE} px", settings, (OURS, TORCH), rate)


BENCHMARK = turns.Benchmark(
    "loader",
    __doc__ or "",
    {
        OURS: turns.Program(functools.partial(prepare, _ours)),
        TORCH: turns.Program(functools.partial(prepare, _torch), ("torch", "torchvision", "open_clip")),
    },
    cases=[_case(side, 6) for side in ((1920, 1080), (768, 512))],
    quick=[_case((384, 256), 1)],
    same=same,
    packages=("jax", "grain", "torch", "torchvision", "pillow", "numpy"),
    rounds=7,
    processes=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

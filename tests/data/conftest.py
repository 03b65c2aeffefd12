"""One small image-text set written in every format that `pe_jax.data.sources` reads."""

import csv
import dataclasses
import io
import json
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest

from pe_jax.data import sources

CAPTIONS = ["a red square", "", "two dogs", "naïve café ☕", "x, y and z", 'says "hi"', "seven", "eight", "nine", "ten"]
CAPTIONS[1] = "a blue bird"


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass
class Set:
    folder: pathlib.Path
    images: list[bytes]
    captions: list[str]

    def config(self, name: str) -> dict:
        path = {
            "jsonl": "list.jsonl",
            "csv": "list.csv",
            "packed": "packed.npz",
            "webdataset": "tars",
            "array_record": "records",
        }[name]
        return {"name": name, "path": str(self.folder / path)}


def write_tar(path: pathlib.Path, images: list[bytes], captions: list[str], first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (image, caption) in enumerate(zip(images, captions, strict=True), first):
            for ending, data in (("png", image), ("txt", caption.encode()), ("json", json.dumps({"n": i}).encode())):
                info = tarfile.TarInfo(f"part/{i:03d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_list(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_set(folder: pathlib.Path, count: int) -> Set:
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (20 + 3 * i % 17, 30 - i % 7, 3), np.uint8)) for i in range(count)]
    captions = [CAPTIONS[i % len(CAPTIONS)] + (f" {i}" if i >= len(CAPTIONS) else "") for i in range(count)]
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / f"images/{i:03d}.png").write_bytes(image)
    rows = [{"image": f"images/{i:03d}.png", "caption": c, "n": i} for i, c in enumerate(captions)]
    write_list(folder / "list.jsonl", rows)
    with open(folder / "list.csv", "w", newline="") as file:
        out = csv.DictWriter(file, ["image", "caption", "n"])
        out.writeheader()
        out.writerows(rows)
    data = np.frombuffer(b"".join(images), np.uint8)
    np.savez(folder / "packed.npz", data=data, offsets=np.cumsum([0, *map(len, images)]))
    write_list(folder / "packed.jsonl", [{"i": i, "caption": c, "n": i} for i, c in enumerate(captions)])
    (folder / "tars").mkdir()
    (folder / "records").mkdir()
    for shard in range(2):
        part = slice(count * shard // 2, count * (shard + 1) // 2)
        write_tar(folder / f"tars/shard-{shard:02d}.tar", images[part], captions[part], part.start)
        fields = zip(images[part], captions[part], range(part.start, part.stop), strict=True)
        sources.write_shard(
            folder / f"records/data-{shard:05d}-of-00002.array_record",
            [{"image": image, "caption": caption, "n": n} for image, caption, n in fields],
        )
    return Set(folder, images, captions)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Set:
    """23 records; read only."""
    return write_set(tmp_path_factory.mktemp("small"), 23)

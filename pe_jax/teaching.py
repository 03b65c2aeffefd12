"""What a teacher of spatial alignment says of many images, as records to train from (PE §5).

A teacher such as SAM, with its 1,024 masks an image, costs a good part of an update. Where images and augmentations are
fixed it is asked once: a record holds an image's pixels after augmentation, encoded without loss, and the teacher's
vector for each place of the student's grid, a byte a number. A folder of them, sharded ArrayRecord and a manifest, is a
source to train from.
"""

import concurrent.futures
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from pe_jax import paths
from pe_jax.data import sources
from pe_jax.data.image import Augment, Preprocess, generator
from pe_jax.evals import inference, records
from pe_jax.stages import teachers

MANIFEST = "manifest.json"
VERSION = 1  # of the folder's layout; raised when a reader of today could not read it
_SHARD_BYTES = 512 << 20  # a shard is lost with the process that was filling it, and held twice in memory


class Writing:
    """One request for a teacher's vectors, checked against teacher, data and folder; `run` computes what is missing.

    Attributes:
      tokens, width: N and T of the vectors [N, T] of an image.
      rows: how many there will be, `copies` of each image.
      pending: the shards that this process has still to write.
    """

    def __init__(
        self,
        teacher: Any,
        model: Any,
        data: Mapping[str, Any],
        out: str,
        *,
        image_size: int,
        patch_size: int,
        augment: Mapping[str, Any],
        copies: int = 1,
        seed: int = 0,
        batch_size: int = 8,
        shards: int | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        """Checks everything that can be known before the first image is read, and begins the folder.

        Raises:
          ValueError: for a wrong argument, a folder that holds something else, or a disk that is too small.
        """
        if image_size % patch_size:
            raise ValueError(f"--image-size {image_size} is not a multiple of --patch-size {patch_size}.")
        for word, value in (("copies", copies), ("batch-size", batch_size), ("shards", shards or 1)):
            if value < 1:
                raise ValueError(f"--{word} {value} must be at least 1.")
        self._teacher, self._model, self._grid = teacher, model, (image_size // patch_size, image_size // patch_size)
        self._augment = Augment.from_dict(augment) if augment else None
        self._size, self._seed, self._batch_size = (image_size, image_size), seed, batch_size
        self._squash = Preprocess(image_size)
        opened = records.open(data)
        self._source, self._images = opened.source, len(opened)
        self.rows = copies * self._images
        pixels = jax.ShapeDtypeStruct((1, *self._size, 3), np.uint8)
        self.tokens, self.width = jax.eval_shape(self._forward, model, pixels).shape[1:]
        self._out = paths.path(out)
        paths.reach(out)
        request = {
            "weights": inference.fingerprint(model), "teacher": repr(teacher), "data": dict(data), "rows": self.rows,
            "image_size": image_size, "patch_size": patch_size, "augment": dict(augment), "seed": seed,
        }  # fmt: skip
        self.shards = self._begin(json.loads(json.dumps(request)), shards, part[1])
        self.pending = [s for s in range(part[0], self.shards, part[1]) if not self._file(s).exists()]
        if not paths.is_bucket(out) and (free := shutil.disk_usage(self._out).free) < self.waiting * self.row_bytes:
            raise ValueError(
                f"{self.waiting * self.row_bytes / 1e9:.1f} GB are to be written and {out} has {free / 1e9:.1f} GB "
                "free; take fewer images or points, or another folder."
            )

    @property
    def row_bytes(self) -> int:
        """Of a record at most: a byte for each number of the teacher, and the pixels, of which PNG saves a part."""
        return self.tokens * self.width + 3 * self._size[0] * self._size[1]

    @property
    def waiting(self) -> int:
        """Rows that this process has still to write."""
        return sum(len(self._of(shard)) for shard in self.pending)

    @property
    def row_flops(self) -> int:
        """That the teacher takes for a row."""
        return self._teacher.flops(None, self._size)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> bool:
        """Writes what is pending; whether all shards of all processes are then there.

        Raises:
          ValueError: naming the image, for one that cannot be read. What was finished stays.
        """
        if self.pending:
            with concurrent.futures.ThreadPoolExecutor(1) as writer:
                written: concurrent.futures.Future[Any] | None = None
                records, done = self._records(), 0
                for shard in self.pending:
                    rows = []
                    for _ in self._of(shard):
                        rows.append(next(records))
                        done += 1
                        progress(done)
                    if written is not None:
                        written.result()  # two shards in memory at most
                    written = writer.submit(sources.write_shard, str(self._file(shard)), rows)
                if written is not None:
                    written.result()
        return all(self._file(shard).exists() for shard in range(self.shards))

    def _records(self) -> Iterator[dict[str, Any]]:
        held: dict[int, np.ndarray] = {}  # pixels on their way through the device
        rows = [row for shard in self.pending for row in self._of(shard)]

        def load(row: int) -> np.ndarray:
            image = row % self._images
            where = self._source.where(image)
            try:
                picture = sources.medium(self._source[image], "image", where)
                if self._augment is None:
                    held[row] = self._squash.pixels(picture)
                else:
                    held[row] = self._augment(picture, self._size, generator(self._seed, row))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            return held[row]

        at = 0
        for out, count in inference.batches(self._model, self._forward, rows, load, min(self._batch_size, len(rows))):
            vectors = np.asarray(out)
            for i in range(count):
                row, packed = rows[at + i], io.BytesIO()
                PIL.Image.fromarray(held.pop(row)).save(packed, "PNG", compress_level=3)
                yield {
                    "row": row, "key": self._source.where(row % self._images), "image": packed.getvalue(),
                    "teacher": vectors[i].tobytes(),
                }  # fmt: skip
            at += count

    def _forward(self, model: Any, pixels: jax.Array) -> jax.Array:
        images = pixels.astype(jnp.float32) / 127.5 - 1
        return teachers.quantised(self._teacher.features(model, images, self._grid, None).astype(jnp.float32))

    def _of(self, shard: int) -> range:
        return range(self.rows * shard // self.shards, self.rows * (shard + 1) // self.shards)

    def _file(self, shard: int) -> epath.Path:
        return self._out / f"teacher-{shard:05d}-of-{self.shards:05d}.array_record"

    def _begin(self, request: dict[str, Any], shards: int | None, parts: int) -> int:
        """Writes the manifest, or checks the one that is there; the number of shards."""
        file = self._out / MANIFEST
        if file.exists():
            manifest = json.loads(file.read_text())
            had = manifest["request"]
            if differing := [key for key in had | request if had.get(key) != request.get(key)]:
                told = "; ".join(f"{k} is {had.get(k)!r:.60} there and {request.get(k)!r:.60} here" for k in differing)
                raise ValueError(f"{self._out} holds another teacher's words: {told}. Choose an empty folder.")
            if shards not in (None, manifest["shards"]):
                raise ValueError(f"{self._out} was begun with {manifest['shards']} shards; leave the number out.")
            return manifest["shards"]
        if self._out.exists() and any(self._out.iterdir()):
            raise ValueError(f"{self._out} holds files and no {MANIFEST}; choose an empty folder.")
        self._out.mkdir(parents=True, exist_ok=True)
        shards = min(self.rows, shards or max(-(-self.rows * self.row_bytes // _SHARD_BYTES), parts))
        shape = {"teacher": {"shape": [self.tokens, self.width], "dtype": "int8"}}
        manifest = {"version": VERSION, "request": request, "arrays": shape, "shards": shards}
        paths.write_text(file, json.dumps(manifest, indent=2))
        return shards

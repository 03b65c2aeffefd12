"""Features of many images as files: any layers in one pass, in shards of which none is written twice or counts in part.

A folder of features holds

  manifest.json                           what was asked for and, once all shards are there, what came of it
  features-00002-of-00010.safetensors     the arrays of a shard, a row an image (or .npz, or .array_record)
  features-00002-of-00010.jsonl           a line a record of that shard: number, key, fields, or why it has no row

An array is called `layer_08` after its block, counted from 1 (`layer_00` enters block 1), or `embedding`. The arrays of
a shard are put under their name last and whole, so a shard is done where that name exists. Each process writes shards
of its own with its own devices and needs no other process: one that dies holds nobody up.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from pe_jax import paths
from pe_jax.data import sources
from pe_jax.data.image import BadImage, Preprocess
from pe_jax.evals import inference, records
from pe_jax.models.clip import CLIP
from pe_jax.models.layers import resolve_layers

VERSION = 1  # of the folder's layout; raised when a reader of today could not read it
WHAT = ("pooled", "class", "tokens", "embedding")
FORMATS = ("safetensors", "npz", "array_record")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MANIFEST = "manifest.json"
# A shard is lost with the process that was filling it: at most so many images, and bytes held twice in memory.
_SHARD_RECORDS, _SHARD_BYTES = 10_000, 512 << 20
_SAFETENSORS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}

Arrays = dict[str, np.ndarray]


@functools.cache
def forward(
    preprocess: Preprocess, what: str, layers: tuple[int, ...], dtype: str, pooler: bool = False
) -> Callable[[inference.Model, jax.Array], dict[str, jax.Array]]:
    """The pass from uint8 pixels to named arrays [B, ...] of `dtype`.

    Args:
      preprocess: how the pixels are normalised.
      what: "tokens" [B, N, D], with the class token first where the tower has one; "pooled" [B, D], the mean of the
        patch tokens; "class" [B, D], the class token; or "embedding" [B, E], what `encode_image` gives.
      layers: resolved, as `VisionTower.features` takes them; of no use to an embedding.
      dtype: a key of `DTYPES`.
      pooler: whether to add an array `pooler` [B, D], what the tower itself pools its last tokens to, before the
        projection.
    """

    def run(model: inference.Model, pixels: jax.Array) -> dict[str, jax.Array]:
        images = inference.normalized(pixels, preprocess)
        found: dict[str, Any]
        if what == "embedding":
            encode = model.encode_image if isinstance(model, CLIP) else inference.vision_tower(model)
            found = {"embedding": encode(images)}
            own: dict[str, jax.Array] = {}
        else:
            tower = inference.vision_tower(model)
            last = tower.config.depth
            kept = tower.features(images, layers=(*layers, last) if pooler else layers)
            own = {"pooler": tower.pooled(kept[last])} if pooler else {}
            first = int(what == "pooled" and tower.config.class_token)
            found = {layer_name(layer): kept[layer][:, first:] for layer in layers}
        if what == "pooled":  # in float32: a mean over a thousand bfloat16 tokens would lose what tells images apart
            found = {name: tokens.astype(jnp.float32).mean(1) for name, tokens in found.items()}
        elif what == "class":
            found = {name: tokens[:, 0] for name, tokens in found.items()}
        return {name: values.astype(dtype) for name, values in (found | own).items()}

    return run


def layer_name(layer: int) -> str:
    """What the array of a block is called, counted from 1; 0 is what enters block 1."""
    return f"layer_{layer:02}"


def by_layer(layers: Sequence[int], figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{"layer_07_miou": ...} of figures [Y] by name, as evaluators give them."""
    return {
        f"{layer_name(layer)}_{name}": float(values[place])
        for place, layer in enumerate(layers)
        for name, values in figures.items()
    }


class Extraction:
    """One request for features, checked against model, data and folder; `run` computes what is not there yet.

    Attributes:
      arrays: {name: (shape of a row, dtype)} of what is written.
      records: how many images the data holds.
      shards: in how many files; this process writes those in `pending`, at first all of its part that are missing.
      bad: {number of the record: why it has no row}, of the shards that are there and of what was run.
    """

    def __init__(
        self,
        model: inference.Model,
        data: Mapping[str, Any],
        out: str | os.PathLike[str],
        *,
        what: str = "pooled",
        layers: Sequence[int] | str | None = None,
        format: str = "safetensors",
        dtype: str = "float32",
        batch_size: int = 64,
        image_size: int | None = None,
        shards: int | None = None,
        part: tuple[int, int] | None = None,
        max_bad: int = 0,
        name: str | None = None,
        pooler: bool = False,
    ):
        """Checks everything that can be known before the first image is read, and begins the folder.

        Args:
          model: on one device, or on a mesh of this process's own devices. On a mesh of several processes each writes
            all shards, with `part` (0, 1), into a folder of its own.
          data: images, see `pe_jax.evals.records`.
          out: the folder, local or gs://; empty, or with shards of this very request.
          what: one of `WHAT`, see `forward`.
          layers: as `VisionTower.features` takes them, or "all"; None is the last block. Not for an embedding.
          format: one of `FORMATS`. safetensors is mapped into memory by its reader; npz needs NumPy alone;
            array_record is a source of records to train from (`pe_jax.data.sources`).
          dtype: of what is written, a key of `DTYPES`.
          batch_size: images in a forward pass, over this process's devices.
          image_size: pixels of a side; None takes the model's own.
          shards: how many files; None makes them of at most 10,000 images and half a gigabyte.
          part: (i, n), this process writes each n-th shard from the i-th; None is JAX's process and their number.
          max_bad: images that may be unreadable before `run` gives up.
          name: what the manifest calls the model.
          pooler: add what the tower itself pools, see `forward`.

        Raises:
          ValueError: for a wrong argument, a folder that holds something else, or a disk that is too small.
        """
        config = inference.vision_tower(model).config
        self._model, self._what, self._format, self._dtype = model, what, format, dtype
        self._layers = _checked(what, layers, format, dtype, config)
        if pooler and (what == "embedding" or config.pool == "none"):
            raise ValueError("pooler=True goes with features of layers, of a tower that pools; leave it out.")
        for word, value in (("batch_size", batch_size), ("shards", shards or 1), ("max_bad", max_bad + 1)):
            if value < 1:
                raise ValueError(f"{word}={value - (word == 'max_bad')} is too low; leave it out, or raise it.")
        self._batch_size, self._max_bad = batch_size, max_bad
        self._preprocess = inference.preprocess_of(model, image_size)
        opened = records.open(data)
        self._source, self.records = opened.source, len(opened)
        self._forward = forward(self._preprocess, what, self._layers, dtype, pooler)
        pixels = jax.ShapeDtypeStruct((1, *self._preprocess.shape, 3), np.uint8)
        self.arrays: dict[str, tuple[tuple[int, ...], str]] = {
            array: (x.shape[1:], str(x.dtype))
            for array, x in jax.eval_shape(self._forward, model, pixels).items()  # and refuses a wrong image size
        }
        self._part = (jax.process_index(), jax.process_count()) if part is None else part
        index, parts = self._part
        if not 0 <= index < parts:
            raise ValueError(f"part {index} of {parts} does not exist; parts are counted from 0.")
        self._out = paths.path(out)
        paths.reach(out)
        request = {
            "weights": inference.fingerprint(model),
            "computed_in": config.dtype,
            "preprocess": self._preprocess.to_dict(),
            "data": dict(data),
            "records": self.records,
            "what": what,
            "layers": list(self._layers),
            "format": format,
            "dtype": dtype,
        } | ({"pooler": True} if pooler else {})
        self.shards = self._begin(request, shards, name)
        done = {shard for shard in range(self.shards) if self._file(shard).exists()}
        self.pending = [shard for shard in range(index, self.shards, parts) if shard not in done]
        self.bad: dict[int, str] = {}
        for shard in done:
            self.bad |= {line["row"]: line["bad"] for line in self._lines(shard) if "bad" in line}
        if not paths.is_bucket(out) and (free := shutil.disk_usage(self._out).free) < self.size:
            raise ValueError(
                f"{self.size / 1e9:.1f} GB are to be written and {self._out} has {free / 1e9:.1f} GB free; take fewer "
                "layers, pooled features, a smaller dtype, or another folder."
            )

    @property
    def row_bytes(self) -> int:
        """Of one image's features."""
        return sum(int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize for shape, dtype in self.arrays.values())

    @property
    def waiting(self) -> int:
        """Images that this process has still to read."""
        return sum(end - begin for begin, end in map(self._ends, self.pending))

    @property
    def size(self) -> int:
        """Bytes that this process has still to write."""
        return self.waiting * self.row_bytes

    def run(self, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Writes what is pending, and the manifest's last part if all shards of all processes are then there.

        Args:
          progress: told how many images of those waiting are done, after each batch.

        Returns:
          The manifest; its `complete` says whether other processes are still at work.

        Raises:
          ValueError: if more than `max_bad` images are unreadable, or a feature is not finite in the dtype. What was
            finished stays, and the next run goes on from there.
        """
        if self.pending:
            self._run(progress)
        return self._finish()

    def _run(self, progress: Callable[[int], None]) -> None:
        lines: dict[int, dict[str, Any]] = {}
        blank = np.zeros((*self._preprocess.shape, 3), np.uint8)

        def load(row: int) -> np.ndarray:
            line: dict[str, Any] = {"row": row, "key": self._source.where(row)}
            pixels = blank
            try:
                record = self._source[row]
                if "image" not in record:
                    raise BadImage(f"{line['key']} has no image; its fields are {', '.join(record)}.")
                if isinstance(record["image"], str):
                    line["key"] = record["image"]
                line["fields"] = _plain(record)
                pixels = self._preprocess.pixels(record["image"])
            except (BadImage, sources.BadRecord) as error:
                line["bad"] = self.bad[row] = str(error)
            lines[row] = line
            return pixels

        rows = np.concatenate([self._rows(shard) for shard in self.pending]).tolist()
        todo, done, bad = list(self.pending), 0, len(self.bad)
        buffer, filled = self._buffer(todo[0]), 0
        writing: concurrent.futures.Future[None] | None = None
        with concurrent.futures.ThreadPoolExecutor(1) as writer:
            for out, count in _one_behind(
                inference.batches(self._model, self._forward, rows, load, min(self._batch_size, len(rows)))
            ):
                # Of this batch, not of those read ahead, and before it is written: what is mended later gets its row.
                wrong = [row for row in rows[done : done + count] if row in self.bad]
                bad += len(wrong)
                if wrong and bad > self._max_bad:
                    raise ValueError(
                        f"{bad} images cannot be used and max_bad is {self._max_bad}: {self.bad[wrong[-1]]} Mend or "
                        "remove them, or raise max_bad."
                    )
                batch = {name: np.asarray(values)[:count] for name, values in out.items()}
                taken = 0
                while taken < count:
                    own = self._rows(todo[0])
                    step = min(count - taken, len(own) - filled)
                    for name, values in batch.items():
                        buffer[name][filled : filled + step] = values[taken : taken + step]
                    taken, filled = taken + step, filled + step
                    if filled < len(own):
                        continue
                    if writing is not None:
                        writing.result()  # two shards in memory at most
                    writing = writer.submit(self._write, todo[0], buffer, [self._line(lines, int(row)) for row in own])
                    del todo[0]
                    if todo:
                        buffer, filled = self._buffer(todo[0]), 0
                done += count
                progress(done)
            if writing is not None:
                writing.result()

    def _line(self, lines: dict[int, dict[str, Any]], row: int) -> dict[str, Any]:
        """What was noted when the record was read; on a mesh of several processes another one may have read it."""
        return lines.pop(row, None) or {"row": row, "key": self._source.where(row), "fields": {}}

    def _buffer(self, shard: int) -> Arrays:
        count = len(self._rows(shard))
        return {name: np.empty((count, *shape), DTYPES[dtype]) for name, (shape, dtype) in self.arrays.items()}

    def _write(self, shard: int, buffer: Arrays, lines: list[dict[str, Any]]) -> None:
        good = np.array(["bad" not in line for line in lines])
        kept = buffer if good.all() else {name: values[good] for name, values in buffer.items()}
        named = [line for line in lines if "bad" not in line]
        for name, values in kept.items():
            finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
            if not finite.all():
                raise ValueError(
                    f"{name} of {named[int(np.argmin(finite))]['key']} is not finite in {self._dtype}; "
                    + ("ask for bfloat16 or float32." if self._dtype == "float16" else "look at the weights.")
                )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        _write_text(self._file(shard, "jsonl"), text)
        path = self._file(shard)
        if self._format == "array_record":
            described = {name: [dtype, list(shape)] for name, (shape, dtype) in self.arrays.items()}
            sources.write_shard(
                path,
                (
                    line | {"arrays": described} | {name: values[i].tobytes() for name, values in kept.items()}
                    for i, line in enumerate(named)
                ),
            )
            return
        kept = {"row": np.array([line["row"] for line in named], np.int64)} | kept
        with _whole(path) as local:
            if self._format == "npz":
                with local.open("wb") as file:
                    np.savez(file, **kept)  # pyright: ignore[reportArgumentType]  # its names are ours
            else:
                safetensors.numpy.save_file(kept, local)

    def _ends(self, shard: int) -> tuple[int, int]:
        """The first record of a shard and the one after its last."""
        return self.records * shard // self.shards, self.records * (shard + 1) // self.shards

    def _rows(self, shard: int) -> np.ndarray:
        return np.arange(*self._ends(shard))

    def _file(self, shard: int, ending: str | None = None) -> epath.Path:
        return self._out / f"features-{shard:05d}-of-{self.shards:05d}.{ending or self._format}"

    def _lines(self, shard: int) -> list[dict[str, Any]]:
        return _read_lines(self._file(shard, "jsonl"))

    def _begin(self, request: dict[str, Any], shards: int | None, name: str | None) -> int:
        """Writes the manifest, or checks the one that is there; the number of shards."""
        request = json.loads(json.dumps(request))
        file = self._out / MANIFEST
        # One listing: what another process writes meanwhile is seen together with the manifest that it wrote first.
        inside = {path.name for path in self._out.iterdir()} if self._out.exists() else set()
        if MANIFEST in inside:
            manifest = _read_manifest(file)
            had = manifest["request"]
            differing = [key for key in had | request if request.get(key) != had.get(key)]
            if differing:
                told = "; ".join(
                    f"{key} is {had.get(key)!r:.80} there and {request.get(key)!r:.80} here" for key in differing
                )
                raise ValueError(f"{self._out} holds other features: {told}. Choose an empty folder.")
            if shards not in (None, manifest["shards"]):
                raise ValueError(
                    f"{self._out} was begun with {manifest['shards']} shards, not {shards}; leave the number out."
                )
            return manifest["shards"]
        if any(not name.endswith(".partial") for name in inside):
            raise ValueError(f"{self._out} holds files and no {MANIFEST}; choose an empty folder.")
        self._out.mkdir(parents=True, exist_ok=True)
        each = max(1, min(_SHARD_RECORDS, _SHARD_BYTES // max(1, self.row_bytes)))
        shards = min(self.records, shards or max(-(-self.records // each), self._part[1]))
        versions = {package: importlib.metadata.version(package) for package in ("pe-jax", "jax")}
        arrays = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in self.arrays.items()}
        manifest = {"version": VERSION, "model": name, "request": request, "arrays": arrays, "shards": shards}
        # Processes that begin together write the same bytes.
        _write_text(file, json.dumps(manifest | {"complete": False, "versions": versions}, indent=2))
        return shards

    def _finish(self) -> dict[str, Any]:
        file = self._out / MANIFEST
        manifest = _read_manifest(file)
        if manifest["complete"] or not all(self._file(shard).exists() for shard in range(self.shards)):
            return manifest
        lines = [line for shard in range(self.shards) for line in self._lines(shard)]
        bad = [{key: line[key] for key in ("row", "key", "bad")} for line in lines if "bad" in line]
        manifest |= {"complete": True, "rows": len(lines) - len(bad), "bad": bad}
        _write_text(file, json.dumps(manifest, indent=2, ensure_ascii=False))
        for left in self._out.glob("*.partial"):  # of runs that were killed
            left.unlink(missing_ok=True)
        return manifest


@dataclasses.dataclass(frozen=True)
class Stored:
    """A complete folder of features, opened by `open`; rows are in the order of the data.

    Attributes:
      folder: where it is.
      manifest: what was asked for and what came of it.
      lines: of each row, its record's number `row`, its `key` (a path, or file and place), and the record's `fields`.
    """

    folder: epath.Path
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays, such as `layer_08`."""
        return tuple(self.manifest["arrays"])

    @property
    def keys(self) -> list[str]:
        return [line["key"] for line in self.lines]

    def array(self, name: str | None = None, dtype: str | None = None) -> np.ndarray:
        """All rows of one array, [rows, ...].

        A single safetensors shard in its own dtype is mapped: nothing is in memory until it is used. Anything else is
        read whole; `shards` goes through it in pieces.

        Args:
          name: one of `names`; may be left out where there is only one.
          dtype: to convert to; scikit-learn takes float32, not bfloat16.

        Raises:
          ValueError: for a name that is not there.
        """
        name = self.names[0] if name is None and len(self.names) == 1 else name
        if name is None or name not in self.names:
            raise ValueError(f"{self.folder} has no array {name!r}; it has {', '.join(self.names)}.")
        wanted = np.dtype(DTYPES[dtype or self.manifest["arrays"][name]["dtype"]])
        if self.manifest["shards"] == 1:
            return next(self.shards((name,)))[name].astype(wanted, copy=False)
        whole = np.empty((len(self), *self.manifest["arrays"][name]["shape"]), wanted)
        begin = 0
        for arrays in self.shards((name,)):
            values = arrays[name]
            whole[begin : begin + len(values)] = values
            begin += len(values)
        return whole

    def shards(self, names: Sequence[str] | None = None) -> Iterator[Arrays]:
        """{name: [rows of the shard, ...]} of one shard after the other.

        Raises:
          ValueError: for a file that is damaged.
        """
        names = self.names if names is None else names
        described = self.manifest["arrays"]
        format, count = self.manifest["request"]["format"], self.manifest["shards"]
        for shard in range(count):
            path = self.folder / f"features-{shard:05d}-of-{count:05d}.{format}"
            rows = self._counts[shard]
            arrays = _READERS[format](path, {name: described[name] for name in names})
            for name, values in arrays.items():
                if values.shape != (rows, *described[name]["shape"]):
                    raise ValueError(
                        f"{path}: {name} is {list(values.shape)}, not {[rows, *described[name]['shape']]}; delete this "
                        "file and run the command again that wrote it."
                    )
            yield arrays

    def labels(self, field: str | None = None) -> np.ndarray:
        """[rows] of the records' labels, integers or names, by default their `label` or else `cls`.

        Raises:
          ValueError: for a record without one.
        """
        return np.array([_field(line, (field,) if field else records.LABELS) for line in self.lines])

    def captions(self, field: str | None = None) -> list[tuple[str, ...]]:
        """One or more captions of each row, by default from the fields that evaluators look for."""
        found = [_field(line, (field,) if field else records.CAPTIONS) for line in self.lines]
        return [(value,) if isinstance(value, str) else tuple(value) for value in found]

    @functools.cached_property
    def _counts(self) -> list[int]:
        """Rows of each shard."""
        total, count = self.manifest["request"]["records"], self.manifest["shards"]
        ends = [total * shard // count for shard in range(count + 1)]
        return np.histogram([line["row"] for line in self.lines], ends)[0].tolist() if self.lines else [0] * count


def open(folder: str | os.PathLike[str]) -> Stored:
    """The features in a folder, local or gs://, that an `Extraction` completed.

    Raises:
      ValueError: if there are none, shards are missing, or a newer pe_jax wrote them.
    """
    out = paths.path(folder)
    paths.reach(folder)
    if not (out / MANIFEST).exists():
        raise ValueError(f"{out} has no {MANIFEST}; give a folder that `pe-jax features` wrote.")
    manifest = _read_manifest(out / MANIFEST)
    count, format = manifest["shards"], manifest["request"]["format"]
    names = [f"features-{shard:05d}-of-{count:05d}" for shard in range(count)]
    missing = [name for name in names if not (out / f"{name}.{format}").exists()]
    if missing or not manifest["complete"]:
        raise ValueError(
            f"{out} is not complete: {len(missing)} of {count} shards are missing. Run the command again that began "
            "it; it goes on from there."
        )
    lines = [line for name in names for line in _read_lines(out / f"{name}.jsonl")]
    return Stored(out, manifest, [line for line in lines if "bad" not in line])


# ----------------------------------------------------------------------------------------------------------- requests


def _checked(what: str, layers: Sequence[int] | str | None, format: str, dtype: str, config: Any) -> tuple[int, ...]:
    """The layers asked for, counted from 1, ascending, each once; refuses what the model or the format cannot give."""
    for word, value, known in (("what", what, WHAT), ("format", format, FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"{word}={value!r} is unknown; choose one of {', '.join(known)}.")
    if format == "npz" and dtype == "bfloat16":
        raise ValueError("NumPy's own files know no bfloat16; choose float16, or the format safetensors.")
    if what == "embedding":
        if layers is not None:
            raise ValueError("an embedding is of no layer; leave the layers out, or ask for pooled features of them.")
        if config.pool == "none":
            raise ValueError("this model gives tokens and no embedding (PE-Lang, PE-Spatial); ask for pooled features.")
        return ()
    if what == "class" and not config.class_token:
        raise ValueError("this tower has no class token; ask for pooled features.")
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers={layers!r} must be "all" or a list of layers.')
        return tuple(range(config.depth + 1))
    return tuple(sorted(set(resolve_layers(tuple(layers if layers is not None else (-1,)), config.depth))))


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that JSON can hold, without its image."""
    found = {}
    for name, value in record.items():
        value = value.item() if isinstance(value, np.generic) else value
        with contextlib.suppress(TypeError):
            json.dumps(value)
            if name != "image":
                found[name] = value
    return found


def _one_behind(items: Iterator[Any]) -> Iterator[Any]:
    """Each item when the next one has been asked for: the device computes that one while the host takes this one."""
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


# -------------------------------------------------------------------------------------------------------------- files


def _read_manifest(file: epath.Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no manifest of features ({error}); choose another folder.") from error
    if version > VERSION:
        raise ValueError(f"{file} has version {version}, this pe_jax reads up to {VERSION}; install a newer pe_jax.")
    return manifest


def _read_lines(file: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _field(line: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in line["fields"]:
            return line["fields"][name]
    raise ValueError(
        f"{line['key']} has no {' or '.join(names)}; its fields are {', '.join(line['fields']) or 'none'}."
    )


def _write_text(path: epath.Path, text: str) -> None:
    with _whole(path) as local:
        local.write_text(text, "utf-8")


@contextlib.contextmanager
def _whole(path: epath.Path) -> Iterator[pathlib.Path]:
    """A local file to write, which then stands under `path` as a whole."""
    if paths.is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="pe_jax-") as folder:
            local = pathlib.Path(folder, path.name)
            yield local
            with local.open("rb") as file, path.open("wb") as copy:
                shutil.copyfileobj(file, copy, 16 << 20)
        return
    local = pathlib.Path(path.parent, f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield local
        os.replace(local, path)
    finally:
        local.unlink(missing_ok=True)


def _read_safetensors(path: epath.Path, described: Mapping[str, Any]) -> Arrays:
    """Views of the mapped file; of a bucket's, of the bytes."""
    if paths.is_bucket(path):
        mapped = np.frombuffer(path.read_bytes(), np.uint8)
    else:
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    try:
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        if (want := start + max(entry["data_offsets"][1] for entry in entries)) != len(mapped):
            raise ValueError(f"it has {len(mapped)} bytes, its header announces {want}")
        found = {}
        for name in described:
            begin, end = header[name]["data_offsets"]
            data = mapped[start + begin : start + end].view(_SAFETENSORS[header[name]["dtype"]])
            found[name] = data.reshape(header[name]["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return found


def _read_npz(path: epath.Path, described: Mapping[str, Any]) -> Arrays:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in described}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def _read_array_record(path: epath.Path, described: Mapping[str, Any]) -> Arrays:
    source = sources.ArrayRecord(str(path))
    found: dict[str, list[np.ndarray]] = {name: [] for name in described}
    try:
        for i in range(len(source)):
            record = source[i]
            for name, entry in described.items():
                found[name].append(np.frombuffer(record[name], DTYPES[entry["dtype"]]).reshape(entry["shape"]))
    except (ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    return {
        name: np.stack(rows) if rows else np.empty((0, *described[name]["shape"]), DTYPES[described[name]["dtype"]])
        for name, rows in found.items()
    }


def _damaged(path: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); delete it and run the command again that wrote it.")


_READERS: dict[str, Callable[[epath.Path, Mapping[str, Any]], Arrays]] = {
    "safetensors": _read_safetensors,
    "npz": _read_npz,
    "array_record": _read_array_record,
}

"""Where records come from: each source is a random-access sequence of dicts of named fields.

  JSONL, CSV    paths of images or videos, and captions; the paths are relative to the file
  karpathy      the JSON file of COCO's or Flickr30k's usual splits
  conversations one conversation a line with an image, several, a video or none (`pe_jax.data.chat`)
  packed        NAME.jsonl beside NAME.npz, which holds the encoded images one after the other
  array_record  sharded ArrayRecord files in our own simple record format (`write_shard`), the form to train from
  webdataset    tar shards read in place through an index of offsets
  tfds          a TensorFlow Datasets data set prepared as ArrayRecord, without TensorFlow (extra `data`)
  pairs         a folder of images and one of maps of their pixels: masks, depths (`pe_jax.data.pairs`)
  listed        a list of images and depths, as NYUv2's
  synthetic     random images, for dry runs

A record has an `image` (encoded bytes, a path, or a uint8 array) or a `video` (see `pe_jax.data.video.Reader`), and
text in some other field; `Captions` says which.
"""

import csv
import glob
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pe_jax import paths
from pe_jax.data import pairs, tar_index
from pe_jax.data.image import BadImage, read_bytes
from pe_jax.data.video import ENDINGS as VIDEO_ENDINGS

Record = dict[str, Any]
MEDIUM_FIELDS = ("image", "video", "file", "path")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif")


class BadRecord(ValueError):
    """A record that cannot be used (no caption, no image, not readable); the message names it."""


@runtime_checkable
class Source(Protocol):
    """What a pipeline needs of a source. Safe to share between threads, and to pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`, 0 <= index < len; BadRecord or BadImage, naming it, if it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """How a message calls record `index`: file and line, or shard and place."""
        ...


def create(config: Mapping[str, Any]) -> Source:
    """The source described by {"name": ..., and that source's arguments}.

    Raises:
      ValueError: on an unknown name or argument, a file that is missing, or a source without records.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in SOURCES:
        raise ValueError(f"source name {name!r} is unknown; the sources are {', '.join(SOURCES)}.")
    parameters = inspect.signature(SOURCES[name]).parameters
    if unknown := sorted(set(arguments) - set(parameters)):
        raise ValueError(f"source {name!r} has no {', '.join(map(repr, unknown))}; it takes {', '.join(parameters)}.")
    missing = [p for p, v in parameters.items() if v.default is v.empty and p not in arguments]
    if missing:
        raise ValueError(f"source {name!r} needs {', '.join(map(repr, missing))}; got {sorted(arguments)}.")
    source = SOURCES[name](**arguments)
    if not len(source):
        raise ValueError(f"source {name!r} ({arguments.get('path', '')}) holds no record.")
    return source


def medium(record: Mapping[str, Any], kind: str, where: str) -> Any:
    """What a record has of `kind`, "image" or "video"; BadRecord if it has something else."""
    if kind not in record:
        raise BadRecord(f"{where} has no {kind}; its fields are {', '.join(record) or 'none'}.")
    return record[kind]


class Captions:
    """Chooses a record's caption.

    Args:
      templates: texts with one "{}" (or "{label}") for the class name. Empty: the record carries its captions.
      label: field of the class name, by default the first of `cls`, `label` that the record has.
      classes: names of the classes where that field holds their number.
      caption: field of the caption (a string, or a list to choose from), by default the first of `captions`,
        `caption`, `text`, `txt` that the record has.
    """

    def __init__(
        self,
        templates: Sequence[str] = (),
        label: str | None = None,
        classes: Sequence[str] = (),
        caption: str | None = None,
    ):
        if isinstance(templates, str):
            raise ValueError(f"templates={templates!r} must be a list of texts.")
        for template in templates:
            if template.count("{}") + template.count("{label}") != 1:
                raise ValueError(f'template {template!r} must contain "{{}}" or "{{label}}" once, for the class name.')
        self.templates = tuple(t.replace("{label}", "{}") for t in templates)
        self.labels = (label,) if label else ("cls", "label")
        self.classes = tuple(classes)
        self.captions = (caption,) if caption else ("captions", "caption", "text", "txt")

    def __call__(self, record: Record, draw: float, where: str) -> str:
        """The caption that `draw`, in [0, 1), selects; BadRecord if the record has none that is not blank."""
        if self.templates:
            name = self._label(record, where)
            return self.templates[int(draw * len(self.templates))].replace("{}", name)
        texts = record[self._field(record, self.captions, "caption", where)]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise BadRecord(f"{where}: the caption is {texts!r:.80}; wanted a text or a list of texts.")
        texts = [t for t in texts if t.strip()]
        if not texts:
            raise BadRecord(f"{where}: the caption is empty.")
        return texts[int(draw * len(texts))]

    def _label(self, record: Record, where: str) -> str:
        name = record[self._field(record, self.labels, "class name", where)]
        if self.classes and isinstance(name, (int, np.integer)) and 0 <= name < len(self.classes):
            name = self.classes[int(name)]
        if not isinstance(name, str) or not name.strip():
            raise BadRecord(
                f"{where}: the class name is {name!r:.80}; wanted a text, or a number below {len(self.classes)} with"
                " `classes` naming them."
            )
        return name

    @staticmethod
    def _field(record: Record, names: tuple[str, ...], what: str, where: str) -> str:
        for name in names:
            if name in record:
                return name
        raise BadRecord(f"{where}: no {what}; looked for {', '.join(names)}, the record has {', '.join(record)}.")


# ---- lists of files ------------------------------------------------------------------------------------------------


class Jsonl:
    """One JSON object a line, with the path of an image in `image` (or `file`, `path`), or of a video in `video`.

    The ending tells images from videos where the field's name does not.

    Args:
      path: the .jsonl file.
      image: field of the path.
      root: folder the paths start from; by default the folder of `path`.
    """

    def __init__(self, path: str, image: str | None = None, root: str | None = None):
        self.path, self.root = path, root if root is not None else os.path.dirname(path)
        self.media = (image,) if image else MEDIUM_FIELDS
        self.lines = _lines(path)
        if len(self):
            _medium_field(_parse(self.lines[0], self.where(0)), self.media, path)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        record = _parse(self.lines[index], self.where(index))
        return _with_medium(record, self.media, self.root, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path} record {index}"


class Folder:
    """Images and videos below a folder, by path: DIR/CLASS/NAME.jpg, with NAME.txt for a caption if it is there.

    A record has `cls`, the name of the first folder below `path` with "_" as spaces, where there is one, and `caption`,
    the text file's content or else the class.

    Args:
      path: the folder, local or gs://.
    """

    def __init__(self, path: str):
        root = paths.path(path)
        paths.reach(root)
        if not root.is_dir():
            raise ValueError(f"{path} is no folder; give one with images or videos in it.")
        self.path = str(root)
        below = str(root).removeprefix(paths.BUCKET)  # which the folders found in a bucket lack
        found = (
            os.path.relpath(os.path.join(folder, name), below) for folder, _, names in root.walk() for name in names
        )
        by_ending = [(name, os.path.splitext(name)[1].lower().lstrip(".")) for name in found]
        self.media = sorted(name for name, ending in by_ending if ending in IMAGE_ENDINGS + VIDEO_ENDINGS)
        self.texts = {name for name, ending in by_ending if ending == "txt"}

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> Record:
        name = self.media[index]
        record: Record = {_kind(name): os.path.join(self.path, name)}
        if os.sep in name:
            record["cls"] = record["caption"] = name.split(os.sep)[0].replace("_", " ")
        text = os.path.splitext(name)[0] + ".txt"
        if text in self.texts:
            path = os.path.join(self.path, text)
            record["caption"] = _decode(read_bytes(path), path, BadRecord).strip()
        return record

    def where(self, index: int) -> str:
        return os.path.join(self.path, self.media[index])


class Karpathy:
    """Captioned images of COCO, Flickr30k or Flickr8k by the JSON file of Karpathy's splits, five captions each.

    Args:
      path: the file, such as dataset_coco.json.
      split: "train", "restval", "val" or "test".
      root: folder of the images, which lie in it by their `filepath` where that is given; by default the folder of
        `path`.
    """

    def __init__(self, path: str, split: str = "test", root: str | None = None):
        self.path, self.split, self.root = path, split, root if root is not None else os.path.dirname(path)
        content = _parse(_read(path), path, ValueError)
        if not isinstance(content.get("images"), list):
            raise ValueError(f"{path} has no list `images`, so it is not the JSON file of Karpathy's splits.")
        self.records = [record for record in content["images"] if record.get("split") == split]
        if not self.records:
            known = sorted({str(record.get("split")) for record in content["images"]})
            raise ValueError(f"{path} has no image of split {split!r}; its splits are {', '.join(known)}.")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        try:
            captions = [sentence["raw"] for sentence in record["sentences"]]
            image = os.path.join(self.root, record.get("filepath", ""), record["filename"])
        except (KeyError, TypeError) as error:
            raise BadRecord(f"{self.where(index)} lacks {error}; want sentences with raw, and filename.") from error
        return {"image": image, "captions": captions}

    def where(self, index: int) -> str:
        return f"{self.path} {self.split} image {index}"


class Csv:
    """A table with a header line; a tab separates columns in .tsv files, a comma in all others.

    Args:
      path: the .csv or .tsv file.
      image: column of the path of an image or video; looked for and told apart as in `Jsonl`.
      root: folder the paths start from; by default the folder of `path`.
    """

    def __init__(self, path: str, image: str | None = None, root: str | None = None):
        self.path, self.root = path, root if root is not None else os.path.dirname(path)
        self.media = (image,) if image else MEDIUM_FIELDS
        text = _decode(_read(path), path)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.endswith(".tsv") else ",")
        self.columns = [name.strip() for name in next(rows, [])]
        _medium_field(self.columns, self.media, path)
        self.rows = [tuple(row) for row in rows if row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = self.rows[index]
        if len(row) != len(self.columns):
            raise BadRecord(f"{self.where(index)} has {len(row)} columns; the header has {len(self.columns)}.")
        record = dict(zip(self.columns, row, strict=True))
        return _with_medium(record, self.media, self.root, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"


class Conversations:
    """One JSON object a line, of which `pe_jax.data.chat` makes a conversation.

    Its `image` is a path or a list of paths, its `video` a path; text alone has neither.

    Args:
      path: the .jsonl file.
      root: folder the paths start from; by default the folder of `path`.
    """

    def __init__(self, path: str, root: str | None = None):
        self.path, self.root = path, root if root is not None else os.path.dirname(path)
        self.lines = _lines(path)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        where = self.where(index)
        record = _parse(self.lines[index], where)
        for kind in ("image", "video"):
            if kind in record:
                record[kind] = self._joined(record[kind], kind, where)
        return record

    def _joined(self, value: Any, kind: str, where: str) -> Any:
        if kind == "image" and isinstance(value, list) and value:
            return [self._joined(path, "path in `image`", where) for path in value]
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(f"{where}: the {kind} is {value!r:.80}; wanted a path.")
        return value if "://" in value else os.path.join(self.root, value)

    def where(self, index: int) -> str:
        return f"{self.path} record {index}"


class Packed:
    """NAME.jsonl and NAME.npz: `data` holds all encoded images, `offsets` [N + 1] where each begins.

    A line's image is the one of the same number, or of the number in its field `i`.

    Args:
      path: either of the two files.
      images: the .npz file, where it has another name.
    """

    def __init__(self, path: str, images: str | None = None):
        self.path, self.npz = (str(paths.path(path).with_suffix(ending)) for ending in (".jsonl", ".npz"))
        self.npz = images or self.npz
        self.lines = _lines(self.path)
        self._load()

    def _load(self) -> None:
        try:
            with np.load(io.BytesIO(_read(self.npz))) as arrays:
                self.data, self.offsets = arrays["data"], arrays["offsets"]
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.npz} is no packed image file (arrays data and offsets): {error}.") from error

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        record = _parse(self.lines[index], self.where(index))
        i = record.get("i", index)
        if not isinstance(i, int) or not 0 <= i < len(self.offsets) - 1:
            raise BadRecord(f"{self.where(index)}: image number {i!r} is not among the {len(self.offsets) - 1} packed.")
        return {**record, "image": self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()}

    def where(self, index: int) -> str:
        return f"{self.path} record {index}"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("data", "offsets")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._load()


# ---- ArrayRecord ---------------------------------------------------------------------------------------------------

_MAGIC = b"PEJ1"


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as bytes: "PEJ1", the header's length (uint32, little endian), a JSON header, then the binary fields.

    The header is {"fields": the JSON-able fields, "blobs": {name: number of bytes, or of a list those of each}}; blobs
    follow in that order.
    """
    blobs = {name: value for name, value in record.items() if _binary(value)}
    fields = {name: value for name, value in record.items() if name not in blobs}
    sizes = {k: [len(part) for part in v] if isinstance(v, list) else len(v) for k, v in blobs.items()}
    header = json.dumps({"fields": fields, "blobs": sizes}, ensure_ascii=False).encode()
    parts = [part for value in blobs.values() for part in (value if isinstance(value, list) else [value])]
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *parts])


def _binary(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, (bytes, bytearray)) for part in value)
    return isinstance(value, (bytes, bytearray))


def decode_record(data: bytes) -> Record:
    """The inverse of `encode_record`; a ValueError if the bytes are not of this form."""
    if data[:4] != _MAGIC:
        raise ValueError(f"not a record of pe_jax: starts with {data[:4]!r}, wanted {_MAGIC!r}")
    try:
        at = 8 + struct.unpack("<I", data[4:8])[0]
        header = json.loads(data[8:at])
        record, sizes = dict(header["fields"]), header["blobs"]
        announced = at + sum(sum(size) if isinstance(size, list) else size for size in sizes.values())
    except (struct.error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of the record is damaged: {error}") from error
    if announced != len(data):
        raise ValueError(f"the record has {len(data)} bytes, its header announces {announced}")
    for name, size in sizes.items():
        parts = []
        for length in size if isinstance(size, list) else [size]:
            parts.append(data[at : at + length])
            at += length
        record[name] = parts if isinstance(size, list) else parts[0]
    return record


def write_shard(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes one ArrayRecord file and returns its number of records. It appears under its name only when complete."""
    from array_record.python import array_record_module

    path = os.fspath(path)
    if paths.is_bucket(path):  # the library reads from a bucket, but writes to none
        with tempfile.TemporaryDirectory(prefix="pe_jax-") as folder:
            local = pathlib.Path(folder, "shard")
            count = write_shard(local, records)
            with local.open("rb") as file, paths.path(path).open("wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
        return count
    partial, count = f"{path}.partial", 0
    writer = array_record_module.ArrayRecordWriter(partial, "group_size:1")  # 1: each record can be read alone
    try:
        for record in records:
            writer.write(encode_record(record))
            count += 1
    finally:
        writer.close()
    os.replace(partial, path)
    return count


class ArrayRecord:
    """Sharded ArrayRecord files, of records written by `write_shard` or `pe-jax data convert`.

    Args:
      path: one file, a folder, a glob, a brace range ("train-{00000..00015}.array_record"), or a list of these; local
        or gs://.
    """

    def __init__(self, path: str | Sequence[str]):
        from array_record.python import array_record_data_source

        self.paths = _shards(path, ".array_record")
        try:
            self.reader = array_record_data_source.ArrayRecordDataSource(self.paths)
        except Exception as error:  # of many kinds, from its C++ side
            raise ValueError(f"cannot open the ArrayRecord files {_few(self.paths)}: {error}") from error

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Record:
        try:
            record = decode_record(self.reader[index])
        except Exception as error:
            raise BadRecord(f"{self.where(index)}: {error}.") from error
        return record

    def where(self, index: int) -> str:
        return f"record {index} of {_few(self.paths)}"


# ---- WebDataset ----------------------------------------------------------------------------------------------------


class WebDataset:
    """Tar shards of samples whose files share a name up to the first dot: 0001.jpg (or .mp4), 0001.txt, 0001.json.

    The position of every file is found once and kept beside the shard (or in PE_JAX_CACHE where that is not writable);
    after that any record is one read away. The fields of a .json are the record's; .txt becomes `caption`, .cls
    `label`.

    Args:
      path: one tar, a folder, a glob, a brace range ("shard-{000000..000099}.tar"), or a list of these.
    """

    def __init__(self, path: str | Sequence[str]):
        self.paths = _shards(path, ".tar")
        if remote := [path for path in self.paths if paths.is_bucket(path)]:
            raise ValueError(
                f"{remote[0]}: tars are read in place, on this machine's disk; copy them there, or convert them to "
                "ArrayRecord by `pe-jax data convert`, which is read from a bucket too."
            )
        self.shards = [tar_index.load(p) for p in self.paths]
        self.starts = np.cumsum([0, *(len(offsets) for _, offsets, _ in self.shards)])
        self._opened = tar_index.Files()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def __getitem__(self, index: int) -> Record:
        record = self.fields(index, media=True)
        if "image" not in record and "video" not in record:
            wanted = f"no image ({', '.join(IMAGE_ENDINGS)}) and no video ({', '.join(VIDEO_ENDINGS)})"
            raise BadRecord(f"{self.where(index)}: {wanted}; it has {sorted(record)}.")
        return record

    def fields(self, index: int, media: bool = False) -> Record:
        """Record `index`, by default without its image or video, which is most of what there is to read."""
        shard, row = self._place(index)
        endings, offsets, sizes = self.shards[shard]
        record: Record = {}
        for ending, offset, size in zip(endings, offsets[row].tolist(), sizes[row].tolist(), strict=True):
            kind = "image" if ending in IMAGE_ENDINGS else "video" if ending in VIDEO_ENDINGS else None
            if offset < 0 or (kind and not media):
                continue
            data = self._opened.read(self.paths[shard], offset, size)
            if len(data) != size:
                raise BadRecord(f"{self.where(index)}: {self.paths[shard]} ends before the record does.")
            if kind:
                record[kind] = data
            elif ending == "json":
                fields = _parse(data, self.where(index))
                record = fields | record  # what has a file of its own wins
            elif ending == "txt":
                record["caption"] = _decode(data, self.where(index), BadRecord).strip()
            elif ending == "cls":
                text = _decode(data, self.where(index), BadRecord).strip()
                record["label"] = int(text) if text.isdigit() else text
            else:
                record[ending] = data
        return record

    def where(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.paths[shard]} sample {row}"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._opened = tar_index.Files()


# ---- others --------------------------------------------------------------------------------------------------------


class Tfds:
    """A TensorFlow Datasets data set, prepared with `file_format="array_record"`; images stay encoded.

    A class label gets its name beside it, in `cls`, with spaces for underscores. A feature `video` is a file's bytes
    (`Tensor(shape=(), dtype=object)`) or frames of one size (`Sequence(Image())`); TFDS's own `Video` needs TensorFlow.

    Args:
      dataset: a registered name, or None with `path`.
      split: such as "train" or "train[:10%]".
      data_dir: where data sets are kept; TFDS's own default if None.
      path: folder of one prepared version (with dataset_info.json), for sets whose code is not installed.
    """

    def __init__(
        self, dataset: str | None = None, split: str = "train", data_dir: str | None = None, path: str | None = None
    ):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError("the tfds source needs tensorflow-datasets: pip install 'pe-jax[data]'.") from error
        if (dataset is None) == (path is None):
            raise ValueError(f"the tfds source needs either dataset or path; got {dataset=}, {path=}.")
        self.name = f"{dataset or path}[{split}]"
        try:
            if path is not None:
                builder: Any = tfds.builder_from_directory(path)
            else:
                builder = tfds.builder(str(dataset), data_dir=data_dir)
            features = dict(builder.info.features or {})
            if not {"image", "video"} & set(features):
                raise ValueError(f"it has no feature 'image' or 'video', only {', '.join(features)}")
            encoded = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
            self.data = builder.as_data_source(split=split, decoders=encoded)
        except Exception as error:
            raise ValueError(
                f"the TFDS data set {self.name} cannot be read: {error}. It must be prepared beforehand, with"
                ' file_format="array_record".'
            ) from error
        self.labels = {n: f.names for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        record = {}
        for name, value in self.data[index].items():
            if name == "video":
                record[name] = value if isinstance(value, bytes) else self._frames(value, index)
            else:
                record[name] = value if name == "image" else _plain(value)
        if "label" in self.labels and self.labels["label"] and "cls" not in record:
            record["cls"] = self.labels["label"][record["label"]].replace("_", " ")
        return record

    def _frames(self, frames: Sequence[np.ndarray], index: int) -> np.ndarray:
        if len(sizes := {frame.shape for frame in frames}) != 1:
            raise BadRecord(f"{self.where(index)} has frames of {len(sizes)} sizes; want one or more of the same.")
        return np.stack(list(frames))

    def where(self, index: int) -> str:
        return f"{self.name} record {index}"


class Synthetic:
    """Random images with random words, each record a function of the seed and its number.

    Args:
      records: how many.
      size: pixels, height and width of each image.
      seed: of all records.
    """

    WORDS = ("red", "green", "blue", "small", "large", "round", "square", "cat", "dog", "tree", "house", "boat")

    def __init__(self, records: int = 1000, size: int = 64, seed: int = 0):
        self.records, self.size, self.seed = records, size, seed

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, index))
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        rows = np.arange(self.size) * 4 // self.size
        words = rng.integers(0, len(self.WORDS), 5)
        return {"image": coarse[rows][:, rows], "caption": " ".join(self.WORDS[w] for w in words)}

    def where(self, index: int) -> str:
        return f"synthetic record {index}"


SOURCES = {
    "jsonl": Jsonl,
    "csv": Csv,
    "folder": Folder,
    "karpathy": Karpathy,
    "conversations": Conversations,
    "packed": Packed,
    "array_record": ArrayRecord,
    "webdataset": WebDataset,
    "tfds": Tfds,
    "pairs": pairs.Folders,
    "listed": pairs.Listed,
    "labelled": pairs.Labelled,
    "synthetic": Synthetic,
}


def guess(path: str) -> dict[str, Any]:
    """The config of the source that a path's ending suggests; the text may also be the config itself, as JSON.

    Raises:
      ValueError: if neither is the case, with the endings known.
    """
    if path.lstrip().startswith("{"):
        config = _parse(path.encode(), "the source", ValueError)
        return config
    if path.endswith(".jsonl"):
        packed = paths.path(path).with_suffix(".npz").exists()
        return {"name": "packed" if packed else "jsonl", "path": path}
    for ending, name in {
        ".csv": "csv",
        ".tsv": "csv",
        ".npz": "packed",
        ".tar": "webdataset",
        ".array_record": "array_record",
    }.items():
        if path.endswith(ending):
            return {"name": name, "path": path}
    folder = paths.path(path)
    paths.reach(folder)
    if (folder / "dataset_info.json").exists():
        return {"name": "tfds", "path": path}
    inside = list(folder.iterdir()) if (is_folder := folder.is_dir()) else []
    for ending, name in ((".array_record", "array_record"), (".tar", "webdataset")):
        if any(file.name.endswith(ending) for file in inside):
            return {"name": name, "path": path}
    if is_folder:
        return {"name": "folder", "path": path}
    raise ValueError(
        f"cannot tell what kind of source {path} is; wanted .jsonl, .csv, .tsv, .npz, .tar, .array_record, a folder of"
        ' shards or images, or JSON such as \'{"name": "tfds", "dataset": "mnist"}\'.'
    )


# ---- reading files -------------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    try:
        return read_bytes(path)
    except BadImage as error:  # here the file is the data set itself
        raise ValueError(f"{error} Data files of a source must exist before the run starts.") from error


def _decode(data: bytes, where: str, kind: type[ValueError] = ValueError) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{where} is not UTF-8 text: {error}.") from error


class _Lines(Sequence):
    """The lines of a file that are not blank, kept as one block of bytes and an array of offsets."""

    def __init__(self, data: bytes):
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        bounds = np.unique(np.concatenate([[0], ends + 1, [len(data)]])).astype(np.int64)
        full = [bool(data[a:b].strip()) for a, b in itertools.pairwise(bounds.tolist())]
        self.data = data
        self.begins, self.ends = bounds[:-1][full], bounds[1:][full]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: Any) -> bytes:
        return self.data[self.begins[index] : self.ends[index]]


def _lines(path: str) -> _Lines:
    return _Lines(_read(path).removeprefix(b"\xef\xbb\xbf"))


def _parse(line: bytes, where: str, kind: type[ValueError] = BadRecord) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise kind(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise kind(f"{where} is {type(record).__name__} in JSON; wanted an object with fields.")
    return record


def _medium_field(names: Iterable[str], wanted: tuple[str, ...], where: str) -> str:
    names = list(names)
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"{where} has no image or video path: looked for {', '.join(wanted)}, found {', '.join(names) or 'nothing'}."
    )


def _with_medium(record: Record, wanted: tuple[str, ...], root: str, where: str) -> Record:
    try:
        name = _medium_field(record, wanted, where)
    except ValueError as error:
        raise BadRecord(str(error)) from error
    value = record[name]
    kind = "video" if name == "video" else "image"
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{where}: the {kind} path is {value!r:.80}.")
    if _kind(value) == "video":
        kind = "video"
    return {**record, kind: value if "://" in value else os.path.join(root, value)}


def _kind(name: str) -> str:
    return "video" if os.path.splitext(name)[1].lower().lstrip(".") in VIDEO_ENDINGS else "image"


def _shards(path: str | Sequence[str], ending: str) -> list[str]:
    """Files named by a path, folder, glob, brace range or a list of these, in order, without repeats."""
    found: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        for name in _expand_braces(pattern):
            if paths.is_bucket(name):
                files = _shards_of_bucket(name, ending)
            elif os.path.isdir(name):
                files = sorted(glob.glob(os.path.join(glob.escape(name), "*" + ending)))
            elif glob.has_magic(name) and not os.path.exists(name):
                files = sorted(glob.glob(name))
            else:
                files = [name]
                if not os.path.exists(name):
                    raise ValueError(f"the shard {name} does not exist (from path={pattern!r}).")
            if not files:
                raise ValueError(f"path={pattern!r} matches no *{ending} file.")
            found += files
    return list(dict.fromkeys(found))


def _shards_of_bucket(name: str, ending: str) -> list[str]:
    pattern = glob.has_magic(name)
    if name.endswith(ending) and not pattern:
        return [name]  # its reader says whether it is there; a range may be of thousands
    paths.reach(name)
    if not pattern and not paths.path(name).exists():
        raise ValueError(f"the shard {name} does not exist.")
    if not pattern and not paths.path(name).is_dir():
        return [name]
    folder, _, names = name.rpartition("/") if pattern else (name, "", "*" + ending)
    return sorted(map(str, paths.path(folder).glob(names)))


def _expand_braces(pattern: str) -> Iterator[str]:
    """ "a-{00..02}.tar" → a-00.tar, a-01.tar, a-02.tar; "{x,y}" → x, y; several braces multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    inside = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        low, high = numbers.groups()
        width = len(low) if low.startswith("0") and len(low) > 1 else 0
        options = [str(n).zfill(width) for n in range(int(low), int(high) + 1)]
    else:
        options = inside.split(",")
    for option in options:
        yield from _expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


def _few(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)} files)"


def _plain(value: Any) -> Any:
    """NumPy scalars and byte strings of TFDS as plain Python values."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | list):
        return [_plain(v) for v in (value if isinstance(value, list) else value.tolist())]
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return value

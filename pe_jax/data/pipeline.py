"""Sources → this host's batches: mixing, shuffling, augmentation, batching, and an exact resume from one integer.

A run is one endless sequence of examples, numbered from 0 over all hosts. Which record stands at position p, and how
it is augmented, is a function of (config, seed, p) alone, so batches do not depend on the number of hosts or threads,
and the number of examples consumed is all the state there is. Grain reads the sequence: threads, prefetch, batching.

The order itself is ours. Grain's own shuffle handles 2³² records at most (PE's pool is larger), reseeds epoch e with
seed + e, so neighbouring seeds replay each other's epochs, and took 4 ms an index on very small sets (measured on
0.2.18, November 2026).
"""

import dataclasses
import functools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from pe_jax.data import Spec
from pe_jax.data import sources as sources_lib
from pe_jax.data.image import Augment, BadImage, Preprocess, decode, generator
from pe_jax.data.text import Tokenizer

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_CONFIG = ("sources", "augment", "max_bad_records", "threads")
_PER_SOURCE = ("weight", "templates", "label", "classes", "caption")
_PROBES = 1000  # records tried in place of a bad one before giving up, whatever the limit allows
_SLOTS = 10_000  # resolution of the mixing weights


def batch_spec(
    data_config: Any,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    context_length: int | None,
    teacher: tuple[int, int] | None = None,
) -> dict[str, Spec]:
    """What `create` yields for these arguments; `batch_size` is of the batch meant, this host's or the global one."""
    del data_config  # here shapes do not depend on it, as they do where rows are packed
    height, width = Preprocess(image_size).shape
    text = {} if context_length is None else {"text": Spec((batch_size, context_length), np.dtype(np.int32))}
    taught = {} if teacher is None else {"teacher": Spec((batch_size, *teacher), np.dtype(np.int8))}
    return {
        "image": Spec((batch_size, height, width, 3), np.dtype(np.uint8)),
        **text,
        **taught,
        "index": Spec((batch_size,), np.dtype(np.int64)),
    }


def create(
    data_config: Any,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    context_length: int | None,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    tokenizer: Callable[[str], np.ndarray] | None = None,
    teacher: tuple[int, int] | None = None,
) -> "Loader":
    """Endless batches of images and captions, or of images alone, for one host.

    Args:
      data_config: a mapping of
        sources: list of source configs (`sources.create`), each with an optional `weight` (share of the examples,
          relative; 1) and the arguments of `sources.Captions`;
        augment: fields of `Augment`; absent or empty: every image is squashed, PE's evaluation transform;
        max_bad_records: distinct records this host may replace before it stops (0: the first one is an error);
        threads: readers on this host (8).
      batch_size: of the global batch.
      image_size: pixels, or (height, width).
      context_length: L, tokens in a caption; None: images alone, whose records need no caption.
      seed: of order, captions and augmentation; not negative.
      process_index, process_count: this host and how many there are. Host h of n yields rows [h·b, (h+1)·b) of each
        global batch, b = batch_size / n.
      start: global number of examples consumed before; continues exactly there, on any number of hosts.
      tokenizer: text → int32 [1, L]; `Tokenizer(context_length)` if None.
      teacher: (N, T) of the vectors that `pe-jax teacher` stored with each image, which go beside it unread; the images
        are then taken as they are stored, for it is these pixels that the teacher saw.

    Raises:
      ValueError: for an unknown key, a source that cannot be opened or is too small, or hosts that do not divide the
        batch; and while iterating, once more than `max_bad_records` records were bad.
    """
    config = plain(data_config)
    strict(config, _CONFIG, "data")
    if not config.get("sources"):
        raise ValueError("data.sources is empty; name at least one source.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, process_count={process_count}).")
    if batch_size <= 0 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {process_count} hosts; change either one.")
    if start < 0 or seed < 0:
        raise ValueError(f"start={start} and seed={seed} must not be negative.")
    threads = config.get("threads", 8)
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"data.threads={threads!r} must be a positive integer.")
    opened = [open_source(source, f"data.sources[{i}]") for i, source in enumerate(config["sources"])]
    for source in opened:
        share = batch_size * source.weight / sum(s.weight for s in opened)
        if len(source.records) < max(process_count, math.floor(share)):
            raise ValueError(
                f"{source.name} holds {len(source.records)} records, too few for {process_count} hosts and its share"
                f" of {share:.4g} of a batch of {batch_size}: a batch would hold a record twice. Lower batch_size or"
                " the source's weight, or add records."
            )
    if teacher is not None and config.get("augment"):
        raise ValueError(
            "data.augment must be empty where a teacher's words are read: they are of the pixels as they are stored. "
            "Augment when they are written: pe-jax teacher --augment."
        )
    if context_length is not None:
        tokenizer = tokenizer or Tokenizer(context_length)
        width = np.shape(tokenizer(""))  # also loads the vocabulary once, before the threads need it
        if width != (1, context_length):
            raise ValueError(f"the tokenizer gives {list(width)} for one text; wanted [1, {context_length}].")
    stream = _Stream(
        sources=opened,
        mixture=Mixture([s.weight for s in opened]),
        augment=Augment.from_dict(config["augment"]) if config.get("augment") else None,
        size=Preprocess(image_size).shape,
        tokenizer=tokenizer if context_length is not None else None,
        seed=seed,
        start=start,
        batch=batch_size,
        rows=batch_size // process_count,
        first=process_index * (batch_size // process_count),
        max_bad=config.get("max_bad_records", 0),
        teacher=teacher,
    )
    return Loader(stream, threads)


@runtime_checkable
class Stream(Protocol):
    """This host's rows as Grain reads them: item k is row k % rows of batch k // rows."""

    sources: list["Opened"]
    max_bad: int
    lock: threading.Lock
    start: int  # global rows consumed before the first
    batch: int  # rows of the global batch
    rows: int  # of them, this host's
    made: int  # rows so far
    busy: float  # seconds that all threads took for them

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Loader:
    """An endless iterator of batches {"image": uint8 [b, H, W, 3], "text": int32 [b, L], "index": int64 [b]}.

    Of images alone there is no `text`. `index` numbers the record over all sources, in the order of the config. Close
    it, or use it in a `with`.
    """

    def __init__(self, stream: Stream, threads: int, ahead: int | None = None):
        self._stream, self._threads, self._batches = stream, threads, 0
        ahead = ahead or max(2 * threads, min(2 * stream.rows, 64))
        examples = grain.MapDataset.source(stream).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        )
        batches = grain.experimental.ThreadPrefetchIterDataset(
            examples.batch(stream.rows, drop_remainder=True), prefetch_buffer_size=2
        )
        self._iterator: list[Any] = [iter(batches)]
        # Grain's threads and iterator must end before the interpreter does, also where nobody called close().
        self._finalizer = weakref.finalize(self, lambda held: held.pop().close(), self._iterator)

    @property
    def position(self) -> int:
        """Global number of examples consumed: pass it as `start` to continue."""
        return self._stream.start + self._batches * self._stream.batch

    @property
    def bad(self) -> dict[str, int]:
        """Bad records this host has met and replaced, by source; reading runs ahead of `position` by a few."""
        with self._stream.lock:
            return {source.name: len(source.bad) for source in self._stream.sources}

    @property
    def examples_per_second(self) -> float:
        """What this host's threads could deliver, by the time they took for each example so far; 0 before the first."""
        with self._stream.lock:
            made, busy = self._stream.made, self._stream.busy
        return self._threads * made / max(busy, 1e-9)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if not self._iterator:
            raise ValueError("this loader is closed; make a new one with start=loader.position.")
        batch = next(self._iterator[0])
        self._batches += 1
        return batch

    def close(self) -> None:
        """Ends the reading threads."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def examples(
    source_config: Any, preprocess: Preprocess, *, pixels: str = "float", threads: int = 4
) -> Iterator[tuple[np.ndarray, sources_lib.Record]]:
    """All records of one source, once and in order, for evaluators.

    Args:
      source_config: as in `create`; its `weight` and caption keys are allowed and have no effect here.
      preprocess: makes the images.
      pixels: "float" gives normalised float32 [H, W, 3], "uint8" the pixels before normalisation.
      threads: that read and resize ahead.

    Yields:
      Pairs of the image and its record, whose own `image` is left out.

    Raises:
      ValueError: naming the record, at the first that cannot be read: an evaluation leaves nothing out.
    """
    if pixels not in ("float", "uint8"):
        raise ValueError(f'pixels={pixels!r} must be "float" or "uint8".')
    source = open_source(plain(source_config), "the source")

    def read(index: int) -> tuple[np.ndarray, sources_lib.Record]:
        record, where = source.records[index], source.records.where(index)
        image = _named(preprocess.pixels, where, sources_lib.medium(record, "image", where))
        fields = {name: value for name, value in record.items() if name != "image"}
        return (preprocess.normalize(image) if pixels == "float" else image), fields

    def iterate() -> Iterator[tuple[np.ndarray, sources_lib.Record]]:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        iterator = iter(grain.MapDataset.range(len(source.records)).map(read).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    return iterate()


class Mixture:
    """Deals positions out to sources in proportion to their weights, as evenly as whole numbers allow.

    The weights are rounded to parts of 10,000, at least one part each. Within a cycle every slot goes to the source
    furthest behind its share; `mixture(p)` is the source at position p and how many of its examples came before.
    """

    def __init__(self, weights: list[float]):
        total = sum(weights)
        parts = [max(1, round(_SLOTS * w / total)) for w in weights]
        parts = [p // math.gcd(*parts) for p in parts]
        self.parts, self.cycle = parts, sum(parts)
        self.source = np.empty(self.cycle, np.int32)
        self.rank = np.empty(self.cycle, np.int32)
        given = [0] * len(parts)
        for slot in range(self.cycle):
            behind = [p * (slot + 1) - g * self.cycle for p, g in zip(parts, given, strict=True)]
            k = behind.index(max(behind))
            self.source[slot], self.rank[slot] = k, given[k]
            given[k] += 1
        assert given == parts

    def __call__(self, position: int) -> tuple[int, int]:
        cycle, slot = divmod(position, self.cycle)
        k = int(self.source[slot])
        return k, cycle * self.parts[k] + int(self.rank[slot])


def permute(index: int, size: int, seed: tuple[int, ...]) -> int:
    """Where a shuffle of `size` items by `seed` puts `index`: a bijection of range(size), in constant memory.

    A Feistel network over the smallest even number of bits that hold `size`, walked until it lands inside.
    """
    half, keys = _feistel(size, seed)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = ((right + key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        index = left << half | right
        if index < size:
            return index


@functools.lru_cache(maxsize=1024)  # one entry per source and epoch in use
def _feistel(size: int, seed: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    return half, tuple(np.random.SeedSequence(seed).generate_state(6, np.uint64).tolist())


@dataclasses.dataclass
class Opened:
    """A source in use."""

    name: str
    records: sources_lib.Source
    weight: float
    captions: sources_lib.Captions
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # record number → why


@dataclasses.dataclass
class _Stream:
    """This host's examples: item k is row k % rows of batch k // rows. What Grain reads from."""

    sources: list[Opened]
    mixture: Mixture
    augment: Augment | None
    size: tuple[int, int]
    tokenizer: Callable[[str], np.ndarray] | None  # None: images alone
    seed: int
    start: int
    batch: int
    rows: int
    first: int
    max_bad: int
    teacher: tuple[int, int] | None = None

    def __post_init__(self):
        self.squash = Preprocess(self.size)
        self.lock = threading.Lock()
        self.made, self.busy = 0, 0.0  # examples, and the seconds all threads took for them
        self.offsets = np.cumsum([0, *(len(s.records) for s in self.sources)]).tolist()

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        began = time.perf_counter()
        example = self._example(int(index))
        with self.lock:
            self.made += 1
            self.busy += time.perf_counter() - began
        return example

    def _example(self, index: int) -> dict[str, Any]:
        step, row = divmod(index, self.rows)
        position = self.start + step * self.batch + self.first + row
        number, place = self.mixture(position)
        source = self.sources[number]
        size = len(source.records)
        epoch, place = divmod(place, size)
        chosen = permute(place, size, (self.seed, number, epoch))
        # A bad record gives its place to the next good one of its source: the same one wherever it is met.
        for probe in range(min(size, _PROBES)):
            record = (chosen + probe) % size
            if record in source.bad:
                continue
            try:
                fields = self._read(source, record, position)
            except (BadImage, sources_lib.BadRecord) as error:
                count_bad(self, source, record, error)
                continue
            return fields | {"index": np.int64(self.offsets[number] + record)}
        raise ValueError(f"{source.name}: {min(size, _PROBES)} records in a row are bad, from {chosen} on.")

    def _read(self, source: Opened, index: int, position: int) -> dict[str, np.ndarray]:
        where = source.records.where(index)
        record, text = source.records[index], {}
        if self.tokenizer is not None:
            caption = source.captions(record, generator(self.seed, position, stream=1).random(), where)
            text = {"text": self.tokenizer(caption)[0]}
        image = sources_lib.medium(record, "image", where)
        if self.teacher is not None:
            return {"image": self._stored(image, where), "teacher": self._taught(record, where)} | text
        if self.augment is None:
            image = _named(self.squash.pixels, where, image)
        else:
            image = _named(self.augment, where, image, self.size, generator(self.seed, position))
        return {"image": image} | text

    def _stored(self, image: Any, where: str) -> np.ndarray:
        """The pixels that a teacher saw."""
        pixels = _named(lambda image: np.array(decode(image).convert("RGB")), where, image)
        if pixels.shape[:2] != self.size:
            raise sources_lib.BadRecord(
                f"{where}: the teacher saw {pixels.shape[0]} x {pixels.shape[1]} pixels, and the phase has image_size="
                f"{self.size[0]}; make them equal."
            )
        return pixels

    def _taught(self, record: sources_lib.Record, where: str) -> np.ndarray:
        """What it said of them."""
        words, (tokens, width) = record.get("teacher", b""), self.teacher or (0, 0)
        if not isinstance(words, bytes) or len(words) != tokens * width:
            raise sources_lib.BadRecord(
                f"{where} has {len(words):,} bytes of a teacher; want {tokens} x {width}, as `pe-jax teacher` writes "
                "them for this image and patch size."
            )
        return np.frombuffer(words, np.int8).reshape(tokens, width)


def count_bad(stream: Stream, source: Opened, index: int, error: ValueError) -> None:
    """Notes that record `index` of a stream's source is bad; a ValueError once there are more than the limit."""
    with stream.lock:
        if index in source.bad:
            return
        source.bad[index] = str(error)
        total = sum(len(s.bad) for s in stream.sources)
    if total > stream.max_bad:
        raise ValueError(
            f"{total} bad records, more than data.max_bad_records={stream.max_bad}; the last: {error} Repair the"
            " data, or raise the limit to replace such records by their neighbours."
        ) from error
    log.warning("bad record %d of at most %d replaced by the next of %s: %s", total, stream.max_bad, source.name, error)


def _named(make: Callable[..., np.ndarray], where: str, *arguments: Any) -> np.ndarray:
    """`make(*arguments)`, with the record's place in front of what a BadImage says."""
    try:
        return make(*arguments)
    except BadImage as error:
        raise BadImage(f"{where}: {error}") from error


def open_source(config: Mapping[str, Any], where: str) -> Opened:
    """A source of a config's `sources`, with what a pipeline asks of it; `where` is how an error calls it."""
    weight = config.get("weight", 1.0)
    if not isinstance(weight, (int, float)) or not (0 < weight < math.inf):
        raise ValueError(f"{where}.weight={weight!r} must be a positive number.")
    captions = {k: config[k] for k in _PER_SOURCE if k != "weight" and k in config}
    try:
        records = sources_lib.create({k: v for k, v in config.items() if k not in _PER_SOURCE})
        return Opened(
            name=f"{where} ({config.get('path', config.get('dataset', config['name']))})",
            records=records,
            weight=float(weight),
            captions=sources_lib.Captions(**captions),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def plain(config: Any) -> Any:
    """A ConfigDict, or any mapping, as plain dicts and lists."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def strict(config: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """A ValueError for a key that is not known."""
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"{where} has no {', '.join(map(repr, unknown))}; its keys are {', '.join(known)}.")

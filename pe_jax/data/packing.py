"""Records of conversations → this host's batches of rows that several samples share, resumable from one integer.

The endless mixture of records (`pe_jax.data.pipeline`) is cut into groups of as many as make 32 rows, and each group is
packed into its rows by itself. So row r is a function of (config, seed, r): the number of rows consumed is all the
state there is, and batches do not depend on the number of hosts or threads. What a group's rows do not take is left
out, and counted; the next epoch groups it with others.
"""

import concurrent.futures
import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from pe_jax.data import Spec, pipeline, tokenizers
from pe_jax.data.chat import Conversation, Rendered, Template, TooLong, Vision, from_record, render, template
from pe_jax.data.image import BadImage, generator
from pe_jax.data.sources import BadRecord
from pe_jax.data.tokenizers import Tokenizer
from pe_jax.data.video import BadVideo

_CONFIG = (
    "name",
    "sources",
    "tokenizer",
    "template",
    "length",
    "chunks",
    "max_tiles",
    "frames",
    "pack",
    "samples_per_row",
    "group",
    "max_bad_records",
    "threads",
)
_LEFT_OUT = 0.01  # share of records that may find no place in their group's rows, against rows that are less full
_SAMPLED = 256  # records measured to find how many make a group
_PROBES = 1000  # records tried in place of a bad one before giving up


def batch_spec(
    data_config: Any, *, batch_size: int, image_size: int, patch_size: int, pooling: int = 1, image_token: int = 0
) -> dict[str, Spec]:
    """What `create` yields for these arguments; `batch_size` is of the batch meant, this host's or the global one."""
    config, vision = _checked(data_config, image_size, patch_size, pooling)
    length, chunks = config["length"], config["chunks"]
    row = Spec((batch_size, length), np.dtype(np.int32))
    return {
        "tokens": row,
        "targets": row,
        "segments": row,
        "slots": row,
        "chunks": Spec((batch_size, chunks, vision.image_size, vision.image_size, 3), np.dtype(np.uint8)),
        "index": Spec((batch_size,), np.dtype(np.int64)),
    }


def create(
    data_config: Any,
    *,
    batch_size: int,
    image_size: int,
    patch_size: int,
    image_token: int,
    pooling: int = 1,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
) -> "Loader":
    """Endless batches of packed conversations for one host.

    Args:
      data_config: a mapping of
        sources: as in `pipeline.create`, with `weight`; and caption keys for records that have only captions;
        tokenizer: path of its file or folder;
        template: "llama3", "qwen2", or "plain" for a warm-up by captions;
        length: L, tokens of a row;
        chunks: C, image chunks of a row;
        max_tiles, frames: as in `Vision`;
        pack: whether samples share rows (True); otherwise a row is one sample;
        samples_per_row: how many records a row is dealt on average; by default as many as leave 1% of them without a
          place, by the lengths of the first 256;
        group: rows packed together (32); a host reads whole groups, so where it has fewer rows of a batch, as many as
          it has save reading;
        max_bad_records: distinct records this host may replace before it stops (0: the first one is an error);
          conversations that are too long are counted apart, and replaced without a limit;
        threads: readers on this host (8).
      batch_size: rows of the global batch.
      image_size: S, pixels of a chunk's side.
      patch_size, pooling, image_token: of the model.
      seed: of order and choice of captions; not negative.
      process_index, process_count: this host and how many there are. Host h of n yields rows [h·b, (h+1)·b) of each
        global batch, b = batch_size / n.
      start: global number of rows consumed before; continues exactly there, on any number of hosts.

    Raises:
      ValueError: for an unknown key, a source or tokenizer that cannot be opened, or sizes that do not fit together;
        and while iterating, once more than `max_bad_records` records were bad.
    """
    config, vision = _checked(data_config, image_size, patch_size, pooling)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, process_count={process_count}).")
    if batch_size <= 0 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {process_count} hosts; change either one.")
    if start < 0 or seed < 0:
        raise ValueError(f"start={start} and seed={seed} must not be negative.")
    tokenizer = tokenizers.load(config["tokenizer"])
    if image_token < tokenizer.vocab_size and tokenizer.piece(image_token):
        raise ValueError(
            f"image_token={image_token} is {tokenizer.piece(image_token)!r} in {tokenizer.path}; wanted a special"
            f" token, such as {next(iter(tokenizer.specials.items()), 'one beyond the vocabulary')}."
        )
    chosen = template(config["template"])
    chosen.check(tokenizer)
    sources = [pipeline.open_source(source, f"data.sources[{i}]") for i, source in enumerate(config["sources"])]
    rows = batch_size // process_count
    stream = _Rows(
        sources=sources,
        tokenizer=tokenizer,
        template=chosen,
        vision=vision,
        image_token=image_token,
        length=config["length"],
        room=config["chunks"],
        seed=seed,
        start=start,
        batch=batch_size,
        rows=rows,
        first=process_index * rows,
        max_bad=config["max_bad_records"],
        threads=config["threads"],
        group=config["group"],
    )
    stream.begin(config["samples_per_row"] if config["pack"] else 1.0)
    # A row with all its chunks may take 40 MB, so few are made ahead.
    return Loader(stream, config["threads"], ahead=2 * config["threads"])


def _checked(data_config: Any, image_size: int, patch_size: int, pooling: int) -> tuple[dict[str, Any], Vision]:
    """The config with its defaults, and its vision settings, found to fit together."""
    config = pipeline.plain(data_config)
    pipeline.strict(config, _CONFIG, "data")
    needed = ("sources", "tokenizer", "template", "length", "chunks")
    if missing := [key for key in needed if not config.get(key)]:
        raise ValueError(f"data lacks {', '.join(missing)}; conversations need {', '.join(needed)}.")
    defaults = {"max_tiles": 1, "frames": 8, "pack": True, "samples_per_row": None, "group": 32}
    config = defaults | {"max_bad_records": 0, "threads": 8} | config
    for key in ("length", "chunks", "group", "threads"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"data.{key}={config[key]!r} must be a positive integer.")
    per_row = config["samples_per_row"]
    if per_row is not None and not (isinstance(per_row, (int, float)) and 1 <= per_row < math.inf):
        raise ValueError(f"data.samples_per_row={per_row!r} must be a number of at least 1, or None.")
    template(config["template"])
    vision = Vision(image_size, patch_size, pooling, config["max_tiles"], config["frames"])
    # Videos are held to it where `frames` is given: a warm-up on images has no room for any.
    most = max(vision.image_chunks, vision.frames if "frames" in data_config else 0)
    if most > config["chunks"]:
        raise ValueError(
            f"max_tiles={vision.max_tiles} and frames={vision.frames} make up to {most} chunks of one image or"
            f" video; a row has room for chunks={config['chunks']}. Raise that, or lower them."
        )
    if most * vision.tokens >= config["length"]:
        raise ValueError(
            f"{most} chunks of {vision.tokens} tokens leave no room for text in length={config['length']};"
            " raise it, or lower max_tiles, frames or image_size."
        )
    return config, vision


def pack(
    tokens: Sequence[int] | np.ndarray, chunks: Sequence[int] | np.ndarray, *, rows: int, length: int, room: int
) -> tuple[list[list[int]], list[int]]:
    """Deals N samples out to `rows` rows of at most `length` tokens and `room` chunks, none of them empty.

    The `rows` largest begin a row each; every further one, from large to small, goes to the fullest row that takes it.

    Args:
      tokens, chunks: of each sample; a sample fits into a row by itself.
      rows: at most N.

    Returns:
      The samples of each row, in their own order, and the samples that no row takes.
    """
    assert rows <= len(tokens), (rows, len(tokens))
    sizes = np.array([tokens, chunks], np.int64)
    budget = np.array([[length], [room]], np.int64)
    free = np.repeat(budget, rows, 1)
    dealt: list[list[int]] = [[] for _ in range(rows)]
    left = []
    for rank, sample in enumerate(np.argsort(-(sizes / budget).max(0), kind="stable").tolist()):
        size = sizes[:, sample, None]
        if rank < rows:
            row = rank
        else:
            fits = np.flatnonzero((free >= size).all(0))
            if not len(fits):
                left.append(sample)
                continue
            row = int(fits[np.argmin(free[0, fits])])
        free[:, row] -= size[:, 0]
        dealt[row].append(sample)
    return [sorted(samples) for samples in dealt], sorted(left)


class Loader(pipeline.Loader):
    """An endless iterator of batches: `tokens`, `targets`, `segments`, `slots` int32 [b, L], `chunks` uint8
    [b, C, S, S, 3], `index` int64 [b] (the first record of the row); `pe_jax.types` says what they mean.
    """

    _stream: "_Rows"

    def close(self) -> None:
        """Ends the reading threads."""
        super().close()
        self._stream.pool.shutdown(cancel_futures=True)

    @property
    def fill(self) -> float:
        """Share of the places of rows made so far that hold a token."""
        with self._stream.lock:
            return self._stream.used / max(self._stream.made * self._stream.length, 1)

    @property
    def samples_per_row(self) -> float:
        """Records dealt to a row, on average."""
        return self._stream.window / self._stream.group

    @property
    def too_long(self) -> dict[str, int]:
        """Records this host has met whose first answer does not fit into a row, by source."""
        with self._stream.lock:
            return {source.name: len(self._stream.long[i]) for i, source in enumerate(self._stream.sources)}

    def survey(self, groups: int = 8) -> dict[str, float]:
        """What the first groups of rows hold, found without decoding an image.

        Returns:
          `rows` looked at; `samples` a row; shares of their `tokens` places that are taken, of which `visual` are
          visual tokens' and `asked` ask for one; share of `chunks` in use; share of records `left_out`.
        """
        stream = self._stream
        found = [group for number in range(groups) for group in _Group(stream, number).rows]
        samples = [sample for row in found for sample in row]
        places = stream.length * len(found)
        return {
            "rows": len(found),
            "samples": len(samples) / len(found),
            "tokens": sum(sample.rendered.length for sample in samples) / places,
            "visual": sum(int((sample.rendered.slots >= 0).sum()) for sample in samples) / places,
            "asked": sum(int((sample.rendered.targets >= 0).sum()) for sample in samples) / places,
            "chunks": sum(sample.chunks for sample in samples) / (stream.room * len(found)),
            "left_out": 1 - len(samples) / (groups * stream.window),
        }

    @property
    def left_out(self) -> float:
        """Share of the records met so far for which their group had no place."""
        with self._stream.lock:
            return self._stream.left / max(self._stream.planned, 1)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What is known of a record before its images are decoded."""

    index: int  # over all sources
    place: tuple[int, int]  # its position in the mixture, and how many records were tried there before it
    conversation: Conversation
    chunks: int
    rendered: Rendered


@dataclasses.dataclass
class _Rows:
    """This host's rows: item k is row k % rows of batch k // rows. What Grain reads from."""

    sources: list[Any]
    tokenizer: Tokenizer
    template: Template
    vision: Vision
    image_token: int
    length: int
    room: int
    seed: int
    start: int
    batch: int
    rows: int
    first: int
    max_bad: int
    threads: int
    group: int

    def __post_init__(self):
        self.lock = threading.Lock()
        self.made, self.busy, self.used = 0, 0.0, 0  # rows, the seconds all threads took for them, their tokens
        self.left, self.planned = 0, 0  # records left out, of how many
        self.long: list[set[int]] = [set() for _ in self.sources]
        self.offsets = np.cumsum([0, *(len(s.records) for s in self.sources)]).tolist()
        self.mixture = pipeline.Mixture([s.weight for s in self.sources])
        self.pool = concurrent.futures.ThreadPoolExecutor(self.threads, "pe_jax-plan")
        weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)
        self.groups: dict[int, _Group] = {}
        self.ahead = 2 * self.threads
        self.window = self.group
        self.budget = {"rows": self.group, "length": self.length, "room": self.room}

    def begin(self, samples_per_row: float | None) -> None:
        """Fixes how many records make a group, by packing the first ones if `samples_per_row` is None."""
        self.window = max(self.group, math.floor(self.group * (samples_per_row or self._most())))

    def _most(self) -> float:
        """How many records a row can be dealt with few of them left out."""
        found = list(self.pool.map(self.find, range(_SAMPLED)))
        tokens = np.array([sample.rendered.length for sample in found])
        chunks = np.array([sample.chunks for sample in found])
        rng = np.random.default_rng(self.seed)
        most = 1 / max(tokens.mean() / self.length, chunks.mean() / self.room)
        while most > 1:
            draws = rng.integers(0, len(found), (4, max(self.group, math.floor(self.group * most))))
            left = sum(len(pack(tokens[draw], chunks[draw], **self.budget)[1]) for draw in draws)
            if left <= _LEFT_OUT * draws.size:
                break
            most *= 0.98
        return most

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        began = time.perf_counter()
        group, row = divmod(self._number(int(index)), self.group)
        samples = self._grouped(group, self._number(int(index) + self.group) // self.group).rows[row]
        made = self._row(samples)
        with self.lock:
            self.made += 1
            self.busy += time.perf_counter() - began
            self.used += int((made["segments"] > 0).sum())
        return made

    def _number(self, index: int) -> int:
        """The global row that is this host's item `index`."""
        step, row = divmod(index, self.rows)
        return self.start + step * self.batch + self.first + row

    def _grouped(self, group: int, later: int) -> "_Group":
        """A group; the one that is needed later is begun."""
        with self.lock:
            for number in (group, later):
                if number in self.groups:
                    self.groups[number] = self.groups.pop(number)  # the last used stands last
                else:
                    self.groups[number] = _Group(self, number)
            while len(self.groups) > 4 + 2 * self.ahead // min(self.rows, self.group):
                self.groups.pop(next(iter(self.groups)))
            return self.groups[group]

    def find(self, position: int, tried: int = 0, length: int | None = None, room: int | None = None) -> _Sample:
        """The first good record for a position of the mixture, from the `tried`-th on, that these budgets take.

        A bad record gives its place to the next of its source: the same one wherever it is met.
        """
        number, place = self.mixture(position)
        source = self.sources[number]
        size = len(source.records)
        epoch, place = divmod(place, size)
        chosen = pipeline.permute(place, size, (self.seed, number, epoch))
        for probe in range(tried, min(size, _PROBES)):
            record = (chosen + probe) % size
            where = source.records.where(record)
            try:
                draw = generator(self.seed, position, stream=1).random()
                conversation = from_record(source.records[record], where, source.captions, draw)
                chunks = self.vision.count(conversation)
                rendered = self._rendered(conversation, chunks, limit=self.length)
            except TooLong:
                rendered = None
            except (BadImage, BadVideo, BadRecord) as error:
                told = error if where in str(error) else type(error)(f"{where}: {error}")
                pipeline.count_bad(self, source, record, told)
                continue
            if rendered is None or not rendered.length or chunks > self.room:
                with self.lock:
                    self.long[number].add(record)
                continue
            sample = _Sample(self.offsets[number] + record, (position, probe), conversation, chunks, rendered)
            if length is None or room is None or (sample.rendered.length <= length and chunks <= room):
                return sample
        raise ValueError(f"{source.name}: {min(size, _PROBES)} records in a row are of no use, from {chosen} on.")

    def _rendered(self, conversation: Conversation, chunks: int, limit: int) -> Rendered:
        return render(
            conversation,
            self.tokenizer,
            self.template,
            chunks=chunks,
            chunk_tokens=self.vision.tokens,
            image_token=self.image_token,
            limit=limit,
        )

    def _row(self, samples: list[_Sample]) -> dict[str, Any]:
        size = self.vision.image_size
        row: dict[str, Any] = {name: np.full(self.length, -1, np.int32) for name in ("targets", "slots")}
        row |= {name: np.zeros(self.length, np.int32) for name in ("tokens", "segments")}
        row["chunks"] = np.zeros((self.room, size, size, 3), np.uint8)
        spare = [
            self.length - sum(sample.rendered.length for sample in samples),
            self.room - sum(sample.chunks for sample in samples),
        ]
        at = chunk = 0
        for segment, planned in enumerate(samples, 1):
            sample, pixels = self._decoded(planned, spare)
            rendered = sample.rendered
            if len(pixels) != sample.chunks:  # a video with fewer frames, where turns left out might fit again
                rendered = self._rendered(sample.conversation, len(pixels), limit=rendered.length + 2)
            count = rendered.length
            here = slice(at, at + count)
            slots = rendered.slots[:count]
            row["tokens"][here] = rendered.ids[:count]
            row["targets"][here] = rendered.targets[:count]
            row["slots"][here] = np.where(slots < 0, -1, slots + chunk * self.vision.tokens)
            row["segments"][here] = segment
            row["chunks"][chunk : chunk + len(pixels)] = pixels
            row.setdefault("index", np.int64(sample.index))
            at, chunk = at + count, chunk + len(pixels)
        return row

    def _decoded(self, sample: _Sample, spare: list[int]) -> tuple[_Sample, np.ndarray]:
        """The sample and its chunks; where they cannot be decoded, of the next record that the row still takes."""
        planned = sample
        while True:
            try:
                pixels = self.vision.chunks(sample.conversation)
                break
            except (BadImage, BadVideo) as error:
                position, tried = sample.place
                number = self.mixture(position)[0]
                pipeline.count_bad(self, self.sources[number], sample.index - self.offsets[number], error)
                length, room = planned.rendered.length + spare[0], planned.chunks + spare[1]
                sample = self.find(position, tried + 1, length, room)
        spare[0] -= sample.rendered.length - planned.rendered.length
        spare[1] -= sample.chunks - planned.chunks
        return sample, pixels


class _Group:
    """The samples of the rows that are packed together; the stream's pool begins to read them at once."""

    def __init__(self, stream: _Rows, number: int):
        self.stream, self.number, self.lock = stream, number, threading.Lock()
        positions = range(number * stream.window, (number + 1) * stream.window)
        self.found = [stream.pool.submit(stream.find, position) for position in positions]
        self._rows: list[list[_Sample]] | None = None

    @property
    def rows(self) -> list[list[_Sample]]:
        with self.lock:
            if self._rows is None:
                stream = self.stream
                samples = [future.result() for future in self.found]
                dealt, left = pack(
                    [sample.rendered.length for sample in samples],
                    [sample.chunks for sample in samples],
                    **stream.budget,
                )
                # Largest first as they were dealt, rows would make uneven batches.
                shuffle = (stream.seed, self.number, stream.group)
                order = [pipeline.permute(row, stream.group, shuffle) for row in range(stream.group)]
                self._rows, self.found = [[samples[i] for i in dealt[row]] for row in order], []
                with stream.lock:
                    stream.left += len(left)
                    stream.planned += len(samples)
            return self._rows

"""Conversations about images and videos → packed rows of tokens, targets, visual slots and image chunks (PE §4, PLM).

A record has `conversations`, a list of {"from": "human" or "assistant", "value": text}, and one of `image` (a path, or
a list of them), `video` (with `start_time`, `end_time` in seconds and `bbox_map`), or neither. `bbox` with `width` and
`height` gives the boxes that texts name (`pe_jax.data.regions`). A `question` with its `answer` makes a conversation
of one turn, a caption alone one without a question.

What stands where is PLM's: `render` for training, `prompt` for generation. `create` packs samples into rows.
"""

import concurrent.futures
import dataclasses
import io
import logging
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int32, UInt8

from pe_jax import paths
from pe_jax.data import Spec, packing, pipeline, regions, tiles, tokenizers
from pe_jax.data import sources as sources_lib
from pe_jax.data.image import BadImage, Image, generator, read_bytes
from pe_jax.data.sources import BadRecord
from pe_jax.data.tokenizers import Tokenizer
from pe_jax.data.video import BadVideo, Reader, Video

log = logging.getLogger(__name__)

SYSTEM = (  # the one sentence that all PLM models were trained behind
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
    " provides, and assist the user with a variety of tasks using natural language."
)

_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKERS = ("<image>\n", "\n<image>", "<image>", "<video>\n", "\n<video>", "<video>")
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
    "max_bad_records",
    "threads",
)
_GROUP = 32  # rows packed together
_LEFT_OUT = 0.01  # share of records that may find no place in their group's rows, against rows that are less full
_SAMPLED = 256  # records measured to find how many make a group
_PROBES = 1000  # records tried in place of a bad one before giving up


class TooLong(BadRecord):
    """A conversation of which not even the first answer fits; the message says by how much."""


# ---- conversations -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is said about which images or video.

    Attributes:
      turns: ("user" or "assistant", text), in turn, the user first.
      images: each anything that `pe_jax.data.image.decode` takes.
      video: in place of images.
      start, end: seconds of the part of the video that is meant; None is its beginning or end.
      boxes: (left, top, right, bottom) in pixels to draw on a frame, by the frame's number in the video.
      system: in place of the template's own first words.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Image, ...] = ()
    video: Video | None = None
    start: float | None = None
    end: float | None = None
    boxes: Mapping[int, Sequence[float]] = dataclasses.field(default_factory=dict)
    system: str | None = None

    def __post_init__(self):
        for i, (role, text) in enumerate(self.turns):
            if role != ("user", "assistant")[i % 2]:
                raise ValueError(f"turn {i} is of {role!r}; wanted the user's first and then one of each in turn.")
            if not isinstance(text, str):
                raise ValueError(f"turn {i} is {text!r:.80}; wanted a text.")
        if not self.turns:
            raise ValueError("a conversation has at least one turn; this one has none.")
        if self.images and self.video is not None:
            raise ValueError("a conversation is about images or about a video; this one has both.")


def from_record(
    record: Mapping[str, Any], where: str, captions: sources_lib.Captions | None = None, draw: float = 0.0
) -> Conversation:
    """The conversation of a record (see above).

    Args:
      record: as a source gives it, paths joined already.
      where: how a message calls it.
      captions: finds the caption of a record that has neither a conversation nor a question.
      draw: in [0, 1), chooses among several captions.

    Raises:
      BadRecord: naming it, if it has no text, or its turns are not in order.
    """
    if "conversations" in record:
        turns = [_turn(turn, where) for turn in _list(record["conversations"], "conversations", where)]
        while turns and turns[0][0] == "assistant":  # as PLM reads sets that open with a greeting
            turns = turns[1:]
    elif "question" in record and "answer" in record:
        turns = [("user", _text(record["question"], where)), ("assistant", _text(record["answer"], where))]
    else:
        turns = [("user", ""), ("assistant", (captions or sources_lib.Captions())(dict(record), draw, where))]
    try:
        if "bbox" in record:
            size = record.get("width"), record.get("height")
            if not all(isinstance(side, (int, float)) and side > 0 for side in size):
                raise ValueError(f"bbox needs the image's width and height in pixels; got {size[0]!r} and {size[1]!r}.")
            turns = [(role, regions.fill(text, record["bbox"], *size)) for role, text in turns]  # type: ignore
        images = record.get("image", ())
        return Conversation(
            turns=tuple(turns),
            images=tuple(images) if isinstance(images, (list, tuple)) else (images,),
            video=record.get("video"),
            start=record.get("start_time"),
            end=record.get("end_time"),
            boxes={int(k): box for k, box in (record.get("bbox_map") or {}).items() if box is not None},
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRecord(f"{where}: {error}") from error


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or turn.get("from") not in _ROLES or "value" not in turn:
        raise BadRecord(f'{where}: a turn is {turn!r:.80}; wanted {{"from": "human" or "assistant", "value": text}}.')
    return _ROLES[turn["from"]], _text(turn["value"], where)


def _list(value: Any, name: str, where: str) -> list:
    if not isinstance(value, list):
        raise BadRecord(f"{where}: {name} is {value!r:.80}; wanted a list.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, (str, int, float)):  # answers that are numbers are common in JSON
        raise BadRecord(f"{where}: a turn's text is {value!r:.80}; wanted a text.")
    return str(value)


# ---- images and videos as chunks -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vision:
    """How the images and videos of a conversation become chunks of S x S pixels, of T visual tokens each.

    Attributes:
      image_size: S.
      patch_size, pooling: of the model; T = (S / patch_size / pooling)².
      max_tiles: 1 squashes an image to one chunk; more gives its tiles behind a thumbnail (`pe_jax.data.tiles`).
        Each of several images is one chunk.
      frames: the most frames of a video, a chunk each.
    """

    image_size: int
    patch_size: int
    pooling: int = 1
    max_tiles: int = 1
    frames: int = 8

    def __post_init__(self):
        for name in (f.name for f in dataclasses.fields(self)):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if self.image_size % (side := self.patch_size * self.pooling):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size times pooling, {side}.")

    @property
    def tokens(self) -> int:
        """T, visual tokens of a chunk."""
        return (self.image_size // (self.patch_size * self.pooling)) ** 2

    @property
    def most(self) -> int:
        """The most chunks of one image, or of one video."""
        return max(self.frames, 1 if self.max_tiles == 1 else 1 + self.max_tiles)

    def count(self, conversation: Conversation) -> int:
        """How many chunks `chunks` gives, from an image's header alone; of a short video it may give fewer."""
        if conversation.video is not None:
            return self.frames
        if len(conversation.images) != 1 or self.max_tiles == 1:
            return len(conversation.images)
        columns, rows = tiles.canvas(*_size(conversation.images[0]), self.image_size, self.max_tiles)
        return 1 + columns * rows

    def chunks(self, conversation: Conversation) -> UInt8[np.ndarray, "C S S 3"]:
        """The chunks, in the order of their places in the text.

        Raises:
          BadImage, BadVideo: for what cannot be decoded.
        """
        images: Sequence[Any] = conversation.images
        if conversation.video is not None:
            reader = Reader(conversation.video)
            places = frame_places(len(reader), reader.fps, self.frames, conversation.start, conversation.end)
            images = reader.read(places)
            boxes = conversation.boxes
            images = [
                regions.draw(image, boxes[i]) if i in boxes else image for i, image in zip(places, images, strict=True)
            ]
        elif len(images) == 1 and self.max_tiles > 1:
            return tiles.tiles(images[0], self.image_size, self.max_tiles)
        shape = (len(images), self.image_size, self.image_size, 3)
        return np.array([tiles.whole(image, self.image_size) for image in images], np.uint8).reshape(shape)


def frame_places(
    count: int, fps: float, frames: int, start: float | None = None, end: float | None = None
) -> list[int]:
    """Which of a video's `count` frames PLM looks at: one a second, thinned out evenly to `frames` where they are more.

    Where they are fewer, `frames` evenly over the clip, or all of its frames if even those are fewer. First and last
    are always among them.

    Args:
      fps: frames a second; 0 where unknown, which takes `frames` over the whole.
      start, end: seconds.
    """
    first = 0 if start is None else min(int(start * fps), count - 1)
    last = count - 1 if end is None else min(int(end * fps), count - 1)
    if first > last:
        first, last = last, first
    stride = max(1, round(fps))
    places = list(range(first, last + 1, stride)) if fps else []
    if len(places) == frames:
        return places
    if len(places) < frames:
        places = list(range(first, last + 1))
        frames = min(frames, len(places))
    step = (len(places) - 1) / (frames - 1) if frames > 1 else 0
    return [places[round(i * step)] for i in range(frames)]


def _size(image: Image) -> tuple[int, int]:
    """(width, height) of an image, from its header."""
    if isinstance(image, PIL.Image.Image):
        return image.size
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    local = isinstance(image, (str, os.PathLike)) and not paths.is_bucket(image)
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image of {len(image)} bytes"
    try:
        file = image if local else io.BytesIO(image if isinstance(image, bytes) else read_bytes(image))
        with PIL.Image.open(file) as opened:
            return opened.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"{name} cannot be opened: {error}.") from error


# ---- from turns to tokens ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around turns; `<|names|>` in it are special tokens, which no user can write.

    Attributes:
      begin: before all.
      header: before a turn, with {role}.
      close: after a turn.
      end: after the last answer.
      system: the first turn's text; None: there is none.
      question: whether the user's texts are kept; a warm-up shows images and asks for captions alone.
    """

    begin: str
    header: str
    close: str
    end: str
    system: str | None
    question: bool = True


TEMPLATES = {
    "llama3": Template(
        begin="<|begin_of_text|>",
        header="<|start_header_id|>{role}<|end_header_id|>\n\n",
        close="<|eot_id|>",
        end="<|end_of_text|>",
        system=SYSTEM,
    ),
    "qwen2": Template(begin="", header="<|im_start|>{role}\n", close="<|im_end|>\n", end="", system=SYSTEM),
    "plain": Template(begin="", header="", close="\n", end="", system=None, question=False),
}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One conversation in tokens.

    Attributes:
      ids: [N] the tokens; at visual places the image token.
      answer: [N] whether the token is one that the model is to say.
      slots: [N] for a visual place, chunk * T + t, and -1 elsewhere.
    """

    ids: Int32[np.ndarray, "N"]
    answer: Bool[np.ndarray, "N"]
    slots: Int32[np.ndarray, "N"]

    @property
    def length(self) -> int:
        """Places that training takes: up to the token before the last one that is asked for; 0 if none is."""
        asked = np.flatnonzero(self.answer)
        return int(asked[-1]) if len(asked) else 0

    @property
    def targets(self) -> Int32[np.ndarray, "N"]:
        """[N] the token to say after each place, -1 where nothing is asked."""
        targets = np.full(len(self.ids), -1, np.int32)
        targets[:-1] = np.where(self.answer[1:], self.ids[1:], -1)
        return targets


def template(name: str) -> Template:
    """A template by its name.

    Raises:
      ValueError: if it is unknown.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r} is unknown; the templates are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: Template,
    *,
    chunks: int,
    chunk_tokens: int,
    image_token: int,
    limit: int | None = None,
) -> Rendered:
    """A conversation as it is trained on: all of an answer's turn is asked for, with its header and what ends it.

    The visual tokens of an image or video stand at the beginning of the first question; those of several images at
    their `<image>` marks, or all at the beginning if there is no mark at all. A last question without an answer is left
    out.

    Args:
      chunks: how many there are (`Vision.count`).
      chunk_tokens: T.
      image_token: id at visual places.
      limit: more tokens than a sample may have: the turn with which it would have as many, and all after it, is left
        out whole.

    Raises:
      TooLong: if the first question reaches the limit by itself.
      BadRecord: if there is no answer, or there are other than `chunks` marks.
    """
    turns = conversation.turns[: len(conversation.turns) // 2 * 2]
    if not turns:
        raise BadRecord("the conversation has no answer to learn.")
    segments = _segments(dataclasses.replace(conversation, turns=turns), template, chunks)
    segments[-1][1].extend(_trusted(template.end))
    ids: list[int] = []
    answer: list[bool] = []
    slots: list[int] = []
    for asked, parts in segments:
        more, places = _encoded(parts, tokenizer, chunk_tokens, image_token, first=sum(s >= 0 for s in slots))
        if limit is not None and len(ids) + len(more) >= limit:
            if not ids:
                raise TooLong(f"the first turn has {len(more)} tokens; wanted fewer than {limit}.")
            break
        ids += more
        slots += places
        answer += [asked] * len(more)
    return Rendered(np.array(ids, np.int32), np.array(answer, bool), np.array(slots, np.int32))


def prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: Template,
    *,
    chunks: int,
    chunk_tokens: int,
    image_token: int,
) -> Rendered:
    """A conversation up to where the model is to answer its last question; the answer to that, if there is one, is
    left out. The arguments are those of `render`.

    Raises:
      BadRecord: if there are other than `chunks` marks.
    """
    turns = conversation.turns[: (len(conversation.turns) + 1) // 2 * 2 - 1]
    segments = _segments(dataclasses.replace(conversation, turns=turns), template, chunks)
    parts = [part for _, segment in segments for part in segment]
    parts += _trusted(template.header.format(role="assistant"))
    ids, slots = _encoded(parts, tokenizer, chunk_tokens, image_token)
    return Rendered(np.array(ids, np.int32), np.zeros(len(ids), bool), np.array(slots, np.int32))


class _Special(str):
    """The name of a special token, to tell it from text."""


_Part = str | int  # text, a special token, or a number of chunks


def _trusted(text: str) -> list[_Part]:
    """A template's own text, in which special tokens are written out."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [_Special(part) if i % 2 else part for i, part in enumerate(parts) if part]


def _segments(conversation: Conversation, template: Template, chunks: int) -> list[tuple[bool, list[_Part]]]:
    """The parts of each turn, and whether it is the model's."""
    system = conversation.system if conversation.system is not None else template.system
    segments: list[tuple[bool, list[_Part]]] = []
    for i, (role, parts) in enumerate(_placed(conversation, chunks)):
        before = _trusted(template.begin) if i == 0 else []
        if i == 0 and system is not None and template.system is not None:
            before += [*_trusted(template.header.format(role="system")), system, *_trusted(template.close)]
        around = _trusted(template.header.format(role=role)), _trusted(template.close)
        if role == "user" and not template.question:
            around, parts = ([], []), [part for part in parts if isinstance(part, int)]
        segments.append((role == "assistant", [*before, *around[0], *parts, *around[1]]))
    return segments


def _placed(conversation: Conversation, chunks: int) -> list[tuple[str, list[_Part]]]:
    """The turns, with `chunks` visual chunks in the user's; unused marks in the first question are taken out."""
    turns: list[tuple[str, list[_Part]]] = [(role, [text]) for role, text in conversation.turns]
    marks = sum(text.count("<image>") for role, text in conversation.turns if role == "user")
    if len(conversation.images) > 1 and marks:
        if marks != chunks:
            raise BadRecord(f"the questions have {marks} <image> marks for {chunks} images; wanted one each, or none.")
        for i, (role, text) in enumerate(conversation.turns):
            if role == "user":
                pieces = text.split("<image>")
                turns[i] = role, [part for piece in pieces for part in (1, piece)][1:]
        return turns
    first = conversation.turns[0][1]
    for mark in _MARKERS:
        first = first.replace(mark, "")
    turns[0] = "user", [*([chunks] if chunks else []), first]
    return turns


def _encoded(
    parts: Sequence[_Part], tokenizer: Tokenizer, chunk_tokens: int, image_token: int, first: int = 0
) -> tuple[list[int], list[int]]:
    """Ids and slots of the parts, the slots from `first` on. Text that meets is encoded as one."""
    ids: list[int] = []
    slots: list[int] = []
    pending = ""
    for part in [*parts, _Special()]:
        if not isinstance(part, (int, _Special)):
            pending += part
            continue
        ids += tokenizer.encode(pending) if pending else []
        pending = ""
        slots += [-1] * (len(ids) - len(slots))
        if isinstance(part, int):
            visual = part * chunk_tokens
            ids += [image_token] * visual
            slots += range(first, first + visual)
            first += visual
        elif part:
            ids.append(tokenizer.special(part))
            slots.append(-1)
    return ids, slots


# ---- from records to packed rows -----------------------------------------------------------------------------------


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

    The endless mixture of records is cut into groups of as many as make 32 rows, and each group is packed into its
    rows by itself (`pe_jax.data.packing`). So row r is a function of (config, seed, r): the number of rows consumed is
    all the state there is, and batches do not depend on the number of hosts or threads. What a group's rows do not
    take is left out, and counted; the next epoch groups it with others.

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
    sources = [pipeline.open_source(source, f"data.sources[{i}]") for i, source in enumerate(config["sources"])]
    rows = batch_size // process_count
    stream = _Rows(
        sources=sources,
        tokenizer=tokenizer,
        template=template(config["template"]),
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
    defaults = {"max_tiles": 1, "frames": 8, "pack": True, "samples_per_row": None, "max_bad_records": 0, "threads": 8}
    config = defaults | config
    for key in ("length", "chunks", "threads"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"data.{key}={config[key]!r} must be a positive integer.")
    template(config["template"])
    vision = Vision(image_size, patch_size, pooling, config["max_tiles"], config["frames"])
    if vision.most > config["chunks"]:
        raise ValueError(
            f"max_tiles={vision.max_tiles} and frames={vision.frames} make up to {vision.most} chunks of one image or"
            f" video; a row has room for chunks={config['chunks']}. Raise that, or lower them."
        )
    if vision.most * vision.tokens >= config["length"]:
        raise ValueError(
            f"{vision.most} chunks of {vision.tokens} tokens leave no room for text in length={config['length']};"
            " raise it, or lower max_tiles, frames or image_size."
        )
    return config, vision


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
        return self._stream.window / _GROUP

    @property
    def too_long(self) -> dict[str, int]:
        """Records this host has met whose first answer does not fit into a row, by source."""
        with self._stream.lock:
            return {source.name: len(self._stream.long[i]) for i, source in enumerate(self._stream.sources)}

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
        self.window = _GROUP
        self.budget = {"rows": _GROUP, "length": self.length, "room": self.room}

    def begin(self, samples_per_row: float | None) -> None:
        """Fixes how many records make a group, by packing the first ones if `samples_per_row` is None."""
        self.window = max(_GROUP, math.floor(_GROUP * (samples_per_row or self._most())))

    def _most(self) -> float:
        """How many records a row can be dealt with few of them left out."""
        found = list(self.pool.map(self.find, range(_SAMPLED)))
        tokens = np.array([sample.rendered.length for sample in found])
        chunks = np.array([sample.chunks for sample in found])
        rng = np.random.default_rng(self.seed)
        most = 1 / max(tokens.mean() / self.length, chunks.mean() / self.room)
        while most > 1:
            draws = rng.integers(0, len(found), (4, max(_GROUP, math.floor(_GROUP * most))))
            left = sum(len(packing.pack(tokens[draw], chunks[draw], **self.budget)[1]) for draw in draws)
            if left <= _LEFT_OUT * draws.size:
                break
            most *= 0.98
        return most

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        began = time.perf_counter()
        group, row = divmod(self._number(int(index)), _GROUP)
        samples = self._group(group, self._number(int(index) + _GROUP) // _GROUP).rows[row]
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

    def _group(self, group: int, later: int) -> "_Group":
        """A group; the one that is needed later is begun."""
        with self.lock:
            for number in (group, later):
                if number in self.groups:
                    self.groups[number] = self.groups.pop(number)  # the last used stands last
                else:
                    self.groups[number] = _Group(self, number)
            while len(self.groups) > 4 + 2 * self.ahead // min(self.rows, _GROUP):
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
                rendered = self._rendered(conversation, chunks)
            except TooLong:
                rendered = None
            except (BadImage, BadVideo, BadRecord) as error:
                pipeline.count_bad(self, source, record, error)
                continue
            if rendered is None or not rendered.length or chunks > self.room:
                with self.lock:
                    self.long[number].add(record)
                continue
            sample = _Sample(self.offsets[number] + record, (position, probe), conversation, chunks, rendered)
            if length is None or room is None or (sample.rendered.length <= length and chunks <= room):
                return sample
        raise ValueError(f"{source.name}: {min(size, _PROBES)} records in a row are of no use, from {chosen} on.")

    def _rendered(self, conversation: Conversation, chunks: int) -> Rendered:
        return render(
            conversation,
            self.tokenizer,
            self.template,
            chunks=chunks,
            chunk_tokens=self.vision.tokens,
            image_token=self.image_token,
            limit=self.length,
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
            if len(pixels) != sample.chunks:  # a video with fewer frames
                rendered = self._rendered(sample.conversation, len(pixels))
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
    """The samples of 32 rows. Records are read by the stream's pool as soon as a group is made."""

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
                dealt, left = packing.pack(
                    [sample.rendered.length for sample in samples],
                    [sample.chunks for sample in samples],
                    **stream.budget,
                )
                # Largest first as they were dealt, rows would make uneven batches.
                order = [pipeline.permute(row, _GROUP, (stream.seed, self.number, _GROUP)) for row in range(_GROUP)]
                self._rows, self.found = [[samples[i] for i in dealt[row]] for row in order], []
                with stream.lock:
                    stream.left += len(left)
                    stream.planned += len(samples)
            return self._rows

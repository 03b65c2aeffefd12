"""Conversations about images and videos → packed rows of tokens, targets, visual slots and image chunks (PE §4, PLM).

A record has `conversations`, a list of {"from": "human" or "assistant", "value": text}, and one of `image` (a path, or
a list of them), `video` (with `start_time`, `end_time` in seconds and `bbox_map`), or neither. `bbox` with `width` and
`height` gives the boxes that texts name (`pe_jax.data.regions`). A `question` with its `answer` makes a conversation
of one turn, a caption alone one without a question.

What stands where is PLM's: `render` for training, `prompt` for generation. `pe_jax.data.packing` makes batches of it.
"""

import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int32, UInt8

from pe_jax import paths
from pe_jax.data import regions, tiles
from pe_jax.data import sources as sources_lib
from pe_jax.data.image import BadImage, Image, read_bytes
from pe_jax.data.sources import BadRecord
from pe_jax.data.tokenizers import Tokenizer
from pe_jax.data.video import Reader, Video

SYSTEM = (  # the one sentence that all PLM models were trained behind
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
    " provides, and assist the user with a variety of tasks using natural language."
)

_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKERS = ("<image>\n", "\n<image>", "<image>", "<video>\n", "\n<video>", "<video>")


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
    def image_chunks(self) -> int:
        """The most chunks of one image."""
        return 1 if self.max_tiles == 1 else 1 + self.max_tiles

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
    elif first == last:
        last = min(first + 1, count - 1)
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
    if not isinstance(image, (str, os.PathLike, bytes)):
        raise BadImage(f"image is {type(image).__name__}; wanted a PIL image, path, bytes or uint8 array.")
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
      question: whether the first question is asked; a warm-up shows an image and wants its caption.
    """

    begin: str
    header: str
    close: str
    end: str
    system: str | None
    question: bool = True

    def check(self, tokenizer: Tokenizer) -> None:
        """A ValueError that names the first of its special tokens that a tokenizer has not."""
        for part in _trusted(self.begin + self.header + self.close + self.end):
            if isinstance(part, _Special):
                tokenizer.special(part)


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
            around, parts = ([], []), [part for part in parts if i or isinstance(part, int)]
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

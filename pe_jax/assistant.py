"""A vision-language model to talk to: conversations in, text out, for the commands, the server and the evaluators.

  assistant = pe_jax.assistant.load("Perception-LM-1B/")
  assistant.reply([Conversation((("user", "What is this?"),), images=("cat.jpg",))])

A folder that can be loaded is one in the Hugging Face layout of Perception-LM, or the workdir of a run of ours; its
files say which tokenizer, template, tiles and frames belong to it. Prompts of a batch may differ in all they have. They
are padded to a few lengths and numbers of images, so that few programs are compiled.
"""

import codecs
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pe_jax import api, checkpoint, hub, paths, sharding
from pe_jax.convert import vlm as convert
from pe_jax.data import chat, tokenizers
from pe_jax.data.chat import Conversation
from pe_jax.evals import inference
from pe_jax.models import zoo
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.types import split

SHORTEST = 64  # tokens of a prompt, padding included
FEWEST = 16  # tokens of an answer that a stream has room for
# Of Perception-LM's release, where a folder does not say it: 36 tiles beside the thumbnail, 32 frames.
_RELEASED: dict[str, Any] = {"template": "llama3", "max_tiles": 36, "frames": 32}
_SAVED = "assistant"  # our entry among the metadata of weights


@dataclasses.dataclass(frozen=True)
class Options:
    """How one answer is written.

    Attributes:
      max_tokens: at most so many.
      temperature: 0 takes the likeliest token each time; else logits are divided by it and drawn from.
      top_k, top_p: draw from so many of the likeliest tokens (0 is all), or from the fewest with this probability.
      seed: of the draws.
      stop: texts before which an answer ends.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1.")
        if not all(self.stop):
            raise ValueError("an empty stop text would end every answer at once; leave it out.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k} and top_p={self.top_p}; want the first two not "
                "below 0, and top_p above 0 and at most 1."
            )


class Prompt(NamedTuple):
    """A conversation as the model reads it; see `chat.Rendered` and `chat.Vision`."""

    ids: np.ndarray  # int32 [N]
    slots: np.ndarray  # int32 [N]
    chunks: np.ndarray  # uint8 [C, S, S, 3]


class Piece(NamedTuple):
    """What one step adds to the answer of a batch's row; `ended` is "stop" or "length" with its last one."""

    row: int
    text: str
    ended: str | None
    tokens: int  # of the row so far


class Reply(NamedTuple):
    """A whole answer. `ended` is "stop" if the model ended it, "length" if it was cut at `max_tokens`."""

    text: str
    ended: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A model with all that turns conversations into its inputs, and its tokens into text.

    Attributes:
      model: on one device, or on a mesh of this process's devices.
      tokenizer: of its decoder.
      template: the text around turns.
      vision: how images and videos become chunks.
      name: what it is called.
    """

    model: VLM
    tokenizer: tokenizers.Tokenizer
    template: chat.Template
    vision: chat.Vision
    name: str = "pe-jax"

    def __post_init__(self) -> None:
        c = self.config
        if self.tokenizer.vocab_size > c.decoder.vocab_size:
            raise ValueError(
                f"{self.tokenizer.path} has {self.tokenizer.vocab_size} tokens, the model {c.decoder.vocab_size}; give "
                "the tokenizer that it was trained with."
            )
        if (self.vision.patch_size, self.vision.pooling) != (c.vision.patch_size, c.pooling):
            raise ValueError(f"{self.vision} does not fit the tower, of patches of {c.vision.patch_size} px.")
        t = self.template
        for special in re.findall(r"<\|\w+\|>", t.begin + t.header + t.close + t.end):
            self.tokenizer.special(special)

    @property
    def config(self) -> VLMConfig:
        return self.model.config

    def to_dict(self) -> dict[str, Any]:
        """What an answer depends on besides the weights, as JSON types."""
        return {
            "tokenizer": os.path.basename(self.tokenizer.path),
            "template": dataclasses.asdict(self.template),
            "vision": dataclasses.asdict(self.vision),
            "dtype": self.config.decoder.dtype,
        }

    # ------------------------------------------------------------------------------------------------------- asking

    def reply(self, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        """The answer to each conversation's last question, all in one batch; `options` are those of `Options`."""
        chosen = Options(**options)
        prompts = [self.prompt(conversation, chosen.max_tokens) for conversation in conversations]
        return [reply.text for reply in self.replies(prompts, chosen)]

    def stream(self, conversation: Conversation, **options: Any) -> Iterator[str]:
        """The answer to one conversation, in pieces as they come."""
        chosen = Options(**options)
        pieces = self.pieces([self.prompt(conversation, chosen.max_tokens)], [chosen])
        return (piece.text for piece in pieces if piece.text)

    def prompt(self, conversation: Conversation, max_tokens: int = 1) -> Prompt:
        """Reads the images and writes the tokens; runs on any thread, and uses no device.

        Raises:
          BadImage, BadVideo, BadRecord: for what cannot be read, or marks that do not fit the images.
          TooLong: (a BadRecord) if the context does not hold it and `max_tokens` more.
        """
        chunks, c = self.vision.chunks(conversation), self.config
        rendered = chat.prompt(
            conversation,
            self.tokenizer,
            self.template,
            chunks=len(chunks),
            chunk_tokens=self.vision.tokens,
            image_token=c.image_token,
        )
        total, room = len(rendered.ids), c.decoder.context_length
        if not total:
            raise chat.BadRecord("the conversation has neither an image nor a text; there is nothing to answer.")
        if total + max_tokens > room:
            raise chat.TooLong(
                f"the prompt has {total} tokens, {len(chunks) * self.vision.tokens} of them visual, and the answer up"
                f" to {max_tokens}: more than the context of {room}. Shorten it, or take fewer images, tiles or frames."
            )
        return Prompt(rendered.ids, rendered.slots, chunks)

    def replies(self, prompts: Sequence[Prompt], options: Options) -> list[Reply]:
        """The answers to prompts, in one compiled program that ends when the last one has."""
        if not prompts:
            return []
        inputs = self._inputs(prompts, options.max_tokens)
        with self._on_mesh():
            found = self.model.generate(
                *inputs,
                max_new_tokens=options.max_tokens,
                stop=self._stops,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                key=jax.random.key(options.seed),
            )
            rows = np.asarray(found.tokens)[: len(prompts)]
        replies = []
        for row in rows:
            writer = _Writer(self, options)
            text = "".join(writer.add(int(token)) for token in row if writer.ended is None)
            assert writer.ended is not None
            replies.append(Reply(text, writer.ended, writer.tokens))
        return replies

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """The likeliest answers to prompts, as evaluators take them."""
        return [reply.text for reply in self.replies(prompts, Options(max_tokens))]

    def pieces(self, prompts: Sequence[Prompt], options: Sequence[Options]) -> Iterator[Piece]:
        """The answers of a batch as they come; every step gives a piece to each row that goes on.

        Args:
          prompts: of `prompt`.
          options: one for each; they may differ, but for `top_k`, `top_p` and `seed`.
        """
        first = options[0]
        if any((o.top_k, o.top_p, o.seed) != (first.top_k, first.top_p, first.seed) for o in options):
            raise ValueError("top_k, top_p and seed are those of a whole batch; ask for the others by themselves.")
        most = max(o.max_tokens for o in options)
        longest = max(len(prompt.ids) for prompt in prompts)
        room = min(upward(max(most, FEWEST)), self.config.decoder.context_length - longest)
        inputs = self._inputs(prompts, room)
        temperatures = [o.temperature for o in options]
        temperatures += [0.0] * (len(inputs[0]) - len(prompts))
        writers = [_Writer(self, o) for o in options]
        with self._on_mesh():
            steps = self.model.stream(
                *inputs,
                max_new_tokens=room,
                stop=self._stops,
                temperature=temperatures,
                top_k=first.top_k,
                top_p=first.top_p,
                key=jax.random.key(first.seed),
            )
        while any(writer.ended is None for writer in writers):
            with self._on_mesh():  # not around the yield: the caller's computations are none of this mesh's
                tokens = next(steps)
            for row, writer in enumerate(writers):
                if writer.ended is None:
                    text = writer.add(int(tokens[row]))
                    yield Piece(row, text, writer.ended, writer.tokens)

    # ------------------------------------------------------------------------------------------------------- inside

    @property
    def _stops(self) -> tuple[int, ...]:
        newline = self.tokenizer.encode("\n")
        return (*self.tokenizer.stop_tokens, *(newline if self._line and len(newline) == 1 else ()))

    @property
    def _line(self) -> bool:
        """Whether an answer is one line, as of a warm-up that has no other end."""
        return self.template.close == "\n"

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        mesh = inference.mesh_of(self.model)
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    def _inputs(self, prompts: Sequence[Prompt], new: int) -> tuple[Any, Any, Any, Any]:
        """tokens [B, L], lengths [B], images [B, C, S, S, 3] and slots [B, L]; the last two are None for text alone."""
        mesh = inference.mesh_of(self.model)
        ways = 1 if mesh is None else sharding.batch_ways(mesh)
        rows = -(-upward(len(prompts)) // ways) * ways
        longest = max(len(prompt.ids) for prompt in prompts)
        length = max(longest, min(upward(max(longest, SHORTEST)), self.config.decoder.context_length - new))
        chunks = upward(max(len(prompt.chunks) for prompt in prompts))
        size = self.vision.image_size
        tokens = np.zeros((rows, length), np.int32)
        slots = np.full((rows, length), -1, np.int32)
        images = np.zeros((rows, chunks, size, size, 3), np.uint8)
        lengths = np.empty(rows, np.int32)
        # Rows behind the last prompt are the first once more: they end when it does.
        for row, prompt in enumerate([*prompts, *[prompts[0]] * (rows - len(prompts))]):
            lengths[row] = len(prompt.ids)
            tokens[row, : lengths[row]], slots[row, : lengths[row]] = prompt.ids, prompt.slots
            images[row, : len(prompt.chunks)] = prompt.chunks
        held = [tokens, lengths, images, slots]
        placed = held if mesh is None else jax.device_put(held, sharding.batch_sharding(mesh))
        if not chunks:
            return placed[0], placed[1], None, None
        return placed[0], placed[1], _floats(placed[2]), placed[3]


class _Writer:
    """Tokens of one answer to text; what may be the beginning of a stop text is held back until it is known."""

    def __init__(self, assistant: Assistant, options: Options):
        self._piece, self._limit = assistant.tokenizer.piece, options.max_tokens
        self._known = assistant.tokenizer.vocab_size
        self._stop_tokens = frozenset(assistant._stops)
        self._stop = (*tuple(options.stop), *(("\n",) if assistant._line else ()))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.tokens = 0
        self.ended: str | None = None

    def add(self, token: int) -> str:
        """What the next token adds; its id is -1 behind the end."""
        assert self.ended is None
        stopped = token < 0 or token in self._stop_tokens
        if not stopped:
            self.tokens += 1
        # A vocabulary may be padded to a round number: such ids mean nothing.
        more = self._piece(token) if not stopped and token < self._known else b""
        over = stopped or self.tokens == self._limit
        text = self._held + self._decoder.decode(more, final=over)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = "stop", ""
            return text[: min(found)]
        if over:
            self.ended, self._held = "stop" if stopped else "length", ""
            return text
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def upward(count: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: sizes are brought to few, by a third at most."""
    power = 1 << max(count - 1, 0).bit_length()
    return count and (power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power)


@jax.jit
def _floats(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    path: str,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    image_size: int | None = None,
    max_tiles: int | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    offline: bool = False,
) -> Assistant:
    """An assistant from a folder.

    Args:
      path: a run's workdir, what `save` wrote, or a folder of Perception-LM in Hugging Face's layout or in Meta's; also
        hf://ORG/REPO of one in the former.
      tokenizer: a tokenizer.json, a tokenizer.model or their folder; None takes what the folder says.
      template: "llama3", "qwen2" or "plain"; None likewise.
      image_size, max_tiles, frames: as of `chat.Vision`; None likewise.
      dtype: of activations, and of the parameters of a released folder; None keeps it.
      mesh: of this process's devices; None puts the model on the default device.
      offline: use only what is on this machine.

    Raises:
      ValueError: if the folder holds no vision-language model, or does not say what is missing.
      FileNotFoundError: if there is none.
    """
    folder = _fetched(path, offline)
    model, said = _read(folder, dtype, mesh)
    given = {
        "tokenizer": tokenizer,
        "template": template,
        "image_size": image_size,
        "max_tiles": max_tiles,
        "frames": frames,
    }
    return assembled(model, said | {name: value for name, value in given.items() if value is not None}, path)


def assembled(model: Any, settings: Mapping[str, Any], path: str) -> Assistant:
    """An assistant of a model and `tokenizer`, `template` and, if they are known, the fields of `chat.Vision`."""
    if not isinstance(model, VLM):
        raise ValueError(
            f"{path} is a {type(model).__name__}, which has no language model to answer with; give a run of the"
            " language stage, or a folder of Perception-LM."
        )
    if missing := [name for name in ("tokenizer", "template") if not settings.get(name)]:
        raise ValueError(f"{path} does not say which {' and '.join(missing)} belong to it; say it: --{missing[0]}.")
    c = model.config
    vision = chat.Vision(
        settings.get("image_size") or c.vision.image_size,
        c.vision.patch_size,
        c.pooling,
        settings.get("max_tiles", 1),
        settings.get("frames", 8),
    )
    name = os.path.basename(os.path.normpath(path))
    return Assistant(model, tokenizers.load(settings["tokenizer"]), chat.template(settings["template"]), vision, name)


def of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `assembled` that a run's config says: those that it was trained with."""
    data, phases = config.get("data") or {}, config.get("phases") or ()
    found = {name: data[name] for name in ("tokenizer", "template", "max_tiles", "frames") if name in data}
    if phases and "image_size" in phases[-1]:
        found["image_size"] = phases[-1]["image_size"]
    return found


def save(assistant: Assistant, folder: str) -> None:
    """Writes weights, tokenizer and settings to a folder of our own, which `load` reads again.

    Raises:
      CheckpointError: if it exists.
    """
    template = next(name for name, own in chat.TEMPLATES.items() if own == assistant.template)
    tokenizer = paths.path(assistant.tokenizer.path)
    vision = {name: getattr(assistant.vision, name) for name in ("image_size", "max_tiles", "frames")}
    said = {"tokenizer": f"tokenizer/{tokenizer.name}", "template": template} | vision
    architecture = zoo.to_dict(assistant.config)
    checkpoint.save_weights(folder, split(assistant.model)[1], {"architecture": architecture, _SAVED: said})
    copy = paths.path(folder) / said["tokenizer"]
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(tokenizer.read_bytes())


def _fetched(path: str, offline: bool) -> str:
    """The local folder, or bucket, of an address."""
    if not path.startswith("hf://"):
        folder = paths.path(path)
        paths.reach(folder)
        if not folder.exists():
            raise FileNotFoundError(f"{path} does not exist; give a run's workdir, or a folder of Perception-LM.")
        return path
    for file in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        hub.resolve(f"{path}/{file}", offline=offline)
    return os.path.dirname(hub.resolve(f"{path}/{hub.INDEX}", offline=offline))


def _read(folder: str, dtype: str | None, mesh: Mesh | None) -> tuple[Any, dict[str, Any]]:
    """The model, and what the folder says of `assembled`'s settings."""
    root = paths.path(folder)
    config = json.loads((root / "config.json").read_text()) if (root / "config.json").exists() else {}
    if "model_type" in config or (root / "params.json").exists():
        return _released(folder, dtype, mesh)
    said = of_run(config) if "stage" in config else _exported(folder)
    architecture = zoo.architecture(checkpoint.metadata(folder)["architecture"])
    architecture, params, _ = api.read(folder, _with_dtype(architecture, dtype), mesh)
    return nnx.merge(split(zoo.abstract(architecture))[0], params), said


def _released(folder: str, dtype: str | None, mesh: Mesh | None) -> tuple[VLM, dict[str, Any]]:
    """Of Perception-LM's layouts; in Hugging Face's the processor says how images and videos are cut."""
    config = _with_dtype(convert.read_config(folder), dtype)
    shardings = None if mesh is None else sharding.param_shardings(zoo.abstract(config), mesh)
    _, params = convert.read(folder, config, shardings=shardings, dtype=dtype and jnp.dtype(dtype))
    said = _RELEASED | {"tokenizer": folder}
    for name, file, field in (
        ("max_tiles", "preprocessor_config.json", "max_num_tiles"),
        ("frames", "video_preprocessor_config.json", "num_frames"),
    ):
        if (path := paths.path(folder) / file).exists():
            said[name] = json.loads(path.read_text()).get(field) or said[name]
    return nnx.merge(split(zoo.abstract(config))[0], params), said


def _exported(folder: str) -> dict[str, Any]:
    """Of what `save` wrote."""
    said = dict(checkpoint.metadata(folder).get(_SAVED, {}))
    if said.get("tokenizer"):
        said["tokenizer"] = str(paths.path(folder) / said["tokenizer"])
    return said


def _with_dtype(config: Any, dtype: str | None) -> Any:
    if dtype is None or not isinstance(config, VLMConfig):
        return config
    parts = {"vision": config.vision, "decoder": config.decoder}
    return dataclasses.replace(config, **{name: dataclasses.replace(part, dtype=dtype) for name, part in parts.items()})

"""Tokenizers of language models, from the files they are published with: Llama 3's and Qwen's byte-level BPE.

`load` reads a `tokenizer.json` by the library `tokenizers`, or a tiktoken file such as Llama 3's `tokenizer.model` by
`tiktoken` (both in extra `language`). Text never turns into a special token here, whatever a user writes: those are
asked for by name. What ids mean is a table of bytes, so both kinds of files decode alike.
"""

import base64
import codecs
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pe_jax import paths
from pe_jax.data import text as clip_text

# The names a model may end its turn or its text with, over the families read here.
STOPS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>")

# Of Llama 3 (tiktoken): its word split, and its 256 special tokens behind the base vocabulary, of which PLM uses the
# third for images.
_LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|image|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA_SPECIALS = 256


class Tokenizer:
    """Text to ids and back; made by `load`.

    Attributes:
      path: the file it was read from, to copy beside a model.
      specials: ids of the special tokens by name.
      vocab_size: one more than the largest id.
    """

    def __init__(self, path: str, encode: Callable[[str], list[int]], pieces: dict[int, bytes], specials: dict):
        self.path, self._encode, self.specials = path, encode, dict(specials)
        self.vocab_size = max([*pieces, *specials.values()]) + 1
        self._pieces = [pieces.get(i, b"") for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a start token; what looks like a special token is text like any other.

        Halves of a surrogate pair, which JSON can hold and UTF-8 cannot, become U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out, U+FFFD for bytes that are no whole character."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """The bytes that an id stands for, none for a special token; one character may take several ids."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.path}, [0, {self.vocab_size}).")
        return self._pieces[token]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come: a piece per id where a character is complete; joined, what `decode` gives."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(self.piece(token)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
          ValueError: if the vocabulary has none of this name, with some that it has.
        """
        if name not in self.specials:
            some = ", ".join(list(self.specials)[:12]) or "none"
            raise ValueError(
                f"{self.path} has no special token {name!r} (it has {some}); choose the template that belongs to this"
                " tokenizer."
            )
        return self.specials[name]

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        return tuple(self.specials[name] for name in STOPS if name in self.specials)


def load(path: str) -> Tokenizer:
    """Reads a tokenizer.json, a tiktoken file, or whichever of them a folder holds (tokenizer.json, tokenizer.model).

    Raises:
      ValueError: if there is none, or if it is no byte-level BPE (a sentencepiece model, a WordPiece vocabulary).
      ModuleNotFoundError: without the library that reads it.
    """
    file = paths.path(path)
    if file.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        found = [file / name for name in names if (file / name).is_file()]
        if not found:
            raise ValueError(f"the folder {path} has no tokenizer; wanted one of {', '.join(names)} in it.")
        file = found[0]
    if not file.is_file():
        raise ValueError(
            f"the tokenizer {path} does not exist; give a tokenizer.json, a tokenizer.model or their folder."
        )
    data = file.read_bytes()
    return (_hugging_face if data.lstrip()[:1] == b"{" else _tiktoken)(str(file), data)


def _hugging_face(path: str, data: bytes) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise ModuleNotFoundError("tokenizer.json is read by tokenizers: pip install 'pe-jax[language]'.") from error
    try:
        content = json.loads(data)
        model, added = content["model"], content.get("added_tokens") or []
        kind, vocabulary = model["type"], model["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer.json: {error!r}.") from error
    if kind != "BPE" or "ByteLevel" not in _kinds(content.get("decoder")):
        raise ValueError(
            f"{path} is a {kind} tokenizer with the decoder {'+'.join(_kinds(content.get('decoder'))) or 'none'};"
            " wanted byte-level BPE, as Llama 3 and Qwen have it."
        )
    specials = {token["content"]: token["id"] for token in added if token["special"]}
    content |= {"post_processor": None, "truncation": None, "padding": None}  # nothing may add, cut or pad ids
    try:
        tool = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}.") from error
    tool.encode_special_tokens = True  # to this library: as the text that they are written with
    of_symbol = dict(zip(clip_text.byte_symbols(), clip_text.byte_order(), strict=True))
    pieces = {token["id"]: token["content"].encode() for token in added if not token["special"]}
    for symbols, token in vocabulary.items():
        if symbols not in specials and token not in pieces:
            pieces[token] = bytes(of_symbol[symbol] for symbol in symbols)

    def encode(text: str) -> list[int]:
        return tool.encode(text, add_special_tokens=False).ids

    return Tokenizer(path, encode, pieces, specials)


def _kinds(part: dict[str, Any] | None) -> list[str]:
    """What a component of a tokenizer.json is made of."""
    if not part:
        return []
    return [kind for inner in part["decoders"] for kind in _kinds(inner)] if "decoders" in part else [part["type"]]


def _tiktoken(path: str, data: bytes) -> Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise ModuleNotFoundError("tiktoken files are read by tiktoken: pip install 'pe-jax[language]'.") from error
    try:
        lines = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except ValueError as error:
        raise ValueError(
            f"{path} is neither a tokenizer.json nor a tiktoken file (lines of a token in base64 and its number):"
            f" {error}. A sentencepiece model is not read."
        ) from error
    base = len(ranks)
    if sorted(ranks.values()) != list(range(base)) or not {bytes([b]) for b in range(256)} <= set(ranks):
        raise ValueError(f"{path} does not number {base} tokens from 0 with all 256 bytes among them; it is damaged.")
    # A reserved token is numbered among the reserved ones; of those, PLM's image token was number 0.
    reserved = [i for i in range(_LLAMA_SPECIALS) if i not in _LLAMA_NAMED]
    names = {i: f"<|reserved_special_token_{number}|>" for number, i in enumerate(reserved, 1)} | _LLAMA_NAMED
    specials = {names[i]: base + i for i in range(_LLAMA_SPECIALS)}
    tool = tiktoken.Encoding(path, pat_str=_LLAMA_WORDS, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(path, tool.encode_ordinary, {rank: piece for piece, rank in ranks.items()}, specials)

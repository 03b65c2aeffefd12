"""CLIP's byte-pair tokenizer, equal to PE's own (PE §1.7): cleaning, word split, merges, start and end tokens.

The algorithm is ours and needs only the list of merges, which this repository does not carry. It is taken from the
first of: the file named by `PE_JAX_BPE`, the installed instant-clip-tokenizer (whose vocabulary is read back through
its decoder), or a merges file that lies in the installed open_clip_torch (found by name, never imported). Because the
merges are the same list wherever they come from, ids do not depend on what is installed.
"""

import dataclasses
import functools
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable

import ftfy
import numpy as np
import regex
from jaxtyping import Int32

VOCAB_SIZE = 49408
START, END, PAD = 49406, 49407, 0
MERGES = VOCAB_SIZE - 2 * 256 - 2  # the vocabulary is 256 bytes, the same ending a word, the merges, two special tokens

# SHA-256 of OpenAI's merges (`digest`): whichever source they come from must be this very list.
_DIGEST = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORD_END = "</w>"
# Special tokens first, then English contractions, runs of letters, single digits, runs of anything else that shows.
# IGNORECASE matters even on lower-cased text: it lets "'ſ" (long s) count as a contraction.
_WORDS = regex.compile(
    "|".join(map(regex.escape, _SPECIAL)) + r"|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

Merges = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns captions into token ids of a fixed length, `Tokenizer(32)(["a cat"])` → int32 [1, 32].

    Attributes:
      context_length: L, tokens in a row: start, at most L - 2 of the text, end, then zeros. Longer texts are cut and
        still finish with the end token. 32 for PE-Core T, S, B and L; 72 for G.
    """

    context_length: int

    def __post_init__(self):
        if not isinstance(self.context_length, int) or self.context_length < 2:
            raise ValueError(
                f"context_length={self.context_length!r} must be an integer of at least 2 (start and end token)."
            )

    def __call__(self, texts: str | Iterable[str]) -> Int32[np.ndarray, "B L"]:
        """Token ids [B, L] in [0, 49408), one row per text; one string gives one row, "" gives start, end and zeros.

        Raises:
          ValueError: if a text is not a string, or if no list of merges is installed.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"text {row} is {text!r:.60} ({type(text).__name__}); the tokenizer takes a string or a list of"
                    " strings."
                )
        encode = _encoder()
        ids = np.full((len(texts), self.context_length), PAD, np.int32)
        for row, text in enumerate(texts):
            tokens = [START, *encode(clean(text)), END][: self.context_length]
            tokens[-1] = END  # also where the text was cut
            ids[row, : len(tokens)] = tokens
        return ids


def clean(text: str) -> str:
    """Repairs mis-decoded text, resolves HTML entities (twice), collapses white space and lowers the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def encoder(merges: Merges) -> Callable[[str], list[int]]:
    """Builds the function from one cleaned text to its token ids, without start and end tokens."""
    symbols = byte_symbols()
    vocabulary = [*symbols, *(s + _WORD_END for s in symbols), *(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    of_byte = dict(zip(byte_order(), symbols, strict=True))

    @functools.lru_cache(maxsize=1 << 16)  # a caption's words repeat: this is most of the speed
    def word(text: str) -> tuple[int, ...]:
        if text in _SPECIAL:
            return (_SPECIAL[text],)
        parts = [of_byte[b] for b in text.encode("utf-8")]
        parts[-1] += _WORD_END
        return tuple(ids[part] for part in _merge(parts, ranks))

    return lambda text: [token for found in _WORDS.findall(text) for token in word(found)]


def _merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins neighbours: of the pairs present, every occurrence of the one learnt first, until none was learnt."""
    while len(parts) > 1:
        pairs = [pair for pair in itertools.pairwise(parts) if pair in ranks]
        if not pairs:
            break
        best, joined, at = min(pairs, key=ranks.__getitem__), [], 0
        while at < len(parts):
            width = 2 if tuple(parts[at : at + 2]) == best else 1
            joined.append("".join(parts[at : at + width]))
            at += width
        parts = joined
    return parts


@functools.cache
def byte_order() -> tuple[int, ...]:
    """The 256 bytes in the order of the vocabulary: those that print as themselves first."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return (*shown, *sorted(set(range(256)) - set(shown)))


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """The character that stands for each byte of `byte_order` in a merges file."""
    hidden = itertools.count(256)
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return tuple(chr(b) if b in shown else chr(next(hidden)) for b in byte_order())


# ---- where the merges come from ------------------------------------------------------------------------------------


@functools.cache
def _encoder() -> Callable[[str], list[int]]:
    return encoder(find_merges())


def find_merges() -> Merges:
    """The merges from `PE_JAX_BPE`, instant-clip-tokenizer or open_clip_torch's data file, in this order.

    Raises:
      ValueError: if there is none, or the file found is no CLIP vocabulary.
    """
    if path := os.environ.get("PE_JAX_BPE"):
        return merges_from_file(path)
    if importlib.util.find_spec("instant_clip_tokenizer"):
        return merges_from_instant()
    if path := installed_merges_file():
        return merges_from_file(path)
    raise ValueError(
        "no CLIP vocabulary found. Install instant-clip-tokenizer (Linux x86-64, Python up to 3.12), or set PE_JAX_BPE"
        " to OpenAI's bpe_simple_vocab_16e6.txt.gz or to a CLIP tokenizer.json (the PE and CLIP repositories have the"
        " first, CLIP models on the Hugging Face hub the second), or install open_clip_torch, which contains the file."
    )


def installed_merges_file() -> str | None:
    """Path of the merges file inside the installed open_clip_torch, which is not imported; None if it has none."""
    try:
        files = importlib.metadata.files("open_clip_torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == "bpe_simple_vocab_16e6.txt.gz"), None)


def merges_from_file(path: str | os.PathLike) -> Merges:
    """Reads OpenAI's merges file (plain or .gz) or a CLIP `tokenizer.json`.

    Raises:
      ValueError: if the file is missing, or does not hold CLIP's merges.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"the vocabulary file {path} does not exist; set PE_JAX_BPE to an existing one.")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        is_json = text.lstrip()[:1] == "{"
        lines = json.loads(text)["model"]["merges"] if is_json else text.split("\n")[1:]  # after a version comment
        merges = tuple(tuple(m.split() if isinstance(m, str) else m) for m in lines[:MERGES])
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is neither a CLIP merges file nor a tokenizer.json: {error!r}.") from error
    return _checked(merges, str(path))


@functools.cache
def merges_from_instant() -> Merges:
    """Reads the merges back out of instant-clip-tokenizer, whose own word split and Unicode tables differ from PE's.

    Its decoder gives each token's bytes as text, a final space marking the end of a word. A token that stops or starts
    inside a character decodes to U+FFFD: it is decoded again between bytes that complete it. The two halves of a
    merge follow, because the merges learnt before it must take its bytes to exactly two parts.
    """
    import instant_clip_tokenizer  # pyright: ignore[reportMissingImports]  # no wheel for some platforms

    tool = instant_clip_tokenizer.Tokenizer()
    id_of_byte = {byte: i for i, byte in enumerate(byte_order())}
    symbol = dict(zip(byte_order(), byte_symbols(), strict=True))
    heads = [b"", b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xed", b"\xe0", b"\xf4"]
    tails = [b"", b"\x80", b"\xa0", b"\x80\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80"]

    def decode(head: bytes, token: int, tail: bytes) -> bytes:
        return tool.decode([*(id_of_byte[b] for b in head), token, *(id_of_byte[b] for b in tail)]).encode("utf-8")

    merges, ranks = [], {}
    known = {*symbol.values(), *(s + _WORD_END for s in symbol.values())}
    for token in range(512, START):
        for head, tail in itertools.product(heads, tails):
            text = decode(head, token, tail)
            if b"\xef\xbf\xbd" not in text:
                break
        else:  # nothing completes it, so it is the character U+FFFD itself, which is in the vocabulary
            text, head, tail = decode(b"", token, b""), b"", b""
        text = text[len(head) :].removesuffix(tail)
        parts = [symbol[b] for b in text.removesuffix(b" ")]
        parts[-1] += _WORD_END if text.endswith(b" ") else ""
        splits = [("".join(parts[:k]), "".join(parts[k:])) for k in range(1, len(parts))]
        splits = [pair for pair in splits if known.issuperset(pair)]
        pair = splits[0] if len(splits) == 1 else tuple(_merge(parts, ranks))
        ranks[pair] = len(merges)
        merges.append(pair)
        known.add("".join(pair))
    return _checked(tuple(merges), "the installed instant-clip-tokenizer")


def digest(merges: Merges) -> str:
    """SHA-256 of a list of merges, one merge a line."""
    return hashlib.sha256("\n".join(map(" ".join, merges)).encode("utf-8")).hexdigest()


def _checked(merges: tuple, where: str) -> Merges:
    if len(merges) != MERGES or digest(merges) != _DIGEST:
        raise ValueError(f"{where} holds {len(merges)} merges, which are not CLIP's {MERGES}; use another vocabulary.")
    return merges

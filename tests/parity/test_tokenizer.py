"""Our token ids against Meta's own tokenizer and open_clip's, live, on many strings.

The .jsonl files of `PE_JAX_DATA` add their captions and names.
"""
# ruff: noqa: RUF001 - look-alike letters are what these texts are for

import json
import os
import pathlib
import random

import numpy as np
import pytest

from pe_jax.data import text
from pe_jax.data.text import Tokenizer

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["meta", "open_clip"])
def reference(request):
    if request.param == "meta":
        request.getfixturevalue("perception_models")
        from core.vision_encoder.tokenizer import SimpleTokenizer
    else:
        from open_clip.tokenizer import SimpleTokenizer
    tokenizer = SimpleTokenizer(context_length=32)
    return lambda texts, length: tokenizer(texts, context_length=length).numpy()


def same(reference, texts, length=32):
    want, got = reference(texts, length), Tokenizer(length)(texts)
    wrong = [texts[i] for i in np.flatnonzero((want != got).any(1))]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts differ: {wrong[:5]!r}"


def characters(keep):
    return [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and keep(c)]


@pytest.mark.parametrize("length", [2, 3, 32, 72])
def test_any_context_length_cuts_the_same(reference, length):
    same(reference, ["", "cat", "a cat", "one two three four " * 30, "x" * 300, "<end_of_text> " * 50], length)


@pytest.mark.parametrize("low_high", [(0x20, 0x7F), (0, 0x100), (0, 0x3000), (0x20, 0x30000), (0x1F000, 0x20000)])
def test_random_texts(reference, low_high):
    draw = random.Random(str(low_high))
    pool = characters(lambda c: low_high[0] <= c < low_high[1])
    texts = ["".join(chr(draw.choice(pool)) for _ in range(draw.randint(1, 40))) for _ in range(4000)]
    same(reference, texts, 72)


def test_every_third_character_in_words_contractions_and_runs(reference):
    texts = [
        f"a{chr(c)}b'S{chr(c)}{chr(c)} {chr(c)}'{chr(c)}1" for c in characters(lambda c: c < 0x20000 and c % 3 == 0)
    ]
    same(reference, texts)


def test_special_tokens_and_entities_inside_text(reference):
    parts = [
        "<end_of_text>",
        "<START_of_text>",
        "<ſtart_of_text>",
        "'",
        "s",
        "ſ",
        "S",
        " ",
        "&amp;",
        "&lt;",
        "&#38;",
        "é",
    ]
    draw = random.Random(0)
    same(reference, ["".join(draw.choices(parts, k=9)) for _ in range(4000)], 72)


def test_class_names_prompts_and_captions(reference):
    texts = [row["text"] for row in json.loads((TESTS / "data/golden/tokens.json").read_text())]
    for path in sorted(pathlib.Path(os.environ.get("PE_JAX_DATA", TESTS / "../../shared/data")).rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            texts += row.get("captions", [])
            texts += [row[name] for name in ("caption", "cls", "question", "answer") if isinstance(row.get(name), str)]
    print(f"{len(texts)} texts")
    for length in (32, 72):
        same(reference, texts, length)


def test_our_ways_to_the_vocabulary_give_metas_merges(perception_models):
    meta_file = perception_models / "core/vision_encoder/bpe_simple_vocab_16e6.txt.gz"
    want = text.merges_from_file(meta_file)
    assert text.merges_from_instant() == want
    found = text.installed_merges_file()
    assert found and text.merges_from_file(found) == want


def test_a_tokenizer_json_written_by_hugging_face_gives_the_same_merges(tmp_path):
    """The form that CLIP models on the hub have, written by the library that writes it there."""
    import tokenizers

    merges = text.find_merges()
    symbols = text.byte_symbols()
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges), end_of_word_suffix="</w>"
    )
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert text.merges_from_file(tmp_path / "tokenizer.json") == merges

"""Tokenizers of language models: both kinds of files, what users write, streams, and files that are something else."""

import json

import numpy as np
import pytest

from pe_jax.data import tokenizers
from tests.data import vocabularies


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return [tokenizers.load(path) for path in vocabularies.llama(tmp_path_factory.mktemp("llama"))]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tokenizers.load(vocabularies.qwen(tmp_path_factory.mktemp("qwen")))


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    letters = [*"abcdefgh   \n\n'12345.,?!", "é", "你", "😀", "\u0301", "\t", "\r", "<|", "|>", "the", "image"]
    return ["".join(rng.choice(letters, rng.integers(1, 60))) for _ in range(count)]


def test_both_files_of_one_vocabulary_give_the_same_ids(llama):
    a, b = llama
    for text in vocabularies.NASTY + random_texts(300):
        assert a.encode(text) == b.encode(text), text
    assert a.specials == b.specials and a.vocab_size == b.vocab_size == vocabularies.BASE + 256
    assert [a.piece(i) for i in range(a.vocab_size)] == [b.piece(i) for i in range(b.vocab_size)]


def test_decoding_gives_the_text_back(llama, qwen):
    for text in vocabularies.NASTY + random_texts(100):
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for tokenizer in llama)
    assert qwen.decode(qwen.encode("e\u0301 <tool_call>")) == "\u00e9 <tool_call>"  # Qwen composes characters


def test_what_a_user_writes_is_never_a_special_token(llama, qwen):
    for tokenizer in (*llama, qwen):
        special = set(tokenizer.specials.values())
        for text in [*vocabularies.NASTY, *tokenizer.specials]:
            assert not special & set(tokenizer.encode(text))


def test_special_tokens_are_asked_for_by_name(llama, qwen):
    for tokenizer in llama:
        assert tokenizer.special("<|image|>") == vocabularies.IMAGE
        assert tokenizer.special("<|eot_id|>") == vocabularies.BASE + 9
        assert tokenizer.special("<|reserved_special_token_250|>") == tokenizer.vocab_size - 1
        assert tokenizer.stop_tokens == (vocabularies.BASE + 1, vocabularies.BASE + 9)
    assert qwen.stop_tokens == (qwen.special("<|endoftext|>"), qwen.special("<|im_end|>"))
    with pytest.raises(
        ValueError, match=r"no special token '<\|im_start\|>'.*<\|begin_of_text\|>.*choose the template"
    ):
        llama[0].special("<|im_start|>")


def test_special_tokens_have_no_text(llama, qwen):
    for tokenizer in (*llama, qwen):
        ids = [*tokenizer.encode("yes"), *tokenizer.stop_tokens]
        assert tokenizer.decode(ids) == "yes"


def test_a_stream_shows_a_character_once_it_is_whole(llama):
    text = "a 😀 你好 é"
    for tokenizer in llama:
        ids = tokenizer.encode(text)
        parts = list(tokenizer.stream(ids))
        assert "".join(parts) == text and "😀" in "".join(parts[:3]) and "\ufffd" not in "".join(parts)
        assert "".join(tokenizer.stream(ids[:3])) == tokenizer.decode(ids[:3])  # cut inside a character
        assert "\ufffd" in tokenizer.decode(ids[:3])


def test_halves_of_a_surrogate_pair_are_replaced(llama, qwen):
    for tokenizer in (*llama, qwen):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_long_run_without_a_break_is_encoded(llama):
    a, b = llama
    for text in ("a" * 40_000, " " * 40_000, "ab!" * 12_000):
        assert len(a.encode(text)) <= len(text) and a.decode(a.encode(text)) == text
    assert a.encode("a" * 3000) == b.encode("a" * 3000)


def test_ids_outside_the_vocabulary_are_refused(llama):
    with pytest.raises(ValueError, match=r"token 696 is outside the vocabulary of .*\[0, 696\)"):
        llama[0].decode([3, 696])


def test_a_folder_is_searched_for_its_tokenizer(tmp_path):
    vocabularies.llama(tmp_path)
    assert tokenizers.load(str(tmp_path)).path.endswith("tokenizer.json")
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizers.load(str(tmp_path)).path.endswith("tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer; wanted one of tokenizer.json, tokenizer.model"):
        tokenizers.load(str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere.json does not exist"):
        tokenizers.load(str(tmp_path / "nowhere.json"))


def test_files_of_other_kinds_are_refused_by_what_they_are(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(
        ValueError, match=r"neither a tokenizer.json nor a tiktoken file.*sentencepiece model is not read"
    ):
        tokenizers.load(str(file))
    file.write_text("YQ== 0\nYg== 1\n")
    with pytest.raises(ValueError, match="does not number 2 tokens from 0 with all 256 bytes"):
        tokenizers.load(str(file))
    file.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}, "decoder": {"type": "WordPiece"}}))
    with pytest.raises(ValueError, match="is a WordPiece tokenizer with the decoder WordPiece; wanted byte-level BPE"):
        tokenizers.load(str(file))
    file.write_text('{"vocab": 3}')
    with pytest.raises(ValueError, match=r"is no tokenizer.json: KeyError"):
        tokenizers.load(str(file))

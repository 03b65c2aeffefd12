"""The tokenizer against stored ids of Meta's; live comparisons are in tests/parity/test_tokenizer.py."""

import gzip
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pe_jax.data import text
from pe_jax.data.text import END, START, Tokenizer

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/tokens.json").read_text())


@pytest.fixture
def merges_file(tmp_path) -> pathlib.Path:
    """A merges file in OpenAI's form, written from whatever vocabulary is installed."""
    path = tmp_path / "bpe.txt.gz"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in text.find_merges()), "surplus line"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.parametrize("length", [32, 72])
def test_ids_equal_metas(length):
    ids = Tokenizer(length)([row["text"] for row in GOLDEN])
    assert ids.dtype == np.int32 and ids.shape == (len(GOLDEN), length)
    for row, got in zip(GOLDEN, ids, strict=True):
        want = row[str(length)]
        assert got.tolist() == want + [0] * (length - len(want)), row["text"]


def test_an_empty_text_is_start_end_and_zeros():
    assert Tokenizer(5)("").tolist() == [[START, END, 0, 0, 0]]


def test_a_long_text_is_cut_and_still_ends():
    ids = Tokenizer(6)("one two three four five six seven")[0]
    assert ids[0] == START and ids[-1] == END and (ids > 0).all()
    assert ids[1:5].tolist() == Tokenizer(32)("one two three four")[0][1:5].tolist()


def test_a_row_does_not_depend_on_its_neighbours():
    rows = [row["text"] for row in GOLDEN]
    together = Tokenizer(32)(rows)
    assert all((Tokenizer(32)(rows[i])[0] == together[i]).all() for i in range(0, len(rows), 7))


def test_a_list_without_texts_gives_no_rows():
    assert Tokenizer(7)([]).shape == (0, 7)


def test_a_tokenizer_is_a_value():
    assert Tokenizer(32) == Tokenizer(32) != Tokenizer(72)
    assert hash(Tokenizer(32)) == hash(Tokenizer(32))
    assert (pickle.loads(pickle.dumps(Tokenizer(8)))("a cat") == Tokenizer(8)("a cat")).all()


@pytest.mark.parametrize("wrong", [3, None, b"bytes", ["nested"]])
def test_what_is_no_text_is_refused_by_its_place(wrong):
    with pytest.raises(ValueError, match=r"text 1 is .*list of strings"):
        Tokenizer(8)(iter(["fine", wrong]))  # an iterator: the tests' type checker would be first to look into a list


def test_a_context_too_short_for_start_and_end_is_refused():
    with pytest.raises(ValueError, match="context_length=1 must be an integer of at least 2"):
        Tokenizer(1)


@pytest.mark.skipif(not importlib.util.find_spec("instant_clip_tokenizer"), reason="no wheel for this platform")
def test_the_merges_read_out_of_the_installed_vocabulary_are_openais():
    merges = text.merges_from_instant()
    assert len(merges) == text.MERGES and merges[:3] == (("i", "n"), ("t", "h"), ("a", "n"))
    assert text.digest(merges) == text._DIGEST


def test_every_form_of_the_vocabulary_gives_the_same_merges(merges_file, tmp_path):
    merges = text.find_merges()
    assert text.merges_from_file(merges_file) == merges
    for form in ([list(pair) for pair in merges], [" ".join(pair) for pair in merges]):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"model": {"type": "BPE", "merges": form}}))
        assert text.merges_from_file(path) == merges


def test_the_environment_variable_names_the_vocabulary(merges_file):
    code = "from pe_jax.data.text import *; import sys; print(Tokenizer(6)('a cat').tolist());"
    code += "assert 'instant_clip_tokenizer' not in sys.modules"
    got = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PE_JAX_BPE": str(merges_file), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert got.stdout.strip() == "[[49406, 320, 2368, 49407, 0, 0]]", got.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; set PE_JAX_BPE"),
        (b"#version\na b\nc d", "holds 2 merges, which are not CLIP's 48894"),
        (b'{"model": {}}', "neither a CLIP merges file nor a tokenizer.json"),
        (b"\x1f\x8b cut short", "neither a CLIP merges file"),
        (b"\xff\xfe", "neither a CLIP merges file"),
    ],
)
def test_a_file_that_is_no_clip_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "vocabulary"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.merges_from_file(path)


def test_without_any_vocabulary_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delenv("PE_JAX_BPE", raising=False)
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text, "installed_merges_file", lambda: None)
    with pytest.raises(ValueError, match=r"no CLIP vocabulary found. Install instant-clip-tokenizer"):
        text.find_merges()

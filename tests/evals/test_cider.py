"""CIDEr-D by hand, and its words; tests/parity/test_cider.py compares with COCO's own code."""

import math

import numpy as np
import pytest

from pe_jax.evals import cider


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's hat isn't here.", "a man 's hat is n't here"),
        ("Black-and-white T-shirt, and/or jeans!", "black-and-white t-shirt and/or jeans"),
        ("He said \"hello\" at 5:30 p.m.", "he said hello at 5:30 p.m."),
        ("Mr. Smith, of the U.S., cannot go", "mr. smith of the u.s. can not go"),
        ("1,000 cars (or so) - 10% off; $5", "1,000 cars -lrb- or so -rrb- 10 % off $ 5"),
        ("the dogs\u2019 \u201cpark\u201d … they\u2019re", "the dogs park … they 're"),
        ("ma'am, it's 9 o'clock", "ma'am it 's 9 o'clock"),
        ("  ", ""),
    ],
)  # fmt: skip
def test_captions_are_cut_into_words(caption, words):
    assert " ".join(cider.words(caption)) == words


def test_a_score_done_by_hand():
    """Two images: every word of one is in one image only, weight log 2; the shared word weighs nothing."""
    scores = cider.cider_d(["red dog", "blue cat"], [["red dog"], ["blue bird sings"]])
    assert scores[0] == pytest.approx(10 * 2 / 4)  # one- and two-word n-grams agree, longer ones there are none
    near = math.exp(-1 / 72)  # a word longer
    assert scores[1] == pytest.approx(10 * near * (1 / (math.sqrt(2) * math.sqrt(3))) / 4)


def test_a_word_said_again_gains_nothing():
    references = [["a dog runs"], ["one cat"], ["two birds"]]
    once, again = (cider.cider_d([text, "x", "x"], references)[0] for text in ("a dog runs", "a dog runs a dog runs"))
    assert 0 < again < once


def test_of_one_image_alone_every_score_is_nothing():
    np.testing.assert_array_equal(cider.cider_d(["a dog"], [["a dog"]]), [0.0])


def test_an_empty_caption_scores_nothing():
    np.testing.assert_array_equal(cider.cider_d(["", "."], [["a dog"], ["a cat", "x"]]), [0.0, 0.0])


@pytest.mark.parametrize("references", [[["a"]], [["a"], []]])
def test_images_without_references_are_refused(references):
    with pytest.raises(ValueError, match="2 captions"):
        cider.cider_d(["a", "b"], references)

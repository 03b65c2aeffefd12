"""CIDEr-D against COCO's own code, its words by Java included: `pip install --no-deps pycocoevalcap`."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from pe_jax.evals import cider

pytest.importorskip("pycocoevalcap", reason="pip install --no-deps pycocoevalcap")
DATA = pathlib.Path(os.environ.get("PE_JAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data"))


@pytest.fixture(scope="module")
def photos():
    """The captions of 62 COCO photos: one as if it were said, the others as references."""
    file = DATA / "photos/captions.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there; set PE_JAX_DATA to the sample data")
    records = [json.loads(line)["captions"] for line in file.read_text().splitlines()][:62]
    return [own[-1] for own in records], [own[:-1] for own in records]


def reference(said, right):
    """Scores of captions whose words are parted by spaces."""
    from pycocoevalcap.cider.cider import Cider

    _, scores = Cider().compute_score(dict(enumerate(right)), {i: [text] for i, text in enumerate(said)})
    return scores


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_random_words_equal_the_reference(seed):
    random = np.random.default_rng(seed)

    def text(most):
        return " ".join(random.choice([*"abcdefg"], random.integers(0, most)))

    said = [text(15) for _ in range(23)]
    right = [[text(9) for _ in range(random.integers(1, 6))] for _ in said]
    np.testing.assert_allclose(cider.cider_d(said, right, str.split), reference(said, right), rtol=1e-9, atol=1e-12)


def test_scores_of_real_captions_equal_the_reference_with_its_own_words(photos):
    if shutil.which("java") is None:
        pytest.skip("the reference cuts words by a Java program; install a Java runtime")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said, right = photos
    every = [[text, *others] for text, others in zip(said, right, strict=True)]
    cut = PTBTokenizer().tokenize({i: [{"caption": text} for text in own] for i, own in enumerate(every)})
    for i, own in enumerate(every):
        assert cut[i] == [" ".join(cider.words(caption)) for caption in own]
    theirs = reference([cut[i][0] for i in range(len(said))], [cut[i][1:] for i in range(len(said))])
    ours = cider.cider_d(said, right)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert 0.5 < ours.mean() < 1.5  # people score about 0.9 against one another

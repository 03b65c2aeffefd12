import json

import numpy as np
import PIL.Image
import pytest

from pe_jax import evals
from pe_jax.evals import inference, retrieval


def test_recall_of_a_matrix_done_by_hand():
    scores = np.array([[0.9, 0.1, 0.3, 0.2], [0.5, 0.4, 0.6, 0.1], [0.2, 0.8, 0.7, 0.9]])
    right = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool)
    places = retrieval.ranks(scores, right)
    np.testing.assert_array_equal(places, [0, 1, 1])
    assert [retrieval.recall(places, k) for k in (1, 2)] == [1 / 3, 1.0]


def test_a_tie_is_no_hit():
    places = retrieval.ranks(np.array([[0.5, 0.5]]), np.array([[True, False]]))
    np.testing.assert_array_equal(places, [1])


def test_a_query_without_a_right_target_is_refused():
    with pytest.raises(ValueError, match="query 1 has no right target"):
        retrieval.ranks(np.eye(2), np.array([[True, False], [False, False]]))


def test_several_captions_and_shared_ones_count_as_right(model, tmp_path):
    random = np.random.default_rng(5)
    captions = [["a tree", "a green tree"], ["a boat"], ["a tree"], "two boats"]
    lines = []
    for i, own in enumerate(captions):
        PIL.Image.fromarray(random.integers(0, 255, (9, 13, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": own}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = {"name": "retrieval", "data": {"name": "jsonl", "path": str(tmp_path / "data.jsonl")}, "ks": [1, 2]}
    figures = evals.create(config)(model)

    images = inference.embed_images(model, [str(tmp_path / f"{i}.png") for i in range(4)])
    texts = ["a boat", "a green tree", "a tree", "two boats"]
    scores = images @ inference.embed_texts(model, texts).T
    right = [{1, 2}, {0}, {2}, {3}]
    for k in (1, 2):
        hits = [bool(set(np.argsort(-scores[i])[:k].tolist()) & right[i]) for i in range(4)]
        assert figures[f"image_to_text_r{k}"] == np.mean(hits)
        hits = [any(t in right[i] for i in np.argsort(-scores[:, t])[:k]) for t in range(4)]
        assert figures[f"text_to_image_r{k}"] == np.mean(hits)


def test_a_record_without_a_caption_is_named(model, dataset):
    with pytest.raises(ValueError, match="record 0 has no story"):
        evals.create({"name": "retrieval", "data": dataset | {"caption": "story"}})(model)

import json

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from pe_jax import evals
from pe_jax.evals import inference, records, retrieval, views


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
    texts = ["a tree", "a green tree", "a boat", "a tree", "two boats"]
    scores = images @ inference.embed_texts(model, texts).T
    right = [{0, 1, 3}, {2}, {0, 3}, {4}]  # both trees are right for both of their images
    for k in (1, 2):
        hits = [bool(set(np.argsort(-scores[i])[:k].tolist()) & right[i]) for i in range(4)]
        assert figures[f"image_to_text_r{k}"] == np.mean(hits)
        hits = [any(t in right[i] for i in np.argsort(-scores[:, t])[:k]) for t in range(5)]
        assert figures[f"text_to_image_r{k}"] == np.mean(hits)


def unit(rows, width, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("held", [1, 24, 1 << 24])  # scores at once: one query, two, all
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_reweighted_places_equal_the_formula_on_the_whole_matrix(monkeypatch, held, scale):
    monkeypatch.setattr(retrieval, "_SCORES", held)
    queries, targets = unit(17, 5, 0), unit(11, 5, 1)
    right = [np.array([i % 11, (3 * i) % 11]) for i in range(17)]
    scores = scale * queries.astype(np.float64) @ targets.T.astype(np.float64)
    scores = scores * softmax(scores, 0)
    expected = [sum(scores[q, t] >= scores[q, r].max() and t not in r for t in range(11)) for q, r in enumerate(right)]
    found = retrieval.places(queries, targets, right, reweight=True, scale=scale)
    np.testing.assert_array_equal(found, expected)
    if scale > 1:
        assert list(found) != list(retrieval.places(queries, targets, right))


def test_each_direction_is_reweighted_over_its_own_queries():
    media, texts = unit(6, 4, 2), unit(9, 4, 3)
    captions = [[f"{i}", f"{i + 6}"] if i < 3 else [f"{i}"] for i in range(6)]
    flat = [text for own in captions for text in own]
    owner = [i for i, own in enumerate(captions) for _ in own]
    found = retrieval.recalls(media, {str(i): texts[i] for i in range(9)}, captions, (1, 3), reweighted=True)
    scores = texts[[int(t) for t in flat]] @ media.T  # [T, N]
    for name, table, positive in (
        ("text_to_image", scores * softmax(scores, 0), np.equal.outer(owner, range(6))),
        ("image_to_text", scores.T * softmax(scores.T, 0), np.equal.outer(range(6), owner)),
    ):
        for k in (1, 3):
            best = np.argsort(-table, axis=1, kind="stable")[:, :k]
            assert found[f"{name}_r{k}_dsl"] == np.take_along_axis(positive, best, 1).any(1).mean()


def test_reweighting_helps_where_one_target_suits_every_query():
    """A hub: target 0 is the nearest of all three queries, and nearest of all to its own."""
    queries = np.array([[1.0, 0.0, 0.0], [0.9, 0.436, 0.0], [0.9, 0.0, 0.436]], np.float32)
    targets = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.6, 0.0, 0.8]], np.float32)
    right = [np.array([i]) for i in range(3)]
    assert retrieval.recall(retrieval.places(queries, targets, right), 1) == 2 / 3 - 1 / 3
    assert retrieval.recall(retrieval.places(queries, targets, right, reweight=True, scale=20), 1) == 1.0


def test_the_better_resize_is_reported_and_both_are_listed(model, dataset):
    config = {"name": "retrieval", "data": dataset, "ks": [1], "dsl": True}
    both = evals.create(config | {"resize": "better"})(model)
    alone = {resize: evals.create(config | {"resize": resize})(model) for resize in ("squash", "crop")}
    for resize, figures in alone.items():
        assert figures == {name.removesuffix(f"_{resize}"): v for name, v in both.items() if name.endswith(resize)}
    best = max(alone, key=lambda r: alone[r]["image_to_text_r1_dsl"] + alone[r]["text_to_image_r1_dsl"])
    assert alone[best].items() <= both.items()
    assert len(both) == 3 * len(alone[best])


def test_mirrored_images_are_scored_as_if_they_had_been_stored_so(model, dataset, tmp_path):
    lines = []
    for row in records.open(dataset).source:
        PIL.ImageOps.mirror(PIL.Image.open(row["image"])).save(tmp_path / f"{row['caption']}.png")
        lines.append(json.dumps({"image": f"{row['caption']}.png", "caption": row["caption"]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    stored = {"name": "jsonl", "path": str(tmp_path / "data.jsonl")}
    # 16-pixel images of 18 by 21 pixels: resizing a mirror image is mirroring the resized one.
    seen = [
        views.Views.of(model, mirror=mirror).embed(model, records.open(data).images, 4)["squash"]
        for data, mirror in ((dataset, True), (stored, False))
    ]
    np.testing.assert_allclose(seen[0], seen[1], atol=2e-2)
    assert np.abs(seen[0] - views.Views.of(model).embed(model, records.open(dataset).images, 4)["squash"]).max() > 0.05


def test_captions_may_be_the_lines_of_one_text(dataset, tmp_path):
    PIL.Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one dog\ntwo dogs\n\nthree\n")
    data = {"name": "folder", "path": str(tmp_path)}
    assert records.open(data | {"caption_lines": True}).texts() == [("one dog", "two dogs", "three")]
    assert records.open(data).texts() == [("one dog\ntwo dogs\n\nthree",)]


def test_a_record_without_a_caption_is_named(model, dataset):
    with pytest.raises(ValueError, match="record 0 has no story"):
        evals.create({"name": "retrieval", "data": dataset | {"caption": "story"}})(model)

"""Matches of tokens between an image and a known warp of it."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from pe_jax import evals
from pe_jax.evals import correspondence
from pe_jax.evals.correspondence import Correspondence
from tests.evals.planted import PATCH, SIDE, planted

STILL = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of noise; the red of the first pixel of each patch is one of its own."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(3):
        image = random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        image[::PATCH, ::PATCH, 0] = random.permutation(64).reshape(8, 8) * 4
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "data.jsonl").write_text("".join(json.dumps({"image": f"{i}.png"}) + "\n" for i in range(3)))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}


def test_every_token_of_an_unchanged_view_finds_its_own_place(data):
    found = Correspondence(data, **STILL, batch_size=2).run(planted(2))
    assert found.layers == (0, 1, 2, 3) and found.places == 3 * 64
    np.testing.assert_array_equal(found.figures["pck1"], 1)


class Shifted(Correspondence):
    """A warp by two patches to the right and one down."""

    def warp(self, row, size):
        return np.array([[1.0, 0, -2 * PATCH], [0, 1, -PATCH], [0, 0, 1]])


def test_the_one_layer_that_tells_the_place_finds_it_after_a_known_shift(data):
    found = Shifted(data).run(planted(2))
    assert found.places == 3 * 6 * 7  # the others have left the view
    assert found.figures["pck1"][2] == 1 and max(np.delete(found.figures["pck1"], 2)) < 0.95
    assert all(np.all(found.figures[f"pck{a}"] <= found.figures[f"pck{b}"]) for a, b in ((1, 2), (2, 4)))


def test_a_warp_moves_pixels_to_where_its_matrix_says():
    task = Correspondence({}, rotation=90, seed=3)
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:24, 50:54] = 255  # around (x, y) = (52, 22)
    seen = 0
    for row in range(6):
        matrix = task.warp(row, (60, 80))
        x, y, _ = np.linalg.inv(matrix) @ (52, 22, 1)
        found = correspondence.warped(pixels, matrix)[..., 0].astype(float)
        found[found == 128] = 0
        seen += 4 < x < 76 and 4 < y < 56
        if 4 < x < 76 and 4 < y < 56:
            np.testing.assert_allclose(np.argwhere(found > 150).mean(0) + 0.5, (y, x), atol=0.7)
    assert seen >= 3
    assert not np.allclose(task.warp(0, (60, 80)), task.warp(1, (60, 80)))
    middle = Correspondence({}, rotation=0, scale=(1.2, 1.2), shift=0).warp(0, (60, 80))
    np.testing.assert_allclose(middle @ (40, 30, 1), (40, 30, 1))  # the middle stays
    np.testing.assert_allclose(middle[0, 0], 1 / 1.2)


def test_the_evaluator_gives_a_figure_a_layer_and_distance(data):
    config = {"name": "correspondence", "data": data, "layers": (0, 2), "within": (1, 3)} | STILL
    figures = evals.create(config)(planted(2))
    assert figures == {f"layer_0{layer}_pck{k}": 1.0 for layer in (0, 2) for k in (1, 3)}


def test_what_cannot_be_is_refused(data):
    for wrong, message in (
        ({"layers": "some"}, 'must be "all" or a list'),
        ({"within": ()}, r"within=\(\) must be distances"),
        ({"scale": (2.0, 1.0)}, r"scale=\(2.0, 1.0\) must be"),
        ({"rotation": 200}, "rotation=200 must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Correspondence(data), **wrong)

    class Away(Correspondence):
        def warp(self, row, size):
            return np.array([[1.0, 0, 1000], [0, 1, 0], [0, 0, 1]])

    with pytest.raises(ValueError, match="no token has a place in its other view"):
        Away(data).run(planted(2))

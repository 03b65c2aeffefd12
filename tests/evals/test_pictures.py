import numpy as np
import pytest

from pe_jax.evals import pictures


def test_colours_are_rgb_and_like_features_are_alike():
    """Two halves of an image with their own feature each: one colour a half, away from the seam."""
    random = np.random.default_rng(0)
    halves = random.normal(size=(2, 7))
    tokens = np.repeat(halves[None, [0, 0, 0, 1, 1, 1]], 5, 0)[None] + 0.01 * random.normal(size=(1, 5, 6, 7))
    colors = pictures.pca_colors(tokens)
    assert colors.shape == (1, 5, 6, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    light = colors.mean(-1)[0]
    assert abs(light[:, :2].mean() - light[:, 4:].mean()) > 5 * max(light[:, :2].std(), light[:, 4:].std())


def test_the_scale_of_features_does_not_matter():
    tokens = np.random.default_rng(1).normal(size=(2, 4, 3, 9))
    np.testing.assert_allclose(pictures.pca_colors(tokens), pictures.pca_colors(1000 * tokens + 5), atol=1e-6)


def test_white_is_white_and_black_is_black():
    lab = pictures._from_lab(np.array([0.0, 100.0]), np.zeros(2), np.zeros(2))
    np.testing.assert_allclose(lab, [[0, 0, 0], [1, 1, 1]], atol=0.01)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match=r"want \[B, H, W, D\]"):
        pictures.pca_colors(np.zeros((2, 9, 7)))

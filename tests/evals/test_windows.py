"""Squares of an image, and maps of the squares put together to one of the image."""

import jax
import numpy as np
import PIL.Image
import pytest

from pe_jax.data.image import Preprocess
from pe_jax.evals.windows import Windows, assembled, enlarging


def resized(x, size):
    return np.asarray(jax.image.resize(x, (*size, x.shape[-1]), "bilinear", antialias=False))


@pytest.mark.parametrize(("old", "new"), [(4, 13), (5, 5), (1, 3), (9, 4)])
def test_enlarging_is_bilinear(old, new):
    x = np.random.default_rng(0).normal(size=(old, 1, 2)).astype(np.float32)
    np.testing.assert_allclose(enlarging(old, new) @ x[:, 0], resized(x, (new, 1))[:, 0], atol=1e-6)


def test_squares_lie_along_the_longer_side():
    windows = Windows(12, "slide")
    assert windows.count((24, 24)) == 1 and windows.boxes((24, 24)) == [(0, 0, 24, 24)]
    # 24 x 60 becomes 12 x 30: squares at 0, 8, 16 and 18, a step of 8, the last one moved back.
    assert windows.boxes((24, 60)) == [(left, 0, left + 24, 24) for left in (0, 16, 32, 36)]
    assert [box[1] for box in windows.boxes((60, 24))] == [0, 16, 32, 36]
    assert Windows(12).boxes((24, 60)) == [(0, 0, 60, 24)]
    with pytest.raises(ValueError, match="window='crop' is unknown"):
        Windows(12, "crop")


@pytest.mark.parametrize(("kind", "size"), [("squash", (17, 40)), ("slide", (17, 40)), ("slide", (50, 20))])
def test_maps_of_squares_are_averaged_and_brought_to_the_image(kind, size):
    windows, grid, side = Windows(12, kind), 3, 12
    count = windows.count(size)
    maps = np.random.default_rng(0).normal(size=(count, grid, grid, 2)).astype(np.float32)
    long = (side, side) if kind == "squash" else tuple(max(side, round(n * side / min(size))) for n in size)
    total, shared = np.zeros((*long, 2)), np.zeros((*long, 1))
    for one, (left, top, _, _) in zip(maps, windows.boxes(size), strict=True):
        y, x = round(top * long[0] / size[0]), round(left * long[1] / size[1])
        total[y : y + side, x : x + side] += resized(one, (side, side))
        shared[y : y + side, x : x + side] += 1
    assert shared.min() == 1 and (count == 1 or shared.max() > 1)
    wanted = resized(total / shared, size)
    a, b = windows.matrices(size, grid, count + 1, (60, 64))
    filled = np.concatenate([maps, np.full((1, grid, grid, 2), 9.0, np.float32)])  # squares that are not there
    found = np.asarray(assembled(a, filled, b))
    assert found.shape == (60, 64, 2)
    np.testing.assert_allclose(found[: size[0], : size[1]], wanted, atol=1e-5)
    assert not found[size[0] :].any() and not found[:, size[1] :].any()


def test_pixels_are_those_of_the_squares():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 60, 3)).astype(np.uint8))
    preprocess = Preprocess(12)
    found = Windows(12, "slide").pixels(image, preprocess, 5)
    assert found.shape == (5, 12, 12, 3) and not found[4].any()
    whole = np.array(image.resize((30, 12), PIL.Image.Resampling.BILINEAR))
    for row, left in enumerate((0, 8, 16, 18)):
        # At a square's border the image resized as a whole also sees pixels beyond it.
        np.testing.assert_allclose(found[row][:, 1:-1].astype(int), whole[:, left + 1 : left + 11], atol=1)
    np.testing.assert_array_equal(Windows(12).pixels(image, preprocess, 1)[0], preprocess.pixels(image))

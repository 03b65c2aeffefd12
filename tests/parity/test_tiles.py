"""Grids and pixels of our tiles against Meta's own transform, live."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

from pe_jax.data import tiles

_spec = importlib.util.spec_from_file_location("golden_make", pathlib.Path(__file__).parents[1] / "data/golden/make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def meta(perception_models):
    from core.transforms import image_transform

    return image_transform


@pytest.mark.parametrize("most", [1, 4, 16, 36])
def test_grids_equal(meta, most):
    theirs = meta.VariableSizeImageTransform(size=448, max_num_tiles=most, use_thumbnail="before")
    sides = (1, 99, 336, 447, 448, 449, 640, 895, 897, 1080, 1344, 1920, 3508, 9001)
    for width, height in itertools.product(sides, repeat=2):
        want = theirs._fit_image_to_canvas(width, height, False) or theirs._find_closest_aspect_ratio(width, height)
        assert tiles.canvas(width, height, 448, most) == want, (width, height)


@pytest.mark.parametrize(("mode", "width", "height", "size", "most"), golden.TILES)
def test_pixels_equal(meta, mode, width, height, size, most):
    image = golden.picture(mode, width, height)
    np.testing.assert_array_equal(tiles.tiles(image, size, most), golden.plm_tiles(meta, image, size, most))


def test_a_whole_image_equals_the_transform_without_tiles(meta):
    image = golden.picture("RGB", 61, 47)
    want, _ = meta.get_image_transform("vanilla", 32, 1, normalize_img=False)(image)
    want = (want * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(tiles.whole(image, 32)[None], want)

"""Tiles: the grids of known sizes, the pixels of PLM's own transform, and every tile in its place."""

import hashlib
import importlib.util
import itertools
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from pe_jax.data import tiles
from pe_jax.data.image import BadImage

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", _GOLDEN / "make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.mark.parametrize(
    ("width", "height", "grids"),
    [
        (640, 480, [(2, 2), (4, 3), (7, 5)]),
        (1920, 1080, [(2, 2), (5, 3), (8, 4)]),
        (2480, 3508, [(2, 2), (3, 4), (5, 7)]),
        (300, 800, [(1, 3), (2, 6), (4, 9)]),
        (100, 100, [(2, 2), (4, 4), (6, 6)]),
    ],
)
def test_the_grids_of_known_sizes(width, height, grids):
    assert [tiles.canvas(width, height, 448, most) for most in (4, 16, 36)] == grids


def test_the_number_of_grids_to_choose_from():
    assert [len(tiles._grids(most)) for most in (1, 4, 16, 36)] == [1, 8, 50, 140]


def test_a_grid_never_has_more_tiles_than_allowed():
    sizes = itertools.product((1, 37, 448, 449, 1000, 9000), repeat=2)
    for (width, height), most in itertools.product(sizes, (1, 2, 5, 16, 36)):
        columns, rows = tiles.canvas(width, height, 448, most)
        assert columns >= 1 and rows >= 1 and columns * rows <= most


def test_tiles_lie_row_by_row_behind_the_thumbnail():
    image = np.zeros((2 * 8, 3 * 8, 3), np.uint8)
    for row, column in itertools.product(range(2), range(3)):
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 40 * (3 * row + column)
    got = tiles.tiles(image, 8, 6)
    assert got.shape == (7, 8, 8, 3)
    assert [int(tile[4, 4, 0]) for tile in got[1:]] == [0, 40, 80, 120, 160, 200]  # of its own size: nothing is blended
    np.testing.assert_array_equal(got[0], tiles.whole(image, 8))
    np.testing.assert_array_equal(tiles.tiles(image, 8, 6, thumbnail=False), got[1:])


def test_one_tile_is_the_thumbnail_once_more():
    got = tiles.tiles(golden.picture("RGB", 31, 23), 16, 1)
    assert got.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("case", json.loads((_GOLDEN / "tiles.json").read_text()), ids=str)
def test_pixels_are_those_of_plms_transform(case):
    mode, width, height, size, most, digest = case
    got = tiles.tiles(golden.picture(mode, width, height), size, most)
    assert hashlib.sha256(got.tobytes()).hexdigest()[:16] == digest


def test_an_image_is_stretched_over_the_whole_canvas_and_not_padded():
    white = PIL.Image.new("RGB", (90, 40), "white")
    assert (tiles.tiles(white, 32, 4) == 255).all()


def test_what_is_no_image_or_no_size_is_refused():
    with pytest.raises(BadImage, match="in no image format"):
        tiles.tiles(b"GIF", 32, 4)
    with pytest.raises(ValueError, match="max_tiles=0 must all be at least 1"):
        tiles.canvas(3, 5, 32, 0)

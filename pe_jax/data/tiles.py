"""Large images as several tiles beside one small view of the whole, as Perception Language Models see them.

The canvas is chosen from the image's size alone: the grid of tiles that shows it largest where it fits, else the one of
the nearest shape. The image is stretched over the whole canvas. Source: the published code of PLM (arXiv 2504.13180).
"""

import functools

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from pe_jax.data.image import Image, decode

_BICUBIC = PIL.Image.Resampling.BICUBIC


def canvas(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """The grid (columns, rows) of at most `max_tiles` square tiles for an image of `width` x `height` pixels.

    Args:
      width, height: of the image, in pixels.
      size: S, pixels of a tile's side.
      max_tiles: the most tiles of a grid, at least 1.

    Raises:
      ValueError: if any of them is below 1.
    """
    if min(width, height, size, max_tiles) < 1:
        raise ValueError(f"{width=}, {height=}, {size=} and {max_tiles=} must all be at least 1.")
    grids = _grids(max_tiles)
    best, longest = None, 0.0
    for columns, rows in grids:
        if columns * size < width or rows * size < height:
            continue
        # Scaled to fit: the side compared is rounded down as PLM does it, which decides ties.
        scale = min(columns * size / width, rows * size / height)
        if width > height:
            short = int(scale * width / (width / height))
        else:
            short = int(scale * height * (width / height)) if width < height else scale * height
        if best is None or short >= longest:
            best, longest = (columns, rows), short
    if best is not None:
        return best
    shape = width / height
    if shape >= 1:
        near = max(columns / rows for columns, rows in grids if columns / rows <= shape)
    else:
        near = min(columns / rows for columns, rows in grids if columns / rows > shape)
    return next(grid for grid in grids if grid[0] / grid[1] == near)  # the largest comes first


def tiles(image: Image, size: int, max_tiles: int, thumbnail: bool = True) -> UInt8[np.ndarray, "C S S 3"]:
    """An image as chunks of S x S pixels: the whole of it, then the tiles of its canvas row by row.

    Args:
      image: anything `pe_jax.data.image.decode` takes; transparency is dropped.
      size: S.
      max_tiles: the most tiles; 1 still gives one tile beside the thumbnail, which then are the same pixels.
      thumbnail: whether the whole image, squashed to S x S, comes first.

    Raises:
      BadImage: if it cannot be decoded.
    """
    picture = decode(image).convert("RGB")
    columns, rows = canvas(picture.width, picture.height, size, max_tiles)
    spread = np.array(_resized(picture, columns * size, rows * size))
    parts = spread.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(rows * columns, size, size, 3)
    return np.concatenate([whole(picture, size)[None], parts]) if thumbnail else parts


def whole(image: Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """An image squashed to one chunk of S x S pixels, as PLM takes thumbnails, frames and images among several."""
    return np.array(_resized(decode(image).convert("RGB"), size, size))


def _resized(picture: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    return picture if picture.size == (width, height) else picture.resize((width, height), _BICUBIC)


@functools.cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids: from most tiles to fewest those of one shape together, shapes in the order in which they come up."""
    by_shape: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for columns in range(1, count + 1):
            if count % columns == 0:
                by_shape.setdefault(columns / (count // columns), []).append((columns, count // columns))
    return tuple(grid for grids in by_shape.values() for grid in grids)

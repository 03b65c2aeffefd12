"""Boxes in conversations: drawn on a frame, written as text, read back from an answer (PLM's way).

In a record boxes are [x, y, width, height] in pixels and a text names them by `<|bbox0|>`, `<|bbox1|>`, …; a model
reads and writes corners in thousandths of the image, "[012,345,678,999]".
"""

import re
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import UInt8

RED, WIDTH = (255, 0, 0), 4  # of a box that is drawn, in pixels of the frame before it is resized

_MARKER = re.compile(r"<\|bbox(\d+)\|>")
_WRITTEN = re.compile(r"\[\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\]")


def write(box: Sequence[float], width: float, height: float) -> str:
    """A box (x, y, width, height) in pixels of an image of this size as text: corners in thousandths, cut to 0..999."""
    x, y, across, down = box
    corners = (x / width, y / height, (x + across) / width, (y + down) / height)
    return "[" + ",".join(f"{int(max(min(c, 0.999), 0.0) * 1000):03d}" for c in corners) + "]"


def fill(text: str, boxes: Sequence[Sequence[float]], width: float, height: float) -> str:
    """The text with every `<|bboxN|>` replaced by box N.

    Raises:
      ValueError: if it names a box that is not there.
    """

    def written(match: re.Match) -> str:
        if (number := int(match[1])) >= len(boxes):
            raise ValueError(f"the text names {match[0]} and there are {len(boxes)} boxes.")
        return write(boxes[number], width, height)

    return _MARKER.sub(written, text)


def parse(text: str) -> list[tuple[float, float, float, float]]:
    """All boxes that an answer writes, as corners (left, top, right, bottom) in [0, 1)."""
    return [tuple(int(part) / 1000 for part in match.groups()) for match in _WRITTEN.finditer(text)]  # type: ignore


def draw(frame: UInt8[np.ndarray, "H W 3"], corners: Sequence[float]) -> UInt8[np.ndarray, "H W 3"]:
    """A copy of the frame with a box (left, top, right, bottom), in its pixels, drawn in red."""
    image = PIL.Image.fromarray(frame)
    PIL.ImageDraw.Draw(image).rectangle([int(c) for c in corners], outline=RED, width=WIDTH)
    return np.array(image)

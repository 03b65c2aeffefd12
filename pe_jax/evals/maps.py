"""Images with a map of their pixels, for evaluators: the class of each pixel, or its depth in metres.

A data set is a source as for any evaluator (`pe_jax.evals.records`), whose records name a map beside the image:

  {"name": "jsonl", "path": "nuclei.jsonl", "root": "data", "mask": "labels", "foreground": true}
  {"name": "pairs", "path": "ADE/images/validation", "maps": "ADE/annotations/validation"}
  {"name": "listed", "path": "nyu/nyu_test.txt"}

`mask` (or `depth`) is the field with the map: a path, relative to the source's root, encoded bytes, or an array; by
default the field of that very name. `foreground` takes all numbers above 0 of a mask as 1. Depths are divided by
`units_per_metre`, of the data set or else of the record; 0 is no measurement. `limit` takes the first so many records.
"""

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32

from pe_jax.data import sources
from pe_jax.data.image import decode, read_bytes
from pe_jax.evals import records

_OWN = ("mask", "foreground", "depth", "units_per_metre")
Kind = Literal["mask", "depth"]


@dataclasses.dataclass(frozen=True)
class Maps:
    """The records of one source, as dense evaluators see them."""

    source: sources.Source
    kind: Kind
    count: int
    field: str
    foreground: bool = False
    units_per_metre: float | None = None

    def __len__(self) -> int:
        return self.count

    def image(self, row: int) -> PIL.Image.Image:
        """Decoded."""
        return decode(self.source[row]["image"], self.source.where(row))

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of the image in pixels, of which only the head is read."""
        image = self.source[row]["image"]
        if isinstance(image, np.ndarray):
            return image.shape[0], image.shape[1]
        with PIL.Image.open(io.BytesIO(image if isinstance(image, bytes) else read_bytes(image))) as opened:
            return opened.height, opened.width

    def labels(self, row: int) -> Int32[np.ndarray, "H W"]:
        """The number of each pixel, of the image's size.

        Raises:
          ValueError: for a record without a mask, one of colours, or one of another size than the image.
        """
        found = self._map(row).astype(np.int32)
        return (found > 0).astype(np.int32) if self.foreground else found

    def metres(self, row: int) -> Float32[np.ndarray, "H W"]:
        """The depth of each pixel, of the image's size; 0 where there is none.

        Raises:
          ValueError: for a record without a depth or its unit, or one of another size than the image.
        """
        units = self.units_per_metre or self.source[row].get("units_per_metre")
        if not units or not float(units) > 0:
            raise ValueError(
                f"{self.source.where(row)} does not say its unit; set `units_per_metre`, 1000 for millimetres."
            )
        found = self._map(row).astype(np.float32) / np.float32(units)
        return np.where(np.isfinite(found) & (found > 0), found, np.float32(0))

    def _map(self, row: int) -> np.ndarray:
        record, where = self.source[row], self.source.where(row)
        if self.field not in record:
            raise ValueError(
                f"{where} has no {self.field}; its fields are {', '.join(record)}. Name the one with the map, as "
                f'"{self.kind}": FIELD.'
            )
        value = record[self.field]
        if isinstance(value, str):
            value = value if "://" in value else os.path.join(getattr(self.source, "root", None) or "", value)
            found = np.asarray(decode(value))
        elif isinstance(value, bytes):
            found = np.asarray(decode(value, f"the {self.field} of {where}"))
        else:
            found = np.asarray(value)
        found = found[..., 0] if found.ndim == 3 and found.shape[-1] == 1 else found
        if found.ndim != 2:
            raise ValueError(f"the {self.field} of {where} is {list(found.shape)}; want one number a pixel, [H, W].")
        if found.shape != (size := self.size(row)):
            raise ValueError(
                f"the {self.field} of {where} is {found.shape[1]}x{found.shape[0]} pixels and the image "
                f"{size[1]}x{size[0]}; want maps of the images' size."
            )
        return found


def open(config: Mapping[str, Any], kind: Kind) -> Maps:
    """The images and maps that an evaluator's `data` describes; `kind` is "mask" or "depth".

    Raises:
      ValueError: for an unknown source or argument, or a missing file.
    """
    own = {name: config[name] for name in _OWN if name in config}
    found = records.open(source_of(config))
    return Maps(
        found.source,
        kind,
        len(found),
        str(own.get(kind, kind)),
        bool(own.get("foreground", False)),
        own.get("units_per_metre"),
    )


def source_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the images alone."""
    return {
        name: value
        for name, value in config.items()
        if name not in _OWN or (name == "units_per_metre" and config.get("name") == "listed")
    }

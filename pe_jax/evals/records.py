"""Labelled or captioned images and videos for evaluators: the fields of a data source's records, by name.

An evaluator's `data` is a source as in a run's `data.sources`, with four fields of its own:

  {"name": "jsonl", "path": "digits/test.jsonl", "label": "label", "caption": "text", "limit": 1000}

`label` is the field that holds the class, an integer from 0 or the class's name; `caption` the one that holds a text
or a list of texts; `caption_lines` says that each line of the text is a caption of its own; `limit` takes the first so
many records. All processes see the same records in the same order. A record that cannot be read is an error: a score
over fewer images would be another score.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from pe_jax.data import sources

LABELS = ("label", "cls")  # looked for in this order where no field is named
CAPTIONS = ("captions", "caption", "text", "txt")
_OWN = ("label", "caption", "caption_lines", "limit")


class Media(Sequence[Any]):
    """The images, or videos, of a source's first `count` records, read one at a time when they are asked for."""

    def __init__(self, source: sources.Source, count: int, kind: str = "image"):
        self._source, self._count, self._kind = source, count, kind

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return sources.medium(self._source[index], self._kind, self._source.where(index))


class Chosen(Sequence[Any]):
    """Some of the rows of another sequence."""

    def __init__(self, rows: Sequence[Any], places: Sequence[int] | np.ndarray):
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[int(self._places[index])]


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one source, as evaluators see them."""

    source: sources.Source
    label: str | None = None
    caption: str | None = None
    caption_lines: bool = False
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    @property
    def images(self) -> Media:
        return Media(self.source, len(self))

    @property
    def videos(self) -> Media:
        """What `pe_jax.data.video.Reader` takes."""
        return Media(self.source, len(self), "video")

    def labels(self, classes: Sequence[str] | None = None, *, others: bool = False) -> Int64[np.ndarray, "N"]:
        """[N] class of each record: the integer that is there, or the place of its name among `classes`.

        Args:
          classes: what the records may call their class, in the order of the numbers; one that is there twice is known
            by its numbers alone.
          others: a record of another name gets -1.

        Raises:
          ValueError: for a record without a label, a name that is no class, or a number out of range.
        """
        counts = collections.Counter(classes or ())
        place = {name: i for i, name in enumerate(classes or ()) if counts[name] == 1}
        found = np.empty(len(self), np.int64)
        for row in range(len(self)):
            value = self._value(row, (self.label,) if self.label else LABELS)
            if isinstance(value, str) and value in place:
                found[row] = place[value]
            elif isinstance(value, int | np.integer) and value >= 0 and (classes is None or value < len(classes)):
                found[row] = value
            elif others and isinstance(value, str) and not counts[value]:
                found[row] = -1
            else:
                wanted = f"an integer from 0 to {len(classes) - 1}, or a class name" if classes else "an integer from 0"
                raise ValueError(f"{self.source.where(row)}: the label is {value!r:.60}; want {wanted}.")
        return found

    def texts(self) -> list[tuple[str, ...]]:
        """The captions of each record, one or more.

        Raises:
          ValueError: for a record without any.
        """
        found = []
        for row in range(len(self)):
            value = self._value(row, (self.caption,) if self.caption else CAPTIONS)
            if isinstance(value, Mapping) and "text" in value:  # how TFDS nests them
                value = value["text"]
            if isinstance(value, str):
                own = tuple(line for line in value.splitlines() if line.strip()) if self.caption_lines else (value,)
            else:
                own = tuple(value)
            if not own or not all(isinstance(text, str) and text.strip() for text in own):
                raise ValueError(f"{self.source.where(row)}: the caption is {value!r:.60}; want a text, or a list.")
            found.append(own)
        return found

    def _value(self, row: int, names: Sequence[str]) -> Any:
        # Of a source that can leave the image out, labels are read without reading the data set twice.
        record = self.source.fields(row) if isinstance(self.source, sources.WebDataset) else self.source[row]
        for name in names:
            if name in record:
                return record[name]
        raise ValueError(f"{self.source.where(row)} has no {' or '.join(names)}; its fields are {', '.join(record)}.")


def open(config: Mapping[str, Any]) -> Records:
    """The records that an evaluator's `data` describes.

    Raises:
      ValueError: for an unknown source or argument, or a missing file.
    """
    own = {name: config[name] for name in _OWN if name in config}
    if own.get("limit", 1) is not None and own.get("limit", 1) < 1:
        raise ValueError(f"limit={own['limit']} must be at least 1, or left out.")
    return Records(sources.create({name: value for name, value in config.items() if name not in _OWN}), **own)

"""Files → this host's batches, in NumPy: no model is imported and no device array is made here.

What kind of batches a run takes its stage says (`pe_jax.stages.Stage.inputs`); `create` and `batch_spec` are the one
door to all kinds.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pe_jax.data.image import Preprocess
from pe_jax.data.text import Tokenizer

__all__ = ["KINDS", "Loader", "Preprocess", "Spec", "Tokenizer", "batch_spec", "create", "preprocess"]

KINDS = (
    "pairs",  # an image and its caption: `image`, `text`
    "images",  # an image alone: `image`
    "chat",  # conversations about images and videos, packed: `tokens`, `targets`, `segments`, `chunks`, `slots`
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one field of a batch, `jax.ShapeDtypeStruct` without jax."""

    shape: tuple[int, ...]
    dtype: np.dtype


@runtime_checkable
class Loader(Protocol):
    """This host's part of an endless sequence of batches, every kind's alike; close it, or use it in a `with`."""

    @property
    def position(self) -> int:
        """Global number of rows consumed: pass it as `start` to continue, on any number of hosts."""
        ...

    @property
    def bad(self) -> dict[str, int]:
        """Bad records this host has met and replaced, by source."""
        ...

    @property
    def examples_per_second(self) -> float:
        """Rows that this host's threads could deliver, by the time they took so far."""
        ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...

    def __enter__(self) -> "Loader": ...

    def __exit__(self, *_: Any) -> None: ...


def create(
    kind: str,
    config: Any,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    **shape: Any,
) -> Loader:
    """Endless batches of one kind for one host.

    Args:
      kind: one of `KINDS`.
      config: the `data` section of an experiment, as that kind's own `create` describes it.
      batch_size: rows of the global batch.
      image_size: pixels.
      seed: of order and augmentation; not negative.
      process_index, process_count: this host and how many there are.
      start: global number of rows consumed before; continues exactly there.
      shape: what else the kind asks of the model: `context_length` of pairs.

    Raises:
      ValueError: for an unknown kind, or whatever that kind refuses.
    """
    module, more = _maker(kind)
    return module.create(
        config,
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        start=start,
        **shape | more,
    )


def batch_spec(kind: str, config: Any, *, batch_size: int, image_size: int, **shape: Any) -> dict[str, Spec]:
    """What `create` yields for these arguments; reads no file. `batch_size` is of the batch meant, local or global."""
    module, more = _maker(kind)
    return module.batch_spec(config, batch_size=batch_size, image_size=image_size, **shape | more)


def preprocess(kind: str, image_size: int) -> Preprocess:
    """How an image is brought to a tower trained on batches of this kind, where it is used later."""
    return Preprocess(image_size, filter="bicubic" if kind == "chat" else "bilinear")


def _maker(kind: str) -> tuple[Any, dict[str, Any]]:
    """The module that makes batches of this kind, and what of its arguments the kind decides."""
    # Loaded here, so that a model that only wants its tokenizer does not load Grain.
    if kind == "chat":
        from pe_jax.data import packing

        return packing, {}
    if kind not in KINDS:
        raise ValueError(f"data kind {kind!r} is unknown; the kinds are {', '.join(KINDS)}.")
    from pe_jax.data import pipeline

    return pipeline, {"context_length": None} if kind == "images" else {}

"""Image-text retrieval: recall@k in both directions (PE §3)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pe_jax.evals import inference, records


def ranks(scores: Float[np.ndarray, "Q T"], positives: Bool[np.ndarray, "Q T"]) -> Int[np.ndarray, "Q"]:
    """How many wrong targets come before each query's best right one; 0 is a hit at once, a tie counts against it.

    Raises:
      ValueError: if a query has no right target.
    """
    if not positives.any(1).all():
        raise ValueError(f"query {int(np.argmin(positives.any(1)))} has no right target.")
    best = np.where(positives, scores, -np.inf).max(1, keepdims=True)
    return ((scores >= best) & ~positives).sum(1)


def recall(places: Int[np.ndarray, "Q"], k: int) -> float:
    """The share of queries with a right target among the first k."""
    return float((places < k).mean())


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Evaluator `{"name": "retrieval", "data": {...}}` → `image_to_text_r1`, `text_to_image_r1`, and so on for each k.

    Equal texts count as one, which all their images are right for.

    Attributes:
      data: images with one or more captions, see `pe_jax.evals.records`.
      ks: places that still count as found.
      batch_size, image_size: as for zero-shot classification.
    """

    data: Mapping[str, Any]
    ks: Sequence[int] = (1, 5, 10)
    batch_size: int = 64
    image_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(self.ks))
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be places of at least 1, like (1, 5, 10).")

    def __call__(self, model: inference.Model) -> dict[str, float]:
        clip = inference.require_text(model, "retrieval")
        rows = records.open(self.data)
        captions = rows.texts()
        texts = sorted({text for own in captions for text in own})
        column = {text: i for i, text in enumerate(texts)}
        positives = np.zeros((len(captions), len(texts)), bool)
        for row, own in enumerate(captions):
            positives[row, [column[text] for text in own]] = True
        images = inference.embed_images(clip, rows.images, self.batch_size, self.image_size)
        embedded = inference.embed_texts(clip, texts)
        found: dict[str, float] = {}
        for name, queries, targets, right in (
            ("image_to_text", images, embedded, positives),
            ("text_to_image", embedded, images, positives.T),
        ):
            # A thousand queries at a time: the whole matrix of scores may not fit.
            parts = [
                ranks(queries[i : i + 1000] @ targets.T, right[i : i + 1000]) for i in range(0, len(queries), 1000)
            ]
            places = np.concatenate(parts)
            found |= {f"{name}_r{k}": recall(places, k) for k in self.ks}
        return found

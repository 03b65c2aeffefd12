"""Image-text retrieval: recall@k in both directions (PE §3 and appendix B.1.2; CLIP §3.1)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pe_jax.evals import inference, records, views

_SCORES = 1 << 24  # how many are held at once, 64 MiB of float32


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


def places(
    queries: Float[np.ndarray, "Q E"],
    targets: Float[np.ndarray, "T E"],
    right: Sequence[Int[np.ndarray, "_"]],
    *,
    reweight: bool = False,
    scale: float = 1.0,
) -> Int[np.ndarray, "Q"]:
    """`ranks` of every query by its cosines, a slice of queries at a time: the whole matrix may not fit.

    Args:
      queries, targets: unit rows.
      right: the right targets of each query.
      reweight: multiply a score by its softmax over all queries (DSL, arXiv:2109.04290, as PE's harness has it): a
        target that suits many queries counts less for each. Every query then depends on all others.
      scale: of the cosines before that; 1 is PE's.
    """
    if reweight:
        # Two passes, so that no column of scores need be held: its peak and the sum below it first.
        peak = np.full(len(targets), -np.inf, np.float32)
        total = np.zeros(len(targets))
        for _, scores in _slices(queries, targets):
            scores = scores * np.float32(scale)
            higher = np.maximum(peak, scores.max(0))
            total = total * np.exp(peak.astype(np.float64) - higher) + np.exp(scores - higher).sum(0, np.float64)
            peak = higher
    found = []
    for start, scores in _slices(queries, targets):
        if reweight:
            scores = scores * np.float32(scale)
            scores = scores * (np.exp(scores - peak) / total)
        positives = np.zeros(scores.shape, bool)
        for row in range(len(scores)):
            positives[row, right[start + row]] = True
        found.append(ranks(scores, positives))
    return np.concatenate(found)


def recalls(
    media: Float[np.ndarray, "N E"],
    texts: Mapping[str, Float[np.ndarray, "E"]],
    captions: Sequence[Sequence[str]],
    ks: Sequence[int],
    *,
    reweighted: bool = False,
    kind: str = "image",
) -> dict[str, float]:
    """`image_to_text_r1`, `text_to_image_r1`, and so on for each k; with `reweighted` also `image_to_text_r1_dsl`.

    A medium is found when one of its captions is among the first k, as in CLIP. Every caption is a query and a target
    of its own; equal ones are right for the same media.

    Args:
      media: unit embeddings of images; of videos, the mean of unit frames, which is shorter.
      texts: the unit embedding of every caption.
      captions: of each medium, one or more.
      ks: places that still count as found.
      reweighted: whether to give the figures of reweighted scores too, see `places`.
      kind: what the figures call a medium.
    """
    flat = [(text, row) for row, own in enumerate(captions) for text in own]
    said_of: dict[str, list[int]] = {}
    columns_of: dict[str, list[int]] = {}
    for column, (text, row) in enumerate(flat):
        said_of.setdefault(text, []).append(row)
        columns_of.setdefault(text, []).append(column)
    embedded = np.stack([texts[text] for text, _ in flat])
    right_texts = [np.unique(np.concatenate([columns_of[text] for text in own])) for own in captions]
    right_media = [np.unique(said_of[text]) for text, _ in flat]
    found: dict[str, float] = {}
    for ending, reweight in (("", False), ("_dsl", True)):
        if reweight and not reweighted:
            continue
        for name, queries, targets, right in (
            (f"{kind}_to_text", media, embedded, right_texts),
            (f"text_to_{kind}", embedded, media, right_media),
        ):
            at = places(queries, targets, right, reweight=reweight)
            found |= {f"{name}_r{k}{ending}": recall(at, k) for k in ks}
    return found


def embed_captions(model: inference.Model, captions: Sequence[Sequence[str]]) -> dict[str, Float[np.ndarray, "E"]]:
    """The unit embedding of every caption; equal ones are embedded once."""
    distinct = sorted({text for own in captions for text in own})
    clip = inference.require_text(model, "retrieval")
    return dict(zip(distinct, inference.embed_texts(clip, distinct), strict=True))


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Evaluator `{"name": "retrieval", "data": {...}}` → the figures of `recalls`.

    Attributes:
      data: images with one or more captions, see `pe_jax.evals.records`.
      ks: places that still count as found.
      batch_size, image_size: as for zero-shot classification.
      dsl: whether to give reweighted figures too, see `places`.
      resize: "squash", "crop", or "better": both, of which the one with the higher mean of both directions' recall at
        the first of `ks` (of reweighted scores, with `dsl`) is reported, and both listed as `text_to_image_r1_squash`
        and so on; None takes the model's own.
      mirror: swap left and right in all images.
    """

    data: Mapping[str, Any]
    ks: Sequence[int] = (1, 5, 10)
    batch_size: int = 64
    image_size: int | None = None
    dsl: bool = False
    resize: str | None = None
    mirror: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(self.ks))
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be places of at least 1, like (1, 5, 10).")
        views.check(self.resize)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        clip = inference.require_text(model, "retrieval")
        rows = records.open(self.data)
        captions = rows.texts()
        texts = embed_captions(clip, captions)
        seen = views.Views.of(clip, self.resize, self.image_size, mirror=self.mirror)
        found = {
            view: recalls(images, texts, captions, self.ks, reweighted=self.dsl)
            for view, images in seen.embed(clip, rows.images, self.batch_size).items()
        }
        figure = f"r{self.ks[0]}{'_dsl' if self.dsl else ''}"
        return views.reported(found, lambda own: own[f"image_to_text_{figure}"] + own[f"text_to_image_{figure}"])


def _slices(
    queries: Float[np.ndarray, "Q E"], targets: Float[np.ndarray, "T E"]
) -> Iterator[tuple[int, Float[np.ndarray, "q T"]]]:
    """Where each slice of queries begins, and its cosines."""
    rows = max(1, _SCORES // len(targets))
    for start in range(0, len(queries), rows):
        yield start, queries[start : start + rows] @ targets.T

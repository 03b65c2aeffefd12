"""Videos: zero-shot classification and retrieval by a few frames of each (PE §3 and appendix B.1.2).

A video is the mean of its frames' embeddings, and the two tasks differ in when lengths are set to one. To classify, the
frames count as long as the tower made them and their mean is brought to unit length. To retrieve, each frame is brought
to unit length and the mean is left as it is, so that a video whose frames disagree is short and scores low.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from pe_jax.data import video
from pe_jax.data.image import Preprocess
from pe_jax.evals import inference, records, retrieval, views, zero_shot
from pe_jax.models.clip import CLIP, unit


def embed(
    model: CLIP,
    videos: Sequence[Any],
    seen: views.Views,
    *,
    unit_frames: bool,
    frames: int = video.FRAMES,
    batch_size: int = 64,
    threads: int = 1,
    where: Callable[[int], str] | None = None,
) -> dict[str, Float[np.ndarray, "N E"]]:
    """Embeddings of videos, in each view by its name; a video is read and decoded once for all.

    Args:
      model: on one device or any mesh; whole videos are spread over it.
      videos: anything that `pe_jax.data.video.Reader` takes.
      seen: how frames are turned into pixels.
      unit_frames: whether frames are brought to unit length and their mean is not, or the mean only.
      frames: of each video.
      batch_size: frames in a forward pass, over all devices and in all views; at least one video a device.
      threads: that decode one video; several videos are decoded at a time in any case.
      where: how an error calls a video that has no path, by its number.
    """

    def load(row: int) -> UInt8[np.ndarray, "V F H W 3"]:
        found = videos[row]
        name = None if where is None or isinstance(found, str | os.PathLike) else where(row)
        clip = video.sample(found, frames, threads=threads, name=name)
        return np.stack([seen.pixels(frame) for frame in clip], axis=1)

    at_once = max(1, batch_size // (frames * len(seen.names)))
    forward = _forward(seen.preprocesses[0], unit_frames)
    parts = inference.batches(model, forward, range(len(videos)), load, at_once)
    embedded = np.concatenate([np.asarray(out, np.float32)[:count] for out, count in parts])
    return {name: embedded[:, i] for i, name in enumerate(seen.names)}


@functools.cache
def _forward(preprocess: Preprocess, unit_frames: bool) -> Callable[[CLIP, jax.Array], jax.Array]:
    def forward(model: CLIP, pixels: jax.Array) -> jax.Array:
        clips = pixels.reshape(-1, *pixels.shape[2:])  # views are videos of their own
        embedded = model.encode_video(inference.normalized(clips, preprocess), normalize=unit_frames)
        return (embedded if unit_frames else unit(embedded)).reshape(*pixels.shape[:2], -1)

    return forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Videos:
    """The fields that both evaluators have."""

    data: Mapping[str, Any]
    batch_size: int = 64
    image_size: int | None = None
    resize: str | None = None
    frames: int = video.FRAMES
    threads: int = 1

    def __post_init__(self) -> None:
        views.check(self.resize)
        for name in ("batch_size", "frames", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def _embed(self, model: CLIP, rows: records.Records, unit_frames: bool) -> dict[str, np.ndarray]:
        return embed(
            model,
            rows.videos,
            views.Views.of(model, self.resize, self.image_size),
            unit_frames=unit_frames,
            frames=self.frames,
            batch_size=self.batch_size,
            threads=self.threads,
            where=rows.source.where,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoZeroShot(_Videos):
    """Evaluator `{"name": "video_zero_shot", "data": {...}, "classes": ...}` → `top1`, `top5`, `mean_recall`.

    Attributes:
      data: labelled videos, see `pe_jax.evals.records`.
      batch_size: frames in a forward pass, over all devices.
      image_size, resize: as for images, of every frame.
      frames: of each video, at equal distances over all of it.
      threads: that decode one video.
      classes, templates, labels: as for images; the templates of Kinetics are the default.
    """

    classes: str | Sequence[str]
    templates: str | Sequence[str] = "kinetics"
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        zero_shot.templates(self.templates)
        names = self.names
        if self.labels is not None and len(self.labels) != len(names):
            raise ValueError(f"labels has {len(self.labels)} entries for {len(names)} classes; give one a class.")

    @property
    def names(self) -> tuple[str, ...]:
        """What prompts call the classes, in the order of their labels."""
        return zero_shot.classes(self.classes, repeats=isinstance(self.classes, str) or self.labels is not None)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = {
            view: result.figures | {"top5": among(result.labels, result.cosines, 5)}
            for view, result in self.results(model).items()
        }
        return views.reported(found, lambda figures: figures["top1"])

    def results(self, model: inference.Model) -> dict[str, zero_shot.Result]:
        """The result in each view of the videos."""
        clip = inference.require_text(model, "zero-shot classification")
        names, rows = self.names, records.open(self.data)
        labels = rows.labels(self.labels or names)
        weights = zero_shot.classifier(clip, names, zero_shot.templates(self.templates))
        embedded = self._embed(clip, rows, unit_frames=False)
        return {view: zero_shot.Result(names, labels, own @ weights.T) for view, own in embedded.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoRetrieval(_Videos):
    """Evaluator `{"name": "video_retrieval", "data": {...}}` → `text_to_video_r1`, `video_to_text_r1`, and so on.

    Attributes:
      data: videos with one or more captions, see `pe_jax.evals.records`.
      batch_size, image_size, resize, frames, threads: as for classification.
      ks, dsl: as for images, see `pe_jax.evals.retrieval`.
    """

    ks: Sequence[int] = (1, 5, 10)
    dsl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ks", tuple(self.ks))
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be places of at least 1, like (1, 5, 10).")

    def __call__(self, model: inference.Model) -> dict[str, float]:
        clip = inference.require_text(model, "retrieval")
        rows = records.open(self.data)
        captions = rows.texts()
        texts = retrieval.embed_captions(clip, captions)
        found = {
            view: retrieval.recalls(own, texts, captions, self.ks, reweighted=self.dsl, kind="video")
            for view, own in self._embed(clip, rows, unit_frames=True).items()
        }
        figure = f"r{self.ks[0]}{'_dsl' if self.dsl else ''}"
        return views.reported(found, lambda own: own[f"video_to_text_{figure}"] + own[f"text_to_video_{figure}"])


def among(labels: Int[np.ndarray, "N"], scores: Float[np.ndarray, "N C"], k: int) -> float:
    """The share of examples whose class is among the k best; a tie, or a score that is no number, counts against."""
    own = np.take_along_axis(scores, labels[:, None], 1)
    return float((np.sum(~(scores < own), 1) <= k).mean())

"""Linear segmentation from the tokens of every layer (PE §5, Tab. 13)."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pe_jax.evals import dense_heads, inference
from pe_jax.evals.dense import Batch, DenseProbe, Probed, Progress, Work
from pe_jax.evals.dense_heads import IGNORED
from pe_jax.evals.fit import adamw


@dataclasses.dataclass(frozen=True)
class Segmentation(DenseProbe):
    """Evaluator `{"name": "segmentation", "train": {...}, "data": {...}}` → `layer_07_miou`, `layer_07_accuracy`.

    Batch norm and a 1x1 convolution on the frozen tokens of one layer, enlarged bilinearly to the labels; cross-entropy
    by AdamW, a short warmup and a linear descent to 0. mIoU is the mean over the classes that occur in `data` or are
    found in it, accuracy the share of pixels; both in [0, 1], over the pixels that count. Layer 0 is the patch
    embedding. For a vision-only model too.

    Attributes:
      train: images with masks to learn from, see `pe_jax.evals.maps`.
      data: images with masks to judge.
      classes: the masks' numbers that are classes, in any order: a list, or how many from 1 on; None takes all numbers
        that occur, but for `ignore`. Pixels of other numbers do not count.
      ignore: numbers that are no class; ADE20K's is 0.
      layers: "all", or layers as `VisionTower.features` takes them.
      image_size: pixels of a side of what the tower sees; None takes the model's own.
      window: "squash" or "slide", see `pe_jax.evals.windows`; PE does not say which it used.
      rates: peak learning rates; of several, the best one by mIoU is taken for each layer.
      epochs: passes over `train`.
      batch_size: images in an update, and in a forward pass over all devices.
      weight_decay: of AdamW.
      augment: fields of `pe_jax.data.image.Augment`; None takes images as they are.
      dropout: chance of a channel to be left out of an image.
      cache: a folder where the tokens of `train` are kept instead of passing through the tower in every epoch; needs
        `augment` None and "squash".
      cache_gb: more than that is not written there.
      seed: of the order, augmentation, dropout and heads.

    Source: PE Tab. 13 and section B.3.3 (a linear layer, AdamW at 1e-3); what it leaves open is DINOv2's (2304.07193).
    """

    epochs: float = 32  # 40,000 updates of 16 images on ADE20K's 20,210
    augment: Mapping[str, Any] | None = dataclasses.field(
        default_factory=lambda: {"crop_scale": (0.25, 1.0), "hflip": 0.5}
    )
    classes: int | Sequence[int] | None = None
    ignore: Sequence[int] = (255,)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1).")

    def run(
        self, model: inference.Model, progress: Progress = lambda stage, done, total: None, show: int = 4
    ) -> Probed:
        """Trains the heads of all layers and judges them.

        Args:
          model: on any mesh; every process calls this.
          progress: told how far it is.
          show: how many images' maps are kept for a picture.

        Raises:
          ValueError: for records without a mask of the image's size, fewer than two classes, an image size that is no
            multiple of the patch, or more to keep than allowed.
        """
        work = Work(self, model, "mask", progress)
        numbers = self._numbers(work)
        target = lookup(numbers)
        head = dense_heads.segmentation(work.width, len(numbers), work.grid, work.side, self.dropout)
        fitted, facts = work.fit(head, lambda row: target(work.train.labels(row)))
        counts = np.zeros((len(work.layers), len(self.rates), 3, len(numbers)), np.int64)
        shown: dict[int, np.ndarray] = {}

        def judge(batch: Batch) -> None:
            logits = fitted.apply(head.predict, batch.tokens)
            counts[...] += np.asarray(_counted(logits, batch.a, batch.b, batch.truth))
            work.show(show, shown, batch, lambda place: _classified(logits, batch.a, batch.b, place))

        work.judge(head, judge, lambda row: target(work.data.labels(row)), IGNORED, "segmentation")
        if not counts[0, 0, 2].sum():
            raise ValueError("no pixel of `data` counts; check `classes` and `ignore` against the masks' numbers.")
        common, said, true = (counts[:, :, i].astype(np.float64) for i in range(3))
        union = said + true - common
        with np.errstate(invalid="ignore"):
            iou = np.where(union > 0, common / union, np.nan)
        every = {"miou": np.nanmean(iou, -1), "accuracy": common.sum(-1) / true.sum(-1)}
        chosen = np.nan_to_num(every["miou"], nan=-1).argmax(1)
        facts |= {"classes": [int(number) for number in numbers]}
        facts["iou"] = [[None if np.isnan(v) else float(v) for v in iou[y, r]] for y, r in enumerate(chosen)]
        return work.probed(every, chosen, facts, shown)

    def transform(self, steps: int) -> optax.GradientTransformation:
        return _transform(steps, self.weight_decay)

    def _numbers(self, work: "Work") -> tuple[int, ...]:
        """The masks' numbers that are classes, ascending."""
        if isinstance(self.classes, int):
            found = set(range(1, self.classes + 1))
        elif self.classes is not None:
            found = set(map(int, self.classes))
        else:
            every = [(maps, row) for maps in (work.train, work.data) for row in range(len(maps))]
            with concurrent.futures.ThreadPoolExecutor(inference.THREADS) as pool:
                own = pool.map(lambda place: np.unique(place[0].labels(place[1])), every)
                found = {int(number) for numbers in own for number in numbers} - set(self.ignore)
        if len(found) < 2 or min(found) < 0:
            raise ValueError(f"the classes are {sorted(found)}; want two or more numbers of masks, none negative.")
        return tuple(sorted(found))


def lookup(numbers: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """From a mask to classes, the places of its numbers among `numbers`; others become `IGNORED`."""
    table = np.full(max(numbers) + 1, IGNORED, np.int32)
    table[list(numbers)] = np.arange(len(numbers))

    def target(labels: np.ndarray) -> np.ndarray:
        inside = (labels >= 0) & (labels < len(table))
        return np.where(inside, table[np.where(inside, labels, 0)], IGNORED)

    return target


@jax.jit
def _counted(
    logits: Float[Array, "Y R N g g C"],
    a: Float[Array, "B S H g"],
    b: Float[Array, "B S W g"],
    truth: Int[Array, "B H W"],
) -> Int[Array, "Y R 3 C"]:
    """Pixels of each class: found rightly, found, true."""
    classes = jnp.arange(logits.shape[-1])
    heads = logits.reshape(-1, *a.shape[:2], *logits.shape[3:])

    def one(image: tuple[Array, ...]) -> Array:
        maps, a, b, true = image
        found = _argmax(maps, a, b)
        counts = true != IGNORED
        own = [
            (x.reshape(-1, 1) == classes) & y.reshape(-1, 1)
            for x, y in ((true, counts & (found == true)), (found, counts), (true, counts))
        ]
        return jnp.stack([x.sum(0) for x in own])

    tallies = jax.lax.map(lambda maps: jax.lax.map(one, (maps, a, b, truth)).sum(0), heads)
    return tallies.reshape(*logits.shape[:2], 3, -1)


def _argmax(maps: Float[Array, "S g g C"], a: Float[Array, "S H g"], b: Float[Array, "S W g"]) -> Int[Array, "H W"]:
    """The class of each pixel of an image, some rows at a time: the scores of all classes are many numbers."""
    wide = jnp.einsum("swx,syxc->sywc", b, maps, precision=dense_heads.EXACT)

    def row(weights: Array) -> Array:
        return jnp.einsum("sy,sywc->wc", weights, wide, precision=dense_heads.EXACT).argmax(-1)

    return jax.lax.map(row, a.swapaxes(0, 1), batch_size=min(32, a.shape[1]))


@functools.partial(jax.jit, static_argnames="place")
def _classified(logits: Array, a: Array, b: Array, place: int) -> Int[Array, "Y R H W"]:
    heads = logits.reshape(-1, *a.shape[:2], *logits.shape[3:])[:, place]
    found = jax.lax.map(lambda maps: _argmax(maps, a[place], b[place]), heads)
    return found.reshape(*logits.shape[:2], *found.shape[1:])


@functools.lru_cache(maxsize=16)  # the same one for the same training, for which the update is compiled
def _transform(steps: int, weight_decay: float) -> optax.GradientTransformation:
    warm = min(1500, max(1, steps // 10))
    parts = optax.linear_schedule(0.0, 1.0, warm), optax.linear_schedule(1.0, 0.0, max(1, steps - warm))
    return adamw(optax.join_schedules(parts, [warm]), weight_decay)

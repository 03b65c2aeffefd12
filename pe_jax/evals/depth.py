"""Depth from the tokens of every layer (PE §3, Fig. 8; §5, Tab. 13)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pe_jax.evals import dense_heads, inference, windows
from pe_jax.evals.dense import Batch, DenseProbe, Probed, Progress, Work
from pe_jax.evals.dense_heads import FARTHEST, NEAREST
from pe_jax.evals.fit import Fitted, adamw

HEADS = ("linear", "dpt")
EIGEN = (45, 471, 41, 601)  # rows and columns of a 480 x 640 image of NYUv2 that are scored


@dataclasses.dataclass(frozen=True)
class Depth(DenseProbe):
    """Evaluator `{"name": "depth", "train": {...}, "data": {...}}` → `layer_07_rmse`, `layer_07_delta1`, `_absrel`.

    A head on the frozen tokens of one layer tells the depth of each place, by 256 bins from 0.001 to 10 m, and learns
    by the scale-invariant loss. RMSE is in metres; delta1 is the share of pixels within a factor of 1.25, AbsRel the
    mean relative error. Each is taken over the pixels of an image that have a depth in that range, then over images.
    Heads are judged after every epoch and the one with the lowest RMSE counts, as in PE. Layer 0 is the patch
    embedding.

    Attributes:
      train: images with depths to learn from, see `pe_jax.evals.maps`.
      data: images with depths to judge.
      head: "linear" or "dpt", see `pe_jax.evals.dense_heads`.
      eigen: whether only Eigen's part of NYUv2's images of 480x640 pixels is scored.
      layers: "all", or layers as `VisionTower.features` takes them.
      image_size: pixels of a side of what the tower sees; None takes the model's own.
      window: "squash" or "slide", see `pe_jax.evals.windows`; PE does not say which it used.
      rates: peak learning rates; of several, the best one by RMSE is taken for each layer. () takes 1e-3 for the linear
        head and 1e-4 for DPT.
      epochs: passes over `train`.
      batch_size: images in an update, and in a forward pass over all devices.
      weight_decay: of AdamW.
      augment: fields of `pe_jax.data.image.Augment`; None takes images as they are.
      cache: a folder where the tokens of `train` are kept instead of passing through the tower in every epoch; needs
        `augment` None and "squash".
      cache_gb: more than that is not written there.
      seed: of the order, augmentation and heads.

    Source: PE Tab. 13 and section B.3.3 (DPT on one layer, 20 epochs); what it leaves open is DINOv2's (2304.07193).
    """

    rates: Sequence[float] = ()
    weight_decay: float = 1e-2
    augment: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"hflip": 0.5})
    head: str = "dpt"
    eigen: bool = False

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is unknown; choose {' or '.join(HEADS)}.")
        if not len(self.rates):
            object.__setattr__(self, "rates", (1e-3,) if self.head == "linear" else (1e-4,))
        super().__post_init__()

    def run(
        self, model: inference.Model, progress: Progress = lambda stage, done, total: None, show: int = 4
    ) -> Probed:
        """Trains the heads of all layers and judges them after every epoch.

        Args:
          model: on any mesh; every process calls this.
          progress: told how far it is.
          show: how many images' maps are kept for a picture.

        Raises:
          ValueError: for records without a depth of the image's size, data without any valid depth, an image size that
            is no multiple of the patch, or more to keep than allowed.
        """
        work = Work(self, model, "depth", progress)
        head = (dense_heads.linear_depth if self.head == "linear" else dense_heads.dpt_depth)(
            work.width, work.grid, work.side
        )
        shape = len(work.layers), len(self.rates)
        names = ("rmse", "delta1", "absrel")
        best = {name: np.full(shape, np.inf) for name in names}
        epoch = np.zeros(shape, int)
        history: dict[int, np.ndarray] = {}
        shown: dict[int, np.ndarray] = {}

        def watch(number: int, fitted: Fitted) -> None:
            found: list[np.ndarray] = []
            maps: dict[int, np.ndarray] = {}

            def judge(batch: Batch) -> None:
                depth = fitted.apply(head.predict, batch.tokens)
                found.append(np.asarray(_errors(depth, batch.a, batch.b, batch.truth))[:, :, : batch.count])
                work.show(show, maps, batch, lambda place: _metres(depth, batch.a, batch.b, place))

            work.judge(head, judge, self._truth(work), 0.0, f"epoch {number}")
            errors = np.concatenate(found, 2)  # [Y, R, N, 4]; the last is how many pixels have a depth
            valid = errors[0, 0, :, 3] > 0
            if not valid.any():
                raise ValueError(
                    f"no pixel of `data` has a depth from {NEAREST} to {FARTHEST} m; check `units_per_metre`."
                )
            now = dict(zip(names, np.moveaxis(errors[:, :, valid, :3].mean(2), -1, 0), strict=True))
            history[number] = now["rmse"]
            better = np.nan_to_num(now["rmse"], nan=np.inf) < best["rmse"]
            for name in names:
                best[name] = np.where(better, now[name], best[name])
            epoch[better] = number
            for row, own in maps.items():
                shown[row] = np.where(better[..., None, None], own, shown.get(row, own))

        _, facts = work.fit(head, lambda row: _within(work.train.metres(row)), watch)
        chosen = best["rmse"].argmin(1)
        rows = np.arange(shape[0])
        facts |= {"head": self.head, "eigen": self.eigen, "epoch": epoch[rows, chosen].tolist()}
        facts["rmse_after"] = {number: own[rows, chosen].tolist() for number, own in history.items()}
        return work.probed(best, chosen, facts, shown)

    def _truth(self, work: "Work") -> Callable[[int], np.ndarray]:
        def truth(row: int) -> np.ndarray:
            found = _within(work.data.metres(row))
            if not self.eigen:
                return found
            if found.shape != (480, 640):
                raise ValueError(
                    f"{work.data.source.where(row)} is {found.shape[1]}x{found.shape[0]} pixels; Eigen's part is of "
                    "640x480: set eigen to false."
                )
            top, bottom, left, right = EIGEN
            out = np.zeros_like(found)
            out[top:bottom, left:right] = found[top:bottom, left:right]
            return out

        return truth

    def transform(self, steps: int) -> optax.GradientTransformation:
        return _transform(steps, self.weight_decay)


def _within(metres: np.ndarray) -> np.ndarray:
    """Depths between the nearest and the farthest that a head can tell; 0 elsewhere."""
    return np.where((metres > NEAREST) & (metres < FARTHEST), metres, np.float32(0))


@jax.jit
def _errors(
    depth: Float[Array, "Y R N g g 1"],
    a: Float[Array, "B S H g"],
    b: Float[Array, "B S W g"],
    truth: Float[Array, "B H W"],
) -> Float[Array, "Y R B 4"]:
    """RMSE, delta1 and AbsRel of each image, and how many pixels they are of."""
    heads = depth.reshape(-1, *a.shape[:2], *depth.shape[3:])

    def one(image: tuple[Array, ...]) -> Array:
        maps, a, b, true = image
        valid, found = true > 0, _depth_of(maps, a, b)
        safe, count = jnp.where(valid, true, 1), jnp.maximum(valid.sum(), 1)

        def mean(x: Array) -> Array:
            return jnp.where(valid, x, 0).sum() / count

        ratio = jnp.maximum(found / safe, safe / found)
        return jnp.stack(
            [
                jnp.sqrt(mean(jnp.square(found - safe))),
                mean(ratio < 1.25),
                mean(jnp.abs(found - safe) / safe),
                valid.sum().astype(jnp.float32),
            ]
        )

    out = jax.lax.map(lambda maps: jax.lax.map(one, (maps, a, b, truth)), heads)
    return out.reshape(*depth.shape[:2], *out.shape[1:])


def _depth_of(maps: Array, a: Array, b: Array) -> Array:
    return jnp.clip(windows.assembled(a, maps, b)[..., 0], NEAREST, FARTHEST)


@functools.partial(jax.jit, static_argnames="place")
def _metres(depth: Array, a: Array, b: Array, place: int) -> Float[Array, "Y R H W"]:
    heads = depth.reshape(-1, *a.shape[:2], *depth.shape[3:])[:, place]
    found = jax.lax.map(lambda maps: _depth_of(maps, a[place], b[place]), heads)
    return found.reshape(*depth.shape[:2], *found.shape[1:])


@functools.lru_cache(maxsize=16)  # the same one for the same training, for which the update is compiled
def _transform(steps: int, weight_decay: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps))
    return adamw(schedule, weight_decay)

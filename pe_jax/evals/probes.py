"""Nearest-neighbour probe of every layer: where in the tower the classes lie apart (PE §3).

One pass over the images gives the features of all layers. The bank (training images) is never held: the queries are,
and each keeps its nearest neighbours so far while the bank streams by. Memory is layers · queries · (width + 2·k)
floats on the host and as much on the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pe_jax.data.image import Preprocess
from pe_jax.evals import inference, records
from pe_jax.models.layers import resolve_layers

TEMPERATURE = 0.07  # of a neighbour's vote, exp(cosine / temperature); DINOv2's protocol (PE §3, Tab. 8)


@functools.cache
def layer_forward(
    preprocess: Preprocess, layers: tuple[int, ...], pool: str
) -> Callable[[inference.Model, jax.Array], jax.Array]:
    """The pass from uint8 pixels to one unit vector a layer, [Y, B, D], in a single run of the tower.

    Args:
      preprocess: how the pixels are normalised.
      layers: as `VisionTower.features` takes them.
      pool: "average" of the patch tokens, or the "class" token.
    """

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        tower = inference.vision_tower(model)
        found = tower.features(inference.normalized(pixels, preprocess), layers=layers, class_token=pool == "class")
        stacked = jnp.stack([found[layer] for layer in layers]).astype(jnp.float32)
        pooled = stacked[:, :, 0] if pool == "class" else stacked.mean(2)
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)

    return forward


Nearest = tuple[Array, Array]  # cosines and labels [Y, Q, k], best first


@jax.jit
def nearer(
    nearest: Nearest, queries: Float[Array, "Y Q D"], bank: Float[Array, "Y B D"], labels: Int[Array, "B"]
) -> Nearest:
    """The k nearest of those so far and of one more batch of the bank; a label of -1 marks a row that is none."""

    def one(layer: tuple[Array, ...]) -> Nearest:
        cosines, own, q, b = layer
        fresh = jnp.dot(q, b.T, precision=jax.lax.Precision.HIGHEST)
        fresh = jnp.where(labels >= 0, fresh, -jnp.inf)
        both = jnp.concatenate([cosines, fresh], 1)
        names = jnp.concatenate([own, jnp.broadcast_to(labels, fresh.shape)], 1)
        best, at = jax.lax.top_k(both, cosines.shape[1])  # ties: the earlier of the bank wins
        return best, jnp.take_along_axis(names, at, 1)

    return jax.lax.map(one, (*nearest, queries, bank))  # layer by layer: one [Q, k + B] table at a time


def vote(cosines: Float[np.ndarray, "Q k"], labels: Int[np.ndarray, "Q k"], temperature: float) -> Int[np.ndarray, "Q"]:
    """The class with the most weight among the neighbours, each weighing exp(cosine / temperature)."""
    weights = np.exp((cosines - cosines.max(-1, keepdims=True)) / temperature)
    same = labels[:, :, None] == labels[:, None, :]
    # Over pairs of neighbours rather than over classes: there may be thousands of those.
    totals = np.where(same, weights[:, None, :], 0).sum(-1)
    return np.take_along_axis(labels, totals.argmax(-1)[:, None], 1)[:, 0]


@dataclasses.dataclass(frozen=True)
class KNN:
    """Evaluator `{"name": "knn", "bank": {...}, "data": {...}, "classes": ...}` → accuracy of each layer.

    Figures are `layer_03_k20`, with layer 0 the patch embedding, in [0, 1]. For a vision-only model too.

    Attributes:
      bank: labelled images whose neighbours vote.
      data: labelled images to classify.
      classes: names, see `zero_shot.classes`; None takes the labels as they are, integers from 0.
      layers: "all", or layers as `VisionTower.features` takes them.
      k: how many neighbours vote; each number is a figure of its own.
      pool: "average" of the patch tokens, or the "class" token.
      temperature: of a vote.
      batch_size, image_size: as for zero-shot classification.
    """

    bank: Mapping[str, Any]
    data: Mapping[str, Any]
    classes: str | Sequence[str] | None = None
    layers: str | Sequence[int] = "all"
    k: Sequence[int] | int = (20,)  # PE leaves it open
    pool: str = "average"
    temperature: float = TEMPERATURE
    batch_size: int = 64
    image_size: int | None = None

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The numbers of neighbours, ascending as given."""
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"k={self.k} must be numbers of neighbours of at least 1, like (10, 20).")
        if self.pool not in ("average", "class"):
            raise ValueError(f"pool={self.pool!r} is unknown; choose average or class.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} must be "all" or a list of layers.')

    def __call__(self, model: inference.Model) -> dict[str, float]:
        accuracies = self.accuracies(model)
        return {f"layer_{layer:02}_k{k}": value for (layer, k), value in accuracies.items()}

    def accuracies(self, model: inference.Model) -> dict[tuple[int, int], float]:
        """{(layer, k): share of `data` classified rightly}, layers counted from 0 as resolved.

        Raises:
          ValueError: if k is above the size of the bank, or the tower lacks a class token that was asked for.
        """
        from pe_jax.evals import zero_shot

        config = inference.vision_tower(model).config
        if self.pool == "class" and not config.class_token:
            raise ValueError('this tower has no class token; take pool="average".')
        layers = (
            tuple(range(config.depth + 1))
            if self.layers == "all"
            else resolve_layers(_numbers(self.layers), config.depth)
        )
        names = None if self.classes is None else zero_shot.classes(self.classes)
        bank, data = records.open(self.bank), records.open(self.data)
        bank_labels, labels = bank.labels(names), data.labels(names)
        most = max(self.neighbours)
        if most > len(bank_labels):
            raise ValueError(f"k={most} neighbours were asked for and the bank has {len(bank_labels)} images; lower k.")
        preprocess = inference.preprocess_of(model, self.image_size)
        forward = layer_forward(preprocess, layers, self.pool)

        def passes(rows: Sequence[Any]) -> Any:
            return inference.batches(model, forward, rows, preprocess.pixels, self.batch_size)

        queries = jnp.asarray(np.concatenate([np.asarray(out)[:, :n] for out, n in passes(data.images)], 1))
        shape = (*queries.shape[:2], most)
        nearest = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
        done = 0
        for features, count in passes(bank.images):
            own = np.full(features.shape[1], -1, np.int32)
            own[:count] = bank_labels[done : done + count]
            nearest = nearer(nearest, queries, jnp.asarray(np.asarray(features)), jnp.asarray(own))
            done += count
        cosines, voters = (np.asarray(x) for x in nearest)
        return {
            (layer, k): float((vote(cosines[i, :, :k], voters[i, :, :k], self.temperature) == labels).mean())
            for i, layer in enumerate(layers)
            for k in self.neighbours
        }


def _numbers(layers: str | Sequence[int]) -> Sequence[int]:
    if isinstance(layers, str):
        raise ValueError(f'layers={layers!r} must be "all" or a list of layers.')
    return layers

"""From a loss over a module to gradients over its parameters' plain dict."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pe_jax.sharding import constrain
from pe_jax.types import Batch, Key, Metrics, Params, split

# (model, batch, key) → embeddings with examples in front, a mean over the batch's examples to add to the loss, metrics
Embed = Callable[[Any, Batch, Key], tuple[Batch, jax.Array, Metrics]]
# (model, batch, key) → a mean over what the batch holds, metrics that are means of the same kind
Loss = Callable[[Any, Batch, Key], tuple[jax.Array, Metrics]]


def whole(
    loss: Loss,
    model: nnx.Module,
    batch: Batch,
    key: Key,
) -> tuple[Params, Metrics]:
    """The gradient of `loss(model, batch, key)` in one pass over the whole batch.

    Returns:
      Gradients, a nested dict like the model's parameters, and the loss's metrics with `loss` itself among them.
    """
    graphdef, params = split(model)

    def of_params(params: Params) -> tuple[jax.Array, Metrics]:
        return loss(nnx.merge(graphdef, params), batch, key)

    (value, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(params)
    return grads, {"loss": value} | metrics


def cached(
    embed: Embed,
    loss: Callable[[Any, Batch], tuple[jax.Array, Metrics]],
    model: nnx.Module,
    batch: Batch,
    key: Key,
    microbatches: int = 1,
    embeddings_alone: Callable[[Any, Batch, Key], Batch] | None = None,
) -> tuple[Params, Metrics]:
    """The exact gradient of a loss that couples the whole batch, with activations of one micro-batch at a time.

    Embeds every micro-batch and keeps the embeddings alone; takes the loss's gradient by the embeddings of the whole
    batch; then embeds every micro-batch again, with the same randomness, and carries that gradient on into the
    parameters. It costs one forward pass more. With one micro-batch it is a single ordinary pass.

    Args:
      embed: (model, micro-batch, key) → (embeddings, penalty, metrics). The embeddings are a dict of arrays [b, ...];
        the penalty, a mean over examples, is added to the loss averaged over micro-batches, and so are the metrics.
      loss: (model, embeddings of the whole batch, rows in the batch's order) → (loss, metrics).
      microbatches: how many; each holds every `microbatches`-th example, so that no example changes its device.
      embeddings_alone: what gives the same embeddings as `embed` for less, where the penalty is dear.

    Returns:
      As `whole`.

    Raises:
      ValueError: if the batch is not a multiple of `microbatches`.

    Source: GradCache (arXiv:2101.06983).
    """
    if microbatches == 1:

        def at_once(model: Any, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
            embeddings, penalty, metrics = embed(model, batch, key)
            value, more = loss(model, embeddings)
            return value + penalty, metrics | more

        return whole(at_once, model, batch, key)
    graphdef, params = split(model)
    parts = _parts(batch, key, microbatches)

    def embeddings_of(_: None, part: tuple[Batch, Key]) -> tuple[None, Batch]:
        model = nnx.merge(graphdef, params)
        return None, embeddings_alone(model, *part) if embeddings_alone else embed(model, *part)[0]

    def whole_loss(params: Params, embeddings: Batch) -> tuple[jax.Array, Metrics]:
        return loss(nnx.merge(graphdef, params), {name: _joined(x) for name, x in embeddings.items()})

    _, embeddings = lax.scan(embeddings_of, None, parts)
    (value, metrics), (grads, by_embedding) = jax.value_and_grad(whole_loss, (0, 1), has_aux=True)(params, embeddings)

    def carry_on(grads: Params, part: tuple[tuple[Batch, Key], Batch]) -> tuple[Params, tuple[jax.Array, Metrics]]:
        inputs, by_embedding = part

        def scalar(params: Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            embeddings, penalty, metrics = embed(nnx.merge(graphdef, params), *inputs)
            pulled = sum(jnp.vdot(by_embedding[name], x) for name, x in embeddings.items())
            return pulled + penalty / microbatches, (penalty, metrics)

        more, aux = jax.grad(scalar, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, more), aux

    grads, aux = lax.scan(carry_on, grads, (parts, by_embedding))
    penalty, more = jax.tree.map(lambda x: x.mean(0), aux)
    return grads, {"loss": value + penalty} | more | metrics


def averaged(
    loss: Loss,
    model: nnx.Module,
    batch: Batch,
    key: Key,
    microbatches: int = 1,
    trainable: Callable[[str], bool] | None = None,
    weights: Callable[[Batch], jax.Array] | None = None,
) -> tuple[Params, Metrics]:
    """The gradient of a loss that is a mean over what a batch holds, with activations of one micro-batch at a time.

    It is the gradient of the whole batch's mean, however many micro-batches there are: where they hold unequal amounts,
    such as tokens that are asked for, `weights` says how much each holds.

    Args:
      loss: (model, micro-batch, key) → (mean, metrics), 0 for a micro-batch that holds nothing.
      microbatches: how many; each holds every `microbatches`-th example, so that no example changes its device.
      trainable: "path/of/it" → whether the gradient by a parameter is wanted; by the rest it is 0, and nothing is
        computed for it. Default: all.
      weights: micro-batch → [] how much its mean counts; the metrics are weighted alike. None: all count the same.

    Returns:
      As `whole`.

    Raises:
      ValueError: if the batch is not a multiple of `microbatches`.
    """
    graphdef, params = split(model)

    def is_wanted(keys: Any, _: Any) -> bool:
        return trainable is None or trainable(jax.tree_util.keystr(keys, simple=True, separator="/"))

    wanted = jax.tree_util.tree_map_with_path(is_wanted, params)
    # None is a tree without leaves, so that differentiation does not see what stays as it is.
    moving = jax.tree.map(lambda leaf, moves: leaf if moves else None, params, wanted)

    def joined(moving: Params, rest: Params) -> Params:
        return jax.tree.map(lambda a, b: b if a is None else a, moving, rest, is_leaf=lambda leaf: leaf is None)

    def of(moving: Params, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        return loss(nnx.merge(graphdef, joined(moving, params)), batch, key)

    if microbatches == 1:
        (value, metrics), grads = jax.value_and_grad(of, has_aux=True)(moving, batch, key)
        return joined(grads, jax.tree.map(jnp.zeros_like, params)), {"loss": value} | metrics
    parts = _parts(batch, key, microbatches)
    held = jnp.ones(microbatches) if weights is None else jax.vmap(weights)(parts[0]).astype(jnp.float32)
    shares = held / jnp.maximum(jnp.sum(held), jnp.finfo(jnp.float32).tiny)

    def add(grads: Params, part: tuple[tuple[Batch, Key], jax.Array]) -> tuple[Params, tuple[jax.Array, Metrics]]:
        inputs, share = part

        def scalar(moving: Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            value, metrics = of(moving, *inputs)
            return share * value, (value, metrics)

        more, told = jax.grad(scalar, has_aux=True)(moving)
        return jax.tree.map(jnp.add, grads, more), told

    grads, told = lax.scan(add, jax.tree.map(jnp.zeros_like, moving), (parts, shares))
    value, metrics = jax.tree.map(lambda x: jnp.sum(shares * x), told)
    return joined(grads, jax.tree.map(jnp.zeros_like, params)), {"loss": value} | metrics


def _parts(batch: Batch, key: Key, parts: int) -> tuple[Batch, jax.Array]:
    """Micro-batches and their keys, one behind the other along a first axis."""
    for name, x in batch.items():
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} ({name}) does not cut into {parts} micro-batches alike.")
    return {name: _cut(x, parts) for name, x in batch.items()}, jax.random.split(key, parts)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] → [parts, B/parts, ...], part j holding rows j, j + parts, ...: each device's rows stay its own."""
    return constrain(jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), None, "batch")


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    return constrain(jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), "batch")

"""From a loss over a module to gradients over its parameters' plain dict."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from pe_jax.types import Batch, Key, Metrics, Params, split


def whole(
    loss: Callable[[Any, Batch, Key], tuple[jax.Array, Metrics]],
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

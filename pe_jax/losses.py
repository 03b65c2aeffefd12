"""Losses as pure functions of arrays; they know no model and hold float32 throughout."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pe_jax.sharding import constrain
from pe_jax.types import Metrics

MAX_LOG_SCALE = math.log(100)  # the cap on the logit scale, PE Tab. 18


def info_nce(
    image: Float[Array, "B E"], text: Float[Array, "B E"], log_scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric contrastive loss between images and their captions, over the global batch.

    Under a mesh each device holds the rows of its own images and all columns: B²/devices logits.

    Args:
      image: [B, E] unit-norm image or video embeddings.
      text: [B, E] unit-norm text embeddings; row i describes image i.
      log_scale: [] log of the inverse temperature, dimensionless.

    Returns:
      The loss [] in nats, log B when the embeddings carry no information; and its metrics: `accuracy`, the share of
      images whose own caption scores highest in the batch, in [0, 1].

    Raises:
      ValueError: if the two are not [B, E] alike.

    Source: CLIP (arXiv:2103.00020, §2.3), used in PE §2.1.
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image embeddings {image.shape} and text embeddings {text.shape} must both be [B, E].")
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    logits = jnp.exp(log_scale) * jnp.dot(image, text.T, precision=jax.lax.Precision.HIGHEST)
    logits = constrain(logits, "batch", None)
    matched = jnp.diagonal(logits)
    over_texts = jax.nn.logsumexp(logits, axis=1)
    over_images = jax.nn.logsumexp(logits, axis=0)
    loss = jnp.mean((over_texts + over_images) / 2 - matched)
    return loss, {"accuracy": jnp.mean(matched >= logits.max(axis=1))}

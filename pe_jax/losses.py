"""Losses as pure functions of arrays; they know no model and sum in float32 throughout."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pe_jax.sharding import batch_axes, constrain
from pe_jax.types import Metrics

MAX_LOG_SCALE = math.log(100)  # the cap on the logit scale, PE Tab. 18


def info_nce(
    image: Float[Array, "B E"], text: Float[Array, "T E"], log_scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric contrastive loss between images and their captions, over the global batch.

    Under a mesh each device holds the rows of its own images and all columns: B²/devices logits.

    Args:
      image: [B, E] unit-norm image or video embeddings.
      text: [B, E] unit-norm text embeddings, as many; row i describes image i.
      log_scale: [] log of the inverse temperature, dimensionless.

    Returns:
      The loss [] in nats, log B when the embeddings carry no information; and its metrics: `accuracy`, the share of
      images whose own caption scores highest in the batch, in [0, 1].

    Raises:
      ValueError: if the two are not [B, E] alike.

    Source: CLIP (arXiv:2103.00020, §2.3), used in PE §2.1.
    """
    _check_pairs(image, text)
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    logits = jnp.exp(log_scale) * jnp.dot(image, text.T, precision=jax.lax.Precision.HIGHEST)
    logits = constrain(logits, "batch", None)
    matched = jnp.diagonal(logits)
    over_texts = jax.nn.logsumexp(logits, axis=1)
    over_images = jax.nn.logsumexp(logits, axis=0)
    loss = jnp.mean((over_texts + over_images) / 2 - matched)
    return loss, {"accuracy": jnp.mean(matched >= logits.max(axis=1))}


def info_nce_chunked(
    image: Float[Array, "B E"],
    text: Float[Array, "T E"],
    log_scale: Float[Array, ""],
    *,
    chunk: int = 1024,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, ""], Metrics]:
    """`info_nce` in memory that grows with the local batch times `chunk`, not with the global batch squared.

    Under a mesh each device gathers all texts and goes through them a chunk at a time: the same [local B, chunk] logits
    serve its own rows, by a running sum of exponentials, and the chunk's columns, by a sum over the devices. The
    backward pass computes each chunk's logits anew instead of keeping them.

    Args:
      image, text, log_scale: as in `info_nce`.
      chunk: texts at a time; it need not divide B.
      dtype: of the embeddings that are gathered and multiplied, and in which their gradients cross devices; sums are
        float32. bfloat16 halves the traffic, as the towers compute in it anyway.

    Returns:
      As `info_nce`.

    Raises:
      ValueError: if the two are not [B, E] alike, or `chunk` is not positive.

    Source: PE §2.1 trains with a global batch of 131,072; the paper does not say how its loss is held.
    """
    _check_pairs(image, text)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1; it is how many texts are compared at a time.")
    axes = batch_axes()
    local = functools.partial(_local_info_nce, axes=axes, chunk=chunk, dtype=dtype)
    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()
        local = jax.shard_map(local, in_specs=(rows, rows, whole), out_specs=(whole, whole))
    loss, accuracy = local(image, text, log_scale)
    return loss, {"accuracy": accuracy}


def _local_info_nce(image: Array, text: Array, log_scale: Array, *, axes: tuple[str, ...], chunk: int, dtype: Any):
    """One device's part; `image` and `text` are its own rows. Without axes it is the only device."""
    own, scale = image.shape[0], jnp.exp(log_scale)
    image, text = image.astype(dtype), text.astype(dtype)
    texts = lax.all_gather(text, axes, tiled=True) if axes else text
    first = lax.axis_index(axes) * own if axes else 0
    place = first + jnp.arange(own)  # of each row's own text among all

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: tuple[Array, Array, Array], part: tuple[Array, Array]) -> tuple[Any, Array]:
        top, total, rival = carry
        columns, at = part
        dot = jnp.dot(image, columns.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        logits = scale * dot  # [own, chunk]
        fixed = lax.stop_gradient(logits)  # maxima only keep the exponentials in range
        higher = jnp.maximum(top, fixed.max(1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        peak = _over(lax.pmax, fixed.max(0), axes)
        over_images = peak + jnp.log(_over(lax.psum, jnp.exp(logits - peak).sum(0), axes))
        others = jnp.where(at + jnp.arange(len(columns)) == place[:, None], -jnp.inf, fixed)
        return (higher, total, jnp.maximum(rival, others.max(1))), over_images.sum()

    size = min(chunk, len(texts))
    even = len(texts) // size * size
    start = (jnp.full(own, -jnp.inf), jnp.zeros(own), jnp.full(own, -jnp.inf))
    carry = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying") if axes else x, start)
    carry, over_images = lax.scan(
        step, carry, (texts[:even].reshape(-1, size, texts.shape[1]), jnp.arange(0, even, size))
    )
    columns = over_images.sum()
    if even < len(texts):
        carry, rest = step(carry, (texts[even:], jnp.asarray(even)))
        columns += rest
    top, total, rival = carry
    matched = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), 1)
    rows = _over(lax.psum, jnp.sum((top + jnp.log(total)) / 2 - matched), axes)
    right = _over(lax.psum, jnp.sum(matched >= rival), axes)
    return (rows + columns / 2) / len(texts), right / len(texts)


def _over(reduce: Any, x: Array, axes: tuple[str, ...]) -> Array:
    return reduce(x, axes) if axes else x


def _check_pairs(image: Array, text: Array) -> None:
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image embeddings {image.shape} and text embeddings {text.shape} must both be [B, E].")

"""Losses as pure functions of arrays; they know no model and sum in float32 throughout."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pe_jax import sharding
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


def _names(part: Any) -> tuple[str, ...]:
    """The mesh axes of one part of a partition."""
    return part if isinstance(part, tuple) else (part,) if part else ()


def _over(reduce: Any, x: Array, axes: tuple[str, ...]) -> Array:
    return reduce(x, axes) if axes else x


def next_token(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V _"],
    targets: Int[Array, "_ _"],
    weights: Float[Array, "_ _"],
    *,
    chunk: int = 1024,
    gradient_dtype: Any = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the token after each, over a vocabulary too large for the logits of all tokens.

    Each device scores `chunk` of its own tokens at a time against the vocabulary, or its part of it where the mesh
    cuts that, so that it holds [chunk, V] logits, whatever B and L are. The gradients are found in the same pass, so
    that nothing is computed twice; where only some are asked for, only those are.

    Args:
      hidden: [B, L, D] last hidden states, normalised; multiplied in their dtype, summed in float32.
      table: [V, D] the output layer, or the embedding where it is tied; float32, cut as `param_shardings` says.
      targets: [B, L] the token that follows each, an id below V wherever its weight is not 0.
      weights: [B, L] of each token in the loss; 0 masks it, in the gradient too.
      chunk: tokens of a device at a time; it need not divide them.
      gradient_dtype: in which the table's gradient is summed over devices; None is the dtype of `hidden`.

    Returns:
      The mean loss [] in nats a token, weighted: that of several batches is the mean weighted by their `tokens`. And
      its metrics: `tokens`, the sum of the weights; `accuracy`, the weighted share of likeliest tokens that are the
      targets. Where all weights are 0 the loss and its gradients are 0.

    Raises:
      ValueError: if the shapes do not agree, or `chunk` is not positive.

    Source: PE §5 and PLM §A.1 (float32, answers alone); the paper does not say how its logits are held.
    """
    if not hidden.shape[:2] == targets.shape == weights.shape or hidden.shape[2] != table.shape[1]:
        raise ValueError(
            f"hidden {hidden.shape}, targets {targets.shape}, weights {weights.shape} and table {table.shape} must be "
            "[B, L, D], [B, L], [B, L] and [V, D]."
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1; it is how many tokens are scored at a time.")
    weights = weights.astype(jnp.float32)
    total = jnp.sum(weights)
    # Scaled before the pass, so that the gradients it finds are those of the mean.
    scaled = weights / jnp.where(total > 0, total, 1)
    scores: Any = _next_token(hidden, table, targets, scaled, chunk, jnp.dtype(gradient_dtype or hidden.dtype))
    return scores[0], {"tokens": total, "accuracy": scores[1]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _next_token(
    hidden: Array, table: Array, targets: Array, weights: Array, chunk: int, gradient_dtype: Any
) -> tuple[Array, Array]:
    return _score(hidden, table, targets, weights, chunk, gradient_dtype, (False, False))[0]


def _next_token_forward(hidden: Any, table: Any, targets: Any, weights: Any, chunk: int, gradient_dtype: Any) -> Any:
    wanted = hidden.perturbed, table.perturbed
    return _score(hidden.value, table.value, targets.value, weights.value, chunk, gradient_dtype, wanted)


def _next_token_backward(chunk: int, gradient_dtype: Any, kept: tuple[Any, Any], by_outputs: Any) -> Any:
    by_loss = by_outputs[0]
    if isinstance(by_loss, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    return *(None if g is None else (by_loss * g).astype(g.dtype) for g in kept), None, None


_next_token.defvjp(_next_token_forward, _next_token_backward, symbolic_zeros=True)


def _score(
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    gradient_dtype: Any,
    wanted: tuple[bool, bool],
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """Loss and accuracy; and the gradients of the loss by `hidden` and `table`, where wanted."""
    whole = sharding.gathered(table, "vocab", "embed", dtype=hidden.dtype)
    local = functools.partial(_local_next_token, chunk=chunk, gradient_dtype=gradient_dtype, wanted=wanted)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        sums, (by_hidden, by_table) = local(hidden, whole, targets, weights)
    else:
        rows, parts = sharding.spec(mesh, "batch"), sharding.spec(mesh, "vocab")
        cut = sharding.spec(mesh, "vocab", "embed")
        sums, (by_hidden, by_table) = jax.shard_map(
            functools.partial(local, axes=batch_axes(), vocabulary=_names(cut[0]), scattered=_names(cut[1])),
            in_specs=(rows, parts, rows, rows),
            out_specs=((PartitionSpec(), PartitionSpec()), (rows if wanted[0] else None, cut if wanted[1] else None)),
            check_vma=False,
        )(hidden, whole, targets, weights)
    return sums, (by_hidden, None if by_table is None else by_table.astype(table.dtype))


def _local_next_token(
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int,
    gradient_dtype: Any,
    wanted: tuple[bool, bool],
    axes: tuple[str, ...] = (),
    vocabulary: tuple[str, ...] = (),
    scattered: tuple[str, ...] = (),
) -> Any:
    """One device's part: its own rows, and its part of the vocabulary. Without axes it is the only device.

    Args:
      axes: over which examples are cut.
      vocabulary: over which the vocabulary is.
      scattered: of `axes`, that over which the gradient by the table is cut along the width.
    """
    size, width = table.shape
    first = lax.axis_index(vocabulary) * size if vocabulary else 0
    precision = lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    tokens = hidden.shape[0] * hidden.shape[1]
    chunk = min(chunk, tokens)

    def cut(x: Array, *rest: int) -> Array:
        x = x.reshape(tokens, *rest)
        return jnp.pad(x, [(0, -tokens % chunk)] + [(0, 0)] * len(rest)).reshape(-1, chunk, *rest)

    def step(carry: tuple[Array, Array, Any], part: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        loss, right, by_table = carry
        x, target, weight = part
        logits = dot(x, table, (((1,), (1,)), ((), ())))  # [chunk, V]
        top = _over(lax.pmax, jnp.max(logits, 1), vocabulary)
        exponentials = jnp.exp(logits - top[:, None])
        sums = _over(lax.psum, jnp.sum(exponentials, 1), vocabulary)
        is_target = target[:, None] == first + jnp.arange(size)
        matched = _over(lax.psum, jnp.sum(jnp.where(is_target, logits, 0), 1), vocabulary)
        loss += jnp.sum(jnp.where(weight != 0, weight * (top + jnp.log(sums) - matched), 0))
        right += jnp.sum(jnp.where(matched >= top, weight, 0))
        by_x = None
        if any(wanted):
            by_logits = (weight / sums)[:, None] * exponentials - jnp.where(is_target, weight[:, None], 0)
            by_logits = by_logits.astype(table.dtype)
            if wanted[0]:
                by_x = _over(lax.psum, dot(by_logits, table, (((1,), (0,)), ((), ()))), vocabulary).astype(x.dtype)
            if wanted[1]:
                by_table += dot(by_logits, x, (((0,), (0,)), ((), ())))
        return (loss, right, by_table), by_x

    zero = jnp.zeros((), jnp.float32)
    start = zero, zero, jnp.zeros((size, width), jnp.float32) if wanted[1] else None
    (loss, right, by_table), by_hidden = lax.scan(step, start, (cut(hidden, width), cut(targets), cut(weights)))
    if by_hidden is not None:
        by_hidden = by_hidden.reshape(-1, width)[:tokens].reshape(hidden.shape)
    if by_table is not None:
        by_table = by_table.astype(gradient_dtype)
        if scattered:
            by_table = lax.psum_scatter(by_table, scattered, scatter_dimension=1, tiled=True)
        by_table = _over(lax.psum, by_table, tuple(axis for axis in axes if axis not in scattered))
    return (_over(lax.psum, loss, axes), _over(lax.psum, right, axes)), (by_hidden, by_table)


def token_cosine(student: Float[Array, "B N D"], teacher: Float[Array, "_ _ _"]) -> Float[Array, "B"]:
    """Direct distillation: minus the cosine between each token and the teacher's at its place, mean over all tokens.

    Args:
      student: [B, N, D] tokens, of any length.
      teacher: [B, N, D] tokens to be like; no gradient reaches them.

    Returns:
      The loss [B] of each image in [-1, 1]; -1 where all tokens point the teacher's way.

    Raises:
      ValueError: if the shapes differ.

    Source: PE §5, its appendix's L_core.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student tokens {student.shape} and teacher tokens {teacher.shape} must both be [B, N, D].")
    return -jnp.mean(jnp.sum(_directions(student) * lax.stop_gradient(_directions(teacher)), -1), 1)


def token_pairs(
    student: Float[Array, "B N _"],
    teacher: Float[Array, "_ _ _"],
    *,
    temperature: float | None = None,
    chunk: int = 256,
) -> Float[Array, "B"]:
    """Pairwise distillation: the cosines of all pairs of an image's tokens are drawn to those the teacher has.

    The mean over N² pairs (i, j) of (Y - X')², Y the student's cosine of tokens i and j, X the teacher's,
    and X' = exp(temperature · (X - 1)), or X itself. Widths need not agree, and what turns or stretches all tokens
    alike changes nothing.

    Of the N x N tables of an image no more than `chunk` rows exist at a time. The gradient is found in the same pass:
    both tables are symmetric, so by token i it is 4/N² Σ_j (Y - X')_ij · token j, and needs row i alone.

    Args:
      student: [B, N, D] tokens; multiplied in their dtype, summed in float32.
      teacher: [B, N, T] a vector for each token's place; no gradient reaches it.
      temperature: t, 20 for the mask logits of SAM; None compares the plain cosines.
      chunk: tokens of an image at a time, 4·chunk·N bytes an image; it need not divide N.

    Returns:
      The loss [B] of each image.

    Raises:
      ValueError: if the numbers of images or tokens differ, or `chunk` or `temperature` is not positive.

    Source: PE §5, its appendix's L_loc; the paper does not say how its tables are held.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"student tokens {student.shape} and teacher vectors {teacher.shape} must agree in [B, N].")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1; it is how many tokens are compared at a time.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; None compares the plain cosines.")
    own = _directions(student).astype(student.dtype)
    theirs = lax.stop_gradient(_directions(teacher).astype(teacher.dtype))
    loss: Any = _token_pairs(own, theirs, temperature, min(chunk, student.shape[1]))
    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _token_pairs(student: Array, teacher: Array, temperature: float | None, chunk: int) -> Array:
    return _compare_pairs(student, teacher, temperature, chunk, wanted=False)[0]


def _token_pairs_forward(student: Array, teacher: Array, temperature: float | None, chunk: int) -> Any:
    return _compare_pairs(student, teacher, temperature, chunk, wanted=True)


def _token_pairs_backward(temperature: float | None, chunk: int, by_student: Array, by_loss: Array) -> Any:
    return (by_loss[:, None, None] * by_student).astype(by_student.dtype), None


_token_pairs.defvjp(_token_pairs_forward, _token_pairs_backward)


def _compare_pairs(
    student: Array, teacher: Array, temperature: float | None, chunk: int, *, wanted: bool
) -> tuple[Array, Array | None]:
    """The loss of each image, and its gradient by the student's unit tokens where wanted."""
    images, tokens = student.shape[:2]

    def cut(x: Array) -> Array:
        """[B, N, D] → [steps, B, chunk, D], zero rows after the last."""
        x = jnp.pad(x, ((0, 0), (0, -tokens % chunk), (0, 0)))
        return constrain(jnp.swapaxes(x.reshape(images, -1, chunk, x.shape[-1]), 0, 1), None, "batch")

    def cosines(rows: Array, all: Array) -> Array:
        exact = lax.Precision.HIGHEST if all.dtype == jnp.float32 else None
        return jnp.einsum("bid,bjd->bij", rows, all, precision=exact, preferred_element_type=jnp.float32)

    def step(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        own, theirs, first = part
        wished = cosines(theirs, teacher)
        if temperature is not None:
            wished = jnp.exp(temperature * (wished - 1))
        real = (first + jnp.arange(chunk) < tokens)[:, None]
        off = jnp.where(real, cosines(own, student) - wished, 0)  # [B, chunk, N]
        total += jnp.sum(off * off, (1, 2))
        if not wanted:
            return total, None
        off = off.astype(student.dtype)
        exact = lax.Precision.HIGHEST if student.dtype == jnp.float32 else None
        by_own = jnp.einsum("bij,bjd->bid", off, student, precision=exact, preferred_element_type=jnp.float32)
        return total, (by_own * (4 / tokens**2)).astype(student.dtype)

    starts = jnp.arange(0, tokens, chunk)
    empty = constrain(jnp.zeros(images, jnp.float32), "batch")
    total, by_rows = lax.scan(step, empty, (cut(student), cut(teacher), starts))
    loss = total / tokens**2
    if by_rows is None:
        return loss, None
    by_student = jnp.swapaxes(by_rows, 0, 1).reshape(images, -1, student.shape[-1])[:, :tokens]
    return loss, constrain(by_student, "batch")


def _directions(tokens: Array) -> Array:
    """Tokens [B, N, D] brought to unit length, in float32; a zero token stays zero."""
    x = tokens.astype(jnp.float32)
    # The square is floored, not the length: the square root's gradient at 0 is infinite.
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def _check_pairs(image: Array, text: Array) -> None:
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image embeddings {image.shape} and text embeddings {text.shape} must both be [B, E].")

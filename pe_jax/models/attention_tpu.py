"""Attention as one TPU kernel for the rows PE has: a whole row of logits lies in the core's own memory (PE §2.1).

Images are 49 to 1,025 tokens, texts 32 or 72, so nothing need be streamed past a running maximum as in flash attention.
The kernel reads q, k and v where the fused projection left them, turns q and k by their rotary angles, and writes heads
side by side as the output projection reads them: no transposed copy, no logits and no statistics in HBM. Its backward
pass reads the same projection and computes the rows anew.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128  # of a vector register: a block's last axis is a multiple of it
QUERY_ROWS = 256  # at a time: their logits, and what becomes of them, lie in the core's memory together
BLOCK_BYTES = 1 << 18  # of one of q, k, v in the core's memory: heads are taken together up to this
VMEM_BYTES = 96 << 20

Rope: TypeAlias = tuple[np.ndarray, np.ndarray]


def heads_at_once(heads: int, head_dim: int, tokens: int, itemsize: int) -> int | None:
    """How many heads a block holds; None where the blocks would not fit the core, and XLA's attention must do."""
    # A block of all heads may be of any width; one of some heads must be cut between registers.
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (n * head_dim % LANES == 0 or n == heads)]
    small = [n for n in fitting if n * head_dim * tokens * itemsize <= BLOCK_BYTES]
    chosen = max(small) if small else min(fitting)
    return chosen if chosen * head_dim * tokens * itemsize <= 16 * BLOCK_BYTES else None


def fits(device_kind: str, heads: int, head_dim: int, tokens: int, itemsize: int) -> bool:
    """Whether the kernel can be compiled for these rows: v4's cores have 16 MiB, all later ones 64 and more."""
    small = device_kind == "TPU v4" and tokens > 256
    return not small and heads_at_once(heads, head_dim, tokens, itemsize) is not None


@functools.partial(jax.custom_vjp, nondiff_argnames=("head_dim", "rope", "causal", "interpret"))
def attention(
    qkv: Float[Array, "B N KPH"], head_dim: int, rope: "Tables | None", causal: bool, interpret: bool
) -> Float[Array, "B N KH"]:
    """softmax(q·kᵀ/√H)·v for queries and keys of the same tokens, on one device.

    Args:
      qkv: [B, N, K·3·H] as projected: head by head its q, k and v, not yet turned.
      head_dim: H.
      rope: the angles of q and k, or None to leave them.
      causal: whether tokens see only themselves and earlier ones.
      interpret: run the kernel's steps by XLA, on any device; to check it.

    Returns:
      [B, N, K·H], head by head.

    Raises:
      ValueError: if the blocks would not fit the core (`heads_at_once`).
    """
    return _forward(qkv, head_dim, rope, causal, interpret)[0]


class Tables:
    """The angles of `rope_2d` as a static argument, compared by content."""

    def __init__(self, rope: Rope):
        self.cos, self.sin = rope
        self._key = self.cos.tobytes(), self.sin.tobytes()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self._key == other._key

    def over(self, heads: int) -> list[jax.Array]:
        """For the lanes of some heads, [N, heads·3·H]: cos, and sin where a channel takes from its right and from its
        left neighbour. The v of each head stays as it is."""
        even, ones, zeros = np.arange(self.cos.shape[1]) % 2 == 0, np.ones_like(self.cos), np.zeros_like(self.cos)
        of_head = (
            (self.cos, self.cos, ones),
            (*[np.where(even, -self.sin, 0)] * 2, zeros),
            (*[np.where(even, 0, self.sin)] * 2, zeros),
        )
        return [jnp.asarray(np.tile(np.concatenate(parts, 1), (1, heads)).astype(np.float32)) for parts in of_head]


def _forward(qkv: Array, head_dim: int, rope: Tables | None, causal: bool, interpret: bool) -> tuple[Array, Array]:
    return _call(_forward_kernel, [qkv], head_dim, rope, causal, interpret), qkv


def _backward(
    head_dim: int, rope: Tables | None, causal: bool, interpret: bool, qkv: Array, by_out: Array
) -> tuple[Array]:
    return (_call(_backward_kernel, [qkv, by_out], head_dim, rope, causal, interpret),)


attention.defvjp(_forward, _backward)


def _call(kernel: Any, arrays: list[Array], head_dim: int, rope: Tables | None, causal: bool, interpret: bool) -> Array:
    """Runs a kernel over the grid (example, group of heads), each step with its block of every array."""
    batch, tokens, width = arrays[0].shape
    heads, size, backward = width // (3 * head_dim), arrays[0].dtype.itemsize, len(arrays) > 1
    at_once = heads_at_once(heads, head_dim, tokens, size)
    if at_once is None:
        raise ValueError(f"{tokens} tokens of {heads} heads do not fit the core's memory; use attention='xla'.")

    def block(parts: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, at_once * parts * head_dim), lambda example, group: (example, 0, group))

    tables = rope.over(at_once) if rope else []
    pairs, parts = batch * heads * tokens**2, 3 if backward else 1
    return pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim, rope=bool(tables), causal=causal),
        grid=(batch, heads // at_once),
        in_specs=[
            *(block(x.shape[2] // (heads * head_dim)) for x in arrays),
            *[pl.BlockSpec((tokens, at_once * 3 * head_dim), lambda example, group: (0, 0))] * len(tables),
        ],
        out_specs=block(parts),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, heads * parts * head_dim), arrays[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * head_dim * (5 if backward else 2),
            transcendentals=pairs,
            bytes_accessed=(7 if backward else 4) * batch * tokens * heads * head_dim * size,
        ),
        interpret=interpret,
        name=f"attention_{'backward' if backward else 'forward'}_h{head_dim}",
    )(*arrays, *tables)


def _forward_kernel(*refs: Any, head_dim: int, rope: bool, causal: bool) -> None:
    turned, _, (out,) = _loaded(refs, 1, rope)
    for head in range(turned.shape[1] // (3 * head_dim)):
        q, k, v = _of_head(turned, head, head_dim)
        for rows in _chunks(q):
            weights, total = _weights(q[rows], k, rows.start, causal)
            mean = _dot(weights.astype(v.dtype), v) / total
            out[0, rows, head * head_dim : (head + 1) * head_dim] = mean.astype(out.dtype)


def _backward_kernel(*refs: Any, head_dim: int, rope: bool, causal: bool) -> None:
    turned, back, (by_out, out) = _loaded(refs, 2, rope)
    by_turned = []
    for head in range(turned.shape[1] // (3 * head_dim)):
        q, k, v = _of_head(turned, head, head_dim)
        by_mean = by_out[0, :, head * head_dim : (head + 1) * head_dim]
        by_q, by_k, by_v = [], 0.0, 0.0
        for rows in _chunks(q):
            weights, total = _weights(q[rows], k, rows.start, causal)
            weights = weights / total
            by_v += _dot_over_rows(weights.astype(q.dtype), by_mean[rows])
            by_weights = _dot_transposed(by_mean[rows], v)
            # The softmax's gradient: what is common to a row cancels.
            by_logits = weights * (by_weights - jnp.sum(weights * by_weights, 1, keepdims=True))
            by_logits = (by_logits * head_dim**-0.5).astype(q.dtype)
            by_q.append(_dot(by_logits, k))
            by_k += _dot_over_rows(by_logits, q[rows])
        by_turned += [jnp.concatenate(by_q, 0), by_k, by_v]
    out[0] = back(jnp.concatenate(by_turned, 1)).astype(out.dtype)


def _loaded(refs: Any, arrays: int, rope: bool) -> tuple[Array, Any, Any]:
    """The projection's block with q and k turned; how to turn float32 back; and the other arrays' references."""
    qkv, others = refs[0][0], (*refs[1:arrays], *refs[arrays + 3 * rope :])
    if not rope:
        return qkv, lambda x: x, others
    cos, from_right, from_left = (ref[...] for ref in refs[arrays : arrays + 3])

    def turn(f: Array, direction: int) -> Array:
        """`layers.rotate` by the lanes' own rotation; the transposed turns back."""
        right, left = pltpu.roll(f, f.shape[1] - 1, 1), pltpu.roll(f, 1, 1)
        return f * cos + direction * (right * from_right + left * from_left)

    return turn(qkv.astype(jnp.float32), 1).astype(qkv.dtype), lambda f: turn(f, -1), others


def _of_head(qkv: Array, head: int, head_dim: int) -> list[Array]:
    return [qkv[:, (3 * head + part) * head_dim : (3 * head + part + 1) * head_dim] for part in range(3)]


def _chunks(q: Array) -> list[slice]:
    return [slice(start, min(start + QUERY_ROWS, len(q))) for start in range(0, len(q), QUERY_ROWS)]


def _weights(q: Array, k: Array, first: int, causal: bool) -> tuple[Array, Array]:
    """exp(logits - their maximum) [Q, N] float32, and its sums over the keys [Q, 1]."""
    logits = _dot_transposed(q, k) * q.shape[1] ** -0.5
    if causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(columns <= rows + first, logits, -1e30)
    weights = jnp.exp(logits - jnp.max(logits, 1, keepdims=True))
    return weights, jnp.sum(weights, 1, keepdims=True)


def _product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _dot(a: Array, b: Array) -> Array:
    return _product(a, b, (1, 0))


def _dot_transposed(a: Array, b: Array) -> Array:
    """a·bᵀ."""
    return _product(a, b, (1, 1))


def _dot_over_rows(a: Array, b: Array) -> Array:
    """aᵀ·b."""
    return _product(a, b, (0, 0))

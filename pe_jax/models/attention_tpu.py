"""Attention as one TPU kernel for the rows PE has: a whole row of logits lies in the core's own memory (PE §2.1).

Images are 49 to 1,025 tokens, texts 32 or 72, so nothing need be streamed past a running maximum as in flash attention.
The kernel reads q, k and v where the fused projection left them, turns q and k by their rotary angles, and writes
heads side by side as the output projection reads them: no transposed copy, no logits and no statistics in HBM. Its
backward pass reads the same projection and computes the rows anew.
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
BLOCK_BYTES = 1 << 18  # of one of q, k, v in the core's memory; more heads are taken at a time up to this
VMEM_BYTES = 96 << 20

Rope: TypeAlias = tuple[np.ndarray, np.ndarray]


def heads_at_once(heads: int, head_dim: int, tokens: int, itemsize: int) -> int | None:
    """How many heads a block holds; None where no number of heads fills the lanes, and XLA's attention must do."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n * head_dim % LANES == 0]
    small = [n for n in fitting if n * head_dim * tokens * itemsize <= BLOCK_BYTES]
    return max(small) if small else (min(fitting) if fitting else None)


@functools.partial(jax.custom_vjp, nondiff_argnames=("rope", "causal", "interpret"))
def attention(
    qkv: Float[Array, "B N 3 K H"], rope: "Tables | None", causal: bool, interpret: bool
) -> Float[Array, "B N K H"]:
    """softmax(q·kᵀ/√H)·v for queries and keys of the same tokens, on one device.

    Args:
      qkv: [B, N, 3, K, H] as projected, q and k not yet turned.
      rope: their angles, or None to leave them.
      causal: whether tokens see only themselves and earlier ones.
      interpret: run the kernel's steps by XLA, on any device; for tests.

    Raises:
      ValueError: if no number of heads fills the lanes (`heads_at_once`).
    """
    return _forward(qkv, rope, causal, interpret)[0]


class Tables:
    """The angles of `rope_2d` as a static argument: compared by identity of their content."""

    def __init__(self, rope: Rope):
        self.cos, self.sin = rope
        self._key = self.cos.tobytes(), self.sin.tobytes()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self._key == other._key

    def over(self, heads: int) -> list[jax.Array]:
        """cos [N, heads·H], and sin where a channel takes from its right and from its left neighbour."""
        even = np.arange(self.cos.shape[1]) % 2 == 0
        parts = self.cos, np.where(even, -self.sin, 0), np.where(even, 0, self.sin)
        return [jnp.asarray(np.tile(part, (1, heads)).astype(np.float32)) for part in parts]


def _forward(qkv: Array, rope: Tables | None, causal: bool, interpret: bool) -> tuple[Array, Array]:
    call = _Call(qkv, rope, causal, interpret)
    out = call(_forward_kernel, [qkv], [0, 1, 2], parts=1)
    return out.reshape(*qkv.shape[:2], *qkv.shape[3:]), qkv


def _backward(rope: Tables | None, causal: bool, interpret: bool, qkv: Array, by_out: Array) -> tuple[Array]:
    call = _Call(qkv, rope, causal, interpret)
    return (call(_backward_kernel, [qkv, by_out], [0, 1, 2, 0], parts=3).reshape(qkv.shape),)


attention.defvjp(_forward, _backward)


class _Call:
    """The layout of one call: which block of which array each step of the grid (example, group of heads) sees."""

    def __init__(self, qkv: Array, rope: Tables | None, causal: bool, interpret: bool):
        self.batch, self.tokens, _, self.heads, self.head_dim = qkv.shape
        self.dtype, self.rope, self.causal, self.interpret = qkv.dtype, rope, causal, interpret
        at_once = heads_at_once(self.heads, self.head_dim, self.tokens, qkv.dtype.itemsize)
        if at_once is None:
            raise ValueError(
                f"{self.heads} heads of {self.head_dim} channels do not fill {LANES} lanes; use attention='xla'."
            )
        self.at_once, self.groups = at_once, self.heads // at_once
        self.lanes = at_once * self.head_dim

    def __call__(self, kernel: Any, arrays: list[Array], parts_read: list[int], *, parts: int) -> Array:
        """Runs `kernel` over all examples and groups.

        Args:
          kernel: takes a block [1, N, lanes] for each of `parts_read`, the tables if there are any, and the output's.
          arrays: the projection, read as often as it has parts, then what else is read once.
          parts_read: which part of its array (q, k, v) each block is of.
          parts: of the output; a step of the grid's last axis writes each.
        """
        width = self.heads * self.head_dim
        flat = [x.reshape(self.batch, self.tokens, -1) for x in arrays]
        operands = [flat[0]] * 3 + flat[1:]

        def block(part: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, self.tokens, self.lanes), lambda b, g, _, part=part: (b, 0, part * self.groups + g))

        tables = self.rope.over(self.at_once) if self.rope else []
        whole = pl.BlockSpec((self.tokens, self.lanes), lambda b, g, _: (0, 0))
        static = {"heads": self.at_once, "rope": bool(tables), "causal": self.causal}
        pairs = self.batch * self.heads * self.tokens**2
        return pl.pallas_call(
            functools.partial(kernel, **static),
            grid=(self.batch, self.groups, parts),
            in_specs=[*(block(part) for part in parts_read), *[whole] * len(tables)],
            out_specs=pl.BlockSpec((1, self.tokens, self.lanes), lambda b, g, p: (b, 0, p * self.groups + g)),
            out_shape=jax.ShapeDtypeStruct((self.batch, self.tokens, parts * width), self.dtype),
            scratch_shapes=[pltpu.VMEM((2, self.tokens, self.lanes), self.dtype)] if parts == 3 else [],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * self.head_dim * (2 if parts == 1 else 5),
                transcendentals=pairs,
                bytes_accessed=(3 + parts + (parts == 3)) * self.batch * self.tokens * width * self.dtype.itemsize,
            ),
            interpret=self.interpret,
            name=f"attention_{'forward' if parts == 1 else 'backward'}_h{self.head_dim}",
        )(*operands, *tables)


def _forward_kernel(*refs: Any, heads: int, rope: bool, causal: bool) -> None:
    q, k, v, turn, (out,) = _loaded(refs, 3, rope)
    q, k = turn(q, 1), turn(k, 1)
    head_dim = q.shape[1] // heads
    for head in range(heads):
        at = slice(head * head_dim, (head + 1) * head_dim)
        for start in range(0, q.shape[0], QUERY_ROWS):
            rows = slice(start, min(start + QUERY_ROWS, q.shape[0]))
            weights, total = _weights(q[rows, at], k[:, at], start, causal)
            out[0, rows, at] = (_dot(weights.astype(v.dtype), v[:, at]) / total).astype(out.dtype)


def _backward_kernel(*refs: Any, heads: int, rope: bool, causal: bool) -> None:
    q, k, v, by_out, turn, (out, kept) = _loaded(refs, 4, rope)
    part = pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        turned_q, turned_k = turn(q, 1), turn(k, 1)
        head_dim = q.shape[1] // heads
        by_q, by_k, by_v = [], [], []
        for head in range(heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            qs, ks, vs, gs = turned_q[:, at], turned_k[:, at], v[:, at], by_out[:, at]
            dq, dk, dv = [], 0.0, 0.0
            for start in range(0, q.shape[0], QUERY_ROWS):
                rows = slice(start, min(start + QUERY_ROWS, q.shape[0]))
                weights, total = _weights(qs[rows], ks, start, causal)
                weights = weights / total
                dv += _dot_over_rows(weights.astype(q.dtype), gs[rows])
                by_weights = _dot_transposed(gs[rows], vs)
                # The softmax's gradient: what is common to a row cancels.
                by_logits = weights * (by_weights - jnp.sum(weights * by_weights, 1, keepdims=True))
                by_logits = (by_logits * head_dim**-0.5).astype(q.dtype)
                dq.append(_dot(by_logits, ks))
                dk += _dot_over_rows(by_logits, qs[rows])
            by_q.append(jnp.concatenate(dq, 0))
            by_k.append(dk)
            by_v.append(dv)
        out[0] = turn(jnp.concatenate(by_q, 1), -1).astype(out.dtype)
        kept[0] = turn(jnp.concatenate(by_k, 1), -1).astype(out.dtype)
        kept[1] = jnp.concatenate(by_v, 1).astype(out.dtype)

    @pl.when(part > 0)
    def _() -> None:
        out[0] = kept[part - 1]


def _loaded(refs: Any, blocks: int, rope: bool) -> tuple[Any, ...]:
    """The blocks' values [N, lanes], the rotation, and the references that are written."""
    values = [ref[0] for ref in refs[:blocks]]
    if not rope:
        return *values, lambda x, direction: x, refs[blocks:]
    cos, from_right, from_left = (ref[...] for ref in refs[blocks : blocks + 3])

    def turn(x: Array, direction: int) -> Array:
        """Turns each pair of channels by its angle, or back; `layers.rotate` with the lanes' own rotation."""
        f, lanes = x.astype(jnp.float32), x.shape[1]
        right, left = pltpu.roll(f, lanes - 1, 1), pltpu.roll(f, 1, 1)
        return (f * cos + direction * (right * from_right + left * from_left)).astype(x.dtype)

    return *values, turn, refs[blocks + 3 :]


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

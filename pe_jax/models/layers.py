"""The parts both towers are made of: attention, MLP, rotary positions, pooling, and the scanned Transformer.

Each parameter names its logical axes in its `axes` metadata, which `pe_jax.sharding` maps to mesh axes. Kernels are
[in, out]. Initialisation follows PE's published module: PyTorch's defaults, and Xavier-uniform for the fused qkv.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pe_jax import sharding
from pe_jax.models import attention_tpu
from pe_jax.sharding import constrain
from pe_jax.types import Params, split

AnyBlock = TypeVar("AnyBlock", bound=nnx.Module)
EPSILON = 1e-5  # of every LayerNorm, in both towers and the pooler

_keep = jax.checkpoint_policies.save_only_these_names
# What the backward pass keeps of each block besides the residual stream entering it; the rest is computed again.
# In brackets what that costs of memory: bf16 numbers a token, in widths D (G's MLP is 5.8 D wide, the others' 4 D).
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # everything, also what the matrix products do not need
    "dots": _keep("qkv", "attended", "up", "middle"),  # what goes into or comes out of a matrix product [5 D + MLP]
    "no_up": _keep("qkv", "attended", "middle"),  # but for the widest: the MLP's first half is done again [5 D]
    "attention": _keep("qkv", "attended"),  # [4 D]
    "block": jax.checkpoint_policies.nothing_saveable,  # nothing: one forward pass more
}
# How attention among the tokens themselves is computed.
KERNELS = (
    "auto",  # by the platform: "fused" on a TPU, "cudnn" on a GPU, "xla" elsewhere or where the others cannot
    "xla",  # matrix products and a softmax with all logits in memory
    "fused",  # our TPU kernel (`attention_tpu`); on another platform its steps are interpreted, to check it
    "cudnn",  # NVIDIA's flash attention, for half precision
)


def precision(dtype: Any) -> lax.Precision | None:
    """float32 means float32 on every chip: TPUs and GPUs would otherwise multiply in bf16 or TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def uniform(limit: float) -> nnx.Initializer:
    """U(-limit, limit): what PyTorch draws a Linear's kernel and bias from, with limit 1/sqrt(fan-in)."""
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(key, shape, dtype, -limit, limit)


class Dense(nnx.Module):
    """A linear map of the last axis, [..., in] → [..., out].

    Args:
      inputs, outputs: sizes of the kernel [in, out] and the bias [out].
      axes: their logical axes, in and out.
      dtype: computed in; the parameters are float32.
      gradient_dtype: in which the kernel's gradient is summed over devices; None is `dtype`.
      heads: how many heads a "heads" axis holds.
      bias: whether there is one.
      kernel_init, bias_init: PyTorch's for a Linear by default.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        dtype: Any,
        gradient_dtype: Any = None,
        rngs: nnx.Rngs,
        heads: int | None = None,
        bias: bool = True,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
    ):
        self.axes, self.dtype, self.gradient_dtype = axes, dtype, gradient_dtype or dtype
        plain = uniform(inputs**-0.5)
        kernel = (kernel_init or plain)(rngs.params(), (inputs, outputs))
        self.kernel = nnx.Param(kernel, axes=axes, heads=heads)
        if bias:
            self.bias = nnx.Param((bias_init or plain)(rngs.params(), (outputs,)), axes=axes[1:], heads=heads)

    def whole(self) -> tuple[Float[Array, "I O"], Float[Array, "O"]]:
        """Kernel and bias to compute with, whole on every device of the fsdp axis."""
        kernel = sharding.gathered(self.kernel[...], *self.axes, dtype=self.dtype)
        return kernel, jnp.asarray(self.bias[...], self.dtype)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y: Array = _product(x.astype(self.dtype), self.kernel[...], self.axes, self.dtype, self.gradient_dtype)
        return y + jnp.asarray(self.bias[...], self.dtype) if hasattr(self, "bias") else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(
    x: Array, weights: Array | np.ndarray, axes: tuple[str | None, str | None], dtype: Any, gradient_dtype: Any
) -> Array:
    """x·weights. The backward pass gathers the weights anew rather than keep them whole for every layer."""
    return jnp.dot(x, sharding.gathered(weights, *axes, dtype=dtype), precision=precision(dtype))


def _product_forward(x: Array, weights: Array, *static: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weights, *static), (x, weights)


def _product_backward(
    axes: tuple[str | None, str | None], dtype: Any, gradient_dtype: Any, kept: tuple[Array, Array], by_y: Array
) -> tuple[Array, Array]:
    x, weights = kept
    exact, kernel = precision(dtype), sharding.gathered(weights, *axes, dtype=dtype)
    by_x = jnp.dot(by_y, kernel.T, precision=exact)
    if sharding.platform() == "cpu":  # XLA transposes there what it sums over two axes: half the time with one
        x, by_y = x.reshape(-1, x.shape[-1]), by_y.reshape(-1, by_y.shape[-1])
    rows = tuple(range(x.ndim - 1))
    by_kernel = lax.dot_general(
        x, by_y, ((rows, rows), ((), ())), precision=exact, preferred_element_type=jnp.dtype(gradient_dtype)
    )
    return by_x, constrain(by_kernel, *axes).astype(weights.dtype)


_product.defvjp(_product_forward, _product_backward)


def layer_norm(width: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis, statistics in float32 by the two-pass formula (the fast one loses 4 digits)."""
    return nnx.LayerNorm(
        width,
        epsilon=EPSILON,
        dtype=dtype,
        use_fast_variance=False,
        scale_metadata={"axes": ("embed",)},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )


def rope_2d(
    height: int, width: int, head_dim: int, *, class_token: bool, theta: float = 1e4
) -> tuple[np.ndarray, np.ndarray]:
    """Angles of 2-D rotary positions as (cos, sin), each float32 [N, H]; N = class + height·width, row-major.

    The first half of the head's channels turns with the column x, the second half with the row y; inside a half each
    frequency theta^(-2k/(H/2)) owns the adjacent channels (2k, 2k+1). With a class token the grid counts from 1 and
    the class row, first, is not turned. Positions are the integers of the grid at hand at every resolution.

    Raises:
      ValueError: if `head_dim` is not a multiple of 4.

    Source: PE §2.1 (2-D RoPE); layout as in the published weights' module.
    """
    if head_dim % 4:
        raise ValueError(f"2-D RoPE needs a head dim that is a multiple of 4, got {head_dim}; change width or heads.")
    frequencies = theta ** (-np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    offset = 1 if class_token else 0
    y, x = np.meshgrid(np.arange(height) + offset, np.arange(width) + offset, indexing="ij")
    angles = np.concatenate([x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies], axis=-1)
    angles = np.repeat(angles, 2, axis=-1)
    if class_token:
        angles = np.concatenate([np.zeros((1, head_dim)), angles])
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Float[Array, "B N K H"], rope: tuple[np.ndarray, np.ndarray]) -> Float[Array, "B N K H"]:
    """Turns each pair of channels (a, b) to (a·cos - b·sin, b·cos + a·sin), in float32."""
    cos, sin = (jnp.asarray(table)[:, None, :] for table in rope)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    f = x.astype(jnp.float32)
    # Two rolls and masked sines: no strided gather, 15 % faster on a CPU than stacking the pairs.
    left, right = jnp.where(even, -sin, 0), jnp.where(even, 0, sin)
    return (f * cos + jnp.roll(f, -1, -1) * left + jnp.roll(f, 1, -1) * right).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with one fused qkv kernel; self-attention, or from `queries` to `tokens` (PE §2.1)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kernel: str = "auto",
        dtype: Any = jnp.float32,
        gradient_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}; change either one.")
        self.heads, self.kernel = heads, kernel
        xavier = uniform((6 / (width + 3 * width)) ** 0.5)  # of the fused [3·D, D] matrix
        zeros = nnx.initializers.zeros_init()
        common: dict[str, Any] = {"dtype": dtype, "gradient_dtype": gradient_dtype, "rngs": rngs}
        # Columns are head by head its q, k and v, in one axis: matrix products, shards and attention take them as they
        # lie, where axes of their own, 3 and a head's 64 or 96, would be padded to a TPU's tiles and copied.
        self.qkv = Dense(
            width,
            3 * width,
            ("embed", "heads"),
            heads=heads,
            kernel_init=xavier,
            bias_init=zeros,
            **common,
        )
        self.out = Dense(width, width, ("heads", "embed"), heads=heads, bias_init=zeros, **common)

    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        *,
        queries: Float[Array, "B Q D"] | None = None,
        rope: tuple[np.ndarray, np.ndarray] | None = None,
        causal: bool = False,
    ) -> Float[Array, "B Q D"]:
        """Among the tokens themselves, with `rope` and `causal`; or from `queries`, which see all tokens."""
        if queries is None:
            qkv = checkpoint_name(self.qkv(tokens), "qkv")
            attended = self_attend(qkv, self.heads, rope, causal=causal, kernel=self.kernel)
            return self.out(checkpoint_name(attended, "attended"))
        (q,) = self._project(queries, slice(0, 1))
        k, v = self._project(tokens, slice(1, 3))
        return self.out(attend(q, k, v).reshape(queries.shape))

    def weights(
        self,
        tokens: Float[Array, "B N D"],
        *,
        rope: tuple[np.ndarray, np.ndarray] | None = None,
        reduce: Callable[[Array], Any] | None = None,
    ) -> Any:
        """[B, K, N, N] how much each token (third axis) attends to each (fourth) where tokens attend among themselves.

        Rows sum to 1. Computed for itself, in float32, since no fast kernel ever has this table in memory.

        Args:
          tokens: [B, N, D] what `__call__` takes.
          rope: tables of `rope_2d`, or None.
          reduce: applied to the [B, N, N] of one head after the other, so that no more than that exists at a time; the
            leaves of what it gives are then returned, with the heads as a new first axis.
        """
        q, k, _ = (jnp.swapaxes(x, 1, 2) for x in _turned(self.qkv(tokens), self.heads, rope))
        if reduce is None:
            return jax.nn.softmax(_logits(q, k))

        def one(head: tuple[Array, Array]) -> Any:
            return reduce(jax.nn.softmax(_logits(head[0][:, None], head[1][:, None]))[:, 0])

        return lax.map(one, (jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1)))

    def _project(self, x: Array, part: slice) -> Array:
        """[B, N, D] → [parts, B, N, K, H] by some of q, k and v."""
        kernel, bias = self.qkv.whole()
        kernel = kernel.reshape(x.shape[-1], self.heads, 3, -1)[:, :, part]
        bias = bias.reshape(self.heads, 3, -1)[:, part]
        y = jnp.einsum("bnd,dkph->pbnkh", x.astype(kernel.dtype), kernel, precision=precision(kernel.dtype))
        return y + jnp.swapaxes(bias, 0, 1)[:, None, None]


def self_attend(
    qkv: Float[Array, "B N KPH"],
    heads: int,
    rope: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    causal: bool = False,
    kernel: str = "auto",
) -> Float[Array, "B N KH"]:
    """Attention of tokens among themselves, from their projections; q and k are turned by `rope` first.

    Args:
      qkv: [B, N, K·3·H]: head by head its q, k and v.
      heads: K.
      rope: tables of `rope_2d`, or None.
      causal: whether tokens see only themselves and earlier ones.
      kernel: one of `KERNELS`, the same numbers by any of them.

    Returns:
      [B, N, K·H], head by head.

    Raises:
      ValueError: if `kernel` was chosen by name and cannot take these arrays.
    """
    head_dim = qkv.shape[-1] // (3 * heads)
    if kernel == "auto":
        kernel = _kernel_for(qkv, heads)
    if kernel == "fused":
        tables = None if rope is None else attention_tpu.Tables(rope)
        run = functools.partial(
            attention_tpu.attention,
            head_dim=head_dim,
            rope=tables,
            causal=causal,
            interpret=sharding.platform() != "tpu",
        )
        axes = "batch", None, "heads"
        return sharding.per_device(run, axes, axes)(qkv)
    q, k, v = _turned(qkv, heads, rope)
    if kernel == "cudnn":
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    else:
        out = attend(q, k, v, causal=causal)
    return out.reshape(*qkv.shape[:2], -1)


def _turned(qkv: Array, heads: int, rope: tuple[np.ndarray, np.ndarray] | None) -> tuple[Array, Array, Array]:
    """q, k and v, each [B, N, K, H], the first two turned by `rope`."""
    parts = qkv.reshape(*qkv.shape[:2], heads, 3, -1)
    q, k, v = (parts[:, :, :, part] for part in range(3))
    return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


def _kernel_for(qkv: Array, heads: int) -> str:
    """The fastest of `KERNELS` that can take these projections on the platform that is being compiled for."""
    batch, tokens, width = qkv.shape
    head_dim, head_ways = width // (3 * heads), sharding.ways("heads")
    platform, size = sharding.platform(), qkv.dtype.itemsize
    whole = batch % sharding.ways("batch") == 0 and heads % head_ways == 0
    shape = heads // head_ways, head_dim, tokens, size
    if platform == "tpu" and whole and attention_tpu.fits(sharding.device_kind(), *shape):
        return "fused"
    # cuDNN differentiates rows of even length alone.
    return "cudnn" if platform == "gpu" and size == 2 and tokens % 2 == 0 else "xla"


def attend(
    q: Float[Array, "B Q K H"], k: Float[Array, "B N K H"], v: Float[Array, "B N K H"], *, causal: bool = False
) -> Float[Array, "B Q K H"]:
    """softmax(q·kᵀ/√H)·v, softmax in float32; `causal` hides later positions."""
    exact = precision(q.dtype)
    # Heads before positions: XLA on a CPU multiplies strided heads five times slower than it transposes them.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = _logits(q, k)
    if causal:
        logits = jnp.where(np.tri(q.shape[2], k.shape[2], dtype=bool), logits, -jnp.inf)
    # Divided by the sum after the product with v, [Q, H] numbers instead of [Q, N].
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    out = jnp.einsum("bkqn,bknh->bkqh", weights.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32)
    return jnp.swapaxes(out / jnp.sum(weights, -1, keepdims=True), 1, 2).astype(v.dtype)


def _logits(q: Float[Array, "B K Q H"], k: Float[Array, "B K N H"]) -> Float[Array, "B K Q N"]:
    logits = jnp.einsum("bkqh,bknh->bkqn", q, k, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    return logits * q.shape[-1] ** -0.5


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x·Φ(x), exact, in float32: by erf as PyTorch has it, which a CPU computes thrice as fast as JAX's erfc."""
    f = x.astype(jnp.float32)
    return (0.5 * f * (1 + lax.erf(f * np.float32(0.5**0.5)))).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, exact (erf) GELU, Linear: [..., D] → [..., D]."""

    def __init__(
        self, width: int, hidden: int, *, dtype: Any = jnp.float32, gradient_dtype: Any = None, rngs: nnx.Rngs
    ):
        common: dict[str, Any] = {"dtype": dtype, "gradient_dtype": gradient_dtype, "rngs": rngs}
        self.up = Dense(width, hidden, ("embed", "mlp"), **common)
        self.down = Dense(hidden, width, ("mlp", "embed"), **common)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(gelu(checkpoint_name(self.up(x), "up")))


class LayerScale(nnx.Module):
    """Multiplies each channel by a learned factor (arXiv 2103.17239); in the aligned models (PE §4, §5)."""

    def __init__(self, width: int, init: float):
        self.gamma = nnx.Param(jnp.full((width,), init), axes=("embed",))

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return x * self.gamma[...].astype(x.dtype)


def drop_path(x: Float[Array, "B N D"], rate: float, key: jax.Array | None) -> Float[Array, "B N D"]:
    """Zeroes whole examples of a residual branch with probability `rate` and rescales the rest by 1/(1 - rate)."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP, each with optional LayerScale and DropPath."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        kernel: str = "auto",
        dtype: Any = jnp.float32,
        gradient_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.drop_path = drop_path
        common: dict[str, Any] = {"dtype": dtype, "gradient_dtype": gradient_dtype, "rngs": rngs}
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, kernel=kernel, **common)
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, mlp_width, **common)
        if layer_scale is not None:
            self.scale1 = LayerScale(width, layer_scale)
            self.scale2 = LayerScale(width, layer_scale)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        rope: tuple[np.ndarray, np.ndarray] | None = None,
        causal: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "B N D"]:
        scale1, scale2 = getattr(self, "scale1", _same), getattr(self, "scale2", _same)
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        x = x + drop_path(scale1(self.attention(self.norm1(x), rope=rope, causal=causal)), self.drop_path, key1)
        x = checkpoint_name(x, "middle")
        x = x + drop_path(scale2(self.mlp(self.norm2(x))), self.drop_path, key2)
        return constrain(x, "batch", "tokens", None)


def _same(x: Array) -> Array:
    return x


def stack(make_block: Callable[[nnx.Rngs], AnyBlock], depth: int, *, rngs: nnx.Rngs) -> AnyBlock:
    """`depth` independently initialised blocks as one block whose parameters are stacked, [Y, ...]."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make_block, in_axes=0, out_axes=0))(rngs)


def scan_blocks(
    blocks: Block,
    x: Float[Array, "B N D"],
    *,
    layers: Sequence[int],
    remat: str = "none",
    rope: tuple[np.ndarray, np.ndarray] | None = None,
    causal: bool = False,
    key: jax.Array | None = None,
) -> dict[int, Float[Array, "B N D"]]:
    """Runs stacked blocks by one `lax.scan` and returns the tokens after each of `layers`.

    The scan is compiled once whatever the depth and stops after the last layer asked for, so truncation costs a slice.
    Kept layers are written into a carried [len(layers), ...] buffer: scan's own outputs would hold every layer.

    Args:
      blocks: stacked parameters, [Y, ...] each.
      x: [B, N, D] tokens entering block 1.
      layers: which blocks to keep, counted from 1 to Y; 0 is `x` itself.
      remat: what the backward pass keeps of a block, a key of `REMAT_POLICIES`.
      rope: tables of `rope_2d`, or None.
      causal: whether tokens see only earlier ones.
      key: randomness of DropPath; None switches it off.
    """
    graphdef, params = split(blocks)
    last, wanted = max(layers), sorted({layer for layer in layers if layer > 0})
    kept = {0: x} if 0 in layers else {}
    if last == 0:
        return kept
    slots = np.full(last, len(wanted), np.int32)  # an index past the buffer is dropped: "do not keep"
    slots[[layer - 1 for layer in wanted]] = np.arange(len(wanted))

    def block(params: Params, x: Array, key: jax.Array | None) -> Array:
        return nnx.merge(graphdef, params)(x, rope=rope, causal=causal, key=key)

    if remat != "none":
        block = jax.checkpoint(block, prevent_cse=False, policy=REMAT_POLICIES[remat])

    def step(carry: tuple[Array, Array], layer: dict[str, Any]) -> tuple[tuple[Array, Array], None]:
        x, buffer = carry
        x = block(layer["params"], x, layer.get("key"))
        if len(wanted) > 1:
            buffer = buffer.at[layer["slot"]].set(x, mode="drop")
        return (x, buffer), None

    per_layer = {"params": jax.tree.map(lambda leaf: leaf[:last], params), "slot": slots}
    if key is not None:
        depth = jax.tree.leaves(params)[0].shape[0]
        per_layer["key"] = jax.random.split(key, depth)[:last]  # truncation leaves earlier blocks' randomness alone
    buffer = jnp.zeros((len(wanted) if len(wanted) > 1 else 0, *x.shape), x.dtype)
    (x, buffer), _ = lax.scan(step, (x, buffer), per_layer)
    if len(wanted) == 1:
        return kept | {last: x}
    return kept | {layer: buffer[i] for i, layer in enumerate(wanted)}


@dataclasses.dataclass(frozen=True)
class Step:
    """One block at work, as `watch_blocks` shows it.

    Attributes:
      block: the block.
      before, after: [B, N, D] the residual stream that enters and leaves it.
      rope: tables of `rope_2d`, or None.
    """

    block: Block
    before: Float[Array, "B N D"]
    after: Float[Array, "B N D"]
    rope: tuple[np.ndarray, np.ndarray] | None = None

    def attention(self, reduce: Callable[[Array], Any] | None = None) -> Any:
        """[B, K, N, N] the block's attention, or what `reduce` makes of it: see `Attention.weights`."""
        return self.block.attention.weights(self.block.norm1(self.before), rope=self.rope, reduce=reduce)


def watch_blocks(
    blocks: Block,
    x: Float[Array, "B N D"],
    look: Callable[[Step], Any],
    *,
    layers: Sequence[int],
    rope: tuple[np.ndarray, np.ndarray] | None = None,
) -> Any:
    """Runs stacked blocks as `scan_blocks` does, for inference, and keeps what `look` makes of each of `layers`.

    Nothing else is kept, so that statistics of every layer cost the memory of one; `look` runs at those layers alone.

    Args:
      blocks: stacked parameters, [Y, ...] each.
      x: [B, N, D] tokens entering block 1.
      look: from a block at work to any tree of arrays.
      layers: which blocks to look at, counted from 1 to Y.
      rope: tables of `rope_2d`, or None.

    Returns:
      The tree, each leaf [len(layers), ...] in the order asked for.
    """
    graphdef, params = split(blocks)
    last, wanted = max(layers), sorted(set(layers))
    slots = np.full(last, -1, np.int32)
    slots[[layer - 1 for layer in wanted]] = np.arange(len(wanted))

    def seen(block: Block, before: Array, after: Array) -> Any:
        return look(Step(block, before, after, rope))

    one = jax.eval_shape(
        lambda params, x: seen(nnx.merge(graphdef, params), x, x), jax.tree.map(lambda p: p[0], params), x
    )

    def step(carry: tuple[Array, Any], layer: dict[str, Any]) -> tuple[tuple[Array, Any], None]:
        x, kept = carry
        block = nnx.merge(graphdef, layer["params"])
        y = block(x, rope=rope)

        def keep(kept: Any) -> Any:
            return jax.tree.map(lambda all, own: all.at[layer["slot"]].set(own), kept, seen(block, x, y))

        return (y, lax.cond(layer["slot"] >= 0, keep, lambda kept: kept, kept)), None

    empty = jax.tree.map(lambda leaf: jnp.zeros((len(wanted), *leaf.shape), leaf.dtype), one)
    per_layer = {"params": jax.tree.map(lambda leaf: leaf[:last], params), "slot": slots}
    (_, kept), _ = lax.scan(step, (x, empty), per_layer)
    order = np.array([wanted.index(layer) for layer in layers])
    return kept if len(layers) == len(wanted) and (np.diff(order) > 0).all() else jax.tree.map(lambda k: k[order], kept)


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Counts `layers` from 1, as the paper does: 0 is the patch embedding, -1 the last block.

    Raises:
      ValueError: if a layer is outside [-depth, depth] or none is asked for.
    """
    if not layers:
        raise ValueError(f"layers is empty; ask for some of 0 (the patch embedding) to {depth} (the last block).")
    for layer in layers:
        if not -depth <= layer <= depth:
            raise ValueError(f"layer {layer} does not exist; this tower has blocks 1 to {depth}, or -{depth} to -1.")
    return tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def check_computation(remat: str, attention: str) -> None:
    """Raises a ValueError for a way to compute a tower that does not exist."""
    for name, value, known in (("remat", remat, REMAT_POLICIES), ("attention", attention, KERNELS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")

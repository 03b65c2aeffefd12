"""Language decoders, Llama 3 and Qwen2.5 in one module: training on packed sequences, a cache, and generation (PE §5).

Both are pre-norm transformers with grouped-query attention, rotary positions and a SwiGLU; a configuration says what
differs. Released configurations are in `pe_jax.models.zoo`, weights are read by `pe_jax.convert.decoder`. Axes: B rows,
L tokens, G key-value heads, R query heads to each of them, A channels of a head, S places of a cache, Y blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pe_jax import sharding
from pe_jax.models.layers import REMAT_POLICIES, Dense, precision, stack
from pe_jax.sharding import constrain
from pe_jax.types import Params, split

KERNELS = (
    "auto",  # "flash" on a TPU where it can, "xla" elsewhere
    "xla",  # matrix products and a softmax, with the logits of `QUERIES` queries in memory
    "flash",  # JAX's splash attention for TPUs; on another platform its steps are interpreted, to check it
)
QUERIES = 1024  # that attend at a time without a kernel: logits are B x heads x QUERIES x L, at most
CHUNK = 512  # tokens of the prompts that enter the cache at a time, by default

# Of attention: (q [B L G R A], k [B L G A], v [B L G A]) → attended [B L G R A], and what to keep, a cache or nothing.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths for contexts longer than those of the first training.

    Wavelengths above `original_length / low` tokens are multiplied by `factor`, those below `original_length / high`
    stay, and what lies between is interpolated.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low < self.high and self.original_length > 0):
            raise ValueError(f"{self} must have factor >= 1, 0 < low < high and original_length > 0.")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a decoder."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int  # tokens, of the prompt and the answer together
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    tied: bool = True  # whether the output layer is the token embedding
    remat: str = "none"  # what the backward pass keeps, a key of `layers.REMAT_POLICIES`
    attention: str = "auto"  # how it is computed, one of `KERNELS`
    dtype: str = "float32"  # of activations; parameters are float32 unless they are loaded otherwise
    gradient_dtype: str | None = None  # in which kernels' gradients are summed over devices; None is `dtype`

    def __post_init__(self) -> None:
        for name, value, known in (("remat", self.remat, REMAT_POLICIES), ("attention", self.attention, KERNELS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; change either one.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs of channels.")

    @property
    def group(self) -> int:
        """Query heads to each key-value head."""
        return self.heads // self.kv_heads


# ----------------------------------------------------------------------------------------------------------- positions


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians a token turns each pair of channels by, float32 [A/2].

    Every step is rounded to float32 as in the reference implementations: weights were trained with these very numbers,
    and at position 100,000 one unit in the last place of the highest is an angle of 0.006.

    Source: RoFormer (arXiv:2104.09864); Llama 3.1's scaling (arXiv:2407.21783 and the code released with it).
    """
    f32 = np.float32
    exponents = np.arange(0, config.head_dim, 2).astype(f32) / f32(config.head_dim)
    # The power is rounded once, from float64; float32's own differs between libraries, by a unit in the last place.
    plain = f32(1) / (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(f32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelength = f32(2 * math.pi) / plain
    stretched = plain / f32(scaling.factor)
    smooth = (f32(scaling.original_length) / wavelength - f32(scaling.low)) / f32(scaling.high - scaling.low)
    between = (f32(1) - smooth) * plain / f32(scaling.factor) + smooth * plain
    long = wavelength > scaling.original_length / scaling.low
    short = wavelength < scaling.original_length / scaling.high
    return np.where(long, stretched, np.where(short, plain, between))


def segment_positions(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The place of each token in its own sample: 0 wherever the segment id changes."""
    place = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    return place - lax.cummax(jnp.where(first, place, 0), axis=1)


def _turn(x: Array, rope: tuple[Array, Array]) -> Array:
    """Turns channels (k, k + A/2) of x [B, L, G, heads, A] together, in float32; `rope` is cos and sin [B, L, A/2]."""
    cos, sin = (table[:, :, None, None] for table in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------- attention


def attend(
    q: Float[Array, "B L G R A"],
    k: Float[Array, "B G S A"],
    v: Float[Array, "B G S A"],
    at: Int[Array, "#B L"],
    segments: Int[Array, "B S"] | None = None,
    *,
    queries: int = QUERIES,
) -> Float[Array, "B L G R A"]:
    """softmax(q·kᵀ/√A)·v, softmax in float32, where a query at place `at` sees the keys up to it.

    Args:
      q, k, v: R query heads share each of the G key-value heads; heads lie before places in k and v.
      at: the place of each query among the S keys.
      segments: the sample each of the L = S tokens belongs to; none is seen from another. None is one sample, or a
        cache.
      queries: how many attend at a time; the backward pass computes their logits again.
    """
    length, places = q.shape[1], k.shape[2]
    if length <= queries:
        return _attend(q, k, v, at, segments, segments)
    part = jax.checkpoint(_attend)
    out = []
    for start in range(0, length, queries):
        rows = slice(start, start + queries)
        # Tokens that attend among themselves see no key behind them; with a cache, only `at` knows.
        keys = slice(0, min(places, start + queries) if places == length else places)
        seen = (None, None) if segments is None else (segments[:, rows], segments[:, keys])
        out.append(part(q[:, rows], k[:, :, keys], v[:, :, keys], at[:, rows], *seen))
    return jnp.concatenate(out, 1)


def _attend(
    q: Array, k: Array, v: Array, at: Array, of_queries: Array | None = None, of_keys: Array | None = None
) -> Array:
    batch, length, groups, heads, dim = q.shape
    exact = precision(q.dtype)
    # A group's heads and places are rows of one matrix, so that keys and values are read once for all of them.
    q = jnp.moveaxis(q, 1, 3).reshape(batch, groups, heads * length, dim)
    logits = jnp.einsum("bgra,bgsa->bgrs", q, k, precision=exact, preferred_element_type=jnp.float32) * dim**-0.5
    visible = jnp.arange(k.shape[2]) <= at[:, :, None]
    if of_queries is not None and of_keys is not None:
        visible &= of_queries[:, :, None] == of_keys[:, None]
    logits = logits.reshape(batch, groups, heads, length, -1)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # Divided by the sum after the product with v, A numbers instead of S.
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(batch, groups, heads * length, -1)
    out = jnp.einsum("bgrs,bgsa->bgra", weights, v, precision=exact, preferred_element_type=jnp.float32)
    out = out.reshape(batch, groups, heads, length, dim) / total
    return jnp.moveaxis(out, 3, 1).astype(v.dtype)


def _flash(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """`attend` of tokens among themselves by JAX's TPU kernel, each device its own rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, dim = q.shape[1], q.shape[3], q.shape[4]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attended",
        interpret=sharding.platform() != "tpu",
    )
    of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    of_rows = jax.vmap(of_heads, in_axes=(0, 0, 0, None if segments is None else 0))

    def run(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        q = jnp.moveaxis(q * jnp.asarray(dim**-0.5, q.dtype), 1, 3)
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        attended: Any = of_rows(q, k, v, ids)
        return jnp.moveaxis(attended, 3, 1)

    inputs = (q, k, v) if segments is None else (q, k, v, segments)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*inputs)
    cut = sharding.spec(mesh, "batch", None, "heads")
    specs = (cut, cut, cut, sharding.spec(mesh, "batch"))[: len(inputs)]
    return jax.shard_map(run, in_specs=specs, out_specs=cut, check_vma=False)(*inputs)


def _among_themselves(config: DecoderConfig, segments: Array | None) -> Attend:
    """How the tokens of whole sequences attend, by the kernel of the configuration."""

    def run(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        batch, length, groups = q.shape[:3]
        can = (
            length % 128 == 0
            and config.head_dim % 64 == 0
            and batch % sharding.ways("batch") == 0
            and groups % sharding.ways("heads") == 0
        )
        if config.attention == "flash" and not can:
            raise ValueError(
                f'attention="flash" takes lengths that are multiples of 128 and heads of 64 or 128 channels, cut '
                f"evenly over the mesh; got {batch} rows of {length} tokens, {groups} key-value heads of "
                f'{config.head_dim} channels: use "auto".'
            )
        if config.attention == "flash" or (config.attention == "auto" and can and sharding.platform() == "tpu"):
            return _flash(q, k, v, segments), None
        at = jnp.arange(length)[None]
        return attend(q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), at, segments), None

    return run


# -------------------------------------------------------------------------------------------------------------- blocks


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε), times a learned scale; in float32, then in the dtype of x."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width), axes=("embed",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        f = x.astype(jnp.float32)
        f = f * lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + self.epsilon)
        return (f * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class GroupedAttention(nnx.Module):
    """Grouped-query attention with one fused projection.

    Its columns are group by group R query heads, their key and their value, so that a mesh cuts it between groups.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        columns = c.kv_heads * (c.group + 2) * c.head_dim
        zeros = nnx.initializers.zeros_init()
        common: dict[str, Any] = _common(c, rngs) | {"heads": c.kv_heads}
        self.qkv = Dense(c.width, columns, ("embed", "heads"), bias=c.qkv_bias, bias_init=zeros, **common)
        self.out = Dense(c.heads * c.head_dim, c.width, ("heads", "embed"), bias=False, **common)

    def __call__(
        self, x: Float[Array, "B L D"], rope: tuple[Array, Array], attend: Attend
    ) -> tuple[Float[Array, "B L D"], Any]:
        c = self.config
        qkv = checkpoint_name(self.qkv(x), "qkv").reshape(*x.shape[:2], c.kv_heads, c.group + 2, c.head_dim)
        qk = _turn(qkv[:, :, :, :-1], rope)
        attended, kept = attend(qk[:, :, :, :-1], qk[:, :, :, -1], qkv[:, :, :, -1])
        attended = checkpoint_name(attended.reshape(*x.shape[:2], -1), "attended")
        return self.out(attended), kept


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)), [..., D] → [..., D]."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        common: dict[str, Any] = _common(c, rngs) | {"bias": False}
        self.gate = Dense(c.width, c.mlp_width, ("embed", "mlp"), **common)
        self.up = Dense(c.width, c.mlp_width, ("embed", "mlp"), **common)
        self.down = Dense(c.mlp_width, c.width, ("mlp", "embed"), **common)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate, up = checkpoint_name(self.gate(x), "up"), checkpoint_name(self.up(x), "up")
        return self.down((jax.nn.silu(gate.astype(jnp.float32)) * up).astype(x.dtype))


def _common(config: DecoderConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    kernel_init = nnx.initializers.normal(0.02)  # as both families were
    dtypes = {"dtype": config.dtype, "gradient_dtype": config.gradient_dtype}
    return {"kernel_init": kernel_init, "rngs": rngs, **dtypes}


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: grouped-query attention, then SwiGLU."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.norm1 = RMSNorm(c.width, c.norm_epsilon)
        self.attention = GroupedAttention(c, rngs=rngs)
        self.norm2 = RMSNorm(c.width, c.norm_epsilon)
        self.mlp = SwiGLU(c, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], rope: tuple[Array, Array], attend: Attend
    ) -> tuple[Float[Array, "B L D"], Any]:
        attended, kept = self.attention(self.norm1(x), rope, attend)
        x = checkpoint_name(x + attended, "middle")
        return constrain(x + self.mlp(self.norm2(x)), "batch", "tokens", None), kept


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Places are a row's own: token n of a row is at place n, whatever the other rows hold. What lies at a row's length
    and behind it is not seen, and overwritten.
    """

    keys: Float[Array, "Y B G S A"]
    values: Float[Array, "Y B G S A"]
    lengths: Int[Array, "B"]


class Generated(NamedTuple):
    """New tokens, up to and with a row's stop token; what follows is -1. `lengths` counts them."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]


# -------------------------------------------------------------------------------------------------------------- decoder


class Decoder(nnx.Module):
    """A causal language model (PE §5). Inputs are ids [B, L], or embeddings [B, L, D] that mix in other tokens."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c

        def table() -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.vocab_size, c.width)), axes=("vocab", "embed"))

        self.embedding = table()
        self.blocks = stack(lambda rngs: DecoderBlock(c, rngs=rngs), c.depth, rngs=rngs)
        self.norm = RMSNorm(c.width, c.norm_epsilon)
        if not c.tied:
            self.output = table()

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """The rows that score the next token, one for each of the vocabulary; the embedding itself where it is tied."""
        return (self.embedding if self.config.tied else self.output)[...]

    @jax.named_scope("embed")
    def embed(self, ids: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L D"]:
        """The tokens' rows of the embedding, in the dtype of activations."""
        # Each device looks up its own part of the width for the rows of all its fsdp peers, and they exchange the
        # results: tokens are far fewer numbers than the table. In float32 for the gradient's sake, which adds up over
        # every use of a frequent token.
        ids = constrain(jnp.asarray(ids), "outer_batch", None)
        x = jnp.take(constrain(self.embedding[...], "vocab", "embed"), ids, axis=0)
        x = constrain(x, "outer_batch", None, "embed").astype(self.config.dtype)
        return constrain(x, "batch", "tokens", None)

    def hidden(
        self,
        inputs: Int[Array | np.ndarray, "B L"] | Float[Array | np.ndarray, "B L D"],
        segments: Int[Array | np.ndarray, "_ _"] | None = None,
        positions: Int[Array | np.ndarray, "_ _"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The last hidden states, normalised: what `logits` scores, or `losses.next_token` a chunk at a time.

        Args:
          inputs: token ids, or embeddings in their place.
          segments: which sample of a packed row each token belongs to; equal ids are neighbours. No token sees
            another sample, and positions begin anew in each. None: every row is one sample.
          positions: of each token in its sample; None counts from 0.

        Raises:
          ValueError: for inputs that are neither ids nor embeddings, or segments of another shape.
        """
        _check_inputs(inputs, self.config)
        for name, given in (("segments", segments), ("positions", positions)):
            if given is not None and given.shape != inputs.shape[:2]:
                raise ValueError(f"{name} are {list(given.shape)}; want one for each token, {list(inputs.shape[:2])}.")
        return self._hidden(inputs, segments, positions)

    def __call__(
        self,
        inputs: Int[Array | np.ndarray, "B L"] | Float[Array | np.ndarray, "B L D"],
        segments: Int[Array | np.ndarray, "_ _"] | None = None,
        positions: Int[Array | np.ndarray, "_ _"] | None = None,
    ) -> Float[Array, "B L V"]:
        """[B, L, V] float32 logits of the token after each; arguments as of `hidden`. Large: V is some 100,000."""
        return self.logits(self.hidden(inputs, segments, positions))

    @jax.jit
    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 scores of every token of the vocabulary."""
        table = sharding.gathered(self.output_table, "vocab", "embed", dtype=hidden.dtype)
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            table,
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    @jax.jit
    @jax.named_scope("decoder")
    def _hidden(self, inputs: Array, segments: Array | None, positions: Array | None) -> Array:
        c = self.config
        x = self._entering(inputs)
        if positions is None and segments is not None:
            positions = segment_positions(segments)
        rope = self._rope(jnp.arange(x.shape[1])[None] if positions is None else positions)
        attend = _among_themselves(c, segments)
        graphdef, params = split(self.blocks)

        def block(params: Params, x: Array) -> Array:
            return nnx.merge(graphdef, params)(x, rope, attend)[0]

        if c.remat != "none":
            block = jax.checkpoint(block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
        x, _ = lax.scan(lambda x, params: (block(params, x), None), x, params)
        return self.norm(x)

    def _entering(self, inputs: Array) -> Array:
        x = self.embed(inputs) if inputs.ndim == 2 else jnp.asarray(inputs, self.config.dtype)
        return constrain(x, "batch", "tokens", None)

    @staticmethod
    def _angles(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
        angles = positions[:, :, None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    def _rope(self, positions: Array) -> tuple[Array, Array]:
        return self._angles(jnp.asarray(positions), rope_frequencies(self.config))

    # -------------------------------------------------------------------------------------------------------- cache

    def new_cache(self, rows: int, places: int) -> Cache:
        """An empty cache of `places` tokens a row, in the dtype of activations."""
        c = self.config
        shape = (c.depth, rows, c.kv_heads, places, c.head_dim)
        empty = constrain(jnp.zeros(shape, c.dtype), "layers", "batch", "heads", None, None)
        return Cache(empty, empty, jnp.zeros(rows, jnp.int32))

    def extend(
        self,
        inputs: Int[Array | np.ndarray, "B C"] | Float[Array | np.ndarray, "B C D"],
        cache: Cache,
        counts: Int[Array | np.ndarray, "B"] | None = None,
    ) -> tuple[Float[Array, "B C D"], Cache]:
        """Reads the next tokens of every row: their last hidden states, normalised, and the cache with them.

        Args:
          inputs: ids or embeddings of C tokens a row, padded at the end.
          cache: of the tokens before; each row must have room for C more, padding included.
          counts: how many of the C are a row's own; None is all. What a padding token gives means nothing.

        Raises:
          ValueError: for inputs that are neither ids nor embeddings, or are more than the cache has places.
        """
        _check_inputs(inputs, self.config)
        rows, places = cache.keys.shape[1], cache.keys.shape[3]
        if inputs.shape[0] != rows or inputs.shape[1] > places:
            raise ValueError(
                f"inputs are {list(inputs.shape[:2])}, the cache is of {rows} rows with {places} places; "
                "make a larger one with new_cache, or read fewer tokens at a time."
            )
        counts = jnp.full(rows, inputs.shape[1], jnp.int32) if counts is None else jnp.asarray(counts, jnp.int32)
        return self._extend(inputs, cache, counts)

    @jax.jit
    @jax.named_scope("decoder")
    def _extend(
        self, inputs: Array, cache: Cache, counts: Array, blocks: Sequence[Params] | None = None
    ) -> tuple[Array, Cache]:
        x = self._entering(inputs)
        at = cache.lengths[:, None] + jnp.arange(x.shape[1])
        rope = self._rope(at)
        graphdef, params = split(self.blocks)

        def step(carry: tuple[Array, Array, Array], part: tuple[Params, Array]) -> tuple[Any, None]:
            x, keys, values = carry
            params, layer = part

            def cached(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
                new = _written(keys, k, layer, cache.lengths), _written(values, v, layer, cache.lengths)
                k, v = (lax.dynamic_index_in_dim(held, layer, keepdims=False) for held in new)
                return attend(q, k, v, at), new

            x, (keys, values) = nnx.merge(graphdef, params)(x, rope, cached)
            return (x, keys, values), None

        # The whole cache is carried and written in place; as the scan's inputs and outputs it would be copied.
        carry = x, cache.keys, cache.values
        if blocks is None:
            carry, _ = lax.scan(step, carry, (params, jnp.arange(self.config.depth)))
        else:
            for layer, own in enumerate(blocks):
                carry, _ = step(carry, (own, jnp.asarray(layer)))
        x, keys, values = carry
        return self.norm(x), Cache(keys, values, cache.lengths + counts)

    def prefill(
        self,
        prompts: Int[Array | np.ndarray, "B L"] | Float[Array | np.ndarray, "B L D"],
        lengths: Int[Array | np.ndarray, "B"],
        cache: Cache,
        chunk: int = CHUNK,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Reads prompts of different lengths, `chunk` tokens at a time.

        Args:
          prompts: ids or embeddings, a row's own first and its padding behind.
          lengths: how many are a row's own, at least 1.
          cache: of what came before, with room for L tokens more, rounded up to a multiple of `chunk`.
          chunk: bounds the memory of activations; attention's logits are B x heads x chunk x places.

        Returns:
          The hidden state at each row's last token, which `logits` scores, and the cache.
        """
        _check_inputs(prompts, self.config)
        rows, length = prompts.shape[:2]
        chunk = min(chunk, length)
        places, needed = cache.keys.shape[3], -(-length // chunk) * chunk
        if rows != cache.keys.shape[1] or needed > places:
            raise ValueError(
                f"{rows} prompts of {length} tokens, read {chunk} at a time, need {needed} places of as many rows; "
                f"the cache is of {cache.keys.shape[1]} rows with {places}: make a larger one with new_cache."
            )
        return self._prefill(prompts, jnp.asarray(lengths, jnp.int32), cache, chunk)

    @functools.partial(jax.jit, static_argnames="chunk")
    def _prefill(self, prompts: Array, lengths: Array, cache: Cache, chunk: int) -> tuple[Array, Cache]:
        rows, length = prompts.shape[:2]
        padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (prompts.ndim - 2)
        parts = jnp.pad(jnp.asarray(prompts), padding).reshape(rows, -1, chunk, *prompts.shape[2:])

        def step(carry: tuple[Array, Cache], part: tuple[Array, Array]) -> tuple[tuple[Array, Cache], None]:
            last, cache = carry
            tokens, start = part
            hidden, cache = self._extend(tokens, cache, jnp.clip(lengths - start, 0, chunk))
            place = lengths - 1 - start
            found = jnp.take_along_axis(hidden, jnp.clip(place, 0, chunk - 1)[:, None, None], 1)[:, 0]
            here = (place >= 0) & (place < chunk)
            return (jnp.where(here[:, None], found, last), cache), None

        last = constrain(jnp.zeros((rows, self.config.width), self.config.dtype), "batch", None)
        starts = jnp.arange(0, length, chunk)
        (last, cache), _ = lax.scan(step, (last, cache), (jnp.moveaxis(parts, 1, 0), starts))
        return last, cache

    def decode(
        self, tokens: Int[Array | np.ndarray, "B"], cache: Cache, active: Bool[Array | np.ndarray, "B"] | None = None
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads one token a row: logits of the next one, and the cache. Rows that are not `active` stay as they are."""
        counts = None if active is None else jnp.asarray(active).astype(jnp.int32)
        hidden, cache = self.extend(jnp.asarray(tokens)[:, None], cache, counts)
        return self.logits(hidden[:, 0]), cache

    # --------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Int[Array | np.ndarray, "B L"] | Float[Array | np.ndarray, "B L D"],
        lengths: Int[Array | np.ndarray, "B"] | None = None,
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        left_padded: bool = False,
        temperature: float | Sequence[float] = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
        chunk: int = CHUNK,
    ) -> Generated:
        """Continues every prompt, all in one compiled program that ends when the last row has.

        A row's tokens are those it would get alone, whatever the other rows are; so are its draws.

        Args:
          prompts: ids, or embeddings where other tokens are mixed in.
          lengths: how many tokens of each row are its prompt, at least 1; None is all.
          max_new_tokens: at most so many for each row.
          stop: ids that end a row.
          left_padded: whether the padding lies before the prompts instead of behind them.
          temperature: 0 takes the likeliest token; else logits are divided by it and drawn from. One, or one a row.
          top_k: draw from so many of the likeliest tokens; 0 is all.
          top_p: draw from the fewest likeliest tokens that have this probability together.
          key: randomness; needed with a temperature.
          chunk: prompt tokens read at a time.

        Raises:
          ValueError: for arguments outside these ranges, or more tokens than the context holds; says which.
        """
        prompts, lengths, sampling = self._start(
            prompts, lengths, max_new_tokens, left_padded, temperature, top_k, top_p, key
        )
        return self._generate(
            prompts, lengths, jnp.asarray(tuple(stop), jnp.int32), sampling, max_new_tokens=max_new_tokens, chunk=chunk
        )

    def stream(
        self,
        prompts: Int[Array | np.ndarray, "B L"] | Float[Array | np.ndarray, "B L D"],
        lengths: Int[Array | np.ndarray, "B"] | None = None,
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        left_padded: bool = False,
        temperature: float | Sequence[float] = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[np.ndarray]:
        """The tokens of `generate`, one [B] after the other as they come; -1 for a row that has ended."""
        prompts, lengths, sampling = self._start(
            prompts, lengths, max_new_tokens, left_padded, temperature, top_k, top_p, key
        )
        stops = jnp.asarray(tuple(stop), jnp.int32)

        def tokens() -> Iterator[np.ndarray]:
            token, cache = self._first(prompts, lengths, sampling, max_new_tokens=max_new_tokens, chunk=chunk)
            blocks = jax.jit(Decoder._apart)(self) if _copies_blocks(max_new_tokens) else None
            active = jnp.ones(len(token), bool)
            for step in range(1, max_new_tokens + 1):
                yield np.where(np.asarray(active), np.asarray(token), -1)
                active &= ~jnp.isin(token, stops)
                if step == max_new_tokens or not active.any():
                    return
                token, cache = self._next(token, active, cache, sampling, jnp.asarray(step), blocks)

        return tokens()

    def _start(
        self,
        prompts: Any,
        lengths: Any,
        max_new_tokens: int,
        left_padded: bool,
        temperature: float | Sequence[float],
        top_k: int,
        top_p: float,
        key: jax.Array | None,
    ) -> tuple[Array, Array, "_Sampling | None"]:
        """Checks the arguments of a generation and brings the prompts to the front of their rows."""
        _check_inputs(prompts, self.config)
        rows, length = prompts.shape[:2]
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
        if length + max_new_tokens > self.config.context_length:
            raise ValueError(
                f"{length} tokens of prompt and {max_new_tokens} new ones are more than the context of "
                f"{self.config.context_length}; shorten the prompt or lower max_new_tokens."
            )
        if lengths is None:
            lengths = jnp.full(rows, length, jnp.int32)
        elif np.shape(lengths) != (rows,) or not np.all((np.asarray(lengths) >= 1) & (np.asarray(lengths) <= length)):
            raise ValueError(f"lengths={np.asarray(lengths).tolist()}; want {rows} numbers from 1 to {length}.")
        temperatures = np.asarray(temperature, np.float32)
        if temperatures.shape not in ((), (rows,)) or not (temperatures >= 0).all():
            raise ValueError(
                f"temperature={temperature}; want one number, or one for each of {rows} rows, not below 0."
            )
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"top_k={top_k} and top_p={top_p}; want top_k at least 0, and top_p above 0 and at most 1."
            )
        sampling = None
        if temperatures.any():
            if key is None:
                raise ValueError("A temperature needs randomness: pass key=jax.random.key(SEED), or temperature=0.")
            truncated = 0 < top_k < self.config.vocab_size or top_p < 1
            sampling = _Sampling(
                jax.random.split(key, rows),
                jnp.broadcast_to(jnp.asarray(temperatures), (rows,)),
                (jnp.asarray(top_k or self.config.vocab_size), jnp.asarray(top_p, jnp.float32)) if truncated else None,
            )
        prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32)
        if left_padded:
            prompts = jax.vmap(lambda row, count: jnp.roll(row, count - length, axis=0))(prompts, lengths)
        return prompts, lengths, sampling

    @functools.partial(jax.jit, static_argnames=("max_new_tokens", "chunk"))
    def _generate(
        self,
        prompts: Array,
        lengths: Array,
        stop: Array,
        sampling: "_Sampling | None",
        *,
        max_new_tokens: int,
        chunk: int,
    ) -> Generated:
        token, cache = self._first(prompts, lengths, sampling, max_new_tokens=max_new_tokens, chunk=chunk)
        blocks = self._apart() if _copies_blocks(max_new_tokens) else None

        def unfinished(carry: Any) -> Any:
            step, _, active, *_ = carry
            return (step < max_new_tokens) & jnp.any(active)

        def advance(carry: Any) -> Any:
            step, token, active, out, cache = carry
            token, cache = self._next(token, active, cache, sampling, step, blocks)
            out = out.at[:, step].set(jnp.where(active, token, -1))
            return step + 1, token, active & ~jnp.isin(token, stop), out, cache

        out = jnp.full((len(token), max_new_tokens), -1).at[:, 0].set(token)
        start = jnp.asarray(1), token, ~jnp.isin(token, stop), out, cache
        _, _, _, out, _ = lax.while_loop(unfinished, advance, start)
        return Generated(out, jnp.sum(out >= 0, 1))

    @functools.partial(jax.jit, static_argnames=("max_new_tokens", "chunk"))
    def _first(
        self, prompts: Array, lengths: Array, sampling: "_Sampling | None", *, max_new_tokens: int, chunk: int
    ) -> tuple[Array, Cache]:
        """Reads the prompts and chooses each row's first token."""
        rows, length = prompts.shape[:2]
        chunk = min(chunk, length)
        cache = self.new_cache(rows, max(-(-length // chunk) * chunk, length + max_new_tokens))
        hidden, cache = self._prefill(prompts, lengths, cache, chunk)
        return _choose(self.logits(hidden), sampling, jnp.asarray(0)), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def _next(
        self,
        token: Array,
        active: Array,
        cache: Cache,
        sampling: "_Sampling | None",
        step: Array,
        blocks: Sequence[Params] | None,
    ) -> tuple[Array, Cache]:
        hidden, cache = self._extend(token[:, None], cache, active.astype(jnp.int32), blocks)
        return _choose(self.logits(hidden[:, 0]), sampling, step), cache

    def _apart(self) -> list[Params]:
        """The parameters of each block by themselves; see `_copies_blocks`."""
        _, params = split(self.blocks)
        return [jax.tree.map(lambda leaf: leaf[layer], params) for layer in range(self.config.depth)]  # noqa: B023


def _copies_blocks(max_new_tokens: int) -> bool:
    """Whether the steps of a generation should have the blocks apart, in a copy of their parameters.

    XLA on a CPU copies a block out of the stacked ones each time it is used, and reading one token is little more than
    reading the parameters: a step takes 2.7 times as long (benchmarks/decoder.py, 2026-11-25). The one copy that spares
    it costs three steps. Elsewhere a slice is read where it lies.
    """
    return sharding.platform() == "cpu" and max_new_tokens > 8


class _Sampling(NamedTuple):
    """How tokens are drawn; numbers, so that another temperature compiles nothing anew."""

    keys: Array  # [B]
    temperature: Array  # [B]
    truncation: tuple[Array, Array] | None  # top-k and top-p; None spares the sort


def _choose(logits: Float[Array, "B V"], sampling: _Sampling | None, step: Array) -> Int[Array, "B"]:
    """Each row's next token."""
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling is None:
        return likeliest
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    if sampling.truncation is not None:
        logits = truncated(logits, *sampling.truncation)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, step)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(sampling.temperature > 0, drawn, likeliest)


def truncated(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Logits with all but the likeliest tokens at -∞: at most `top_k`, and no more than have probability `top_p`.

    The probability is that among the `top_k`; a token that reaches it is kept, and so is one as likely as it.
    """
    ranked = -jnp.sort(-logits, -1)
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _written(cache: Array, new: Array, layer: Array, lengths: Array) -> Array:
    """The cache [Y, B, G, S, A] with one layer's new keys or values [B, L, G, A] behind what each row holds."""

    def row(cache: Array, new: Array, length: Array) -> Array:
        return lax.dynamic_update_slice(cache, new[None], (layer, 0, length, 0))

    return jax.vmap(row, in_axes=(1, 0, 0), out_axes=1)(cache, jnp.moveaxis(new, 1, 2), lengths)


def _check_inputs(inputs: Any, config: DecoderConfig) -> None:
    shape, dtype = list(inputs.shape), inputs.dtype
    ids = len(shape) == 2 and jnp.issubdtype(dtype, jnp.integer)
    embeddings = len(shape) == 3 and jnp.issubdtype(dtype, jnp.floating) and shape[2] == config.width
    if not (ids or embeddings) or 0 in shape:
        raise ValueError(
            f"inputs are {dtype}{shape}; want integer ids [B, L], or floating embeddings [B, L, {config.width}]."
        )

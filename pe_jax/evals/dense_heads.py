"""What dense probes train on a layer's tokens: a linear map to classes, and a linear and a DPT head to depths.

All are in the form that `pe_jax.evals.fit` trains, of tokens [B, P, D] of a square grid; their maps, [B, g, g, ...],
are enlarged to the labels bilinearly. Made once for given sizes, so that what was compiled serves the next probe.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pe_jax.evals.windows import enlarging
from pe_jax.types import Params

EXACT = jax.lax.Precision.HIGHEST
IGNORED = -1  # the class of a pixel that does not count
BINS, NEAREST, FARTHEST = 256, 0.001, 10.0  # of depth, in metres
_SLACK = 1e-3  # metres, within the logarithm of the loss


@dataclasses.dataclass(frozen=True, eq=False)
class DenseHead:
    """A head in the form of `fit`.

    Attributes:
      init: key → parameters and state.
      loss: (parameters, state, tokens [B, P, D], targets [B, S, S], key) → the loss [] and the new state.
      predict: (parameters, state, tokens) → [B, g, g, C] logits of classes, or [B, g, g, 1] metres.
      grid: g.
    """

    init: Callable[[jax.Array], tuple[Params, Params]]
    loss: Callable[..., tuple[Array, Params]]
    predict: Callable[[Params, Params, Array], Array]
    grid: int


# ---- classes -------------------------------------------------------------------------------------------------------


@functools.cache
def segmentation(width: int, classes: int, grid: int, side: int, dropout: float = 0.1) -> DenseHead:
    """Batch norm, dropout of whole channels, and a 1x1 convolution; cross-entropy at the labels' size.

    Source: the linear head of BEiT and DINOv2 (arXiv 2304.07193), by which PE probes ADE20K (Tab. 13).
    """

    def init(key: jax.Array) -> tuple[Params, Params]:
        kernel = 0.01 * jax.random.normal(key, (width, classes))
        return _norm_params(width) | {"kernel": kernel, "bias": jnp.zeros(classes)}, _norm_state(width)

    def loss(params: Params, state: Params, tokens: Array, labels: Array, key: jax.Array) -> tuple[Array, Params]:
        x, state = _normed(params, state, tokens)
        kept = jax.random.bernoulli(key, 1 - dropout, (len(x), 1, width)) / (1 - dropout)
        logits = jnp.dot(x * kept, params["kernel"], precision=EXACT) + params["bias"]
        return cross_entropy(logits.reshape(len(x), grid, grid, classes), labels), state

    def predict(params: Params, state: Params, tokens: Array) -> Array:
        x = _normed_by_averages(params, state, tokens)
        logits = jnp.dot(x, params["kernel"], precision=EXACT) + params["bias"]
        return logits.reshape(len(x), grid, grid, classes)

    return DenseHead(init, loss, predict, grid)


def cross_entropy(logits: Float[Array, "B g g C"], labels: Int[Array, "B S S"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of enlarged logits, over the pixels that are not `IGNORED`.

    A band of rows at a time: all at once would take S·S·C numbers an image, for each head.
    """
    grid, side = logits.shape[1], labels.shape[1]
    rows = max(d for d in range(1, min(side, max(1, side // grid)) + 1) if side % d == 0)
    weights = jnp.asarray(enlarging(grid, side))
    wide = jnp.einsum("xj,byjc->byxc", weights, logits, precision=EXACT)
    bands = weights.reshape(-1, rows, grid), jnp.moveaxis(labels.reshape(len(labels), -1, rows, side), 1, 0)

    @jax.checkpoint
    def band(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        weights, own = part
        scores = jnp.einsum("ry,byxc->brxc", weights, wide, precision=EXACT)
        true = jnp.take_along_axis(scores, jnp.maximum(own, 0)[..., None], -1)[..., 0]
        nats = jax.nn.logsumexp(scores, -1) - true
        return total + jnp.where(own == IGNORED, 0, nats).sum(), None

    total, _ = jax.lax.scan(band, jnp.zeros(()), bands)
    return total / jnp.maximum((labels != IGNORED).sum(), 1)


# ---- depths --------------------------------------------------------------------------------------------------------


@functools.cache
def linear_depth(width: int, grid: int, side: int) -> DenseHead:
    """Batch norm and a linear map to bins of depth, enlarged fourfold before the bins become metres.

    Source: the linear depth head of DINOv2 (arXiv 2304.07193).
    """
    weights = np.asarray(enlarging(grid, 4 * grid))

    def init(key: jax.Array) -> tuple[Params, Params]:
        return _norm_params(width) | _linear(key, width, BINS), _norm_state(width)

    def metres(params: Params, x: Array) -> Array:
        logits = _dense(params, x).reshape(len(x), grid, grid, BINS)
        return expected_depth(_resized(logits, weights))

    def loss(params: Params, state: Params, tokens: Array, depth: Array, key: jax.Array) -> tuple[Array, Params]:
        x, state = _normed(params, state, tokens)
        return _depth_loss(metres(params, x), depth), state

    def predict(params: Params, state: Params, tokens: Array) -> Array:
        return metres(params, _normed_by_averages(params, state, tokens))[..., None]

    return DenseHead(init, loss, predict, 4 * grid)


@functools.cache
def dpt_depth(width: int, grid: int, side: int) -> DenseHead:
    """DPT on one layer, whose tokens stand for all four of its levels; a quarter as wide as the tower.

    LayerNorm without affine; four copies at 4, 2, 1 and 1/2 times the grid; fused from the coarsest on by residual
    convolutions, doubling each time; bins of depth at 8 times the grid.

    Source: DPT (arXiv 2103.13413) as DINOv2 has it, on a single layer as PE (Tab. 13; section B.3.3).
    """
    channels = max(8, width // 4)
    levels = [max(8, width >> shift) for shift in (3, 2, 1, 0)]  # channels of the copies, finest first

    def init(key: jax.Array) -> tuple[Params, Params]:
        keys = iter(jax.random.split(key, 32))
        params: Params = {}
        for level, own in enumerate(levels):
            params[f"project_{level}"] = _linear(next(keys), width, own)
            if level < 2:
                params[f"enlarge_{level}"] = _linear(next(keys), own, own, (4, 2)[level] ** 2)
            elif level == 3:
                params["reduce"] = _conv(next(keys), own, own)
            params[f"narrow_{level}"] = _conv(next(keys), own, channels, bias=False)
            units = ("own",) if level == 3 else ("skip", "own")  # the coarsest has nothing to be added to
            params[f"fuse_{level}"] = {
                f"{unit}_{i}": _conv(next(keys), channels, channels, bias=False) for unit in units for i in range(2)
            } | {"out": _linear(next(keys), channels, channels)}
        params["middle"] = _conv(next(keys), channels, channels)
        params["bins"] = _conv(next(keys), channels, BINS)
        return params, {}

    def predict(params: Params, state: Params, tokens: Array) -> Array:
        x = tokens.astype(jnp.float32)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x.reshape(len(x), grid, grid, width)
        copies = []
        for level in range(4):
            own = _dense(params[f"project_{level}"], x)
            if level < 2:
                own = _spread(params[f"enlarge_{level}"], own, (4, 2)[level])
            elif level == 3:
                own = _convolved(params["reduce"], own)[:, ::2, ::2]
            copies.append(_convolved(params[f"narrow_{level}"], own))
        fused = None
        for level in (3, 2, 1, 0):
            size = copies[level - 1].shape[1] if level else 8 * grid
            fused = _fused(params[f"fuse_{level}"], fused, copies[level], size)

        @jax.checkpoint  # the bins, 256 numbers a pixel, are made again on the way back
        def to_depth(params: Params, fused: Array) -> Array:
            middle = jax.nn.relu(_convolved(params["middle"], fused))
            return expected_depth(_convolved(params["bins"], middle))

        return to_depth(params, fused)[..., None]

    def loss(params: Params, state: Params, tokens: Array, depth: Array, key: jax.Array) -> tuple[Array, Params]:
        return _depth_loss(predict(params, state, tokens)[..., 0], depth), state

    return DenseHead(init, loss, predict, 8 * grid)


def expected_depth(logits: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """Metres, between `NEAREST` and `FARTHEST`: the mean of evenly spaced depths, weighted by relu(logits) + 0.1."""
    weights = jax.nn.relu(logits) + 0.1
    return jnp.dot(weights, jnp.linspace(NEAREST, FARTHEST, BINS), precision=EXACT) / weights.sum(-1)


def scale_invariant(found: Float[Array, "*B"], true: Float[Array, "*B"]) -> Float[Array, ""]:
    """√(variance + 0.15 · mean²) of the difference of logarithms, over pixels that have a depth (above 0).

    Source: SigLoss of AdaBins (arXiv 2011.14141) and of the depth toolbox that DINOv2 uses.
    """
    valid = true > 0
    count = valid.sum()
    error = jnp.where(valid, jnp.log(found + _SLACK) - jnp.log(jnp.where(valid, true, 1) + _SLACK), 0)
    mean = error.sum() / jnp.maximum(count, 1)
    variance = jnp.where(valid, jnp.square(error - mean), 0).sum() / jnp.maximum(count - 1, 1)
    squared = variance + 0.15 * jnp.square(mean)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)  # whose slope at 0 is no number


def _depth_loss(found: Float[Array, "B g g"], depth: Float[Array, "B S S"]) -> Array:
    large = _resized(found[..., None], np.asarray(enlarging(found.shape[1], depth.shape[1])))[..., 0]
    return scale_invariant(large, jnp.where(depth <= FARTHEST, depth, 0))


# ---- parts ---------------------------------------------------------------------------------------------------------


def _norm_params(width: int) -> Params:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _norm_state(width: int) -> Params:
    return {"mean": jnp.zeros(width), "square": jnp.zeros(width), "weight": jnp.zeros(())}


def _normed(params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
    """Batch norm over images and places; and the running averages, which begin at 0 with weight 0."""
    x = tokens.astype(jnp.float32)
    now = {"mean": x.mean((0, 1)), "square": jnp.square(x).mean((0, 1)), "weight": jnp.ones(())}
    state = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, now)
    return _scaled(params, x, now["mean"], x.var((0, 1))), state


def _normed_by_averages(params: Params, state: Params, tokens: Array) -> Array:
    mean, square = (state[name] / state["weight"] for name in ("mean", "square"))
    return _scaled(params, tokens.astype(jnp.float32), mean, jnp.maximum(square - jnp.square(mean), 0))


def _scaled(params: Params, x: Array, mean: Array, variance: Array) -> Array:
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["shift"]


def _linear(key: jax.Array, inputs: int, outputs: int, copies: int = 1) -> Params:
    kernel_key, bias_key = jax.random.split(key)
    limit = inputs**-0.5
    return {
        "kernel": jax.random.uniform(kernel_key, (inputs, copies * outputs), jnp.float32, -limit, limit),
        "bias": jax.random.uniform(bias_key, (outputs,), jnp.float32, -limit, limit),
    }


def _conv(key: jax.Array, inputs: int, outputs: int, bias: bool = True) -> Params:
    kernel_key, bias_key = jax.random.split(key)
    limit = (9 * inputs) ** -0.5
    params = {"kernel": jax.random.uniform(kernel_key, (3, 3, inputs, outputs), jnp.float32, -limit, limit)}
    return params | ({"bias": jax.random.uniform(bias_key, (outputs,), jnp.float32, -limit, limit)} if bias else {})


def _dense(params: Params, x: Array) -> Array:
    return jnp.dot(x, params["kernel"], precision=EXACT) + params["bias"]


def _convolved(params: Params, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X O"]:
    """A 3x3 convolution with zeros around."""
    kernel, numbers = params["kernel"], ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, precision=EXACT)
    return out + params.get("bias", 0.0)


def _spread(params: Params, x: Float[Array, "B Y X C"], times: int) -> Float[Array, "B Y2 X2 O"]:
    """A transposed convolution whose stride is its size: each place becomes `times` x `times` places."""
    batch, height, width, _ = x.shape
    spread = jnp.dot(x, params["kernel"], precision=EXACT).reshape(batch, height, width, times, times, -1)
    return spread.swapaxes(2, 3).reshape(batch, height * times, width * times, -1) + params["bias"]


@functools.partial(jax.checkpoint, static_argnums=3)
def _fused(params: Params, coarse: Array | None, own: Array, size: int) -> Array:
    """One fusion of DPT: what comes from the coarser level and this level's own, refined and brought to `size`."""

    def unit(name: str, x: Array) -> Array:
        once = _convolved(params[f"{name}_0"], jax.nn.relu(x))
        return x + _convolved(params[f"{name}_1"], jax.nn.relu(once))

    x = own if coarse is None else coarse + unit("skip", own)
    x = _resized(unit("own", x), np.asarray(enlarging(x.shape[1], size)))
    return _dense(params["out"], x)


def _resized(x: Float[Array, "B g g C"], weights: np.ndarray) -> Float[Array, "B G G C"]:
    x = jnp.einsum("xj,byjc->byxc", weights, x, precision=EXACT)
    return jnp.einsum("yi,bixc->byxc", weights, x, precision=EXACT)

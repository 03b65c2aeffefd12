"""What probes train on frozen features: a linear classifier, logistic regression, and a block of cross-attention.

The linear and the attention head are in the form that `pe_jax.evals.fit` trains. They are made once for given sizes,
so that what was compiled for one probe serves the next.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from pe_jax.models.layers import EPSILON, Dense, gelu, layer_norm
from pe_jax.models.vision import AttentionPool
from pe_jax.types import Params, split

EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A classifier in the form of `fit`.

    Attributes:
      init: key → parameters and state.
      loss: (parameters, state, features, labels [B], key) → mean cross-entropy [] in nats, and the new state.
      predict: (parameters, state, features) → [B] classes; -1 where a logit is not finite, which is right for none.
    """

    init: Callable[[jax.Array], tuple[Params, Params]]
    loss: Callable[..., tuple[Array, Params]]
    predict: Callable[[Params, Params, Array], Array]


@functools.cache
def linear(width: int, classes: int) -> Head:
    """Batch normalisation without affine, then a linear map, of features [B, D].

    The normalisation makes one grid of rates fit layers whose features differ in size by orders of magnitude.

    Source: the linear probe of MAE (arXiv 2111.06377, appendix A.1), used by InternVL (2312.14238) and PE (§3, Tab. 8).
    """

    def init(key: jax.Array) -> tuple[Params, Params]:
        kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (width, classes))
        seen = {"mean": jnp.zeros(width), "square": jnp.zeros(width), "weight": jnp.zeros(())}
        return {"kernel": kernel, "bias": jnp.zeros(classes)}, seen

    def logits(params: Params, features: Array, mean: Array, variance: Array) -> Array:
        features = (features - mean) * jax.lax.rsqrt(variance + 1e-6)
        return jnp.dot(features, params["kernel"], precision=EXACT) + params["bias"]

    def loss(params: Params, state: Params, features: Array, labels: Array, key: jax.Array) -> tuple[Array, Params]:
        features = features.astype(jnp.float32)
        now = {"mean": features.mean(0), "square": jnp.square(features).mean(0), "weight": jnp.ones(())}
        state = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, now)
        scores = logits(params, features, now["mean"], features.var(0))
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), state

    def predict(params: Params, state: Params, features: Array) -> Array:
        # Divided by the weight so far: the averages began at 0, and a short training must not suffer from it.
        mean, square = (state[name] / state["weight"] for name in ("mean", "square"))
        return classes_of(logits(params, features.astype(jnp.float32), mean, square - jnp.square(mean)))

    return Head(init, loss, predict)


class AttentionProbe(nnx.Module):
    """One block of cross-attention from a learned query to a layer's tokens, then a linear map: [B, N, D] → [B, C].

    LayerNorm of the tokens, the tower's own form of attention pooling (attention, LayerNorm, MLP around which the
    pooled vector is added), and a classifier. This is the plain form, which says what the head is; `attention` computes
    the same from the same parameters for a fraction of the cost.

    Source: AIMv2's attentive probe (arXiv 2411.14402), by which PE probes its layers (§3, Fig. 8 and Tab. 8).
    """

    def __init__(self, width: int, heads: int, classes: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, dtype="float32", rngs=rngs)
        self.pool = AttentionPool(width, heads, dtype="float32", rngs=rngs)
        self.classifier = Dense(width, classes, ("embed", "vocab"), dtype="float32", rngs=rngs)

    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B C"]:
        return self.classifier(self.pool(self.norm(tokens)))


@functools.cache
def attention(width: int, heads: int, classes: int) -> Head:
    """`AttentionProbe` as a head of tokens [B, N, D], at 4·N·D·heads FLOPs for the tokens rather than 4·N·D²."""

    def init(key: jax.Array) -> tuple[Params, Params]:
        return split(AttentionProbe(width, heads, classes, rngs=nnx.Rngs(key)))[1], {}

    def loss(params: Params, state: Params, tokens: Array, labels: Array, key: jax.Array) -> tuple[Array, Params]:
        scores = attention_logits(params, tokens, heads)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), state

    def predict(params: Params, state: Params, tokens: Array) -> Array:
        return classes_of(attention_logits(params, tokens, heads))

    return Head(init, loss, predict)


def attention_logits(params: Params, tokens: Float[Array, "B N D"], heads: int) -> Float[Array, "B C"]:
    """`AttentionProbe` with these parameters, where no token is ever multiplied by a D x D matrix.

    There is one query, the same for all images. A head's q·(W x + b) is therefore (Wᵀ q)·x and a constant, which the
    softmax does not see: D numbers a head, made once. The values' map is linear and the weights add up to 1, so it may
    follow the weighted mean of the tokens, one vector a head. LayerNorm's mean, deviation, scale and bias go the same
    way, so that the tokens are read as they are and no normalised copy of them is made.
    """
    pool, width = params["pool"], tokens.shape[-1]
    kernel = pool["attention"]["qkv"]["kernel"].reshape(width, heads, 3, -1)
    bias = pool["attention"]["qkv"]["bias"].reshape(heads, 3, -1)
    scale, shift = params["norm"]["scale"], params["norm"]["bias"]

    query = jnp.einsum("d,dkh->kh", pool["probe"].reshape(width), kernel[:, :, 0], precision=EXACT) + bias[:, 0]
    query = query * kernel.shape[-1] ** -0.5
    asked = scale[:, None] * jnp.einsum("dkh,kh->dk", kernel[:, :, 1], query, precision=EXACT)

    x = tokens.astype(jnp.float32)
    mean, inverse = x.mean(-1), jax.lax.rsqrt(x.var(-1) + EPSILON)
    logits = jnp.einsum("bnd,dk->bkn", x, asked, precision=EXACT) - mean[:, None] * asked.sum(0)[:, None]
    weights = jax.nn.softmax(logits * inverse[:, None], -1) * inverse[:, None]

    seen = jnp.einsum("bkn,bnd->bkd", weights, x, precision=EXACT)
    seen = (seen - jnp.einsum("bkn,bn->bk", weights, mean, precision=EXACT)[..., None]) * scale + shift
    values = jnp.einsum("bkd,dkh->bkh", seen, kernel[:, :, 2], precision=EXACT) + bias[:, 2]

    pooled = _dense(pool["attention"]["out"], values.reshape(len(tokens), width))
    middle = (pooled - pooled.mean(-1, keepdims=True)) * jax.lax.rsqrt(pooled.var(-1, keepdims=True) + EPSILON)
    middle = middle * pool["norm"]["scale"] + pool["norm"]["bias"]
    pooled = pooled + _dense(pool["mlp"]["down"], gelu(_dense(pool["mlp"]["up"], middle)))
    return _dense(params["classifier"], pooled)


def _dense(params: Params, x: Array) -> Array:
    return jnp.dot(x, params["kernel"], precision=EXACT) + params["bias"]


def classes_of(logits: Float[Array, "B C"]) -> Int[Array, "B"]:
    """The class with the highest logit; -1 where one is not finite, as after a rate that was too high."""
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)


@functools.partial(jax.jit, static_argnames=("iterations",))
def logistic(
    features: Float[Array, "N D"],
    labels: Int[Array, "N"],
    penalty: Float[Array, ""] | float,
    begin: tuple[Float[Array, "D C"], Float[Array, "C"]],
    *,
    iterations: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[tuple[Float[Array, "D C"], Float[Array, "C"]], Int[Array, ""], Float[Array, ""]]:
    """Multinomial logistic regression at the optimum, which is the one of scikit-learn's with C = 1 / (N · penalty).

    Minimises mean cross-entropy + penalty / 2 · |kernel|², the intercept free, by L-BFGS. It searches along features
    brought to mean 0 and deviation 1, with the penalty taken along: the optimum stays where it is, and comes into
    reach in tens of steps where raw features take thousands.

    Args:
      features: [N, D].
      labels: [N] classes below C; rows of -1 do not count.
      penalty: of the squared kernel, above 0.
      begin: kernel and intercept to start from, such as those of a higher penalty.
      iterations: after so many steps it stops in any case.
      tolerance: it stops when no entry of the gradient is larger.

    Returns:
      Kernel and intercept; the steps taken; the largest entry of the gradient that is left.
    """
    weight = (labels >= 0) / (labels >= 0).sum()
    mean = weight @ features
    deviation = jnp.sqrt(weight @ jnp.square(features - mean))
    deviation = jnp.maximum(deviation, 1e-3 * deviation.max() + 1e-30)  # any positive numbers keep the optimum
    x = (features - mean) / deviation

    def objective(point: tuple[Array, Array]) -> Array:
        kernel, intercept = point
        scores = jnp.dot(x, kernel, precision=EXACT) + intercept
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(labels, 0))
        return weight @ losses + penalty / 2 * jnp.square(kernel / deviation[:, None]).sum()

    search = optax.lbfgs(memory_size=20)
    value_and_gradient = optax.value_and_grad_from_state(objective)

    def left(state: Any) -> Array:
        return jnp.max(jnp.array([jnp.abs(leaf).max() for leaf in jax.tree.leaves(optax.tree.get(state, "grad"))]))

    def going(carry: Any) -> Array:
        _, state, step = carry
        return (step == 0) | ((step < iterations) & (left(state) > tolerance))

    def move(carry: Any) -> Any:
        point, state, step = carry
        value, gradient = value_and_gradient(point, state=state)
        updates, state = search.update(gradient, state, point, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(point, updates), state, step + 1

    kernel, intercept = begin
    point = kernel * deviation[:, None], intercept + jnp.dot(mean, kernel, precision=EXACT)
    point, state, steps = jax.lax.while_loop(going, move, (point, search.init(point), jnp.int32(0)))
    kernel = point[0] / deviation[:, None]
    return (kernel, point[1] - jnp.dot(mean, kernel, precision=EXACT)), steps, left(state)

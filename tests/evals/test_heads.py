"""The heads against plain forms of themselves and scikit-learn; every axis of its own size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pe_jax.evals import heads
from pe_jax.types import split

EXAMPLES, TOKENS, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4


@pytest.fixture(scope="module")
def probe():
    """The plain module, every parameter random, and tokens whose mean is not 0 and which differ in size."""
    rng = np.random.default_rng(0)
    graphdef, params = split(heads.AttentionProbe(WIDTH, HEADS, CLASSES, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32), params)
    tokens = rng.standard_normal((EXAMPLES, TOKENS, WIDTH), np.float32) * rng.uniform(1, 9, (1, TOKENS, 1)) + 2
    return graphdef, params, jnp.asarray(tokens, jnp.float32), jnp.asarray(rng.integers(0, CLASSES, EXAMPLES))


def test_the_cheap_attention_probe_equals_the_plain_one_value_and_gradient(probe):
    graphdef, params, tokens, labels = probe
    np.testing.assert_allclose(
        heads.attention_logits(params, tokens, HEADS), nnx.merge(graphdef, params)(tokens), rtol=1e-5, atol=1e-5
    )

    def plain(params):
        logits = nnx.merge(graphdef, params)(jnp.asarray(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def cheap(params):
        return heads.attention(WIDTH, HEADS, CLASSES).loss(params, {}, tokens, labels, jax.random.key(0))[0]

    found, wanted = jax.jit(jax.grad(cheap))(params), jax.jit(jax.grad(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_the_cheap_attention_probe_does_a_fraction_of_the_work():
    """FLOPs a token grow with width · heads, those of the plain one with width²."""
    width, count, classes = 64, 4, 2
    params = heads.attention(width, count, classes).init(jax.random.key(0))[0]
    graphdef, _ = split(heads.AttentionProbe(width, count, classes, rngs=nnx.Rngs(0)))

    def flops(function, tokens):
        compiled = jax.jit(function).lower(params, jnp.zeros((1, tokens, width))).compile()
        return compiled.cost_analysis()["flops"]

    cheap, plain = (
        (flops(function, 500) - flops(function, 100)) / 400
        for function in (lambda p, x: heads.attention_logits(p, x, count), lambda p, x: nnx.merge(graphdef, p)(x))
    )
    assert cheap < 2 * 4 * width * count < 4 * width**2 < plain


def test_linear_normalises_with_its_batch_in_training_and_with_averages_afterwards():
    rng = np.random.default_rng(1)
    head = heads.linear(WIDTH, CLASSES)
    params, state = head.init(jax.random.key(2))
    params = {"kernel": params["kernel"] * 100, "bias": rng.standard_normal(CLASSES).astype(np.float32)}
    batches = jnp.asarray(rng.standard_normal((3, 9, WIDTH)).astype(np.float32) * 40 + 7)
    labels = jnp.asarray(rng.integers(0, CLASSES, 9))
    weights = np.array([0.9**2, 0.9, 1]) / (0.9**2 + 0.9 + 1)
    for batch in batches:
        value, state = head.loss(params, state, batch, labels, jax.random.key(0))
        logits = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-6) @ params["kernel"] + params["bias"]
        wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
    mean = np.einsum("s,sd->d", weights, batches.mean(1))
    variance = np.einsum("s,sd->d", weights, np.square(batches).mean(1)) - mean**2
    logits = (batches[0] - mean) / np.sqrt(variance) @ params["kernel"] + params["bias"]
    np.testing.assert_array_equal(head.predict(params, state, batches[0]), logits.argmax(1))


def test_a_logit_that_is_not_finite_counts_as_wrong():
    logits = jnp.array([[0.0, 2.0], [jnp.nan, 1.0], [jnp.inf, 0.0]])
    np.testing.assert_array_equal(heads.classes_of(logits), [1, -1, -1])


# Features of different size and mean, as raw ones are; many and few of them; weak and strong penalties.
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_is_at_scikit_learns_optimum(c):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    count, width, classes = 80, 6, 3
    labels = rng.integers(0, classes, count)
    x = rng.standard_normal((classes, width))[labels] + 1.5 * rng.standard_normal((count, width))
    x = (x * np.array([0.1, 1, 1, 3, 10, 0.5]) + 2).astype(np.float32)
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(x.astype(np.float64), labels)
    start = jnp.zeros((width, classes)), jnp.zeros(classes)
    padded = np.concatenate([x, 1e3 * np.ones((5, width), np.float32)]), np.concatenate([labels, np.full(5, -1)])
    (kernel, intercept), steps, left = heads.logistic(*padded, 1 / (c * count), start)
    assert left <= 1e-5 and 2 < steps < 200
    # The optimum is flat: a gradient of 1e-5 leaves this much.
    np.testing.assert_allclose(kernel, reference.coef_.T, rtol=2e-3, atol=2e-3 * np.abs(reference.coef_).max())
    centred = np.asarray(intercept) - np.mean(intercept)  # only differences of intercepts mean anything
    np.testing.assert_allclose(centred, reference.intercept_ - reference.intercept_.mean(), rtol=2e-3, atol=5e-3)
    np.testing.assert_array_equal((x @ kernel + intercept).argmax(1), reference.predict(x))

"""Heads of three layers at two rates, trained together; every axis of its own size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pe_jax import sharding
from pe_jax.evals.fit import fit

LAYERS, RATES, STEPS, EXAMPLES, WIDTH, CLASSES = 3, (0.03, 0.3), 5, 8, 6, 4
TRANSFORM = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, STEPS)))


def init(key):
    return {"kernel": jax.random.normal(key, (WIDTH, CLASSES))}, {"seen": jnp.zeros(WIDTH)}


def loss(params, state, features, targets, key):
    keep = jax.random.bernoulli(key, 0.7, features.shape)
    logits = jnp.where(keep, features, 0) @ params["kernel"]
    value = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return value, {"seen": state["seen"] + features.sum(0)}


def logits(params, state, features):
    return features @ params["kernel"] + 0 * state["seen"].sum()


def batches(layers=slice(None), examples=EXAMPLES):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        features = rng.standard_normal((LAYERS, EXAMPLES, WIDTH)).astype(np.float32)
        yield features[layers, :examples], rng.integers(0, CLASSES, EXAMPLES)[:examples]


def fitted(batches, layers=LAYERS, rates=RATES, **options):
    return fit(init, loss, batches, layers=layers, rates=rates, transform=TRANSFORM, **options)


@pytest.fixture(scope="module")
def together():
    return fitted(batches())


def test_heads_equal_those_of_a_plain_loop(together):
    for layer, rate in ((0, 0), (2, 1)):
        params, state = init(jax.random.key(0))
        moments = TRANSFORM.init(params)
        for step, (features, targets) in enumerate(batches()):
            key = jax.random.fold_in(jax.random.key(0), step)
            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, features[layer], targets, key)
            np.testing.assert_allclose(together.losses[step, layer, rate], value, rtol=1e-5)
            updates, moments = TRANSFORM.update(grads, moments, params)
            params = optax.apply_updates(params, jax.tree.map(lambda u: RATES[rate] * u, updates))  # noqa: B023
        found = together.head(layer, rate)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, (params, state))


def test_a_head_in_a_sweep_equals_the_head_alone(together):
    alone = fitted(batches(slice(1, 2)), layers=1, rates=RATES[1:])
    np.testing.assert_allclose(alone.losses[:, 0, 0], together.losses[:, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(alone.params["kernel"][0, 0], together.params["kernel"][1, 1], rtol=1e-5, atol=1e-6)


def test_one_heads_divergence_leaves_the_others_alone(together):
    wild = fitted(batches(), rates=(*RATES, 1e38))
    assert not np.isfinite(wild.losses[-1, :, 2]).any()
    np.testing.assert_allclose(wild.losses[:, :, :2], together.losses, rtol=1e-5)


def test_large_heads_layer_by_layer_equal_all_at_once(together):
    large = fitted(batches(), large=True)
    np.testing.assert_allclose(large.losses, together.losses, rtol=1e-5)
    for name in ("params", "state"):
        both = getattr(large, name), getattr(together, name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)
    features = next(batches())[0]
    np.testing.assert_allclose(large.apply(logits, features), together.apply(logits, features), rtol=1e-4, atol=1e-5)
    heads = large.head(2, 1), together.head(2, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *heads)


# 3 layers and 2 rates on 8, 6 and 3 devices: cut by rate and example; by rate and layer; by layer. 8 examples are no
# multiple of some of these ways, and 5 of none.
@pytest.mark.parametrize(("devices", "examples", "large"), [(8, 8, False), (8, 5, True), (6, 8, False), (3, 8, True)])
def test_devices_share_the_heads_and_give_the_same(devices, examples, large):
    mesh = sharding.make_mesh({"data": -1}, jax.devices()[:devices])
    spread, plain = fitted(batches(examples=examples), mesh=mesh, large=large), fitted(batches(examples=examples))
    kernel = spread.params["kernel"]
    assert len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.size < kernel.size
    np.testing.assert_allclose(spread.losses, plain.losses, rtol=1e-5)
    np.testing.assert_allclose(kernel, plain.params["kernel"], rtol=1e-5, atol=1e-6)
    features = next(batches())[0]
    found = spread.apply(logits, features)
    assert found.shape == (LAYERS, len(RATES), EXAMPLES, CLASSES)
    np.testing.assert_allclose(found, plain.apply(logits, features), rtol=1e-4, atol=1e-5)


def test_devices_take_their_own_layers_in_turn():
    """6 layers at 1 rate on 2 devices: each has three of them, one in each turn."""
    rng = np.random.default_rng(0)
    six = [
        (rng.standard_normal((6, EXAMPLES, WIDTH)).astype(np.float32), rng.integers(0, CLASSES, EXAMPLES))
        for _ in range(2)
    ]
    mesh = sharding.make_mesh({"data": -1}, jax.devices()[:2])
    spread, plain = fitted(six, 6, RATES[:1], mesh=mesh, large=True), fitted(six, 6, RATES[:1])
    np.testing.assert_allclose(spread.losses, plain.losses, rtol=1e-5)
    np.testing.assert_allclose(spread.apply(logits, six[0][0]), plain.apply(logits, six[0][0]), rtol=1e-4, atol=1e-5)
    for layer in range(6):
        found, wanted = (one.head(layer, 0)[0]["kernel"] for one in (spread, plain))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(spread.params["kernel"][layer, 0], wanted, rtol=1e-5, atol=1e-6)


def test_no_device_idles_whatever_the_numbers_of_layers_and_rates():
    mesh = sharding.make_mesh()
    for layers, rates in ((13, 1), (12, 6), (1, 5), (51, 12)):
        cut, *_ = sharding.heads_mesh(mesh, layers, rates)
        assert cut.size == 8 and layers % cut.shape["layers"] == 0 and rates % cut.shape["rates"] == 0


def test_batches_of_different_sizes_follow_each_other():
    def uneven():
        for size, (features, targets) in zip((8, 8, 3), batches(), strict=False):
            yield {"tokens": features[:, :size]}, targets[:size]

    def nested(params, state, features, targets, key):
        return loss(params, state, features["tokens"], targets, key)

    found = fit(init, nested, uneven(), layers=LAYERS, rates=RATES, transform=TRANSFORM)
    assert found.losses.shape == (3, LAYERS, 2)
    np.testing.assert_allclose(found.state["seen"][:, 0], sum(f["tokens"].sum(1) for f, _ in uneven()), rtol=1e-4)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="gave none"):
        fitted([])
    with pytest.raises(ValueError, match=r"rates=\(0.1, -1\) must be one or more positive"):
        fitted(batches(), rates=(0.1, -1))
    with pytest.raises(ValueError, match="rates="):
        fitted(batches(), rates=())
    with pytest.raises(ValueError, match="layers=0"):
        fitted(batches(), layers=0)
    with pytest.raises(ValueError, match=r"features have shape \(3, 8, 6\); want \[4, examples"):
        fitted(batches(), layers=4)

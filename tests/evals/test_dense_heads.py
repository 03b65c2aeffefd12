"""Losses, layers and heads of dense probes against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pe_jax.evals import dense_heads
from pe_jax.evals.dense_heads import BINS, FARTHEST, IGNORED, NEAREST

WIDTH, GRID, SIDE, IMAGES = 16, 3, 12, 2
random = np.random.default_rng(0)


def tokens(images=IMAGES):
    return jnp.asarray(random.normal(size=(images, GRID**2, WIDTH)).astype(np.float32))


def large(x, side=SIDE):
    return jax.image.resize(x, (len(x), side, side, x.shape[-1]), "bilinear")


@pytest.mark.parametrize("side", [12, 14])
def test_cross_entropy_in_bands_is_that_of_enlarged_logits(side):
    logits = jnp.asarray(random.normal(size=(IMAGES, GRID, GRID, 5)).astype(np.float32))
    labels = random.integers(0, 5, (IMAGES, side, side)).astype(np.int32)
    labels[0, :5] = labels[1, 3, 2] = IGNORED

    def plain(logits):
        nats = optax.softmax_cross_entropy_with_integer_labels(large(logits, side), np.maximum(labels, 0))
        return nats[labels != IGNORED].mean()

    ours = jax.value_and_grad(dense_heads.cross_entropy)(logits, jnp.asarray(labels))
    for a, b in zip(ours, jax.value_and_grad(plain)(logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_pixels_that_do_not_count_change_nothing():
    head = dense_heads.segmentation(WIDTH, 4, GRID, SIDE)
    params, state = head.init(jax.random.key(0))
    x, key = tokens(), jax.random.key(1)
    labels = random.integers(0, 4, (IMAGES, SIDE, SIDE)).astype(np.int32)
    labels[0] = IGNORED
    grads = jax.grad(lambda p: head.loss(p, state, x, jnp.asarray(labels), key)[0])(params)
    # Batch norm sees all tokens; the logits of the image that does not count are of no consequence.
    logits = jnp.asarray(random.normal(size=(IMAGES, GRID, GRID, 4)).astype(np.float32))
    moved = logits.at[0].add(3.0)
    one, two = (dense_heads.cross_entropy(z, jnp.asarray(labels)) for z in (logits, moved))
    assert one == two and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    nothing = jnp.full((IMAGES, SIDE, SIDE), IGNORED)
    value, grads = jax.value_and_grad(lambda p: head.loss(p, state, x, nothing, key)[0])(params)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_the_linear_head_is_batch_norm_and_a_linear_map():
    head = dense_heads.segmentation(WIDTH, 4, GRID, SIDE, 0.0)
    params, state = head.init(jax.random.key(0))
    params["scale"], params["shift"] = params["scale"] * 1.5, params["shift"] + 0.3
    x = tokens()
    labels = random.integers(0, 4, (IMAGES, SIDE, SIDE)).astype(np.int32)
    value, state = head.loss(params, state, x, jnp.asarray(labels), jax.random.key(1))
    flat = np.asarray(x, np.float64).reshape(-1, WIDTH)
    normed = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * 1.5 + 0.3
    logits = (normed @ np.asarray(params["kernel"], np.float64)).reshape(IMAGES, GRID, GRID, 4)
    nats = optax.softmax_cross_entropy_with_integer_labels(large(jnp.asarray(logits, jnp.float32)), labels)
    np.testing.assert_allclose(value, nats.mean(), rtol=1e-5)
    # After one batch its averages are that batch's statistics, however little they weigh.
    np.testing.assert_allclose(head.predict(params, state, x), logits, atol=1e-4)


def test_dropout_leaves_out_channels_of_an_image():
    head = dense_heads.segmentation(WIDTH, 2, GRID, SIDE, 0.5)
    params, state = head.init(jax.random.key(0))
    labels = jnp.zeros((IMAGES, SIDE, SIDE), jnp.int32)
    x = tokens()
    values = [head.loss(params, state, x, labels, jax.random.key(i))[0] for i in range(4)]
    assert len(set(map(float, values))) == 4
    np.testing.assert_array_equal(head.loss(params, state, x, labels, jax.random.key(0))[0], values[0])


def test_depth_is_the_mean_of_the_bins():
    logits = np.full((2, BINS), -1.0, np.float32)
    logits[1, BINS - 1] = 1e6
    found = dense_heads.expected_depth(jnp.asarray(logits))
    np.testing.assert_allclose(found, [(NEAREST + FARTHEST) / 2, FARTHEST], rtol=1e-4)


def test_the_scale_invariant_loss_is_its_formula_over_valid_pixels():
    found = random.uniform(0.5, 9, (2, 5, 4)).astype(np.float32)
    true = random.uniform(0.5, 9, (2, 5, 4)).astype(np.float32)
    true[0, :2] = 0
    error = np.log(found[true > 0] + 1e-3) - np.log(true[true > 0] + 1e-3)
    wanted = np.sqrt(error.var(ddof=1) + 0.15 * error.mean() ** 2)
    np.testing.assert_allclose(dense_heads.scale_invariant(jnp.asarray(found), jnp.asarray(true)), wanted, rtol=1e-5)
    for none in (np.zeros_like(true), found):  # no valid pixel; no error
        value, slope = jax.value_and_grad(dense_heads.scale_invariant)(jnp.asarray(found), jnp.asarray(none))
        assert value == 0 and np.isfinite(slope).all()


def test_convolutions_are_xlas():
    x = jnp.asarray(random.normal(size=(IMAGES, 5, 4, 3)).astype(np.float32))
    params = dense_heads._conv(jax.random.key(0), 3, 6)
    wanted = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(dense_heads._convolved(params, x), wanted + params["bias"], atol=1e-5)
    params = dense_heads._linear(jax.random.key(0), 3, 6, 4)
    kernel = params["kernel"].reshape(3, 2, 2, 6).transpose(1, 2, 0, 3)[::-1, ::-1]
    wanted = jax.lax.conv_transpose(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(dense_heads._spread(params, x, 2), wanted + params["bias"], atol=1e-5)


@pytest.mark.parametrize(("make", "times"), [(dense_heads.linear_depth, 4), (dense_heads.dpt_depth, 8)])
def test_depth_heads_give_metres_on_a_finer_grid_and_a_slope_to_every_parameter(make, times):
    head = make(WIDTH, GRID, SIDE)
    params, state = head.init(jax.random.key(0))
    true = jnp.asarray(random.uniform(1, 9, (IMAGES, SIDE, SIDE)).astype(np.float32))

    @jax.jit
    def both(params, state, x):
        (value, state), grads = jax.value_and_grad(head.loss, has_aux=True)(params, state, x, true, jax.random.key(1))
        return value, grads, head.predict(params, state, x)

    value, grads, found = both(params, state, tokens())
    assert head.grid == times * GRID and found.shape == (IMAGES, head.grid, head.grid, 1)
    assert found.min() > NEAREST and found.max() < FARTHEST and np.isfinite(value)
    dead = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(grads) if not leaf.any()]
    assert not dead


def test_dpt_does_not_see_how_large_tokens_are():
    head = dense_heads.dpt_depth(WIDTH, GRID, SIDE)
    params, state = head.init(jax.random.key(0))
    x, predict = tokens(), jax.jit(head.predict)
    np.testing.assert_allclose(predict(params, state, 1000 * x + 7), predict(params, state, x), rtol=1e-3)


def test_dpt_is_as_wide_as_the_tower_asks_for():
    key = jax.random.key(0)
    small, wide = (jax.eval_shape(dense_heads.dpt_depth(w, GRID, SIDE).init, key)[0] for w in (64, 128))
    assert small["project_3"]["kernel"].shape == (64, 64) and wide["project_0"]["kernel"].shape == (128, 16)
    assert small["bins"]["kernel"].shape == (3, 3, 16, BINS) and wide["bins"]["kernel"].shape == (3, 3, 32, BINS)

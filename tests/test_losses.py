"""The contrastive losses: their formula, and the chunked form equal to the plain one, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_jax import losses, sharding
from pe_jax.models.clip import unit


def pairs(batch, width=12, seed=0):
    """Unit embeddings in which captions are close to their images, but not always the closest."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch, width)).astype(np.float32)
    text = image + 1.5 * rng.standard_normal((batch, width)).astype(np.float32)
    return unit(jnp.asarray(image)), unit(jnp.asarray(text))


def value_and_gradients(loss, *inputs):
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return {"loss": value, **metrics, "by image": grads[0], "by text": grads[1], "by log_scale": grads[2]}


def same(got, want, rtol=1e-5):
    for name in want:
        error = np.linalg.norm(np.asarray(got[name]) - want[name]) / np.linalg.norm(want[name])
        assert error < rtol, (name, error)


def test_info_nce_is_log_b_without_information_and_falls_with_it():
    same = jnp.ones((6, 5)) / 5**0.5
    loss, _ = losses.info_nce(same, same, jnp.asarray(3.0))
    np.testing.assert_allclose(loss, np.log(6), rtol=1e-6)
    apart = jnp.eye(6, 7)
    loss, metrics = losses.info_nce(apart, apart, jnp.asarray(3.0))
    np.testing.assert_allclose(loss, np.log1p(5 * np.exp(-np.exp(3.0))), atol=1e-6)
    assert metrics["accuracy"] == 1


def test_info_nce_equals_its_formula_in_numpy():
    rng = np.random.default_rng(3)
    image, text = (np.asarray(unit(jnp.asarray(rng.standard_normal((9, 5)), jnp.float32))) for _ in "ab")
    logits = np.exp(1.7) * image.astype(np.float64) @ text.astype(np.float64).T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss, _ = losses.info_nce(jnp.asarray(image), jnp.asarray(text), jnp.asarray(1.7))
    np.testing.assert_allclose(loss, (rows.mean() + columns.mean()) / 2, rtol=1e-6)


LOG_SCALES = {"start": np.log(1 / 0.07), "cap": losses.MAX_LOG_SCALE}


@pytest.mark.parametrize("log_scale", LOG_SCALES.values(), ids=LOG_SCALES)
@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
def test_the_chunked_loss_is_the_plain_one_on_one_device(chunk, log_scale):
    inputs = (*pairs(40), jnp.asarray(log_scale, jnp.float32))
    want = value_and_gradients(losses.info_nce, *inputs)
    assert 0 < want["accuracy"] < 1
    same(value_and_gradients(lambda *x: losses.info_nce_chunked(*x, chunk=chunk), *inputs), want)


@pytest.mark.parametrize("log_scale", LOG_SCALES.values(), ids=LOG_SCALES)
@pytest.mark.parametrize(
    ("shape", "chunk"), [({"data": 8}, 16), ({"data": 2, "fsdp": 4}, 11), ({"data": 2, "fsdp": 2, "tensor": 2}, 64)]
)
def test_the_chunked_loss_on_a_mesh_is_the_plain_one_on_one_device(shape, chunk, log_scale):
    image, text = pairs(48)
    log_scale = jnp.asarray(log_scale, jnp.float32)
    want = value_and_gradients(losses.info_nce, image, text, log_scale)
    mesh = sharding.make_mesh(shape)
    cut = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        inputs = jax.device_put(image, cut), jax.device_put(text, cut), jax.device_put(log_scale)
        same(value_and_gradients(lambda *x: losses.info_nce_chunked(*x, chunk=chunk), *inputs), want)


def test_bfloat16_embeddings_give_the_loss_to_their_own_precision():
    inputs = (*pairs(40), jnp.asarray(np.log(20), jnp.float32))
    want = value_and_gradients(losses.info_nce, *inputs)
    got = value_and_gradients(lambda *x: losses.info_nce_chunked(*x, chunk=16, dtype=jnp.bfloat16), *inputs)
    assert got["by image"].dtype == jnp.float32
    same(got, want, rtol=0.02)  # bfloat16 keeps 8 bits, and a scale of 20 multiplies the error of a cosine
    assert float(got["loss"]) != float(want["loss"])


def test_identical_texts_tie_and_a_tie_counts_as_right_in_both_forms():
    image, _ = pairs(6)
    text = jnp.broadcast_to(image[:1], image.shape)
    scale = jnp.asarray(1.0)
    assert losses.info_nce(image, text, scale)[1]["accuracy"] == 1
    assert losses.info_nce_chunked(image, text, scale, chunk=4)[1]["accuracy"] == 1


@pytest.mark.parametrize("loss", [losses.info_nce, losses.info_nce_chunked])
def test_pairs_of_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"image embeddings \(4, 3\) and text embeddings \(5, 3\)"):
        loss(jnp.ones((4, 3)), jnp.ones((5, 3)), jnp.asarray(1.0))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        losses.info_nce_chunked(jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.asarray(1.0), chunk=0)

"""The contrastive losses: their formula, and the chunked form equal to the plain one, value and gradients."""

import functools

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


# ---------------------------------------------------------------------------------------------------------- next token


def sentences(rows=8, length=5, vocab=24, width=12, dtype=jnp.float32):
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.standard_normal((rows, length, width)), dtype)
    table = jnp.asarray(rng.standard_normal((vocab, width)), jnp.float32)
    targets = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    weights = rng.uniform(0.5, 2, (rows, length)).astype(np.float32) * (rng.random((rows, length)) < 0.6)
    targets[weights == 0] = -100  # no id at all where nothing is asked
    return hidden, table, jnp.asarray(targets), jnp.asarray(weights)


def plain_next_token(hidden, table, targets, weights):
    logits = jnp.einsum("bld,vd->blv", hidden.astype(jnp.float32), table)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    right = jnp.argmax(logits, -1) == targets
    return -jnp.sum(weights * picked) / weights.sum(), {
        "tokens": weights.sum(),
        "accuracy": jnp.sum(weights * right) / weights.sum(),
    }


def next_token_results(loss, hidden, table, targets, weights, by=(0, 1)):
    def scaled(hidden, table):
        value, metrics = loss(hidden, table, targets, weights)
        return 3 * value, metrics  # a gradient comes in that is not 1

    (value, metrics), grads = jax.jit(jax.value_and_grad(scaled, by, has_aux=True))(hidden, table)
    return {"loss": value, **metrics, **{f"by {i}": g for i, g in zip(by, grads, strict=True)}}


@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
def test_the_chunked_next_token_loss_is_the_plain_one(chunk):
    want = next_token_results(plain_next_token, *sentences())
    assert 0 < want["accuracy"] < 1
    same(next_token_results(functools.partial(losses.next_token, chunk=chunk), *sentences()), want)


@pytest.mark.parametrize("by", [(0,), (1,)], ids=["hidden", "table"])
def test_the_next_token_loss_has_the_same_gradient_where_the_other_is_frozen(by):
    same(
        next_token_results(losses.next_token, *sentences(), by=by),
        next_token_results(plain_next_token, *sentences(), by=by),
    )


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"fsdp": 2, "tensor": 4}, {"dcn": 2, "fsdp": 2, "tensor": 2}], ids=lambda s: "-".join(s)
)
def test_the_next_token_loss_on_a_mesh_is_the_plain_one(shape):
    want = next_token_results(plain_next_token, *sentences())
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        hidden, table, *rest = sentences()
        cut = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (hidden, *rest)]
        table = jax.device_put(table, jax.NamedSharding(mesh, sharding.spec(mesh, "vocab", "embed")))
        got = next_token_results(functools.partial(losses.next_token, chunk=3), cut[0], table, *cut[1:])
        assert got["by 1"].sharding.is_equivalent_to(table.sharding, 2)
    same(got, want)


def test_the_mean_of_micro_batches_weighted_by_tokens_is_that_of_the_whole():
    whole, metrics = losses.next_token(*sentences())
    hidden, table, *rest = sentences()
    halves = [losses.next_token(hidden[i : i + 4], table, *(x[i : i + 4] for x in rest)) for i in (0, 4)]
    counts = [more["tokens"] for _, more in halves]
    assert counts[0] != counts[1]
    mean = sum(value * count for (value, _), count in zip(halves, counts, strict=True)) / sum(counts)
    np.testing.assert_allclose(mean, whole, rtol=1e-6)
    np.testing.assert_allclose(sum(counts), metrics["tokens"], rtol=1e-6)


def test_the_next_token_loss_of_no_token_is_zero_and_so_are_its_gradients():
    hidden, table, targets, weights = sentences()
    got = next_token_results(losses.next_token, hidden, table, targets, 0 * weights)
    assert all(not np.any(value) for value in got.values()), got


def test_the_next_token_loss_in_bfloat16_sums_in_float32():
    inputs = sentences(rows=16, length=32, dtype=jnp.bfloat16)
    got = next_token_results(functools.partial(losses.next_token, chunk=8, gradient_dtype="float32"), *inputs)
    want = next_token_results(plain_next_token, *inputs)
    assert got["by 0"].dtype == jnp.bfloat16 and got["by 1"].dtype == jnp.float32
    same(got, want, rtol=1e-2)


def test_the_memory_of_the_next_token_loss_does_not_grow_with_the_tokens():
    def temporary(length):
        shapes = ((4, length, 8), (4096, 8), (4, length), (4, length))
        dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
        inputs = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
        grad = jax.grad(lambda *x: losses.next_token(*x, chunk=16)[0], (0, 1))
        return jax.jit(grad).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 512 * 4096 * 4
    assert temporary(512) < logits / 8
    assert temporary(512) - temporary(64) < logits / 32


@pytest.mark.parametrize(("position", "chunk", "message"), [(0, 1, "must be"), (2, 1, "must be"), (None, 0, "chunk=0")])
def test_what_the_next_token_loss_cannot_score_is_refused(position, chunk, message):
    inputs = list(sentences())
    if position is not None:
        inputs[position] = inputs[position][:, 1:]
    with pytest.raises(ValueError, match=message):
        losses.next_token(*inputs, chunk=chunk)

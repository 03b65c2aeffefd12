import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax.models.layers import Dense, attend, drop_path, resolve_layers, rope_2d, rotate
from tests.golden.weights import noise


def test_drop_path_keeps_the_expectation():
    x = jnp.ones((20_000, 1, 2))
    assert float(drop_path(x, 0.3, jax.random.key(0)).mean()) == pytest.approx(1, abs=0.02)


def test_drop_path_drops_whole_examples():
    x = jnp.asarray(noise(0, "x", (64, 3, 5)))
    out = np.asarray(drop_path(x, 0.5, jax.random.key(0)))
    dropped = np.all(out == 0, axis=(1, 2))
    assert 10 < dropped.sum() < 54
    np.testing.assert_allclose(out[~dropped], 2 * x[~dropped], rtol=1e-6)


@pytest.mark.parametrize("rate, key", [(0.5, None), (0.0, 1)])
def test_drop_path_without_key_or_rate_does_nothing(rate, key):
    x = jnp.asarray(noise(0, "x", (4, 3, 5)))
    np.testing.assert_array_equal(drop_path(x, rate, None if key is None else jax.random.key(key)), x)


def test_rope_leaves_the_class_token_and_every_length_alone():
    x = jnp.asarray(noise(0, "x", (2, 1 + 3 * 4, 5, 8)))
    y = rotate(x, rope_2d(3, 4, 8, class_token=True))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


def test_rope_turns_adjacent_channels_first_half_by_column_second_by_row():
    x = jnp.asarray(noise(0, "x", (1, 3 * 4, 1, 8)))
    y = np.asarray(rotate(x, rope_2d(3, 4, 8, class_token=False)))[0, :, 0]
    frequencies = [1, 1e-2]  # theta^(-2k/4)
    for n in range(12):
        for pair, angle in enumerate([n % 4 * f for f in frequencies] + [n // 4 * f for f in frequencies]):
            a, b = np.asarray(x)[0, n, 0, 2 * pair : 2 * pair + 2]
            want = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
            np.testing.assert_allclose(y[n, 2 * pair : 2 * pair + 2], want, rtol=1e-5, atol=1e-6)


def test_rope_counts_from_one_beside_a_class_token():
    with_class, without = (rope_2d(2, 3, 8, class_token=flag)[0] for flag in (True, False))
    np.testing.assert_array_equal(with_class[0], np.ones(8))
    np.testing.assert_allclose(with_class[1], rope_2d(2, 4, 8, class_token=False)[0][5], rtol=1e-6)  # (1, 1)
    np.testing.assert_array_equal(without[0], np.ones(8))


def test_rope_needs_a_head_dim_of_four():
    with pytest.raises(ValueError, match="multiple of 4, got 6; change width or heads"):
        rope_2d(2, 2, 6, class_token=False)


def test_attention_is_a_softmax_average():
    q, k, v = (jnp.asarray(noise(0, name, (2, n, 3, 4))) for name, n in (("q", 5), ("k", 7), ("v", 7)))
    logits = np.einsum("bqkh,bnkh->bkqn", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attend(q, k, v), np.einsum("bkqn,bnkh->bqkh", weights, v), rtol=1e-5, atol=1e-6)


def test_causal_attention_does_not_see_later_tokens():
    q, k, v = (jnp.asarray(noise(0, name, (2, 6, 3, 4))) for name in "qkv")
    before = attend(q, k, v, causal=True)
    after = attend(q, k.at[:, 4:].add(1), v.at[:, 4:].add(1), causal=True)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.1


def test_layers_are_counted_from_one_and_from_the_end():
    assert resolve_layers((0, 1, 7, -1, -7), 7) == (0, 1, 7, 7, 1)


def kernel_gradient(gradient_dtype):
    dense = Dense(24, 40, ("embed", "mlp"), dtype="bfloat16", gradient_dtype=gradient_dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (6, 7, 24))
    return nnx.grad(lambda dense: jnp.sum(dense(x).astype(jnp.float32) ** 2))(dense).kernel[...]


def test_a_kernels_gradient_is_summed_in_the_dtype_asked_for():
    half, full = kernel_gradient(None), kernel_gradient("float32")
    assert half.dtype == full.dtype == jnp.float32
    rounded = [np.asarray(g.astype(jnp.bfloat16).astype(jnp.float32)) for g in (half, full)]
    np.testing.assert_array_equal(half, rounded[0])
    assert np.mean(np.asarray(full) == rounded[1]) < 0.1  # most numbers need more than bfloat16's 8 bits
    np.testing.assert_allclose(half, full, rtol=1e-2, atol=1e-2 * float(jnp.abs(full).max()))

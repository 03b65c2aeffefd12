"""The TPU kernel of attention, its steps interpreted, against the plain one; forward and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import sharding
from pe_jax.models import attention_tpu
from pe_jax.models.layers import KERNELS, attend, rope_2d, rotate, self_attend
from pe_jax.models.vision import VisionConfig, VisionTower
from tests.golden.weights import noise

# examples, tokens, heads, head width, (rows, columns, class token) of rope, causal
CASES = {
    "G at 42 px: heads of 96, no class token": (2, 9, 4, 96, (3, 3, False), False),
    "B and L: heads of 64 and a class token": (2, 13, 2, 64, (3, 4, True), False),
    "T: three heads fill no register": (1, 7, 3, 64, (2, 3, True), False),
    "G's text: causal, no rope": (3, 72, 2, 64, None, True),
    "more rows than are taken at a time": (1, 300, 2, 64, (15, 20, False), False),
    "more rows than are taken at a time, causal": (1, 300, 2, 64, None, True),
}


def both(case, dtype="float32"):
    """Output and gradient of the kernel, and of the plain formula on the same projections."""
    batch, tokens, heads, head_dim, grid, causal = CASES[case]
    rope = None if grid is None else rope_2d(grid[0], grid[1], head_dim, class_token=grid[2])
    qkv = jnp.asarray(noise(0, "qkv", (batch, tokens, heads * 3 * head_dim)), dtype)
    by_out = jnp.asarray(noise(0, "by_out", (batch, tokens, heads * head_dim)), dtype)

    def plain(qkv):
        parts = qkv.reshape(batch, tokens, heads, 3, head_dim)
        q, k, v = (parts[:, :, :, i] for i in range(3))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return attend(q, k, v, causal=causal).reshape(batch, tokens, -1)

    def fused(qkv):
        return self_attend(qkv, heads, rope, causal=causal, kernel="fused")

    for function in (fused, plain):
        out, pull = jax.vjp(function, qkv)
        yield np.asarray(out, np.float32), np.asarray(pull(by_out)[0], np.float32)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_and_its_gradient_equal_the_plain_formula(case):
    got, want = both(case)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_formula_is():
    case = "G at 42 px: heads of 96, no class token"
    exact, _ = both(case)
    got, plain = both(case, "bfloat16")
    for a, b, c in zip(got, plain, exact, strict=True):
        assert np.linalg.norm(a - c) < 1.2 * np.linalg.norm(b - c) < 0.02 * np.linalg.norm(c)


def test_a_tower_gives_the_same_with_any_kernel_that_runs_here():
    config = VisionConfig(24, 8, 128, 2, 2, 192, True, "attention", 20, layer_scale=0.1)
    images = jnp.asarray(noise(0, "images", (2, 24, 24, 3)))
    outs = []
    for kernel in ("auto", "xla", "fused"):
        tower = VisionTower(dataclasses.replace(config, attention=kernel), rngs=nnx.Rngs(0))
        outs.append(tower(images))
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-4, atol=1e-5)


def test_on_a_mesh_each_device_runs_the_kernel_on_its_examples_and_heads():
    case = (4, 9, 4, 96)
    qkv = jnp.asarray(noise(0, "qkv", (4, 9, 4 * 3 * 96)))
    rope = rope_2d(3, 3, 96, class_token=False)

    def run(qkv):
        return jnp.sum(jnp.sin(self_attend(qkv, case[2], rope, kernel="fused")))

    value, grad = jax.value_and_grad(run)(qkv)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(qkv, jax.NamedSharding(mesh, sharding.spec(mesh, "batch", None, "heads")))
        text = jax.jit(run).lower(placed).compile().as_text()
        again, grad_again = jax.jit(jax.value_and_grad(run))(placed)
    assert "all-gather" not in text and "all-to-all" not in text
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(grad_again, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "heads, head_dim, tokens, want",
    [(16, 96, 256, 4), (16, 96, 1024, 4), (16, 64, 50, 16), (20, 64, 72, 20), (3, 64, 577, 3), (16, 96, 49, 16)],
)
def test_a_block_holds_as_many_heads_as_fill_registers_and_fit(heads, head_dim, tokens, want):
    found = attention_tpu.heads_at_once(heads, head_dim, tokens, 2)
    assert found == want
    assert heads % found == 0 and (found == heads or found * head_dim % attention_tpu.LANES == 0)


def test_rows_that_do_not_fit_the_core_are_refused_by_the_kernel_and_left_to_xla():
    assert attention_tpu.heads_at_once(3, 64, 50_000, 2) is None
    with pytest.raises(ValueError, match="50000 tokens of 3 heads do not fit the core's memory; use attention='xla'"):
        jax.eval_shape(
            lambda x: self_attend(x, 3, kernel="fused"), jax.ShapeDtypeStruct((1, 50_000, 3 * 3 * 64), jnp.bfloat16)
        )


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=f"attention='flash' is unknown; use one of {', '.join(KERNELS)}"):
        VisionConfig(24, 8, 128, 2, 2, 192, True, "attention", 20, attention="flash")


def test_long_rows_are_left_to_xla_where_the_core_is_small():
    assert attention_tpu.fits("TPU v4", 16, 96, 256, 2) and not attention_tpu.fits("TPU v4", 16, 96, 1024, 2)
    assert attention_tpu.fits("TPU v5 lite", 16, 96, 1024, 2) and not attention_tpu.fits(
        "TPU v5 lite", 3, 64, 50_000, 2
    )

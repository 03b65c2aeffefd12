"""The attention that a tower shows is the one its blocks use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import sharding
from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.models.layers import rope_2d
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.types import split
from tests.golden import weights

CONFIG = VisionConfig(20, 4, 24, 5, 3, 40, True, "attention", 14, pool_heads=2, layer_scale=0.1)
ROWS, COLUMNS, TOKENS = 3, 2, 7  # 12 x 8 pixels and the class token


def filled(config: VisionConfig) -> VisionTower:
    graphdef, _ = split(zoo.abstract(config))
    return nnx.merge(graphdef, pe.to_params(weights.tensors(config), config))


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return filled(CONFIG)


@pytest.fixture(scope="module")
def tokens(tower, images):
    return tower.features(images, tuple(range(6)))


@pytest.fixture(scope="module")
def tables(tower, images):
    return tower.attention(images, (4, -1, 1))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(weights.images(0, 2, 4 * ROWS, 4 * COLUMNS, 3))


def block_of(tower, layer):
    graphdef, params = split(tower.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer - 1], params))


def values(block, x):
    """v of each head, [B, N, K, H], from the fused projection."""
    qkv = block.attention.qkv(block.norm1(x))
    return qkv.reshape(*x.shape[:2], CONFIG.heads, 3, -1)[:, :, :, 2]


def test_the_shown_attention_gives_the_blocks_own_output(tower, images, tokens, tables):
    """The whole block again, with the shown weights in place of its attention."""
    for layer in (1, 4):
        x, block, shown = tokens[layer - 1], block_of(tower, layer), tables[layer]
        assert shown.shape == (2, CONFIG.heads, TOKENS, TOKENS)
        attended = jnp.einsum("bkqn,bnkh->bqkh", shown, values(block, x)).reshape(x.shape)
        x = x + block.scale1(block.attention.out(attended))
        x = x + block.scale2(block.mlp(block.norm2(x)))
        np.testing.assert_allclose(x, tokens[layer], rtol=1e-5, atol=1e-5)


def test_it_is_the_softmax_of_turned_queries_and_keys(tower, tokens, tables):
    """From the definition in NumPy, with rotations as 2 x 2 matrices."""
    x, block = tokens[3], block_of(tower, 4)
    qkv = np.asarray(block.attention.qkv(block.norm1(x)), np.float64).reshape(2, TOKENS, 3, 3, 8)
    cos, sin = (table.astype(np.float64) for table in rope_2d(ROWS, COLUMNS, 8, class_token=True))

    def turned(part):
        out = np.empty_like(part)
        for n in range(TOKENS):
            for c in range(0, 8, 2):
                turn = np.array([[cos[n, c], -sin[n, c]], [sin[n, c], cos[n, c]]])
                out[:, n, :, c : c + 2] = part[:, n, :, c : c + 2] @ turn.T
        return out

    logits = np.einsum("bqkh,bnkh->bkqn", turned(qkv[:, :, :, 0]), turned(qkv[:, :, :, 1])) / 8**0.5
    want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(tables[4], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(want.sum(-1), 1)


def received(weights):
    return {"received": weights.mean(1), "sharpest": weights.max(-1)}


def test_head_by_head_is_the_same_as_the_whole_table(tower, images, tables):
    parts = tower.attention(images, (4, -1, 1), reduce=received)
    assert list(parts) == [4, -1, 1]
    for layer, table in tables.items():
        heads_first = np.swapaxes(table, 0, 1)
        assert parts[layer]["received"].shape == (3, 2, TOKENS)
        np.testing.assert_allclose(parts[layer]["received"], heads_first.mean(2), rtol=1e-5)
        np.testing.assert_allclose(parts[layer]["sharpest"], heads_first.max(-1), rtol=1e-5)


def test_asking_again_does_not_compile_again(tower, images):
    tower.attention(images, (4, -1, 1), reduce=received)
    before = VisionTower._watched._cache_size()
    tower.attention(images, (4, -1, 1), reduce=received)
    assert VisionTower._watched._cache_size() == before


def passing(step):
    return step.before, step.after


@pytest.mark.parametrize("layers", [(1, 2, 3, 4, 5), (4, -4, 4)], ids=str)
def test_watching_shows_the_stream_before_and_after_each_block(tower, images, tokens, layers):
    before, after = tower.watch(images, passing, layers)
    assert before.shape == after.shape == (len(layers), 2, TOKENS, 24)
    own = [layer if layer > 0 else 6 + layer for layer in layers]
    for i, layer in enumerate(own):
        np.testing.assert_allclose(before[i], tokens[layer - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after[i], tokens[layer], rtol=1e-5, atol=1e-5)


def test_a_block_that_was_not_asked_for_is_not_looked_at(tower, images):
    looked = []

    def look(step):
        jax.debug.callback(lambda: looked.append(1))
        return step.after.mean()

    jax.block_until_ready(tower.watch(images, look, (2, 5)))
    jax.effects_barrier()
    assert len(looked) == 2


def test_on_a_mesh_it_is_the_same():
    config = VisionConfig(16, 4, 32, 2, 4, 40, True, "none", None)
    tower, mesh = filled(config), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    graphdef, params = split(tower)
    images = jnp.asarray(weights.images(0, 8, 8, 12, 3))
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(zoo.abstract(config), mesh)))
    with jax.set_mesh(mesh):
        cut = jax.device_put(images, sharding.batch_sharding(mesh))
        run = jax.jit(lambda tower, x: (tower.attention(x, (1, 2)), tower.attention(x, (2,), reduce=received)))
        whole, parts = run(placed, cut)
    for layer, table in tower.attention(images, (1, 2)).items():
        np.testing.assert_allclose(whole[layer], table, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        parts[2]["received"], np.swapaxes(np.asarray(whole[2]), 0, 1).mean(2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "layer, message", [(0, "layer 0 is the patch embedding"), (-5 - 1, "layer -6 does not"), (6, "layer 6 does not")]
)
def test_a_layer_that_does_not_attend_is_refused(tower, images, layer, message):
    with pytest.raises(ValueError, match=message):
        tower.attention(images, (layer,))


def test_in_half_precision_rows_still_sum_to_one(images):
    tower = filled(VisionConfig(**{**vars(CONFIG), "dtype": "bfloat16"}))
    shown = tower.attention(images, (2,))[2]
    assert shown.dtype == jnp.float32
    np.testing.assert_allclose(shown.sum(-1), 1, rtol=1e-6)

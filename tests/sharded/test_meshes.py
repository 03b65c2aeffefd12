"""Loss, gradients and features on meshes of eight devices equal those on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import sharding
from pe_jax.models import zoo
from pe_jax.stages import Contrastive
from pe_jax.types import split

ARCH = zoo.architecture(
    {
        "vision": {
            "image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 4, "mlp_width": 48,
            "class_token": True, "pool": "attention", "pool_heads": 2, "output_width": 20, "layer_scale": 0.1,
        },
        "text": {
            "context_length": 7, "width": 24, "depth": 2, "heads": 4, "mlp_width": 40, "output_width": 20,
            "vocab_size": 56,
        },
    }
)  # fmt: skip
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "all three": {"data": 2, "fsdp": 2, "tensor": 2},
    "slices": {"dcn": 2, "data": 2, "fsdp": 2},
}


def batch(examples: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.integers(1, 50, (examples, 7), dtype=np.int32)
    text[:, -1] = 55
    return {"image": rng.integers(0, 256, (examples, 24, 40, 3), dtype=np.uint8), "text": text}


def randomised(params):
    """Every parameter random, norms, biases and LayerScale too: a constant would hide a wrong axis."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@functools.cache
def one_device():
    stage = Contrastive(ARCH)
    graphdef, params = split(stage.build(nnx.Rngs(0)))
    params = randomised(params)
    grads, metrics = jax.jit(stage.gradients)(nnx.merge(graphdef, params), batch(), jax.random.key(2))
    return stage, graphdef, params, grads, metrics


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_loss_and_gradients_on_a_mesh_equal_those_on_one_device(shape, capfd):
    stage, graphdef, params, grads, metrics = one_device()
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(zoo.abstract(ARCH), mesh)

    def step(params, batch, key):
        return stage.gradients(nnx.merge(graphdef, params), batch, key)

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        cut = sharding.global_batch(batch(), mesh)
        got, got_metrics = jax.jit(step, out_shardings=(shardings, None))(placed, cut, jax.random.key(2))
    for name in metrics:
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(grads), strict=True):
        error = np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)
    # What XLA's partitioner says when it copies an activation of the whole batch to every device.
    assert "full rematerialization" not in capfd.readouterr().err


def test_the_mesh_really_cuts_parameters_gradients_and_batch():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = sharding.param_shardings(zoo.abstract(ARCH), mesh)
    _, params = split(zoo.build(ARCH, nnx.Rngs(0)))
    kernel = jax.device_put(params, shardings)["vision"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (3, 32, 48)
    assert kernel.addressable_shards[0].data.shape == (3, 16, 24)
    image = sharding.global_batch(batch(), mesh)["image"]
    assert image.addressable_shards[0].data.shape == (4, 24, 40, 3)


def test_a_dimension_the_mesh_cannot_cut_is_refused_by_name():
    mesh = sharding.make_mesh({"tensor": 8})
    with pytest.raises(ValueError, match=r"text/blocks/attention/.* has heads=4, which mesh axis tensor=8"):
        sharding.param_shardings(zoo.abstract(ARCH), mesh)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "does not cover the 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"model": 8}, "unknown"),
        ({"data": -1, "fsdp": 3}, "does not cover"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_the_logit_scale_is_capped_at_100_and_can_come_back():
    stage, _, params, _, _ = one_device()
    high = stage.project(params | {"log_scale": jnp.asarray(7.0)})
    np.testing.assert_allclose(np.exp(high["log_scale"]), 100, rtol=1e-6)
    low = stage.project(params | {"log_scale": jnp.asarray(1.0)})
    assert low["log_scale"] == 1.0


def test_a_frozen_prefix_names_a_subtree_and_not_its_namesakes():
    stage = Contrastive(ARCH, frozen=("vision", "text/position"))
    assert not stage.trainable("vision/patch/kernel")
    assert not stage.trainable("text/position")
    assert stage.trainable("text/positions") and stage.trainable("log_scale")


def test_features_of_a_sharded_model_equal_those_of_one_device():
    _, graphdef, params, _, _ = one_device()
    images = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3), minval=-1)
    want = nnx.merge(graphdef, params).vision.features(images, layers=(0, 2, -1))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = jax.device_put(params, sharding.param_shardings(zoo.abstract(ARCH), mesh))
    images = jax.device_put(images, sharding.batch_sharding(mesh))
    got = nnx.merge(graphdef, sharded).vision.features(images, layers=(0, 2, -1))
    for layer in want:
        np.testing.assert_allclose(got[layer], want[layer], rtol=1e-4, atol=1e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import sharding
from pe_jax.evals import inference
from pe_jax.types import split


@pytest.fixture(scope="module")
def parameters(tower):
    return split(tower)


def test_a_fingerprint_is_the_same_on_every_mesh(tower, parameters):
    graphdef, params = parameters
    expected = inference.fingerprint(tower)
    assert len(expected) == 16
    for axes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(axes)
        placed = jax.device_put(params, sharding.param_shardings(tower, mesh))
        assert inference.fingerprint(nnx.merge(graphdef, placed)) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[0, 3].set(np.nextafter(np.asarray(x[0, 3]), np.float32(9))),  # one unit in the last place
        lambda x: x[::-1],  # the same numbers elsewhere
        lambda x: x.astype(jnp.bfloat16),
        lambda x: -x,
    ],
    ids=["a bit", "order", "dtype", "sign"],
)
def test_a_fingerprint_tells_weights_apart(tower, parameters, change):
    graphdef, params = parameters
    leaves, tree = jax.tree.flatten(params)
    at = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 2 and len(np.unique(leaf)) > 9)
    leaves[at] = change(leaves[at])
    changed = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
    assert inference.fingerprint(changed) != inference.fingerprint(tower)

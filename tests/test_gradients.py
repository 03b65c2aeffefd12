"""GradCache: the gradient over micro-batches is the gradient of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import gradients, losses, sharding
from pe_jax.models import zoo
from pe_jax.models.clip import unit
from pe_jax.stages import Contrastive
from pe_jax.types import split
from tests.sharded.test_meshes import ARCH, batch, randomised

TEXT_ONLY = {"text": jnp.asarray(batch()["text"])}


def params_of(stage):
    graphdef, params = split(stage.build(nnx.Rngs(0)))
    return graphdef, randomised(params)


def run(stage, examples=16, mesh=None):
    graphdef, params = params_of(stage)
    step = jax.jit(lambda params, batch: stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2)))
    if mesh is None:
        return step(params, batch(examples))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(zoo.abstract(ARCH), mesh))
        return step(params, sharding.global_batch(batch(examples), mesh))


def same(got, want, rtol=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(a) - b) / (np.linalg.norm(b) or 1)
        assert error < rtol, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def whole():
    return run(Contrastive(ARCH))


@pytest.mark.parametrize("microbatches", [2, 8])
@pytest.mark.parametrize("chunk", [None, 5])
def test_any_number_of_micro_batches_gives_the_gradient_of_the_whole_batch(whole, microbatches, chunk):
    grads, metrics = run(Contrastive(ARCH, microbatches=microbatches, loss_chunk=chunk))
    same(grads, whole[0])
    same(metrics, whole[1])


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_and_so_it_does_on_a_mesh_with_the_chunked_loss(whole, shape):
    grads, metrics = run(Contrastive(ARCH, microbatches=2, loss_chunk=6), mesh=sharding.make_mesh(shape))
    same(grads, whole[0], rtol=1e-4)  # sums over devices in another order
    same(metrics, whole[1])


def test_the_second_pass_replays_the_randomness_of_the_first():
    """Against ordinary differentiation of all micro-batches at once, each with its own key."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jax.random.normal(jax.random.key(3), (7, 5)), axes=(None, None))

    def embed(model, batch, key):
        x = unit(batch["text"].astype(jnp.float32) @ model.kernel[...])
        return {"x": x * jax.random.bernoulli(key, 0.7, x.shape)}, jnp.zeros(()), {}

    def loss(model, embeddings):
        x = embeddings["x"]
        return losses.info_nce(x, jnp.roll(x, 1, 0), jnp.asarray(2.0))

    model, key, parts = Noisy(), jax.random.key(4), 4
    got, _ = gradients.cached(embed, loss, model, TEXT_ONLY, key, parts)
    graphdef, params = split(model)

    def at_once(params):
        model, rows = nnx.merge(graphdef, params), []
        for j, part in enumerate(jax.random.split(key, parts)):
            rows.append(embed(model, {"text": TEXT_ONLY["text"][j::parts]}, part)[0]["x"])
        return loss(model, {"x": jnp.stack(rows, 1).reshape(16, -1)})[0]

    same(got, jax.grad(at_once)(params))


def test_a_penalty_and_its_gradient_are_averaged_over_micro_batches():
    class Linear(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jax.random.normal(jax.random.key(3), (7, 5)), axes=(None, None))

    def embed(model, batch, key):
        x = batch["text"].astype(jnp.float32) @ model.kernel[...]
        return {"x": unit(x)}, jnp.mean(x**2), {"size": jnp.mean(x)}

    def loss(model, embeddings):
        return losses.info_nce(embeddings["x"], embeddings["x"][::-1], jnp.asarray(2.0))

    want = gradients.cached(embed, loss, Linear(), TEXT_ONLY, jax.random.key(4), 1)
    same(gradients.cached(embed, loss, Linear(), TEXT_ONLY, jax.random.key(4), 4), want)


def test_a_batch_that_does_not_cut_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 16 .* does not cut into 3 micro-batches"):
        run(Contrastive(ARCH, microbatches=3))

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


class Line(nnx.Module):
    """Scores tokens by two kernels, of which a test may hold one."""

    def __init__(self):
        first, second = jax.random.split(jax.random.key(3))
        self.kernel = nnx.Param(jax.random.normal(first, (7, 5)), axes=(None, None))
        self.head = nnx.Param(jax.random.normal(second, (5,)), axes=(None,))


ASKED = {
    "x": jnp.asarray(np.random.default_rng(4).standard_normal((16, 3, 7), np.float32)),
    # From one token to all of them in a row, and the second of every four rows has none.
    "asked": jnp.asarray(np.arange(48).reshape(16, 3) % 5 > np.arange(16)[:, None] % 4)
    & (jnp.arange(16) % 4 != 1)[:, None],
}


def mean_of_asked(model, batch, key):
    score = jnp.tanh(batch["x"] @ model.kernel[...]) @ model.head[...]
    count = jnp.sum(batch["asked"])
    mean = jnp.sum(jnp.where(batch["asked"], score**2, 0)) / jnp.maximum(count, 1)
    return mean, {"score": jnp.sum(jnp.where(batch["asked"], score, 0)) / jnp.maximum(count, 1)}


def count_of_asked(batch):
    return jnp.sum(batch["asked"])


@pytest.mark.parametrize("microbatches", [2, 4, 16])
def test_an_average_over_unequal_micro_batches_is_that_of_the_whole_batch(microbatches):
    model, key = Line(), jax.random.key(4)
    want = gradients.whole(mean_of_asked, model, ASKED, key)
    same(gradients.averaged(mean_of_asked, model, ASKED, key, 1), want)
    same(gradients.averaged(mean_of_asked, model, ASKED, key, microbatches, weights=count_of_asked), want)
    grads, _ = gradients.averaged(mean_of_asked, model, ASKED, key, microbatches)
    difference = np.linalg.norm(grads["head"] - want[0]["head"]) / np.linalg.norm(want[0]["head"])
    assert difference > 0.01  # unweighted it is another mean


@pytest.mark.parametrize("microbatches", [1, 4])
def test_what_is_not_trainable_has_no_gradient_and_is_not_differentiated(microbatches):
    @jax.custom_vjp
    def head_of(x):
        return x

    def backward(*_):
        raise AssertionError("differentiated")

    head_of.defvjp(lambda x: (x, None), backward)

    def loss(model, batch, key):
        score = jnp.tanh(batch["x"] @ model.kernel[...]) @ head_of(model.head[...])
        return jnp.mean(score**2), {}

    with pytest.raises(AssertionError, match="differentiated"):
        gradients.averaged(loss, Line(), ASKED, jax.random.key(4), microbatches)
    got, _ = gradients.averaged(loss, Line(), ASKED, jax.random.key(4), microbatches, lambda path: path == "kernel")
    assert np.linalg.norm(got["kernel"]) > 0.1 and not got["head"].any()


def test_a_batch_that_asks_for_nothing_has_no_loss_and_no_gradient():
    nothing = {"x": ASKED["x"], "asked": jnp.zeros((16, 3), bool)}
    grads, metrics = gradients.averaged(mean_of_asked, Line(), nothing, jax.random.key(4), 4, weights=count_of_asked)
    assert metrics["loss"] == 0 and not any(g.any() for g in jax.tree.leaves(grads))

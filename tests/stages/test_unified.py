"""Both alignments in one update: each part's gradient, the balance at the tower, and images nobody refers to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import align_language, align_unified
from pe_jax import train
from pe_jax.models.decoder import DecoderConfig
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.models.vlm import VLMConfig
from pe_jax.stages import Language, Spatial, Unified
from pe_jax.types import split
from tests.stages.test_spatial import drawn

TOWER = VisionConfig(16, 4, 32, 2, 4, 48, True, "none", None, norm_post=False)
ARCH = VLMConfig(TOWER, DecoderConfig(60, 24, 2, 4, 2, 6, 40, 64, 1e4), image_token=59, pooling=2)
TEACHERS = {"self": {"name": "tower", "layer": 1, "direct": 1.0, "pairs": 2.0, "temperature": 5.0}}
STAGE = Unified(ARCH, TEACHERS, balance=0.5, teacher_dtype="float32")


def batch(rows=3):
    """The last chunk of each row is one that no token refers to; targets are asked for everywhere but at images."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 59, (rows, 14), dtype=np.int32)
    slots = np.full((rows, 14), -1, np.int32)
    slots[:, 2:10] = np.arange(8)  # two chunks of four tokens
    tokens[slots >= 0] = 59
    return {
        "tokens": tokens,
        "targets": np.where(slots < 0, np.roll(tokens, -1, 1) % 59, -1).astype(np.int32),
        "segments": np.ones((rows, 14), np.int32),
        "slots": slots,
        "chunks": rng.integers(0, 256, (rows, 3, 16, 16, 3), dtype=np.uint8),
    }


@functools.cache
def step(stage=STAGE):
    graphdef, params = drawn(lambda: stage.build(nnx.Rngs(0)))
    run = jax.jit(lambda params, batch: stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2)))
    return params, *run(params, batch())


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


def test_the_towers_gradient_is_that_of_the_words_and_that_of_the_places_brought_to_its_balance():
    params, grads, metrics = step()
    reading, seeing = jax.random.split(jax.random.key(2))
    language, spatial = Language(ARCH), Spatial(TOWER, TEACHERS, teacher_dtype="float32")
    plain = {name: x for name, x in params.items() if name != "training"}
    student = params["vision"] | {"training": params["training"]}
    images = {"image": batch()["chunks"].reshape(9, 16, 16, 3), "shown": np.tile(np.arange(3) < 2, 3)}

    @functools.partial(jax.jit, static_argnums=0)
    def alone(stage, params, batch, key):
        graphdef, _ = split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
        return stage.gradients(nnx.merge(graphdef, params), batch, key)

    words, told = alone(language, plain, batch(), reading)
    places, seen = alone(spatial, student, images, seeing)
    places.pop("training")
    scale = 0.5 * norm(words["vision"]) / norm(places)
    want = jax.tree.map(lambda a, b: a + scale * b, words["vision"], places)
    for a, b in zip(jax.tree.leaves(grads["vision"]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * norm(want))
    for part in ("projector", "decoder"):
        assert norm(jax.tree.map(np.subtract, grads[part], words[part])) < 1e-4 * norm(words[part])
    assert not norm(grads["training"])
    np.testing.assert_allclose(metrics["language_loss"], told["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["spatial_loss"], seen["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["spatial_norm"], norm(places), rtol=1e-4)


def test_images_that_no_token_refers_to_teach_nothing():
    params, _, metrics = step()
    graphdef, _ = split(nnx.eval_shape(lambda: STAGE.build(nnx.Rngs(0))))
    found = STAGE._images(jax.tree.map(jnp.asarray, batch()))
    np.testing.assert_array_equal(found["shown"].reshape(3, 3), [[True, True, False]] * 3)
    other = batch()
    other["chunks"][:, 2] = 255 - other["chunks"][:, 2]
    run = jax.jit(lambda params, batch: STAGE.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2))[1])
    again = run(params, other)
    np.testing.assert_allclose(again["spatial_loss"], metrics["spatial_loss"], rtol=1e-6)
    other["chunks"][:, 1] = 255 - other["chunks"][:, 1]
    assert abs(run(params, other)["spatial_loss"] - metrics["spatial_loss"]) > 1e-4


def test_the_tower_and_its_teacher_start_as_the_tower_that_is_given():
    longer = dataclasses.replace(TOWER, depth=3)
    _, given = drawn(lambda: VisionTower(longer, rngs=nnx.Rngs(0)), seed=7)
    _, fresh = drawn(lambda: STAGE.build(nnx.Rngs(0)))
    started = STAGE.start(fresh, {"vision": (longer, given)})
    kernel = given["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(started["vision"]["blocks"]["mlp"]["up"]["kernel"], kernel[:2])
    np.testing.assert_array_equal(started["training"]["teachers"]["self"]["blocks"]["mlp"]["up"]["kernel"], kernel[:1])
    assert STAGE.parts == {"vision": "model", "decoder": ARCH.decoder, "model": ARCH}


def test_its_cost_is_that_of_both_stages():
    images = {"image": np.zeros((9, 16, 16, 3), np.uint8)}
    want = Language(ARCH).update_flops(batch()) + Spatial(TOWER, TEACHERS).update_flops(images)
    assert STAGE.update_flops(batch()) == want


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance": 0.0}, "balance=0.0 must be above 0"),
        ({"frozen": ("vision",)}, "leave vision out of frozen"),
        ({"teachers": {"sam": {"name": "stored", "tokens": 4, "width": 4, "pairs": 1.0}}}, "carry no stored teacher"),
        ({"teachers": {}}, "needs teachers"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **fields)


@pytest.mark.parametrize(("arg", "teachers"), [("3B", {"self", "sam"}), ("8B,teacher=self,balance=0.3", {"self"})])
def test_the_experiment_is_midtraining_with_teachers(arg, teachers):
    config = align_unified.get_config(arg).to_dict()
    run = train.parse(config)
    assert {name for name, _ in run.stage.teachers} == teachers
    assert run.stage.balance == (0.3 if "balance" in arg else 1.0)
    plain = align_language.get_config(f"midtrain,{arg.partition(',')[0]}").to_dict()
    changed = {name for name in plain if plain[name] != config[name]}
    assert changed == {"stage"} | ({"init"} if "sam" in teachers else set())
    assert plain["stage"] | {n: config["stage"][n] for n in ("name", "teachers", "balance")} == config["stage"]


@pytest.mark.parametrize("arg", ["3B,teacher=cached", "4B", "3B,balanse=1"])
def test_what_is_no_experiment_is_refused(arg):
    with pytest.raises(ValueError, match=r"align_(unified|language).py"):
        align_unified.get_config(arg)

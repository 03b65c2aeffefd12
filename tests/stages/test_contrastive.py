"""Mask regularisation: what it hides, what it compares, and which way its gradient flows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pe_jax
from pe_jax import checkpoint
from pe_jax.models import zoo
from pe_jax.models.clip import unit
from pe_jax.stages import Contrastive
from pe_jax.stages.contrastive import choose, pixels
from pe_jax.types import split
from tests.sharded.test_meshes import ARCH, batch, randomised

STAGE = Contrastive(ARCH, mask_ratio=0.4, mask_every=4)
PATCHES = 15  # of 24 x 40 pixels


def parts(stage):
    graphdef, params = split(stage.build(nnx.Rngs(0)))
    return graphdef, randomised(params)


def gradients_of(stage, params, graphdef):
    step = jax.jit(lambda params, batch: stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2)))
    return step(params, batch())


def test_exactly_the_asked_number_of_patches_is_hidden_in_each_image_at_places_of_its_own():
    masks = np.asarray(choose(jax.random.key(0), (64, PATCHES), 6))
    assert (masks.sum(1) == 6).all()
    assert len(np.unique(masks, axis=0)) > 50
    assert (masks.mean(0) > 0.15).all()


def test_a_hidden_patch_is_the_mask_token_at_its_place_and_nothing_of_its_pixels():
    graphdef, params = parts(STAGE)
    vision = nnx.merge(graphdef, params).vision
    masked = choose(jax.random.key(0), (2, PATCHES), 6)
    images = jax.random.uniform(jax.random.key(1), (2, 24, 40, 3), minval=-1)
    blocks = jnp.repeat(jnp.repeat(masked.reshape(2, 3, 5), 8, 1), 8, 2)[..., None]
    other = jnp.where(blocks, 1 - images, images)
    token = jnp.ones(32)
    first, second = (vision.tokens(x, masked=masked, mask_token=token) for x in (images, other))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, vision.tokens(images))
    shown = vision.tokens(images, masked=jnp.zeros_like(masked), mask_token=token)
    np.testing.assert_array_equal(shown, vision.tokens(images))


def test_the_loss_is_one_minus_cosine_on_hidden_patches_of_every_fourth_image():
    graphdef, params = parts(STAGE)
    _, metrics = gradients_of(STAGE, params, graphdef)
    model = nnx.merge(graphdef, params)
    masked = choose(jax.random.fold_in(jax.random.key(2), 1), (4, PATCHES), 6)
    images = pixels(jnp.asarray(batch()["image"][::4]))
    seen = model.vision.normed(model.vision.tokens(images))[:, 1:]
    guess = model.vision.normed(model.vision.tokens(images, masked=masked, mask_token=model.training.mask_token[...]))[
        :, 1:
    ]
    cosine = jnp.sum(unit(seen.reshape(-1, 32)) * unit(guess.reshape(-1, 32)), -1).reshape(4, PATCHES)
    np.testing.assert_allclose(metrics["mask_loss"], 1 - cosine[np.asarray(masked)].mean(), rtol=1e-5)


def test_the_two_losses_add_and_neither_moves_the_others_part():
    graphdef, params = parts(STAGE)
    both, metrics = gradients_of(STAGE, params, graphdef)
    plain_params = {name: x for name, x in params.items() if name != checkpoint.TRAINING_ONLY}
    plain_stage = Contrastive(ARCH)
    plain, plain_metrics = gradients_of(plain_stage, plain_params, parts(plain_stage)[0])
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"] + metrics["mask_loss"], rtol=1e-6)
    masks = jax.tree.map(jnp.subtract, {n: both[n] for n in plain}, plain)
    # Towards the contrastive loss alone: text tower, temperature, pooling and projection feel nothing of the masks. A
    # hundredfold weight makes what they might feel a hundred times larger than where float32 rounds two programs apart.
    heavy, _ = gradients_of(dataclasses.replace(STAGE, mask_weight=100.0), params, graphdef)
    felt = jax.tree.map(lambda a, b: (a - b) / 100, {n: heavy[n] for n in plain}, plain)
    quiet = [felt["text"], felt["log_scale"], felt["vision"]["pool"], felt["vision"]["projection"]]
    np.testing.assert_allclose(np.concatenate([np.ravel(x) for x in jax.tree.leaves(quiet)]), 0, atol=1e-6)
    assert np.linalg.norm(both["training"]["mask_token"]) > 1e-4
    assert np.linalg.norm(masks["vision"]["patch"]["kernel"]) > 1e-4


def test_the_tokens_that_are_aimed_at_receive_no_gradient():
    graphdef, params = parts(STAGE)
    target = nnx.merge(graphdef, params)
    data, key = jax.tree.map(jnp.asarray, batch()), jax.random.key(5)
    images = pixels(data["image"])
    tokens = target.vision.tokens(images)

    def by_stage(params):
        return STAGE._embed(nnx.merge(graphdef, params), data, key)[1]

    def with_constant_target(params):
        # `normed` of the target is constant, too: only the guess depends on the parameters.
        model = nnx.merge(graphdef, params)
        masked = choose(jax.random.fold_in(key, 1), (4, PATCHES), 6)
        guess = model.vision.normed(
            model.vision.tokens(images[::4], masked=masked, mask_token=model.training.mask_token[...])
        )
        a, b = (unit(x[:, 1:].reshape(-1, 32)) for x in (guess, target.vision.normed(tokens[::4])))
        return jnp.mean(1 - jnp.sum(a * b, -1), where=masked.reshape(-1))

    got, want = jax.grad(by_stage)(params), jax.grad(with_constant_target)(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_the_copies_change_no_embedding_so_the_first_pass_of_micro_batches_may_do_without():
    graphdef, params = parts(STAGE)
    model = nnx.merge(graphdef, params)
    data = jax.tree.map(jnp.asarray, batch())
    with_copies, _, _ = STAGE._embed(model, data, jax.random.key(3))
    alone = STAGE._embeddings(model, data, jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_copies, alone)


def test_an_update_costs_three_forward_passes_and_those_of_the_copies():
    plain = Contrastive(ARCH)
    shapes = {"image": np.empty((8, 24, 40, 3))}
    assert plain.update_flops(shapes) == 8 * 3 * zoo.forward_flops(ARCH, (24, 40))
    blocks = zoo.forward_flops(dataclasses.replace(ARCH.vision, pool="none", output_width=None), (24, 40))
    assert STAGE.update_flops(shapes) - plain.update_flops(shapes) == 2 * 3 * blocks


def test_of_a_video_every_frame_goes_through_the_tower_and_the_text_once():
    frames, text = np.empty((2, 5, 24, 40, 3)), 3 * zoo.forward_flops(ARCH.text)
    image = 3 * zoo.forward_flops(ARCH, (24, 40)) - text
    assert STAGE.update_flops({"video": frames}) == 2 * (5 * image + text)


def test_micro_batches_work_with_masks_and_drop_path():
    vision = dataclasses.replace(ARCH.vision, drop_path=0.2)
    stage = dataclasses.replace(STAGE, arch=dataclasses.replace(ARCH, vision=vision), microbatches=2)
    graphdef, params = parts(stage)
    first, metrics = gradients_of(stage, params, graphdef)
    again, _ = gradients_of(stage, params, graphdef)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.isfinite(metrics["loss"]) and 0 < metrics["mask_loss"] < 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 must be in \[0, 1\)"),
        ({"microbatches": 0}, "must be at least 1"),
        ({"loss_chunk": -1}, "must be at least 1"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **fields)


def test_a_batch_with_too_few_images_to_copy_is_refused():
    stage = dataclasses.replace(STAGE, mask_every=5)
    graphdef, params = parts(stage)
    with pytest.raises(ValueError, match="16 images at a time are not a multiple of mask_every=5"):
        gradients_of(stage, params, graphdef)


def test_a_model_loaded_from_a_masked_run_has_no_mask_token(tmp_path):
    _, params = parts(STAGE)
    checkpoint.save_weights(tmp_path / "weights", params, {"architecture": zoo.to_dict(ARCH)})
    model = pe_jax.load(str(tmp_path / "weights"))
    assert not hasattr(model, checkpoint.TRAINING_ONLY)
    np.testing.assert_array_equal(model.vision.projection[...], params["vision"]["projection"])

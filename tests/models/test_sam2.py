"""SAM 2.1: prompts, grids of points, the choice of one mask, devices and half precision; equality is in parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import sharding
from pe_jax.convert import sam2 as convert
from pe_jax.models import zoo
from pe_jax.models.sam2 import CHOICES, Sam2, Segmentation, _bicubic, grid_points, one
from pe_jax.types import split
from tests.models.sam2_sizes import PADDED, SMALL, WHOLE, params, prompts

SIDE = SMALL.image_size


@functools.cache
def model(dtype: str = "float32") -> Sam2:
    graphdef, _ = split(convert.abstract(dataclasses.replace(SMALL, dtype=dtype)))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params(SMALL)))


@functools.cache
def embedding():
    return model().embed(prompts(SIDE)["images"])


def close(got, want, tolerance=1e-4):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@functools.cache
def grid_logits() -> np.ndarray:
    return np.asarray(model().grid_logits(prompts(SIDE)["images"], points_per_side=4, chunk=8, choice="best"))


def test_a_grids_masks_are_those_of_its_points_one_by_one():
    points = grid_points(4, SIDE, SIDE)
    assert points[0].tolist() == [SIDE / 8, SIDE / 8] and points[1].tolist() == [3 * SIDE / 8, SIDE / 8]
    found = model().decode(embedding(), np.broadcast_to(points[:, None], (2, 16, 1, 2)))
    best = np.argmax(found.ious, -1)
    close(grid_logits(), np.take_along_axis(np.asarray(found.masks), best[:, :, None, None, None], 2)[:, :, 0])


def test_features_of_a_grid_are_its_masks_brought_to_the_tokens_whatever_the_chunk():
    """By a resize written out here: triangles as wide as the step, PyTorch's antialiased bilinear."""
    rows, columns = 4, 3

    def triangles(after: int) -> np.ndarray:
        step, before = SIDE // 4 / after, SIDE // 4
        weights = 1 - abs((np.arange(before) + 0.5) - (np.arange(after)[:, None] + 0.5) * step) / step
        weights = np.maximum(weights, 0)
        return weights / weights.sum(1, keepdims=True)

    found = model().grid_features(prompts(SIDE)["images"], (rows, columns), points_per_side=4, chunk=2, choice="best")
    want = np.einsum("yj,xi,bpji->byxp", triangles(rows), triangles(columns), grid_logits())
    close(found, want.reshape(2, rows * columns, 16))


def test_the_whole_stack_of_masks_is_never_in_memory_for_features():
    images = prompts(SIDE)["images"]
    compiled = Sam2._grid.lower(model(), images, 32, 4, "stable", (4, 4)).compile()
    whole = images.shape[0] * 32**2 * (SIDE // 4) ** 2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole


def test_examples_are_cut_over_devices_and_nothing_changes():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
    images = prompts(SIDE)["images"]
    graphdef, tree = split(model())
    tree = jax.device_put(tree, sharding.param_shardings(model(), mesh))
    with jax.set_mesh(mesh):
        there = jax.device_put(images, sharding.batch_sharding(mesh))
        found = nnx.merge(graphdef, tree).grid_logits(there, points_per_side=4, chunk=8, choice="best")
    assert found.sharding.shard_shape(found.shape) == (1, 16, SIDE // 4, SIDE // 4)
    close(found, grid_logits())


def test_bfloat16_is_near_float32():
    images = prompts(SIDE)["images"]
    for got, want in zip(model("bfloat16").embed(images), embedding(), strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, want, 0.05)


def test_an_image_need_not_be_square_nor_of_the_size_trained_at():
    images = np.random.default_rng(0).standard_normal((1, 32, 96, 3)).astype(np.float32)
    found = model().segment(images, np.array([[[[90.0, 3.0]], [[20.0, 30.0]]]], np.float32))
    assert found.masks.shape == (1, 2, 3, 8, 24) and found.ious.shape == (1, 2, 3) and found.objects.shape == (1, 2)
    assert np.isfinite(found.masks).all()


def test_a_box_is_its_two_corners_and_the_order_of_points_says_nothing():
    given = prompts(SIDE)
    box = model().decode(embedding(), boxes=given["boxes"])
    corners = given["boxes"].reshape(2, 3, 2, 2)
    labels = np.broadcast_to(np.array([2, 3], np.int32), (2, 3, 2))
    close(box.masks, model().decode(embedding(), corners, labels).masks)
    close(box.masks, model().decode(embedding(), corners[:, :, ::-1], labels[:, :, ::-1]).masks)


def test_a_mask_for_all_prompts_is_that_mask_for_each():
    given = prompts(SIDE)
    shared = model().decode(embedding(), given["points"], given["labels"], masks=given["masks"])
    each = np.repeat(given["masks"], 3, 1)
    close(model().decode(embedding(), given["points"], given["labels"], masks=each).masks, shared.masks)
    plain = model().decode(embedding(), given["points"], given["labels"])
    assert np.abs(np.asarray(plain.masks - shared.masks)).max() > 0.1  # and a mask is heard at all


def test_one_mask_is_that_meant_for_it_unless_it_is_unstable():
    sure, unsure = np.full((4, 5), 2.0), np.full((4, 5), 2.0)
    unsure[0, 0] = 0.01  # 19 of 20 pixels are inside by the margin
    masks = np.stack([np.stack([own, sure + 1, sure + 2, sure + 3]) for own in (sure, unsure, -sure)])[None]
    ious = np.broadcast_to([0.9, 0.1, 0.8, 0.3], (1, 3, 4)).astype(np.float32)
    found = Segmentation(jnp.asarray(masks, jnp.float32), jnp.asarray(ious), jnp.zeros((1, 3)))
    picked = {choice: one(found, choice).ious for choice in CHOICES}
    picked = {choice: np.asarray(iou)[0, :, 0].astype(float).round(3).tolist() for choice, iou in picked.items()}
    assert picked == {"stable": [0.9, 0.8, 0.9], "single": [0.9] * 3, "best": [0.8] * 3}  # an empty mask is stable
    assert np.asarray(one(found).masks)[0, :, 0, 1, 1].tolist() == [2.0, 4.0, -2.0]


@pytest.mark.parametrize(("before", "after"), [(7, 64), (5, 3), (7, 7)])
def test_bicubic_weights_keep_constants_and_change_nothing_at_the_same_size(before, after):
    weights = _bicubic(before, after)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if before == after:
        np.testing.assert_array_equal(weights, np.eye(before, dtype=np.float32))


def test_images_are_squashed_to_the_models_square_and_normalised():
    pixels = np.broadcast_to(np.array([255, 0, 128], np.uint8), (2, 40, 56, 3))
    got = np.asarray(model().prepare(pixels))
    assert got.shape == (2, SIDE, SIDE, 3)
    want = (np.array([1, 0, 128 / 255]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-5)


def test_what_cannot_be_is_refused_before_anything_is_computed():
    given = prompts(SIDE)
    with pytest.raises(ValueError, match="images are 60x64 pixels; height and width must be multiples of 32"):
        model().embed(given["images"][:, :60])
    with pytest.raises(ValueError, match=r"images are uint8; want float, normalised: use `prepare`"):
        model().embed(np.zeros((1, 96, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="3 prompts of points and 2 boxes; want as many"):
        model().decode(embedding(), given["points"], boxes=given["boxes"][:, :2])
    with pytest.raises(ValueError, match="no points; give both"):
        model().decode(embedding(), labels=given["labels"])
    with pytest.raises(ValueError, match=r"masks are \[2, 2, 24, 24\]; want \[2, 1 or 3, 16, 16\]"):
        model().decode(embedding(), given["points"], masks=np.zeros((2, 2, 24, 24), np.float32))
    with pytest.raises(ValueError, match="chunk=5 does not divide the 16 points"):
        model().grid_logits(given["images"], points_per_side=4, chunk=5)
    with pytest.raises(ValueError, match="choice='surest' must be one of stable, single, best"):
        one(Segmentation(jnp.zeros((1, 1, 4, 2, 2)), jnp.zeros((1, 1, 4)), jnp.zeros((1, 1))), "surest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_blocks": (6, 99)}, r"global_blocks has \[99\]; want some of blocks 1 to 7"),
        ({"global_blocks": (2,)}, r"not \[2, 4, 7\], with which stages begin"),
        ({"image_size": 100}, "image_size=100 must be a multiple of 32"),
        ({"windows": (8, 3, 4, 2)}, r"windows=\(8, 3, 4, 2\) has \[3\]"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PADDED, **change)


def test_a_configuration_is_told_by_name_by_change_or_in_full():
    large = zoo.sam2("SAM-2.1-L")
    assert zoo.sam2(large) is large
    assert zoo.sam2(dataclasses.asdict(WHOLE)) == WHOLE
    assert zoo.sam2({"base": "SAM-2.1-L", "dtype": "bfloat16"}) == dataclasses.replace(large, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"'SAM-2\.1-XL' is no known segmenter; did you mean SAM-2\.1-L"):
        zoo.sam2("SAM-2.1-XL")
    with pytest.raises(ValueError, match="Sam2Config has no field 'depth'"):
        zoo.sam2({"base": "SAM-2.1-L", "depth": 3})


def test_every_parameter_is_whole_on_each_device():
    for _, variable in nnx.to_flat_state(nnx.state(convert.abstract(SMALL))):
        assert set(variable.get_metadata()["axes"]) == {None}


@pytest.mark.full
def test_fresh_models_are_finite():
    fresh = Sam2(SMALL, rngs=nnx.Rngs(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(split(fresh)[1]))

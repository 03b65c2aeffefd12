"""Labels that follow objects: against a plain loop, as objects move as told, and where one layer alone knows them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import evals, sharding
from pe_jax.evals import davis, tracking
from pe_jax.evals.tracking import Settings, Tracking
from pe_jax.types import split
from tests.evals import planted as planting
from tests.evals.planted import PATCH


def plain(frames, first, settings):
    """Labels of all frames, token by token; features are [T, H, W, D], the first labels [H, W, C]."""
    frames = frames / np.linalg.norm(frames, axis=-1, keepdims=True)
    _, height, width, _ = frames.shape
    labels, radius = [first], settings.radius if settings.radius is not None else 10**6
    for t in range(1, len(frames)):
        context = [0, *range(max(1, t - settings.previous), t)]
        found = np.zeros_like(first)
        for y in range(height):
            for x in range(width):
                seen = [
                    (float(frames[t, y, x] @ frames[k, i, j]), labels[k][i, j])
                    for k in context
                    for i in range(height)
                    for j in range(width)
                    if abs(i - y) <= radius and abs(j - x) <= radius
                ]
                seen.sort(key=lambda pair: -pair[0])
                best = seen[: settings.neighbours]
                weights = np.exp(np.array([cosine for cosine, _ in best]) / settings.temperature)
                found[y, x] = sum(w * own for w, (_, own) in zip(weights, best, strict=True)) / weights.sum()
        labels.append(found)
    return np.stack(labels)


@pytest.mark.parametrize("settings", [Settings(previous=2, radius=1, neighbours=3), Settings(3, None, 5, 0.2)])
def test_labels_are_those_of_a_plain_loop(settings):
    random = np.random.default_rng(0)
    frames = random.normal(size=(7, 4, 5, 6)).astype(np.float32)
    first = np.eye(3, dtype=np.float32)[random.integers(0, 3, (4, 5))]
    memory = tracking.remembered(jnp.asarray(frames[0]), jnp.asarray(first), settings)
    step = jax.jit(lambda memory, tokens: tracking.followed(memory, tokens, settings))
    wanted = plain(frames.astype(np.float64), first, settings)
    for t in range(1, 7):
        memory, found = step(memory, frames[t])
        np.testing.assert_allclose(found, wanted[t], atol=1e-5)


def test_more_neighbours_than_tokens_in_reach_take_all_of_them():
    frames = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    first = np.eye(2, dtype=np.float32)[np.array([[0, 1, 0], [1, 0, 1]])]
    settings = Settings(radius=0, neighbours=5)
    memory = tracking.remembered(jnp.asarray(frames[0]), jnp.asarray(first), settings)
    _, found = tracking.followed(memory, jnp.asarray(frames[1]), settings)
    np.testing.assert_allclose(found, first, atol=1e-6)  # each token sees its own place in the first frame alone


def test_masks_are_the_strongest_label_after_each_is_brought_to_its_range():
    labels = np.zeros((2, 3, 4), np.float32)
    labels[..., 0], labels[0, 0, 0], labels[0, 0, 1] = 0.9, 0.7, 0.3  # weak everywhere, and yet there alone
    found = np.asarray(tracking.masks(jnp.asarray(labels), (2, 3)))
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 0, 0]])
    large = np.asarray(tracking.masks(jnp.asarray(labels), (8, 12)))
    assert large[0, 0] == 1 and large[-1, -1] == 0 and large.shape == (8, 12)


def test_nearest_is_pillows():
    x = np.random.default_rng(0).integers(0, 255, (30, 47)).astype(np.uint8)
    for size in ((7, 11), (64, 64), (30, 47)):
        wanted = np.array(PIL.Image.fromarray(x).resize(size[::-1], PIL.Image.Resampling.NEAREST))
        np.testing.assert_array_equal(tracking.nearest(x, size), wanted)


# ---- clips ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return planting.planted(2)


def moving(folder, name, frames=10, size=32, objects=((8, 0, 8), (20, 4, 4)), frame_size=None):
    """Frames of noise in which squares move a patch to the right each; one pixel of a patch tells which is there."""
    random = np.random.default_rng(0)
    images, masks = folder / name / "frames", folder / name / "masks"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t in range(frames):
        image = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
        mask = np.zeros((size, size), np.uint8)
        for number, (top, left, side) in enumerate(objects):
            begin = left + min(t, 3) * PATCH
            mask[top : top + side, begin : begin + side] = number + 1
        image[::PATCH, ::PATCH, 0] = mask[::PATCH, ::PATCH]
        PIL.Image.fromarray(image).resize(frame_size or (size, size)).save(images / f"{t:03}.png")
        PIL.Image.fromarray(mask).save(masks / f"{t:03}.png")
    return str(folder / name)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving(tmp_path_factory.mktemp("clips"), "squares")


@pytest.fixture(scope="module")
def found(planted, clip):
    return Tracking(clip, batch_size=4).run(planted, show=3)


def test_the_one_layer_that_tells_the_object_follows_it_exactly(found):
    assert found.layers == (0, 1, 2, 3) and set(found.objects) == {"squares/1", "squares/2"}
    assert found.figures["jf"].argmax() == 2 and found.figures["j"][2] > 0.8
    assert found.figures["j_recall"][2] == 1 and max(np.delete(found.figures["j"], 2)) < 0.4


def test_an_object_that_moves_by_patches_moves_by_as_many_tokens(found, clip):
    (whole,) = davis.clips(clip)
    assert set(found.shown) == {0, 4, 9}
    for frame, masks in found.shown.items():
        truth = whole.mask(frame)
        assert masks.shape == (4, 32, 32)
        middle = (slice(PATCH // 2, None, PATCH),) * 2  # of each patch: enlarging blurs the borders in between
        np.testing.assert_array_equal(masks[2][middle], truth[middle])
        if frame == 0:
            np.testing.assert_array_equal(masks[0], masks[3])


def test_batches_do_not_matter_nor_which_layers_are_asked_for(planted, clip, found):
    other = Tracking(clip, layers=(2, -1), batch_size=7).run(planted)
    assert other.layers == (2, 3)
    for name, values in other.figures.items():
        np.testing.assert_allclose(values, found.figures[name][2:], atol=1e-9)


def test_a_mesh_gives_the_same_figures(planted, clip, found):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    graphdef, params = split(planted)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(planted, mesh)))
    placed.planted_layer, placed.preprocess = 2, planted.preprocess
    other = Tracking(clip, batch_size=4).run(placed)
    for name, values in other.figures.items():
        # A layer without information may change its mind at a rounding; where there is some, nothing changes.
        np.testing.assert_allclose(values[2], found.figures[name][2], atol=1e-9)
        np.testing.assert_allclose(values, found.figures[name], atol=0.02)


def test_proportions_are_kept_where_asked_for(planted, tmp_path):
    folder = moving(tmp_path, "wide", frames=3)
    for kind in ("frames", "masks"):
        for path in (tmp_path / "wide" / kind).iterdir():
            PIL.Image.open(path).crop((0, 0, 32, 24)).save(path)
    task = Tracking(folder, resize="short", image_size=16, layers=(0,))
    assert task._preprocess(planted, (32, 24), PATCH).shape == (16, 20)
    assert task.run(planted).shown[0].shape == (1, 16, 20)


def test_the_evaluator_gives_a_figure_a_layer(planted, clip, found):
    config = {"name": "tracking", "data": {"path": clip}, "layers": (2,), "batch_size": 4, "every_steps": 3}
    figures = evals.create(config)(planted)
    assert set(figures) == {
        f"layer_02_{name}" for name in ("jf", "j", "f", "j_recall", "j_decay", "f_recall", "f_decay")
    }
    assert figures["layer_02_jf"] == pytest.approx((figures["layer_02_j"] + figures["layer_02_f"]) / 2)
    assert figures["layer_02_jf"] == pytest.approx(found.figures["jf"][2])


def test_what_does_not_fit_is_refused(planted, tmp_path):
    small = moving(tmp_path, "small", frames=3, frame_size=(28, 32))
    with pytest.raises(ValueError, match="28x32 pixels and its mask 32x32; want masks of the frames' size"):
        Tracking(small)(planted)
    bare = moving(tmp_path, "bare", frames=3, objects=())
    with pytest.raises(ValueError, match="shows no object"):
        Tracking(bare)(planted)
    change = moving(tmp_path, "change", frames=3)
    PIL.Image.new("L", (30, 30)).save(tmp_path / "change" / "masks" / "001.png")
    with pytest.raises(ValueError, match=r"001.png is \(30, 30\), the first frame's mask \(32, 32\)"):
        Tracking(change, layers=(0,))(planted)
    for wrong, message in (
        ({"resize": "crop"}, "'crop' is unknown"),
        ({"layers": "some"}, 'must be "all" or a list'),
        ({"batch_size": 0}, "batch_size=0"),
        ({"previous": 0}, "must be at least 1"),
        ({"temperature": 0}, "temperature=0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Tracking(small), **wrong)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.models.clip import CLIP, CLIPConfig, unit
from pe_jax.models.text import TextConfig, TextTower
from pe_jax.models.vision import VisionConfig
from pe_jax.types import split
from tests.golden import weights

VISION = VisionConfig(12, 4, 16, 2, 2, 24, True, "attention", 10, pool_heads=2)
TEXT = TextConfig(9, 12, 3, 3, 20, 10, vocab_size=31)


@pytest.fixture(scope="module")
def model() -> CLIP:
    config = CLIPConfig(VISION, TEXT)
    graphdef, _ = split(zoo.abstract(config))
    return nnx.merge(graphdef, pe.to_params(weights.tensors(config), config))


def images(*shape: int) -> jax.Array:
    return jnp.asarray(weights.images(0, *shape, 3))


def ids(batch: int, length: int = 9) -> jax.Array:
    return jnp.asarray(weights.ids(0, batch, length, 31))


def test_call_gives_unit_rows_and_the_scale_itself(model):
    image, text, scale = model(images(2, 12, 8), ids(3))
    assert image.shape == (2, 10) and text.shape == (3, 10)
    np.testing.assert_allclose(jnp.linalg.norm(image, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(text, axis=-1), 1, rtol=1e-6)
    assert float(scale) == pytest.approx(float(jnp.exp(model.log_scale[...])), rel=1e-6)


def test_scale_starts_at_one_over_the_temperature_of_clip():
    fresh = jax.jit(lambda: CLIP(CLIPConfig(VISION, TEXT), rngs=nnx.Rngs(0)).log_scale[...])
    assert float(jnp.exp(fresh())) == pytest.approx(1 / 0.07)


def test_encoders_give_what_the_call_gives(model):
    image, text, _ = model(images(2, 12, 8), ids(3))
    np.testing.assert_allclose(model.encode_image(images(2, 12, 8)), image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(ids(3)), text, rtol=1e-5, atol=1e-6)
    raw = model.encode_image(images(2, 12, 8), normalize=False)
    np.testing.assert_allclose(unit(raw), image, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_video_is_the_mean_of_its_frames(model, normalize):
    video = images(2, 3, 8, 12)
    frames = jnp.stack([model.encode_image(video[:, f], normalize=normalize) for f in range(3)])
    np.testing.assert_allclose(model.encode_video(video, normalize=normalize), frames.mean(0), rtol=1e-5, atol=1e-6)


def test_text_is_pooled_at_the_first_end_and_blind_to_what_follows(model):
    text = ids(3)
    end = int(jnp.argmax(text[1]))
    assert end < 8
    changed = text.at[1, end + 1 :].set(5)
    np.testing.assert_allclose(model.encode_text(changed), model.encode_text(text), rtol=1e-6)
    again = text.at[1, end + 1 :].set(30)  # more end tokens: the first one counts
    np.testing.assert_allclose(model.encode_text(again), model.encode_text(text), rtol=1e-6)


def test_shorter_ids_give_what_padded_ones_give(model):
    text = ids(3)[2:]
    assert int(jnp.argmax(text[0])) < 6
    np.testing.assert_allclose(model.encode_text(text[:, :6]), model.encode_text(text), rtol=1e-5, atol=1e-6)


def test_ids_longer_than_the_context_are_refused(model):
    with pytest.raises(ValueError, match="ids are 10 long; this text tower reads at most 9: truncate them"):
        model.text(ids(2, 10))


def test_unit_has_a_finite_gradient_at_a_zero_row():
    x = jnp.zeros((2, 3)).at[1].set(jnp.asarray([3.0, 0, 4]))
    np.testing.assert_allclose(unit(x), [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: unit(x).sum())(x)))


def test_towers_of_different_joint_widths_are_refused():
    with pytest.raises(ValueError, match=r"vision\.output_width=10 and text\.output_width=11 differ"):
        CLIPConfig(VISION, dataclasses.replace(TEXT, output_width=11))


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_text_and_its_gradients_are_the_same_under_remat(model, remat):
    def gradients(config: TextConfig):
        graphdef, _ = split(nnx.eval_shape(lambda: TextTower(config, rngs=nnx.Rngs(0))))
        loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(ids(2))))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(split(model.text)[1])

    for a, b in zip(*(jax.tree.leaves(gradients(dataclasses.replace(TEXT, remat=r))) for r in ("none", remat))):  # noqa: B905
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_text_tower_starts_as_open_clips():
    config = TextConfig(32, 128, 3, 4, 512, 96, vocab_size=999)
    params = jax.jit(lambda: split(TextTower(config, rngs=nnx.Rngs(0)))[1])()
    blocks = params["blocks"]
    for leaf, std in (
        (params["token_embedding"], 0.02),
        (params["position"], 0.01),
        (params["projection"], 128**-0.5),
        (blocks["attention"]["qkv"]["kernel"], 128**-0.5),
        (blocks["attention"]["out"]["kernel"], 128**-0.5 * 6**-0.5),
        (blocks["mlp"]["up"]["kernel"], 256**-0.5),
        (blocks["mlp"]["down"]["kernel"], 128**-0.5 * 6**-0.5),
    ):
        assert float(leaf.std()) == pytest.approx(std, rel=0.05)
    for part in (blocks["attention"]["qkv"], blocks["attention"]["out"], blocks["mlp"]["up"], blocks["mlp"]["down"]):
        assert not np.any(part["bias"])

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.types import split
from tests.golden import weights

CONFIG = VisionConfig(20, 4, 24, 5, 3, 40, True, "attention", 14, pool_heads=2)  # grid 5x5


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return filled(CONFIG)


def filled(config: VisionConfig) -> VisionTower:
    """A tower with weights of the written rule: random biases and norms too, and nothing to compile."""
    graphdef, _ = split(zoo.abstract(config))
    return nnx.merge(graphdef, pe.to_params(weights.tensors(config), config))


def images(batch: int = 2, height: int = 12, width: int = 8) -> jax.Array:
    return jnp.asarray(weights.images(0, batch, height, width, 3))


def variant(tower: VisionTower, **changes) -> VisionTower:
    """The same parameters under a changed configuration."""
    graphdef, _ = split(zoo.abstract(dataclasses.replace(CONFIG, **changes)))
    return nnx.merge(graphdef, split(tower)[1])


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


class TestFeatures:
    def test_one_pass_gives_what_separate_passes_give(self, tower):
        together = tower.features(images(), layers=(4, 0, 2))
        assert list(together) == [4, 0, 2]
        for k, x in together.items():
            close(x, tower.features(images(), layers=(k,))[k])

    def test_negatives_count_from_the_end_and_keep_the_names_asked_for(self, tower):
        found = tower.features(images(), layers=(-1, 5, -4, 2))
        np.testing.assert_array_equal(found[-1], found[5])
        np.testing.assert_array_equal(found[-4], found[2])

    def test_zero_is_what_enters_the_first_block(self, tower):
        x = tower.features(images(), layers=(0,))[0]
        assert x.shape == (2, 7, 24)
        # Normalised by `norm_pre`: undoing its scale and bias leaves mean 0 and variance 1.
        x = (x - tower.norm_pre.bias[...]) / tower.norm_pre.scale[...]
        np.testing.assert_allclose(x.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(x.var(-1), 1, rtol=1e-3)

    def test_last_layer_and_head_make_the_embedding(self, tower):
        close(tower.head(tower.features(images())[-1]), tower(images()))

    def test_class_token_can_be_left_out(self, tower):
        with_it, without = (tower.features(images(), (3,), class_token=flag)[3] for flag in (True, False))
        assert without.shape == (2, 3 * 2, 24)
        np.testing.assert_array_equal(with_it[:, 1:], without)

    def test_are_the_same_under_jit(self, tower):
        jitted = jax.jit(lambda model, x: model.features(x, layers=(1, -1)))(tower, images())
        for k, x in tower.features(images(), layers=(1, -1)).items():
            close(jitted[k], x)

    @pytest.mark.parametrize("remat", ["block", "dots"])
    def test_and_their_gradients_are_the_same_under_remat(self, tower, remat):
        def loss(tower: VisionTower, x: jax.Array) -> jax.Array:
            found = tower.features(x, layers=(2, 4))
            return jnp.sum(jnp.sin(found[2])) + jnp.sum(jnp.cos(found[4]))

        def gradients(tower: VisionTower):
            graphdef, params = split(tower)
            return jax.jit(jax.value_and_grad(lambda p, x: loss(nnx.merge(graphdef, p), x)))(params, images())

        jax.tree.map(lambda a, b: close(b, a, 1e-4), gradients(tower), gradients(variant(tower, remat=remat)))

    @pytest.mark.parametrize("layers, length", [((3,), 3), ((1, 2), 2), ((0, -1), 5)])
    def test_scan_stops_after_the_last_layer_asked_for(self, tower, layers, length):
        assert scan_lengths(lambda x: tower.features(x, layers=layers)) == [length]

    def test_of_layer_zero_alone_run_no_block(self, tower):
        assert scan_lengths(lambda x: tower.features(x, layers=(0,))) == []


def scan_lengths(function) -> list[int]:
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["length"]
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(images()).jaxpr))


class TestTruncate:
    def test_gives_the_tokens_of_that_layer(self, tower):
        cut = tower.truncate(3)
        assert cut.config.depth == 3 and not hasattr(cut, "pool")
        close(cut(images()), tower.features(images(), (3,))[3])

    def test_is_a_slice_of_the_blocks(self, tower):
        cut, whole = split(tower.truncate(2))[1], split(tower)[1]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), cut["blocks"], whole["blocks"])

    def test_refuses_to_leave_nothing(self, tower):
        with pytest.raises(ValueError, match="leave no block"):
            tower.truncate(0)


class TestSizes:
    @pytest.mark.parametrize("height, width", [(20, 20), (4, 36)])
    def test_any_multiple_of_the_patch_works(self, tower, height, width):
        assert tower(images(3, height, width)).shape == (3, 14)
        assert tower.features(images(3, height, width))[-1].shape == (3, 1 + height * width // 16, 24)

    def test_a_tower_without_class_token_has_only_patches(self):
        tower = filled(dataclasses.replace(CONFIG, class_token=False))
        assert tower.features(images(), class_token=True)[-1].shape == (2, 6, 24)

    def test_examples_do_not_see_each_other(self, tower):
        close(tower(images(3))[1:2], tower(images(3)[1:2]))


class TestErrors:
    @pytest.mark.parametrize(
        "bad, message",
        [
            (np.zeros((2, 8, 8, 3), np.uint8), r"images are uint8; want float in \[-1, 1\]"),
            (
                np.zeros((2, 8, 10, 3), np.float32),
                "8x10 pixels; height and width must be multiples of the patch size 4",
            ),
        ],
    )
    def test_images_that_cannot_be_taken(self, tower, bad, message):
        with pytest.raises(Exception, match=message):  # ValueError; jaxtyping's own first where shapes are checked
            tower._tokens(bad, (1,), None)

    def test_channels_first(self, tower):
        with pytest.raises(ValueError, match=r"want \[B, H, W, 3\], channels last"):
            tower._tokens(np.zeros((2, 3, 8, 8), np.float32), (1,), None)

    @pytest.mark.parametrize("layer", [6, -6])
    def test_a_layer_that_does_not_exist(self, tower, layer):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist; this tower has blocks 1 to 5"):
            tower.features(images(), layers=(layer,))

    def test_no_layer_at_all(self, tower):
        with pytest.raises(ValueError, match="layers is empty"):
            tower.features(images(), layers=())

    def test_width_and_heads_that_do_not_fit(self):
        with pytest.raises(ValueError, match="width=24 is not a multiple of heads=5"):
            VisionTower(dataclasses.replace(CONFIG, heads=5), rngs=nnx.Rngs(0))


class TestBfloat16:
    def test_is_close_to_float32_and_keeps_float32_parameters(self, tower):
        half = variant(tower, dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(split(half)[1])} == {jnp.dtype("float32")}
        x, y = (np.asarray(t(images()), np.float64) for t in (tower, half))
        assert np.linalg.norm(x - y) / np.linalg.norm(x) < 0.03  # 8 bits of mantissa through 5 blocks

    def test_computes_in_bfloat16(self, tower):
        assert variant(tower, dtype="bfloat16").features(images())[-1].dtype == jnp.bfloat16


class TestDropPath:
    def test_is_off_without_a_key(self, tower):
        np.testing.assert_array_equal(variant(tower, drop_path=0.5)(images()), tower(images()))

    def test_is_reproducible_by_its_key(self, tower):
        dropping = variant(tower, drop_path=0.5)
        first, again, other = (dropping(images(), jax.random.key(k)) for k in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3

    def test_truncation_leaves_earlier_randomness_alone(self, tower):
        dropping, key = variant(tower, drop_path=0.5), jax.random.key(3)
        several = dropping.features(images(4), layers=(2, 5), key=key)
        close(dropping.features(images(4), layers=(2,), key=key)[2], several[2])


@pytest.fixture(scope="module")
def params():
    """A fresh tower's, at a width where statistics are sharp."""
    config = VisionConfig(64, 8, 128, 3, 4, 384, True, "attention", 96, layer_scale=0.1, pool_heads=2)
    return jax.jit(lambda: split(VisionTower(config, rngs=nnx.Rngs(0)))[1])()


class TestInitialisation:
    """PE's published initialisation."""

    @pytest.mark.parametrize("name", ["position", "projection", "class_token"])
    def test_embeddings_and_projection_are_normal_at_one_over_root_width(self, params, name):
        tolerance = 0.2 if name == "class_token" else 0.05
        assert float(params[name].std()) == pytest.approx(128**-0.5, rel=tolerance)

    def test_probe_is_standard_normal(self, params):
        assert float(params["pool"]["probe"].std()) == pytest.approx(1, rel=0.2)

    @pytest.mark.parametrize("where", ["blocks", "pool"])
    def test_qkv_is_xavier_uniform_of_the_fused_matrix_with_zero_biases(self, params, where):
        attention = params[where]["attention"]
        limit = (6 / (4 * 128)) ** 0.5
        assert float(jnp.abs(attention["qkv"]["kernel"]).max()) == pytest.approx(limit, rel=0.01)
        assert float(attention["qkv"]["kernel"].std()) == pytest.approx(limit / 3**0.5, rel=0.02)
        assert not np.any(attention["qkv"]["bias"]) and not np.any(attention["out"]["bias"])

    @pytest.mark.parametrize("path, fan_in", [("up", 128), ("down", 384)])
    def test_mlp_is_uniform_at_one_over_root_fan_in(self, params, path, fan_in):
        kernel, bias = (params["blocks"]["mlp"][path][leaf] for leaf in ("kernel", "bias"))
        for leaf in (kernel, bias):
            assert float(jnp.abs(leaf).max()) == pytest.approx(fan_in**-0.5, rel=0.02)
            assert float(leaf.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.06)

    def test_patch_and_output_kernels_are_uniform_at_one_over_root_fan_in(self, params):
        for kernel, fan_in in ((params["patch"]["kernel"], 192), (params["blocks"]["attention"]["out"]["kernel"], 128)):
            assert float(jnp.abs(kernel).max()) == pytest.approx(fan_in**-0.5, rel=0.02)

    def test_norms_are_one_and_zero_and_layer_scale_its_constant(self, params):
        for norm in (params["norm_pre"], params["norm_post"], params["blocks"]["norm1"], params["pool"]["norm"]):
            assert np.all(norm["scale"] == 1) and not np.any(norm["bias"])
        assert np.all(params["blocks"]["scale1"]["gamma"] == np.float32(0.1))

    def test_blocks_differ_from_each_other(self, params):
        kernel = params["blocks"]["mlp"]["up"]["kernel"]
        assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.05

    def test_depends_on_the_seed_alone(self):
        draw = jax.jit(lambda seed: split(VisionTower(CONFIG, rngs=nnx.Rngs(params=seed)))[1]["projection"])
        first, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

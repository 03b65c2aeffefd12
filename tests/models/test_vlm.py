"""The vision-language model without a reference: visual places, packing, generation, meshes, configurations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import api, sharding
from pe_jax.models import zoo
from pe_jax.models.decoder import DecoderConfig
from pe_jax.models.layers import gelu
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.types import split

# Every axis a number of its own. A chunk has 6 x 6 patches, 9 visual tokens by pooling 2.
TOWER = VisionConfig(24, 4, 24, 2, 2, 40, True, "none", None, layer_scale=0.1, drop_path=0.5, norm_post=False)
READER = DecoderConfig(64, 32, 3, 4, 2, 10, 48, 99, 100.0, tied=False)
SMALL = VLMConfig(TOWER, READER, image_token=60, pooling=2)
TEXT = np.int32(-1)


@functools.cache
def small(**changes) -> VLM:
    """Every parameter random, norms and biases too: a constant would hide a wrong axis."""
    graphdef, params = split(zoo.abstract(dataclasses.replace(SMALL, **changes)))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = 1 if path[-1].key in ("scale", "gamma") else 0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(leaf.shape, np.float32))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, params))


def pixels(*leading: int, size: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*leading, size, size, 3)).astype(np.float32)


def rows(*samples: list[int | tuple[int, int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and slots of rows written as ids and (first slot, count) runs of visual tokens, padded with zeros."""
    tokens, slots = np.zeros((len(samples), length), np.int32), np.full((len(samples), length), TEXT)
    for row, sample in enumerate(samples):
        at = 0
        for part in sample:
            first, count = part if isinstance(part, tuple) else (-1, 1)
            tokens[row, at : at + count] = SMALL.image_token if isinstance(part, tuple) else part
            slots[row, at : at + count] = np.arange(first, first + count) if isinstance(part, tuple) else -1
            at += count
    return tokens, slots


def same(got, want, what="", rtol=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert got.shape == want.shape and error < rtol, (what, got.shape, want.shape, error)


def same_tree(got, want, rtol=1e-4):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        same(a, b, jax.tree_util.keystr(path), rtol)


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("name", "tower", "reader", "projector"),
    [
        ("PLM-1B", "PE-Lang-L14-448", "Llama-3.2-1B", 1024 * 2048 + 2048**2 + 2 * 2048),
        ("PLM-3B", "PE-Lang-L14-448", "Llama-3.2-3B", 1024 * 3072 + 3072**2 + 2 * 3072),
        ("PLM-8B", "PE-Lang-G14-448", "Llama-3.1-8B", 1536 * 4096 + 4096**2 + 2 * 4096),
    ],
)
def test_released_models_are_their_released_parts_and_a_projector(name, tower, reader, projector):
    config = zoo.architecture(name)
    assert isinstance(config, VLMConfig) and config.vision == zoo.architecture(tower)
    parts = split(zoo.abstract(name))[1]
    decoder = dataclasses.replace(zoo.decoder(reader), context_length=config.decoder.context_length)
    if name == "PLM-8B":  # its positions are not stretched
        assert config.decoder.rope_scaling is None
        decoder = dataclasses.replace(decoder, rope_scaling=None)
    assert config.decoder == decoder
    assert {part: zoo.count(tree) for part, tree in parts.items()} == {
        "vision": zoo.count(split(zoo.abstract(tower))[1]),
        "projector": projector,
        "decoder": {"PLM-1B": 1_235_814_400, "PLM-3B": 3_212_749_824, "PLM-8B": 8_030_261_248}[name],
    }
    assert config.chunk_tokens() == 256


def test_a_model_is_meant_by_names_and_a_tap_by_a_change_of_one_or_by_all_its_fields():
    config = zoo.vlm("PE-Core-G14-448", "Llama-3.2-3B", tap=47, pooling=2, layer_scale=0.1, drop_path=0.1)
    assert config.vision == dataclasses.replace(zoo.architecture("PE-Lang-G14-448"), drop_path=0.1)
    assert (config.image_token, zoo.vlm("PE-Core-L14-336", "Qwen2.5-7B").image_token) == (128_002, 151_655)
    assert zoo.vlm("PE-Core-G14-448", "Llama-3.2-3B", tap=-4).vision.depth == 47
    spec = {"vision": "PE-Core-G14-448", "decoder": "Llama-3.2-3B", "tap": 47, "pooling": 2, "layer_scale": 0.1}
    assert zoo.architecture(spec | {"drop_path": 0.1}) == config == zoo.architecture(zoo.to_dict(config))
    changed = zoo.architecture({"base": "PLM-8B", "pooling": 1, "vision": {"drop_path": 0.1}, "decoder": {"depth": 3}})
    plm = zoo.architecture("PLM-8B")
    assert changed == dataclasses.replace(
        plm,
        vision=dataclasses.replace(plm.vision, drop_path=0.1),
        decoder=dataclasses.replace(plm.decoder, depth=3),
        pooling=1,
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PLM-2B", "no released model; did you mean PLM-"),
        ({"base": "PLM-1B", "poling": 1}, "VLMConfig has no field 'poling'; did you mean pooling"),
        ({"base": "PLM-1B", "vision": {"widht": 1}}, "VisionConfig has no field 'widht'"),
        ({"base": "PLM-1B", "image_token": 128_256}, "image_token=128256 is not in the vocabulary of 128256"),
        ({"base": "PLM-1B", "image_token": -1}, "image_token=-1 is not in the vocabulary"),
        ({"base": "PLM-1B", "projector": "mpl"}, "projector='mpl' is unknown; use one of mlp, linear"),
        ({"base": "PLM-1B", "pooling": 0}, "pooling=0 must be at least 1"),
        ({"base": "PLM-1B", "pooling": 3}, "image_size=448 is not a multiple of 42, the patch size 14 times pooling=3"),
        ({"base": "PLM-1B", "vision": {"norm_post": True}}, "'norm_post': True.*want pool=\"none\""),
        ({"decoder": "Llama-3.2-1B"}, 'A "decoder" needs a "vision"'),
        ({"vision": "PE-Core-L14-336", "decoder": "Llama-3.2-1B", "tap": 25}, "layer 25 does not exist"),
        ({"vision": "PE-Core-L14-336", "decoder": "Llama-3.2-1B", "tap": 0}, "tap=0 would leave no block"),
        ({"vision": "PE-Core-L14-336", "decoder": "Llama-3.2-1B", "layerscale": 1}, "did you mean layer_scale"),
        ({"vision": TOWER, "decoder": READER}, "vocabulary of 64 is neither Llama 3's nor Qwen2's"),
    ],
)
def test_an_architecture_that_does_not_exist_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        zoo.architecture(spec)


# ------------------------------------------------------------------------------------------------------- visual tokens


@pytest.mark.parametrize(("projector", "pooling"), [("mlp", 2), ("linear", 3)])
def test_visual_tokens_are_the_towers_last_ones_projected_and_then_averaged(projector, pooling):
    model = small(projector=projector, pooling=pooling)
    images = pixels(2, 3)
    x = model.vision.features(images.reshape(6, 24, 24, 3), (2,), class_token=False)[2]
    if projector == "mlp":
        x = gelu(model.projector.up(x))
    x = np.asarray(model.projector.down(x)).reshape(2, 3, 6 // pooling, pooling, 6 // pooling, pooling, 32)
    same(model.visual_tokens(images), x.mean((3, 5)).reshape(2, -1, 32))


def test_embeddings_hold_visual_tokens_where_slots_say_and_text_elsewhere():
    model, images = small(), pixels(2, 3)
    tokens, slots = rows([5, (9, 9), 6, (3, 4)], [(0, 2), 7], length=17)
    visual, text, got = (
        np.asarray(x)
        for x in (model.visual_tokens(images), model.decoder.embed(tokens), model.embed(tokens, images, slots))
    )
    np.testing.assert_allclose(got[slots < 0], text[slots < 0], rtol=1e-6)
    row, at = np.nonzero(slots >= 0)
    np.testing.assert_allclose(got[row, at], visual[row, slots[row, at]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.embed(tokens, None, None), text)


def test_chunks_that_no_slot_names_change_nothing_and_get_no_gradient():
    graphdef, params = split(small())
    tokens, slots = rows([5, (9, 9), 6, 7], [4, 3], length=17)
    images = pixels(2, 3)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(images):
        logits = nnx.merge(graphdef, params)(tokens, images, slots)
        return jnp.sum(logits**2), logits

    grads, logits = run(images)
    used = np.abs(np.asarray(grads)).sum((2, 3, 4)) > 0
    assert used.tolist() == [[False, True, False], [False, False, False]]
    other = np.where(used[:, :, None, None, None], images, pixels(2, 3, seed=5))
    np.testing.assert_array_equal(run(other)[1], logits)
    same(logits[1], small()(tokens, None, None)[1])


def test_two_samples_packed_into_a_row_have_the_logits_of_each_alone():
    model, images = small(), pixels(1, 3)
    one, other = [5, (0, 9), 6, 7], [4, 3, (9, 18), 2]
    tokens, slots = rows(one + other, length=37)
    segments = np.array([[1] * 12 + [2] * 21 + [0] * 4])
    packed = model(tokens, images, slots, segments)
    tokens, slots = rows(one, length=37)
    same(packed[:, :12], model(tokens, images, slots)[:, :12])
    tokens, slots = rows([4, 3, (0, 18), 2], length=37)
    same(packed[:, 12:33], model(tokens, images[:, [1, 2, 0]], slots)[:, :21])


def test_drop_path_is_of_each_chunk_alone_and_only_with_a_key():
    model, images = small(), np.broadcast_to(pixels(1, 1), (2, 3, 24, 24, 3))
    still, moved = model.visual_tokens(images), model.visual_tokens(images, jax.random.key(0))
    assert len(np.unique(np.asarray(moved).reshape(6, -1)[:, 0])) > 1
    same(still.reshape(6, -1), np.broadcast_to(still[0, :9].reshape(1, -1), (6, 288)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"images": (2, 3, 24, 20, 3)}, r"images are \[2, 3, 24, 20, 3\]; want squares of pixels"),
        ({"images": (2, 3, 3, 24, 24)}, "channels last"),
        ({"images": (2, 24, 24, 3)}, r"\[B, C, S, S, 3\]"),
        ({"images": (2, 3, 20, 20, 3)}, "image_size=20 is not a multiple of 8"),
        ({"images": (1, 3, 24, 24, 3)}, "images are of 1 rows, tokens of 2"),
        ({"slots": (2, 6)}, r"slots are int32\[2, 6\]; want an integer for each token, \[2, 7\]"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(shapes, message):
    shapes = {"tokens": (2, 7), "images": (2, 3, 24, 24, 3), "slots": (2, 7)} | shapes
    tokens, slots = (np.zeros(shapes[name], np.int32) for name in ("tokens", "slots"))
    # Not through the shape checker of the tests, which would refuse some of these before.
    with pytest.raises(ValueError, match=message):
        VLM.embed.__wrapped__(small(), tokens, np.zeros(shapes["images"], np.float32), slots)


def test_bytes_missing_partners_and_slots_that_no_chunk_fills_are_refused():
    model, images = small(), pixels(1, 2)
    tokens, slots = rows([5, (17, 1), 6], length=4)
    model.embed(tokens, images, slots)
    for wrong in (slots + (slots >= 0), slots - 1):
        with pytest.raises(ValueError, match="2 chunks of 24 pixels hold visual tokens 0 to 17, and -1 is none"):
            model.embed(tokens, images, wrong)
    embedded = jax.jit(model.embed)(tokens, images, slots + (slots >= 0))
    assert np.isnan(embedded[:, 1]).all() and not np.isnan(embedded[:, [0, 2, 3]]).any()
    with pytest.raises(ValueError, match="belong together"):
        model.embed(tokens, images, None)
    with pytest.raises(ValueError, match="images are uint8; want float"):
        VLM.visual_tokens.__wrapped__(model, images.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------- generation


def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of different lengths and chunk counts."""
    tokens, slots = rows([5, (0, 9), 6, 7], [3], [2, (0, 9), (9, 9), 1, 8], length=22)
    return tokens, np.array([12, 1, 21]), pixels(3, 2), slots


def test_generated_tokens_are_those_of_passes_without_a_cache_whatever_stands_in_other_rows():
    model, (tokens, lengths, images, slots) = small(), prompts()
    made = model.generate(tokens, lengths, images, slots, max_new_tokens=5, chunk=4)
    whole = jnp.pad(tokens, ((0, 0), (0, 5)))
    places = jnp.pad(slots, ((0, 0), (0, 5)), constant_values=-1)
    for step in range(5):
        logits = model(whole, images, places)
        new = jnp.argmax(logits[jnp.arange(3), lengths + step - 1], -1)
        np.testing.assert_array_equal(made.tokens[:, step], new)
        whole = whole.at[jnp.arange(3), lengths + step].set(new)


def test_streamed_tokens_are_the_generated_ones_also_left_padded_and_until_a_stop():
    model, (tokens, lengths, images, slots) = small(), prompts()
    made = model.generate(tokens, lengths, images, slots, max_new_tokens=5, chunk=4)
    stop = [int(made.tokens[0, 1])]
    made = model.generate(tokens, lengths, images, slots, max_new_tokens=5, chunk=4, stop=stop)
    assert made.lengths[0] <= 2
    left = [np.stack([np.roll(row, 22 - n) for row, n in zip(x, lengths, strict=True)]) for x in (tokens, slots)]
    streamed = model.stream(left[0], lengths, images, left[1], max_new_tokens=5, chunk=4, stop=stop, left_padded=True)
    got = np.stack(list(streamed), 1)
    np.testing.assert_array_equal(got, made.tokens[:, : got.shape[1]])


# ------------------------------------------------------------------------------------------------- training and meshes


def batch() -> dict[str, np.ndarray]:
    """Eight rows of two samples and padding, chunks left over in some."""
    samples = [[row, (0, 9), 20 + row, 30] + ([(9, 9), 40 + row] if row % 3 else [(9, 4)]) for row in range(8)]
    tokens, slots = rows(*samples, length=24)
    segments = np.array([[1] * 12 + [2] * (10 if row % 3 else 4) + [0] * (2 if row % 3 else 8) for row in range(8)])
    targets = np.where((slots < 0) & (segments > 0), np.roll(tokens, -1, 1), -1)
    return {"tokens": tokens, "slots": slots, "segments": segments, "targets": targets, "images": pixels(8, 3)}


def loss(graphdef, params, batch):
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(batch["tokens"], batch["images"], batch["slots"], batch["segments"], jax.random.key(2))
    targets = batch["targets"]
    scores = jax.nn.log_softmax(model.decoder.logits(hidden))
    right = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[:, :, None], 2)[:, :, 0]
    return -jnp.sum(jnp.where(targets >= 0, right, 0)) / jnp.sum(targets >= 0)


@functools.cache
def plain():
    graphdef, params = split(small())
    return jax.jit(jax.value_and_grad(functools.partial(loss, graphdef)))(params, batch())


REMAT = {"vision": dataclasses.replace(TOWER, remat="block"), "decoder": dataclasses.replace(READER, remat="dots")}


@pytest.mark.parametrize(
    ("shape", "changes"), [({"data": 2, "fsdp": 2, "tensor": 2}, {}), ({"fsdp": 8}, REMAT)], ids=["plain", "recomputed"]
)
def test_eight_devices_give_the_loss_and_every_gradient_of_one_also_recomputed(shape, changes):
    mesh = sharding.make_mesh(shape)
    graphdef, params = split(small(**changes))
    params = jax.device_put(params, sharding.param_shardings(small(**changes), mesh))
    with jax.set_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, graphdef)))(
            params, sharding.global_batch(batch(), mesh)
        )
    same(value, plain()[0])
    same_tree(grads, plain()[1])


def test_no_row_leaves_its_device():
    """Where parameters are whole, embedding needs no collective at all, and its gradient only sums of parameters'."""
    mesh = sharding.make_mesh({"data": 8})
    graphdef, params = split(small())
    given = sharding.global_batch(batch(), mesh)

    def embed(params):
        model = nnx.merge(graphdef, params)
        return jnp.sum(model.embed(given["tokens"], given["images"], given["slots"]) ** 2, (1, 2))

    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.replicated(mesh))
        forward = jax.jit(embed).lower(params).compile().as_text() or ""
        backward = jax.jit(jax.grad(lambda params: jnp.sum(embed(params)))).lower(params).compile().as_text() or ""
    moves = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [move for move in (*moves, "all-reduce") if f" {move}(" in forward]
    assert not [move for move in moves if f" {move}(" in backward] and "all-reduce(" in backward


def test_every_parameter_is_cut_over_fsdp_and_kernels_over_tensor_too():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    shardings = sharding.param_shardings(zoo.abstract("PLM-8B"), mesh)
    paths = jax.tree_util.tree_leaves_with_path(shardings)
    specs = {jax.tree_util.keystr(path, simple=True, separator="."): tuple(cut.spec) for path, cut in paths}
    assert specs["projector.up.kernel"] == ("fsdp", "tensor") and specs["projector.down.kernel"] == ("tensor", "fsdp")
    narrow = [name for name, spec in specs.items() if "fsdp" not in spec and "bias" not in name]
    assert not narrow, narrow


def test_half_precision_is_of_activations_alone():
    model = small(
        vision=dataclasses.replace(TOWER, dtype="bfloat16"), decoder=dataclasses.replace(READER, dtype="bfloat16")
    )
    assert model.visual_tokens(pixels(1, 2)).dtype == jnp.bfloat16
    tokens, slots = rows([5, (0, 9), 6], length=12)
    hidden = model.hidden(tokens, pixels(1, 2), slots)
    assert hidden.dtype == jnp.bfloat16
    same(hidden, small().hidden(tokens, pixels(1, 2), slots), rtol=0.05)


def test_the_public_api_takes_one_with_its_preprocessing_and_in_any_precision():
    config = api._with_dtype(SMALL, "bfloat16")
    assert (config.vision.dtype, config.decoder.dtype) == ("bfloat16", "bfloat16")
    model = api._assemble(config, split(small())[1], None)
    assert isinstance(model, VLM) and model.preprocess.size == (24, 24)

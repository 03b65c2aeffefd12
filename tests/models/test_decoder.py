"""Language decoders without a reference: the cache, packing, prefill, generation, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import losses, sharding
from pe_jax.models import decoder, zoo
from pe_jax.models.decoder import Decoder, DecoderConfig, RopeScaling
from pe_jax.types import split

# Every axis a number of its own; scaled rotary positions, biases, an output layer of its own.
SMALL = DecoderConfig(
    vocab_size=64,
    width=24,
    depth=3,
    heads=6,
    kv_heads=2,
    head_dim=8,
    mlp_width=40,
    context_length=99,
    rope_theta=100.0,
    rope_scaling=RopeScaling(4.0, original_length=16),
    qkv_bias=True,
    tied=False,
)
# From the releases' own pages and files.
COUNTS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
}


@functools.cache
def small(**changes) -> Decoder:
    """Every parameter random, norms and biases too: a constant would hide a wrong axis."""
    config = dataclasses.replace(SMALL, **changes)
    graphdef, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(leaf.shape, np.float32))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, params))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, shape, dtype=np.int32)


def same(got, want, what="", rtol=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert got.shape == want.shape and error < rtol, (what, got.shape, want.shape, error)


def gradients(model, loss):
    graphdef, params = split(model)
    return jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params))))(params)


def same_tree(got, want, rtol=1e-4):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        same(a, b, jax.tree_util.keystr(path), rtol)


# ------------------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    _, params = split(nnx.eval_shape(lambda: Decoder(zoo.decoder(name), rngs=nnx.Rngs(0))))
    assert zoo.count(params) == COUNTS[name]


def test_every_known_decoder_is_counted():
    assert set(COUNTS) == set(zoo.DECODERS)


def test_a_decoder_is_meant_by_its_name_by_a_change_of_one_or_by_all_its_fields():
    base = zoo.decoder("Llama-3.1-8B-Instruct")
    plain = zoo.decoder({"base": "Llama-3.1-8B", "rope_scaling": None, "remat": "block"})  # PLM-8B's positions
    assert plain == dataclasses.replace(base, rope_scaling=None, remat="block")
    assert base.rope_scaling == RopeScaling(8.0)
    assert zoo.decoder(dataclasses.asdict(base)) == base == zoo.decoder(base)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Llama-3.2-2B", "no known decoder; did you mean Llama-3.2-"),
        ({"base": "Qwen2.5-3B", "widht": 3}, "no field 'widht'; did you mean width"),
        ({"width": 3}, "DecoderConfig lacks vocab_size"),
        ({"base": "Qwen2.5-3B", "kv_heads": 3}, "heads=16 is not a multiple of kv_heads=3"),
        ({"base": "Qwen2.5-3B", "head_dim": 5}, "head_dim=5 is odd"),
        ({"base": "Qwen2.5-3B", "remat": "some"}, "remat='some' is unknown"),
        ({"base": "Llama-3.2-3B", "rope_scaling": {"factor": 0.5}}, "factor >= 1"),
    ],
)
def test_an_architecture_that_does_not_exist_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        zoo.decoder(spec)


def test_scaled_frequencies_are_stretched_kept_or_between_by_wavelength():
    config = zoo.decoder("Llama-3.2-3B")
    plain = decoder.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaled = decoder.rope_frequencies(config)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64), rtol=1e-6)
    long, short = wavelength > 8192, wavelength < 2048
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 32, rtol=1e-6)
    between = ~long & ~short
    assert between.sum() > 2 and np.all(np.diff(plain[between] / scaled[between]) > 0)
    assert np.all((plain[between] / scaled[between] > 1) & (plain[between] / scaled[between] < 32))


# ------------------------------------------------------------------------------------------------------- forward pass


def test_no_token_sees_a_later_one():
    before, after = tokens(2, 9), tokens(2, 9)
    after[:, 6:] = (after[:, 6:] + 1) % SMALL.vocab_size
    one, other = np.asarray(small()(before)), np.asarray(small()(after))
    np.testing.assert_array_equal(one[:, :6], other[:, :6])
    assert np.abs(one[:, 6:] - other[:, 6:]).max() > 0.1


def test_embeddings_in_place_of_ids_give_the_same():
    ids = tokens(2, 7)
    same(small().hidden(small().embed(ids)), small().hidden(ids))


def test_packed_samples_and_their_gradients_equal_each_alone():
    first, second = tokens(1, 5, seed=1), tokens(1, 3, seed=2)
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], 1)
    segments = np.repeat([1, 2, 0], [5, 3, 3])[None].astype(np.int32)
    weight = np.random.default_rng(2).standard_normal((1, 8, SMALL.width), np.float32)

    def of_packed(model):
        return jnp.sum(model.hidden(packed, segments)[:, :8] * weight)

    def of_each(model):
        return jnp.sum(jnp.concatenate([model.hidden(first), model.hidden(second)], 1) * weight)

    model = small(remat="block")
    same(model.hidden(packed, segments)[:, 5:8], model.hidden(second))
    grads, want = gradients(model, of_packed), gradients(model, of_each)
    assert not grads.pop("output").any() and not want.pop("output").any()  # hidden states do not score
    same_tree(grads, want)


def test_positions_begin_anew_wherever_the_segment_changes():
    segments = jnp.asarray([[7, 7, 7, 2, 0, 0], [1, 2, 2, 1, 1, 1]])
    np.testing.assert_array_equal(decoder.segment_positions(segments), [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2]])


@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_some_queries_at_a_time_equals_that_of_all(packed):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 11, 3, 4, 6)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 3, 11, 6)), jnp.float32) for _ in "kv")
    segments = jnp.asarray([[1] * 4 + [2] * 7, [1] * 9 + [0] * 2]) if packed else None
    at = jnp.arange(11)[None]

    def results(queries):
        def scalar(q, k, v):
            out = decoder.attend(q, k, v, at, segments, queries=queries)
            return jnp.sum(out**2), out

        grads, out = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    for got, want in zip(results(4), results(11), strict=True):
        same(got, want)


def test_the_tpu_kernel_gives_the_same_value_and_gradients():
    changes = {"head_dim": 64, "depth": 1, "heads": 4}
    ids = tokens(2, 128)
    segments = np.repeat([[1, 2], [4, 4]], [50, 78], axis=1).astype(np.int32)
    weight = np.random.default_rng(2).standard_normal((2, 128, SMALL.width), np.float32)

    def loss(model):
        return jnp.sum(model.hidden(ids, segments) * weight)

    got, want = (gradients(small(**changes, attention=kernel), loss) for kernel in ("flash", "xla"))
    assert not got.pop("output").any() and not want.pop("output").any()
    same_tree(got, want)
    same(*(small(**changes, attention=kernel).hidden(ids) for kernel in ("flash", "xla")), "not packed", 1e-4)


def test_what_the_backward_pass_keeps_changes_no_gradient():
    ids = tokens(2, 5)
    got, want = (gradients(small(remat=r), lambda model: jnp.sum(model(ids) ** 2)) for r in ("dots", "none"))
    same_tree(got, want)


# -------------------------------------------------------------------------------------------------------------- cache


def test_tokens_read_one_by_one_from_the_cache_equal_those_read_at_once():
    model, ids = small(), tokens(3, 9)
    want = model(ids)
    cache = model.new_cache(3, 11)
    for place in range(9):
        logits, cache = model.decode(ids[:, place], cache)
        same(logits, want[:, place], place)
    np.testing.assert_array_equal(cache.lengths, 9)


@pytest.mark.parametrize("chunk", [4, 99])
def test_prompts_read_in_chunks_equal_prompts_read_whole(chunk):
    model, ids, lengths = small(), tokens(4, 10), np.array([10, 3, 8, 1])
    hidden, cache = model.prefill(ids, lengths, model.new_cache(4, 16), chunk)
    for row, length in enumerate(lengths):
        same(hidden[row], model.hidden(ids[row : row + 1, :length])[0, -1], row)
    np.testing.assert_array_equal(cache.lengths, lengths)
    further = tokens(4, 2, seed=1)  # and what is read then stands behind each row's own prompt
    got, cache = model.extend(further, cache)
    for row, length in enumerate(lengths):
        whole = np.concatenate([ids[row, :length], further[row]])[None]
        same(got[row], model.hidden(whole)[0, -2:], row)


def test_rows_that_are_not_active_stay_as_they_are():
    model, ids = small(), tokens(2, 6)
    _, cache = model.extend(ids[:, :4], model.new_cache(2, 9))
    _, cache = model.decode(ids[:, 5], cache, np.array([True, False]))
    np.testing.assert_array_equal(cache.lengths, [5, 4])
    logits, _ = model.decode(ids[:, 4], cache)
    same(logits[1], model(ids[1:, :5])[0, -1])


# --------------------------------------------------------------------------------------------------------- generation

PROMPTS, LENGTHS = tokens(3, 7, seed=4), np.array([7, 2, 5])


@functools.cache
def likeliest(row: int, count: int = 9) -> tuple[int, ...]:
    """The likeliest tokens after one prompt, each found by a pass over all before it, without a cache."""
    ids = list(PROMPTS[row, : LENGTHS[row]])
    for _ in range(count):
        padded = np.array([ids + [0] * (16 - len(ids))], np.int32)
        ids.append(int(np.argmax(small()(padded)[0, len(ids) - 1])))
    return tuple(ids[LENGTHS[row] :])


@pytest.mark.parametrize(("left_padded", "embedded"), [(False, False), (True, False), (False, True)])
def test_prompts_of_different_lengths_go_on_as_each_would_alone(left_padded, embedded):
    prompts = PROMPTS
    if left_padded:
        prompts = np.stack([np.roll(row, 7 - length) for row, length in zip(PROMPTS, LENGTHS, strict=True)])
    made = small().generate(
        small().embed(prompts) if embedded else prompts, LENGTHS, max_new_tokens=9, left_padded=left_padded, chunk=3
    )
    np.testing.assert_array_equal(made.tokens, [likeliest(row) for row in range(3)])
    np.testing.assert_array_equal(made.lengths, 9)


def test_a_row_ends_with_its_first_stop_token_and_the_others_go_on():
    stop = (likeliest(0)[3], likeliest(2)[5])
    made = small().generate(PROMPTS, LENGTHS, max_new_tokens=9, stop=stop)
    streamed = np.stack(list(small().stream(PROMPTS, LENGTHS, max_new_tokens=9, stop=stop)), 1)
    for row in range(3):
        want = likeliest(row)
        ends = [place for place, token in enumerate(want) if token in stop]
        count = min(ends, default=8) + 1
        assert made.lengths[row] == count
        np.testing.assert_array_equal(made.tokens[row], [*want[:count], *[-1] * (9 - count)])
    np.testing.assert_array_equal(streamed, made.tokens[:, : streamed.shape[1]])
    assert not np.any(made.tokens[:, streamed.shape[1] :] != -1)
    assert min(made.lengths) < max(made.lengths)


def test_draws_are_a_rows_own_and_streamed_alike():
    options = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "key": jax.random.key(3)}
    all_rows = small().generate(PROMPTS, LENGTHS, **options).tokens
    alone = small().generate(PROMPTS[:1], LENGTHS[:1], **options).tokens
    np.testing.assert_array_equal(all_rows[:1], alone)
    np.testing.assert_array_equal(np.stack(list(small().stream(PROMPTS, LENGTHS, **options)), 1), all_rows)
    other = small().generate(PROMPTS, LENGTHS, **options | {"key": jax.random.key(4)}).tokens
    assert np.any(other != all_rows) and all_rows[:, 0].tolist() != [likeliest(row)[0] for row in range(3)]


def test_a_row_of_temperature_zero_takes_the_likeliest_beside_rows_that_draw():
    made = small().generate(PROMPTS, LENGTHS, max_new_tokens=5, temperature=[2.0, 0.0, 2.0], key=jax.random.key(0))
    np.testing.assert_array_equal(made.tokens[1], likeliest(1)[:5])
    assert made.tokens[0].tolist() != list(likeliest(0)[:5])


def test_draws_have_the_probabilities_of_the_logits_over_the_temperature():
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0])
    sampling = decoder._Sampling(jax.random.split(jax.random.key(0), 4000), jnp.full(4000, 0.7), None)
    drawn = decoder._choose(jnp.broadcast_to(logits, (4000, 4)), sampling, jnp.asarray(2))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, jax.nn.softmax(logits / 0.7), atol=0.03)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (5, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (5, 0.5, [1, 3]),
        (5, 0.35, [1]),
        (5, 0.71, [1, 2, 3]),
        (3, 0.4, [1]),
    ],
)
def test_truncation_keeps_the_likeliest_tokens_until_their_number_or_probability(top_k, top_p, kept):
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.25, 0.05]]))
    out = decoder.truncated(logits, jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32))[0]
    assert np.flatnonzero(np.isfinite(out)).tolist() == kept
    np.testing.assert_array_equal(out[np.array(kept)], logits[0, np.array(kept)])


# ------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("shape", "tied"), [({"fsdp": 4, "tensor": 2}, True), ({"data": 2, "fsdp": 2, "tensor": 2}, False)]
)
def test_gradients_on_a_mesh_equal_those_on_one_device(shape, tied, capfd):
    model, ids = small(tied=tied, remat="block"), tokens(8, 6)
    segments = np.repeat([[1, 2]], [2, 4], axis=1).repeat(8, 0).astype(np.int32)
    targets, weights = tokens(8, 6, seed=1), np.random.default_rng(0).random((8, 6), np.float32)

    def loss(model, ids, segments, targets, weights):
        return losses.next_token(model.hidden(ids, segments), model.output_table, targets, weights, chunk=4)[0]

    inputs = ids, segments, targets, weights
    want = gradients(model, lambda model: loss(model, *map(jnp.asarray, inputs)))
    graphdef, params = split(model)
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(model, mesh)
    with jax.set_mesh(mesh):
        cut = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in inputs]
        step = jax.jit(jax.grad(lambda params, *cut: loss(nnx.merge(graphdef, params), *cut)), out_shardings=shardings)
        got = step(jax.device_put(params, shardings), *cut)
    same_tree(got, want)
    assert "full rematerialization" not in capfd.readouterr().err


def test_generation_on_a_mesh_equals_that_on_one_device():
    graphdef, params = split(small())
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        model = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(small(), mesh)))
        prompts, lengths = np.concatenate([PROMPTS, PROMPTS[:1]]), np.append(LENGTHS, 7)
        cut = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (prompts, lengths)]
        made = model.generate(cut[0], cut[1], max_new_tokens=9, chunk=4)
    np.testing.assert_array_equal(made.tokens, [likeliest(row) for row in (0, 1, 2, 0)])


def test_a_mesh_that_would_cut_a_group_of_heads_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks/attention/.* has heads=2, which mesh axis tensor=4 does not divide"):
        sharding.param_shardings(small(), sharding.make_mesh({"data": 2, "tensor": 4}))


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.hidden(np.zeros((2, 3, 25), np.float32)),
            r"inputs are float32\[2, 3, 25\]; want integer ids .* \[B, L, 24\]",
        ),
        (lambda m: m.hidden(np.zeros((2, 0), np.int32)), "want integer ids"),
        (lambda m: m.hidden(tokens(2, 3), segments=np.zeros((2, 4), np.int32)), r"segments are \[2, 4\]; want"),
        (lambda m: m.extend(tokens(2, 5), m.new_cache(2, 4)), "2 rows with 4 places"),
        (lambda m: m.prefill(tokens(2, 5), np.array([5, 5]), m.new_cache(2, 5), 2), "need 6 places"),
        (lambda m: m.generate(tokens(2, 90), max_new_tokens=10), "more than the context of 99"),
        (lambda m: m.generate(tokens(2, 3), max_new_tokens=0), "max_new_tokens=0 must be"),
        (lambda m: m.generate(tokens(2, 3), np.array([3, 0]), max_new_tokens=2), r"lengths=\[3, 0\]; want 2 numbers"),
        (lambda m: m.generate(tokens(2, 3), max_new_tokens=2, temperature=1.0), "pass key="),
        (lambda m: m.generate(tokens(2, 3), max_new_tokens=2, temperature=-1.0), "not below 0"),
        (lambda m: m.generate(tokens(2, 3), max_new_tokens=2, temperature=[1.0] * 3), "one for each of 2 rows"),
        (lambda m: m.generate(tokens(2, 3), max_new_tokens=2, top_p=0.0), "top_p=0.0; want"),
        (lambda m: m.stream(tokens(2, 3), max_new_tokens=2, top_k=-1), "top_k=-1"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_it_is_compiled(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_the_kernel_refuses_lengths_it_cannot_take():
    with pytest.raises(ValueError, match='got 2 rows of 100 tokens, 2 key-value heads of 8 channels: use "auto"'):
        small(attention="flash").hidden(tokens(2, 100))

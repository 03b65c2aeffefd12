"""Weight files of language decoders: both layouts both ways, pieces, devices, configurations, and what is refused."""

import dataclasses
import json
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pe_jax import sharding
from pe_jax.convert import decoder, weights
from pe_jax.models import zoo
from pe_jax.models.decoder import DecoderConfig, RopeScaling, _turn, rope_frequencies
from pe_jax.types import split
from tests.convert import shrunken

LLAMA = DecoderConfig(
    vocab_size=32, width=12, depth=3, heads=8, kv_heads=4, head_dim=6, mlp_width=20, context_length=50,
    rope_theta=100.0, rope_scaling=RopeScaling(8.0), tied=True,
)  # fmt: skip
UNTIED = dataclasses.replace(LLAMA, tied=False)
QWEN = dataclasses.replace(UNTIED, head_dim=2, heads=6, kv_heads=2, qkv_bias=True, rope_scaling=None)
CASES = [(LLAMA, "hf"), (LLAMA, "meta"), (UNTIED, "hf"), (UNTIED, "meta"), (QWEN, "hf")]


def params(config: DecoderConfig, dtype=np.float32):
    def fill(tree, path=""):
        return {
            name: fill(branch, f"{path}.{name}")
            if isinstance(branch, dict)
            else shrunken.draw(f"{path}.{name}", branch.shape).astype(dtype)
            for name, branch in tree.items()
        }

    return fill(split(decoder.abstract(config))[1])


def tensors(config: DecoderConfig, layout: str) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in decoder.from_params(params(config), config, layout).items()}


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("config", "layout"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_go_into_a_layout_and_back_byte_for_byte(config, layout, dtype):
    ours = params(config, dtype)
    there = decoder.from_params(ours, config, layout)
    shrunken.assert_same(decoder.to_params(there, config, dtype=None), ours)


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_the_tensors_of_a_known_decoder_hold_all_its_parameters(name):
    config = zoo.decoder(name)
    abstract = split(decoder.abstract(config))[1]
    there = decoder.from_params(abstract, config, "hf")
    assert sum(int(np.prod(x.shape)) for x in there.values()) == zoo.count(abstract)
    assert there["model.layers.1.self_attn.k_proj.weight"].shape == (config.kv_heads * config.head_dim, config.width)


def test_metas_adjacent_pairs_turn_as_our_halves_do():
    """Scores of queries and keys by Meta's rule, complex numbers of adjacent channels, from Meta's own tensors."""
    there, c = tensors(LLAMA, "meta"), LLAMA
    x = np.random.default_rng(0).standard_normal((5, c.width)).astype(np.float32)
    places = np.array([0, 3, 4, 9, 30])

    def turned(weight, heads):
        y = (x @ weight.T).reshape(5, heads, c.head_dim // 2, 2)
        y = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * places[:, None] * rope_frequencies(c))[:, None]
        return np.stack([y.real, y.imag], -1).reshape(5, heads, c.head_dim)

    q, k = (turned(there[f"layers.1.attention.w{n}.weight"], h) for n, h in (("q", c.heads), ("k", c.kv_heads)))
    want = np.einsum("ngra,mga->grnm", q.reshape(5, c.kv_heads, c.group, -1), k)

    kernel = decoder.to_params(there, c)["blocks"]["attention"]["qkv"]["kernel"][1]
    qkv = (x @ kernel).reshape(1, 5, c.kv_heads, c.group + 2, c.head_dim)
    angles = places[None, :, None] * rope_frequencies(c)
    qk = _turn(qkv[:, :, :, :-1], (jnp.cos(angles), jnp.sin(angles)))[0]
    np.testing.assert_allclose(np.einsum("ngra,mga->grnm", qk[:, :, :-1], qk[:, :, -1]), want, rtol=1e-4, atol=1e-4)


def test_a_tied_model_is_read_with_and_without_its_output_layer():
    there = tensors(LLAMA, "hf")
    assert "lm_head.weight" not in there and "output.weight" in tensors(LLAMA, "meta")
    both = there | {"lm_head.weight": there["model.embed_tokens.weight"]}
    shrunken.assert_same(decoder.to_params(both, LLAMA), decoder.to_params(there, LLAMA))
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight.*tied=False"):
        decoder.to_params(both | {"lm_head.weight": there["model.embed_tokens.weight"] + 1}, LLAMA)


def test_rotary_frequencies_in_a_file_are_passed_over():
    there = tensors(LLAMA, "hf") | {"model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    shrunken.assert_same(decoder.to_params(there, LLAMA), params(LLAMA))
    meta = tensors(UNTIED, "meta") | {"rope.freqs": np.ones(3, np.float32)}
    shrunken.assert_same(decoder.to_params(meta, UNTIED), params(UNTIED))


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("shard_bytes", [4_000, 10**9])
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_safetensors_are_written_in_shards_of_a_size_and_read_with_their_configuration(tmp_path, config, shard_bytes):
    decoder.write(tmp_path, params(config), config, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes == 4_000)
    assert all(sum(x.nbytes for x in weights.read(file).values()) <= shard_bytes for file in files)
    for path in [tmp_path] if len(files) > 1 else [tmp_path, files[0]]:
        found, got = decoder.read(path)
        assert found == config
        shrunken.assert_same(got, params(config))


def test_weights_are_written_in_another_type(tmp_path):
    decoder.write(tmp_path, params(LLAMA), LLAMA, dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    shrunken.assert_same(decoder.read(tmp_path, dtype=None)[1], params(LLAMA, ml_dtypes.bfloat16))


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("config", [LLAMA, UNTIED], ids=["tied", "untied"])
def test_metas_pieces_are_joined_to_the_whole(tmp_path, config, pieces):
    decoder.write(tmp_path, params(config), config, "meta", pieces=pieces)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"consolidated.{n:02d}.pth" for n in range(pieces)]
    part = weights.read(files[-1])
    assert part["layers.0.attention.wq.weight"].shape == (48 // pieces, 12)
    assert part["layers.0.feed_forward.w2.weight"].shape == (12, 20 // pieces)
    assert part["layers.2.ffn_norm.weight"].shape == (12,)
    shrunken.assert_same(decoder.read(tmp_path, config)[1], params(config))


def test_an_embedding_that_was_cut_along_its_width_is_joined_along_it():
    there = tensors(UNTIED, "meta")  # as models before Llama 3 were
    pieces = decoder._cut({name: decoder.Lazy(x.shape, x.dtype, lambda x=x: x) for name, x in there.items()}, UNTIED, 2)
    for number, piece in enumerate(pieces):
        piece["tok_embeddings.weight"] = there["tok_embeddings.weight"][:, 6 * number : 6 * number + 6]
    shrunken.assert_same(decoder.to_params(decoder.merged(pieces, UNTIED), UNTIED), params(UNTIED))


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_tensors_go_straight_to_their_parts_of_a_mesh(layout):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    wanted = sharding.param_shardings(decoder.abstract(LLAMA), mesh)
    got = decoder.to_params(tensors(LLAMA, layout), LLAMA, wanted)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}, want {s}"), got, wanted
    )
    kernel = got["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 6, 10)
    shrunken.assert_same(got, params(LLAMA))


def test_the_host_holds_the_tensors_of_one_parameter_at_a_time():
    alive = most = 0

    def gone():
        nonlocal alive
        alive -= 1

    def make(x):
        nonlocal alive, most
        copy = x.copy()
        weakref.finalize(copy, gone)
        alive += 1
        most = max(most, alive)
        return copy

    class Watched(decoder.Lazy):
        def __array__(self, dtype=None, copy=None):
            return self._make()

    there = {n: Watched(x.shape, x.dtype, lambda x=x: make(x)) for n, x in tensors(UNTIED, "hf").items()}
    shrunken.assert_same(decoder.to_params(there, UNTIED), params(UNTIED))
    assert 3 <= most <= 4  # a query, a key and a value, and what came before them


# ------------------------------------------------------------------------------------------------------------ refusals


def test_every_key_that_does_not_fit_is_named_with_its_neighbours():
    there = tensors(UNTIED, "hf")
    there["model.layers.1.mlp.up.weight"] = there.pop("model.layers.1.mlp.up_proj.weight")
    there["model.norm.weight"] = np.ones(13, np.float32)
    there["lm_head.weight"] = there["lm_head.weight"].astype(np.int32)
    with pytest.raises(ValueError) as caught:
        decoder.to_params(there, UNTIED)
    for line in (
        "read as layout hf): 1 missing, 1 mis-shaped, 1 refused, 1 unexpected",
        "missing: model.layers.1.mlp.up_proj.weight [20, 12] (nearest in the file: model.layers.1.mlp.up.weight",
        "unexpected: model.layers.1.mlp.up.weight (nearest expected: model.layers.1.mlp.up_proj.weight",
        "model.norm.weight is [13], want [12]",
        "lm_head.weight is int32; want a floating type",
    ):
        assert line in str(caught.value), caught.value


def test_blocks_of_different_types_are_refused_unless_they_are_converted():
    there = tensors(LLAMA, "hf")
    there["model.layers.2.input_layernorm.weight"] = there["model.layers.2.input_layernorm.weight"].astype(np.float16)
    with pytest.raises(ValueError, match=r"layers.2.input_layernorm.weight is float16, the blocks before it float32"):
        decoder.to_params(there, LLAMA, dtype=None)
    decoder.to_params(there, LLAMA)


def test_parameters_of_another_architecture_are_not_written():
    with pytest.raises(ValueError, match=r"missing: output \[32, 12\]"):
        decoder.from_params(params(LLAMA), UNTIED, "hf")
    with pytest.raises(ValueError, match="1 unexpected"):
        decoder.from_params(params(UNTIED), LLAMA, "hf")


def pieces_of(config: DecoderConfig, count: int) -> list[dict[str, np.ndarray]]:
    there = decoder.from_params(params(config), config, "meta")
    return [{name: np.array(x) for name, x in part.items()} for part in decoder._cut(there, config, count)]


def test_pieces_that_do_not_make_the_model_are_refused():
    with pytest.raises(ValueError, match=r"is \[8, 12\] in each of 3 pieces, want \[32, 12\] in all.*missing"):
        decoder.merged(pieces_of(LLAMA, 4)[:3], LLAMA)
    with pytest.raises(ValueError, match=r"Pieces 0 and 1 differ in their names: norm.weight"):
        one, other = pieces_of(LLAMA, 2)
        decoder.merged([one, {name: x for name, x in other.items() if name != "norm.weight"}], LLAMA)
    with pytest.raises(ValueError, match=r"norm.weight differs between the pieces"):
        one, other = pieces_of(LLAMA, 2)
        decoder.merged([one, other | {"norm.weight": other["norm.weight"] + 1}], LLAMA)
    with pytest.raises(ValueError, match=r"output.weight is not of one shape in all pieces"):
        one, other = pieces_of(LLAMA, 2)
        decoder.merged([one, other | {"output.weight": other["output.weight"][:3]}], LLAMA)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LLAMA, {"layout": "timm"}, "layout='timm' must be one of hf, meta"),
        (QWEN, {"layout": "meta"}, 'layout="meta" has no biases'),
        (LLAMA, {"layout": "meta", "pieces": 8}, r"pieces=8 does not divide .*kv_heads"),
        (LLAMA, {"pieces": 2}, 'pieces=2 belongs to layout="meta"'),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        decoder.write(tmp_path, params(config), config, **options)


def test_weights_without_a_configuration_and_single_pieces_are_refused(tmp_path):
    decoder.write(tmp_path, params(LLAMA), LLAMA, "meta", pieces=2)
    with pytest.raises(ValueError, match=r"has no config.json to take the architecture from"):
        decoder.read(tmp_path)
    with pytest.raises(ValueError, match="is one of 2 pieces; give the folder"):
        decoder.read(tmp_path / "consolidated.01.pth", LLAMA)


# -------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_the_configuration_of_a_known_decoder_survives_config_json(name):
    config = zoo.decoder(name)
    assert decoder.from_hf_config(json.loads(json.dumps(decoder.to_hf_config(config)))) == config


def test_the_configuration_of_a_release_is_that_of_the_zoo():
    """Llama-3.2-1B's config.json as its release has it."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    assert decoder.from_hf_config(fields) == zoo.decoder("Llama-3.2-1B-Instruct")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'; want 'llama' or 'qwen2'"),
        (
            {"hidden_act": "gelu", "mlp_bias": True},
            "mlp_bias=True, want False; hidden_act='gelu', want 'silu'|silu.*mlp",
        ),
        ({"experts": 8}, "experts=8 is unknown"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rotary positions lack high_freq_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "want full_attention alone"),
        ({"use_sliding_window": True}, "use_sliding_window=True, want False"),
    ],
)
def test_a_configuration_of_what_is_not_built_is_refused(changes, message):
    fields = decoder.to_hf_config(LLAMA) | changes
    with pytest.raises(ValueError, match=message):
        decoder.from_hf_config({name: value for name, value in fields.items() if value is not None})


def test_a_qwen_whose_heads_its_configuration_cannot_say_is_refused():
    with pytest.raises(ValueError, match="has no head_dim, and 6 heads of 4 are not 12"):
        decoder.to_hf_config(dataclasses.replace(QWEN, head_dim=4))

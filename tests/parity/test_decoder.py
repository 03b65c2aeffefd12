"""Equality with transformers' Llama and Qwen2: logits, gradients, generated tokens, configurations and files."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from pe_jax.convert import decoder as convert
from pe_jax.convert import weights
from pe_jax.models import zoo
from pe_jax.models.decoder import Decoder, DecoderConfig, RopeScaling, rope_frequencies
from pe_jax.types import Params, split
from tests.golden import compare

# Every axis a number of its own. Rotary wavelengths lie on all three sides of the scaling's borders.
PLAIN = DecoderConfig(
    vocab_size=53,
    width=24,
    depth=2,
    heads=6,
    kv_heads=2,
    head_dim=12,
    mlp_width=40,
    context_length=200_000,
    rope_theta=500.0,
    tied=False,
)
CONFIGS = {
    "llama scaled tied": dataclasses.replace(PLAIN, rope_scaling=RopeScaling(8.0, original_length=512), tied=True),
    "llama": PLAIN,
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True, head_dim=4, norm_epsilon=1e-6),
}


@functools.cache
def theirs(name: str) -> Any:
    """transformers' model with every parameter random, norms and biases too."""
    torch.manual_seed(0)
    fields = convert.to_hf_config(CONFIGS[name])
    kind = transformers.Qwen2Config if fields["model_type"] == "qwen2" else transformers.LlamaConfig
    config = kind.from_dict(fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        one = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
        parameter.data = one + spread * torch.randn(parameter.shape)
    return model


def tensors(model: Any, value: Any = lambda p: p) -> dict[str, np.ndarray]:
    return {name: value(p).detach().numpy() for name, p in model.named_parameters()}


@functools.cache
def ours(name: str) -> Decoder:
    graphdef, _ = split(convert.abstract(CONFIGS[name]))
    return nnx.merge(graphdef, convert.to_params(tensors(theirs(name)), CONFIGS[name]))


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, PLAIN.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize(
    ("name", "first"), [("llama scaled tied", 0), ("llama scaled tied", 100_003), ("llama", 0), ("qwen2", 100_003)]
)
def test_logits_and_gradients(close, name, first):
    """Also far from the start, where a unit in the last place of a frequency would be an angle of 0.006."""
    tokens, places = ids(3, 17), first + np.arange(17)[None].repeat(3, 0)
    weight = np.random.default_rng(4).standard_normal((3, 17, PLAIN.vocab_size), np.float32)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = theirs(name).to(dtype)
        model.zero_grad()
        logits = model(torch.tensor(tokens).long(), position_ids=torch.tensor(places)).logits
        (logits * torch.tensor(weight)).sum().backward()
        found.append(({"logits": logits.detach().numpy()}, tensors(model, lambda p: p.grad)))

    graphdef, params = split(ours(name))

    def scalar(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(tokens, positions=places)
        return jnp.sum(logits * weight), logits

    grads, logits = jax.jit(jax.grad(scalar, has_aux=True))(params)
    by_name = {key: np.asarray(g) for key, g in convert.from_params(grads, CONFIGS[name], "hf").items()}
    assert by_name.keys() == found[0][1].keys()
    close(({"logits": np.asarray(logits)}, by_name), *found)


@pytest.mark.parametrize("name", CONFIGS)
def test_generated_tokens_are_the_same_for_prompts_of_different_lengths(name):
    prompts, lengths = ids(4, 9), np.array([9, 4, 1, 6])
    made = ours(name).generate(prompts, lengths, max_new_tokens=12, chunk=4)
    for row, length in enumerate(lengths):
        alone = torch.tensor(prompts[row : row + 1, :length]).long()
        want = theirs(name).generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        np.testing.assert_array_equal(made.tokens[row], want[0, length:].numpy(), str(row))


def test_no_known_decoder_turns_a_token_by_another_angle_in_all_its_context():
    for name in zoo.DECODERS:
        config = zoo.decoder(name)
        small = transformers.LlamaConfig.from_dict(
            convert.to_hf_config(dataclasses.replace(config, qkv_bias=False)) | {"num_hidden_layers": 1}
        )
        want = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(small).inv_freq.numpy()
        got = rope_frequencies(config)
        np.testing.assert_array_max_ulp(got, want, 1)
        assert np.abs(got - want).max() * config.context_length < 1e-4, name


@pytest.mark.parametrize("name", CONFIGS)
def test_files_that_transformers_writes_are_read_whatever_their_shards(tmp_path, name):
    theirs(name).float().save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, params = convert.read(tmp_path)
    assert config == CONFIGS[name]
    want = dict(tensors(theirs(name)))
    got = convert.from_params(params, config, "hf")
    assert got.keys() == want.keys()
    for key in want:
        assert np.asarray(got[key]).tobytes() == want[key].tobytes(), key


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_files_that_we_write(tmp_path, name):
    convert.write(tmp_path, split(ours(name))[1], CONFIGS[name], shard_bytes=20_000)
    assert len(json.loads((tmp_path / weights.INDEX).read_text())["weight_map"]) > 10
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = ids(2, 11)
    want = model.eval()(torch.tensor(tokens).long()).logits.detach().numpy()
    assert compare.error(np.asarray(ours(name)(tokens)), want) < compare.TOLERANCE

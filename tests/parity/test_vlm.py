"""Equality with transformers' Perception-LM and with PLM's own module: logits, gradients, generation, files."""

import dataclasses
import functools
import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from pe_jax.convert import pe as pe_convert
from pe_jax.convert import slots, weights
from pe_jax.convert import vlm as convert
from pe_jax.models import zoo
from pe_jax.models.decoder import DecoderConfig, RopeScaling
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.types import Params, split
from tests.golden import compare
from tests.parity import reference
from tests.parity.test_transformers import fill

# Every axis a number of its own; a chunk has 4 x 4 patches.
TOWER = VisionConfig(56, 14, 48, 3, 4, 96, True, "none", None, layer_scale=0.1, norm_post=False)
READER = DecoderConfig(67, 40, 2, 10, 2, 12, 56, 500, 500.0, tied=False)
CONFIGS = {
    "scaled, pooled, tied, with a class token": VLMConfig(
        TOWER,
        dataclasses.replace(READER, rope_scaling=RopeScaling(8.0, original_length=64), tied=True),
        image_token=62,
        pooling=2,
    ),
    "plain": VLMConfig(dataclasses.replace(TOWER, class_token=False, layer_scale=None), READER, image_token=62),
}
QWEN = dataclasses.replace(READER, qkv_bias=True, head_dim=4, norm_epsilon=1e-6)
CONFIGS["qwen2"] = dataclasses.replace(CONFIGS["plain"], decoder=QWEN, pooling=2)
NAMES = list(CONFIGS)
PLMS = NAMES[:2]  # which Meta's programs have, too


@functools.cache
def theirs(name: str) -> Any:
    """transformers' model with every parameter random, norms, biases and LayerScale too."""
    fields = transformers.PerceptionLMConfig.from_dict(convert.to_hf_config(CONFIGS[name]))
    model = transformers.PerceptionLMForConditionalGeneration._from_config(fields, attn_implementation="eager").eval()
    fill(model, 3)
    return model


def tensors(model: Any, value: Any = lambda p: p) -> dict[str, np.ndarray]:
    return {name: value(p).detach().numpy() for name, p in model.named_parameters()}


@functools.cache
def ours(name: str) -> VLM:
    graphdef, _ = split(convert.abstract(CONFIGS[name]))
    return nnx.merge(graphdef, convert.to_params(tensors(theirs(name).float()), CONFIGS[name]))


def inputs(name: str) -> dict[str, np.ndarray]:
    """Three rows: two chunks apart from each other, text alone, one chunk; and where their chunks are."""
    count, rng = CONFIGS[name].chunk_tokens(), np.random.default_rng(1)
    tokens = rng.integers(0, 60, (3, 2 * count + 9)).astype(np.int32)
    slots = np.full_like(tokens, -1)
    for row, at, chunk in ((0, 2, 0), (0, count + 5, 1), (2, 0, 0)):
        slots[row, at : at + count] = chunk * count + np.arange(count)
    tokens[slots >= 0] = CONFIGS[name].image_token
    images = rng.uniform(-1, 1, (3, 2, 56, 56, 3)).astype(np.float32)
    return {"tokens": tokens, "slots": slots, "images": images, "used": images[[0, 0, 2], [0, 1, 0]]}


def torch_pixels(images: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(images).movedim(-1, -3).to(dtype)


def our_gradients(name: str, given: dict[str, np.ndarray], weight: np.ndarray) -> tuple[np.ndarray, Params]:
    graphdef, params = split(ours(name))

    def scalar(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(given["tokens"], given["images"], given["slots"])
        return jnp.sum(logits * weight), logits

    grads, logits = jax.jit(jax.grad(scalar, has_aux=True))(params)
    return np.asarray(logits), grads


def logits_weight(given: dict[str, np.ndarray]) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((*given["tokens"].shape, READER.vocab_size), np.float32)


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_the_gradients_of_all_parameters(close, name):
    given = inputs(name)
    weight = logits_weight(given)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = theirs(name).to(dtype)
        model.zero_grad()
        logits = model(
            torch.tensor(given["tokens"]).long(), pixel_values=torch_pixels(given["used"][:, None], dtype)
        ).logits
        (logits * torch.tensor(weight)).sum().backward()
        found.append(({"logits": logits.detach().numpy()}, tensors(model, lambda p: p.grad)))
    logits, grads = our_gradients(name, given, weight)
    by_name = {key: np.asarray(g) for key, g in convert.from_params(grads, CONFIGS[name], "hf").items()}
    assert by_name.keys() == found[0][1].keys() and all(np.any(g) for g in by_name.values())
    close(({"logits": logits}, by_name), *found)


@pytest.mark.parametrize("name", PLMS)
def test_generated_tokens_are_the_same_token_for_token(name):
    given, count = inputs(name), CONFIGS[name].chunk_tokens()
    lengths = np.array([2 * count + 9, 5, count + 3])
    made = ours(name).generate(given["tokens"], lengths, given["images"], given["slots"], max_new_tokens=8, chunk=7)
    for row, chunks in ((0, given["used"][:2]), (1, None), (2, given["used"][2:])):
        alone = torch.tensor(given["tokens"][row : row + 1, : lengths[row]]).long()
        want = theirs(name).float().generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, do_sample=False, eos_token_id=None,
            pad_token_id=0, **({} if chunks is None else {"pixel_values": torch_pixels(chunks[:, None])}),
        )  # fmt: skip
        np.testing.assert_array_equal(made.tokens[row], want[0, lengths[row] :].numpy(), str(row))


@pytest.mark.parametrize("name", NAMES)
def test_folders_that_transformers_writes_are_read_whatever_their_shards(tmp_path, name):
    theirs(name).float().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, params = convert.read(tmp_path)
    assert config == CONFIGS[name]
    want, got = tensors(theirs(name)), convert.from_params(params, config, "hf")
    assert got.keys() == want.keys()
    for key in want:
        assert np.asarray(got[key]).tobytes() == want[key].tobytes(), key


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_folders_that_we_write(tmp_path, name):
    convert.write(tmp_path, split(ours(name))[1], CONFIGS[name], shard_bytes=60_000)
    assert len(json.loads((tmp_path / weights.INDEX).read_text())["weight_map"]) > 10
    model, report = transformers.PerceptionLMForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    want = tensors(theirs(name).float())
    for key, got in tensors(model).items():
        assert got.tobytes() == want[key].tobytes(), key


@pytest.mark.parametrize("name", zoo.VLMS)
def test_released_models_have_the_parameters_and_the_configuration_that_transformers_gives_them(tmp_path, name):
    config = zoo.architecture(name)
    fields = transformers.PerceptionLMConfig.from_dict(convert.to_hf_config(config))
    with torch.device("meta"):
        model = transformers.PerceptionLMForConditionalGeneration(fields)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert shapes == slots.expected(convert._slots(config, "hf"))
    assert sum(p.numel() for p in model.parameters()) == zoo.count(split(zoo.abstract(name))[1])
    fields.save_pretrained(tmp_path)
    assert convert.read_config(tmp_path) == config


# ------------------------------------------------------------------------------------------------------ PLM's own code


@pytest.fixture(scope="module")
def plm(perception_models: Any) -> types.ModuleType:
    """PLM's module. It names xformers, a package of CUDA kernels, for kinds of masks that no test asks for."""
    if "xformers" not in sys.modules:
        package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
        ops.AttentionBias, ops.fmha = type("AttentionBias", (), {}), types.ModuleType("xformers.ops.fmha")
        sys.modules |= {"xformers": package, "xformers.ops": ops}
    from apps.plm import transformer

    return transformer


def meta_model(plm: types.ModuleType, name: str) -> Any:
    from core.utils import InitArgs

    fields = convert.to_meta_config(CONFIGS[name])["model"]
    model = plm.LMTransformer(plm.LMTransformerArgs(**fields | {"mlp_init": InitArgs(**fields["mlp_init"])})).eval()
    stored = convert.from_params(split(ours(name))[1], CONFIGS[name], "meta")
    model.load_state_dict({key: torch.tensor(np.asarray(x)) for key, x in stored.items()}, strict=True)
    return model.requires_grad_(True)  # its `eval` freezes everything


@pytest.mark.parametrize("name", PLMS)
def test_logits_and_gradients_equal_those_of_plms_own_module(close, plm, name):
    given = inputs(name)
    weight = logits_weight(given)
    model = meta_model(plm, name)
    chunks = np.concatenate([given["used"][:2], np.ones((1, 56, 56, 3), np.float32), given["used"][2:]])
    found = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).rope_embeddings.reset_parameters()
        model.rope_embeddings.to(dtype)
        model.zero_grad()
        logits = model(
            torch.tensor(given["tokens"]).long(),
            images=torch_pixels(chunks, dtype),
            image_pos_index=torch.tensor(given["slots"]),
            num_chunks=[2, 1, 1],
            media_type=["multi_image", "text", "image"],
        )
        (logits * torch.tensor(weight)).sum().backward()
        found.append(({"logits": logits.detach().numpy()}, tensors(model, lambda p: p.grad)))
    logits, grads = our_gradients(name, given, weight)
    by_name = {key: np.asarray(g) for key, g in convert.from_params(grads, CONFIGS[name], "meta").items()}
    close(({"logits": logits}, {key: by_name[key] for key in found[0][1]}), *found)


@pytest.mark.parametrize("name", PLMS)
def test_a_consolidated_file_that_plm_writes_is_read(tmp_path, plm, name):
    model = meta_model(plm, name)
    torch.save(model.state_dict(), tmp_path / convert.CONSOLIDATED)
    _, params = convert.read(tmp_path, CONFIGS[name])
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(split(ours(name))[1]), strict=True
    ):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", PLMS)
def test_metas_encoder_loads_the_tower_of_a_trained_model_strictly(meta, name):
    model = ours(name)
    config, params = convert.tower(CONFIGS[name], split(model)[1])
    module = reference.build(meta, config)
    stored = pe_convert.from_params(params, config, "meta")
    module.load_state_dict({key: torch.tensor(np.array(x)) for key, x in stored.items()}, strict=True)
    images = inputs(name)["used"]
    want = module.forward_features(torch_pixels(images), norm=False).detach().numpy()
    assert compare.error(np.asarray(model.vision.tokens(jnp.asarray(images))), want) < compare.TOLERANCE

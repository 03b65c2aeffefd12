"""Equality with transformers: the text tower with its CLIP, the vision tower with the one inside Perception-LM."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.models.text import TextConfig, TextTower
from pe_jax.models.vision import VisionTower
from pe_jax.types import split

TEXT = TextConfig(context_length=9, width=24, depth=3, heads=4, mlp_width=40, output_width=20, vocab_size=57)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Every parameter random, so that no bias, norm or scale can hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        noise = spread * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + (1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0)


def close(got, want, what: str) -> None:
    got, want = np.asarray(got, np.float64), want.detach().double().numpy()
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert got.shape == want.shape and error < 1e-4, (what, got.shape, want.shape, error)


def clip_text(config: TextConfig) -> transformers.CLIPTextModelWithProjection:
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.output_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            hidden_act="gelu",
            eos_token_id=config.vocab_size - 1,
            bos_token_id=config.vocab_size - 2,
            pad_token_id=0,
        )
    ).eval()
    fill(model, 0)
    return model


def from_clip_text(module: torch.nn.Module, config: TextConfig, value=lambda p: p) -> dict:
    """transformers' parameters, or with `value` their gradients, in our tree."""
    leaf = {name: value(p).detach().numpy() for name, p in module.named_parameters()}
    heads, dim = config.heads, config.width // config.heads

    def layer(i: int) -> dict:
        p = f"text_model.encoder.layers.{i}."
        if p + "layer_norm1.weight" not in leaf:
            p = f"encoder.layers.{i}."
        qkv = [leaf[f"{p}self_attn.{n}_proj.weight"].T.reshape(config.width, heads, dim) for n in "qkv"]
        bias = [leaf[f"{p}self_attn.{n}_proj.bias"].reshape(heads, dim) for n in "qkv"]
        norm = lambda n: {"scale": leaf[f"{p}{n}.weight"], "bias": leaf[f"{p}{n}.bias"]}  # noqa: E731
        return {
            "norm1": norm("layer_norm1"),
            "norm2": norm("layer_norm2"),
            "attention": {
                "qkv": {
                    "kernel": np.stack(qkv, 2).reshape(config.width, -1),  # head by head its q, k and v
                    "bias": np.stack(bias, 1).reshape(-1),
                },
                "out": {
                    "kernel": leaf[p + "self_attn.out_proj.weight"].T,
                    "bias": leaf[p + "self_attn.out_proj.bias"],
                },
            },
            "mlp": {
                "up": {"kernel": leaf[p + "mlp.fc1.weight"].T, "bias": leaf[p + "mlp.fc1.bias"]},
                "down": {"kernel": leaf[p + "mlp.fc2.weight"].T, "bias": leaf[p + "mlp.fc2.bias"]},
            },
        }

    one = {name.rsplit("text_model.", 1)[-1]: array for name, array in leaf.items()}
    return {
        "token_embedding": one["embeddings.token_embedding.weight"],
        "position": one["embeddings.position_embedding.weight"],
        "blocks": jax.tree.map(lambda *x: np.stack(x), *(layer(i) for i in range(config.depth))),
        "norm_final": {"scale": one["final_layer_norm.weight"], "bias": one["final_layer_norm.bias"]},
        "projection": one["text_projection.weight"].T,
    }


def test_text_tower_and_all_its_gradients_equal_transformers_clip():
    model = clip_text(TEXT)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, TEXT.vocab_size - 2, (5, TEXT.context_length))
    for row, end in enumerate((2, 4, 8, 6, 1)):  # the end token at other places; what follows must not matter
        ids[row, end] = TEXT.vocab_size - 1
        ids[row, end + 1 :] = 0
    weight = rng.standard_normal((5, TEXT.output_width), dtype=np.float32)
    want = model(input_ids=torch.tensor(ids)).text_embeds
    (want * torch.tensor(weight)).sum().backward()

    graphdef, _ = split(nnx.eval_shape(lambda: TextTower(TEXT, rngs=nnx.Rngs(0))))
    params = from_clip_text(model, TEXT)
    forward = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(ids, jnp.int32)))
    close(forward(params), want, "embeddings")
    grads = jax.grad(lambda params: jnp.sum(forward(params) * weight))(params)
    wanted = from_clip_text(model, TEXT, value=lambda p: p.grad)
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        close(got, torch.tensor(expected), jax.tree_util.keystr(path))


@pytest.mark.parametrize("class_token", [True, False])
def test_vision_tower_equals_the_one_inside_perception_lm(class_token):
    size, patch = 56, 14
    config = dataclasses.replace(
        zoo.architecture("PE-Lang-L14-448"),
        image_size=size, width=48, depth=3, heads=4, mlp_width=96, class_token=class_token,
    )  # fmt: skip
    model = transformers.PerceptionLMForConditionalGeneration(
        transformers.PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "do_pooling": False,
                "num_classes": 0,
                "global_pool": "",
                "model_args": {
                    "img_size": [size, size],
                    "patch_size": patch,
                    "embed_dim": config.width,
                    "depth": config.depth,
                    "num_heads": config.heads,
                    "mlp_ratio": config.mlp_width / config.width,
                    "class_token": class_token,
                    "init_values": 0.1,
                    "use_post_transformer_norm": False,
                    "ref_feat_shape": [size // patch, size // patch],
                    "rope_grid_offset": 1.0 if class_token else 0.0,
                },
            },
            text_config=transformers.LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
            ),
            vision_use_cls_token=class_token,
            image_token_id=62,
            video_token_id=63,
        )
    ).eval()
    tower = model.model.vision_tower
    fill(tower, 1)
    # The wrapper builds timm's pooling head, which no one calls and PE-Lang does not have.
    tensors = {name.removeprefix("timm_model."): p.detach().numpy() for name, p in tower.state_dict().items()}
    tensors = {name: x for name, x in tensors.items() if not name.startswith("attn_pool.")}
    graphdef, _ = split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
    ours = nnx.merge(graphdef, pe.to_params(tensors, config, layout="timm"))
    images = np.random.default_rng(2).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    want = tower(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    close(ours.features(images, layers=(-1,))[-1], want, "tokens")

"""timm's own Perception Encoders give our embeddings, tokens and gradients at their native size.

The weights reach timm by its converter from Meta's layout, not by ours. At other sizes timm resamples its position
embedding in another way (bicubic, antialiased), so those are compared with Meta's module only.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import _convert_pe

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from tests.golden import compare, weights
from tests.parity import reference

NATIVE = {
    "PE-Core-T16-384": "vit_pe_core_tiny_patch16_384",
    "PE-Core-S16-384": "vit_pe_core_small_patch16_384",
    "PE-Core-B16-224": "vit_pe_core_base_patch16_224",
    "PE-Spatial-T16-512": "vit_pe_spatial_tiny_patch16_512",
}
SHRUNKEN = {
    "PE-Core-L14-336": "vit_pe_core_large_patch14_336",
    "PE-Core-G14-448": "vit_pe_core_gigantic_patch14_448",
    "PE-Spatial-S16-512": "vit_pe_spatial_small_patch16_512",
    "PE-Spatial-B16-512": "vit_pe_spatial_base_patch16_512",
    "PE-Spatial-L14-448": "vit_pe_spatial_large_patch14_448",
    "PE-Spatial-G14-448": "vit_pe_spatial_gigantic_patch14_448",
    "PE-Lang-L14-448": "vit_pe_lang_large_patch14_448",
    "PE-Lang-G14-448": "vit_pe_lang_gigantic_patch14_448",
}


@pytest.mark.parametrize("name", NATIVE)
def test_full_depth_at_native_size(close, name):
    check(close, tower(name), NATIVE[name], gradients=False)


@pytest.mark.parametrize("name", NATIVE)
def test_gradients_at_native_size(close, name):
    check(close, dataclasses.replace(tower(name), depth=2), NATIVE[name])


@pytest.mark.parametrize("name", SHRUNKEN)
def test_slice_with_a_grid_of_its_own(close, name):
    config = tower(name)
    check(close, dataclasses.replace(config, depth=1, image_size=4 * config.patch_size), SHRUNKEN[name])


def tower(name: str) -> VisionConfig:
    config = zoo.architecture(name)
    return config.vision if isinstance(config, CLIPConfig) else config


def check(close: Any, config: VisionConfig, timm_name: str, gradients: bool = True) -> None:
    module = timm.create_model(
        timm_name,
        pretrained=False,
        depth=config.depth,
        img_size=config.image_size,
        ref_feat_shape=(config.grid, config.grid),
        num_classes=config.output_width or 0,
        **({} if config.pool == "attention" else {"global_pool": ""}),
    ).eval()
    tensors, images = weights.tensors(config), weights.images(1, 1, config.image_size, config.image_size, 3)

    def forward(module: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": module(images)}

    exact, rough = (
        reference.evaluate(module, renamed(tensors), forward, images, dtype=dtype, gradients=gradients)
        for dtype in (torch.float64, torch.float32)
    )
    outputs, grads = compare.evaluate(config, tensors, compare.embedding, images, gradients=gradients)
    if gradients:
        moving = {"input 0": grads.pop("input 0")}
        grads = renamed(grads) | moving
        for _, theirs in (exact, rough):
            theirs.pop("head.bias", None)  # timm's head has one, PE's projection none
        grads.pop("head.bias", None)
    close((outputs, grads), exact, rough)


def renamed(tensors: compare.Arrays) -> compare.Arrays:
    """Meta's names and shapes to timm's, by timm. It only renames, cuts and transposes, so gradients may pass, too."""
    as_torch = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    return {name: x.numpy() for name, x in _convert_pe(as_torch, None, prefix="").items()}

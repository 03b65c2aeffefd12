"""A tower whose one block alone tells what is at a patch, by the red of its first pixel."""

import jax
import jax.numpy as jnp
from flax import nnx

from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from pe_jax.models.layers import resolve_layers
from pe_jax.models.vision import VisionTower
from pe_jax.types import split

DEPTH, PATCH, WIDTH, SIDE = 3, 4, 24, 32


class Planted(VisionTower):
    planted_layer = 0

    def features(self, images, layers=(-1,), class_token=True, key=None):
        found = super().features(images, layers, True, key)
        patch = self.config.patch_size
        shade = jnp.round(255 * (images[:, ::patch, ::patch, 0] + 1) / 2).astype(int)
        codes = 100 * jax.random.normal(jax.random.key(7), (256, self.config.width))
        told = codes[shade].reshape(len(images), -1, self.config.width)
        for asked, layer in zip(layers, resolve_layers(layers, self.config.depth), strict=True):
            if layer == self.planted_layer:
                found[asked] = found[asked].at[:, 1:].add(told)
        return {layer: tokens[:, int(not class_token) :] for layer, tokens in found.items()}


def planted(layer):
    config = zoo.VisionConfig(
        image_size=SIDE, patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=2, mlp_width=40, class_token=True,
        pool="none", output_width=None,
    )  # fmt: skip
    params = jax.jit(lambda: split(Planted(config, rngs=nnx.Rngs(0)))[1])()
    tower = nnx.merge(split(nnx.eval_shape(lambda: Planted(config, rngs=nnx.Rngs(0))))[0], params)
    tower.planted_layer, tower.preprocess = layer, Preprocess(SIDE)
    return tower

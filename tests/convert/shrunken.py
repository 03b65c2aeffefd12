"""Every released architecture at a size for tests, each axis a number of its own, and parameters drawn by name."""

import zlib

import numpy as np

from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.types import Params, split


def config(name: str, grid: int = 3) -> zoo.Architecture:
    released = zoo.architecture(name)
    vision = released.vision if isinstance(released, CLIPConfig) else released
    # 16 wide, because the pooler has 8 heads; 3 blocks and 2 heads of 8, patches as released.
    tower = {"image_size": grid * vision.patch_size, "width": 16, "depth": 3, "heads": 2, "mlp_width": 20}
    if not isinstance(released, CLIPConfig):
        return zoo.architecture({"base": name, **tower})
    text = {"context_length": 5, "width": 12, "depth": 2, "heads": 3, "mlp_width": 18, "vocab_size": 23}
    joint = {"output_width": 10}
    return zoo.architecture({"base": name, "vision": tower | joint, "text": text | joint})


def params(config: zoo.Architecture) -> Params:
    def fill(tree: Params, path: str = "") -> Params:
        return {
            name: fill(branch, f"{path}.{name}") if isinstance(branch, dict) else draw(f"{path}.{name}", branch.shape)
            for name, branch in tree.items()
        }

    return fill(split(zoo.abstract(config))[1])


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def assert_same(one: Params, other: Params) -> None:
    ours, theirs = dict(pe.parameters(one)), dict(pe.parameters(other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape and value.dtype == theirs[name].dtype, name
        assert np.asarray(value).tobytes() == np.asarray(theirs[name]).tobytes(), name

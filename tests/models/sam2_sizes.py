"""Small SAM 2.1s for tests, each axis a number of its own, and parameters drawn by name."""

import numpy as np

from pe_jax.convert import sam2
from pe_jax.models.sam2 import Sam2Config
from pe_jax.types import Params, split
from tests.convert import shrunken

DECODER = {"decoder_width": 32, "decoder_heads": 4, "decoder_mlp_width": 40, "mask_width": 12}
# windows that fill the grids of 24, 12, 6 and 3 tokens
WHOLE = Sam2Config(6, (2, 2, 4, 2), 1, (8, 6, 6, 3), (7,), 5, image_size=96, **DECODER)
# windows that do not, in stages with one block and with none but the one that enters
PADDED = Sam2Config(12, (1, 2, 3, 1), 3, (8, 4, 4, 2), (6,), 3, image_size=96, **DECODER)
LARGER = Sam2Config(8, (1, 1, 3, 2), 2, (4, 8, 6, 2), (4, 5), 8, image_size=128, **DECODER | {"decoder_width": 48})
# one block a stage, for facts that have nothing to do with the encoder
SMALL = Sam2Config(6, (1, 1, 1, 1), 1, (8, 4, 6, 2), (), 3, image_size=64, **DECODER)
SIZES = {"whole windows": WHOLE, "padded windows": PADDED, "larger": LARGER}


def params(config: Sam2Config) -> Params:
    """All random: kernels keep the scale of what they multiply, so that deep outputs neither vanish nor explode."""

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = shrunken.draw(path, shape)
        if path.endswith("scale"):
            return 1 + 0.3 * noise
        if path.endswith(("kernel", "patch")):
            inputs = shape[1:-1] if "blocks" in path or "weigh" in path else shape[:-1]
            return noise * float(np.prod(inputs)) ** -0.5
        return noise if path.endswith("frequencies") else 0.3 * noise

    def fill(tree: Params, path: str = "") -> Params:
        return {
            name: fill(branch, f"{path}.{name}") if isinstance(branch, dict) else draw(f"{path}.{name}", branch.shape)
            for name, branch in tree.items()
        }

    return fill(split(sam2.abstract(config))[1])


def prompts(size: int, count: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    """Two images with prompts of every kind: points inside, outside and none, boxes, and one mask an image."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, size, (2, count, 2, 2)), 2).reshape(2, count, 4)
    return {
        "images": rng.standard_normal((2, size, size, 3)).astype(np.float32),
        "points": rng.uniform(0, size, (2, count, 4, 2)).astype(np.float32),
        "labels": rng.choice([1, 0, -1], (2, count, 4)).astype(np.int32),
        "boxes": corners.astype(np.float32),
        "masks": (3 * rng.standard_normal((2, 1, size // 4, size // 4))).astype(np.float32),
    }

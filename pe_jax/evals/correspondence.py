"""Which token shows the same place in another view: nearest tokens of an image and of a known warp of it, by layer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8

from pe_jax.data.image import Preprocess, generator
from pe_jax.evals import features, inference, records
from pe_jax.models.layers import resolve_layers

_OUTSIDE = (128, 128, 128)  # what a warped view shows where the image ends
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclasses.dataclass(frozen=True)
class Matched:
    """What came of matching.

    Attributes:
      layers: Y layers, as resolved.
      figures: {"pck1", ...: [Y]}.
      places: how many tokens had a place in the other view.
    """

    layers: tuple[int, ...]
    figures: dict[str, Float[np.ndarray, "Y"]]
    places: int


@dataclasses.dataclass(frozen=True)
class Correspondence:
    """Evaluator `{"name": "correspondence", "data": {...}}` → `layer_07_pck1`, `layer_07_pck2` and so on, in [0, 1].

    Each image is seen as it is and turned, scaled and shifted by random amounts, the same for all layers and runs. Each
    token whose place lies inside the other view is matched to the token there whose features have the highest cosine;
    `pck1` is the share of matches whose middle is within 1 token of that place, which a perfect match always is. Layer
    0 is the patch embedding. Unlike tracking, this takes no labels: any images will do.

    Attributes:
      data: images, see `pe_jax.evals.records`.
      layers: "all", or layers as `VisionTower.features` takes them.
      image_size: pixels of a side; None takes the model's own.
      within: distances in tokens, each a figure of its own.
      rotation: greatest angle in degrees, either way.
      scale: least and greatest enlargement.
      shift: greatest shift along each side, as a share of it.
      batch_size: images in a forward pass, over all devices.
      seed: of the warps.
    """

    data: Mapping[str, Any]
    layers: str | Sequence[int] = "all"
    image_size: int | None = None
    within: Sequence[int] = (1, 2, 4)
    rotation: float = 30.0
    scale: Sequence[float] = (0.75, 1.33)
    shift: float = 0.1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} must be "all" or a list of layers.')
        if not len(self.within) or min(self.within) <= 0:
            raise ValueError(f"within={tuple(self.within)} must be distances above 0, like (1, 2, 4).")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={tuple(self.scale)} must be (least, greatest), both above 0.")
        if not (0 <= self.rotation <= 180 and 0 <= self.shift < 1):
            raise ValueError(f"rotation={self.rotation} must lie in [0, 180] and shift={self.shift} in [0, 1).")

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = self.run(model)
        return features.by_layer(found.layers, found.figures)

    def run(self, model: inference.Model, progress: Progress = lambda stage, done, total: None) -> Matched:
        """Matches the tokens of all images.

        Args:
          model: on any mesh; every process calls this.
          progress: told how far it is.

        Raises:
          ValueError: if no token of any image has a place in its other view.
        """
        config = inference.vision_tower(model).config
        asked = range(config.depth + 1) if isinstance(self.layers, str) else self.layers
        layers = tuple(sorted(set(resolve_layers(tuple(asked), config.depth))))
        preprocess = inference.preprocess_of(model, self.image_size)
        patch, images = config.patch_size, records.open(self.data).images

        def views(row: int) -> UInt8[np.ndarray, "2 H W 3"]:
            pixels = preprocess.pixels(images[row])
            return np.stack([pixels, warped(pixels, self.warp(row, preprocess.shape))])

        middles = _middles(preprocess.shape, patch)
        right, places, done = np.zeros((len(self.within), len(layers))), 0, 0
        forward, size = _matches(preprocess, layers), min(self.batch_size, len(images))
        for found, count in inference.batches(model, forward, range(len(images)), views, size):
            for image, matches in enumerate(np.asarray(found)[:, :count].swapaxes(0, 1)):
                true = _applied(np.linalg.inv(self.warp(done + image, preprocess.shape)), middles)
                inside = ((true >= 0) & (true <= np.array(preprocess.shape[::-1]))).all(1)
                off = np.linalg.norm(middles[matches] - true, axis=-1)[:, inside] / patch
                right += [(off <= distance).sum(1) for distance in self.within]
                places += int(inside.sum())
            done += count
            progress("images matched", done, len(images))
        if not places:
            raise ValueError("no token has a place in its other view; lower scale or shift.")
        figures = {f"pck{distance:g}": own / places for distance, own in zip(self.within, right, strict=True)}
        return Matched(layers, figures, places)

    def warp(self, row: int, size: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
        """The matrix from a place (x, y, 1) in the other view of an image to its place in the image, in pixels."""
        turn, grow, x, y = generator(self.seed, row).random(4)
        angle = np.deg2rad(self.rotation * (2 * turn - 1))
        low, high = np.log(self.scale)
        scale, (height, width) = np.exp(low + (high - low) * grow), size
        turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        middle = np.array([width, height]) / 2
        moved = self.shift * (2 * np.array([x, y]) - 1) * (width, height)
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = turned, middle + moved - turned @ middle
        return matrix


def warped(pixels: UInt8[np.ndarray, "H W 3"], matrix: Float[np.ndarray, "3 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The view whose place p shows what the image has at `matrix` · p, grey where the image ends."""
    image = PIL.Image.fromarray(pixels)
    how = PIL.Image.Transform.AFFINE, matrix[:2].ravel().tolist(), PIL.Image.Resampling.BICUBIC
    return np.array(image.transform(image.size, *how, fillcolor=_OUTSIDE))


def _middles(size: tuple[int, int], patch: int) -> Float[np.ndarray, "P 2"]:
    """(x, y) of the middle of each patch, row by row."""
    y, x = (np.arange(patch / 2, side, patch) for side in size)
    return np.stack([np.tile(x, len(y)), y.repeat(len(x))], -1)


def _applied(matrix: np.ndarray, places: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "P 2"]:
    return places @ matrix[:2, :2].T + matrix[:2, 2]


@functools.cache
def _matches(
    preprocess: Preprocess, layers: tuple[int, ...]
) -> Callable[[inference.Model, jax.Array], Int[jax.Array, "Y B P"]]:
    """From two views [B, 2, H, W, 3] to the number of the second's token that each of the first's is most like."""

    def one(tokens: jax.Array) -> jax.Array:
        x = tokens.astype(jnp.float32)
        unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        first, second = unit[::2], unit[1::2]
        return jnp.einsum("bpd,bqd->bpq", first, second, precision=jax.lax.Precision.HIGHEST).argmax(-1)

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        images = inference.normalized(pixels.reshape(-1, *pixels.shape[2:]), preprocess)
        found = inference.vision_tower(model).features(images, layers, class_token=False)
        return jnp.stack([one(found[layer]) for layer in layers])

    return forward

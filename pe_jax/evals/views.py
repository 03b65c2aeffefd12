"""The ways in which an evaluator may look at an image: squashed, cropped, mirrored, without its border.

PE reports, for every data set, the better of squashing and centre-cropping (appendix B.1.2). An image is read and
decoded once for both.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from pe_jax.data.image import Preprocess, decode
from pe_jax.evals import inference
from pe_jax.models.clip import CLIP

RESIZES = ("squash", "crop", "better")


@dataclasses.dataclass(frozen=True)
class Views:
    """`Views.of(model, resize="better")` turns an image into one array of pixels a view.

    Attributes:
      preprocesses: one a view; they differ in `mode` alone.
      border: pixels cut off each side of the image as it is stored.
      mirror: whether left and right are swapped.
    """

    preprocesses: tuple[Preprocess, ...]
    border: int = 0
    mirror: bool = False

    @classmethod
    def of(
        cls,
        model: inference.Model,
        resize: str | None = None,
        image_size: int | None = None,
        border: int = 0,
        mirror: bool = False,
    ) -> "Views":
        """The views that an evaluator's settings ask for; without `resize` the model's own."""
        own = inference.preprocess_of(model, image_size)
        modes = (own.mode,) if resize is None else ("squash", "crop") if resize == "better" else (resize,)
        return cls(tuple(dataclasses.replace(own, mode=mode) for mode in modes), border, mirror)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(preprocess.mode for preprocess in self.preprocesses)

    def pixels(self, image: Any) -> UInt8[np.ndarray, "V H W 3"]:
        """One image in every view, before normalisation.

        Raises:
          ValueError: if nothing is left of it inside the border.
        """
        image = decode(image)
        if self.border:
            width, height = image.size
            if min(width, height) <= 2 * self.border:
                raise ValueError(f"an image of {width}x{height} pixels has nothing inside a border of {self.border}.")
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        seen = np.stack([preprocess.pixels(image) for preprocess in self.preprocesses])
        return seen[:, :, ::-1] if self.mirror else seen

    def embed(self, model: CLIP, images: Sequence[Any], batch_size: int) -> dict[str, Float[np.ndarray, "N E"]]:
        """Unit embeddings of all images, in each view by its name; `batch_size` counts views."""
        forward = _forward(self.preprocesses[0])
        parts = inference.batches(model, forward, images, self.pixels, max(1, batch_size // len(self.preprocesses)))
        embedded = np.concatenate([np.asarray(out)[:count] for out, count in parts])
        return {name: embedded[:, i] for i, name in enumerate(self.names)}


def check(resize: str | None, border: int = 0) -> None:
    """Raises a ValueError unless an evaluator's settings are possible."""
    if resize is not None and resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown; choose {', '.join(RESIZES)}, or leave it out.")
    if border < 0:
        raise ValueError(f"border={border} must be a number of pixels, 0 for none.")


def reported(
    figures: Mapping[str, Mapping[str, float]], judge: Callable[[Mapping[str, float]], float]
) -> dict[str, float]:
    """What an evaluator reports: the figures of the better view, and where there are two, those of each by its name.

    Args:
      figures: {view: {figure: value}}.
      judge: the number that says how good a view did; the first wins a tie.
    """
    best = max(figures, key=lambda view: judge(figures[view]))
    found = dict(figures[best])
    if len(figures) > 1:
        for view, own in figures.items():
            found |= {f"{name}_{view}": value for name, value in own.items()}
    return found


@functools.cache
def _forward(preprocess: Preprocess) -> Callable[[CLIP, jax.Array], jax.Array]:
    def forward(model: CLIP, pixels: jax.Array) -> jax.Array:
        flat = pixels.reshape(-1, *pixels.shape[2:])
        embedded = model.encode_image(inference.normalized(flat, preprocess))
        return embedded.reshape(*pixels.shape[:2], -1)

    return forward

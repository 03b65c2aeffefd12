"""Contrastive training of both towers on image-text or video-text pairs (PE §2.1, §2.4)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pe_jax import gradients, losses
from pe_jax.models.clip import CLIP, CLIPConfig, unit
from pe_jax.types import Batch, Key, Metrics, Params


def pixels(images: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
    """uint8 pixels of a batch → the float in [-1, 1] that models take; done on the device, a byte crosses the bus."""
    return (images.astype(jnp.float32) / 255 - 0.5) / 0.5


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Symmetric InfoNCE between images, or videos, and their captions (PE §2.1)."""

    arch: CLIPConfig
    frozen: tuple[str, ...] = ()  # path prefixes that stay as they are, such as "vision" to tune the text tower alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if not isinstance(self.arch, CLIPConfig):
            raise ValueError("the contrastive stage needs a text tower too; take a PE-Core architecture.")

    def build(self, rngs: nnx.Rngs) -> CLIP:
        return CLIP(self.arch, rngs=rngs)

    def trainable(self, path: str) -> bool:
        return not any(path == part or path.startswith(part + "/") for part in self.frozen)

    def gradients(self, model: CLIP, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        return gradients.whole(self._loss, model, batch, key)

    def project(self, params: Params) -> Params:
        # Clamped after the update rather than in the loss, so that a gradient can always bring it back.
        return params | {"log_scale": jnp.minimum(params["log_scale"], losses.MAX_LOG_SCALE)}

    def _loss(self, model: CLIP, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        if "video" in batch:
            clips = batch["video"]
            frames = pixels(clips.reshape(-1, *clips.shape[2:]))
            # Frames are normalised, averaged, and the mean normalised again for the loss (PE §2.2).
            image = unit(unit(model.vision(frames, key)).reshape(*clips.shape[:2], -1).mean(1))
        else:
            image = unit(model.vision(pixels(batch["image"]), key))
        loss, metrics = losses.info_nce(image, model.encode_text(batch["text"]), model.log_scale[...])
        return loss, metrics | {"logit_scale": jnp.exp(model.log_scale[...])}

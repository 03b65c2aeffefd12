"""Both towers and the temperature between them (PE §2.1)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pe_jax.models.text import TextConfig, TextTower
from pe_jax.models.vision import VisionConfig, VisionTower


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A vision and a text tower that share a joint space."""

    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if self.vision.output_width != self.text.output_width:
            raise ValueError(
                f"vision.output_width={self.vision.output_width} and text.output_width={self.text.output_width} "
                "differ; the towers share one joint space, so make them equal."
            )


class CLIP(nnx.Module):
    """Embeds images, videos and texts in one space; similar things are close (PE §2.1).

    Images are [B, H, W, 3] float in [-1, 1]; ids are [B, L] int32. Every method works eagerly and under jit.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config.vision, rngs=rngs)
        self.text = TextTower(config.text, rngs=rngs)
        self.log_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32), axes=())

    @jax.jit
    def __call__(
        self, images: Float[Array, "B H W 3"], ids: Int[Array, "T L"], key: jax.Array | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "T E"], Float[Array, ""]]:
        """Unit image embeddings [B, E], unit text embeddings [T, E], and the logit scale [] (not its log)."""
        image = unit(self.vision(images, key))
        return image, self.encode_text(ids), jnp.exp(self.log_scale[...])

    @functools.partial(jax.jit, static_argnames="normalize")
    def encode_image(self, images: Float[Array, "B H W 3"], normalize: bool = True) -> Float[Array, "B E"]:
        """[B, H, W, 3] images → [B, E] embeddings, unit length unless `normalize` is False."""
        return _maybe_unit(self.vision(images), normalize)

    @functools.partial(jax.jit, static_argnames="normalize")
    def encode_video(self, videos: Float[Array, "B F H W 3"], normalize: bool = True) -> Float[Array, "B E"]:
        """[B, F, H, W, 3] clips → [B, E], the plain mean of the frames' embeddings.

        With `normalize` each frame is brought to unit length before the mean; the mean itself is not, as in PE's
        published module, so rows are at most 1 long. Divide by their length for cosine similarities.
        """
        if videos.ndim != 5:
            raise ValueError(f"videos have shape {videos.shape}; want [B, F, H, W, 3].")
        batch, frames = videos.shape[:2]
        embeddings = self.encode_image(videos.reshape(batch * frames, *videos.shape[2:]), normalize=normalize)
        return embeddings.reshape(batch, frames, -1).mean(1)

    @functools.partial(jax.jit, static_argnames="normalize")
    def encode_text(self, ids: Int[Array, "B L"], normalize: bool = True) -> Float[Array, "B E"]:
        """[B, L] token ids → [B, E] embeddings, unit length unless `normalize` is False."""
        return _maybe_unit(self.text(ids), normalize)


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows brought to unit length, in float32; a zero row stays zero."""
    x = x.astype(jnp.float32)
    # The square is floored, not the length: the square root's gradient at 0 is infinite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def _maybe_unit(x: Array, normalize: bool) -> Array:
    return unit(x) if normalize else x

"""The vision-language model: a vision tower, a projector and a language decoder (PE §4, PLM §3).

An image enters as chunks of one size: tiles and a thumbnail, or frames of a video. The tower's last tokens go through
the projector into the decoder's width and stand in the prompt where `slots` says. Released configurations are in
`pe_jax.models.zoo`, weights are read by `pe_jax.convert.vlm`. Axes: B rows, L tokens of a row, C image chunks of a row,
S pixels of a chunk's side, T visual tokens of a chunk, D the decoder's width, N and E the tower's tokens and width.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pe_jax.models.decoder import Decoder, DecoderConfig, Generated
from pe_jax.models.layers import Dense, gelu
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.sharding import constrain
from pe_jax.types import split

PROJECTORS = ("mlp", "linear")


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Everything that shapes a vision-language model; `zoo.vlm` makes one of released names."""

    vision: VisionConfig  # cut after the block whose tokens are read; nothing follows that block
    decoder: DecoderConfig
    image_token: int  # the id that stands at visual places
    projector: str = "mlp"  # or "linear"
    pooling: int = 1  # visual tokens are means of squares of so many a side, taken after the projector

    def __post_init__(self) -> None:
        head = {"pool": self.vision.pool, "norm_post": self.vision.norm_post, "output_width": self.vision.output_width}
        if head != {"pool": "none", "norm_post": False, "output_width": None}:
            raise ValueError(
                f"The tower has {head}, and a decoder reads its last tokens as they are: "
                'want pool="none", norm_post=False and output_width=None, as zoo.vlm cuts it.'
            )
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector={self.projector!r} is unknown; use one of {', '.join(PROJECTORS)}.")
        if not 0 <= self.image_token < self.decoder.vocab_size:
            raise ValueError(
                f"image_token={self.image_token} is not in the vocabulary of {self.decoder.vocab_size}; "
                "take an id that no text uses, as Llama 3's 128002."
            )
        if self.pooling < 1:
            raise ValueError(f"pooling={self.pooling} must be at least 1, which pools nothing.")
        self.chunk_tokens()

    def chunk_tokens(self, image_size: int | None = None) -> int:
        """T, the visual tokens of one chunk of `image_size` pixels a side; None takes the tower's own size.

        Raises:
          ValueError: for a size that is not a multiple of the patches that are pooled together.
        """
        size, side = image_size or self.vision.image_size, self.vision.patch_size * self.pooling
        if size % side:
            raise ValueError(
                f"image_size={size} is not a multiple of {side}, the patch size {self.vision.patch_size} times "
                f"pooling={self.pooling}; change one of them."
            )
        return (size // side) ** 2


class Projector(nnx.Module):
    """Tokens of the tower to the decoder's width, and fewer of them: [B, N, E] → [B, T, D].

    Linear, exact GELU, Linear on each token, then the mean over squares of tokens. A mean passes through a linear map,
    so it is taken before the last one: the same function, for a fraction of the work.

    Source: PLM's released module (PE §4.1 compares "mlp" with "linear").
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        width, decoder = config.vision.width, config.decoder
        self.pooling = config.pooling
        spread = decoder.width**-0.5
        init = nnx.initializers.truncated_normal(spread, lower=-3.0, upper=3.0)
        common: dict[str, Any] = {
            "kernel_init": init,
            "bias_init": init,
            "dtype": decoder.dtype,
            "gradient_dtype": decoder.gradient_dtype,
            "rngs": rngs,
        }
        if config.projector == "mlp":
            self.up = Dense(width, decoder.width, ("embed", "mlp"), **common)
            width = decoder.width
        self.down = Dense(width, decoder.width, ("mlp", "embed"), **common)

    def __call__(self, tokens: Float[Array, "B N E"], grid: tuple[int, int]) -> Float[Array, "B T D"]:
        """`grid` is the N tokens' rows and columns, multiples of `pooling`."""
        x = gelu(self.up(tokens)) if hasattr(self, "up") else tokens
        if (pool := self.pooling) > 1:
            rows, columns = grid
            x = x.reshape(len(x), rows // pool, pool, columns // pool, pool, x.shape[-1]).mean((2, 4))
            x = x.reshape(len(x), -1, x.shape[-1])
        return self.down(x)


class VLM(nnx.Module):
    """A vision tower whose tokens a language model reads among its own (PE §4).

    `images` are a row's chunks, [B, C, S, S, 3] float in [-1, 1]; S is any multiple of the patches that are pooled
    together. `slots` [B, L] says which visual token of its row stands at a place, chunk · T + t, and -1 where the
    token's own embedding does. Chunks that no slot names run through the tower and are read by no one.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config.vision, rngs=rngs)
        self.projector = Projector(config, rngs=rngs)
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def visual_tokens(
        self, images: Float[Array | np.ndarray, "B C S S 3"], key: jax.Array | None = None
    ) -> Float[Array, "B CT D"]:
        """What the decoder reads of the chunks: [B, C·T, D], a chunk's T tokens row by row of its grid.

        Args:
          images: [B, C, S, S, 3] in [-1, 1].
          key: randomness of DropPath in training; None for inference.

        Raises:
          ValueError: for chunks of a shape, size or type that the tower cannot take.
        """
        self._check_images(images)
        return self._visual_tokens(images, key)

    def embed(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        images: Float[Array | np.ndarray, "B C S S 3"] | None,
        slots: Int[Array | np.ndarray, "B L"] | None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B L D"]:
        """What enters the decoder: the tokens' embeddings, with visual tokens at the places that `slots` names.

        Args:
          tokens: ids; at visual places any of the vocabulary, by custom `config.image_token`.
          images: [B, C, S, S, 3] in [-1, 1]; None, with `slots` None, runs no tower.
          slots: [B, L] in [-1, C·T).
          key: randomness of DropPath in training; None for inference.

        Raises:
          ValueError: for arrays whose shapes or types do not belong together, or a slot that no chunk fills. Inside
            `jax.jit`, where slots cannot be read, such a slot gives NaN at its place.
        """
        if (images is None) != (slots is None):
            raise ValueError("images and slots belong together; pass both, or neither for text alone.")
        if images is None or slots is None:
            return self.decoder.embed(tokens)
        self._check_images(images)
        if slots.shape != tokens.shape or not jnp.issubdtype(slots.dtype, jnp.integer):
            raise ValueError(
                f"slots are {slots.dtype}{list(slots.shape)}; want an integer for each token, {list(tokens.shape)}."
            )
        if images.shape[0] != tokens.shape[0]:
            raise ValueError(f"images are of {images.shape[0]} rows, tokens of {tokens.shape[0]}; want as many.")
        held = images.shape[1] * self.config.chunk_tokens(images.shape[2])
        if not isinstance(slots, jax.core.Tracer) and not np.all(
            (np.asarray(slots) >= -1) & (np.asarray(slots) < held)
        ):
            raise ValueError(
                f"slots reach from {np.min(slots)} to {np.max(slots)}; {images.shape[1]} chunks of "
                f"{images.shape[2]} pixels hold visual tokens 0 to {held - 1}, and -1 is none."
            )
        return self._embed(tokens, images, slots, key)

    def hidden(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        images: Float[Array | np.ndarray, "B C S S 3"] | None,
        slots: Int[Array | np.ndarray, "B L"] | None,
        segments: Int[Array | np.ndarray, "B L"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B L D"]:
        """The last hidden states, normalised: what `losses.next_token` scores against `decoder.output_table`.

        Args:
          tokens, images, slots, key: as of `embed`.
          segments: which sample of a packed row each token belongs to; none sees another. None: rows are samples.
        """
        return self.decoder.hidden(self.embed(tokens, images, slots, key), segments)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        images: Float[Array | np.ndarray, "B C S S 3"] | None,
        slots: Int[Array | np.ndarray, "B L"] | None,
        segments: Int[Array | np.ndarray, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """[B, L, V] float32 logits of the token after each; arguments as of `hidden`. Large: V is some 100,000."""
        return self.decoder.logits(self.hidden(tokens, images, slots, segments))

    def generate(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        lengths: Int[Array | np.ndarray, "B"] | None,
        images: Float[Array | np.ndarray, "B C S S 3"] | None,
        slots: Int[Array | np.ndarray, "B L"] | None,
        **options: Any,
    ) -> Generated:
        """Continues every prompt, as `Decoder.generate`, whose `options` these are (max_new_tokens, stop, …).

        Args:
          tokens, images, slots: as of `embed`.
          lengths: how many tokens of each row are its prompt; None is all.
        """
        return self.decoder.generate(self.embed(tokens, images, slots), lengths, **options)

    def stream(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        lengths: Int[Array | np.ndarray, "B"] | None,
        images: Float[Array | np.ndarray, "B C S S 3"] | None,
        slots: Int[Array | np.ndarray, "B L"] | None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """The tokens of `generate`, one [B] after the other as they come; -1 for a row that has ended."""
        return self.decoder.stream(self.embed(tokens, images, slots), lengths, **options)

    # -------------------------------------------------------------------------------------------------------- inside

    @jax.jit
    def _visual_tokens(self, images: Array, key: jax.Array | None) -> Array:
        c, (rows, count, size) = self.config, images.shape[:3]
        each = constrain(jnp.reshape(images, (rows * count, *images.shape[2:])), "batch", None, None, None)
        x = self.vision.tokens(each, key)[:, int(c.vision.class_token) :]
        graphdef, params = split(self.projector)

        def project(params: Any, x: Array) -> Array:
            return nnx.merge(graphdef, params)(x, (size // c.vision.patch_size,) * 2)

        with jax.named_scope("projector"):
            if c.vision.remat != "none":  # its middle is as wide as the decoder, for every token before pooling
                project = jax.checkpoint(project)
            x = project(params, x)
        return constrain(x.reshape(rows, -1, x.shape[-1]), "batch", "tokens", None)

    @jax.jit
    def _embed(self, tokens: Array, images: Array, slots: Array, key: jax.Array | None) -> Array:
        x, visual = self.decoder.embed(tokens), self._visual_tokens(images, key)
        slots = constrain(jnp.asarray(slots), "batch", "tokens")
        places, held = jnp.arange(slots.shape[1]), visual.shape[1]
        # No place of text names a visual token, so that the backward pass writes each token's gradient once.
        named = jnp.where(slots < 0, held + places, slots)
        # A row's own, by a gather with a batch axis: the partitioner leaves every row where it is.
        found = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=jnp.nan))(visual, named)
        return constrain(jnp.where(slots[:, :, None] < 0, x, found.astype(x.dtype)), "batch", "tokens", None)

    def _check_images(self, images: Any) -> None:
        shape = list(images.shape)
        if len(shape) != 5 or shape[4] != 3 or shape[2] != shape[3] or 0 in shape:
            raise ValueError(f"images are {shape}; want squares of pixels, channels last: [B, C, S, S, 3].")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; want float in [-1, 1]: x / 127.5 - 1.")
        self.config.chunk_tokens(shape[2])

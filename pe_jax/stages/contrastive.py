"""Contrastive training of both towers on image-text or video-text pairs (PE §2.1, §2.4)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from pe_jax import gradients, losses
from pe_jax.models import zoo
from pe_jax.models.clip import CLIP, CLIPConfig, unit
from pe_jax.stages import placing
from pe_jax.types import Batch, Inputs, Key, Metrics, Params


def pixels(images: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
    """uint8 pixels of a batch → the float in [-1, 1] that models take; done on the device, a byte crosses the bus."""
    return (images.astype(jnp.float32) / 255 - 0.5) / 0.5


class TrainingOnly(nnx.Module):
    """Parameters that only the loss uses; a model loaded from the checkpoint comes without them."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)), axes=("embed",))


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Symmetric InfoNCE between images, or videos, and their captions, with mask regularisation (PE §2.1, §2.4).

    Mask regularisation: every `mask_every`-th image goes through the vision tower once more with `mask_ratio` of its
    patches hidden, and each hidden patch's token is drawn to the token the whole image gave at its place. The copies
    take no part in the contrastive loss, and the tokens they are drawn to receive no gradient.
    """

    arch: CLIPConfig
    frozen: tuple[str, ...] = ()  # path prefixes that stay as they are, such as "vision" to tune the text tower alone
    microbatches: int = 1  # forward passes per update; the loss still spans the global batch
    loss_chunk: int | None = None  # texts at a time in the loss; None holds all logits
    mask_ratio: float = 0.0  # of the patches of a masked copy; 0 switches mask regularisation off
    mask_every: int = 16  # 8192 of the paper's 131,072
    mask_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if not isinstance(self.arch, CLIPConfig):
            raise ValueError("the contrastive stage needs a text tower too; take a PE-Core architecture.")
        if self.microbatches < 1 or self.mask_every < 1 or (self.loss_chunk or 1) < 1:
            raise ValueError("microbatches, mask_every and loss_chunk count examples; each must be at least 1.")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be in [0, 1); it is the share of patches hidden.")

    @property
    def inputs(self) -> Inputs:
        return Inputs("pairs", {"context_length": self.arch.text.context_length})

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": "model"}

    def build(self, rngs: nnx.Rngs) -> CLIP:
        model = CLIP(self.arch, rngs=rngs)
        if self.mask_ratio:
            model.training = TrainingOnly(self.arch.vision.width, rngs=rngs)
        return model

    def start(self, params: Params, loaded: Mapping[str, tuple[Any, Params]]) -> Params:
        if "model" not in loaded:
            return params
        _, given = loaded["model"]
        placing.check(given, {name: x for name, x in params.items() if name != "training"}, "weights of init.model")
        return params | placing.cast(given, params)

    def trainable(self, path: str) -> bool:
        return not any(path == part or path.startswith(part + "/") for part in self.frozen)

    def gradients(self, model: CLIP, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        # With DropPath the copies shift what each image draws, so then both passes must have them.
        alone = None if self.arch.vision.drop_path else self._embeddings
        return gradients.cached(self._embed, self._loss, model, batch, key, self.microbatches, alone)

    def update_flops(self, batch: Mapping[str, Any]) -> int:
        video = "video" in batch
        examples, *frames, height, width, _ = batch["video" if video else "image"].shape
        sides = height, width
        flops = 3 * examples * zoo.forward_flops(self.arch, sides, *frames)  # a backward pass costs two forward ones
        if self.mask_ratio and not video:  # a share of the images goes through the blocks once more
            blocks = dataclasses.replace(self.arch.vision, pool="none", output_width=None)
            flops += 3 * (examples // self.mask_every) * zoo.forward_flops(blocks, sides)
        return flops

    def project(self, params: Params) -> Params:
        # Clamped after the update rather than in the loss, so that a gradient can always bring it back.
        return params | {"log_scale": jnp.minimum(params["log_scale"], losses.MAX_LOG_SCALE)}

    def _embeddings(self, model: CLIP, batch: Batch, key: Key) -> Batch:
        text = model.encode_text(batch["text"])
        if "video" in batch:
            clips = batch["video"]
            frames = pixels(clips.reshape(-1, *clips.shape[2:]))
            # Frames are normalised, averaged, and the mean normalised again for the loss (PE §2.2).
            return {"image": unit(unit(model.vision(frames, key)).reshape(*clips.shape[:2], -1).mean(1)), "text": text}
        return {"image": unit(model.vision(pixels(batch["image"]), key)), "text": text}

    def _embed(self, model: CLIP, batch: Batch, key: Key) -> tuple[Batch, jax.Array, Metrics]:
        if not self.mask_ratio or "video" in batch:
            return self._embeddings(model, batch, key), jnp.zeros(()), {}
        tokens, guessed, masked = self._tokens_and_guesses(model, pixels(batch["image"]), key)
        embeddings = {"image": unit(model.vision.head(tokens)), "text": model.encode_text(batch["text"])}
        seen = tokens.reshape(-1, self.mask_every, *tokens.shape[1:])[:, 0]
        penalty = self._mask_loss(model, seen, guessed, masked)
        return embeddings, self.mask_weight * penalty, {"mask_loss": penalty}

    def _tokens_and_guesses(
        self, model: CLIP, images: jax.Array, key: Key
    ) -> tuple[Float[Array, "B N D"], Float[Array, "M N D"], Bool[Array, "M P"]]:
        """Tokens of the images; those of every `mask_every`-th with patches hidden; and which patches were.

        One pass over both, so that a sharded tower's weights are gathered once. A copy follows its group of images
        rather than all of them: on any mesh it stays on the device of its original.
        """
        batch, every, vision = images.shape[0], self.mask_every, model.vision
        if batch % every:
            raise ValueError(f"{batch} images at a time are not a multiple of mask_every={every}; change either one.")
        patches = (images.shape[1] // vision.config.patch_size) * (images.shape[2] // vision.config.patch_size)
        groups = images.reshape(-1, every, *images.shape[1:])
        masked = choose(jax.random.fold_in(key, 1), (batch // every, patches), round(self.mask_ratio * patches))
        hidden = jnp.zeros((batch // every, every, patches), bool)
        hidden = jnp.concatenate([hidden, masked[:, None]], 1).reshape(-1, patches)
        both = jnp.concatenate([groups, groups[:, :1]], 1).reshape(-1, *images.shape[1:])
        found = vision.tokens(both, key, masked=hidden, mask_token=model.training.mask_token[...])
        found = found.reshape(-1, every + 1, *found.shape[1:])
        return found[:, :every].reshape(batch, *found.shape[2:]), found[:, every], masked

    @jax.named_scope("mask_regularisation")
    def _mask_loss(self, model: CLIP, seen: jax.Array, guessed: jax.Array, masked: jax.Array) -> jax.Array:
        """1 - cosine between the tokens of hidden patches and of the same patches in plain sight, mean over them."""
        vision = model.vision
        seen = lax.stop_gradient(vision.normed(seen))
        cosine = jnp.sum(_unit(vision.normed(guessed)) * _unit(seen), -1)[:, vision.config.class_token :]
        return jnp.mean(1 - cosine, where=masked)

    @jax.named_scope("loss")
    def _loss(self, model: CLIP, embeddings: Batch) -> tuple[jax.Array, Metrics]:
        inputs = embeddings["image"], embeddings["text"], model.log_scale[...]
        if self.loss_chunk is None:
            loss, metrics = losses.info_nce(*inputs)
        else:
            loss, metrics = losses.info_nce_chunked(*inputs, chunk=self.loss_chunk, dtype=self.arch.vision.dtype)
        return loss, metrics | {"logit_scale": jnp.exp(model.log_scale[...])}


@jax.named_scope("mask_regularisation")
def choose(key: Key, shape: tuple[int, int], count: int) -> Bool[Array, "B P"]:
    """[B, P] of which exactly `count` in each row are True, drawn evenly."""
    noise = jax.random.uniform(key, shape)
    return jnp.argsort(jnp.argsort(noise, -1), -1) < count


def _unit(x: Array) -> Array:
    """Tokens [B, N, D] brought to unit length, in float32."""
    return unit(x.reshape(-1, x.shape[-1])).reshape(x.shape)

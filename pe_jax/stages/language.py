"""Alignment with a language model: a decoder reads the tower's tokens and predicts the text (PE §4, PLM §3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pe_jax import gradients, losses
from pe_jax.models import zoo
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.stages import placing
from pe_jax.stages.contrastive import pixels
from pe_jax.types import Batch, Inputs, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Language:
    """Next-token loss over the answers of conversations about images and videos (PE §4.1, PLM §3).

    The loss is the mean over all tokens that are asked for in the whole batch, wherever they lie: rows, micro-batches
    and devices may hold unequal numbers of them. Its sub-stages differ in what is frozen: a warm-up trains the
    projector alone, `frozen=("vision", "decoder")`; mid-training and fine-tuning train everything; and a benchmark of
    encoders keeps the tower as it is, `frozen=("vision",)`.

    A tower may get LayerScale that it was not pretrained with. As in PLM its branches then simply become a tenth as
    large; with `keep_function` the kernels before them are made larger to make up for it.
    """

    arch: VLMConfig
    frozen: tuple[str, ...] = ()  # path prefixes that stay as they are
    microbatches: int = 1
    loss_chunk: int = 1024  # tokens of a device scored against the vocabulary at a time
    keep_function: bool = False  # whether fresh LayerScales are made up for in the kernels before them

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if not isinstance(self.arch, VLMConfig):
            raise ValueError(
                'the language stage needs a tower and a decoder; take {"vision": NAME, "decoder": NAME, "tap": LAYER} '
                "or a released PLM."
            )
        if self.microbatches < 1 or self.loss_chunk < 1:
            raise ValueError("microbatches and loss_chunk count rows and tokens; each must be at least 1.")

    @property
    def inputs(self) -> Inputs:
        c = self.arch
        shape = {"patch_size": c.vision.patch_size, "pooling": c.pooling, "image_token": c.image_token}
        return Inputs("chat", shape)

    @property
    def parts(self) -> dict[str, Any]:
        return {"vision": "model", "decoder": self.arch.decoder, "model": self.arch}

    def build(self, rngs: nnx.Rngs) -> VLM:
        return VLM(self.arch, rngs=rngs)

    def start(self, params: Params, loaded: Mapping[str, tuple[Any, Params]]) -> Params:
        """`vision` is a tower, alone or in a CLIP; `decoder` a language model; `model` the sub-stage before this one.

        A tower is cut at the tap, its positions are resized to the image size; a part that was named beside `model`
        replaces the one in it.

        Raises:
          ValueError: if something that was loaded does not fit.
        """
        if "model" in loaded:
            config, whole = loaded["model"]
            if not isinstance(config, VLMConfig):
                raise ValueError("init.model is no vision-language model; give a tower as init.vision.")
            for part in ("projector", "decoder"):
                placing.check(whole[part], params[part], f"{part} of init.model")
            params = params | placing.cast({part: whole[part] for part in ("projector", "decoder")}, params)
            params = params | {"vision": self._tower(params["vision"], config, whole, "init.model")}
        if "vision" in loaded:
            params = params | {"vision": self._tower(params["vision"], *loaded["vision"], "init.vision")}
        if "decoder" in loaded:
            params = params | placing.cast({"decoder": loaded["decoder"][1]}, params)
        return params

    def trainable(self, path: str) -> bool:
        return not any(path == part or path.startswith(part + "/") for part in self.frozen)

    def gradients(self, model: VLM, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        grads, metrics = gradients.averaged(
            self._loss, model, batch, key, self.microbatches, self.trainable, weights=_asked
        )
        return grads, metrics | {"tokens": _asked(batch)}

    def update_flops(self, batch: Mapping[str, Any]) -> int:
        """A forward pass and, where something below or in a part moves, gradients by what enters it and by itself."""
        rows, length = batch["tokens"].shape
        _, chunks, size, *_ = batch["chunks"].shape
        c = self.arch
        tokens, pooled = c.chunk_tokens(size) * c.pooling**2, c.chunk_tokens(size)
        moves = {part: part not in self.frozen for part in ("vision", "projector", "decoder")}
        vision = (3 if moves["vision"] else 1) * zoo.forward_flops(c.vision, size)
        wide = c.vision.width if c.projector == "linear" else c.decoder.width
        projector = 2 * pooled * wide * c.decoder.width
        if c.projector == "mlp":
            projector += 2 * tokens * c.vision.width * wide
        below = moves["vision"] or moves["projector"]
        projector *= 1 + moves["projector"] + moves["vision"]
        decoder = (1 + moves["decoder"] + (below or moves["decoder"])) * zoo.decoder_flops(c.decoder, length)
        return rows * (chunks * (vision + projector) + decoder)

    def project(self, params: Params) -> Params:
        return params

    def _tower(self, fresh: Params, config: Any, params: Params, name: str) -> Params:
        given, tower = placing.tower_of(config, params)
        placed = placing.placed(fresh, tower, self.arch.vision, given, name)
        if self.keep_function and self.arch.vision.layer_scale is not None and given.layer_scale is None:
            placed = placed | {"blocks": placing.made_up_for(placed["blocks"])}
        return placed

    def _loss(self, model: VLM, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        hidden = model.hidden(batch["tokens"], pixels(batch["chunks"]), batch["slots"], batch["segments"], key)
        targets = batch["targets"]
        with jax.named_scope("loss"):
            loss, metrics = losses.next_token(
                hidden,
                model.decoder.output_table,
                jnp.maximum(targets, 0),
                (targets >= 0).astype(jnp.float32),
                chunk=self.loss_chunk,
                gradient_dtype=self.arch.decoder.gradient_dtype,
            )
        return loss, {"accuracy": metrics["accuracy"]}


def _asked(batch: Batch) -> jax.Array:
    """How many tokens are asked for."""
    return jnp.sum(batch["targets"] >= 0)

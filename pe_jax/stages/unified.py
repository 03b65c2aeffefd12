"""Both alignments in one update: what a decoder can read, and what is known of places (PE §4 and §5 together)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.stages.language import Language
from pe_jax.stages.spatial import STUDENT, Spatial
from pe_jax.types import Batch, Inputs, Key, Metrics, Params, split


@dataclasses.dataclass(frozen=True)
class Unified:
    """The next-token loss of a decoder and the spatial losses of its tower, on the same images.

    The two are measured in other units and their gradients by the tower differ by orders of magnitude, which change
    over a run. So in every update the spatial gradient is brought to `balance` times the length that the language
    gradient has at the tower, and then they are added: neither loss needs a weight. Projector and decoder learn from
    the language alone; a map to a teacher's width learns from the spatial loss as it is.

    The tower sees each image twice: whole, for the decoder, and mostly hidden, for the teachers. Image chunks that no
    token of their row refers to take no part in the spatial losses.
    """

    arch: VLMConfig
    teachers: Any  # as of `Spatial`
    balance: float = 1.0  # length of the spatial gradient by the tower, in that of the language gradient
    frozen: tuple[str, ...] = ()  # path prefixes that stay as they are, but not the tower
    microbatches: int = 1
    loss_chunk: int = 1024
    mask_ratio: float = 0.75
    mask_block: int = 2
    pairs_chunk: int = 256
    teacher_dtype: str = "bfloat16"
    keep_function: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        self._language()  # both check their own fields
        object.__setattr__(self, "teachers", self._spatial().teachers)
        if not self.balance > 0:
            raise ValueError(f"balance={self.balance} must be above 0; for language alone there is a stage.")
        if "vision" in self.frozen:
            raise ValueError("both losses meet in the tower; leave vision out of frozen.")
        if self._spatial().inputs.shape:
            raise ValueError("conversations carry no stored teacher; take one that is computed, such as sam2 or tower.")

    @property
    def inputs(self) -> Inputs:
        return self._language().inputs

    @property
    def parts(self) -> dict[str, Any]:
        """Those of the language stage, whose tower the student is, and the teachers'."""
        own = {name: part for name, part in self._spatial().parts.items() if name != STUDENT}
        return self._language().parts | own

    def build(self, rngs: nnx.Rngs) -> VLM:
        model = self._language().build(rngs)
        model.training = self._spatial().build(rngs).training
        return model

    def start(self, params: Params, loaded: Mapping[str, tuple[Any, Params]]) -> Params:
        """As both stages do it; the student, and a teacher without weights of its own, start from the tower given.

        Raises:
          ValueError: if something that was loaded does not fit.
        """
        given = dict(loaded)
        tower = given.get("vision", given.get("model"))
        language = {name: found for name, found in given.items() if name in self._language().parts}
        params = params | self._language().start({n: x for n, x in params.items() if n != "training"}, language)
        mine = {name: found for name, found in given.items() if name not in language}
        taught = self._spatial().start(
            params["vision"] | {"training": params["training"]}, mine | ({STUDENT: tower} if tower else {})
        )
        return params | {"training": taught["training"]}

    def trainable(self, path: str) -> bool:
        return not any(path == part or path.startswith(part + "/") for part in ("training/teachers", *self.frozen))

    def gradients(self, model: VLM, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        reading, seeing = jax.random.split(key)
        grads, metrics = self._language().gradients(model, batch, reading)
        spatial = self._spatial()
        _, params = split(model)
        graphdef, _ = split(nnx.eval_shape(lambda: spatial.build(nnx.Rngs(0))))
        student = nnx.merge(graphdef, params["vision"] | {"training": params["training"]})
        by_places, told = spatial.gradients(student, self._images(batch), seeing)
        training = by_places.pop("training")
        by_words = grads["vision"]
        words, places = optax.tree.norm(by_words), optax.tree.norm(by_places)
        scale = self.balance * words / jnp.maximum(places, jnp.finfo(jnp.float32).tiny)
        alike = optax.tree.vdot(by_words, by_places) / jnp.maximum(words * places, jnp.finfo(jnp.float32).tiny)
        vision = jax.tree.map(lambda a, b: a + scale * b, by_words, by_places)
        loss = {"language_loss": metrics["loss"], "spatial_loss": told.pop("loss")}
        return grads | {"vision": vision, "training": training}, (
            metrics
            | told
            | loss
            | {
                "loss": loss["language_loss"] + loss["spatial_loss"],  # a figure to watch: what moves is balanced
                "language_norm": words,
                "spatial_norm": places,
                "gradients_cosine": alike,
            }
        )

    def update_flops(self, batch: Mapping[str, Any]) -> int:
        rows, chunks, *sides = batch["chunks"].shape
        images = {"image": jax.ShapeDtypeStruct((rows * chunks, *sides), jnp.uint8)}
        return self._language().update_flops(batch) + self._spatial().update_flops(images)

    def project(self, params: Params) -> Params:
        return params

    def _images(self, batch: Batch) -> Batch:
        """The image chunks of all rows, and which of them some token refers to."""
        chunks, slots = batch["chunks"], batch["slots"]
        rows, count, size, *_ = chunks.shape
        per_chunk = self.arch.chunk_tokens(size)
        used = (slots[:, :, None] // per_chunk == jnp.arange(count)) & (slots[:, :, None] >= 0)
        return {"image": chunks.reshape(rows * count, *chunks.shape[2:]), "shown": used.any(1).reshape(-1)}

    def _language(self) -> Language:
        frozen = (*self.frozen, "training")
        return Language(self.arch, frozen, self.microbatches, self.loss_chunk, self.keep_function)

    def _spatial(self) -> Spatial:
        return Spatial(
            self.arch.vision,
            self.teachers,
            tuple(part.removeprefix("vision/") for part in self.frozen if part.startswith("vision/")),
            self.microbatches,
            self.mask_ratio,
            self.mask_block,
            self.pairs_chunk,
            self.teacher_dtype,
        )

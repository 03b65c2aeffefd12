"""Spatial alignment: a tower's last tokens are drawn to its own best layer and to where masks agree (PE §5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from pe_jax import gradients, losses
from pe_jax.models import zoo
from pe_jax.models.layers import Dense
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.stages import placing
from pe_jax.stages import teachers as teachers_lib
from pe_jax.stages.contrastive import choose, pixels
from pe_jax.types import Batch, Inputs, Key, Metrics, Params

STUDENT = "student"  # the part whose weights the tower starts from


class _Parts(nnx.Module):
    """Modules by name, as attributes."""

    def __init__(self, parts: Mapping[str, nnx.Module | None]):
        for name, part in parts.items():
            if part is not None:
                setattr(self, name, part)


@dataclasses.dataclass(frozen=True)
class Spatial:
    """Distillation of a tower's last tokens from frozen teachers, with most of the student's patches hidden (PE §5).

    PE-Spatial has two: `direct` from the tower it starts from, after block 41, which holds what each place means; and
    `pairs` from SAM 2.1's mask logits, which hold what belongs together. Their weighted sum is the loss, over all
    tokens, hidden and seen. Teachers and student are given the same pixels; the teachers see all of them.

    The model is the student, a tower as it is used. Teachers, and a linear map to a teacher's width where it is not
    the student's, lie below `training` and are left behind when the weights are loaded. The teachers' parameters are
    cut over the mesh like any others; they have no gradient and no optimizer state.
    """

    arch: VisionConfig
    teachers: Any  # {name: what `teachers.create` takes}; held as pairs of the name and the teacher
    frozen: tuple[str, ...] = ()  # path prefixes of the student that stay as they are
    microbatches: int = 1
    mask_ratio: float = 0.75  # of the student's patches, hidden behind a zero vector
    mask_block: int = 2  # side of the squares of patches that are hidden together
    pairs_chunk: int = 256  # tokens of an image compared at a time
    teacher_dtype: str = "bfloat16"  # of the teachers' parameters and activations
    keep_function: bool = False  # whether fresh LayerScales are made up for in the kernels before them

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if isinstance(self.teachers, Mapping):
            found = tuple((name, teachers_lib.create(config)) for name, config in self.teachers.items())
            object.__setattr__(self, "teachers", found)
        if not self.teachers:
            raise ValueError("the spatial stage needs teachers, such as {'self': {'name': 'tower', 'direct': 1.0}}.")
        if not isinstance(self.arch, VisionConfig) or self.arch.pool != "none" or self.arch.norm_post:
            raise ValueError(
                'the spatial stage trains last tokens as they are; take a PE-Spatial architecture, or pool="none" and '
                "norm_post=False."
            )
        if min(self.microbatches, self.mask_block, self.pairs_chunk) < 1:
            raise ValueError("microbatches, mask_block and pairs_chunk count things; each must be at least 1.")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be in [0, 1); it is the share of patches hidden.")
        for name, teacher in self.teachers:
            if name == STUDENT:
                raise ValueError(f"a teacher cannot be called {STUDENT!r}; choose another name.")
            if isinstance(teacher, teachers_lib.Tower):
                teacher.config(self.arch)  # refuses a layer that does not exist

        if sum(isinstance(teacher, teachers_lib.Stored) for _, teacher in self.teachers) > 1:
            raise ValueError("a record holds the words of one teacher; keep one of those called stored.")

    @property
    def inputs(self) -> Inputs:
        stored = [teacher for _, teacher in self.teachers if isinstance(teacher, teachers_lib.Stored)]
        return Inputs("images", {"teacher": (stored[0].tokens, stored[0].width)} if stored else {})

    @property
    def parts(self) -> dict[str, Any]:
        return {STUDENT: "model"} | {name: teacher.part for name, teacher in self.teachers if teacher.part}

    def build(self, rngs: nnx.Rngs) -> VisionTower:
        model = VisionTower(self.arch, rngs=rngs)
        taught = {name: teacher.build(self.arch, self.teacher_dtype, rngs) for name, teacher in self.teachers}
        maps = {}
        for name, teacher in self.teachers:
            if teacher.direct and (width := teacher.vector_width(self.arch)) != self.arch.width:
                maps[name] = Dense(self.arch.width, width, ("embed", None), dtype=self.arch.dtype, rngs=rngs)
        model.training = _Parts({"teachers": _Parts(taught), "maps": _Parts(maps) if maps else None})
        return model

    def trainable(self, path: str) -> bool:
        return not any(path == part or path.startswith(part + "/") for part in ("training/teachers", *self.frozen))

    def start(self, params: Params, loaded: Mapping[str, tuple[Any, Params]]) -> Params:
        """Fresh parameters with loaded ones in place; what was not loaded stays fresh.

        The student takes a tower of its widths, cut to its depth and without its head, its positions resized to its
        own grid. LayerScales that the loaded tower lacks keep their initial value, and its kernels are divided by it if
        `keep_function`. A teacher without weights of its own is the loaded tower itself.

        Args:
          params: as `build` makes them.
          loaded: configuration and parameters of each of `parts` that was given.

        Raises:
          ValueError: if a loaded tower does not fit.
        """
        training = params.get("training", {})
        held = dict(training.get("teachers", {}))
        if STUDENT in loaded:
            config, tower = placing.tower_of(*loaded[STUDENT])
            own = {name: x for name, x in params.items() if name != "training"}
            own = placing.placed(own, tower, self.arch, config, STUDENT)
            if self.keep_function and self.arch.layer_scale is not None and config.layer_scale is None:
                own["blocks"] = placing.made_up_for(own["blocks"])
            params = params | own
            for name, teacher in self.teachers:
                if isinstance(teacher, teachers_lib.Tower) and teacher.arch is None:
                    held[name] = placing.placed(held[name], tower, teacher.config(self.arch), config, name)
        for name, teacher in self.teachers:
            if name in loaded and isinstance(teacher, teachers_lib.Tower):
                config, tower = placing.tower_of(*loaded[name])
                held[name] = placing.placed(held[name], tower, teacher.config(self.arch), config, name)
            elif name in loaded:
                placing.check(loaded[name][1], held[name], f"weights given for {name!r}")
                held[name] = placing.cast(loaded[name][1], held[name])
        return params | ({"training": training | {"teachers": held}} if held else {})

    def gradients(self, model: VisionTower, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        weights = _shown if "shown" in batch else None
        return gradients.averaged(self._loss, model, batch, key, self.microbatches, self.trainable, weights)

    def update_flops(self, batch: Mapping[str, Any]) -> int:
        images, *sides, _ = batch["image"].shape
        size = sides[0], sides[1]
        student = 3 * zoo.forward_flops(self.arch, size)  # a backward pass costs two forward ones
        return images * (student + sum(teacher.flops(self.arch, size) for _, teacher in self.teachers))

    def project(self, params: Params) -> Params:
        return params

    def _loss(self, model: VisionTower, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        images, patch = pixels(batch["image"]), self.arch.patch_size
        grid = images.shape[1] // patch, images.shape[2] // patch
        hiding, dropping = jax.random.split(key)
        taught = {}
        for name, teacher in self.teachers:
            with jax.named_scope(f"teacher_{name}"):
                module = getattr(model.training.teachers, name, None)
                taught[name] = lax.stop_gradient(teacher.features(module, images, grid, batch.get("teacher")))
        masked = self.hidden(hiding, len(images), grid) if self.mask_ratio else None
        tokens = model.tokens(images, dropping, masked=masked)[:, int(self.arch.class_token) :]
        total, metrics = jnp.zeros(()), {}
        for name, teacher in self.teachers:
            with jax.named_scope(f"loss_{name}"):
                if teacher.direct:
                    mapped = getattr(model.training.maps, name)(tokens) if self._maps(name) else tokens
                    loss = _mean(losses.token_cosine(mapped, taught[name]), batch)
                    total, metrics[f"{name}_cosine"] = total + teacher.direct * loss, -loss
                if teacher.pairs:
                    loss = losses.token_pairs(
                        tokens, taught[name], temperature=teacher.temperature, chunk=self.pairs_chunk
                    )
                    loss = _mean(loss, batch)
                    total, metrics[f"{name}_pairs"] = total + teacher.pairs * loss, loss
        return total, metrics

    def hidden(self, key: Key, images: int, grid: tuple[int, int]) -> Bool[Array, "B N"]:
        """Which of each image's patches are hidden: `mask_ratio` of the squares of `mask_block` patches, drawn evenly.

        Raises:
          ValueError: for a grid that does not cut into such squares.
        """
        side = self.mask_block
        if grid[0] % side or grid[1] % side:
            raise ValueError(
                f"{grid[0]} x {grid[1]} patches do not cut into squares of mask_block={side}; change it or the image "
                "size."
            )
        rows, columns = grid[0] // side, grid[1] // side
        blocks = choose(key, (images, rows * columns), round(self.mask_ratio * rows * columns))
        blocks = blocks.reshape(images, rows, 1, columns, 1)
        return jnp.broadcast_to(blocks, (images, rows, side, columns, side)).reshape(images, -1)

    def _maps(self, name: str) -> bool:
        return dict(self.teachers)[name].vector_width(self.arch) != self.arch.width


def _mean(loss: Float[Array, "B"], batch: Batch) -> Float[Array, ""]:
    """Over the images; over those alone that are `shown`, where the batch has this field."""
    shown = batch.get("shown")
    return jnp.mean(loss) if shown is None else jnp.sum(loss * shown) / jnp.maximum(jnp.sum(shown), 1)


def _shown(batch: Batch) -> jax.Array:
    return jnp.sum(batch["shown"])

"""Teachers of spatial alignment: what frozen models say of each place in an image (PE §5).

A teacher gives a vector for every token of the student's grid. The losses compare cosines, with the student's own token
or between pairs of places, so that only directions count, and for pairs not even the width.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.layers import resolve_layers
from pe_jax.models.sam2 import CHOICES, Sam2, Sam2Config
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.types import Params, split

Images = Float[Array, "B H W 3"]


@runtime_checkable
class Teacher(Protocol):
    """What the spatial stage asks of a teacher: a hashable description of a frozen model and of what it teaches.

    Attributes:
      direct: weight of the loss that turns each token to the teacher's own (`losses.token_cosine`).
      pairs: weight of the loss that gives pairs of tokens the teacher's cosines (`losses.token_pairs`).
      temperature: with which the latter sharpens the teacher's cosines.
      part: what its weights are read as, see `pe_jax.initial`; None where it has none of its own.
    """

    direct: float
    pairs: float
    temperature: float | None

    @property
    def part(self) -> Any: ...

    def build(self, student: VisionConfig, dtype: str, rngs: nnx.Rngs) -> nnx.Module | None:
        """The frozen model, or None where nothing is to be computed. Its parameters are stored in `dtype`."""
        ...

    def vector_width(self, student: VisionConfig) -> int:
        """Of the vectors it gives."""
        ...

    def features(
        self, model: Any, images: Images, grid: tuple[int, int], stored: Int8[Array, "_ _ _"] | None
    ) -> Float[Array, "B N T"]:
        """A vector for each place of `grid` (rows, columns), row by row.

        Args:
          model: what `build` gave.
          images: [B, H, W, 3] in [-1, 1], the very pixels that the student sees.
          grid: of the student's tokens.
          stored: the batch's field `teacher`, where the data has one.
        """
        ...

    def flops(self, student: VisionConfig | None, image_size: tuple[int, int]) -> int:
        """Of what it says of one image; a teacher with an architecture of its own needs no student for it."""
        ...


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower's tokens after one of its blocks: the student's own start, PE-Spatial-G, or any other tower.

    The tower is cut after that block. Images are brought to its size, and its tokens to the student's grid, bilinearly
    where they differ.
    """

    arch: VisionConfig | None = None  # None: the tower that the student starts from, without LayerScale
    layer: int = -1
    image_size: int | None = None  # pixels that it sees; None: as many as the student
    direct: float = 0.0
    pairs: float = 0.0
    temperature: float | None = None

    @classmethod
    def create(cls, fields: Mapping[str, Any]) -> "Tower":
        fields = dict(fields)
        if fields.get("arch") is not None:
            arch: Any = zoo.architecture(fields["arch"])
            fields["arch"] = arch.vision if isinstance(arch, CLIPConfig) else arch
        return cls(**fields)

    @property
    def part(self) -> Any:
        return None if self.arch is None else "model"

    def config(self, student: VisionConfig | None) -> VisionConfig:
        """Of the tower as it is run: cut after the layer, without what only training needs."""
        if self.arch is None and student is None:
            raise ValueError("a tower without an architecture is its student's start; give its arch.")
        whole = self.arch or dataclasses.replace(cast(VisionConfig, student), layer_scale=None)
        (depth,) = resolve_layers((self.layer,), whole.depth)
        if depth == 0:
            raise ValueError("a teacher's layer 0 is the patch embedding, which knows one patch; take one from 1 on.")
        return dataclasses.replace(
            whole, depth=depth, pool="none", norm_post=False, output_width=None, drop_path=0.0, remat="none"
        )

    def build(self, student: VisionConfig, dtype: str, rngs: nnx.Rngs) -> VisionTower:
        config = dataclasses.replace(self.config(student), dtype=dtype)
        return stored_as(VisionTower(config, rngs=rngs), dtype)

    def vector_width(self, student: VisionConfig) -> int:
        return self.config(student).width

    def features(
        self, model: VisionTower, images: Images, grid: tuple[int, int], stored: Int8[Array, "_ _ _"] | None
    ) -> Float[Array, "B N T"]:
        if self.image_size is not None:
            images = jax.image.resize(images, (len(images), self.image_size, self.image_size, 3), "bilinear")
        layer, patch = model.config.depth, model.config.patch_size
        tokens = model.features(images, (layer,), class_token=False)[layer]
        own = images.shape[1] // patch, images.shape[2] // patch
        if own == grid:
            return tokens
        placed = tokens.astype(jnp.float32).reshape(len(images), *own, -1)
        return jax.image.resize(placed, (len(images), *grid, placed.shape[-1]), "bilinear").reshape(
            len(images), -1, placed.shape[-1]
        )

    def flops(self, student: VisionConfig | None, image_size: tuple[int, int]) -> int:
        return zoo.forward_flops(self.config(student), self.image_size or image_size)


@dataclasses.dataclass(frozen=True)
class Masks:
    """SAM 2.1: to which of the masks of a grid of points each place belongs, by their logits (PE §5.2)."""

    arch: Sam2Config
    points_per_side: int = 32
    chunk: int = 64  # points decoded at a time
    choice: str = "stable"  # which of a point's masks
    direct: float = 0.0
    pairs: float = 0.0
    temperature: float | None = 20.0

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or self.chunk < 1 or self.points_per_side**2 % self.chunk:
            raise ValueError(f"chunk={self.chunk} does not divide the {self.points_per_side**2} points; change one.")
        if self.choice not in CHOICES:
            raise ValueError(f"choice={self.choice!r} must be one of {', '.join(CHOICES)}.")

    @property
    def part(self) -> Any:
        return self.arch

    @classmethod
    def create(cls, fields: Mapping[str, Any]) -> "Masks":
        fields = dict(fields)
        return cls(zoo.sam2(fields.pop("arch", "SAM-2.1-L")), **fields)

    def build(self, student: VisionConfig, dtype: str, rngs: nnx.Rngs) -> Sam2:
        return stored_as(Sam2(dataclasses.replace(self.arch, dtype=dtype), rngs=rngs), dtype)

    def vector_width(self, student: VisionConfig) -> int:
        return self.points_per_side**2

    def features(
        self, model: Sam2, images: Images, grid: tuple[int, int], stored: Int8[Array, "_ _ _"] | None
    ) -> Float[Array, "B N T"]:
        seen = model.prepare((images + 1) * 127.5)
        return model.grid_features(seen, grid, self.points_per_side, self.chunk, self.choice)

    def flops(self, student: VisionConfig | None, image_size: tuple[int, int]) -> int:
        graphdef, params = split(nnx.eval_shape(lambda: Sam2(self.arch, rngs=nnx.Rngs(0))))
        grid = self.points_per_side, self.points_per_side  # the student's costs nothing beside the masks

        def said(params: Params, images: Array) -> Array:
            return self.features(nnx.merge(graphdef, params), images, grid, None)

        images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
        return _products(jax.make_jaxpr(said)(params, images).jaxpr)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a teacher said before, read with the images: the field `teacher`, as `pe-jax teacher` writes it."""

    tokens: int
    width: int  # of the vectors
    direct: float = 0.0
    pairs: float = 0.0
    temperature: float | None = 20.0
    part: ClassVar[Any] = None

    @classmethod
    def create(cls, fields: Mapping[str, Any]) -> "Stored":
        return cls(**fields)

    def build(self, student: VisionConfig, dtype: str, rngs: nnx.Rngs) -> None:
        return None

    def vector_width(self, student: VisionConfig) -> int:
        return self.width

    def features(
        self, model: None, images: Images, grid: tuple[int, int], stored: Int8[Array, "_ _ _"] | None
    ) -> Float[Array, "B N T"]:
        if stored is None or stored.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"the batch has {'no teacher' if stored is None else f'teacher vectors for {stored.shape[1]} places'}, "
                f"and the student has {grid[0]} x {grid[1]} tokens; write them anew for this image and patch size."
            )
        return stored.astype(jnp.bfloat16)  # in which every int8 is exact

    def flops(self, student: VisionConfig | None, image_size: tuple[int, int]) -> int:
        return 0


TEACHERS: dict[str, type[Any]] = {"tower": Tower, "sam2": Masks, "stored": Stored}


def create(config: Mapping[str, Any]) -> Teacher:
    """The teacher that `{"name": "tower", "layer": 41, "direct": 1.0}` describes; `name` is a key of `TEACHERS`.

    Raises:
      ValueError: for an unknown name or field, naming its nearest neighbour, or one that teaches nothing.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in TEACHERS:
        raise ValueError(f"teacher name {name!r} is unknown; the teachers are {', '.join(TEACHERS)}.")
    known = [field.name for field in dataclasses.fields(TEACHERS[name])]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1, 0.3)
            raise ValueError(f"teacher {name!r} has no field {field!r}; did you mean {' or '.join(near or known)}?")
    teacher: Teacher = TEACHERS[name].create(fields)
    if min(teacher.direct, teacher.pairs) < 0 or not teacher.direct + teacher.pairs > 0:
        raise ValueError(
            f"teacher {name!r} has direct={teacher.direct} and pairs={teacher.pairs}; these are the weights of its "
            "losses: give at least one of them a number above 0."
        )
    return teacher


def quantised(vectors: Float[Array, "B N T"]) -> Int8[Array, "B N T"]:
    """Vectors of a teacher at a byte a number, each so long that its largest component is 127.

    Their lengths are lost, and only their directions count: cosines of SAM's logits change by less than 1e-3.
    """
    largest = jnp.max(jnp.abs(vectors), -1, keepdims=True)
    return jnp.round(127 * vectors / jnp.where(largest > 0, largest, 1)).astype(jnp.int8)


def stored_as(model: Any, dtype: str) -> Any:
    """The module with its parameters in `dtype`: half the memory in bfloat16, for what never moves."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


def _products(jaxpr: Any) -> int:
    """Floating point operations of a program's matrix products, loops counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((summed, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            size = 2 * equation.outvars[0].aval.size
            for axis in summed:
                size *= left[axis]
            total += size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * _products(inner)
    return total

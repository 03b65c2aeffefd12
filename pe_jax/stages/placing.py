"""A tower's weights in the place of another's: cut, with fresh LayerScales, positions on another grid.

Pure functions of nested dicts, which a jitted `start` of a stage traces; what is thereby replaced is never computed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pe_jax.models.vision import VisionConfig
from pe_jax.types import Params

_FIXED = ("patch_size", "width", "heads", "mlp_width", "class_token", "rope")


def tower_of(config: Any, params: Params) -> tuple[VisionConfig, Params]:
    """The vision tower of what was loaded, which may be that tower alone."""
    return (config, params) if isinstance(config, VisionConfig) else (config.vision, params["vision"])


def placed(fresh: Params, tower: Params, wanted: VisionConfig, given: VisionConfig, name: str) -> Params:
    """`fresh` parameters of a tower with those of an equal or longer one in their places, in the dtype of `fresh`.

    Later blocks and the head are left out; LayerScales that the tower lacks stay fresh; positions are resized to the
    wanted grid.

    Args:
      fresh, wanted: parameters and configuration of the one to fill.
      tower, given: of the one that was loaded.
      name: how an error calls it.

    Raises:
      ValueError: if it is of another shape, naming every field that differs.
    """
    wrong = [
        f"{field} {getattr(given, field)}, want {getattr(wanted, field)}"
        for field in _FIXED
        if getattr(given, field) != getattr(wanted, field)
    ]
    if given.depth < wanted.depth:
        wrong.append(f"{given.depth} blocks, want at least {wanted.depth}")
    if given.layer_scale is not None and wanted.layer_scale is None:
        wrong.append("LayerScale, want none")
    if wrong:
        raise ValueError(f"the weights given for {name!r} are of another tower: it has {'; '.join(wrong)}.")
    blocks = jax.tree.map(lambda x: x[: wanted.depth], tower["blocks"])
    taken = {part: tower[part] for part in ("patch", "class_token", "norm_pre") if part in tower}
    taken["position"] = _resized(tower["position"], given, wanted)
    return fresh | cast(taken, fresh) | {"blocks": fresh["blocks"] | cast(blocks, fresh["blocks"])}


def cast(new: Params, like: Params) -> Params:
    """The parameters of `new` in the dtypes that `like` has at their places."""
    return {name: jax.tree.map(lambda x, old: x.astype(old.dtype), branch, like[name]) for name, branch in new.items()}


def check(given: Params, wanted: Params, name: str) -> None:
    """A ValueError that names what differs, where two trees of parameters are not of the same names and shapes."""
    had, want = (
        {jax.tree_util.keystr(keys, simple=True, separator="/"): x.shape for keys, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    )
    wrong = [f"{path} is {had.get(path)}, want {want.get(path)}" for path in sorted(had.keys() | want.keys())
             if had.get(path) != want.get(path)]  # fmt: skip
    if wrong:
        raise ValueError(f"the {name} does not fit: {'; '.join(wrong[:6])}.")


def made_up_for(blocks: Params) -> Params:
    """Blocks whose LayerScales change nothing: the kernels and biases before them are divided by them."""
    attention, mlp = dict(blocks["attention"]), dict(blocks["mlp"])
    for parts, last, scale in ((attention, "out", "scale1"), (mlp, "down", "scale2")):
        gamma = blocks[scale]["gamma"]  # [Y, D]
        parts[last] = {"kernel": parts[last]["kernel"] / gamma[:, None], "bias": parts[last]["bias"] / gamma}
    return blocks | {"attention": attention, "mlp": mlp}


def _resized(position: Array, given: VisionConfig, wanted: VisionConfig) -> Array:
    """A table of positions on another grid, as the tower itself reads one (bilinear, not antialiased)."""
    if given.grid == wanted.grid:
        return position
    first = int(given.class_token)
    grid = position[first:].reshape(given.grid, given.grid, -1)
    grid = jax.image.resize(grid, (wanted.grid, wanted.grid, grid.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([position[:first], grid.reshape(-1, grid.shape[-1])])

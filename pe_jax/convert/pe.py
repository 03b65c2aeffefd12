"""Names and shapes of PE's weights in other libraries, both ways (PE §1.9 of the release's checkpoints).

One table says what each of our parameters is called elsewhere and how its axes lie there. Reading, writing and the
accounting of every key and shape all come from it. Three layouts:

- `meta`: Meta's own files; a whole CLIP has its vision tower under `visual.`.
- `timm`: the vision tower alone, as `timm.create_model("vit_pe_...")` has it.
- `open_clip`: a CLIP, timm's tower under `visual.trunk.` and Meta's text names under `text.`.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import numpy as np
from flax import nnx

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from pe_jax.types import Params

LAYOUTS = ("meta", "timm", "open_clip")
_LISTED = 30  # keys of each kind that an error lists

# What each layout's library announces as the evaluation transform of these weights (timm 1.0.31, open_clip 3.3), in
# the fields of our Preprocess. PE itself: squash, bilinear, mean and std 0.5.
PRESETS: dict[str, dict[str, Any]] = {
    "meta": {"mode": "squash", "filter": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    "timm": {"mode": "crop", "filter": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    "open_clip": {"mode": "squash", "filter": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
}


# ------------------------------------------------------------------------------------------------------------ table


@dataclasses.dataclass(frozen=True)
class Form:
    """How the axes of a parameter lie in the stored tensor, or tensors.

    Attributes:
      axes: the parameter's axes in the order in which the stored tensor has them.
      merged: for each stored axis, how many of those it merges; 0 is an axis of length 1.
      shares: the stored tensor is cut along its first axis into tensors of this many shares each.
      zero_bias: a further tensor follows, a bias of zeros that we have no parameter for.
      within: the sizes that the parameter's last axis is seen as, each an axis of its own; "heads" stands for their
        number, -1 for what is left.
    """

    axes: tuple[int, ...]
    merged: tuple[int, ...]
    shares: tuple[int, ...] = (1,)
    zero_bias: bool = False
    within: tuple[Any, ...] = ()

    def of(self, heads: int) -> "Form":
        return dataclasses.replace(self, within=tuple(heads if n == "heads" else n for n in self.within))

    def store(self, param: np.ndarray) -> list[np.ndarray]:
        """Ours → stored; views wherever the strides allow, which is everywhere in the table below but for qkv."""
        if self.within:
            param = param.reshape(*param.shape[:-1], *self.within)
        lengths = iter(param.shape[axis] for axis in self.axes)
        shape = [math.prod(next(lengths) for _ in range(count)) for count in self.merged]
        whole = param.transpose(self.axes).reshape(shape)
        parts = [whole]
        if len(self.shares) > 1:
            parts = np.split(whole, np.cumsum(self.shares)[:-1] * (shape[0] // sum(self.shares)))
        return [*parts, np.zeros(shape[0], param.dtype)] if self.zero_bias else parts

    def load(self, tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Stored → ours, of the given shape."""
        parts = tensors[:-1] if self.zero_bias else tensors
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        known = math.prod(n for n in self.within if n != -1)
        seen = (*shape[:-1], *([n if n != -1 else shape[-1] // known for n in self.within] or shape[-1:]))
        return whole.reshape([seen[axis] for axis in self.axes]).transpose(np.argsort(self.axes)).reshape(shape)


_VECTOR, _MATRIX, _CUBE, _SCALAR = (Form(tuple(range(n)), (1,) * n) for n in (1, 2, 3, 0))
_LINEAR = Form((1, 0), (1, 1))  # ours [in, out], PyTorch's (out, in)
_HEADS = ("heads", 3, -1)  # ours lie head by head, its q, k and v; stored are q of all heads, then k, then v
_QKV, _QKV_BIAS = Form((2, 1, 3, 0), (3, 1), within=_HEADS), Form((1, 0, 2), (3,), within=_HEADS)
_CONV = Form((3, 2, 0, 1), (1, 1, 1, 1))  # [P, P, 3, D] as (D, 3, P, P)


class Row(NamedTuple):
    """A parameter and its names. `{}` in a name is the block's number; such parameters are stacked over blocks.

    timm cuts one tensor of Meta's into two here and there: `timm` then has both names, and `timm_form` the cut.
    """

    path: str
    meta: str
    timm: str = ""
    form: Form = _VECTOR
    timm_form: Form | None = None


def _norm(path: str, meta: str, timm: str = "") -> tuple[Row, ...]:
    return (
        Row(f"{path}.scale", f"{meta}.weight", f"{timm}.weight"),
        Row(f"{path}.bias", f"{meta}.bias", f"{timm}.bias"),
    )


def _mlp(path: str, meta: str, timm: str = "") -> tuple[Row, ...]:
    return (
        Row(f"{path}.up.kernel", f"{meta}.c_fc.weight", f"{timm}.fc1.weight", _LINEAR),
        Row(f"{path}.up.bias", f"{meta}.c_fc.bias", f"{timm}.fc1.bias"),
        Row(f"{path}.down.kernel", f"{meta}.c_proj.weight", f"{timm}.fc2.weight", _LINEAR),
        Row(f"{path}.down.bias", f"{meta}.c_proj.bias", f"{timm}.fc2.bias"),
    )


_META_BLOCK, _TIMM_BLOCK = "transformer.resblocks.{}", "blocks.{}"
_BLOCKS: tuple[Row, ...] = (
    *_norm("blocks.norm1", f"{_META_BLOCK}.ln_1", f"{_TIMM_BLOCK}.norm1"),
    Row("blocks.attention.qkv.kernel", f"{_META_BLOCK}.attn.in_proj_weight", f"{_TIMM_BLOCK}.attn.qkv.weight", _QKV),
    Row("blocks.attention.qkv.bias", f"{_META_BLOCK}.attn.in_proj_bias", f"{_TIMM_BLOCK}.attn.qkv.bias", _QKV_BIAS),
    Row(
        "blocks.attention.out.kernel", f"{_META_BLOCK}.attn.out_proj.weight", f"{_TIMM_BLOCK}.attn.proj.weight", _LINEAR
    ),
    Row("blocks.attention.out.bias", f"{_META_BLOCK}.attn.out_proj.bias", f"{_TIMM_BLOCK}.attn.proj.bias"),
    Row("blocks.scale1.gamma", f"{_META_BLOCK}.ls_1.gamma", f"{_TIMM_BLOCK}.gamma_1"),
    *_norm("blocks.norm2", f"{_META_BLOCK}.ln_2", f"{_TIMM_BLOCK}.norm2"),
    *_mlp("blocks.mlp", f"{_META_BLOCK}.mlp", f"{_TIMM_BLOCK}.mlp"),
    Row("blocks.scale2.gamma", f"{_META_BLOCK}.ls_2.gamma", f"{_TIMM_BLOCK}.gamma_2"),
)
_VISION: tuple[Row, ...] = (
    Row("class_token", "class_embedding", "cls_token", _VECTOR, Form((0,), (0, 0, 1))),
    Row("position", "positional_embedding", "pos_embed", _MATRIX, Form((0, 1), (0, 1, 1))),
    Row("projection", "proj", "head.weight head.bias", _MATRIX, Form((1, 0), (1, 1), zero_bias=True)),
    Row("patch.kernel", "conv1.weight", "patch_embed.proj.weight", _CONV),
    *_norm("norm_pre", "ln_pre", "norm_pre"),
    *_BLOCKS,
    *_norm("norm_post", "ln_post", "norm"),
    Row("pool.probe", "attn_pool.probe", "attn_pool.latent", _CUBE),
    Row(
        "pool.attention.qkv.kernel",
        "attn_pool.attn.in_proj_weight",
        "attn_pool.q.weight attn_pool.kv.weight",
        _QKV,
        dataclasses.replace(_QKV, shares=(1, 2)),
    ),
    Row(
        "pool.attention.qkv.bias",
        "attn_pool.attn.in_proj_bias",
        "attn_pool.q.bias attn_pool.kv.bias",
        _QKV_BIAS,
        dataclasses.replace(_QKV_BIAS, shares=(1, 2)),
    ),
    Row("pool.attention.out.kernel", "attn_pool.attn.out_proj.weight", "attn_pool.proj.weight", _LINEAR),
    Row("pool.attention.out.bias", "attn_pool.attn.out_proj.bias", "attn_pool.proj.bias"),
    *_norm("pool.norm", "attn_pool.layernorm", "attn_pool.norm"),
    *_mlp("pool.mlp", "attn_pool.mlp", "attn_pool.mlp"),
)
_TEXT: tuple[Row, ...] = (
    Row("position", "positional_embedding", form=_MATRIX),
    Row("projection", "text_projection", form=_MATRIX),
    Row("token_embedding", "token_embedding.weight", form=_MATRIX),
    *_BLOCKS,
    *_norm("norm_final", "ln_final"),
)
_SCALE: tuple[Row, ...] = (Row("log_scale", "logit_scale", form=_SCALAR),)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a file keeps the towers: the column of names and the prefix of each."""

    layout: str
    vision: str = ""
    text: str | None = None  # None: a vision tower alone

    @property
    def column(self) -> str:
        return "meta" if self.layout == "meta" else "timm"


_CLIP_PLACES = {"meta": _Place("meta", "visual.", ""), "open_clip": _Place("open_clip", "visual.trunk.", "text.")}
_VISION_PLACES = (  # the first of a layout is how we write it
    _Place("meta"),
    _Place("timm"),
    _Place("meta", "visual.", ""),
    _Place("open_clip", "visual.trunk.", "text."),
    _Place("timm", "visual.", ""),
)

_Path: TypeAlias = tuple[str, ...]


class _Slot(NamedTuple):
    """One parameter, or one block's slice of a stacked one, and its tensors."""

    path: _Path
    block: int | None
    shape: tuple[int, ...]  # of the slice
    names: list[str]
    form: Form

    @property
    def stored(self) -> list[tuple[int, ...]]:
        blank = np.broadcast_to(np.zeros((), np.int8), self.shape)  # all strides 0: no memory however large
        return [tensor.shape for tensor in self.form.store(blank)]


@functools.lru_cache(maxsize=64)
def _leaves(config: zoo.Architecture) -> dict[_Path, jax.ShapeDtypeStruct]:
    return _flat(nnx.to_pure_dict(nnx.state(zoo.abstract(config))))


def _flat(tree: Mapping[str, Any], path: _Path = ()) -> dict[_Path, Any]:
    leaves = {}
    for name, branch in tree.items():
        leaves |= _flat(branch, (*path, name)) if isinstance(branch, Mapping) else {(*path, name): branch}
    return leaves


def _slots(config: zoo.Architecture, place: _Place) -> list[_Slot]:
    """Every parameter of `config` that `place` holds, block by block."""
    if isinstance(config, VisionConfig):
        parts = [((), _VISION, place.column, place.vision)]
    else:
        parts = [(("vision",), _VISION, place.column, place.vision)]
        if place.text is not None:
            parts += [(("text",), _TEXT, "meta", place.text), ((), _SCALE, "meta", "")]
    leaves, slots = _leaves(config), []
    for root, rows, column, prefix in parts:
        found = [(row, path) for row in rows if (path := (*root, *row.path.split("."))) in leaves]
        depth = max((leaves[path].shape[0] for row, path in found if "{}" in row.meta), default=0)
        single = [(row, path, None) for row, path in found if "{}" not in row.meta]
        stacked = [(row, path, block) for block in range(depth) for row, path in found if "{}" in row.meta]
        for row, path, block in single + stacked:
            timm = column == "timm"
            names = [prefix + name.format(block) for name in (row.timm if timm else row.meta).split()]
            shape = leaves[path].shape if block is None else leaves[path].shape[1:]
            form = ((timm and row.timm_form) or row.form).of(_heads(config, path))
            slots.append(_Slot(path, block, tuple(shape), names, form))
    return slots


def tower_slots(config: VisionConfig, layout: str, prefix: str) -> list[_Slot]:
    """Every parameter of a tower that lies inside a larger model's file, its names of a layout behind `prefix`."""
    return _slots(config, dataclasses.replace(_write_place(config, layout), vision=prefix))


def _heads(config: zoo.Architecture, path: _Path) -> int:
    """Of the attention that a parameter belongs to."""
    if "text" in path:
        return config.text.heads
    vision = _vision(config)
    return vision.pool_heads if "pool" in path else vision.heads


# ---------------------------------------------------------------------------------------------------------- writing


def shapes(config: zoo.Architecture, layout: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file of this layout holds; allocates nothing."""
    return {
        name: shape
        for slot in _slots(config, _write_place(config, layout))
        for name, shape in zip(slot.names, slot.stored, strict=True)
    }


def from_params(params: Params, config: zoo.Architecture, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as the tensors of a layout, by name; the inverse of `to_params`, byte for byte.

    Types are those of the parameters. Tensors are views of the parameters. `timm` holds the vision tower alone: of a
    CLIP, the text tower and logit scale are left out.

    Args:
      params: the nested dict of arrays of `config`'s model.
      config: the architecture, a `CLIPConfig` or a `VisionConfig`.
      layout: "meta", "timm" or "open_clip".

    Raises:
      ValueError: listing every parameter that is missing, unexpected or of another shape; or for a layout that cannot
        hold this architecture.
    """
    place = _write_place(config, layout)
    given, want = _flat(params), _leaves(config)
    report = Report()
    for path, leaf in want.items():
        if path not in given:
            report.missing(".".join(path), leaf.shape, map(".".join, given.keys() - want.keys()))
        elif tuple(given[path].shape) != tuple(leaf.shape):
            report.shape(".".join(path), given[path].shape, leaf.shape)
    for path in given.keys() - want.keys():
        report.unexpected(".".join(path), map(".".join, want))
    report.check("The parameters do not fit the architecture")
    tensors: dict[str, np.ndarray] = {}
    host: dict[_Path, np.ndarray] = {}
    for slot in _slots(config, place):
        leaf = host.setdefault(slot.path, np.asarray(given[slot.path]))
        parts = slot.form.store(leaf if slot.block is None else leaf[slot.block])
        tensors |= zip(slot.names, parts, strict=True)
    return tensors


def _write_place(config: zoo.Architecture, layout: str) -> _Place:
    _check_layout(layout)
    vision = {"meta": _VISION_PLACES[0], "timm": _VISION_PLACES[1]}
    place = (vision if isinstance(config, VisionConfig) else _CLIP_PLACES | {"timm": vision["timm"]}).get(layout)
    if place is None:
        raise ValueError('layout="open_clip" holds image-text models; write a vision tower as "timm" or "meta".')
    return place


def _check_layout(layout: str, *more: str) -> None:
    if layout not in (*LAYOUTS, *more):
        raise ValueError(f"layout={layout!r} must be one of {', '.join((*more, *LAYOUTS))}.")


# ---------------------------------------------------------------------------------------------------------- reading


def to_params(
    tensors: Mapping[str, np.ndarray],
    config: zoo.Architecture,
    layout: str = "auto",
    resample_position: bool = False,
    dtype: Any = np.float32,
) -> Params:
    """Tensors of a layout as our parameters: a nested dict of NumPy arrays in memory of their own.

    A leading `module.` is dropped. A `VisionConfig` also takes the file of a whole CLIP, in which it reads the vision
    tower and passes over the text tower and logit scale, and only those. Nothing else is passed over or renamed.

    Args:
      tensors: what `weights.read` gives.
      config: the architecture they should have.
      layout: "meta", "timm", "open_clip", or "auto": the one whose names fit best.
      resample_position: accept a position embedding of another (square) grid and resample it to the architecture's,
        bilinearly without antialiasing, edge pixels not aligned, class row untouched, as PE's module does.
      dtype: of the result. float32 by default, whatever the file has: half files become float32 exactly, float64 ones
        are rounded. None keeps each tensor's own type, so that any file round-trips byte for byte.

    Raises:
      ValueError: one error that lists every missing, unexpected and mis-shaped key with its nearest neighbours.

    Source: PE §1.9, §1.5 (resampling).
    """
    named = _without_module(tensors)
    place = _recognise(named, config, layout)
    slots = _slots(config, place)
    if isinstance(config, VisionConfig) and place.text is not None:
        text = _text_pattern(place.text)
        named = {name: tensor for name, tensor in named.items() if not text.fullmatch(name)}
    if resample_position:
        named = _resampled(named, config, slots)
    _account(named, slots, config, place)
    leaves: dict[_Path, np.ndarray] = {}
    for slot in slots:
        value = slot.form.load([named[name] for name in slot.names], slot.shape)
        kind = np.dtype(value.dtype if dtype is None else dtype)
        if slot.block is None:
            leaves[slot.path] = np.array(value, kind, order="C")
            continue
        if slot.path not in leaves:  # one array for all blocks, filled in place: the file is never in memory twice
            leaves[slot.path] = np.empty(_leaves(config)[slot.path].shape, kind)
        elif leaves[slot.path].dtype != kind:
            raise ValueError(
                f"{slot.names[0]} is {kind}, the blocks before it {leaves[slot.path].dtype}; one array holds them all: "
                "pass dtype to convert them."
            )
        leaves[slot.path][slot.block] = value
    return _nested(leaves)


def identify(tensors: Mapping[str, np.ndarray]) -> tuple[str, zoo.Architecture]:
    """The released model that has exactly these keys and shapes: its name, and its architecture or vision tower's.

    Raises:
      ValueError: if none has, or several have (PE-Lang and its -Tiling variant differ in their numbers alone).
    """
    got = {name: tuple(tensor.shape) for name, tensor in _without_module(tensors).items()}
    found: list[tuple[str, zoo.Architecture]] = []
    for name in zoo.NAMES:
        config = zoo.architecture(name)
        towers = [config, config.vision] if isinstance(config, CLIPConfig) else [config]
        for tower in towers:
            for slots in (_slots(tower, place) for place in _places(tower, "auto")):
                names = {name for slot in slots for name in slot.names}
                if names == got.keys() and _expected(slots) == got:
                    found.append((name, tower))
    if len(found) == 1:
        return found[0]
    names = " and ".join(name for name, _ in found) or "no released model"
    raise ValueError(f"The shapes of these {len(got)} tensors fit {names}; say which model this is (--model NAME).")


def _without_module(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(named) != len(tensors):
        twice = [name for name in tensors if f"module.{name}" in tensors]
        raise ValueError(f"These keys occur with and without 'module.': {', '.join(twice[:10])}.")
    return named


def _places(config: zoo.Architecture, layout: str) -> list[_Place]:
    _check_layout(layout, "auto")
    places = _VISION_PLACES if isinstance(config, VisionConfig) else tuple(_CLIP_PLACES.values())
    return [place for place in places if layout in ("auto", place.layout)]


def _expected(slots: list[_Slot]) -> dict[str, tuple[int, ...]]:
    return {name: shape for slot in slots for name, shape in zip(slot.names, slot.stored, strict=True)}


def _hits(named: Mapping[str, np.ndarray], config: zoo.Architecture, place: _Place) -> int:
    return sum(name in named for slot in _slots(config, place) for name in slot.names)


def _best(named: Mapping[str, np.ndarray], config: zoo.Architecture, layout: str) -> tuple[int, _Place | None]:
    """The place whose names occur most often in the file, and how often."""
    scored = [(_hits(named, config, place), place) for place in _places(config, layout)]
    return max(scored, key=lambda pair: pair[0], default=(-1, None))


def recognise(tensors: Mapping[str, np.ndarray], config: zoo.Architecture) -> tuple[str, zoo.Architecture]:
    """The layout of these tensors by their names; and the architecture, or its `.vision` if they are that tower alone.

    Raises:
      ValueError: if no name is known in any layout.
    """
    named = _without_module(tensors)
    found, place = _best(named, config, "auto")
    if isinstance(config, CLIPConfig) and (alone := _best(named, config.vision, "auto"))[0] > found:
        (found, place), config = alone, config.vision
    if not found or place is None:
        _unknown(named)
    return place.layout, config


def _recognise(named: Mapping[str, np.ndarray], config: zoo.Architecture, layout: str) -> _Place:
    found, place = _best(named, config, layout)
    if isinstance(config, CLIPConfig):
        alone, tower = _best(named, config.vision, layout)
        if tower is not None and alone > found:
            raise ValueError(
                f"These tensors are a vision tower alone (layout {tower.layout}), and the architecture has a text "
                "tower too: give the whole model's file, or take the architecture's .vision."
            )
    if place is None or (layout == "auto" and not found):
        _unknown(named)
    return place


def _unknown(named: Mapping[str, np.ndarray]) -> NoReturn:
    some = ", ".join(list(named)[:5]) or "none at all"
    raise ValueError(f"No key is one of PE's in any layout ({', '.join(LAYOUTS)}). The first keys are: {some}.")


@functools.cache
def _text_pattern(prefix: str) -> re.Pattern:
    names = [prefix + row.meta for row in _TEXT] + [row.meta for row in _SCALE]
    return re.compile("|".join(re.escape(name).replace(re.escape("{}"), r"\d+") for name in names))


def _account(named: Mapping[str, np.ndarray], slots: list[_Slot], config: zoo.Architecture, place: _Place) -> None:
    """Raises one error about all that is wrong with the keys, shapes and types."""
    expected, report, grid = _expected(slots), Report(), _vision(config).grid
    positions = [slot.names[0] for slot in slots if slot.path[-1] == "position" and "text" not in slot.path]
    spare = [name for name in named if name not in expected]
    for name, shape in expected.items():
        if name not in named:
            report.missing(name, shape, spare)
        elif tuple(named[name].shape) != shape:
            side = _side(named[name], config) if name in positions else None
            if side and side != grid:
                report.other(
                    f"{name} is for a {side}x{side} grid, the architecture has {grid}x{grid}: "
                    "pass resample_position=True (--resample-position) to resample it"
                )
            else:
                report.shape(name, named[name].shape, shape)
        elif not jax.numpy.issubdtype(named[name].dtype, np.floating):
            report.other(f"{name} is {named[name].dtype}; want a floating type")
    for name in spare:
        report.unexpected(name, expected)
    for slot in slots:
        bias = slot.names[-1]
        if slot.form.zero_bias and bias in named and np.any(named[bias]):
            report.other(f"{bias} is not zero, and PE's projection has no bias to take it")
    report.check(f"The tensors do not fit the architecture (read as layout {place.layout})")


class Report:
    """Collects what does not fit, and raises it as one error."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def missing(self, name: str, shape: tuple[int, ...], near: Any) -> None:
        self._add("missing", name, f" {list(shape)}", "in the file", near)

    def unexpected(self, name: str, near: Any) -> None:
        self._add("unexpected", name, "", "expected", near)

    def shape(self, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
        self.other(f"{name} is {list(got)}, want {list(want)}", "mis-shaped")

    def other(self, line: str, kind: str = "refused") -> None:
        self.lines.setdefault(kind, []).append(line)

    def check(self, message: str) -> None:
        if not self.lines:
            return
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in self.lines.items())
        out = [f"{message}: {counts}. Nothing was loaded; is this another model's file?"]
        for kind, lines in self.lines.items():
            out += [f"  {kind}: {line}" for line in lines[:_LISTED]]
            if len(lines) > _LISTED:
                out.append(f"  {kind}: and {len(lines) - _LISTED} more")
        raise ValueError("\n".join(out))

    def _add(self, kind: str, name: str, detail: str, where: str, near: Any) -> None:
        if len(self.lines.get(kind, ())) < _LISTED:  # the search for neighbours is slow, and the rest is not shown
            close = difflib.get_close_matches(name, list(near), 2, 0.6)
            detail += f" (nearest {where}: {', '.join(close)})" if close else ""
        self.other(name + detail, kind)


def _nested(leaves: Mapping[_Path, np.ndarray]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


# ------------------------------------------------------------------------------------------------ position embeddings


def _vision(config: zoo.Architecture) -> VisionConfig:
    return config if isinstance(config, VisionConfig) else config.vision


def _side(tensor: np.ndarray | None, config: zoo.Architecture) -> int | None:
    """The side of the square grid that a stored position embedding [..., class + side², D] is for, if it is one."""
    if tensor is None or tensor.ndim < 2 or tensor.shape[-1] != _vision(config).width:
        return None
    cells = tensor.shape[-2] - _vision(config).class_token
    side = math.isqrt(max(cells, 0))
    return side if side > 0 and side * side == cells else None


def _resampled(named: Mapping[str, np.ndarray], config: zoo.Architecture, slots: list[_Slot]) -> dict[str, np.ndarray]:
    for slot in slots:
        if slot.path[-1] == "position" and "text" not in slot.path:
            (name,) = slot.names
            tensor, vision = named.get(name), _vision(config)
            side = _side(tensor, config)
            if tensor is not None and side and side != vision.grid:
                table = tensor.reshape(tensor.shape[-2:])
                table = resample(table, vision.grid, class_token=vision.class_token)
                return {**named, name: table.reshape(*tensor.shape[:-2], *table.shape)}
    return dict(named)


def resample(table: np.ndarray, side: int, *, class_token: bool) -> np.ndarray:
    """A position embedding [class + n², D] for a side x side grid: bilinear, centres aligned, not antialiased.

    The class row, first, is copied. Computed in float64 and returned in the type of `table`. Source: PE §1.5.
    """
    first = int(class_token)
    old = math.isqrt(len(table) - first)
    at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    weight = np.zeros((side, old))
    np.add.at(weight, (np.arange(side), low), 1 - (at - low))
    np.add.at(weight, (np.arange(side), np.minimum(low + 1, old - 1)), at - low)
    grid = table[first:].astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("yj,xi,jid->yxd", weight, weight, grid, optimize=True).reshape(side * side, -1)
    return np.concatenate([table[:first], grid.astype(table.dtype)])


def parameters(params: Params) -> Iterator[tuple[str, Any]]:
    """Dotted names and arrays of a parameter tree."""
    return ((".".join(path), leaf) for path, leaf in _flat(params).items())

"""Between the tensors of files and parameters on devices, one tensor at a time, whatever the model's size.

A layout of a model is a list of slots: each says which tensors hold a parameter, or one block's slice of it, and how
to go from one to the other. Accounting for every name and shape, reading and writing follow from that list.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from pe_jax.convert import weights
from pe_jax.convert.pe import Report
from pe_jax.types import Params

SHARD_BYTES = 5_000_000_000  # of a safetensors file, before the next begins

Path: TypeAlias = tuple[str, ...]


class Slot(NamedTuple):
    """One parameter, or one block's slice of a stacked one, and its tensors."""

    path: Path
    block: int | None
    names: list[str]
    stored: list[tuple[int, ...]]  # shapes of the tensors
    load: Callable[[list[np.ndarray]], np.ndarray]  # stored → ours
    store: Callable[[np.ndarray], list[np.ndarray]]  # ours → stored


class Lazy:
    """A tensor that is made when NumPy asks for its numbers; until then only its shape and type are known."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = np.asarray(self._make(), self.dtype if dtype is None else dtype)
        assert made.shape == self.shape, (made.shape, self.shape)
        return made


def leaf(tree: Params, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def paths(tree: Mapping[str, Any], path: Path = ()) -> Iterator[Path]:
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from paths(branch, (*path, name))
        else:
            yield (*path, name)


def expected(slots: Sequence[Slot]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the layout holds."""
    return {name: shape for slot in slots for name, shape in zip(slot.names, slot.stored, strict=True)}


def account(named: Mapping[str, Any], want: Mapping[str, tuple[int, ...]], report: Report, layout: str) -> None:
    """Raises one error about all that is wrong with names, shapes and types, and what `report` holds already."""
    spare = [name for name in named if name not in want]
    for name, shape in want.items():
        if name not in named:
            report.missing(name, shape, spare)
        elif tuple(named[name].shape) != shape:
            report.shape(name, tuple(named[name].shape), shape)
        elif not jnp.issubdtype(named[name].dtype, np.floating):
            report.other(f"{name} is {named[name].dtype}; want a floating type")
    for name in spare:
        report.unexpected(name, want)
    report.check(f"The tensors do not fit the architecture (read as layout {layout})")


def without_copy(named: Mapping[str, Any], copy: str, original: str, report: Report) -> dict[str, Any]:
    """The tensors without the second of two that the architecture ties; tells `report` if it is not the same."""
    kept = {name: tensor for name, tensor in named.items() if name != copy}
    if copy in named and original in named and not _equal(named[copy], named[original]):
        report.other(
            f"{copy} is not {original}, and this architecture ties them: use one with tied=False, if that is the model"
        )
    return kept if original in named else dict(named)


def _equal(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = range(0, len(one), 4096)  # a comparison of the whole would be as large as the table
    return all(np.array_equal(one[row : row + 4096], other[row : row + 4096]) for row in rows)


def place(
    named: Mapping[str, Any], slots: Sequence[Slot], shapes: Params, shardings: Params | None, dtype: Any
) -> Params:
    """The tensors, accounted for, as parameters; each is put on its devices as soon as it is read.

    Args:
      named: the tensors.
      slots: the layout.
      shapes: the abstract parameters.
      shardings: where they go, a nested dict like them; None is one device.
      dtype: of the parameters; None keeps that of the tensors.

    Raises:
      ValueError: if the blocks of one parameter are of different types, and `dtype` is None.
    """
    params: Params = {}
    for slot in slots:
        value = slot.load([np.asarray(named[name]) for name in slot.names])
        kind = np.dtype(value.dtype if dtype is None else dtype)
        where = SingleDeviceSharding(jax.local_devices()[0]) if shardings is None else leaf(shardings, slot.path)
        branch = params
        for name in slot.path[:-1]:
            branch = branch.setdefault(name, {})
        name = slot.path[-1]
        if slot.block is None:
            branch[name] = _put(value, kind, where)
            continue
        if name not in branch:
            branch[name] = _zeros(leaf(shapes, slot.path).shape, kind, where)()
        elif branch[name].dtype != kind:
            raise ValueError(
                f"{slot.names[0]} is {kind}, the blocks before it {branch[name].dtype}; one array holds them all: "
                "pass dtype to convert them."
            )
        of_block = where
        if isinstance(where, NamedSharding):
            of_block = NamedSharding(where.mesh, PartitionSpec(*tuple(where.spec)[1:]))
        branch[name] = _set_block(branch[name], _put(value, kind, of_block), slot.block)
    return params


def _put(value: np.ndarray, dtype: np.dtype, where: jax.sharding.Sharding) -> jax.Array:
    """An array on its devices; each process copies what its own devices hold."""
    return jax.make_array_from_callback(value.shape, where, lambda index: np.array(value[index], dtype, order="C"))


@functools.lru_cache(maxsize=256)  # as many as a few models have parameters: reading one again compiles nothing
def _zeros(shape: tuple[int, ...], dtype: np.dtype, where: jax.sharding.Sharding) -> Callable[[], jax.Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=where)


@jax.jit(donate_argnums=0)
def _set_block(stacked: jax.Array, of_block: jax.Array, block: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stacked, of_block, block, 0)


def check(params: Params, shapes: Params) -> None:
    """Raises a ValueError that lists every parameter that is missing, unexpected or of another shape."""
    want = {".".join(path): leaf(shapes, path) for path in paths(shapes)}
    given = {".".join(path): leaf(params, path) for path in paths(params)}
    report = Report()
    for name, one in want.items():
        if name not in given:
            report.missing(name, one.shape, given.keys() - want.keys())
        elif tuple(given[name].shape) != one.shape:
            report.shape(name, tuple(given[name].shape), one.shape)
    for name in given.keys() - want.keys():
        report.unexpected(name, want)
    report.check("The parameters do not fit the architecture")


def tensors(params: Params, slots: Sequence[Slot], shapes: Params, dtype: Any) -> dict[str, Lazy]:
    """Parameters as the tensors of a layout, by name; each is brought to the host when it is read.

    Raises:
      ValueError: as `check`.
    """
    check(params, shapes)

    def lazy(slot: Slot, number: int) -> Lazy:
        one = leaf(params, slot.path)

        def make() -> np.ndarray:
            return slot.store(np.asarray(one if slot.block is None else one[slot.block]))[number]

        return Lazy(slot.stored[number], one.dtype if dtype is None else dtype, make)

    return {name: lazy(slot, i) for slot in slots for i, name in enumerate(slot.names)}


def write_shards(
    folder: str | os.PathLike, tensors: Mapping[str, Lazy], fields: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `config.json`, and `model.safetensors` or as many shards as it takes with their index.

    Args:
      folder: made where missing; its files of these names are replaced.
      tensors: by name.
      fields: of `config.json`.
      shard_bytes: at most so many in each file, unless one tensor alone is larger.
    """
    folder = pathlib.Path(folder)
    files: list[dict[str, Lazy]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        nbytes = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        if files[-1] and size + nbytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if len(files) == 1:
        weights.write(folder / "model.safetensors", files[0])
        return
    places = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights.write(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / weights.INDEX).write_text(json.dumps(index, indent=2) + "\n")

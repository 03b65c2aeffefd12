"""Where arrays live: the mesh, the rules from logical to mesh axes, and host batches as global arrays.

The only module that names mesh axes. Parameters carry logical axis names (`axes` metadata of each variable), so that
a model says what an axis means and this module says where it goes:

  dcn     examples, between slices of chips: parameters are replicated over it, so that the slow network between slices
          carries one sum of gradients and the embeddings that the loss compares
  data    examples; parameters are replicated over it
  fsdp    examples, and the width of every parameter and of its optimizer state
  tensor  attention heads, MLP width, vocabulary
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pe_jax.types import Batch, HostBatch, Params

AXES = ("dcn", "data", "fsdp", "tensor")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("dcn", "data", "fsdp"),
    "outer_batch": ("dcn", "data"),  # examples where fsdp cuts another axis of the same array
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "joint": None,
    "tokens": None,
    "layers": None,
    None: None,
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """A mesh of the axes dcn, data, fsdp and tensor; one size may be -1, "all that is left". Default: all data.

    Raises:
      ValueError: for an unknown axis, more than one -1, sizes that do not multiply to the number of devices, or a dcn
        that is not the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | dict(shape if shape is not None else {"data": -1})
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; the axes are {', '.join(AXES)}.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh has -1 for {' and '.join(free)}; only one axis can take what is left.")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {dict(shape or {})} does not cover the {len(devices)} devices at hand; "
            "make the sizes multiply to that number, or give one axis -1."
        )
    inner = tuple(sizes[axis] for axis in AXES[1:])
    slices = [_laid(inner, part) for part in _slices(devices, sizes["dcn"])]
    return Mesh(np.stack(slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of one slice in this shape, each axis along whole sides of its torus where that can be."""
    try:
        return jax.make_mesh(shape, AXES[1:], (AxisType.Auto,) * len(shape), devices=devices).devices
    except NotImplementedError:  # no sides multiply to an axis, as for 16 ways on 8 x 8 chips
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def heads_mesh(mesh: Mesh, layers: int, rates: int) -> tuple[Mesh, PartitionSpec, PartitionSpec, PartitionSpec]:
    """The same devices, cut for many small heads that train side by side: one for each layer and learning rate.

    Rates are cut as many ways as divide them and the devices alike, then layers, and what devices are left share the
    examples, so that none idles whatever the numbers are.

    Returns:
      The mesh; and the partitions of heads [Y, R, ...], of features [Y, B, ...] and of targets [B, ...], of which the
      last two cut examples: B must be a multiple of `mesh.shape["examples"]`.
    """
    devices = mesh.devices.ravel()
    by_rate = math.gcd(rates, devices.size)
    by_layer = math.gcd(layers, devices.size // by_rate)
    grid = devices.reshape(by_rate, by_layer, -1)
    mesh = Mesh(grid, ("rates", "layers", "examples"), axis_types=(AxisType.Auto,) * 3)
    return mesh, PartitionSpec("layers", "rates"), PartitionSpec("layers", "examples"), PartitionSpec("examples")


def _slices(devices: list[Any], dcn: int) -> list[list[Any]]:
    """The devices of each slice; where the platform knows of none, as on a CPU, processes stand for them."""
    numbers = {getattr(device, "slice_index", None) or 0 for device in devices}
    if len(numbers) > 1 and len(numbers) != dcn:
        raise ValueError(
            f"there are {len(numbers)} slices, and the mesh has dcn={dcn}; set dcn to {len(numbers)}: no other axis "
            "may cross the network between slices."
        )

    def place(device: Any) -> tuple[int, int]:
        return getattr(device, "slice_index", None) or 0, device.process_index

    devices = sorted(devices, key=place) if dcn > 1 else devices
    size = len(devices) // dcn
    return [devices[i * size : (i + 1) * size] for i in range(dcn)]


def spec(mesh: Mesh | AbstractMesh, *logical: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these logical names; mesh axes that `mesh` lacks are left out."""
    present = set(mesh.axis_names)

    def physical(name: str | None) -> Any:
        rule = RULES[name]
        names = tuple(a for a in ((rule,) if isinstance(rule, str) else rule or ()) if a in present)
        return names if len(names) > 1 else (names[0] if names else None)

    return PartitionSpec(*(physical(name) for name in logical))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over data and fsdp; every other axis of a batch is whole."""
    return NamedSharding(mesh, spec(mesh, "batch"))


def batch_axes() -> tuple[str, ...]:
    """The axes of the current mesh (`jax.set_mesh`) over which examples are cut; none where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(axis for axis in RULES["batch"] or () if axis in mesh.axis_names)


def platform() -> str:
    """The platform that is being computed on or compiled for: of the current mesh's devices, else JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """What those devices are, as JAX names them, such as "TPU v5 lite"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return (device or jax.devices()[0]).device_kind


def ways(logical: str) -> int:
    """How many ways the current mesh cuts an axis of this logical name; 1 where no mesh is set."""
    mesh, rule = jax.sharding.get_abstract_mesh(), RULES[logical] or ()
    return math.prod(mesh.shape.get(axis, 1) for axis in ((rule,) if isinstance(rule, str) else rule))


def per_device(
    function: Callable[[jax.Array], jax.Array], before: Sequence[str | None], after: Sequence[str | None]
) -> Callable[[jax.Array], jax.Array]:
    """`function` run on each device's part of an array; as it is where no mesh is set.

    Args:
      function: needs nothing of the other parts.
      before, after: the logical axes of the array it takes and of the one it gives.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    return jax.shard_map(function, in_specs=spec(mesh, *before), out_specs=spec(mesh, *after), check_vma=False)


def batch_ways(mesh: Mesh) -> int:
    """How many ways a batch is cut; a global batch must be a multiple of it."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])


def param_shardings(model: nnx.Module, mesh: Mesh) -> Params:
    """The sharding of each parameter of a (possibly abstract) model, as a nested dict like its parameters.

    Raises:
      ValueError: if a dimension is not a multiple of the mesh axis it is cut over, naming the parameter.
    """

    def one(path: tuple[Any, ...], variable: nnx.Variable) -> NamedSharding:
        shape, axes = variable.shape, variable.get_metadata().get("axes", ())
        axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)  # stacking put the layers in front
        partition = spec(mesh, *axes)
        for size, logical, names in zip(shape, axes, partition, strict=True):
            names = (names,) if isinstance(names, str) else names or ()
            ways = math.prod(mesh.shape[name] for name in names)
            if logical == "heads":  # a head is never cut
                size = variable.get_metadata()["heads"]
            if size % ways:
                name = "/".join(str(getattr(k, "key", k)) for k in path)
                raise ValueError(
                    f"{name} has {logical}={size}, which mesh axis {'·'.join(names)}={ways} does not divide; "
                    f"choose a mesh whose {'·'.join(names)} divides {size}."
                )
        return NamedSharding(mesh, partition)

    state = nnx.state(model)
    flat = [(path, one(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation to the current mesh (`jax.set_mesh`); does nothing where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, *logical))


def gathered(weights: jax.Array | np.ndarray, *logical: str | None, dtype: Any) -> jax.Array:
    """Weights to multiply with, in `dtype` and whole over the fsdp axis, as one gather at that very place.

    Left to itself XLA sometimes gathers the activations of the whole batch instead, or multiplies shard by shard. In
    the backward pass the gradient is summed over the devices straight into its shards, in `dtype`.

    Args:
      weights: float32, cut as `param_shardings` says.
      logical: the names of its axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return jnp.asarray(weights, dtype)
    cut = spec(mesh, *logical)
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut))
    return _gathered(weights, cut, whole, dtype, weights.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(weights: Any, cut: PartitionSpec, whole: PartitionSpec, dtype: Any, stored: Any) -> jax.Array:
    # Pinned before as well, so that the bytes are those of `dtype`.
    narrow = jax.lax.with_sharding_constraint(weights.astype(dtype), cut)
    return jax.lax.with_sharding_constraint(narrow, whole)


def _gathered_backward(
    cut: PartitionSpec, whole: PartitionSpec, dtype: Any, stored: Any, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, cut).astype(stored),)


_gathered.defvjp(lambda *arguments: (_gathered(*arguments), None), _gathered_backward)


def global_batch(local: HostBatch, mesh: Mesh) -> Batch:
    """This process's rows as its part of global arrays, examples cut over data and fsdp."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x)) for name, x in local.items()}

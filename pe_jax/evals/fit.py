"""The small loop that every head on frozen features shares: all layers and all learning rates train in one update.

A head is what a probe trains on a layer's features, such as a linear classifier. Heads do not see each other: each
starts alike, meets the same batches, and becomes what it would have become alone. They are stacked, [Y, R, ...] for Y
layers and R rates, and on a mesh the stack is cut over all devices. Of large heads a device updates one layer's after
the other's, so that it holds the gradients and activations of one layer at a time.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pe_jax import sharding

Tree = Any  # of arrays
Head = tuple[Tree, Tree]  # parameters, and state that is not trained, such as running averages ({} where there is none)


class Fitted:
    """Trained heads.

    Attributes:
      losses: [T, Y, R] before each of the T updates; not finite where a rate was too high.
    """

    def __init__(self, turns: Sequence[Head], losses: Float[np.ndarray, "T Y R"], placement: "_Placement"):
        self.losses, self._turns, self._placement = losses, turns, placement

    @property
    def params(self) -> Tree:
        """Of all heads, leaves [Y, R, ...]."""
        return self._placement.joined([params for params, _ in self._turns])

    @property
    def state(self) -> Tree:
        """Of all heads, leaves [Y, R, ...]."""
        return self._placement.joined([state for _, state in self._turns])

    def apply(self, function: Callable[[Tree, Tree, Tree], Tree], features: Tree) -> Tree:
        """`function(params, state, features)` of one head, for all: leaves [Y, R, ...], on every device.

        Args:
          function: a module-level function (or one that is cached), so that it is compiled once.
          features: leaves [Y, B, ...].
        """
        heads = self._placement
        with heads.context():
            each, placed = _each_head(function, heads.cut, heads.own, heads.whole), heads.features(features)
            return heads.joined([each(*head, placed, jnp.uint32(at)) for at, head in enumerate(self._turns)])

    def head(self, layer: int, rate: int) -> Head:
        """The parameters and state of one head, by its places along the two axes."""
        at, row = self._placement.place(layer)
        return jax.tree.map(lambda leaf: leaf[row, rate], self._turns[at])


def fit(
    init: Callable[[jax.Array], Head],
    loss: Callable[[Tree, Tree, Tree, Tree, jax.Array], tuple[Array, Tree]],
    batches: Iterable[tuple[Tree, Tree]],
    *,
    layers: int,
    rates: Sequence[float],
    transform: optax.GradientTransformation,
    mesh: Mesh | None = None,
    seed: int = 0,
    large: bool = False,
    watch: Callable[[int, Fitted], None] | None = None,
) -> Fitted:
    """Trains one head for each layer and rate, on batches that all of them share.

    Args:
      init: key → parameters and state of one head; called once, so every head starts alike. What is compiled is kept
        for the next call with the same `init`, `loss`, `transform` and numbers.
      loss: (parameters, state, features, targets, key) of one head → the loss [] and the new state.
      batches: (features, targets), host or device arrays: features are a tree of leaves [Y, B, ...], an entry a layer,
        targets one of leaves [B, ...]. Drawn one at a time, one ahead of the devices, and never kept. They may be of
        different sizes, each of which is compiled once.
      layers: Y.
      rates: R learning rates.
      transform: gives the update at rate 1, its sign and schedule included, as `optax.chain(optax.scale_by_adam(),
        optax.scale_by_learning_rate(schedule))` with a schedule that peaks at 1 does; each head's rate multiplies it.
      mesh: its devices share the heads; None computes where the features are.
      seed: of `init` and of `loss`'s keys, which differ from step to step and are the same for all heads.
      large: whether a device updates the heads of one layer after the other; by default all in one program.
      watch: called after each update with its number, from 1, and the heads as they are, without losses; the next
        update takes their arrays.

    Raises:
      ValueError: for no layer, no rate or one that is not positive, no batch, or features without Y entries.
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1.")
    if not len(rates) or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise ValueError(f"rates={tuple(rates)} must be one or more positive numbers, like (0.01, 0.1).")
    heads = _Placement(mesh, layers, len(rates), large)
    begin, update = _programs(init, loss, transform, heads.cut, tuple(rates), heads.own, heads.whole)
    key = jax.random.key(seed)
    with heads.context():
        turns = [begin(key) for _ in range(heads.cut.turns)]
    losses: list[Any] = []
    for step, (features, targets) in enumerate(batches):
        with heads.context():
            placed, values = (heads.features(features), heads.targets(targets)), []
            for at, carry in enumerate(turns):
                turns[at], value = update(carry, *placed, key, jnp.uint32(step), jnp.uint32(at))
                values.append(value)
        losses.append(values)
        if step:  # waits for the update before, so that not more than two batches of features are held
            losses[step - 1] = heads.joined([np.asarray(value, np.float32) for value in losses[step - 1]])
        if watch is not None:
            watch(
                step + 1, Fitted([carry[:2] for carry in turns], np.empty((0, layers, len(rates)), np.float32), heads)
            )
    if not losses:
        raise ValueError("there is nothing to fit on: `batches` gave none.")
    losses[-1] = heads.joined([np.asarray(value, np.float32) for value in losses[-1]])
    return Fitted([carry[:2] for carry in turns], np.stack(losses), heads)


class _Cut(NamedTuple):
    """How Y layers are gone through: each of `ways` devices has Y / ways of them, which it takes in so many `turns`."""

    layers: int
    ways: int
    turns: int

    def of(self, features: Tree, at: Array) -> Tree:
        """Of leaves [Y / ways, ...], all that a device has, those of one turn."""

        def one(leaf: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(leaf.reshape(self.turns, -1, *leaf.shape[1:]), at, keepdims=False)

        return jax.tree.map(one, features)


def _at_home(function: Callable[..., Tree], own: NamedSharding | None, *along: str | None) -> Callable[..., Tree]:
    """`function` of the heads that a device has, on every device.

    Said, and not left to the compiler, which gathers the kernels of a convolution that many heads do at once.

    Args:
      along: of each argument, whether its leaves begin with "heads" [Y, R], with "layers", with "rates", or are whole.
    """
    if own is None:
        return function
    layers, rates = own.spec
    parts = {"heads": own.spec, "layers": PartitionSpec(layers), "rates": PartitionSpec(rates), None: PartitionSpec()}
    wanted: Any = tuple(parts[name] for name in along)
    names: Any = {layers, rates}  # what devices are left share the examples, which is the compiler's business
    return jax.shard_map(
        function, mesh=own.mesh, in_specs=wanted, out_specs=own.spec, axis_names=names, check_vma=False
    )


@functools.lru_cache(maxsize=16)
def _programs(
    init: Callable[..., Head],
    loss: Callable[..., Any],
    transform: optax.GradientTransformation,
    cut: _Cut,
    rates: tuple[float, ...],
    own: NamedSharding | None,
    whole: NamedSharding | None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How a turn's heads begin, and their update; kept, for an evaluator that is called again would compile again."""

    @functools.partial(jax.jit, out_shardings=own)
    def begin(key: jax.Array) -> tuple[Tree, Tree, Tree]:
        params, state = init(key)
        stack = functools.partial(_stacked, shape=(cut.layers // cut.turns, len(rates)))
        return jax.tree.map(stack, (params, state, transform.init(params)))

    def one(carry: tuple[Tree, Tree, Tree], rate: Array, features: Tree, targets: Tree, key: jax.Array) -> Any:
        params, state, moments = carry
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, state, features, targets, key)
        updates, moments = transform.update(gradients, moments, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates))
        return (params, state, moments), value

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(own, whole))
    def update(carry: Any, features: Tree, targets: Tree, key: jax.Array, step: Array, at: Array) -> Any:
        by_rate = jax.vmap(one, in_axes=(0, 0, None, None, None))
        by_layer = jax.vmap(by_rate, in_axes=(0, None, 0, None, None))

        def heads(carry: Any, peaks: Array, features: Tree, targets: Tree, key: jax.Array, at: Array) -> Any:
            return by_layer(carry, peaks, cut.of(features, at), targets, key)

        given = carry, jnp.asarray(rates, jnp.float32), features, targets, jax.random.fold_in(key, step), at
        return _at_home(heads, own, "heads", "rates", "layers", None, None, None)(*given)

    return begin, update


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW at rate 1, as `fit` takes it; kernels alone decay."""
    return optax.chain(
        optax.scale_by_adam(0.9, 0.999),
        optax.add_decayed_weights(weight_decay, _kernels),
        optax.scale_by_learning_rate(schedule),
    )


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _stacked(leaf: Any, shape: tuple[int, int]) -> Array:
    return jnp.broadcast_to(leaf, shape + jnp.shape(leaf))


@functools.lru_cache(maxsize=64)
def _each_head(
    function: Callable[[Tree, Tree, Tree], Tree],
    cut: _Cut,
    own: NamedSharding | None,
    whole: NamedSharding | None,
) -> Callable[..., Tree]:
    by_layer = jax.vmap(jax.vmap(function, in_axes=(0, 0, None)), in_axes=(0, 0, 0))

    def heads(params: Tree, state: Tree, features: Tree, at: Array) -> Tree:
        return by_layer(params, state, cut.of(features, at))

    return jax.jit(_at_home(heads, own, "heads", "heads", "layers", None), out_shardings=whole)


class _Placement:
    """Where heads, features and targets go; everything stays where it is without a mesh."""

    def __init__(self, mesh: Mesh | None, layers: int, rates: int, large: bool):
        self._mesh, ways = None, 1
        self.own = self.whole = None
        if mesh is not None:
            self._mesh, own, self._of_features, self._of_targets = sharding.heads_mesh(mesh, layers, rates)
            self.own, self.whole = NamedSharding(self._mesh, own), sharding.replicated(self._mesh)
            ways = self._mesh.shape["layers"]
        self.cut = _Cut(layers, ways, layers // ways if large else 1)

    def context(self) -> Any:
        """The mesh as the current one, whichever it is outside."""
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()

    def place(self, layer: int) -> tuple[int, int]:
        """The turn that a layer is in, and its row there."""
        way, rest = divmod(layer, self.cut.layers // self.cut.ways)
        rows = self.cut.layers // (self.cut.ways * self.cut.turns)
        return rest // rows, way * rows + rest % rows

    def joined(self, turns: Sequence[Tree]) -> Tree:
        """Leaves [Y, ...] of what all turns give."""

        def one(*leaves: Any) -> Any:
            if len(leaves) == 1:
                return leaves[0]
            parts = [leaf.reshape(self.cut.ways, -1, *leaf.shape[1:]) for leaf in leaves]
            stack = np.stack if isinstance(leaves[0], np.ndarray) else jnp.stack
            return stack(parts, 1).reshape(self.cut.layers, *leaves[0].shape[1:])

        return jax.tree.map(one, *turns)

    def features(self, tree: Tree) -> Tree:
        for leaf in jax.tree.leaves(tree):
            if leaf.ndim < 2 or leaf.shape[0] != self.cut.layers:
                raise ValueError(
                    f"features have shape {leaf.shape}; want [{self.cut.layers}, examples, ...], an entry a layer."
                )
        return self._placed(tree, examples=1)

    def targets(self, tree: Tree) -> Tree:
        return self._placed(tree, examples=0)

    def _placed(self, tree: Tree, examples: int) -> Tree:
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        mesh, partition = self._mesh, (self._of_targets, self._of_features)[examples]

        def put(leaf: Any) -> jax.Array:
            # An uneven batch, as the last of a pass may be, goes whole to all that would share it.
            own = (
                partition
                if leaf.shape[examples] % mesh.shape["examples"] == 0
                else PartitionSpec(*partition[:examples])
            )
            place = NamedSharding(mesh, own)
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, place)
            return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

        return jax.tree.map(put, tree)

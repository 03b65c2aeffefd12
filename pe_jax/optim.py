"""Optimizers: LAMB and AdamW, rates that count examples and differ by part, and what is neither decayed nor adapted.

Parameters of a Transformer are stacked over its layers ([Y, ...] below "blocks"), so every rule here goes by a
parameter's path and never by its number of axes, and LAMB takes one trust ratio per layer: `optax.lamb` would take one
for all of them (0.39 off after ten steps, measured 2026-11).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path

from pe_jax.types import Params

Path: TypeAlias = tuple[str, ...]
Schedule: TypeAlias = Callable[[Any], jax.Array]

STACKED = "blocks"  # everything below this name has the layers as its first axis
# Biases, scales and single vectors: a trust ratio or a pull to zero has no meaning for them (LAMB, arXiv:1904.00962).
PLAIN = frozenset({"bias", "scale", "gamma", "log_scale", "class_token", "mask_token", "position", "probe"})


@dataclasses.dataclass(frozen=True)
class Config:
    """The `optimizer` section of an experiment; the defaults are PE's (PE §2.4, its appendix's Table 18)."""

    name: str = "lamb"  # or "adamw"
    learning_rate: float = 2e-3  # at its peak
    final: float = 0.0  # share of the peak at the end of the run
    warmup_examples: int = 0
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # path prefix: share of the rate; 1 elsewhere
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6  # unstated in the paper; optax's and LAMB's own
    weight_decay: float = 0.05
    decay_all: bool = False  # whether biases, scales and single vectors are decayed too, as PLM's are
    grad_clip: float = 1.0  # global norm; 0 does not clip

    def __post_init__(self) -> None:
        if self.name not in ("lamb", "adamw"):
            raise ValueError(f"optimizer.name={self.name!r} is unknown; choose lamb or adamw.")
        for field in ("learning_rate", "eps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must be above 0.")
        for field in ("warmup_examples", "weight_decay", "grad_clip"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must be at least 0.")
        if not 0 <= self.final <= 1:
            raise ValueError(f"optimizer.final={self.final} must be in [0, 1]; it is a share of learning_rate.")
        for part, rate in self.rates.items():
            if not rate > 0:
                raise ValueError(f"optimizer.rates[{part!r}]={rate} must be above 0; to hold a part still, freeze it.")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must be in [0, 1).")


def path_of(keys: Sequence[Any]) -> Path:
    """The names along a tree path: ("vision", "blocks", "norm1", "bias")."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def is_stacked(path: Path) -> bool:
    return STACKED in path[:-1]


def is_plain(path: Path, ndim: int) -> bool:
    """True for what is neither decayed nor adapted: the names in `PLAIN`, and all that is one vector per layer."""
    return path[-1] in PLAIN or ndim - is_stacked(path) <= 1


def decay_mask(params: Params) -> Params:
    """A tree of bools: True where weight decay and LAMB's trust ratio apply."""
    return tree_map_with_path(lambda keys, leaf: not is_plain(path_of(keys), leaf.ndim), params)


def examples_seen(phases: Sequence[tuple[int, int]]) -> Schedule:
    """Step → examples seen before it, float32, where phase i runs phases[i] = (steps, batch size)."""

    def examples(step: Any) -> jax.Array:
        total, start = jnp.zeros((), jnp.float32), 0
        for steps, batch_size in phases:
            inside = jnp.clip(jnp.asarray(step) - start, 0, steps)
            total = total + inside.astype(jnp.float32) * batch_size  # int32 would overflow at 86 billion
            start += steps
        return total

    return examples


def batch_size_at(phases: Sequence[tuple[int, int]]) -> Schedule:
    """Step → the global batch size of that step, float32."""

    def batch(step: Any) -> jax.Array:
        size, start = jnp.asarray(phases[0][1], jnp.float32), 0
        for steps, batch_size in phases:
            size = jnp.where(jnp.asarray(step) >= start, jnp.float32(batch_size), size)
            start += steps
        return size

    return batch


def learning_rate(config: Config, phases: Sequence[tuple[int, int]]) -> Schedule:
    """Step → learning rate: a linear warm-up, then half a cosine over the whole run, in examples.

    With S examples seen before the step, b in its batch, W to warm up and T in all, the rate is
    peak · min(1, (S + b)/W) · (1 + cos(π · max(0, S - W)/(T - W)))/2, so the first step already moves. The cosine ends
    at 0, or at `final` of the peak.

    Args:
      config: the optimizer's fields.
      phases: (steps, batch size) of each phase, in order.

    Raises:
      ValueError: if the warm-up leaves nothing of the run.

    Source: PE §2.4; the form is OpenCLIP's, whose code PE trained with.
    """
    total = sum(steps * batch_size for steps, batch_size in phases)
    warmup = config.warmup_examples
    if warmup >= total:
        raise ValueError(
            f"optimizer.warmup_examples={warmup} is not below the run's {total} examples; "
            "warm up for less, or train for longer."
        )
    warmup, total = float(warmup), float(total)  # as integers they would overflow int32
    seen, batch_size = examples_seen(phases), batch_size_at(phases)

    def rate(step: Any) -> jax.Array:
        examples = seen(step)
        warm = jnp.minimum(1.0, (examples + batch_size(step)) / warmup) if warmup else 1.0
        progress = jnp.maximum(0.0, examples - warmup) / (total - warmup)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1.0)))
        return config.learning_rate * warm * (config.final + (1 - config.final) * falling)

    return rate


def scale_by_layer_trust_ratio() -> optax.GradientTransformation:
    """Scales each parameter's update to |parameter| / |update|, one ratio per layer where layers are stacked.

    Plain parameters (see `is_plain`) pass unchanged; a ratio with a zero norm is 1; nothing is clipped.

    Source: LAMB (arXiv:1904.00962), Algorithm 2 with φ the identity.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(keys: Any, update: jax.Array, param: jax.Array) -> jax.Array:
            path = path_of(keys)
            if is_plain(path, param.ndim):
                return update
            axes = tuple(range(1, param.ndim)) if is_stacked(path) else None
            weight, move = (
                jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True)) for x in (param, update)
            )
            ratio = jnp.where((weight > 0) & (move > 0), weight / jnp.where(move > 0, move, 1.0), 1.0)
            if axes is None:
                ratio = ratio.reshape(())
            return update * ratio.astype(update.dtype)

        return tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_part(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Scales each parameter's update by the number given for the longest prefix of its path; the rest stay as they are.

    `init` raises a ValueError for a prefix that is of no parameter's path.
    """

    def prefixes(path: Path) -> list[str]:
        return ["/".join(path[:i]) for i in range(len(path), 0, -1)]

    def init(params: Any) -> Any:
        known = {prefix for keys, _ in _flatten(params) for prefix in prefixes(path_of(keys))}
        if wrong := sorted(set(rates) - known):
            raise ValueError(
                f"optimizer.rates names {wrong[0]!r}, and no trained parameter lies there; the parts are "
                f"{', '.join(sorted({path_of(keys)[0] for keys, _ in _flatten(params)}))}."
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(keys: Any, update: jax.Array) -> jax.Array:
            rate = next((rates[prefix] for prefix in prefixes(path_of(keys)) if prefix in rates), 1.0)
            return update * jnp.asarray(rate, update.dtype)

        return tree_map_with_path(one, updates), state

    return optax.GradientTransformation(init, update)


def create(
    config: Config, schedule: Schedule, trainable: Callable[[str], bool] | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run, for parameters as one nested dict.

    Args:
      config: its fields.
      schedule: step → learning rate, as `learning_rate` makes it.
      trainable: "path/of/it" → whether the parameter moves; the rest has no optimizer state and stays as it is.
        Default: all.

    Returns:
      Clipping by the global norm (of what moves), bias-corrected Adam, decoupled weight decay, for LAMB the trust
      ratio, the part's share of the rate, and the rate; in that order.

    Raises:
      ValueError: by `init`, if a part of `config.rates` holds no parameter.
    """
    parts = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip else []
    parts += [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, None if config.decay_all else decay_mask),
    ]
    if config.name == "lamb":
        parts.append(scale_by_layer_trust_ratio())
    if config.rates:
        parts.append(scale_by_part(config.rates))
    tx = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    return tx if trainable is None else _only(tx, trainable)


def _only(tx: optax.GradientTransformation, trainable: Callable[[str], bool]) -> optax.GradientTransformation:
    """Runs `tx` on the trainable parameters alone; every other update is zero."""

    def labels(params: Params) -> Params:
        tree = tree_map_with_path(lambda keys, _: "train" if trainable("/".join(path_of(keys))) else "freeze", params)
        if "train" not in jax.tree.leaves(tree):
            names = ["/".join(path_of(keys)) for keys, _ in _flatten(params)]
            raise ValueError(
                f"no parameter is trainable: the stage's filter matched none of {', '.join(names[:8])}, …."
            )
        return tree

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def _flatten(params: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(params)[0]


def state_shardings(state: Any, params: Params, other: Any) -> Any:
    """The sharding of each leaf of an (abstract) optimizer state: its parameter's, or `other` for counters.

    A moment ends in its parameter's path; `optax.tree.map_params` does the same but not through `optax.partition`.

    Args:
      state: what the optimizer's `init` returns, or its shapes.
      params: the sharding of each parameter.
      other: the sharding of all that belongs to no parameter.
    """
    known = {path_of(keys): sharding for keys, sharding in _flatten(params)}

    def one(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return next((known[path[i:]] for i in range(len(path)) if path[i:] in known), other)

    return tree_map_with_path(one, state)

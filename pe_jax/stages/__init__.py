"""Stages: what one update minimises and which parameters it moves. The loop (`pe_jax.train`) never asks which it runs.

A stage returns gradients, not a loss, because a contrastive loss couples the whole batch while others average over
micro-batches, and the loop need not know which.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from pe_jax.models import zoo
from pe_jax.stages.contrastive import Contrastive
from pe_jax.stages.language import Language
from pe_jax.stages.spatial import Spatial
from pe_jax.stages.unified import Unified
from pe_jax.types import Batch, Inputs, Key, Metrics, Params

__all__ = ["Contrastive", "Language", "Spatial", "Stage", "Unified", "create"]


@runtime_checkable
class Stage(Protocol):
    """One way to train: build a model, say what moves, give gradients, keep parameters where they may be."""

    arch: zoo.Architecture

    @property
    def inputs(self) -> Inputs:
        """The kind of batches it takes, and what of its model shapes them."""
        ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model, freshly initialised; under `nnx.eval_shape` nothing is allocated."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]:
        """The parts of the model that may start from given weights, and as what each is read (`pe_jax.initial`)."""
        ...

    def start(self, params: Params, loaded: Mapping[str, tuple[Any, Params]]) -> Params:
        """Fresh parameters with loaded ones in their places: configuration and parameters of each part given.

        It is traced by jit, so that what is replaced is never computed.
        """
        ...

    def trainable(self, path: str) -> bool:
        """Whether the parameter at `path`, like "vision/blocks/mlp/up/kernel", is moved by the optimizer."""
        ...

    def gradients(self, model: nnx.Module, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        """Gradients like the model's parameters, and scalar metrics among which is `loss`."""
        ...

    def update_flops(self, batch: Mapping[str, Any]) -> int:
        """Floating point operations of an update on a batch of these shapes, by the model's arithmetic.

        Forward and backward passes of all that the recipe puts through the model; what is computed twice to save
        memory counts once. It is what MFU is reckoned with.
        """
        ...

    def project(self, params: Params) -> Params:
        """Parameters after an update, brought back to where they may be (the cap of the logit scale)."""
        ...


_STAGES: dict[str, type[Any]] = {
    "contrastive": Contrastive,
    "language": Language,
    "spatial": Spatial,
    "unified": Unified,
}


def create(config: Mapping[str, Any]) -> Stage:
    """The stage that `{"name": "contrastive", "arch": ..., ...}` asks for.

    Raises:
      ValueError: for an unknown stage or field, naming its nearest neighbour.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in _STAGES:
        raise ValueError(f"stage.name={name!r} is unknown; the stages are {', '.join(_STAGES)}.")
    known = [field.name for field in dataclasses.fields(_STAGES[name])]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1, 0.3)
            raise ValueError(f"stage {name!r} has no field {field!r}; did you mean {' or '.join(near or known)}?")
    if "arch" not in fields:
        raise ValueError(f"stage {name!r} lacks 'arch': a released name such as 'PE-Core-B16-224', or its fields.")
    fields["arch"] = zoo.architecture(fields["arch"])
    return _STAGES[name](**fields)

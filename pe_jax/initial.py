"""Weights to start a run from: each part of a stage's model from a release, a file or another run, onto the mesh.

What a stage calls its parts, and where it puts them, is the stage's own matter (`pe_jax.stages.Stage.start`).
"""

from typing import Any

from jax.sharding import Mesh

from pe_jax import api, hub, sharding
from pe_jax.convert import decoder
from pe_jax.models.decoder import DecoderConfig
from pe_jax.types import Params


def read(source: str, kind: Any, mesh: Mesh) -> tuple[Any, Params]:
    """Configuration and parameters of one part.

    Args:
      source: a released name, a weights file or folder, a run's workdir, or an hf:// or gs:// address of one.
      kind: what is read there, as a stage's `parts` say: "model" is a model of pe_jax that says itself what it is; a
        decoder's configuration is such a decoder in other people's layouts.
      mesh: over which the parameters are cut as soon as they are read.

    Raises:
      ValueError: if it is something else, or cannot be read.
      FileNotFoundError: if it is nowhere.
    """
    path = hub.resolve(source)
    if isinstance(kind, DecoderConfig):
        return decoder.read(path, kind, shardings=sharding.param_shardings(decoder.abstract(kind), mesh))
    config, params, _ = api.read(path, None, mesh)
    return config, params

"""Weights to start a run from: each part of a stage's model from a release, a file or another run, onto the mesh.

What a stage calls its parts, and where it puts them, is the stage's own matter (`pe_jax.stages.Stage.start`).
"""

import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from pe_jax import api, checkpoint, hub, sharding
from pe_jax.convert import decoder, sam2, vlm
from pe_jax.models.decoder import DecoderConfig
from pe_jax.models.sam2 import Sam2Config
from pe_jax.models.vlm import VLMConfig
from pe_jax.types import Params


def read(source: str, kind: Any, mesh: Mesh) -> tuple[Any, Params]:
    """Configuration and parameters of one part.

    Args:
      source: a released name, a weights file or folder, a run's workdir, or an hf:// or gs:// address of one.
      kind: what is read there, as a stage's `parts` say: "model" is a model of pe_jax that says itself what it is; the
        configuration of a decoder or of a segmenter is such a model in other people's layouts; that of a
        vision-language model is one in any layout.
      mesh: over which the parameters are cut as soon as they are read.

    Raises:
      ValueError: if it is something else, or cannot be read.
      FileNotFoundError: if it is nowhere.
    """
    path = hub.resolve(source)
    if isinstance(kind, DecoderConfig):
        return decoder.read(path, kind, shardings=sharding.param_shardings(decoder.abstract(kind), mesh))
    if isinstance(kind, Sam2Config):
        config, params = sam2.read(path, kind)
        return config, jax.device_put(params, sharding.param_shardings(sam2.abstract(kind), mesh))
    if isinstance(kind, VLMConfig) and not checkpoint.is_checkpoint(path):
        folder = pathlib.Path(path)
        config = vlm.read_config(folder if folder.is_dir() else folder.parent)
        return vlm.read(path, config, shardings=sharding.param_shardings(vlm.abstract(config), mesh))
    config, params, _ = api.read(path, None, mesh)
    return config, params

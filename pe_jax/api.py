"""Models by name or by path, ready to use: what `import pe_jax` offers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from pe_jax import checkpoint, hub, sharding
from pe_jax.convert import pe
from pe_jax.convert import weights as weight_files
from pe_jax.data.image import Preprocess
from pe_jax.data.text import Tokenizer
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLMConfig
from pe_jax.types import Params, split


def available() -> tuple[str, ...]:
    """The released names that `create` and `load` know."""
    return zoo.NAMES


def create(
    name_or_config: str | Mapping[str, Any] | zoo.Architecture,
    seed: int = 0,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> zoo.Model:
    """A freshly initialised model (initialised as the release's module is), not trained.

    Args:
      name_or_config: a released name, a configuration, or a mapping as `zoo.architecture` takes.
      seed: of the initialisation; the same on every mesh.
      dtype: of the activations, "float32" or "bfloat16"; None keeps the configuration's. Parameters are float32.
      mesh: where the parameters go (`pe_jax.make_mesh`); None puts them on the default device.

    Returns:
      A `CLIP`, a `VLM` where there is a decoder, or a `VisionTower` for the vision-only names; with `preprocess` and,
      for a CLIP, `tokenize`.
    """
    config = _with_dtype(zoo.architecture(name_or_config), dtype)

    def init() -> Params:
        return split(zoo.build(config, nnx.Rngs(seed)))[1]

    shardings = None if mesh is None else sharding.param_shardings(zoo.abstract(config), mesh)
    return _assemble(config, jax.jit(init, out_shardings=shardings)(), None)


def load(
    name_or_path: str,
    weights: str | None = None,
    offline: bool = False,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> zoo.Model:
    """A model with its weights, from a released name, a run, or any weights file.

    Args:
      name_or_path: a released name ("PE-Core-L14-336", fetched unless `weights` is given), or what `weights` may be.
      weights: a `.pt`, `.safetensors` or Orbax directory, or an `hf://` or `gs://` address of one. With it,
        `name_or_path` is the released name that says the architecture; without it, the path says that itself.
      offline: use only what is on this machine and open no connection.
      dtype: of the activations, "float32" or "bfloat16"; None keeps the configuration's. Parameters are float32.
      mesh: where the parameters go, cut by the rules of `pe_jax.sharding`; None puts them on the default device.

    Returns:
      A `CLIP`, a `VLM` of a run of ours, or a `VisionTower` for vision-only weights; with `preprocess` and, for a
      CLIP, `tokenize`. To talk to a VLM, or to read one from other people's files, see `pe_jax.assistant`.

    Raises:
      ValueError: if the weights do not fit the architecture, naming every key that differs and its neighbours.
      FileNotFoundError: if they are nowhere; says which file to fetch and where to put it.
    """
    known = name_or_path in zoo.NAMES
    if weights is not None and not known:
        zoo.architecture(name_or_path)  # raises, naming the released names it is close to
    config = zoo.architecture(name_or_path) if known else None
    config, params, metadata = read(hub.resolve(weights or name_or_path, offline=offline), config, mesh)
    preprocess = Preprocess.from_dict(metadata["preprocess"]) if "preprocess" in metadata else None
    return _assemble(_with_dtype(config, dtype), params, preprocess)


def read(
    path: str, config: zoo.Architecture | None, mesh: Mesh | None
) -> tuple[zoo.Architecture, Params, dict[str, Any]]:
    """Architecture, parameters and metadata of the weights at `path`, which a given `config` must fit."""
    if checkpoint.is_checkpoint(path):
        metadata = checkpoint.metadata(path)
        config = config or zoo.architecture(metadata["architecture"])
        abstract = zoo.abstract(config)
        shardings = None if mesh is None else sharding.param_shardings(abstract, mesh)
        params, metadata = checkpoint.load_weights(path, mesh, shardings, expected=split(abstract)[1])
        return config, params, metadata
    tensors, metadata = weight_files.read(path), weight_files.read_metadata(path)
    if config is None:
        config = zoo.architecture(metadata["architecture"]) if "architecture" in metadata else pe.identify(tensors)[1]
    _, config = pe.recognise(tensors, config)  # a Core name with the file of its vision tower alone is that tower
    params = pe.to_params(tensors, config)
    if mesh is None:
        return config, jax.tree.map(jax.numpy.asarray, params), metadata
    return config, jax.device_put(params, sharding.param_shardings(zoo.abstract(config), mesh)), metadata


def _assemble(config: zoo.Architecture, params: Params, preprocess: Preprocess | None) -> zoo.Model:
    """The module around the parameters, with what turns files and strings into its inputs."""
    graphdef, _ = split(zoo.abstract(config))
    model = nnx.merge(graphdef, params)
    vision = config if isinstance(config, VisionConfig) else config.vision
    model.preprocess = preprocess or Preprocess(size=vision.image_size)
    if isinstance(config, CLIPConfig):
        model.tokenize = Tokenizer(config.text.context_length)
    return model


def _with_dtype(config: zoo.Architecture, dtype: str | None) -> zoo.Architecture:
    if dtype is None:
        return config
    if isinstance(config, VisionConfig):
        return dataclasses.replace(config, dtype=dtype)
    vision = dataclasses.replace(config.vision, dtype=dtype)
    if isinstance(config, VLMConfig):
        return dataclasses.replace(config, vision=vision, decoder=dataclasses.replace(config.decoder, dtype=dtype))
    return CLIPConfig(vision, dataclasses.replace(config.text, dtype=dtype))

"""A model as a file that runs without its code: StableHLO by `jax.export`, and beside it what its user must know.

  vision.stablehlo                the function, weights inside; `jax.export.deserialize` alone can read it
  vision.stablehlo.json           its input and outputs, preprocessing, layers, versions, and the digest of the file
  vision.stablehlo.safetensors    the weights, where they were asked to lie beside

`load` needs none of `pe_jax.models`. JAX reads files of the last six months' versions; attention is the portable one on
every platform, so a file runs where it was not made, and slower there than the model's own fused kernels.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import export as jax_export

from pe_jax import paths
from pe_jax.data.image import Preprocess

VERSION = 1  # of the JSON; raised when a reader of today could not read it
WHAT = ("image", "text", "features")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Offsets in the file are 31 bits wide; some room is left for the program itself.
LIMIT = (1 << 31) - (64 << 20)


def save(
    model: Any,
    path: str | os.PathLike[str],
    what: str = "image",
    *,
    layers: Sequence[int] | None = None,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    floats: bool = False,
    image_size: int | None = None,
    beside: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes one of a model's functions to `path` and its metadata to `path`.json.

    Args:
      model: a CLIP or vision tower; its weights may lie on any mesh of this process.
      path: local or gs://; both files appear whole, an older pair is replaced.
      what: "image", images → embeddings [B, E] as `encode_image` gives them; "text", token ids [B, L] int32 →
        embeddings [B, E]; "features", images → {"layer_08": tokens [B, N, D], ...}, and the blocks after the last
        layer asked for are left out of the file.
      layers: of "features", as `VisionTower.features` takes them.
      batch: images or texts of a call; None takes any number.
      platforms: where the file shall run; this machine need not have them.
      floats: images are float32 as `model.preprocess` gives them, rather than uint8 that the file normalises itself.
      image_size: pixels of a side; None takes the model's own.
      beside: weights in a safetensors file of their own, and the function takes them as its first argument.
      name: what the metadata call the model.

    Returns:
      The metadata.

    Raises:
      ValueError: for a wrong argument, or weights that are too large to lie inside.
      ModuleNotFoundError: without flatbuffers, which JAX writes such files with.
    """
    _require_flatbuffers()
    path = paths.path(path)
    paths.reach(path)
    _check(what, layers, batch, platforms, floats, image_size)
    if beside and paths.is_bucket(path):
        raise ValueError(f"{path}: weights beside are written on this machine; give a path here, and copy the files.")
    function, params, described = _function(model, what, layers, floats, image_size)
    size = sum(leaf.nbytes for leaf in params.values())
    if not beside and size > LIMIT:
        raise ValueError(
            f"the weights are {size / 1e9:.1f} GB and such a file holds {LIMIT / 1e9:.1f} GB; put them beside it "
            "(--weights-beside), or export features of an earlier layer."
        )
    rows = batch or jax_export.symbolic_shape("b")[0]
    given = jax.ShapeDtypeStruct((rows, *described["input"]["shape"][1:]), described["input"]["dtype"])
    for array in (described["input"], *described["outputs"].values()):
        array["shape"][0] = batch
    arguments = ({key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in params.items()},) if beside else ()
    whole = function if beside else lambda given: function(params, given)
    exported = jax_export.export(jax.jit(whole), platforms=tuple(platforms))(*arguments, given)
    data = bytes(exported.serialize())
    if beside:
        from pe_jax.convert import weights

        weights.write(_weights(path), params, {"fingerprint": described["weights_fingerprint"]})
    metadata = {
        "version": VERSION,
        "model": name,
        "what": what,
        **described,
        "batch": batch,
        "platforms": list(exported.platforms),
        "weights": "beside" if beside else "inside",
        "weights_bytes": size,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "calling_convention_version": exported.calling_convention_version,
        "serialization_version": _serialization_version(data),
        "stablehlo_version": _stablehlo_version(exported),
        "versions": {package: importlib.metadata.version(package) for package in ("pe-jax", "jax", "jaxlib")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, data)
    _write(_beside(path), (json.dumps(metadata, indent=2) + "\n").encode())
    return metadata


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An exported function: call it with a batch of uint8 (or float32) images, or of token ids.

    Attributes:
      metadata: what `save` returned.
      exported: JAX's own object, for those who need more than a call.
    """

    metadata: dict[str, Any]
    exported: jax_export.Exported
    _call: Callable[[Any], Any]

    @property
    def preprocess(self) -> Preprocess | None:
        """Files to images: `preprocess.pixels(file)` gives uint8, `preprocess([file])` floats. None for text."""
        fields = self.metadata["preprocess"]
        return None if fields is None else Preprocess.from_dict(fields)

    @property
    def tokenize(self) -> Any:
        """Texts to token ids; None for images."""
        from pe_jax.data.text import Tokenizer

        length = self.metadata["context_length"]
        return None if length is None else Tokenizer(length)

    def __call__(self, given: Any) -> Any:
        """Embeddings [B, E], or {layer: tokens [B, N, D]}.

        Raises:
          ValueError: for an input of another shape or type, or a platform that the file is not for.
        """
        want = self.metadata["input"]
        shape, dtype = tuple(np.shape(given)), getattr(given, "dtype", None)
        fits = len(shape) == len(want["shape"]) and all(
            w in (None, n) for w, n in zip(want["shape"], shape, strict=True)
        )
        if not fits or str(dtype) != want["dtype"] or not shape[0]:
            wanted = ["any" if n is None else n for n in want["shape"]]
            raise ValueError(f"the input is {dtype} {list(shape)}; want {want['dtype']} {wanted}.")
        if not runs_here(self.metadata):
            raise ValueError(
                f"this file is for {', '.join(self.metadata['platforms'])} and this machine computes on "
                f"{jax.default_backend()}; export it again with that platform."
            )
        return self._call(given)


def load(path: str | os.PathLike[str]) -> Loaded:
    """The function in a file that `save` wrote, local or gs://; loads no model code.

    Raises:
      FileNotFoundError: if the file, its JSON or its weights are missing.
      ValueError: if they do not belong together, are damaged, or are of a version this machine's JAX cannot read.
    """
    _require_flatbuffers()
    path = paths.path(path)
    paths.reach(path)
    for file in (path, _beside(path)):
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; an export is NAME and NAME.json, copy both.")
    metadata, data = _metadata(_beside(path)), path.read_bytes()
    if (len(data), hashlib.sha256(data).hexdigest()) != (metadata["bytes"], metadata["sha256"]):
        raise ValueError(
            f"{path} has {len(data):,} bytes and is not the file that {_beside(path).name} describes "
            f"({metadata['bytes']:,} bytes): it is damaged, or of another export. Copy both again."
        )
    least, most = (
        jax_export.minimum_supported_calling_convention_version,
        jax_export.maximum_supported_calling_convention_version,
    )
    if not least <= metadata["calling_convention_version"] <= most:
        raise ValueError(
            f"{path} has calling convention {metadata['calling_convention_version']}, and jax {jax.__version__} reads "
            f"{least} to {most}; it was written by jax {metadata['versions']['jax']}: install that, or export it again."
        )
    try:
        exported = jax_export.deserialize(bytearray(data))
    except Exception as error:  # of many kinds, from flatbuffers and MLIR
        raise ValueError(
            f"{path} cannot be read by jax {jax.__version__} ({' '.join(str(error).split())[:200]}); it was written by "
            f"jax {metadata['versions']['jax']}: install that, or export it again."
        ) from error
    call: Callable[..., Any] = jax.jit(exported.call)
    if metadata["weights"] == "inside":
        return Loaded(metadata, exported, call)
    from pe_jax.convert import weights

    if weights.read_metadata(_weights(path)).get("fingerprint") != metadata["weights_fingerprint"]:
        raise ValueError(
            f"{_weights(path)} holds the weights of another export than {path}; copy all three files again."
        )
    params = {key: jax.numpy.asarray(leaf) for key, leaf in weights.read(_weights(path)).items()}
    return Loaded(metadata, exported, lambda given: call(params, given))


def runs_here(metadata: Mapping[str, Any]) -> bool:
    """Whether the file that `metadata` describe is for the platform that JAX computes on here."""
    names = {"gpu": {"cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
    return bool(names & set(metadata["platforms"]))


def _function(
    model: Any, what: str, layers: Sequence[int] | None, floats: bool, image_size: int | None
) -> tuple[Callable[[dict[str, Any], Any], Any], dict[str, np.ndarray], dict[str, Any]]:
    """The function of flat weights and input, the weights on the host, and what the metadata say of them."""
    from flax import nnx

    from pe_jax.evals import features, inference
    from pe_jax.models.clip import CLIP, unit
    from pe_jax.models.layers import resolve_layers
    from pe_jax.types import split

    tower = inference.require_text(model, "exporting text").text if what == "text" else inference.vision_tower(model)
    described: dict[str, Any] = {"preprocess": None, "context_length": None, "layers": None}
    resolved: tuple[int, ...] = ()
    if what == "image" and tower.config.pool == "none":
        raise ValueError('this model gives tokens and no embedding (PE-Lang, PE-Spatial); export what="features".')
    if what == "features":
        resolved = tuple(
            sorted(set(resolve_layers(tuple(layers if layers is not None else (-1,)), tower.config.depth)))
        )
        tower = tower.truncate(max(1, *resolved))  # without the head and the blocks that are not needed
        described["layers"] = list(resolved)
    config = dataclasses.replace(tower.config, attention="xla", remat="none")
    kind: Any = type(tower)
    graphdef, _ = split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    flat = jax.tree_util.tree_flatten_with_path(split(tower)[1])[0]
    params = {"/".join(str(key.key) for key in keys): np.asarray(leaf) for keys, leaf in flat}
    preprocess = None if what == "text" else inference.preprocess_of(model, image_size)
    both = isinstance(model, CLIP)

    def function(params: dict[str, Any], given: Any) -> Any:
        tower = nnx.merge(graphdef, _nested(params))
        if preprocess is not None and not floats:
            given = inference.normalized(given, preprocess)
        if what == "features":
            return {features.layer_name(k): x for k, x in tower.features(given, layers=resolved).items()}
        return unit(tower(given)) if both else tower(given)

    if preprocess is None:
        described["context_length"] = config.context_length
        shape, dtype = (1, config.context_length), "int32"
    else:
        described["preprocess"] = preprocess.to_dict()
        shape, dtype = (1, *preprocess.shape, 3), "float32" if floats else "uint8"
    found = jax.eval_shape(function, params, jax.ShapeDtypeStruct(shape, np.dtype(dtype)))
    outputs = found if isinstance(found, dict) else {"embedding": found}
    described |= {
        "input": {"shape": list(shape), "dtype": dtype},
        "outputs": {key: {"shape": list(x.shape), "dtype": str(x.dtype)} for key, x in outputs.items()},
        "computed_in": config.dtype,
        "weights_fingerprint": inference.fingerprint(model),
    }
    return function, params, described


def own(model: Any, metadata: Mapping[str, Any], given: Any) -> Any:
    """What the model itself, with the kernels of this machine, makes of an input of the file so described."""
    from pe_jax.evals import features, inference
    from pe_jax.models.clip import CLIP

    if metadata["what"] == "text":
        return model.encode_text(given)
    if metadata["input"]["dtype"] == "uint8":
        given = inference.normalized(jax.numpy.asarray(given), Preprocess.from_dict(metadata["preprocess"]))
    if metadata["what"] == "image":
        return model.encode_image(given) if isinstance(model, CLIP) else model(given)
    found = inference.vision_tower(model).features(given, layers=tuple(metadata["layers"]))
    return {features.layer_name(layer): tokens for layer, tokens in found.items()}


def _check(
    what: str,
    layers: Sequence[int] | None,
    batch: int | None,
    platforms: Sequence[str],
    floats: bool,
    image_size: int | None,
) -> None:
    """Refuses what needs no model to be seen wrong."""
    if what not in WHAT:
        raise ValueError(f"what={what!r} is unknown; choose one of {', '.join(WHAT)}.")
    if layers is not None and what != "features":
        raise ValueError(f'layers are of what="features", not of {what!r}; leave them out.')
    if what == "text" and (floats or image_size is not None):
        raise ValueError("text has neither an image size nor floats as input; leave them out.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch} must be at least 1, or left out for any.")
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms={list(platforms)} must be some of {', '.join(PLATFORMS)}.")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = leaf
    return tree


def _beside(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".json")


def _weights(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".safetensors")


def _metadata(file: epath.Path) -> dict[str, Any]:
    try:
        metadata = json.loads(file.read_text())
        version = metadata["version"]
        if version <= VERSION:
            for field in ("what", "input", "platforms", "sha256", "bytes", "weights", "calling_convention_version"):
                metadata[field]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the JSON of an export ({error!r}); copy it again.") from error
    if version > VERSION:
        raise ValueError(f"{file} has version {version}, this pe_jax reads up to {VERSION}; install a newer pe_jax.")
    return metadata


def _write(path: epath.Path, data: bytes) -> None:
    if paths.is_bucket(path):
        path.write_bytes(data)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError("JAX's exported files need flatbuffers: pip install 'pe-jax[export]'.")


def _serialization_version(data: bytes) -> int:
    """Of the layout of JAX's file: the first field of its flatbuffer."""
    import flatbuffers
    from flatbuffers import encode, number_types

    table = flatbuffers.table.Table(data, encode.Get(flatbuffers.packer.uoffset, data, 0))
    return int(table.Get(number_types.Uint16Flags, table.Offset(4) + table.Pos))


def _stablehlo_version(exported: jax_export.Exported) -> str | None:
    found = re.search(rb"StableHLO_v([\d.]+)", exported.mlir_module_serialized[:100])
    return found and found[1].decode()

"""Weights of SAM 2.1's image model, both ways: Meta's `.pt` and Hugging Face's safetensors.

One table says what each parameter is called in the two layouts and how its axes lie there. Released files hold a video
model: its memory (attention to earlier frames, their encoder, pointers to objects) has no part in images and is left
out, by name and by nothing but name: `memory` lists it, and any other tensor that is not ours is an error.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from pe_jax.convert import slots, weights
from pe_jax.convert.pe import Form, Report
from pe_jax.models import zoo
from pe_jax.models.sam2 import MASKS, Sam2, Sam2Config
from pe_jax.types import Params, split

LAYOUTS = ("hf", "meta")

# What a video model holds beyond the image model, in either layout.
_MEMORY = re.compile(
    r"(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj|object_pointer_proj"
    r"|temporal_positional_encoding_projection_layer)\..+"
    r"|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
    r"|memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer"
    r"|occlusion_spatial_embedding_parameter"
)

# -------------------------------------------------------------------------------------------------------------- table

_AS_IT_IS = {n: Form(tuple(range(n)), (1,) * n) for n in (1, 2)}
_VECTOR = _AS_IT_IS[1]
_ROW = Form((0,), (0, 1))  # a vector as the one row of an embedding
_LINEAR = Form((1, 0), (1, 1))  # ours [in, out], PyTorch's (out, in)
_HEADS = ("heads", 3, -1)  # ours lie head by head, its q, k and v; stored are q of all heads, then k, then v
_QKV, _QKV_BIAS = Form((2, 1, 3, 0), (3, 1), within=_HEADS), Form((1, 0, 2), (3,), within=_HEADS)
_CONV = Form((3, 2, 0, 1), (1, 1, 1, 1))  # [7, 7, 3, D] as (D, 3, 7, 7)
_POINTWISE = Form((1, 0), (1, 1, 0, 0))  # [in, out] as (out, in, 1, 1)
_TABLE = Form((2, 0, 1), (0, 1, 1, 1))  # [Y, X, D] as (1, D, Y, X)
_ENLARGE = Form((0, 3, 1, 2), (1, 1, 1, 1), within=(2, 2, -1))  # [in, 2·2·out] as (in, out, 2, 2)


class _Slot(NamedTuple):
    """A parameter, or one slice of a stacked one, its tensors in both layouts and how its axes lie in them."""

    path: str
    index: int | None
    meta: tuple[str, ...]
    hf: tuple[str, ...]
    form: Form


def _pairs(path: str, meta: str, hf: str, form: Form = _LINEAR, index: int | None = None) -> Iterator[_Slot]:
    """A linear map (or convolution): kernel and bias."""
    for ours, theirs, how in (("kernel", "weight", form), ("bias", "bias", _QKV_BIAS if form is _QKV else _VECTOR)):
        yield _Slot(f"{path}.{ours}", index, (f"{meta}.{theirs}",), (f"{hf}.{theirs}",), how)


def _norm(path: str, meta: str, hf: str, index: int | None = None) -> Iterator[_Slot]:
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        yield _Slot(f"{path}.{ours}", index, (f"{meta}.{theirs}",), (f"{hf}.{theirs}",), _VECTOR)


def _mlp(path: str, meta: str, hf: str, depth: int, index: int | None = None) -> Iterator[_Slot]:
    theirs = ["proj_in", *(f"layers.{i}" for i in range(depth - 2)), "proj_out"]
    for i, name in enumerate(theirs):
        yield from _pairs(f"{path}.layer{i + 1}", f"{meta}.layers.{i}", f"{hf}.{name}", index=index)


def _attention(path: str, meta: str, hf: str) -> Iterator[_Slot]:
    for name in "qkv":
        yield from _pairs(f"{path}.{name}", f"{meta}.{name}_proj", f"{hf}.{name}_proj")
    yield from _pairs(f"{path}.out", f"{meta}.out_proj", f"{hf}.o_proj")


def _encoder(config: Sam2Config) -> Iterator[_Slot]:
    trunk, backbone, number = "image_encoder.trunk", "vision_encoder.backbone", 0
    patch, projection = f"{trunk}.patch_embed.proj", f"{backbone}.patch_embed.projection"
    yield _Slot("encoder.patch", None, (f"{patch}.weight",), (f"{projection}.weight",), _CONV)
    yield _Slot("encoder.patch_bias", None, (f"{patch}.bias",), (f"{projection}.bias",), _VECTOR)
    for ours, theirs in (("position", "pos_embed"), ("window_position", "pos_embed_window")):
        yield _Slot(f"encoder.{ours}", None, (f"{trunk}.{theirs}",), (f"{backbone}.{theirs}",), _TABLE)
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            enters = stage > 0 and i == 0
            ours = f"encoder.stage{stage + 1}.{'enter' if enters else 'blocks'}"
            index = None if enters else i - (stage > 0)
            meta, hf = f"{trunk}.blocks.{number}", f"{backbone}.blocks.{number}"
            yield from _norm(f"{ours}.norm1", f"{meta}.norm1", f"{hf}.layer_norm1", index)
            yield from _pairs(f"{ours}.qkv", f"{meta}.attn.qkv", f"{hf}.attn.qkv", _QKV, index)
            yield from _pairs(f"{ours}.out", f"{meta}.attn.proj", f"{hf}.attn.proj", index=index)
            if enters:
                yield from _pairs(f"{ours}.widen", f"{meta}.proj", f"{hf}.proj")
            yield from _norm(f"{ours}.norm2", f"{meta}.norm2", f"{hf}.layer_norm2", index)
            yield from _mlp(f"{ours}.mlp", f"{meta}.mlp", f"{hf}.mlp", 2, index)
            number += 1
        neck, place = f"encoder.lateral{stage + 1}", 3 - stage  # theirs begin with the coarsest
        yield from _pairs(
            neck, f"image_encoder.neck.convs.{place}.conv", f"vision_encoder.neck.convs.{place}", _POINTWISE
        )


def _prompts() -> Iterator[_Slot]:
    meta, hf = "sam_prompt_encoder", "prompt_encoder"
    frequencies = ("shared_image_embedding.positional_embedding", f"{hf}.shared_embedding.positional_embedding")
    matrix = f"{meta}.pe_layer.positional_encoding_gaussian_matrix"
    yield _Slot("prompts.frequencies", None, (matrix,), frequencies, _AS_IT_IS[2])
    kinds = tuple(f"{meta}.point_embeddings.{kind}.weight" for kind in range(4))
    yield _Slot("prompts.labels", None, kinds, (f"{hf}.point_embed.weight",), _AS_IT_IS[2])
    for ours, theirs in (("no_point", "not_a_point_embed"), ("no_mask", "no_mask_embed")):
        yield _Slot(f"prompts.{ours}", None, (f"{meta}.{theirs}.weight",), (f"{hf}.{theirs}.weight",), _ROW)
    for i, (place, form) in enumerate(((0, _CONV), (3, _CONV), (6, _POINTWISE)), 1):
        yield from _pairs(f"prompts.mask{i}", f"{meta}.mask_downscaling.{place}", f"{hf}.mask_embed.conv{i}", form)
    for i, place in enumerate((1, 4), 1):
        yield from _norm(f"prompts.mask_norm{i}", f"{meta}.mask_downscaling.{place}", f"{hf}.mask_embed.layer_norm{i}")


def _decoder() -> Iterator[_Slot]:
    meta, hf = "sam_mask_decoder", "mask_decoder"
    for ours, theirs, form in (
        ("object_token", "obj_score_token", _ROW),
        ("iou_token", "iou_token", _ROW),
        ("mask_tokens", "mask_tokens", _AS_IT_IS[2]),
    ):
        yield _Slot(f"decoder.{ours}", None, (f"{meta}.{theirs}.weight",), (f"{hf}.{theirs}.weight",), form)
    for i in range(2):
        ours, there, here = f"decoder.block{i + 1}", f"{meta}.transformer.layers.{i}", f"{hf}.transformer.layers.{i}"
        for mine, theirs in (
            ("among", "self_attn"),
            ("to_image", "cross_attn_token_to_image"),
            ("from_image", "cross_attn_image_to_token"),
        ):
            yield from _attention(f"{ours}.{mine}", f"{there}.{theirs}", f"{here}.{theirs}")
        for n in range(1, 5):
            yield from _norm(f"{ours}.norm{n}", f"{there}.norm{n}", f"{here}.layer_norm{n}")
        yield from _mlp(f"{ours}.mlp", f"{there}.mlp", f"{here}.mlp", 2)
    last = "transformer.final_attn_token_to_image"
    yield from _attention("decoder.to_image", f"{meta}.{last}", f"{hf}.{last}")
    yield from _norm("decoder.norm", f"{meta}.transformer.norm_final_attn", f"{hf}.transformer.layer_norm_final_attn")
    for i, place in ((1, 0), (2, 3)):
        there, here = f"{meta}.output_upscaling.{place}", f"{hf}.upscale_conv{i}"
        yield _Slot(f"decoder.enlarge{i}.map.kernel", None, (f"{there}.weight",), (f"{here}.weight",), _ENLARGE)
        yield _Slot(f"decoder.enlarge{i}.bias", None, (f"{there}.bias",), (f"{here}.bias",), _VECTOR)
    yield from _norm("decoder.enlarge_norm", f"{meta}.output_upscaling.1", f"{hf}.upscale_layer_norm")
    yield from _pairs("decoder.middle", f"{meta}.conv_s1", f"{hf}.conv_s1", _POINTWISE)
    yield from _pairs("decoder.fine", f"{meta}.conv_s0", f"{hf}.conv_s0", _POINTWISE)
    for i in range(MASKS):
        name = f"output_hypernetworks_mlps.{i}"
        yield from _mlp("decoder.weigh", f"{meta}.{name}", f"{hf}.{name}", 3, index=i)
    for ours, theirs in (("iou", "iou_prediction_head"), ("object", "pred_obj_score_head")):
        yield from _mlp(f"decoder.{ours}", f"{meta}.{theirs}", f"{hf}.{theirs}", 3)


class _Place(NamedTuple):
    """A slot in one layout, with the shape of our slice of it."""

    path: str
    index: int | None
    shape: tuple[int, ...]
    names: tuple[str, ...]
    copies: bool  # every name holds the same tensor
    form: Form

    @property
    def stored(self) -> list[tuple[int, ...]]:
        return [tensor.shape for tensor in self.store(np.broadcast_to(np.zeros((), np.int8), self.shape))]

    def store(self, param: np.ndarray) -> list[np.ndarray]:
        parts = self.form.store(param)
        return parts * len(self.names) if self.copies else parts


def _places(config: Sam2Config, layout: str) -> list[_Place]:
    """Every parameter of the architecture with its tensors, in the order of the network."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}.")
    found = [
        *_encoder(config),
        _Slot("no_memory", None, ("no_mem_embed",), ("no_memory_embedding",), Form((0,), (0, 0, 1))),
    ]
    found += [*_prompts(), *_decoder()]
    leaves, places = _leaves(config), []
    for slot in found:
        shape, names = leaves[slot.path].shape, getattr(slot, layout)
        shape, form = shape if slot.index is None else shape[1:], slot.form
        if form.within and "heads" in form.within:
            stage = int(slot.path.split(".")[1].removeprefix("stage"))
            form = form.of(config.heads * 2 ** (stage - 1))
        copies = slot.path == "prompts.frequencies" and layout == "hf"
        if slot.path == "prompts.labels" and layout == "meta":
            form = Form((0, 1), (1, 1), shares=(1,) * len(names))
        places.append(_Place(slot.path, slot.index, tuple(shape), names, copies, form))
    assert {place.path for place in places} == leaves.keys(), leaves.keys() ^ {place.path for place in places}
    return places


def abstract(config: Sam2Config) -> Sam2:
    """The model with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: Sam2(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=16)
def _leaves(config: Sam2Config) -> dict[str, Any]:
    """Every parameter's name and shape."""
    return dict(_flat(split(abstract(config))[1]))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _flat(branch, f"{path}{name}.")
        else:
            yield f"{path}{name}", branch


# ------------------------------------------------------------------------------------------------------------ reading


def read(
    path: str | os.PathLike, config: Sam2Config | None = None, *, dtype: Any = np.float32
) -> tuple[Sam2Config, Params]:
    """A model's configuration and its parameters, on the host.

    Args:
      path: Meta's `.pt`; or a safetensors file, or a folder with it and its `config.json`, of Hugging Face's Sam2Model
        or Sam2VideoModel.
      config: the architecture; None takes it from the `config.json` beside the weights, or else is the released one
        (`zoo.SAM2`) that these shapes fit.
      dtype: of the parameters; None keeps that of the file.

    Raises:
      ValueError: if no architecture is known; or as `to_params`.
    """
    path = pathlib.Path(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    tensors = weights.read(path)
    if config is None:
        known = beside.exists() and _layout(tensors) == "hf"
        config = from_hf_config(json.loads(beside.read_text())) if known else identify(tensors)
    return config, to_params(tensors, config, dtype=dtype)


def memory(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that only follow objects through videos, and which `to_params` leaves out."""
    return [name for name in tensors if _MEMORY.fullmatch(name)]


def identify(tensors: Mapping[str, Any]) -> Sam2Config:
    """The released architecture of the width and depth that these tensors have.

    Raises:
      ValueError: if none has.
    """
    widths = [x.shape[0] for name, x in tensors.items() if re.fullmatch(r".+\.patch_embed\.proj(ection)?\.bias", name)]
    depth = sum(re.fullmatch(r".+\.blocks\.\d+\.attn\.proj\.bias", name) is not None for name in tensors)
    for name in zoo.SAM2:
        if widths == [zoo.sam2(name).width] and depth == sum(zoo.sam2(name).depths):
            return zoo.sam2(name)
    raise ValueError(f"These {len(tensors)} tensors are none of {', '.join(zoo.SAM2)}; give the configuration.")


def _layout(tensors: Mapping[str, Any]) -> str:
    return "meta" if any(name.startswith("image_encoder.") for name in tensors) else "hf"


def to_params(
    tensors: Mapping[str, Any], config: Sam2Config, *, layout: str = "auto", dtype: Any = np.float32
) -> Params:
    """Tensors of a layout as our parameters: a nested dict of NumPy arrays in memory of their own.

    The video memory is left out (see `memory`). Hugging Face's files hold the frequencies of positions twice, or once
    where tensors that are shared are written once. Nothing else is passed over.

    Args:
      tensors: what `weights.read` gives.
      config: the architecture they should have.
      layout: "hf", "meta", or "auto": by the names.
      dtype: of the parameters; None keeps that of the tensors.

    Raises:
      ValueError: one error that lists every missing, unexpected and mis-shaped key with its nearest neighbours.
    """
    layout = _layout(tensors) if layout == "auto" else layout
    places = _places(config, layout)
    left_out = set(memory(tensors))
    named = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    for place in places:
        if place.copies and (held := [name for name in place.names if name in named]):
            named |= {name: named[held[0]] for name in place.names if name not in named}
    _account(named, places, layout)
    params, shapes = {}, _leaves(config)
    for place in places:
        stored = [np.asarray(named[name]) for name in place.names]
        value = place.form.load(stored[:1] if place.copies else stored, place.shape)
        kind = np.dtype(value.dtype if dtype is None else dtype)
        *branches, name = place.path.split(".")
        branch = params
        for part in branches:
            branch = branch.setdefault(part, {})
        if place.index is None:
            branch[name] = np.array(value, kind, order="C")
            continue
        if name not in branch:
            branch[name] = np.empty(shapes[place.path].shape, kind)
        elif branch[name].dtype != kind:
            raise ValueError(
                f"{place.names[0]} is {kind}, those before it {branch[name].dtype}; one array holds them all: pass "
                "dtype to convert them."
            )
        branch[name][place.index] = value
    return params


def _account(named: Mapping[str, Any], places: list[_Place], layout: str) -> None:
    """Raises one error about all that is wrong with names, shapes, types and copies."""
    expected = {name: shape for place in places for name, shape in zip(place.names, place.stored, strict=True)}
    report = Report()
    for place in places:
        if place.copies and all(name in named for name in place.names):
            first, *others = (np.asarray(named[name]) for name in place.names)
            if not all(np.array_equal(first, other) for other in others):
                report.other(f"{' and '.join(place.names)} differ; they are one matrix")
    slots.account(named, expected, report, layout)


# ------------------------------------------------------------------------------------------------------------ writing


def from_params(params: Params, config: Sam2Config, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as the tensors of a layout, by name; the inverse of `to_params`, byte for byte.

    Raises:
      ValueError: listing every parameter that is missing, unexpected or of another shape.
    """
    want, given = _leaves(config), dict(_flat(params))
    report = Report()
    for name, leaf in want.items():
        if name not in given:
            report.missing(name, leaf.shape, given.keys() - want.keys())
        elif tuple(given[name].shape) != leaf.shape:
            report.shape(name, tuple(given[name].shape), leaf.shape)
    for name in given.keys() - want.keys():
        report.unexpected(name, want)
    report.check("The parameters do not fit the architecture")
    tensors: dict[str, np.ndarray] = {}
    host = {name: np.asarray(leaf) for name, leaf in given.items()}
    for place in _places(config, layout):
        param = host[place.path]
        tensors |= zip(place.names, place.store(param if place.index is None else param[place.index]), strict=True)
    return tensors


def write(path: str | os.PathLike, params: Params, config: Sam2Config) -> None:
    """Writes a folder that Hugging Face's Sam2Model loads; or, if `path` ends in `.pt`, a file in Meta's names.

    Raises:
      ValueError: if the parameters do not fit the architecture.
    """
    path = pathlib.Path(path)
    if path.suffix in weights.TORCH_SUFFIXES:
        weights.write(path, from_params(params, config, "meta"))
        return
    weights.write(path / "model.safetensors", from_params(params, config, "hf"))
    (path / "config.json").write_text(json.dumps(to_hf_config(config), indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------- config.json

# Of `vision_config.backbone_config`: ours, and what the library takes where a file is silent.
_STAGES = {
    "blocks_per_stage": ("depths", (1, 2, 7, 2)),
    "window_size_per_stage": ("windows", (8, 4, 14, 7)),
    "global_attention_blocks": ("global_blocks", (5, 7, 9)),
}
_HIERA = {"patch_kernel_size": 7, "patch_stride": 4, "patch_padding": 3, "query_stride": 2}
_HIERA |= {"num_query_pool_stages": 3, "mlp_ratio": 4.0, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
_NECK = {"fpn_kernel_size": 1, "fpn_stride": 1, "fpn_padding": 0, "num_feature_levels": 3}
_DECODER = {"num_hidden_layers": 2, "attention_downsample_rate": 2, "num_multimask_outputs": MASKS - 1}
_DECODER |= {"iou_head_depth": 3, "dynamic_multimask_stability_delta": 0.05, "dynamic_multimask_stability_thresh": 0.98}


def from_hf_config(fields: Mapping[str, Any]) -> Sam2Config:
    """The architecture that a `config.json` of Hugging Face's describes, of a Sam2Model or a Sam2VideoModel.

    Raises:
      ValueError: for another model, or a value that asks for something this model does not compute; names them all.
    """
    if fields.get("model_type") not in ("sam2", "sam2_video"):
        raise ValueError(f"config.json is of model_type {fields.get('model_type')!r}; want 'sam2' or 'sam2_video'.")
    vision, prompt, decoder = (
        fields.get(f"{part}_config") or {} for part in ("vision", "prompt_encoder", "mask_decoder")
    )
    hiera = vision.get("backbone_config") or {}
    given = {theirs: hiera[theirs] for theirs in _STAGES if hiera.get(theirs) is not None}
    ours: dict[str, Any] = {name: tuple(given.get(theirs, own)) for theirs, (name, own) in _STAGES.items()}
    width, heads = hiera.get("hidden_size", 96), hiera.get("num_attention_heads", 1)
    wanted = [(hiera, _HIERA), (vision, _NECK | {"fpn_top_down_levels": [2, 3]}), (decoder, _DECODER)]
    wanted += [(hiera, {"embed_dim_per_stage": [width * 2**i for i in range(4)]})]
    wanted += [(hiera, {"num_attention_heads_per_stage": [heads * 2**i for i in range(4)]})]
    wanted += [(decoder, {"iou_head_hidden_dim": decoder.get("hidden_size", 256)})]
    wanted += [(prompt, {"hidden_size": decoder.get("hidden_size", 256)})]
    wanted += [(vision, {"fpn_hidden_size": decoder.get("hidden_size", 256)})]
    wrong = [
        f"{name}={part[name]!r}, want {value!r}"
        for part, values in wanted
        for name, value in values.items()
        if part.get(name) is not None and part[name] not in (value, [value, value])
    ]
    sides = hiera.get("window_positional_embedding_background_size") or [7, 7]
    if len(set(sides)) > 1:
        wrong.append(f"window_positional_embedding_background_size={sides!r}, want a square")
    if wrong:
        raise ValueError(f"config.json describes a model that is not built here: {'; '.join(wrong)}.")
    ours["global_blocks"] = tuple(block + 1 for block in ours["global_blocks"])  # theirs count from 0
    return Sam2Config(
        width,
        heads=heads,
        position_grid=sides[0],
        image_size=prompt.get("image_size", 1024),
        decoder_width=decoder.get("hidden_size", 256),
        decoder_heads=decoder.get("num_attention_heads", 8),
        decoder_mlp_width=decoder.get("mlp_dim", 2048),
        mask_width=prompt.get("mask_input_channels", 16),
        **ours,
    )


def to_hf_config(config: Sam2Config) -> dict[str, Any]:
    """The fields of a Sam2Model's `config.json` for this architecture."""
    c, stages = config, range(4)
    hiera = {name: list(getattr(c, ours)) for name, (ours, _) in _STAGES.items()}
    hiera |= {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "image_size": [c.image_size] * 2,
        "embed_dim_per_stage": [c.width * 2**i for i in stages],
        "num_attention_heads_per_stage": [c.heads * 2**i for i in stages],
        "global_attention_blocks": [block - 1 for block in c.global_blocks],
        "window_positional_embedding_background_size": [c.position_grid] * 2,
    }
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": hiera,
            "backbone_channel_list": [c.width * 2**i for i in reversed(stages)],
            "backbone_feature_sizes": [[c.image_size // stride] * 2 for stride in (4, 8, 16)],
            "fpn_hidden_size": c.decoder_width,
        },
        "prompt_encoder_config": {
            "hidden_size": c.decoder_width,
            "image_size": c.image_size,
            "mask_input_channels": c.mask_width,
        },
        "mask_decoder_config": {
            "hidden_size": c.decoder_width,
            "num_attention_heads": c.decoder_heads,
            "mlp_dim": c.decoder_mlp_width,
            "iou_head_hidden_dim": c.decoder_width,
        },
    }

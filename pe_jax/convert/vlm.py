"""Weights of vision-language models, both ways, and of their towers alone.

Two layouts hold a whole model. `hf`: transformers' Perception-LM, a folder of safetensors with a `config.json`, its
tower as timm has it. `meta`: `consolidated.pth` beside a `params.json`, as PLM's own programs read it, its tower as
PE's. Names, shapes and forms of the towers and the decoders are those of `convert.pe` and `convert.decoder`. Tensors
are read one at a time and go straight to their devices.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from pe_jax.convert import decoder, pe, slots, weights
from pe_jax.convert.pe import Report
from pe_jax.convert.slots import SHARD_BYTES, Lazy, Slot
from pe_jax.models import zoo
from pe_jax.models.decoder import RopeScaling
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.types import Params, split

LAYOUTS = ("hf", "meta")
CONSOLIDATED = "consolidated.pth"

# Of each layout: the tower's prefix and its own layout, the projector's two linear maps, and the decoder's prefix.
_TOWER = {"hf": ("timm", "model.vision_tower.timm_model."), "meta": ("meta", "vision_model.")}
_PROJECTOR = {
    "hf": ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    "meta": ("vision_projector.projector.0", "vision_projector.projector.2"),
}
_EMBEDDING = {"hf": "model.language_model.embed_tokens.weight", "meta": "tok_embeddings.weight"}
_OUTPUT = {"hf": ("lm_head.weight",), "meta": ("output.tied_module.weight", "output.weight")}  # the first if tied
# What a file may hold that follows from the configuration: the frequencies of the rotary positions.
_DERIVED = re.compile(r"model\.language_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_embeddings\..+")


def abstract(config: VLMConfig) -> VLM:
    """The model with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=64)
def _shapes(config: VLMConfig) -> Params:
    return split(abstract(config))[1]


def _slots(config: VLMConfig, layout: str) -> list[Slot]:
    """Every parameter of the architecture with its tensors."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}.")
    if config.projector != "mlp":
        raise ValueError(f'No layout has a projector that is {config.projector!r}; both want projector="mlp".')
    if not config.vision.rope:
        raise ValueError("No layout has a tower without rotary positions; both want rope=True.")
    found = []
    for one in pe.tower_slots(config.vision, *_TOWER[layout]):
        load = functools.partial(one.form.load, shape=one.shape)
        found.append(Slot(("vision", *one.path), one.block, one.names, one.stored, load, one.form.store))
    width, inner = config.vision.width, config.decoder.width
    for ours, name, inputs in zip(("up", "down"), _PROJECTOR[layout], (width, inner), strict=True):
        turned = Slot(("projector", ours, "kernel"), None, [f"{name}.weight"], [(inner, inputs)], _turned, _turn)
        found += [turned, Slot(("projector", ours, "bias"), None, [f"{name}.bias"], [(inner,)], _only, _same)]
    for one in decoder.layout_slots(config.decoder, layout):
        names = [_inside(name, layout) for name in one.names]
        found.append(one._replace(path=("decoder", *one.path), names=names))
    return found


def _turned(tensors: list[np.ndarray]) -> np.ndarray:
    return tensors[0].T


def _turn(param: np.ndarray) -> list[np.ndarray]:
    return [param.T]


def _only(tensors: list[np.ndarray]) -> np.ndarray:
    return tensors[0]


def _same(param: np.ndarray) -> list[np.ndarray]:
    return [param]


def _inside(name: str, layout: str) -> str:
    """A decoder's name where the decoder is part of the whole model."""
    return name.replace("model.", "model.language_model.", 1) if layout == "hf" and name.startswith("model.") else name


# ------------------------------------------------------------------------------------------------------------ reading


def read(
    path: str | os.PathLike,
    config: VLMConfig | None = None,
    *,
    shardings: Params | None = None,
    dtype: Any = np.float32,
) -> tuple[VLMConfig, Params]:
    """A model's configuration and its parameters, on their devices.

    Args:
      path: a folder of either layout, or its weights file or index.
      config: the architecture; None takes it from the `config.json` or `params.json` beside the weights.
      shardings: where the parameters go, a nested dict as `sharding.param_shardings(abstract(config), mesh)` gives it;
        None is one device.
      dtype: of the parameters; None keeps that of the files.

    Raises:
      ValueError: if there is no configuration, or one that is not computed here; or as `to_params`.
    """
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / CONSOLIDATED if path.is_dir() and (path / CONSOLIDATED).exists() else path
    if config is None:
        config = read_config(folder)
    return config, to_params(weights.read(file), config, shardings, dtype=dtype)


def read_config(folder: str | os.PathLike) -> VLMConfig:
    """The architecture that a folder's `config.json` or `params.json` describes.

    Raises:
      ValueError: if there is neither, or it describes a model that is not computed here.
    """
    folder = pathlib.Path(folder)
    for name, parse in (("config.json", from_hf_config), ("params.json", from_meta_config)):
        if (folder / name).exists():
            return parse(json.loads((folder / name).read_text()))
    raise ValueError(
        f"{folder} has neither config.json nor params.json to take the architecture from; give one, such as "
        'zoo.architecture("PLM-1B").'
    )


def to_params(
    tensors: Mapping[str, Any],
    config: VLMConfig,
    shardings: Params | None = None,
    layout: str = "auto",
    *,
    dtype: Any = np.float32,
) -> Params:
    """Tensors of a layout as our parameters, each put on its devices as soon as it is read.

    Where the decoder's embedding is its output layer too, a file may hold both if they are equal. It may also hold the
    frequencies of rotary positions. Nothing else is passed over.

    Args:
      tensors: what `weights.read` gives.
      config: the architecture they should have.
      shardings: where they go, as in `read`.
      layout: "hf", "meta", or "auto": by the names.
      dtype: of the parameters; None keeps that of the tensors.

    Raises:
      ValueError: one error that lists every missing, unexpected and mis-shaped key with its nearest neighbours.
    """
    if layout == "auto":
        layout = "meta" if _EMBEDDING["meta"] in tensors else "hf"
    held, report = _slots(config, layout), Report()
    named: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not _DERIVED.fullmatch(name)}
    if config.decoder.tied:
        for output in _OUTPUT[layout]:
            named = slots.without_copy(named, output, _EMBEDDING[layout], report)
    slots.account(named, slots.expected(held), report, layout)
    return slots.place(named, held, _shapes(config), shardings, dtype)


# ------------------------------------------------------------------------------------------------------------ writing


def from_params(params: Params, config: VLMConfig, layout: str, *, dtype: Any = None) -> dict[str, Lazy]:
    """Our parameters as the tensors of a layout, by name; the inverse of `to_params`, byte for byte.

    Each is brought to the host when it is read. Of a tied decoder `meta` holds the table twice, as Meta's files do.

    Args:
      params: the nested dict of arrays.
      config: their architecture.
      layout: "hf" or "meta".
      dtype: of the tensors; None keeps that of the parameters.

    Raises:
      ValueError: for an architecture that the layout cannot hold, or listing every parameter that does not fit it.
    """
    tensors = slots.tensors(params, _slots(config, layout), _shapes(config), dtype)
    if layout == "meta" and config.decoder.tied:
        tensors[_OUTPUT["meta"][0]] = tensors[_EMBEDDING["meta"]]
    return tensors


def write(
    folder: str | os.PathLike,
    params: Params,
    config: VLMConfig,
    layout: str = "hf",
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model into `folder` as its layout's programs expect it, but for the tokenizer.

    `hf`: `config.json`, and `model.safetensors` or as many shards as it takes with their index. `meta`:
    `consolidated.pth`, and a `params.json` that describes the model alone.

    Args:
      folder: made where missing; its files of these names are replaced.
      dtype: of the tensors; None keeps that of the parameters.
      shard_bytes: at most so many in each safetensors file, unless one tensor alone is larger.

    Raises:
      ValueError: as `from_params`.
    """
    tensors = from_params(params, config, layout, dtype=dtype)
    if layout == "meta":
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.json").write_text(json.dumps(to_meta_config(config), indent=2) + "\n")
        weights.write(folder / CONSOLIDATED, tensors)
        return
    kind = np.dtype(dtype if dtype is not None else tensors[_EMBEDDING["hf"]].dtype).name
    slots.write_shards(folder, tensors, to_hf_config(config) | {"torch_dtype": kind}, shard_bytes)


# -------------------------------------------------------------------------------------------------------------- tower


def tower(config: VLMConfig, params: Params) -> tuple[VisionConfig, Params]:
    """PE-Lang: a trained model's tower alone, for inference, as `convert.pe` writes it in any layout."""
    return dataclasses.replace(config.vision, drop_path=0.0), params["vision"]


def tower_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A whole model's tensors that are of its tower, by the names that `convert.pe` reads; {} where there are none."""
    return {
        name.removeprefix(prefix): tensor
        for _, prefix in _TOWER.values()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


# ------------------------------------------------------------------------------------------------------- config.json

_SILENT = {
    "_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version", "video_token_id",
    "use_cache", "tie_word_embeddings", "return_dict", "output_hidden_states", "output_attentions",
}  # fmt: skip
# timm's names of PE's towers: what they have where `model_args` are silent.
_TIMM = re.compile(r"vit_pe_(core|lang|spatial)_(tiny|small|base|large|gigantic)_patch\d+_\d+")
_SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L", "gigantic": "G"}
_ARGS = {"patch_size": "patch_size", "depth": "depth", "num_heads": "heads", "embed_dim": "width"}


def from_hf_config(fields: Mapping[str, Any]) -> VLMConfig:
    """The architecture that a Perception-LM's `config.json` describes.

    Raises:
      ValueError: for another model, a field that is missing or unknown, or a value that asks for something that is not
        computed here; names them.
    """
    if fields.get("model_type") != "perception_lm":
        raise ValueError(f"config.json is of model_type {fields.get('model_type')!r}; want 'perception_lm'.")
    known = {
        "image_token_id",
        "projector_pooling_ratio",
        "text_config",
        "vision_config",
        "vision_use_cls_token",
    }
    wrong = [f"{name} is missing" for name in ("text_config", "vision_config") if not fields.get(name)]
    wrong += [f"{name}={fields[name]!r} is unknown" for name in fields if name not in known | _SILENT]
    if wrong:
        raise ValueError(f"config.json describes a model that is not built here: {'; '.join(wrong)}.")
    text = dict(fields["text_config"])
    text.setdefault("tie_word_embeddings", fields.get("tie_word_embeddings") or False)
    vision = _from_timm(fields["vision_config"])
    if fields.get("vision_use_cls_token", True) != vision.class_token:
        raise ValueError(
            f"config.json says vision_use_cls_token={fields.get('vision_use_cls_token', True)}, and its tower has "
            f"class_token={vision.class_token}; want the same."
        )
    return VLMConfig(
        vision,
        decoder.from_hf_config(text),
        image_token=fields.get("image_token_id", 128_002),
        pooling=fields.get("projector_pooling_ratio", 1),
    )


def _from_timm(fields: Mapping[str, Any]) -> VisionConfig:
    name, args = str(fields.get("architecture")), dict(fields.get("model_args") or {})
    found = _TIMM.fullmatch(name)
    if fields.get("model_type", "timm_wrapper") != "timm_wrapper" or not found:
        raise ValueError(f"The tower is {name!r} of {fields.get('model_type')!r}; want one of timm's vit_pe towers.")
    released = next(n for n in zoo.NAMES if n.lower().startswith(f"pe-{found[1]}-{_SIZES[found[2]]}".lower()))
    whole = zoo.architecture(released)
    base = whole if isinstance(whole, VisionConfig) else whole.vision
    shape = {ours: args.pop(theirs, getattr(base, ours)) for theirs, ours in _ARGS.items()}
    sides = args.pop("img_size", [base.image_size] * 2)
    rows, columns = (sides, sides) if isinstance(sides, int) else sides
    config = VisionConfig(
        rows,
        **shape,
        mlp_width=int(shape["width"] * args.pop("mlp_ratio", base.mlp_width / base.width)),
        class_token=args.pop("class_token", base.class_token),
        pool="none",
        output_width=None,
        norm_post=False,
        layer_scale=args.pop("init_values", base.layer_scale),
    )
    grid = [config.grid] * 2
    fixed = {
        "img_size": (rows, columns) == (rows, rows),
        "global_pool": args.pop("global_pool", "map" if found[1] == "core" else "") == "",
        "use_post_transformer_norm": args.pop("use_post_transformer_norm", base.norm_post) is False,
        "ref_feat_shape": list(args.pop("ref_feat_shape", [base.grid] * 2)) == grid,
        "rope_grid_offset": args.pop("rope_grid_offset", float(base.class_token)) == float(config.class_token),
    }
    wrong = [name for name, right in fixed.items() if not right] + list(args)
    if wrong:
        raise ValueError(
            f"model_args of the tower {name} ask for something that is not built here: {', '.join(wrong)}. Want a "
            f'square img_size, global_pool="", no norm behind the last block, ref_feat_shape={grid} and '
            f"rope_grid_offset={float(config.class_token)}."
        )
    return config


def to_hf_config(config: VLMConfig) -> dict[str, Any]:
    """The fields of a Perception-LM's `config.json` for this architecture.

    Everything is written out, so that the named architecture of timm's only says what kind of tower it is.
    """
    v = config.vision
    text = decoder.to_hf_config(config.decoder)
    args = {theirs: getattr(v, ours) for theirs, ours in _ARGS.items()} | {
        "img_size": [v.image_size] * 2,
        "mlp_ratio": _ratio(v.mlp_width, v.width),
        "class_token": v.class_token,
        "init_values": v.layer_scale,
        "global_pool": "",
        "use_post_transformer_norm": False,
        "ref_feat_shape": [v.grid] * 2,
        "rope_grid_offset": float(v.class_token),
    }
    name = "vit_pe_core_large_patch14_336" if v.class_token else "vit_pe_core_gigantic_patch14_448"
    return {
        "architectures": ["PerceptionLMForConditionalGeneration"],
        "model_type": "perception_lm",
        "image_token_id": config.image_token,
        "video_token_id": min(config.image_token + 1, config.decoder.vocab_size - 1),
        "projector_pooling_ratio": config.pooling,
        "vision_use_cls_token": v.class_token,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": text,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": name,
            "do_pooling": False,
            "num_classes": 0,
            "model_args": args,
        },
    }


def _ratio(wide: int, width: int) -> float:
    """The ratio that, times `width` and cut to an integer, is `wide`."""
    ratio = wide / width
    return ratio if int(width * ratio) == wide else math.nextafter(ratio, math.inf)


# ------------------------------------------------------------------------------------------------------- params.json


def from_meta_config(fields: Mapping[str, Any]) -> VLMConfig:
    """The architecture that PLM's `params.json` describes; its id of visual places is Llama 3's.

    Raises:
      ValueError: if it has no vision model, or a part that is not computed here.
    """
    model = dict(fields.get("model", fields))
    if missing := [name for name in ("dim", "n_layers", "n_heads", "vocab_size", "vision_model") if name not in model]:
        raise ValueError(f"params.json lacks {', '.join(missing)} of the model.")
    seen, width = dict(model["vision_model"]), model["dim"]
    if seen.get("use_ln_post", True) or seen.get("pool_type", "attn") != "none":
        raise ValueError(f"params.json has a tower with a head: {seen}; want use_ln_post=false and pool_type='none'.")
    vision = VisionConfig(
        seen["image_size"],
        seen["patch_size"],
        seen["width"],
        seen["layers"],
        seen["heads"],
        int(seen["width"] * seen["mlp_ratio"]),
        class_token=seen.get("use_cls_token", True),
        pool="none",
        output_width=None,
        layer_scale=seen.get("ls_init_value"),
        drop_path=seen.get("drop_path", 0.0),
        norm_post=False,
    )
    hidden = int((model.get("ffn_dim_multiplier") or 1) * int(2 * 4 * width / 3))
    step = model.get("multiple_of", 256)
    factor = model.get("rope_scale_factor", 1) if model.get("use_scaled_rope", True) else 1
    scaling = None
    if factor != 1:
        scaling = RopeScaling(
            float(factor),
            float(model.get("low_freq_factor", 1)),
            float(model.get("high_freq_factor", 32)),
            model.get("old_context_len", 8192),
        )
    language = {
        "vocab_size": model["vocab_size"],
        "width": width,
        "depth": model["n_layers"],
        "heads": model["n_heads"],
        "kv_heads": model.get("n_kv_heads") or model["n_heads"],
        "head_dim": model.get("head_dim") or width // model["n_heads"],
        "mlp_width": step * -(-hidden // step),
        "context_length": model.get("max_seqlen", 1024),
        "rope_theta": float(model.get("rope_theta", 10_000)),
        "norm_epsilon": model.get("norm_eps", 1e-5),
        "tied": model.get("weight_tying", False),
    }
    reader = dataclasses.replace(zoo.decoder(language), rope_scaling=scaling)
    return zoo.vlm(vision, reader, pooling=model.get("pooling_ratio", 1))


def to_meta_config(config: VLMConfig) -> dict[str, Any]:
    """The `model` of a `params.json` for this architecture.

    Raises:
      ValueError: if it stretches rotary positions by numbers that are not integers, as PLM's programs have them.
    """
    c, v, scaling = config.decoder, config.vision, config.decoder.rope_scaling
    rope = {}
    if scaling is not None:
        if any(number % 1 for number in (scaling.factor, scaling.low, scaling.high)):
            raise ValueError(f"{scaling} is not of integers, which params.json wants; write the model as hf.")
        rope = {
            "rope_scale_factor": int(scaling.factor),
            "low_freq_factor": int(scaling.low),
            "high_freq_factor": int(scaling.high),
            "old_context_len": scaling.original_length,
        }
    return {
        "model": {
            "dim": c.width,
            "n_layers": c.depth,
            "n_heads": c.heads,
            "n_kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "vocab_size": c.vocab_size,
            "ffn_dim_multiplier": (c.mlp_width + 0.5) / int(2 * 4 * c.width / 3),
            "multiple_of": 1,
            "norm_eps": c.norm_epsilon,
            "rope_theta": c.rope_theta,
            **rope,
            "weight_tying": c.tied,
            "max_seqlen": c.context_length,
            "pooling_ratio": config.pooling,
            "vision_model": {
                "image_size": v.image_size,
                "patch_size": v.patch_size,
                "width": v.width,
                "layers": v.depth,
                "heads": v.heads,
                "mlp_ratio": _ratio(v.mlp_width, v.width),
                "use_cls_token": v.class_token,
                "use_abs_posemb": True,
                "ls_init_value": v.layer_scale,
                "drop_path": v.drop_path,
                "use_ln_post": False,
                "pool_type": "none",
            },
            "mlp_init": {"use_gaussian": True},
        }
    }

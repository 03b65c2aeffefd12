"""Weights of language decoders, both ways: Hugging Face's layout and Meta's consolidated files.

One table says what each parameter is called in the two layouts and how its axes lie there. `hf` files are safetensors,
one or a folder of shards, with a `config.json`; `meta` files are `consolidated.NN.pth`, one, or as many as the model
was cut into. Meta's rotary pairs are adjacent channels, ours and Hugging Face's the halves of a head, so the rows of
its query and key projections are reordered.

Tensors are read one at a time and go straight to their devices: the host holds one tensor, whatever the model's size.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from pe_jax.convert import slots, weights
from pe_jax.convert.pe import Report
from pe_jax.convert.slots import SHARD_BYTES, Lazy, Slot
from pe_jax.models.decoder import Decoder, DecoderConfig, RopeScaling
from pe_jax.types import Params, split

LAYOUTS = ("hf", "meta")

# What a file may hold that follows from the configuration: the frequencies of the rotary positions.
_DERIVED = re.compile(r"rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


# -------------------------------------------------------------------------------------------------------------- table


class Row(NamedTuple):
    """A parameter and the tensors that hold it; `{}` in a name is the block's number.

    `cut` is the axis along which Meta cuts the stored tensors over the pieces of a model; None: each has all of it.
    """

    path: str
    hf: str
    meta: str
    kind: str = "as it is"  # or "linear", stored [out, in]; or "qkv", three tensors in one of ours
    cut: int | None = None


_HF, _META = "model.layers.{}", "layers.{}"
_ROWS = (
    Row("embedding", "model.embed_tokens.weight", "tok_embeddings.weight", cut=0),
    Row("blocks.norm1.scale", f"{_HF}.input_layernorm.weight", f"{_META}.attention_norm.weight"),
    Row(
        "blocks.attention.qkv.kernel",
        " ".join(f"{_HF}.self_attn.{x}_proj.weight" for x in "qkv"),
        " ".join(f"{_META}.attention.w{x}.weight" for x in "qkv"),
        "qkv",
        cut=0,
    ),
    Row("blocks.attention.qkv.bias", " ".join(f"{_HF}.self_attn.{x}_proj.bias" for x in "qkv"), "", "qkv", cut=0),
    Row(
        "blocks.attention.out.kernel", f"{_HF}.self_attn.o_proj.weight", f"{_META}.attention.wo.weight", "linear", cut=1
    ),
    Row("blocks.norm2.scale", f"{_HF}.post_attention_layernorm.weight", f"{_META}.ffn_norm.weight"),
    Row("blocks.mlp.gate.kernel", f"{_HF}.mlp.gate_proj.weight", f"{_META}.feed_forward.w1.weight", "linear", cut=0),
    Row("blocks.mlp.up.kernel", f"{_HF}.mlp.up_proj.weight", f"{_META}.feed_forward.w3.weight", "linear", cut=0),
    Row("blocks.mlp.down.kernel", f"{_HF}.mlp.down_proj.weight", f"{_META}.feed_forward.w2.weight", "linear", cut=1),
    Row("norm.scale", "model.norm.weight", "norm.weight"),
    Row("output", "lm_head.weight", "output.weight", cut=0),
)
_EMBEDDING, _OUTPUT = _ROWS[0], _ROWS[-1]


def abstract(config: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=64)
def _shapes(config: DecoderConfig) -> Params:
    return split(abstract(config))[1]


def layout_slots(config: DecoderConfig, layout: str) -> list[Slot]:
    """Every parameter of the architecture with its tensors, in the order of the network."""
    return [slot for _, slot in _slots(config, layout)]


def _slots(config: DecoderConfig, layout: str) -> list[tuple[Row, Slot]]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}.")
    if layout == "meta" and config.qkv_bias:
        raise ValueError('layout="meta" has no biases, and this architecture has some on q, k and v: use "hf".')
    params = _shapes(config)
    ours = {".".join(path) for path in slots.paths(params)}

    def slot(row: Row, block: int | None) -> tuple[Row, Slot]:
        path = tuple(row.path.split("."))
        shape = slots.leaf(params, path).shape[0 if block is None else 1 :]
        names = [name.format(block) for name in getattr(row, layout).split()]
        load = functools.partial(_load, row.kind, config=config, layout=layout)
        store = functools.partial(_store, row.kind, config=config, layout=layout)
        return row, Slot(path, block, names, _stored(row, shape, config), load, store)

    rows = [row for row in _ROWS if row.path in ours]
    assert len(rows) == len(ours), ours
    blocks = [slot(row, block) for block in range(config.depth) for row in rows if "{}" in row.hf]
    first, *last = [slot(row, None) for row in rows if "{}" not in row.hf]
    return [first, *blocks, *last]


def _stored(row: Row, shape: tuple[int, ...], config: DecoderConfig) -> list[tuple[int, ...]]:
    if row.kind == "linear":
        return [shape[::-1]]
    if row.kind == "qkv":
        return [(heads * config.head_dim, *shape[:-1]) for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [shape]


def _load(kind: str, tensors: Sequence[np.ndarray], config: DecoderConfig, layout: str) -> np.ndarray:
    """Stored → ours."""
    if kind == "linear":
        return tensors[0].T
    if kind != "qkv":
        return tensors[0]
    c, rest = config, tensors[0].shape[1:]
    q, k, v = (tensor.reshape(c.kv_heads, -1, c.head_dim, *rest) for tensor in tensors)
    if layout == "meta":
        q, k = _halved(q), _halved(k)
    return np.concatenate([q, k, v], 1).reshape(-1, *rest).T


def _store(kind: str, param: np.ndarray, config: DecoderConfig, layout: str) -> list[np.ndarray]:
    """Ours → stored; the inverse of `_load`."""
    if kind == "linear":
        return [param.T]
    if kind != "qkv":
        return [param]
    c, rest = config, param.shape[:-1]
    whole = param.T.reshape(c.kv_heads, c.group + 2, c.head_dim, *rest)
    q, k, v = whole[:, :-2], whole[:, -2], whole[:, -1]
    if layout == "meta":
        q, k = _adjacent(q), _adjacent(k[:, None])
    return [part.reshape(-1, *rest) for part in (q, k, v)]


def _halved(x: np.ndarray) -> np.ndarray:
    """Channels of heads [G, n, A, ...], pair by pair, as all firsts and then all seconds."""
    return np.swapaxes(x.reshape(*x.shape[:2], -1, 2, *x.shape[3:]), 2, 3).reshape(x.shape)


def _adjacent(x: np.ndarray) -> np.ndarray:
    """The inverse of `_halved`."""
    return np.swapaxes(x.reshape(*x.shape[:2], 2, -1, *x.shape[3:]), 2, 3).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------ reading


def read(
    path: str | os.PathLike,
    config: DecoderConfig | None = None,
    *,
    shardings: Params | None = None,
    dtype: Any = np.float32,
) -> tuple[DecoderConfig, Params]:
    """A decoder's configuration and its parameters, on their devices.

    Args:
      path: a safetensors file, an index of shards or a folder with either; or a folder of `consolidated.NN.pth` pieces,
        or one of them if it is the only one.
      config: the architecture; None takes it from the `config.json` beside the weights.
      shardings: where the parameters go, a nested dict as `sharding.param_shardings(abstract(config), mesh)` gives it;
        None is one device.
      dtype: of the parameters; None keeps that of the files.

    Raises:
      ValueError: if there is no configuration, or one that this decoder does not compute; or as `to_params`.
    """
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    if config is None:
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{folder} has no config.json to take the architecture from; give one, such as "
                'zoo.decoder("Llama-3.2-3B").'
            )
        config = from_hf_config(json.loads((folder / "config.json").read_text()))
    pieces = sorted(folder.glob("consolidated.*.pth"))
    if path in pieces and len(pieces) > 1:
        raise ValueError(f"{path} is one of {len(pieces)} pieces; give the folder, {folder}.")
    if pieces and (path.is_dir() or path in pieces):
        return config, to_params(
            merged([weights.read(piece) for piece in pieces], config), config, shardings, dtype=dtype
        )
    return config, to_params(weights.read(path), config, shardings, dtype=dtype)


def merged(pieces: Sequence[Mapping[str, Any]], config: DecoderConfig) -> dict[str, Any]:
    """The tensors of a whole model from Meta's pieces of it, each joined when it is read.

    Along which axis a tensor was cut is told by its shape and the architecture's; what every piece holds whole must be
    the same in all.

    Raises:
      ValueError: if pieces differ in their names or shapes, or in the numbers of a tensor that is not cut; or if one
        was cut in a way that does not give the architecture's shape.
    """
    if len(pieces) == 1:
        return dict(pieces[0])
    expected = slots.expected(layout_slots(config, "meta")) | {
        _OUTPUT.meta: (config.vocab_size, config.width)
    }  # also of a tied model
    for number, piece in enumerate(pieces):
        if differing := sorted(set(piece) ^ set(pieces[0])):
            raise ValueError(f"Pieces 0 and {number} differ in their names: {', '.join(differing[:10])}.")

    def join(name: str) -> Any:
        parts = [piece[name] for piece in pieces]
        shape, want = tuple(parts[0].shape), expected.get(name)
        if any(tuple(part.shape) != shape for part in parts):
            raise ValueError(f"{name} is not of one shape in all pieces: {[list(part.shape) for part in parts]}.")
        if want is None or shape == want:
            if want is not None and not all(np.array_equal(part, parts[0]) for part in parts[1:]):
                raise ValueError(f"{name} differs between the pieces, and each holds all of it.")
            return parts[0]
        for axis in range(len(shape)):
            whole = (*shape[:axis], shape[axis] * len(parts), *shape[axis + 1 :])
            if whole == want:
                return Lazy(whole, parts[0].dtype, functools.partial(np.concatenate, parts, axis))
        raise ValueError(
            f"{name} is {list(shape)} in each of {len(parts)} pieces, want {list(want)} in all; "
            "is this another model, or is a piece missing?"
        )

    return {name: join(name) for name in pieces[0]}


def to_params(
    tensors: Mapping[str, Any],
    config: DecoderConfig,
    shardings: Params | None = None,
    *,
    layout: str = "auto",
    dtype: Any = np.float32,
) -> Params:
    """Tensors of a layout as our parameters, each put on its devices as soon as it is read.

    Of a tied model a file may hold the output layer too, equal to the embedding; and a file may hold the frequencies
    of rotary positions, which follow from the configuration. Nothing else is passed over.

    Args:
      tensors: what `weights.read` or `merged` gives.
      config: the architecture they should have.
      shardings: where they go, as in `read`.
      layout: "hf", "meta", or "auto": by the names.
      dtype: of the parameters; None keeps that of the tensors.

    Raises:
      ValueError: one error that lists every missing, unexpected and mis-shaped key with its nearest neighbours.
    """
    if layout == "auto":
        layout = "meta" if _EMBEDDING.meta in tensors else "hf"
    held, report = layout_slots(config, layout), Report()
    named = {name: tensor for name, tensor in tensors.items() if not _DERIVED.fullmatch(name)}
    if config.tied:
        named = slots.without_copy(named, getattr(_OUTPUT, layout), getattr(_EMBEDDING, layout), report)
    slots.account(named, slots.expected(held), report, layout)
    return slots.place(named, held, _shapes(config), shardings, dtype)


# ------------------------------------------------------------------------------------------------------------ writing


def from_params(params: Params, config: DecoderConfig, layout: str, *, dtype: Any = None) -> dict[str, Lazy]:
    """Our parameters as the tensors of a layout, by name; each is brought to the host when it is read.

    The inverse of `to_params`, byte for byte. Of a tied model `meta` holds the table twice, as Meta's files do.

    Args:
      params: the nested dict of arrays.
      config: their architecture.
      layout: "hf" or "meta".
      dtype: of the tensors; None keeps that of the parameters.

    Raises:
      ValueError: listing every parameter that is missing, unexpected or of another shape.
    """
    tensors = slots.tensors(params, layout_slots(config, layout), _shapes(config), dtype)
    if layout == "meta" and config.tied:
        tensors[_OUTPUT.meta] = tensors[_EMBEDDING.meta]
    return tensors


def write(
    folder: str | os.PathLike,
    params: Params,
    config: DecoderConfig,
    layout: str = "hf",
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    pieces: int = 1,
) -> None:
    """Writes a decoder into `folder` as its layout's programs expect it.

    `hf`: `config.json`, and `model.safetensors` or as many shards as it takes with their index. `meta`:
    `consolidated.NN.pth`; its `params.json` is left to the reader, for it does not tell how rotary positions are
    scaled.

    Args:
      folder: made where missing; its files of these names are replaced.
      dtype: of the tensors; None keeps that of the parameters.
      shard_bytes: at most so many in each safetensors file, unless one tensor alone is larger.
      pieces: into how many files of Meta's layout the model is cut, for as many devices.

    Raises:
      ValueError: if the parameters do not fit, or the pieces do not divide them.
    """
    folder = pathlib.Path(folder)
    tensors = from_params(params, config, layout, dtype=dtype)
    if layout == "meta":
        for number, part in enumerate(_cut(tensors, config, pieces)):
            weights.write(folder / f"consolidated.{number:02d}.pth", part)
        return
    if pieces != 1:
        raise ValueError(f'pieces={pieces} belongs to layout="meta"; "hf" is cut by shard_bytes.')
    kind = np.dtype(dtype if dtype is not None else tensors[_EMBEDDING.hf].dtype).name
    slots.write_shards(folder, tensors, to_hf_config(config) | {"torch_dtype": kind}, shard_bytes)


def _cut(tensors: Mapping[str, Lazy], config: DecoderConfig, pieces: int) -> list[dict[str, Any]]:
    """Meta's pieces of the tensors; a head is never cut."""
    if pieces == 1:
        return [dict(tensors)]
    axes = {name: row.cut for row, slot in _slots(config, "meta") for name in slot.names} | {_OUTPUT.meta: 0}
    sizes = {"kv_heads": config.kv_heads, "mlp_width": config.mlp_width, "vocab_size": config.vocab_size}
    if uneven := {name: size for name, size in sizes.items() if size % pieces}:
        raise ValueError(f"pieces={pieces} does not divide {uneven}; choose a number that does.")

    def part(tensor: Lazy, axis: int | None, number: int) -> Lazy:
        if axis is None:
            return tensor
        each = tensor.shape[axis] // pieces
        here = (slice(None),) * axis + (slice(number * each, (number + 1) * each),)
        shape = (*tensor.shape[:axis], each, *tensor.shape[axis + 1 :])
        return Lazy(shape, tensor.dtype, lambda: np.asarray(tensor)[here])

    return [{name: part(tensor, axes[name], i) for name, tensor in tensors.items()} for i in range(pieces)]


# ------------------------------------------------------------------------------------------------------- config.json

# Fields of Hugging Face's that say nothing of what a forward pass computes.
_SILENT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "max_window_layers",
    "model_type", "pad_token_id", "sliding_window", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Fields that must have this value, which is their default: others change the network in ways that are not built here.
_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "use_sliding_window": False,
}
_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_epsilon",
}
_OPTIONAL = {
    "head_dim",
    "layer_types",
    "num_key_value_heads",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original_length",
}


def from_hf_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """The architecture that a `config.json` of Hugging Face's describes.

    Raises:
      ValueError: for a model that is neither Llama nor Qwen2, a field that is missing or unknown, or a value that asks
        for something this decoder does not compute; names them all.
    """
    kind = fields.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"config.json is of model_type {kind!r}; want 'llama' or 'qwen2'.")
    required = [*_SHAPE, *(["num_key_value_heads"] if kind == "qwen2" else [])]
    wrong = [f"{name} is missing" for name in required if name not in fields]
    known = _SILENT | _FIXED.keys() | _SHAPE.keys() | _OPTIONAL
    wrong += [f"{name}={fields[name]!r} is unknown" for name in fields if name not in known]
    wrong += [f"{name}={fields[name]!r}, want {v!r}" for name, v in _FIXED.items() if fields.get(name, v) != v]
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"layer_types={sorted(set(fields['layer_types']))}, want full_attention alone")
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10_000.0))
    how = rope.pop("rope_type", rope.pop("type", "default"))
    if how not in ("default", "llama3") or (how == "llama3") != bool(rope) or set(rope) - set(_SCALING):
        wrong.append(f"rotary positions of type {how!r} with {rope}, want 'default', or 'llama3' with its four numbers")
    elif how == "llama3" and set(rope) != set(_SCALING):
        wrong.append(f"rotary positions lack {', '.join(sorted(set(_SCALING) - set(rope)))}")
    if wrong:
        raise ValueError(f"config.json describes a model that is not built here: {'; '.join(wrong)}.")
    shape = {ours: fields[theirs] for theirs, ours in _SHAPE.items()}
    return DecoderConfig(
        **shape,
        kv_heads=fields.get("num_key_value_heads") or shape["heads"],
        head_dim=fields.get("head_dim") or shape["width"] // shape["heads"],
        rope_theta=float(theta),
        rope_scaling=RopeScaling(**{ours: rope[theirs] for theirs, ours in _SCALING.items()}) if rope else None,
        qkv_bias=kind == "qwen2",
        tied=bool(fields.get("tie_word_embeddings", False)),
    )


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a `config.json` for this architecture, as versions 4 and 5 of Hugging Face's library read them.

    Raises:
      ValueError: for a Qwen2 whose heads are not the width cut into as many; their configuration cannot say that.
    """
    c = config
    if c.qkv_bias and c.head_dim * c.heads != c.width:
        raise ValueError(f"Qwen2's config.json has no head_dim, and {c.heads} heads of {c.head_dim} are not {c.width}.")
    scaling = None
    if c.rope_scaling is not None:
        scaling = {theirs: getattr(c.rope_scaling, ours) for theirs, ours in _SCALING.items()} | {"rope_type": "llama3"}
    return {
        "architectures": ["Qwen2ForCausalLM" if c.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if c.qkv_bias else "llama",
        **{theirs: getattr(c, ours) for theirs, ours in _SHAPE.items()},
        "num_key_value_heads": c.kv_heads,
        **({} if c.qkv_bias else {"head_dim": c.head_dim}),
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": c.tied,
    }

"""Released names and what they stand for: architecture and home of the weights (PE Tab. 17; config of the release)."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from flax import nnx

from pe_jax.models.clip import CLIP, CLIPConfig
from pe_jax.models.decoder import DecoderConfig, RopeScaling
from pe_jax.models.layers import resolve_layers
from pe_jax.models.sam2 import Sam2Config
from pe_jax.models.text import TextConfig
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.models.vlm import VLM, VLMConfig

Architecture: TypeAlias = CLIPConfig | VisionConfig | VLMConfig
Model: TypeAlias = CLIP | VisionTower | VLM

# size: patch, width, depth, heads, MLP width, class token
_TOWERS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "T": (16, 192, 12, 3, 768, True),
    "S": (16, 384, 12, 6, 1536, True),
    "B": (16, 768, 12, 12, 3072, True),
    "L": (14, 1024, 24, 16, 4096, True),
    "G": (14, 1536, 50, 16, 8960, False),
}


def _vision(size: str, image_size: int, **changes: Any) -> VisionConfig:
    patch, width, depth, heads, mlp_width, class_token = _TOWERS[size]
    tower = VisionConfig(image_size, patch, width, depth, heads, mlp_width, class_token, "attention", None)
    return dataclasses.replace(tower, **changes)


def _core(size: str, image_size: int, text: TextConfig) -> CLIPConfig:
    return CLIPConfig(_vision(size, image_size, output_width=text.output_width), text)


def _aligned(size: str, image_size: int, **changes: Any) -> VisionConfig:
    """A tower whose best features were brought to its last layer: no norm, pool or projection follows."""
    return _vision(size, image_size, pool="none", norm_post=False, **changes)


_TEXT_SMALL = TextConfig(32, 512, 12, 8, 2048, 512)
_TEXT_BASE = TextConfig(32, 1024, 24, 16, 4096, 1024)
_TEXT_GIANT = TextConfig(72, 1280, 24, 20, 5120, 1280)
_LANG_L = _aligned("L", 448, depth=23, layer_scale=0.1)
_LANG_G = _aligned("G", 448, depth=47, layer_scale=0.1)

_RELEASED: dict[str, Architecture] = {
    "PE-Core-T16-384": _core("T", 384, _TEXT_SMALL),
    "PE-Core-S16-384": _core("S", 384, _TEXT_SMALL),
    "PE-Core-B16-224": _core("B", 224, _TEXT_BASE),
    "PE-Core-L14-336": _core("L", 336, _TEXT_BASE),
    "PE-Core-G14-448": _core("G", 448, _TEXT_GIANT),
    "PE-Lang-L14-448": _LANG_L,
    "PE-Lang-L14-448-Tiling": _LANG_L,
    "PE-Lang-G14-448": _LANG_G,
    "PE-Lang-G14-448-Tiling": _LANG_G,
    "PE-Spatial-T16-512": _aligned("T", 512),
    "PE-Spatial-S16-512": _aligned("S", 512),
    "PE-Spatial-B16-512": _aligned("B", 512),
    "PE-Spatial-L14-448": _aligned("L", 448),
    "PE-Spatial-G14-448": _aligned("G", 448, layer_scale=0.1),
}
NAMES: tuple[str, ...] = tuple(_RELEASED)


def _llama(width: int, depth: int, heads: int, mlp_width: int, factor: float, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        128_256, width, depth, heads, 8, width // heads, mlp_width, 131_072, 5e5, RopeScaling(factor), tied=tied
    )


def _qwen(width: int, depth: int, heads: int, kv_heads: int, mlp_width: int, vocab_size: int) -> DecoderConfig:
    sizes = (vocab_size, width, depth, heads, kv_heads, width // heads, mlp_width)
    return DecoderConfig(*sizes, 32_768, 1e6, norm_epsilon=1e-6, qkv_bias=True, tied=width < 3000)


# The language models that towers are aligned with (PE §5), as their own releases have them.
_DECODERS: dict[str, DecoderConfig] = {
    "Llama-3.2-1B": _llama(2048, 16, 32, 8192, 32.0, True),
    "Llama-3.2-3B": _llama(3072, 28, 24, 8192, 32.0, True),
    "Llama-3.1-8B": _llama(4096, 32, 32, 14336, 8.0, False),
    "Qwen2.5-0.5B": _qwen(896, 24, 14, 2, 4864, 151_936),
    "Qwen2.5-1.5B": _qwen(1536, 28, 12, 2, 8960, 151_936),
    "Qwen2.5-3B": _qwen(2048, 36, 16, 2, 11008, 151_936),
    "Qwen2.5-7B": _qwen(3584, 28, 28, 4, 18944, 152_064),
}
DECODERS: tuple[str, ...] = tuple(_DECODERS)

# PerceptionLM, trained to 11,520 tokens; of 8B's decoder the positions are not stretched.
_READS = {"context_length": 11_520}
_VLMS: dict[str, VLMConfig] = {
    f"PLM-{size}": VLMConfig(tower, dataclasses.replace(_DECODERS[name], **_READS, **changes), 128_002, pooling=2)
    for size, tower, name, changes in (
        ("1B", _LANG_L, "Llama-3.2-1B", {}),
        ("3B", _LANG_L, "Llama-3.2-3B", {}),
        ("8B", _LANG_G, "Llama-3.1-8B", {"rope_scaling": None}),
    )
}
VLMS: tuple[str, ...] = tuple(_VLMS)

# Segmenters, whose masks teach spatial features (PE §5.2): their image part, as released.
_SAM2: dict[str, Sam2Config] = {
    "SAM-2.1-T": Sam2Config(96, (1, 2, 7, 2), 1, (8, 4, 14, 7), (6, 8, 10), 7),
    "SAM-2.1-S": Sam2Config(96, (1, 2, 11, 2), 1, (8, 4, 14, 7), (8, 11, 14), 7),
    "SAM-2.1-B+": Sam2Config(112, (2, 3, 16, 3), 2, (8, 4, 14, 7), (13, 17, 21), 14),
    "SAM-2.1-L": Sam2Config(144, (2, 6, 36, 4), 2, (8, 4, 16, 8), (24, 34, 44), 7),
}
SAM2: tuple[str, ...] = tuple(_SAM2)


def architecture(spec: str | Mapping[str, Any] | Architecture) -> Architecture:
    """The configuration that `spec` stands for.

    Args:
      spec: a released name; a configuration; or a mapping: `{"base": NAME, "vision": {...}, "text": {...}}` changes
        fields of a released one (a vision-only base takes its fields directly), and full mappings as `to_dict`
        writes them stand for themselves. One with a "decoder" and no base is of `vlm`'s arguments, such as
        `{"vision": "PE-Core-L14-336", "decoder": "Llama-3.2-3B", "tap": 23}`.

    Raises:
      ValueError: for an unknown name or field, naming its nearest neighbours.
    """
    if isinstance(spec, CLIPConfig | VisionConfig | VLMConfig):
        return spec
    if isinstance(spec, str):
        known = _RELEASED | _VLMS
        if spec not in known:
            near = difflib.get_close_matches(spec, known, 3, 0.3)
            raise ValueError(f"{spec!r} is no released model; did you mean {' or '.join(near or known)}?")
        return known[spec]
    fields = dict(spec)
    base = architecture(fields.pop("base")) if "base" in fields else None
    if isinstance(base, VisionConfig):
        return dataclasses.replace(base, **_known(VisionConfig, fields))
    if isinstance(base, VLMConfig):
        fields = _known(VLMConfig, fields)
        vision = dataclasses.replace(base.vision, **_known(VisionConfig, fields.pop("vision", {})))
        reader = decoder({"base": base.decoder} | dict(fields.pop("decoder", {})))
        return dataclasses.replace(base, vision=vision, decoder=reader, **fields)
    if isinstance(base, CLIPConfig):
        parts = _known(CLIPConfig, fields)
        vision, text = (_known(kind, parts.get(part, {})) for part, kind in _PARTS.items())
        return CLIPConfig(dataclasses.replace(base.vision, **vision), dataclasses.replace(base.text, **text))
    if "decoder" in fields:
        if "vision" not in fields:
            raise ValueError('A "decoder" needs a "vision" to read; give one, a name or a mapping.')
        return vlm(fields.pop("vision"), fields.pop("decoder"), **fields)
    if "vision" in fields:
        parts = _known(CLIPConfig, fields)
        return CLIPConfig(*(_build(kind, parts.get(part, {})) for part, kind in _PARTS.items()))
    return _build(VisionConfig, fields)


def decoder(spec: str | Mapping[str, Any] | DecoderConfig) -> DecoderConfig:
    """The language model's configuration that `spec` stands for.

    Args:
      spec: one of `DECODERS`, with or without "-Instruct"; a configuration; or a mapping: `{"base": NAME, ...}` changes
        fields of one, and a full mapping as `dataclasses.asdict` writes it stands for itself.

    Raises:
      ValueError: for an unknown name or field, naming its nearest neighbours.
    """
    if isinstance(spec, DecoderConfig):
        return spec
    if isinstance(spec, str):
        name = spec.removesuffix("-Instruct")
        if name not in _DECODERS:
            near = difflib.get_close_matches(name, DECODERS, 3, 0.3)
            raise ValueError(f"{spec!r} is no known decoder; did you mean {' or '.join(near or DECODERS)}?")
        return _DECODERS[name]
    fields = dict(spec)
    if isinstance(scaling := fields.get("rope_scaling"), Mapping):
        fields["rope_scaling"] = _build(RopeScaling, scaling)
    if "base" in fields:
        base = decoder(fields.pop("base"))
        return dataclasses.replace(base, **_known(DecoderConfig, fields))
    return _build(DecoderConfig, fields)


# By size of the vocabulary, the id that stands at visual places: Llama 3's reserved_special_token_0, Qwen2's image_pad.
_IMAGE_TOKENS = {128_256: 128_002, 151_936: 151_655, 152_064: 151_655}


def vlm(
    vision: str | Mapping[str, Any] | Architecture,
    language: str | Mapping[str, Any] | DecoderConfig,
    *,
    tap: int | None = None,
    projector: str = "mlp",
    pooling: int = 1,
    image_token: int | None = None,
    **tower: Any,
) -> VLMConfig:
    """A decoder that reads the tokens of a tower after block `tap`, by their released names or configurations.

    Args:
      vision: the tower; of a CLIP, its vision tower.
      language: one of `DECODERS`, a configuration, or a mapping as of the function `decoder`.
      tap: the last block that is kept, counted from 1; negatives count from the end. None keeps all.
      projector, pooling: as of `VLMConfig`.
      image_token: the id that stands at visual places; None takes the one of Llama 3's or Qwen2's vocabulary.
      **tower: fields of the tower to change, such as image_size=448, layer_scale=0.1, drop_path=0.1.

    Raises:
      ValueError: for an unknown name or field, a block that does not exist, parts that do not fit each other.
    """
    whole = architecture(vision)
    seen = whole if isinstance(whole, VisionConfig) else whole.vision
    (depth,) = resolve_layers((seen.depth if tap is None else tap,), seen.depth)
    if depth == 0:
        raise ValueError("tap=0 would leave no block of the tower; keep at least 1.")
    cut = {"depth": depth, "pool": "none", "norm_post": False, "output_width": None}
    reader = decoder(language)
    if image_token is None and (image_token := _IMAGE_TOKENS.get(reader.vocab_size)) is None:
        raise ValueError(
            f"A vocabulary of {reader.vocab_size} is neither Llama 3's nor Qwen2's; say which of its ids stands at "
            "visual places: image_token."
        )
    seen = dataclasses.replace(seen, **cut | _known(VisionConfig, tower))
    return VLMConfig(seen, reader, image_token, projector, pooling)


def sam2(spec: str | Mapping[str, Any] | Sam2Config) -> Sam2Config:
    """The segmenter's configuration that `spec` stands for.

    Args:
      spec: one of `SAM2`; a configuration; or a mapping: `{"base": NAME, ...}` changes fields of one, and a full
        mapping as `dataclasses.asdict` writes it stands for itself.

    Raises:
      ValueError: for an unknown name or field, naming its nearest neighbours.
    """
    if isinstance(spec, Sam2Config):
        return spec
    if isinstance(spec, str):
        if spec not in _SAM2:
            near = difflib.get_close_matches(spec, SAM2, 3, 0.3)
            raise ValueError(f"{spec!r} is no known segmenter; did you mean {' or '.join(near or SAM2)}?")
        return _SAM2[spec]
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in spec.items()}
    if "base" in fields:
        base = sam2(fields.pop("base"))
        return dataclasses.replace(base, **_known(Sam2Config, fields))
    return _build(Sam2Config, fields)


_PARTS: dict[str, Any] = {"vision": VisionConfig, "text": TextConfig}


def _build(kind: Any, fields: Mapping[str, Any]) -> Any:
    known = _known(kind, fields)
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in known]:
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}; give them, or a 'base' to start from.")
    return kind(**known)


def _known(kind: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.3)
            raise ValueError(f"{kind.__name__} has no field {name!r}; did you mean {' or '.join(near or names)}?")
    return dict(fields)


def to_dict(config: Architecture) -> dict[str, Any]:
    """The configuration as JSON types; `architecture` is the inverse."""
    return dataclasses.asdict(config)


def build(spec: str | Mapping[str, Any] | Architecture, rngs: nnx.Rngs) -> Model:
    """A freshly initialised model: a CLIP, a VLM, or the vision tower itself where it is alone."""
    config = architecture(spec)
    if isinstance(config, VLMConfig):
        return VLM(config, rngs=rngs)
    return CLIP(config, rngs=rngs) if isinstance(config, CLIPConfig) else VisionTower(config, rngs=rngs)


def abstract(spec: str | Mapping[str, Any] | Architecture) -> Model:
    """The model with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: build(spec, nnx.Rngs(0)))


def count(params: Any) -> int:
    """How many numbers a tree of (abstract) arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(
    config: Architecture | TextConfig, image_size: int | tuple[int, int] | None = None, frames: int = 1
) -> int:
    """Floating point operations (two per multiply-add) of all matrix products of one example's forward pass.

    The B/16 trunk at 224 px has 35.1 GFLOPs; attention pooling and the projections come on top. A causal tower is
    counted in full, as it is computed.

    Args:
      config: a tower, or both towers of a CLIP, counted together.
      image_size: pixels, (height, width) or one number for a square; None takes the native one.
      frames: of a video; the image tower sees each.

    Raises:
      ValueError: for a VLM, whose examples are of any number of chunks and tokens; its `.vision` is counted.
    """
    if isinstance(config, VLMConfig):
        raise ValueError("A VLM's work depends on its row's chunks and tokens; count its .vision for each chunk.")
    if isinstance(config, CLIPConfig):
        return forward_flops(config.vision, image_size, frames) + forward_flops(config.text)
    width = config.width
    if isinstance(config, TextConfig):
        return _block_flops(config, config.context_length) + 2 * width * config.output_width
    sides = image_size or config.image_size
    height, across = (sides, sides) if isinstance(sides, int) else sides
    patches = (height // config.patch_size) * (across // config.patch_size)
    tokens = patches + config.class_token
    flops = 2 * patches * 3 * config.patch_size**2 * width + _block_flops(config, tokens)
    if config.pool == "attention":  # keys and values of every token, one query, an MLP of four widths
        flops += 2 * tokens * 2 * width**2 + 4 * tokens * width + 2 * (2 + 8) * width**2
    return frames * (flops + 2 * width * (config.output_width or 0))


def decoder_flops(config: DecoderConfig, tokens: int, scored: int | None = None) -> int:
    """Floating point operations of all matrix products of one row's forward pass through a decoder.

    Attention is counted in full, as for a text tower, though a causal kernel skips half of it.

    Args:
      config: the decoder.
      tokens: of the row.
      scored: how many of them are scored against the vocabulary; None is all.
    """
    attended = config.heads * config.head_dim
    kernels = config.width * (2 * attended + 2 * config.kv_heads * config.head_dim + 3 * config.mlp_width)
    blocks = config.depth * (2 * tokens * kernels + 4 * tokens**2 * attended)
    return blocks + 2 * (tokens if scored is None else scored) * config.vocab_size * config.width


def _block_flops(config: VisionConfig | TextConfig, tokens: int) -> int:
    linear = 2 * tokens * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    return config.depth * (linear + 4 * tokens**2 * config.width)

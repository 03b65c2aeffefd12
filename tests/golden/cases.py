"""The stored comparisons: small but complete architectures, each axis of its own size, and what is run on them."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from pe_jax.models.clip import CLIPConfig
from pe_jax.models.text import TextConfig
from pe_jax.models.vision import VisionConfig
from tests.golden import weights

_TEXT = TextConfig(context_length=11, width=30, depth=4, heads=3, mlp_width=60, output_width=20, vocab_size=61)
_CORE = VisionConfig(20, 4, 24, 5, 3, 48, True, "attention", 20, pool_heads=2)  # as T, S, B, L; grid 5x5, head dim 8
_GIANT = VisionConfig(12, 3, 48, 3, 4, 72, False, "attention", 20, pool_heads=6)  # as G: no class token, head dim 12
_ALIGNED = dataclasses.replace(_CORE, pool="none", norm_post=False, output_width=None)

CONFIGS: dict[str, CLIPConfig | VisionConfig] = {
    "core": CLIPConfig(_CORE, _TEXT),
    "giant": CLIPConfig(_GIANT, dataclasses.replace(_TEXT, context_length=13)),
    "spatial": _ALIGNED,
    "lang": dataclasses.replace(_ALIGNED, layer_scale=0.1),
    "lang-giant": dataclasses.replace(
        _GIANT, pool="none", norm_post=False, output_width=None, layer_scale=0.1, depth=4
    ),
}


class Case(NamedTuple):
    """`forward` is a name in both `compare` and `reference`, with arguments if it takes any."""

    config: str
    forward: str
    arguments: tuple[Any, ...] = ()
    image: tuple[int, ...] = ()  # batch, (frames,) height, width
    text: tuple[int, int] | None = None  # batch, length

    def inputs(self) -> list[np.ndarray]:
        config = CONFIGS[self.config]
        out = [weights.images(1, *self.image, 3)] if self.image else []
        if self.text:
            assert isinstance(config, CLIPConfig)
            out.append(weights.ids(2, *self.text, config.text.vocab_size))
        return out


CASES: dict[str, Case] = {
    "core embedding, native": Case("core", "embedding", image=(2, 20, 20)),
    "core embedding, larger": Case("core", "embedding", image=(2, 28, 28)),
    "core embedding, oblong": Case("core", "embedding", image=(2, 12, 24)),
    "core features, oblong": Case("core", "features", (0, 2, 3, -1), image=(1, 24, 8)),
    "core text": Case("core", "text", text=(4, 11)),
    "core text, short": Case("core", "text", text=(3, 7)),
    "core pairs and scale": Case("core", "pair", image=(3, 16, 20), text=(4, 11)),
    "core video, unit frames": Case("core", "video", (True,), image=(2, 3, 8, 12)),
    "core video, raw frames": Case("core", "video", (False,), image=(2, 3, 8, 12)),
    "giant embedding, native": Case("giant", "embedding", image=(2, 12, 12)),
    "giant embedding, oblong": Case("giant", "embedding", image=(2, 9, 18)),
    "giant text": Case("giant", "text", text=(3, 13)),
    "spatial tokens, oblong": Case("spatial", "embedding", image=(1, 16, 28)),
    "lang tokens, native": Case("lang", "embedding", image=(1, 20, 20)),
    "lang features, smaller": Case("lang", "features", (1, -2), image=(2, 8, 8)),
    "lang-giant tokens, oblong": Case("lang-giant", "embedding", image=(1, 6, 15)),
}

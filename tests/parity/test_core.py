"""Every released architecture equals Meta's published module, forward and gradients, with all parameters random.

Ours runs in float32, the reference in float64 and in float32; every output and every gradient (by each parameter and by
the images) is within 1e-4 of both by `compare.error`. T, S and B run at full width, and forward at full depth; L and G
as slices of full width, since their whole gradients do not fit a small machine and every block is alike.
"""

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.text import TextConfig
from pe_jax.models.vision import VisionConfig
from tests.golden import compare, weights
from tests.parity import reference

CORE = {name[8]: zoo.architecture(name) for name in zoo.NAMES if name.startswith("PE-Core")}
NATIVE = {size: (config.vision.image_size, config.vision.image_size) for size, config in CORE.items()}


def check(
    meta: ModuleType, close: Any, config: Any, forward: str | tuple[Any, ...], *inputs: Any, **options: Any
) -> None:
    """Runs `forward` of both sides on the same weights and inputs, the reference in both precisions."""
    kind, *arguments = (forward,) if isinstance(forward, str) else forward

    def pick(side: Any) -> Any:
        return getattr(side, kind)(*arguments) if arguments else getattr(side, kind)

    tensors, module = weights.tensors(config), reference.build(meta, config)
    exact, rough = (
        reference.evaluate(module, tensors, pick(reference), *inputs, dtype=dtype, **options)
        for dtype in (torch.float64, torch.float32)
    )
    del module
    close(compare.evaluate(config, tensors, pick(compare), *inputs, **options), exact, rough)


def images(batch: int, pixels: tuple[int, int]) -> np.ndarray:
    return weights.images(1, batch, *pixels, 3)


def cut(config: VisionConfig, depth: int, **changes: Any) -> VisionConfig:
    return dataclasses.replace(config, depth=depth, **changes)


def small_text(config: TextConfig, **changes: Any) -> TextConfig:
    """Fewer words: a row of the embedding is like another."""
    return dataclasses.replace(config, vocab_size=1009, **changes)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_configuration_is_the_published_one(perception_models, name):
    from core.vision_encoder.config import PE_TEXT_CONFIG, PE_VISION_CONFIG

    config = zoo.architecture(name)
    vision = getattr(config, "vision", config)
    theirs = dataclasses.asdict(PE_VISION_CONFIG[name])
    assert reference.vision_fields(vision) == theirs
    assert int(theirs["width"] * theirs["mlp_ratio"]) == vision.mlp_width
    assert isinstance(config, CLIPConfig) == (name in PE_TEXT_CONFIG)
    if isinstance(config, CLIPConfig):
        assert reference.text_fields(config.text) == dataclasses.asdict(PE_TEXT_CONFIG[name])


@pytest.mark.parametrize("pixels", [None, (160, 160), (96, 208)], ids=["native", "square", "oblong"])
@pytest.mark.parametrize("size", "TSB")
class TestCoreVision:
    def test_embedding_at_full_depth(self, meta, close, size, pixels):
        x = images(2 if pixels else 1, pixels or NATIVE[size])
        check(meta, close, CORE[size].vision, "embedding", x, gradients=False)

    def test_features_at_full_depth(self, meta, close, size, pixels):
        x = images(1, pixels or NATIVE[size])
        check(meta, close, CORE[size].vision, ("features", 0, 1, 7, -2, -1), x, gradients=False)

    def test_gradients_of_embedding(self, meta, close, size, pixels):
        check(meta, close, cut(CORE[size].vision, 3), "embedding", images(2, pixels or NATIVE[size]))

    def test_gradients_of_features(self, meta, close, size, pixels):
        check(meta, close, cut(CORE[size].vision, 3), ("features", 0, 2, 3), images(1, pixels or NATIVE[size]))


@pytest.mark.parametrize("size", "TSB")
class TestSpatial:
    def test_tokens_at_full_depth(self, meta, close, size):
        check(
            meta,
            close,
            zoo.architecture(f"PE-Spatial-{size}16-512"),
            "embedding",
            images(1, (160, 112)),
            gradients=False,
        )

    def test_gradients(self, meta, close, size):
        config = cut(zoo.architecture(f"PE-Spatial-{size}16-512"), 3)
        check(meta, close, config, "embedding", images(2, (80, 112)))


@pytest.mark.parametrize("pixels", [(56, 56), (28, 70)], ids=["native", "oblong"])
@pytest.mark.parametrize("name", [n for n in zoo.NAMES if "14-" in n and "Tiling" not in n])
def test_slices_of_large_towers(meta, close, name, pixels):
    config = zoo.architecture(name)
    core = isinstance(config, CLIPConfig)
    tower = cut(config.vision if core else config, 1, image_size=56)
    check(meta, close, tower, "embedding", images(2, pixels))


@pytest.mark.parametrize("size", "TB")
class TestText:
    def test_embedding_at_full_depth(self, meta, close, size):
        config = small_clip(size, depth=CORE[size].text.depth)
        check(meta, close, config, "text", weights.ids(2, 6, 32, 1009), gradients=False)

    def test_gradients(self, meta, close, size):
        check(meta, close, small_clip(size, depth=3), "text", weights.ids(2, 5, 32, 1009))

    def test_shorter_than_the_context(self, meta, close, size):
        check(meta, close, small_clip(size, depth=2), "text", weights.ids(2, 3, 11, 1009))


def test_text_with_the_whole_vocabulary(meta, close):
    config = CLIPConfig(cut(CORE["T"].vision, 1), dataclasses.replace(CORE["T"].text, depth=1))
    check(meta, close, config, "text", weights.ids(2, 4, 32, 49408))


def test_slice_of_the_giant_text_tower(meta, close):
    check(meta, close, small_clip("G", depth=1), "text", weights.ids(2, 3, 72, 1009))


def small_clip(size: str, depth: int) -> CLIPConfig:
    """The text tower of `size` at `depth`, beside a vision tower kept as small as it can be."""
    config = CORE[size]
    vision = VisionConfig(16, 16, 8, 1, 1, 8, True, "class", config.text.output_width)
    return CLIPConfig(vision, small_text(config.text, depth=depth))


@pytest.fixture
def short() -> CLIPConfig:
    """T's whole CLIP at depth 2."""
    return CLIPConfig(cut(CORE["T"].vision, 2), small_text(CORE["T"].text, depth=2))


def test_pairs_and_logit_scale(meta, close, short):
    check(meta, close, short, "pair", images(3, (64, 96)), weights.ids(2, 4, 32, 1009))


@pytest.mark.parametrize("normalize", [True, False])
def test_video(meta, close, short, normalize):
    check(meta, close, short, ("video", normalize), weights.images(1, 2, 3, 48, 64, 3))


@pytest.mark.parametrize("pool", ["class", "average"])
def test_other_pools(meta, close, pool):
    check(meta, close, cut(CORE["T"].vision, 2, pool=pool), "embedding", images(2, (64, 48)))


def test_drop_path_is_off_without_a_key(meta, close):
    check(meta, close, cut(CORE["T"].vision, 3, drop_path=0.4), "embedding", images(2, (64, 48)))

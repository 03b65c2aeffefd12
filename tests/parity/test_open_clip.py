"""open_clip's PE-Core, text tower and timm's vision tower together, gives our pairs, logit scale and gradients."""

import dataclasses
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from tests.golden import compare, weights
from tests.parity import reference
from tests.parity.test_timm import renamed

NAMES = {
    "PE-Core-T16-384": "PE-Core-T-16-384",
    "PE-Core-S16-384": "PE-Core-S-16-384",
    "PE-Core-B16-224": "PE-Core-B-16",
    "PE-Core-L14-336": "PE-Core-L-14-336",
    "PE-Core-G14-448": "PE-Core-bigG-14-448",
}


@pytest.mark.parametrize("name", NAMES)
def test_text_configuration_is_open_clips(name):
    theirs, ours = open_clip.get_model_config(NAMES[name]), zoo.architecture(name)
    assert isinstance(ours, CLIPConfig)
    text = ours.text
    assert theirs["embed_dim"] == text.output_width == ours.vision.output_width
    assert theirs["vision_cfg"]["image_size"] == ours.vision.image_size
    assert theirs["text_cfg"] == {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
    }


@pytest.mark.parametrize("name", ["PE-Core-T16-384", "PE-Core-B16-224", "PE-Core-G14-448"])
def test_pairs_scale_and_gradients(close, monkeypatch, name):
    config = zoo.architecture(name)
    assert isinstance(config, CLIPConfig)
    side = 3 * config.vision.patch_size
    config = CLIPConfig(
        dataclasses.replace(config.vision, depth=1, image_size=side),
        dataclasses.replace(config.text, depth=2, vocab_size=1009),
    )
    theirs = open_clip.get_model_config(NAMES[name])
    shrunk = {"depth": 1, "img_size": side, "ref_feat_shape": (3, 3)}  # open_clip has no way to say this
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: create(*args, **more, **shrunk))
    text_fields = theirs["text_cfg"] | {"layers": 2, "vocab_size": 1009}
    module = CustomTextCLIP(theirs["embed_dim"], theirs["vision_cfg"] | {"image_size": side}, text_fields).eval()

    tensors = weights.tensors(config)
    images = weights.images(1, 2, side, side, 3)
    ids = weights.ids(2, 3, config.text.context_length, 1009)

    def forward(module: Any, images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("image", "text", "scale"), module(images, ids), strict=True))

    exact, rough = (
        reference.evaluate(module, moved(tensors), forward, images, ids, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    outputs, grads = compare.evaluate(config, tensors, compare.pair, images, ids)
    moving = {"input 0": grads.pop("input 0")}
    grads = moved(grads) | moving
    for side_grads in (grads, exact[1], rough[1]):
        side_grads.pop("visual.trunk.head.bias")  # timm's head has one, PE's projection none
    close((outputs, grads), exact, rough)


def moved(tensors: compare.Arrays) -> compare.Arrays:
    """Meta's names to open_clip's: timm's tower under `visual.trunk.`, the text tower under `text.`."""
    vision = {name[7:]: x for name, x in tensors.items() if name.startswith("visual.")}
    text = {name: np.asarray(x) for name, x in tensors.items() if not name.startswith("visual.")}
    out = {f"visual.trunk.{name}": x for name, x in renamed(vision).items()}
    return out | {name if name == "logit_scale" else f"text.{name}": x for name, x in text.items()}

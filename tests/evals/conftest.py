"""A tiny CLIP and random pictures, every axis of its own size."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from pe_jax.types import split

NAMES = ("red bars", "green bars", "blue bars")
ARCH = {
    "vision": {
        "image_size": 16,
        "patch_size": 4,
        "width": 24,
        "depth": 3,
        "heads": 2,
        "mlp_width": 40,
        "class_token": True,
        "pool": "attention",
        "pool_heads": 2,
        "output_width": 20,
    },
    "text": {
        "context_length": 12,
        "width": 32,
        "depth": 1,
        "heads": 4,
        "mlp_width": 36,
        "output_width": 20,
    },
}


def built(arch, seed):
    graphdef, _ = split(zoo.abstract(arch))
    return nnx.merge(graphdef, jax.jit(lambda: split(zoo.build(arch, nnx.Rngs(seed)))[1])())  # one compilation


@pytest.fixture(scope="session")
def model():
    model = built(ARCH, 3)
    model.preprocess = Preprocess(16)
    return model


@pytest.fixture(scope="session")
def tower():
    config = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 2, "mlp_width": 40}
    return built(config | {"class_token": False, "pool": "none", "output_width": None, "norm_post": False}, 0)


@pytest.fixture(scope="session")
def pictures():
    """11 pictures of 3 classes that differ in colour and stripes, so that features can tell them apart."""
    random = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    images = random.integers(0, 90, (11, 18, 21, 3)).astype(np.uint8)
    for row, label in enumerate(labels):
        images[row, :, :: label + 2, label] += 150
    return list(images), labels


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, pictures):
    """The pictures as files and a JSON line each; the source's config."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, (image, label) in enumerate(zip(*pictures, strict=True)):
        PIL.Image.fromarray(image).save(folder / f"{i:02}.png")
        lines.append(
            {"image": f"{i:02}.png", "label": int(label), "cls": NAMES[label], "caption": f"{NAMES[label]} {i}"}
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}

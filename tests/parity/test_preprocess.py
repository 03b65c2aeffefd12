"""Our pixels against Meta's image transform, live: every mode, size and filter, bit for bit."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

from pe_jax.data.image import Preprocess

_spec = importlib.util.spec_from_file_location("golden_make", pathlib.Path(__file__).parents[1] / "data/golden/make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

SOURCES = [(37, 53), (53, 37), (64, 64), (31, 90), (97, 32), (224, 96), (33, 32), (1, 1), (500, 3)]


@pytest.fixture(scope="module")
def meta_transform(perception_models):
    from core.vision_encoder import transforms
    from torchvision.transforms import InterpolationMode

    def transform(image, size, how, filter):
        made = transforms.get_image_transform(size, how == "crop", InterpolationMode(filter))
        return made(image).permute(1, 2, 0).numpy()

    return transform


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("how", ["squash", "crop"])
@pytest.mark.parametrize("mode", [*golden.MODES, "I", "F"])
def test_pixels_equal(meta_transform, mode, how, filter):
    for source, size in itertools.product(SOURCES, (24, 32, 53)):
        image = golden.picture("L", *source).convert(mode) if mode in ("I", "F") else golden.picture(mode, *source)
        want = meta_transform(image, size, how, filter)
        np.testing.assert_array_equal(Preprocess(size, how, filter)(image)[0], want, err_msg=f"{source} to {size}")


@pytest.mark.parametrize(("source", "target"), golden.SIZES)
def test_pixels_equal_at_the_sizes_of_the_released_models(meta_transform, source, target):
    image = golden.picture("RGB", *source)
    for how in ("squash", "crop"):
        want = meta_transform(image, target[0], how, "bilinear")
        np.testing.assert_array_equal(Preprocess(target, how)(image)[0], want)


@pytest.mark.parametrize("target", [(24, 40), (40, 24), (33, 31)])
def test_a_squash_to_a_rectangle_equals_torchvisions(target):
    from torchvision import transforms

    image = golden.picture("RGB", 61, 47)
    want = np.asarray(transforms.Resize(target)(image))
    np.testing.assert_array_equal(Preprocess(target).pixels(image), want)

"""Our augmentations against torchvision's: the same pixels from the same factors, the same distribution of crops."""

import importlib.util
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

from pe_jax.data.image import Augment, _random_box, generator

_spec = importlib.util.spec_from_file_location("golden_make", pathlib.Path(__file__).parents[1] / "data/golden/make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

PE = Augment(crop_scale=(0.08, 1.0), crop_ratio=(0.75, 1.33), brightness=0.32, saturation=0.32, hflip=0.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_the_same_draws_give_torchvisions_pixels(mode):
    from torchvision.transforms import functional

    image, size = golden.picture(mode, 120, 90), (40, 56)
    orders = set()
    for position in range(40):
        got = PE(image, size, generator(7, position))
        rng = generator(7, position)
        crop, (flip, order, bright, saturate) = rng.random((10, 4)), rng.random(4)
        left, top, right, bottom = _random_box(image.size, PE.crop_scale, PE.crop_ratio, crop)
        want = functional.resized_crop(image, top, left, bottom - top, right - left, list(size)).convert("RGB")
        steps = [
            lambda x, f=1 + 0.32 * (2 * bright - 1): functional.adjust_brightness(x, f),
            lambda x, f=1 + 0.32 * (2 * saturate - 1): functional.adjust_saturation(x, f),
        ]
        for step in steps if order < 0.5 else steps[::-1]:
            want = step(want)
        want = functional.hflip(want) if flip < 0.5 else want
        np.testing.assert_array_equal(got, np.asarray(want))
        orders.add((order < 0.5, flip < 0.5))
    assert len(orders) == 4


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (64, 64), (200, 40)])
def test_crops_are_distributed_as_torchvisions(size):
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = PIL.Image.new("L", size)
    count = 4000
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [0.75, 1.33]) for _ in range(count)])
    boxes = np.array(
        [_random_box(size, (0.08, 1.0), (0.75, 1.33), generator(0, i).random((10, 4))) for i in range(count)]
    )
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)
    for name, a, b in zip(("top", "left", "height", "width"), ours.T, theirs.T, strict=True):
        assert ks(a, b) < 1.95 * (2 / count) ** 0.5, name  # Kolmogorov-Smirnov at 0.1 %
    assert ks(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < 1.95 * (2 / count) ** 0.5
    assert ks(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]) < 1.95 * (2 / count) ** 0.5


def ks(a: np.ndarray, b: np.ndarray) -> float:
    at = np.union1d(a, b)
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_a_crop_that_never_fits_is_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    for size in ((10, 400), (400, 10), (9, 333), (41, 7)):
        image = PIL.Image.new("L", size)
        top, left, height, width = RandomResizedCrop.get_params(image, [1.0, 1.0], [0.75, 1.33])
        box = _random_box(size, (1.0, 1.0), (0.75, 1.33), generator(0, 0).random((10, 4)))
        assert box == (left, top, left + width, top + height)

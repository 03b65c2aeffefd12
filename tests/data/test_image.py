"""Pixels against stored digests of Meta's transform; augmentation; decoding errors."""

import importlib.util
import io
import json
import math
import pathlib

import numpy as np
import PIL.Image
import pytest

from pe_jax.data.image import Augment, BadImage, Preprocess, decode, generator

HERE = pathlib.Path(__file__).parent
_spec = importlib.util.spec_from_file_location("golden_make", HERE / "golden/make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
DIGESTS = json.loads((HERE / "golden/pixels.json").read_text())
CASES = {name: rest for name, *rest in golden.cases()}


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_metas(name):
    mode, source, target, how, filter = CASES[name]
    image = Preprocess(target, how, filter)(golden.picture(mode, *source))
    assert image.shape == (1, *target, 3) and image.dtype == np.float32
    assert golden.digest(image[0]) == DIGESTS[name]


def test_every_stored_image_has_its_case():
    assert set(CASES) == set(DIGESTS) and len(golden.SIZES) == 18


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
    image = PIL.Image.fromarray(array)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    pre = Preprocess((12, 16))
    want = pre(image)
    forms = [array, data, str(tmp_path / "a.png"), tmp_path / "a.png", array[None]]
    assert all((pre(form) == want).all() for form in forms)
    batch = pre([image, data, array])
    assert batch.shape == (3, 12, 16, 3) and (batch == want).all()


def test_the_range_is_minus_one_to_one():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert (Preprocess(4)(black) == -1).all() and (Preprocess(4)(white) == 1).all()


@pytest.mark.parametrize(("source", "target"), [((31, 90), (32, 20)), ((90, 31), (20, 32)), ((40, 40), (24, 36))])
def test_a_crop_of_any_shape_is_covered_and_keeps_the_aspect_ratio(source, target):
    ramp = np.linspace(0, 255, source[0])[:, None, None] + np.zeros((*source, 3))
    out = Preprocess(target, "crop").pixels(ramp.astype(np.uint8))
    assert out.shape == (*target, 3)
    assert abs(float(out.mean()) - 127.5) < 4  # the centre is kept


def test_palette_images_differ_where_rgb_comes_first():
    image = golden.picture("P", 120, 90)
    assert (Preprocess(64)(image) != Preprocess(64, rgb_first=True)(image)).any()


def test_exif_orientation_is_ignored_unless_asked_for():
    array = np.zeros((10, 20, 3), np.uint8)
    array[:5] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG", exif=exif)
    plain, turned = Preprocess(8)(buffer.getvalue())[0], Preprocess(8, exif=True)(buffer.getvalue())[0]
    assert plain[0].mean() == 1 and abs(turned[0].mean()) < 0.2


def test_the_record_survives_json():
    record = Preprocess(
        (24, 36), "crop", "bicubic", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), rgb_first=True, exif=True
    )
    assert Preprocess.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert Preprocess.from_dict({"size": 7}) == Preprocess(7) == Preprocess((7, 7))
    assert hash(Preprocess(7)) == hash(Preprocess((7, 7)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 7, "sizes": 8}, "Preprocess has no 'sizes'; its fields are size, mode"),
        ({"mode": "crop"}, "Preprocess needs a size"),
        ({"size": 7, "mode": "stretch"}, "mode='stretch' must be one of"),
        ({"size": 7, "filter": "lanczos"}, "filter='lanczos' must be one of"),
        ({"size": 0}, "must be a number of pixels"),
        ({"size": [3, 4, 5]}, "must be a number of pixels|size"),
        ({"size": 7, "std": [1, 0, 1]}, "std=.* must be three numbers"),
    ],
)
def test_a_wrong_record_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        Preprocess.from_dict(fields)


def test_a_damaged_image_is_named(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(array).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:900])
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, message in (
        ("cut.jpg", r"cut.jpg cannot be decoded \(900 bytes\): .*[Tt]runcated"),
        ("page.jpg", r"page.jpg is in no image format that Pillow knows: 16 bytes that start with b'<html>40'"),
        ("empty.jpg", r"empty.jpg is in no image format .* 0 bytes"),
        ("none.jpg", r"none.jpg does not exist"),
        (".", "cannot be read"),
    ):
        with pytest.raises(BadImage, match=message):
            Preprocess(8)(tmp_path / name)
    with pytest.raises(BadImage, match="sample 3 cannot be decoded"):
        decode((tmp_path / "cut.jpg").read_bytes(), "sample 3")
    with PIL.Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(BadImage, match=r"cut.jpg cannot be decoded"):
        Preprocess(8)(lazy)


@pytest.mark.parametrize("shape", [(4, 4, 2), (4,), (0, 4, 3), (1, 2, 4, 4, 3)])
def test_an_array_of_another_shape_is_refused(shape):
    with pytest.raises(BadImage, match="wanted uint8"):
        Preprocess(8)(np.zeros(shape, np.uint8))
    with pytest.raises(BadImage, match="is float32"):
        Preprocess(8)(np.zeros((4, 4, 3), np.float32))


# ---- augmentation --------------------------------------------------------------------------------------------------

PE = Augment(crop_scale=(0.08, 1.0), crop_ratio=(0.75, 4 / 3), brightness=0.32, saturation=0.32, hflip=0.5)
PHOTO = golden.picture("RGB", 60, 45)


def test_augmented_pixels_are_a_function_of_seed_and_position():
    def draw(seed, position):
        return PE(PHOTO, (24, 32), generator(seed, position))

    assert draw(3, 5).shape == (24, 32, 3) and draw(3, 5).dtype == np.uint8
    assert (draw(3, 5) == draw(3, 5)).all()
    assert (draw(3, 5) != draw(3, 6)).any() and (draw(3, 5) != draw(4, 5)).any()


def test_nothing_switched_on_is_the_squash_of_the_evaluation():
    assert (Augment()(PHOTO, (24, 32), generator(0, 0)) == Preprocess((24, 32)).pixels(PHOTO)).all()


def test_switching_one_augmentation_leaves_the_others_as_they_were():
    plain = Augment(crop_scale=(0.08, 1.0))
    flipping = Augment(crop_scale=(0.08, 1.0), hflip=1.0)
    for position in range(5):
        straight = plain(PHOTO, (16, 20), generator(0, position))
        assert (flipping(PHOTO, (16, 20), generator(0, position)) == straight[:, ::-1]).all()


def boxes(count: int, size=(400, 300), scale=(0.08, 1.0), ratio=(0.75, 4 / 3)):
    from pe_jax.data.image import _random_box

    found = [_random_box(size, scale, ratio, generator(0, i).random((10, 4))) for i in range(count)]
    return np.array(found, np.float64)


def test_crops_stay_inside_and_keep_to_scale_and_ratio():
    left, top, right, bottom = boxes(3000).T
    width, height = right - left, bottom - top
    assert left.min() == 0 and top.min() == 0 and right.max() == 400 and bottom.max() == 300
    area, ratio = width * height / 120_000, width / height
    assert area.min() > 0.075 and area.max() <= 1 and ratio.min() > 0.73 and ratio.max() < 1.36
    small = area < 0.3  # these fit whatever their ratio, so they are even in area and in the log of the ratio
    assert abs(area[small].mean() - (0.08 + 0.3) / 2) < 0.01
    assert abs(np.log(ratio[small]).mean()) < 0.02  # as often wide as tall
    centre = (left + right)[small] / 2
    assert abs(centre.mean() - 200) < 6


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    tall = boxes(1, size=(10, 400), scale=(1.0, 1.0))[0]
    wide = boxes(1, size=(400, 10), scale=(1.0, 1.0))[0]
    assert tall.tolist() == [0, 193, 10, 206] and wide.tolist() == [193, 0, 206, 10]
    assert boxes(1, size=(1, 1))[0].tolist() == [0, 0, 1, 1]


def test_aspect_jitter_keeps_the_largest_crop_of_a_drawn_shape_where_a_crop_of_all_the_area_keeps_one_shape():
    from pe_jax.data.image import _largest_box

    found = [_largest_box((400, 300), (0.75, 4 / 3), generator(0, i).random((10, 4))[0]) for i in range(1000)]
    left, top, right, bottom = np.array(found, np.float64).T
    width, height = right - left, bottom - top
    assert ((width == 400) | (height == 300)).all() and width.max() == 400 and height.max() == 300
    assert 0.748 < (width / height).min() < 0.77 and 1.31 < (width / height).max() < 1.336
    assert abs(np.log(width / height).mean()) < 0.02  # as often wide as tall
    narrow = width < 300  # of these the place varies enough to see that it is drawn evenly
    assert abs((left[narrow] / (400 - width[narrow])).mean() - 0.5) < 0.05
    assert np.abs(boxes(50, scale=(1.0, 1.0)) - [0, 0, 400, 300]).max() <= 1


def test_an_aspect_jittered_map_follows_its_image():
    jitter = Augment(aspect=(0.75, 4 / 3), hflip=0.5)
    image = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 45, 0).repeat(3, 2)
    for i in range(8):
        pixels = jitter(image, (12, 12), generator(2, i))[:, :, 0].astype(int)
        values = jitter.map(image[:, :, 0].astype(np.int32), (12, 12), generator(2, i))
        assert np.abs(pixels - values).max() <= 3


def test_flips_and_factors_have_the_stated_rates():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = 100
    flips = Augment(hflip=0.3)
    left = [flips(image, (4, 4), generator(1, i))[0, 0, 0] == 0 for i in range(2000)]
    assert abs(np.mean(left) - 0.3) < 0.035
    grey = np.full((2, 2, 3), 100, np.uint8)
    bright = [int(Augment(brightness=0.32)(grey, (2, 2), generator(1, i))[0, 0, 0]) for i in range(2000)]
    assert min(bright) in (68, 69) and max(bright) in (131, 132) and abs(np.mean(bright) - 100) < 1.5


def test_saturation_moves_colours_about_their_grey_value_and_leaves_grey_alone():
    jitter = Augment(saturation=0.32)
    grey = np.full((2, 2, 3), 90, np.uint8)
    colour = np.zeros((2, 2, 3), np.uint8) + np.array([200, 60, 60], np.uint8)
    spreads = []
    for i in range(200):
        assert (jitter(grey, (2, 2), generator(0, i)) == 90).all()
        out = jitter(colour, (2, 2), generator(0, i))[0, 0].astype(int)
        spreads.append((out[0] - out[1]) / 140)
    assert math.isclose(min(spreads), 0.68, abs_tol=0.03) and math.isclose(max(spreads), 1.32, abs_tol=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": (0.1, 1)}, "Augment has no 'crop'"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "greatest <= 1.0"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"aspect": (1.2, 0.8)}, "aspect"),
        ({"aspect": (0.8, 1.2), "crop_scale": (0.5, 1.0)}, "takes the place of crop_scale"),
        ({"hflip": 1.5}, r"hflip=1.5 must lie in \[0, 1\]"),
    ],
)
def test_a_wrong_augmentation_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Augment.from_dict(fields)

"""Clips in DAVIS's layout, and J and F by the published definition, on cases counted by hand and by SciPy."""

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from pe_jax.evals import davis


def square(height, width, top, left, side):
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def plain_contour(found, truth, share=0.008):
    """The published definition in its own words: outline by three shifts, dilation by a disc, precision and recall."""

    def outline(mask):
        out = np.zeros_like(mask)
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                right, below = min(x + 1, mask.shape[1] - 1), min(y + 1, mask.shape[0] - 1)
                corner = mask[y, x] if x == right or y == below else mask[below, right]
                out[y, x] = mask[y, x] != mask[y, right] or mask[y, x] != mask[below, x] or mask[y, x] != corner
        return out

    radius = int(np.ceil(share * np.linalg.norm(found.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = x**2 + y**2 <= radius**2
    one, two = outline(found), outline(truth)
    if one.sum() == 0 or two.sum() == 0:
        return float(one.sum() == two.sum())
    precision = (one & scipy.ndimage.binary_dilation(two, disc)).sum() / one.sum()
    recall = (two & scipy.ndimage.binary_dilation(one, disc)).sum() / two.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def f(found, truth, tolerance=davis.TOLERANCE):
    return davis.contour(davis.Contour(found, tolerance), davis.Contour(truth, tolerance))


def test_region_and_contour_of_a_shifted_square_are_those_counted_by_hand():
    truth, found = square(40, 60, 10, 10, 8), square(40, 60, 10, 12, 8)
    assert davis.region(found, truth) == 48 / 80  # 6 of 8 columns in common
    # The outline of a square of 8: the row above, 9 pixels with the corner; the last row, 8; the column at the left,
    # 8; the last column, 7 more: a pixel counts for the one at its right, below, or below right.
    assert davis.Contour(truth).count == 9 + 8 + 8 + 7
    # Within 1 pixel of the other's: 8 of 9 above, 7 of the last row (8 of the other's), 3 of the column at the left
    # (0), 0 of the last column (2).
    assert f(found, truth) == 18 / 32
    assert f(found, truth, tolerance=2 / np.hypot(40, 60)) == 1


def test_contour_equals_a_plain_implementation_on_random_shapes():
    random = np.random.default_rng(0)
    for height, width, tolerance in ((30, 47, 0.03), (64, 33, 0.008), (25, 25, 0.1)):
        one, two = (scipy.ndimage.gaussian_filter(random.normal(size=(height, width)), 3) > 0.02 for _ in range(2))
        assert 0.05 < f(one, two, tolerance) < 1
        np.testing.assert_allclose(f(one, two, tolerance), plain_contour(one, two, tolerance), rtol=1e-12)


def test_empty_masks():
    empty, some = np.zeros((20, 30), bool), square(20, 30, 3, 4, 6)
    assert davis.region(empty, empty) == 1 and f(empty, empty) == 1
    assert davis.region(some, empty) == 0 and f(some, empty) == f(empty, some) == 0
    full = np.ones((20, 30), bool)  # has no outline either
    assert davis.region(full, some) == 36 / 600 and f(full, some) == 0 and f(full, full) == 1


def test_dilation_is_by_a_disc():
    random = np.random.default_rng(1)
    for radius in (0, 1, 3, 8):
        mask = random.random((31, 44)) > 0.99
        mask[0, 0] = mask[-1, -1] = True
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        wanted = scipy.ndimage.binary_dilation(mask, x**2 + y**2 <= radius**2)
        np.testing.assert_array_equal(davis.dilated(mask, radius), wanted)
        box = np.zeros((31, 44), bool)
        box[11:14, 20:22] = True
        wanted = scipy.ndimage.binary_dilation(box, x**2 + y**2 <= radius**2)
        np.testing.assert_array_equal(davis.dilated(box, radius), wanted)


def test_statistics_are_mean_recall_and_decay():
    found = davis.statistics(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
    # Quarters of nine values share their ends: the first is values 1 to 3, the last 7 to 9.
    assert found == pytest.approx({"mean": 0.5, "recall": 4 / 9, "decay": 0.8 - 0.2})


def written(folder, name, frames=4, objects=2, size=(12, 10), lose_mask=None, lose_frame=None, images=None, masks=None):
    images, masks = images or folder / name / "frames", masks or folder / name / "masks"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for i in range(frames):
        mask = np.zeros(size[::-1], np.uint8)
        for number in range(objects):
            mask[1 + 4 * number : 4 + 4 * number, i : i + 3] = number + 1
        mask[-1, -1] = 255
        image = PIL.Image.fromarray(mask)
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())  # a short one would lose 255
        if i != lose_frame:
            PIL.Image.fromarray(np.stack([mask * 50] * 3, -1)).save(images / f"{i:05}.jpg")
        if i != lose_mask:
            image.save(masks / f"{i:05}.png")


def test_clips_are_found_in_every_layout(tmp_path):
    root = tmp_path / "DAVIS"
    for name in ("bear", "car"):
        where = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        written(None, name, **dict(zip(("images", "masks"), where, strict=True)))
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("car\nbear\n")
    (root / "ImageSets" / "2017" / "train.txt").write_text("bear\n")
    found = davis.clips(str(root))
    assert [(clip.name, len(clip)) for clip in found] == [("car", 4), ("bear", 4)]
    assert [clip.name for clip in davis.clips({"path": str(root), "split": "train"})] == ["bear"]
    assert [clip.name for clip in davis.clips({"path": str(root), "limit": 1})] == ["car"]
    mask = found[0].mask(1)
    assert mask.max() == 2 and mask[-1, -1] == 0 and (mask[1:4, 1:4] == 1).all()  # 255 counts as background
    written(tmp_path / "clips", "one")
    written(tmp_path / "clips", "two")
    assert [clip.name for clip in davis.clips(str(tmp_path / "clips"))] == ["one", "two"]
    assert [clip.name for clip in davis.clips(str(tmp_path / "clips" / "one"))] == ["one"]


def test_what_is_missing_is_named(tmp_path):
    written(tmp_path, "lost", lose_mask=2)
    with pytest.raises(ValueError, match=r"1 of 4 frames lack a mask, first .*masks/00002.png"):
        davis.clips(str(tmp_path / "lost"))
    written(tmp_path, "gap", lose_frame=1)
    with pytest.raises(ValueError, match=r"1 of 4 masks lack a frame, first .*frames/00001.jpg"):
        davis.clips(str(tmp_path / "gap"))
    written(tmp_path, "short", frames=2)
    with pytest.raises(ValueError, match="want 3 or more"):
        davis.clips(str(tmp_path / "short"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clips"):
        davis.clips(str(tmp_path / "empty"))
    (tmp_path / "DAVIS" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"2017/val.txt does not exist; set `year` and `split`"):
        davis.clips(str(tmp_path / "DAVIS"))
    with pytest.raises(ValueError, match="no field 'folder'"):
        davis.clips({"path": str(tmp_path), "folder": 1})
    with pytest.raises(ValueError, match="limit=0"):
        davis.clips({"path": str(tmp_path), "limit": 0})
    written(tmp_path, "rgb")
    PIL.Image.new("RGB", (12, 10)).save(tmp_path / "rgb" / "masks" / "00000.png")
    with pytest.raises(ValueError, match="has mode RGB; want one number a pixel"):
        davis.clips(str(tmp_path / "rgb"))[0].mask(0)

"""Images with masks and depths as evaluators read them, and what does not fit together."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from pe_jax.data import sources
from pe_jax.evals import maps

MASK = (np.arange(12 * 9).reshape(9, 12) % 5).astype(np.uint8)
MILLIMETRES = 1000 * MASK.astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    for name in ("image.png", "small.png"):
        PIL.Image.new("RGB", (12, 9) if name == "image.png" else (11, 9)).save(root / name)
    palette = PIL.Image.fromarray(MASK)
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / "mask.png")
    PIL.Image.fromarray(MILLIMETRES).save(root / "depth.png")
    PIL.Image.new("RGB", (12, 9)).save(root / "colours.png")
    return root


def opened(folder, record, kind="mask", **own):
    line = {"image": "image.png"} | record
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    return maps.open({"name": "jsonl", "path": str(folder / "data.jsonl")} | own, kind)


def test_masks_are_the_numbers_of_the_file(folder):
    own = opened(folder, {"mask": "mask.png"})
    np.testing.assert_array_equal(own.labels(0), MASK)
    assert own.labels(0).dtype == np.int32 and own.size(0) == (9, 12) and own.image(0).size == (12, 9)
    own = opened(folder, {"labels": "mask.png"}, mask="labels", foreground=True)
    np.testing.assert_array_equal(own.labels(0), MASK > 0)


def test_depths_are_metres_and_0_where_there_is_none(folder):
    own = opened(folder, {"depth": "depth.png", "units_per_metre": 2000}, "depth")
    np.testing.assert_allclose(own.metres(0), MASK / 2)
    assert own.metres(0).dtype == np.float32
    own = opened(folder, {"depth": "depth.png", "units_per_metre": 2000}, "depth", units_per_metre=500)
    np.testing.assert_allclose(own.metres(0), MASK * 2.0)
    with pytest.raises(ValueError, match=r"data.jsonl record 0 does not say its unit; set `units_per_metre`"):
        opened(folder, {"depth": "depth.png"}, "depth").metres(0)


def test_maps_may_be_bytes_or_arrays(folder, tmp_path):
    file = io.BytesIO()
    PIL.Image.fromarray(MASK).save(file, "png")
    records = [{"image": (folder / "image.png").read_bytes(), "mask": file.getvalue(), "label": 3}]
    sources.write_shard(str(tmp_path / "x.array_record"), records)
    own = maps.open({"name": "array_record", "path": str(tmp_path / "x.array_record")}, "mask")
    np.testing.assert_array_equal(own.labels(0), MASK)
    assert own.size(0) == (9, 12)

    class Arrays:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": np.zeros((9, 12, 3), np.uint8), "depth": np.where(MASK == 1, np.nan, MASK)[..., None]}

        def where(self, index):
            return "here"

    own = maps.Maps(Arrays(), "depth", 1, "depth", units_per_metre=1.0)
    np.testing.assert_array_equal(own.metres(0), np.where(MASK == 1, 0, MASK))


def test_published_lists_and_folders_are_read(folder, tmp_path):
    (tmp_path / "list.txt").write_text("/image.png /depth.png 518.8\n" * 3)
    config = {"name": "listed", "path": str(tmp_path / "list.txt"), "root": str(folder), "limit": 2}
    own = maps.open(config, "depth")
    assert len(own) == 2
    np.testing.assert_allclose(own.metres(1), MASK)
    np.testing.assert_allclose(maps.open(config | {"units_per_metre": 256}, "depth").metres(0), MILLIMETRES / 256)
    for kind, name in (("images", "image.png"), ("maps", "mask.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes((folder / name).read_bytes())
    own = maps.open({"name": "pairs", "path": str(tmp_path / "images"), "maps": str(tmp_path / "maps")}, "mask")
    np.testing.assert_array_equal(own.labels(0), MASK)


def test_what_does_not_fit_is_refused(folder):
    for record, message in (
        ({"labels": "mask.png"}, r"has no mask; its fields are .*labels.*\"mask\": FIELD"),
        ({"mask": "colours.png"}, r"is \[9, 12, 3\]; want one number a pixel"),
        ({"mask": "mask.png", "image": "small.png"}, r"is 12x9 pixels and the image 11x9"),
        ({"mask": "nowhere.png"}, r"nowhere.png does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(folder, record).labels(0)

"""Images with maps: folders, lists, NYU's own file; and the crop and flip of an image done to its map."""

import pickle

import h5py
import numpy as np
import PIL.Image
import pytest
import scipy.io

from pe_jax.data import sources
from pe_jax.data.image import Augment, generator


def test_folders_pair_images_and_maps_by_name(tmp_path):
    for name in ("b/one", "a/two"):
        for kind, ending in (("images", ".jpg"), ("maps", "_x.png")):
            file = tmp_path / kind / f"{name}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (4, 3)).save(file)
    (tmp_path / "maps" / "b" / "stray_x.png").write_bytes(b"")
    config = {"name": "pairs", "path": str(tmp_path / "images"), "maps": str(tmp_path / "maps"), "ending": "_x.png"}
    source = sources.create(config)
    assert len(source) == 2 and source.where(1).endswith("images/b/one.jpg")
    assert source[0] == {
        "image": str(tmp_path / "images/a/two.jpg"),
        "mask": str(tmp_path / "maps/a/two_x.png"),
    }
    assert set(sources.create(config | {"field": "depth"})[1]) == {"image", "depth"}
    (tmp_path / "maps" / "b" / "one_x.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images in .* have no map in .*, first b/one_x.png"):
        sources.create(config)
    with pytest.raises(ValueError, match="is no folder"):
        sources.create(config | {"maps": str(tmp_path / "nowhere")})


def test_lists_name_an_image_and_its_depth_a_line(tmp_path):
    file = tmp_path / "test.txt"
    file.write_text("/rgb/0.jpg /depth/0.png 518.8\n\nrgb/1.jpg None 518.8\nrgb/2.jpg depth/2.png 518.8\n")
    source = sources.create({"name": "listed", "path": str(file), "root": "data"})
    assert len(source) == 2 and source.where(1).endswith("test.txt line 4")
    assert source[0] == {"image": "data/rgb/0.jpg", "depth": "data/depth/0.png", "units_per_metre": 1000.0}
    assert sources.create({"name": "listed", "path": str(file)})[1]["image"] == str(tmp_path / "rgb/2.jpg")
    file.write_text("only.jpg\n")
    with pytest.raises(ValueError, match=r"line 1: want an image and a depth, got 'only.jpg'"):
        sources.create({"name": "listed", "path": str(file)})
    with pytest.raises(ValueError, match=r"none.txt cannot be read"):
        sources.create({"name": "listed", "path": str(tmp_path / "none.txt")})


def test_the_labelled_set_is_read_as_it_is_published(tmp_path):
    """MATLAB writes [H, W, 3, N] column by column, which HDF5 sees as [N, 3, W, H], and counts images from 1."""
    random = np.random.default_rng(0)
    images, depths = random.integers(0, 256, (4, 5, 3, 7)).astype(np.uint8), random.random((4, 5, 7), np.float32)
    path = str(tmp_path / "nyu_depth_v2_labeled.mat")
    with h5py.File(path, "w") as file:
        file["images"], file["depths"] = images.T, depths.T
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [4], [6]], "testNdxs": [[2], [7]]})
    source = sources.create({"name": "labelled", "path": path})
    assert len(source) == 2 and len(sources.create({"name": "labelled", "path": path, "split": "train"})) == 3
    for own in (source, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(own[1]["image"], images[..., 6])
        np.testing.assert_array_equal(own[1]["depth"], depths[..., 6])
    assert source[0]["units_per_metre"] == 1 and source.where(1) == f"{path} image 7"
    with pytest.raises(ValueError, match="split='val' is unknown; NYU Depth v2 has train and test"):
        sources.create({"name": "labelled", "path": path, "split": "val"})
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[8]]})
    with pytest.raises(ValueError, match=r"names image 8 and .*labeled.mat has 7"):
        sources.create({"name": "labelled", "path": path})
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(ValueError, match=r"old.mat is not HDF5"):
        sources.create({"name": "labelled", "path": str(tmp_path / "old.mat")})
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(ValueError, match=r"splits.mat does not exist here; want"):
        sources.create({"name": "labelled", "path": path})


def test_a_map_is_cropped_and_flipped_as_its_image():
    down, across = np.mgrid[:60, :90]
    image = np.stack([4 * down, 2 * across, 0 * down], -1).astype(np.uint8)
    flipped = 0
    for position in range(12):
        for augment in (Augment(), Augment(crop_scale=(0.1, 0.6), hflip=0.5, brightness=0.0, saturation=0.0)):
            seen = augment(image, (30, 30), generator(0, position)).astype(int)
            for values, channel, slope in ((4 * down, 0, 8), (2 * across, 1, 6)):
                found = augment.map(values.astype(np.int32), (30, 30), generator(0, position))
                assert found.shape == (30, 30) and found.dtype == np.int32
                assert np.abs(found - seen[..., channel]).max() <= slope + 1  # two pixels: one is smoothed, one is not
        flipped += seen[0, 0, 1] > seen[0, -1, 1]
    assert 2 < flipped < 10
    assert Augment(hflip=1).map(across.astype(np.float32), (60, 90), generator(0, 0))[0, 0] == 89

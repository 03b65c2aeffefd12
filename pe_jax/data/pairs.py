"""Images with a map of their pixels, as ADE20K and NYUv2 keep them: masks of classes, or depths.

A record has `image`, and the map as `mask` or `depth`, each a path or an array; with depths also `units_per_metre`.
"""

import os
from typing import Any

import numpy as np

from pe_jax import paths
from pe_jax.data.image import BadImage, read_bytes

_ENDINGS = (".jpg", ".jpeg", ".png")


class Folders:
    """A folder of images and one of maps, with the same names below both: ADE20K, Pascal VOC, Cityscapes' own tree.

    ADE20K's validation split is {"name": "pairs", "path": "ADEChallengeData2016/images/validation",
    "maps": "ADEChallengeData2016/annotations/validation"}.

    Args:
      path: folder of the images; folders within it count.
      maps: folder of the maps.
      field: what the map is called in a record, "mask" or "depth".
      ending: what follows an image's name without its ending in the map's, such as "_sem.png".
    """

    def __init__(self, path: str, maps: str, field: str = "mask", ending: str = ".png"):
        self.path, self.maps, self.field = path, maps, field
        below = {folder: _below(folder) for folder in (path, maps)}
        images = {os.path.splitext(name)[0]: name for name in below[path] if name.lower().endswith(_ENDINGS)}
        masks = {name.removesuffix(ending) for name in below[maps] if name.endswith(ending)}
        self.stems = sorted(images)
        self.names = images
        self.ending = ending
        if lost := [stem for stem in self.stems if stem not in masks]:
            raise ValueError(
                f"{len(lost)} of {len(images)} images in {path} have no map in {maps}, first {lost[0]}{ending}."
            )

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stem = self.stems[index]
        return {
            "image": os.path.join(self.path, self.names[stem]),
            self.field: os.path.join(self.maps, stem + self.ending),
        }

    def where(self, index: int) -> str:
        return os.path.join(self.path, self.names[self.stems[index]])


class Listed:
    """A list of images and depths, a line each as `IMAGE DEPTH FOCAL_LENGTH`: NYUv2 and KITTI as depth codes keep them.

    Lines whose depth is `None` are left out. NYUv2's depth is in millimetres, KITTI's in 1/256 m.

    Args:
      path: the list, such as nyu_test.txt.
      root: folder the paths start from; by default the folder of `path`.
      units_per_metre: what a map's numbers are divided by.
    """

    def __init__(self, path: str, root: str | None = None, units_per_metre: float = 1000.0):
        self.path, self.root = path, root if root is not None else os.path.dirname(path)
        self.units_per_metre = units_per_metre
        try:
            text = read_bytes(path).decode("utf-8")
        except (BadImage, UnicodeDecodeError) as error:
            raise ValueError(f"the list {path} cannot be read: {error}") from error
        self.lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        for number, parts in self.lines:
            if len(parts) < 2:
                raise ValueError(f"{path} line {number}: want an image and a depth, got {' '.join(parts)!r:.60}.")
        self.lines = [(number, parts) for number, parts in self.lines if parts[1] != "None"]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Published lists begin their paths with a slash that means the root.
        image, depth = (os.path.join(self.root, part.lstrip("/")) for part in self.lines[index][1][:2])
        return {"image": image, "depth": depth, "units_per_metre": self.units_per_metre}

    def where(self, index: int) -> str:
        return f"{self.path} line {self.lines[index][0]}"


class Labelled:
    """NYU Depth v2's labelled images as they are published: `nyu_depth_v2_labeled.mat` and `splits.mat` beside it.

    Records have arrays: `image` [480, 640, 3] and `depth` [480, 640] in metres, with the holes of the sensor filled in.

    Args:
      path: the file of images and depths, on this machine: HDF5, of which one image at a time is read.
      split: "train", 795 images, or "test", 654.
    """

    def __init__(self, path: str, split: str = "test"):
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} is unknown; NYU Depth v2 has train and test.")
        self.path, self.split, self._file = path, split, None
        beside = os.path.join(os.path.dirname(path), "splits.mat")
        for file in (path, beside):
            if not os.path.isfile(file):
                raise ValueError(
                    f"{file} does not exist here; want nyu_depth_v2_labeled.mat and splits.mat, as published."
                )
        import scipy.io  # which JAX brings

        self._places = scipy.io.loadmat(beside)[f"{split}Ndxs"].ravel().astype(int) - 1
        if self._places.max() >= (count := len(self._open()["depths"])):
            raise ValueError(
                f"{beside} names image {self._places.max() + 1} and {path} has {count}; they are of two sets."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, place = self._open(), int(self._places[index])
        # MATLAB counts axes from the other end.
        image, depth = (np.ascontiguousarray(np.transpose(file[name][place])) for name in ("images", "depths"))
        return {"image": image, "depth": depth, "units_per_metre": 1.0}

    def where(self, index: int) -> str:
        return f"{self.path} image {self._places[index] + 1}"

    def _open(self) -> Any:
        if self._file is None:
            try:
                import h5py
            except ImportError as error:
                raise ValueError("the labelled set needs h5py: pip install 'pe-jax[data]'.") from error
            try:
                self._file = h5py.File(self.path)
            except OSError as error:
                raise ValueError(f"{self.path} is not HDF5, as NYU Depth v2 is published: {error}.") from error
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # a process opens its own


def _below(path: str) -> list[str]:
    """Files below a folder, relative to it."""
    root = paths.path(path)
    paths.reach(root)
    if not root.is_dir():
        raise ValueError(f"{path} is no folder; give the one of the images, and as `maps` the one of their maps.")
    below = str(root).removeprefix(paths.BUCKET)  # which the folders found in a bucket lack
    return [os.path.relpath(os.path.join(folder, name), below) for folder, _, names in root.walk() for name in names]

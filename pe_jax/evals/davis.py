"""Clips with a mask in every frame, in DAVIS's layout, and its measures of masks: J, the region, and F, the contour.

A mask is a PNG of one number a pixel: 0 the background, 1, 2, ... the objects, 255 neither (counted as background). An
object is followed if it is in the first frame's mask. Folders may look like this:

  DAVIS      PATH/JPEGImages/480p/CLIP/*.jpg, PATH/Annotations/480p/CLIP/*.png, PATH/ImageSets/2017/val.txt
  one clip   PATH/frames/*.jpg, PATH/masks/*.png
  clips      PATH/CLIP/frames/*.jpg, PATH/CLIP/masks/*.png
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8

from pe_jax import paths
from pe_jax.data.image import decode

TOLERANCE = 0.008  # of the image's diagonal, by which a contour may be off
VOID = 255
_IMAGES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and its masks, of the same number and names."""

    name: str
    frames: tuple[str, ...]
    masks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def mask(self, frame: int) -> UInt8[np.ndarray, "H W"]:
        """Objects' numbers of one frame.

        Raises:
          ValueError: if the file is not one number a pixel.
        """
        image = decode(self.masks[frame])
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{self.masks[frame]} has mode {image.mode}; want one number a pixel, a palette or grey PNG."
            )
        mask = np.array(image).astype(np.uint8)
        return np.where(mask == VOID, np.uint8(0), mask)


def clips(data: str | Mapping[str, Any]) -> list[Clip]:
    """The clips of a folder.

    Args:
      data: the folder, local or gs://; or {"path": the folder, "split": "val", "year": "2017", "resolution": "480p",
        "limit": the first so many clips}, of which `split`, `year` and `resolution` (those are the defaults) choose
        within DAVIS's layout.

    Raises:
      ValueError: for an unknown field, a folder of another layout, or a frame without a mask or the reverse.
    """
    asked: dict[str, Any] = {"path": data} if isinstance(data, str) else dict(data)
    known = {"path": None, "split": "val", "year": "2017", "resolution": "480p", "limit": None}
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"clips have no field {unknown[0]!r}; there are {', '.join(known)}.")
    if not asked.get("path"):
        raise ValueError("clips need a `path`: a folder of DAVIS's layout, or one with frames/ and masks/.")
    asked = known | asked
    if asked["limit"] is not None and asked["limit"] < 1:
        raise ValueError(f"limit={asked['limit']} must be at least 1, or left out.")
    root = paths.path(asked["path"])
    paths.reach(root)
    if (root / "JPEGImages").exists():
        listing = root / "ImageSets" / str(asked["year"]) / f"{asked['split']}.txt"
        if not listing.exists():
            raise ValueError(f"{listing} does not exist; set `year` and `split` to a list that is there.")
        names = listing.read_text().split()
        folders = [tuple(root / kind / asked["resolution"] for kind in ("JPEGImages", "Annotations"))] * len(names)
        places = [(name, images / name, masks / name) for name, (images, masks) in zip(names, folders, strict=True)]
    elif (root / "frames").exists():
        places = [(root.name, root / "frames", root / "masks")]
    else:
        inside = sorted(root.iterdir()) if root.is_dir() else []
        places = [(own.name, own / "frames", own / "masks") for own in inside if (own / "frames").exists()]
    if not places:
        raise ValueError(
            f"{root} holds no clips; want JPEGImages/ as in DAVIS, frames/ and masks/, or folders of them."
        )
    return [_clip(*place) for place in places[: asked["limit"]]]


def _clip(name: str, images: epath.Path, masks: epath.Path) -> Clip:
    frames, labels = (_files(folder, endings) for folder, endings in ((images, _IMAGES), (masks, (".png",))))
    if lost := sorted(set(frames) - set(labels)):
        raise ValueError(f"clip {name}: {len(lost)} of {len(frames)} frames lack a mask, first {masks}/{lost[0]}.png.")
    if lost := sorted(set(labels) - set(frames)):
        raise ValueError(f"clip {name}: {len(lost)} of {len(labels)} masks lack a frame, first {images}/{lost[0]}.jpg.")
    if len(frames) < 3:
        raise ValueError(f"clip {name} has {len(frames)} frames; the first and last are not judged, so want 3 or more.")
    stems = sorted(frames)
    return Clip(name, tuple(frames[stem] for stem in stems), tuple(labels[stem] for stem in stems))


def _files(folder: epath.Path, endings: Sequence[str]) -> dict[str, str]:
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; every clip needs a folder of frames and one of masks.")
    found = [path for path in folder.iterdir() if path.suffix.lower() in endings]
    return {path.stem: str(path) for path in found}


# ---- measures ------------------------------------------------------------------------------------------------------


def region(found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """J: intersection over union of two masks; 1 where both are empty."""
    union = int((found | truth).sum())
    return int((found & truth).sum()) / union if union else 1.0


class Contour:
    """The outline of a mask, and what lies within the tolerance of it.

    A pixel is of the outline if it differs from the one at its right, below, or below right.

    Source: davis2017-evaluation, which is DAVIS's published definition (arXiv 1704.00675).
    """

    def __init__(self, mask: Bool[np.ndarray, "H W"], tolerance: float = TOLERANCE):
        self.pixels = np.zeros_like(mask)
        self.pixels[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
        self.pixels[:-1] |= mask[:-1] ^ mask[1:]
        self.pixels[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
        self.count = int(self.pixels.sum())
        self._radius = math.ceil(tolerance * math.hypot(*mask.shape))
        self._near: np.ndarray | None = None

    @property
    def near(self) -> Bool[np.ndarray, "H W"]:
        """Pixels within the tolerance of the outline."""
        if self._near is None:
            self._near = dilated(self.pixels, self._radius)
        return self._near


def contour(found: Contour, truth: Contour) -> float:
    """F: harmonic mean of the shares of either outline that lie near the other."""
    if not found.count and not truth.count:
        return 1.0
    if not found.count or not truth.count:
        return 0.0  # one of precision and recall is 0, by definition
    precision = int((found.pixels & truth.near).sum()) / found.count
    recall = int((truth.pixels & found.near).sum()) / truth.count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def dilated(mask: Bool[np.ndarray, "H W"], radius: int) -> Bool[np.ndarray, "H W"]:
    """The pixels within `radius` of one that is set: row by row of the disc, each a difference of running sums."""
    out = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return out
    height, width = mask.shape
    top, bottom = max(rows[0] - radius, 0), min(rows[-1] + radius + 1, height)
    left, right = max(columns[0] - radius, 0), min(columns[-1] + radius + 1, width)
    seen, box = mask[top:bottom, left:right], out[top:bottom, left:right]
    sums = np.pad(seen.cumsum(1, dtype=np.int32), ((0, 0), (radius + 1, radius)), mode="edge")
    sums[:, : radius + 1] = 0
    wide, size = {}, seen.shape[1]
    for down in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - down**2)
        if half not in wide:
            wide[half] = sums[:, radius + 1 + half :][:, :size] > sums[:, radius - half :][:, :size]
        shifted = wide[half]
        if down >= 0:
            box[down:] |= shifted[: len(shifted) - down]
        else:
            box[:down] |= shifted[-down:]
    return out


def statistics(values: Float[np.ndarray, "T"]) -> dict[str, float]:
    """Of a measure over the frames of one object: mean, recall (share above 0.5), decay (first quarter less last)."""
    bounds = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[begin : end + 1].mean() for begin, end in itertools.pairwise(bounds)]
    return {
        "mean": float(values.mean()),
        "recall": float((values > 0.5).mean()),
        "decay": float(quarters[0] - quarters[-1]),
    }

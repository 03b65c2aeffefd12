"""Images → pixels: decoding, PE's evaluation transform, and the augmentations of its pretraining (PE §1.7, §2.4).

All resizing is Pillow's, the code that torchvision's transforms run on PIL images, so pixels equal PE's bit for bit.
"""

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
from jaxtyping import Float32, Float64, UInt8

from pe_jax import paths

Image = PIL.Image.Image | str | os.PathLike | bytes | np.ndarray

_FILTERS = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}
_MODES = ("squash", "crop")


class BadImage(ValueError):
    """An image that cannot be decoded; the message names it."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The evaluation transform: `Preprocess(224)(images)` → float32 [B, 224, 224, 3]. Stored with every checkpoint.

    Attributes:
      size: (height, width) in pixels; an integer means a square.
      mode: "squash" resizes straight to `size`, whatever the aspect ratio (PE-Core's own way); "crop" resizes until
        the image just covers `size`, then keeps the centre, with torchvision's rounding.
      filter: "bilinear" (PE) or "bicubic"; both average over the source area when reducing.
      mean, std: of the result (pixels / 255 - mean) / std, per channel; 0.5 gives the range [-1, 1].
      rgb_first: convert to RGB before the resize. PE converts after it; the difference shows in palette images, which
        Pillow resizes by nearest neighbour, and in transparency, which weights the average of RGBA images. Either
        way transparency is then dropped, not composited.
      exif: turn the image as its EXIF orientation says. PE does not.
    """

    size: tuple[int, int] | int
    mode: str = "squash"
    filter: str = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rgb_first: bool = False
    exif: bool = False

    def __post_init__(self):
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"size={self.size!r} must be a number of pixels or (height, width), all positive.")
        if self.mode not in _MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {_MODES}.")
        if self.filter not in _FILTERS:
            raise ValueError(f"filter={self.filter!r} must be one of {tuple(_FILTERS)}.")
        object.__setattr__(self, "size", size)
        for name in ("mean", "std"):  # lists after JSON
            value = tuple(float(v) for v in getattr(self, name))
            if len(value) != 3 or (name == "std" and min(value) <= 0):
                raise ValueError(f"{name}={value} must be three numbers, one per channel (std above 0).")
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the result, in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __call__(self, images: Image | Iterable[Image]) -> Float32[np.ndarray, "B H W 3"]:
        """Decoded, resized and normalised images [B, H, W, 3]; one image gives B = 1.

        Args:
          images: one, or a list of: a PIL image, a path, encoded bytes, or a uint8 array [H, W] or [H, W, 3 or 4]; a
            uint8 array [B, H, W, 3] is a list of images.

        Raises:
          BadImage: (a ValueError) naming the image that cannot be read.
        """
        if isinstance(images, np.ndarray):
            rows: list[Any] = list(images) if images.ndim == 4 else [images]
        elif isinstance(images, (str, bytes, os.PathLike, PIL.Image.Image)):
            rows = [images]
        else:
            rows = list(images)
        height, width = self.shape
        out = np.empty((len(rows), height, width, 3), np.float32)
        for row, image in enumerate(rows):
            out[row] = self.normalize(self.pixels(image))
        return out

    def pixels(self, image: Image) -> UInt8[np.ndarray, "H W 3"]:
        """One image decoded and resized, before normalisation, uint8 [H, W, 3]."""
        image = decode(image)
        if self.exif:
            image = PIL.ImageOps.exif_transpose(image)
        if self.rgb_first:
            image = image.convert("RGB")
        height, width = self.shape
        if self.mode == "squash":
            image = _resize(image, (width, height), self.filter)
        else:
            image = _resize(image, _cover(image.size, (width, height)), self.filter)
            left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)  # half to even
            image = image.crop((left, top, left + width, top + height))
        return np.array(image.convert("RGB"))

    def normalize(self, pixels: UInt8[np.ndarray, "*B H W 3"]) -> Float32[np.ndarray, "*B H W 3"]:
        """(pixels / 255 - mean) / std in float32, in this order of operations."""
        unit = pixels.astype(np.float32) / np.float32(255)
        return (unit - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """All fields, fit for JSON."""
        return {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`.

        Raises:
          ValueError: on an unknown or missing key, naming it.
        """
        fields = _known(cls, fields)
        if "size" not in fields:
            raise ValueError(f"Preprocess needs a size; got only {sorted(fields)}.")
        size = fields.pop("size")
        fields |= {name: _floats(fields[name]) for name in ("mean", "std") if name in fields}
        return cls(size=size if isinstance(size, int) else tuple(size), **fields)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Training-time changes to an image, each off by default; PE's pretraining uses all four (PE §2.4).

    The output is a function of the image and of the random numbers in [0, 1) it is given, so the same seed and record
    position give the same pixels on any worker and any number of hosts.

    Attributes:
      crop_scale: (least, greatest) share of the area kept by a random crop; None squashes the whole image.
      crop_ratio: (least, greatest) width / height of the crop, drawn evenly on a log scale.
      aspect: (least, greatest) width / height of the largest crop of that shape, its place drawn too: the shape changes
        and the scale hardly does (PE §5). A `crop_scale` of (1, 1) would not do it: a crop of the image's own area and
        another shape never fits. It takes the place of `crop_scale` and `crop_ratio`.
      brightness: b; pixels are scaled by a factor drawn from [1 - b, 1 + b].
      saturation: s; pixels move from their grey value by a factor drawn from [1 - s, 1 + s].
      hflip: chance of mirroring left and right.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    aspect: tuple[float, float] | None = None
    brightness: float = 0.0
    saturation: float = 0.0
    hflip: float = 0.0

    def __post_init__(self):
        if self.aspect is not None and self.crop_scale is not None:
            raise ValueError("aspect takes the place of crop_scale and crop_ratio; leave the one or the others out.")
        for name in ("crop_scale", "crop_ratio", "aspect"):
            value = getattr(self, name)
            if value is None:
                continue
            value = tuple(float(v) for v in value)
            top = 1.0 if name == "crop_scale" else math.inf
            if len(value) != 2 or not 0 < value[0] <= value[1] <= top:
                raise ValueError(f"{name}={value} must be (least, greatest) with 0 < least <= greatest <= {top}.")
            object.__setattr__(self, name, value)
        for name in ("brightness", "saturation", "hflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Augment":
        """Builds the record from a config, lists and whole numbers allowed; ValueError on an unknown key, naming it."""
        return cls(**{name: _floats(value) for name, value in _known(cls, fields).items()})

    def __call__(
        self, image: Image, size: tuple[int, int], rng: np.random.Generator, resize: Preprocess | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """One augmented image at `size` (height, width), uint8.

        Every draw is made whether it is used or not, so switching one augmentation leaves the others as they were.

        Args:
          image: anything `decode` takes.
          size: (height, width) of the result in pixels.
          rng: made by `generator`; advanced by this call.
          resize: filter, `rgb_first` and `exif` to use, and the transform where there is no crop; PE's by default.
        """
        resize = dataclasses.replace(resize, size=size) if resize else Preprocess(size)
        crop, (flip, order, bright, saturate) = rng.random((10, 4)), rng.random(4)
        if self.crop_scale is None and self.aspect is None:
            image = PIL.Image.fromarray(resize.pixels(image))
        else:
            image = decode(image)
            if resize.exif:
                image = PIL.ImageOps.exif_transpose(image)
            if resize.rgb_first:
                image = image.convert("RGB")
            image = image.crop(self._box(image.size, crop))
            image = _resize(image, (size[1], size[0]), resize.filter).convert("RGB")
        jitter = [
            (PIL.ImageEnhance.Brightness, self.brightness, bright),
            (PIL.ImageEnhance.Color, self.saturation, saturate),
        ]
        for enhance, strength, draw in jitter if order < 0.5 else jitter[::-1]:
            if strength:
                image = enhance(image).enhance(1 + strength * (2 * draw - 1))
        if flip < self.hflip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)

    def map(self, values: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A map of the image's pixels, such as a mask, under the crop and flip that `rng` gives the image.

        Args:
          values: [H, W] of the image's height and width, int32 or float32.
          size: (height, width) of the result, brought there by nearest neighbour.
          rng: in the state in which the image's call is given it.
        """
        crop, (flip, *_) = rng.random((10, 4)), rng.random(4)
        image = PIL.Image.fromarray(values)
        box = self._box(image.size, crop)
        found = np.array(image.resize((size[1], size[0]), PIL.Image.Resampling.NEAREST, box))
        return found[:, ::-1] if flip < self.hflip else found

    def _box(self, size: tuple[int, int], draws: Float64[np.ndarray, "T 4"]) -> tuple[int, int, int, int]:
        """Corners of what is kept of an image of `size` (width, height)."""
        if self.aspect is not None:
            return _largest_box(size, self.aspect, draws[0])
        if self.crop_scale is not None:
            return _random_box(size, self.crop_scale, self.crop_ratio, draws)
        return 0, 0, *size


def generator(seed: int, position: int, stream: int = 0) -> np.random.Generator:
    """A counter-based generator for one record: a function of its three arguments alone, not of what ran before.

    Args:
      seed: of the run, not negative.
      position: the record's place in the run's endless sequence of examples, so each epoch draws anew.
      stream: which use (augmentation, choice of caption), so that uses do not share numbers.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position, stream))))


def decode(image: Image, name: str | None = None) -> PIL.Image.Image:
    """Opens and fully decodes one image, in the mode of its file.

    Args:
      image: a PIL image, a path, encoded bytes, or a uint8 array [H, W] (grey), [H, W, 3] or [H, W, 4] (with alpha).
      name: how an error calls it; the path where it is one.

    Raises:
      BadImage: if it is missing, damaged, in an unknown format, or of a wrong type.
    """
    if isinstance(image, PIL.Image.Image):
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(
                f"{name or getattr(image, 'filename', '') or 'image'} cannot be decoded: {error}."
            ) from error
        return image
    if isinstance(image, np.ndarray):
        ok = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)))
        if not ok or not image.size:
            raise BadImage(
                f"{name or 'image array'} is {image.dtype} {list(image.shape)}; wanted uint8 [H, W], [H, W, 3] or"
                " [H, W, 4]."
            )
        return PIL.Image.fromarray(image)
    if isinstance(image, bytes):
        data = image
        name = name or f"image of {len(data)} bytes"
    elif isinstance(image, (str, os.PathLike)):
        name = name or os.fspath(image)
        data = read_bytes(image)
    else:
        raise BadImage(f"{name or 'image'} is {type(image).__name__}; wanted a PIL image, path, bytes or uint8 array.")
    try:
        opened = PIL.Image.open(io.BytesIO(data))
        opened.load()
    except PIL.UnidentifiedImageError as error:
        raise BadImage(
            f"{name} is in no image format that Pillow knows: {len(data)} bytes that start with {data[:8]!r}."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"{name} cannot be decoded ({len(data)} bytes): {error}.") from error
    return opened


def read_bytes(path: str | os.PathLike) -> bytes:
    """The contents of a local file or a `gs://` one.

    Raises:
      BadImage: naming the file, if it is missing or unreadable.
    """
    text = os.fspath(path)
    try:
        if paths.is_bucket(text):
            return paths.path(text).read_bytes()
        return pathlib.Path(text).read_bytes()
    except FileNotFoundError as error:
        raise BadImage(f"{text} does not exist.") from error
    except OSError as error:
        raise BadImage(f"{text} cannot be read: {error}.") from error


def _resize(image: PIL.Image.Image, size: tuple[int, int], filter: str) -> PIL.Image.Image:
    return image if image.size == size else image.resize(size, _FILTERS[filter])


def _cover(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Size (width, height) of `source` scaled to just cover `target`; truncated as torchvision does."""
    (w, h), (width, height) = source, target
    if w * height <= h * width:  # the width is what fits
        return width, max(height, int(width * h / w))
    return max(width, int(height * w / h)), height


def _random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], draws: Float64[np.ndarray, "T 4"]
) -> tuple[int, int, int, int]:
    """Corners of a random crop: the first of T tries that fits; else the largest central crop within `ratio`.

    Args:
      size: (width, height) of the image.
      scale: range of the kept share of the area.
      ratio: range of width / height.
      draws: [T, 4] numbers in [0, 1): area, ratio, left, top.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect, left, top in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    w, h = max(w, 1), max(h, 1)
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _largest_box(
    size: tuple[int, int], ratio: tuple[float, float], draws: Float64[np.ndarray, "4"]
) -> tuple[int, int, int, int]:
    """Corners of the largest crop of a drawn width / height, at a drawn place; arguments as `_random_box`."""
    width, height = size
    _, aspect, left, top = draws.tolist()
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
    return x, y, x + w, y + h


def _floats(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_floats(v) for v in value)
    return float(value) if isinstance(value, int) else value


def _known(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(names)):
        raise ValueError(f"{cls.__name__} has no {', '.join(map(repr, unknown))}; its fields are {', '.join(names)}.")
    return dict(fields)

"""Real handwritten digits as an image-text data set, from files that come with scikit-learn; needs no download.

1,797 scans of 8x8 pixels by 43 writers (UCI ML "Optical Recognition of Handwritten Digits", CC BY 4.0), given a border
of one pixel and enlarged to 32x32, with captions written from templates. None of the captions is a prompt of the
zero-shot evaluation (`pe_jax/evals/assets/templates_digits.txt`): those are sentences the model has not seen.
"""

import json
import os
import pathlib

import numpy as np
import PIL.Image

from pe_jax.data.image import generator

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# {} is the name, {number} the figure: a caption shows at least one of them.
TEMPLATES = (
    "a handwritten {}",
    "the digit {number}",
    "someone wrote the number {number} by hand",
    "{}, drawn with a pen",
    "a scan of the figure {}",
    "this is a {}",
    "number {}, {number}, on dark paper",
    "{number}",
)


def write(directory: str | os.PathLike, *, size: int = 32, test: float = 0.2, seed: int = 0) -> dict[str, int]:
    """Writes train.jsonl, test.jsonl and their PNG images; the same bytes for the same arguments.

    A record is {"image": path relative to the file, "label": 0 to 9, "cls": its name, "captions": one per template}.

    Args:
      directory: made if it is missing.
      size: pixels, height and width of the images.
      test: share of each digit's images that is held out.
      seed: of the split.

    Returns:
      Number of records by split.

    Raises:
      ValueError: if scikit-learn is missing, or `test` or `size` is out of range.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'pe-jax[viz]'.") from error
    if not 0 < test < 1 or size < 8:
        raise ValueError(f"test={test} must lie between 0 and 1, size={size} must be at least 8 pixels.")
    data = load_digits()
    pixels, labels = np.asarray(data.images), np.asarray(data.target)  # [1797, 8, 8] of 0..16, [1797]
    rng = generator(seed, 0)
    held_out = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        order = np.argsort(rng.random(len(members)), kind="stable")
        held_out[members[order[: round(test * len(members))]]] = True

    directory, counts = pathlib.Path(directory), {}
    for split, members in (("train", np.flatnonzero(~held_out)), ("test", np.flatnonzero(held_out))):
        (directory / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in members.tolist():
            small = PIL.Image.fromarray(np.pad(np.round(pixels[i] * (255 / 16)).astype(np.uint8), 1))
            image = f"{split}/{i:04d}.png"
            small.resize((size, size), PIL.Image.Resampling.BICUBIC).save(directory / image)
            label = int(labels[i])
            captions = [t.format(NAMES[label], number=label) for t in TEMPLATES]
            lines.append(json.dumps({"image": image, "label": label, "cls": NAMES[label], "captions": captions}))
        partial = directory / f"{split}.jsonl.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(directory / f"{split}.jsonl")  # the list appears when its images are there
        counts[split] = len(lines)
    return counts

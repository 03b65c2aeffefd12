"""Zero-shot classification: an image belongs to the class whose prompts lie nearest to it (PE §3; CLIP §3.1).

The classifier of a class is the mean of the unit embeddings of its prompts, brought back to unit length; the score is
the cosine. The same code serves `pe-jax classify`, the evaluator during training, and the report.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pe_jax.evals import inference, records
from pe_jax.models.clip import CLIP

ASSETS = pathlib.Path(__file__).parent / "assets"


def templates(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates, each with one or more `{}` for the class name.

    Args:
      spec: a set that comes with the package (`imagenet`, `photo`, `none`, ...), a text file with one template a line,
        or the templates themselves.

    Raises:
      ValueError: for an unknown set, a missing file, no template at all, or one without `{}`.
    """
    found = _entries(spec, "templates")
    if bad := [template for template in found if "{}" not in template]:
        raise ValueError(
            f"template {bad[0]!r} has no {{}} where the class name goes; write it like 'a photo of a {{}}.'"
        )
    return found


def classes(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: a set of the package, a file (text, or JSON list), or a list.

    Raises:
      ValueError: for an unknown set, a missing file, an empty or repeated name, or fewer than 2 names.
    """
    found = tuple(name.strip() for name in _entries(spec, "classes"))
    if "" in found:
        raise ValueError(f"class name {found.index('') + 1} of {len(found)} is empty; name every class.")
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"class {repeated[0]!r} is there more than once; give every class a name of its own.")
    if len(found) < 2:
        raise ValueError(f"got {len(found)} class; classification needs at least 2.")
    return found


def sets(kind: str) -> tuple[str, ...]:
    """Names of the `templates` or `classes` that come with the package."""
    return tuple(sorted(path.stem.removeprefix(kind + "_") for path in ASSETS.glob(f"{kind}_*.txt")))


def _entries(spec: str | Sequence[str], kind: str) -> tuple[str, ...]:
    if not isinstance(spec, str):
        found = tuple(spec)
    elif spec in sets(kind):
        found = tuple((ASSETS / f"{kind}_{spec}.txt").read_text("utf-8").splitlines())
    else:
        path = pathlib.Path(spec)
        if not path.is_file():
            raise ValueError(f"{kind} {spec!r} is neither a file nor one of the sets {', '.join(sets(kind))}.")
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            found = tuple(content[kind] if isinstance(content, dict) and kind in content else content)
        else:
            found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found or not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{kind} {spec!r:.60} must be one or more strings.")
    return found


def classifier(
    model: CLIP, class_names: Sequence[str], prompt_templates: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "C E"]:
    """One unit row a class: the mean over templates of unit text embeddings, renormalised (PE, appendix B.1.2)."""
    prompts = [template.replace("{}", name) for name in class_names for template in prompt_templates]
    embedded = inference.embed_texts(model, prompts, batch_size)
    mean = embedded.reshape(len(class_names), len(prompt_templates), -1).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def confusion(labels: Int[np.ndarray, "N"], predictions: Int[np.ndarray, "N"], count: int) -> Int[np.ndarray, "C C"]:
    """How many examples of class (row) were taken for class (column)."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (labels, predictions), 1)
    return table


def figures(table: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """`top1`, and `mean_recall`: the mean over the classes that occur of the share found of each; both in [0, 1]."""
    total, right = table.sum(1), np.diagonal(table)
    seen = total > 0
    return {"top1": float(right.sum() / total.sum()), "mean_recall": float((right[seen] / total[seen]).mean())}


@dataclasses.dataclass(frozen=True)
class Result:
    """What `ZeroShot.result` found.

    Attributes:
      classes: [C] names.
      labels: [N] true class of each image.
      cosines: [N, C] of each image with each class.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    cosines: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        return self.cosines.argmax(1)

    @property
    def confusion(self) -> np.ndarray:
        return confusion(self.labels, self.predictions, len(self.classes))

    @property
    def figures(self) -> dict[str, float]:
        return figures(self.confusion)


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Evaluator `{"name": "zero_shot", "data": {...}, "classes": ..., "templates": ...}` → `top1`, `mean_recall`.

    Attributes:
      data: labelled images, see `pe_jax.evals.records`.
      classes, templates: see the functions of these names.
      batch_size: images in a forward pass, over all devices.
      image_size: pixels of a side; None takes the model's own.
    """

    data: Mapping[str, Any]
    classes: str | Sequence[str]
    templates: str | Sequence[str] = "imagenet"
    batch_size: int = 64
    image_size: int | None = None

    def __post_init__(self) -> None:
        classes(self.classes)
        templates(self.templates)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        return self.result(model).figures

    def result(self, model: inference.Model) -> Result:
        """Scores of every image; the figures, predictions and confusion matrix follow from them."""
        clip = inference.require_text(model, "zero-shot classification")
        names = classes(self.classes)
        rows = records.open(self.data)
        labels = rows.labels(names)
        weights = classifier(clip, names, templates(self.templates))
        images = inference.embed_images(clip, rows.images, self.batch_size, self.image_size)
        return Result(names, labels, images @ weights.T)

"""Zero-shot classification: an image belongs to the class whose prompts lie nearest to it (PE §3; CLIP §3.1).

The classifier of a class is the mean of the unit embeddings of its prompts, brought back to unit length; the score is
the cosine. The same code serves `pe-jax classify`, the evaluator during training, and the report.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pe_jax.evals import inference, records, views
from pe_jax.models.clip import CLIP

ASSETS = pathlib.Path(__file__).parent / "assets"


def templates(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates, each with one or more `{}` for the class name.

    Args:
      spec: a set that comes with the package (`imagenet`, `photo`, `none`, ...), a text file with one template a line,
        or the templates themselves. CLIP_benchmark's files write `{c}` for `{}`.

    Raises:
      ValueError: for an unknown set, a missing file, no template at all, or one without `{}`.
    """
    found = tuple(template.replace("{c}", "{}") for template in _entries(spec, "templates"))
    if bad := [template for template in found if "{}" not in template]:
        raise ValueError(
            f"template {bad[0]!r} has no {{}} where the class name goes; write it like 'a photo of a {{}}.'"
        )
    return found


def classes(spec: str | Sequence[str], repeats: bool = False) -> tuple[str, ...]:
    """Class names in the order of their labels: a set of the package, a file (text, or JSON list), or a list.

    Args:
      spec: as said.
      repeats: whether two classes may share a name, as two pairs of ImageNet's do.

    Raises:
      ValueError: for an unknown set, a missing file, an empty or repeated name, or fewer than 2 names.
    """
    found = tuple(name.strip() for name in _entries(spec, "classes"))
    if "" in found:
        raise ValueError(f"class name {found.index('') + 1} of {len(found)} is empty; name every class.")
    if not repeats and (repeated := sorted(name for name, n in collections.Counter(found).items() if n > 1)):
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
            lines = text.rstrip().splitlines()  # a blank line among class names is a mistake that shifts the others
            found = tuple(line.strip() for line in lines if line.strip() or kind == "classes")
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
      classes, templates: see the functions of these names; a file of class names may repeat some.
      batch_size: images in a forward pass, over all devices.
      image_size: pixels of a side; None takes the model's own.
      resize: "squash", "crop", or "better": both, of which the one with the higher top-1 is reported, and both listed
        as `top1_squash` and so on; None takes the model's own.
      border: pixels to cut off each side of an image first; ObjectNet's have a red frame, PE's harness cuts 2.
      labels: how the data call each class where they do not call it by the name that prompts use: an entry a class.
      subset: leave out records of other classes, such as the 200 of ObjectNet that ImageNet has not; without it, they
        are an error.
    """

    data: Mapping[str, Any]
    classes: str | Sequence[str]
    templates: str | Sequence[str] = "imagenet"
    batch_size: int = 64
    image_size: int | None = None
    resize: str | None = None
    border: int = 0
    labels: Sequence[str] | None = None
    subset: bool = False

    def __post_init__(self) -> None:
        templates(self.templates)
        views.check(self.resize, self.border)
        names = self.names
        if self.labels is not None and len(self.labels) != len(names):
            raise ValueError(f"labels has {len(self.labels)} entries for {len(names)} classes; give one a class.")

    @property
    def names(self) -> tuple[str, ...]:
        """What prompts call the classes, in the order of their labels."""
        return classes(self.classes, repeats=isinstance(self.classes, str) or self.labels is not None)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = {view: result.figures for view, result in self.results(model).items()}
        return views.reported(found, lambda figures: figures["top1"])

    def result(self, model: inference.Model) -> Result:
        """Scores of every image, in the better view; the figures, predictions and confusion matrix follow from them."""
        return max(self.results(model).values(), key=lambda result: result.figures["top1"])

    def results(self, model: inference.Model) -> dict[str, Result]:
        """The result in each view of the images."""
        clip = inference.require_text(model, "zero-shot classification")
        names = self.names
        rows = records.open(self.data)
        labels = rows.labels(self.labels or names, others=self.subset)
        images: Sequence[Any] = rows.images
        if self.subset:
            kept = np.flatnonzero(labels >= 0)
            if not len(kept):
                raise ValueError(f"none of the {len(labels)} records is of one of the {len(names)} classes.")
            images, labels = records.Chosen(images, kept), labels[kept]
        weights = classifier(clip, names, templates(self.templates))
        seen = views.Views.of(clip, self.resize, self.image_size, self.border)
        embedded = seen.embed(clip, images, self.batch_size)
        return {view: Result(names, labels, own @ weights.T) for view, own in embedded.items()}

"""Where the data sets of a benchmark lie below one folder, and what their own files say of classes, prompts, captions.

Each data set has a folder there, in one of these forms, looked for in this order (SPLIT is test, val or validation,
unless a place says which, as "imagenet2012:validation" does):

  CLIP_benchmark  NAME/SPLIT/nshards.txt and 0.tar, 1.tar, ...; dataset_type.txt for retrieval
  ObjectNet       NAME/images/CLASS/*.png and NAME/mappings/*.json, as it is published
  ADE20K          NAME/images/SPLIT/*.jpg and NAME/annotations/SPLIT/*.png, as SceneParsing is published
  lists           NAME/*_SPLIT.txt, lines of an image and its depth, as depth codes keep NYU Depth v2
  labelled        NAME/nyu_depth_v2_labeled.mat and NAME/splits.mat, as it is published
  TFDS            NAME/VERSION/dataset_info.json, prepared as ArrayRecord
  Karpathy        NAME/dataset*.json beside the images
  table           NAME/SPLIT.jsonl, .csv, .tsv or .npz with .jsonl; or NAME.jsonl and so on
  shards          NAME/SPLIT/*.tar or *.array_record
  images          NAME/SPLIT/CLASS/*.jpg, or NAME/CLASS/*.jpg; videos likewise

What probes learn from is the split train or training beside it. Clips with masks have layouts of their own, see
`pe_jax.evals.davis`.

Class names are the lines of NAME/classnames.txt, else NAME/classes.json, else TFDS's, else the folders' names or the
field `cls`; prompts of its own, those of NAME/zeroshot_classification_templates.txt.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pe_jax import paths
from pe_jax.data import sources

SPLITS = ("test", "val", "validation")
_LEARNED = ("train", "training")
_TABLES = (".jsonl", ".csv", ".tsv", ".npz")
_FLICKR = ("flickr30k-images", "flickr30k_images", "images")  # Flickr's file does not say in which folder images are


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set that is there.

    Attributes:
      place: its folder or file.
      folder: where its class names and prompts may be.
      form: the name of its layout, as above.
      data: what `pe_jax.evals.records.open` takes.
    """

    place: str
    folder: epath.Path
    form: str
    data: dict[str, Any]

    def fields(self, wanted: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of an evaluator that the data set's own files answer.

        Args:
          wanted: the fields the evaluator has.
          given: those its config says already, which stay.

        Raises:
          ValueError: where it needs class names or prompts and there are none, saying which file to write.
        """
        found: dict[str, Any] = {"data": self.data | dict(given.get("data", {}))}
        for field in ("bank", "train"):
            if field not in wanted or "name" in given.get(field, {}):
                continue
            learned = recognise(paths.path(self.place), _LEARNED)
            if learned is None or learned.data == self.data:  # one without splits is not to be learned by heart
                raise ValueError(
                    f"there is nothing to learn from beside {self.place}; want a folder with a split train."
                )
            found[field] = learned.data | dict(given.get(field, {}))
        if "classes" in wanted and "classes" not in given:
            if "labels" in wanted:
                found |= self._classes(overlap=bool(given.get("subset")))
            elif (called := self._called()) is not None:  # nobody reads the names: any tell the classes apart
                found["classes"] = called
        if "templates" in wanted and "templates" not in given:
            file = self.folder / "zeroshot_classification_templates.txt"
            if not file.exists():
                raise ValueError(f"there are no prompts for {self.place}: write them to {file}, one a line with {{c}}.")
            found["templates"] = str(file)
        return dict(given) | found

    def _classes(self, overlap: bool) -> dict[str, Any]:
        if self.form == "ObjectNet":
            return _objectnet(self.folder / "mappings", overlap)
        called = self._called()
        lines, table = self.folder / "classnames.txt", self.folder / "classes.json"
        if lines.exists():
            count = len(lines.read_text().rstrip().splitlines())
            if called is not None and len(called) != count:
                raise ValueError(
                    f"{lines} names {count} classes, and {self.place} has {len(called)}; give one a class."
                )
            return {"classes": str(lines)} | ({} if called is None else {"labels": called})
        if table.exists():
            content = json.loads(table.read_text())
            folders = content.get("folders") if isinstance(content, dict) and self.form == "images" else None
            return {"classes": str(table)} | ({"labels": [_plain(name) for name in folders]} if folders else {})
        if called is None:
            called = self._tfds_names() if self.form == "TFDS" else None
        if not called or all(re.fullmatch(r"n\d{8}|\d+", name) for name in called):
            got = f"they are called {called[0]}, ..." if called else "its records have numbers only"
            raise ValueError(f"there are no class names for {self.place} ({got}): write them to {lines}, one a line.")
        return {"classes": called}

    def _called(self) -> list[str] | None:
        """What the records call their classes, in the order of the folders' names; None if they have numbers."""
        if self.form == "images":
            found = [p.name for p in epath.Path(self.data["path"]).iterdir() if p.is_dir() and p.name[0] != "."]
            return [_plain(name) for name in sorted(found)]
        if self.form != "table":
            return None
        source = sources.create(self.data)
        first = source[0]
        if isinstance(first.get("label"), int) or not isinstance(first.get("label", first.get("cls")), str):
            return None
        field = "label" if "label" in first else "cls"
        return sorted({source[row][field] for row in range(len(source))})

    def _tfds_names(self) -> list[str] | None:
        names = sources.Tfds(path=self.data["path"], split=self.data["split"]).labels.get("label")
        return [_plain(name) for name in names] if names else None


def find(root: str, places: Sequence[str]) -> tuple[Found | None, tuple[str, ...]]:
    """The first of `places` below `root` that holds data, and where it was looked for up to there.

    Raises:
      ValueError: for a place that is there and holds nothing known, or lacks what its layout needs.
    """
    looked = []
    for place in places:
        name, _, split = place.partition(":")
        path = paths.path(root) / name
        looked.append(str(path))
        if (found := recognise(path, (split,) if split else SPLITS)) is not None:
            return found, tuple(looked)
    return None, tuple(looked)


def recognise(path: epath.Path, splits: Sequence[str] = SPLITS) -> Found | None:
    """The data set at `path`, in whatever layout; None if nothing is there.

    Raises:
      ValueError: if it holds nothing known, or lacks what its layout needs.
    """
    if not path.is_dir():
        for file in (path, *(path.parent / (path.name + ending) for ending in _TABLES)):
            if file.exists():
                return Found(str(file), file.parent, "table", sources.guess(str(file)))
        return None
    for split in splits:
        if (path / split / "nshards.txt").exists():
            return _clip_benchmark(path, split)
    if (path / "images").is_dir() and (path / "mappings").is_dir():
        data = {"name": "folder", "path": str(path / "images"), "label": "cls"}
        return Found(str(path), path, "ObjectNet", data)
    if (found := _maps(path, splits)) is not None:
        return found
    if versions := _versions(path):
        return Found(
            str(path), path, "TFDS", {"name": "tfds", "path": versions[-1], "split": _split(versions[-1], splits)}
        )
    if files := sorted(path.glob("dataset*.json")):
        split = next((s for s in splits if s in ("test", "val")), splits[0])
        images = next((path / name for name in _FLICKR if (path / name).is_dir()), path)
        data = {"name": "karpathy", "path": str(files[0]), "split": split, "root": str(images)}
        return Found(str(path), path, "Karpathy", data)
    for split in splits:
        for ending in _TABLES:
            if (path / f"{split}{ending}").exists():
                return Found(str(path), path, "table", sources.guess(str(path / f"{split}{ending}")))
    inside = next((path / split for split in splits if (path / split).is_dir()), path)
    if inside == path and (known := [split for split in ("train", *SPLITS) if (path / split).is_dir()]):
        raise ValueError(f"{path} has the splits {', '.join(known)}; want {' or '.join(splits)}.")
    data = sources.guess(str(inside))
    if data["name"] == "folder":
        if not any(p.is_dir() for p in inside.iterdir()):
            raise ValueError(
                f"{path} holds no data set in a known layout; want {splits[0]}/nshards.txt with tars, "
                f"dataset_info.json, {splits[0]}.jsonl, or a folder of images a class."
            )
        return Found(str(path), path, "images", data | {"label": "cls"})
    return Found(str(path), path, "shards", data)


def _maps(path: epath.Path, splits: Sequence[str]) -> Found | None:
    """A data set of images with maps of their pixels, in the form in which it is published."""
    kinds = path / "images", path / "annotations"
    known = [split for split in (*_LEARNED, *SPLITS) if all((kind / split).is_dir() for kind in kinds)]
    if known:
        if (split := next((split for split in splits if split in known), None)) is None:
            raise ValueError(f"{path} has maps of the splits {', '.join(known)}; want {' or '.join(splits)}.")
        images, masks = (str(kind / split) for kind in kinds)
        return Found(str(path), path, "ADE20K", {"name": "pairs", "path": images, "maps": masks})
    for split in splits:
        if lists := sorted(path.glob(f"*_{split}.txt")):
            return Found(str(path), path, "lists", {"name": "listed", "path": str(lists[0])})
    if (file := path / "nyu_depth_v2_labeled.mat").exists():
        split = "train" if "train" in splits else "test"
        return Found(str(path), path, "labelled", {"name": "labelled", "path": str(file), "split": split})
    return None


def _clip_benchmark(path: epath.Path, split: str) -> Found:
    file = path / split / "nshards.txt"
    text = file.read_text().strip()
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{file} says {text!r:.40}; want the number of shards beside it.")
    data: dict[str, Any] = {"name": "webdataset", "path": f"{path / split}/{{0..{int(text) - 1}}}.tar"}
    kind = path / "dataset_type.txt"
    if kind.exists() and kind.read_text().strip().lower() == "retrieval":
        data["caption_lines"] = True
    return Found(str(path), path, "CLIP_benchmark", data)


def _versions(path: epath.Path) -> list[str]:
    """Folders of prepared TFDS versions, oldest first; where there are several configs, of the first by name."""
    for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
        if found := [file.parent for file in path.glob(pattern)]:
            config = min(str(folder.parent) for folder in found)
            own = [folder for folder in found if str(folder.parent) == config]
            return [str(f) for f in sorted(own, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])]
    return []


def _split(path: str, wanted: Sequence[str]) -> str:
    content = json.loads((paths.path(path) / "dataset_info.json").read_text())
    known = [split["name"] for split in content.get("splits", [])]
    for split in wanted:
        if split in known:
            return split
    raise ValueError(f"{path} has the splits {', '.join(known) or 'of no name'}; want {' or '.join(wanted)}.")


def _objectnet(mappings: epath.Path, overlap: bool) -> dict[str, Any]:
    """All 313 classes, or the 113 that ImageNet has too."""
    try:
        labels = json.loads((mappings / "folder_to_objectnet_label.json").read_text())
        shared = json.loads((mappings / "objectnet_to_imagenet_1k.json").read_text()) if overlap else labels.values()
    except FileNotFoundError as error:
        raise ValueError(f"ObjectNet's {error.filename} is missing; unpack the mappings with the images.") from error
    chosen = {folder: label for folder, label in labels.items() if label in set(shared)}
    return {"classes": [label.lower() for label in chosen.values()], "labels": [_plain(name) for name in chosen]}


def _plain(name: str) -> str:
    """As the folder source calls a class."""
    return name.replace("_", " ")

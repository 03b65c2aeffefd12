"""Suites: the data sets of one of the paper's tables, run on a checkpoint and set beside the paper's row.

A suite is plain data, in a JSON file or a Python one with `get_suite()`; those of the package are
`assets/suite_NAME.json`:

  {"title": "Zero-shot image results (PE, Tab. 5)",
   "groups": [{"average": "Avg cls", "columns": ["IN", "v2"]}],            # an average of null is none
   "datasets": [{"name": "IN", "columns": {"IN": "top1"},                  # a figure of the evaluator for each column
                 "places": ["wds_imagenet1k", "imagenet2012:validation"],  # see `pe_jax.evals.layouts`
                 "evaluator": {"name": "zero_shot", "templates": "imagenet", "resize": "better"}}],
   "published": {"PE-Core-B16-224": {"Avg cls": 75.0, "IN": 78.4, "v2": 71.7}}}   # an average may be as printed

What the evaluator lacks (`data`, `classes`, `templates`) the data set's own files answer. Where its `data` names
a source already, that is used; {root} and {place} in its strings stand for the folder of all data and the first of
`places` that is there. A column may also be {"figure": ..., "pick": ..., "scale": ..., "digits": ...}: with pick max,
min or last, `figure` may have a * and one of its matches is taken; scale, 100 unless said, multiplies it. With "layer":
true it shows which layer was taken, instead of the figure.

A finished result is kept below `out` with what it depends on, and is not computed again while that stays.
"""

import csv
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from pe_jax import evals, paths
from pe_jax.evals import inference, layouts, vlm
from pe_jax.models import zoo

ASSETS = pathlib.Path(__file__).parent / "assets"
NONE = "-"
_PICKS: dict[str, Callable[[Sequence[str], Mapping[str, float]], str]] = {
    "max": lambda names, figures: max(names, key=lambda name: figures[name]),
    "min": lambda names, figures: min(names, key=lambda name: figures[name]),
    "last": lambda names, figures: names[-1],
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: which figure of an evaluator it shows, and how."""

    figure: str
    pick: str | None = None
    scale: float = 100.0
    digits: int = 1
    layer: bool = False

    def __post_init__(self) -> None:
        if self.layer and not self.figure.startswith("layer_*"):
            raise ValueError(
                f"figure {self.figure!r} is not one of every layer; to show which was taken, want layer_*."
            )
        if self.pick is not None and self.pick not in _PICKS:
            raise ValueError(f"pick={self.pick!r} is unknown; choose {', '.join(_PICKS)}.")
        if "*" in self.figure and self.pick is None:
            raise ValueError(f"figure {self.figure!r} stands for several; say by pick which: {', '.join(_PICKS)}.")

    def of(self, figures: Mapping[str, float]) -> tuple[str, float]:
        """The figure's full name, and its value in the column's unit; or the number of its layer.

        Raises:
          ValueError: if the evaluator gave no such figure.
        """
        names = sorted(name for name in figures if fnmatch.fnmatchcase(name, self.figure))
        if not names:
            raise ValueError(f"there is no figure {self.figure!r}; the evaluator gave {', '.join(figures)}.")
        name = _PICKS[self.pick](names, figures) if self.pick else names[0]
        return name, float(name.split("_")[1]) if self.layer else self.scale * figures[name]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of a suite: where it may be, what evaluates it, and the columns that come of it."""

    name: str
    evaluator: Mapping[str, Any]
    columns: Mapping[str, Column]
    places: tuple[str, ...] = ()

    def locate(self, root: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """The evaluator's whole config, or None where the data are not below `root`; and where they were looked for.

        Raises:
          ValueError: if they are there and unreadable, or lack class names or prompts.
        """
        placed = [text for text in _strings(self.evaluator) if "{root}" in text or "{place}" in text]
        if "name" not in self.evaluator.get("data", {}) and not placed:
            found, looked = layouts.find(root, self.places)
            wanted = evals.fields(str(self.evaluator.get("name")))
            return (None if found is None else found.fields(wanted, self.evaluator)), looked
        looked = tuple(str(paths.path(root) / place) for place in self.places)
        place = next((place for place in looked if paths.path(place).exists()), None)
        if self.places and place is None:
            return None, looked
        if absent := [text for text in _fill(placed, root, place) if not _exists(text)]:
            return None, tuple(dict.fromkeys(absent))
        return _fill(dict(self.evaluator), root, place), looked


@dataclasses.dataclass(frozen=True)
class Suite:
    """The content of a suite's file, checked."""

    name: str
    title: str
    datasets: tuple[Dataset, ...]
    groups: tuple[tuple[str | None, tuple[str, ...]], ...]
    published: Mapping[str, Mapping[str, float]]

    @property
    def columns(self) -> dict[str, Column]:
        return {name: column for dataset in self.datasets for name, column in dataset.columns.items()}


def names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(path.stem.removeprefix("suite_") for path in ASSETS.glob("suite_*.json")))


def load(spec: str) -> Suite:
    """A suite of the package by its name, or that of a JSON or Python file (`FILE.py:ARGUMENT` calls its
    `get_suite(ARGUMENT)`).

    Raises:
      ValueError: for an unknown name, a file that is no suite, or a suite that contradicts itself.
    """
    if spec in names():
        return parse(json.loads((ASSETS / f"suite_{spec}.json").read_text("utf-8")), spec)
    file, _, argument = spec.partition(":") if ".py:" in spec else (spec, "", "")
    path = pathlib.Path(file)
    if not path.is_file():
        near = difflib.get_close_matches(spec, names(), 1, 0.5)
        raise ValueError(f"suite {spec!r} is neither a file nor one of {', '.join(names())}{_meant(near)}.")
    if path.suffix == ".py":
        module_spec = importlib.util.spec_from_file_location(f"_suite_{path.stem}", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_suite"):
            raise ValueError(f"{path} has no get_suite(); see experiments/evaluate.py for one.")
        return parse(module.get_suite(argument) if argument else module.get_suite(), str(path))
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    return parse(content, str(path))


def parse(content: Mapping[str, Any], where: str) -> Suite:
    """A suite from its plain data; `where` is what errors call it.

    Raises:
      ValueError: naming the data set and the field that is wrong.
    """
    if not isinstance(content, Mapping) or not content.get("datasets"):
        raise ValueError(f"{where} is no suite: want an object with a list of `datasets`.")
    _known(content, ("title", "groups", "datasets", "published"), where)
    datasets: list[Dataset] = []
    for number, entry in enumerate(content["datasets"]):
        at = f"{where}: data set {entry.get('name', number)!r}" if isinstance(entry, Mapping) else f"{where}: {entry!r}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{at} is {type(entry).__name__}; want an object.")
        _known(entry, ("name", "places", "evaluator", "columns"), at)
        if lacking := [field for field in ("name", "evaluator", "columns") if not entry.get(field)]:
            raise ValueError(f"{at} lacks {lacking[0]!r}.")
        try:
            columns = {
                name: Column(column) if isinstance(column, str) else Column(**column)
                for name, column in entry["columns"].items()
            }
            evals.check(entry["evaluator"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{at}: {error}") from error
        datasets.append(Dataset(entry["name"], dict(entry["evaluator"]), columns, tuple(entry.get("places", ()))))
    every = [name for dataset in datasets for name in dataset.columns]
    for kind, found in (("data set", [dataset.name for dataset in datasets]), ("column", every)):
        if twice := [name for name in found if found.count(name) > 1]:
            raise ValueError(f"{where} has two of {kind} {twice[0]!r}; give each a name of its own.")
    groups = [(group.get("average"), tuple(group["columns"])) for group in content.get("groups", ())]
    grouped = [name for _, columns in groups for name in columns]
    if rest := tuple(name for name in every if name not in grouped):
        groups.append((None, rest))
    published = content.get("published", {})
    averages = [average for average, _ in groups if average is not None]
    for source, mentioned, given in (
        ("groups", grouped, every),
        *((f"published {row!r}", list(own), every + averages) for row, own in published.items()),
    ):
        if unknown := [name for name in mentioned if name not in given]:
            raise ValueError(f"{where}: {source} has the column {unknown[0]!r}, which no data set gives.")
    name = pathlib.PurePath(where).stem
    return Suite(name, content.get("title", name), tuple(datasets), tuple(groups), published)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one data set.

    Attributes:
      name: of the data set.
      status: "done", "kept" from an earlier run, "missing" or "failed".
      detail: where the data were looked for, or what failed.
      card: figures, and all they depend on.
      values: {column: value in its unit}; {} unless done or kept.
    """

    name: str
    status: str
    detail: str = ""
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


def run(
    model: inference.Model | vlm.Speaker,
    suite: Suite,
    root: str,
    *,
    only: Iterable[str] = (),
    out: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Evaluates `model` on what is there of a suite's data; every process of a run calls it.

    Args:
      model: on any mesh.
      suite: see `load`.
      root: the folder of all data sets.
      only: names of data sets or of their columns; all if empty.
      out: a folder for finished results, which the next run takes from there.
      limit: take the first so many records of each data set; such numbers are not the benchmark's.
      batch_size: instead of the evaluators' own.
      note: told which data set is running.

    Raises:
      ValueError: for an unknown name in `only`, or if none of the data is there. What is wrong with one data set is
        its result, and the others still run.
    """
    chosen = _chosen(suite, tuple(only))
    located = {}
    for dataset in chosen:
        try:
            config, looked = dataset.locate(root)
            if config is not None:
                config = _set(config, limit, batch_size)
                evals.create(config)
            located[dataset.name] = (config, ", ".join(looked))
        except ValueError as error:
            located[dataset.name] = (error, "")
    if all(config is None for config, _ in located.values()):
        looked = "; ".join(f"{name}: {places}" for name, (_, places) in located.items())
        raise ValueError(f"none of the data sets is below {root}. They were looked for here: {looked}.")
    weights = inference.fingerprint(model.model if isinstance(model, vlm.Speaker) else model)
    results = []
    for dataset in chosen:
        config, looked = located[dataset.name]
        if config is None:
            results.append(Result(dataset.name, "missing", looked))
        elif isinstance(config, ValueError):
            results.append(Result(dataset.name, "failed", str(config)))
        else:
            results.append(_one(model, weights, dataset, config, out, note))
    return results


def _one(
    model: inference.Model | vlm.Speaker,
    weights: str,
    dataset: Dataset,
    config: dict[str, Any],
    out: str | None,
    note: Callable[[str], None],
) -> Result:
    card: dict[str, Any] = {
        "weights": weights,
        "evaluator": config,
        **_reading(model),
        "files": hashlib.sha256("\n".join(sorted(_stamps(config))).encode()).hexdigest()[:16],
    }
    key = hashlib.sha256(json.dumps(card, sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9]+", "_", dataset.name).strip("_")
    file = None if out is None else paths.path(out) / "results" / f"{name}-{key}.json"
    kept = None if file is None else _kept(file)
    if kept is not None:
        return Result(dataset.name, "kept", "", kept, _values(dataset, kept["figures"]))
    note(f"running {dataset.name} ...")
    if file is not None and "replies" in evals.fields(config["name"]):  # where a killed run goes on
        config = {"replies": str(file.with_suffix("")), **config}
    start = time.perf_counter()
    try:
        figures = {name: float(value) for name, value in evals.create(config)(model).items()}
        values = _values(dataset, figures)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        return Result(dataset.name, "failed", str(error))
    versions = {package: importlib.metadata.version(package) for package in ("pe-jax", "jax", "numpy", "pillow")}
    card |= {"figures": figures, "seconds": round(time.perf_counter() - start, 1), "versions": versions}
    if file is not None and jax.process_index() == 0:
        paths.write_text(file, json.dumps(card, indent=1, default=str))
    return Result(dataset.name, "done", "", card, values)


def _reading(model: inference.Model | vlm.Speaker) -> dict[str, Any]:
    """How a model reads what it is given, as JSON types; its `dtype` too."""
    if isinstance(model, vlm.Speaker):
        return model.to_dict()
    return {
        "preprocess": inference.preprocess_of(model).to_dict(),
        "dtype": inference.vision_tower(model).config.dtype,
    }


@dataclasses.dataclass(frozen=True)
class Table:
    """Text of one group of columns: a header, and rows of which the first is ours."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """Results beside the paper's rows.

    Attributes:
      suite: whose columns they are.
      model: what the row is called.
      results: see `run`.
      released: the released name whose architecture the model has; its row is compared with.
      limit: as given to `run`.
    """

    suite: Suite
    model: str
    results: Sequence[Result]
    released: str | None = None
    limit: int | None = None

    @functools.cached_property
    def values(self) -> dict[str, float]:
        return {name: value for result in self.results for name, value in result.values.items()}

    def averages(self, values: Mapping[str, float]) -> dict[str, float]:
        """The plain mean of each group's columns, where all of them are there."""
        return {
            average: float(np.mean([values[name] for name in columns]))
            for average, columns in self.suite.groups
            if average is not None and all(name in values for name in columns)
        }

    def tables(self) -> list[Table]:
        """A table a group. Beside ours: the released model's row and the difference, or else all of the paper's."""
        table = {self.model: self.values}
        reference = self.suite.published.get(self.released or "")
        beside = self.suite.published if reference is None else {self.released: reference}
        table |= {f"paper: {name}": own for name, own in beside.items()}
        shown = [(name, self.averages(own) | dict(own)) for name, own in table.items()]
        if reference is not None:
            (_, ours), (_, theirs) = shown
            shown.append(("difference", {name: ours[name] - theirs[name] for name in ours if name in theirs}))
        found = []
        for average, columns in self.suite.groups:
            header = (*(() if average is None else (average,)), *columns)
            rows = [
                (name, *(self._text(column, own, sign=name == "difference") for column in header))
                for name, own in shown
                if name == self.model or any(column in own for column in columns)
            ]
            found.append(Table(("", *header), tuple(rows)))
        return found

    def _text(self, column: str, values: Mapping[str, float], sign: bool) -> str:
        if column not in values:
            return NONE
        known = self.suite.columns
        digits = known[column].digits if column in known else 1
        return f"{values[column]:{'+' if sign else ''}.{digits}f}"

    @property
    def remarks(self) -> list[str]:
        """What a reader of the tables has to know: missing data, failures, a limit."""
        found = (
            [f"Only the first {self.limit} records of each data set: not the benchmark's numbers."]
            if self.limit
            else []
        )
        for result in self.results:
            if result.status == "missing":
                found.append(f"{result.name} is missing; looked for {result.detail}.")
            if result.status == "failed":
                found.append(f"{result.name} failed: {result.detail}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return {
            "suite": self.suite.name,
            "model": self.model,
            "architecture_of": self.released,
            "limit": self.limit,
            "values": self.values,
            "averages": self.averages(self.values),
            "published": {name: self.averages(own) | dict(own) for name, own in self.suite.published.items()},
            "datasets": [dataclasses.asdict(result) for result in self.results],
        }

    def csv(self) -> str:
        """A row a column of the tables, averages too, with the paper's numbers beside ours."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("column", "data set", "figure", "value", *self.suite.published))
        published = {name: self.averages(own) | dict(own) for name, own in self.suite.published.items()}
        ours = self.values | self.averages(self.values)
        owner = {column: dataset for dataset in self.suite.datasets for column in dataset.columns}
        for average, columns in self.suite.groups:
            for column in (*(() if average is None else (average,)), *columns):
                dataset = owner.get(column)
                said = (dataset.name, dataset.columns[column].figure) if dataset else ("", "mean")
                values = (ours.get(column, ""), *(own.get(column, "") for own in published.values()))
                writer.writerow((column, *said, *values))
        return file.getvalue()

    def markdown(self) -> str:
        """The tables, remarks, and for each data set where it is, how it was evaluated and all its figures."""
        parts = [f"# {self.model}: {self.suite.title}"]
        for table in self.tables():
            lines = [table.header, ("---", *("---:" for _ in table.header[1:])), *table.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += [f"- {remark}" for remark in self.remarks]
        for result in self.results:
            if not result.card:
                continue
            card = result.card
            figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in card["figures"].items())
            settings = json.dumps(card["evaluator"], ensure_ascii=False)
            settings = settings if len(settings) < 1500 else settings[:1500] + " ..."
            parts.append(
                f"## {result.name}\n\nWeights {card['weights']}, {card['dtype']}, {card['seconds']} s, by\n\n"
                f"```json\n{settings}\n```\n\n| figure | value |\n|---|---:|\n{figures}"
            )
        return "\n\n".join(parts) + "\n"

    def write(self, out: str) -> None:
        """SUITE.md, SUITE.csv and SUITE.json in the folder `out`."""
        folder = paths.path(out)
        for ending, text in (
            ("md", self.markdown()),
            ("csv", self.csv()),
            ("json", json.dumps(self.to_dict(), indent=1)),
        ):
            paths.write_text(folder / f"{self.suite.name}.{ending}", text)


def released(model: inference.Model | vlm.Speaker) -> str | None:
    """The released name of a model's architecture, whatever its weights are; None if it has none of them."""
    for name in zoo.NAMES:
        if _architecture(zoo.architecture(name)) == _architecture(model.config):
            return name
    return None


def _architecture(config: Any) -> Any:
    """As plain data, without the dtype of the activations."""

    def bare(value: Any) -> Any:
        return {k: bare(v) for k, v in value.items() if k != "dtype"} if isinstance(value, Mapping) else value

    return bare(dataclasses.asdict(config))


def _chosen(suite: Suite, only: tuple[str, ...]) -> list[Dataset]:
    known = {name: dataset for dataset in suite.datasets for name in (dataset.name, *dataset.columns)}
    if unknown := [name for name in only if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1, 0.5)
        raise ValueError(f"suite {suite.name} has no {unknown[0]!r}; it has {', '.join(known)}{_meant(near)}.")
    wanted = {known[name].name for name in only} or {dataset.name for dataset in suite.datasets}
    return [dataset for dataset in suite.datasets if dataset.name in wanted]


def _set(config: dict[str, Any], limit: int | None, batch_size: int | None) -> dict[str, Any]:
    for name in ("data", "train"):
        if limit is not None and isinstance(given := config.get(name), Mapping):
            config = config | {name: dict(given) | {"limit": min(given.get("limit") or limit, limit)}}
    if batch_size is not None and "batch_size" in evals.fields(config["name"]):
        config = config | {"batch_size": batch_size}
    return config


def _values(dataset: Dataset, figures: Mapping[str, float]) -> dict[str, float]:
    return {name: column.of(figures)[1] for name, column in dataset.columns.items()}


def _kept(file: epath.Path) -> dict[str, Any] | None:
    """The card of an earlier run; all processes get what the first of them finds."""
    card = json.loads(file.read_text()) if jax.process_index() == 0 and file.exists() else None
    if jax.process_count() == 1:
        return card
    from jax.experimental import multihost_utils

    text = json.dumps(card).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _stamps(value: Any) -> Iterable[str]:
    """Name, size and time of every file and folder that a config names, so that changed data are evaluated again."""
    for text in _strings(value):
        if "/" not in text or ("://" in text and not paths.is_bucket(text)):
            continue
        folder = paths.path(text if "{" not in text else text[: text.index("{")].rpartition("/")[0])
        if not folder.exists():
            continue
        for file in sorted(folder.iterdir()) if folder.is_dir() else (folder,):
            if not file.name.endswith(".index.npz"):
                stat = file.stat()
                yield f"{file} {stat.length} {stat.mtime}"


def _strings(value: Any) -> list[str]:
    """All strings in a tree of plain data."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def _fill(value: Any, root: str, place: str | None) -> Any:
    if isinstance(value, str):
        return value.replace("{root}", root.rstrip("/")).replace("{place}", place or "")
    if isinstance(value, Mapping):
        return {name: _fill(part, root, place) for name, part in value.items()}
    return [_fill(part, root, place) for part in value] if isinstance(value, list | tuple) else value


def _exists(text: str) -> bool:
    """Whether a path is there; of a glob or a range of shards, whether its folder is."""
    magic = re.search(r"[*?\[{]", text)
    return paths.path(text if magic is None else text[: magic.start()].rpartition("/")[0]).exists()


def _known(content: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    if unknown := [field for field in content if field not in fields]:
        raise ValueError(f"{where} has the field {unknown[0]!r}; a suite knows {', '.join(fields)} there.")


def _meant(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""

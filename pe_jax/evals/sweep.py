"""One pass over the images for the probes of all layers: features kept in files, streamed from there or from the tower.

Pooled features of every layer go to a folder as `pe_jax.evals.features` writes it: in shards, each whole or not there,
so that a killed sweep goes on where it stopped, and refused where weights, data or preprocessing have changed. They are
mapped, not read, so memory holds a batch. Tokens, thousands of times as many bytes, are taken from the tower anew in
each epoch, or kept in the same way where that is asked for.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pe_jax import sharding
from pe_jax.data.image import Augment, Preprocess, generator
from pe_jax.evals import features, inference, records, zero_shot
from pe_jax.models import zoo
from pe_jax.models.layers import resolve_layers

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclasses.dataclass(frozen=True)
class Task:
    """What is probed: which features of which images, to tell which classes apart.

    Attributes:
      bank: labelled images to learn from, see `pe_jax.evals.records`.
      data: labelled images to classify.
      tune: labelled images on which each probe's free setting (learning rate, penalty, k) is chosen; None chooses it on
        `data`, as the published protocols do.
      classes: names, see `zero_shot.classes`; None takes the labels as they are, integers from 0.
      layers: "all", or layers as `VisionTower.features` takes them.
      pool: what becomes of a layer's tokens where a probe takes one vector: "average" of the patch tokens, or "class".
      pooler: whether what the tower itself pools, before the projection, is one more entry beside the layers.
      batch_size: images in a forward pass, over all devices.
      image_size: pixels of a side; None takes the model's own.
    """

    bank: Mapping[str, Any]
    data: Mapping[str, Any]
    tune: Mapping[str, Any] | None = None
    classes: str | Sequence[str] | None = None
    layers: str | Sequence[int] = "all"
    pool: str = "average"
    pooler: bool = False
    batch_size: int = 64
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.pool not in ("average", "class"):
            raise ValueError(f"pool={self.pool!r} is unknown; choose average or class.")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} must be "all" or a list of layers.')
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")

    @property
    def task(self) -> "Task":
        """The task alone, of a probe that adds its settings to it."""
        return Task(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Task)})


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a probe found.

    Attributes:
      entries: names of what was probed, `layer_00` and so on, and `pooler`.
      settings: names of the values of the probe's free setting, such as `k20` or `rate_0.1`.
      accuracy: [Y, S] share of `data` classified rightly.
      tuned: [Y, S] share of the images that the setting is chosen on.
      facts: how it was done, for a report; with `cost`, what that took, and `cost_shared`, what making the pooled
        features took for all probes together, in this call.
    """

    entries: tuple[str, ...]
    settings: tuple[str, ...]
    accuracy: Float[np.ndarray, "Y S"]
    tuned: Float[np.ndarray, "Y S"]
    facts: dict[str, Any]

    @property
    def chosen(self) -> Int[np.ndarray, "Y"]:
        """Which setting each entry does best with, where it is chosen; the first of equals."""
        return self.tuned.argmax(1)

    @property
    def best(self) -> dict[str, float]:
        """{entry: its accuracy on `data`} with the setting chosen for it."""
        return {entry: float(row[at]) for entry, row, at in zip(self.entries, self.accuracy, self.chosen, strict=True)}

    @property
    def best_entry(self) -> str:
        """The entry with the highest of these, the first of equals."""
        best = self.best
        return max(best, key=lambda entry: best[entry])


@runtime_checkable
class Probe(Protocol):
    """A task with the settings of one probe."""

    @property
    def task(self) -> Task: ...

    @property
    def pooled(self) -> bool:
        """Whether it reads pooled features from files."""
        ...

    @property
    def kept_tokens(self) -> bool:
        """Whether it reads tokens from files."""
        ...

    def score(self, features: "Sweep") -> Scores: ...


def run(
    model: inference.Model,
    probes: Mapping[str, Probe],
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "float32",
    max_bytes: float | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Scores]:
    """Scores of several probes of the same task, for which the features are made once.

    Args:
      model: on any mesh; every process calls this.
      probes: by name; they differ in their settings only.
      folder: where features are kept, for the next call too; None is a temporary one, deleted at the end.
      dtype: of the features that are kept, float32 or float16.
      max_bytes: more than that is not written; None writes what the disk takes.
      progress: told how far it is.

    Raises:
      ValueError: for different tasks, a folder of other features, or more bytes than allowed.
    """
    tasks = {name: probe.task for name, probe in probes.items()}
    if not tasks or any(task != next(iter(tasks.values())) for task in tasks.values()):
        raise ValueError(f"the probes {', '.join(probes) or '(none)'} must have one task; give them the same data.")
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="pe_jax-"))
        sweep = Sweep(model, next(iter(tasks.values())), folder, dtype=dtype, progress=progress)
        pooled, tokens = (any(getattr(p, name) for p in probes.values()) for name in ("pooled", "kept_tokens"))
        sweep.check_size(pooled=pooled, tokens=tokens, max_bytes=max_bytes)
        shared = sweep.cost(lambda: sweep.keep("pooled"))[1] if pooled else None
        found = {}
        for name, probe in probes.items():
            scores, own = sweep.cost(lambda probe=probe: probe.score(sweep))
            facts = scores.facts | {"cost": own} | ({"cost_shared": shared} if probe.pooled else {})
            found[name] = dataclasses.replace(scores, facts=facts)
        return found


class Sweep:
    """The features of one model and task, made when they are first asked for.

    Attributes:
      entries: names of what is probed; the layers come first, ascending.
      layers: their numbers.
      labels: {split: [N] classes}, of the splits `bank`, `data` and, where the task has it, `tune`.
      images: how many have gone through the tower so far.
    """

    def __init__(
        self,
        model: inference.Model,
        task: Task,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        progress: Progress = lambda stage, done, total: None,
    ):
        config = inference.vision_tower(model).config
        if task.pool == "class" and not config.class_token:
            raise ValueError('this tower has no class token; take pool="average".')
        if task.pooler and config.pool == "none":
            raise ValueError("this tower pools nothing (PE-Lang, PE-Spatial); leave pooler out.")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"features are kept as float32 or float16, not {dtype!r}.")
        self.model, self.task, self.config, self.progress = model, task, config, progress
        self._dtype = dtype
        self._folder = pathlib.Path(folder)
        if jax.process_count() > 1:  # each keeps all of them, and waits for no other to write or to delete
            self._folder /= f"process-{jax.process_index():05d}"
        asked = range(config.depth + 1) if isinstance(task.layers, str) else task.layers
        self.layers = tuple(sorted(set(resolve_layers(tuple(asked), config.depth))))
        self.entries = (*map(features.layer_name, self.layers), *(("pooler",) if task.pooler else ()))
        self.mesh = inference.mesh_of(model)
        self.preprocess = inference.preprocess_of(model, task.image_size)
        self._configs = {"bank": task.bank, "data": task.data} | ({"tune": task.tune} if task.tune else {})
        opened = {split: records.open(config) for split, config in self._configs.items()}
        names = None if task.classes is None else zero_shot.classes(task.classes)
        self.labels: dict[str, np.ndarray] = {split: own.labels(names) for split, own in opened.items()}
        self._opened = opened
        self.classes = len(names) if names else 1 + max(int(labels.max()) for labels in self.labels.values())
        self.images = 0
        self._kept: dict[tuple[str, str], Rows] = {}

    @property
    def judged(self) -> tuple[str, ...]:
        """The splits to classify: `data`, and where there is one, `tune`."""
        return tuple(split for split in self.labels if split != "bank")

    @property
    def image_flops(self) -> int:
        """Of the tower's matrix products for one image, up to the last layer that is asked for."""
        config = self.config
        if not self.task.pooler:
            own = {"depth": max(self.layers), "pool": "none", "output_width": None}
            config = dataclasses.replace(config, **own)
        return zoo.forward_flops(config, self.preprocess.shape)

    def cost(self, work: Callable[[], Result]) -> tuple[Result, dict[str, Any]]:
        """What `work` gives; and the seconds, the images through the tower and its FLOPs for them that it took."""
        begun, images = time.perf_counter(), self.images
        result = work()
        images = self.images - images
        seconds = round(time.perf_counter() - begun, 3)
        return result, {"seconds": seconds, "images": images, "tower_flops": images * self.image_flops}

    def bytes(self, *, pooled: bool, tokens: bool) -> int:
        """Of all features on the disk, pooled ones of every entry and tokens of every layer."""
        height, width = (side // self.config.patch_size for side in self.preprocess.shape)
        count = height * width + self.config.class_token
        vectors = pooled * len(self.entries) + tokens * len(self.layers) * count
        images = sum(map(len, self.labels.values()))
        return images * vectors * self.config.width * np.dtype(self._dtype).itemsize

    def check_size(self, *, pooled: bool, tokens: bool, max_bytes: float | None) -> None:
        """Raises a ValueError if these features would take more bytes than allowed, or than the disk has free."""
        size = self.bytes(pooled=pooled, tokens=tokens)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(
                f"the features take {size / 1e9:.3g} GB and {max_bytes / 1e9:.3g} GB are allowed; allow more, take "
                "fewer layers or images, float16, or stream the tokens from the tower."
            )
        if size:
            self.progress(f"features of {sum(map(len, self.labels.values())):,} images, {size / 1e9:.3g} GB", 0, 0)

    def keep(self, what: str) -> dict[str, "Rows"]:
        """{split: features} from the files, which are completed first; `what` is "pooled" or "tokens"."""
        return {split: self._rows(split, what) for split in self.labels}

    def _rows(self, split: str, what: str) -> "Rows":
        if (split, what) not in self._kept:
            folder = self._folder / (split if what == "pooled" else f"{split}_tokens")
            extraction = features.Extraction(
                self.model,
                self._configs[split],
                folder,
                what="class" if what == "pooled" and self.task.pool == "class" else what,
                layers=self.layers,
                dtype=self._dtype,
                batch_size=self.task.batch_size,
                image_size=self.task.image_size,
                part=(0, 1),
                pooler=what == "pooled" and self.task.pooler,
            )
            waiting = extraction.waiting
            extraction.run(lambda done: self.progress(f"{what} features of {split}", done, waiting))
            self.images += waiting
            names = self.entries if what == "pooled" else self.entries[: len(self.layers)]
            self._kept[split, what] = Rows(features.open(folder), names)
        return self._kept[split, what]

    def epochs(self, epochs: float, size: int, seed: int = 0) -> "Epochs":
        """The order in which batches of at most `size` take the bank's images."""
        count = len(self.labels["bank"])
        return Epochs(count, min(size, count), epochs, seed)

    def batches(self, what: str, order: "Epochs") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(features [Y, B, ...], labels [B]) of the bank, from the files."""
        rows, labels = self._rows("bank", what), self.labels["bank"]

        def one(step: int) -> tuple[np.ndarray, np.ndarray]:
            places = order.batch(step)
            return rows.take(places), labels[places]

        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # reads one batch ahead
            pending = pool.submit(one, 0)
            for step in range(order.steps):
                batch = pending.result()
                if step + 1 < order.steps:
                    pending = pool.submit(one, step + 1)
                yield batch

    def stream(
        self, what: str, order: "Epochs", augment: Augment | None = None
    ) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(features [Y, B, ...], labels [B]) of the bank, from the tower, of images that differ from epoch to epoch."""
        images, labels = self._opened["bank"].images, self.labels["bank"]
        preprocess = self.preprocess

        def load(position: int | None) -> np.ndarray:
            if position is None:
                return np.zeros((*preprocess.shape, 3), np.uint8)
            image = images[order[position]]
            if augment is None:
                return preprocess.pixels(image)
            return augment(image, preprocess.shape, generator(order.seed, position), preprocess)

        for step, (found, _) in enumerate(self._passes(what, Padded(order.steps, order.size, self._ways), load)):
            yield found[:, : order.size], labels[order.batch(step)]
            self.images += order.size

    def passes(self, what: str, split: str) -> Iterator[tuple[jax.Array, int]]:
        """(features [Y, B, ...], how many of the rows are real) of a split in order, from the tower."""
        for found, count in self._passes(what, self._opened[split].images, self.preprocess.pixels):
            yield found, count
            self.images += count

    @property
    def _ways(self) -> int:
        return 1 if self.mesh is None else sharding.batch_ways(self.mesh)

    def _passes(self, what: str, rows: Sequence[Any], load: Callable[[Any], np.ndarray]) -> Iterator[Any]:
        forward = _stacked(
            self.preprocess,
            "class" if what == "pooled" and self.task.pool == "class" else what,
            self.layers,
            "float32" if what == "pooled" else self.config.dtype,
            what == "pooled" and self.task.pooler,
        )
        size = rows.batch if isinstance(rows, Padded) else min(self.task.batch_size, len(rows))
        return inference.batches(self.model, forward, rows, load, size, replicate=False)


@functools.cache
def _stacked(
    preprocess: Preprocess, what: str, layers: tuple[int, ...], dtype: str, pooler: bool
) -> Callable[[inference.Model, jax.Array], jax.Array]:
    """`features.forward` as one array, an entry a layer."""
    forward = features.forward(preprocess, what, layers, dtype, pooler)

    def run(model: inference.Model, pixels: jax.Array) -> jax.Array:
        found = forward(model, pixels)
        names = (*map(features.layer_name, layers), *(("pooler",) if pooler else ()))
        return jnp.stack([found[name] for name in names])

    return run


class Epochs(Sequence[int]):
    """An endless shuffle of N images, epoch after epoch, cut into batches: the image at each position.

    The order is a function of the seed alone, not of batches or devices. A batch may span two epochs.
    """

    def __init__(self, count: int, size: int, epochs: float, seed: int):
        self._count, self.size, self.seed = count, size, seed
        self.steps = max(1, -(-round(epochs * count) // size))
        self._permutation = functools.lru_cache(maxsize=4)(self._shuffled)

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, position: Any) -> int:
        epoch, place = divmod(position, self._count)
        return int(self._permutation(epoch)[place])

    def batch(self, step: int) -> Int[np.ndarray, "B"]:
        """[B] images of an update."""
        return np.array([self[position] for position in range(step * self.size, (step + 1) * self.size)])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return generator(self.seed, epoch, stream=1).permutation(self._count)


class Padded(Sequence[Any]):
    """Positions in batches of `size`, brought up by None to a multiple of the ways that a mesh cuts a batch."""

    def __init__(self, steps: int, size: int, ways: int):
        self._steps, self._size, self.batch = steps, size, -(-size // ways) * ways

    def __len__(self) -> int:
        return self._steps * self.batch

    def __getitem__(self, index: Any) -> int | None:
        step, row = divmod(index, self.batch)
        return step * self._size + row if row < self._size else None


class Rows:
    """Features of one split in the order of its records, mapped from their files.

    Attributes:
      names: of the entries, Y of them.
    """

    def __init__(self, stored: features.Stored, names: Sequence[str]):
        self.names = tuple(names)
        self._shards = [shard for shard in stored.shards(self.names) if len(shard[self.names[0]])]
        self._starts = np.cumsum([0] + [len(shard[self.names[0]]) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Int[np.ndarray, "B"]) -> Float[np.ndarray, "Y B ..."]:
        """[Y, B, ...] of all entries."""
        like = self._shards[0][self.names[0]]
        out = np.empty((len(self.names), len(rows), *like.shape[1:]), like.dtype)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner in np.unique(owners):
            here = owners == owner
            places = rows[here] - self._starts[owner]
            for entry, name in enumerate(self.names):
                out[entry, here] = self._shards[owner][name][places]
        return out

    def blocks(self, size: int, names: Sequence[str] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(the first row, [Y, up to `size`, ...]) of some entries, by default all, block after block."""
        for start, shard in zip(self._starts, self._shards, strict=False):
            arrays = [shard[name] for name in (self.names if names is None else names)]
            for at in range(0, len(arrays[0]), size):
                yield int(start) + at, np.stack([array[at : at + size] for array in arrays])

    def entry(self, name: str) -> Float[np.ndarray, "N ..."]:
        """[N, ...] of one entry, read into memory."""
        return np.concatenate([shard[name] for shard in self._shards]).astype(np.float32)

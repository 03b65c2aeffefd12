"""What dense probes of every layer share: images and maps through the tower to heads and judges (PE Tab. 13).

`segmentation` and `depth` are the probes. Heads of all layers and rates train together (`pe_jax.evals.fit`) on one pass
of the frozen tower an epoch, or on tokens kept in files. Each image of `data` is judged at its own size.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pe_jax import sharding
from pe_jax.data.image import Augment, Preprocess, generator
from pe_jax.evals import features, inference, maps, sweep, windows
from pe_jax.evals.dense_heads import DenseHead
from pe_jax.evals.fit import Fitted, fit
from pe_jax.models.layers import resolve_layers

_PADDED = 64  # images are filled up to multiples of it, so that few sizes are compiled
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclasses.dataclass(frozen=True)
class Probed:
    """What a dense probe found.

    Attributes:
      layers: Y layers, as resolved.
      figures: {name: [Y]}, at the best of the rates for each layer.
      every: {name: [Y, R]}.
      rates: R learning rates.
      chosen: [Y] places of the best.
      facts: how it was done, for a report.
      shown: {row of `data`: [Y, H, W]} maps of some images, at the images' size.
    """

    layers: tuple[int, ...]
    figures: dict[str, Float[np.ndarray, "Y"]]
    every: dict[str, Float[np.ndarray, "Y R"]]
    rates: tuple[float, ...]
    chosen: Int[np.ndarray, "Y"]
    facts: dict[str, Any]
    shown: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DenseProbe:
    """What both probes have in common; the public classes say what the fields mean."""

    train: Mapping[str, Any]
    data: Mapping[str, Any]
    layers: str | Sequence[int] = "all"
    image_size: int | None = None
    window: str = "squash"
    rates: Sequence[float] = (1e-3,)
    epochs: float = 20
    batch_size: int = 16
    weight_decay: float = 1e-4
    augment: Mapping[str, Any] | None = None
    cache: str | None = None
    cache_gb: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        windows.Windows(1, self.window)
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} must be "all" or a list of layers.')
        if not len(self.rates) or not min(self.rates) > 0:
            raise ValueError(f"rates={tuple(self.rates)} must be one or more positive numbers, like (0.0001, 0.001).")
        for name in ("epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0.")
        augment = self.augmentation
        if self.cache is not None and (augment != Augment() or self.window != "squash"):
            raise ValueError(
                "the tokens that are kept are those of whole images as they are; with `cache` set augment to null and "
                'window to "squash", or leave `cache` out.'
            )

    @property
    def augmentation(self) -> Augment:
        return Augment() if self.augment is None else Augment.from_dict(self.augment)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = self.run(model, show=0)
        return features.by_layer(found.layers, found.figures)

    def run(
        self, model: inference.Model, progress: Progress = lambda stage, done, total: None, show: int = 4
    ) -> Probed:
        raise NotImplementedError

    def transform(self, steps: int) -> optax.GradientTransformation:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some images of `data`: their tokens, how maps of the squares become theirs, and what is true of them."""

    start: int
    count: int
    tokens: Float[Array, "Y N P D"]
    a: Float[np.ndarray, "B S H g"]
    b: Float[np.ndarray, "B S W g"]
    truth: np.ndarray
    sizes: list[tuple[int, int]]


class Work:
    """One call of a dense probe."""

    def __init__(self, task: DenseProbe, model: inference.Model, kind: maps.Kind, progress: Progress):
        config = inference.vision_tower(model).config
        self._task, self._model, self._progress = task, model, progress
        self.train, self.data = maps.open(task.train, kind), maps.open(task.data, kind)
        asked = range(config.depth + 1) if isinstance(task.layers, str) else task.layers
        self.layers = tuple(sorted(set(resolve_layers(tuple(asked), config.depth))))
        own = inference.preprocess_of(model, task.image_size)
        self.side = own.shape[0]
        if own.shape[0] != own.shape[1] or self.side % config.patch_size:
            raise ValueError(
                f"the image size is {own.shape}; want a square of a multiple of the patch size {config.patch_size}."
            )
        self._preprocess = dataclasses.replace(
            own, size=self.side, mode="squash", exif=False
        )  # a map is of the pixels as stored
        self.grid, self.width = self.side // config.patch_size, config.width
        self._config, self._mesh = config, inference.mesh_of(model)
        self._windows = windows.Windows(self.side, task.window)

    def fit(
        self,
        head: DenseHead,
        target: Callable[[int], np.ndarray],
        watch: Callable[[int, Fitted], None] | None = None,
    ) -> tuple[Fitted, dict[str, Any]]:
        """Trains the heads; and how that was done.

        Args:
          head: of one layer.
          target: row of `train` → its map, of the image's size.
          watch: called after every epoch and at the end, with the number of epochs and the heads.
        """
        task = self._task
        order = sweep.Epochs(len(self.train), min(task.batch_size, len(self.train)), task.epochs, task.seed)
        steps = order.steps

        def watched(step: int, fitted: Fitted) -> None:
            ended = (step * order.size) // len(self.train)
            if watch is not None and (step == steps or ended > ((step - 1) * order.size) // len(self.train)):
                watch(max(1, ended), fitted)

        def batches() -> Iterator[tuple[Any, np.ndarray]]:
            name = f"{type(task).__name__.lower()}: {len(self.layers)} layers at {len(task.rates)} rates"
            source = self._kept(order) if task.cache else self._streamed(order)
            with concurrent.futures.ThreadPoolExecutor(inference.THREADS) as pool:

                def begin(step: int) -> list[concurrent.futures.Future[np.ndarray]]:
                    positions = range(step * order.size, (step + 1) * order.size)
                    return [pool.submit(self._target, target, order, position) for position in positions]

                pending = begin(0)
                for step, tokens in enumerate(source):
                    targets = np.stack([future.result() for future in pending])
                    if step + 1 < steps:
                        pending = begin(step + 1)
                    yield tokens, targets
                    self._progress(name, step + 1, steps)

        fitted = fit(
            head.init,
            head.loss,
            batches(),
            layers=len(self.layers),
            rates=tuple(task.rates),
            transform=task.transform(steps),
            mesh=self._mesh,
            seed=task.seed,
            large=True,
            watch=watched if watch is not None else None,
        )
        losses = fitted.losses[-1]
        return fitted, {
            "images": {"train": len(self.train), "data": len(self.data)},
            "image_size": self.side,
            "window": task.window,
            "epochs": task.epochs,
            "updates": steps,
            "examples": order.size,
            "augment": dataclasses.asdict(task.augmentation),
            "last_loss": [[float(v) if np.isfinite(v) else None for v in row] for row in losses],
        }

    def _square(self, order: sweep.Epochs, position: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of an image that an update sees before augmentation, (left, top, right, bottom)."""
        height, width = size
        if self._task.window == "squash":
            return 0, 0, width, height
        side = min(size)
        y, x = generator(order.seed, position, stream=2).random(2)
        top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
        return left, top, left + side, top + side

    def _target(self, target: Callable[[int], np.ndarray], order: sweep.Epochs, position: int) -> np.ndarray:
        found = target(order[position])
        left, top, right, bottom = self._square(order, position, found.shape)
        part = np.ascontiguousarray(found[top:bottom, left:right])
        return self._task.augmentation.map(part, (self.side, self.side), generator(order.seed, position))

    def _streamed(self, order: sweep.Epochs) -> Iterator[jax.Array]:
        """[Y, B, P, D] tokens of an update's images, from the tower."""
        ways = 1 if self._mesh is None else sharding.batch_ways(self._mesh)
        rows = sweep.Padded(order.steps, order.size, ways)
        augment, preprocess = self._task.augmentation, self._preprocess

        def load(position: int | None) -> np.ndarray:
            if position is None:
                return np.zeros((1, self.side, self.side, 3), np.uint8)
            image = self.train.image(order[position])
            image = image.crop(self._square(order, position, (image.height, image.width)))
            rng = generator(order.seed, position)
            return augment(image, (self.side, self.side), rng, preprocess)[None]

        forward = _tokens(preprocess, self.layers)
        for tokens, _ in inference.batches(self._model, forward, rows, load, rows.batch, replicate=False):
            yield tokens[:, : order.size]

    def _kept(self, order: sweep.Epochs) -> Iterator[np.ndarray]:
        """The same from files, which are completed first."""
        task, config = self._task, self._config
        assert task.cache is not None
        own = inference.preprocess_of(self._model, task.image_size)
        if own.mode != "squash":
            raise ValueError(f"this model's own transform is {own.mode!r}, so its tokens cannot be kept; unset cache.")
        count = self.grid**2 + config.class_token
        size = len(self.train) * len(self.layers) * count * self.width * 4
        if size > 1e9 * task.cache_gb:
            raise ValueError(
                f"the tokens of {len(self.train):,} images and {len(self.layers)} layers take {size / 1e9:.3g} GB and "
                f"cache_gb={task.cache_gb:g} allows less; raise it, take fewer layers, or unset cache."
            )
        folder = task.cache
        if jax.process_count() > 1:  # each keeps all of them, and waits for no other to write
            folder = f"{folder}/process-{jax.process_index():05d}"
        extraction = features.Extraction(
            self._model,
            maps.source_of(task.train),
            folder,
            what="tokens",
            layers=self.layers,
            batch_size=task.batch_size,
            image_size=task.image_size,
            part=(0, 1),
        )
        waiting = extraction.waiting
        extraction.run(lambda done: self._progress("tokens of train", done, waiting))
        rows = sweep.Rows(features.open(folder), tuple(map(features.layer_name, self.layers)))
        for step in range(order.steps):
            yield rows.take(order.batch(step))[:, :, int(config.class_token) :]

    def judge(
        self,
        head: DenseHead,
        judge: Callable[[Batch], None],
        truth: Callable[[int], np.ndarray],
        nothing: float,
        stage: str,
    ) -> None:
        """Calls `judge` with all images of `data`, batch after batch.

        Args:
          head: whose maps are judged.
          judge: given each batch.
          truth: row → what is true of the image, [H, W] of its size.
          nothing: what stands for no truth, where images are filled up to one size.
          stage: what progress calls it.
        """
        rows, data = range(len(self.data)), self.data
        count = 1
        if self._task.window == "slide":
            count = max(self._windows.count(data.size(row)) for row in rows)
        size = max(1, self._task.batch_size // count)
        ways = 1 if self._mesh is None else sharding.batch_ways(self._mesh)
        size = -(-min(size, len(rows)) // ways) * ways

        def pixels(row: int) -> np.ndarray:
            return self._windows.pixels(data.image(row), self._preprocess, count)

        forward = _tokens(self._preprocess, self.layers)
        with concurrent.futures.ThreadPoolExecutor(inference.THREADS) as pool:
            pending = [pool.submit(truth, row) for row in rows[:size]]
            done = 0
            for tokens, own in inference.batches(self._model, forward, rows, pixels, size, replicate=False):
                true = [future.result() for future in pending]
                pending = [pool.submit(truth, row) for row in rows[done + size : done + 2 * size]]
                sizes = [(len(one), one.shape[1]) for one in true]
                height, width = (-(-max(side) // _PADDED) * _PADDED for side in zip(*sizes, strict=True))
                a = np.zeros((size, count, height, head.grid), np.float32)
                b = np.zeros((size, count, width, head.grid), np.float32)
                padded = np.full((size, height, width), nothing, true[0].dtype)
                for place, one in enumerate(true):
                    a[place], b[place] = self._windows.matrices(sizes[place], head.grid, count, (height, width))
                    padded[place, : len(one), : one.shape[1]] = one
                judge(Batch(done, own, tokens, a, b, padded, sizes))
                done += own
                self._progress(f"judging, {stage}", done, len(rows))

    def show(self, wanted: int, shown: dict[int, np.ndarray], batch: Batch, draw: Callable[[int], Array]) -> None:
        """Keeps the maps of some images, evenly spread over `data`: [Y, R, H, W] of those in the batch."""
        total = len(self.data)
        rows = {round(i * (total - 1) / max(wanted - 1, 1)) for i in range(min(wanted, total))}
        for place in range(batch.count):
            if batch.start + place in rows:
                height, width = batch.sizes[place]
                shown[batch.start + place] = np.asarray(draw(place))[..., :height, :width]

    def probed(
        self, every: dict[str, np.ndarray], chosen: np.ndarray, facts: dict[str, Any], shown: dict[int, np.ndarray]
    ) -> Probed:
        rows = np.arange(len(self.layers))
        return Probed(
            self.layers,
            {name: values[rows, chosen] for name, values in every.items()},
            every,
            tuple(self._task.rates),
            chosen,
            facts,
            {row: own[rows, chosen] for row, own in sorted(shown.items())},
        )


@functools.cache
def _tokens(preprocess: Preprocess, layers: tuple[int, ...]) -> Callable[[inference.Model, jax.Array], jax.Array]:
    """From squares [B, S, H, W, 3] to patch tokens [Y, B·S, P, D]."""

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        flat = pixels.reshape(-1, *pixels.shape[2:])
        images = inference.normalized(flat, preprocess)
        found = inference.vision_tower(model).features(images, layers, class_token=False)
        return jnp.stack([found[layer] for layer in layers])

    return forward

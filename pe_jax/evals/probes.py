"""Probes of every layer: where in the tower the classes lie apart (PE §3, Fig. 8 and Tab. 8).

Four of them, each an evaluator and a part of a sweep (`pe_jax.evals.sweep`), with a protocol of its own:

  knn        neighbours vote                                             pooled features
  linear     batch norm and a linear map, by SGD                         pooled features
  logistic   multinomial logistic regression at its optimum              pooled features, unit rows
  attention  one block of cross-attention with a learned query           all tokens

PE names the protocols and gives no settings; what its sources leave open is chosen here, in the fields' defaults.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from pe_jax import sharding
from pe_jax.data.image import Augment
from pe_jax.evals import heads, inference, sweep
from pe_jax.evals.fit import Fitted, adamw, fit

TEMPERATURE = 0.07  # of a neighbour's vote, exp(cosine / temperature); DINOv2's protocol (PE §3, Tab. 8)

Nearest = tuple[Array, Array]  # cosines and labels [Y, Q, k], best first


@jax.jit
def nearer(
    nearest: Nearest, queries: Float[Array, "Y Q D"], bank: Float[Array, "Y B D"], labels: Int[Array, "B"]
) -> Nearest:
    """The k nearest of those so far and of one more batch of the bank; a label of -1 marks a row that is none."""

    def one(layer: tuple[Array, ...]) -> Nearest:
        cosines, own, q, b = layer
        fresh = jnp.dot(q, b.T, precision=jax.lax.Precision.HIGHEST)
        fresh = jnp.where(labels >= 0, fresh, -jnp.inf)
        both = jnp.concatenate([cosines, fresh], 1)
        names = jnp.concatenate([own, jnp.broadcast_to(labels, fresh.shape)], 1)
        best, at = jax.lax.top_k(both, cosines.shape[1])  # ties: the earlier of the bank wins
        return best, jnp.take_along_axis(names, at, 1)

    return jax.lax.map(one, (*nearest, queries, bank))  # layer by layer: one [Q, k + B] table at a time


def vote(cosines: Float[np.ndarray, "Q k"], labels: Int[np.ndarray, "Q k"], temperature: float) -> Int[np.ndarray, "Q"]:
    """The class with the most weight among the neighbours, each weighing exp(cosine / temperature)."""
    weights = np.exp((cosines - cosines.max(-1, keepdims=True)) / temperature)
    same = labels[:, :, None] == labels[:, None, :]
    # Over pairs of neighbours rather than over classes: there may be thousands of those.
    totals = np.where(same, weights[:, None, :], 0).sum(-1)
    return np.take_along_axis(labels, totals.argmax(-1)[:, None], 1)[:, 0]


@dataclasses.dataclass(frozen=True)
class _Probe(sweep.Task):
    """What the evaluators have in common: a task, and figures of each layer with the setting chosen for it."""

    pooled = True
    kept_tokens = False

    def __call__(self, model: inference.Model) -> dict[str, float]:
        name = type(self).__name__.lower()
        return {f"{entry}_{name}": value for entry, value in self._scores(model).best.items()}

    def score(self, features: sweep.Sweep) -> sweep.Scores:
        raise NotImplementedError

    def _scores(self, model: inference.Model) -> sweep.Scores:
        return sweep.run(model, {"probe": self})["probe"]


@dataclasses.dataclass(frozen=True)
class KNN(_Probe):
    """Evaluator `{"name": "knn", "bank": {...}, "data": {...}, "classes": ...}` → accuracy of each layer.

    Figures are `layer_03_k20`, with layer 0 the patch embedding, in [0, 1]. For a vision-only model too.

    Attributes (besides those of `sweep.Task`):
      k: how many neighbours vote; each number is a figure of its own.
      temperature: of a vote.

    Source: DINOv2's protocol (PE §3, Tab. 8), which reports the best k of 10, 20, 100 and 200.
    """

    k: Sequence[int] | int = (20,)  # PE leaves it open
    temperature: float = TEMPERATURE

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The numbers of neighbours, ascending as given."""
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"k={self.k} must be numbers of neighbours of at least 1, like (10, 20).")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")

    def __call__(self, model: inference.Model) -> dict[str, float]:
        scores = self._scores(model)
        return {
            f"{entry}_{setting}": float(scores.accuracy[row, column])
            for row, entry in enumerate(scores.entries)
            for column, setting in enumerate(scores.settings)
        }

    def score(self, features: sweep.Sweep) -> sweep.Scores:
        """An entry and a part of the queries at a time, past which the bank streams."""
        bank_labels, most = features.labels["bank"].astype(np.int32), max(self.neighbours)
        if most > len(bank_labels):
            raise ValueError(f"k={most} neighbours were asked for and the bank has {len(bank_labels)} images; lower k.")
        kept = features.keep("pooled")
        guesses = {
            split: np.empty((len(features.entries), len(self.neighbours), len(kept[split])), np.int64)
            for split in features.judged
        }
        for row, entry in enumerate(features.entries):
            features.progress("k-NN", row, len(features.entries))
            for split in features.judged:
                for start, queries in kept[split].blocks(8192, (entry,)):
                    queries = jnp.asarray(_unit(queries))
                    shape = (*queries.shape[:2], most)
                    nearest = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
                    for at, block in kept["bank"].blocks(2048, (entry,)):
                        own = jnp.asarray(bank_labels[at : at + block.shape[1]])
                        nearest = nearer(nearest, queries, jnp.asarray(_unit(block)), own)
                    cosines, voters = (np.asarray(x)[0] for x in nearest)
                    for column, k in enumerate(self.neighbours):
                        guesses[split][row, column, start : start + len(cosines)] = vote(
                            cosines[:, :k], voters[:, :k], self.temperature
                        )
        settings = tuple(f"k{k}" for k in self.neighbours)
        return _scores(features, features.entries, settings, guesses, {"temperature": self.temperature})


@dataclasses.dataclass(frozen=True)
class _Trained(_Probe):
    """A head trained by `fit`, one for each entry and rate."""

    rates: Sequence[float] = ()
    epochs: float = 20
    augment: Mapping[str, Any] | None = None  # of the bank's images, see `pe_jax.data.image.Augment`
    seed: int = 0
    _large = False  # the heads, see `fit`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.rates) or not min(self.rates) > 0:
            raise ValueError(f"rates={tuple(self.rates)} must be one or more positive numbers, like (0.01, 0.1).")
        if not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs} must be above 0.")
        if self.augment is not None:
            Augment.from_dict(self.augment)

    @property
    def _augment(self) -> Augment | None:
        return None if self.augment is None else Augment.from_dict(self.augment)

    def _train(
        self,
        features: sweep.Sweep,
        head: heads.Head,
        batches: Iterable[tuple[Any, np.ndarray]],
        order: sweep.Epochs,
        rates: Sequence[float],
        transform: optax.GradientTransformation,
        entries: tuple[str, ...],
    ) -> Fitted:
        name = type(self).__name__.lower()

        def told() -> Iterator[tuple[Any, np.ndarray]]:
            for step, batch in enumerate(batches):
                yield batch
                features.progress(f"{name}: {len(entries)} layers at {len(rates)} rates", step + 1, order.steps)

        options: Any = {"layers": len(entries), "rates": rates, "transform": transform, "mesh": features.mesh}
        return fit(head.init, head.loss, told(), seed=self.seed, large=self._large, **options)

    def _judge(
        self,
        features: sweep.Sweep,
        head: heads.Head,
        fitted: Fitted,
        passes: Callable[[str], Iterable[tuple[Any, int]]],
        entries: tuple[str, ...],
        facts: dict[str, Any],
    ) -> sweep.Scores:
        guesses = {
            split: np.concatenate(
                [np.asarray(fitted.apply(head.predict, found))[..., :count] for found, count in passes(split)], -1
            )
            for split in features.judged
        }
        losses = fitted.losses[-1]
        facts = facts | {
            "epochs": self.epochs,
            "updates": len(fitted.losses),
            "augment": None if self._augment is None else dataclasses.asdict(self._augment),
            "last_loss": [[float(value) if np.isfinite(value) else None for value in row] for row in losses],
        }
        return _scores(features, entries, tuple(f"rate_{rate:g}" for rate in self.rates), guesses, facts)


@dataclasses.dataclass(frozen=True)
class Linear(_Trained):
    """Evaluator `{"name": "linear", "bank": {...}, "data": {...}}` → `layer_03_linear`, at the best of the rates.

    Batch norm without affine and a linear map, by SGD with momentum 0.9, no weight decay, and a cosine to 0.

    Attributes (besides those of `sweep.Task`):
      rates: at 256 examples an update; they grow with the number of examples, as in MAE.
      epochs: passes over the bank.
      examples: in an update.
      augment: fields of `Augment`, with which each epoch passes through the tower; None reads features from the files.
      seed: of the order and of the heads.

    Source: MAE (arXiv 2111.06377, appendix A.1) and InternVL (2312.14238), the protocol that PE names (§3, Tab. 8).
    """

    rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    examples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 2:
            raise ValueError(f"examples={self.examples} must be at least 2: batch norm takes their deviation.")

    @property
    def pooled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.augment is None

    def score(self, features: sweep.Sweep) -> sweep.Scores:
        head = heads.linear(features.config.width, features.classes)
        order = features.epochs(self.epochs, self.examples, self.seed)
        if order.size < 2:
            raise ValueError("the bank has 1 image; batch norm takes the deviation of 2 or more.")
        rates = [rate * order.size / 256 for rate in self.rates]
        if self.augment is None:
            batches = features.batches("pooled", order)
        else:
            batches = features.stream("pooled", order, self._augment)
        fitted = self._train(features, head, batches, order, rates, _sgd(order.steps), features.entries)

        def passes(split: str) -> Iterable[tuple[Any, int]]:
            if self.augment is not None:
                return features.passes("pooled", split)
            return ((block, block.shape[1]) for _, block in features.keep("pooled")[split].blocks(2048))

        facts = {"optimizer": "SGD, momentum 0.9, cosine", "examples": order.size, "rates_at_256": list(self.rates)}
        return self._judge(features, head, fitted, passes, features.entries, facts)


@dataclasses.dataclass(frozen=True)
class Attention(_Trained):
    """Evaluator `{"name": "attention", "bank": {...}, "data": {...}}` → `layer_03_attention`, at the best of the rates.

    One block of cross-attention with a learned query on a layer's tokens (`heads.AttentionProbe`), by AdamW with a
    linear warmup over a tenth of the updates and a cosine to 0. An update is a forward pass: `batch_size` images.

    Attributes (besides those of `sweep.Task`):
      rates: peak learning rates.
      epochs: passes over the bank.
      augment: fields of `Augment`; by default a random crop and flip.
      keep_tokens: read tokens from the files instead of the tower, which takes `augment` None and much space.
      heads: of the attention; None takes as many as the tower's own pooling has.
      weight_decay: of AdamW, on kernels alone.
      seed: of the order and of the heads.

    Source: AIMv2 (arXiv 2411.14402), the protocol that PE names (§3, Fig. 8 and Tab. 8).
    """

    rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3)
    augment: Mapping[str, Any] | None = dataclasses.field(
        default_factory=lambda: {"crop_scale": (0.08, 1.0), "hflip": 0.5}
    )
    keep_tokens: bool = False
    heads: int | None = None
    weight_decay: float = 0.05
    pooled = False
    _large = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_tokens and self.augment is not None:
            raise ValueError(
                "kept tokens are those of images as they are; set augment to None, or keep_tokens to False."
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0.")

    @property
    def kept_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.keep_tokens

    def score(self, features: sweep.Sweep) -> sweep.Scores:
        config, entries = features.config, features.entries[: len(features.layers)]
        count = self.heads or config.pool_heads
        if config.width % count:
            raise ValueError(f"{count} heads do not divide the tower's width {config.width}; set `heads`.")
        head = heads.attention(config.width, count, features.classes)
        order = features.epochs(self.epochs, self.batch_size, self.seed)
        if self.keep_tokens:
            batches = features.batches("tokens", order)
        else:
            batches = features.stream("tokens", order, self._augment)
        transform = _adamw(order.steps, self.weight_decay)
        fitted = self._train(features, head, batches, order, self.rates, transform, entries)

        def passes(split: str) -> Iterable[tuple[Any, int]]:
            if not self.keep_tokens:
                return features.passes("tokens", split)
            blocks = features.keep("tokens")[split].blocks(self.batch_size)
            return ((block, block.shape[1]) for _, block in blocks)

        facts = {"optimizer": f"AdamW, decay {self.weight_decay:g}, cosine", "examples": order.size, "heads": count}
        return self._judge(features, head, fitted, passes, entries, facts)


@dataclasses.dataclass(frozen=True)
class Logistic(_Probe):
    """Evaluator `{"name": "logistic", "bank": {...}, "data": {...}}` → `layer_03_logistic`, at the best of the C.

    Multinomial logistic regression of unit features to its optimum, as scikit-learn's `LogisticRegression(C)` has it.
    One layer's features are in memory at a time, cut over the devices of the mesh.

    Attributes (besides those of `sweep.Task`):
      c: inverse strengths of the penalty, as scikit-learn counts them.
      iterations: of L-BFGS at most, for each of them.

    Source: CLIP (arXiv 2103.00020, §3.2) and DINOv2 (2304.07193), on unit features as the latter.
    """

    c: Sequence[float] = (1.0, 10.0, 100.0, 1000.0)
    iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.c) or not min(self.c) > 0:
            raise ValueError(f"c={tuple(self.c)} must be one or more positive numbers, like (1, 10, 100).")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1.")

    def score(self, features: sweep.Sweep) -> sweep.Scores:
        kept, labels = features.keep("pooled"), features.labels["bank"].astype(np.int32)
        guesses = {
            split: np.empty((len(features.entries), len(self.c), len(kept[split])), np.int64)
            for split in features.judged
        }
        steps = np.zeros((len(features.entries), len(self.c)), int)
        for row, entry in enumerate(features.entries):
            features.progress("logistic regression", row, len(features.entries))
            x, y = _cut(_unit(kept["bank"].entry(entry)), labels, features.mesh)
            found = np.zeros((x.shape[1], features.classes), np.float32), np.zeros(features.classes, np.float32)
            judged = {split: _unit(kept[split].entry(entry)) for split in features.judged}
            # From the strongest penalty to the weakest, each from the optimum before.
            for column in np.argsort(self.c):
                found, taken, _ = heads.logistic(
                    x, y, jnp.float32(1 / (self.c[column] * len(labels))), found, iterations=self.iterations
                )
                found, steps[row, column] = tuple(np.asarray(leaf) for leaf in found), int(taken)
                for split, queries in judged.items():
                    guesses[split][row, column] = (queries @ found[0] + found[1]).argmax(1)
        facts = {"optimizer": "L-BFGS to the optimum", "iterations": steps.tolist()}
        return _scores(features, features.entries, tuple(f"c_{c:g}" for c in self.c), guesses, facts)


@functools.lru_cache(maxsize=16)
def _sgd(steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, steps)))


@functools.lru_cache(maxsize=16)
def _adamw(steps: int, weight_decay: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps))
    return adamw(schedule, weight_decay)


def _unit(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _cut(x: np.ndarray, labels: np.ndarray, mesh: Any) -> tuple[jax.Array, jax.Array]:
    """Features [N, D] and labels [N] over all devices of a mesh, with rows of label -1 where N is no multiple."""
    if mesh is None:
        return jnp.asarray(x), jnp.asarray(labels)
    mesh, _, _, partition = sharding.heads_mesh(mesh, 1, 1)
    more = -len(x) % mesh.size
    x, labels = np.pad(x, ((0, more), (0, 0))), np.pad(labels, (0, more), constant_values=-1)
    place = NamedSharding(mesh, partition)
    return tuple(jax.make_array_from_callback(a.shape, place, lambda i, a=a: a[i]) for a in (x, labels))  # pyright: ignore[reportReturnType]


def _scores(
    features: sweep.Sweep,
    entries: tuple[str, ...],
    settings: tuple[str, ...],
    guesses: Mapping[str, Int[np.ndarray, "Y S N"]],
    facts: dict[str, Any],
) -> sweep.Scores:
    right = {split: (own == features.labels[split]).mean(-1) for split, own in guesses.items()}
    return sweep.Scores(entries, settings, right["data"], right.get("tune", right["data"]), facts)

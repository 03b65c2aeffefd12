"""The probes of frozen features beside scikit-learn's on the same features: python -m benchmarks.probes

k-NN with votes of exp(cosine / temperature): ours takes the bank a batch at a time, as `pe_jax.evals.probes.KNN` does
while the tower makes it; scikit-learn's KNeighborsClassifier(algorithm="brute", metric="cosine") has it whole. Features
are made up: classes are directions, with as much noise that some neighbours err.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.results import OURS

SKLEARN = "scikit-learn"
Split = tuple[np.ndarray, np.ndarray]  # features [N, D], unit rows of float32, and labels [N]


def features(bank: int, queries: int, width: int, classes: int) -> tuple[Split, Split]:
    """What a tower might give for training and for held-out images."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, width), np.float32)

    def draw(count: int) -> Split:
        labels = rng.integers(0, classes, count).astype(np.int32)
        x = centres[labels] + 5 * rng.standard_normal((count, width), np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True), labels

    return draw(bank), draw(queries)


def prepare(sides: Mapping[str, Callable[..., Any]], probe: str, sizes: Mapping[str, int], **options: Any) -> Any:
    """What a worker runs: one probe, from features to the classes of the queries.

    Args:
      sides: of one program, its probes by name; each is built from the bank, its labels, the queries and `options`.
      probe: which of them.
      sizes: of `features`.
      options: of the probe.
    """
    (bank, names), (queries, truth) = features(**sizes)
    run = sides[probe](bank, names, queries, **options)

    def timed() -> dict[str, Any]:
        start = turns.clock()
        guesses = run()
        seconds = turns.clock() - start
        accuracy = float((guesses == truth).mean())
        return {"seconds": seconds, "figures": {"accuracy": accuracy}, "guesses": guesses.tolist()}

    return timed


def _knn(bank: np.ndarray, names: np.ndarray, queries: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    import jax.numpy as jnp

    from pe_jax.evals import probes

    size = probes.KNN.batch_size

    def run() -> np.ndarray:
        nearest = jnp.full((1, len(queries), k), -jnp.inf), jnp.full((1, len(queries), k), -1, jnp.int32)
        asked = jnp.asarray(queries)[None]
        for at in range(0, len(bank), size):
            part = slice(at, at + size)
            nearest = probes.nearer(nearest, asked, jnp.asarray(bank[None, part]), jnp.asarray(names[part]))
        cosines, voters = (np.asarray(x)[0] for x in nearest)
        return probes.vote(cosines, voters, probes.TEMPERATURE)

    return run


def _sklearn_knn(bank: np.ndarray, names: np.ndarray, queries: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    from sklearn.neighbors import KNeighborsClassifier

    from pe_jax.evals.probes import TEMPERATURE

    def weights(distances: np.ndarray) -> np.ndarray:  # of 1 - cosine
        return np.exp(-distances / TEMPERATURE)

    def run() -> np.ndarray:
        how: Any = {"algorithm": "brute", "metric": "cosine", "weights": weights, "n_jobs": -1}
        probe = KNeighborsClassifier(k, **how)
        return probe.fit(bank, names).predict(queries)

    return run


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    ours = found[OURS]
    for program, out in found.items():
        agreed = np.mean(np.equal(out["guesses"], ours["guesses"]))
        assert agreed > 0.995, f"{program} and ours give the same class to {agreed:.1%} of the queries only"


def _case(bank: int, queries: int, width: int, classes: int, k: int) -> turns.Case:
    title = f"k-NN, {queries:,} queries in a bank of {bank:,}, width {width}, {classes} classes, k={k}"
    sizes = {"bank": bank, "queries": queries, "width": width, "classes": classes}
    return turns.Case(title, {"probe": "knn", "sizes": sizes, "k": k}, (OURS, SKLEARN))


BENCHMARK = turns.Benchmark(
    "probes",
    __doc__ or "",
    {
        OURS: turns.Program(functools.partial(prepare, {"knn": _knn})),
        SKLEARN: turns.Program(functools.partial(prepare, {"knn": _sklearn_knn}), ("sklearn",)),
    },
    cases=[_case(20_000, 2_000, 1024, 100, 20)],
    quick=[_case(640, 64, 32, 5, 5)],
    same=same,
    packages=("jax", "scikit-learn", "numpy"),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

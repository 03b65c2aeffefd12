"""Probing all layers in one sweep beside probing the last one alone, on the same images: python -m benchmarks.sweep

Both are `pe_jax.evals.sweep.run` with k-NN, the linear and the attention probe, each with its grid of rates, on a tower
with random weights and made-up images. The tower's passes are the same, so the ratio is what the other layers cost.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.results import OURS

ALONE = "the last layer alone"


def prepare(arch: str | Mapping[str, Any], bank: int, data: int, epochs: int, *, alone: bool) -> Callable[[], Any]:
    """What a worker runs: a whole sweep, from image files to accuracies.

    Args:
      arch: of the tower.
      bank, data: numbers of images.
      epochs: of both trained probes.
      alone: whether to probe the last layer instead of all.
    """
    import jax
    import PIL.Image
    from flax import nnx

    from pe_jax.evals import sweep
    from pe_jax.evals.inference import vision_tower
    from pe_jax.evals.probes import KNN, Attention, Linear
    from pe_jax.models import zoo
    from pe_jax.types import split

    graphdef, _ = split(zoo.abstract(arch))
    model = nnx.merge(graphdef, jax.jit(lambda: split(zoo.build(arch, nnx.Rngs(0)))[1])())
    depth, folder = vision_tower(model).config.depth, tempfile.TemporaryDirectory()
    rng, sources = np.random.default_rng(0), []
    for name, count in (("bank", bank), ("data", data)):
        lines = []
        for i in range(count):
            image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            PIL.Image.fromarray(image).save(Path(folder.name, f"{name}{i}.png"))
            lines.append(json.dumps({"image": f"{name}{i}.png", "label": i % 4}))
        path = Path(folder.name, f"{name}.jsonl")
        path.write_text("\n".join(lines))
        sources.append({"name": "jsonl", "path": str(path)})
    task: Any = {"layers": (-1,) if alone else tuple(range(1, depth + 1)), "batch_size": bank}
    probes = {
        "knn": KNN(*sources, **task, k=min(20, bank)),
        "linear": Linear(*sources, **task, epochs=epochs),
        "attention": Attention(*sources, **task, epochs=epochs),
    }

    def run() -> dict[str, Any]:
        start = turns.clock()
        found = sweep.run(model, probes)
        seconds = turns.clock() - start
        last = {name: scores.accuracy[-1].tolist() for name, scores in found.items()}
        losses = {name: scores.facts["last_loss"][-1] for name, scores in found.items() if name != "knn"}
        assert folder.name  # the images are there as long as this is called
        return {"seconds": seconds, "last": last, "losses": losses}

    return run


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    for program, out in found.items():
        for probe, losses in out["losses"].items():
            wanted = np.array(found[OURS]["losses"][probe], float)
            np.testing.assert_allclose(np.array(losses, float), wanted, rtol=1e-3, err_msg=f"{program}, {probe}")
        assert out["last"]["knn"] == found[OURS]["last"]["knn"], f"{program}: k-NN differs"


def _case(title: str, **settings: Any) -> turns.Case:
    return turns.Case(title, settings, (OURS, ALONE))


BENCHMARK = turns.Benchmark(
    "sweep",
    __doc__ or "",
    {
        OURS: turns.Program(lambda **settings: prepare(**settings, alone=False)),
        ALONE: turns.Program(lambda **settings: prepare(**settings, alone=True)),
    },
    cases=[_case("all 12 layers of B/16, 64 images, 2 epochs", arch="PE-Core-B16-224", bank=64, data=16, epochs=2)],
    quick=[
        _case(
            "all 2 layers of a toy",
            arch={
                "image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16,
                "class_token": True, "pool": "none", "output_width": None,
            },
            bank=8, data=4, epochs=1,
        )
    ],
    same=same,
    packages=("jax", "optax", "numpy"),
    rounds=5,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

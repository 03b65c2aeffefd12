"""PE-Core-L14-336 and G14-448 on one GPU beside Meta's module compiled by PyTorch: python -m benchmarks.gpu

The forward of the image tower and a whole update, bfloat16, by the programs of benchmarks.forward and .train_step on
the device "cuda": Meta's module under torch.compile with scaled_dot_product_attention, from the same weights, in the
same run. TFLOP/s and MFU go by our count of the model's matrix products (a backward pass as two forward ones, what is
computed again not counted) and the chip's peak. Both programs live on the GPU at once, which for an update of G14 takes
an H200; --case chooses. Set PERCEPTION_MODELS to a checkout of Meta's repository. With --quick the same code runs at
toy size on the CPU.
"""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks import forward, train_step, turns
from benchmarks.results import OURS

WORK = {"forward": forward.BENCHMARK, "train step": train_step.BENCHMARK}


def _program(name: str) -> turns.Program:
    def prepare(work: str, **settings: Any) -> Callable[[], Any]:
        return WORK[work].programs[name].prepare(**settings)

    needs = {need for benchmark in WORK.values() for need in benchmark.programs[name].needs}
    return turns.Program(prepare, tuple(sorted(needs)))


def same(found: Any, settings: Any) -> None:
    WORK[settings["work"]].same(found, settings)


def _forward(title: str, model: Any, batch: int, **where: Any) -> turns.Case:
    settings = {"work": "forward", "model": model, "batch": batch, "dtype": "bfloat16", **where}
    return _case(f"{title}, forward, {batch} images, bfloat16", settings)


def _update(title: str, model: Any, batch: int, remat: str, **where: Any) -> turns.Case:
    settings = {"work": "train step", "model": model, "batch": batch, "dtype": "bfloat16", "remat": remat, **where}
    how = "" if remat == "none" else f", remat {remat}"
    return _case(f"{title}, train step, {batch} pairs, bfloat16{how}", settings | {"like": "meta"})


def _case(title: str, settings: Any) -> turns.Case:
    needs = (turns.GPU,) if settings["device"] == "cuda" else ()
    return turns.Case(title, settings, (OURS, forward.COMPILED), needs=needs)


HERE = {"device": "cuda", "repeats": 10}
TOY = {"device": "cpu", "repeats": 2}
BENCHMARK = turns.Benchmark(
    "gpu",
    __doc__ or "",
    {name: _program(name) for name in (OURS, forward.COMPILED)},
    cases=[
        _forward("PE-Core-L14-336", "PE-Core-L14-336", 128, **HERE),
        _forward("PE-Core-G14-448", "PE-Core-G14-448", 32, **HERE),
        _update("PE-Core-L14-336", "PE-Core-L14-336", 64, "block", **HERE),
        _update("PE-Core-G14-448", "PE-Core-G14-448", 32, "block", **HERE),
    ],
    quick=[
        _forward("PE-Core-T16-384 cut to 2 blocks and 64 px, CPU", forward.SMALL, 2, **TOY),
        _update("PE-Core-T16-384 cut to 2 blocks and 64 px, CPU", train_step.SMALL, 4, "block", **TOY),
    ],
    same=same,
    packages=("jax", "jaxlib", "flax", "optax", "torch", "numpy"),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

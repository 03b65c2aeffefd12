"""Writes the golden figures from Meta's module in float64: PERCEPTION_MODELS=DIR python -m tests.golden.make

Needs the environment of `make parity`. The weights come from the written rule, so a file holds results only: outputs in
float32 and, of each gradient, its norm and its products with a few directions of the rule (`summary`).
"""

import os
import sys
from pathlib import Path

import numpy as np

from tests.golden import compare, weights
from tests.golden.cases import CASES, CONFIGS

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, os.environ["PERCEPTION_MODELS"])
    from tests.parity import conftest, reference  # isort: skip  # conftest makes torchvision importable on a CPU

    assert conftest
    from core.vision_encoder import pe

    for config, spec in CONFIGS.items():
        stored: compare.Arrays = {}
        tensors, module = weights.tensors(spec), reference.build(pe, spec)
        for name, case in CASES.items():
            if case.config == config:
                forward = getattr(reference, case.forward)
                forward = forward(*case.arguments) if case.arguments else forward
                outputs, grads = reference.evaluate(module, tensors, forward, *case.inputs())
                stored |= {f"{name}/output/{key}": np.asarray(x, np.float32) for key, x in outputs.items()}
                stored[f"{name}/gradients"] = np.stack([compare.summary(n, x) for n, x in sorted(grads.items())])
        np.savez_compressed(FOLDER / f"{config}.npz", **stored)
        print(f"{config}.npz: {(FOLDER / f'{config}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()

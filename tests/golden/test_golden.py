"""Without torch: our outputs and gradients equal the stored figures of Meta's module in float64 (`make.py`)."""

from pathlib import Path

import numpy as np
import pytest

from tests.golden import compare, weights
from tests.golden.cases import CASES, CONFIGS

# Compiling is nearly all of the time here; these leave out slow passes over loops that run for microseconds.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_stored_ones(name):
    case = CASES[name]
    forward = getattr(compare, case.forward)
    forward = forward(*case.arguments) if case.arguments else forward
    spec = CONFIGS[case.config]
    tensors, options = weights.tensors(spec), QUICK_COMPILE
    outputs, grads = compare.evaluate(spec, tensors, forward, *case.inputs(), compiler_options=options)
    with np.load(Path(__file__).parent / f"{case.config}.npz") as stored:
        for key, x in outputs.items():
            assert compare.error(x, stored[f"{name}/output/{key}"]) < compare.TOLERANCE, key
        for key, want in zip(sorted(grads), stored[f"{name}/gradients"], strict=True):
            got, norm = compare.summary(key, grads[key]), want[0]
            assert np.abs(got - want).max() <= compare.TOLERANCE * norm, f"gradient of {key}"


def test_rule_gives_the_numbers_it_gave():
    tensors = weights.tensors(CONFIGS["core"])
    found = {name: tensors[name].ravel()[0] for name in ("visual.conv1.weight", "ln_final.weight", "logit_scale")}
    assert found == {
        "visual.conv1.weight": np.float32(-0.10186105221509933),
        "ln_final.weight": np.float32(0.677406370639801),
        "logit_scale": np.float32(2.5809195041656494),
    }

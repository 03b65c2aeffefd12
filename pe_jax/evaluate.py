"""The evaluators of a run's config on a checkpoint, without training: `pe-jax evaluate`."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pe_jax import evals, paths
from pe_jax.evals.inference import Model
from pe_jax.evals.vlm import Speaker


def read_config(spec: str) -> dict[str, Any]:
    """A run's config as plain dicts: `experiments/x.py`, `experiments/x.py:ARG`, or a run's workdir or config.json.

    The workdir may be in a bucket.

    Raises:
      ValueError: if there is no such file, or it is no config.
    """
    path, _, argument = spec.partition(":") if ".py" in spec and not paths.is_bucket(spec) else (spec, "", "")
    file = paths.path(path)
    paths.reach(file)
    if file.is_dir():
        file = file / "config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist; give an experiment's .py file, or the workdir of a run.")
    if file.suffix == ".json":
        return json.loads(file.read_text())
    module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{file} is no Python file; give an experiment's .py file, or the workdir of a run.")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file} has no get_config(); see experiments/digits.py for one.")
    return (module.get_config(argument) if argument else module.get_config()).to_dict()


def evaluate(
    model: Model | Speaker,
    configs: Mapping[str, Mapping[str, Any]],
    only: Iterable[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """{evaluator: {figure: value}} for the `evals` section of a config.

    Args:
      model: on any mesh.
      configs: {name: evaluator config}; all are checked before the first runs.
      only: names to run; all if empty.
      note: told which one is running.

    Raises:
      ValueError: for a wrong config, or a name in `only` that is not there.
    """
    only = tuple(only)
    if not configs:
        raise ValueError("the config has no evaluators; add some under 'evals'.")
    if unknown := [name for name in only if name not in configs]:
        raise ValueError(f"the config has no evaluator {unknown[0]!r}; it has {', '.join(configs)}.")
    evaluators = {name: evals.create(config) for name, config in configs.items() if not only or name in only}
    found = {}
    for name, evaluator in evaluators.items():
        note(f"running {name} ...")
        found[name] = evaluator(model)
    return found

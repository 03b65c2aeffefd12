"""One tower for language and for places: PE-lang's midtraining and PE-spatial's losses in the same update (PE §4, §5).

  UNIFIED=experiments/align_unified.py
  python -m pe_jax.train --config=$UNIFIED:3B,tokenizer=llama,data=mix.jsonl,init=runs/warmup --workdir=runs/unified

The paper aligns towers with one or the other. Here everything is as in `align_language.py:midtrain`, whose arguments it
takes, and the tower also learns from the teachers of `align_spatial.py`: block 41 of the tower that the warm-up left as
it was, and SAM 2.1-L. `teacher=self` or `teacher=sam` leaves out the other, `sam=FILE` is SAM's weights, and
`balance=1` the length of the spatial gradient at the tower, in that of the language gradient.
"""

import importlib.util
import pathlib
from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = "3B") -> ConfigDict:
    size, *rest = arg.split(",")
    given: dict[str, str] = {name: value for name, _, value in (word.partition("=") for word in rest)}
    own = {name: given.pop(name) for name in ("teacher", "sam", "balance") if name in given}
    teacher, spatial = own.get("teacher", "both"), beside("align_spatial")
    if teacher not in ("both", "self", "sam"):
        raise ValueError(f"align_unified.py: teacher={teacher} must be both, self or sam.")
    config = beside("align_language").get_config(",".join(["midtrain", size, *(f"{k}={v}" for k, v in given.items())]))
    config.stage.name = "unified"
    config.stage.teachers = ConfigDict(spatial.TEACHERS[teacher])
    config.stage.balance = float(own.get("balance", 1.0))
    if teacher != "self":
        config.init.sam = own.get("sam", "sam2.1_hiera_large.pt")
    return config


def beside(name: str) -> Any:
    """An experiment of this folder, wherever the run is started from."""
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

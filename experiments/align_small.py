"""Spatial alignment of a small tower you trained, on one machine (PE §5): what its best layer knows, at its last one.

  python -m pe_jax.train --config=experiments/align_small.py:runs/pairs,data=pairs.jsonl --workdir=runs/aligned

The tower is that of a run of `experiments/pairs.py` or the like. `teacher=self` turns its last tokens to those of its
block `direct=`; `teacher=pairs` gives pairs of them the cosines that block `pairs=` has, where the paper has SAM's
masks; `teacher=both`, the default, does both.
"""

import json
import pathlib

from ml_collections import ConfigDict


def get_config(arg: str = "runs/pairs") -> ConfigDict:
    run, *rest = arg.split(",")
    given = dict(word.split("=", 1) for word in rest)
    teacher = given.get("teacher", "both")
    known = {"data", "teacher", "direct", "pairs", "examples", "image_size"}
    if set(given) - known or teacher not in ("self", "pairs", "both"):
        raise ValueError(
            f"align_small.py takes a run, teacher=self, pairs or both, and {', '.join(sorted(known))}; not {arg!r}."
        )
    vision = json.loads(pathlib.Path(run, "config.json").read_text())["stage"]["arch"]["vision"]
    data = given.get("data", "pairs.jsonl")
    image_size = int(given.get("image_size") or vision["image_size"])
    teachers = {
        "self": {"name": "tower", "layer": int(given.get("direct") or vision["depth"] // 2), "direct": 1.0},
        "pairs": {"name": "tower", "layer": int(given.get("pairs") or vision["depth"] // 2), "pairs": 1.0},
    }
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "spatial",
                "arch": vision
                | {
                    "pool": "none",
                    "norm_post": False,
                    "output_width": None,
                    "layer_scale": 0.1,
                    "drop_path": 0.1,
                },
                "teachers": teachers if teacher == "both" else {teacher: teachers[teacher]},
                "teacher_dtype": "float32",
                "keep_function": True,  # few steps: they would be spent on finding the tower again
            },
            "init": {"student": run},
            "batch_size": 64,
            "phases": [{"image_size": image_size, "examples": int(given.get("examples", 12_800))}],
            "optimizer": {"name": "lamb", "learning_rate": 2e-3},
            "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                "sources": [{"name": "packed" if data.endswith(".npz") else "jsonl", "path": data}],
                "augment": {"aspect": (0.75, 1.33), "brightness": 0.32, "saturation": 0.32, "hflip": 0.5},
                "max_bad_records": 100,
            },
            "evals": {},
            "checkpoint": {"every_steps": 100, "keep": 1},
            "log_every_steps": 10,
        }
    )

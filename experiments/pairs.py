"""A small Perception Encoder on your own image-text pairs, on one machine.

  python -m pe_jax.train --config=experiments/pairs.py:pairs.jsonl --workdir=runs/pairs

The file has one {"image": path, "caption": text} a line, paths relative to it; a .csv with those columns works too.
Keep some pairs back for testing with `:pairs.jsonl,test=held_out.jsonl`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    given: dict[str, str] = {}
    for word in filter(None, arg.split(",")):
        name, equals, value = word.partition("=")
        given |= {name: value} if equals else {"train": word}
    if unknown := set(given) - {"train", "test", "examples", "classes"}:
        raise ValueError(f"pairs.py knows train=, test=, examples= and classes=, not {sorted(unknown)}.")
    train, test = given.get("train", "pairs.jsonl"), given.get("test")
    examples = int(given.get("examples", 90_000))

    def source(path: str) -> dict:
        return {
            "name": "csv" if path.endswith(".csv") else "packed" if path.endswith(".npz") else "jsonl",
            "path": path,
        }

    evals = {}
    if test:
        evals["retrieval"] = {"name": "retrieval", "data": source(test), "every_steps": 200}
    if test and "classes" in given:
        evals["zero_shot"] = {
            "name": "zero_shot", "data": source(test), "classes": given["classes"], "every_steps": 100,
        }  # fmt: skip
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "contrastive",
                "arch": {
                    "vision": {
                        "image_size": 48,
                        "patch_size": 8,
                        "width": 128,
                        "depth": 4,
                        "heads": 4,
                        "mlp_width": 512,
                        "class_token": True,
                        "pool": "attention",
                        "pool_heads": 4,
                        "output_width": 128,
                    },
                    "text": {
                        "context_length": 24,
                        "width": 64,
                        "depth": 2,
                        "heads": 4,
                        "mlp_width": 256,
                        "output_width": 128,
                    },
                },
            },
            "batch_size": 128,
            "phases": [
                {"image_size": 32, "examples": examples * 2 // 3},
                {"image_size": 48, "examples": examples // 3},
            ],
            "optimizer": {"name": "lamb", "learning_rate": 4e-3, "warmup_examples": examples // 10},
            "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                "sources": [source(train)],
                "augment": {"crop_scale": (0.4, 1.0), "brightness": 0.32, "saturation": 0.32, "hflip": 0.5},
                "max_bad_records": 100,
            },
            "evals": evals,
            "checkpoint": {"every_steps": 200, "keep": 2},
            "log_every_steps": 10,
        }
    )

"""PE-core from scratch, the final recipe (PE §2.4, Table 18), at full size.

  python -m pe_jax.train --config=experiments/pretrain_core.py:L14 --workdir=gs://BUCKET/l14 --distributed

The data is yours: `:L14,data=gs://BUCKET/pairs` names a folder of ArrayRecord shards. Mask regularisation is the one
row of the recipe that is still to come.
"""

from ml_collections import ConfigDict

# size: released architecture, resolutions, examples of each in billions, mesh cut over fsdp
# The paper gives the resolutions and the total only: 58 billion for B and L, 86 for G. L's split keeps the ratio
# 10:8:4:2 of the ablation, B's and G's fall off alike.
RUNS = {
    "T16": ("PE-Core-T16-384", (192, 288, 384), (26.0, 21.0, 11.0), 1),  # T and S: B's recipe, then distilled
    "S16": ("PE-Core-S16-384", (192, 288, 384), (26.0, 21.0, 11.0), 1),
    "B16": ("PE-Core-B16-224", (112, 160, 224), (26.0, 21.0, 11.0), 1),
    "L14": ("PE-Core-L14-336", (98, 154, 224, 336), (24.2, 19.4, 9.7, 4.8), 4),
    "G14": ("PE-Core-G14-448", (98, 154, 224, 336, 448), (34.0, 28.0, 14.0, 7.0, 3.4), 16),
}


def get_config(arg: str = "L14") -> ConfigDict:
    size, *rest = arg.split(",")
    given = dict(word.split("=", 1) for word in rest)
    if size not in RUNS or set(given) - {"data"}:
        raise ValueError(f"pretrain_core.py takes one of {', '.join(RUNS)} and data=FOLDER, not {arg!r}.")
    name, resolutions, billions, fsdp = RUNS[size]
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "contrastive",
                "arch": {
                    "base": name,
                    "vision": {"dtype": "bfloat16", "remat": "block"},
                    "text": {"dtype": "bfloat16", "remat": "block"},
                },
            },
            "batch_size": 131_072,
            "phases": [
                {"image_size": pixels, "examples": round(b * 1e9)}
                for pixels, b in zip(resolutions, billions, strict=True)
            ],
            "optimizer": {
                "name": "lamb",
                "learning_rate": 2e-3,
                "warmup_examples": 2000 * 131_072,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "grad_clip": 1.0,
            },
            "mesh": {"data": -1, "fsdp": fsdp, "tensor": 1},
            "data": {
                "sources": [{"name": "array_record", "path": given.get("data", "pairs")}],
                "augment": {"crop_scale": (0.08, 1.0), "brightness": 0.32, "saturation": 0.32, "hflip": 0.5},
                "max_bad_records": 1_000_000,
                "threads": 64,
            },
            "evals": {},
            "checkpoint": {"every_steps": 1000, "keep": 3},
            "log_every_steps": 50,
        }
    )

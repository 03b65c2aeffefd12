"""PE-core from scratch at full size: the final recipe (PE §2.4, Table 18), and the nine rows that lead to it (§2.1).

  python -m pe_jax.train --config=experiments/pretrain_core.py:L14 --workdir=gs://BUCKET/l14 --distributed
  python -m pe_jax.train --config=experiments/pretrain_core.py:L14,ablation=4 --workdir=gs://BUCKET/row4 --distributed

The data is yours: `data=gs://BUCKET/pairs` names a folder of ArrayRecord shards. `micro=16` sets how many micro-batches
an update takes: more need less memory, and cost nothing but one forward pass more than a single one.
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
AUGMENT = {"crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 1.33), "brightness": 0.32, "saturation": 0.32, "hflip": 0.5}
LAMB = {
    "name": "lamb", "learning_rate": 2e-3, "b1": 0.9, "b2": 0.95, "weight_decay": 0.05, "grad_clip": 1.0,
}  # fmt: skip


def get_config(arg: str = "L14") -> ConfigDict:
    size, *rest = arg.split(",")
    given = dict(word.split("=", 1) for word in rest)
    row = given.get("ablation", "")
    rows = [str(i) for i in range(1, len(LADDER) + 1)]
    if size not in RUNS or set(given) - {"data", "micro", "ablation"} or (row and (size != "L14" or row not in rows)):
        raise ValueError(
            f"pretrain_core.py takes one of {', '.join(RUNS)}, data=FOLDER, micro=NUMBER, and with L14 "
            f"ablation=1 to {len(LADDER)}, not {arg!r}."
        )
    config = final(size)
    if row:
        for change in LADDER[: int(row)]:
            change(config)
    config.data.sources[0]["path"] = given.get("data", "pairs")
    config.stage.microbatches = int(given.get("micro", 16))
    return config


def final(size: str) -> ConfigDict:
    """The final recipe (Table 18)."""
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
                "microbatches": 16,
                "loss_chunk": 1024,
                "mask_ratio": 0.4,
                "mask_every": 16,
            },
            "batch_size": 131_072,
            "phases": phases(resolutions, billions),
            "optimizer": LAMB | {"warmup_examples": 2000 * 131_072},
            "mesh": {"dcn": 1, "data": -1, "fsdp": fsdp, "tensor": 1},
            "data": {
                "sources": [{"name": "array_record", "path": "pairs"}],
                "augment": AUGMENT,
                "max_bad_records": 1_000_000,
                "threads": 64,
            },
            "evals": {},
            "checkpoint": {"every_steps": 1000, "keep": 3},
            "max_loss_rise": 4.0,  # of about 12 at chance: by then the model is lost
            "log_every_steps": 50,
        }
    )


def phases(resolutions: tuple[int, ...], billions: tuple[float, ...]) -> list[dict]:
    return [{"image_size": p, "examples": round(b * 1e9)} for p, b in zip(resolutions, billions, strict=True)]


# ---- the ladder (PE Table 26): what each row changes in the one before it --------------------------------------------


def baseline(config: ConfigDict) -> None:
    """OpenCLIP's ViT-L/14: 12 billion examples of 224 pixels, batches of 32K, AdamW.

    The paper gives the rate; the betas, decay and mild crop are OpenCLIP's own for this model.
    """
    config.stage.arch.vision.update({"image_size": 224, "rope": False, "pool": "class"})
    config.stage.mask_ratio = 0.0
    config.batch_size = 32_768
    config.phases = phases((224,), (12,))
    config.optimizer = ConfigDict(
        {
            "name": "adamw", "learning_rate": 5e-4, "b1": 0.9, "b2": 0.98, "weight_decay": 0.2, "grad_clip": 1.0,
            "warmup_examples": 2000 * 32_768,
        }
    )  # fmt: skip
    config.data.augment = ConfigDict({"crop_scale": (0.9, 1.0), "crop_ratio": (0.75, 1.33)})


def progressive_resolution(config: ConfigDict) -> None:
    config.phases = phases((98, 154, 224), (4, 4, 4))


def double_batch_and_examples(config: ConfigDict) -> None:
    config.batch_size = 65_536
    config.optimizer.warmup_examples = 2000 * 65_536
    config.phases = phases((98, 154, 224), (8, 8, 8))


def lamb(config: ConfigDict) -> None:
    config.optimizer = ConfigDict(LAMB | {"warmup_examples": config.optimizer.warmup_examples})


def higher_resolution(config: ConfigDict) -> None:
    config.stage.arch.vision.image_size = 336
    config.phases = phases((98, 154, 224, 336), (10, 8, 4, 2))


def rotary_positions(config: ConfigDict) -> None:
    config.stage.arch.vision.rope = True


def attention_pooling(config: ConfigDict) -> None:
    config.stage.arch.vision.pool = "attention"


def tuned_augmentation(config: ConfigDict) -> None:
    config.data.augment = ConfigDict(AUGMENT)


def mask_regularisation(config: ConfigDict) -> None:
    config.stage.mask_ratio = 0.4


LADDER = (
    baseline,
    progressive_resolution,
    double_batch_and_examples,
    lamb,
    higher_resolution,
    rotary_positions,
    attention_pooling,
    tuned_augmentation,
    mask_regularisation,
)

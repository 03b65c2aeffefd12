"""PE-spatial: the features of places brought to the last layer of a PE-core tower (PE §5, its appendix's Tables 21-23).

  python -m pe_jax.train --config=experiments/align_spatial.py:G14,data=gs://BUCKET/images,sam=sam2.1_hiera_large.pt \\
      --workdir=gs://BUCKET/g14 --distributed
  python -m pe_jax.train --config=experiments/align_spatial.py:L14,data=gs://BUCKET/images,giant=gs://BUCKET/g14 \\
      --workdir=gs://BUCKET/l14 --distributed

G14 starts from PE-Core-G14-448 and learns from its own block 41 and from the masks of SAM 2.1-L; `teacher=self` and
`teacher=sam` leave out the other, and `teacher=cached` takes what `pe-jax teacher` wrote into the folder `data`, with
its augmentations. The smaller towers are distilled from PE-Spatial-G. `micro=16` sets the micro-batches of an update,
`start=` and `giant=` what weights to begin with and to learn from.
"""

from ml_collections import ConfigDict

# size: aligned architecture, what it starts from, pixels, rate of dropped paths, mesh cut over fsdp
# The paper gives G's alone; the smaller ones are published without their recipe, so all else is G's. 32 x 32 tokens.
RUNS = {
    "T16": ("PE-Spatial-T16-512", "PE-Core-T16-384", 512, 0.0, 1),
    "S16": ("PE-Spatial-S16-512", "PE-Core-S16-384", 512, 0.0, 1),
    "B16": ("PE-Spatial-B16-512", "PE-Core-B16-224", 512, 0.1, 1),
    "L14": ("PE-Spatial-L14-448", "PE-Core-L14-336", 448, 0.1, 4),
    "G14": ("PE-Spatial-G14-448", "PE-Core-G14-448", 448, 0.4, 16),
}
SELF = {"name": "tower", "layer": 41, "direct": 1.0}
MASKS = {"name": "sam2", "arch": "SAM-2.1-L", "points_per_side": 32, "pairs": 1.0, "temperature": 20.0}
CACHED = {"name": "stored", "tokens": 32 * 32, "width": 32 * 32, "pairs": 1.0, "temperature": 20.0}
# Unpublished; direct distillation and plain pairs alike, the teacher at its own size.
GIANT = {"name": "tower", "arch": "PE-Spatial-G14-448", "image_size": 448, "direct": 1.0, "pairs": 1.0}
TEACHERS = {
    "both": {"self": SELF, "sam": MASKS},
    "self": {"self": SELF},
    "sam": {"sam": MASKS},
    "cached": {"self": SELF, "sam": CACHED},
    "giant": {"giant": GIANT},
}
# Of the shape alone: the paper has no random scale here.
AUGMENT = {"aspect": (0.75, 1.33), "brightness": 0.32, "saturation": 0.32, "hflip": 0.5}


def get_config(arg: str = "G14") -> ConfigDict:
    size, *rest = arg.split(",")
    given = dict(word.split("=", 1) for word in rest)
    teacher = given.get("teacher", "both" if size == "G14" else "giant")
    known = {"data", "micro", "start"} | ({"teacher", "sam"} if size == "G14" else {"giant"})
    if size not in RUNS or set(given) - known or teacher not in TEACHERS:
        raise ValueError(
            f"align_spatial.py takes one of {', '.join(RUNS)}, data=FOLDER, micro=NUMBER, start=WEIGHTS; with G14 "
            f"sam=FILE and teacher=both, self, sam or cached, with the others giant=WEIGHTS; not {arg!r}."
        )
    arch, start, image_size, drop_path, fsdp = RUNS[size]
    weights = {"student": given.get("start", start)}
    if "sam" in TEACHERS[teacher] and teacher != "cached":
        weights["sam"] = given.get("sam", "sam2.1_hiera_large.pt")
    if teacher == "giant":
        weights["giant"] = given.get("giant", "PE-Spatial-G14-448")
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "spatial",
                "arch": {"base": arch, "drop_path": drop_path, "dtype": "bfloat16", "remat": "block"},
                "teachers": TEACHERS[teacher],
                "mask_ratio": 0.75,
                "mask_block": 2,
                "microbatches": int(given.get("micro", 16)),
            },
            "init": weights,
            "batch_size": 12_288,
            "phases": [{"image_size": image_size, "examples": 24_000 * 12_288}],  # 295 million
            "optimizer": {
                "name": "lamb", "learning_rate": 5e-4, "b1": 0.9, "b2": 0.95, "weight_decay": 0.05, "grad_clip": 1.0,
                "warmup_examples": 0,
            },
            "mesh": {"dcn": 1, "data": -1, "fsdp": fsdp, "tensor": 1},
            "data": {
                "sources": [{"name": "array_record", "path": given.get("data", "images")}],
                "augment": {} if teacher == "cached" else AUGMENT,
                "max_bad_records": 0 if teacher == "cached" else 1_000_000,
                "threads": 64,
            },
            "evals": {},
            "checkpoint": {"every_steps": 500, "keep": 2},
            "log_every_steps": 50,
        }
    )  # fmt: skip

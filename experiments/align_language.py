"""PE-lang and PerceptionLM: a tower aligned with a language model that reads it (PE §4; PLM §3, Table 1).

  LANG=experiments/align_language.py
  python -m pe_jax.train --config=$LANG:warmup,3B,tokenizer=llama,data=captions.jsonl --workdir=runs/warmup
  python -m pe_jax.train --config=$LANG:midtrain,3B,tokenizer=llama,data=mix.jsonl,init=runs/warmup --workdir=runs/lang
  pe-jax convert runs/lang PE-Lang-G14-448.safetensors --to meta --model PE-Lang-G14-448

First the stage: `warmup` (the projector alone), `midtrain`, `sft` (everything), each from the one before it; or
`bench-warmup` and `bench`, which compare encoders that stay as they are (PE §4.2). Then the language model: 1B, 3B, 8B
(Llama 3) or qwen7B. Then, as NAME=VALUE:

  data=FILE.jsonl      conversations (`pe_jax.data.chat`); a folder of ArrayRecord shards works too
  tokenizer=PATH       the language model's own
  init=WORKDIR         the stage before; the warm-ups start from `vision=` and `decoder=`, the published weights
  tower=G              or L, or any released name; without it L for 1B, else G. PLM-3B has L
  layer=47             the tower's last block that is kept; 23 of L
  unfrozen=no reg=no projector=linear
                       the rows of PE's Table 9: a tower that stays as it is; no LayerScale and DropPath
  tiles=1              of an image: 1 leaves it whole, with all its 1,024 tokens, and a video has 4 frames
  millions=20          samples, in place of the published number
  pack=4               so many samples a row on average, in rows as many times fewer; 1 pads each, as PLM does
  micro=8              micro-batches of an update
"""

import re
from typing import Any

from ml_collections import ConfigDict

# size: decoder, its published weights, template of a conversation, tower, mesh cut over fsdp
MODELS = {
    "1B": ("Llama-3.2-1B", "hf://meta-llama/Llama-3.2-1B-Instruct", "llama3", "L", 8),
    "3B": ("Llama-3.2-3B", "hf://meta-llama/Llama-3.2-3B-Instruct", "llama3", "G", 16),
    "8B": ("Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B-Instruct", "llama3", "G", 32),
    "qwen7B": ("Qwen2.5-7B", "hf://Qwen/Qwen2.5-7B-Instruct", "qwen2", "G", 32),
}
TOWERS = {"L": ("PE-Core-L14-336", 23), "G": ("PE-Core-G14-448", 47)}  # and the block that is tapped
# stage: rows of an update, updates, those that warm up; peak rate; tokens of a row; tiles, frames, pooling; what is
# frozen
STAGES = {
    "warmup": (512, 8_000, 20, 1e-4, 1_280, 1, 1, 1, ("vision", "decoder")),
    "midtrain": (2_048, 35_000, 120, 4e-5, 6_144, 16, 16, 2, ()),
    "sft": (1_024, 21_000, 120, 4e-5, 11_520, 36, 32, 2, ()),
    "bench-warmup": (128, 8_000, 120, 1e-4, None, 1, 1, 1, ("vision", "decoder")),
    "bench": (256, 12_500, 300, 1e-5, None, 1, 1, 1, ("vision",)),
}
BEFORE = {"midtrain": "warmup", "sft": "midtrain", "bench": "bench-warmup"}
TEXT = 2_048  # tokens of a row of `bench`, beside the image's (PE §B.2)
# A tower that stays as it is still learns the LayerScales it is given: untouched they would make it another tower.
ALL_BUT_LAYER_SCALE = (
    "patch", "class_token", "position", "norm_pre", "blocks/norm1", "blocks/attention", "blocks/norm2", "blocks/mlp",
)  # fmt: skip
ARGUMENTS = (
    "data", "tokenizer", "init", "vision", "decoder", "tower", "layer", "unfrozen", "reg", "projector", "tiles",
    "millions", "pack", "micro",
)  # fmt: skip


def get_config(arg: str = "midtrain,3B") -> ConfigDict:
    stage, size, *rest = (*arg.split(","), "")
    given = dict(word.partition("=")[::2] for word in rest if word)
    if stage not in STAGES or size not in MODELS or set(given) - set(ARGUMENTS):
        raise ValueError(
            f"align_language.py takes one of {', '.join(STAGES)}, one of {', '.join(MODELS)}, and of "
            f"{', '.join(ARGUMENTS)} as NAME=VALUE, not {arg!r}."
        )
    for name, choices in (("unfrozen", ("yes", "no")), ("reg", ("yes", "no")), ("projector", ("mlp", "linear"))):
        if given.get(name, choices[0]) not in choices:
            raise ValueError(f"align_language.py: {name}={given[name]} must be {' or '.join(choices)}.")
    batch, steps, warmup, rate, length, tiles, frames, pooling, frozen = STAGES[stage]
    decoder, weights, template, tower, fsdp = MODELS[size]
    benchmark, small = stage.startswith("bench"), size in ("1B", "3B")
    name, tap = TOWERS.get(given.get("tower", tower), (given.get("tower"), None))
    image_size, patch = (448, 14) if not benchmark else sides(name)
    if "tiles" in given:
        tiles = int(given["tiles"])
        frames, pooling = (4, 1) if tiles == 1 else (frames, pooling)
    if not length:
        length = (image_size // patch) ** 2 + TEXT
    if stage == "sft" and not small:
        rate = 1e-5
    regularised = stage in ("midtrain", "sft") and given.get("reg") != "no"
    if given.get("unfrozen") == "no" and not frozen:
        frozen = tuple(f"vision/{part}" for part in ALL_BUT_LAYER_SCALE) if regularised else ("vision",)
    pack = int(given.get("pack", 1))
    rows = batch // pack
    examples = round(float(given["millions"]) * 1e6 / pack) if "millions" in given else steps * rows
    data = given.get("data", "conversations.jsonl")
    return ConfigDict(
        {
            "seed": 777,
            "stage": {
                "name": "language",
                "arch": {
                    "vision": name,
                    "tap": int(given.get("layer") or tap or -1),
                    "image_size": image_size,
                    **({"layer_scale": 0.1, "drop_path": 0.1} if regularised else {}),
                    "dtype": "bfloat16",
                    "remat": "block",
                    "decoder": {"base": decoder, "dtype": "bfloat16", "remat": "block"} | positions(size),
                    "projector": given.get("projector", "mlp"),
                    "pooling": pooling,
                },
                "frozen": frozen,
                "microbatches": int(given.get("micro", 1)),
                "loss_chunk": 1024,
            },
            "init": start(stage, given, name, weights),
            "batch_size": rows,
            "phases": [{"image_size": image_size, "examples": examples}],
            "optimizer": {
                "name": "adamw", "learning_rate": rate, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "grad_clip": 1.0,
                "weight_decay": 0.01 if small else 0.05, "decay_all": True, "final": 0.0 if benchmark else 0.01,
                "warmup_examples": warmup * rows,
            },
            "mesh": {"dcn": 1, "data": -1, "fsdp": fsdp, "tensor": 1},
            "data": {
                "name": "chat",
                "sources": [{"name": "conversations" if data.endswith(".jsonl") else "array_record", "path": data}],
                "tokenizer": given.get("tokenizer", weights.rpartition("/")[2]),
                "template": "plain" if "warmup" in stage else template,
                "length": length,
                "chunks": max(frames, tiles + 1 if tiles > 1 else 1),
                "max_tiles": tiles,
                "frames": frames,
                "pack": pack > 1,
                **({"samples_per_row": float(pack)} if pack > 1 else {}),
                "max_bad_records": 100_000,
                "threads": 32,
            },
            "evals": {},
            "checkpoint": {"every_steps": 500, "keep": 2},
            "max_loss_rise": 4.0,
            "log_every_steps": 10,
        }
    )  # fmt: skip


def start(stage: str, given: dict[str, str], tower: str | None, weights: str) -> dict[str, str]:
    """What the run begins with: the published weights, or the stage before."""
    if stage in BEFORE:
        return {"model": given.get("init", BEFORE[stage])}
    return {"vision": given.get("vision", tower or ""), "decoder": given.get("decoder", weights)}


def positions(size: str) -> dict[str, Any]:
    """PLM's 8B does not stretch the rotary positions as Llama 3.1 does."""
    return {"rope_scaling": None} if size == "8B" else {}


def sides(tower: str | None) -> tuple[int, int]:
    """Pixels of the image and of a patch that a released tower has by its name: PE-Core-B16-224 has 224 and 16."""
    found = re.search(r"-[TSBLG](\d+)-(\d+)", tower or "")
    if not found:
        raise ValueError(f"align_language.py: tower={tower} must be a released name, such as PE-Core-L14-336.")
    return int(found[2]), int(found[1])

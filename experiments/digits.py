"""A small Perception Encoder on real handwritten digits, in minutes on a CPU: the demo.

  pe-jax data digits demo/digits
  python -m pe_jax.train --config=experiments/digits.py --workdir=demo/run

Every component of PE-core (PE §2.1, §2.4) at toy width: 2-D RoPE, class token, attention pooling, LAMB, growing
resolution, random crops. `:DIR` reads the data from another folder than demo/digits.
"""

from ml_collections import ConfigDict


def get_config(data: str = "") -> ConfigDict:
    data = data or "demo/digits"
    test = {"name": "jsonl", "path": f"{data}/test.jsonl"}
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "contrastive",
                "arch": {
                    "vision": {
                        "image_size": 32,
                        "patch_size": 4,
                        "width": 64,
                        "depth": 4,
                        "heads": 4,
                        "mlp_width": 256,
                        "class_token": True,
                        "pool": "attention",
                        "pool_heads": 4,
                        "output_width": 64,
                    },
                    "text": {
                        "context_length": 16,
                        "width": 32,
                        "depth": 2,
                        "heads": 4,
                        "mlp_width": 128,
                        "output_width": 64,
                    },
                },
            },
            "batch_size": 64,
            "phases": [
                {"image_size": 16, "examples": 64 * 100},
                {"image_size": 24, "examples": 64 * 240},
                {"image_size": 32, "examples": 64 * 100},
            ],
            "optimizer": {
                "name": "lamb",
                "learning_rate": 6e-3,
                "warmup_examples": 64 * 48,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "grad_clip": 1.0,
            },
            "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                "sources": [{"name": "jsonl", "path": f"{data}/train.jsonl"}],
                # No flip: a mirrored digit is another sign, or none.
                "augment": {"crop_scale": (0.7, 1.0), "crop_ratio": (0.85, 1.18), "brightness": 0.2},
            },
            "evals": {
                "zero_shot": {
                    "name": "zero_shot",
                    "data": test,
                    "classes": "digits",
                    "templates": "digits",  # none of them is a training caption
                    "every_steps": 40,
                },
                "layers": {
                    "name": "knn",
                    "bank": {"name": "jsonl", "path": f"{data}/train.jsonl"},
                    "data": test,
                    "classes": "digits",
                    "k": 20,  # once, at the end
                },
            },
            "checkpoint": {"every_steps": 200, "keep": 2},
            "log_every_steps": 10,
        }
    )

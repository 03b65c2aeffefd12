"""Every stage at toy size on one CPU, in seconds, on made-up pictures: does the whole loop run here?

python -m pe_jax.train --config=experiments/smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "stage": {
                "name": "contrastive",
                "arch": {
                    "vision": {
                        "image_size": 32,
                        "patch_size": 8,
                        "width": 32,
                        "depth": 2,
                        "heads": 2,
                        "mlp_width": 64,
                        "class_token": True,
                        "pool": "attention",
                        "pool_heads": 2,
                        "output_width": 16,
                        "drop_path": 0.1,
                    },
                    "text": {
                        "context_length": 8,
                        "width": 16,
                        "depth": 2,
                        "heads": 2,
                        "mlp_width": 32,
                        "output_width": 16,
                    },
                },
            },
            "batch_size": 16,
            "phases": [{"image_size": 16, "examples": 16 * 12}, {"image_size": 32, "examples": 16 * 8}],
            "optimizer": {"name": "lamb", "learning_rate": 1e-2, "warmup_examples": 64},
            "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                "sources": [{"name": "synthetic"}],
                "augment": {"crop_scale": (0.5, 1.0), "hflip": 0.5, "brightness": 0.32},
                "threads": 2,
            },
            "evals": {},
            "checkpoint": {"every_steps": 5, "keep": 2},
            "log_every_steps": 1,
        }
    )

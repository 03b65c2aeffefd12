"""Which evaluators run on a model of your own on the sample data: small real sets, for comparing runs.

  pe-jax evaluate --model runs/caltech --suite experiments/evaluate.py --data ../shared/data --out runs/caltech/results

Columns called as the paper's are of its kind (COCO photos, five captions each), not of its size: 62 images for 5,000.
"""


def get_suite() -> dict:
    def packed(name: str) -> dict:
        return {"name": "packed", "path": f"{{root}}/{name}.npz"}

    photos = {"name": "jsonl", "path": "{root}/photos/captions.jsonl", "limit": 62}  # the COCO photos come first
    caltech = {
        "name": "zero_shot", "data": packed("caltech101_64/test"), "classes": "{root}/caltech101_64/classes.json",
        "templates": "caltech", "resize": "better",
    }  # fmt: skip
    retrieval = {"name": "retrieval", "dsl": True, "resize": "better"}
    return {
        "title": "Zero-shot on the sample data (COCO: columns of PE, Tab. 5)",
        "groups": [
            {"average": "Avg ret", "columns": ["COCO t2i", "COCO i2t", "emoji t2i", "emoji i2t"]},
            {"average": None, "columns": ["Caltech top-1", "Caltech recall"]},
        ],
        "datasets": [
            {
                "name": "COCO",
                "columns": {"COCO t2i": "text_to_image_r1_dsl", "COCO i2t": "image_to_text_r1_dsl"},
                "evaluator": retrieval | {"data": photos},
            },
            {
                "name": "emoji",
                "columns": {"emoji t2i": "text_to_image_r1_dsl", "emoji i2t": "image_to_text_r1_dsl"},
                "evaluator": retrieval | {"data": packed("emoji_names/test")},
            },
            {
                "name": "Caltech",
                "columns": {"Caltech top-1": "top1", "Caltech recall": "mean_recall"},
                "evaluator": caltech,
            },
        ],
        "published": {
            "PE-Core-B16-224": {"COCO t2i": 50.9, "COCO i2t": 71.0},
            "PE-Core-L14-336": {"COCO t2i": 57.1, "COCO i2t": 75.9},
            "PE-Core-G14-448": {"COCO t2i": 58.1, "COCO i2t": 75.4},
        },
    }

"""What spatial alignment did to a tower: dense probes of several models side by side, as a table and a picture.

  python -m benchmarks.spatial runs/aligned/dense --models core,self,pairs,both --out docs/pictures/spatial.png

Below the folder lies MODEL/TASK/curves.csv, as `pe-jax dense --out` wrote it, for tracking, segmentation and depth.
"""

import argparse
import csv
import pathlib

import numpy as np

TASKS = {  # figure, what the axis says, factor, whether low is good
    "tracking": ("jf", "tracking, J&F (%)", 100, False),
    "segmentation": ("miou", "segmentation, mIoU (%)", 100, False),
    "depth": ("rmse", "depth, RMSE (m)", 1, True),
}


def read(folder: pathlib.Path, figure: str) -> dict[int, float]:
    """A figure by layer."""
    with open(folder / "curves.csv") as file:
        return {int(row["layer"]): float(row[figure]) for row in csv.DictReader(file)}


def table(found: dict[str, dict[str, dict[int, float]]]) -> str:
    """The last layer of each model, and the best layer of the first."""
    tasks = [task for task in TASKS if all(task in own for own in found.values())]
    lines = ["| | " + " | ".join(TASKS[task][1] for task in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    first, own = next(iter(found.items()))
    best = []
    for task in tasks:
        _, _, factor, low = TASKS[task]
        layer = (min if low else max)(own[task], key=own[task].__getitem__)
        best.append(f"{factor * own[task][layer]:.4g} (layer {layer})")
    lines.append(f"| {first}, best layer | " + " | ".join(best) + " |")
    for model, own in found.items():
        lines.append(
            f"| {model}, last layer | " + " | ".join(f"{TASKS[t][2] * own[t][max(own[t])]:.4g}" for t in tasks) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", required=True, help="names of its folders, the one to compare with first")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the picture")
    args = parser.parse_args()
    from pe_jax.evals import plots
    from pe_jax.evals.dense_pictures import Panel, curves

    found = {
        model: {task: read(args.folder / model / task, TASKS[task][0]) for task in TASKS
                if (args.folder / model / task).is_dir()}
        for model in args.models.split(",")
    }  # fmt: skip
    print(table(found))
    # Only layers that all models were asked about, so that curves can be compared.
    layers = sorted(set.intersection(*(set(figures) for own in found.values() for figures in own.values())))
    panels = [
        Panel(
            label,
            {model: np.array([own[task][y] for y in layers]) for model, own in found.items() if task in own},
            scale=factor,
            lowest=low,
        )
        for task, (_, label, factor, low) in TASKS.items()
        if any(task in own for own in found.values())
    ]
    args.out.write_bytes(plots.encoded(curves(layers, panels, "Spatial alignment, by layer")))


if __name__ == "__main__":
    main()

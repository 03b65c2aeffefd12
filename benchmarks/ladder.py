"""The nine rows of the ladder (PE Table 26) on real images at small size: python -m benchmarks.ladder

Each row is `experiments/pretrain_core.py:L14,ablation=N` with its numbers shrunk by one rule, so a row differs here
from the one before it in what it differs in there. Every row trains for the same number of floating point operations,
on the same images, and is scored by zero-shot accuracy on images it has not seen. A run that was stopped goes on when
the command is given again; finished ones are only read. Writes benchmarks/ladder.md and its plot.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import pretrain_core
from pe_jax import metrics
from pe_jax.models import zoo

HERE = pathlib.Path(__file__).parent
SIZES = {98: 24, 154: 32, 224: 48, 336: 64}  # pixels there → here, where a patch has 8
PAPER = (75.3, 75.1, 76.2, 76.9, 78.3, 79.2, 80.1, 80.8, 80.9)  # average of six zero-shot sets, L/14 (PE Table 26)
BLUE, GREY, INK = "#2563eb", "#94a3b8", "#0f172a"


def small(row: int, data: str, flops: float, seed: int) -> dict[str, Any]:
    """Row 1 to 9 at small size.

    A width-128, 4-block image tower of patch 8 takes the place of L/14, batches shrink 512 times, learning rates
    double, warm-up is a tenth of the run, and the phases keep their shares of the examples.
    """
    config = pretrain_core.get_config(f"L14,ablation={row}").to_dict()
    vision = config["stage"]["arch"]["vision"]
    kept = {name: vision[name] for name in ("rope", "pool") if name in vision}
    config["seed"] = seed
    config["stage"] |= {"microbatches": 1, "loss_chunk": None}
    config["stage"]["arch"] = {
        "vision": {
            "image_size": max(SIZES[phase["image_size"]] for phase in config["phases"]), "patch_size": 8, "width": 128,
            "depth": 4, "heads": 4, "mlp_width": 512, "class_token": True, "pool": "attention", "pool_heads": 4,
            "output_width": 128, **kept,
        },
        "text": {"context_length": 24, "width": 64, "depth": 2, "heads": 4, "mlp_width": 256, "output_width": 128},
    }  # fmt: skip
    config["batch_size"] //= 512
    config["phases"] = phases(config, flops)
    examples = sum(phase["examples"] for phase in config["phases"])
    config["optimizer"]["learning_rate"] *= 2
    config["optimizer"]["warmup_examples"] = examples // 10
    config["mesh"] = {"data": -1}
    config["data"] |= {
        "sources": [{"name": "packed", "path": f"{data}/train.npz"}], "max_bad_records": 0, "threads": 2,
    }  # fmt: skip
    config["evals"] = {
        "zero_shot": {
            "name": "zero_shot",
            "data": {"name": "packed", "path": f"{data}/test.npz"},
            "classes": f"{data}/classes.json",
        }
    }
    config["checkpoint"], config["log_every_steps"] = {"every_steps": 200, "keep": 1}, 20
    return config


def phases(config: Mapping[str, Any], flops: float) -> list[dict[str, int]]:
    """The phases with their shares of the examples, together `flops` long (a backward pass counts for two forward)."""
    arch, total = zoo.architecture(config["stage"]["arch"]), sum(phase["examples"] for phase in config["phases"])
    sizes = [SIZES[phase["image_size"]] for phase in config["phases"]]
    shares = [phase["examples"] / total for phase in config["phases"]]
    costs = [3 * zoo.forward_flops(arch, size) for size in sizes]
    examples = flops / sum(share * cost for share, cost in zip(shares, costs, strict=True))
    batch = config["batch_size"]
    return [
        {"image_size": size, "examples": max(1, round(share * examples / batch)) * batch}
        for size, share in zip(sizes, shares, strict=True)
    ]


def train(workdir: pathlib.Path, config: Mapping[str, Any], core: int | None) -> None:
    """Trains, or goes on with, a config in a process of its own, on one processor core if it is given."""
    workdir.mkdir(parents=True, exist_ok=True)
    told = workdir / "experiment.json"
    told.write_text(json.dumps(config))
    program = (
        "import json, sys; from pe_jax import train; sys.exit(train.train(json.load(open(sys.argv[1])), sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(told), str(workdir)]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    with (workdir / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise RuntimeError(f"the run {workdir} ended with exit code {code}; see its log.txt.")


def run(workdir: pathlib.Path, config: Mapping[str, Any], core: int | None) -> float:
    """Trains, or goes on with, one row; its zero-shot accuracy."""
    train(workdir, config, core)
    figures = [r for r in metrics.read_rows(workdir / "evals.csv") if r["name"] == "zero_shot/top1"]
    return float(figures[-1]["value"])


def write(found: Mapping[int, Sequence[float]], configs: Mapping[int, Mapping[str, Any]], flops: float) -> None:
    """benchmarks/ladder.md and ladder.png."""
    parameters = zoo.count(zoo.abstract(zoo.architecture(configs[min(configs)]["stage"]["arch"])))
    lines = [
        "# The ladder at small size",
        "",
        "<!-- not run: an hour; it writes this page -->",
        "```bash",
        "python -m benchmarks.ladder",
        "```",
        "",
        f"Every row trains a model of {parameters / 1e6:.1f} million parameters for {flops / 1e12:.3g} TFLOPs (a"
        " backward pass counted as two forward ones, the masked copies of row 9 not counted) on 5,845 Caltech-101"
        " images of 64 px with template captions, and is scored zero-shot on 792 others of 99 classes. Chance is 1.0%;"
        " the standard error of one score is about 1.4 points. What each row changes is the paper's; the sizes are"
        " not: here the same few images come back many times over some hundred steps. So this shows that the nine"
        " recipes train and what they do at this scale, not whether the paper is right at its own.",
        "",
        "![zero-shot accuracy of each row](ladder.png)",
        "",
        "| row | change | phases (px: examples) | batch | zero-shot top-1 | seeds | in the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, scores in sorted(found.items()):
        config = configs[row]
        named = pretrain_core.LADDER[row - 1].__name__.replace("_", " ")
        sizes = ", ".join(f"{p['image_size']}: {p['examples']:,}" for p in config["phases"])
        each = ", ".join(f"{100 * score:.1f}" for score in scores)
        lines.append(
            f"| {row} | {named} | {sizes} | {config['batch_size']} | **{100 * statistics.mean(scores):.1f}%** "
            f"| {each} | {PAPER[row - 1]:.1f}% |"
        )
    (HERE / "ladder.md").write_text("\n".join(lines) + "\n")
    plot(found)


def plot(found: Mapping[int, Sequence[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(found)
    names = [pretrain_core.LADDER[row - 1].__name__.replace("_", " ") for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    for row in rows:
        left.plot([100 * s for s in found[row]], [row] * len(found[row]), "o", color=GREY, markersize=5)
    means = [100 * statistics.mean(found[row]) for row in rows]
    left.plot(means, rows, "-o", color=BLUE, markersize=8)
    for x, row in zip(means, rows, strict=True):
        left.annotate(f"{x:.1f}", (x, row), (0, 8), textcoords="offset points", ha="center", color=BLUE, fontsize=9)
    left.set(title="here: 99 classes, mean and seeds", xlabel="zero-shot top-1, %")
    left.set_yticks(rows, [f"{row}  {name}" for row, name in zip(rows, names, strict=True)], color=INK)
    left.invert_yaxis()
    paper = [PAPER[row - 1] for row in rows]
    right.plot(paper, rows, "-o", color=GREY, markersize=8)
    for x, row in zip(paper, rows, strict=True):
        right.annotate(f"{x:.1f}", (x, row), (0, 8), textcoords="offset points", ha="center", color=INK, fontsize=9)
    right.set(title="the paper: L/14, mean of six sets", xlabel="zero-shot top-1, %")
    for axes in (left, right):
        axes.margins(x=0.12, y=0.08)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "ladder.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PE_JAX_DATA", "../shared/data") + "/caltech101_64")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/ladder"))
    parser.add_argument("--tflops", type=float, default=6.0, help="of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(1, len(pretrain_core.LADDER) + 1)))
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    free: queue.Queue[int | None] = queue.Queue()
    for core in cores:  # small matrices: a run a core gets more done than one run on all of them
        free.put(core)
    flops = args.tflops * 1e12
    configs = {row: small(row, args.data, flops, 0) for row in args.rows}
    found: dict[int, list[float]] = {row: [] for row in args.rows}

    def one(row: int, seed: int) -> None:
        core = free.get()
        try:
            score = run(args.out / f"row{row}-seed{seed}", configs[row] | {"seed": seed}, core)
        finally:
            free.put(core)
        found[row].append(score)
        print(f"row {row}, seed {seed}: zero-shot top-1 {100 * score:.1f}%", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        jobs = [pool.submit(one, row, seed) for seed in range(args.seeds) for row in args.rows]
        for job in concurrent.futures.as_completed(jobs):
            job.result()
    write(found, configs, flops)
    print(f"written to {HERE / 'ladder.md'}")


if __name__ == "__main__":
    main()

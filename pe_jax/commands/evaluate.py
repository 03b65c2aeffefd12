"""Score a checkpoint with the evaluators of a config.

  pe-jax evaluate --model demo/run
  pe-jax evaluate --model PE-Core-B16-224 --config experiments/digits.py --only zero_shot --json

Without --config, the one that a run's workdir was trained with is taken.
"""

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a released name, or the directory of a run or of weights")
    parser.add_argument("--weights", help="a .pt or .safetensors file, or directory, with the weights of --model")
    parser.add_argument("--config", help="an experiment's .py file (:ARG allowed), or a run's workdir or config.json")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="names of the evaluators to run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--offline", action="store_true", help="use only weights that are already on this machine")


def run(args: argparse.Namespace) -> int:
    import jax
    import rich
    import rich.table

    import pe_jax
    from pe_jax import evaluate

    config = evaluate.read_config(args.config or args.model)
    mesh = pe_jax.make_mesh(config.get("mesh")) if len(jax.devices()) > 1 else None
    model = pe_jax.load(args.model, args.weights, offline=args.offline, mesh=mesh)
    found = evaluate.evaluate(model, config.get("evals", {}), args.only, note=lambda text: print(text, file=sys.stderr))
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    table = rich.table.Table("evaluator", "figure", title=args.model)
    table.add_column("value", justify="right")
    for name, figures in found.items():
        for figure, value in figures.items():
            table.add_row(name, figure, f"{value:.4f}")
    rich.print(table)
    return 0

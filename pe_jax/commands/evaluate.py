"""Score a checkpoint with the evaluators of a config.

  pe-jax evaluate --model demo/run
  pe-jax evaluate --model PE-Core-B16-224 --config experiments/digits.py --only zero_shot --json

Without --config, the one that a run's workdir was trained with is taken.
"""

import argparse
import json
import sys

from pe_jax.commands import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--config", help="an experiment's .py file (:ARG allowed), or a run's workdir or config.json")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="names of the evaluators to run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import rich
    import rich.table

    from pe_jax import evaluate

    config = evaluate.read_config(args.config or args.model)
    model = load_model(args, config.get("mesh"))
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

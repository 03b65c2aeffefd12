"""Score a checkpoint with the evaluators of a config, or on a suite: a table of the paper, with its row beside ours.

  pe-jax evaluate --model demo/run
  pe-jax evaluate --model PE-Core-B16-224 --config experiments/digits.py --only zero_shot --json
  pe-jax evaluate --model PE-Core-L14-336 --suite core_image --data DATA --out results/l14
  pe-jax evaluate --model runs/mine --suite core_image --data DATA --only IN COCO
  pe-jax evaluate --model Perception-LM-1B/ --suite vlm --data DATA --out results/plm

Without --config or --suite, the config that a run's workdir was trained with is taken. A suite is one of the
package, or a file of your own; docs/evaluation.md tells where each data set is looked for. With --out the tables are
written there, and what was finished is not computed again when the same command is given once more.
"""

import argparse
import json
import os
import sys
from typing import Any

from pe_jax.commands import add_model_arguments, load_assistant, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", help="an experiment's .py file (:ARG allowed), or a run's workdir or config.json")
    what.add_argument("--suite", help="core_image, core_video, ..., or a .json or .py file of your own")
    parser.add_argument("--data", metavar="ROOT", help="the folder of a suite's data sets")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="evaluators, data sets or columns to run")
    parser.add_argument("--out", metavar="DIR", help="where a suite's tables and finished results go, local or gs://")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N records of each data set, for a trial")
    parser.add_argument("--batch-size", type=int, metavar="B", help="of a suite, instead of the evaluators' own")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.suite:
        return _suite(args)
    if given := [name for name in ("data", "out", "limit", "batch_size") if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} is for --suite; a config says such things itself.")
    import rich
    import rich.table

    from pe_jax import evaluate

    config = evaluate.read_config(args.config or args.model)
    chosen = [own for name, own in config.get("evals", {}).items() if not args.only or name in args.only]
    model = _model(args, chosen, config.get("mesh"))
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


def _model(args: argparse.Namespace, evaluators: list[Any], mesh_shape: Any = None) -> Any:
    """The model that the evaluators want: one that answers, or a tower, alone or with its text tower."""
    talks = [evaluator.get("name") == "vlm" for evaluator in evaluators]
    if not any(talks):
        return load_model(args, mesh_shape)
    if not all(talks):
        raise ValueError("some evaluators ask a language model and some do not; choose either kind with --only.")
    if args.weights:
        raise ValueError("--weights is for towers; a model that answers is found by --model alone.")
    return load_assistant(args)


def _suite(args: argparse.Namespace) -> int:
    import jax

    from pe_jax.evals import suites

    if args.data is None:
        raise ValueError("--suite needs --data ROOT, the folder of its data sets.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1.")
    suite = suites.load(args.suite)  # before the model, which takes longer to find wrong
    model = _model(args, [dataset.evaluator for dataset in suite.datasets])
    results = suites.run(
        model,
        suite,
        args.data,
        only=args.only,
        out=args.out,
        limit=args.limit,
        batch_size=args.batch_size,
        note=lambda text: print(text, file=sys.stderr),
    )
    name = os.path.basename(os.path.normpath(args.model))
    report = suites.Report(suite, name, results, suites.released(model), args.limit)
    if jax.process_index() == 0:
        if args.out:
            report.write(args.out)
        print(json.dumps(report.to_dict(), indent=2)) if args.json else _print(report)
        if args.out and not args.json:
            print(f"Wrote {args.out}/{suite.name}.md, .csv and .json.")
    return 1 if any(result.status == "failed" for result in results) else 0


def _print(report) -> None:
    import rich
    import rich.console
    import rich.table

    # A table is as wide as the paper's, also where the output is a file.
    console = rich.console.Console() if sys.stdout.isatty() else rich.console.Console(width=120)
    for number, table in enumerate(report.tables()):
        drawn = rich.table.Table(title=report.suite.title if number == 0 else None)
        for place, column in enumerate(table.header):
            drawn.add_column(column, justify="right" if place else "left", no_wrap=not place)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for remark in report.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)

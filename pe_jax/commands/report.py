"""Write a page about a finished run: curves, predictions, confusions, and where in the tower the best features lie.

  pe-jax report demo/run
  pe-jax report runs/mine --out reports/mine

The page is one file, report.html, with its pictures inside; the PNG files and report.json lie beside it. Needs the
`viz` extra (matplotlib).
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", help="the workdir of a run")
    parser.add_argument("--out", help="where to write; WORKDIR/report if not given")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    import json

    from pe_jax import report

    summary, page = report.write(args.workdir, args.out)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        for line in report.lines(summary):
            print(line)
        print(f"report: {page}")
    return 0

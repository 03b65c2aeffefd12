"""Train from an experiment file, or go on with a run that was stopped.

  pe-jax train --config=experiments/digits.py --workdir=runs/digits --config.seed=1

The same as `python -m pe_jax.train`. A killed run goes on when the same command is given again.
"""

import argparse

TAKES_THE_REST = True  # the flags are those of pe_jax.train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE[:ARGS]", help="experiments/X.py; change fields by --config.a.b=v")
    parser.add_argument("--workdir", metavar="DIR", help="where the run writes")
    parser.add_argument("--profile", metavar="FIRST:COUNT", help="steps to trace; 100:5 for 100 to 104, more by commas")


def run(args: argparse.Namespace) -> int:
    from pe_jax import train

    names = ("config", "workdir", "profile")
    given = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
    return train.main([*given, *args.rest])

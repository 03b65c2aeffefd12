"""The console command `pe-jax COMMAND ...`; each command is a module of `pe_jax.commands`.

A command module's docstring is its help (the first line in the list, all of it in `pe-jax COMMAND --help`), and it
has `add_arguments(parser)` and `run(args) -> int`. What is heavy is imported inside `run`, so that `--help` is quick.
"""

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from pe_jax import commands


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command of `pe_jax.commands`."""
    top = argparse.ArgumentParser(
        prog="pe-jax",
        description="Perception Encoder in JAX: models, training, probes.",
        epilog="Help: pe-jax COMMAND -h",
    )
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in sorted(module.name for module in pkgutil.iter_modules(commands.__path__)):
        module = importlib.import_module(f"{commands.__name__}.{name}")
        text = module.__doc__ or ""
        command = subparsers.add_parser(
            name,
            help=text.strip().splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, takes_the_rest=getattr(module, "TAKES_THE_REST", False))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; what the user can mend is one line on stderr and exit code 2, not a traceback.

    PE_JAX_TRACEBACK=1 shows the traceback all the same.
    """
    top = parser()
    args, rest = top.parse_known_args(argv)
    args.rest = rest
    if args.rest and not args.takes_the_rest:
        top.error(f"unknown arguments for {args.command}: {' '.join(args.rest)}")
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        if os.environ.get("PE_JAX_TRACEBACK"):
            raise
        print(f"pe-jax {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has closed
        return 0


if __name__ == "__main__":
    sys.exit(main())

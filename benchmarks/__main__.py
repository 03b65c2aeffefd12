"""All benchmarks, a table for each case, and a page of what was found: python -m benchmarks

  python -m benchmarks --only=loss,probes       some of them
  python -m benchmarks --quick                  a smoke test of each at toy size

What has no peer here is left out and says so: a checkout that PERCEPTION_MODELS or BIG_VISION should name, a package, a
GPU. Each is a program of its own too: python -m benchmarks.forward --help
"""

import argparse
import importlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from benchmarks import page, turns
from benchmarks.results import ALL


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(ALL), help="benchmarks, with commas between (default: %(default)s)")
    turns.add_arguments(parser)
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in ALL]:
        parser.error(f"{', '.join(unknown)} of --only={args.only} is no benchmark; there are {', '.join(ALL)}")
    failed, command = [], shlex.join(["python", "-m", "benchmarks", *argv])
    for name in chosen:
        print(f"\n{'=' * 100}", flush=True)
        benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
        try:
            benchmark.run(benchmark.quick if args.quick else benchmark.cases, args, command)
        except (AssertionError, RuntimeError):  # a peer that gives something else, or died; the others still count
            traceback.print_exc()
            failed.append(name)
    if folder := turns.folder_of(args):
        print(f"\npage: {page.write(folder)}")
    if failed:
        print(f"failed: {', '.join(failed)}; what went wrong is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs every command and snippet of the README and the docs, in order, as a reader would type them.

A fenced `bash` block runs in the repository root with the project's environment on PATH; the `python` blocks of one
file run as one program. A block is left out only where the line above its fence says why, in one of these forms:

    <!-- not run: needs a TPU -->        <!-- run by .ci/run -->

What a block compiles is compiled quickly, and once for all blocks: they run for seconds.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"(?P<note><!--[^\n]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/README.md", "tpu/README.md")


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick.flags()}",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        ran, left = run(os.environ | variables)
    print(f"{ran} passed, 0 failed ({left} blocks left out, each with its reason)")
    return 0


def run(environment: Mapping[str, str]) -> tuple[int, int]:
    """How many blocks were run and how many left out."""
    ran = left = 0
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        snippets = []
        for block in BLOCK.finditer(page.read_text()):
            if block["language"] not in ("bash", "python"):
                continue
            if block["note"] and re.match(r"<!-- (not run: \S|run by )", block["note"]):
                left += 1
            elif block["language"] == "python":
                snippets.append(block["code"])
            else:
                ran += execute(page, ["bash", "-euo", "pipefail", "-c", block["code"]], environment)
        if snippets:
            ran += execute(page, [sys.executable, "-c", "\n".join(snippets)], environment) * len(snippets)
    return ran, left


def execute(page: pathlib.Path, command: list[str], environment: Mapping[str, str]) -> int:
    print(f"--- {page.relative_to(ROOT)}\n{command[-1].strip()}", flush=True)
    start = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=900)
    if done.returncode:
        sys.exit(f"{page.relative_to(ROOT)}: this block failed with exit code {done.returncode}:\n{command[-1]}")
    print(f"--- {time.time() - start:.0f} s", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())

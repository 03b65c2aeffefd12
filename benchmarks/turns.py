"""Fair timing on a machine that is not ours alone: programs that take turns, and ratios within a round.

Every program is a worker process that lives through the whole run; they take turns (A B C A B C ...), and a round in
which other processes used more than a set share of the machine is thrown away. Reported is the median over rounds of
ours / theirs in the same round, so that slow drifts of the machine cancel, with its quartiles.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
OURS = "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=11, help="quiet rounds wanted")
    parser.add_argument("--busy", type=float, default=0.1, help="share of the machine that others may use in a round")
    parser.add_argument("--patience", type=int, default=3, help="rounds tried at most, in multiples of --rounds")
    parser.add_argument("--no-save", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def serve(prepare: Callable[[], Callable[[], Any]]) -> None:
    """A worker's life: prepares, then answers each line on stdin by one run, its seconds and what it gave, as JSON.

    A run that times itself gives {"seconds": ...}, and maybe more.
    """
    reply, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    start = time.perf_counter()
    run = prepare()
    for _ in range(2):
        run()
    print(json.dumps({"ready_s": time.perf_counter() - start}), file=reply, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - start
        if isinstance(out, dict):
            seconds = out.get("seconds", seconds)
        print(json.dumps({"s": seconds, "out": out}), file=reply, flush=True)


class Worker:
    """`python -m MODULE --worker PROGRAM ARGS...`, whose main calls `serve`."""

    def __init__(self, module: str, program: str, *args: str):
        command = [sys.executable, "-m", module, "--worker", program, *args]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready_s = self._answer()["ready_s"]

    def run(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def cpu_s(self) -> float:
        return _cpu_of(self.process.pid)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died with exit code {self.process.wait()}; its error is above.")
        return json.loads(line)


def _cpu_of(process: int | str) -> float:
    """CPU seconds a process and its ended children have used (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_machine() -> float:
    """CPU seconds all cores have spent on anything but waiting (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(
    module: str,
    programs: Sequence[str],
    arguments: Sequence[str],
    args: argparse.Namespace,
    check: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Rounds of one run per program, until `--rounds` were quiet or `--patience` times as many have run.

    Args:
      module: of the benchmark, whose workers these are.
      programs: their names, "ours" among them.
      arguments: of the worker's command line.
      args: with what `add_arguments` adds.
      check: sees what each program gave, by its name, before any time is taken.
    """
    workers = {}
    for program in programs:
        workers[program] = Worker(module, program, *arguments)
        print(f"  {program}: ready in {workers[program].ready_s:.0f} s", flush=True)
    check({program: worker.run()["out"] for program, worker in workers.items()})
    quiet, noisy = [], []
    while len(quiet) < args.rounds and len(quiet) + len(noisy) < args.patience * args.rounds:
        own, machine, start = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self"), _cpu_of_machine(), time.time()
        times = {program: worker.run()["s"] for program, worker in workers.items()}
        own = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self") - own
        others = (_cpu_of_machine() - machine - own) / ((time.time() - start) * (os.cpu_count() or 1))
        (quiet if others <= args.busy else noisy).append(times | {"others": max(others, 0.0)})
    for worker in workers.values():
        worker.stop()
    enough = len(quiet) >= min(args.rounds, 5)
    used = quiet if enough else quiet + noisy
    result: dict[str, Any] = {"rounds": len(used), "thrown_away": len(noisy), "quiet": enough}
    for program, worker in workers.items():
        result[program] = {"median_s": statistics.median(r[program] for r in used), "ready_s": worker.ready_s}
        if program != OURS:
            low, middle, high = np.percentile([r[OURS] / r[program] for r in used], [25, 50, 75])
            result[program] |= {"ours_over_it": middle, "quartiles": [low, high]}
    return result | {"all": used}


def show(result: Mapping[str, Any], programs: Sequence[str], per_run: str, amount: Callable[[float], str]) -> None:
    """Prints a line per program; `amount` turns the seconds of one run into a figure, `per_run` names it."""
    for program in programs:
        it = result[program]
        ratio = ""
        if program != OURS:
            ratio = "time ours / it {:.3f} (quartiles {:.3f} to {:.3f})".format(it["ours_over_it"], *it["quartiles"])
        print(f"  {program:14} {amount(it['median_s']):>9} {per_run}   {ratio}")
    state = "" if result["quiet"] else "; THE MACHINE WAS BUSY: do not quote these"
    print(f"  {result['rounds']} rounds used, {result['thrown_away']} too noisy{state}", flush=True)


def report(*packages: str) -> dict[str, Any]:
    """Date, machine and versions, to which a benchmark adds its results."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "versions": {package: metadata.version(package) for package in packages},
    }


def save(name: str, found: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{found['date'][:16].replace(':', '')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path}")

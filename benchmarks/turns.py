"""Fair timing on a machine that is not ours alone: programs that take turns, and ratios within a round.

Every program is a worker process that lives through a whole case; they take turns (A B C A B C ...), and a round in
which other processes used more than a set share of the machine is thrown away. Reported is the median over rounds of
ours / theirs in the same round, so that slow drifts of the machine cancel, with its quartiles. What the programs give
is compared before any time is taken.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.results import GPU, OURS

CHECKOUTS = {
    "PERCEPTION_MODELS": "github.com/facebookresearch/perception_models",
    "BIG_VISION": "github.com/google-research/big_vision",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One side of a comparison.

    Attributes:
      prepare: from the settings of a case to what is timed, a call without arguments. What it gives goes to the
        benchmark's `same`; of a dict, these entries mean something here: "seconds", where it times itself; "figures",
        numbers to report beside the time; "flops" of one run; "peak_flops" of the device.
      needs: packages, checkouts (a variable of `CHECKOUTS`), or `GPU`.
    """

    prepare: Callable[..., Callable[[], Any]]
    needs: tuple[str, ...] = ()
    slow: bool = False  # to get ready, as torch.compile is: left out of --quick


@dataclasses.dataclass(frozen=True)
class Case:
    """The work to do; its title is its name over the years, so it says all that makes it another one."""

    title: str
    settings: Mapping[str, Any]  # of every `prepare`, as JSON; "device" is where both frameworks run, "cpu" or "cuda"
    programs: tuple[str, ...]  # ours first
    rate: tuple[str, float] | None = None  # a unit, and how much of it one run is: ("images/s", 384)
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A module of this package: `BENCHMARK.main()` is its command line, of its workers as well."""

    name: str
    about: str
    programs: Mapping[str, Program]
    cases: Sequence[Case]
    quick: Sequence[Case]  # the same ways through the code, in seconds
    same: Callable[[Mapping[str, Any], Mapping[str, Any]], None]  # what each program gave, and the settings; asserts
    packages: tuple[str, ...]  # whose versions matter
    rounds: int = 11
    cpu_time: bool = False  # whether its programs give CPU time, which counts in busy rounds too
    processes: bool = False  # whether a program starts some of its own, whose CPU time is not seen
    memory: bool = False  # whether what a process grows by during a run is worth reporting

    def main(self, argv: Sequence[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(parser)
        parser.add_argument("--case", default="", help="only those whose title has this in it")
        parser.add_argument("--worker", help=argparse.SUPPRESS)
        parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
        args = parser.parse_args(argv)
        if args.worker:
            serve(lambda: self.programs[args.worker].prepare(**args.settings), one_core=args.one_core)
            return 0
        cases = self.quick if args.quick else self.cases
        chosen = [case for case in cases if args.case in case.title]
        if not chosen:
            titles = "; ".join(case.title for case in cases)
            parser.error(f"no case of {self.name} has {args.case!r} in its title; there are: {titles}")
        self.run(chosen, args, shlex.join(["python", "-m", f"benchmarks.{self.name}", *argv]))
        return 0

    def run(self, cases: Sequence[Case], args: argparse.Namespace, command: str) -> None:
        """Measures, prints and keeps `cases`, each as it is done; `args` has what `add_arguments` adds."""
        report, folder, path = results.new(self.name, command, self.packages, quick=args.quick), folder_of(args), None
        print(results.heading(report), flush=True)
        for case in cases:
            print(f"\n{case.title}", flush=True)
            report["cases"].append(measure(self, case, args))
            print(results.text(report["cases"][-1]), flush=True)
            if folder:
                path = results.save(report, folder)
        if path:
            print(f"\nwritten to {path}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command lines of one benchmark and of all of them have in common."""
    parser.add_argument("--rounds", type=int, help="quiet rounds wanted (default: each benchmark's own, 7 or 11)")
    parser.add_argument("--busy", type=float, default=0.1, help="share of the machine that others may use in a round")
    parser.add_argument("--patience", type=int, default=3, help="rounds tried at most, in multiples of --rounds")
    parser.add_argument(
        "--one-core",
        action="store_true",
        help="each program on one core, by CPU time: what can be compared where the machine is never quiet",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test at toy size, whose figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results; with --quick none)")
    parser.add_argument("--no-save", action="store_true", help="write no file")


def folder_of(args: argparse.Namespace) -> Path | None:
    """Where results are to be written, or None for nowhere."""
    if args.no_save or (args.quick and args.out is None):
        return None
    return args.out or results.FOLDER


def lacking(needs: Sequence[str]) -> str | None:
    """What is not at hand of a program's or a case's needs, and what to do about it; None where all is there."""
    told, packages = [], []
    for need in needs:
        if need == GPU:
            told += [] if results.accelerator() else ["not measured: no GPU is at hand"]
        elif need in CHECKOUTS:
            folder = os.environ.get(need)
            if not folder:
                told.append(f"set {need} to a checkout of {CHECKOUTS[need]}")
            elif not Path(folder).is_dir():
                told.append(f"{need}={folder} is no folder; set it to a checkout of {CHECKOUTS[need]}")
        elif importlib.util.find_spec(need) is None:
            packages.append(need)
    if packages:
        told.append(f"needs {', '.join(packages)}, not installed here")
    return "; ".join(told) or None


clock = time.perf_counter  # of programs that time themselves; a worker on one core makes it CPU time


def serve(prepare: Callable[[], Callable[[], Any]], *, one_core: bool = False) -> None:
    """A worker's life: prepares, then answers each line on stdin by one run, as JSON."""
    global clock
    if one_core:  # before a framework starts its threads
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        clock = time.process_time
    reply, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    start = time.perf_counter()
    run = prepare()
    for _ in range(2):
        run()
    print(json.dumps({"ready_s": time.perf_counter() - start}), file=reply, flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps(_grown(run)), file=reply, flush=True)
            continue
        start = clock()
        out = run()
        seconds = clock() - start
        if isinstance(out, dict) and "seconds" in out:
            seconds = out["seconds"]
        print(json.dumps({"seconds": seconds, "out": out}), file=reply, flush=True)


def _grown(run: Callable[[], Any]) -> int | None:
    """Bytes by which this process grows at most during a run, beyond what it holds at rest (Linux, else None)."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and a run would grow by less than it needs
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is the present one
        rest = status("VmRSS")
        run()
        return max(0, status("VmHWM") - rest)
    except OSError:
        return None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


class Worker:
    """`python -m benchmarks.NAME --worker PROGRAM --settings JSON`."""

    def __init__(
        self, name: str, program: str, settings: Mapping[str, Any], *, one_core: bool = False, quick: bool = False
    ):
        command = [sys.executable, "-m", f"benchmarks.{name}", "--worker", program, "--settings", json.dumps(settings)]
        command += ["--one-core"] if one_core else []
        # Two frameworks share the device: JAX must not take all of its memory at once.
        env = {"JAX_PLATFORMS": settings.get("device", "cpu"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if quick:  # compiles in half the time, and nobody looks at the figures
            env["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
            cwd=Path(__file__).parents[1],
        )

    def ready(self) -> float:
        """Waits until it is prepared; how many seconds that took it."""
        return self._answer()["ready_s"]

    def run(self) -> dict[str, Any]:
        return self._ask("run")

    def peak_bytes(self) -> int | None:
        """Of the working memory of a run, which is made for this."""
        return self._ask("memory")

    def cpu_s(self) -> float:
        return _cpu_of(self.process.pid)

    def stop(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ask(self, line: str) -> Any:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
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


def measure(benchmark: Benchmark, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One case as `results` has it: rounds until enough were quiet, or `--patience` times as many have run."""
    result: dict[str, Any] = {
        "title": f"{case.title}, one core" if args.one_core else case.title,
        "settings": dict(case.settings),
        "rate": None if case.rate is None else {"unit": case.rate[0], "per_run": case.rate[1]},
        "left_out": {},
        "programs": {},
        "rounds": 0,
        "thrown_away": 0,
        "quiet": True,
        "all": [],
    }
    for name in case.programs:
        program = benchmark.programs[name]
        if told := lacking(case.needs + program.needs):
            result["left_out"][name] = told
        elif args.quick and program.slow:
            result["left_out"][name] = "it takes long to get ready, and this is --quick"
    if args.one_core and benchmark.processes:
        result["left_out"][OURS] = "not measured: it is timed by the clock, so leave out --one-core"
    if OURS in result["left_out"]:  # nothing to hold the others against
        result["left_out"] = {OURS: result["left_out"][OURS]}
        return result
    wanted = args.rounds or (3 if args.quick else benchmark.rounds)
    patience = wanted * (1 if args.quick else args.patience)
    by_cpu = args.one_core or benchmark.cpu_time
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for program in case.programs:
            if program not in result["left_out"]:
                worker = workers[program] = Worker(
                    benchmark.name, program, case.settings, one_core=args.one_core, quick=args.quick
                )
                stack.callback(worker.stop)
                result["programs"][program] = {"ready_s": worker.ready()}
                print(f"  {program}: ready in {result['programs'][program]['ready_s']:.0f} s", flush=True)
        found = {program: worker.run()["out"] for program, worker in workers.items()}
        benchmark.same(found, case.settings)
        peaks = {program: worker.peak_bytes() for program, worker in workers.items() if benchmark.memory}
        quiet, noisy = [], []
        while len(quiet) < wanted and len(quiet) + len(noisy) < patience:
            own = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self")
            machine, start = _cpu_of_machine(), time.time()
            answers = {program: worker.run() for program, worker in workers.items()}
            own = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self") - own
            others = (_cpu_of_machine() - machine - own) / ((time.time() - start) * (os.cpu_count() or 1))
            (quiet if others <= args.busy or by_cpu else noisy).append((answers, max(others, 0.0)))
    enough = len(quiet) >= min(wanted, 5)
    used = quiet if enough else quiet + noisy
    result |= {"rounds": len(used), "thrown_away": len(noisy) if enough else 0, "quiet": enough}
    result["others"] = statistics.median(others for _, others in used)
    for program, it in result["programs"].items():
        answers = [answers[program] for answers, _ in used]
        it["seconds"] = _spread([a["seconds"] for a in answers])
        if program != OURS:
            it["ratio"] = _spread([round_[OURS]["seconds"] / round_[program]["seconds"] for round_, _ in used])
        figures = found[program].get("figures", {}) if isinstance(found[program], dict) else {}
        it["figures"] = {name: statistics.median(a["out"]["figures"][name] for a in answers) for name in figures}
        if peaks.get(program) is not None:
            it["figures"]["peak_bytes"] = peaks[program]
        if isinstance(found[OURS], dict) and "flops" in found[OURS]:  # by our count of the model, for all alike
            it["figures"]["flops_per_s"] = found[OURS]["flops"] / it["seconds"]["median"]
            if found[OURS].get("peak_flops"):
                it["figures"]["mfu"] = it["figures"]["flops_per_s"] / found[OURS]["peak_flops"]
    result["all"] = [
        {program: answer["seconds"] for program, answer in answers.items()} | {"others": others}
        for answers, others in used
    ]
    return result


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "quartiles": [float(low), float(high)]}

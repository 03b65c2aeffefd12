"""What the benchmarks found: one form for all, printed, kept as dated JSON under results/, and checked when read.

A result is one run of one benchmark: `benchmark`, `date`, `command`, `quick`, `machine`, `versions` and its `cases`.
A case has its `title` and `settings`; the `programs` that took turns, each with its `seconds` (median and quartiles),
`ratio` (time of ours / its own, within a round) and `figures`; those `left_out`, each with the reason; and how the
rounds went. What an old machine was not asked is null.
"""

import datetime
import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ALL = (
    "forward",
    "train_step",
    "loss",
    "probes",
    "decoder",
    "sweep",
    "loader",
    "curation",
    "gpu",
)  # the benchmarks, in order
OURS, GPU = "ours", ALL[-1]

_RESULT = {"benchmark": str, "date": str, "command": str, "quick": bool, "machine": dict, "versions": dict}
_CASE = {"title": str, "settings": dict, "programs": dict, "left_out": dict, "rounds": int, "quiet": bool, "all": list}


def new(benchmark: str, command: str, packages: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """A result without cases, of this machine, now."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "machine": machine(),
        "versions": {package: version for package in packages if (version := _version(package))},
        "cases": [],
    }


def machine() -> dict[str, Any]:
    """What a figure depends on besides the programs: processor, cores, memory, GPU, system, and how busy it is."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gib": (kib := _field("/proc/meminfo", "MemTotal")) and round(int(kib.split()[0]) / 2**20, 1),
        "accelerator": accelerator(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


@functools.cache
def accelerator() -> str | None:
    """The first GPU as its driver names it, or None."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return names[0].strip() or None


def _field(path: str, name: str) -> str | None:
    """The value of the first `name: value` of a file of the kernel's."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(result: Mapping[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{result['date'][:16].replace(':', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    """A result as it was saved.

    Raises:
      ValueError: if the file is none, naming it and what is wrong.
    """
    try:
        result = json.loads(path.read_text())
        _check(result, _RESULT | {"cases": list}, "the result")
        datetime.datetime.fromisoformat(result["date"])
        if result["benchmark"] not in ALL:
            raise ValueError(f"the benchmark {result['benchmark']!r} is none of {', '.join(ALL)}")
        for number, case in enumerate(result["cases"]):
            _check(case, _CASE, f"case {number}")
            for name, program in case["programs"].items():
                spreads = ("seconds",) if name == OURS else ("seconds", "ratio")
                _check(program, dict.fromkeys(spreads, dict), f"{name!r} of {case['title']!r}")
                for spread in spreads:
                    where = f"{spread} of {name!r} of {case['title']!r}"
                    _check(program[spread], {"median": float, "quartiles": list}, where)
                    if len(program[spread]["quartiles"]) != 2:
                        raise ValueError(f"{where} has {len(program[spread]['quartiles'])} quartiles, not 2")
    except ValueError as error:  # of JSON, a date or the form
        raise ValueError(f"{path} is no result of a benchmark: {error}. Measure it again, or delete it.") from error
    return result


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, oldest first; raises as `load`."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["date"])


def _check(value: Any, form: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, not an object")
    for name, kind in form.items():
        if name not in value:
            raise ValueError(f"{where} has no {name!r}")
        if not isinstance(value[name], (float, int) if kind is float else kind):
            raise ValueError(f"{name!r} of {where} is {json.dumps(value[name])[:40]}, wanted {kind.__name__}")


def heading(result: Mapping[str, Any]) -> str:
    """One line a fact: what was run, when, on what machine and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    quick = "  (quick: a smoke test, its figures mean nothing)" if result["quick"] else ""
    return f"{result['benchmark']}, {result['date']}{quick}\n{describe(result['machine'])}\n{versions}"


def describe(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    parts = [machine.get("accelerator"), machine.get("cpu"), f"{machine.get('cores')} cores"]
    if machine.get("memory_gib"):
        parts.append(f"{machine['memory_gib']:.0f} GiB")
    parts += [machine.get("platform"), f"Python {machine.get('python')}"]
    if machine.get("load") is not None:
        parts.append(f"load {machine['load']} at the start")
    return ", ".join(part for part in parts if part)


def table(case: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a case, a program a row; columns of which nothing is known are left out."""
    rate = case.get("rate")
    columns: dict[str, Callable[[str, Mapping[str, Any]], str | None]] = {
        "program": lambda name, _: name,
        "median": lambda _, it: _time(it["seconds"]["median"]),
        "quartiles": lambda _, it: " to ".join(_time(edge) for edge in it["seconds"]["quartiles"]),
        rate["unit"] if rate else "": lambda _, it: rate and _short(rate["per_run"] / it["seconds"]["median"]),
        "TFLOP/s": lambda _, it: _figure(it, "flops_per_s", lambda x: f"{x / 1e12:.3g}"),
        "MFU": lambda _, it: _figure(it, "mfu", lambda x: f"{x:.1%}"),
        "accuracy": lambda _, it: _figure(it, "accuracy", lambda x: f"{x:.2%}"),
        "peak MiB": lambda _, it: _figure(it, "peak_bytes", lambda x: f"{x / 2**20:,.0f}"),
        "time ours / it": lambda _, it: ratio(it),
    }
    rows = [[of(name, it) or "" for of in columns.values()] for name, it in case["programs"].items()]
    kept = [i for i, _ in enumerate(columns) if any(row[i] for row in rows)]
    return [list(columns)[i] for i in kept], [[row[i] for i in kept] for row in rows]


def ratio(program: Mapping[str, Any]) -> str | None:
    """ "1.09 (1.08 to 1.10)": time of ours over the program's, below 1 where we are faster."""
    if "ratio" not in program:
        return None
    low, high = (_short(edge) for edge in program["ratio"]["quartiles"])
    return f"{_short(program['ratio']['median'])} ({low} to {high})"


def rounds(case: Mapping[str, Any]) -> str:
    """How far the figures of a case can be trusted."""
    told = f"rounds used: {case['rounds']}, too noisy: {case.get('thrown_away', 0)}"
    if case.get("others") is not None:
        told += f"; others used {case['others']:.0%} of the machine"
    return told if case["quiet"] else f"{told}. THE MACHINE WAS BUSY: do not quote the times"


def text(case: Mapping[str, Any]) -> str:
    """A case as it is printed."""
    lines = []
    if case["programs"]:
        head, rows = table(case)
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "   ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
        lines.append("  " + rounds(case))
    lines += [f"  {name}: left out, {why}" for name, why in case["left_out"].items()]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


def _short(x: float) -> str:
    """Two decimals, fewer of what is large and more of what is small."""
    return f"{x:,.{0 if x >= 1000 else 1 if x >= 10 else 2 if x >= 0.1 else 3}f}"


def _figure(program: Mapping[str, Any], name: str, told: Callable[[float], str]) -> str | None:
    value = program.get("figures", {}).get(name)
    return None if value is None else told(value)

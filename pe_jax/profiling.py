"""Traces of a run's steps for xprof, and a first reading of each as text: what the device's time went to.

`python -m pe_jax.train --profile=100:5` traces steps 100 to 104; docs/profiling.md says how to read what it writes.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from pe_jax import paths

# Names of `jax.named_scope` in the update, by which the summary adds up.
SCOPES = ("vision", "text", "loss", "mask_regularisation", "optimizer")
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|reduce-scatter|(async-)?collective|send|recv)(?![a-z])")
_CONTROL = re.compile(r"(while|conditional|call)\b")  # what runs inside them is in the trace itself
_LISTED = 20  # rows of a table


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps that are traced, counted from 1 as `losses.csv` counts them."""

    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def __str__(self) -> str:
        return f"steps {self.first} to {self.last}" if self.count > 1 else f"step {self.first}"


def parse(given: str, phases: Sequence[int]) -> tuple[Window, ...]:
    """The windows of "FIRST:COUNT,FIRST:COUNT", in order; none of "".

    Args:
      given: as on the command line.
      phases: steps of each phase of the run.

    Raises:
      ValueError: if it has another form, or a window does not lie within one phase, or two overlap.
    """
    if given and not re.fullmatch(r"0*[1-9]\d*:0*[1-9]\d*(,0*[1-9]\d*:0*[1-9]\d*)*", given):
        raise ValueError(
            f"--profile={given} is not FIRST:COUNT,...: the first step to trace, counted from 1, and how many; "
            "--profile=100:5 traces steps 100 to 104."
        )
    pairs = [pair.split(":") for pair in given.split(",")] if given else []
    windows = sorted((Window(int(first), int(count)) for first, count in pairs), key=lambda window: window.first)
    for before, after in itertools.pairwise(windows):
        if after.first <= before.last:
            raise ValueError(f"--profile={given}: {before} and {after} overlap; make them one, or move one.")
    for window in windows:
        ends = [sum(phases[: i + 1]) for i in range(len(phases))]
        if window.last > ends[-1]:
            raise ValueError(f"--profile={given}: the run has {ends[-1]} steps, so there is no step {window.last}.")
        for end in ends:
            if window.first <= end < window.last:
                raise ValueError(
                    f"--profile={given}: a phase ends after step {end}, in the midst of {window}, and the next is "
                    "another program; trace steps of one phase."
                )
    return tuple(windows)


class Tracer:
    """Traces the steps of its windows, on this process. A fault of the profiler is told, and stops no run."""

    def __init__(
        self, windows: Sequence[Window], directory: str | os.PathLike[str], tell: Callable[[str], None], *, done: int
    ):
        """What a window's trace holds goes to DIRECTORY/FIRST; a window that has begun by step `done` is left out."""
        self._windows = {window.first: window for window in windows if window.first > done}
        self._directory, self._tell, self._open = paths.path(directory), tell, None
        self._scratch: Any = None
        if missed := [str(window) for window in windows if window.first <= done]:
            tell(f"not traced: {', '.join(missed)}, for the run goes on after step {done}")

    def begin(self, step: int, state: Any) -> bool:
        """Starts a trace where `step`, which comes next, is a window's first, as soon as `state` is there."""
        if step not in self._windows:
            return False
        jax.block_until_ready(state)  # or the trace would begin with the end of an earlier step
        with self._tolerated(self._windows[step]):
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would be an event, and slow the host we look at
            # Written apart and copied: the profiler writes to no bucket, and calls its files after the host, which
            # processes may share.
            self._scratch = tempfile.TemporaryDirectory(prefix="pe_jax-")
            jax.profiler.start_trace(self._scratch.name, profiler_options=options)
            self._open = self._windows[step]
        return True

    def end(self, step: int, state: Any, update: Any) -> bool:
        """Writes the trace whose last step is `step`, which gave `state` and ran the compiled program `update`."""
        if self._open is None or step < self._open.last:
            return False
        jax.block_until_ready(state)  # steps are asynchronous: this one may hardly have begun
        window, self._open = self._open, None
        folder, name = self._directory / str(window.first), f"process-{jax.process_index()}"
        with self._tolerated(window):
            jax.profiler.stop_trace()
            traces = folder / "plugins" / "profile" / str(window.first)
            traces.mkdir(parents=True, exist_ok=True)
            scratch = pathlib.Path(self._scratch.name)
            for suffix in (".xplane.pb", ".trace.json.gz"):
                for path in scratch.rglob(f"*{suffix}"):
                    with path.open("rb") as local, (traces / (name + suffix)).open("wb") as copy:
                        shutil.copyfileobj(local, copy, 1 << 20)
            (plane,) = scratch.rglob("*.xplane.pb")
            told = summary(jax.profiler.ProfileData.from_file(str(plane)), _text(update), window)
            (folder / f"{name}.txt").write_text(f"{window}, process {jax.process_index()}\n{told}")
            self._scratch.cleanup()
            self._tell(
                f"{window} traced: {folder / name}.txt says what the device's time went to; for the timeline "
                f"`pip install xprof` and `xprof --logdir={self._directory}`, or open a .trace.json.gz in Perfetto"
            )
        return True

    def close(self) -> None:
        """Drops a trace whose last step never came."""
        if self._open is not None:
            window, self._open = self._open, None
            with self._tolerated(window):
                jax.profiler.stop_trace()
                self._scratch.cleanup()
                self._tell(f"not traced: {window}, for the run ends before")

    @contextlib.contextmanager
    def _tolerated(self, window: Window) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, a trace is no reason to lose a run
            self._tell(f"not traced: {window}: {error}")


def _text(update: Any) -> str:
    """A compiled program's text; empty where the compiler cannot tell it, as libtpu 0.0.52 for some programs."""
    try:
        return update.as_text()
    except RuntimeError:
        return ""


def summary(trace: Any, program: str, window: Window) -> str:
    """What the time of this process's first device went to, by part of the model and by operation.

    Args:
      trace: a `jax.profiler.ProfileData` of the window's steps.
      program: HLO text of the update, which says for what each operation was made; without it there are no parts.
      window: the traced steps.
    """
    device, operations = _operations(trace)
    if not operations:
        return "the trace holds no operations of a device.\n"
    made_for = _made_for(program)
    parts: dict[str, float] = collections.defaultdict(float)
    times: dict[str, float] = collections.defaultdict(float)
    runs: dict[str, int] = collections.defaultdict(int)
    for name, start, end in operations:
        parts[_part(name, made_for.get(name, ""))] += end - start
        times[name] += end - start
        runs[name] += 1
    begun, ended = min(start for _, start, _ in operations), max(end for _, _, end in operations)
    total, busy = sum(times.values()), _covered((start, end) for _, start, end in operations)

    def table(title: str, spent: dict[str, float], what: Callable[[str], str]) -> str:
        rows = sorted(spent.items(), key=lambda item: -item[1])[:_LISTED]
        lines = (f"{t / window.count / 1e6:10.3f}  {t / total:6.1%}  {what(name)}".rstrip() for name, t in rows)
        return "\n".join(("", f"   ms/step   share  {title}", *lines, ""))

    return (
        f"{device}: {(ended - begun) / window.count / 1e6:.3f} ms a step, busy {busy / (ended - begun):.1%} of it\n"
        + table("part", parts, str)
        + table(
            "runs x operation", times, lambda name: f"{runs[name] / window.count:g} x {name}  {made_for.get(name, '')}"
        )
    )


def _operations(trace: Any) -> tuple[str, list[tuple[str, float, float]]]:
    """The first device's name, and (HLO instruction, start, end in ns) of what it ran."""
    planes = {plane.name: plane for plane in trace.planes}
    device = min((name for name in planes if re.match(r"/device:(TPU|GPU):\d+$", name)), default="/host:CPU")
    # Other lines of a TPU or GPU tell the same time again, by module or by step.
    lines = {"/device:TPU": "XLA Ops", "/device:GPU": "Stream"}.get(device.rpartition(":")[0], "")
    found: dict[int, list[tuple[str, float, float]]] = collections.defaultdict(list)
    for line in planes[device].lines if device in planes else ():
        for event in line.events if line.name.startswith(lines) else ():
            stats = dict(event.stats)
            if device == "/host:CPU" and "hlo_op" not in stats:
                continue  # what the threads did besides
            name = str(stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%"))  # a TPU names by whole HLO text
            if not _CONTROL.match(name):
                ordinal = int(stats.get("device_ordinal", 0))  # simulated devices are all in one plane
                found[ordinal].append((name, event.start_ns, event.start_ns + event.duration_ns))
    return device, found[min(found)] if found else []


def _made_for(program: str) -> dict[str, str]:
    """For each HLO instruction, the JAX operation it was made for, with the scopes and transformations around it."""
    return dict(re.findall(r'^ +(?:ROOT )?%?([\w.\-]+) = .*?op_name="(?:jit\(train_step\)/)?([^"]*)"', program, re.M))


def _part(name: str, made_for: str) -> str:
    if _COLLECTIVE.match(name):
        return "collectives"
    scopes = [word for word in re.findall(r"\w+", made_for) if word in SCOPES]
    if not scopes:
        return "other"
    if "rematted_computation" in made_for:
        return f"{scopes[-1]}, forward again for the backward pass"
    return f"{scopes[-1]}, backward" if "transpose(" in made_for else scopes[-1]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    length, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length

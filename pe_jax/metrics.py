"""Scalars of a run to CSV and TensorBoard through clu's interface, its speed, and the progress line.

`losses.csv` has one row per logged step with every float32 exact (read back, it is the same number), so that two runs
can be compared bit for bit; `evals.csv` has one row per figure of an evaluator. TensorBoard needs the `tb` extra.
Into a bucket, where nothing can be appended to, they go as whole files: every half minute, and before each save.
"""

import concurrent.futures
import contextlib
import csv
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from pe_jax import paths

# clu 0.0.12 imports TensorFlow for its own TensorBoard writer, which we replace; a stub in that place keeps it away.
_stub: Any = types.ModuleType("clu.metric_writers.summary_writer")
_stub.SummaryWriter = type("SummaryWriter", (), {})
sys.modules.setdefault(_stub.__name__, _stub)
from clu.metric_writers import MetricWriter, MultiWriter  # noqa: E402

# Dense bf16 FLOP/s of one device, as its maker states it; the key is how jax calls the device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # one of a chip's two cores, as JAX counts devices there
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def writer(workdir: str | os.PathLike[str], resumed_step: int | None = None, *, evaluated: bool = True) -> MetricWriter:
    """The writers of a run: CSV always, TensorBoard where tensorboardX is installed; nothing but on process 0.

    Args:
      workdir: where `losses.csv`, `evals.csv` and `tensorboard/` go, local or gs://.
      resumed_step: rows after this step are dropped: the run, restored from there, writes them again. None starts new.
      evaluated: whether this step's own evaluations are done, so that their rows stay.
    """
    if jax.process_index() != 0:
        return MultiWriter([])
    copy = BucketWriter(paths.path(workdir)) if paths.is_bucket(workdir) else None
    workdir = workdir if copy is None else copy.folder
    os.makedirs(workdir, exist_ok=True)
    writers: list[MetricWriter] = [CsvWriter(workdir, resumed_step, evaluated=evaluated)]
    if importlib.util.find_spec("tensorboardX"):
        writers.append(TensorBoardWriter(os.path.join(workdir, "tensorboard"), resumed_step))
    return MultiWriter(writers if copy is None else [*writers, copy])


class _ScalarsOnly(MetricWriter):
    """What a run does not write is refused rather than lost."""

    def write_summaries(self, step: int, values: Any, metadata: Any = None) -> None:
        raise NotImplementedError

    def write_images(self, step: int, images: Any) -> None:
        raise NotImplementedError

    def write_videos(self, step: int, videos: Any) -> None:
        raise NotImplementedError

    def write_audios(self, step: int, audios: Any, *, sample_rate: int) -> None:
        raise NotImplementedError

    def write_texts(self, step: int, texts: Any) -> None:
        raise NotImplementedError

    def write_histograms(self, step: int, arrays: Any, num_buckets: Any = None) -> None:
        raise NotImplementedError

    def write_hparams(self, hparams: Any) -> None:
        raise NotImplementedError


class CsvWriter(_ScalarsOnly):
    """`losses.csv`, a row per step; scalars named "evaluator/figure" go to `evals.csv`, a row each.

    The columns of `losses.csv` are the names of the first write; a resumed run, which may be of another version, adds
    those of its own first write, empty in the rows before.
    """

    def __init__(self, workdir: str | os.PathLike[str], resumed_step: int | None = None, *, evaluated: bool = True):
        self._path, self._resumed, self._written = os.path.join(workdir, "losses.csv"), resumed_step, False
        self._losses, self._columns = _open_rows(self._path, resumed_step)
        kept = resumed_step if evaluated or resumed_step is None else resumed_step - 1
        self._evals, _ = _open_rows(os.path.join(workdir, "evals.csv"), kept, ["step", "name", "value"])

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        figures = {name: value for name, value in scalars.items() if "/" in name}
        csv.writer(self._evals).writerows([step, name, exact(value)] for name, value in figures.items())
        row = {"step": step} | {name: exact(value) for name, value in scalars.items() if name not in figures}
        if len(row) > 1:
            if not self._written and set(row) - set(self._columns):
                self._losses.close()
                self._losses, self._columns = _open_rows(self._path, self._resumed, list(row))
            self._written = True
            if unknown := set(row) - set(self._columns):
                raise ValueError(f"{sorted(unknown)} are no columns of losses.csv, which has {self._columns}.")
            csv.writer(self._losses).writerow([row.get(name, "") for name in self._columns])
        self.flush()

    def flush(self) -> None:
        self._losses.flush()
        self._evals.flush()

    def close(self) -> None:
        self._losses.close()
        self._evals.close()


class TensorBoardWriter(_ScalarsOnly):
    """Event files for TensorBoard, written by tensorboardX: no TensorFlow."""

    def __init__(self, directory: str | os.PathLike[str], resumed_step: int | None = None):
        from tensorboardX import SummaryWriter

        # TensorBoard hides what an earlier process wrote at and after `purge_step`.
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", float(value), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class BucketWriter(_ScalarsOnly):
    """Copies what other writers keep in `folder`, of this machine, into a bucket; the last of a run's writers.

    `write_scalars` copies in the background, so that no step waits for it, and what fails there is tried again at the
    next turn. `flush` and `close` return when everything is in the bucket, and raise what stands in the way.
    """

    def __init__(self, target: epath.Path, *, seconds: float = 30.0):
        """Begins with the CSV files that `target` has; `seconds` is the least time between two copies of a file."""
        self._scratch = tempfile.TemporaryDirectory(prefix="pe_jax-", ignore_cleanup_errors=True)
        self.folder, self._target, self._seconds = pathlib.Path(self._scratch.name), target, seconds
        for name in ("losses.csv", "evals.csv"):
            if (target / name).exists():
                (self.folder / name).write_bytes((target / name).read_bytes())
        self._sizes: dict[pathlib.Path, int] = {}  # of what is copied; the files only grow
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._pending: concurrent.futures.Future[None] | None = None
        self._last = time.monotonic()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if time.monotonic() - self._last >= self._seconds and (self._pending is None or self._pending.done()):
            self._last, self._pending = time.monotonic(), self._pool.submit(self._copy)

    def flush(self) -> None:
        self._last = time.monotonic()
        self._pool.submit(self._copy).result()  # after one in the background

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._pool.shutdown()
            self._scratch.cleanup()

    def _copy(self) -> None:
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            if (size := file.stat().st_size) != self._sizes.get(file):
                with file.open("rb") as local, (self._target / file.relative_to(self.folder)).open("wb") as remote:
                    shutil.copyfileobj(local, remote, 1 << 20)
                self._sizes[file] = size


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The complete rows of a CSV file of ours; a last line cut short by a kill is left out."""
    text = paths.path(path).read_bytes().decode()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _open_rows(path: str, resumed_step: int | None, columns: Sequence[str] = ()) -> tuple[IO[str], list[str]]:
    """The file, open for more rows, and its columns, those given too; rows after `resumed_step`, or all, are gone."""
    rows = read_rows(path) if resumed_step is not None and os.path.exists(path) else []
    rows = [row for row in rows if int(row["step"]) <= (resumed_step or 0)]
    columns = list(dict.fromkeys([*(rows[0] if rows else ()), *columns]))
    file = open(path, "w", newline="")  # noqa: SIM115
    if columns:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    return file, columns


def exact(value: Any) -> str:
    """The shortest decimal that reads back as the same number of its own precision: 0.1 for float32(0.1)."""
    value = np.asarray(value)
    return str(value.item() if value.dtype.kind in "iub" else value[()])


def peak_flops(devices: Sequence[Any] | None = None) -> float | None:
    """bf16 FLOP/s of all devices together, or None where the kind is unknown (a CPU)."""
    devices = jax.devices() if devices is None else devices
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


class Speed:
    """Examples per second, MFU, seconds of a step and what shares of them this host spent on what, since last read.

    The devices work while the host goes on, and nothing here waits for them, so a share is the host's time alone. It
    is `device_wait` that tells the two cases apart: where the host had to wait for the devices, they were the slower.

    | share | of the time |
    |---|---|
    | data_wait | until the loader had the batch |
    | batch_put | to hand the batch to the devices |
    | dispatch | to hand over the update; waits too where the devices take no more work |
    | device_wait | until the devices were done, at a logged step |
    | host_other | all else: logs, signals, the loop itself |
    """

    PARTS = ("data_wait", "batch_put", "dispatch", "device_wait")

    def __init__(self, peak: float | None = None):
        self._peak = peak
        self.reset()

    def reset(self) -> None:
        """Starts a new interval, as after a compilation, an evaluation or a save, whose time is not the step's."""
        self._spent: dict[str, float] = dict.fromkeys(self.PARTS, 0.0)
        self._start, self._steps, self._examples, self._flops = time.perf_counter(), 0, 0, 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside as one of `PARTS`; a trace shows it under that name."""
        with jax.profiler.TraceAnnotation(name):
            begun = time.perf_counter()
            yield
            self._spent[name] += time.perf_counter() - begun

    def count(self, examples: int, flops: float) -> None:
        """Adds a step: its examples, and the model FLOPs of all of them."""
        self._steps += 1
        self._examples += examples
        self._flops += flops

    def read(self) -> dict[str, float]:
        """The figures of the interval, which then starts anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        figures = {"examples_per_second": self._examples / seconds, "step_seconds": seconds / max(self._steps, 1)}
        figures |= {name: spent / seconds for name, spent in self._spent.items()}
        figures["host_other"] = 1 - sum(self._spent.values()) / seconds
        if self._peak:
            figures["mfu"] = self._flops / seconds / self._peak
        self.reset()
        return figures


class Progress:
    """One line that says where a run is: redrawn on a terminal, else printed at most every few seconds."""

    def __init__(self, steps: int, *, start: int = 0, seconds: float = 5.0, file: Any = None):
        """Shows progress towards `steps`, from step `start`; `seconds` is the least time between plain lines."""
        self._steps, self._seconds = steps, seconds
        self._file = sys.stdout if file is None else file
        self._last, self._live, self._task = -float("inf"), None, None
        self._began: tuple[int, float] | None = None
        if self._file.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(30),
                TextColumn("{task.description}"),
            )
            self._live = Progress(*columns, console=Console(file=self._file), transient=False)
            self._live.start()
            self._task = self._live.add_task("compiling", total=steps, completed=start)

    def update(self, step: int, loss: float, speed: Mapping[str, float], notes: Iterable[str] = ()) -> None:
        """Shows a step just done; `speed` has the figures of `Speed`, and where known what the loader could give."""
        now = time.perf_counter()
        if self._began is None:
            self._began = (step, now)  # the first step compiles: its time says nothing of the rest
        done, seconds = step - self._began[0], now - self._began[1]
        eta = _duration((self._steps - step) * seconds / done) if done else "?"
        rate = f"{speed['examples_per_second']:,.0f} examples/s"
        if "loader_examples_per_second" in speed:
            rate += f" (loader {speed['loader_examples_per_second']:,.0f})"
        if speed.get("data_wait", 0) >= 0.1 > speed["dispatch"] + speed["device_wait"]:
            rate += f", waiting for data {speed['data_wait']:.0%}"
        parts = [f"loss {loss:.4f}", rate, f"ETA {eta}", *notes]
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, description="  ".join(parts))
        elif now - self._last >= self._seconds or step == self._steps:
            self._last = now
            print(f"step {step}/{self._steps}  " + "  ".join(parts), file=self._file, flush=True)

    def note(self, text: str) -> None:
        """Prints a line of its own: an evaluation's figures, a save."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

import glob
import io
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pe_jax import metrics


def test_float32_scalars_read_back_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32) * np.float32(10.0) ** np.arange(-25, 25)
    values = values.astype(np.float32)
    out = metrics.CsvWriter(tmp_path)
    for step, value in enumerate(values):
        out.write_scalars(step, {"loss": jnp.asarray(value), "bad_records": 3})
    out.close()
    rows = metrics.read_rows(tmp_path / "losses.csv")
    np.testing.assert_array_equal(np.array([row["loss"] for row in rows], np.float32), values)
    assert rows[7] == {"step": "7", "loss": str(values[7]), "bad_records": "3"}


def test_a_resumed_run_drops_the_rows_it_will_write_again(tmp_path):
    out = metrics.CsvWriter(tmp_path)
    for step in range(1, 7):
        out.write_scalars(step, {"loss": np.float32(step)})
        out.write_scalars(step, {"digits/top1": step / 10})
    out.close()
    with open(tmp_path / "losses.csv", "a") as file:
        file.write("7,0.12")  # killed in the middle of a line
    again = metrics.CsvWriter(tmp_path, resumed_step=4)
    again.write_scalars(5, {"loss": np.float32(50)})
    again.close()
    assert [row["loss"] for row in metrics.read_rows(tmp_path / "losses.csv")] == ["1.0", "2.0", "3.0", "4.0", "50.0"]
    assert [row["step"] for row in metrics.read_rows(tmp_path / "evals.csv")] == ["1", "2", "3", "4"]


def test_a_run_resumed_by_a_version_with_other_columns_adds_them_and_leaves_its_lacking_ones_empty(tmp_path):
    out = metrics.CsvWriter(tmp_path)
    for step in (1, 2, 3):
        out.write_scalars(step, {"loss": np.float32(step), "dropped": 7})
    out.close()
    again = metrics.CsvWriter(tmp_path, resumed_step=2)
    again.write_scalars(3, {"loss": np.float32(30), "added": 0.5})
    with pytest.raises(ValueError, match="'late'"):
        again.write_scalars(4, {"loss": 1.0, "late": 2.0})
    again.close()
    assert [list(row.values()) for row in metrics.read_rows(tmp_path / "losses.csv")] == [
        ["1", "1.0", "7", ""],
        ["2", "2.0", "7", ""],
        ["3", "30.0", "", "0.5"],
    ]


def test_a_run_from_scratch_starts_empty_tables(tmp_path):
    metrics.CsvWriter(tmp_path).write_scalars(1, {"loss": 1.0})
    metrics.CsvWriter(tmp_path).close()
    assert metrics.read_rows(tmp_path / "losses.csv") == []


def test_a_scalar_that_is_no_column_is_refused(tmp_path):
    out = metrics.CsvWriter(tmp_path)
    out.write_scalars(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="'surprise'"):
        out.write_scalars(2, {"loss": 1.0, "surprise": 2.0})


def test_tensorboard_files_are_written_without_tensorflow(tmp_path):
    pytest.importorskip("tensorboardX")
    code = f"""
import sys
from pe_jax import metrics
out = metrics.writer({str(tmp_path)!r})
out.write_scalars(1, {{"loss": 0.5}})
out.close()
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=".")
    assert done.stdout.strip() == "[]", done.stderr
    assert glob.glob(str(tmp_path / "tensorboard" / "events.*"))
    assert metrics.read_rows(tmp_path / "losses.csv")[0]["loss"] == "0.5"


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_speed_is_examples_over_time_and_its_shares_add_up_to_the_step(monkeypatch):
    clock = Clock(monkeypatch)
    speed = metrics.Speed(peak=1e6)
    for _ in range(2):
        for name, seconds in {"data_wait": 0.5, "batch_put": 0.25, "dispatch": 0.125}.items():
            with speed.part(name):
                clock.now += seconds
        speed.count(30, 1e6)
    with speed.part("device_wait"):
        clock.now += 2.0
    clock.now += 0.25
    assert speed.read() == {
        "examples_per_second": 15.0,
        "step_seconds": 2.0,
        "data_wait": 0.25,
        "batch_put": 0.125,
        "dispatch": 0.0625,
        "device_wait": 0.5,
        "host_other": 0.0625,
        "mfu": 0.5,
    }


def test_what_was_timed_before_a_reset_is_of_no_step(monkeypatch):
    clock = Clock(monkeypatch)
    speed = metrics.Speed()
    with speed.part("data_wait"):
        clock.now += 30.0  # the first batch, then compilation
    speed.reset()
    with speed.part("dispatch"):
        clock.now += 1.0
    speed.count(30, 1e6)
    figures = speed.read()
    assert (figures["data_wait"], figures["dispatch"], figures["step_seconds"]) == (0.0, 1.0, 1.0)
    assert speed.read()["examples_per_second"] == 0.0  # and a reading begins a new interval
    assert "mfu" not in figures and metrics.peak_flops() is None  # a CPU


def test_the_progress_line_is_plain_where_there_is_no_terminal(monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    file = io.StringIO()
    progress = metrics.Progress(500, seconds=15.0, file=file)
    speed = {"examples_per_second": 1234.5, "loader_examples_per_second": 9876.5}
    progress.update(10, 2.5, {"examples_per_second": 1000.0})
    progress.update(20, 2.25, speed)  # too soon for another line
    progress.update(30, 2.0, speed, ["MFU 40%"])
    progress.close()
    assert file.getvalue().splitlines() == [
        "step 10/500  loss 2.5000  1,000 examples/s  ETA ?",
        "step 30/500  loss 2.0000  1,234 examples/s (loader 9,876)  ETA 7:50  MFU 40%",
    ]


@pytest.mark.parametrize(("device_wait", "told"), [(0.02, ", waiting for data 60%"), (0.4, "")])
def test_the_progress_line_tells_of_waiting_for_data_where_the_devices_are_idle_meanwhile(device_wait, told):
    file = io.StringIO()
    speed = {"examples_per_second": 1000.0, "data_wait": 0.6, "dispatch": 0.0, "device_wait": device_wait}
    metrics.Progress(500, file=file).update(10, 2.5, speed)
    assert file.getvalue() == f"step 10/500  loss 2.5000  1,000 examples/s{told}  ETA ?\n"


def test_the_progress_line_is_redrawn_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    progress = metrics.Progress(50, file=file)
    progress.update(10, 2.5, {"examples_per_second": 1000.0})
    progress.update(50, 1.5, {"examples_per_second": 1000.0})
    progress.note("[digits] top1 0.9")
    progress.close()
    assert "loss 1.5000" in file.getvalue() and "step 50/50" in file.getvalue() and "[digits]" in file.getvalue()

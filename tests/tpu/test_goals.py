"""The tables of goals and of attention's kernels: what they tell, and that every row can be asked for."""

import json
import math
import pathlib

import pytest

from pe_jax import train
from tpu import aot, attention, goals
from tpu.goals import ROWS, Row

ROOT = pathlib.Path(__file__).parents[2]
FITS = {
    "fits": True, "argument_bytes": 2 * 2**30, "temporary_bytes": 6 * 2**30, "holds": 16 * 2**30,
    "mfu": {"cycles": 0.4, "middle": 0.55, "roofline": 0.6}, "seconds": {"middle": 10.0}, "exposed_seconds": 0.4,
    "executed_flops": 3.3, "model_flops": 2.0, "compile_seconds": 200.0,
}  # fmt: skip


def line(row, figures):
    return goals.table({row.name: figures}).splitlines()[-1]


def test_a_goal_that_is_met_is_marked_and_one_that_is_missed_is_named():
    met = next(row for row in ROWS if row.mfu == 0.50)
    told = line(met, FITS)
    assert "55.0% ✓" in told and "**4.0%** (wanted 3%)" in told and "**1.65** (wanted 1.40)" in told
    assert "200 ✓ s" in told and "8.0 of 16.0" in told and "(40% to 60%)" in told
    assert "**55.0%** (wanted 57%)" in line(next(row for row in ROWS if row.mfu == 0.57), FITS)


def test_one_pass_may_execute_less_than_micro_batches_may():
    assert (
        Row("G14", 224, "v5e:2x2", "data=4", 1, "dots").executed
        < Row("G14", 224, "v5e:2x2", "data=4", 2, "dots").executed
    )


def test_a_row_that_does_not_fit_tells_what_it_needs():
    figures = {"fits": False, "needs": 40 * 2**30, "holds": 16 * 2**30, "compile_seconds": 12.0}
    assert "**needs 40.0 of 16.0**" in line(ROWS[0], figures)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_names_a_mesh_of_its_slice_that_cuts_its_batch_and_a_phase_of_its_pixels(row):
    mesh, sides = aot.mesh_of(row.mesh), row.topology.partition(":")[2]
    assert math.prod(mesh.values()) == row.slices * math.prod(int(side) for side in sides.split("x"))
    words = dict(word.split("=", 1) for word in row.command)
    batch = int(words["--batch"]) if "--batch" in words else None
    run = train.parse(aot.changed(aot.config_of(words["--config"]), batch=batch, micro=row.micro, remat=row.remat))
    phase = run.phases[int(words.get("--phase", -1))]
    ways = math.prod(size for axis, size in mesh.items() if axis != "tensor")
    assert phase.image_size == row.pixels and phase.batch_size % (ways * row.micro) == 0
    assert phase.batch_size // row.micro % getattr(run.stage, "mask_every", 1) == 0


def test_rows_have_names_of_their_own():
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_newest_figures_of_each_row_are_kept(tmp_path):
    first, second = ROWS[0].name, ROWS[1].name
    for stamp, figures in (("2026-01-02", {first: 1, second: 2}), ("2026-01-03", {first: 3})):
        (tmp_path / f"goals-{stamp}.json").write_text(json.dumps({"figures": figures}))
    assert goals.kept(tmp_path) == {first: 3, second: 2}


def test_no_figures_and_no_such_row_are_told(tmp_path, capsys):
    assert goals.main([f"--read={tmp_path}"]) == 2 and "there is no goals-*.json" in capsys.readouterr().err
    assert goals.main(["--only=v9"]) == 2 and "is in no row's name; the rows are" in capsys.readouterr().err


def test_the_documented_tables_are_those_of_the_figures_kept():
    page = (ROOT / "docs/ahead_of_time.md").read_text()
    assert goals.table(goals.kept(ROOT / "tpu/results")) in page
    (newest,) = (ROOT / "tpu/results").glob("attention-*.json")
    assert attention.table(json.loads(newest.read_text())) in page


def test_a_kernel_that_does_not_fit_is_told_beside_those_that_do():
    row = {"chip": "v4", "tokens": 256, "examples": 64, "choice": "xla"}
    seconds = {"roofline": 1e-3, "middle": 2e-3, "cycles": 3e-3}
    told = attention.table([row, row | {"seconds": seconds, "temporary_bytes": 2**21}]).splitlines()
    assert "does not fit the core's memory" in told[-2] and "2 MiB | 2.00 ms (1.00 to 3.00)" in told[-1]


def test_a_chip_or_length_that_is_not_there_is_told(capsys):
    assert attention.main(["--chips=v3"]) == 2 and "no chip v3" in capsys.readouterr().err
    assert attention.main(["--tokens=50"]) == 2 and "take 256, 1024 or both" in capsys.readouterr().err

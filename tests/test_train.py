"""The loop: a killed run repeats itself, on other meshes and process counts too; wrong configs are refused early."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smoke
from pe_jax import metrics, sharding, train
from tests import fake_gcs, quick, two_processes

ROOT = pathlib.Path(__file__).parents[1]
SHARES = {*metrics.Speed.PARTS, "host_other"}
VARYING = {"examples_per_second", "step_seconds", "loader_examples_per_second", *SHARES}


def command(workdir, *flags, config="experiments/smoke.py"):
    return [sys.executable, "-m", "pe_jax.train", f"--config={config}", f"--workdir={workdir}", *flags]


CACHE = tempfile.TemporaryDirectory()  # the runs below compile the same steps


def environment(devices):
    """Of a run with so many devices, which keeps what it compiles for the next one."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick.flags(devices),
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(workdir, *flags, devices=1, cached=True, **config):
    pipe, variables = subprocess.PIPE, environment(devices)
    if not cached:
        del variables["JAX_COMPILATION_CACHE_DIR"]
    return subprocess.Popen(
        command(workdir, *flags, **config), cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def rows(workdir):
    with open(workdir / "losses.csv", newline="") as file:
        return without_varying(csv.DictReader(file))


def without_varying(table):
    return [{k: v for k, v in row.items() if k not in VARYING} for row in table]


def wait_for_line(process, text):
    """Until the process has printed a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError((text, process.communicate()))


def wait_for_step(workdir, step, process):
    """Until losses.csv has this step's whole line."""
    deadline = time.time() + 240
    while time.time() < deadline:
        path = workdir / "losses.csv"
        if path.exists() and path.read_text().count("\n") > step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError(step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def test_a_run_killed_in_the_middle_goes_on_with_the_same_batches_and_losses(whole, tmp_path):
    first = start(tmp_path)
    wait_for_step(tmp_path, 7, first)
    while not (tmp_path / "checkpoints" / "5").exists():  # saved in the background
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert int(rows(tmp_path)[-1]["step"]) < 20
    assert "going on from step" in finish(start(tmp_path))
    assert rows(tmp_path) == rows(whole)  # every figure of every step, to the last bit; `batch` names the records


@fake_gcs.needs_gcsfs
def test_a_run_in_a_bucket_that_is_killed_goes_on_with_the_losses_of_a_local_one(whole, monkeypatch):
    with fake_gcs.Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        first = start("gs://bucket/run")
        while "bucket/run/checkpoints/5/commit_success.txt" not in server.objects:
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        said = finish(start("gs://bucket/run", "--profile=18:2"))
    step = int(said.partition("going on from step ")[2].split()[0])
    assert 5 <= step < 20
    text = server.objects["bucket/run/losses.csv"].decode()
    assert without_varying(csv.DictReader(text.splitlines())) == rows(whole)
    assert server.objects["bucket/run/profile/18/process-0.txt"].startswith(b"steps 18 to 19, process 0")
    assert len([name for name in server.objects if name.startswith("bucket/run/tensorboard/")]) == 2  # one a process
    assert not (ROOT / "gs:").exists()


@fake_gcs.needs_gcsfs
def test_a_bucket_that_is_not_there_stops_a_run_before_it_begins(monkeypatch):
    with fake_gcs.Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        said = finish(start("gs://buckte/run"), code=2)
    assert "there is no bucket buckte" in said and "Traceback" not in said


def test_a_run_that_is_traced_from_some_step_on_is_the_same_run_and_its_losses_stay(whole, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=train.PREEMPTED)
    said = finish(start(tmp_path, "--profile=2:1,18:3"))
    assert "not traced: step 2, for the run goes on after step" in said and "steps 18 to 20 traced" in said
    assert rows(tmp_path) == rows(whole)
    told = (tmp_path / "profile" / "18" / "process-0.txt").read_text()
    assert all(part in told for part in ("vision, backward", "text, backward", "optimizer", "loss"))


def test_sigterm_saves_the_step_and_ends_with_its_own_exit_code(whole, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, code=train.PREEMPTED)
    assert "the same command goes on" in said
    finish(start(tmp_path))
    assert rows(tmp_path) == rows(whole)


EVALUATED = """
from experiments import smoke

def get_config():
    config = smoke.get_config()
    config.phases[1]["stage"] = {"arch": {"vision": {"remat": "block"}}}
    def retrieval(records):
        return {"name": "retrieval", "data": {"name": "synthetic", "records": records}, "every_steps": 10}
    config.evals = {"few": retrieval(40), "many": retrieval(2500)}
    config.checkpoint.best = "few/image_to_text_r1"
    return config
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An experiment with evaluations after steps 10 and 20, and its uninterrupted run."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "experiment.py").write_text(EVALUATED)
    finish(start(folder / "run", config=folder / "experiment.py"))
    return folder


def test_sigterm_while_compiling_evaluating_or_saving_loses_nothing(evaluated, tmp_path):
    def go(**how):
        return start(tmp_path, config=evaluated / "experiment.py", **how)

    compiling = go(cached=False)
    wait_for_line(compiling, "parameters")  # what is printed last before it
    compiling.send_signal(signal.SIGTERM)
    assert "step 0 is saved" in finish(compiling, code=train.PREEMPTED)

    evaluating = go()
    wait_for_line(evaluating, "step 10  few:")
    evaluating.send_signal(signal.SIGTERM)
    assert "step 10 is saved" in finish(evaluating, code=train.PREEMPTED)
    assert (tmp_path / "evals.csv").read_text().count("\n") == 1  # the heading

    saving = go()
    while not list((tmp_path / "checkpoints").glob("15*")):  # begun, or just complete
        assert saving.poll() is None, saving.communicate()
        time.sleep(0.001)
    saving.send_signal(signal.SIGTERM)
    finish(saving, code=train.PREEMPTED)

    assert "best: few/image_to_text_r1" in finish(go())
    assert rows(tmp_path) == rows(evaluated / "run")
    assert (tmp_path / "evals.csv").read_text() == (evaluated / "run" / "evals.csv").read_text()


def test_a_phase_may_change_how_the_step_is_computed_and_its_losses_stay(whole, evaluated):
    np.testing.assert_allclose(
        [float(row["loss"]) for row in rows(evaluated / "run")], [float(row["loss"]) for row in rows(whole)], rtol=1e-5
    )


def test_a_run_goes_on_on_another_mesh_with_the_same_losses(whole, tmp_path):
    process = start(tmp_path, "--config.mesh.data=8", devices=8)
    wait_for_step(tmp_path, 6, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=train.PREEMPTED)
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    finish(start(tmp_path, *flags, devices=8))
    got, want = rows(tmp_path), rows(whole)
    assert [row["batch"] for row in got] == [row["batch"] for row in want]
    # 1e-3: other meshes sum in another order, and LAMB's early steps amplify the last bit of each sum
    np.testing.assert_allclose([float(r["loss"]) for r in got], [float(r["loss"]) for r in want], rtol=1e-3)


def one_of_two(workdir, *flags):
    """Starts one of two processes of a run, of one device each: with more, XLA's collectives abort more often.

    Without the cache, of which process 0 alone would have the use: Gloo gives up on a peer half a minute later.
    """
    return lambda port, number: start(
        workdir,
        f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
        f"--process={number}",
        *flags,
        cached=False,
    )


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("whole_of_two")
    two_processes.finish(one_of_two(workdir, "--profile=17:2"))
    return workdir


def test_two_processes_train_to_the_losses_of_one(whole, whole_of_two):
    got, want = rows(whole_of_two), rows(whole)
    np.testing.assert_allclose([float(r["loss"]) for r in got], [float(r["loss"]) for r in want], rtol=1e-3)


def test_each_of_two_processes_on_one_machine_keeps_its_own_trace(whole_of_two):
    folder = whole_of_two / "profile" / "17"
    traces = [path.name for path in (folder / "plugins" / "profile" / "17").glob("*.xplane.pb")]
    assert sorted(traces) == ["process-0.xplane.pb", "process-1.xplane.pb"]
    assert all("collectives" in (folder / f"process-{i}.txt").read_text() for i in range(2))  # each read its own


def test_a_logged_step_tells_its_seconds_and_what_shares_of_them_went_where(whole):
    with open(whole / "losses.csv", newline="") as file:
        for row in csv.DictReader(file):
            shares = [float(row[name]) for name in SHARES]
            assert min(shares) >= 0 and sum(shares) == pytest.approx(1) and float(row["step_seconds"]) > 0


def test_when_one_of_two_processes_is_killed_both_end_and_the_same_command_goes_on(whole_of_two, tmp_path):
    first, second = two_processes.begin(one_of_two(tmp_path))
    wait_for_step(tmp_path, 7, first)
    while not (tmp_path / "checkpoints" / "5").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    first.communicate(timeout=120)  # it does not wait for a peer that is gone
    assert first.returncode != 0 and int(rows(tmp_path)[-1]["step"]) < 20
    assert "going on from step" in two_processes.finish(one_of_two(tmp_path))[0]
    assert rows(tmp_path) == rows(whole_of_two)


def test_a_workdir_holds_what_is_needed_to_use_and_to_repeat_the_run(whole):
    import pe_jax
    from pe_jax import checkpoint

    assert json.loads((whole / "config.json").read_text())["batch_size"] == 16
    metadata = checkpoint.metadata(whole)
    assert metadata["step"] == 20 and metadata["examples"] == 320
    model = pe_jax.load(str(whole))
    images = model.preprocess(np.zeros((50, 40, 3), np.uint8))
    assert images.shape == (1, 32, 32, 3)
    image, text, scale = model(images, model.tokenize(["a", "b"]))
    assert image.shape == (1, 16) and text.shape == (2, 16) and scale > 1


def test_a_workdir_begun_with_another_config_is_refused_naming_the_fields(whole):
    said = finish(start(whole, "--config.optimizer.learning_rate=0.5"), code=2)
    assert "begun with another config (optimizer.learning_rate: 0.01 → 0.5)" in said


def changed(**changes):
    return smoke.get_config().to_dict() | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(batchsize=3), "no key 'batchsize'; did you mean batch_size"),
        (changed(phases=[]), "phases is empty"),
        (changed(phases=[{"image_size": 20, "examples": 99}]), "not a multiple of the patch size 8"),
        (changed(phases=[{"image_size": 32, "examples": 9}]), "less than one batch of 16"),
        (changed(phases=[{"pixels": 32, "examples": 99}]), "no key 'pixels'"),
        (changed(optimizer={"lr": 1.0}), "optimizer has no key 'lr'"),
        (changed(optimizer={"warmup_examples": 320}), "not below the run's 320 examples"),
        (changed(stage={"name": "contrastiv"}), "unknown; the stages are contrastive"),
        (changed(stage={"name": "contrastive", "arch": "PE-Core-B16"}), "did you mean PE-Core-B16-224"),
        (changed(log_every_steps=0), "must be at least 1"),
        (changed(checkpoint={"every": 2}), "checkpoint has no key 'every'"),
        (
            changed(checkpoint={"best": "zero_shot/top1"}),
            "must name a figure of an evaluator.* the evaluators are none",
        ),
        (changed(max_loss_rise=0), "max_loss_rise=0 must be positive"),
        (changed(phases=[{"image_size": 32, "examples": 99, "stage": {"mask_ratio": 0.5}}]), "training/mask_token"),
        (changed(phases=[{"image_size": 32, "examples": 99, "stage": {"frozen": ("text",)}}]), "changes parameters"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_allocated(config, message):
    with pytest.raises(ValueError, match=message):
        train.parse(config)


def test_a_batch_the_mesh_cannot_cut_is_refused(tmp_path):
    config = changed(batch_size=12)
    with pytest.raises(ValueError, match="batch_size=12, which the 8 ways the mesh cuts a batch do not divide"):
        train.train(config, tmp_path)


def test_the_step_of_the_next_phase_is_compiled_in_the_background_for_its_own_shapes():
    mesh = sharding.make_mesh({"data": 8})
    run = train.parse(smoke.get_config().to_dict())
    state = train.TrainState(jax.device_put(np.float32(2), sharding.replicated(mesh)), {}, (), ())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    begun = threading.Event()

    def update(state, batch):
        begun.set()  # while it is traced
        state = train.TrainState(state.step + batch["text"].sum(), {}, (), ())
        return state, {"pixels": jnp.asarray(batch["image"].size)}

    ahead = train.CompileAhead(
        lambda phase: jax.jit(update).lower(abstract, train.abstract_batch(run, phase, mesh)), mesh
    )
    later = train.Phase(image_size=24, steps=3, batch_size=32, stage=run.stage)
    ahead.start([later])
    assert begun.wait(60)  # nobody has asked for it yet
    batch = {"image": np.ones((32, 24, 24, 3), np.uint8), "text": np.ones((32, 8), np.int32)}
    with jax.set_mesh(mesh):
        state, metrics = ahead.of(later)(state, sharding.global_batch(batch, mesh))
    assert state.step == 2 + 32 * 8 and metrics["pixels"] == 32 * 24 * 24 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "adamw", "learning_rate": 1e30}}, "loss=nan"),
        ({"optimizer": {"name": "adamw", "learning_rate": 0.1}, "max_loss_rise": 1e-6}, r"loss=[\d.]+, up from"),
    ],
)
def test_a_loss_that_is_lost_stops_the_run_names_the_records_and_is_not_saved(changes, message, tmp_path):
    config = changed(phases=[{"image_size": 16, "examples": 160}], **changes)
    config["checkpoint"], config["log_every_steps"] = {"every_steps": 100}, 2
    with pytest.raises(FloatingPointError, match=rf"{message}.* by step \d+; the record numbers .*stopped-0.json"):
        train.train(config, tmp_path)
    records = json.loads((tmp_path / "stopped-0.json").read_text())
    assert len(records) == 2 and {len(numbers) for numbers in records.values()} == {16}
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_an_unknown_flag_or_field_is_one_line_with_an_example(tmp_path, capsys):
    assert train.main(["--config=experiments/smoke.py", f"--workdir={tmp_path}", "--config.batch_sise=4"]) == 2
    said = capsys.readouterr().err
    assert "batch_sise" in said and "python -m pe_jax.train --config=" in said


def test_examples_are_counted_over_phases_of_other_batch_sizes():
    phases = [{"image_size": 16, "examples": 64, "batch_size": 32}, {"image_size": 32, "examples": 48}]
    run = train.parse(changed(phases=phases))
    assert run.steps == 5
    assert [run.examples(step) for step in range(7)] == [0, 32, 64, 80, 96, 112, 112]


def test_options_of_the_compiler_are_added_and_taken_away_by_the_config():
    class V5e:
        platform, device_kind = "tpu", "TPU v5 lite"

    own = train.compiler_options(V5e)
    assert own and own["xla_tpu_scoped_vmem_limit_kib"] == 32_768
    changed = train.compiler_options(V5e, {"xla_tpu_scoped_vmem_limit_kib": None, "xla_other": 3})
    assert changed == {name: value for name, value in own.items() if "vmem" not in name} | {"xla_other": 3}
    assert train.compiler_options(jax.devices()[0]) is None


def test_an_option_that_the_compiler_does_not_know_is_refused_by_name():
    run = train.parse(smoke.get_config().to_dict() | {"compiler_options": {"xla_no_such_option": True}})
    tx, _ = train.optimizer_of(run)
    mesh = sharding.make_mesh({"data": 8})
    abstract = train.abstract_state(run.stage, tx, mesh)
    rows = train.abstract_batch(run, run.phases[-1], mesh)
    with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        train.make_train_step(run.stage, tx, abstract, run.compiler_options).lower(abstract, rows).compile()

"""Traces: whole steps and no others, what the summary makes of each device's trace, and faults that stop no run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from experiments import smoke
from pe_jax import profiling, sharding, train
from pe_jax.profiling import Window


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("100", r"--profile=100 is not FIRST:COUNT.* --profile=100:5 traces steps 100 to 104"),
        ("0:5", "is not FIRST:COUNT"),
        ("5:0", "is not FIRST:COUNT"),
        ("5:2;9:1", "is not FIRST:COUNT"),
        ("18:4", "the run has 20 steps, so there is no step 21"),
        ("10:4", "a phase ends after step 12, in the midst of steps 10 to 13"),
        ("5:3,7:2", "steps 5 to 7 and steps 7 to 8 overlap"),
    ],
)
def test_wrong_steps_to_trace_are_refused_before_anything_is_allocated(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.train(smoke.get_config().to_dict(), tmp_path / "run", profile=given)
    assert not (tmp_path / "run").exists()


def test_windows_come_in_order_and_may_end_with_their_phase():
    assert profiling.parse("13:8,10:3,1:1", [12, 8]) == (Window(1, 1), Window(10, 3), Window(13, 8))
    assert profiling.parse("", [12, 8]) == ()


@pytest.fixture(scope="module")
def update():
    """A step that takes far longer than its dispatch, with a part named as the model's are."""

    def step(x):
        with jax.named_scope("vision"):
            return jax.lax.fori_loop(0, 30, lambda _, x: jnp.tanh(x @ x) / 1e3, x)

    return jax.jit(step).lower(jnp.ones((500, 500))).compile()


def run(tracer, update, steps):
    """The loop as `train` has it: nothing in it waits for a step."""
    x = jnp.ones((500, 500))
    for step in steps:
        tracer.begin(step, x)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            x = update(x)
        tracer.end(step, x, update)
    tracer.close()


def annotated(path):
    """The numbers of the steps a trace is annotated with."""
    found = (
        event for plane in ProfileData.from_file(str(path)).planes for line in plane.lines for event in line.events
    )
    return sorted(int(dict(event.stats)["step_num"]) for event in found if event.name == "train")


def test_a_trace_holds_all_of_the_asked_steps_and_nothing_of_others(update, tmp_path):
    said = []
    tracer = profiling.Tracer([Window(3, 2), Window(7, 1)], tmp_path, said.append, done=0)
    run(tracer, update, range(1, 10))
    for window in (Window(3, 2), Window(7, 1)):
        folder = tmp_path / str(window.first)
        traces = folder / "plugins" / "profile" / str(window.first)
        assert sorted(path.name for path in traces.iterdir()) == ["process-0.trace.json.gz", "process-0.xplane.pb"]
        assert annotated(traces / "process-0.xplane.pb") == list(range(window.first, window.last + 1))
        text = (folder / "process-0.txt").read_text()
        assert text.startswith(f"{window}, process 0\n/host:CPU: ")
        dots = next(line for line in text.splitlines() if "dot_general" in line)
        assert dots.split("%")[1].startswith("  30 x ")  # a step's products, all of them: 30 a step on one device
        assert not list(folder.glob(".process*"))
    assert [line.partition(":")[0] for line in said] == ["steps 3 to 4 traced", "step 7 traced"]


def test_a_window_that_has_begun_before_the_run_goes_on_is_left_out(update, tmp_path):
    said = []
    run(profiling.Tracer([Window(2, 4), Window(6, 1)], tmp_path, said.append, done=3), update, range(4, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["6"]
    assert said[0] == "not traced: steps 2 to 5, for the run goes on after step 3"


def test_a_run_that_ends_within_a_window_leaves_no_half_trace(update, tmp_path):
    said = []
    run(profiling.Tracer([Window(2, 4)], tmp_path, said.append, done=0), update, range(1, 4))
    assert said == ["not traced: steps 2 to 5, for the run ends before"]
    assert not list(tmp_path.rglob("*.pb"))


def test_a_profiler_that_is_taken_is_told_and_the_steps_go_on(update, tmp_path):
    said = []
    with jax.profiler.trace(str(tmp_path / "somebody_else")):
        run(profiling.Tracer([Window(2, 1)], tmp_path / "ours", said.append, done=0), update, range(1, 4))
    assert len(said) == 1 and said[0].startswith("not traced: step 2: ")
    assert annotated(next((tmp_path / "somebody_else").rglob("*.pb"))) == [1, 2, 3]


def plane(name, **lines):
    """A plane of an XSpace; each line has events (HLO or kernel name, start in µs, length in µs, hlo_op or None)."""
    names = {event[0]: i for i, event in enumerate((e for events in lines.values() for e in events), 1)}
    body = ""
    for title, events in lines.items():
        rows = "".join(
            f"events {{ metadata_id: {names[event]} offset_ps: {start * 10**6} duration_ps: {length * 10**6} "
            + (f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else "")
            + "}"
            for event, start, length, op in events
        )
        body += f'lines {{ name: "{title.replace("_", " ")}" {rows} }}'
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for n, i in names.items())
    return f'planes {{ name: "{name}" {body} {metadata} stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }} }}'


PROGRAM = """
  %fusion.1 = f32[2]{0} fusion(%p), metadata={op_name="jit(train_step)/jvp(vision)/add"}
  %fusion.2 = f32[2]{0} fusion(%p), metadata={op_name="jit(train_step)/transpose(jvp(jit(t)))/text/mul"}
  %copy.3 = f32[2]{0} copy(%p)
  %all-gather-done = f32[2]{0} all-gather-done(%s), metadata={op_name="jit(train_step)/jvp(vision)/add"}
  ROOT %fusion.4 = f32[2]{0} fusion(%p), metadata={op_name="a/vision/checkpoint/rematted_computation/add"}
"""
RAN = [("fusion.1", 0, 2000), ("fusion.2", 2000, 3000), ("copy.3", 6000, 1000), ("all-gather-done", 7000, 1000),
       ("fusion.4", 8000, 2000)]  # fmt: skip


@pytest.mark.parametrize("device", ["TPU", "GPU"])
def test_the_summary_of_an_accelerator_adds_up_by_part_of_the_model(device):
    """The planes of real chips: a TPU calls events by whole HLO text, a GPU by kernel, with the HLO name beside."""
    if device == "TPU":
        ops = [(f"%{name} = f32[2] {name}(%p)", start, length, None) for name, start, length in RAN]
        lines = {"XLA_Modules": [("jit_train_step(1)", 0, 10000, None)], "Steps": [("3", 0, 10000, None)],
                 "XLA_Ops": [("%while.9 = (f32[2]) while(%t)", 0, 5000, None), *ops]}  # fmt: skip
    else:
        ops = [(f"kernel_{name}", start, length, name) for name, start, length in RAN]
        lines = {"Stream_#13(Compute)": ops[:3], "Stream_#14(Compute)": ops[3:], "XLA_Ops": ops}
    other = plane(f"/device:{device}:1", **lines)
    host = plane("/host:CPU", python=[("train", 0, 9, None)])
    trace = ProfileData.from_text_proto(other + plane(f"/device:{device}:0", **lines) + host)
    head, _, _, *rows = profiling.summary(trace, PROGRAM, Window(3, 2)).splitlines()
    assert head == f"/device:{device}:0: 5.000 ms a step, busy 90.0% of it"
    assert [row.split(maxsplit=2) for row in rows[:5]] == [
        ["1.500", "33.3%", "text, backward"],
        ["1.000", "22.2%", "vision"],
        ["1.000", "22.2%", "vision, forward again for the backward pass"],
        ["0.500", "11.1%", "other"],
        ["0.500", "11.1%", "collectives"],
    ]
    assert rows[7].split() == ["1.500", "33.3%", "0.5", "x", "fusion.2", "transpose(jvp(jit(t)))/text/mul"]


def test_a_summary_without_the_program_or_without_a_device_says_what_it_can():
    trace = ProfileData.from_text_proto(plane("/device:TPU:0", XLA_Ops=[("%fusion.1 = f32[]", 0, 1000, None)]))
    assert "100.0%  1 x fusion.1\n" in profiling.summary(trace, "", Window(1, 1))
    trace = ProfileData.from_text_proto(plane("/host:CPU", python=[("train", 0, 9, None)]))
    assert profiling.summary(trace, "", Window(1, 1)) == "the trace holds no operations of a device.\n"


def test_the_parts_the_summary_adds_up_are_named_in_the_step():
    config = smoke.get_config().to_dict()
    config["stage"] |= {"mask_ratio": 0.5, "mask_every": 4}
    job = train.parse(config)
    mesh = sharding.make_mesh(job.mesh)
    tx, _ = train.optimizer_of(job)
    state = train.abstract_state(job.stage, tx, mesh)
    with jax.set_mesh(mesh):
        batch = sharding.global_batch(
            {"image": np.zeros((32, 16, 16, 3), np.uint8), "text": np.zeros((32, 8), np.int32)}, mesh
        )
        program = train.make_train_step(job.stage, tx, state).lower(state, batch).as_text(debug_info=True)
    for scope in profiling.SCOPES:
        assert re.search(rf'["/(]{scope}[/)]', program), scope

"""The training loop, the only one: config → mesh → stage → state → phases → steps → evaluations and saves.

  python -m pe_jax.train --config=experiments/digits.py --workdir=runs/digits --config.seed=1

A stage says what one update minimises (`pe_jax.stages`); the loop never asks which it runs. The same command given
again goes on from the newest checkpoint: the place in the data is one integer, the number of examples consumed, and
the randomness of a step is folded from its number, so a resumed run repeats the batches and losses it would have had,
on any mesh and any number of processes. SIGTERM saves and ends with exit code 75 ("try again").

In WORKDIR: config.json, losses.csv, evals.csv, tensorboard/, checkpoints/.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from pe_jax import checkpoint, metrics, optim, sharding, stages
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.types import Batch, Metrics, Params, split

PREEMPTED = 75  # exit code after SIGTERM: EX_TEMPFAIL, the state is saved and the same command goes on
# What may change between a run and its resumption without changing what it computes.
HARMLESS = ("evals", "log_every_steps", "checkpoint", "mesh", "data.threads")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step: arrays, or in the same places their shapes or shardings."""

    step: Any  # [] int32, updates done
    params: Params
    opt_state: Any
    key: Any  # of the run; each step folds its number in


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run at one resolution."""

    image_size: int
    steps: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config."""

    seed: int
    stage: stages.Stage
    phases: tuple[Phase, ...]
    optimizer: optim.Config
    mesh: dict[str, int]
    data: dict[str, Any]
    evals: dict[str, dict[str, Any]]
    save_every: int
    keep: int
    log_every: int

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def image_size(self) -> int:
        """Of the last phase, at which the model is to be used."""
        return self.phases[-1].image_size

    def examples(self, step: int) -> int:
        """Global examples consumed by the first `step` updates."""
        total = 0
        for phase in self.phases:
            total += min(step, phase.steps) * phase.batch_size
            step -= min(step, phase.steps)
        return total


def parse(config: Mapping[str, Any]) -> Run:
    """Checks a config as an experiment returns it (plain dicts), before anything is allocated.

    Raises:
      ValueError: for an unknown or missing key anywhere, naming its nearest neighbour, or values that do not fit.
    """
    known = {
        "seed": 0, "stage": None, "batch_size": None, "phases": None, "optimizer": {}, "mesh": {"data": -1},
        "data": None, "evals": {}, "checkpoint": {}, "log_every_steps": 10,
    }  # fmt: skip
    _strict(config, known, "config")
    for name in ("stage", "batch_size", "phases", "data"):
        if name not in config:
            raise ValueError(f"config lacks {name!r}.")
    config = known | dict(config)
    stage = stages.create(config["stage"])
    vision = stage.arch.vision if isinstance(stage.arch, CLIPConfig) else stage.arch
    phases = []
    for i, phase in enumerate(config["phases"]):
        _strict(phase, ("image_size", "examples", "batch_size"), f"phases[{i}]")
        size, batch_size = phase["image_size"], phase.get("batch_size", config["batch_size"])
        if size % vision.patch_size:
            raise ValueError(f"phases[{i}].image_size={size} is not a multiple of the patch size {vision.patch_size}.")
        if batch_size < 1 or phase["examples"] < batch_size:
            raise ValueError(
                f"phases[{i}] has {phase['examples']} examples, less than one batch of {batch_size}; raise examples."
            )
        phases.append(Phase(size, phase["examples"] // batch_size, batch_size))
    if not phases:
        raise ValueError("phases is empty; give at least one of {'image_size': pixels, 'examples': how many}.")
    _strict(config["optimizer"], [field.name for field in dataclasses.fields(optim.Config)], "optimizer")
    _strict(config["checkpoint"], ("every_steps", "keep"), "checkpoint")
    optimizer = optim.Config(**config["optimizer"])
    optim.learning_rate(optimizer, [(phase.steps, phase.batch_size) for phase in phases])
    for name, evaluator in config["evals"].items():
        if evaluator.get("every_steps", 1) < 1:
            raise ValueError(f"evals.{name}.every_steps={evaluator['every_steps']} must be at least 1.")
    if config["log_every_steps"] < 1:
        raise ValueError(f"log_every_steps={config['log_every_steps']} must be at least 1.")
    return Run(
        seed=config["seed"],
        stage=stage,
        phases=tuple(phases),
        optimizer=optimizer,
        mesh=dict(config["mesh"]),
        data=config["data"],
        evals=config["evals"],
        save_every=config["checkpoint"].get("every_steps", 1000),
        keep=config["checkpoint"].get("keep", 2),
        log_every=config["log_every_steps"],
    )


def _strict(given: Mapping[str, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1, 0.3) or list(known)
            raise ValueError(f"{where} has no key {name!r}; did you mean {' or '.join(near)}?")


def optimizer_of(run: Run) -> tuple[optax.GradientTransformation, optim.Schedule]:
    """The optimizer, and its learning rate by step."""
    rate = optim.learning_rate(run.optimizer, [(phase.steps, phase.batch_size) for phase in run.phases])
    return optim.create(run.optimizer, rate, run.stage.trainable), rate


def abstract_state(stage: stages.Stage, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """The train state as shapes with their shardings on `mesh`: parameters and both moments are cut alike."""
    model = nnx.eval_shape(lambda: stage.build(nnx.Rngs(0)))
    shardings, whole = sharding.param_shardings(model, mesh), sharding.replicated(mesh)
    state = jax.eval_shape(lambda: _fresh(stage, tx, 0))
    moments = optim.state_shardings(state.opt_state, shardings, whole)
    placed = dataclasses.replace(state, step=whole, params=shardings, opt_state=moments, key=whole)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, placed)


def _fresh(stage: stages.Stage, tx: optax.GradientTransformation, seed: int) -> TrainState:
    _, params = split(stage.build(nnx.Rngs(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(seed))


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def make_train_step(
    stage: stages.Stage, tx: optax.GradientTransformation, abstract: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The one jitted update. It is pure, and `abstract` may lie on a topology that is not held, to compile for it."""
    graphdef, _ = split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
    shardings = _shardings(abstract)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)  # a resumed run replays the same randomness
        grads, scalars = stage.gradients(nnx.merge(graphdef, state.params), batch, key)
        # Without this XLA leaves gradients whole on every device of the fsdp axis.
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = stage.project(cast(Params, optax.apply_updates(state.params, updates)))
        return TrainState(state.step + 1, params, opt_state, state.key), scalars | {"grad_norm": optax.tree.norm(grads)}

    whole = shardings.step
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole))


def train(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> int:
    """Runs an experiment to its end, or goes on with it.

    Args:
      config: as an experiment's `get_config` returns it, in plain dicts.
      workdir: where all that the run writes goes.

    Returns:
      0 when the run is complete, `PREEMPTED` when SIGTERM stopped it with its state saved.

    Raises:
      ValueError: if the config or the data are wrong, or differ from those the workdir was begun with.
      FloatingPointError: if the loss is not finite; the record numbers of the batches are in nonfinite.json.
    """
    run = parse(config)
    with checkpoint.only_writer(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _train(run, config, pathlib.Path(workdir))


def _train(run: Run, config: Mapping[str, Any], workdir: pathlib.Path) -> int:
    from pe_jax import evals  # here, so that the step can be built where Grain and Pillow are not installed
    from pe_jax.data import pipeline
    from pe_jax.data.image import Preprocess

    evaluators = {name: evals.create(evaluator) for name, evaluator in run.evals.items()}
    mesh = sharding.make_mesh(run.mesh)
    for i, phase in enumerate(run.phases):
        if phase.batch_size % sharding.batch_ways(mesh):
            raise ValueError(
                f"phases[{i}] has batch_size={phase.batch_size}, which the {sharding.batch_ways(mesh)} ways the mesh "
                "cuts a batch do not divide; change batch_size or mesh."
            )
    tx, rate = optimizer_of(run)
    abstract = abstract_state(run.stage, tx, mesh)
    graphdef, _ = split(nnx.eval_shape(lambda: run.stage.build(nnx.Rngs(0))))
    plain = json.loads(json.dumps(dict(config)))
    record = {
        "architecture": zoo.to_dict(run.stage.arch),
        "preprocess": Preprocess(run.image_size).to_dict(),
        "config": plain,
    }
    ahead, stop = CompileAhead(make_train_step(run.stage, tx, abstract), abstract, mesh), StopSignal()
    begun, last = time.perf_counter(), 0
    with checkpoint.Checkpointer(workdir / checkpoint.STEPS, every_steps=run.save_every, keep=run.keep) as saver:
        resumed = saver.latest
        _hold_to_config(workdir / "config.json", plain, resumed is not None)
        with jax.set_mesh(mesh):
            if resumed is None:
                init = jax.jit(lambda: _fresh(run.stage, tx, run.seed), out_shardings=_shardings(abstract))
                state = init()
            else:
                state, _ = saver.restore(abstract)
        step = int(state.step)
        writer, progress = metrics.writer(workdir, resumed), metrics.Progress(run.steps, start=step)
        progress.note(
            f"{workdir}: {zoo.count(state.params):,} parameters, {run.steps:,} steps, "
            f"{run.examples(run.steps):,} examples, mesh {dict(mesh.shape)}"
            + ("" if resumed is None else f"; going on from step {step}")
        )
        try:
            for number, phase in enumerate(run.phases):
                last += phase.steps
                if step >= last:
                    continue
                # a backward pass costs two forward ones; recomputation is not the model's
                flops = 3 * zoo.forward_flops(run.stage.arch, phase.image_size) * phase.batch_size
                speed, recent = metrics.Speed(metrics.peak_flops()), []
                loader = pipeline.create(
                    run.data,
                    batch_size=phase.batch_size,
                    image_size=phase.image_size,
                    context_length=run.stage.arch.text.context_length,
                    seed=run.seed,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    start=run.examples(step),
                )
                with loader:
                    compiled = None
                    while step < last:
                        asked = time.perf_counter()
                        local = next(loader)
                        waited = time.perf_counter() - asked
                        recent.append((step + 1, local.pop("index")))
                        batch = sharding.global_batch(local, mesh)
                        if compiled is None:
                            compiled = ahead.of(phase, batch)
                            ahead.start(run.phases[number + 1 : number + 2], batch)
                            speed.reset()  # compilation is not the step's time
                        with jax.set_mesh(mesh):
                            state, scalars = compiled(state, batch)
                        step += 1
                        speed.count(phase.batch_size, flops, waited)
                        if step % run.log_every == 0 or step == run.steps:
                            row = dict(jax.device_get(scalars))
                            _check_finite(step, row, recent, workdir)
                            bad = sum(loader.bad.values())
                            row |= {
                                "learning_rate": np.asarray(rate(step - 1)),
                                "examples": run.examples(step),
                                "image_size": phase.image_size,
                                "batch": zlib.crc32(recent[-1][1].tobytes()),  # whether two runs saw the same records
                                "bad_records": bad,
                            }
                            figures = speed.read()
                            writer.write_scalars(step, row | figures)
                            notes = [f"{bad} bad records"] if bad else []
                            progress.update(step, float(row["loss"]), figures["examples_per_second"], notes)
                            recent.clear()
                        due = [
                            name
                            for name in evaluators
                            if step == run.steps or step % run.evals[name].get("every_steps", run.steps) == 0
                        ]
                        for name in due:
                            figures = evaluators[name](nnx.merge(graphdef, state.params))
                            writer.write_scalars(step, {f"{name}/{key}": value for key, value in figures.items()})
                            progress.note(f"step {step}  {name}: {_line(figures)}")
                        stopping = stop.agreed(step)
                        if saver.due(step) or step == run.steps or stopping:
                            _check_finite(
                                step, jax.device_get(scalars), recent, workdir
                            )  # never save a state that is lost
                            saver.save(step, state, record | {"step": step, "examples": run.examples(step)})
                        if stopping and step < run.steps:
                            saver.wait()
                            progress.note(f"SIGTERM: step {step} is saved; the same command goes on from there")
                            return PREEMPTED
                        if due or saver.due(step):
                            speed.reset()  # nor is evaluating and saving
        finally:
            writer.close()
            progress.close()
    print(f"done: {run.steps:,} steps in {time.perf_counter() - begun:.0f} s; checkpoints in {saver.directory}")
    return 0


def _line(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _check_finite(
    step: int, row: Mapping[str, Any], recent: Sequence[tuple[int, np.ndarray]], workdir: pathlib.Path
) -> None:
    if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]):
        return
    path = workdir / f"nonfinite-{jax.process_index()}.json"
    path.write_text(json.dumps({str(step): index.tolist() for step, index in recent}))
    raise FloatingPointError(
        f"loss={row['loss']} and grad_norm={row['grad_norm']} by step {step}; the record numbers of the "
        f"batches since the last finite loss are in {path}. Lower the learning rate, or look at those records."
    )


def _hold_to_config(path: pathlib.Path, config: Mapping[str, Any], resuming: bool) -> None:
    """Writes config.json; a run that goes on must have the config it was begun with, but for `HARMLESS` fields."""
    if resuming and path.exists():
        before, now = _leaves(json.loads(path.read_text())), _leaves(config)
        changed = sorted(
            name
            for name in before.keys() | now.keys()
            if before.get(name) != now.get(name) and not any((name + ".").startswith(free + ".") for free in HARMLESS)
        )
        if changed:
            told = "; ".join(f"{name}: {before.get(name)} → {now.get(name)}" for name in changed[:8])
            raise ValueError(
                f"{path.parent} was begun with another config ({told}); resuming would change the run. "
                "Give the old values, or a new --workdir."
            )
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(config, indent=2))
        partial.replace(path)


def _leaves(tree: Any, name: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {name.lstrip("."): tree}
    return {path: leaf for key, value in items for path, leaf in _leaves(value, f"{name}.{key}").items()}


class CompileAhead:
    """The update compiled for each phase's shapes: the next phase's in the background, while this one trains."""

    def __init__(self, update: Any, abstract: TrainState, mesh: jax.sharding.Mesh):
        self._update, self._abstract, self._mesh = update, abstract, mesh
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._found: dict[Phase, concurrent.futures.Future[Any]] = {}

    def start(self, phases: Sequence[Phase], batch: Batch) -> None:
        """Begins to compile for each of `phases`, whose batches are like `batch` but for their size and pixels."""
        for phase in phases:
            if phase not in self._found:
                self._found[phase] = self._pool.submit(self._compile, batch_like(batch, phase))

    def of(self, phase: Phase, batch: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The update compiled for `phase`, when it is ready."""
        self.start([phase], batch)
        return self._found.pop(phase).result()

    def _compile(self, batch: Mapping[str, Any]) -> Any:
        with jax.set_mesh(self._mesh):  # a thread has a mesh of its own
            return self._update.lower(self._abstract, batch).compile()


def batch_like(batch: Batch, phase: Phase) -> dict[str, Any]:
    """The shapes of `phase`'s batches, given an array of each field in whatever size."""

    def one(name: str, x: Any) -> jax.ShapeDtypeStruct:
        shape = [phase.batch_size, *x.shape[1:]]
        if name in ("image", "video"):
            shape[-3:-1] = phase.image_size, phase.image_size
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return {name: one(name, x) for name, x in batch.items()}


class StopSignal:
    """Whether SIGTERM has come, agreed on by all processes. Its handler is set for the life of the process."""

    def __init__(self) -> None:
        self._here = False
        # jax.distributed has a handler of its own, by which processes agree on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._here = True

    def agreed(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._here
        return multihost_utils.reached_preemption_sync_point(step)


def main(argv: Sequence[str]) -> int:
    """`python -m pe_jax.train`, and `pe-jax train`.

    On a TPU pod give `--distributed` and run the same command on every host; elsewhere say who is who with
    `--coordinator=HOST:PORT --processes=N --process=I`.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "experiments/X.py[:args]; change fields by --config.a.b=v", flag_values=values
    )
    workdir = flags.DEFINE_string("workdir", None, "where the run writes", flag_values=values)
    pod = flags.DEFINE_bool("distributed", False, "this is one host of a pod", flag_values=values)
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    processes = flags.DEFINE_integer("processes", None, "how many processes there are", flag_values=values)
    process = flags.DEFINE_integer("process", None, "which of them this is", flag_values=values)
    try:
        rest = values(["pe_jax.train", *argv])[1:]
        if rest:
            raise flags.Error(f"unknown arguments {' '.join(rest)}")
        if config.value is None or workdir.value is None:
            raise flags.Error("--config and --workdir are needed")
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections raises these for a missing file, an unknown field and a value of the wrong type.
        told = error.args[0] if isinstance(error, KeyError) else error  # a KeyError prints its message quoted
        print(f"pe_jax.train: {told}\nExample:\n  {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr)
        return 2
    if pod.value or coordinator.value:  # before anything asks for devices
        jax.distributed.initialize(coordinator.value, processes.value, process.value)
    try:
        return train(config.value.to_dict(), workdir.value)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("PE_JAX_TRACEBACK"):
            raise
        print(f"pe_jax.train: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

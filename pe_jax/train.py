"""The training loop, the only one: config → mesh → stage → state → phases → steps → evaluations and saves.

  python -m pe_jax.train --config=experiments/digits.py --workdir=runs/digits --config.seed=1

A stage says what one update minimises (`pe_jax.stages`); the loop never asks which it runs. The same command given
again goes on from the newest checkpoint: the place in the data is one integer, the number of examples consumed, and
the randomness of a step is folded from its number, so a resumed run repeats the batches and losses it would have had,
on any mesh and any number of processes. SIGTERM saves and ends with exit code 75 ("try again"), at once even where a
step is being compiled or an evaluation runs; the evaluation then comes first when the run goes on.

`--profile=100:5` traces steps 100 to 104 (docs/profiling.md).

In WORKDIR, local or gs://: config.json, losses.csv, evals.csv, tensorboard/, checkpoints/, profile/.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import json
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from pe_jax import checkpoint, metrics, optim, paths, profiling, sharding, stages
from pe_jax.models import zoo
from pe_jax.types import Batch, Metrics, Params, split

PREEMPTED = 75  # exit code after SIGTERM: EX_TEMPFAIL, the state is saved and the same command goes on
# What may change between a run and its resumption without changing what it computes.
HARMLESS = ("evals", "log_every_steps", "checkpoint", "mesh", "data.threads", "max_loss_rise", "compiler_options")

# What the TPU compiler is told; what it is worth stands in tpu/README.md.
_TPU_OPTIONS: dict[str, Any] = {
    # Gather a layer's weights and multiply once, not shard by shard as they arrive: its shards are narrow.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    # Both products of an MLP in one fusion take longer than one after the other.
    "xla_tpu_dot_dot_fusion": False,
}
_TPU_OPTIONS_OF_KIND: dict[str, dict[str, Any]] = {
    # Of a core's own memory, what a matrix product may take: by default too little for whole tiles of its operands.
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": 32_768},
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": 32_768},
    # Weights are gathered while the layer before is multiplied; the others do so by themselves.
    "TPU v6 lite": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}


def compiler_options(device: Any, changes: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What XLA is told for programs on devices like this one, with a config's changes; None takes an option away."""
    own = _TPU_OPTIONS | _TPU_OPTIONS_OF_KIND.get(device.device_kind, {}) if device.platform == "tpu" else {}
    return {name: value for name, value in (own | dict(changes or {})).items() if value is not None} or None


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
    """A stretch of the run at one resolution, with its own batch size and its own way to compute the step."""

    image_size: int
    steps: int
    batch_size: int
    stage: stages.Stage


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config."""

    seed: int
    stage: stages.Stage
    init: dict[str, str]  # which of the stage's parts start from which weights
    phases: tuple[Phase, ...]
    optimizer: optim.Config
    mesh: dict[str, int]
    data: dict[str, Any]
    evals: dict[str, dict[str, Any]]
    save_every: int
    keep: int
    best: str | None
    max_loss_rise: float
    log_every: int
    compiler_options: dict[str, Any]  # of XLA, over those of `compiler_options`; None takes one away

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
        "seed": 0, "stage": None, "init": {}, "batch_size": None, "phases": None, "optimizer": {}, "mesh": {"data": -1},
        "data": None, "evals": {}, "checkpoint": {}, "log_every_steps": 10, "max_loss_rise": None,
        "compiler_options": {},
    }  # fmt: skip
    _strict(config, known, "config")
    for name in ("stage", "batch_size", "phases", "data"):
        if name not in config:
            raise ValueError(f"config lacks {name!r}.")
    config = known | dict(config)
    stage = stages.create(config["stage"])
    _strict(config["init"], list(stage.parts), "init")
    patch_size = getattr(stage.arch, "vision", stage.arch).patch_size
    phases = []
    for i, phase in enumerate(config["phases"]):
        _strict(phase, ("image_size", "examples", "batch_size", "stage"), f"phases[{i}]")
        size, batch_size = phase["image_size"], phase.get("batch_size", config["batch_size"])
        if size % patch_size:
            raise ValueError(f"phases[{i}].image_size={size} is not a multiple of the patch size {patch_size}.")
        if batch_size < 1 or phase["examples"] < batch_size:
            raise ValueError(
                f"phases[{i}] has {phase['examples']} examples, less than one batch of {batch_size}; raise examples."
            )
        own = _stage_of_phase(config["stage"], phase["stage"], stage, f"phases[{i}]") if "stage" in phase else stage
        phases.append(Phase(size, phase["examples"] // batch_size, batch_size, own))
    if not phases:
        raise ValueError("phases is empty; give at least one of {'image_size': pixels, 'examples': how many}.")
    _strict(config["optimizer"], [field.name for field in dataclasses.fields(optim.Config)], "optimizer")
    _strict(config["checkpoint"], ("every_steps", "keep", "best"), "checkpoint")
    best = config["checkpoint"].get("best")
    if best is not None and (best.partition("/")[0] not in config["evals"] or "/" not in best):
        raise ValueError(
            f"checkpoint.best={best!r} must name a figure of an evaluator, EVALUATOR/FIGURE; the evaluators are "
            f"{', '.join(config['evals']) or 'none'}."
        )
    if config["max_loss_rise"] is not None and not config["max_loss_rise"] > 0:
        raise ValueError(f"max_loss_rise={config['max_loss_rise']} must be positive, or None to allow any.")
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
        init=dict(config["init"]),
        phases=tuple(phases),
        optimizer=optimizer,
        mesh=dict(config["mesh"]),
        data=config["data"],
        evals=config["evals"],
        save_every=config["checkpoint"].get("every_steps", 1000),
        keep=config["checkpoint"].get("keep", 2),
        best=best,
        max_loss_rise=float("inf") if config["max_loss_rise"] is None else config["max_loss_rise"],
        log_every=config["log_every_steps"],
        compiler_options=dict(config["compiler_options"]),
    )


def _stage_of_phase(config: Any, changes: Mapping[str, Any], whole: stages.Stage, where: str) -> stages.Stage:
    """The stage with a phase's changes, which may say how the step is computed, not what the model is."""
    stage = stages.create(_merged(config, changes))
    before, after = _parameters(whole), _parameters(stage)
    if differing := sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)):
        raise ValueError(
            f"{where}.stage changes parameters ({', '.join(differing[:3])}), which go on from phase to phase; it may "
            "change how they are computed with, such as remat or microbatches."
        )
    return stage


def _parameters(stage: stages.Stage) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each parameter by its path, and whether it is trained."""
    _, params = split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
    paths = (("/".join(optim.path_of(keys)), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(params))
    return {path: (leaf.shape, stage.trainable(path)) for path, leaf in paths}


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(base, str):
        base = {"base": base}  # a released architecture by its name
    return {**(base or {}), **{key: _merged((base or {}).get(key), value) for key, value in changes.items()}}


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


def _fresh(
    stage: stages.Stage,
    tx: optax.GradientTransformation,
    seed: int,
    loaded: Mapping[str, tuple[Any, Params]] | None = None,
) -> TrainState:
    _, params = split(stage.build(nnx.Rngs(seed)))
    if loaded:
        params = stage.start(params, loaded)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(seed))


def first_state(
    run: Run, tx: optax.GradientTransformation, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state a run begins with: fresh, with the weights that its config starts from.

    Raises:
      ValueError: if given weights cannot be read, or do not fit.
      FileNotFoundError: if they are nowhere.
    """
    if not run.init:
        return jax.jit(lambda: _fresh(run.stage, tx, run.seed), out_shardings=_shardings(abstract))()
    from pe_jax import initial  # here, as in `batch_spec`

    found = {part: initial.read(source, run.stage.parts[part], mesh) for part, source in run.init.items()}
    configs = {part: config for part, (config, _) in found.items()}
    loaded = {part: params for part, (_, params) in found.items()}

    def begin(loaded: dict[str, Params]) -> TrainState:
        return _fresh(run.stage, tx, run.seed, {part: (configs[part], loaded[part]) for part in loaded})

    # Given away, so that they are not held twice; some are cut or resized, which JAX warns of.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.jit(begin, donate_argnums=0, out_shardings=_shardings(abstract))(loaded)


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def batch_spec(run: Run, phase: Phase) -> dict[str, Any]:
    """Shape and dtype of each field of the global batches that the updates of a phase take."""
    from pe_jax import data  # here, so that the step can be built where Grain and Pillow are not installed

    kind, shape = phase.stage.inputs
    specs = data.batch_spec(kind, run.data, batch_size=phase.batch_size, image_size=phase.image_size, **shape)
    return {name: spec for name, spec in specs.items() if name != "index"}  # which stays on the host


def abstract_batch(run: Run, phase: Phase, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batches of a phase as shapes with their shardings on `mesh`."""
    rows = sharding.batch_sharding(mesh)
    specs = batch_spec(run, phase)
    return {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=rows) for name, spec in specs.items()}


def make_train_step(
    stage: stages.Stage,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    changes: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The one jitted update. It is pure, and `abstract` may lie on a topology that is not held, to compile for it.

    `changes` go over `compiler_options`.
    """
    graphdef, _ = split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
    shardings = _shardings(abstract)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)  # a resumed run replays the same randomness
        grads, scalars = stage.gradients(nnx.merge(graphdef, state.params), batch, key)
        # Without this XLA leaves gradients whole on every device of the fsdp axis.
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = stage.project(cast(Params, optax.apply_updates(state.params, updates)))
            norm = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state, state.key), scalars | {"grad_norm": norm}

    whole = shardings.step
    options = compiler_options(next(iter(whole.device_set)), changes)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=options)


def train(config: Mapping[str, Any], workdir: str | os.PathLike[str], *, profile: str = "") -> int:
    """Runs an experiment to its end, or goes on with it.

    Args:
      config: as an experiment's `get_config` returns it, in plain dicts.
      workdir: where all that the run writes goes, local or gs://.
      profile: steps to trace, "FIRST:COUNT,FIRST:COUNT"; it changes nothing of what the run computes.

    Returns:
      0 when the run is complete, `PREEMPTED` when SIGTERM stopped it with its state saved.

    Raises:
      ValueError: if the config, `profile` or the data are wrong, or differ from those the workdir was begun with.
      FloatingPointError: if the loss is not finite, or has risen by more than the config's `max_loss_rise` over its
        lowest; the record numbers of the batches are in stopped-PROCESS.json.
    """
    run = parse(config)
    windows = profiling.parse(profile, [phase.steps for phase in run.phases])
    folder = paths.path(workdir)
    paths.reach(folder)
    with (
        StopSignal() as stop,
        checkpoint.only_writer(folder) if jax.process_index() == 0 else contextlib.nullcontext(),
        checkpoint.Checkpointer(
            folder / checkpoint.STEPS, every_steps=run.save_every, keep=run.keep, best=run.best
        ) as saver,
    ):
        return _Loop(run, config, folder, saver, stop, windows).run_to_end()


class _Loop:
    """One process of a run in progress."""

    def __init__(
        self,
        run: Run,
        config: Mapping[str, Any],
        workdir: epath.Path,
        saver: checkpoint.Checkpointer,
        stop: "StopSignal",
        windows: Sequence[profiling.Window],
    ):
        from pe_jax import data, evals  # here, as in `batch_spec`

        self.run, self.workdir, self.saver, self.stop = run, workdir, saver, stop
        self.evaluators = {name: evals.create(evaluator) for name, evaluator in run.evals.items()}
        self.mesh = sharding.make_mesh(run.mesh)
        for i, phase in enumerate(run.phases):
            if phase.batch_size % sharding.batch_ways(self.mesh):
                raise ValueError(
                    f"phases[{i}] has batch_size={phase.batch_size}, which the {sharding.batch_ways(self.mesh)} ways "
                    "the mesh cuts a batch do not divide; change batch_size or mesh."
                )
        tx, self.rate = optimizer_of(run)
        abstract = abstract_state(run.stage, tx, self.mesh)
        self.graphdef, _ = split(nnx.eval_shape(lambda: run.stage.build(nnx.Rngs(0))))
        self.ahead = CompileAhead(
            lambda phase: make_train_step(phase.stage, tx, abstract, run.compiler_options).lower(
                abstract, abstract_batch(run, phase, self.mesh)
            ),
            self.mesh,
        )
        plain = json.loads(json.dumps(dict(config)))
        resumed = saver.latest
        _hold_to_config(workdir / "config.json", plain, resumed is not None)
        self.record: dict[str, Any] = {
            "architecture": zoo.to_dict(run.stage.arch),
            "preprocess": data.preprocess(run.stage.inputs.kind, run.image_size).to_dict(),
            "config": plain,
            "evaluated": True,  # whether the evaluations due at this step are done
        }
        with jax.set_mesh(self.mesh):
            if resumed is None:
                self.state = first_state(run, tx, abstract, self.mesh)
            else:
                self.state, found = saver.restore(abstract)
                self.record |= {name: found[name] for name in ("evaluated", "lowest_loss") if name in found}
        self.step = int(self.state.step)
        self.recent: list[tuple[int, np.ndarray]] = []  # the record numbers of the steps since the last logged one
        self.scalars: Metrics = {}
        self.speed = metrics.Speed(metrics.peak_flops())
        self.writer = metrics.writer(workdir, resumed, evaluated=self.record["evaluated"])
        self.progress = metrics.Progress(run.steps, start=self.step)
        self.progress.note(
            f"{workdir}: {zoo.count(self.state.params):,} parameters, {run.steps:,} steps, "
            f"{run.examples(run.steps):,} examples, mesh {dict(self.mesh.shape)}"
            + ("" if resumed is None else f"; going on from step {self.step}")
        )
        self.tracer = profiling.Tracer(windows, workdir / "profile", self.progress.note, done=self.step)

    def run_to_end(self) -> int:
        begun = time.perf_counter()
        try:
            if not self.record["evaluated"]:
                self._evaluate()
            for number in range(len(self.run.phases)):
                self._train_phase(number)
        except Preempted:
            self._save()
            self.saver.wait()
            self.progress.note(f"SIGTERM: step {self.step} is saved; the same command goes on from there")
            return PREEMPTED
        finally:
            self.tracer.close()
            self.ahead.close()
            self.writer.close()
            self.progress.close()
        self.saver.wait()
        print(
            f"done: {self.run.steps:,} steps in {time.perf_counter() - begun:.0f} s; "
            f"checkpoints in {self.saver.directory}"
        )
        if self.saver.best is not None:
            best, figure = self.saver.best
            print(f"best: {self.run.best} {figure:.4g} at step {best}, {self.saver.directory / str(best)}")
        return 0

    def _train_phase(self, number: int) -> None:
        from pe_jax import data

        run, phase = self.run, self.run.phases[number]
        last = sum(each.steps for each in run.phases[: number + 1])
        if self.step >= last:
            return
        flops = phase.stage.update_flops(batch_spec(run, phase))
        kind, shape = phase.stage.inputs
        with data.create(
            kind,
            run.data,
            batch_size=phase.batch_size,
            image_size=phase.image_size,
            seed=run.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start=run.examples(self.step),
            **shape,
        ) as loader:
            update = None
            while self.step < last:
                if self.tracer.begin(self.step + 1, self.state):
                    self.speed.reset()
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                    with self.speed.part("data_wait"):
                        local = next(loader)
                    records = local.pop("index")
                    with self.speed.part("batch_put"):
                        batch = sharding.global_batch(local, self.mesh)
                    if update is None:
                        with self.stop.at_once():
                            update = self.ahead.of(phase)
                        self.ahead.start(run.phases[number + 1 : number + 2])
                        self.speed.reset()  # compilation is not the step's time
                    with self.speed.part("dispatch"), jax.set_mesh(self.mesh):
                        self.state, self.scalars = update(self.state, batch)
                    self.step += 1
                    self.recent.append((self.step, records))
                    self.speed.count(phase.batch_size, flops)
                    if self.step % run.log_every == 0 or self.step == run.steps:
                        self._log(phase, loader)
                if self.tracer.end(self.step, self.state, update):
                    self.speed.reset()
                self._after_step()

    def _log(self, phase: Phase, loader: Any) -> None:
        with self.speed.part("device_wait"):
            row = dict(jax.device_get(self.scalars))
        self._check_loss(row)
        bad, figures = sum(loader.bad.values()), self.speed.read()
        figures["loader_examples_per_second"] = loader.examples_per_second * jax.process_count()
        row |= {
            "learning_rate": np.asarray(self.rate(self.step - 1)),
            "examples": self.run.examples(self.step),
            "image_size": phase.image_size,
            "batch": zlib.crc32(self.recent[-1][1].tobytes()),  # whether two runs saw the same records
            "bad_records": bad,
        }
        self.writer.write_scalars(self.step, row | figures)
        notes = [f"{bad} bad records"] if bad else []
        self.progress.update(self.step, float(row["loss"]), figures, notes)
        self.recent.clear()

    def _after_step(self) -> None:
        due = self._due()
        figures = self._evaluate() if due else {}
        stopping = self.stop.agreed(self.step)
        better = self.saver.improves(figures)
        if self.saver.due(self.step) or self.step == self.run.steps or better:
            self._save(figures)
        if stopping and self.step < self.run.steps:
            raise Preempted
        if due or self.saver.due(self.step):
            self.speed.reset()  # nor is evaluating and saving

    def _due(self) -> list[str]:
        every = {name: self.run.evals[name].get("every_steps", self.run.steps) for name in self.evaluators}
        return [name for name in every if self.step and (self.step == self.run.steps or self.step % every[name] == 0)]

    def _evaluated(self, name: str) -> Any:
        """What an evaluator scores: the model, or for questions one that answers as the run was told to."""
        model = nnx.merge(self.graphdef, self.state.params)
        if self.run.evals[name]["name"] != "vlm":
            return model
        from pe_jax import assistant

        said = assistant.of_run({"data": self.run.data}) | {"image_size": self.run.image_size}
        return assistant.assembled(model, said, str(self.workdir))

    def _evaluate(self) -> dict[str, float]:
        """Runs the evaluators due at this step; their figures as EVALUATOR/FIGURE."""
        self.record["evaluated"] = False  # as it stays where SIGTERM comes before the end
        found: dict[str, float] = {}
        with self.stop.at_once():
            for name in self._due():
                figures = self.evaluators[name](self._evaluated(name))
                found |= {f"{name}/{key}": value for key, value in figures.items()}
                self.progress.note(f"step {self.step}  {name}: {_line(figures)}")
        self.writer.write_scalars(self.step, found)  # all or none, so that no figure is written twice
        self.record["evaluated"] = True
        return found

    def _save(self, figures: Mapping[str, float] | None = None) -> None:
        if self.scalars:
            self._check_loss(jax.device_get(self.scalars))  # never save a state that is lost
        self.writer.flush()  # a run that goes on from this step keeps the figures up to it
        record = self.record | {"step": self.step, "examples": self.run.examples(self.step)}
        self.saver.save(self.step, self.state, record, figures)

    def _check_loss(self, row: Mapping[str, Any]) -> None:
        loss, lowest = float(row["loss"]), self.record.get("lowest_loss", np.inf)
        if np.isfinite(loss) and np.isfinite(row["grad_norm"]) and loss <= lowest + self.run.max_loss_rise:
            self.record["lowest_loss"] = min(loss, lowest)
            return
        path = self.workdir / f"stopped-{jax.process_index()}.json"
        path.write_text(json.dumps({str(step): index.tolist() for step, index in self.recent}))
        risen = f", up from {lowest:.4g}, more than max_loss_rise={self.run.max_loss_rise}" if np.isfinite(loss) else ""
        raise FloatingPointError(
            f"loss={loss}{risen}, grad_norm={row['grad_norm']} by step {self.step}; the record numbers of the batches "
            f"since the last logged step are in {path}. Lower the learning rate, or look at those records."
        )


def _line(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _hold_to_config(path: epath.Path, config: Mapping[str, Any], resuming: bool) -> None:
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
        paths.write_text(path, json.dumps(config, indent=2))


def _leaves(tree: Any, name: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {name.lstrip("."): tree}
    return {path: leaf for key, value in items for path, leaf in _leaves(value, f"{name}.{key}").items()}


class CompileAhead:
    """The update compiled for each phase's shapes: the next phase's in the background, while this one trains."""

    def __init__(self, lowered: Callable[[Phase], jax.stages.Lowered], mesh: jax.sharding.Mesh):
        """`lowered` gives the update of a phase, lowered for its shapes."""
        self._lowered, self._mesh = lowered, mesh
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._found: dict[Phase, concurrent.futures.Future[Any]] = {}

    def start(self, phases: Sequence[Phase]) -> None:
        """Begins to compile for each of `phases`."""
        for phase in phases:
            if phase not in self._found:
                self._found[phase] = self._pool.submit(self._compile, phase)

    def of(self, phase: Phase) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The update compiled for `phase`, when it is ready."""
        self.start([phase])
        return self._found.pop(phase).result()

    def close(self) -> None:
        """Begins no more; what is being compiled cannot be stopped, and is not waited for here."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, phase: Phase) -> Any:
        with jax.set_mesh(self._mesh):  # a thread has a mesh of its own
            return self._lowered(phase).compile()


class Preempted(Exception):
    """SIGTERM has come, and the run shall stop where it is."""


class StopSignal:
    """Whether SIGTERM has come, agreed on by all processes. In a `with`, which puts the former handler back."""

    def __init__(self) -> None:
        self._here = self._now = False
        # jax.distributed has a handler of its own, by which processes agree on a step.
        self._ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self._ours:
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._former)

    def _note(self, *_: object) -> None:
        self._here = True
        if self._now:
            raise Preempted

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step; every process asks at every step."""
        if jax.process_count() == 1:
            return self._here
        return multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is inside is left by `Preempted` as soon as the signal comes: long work that changes no state.

        Several processes could not agree on the moment, so there it is done first.
        """
        self._now = True
        try:
            if self._here:
                raise Preempted
            yield
        finally:
            self._now = False


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
    profile = flags.DEFINE_string(
        "profile", "", "steps to trace, FIRST:COUNT; 100:5 for 100 to 104, more by commas", flag_values=values
    )
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
        code = train(config.value.to_dict(), workdir.value, profile=profile.value)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, FloatingPointError) as error:
        if os.environ.get("PE_JAX_TRACEBACK"):
            raise
        print(f"pe_jax.train: {error}", file=sys.stderr)
        return 2
    if code == PREEMPTED and jax.process_count() == 1:
        # All is saved and closed, but the interpreter would wait for a step still compiling in its thread.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

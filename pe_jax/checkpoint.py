"""Checkpoints: train states with their place in the data, and weights alone. Every Orbax call of pe_jax is here.

On disk, `DIRECTORY/STEP/state` holds the arrays and the step's JSON metadata lies beside it; a step gets its name when
it is complete, so that a killed save leaves nothing that could be restored. A weights directory is one such step
without an optimizer. The metadata of both has `format`, `architecture` and `preprocess`, enough to rebuild the model.
"""

import contextlib
import fcntl
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from pe_jax import paths
from pe_jax.types import Params

FORMAT = 1  # of this layout; raised when a reader of today could not read it
STEPS = "checkpoints"  # the folder of steps in a run's workdir
TRAINING_ONLY = "training"  # the subtree of parameters that only a stage's loss uses, such as a mask token
_NAME = "state"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what was asked for; the message says what to do."""


class Checkpointer:
    """The train states of one run: saved in the background, the newest `keep` of them kept, and the best one.

    Used by every process of a run, each call on all of them; close it (or use it in a `with`) to finish the last save.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, every_steps: int = 1000, keep: int = 2, best: str | None = None
    ):
        """Opens `directory`, made where missing; leftovers of killed saves are deleted.

        Args:
          directory: of the steps.
          every_steps: when a save is due.
          keep: how many of the newest stay.
          best: the name of a figure; the step saved with the highest one stays too.

        Raises:
          ValueError: if `every_steps` or `keep` is below 1.
        """
        for name, value in (("every_steps", every_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"checkpoint.{name}={value} must be at least 1.")
        self.directory = paths.absolute(directory)
        self.every_steps = every_steps
        policies: Any = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if best is not None:
            kept.append(policies.BestN(n=1, get_metric_fn=lambda m: m[best], keep_checkpoints_without_metrics=False))
        self._best = best
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> tuple[int, float] | None:
        """The step kept for its figure, and the figure; None before one is saved."""
        if self._best is None:
            return None
        saved: list[tuple[float, int]] = [
            (cast(dict, each.metrics)[self._best], each.step) for each in self._orbax.checkpoints if each.metrics
        ]
        if not saved:
            return None
        figure, step = max(saved)
        return step, figure

    def improves(self, figures: Mapping[str, float]) -> bool:
        """Whether the figure that `best` names is among `figures` and above all saved ones, so that a save is due.

        Raises:
          ValueError: if its evaluator is among them, and has no such figure.
        """
        if self._best is None:
            return False
        evaluator = self._best.partition("/")[0] + "/"
        if self._best not in figures:
            if others := sorted(name for name in figures if name.startswith(evaluator)):
                raise ValueError(f"checkpoint.best={self._best!r} is no figure; that evaluator gives {others}.")
            return False
        return self.best is None or figures[self._best] > self.best[1]

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], figures: Mapping[str, float] | None = None
    ) -> None:
        """Saves `state` (any tree of arrays, typed keys too) and JSON `metadata` as `step`, in the background.

        `figures` are what the evaluators gave at this step, from which the best step is known.

        The arrays are copied before this returns, so they may be donated at once. A failure is raised by the next
        call. A step that is there already is left alone.
        """
        if self.latest == step:
            return
        scored = {name: float(value) for name, value in (figures or {}).items() if name == self._best}
        self._orbax.save_checkpointables_async(
            step,
            {_NAME: state},
            force=True,
            metrics=cast(Any, scored) or None,
            custom_metadata={"format": FORMAT, **metadata},
        )

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state and metadata of `step`, by default the newest.

        Args:
          abstract: a tree like the saved one, of `jax.ShapeDtypeStruct` with the sharding each array shall have; it
            may lie on another mesh, and on another number of processes, than the one that saved.
          step: which one.

        Raises:
          CheckpointError: if there is none, a file of it is missing or truncated, or names or shapes differ.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint.")
        return _load(self.directory / str(step), abstract, partial=False)

    def wait(self) -> None:
        """Until the last save is complete."""
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_weights(path: str | os.PathLike[str], params: Params, metadata: Mapping[str, Any]) -> None:
    """Writes parameters alone to the directory `path`, which must not exist.

    Args:
      path: a local or gs:// directory.
      params: the nested dict of arrays.
      metadata: JSON; `architecture` (see `zoo.to_dict`) and `preprocess` make it loadable by `pe_jax.load`.

    Raises:
      CheckpointError: if `path` exists, or `architecture` is missing.
    """
    path = paths.absolute(path)
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another name or delete it first.")
    if "architecture" not in metadata:
        raise CheckpointError("metadata lacks 'architecture', without which the weights could not be loaded again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns of its own renamings
        ocp.save_checkpointables(path, {_NAME: {"params": params}}, custom_metadata={"format": FORMAT, **metadata})


def load_weights(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    shardings: Params | None = None,
    expected: Params | None = None,
    part: str | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Parameters alone, without the optimizer state that may lie beside them.

    Args:
      path: a weights directory, the workdir of a run (its newest step is taken), or one step of it. What only a
        stage's loss uses, the subtree `TRAINING_ONLY`, is left out.
      mesh: where to put them; replicated on it unless `shardings` says otherwise. Default: one device.
      shardings: the sharding of each parameter, a nested dict.
      expected: (abstract) parameters of the wanted architecture; names and shapes must agree.
      part: the first name of the parameters to read, such as "vision"; None reads all.

    Returns:
      The nested dict of arrays, and the metadata they were saved with.

    Raises:
      CheckpointError: if `path` holds no checkpoint, a file is missing or truncated, or names or shapes differ.
    """
    path = find(path)
    stored, _ = _describe(path)
    stored.get("params", {}).pop(TRAINING_ONLY, None)
    if part is not None:
        stored["params"] = {part: stored["params"][part]}
    if expected is not None:
        _compare(path, stored.get("params", {}), expected)
    default: Any = (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh is None
        else NamedSharding(mesh, PartitionSpec())
    )
    if shardings is None:
        placed = jax.tree.map(lambda _: default, stored["params"])
    else:
        _compare(path, stored["params"], shardings, shapes=False)
        placed = shardings
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), stored["params"], placed)
    state, metadata = _load(path, {"params": abstract}, partial=True)
    return state["params"], metadata


def find(path: str | os.PathLike[str]) -> epath.Path:
    """The directory of the step or weights that `path` means: itself, or the newest step of a run.

    Raises:
      CheckpointError: if there is none.
    """
    path = paths.absolute(path)
    paths.reach(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    for folder in (path / STEPS, path):
        if folder.is_dir() and (steps := complete_steps(folder)):
            return folder / str(steps[-1])
    if (path / _NAME).is_dir():
        return path
    raise CheckpointError(
        f"{path} holds no complete checkpoint; give a weights directory, a run's workdir, or one of its steps."
    )


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory of ours, rather than a weights file or a folder of safetensors shards."""
    path = paths.absolute(path)
    return path.is_dir() and not any(path.glob("*.safetensors*"))


def complete_steps(directory: str | os.PathLike[str]) -> list[int]:
    """The numbers of the complete steps in `directory`, ascending."""
    directory = paths.absolute(directory)
    # A bucket has no atomic rename: there a step is complete when its marker is.
    marked = paths.is_bucket(directory)
    return sorted(
        int(child.name)
        for child in directory.iterdir()
        if child.name.isdigit() and (not marked or (child / "commit_success.txt").exists())
    )


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON metadata of a weights directory, run or step; reads no array.

    Raises:
      CheckpointError: as `load_weights`.
    """
    return _describe(find(path))[1]


@contextlib.contextmanager
def only_writer(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds `workdir` for this process; a second writer is refused. The lock dies with its process, by kill -9 too.

    Raises:
      CheckpointError: if another process on this file system holds it, naming process and host.
    """
    if paths.is_bucket(workdir):  # which has no locks; two runs there must be kept apart by whoever starts them
        yield
        return
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "lock")
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise CheckpointError(
                f"{workdir} is being written by {owner}; two runs would overwrite each other. "
                "Wait for it, stop it, or choose another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)  # the file stays: deleting it would let two later processes lock two files of this name


def _describe(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stored tree with shapes in place of arrays, and the metadata."""
    with _reading(path):
        described: Any = ocp.checkpointables_metadata(path)
        stored, metadata = dict(described.metadata)[_NAME], dict(described.custom_metadata or {})
        if stored is None:
            raise KeyError("its arrays are not listed")
        if "format" not in metadata:
            raise KeyError("its metadata is gone, or pe_jax did not write it")
    if metadata["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata['format']}, this pe_jax reads up to {FORMAT}; install a newer pe_jax."
        )
    return stored, metadata


def _load(path: epath.Path, abstract: Any, *, partial: bool) -> tuple[Any, dict[str, Any]]:
    stored, metadata = _describe(path)
    if not partial:
        _compare(path, stored, abstract)
    loading = ocp.options.PyTreeOptions.Loading(partial_load=partial)
    with _reading(path), ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
        return ocp.load(path, abstract, checkpointable_name=_NAME), metadata


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns whatever Orbax raises on a damaged directory into one error that says what to do."""
    noisy = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:  # each array that cannot be read would print its own traceback
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointError:
        raise
    except Exception as error:
        others = [step for step in complete_steps(path.parent) if str(step) != path.name]
        advice = (
            f"delete {path} to go on from step {others[-1]}" if others and path.name.isdigit() else "copy it here again"
        )
        reason = str(error).strip("'\"").splitlines()[0].split(" [tensorstore_spec")[0]
        raise CheckpointError(
            f"{path} cannot be read: a file of it is missing or truncated ({reason}); {advice}."
        ) from error
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def _flat(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys) for keys, _ in flat
    ]
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def _shape(leaf: Any) -> tuple[int, ...]:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape  # how a typed key is stored
    return tuple(leaf.shape)


def _compare(path: epath.Path, stored: Any, wanted: Any, *, shapes: bool = True) -> None:
    """Raises CheckpointError where names or shapes differ, naming up to eight of them."""
    have, want = _flat(stored), _flat(wanted)
    problems = [f"{name} is missing" for name in want if name not in have]
    problems += [f"{name} is not wanted" for name in have if name not in want]
    if shapes:
        problems += [
            f"{name} is {list(have[name].shape)}, want {list(_shape(leaf))}"
            for name, leaf in want.items()
            if name in have and tuple(have[name].shape) != _shape(leaf)
        ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{path} does not fit the model or optimizer asked for: {'; '.join(problems[:8])}{more}. "
            "Ask for the architecture and optimizer it was saved with, or start a new --workdir."
        )

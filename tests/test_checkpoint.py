import glob
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pe_jax import checkpoint, sharding
from pe_jax.checkpoint import Checkpointer, CheckpointError

ROOT = pathlib.Path(__file__).parents[1]
METADATA = {"architecture": {"width": 8}, "preprocess": {"size": 32}, "position": 7}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: object
    key: jax.Array


def params(scale=1.0):
    kernel = scale * jnp.arange(3 * 8 * 4, dtype=jnp.float32).reshape(3, 8, 4)
    # 200 kB: small arrays would all lie inside one index file
    big = jax.random.normal(jax.random.key(3), (400, 128))
    return {
        "blocks": {"up": {"kernel": kernel, "bias": jnp.full((3, 4), scale)}},
        "big": big,
        "log_scale": jnp.float32(2.5),
    }


def state(scale=1.0):
    p = params(scale)
    return State(jnp.int32(5), p, optax.adam(1e-3).init(p), jax.random.key(11))


def abstract(tree, place=None):
    place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def assert_same(a, b):
    def data(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), a, b)


def saved(directory, *steps):
    with Checkpointer(directory, keep=5) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), METADATA)
    return directory


def test_the_step_with_the_highest_figure_stays_beside_the_newest(tmp_path):
    scores = {1: 0.1, 2: 0.5, 3: 0.3, 4: None, 5: 0.2}
    with Checkpointer(tmp_path, keep=1, best="eval/top1") as checkpointer:
        assert checkpointer.best is None
        for step, score in scores.items():
            figures = {} if score is None else {"eval/top1": score, "eval/other": 1 - score}
            assert checkpointer.improves(figures) == (step in (1, 2))
            checkpointer.save(step, state(), METADATA, figures)
            checkpointer.wait()
        assert checkpointer.best == (2, 0.5)
    assert checkpoint.complete_steps(tmp_path) == [2, 5]
    with Checkpointer(tmp_path, keep=1, best="eval/top1") as checkpointer:
        assert checkpointer.best == (2, 0.5) and checkpointer.latest == 5
        with pytest.raises(ValueError, match=r"best='eval/top1' is no figure; that evaluator gives \['eval/top5'\]"):
            checkpointer.improves({"eval/top5": 0.9})


def test_a_state_with_typed_key_and_optimizer_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, 5)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest == 5
        got, metadata = checkpointer.restore(abstract(state()))
    assert_same(got, state(5))
    assert metadata == {"format": 1, **METADATA}


def test_arrays_may_be_donated_right_after_a_save(tmp_path):
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    p = params()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": p}, METADATA)
        scramble(p)
        checkpointer.wait()
        got, _ = checkpointer.restore(abstract({"params": params()}))
    assert_same(got, {"params": params()})


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_state_saved_on_one_mesh_is_restored_on_another(tmp_path, shape):
    saving = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with Checkpointer(tmp_path) as checkpointer:
        cut = NamedSharding(saving, sharding.spec(saving, None, "embed", "mlp"))
        checkpointer.save(2, {"kernel": jax.device_put(params()["blocks"]["up"]["kernel"], cut)}, METADATA)
    mesh = sharding.make_mesh(shape)
    place = NamedSharding(mesh, sharding.spec(mesh, None, "mlp", "embed"))
    with Checkpointer(tmp_path) as checkpointer:
        got, _ = checkpointer.restore(abstract({"kernel": params()["blocks"]["up"]["kernel"]}, place))
    assert got["kernel"].sharding == place
    np.testing.assert_array_equal(got["kernel"], params()["blocks"]["up"]["kernel"])


def test_only_the_newest_steps_are_kept(tmp_path):
    with Checkpointer(tmp_path, every_steps=3, keep=2) as checkpointer:
        assert [step for step in range(1, 10) if checkpointer.due(step)] == [3, 6, 9]
        for step in (3, 6, 9):
            checkpointer.save(step, {"x": jnp.ones(2)}, METADATA)
    assert checkpoint.complete_steps(tmp_path) == [6, 9]


KILLED_WHILE_SAVING = """
import os, signal, sys, jax, jax.numpy as jnp
from orbax.checkpoint._src.path import atomicity
from pe_jax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=5)
checkpointer.save(1, {"x": jnp.ones((300, 300))}, {})
checkpointer.wait()
for name in ("AtomicRenameTemporaryPath", "CommitFileTemporaryPath"):
    async def die(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)  # all files are written, the step has not got its name yet
    setattr(getattr(atomicity, name), "finalize", die)
checkpointer.save(2, {"x": jnp.zeros((300, 300))}, {})
checkpointer.wait()
"""


def test_a_save_killed_before_its_end_is_never_restored(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    leftovers = [name for name in os.listdir(tmp_path) if not name.isdigit()]
    assert any(name.startswith("2.") for name in leftovers), leftovers
    assert checkpoint.complete_steps(tmp_path) == [1]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest == 1
        got, _ = checkpointer.restore(abstract({"x": jnp.ones((300, 300))}))
        assert got["x"].min() == 1
    assert os.listdir(tmp_path) == ["1"]


def largest_data_file(step):
    return max(glob.glob(f"{step}/state/**/d/*", recursive=True), key=os.path.getsize)


DAMAGES = {
    "an array's file deleted": lambda step: os.remove(largest_data_file(step)),
    "an array's file cut short": lambda step: os.truncate(largest_data_file(step), 1000),
    "the index deleted": lambda step: os.remove(f"{step}/state/manifest.ocdbt"),
    "the index cut short": lambda step: os.truncate(f"{step}/state/manifest.ocdbt", 40),
    "the list of arrays deleted": lambda step: os.remove(f"{step}/state/_METADATA"),
    "the list of arrays cut short": lambda step: os.truncate(f"{step}/state/_METADATA", 100),
    "the metadata deleted": lambda step: os.remove(f"{step}/_CHECKPOINT_METADATA"),
    "the metadata cut short": lambda step: os.truncate(f"{step}/_CHECKPOINT_METADATA", 100),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons its other reads
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_an_error_that_says_what_to_do(tmp_path, damage):
    saved(tmp_path, 3, 6)
    damage(tmp_path / "6")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore(abstract(state()))
    assert "a file of it is missing or truncated" in str(error.value)
    assert f"delete {tmp_path / '6'} to go on from step 3" in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["blocks"]["up"].update(kernel=jnp.zeros((3, 8, 5))),
            r"up/kernel is \[3, 8, 4\], want \[3, 8, 5\]",
        ),
        (lambda p: p.pop("log_scale"), "params/log_scale is not wanted"),
        (lambda p: p.update(probe=jnp.zeros(4)), "params/probe is missing"),
    ],
    ids=["shape", "surplus", "missing"],
)
def test_another_architecture_is_refused_by_parameter_name(tmp_path, change, message):
    saved(tmp_path, 5)
    other = params()
    change(other)
    other = state()._replace(params=other, opt_state=optax.adam(1e-3).init(other))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=message):
        checkpointer.restore(abstract(other))


def test_another_optimizer_is_refused(tmp_path):
    saved(tmp_path, 5)
    other = state()._replace(opt_state=optax.sgd(1e-3).init(params()))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"opt_state/0/mu/.* is not wanted"),
    ):
        checkpointer.restore(abstract(other))


def test_weights_alone_come_back_with_their_metadata(tmp_path):
    checkpoint.save_weights(tmp_path / "w", params(2.0), METADATA)
    got, metadata = checkpoint.load_weights(tmp_path / "w")
    assert_same(got, params(2.0))
    assert metadata == {"format": 1, **METADATA} == checkpoint.metadata(tmp_path / "w")


def test_weights_are_read_from_a_run_its_steps_folder_or_one_step(tmp_path):
    saved(tmp_path / "checkpoints", 3, 12)
    for path, scale in ((tmp_path, 12), (tmp_path / "checkpoints", 12), (tmp_path / "checkpoints" / "3", 3)):
        got, _ = checkpoint.load_weights(path)
        assert_same(got, params(scale))


def test_weights_are_placed_on_a_mesh_as_asked(tmp_path):
    checkpoint.save_weights(tmp_path / "w", params(), METADATA)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    whole, _ = checkpoint.load_weights(tmp_path / "w", mesh)
    assert whole["big"].sharding == sharding.replicated(mesh)
    places = jax.tree.map(lambda x: sharding.replicated(mesh), params())
    places["big"] = NamedSharding(mesh, PartitionSpec("fsdp"))
    cut, _ = checkpoint.load_weights(tmp_path / "w", mesh, places)
    assert cut["big"].addressable_shards[0].data.shape == (100, 128)


def test_weights_of_another_architecture_are_refused(tmp_path):
    checkpoint.save_weights(tmp_path / "w", params(), METADATA)
    expected = params() | {"big": jnp.zeros((400, 64))}
    with pytest.raises(CheckpointError, match=r"big is \[400, 128\], want \[400, 64\]"):
        checkpoint.load_weights(tmp_path / "w", expected=expected)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.load_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load_weights(tmp_path / "nothing")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpointer.restore(abstract(state()))


def test_weights_never_overwrite(tmp_path):
    checkpoint.save_weights(tmp_path / "w", params(), METADATA)
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save_weights(tmp_path / "w", params(), METADATA)
    with pytest.raises(CheckpointError, match="lacks 'architecture'"):
        checkpoint.save_weights(tmp_path / "v", params(), {})


HOLDER = """
import sys, time
from pe_jax.checkpoint import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(CheckpointError, match=f"being written by process {holder.pid} on "),
        checkpoint.only_writer(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with checkpoint.only_writer(tmp_path):
        pass

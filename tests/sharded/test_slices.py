"""Several slices joined by the dcn axis: two processes of four devices train to the losses of one with eight."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from pe_jax import optim, sharding, train
from pe_jax.stages import Contrastive
from tests import quick, two_processes
from tests.sharded.test_meshes import ARCH, batch

ROOT = pathlib.Path(__file__).parents[2]
MESH = {"dcn": 2, "data": 2, "fsdp": 2}


def losses(meet=lambda: None) -> list[float]:
    """Of five updates on the mesh, whoever holds its devices; `meet` is called between compiling and running."""
    stage = Contrastive(ARCH, microbatches=2, loss_chunk=6)
    mesh = sharding.make_mesh(MESH)
    tx = optim.create(optim.Config(name="lamb", learning_rate=1e-2), lambda step: 1e-2, stage.trainable)
    abstract = train.abstract_state(stage, tx, mesh)
    whole, share = batch(16), 16 // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    cut = sharding.global_batch({name: x[mine] for name, x in whole.items()}, mesh)
    with jax.set_mesh(mesh):
        init = jax.jit(lambda: train._fresh(stage, tx, 0), out_shardings=train._shardings(abstract))
        init = init.lower().compile()
        update = train.make_train_step(stage, tx, abstract).lower(abstract, cut).compile()
        meet()
        state, found = init(), []
        for _ in range(5):
            state, metrics = update(state, cut)
            found.append(float(metrics["loss"]))
    return found


# Gloo gives up on a peer that comes half a minute later, and two compilers on two cores may be so far apart.
WORKER = """
import pathlib, sys, time, json, jax
port, number, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=number)
from pe_jax import sharding
from tests.sharded import test_slices
def meet():
    (folder / f"compiled-{number}").touch()
    while not (folder / f"compiled-{1 - number}").exists():
        time.sleep(0.05)
rows = sharding.make_mesh(test_slices.MESH).devices
assert all(device.process_index == i for i in range(2) for device in rows[i].flat)
found = test_slices.losses(meet)
if number == 0:
    (folder / "losses.json").write_text(json.dumps(found))
"""


def test_two_processes_of_four_devices_train_to_the_losses_of_one_process(tmp_path):
    variables = {**os.environ, "XLA_FLAGS": quick.flags(devices=4), "PYTHONPATH": str(ROOT)}

    def start(port, number):
        (tmp_path / f"compiled-{number}").unlink(missing_ok=True)  # of a try before
        words = [sys.executable, "-c", WORKER, str(port), str(number), str(tmp_path)]
        return subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True)

    two_processes.finish(start)
    want, got = losses(), json.loads((tmp_path / "losses.json").read_text())
    assert len(set(want)) == 5
    np.testing.assert_allclose(got, want, rtol=1e-5)


class Chip:
    """A device of a slice, as a TPU backend describes it."""

    platform, process_index = "tpu", 0

    def __init__(self, slice_index: int):
        self.slice_index = slice_index


def test_the_dcn_axis_goes_along_slices_whatever_order_their_devices_come_in():
    devices = [Chip(i % 2) for i in range(6)]
    cut = sharding._slices(devices, 2)
    assert [[chip.slice_index for chip in part] for part in cut] == [[0, 0, 0], [1, 1, 1]]


def test_another_axis_across_slices_is_refused():
    with pytest.raises(ValueError, match="there are 3 slices, and the mesh has dcn=1; set dcn to 3"):
        sharding._slices([Chip(i) for i in range(3)], 1)

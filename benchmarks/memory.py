"""Bytes the compiler asks for, per device: the two forms of the contrastive loss, and GradCache's micro-batches.

  JAX_PLATFORMS=cpu python -m benchmarks.memory               # eight simulated CPU devices
  JAX_PLATFORMS=cpu python -m benchmarks.memory --tpu v5e:16x16   # needs libtpu, no TPU: compiles for that slice

Nothing is run: temporary bytes and FLOPs are the compiler's own for the value and the gradient.
"""

import argparse
import functools
import os
import re
import sys
import time
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pe_jax import losses, sharding
from pe_jax.models import zoo
from pe_jax.stages import Contrastive
from pe_jax.types import split

MIB = 2**20
FORMS = {
    "plain": losses.info_nce,
    "chunked, float32": losses.info_nce_chunked,
    "chunked, bfloat16": functools.partial(losses.info_nce_chunked, dtype=jnp.bfloat16),
}


def loss_row(loss: Any, batch: int, width: int, mesh: jax.sharding.Mesh) -> Any:
    """The compiled value and gradient of a loss over `batch` global pairs."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    side = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), out_shardings=((whole, whole), (rows, rows, whole))
    )
    with jax.set_mesh(mesh):
        return step.lower(side, side, scale).compile()


def gradient_row(stage: Contrastive, batch: int, mesh: jax.sharding.Mesh) -> Any:
    """The compiled gradients of one update of `stage` at its native resolution."""
    model = nnx.eval_shape(lambda: stage.build(nnx.Rngs(0)))
    graphdef, params = split(model)
    shardings = sharding.param_shardings(model, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    size, rows = stage.arch.vision.image_size, sharding.batch_sharding(mesh)
    shapes = {"image": ((batch, size, size, 3), np.uint8), "text": ((batch, stage.arch.text.context_length), np.int32)}
    inputs = {name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in shapes.items()}
    step = jax.jit(
        lambda params, batch: stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(0)),
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(mesh):
        return step.lower(params, inputs).compile()


def table(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}\n\n| | temporary MiB per device | compile s |\n|---|---|---|")
    for name, compiler in rows.items():
        start = time.perf_counter()
        try:
            memory = f"{compiler().memory_analysis().temp_size_in_bytes / MIB:,.0f}"
        except jax.errors.JaxRuntimeError as error:  # the TPU compiler refuses what does not fit, and says by how much
            sizes = re.findall(r"\((\d[\d.]*G)\)", str(error))
            memory = "does not fit: {} of {}".format(*sizes) if len(sizes) == 2 else str(error)[:90]
        print(f"| {name} | {memory} | {time.perf_counter() - start:.0f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="such as v5e:16x16; default: eight CPU devices")
    args = parser.parse_args()
    if args.tpu:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(args.tpu, platform="tpu").devices
        where, batch, width, micro = f"{args.tpu} ({len(devices)} chips)", 131_072, 1280, (1, 4, 16, 64)
    else:
        devices, where, batch, width, micro = jax.devices(), "8 CPU devices", 8192, 1024, (1, 2, 4, 8)
    mesh = sharding.make_mesh({"data": -1, "fsdp": min(8, len(devices))}, devices)
    rows = {name: functools.partial(loss_row, form, batch, width, mesh) for name, form in FORMS.items()}
    table(f"Loss of {batch:,} pairs of width {width:,} on {where}", rows)
    name, examples = ("PE-Core-L14-336", batch) if args.tpu else ("PE-Core-T16-384", 512)
    tower = {"dtype": "bfloat16", "remat": "block"}
    arch = zoo.architecture({"base": name, "vision": tower, "text": tower})

    def stage(parts: int) -> Contrastive:
        return Contrastive(arch, microbatches=parts, loss_chunk=1024)

    rows = {
        f"{n} micro-batches" if n > 1 else "whole": functools.partial(gradient_row, stage(n), examples, mesh)
        for n in micro
    }
    table(f"Gradients of {name}, {examples:,} pairs, bfloat16, remat by block, on {where}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles an experiment's very train step for a TPU slice that is not held, and says what each chip would hold.

  python -m tpu.aot --config=experiments/pretrain_core.py:B16 --topology=v5e:4x4 --mesh data=4,fsdp=4 --batch=4096

Needs libtpu (`pip install "pe-jax[tpu]"`) and no TPU. Bytes are the compiler's own; FLOPs and collectives are counted
in the compiled program, loops in full. Nothing is run.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import jax
import numpy as np

from pe_jax import sharding, train
from pe_jax.models import zoo
from tpu import hlo

GIB = 2**30


def config_of(given: str) -> dict[str, Any]:
    """The config of FILE[:ARGS], as the loop's own flag reads it."""
    path, _, argument = given.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config={given}: there is no file {path}; give experiments/X.py[:ARGS].")
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (module.get_config(argument) if argument else module.get_config()).to_dict()


def mesh_of(given: str) -> dict[str, int]:
    """{"data": 4, "fsdp": 4} of "data=4,fsdp=4"."""
    words = [word.partition("=") for word in given.split(",")]
    try:
        return {axis: int(size) for axis, _, size in words}
    except ValueError:
        raise ValueError(f"--mesh {given!r} is not AXIS=SIZE,AXIS=SIZE; one size may be -1.") from None


def report(config: dict[str, Any], topology: str, *, phase: int = -1) -> dict[str, Any]:
    """Compiles the update of one phase for a slice and reads what the compiler made of it.

    Args:
      config: as an experiment's `get_config` returns it, in plain dicts; its mesh is laid over the slice.
      topology: a slice by the compiler's name, such as "v5e:16x16".
      phase: which of the config's phases, the last by default.

    Returns:
      Figures by name, bytes and FLOPs per chip. A program that does not fit has `fits` False and `refused`, the
      compiler's own words.

    Raises:
      ValueError: if the config is wrong, or its mesh and batch do not fit the slice.
    """
    from jax.experimental import topologies

    run = train.parse(config)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh, chosen = sharding.make_mesh(run.mesh, devices), run.phases[phase]
    if chosen.batch_size % sharding.batch_ways(mesh):
        raise ValueError(
            f"a batch of {chosen.batch_size} does not cut {sharding.batch_ways(mesh)} ways; change --batch or --mesh."
        )
    tx, _ = train.optimizer_of(run)
    abstract, rows = train.abstract_state(run.stage, tx, mesh), sharding.batch_sharding(mesh)
    shapes = {
        "image": ((chosen.batch_size, chosen.image_size, chosen.image_size, 3), np.uint8),
        "text": ((chosen.batch_size, run.stage.arch.text.context_length), np.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in shapes.items()}
    model_flops = 3 * zoo.forward_flops(run.stage.arch, chosen.image_size) * chosen.batch_size / len(devices)
    figures: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "image_size": chosen.image_size,
        "batch_size": chosen.batch_size,
        "model_flops": model_flops,
    }
    begun = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = train.make_train_step(chosen.stage, tx, abstract).lower(abstract, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = re.search(r"Used [^.]*\.\d+\w? of [^.]*\.\d+\w? hbm[^.]*\.\d*\w*", str(error))
        return figures | {"fits": False, "refused": told[0] if told else str(error)[:300]}
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    return figures | {
        "fits": True,
        "compile_seconds": time.perf_counter() - begun,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "executed_flops": program.total_flops(),
        "collectives": [
            {"kind": kind, "group": group, "count": count, "bytes": moved}
            for (kind, group), (count, moved) in sorted(program.collectives().items())
        ],
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `report` for people."""
    lines = [
        f"{figures['topology']} ({figures['chips']} chips), mesh {figures['mesh']}, "
        f"batch {figures['batch_size']:,} at {figures['image_size']} px; per chip:"
    ]
    if not figures["fits"]:
        advice = "Raise stage.microbatches, cut parameters over more of fsdp, or take a larger slice."
        return "\n".join([*lines, f"  does not fit: {figures['refused']}", f"  {advice}"])
    lines += [
        f"  parameters, optimizer state and batch  {figures['argument_bytes'] / GIB:8.2f} GiB",
        f"  temporaries                            {figures['temporary_bytes'] / GIB:8.2f} GiB",
        f"  model FLOPs of a step                  {figures['model_flops'] / 1e12:8.1f} TFLOPs",
        f"  executed matrix FLOPs                  {figures['executed_flops'] / 1e12:8.1f} TFLOPs, "
        f"{figures['executed_flops'] / figures['model_flops']:.2f} of the model's",
        f"  compiled in                            {figures['compile_seconds']:8.0f} s",
        "  collectives (devices in a group, how many, bytes of results)",
    ]
    for each in figures["collectives"]:
        lines.append(f"    {each['kind']:20} {each['group']:5} {each['count']:7,} {each['bytes'] / 2**20:12,.1f} MiB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE[:ARGS]", help="experiments/X.py")
    parser.add_argument("--topology", required=True, help="a slice, such as v5e:16x16 or v5p:4x4x2")
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="default: the config's")
    parser.add_argument("--batch", type=int, help="global batch; default: the config's")
    parser.add_argument("--phase", type=int, default=-1, help="which phase; default: the last")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures there too")
    args = parser.parse_args(argv)
    try:
        config = config_of(args.config)
        if args.mesh:
            config["mesh"] = mesh_of(args.mesh)
        if args.batch:
            config["batch_size"] = args.batch
            for phase in config["phases"]:
                phase.pop("batch_size", None)
        figures = report(config, args.topology, phase=args.phase)
    except ValueError as error:
        print(f"tpu.aot: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0 if figures["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())

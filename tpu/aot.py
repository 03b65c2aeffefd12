"""Compiles an experiment's very train step for a TPU slice that is not held: what it holds, sends, and may take.

  python -m tpu.aot --config=experiments/pretrain_core.py:G14,micro=8 --topology=v5e:16x16 --mesh data=16,fsdp=16
  python -m tpu.aot --config=experiments/pretrain_core.py:B16 --topology=v5e:4x4 --sweep --html=sweep.html
  python -m tpu.aot --config=experiments/pretrain_core.py:L14 --topology=v5e --smallest

Needs libtpu (`pip install "pe-jax[tpu]"`) and no TPU. Bytes are the compiler's own; FLOPs and collectives are counted
in the compiled program, loops in full; times are estimates with a band (`tpu.estimate`). Nothing is run.
"""

import argparse
import copy
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import jax
import numpy as np

import pe_jax
from pe_jax import hub, sharding, stages, train
from pe_jax.models import zoo
from pe_jax.models.layers import REMAT_POLICIES
from tpu import chips, hlo, page
from tpu.estimate import estimate

GIB = 2**30
# Slices by the compiler's names, the smallest first; v4's, v5p's and tpu7x's are bricks of a torus.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
# What libtpu looks for at start-up; any size of the family will do to compile for all of them.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}


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


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The devices of so many slices of a topology, described by the compiler.

    Raises:
      ValueError: if the compiler does not know the topology.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_ACCELERATOR_TYPE", _ACCELERATORS.get(topology.partition(":")[0], "v5litepod-4"))
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        more["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX runs on v4
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except (jax.errors.JaxRuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"topology {topology!r} is unknown to the compiler ({str(error).splitlines()[0][:120]}); give a kind and "
            "its sides, such as v5e:16x16, v6e:8x8, v4:4x4x4 or v5p:4x4x8."
        ) from None


def report(
    config: Mapping[str, Any],
    topology: str,
    *,
    slices: int = 1,
    phase: int = -1,
    text_to: pathlib.Path | None = None,
    cache: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Compiles the update of one phase for a slice and reads what the compiler made of it.

    Args:
      config: as an experiment's `get_config` returns it, in plain dicts; its mesh is laid over the slice.
      topology: a slice by the compiler's name, such as "v5e:16x16".
      slices: how many of them, joined by the data centre's network.
      phase: which of the config's phases, the last by default.
      text_to: where to write the compiled program's text, to read on.
      cache: a folder that keeps what the compiler made; an unchanged program is read from there. None compiles anew.

    Returns:
      Figures by name; bytes, FLOPs and seconds per chip. A program that does not fit has `fits` False, and `needs`
      and `holds` in bytes.

    Raises:
      ValueError: if the config is wrong, or its mesh and batch do not fit the slice.
    """
    run = train.parse(config)
    devices = devices_of(topology, slices)
    mesh, chosen = sharding.make_mesh(run.mesh, devices), run.phases[phase]
    if chosen.batch_size % sharding.batch_ways(mesh):
        raise ValueError(
            f"a batch of {chosen.batch_size} does not cut {sharding.batch_ways(mesh)} ways; change --batch or --mesh."
        )
    tx, _ = train.optimizer_of(run)
    abstract, batch = train.abstract_state(run.stage, tx, mesh), train.abstract_batch(run, chosen, mesh)
    figures: dict[str, Any] = {
        "topology": topology,
        "slices": slices,
        "chips": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "image_size": chosen.image_size,
        "batch_size": chosen.batch_size,
        "microbatches": getattr(chosen.stage, "microbatches", 1),
        "remat": ", ".join(dict.fromkeys(part.remat for part in _parts(chosen.stage.arch).values())),
        "parameter_bytes": _bytes_on_one(abstract.params),
        "optimizer_bytes": _bytes_on_one(abstract.opt_state),
        "batch_bytes": _bytes_on_one(batch),
        "model_flops": chosen.stage.update_flops(batch) / len(devices),
    }
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = train.make_train_step(chosen.stage, tx, abstract, run.compiler_options).lower(abstract, batch)
    traced = time.perf_counter() - begun
    kept = cache and cache / f"{_key(lowered, topology, slices, run.compiler_options)}.json.gz"
    try:
        made = compiled(lowered, kept=kept)
    except Refused as error:
        return figures | {"fits": False, "compile_seconds": traced + error.seconds} | _refusal(str(error))
    if text_to:
        text_to.write_text(made.text)
    wiring = chips.Wiring.of(list(mesh.devices.flat))
    figures |= {
        "fits": True,
        "compile_seconds": traced + made.seconds,
        "argument_bytes": made.argument_bytes,
        "temporary_bytes": made.temporary_bytes,
        "holds": wiring.chip.hbm,
    }
    program = hlo.Program(made.text)
    guess = estimate(program, wiring)
    return figures | {
        "executed_flops": program.total_flops() + guess.kernel_flops,
        "seconds": guess.seconds,
        "mfu": guess.mfu(figures["model_flops"], wiring.chip.peak),
        "exposed_seconds": guess.exposed,
        "collectives": _collectives(program, mesh),
        "lines": [{"line": line, "seconds": seconds} for line, seconds in guess.lines[:12]],
        "buffers": [
            {"bytes": size, "shape": shape, "line": line} for size, shape, line in program.largest_arrays()[:8]
        ],
    }


class Compiled(NamedTuple):
    """What the compiler made of a program: its scheduled text, and bytes on a device."""

    text: str
    argument_bytes: int
    temporary_bytes: int
    seconds: float  # that it took, the first time


class Refused(Exception):
    """The compiler's words about a program that does not fit, and the seconds it took to find out."""

    def __init__(self, told: str, seconds: float):
        super().__init__(told)
        self.seconds = seconds


def compiled(lowered: jax.stages.Lowered, name: str = "train_step", *, kept: pathlib.Path | None = None) -> Compiled:
    """Compiles, or reads what was kept of the same program; `name` is of the jitted function.

    libtpu 0.0.52 cannot read back programs with collectives on sparse cores (v5p, v6e), neither as text nor from JAX's
    own cache, so what it dumps on the way is read and kept instead; the dump is of text alone and costs seconds.

    Args:
      lowered: a jitted function, lowered for devices of a slice.
      name: of that function.
      kept: a file for the outcome, a refusal too; None keeps nothing.

    Raises:
      Refused: if it does not fit.
    """
    if kept and kept.is_file():
        found = json.loads(gzip.decompress(kept.read_bytes()))
        if "refused" in found:
            raise Refused(found["refused"], found["seconds"])
        return Compiled(**found)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = Refused(str(error), time.perf_counter() - begun)
            _keep(kept, {"refused": str(error), "seconds": refused.seconds})
            raise refused from None
        seconds = time.perf_counter() - begun
        try:
            text = program.as_text()
        except jax.errors.JaxRuntimeError:
            (dumped,) = pathlib.Path(folder).glob(f"*{name}*.after_codegen.txt")
            text = dumped.read_text()
    memory = program.memory_analysis()
    made = Compiled(text, memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds)
    _keep(kept, made._asdict())
    return made


def _keep(file: pathlib.Path | None, what: Mapping[str, Any]) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_bytes(gzip.compress(json.dumps(what).encode(), 1))
        part.replace(file)


def _key(lowered: jax.stages.Lowered, *more: Any) -> str:
    """Of everything that the outcome follows from: the program, options, the compiler, and our source lines."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    digest = hashlib.sha256(repr((lowered.as_text(), more, versions)).encode())
    for file in sorted(pathlib.Path(pe_jax.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _bytes_on_one(tree: Any) -> int:
    """Of an abstract tree with shardings, on one device, before any padding."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _refusal(told: str) -> dict[str, Any]:
    """What a program needs and what a chip has, from the compiler's words."""
    amount = r"\(?([\d.]+)([KMG])\)?"
    found = re.search(rf"(?:Used |temporaries ){amount} (?:of|exceeds available HBM) {amount}", told)
    if not found:
        return {"refused": told[:300]}
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return {"needs": float(found[1]) * unit[found[2]], "holds": float(found[3]) * unit[found[4]]}


def _collectives(program: hlo.Program, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """What is sent, by kind and by the mesh axes it crosses."""
    found: dict[tuple[str, str], list[float]] = {}
    for _, one, times in program.executed():
        for each in program.sends(one):
            places = np.array(np.unravel_index(each.group or (0,), mesh.devices.shape))
            crossed = [axis for axis, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1]
            axes = "dcn" if each.between_slices else "·".join(crossed) or "-"
            row = found.setdefault((each.kind, axes), [0, 0.0])
            row[0] += times
            row[1] += times * each.moved
    return [
        {"kind": kind, "axes": axes, "count": int(count), "bytes": moved}
        for (kind, axes), (count, moved) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def table(figures: Mapping[str, Any]) -> str:
    """The figures of `report` for people."""
    several = f"{figures['slices']} slices of " if figures["slices"] > 1 else ""
    lines = [
        f"{several}{figures['topology']}, {figures['chips']} chips as {figures['mesh']}: "
        f"batch {figures['batch_size']:,} at {figures['image_size']} px, {figures['microbatches']} micro-batches, "
        f"remat {figures['remat']}; per chip:",
        f"  parameters        {figures['parameter_bytes'] / GIB:8.2f} GiB",
        f"  optimizer state   {figures['optimizer_bytes'] / GIB:8.2f} GiB",
        f"  batch             {figures['batch_bytes'] / GIB:8.2f} GiB",
    ]
    if not figures["fits"]:
        return "\n".join([*lines, f"  does not fit: {_told(figures)}", f"  {ADVICE}"])
    whole = figures["argument_bytes"] + figures["temporary_bytes"]
    lines += [
        f"  temporaries       {figures['temporary_bytes'] / GIB:8.2f} GiB",
        f"  together          {whole / GIB:8.2f} of {figures['holds'] / GIB:.2f} GiB, "
        f"{1 - whole / figures['holds']:.0%} to spare",
        f"  compiled in       {figures['compile_seconds']:8.0f} s",
    ]
    mfu, seconds = figures["mfu"], figures["seconds"]
    lines += [
        f"  model FLOPs       {figures['model_flops'] / 1e12:8.4g} T; executed "
        f"{figures['executed_flops'] / figures['model_flops']:.2f} times as many",
        f"  step              {seconds['middle']:8.3g} s estimated ({seconds['roofline']:.3g} at the roofline, "
        f"{seconds['cycles']:.3g} by the compiler's cycles)",
        f"  MFU               {mfu['middle']:8.1%} estimated ({mfu['cycles']:.1%} to {mfu['roofline']:.1%})",
        f"  waiting for links {figures['exposed_seconds'] / seconds['middle']:8.1%} of the step",
        "  collectives (over which axes, how many, bytes of the arrays)",
    ]
    for each in figures["collectives"]:
        lines.append(f"    {each['kind']:18} {each['axes']:12} {each['count']:7,} {each['bytes'] / 2**20:12,.1f} MiB")
    lines.append("  where the time goes")
    for each in figures["lines"]:
        lines.append(f"    {each['seconds'] / seconds['middle']:6.1%}  {each['line']}")
    lines.append("  the largest arrays")
    for each in figures["buffers"]:
        lines.append(f"    {each['bytes'] / 2**20:10,.0f} MiB  {each['shape']}  {each['line']}")
    return "\n".join(lines)


ADVICE = "Raise stage.microbatches, take a remat that keeps less, cut over more of fsdp, or take a larger slice."


def _told(figures: Mapping[str, Any]) -> str:
    if "needs" not in figures:
        return figures["refused"]
    needs, holds = figures["needs"], figures["holds"]
    return f"it needs {needs / GIB:.2f} GiB of {holds / GIB:.2f}, {(needs - holds) / GIB:.2f} too many."


def changed(config: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """The config with another mesh, batch, remat of all towers, or number of micro-batches; None leaves it."""
    new = copy.deepcopy(dict(config))
    if given.get("mesh"):
        new["mesh"] = given["mesh"]
    if given.get("batch"):
        new["batch_size"] = given["batch"]
        for phase in new["phases"]:
            phase.pop("batch_size", None)
    if given.get("micro"):
        new["stage"]["microbatches"] = given["micro"]
    if given.get("remat"):
        arch = stages.create(new["stage"]).arch
        new["stage"]["arch"] = fields = zoo.to_dict(arch)
        for part in _parts(arch):
            (fields[part] if part else fields)["remat"] = given["remat"]
    return new


def _parts(arch: zoo.Architecture) -> dict[str, Any]:
    """The towers of an architecture by their names in it; one that is a tower itself has the name ""."""
    if hasattr(arch, "remat"):
        return {"": arch}
    fields = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    return {name: part for name, part in fields.items() if hasattr(part, "remat")}


def _width(config: Mapping[str, Any]) -> int:
    """What the fsdp axis must divide: all widths, or at least the greatest number that divides them."""
    return math.gcd(*(part.width for part in _parts(train.parse(config).stage.arch).values()))


def sweep(
    config: Mapping[str, Any], topology: str, *, slices: int = 1, phase: int = -1, cache: pathlib.Path | None = None
) -> Iterator[dict[str, Any]]:
    """Reports of meshes x remat policies x micro-batches.

    A policy that keeps less is tried only where one that keeps more did not fit, and more micro-batches only where the
    policy that keeps most did not: both would only be slower.
    """
    count, width = len(devices_of(topology, slices)), _width(config)
    for fsdp in [2**i for i in range(count.bit_length()) if 2**i <= count and width % 2**i == 0]:
        mesh = {"dcn": slices, "data": -1, "fsdp": fsdp}
        for micro in (1, 2, 4, 8, 16, 32, 64):
            fitted = None
            for remat in REMAT_POLICIES:
                try:
                    tried = changed(config, mesh=mesh, micro=micro, remat=remat)
                    figures = report(tried, topology, slices=slices, phase=phase, cache=cache)
                except ValueError:  # this batch does not cut so
                    continue
                yield figures
                if figures["fits"]:
                    fitted = remat
                    break
            if fitted == next(iter(REMAT_POLICIES)):
                break


def _speed(figures: Mapping[str, Any]) -> float:
    return figures["seconds"]["middle"]


def ranked(reports: list[dict[str, Any]]) -> str:
    """One line for each report, the fastest first; then what does not fit."""
    fitting = sorted((r for r in reports if r["fits"]), key=_speed)
    lines = ["   MFU     band          step     GiB   chips  mesh, micro-batches, remat"]
    for r in fitting:
        mfu, whole = r["mfu"], (r["argument_bytes"] + r["temporary_bytes"]) / GIB
        band = f"{mfu['cycles']:.1%}-{mfu['roofline']:.1%}"
        how = f"{r['mesh']}, {r['microbatches']}, {r['remat']}"
        lines.append(f"{mfu['middle']:6.1%}  {band:13} {_speed(r):7.3f} s {whole:6.2f} {r['chips']:6}  {how}")
    for r in reports:
        if not r["fits"]:
            lines.append(f"  does not fit: {r['mesh']}, {r['microbatches']}, {r['remat']}: {_told(r)}")
    return "\n".join(lines)


def smallest(
    config: Mapping[str, Any], kind: str, *, phase: int = -1, cache: pathlib.Path | None = None
) -> Iterator[dict[str, Any]]:
    """Reports of ever larger slices, parameters cut over all chips (as far as they divide), until one fits.

    Raises:
      ValueError: for a kind of chip whose slices are not known.
    """
    if kind not in SLICES:
        raise ValueError(f"--topology={kind}: with --smallest give a kind of chip, one of {', '.join(SLICES)}.")
    width = _width(config)
    for sides in SLICES[kind]:
        topology = f"{kind}:{sides}"
        count = len(devices_of(topology))
        fsdp = max(2**i for i in range(count.bit_length()) if width % 2**i == 0 and count % 2**i == 0)
        try:
            figures = report(changed(config, mesh={"data": -1, "fsdp": fsdp}), topology, phase=phase, cache=cache)
        except ValueError as error:
            if "does not cut" not in str(error):
                raise
            continue
        yield figures
        if figures["fits"]:
            return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE[:ARGS]", help="experiments/X.py")
    parser.add_argument("--topology", required=True, help="a slice, such as v5e:16x16; with --smallest a kind, v5e")
    parser.add_argument("--slices", type=int, default=1, help="how many, joined by the data centre's network")
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="default: the config's")
    parser.add_argument("--batch", type=int, help="global batch; default: the config's")
    parser.add_argument("--micro", type=int, help="micro-batches of an update; default: the config's")
    parser.add_argument(
        "--remat", choices=list(REMAT_POLICIES), help="what backward passes keep; default: the config's"
    )
    parser.add_argument("--phase", type=int, default=-1, help="which phase; default: the last")
    parser.add_argument("--sweep", action="store_true", help="try meshes, remat policies and micro-batches; rank them")
    parser.add_argument("--smallest", action="store_true", help="find the smallest slice of a kind that it fits")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures there too")
    parser.add_argument("--text", metavar="FILE", type=pathlib.Path, help="write the compiled program there too")
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write a page with plots there too")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        default=str(hub.cache() / "aot"),
        help="keeps compiled programs, so that what did not change is not compiled again; '' keeps none (%(default)s)",
    )
    args = parser.parse_args(argv)
    cache = pathlib.Path(args.cache) if args.cache else None
    try:
        mesh = mesh_of(args.mesh) if args.mesh else None
        config = changed(config_of(args.config), mesh=mesh, batch=args.batch, micro=args.micro, remat=args.remat)
        if args.smallest:
            tries = smallest(config, args.topology, phase=args.phase, cache=cache)
        elif args.sweep:
            tries = sweep(config, args.topology, slices=args.slices, phase=args.phase, cache=cache)
        else:
            where = {"slices": args.slices, "phase": args.phase, "text_to": args.text, "cache": cache}
            tries = iter([report(config, args.topology, **where)])
        reports = []
        for figures in tries:
            reports.append(figures)
            if args.sweep or args.smallest:
                told = f"{figures['mfu']['middle']:.1%}" if figures["fits"] else "does not fit"
                print(
                    f"tried {figures['topology']} {figures['mesh']}, {figures['microbatches']} micro-batches, remat "
                    f"{figures['remat']}: {told} ({figures['compile_seconds']:.0f} s)",
                    flush=True,
                )
    except ValueError as error:
        print(f"tpu.aot: {error}", file=sys.stderr)
        return 2
    if not reports:
        print("tpu.aot: no choice cuts this batch; change --batch.", file=sys.stderr)
        return 2
    best = min((r for r in reports if r["fits"]), key=_speed, default=reports[-1])
    if len(reports) > 1:
        print(ranked(reports))
    print(table(best))
    if args.json:
        args.json.write_text(json.dumps(reports if len(reports) > 1 else best, indent=2))
    if args.html:
        args.html.write_text(page.of(args.config, reports, best))
    return 0 if best["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())

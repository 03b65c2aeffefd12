"""Forward speed beside Meta's module in PyTorch: PERCEPTION_MODELS=DIR python -m benchmarks.forward

Runs in the environment of `make parity` (README.md beside this). Every program is a worker process that lives through
the whole run, with the same weights and images; they take turns (A B C A B C ...), one forward each, and a round in
which other processes used more than `--busy` of the machine is thrown away. Reported is the median over rounds of
ours / theirs in the same round, so that slow drifts of the machine cancel, with its quartiles.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
MODELS = ("PE-Core-T16-384", "PE-Core-B16-224")
PEERS = ("meta", "meta-compiled", "timm")


# ------------------------------------------------------------------------------------------------------------ workers


def work(program: str, name: str, batch: int) -> None:
    """A worker: answers each line on stdin by one forward, with its seconds and its output's first numbers as JSON."""
    from pe_jax.models import zoo
    from tests.golden import weights

    reply, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    config = zoo.architecture(name).vision
    images = weights.images(1, batch, config.image_size, config.image_size, 3)
    start = time.perf_counter()
    run = {"ours": _ours, "meta": _meta, "meta-compiled": _meta, "timm": _timm}[program](
        config, weights.tensors(config), images, program
    )
    run(), run()
    print(json.dumps({"ready_s": time.perf_counter() - start}), file=reply, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - start
        print(json.dumps({"s": seconds, "out": np.asarray(out)[:, :4].tolist()}), file=reply, flush=True)


def _ours(config: Any, tensors: Any, images: np.ndarray, _: str) -> Callable[[], Any]:
    import jax
    from flax import nnx

    from pe_jax.convert import pe
    from pe_jax.models import zoo
    from pe_jax.types import split

    graphdef, _ = split(zoo.abstract(config))
    params, x = jax.device_put((pe.to_params(tensors, config, layout="meta"), images))
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    return lambda: jax.block_until_ready(run(params, x))


def _meta(config: Any, tensors: Any, images: np.ndarray, program: str) -> Callable[[], Any]:
    import torch

    from tests.parity import conftest, reference

    assert conftest  # makes torchvision importable beside a CPU torch
    sys.path.insert(0, os.environ["PERCEPTION_MODELS"])
    from core.vision_encoder import pe

    module = reference.build(pe, config)
    module.load_state_dict({key: torch.from_numpy(np.asarray(x)) for key, x in tensors.items()})
    return _torch(module, images, compiled=program == "meta-compiled")


def _timm(config: Any, tensors: Any, images: np.ndarray, _: str) -> Callable[[], Any]:
    import torch

    from tests.parity import conftest

    assert conftest
    import timm
    from timm.models.eva import _convert_pe

    size = {192: "tiny", 384: "small", 768: "base"}[config.width]
    name = f"vit_pe_core_{size}_patch{config.patch_size}_{config.image_size}"
    module = timm.create_model(name, pretrained=False, num_classes=config.output_width).eval()
    module.load_state_dict(_convert_pe({key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}, None, ""))
    return _torch(module, images, compiled=False)


def _torch(module: Any, images: np.ndarray, *, compiled: bool) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.from_numpy(images).movedim(-1, 1).contiguous()
    run = torch.compile(module) if compiled else module

    def forward() -> Any:
        with torch.inference_mode():
            return run(x).numpy()

    return forward


# --------------------------------------------------------------------------------------------------------------- host


class Worker:
    def __init__(self, program: str, name: str, batch: int):
        command = [
            sys.executable,
            "-m",
            "benchmarks.forward",
            "--worker",
            program,
            "--model",
            name,
            "--batch",
            str(batch),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready_s = self._answer()["ready_s"]

    def run(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def cpu_s(self) -> float:
        return _cpu_of(self.process.pid)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died with exit code {self.process.wait()}; its error is above.")
        return json.loads(line)


def _cpu_of(process: int | str) -> float:
    """CPU seconds a process has used (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_machine() -> float:
    """CPU seconds all cores have spent on anything but waiting (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(name: str, programs: list[str], batch: int, pairs: int, busy: float, patience: int) -> dict[str, Any]:
    """Rounds of one forward per program, until `pairs` were quiet or `patience` times as many have run."""
    workers = {}
    for program in programs:
        workers[program] = Worker(program, name, batch)
        print(f"  {program}: ready in {workers[program].ready_s:.0f} s", flush=True)
    outputs = {program: np.asarray(worker.run()["out"]) for program, worker in workers.items()}
    for program, out in outputs.items():
        off = np.abs(out - outputs["ours"]).max() / np.abs(out).max()
        assert off < 1e-4, f"{program} does not compute what ours does: {off:.1e}"
    rounds, noisy = [], []
    while len(rounds) < pairs and len(rounds) + len(noisy) < patience * pairs:
        own, machine, start = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self"), _cpu_of_machine(), time.time()
        times = {program: worker.run()["s"] for program, worker in workers.items()}
        own = sum(w.cpu_s() for w in workers.values()) + _cpu_of("self") - own
        others = (_cpu_of_machine() - machine - own) / ((time.time() - start) * (os.cpu_count() or 1))
        (rounds if others <= busy else noisy).append(times | {"others": max(others, 0.0)})
    for worker in workers.values():
        worker.stop()
    quiet = len(rounds) >= min(pairs, 5)
    used = rounds if quiet else rounds + noisy
    result: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "rounds": len(used),
        "thrown_away": len(noisy),
        "quiet": quiet,
    }
    for program, worker in workers.items():
        result[program] = {"median_s": statistics.median(r[program] for r in used), "ready_s": worker.ready_s}
        if program != "ours":
            low, middle, high = np.percentile([r["ours"] / r[program] for r in used], [25, 50, 75])
            result[program] |= {"ours_over_it": middle, "quartiles": [low, high]}
    return result | {"all": used}


def compile_s(name: str) -> dict[str, Any]:
    """Seconds to trace and to compile a scanned forward, from shapes alone."""
    import jax
    from flax import nnx

    from pe_jax.models import zoo
    from pe_jax.types import split

    config = zoo.architecture(name).vision
    graphdef, params = split(zoo.abstract(config))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    x = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    start = time.perf_counter()
    lowered = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)).lower(params, x)
    middle = time.perf_counter()
    lowered.compile()
    return {"model": name, "lower_s": middle - start, "compile_s": time.perf_counter() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: both")
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: all; may be given again")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15, help="quiet rounds wanted")
    parser.add_argument("--busy", type=float, default=0.1, help="share of the machine that others may use in a round")
    parser.add_argument("--patience", type=int, default=3, help="rounds tried at most, in multiples of --pairs")
    parser.add_argument("--no-compile-time", action="store_true", help="leave out the compile time of G14-448")
    parser.add_argument("--no-save", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.model[0], args.batch)
    if not os.environ.get("PERCEPTION_MODELS"):
        parser.error("set PERCEPTION_MODELS to a checkout of github.com/facebookresearch/perception_models")
    programs = ["ours", *(args.peer or PEERS)]
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "versions": {package: metadata.version(package) for package in ("jax", "flax", "torch", "timm", "numpy")},
        "forward": [],
    }
    if not args.no_compile_time:
        report["compile"] = compile_s("PE-Core-G14-448")
        print("{model}: traced in {lower_s:.1f} s, compiled in {compile_s:.1f} s".format(**report["compile"]))
    for name in args.model or MODELS:
        print(f"{name}, batch {args.batch}, float32, forward", flush=True)
        result = measure(name, programs, args.batch, args.pairs, args.busy, args.patience)
        report["forward"].append(result)
        for program in programs:
            it = result[program]
            ratio = ""
            if program != "ours":
                ratio = "ours / it {:.3f} (quartiles {:.3f} to {:.3f})".format(it["ours_over_it"], *it["quartiles"])
            print(f"  {program:14} {1e3 * it['median_s']:7.0f} ms   {ratio}")
        state = "" if result["quiet"] else "; THE MACHINE WAS BUSY: do not quote these"
        print(f"  {result['rounds']} rounds used, {result['thrown_away']} too noisy{state}", flush=True)
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"forward-{report['date'][:16].replace(':', '')}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Forward speed beside Meta's module in PyTorch: PERCEPTION_MODELS=DIR python -m benchmarks.forward

Runs in the environment of `make parity` (README.md beside this), with the same weights and images on all sides.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns

MODELS = ("PE-Core-T16-384", "PE-Core-B16-224")
PEERS = ("meta", "meta-compiled", "timm")


def prepare(program: str, name: str, batch: int) -> Callable[[], Any]:
    """What a worker runs: one forward, giving its output's first numbers."""
    from pe_jax.models import zoo
    from tests.golden import weights

    config = zoo.architecture(name).vision
    images = weights.images(1, batch, config.image_size, config.image_size, 3)
    run = {"ours": _ours, "meta": _meta, "meta-compiled": _meta, "timm": _timm}[program](
        config, weights.tensors(config), images, program
    )
    return lambda: np.asarray(run())[:, :4].tolist()


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


def same(found: Mapping[str, Any]) -> None:
    ours = np.asarray(found["ours"])
    for program, out in found.items():
        off = np.abs(np.asarray(out) - ours).max() / np.abs(ours).max()
        assert off < 1e-4, f"{program} does not compute what ours does: {off:.1e}"


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
    turns.add_arguments(parser)
    parser.add_argument("--no-compile-time", action="store_true", help="leave out the compile time of G14-448")
    args = parser.parse_args()
    if args.worker:
        return turns.serve(lambda: prepare(args.worker, args.model[0], args.batch))
    if not os.environ.get("PERCEPTION_MODELS"):
        parser.error("set PERCEPTION_MODELS to a checkout of github.com/facebookresearch/perception_models")
    programs = ["ours", *(args.peer or PEERS)]
    report = turns.report("jax", "flax", "torch", "timm", "numpy") | {"forward": []}
    if not args.no_compile_time:
        report["compile"] = compile_s("PE-Core-G14-448")
        print("{model}: traced in {lower_s:.1f} s, compiled in {compile_s:.1f} s".format(**report["compile"]))
    for name in args.model or MODELS:
        print(f"{name}, batch {args.batch}, float32, forward", flush=True)
        arguments = ("--model", name, "--batch", str(args.batch))
        result = turns.measure("benchmarks.forward", programs, arguments, args, same)
        report["forward"].append({"model": name, "batch": args.batch} | result)
        turns.show(result, programs, "ms", lambda s: f"{1e3 * s:.0f}")
    if not args.no_save:
        turns.save("forward", report)


if __name__ == "__main__":
    main()

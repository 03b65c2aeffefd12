"""Forward speed of the image tower beside Meta's module and timm's in PyTorch: python -m benchmarks.forward

Runs in the environment of `make parity`, with the same weights and images on all sides. Set PERCEPTION_MODELS to a
checkout of Meta's repository. The last case has no peer: how long a scanned forward of G14 takes to trace and compile.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.results import OURS

META, COMPILED, TIMM = "Meta's module", "Meta's, torch.compile", "timm"
Side = tuple[Callable[[], Any], dict[str, Any]]  # a forward, and what `turns` should know of it


def prepare(
    side: Callable[..., Side],
    model: Any,
    batch: int,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 1,
    compiling: bool = False,
) -> Callable[[], Any]:
    """What a worker runs: forwards, giving the first numbers of the last one's embeddings.

    Args:
      side: builds a program from the tower's configuration, weights in Meta's layout, images and the device.
      model: as `zoo.architecture` takes it; of two towers the image one.
      batch: images at a time.
      dtype: of parameters and activations.
      device: where both frameworks run, "cpu" or "cuda".
      repeats: forwards in a row, which a GPU is given without waiting for each.
      compiling: instead of forwards, traces and compiles ours from shapes alone.
    """
    from pe_jax.models import zoo
    from tests.golden import weights

    config = zoo.architecture(model)
    config = dataclasses.replace(getattr(config, "vision", config), dtype=dtype)
    if compiling:
        return _compile(config, batch)
    images = weights.images(1, batch, config.image_size, config.image_size, 3)
    forward, known = side(config, weights.tensors(config), images, device)

    def run() -> dict[str, Any]:
        start = turns.clock()
        for _ in range(repeats - 1):
            forward()
        found = forward()[:, :4]
        found = found.float().cpu().numpy() if hasattr(found, "cpu") else np.asarray(found, np.float32)
        return {"seconds": (turns.clock() - start) / repeats, "numbers": found.tolist()} | known

    return run


def _ours(config: Any, tensors: Any, images: np.ndarray, device: str) -> Side:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pe_jax import metrics
    from pe_jax.convert import pe
    from pe_jax.models import zoo
    from pe_jax.types import split

    graphdef, _ = split(zoo.abstract(config))
    params = pe.to_params(tensors, config, layout="meta", dtype=jnp.dtype(config.dtype))
    assert jax.default_backend() == ("gpu" if device == "cuda" else device)
    params, x = jax.device_put((params, images.astype(jnp.dtype(config.dtype))))
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    known = {"flops": len(images) * zoo.forward_flops(config), "peak_flops": metrics.peak_flops()}
    return lambda: run(params, x), known


def _meta(config: Any, tensors: Any, images: np.ndarray, device: str, *, compiled: bool) -> Side:
    import torch

    from tests.parity import conftest, reference

    assert conftest  # makes torchvision importable beside a CPU torch
    sys.path.insert(0, os.environ["PERCEPTION_MODELS"])
    from core.vision_encoder import pe  # pyright: ignore[reportMissingImports]

    module = reference.build(pe, config)
    module.load_state_dict({key: torch.from_numpy(np.asarray(x)) for key, x in tensors.items()})
    return _torch(module, config, images, device, compiled=compiled)


def _timm(config: Any, tensors: Any, images: np.ndarray, device: str) -> Side:
    import torch

    from tests.parity import conftest

    assert conftest
    import timm
    from timm.models.eva import _convert_pe

    like = {192: "tiny_patch16_384", 384: "small_patch16_384", 768: "base_patch16_224"}[config.width]
    module = timm.create_model(
        f"vit_pe_core_{like}", num_classes=config.output_width, img_size=config.image_size, depth=config.depth
    ).eval()
    state = {key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}
    module.load_state_dict(_convert_pe(state, module, ""))
    return _torch(module, config, images, device, compiled=False)


def _torch(module: Any, config: Any, images: np.ndarray, device: str, *, compiled: bool) -> Side:
    import torch

    torch.set_num_threads(turns.cores())
    dtype = getattr(torch, config.dtype)
    x = torch.from_numpy(images).movedim(-1, 1).contiguous().to(device, dtype)
    module = module.to(device, dtype)
    run = torch.compile(module) if compiled else module

    def forward() -> Any:
        with torch.inference_mode():
            return run(x)

    return forward, {}


def _compile(config: Any, batch: int) -> Callable[[], Any]:
    import jax
    from flax import nnx

    from pe_jax.models import zoo
    from pe_jax.types import split

    jax.config.update("jax_enable_compilation_cache", False)
    graphdef, params = split(zoo.abstract(config))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    x = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), np.float32)

    def run() -> None:
        jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)).lower(params, x).compile()

    return run


def same(found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if found[OURS] is None:  # only compiled
        return
    ours = np.asarray(found[OURS]["numbers"])
    tolerance = 1e-4 if settings.get("dtype", "float32") == "float32" else 5e-2
    for program, out in found.items():
        off = np.abs(np.asarray(out["numbers"]) - ours).max() / np.abs(ours).max()
        assert off < tolerance, f"{program} does not compute what ours does: {off:.1e} off, {tolerance} is allowed"


def _case(name: str, model: Any, batch: int, *peers: str) -> turns.Case:
    return turns.Case(f"{name}, {batch} images, float32", {"model": model, "batch": batch}, (OURS, *peers))


def _program(side: Callable[..., Side], *needs: str, **how: Any) -> turns.Program:
    run = functools.partial(prepare, functools.partial(side, **how))
    return turns.Program(run, needs, slow=how.get("compiled", False))


GIANT = {"model": "PE-Core-G14-448", "batch": 1, "compiling": True}
SMALL = {"base": "PE-Core-T16-384", "vision": {"depth": 2, "image_size": 64}}
TORCH = ("torch", "torchvision", "timm")
BENCHMARK = turns.Benchmark(
    "forward",
    __doc__ or "",
    {
        OURS: _program(_ours),
        META: _program(_meta, *TORCH, "PERCEPTION_MODELS", compiled=False),
        COMPILED: _program(_meta, *TORCH, "PERCEPTION_MODELS", compiled=True),
        TIMM: _program(_timm, *TORCH),
    },
    cases=(
        _case("PE-Core-T16-384", "PE-Core-T16-384", 8, META, COMPILED, TIMM),
        _case("PE-Core-B16-224", "PE-Core-B16-224", 8, META, COMPILED, TIMM),
        turns.Case("PE-Core-G14-448, tracing and compiling", GIANT, (OURS,)),
    ),
    # timm counts rotary positions by the native grid, so at another size it is another model
    quick=(_case("PE-Core-T16-384 cut to 2 blocks and 64 px", SMALL, 2, META, COMPILED),),
    same=same,
    packages=("jax", "flax", "torch", "timm", "numpy"),
    memory=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

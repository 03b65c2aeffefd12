"""The contrastive loss and its gradients beside open_clip's ClipLoss in PyTorch: python -m benchmarks.loss

Value and gradients with respect to both sides and the logit scale, float32, on one CPU. Ours is plain, all logits in
memory, or chunked, which computes them a chunk at a time and again in the backward pass. The memory is what a process
grows by in a run, the gradients that it gives included.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.results import OURS

OPEN_CLIP = "open_clip"
LOG_SCALE = float(np.log(50))


def pairs(batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, float32, in which a caption is nearer to its own image than to the others."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, width), np.float32)
    text = image + 8 * rng.standard_normal((batch, width), np.float32)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image, text


def _ours(batch: int, width: int, chunk: int | None = None) -> Callable[[], Any]:
    import jax

    from pe_jax import losses

    def loss(image: Any, text: Any, log_scale: Any) -> Any:
        if chunk is None:
            return losses.info_nce(image, text, log_scale)[0]
        return losses.info_nce_chunked(image, text, log_scale, chunk=chunk)[0]

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    inputs = jax.device_put((*pairs(batch, width), np.float32(LOG_SCALE)))

    def run() -> Any:
        return jax.block_until_ready(step(*inputs))

    return lambda: _told(*run())


def _open_clip(batch: int, width: int, chunk: int | None = None) -> Callable[[], Any]:
    """`chunk` is ours alone: ClipLoss has all logits in memory."""
    import torch

    from tests.parity import conftest

    assert conftest  # makes torchvision importable beside a CPU torch
    import open_clip

    torch.set_num_threads(turns.cores())
    loss_of = open_clip.ClipLoss()
    inputs = [torch.from_numpy(np.array(x)) for x in (*pairs(batch, width), np.float32(LOG_SCALE))]

    def run() -> Any:
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = loss_of(leaves[0], leaves[1], leaves[2].exp())
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    return lambda: _told(*run())


def _told(loss: Any, grads: Any) -> dict[str, Any]:
    """A loss, and of its gradients what can be compared without sending them: norms and some numbers."""
    image, text, scale = (np.asarray(grad) for grad in grads)
    some = [float(x) for grad in (image, text) for x in (np.linalg.norm(grad), *grad[:2, :4].ravel())]
    return {"loss": float(loss), "gradients": [*some, float(scale)]}


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    ours = found[OURS]
    for program, out in found.items():
        assert abs(out["loss"] / ours["loss"] - 1) < 1e-5, f"{program}: a loss of {out['loss']}, ours {ours['loss']}"
        theirs, own = np.array(out["gradients"]), np.array(ours["gradients"])
        off = np.abs(theirs - own).max() / np.abs(own).max()
        assert np.allclose(theirs, own, rtol=1e-3, atol=1e-7), f"{program}: gradients differ from ours by {off:.1e}"


def _case(batch: int, width: int, chunk: int | None) -> turns.Case:
    form = "plain" if chunk is None else f"chunks of {chunk:,}"
    settings = {"batch": batch, "width": width, "chunk": chunk}
    return turns.Case(f"{batch:,} pairs x {width:,}, {form}", settings, (OURS, OPEN_CLIP))


BENCHMARK = turns.Benchmark(
    "loss",
    __doc__ or "",
    {
        OURS: turns.Program(_ours),
        OPEN_CLIP: turns.Program(_open_clip, ("torch", "torchvision", "open_clip")),
    },
    cases=[_case(batch, 1024, chunk) for batch in (2048, 8192) for chunk in (None, 1024)],
    quick=[_case(256, 64, chunk) for chunk in (None, 96)],
    same=same,
    packages=("jax", "torch", "open_clip_torch", "numpy"),
    memory=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

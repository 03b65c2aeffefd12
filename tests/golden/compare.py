"""Our side of every comparison with a reference, and the one measure of how far two results are apart.

A comparison is of named outputs and of the gradients of ONE scalar, the outputs' sum with weights of the written rule,
by every parameter (in Meta's names) and by the floating inputs. The reference's side does the same in PyTorch
(`tests/parity/reference.py`), live or stored (`make.py`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pe_jax.convert import pe
from pe_jax.models import zoo
from pe_jax.types import split
from tests.golden import weights

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-4  # of `error`, everywhere


def error(got: Any, want: Any) -> float:
    """Relative error of a tensor: the larger of ‖got - want‖/‖want‖ and max|got - want|/max|want|, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"got shape {got.shape}, want {want.shape}"
    if not np.any(want):
        return 0.0 if not np.any(got) else math.inf
    off = got - want
    return float(max(np.linalg.norm(off) / np.linalg.norm(want), np.abs(off).max() / np.abs(want).max()))


def output_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of output `name` in the scalar; scaled so that every output has a like share of it."""
    return np.asarray(weights.noise(7, f"weights of {name}", shape) / np.float32(math.prod(shape) ** 0.5))


def summary(name: str, gradient: Any) -> np.ndarray:
    """What a golden file keeps of a gradient: [4], its norm and its products with three noises of the rule.

    A noise has variance 1, so a difference from the true gradient shows in the products at about its own norm.
    """
    flat = np.asarray(gradient, np.float64).ravel()
    noises = [weights.noise(8, f"noise {i} for {name}", flat.shape).astype(np.float64) for i in range(3)]
    return np.array([np.linalg.norm(flat), *(flat @ noise for noise in noises)])


def evaluate(
    spec: Any,
    tensors: Mapping[str, np.ndarray],
    forward: Callable[..., dict[str, jax.Array]],
    *inputs: np.ndarray,
    gradients: bool = True,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[Arrays, Arrays]:
    """Outputs of `forward(model, *inputs)` in float32, and gradients by parameters (Meta's names) and `input i`."""
    config = zoo.architecture(spec)
    graphdef, _ = split(zoo.abstract(config))
    params = pe.to_params(tensors, config, layout="meta")
    floating = [i for i, x in enumerate(inputs) if np.issubdtype(x.dtype, np.floating)]

    def scalar(params: Any, moving: list[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        whole: list[Any] = list(inputs)
        for i, x in zip(floating, moving, strict=True):
            whole[i] = x
        outputs = forward(nnx.merge(graphdef, params), *whole)
        return sum(jnp.vdot(output_weights(name, x.shape), x) for name, x in outputs.items()), outputs

    run = jax.grad(scalar, argnums=(0, 1), has_aux=True) if gradients else scalar
    run = jax.jit(run, compiler_options=compiler_options)
    first, outputs = run(params, [jnp.asarray(inputs[i]) for i in floating])
    outputs = {name: np.asarray(x) for name, x in outputs.items()}
    if not gradients:
        return outputs, {}
    named = pe.from_params(first[0], config, "meta")
    return outputs, named | {f"input {i}": np.asarray(x) for i, x in zip(floating, first[1], strict=True)}


def embedding(model: Any, images: jax.Array) -> dict[str, jax.Array]:
    """What the vision tower returns when called: embeddings, or the last tokens where it has no head."""
    return {"embedding": _vision(model)(images)}


def features(*layers: int) -> Callable[..., dict[str, jax.Array]]:
    """Forward to the tokens after each of `layers`, all in one pass."""

    def forward(model: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {f"layer {k}": x for k, x in _vision(model).features(images, layers=layers).items()}

    return forward


def text(model: Any, ids: jax.Array) -> dict[str, jax.Array]:
    return {"text": model.encode_text(ids, normalize=False)}


def pair(model: Any, images: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(("image", "text", "scale"), model(images, ids), strict=True))


def video(normalize: bool) -> Callable[..., dict[str, jax.Array]]:
    def forward(model: Any, videos: jax.Array) -> dict[str, jax.Array]:
        return {"video": model.encode_video(videos, normalize=normalize)}

    return forward


def _vision(model: Any) -> Any:
    return getattr(model, "vision", model)

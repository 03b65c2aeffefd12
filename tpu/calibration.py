"""What the estimate predicts where the answer is known: single products, and language models with published MFU.

  python -m tpu.calibration      (minutes; needs libtpu, no TPU)

Published: MaxText's runtime figures for v5e-256 (its configs/v5e, models of 16 and 32 billion parameters, 2,048 tokens,
batch of 6 and 4 a chip, everything computed again in the backward pass). The model here is written for this page from
their sizes alone: pre-norm blocks with RMSNorm, rotary positions, causal attention, gated MLP, Adam, every weight cut
over all chips.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

from tpu import aot, chips, hlo  # first: it sets what libtpu looks for
from tpu.estimate import estimate

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import optax  # isort: skip

from pe_jax import sharding, train
from pe_jax.models import attention_tpu

TOKENS, VOCABULARY, HEAD_DIM = 2048, 32_000, 128


@dataclasses.dataclass(frozen=True)
class Published:
    """A language model and what was measured with it."""

    name: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    batch: int  # examples a chip
    topology: str
    mfu: float

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, stacked over the blocks; what is cut over the chips is the axis of size `width`."""
        d, inner = self.width, self.heads * HEAD_DIM
        blocks = {"qkv": (d, 3 * inner), "out": (inner, d), "up": (d, 2 * self.mlp_width), "down": (self.mlp_width, d)}
        stacked = {name: (self.depth, *shape) for name, shape in blocks.items()}
        return stacked | {
            "norm1": (self.depth, d),
            "norm2": (self.depth, d),
            "norm": (d,),
            "embedding": (VOCABULARY, d),
        }

    @property
    def flops(self) -> float:
        """Of an update for each chip, counted as MaxText did: attention in full, though it is causal."""
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        attention = 12 * self.depth * self.heads * HEAD_DIM * TOKENS
        return float((6 * weights + attention) * TOKENS * self.batch)


MODELS = (
    Published("16B", 4096, 32, 64, 28_672, 6, "v5e:16x16", 0.6110),
    Published("32B", 8192, 32, 64, 28_672, 4, "v5e:16x16", 0.6686),
)
# [rows, contracted] x [contracted, columns]: PE-G's widest product at 64 images, and its two gradients.
PRODUCTS = ((16_384, 1536, 8960), (1536, 16_384, 8960), (16_384, 8960, 1536))


def update_of(model: Published, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The jitted update, and the abstract state and batch that it takes."""
    # Each weight is cut along the axis of the model's width, which is its last one or the one before.
    last = ("out", "down", "norm1", "norm2", "norm", "embedding")
    cut = {
        name: jax.NamedSharding(mesh, jax.P(*[None] * (len(shape) - (1 if name in last else 2)), "fsdp"))
        for name, shape in model.shapes.items()
    }
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=cut[n]) for n, s in model.shapes.items()}
    tx = optax.adam(1e-4)
    moments = jax.eval_shape(tx.init, params)
    placed = optax.tree.map_params(
        tx, lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), moments, cut,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)
        ),
    )  # fmt: skip
    ids = jax.ShapeDtypeStruct((model.batch * mesh.size, TOKENS), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def whole(weights: jax.Array, *axes: str | None) -> jax.Array:
        return sharding.gathered(weights, *axes, dtype=jnp.bfloat16)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        return (f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)

    angles = jnp.outer(jnp.arange(TOKENS), 1e4 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    angles = jax.device_get(jnp.repeat(angles, 2, axis=1))
    rope = attention_tpu.Tables((jax.device_get(jnp.cos(angles)), jax.device_get(jnp.sin(angles))))

    def attend(qkv: jax.Array) -> jax.Array:
        return attention_tpu.attention(qkv, HEAD_DIM, rope, True, False)

    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        qkv = norm(x, p["norm1"]) @ whole(p["qkv"], "embed", None)
        mixed = sharding.per_device(attend, ("batch", None, None), ("batch", None, None))(qkv)
        x = x + mixed @ whole(p["out"], None, "embed")
        gate, up = jnp.split(norm(x, p["norm2"]) @ whole(p["up"], "embed", None), 2, -1)
        return x + (jax.nn.silu(gate) * up) @ whole(p["down"], None, "embed"), None

    def loss(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        table = whole(params["embedding"], None, "embed")
        blocks = {n: p for n, p in params.items() if n not in ("norm", "embedding")}
        again = jax.checkpoint(block, prevent_cse=False)
        x, _ = jax.lax.scan(again, jnp.take(table, ids, axis=0), blocks)
        logits = (norm(x, params["norm"]) @ table.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    def update(state: Any, ids: jax.Array) -> Any:
        params, moments = state
        grads = jax.lax.with_sharding_constraint(jax.grad(loss)(params, ids), cut)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    options = train.compiler_options(mesh.devices.flat[0])
    return jax.jit(update, donate_argnums=0, compiler_options=options), ((params, placed), ids)


def predicted(model: Published) -> dict[str, float]:
    """MFU by reading."""
    devices = aot.devices_of(model.topology)
    mesh = sharding.make_mesh({"data": 1, "fsdp": len(devices)}, devices)
    update, arguments = update_of(model, mesh)  # makes arrays of the host's own, so before the mesh is set
    with jax.set_mesh(mesh):
        program = aot.compiled(update.lower(*arguments), "jit_update")
    wiring = chips.Wiring.of(list(mesh.devices.flat))
    return estimate(hlo.Program(program.text), wiring).mfu(model.flops, wiring.chip.peak)


def product(kind: str, rows: int, contracted: int, columns: int) -> dict[str, float]:
    """The share of the peak at which one bf16 product runs, by reading."""
    topology = {"v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}.get(kind, f"{kind}:2x2")
    devices = aot.devices_of(topology)[:1]
    mesh = sharding.make_mesh({"data": 1}, devices)
    whole = sharding.replicated(mesh)
    left = jax.ShapeDtypeStruct((rows, contracted), jnp.bfloat16, sharding=whole)
    right = jax.ShapeDtypeStruct((contracted, columns), jnp.bfloat16, sharding=whole)
    options = train.compiler_options(devices[0])
    compiled = jax.jit(jnp.dot, compiler_options=options).lower(left, right).compile()
    wiring = chips.Wiring.of(devices)
    guess = estimate(hlo.Program(compiled.as_text()), wiring)
    return guess.mfu(2.0 * rows * contracted * columns, wiring.chip.peak)


def main(argv: Sequence[str] | None = None) -> int:
    del argv
    print("| what | published | predicted (band) |\n|---|---|---|")
    for kind in ("v4", "v5e", "v5p", "v6e"):
        for sizes in PRODUCTS:
            share = product(kind, *sizes)
            name = " x ".join(f"{n:,}" for n in sizes)
            print(f"| {kind}, product {name} | | {share['middle']:.0%} of peak |", flush=True)
    for model in MODELS:
        mfu = predicted(model)
        band = f"{mfu['cycles']:.1%} to {mfu['roofline']:.1%}"
        print(
            f"| MaxText {model.name}, {model.topology} | {model.mfu:.1%} | {mfu['middle']:.1%} ({band}) |", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

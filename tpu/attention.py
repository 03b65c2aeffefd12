"""Attention's kernels side by side on every TPU generation: bytes and estimated time, forward and backward.

  python -m tpu.attention                           the table (minutes; needs libtpu, no TPU)
  python -m tpu.attention --chips=v5e --tokens=256

One layer's attention of PE-G, 16 heads of 96, from the fused projection to what the output projection reads, with
rotary positions, as the block calls it; the splash kernel is JAX's own, between the transposes that it needs. Equality
of ours with the plain formula is tested in interpret mode (tests/models/test_attention_tpu.py).
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tpu import aot, chips, hlo  # first: it sets what libtpu looks for
from tpu.estimate import Kernel, estimate

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from jax.experimental.pallas.ops.tpu import splash_attention as splash  # isort: skip

from pe_jax import sharding
from pe_jax.models import layers

HEADS, HEAD_DIM = 16, 96
EXAMPLES = {256: 64, 1024: 16}  # as many tokens either way
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
MIB = 2**20


def by_splash(qkv: jax.Array, heads: int, rope: Any) -> jax.Array:
    """What `layers.self_attend` does, by JAX's splash kernel."""
    batch, tokens, _ = qkv.shape
    parts = qkv.reshape(batch, tokens, heads, 3, -1)
    q, k, v = (parts[:, :, :, part] for part in range(3))
    q, k = layers.rotate(q, rope), layers.rotate(k, rope)
    block = min(tokens, 512)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2).reshape(batch, tokens, -1)


CHOICES: dict[str, Callable[..., jax.Array]] = {
    "xla": lambda qkv, heads, rope: layers.self_attend(qkv, heads, rope, kernel="xla"),
    "splash": by_splash,
    "fused": lambda qkv, heads, rope: layers.self_attend(qkv, heads, rope, kernel="fused"),
}


def figures(kind: str, tokens: int, choice: str) -> dict[str, Any]:
    """One row: temporary bytes, and seconds of a forward and backward pass by reading; neither where it does not fit.

    Raises:
      ValueError: if the compiler does not know the topology.
    """
    devices, examples = aot.devices_of(TOPOLOGIES[kind])[:1], EXAMPLES[tokens]
    mesh, side = sharding.make_mesh({"data": 1}, devices), round(tokens**0.5)
    rope = layers.rope_2d(side, side, HEAD_DIM, class_token=False)
    rows = sharding.batch_sharding(mesh)
    qkv = jax.ShapeDtypeStruct((examples, tokens, HEADS * 3 * HEAD_DIM), jnp.bfloat16, sharding=rows)
    by_out = jax.ShapeDtypeStruct((examples, tokens, HEADS * HEAD_DIM), jnp.bfloat16, sharding=rows)

    def both(qkv: jax.Array, by_out: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, back = jax.vjp(lambda x: CHOICES[choice](x, HEADS, rope), qkv)
        return out, back(by_out)[0]

    row = {"chip": kind, "tokens": tokens, "examples": examples, "choice": choice}
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(both).lower(qkv, by_out).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row  # the core's own memory is too small
    wiring, pairs = chips.Wiring.of(devices), examples * HEADS * tokens**2

    def kernel_of(one: hlo.Instruction) -> Kernel | None:
        if "splash" not in one.name:
            return Kernel.of(one)
        backward = "dkv" in one.name or "bwd" in one.name
        return Kernel(2.0 * pairs * HEAD_DIM * (5 if backward else 2), float(pairs), HEAD_DIM)

    guess = estimate(hlo.Program(compiled.as_text()), wiring, kernel_of)
    flops = 3 * 2 * 2 * pairs * HEAD_DIM  # scores and sums; a backward pass costs two forward ones
    return row | {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": guess.seconds,
        "mfu": guess.mfu(flops, wiring.chip.peak),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, the choices of one chip and length beside each other."""
    lines = [
        "| chip | tokens x examples | attention | temporaries | forward and backward (band) |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        where = f"| {r['chip']} | {r['tokens']} x {r['examples']} | {r['choice']} |"
        if "seconds" not in r:
            lines.append(f"{where} | does not fit the core's memory |")
            continue
        ms = {name: 1e3 * seconds for name, seconds in r["seconds"].items()}
        lines.append(
            f"{where} {r['temporary_bytes'] / MIB:,.0f} MiB | "
            f"{ms['middle']:.2f} ms ({ms['roofline']:.2f} to {ms['cycles']:.2f}) |"
        )
    return "\n".join(lines)


def every(kinds: Sequence[str], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        for tokens in lengths:
            for choice in CHOICES:
                yield figures(kind, tokens, choice)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help=f"some of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--tokens", default="256,1024", help="some of 256, 1024")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures there too")
    args = parser.parse_args(argv)
    kinds = args.chips.split(",")
    if unknown := set(kinds) - set(TOPOLOGIES):
        print(f"tpu.attention: no chip {', '.join(unknown)}; take some of {', '.join(TOPOLOGIES)}.", file=sys.stderr)
        return 2
    if unknown := set(args.tokens.split(",")) - set(map(str, EXAMPLES)):
        print(f"tpu.attention: --tokens={', '.join(unknown)}; take 256, 1024 or both.", file=sys.stderr)
        return 2
    rows = []
    for row in every(kinds, [int(n) for n in args.tokens.split(",")]):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

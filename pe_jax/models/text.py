"""The text tower: token ids to one embedding (PE §2.1; a causal CLIP text transformer)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pe_jax import sharding
from pe_jax.models.layers import Block, check_computation, layer_norm, precision, scan_blocks, stack


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Everything that shapes a text tower."""

    context_length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    output_width: int
    vocab_size: int = 49408
    remat: str = "none"  # what the backward pass keeps, a key of `layers.REMAT_POLICIES`
    attention: str = "auto"  # how it is computed, one of `layers.KERNELS`
    dtype: str = "float32"  # of activations; parameters are float32
    gradient_dtype: str | None = None  # in which kernels' gradients are summed over devices; None is `dtype`

    def __post_init__(self) -> None:
        check_computation(self.remat, self.attention)


class TextTower(nnx.Module):
    """Causal transformer with learned positions; its embedding is the token at the first end-of-text id."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c

        def normal(scale: float, *shape: int) -> jax.Array:
            return scale * jax.random.normal(rngs.params(), shape)

        self.token_embedding = nnx.Param(normal(0.02, c.vocab_size, c.width), axes=("vocab", "embed"))
        self.position = nnx.Param(normal(0.01, c.context_length, c.width), axes=(None, "embed"))
        self.blocks = stack(lambda rngs: _block(c, rngs), c.depth, rngs=rngs)
        self.norm_final = layer_norm(c.width, dtype=c.dtype, rngs=rngs)
        self.projection = nnx.Param(normal(c.width**-0.5, c.width, c.output_width), axes=("embed", "joint"))

    @jax.jit
    @jax.named_scope("text")
    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """[B, L] token ids, L at most the context length → [B, E] embeddings, not normalised.

        The pooled token is the first with the largest id, which is the end of text; causality hides the padding.

        Raises:
          ValueError: if `ids` are not integers [B, L] with L within the context length.
        """
        c = self.config
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}; want integers [B, L]: use model.tokenize.")
        length = ids.shape[1]
        if length > c.context_length:
            raise ValueError(f"ids are {length} long; this text tower reads at most {c.context_length}: truncate them.")
        # Looked up in the whole table: rows cut over devices would make XLA replicate the tokens of the whole batch.
        # In float32 for the gradient's sake, which adds up over every use of a frequent token.
        table = sharding.constrain(self.token_embedding[...], None, None)
        x = sharding.constrain(jnp.take(table, ids, axis=0) + self.position[:length], "batch", "tokens", None)
        x = scan_blocks(self.blocks, x.astype(c.dtype), layers=(c.depth,), remat=c.remat, causal=True)[c.depth]
        x = self.norm_final(jnp.take_along_axis(x, jnp.argmax(ids, axis=1)[:, None, None], axis=1)[:, 0])
        projection = sharding.gathered(self.projection[...], "embed", "joint", dtype=x.dtype)
        return jnp.dot(x, projection, precision=precision(x.dtype))


def _block(c: TextConfig, rngs: nnx.Rngs) -> Block:
    """A block with OpenCLIP's initialisation, since PE's module leaves the text tower's open."""
    block = Block(
        c.width,
        c.heads,
        c.mlp_width,
        kernel=c.attention,
        dtype=c.dtype,
        gradient_dtype=c.gradient_dtype,
        rngs=rngs,
    )
    zeros: Any = jnp.zeros_like
    for layer, scale in (
        (block.attention.qkv, c.width**-0.5),
        (block.attention.out, c.width**-0.5 * (2 * c.depth) ** -0.5),
        (block.mlp.up, (2 * c.width) ** -0.5),
        (block.mlp.down, c.width**-0.5 * (2 * c.depth) ** -0.5),
    ):
        layer.kernel[...] = scale * jax.random.normal(rngs.params(), layer.kernel.shape)
        layer.bias[...] = zeros(layer.bias[...])
    return block

"""The vision tower: patches to tokens at any layer, and to one embedding (PE §2.1).

One tower serves core, lang and spatial models; the configuration says which parts it has (`pe_jax.models.zoo`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from pe_jax import sharding
from pe_jax.models.layers import (
    MLP,
    Attention,
    Block,
    Step,
    check_computation,
    layer_norm,
    precision,
    resolve_layers,
    rope_2d,
    scan_blocks,
    stack,
    watch_blocks,
)
from pe_jax.types import split

Pool: TypeAlias = Literal["attention", "class", "average", "none"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Everything that shapes a vision tower. Sizes are pixels, widths integers, rates in [0, 1]."""

    image_size: int  # side of the square image whose patch grid the position embedding is stored for
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    class_token: bool
    pool: Pool
    output_width: int | None  # width of the joint space; None leaves the pooled tokens as they are
    layer_scale: float | None = None  # initial gamma; None has no LayerScale
    drop_path: float = 0.0  # of every block alike
    norm_post: bool = True
    rope: bool = True
    pool_heads: int = 8
    remat: str = "none"  # what the backward pass keeps, a key of `layers.REMAT_POLICIES`
    attention: str = "auto"  # how it is computed, one of `layers.KERNELS`
    dtype: str = "float32"  # of activations; parameters are float32
    gradient_dtype: str | None = None  # in which kernels' gradients are summed over devices; None is `dtype`

    def __post_init__(self) -> None:
        check_computation(self.remat, self.attention)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}.")
        if self.pool == "class" and not self.class_token:
            raise ValueError('pool="class" needs class_token=True.')
        if self.pool == "none" and self.output_width is not None:
            raise ValueError(
                f'pool="none" gives tokens, so output_width={self.output_width} has no use; set it to None.'
            )

    @property
    def grid(self) -> int:
        """Patches along a side of the stored position embedding."""
        return self.image_size // self.patch_size


class Patches(nnx.Module):
    """Cuts an image into patches and maps each to a token, [B, H, W, 3] → [B, H/P, W/P, D]; no bias."""

    def __init__(self, patch_size: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        shape = (patch_size, patch_size, 3, width)
        limit = (patch_size * patch_size * 3) ** -0.5
        self.dtype = dtype
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit), axes=(None, None, None, "embed")
        )

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B Y X D"]:
        patch = self.kernel.shape[0]
        batch, height, width, _ = images.shape
        cut = images.astype(self.dtype).reshape(batch, height // patch, patch, width // patch, patch, 3)
        kernel = sharding.gathered(self.kernel[...], None, None, None, "embed", dtype=self.dtype)
        return jnp.einsum("byixjc,ijcd->byxd", cut, kernel, precision=precision(self.dtype))


class AttentionPool(nnx.Module):
    """Pools tokens into one vector with a learned query, [B, N, D] → [B, D] (PE §2.1)."""

    def __init__(self, width: int, heads: int, *, dtype: str, rngs: nnx.Rngs):
        self.probe = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)), axes=(None, None, "embed"))
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, 4 * width, dtype=dtype, rngs=rngs)  # 4·D for every model, also where the blocks differ

    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        pooled = self.attention(tokens, queries=probe)  # the query itself is not added, as in the released weights
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class VisionTower(nnx.Module):
    """A ViT with 2-D RoPE in every block beside absolute positions (PE §2.1).

    Images are [B, H, W, 3] float in [-1, 1], of any height and width that are multiples of the patch size.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        c, dtype = config, config.dtype
        self.config = c
        scale = c.width**-0.5

        def normal(*shape: int) -> jax.Array:
            return scale * jax.random.normal(rngs.params(), shape)

        self.patch = Patches(c.patch_size, c.width, dtype=dtype, rngs=rngs)
        if c.class_token:
            self.class_token = nnx.Param(normal(c.width), axes=("embed",))
        self.position = nnx.Param(normal(c.class_token + c.grid**2, c.width), axes=(None, "embed"))
        self.norm_pre = layer_norm(c.width, dtype=dtype, rngs=rngs)
        self.blocks = stack(
            lambda rngs: Block(
                c.width,
                c.heads,
                c.mlp_width,
                layer_scale=c.layer_scale,
                drop_path=c.drop_path,
                kernel=c.attention,
                dtype=dtype,
                gradient_dtype=c.gradient_dtype,
                rngs=rngs,
            ),
            c.depth,
            rngs=rngs,
        )
        if c.norm_post:
            self.norm_post = layer_norm(c.width, dtype=dtype, rngs=rngs)
        if c.pool == "attention":
            self.pool = AttentionPool(c.width, c.pool_heads, dtype=dtype, rngs=rngs)
        if c.output_width is not None:
            self.projection = nnx.Param(normal(c.width, c.output_width), axes=("embed", "joint"))

    def features(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        layers: Sequence[int] = (-1,),
        class_token: bool = True,
        key: jax.Array | None = None,
    ) -> dict[int, Float[Array, "B N D"]]:
        """Tokens after the asked blocks, in one pass that stops after the last of them.

        Args:
          images: [B, H, W, 3] in [-1, 1].
          layers: blocks counted from 1 as the paper counts; 0 is the tokens entering block 1 (patch and position
            embedding, normalised by `norm_pre`); negatives count from the end, -1 the last block. Python integers.
          class_token: whether the class token, if the tower has one, stays as the first of the N tokens.
          key: randomness of DropPath in training; None for inference.

        Returns:
          {layer: [B, N, D]} with the layers as they were asked for: the residual stream itself, without `norm_post`.
          The patch tokens are row-major; N = H/P · W/P (+ 1).

        Raises:
          ValueError: for a layer that does not exist, or images of a shape or type the tower cannot take.

        Source: PE §3 (features of intermediate layers).
        """
        resolved = resolve_layers(layers, self.config.depth)
        found = self._tokens(images, tuple(sorted(set(resolved))), key)
        first = 1 if self.config.class_token and not class_token else 0
        return {asked: found[layer][:, first:] for asked, layer in zip(layers, resolved, strict=True)}

    def attention(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        layers: Sequence[int] = (-1,),
        reduce: Callable[[Array], Any] | None = None,
    ) -> dict[int, Any]:
        """How much each token attends to each other in the asked blocks, {layer: [B, K, N, N]}, in one pass.

        Of K heads, the third axis attends to the fourth; the class token, if the tower has one, is the first of both.
        Rows sum to 1. In float32 and beside the fast path: the pass itself takes whatever kernel the tower is set to.

        Args:
          images: [B, H, W, 3] in [-1, 1].
          layers: blocks counted from 1; negatives count from the end. Python integers.
          reduce: what to keep instead, from the [B, N, N] of one head to a tree of arrays; these are then stacked over
            heads, [K, ...]. The whole table has B·K·N² numbers a layer, 64 MB for one image of 1,024 tokens and 16
            heads; with `reduce`, one head's at a time. A module-level function compiles once.

        Raises:
          ValueError: for a layer that does not exist, layer 0, which attends to nothing, or images of a wrong shape or
            type.
        """
        stacked = self.watch(images, _attention(reduce), layers)
        return {layer: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i, layer in enumerate(layers)}

    def watch(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        look: Callable[[Step], Any],
        layers: Sequence[int] = (-1,),
    ) -> Any:
        """What `look` makes of the asked blocks at work, in one pass that keeps nothing else.

        Args:
          images: [B, H, W, 3] in [-1, 1].
          look: from a `layers.Step` to a tree of arrays; a module-level function compiles once.
          layers: blocks counted from 1; negatives count from the end. Python integers.

        Returns:
          The tree, each leaf [len(layers), ...] in the order asked for.

        Raises:
          ValueError: as `attention`.
        """
        resolved = resolve_layers(layers, self.config.depth)
        if 0 in resolved:
            raise ValueError(
                f"layer 0 is the patch embedding, where nothing attends; ask for blocks 1 to {self.config.depth}."
            )
        return self._watched(images, look, resolved)

    @jax.jit
    def __call__(self, images: Float[Array, "B H W 3"], key: jax.Array | None = None) -> Float[Array, "B *E"]:
        """[B, E] pooled and projected embeddings, not normalised; [B, N, D] last tokens where `pool` is "none"."""
        return self.head(self.tokens(images, key))

    def tokens(
        self,
        images: Float[Array, "B H W 3"],
        key: jax.Array | None = None,
        *,
        masked: Bool[Array, "B P"] | None = None,
        mask_token: Float[Array, "D"] | None = None,
    ) -> Float[Array, "B N D"]:
        """[B, N, D] tokens after the last block, before `norm_post`.

        Args:
          images: [B, H, W, 3] in [-1, 1].
          key: randomness of DropPath in training; None for inference.
          masked: which of the P = H/P · W/P patches are hidden: their embedding becomes `mask_token`, their position
            stays (PE §2.1, mask regularisation).
          mask_token: what stands for a hidden patch; None is a zero vector.
        """
        depth = self.config.depth
        return self._tokens(images, (depth,), key, masked, mask_token)[depth]

    def normed(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Last tokens as the pooling sees them: through `norm_post`, where the tower has one."""
        return self.norm_post(tokens) if self.config.norm_post else tokens

    def pooled(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B *E"]:
        """Last tokens pooled as the tower pools them, before the projection; all of them where `pool` is "none"."""
        x = self.normed(tokens)
        if self.config.pool == "attention":
            return self.pool(x)
        if self.config.pool == "class":
            return x[:, 0]
        return x.mean(1) if self.config.pool == "average" else x

    @jax.named_scope("vision")
    def head(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B *E"]:
        """What follows the last block: `norm_post`, pooling, projection, as far as the tower has them."""
        x = self.pooled(tokens)
        if self.config.output_width is not None:
            projection = sharding.gathered(self.projection[...], "embed", "joint", dtype=x.dtype)
            x = jnp.dot(x, projection, precision=precision(x.dtype))
        return x

    def truncate(self, depth: int) -> "VisionTower":
        """The tower cut after block `depth` (PE §4 cuts G at 47 of 50), without the head that followed the last one."""
        (depth,) = resolve_layers((depth,), self.config.depth)
        if depth == 0:
            raise ValueError("truncate(0) would leave no block; keep at least 1.")
        config = dataclasses.replace(self.config, depth=depth, pool="none", norm_post=False, output_width=None)
        graphdef, _ = split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
        _, params = split(self)
        kept = {name: params[name] for name in ("patch", "class_token", "position", "norm_pre") if name in params}
        return nnx.merge(graphdef, kept | {"blocks": jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])})

    @functools.partial(jax.jit, static_argnames="layers")
    @jax.named_scope("vision")
    def _tokens(
        self,
        images: Array,
        layers: tuple[int, ...],
        key: jax.Array | None,
        masked: Array | None = None,
        mask_token: Array | None = None,
    ) -> dict[int, Array]:
        x, rope = self._entering(images, masked, mask_token)
        return scan_blocks(self.blocks, x, layers=layers, remat=self.config.remat, rope=rope, key=key)

    @functools.partial(jax.jit, static_argnames=("look", "layers"))
    @jax.named_scope("vision")
    def _watched(self, images: Array, look: Callable[[Step], Any], layers: tuple[int, ...]) -> Any:
        x, rope = self._entering(images)
        return watch_blocks(self.blocks, x, look, layers=layers, rope=rope)

    def _entering(
        self, images: Array, masked: Array | None = None, mask_token: Array | None = None
    ) -> tuple[Array, tuple[np.ndarray, np.ndarray] | None]:
        """The tokens entering block 1, and the rotary tables of their grid."""
        c = self.config
        _check_images(images, c.patch_size)
        x = self.patch(images)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        if masked is not None:
            x = jnp.where(masked[:, :, None], 0 if mask_token is None else mask_token.astype(x.dtype), x)
        if c.class_token:
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (batch, 1, width))
            x = jnp.concatenate([token, x], axis=1)
        x = self.norm_pre(x + self._positions(rows, columns).astype(x.dtype))
        return x, rope_2d(rows, columns, width // c.heads, class_token=c.class_token) if c.rope else None

    def _positions(self, rows: int, columns: int) -> Float[Array, "N D"]:
        """The stored position embedding, its grid part resized to rows x columns (bilinear, not antialiased)."""
        table, first, side = self.position[...], int(self.config.class_token), self.config.grid
        if (rows, columns) == (side, side):
            return table
        grid = table[first:].reshape(side, side, -1)
        grid = jax.image.resize(grid, (rows, columns, grid.shape[-1]), "bilinear", antialias=False)
        return jnp.concatenate([table[:first], grid.reshape(rows * columns, -1)])


@functools.cache
def _attention(reduce: Callable[[Array], Any] | None) -> Callable[[Step], Any]:
    """One function for each `reduce`, so that asking again does not compile again."""
    return lambda step: step.attention(reduce)


def _check_images(images: Array, patch: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}; want [B, H, W, 3], channels last.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; want float in [-1, 1]: use model.preprocess, or x / 127.5 - 1.")
    if images.shape[1] % patch or images.shape[2] % patch:
        raise ValueError(
            f"images are {images.shape[1]}x{images.shape[2]} pixels; "
            f"height and width must be multiples of the patch size {patch}: resize or crop them."
        )

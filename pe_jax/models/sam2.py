"""SAM 2.1 on images: what to segment is said by points, boxes or masks (arXiv 2408.00714; a teacher in PE §5.2).

A hierarchical encoder (Hiera, arXiv 2306.00989) gives each image a grid of tokens and two finer maps. A small two-way
transformer then mixes the tokens of a prompt with those of the image, and a mask is the product of a prompt's token
with the refined map. The encoder runs once an image; a prompt costs the second part alone. The memory with which SAM 2
follows objects through videos, and the sine positions that only it reads, are no part of this module.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pe_jax import sharding
from pe_jax.models.layers import Dense, attend, gelu, precision, self_attend, stack
from pe_jax.sharding import constrain
from pe_jax.types import Params, split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the RGB values in [0, 1] that images are normalised by
STRIDES = (4, 8, 16, 32)  # pixels between the tokens of each of the encoder's four stages
MASKS = 4  # a prompt's: one to take as it is, three for what it may mean (a whole, a part, a part of that)
NEGATIVE, POSITIVE, CORNER, OPPOSITE, NO_POINT = 0, 1, 2, 3, -1  # labels of points; 2 and 3 are those of a box
_QUERIES = 1024  # of the global blocks' 4,096, taken at a time: all would be half a gigabyte of logits an image
_STABLE, _MARGIN = 0.98, 0.05  # a mask is stable that keeps this share of itself from a logit of -margin to one of it

# Which one mask of a prompt's four.
CHOICES = (
    "stable",  # that meant for it, or the best of the others if it is unstable: the release's multimask_output=False
    "single",  # that meant for it
    "best",  # of the other three, that with the highest predicted IoU
)


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Everything that shapes a model. Stages double the width and the heads, and halve the grid."""

    width: int  # of the first stage
    depths: tuple[int, int, int, int]  # blocks of each stage
    heads: int  # of the first stage
    windows: tuple[int, int, int, int]  # tokens along a side of the windows of each stage
    global_blocks: tuple[int, ...]  # counted from 1 over all stages: these see the whole image
    position_grid: int  # side of the coarse part of the position embedding
    image_size: int = 1024  # pixels along a side that the release was trained at
    decoder_width: int = 256
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    mask_width: int = 16  # of the encoder of mask prompts
    dtype: str = "float32"  # of activations; parameters are float32

    def __post_init__(self) -> None:
        entering = {1 + sum(self.depths[:stage]) for stage in range(1, 4)}
        if wrong := [b for b in self.global_blocks if b in entering or not 1 <= b <= sum(self.depths)]:
            raise ValueError(
                f"global_blocks has {wrong}; want some of blocks 1 to {sum(self.depths)}, but not "
                f"{sorted(entering)}, with which stages begin."
            )
        if self.image_size % self.multiple:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {self.multiple}.")
        if odd := [window for window in self.windows[:3] if window % 2]:
            raise ValueError(f"windows={self.windows} has {odd} before a stage that halves them; want even numbers.")

    @property
    def multiple(self) -> int:
        """Images' sides are multiples of it: the last stage's stride, and a window of the position embedding."""
        return int(np.lcm(STRIDES[-1], STRIDES[0] * self.windows[0]))


class Embedding(NamedTuple):
    """An image as the encoder leaves it: all that prompts need.

    Attributes:
      image: [B, H/16, W/16, D] the grid of tokens.
      middle: [B, H/8, W/8, D/4] and
      fine: [B, H/4, W/4, D/8] what sharpens masks.
    """

    image: Float[Array, "B Y X D"]
    middle: Float[Array, "B Y2 X2 E"]
    fine: Float[Array, "B Y4 X4 F"]


class Segmentation(NamedTuple):
    """What P prompts of each image gave.

    Attributes:
      masks: [B, P, M, H/4, W/4] logits, float32: above 0 is inside. M is 3, or 1.
      ious: [B, P, M] how well the model thinks each mask fits, in [0, 1].
      objects: [B, P] logit that there is an object at all.
    """

    masks: Float[Array, "B P M Y X"]
    ious: Float[Array, "B P M"]
    objects: Float[Array, "B P"]


def _dense(inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs, bias: bool = True) -> Dense:
    """Whole on every device: the largest model is 0.9 GB, and few meshes divide widths of 96, 112 or 144."""
    return Dense(inputs, outputs, (None, None), dtype=dtype, rngs=rngs, bias=bias)


def _norm(width: int, epsilon: float, *, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    axes = {"axes": (None,)}
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=dtype, use_fast_variance=False, scale_metadata=axes, bias_metadata=axes, rngs=rngs
    )  # fmt: skip


def _table(*shape: int, rngs: nnx.Rngs, spread: float = 0.02) -> nnx.Param:
    return nnx.Param(spread * jax.random.normal(rngs.params(), shape), axes=(None,) * len(shape))


class _MLP(nnx.Module):
    """Linear maps through `widths`, with an activation between them: [..., first] → [..., last]."""

    def __init__(self, widths: Sequence[int], activation: Callable[[Array], Array], *, dtype: str, rngs: nnx.Rngs):
        self.depth, self.activation = len(widths) - 1, activation
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"layer{i}", _dense(inputs, outputs, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        for i in range(1, self.depth):
            x = self.activation(getattr(self, f"layer{i}")(x))
        return getattr(self, f"layer{self.depth}")(x)


# ---------------------------------------------------------------------------------------------------------- encoder


def _pool(x: Float[Array, "B Y X *D"]) -> Float[Array, "B Y/2 X/2 *D"]:
    """The largest of each 2 x 2."""
    batch, rows, columns, *rest = x.shape
    return x.reshape(batch, rows // 2, 2, columns // 2, 2, *rest).max((2, 4))


def _cut(x: Float[Array, "B Y X D"], rows: int, columns: int) -> Float[Array, "V N D"]:
    """Into windows of rows x columns tokens, those at the right and bottom filled with zeros."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % rows), (0, -width % columns), (0, 0)))
    x = x.reshape(batch, x.shape[1] // rows, rows, x.shape[2] // columns, columns, channels)
    return jnp.swapaxes(x, 2, 3).reshape(-1, rows * columns, channels)


def _joined(x: Float[Array, "V N D"], rows: int, columns: int, shape: tuple[int, ...]) -> Float[Array, "B Y X D"]:
    """The inverse of `_cut`, for an image of `shape` [B, Y, X, ...]."""
    batch, height, width, *_ = shape
    x = x.reshape(batch, -(-height // rows), -(-width // columns), rows, columns, x.shape[-1])
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(batch, x.shape[1] * rows, x.shape[3] * columns, -1)[:, :height, :width]


class HieraBlock(nnx.Module):
    """Pre-norm attention inside windows, then an MLP. A block that begins a stage widens, and pools 2 x 2 queries."""

    def __init__(self, inputs: int, width: int, heads: int, *, dtype: str, rngs: nnx.Rngs):
        self.heads, self.pools = heads, inputs != width
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = _norm(inputs, 1e-6, **common)
        self.qkv = _dense(inputs, 3 * width, **common)  # head by head its q, k and v, as `self_attend` takes them
        self.out = _dense(width, width, **common)
        if self.pools:
            self.widen = _dense(inputs, width, **common)
        self.norm2 = _norm(width, 1e-6, **common)
        self.mlp = _MLP((width, 4 * width, width), gelu, **common)

    def __call__(self, x: Float[Array, "B Y X I"], window: int | None) -> Float[Array, "B Y1 X1 D"]:
        """`window` is the side of the windows in tokens that come in; None is the whole image."""
        y = self.norm1(x)
        rows, columns = (window, window) if window else x.shape[1:3]
        attended = self._attend(_cut(y, rows, columns), rows, columns)
        if self.pools:
            x, rows, columns = _pool(self.widen(y)), rows // 2, columns // 2
        x = x + _joined(attended, rows, columns, x.shape)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None, None)

    def _attend(self, x: Float[Array, "V N I"], rows: int, columns: int) -> Float[Array, "V N1 D"]:
        qkv = self.qkv(x)
        if not self.pools and (x.shape[1] <= _QUERIES or sharding.platform() == "gpu"):
            return self.out(self_attend(qkv, self.heads))
        q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], self.heads, 3, -1), 3, 0)
        if self.pools:
            q = _pool(q.reshape(q.shape[0], rows, columns, *q.shape[2:])).reshape(q.shape[0], -1, *q.shape[2:])
        if q.shape[1] > _QUERIES and q.shape[1] % _QUERIES == 0:
            parts = jnp.swapaxes(q.reshape(q.shape[0], -1, _QUERIES, *q.shape[2:]), 0, 1)
            attended = jnp.swapaxes(lax.map(lambda part: attend(part, k, v), parts), 0, 1)
        else:
            attended = attend(q, k, v)
        return self.out(attended.reshape(*q.shape[:2], -1))


class Stage(nnx.Module):
    """Blocks of one width: one that enters the stage, except in the first, and equal ones, stacked."""

    def __init__(self, inputs: int | None, width: int, heads: int, depth: int, *, dtype: str, rngs: nnx.Rngs):
        if inputs is not None:
            self.enter = HieraBlock(inputs, width, heads, dtype=dtype, rngs=rngs)
        if rest := depth - (inputs is not None):
            self.blocks = stack(lambda rngs: HieraBlock(width, width, heads, dtype=dtype, rngs=rngs), rest, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B Y X I"], entering: int, windows: Sequence[int | None]
    ) -> Float[Array, "B Y1 X1 D"]:
        """`entering` is the window of the block that enters, `windows` are those of the others."""
        if hasattr(self, "enter"):
            x = self.enter(x, entering)
        first = 0
        for window, run in itertools.groupby(windows):  # equal blocks in a row are compiled once
            last = first + len(list(run))
            x, first = self._scan(x, slice(first, last), window), last
        return x

    def _scan(self, x: Array, blocks: slice, window: int | None) -> Array:
        graphdef, params = split(self.blocks)

        def step(x: Array, params: Params) -> tuple[Array, None]:
            return nnx.merge(graphdef, params)(x, window), None

        return lax.scan(step, x, jax.tree.map(lambda leaf: leaf[blocks], params))[0]


class Encoder(nnx.Module):
    """Hiera and its feature pyramid: [B, H, W, 3] → the maps of strides 4, 8 and 16, [B, H/s, W/s, D] each."""

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        c, common = config, {"dtype": config.dtype, "rngs": rngs}
        self.config = c
        limit = (7 * 7 * 3) ** -0.5
        kernel = jax.random.uniform(rngs.params(), (7, 7, 3, c.width), jnp.float32, -limit, limit)
        self.patch = nnx.Param(kernel, axes=(None,) * 4)
        self.patch_bias = nnx.Param(jnp.zeros(c.width), axes=(None,))
        self.position = _table(c.position_grid, c.position_grid, c.width, rngs=rngs)
        self.window_position = _table(c.windows[0], c.windows[0], c.width, rngs=rngs)
        for i, depth in enumerate(c.depths):
            width = c.width * 2**i
            stage = Stage(width // 2 if i else None, width, c.heads * 2**i, depth, **common)
            setattr(self, f"stage{i + 1}", stage)
            setattr(self, f"lateral{i + 1}", _dense(width, c.decoder_width, **common))

    def __call__(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B Y4 X4 D"], Float[Array, "B Y2 X2 D"], Float[Array, "B Y X D"]]:
        c = self.config
        x = lax.conv_general_dilated(
            images.astype(c.dtype),
            self.patch[...].astype(c.dtype),
            (4, 4),
            ((3, 3), (3, 3)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision(c.dtype),
        )
        x = x + (self.patch_bias[...] + self._positions(*x.shape[1:3])).astype(x.dtype)
        maps, block = [], 1
        for i, (depth, window) in enumerate(zip(c.depths, c.windows, strict=True)):
            own = range(block + (i > 0), block + depth)
            windows = [None if number in c.global_blocks else window for number in own]
            x = getattr(self, f"stage{i + 1}")(x, c.windows[i - 1], windows)
            maps.append(getattr(self, f"lateral{i + 1}")(x))
            block += depth
        fine, middle, coarse, coarsest = maps
        return fine, middle, coarse + coarsest.repeat(2, axis=1).repeat(2, axis=2)  # the finer two stand by themselves

    def _positions(self, rows: int, columns: int) -> Float[Array, "Y X D"]:
        """A coarse embedding of the whole image, resized, and one of a window, repeated (arXiv 2311.05613)."""
        side, window = self.config.position_grid, self.window_position[...]
        down, across = (_bicubic(side, length) for length in (rows, columns))
        whole = jnp.einsum("yj,xi,jid->yxd", down, across, self.position[...], precision="highest")
        return whole + jnp.tile(window, (rows // window.shape[0], columns // window.shape[1], 1))


def _bicubic(before: int, after: int) -> np.ndarray:
    """[after, before] weights of bicubic resizing with a = -0.75, centres aligned, the outermost values repeated.

    PyTorch's; JAX's has a = -0.5 and other edges.
    """
    at = (np.arange(after) + 0.5) * before / after - 0.5
    first = np.floor(at).astype(int) - 1
    weights = np.zeros((after, before))
    for tap in range(4):
        away, a = np.abs(at - (first + tap)), -0.75
        near = ((a + 2) * away - (a + 3)) * away**2 + 1
        far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
        np.add.at(
            weights,
            (np.arange(after), np.clip(first + tap, 0, before - 1)),
            np.where(away <= 1, near, np.where(away < 2, far, 0)),
        )
    return weights.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- prompts


class PromptEncoder(nnx.Module):
    """Points (and boxes, two points each) to tokens; a mask to an embedding of the grid."""

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        width, inner, common = config.decoder_width, config.mask_width, {"dtype": config.dtype, "rngs": rngs}
        self.dtype = config.dtype
        self.frequencies = _table(2, width // 2, rngs=rngs, spread=1.0)
        self.labels = _table(4, width, rngs=rngs)
        self.no_point = _table(width, rngs=rngs)
        self.no_mask = _table(width, rngs=rngs)
        self.mask1 = _Shrink(1, inner // 4, **common)
        self.mask_norm1 = _norm(inner // 4, 1e-6, **common)
        self.mask2 = _Shrink(inner // 4, inner, **common)
        self.mask_norm2 = _norm(inner, 1e-6, **common)
        self.mask3 = _dense(inner, width, **common)

    def positions(self, at: Float[Array, "*B 2"] | np.ndarray) -> Float[Array, "*B D"]:
        """Random Fourier features of places, x and y in [0, 1]; in float32, for the frequencies are high."""
        at, (by_x, by_y) = 2 * jnp.asarray(at, jnp.float32) - 1, self.frequencies[...].astype(jnp.float32)
        angles = 2 * np.float32(np.pi) * (at[..., :1] * by_x + at[..., 1:] * by_y)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    def grid(self, rows: int, columns: int) -> Float[Array, "Y X D"]:
        """Positions of the image's tokens."""
        y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
        return self.positions(np.stack([x, y], -1)).astype(self.dtype)

    def points(
        self, points: Float[Array, "B P Q 2"], labels: Int[Array, "B P Q"], size: tuple[int, int]
    ) -> Float[Array, "B P Q D"]:
        """Tokens of points, x and y in pixels of an image of `size` (height, width)."""
        height, width = size
        tokens = self.positions((points + 0.5) / jnp.array([width, height], jnp.float32))  # pixels' centres
        tokens = tokens + self.labels[...][jnp.maximum(labels, 0)]
        return jnp.where(labels[..., None] == NO_POINT, self.no_point[...], tokens).astype(self.dtype)

    def masks(self, masks: Float[Array, "B P Y X"]) -> Float[Array, "B P Y/4 X/4 D"]:
        """Embeddings of masks' logits, four of them along each side for one."""
        x = gelu(self.mask_norm1(self.mask1(masks[..., None])))
        return self.mask3(gelu(self.mask_norm2(self.mask2(x))))


class _Shrink(nnx.Module):
    """A convolution of 2 x 2 with stride 2: [..., Y, X, I] → [..., Y/2, X/2, O]."""

    def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
        limit, self.dtype = (4 * inputs) ** -0.5, dtype
        kernel = jax.random.uniform(rngs.params(), (2, 2, inputs, outputs), jnp.float32, -limit, limit)
        self.kernel = nnx.Param(kernel, axes=(None,) * 4)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None,))

    def __call__(self, x: Float[Array, "... Y X I"]) -> Float[Array, "... Y2 X2 O"]:
        *batch, rows, columns, width = x.shape
        x = x.astype(self.dtype).reshape(*batch, rows // 2, 2, columns // 2, 2, width)
        kernel, bias = (jnp.asarray(own[...], self.dtype) for own in (self.kernel, self.bias))
        return jnp.einsum("...yaxbi,abio->...yxo", x, kernel, precision=precision(self.dtype)) + bias


# ---------------------------------------------------------------------------------------------------------- decoder


class CrossAttention(nnx.Module):
    """Attention in which queries, keys and values have projections of their own, to `inner` channels."""

    def __init__(self, width: int, inner: int, heads: int, *, dtype: str, rngs: nnx.Rngs):
        self.heads = heads
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.q, self.k, self.v = (_dense(width, inner, **common) for _ in range(3))
        self.out = _dense(inner, width, **common)

    def __call__(
        self, q: Float[Array, "B P1 Q D"], k: Float[Array, "B P2 N D"], v: Float[Array, "B P2 N D"]
    ) -> Float[Array, "B P Q D"]:
        """P1 and P2 are P, or 1 for what all prompts share: that is then projected once."""
        prompts = max(q.shape[1], k.shape[1])
        q, k, v = (
            y.reshape(*y.shape[:3], self.heads, -1) for y in (self.q(q), self.k(k), self.v(v))
        )  # [B, P, N, K, H]
        if k.shape[1] == 1:  # queries of all prompts beside each other
            q = q.reshape(q.shape[0], -1, *q.shape[3:])
            attended = attend(q, k[:, 0], v[:, 0])
        else:
            q = jnp.broadcast_to(q, (q.shape[0], prompts, *q.shape[2:]))
            attended = attend(*(y.reshape(-1, *y.shape[2:]) for y in (q, k, v)))
        return self.out(attended.reshape(k.shape[0], prompts, -1, attended.shape[-2] * attended.shape[-1]))


class TwoWayBlock(nnx.Module):
    """Tokens attend among themselves and to the image, then the image to the tokens; norms come after."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, dtype: str, rngs: nnx.Rngs):
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.among = CrossAttention(width, width, heads, **common)
        self.norm1 = _norm(width, 1e-5, **common)
        self.to_image = CrossAttention(width, width // 2, heads, **common)
        self.norm2 = _norm(width, 1e-5, **common)
        self.mlp = _MLP((width, mlp_width, width), jax.nn.relu, **common)
        self.norm3 = _norm(width, 1e-5, **common)
        self.from_image = CrossAttention(width, width // 2, heads, **common)
        self.norm4 = _norm(width, 1e-5, **common)

    def __call__(
        self,
        tokens: Float[Array, "B P T D"],
        image: Float[Array, "B P1 N D"],
        positions: Float[Array, "B P T D"],
        image_positions: Float[Array, "N D"],
        first: bool,
    ) -> tuple[Float[Array, "B P T D"], Float[Array, "B P N D"]]:
        """The `first` block's tokens are their own positions still: it adds neither these nor its first result."""
        if first:
            tokens = self.among(tokens, tokens, tokens)
        else:
            placed = tokens + positions
            tokens = tokens + self.among(placed, placed, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.to_image(tokens + positions, image + image_positions, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.from_image(image + image_positions, tokens + positions, tokens))
        return tokens, image


class _Enlarge(nnx.Module):
    """A transposed convolution of 2 x 2 with stride 2, whose four pixels stay side by side: [..., I] → [..., 4, O]."""

    def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
        self.map = _dense(inputs, 4 * outputs, dtype=dtype, rngs=rngs, bias=False)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None,))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... 4 O"]:
        y = self.map(x)
        return y.reshape(*x.shape[:-1], 4, -1) + self.bias[...].astype(y.dtype)


class MaskDecoder(nnx.Module):
    """Tokens of prompts and an image's embedding to masks and what the model thinks of them.

    Until the logits are done, the 16 pixels of a mask under a token of the image are channels beside each other: no map
    is laid out anew for a prompt, and all that is large is a matrix product.
    """

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        width, common = config.decoder_width, {"dtype": config.dtype, "rngs": rngs}
        heads, mlp_width = config.decoder_heads, config.decoder_mlp_width
        self.object_token, self.iou_token = _table(width, rngs=rngs), _table(width, rngs=rngs)
        self.mask_tokens = _table(MASKS, width, rngs=rngs)
        self.block1, self.block2 = (TwoWayBlock(width, heads, mlp_width, **common) for _ in range(2))
        self.to_image = CrossAttention(width, width // 2, heads, **common)
        self.norm = _norm(width, 1e-5, **common)
        self.enlarge1 = _Enlarge(width, width // 4, **common)
        self.enlarge_norm = _norm(width // 4, 1e-6, **common)
        self.enlarge2 = _Enlarge(width // 4, width // 8, **common)
        self.middle = _dense(width, width // 4, **common)
        self.fine = _dense(width, width // 8, **common)
        self.weigh = stack(
            lambda rngs: _MLP((width, width, width, width // 8), jax.nn.relu, dtype=config.dtype, rngs=rngs),
            MASKS,
            rngs=rngs,
        )  # of each mask its own
        self.iou = _MLP((width, width, width, MASKS), jax.nn.relu, **common)
        self.object = _MLP((width, width, width, 1), jax.nn.relu, **common)

    def __call__(
        self,
        image: Float[Array, "B P1 Y X D"],
        image_positions: Float[Array, "Y X D"],
        middle: Float[Array, "B Y2 X2 E"],
        fine: Float[Array, "B Y4 X4 F"],
        prompts: Float[Array, "B P Q D"],
    ) -> Segmentation:
        """All four masks of each prompt; P1 is 1 where prompts share the image."""
        rows, columns, width = image.shape[2:]
        own = jnp.concatenate([self.object_token[...][None], self.iou_token[...][None], self.mask_tokens[...]])
        own = jnp.broadcast_to(own.astype(prompts.dtype), (*prompts.shape[:2], *own.shape))
        positions = tokens = jnp.concatenate([own, prompts], 2)
        places, x = image_positions.reshape(-1, width), image.reshape(*image.shape[:2], -1, width)
        tokens, x = self.block1(tokens, x, positions, places, first=True)
        tokens, x = self.block2(tokens, x, positions, places, first=False)
        tokens = self.norm(tokens + self.to_image(tokens + positions, x + places, x))

        x = gelu(self.enlarge_norm(self.enlarge1(x) + _under(middle, 1)[:, None]))
        x = gelu(self.enlarge2(x) + _under(fine, 2)[:, None])  # [B, P, N, 4, 4, F]
        graphdef, params = split(self.weigh)
        weights = jax.vmap(lambda p, t: nnx.merge(graphdef, p)(t), (0, 2), 2)(params, tokens[:, :, 2 : 2 + MASKS])
        logits = jnp.einsum(
            "bpmf,bpnijf->bpmnij", weights, x, precision=precision(x.dtype), preferred_element_type=jnp.float32
        )
        logits = logits.reshape(*logits.shape[:3], rows, columns, 2, 2, 2, 2)
        masks = logits.transpose(0, 1, 2, 3, 5, 7, 4, 6, 8).reshape(*logits.shape[:3], 4 * rows, 4 * columns)
        ious = jax.nn.sigmoid(self.iou(tokens[:, :, 1]).astype(jnp.float32))
        return Segmentation(masks, ious, self.object(tokens[:, :, 0])[..., 0].astype(jnp.float32))


def _under(x: Float[Array, "B Y X D"], times: int) -> Float[Array, "B N ..."]:
    """A map 2**times as fine as the tokens, its pixels under each: [B, N, 4, ..., D], one axis of 4 each halving."""
    batch, rows, columns, width = x.shape
    rows, columns, halves = rows >> times, columns >> times, (2,) * times
    x = x.reshape(batch, rows, *halves, columns, *halves, width)
    order = [axis for i in range(times) for axis in (2 + i, 3 + times + i)]
    return x.transpose(0, 1, 2 + times, *order, x.ndim - 1).reshape(batch, rows * columns, *(4,) * times, width)


# ------------------------------------------------------------------------------------------------------------ whole


class Sam2(nnx.Module):
    """SAM 2.1 for images (arXiv 2408.00714).

    Images are [B, H, W, 3], normalised by `MEAN` and `STD` (see `prepare`); H and W are multiples of
    `config.multiple`. Positions are relative to the image, so any size works; the release was trained at 1,024 pixels.
    """

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.no_memory = _table(config.decoder_width, rngs=rngs)
        self.prompts = PromptEncoder(config, rngs=rngs)
        self.decoder = MaskDecoder(config, rngs=rngs)

    def prepare(self, images: Array | np.ndarray) -> Float[Array, "B S S 3"]:
        """Images [B, H, W, 3] of values 0 to 255 as the model takes them: squashed to its square and normalised."""
        side = self.config.image_size
        x = jnp.asarray(images, jnp.float32) / 255
        x = jax.image.resize(x, (x.shape[0], side, side, 3), "bilinear")
        return (x - np.array(MEAN, np.float32)) / np.array(STD, np.float32)

    @jax.jit
    @jax.named_scope("sam2_encoder")
    def embed(self, images: Array | np.ndarray) -> Embedding:
        """What prompts need of images [B, H, W, 3], normalised.

        Raises:
          ValueError: for images of another size or type than the model takes.
        """
        multiple = self.config.multiple
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; want float, normalised: use `prepare`.")
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise ValueError(
                f"images are {images.shape[1]}x{images.shape[2]} pixels; height and width must be multiples of "
                f"{multiple}: resize them, as `prepare` does."
            )
        fine, middle, image = self.encoder(jnp.asarray(images))
        # The release adds this where a video has no memory yet; its image path takes every image for such a frame.
        image = image + self.no_memory[...].astype(image.dtype)
        return Embedding(image, self.decoder.middle(middle), self.decoder.fine(fine))

    @functools.partial(jax.jit, static_argnames="multimask")
    def decode(
        self,
        embedding: Embedding,
        points: Float[Array | np.ndarray, "B P Q 2"] | None = None,
        labels: Int[Array | np.ndarray, "B P Q"] | None = None,
        boxes: Float[Array | np.ndarray, "B P2 4"] | None = None,
        masks: Float[Array | np.ndarray, "B P1 Y X"] | None = None,
        multimask: bool = True,
    ) -> Segmentation:
        """Masks for P prompts of each image; those of one prompt are taken together. See `segment`."""
        found = self._four(embedding, points, labels, boxes, masks)
        return Segmentation(found.masks[:, :, 1:], found.ious[:, :, 1:], found.objects) if multimask else one(found)

    def segment(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        points: Float[Array | np.ndarray, "B P Q 2"] | None = None,
        labels: Int[Array | np.ndarray, "B P Q"] | None = None,
        boxes: Float[Array | np.ndarray, "B P2 4"] | None = None,
        masks: Float[Array | np.ndarray, "B P1 Y X"] | None = None,
        multimask: bool = True,
    ) -> Segmentation:
        """Masks for P prompts of each image; those of one prompt are taken together.

        Args:
          images: [B, H, W, 3] normalised.
          points: [B, P, Q, 2] x and y in pixels of the image given, its top left corner at 0, 0.
          labels: [B, P, Q] 1 inside the object, 0 outside, -1 for a point that only fills the row; None is 1 for all.
          boxes: [B, P, 4] left, top, right and bottom in pixels.
          masks: [B, P, H/4, W/4] logits to start from, or [B, 1, ...] for all prompts; such as an earlier answer.
          multimask: three masks for what the prompt may mean; or the one for what it says, for which, where it is
            unstable, the best of the three stands in.

        Raises:
          ValueError: for prompts that do not go together, or images that the model cannot take.
        """
        return self.decode(self.embed(images), points, labels, boxes, masks, multimask)

    def _four(
        self,
        embedding: Embedding,
        points: Array | np.ndarray | None,
        labels: Array | np.ndarray | None = None,
        boxes: Array | np.ndarray | None = None,
        masks: Array | np.ndarray | None = None,
    ) -> Segmentation:
        image = embedding.image
        batch, rows, columns, _ = image.shape
        coordinates, signs = [], []
        if points is not None:
            coordinates.append(points)
            signs.append(np.full(points.shape[:3], POSITIVE) if labels is None else labels)
        elif labels is not None:
            raise ValueError("labels say what points mean, and there are no points; give both.")
        if boxes is not None:
            coordinates.append(boxes.reshape(*boxes.shape[:2], 2, 2))
            signs.append(np.broadcast_to([CORNER, OPPOSITE], coordinates[-1].shape[:3]))
        prompts = {x.shape[1] for x in coordinates} or {1 if masks is None else masks.shape[1]}
        if len(prompts) > 1:
            raise ValueError(f"there are {points.shape[1]} prompts of points and {boxes.shape[1]} boxes; want as many.")
        (count,) = prompts
        # One point more that says nothing, always; and in place of all points where there are none, as in training.
        filling = 1 if coordinates else 2
        coordinates.append(np.zeros((batch, count, filling, 2), np.float32))
        signs.append(np.full((batch, count, filling), NO_POINT))
        tokens = self.prompts.points(
            jnp.concatenate(coordinates, 2), jnp.concatenate(signs, 2).astype(jnp.int32), (16 * rows, 16 * columns)
        )
        if masks is None:
            image = image[:, None] + self.prompts.no_mask[...].astype(image.dtype)
        elif masks.shape[2:] != (4 * rows, 4 * columns) or masks.shape[1] not in (1, count):
            raise ValueError(
                f"masks are {list(masks.shape)}; want [{batch}, 1 or {count}, {4 * rows}, {4 * columns}], a quarter "
                "of the image's height and width: resize them."
            )
        else:
            image = image[:, None] + self.prompts.masks(jnp.asarray(masks))
        places = self.prompts.grid(rows, columns)
        return self.decoder(image, places, embedding.middle, embedding.fine, tokens)

    def grid_logits(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        points_per_side: int = 32,
        chunk: int = 64,
        choice: str = "stable",
    ) -> Float[Array, "B P H/4 W/4"]:
        """The mask of every point of a regular grid, each a prompt of its own, as logits (PE §5.2).

        Of 1,024 points and images of 1,024 pixels, 256 MiB an image: `grid_features` needs no such array.

        Args:
          images: [B, H, W, 3] normalised; encoded once.
          points_per_side: of the grid, row by row; each point in the middle of its cell.
          chunk: how many points of each image are decoded at a time; divides their number. What a point takes while it
            is decoded, at 1,024 pixels in bfloat16, is about 20 MB.
          choice: which of a point's four masks: one of `CHOICES`.
        """
        return self._grid(images, points_per_side, chunk, choice, None)

    def grid_features(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        grid: tuple[int, int] = (32, 32),
        points_per_side: int = 32,
        chunk: int = 64,
        choice: str = "stable",
    ) -> Float[Array, "B N P"]:
        """What each token of a grid belongs to: its logit in the masks of P points, [B, N, P] in float32 (PE §5.2).

        As `grid_logits`, brought to rows x columns tokens bilinearly with antialiasing as soon as a chunk is decoded.
        Tokens are row-major. Cosines between them are the spatial teacher.
        """
        return self._grid(images, points_per_side, chunk, choice, grid)

    @functools.partial(jax.jit, static_argnames=("points_per_side", "chunk", "choice", "grid"))
    @jax.named_scope("sam2_grid")
    def _grid(
        self, images: Array, points_per_side: int, chunk: int, choice: str, grid: tuple[int, int] | None
    ) -> Array:
        if points_per_side**2 % chunk:
            raise ValueError(f"chunk={chunk} does not divide the {points_per_side**2} points; choose one that does.")
        batch, height, width, _ = images.shape
        embedding = Embedding(*(constrain(x, "batch", None, None, None) for x in self.embed(images)))
        points = jnp.asarray(grid_points(points_per_side, height, width)).reshape(-1, chunk, 1, 2)
        shape, axis = (batch, points_per_side**2, height // 4, width // 4), 1
        if grid is not None:
            shape, axis = (batch, grid[0] * grid[1], points_per_side**2), 2

        def step(found: Array, these: tuple[Array, Array]) -> tuple[Array, None]:
            first, points = these
            masks = one(self._four(embedding, jnp.broadcast_to(points, (batch, *points.shape))), choice).masks[:, :, 0]
            if grid is not None:
                masks = jax.image.resize(masks, (batch, chunk, *grid), "bilinear")
                masks = jnp.swapaxes(masks.reshape(batch, chunk, -1), 1, 2)
            masks = constrain(masks, "batch", *(None,) * (masks.ndim - 1))
            return lax.dynamic_update_slice_in_dim(found, masks, first, axis), None

        empty = constrain(jnp.zeros(shape, jnp.float32), "batch", *(None,) * (len(shape) - 1))
        return lax.scan(step, empty, (jnp.arange(0, points_per_side**2, chunk), points))[0]


def grid_points(points_per_side: int, height: int, width: int) -> Float[np.ndarray, "P 2"]:
    """x and y in pixels of the middles of equal cells, row by row."""
    at = (np.arange(points_per_side) + 0.5) / points_per_side
    y, x = np.meshgrid(at * height, at * width, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)


def one(found: Segmentation, choice: str = "stable") -> Segmentation:
    """One mask of each prompt's four: `choice` is one of `CHOICES`."""
    best = 1 + jnp.argmax(found.ious[:, :, 1:], -1)
    if choice == "stable":
        alone = found.masks[:, :, 0]
        inner, outer = ((alone > margin).sum((-2, -1)) for margin in (_MARGIN, -_MARGIN))
        pick = jnp.where(inner >= _STABLE * outer, 0, best)
    elif choice == "best":
        pick = best
    elif choice == "single":
        pick = jnp.zeros_like(best)
    else:
        raise ValueError(f"choice={choice!r} must be one of {', '.join(CHOICES)}.")
    masks = jnp.take_along_axis(found.masks, pick[:, :, None, None, None], 2)
    return Segmentation(masks, jnp.take_along_axis(found.ious, pick[:, :, None], 2), found.objects)

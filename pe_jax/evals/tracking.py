"""Following objects through a clip without training: labels go from token to token where features are alike (PE §3).

The first frame's mask is brought to the grid of tokens. Each token of a later frame takes the labels of the few tokens
most like it, near its place, in the first frame and some frames before. Which layer's tokens do this best tells where
a tower keeps what lies where: in PE-Core-G the 32nd of 50.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from pe_jax import sharding
from pe_jax.data.image import Preprocess, decode
from pe_jax.evals import davis, features, inference
from pe_jax.models.layers import resolve_layers

RESIZES = ("squash", "short")
EXACT = jax.lax.Precision.HIGHEST
_TABLE = 1 << 24  # similarities held at once
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclasses.dataclass(frozen=True)
class Settings:
    """How labels go on.

    Attributes:
      previous: frames before the present one that are looked at, besides the first.
      radius: tokens up, down, left and right of a token's own place that are looked at; None looks everywhere.
      neighbours: how many of these give their labels.
      temperature: their weights are exp(cosine / temperature).
    """

    previous: int = 7
    radius: int | None = 12
    neighbours: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.previous < 1 or self.neighbours < 1 or (self.radius is not None and self.radius < 0):
            raise ValueError(
                f"previous={self.previous} and neighbours={self.neighbours} must be at least 1, radius={self.radius} "
                "at least 0 or None."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")


class Memory(NamedTuple):
    """What is looked at: K frames, the first and then a ring of those before.

    Attributes:
      tokens: [K, H, W, D] unit vectors.
      labels: [K, H, W, C] shares of the objects, 0 the background.
      seen: [] frames so far, the first included.
    """

    tokens: Float[Array, "K H W D"]
    labels: Float[Array, "K H W C"]
    seen: Int[Array, ""]


def remembered(tokens: Float[Array, "H W D"], labels: Float[Array, "H W C"], settings: Settings = Settings()) -> Memory:
    """The memory after the first frame.

    Args:
      tokens: its features, of any length.
      labels: its mask, 1 for the object a token shows and 0 for the others.
    """

    def slots(first: Array) -> Array:
        return jnp.zeros((1 + settings.previous, *first.shape), jnp.float32).at[0].set(first)

    return Memory(slots(_unit(tokens)), slots(labels), jnp.int32(1))


def followed(
    memory: Memory, tokens: Float[Array, "H W D"], settings: Settings = Settings()
) -> tuple[Memory, Float[Array, "H W C"]]:
    """The labels of the next frame; and the memory, of which it is now a part.

    Source: DINO's evaluation (arXiv 2104.14294), which PE uses.
    """
    slots, height, width, _ = memory.tokens.shape
    unit = _unit(tokens)
    source, labels = (x.reshape(-1, x.shape[-1]) for x in (memory.tokens, memory.labels))
    reach = max(height, width) if settings.radius is None else settings.radius
    filled = jnp.arange(slots) < memory.seen

    def one(token: tuple[Array, Array, Array]) -> Array:
        own, y, x = token
        near = (jnp.abs(jnp.arange(height) - y) <= reach)[:, None] & (jnp.abs(jnp.arange(width) - x) <= reach)
        allowed = (filled[:, None, None] & near).reshape(-1)
        logits = jnp.where(allowed, jnp.dot(source, own, precision=EXACT) / settings.temperature, -jnp.inf)
        # All that are as good as the last of the best count, as in the published evaluation.
        weights = jnp.where(logits >= _least(logits, settings.neighbours), jnp.exp(logits - logits.max()), 0)
        return jnp.dot(weights / weights.sum(), labels, precision=EXACT)

    y, x = jnp.mgrid[:height, :width].reshape(2, -1)
    together = min(height * width, max(1, _TABLE // len(source)))
    found = jax.lax.map(one, (unit.reshape(len(y), -1), y, x), batch_size=together)
    found = found.reshape(height, width, -1)
    slot = 1 + (memory.seen - 1) % settings.previous
    memory = Memory(memory.tokens.at[slot].set(unit), memory.labels.at[slot].set(found), memory.seen + 1)
    return memory, found


def _least(x: Float[Array, "S"], count: int) -> Float[Array, ""]:
    """The `count`-th greatest: by plain reductions, for a sort takes ten times as long in a loop."""
    level = jnp.float32(jnp.inf)
    for _ in range(count):
        level = jnp.where((x >= level).sum() >= count, level, jnp.where(x < level, x, -jnp.inf).max())
    return level


def masks(labels: Float[Array, "H W C"], size: tuple[int, int]) -> UInt8[Array, "A B"]:
    """The object of each pixel: labels enlarged bilinearly, each object's then brought to the range 0 to 1."""
    large = jax.image.resize(labels, (*size, labels.shape[-1]), "bilinear")
    low, high = large.min((0, 1)), large.max((0, 1))
    # An object that is nowhere keeps its zeros; so do the objects that only fill up the axis.
    scaled = (large - low) / jnp.where(high > low, high - low, 1)
    return jnp.where(high > 0, scaled, large).argmax(-1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What came of following objects.

    Attributes:
      layers: Y layers, as resolved.
      figures: {"jf", "j", "f", "j_recall", "j_decay", "f_recall", "f_decay": [Y]}, means over the objects.
      objects: {"CLIP/NUMBER": {figure: [Y]}} of each object.
      shown: {frame: [Y, A, B] objects' numbers} of some frames of the first clip, at the size the tower sees.
      clip: the first clip.
    """

    layers: tuple[int, ...]
    figures: dict[str, Float[np.ndarray, "Y"]]
    objects: dict[str, dict[str, Float[np.ndarray, "Y"]]]
    shown: dict[int, UInt8[np.ndarray, "Y A B"]]
    clip: davis.Clip


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Evaluator `{"name": "tracking", "data": "DAVIS"}` → `layer_07_jf`, `layer_07_j`, `layer_07_f` and so on.

    Zero-shot video object segmentation: J is the overlap of regions, F that of contours, in [0, 1], each with its mean,
    `_recall` and `_decay`; `jf` is the mean of the two. Layer 0 is the patch embedding. All layers in one pass.

    Attributes:
      data: a folder of clips with masks, or {"path": ..., "split": ..., "limit": ...}; see `pe_jax.evals.davis`.
      layers: "all", or layers as `VisionTower.features` takes them.
      image_size: pixels of a side, or with `resize="short"` of the shorter one; None takes the model's own.
      resize: "squash" brings frames to squares, as the tower was trained; "short" keeps their proportions, both sides
        rounded to whole patches.
      previous, radius, neighbours, temperature: see `Settings`; DINO's by default.
      batch_size: frames in a forward pass, over all devices.

    Source: DINO's protocol on DAVIS 2017 (PE §3, Fig. 8; Tab. 13); the size at which PE saw frames is not published.
    """

    data: str | Mapping[str, Any]
    layers: str | Sequence[int] = "all"
    image_size: int | None = None
    resize: str = "squash"
    previous: int = 7
    radius: int | None = 12
    neighbours: int = 5
    temperature: float = 0.1
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"resize={self.resize!r} is unknown; choose {' or '.join(RESIZES)}.")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f'layers={self.layers!r} must be "all" or a list of layers.')
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
        _ = self.settings

    @property
    def settings(self) -> Settings:
        return Settings(self.previous, self.radius, self.neighbours, self.temperature)

    def __call__(self, model: inference.Model) -> dict[str, float]:
        found = self.run(model)
        return features.by_layer(found.layers, found.figures)

    def run(
        self, model: inference.Model, progress: Progress = lambda stage, done, total: None, show: int = 6
    ) -> Tracked:
        """Follows the objects of all clips.

        Args:
          model: on any mesh; every process calls this.
          progress: told how far it is.
          show: how many frames of the first clip are kept for a picture.

        Raises:
          ValueError: for data that are not clips with masks, masks of another size than their frames, or a first frame
            without an object.
        """
        config = inference.vision_tower(model).config
        asked = range(config.depth + 1) if isinstance(self.layers, str) else self.layers
        layers = tuple(sorted(set(resolve_layers(tuple(asked), config.depth))))
        clips = davis.clips(self.data)
        objects: dict[str, dict[str, np.ndarray]] = {}
        shown: dict[int, np.ndarray] = {}
        for number, clip in enumerate(clips):
            progress("clips", number, len(clips))
            wanted = set() if number else {round(i * (len(clip) - 1) / max(show - 1, 1)) for i in range(show)}
            measured = self._clip(model, clip, layers, wanted, shown)
            objects |= {f"{clip.name}/{i + 1}": own for i, own in enumerate(measured)}
        progress("clips", len(clips), len(clips))
        figures = {name: np.mean([own[name] for own in objects.values()], 0) for name in next(iter(objects.values()))}
        return Tracked(layers, figures, objects, shown, clips[0])

    def _clip(
        self,
        model: inference.Model,
        clip: davis.Clip,
        layers: tuple[int, ...],
        wanted: set[int],
        shown: dict[int, np.ndarray],
    ) -> list[dict[str, np.ndarray]]:
        """{figure: [Y]} of each object of a clip."""
        first = clip.mask(0)
        count = int(first.max())
        if not count:
            raise ValueError(f"{clip.masks[0]} shows no object; the first frame's mask says what to follow.")
        judged = np.zeros((2, count, len(layers), len(clip)))

        def judge(frame: int, found: UInt8[np.ndarray, "Y A B"]) -> None:
            truth = clip.mask(frame)
            if truth.shape != first.shape:
                raise ValueError(f"{clip.masks[frame]} is {truth.shape}, the first frame's mask {first.shape}.")
            large = nearest(found, truth.shape)
            for i in range(count):
                own = truth == i + 1
                outline = davis.Contour(own)
                for row, mask in enumerate(large == i + 1):
                    judged[0, i, row, frame] = davis.region(mask, own)
                    judged[1, i, row, frame] = davis.contour(davis.Contour(mask), outline)

        with concurrent.futures.ThreadPoolExecutor(inference.THREADS) as pool:  # NumPy's loops release the lock
            pending = []
            for frame, found in enumerate(self._followed(model, clip, layers, first)):
                if frame in wanted:
                    shown[frame] = found
                if 0 < frame < len(clip) - 1:  # the published evaluation leaves out the first frame and the last
                    pending.append(pool.submit(judge, frame, found))
                if len(pending) > 4 * inference.THREADS:  # masks of so many frames are in memory, not of the clip
                    pending.pop(0).result()
            for done in pending:
                done.result()
        j, f = ([[davis.statistics(row[1:-1]) for row in own] for own in judged[which]] for which in range(2))
        out = []
        for region, outline in zip(j, f, strict=True):
            own = {
                f"{name}{'' if part == 'mean' else '_' + part}": np.array([row[part] for row in rows])
                for name, rows in (("j", region), ("f", outline))
                for part in ("mean", "recall", "decay")
            }
            out.append({"jf": (own["j"] + own["f"]) / 2} | own)
        return out

    def _followed(
        self, model: inference.Model, clip: davis.Clip, layers: tuple[int, ...], first: UInt8[np.ndarray, "H W"]
    ) -> Iterator[UInt8[np.ndarray, "Y A B"]]:
        """The masks of one frame after the other, of all layers; the first are the given one."""
        patch = inference.vision_tower(model).config.patch_size
        opened = decode(clip.frames[0]).size
        if opened != first.shape[::-1]:
            raise ValueError(
                f"{clip.frames[0]} is {opened[0]}x{opened[1]} pixels and its mask {first.shape[1]}x{first.shape[0]}; "
                "want masks of the frames' size."
            )
        preprocess = self._preprocess(model, opened, patch)
        grid = preprocess.shape[0] // patch, preprocess.shape[1] // patch
        channels = 1 << int(first.max()).bit_length()  # few different numbers, so that clips share what is compiled
        labels = np.eye(channels, dtype=np.float32)[nearest(first, grid)]
        follower = _Follower(inference.mesh_of(model), len(layers), self.settings, preprocess.shape)
        forward = tokens_forward(preprocess, layers, grid)

        def pixels(path: str) -> np.ndarray:
            image = decode(path)
            if image.size != opened:
                raise ValueError(f"{path} is {image.size}, the first frame {opened}; a clip has one size.")
            return preprocess.pixels(image)

        size = min(self.batch_size, len(clip))
        for tokens, count in inference.batches(model, forward, clip.frames, pixels, size):
            yield from follower(tokens, labels)[:, :count].swapaxes(0, 1)

    def _preprocess(self, model: inference.Model, size: tuple[int, int], patch: int) -> Preprocess:
        own = dataclasses.replace(inference.preprocess_of(model, self.image_size), mode="squash")
        height, width = own.shape
        if self.resize == "short":
            short = min(height, width)
            height, width = (max(1, round(side * short / min(size) / patch)) * patch for side in size[::-1])
        return dataclasses.replace(own, size=(height, width))


class _Follower:
    """The memory of one clip for all layers, which share the devices of a mesh."""

    def __init__(self, mesh: Mesh | None, layers: int, settings: Settings, size: tuple[int, int]):
        self._layers, self._settings, self._size = layers, settings, size
        self._own = self._whole = None
        self._rows = layers
        if mesh is not None:
            self._rows = -(-layers // mesh.devices.size) * mesh.devices.size
            flat, _, _, _ = sharding.heads_mesh(mesh, self._rows, 1)
            self._own, self._whole = NamedSharding(flat, PartitionSpec("layers")), sharding.replicated(flat)
        self._memory: Memory | None = None

    def __call__(self, tokens: Float[Array, "Y B H W D"], labels: Float[np.ndarray, "H W C"]) -> np.ndarray:
        """[Y, B, A, B] masks of a batch of frames, which follow those before."""
        if self._own is not None:
            tokens = jnp.pad(tokens, ((0, self._rows - self._layers), *((0, 0),) * 4))
            tokens = jax.device_put(tokens, self._own)
        begin, go = _programs(self._settings, self._size, self._own, self._whole)
        fresh = self._memory is None
        if self._memory is None:
            self._memory = begin(tokens[:, 0], labels)
        self._memory, found = go(self._memory, tokens[:, 1:] if fresh else tokens)
        found = np.asarray(found)
        if fresh:
            same = np.asarray(masks(jnp.asarray(labels), self._size))
            found = np.concatenate([np.broadcast_to(same, (len(found), 1, *self._size)), found], 1)
        return found[: self._layers]


@functools.lru_cache(maxsize=16)
def _programs(
    settings: Settings, size: tuple[int, int], own: NamedSharding | None, whole: NamedSharding | None
) -> tuple[Callable[..., Memory], Callable[..., tuple[Memory, Array]]]:
    def first(tokens: Float[Array, "Y H W D"], labels: Float[Array, "H W C"]) -> Memory:
        return jax.vmap(remembered, in_axes=(0, None, None))(tokens, labels, settings)

    def rest(memory: Memory, tokens: Float[Array, "Y B H W D"]) -> tuple[Memory, Array]:
        def step(memory: Memory, frame: Array) -> tuple[Memory, Array]:
            memory, labels = followed(memory, frame, settings)
            return memory, masks(labels, size)

        return jax.lax.map(lambda layer: jax.lax.scan(step, *layer), (memory, tokens))  # each device layer by layer

    if own is not None:
        part, mesh = own.spec, own.mesh
        rest = jax.shard_map(rest, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    begin = jax.jit(first, out_shardings=own)
    go = jax.jit(rest, donate_argnums=0, out_shardings=(own, whole))
    return begin, go


@functools.cache
def tokens_forward(
    preprocess: Preprocess, layers: tuple[int, ...], grid: tuple[int, int]
) -> Callable[[inference.Model, jax.Array], jax.Array]:
    """From pixels [B, ...] to patch tokens [Y, B, H, W, D] in float32."""

    def forward(model: inference.Model, pixels: jax.Array) -> jax.Array:
        images = inference.normalized(pixels, preprocess)
        found = inference.vision_tower(model).features(images, layers, class_token=False)
        stacked = jnp.stack([found[layer] for layer in layers]).astype(jnp.float32)
        return stacked.reshape(*stacked.shape[:2], *grid, -1)

    return forward


def nearest(x: UInt8[np.ndarray, "*Y H W"], size: tuple[int, int]) -> UInt8[np.ndarray, "*Y A B"]:
    """Each pixel of the result is the one at its middle, as Pillow's nearest neighbour."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, x.shape[-2:], strict=True)
    )
    return x[..., rows[:, None], columns]


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

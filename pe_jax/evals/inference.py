"""Running a model over many images or texts: fixed-shape batches, padding, decoding ahead, any mesh.

Every evaluator goes through `batches`. The batch has one shape, so that each forward pass compiles once; rows of the
last batch that hold nothing are zeros and are cut off again. On a mesh a process decodes only the rows that its devices
need, and every process gets all results.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pe_jax import sharding
from pe_jax.data.image import Preprocess
from pe_jax.data.text import Tokenizer
from pe_jax.models.clip import CLIP
from pe_jax.models.vision import VisionTower
from pe_jax.models.vlm import VLM
from pe_jax.types import split

Model = CLIP | VisionTower | VLM
THREADS = 8  # Pillow decodes outside the interpreter lock


def vision_tower(model: Model) -> VisionTower:
    """The vision tower: of a model that has more, or the model itself."""
    return model if isinstance(model, VisionTower) else model.vision


def require_text(model: Model, purpose: str) -> CLIP:
    """The model, if it has a text tower.

    Raises:
      ValueError: saying which models do.
    """
    if not isinstance(model, CLIP):
        raise ValueError(
            f"{purpose} compares images with texts, and this model has a vision tower only (PE-Lang, PE-Spatial); "
            "use a PE-Core model such as PE-Core-B16-224, or one you trained with the contrastive stage."
        )
    return model


def preprocess_of(model: Model, image_size: int | None = None) -> Preprocess:
    """The model's own evaluation transform, or PE's at its configured size; `image_size` changes the size alone."""
    own = getattr(model, "preprocess", None) or Preprocess(vision_tower(model).config.image_size)
    return own if image_size is None else dataclasses.replace(own, size=image_size)


def tokenizer_of(model: CLIP) -> Tokenizer:
    return getattr(model, "tokenize", None) or Tokenizer(model.text.config.context_length)


def mesh_of(model: nnx.Module) -> Mesh | None:
    """The mesh that the parameters lie on; None where they are on one device without one."""
    placed = jax.tree.leaves(model)[0].sharding
    return placed.mesh if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) else None


def fingerprint(model: nnx.Module) -> str:
    """16 hex digits that tell weights apart: of every parameter's name, shape, dtype and bits.

    Equal on any mesh and any number of processes, for it adds up integers; no parameter leaves its device.
    """
    digest = hashlib.sha256()
    _, params = split(model)
    for name, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(name)} {leaf.shape} {leaf.dtype} {np.asarray(_checksum(leaf))}".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Two sums, modulo 2^32, of the elements' bits mixed with their places."""
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    sums = []
    for start in (0x9E3779B9, 0x85EBCA6B):
        mixed = bits ^ (place * jnp.uint32(start) + jnp.uint32(start >> 7))
        for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):  # Wellons' 32-bit mixer
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(multiplier)
        sums.append(jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32))
    return jnp.stack(sums)


def batches(
    model: Model,
    forward: Callable[[Any, jax.Array], Any],
    rows: Sequence[Any],
    load: Callable[[Any], np.ndarray],
    batch_size: int,
    *,
    replicate: bool = True,
) -> Iterator[tuple[Any, int]]:
    """Runs `forward(model, batch)` over all rows, in order.

    Args:
      model: parameters on one device or any mesh.
      forward: a module-level function, so that its compilation is shared by all calls; gives arrays [..., B, ...].
      rows: anything indexable, one entry an example.
      load: entry → array, of one shape and dtype for all; runs on threads, one batch ahead of the device.
      batch_size: B, global; brought up to a multiple of the ways the mesh cuts a batch.
      replicate: whether every device, and with it every process, gets all of the result; else it stays cut as XLA left
        it, by examples as a rule.

    Yields:
      What `forward` gives, and how many of its rows are real; the others, at the end, are to be dropped.

    Raises:
      ValueError: if there are no rows, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if not len(rows):
        raise ValueError("there is nothing to evaluate: the data holds no example.")
    mesh = mesh_of(model)
    ways = 1 if mesh is None else sharding.batch_ways(mesh)
    size = -(-batch_size // ways) * ways
    run = _compiled(forward, mesh if replicate else None)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

        def begin(start: int) -> list[concurrent.futures.Future[np.ndarray] | None]:
            wanted = _own_rows(mesh, size)
            return [
                pool.submit(_load, load, rows, start + row) if row in wanted and start + row < len(rows) else None
                for row in range(size)
            ]

        pending = begin(0)
        like: np.ndarray | None = None
        for start in range(0, len(rows), size):
            loaded = [None if future is None else future.result() for future in pending]
            if start + size < len(rows):
                pending = begin(start + size)
            if like is None:  # a process whose rows of the first batch are all padding needs to know the shape too
                like = next((row for row in loaded if row is not None), None)
                like = load(rows[0]) if like is None else like
            empty = np.zeros_like(like)
            placed = _placed([empty if row is None else row for row in loaded], mesh)
            with _on(mesh):  # not around the yield: the caller's own computations are none of this mesh's
                out = run(model, placed)
            yield out, min(size, len(rows) - start)


def embed_images(model: CLIP, images: Sequence[Any], batch_size: int = 64, image_size: int | None = None) -> np.ndarray:
    """Unit embeddings [N, E] float32 of images: paths, encoded bytes, PIL images or uint8 arrays."""
    preprocess = preprocess_of(model, image_size)
    forward = image_forward(preprocess)
    parts = batches(model, forward, images, preprocess.pixels, batch_size)
    return np.concatenate([np.asarray(out)[:count] for out, count in parts])


def embed_texts(model: CLIP, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """Unit embeddings [N, E] float32 of texts."""
    ids = list(tokenizer_of(model)(list(texts)))
    parts = batches(model, _text_forward, ids, np.asarray, min(batch_size, len(ids)))
    return np.concatenate([np.asarray(out)[:count] for out, count in parts])


def normalized(pixels: jax.Array, preprocess: Preprocess) -> jax.Array:
    """uint8 [B, H, W, 3] → what the model takes, on the device: a byte a channel crosses the bus."""
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(preprocess.mean)) / jnp.asarray(preprocess.std)


@functools.cache
def image_forward(preprocess: Preprocess) -> Callable[[CLIP, jax.Array], jax.Array]:
    """The pass from uint8 pixels to unit embeddings."""

    def forward(model: CLIP, pixels: jax.Array) -> jax.Array:
        return model.encode_image(normalized(pixels, preprocess))

    return forward


def _text_forward(model: CLIP, ids: jax.Array) -> jax.Array:
    return model.encode_text(ids)


@functools.cache
def _compiled(forward: Callable[[Any, jax.Array], Any], replicated: Mesh | None) -> Callable[[Any, jax.Array], Any]:
    return jax.jit(forward, out_shardings=None if replicated is None else sharding.replicated(replicated))


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _load(load: Callable[[Any], np.ndarray], rows: Sequence[Any], row: int) -> np.ndarray:
    return load(rows[row])  # reading the row, too, is the thread's work


def _own_rows(mesh: Mesh | None, size: int) -> set[int]:
    """The rows of a batch that this process's devices hold."""
    if mesh is None:
        return set(range(size))
    places = sharding.batch_sharding(mesh).addressable_devices_indices_map((size,))
    return {row for place in places.values() if place for row in range(*place[0].indices(size))}


def _placed(rows: list[np.ndarray], mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(np.stack(rows))
    shape = (len(rows), *rows[0].shape)
    return jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), lambda index: np.stack(rows[index[0]]))

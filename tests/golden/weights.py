"""The written rule for test weights and inputs: numbers from a seed and a tensor's name alone, no torch, no download.

Every tensor of a checkpoint in Meta's layout (names and shapes: PE's released files) is filled from its own stream, so
that none stays at a value that could hide a mistake: norm scales around 1, biases and LayerScale away from 0,
embeddings small, matrices at 1/sqrt(fan-in). A stream is the raw bits of PCG64 seeded by (seed, crc32 of the name);
NumPy promises those bits for ever, so figures stored today hold with any later NumPy.
"""

import math
import zlib

import numpy as np

from pe_jax.convert import pe
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig

Tensors = dict[str, np.ndarray]  # in Meta's names and layout


def noise(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 draws, uniform with mean 0 and variance 1."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # [-1, 1), exact
    return (unit * np.float32(3**0.5)).reshape(shape)


def images(seed: int, *shape: int) -> np.ndarray:
    """Images or videos [..., H, W, 3], float32 in [-1, 1)."""
    return noise(seed, "images", shape) / np.float32(3**0.5)


def ids(seed: int, batch: int, length: int, vocab_size: int) -> np.ndarray:
    """Texts [B, L] int32 as a tokenizer writes them: start, words, end (the largest id), zeros; each another length."""
    words = np.abs(noise(seed, "ids", (batch, length))) / 3**0.5 * (vocab_size - 3)
    out = 1 + words.astype(np.int32)  # 1 .. vocab - 3
    for row, text in enumerate(out):
        end = length - 1 - (row * 3) % (length - 1)  # the whole context first, then shorter ones
        text[0], text[end], text[end + 1 :] = vocab_size - 2, vocab_size - 1, 0
    return out


def tensors(config: CLIPConfig | VisionConfig, seed: int = 0) -> Tensors:
    """Every tensor of a checkpoint of `config` in Meta's layout, filled by the rule."""
    return {name: _fill(seed, name, shape) for name, shape in pe.shapes(config, "meta").items()}


def _fill(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw, leaf = noise(seed, name, shape), name.rpartition(".")[2]
    if name == "logit_scale":
        return np.asarray(math.log(1 / 0.07) + 0.1 * draw, np.float32)
    if leaf in ("bias", "in_proj_bias"):
        return np.float32(0.1) * draw
    if leaf == "gamma":
        return np.float32(0.5) + np.float32(0.2) * draw
    if leaf == "weight" and len(shape) == 1:  # of a LayerNorm
        return np.float32(1) + np.float32(0.2) * draw
    if leaf == "class_embedding" or leaf == "positional_embedding" or name == "token_embedding.weight":
        return np.float32(0.1) * draw
    if leaf == "probe":
        return draw
    fan_in = shape[0] if leaf in ("proj", "text_projection") else math.prod(shape[1:])  # those two are [in, out]
    return np.float32(fan_in**-0.5) * draw

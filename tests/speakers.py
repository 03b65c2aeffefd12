"""Small vision-language models that can be talked to: random weights, a vocabulary of 440 pieces, 16 px images."""

import functools
import pathlib
import tempfile

import jax
import numpy as np
from flax import nnx

from pe_jax.assistant import Assistant
from pe_jax.data import chat, tokenizers
from pe_jax.models import zoo
from pe_jax.models.decoder import DecoderConfig
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLM, VLMConfig
from pe_jax.types import split
from tests.data import vocabularies

# Every axis a number of its own. A chunk has 4 x 4 patches and, by pooling 2, 4 visual tokens.
TOWER = VisionConfig(16, 4, 24, 2, 2, 40, True, "none", None, norm_post=False)
READER = DecoderConfig(vocabularies.BASE + 256, 32, 2, 4, 2, 10, 48, 400, 100.0, tied=False)
CONFIG = VLMConfig(TOWER, READER, image_token=vocabularies.IMAGE, pooling=2)


@functools.cache
def model(seed: int = 1) -> VLM:
    """Random, and all that it says is text: what scores special tokens is small."""
    graphdef, params = split(zoo.abstract(CONFIG))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return np.float32(mean) + np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(draw, params)
    params["decoder"]["output"][vocabularies.BASE :] = 0
    params["decoder"]["output"][:256] *= 0.2  # single bytes, most of which are no whole character
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, params))


@functools.cache
def assistant(max_tiles: int = 3) -> Assistant:
    folder = pathlib.Path(tempfile.mkdtemp())
    tokenizer = tokenizers.load(vocabularies.llama(folder)[1])
    vision = chat.Vision(16, 4, 2, max_tiles=max_tiles, frames=3)
    return Assistant(model(), tokenizer, chat.template("llama3"), vision, "tiny")


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def asked(text: str, *images: np.ndarray, **more) -> chat.Conversation:
    return chat.Conversation((("user", text),), images, **more)

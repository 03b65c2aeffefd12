"""Names shared by every part, the two forms of a model, and the table of batch fields.

A model is an NNX module where a forward pass is written or called. Wherever parameters are stored, updated, sharded or
saved they are one nested plain dict of arrays. `split` goes from the first form to the second, `flax.nnx.merge` back.

| field | shape | dtype | range | meaning |
|---|---|---|---|---|
| image | [B, H, W, 3] | uint8 | 0..255 | RGB pixels; a model takes them as float in [-1, 1] |
| video | [B, F, H, W, 3] | uint8 | 0..255 | F frames of each clip |
| teacher | [B, N, T] | int8 | -127..127 | a teacher's vector for each of N places, of which the direction counts |
| text | [B, L] | int32 | 0..49407 | token ids, EOT 49407 the largest, padded with 0 |
| index | [B] | int64 | 0.. | global record number, of a packed row its first; stays on the host |

Rows of conversations (`pe_jax.data.chat`), of L tokens and C image chunks; T visual tokens stand for a chunk:

| field | shape | dtype | range | meaning |
|---|---|---|---|---|
| tokens | [B, L] | int32 | 0..V-1 | ids to read; the image token at visual places, 0 for padding |
| targets | [B, L] | int32 | -1..V-1 | id to say after each place; -1 where nothing is asked |
| segments | [B, L] | int32 | 0.. | 1, 2, … for the samples of a row, which do not see each other; 0 for padding |
| slots | [B, L] | int32 | -1..C·T-1 | which visual token of the row stands there, chunk · T + t; -1 for text |
| chunks | [B, C, S, S, 3] | uint8 | 0..255 | RGB pixels, in the order of their places; the unused last ones are zeros |
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx

Params: TypeAlias = dict[str, Any]  # nested plain dict of arrays
Batch: TypeAlias = dict[str, jax.Array]
HostBatch: TypeAlias = dict[str, np.ndarray]
Metrics: TypeAlias = dict[str, jax.Array]  # scalars
Key: TypeAlias = jax.Array


class Inputs(NamedTuple):
    """The batches a stage takes."""

    kind: str  # one of `pe_jax.data.KINDS`
    shape: Mapping[str, Any]  # what of the model shapes them: further arguments of `pe_jax.data.create`


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module's structure, and its parameters as a nested plain dict."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)

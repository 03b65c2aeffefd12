"""Names shared by every part, and the table of batch fields.

| field | shape | dtype | range | meaning |
|---|---|---|---|---|
| image | [B, H, W, 3] | uint8 | 0..255 | RGB pixels; a model takes them as float in [-1, 1] |
| video | [B, F, H, W, 3] | uint8 | 0..255 | F frames of each clip |
| text | [B, L] | int32 | 0..49407 | token ids, EOT 49407 the largest, padded with 0 |
| index | [B] | int64 | 0.. | global record number; stays on the host |
"""

from typing import Any, TypeAlias

import jax
import numpy as np

Params: TypeAlias = dict[str, Any]  # nested plain dict of arrays
Batch: TypeAlias = dict[str, jax.Array]
HostBatch: TypeAlias = dict[str, np.ndarray]
Metrics: TypeAlias = dict[str, jax.Array]  # scalars
Key: TypeAlias = jax.Array

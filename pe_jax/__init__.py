"""Perception Encoder (arXiv 2504.13181) in JAX: exact models, contrastive training, conversion, probes.

The names in `__all__` are the stable public interface; `help(pe_jax.load)` tells more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pe_jax.api import available, create, load
    from pe_jax.sharding import make_mesh

__all__ = ["available", "create", "load", "make_mesh"]


def __getattr__(name: str) -> Any:
    # Imported on first use: machines that hold only jax and flax can import the models without the rest.
    if name not in __all__:
        raise AttributeError(f"module 'pe_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module("pe_jax.sharding" if name == "make_mesh" else "pe_jax.api"), name)

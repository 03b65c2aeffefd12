"""Files → this host's batches, in NumPy: no model is imported and no device array is made here."""

from pe_jax.data.image import Preprocess
from pe_jax.data.text import Tokenizer

__all__ = ["Preprocess", "Tokenizer"]

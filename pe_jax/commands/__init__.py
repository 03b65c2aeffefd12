"""The commands of `pe-jax`, one module each; see `pe_jax.cli`."""

"""Perception Encoder in JAX."""

"""The commands of `pe-jax`, one module each; see `pe_jax.cli`. Here is what several of them share."""

import argparse
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model to load."""
    parser.add_argument("--model", required=True, help="a released name, or the directory of a run or of weights")
    parser.add_argument("--weights", help="a .pt or .safetensors file, or directory, with the weights of --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations (the model's own)")
    parser.add_argument("--offline", action="store_true", help="use only weights that are already on this machine")


def load_model(args: argparse.Namespace, mesh_shape: Any = None, devices: Any = None) -> Any:
    """The model that `add_model_arguments` asked for, over `devices`, by default all, where there are several."""
    import jax

    import pe_jax

    mesh = pe_jax.make_mesh(mesh_shape, devices) if len(devices or jax.devices()) > 1 else None
    return pe_jax.load(args.model, args.weights, offline=args.offline, dtype=args.dtype, mesh=mesh)

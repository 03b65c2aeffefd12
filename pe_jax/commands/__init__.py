"""The commands of `pe-jax`, one module each; see `pe_jax.cli`. Here is what several of them share."""

import argparse
import sys
import time
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


def part_of(text: str) -> tuple[int, int]:
    """I and N of "I/N": this is process I, counted from 0, of N."""
    index, slash, parts = text.partition("/")
    if not (slash and index.isdigit() and parts.isdigit()):
        raise ValueError(f"--part {text}: want I/N, such as 0/4 to 3/4.")
    return int(index), int(parts)


class Bars:
    """Where a long run is, on stderr: bars in a terminal, elsewhere a line a stage and every half minute.

    Called with what is being done, how much of it is done and of how much; a total of 0 tells a fact.
    """

    def __init__(self, every_seconds: float = 30.0):
        self._every, self._bars, self._tasks = every_seconds, None, {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._told = 0.0

    def __enter__(self) -> "Bars":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = progress.Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not total:
            self._bars.console.print(stage) if self._bars else print(stage, file=sys.stderr, flush=True)
        elif self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done)
        else:
            now = time.monotonic()
            first, start = self._begun.setdefault(stage, (now, done))
            if done > start and (done == total or now - self._told >= self._every):
                self._told = now
                left = round((total - done) * (now - first) / (done - start))
                print(f"{stage}: {done:,} of {total:,}, {left // 60}:{left % 60:02} left", file=sys.stderr, flush=True)


def add_assistant_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which vision-language model to load, and how it reads."""
    parser.add_argument("--model", required=True, help="a run of the language stage, or a folder of Perception-LM")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations (the model's own)")
    parser.add_argument("--offline", action="store_true", help="use only weights that are already on this machine")
    own = parser.add_argument_group("where the model's folder does not say it, or otherwise than it says")
    own.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json, a tokenizer.model, or their folder")
    own.add_argument("--template", help="llama3, qwen2, or plain for a warm-up")
    own.add_argument("--image-size", type=int, metavar="PIXELS", help="of a chunk's side")
    own.add_argument("--max-tiles", type=int, metavar="N", help="tiles of an image beside its thumbnail; 1: the image")
    own.add_argument("--frames", type=int, metavar="N", help="the most frames of a video")


def load_assistant(args: argparse.Namespace) -> Any:
    """The assistant that `add_assistant_arguments` asked for, over the devices of this process."""
    import jax

    import pe_jax
    from pe_jax import assistant

    devices = jax.local_devices()
    given = {name: getattr(args, name, None) for name in ("tokenizer", "template", "image_size", "max_tiles", "frames")}
    return assistant.load(
        args.model,
        **given,
        dtype=args.dtype,
        mesh=pe_jax.make_mesh(None, devices) if len(devices) > 1 else None,
        offline=args.offline,
    )

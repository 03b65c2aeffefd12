"""Models of pe_jax in CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark), whose metrics then run unchanged.

  python -m pe_jax.interop.clip_benchmark eval --model_type pe_jax --model PE-Core-B16-224 --pretrained released \\
      --dataset wds/mini --dataset_root data --no_amp

is the harness's own command with one more `model_type`; `load` gives the three objects that its functions take. The
only module of pe_jax that imports torch, and only when one of them is used: batches cross from torch to JAX and back
as NumPy arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import pe_jax
from pe_jax.data.image import Preprocess
from pe_jax.data.text import Tokenizer
from pe_jax.evals import inference
from pe_jax.models.clip import CLIP

NAME = "pe_jax"  # of the harness's `model_type`
RELEASED = ("", "released")  # what `pretrained` may be where the model's own weights are meant


class Model:
    """What the harness calls a model: torch tensors in, unit float32 embeddings as torch tensors out."""

    def __init__(self, model: CLIP):
        self.model = model
        self._from_pixels = inference.image_forward(inference.preprocess_of(model))

    def encode_image(self, images: Any) -> Any:
        """[B, E] of a batch that `Transform` made: uint8 [B, 3, H, W]."""
        import torch  # pyright: ignore[reportMissingImports]

        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; want uint8 from this model's own transform, before scaling.")
        return self._embed(self._from_pixels, images.permute(0, 2, 3, 1), images.device)

    def encode_text(self, ids: Any) -> Any:
        """[B, E] of token ids [B, L] from `Tokens`."""
        return self._embed(_text, ids.int(), ids.device)

    def _embed(self, forward: Callable[[Any, jax.Array], Any], given: Any, device: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        rows = list(given.cpu().numpy())
        # Batches of the harness differ in size, captions most of all: few sizes are few compilations.
        size = 1 << (len(rows) - 1).bit_length()
        parts = inference.batches(self.model, forward, rows, np.asarray, size)
        return torch.from_numpy(np.concatenate([np.asarray(out)[:count] for out, count in parts])).to(device)

    # What the harness does with a module of torch; there are no weights to move and no mode to change.
    def to(self, *_: Any, **__: Any) -> "Model":
        return self

    def eval(self) -> "Model":
        return self


class Transform:
    """An image, as `Preprocess` takes it → uint8 [3, H, W]. Normalised on the device: a byte a channel is moved."""

    def __init__(self, preprocess: Preprocess):
        self.preprocess = preprocess

    def __call__(self, image: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        return torch.from_numpy(self.preprocess.pixels(image)).permute(2, 0, 1).contiguous()


class Tokens:
    """Texts → token ids, int64 [B, L]."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        return torch.from_numpy(self.tokenizer(texts)).long()


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[Model, Transform, Tokens]:
    """Model, transform and tokenizer, as the harness's loaders give them.

    Args:
      model_name: a released name, or the directory of a run or of weights.
      pretrained: weights of that model, as `pe_jax.load` takes them; "released" or "" are its own.
      cache_dir: is not used; `PE_JAX_CACHE` says where downloads go.
      device: of the harness's tensors; JAX computes on its own devices, all of them.

    Raises:
      ValueError: for a model without a text tower.
    """
    del cache_dir, device
    mesh = pe_jax.make_mesh() if len(jax.devices()) > 1 else None
    model = pe_jax.load(model_name, None if pretrained in RELEASED else pretrained, mesh=mesh)
    return adapt(model)


def adapt(model: Any) -> tuple[Model, Transform, Tokens]:
    """As `load`, of a model that is there already."""
    clip = inference.require_text(model, "CLIP_benchmark")
    return Model(clip), Transform(inference.preprocess_of(clip)), Tokens(inference.tokenizer_of(clip))


def register() -> None:
    """Makes `--model_type pe_jax` known to the harness of this process.

    Raises:
      ModuleNotFoundError: where it is not installed.
    """
    try:
        from clip_benchmark import models  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; CLIP_benchmark brings torch, so give it an environment of its own: pip install clip-benchmark."
        ) from error
    models.TYPE2FUNC[NAME] = load
    if NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(NAME)


def _text(model: CLIP, ids: jax.Array) -> jax.Array:
    return model.encode_text(ids)


def main() -> None:
    """The harness's own command line, which then knows our models."""
    register()
    from clip_benchmark import cli  # pyright: ignore[reportMissingImports]

    cli.main()


if __name__ == "__main__":
    main()

"""The reference's side of a comparison: Meta's module at any configuration, outputs and gradients (PyTorch, CPU)."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pe_jax.models.clip import CLIPConfig
from pe_jax.models.text import TextConfig
from pe_jax.models.vision import VisionConfig
from tests.golden import compare

POOLS = {"attention": "attn", "class": "tok", "average": "avg", "none": "none"}


def vision_fields(c: VisionConfig) -> dict[str, Any]:
    """Our configuration as the arguments of Meta's vision tower."""
    return {
        "patch_size": c.patch_size,
        "width": c.width,
        "layers": c.depth,
        "heads": c.heads,
        "mlp_ratio": c.mlp_width / c.width,
        "output_dim": c.output_width,
        "ls_init_value": c.layer_scale,
        "drop_path": c.drop_path,
        "image_size": c.image_size,
        "use_abs_posemb": True,
        "use_cls_token": c.class_token,
        "use_rope2d": c.rope,
        "pool_type": POOLS[c.pool],
        "attn_pooler_heads": c.pool_heads,
        "use_ln_pre": True,
        "use_ln_post": c.norm_post,
    }


def text_fields(c: TextConfig) -> dict[str, Any]:
    """Our configuration as the arguments of Meta's text tower."""
    return {
        "context_length": c.context_length,
        "width": c.width,
        "heads": c.heads,
        "layers": c.depth,
        "output_dim": c.output_width,
        "mlp_ratio": c.mlp_width / c.width,
        "vocab_size": c.vocab_size,
    }


def build(pe: ModuleType, config: CLIPConfig | VisionConfig) -> torch.nn.Module:
    """Meta's module for `config`, in inference mode; its values are whatever its initialisation left."""
    if isinstance(config, VisionConfig):
        return pe.VisionTransformer(**vision_fields(config)).eval()
    vision, text = pe.PEConfig(**vision_fields(config.vision)), pe.PETextConfig(**text_fields(config.text))
    return pe.CLIP(vision, text).eval()


def evaluate(
    module: torch.nn.Module,
    tensors: Mapping[str, np.ndarray],
    forward: Callable[..., dict[str, torch.Tensor]],
    *inputs: np.ndarray,
    dtype: torch.dtype = torch.float64,
    gradients: bool = True,
) -> tuple[compare.Arrays, compare.Arrays]:
    """As `compare.evaluate`, by PyTorch in `dtype`; images go in channels last and their gradients come so, too.

    The tensors are loaded strictly: every name and shape of the module and of the rule must agree.
    """
    module.to(dtype)
    module.load_state_dict({name: torch.from_numpy(np.asarray(x)) for name, x in tensors.items()}, strict=True)
    module.zero_grad()
    module.requires_grad_(gradients)
    leaves = [torch.from_numpy(np.array(x)) for x in inputs]
    leaves = [x.to(dtype).requires_grad_(gradients) if x.is_floating_point() else x.long() for x in leaves]
    outputs = forward(module, *(x.movedim(-1, -3) if x.is_floating_point() else x for x in leaves))
    found = {name: x.detach().numpy() for name, x in outputs.items()}
    if not gradients:
        return found, {}
    scalar = sum((torch.from_numpy(compare.output_weights(n, x.shape)) * x).sum() for n, x in outputs.items())
    scalar.backward()
    grads = {name: _gradient(dict(module.named_parameters())[name]) for name in tensors}
    return found, grads | {f"input {i}": _gradient(x) for i, x in enumerate(leaves) if x.is_floating_point()}


def _gradient(x: torch.Tensor) -> np.ndarray:
    """The gradient by `x`; zeros where the scalar does not depend on it."""
    return (torch.zeros_like(x) if x.grad is None else x.grad).detach().numpy()


def embedding(module: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"embedding": _vision(module)(images)}


def features(*layers: int) -> Callable[..., dict[str, torch.Tensor]]:
    """Tokens after each of `layers` (counted from 1), one pass for each; 0 is what enters the first block."""

    def forward(module: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        tower, out = _vision(module), {}
        for k in layers:
            if k == 0:
                hook = tower.ln_pre.register_forward_hook(lambda _, __, x: out.__setitem__("layer 0", x))
                tower.forward_features(images, layer_idx=0)
                hook.remove()
            else:
                out[f"layer {k}"] = tower.forward_features(images, layer_idx=k - 1 if k > 0 else k)
        return out

    return forward


def text(module: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"text": module.encode_text(ids)}


def pair(module: Any, images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("image", "text", "scale"), module(images, ids), strict=True))


def video(normalize: bool) -> Callable[..., dict[str, torch.Tensor]]:
    def forward(module: Any, videos: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"video": module.encode_video(videos, normalize=normalize)}

    return forward


def _vision(module: Any) -> Any:
    return getattr(module, "visual", module)

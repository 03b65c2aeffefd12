"""One whole update beside Meta's module, open_clip and big_vision: python -m benchmarks.train_step

Runs in the environment of `make parity`; set PERCEPTION_MODELS and BIG_VISION to checkouts of the two repositories. An
update is forward, contrastive loss, backward, clipping and AdamW, of both towers. For each peer ours is configured to
be its architecture:

  Meta        PyTorch, eager and compiled: PE itself, from the same weights
  open_clip   PyTorch, eager and compiled: a ViT-S/16 with class-token pooling, learned positions, causal text
  big_vision  JAX: a ViT-S/16 with attention pooling (MAP), no class token, sigmoid loss; its model code is imported as
              it is, the update of trainers/proj/image_text/siglip.py written out with optax, since that file starts
              TensorFlow

What is left different beside big_vision: our norm before the blocks, our causal mask over the text (all attention is
computed in full) and our softmax for its sigmoid; none of it is a hundredth of the matrix products.
"""

import functools
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.forward import COMPILED, META
from benchmarks.results import OURS

OPEN_CLIP, OPEN_CLIP_COMPILED = "open_clip", "open_clip, torch.compile"
BIG_VISION = "big_vision"
ADAM = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.1, "grad_clip": 1.0}
Side = tuple[Callable[[], Any], dict[str, Any]]  # an update that gives its loss, and what `turns` should know of it


def prepare(
    side: Callable[..., Side],
    model: Any,
    batch: int,
    like: str | None = None,
    dtype: str = "float32",
    remat: str = "none",
    device: str = "cpu",
    repeats: int = 1,
) -> Callable[[], Any]:
    """What a worker runs: updates, giving all losses so far and the number of parameters.

    Args:
      side: builds a program from the configuration, uint8 images [B, H, W, 3], token ids [B, L] and the device.
      model: of ours, as `zoo.architecture` takes it.
      batch: pairs of an update.
      like: "meta" starts from the same weights everywhere; another peer has its own.
      dtype: of activations; parameters and moments are float32.
      remat: what the backward pass keeps, a key of `layers.REMAT_POLICIES`; Meta's module knows "none" and "block".
      device: where both frameworks run, "cpu" or "cuda".
      repeats: updates in a row, which a GPU is given without waiting for each.
    """
    from pe_jax.models import zoo
    from tests.golden import weights

    how = {"dtype": dtype, "remat": remat}
    config = zoo.architecture({"base": zoo.architecture(model), "vision": how, "text": how})
    size, text = config.vision.image_size, config.text
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    ids = weights.ids(0, batch, text.context_length, text.vocab_size)
    tensors = weights.tensors(config) if like == "meta" else None
    update, known = side(config, tensors, images, ids, device)
    losses: list[float] = []

    def run() -> dict[str, Any]:
        start = turns.clock()
        told = [update() for _ in range(repeats)]
        losses.extend(float(loss) for loss in told)  # waits for them
        return {"seconds": (turns.clock() - start) / repeats, "losses": losses} | known

    return run


def _ours(config: Any, tensors: Any, images: np.ndarray, ids: np.ndarray, device: str) -> Side:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pe_jax import metrics, sharding, train
    from pe_jax.convert import pe
    from pe_jax.models import zoo
    from pe_jax.types import split

    assert jax.default_backend() == ("gpu" if device == "cuda" else device)
    batch = len(images)
    run = train.parse(
        {
            "stage": {"name": "contrastive", "arch": zoo.to_dict(config)},
            "batch_size": batch,
            "phases": [{"image_size": config.vision.image_size, "examples": 100_000 * batch}],
            "optimizer": {"name": "adamw", "warmup_examples": batch} | ADAM,
            "data": {},
        }
    )
    mesh, (tx, _) = sharding.make_mesh({"data": 1}), train.optimizer_of(run)
    update = train.make_train_step(run.stage, tx, train.abstract_state(run.stage, tx, mesh))
    if tensors is None:
        _, params = split(run.stage.build(nnx.Rngs(0)))
    else:
        params = pe.to_params(tensors, config, layout="meta")
    params = jax.device_put(params)
    state = train.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(0))
    inputs = sharding.global_batch({"image": images, "text": ids}, mesh)

    def step() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, told = update(state, inputs)
        return told["loss"]

    return step, {
        "parameters": zoo.count(params),
        "flops": run.stage.update_flops(inputs),
        "peak_flops": metrics.peak_flops(),
    }


def _meta(config: Any, tensors: Any, images: np.ndarray, ids: np.ndarray, device: str, *, compiled: bool) -> Side:
    import torch

    from tests.parity import conftest, reference

    assert conftest  # makes torchvision importable beside a CPU torch
    sys.path.insert(0, os.environ["PERCEPTION_MODELS"])
    from core.vision_encoder import pe  # pyright: ignore[reportMissingImports]

    model: Any = reference.build(pe, config).train()
    model.load_state_dict({key: torch.from_numpy(np.asarray(x)) for key, x in tensors.items()})
    if config.vision.remat == "block":
        # The module's own switch passes its blocks more arguments than they take.
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    elif config.vision.remat != "none":
        raise ValueError(f"remat={config.vision.remat!r} has no like in Meta's module; choose none or block.")

    def loss_of(image: Any, text: Any, scale: Any) -> Any:
        logits, own = scale * image.float() @ text.float().T, torch.arange(len(image), device=device)
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    return _torch(model, loss_of, config, images, ids, device, compiled=compiled)


def _open_clip(config: Any, _: Any, images: np.ndarray, ids: np.ndarray, device: str, *, compiled: bool) -> Side:
    from tests.parity import conftest

    assert conftest
    import open_clip

    vision, text = config.vision, config.text
    model = open_clip.CLIP(
        vision.output_width,
        vision_cfg={
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        text_cfg={
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
        },
    ).train()
    return _torch(model, open_clip.ClipLoss(), config, images, ids, device, compiled=compiled)


def _torch(
    model: Any, loss_of: Any, config: Any, images: np.ndarray, ids: np.ndarray, device: str, *, compiled: bool
) -> Side:
    import torch

    torch.set_num_threads(turns.cores())
    model = model.to(device)
    run = torch.compile(model) if compiled else model
    betas, rate, decay = (ADAM["b1"], ADAM["b2"]), ADAM["learning_rate"], ADAM["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas, ADAM["eps"], decay, fused=device != "cpu")
    pixels = torch.from_numpy(images).movedim(-1, 1).contiguous().to(device)
    tokens = torch.from_numpy(ids).long().to(device)
    dtype = getattr(torch, config.vision.dtype)

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found = run((pixels.float() / 255 - 0.5) / 0.5, tokens)
        loss = loss_of(*found)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["grad_clip"])
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.detach()

    return step, {"parameters": sum(p.numel() for p in model.parameters())}


def _big_vision(config: Any, _: Any, images: np.ndarray, ids: np.ndarray, __: str) -> Side:
    import flax.training.checkpoints  # before the stand-in below: it would take it for TensorFlow
    import jax
    import jax.numpy as jnp
    import optax

    assert flax.training.checkpoints
    sys.path.insert(0, os.environ["BIG_VISION"])
    # Its models import its file helpers, and those TensorFlow, of which no update calls anything.
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]  # pyright: ignore[reportAttributeAccessIssue]
    from big_vision.models.proj.image_text import two_towers  # pyright: ignore[reportMissingImports]

    def tower(c: Any) -> dict[str, Any]:
        return {"width": c.width, "num_heads": c.heads, "mlp_dim": c.mlp_width, "depth": c.depth, "scan": True}

    patch = config.vision.patch_size
    model = two_towers.Model(
        image=tower(config.vision) | {"patch_size": (patch, patch), "pool_type": "map", "head_zeroinit": False},
        text=tower(config.text) | {"vocab_size": config.text.vocab_size},
        out_dim=config.vision.output_width,
        temperature_init=10.0,
        bias_init=-10.0,
    )
    inputs = jax.device_put((images, ids))
    one = jnp.zeros((1, *images.shape[1:]))
    params = jax.jit(lambda: model.init(jax.random.key(0), one, ids[:1])["params"])()
    tx = optax.chain(
        optax.clip_by_global_norm(ADAM["grad_clip"]),
        optax.adamw(ADAM["learning_rate"], ADAM["b1"], ADAM["b2"], ADAM["eps"], weight_decay=ADAM["weight_decay"]),
    )

    def update(state: Any, images: Any, text: Any) -> Any:
        def loss_of(params: Any) -> Any:
            pixels = (images.astype(jnp.float32) / 255 - 0.5) / 0.5
            image, texts, extra = model.apply({"params": params}, pixels, text, train=True)
            logits = image @ texts.T * extra["t"] + extra["b"]
            signs = 2 * jnp.eye(len(logits)) - 1
            return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), -1))

        params, moments = state
        loss, grads = jax.value_and_grad(loss_of)(params)
        changes, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, changes), moments), (loss, optax.tree.norm(grads))

    compiled = jax.jit(update, donate_argnums=0)
    state = (params, tx.init(params))

    def step() -> Any:
        nonlocal state
        state, (loss, _) = compiled(state, *inputs)
        return loss

    return step, {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}


def same(found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    ours = found[OURS]
    for program, out in found.items():
        print(f"  {program}: {out['parameters']:,} parameters; losses {', '.join(f'{x:.3f}' for x in out['losses'])}")
    for program, out in found.items():
        assert out["losses"][-1] < out["losses"][0], f"{program} does not learn: {out['losses']}"
        share = out["parameters"] / ours["parameters"]
        assert abs(share - 1) < 0.01, f"{program} is another model: it has {share:.3f} times our parameters"
        if settings.get("like") == "meta":  # the same weights and batch
            tolerance = 1e-4 if settings.get("dtype", "float32") == "float32" else 2e-2
            off = abs(out["losses"][0] / ours["losses"][0] - 1)
            assert off < tolerance, f"{program} begins with another loss than ours: {out['losses'][0]}, {off:.1e} off"


def _program(side: Callable[..., Side], *needs: str, **how: Any) -> turns.Program:
    run = functools.partial(prepare, functools.partial(side, **how))
    return turns.Program(run, needs, slow=how.get("compiled", False))


def _vit(depth: int, text_depth: int, size: int, words: int, **vision: Any) -> dict[str, Any]:
    """A ViT-S/16 with a text tower of its width."""
    tower = {"width": 384, "heads": 6, "mlp_width": 1536, "output_width": 384}
    return {
        "vision": tower | {"image_size": size, "patch_size": 16, "depth": depth, "rope": False} | vision,
        "text": tower | {"context_length": 32, "depth": text_depth, "vocab_size": words},
    }


def _cases(pe: Any, vit: tuple[int, int, int, int], batches: tuple[int, int], cut: str = "") -> list[turns.Case]:
    few, many = batches
    like_open_clip = _vit(*vit, class_token=True, pool="class")
    like_big_vision = _vit(*vit, class_token=False, pool="attention", pool_heads=6)
    small = f"ViT-S/16{cut}, {many} pairs, float32"
    return [
        turns.Case(
            f"PE-Core-T16-384{cut}, {few} pairs, float32",
            {"model": pe, "batch": few, "like": "meta"},
            (OURS, META, COMPILED),
        ),
        turns.Case(
            f"{small}, as open_clip's",
            {"model": like_open_clip, "batch": many},
            (OURS, OPEN_CLIP, OPEN_CLIP_COMPILED),
        ),
        turns.Case(f"{small}, as big_vision's", {"model": like_big_vision, "batch": many}, (OURS, BIG_VISION)),
    ]


SMALL = {
    "base": "PE-Core-T16-384",
    "vision": {"depth": 2, "image_size": 64},
    "text": {"depth": 2, "vocab_size": 1000},
}
TORCH = ("torch", "torchvision")
BENCHMARK = turns.Benchmark(
    "train_step",
    __doc__ or "",
    {
        OURS: _program(_ours),
        META: _program(_meta, *TORCH, "timm", "PERCEPTION_MODELS", compiled=False),
        COMPILED: _program(_meta, *TORCH, "timm", "PERCEPTION_MODELS", compiled=True),
        OPEN_CLIP: _program(_open_clip, *TORCH, "open_clip", compiled=False),
        OPEN_CLIP_COMPILED: _program(_open_clip, *TORCH, "open_clip", compiled=True),
        BIG_VISION: _program(_big_vision, "BIG_VISION"),
    },
    cases=_cases("PE-Core-T16-384", (12, 6, 224, 49408), (8, 32)),
    quick=_cases(SMALL, (2, 2, 64, 1000), (4, 4), " cut to 2 blocks and 64 px"),
    same=same,
    packages=("jax", "flax", "optax", "torch", "open_clip_torch", "numpy"),
    rounds=7,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

"""One whole update beside open_clip's and big_vision's: BIG_VISION=DIR python -m benchmarks.train_step

Runs in the environment of `make parity`. An update is forward, contrastive loss, backward, clipping and AdamW, in
float32, of a ViT-S/16 at 224 px with a six-block text tower. For each peer our towers are configured to be its own:

  open_clip   torch, eager and compiled: class-token pooling, learned positions, causal text, softmax loss
  big_vision  JAX: attention pooling (MAP), no class token, sigmoid loss; its model code is imported as it is, the
              update of trainers/proj/image_text/siglip.py written out with optax, since that file starts TensorFlow

What is left different beside big_vision: our norm before the blocks, our causal mask over the text (all attention is
computed in full) and our softmax for its sigmoid; none of it is a hundredth of the matrix products.
"""

import argparse
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns

SIZE, CONTEXT, VOCABULARY, WIDTH, JOINT = 224, 32, 49408, 384, 384
TOWER = {"width": WIDTH, "heads": 6, "mlp_width": 4 * WIDTH, "output_width": JOINT}
VISION = TOWER | {"image_size": SIZE, "patch_size": 16, "depth": 12, "rope": False}
TEXT = TOWER | {"context_length": CONTEXT, "depth": 6}
# what of ours takes a peer's shape
LIKE = {
    "open_clip": {"class_token": True, "pool": "class"},
    "big_vision": {"class_token": False, "pool": "attention", "pool_heads": 6},
}
ADAM = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.98, "weight_decay": 0.1, "grad_clip": 1.0}


def prepare(program: str, peer: str, batch: int) -> Callable[[], Any]:
    """What a worker runs: one update, giving all losses so far and the number of parameters."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    text = rng.integers(1, VOCABULARY - 2, (batch, CONTEXT)).astype(np.int32)
    text[:, -1] = VOCABULARY - 1
    build = {"ours": _ours, "open_clip": _open_clip, "compiled": _open_clip, "big_vision": _big_vision}[program]
    update, parameters = build(images, text, peer, program)
    losses: list[float] = []

    def run() -> dict[str, Any]:
        losses.append(float(update()))
        return {"losses": losses, "parameters": parameters}

    return run


def _ours(images: np.ndarray, text: np.ndarray, peer: str, _: str) -> tuple[Callable[[], Any], int]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pe_jax import sharding, train
    from pe_jax.models import zoo
    from pe_jax.types import split

    batch = len(images)
    run = train.parse(
        {
            "stage": {"name": "contrastive", "arch": {"vision": VISION | LIKE[peer], "text": TEXT}},
            "batch_size": batch,
            "phases": [{"image_size": SIZE, "examples": 100_000 * batch}],
            "optimizer": {"name": "adamw", "warmup_examples": batch} | ADAM,
            "data": {},
        }
    )
    mesh, (tx, _) = sharding.make_mesh({"data": 1}), train.optimizer_of(run)
    update = train.make_train_step(run.stage, tx, train.abstract_state(run.stage, tx, mesh))
    _, params = split(run.stage.build(nnx.Rngs(0)))
    state = train.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(0))
    inputs = sharding.global_batch({"image": images, "text": text}, mesh)

    def step() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = update(state, inputs)
        return jax.block_until_ready((state.params, metrics))[1]["loss"]

    return step, zoo.count(params)


def _open_clip(images: np.ndarray, text: np.ndarray, _: str, program: str) -> tuple[Callable[[], Any], int]:
    import torch

    from tests.parity import conftest

    assert conftest  # makes torchvision importable beside a CPU torch
    import open_clip

    torch.set_num_threads(os.cpu_count() or 1)
    model = open_clip.CLIP(
        JOINT,
        vision_cfg={"layers": 12, "width": WIDTH, "head_width": 64, "patch_size": 16, "image_size": SIZE},
        text_cfg={"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 6, "layers": 6},
    ).train()
    compiled = torch.compile(model) if program == "compiled" else model
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(), ADAM["learning_rate"], (ADAM["b1"], ADAM["b2"]), weight_decay=ADAM["weight_decay"]
    )
    pixels, tokens = torch.from_numpy(images).movedim(-1, 1).contiguous(), torch.from_numpy(text).long()

    def step() -> Any:
        optimizer.zero_grad()
        image, texts, scale = compiled((pixels.float() / 255 - 0.5) / 0.5, tokens)
        loss = loss_of(image, texts, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["grad_clip"])
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def _big_vision(images: np.ndarray, text: np.ndarray, _: str, __: str) -> tuple[Callable[[], Any], int]:
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

    tower = {"width": WIDTH, "num_heads": 6, "mlp_dim": 4 * WIDTH, "scan": True}
    model = two_towers.Model(
        image=tower | {"depth": 12, "patch_size": (16, 16), "pool_type": "map", "head_zeroinit": False},
        text=tower | {"depth": 6, "vocab_size": VOCABULARY},
        out_dim=JOINT,
        temperature_init=10.0,
        bias_init=-10.0,
    )
    inputs = jax.device_put((images, text))
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), text[:1])["params"])()
    tx = optax.chain(
        optax.clip_by_global_norm(ADAM["grad_clip"]),
        optax.adamw(ADAM["learning_rate"], ADAM["b1"], ADAM["b2"], weight_decay=ADAM["weight_decay"]),
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
        return jax.block_until_ready((state, loss))[1]

    return step, sum(leaf.size for leaf in jax.tree.leaves(params))


def same(found: Mapping[str, Any]) -> None:
    for program, out in found.items():
        assert out["losses"][-1] < out["losses"][0], f"{program} does not learn: {out['losses']}"
        share = out["parameters"] / found["ours"]["parameters"]
        print(f"  {program}: {out['parameters']:,} parameters; losses {', '.join(f'{x:.3f}' for x in out['losses'])}")
        assert abs(share - 1) < 0.01, f"{program} is another model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=LIKE, help="default: both")
    parser.add_argument("--batch", type=int, default=32)
    turns.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return turns.serve(lambda: prepare(args.worker, args.peer[0], args.batch))
    peers = args.peer or list(LIKE)
    if "big_vision" in peers and not os.environ.get("BIG_VISION"):
        parser.error("set BIG_VISION to a checkout of github.com/google-research/big_vision")
    report = turns.report("jax", "flax", "optax", "torch", "open_clip_torch", "numpy") | {"train_step": []}
    for peer in peers:
        programs = ("ours", "open_clip", "compiled") if peer == "open_clip" else ("ours", peer)
        print(f"{peer}, batch {args.batch}, float32, one update", flush=True)
        arguments = ("--peer", peer, "--batch", str(args.batch))
        result = turns.measure("benchmarks.train_step", programs, arguments, args, same)
        report["train_step"].append({"peer": peer, "batch": args.batch} | result)
        turns.show(result, programs, "ms", lambda s: f"{1e3 * s:.0f}")
    if not args.no_save:
        turns.save("train_step", report)


if __name__ == "__main__":
    main()

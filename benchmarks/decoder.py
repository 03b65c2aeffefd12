"""Language decoders beside transformers' Llama in PyTorch: python -m benchmarks.decoder

Greedy generation, float32, one CPU, the same weights and prompts on both sides, whose tokens must be equal. "prefill"
reads a prompt and gives one token; "decode" reads a short one and gives many. The model has the blocks of Llama-3.2-1B,
four of them, and a smaller vocabulary.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.results import OURS

TRANSFORMERS = "transformers"


def weights(cut: Mapping[str, Any]) -> tuple[Any, Any]:
    """The configuration, Llama-3.2-1B's with some of its fields changed, and random parameters."""
    import jax

    from pe_jax.convert import decoder
    from pe_jax.models import zoo
    from pe_jax.types import split

    config = dataclasses.replace(zoo.decoder("Llama-3.2-1B"), **cut)
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return np.float32(0.02) * random.standard_normal(leaf.shape, np.float32)

    return config, jax.tree_util.tree_map_with_path(draw, split(decoder.abstract(config))[1])


def prompts(rows: int, length: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (rows, length), dtype=np.int32)


def _ours(cut: Mapping[str, Any], rows: int, length: int, new: int) -> Callable[[], Any]:
    import jax
    from flax import nnx

    from pe_jax.convert import decoder
    from pe_jax.types import split

    config, params = weights(cut)
    model = nnx.merge(split(decoder.abstract(config))[0], jax.device_put(params))
    ids = prompts(rows, length, config.vocab_size)
    return lambda: {"tokens": np.asarray(model.generate(ids, max_new_tokens=new).tokens).tolist()}


def _transformers(cut: Mapping[str, Any], rows: int, length: int, new: int) -> Callable[[], Any]:
    import torch

    from tests.parity import conftest

    assert conftest  # makes torchvision importable beside a CPU torch
    import transformers

    from pe_jax.convert import decoder

    torch.set_num_threads(turns.cores())
    config, params = weights(cut)
    fields = transformers.LlamaConfig.from_dict(decoder.to_hf_config(config))
    fields.eos_token_id = fields.bos_token_id = None
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(fields)
    tensors = decoder.from_params(params, config, "hf")
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(fields)  # its buffers are computed, not loaded
    model = model.eval()
    ids = torch.from_numpy(prompts(rows, length, config.vocab_size)).long()
    plan = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plan)
        return {"tokens": found[:, length:].tolist()}

    return run


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    for program, out in found.items():
        assert out["tokens"] == found[OURS]["tokens"], f"{program} says something else than ours does"


LLAMA = {"depth": 4, "vocab_size": 8192}
TINY = {"depth": 2, "vocab_size": 96, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_width": 80}


def _case(cut: Mapping[str, Any], rows: int, length: int, new: int) -> turns.Case:
    name = "prefill" if new == 1 else "decode"
    title = f"{name}, {cut['depth']} blocks of {cut.get('width', 2048)}, {rows} x {length} tokens, {new} new, float32"
    settings = {"cut": cut, "rows": rows, "length": length, "new": new}
    return turns.Case(title, settings, (OURS, TRANSFORMERS), ("tokens/s", rows * (length if new == 1 else new)))


BENCHMARK = turns.Benchmark(
    "decoder",
    __doc__ or "",
    {
        OURS: turns.Program(_ours),
        TRANSFORMERS: turns.Program(_transformers, ("torch", "torchvision", "transformers")),
    },
    cases=(_case(LLAMA, 1, 512, 1), _case(LLAMA, 1, 16, 32), _case(LLAMA, 8, 16, 32)),
    quick=(_case(TINY, 2, 24, 1), _case(TINY, 3, 5, 4)),
    same=same,
    packages=("jax", "flax", "torch", "transformers", "numpy"),
    rounds=7,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

"""Every experiment's config is complete, and fits its full-size model without allocating it."""

import itertools

import jax
import pytest
from flax import nnx

from experiments import align_language, digits, pairs, pretrain_core, smoke
from pe_jax import evals, sharding, train
from pe_jax.models import zoo

CONFIGS = {
    "smoke": lambda: smoke.get_config(),
    "digits": lambda: digits.get_config(),
    "pairs": lambda: pairs.get_config("a.jsonl,test=b.jsonl,classes=digits"),
    "language": lambda: align_language.get_config("midtrain,3B"),
    **{f"ladder {row}": lambda row=row: pretrain_core.get_config(f"L14,ablation={row}") for row in (1, 9)},
    **{f"pretrain {size}": lambda size=size: pretrain_core.get_config(size) for size in pretrain_core.RUNS},
}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_config_is_complete_and_its_state_has_shapes(make):
    run = train.parse(make().to_dict())
    for config in run.evals.values():
        evals.create(config)
    tx, rate = train.optimizer_of(run)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2})
    state = train.abstract_state(run.stage, tx, mesh)
    model = nnx.eval_shape(lambda: run.stage.build(nnx.Rngs(0)))
    assert zoo.count(state.params) == zoo.count(nnx.state(model))
    kernel = state.params["vision"]["blocks"]["mlp"]["up"]["kernel"]
    assert "fsdp" in str(kernel.sharding.spec)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert moments and all(x.sharding == kernel.sharding for x in moments)
    assert 0 < rate(0) < rate(run.steps // 3)


@pytest.mark.parametrize(("size", "billions"), [("B16", 58), ("L14", 58.1), ("G14", 86.4)])
def test_the_published_runs_see_the_published_number_of_examples(size, billions):
    run = train.parse(pretrain_core.get_config(size).to_dict())
    assert run.examples(run.steps) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert run.phases[0].batch_size == 131_072


def test_each_row_of_the_ladder_changes_what_its_name_says_and_nothing_else():
    rows = [train._leaves(pretrain_core.get_config(f"L14,ablation={row}").to_dict()) for row in range(1, 10)]
    changed = []
    for before, after in itertools.pairwise(rows):
        names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        changed.append({name.removeprefix("stage.").split("[")[0] for name in names})
    sections = [sorted({name.split(".")[0] for name in names}) for names in changed]
    assert sections == [
        ["phases"],
        ["batch_size", "optimizer", "phases"],
        ["optimizer"],
        ["arch", "phases"],
        ["arch"],
        ["arch"],
        ["data"],
        ["mask_ratio"],
    ]
    assert changed[4] == {"arch.vision.rope"} and changed[5] == {"arch.vision.pool"}


@pytest.mark.parametrize(
    ("row", "billions", "thousand_steps"), [(1, 12, 366), (2, 12, 366), (3, 24, 366), (5, 24, 366), (9, 24, 366)]
)
def test_the_rows_of_the_ladder_see_the_published_number_of_examples(row, billions, thousand_steps):
    run = train.parse(pretrain_core.get_config(f"L14,ablation={row}").to_dict())
    assert run.examples(run.steps) / 1e9 == pytest.approx(billions, rel=1e-4)
    assert run.steps // 1000 == thousand_steps


@pytest.mark.parametrize("arg", ["H14", "L14,ablation=10", "L14,ablation=0", "B16,ablation=2", "L14,date=now"])
def test_what_is_no_experiment_is_refused(arg):
    with pytest.raises(ValueError, match="takes one of T16, S16, B16, L14, G14"):
        pretrain_core.get_config(arg)

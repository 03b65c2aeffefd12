import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pe_jax import optim

LAYERS = 3
CONFIG = optim.Config(learning_rate=0.05, weight_decay=0.1, grad_clip=0.5, b1=0.9, b2=0.95)


def clip_params(seed=0):
    """One of each kind of parameter of the real tree; each layer at its own scale, so that ratios differ."""
    r = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (r.normal(size=shape) * scale).astype(np.float32)

    layers = np.array([0.1, 1.0, 10.0], np.float32)
    tower = {
        "patch": {"kernel": normal(2, 2, 3, 5)},
        "class_token": normal(5),
        "position": normal(4, 5),
        "blocks": {
            "norm1": {"scale": normal(LAYERS, 5), "bias": normal(LAYERS, 5)},
            "attention": {
                "qkv": {"kernel": normal(LAYERS, 5, 3, 2, 4) * layers[:, None, None, None, None]},
                "out": {"bias": normal(LAYERS, 5)},
            },
            "mlp": {"up": {"kernel": normal(LAYERS, 5, 7) * layers[:, None, None], "bias": normal(LAYERS, 7)}},
            "scale1": {"gamma": normal(LAYERS, 5)},
        },
        "pool": {"probe": normal(1, 1, 5), "attention": {"qkv": {"bias": normal(3, 2, 4)}}},
        "projection": normal(5, 6),
    }
    text = {"token_embedding": normal(9, 5), "norm_final": {"scale": normal(5), "bias": normal(5)}}
    return {"vision": tower, "text": text, "log_scale": np.float32(2.6)}


def unstack(params):
    """Layers apart: {"path/of/leaf[layer]": array}."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = optim.path_of(keys)
        if "blocks" in path:
            flat |= {f"{'/'.join(path)}[{i}]": np.asarray(leaf[i]) for i in range(LAYERS)}
        else:
            flat["/".join(path)] = np.asarray(leaf)
    return flat


def textbook_lamb(params, gradients, rates, c, decayed):
    """LAMB as its paper states it (arXiv:1904.00962, Algorithm 2), one array per layer, in float64."""
    x = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in x.items()} for _ in "mv")
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in gradient.values()))
        for k in x:
            g = gradient[k] * min(1.0, c.grad_clip / norm)
            m[k] = c.b1 * m[k] + (1 - c.b1) * g
            v[k] = c.b2 * v[k] + (1 - c.b2) * g**2
            r = (m[k] / (1 - c.b1**t)) / (np.sqrt(v[k] / (1 - c.b2**t)) + c.eps)
            if decayed(k):
                r = r + c.weight_decay * x[k]
                r = r * np.linalg.norm(x[k]) / np.linalg.norm(r)
            x[k] = x[k] - rate * r
    return x


def run(tx, params, gradients):
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


DECAYED = {
    "vision/patch/kernel",
    "vision/blocks/attention/qkv/kernel",
    "vision/blocks/mlp/up/kernel",
    "vision/projection",
    "text/token_embedding",
}


def test_stacked_lamb_equals_the_textbook_on_each_layer():
    params, gradients = clip_params(0), [clip_params(seed) for seed in range(1, 7)]
    schedule = optim.learning_rate(CONFIG, [(3, 4), (5, 2)])
    got, _ = run(optim.create(CONFIG, schedule), params, gradients)
    rates = [float(schedule(step)) for step in range(6)]
    want = textbook_lamb(
        unstack(params), [unstack(g) for g in gradients], rates, CONFIG, lambda k: k.split("[")[0] in DECAYED
    )
    for name, value in unstack(got).items():
        np.testing.assert_allclose(value, want[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_stacked_lamb_equals_itself_on_unstacked_layers():
    params, gradients = clip_params(0), [clip_params(seed) for seed in range(1, 21)]
    tx = optim.create(CONFIG, lambda step: 0.05)

    def renamed(tree):  # no "blocks" in any name: each layer is a parameter of its own
        nested = {}
        for name, leaf in unstack(tree).items():
            node, parts = nested, name.replace("blocks", "layer").split("/")
            if name.endswith("]"):
                stem, layer = parts[-1].rstrip("]").split("[")
                parts = [*parts[:-1], layer, stem]
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = leaf
        return nested

    stacked, _ = run(tx, params, gradients)
    apart, _ = run(tx, renamed(params), [renamed(g) for g in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), renamed(stacked), apart)


def test_adamw_equals_optax_adamw():
    params, gradients = clip_params(0), [clip_params(seed) for seed in (1, 2, 3)]
    config = optim.Config(name="adamw", learning_rate=0.01, weight_decay=0.2, grad_clip=0.0, b2=0.99)
    got, _ = run(optim.create(config, lambda step: 0.01), params, gradients)
    reference = optax.adamw(0.01, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.2, mask=optim.decay_mask)
    want, _ = run(reference, params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def test_weight_decay_spares_biases_scales_and_single_vectors_by_name():
    mask = optim.decay_mask(clip_params())
    flat = {"/".join(optim.path_of(k)): v for k, v in jax.tree_util.tree_flatten_with_path(mask)[0]}
    assert {name for name, decayed in flat.items() if decayed} == DECAYED


def test_learning_rate_warms_up_by_examples_and_ends_at_zero():
    config = optim.Config(learning_rate=2.0, warmup_examples=60)
    phases = [(10, 10), (8, 20)]  # 100 examples, then 160: 260 in all
    rate = optim.learning_rate(config, phases)
    np.testing.assert_allclose(rate(0), 2 * 10 / 60, rtol=1e-6)  # the first step moves
    np.testing.assert_allclose(rate(5), 2.0, rtol=1e-6)  # 50 seen, 10 more in this batch: warm
    np.testing.assert_allclose(rate(6), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(13), 1.0, rtol=1e-6)  # 160 seen, the middle of what follows the warm-up
    np.testing.assert_allclose(rate(18), 0.0, atol=1e-6)
    assert all(rate(s) >= rate(s + 1) for s in range(6, 18))


def test_learning_rate_counts_examples_beyond_the_range_of_int32():
    phases = [(656_000, 131_072)]
    rate = optim.learning_rate(optim.Config(learning_rate=1.0), phases)
    np.testing.assert_allclose(rate(328_000), 0.5, atol=1e-6)
    assert float(optim.examples_seen(phases)(656_000)) == 656_000 * 131_072


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_examples=100 is not below the run's 100 examples"):
        optim.learning_rate(optim.Config(warmup_examples=100), [(10, 10)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "choose lamb or adamw"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"b2": 1.0}, r"must be in \[0, 1\)"),
        ({"grad_clip": -1.0}, "must be at least 0"),
    ],
)
def test_an_impossible_optimizer_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        optim.Config(**change)


def test_a_frozen_subtree_stays_as_it_is_and_holds_no_state():
    params, gradients = clip_params(0), [clip_params(1), clip_params(2)]
    tx = optim.create(CONFIG, lambda step: 0.05, trainable=lambda path: path.startswith("text/"))
    got, state = run(tx, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, got["vision"], params["vision"])
    assert not np.allclose(got["text"]["token_embedding"], params["text"]["token_embedding"])
    text = sum(x.size for x in jax.tree.leaves(params["text"]))
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * text + 5

    alone, _ = run(
        optim.create(CONFIG, lambda step: 0.05), {"text": params["text"]}, [{"text": g["text"]} for g in gradients]
    )  # the frozen part takes no share of the clipped norm
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got["text"], alone["text"])


def test_a_filter_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        optim.create(CONFIG, lambda step: 0.05, trainable=lambda path: False).init(clip_params())


@pytest.mark.parametrize("trainable", [None, lambda path: path.startswith("vision/")])
@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_optimizer_state_lies_where_its_parameter_lies(name, trainable):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*[None] * jnp.ndim(x))), clip_params())
    replicated = NamedSharding(mesh, PartitionSpec())
    tx = optim.create(optim.Config(name=name), lambda step: 0.1, trainable)
    state = jax.eval_shape(tx.init, clip_params())
    placed = optim.state_shardings(state, shardings, replicated)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert len(sharding.spec) == leaf.ndim


def test_the_cosine_ends_at_the_asked_share_of_the_peak():
    phases = [(100, 10)]
    plain, ending = (optim.learning_rate(optim.Config(learning_rate=2.0, final=x), phases) for x in (0.0, 0.01))
    assert ending(100) == pytest.approx(0.02) and ending(0) == pytest.approx(2.0)
    assert ending(50) == pytest.approx(0.02 + 0.99 * float(plain(50)))


def test_parts_move_by_their_own_share_of_the_rate_the_longest_prefix_deciding():
    params = clip_params()
    gradients = jax.tree.map(np.ones_like, params)

    def moves(rates):
        tx = optim.create(optim.Config(name="adamw", weight_decay=0.0, rates=rates), lambda step: 0.5)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return {path: np.max(np.abs(leaf)) for path, leaf in unstack(updates).items()}

    plain, own = moves({}), moves({"vision": 0.1, "vision/blocks/mlp": 0.25})
    ratios = {path: own[path] / plain[path] for path in plain}
    assert ratios["vision/blocks/mlp/up/kernel[1]"] == pytest.approx(0.25)
    assert ratios["vision/patch/kernel"] == ratios["vision/blocks/scale1/gamma[0]"] == pytest.approx(0.1)
    assert ratios["text/token_embedding"] == ratios["log_scale"] == 1


def test_a_rate_for_what_is_not_trained_is_refused():
    tx = optim.create(optim.Config(rates={"vision": 0.5}), lambda step: 0.1, lambda path: path.startswith("text"))
    with pytest.raises(ValueError, match="names 'vision', and no trained parameter lies there; the parts are text"):
        tx.init(clip_params())


def test_decay_may_reach_every_parameter():
    params = clip_params()
    zeros = jax.tree.map(np.zeros_like, params)
    tx = optim.create(optim.Config(name="adamw", weight_decay=0.1, decay_all=True), lambda step: 0.5)
    updates, _ = tx.update(zeros, tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, rtol=1e-6), updates, params)

"""Sweeps of all probes: what is planted is found, one layer alone gives the same, files, meshes, the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pe_jax import checkpoint, cli, evals, sharding
from pe_jax.evals import curves, features, inference, sweep
from pe_jax.evals.probes import KNN, Attention, Linear, Logistic
from pe_jax.models import zoo
from pe_jax.models.layers import resolve_layers
from pe_jax.models.vision import VisionTower
from pe_jax.types import split
from tests.evals.conftest import ARCH

# Quick forms of the four, whose batches eight devices share evenly.
QUICK = {
    "knn": (KNN, {"k": (1, 3)}),
    "linear": (Linear, {"rates": (0.3, 3.0), "epochs": 8, "examples": 8}),
    "logistic": (Logistic, {"c": (1.0, 100.0)}),
    "attention": (Attention, {"rates": (1e-3, 1e-2), "epochs": 8, "augment": None, "heads": 3}),
}
DEPTH, CLASSES = 3, 3


def probes(bank, data, names=tuple(QUICK), **task):
    return {name: QUICK[name][0](bank, data, **({"batch_size": 8} | task | QUICK[name][1])) for name in names}


def same(found, wanted):
    assert found.entries == wanted.entries and found.settings == wanted.settings
    np.testing.assert_array_equal(found.accuracy, wanted.accuracy)


class Planted(VisionTower):
    """A tower whose block `planted_layer` alone tells the class, in one of its tokens."""

    planted_layer = planted_token = 0

    def features(self, images, layers=(-1,), class_token=True, key=None):
        found = super().features(images, layers, True, key)
        labels = jnp.round(255 * (images[:, 0, 0, 0] + 1) / 2).astype(int)  # what the first pixel hides
        codes = 40 * jax.random.normal(jax.random.key(7), (CLASSES, self.config.width))
        first = int(self.config.class_token and not class_token)
        for asked, layer in zip(layers, resolve_layers(layers, self.config.depth), strict=True):
            if layer == self.planted_layer:
                found[asked] = found[asked].at[:, self.planted_token].add(codes[labels])
        return {layer: tokens[:, first:] for layer, tokens in found.items()}


def planted(layer, token):
    config = zoo.VisionConfig(
        image_size=8, patch_size=4, width=24, depth=DEPTH, heads=2, mlp_width=40, class_token=True, pool="none",
        output_width=None,
    )  # fmt: skip
    tower = jax.jit(lambda: split(Planted(config, rngs=nnx.Rngs(0)))[1])()
    tower = nnx.merge(split(nnx.eval_shape(lambda: Planted(config, rngs=nnx.Rngs(0))))[0], tower)
    tower.planted_layer, tower.planted_token = layer, token
    return tower


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """48 pictures of noise to learn from and 32 to classify; one pixel of each hides the class, a step of 1 in 255."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split_name, count in (("bank", 48), ("data", 32)):
        lines = []
        for i in range(count):
            image = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            image[0, 0, 0] = i % CLASSES
            PIL.Image.fromarray(image).save(folder / f"{split_name}{i}.png")
            lines.append(json.dumps({"image": f"{split_name}{i}.png", "label": i % CLASSES}) + "\n")
        (folder / f"{split_name}.jsonl").write_text("".join(lines))
    return [{"name": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in ("bank", "data")]


# The class token is the first; a patch token tells of patches that are cut off in its place, or of masked ones.
@pytest.mark.parametrize(("layer", "token", "pool"), [(1, 4, "average"), (3, 0, "class")])
def test_every_probe_finds_the_one_layer_that_tells_the_class(noise, layer, token, pool):
    found = sweep.run(planted(layer, token), probes(*noise, pool=pool))
    assert set(found) == set(QUICK)
    for name, scores in found.items():
        assert scores.entries == tuple(f"layer_{i:02}" for i in range(DEPTH + 1))
        others = [value for entry, value in scores.best.items() if entry != f"layer_{layer:02}"]
        assert scores.best[f"layer_{layer:02}"] == 1 and max(others) < 0.75, (name, scores.best)


@pytest.fixture(scope="module")
def together(model, dataset):
    return sweep.run(model, probes(dataset, dataset | {"limit": 9}, pooler=True))


def test_a_layer_alone_scores_as_in_the_sweep_of_all(model, dataset, together):
    for layer in (0, -1):
        alone = sweep.run(model, probes(dataset, dataset | {"limit": 9}, layers=(layer,)))
        for name, scores in alone.items():
            whole, row = together[name], layer % 4
            assert scores.entries == (f"layer_{row:02}",)
            np.testing.assert_array_equal(scores.accuracy[0], whole.accuracy[row])
            if "last_loss" in scores.facts:
                np.testing.assert_allclose(scores.facts["last_loss"][0], whole.facts["last_loss"][row], rtol=1e-4)


def test_entries_are_the_layers_and_what_the_tower_pools_itself(model, dataset, pictures, together):
    layers = tuple(f"layer_{i:02}" for i in range(4))
    assert together["knn"].entries == (*layers, "pooler") and together["attention"].entries == layers
    tower = inference.vision_tower(model)
    x = np.asarray(tower.pooled(tower.features(inference.preprocess_of(model)(pictures[0]))[-1]), np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    reference = KNeighborsClassifier(3, algorithm="brute", metric="cosine", weights=lambda d: np.exp(-d / 0.07))
    right = reference.fit(x, pictures[1]).predict(x[:9]) == pictures[1][:9]
    assert together["knn"].accuracy[4, 1] == right.mean()


def test_knn_and_logistic_equal_scikit_learns(model, dataset, pictures, together, tmp_path):
    task = KNN(dataset, dataset | {"limit": 9}, batch_size=8)
    rows = sweep.Sweep(model, task.task, tmp_path).keep("pooled")["bank"]
    labels = pictures[1]
    for y, entry in enumerate(rows.names):
        x = rows.entry(entry).astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        for s, c in enumerate((1.0, 100.0)):
            reference = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(x, labels)
            assert together["logistic"].accuracy[y, s] == reference.score(x[:9], labels[:9])
        for s, k in enumerate((1, 3)):
            reference = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=lambda d: np.exp(-d / 0.07))
            assert together["knn"].accuracy[y, s] == reference.fit(x, labels).score(x[:9], labels[:9])


def test_a_mesh_gives_the_same_scores(model, dataset, together):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    graphdef, params = split(model)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(model, mesh)))
    placed.preprocess = model.preprocess
    found = sweep.run(placed, probes(dataset, dataset | {"limit": 9}, pooler=True))
    for name, scores in found.items():
        same(scores, together[name])
        if "last_loss" in scores.facts:
            np.testing.assert_allclose(scores.facts["last_loss"], together[name].facts["last_loss"], rtol=1e-3)


def test_kept_tokens_train_the_same_head_as_streamed_ones(model, dataset, together, tmp_path):
    probe = dataclasses.replace(probes(dataset, dataset | {"limit": 9})["attention"], keep_tokens=True)
    (scores,) = sweep.run(model, {"attention": probe}, tmp_path).values()
    same(scores, together["attention"])
    np.testing.assert_allclose(scores.facts["last_loss"], together["attention"].facts["last_loss"], rtol=1e-4)
    assert scores.facts["cost"]["images"] == 11 + 9 and together["attention"].facts["cost"]["images"] == 88 + 9


def test_augmented_images_pass_through_the_tower_and_differ_from_epoch_to_epoch(model, dataset, tmp_path):
    probe = Linear(dataset, dataset, epochs=2, rates=(0.1,), augment={"crop_scale": (0.3, 0.6)}, batch_size=8)
    (scores,) = sweep.run(model, {"linear": probe}, tmp_path).values()
    assert scores.facts["cost"]["images"] == 2 * 11 + 11 and not list(tmp_path.iterdir())
    images = sweep.Sweep(model, probe.task, tmp_path)
    order = sweep.Epochs(11, 11, 2, seed=0)
    first, second = (
        {int(image): np.asarray(out[:, row]) for row, image in enumerate(order.batch(step))}
        for step, (out, _) in enumerate(images.stream("pooled", order, probe._augment))
    )
    assert set(first) == set(range(11)) and all(np.abs(first[i] - second[i]).max() > 1e-3 for i in range(11))


def test_a_setting_may_be_chosen_on_images_of_its_own(model, dataset, tmp_path):
    probe = KNN(dataset, dataset, dataset | {"limit": 3}, layers=(1,), k=(1, 11))
    (scores,) = sweep.run(model, {"knn": probe}, tmp_path).values()
    np.testing.assert_array_equal(scores.tuned[0, 0], 1)  # each image of the bank is its own neighbour
    assert scores.settings[scores.chosen[0]] == "k1"
    row = sweep.Scores(("layer_01",), ("a", "b"), np.array([[0.9, 0.2]]), np.array([[0.4, 0.5]]), {})
    assert row.best == {"layer_01": 0.2}  # the better on `data` is not what was chosen


def test_a_killed_sweep_goes_on_with_the_shards_that_are_there(model, dataset, together, tmp_path):
    task = probes(dataset, dataset | {"limit": 9}, ("knn",), pooler=True)
    sweep.run(model, task, tmp_path)
    whole = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bank").glob("*.safetensors")}
    (tmp_path / "data" / "features-00000-of-00001.safetensors").unlink()
    (scores,) = sweep.run(model, task, tmp_path).values()
    assert scores.facts["cost_shared"]["images"] == 9  # those of the shard that was lost
    assert whole == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bank").glob("*.safetensors")}
    same(scores, together["knn"])


def test_files_of_other_weights_or_pooling_are_refused(model, dataset, tmp_path):
    task = probes(dataset, dataset, ("knn",))
    sweep.run(model, task, tmp_path)
    graphdef, params = split(model)
    other = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 1e-3, params))
    other.preprocess = model.preprocess
    with pytest.raises(ValueError, match="holds other features: weights is"):
        sweep.run(other, task, tmp_path)
    with pytest.raises(ValueError, match="holds other features: what is 'pooled' there and 'class' here"):
        sweep.run(model, probes(dataset, dataset, ("knn",), pool="class"), tmp_path)


def test_the_size_is_told_before_and_more_than_allowed_is_refused(model, dataset, tmp_path):
    task, told = probes(dataset, dataset | {"limit": 9}, ("knn",)), []
    size = 4 * 24 * 4 * 20  # layers, width, bytes, images
    with pytest.raises(ValueError, match=r"7.68e-06 GB and 7.67e-06 GB are allowed"):
        sweep.run(model, task, tmp_path / "none", max_bytes=size - 10)
    assert not (tmp_path / "none").exists()
    sweep.run(model, task, tmp_path / "all", max_bytes=size, progress=lambda *what: told.append(what))
    assert told[0] == ("features of 20 images, 7.68e-06 GB", 0, 0)
    arrays = [path.stat().st_size for path in (tmp_path / "all").rglob("*.safetensors")]
    assert size <= sum(arrays) < 1.5 * size
    tokens = sweep.Sweep(model, task["knn"].task, tmp_path).bytes(pooled=False, tokens=True)
    assert tokens == 17 * size


def test_rows_are_gathered_across_shards(model, dataset, tmp_path):
    whole = sweep.Sweep(model, KNN(dataset, dataset, batch_size=4).task, tmp_path).keep("pooled")["bank"]
    everything = np.stack([whole.entry(name) for name in whole.names])

    cut = features.Extraction(model, dataset, tmp_path / "cut", layers="all", shards=3, batch_size=4)
    cut.run()
    rows, places = sweep.Rows(features.open(tmp_path / "cut"), whole.names), np.array([10, 0, 3, 7, 3])
    np.testing.assert_array_equal(rows.take(places), everything[:, places])
    blocks = list(rows.blocks(3))
    assert [start for start, _ in blocks] == [0, 3, 6, 7, 10]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks], 1), everything)


def test_every_image_is_seen_once_an_epoch_whatever_the_batch():
    for size in (3, 7, 11):
        order = sweep.Epochs(11, size, 3, seed=5)
        seen = np.concatenate([order.batch(step) for step in range(order.steps)])
        assert order.steps == -(-33 // size)
        assert all(sorted(seen[e * 11 : e * 11 + 11]) == list(range(11)) for e in range(3))
        np.testing.assert_array_equal(seen[:33], [sweep.Epochs(11, 1, 3, seed=5)[i] for i in range(33)])
    assert not np.array_equal(seen[:11], seen[11:22])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"rates": ()}, "rates=.* must be one or more positive"),
        ("linear", {"rates": (0.1, -1)}, "rates="),
        ("linear", {"examples": 1}, "at least 2"),
        ("linear", {"epochs": 0}, "epochs=0 must be above 0"),
        ("linear", {"augment": {"flip": 1}}, "has no 'flip'"),
        ("attention", {"keep_tokens": True}, "set augment to None"),
        ("attention", {"weight_decay": -1}, "weight_decay=-1"),
        ("attention", {"head": 2}, "did you mean heads"),
        ("logistic", {"c": (0,)}, "c=.* must be one or more positive"),
        ("logistic", {"iterations": 0}, "iterations=0"),
        ("logistic", {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_wrong_setting_is_refused(dataset, name, change, message):
    with pytest.raises(ValueError, match=message):
        evals.create({"name": name, "bank": dataset, "data": dataset} | change)


def test_what_only_the_model_or_the_data_can_tell_is_refused(model, tower, dataset, tmp_path):
    def run(model, probe, **options):
        sweep.run(model, {"it": probe}, tmp_path, **options)

    with pytest.raises(ValueError, match="pools nothing"):
        run(tower, KNN(dataset, dataset, pooler=True))
    with pytest.raises(ValueError, match="5 heads do not divide the tower's width 24"):
        run(model, Attention(dataset, dataset, heads=5))
    with pytest.raises(ValueError, match="the bank has 1 image"):
        run(model, Linear(dataset | {"limit": 1}, dataset))
    with pytest.raises(ValueError, match="float32 or float16, not 'bfloat16'"):
        run(model, KNN(dataset, dataset), dtype="bfloat16")
    with pytest.raises(ValueError, match="must have one task"):
        sweep.run(model, {"a": KNN(dataset, dataset), "b": Linear(dataset, dataset | {"limit": 3})})


def test_evaluators_of_a_run_give_a_figure_a_layer(model, dataset):
    config = {"name": "logistic", "bank": dataset, "data": dataset, "layers": (0, -1), "c": (1e4,), "every_steps": 5}
    assert evals.create(config)(model) == {"layer_00_logistic": 1.0, "layer_03_logistic": 1.0}


def test_the_command_writes_curves_table_and_card(model, dataset, tmp_path, capsys):
    folder = tmp_path / "weights"
    metadata = {"architecture": zoo.to_dict(zoo.architecture(ARCH)), "preprocess": model.preprocess.to_dict()}
    checkpoint.save_weights(folder, split(model)[1], metadata)
    out = tmp_path / "out"
    arguments = ["probe", "--model", str(folder), "--train", dataset["path"], "--data", dataset["path"], "--out"]
    arguments += [str(out), "--limit", "9", "--probes", "knn,linear", "--set", "linear.epochs=1", "linear.rates=[0.1]"]
    assert cli.main([*arguments, "--json"]) == 0
    printed, told = capsys.readouterr()
    card = json.loads(printed)
    assert card == json.loads((out / "card.json").read_text())
    assert card["weights"] == inference.fingerprint(model) and card["preprocess"] == model.preprocess.to_dict()
    assert card["images"] == {"bank": 9, "data": 9} and card["setting_chosen_on"] == "data"
    linear = card["probes"]["linear"]
    assert linear["settings"]["epochs"] == 1 and linear["chosen"]["pooler"] == "rate_0.1"
    assert card["probes"]["knn"]["settings"]["k"] == [1]  # of DINOv2's numbers none is below 9
    flops = zoo.forward_flops(model.vision.config, 16)
    assert card["probes"]["knn"]["cost_shared"] | {"seconds": 0} == {
        "seconds": 0,
        "images": 18,
        "tower_flops": 18 * flops,
    }
    rows = (out / "curves.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 5 and rows[1].startswith("knn,layer_00,0,k1,1,1,1")
    assert PIL.Image.open(out / "curves.png").width > 1000
    assert "features of 18 images" in told
    assert cli.main(arguments) == 0  # from the files
    assert "pooled" in capsys.readouterr().out
    for wrong, message in (
        (["--probes", "svm"], "'svm'; there are knn, linear"),
        (["--layers", "1,x"], "want numbers and `pooler`"),
        (["--layers", "all,3"], "all layers include 3"),
        (["--set", "logistic.c=[1]"], "with a probe out of knn, linear"),
        (["--set", "knn.k=1;2"], "is no JSON"),
        (["--max-gb", "1e-9"], "are allowed"),
    ):
        assert cli.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_figure_rings_the_best_layer_and_sets_the_pooled_features_apart(together):
    figure = curves.figure(together, "a title")
    (axis,) = figure.axes
    assert axis.get_title(loc="left") == "a title"
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    best = together["logistic"].best
    layer = max((entry for entry in best if entry != "pooler"), key=lambda entry: best[entry])
    assert f"logistic regression: {100 * best[layer]:.1f} at layer {int(layer[-2:])}" in labels
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "2", "3", "pooled"]

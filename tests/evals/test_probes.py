import jax
import numpy as np
import pytest
from flax import nnx

from pe_jax import evals, sharding
from pe_jax.evals import inference, probes
from pe_jax.types import split


def pooled_by_hand(model, pictures, pool):
    """[Y, N, D] in float64, layer by layer."""
    tower = inference.vision_tower(model)
    tokens = tower.features(inference.preprocess_of(model)(pictures), layers=tuple(range(tower.config.depth + 1)))
    first = 1 if tower.config.class_token else 0
    arrays = [np.asarray(x, np.float64) for x in tokens.values()]
    return np.stack([x[:, 0] if pool == "class" else x[:, first:].mean(1) for x in arrays])


def brute_force(queries, labels, bank, bank_labels, k):
    """Accuracy of one layer, query by query in NumPy."""
    right = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(bank_labels.max() + 1)
        for i in np.argsort(-cosines, kind="stable")[:k]:
            votes[bank_labels[i]] += np.exp(cosines[i] / 0.07)
        right += votes.argmax() == label
    return right / len(labels)


@pytest.mark.parametrize("pool", ["average", "class"])
def test_knn_equals_brute_force_at_every_layer(model, pictures, dataset, pool):
    images, labels = pictures
    data = dataset | {"limit": 7}
    found = probes.KNN(dataset, data, k=(1, 5), pool=pool, batch_size=4)(model)
    features = pooled_by_hand(model, images, pool)
    assert found == {
        f"layer_{layer:02}_k{k}": brute_force(features[layer, :7], labels[:7], features[layer], labels, k)
        for layer in range(4)
        for k in (1, 5)
    }


def test_each_image_is_its_own_nearest_neighbour(model, dataset):
    figures = evals.create({"name": "knn", "bank": dataset, "data": dataset, "k": 1, "batch_size": 5})(model)
    assert figures == {f"layer_{layer:02}_k1": 1.0 for layer in range(4)}


def test_one_layer_alone_scores_as_in_the_sweep(model, dataset):
    data = dataset | {"limit": 8}
    sweep = probes.KNN(data, dataset, k=3, batch_size=4)(model)
    for layer in (0, 2, -1):
        alone = probes.KNN(data, dataset, k=3, layers=(layer,), batch_size=4)(model)
        ((name, value),) = alone.items()
        assert sweep[name] == value


def test_the_bank_may_come_in_batches_of_any_size(model, dataset):
    figures = [probes.KNN(dataset, dataset, k=4, batch_size=size)(model) for size in (4, 64)]
    assert all(figure == figures[0] for figure in figures)


def test_a_vote_weighs_closeness_and_not_only_numbers():
    cosines = np.array([[0.9, 0.5, 0.49], [0.9, 0.89, 0.88]], np.float32)
    labels = np.array([[2, 1, 1], [2, 1, 1]])
    np.testing.assert_array_equal(probes.vote(cosines, labels, 0.07), [2, 1])


def test_a_tower_on_a_mesh_gives_the_same_curve(tower, dataset):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    graphdef, params = split(tower)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(tower, mesh)))
    probe = probes.KNN(dataset | {"limit": 9}, dataset, k=3, batch_size=4)
    assert probe(placed) == probe(tower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"pool": "mean"}, "average or class"),
        ({"layers": "last"}, '"all" or a list'),
        ({"temperature": 0.0}, "above 0"),
        ({"temprature": 1}, "did you mean temperature"),
    ],
)
def test_a_wrong_setting_is_refused(dataset, change, message):
    with pytest.raises(ValueError, match=message):
        evals.create({"name": "knn", "bank": dataset, "data": dataset} | change)


def test_what_only_the_model_or_the_data_can_tell_is_refused_too(model, tower, dataset):
    with pytest.raises(ValueError, match="k=12 neighbours were asked for and the bank has 11"):
        probes.KNN(dataset, dataset, k=12)(model)
    with pytest.raises(ValueError, match="no class token"):
        probes.KNN(dataset, dataset, k=1, pool="class")(tower)
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        probes.KNN(dataset, dataset, k=1, layers=(9,))(model)

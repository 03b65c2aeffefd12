import csv
import html.parser
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import checkpoint, cli, evals
from pe_jax.evals import analysis, inference
from pe_jax.models import zoo
from pe_jax.types import split
from tests.evals.conftest import built

BATCH = 8  # of 11 images: the second batch has 3, too few for CKA and padded


@pytest.fixture(scope="module")
def found(model, dataset):
    return analysis.Analysis(dataset, BATCH).result(model)


@pytest.fixture(scope="module")
def tokens(model, pictures):
    """[4 layers, 11 images, 17 tokens, 24], the class token first, straight from the tower."""
    tower = inference.vision_tower(model)
    features = tower.features(jnp.asarray(inference.preprocess_of(model)(pictures[0])), (0, 1, 2, 3))
    return np.stack([np.asarray(features[layer], np.float64) for layer in range(4)])


def unbiased_hsic(k, l):  # noqa: E741
    """As it is printed in the paper (Song et al. 2012, eq. 5)."""
    n = len(k)
    k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)  # noqa: E741
    terms = (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return terms / (n * (n - 3))


def plain_cka(x, y):
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return unbiased_hsic(k, l) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))


def cka_of(*features, batch=None):
    """By the class under test, from features of the same examples."""
    cka, count = analysis.CKA(), len(features[0])
    for start in range(0, count, batch or count):
        parts = [x[start : start + (batch or count)] for x in features]
        cka.add(np.stack([part @ part.T for part in parts]))
    return cka.value()


# ---- CKA and rank --------------------------------------------------------------------------------------------------


def test_cka_is_the_plain_formula_of_whole_features():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(9, 5)) + 3, random.normal(size=(9, 7))
    y[:, :5] += x
    found = cka_of(x, y)
    np.testing.assert_allclose(found, [[1, plain_cka(x, y)], [plain_cka(x, y), 1]], rtol=1e-9)
    assert 0.2 < found[0, 1] < 0.98


def test_cka_does_not_see_rotation_scale_or_shift():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(8, 6)), random.normal(size=(8, 4))
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    np.testing.assert_allclose(cka_of(7 * x @ rotation + 100, y), cka_of(x, y), rtol=1e-7)
    assert abs(cka_of(x * np.arange(1, 7), y) - cka_of(x, y)).max() > 0.01  # but a stretch of some channels


def test_cka_of_minibatches_is_that_of_the_whole_but_for_noise():
    random = np.random.default_rng(2)
    x = random.normal(size=(600, 5))
    y = x @ random.normal(size=(5, 8)) + 2 * random.normal(size=(600, 8))
    np.testing.assert_allclose(cka_of(x, y, batch=12), cka_of(x, y), atol=0.05)


def test_cka_of_unrelated_features_is_near_zero_however_wide_they_are():
    """The biased estimate would be near 1 here: more channels than examples."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(200, 300)), random.normal(size=(200, 400))
    assert abs(cka_of(x, y, batch=20)[0, 1]) < 0.1


def test_fewer_than_four_examples_tell_nothing_and_a_constant_layer_has_no_cka():
    random = np.random.default_rng(4)
    x = random.normal(size=(8, 3))
    np.testing.assert_array_equal(cka_of(x, 2 * x[::-1], batch=5), cka_of(x[:5], 2 * x[::-1][:5]))
    assert np.isnan(cka_of(x, np.zeros((8, 2)))[0, 1])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_counts_equal_directions(rank):
    """Points on the axes of a rotated cross, in a space of 6 dimensions, far from the origin."""
    random = np.random.default_rng(rank)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    points = 5 * np.concatenate([rotation[:rank], -rotation[:rank]]) + 1000
    spread = analysis.Spread()
    for part in (points[:1], points[1:3], points[3:]):
        if len(part):
            about = part - part.mean(0)
            spread.add(len(part), part.mean(0)[None], (about.T @ about)[None])
    assert spread.effective_rank()[0] == pytest.approx(rank, rel=1e-6)


def test_effective_rank_of_uneven_directions_is_exp_of_their_entropy():
    shares = np.array([0.5, 0.25, 0.25])
    assert analysis.effective_rank(8 * shares) == pytest.approx(2**1.5)
    assert math.isnan(analysis.effective_rank(np.zeros(3)))


# ---- attention -----------------------------------------------------------------------------------------------------

GRID = (4, 5)


def figures_of(tables, first):
    """Of given attention tables [K, B, N, N]."""

    def weights(reduce):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *[reduce(table) for table in jnp.asarray(tables)])

    return {name: np.asarray(value) for name, value in analysis.attention_figures(weights, GRID, first).items()}


def test_attention_on_one_token_is_found_for_what_it_is():
    table = np.zeros((2, 3, 21, 21), np.float32)
    table[..., 1 + 7] = 0.75  # row 1, column 2
    table[..., 0] = 0.25  # the class token
    got = figures_of(table, first=1)
    for name, want in {"top_share": 1, "received_entropy": 0, "global_tokens": 1, "attention_outliers": 1}.items():
        np.testing.assert_allclose(got[name], [want] * 3, atol=1e-6)
    np.testing.assert_allclose(got["class_share"], 0.25)
    np.testing.assert_allclose(
        got["given_entropy"], -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(21), rtol=1e-5
    )
    mean = np.mean([np.hypot(row - 1, column - 2) for row in range(4) for column in range(5)])
    np.testing.assert_allclose(got["distance"], mean, rtol=1e-6)
    np.testing.assert_allclose(got["head_distance"], np.full((3, 2), mean), rtol=1e-6)


def test_even_attention_has_entropy_one_and_no_outlier():
    got = figures_of(np.full((2, 3, 20, 20), 1 / 20, np.float32), first=0)
    wanted = {"top_share": 1 / 20, "received_entropy": 1, "given_entropy": 1, "global_tokens": 0}
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5)
    np.testing.assert_array_equal(got["attention_outliers"], 0)
    np.testing.assert_allclose(got["distance"], analysis.distances(GRID).mean(), rtol=1e-5)
    assert "class_share" not in got


def test_each_token_looking_at_itself_has_distance_zero_and_is_received_evenly():
    got = figures_of(np.broadcast_to(np.eye(20, dtype=np.float32), (2, 3, 20, 20)), first=0)
    np.testing.assert_allclose(got["distance"], 0)
    np.testing.assert_allclose(got["given_entropy"], 0)
    np.testing.assert_allclose(got["received_entropy"], 1, rtol=1e-6)


def test_the_top_share_is_of_one_percent_of_the_patches_and_at_least_one():
    assert [analysis.top_tokens(grid) for grid in ((3, 2), (10, 15), (32, 32))] == [1, 2, 10]


def test_outliers_lie_far_beyond_the_others():
    values = np.tile(np.linspace(1, 2, 20, dtype=np.float32), (3, 1))
    values[1, 4] = 4.9
    values[2, [0, 7]] = 50
    np.testing.assert_array_equal(analysis.outliers(jnp.asarray(values)), [0, 1, 2])


def test_a_block_that_attends_to_one_token_is_found_and_no_other():
    """Block 2 of 3 is built to attend to the patch in row 1, column 2, which carries a mark in its position."""
    config = {
        "image_size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "mlp_width": 40, "class_token": False,
        "pool": "none", "output_width": None, "rope": False,
    }  # fmt: skip
    tower = built(config, 0)
    graphdef, params = split(tower)
    params["position"] = params["position"].at[1 * 4 + 2, 0].set(60.0)
    qkv = params["blocks"]["attention"]["qkv"]
    for head in range(2):
        query, key = 36 * head, 36 * head + 12  # of 12 channels each
        qkv["kernel"] = qkv["kernel"].at[1, :, query : query + 24].set(0).at[1, 0, key].set(1)
        qkv["bias"] = qkv["bias"].at[1, query].set(40)
    planted = nnx.merge(graphdef, params)
    images = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)
    rows = np.concatenate([images.reshape(5, -1), np.ones((5, 1), np.uint8)], 1)
    forward = analysis._forward(inference.preprocess_of(planted), (4, 4), 0)
    _, blocks = jax.jit(forward)(planted, rows)
    shares = np.asarray(blocks["top_share"])
    np.testing.assert_allclose(shares[1], 1, atol=1e-3)
    assert shares[[0, 2]].max() < 0.5
    np.testing.assert_array_equal(np.asarray(blocks["global_tokens"])[:, 0], [0, 1, 0])
    assert np.asarray(blocks["received_entropy"])[1].max() < 0.02 < np.asarray(blocks["received_entropy"])[0].min()
    want = np.mean([np.hypot(row - 1, column - 2) for row in range(4) for column in range(4)])
    np.testing.assert_allclose(np.asarray(blocks["distance"])[1], want, rtol=1e-2)


# ---- the whole -----------------------------------------------------------------------------------------------------


def test_norms_and_cosines_are_those_of_the_towers_features(found, tokens):
    patches = tokens[:, :, 1:]
    norms = np.linalg.norm(patches, axis=-1)
    wanted = {
        "norm_mean": norms.mean((1, 2)),
        "norm_median": np.median(norms, -1).mean(1),
        "norm_q99": np.quantile(norms, 0.99, axis=-1).mean(1),
        "norm_max": norms.max((1, 2)),
        "class_norm": np.linalg.norm(tokens[:, :, 0], axis=-1).mean(1),
    }
    for name, want in wanted.items():
        np.testing.assert_allclose(found.figures[name], want, rtol=1e-4)
    cosines = np.sum(patches[:-1] * patches[1:], -1) / (norms[:-1] * norms[1:])
    np.testing.assert_allclose(found.figures["cosine_previous"], [np.nan, *cosines.mean((1, 2))], rtol=1e-4)


def test_effective_rank_is_of_all_images_tokens(found, tokens):
    for layer in range(4):
        flat = tokens[layer, :, 1:].reshape(11 * 16, 24)
        singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
        assert found.figures["effective_rank"][layer] == pytest.approx(analysis.effective_rank(singular**2), rel=1e-3)


def test_cka_is_of_whole_images_of_one_minibatch(found, tokens):
    flat = tokens[:, :BATCH, 1:].reshape(4, BATCH, -1)
    want = [[plain_cka(x, y) for y in flat] for x in flat]
    np.testing.assert_allclose(found.cka, want, atol=2e-5)
    assert np.ptp(found.cka) > 0.01


def test_attention_figures_are_those_of_the_towers_attention(model, pictures, found):
    tower = inference.vision_tower(model)
    tables = tower.attention(jnp.asarray(inference.preprocess_of(model)(pictures[0])), (1, 2, 3))
    for layer, table in tables.items():
        received = np.asarray(table, np.float64).mean((1, 2))
        shares = received[:, 1:] / received[:, 1:].sum(-1, keepdims=True)
        assert found.figures["top_share"][layer] == pytest.approx(shares.max(-1).mean(), rel=1e-4)
        assert found.figures["class_share"][layer] == pytest.approx(received[:, 0].mean(), rel=1e-4)
        entropy = -(shares * np.log(shares)).sum(-1).mean() / np.log(16)
        assert found.figures["received_entropy"][layer] == pytest.approx(entropy, rel=1e-4)
        own = np.asarray(table, np.float64)[:, :, 1:, 1:]
        reach = (own * analysis.distances((4, 4))).sum(-1) / own.sum(-1)
        np.testing.assert_allclose(found.head_distance[layer - 1], reach.mean((0, 2)), rtol=1e-4)


def test_it_is_an_evaluator_whose_layers_without_a_figure_have_none(model, dataset, found):
    figures = evals.create({"name": "analysis", "data": dataset, "batch_size": BATCH})(model)
    assert figures["layer_02_top_share"] == found.figures["top_share"][2]
    assert "layer_00_norm_mean" in figures and "layer_00_top_share" not in figures
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size=3 must be at least 4"),
        ({"data": {"limit": 3}}, "3 images; an analysis needs at least 4"),
        ({"image_size": 4}, "4x4 pixels make 1 x 1 patches; an analysis needs at least 4"),
        ({"batchsize": 8}, "did you mean batch_size"),
    ],
)
def test_what_cannot_be_analysed_is_refused(model, dataset, change, message):
    config = {"name": "analysis", **change, "data": dataset | change.get("data", {})}
    with pytest.raises(ValueError, match=message):
        evals.create(config)(model)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(model, dataset, tmp_path_factory):
    """What the command writes, on the eight devices that it finds."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("analysis")
    metadata = {"architecture": zoo.to_dict(model.config), "preprocess": model.preprocess.to_dict()}
    checkpoint.save_weights(folder / "tiny", split(model)[1], metadata)
    given = ["--model", str(folder / "tiny"), "--data", dataset["path"], "--batch-size", str(BATCH)]
    assert cli.main(["analyze", *given, "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_on_eight_devices_all_figures_are_those_of_one(written, found):
    document, want = json.loads((written / "analysis.json").read_text()), found.document()
    assert document["images"] == 11 and document["grid"] == [4, 4]
    for own, other in zip(document["layers"], want["layers"], strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert own[name] == (value if value is None else pytest.approx(value, rel=2e-4, abs=1e-5)), name
    np.testing.assert_allclose(document["cka"], want["cka"], atol=1e-4)
    np.testing.assert_allclose(document["head_distance"], want["head_distance"], rtol=1e-4)


def test_tables_hold_the_same_numbers(written):
    document = json.loads((written / "analysis.json").read_text())
    rows = list(csv.DictReader((written / "layers.csv").open()))
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["top_share"] == "" and float(rows[3]["top_share"]) == document["layers"][3]["top_share"]
    cka = list(csv.reader((written / "cka.csv").open()))
    assert cka[0] == ["layer", "0", "1", "2", "3"]
    np.testing.assert_allclose([[float(value) for value in row[1:]] for row in cka[1:]], document["cka"])


def test_the_page_is_one_file_that_explains_every_column(written):
    class Reader(html.parser.HTMLParser):
        sources, text = [], ""

        def handle_starttag(self, tag, attrs):
            self.sources += [value for name, value in attrs if name in ("src", "href")]

        def handle_data(self, data):
            self.text += data

    reader = Reader()
    reader.feed((written / "analysis.html").read_text())
    assert [source[:22] for source in reader.sources] == ["data:image/png;base64,"]
    for _, meaning in analysis.FIGURES.values():
        assert meaning in reader.text


def test_the_figure_shows_the_numbers(found):
    pytest.importorskip("matplotlib")
    axes = analysis.figure(found, "tiny").axes
    titles = [axis.get_title(loc="left") for axis in axes[:8]]
    assert [title[0] for title in titles] == list("abcdefgh")
    lines = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    np.testing.assert_array_equal(lines["class token"], found.figures["class_share"])
    np.testing.assert_array_equal(lines["most attended patch"], found.figures["top_share"])
    np.testing.assert_array_equal(axes[7].images[0].get_array(), found.cka)


def test_the_command_says_what_is_missing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = ["analyze", "--model", "none", "--data", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(given) == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

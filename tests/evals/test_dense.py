"""Dense probes: the one layer that tells is found, figures are those of plain counts, alone as together, on a mesh."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from sklearn.metrics import confusion_matrix

from pe_jax import checkpoint, cli, evals, sharding
from pe_jax.evals import dense, maps
from pe_jax.evals.depth import EIGEN, Depth
from pe_jax.evals.segmentation import Segmentation
from pe_jax.models import zoo
from pe_jax.types import split
from tests.evals.planted import DEPTH, PATCH, planted

NUMBERS = (0, 4, 7)  # of the masks' classes; 9 is to be ignored
METRES = {0: 1.0, 4: 2.5, 7: 6.0, 9: 0.0}


def written(folder, count, seed, sizes=((32, 32), (32, 64))):
    """Pictures of noise; the red of a patch's first pixel tells its class, which the mask and the depth repeat."""
    folder.mkdir()
    random, lines = np.random.default_rng(seed), []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        coarse = np.array([*NUMBERS, 9])[random.integers(0, 4, (height // 8, width // 8))]
        mask = coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image[::PATCH, ::PATCH, 0] = mask[::PATCH, ::PATCH]
        depth = np.vectorize(METRES.get)(mask)
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
        PIL.Image.fromarray(mask).save(folder / f"{i}_mask.png")
        PIL.Image.fromarray((500 * depth).astype(np.uint16)).save(folder / f"{i}_depth.png")
        line = {"image": f"{i}.png", "mask": f"{i}_mask.png", "depth": f"{i}_depth.png", "units_per_metre": 500}
        lines.append(json.dumps(line) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {
        "train": written(root / "train", 16, 0, ((32, 32),)),
        "data": written(root / "data", 5, 1, ((32, 32),)),
    }


@pytest.fixture(scope="module")
def tower():
    return planted(2)


QUICK = {"batch_size": 8, "augment": None}


@pytest.fixture(scope="module")
def segmented(data, tower):
    task = Segmentation(**data, **QUICK, ignore=(9,), rates=(1e-4, 3e-2), epochs=12)
    return task, task.run(tower, show=5)


@pytest.fixture(scope="module")
def measured(data, tower):
    task = Depth(**data, **QUICK, head="linear", rates=(1e-1,), epochs=8)
    return task, task.run(tower, show=5)


def test_segmentation_finds_the_one_layer_that_tells_the_class(segmented):
    _, found = segmented
    assert found.layers == (0, 1, 2, 3) and found.facts["classes"] == list(NUMBERS)
    others = np.delete(found.figures["miou"], 2)
    assert found.figures["miou"][2] > 0.75 and others.max() < 0.5, found.figures
    assert found.chosen[2] == 1 and found.every["miou"].shape == (4, 2)  # the lower rate learns nothing in time


def test_depth_finds_the_one_layer_that_tells_the_depth(measured):
    _, found = measured
    others = np.delete(found.figures["rmse"], 2)
    assert found.figures["rmse"][2] < 0.75 * others.min(), found.figures


def test_miou_and_accuracy_are_those_of_scikit_learns_confusion_matrix(segmented, data):
    _, found = segmented
    own = maps.open(data["data"], "mask")
    for y in range(DEPTH + 1):
        table = np.zeros((3, 3))
        for row, guess in found.shown.items():
            true = own.labels(row)
            counts = true != 9
            table += confusion_matrix(true[counts], np.array(NUMBERS)[guess[y]][counts], labels=NUMBERS)
        common = np.diag(table)
        iou = common / (table.sum(0) + table.sum(1) - common)
        np.testing.assert_allclose(found.figures["miou"][y], iou.mean(), rtol=1e-12)
        np.testing.assert_allclose(found.facts["iou"][y], iou, rtol=1e-12)
        np.testing.assert_allclose(found.figures["accuracy"][y], common.sum() / table.sum(), rtol=1e-12)
    assert sorted(found.shown) == [0, 1, 2, 3, 4]


def test_depth_figures_are_plain_means_over_valid_pixels_and_then_images(measured, data):
    _, found = measured
    own = maps.open(data["data"], "depth")
    for y in range(DEPTH + 1):
        each = []
        for row, guess in found.shown.items():
            true = own.metres(row).astype(np.float64)
            guess, true = guess[y][true > 0], true[true > 0]
            ratio = np.maximum(guess / true, true / guess)
            each.append(
                (np.sqrt(((guess - true) ** 2).mean()), (ratio < 1.25).mean(), (abs(guess - true) / true).mean())
            )
        wanted = np.mean(each, 0)
        for name, value in zip(("rmse", "delta1", "absrel"), wanted, strict=True):
            np.testing.assert_allclose(found.figures[name][y], value, rtol=1e-4)


def test_the_epoch_with_the_lowest_rmse_counts(measured):
    _, found = measured
    after = np.array(list(found.facts["rmse_after"].values()))
    assert list(found.facts["rmse_after"]) == list(range(1, 9))
    np.testing.assert_array_equal(found.figures["rmse"], after.min(0))
    np.testing.assert_array_equal(found.facts["epoch"], 1 + after.argmin(0))
    assert (after[-1] > after.min(0)).any()  # it went up and down


def test_a_layer_alone_learns_as_in_the_sweep_of_all(segmented, tower):
    task, whole = segmented
    alone = dataclasses.replace(task, layers=(-2,)).run(tower)
    assert alone.layers == (2,)
    np.testing.assert_allclose(alone.facts["last_loss"][0], whole.facts["last_loss"][2], rtol=1e-3)
    np.testing.assert_allclose(alone.figures["miou"][0], whole.figures["miou"][2], rtol=1e-3)


def test_a_mesh_gives_the_same_figures(segmented, tower):
    task, whole = segmented
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    graphdef, params = split(tower)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(tower, mesh)))
    placed.planted_layer, placed.preprocess = tower.planted_layer, tower.preprocess
    found = task.run(placed)
    np.testing.assert_allclose(found.facts["last_loss"], whole.facts["last_loss"], rtol=2e-3)
    np.testing.assert_allclose(found.figures["miou"], whole.figures["miou"], atol=5e-3)


def test_kept_tokens_teach_the_same_head_and_are_kept_within_what_is_allowed(segmented, tower, tmp_path):
    task, whole = segmented
    size = 16 * 4 * 65 * 24 * 4  # images, layers, tokens, width, bytes
    kept = dataclasses.replace(task, cache=str(tmp_path / "tokens"), cache_gb=(size + 1) / 1e9)
    found = kept.run(tower)
    np.testing.assert_allclose(found.facts["last_loss"], whole.facts["last_loss"], rtol=1e-4)
    stored = sum(path.stat().st_size for path in (tmp_path / "tokens").glob("*.safetensors"))
    assert size <= stored < 1.1 * size
    with pytest.raises(ValueError, match=r"cache_gb=0.0003 allows less"):
        dataclasses.replace(kept, cache_gb=0.0003).run(tower)
    with pytest.raises(ValueError, match="with `cache` set augment to null"):
        dataclasses.replace(kept, augment={"hflip": 0.5})


@pytest.mark.parametrize("head", ["linear", pytest.param("dpt", marks=pytest.mark.full)])
def test_sliding_squares_see_images_of_several_sizes(head, tower, tmp_path):
    data = {"train": written(tmp_path / "train", 4, 2), "data": written(tmp_path / "data", 3, 3)}
    told = []
    task = Depth(**data, head=head, window="slide", layers=(2,), epochs=1, batch_size=4)
    found = task.run(tower, lambda *what: told.append(what), show=3)
    assert [own.shape for own in found.shown.values()] == [(1, 32, 32), (1, 32, 64), (1, 32, 32)]
    assert np.isfinite(found.figures["rmse"]).all() and ("depth: 1 layers at 1 rates", 1, 1) in told


def test_eigens_part_alone_is_scored(data, tower, tmp_path):
    large = written(tmp_path / "large", 1, 0, ((480, 640),))
    task = Depth(data["train"], large, head="linear", eigen=True)
    work = dense.Work(task, tower, "depth", lambda *what: None)
    found, depth = task._truth(work)(0), work.data.metres(0)
    top, bottom, left, right = EIGEN
    np.testing.assert_array_equal(found[top:bottom, left:right], depth[top:bottom, left:right])
    found[top:bottom, left:right] = 0
    assert not found.any()
    with pytest.raises(ValueError, match=r"is 32x32 pixels; Eigen's part is of 640x480"):
        small = dataclasses.replace(task, data=data["data"])
        small._truth(dense.Work(small, tower, "depth", lambda *what: None))(0)


def test_evaluators_of_a_run_give_figures_of_each_layer(data, tower, segmented, measured):
    _, whole = segmented
    config = {"name": "segmentation", "ignore": [9], "rates": [1e-4, 3e-2], "epochs": 12, "every_steps": 7}
    figures = evals.create(config | data | QUICK)(tower)
    assert set(figures) == {f"layer_0{y}_{name}" for y in range(4) for name in ("miou", "accuracy")}
    assert figures["layer_02_miou"] == pytest.approx(whole.figures["miou"][2])
    config = {"name": "depth", "head": "linear", "rates": [1e-1], "epochs": 8}
    figures = evals.create(config | data | QUICK)(tower)
    assert figures["layer_02_rmse"] == pytest.approx(measured[1].figures["rmse"][2], rel=1e-3)


def test_what_cannot_be_is_refused(data, tower, segmented, measured):
    for wrong, message in (
        ({"window": "crop"}, "window='crop' is unknown"),
        ({"layers": "some"}, 'must be "all" or a list'),
        ({"rates": (0.0,)}, "must be one or more positive numbers"),
        ({"epochs": 0}, "epochs=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"augment": {"blur": 1}}, "no 'blur'"),
    ):
        with pytest.raises(ValueError, match=message):
            Segmentation(**(data | wrong))
    with pytest.raises(ValueError, match="head='mlp' is unknown; choose linear or dpt"):
        Depth(**data, head="mlp")
    with pytest.raises(ValueError, match=r"the classes are \[7\]; want two or more"):
        Segmentation(**data, classes=(7,)).run(tower)
    with pytest.raises(ValueError, match=r"the image size is \(30, 30\); want a square of a multiple"):
        Segmentation(**data, image_size=30).run(tower)
    # Trained as before, so that nothing is compiled anew.
    with pytest.raises(ValueError, match="no pixel of `data` counts"):
        dataclasses.replace(segmented[0], classes=(100, 101, 102)).run(tower)
    with pytest.raises(ValueError, match="no pixel of `data` has a depth"):
        dataclasses.replace(measured[0], data=data["data"] | {"units_per_metre": 1e-3}).run(tower)


@pytest.fixture
def command(tower, tmp_path, capsys):
    """Runs `pe-jax dense` on saved weights; gives its exit code, what it printed, and the folder it wrote."""
    metadata = {"architecture": zoo.to_dict(tower.config), "preprocess": tower.preprocess.to_dict()}
    checkpoint.save_weights(tmp_path / "weights", split(tower)[1], metadata)

    def run(*words):
        code = cli.main(["dense", "--model", str(tmp_path / "weights"), "--out", str(tmp_path / "out"), *words])
        return code, capsys.readouterr(), tmp_path / "out"

    return run


def test_the_command_writes_curves_a_table_a_card_and_a_picture(command, data):
    words = ["--task", "segmentation", "--train", json.dumps(data["train"]), "--data", json.dumps(data["data"])]
    code, printed, out = command(*words, "--layers", "1,-1", "--set", "epochs=1", "batch_size=8", "ignore=[9]")
    assert code == 0 and "miou" in printed.out and "Wrote card.json" in printed.out
    card = json.loads((out / "card.json").read_text())
    assert set(card["figures"]) == {"layer_01", "layer_03"} and card["best"] in card["figures"]
    assert card["classes"] == list(NUMBERS)
    lines = (out / "curves.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["layer", "1", "3"]
    assert float(lines[1].split(",")[1]) == pytest.approx(card["figures"]["layer_01"]["miou"], rel=1e-5)
    for name in ("curves.png", "picture.png"):
        with PIL.Image.open(out / name) as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "depth", "--data", "x.jsonl"], "--task depth needs --train"),
        (["--task", "tracking", "--train", "x", "--data", "y"], "--task tracking learns nothing"),
        (["--task", "correspondence", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "correspondence", "--data", "x", "--layers", "one"], "--layers one: want numbers"),
        (["--task", "correspondence", "--data", "x", "--set", "k"], "--set k: want FIELD=VALUE"),
        (["--task", "correspondence", "--data", "x", "--set", "k=("], "is no JSON"),
    ],
)
def test_the_command_says_what_is_wrong(command, words, message):
    code, printed, out = command(*words)
    assert code == 2 and message in printed.err and not (out / "card.json").exists()

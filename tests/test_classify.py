"""`pe-jax classify` and `pe-jax evaluate` as a user runs them, on a tiny saved model."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import checkpoint, cli
from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from pe_jax.types import split

VISION = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 1, "mlp_width": 20, "class_token": True}
ARCH = {
    "vision": VISION | {"pool": "attention", "pool_heads": 1, "output_width": 10},
    "text": {"context_length": 14, "width": 16, "depth": 1, "heads": 2, "mlp_width": 18, "output_width": 10},
}
TOWER = VISION | {"pool": "none", "norm_post": False, "output_width": None}


def save(path, arch):
    params = jax.jit(lambda: split(zoo.build(arch, nnx.Rngs(1)))[1])()
    config = zoo.to_dict(zoo.architecture(arch))
    checkpoint.save_weights(path, params, {"architecture": config, "preprocess": Preprocess(8).to_dict()})
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "weights", ARCH)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "deeper/c.webp"):
        PIL.Image.fromarray(random.integers(0, 255, (9, 12, 3)).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_json_has_every_image_with_its_labels_best_first(model, photos, capsys):
    code = cli.main(
        ["classify", "--model", model, str(photos), "--labels", "a cat, a dog,a bird", "--top", "2", "--json"]
    )
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"model", "labels", "templates", "images", "videos", "skipped"}
    assert document["labels"] == ["a cat", "a dog", "a bird"]
    assert document["templates"] == ["a photo of a {}."]
    assert [image["image"] for image in document["images"]] == [
        str(photos / n) for n in ("a.jpg", "b.png", "deeper/c.webp")
    ]
    for image in document["images"]:
        assert len(image["scores"]) == 2
        first, second = image["scores"]
        assert set(first) == {"label", "probability", "cosine"}
        assert 1 >= first["probability"] >= second["probability"] > 0


def test_probabilities_are_the_softmax_of_scaled_cosines_over_all_labels(model, photos, capsys):
    cli.main(
        ["classify", "--model", model, str(photos / "b.png"), "--labels", "x,y,z", "--templates", "none", "--json"]
    )
    (image,) = json.loads(capsys.readouterr().out)["images"]
    cosines = np.array([score["cosine"] for score in image["scores"]])
    odds = np.exp(cosines / 0.07)
    np.testing.assert_allclose([s["probability"] for s in image["scores"]], odds / odds.sum(), rtol=1e-4)


def test_a_bad_image_is_reported_and_left_out(model, photos, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG broken")
    code = cli.main(["classify", "--model", model, str(photos), "--labels", "x,y", "--json"])
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert code == 0
    assert len(document["images"]) == 3
    assert [image["image"] for image in document["skipped"]] == [str(photos / "broken.png")]
    assert "1 of 4 files could not be read." in said.err


def test_a_video_is_the_mean_of_its_frames_beside_the_images(model, photos, capsys, monkeypatch):
    """One of a single picture is classified as that picture, whatever is around it."""
    av = pytest.importorskip("av")
    frame = np.random.default_rng(1).integers(0, 255, (2, 2, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(photos / "Still.MP4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5, width=32, height=32, pix_fmt="yuv420p")
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    PIL.Image.fromarray(frame).save(photos / "still.png")
    (photos / "broken.webm").write_bytes(b"nothing")
    arguments = ["classify", "--model", model, str(photos), "--labels", "x,y,z", "--templates", "none"]
    assert cli.main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    (video,) = document["videos"]
    assert video["video"] == str(photos / "Still.MP4")
    images = {image["image"]: image["scores"] for image in document["images"]}
    assert len(images) == 4
    like = {score["label"]: score["cosine"] for score in images[str(photos / "still.png")]}
    for score in video["scores"]:  # but for what coding loses
        np.testing.assert_allclose(score["cosine"], like[score["label"]], atol=0.02)
    others = [{score["label"]: score["cosine"] for score in own} for path, own in images.items() if "still" not in path]
    assert all(max(abs(other[label] - like[label]) for label in like) > 0.02 for other in others)
    assert document["skipped"][0]["video"] == str(photos / "broken.webm") and "1 of 6 files" in said.err
    monkeypatch.chdir(photos)
    assert cli.main([*arguments[:3], "Still.MP4", *arguments[4:]]) == 0
    assert "Still.MP4" in capsys.readouterr().out


def test_only_bad_images_fail(model, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert cli.main(["classify", "--model", model, str(tmp_path / "broken.png"), "--labels", "x,y"]) == 1
    assert "1 of 1 files could not be read." in capsys.readouterr().err


def test_the_table_shows_labels_and_percent(model, photos, capsys):
    assert cli.main(["classify", "--model", model, str(photos / "a.jpg"), "--labels", "x,[y]"]) == 0
    table = capsys.readouterr().out
    assert "[y]" in table
    assert "%" in table


def test_labels_may_come_from_a_file(model, photos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("salt, pepper\nsugar\n")
    cli.main(["classify", "--model", model, str(photos / "a.jpg"), "--labels-file", str(names), "--json"])
    assert json.loads(capsys.readouterr().out)["labels"] == ["salt, pepper", "sugar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "a cat,,a dog"], "class name 2 of 3 is empty"),
        (["--labels", "a cat"], "at least 2"),
        ([], "--labels-file FILE"),
        (["--labels", "x,y", "--templates", "imagnet"], "neither a file nor one of the sets"),
        (["--labels", "x,y", "--top", "0"], "--top 0"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(photos, arguments, message, capsys):
    assert cli.main(["classify", "--model", "no/such/model", str(photos), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_files_and_folders_without_images_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "holds no image or video"), ("gone.png", "does not exist")):
        assert cli.main(["classify", "--model", "m", str(tmp_path / path), "--labels", "x,y"]) == 2
        assert message in capsys.readouterr().err


def test_a_vision_only_model_is_refused_with_advice(photos, tmp_path, capsys):
    tower = save(tmp_path / "tower", TOWER)
    assert cli.main(["classify", "--model", tower, str(photos), "--labels", "x,y"]) == 2
    assert "use a PE-Core model" in capsys.readouterr().err


def test_evaluate_runs_the_evaluators_of_a_config(model, photos, tmp_path, capsys):
    lines = [{"image": f"photos/{name}", "label": i} for i, name in enumerate(("a.jpg", "b.png"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "jsonl", "path": str(tmp_path / "data.jsonl")}
    config = {
        "evals": {
            "names": {
                "name": "zero_shot",
                "data": source,
                "classes": ["x", "y"],
                "templates": "none",
                "every_steps": 3,
            },
            "layers": {"name": "knn", "bank": source, "data": source, "k": 1},
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = ["evaluate", "--model", model, "--config", str(tmp_path / "config.json"), "--json"]
    assert cli.main(run) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"names", "layers"}
    assert set(found["names"]) == {"top1", "mean_recall"}
    assert found["layers"]["layer_02_k1"] == 1.0
    assert cli.main([*run, "--only", "layer"]) == 2
    assert "no evaluator 'layer'; it has names, layers" in capsys.readouterr().err


def test_evaluate_reads_experiments_with_their_argument(tmp_path):
    from pe_jax import evaluate

    file = tmp_path / "x.py"
    file.write_text("import ml_collections\ndef get_config(a='none'):\n  return ml_collections.ConfigDict({'a': a})\n")
    assert evaluate.read_config(str(file)) == {"a": "none"}
    assert evaluate.read_config(f"{file}:big") == {"a": "big"}
    with pytest.raises(ValueError, match="does not exist"):
        evaluate.read_config(str(tmp_path / "y.py"))

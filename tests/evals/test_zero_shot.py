import json

import jax
import numpy as np
import pytest
from flax import nnx

from pe_jax import evals, sharding
from pe_jax.evals import inference, zero_shot
from pe_jax.types import split

NAMES = ("red bars", "green bars", "blue bars")
TEMPLATES = ("a photo of {}.", "{}, drawn", "many {}", "{} {}")


def plain_cosines(model, images, names, templates):
    """The protocol, one image and one prompt at a time."""
    rows = []
    for name in names:
        embedded = [
            np.asarray(model.encode_text(inference.tokenizer_of(model)(t.replace("{}", name))))[0] for t in templates
        ]
        mean = np.mean([e / np.linalg.norm(e) for e in embedded], 0)
        rows.append(mean / np.linalg.norm(mean))
    embedded = [np.asarray(model.encode_image(model.preprocess(image), normalize=False))[0] for image in images]
    return np.array([[np.dot(e / np.linalg.norm(e), row) for row in rows] for e in embedded])


def test_zero_shot_equals_the_plain_formula(model, pictures, dataset):
    images, labels = pictures
    expected = plain_cosines(model, images, NAMES, TEMPLATES)
    result = zero_shot.ZeroShot(dataset, NAMES, TEMPLATES, batch_size=4).result(model)
    np.testing.assert_allclose(result.cosines, expected, atol=2e-6)
    np.testing.assert_array_equal(result.labels, labels)
    assert result.figures["top1"] == np.mean(expected.argmax(1) == labels)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_padding_the_last_batch_changes_nothing(model, pictures, batch_size):
    images, _ = pictures
    expected = np.asarray(model.encode_image(model.preprocess(images)))
    np.testing.assert_allclose(inference.embed_images(model, images, batch_size), expected, atol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_model_on_any_mesh_gives_the_same_scores(model, dataset, axes):
    mesh = sharding.make_mesh(axes)
    graphdef, params = split(model)
    placed = jax.device_put(params, sharding.param_shardings(model, mesh))
    evaluator = zero_shot.ZeroShot(dataset, NAMES, TEMPLATES, batch_size=6)
    expected = evaluator.result(model).cosines
    np.testing.assert_allclose(evaluator.result(nnx.merge(graphdef, placed)).cosines, expected, atol=2e-6)


def test_another_image_size_is_a_setting(model, pictures):
    images, _ = pictures
    small = inference.preprocess_of(model, 8)
    expected = np.asarray(model.encode_image(small(images)))
    np.testing.assert_allclose(inference.embed_images(model, images, 4, image_size=8), expected, atol=1e-6)


def test_mean_recall_weighs_classes_alike_and_leaves_out_those_that_do_not_occur():
    table = zero_shot.confusion(np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 1]), 4)
    np.testing.assert_array_equal(table, [[3, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert zero_shot.figures(table) == {"top1": 3 / 5, "mean_recall": (3 / 4 + 0) / 2}


def test_labels_may_be_numbers_or_names(model, dataset):
    by_number = zero_shot.ZeroShot(dataset, NAMES, "none").result(model)
    by_name = zero_shot.ZeroShot(dataset | {"label": "cls"}, NAMES, "none").result(model)
    np.testing.assert_array_equal(by_number.labels, by_name.labels)


def test_the_sets_that_come_with_the_package_are_complete():
    assert len(set(zero_shot.templates("imagenet"))) == 80
    assert zero_shot.templates("none") == ("{}",)
    assert zero_shot.classes("digits")[3] == "three"
    for name in zero_shot.sets("templates"):
        assert all(template.format("x") for template in zero_shot.templates(name))


def test_templates_and_classes_are_read_from_files(tmp_path):
    lines, names = tmp_path / "lines.txt", tmp_path / "names.json"
    lines.write_text("a {}\n\nthe {}\n")
    names.write_text(json.dumps({"classes": ["x", "y"], "folders": ["X", "Y"]}))
    assert zero_shot.templates(str(lines)) == ("a {}", "the {}")
    assert zero_shot.classes(str(names)) == ("x", "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "zeroshot"}, "did you mean zero_shot"),
        ({"template": "imagenet"}, "did you mean templates"),
        ({"templates": "imagnet"}, "neither a file nor one of the sets"),
        ({"templates": ["a photo"]}, r"has no \{\}"),
        ({"classes": ["cat", ""]}, "class name 2 of 2 is empty"),
        ({"classes": ["cat", "cat"]}, "more than once"),
        ({"classes": ["cat"]}, "at least 2"),
    ],
)
def test_a_wrong_config_is_refused_with_what_was_meant(change, message):
    config = {"name": "zero_shot", "data": {"name": "jsonl", "path": "x"}, "classes": ["cat", "dog"], "every_steps": 5}
    evals.create(config | {"templates": "photo"})
    with pytest.raises(ValueError, match=message):
        evals.create(config | change)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="lacks 'classes'"):
        evals.create({"name": "zero_shot", "data": {}})


def test_a_label_out_of_range_is_an_error_that_names_the_record(model, dataset):
    with pytest.raises(ValueError, match=r"data.jsonl record 2: the label is 2; want an integer from 0 to 1"):
        zero_shot.ZeroShot(dataset, NAMES[:2], "none")(model)


def test_a_vision_only_model_is_told_to_be_a_core_model(tower, dataset):
    with pytest.raises(ValueError, match="use a PE-Core model"):
        zero_shot.ZeroShot(dataset, NAMES, "none")(tower)


def test_an_unreadable_image_stops_the_evaluation_and_is_named(model, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "data.jsonl").write_text('{"image": "broken.png", "label": 0}\n')
    with pytest.raises(ValueError, match=r"broken\.png"):
        zero_shot.ZeroShot({"name": "jsonl", "path": str(tmp_path / "data.jsonl")}, NAMES, "none")(model)

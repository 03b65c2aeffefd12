import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from pe_jax import evals, sharding
from pe_jax.evals import inference, records, views, zero_shot
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
        ({"resize": "centre"}, "'centre' is unknown; choose squash, crop, better"),
        ({"border": -1}, "border=-1 must be"),
        ({"labels": ["cat"]}, "labels has 1 entries for 2 classes"),
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


def test_a_published_template_set_has_the_number_of_prompts_the_paper_gives():
    counts = {"kinetics": 28, "actions": 48, "cars": 8, "aircraft": 2, "country": 5, "sun": 2, "food": 1, "pets": 1}
    assert {name: len(set(zero_shot.templates(name))) for name in counts} == counts


def test_templates_in_the_form_of_clip_benchmark_are_read(tmp_path):
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a satellite view of {c}\n{c} from above\n")
    found = zero_shot.templates(str(tmp_path / "zeroshot_classification_templates.txt"))
    assert found == ("a satellite view of {}", "{} from above")


def test_a_file_of_names_may_repeat_one_but_may_not_leave_one_out(model, dataset, tmp_path):
    names = tmp_path / "classnames.txt"
    names.write_text("missile\nboat\nmissile\n")
    result = zero_shot.ZeroShot(dataset, str(names), "none", batch_size=4).result(model)
    assert result.classes == ("missile", "boat", "missile")
    assert set(result.labels) == {0, 1, 2}
    names.write_text("missile\n\nboat\n")
    with pytest.raises(ValueError, match="class name 2 of 3 is empty"):
        zero_shot.ZeroShot(dataset, str(names), "none")(model)


def test_the_better_resize_is_reported_and_both_are_listed(model, dataset):
    both = zero_shot.ZeroShot(dataset, NAMES, "none", batch_size=4, resize="better")(model)
    alone = {r: zero_shot.ZeroShot(dataset, NAMES, "none", batch_size=4, resize=r)(model) for r in ("squash", "crop")}
    for resize, figures in alone.items():
        assert {name: both[f"{name}_{resize}"] for name in figures} == figures
    best = max(alone.values(), key=lambda figures: figures["top1"])
    assert {name: both[name] for name in best} == best
    assert set(both) == {f"{n}{e}" for n in ("top1", "mean_recall") for e in ("", "_squash", "_crop")}


def test_the_better_view_is_chosen_as_a_whole_and_the_first_wins_a_tie():
    figures = {"squash": {"top1": 0.5, "mean_recall": 0.9}, "crop": {"top1": 0.6, "mean_recall": 0.1}}
    found = views.reported(figures, lambda own: own["top1"])
    assert found["top1"] == 0.6
    assert found["mean_recall"] == 0.1  # not the better of the two
    assert found["mean_recall_squash"] == 0.9
    tied = {"squash": {"top1": 0.5, "mean_recall": 0.1}, "crop": {"top1": 0.5, "mean_recall": 0.9}}
    assert views.reported(tied, lambda own: own["top1"])["mean_recall"] == 0.1


def test_a_border_is_cut_off_before_anything_else(model, pictures):
    images, _ = pictures
    framed = []
    for image in images:
        wide = np.full((image.shape[0] + 4, image.shape[1] + 4, 3), (255, 0, 0), np.uint8)
        wide[2:-2, 2:-2] = image
        framed.append(wide)
    for resize in ("squash", "crop"):
        expected = views.Views.of(model, resize).embed(model, images, 4)[resize]
        np.testing.assert_array_equal(views.Views.of(model, resize, border=2).embed(model, framed, 4)[resize], expected)
        assert np.abs(views.Views.of(model, resize).embed(model, framed, 4)[resize] - expected).max() > 1e-3
    with pytest.raises(ValueError, match="nothing inside a border of 9"):
        views.Views.of(model, border=9).pixels(images[0])


def test_a_subset_of_the_classes_leaves_the_other_records_out(model, dataset):
    names, labels = ("a blue thing", "a red thing"), ("blue bars", "red bars")
    config = zero_shot.ZeroShot(dataset | {"label": "cls"}, names, "none", labels=labels, subset=True, batch_size=4)
    result = config.result(model)
    everything = zero_shot.ZeroShot(dataset, NAMES, "none", batch_size=4).result(model)
    np.testing.assert_array_equal(result.labels, [{0: 1, 2: 0}[n] for n in everything.labels if n != 1])
    weights = zero_shot.classifier(model, names, ("{}",))
    images = [image for image, n in zip(records.open(dataset).images, everything.labels, strict=True) if n != 1]
    np.testing.assert_allclose(result.cosines, inference.embed_images(model, images, 4) @ weights.T, atol=2e-6)
    with pytest.raises(ValueError, match="'green bars'; want an integer from 0 to 1, or a class name"):
        dataclasses.replace(config, subset=False)(model)
    with pytest.raises(ValueError, match="none of the 11 records is of one of the 2 classes"):
        dataclasses.replace(config, labels=("x", "y"))(model)


def test_figures_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, of the extra `viz`")
    random = np.random.default_rng(4)
    labels, predictions = random.integers(0, 6, 200), random.integers(0, 7, 200)
    found = zero_shot.figures(zero_shot.confusion(labels, predictions, 7))
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    mean = metrics.recall_score(labels, predictions, average="macro", labels=np.unique(labels))
    assert found["mean_recall"] == pytest.approx(mean)

"""Videos by the mean of their frames: both orders of normalisation, figures, layouts and meshes."""

import io
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from pe_jax import evals, sharding
from pe_jax.data.image import Preprocess
from pe_jax.data.video import BadVideo, Reader
from pe_jax.evals import inference, records, suites, video, views
from pe_jax.types import split
from tests.data import films

NAMES = ("red bars", "green bars", "blue bars")
LENGTHS = (5, 12, 1, 30, 8, 3, 19, 9, 21, 10, 6)  # frames of each video
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
TEMPLATES = ("a video of {}.", "{}")


def drawn(row: int, count: int) -> np.ndarray:
    """Frames that grow brighter at a pace of their own, so that their embeddings differ in length and direction."""
    random = np.random.default_rng(row)
    frames = random.integers(0, 60, (count, 18, 22, 3))
    frames[..., LABELS[row]] += np.linspace(0, 190, count).astype(int)[:, None, None]
    frames[count // 2 :, :9] //= 3
    return frames.astype(np.uint8)


@pytest.fixture(scope="module")
def clips():
    return [drawn(row, count) for row, count in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, clips):
    """The videos as lossless files and a JSON line each; the source's config."""
    folder = tmp_path_factory.mktemp("videos")
    lines = []
    for row, frames in enumerate(clips):
        data = films.film(
            "matroska", "ffv1", len(frames), size=(22, 18), pixels="bgr0", draw=lambda i, size, f=frames: f[i]
        )
        (folder / f"{row:02}.mkv").write_bytes(data)
        own = [f"{NAMES[LABELS[row]]} {row}", *(["bars"] if row % 4 == 0 else [])]
        lines.append({"file": f"{row:02}.mkv", "label": LABELS[row], "cls": NAMES[LABELS[row]], "captions": own})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}


def plain(model, clips, frames=8, preprocess=None):
    """[N, F, E] embedding of every frame, as long as the tower makes it, one video at a time."""
    preprocess = preprocess or model.preprocess
    embedded = []
    for clip in clips:
        chosen = [i * (len(clip) - 1) // (frames - 1) for i in range(frames)]
        embedded.append(np.asarray(model.encode_image(preprocess(clip[chosen]), normalize=False), np.float64))
    return np.stack(embedded)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def frame_embeddings(model, clips):
    return plain(model, clips)


def test_to_classify_frames_are_averaged_as_they_are_and_then_brought_to_unit_length(model, dataset, frame_embeddings):
    expected, swapped = unit(frame_embeddings.mean(1)), unit(unit(frame_embeddings).mean(1))
    assert np.abs(expected - swapped).max() > 1e-3  # else this test could not tell them apart
    rows = records.open(dataset)
    found = video.embed(model, rows.videos, views.Views.of(model), unit_frames=False)["squash"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_to_retrieve_unit_frames_are_averaged_and_the_mean_is_left_alone(model, dataset, frame_embeddings):
    expected = unit(frame_embeddings).mean(1)
    for other in (unit(expected), unit(frame_embeddings.mean(1)), frame_embeddings.mean(1)):
        assert np.abs(expected - other).max() > 1e-3
    rows = records.open(dataset)
    found = video.embed(model, rows.videos, views.Views.of(model), unit_frames=True)["squash"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.fixture(scope="module")
def class_rows(model):
    prompts = [template.replace("{}", name) for name in NAMES for template in TEMPLATES]
    embedded = unit(np.asarray(model.encode_text(inference.tokenizer_of(model)(prompts)), np.float64))
    return unit(embedded.reshape(3, 2, -1).mean(1))


def config(dataset, **more):
    return {"name": "video_zero_shot", "data": dataset, "classes": NAMES, "templates": TEMPLATES, **more}


def test_zero_shot_equals_the_plain_formula(model, dataset, frame_embeddings, class_rows):
    cosines = unit(frame_embeddings.mean(1)) @ class_rows.T
    evaluator = evals.create(config(dataset))
    np.testing.assert_allclose(evaluator.results(model)["squash"].cosines, cosines, atol=2e-6)
    right = cosines.argmax(1) == LABELS
    assert evaluator(model) == {
        "top1": right.mean(),
        "mean_recall": pytest.approx(np.mean([right[np.equal(LABELS, c)].mean() for c in range(3)])),
        "top5": 1.0,
    }


def test_top5_counts_the_five_best_and_no_tie_and_no_nan():
    scores = np.array([[9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [1, 1, 1, 1, 1, 1, 0], [np.nan] * 7], float)
    labels = np.array([4, 5, 0, 0])
    assert [video.among(labels[i : i + 1], scores[i : i + 1], 5) for i in range(4)] == [1, 0, 0, 0]
    assert video.among(labels, scores, 6) == 0.75
    assert video.among(labels[:2], scores[:2], 5) == 0.5


def test_retrieval_equals_the_plain_formula_in_both_directions(model, dataset, frame_embeddings):
    media = unit(frame_embeddings).mean(1)
    captions = records.open(dataset).texts()
    flat = [(text, row) for row, own in enumerate(captions) for text in own]
    texts = np.asarray(model.encode_text(inference.tokenizer_of(model)([text for text, _ in flat])), np.float64)
    same = np.array([[text in captions[row] for row in range(len(captions))] for text, _ in flat])  # [T, N]
    scores = texts @ media.T

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(0)

    expected = {}
    for ending, change in (("", lambda x: x), ("_dsl", lambda x: x * softmax(x))):
        for name, table, right in (
            ("video_to_text", change(scores.T), same.T),
            ("text_to_video", change(scores), same),
        ):
            for k in (1, 3):
                best = np.argsort(-table, axis=1, kind="stable")[:, :k]
                expected[f"{name}_r{k}{ending}"] = np.take_along_axis(right, best, 1).any(1).mean()
    evaluator = evals.create({"name": "video_retrieval", "data": dataset, "ks": [1, 3], "dsl": True})
    assert evaluator(model) == pytest.approx(expected)


@pytest.mark.parametrize("unit_frames", [False, True])
def test_a_model_on_a_mesh_gives_the_same_embeddings(model, dataset, frame_embeddings, unit_frames):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    graphdef, params = split(model)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(model, mesh)))
    rows, seen = records.open(dataset).videos, views.Views.of(model)
    found = video.embed(placed, rows, seen, unit_frames=unit_frames)["squash"]
    expected = unit(frame_embeddings).mean(1) if unit_frames else unit(frame_embeddings.mean(1))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_frames_sizes_and_batches_are_settings(model, dataset, clips, class_rows):
    small = Preprocess(8, mode="crop")
    cosines = unit(plain(model, clips, 3, small).mean(1)) @ class_rows.T
    for batch_size in (1, 13):  # one video at a time; four, and padding in the last batch
        own = config(dataset, frames=3, image_size=8, resize="crop", batch_size=batch_size, threads=2)
        result = evals.create(own).results(model)["crop"]
        np.testing.assert_allclose(result.cosines, cosines, atol=2e-6)


def test_both_resizes_are_listed_the_better_is_reported_and_a_video_is_decoded_once(model, dataset, monkeypatch):
    alone = {resize: evals.create(config(dataset, resize=resize))(model) for resize in ("squash", "crop")}
    opened = []
    once = Reader.sample
    monkeypatch.setattr(Reader, "sample", lambda self, *given: opened.append(self.name) or once(self, *given))
    both = evals.create(config(dataset, resize="better"))(model)
    assert len(opened) == len(set(opened)) == len(LENGTHS)
    for resize, figures in alone.items():
        assert figures == {name.removesuffix(f"_{resize}"): v for name, v in both.items() if name.endswith(resize)}
    assert max(alone.values(), key=lambda figures: figures["top1"]).items() <= both.items()


@pytest.fixture(scope="module")
def layouts(dataset, tmp_path_factory):
    """The same videos as a table, class folders, and shards, below one folder."""
    root = tmp_path_factory.mktemp("layouts")
    source = records.open(dataset).source
    for name in ("table", "shards/test", *(f"folders/{name.replace(' ', '_')}" for name in NAMES)):
        (root / name).mkdir(parents=True)
    lines = ["video,cls,caption"]
    with tarfile.open(root / "shards" / "test" / "0.tar", "w") as tar:
        for row in range(len(source)):
            record = source[row]
            data = pathlib.Path(record["video"]).read_bytes()
            (root / "folders" / record["cls"].replace(" ", "_") / f"{row:02}.mkv").write_bytes(data)
            lines.append(f"{record['video']},{record['cls']},{record['captions'][0]}")
            fields = {"human_caption": record["captions"][0], "label": record["label"]}
            for ending, content in (("mkv", data), ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"{row:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (root / "table" / "test.csv").write_text("\n".join(lines))
    (root / "shards" / "classnames.txt").write_text("\n".join(NAMES))
    return root


def test_every_layout_gives_the_same_scores(model, dataset, layouts):
    order = sorted(range(len(LENGTHS)), key=lambda row: (NAMES[LABELS[row]], row))  # of the folders
    expected = evals.create(config(dataset | {"label": "cls"}))(model)
    own = suites.parse(
        {
            "datasets": [
                {
                    "name": place,
                    "places": [place],
                    "columns": {place: "top1"},
                    "evaluator": {"name": "video_zero_shot", "templates": list(TEMPLATES)},
                }
                for place in ("table", "folders", "shards")
            ]
        },
        "small.json",
    )
    results = suites.run(model, own, str(layouts))
    assert [result.status for result in results] == ["done"] * 3
    for result in results:
        assert result.card["figures"] == pytest.approx(expected)
    rows = records.open({"name": "folder", "path": str(layouts / "folders")})
    assert [pathlib.Path(path).stem for path in rows.videos] == [f"{row:02}" for row in order]


def test_captions_of_shards_may_have_another_name(model, dataset, layouts):
    given = {"name": "webdataset", "path": str(layouts / "shards" / "test"), "caption": "human_caption"}
    figures = evals.create({"name": "video_retrieval", "data": given, "ks": [2]})(model)
    lines = [json.loads(line) for line in pathlib.Path(dataset["path"]).read_text().splitlines()]
    assert records.open(given).texts() == [(line["captions"][0],) for line in lines]
    assert set(figures) == {"video_to_text_r2", "text_to_video_r2"}


def test_a_video_that_cannot_be_decoded_is_named(model, dataset, layouts, tmp_path):
    whole = (layouts / "shards" / "test" / "0.tar").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(b"\x1aE\xdf\xa3 and no more")
    (tmp_path / "a.jsonl").write_text('{"video": "cut.mkv", "label": 0}\n{"video": "gone.mp4", "label": 1}\n')
    with pytest.raises(BadVideo, match=r"cut.mkv is no video"):
        evals.create(config({"name": "jsonl", "path": str(tmp_path / "a.jsonl")}))(model)
    place = whole.index(b"FFV1")  # the codec of the first
    (tmp_path / "0.tar").write_bytes(whole[:place] + b"????" + whole[place + 4 :])
    with pytest.raises(BadVideo, match=r"0.tar sample 0 holds video in a form that this FFmpeg has no decoder for"):
        evals.create(config({"name": "webdataset", "path": str(tmp_path / "0.tar")}))(model)


def test_what_cannot_be_is_refused(model, tower, dataset, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "label": 0, "caption": "x"}\n')
    images = {"name": "jsonl", "path": str(tmp_path / "a.jsonl")}
    retrieval = {"name": "video_retrieval", "data": dataset}
    with pytest.raises(ValueError, match="record 0 has no video; its fields are image, label, caption"):
        evals.create(config(images))(model)
    with pytest.raises(ValueError, match=r"record 0 has no image; its fields are file, .*, video"):
        evals.create({"name": "zero_shot", "data": dataset, "classes": NAMES, "templates": TEMPLATES})(model)
    for wrong, message in (
        (config(dataset, frames=0), "frames=0 must be at least 1"),
        (config(dataset, threads=0), "threads=0"),
        (config(dataset, resize="stretch"), "resize='stretch' is unknown"),
        (config(dataset, labels=["a"]), "labels has 1 entries for 3 classes"),
        ({"name": "video_zero_shot", "data": dataset}, "lacks 'classes'"),
        (retrieval | {"ks": [0]}, "ks=.* must be places"),
        (retrieval | {"frame": 4}, "has no field 'frame'; did you mean frames"),
    ):
        with pytest.raises(ValueError, match=message):
            evals.create(wrong)
    for given in (config(dataset), retrieval):
        with pytest.raises(ValueError, match="vision tower only"):
            evals.create(given)(tower)

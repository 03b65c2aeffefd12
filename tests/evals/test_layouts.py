"""Data sets in every layout, as small real files."""

import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest

from pe_jax import evals
from pe_jax.evals import layouts, maps, records

ZERO_SHOT = {"name": "zero_shot", "templates": "none"}


def image(seed, size=(11, 8), form="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def tar(path, samples):
    """A shard; `samples` are {ending: bytes or text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                data = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"s{number:07}.{ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


@pytest.fixture
def clip_benchmark(tmp_path):
    """Three shards of a classification set, in CLIP_benchmark's layout."""
    root = tmp_path / "wds_shapes"
    for shard in range(3):
        samples = [{"webp": image(10 * shard + i, form="WEBP"), "cls": f"{(shard + i) % 4}"} for i in range(2 + shard)]
        tar(root / "test" / f"{shard}.tar", samples)
    write(root / "test" / "nshards.txt", "3\n")
    write(root / "classnames.txt", "tench\nmissile\nboat\nmissile\n")
    write(root / "zeroshot_classification_templates.txt", "a {c}.\nmany {c}\n")
    return root


def fields(root, place, config=ZERO_SHOT):
    found, _ = layouts.find(str(root), [place])
    assert found is not None
    return found.fields(evals.fields(config["name"]), config)


def test_clip_benchmarks_folders_bring_their_shards_names_and_prompts(tmp_path, clip_benchmark):
    given = fields(tmp_path, "wds_shapes", {"name": "zero_shot"})
    evaluator = evals.create(given)
    assert evaluator.names == ("tench", "missile", "boat", "missile")
    assert given["templates"] == str(clip_benchmark / "zeroshot_classification_templates.txt")
    rows = records.open(evaluator.data)
    np.testing.assert_array_equal(rows.labels(evaluator.names), [0, 1, 1, 2, 3, 2, 3, 0, 1])
    assert rows.images[8][:4] == b"RIFF"


def test_labels_of_shards_are_read_without_the_images(tmp_path, clip_benchmark, monkeypatch):
    rows = records.open(fields(tmp_path, "wds_shapes")["data"])
    read, sizes = rows.source._opened.read, []
    monkeypatch.setattr(rows.source._opened, "read", lambda path, at, size: sizes.append(size) or read(path, at, size))
    assert len(rows.labels()) == 9
    assert sizes == [1] * 9
    assert set(rows.source[0]) == {"image", "label"}


def test_what_the_config_says_stays(tmp_path, clip_benchmark):
    given = fields(tmp_path, "wds_shapes", {"name": "zero_shot", "templates": "photo", "data": {"limit": 2}})
    assert given["templates"] == "photo"
    assert len(records.open(given["data"])) == 2


def test_a_shard_that_is_missing_is_an_error(tmp_path, clip_benchmark):
    (clip_benchmark / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"the shard .*1\.tar does not exist"):
        records.open(fields(tmp_path, "wds_shapes")["data"])


@pytest.mark.parametrize("text", ["", "three", "0"])
def test_a_wrong_number_of_shards_is_named(tmp_path, clip_benchmark, text):
    (clip_benchmark / "test" / "nshards.txt").write_text(text)
    with pytest.raises(ValueError, match=r"nshards.txt says '.*'; want the number of shards"):
        layouts.find(str(tmp_path), ["wds_shapes"])


def test_without_prompts_of_its_own_it_says_where_to_write_them(tmp_path, clip_benchmark):
    (clip_benchmark / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(ValueError, match=r"no prompts for .*wds_shapes: write them to .*templates.txt"):
        fields(tmp_path, "wds_shapes", {"name": "zero_shot"})


def test_clip_benchmarks_captions_are_one_a_line(tmp_path):
    root = tmp_path / "wds_captions"
    tar(
        root / "test" / "0.tar",
        [{"jpg": image(1, form="JPEG"), "txt": "a dog\na brown dog\n"}, {"jpg": image(2), "txt": "x"}],
    )
    write(root / "test" / "nshards.txt", "1")
    write(root / "dataset_type.txt", "retrieval\n")
    given = fields(tmp_path, "wds_captions", {"name": "retrieval"})
    assert records.open(given["data"]).texts() == [("a dog", "a brown dog"), ("x",)]
    assert "classes" not in given


@pytest.mark.parametrize(("filepath", "folder"), [("val2014", "val2014"), (None, "flickr30k-images"), (None, "")])
def test_karpathys_file_gives_the_test_images_and_their_captions(tmp_path, filepath, folder):
    root = tmp_path / "photos"
    entries = []
    for number, split in enumerate(["train", "test", "val", "test"]):
        write(root / folder / f"{number}.jpg", image(number))
        said = [{"raw": f"caption {number} {i}", "tokens": []} for i in range(5 + number)]
        entries.append({"filename": f"{number}.jpg", "split": split, "sentences": said})
        if filepath:
            entries[-1]["filepath"] = filepath
    write(root / "dataset_photos.json", json.dumps({"dataset": "photos", "images": entries}))
    rows = records.open(fields(tmp_path, "photos", {"name": "retrieval"})["data"])
    assert [len(own) for own in rows.texts()] == [6, 8]
    assert rows.texts()[1][2] == "caption 3 2"
    assert pathlib.Path(rows.images[1]).read_bytes() == image(3)
    assert len(records.open(fields(tmp_path, "photos:train", {"name": "retrieval"})["data"])) == 1


def test_karpathys_file_with_another_split_or_content_is_refused(tmp_path):
    entry = {"filename": "a.jpg", "split": "train", "sentences": []}
    write(tmp_path / "a" / "dataset.json", json.dumps({"images": [entry]}))
    write(tmp_path / "b" / "dataset.json", "{}")
    with pytest.raises(ValueError, match="no image of split 'test'; its splits are train"):
        records.open(fields(tmp_path, "a", {"name": "retrieval"})["data"])
    with pytest.raises(ValueError, match="no list `images`"):
        records.open(fields(tmp_path, "b", {"name": "retrieval"})["data"])


@pytest.fixture
def folders(tmp_path):
    """Five images in the folders of three classes."""
    for number, name in enumerate(["n02_red_fox", "n01_cat", "n02_red_fox", "n03_owl", "n01_cat"]):
        write(tmp_path / "animals" / "val" / name / f"{number}.JPEG", image(number))
    return tmp_path / "animals"


def test_folders_are_classes_of_their_names(tmp_path, folders):
    evaluator = evals.create(fields(tmp_path, "animals"))
    assert evaluator.names == ("n01 cat", "n02 red fox", "n03 owl")
    np.testing.assert_array_equal(records.open(evaluator.data).labels(evaluator.names), [0, 0, 1, 1, 2])


def test_names_from_a_file_belong_to_the_folders_in_alphabetical_order(tmp_path, folders):
    write(folders / "classnames.txt", "cat\nred fox\nowl\n")
    evaluator = evals.create(fields(tmp_path, "animals"))
    assert evaluator.names == ("cat", "red fox", "owl")
    np.testing.assert_array_equal(records.open(evaluator.data).labels(evaluator.labels), [0, 0, 1, 1, 2])
    write(folders / "classnames.txt", "cat\nowl\n")
    with pytest.raises(ValueError, match=r"names 2 classes, and .*animals has 3"):
        fields(tmp_path, "animals")


def test_names_and_folders_may_come_from_json(tmp_path, folders):
    content = {"classes": ["owl", "cat", "fox"], "folders": ["n03_owl", "n01_cat", "n02_red_fox"]}
    write(folders / "classes.json", json.dumps(content))
    evaluator = evals.create(fields(tmp_path, "animals"))
    np.testing.assert_array_equal(records.open(evaluator.data).labels(evaluator.labels), [1, 1, 2, 2, 0])


def test_numbers_of_wordnet_are_no_class_names(tmp_path):
    for name in ("n01440764", "n01443537"):
        write(tmp_path / "imagenet" / "val" / name / "a.jpg", image(0))
    with pytest.raises(ValueError, match=r"no class names .*n01440764, .*write them to .*classnames.txt"):
        fields(tmp_path, "imagenet")


def test_a_probe_learns_from_the_train_split_beside_the_other(tmp_path, folders):
    config = {"name": "knn", "k": 2, "bank": {"limit": 3}}
    with pytest.raises(ValueError, match=r"animals has the splits val; want train"):
        fields(tmp_path, "animals", config)
    for number, name in enumerate(["n03_owl", "n01_cat", "n02_red_fox", "n01_cat"]):
        write(folders / "train" / name / f"{number}.jpg", image(number))
    evaluator = evals.create(fields(tmp_path, "animals", config))
    np.testing.assert_array_equal(records.open(evaluator.bank).labels(evaluator.classes), [0, 0, 1])
    np.testing.assert_array_equal(records.open(evaluator.data).labels(evaluator.classes), [0, 0, 1, 1, 2])


def test_a_probe_is_not_given_what_it_is_tested_on(tmp_path):
    write(tmp_path / "zoo.csv", "image,cls\na.png,x\nb.png,y\n")
    with pytest.raises(ValueError, match=r"nothing to learn from beside .*zoo.csv"):
        fields(tmp_path, "zoo", {"name": "knn"})


def test_a_probe_takes_numbers_as_they_are(tmp_path, clip_benchmark):
    tar(clip_benchmark / "train" / "0.tar", [{"png": image(i), "cls": f"{i}"} for i in range(4)])
    write(clip_benchmark / "train" / "nshards.txt", "1")
    evaluator = evals.create(fields(tmp_path, "wds_shapes", {"name": "knn"}))
    assert evaluator.classes is None
    np.testing.assert_array_equal(records.open(evaluator.bank).labels(), [0, 1, 2, 3])
    assert len(records.open(evaluator.data)) == 9


def test_ade20ks_folders_are_images_with_masks_of_both_splits(tmp_path):
    for split in ("training", "validation"):
        write(tmp_path / "ade" / "images" / split / f"{split}.jpg", image(0))
        write(tmp_path / "ade" / "annotations" / split / f"{split}.png", image(1))
    evaluator = evals.create(fields(tmp_path, "ade", {"name": "segmentation", "classes": 150, "data": {"limit": 1}}))
    assert evaluator.classes == 150 and evaluator.data["limit"] == 1
    learned, judged = (maps.open(data, "mask").source[0] for data in (evaluator.train, evaluator.data))
    assert learned["mask"] == str(tmp_path / "ade" / "annotations" / "training" / "training.png")
    assert judged["image"] == str(tmp_path / "ade" / "images" / "validation" / "validation.jpg")
    (tmp_path / "ade" / "annotations" / "training").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"ade has maps of the splits validation; want train or training"):
        fields(tmp_path, "ade", {"name": "segmentation"})


def test_nyu_may_be_lists_or_its_labelled_file_and_lists_come_first(tmp_path):
    folder = tmp_path / "nyu"
    write(folder / "nyu_depth_v2_labeled.mat", b"")
    given = fields(tmp_path, "nyu", {"name": "depth"})
    assert given["data"] == {"name": "labelled", "path": str(folder / "nyu_depth_v2_labeled.mat"), "split": "test"}
    assert given["train"] == given["data"] | {"split": "train"}
    for split in ("train", "test"):
        write(folder / f"nyu_{split}.txt", f"/{split}/rgb.jpg /{split}/depth.png 518.8\n")
    evaluator = evals.create(fields(tmp_path, "nyu", {"name": "depth"}))
    for data, split in ((evaluator.train, "train"), (evaluator.data, "test")):
        assert maps.open(data, "depth").source[0]["depth"] == str(folder / split / "depth.png")


def test_tables_of_images_and_maps_are_learned_from_by_their_split(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "mine" / f"{split}.jsonl", json.dumps({"image": "a.png", "mask": f"{split}.png"}))
    given = fields(tmp_path, "mine", {"name": "segmentation"})
    assert [maps.open(given[name], "mask").source[0]["mask"] for name in ("train", "data")] == ["train.png", "val.png"]


@pytest.fixture
def objectnet(tmp_path):
    root = tmp_path / "objectnet-1.0"
    for name in ("alarm_clock", "band_aid", "chess_piece"):
        write(root / "images" / name / "0.png", image(0))
    labels = {"alarm_clock": "Alarm clock", "band_aid": "Band Aid", "chess_piece": "Chess piece"}
    write(root / "mappings" / "folder_to_objectnet_label.json", json.dumps(labels))
    shared = {"Alarm clock": "analog clock; digital clock", "Band Aid": "Band Aid"}
    write(root / "mappings" / "objectnet_to_imagenet_1k.json", json.dumps(shared))
    return root


def test_objectnet_has_all_its_classes_or_those_of_imagenet(tmp_path, objectnet):
    everything = evals.create(fields(tmp_path, "objectnet-1.0"))
    assert everything.names == ("alarm clock", "band aid", "chess piece")
    np.testing.assert_array_equal(records.open(everything.data).labels(everything.labels), [0, 1, 2])
    shared = evals.create(fields(tmp_path, "objectnet-1.0", ZERO_SHOT | {"subset": True}))
    assert shared.names == ("alarm clock", "band aid")
    np.testing.assert_array_equal(records.open(shared.data).labels(shared.labels, others=True), [0, 1, -1])
    (objectnet / "mappings" / "folder_to_objectnet_label.json").unlink()
    with pytest.raises(ValueError, match=r"folder_to_objectnet_label.json is missing"):
        fields(tmp_path, "objectnet-1.0")


def test_a_table_names_its_classes_itself_or_beside_it(tmp_path):
    lines = [{"image": f"{i}.png", "cls": name} for i, name in enumerate(["owl", "cat", "owl"])]
    write(tmp_path / "zoo" / "test.jsonl", "\n".join(map(json.dumps, lines)))
    assert fields(tmp_path, "zoo")["classes"] == ["cat", "owl"]
    numbered = [{"image": "a.png", "label": i} for i in (1, 0)]
    write(tmp_path / "zoo" / "test.jsonl", "\n".join(map(json.dumps, numbered)))
    with pytest.raises(ValueError, match="its records have numbers only"):
        fields(tmp_path, "zoo")
    write(tmp_path / "zoo" / "classes.json", '["cat", "owl"]')
    assert evals.create(fields(tmp_path, "zoo")).names == ("cat", "owl")
    write(tmp_path / "other.csv", "image,cls\na.png,x\nb.png,y\n")
    assert fields(tmp_path, "other")["classes"] == ["x", "y"]


BUILDER = """
import sys, numpy as np, PIL.Image, tensorflow_datasets as tfds
PIL.Image.new("RGB", (5, 4)).save(sys.argv[1] + "/a.png")  # from a file: encoding needs tensorflow
class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.9.0")
    SUPPORTED_VERSIONS = [tfds.core.Version("1.10.0")]
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "label": tfds.features.ClassLabel(names=["red_fox", "owl"])}))
    def _split_generators(self, dl):
        return {"validation": self._generate_examples()}
    def _generate_examples(self):
        for i in range(3 if str(self.version) == "1.10.0" else 1):
            said = [{"id": n, "text": f"{i} {n}"} for n in range(i + 1)]
            yield i, {"image": sys.argv[1] + "/a.png", "captions": said, "label": i % 2}
for version in ("1.9.0", "1.10.0"):
    Toy(data_dir=sys.argv[1], version=version, file_format="array_record").download_and_prepare()
"""


def test_a_prepared_tfds_set_is_found_with_its_split_names_and_captions(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="needs the extra `data`")
    write(tmp_path / "build.py", BUILDER)
    subprocess.run([sys.executable, str(tmp_path / "build.py"), str(tmp_path)], check=True, capture_output=True)
    given = fields(tmp_path, "toy")
    assert given["data"]["path"].endswith("1.10.0")  # the newest by number
    evaluator = evals.create(given)
    assert evaluator.names == ("red fox", "owl")
    rows = records.open(evaluator.data)
    captions = sorted(zip(rows.texts(), rows.labels(evaluator.names).tolist(), strict=True))
    assert captions == [(("0 0",), 0), (("1 0", "1 1"), 1), (("2 0", "2 1", "2 2"), 0)]
    with pytest.raises(ValueError, match="has the splits validation; want test"):
        layouts.find(str(tmp_path), ["toy:test"])


def test_the_first_place_that_is_there_is_taken_and_all_looked_at_are_told(tmp_path, folders, clip_benchmark):
    found, looked = layouts.find(str(tmp_path), ["nothing", "wds_shapes", "animals"])
    assert found is not None
    assert found.form == "CLIP_benchmark"
    assert looked == (str(tmp_path / "nothing"), str(tmp_path / "wds_shapes"))
    assert layouts.find(str(tmp_path), ["nothing:val"]) == (None, (str(tmp_path / "nothing"),))


def test_a_folder_in_no_known_layout_says_what_was_wanted(tmp_path):
    write(tmp_path / "odd" / "readme.md", "hello")
    with pytest.raises(ValueError, match=r"odd holds no data set in a known layout; want test/nshards.txt"):
        layouts.find(str(tmp_path), ["odd"])

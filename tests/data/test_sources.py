"""Sources: one data set in every format, random access, and what is said about files that are wrong."""

import csv
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from pe_jax.data import sources, tar_index
from pe_jax.data.image import decode, read_bytes
from pe_jax.data.sources import BadRecord, Captions, create, decode_record, encode_record, write_shard

FORMATS = ["jsonl", "csv", "packed", "webdataset", "array_record"]


def content(record) -> tuple[bytes, str, int]:
    image = record["image"]
    return image if isinstance(image, bytes) else read_bytes(image), record["caption"], int(record["n"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(small, name):
    source = create(small.config(name))
    assert len(source) == 23
    got = [content(source[i]) for i in range(len(source))]
    assert got == list(zip(small.images, small.captions, range(23), strict=True))


def test_a_folder_gives_its_images_with_class_and_caption(small, tmp_path):
    for name, image in {"sea_lion/b.JPG": 0, "sea_lion/a.png": 1, "fox/deep/c.webp": 2, "loose.jpeg": 3}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(small.images[image])
    (tmp_path / "sea_lion/b.txt").write_text("two of them\n")
    (tmp_path / "notes.md").write_text("no record")
    source = create(sources.guess(str(tmp_path)))
    assert [source.where(i) for i in range(len(source))] == [
        str(tmp_path / name) for name in ("fox/deep/c.webp", "loose.jpeg", "sea_lion/a.png", "sea_lion/b.JPG")
    ]
    records = [source[i] for i in range(len(source))]
    assert [read_bytes(record["image"]) for record in records] == [small.images[i] for i in (2, 3, 1, 0)]
    captions = [{k: v for k, v in record.items() if k != "image"} for record in records]
    assert captions == [
        {"cls": "fox", "caption": "fox"},
        {},
        {"cls": "sea lion", "caption": "sea lion"},
        {"cls": "sea lion", "caption": "two of them"},
    ]
    with pytest.raises(ValueError, match="is no folder"):
        create({"name": "folder", "path": str(tmp_path / "notes.md")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no record"):
        create({"name": "folder", "path": str(tmp_path / "empty")})


@pytest.mark.parametrize("name", FORMATS)
def test_access_is_random_and_survives_pickling(small, name):
    source = create(small.config(name))
    source[0]
    again = pickle.loads(pickle.dumps(source))
    for i in np.random.default_rng(0).permutation(23)[:8].tolist():
        assert content(again[i])[2] == content(source[i])[2] == i


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_knows_where_it_stands(small, name):
    source = create(small.config(name))
    assert str(small.folder) in source.where(13)
    assert source.where(13) != source.where(14)


@pytest.mark.parametrize("name", FORMATS)
def test_a_path_tells_which_source_it_is(small, name):
    config = small.config(name)
    assert sources.guess(config["path"]) == config
    assert sources.guess(json.dumps(config)) == config


def test_what_a_path_is_must_be_clear(tmp_path):
    with pytest.raises(ValueError, match=r"cannot tell what kind of source .*notes.txt is; wanted .jsonl"):
        sources.guess(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="the source is not JSON"):
        sources.guess('{"name": ')


def test_synthetic_records_are_a_function_of_seed_and_number():
    a, b = create({"name": "synthetic", "records": 5, "size": 9, "seed": 1}), create({"name": "synthetic", "size": 9})
    assert (a[3]["image"] == a[3]["image"]).all() and a[3]["image"].shape == (9, 9, 3)
    assert (a[3]["image"] != a[4]["image"]).any() and (a[3]["image"] != b[3]["image"]).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "json"}, "source name 'json' is unknown; the sources are jsonl, csv"),
        ({"path": "x"}, "source name None is unknown"),
        ({"name": "jsonl", "path": "x", "column": 1}, "source 'jsonl' has no 'column'; it takes path, image, root"),
        ({"name": "jsonl"}, r"source 'jsonl' needs 'path'; got \[\]"),
        ({"name": "jsonl", "path": "/none/a.jsonl"}, "/none/a.jsonl does not exist"),
        ({"name": "csv", "path": "/none/a.csv"}, "/none/a.csv does not exist"),
        ({"name": "packed", "path": "/none/a.npz"}, "/none/a.jsonl does not exist"),
        ({"name": "webdataset", "path": "/none/{00..01}.tar"}, "shard /none/00.tar does not exist"),
        ({"name": "array_record", "path": "/none/*.array_record"}, r"matches no \*.array_record file"),
        ({"name": "synthetic", "records": 0}, "holds no record"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        create(config)


# ---- lists ---------------------------------------------------------------------------------------------------------


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"image": "a"}\r\n\n  \n{"image": "b"}')
    source = create({"name": "jsonl", "path": str(path)})
    assert [pathlib.Path(source[i]["image"]).name for i in range(len(source))] == ["a", "b"]


def test_paths_start_from_the_root_and_the_image_field_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"photo": "x/1.png", "image": "other"}\n')
    source = create({"name": "jsonl", "path": str(path), "image": "photo", "root": "/data"})
    assert source[0]["image"] == "/data/x/1.png"


def test_a_list_without_an_image_column_names_what_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"img": "1.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match="no image or video path: looked for image, video, file, path, found img"):
        create({"name": "jsonl", "path": str(tmp_path / "a.jsonl")})
    (tmp_path / "a.csv").write_text("img,caption\n1.png,x\n")
    with pytest.raises(ValueError, match="looked for picture, found img, caption"):
        create({"name": "csv", "path": str(tmp_path / "a.csv"), "image": "picture"})
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="found nothing"):
        create({"name": "csv", "path": str(tmp_path / "empty.csv")})


def test_a_damaged_line_is_a_bad_record_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a"}\n{"image": \n[1]\n{"image": 3}\n{"caption": "x"}\n{"image": "b"}\n')
    source = create({"name": "jsonl", "path": str(path)})
    for i, message in (
        (1, "record 1 is not JSON"),
        (2, "is list in JSON"),
        (3, "image path is 3"),
        (4, "no image or video path"),
    ):
        with pytest.raises(BadRecord, match=message):
            source[i]
    assert source[5]["image"].endswith("b")


def test_a_csv_row_of_another_width_is_a_bad_record(tmp_path):
    with open(tmp_path / "a.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["path", "text"], ["1.png", "a, b"], ["2.png"]])
    source = create({"name": "csv", "path": str(tmp_path / "a.tsv")})
    assert source[0]["text"] == "a, b"
    with pytest.raises(BadRecord, match="row 1 has 1 columns; the header has 2"):
        source[1]


def test_a_packed_file_that_is_none_is_refused(tmp_path, small):
    (tmp_path / "a.jsonl").write_text('{"caption": "x"}\n')
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"a.npz is no packed image file"):
        create({"name": "packed", "path": str(tmp_path / "a.npz")})
    np.savez(tmp_path / "a.npz", data=np.zeros(3, np.uint8), offsets=np.array([0, 3]))
    (tmp_path / "a.jsonl").write_text('{"i": 1}\n')
    with pytest.raises(BadRecord, match="image number 1 is not among the 1 packed"):
        create({"name": "packed", "path": str(tmp_path / "a.npz")})[0]


# ---- ArrayRecord ---------------------------------------------------------------------------------------------------


def test_a_record_becomes_bytes_and_back():
    record = {
        "image": b"\x00\xff",
        "caption": "naïve ☕",
        "captions": ["a", "b"],
        "label": 3,
        "empty": b"",
        "mask": b"xyz",
    }
    assert decode_record(encode_record(record)) == record
    several = {"image": [b"12", b"", b"345"], "n": 1, "label": [], "words": ["a"]}
    assert decode_record(encode_record(several)) == several


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a record of pe_jax"),
        (b"JUNKxxxx", "starts with b'JUNK'"),
        (b"PEJ1\xff\x00\x00\x00{", "header of the record is damaged"),
        (encode_record({"image": b"12345"})[:-2], "header announces"),
    ],
)
def test_bytes_that_are_no_record_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        decode_record(data)


def test_a_shard_that_failed_half_way_does_not_appear(tmp_path):
    def records():
        yield {"image": b"1"}
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.array_record", records())
    assert not (tmp_path / "a.array_record").exists()


def test_a_file_that_is_no_array_record_is_refused(tmp_path):
    (tmp_path / "a.array_record").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ValueError, match=r"cannot open the ArrayRecord files .*a.array_record"):
        create({"name": "array_record", "path": str(tmp_path)})


# ---- WebDataset ----------------------------------------------------------------------------------------------------


def test_shards_are_named_by_braces_globs_folders_and_lists(small):
    tars = small.folder / "tars"
    want = [str(tars / "shard-00.tar"), str(tars / "shard-01.tar")]
    for path in (
        str(tars),
        str(tars / "*.tar"),
        str(tars / "shard-{00..01}.tar"),
        str(tars / "shard-0{0,1}.tar"),
        want,
        [want[0], str(tars / "shard-*.tar")],
    ):
        assert sources.WebDataset(path).paths == want


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path, small, monkeypatch):
    from tests.data.conftest import write_tar

    path = tmp_path / "a.tar"
    write_tar(path, small.images[:3], small.captions[:3])
    assert len(create({"name": "webdataset", "path": str(path)})) == 3
    assert (tmp_path / "a.tar.index.npz").exists()
    scan, scans = tar_index._scan, []
    monkeypatch.setattr(tar_index, "_scan", lambda p: scans.append(p) or scan(p))
    assert len(create({"name": "webdataset", "path": str(path)})) == 3 and not scans
    write_tar(path, small.images[:5], small.captions[:5])
    source = create({"name": "webdataset", "path": str(path)})
    assert len(source) == 5 and len(scans) == 1 and content(source[4]) == (small.images[4], small.captions[4], 4)
    (tmp_path / "a.tar.index.npz").write_bytes(b"cut short")
    assert len(create({"name": "webdataset", "path": str(path)})) == 5 and len(scans) == 2


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path, small, monkeypatch):
    tar = small.folder / "tars/shard-00.tar"
    path = tmp_path / "shards" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(tar.read_bytes())
    monkeypatch.setenv("PE_JAX_CACHE", str(tmp_path / "cache"))
    makedirs = os.makedirs

    def read_only(name, *args, **kwargs):  # chmod does not stop root
        if name == str(path.parent):
            raise PermissionError(name)
        makedirs(name, *args, **kwargs)

    monkeypatch.setattr(tar_index.os, "makedirs", read_only)
    create({"name": "webdataset", "path": str(path)})
    assert os.listdir(path.parent) == ["a.tar"] and len(os.listdir(tmp_path / "cache/tar_index")) == 1


def test_a_tar_that_is_cut_short_or_compressed_is_named(tmp_path, small):
    data = (small.folder / "tars/shard-00.tar").read_bytes()
    whole = len(data.rstrip(b"\0"))
    for at in (*range(100, whole, whole // 12), whole // 512 * 512):
        (tmp_path / "cut.tar").write_bytes(data[:at])
        with pytest.raises(ValueError, match=r"cut.tar is no readable, uncompressed tar: "):
            create({"name": "webdataset", "path": str(tmp_path / "cut.tar")})
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"zipped.tar is no readable, uncompressed tar"):
        create({"name": "webdataset", "path": str(tmp_path / "zipped.tar")})


def test_a_sample_without_image_is_a_bad_record(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "x").write_text("words")
        tar.add(tmp_path / "x", "1.txt")
        tar.add(tmp_path / "x", "2.jpg")
    source = create({"name": "webdataset", "path": str(tmp_path / "a.tar")})
    assert len(source) == 2
    with pytest.raises(BadRecord, match=r"a.tar sample 0: no image .* it has \['caption'\]"):
        source[0]


def test_few_files_stay_open_at_once(small, monkeypatch):
    monkeypatch.setattr(tar_index.Files, "LIMIT", 1)
    source = create(small.config("webdataset"))
    assert [content(source[i])[2] for i in (0, 22, 1, 21, 2)] == [0, 22, 1, 21, 2]
    assert len(source._opened.files) == 1


# ---- TFDS ----------------------------------------------------------------------------------------------------------

BUILDER = """
import sys, tensorflow_datasets as tfds
class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["red_fox", "owl"])}))
    def _split_generators(self, dl):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        from pe_jax.data import sources
        source = sources.create({"name": "jsonl", "path": sys.argv[1]})
        for i in range(len(source)):
            record = source[i]
            yield i, {"image": record["image"], "caption": record["caption"], "label": i % 2}
builder = Toy(data_dir=sys.argv[2], file_format="array_record")
builder.download_and_prepare()
"""


def test_a_tfds_set_is_read_with_its_images_encoded_and_without_tensorflow(small, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "build.py").write_text(BUILDER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run(
        [sys.executable, str(tmp_path / "build.py"), small.config("jsonl")["path"], str(tmp_path / "data")],
        check=True,
        capture_output=True,
        env=environment,
    )
    source = create({"name": "tfds", "path": str(tmp_path / "data/toy/1.0.0"), "split": "train"})
    assert len(source) == 23 and "tensorflow" not in sys.modules
    by_caption = {source[i]["caption"]: source[i] for i in range(23)}
    assert set(by_caption) == set(small.captions)
    for i, caption in enumerate(small.captions):
        record = by_caption[caption]
        assert record["image"] == small.images[i] and record["cls"] == ("red fox", "owl")[i % 2]
    assert len(pickle.loads(pickle.dumps(source))) == 23
    assert sources.guess(str(tmp_path / "data/toy/1.0.0"))["name"] == "tfds"
    assert len(create({"name": "tfds", "path": str(tmp_path / "data/toy/1.0.0"), "split": "train[:5]"})) == 5


VIDEOS = """
import io, sys, numpy as np, PIL.Image, tensorflow_datasets as tfds
class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("files", "frames", "neither")]
    def _info(self):
        video = {
            "files": tfds.features.Tensor(shape=(), dtype=np.object_),
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            "neither": tfds.features.Text(),
        }[self.builder_config.name]
        name = "video" if self.builder_config.name != "neither" else "film"
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({name: video}))
    def _split_generators(self, dl):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        def png(height, grey):
            file = io.BytesIO()
            PIL.Image.new("RGB", (8, height), (grey,) * 3).save(file, "PNG")
            return io.BytesIO(file.getvalue())
        for i in range(2):  # the frames of the second differ in size
            given = {"files": b"film", "frames": [png(6 + i * j, 10 * j) for j in range(3)], "neither": "film"}
            yield i, {next(iter(self.info.features)): given[self.builder_config.name]}
for name in ("files", "frames", "neither"):
    Toy(config=name, data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_a_tfds_sets_videos_are_files_or_frames(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "build.py").write_text(VIDEOS)
    subprocess.run([sys.executable, str(tmp_path / "build.py"), str(tmp_path)], check=True, capture_output=True)

    def opened(kind):
        return create({"name": "tfds", "path": str(tmp_path / "toy" / kind / "1.0.0")})

    assert opened("files")[1]["video"] == b"film"  # as bytes, though it is text too
    frames, places = opened("frames"), {}
    for i in range(2):
        try:
            places["whole"] = frames[i]["video"]
        except sources.BadRecord as error:
            places["mixed"] = str(error)
    assert places["whole"].shape == (3, 6, 8, 3) and places["whole"][:, 0, 0, 0].tolist() == [0, 10, 20]
    assert "has frames of 3 sizes" in places["mixed"]
    with pytest.raises(ValueError, match="no feature 'image' or 'video', only film"):
        opened("neither")


def test_a_tfds_set_that_is_not_there_says_how_it_must_be_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=r'none/1\[train\] cannot be read: .*file_format="array_record"'):
        create({"name": "tfds", "path": str(tmp_path / "none/1")})
    with pytest.raises(ValueError, match="needs either dataset or path"):
        create({"name": "tfds"})


# ---- captions ------------------------------------------------------------------------------------------------------


def test_a_draw_chooses_among_captions_and_templates():
    record = {"captions": ["a", "b", "c"], "cls": "cat"}
    assert [Captions()(record, d, "x") for d in (0.0, 0.34, 0.99)] == ["a", "b", "c"]
    made = Captions(templates=["a {}.", "the {label}"])
    assert [made(record, d, "x") for d in (0.0, 0.5)] == ["a cat.", "the cat"]
    assert Captions()({"captions": ["", "  ", "only"]}, 0.0, "x") == "only"
    assert Captions(caption="note")({"caption": "no", "note": "yes"}, 0.0, "x") == "yes"
    assert Captions(templates=["a {}"], label="k", classes=["ant", "bee"])({"k": 1, "cls": "no"}, 0.0, "x") == "a bee"


@pytest.mark.parametrize(
    ("captions", "record", "message"),
    [
        (Captions(), {"caption": " \n"}, "here 7: the caption is empty"),
        (Captions(), {"captions": []}, "the caption is empty"),
        (Captions(), {"image": b""}, "no caption; looked for captions, caption, text, txt, the record has image"),
        (Captions(), {"caption": 3}, "the caption is 3; wanted a text"),
        (Captions(caption="note"), {"caption": "x"}, "looked for note, the record has caption"),
        (Captions(["a {}"]), {"label": 3}, "the class name is 3; wanted a text, or a number below 0 with `classes`"),
        (Captions(["a {}"]), {"cls": " "}, "the class name is ' '"),
    ],
)
def test_a_record_without_caption_is_bad(captions, record, message):
    with pytest.raises(BadRecord, match=message):
        captions(record, 0.5, "here 7")


@pytest.mark.parametrize("templates", [["a photo"], ["{} and {}"], ["{name}"]])
def test_a_template_needs_one_place_for_the_name(templates):
    with pytest.raises(ValueError, match="once, for the class name"):
        Captions(templates)


def test_what_a_source_gives_decodes(small):
    source = create(small.config("webdataset"))
    assert decode(source[4]["image"], source.where(4)).mode == "RGB"


# ---- videos


def test_videos_are_told_from_images_by_the_field_or_the_ending(tmp_path):
    rows = [
        {"video": "a.mp4", "caption": "x"},
        {"video": "frames/7", "caption": "x"},
        {"file": "b.WebM", "caption": "x"},
        {"image": "c.jpg", "caption": "x"},
        {"file": "d.png", "caption": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [create({"name": "jsonl", "path": str(tmp_path / "a.jsonl")})[i] for i in range(5)]
    kinds = [("video", "a.mp4"), ("video", "frames/7"), ("video", "b.WebM"), ("image", "c.jpg"), ("image", "d.png")]
    for record, (kind, name) in zip(found, kinds, strict=True):
        assert sources.medium(record, kind, "here") == str(tmp_path / name)
        other = "image" if kind == "video" else "video"
        with pytest.raises(BadRecord, match=f"here has no {other}; its fields are .*{kind}"):
            sources.medium(record, other, "here")
    (tmp_path / "a.csv").write_text("clip,sentence\nx/a.avi,words\n")
    source = create({"name": "csv", "path": str(tmp_path / "a.csv"), "image": "clip", "root": "/data"})
    assert source[0] == {"clip": "x/a.avi", "sentence": "words", "video": "/data/x/a.avi"}


def test_a_folder_of_videos_has_their_classes_and_captions(tmp_path):
    for name in ("long_jump/b.mp4", "long_jump/a.MKV", "archery/c.avi", "archery/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "archery" / "c.txt").write_text("An arrow flies.\n")
    source = create({"name": "folder", "path": str(tmp_path)})
    assert [source[i] for i in range(len(source))] == [
        {"video": str(tmp_path / "archery/c.avi"), "cls": "archery", "caption": "An arrow flies."},
        {"image": str(tmp_path / "archery/d.jpg"), "cls": "archery", "caption": "archery"},
        {"video": str(tmp_path / "long_jump/a.MKV"), "cls": "long jump", "caption": "long jump"},
        {"video": str(tmp_path / "long_jump/b.mp4"), "cls": "long jump", "caption": "long jump"},
    ]


def test_a_tar_of_videos_gives_their_bytes_only_when_asked(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("7.mp4", b"film"), ("7.json", b'{"human_caption": "a film"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = create({"name": "webdataset", "path": str(tmp_path / "a.tar")})
    assert isinstance(source, sources.WebDataset)
    assert source[0] == {"human_caption": "a film", "video": b"film"}
    assert source.fields(0) == {"human_caption": "a film"}


def test_conversations_have_one_image_several_a_video_or_none(tmp_path):
    lines = [
        {"image": "a.png"},
        {"image": ["a.png", "/b/c.png"]},
        {"video": "gs://bucket/d.mp4"},
        {"conversations": []},
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"image": 3}, {"image": ["a.png", ""]}])))
    source = create({"name": "conversations", "path": str(tmp_path / "talks.jsonl"), "root": "/root"})
    assert [source[i] for i in range(4)] == [
        {"image": "/root/a.png"},
        {"image": ["/root/a.png", "/b/c.png"]},
        {"video": "gs://bucket/d.mp4"},
        {"conversations": []},
    ]
    with pytest.raises(BadRecord, match=r"talks.jsonl record 4: the image is 3; wanted a path"):
        source[4]
    with pytest.raises(BadRecord, match=r"record 5: the path in `image` is ''; wanted a path"):
        source[5]


def test_packed_images_may_have_a_name_of_their_own(small, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"i": 5, "question": "?"}\n{"i": 5, "question": "!"}\n')
    images = str(small.folder / "packed.npz")
    source = create({"name": "packed", "path": str(tmp_path / "questions.jsonl"), "images": images})
    assert [source[i]["image"] for i in range(2)] == [small.images[5]] * 2

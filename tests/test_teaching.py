"""Teachers' words as files: what a record holds, that a killed run goes on, and what is told beforehand."""

import dataclasses
import functools
import io

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import checkpoint, data, teaching
from pe_jax.cli import main
from pe_jax.data import sources
from pe_jax.data.image import Augment, generator
from pe_jax.models import zoo
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.stages import teachers
from pe_jax.types import split

CONFIG = VisionConfig(16, 8, 16, 2, 2, 24, True, "none", None, norm_post=False)
TEACHER = teachers.Tower(arch=CONFIG, layer=1, image_size=16, direct=1.0)
DATA = {"name": "synthetic", "records": 5, "size": 20}
AUGMENT = {"aspect": (0.5, 2.0), "hflip": 0.5}


@functools.cache
def tower():
    return VisionTower(CONFIG, rngs=nnx.Rngs(4))


def writing(out, **changes):
    arguments = {"image_size": 24, "patch_size": 8, "augment": AUGMENT, "copies": 2, "batch_size": 4, "shards": 3}
    return teaching.Writing(TEACHER, tower().truncate(1), DATA, str(out), **arguments | changes)


def records(out):
    source = sources.create({"name": "array_record", "path": str(out)})
    return [source[i] for i in range(len(source))]


def test_a_record_holds_the_augmented_pixels_and_what_the_teacher_says_of_them(tmp_path):
    request = writing(tmp_path / "a")
    assert (request.rows, request.tokens, request.width, request.waiting) == (10, 9, 16, 10)
    assert request.run()
    source, model = sources.create(DATA), tower()
    found = records(tmp_path / "a")
    assert [record["row"] for record in found] == list(range(10))
    pixels = []
    for row, record in enumerate(found):
        want = Augment.from_dict(AUGMENT)(source[row % 5]["image"], (24, 24), generator(0, row))
        pixels.append(np.array(PIL.Image.open(io.BytesIO(record["image"]))))
        np.testing.assert_array_equal(pixels[-1], want)
    images = np.float32(pixels) / 127.5 - 1
    want = np.asarray(TEACHER.features(model.truncate(1), jnp.asarray(images), (3, 3), None))
    got = np.stack([np.frombuffer(record["teacher"], np.int8).reshape(9, 16) for record in found]).astype(np.float32)
    cosine = (want * got).sum(-1) / np.linalg.norm(want, axis=-1) / np.linalg.norm(got, axis=-1)
    assert cosine.min() > 0.9999
    assert len({record["image"] for record in found}) == 10  # each copy is augmented in a way of its own


def test_a_run_that_lost_shards_writes_those_alone_and_the_same_bytes(tmp_path):
    out = tmp_path / "a"
    writing(out).run()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    lost = sorted(out.glob("*.array_record"))[1]
    lost.unlink()
    kept = sorted(out.glob("*.array_record"))[0]
    kept_at = kept.stat().st_mtime_ns
    again = writing(out, shards=None)
    assert len(again.pending) == 1 and again.waiting < 10
    assert again.run()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert kept.stat().st_mtime_ns == kept_at


def test_parts_write_shards_of_their_own_into_one_folder(tmp_path):
    first, second = (writing(tmp_path / "a", part=(i, 2)) for i in range(2))
    assert not first.run()
    assert second.run()
    assert sorted(record["row"] for record in records(tmp_path / "a")) == list(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "holds another teacher's words: seed is 0 there and 1 here"),
        ({"shards": 4}, "was begun with 3 shards"),
        ({"patch_size": 7}, "--image-size 24 is not a multiple of --patch-size 7"),
        ({"copies": 0}, "--copies 0 must be at least 1"),
    ],
)
def test_what_does_not_go_on_with_a_folder_is_refused(tmp_path, changes, message):
    writing(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        writing(tmp_path / "a", **changes)


def test_the_command_tells_size_and_cost_before_and_writes_a_towers_words(tmp_path, capsys):
    checkpoint.save_weights(tmp_path / "tower", split(tower())[1], {"architecture": zoo.to_dict(CONFIG)})
    command = ["teacher", '{"name": "synthetic", "records": 3}', "--out", str(tmp_path / "a"), "--model",
               str(tmp_path / "tower"), "--image-size", "16", "--patch-size", "8", "--batch-size", "3"]  # fmt: skip
    assert main([*command, "--plan"]) == 0
    told = capsys.readouterr().err
    assert "3 rows, each 4 x 16 bytes of the teacher (64 B) and its pixels (768 B before PNG): at most 2.5 kB" in told
    flops = zoo.forward_flops(dataclasses.replace(CONFIG, image_size=16), 16)
    assert f"3 rows are left, {flops / 1e12:.3g} TFLOPs each" in told
    assert not list((tmp_path / "a").glob("*.array_record"))
    assert main(command) == 0
    assert "3 rows of 4 x 16" in capsys.readouterr().out
    assert len(records(tmp_path / "a")) == 3
    assert main(["teacher", '{"name": "synthetic"}', "--out", str(tmp_path / "b"), "--model", "SAM-2.1-L"]) == 2
    assert "SAM-2.1-L needs --weights" in capsys.readouterr().err


def test_a_run_reads_the_pixels_and_the_words_as_they_were_written(tmp_path):
    writing(tmp_path / "a").run()
    stored = records(tmp_path / "a")
    config = {"sources": [{"name": "array_record", "path": str(tmp_path / "a")}], "threads": 1}
    shape = {"batch_size": 4, "image_size": 24, "teacher": (9, 16)}
    spec = data.batch_spec("images", config, **shape)
    with data.create("images", config, seed=0, **shape) as loader:
        batch = next(loader)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}
    for row, record in enumerate(batch["index"]):
        assert batch["teacher"][row].tobytes() == stored[record]["teacher"]
        np.testing.assert_array_equal(
            batch["image"][row], np.array(PIL.Image.open(io.BytesIO(stored[record]["image"])))
        )


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"augment": {"hflip": 0.5}}, {}, "data.augment must be empty where a teacher's words are read"),
        ({}, {"teacher": (9, 15)}, "has 144 bytes of a teacher; want 9 x 15"),
        ({}, {"image_size": 16}, "the teacher saw 24 x 24 pixels, and the phase has image_size=16"),
    ],
)
def test_words_that_are_not_of_these_pixels_are_refused(tmp_path, changes, shape, message):
    writing(tmp_path / "a").run()
    config = {"sources": [{"name": "array_record", "path": str(tmp_path / "a")}], "threads": 1} | changes
    shape = {"batch_size": 2, "image_size": 24, "teacher": (9, 16)} | shape
    with pytest.raises(ValueError, match=message), data.create("images", config, seed=0, **shape) as loader:
        next(loader)

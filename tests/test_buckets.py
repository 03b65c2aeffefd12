"""A bucket in place of a local folder, tried on one that this machine serves: gcsfs, Orbax and ArrayRecord are real."""

import functools
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import checkpoint, evaluate, hub, metrics, paths, profiling
from pe_jax.data import sources
from pe_jax.data.image import BadImage, read_bytes
from pe_jax.data.video import BadVideo, sample
from pe_jax.evals import features
from pe_jax.models import zoo
from pe_jax.types import split
from tests import fake_gcs
from tests.data import films

pytestmark = fake_gcs.needs_gcsfs


@functools.cache
def tower():
    arch = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 1, "heads": 1, "mlp_width": 20}
    arch |= {"class_token": False, "pool": "none", "norm_post": False, "output_width": None}
    graphdef, params = split(zoo.abstract(arch))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), params))


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, fake_gcs.Server("bucket", "secret") as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.forbidden.add("secret")
        yield server


@pytest.fixture
def folder(server):
    """A folder of the bucket, empty, as its address."""
    server.objects.clear()
    return "gs://bucket/folder"


def test_an_address_keeps_both_its_slashes_and_a_local_path_is_as_given(tmp_path):
    assert str(paths.path("gs://bucket/a") / "b.json") == "gs://bucket/a/b.json"
    assert str(paths.absolute("gs://bucket/a")) == "gs://bucket/a"
    assert str(paths.path("runs/a")) == "runs/a"
    assert paths.absolute("runs/a") == pathlib.Path("runs/a").absolute()
    with pytest.raises(ValueError, match="gs://bucket/a until pathlib"):
        paths.path(pathlib.Path("gs://bucket/a"))
    for wrong in ("s3://bucket/a", "gs://", "gs:///a"):
        with pytest.raises(ValueError, match=r"want gs://BUCKET/FOLDER"):
            paths.path(wrong)


def test_a_bucket_without_gcsfs_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    for reading in (paths.path, checkpoint.metadata, hub.resolve, read_bytes, evaluate.read_config, sources.guess):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'pe-jax\[gcp\]'"):
            reading("gs://bucket/a")


def test_a_bucket_that_cannot_be_read_is_told_with_the_reason(server):
    paths.reach("gs://bucket/nothing/here/yet")
    for reading in (paths.reach, checkpoint.metadata, hub.resolve, evaluate.read_config, sources.guess):
        with pytest.raises(ValueError, match="there is no bucket buckte; create it"):
            reading("gs://buckte/a")
        with pytest.raises(ValueError, match=r"bucket secret cannot be read \(Forbidden.*Storage Object Admin"):
            reading("gs://secret/a")


def test_what_another_host_writes_is_seen(server, folder):
    """gcsfs by itself answers from the listing it made first."""
    server.put("bucket/folder/5/commit_success.txt", b"")
    assert checkpoint.complete_steps(folder) == [5]
    server.put("bucket/folder/10/commit_success.txt", b"")
    server.put("bucket/folder/15/state", b"of a save that was killed")
    assert checkpoint.complete_steps(folder) == [5, 10]


def test_a_state_comes_back_and_the_newest_and_the_best_steps_stay(folder):
    state = {"weights": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(1)}
    with checkpoint.Checkpointer(folder, every_steps=1, keep=1, best="eval/top1") as saver:
        for step, top1 in ((1, 0.5), (2, 0.9), (3, 0.7)):
            saver.save(step, jax.tree.map(lambda leaf: leaf, state), {"examples": step}, {"eval/top1": top1})
    with checkpoint.Checkpointer(folder, every_steps=1, keep=1, best="eval/top1") as saver:
        assert saver.latest == 3 and saver.best == (2, 0.9)
        back, metadata = saver.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        )
    np.testing.assert_array_equal(back["weights"], state["weights"])
    assert metadata["examples"] == 3 and checkpoint.complete_steps(folder) == [2, 3]


def test_figures_are_there_after_a_flush_and_a_resumed_run_writes_none_twice(folder):
    for resumed, steps, extra in ((None, (1, 2, 3), {}), (2, (3, 4), {"added": 0.5})):
        out = metrics.writer(folder, resumed)
        for step in steps:
            out.write_scalars(step, {"loss": np.float32(step)} | extra)
            out.write_scalars(step, {"digits/top1": step / 10})
        out.flush()
        assert [row["step"] for row in metrics.read_rows(f"{folder}/evals.csv")][-1] == str(steps[-1])
        out.write_scalars(steps[-1] + 1, {"loss": np.float32(0)} | extra)
        out.close()
    assert [list(row.values()) for row in metrics.read_rows(f"{folder}/losses.csv")] == [
        ["1", "1.0", ""],
        ["2", "2.0", ""],
        ["3", "3.0", "0.5"],
        ["4", "4.0", "0.5"],
        ["5", "0.0", "0.5"],
    ]
    assert [row["step"] for row in metrics.read_rows(f"{folder}/evals.csv")] == ["1", "2", "3", "4"]


def test_figures_are_copied_between_flushes_too_but_not_at_every_step(server, folder, monkeypatch):
    out = metrics.BucketWriter(paths.path(folder), seconds=0.2)
    (out.folder / "losses.csv").write_text("step\n1\n")
    out.write_scalars(1, {})
    assert out._pending is None
    while out._pending is None:
        out.write_scalars(2, {})
    out._pending.result()
    assert server.objects["bucket/folder/losses.csv"] == b"step\n1\n"
    (out.folder / "losses.csv").write_text("step\n1\n2\n")
    server.forbidden.add("bucket")
    with pytest.raises(OSError, match="Forbidden"):
        out.flush()
    server.forbidden.remove("bucket")
    out.close()
    assert server.objects["bucket/folder/losses.csv"] == b"step\n1\n2\n"
    assert not out.folder.exists()


def test_a_trace_goes_to_the_bucket(server, folder):
    update, said = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((64, 64))).compile(), []
    tracer = profiling.Tracer([profiling.Window(2, 1)], folder, said.append, done=0)
    state = jnp.ones((64, 64))
    for step in (1, 2, 3):
        tracer.begin(step, state)
        state = update(state)
        tracer.end(step, state, update)
    names = sorted(name.removeprefix("bucket/folder/2/") for name in server.objects)
    traces = ["plugins/profile/2/process-0.trace.json.gz", "plugins/profile/2/process-0.xplane.pb"]
    assert names == [*traces, "process-0.txt"] and said[0].startswith(f"step 2 traced: {folder}/2/process-0.txt")


def test_a_config_is_read_from_the_workdir_of_a_run(folder):
    paths.write_text(paths.path(folder) / "config.json", json.dumps({"seed": 3}))
    assert evaluate.read_config(folder) == evaluate.read_config(f"{folder}/config.json") == {"seed": 3}
    with pytest.raises(ValueError, match=f"{folder}/none/config.json does not exist|{folder}/none does not exist"):
        evaluate.read_config(f"{folder}/none")


def test_records_come_from_a_folder_a_glob_and_a_range_of_shards(folder):
    records = [{"image": bytes([i]) * 50, "caption": f"number {i}"} for i in range(7)]
    assert sources.write_shard(f"{folder}/pairs/a-0.array_record", records[:4]) == 4
    sources.write_shard(f"{folder}/pairs/a-1.array_record", records[4:])
    (paths.path(folder) / "pairs" / "notes.md").write_text("no shard")
    config = sources.guess(f"{folder}/pairs")
    assert config["name"] == "array_record"
    for name in (config["path"], f"{folder}/pairs/a-*.array_record", f"{folder}/pairs/a-{{0..1}}.array_record"):
        source = sources.create({"name": "array_record", "path": name})
        assert [source[i] for i in range(len(source))] == records
    (paths.path(folder) / "pairs" / "b.array_record-00000-of-00001").write_bytes(b"as TFDS calls them")
    assert sources._shards(f"{folder}/pairs/b.array_record-00000-of-00001", ".array_record") == [
        f"{folder}/pairs/b.array_record-00000-of-00001"
    ]
    for name, fault in (("pairs/c-*.array_record", "matches no"), ("empty", "does not exist")):
        with pytest.raises(ValueError, match=fault):
            sources.create({"name": "array_record", "path": f"{folder}/{name}"})
    with pytest.raises(ValueError, match=r"cannot open the ArrayRecord files .*a-9\.array_record"):
        sources.create({"name": "array_record", "path": f"{folder}/pairs/a-9.array_record"})


def test_lists_and_folders_of_images_come_from_a_bucket_and_tars_are_refused(folder):
    root = paths.path(folder)
    (root / "images" / "red_fox" / "a.png").write_bytes(b"picture")
    (root / "list.jsonl").write_text('{"image": "images/red_fox/a.png", "caption": "a fox"}\n')
    (root / "packed.jsonl").write_text('{"caption": "a fox"}\n')
    with (root / "packed.npz").open("wb") as file:
        np.savez(file, data=np.frombuffer(b"picture", np.uint8), offsets=np.array([0, 7]))
    for name, kind in (("list.jsonl", "jsonl"), ("packed.jsonl", "packed"), ("images", "folder")):
        config = sources.guess(f"{folder}/{name}")
        record = sources.create(config)[0]
        image = record["image"]
        assert config["name"] == kind and (image if isinstance(image, bytes) else read_bytes(image)) == b"picture"
    with pytest.raises(BadImage, match=r"none\.png does not exist"):
        read_bytes(f"{folder}/none.png")
    with pytest.raises(ValueError, match="copy them there, or convert them to ArrayRecord"):
        sources.create({"name": "webdataset", "path": f"{folder}/a.tar"})


def test_a_video_comes_from_a_bucket(folder):
    root, data = paths.path(folder), films.film(count=9)
    (root / "jump" / "a.mp4").write_bytes(data)
    record = sources.create(sources.guess(folder))[0]
    assert record == {"video": f"{folder}/jump/a.mp4", "cls": "jump", "caption": "jump"}
    assert [films.number(frame) for frame in sample(record["video"], 3)] == [0, 4, 8]
    with pytest.raises(BadVideo, match=r"none\.mp4 does not exist"):
        sample(f"{folder}/none.mp4")


def test_a_weights_file_is_fetched_once_and_a_directory_left_there(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PE_JAX_CACHE", str(tmp_path))
    server.put("bucket/folder/x.pt", b"weights")
    server.put("bucket/folder/orbax/state", b"")
    path = hub.resolve(f"{folder}/x.pt")
    assert path == str(tmp_path / "gs/bucket/folder/x.pt") and pathlib.Path(path).read_text() == "weights"
    server.objects.pop("bucket/folder/x.pt")
    assert hub.resolve(f"{folder}/x.pt", offline=True) == path
    assert hub.resolve(f"{folder}/orbax") == f"{folder}/orbax"
    assert os.listdir(tmp_path / "gs/bucket/folder") == ["x.pt"]
    for url in (f"{folder}/y.pt", f"{folder}/orbax"):
        with pytest.raises(FileNotFoundError, match="offline nothing is fetched"):
            hub.resolve(url, offline=True)
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist, though its bucket does"):
        hub.resolve(f"{folder}/none.pt")


@pytest.mark.parametrize("format", features.FORMATS)
def test_features_are_written_to_a_bucket_and_read_from_it(folder, format):
    data = {"name": "synthetic", "records": 3, "size": 8}
    asked = {"what": "tokens", "format": format, "shards": 2}
    assert features.Extraction(tower(), data, folder, **asked).run()["rows"] == 3
    assert features.Extraction(tower(), data, folder, **asked).pending == []
    found = features.open(folder)
    assert found.array().shape == (3, 4, 12) and len(found.captions()) == 3
    paths.path(f"{folder}/features-00001-of-00002.{format}").unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing"):
        features.open(folder)

"""Features in files: equal to the model's own, in every format, and right after whatever may stop a run."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from sklearn.linear_model import LogisticRegression

from pe_jax import checkpoint, cli, sharding
from pe_jax.commands import features as command
from pe_jax.data import sources
from pe_jax.evals import features
from pe_jax.models import zoo
from pe_jax.types import split
from tests import quick, two_processes
from tests.evals.conftest import ARCH, NAMES

ROOT = pathlib.Path(__file__).parents[2]


def extraction(model, data, out, **arguments):
    return features.Extraction(model, data, out, **{"layers": (1, -1), "batch_size": 4, "shards": 3} | arguments)


def extract(*arguments, **more):
    extraction(*arguments, **more).run()
    return features.open(arguments[2])


@pytest.fixture(scope="session")
def tokens(model, pictures):
    """{name: [11, 17, 24]} by the model itself, without any of our files."""
    found = model.vision.features(model.preprocess(pictures[0]), layers=(1, 3))
    return {"layer_01": np.asarray(found[1]), "layer_03": np.asarray(found[3])}


@pytest.fixture
def folder(tmp_path, pictures):
    """The pictures in a folder of their class each, the fifth cut short."""
    for i, (image, label) in enumerate(zip(*pictures, strict=True)):
        path = tmp_path / "photos" / NAMES[label].replace(" ", "_") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    broken = sorted((tmp_path / "photos").rglob("*.png"))[4]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    return tmp_path / "photos", broken, whole


@pytest.mark.parametrize("format", features.FORMATS)
def test_tokens_of_two_layers_come_back_as_the_model_gives_them(model, dataset, pictures, tokens, tmp_path, format):
    found = extract(model, dataset, tmp_path, what="tokens", format=format)
    assert found.names == ("layer_01", "layer_03") and len(found) == 11
    assert sorted(path.name for path in tmp_path.glob(f"*.{format}")) == [
        f"features-0000{i}-of-00003.{format}" for i in range(3)
    ]
    for name in found.names:
        values = found.array(name)
        assert values.shape == (11, 17, 24) and values.dtype == np.float32
        np.testing.assert_allclose(values, tokens[name], rtol=1e-5, atol=1e-5)
    assert [len(part["layer_01"]) for part in found.shards()] == [3, 4, 4]
    np.testing.assert_array_equal(found.labels(), pictures[1])
    assert found.labels("cls")[1] == "green bars" and found.captions()[4] == ("green bars 4",)
    assert found.keys[10].endswith("10.png") and [line["row"] for line in found.lines] == list(range(11))


def test_pooled_is_the_mean_of_the_patch_tokens_and_class_the_first_token(model, dataset, tokens, tmp_path):
    pooled = extract(model, dataset, tmp_path / "pooled")
    first = extract(model, dataset, tmp_path / "class", what="class")
    for name, values in tokens.items():
        np.testing.assert_allclose(pooled.array(name), values[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(first.array(name), values[:, 0], rtol=1e-5, atol=1e-5)


def test_an_embedding_is_what_encode_image_gives(model, dataset, pictures, tmp_path):
    found = extract(model, dataset, tmp_path, what="embedding", layers=None, shards=1)
    want = model.encode_image(model.preprocess(pictures[0]))
    np.testing.assert_allclose(found.array(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "off"), [("float16", 2e-3), ("bfloat16", 1e-2)])
def test_smaller_types_are_those_of_the_file_and_convert_when_read(model, dataset, tokens, tmp_path, dtype, off):
    found = extract(model, dataset, tmp_path, dtype=dtype)
    assert found.array("layer_03").dtype == features.DTYPES[dtype]
    wide = found.array("layer_03", "float32")
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide, tokens["layer_03"][:, 1:].mean(1), rtol=off, atol=off)


def test_one_safetensors_file_is_mapped_and_not_read(model, dataset, tmp_path):
    found = extract(model, dataset, tmp_path, shards=1)
    base = found.array("layer_01")
    while isinstance(base, np.ndarray) and base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_layers_named_twice_or_from_the_end_are_written_once(model, tower, dataset, tmp_path):
    assert extract(model, dataset, tmp_path / "a", layers=(-1, 3)).names == ("layer_03",)
    assert extract(tower, dataset, tmp_path / "b", layers="all").names == ("layer_00", "layer_01", "layer_02")


def test_parts_on_a_mesh_of_eight_devices_make_the_files_of_one_device(model, dataset, tmp_path):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    graphdef, params = split(model)
    cut = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(model, mesh)))
    cut.preprocess = model.preprocess
    one = extract(model, dataset, tmp_path / "one")
    first = extraction(cut, dataset, tmp_path / "two", part=(0, 2))
    assert first.pending == [0, 2] and not first.run()["complete"]
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing\. Run the command again"):
        features.open(tmp_path / "two")
    two = extract(cut, dataset, tmp_path / "two", part=(1, 2))
    for name in one.names:
        np.testing.assert_allclose(two.array(name), one.array(name), rtol=1e-5, atol=1e-5)
    assert two.lines == one.lines


def test_an_image_that_cannot_be_read_stops_the_run_and_what_was_finished_is_kept(model, folder, tmp_path):
    photos, broken, whole = folder
    data, out = {"name": "folder", "path": str(photos)}, tmp_path / "out"
    with pytest.raises(ValueError, match=rf"1 images cannot be used and max_bad is 0: .*{broken.name}.* raise max_bad"):
        extraction(model, data, out).run()
    assert [path.name for path in out.glob("*.safetensors")] == ["features-00000-of-00003.safetensors"]
    finished = out / "features-00000-of-00003.safetensors"
    before = finished.stat().st_mtime_ns
    (out / "features-00001-of-00003.safetensors.0a1b2c3d.partial").write_bytes(b"of a run that was killed")
    broken.write_bytes(whole)
    again = extraction(model, data, out)
    assert again.pending == [1, 2] and again.waiting == 8 and again.size == 8 * 2 * 24 * 4
    assert again.run()["bad"] == [] and finished.stat().st_mtime_ns == before
    assert len(features.open(out)) == 11 and not list(out.glob("*.partial"))
    assert extraction(model, data, out).pending == []


def test_images_left_out_are_told_in_the_manifest_and_have_no_row(model, folder, pictures, tmp_path):
    photos, broken, _ = folder
    found = extract(model, {"name": "folder", "path": str(photos)}, tmp_path / "out", max_bad=1)
    (bad,) = found.manifest["bad"]
    assert bad["row"] == 4 and bad["key"] == str(broken) and "cannot be decoded" in bad["bad"]
    assert found.manifest["rows"] == len(found) == 10
    assert [line["row"] for line in found.lines] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    order = [int(pathlib.Path(key).stem) for key in found.keys]
    kept = model.vision.features(model.preprocess([pictures[0][i] for i in order]), class_token=False)[-1].mean(1)
    np.testing.assert_allclose(found.array("layer_03"), kept, rtol=1e-5, atol=1e-5)
    assert extraction(model, {"name": "folder", "path": str(photos)}, tmp_path / "out").bad.keys() == {4}


@pytest.mark.parametrize("format", features.FORMATS)
def test_a_shard_without_a_good_image_has_no_row(model, tmp_path, format):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"no picture")
    PIL.Image.new("RGB", (5, 5)).save(tmp_path / "photos" / "c.png")
    data = {"name": "folder", "path": str(tmp_path / "photos")}
    found = extract(model, data, tmp_path / "out", max_bad=2, format=format)
    assert len(found) == 1 and [len(part["layer_03"]) for part in found.shards()] == [0, 0, 1]


def test_another_request_into_the_same_folder_is_refused_with_what_differs(model, dataset, tmp_path):
    extraction(model, dataset, tmp_path)
    with pytest.raises(ValueError, match=r"dtype is 'float32' there and 'float16' here\. Choose an empty folder"):
        extraction(model, dataset, tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="begun with 3 shards, not 2"):
        extraction(model, dataset, tmp_path, shards=2)
    graphdef, params = split(model)
    params["vision"]["position"] = params["vision"]["position"].at[16, 23].add(1e-6)
    other = nnx.merge(graphdef, params)
    other.preprocess = model.preprocess
    with pytest.raises(ValueError, match="other features: weights is "):
        extraction(other, dataset, tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no manifest\.json; choose an empty folder"):
        extraction(model, dataset, tmp_path)


def test_values_beyond_float16_are_refused_rather_than_written_as_infinity(model, dataset, tmp_path):
    graphdef, params = split(model)
    params["vision"]["blocks"]["mlp"]["down"]["bias"] = params["vision"]["blocks"]["mlp"]["down"]["bias"] + 1e5
    loud = nnx.merge(graphdef, params)
    loud.preprocess = model.preprocess
    with pytest.raises(
        ValueError, match=r"layer_01 of .*00\.png is not finite in float16; ask for bfloat16 or float32"
    ):
        extraction(loud, dataset, tmp_path, dtype="float16").run()
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_cannot_be_is_refused_before_an_image_is_read(model, tower, dataset, tmp_path):
    for subject, arguments, fault in (
        (model, {"what": "colour"}, "what='colour' is unknown; choose one of pooled"),
        (model, {"dtype": "int8"}, "dtype='int8' is unknown"),
        (model, {"format": "npz", "dtype": "bfloat16"}, "know no bfloat16"),
        (model, {"what": "embedding"}, "an embedding is of no layer"),
        (model, {"layers": (4,)}, "layer 4 does not exist; this tower has blocks 1 to 3"),
        (tower, {"what": "embedding", "layers": None}, "tokens and no embedding"),
        (tower, {"what": "class"}, "no class token"),
        (model, {"image_size": 18}, "multiples of the patch size 4"),
        (model, {"part": (2, 2)}, "part 2 of 2 does not exist"),
        (model, {"batch_size": 0}, "batch_size=0 is too low"),
        (model, {"max_bad": -1}, "max_bad=-1 is too low"),
    ):
        with pytest.raises(ValueError, match=fault):
            extraction(subject, dataset, tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"GB are to be written and .* GB free; take fewer layers"):
        extraction(model, {"name": "synthetic", "records": 10**12}, tmp_path / "large")


@pytest.mark.parametrize("format", features.FORMATS)
def test_a_file_cut_short_is_named_with_what_to_do(model, dataset, tmp_path, format):
    found = extract(model, dataset, tmp_path, format=format)
    path = tmp_path / f"features-00001-of-00003.{format}"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"features-00001-of-00003\."):
        found.array("layer_01")


def test_a_folder_that_is_none_of_ours_or_of_a_newer_version_is_refused(model, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json; give a folder that `pe-jax features` wrote"):
        features.open(tmp_path)
    found = extract(model, dataset, tmp_path)
    with pytest.raises(ValueError, match="has no array 'layer_02'; it has layer_01, layer_03"):
        found.array("layer_02")
    with pytest.raises(ValueError, match="has no weight; its fields are label, cls, caption"):
        found.labels("weight")
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match="has version 2, this pe_jax reads up to 1"):
        features.open(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no manifest of features"):
        features.open(tmp_path)


def test_an_array_record_shard_is_a_source_of_records(model, dataset, tokens, tmp_path):
    extract(model, dataset, tmp_path, what="tokens", format="array_record")
    record = sources.create(sources.guess(str(tmp_path)))[5]
    dtype, shape = record["arrays"]["layer_03"]
    values = np.frombuffer(record["layer_03"], dtype).reshape(shape)
    np.testing.assert_allclose(values, tokens["layer_03"][5], rtol=1e-5, atol=1e-5)
    assert record["fields"]["caption"] == "blue bars 5"


def test_scikit_learn_takes_the_features_as_they_are(model, dataset, pictures, tmp_path):
    found = extract(model, dataset, tmp_path)
    x, y = found.array("layer_03"), found.labels("cls")
    probe = LogisticRegression(C=100, max_iter=1000).fit(x, y)
    assert probe.score(x, y) == 1.0 and list(probe.classes_) == sorted(NAMES)
    shuffled = np.random.default_rng(1).permutation(y)
    assert (probe.predict(x) == shuffled).mean() < 0.8


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model"
    metadata = {"architecture": zoo.to_dict(zoo.architecture(ARCH)), "preprocess": model.preprocess.to_dict()}
    checkpoint.save_weights(path, split(model)[1], metadata)
    return str(path)


def test_the_command_states_the_size_and_reports_what_was_left_out(weights, folder, tmp_path, capsys):
    arguments = ["features", "--model", weights, str(folder[0]), "--layers=-1,1", "--save-dtype", "float16"]
    arguments += ["--out", str(tmp_path / "out"), "--limit=9", "--shards=2", "--max-bad=1", "--batch-size=8"]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "9 images, each layer_01 [24] float16, layer_03 [24] float16: 864 B in 2 shards." in err
    assert f"left out: {folder[1]} cannot be decoded" in err
    report = json.loads(out)
    assert report["complete"] and report["left_out"] == 1 and report["bad"][0]["row"] == 4
    assert features.open(tmp_path / "out").array("layer_01").shape == (8, 24)
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "For this process 0 shards are left, 0 B." in err
    assert out == f"8 rows of layer_01, layer_03 in {tmp_path / 'out'}\n"
    for wrong, fault in (
        (["--layers", "8,x"], "--layers 8,x: want numbers like 8,-1"),
        (["--part", "4"], "--part 4: want I/N, such as 0/4 to 3/4"),
        (["--what", "all"], "what='all' is unknown"),
    ):
        assert cli.main([*arguments, *wrong]) == 2
        assert fault in capsys.readouterr().err


def test_the_time_left_is_what_the_rate_so_far_says():
    assert command.eta(1280, 50_000, 20.0) == "1,280 of 50,000 images, 64.0 a second, 12:41 left"
    assert command.eta(1, 10_000, 1.0) == "1 of 10,000 images, 1.0 a second, 2:46:39 left"


WORKER = """
import sys, jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from pe_jax import cli
sys.exit(cli.main(sys.argv[3:]))
"""


def test_two_processes_write_shards_of_their_own_into_one_folder(weights, dataset, tokens, tmp_path):
    arguments = ["features", "--model", weights, dataset["path"], "--layers", "1,3", "--what", "tokens"]
    arguments += ["--out", str(tmp_path), "--shards", "5", "--batch-size", "4"]

    def start(port, number):
        words = [sys.executable, "-c", WORKER, str(port), str(number), *arguments]
        variables = {**os.environ, "XLA_FLAGS": quick.flags(devices=2)}
        return subprocess.Popen(words, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)

    told = two_processes.finish(start)
    assert "For this process 3 shards are left" in told[0] and "For this process 2 shards are left" in told[1]
    found = features.open(tmp_path)
    for name, values in tokens.items():
        np.testing.assert_allclose(found.array(name), values, rtol=1e-5, atol=1e-5)

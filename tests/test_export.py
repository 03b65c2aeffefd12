"""Exported functions: equal to the model, for any batch and platform, and readable where the model's code is not."""

import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pe_jax import checkpoint, cli, export, sharding
from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from pe_jax.types import split
from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
VISION = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 3, "heads": 1, "mlp_width": 20, "class_token": True}
ARCH = {
    "vision": VISION | {"pool": "attention", "pool_heads": 1, "output_width": 10},
    "text": {"context_length": 14, "width": 16, "depth": 1, "heads": 2, "mlp_width": 18, "output_width": 10},
}
TOWER = VISION | {"pool": "none", "norm_post": False, "output_width": None, "depth": 1}
PREPROCESS = Preprocess((8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def built(arch):
    graphdef, params = split(zoo.abstract(arch))
    random = np.random.default_rng(2)  # NumPy's, which nothing has to compile
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), params))


@pytest.fixture(scope="module")
def model():
    model = built(ARCH)
    model.preprocess = PREPROCESS
    return model


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def image(model, tmp_path_factory):
    """The exported image tower, its metadata, and where it lies."""
    path = tmp_path_factory.mktemp("image") / "image.stablehlo"
    return path, export.save(model, path, name="mine")


def close(got, want):
    assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= 1e-6 * np.abs(np.asarray(want)).max()


def test_images_of_any_number_get_the_models_embeddings(model, image, pixels):
    loaded = export.load(image[0])
    for count in (5, 2):
        close(loaded(pixels[:count]), model.encode_image(PREPROCESS.normalize(pixels[:count])))
    assert loaded.preprocess == PREPROCESS and loaded.tokenize is None


def test_texts_get_the_models_embeddings(model, tmp_path):
    export.save(model, tmp_path / "text", "text", platforms=("cpu",))
    loaded = export.load(tmp_path / "text")
    ids = loaded.tokenize(["a cat", "two dogs on a red sofa", "a"])
    assert ids.shape == (3, 14) and loaded.preprocess is None
    close(loaded(ids), model.encode_text(ids))


def test_features_carry_no_block_after_the_last_layer_and_may_have_their_weights_beside(model, pixels, tmp_path):
    mesh = sharding.make_mesh({"data": 8})
    graphdef, params = split(model)
    spread = nnx.merge(graphdef, jax.device_put(params, sharding.replicated(mesh)))
    spread.preprocess = PREPROCESS
    arguments = {"layers": (-2, 0), "batch": 2, "platforms": ("cpu",), "floats": True, "beside": True}
    metadata = export.save(spread, tmp_path / "features", "features", **arguments)
    images = PREPROCESS.normalize(pixels[:2])
    found, want = export.load(tmp_path / "features")(images), model.vision.features(images, layers=(0, 2))
    assert list(found) == ["layer_00", "layer_02"] and metadata["layers"] == [0, 2]
    for layer in (0, 2):
        close(found[f"layer_{layer:02}"], want[layer])
    kept = zoo.count(params["vision"]["blocks"]) * 2 // 3
    kept += sum(zoo.count(params["vision"][name]) for name in ("patch", "class_token", "position", "norm_pre"))
    assert metadata["weights_bytes"] == 4 * kept
    assert metadata["input"] == {"shape": [2, 8, 12, 3], "dtype": "float32"}
    assert metadata["outputs"]["layer_02"] == {"shape": [2, 7, 12], "dtype": "float32"}
    other = export.save(model, tmp_path / "other", "features", **arguments | {"layers": (1,)})
    assert other["weights_bytes"] < metadata["weights_bytes"]
    (tmp_path / "features.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.safetensors does not exist"):
        export.load(tmp_path / "features")


def test_the_metadata_tell_what_a_user_of_the_file_must_know(image):
    path, metadata = image
    data = path.read_bytes()
    assert metadata == json.loads(pathlib.Path(f"{path}.json").read_text())
    assert metadata["model"] == "mine" and Preprocess.from_dict(metadata["preprocess"]) == PREPROCESS
    assert metadata["input"] == {"shape": [None, 8, 12, 3], "dtype": "uint8"}
    assert metadata["outputs"] == {"embedding": {"shape": [None, 10], "dtype": "float32"}}
    assert metadata["platforms"] == ["cpu", "cuda", "tpu"]
    assert metadata["sha256"] == hashlib.sha256(data).hexdigest() and metadata["bytes"] == len(data)
    assert metadata["versions"]["jax"] == jax.__version__
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert metadata["calling_convention_version"] == exported.calling_convention_version
    flatbuffer = importlib.import_module("jax._src.export.serialization_generated")
    assert metadata["serialization_version"] == flatbuffer.Exported.GetRootAs(data).SerializationVersion()
    assert metadata["stablehlo_version"].count(".") == 2


ALONE = """
import sys, json, numpy as np, jax, jax.export
pixels, want = (np.load(f"{sys.argv[2]}/{name}.npy") for name in ("pixels", "want"))
with open(sys.argv[1], "rb") as file:
    got = jax.export.deserialize(bytearray(file.read())).call(pixels)
assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
assert not any(name.split(".")[0] in ("pe_jax", "flax") for name in sys.modules)
from pe_jax import export
got = export.load(sys.argv[1])(pixels[:1])
assert np.abs(got - want[:1]).max() <= 1e-6 * np.abs(want).max()
assert not any(name.startswith(("pe_jax.models", "flax")) for name in sys.modules)
"""


def test_a_fresh_process_runs_the_file_with_jax_alone_and_with_pe_jax_without_its_models(
    model, image, pixels, tmp_path
):
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "want.npy", model.encode_image(PREPROCESS.normalize(pixels)))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(image[0]), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": quick.flags()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_inputs_that_do_not_fit_are_refused_with_what_would(image, pixels, monkeypatch):
    loaded = export.load(image[0])
    for wrong, told in (
        (pixels.astype(np.float32), r"the input is float32 \[5, 8, 12, 3\]; want uint8 \['any', 8, 12, 3\]"),
        (pixels[:, :4], r"the input is uint8 \[5, 4, 12, 3\]"),
        (pixels[0], r"the input is uint8 \[8, 12, 3\]"),
        (pixels[:0], r"the input is uint8 \[0, 8, 12, 3\]"),
    ):
        with pytest.raises(ValueError, match=told):
            loaded(wrong)
    loaded.metadata["platforms"] = ["cuda", "tpu"]
    with pytest.raises(ValueError, match="this file is for cuda, tpu and this machine computes on cpu"):
        loaded(pixels)


def test_a_file_that_is_damaged_or_of_another_version_is_refused(image, tmp_path):
    data, metadata = image[0].read_bytes(), image[1]

    def load(data=data, **changes):
        (tmp_path / "x").write_bytes(data)
        (tmp_path / "x.json").write_text(json.dumps(metadata | changes))
        return export.load(tmp_path / "x")

    noise = bytes(4096)
    for arguments, told in (
        ({"data": data[:-1]}, "is not the file that x.json describes .*: it is damaged, or of another export"),
        ({"data": data[:-1] + b"?"}, "is not the file that x.json describes"),
        ({"data": noise, "bytes": 4096, "sha256": hashlib.sha256(noise).hexdigest()}, "cannot be read by jax"),
        ({"calling_convention_version": 999}, "calling convention 999, and jax .* reads .*: install that, or export"),
        ({"version": 2}, "has version 2, this pe_jax reads up to 1"),
        ({"version": "one"}, "is not the JSON of an export"),
    ):
        with pytest.raises(ValueError, match=told):
            load(**arguments)
    (tmp_path / "x.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.json does not exist; an export is NAME and NAME\.json"):
        export.load(tmp_path / "x")


def test_what_cannot_be_exported_is_refused_with_what_can(model, tmp_path, monkeypatch):
    tower = zoo.abstract(TOWER)
    for subject, what, arguments, told in (
        (model, "video", {}, "what='video' is unknown; choose one of image, text, features"),
        (model, "image", {"layers": (1,)}, 'layers are of what="features"'),
        (model, "text", {"floats": True}, "text has neither"),
        (model, "image", {"batch": 0}, "batch=0 must be at least 1"),
        (model, "image", {"platforms": ("cpu", "gpu")}, "must be some of cpu, cuda, rocm, tpu"),
        (model, "features", {"layers": (4,)}, "layer 4 does not exist"),
        (model, "image", {"image_size": 10}, "multiples of the patch size 4"),
        (tower, "text", {}, "has a vision tower only"),
        (tower, "image", {}, 'no embedding .*; export what="features"'),
    ):
        with pytest.raises(ValueError, match=told):
            export.save(subject, tmp_path / "x", what, **arguments)
    monkeypatch.setattr(export, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"the weights are .* GB and such a file holds .*--weights-beside"):
        export.save(model, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pe-jax\[export\]'"):
        export.load(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_command_reads_back_what_it_wrote_and_says_how_far_it_is_from_the_model(tmp_path, capsys):
    config = zoo.to_dict(zoo.architecture(TOWER))
    metadata = {"architecture": config, "preprocess": Preprocess(8).to_dict()}
    checkpoint.save_weights(tmp_path / "w", split(built(TOWER))[1], metadata)
    arguments = ["export", "--model", str(tmp_path / "w"), "--what", "features", "--out", str(tmp_path / "x")]
    assert cli.main([*arguments, "--batch", "3", "--platforms", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["difference"] < 1e-6 and report["layers"] == [1] and report["batch"] == 3
    assert cli.main([*arguments, "--platforms", "tpu"]) == 0
    out = capsys.readouterr().out
    assert "uint8 ['any', 8, 8, 3] → layer_01" in out and "Not compared with the model" in out
    for wrong, told in ((["--batch", "x"], 'want a number, or "any"'), (["--layers", "x"], "want numbers like 8,-1")):
        assert cli.main([*arguments, *wrong]) == 2
        assert told in capsys.readouterr().err

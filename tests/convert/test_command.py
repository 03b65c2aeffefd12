"""`pe-jax convert`, run as a user runs it."""

import json

import numpy as np
import pytest

from pe_jax import checkpoint, cli
from pe_jax.convert import pe, weights
from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from tests.convert import shrunken

RECORD = Preprocess(size=48, mode="crop", filter="bicubic").to_dict()


@pytest.fixture
def config():
    return shrunken.config("PE-Core-B16-224")


@pytest.fixture
def source(tmp_path, config):
    """Orbax weights with an unusual preprocess record."""
    metadata = {"architecture": zoo.to_dict(config), "preprocess": RECORD, "step": 7}
    checkpoint.save_weights(tmp_path / "orbax", shrunken.params(config), metadata)
    return tmp_path / "orbax"


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("layout", ["meta", "open_clip"])
def test_orbax_to_a_file_and_back_is_byte_exact_and_keeps_the_record(tmp_path, config, source, layout, suffix, capsys):
    file, back = tmp_path / f"x{suffix}", tmp_path / "back"
    assert convert(source, file, "--to", layout) == 0
    assert convert(file, back, "--to", "orbax") == 0  # the architecture is read from the file's metadata
    params, metadata = checkpoint.load_weights(back)
    shrunken.assert_same(shrunken.params(config), params)
    assert metadata["preprocess"] == RECORD and metadata["step"] == 7
    assert zoo.architecture(metadata["architecture"]) == config
    printed = capsys.readouterr().out
    assert f"Verified: {file} read back" in printed and "bytes equal." in printed
    assert "filter bicubic" in printed


def test_a_clip_to_timm_leaves_the_text_out_says_so_and_comes_back_as_a_tower(tmp_path, config, source, capsys):
    assert convert(source, tmp_path / "x.pt", "--to", "timm") == 0
    assert "Left out, as timm has no place for them: text tower and logit scale." in capsys.readouterr().out
    assert convert(tmp_path / "x.pt", tmp_path / "back", "--to", "orbax") == 0
    params, metadata = checkpoint.load_weights(tmp_path / "back")
    shrunken.assert_same(shrunken.params(config)["vision"], params)
    assert zoo.architecture(metadata["architecture"]) == config.vision


def test_json_tells_parts_totals_and_where_the_librarys_preset_disagrees(tmp_path, config, source, capsys):
    assert convert(source, tmp_path / "x.safetensors", "--to", "open_clip", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    tensors = weights.read(tmp_path / "x.safetensors")
    assert report["verified"] and report["from"] == "orbax"
    assert report["total"]["tensors"] == len(tensors) == sum(part["tensors"] for part in report["parts"].values())
    assert report["total"]["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert report["total"]["bytes"] == 4 * report["total"]["parameters"]
    assert {(row["library"], row["field"], row["theirs"]) for row in report["preset_differences"]} == {
        ("open_clip", "mode", "squash"),
        ("open_clip", "filter", "bilinear"),
    }


def test_timms_preset_is_told_to_disagree_with_pes_own_preprocessing(tmp_path, capsys):
    config = shrunken.config("PE-Spatial-S16-512")
    metadata = {"architecture": zoo.to_dict(config)}
    weights.write(tmp_path / "x.pt", pe.from_params(shrunken.params(config), config, "meta"), metadata)
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "timm") == 0
    printed = capsys.readouterr().out
    assert "timm's preset disagrees: mode is 'crop' there, 'squash' here." in printed
    assert "timm's preset disagrees: filter is 'bicubic' there, 'bilinear' here." in printed
    assert convert(tmp_path / "y.pt", tmp_path / "z.pt", "--to", "meta") == 0
    assert "timm's preset disagrees" in capsys.readouterr().out
    assert (tmp_path / "z.pt").read_bytes() != b""
    written, back = weights.read(tmp_path / "x.pt"), weights.read(tmp_path / "z.pt")
    assert all(written[name].tobytes() == back[name].tobytes() for name in written.keys() | back.keys())


def test_a_file_without_metadata_that_is_no_released_model_asks_for_the_model(tmp_path, config, capsys):
    weights.write(tmp_path / "x.pt", pe.from_params(shrunken.params(config), config, "meta"))
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "meta") == 2
    assert "--model NAME" in capsys.readouterr().err
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "meta", "--model", "PE-Core-B16-22") == 2
    assert "did you mean PE-Core-B16-224" in capsys.readouterr().err
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "meta", "--model", "PE-Core-B16-224") == 2
    assert "mis-shaped: visual.conv1.weight" in capsys.readouterr().err
    assert not (tmp_path / "y.pt").exists()


def test_a_released_model_without_metadata_is_known_by_its_shapes(tmp_path, capsys):
    """At full size, but the smallest: the spatial T, 23 MB."""
    config = zoo.architecture("PE-Spatial-T16-512")
    tensors = {name: shrunken.draw(name, shape) for name, shape in pe.shapes(config, "timm").items()}
    weights.write(tmp_path / "x.pt", tensors)
    assert convert(tmp_path / "x.pt", tmp_path / "y.safetensors", "--to", "meta", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "PE-Spatial-T16-512" and report["total"]["parameters"] == 5_683_200
    assert report["preprocess"]["size"] == [512, 512]
    metadata = weights.read_metadata(tmp_path / "y.safetensors")
    assert zoo.architecture(metadata["architecture"]) == config


def test_a_position_embedding_is_resampled_only_when_asked(tmp_path, config, capsys):
    """A released file is told from its neighbour by --model; here L's two spatial grids stand for it."""
    stored = zoo.architecture({"base": "PE-Spatial-T16-512", "image_size": 256, "depth": 12})
    tensors = {name: shrunken.draw(name, shape) for name, shape in pe.shapes(stored, "meta").items()}
    record = Preprocess(size=256).to_dict()
    weights.write(tmp_path / "x.pt", tensors, {"architecture": zoo.to_dict(stored), "preprocess": record})
    arguments = (tmp_path / "x.pt", tmp_path / "y.pt", "--to", "meta", "--model", "PE-Spatial-T16-512")
    assert convert(*arguments) == 2
    assert "16x16 grid, the architecture has 32x32" in capsys.readouterr().err
    assert convert(*arguments, "--resample-position") == 0
    assert weights.read(tmp_path / "y.pt")["positional_embedding"].shape == (1025, 192)
    assert weights.read_metadata(tmp_path / "y.pt")["preprocess"]["size"] == [512, 512]
    # and the same from Orbax
    assert convert(tmp_path / "x.pt", tmp_path / "orbax", "--to", "orbax") == 0
    arguments = (tmp_path / "orbax", tmp_path / "z.pt", *arguments[2:])
    assert convert(*arguments) == 2
    assert convert(*arguments, "--resample-position") == 0
    one, other = weights.read(tmp_path / "y.pt"), weights.read(tmp_path / "z.pt")
    assert all(one[name].tobytes() == other[name].tobytes() for name in one.keys() | other.keys())


def test_half_weights_stay_half_from_orbax_and_become_float32_from_a_file(tmp_path, config):
    params = shrunken.params(config)
    params["text"]["projection"] = params["text"]["projection"].astype(np.float16)
    checkpoint.save_weights(tmp_path / "orbax", params, {"architecture": zoo.to_dict(config)})
    assert convert(tmp_path / "orbax", tmp_path / "x.pt", "--to", "meta") == 0
    assert weights.read(tmp_path / "x.pt")["text_projection"].dtype == np.float16
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "meta") == 0
    assert weights.read(tmp_path / "y.pt")["text_projection"].dtype == np.float32


@pytest.mark.parametrize(
    ("destination", "to", "message"),
    [
        ("x.bin", "meta", "the suffix must be one of .pt, .pth, .safetensors"),
        ("x", "timm", "the suffix must be one of"),
        ("x.pt", "orbax", "--to orbax writes a directory; drop the suffix .pt"),
        ("orbax", "orbax", "exists; choose another name"),
    ],
)
def test_a_destination_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path, source, destination, to, message, capsys
):
    assert convert(source, tmp_path / destination, "--to", to) == 2
    assert message in capsys.readouterr().err


def test_a_vision_tower_is_not_written_as_open_clip(tmp_path, capsys):
    config = shrunken.config("PE-Lang-G14-448")
    metadata = {"architecture": zoo.to_dict(config)}
    weights.write(tmp_path / "x.pt", pe.from_params(shrunken.params(config), config, "timm"), metadata)
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", "--to", "open_clip") == 2
    assert "open_clip" in capsys.readouterr().err


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert convert(tmp_path / "none.pt", tmp_path / "y.pt", "--to", "meta") == 2
    assert "none.pt is neither a released model's name nor a file" in capsys.readouterr().err


def test_a_train_runs_workdir_converts_from_its_newest_step(tmp_path, config):
    params = shrunken.params(config)
    metadata = {"architecture": zoo.to_dict(config), "preprocess": RECORD}
    with checkpoint.Checkpointer(tmp_path / "run", every_steps=1) as saver:
        for step in (1, 2):
            params["text"]["position"] = params["text"]["position"] + np.float32(1)
            saver.save(step, {"params": params, "opt_state": {"m": np.zeros(3)}}, metadata)
    assert convert(tmp_path / "run", tmp_path / "x.safetensors", "--to", "meta") == 0
    np.testing.assert_array_equal(
        weights.read(tmp_path / "x.safetensors")["positional_embedding"], params["text"]["position"]
    )

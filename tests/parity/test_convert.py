"""Files we write load strictly in Meta's code, timm and open_clip; files they save are read to the same bytes."""

import functools
import pathlib
import types
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from open_clip.model import CustomTextCLIP

from pe_jax.convert import pe, weights
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from tests.convert import shrunken

CORE = tuple(name for name in zoo.NAMES if "Core" in name)
OPEN_CLIP = dict(zip(CORE, ("T-16-384", "S-16-384", "B-16", "L-14-336", "bigG-14-448"), strict=True))
SUFFIXES = [".pt", ".safetensors"]


def metas_module(meta: types.ModuleType, config: zoo.Architecture) -> torch.nn.Module:
    vision = config.vision if isinstance(config, CLIPConfig) else config
    fields: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.depth,
        "heads": vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        "output_dim": vision.output_width,
        "ls_init_value": vision.layer_scale,
        "image_size": vision.image_size,
        "use_cls_token": vision.class_token,
        "use_ln_post": vision.norm_post,
        "pool_type": "attn" if vision.pool == "attention" else "none",
    }
    if isinstance(config, VisionConfig):
        return meta.VisionTransformer(**fields)
    text = config.text
    text_fields = meta.PETextConfig(
        context_length=text.context_length,
        width=text.width,
        heads=text.heads,
        layers=text.depth,
        output_dim=text.output_width,
        mlp_ratio=text.mlp_width / text.width,
        vocab_size=text.vocab_size,
    )
    return meta.CLIP(meta.PEConfig(**fields), text_fields)


def timms_name(name: str) -> str:
    kind, size = name.split("-")[1], name.split("-")[2]
    word = {"T": "tiny", "S": "small", "B": "base", "L": "large", "G": "gigantic"}[size[0]]
    return f"vit_pe_{kind.lower()}_{word}_patch{size[1:]}_{name.split('-')[3]}"


def timms_fields(vision: VisionConfig) -> dict[str, Any]:
    return {
        "embed_dim": vision.width,
        "depth": vision.depth,
        "num_heads": vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        "img_size": vision.image_size,
    }


def open_clips_module(name: str, config: CLIPConfig, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    create = functools.partial(timm.create_model, **timms_fields(config.vision))
    monkeypatch.setattr(timm, "create_model", create)
    fields = open_clip.get_model_config(f"PE-Core-{OPEN_CLIP[name]}")
    text = {
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
        "width": config.text.width,
        "heads": config.text.heads,
        "layers": config.text.depth,
        "mlp_ratio": config.text.mlp_width / config.text.width,
    }
    return CustomTextCLIP(config.text.output_width, fields["vision_cfg"], text)


def load(path: pathlib.Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return safetensors.torch.load_file(path)


def save(state: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def check(module: torch.nn.Module, config: zoo.Architecture, layout: str, path: pathlib.Path) -> None:
    """Ours → file → strict load → their file → ours, the same bytes; and theirs, drawn by them, the same bytes."""
    params = shrunken.params(config)
    metadata = {"architecture": zoo.to_dict(config), "preprocess": {}}
    weights.write(path, pe.from_params(params, config, layout), metadata)
    vision_only = layout == "timm" and isinstance(config, CLIPConfig)
    fitting, wanted = (config.vision, params["vision"]) if vision_only else (config, params)
    theirs = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(load(path), strict=True)
    save(module.state_dict(), path.with_stem("theirs"))
    shrunken.assert_same(pe.to_params(weights.read(path.with_stem("theirs")), fitting), wanted)
    theirs |= {name: torch.zeros_like(tensor) for name, tensor in theirs.items() if name.endswith("head.bias")}
    save(theirs, path.with_stem("drawn"))
    back = pe.from_params(pe.to_params(weights.read(path.with_stem("drawn")), fitting), fitting, layout)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].tobytes() == tensor.contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_our_files_load_strictly_in_metas_code_and_theirs_in_ours(meta, tmp_path, name, suffix):
    config = shrunken.config(name)
    check(metas_module(meta, config), config, "meta", tmp_path / f"ours{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_our_files_load_strictly_in_timm_and_theirs_in_ours(tmp_path, name, suffix):
    config = shrunken.config(name)
    vision = config.vision if isinstance(config, CLIPConfig) else config
    module = timm.create_model(timms_name(name), num_classes=vision.output_width or 0, **timms_fields(vision))
    check(module, config, "timm", tmp_path / f"ours{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", CORE)
def test_our_files_load_strictly_in_open_clip_and_theirs_in_ours(tmp_path, name, suffix, monkeypatch):
    config = shrunken.config(name)
    check(open_clips_module(name, config, monkeypatch), config, "open_clip", tmp_path / f"ours{suffix}")


def test_metas_own_loader_takes_our_file_of_a_clip_and_of_a_tower(meta, tmp_path, capsys):
    config = shrunken.config("PE-Core-B16-224")
    params = shrunken.params(config)
    weights.write(tmp_path / "x.pt", pe.from_params(params, config, "meta"))
    for wanted, key in ((config, "visual.proj"), (config.vision, "proj")):
        module = metas_module(meta, wanted)
        module.load_ckpt(str(tmp_path / "x.pt"))
        printed = capsys.readouterr().out
        assert "Missing keys for loading" in printed and "['" not in printed.split("Unexpected")[0]
        np.testing.assert_array_equal(module.state_dict()[key].numpy(), params["vision"]["projection"])


# ---------------------------------------------------------------------------------------------------------- full sizes


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_full_sizes_have_metas_keys_and_shapes(meta, name):
    with torch.device("meta"):
        kind = meta.CLIP if name in CORE else meta.VisionTransformer
        assert shapes(kind.from_config(name)) == pe.shapes(zoo.architecture(name), "meta")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_full_sizes_have_timms_keys_and_shapes(name):
    config = zoo.architecture(name)
    vision = config.vision if isinstance(config, CLIPConfig) else config
    with torch.device("meta"):
        module = timm.create_model(timms_name(name), num_classes=vision.output_width or 0)
    assert shapes(module) == pe.shapes(config, "timm")


@pytest.mark.parametrize("name", CORE)
def test_full_sizes_have_open_clips_keys_and_shapes(name):
    fields = open_clip.get_model_config(f"PE-Core-{OPEN_CLIP[name]}")
    fields.pop("custom_text")
    with torch.device("meta"):
        module = CustomTextCLIP(**fields)
    assert shapes(module) == pe.shapes(zoo.architecture(name), "open_clip")


# --------------------------------------------------------------------------------------------------------- files alone


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_is_the_same_in_torch(tmp_path, suffix):
    kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    tensors = {kind: (torch.arange(6) % 2).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save(tensors, tmp_path / f"theirs{suffix}")
    read = weights.read(tmp_path / f"theirs{suffix}")
    weights.write(tmp_path / f"ours{suffix}", read, {"anything": 1})
    again = load(tmp_path / f"ours{suffix}")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_torch_maps_our_pt_files_too(tmp_path):
    weights.write(tmp_path / "x.pt", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    mapped = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert mapped["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_resampling_of_position_embeddings_is_torchs():
    table = shrunken.draw("table", (1 + 24 * 24, 6))
    for side in (16, 32, 14):
        grid = torch.from_numpy(table[1:]).reshape(1, 24, 24, 6).permute(0, 3, 1, 2)
        want = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
        got = pe.resample(table, side, class_token=True)
        want = want.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
        # torch finds the source coordinates in float32, ours in float64: 24/14 leaves 5e-6
        np.testing.assert_allclose(got[1:], want, rtol=0, atol=1e-5)


def test_the_presets_on_record_are_what_the_libraries_announce():
    for name in zoo.NAMES:
        announced = timm.get_pretrained_cfg(timms_name(name))
        assert announced.interpolation == pe.PRESETS["timm"]["filter"] and announced.crop_mode == "center"
        assert list(announced.mean) == pe.PRESETS["timm"]["mean"] and list(announced.std) == pe.PRESETS["timm"]["std"]
    for name in OPEN_CLIP.values():
        announced = open_clip.pretrained.get_pretrained_cfg(f"PE-Core-{name}", "meta")
        ours = pe.PRESETS["open_clip"]
        assert (announced["interpolation"], announced["resize_mode"]) == (ours["filter"], ours["mode"])
        assert list(announced["mean"]) == ours["mean"] and list(announced["std"]) == ours["std"]

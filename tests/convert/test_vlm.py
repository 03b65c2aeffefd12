"""Weight files of vision-language models: both layouts both ways, devices, configurations, and what is refused."""

import dataclasses
import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from pe_jax import checkpoint, cli, sharding
from pe_jax.convert import pe, vlm, weights
from pe_jax.models import zoo
from pe_jax.models.decoder import DecoderConfig, RopeScaling
from pe_jax.models.vision import VisionConfig
from pe_jax.models.vlm import VLMConfig
from pe_jax.types import Params
from tests.convert import shrunken

TOWER = VisionConfig(24, 4, 16, 3, 2, 28, True, "none", None, layer_scale=0.1, norm_post=False)
READER = DecoderConfig(
    vocab_size=32, width=12, depth=2, heads=8, kv_heads=4, head_dim=6, mlp_width=20, context_length=50,
    rope_theta=100.0, rope_scaling=RopeScaling(8.0), tied=True,
)  # fmt: skip
TIED = VLMConfig(TOWER, READER, image_token=30, pooling=2)
PLAIN = VLMConfig(
    dataclasses.replace(TOWER, class_token=False, layer_scale=None),
    dataclasses.replace(READER, tied=False, rope_scaling=None),
    image_token=30,
)
QWEN = dataclasses.replace(
    PLAIN, decoder=dataclasses.replace(PLAIN.decoder, head_dim=2, heads=6, qkv_bias=True, kv_heads=2)
)
CASES = [(TIED, "hf"), (TIED, "meta"), (PLAIN, "hf"), (PLAIN, "meta"), (QWEN, "hf")]


def released(name: str) -> VLMConfig:
    config = zoo.architecture(name)
    assert isinstance(config, VLMConfig)
    return config


def params(config: VLMConfig, dtype: Any = np.float32) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), shrunken.params(config))


def tensors(config: VLMConfig, layout: str) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in vlm.from_params(params(config), config, layout).items()}


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("config", "layout"), CASES)
def test_parameters_go_into_a_layout_and_back_byte_for_byte(config, layout):
    ours = params(config, ml_dtypes.bfloat16)
    there = vlm.from_params(ours, config, layout)
    shrunken.assert_same(vlm.to_params(there, config, dtype=None), ours)


def test_a_tied_model_is_read_with_and_without_its_output_layer():
    there = tensors(TIED, "hf")
    assert "lm_head.weight" not in there
    table = there["model.language_model.embed_tokens.weight"]
    shrunken.assert_same(vlm.to_params(there | {"lm_head.weight": table}, TIED), params(TIED))
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.language_model.embed_tokens.weight.*tied=False"):
        vlm.to_params(there | {"lm_head.weight": table + 1}, TIED)
    meta = tensors(TIED, "meta")
    assert "output.tied_module.weight" in meta
    meta["output.weight"] = meta.pop("output.tied_module.weight")
    shrunken.assert_same(vlm.to_params(meta, TIED), params(TIED))


def test_rotary_frequencies_in_a_file_are_passed_over():
    extra = {"model.language_model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    shrunken.assert_same(vlm.to_params(tensors(TIED, "hf") | extra, TIED), params(TIED))


@pytest.mark.parametrize("shard_bytes", [6_000, 10**9])
@pytest.mark.parametrize("config", [TIED, QWEN], ids=["llama", "qwen"])
def test_a_folder_is_written_in_shards_of_a_size_and_read_with_its_configuration(tmp_path, config, shard_bytes):
    vlm.write(tmp_path, params(config), config, shard_bytes=shard_bytes, dtype=ml_dtypes.bfloat16)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes == 6_000)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found, got = vlm.read(tmp_path, dtype=None)
    assert found == config
    shrunken.assert_same(got, params(config, ml_dtypes.bfloat16))


def test_a_consolidated_file_is_written_and_read_with_its_folder_or_by_its_name(tmp_path):
    vlm.write(tmp_path, params(TIED), TIED, "meta")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["consolidated.pth", "params.json"]
    for path in (tmp_path, tmp_path / "consolidated.pth"):
        shrunken.assert_same(vlm.read(path, TIED)[1], params(TIED))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_tensors_go_straight_to_their_parts_of_a_mesh(layout):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    wanted = sharding.param_shardings(vlm.abstract(PLAIN), mesh)
    got = vlm.to_params(tensors(PLAIN, layout), PLAIN, wanted)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}, want {s}"), got, wanted
    )
    assert got["projector"]["up"]["kernel"].addressable_shards[0].data.shape == (8, 6)
    assert got["vision"]["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 8, 14)
    shrunken.assert_same(got, params(PLAIN))


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("name", zoo.VLMS)
def test_released_configurations_survive_both_files(name):
    config = released(name)
    assert vlm.from_hf_config(json.loads(json.dumps(vlm.to_hf_config(config)))) == config
    assert vlm.from_meta_config(json.loads(json.dumps(vlm.to_meta_config(config)))) == config


def test_a_released_params_json_is_read_as_the_released_architecture():
    """Numbers as PLM's own configurations of its third stage have them."""
    tower = {"image_size": 448, "patch_size": 14, "use_abs_posemb": True, "ls_init_value": 0.1, "drop_path": 0.1,
             "use_ln_post": False, "pool_type": "none", "heads": 16}  # fmt: skip
    large = tower | {"width": 1024, "layers": 23, "use_cls_token": True, "mlp_ratio": 4.0}
    giant = tower | {"width": 1536, "layers": 47, "use_cls_token": False, "mlp_ratio": 5.833333334}
    common = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0, "max_seqlen": 11520,
              "pooling_ratio": 2, "multiple_of": 256}  # fmt: skip
    small = common | {"weight_tying": True, "rope_scale_factor": 32, "high_freq_factor": 4, "vision_model": large}
    for name, model in {
        "PLM-1B": small | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5},
        "PLM-3B": small | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0},
        "PLM-8B": common | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3,
                            "multiple_of": 1024, "vision_model": giant},
    }.items():  # fmt: skip
        want = zoo.architecture({"base": name, "vision": {"drop_path": 0.1}})
        assert vlm.from_meta_config({"model": model, "steps": 21000}) == want


def changed(config: VLMConfig = TIED, **changes) -> dict:
    """The fields of a config.json with some changed; `tower` are those of model_args, `text` of text_config."""
    fields = vlm.to_hf_config(config)
    fields["vision_config"]["model_args"] |= changes.pop("tower", {})
    fields["text_config"] |= changes.pop("text", {})
    return fields | changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava"}, "model_type 'llava'; want 'perception_lm'"),
        ({"text_config": None}, "text_config is missing"),
        ({"anyres": 3}, "anyres=3 is unknown"),
        ({"vision_use_cls_token": False}, "vision_use_cls_token=False, and its tower has class_token=True"),
        ({"image_token_id": 32}, "image_token=32 is not in the vocabulary of 32"),
        ({"projector_pooling_ratio": 4}, "image_size=24 is not a multiple of 16"),
        ({"text": {"hidden_act": "gelu"}}, "hidden_act='gelu', want 'silu'"),
        ({"vision_config": {"architecture": "vit_base_patch16_224"}}, "want one of timm's vit_pe towers"),
        ({"tower": {"qk_norm": True}}, "not built here: qk_norm"),
        ({"tower": {"global_pool": "map"}}, "not built here: global_pool"),
        ({"tower": {"ref_feat_shape": [3, 3]}}, r"not built here: ref_feat_shape.*ref_feat_shape=\[6, 6\]"),
        ({"tower": {"use_post_transformer_norm": True}}, "not built here: use_post_transformer_norm"),
        ({"tower": {"rope_grid_offset": 0.0}}, "not built here: rope_grid_offset"),
        ({"tower": {"img_size": [24, 20]}}, "not built here: img_size"),
    ],
)
def test_a_configuration_of_something_that_is_not_computed_here_is_refused(fields, message):
    assert vlm.from_hf_config(changed()) == TIED
    with pytest.raises(ValueError, match=message):
        vlm.from_hf_config(changed(**fields))


def test_a_tower_that_only_says_what_it_changes_has_the_rest_of_its_named_architecture():
    """As released files say it."""
    fields = changed(released("PLM-8B"))
    fields["vision_config"]["model_args"] = {
        "embed_dim": 1536, "depth": 47, "img_size": [448, 448], "global_pool": "", "use_post_transformer_norm": False,
        "init_values": 0.1, "ref_feat_shape": [32, 32],
    }  # fmt: skip
    fields["vision_config"] |= {"do_pooling": True, "global_pool": "map", "pretrained_cfg": {}, "label_names": []}
    assert vlm.from_hf_config(fields) == zoo.architecture("PLM-8B")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_every_key_that_does_not_fit_is_named_with_its_neighbours():
    there = tensors(PLAIN, "hf")
    up = "model.multi_modal_projector.linear_1.weight"
    there["model.multi_modal_projector.linear_1.kernel"] = there.pop(up)
    there["model.vision_tower.timm_model.pos_embed"] = np.ones((1, 35, 16), np.float32)
    with pytest.raises(ValueError) as caught:
        vlm.to_params(there, PLAIN)
    for line in (
        "read as layout hf): 1 mis-shaped, 1 missing, 1 unexpected",
        f"missing: {up} [12, 16] (nearest in the file: model.multi_modal_projector.linear_1.kernel",
        "model.vision_tower.timm_model.pos_embed is [1, 35, 16], want [1, 36, 16]",
    ):
        assert line in str(caught.value), caught.value


def test_models_that_a_layout_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="projector that is 'linear'"):
        linear = dataclasses.replace(PLAIN, projector="linear")
        vlm.from_params(params(linear), linear, "hf")
    with pytest.raises(ValueError, match='layout="meta" has no biases'):
        vlm.from_params(params(QWEN), QWEN, "meta")
    with pytest.raises(ValueError, match="layout='timm' must be one of hf, meta"):
        vlm.from_params(params(PLAIN), PLAIN, "timm")
    with pytest.raises(ValueError, match="No layout has a tower without rotary positions"):
        flat = dataclasses.replace(PLAIN, vision=dataclasses.replace(PLAIN.vision, rope=False))
        vlm.from_params(params(flat), flat, "hf")
    with pytest.raises(ValueError, match=r"missing: projector.down.bias \[12\]"):
        ours = params(PLAIN)
        del ours["projector"]["down"]["bias"]
        vlm.from_params(ours, PLAIN, "hf")
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json"):
        vlm.read(tmp_path)
    with pytest.raises(ValueError, match="lacks dim, n_layers"):
        vlm.from_meta_config({"model": {"n_heads": 2, "vocab_size": 3, "vision_model": {}}})
    with pytest.raises(ValueError, match="not of integers"):
        stretched = dataclasses.replace(READER, rope_scaling=RopeScaling(2.5))
        vlm.to_meta_config(dataclasses.replace(TIED, decoder=stretched))


# -------------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_pe_jax_convert_takes_the_tower_out_of_a_whole_model(tmp_path, capsys, layout):
    config = dataclasses.replace(TIED, decoder=dataclasses.replace(READER, vocab_size=128_256), image_token=128_002)
    vlm.write(tmp_path / "whole", params(config), config, layout)
    source = tmp_path / "whole" / ("consolidated.pth" if layout == "meta" else "")
    assert cli.main(["convert", str(source), str(tmp_path / "lang.pt"), "--to", "meta"]) == 0
    assert "Verified" in capsys.readouterr().out
    alone, want = vlm.tower(config, params(config))
    assert zoo.architecture(weights.read_metadata(tmp_path / "lang.pt")["architecture"]) == alone
    shrunken.assert_same(pe.to_params(weights.read(tmp_path / "lang.pt"), alone, "meta"), want)


def test_pe_jax_convert_writes_a_trained_model_for_other_programs(tmp_path, capsys):
    checkpoint.save_weights(tmp_path / "run", params(TIED), {"architecture": zoo.to_dict(TIED)})
    for to in ("hf", "plm"):
        assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / to), "--to", to]) == 0
        assert "Verified" in capsys.readouterr().out
        shrunken.assert_same(vlm.read(tmp_path / to, TIED)[1], params(TIED))
    assert vlm.read_config(tmp_path / "hf") == TIED
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "plm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["parameters"] == zoo.count(params(TIED))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["x.pt"], "--to hf writes a directory; drop the suffix .pt"),
        (["run"], "exists; choose another name"),
        (["new"], "has no decoder; --to hf is for vision-language models"),
        (["new", "--model", "PE-Core-L14-336"], "has no decoder; --to hf wants one of PLM-1B"),
    ],
)
def test_pe_jax_convert_refuses_to_make_a_whole_model_of_a_tower(tmp_path, capsys, more, message):
    tower, ours = vlm.tower(TIED, params(TIED))
    checkpoint.save_weights(tmp_path / "run", ours, {"architecture": zoo.to_dict(tower)})
    name, *model = more
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / name), "--to", "hf", *model]) == 2
    assert message in capsys.readouterr().err

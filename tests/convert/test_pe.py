import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from pe_jax.convert import pe, weights
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from tests.convert import shrunken

CORE = tuple(name for name in zoo.NAMES if "Core" in name)
CLIP_LAYOUTS, VISION_LAYOUTS = ("meta", "open_clip"), ("meta", "timm")
# PE §1.3 of the reference notes: (vision tower whole, text tower) parameters
COUNTS = {
    "PE-Core-T16-384": (6_140_544, 63_405_056),
    "PE-Core-S16-384": (23_782_656, 63_405_056),
    "PE-Core-B16-224": (93_672_960, 353_986_560),
    "PE-Core-L14-336": (317_151_232, 353_986_560),
    "PE-Core-G14-448": (1_882_032_640, 537_233_920),
    "PE-Lang-L14-448": (291_415_040, 0),
    "PE-Lang-L14-448-Tiling": (291_415_040, 0),
    "PE-Lang-G14-448": (1_740_922_624, 0),
    "PE-Lang-G14-448-Tiling": (1_740_922_624, 0),
    "PE-Spatial-T16-512": (5_683_200, 0),
    "PE-Spatial-S16-512": (21_983_232, 0),
    "PE-Spatial-B16-512": (86_433_792, 0),
    "PE-Spatial-L14-448": (303_964_160, 0),
    "PE-Spatial-G14-448": (1_851_887_104, 0),
}


def layouts(config: zoo.Architecture) -> tuple[str, ...]:
    return CLIP_LAYOUTS if isinstance(config, CLIPConfig) else VISION_LAYOUTS


def tower(config: zoo.Architecture) -> VisionConfig:
    return config.vision if isinstance(config, CLIPConfig) else config


@pytest.fixture
def core():
    config = shrunken.config("PE-Core-B16-224")
    return config, shrunken.params(config)


@pytest.fixture
def lang():
    config = shrunken.config("PE-Lang-L14-448")
    return config, shrunken.params(config)


# ------------------------------------------------------------------------------------------------- keys and full sizes


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_parameter_of_a_released_model_has_its_place_in_every_layout(name):
    config = zoo.architecture(name)
    vision, text = COUNTS[name]
    sizes = {layout: pe.shapes(config, layout) for layout in layouts(config)}
    scale = 1 if text else 0
    for layout, shapes in sizes.items():
        bias = config.vision.output_width if layout == "open_clip" else 0  # timm's head has one, of zeros
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == vision + text + scale + bias
    bias = tower(config).output_width or 0
    assert sum(int(np.prod(shape)) for shape in pe.shapes(config, "timm").values()) == vision + bias


def test_metas_keys_and_shapes_are_those_of_the_release():
    shapes = pe.shapes(zoo.architecture("PE-Core-L14-336"), "meta")
    block = {name: shape for name, shape in shapes.items() if "resblocks" not in name or "resblocks.7." in name}
    seven, pool = "visual.transformer.resblocks.7", "visual.attn_pool"
    assert {name: shape for name, shape in block.items() if name.startswith("visual.")} == {
        "visual.class_embedding": (1024,),
        "visual.positional_embedding": (577, 1024),
        "visual.proj": (1024, 1024),
        "visual.conv1.weight": (1024, 3, 14, 14),
        **{f"visual.{norm}.{part}": (1024,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
        **{f"{seven}.{norm}.{part}": (1024,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
        **{f"{pool}.layernorm.{part}": (1024,) for part in ("weight", "bias")},
        **{f"{block}.attn.in_proj_weight": (3072, 1024) for block in (seven, pool)},
        **{f"{block}.attn.in_proj_bias": (3072,) for block in (seven, pool)},
        **{f"{block}.attn.out_proj.weight": (1024, 1024) for block in (seven, pool)},
        **{f"{block}.attn.out_proj.bias": (1024,) for block in (seven, pool)},
        **{f"{block}.mlp.c_fc.weight": (4096, 1024) for block in (seven, pool)},
        **{f"{block}.mlp.c_fc.bias": (4096,) for block in (seven, pool)},
        **{f"{block}.mlp.c_proj.weight": (1024, 4096) for block in (seven, pool)},
        **{f"{block}.mlp.c_proj.bias": (1024,) for block in (seven, pool)},
        f"{pool}.probe": (1, 1, 1024),
    }
    assert {name: shape for name, shape in block.items() if "." not in name or name.startswith(("ln", "tok"))} == {
        "positional_embedding": (32, 1024),
        "token_embedding.weight": (49408, 1024),
        "text_projection": (1024, 1024),
        "ln_final.weight": (1024,),
        "ln_final.bias": (1024,),
        "logit_scale": (),
    }
    assert len(shapes) == 24 * 12 * 2 + 8 + 11 + 6


def test_lang_and_spatial_have_no_head_and_layer_scale_where_the_release_has():
    lang, spatial = (pe.shapes(zoo.architecture(f"PE-{kind}-L14-448"), "meta") for kind in ("Lang", "Spatial"))
    for shapes in (lang, spatial):
        assert not [name for name in shapes if name.startswith(("ln_post", "attn_pool", "proj"))]
    assert lang["transformer.resblocks.22.ls_2.gamma"] == (1024,)
    assert not [name for name in spatial if "ls_" in name]


def test_fused_attention_is_queries_keys_values_with_heads_in_a_row(core):
    config, params = core
    kernel = params["vision"]["blocks"]["attention"]["qkv"]["kernel"].reshape(3, 16, 2, 3, 8)  # heads, then q, k, v
    fused = pe.from_params(params, config, "meta")["visual.transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(fused[16 + 8 : 16 + 16], kernel[1, :, 1, 1, :].T)  # second head, keys
    out = pe.from_params(params, config, "meta")["visual.transformer.resblocks.1.attn.out_proj.weight"]
    np.testing.assert_array_equal(out[:, 8:], params["vision"]["blocks"]["attention"]["out"]["kernel"][1, 8:].T)


def test_timm_splits_the_pool_and_turns_the_projection_with_a_bias_of_zeros(core):
    config, params = core
    meta, timm = pe.from_params(params, config, "meta"), pe.from_params(params, config, "timm")
    fused = np.concatenate([timm["attn_pool.q.weight"], timm["attn_pool.kv.weight"]])
    np.testing.assert_array_equal(fused, meta["visual.attn_pool.attn.in_proj_weight"])
    np.testing.assert_array_equal(timm["head.weight"], meta["visual.proj"].T)
    np.testing.assert_array_equal(timm["head.bias"], np.zeros(10, np.float32))
    assert timm["cls_token"].shape == (1, 1, 16) and timm["pos_embed"].shape == (1, 10, 16)


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_round_trips_through_every_layout_and_file_are_byte_exact(tmp_path, name, suffix):
    config = shrunken.config(name)
    params = shrunken.params(config)
    for layout in layouts(config):
        written = pe.from_params(params, config, layout)
        weights.write(tmp_path / f"{layout}{suffix}", written)
        read = weights.read(tmp_path / f"{layout}{suffix}")
        shrunken.assert_same(pe.to_params(read, config), params)
        assert pe.recognise(read, config) == (layout, config)
        back = pe.from_params(pe.to_params(read, config, layout), config, layout)
        assert list(back) == list(written)
        assert all(back[key].tobytes() == written[key].tobytes() for key in written)


@pytest.mark.parametrize("name", CORE)
def test_a_clip_to_timm_and_back_is_its_vision_tower(name):
    config = shrunken.config(name)
    params = shrunken.params(config)
    tensors = pe.from_params(params, config, "timm")
    assert pe.recognise(tensors, config) == ("timm", config.vision)
    shrunken.assert_same(pe.to_params(tensors, config.vision), params["vision"])


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_a_vision_architecture_takes_the_tower_from_a_clips_file(core, layout):
    config, params = core
    read = pe.to_params(pe.from_params(params, config, layout), config.vision)
    shrunken.assert_same(read, params["vision"])


@pytest.mark.parametrize("prefix", ["", "visual.", "module.", "module.visual."])
@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_a_vision_file_is_read_with_or_without_prefixes(lang, layout, prefix):
    config, params = lang
    tensors = {prefix + name: value for name, value in pe.from_params(params, config, layout).items()}
    shrunken.assert_same(pe.to_params(tensors, config), params)


def test_the_two_position_embeddings_are_kept_apart(core):
    config, params = core
    tensors = pe.from_params(params, config, "meta")
    assert tensors["positional_embedding"].shape == (5, 12)
    assert tensors["visual.positional_embedding"].shape == (10, 16)


def test_exported_tensors_are_views_except_the_zeros_and_qkv(core):
    config, params = core
    ours = {id(leaf) for _, leaf in pe.parameters(params)}
    qkv = tuple(f"{name}{kind}" for name in ("in_proj_", "qkv.", ".q.", ".kv.") for kind in ("weight", "bias"))
    for layout in ("meta", "timm", "open_clip"):
        for name, tensor in pe.from_params(params, config, layout).items():
            base = tensor
            while base.base is not None:
                base = base.base
            assert id(base) in ours or name.endswith(("head.bias", *qkv)), name


def test_parameters_read_from_a_file_do_not_hold_on_to_it(tmp_path, lang):
    config, params = lang
    weights.write(tmp_path / "x.pt", pe.from_params(params, config, "meta"))
    for name, leaf in pe.parameters(pe.to_params(weights.read(tmp_path / "x.pt"), config)):
        assert leaf.flags.owndata and leaf.flags.c_contiguous and leaf.flags.writeable, name


# -------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_half_files_become_float32_exactly_or_keep_their_type_when_asked(tmp_path, lang, half):
    config, params = lang
    halved = jax.tree.map(lambda leaf: leaf.astype(half), params)
    weights.write(tmp_path / "half.pt", pe.from_params(halved, config, "meta"))
    read = weights.read(tmp_path / "half.pt")
    shrunken.assert_same(pe.to_params(read, config), jax.tree.map(lambda leaf: leaf.astype(np.float32), halved))
    shrunken.assert_same(pe.to_params(read, config, dtype=None), halved)


def test_blocks_of_several_types_cannot_keep_them_in_one_array(lang):
    config, params = lang
    tensors = pe.from_params(params, config, "meta")
    name = "transformer.resblocks.2.mlp.c_fc.bias"
    tensors[name] = tensors[name].astype(np.float16)
    with pytest.raises(ValueError, match=rf"{name} is float16, the blocks before it float32"):
        pe.to_params(tensors, config, dtype=None)
    assert pe.to_params(tensors, config)["blocks"]["mlp"]["up"]["bias"].dtype == np.float32


# ------------------------------------------------------------------------------------------------------ what is refused


def test_one_error_lists_every_key_that_does_not_fit_with_its_neighbours(core):
    config, params = core
    tensors = pe.from_params(params, config, "meta")
    tensors["visual.ln_pots.bias"] = tensors.pop("visual.ln_post.bias")
    tensors["visual.proj"] = tensors["visual.proj"].T
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].astype(np.int64)
    with pytest.raises(ValueError) as caught:
        pe.to_params(tensors, config)
    message = str(caught.value)
    assert "read as layout meta" in message
    assert "1 missing" in message and "1 unexpected" in message and "1 mis-shaped" in message and "1 refused" in message
    assert "missing: visual.ln_post.bias [16] (nearest in the file: visual.ln_pots.bias)" in message
    assert "unexpected: visual.ln_pots.bias (nearest expected: visual.ln_post.bias" in message
    assert "mis-shaped: visual.proj is [10, 16], want [16, 10]" in message
    assert "refused: visual.conv1.weight is int64; want a floating type" in message


@pytest.mark.parametrize("layout", ["meta", "open_clip"])
def test_each_missing_key_is_named(core, layout):
    config, params = core
    whole = pe.from_params(params, config, layout)
    for name in whole:
        with pytest.raises(ValueError, match=rf"1 missing\.(.|\n)*missing: {name} "):
            pe.to_params({key: value for key, value in whole.items() if key != name}, config)


@pytest.mark.parametrize("key", ["visual.extra", "extra", "visual.transformer.resblocks.3.ln_1.weight", "visual.rope"])
def test_an_unexpected_key_is_refused_also_where_a_tower_is_taken_from_a_clip(core, key):
    config, params = core
    tensors = pe.from_params(params, config, "meta") | {key: np.zeros(3, np.float32)}
    for wanted in (config, config.vision):
        with pytest.raises(ValueError, match=f"unexpected: {key}"):
            pe.to_params(tensors, wanted)


def test_another_models_file_is_refused_with_at_most_thirty_lines_of_a_kind(core, lang):
    tensors = pe.from_params(*reversed(core), "meta")
    with pytest.raises(ValueError, match=r"unexpected: visual\.attn_pool\.probe"):
        pe.to_params(tensors, lang[0])
    with pytest.raises(ValueError, match=r"mis-shaped: and \d+ more"):
        pe.to_params(pe.from_params(*reversed(core), "meta"), zoo.architecture("PE-Core-B16-224"))


def test_a_vision_tower_alone_is_no_clip(core):
    config, params = core
    for layout in VISION_LAYOUTS:
        with pytest.raises(ValueError, match=rf"vision tower alone \(layout {layout}\)"):
            pe.to_params(pe.from_params(params["vision"], config.vision, layout), config)


def test_a_file_of_something_else_names_its_first_keys(core):
    with pytest.raises(ValueError, match=r"No key is one of PE's .* first keys are: layer1\.weight, fc\."):
        pe.to_params({"layer1.weight": np.zeros(3), "fc.": np.zeros(2)}, core[0])
    with pytest.raises(ValueError, match="none at all"):
        pe.to_params({}, core[0])


def test_a_key_with_and_without_module_is_refused(lang):
    config, params = lang
    tensors = pe.from_params(params, config, "meta")
    with pytest.raises(ValueError, match=r"with and without 'module\.': ln_pre\.bias"):
        pe.to_params(tensors | {"module.ln_pre.bias": tensors["ln_pre.bias"]}, config)


def test_a_head_with_a_bias_is_refused(core):
    config, params = core
    tensors = pe.from_params(params, config, "timm")
    tensors["head.bias"] = tensors["head.bias"] + np.float32(1e-3)
    with pytest.raises(ValueError, match=r"head\.bias is not zero"):
        pe.to_params(tensors, config.vision)


def test_an_unknown_layout_and_one_that_cannot_hold_the_model_are_refused(lang):
    config, params = lang
    with pytest.raises(ValueError, match="layout='hf' must be one of auto, meta, timm, open_clip"):
        pe.to_params({}, config, "hf")
    with pytest.raises(ValueError, match='layout="open_clip" holds image-text models'):
        pe.from_params(params, config, "open_clip")


def test_parameters_that_are_not_the_architectures_are_refused(lang):
    config, params = lang
    wrong = {**params, "position": params["position"][1:], "pool": {"probe": np.zeros(3)}}
    del wrong["class_token"]
    with pytest.raises(
        ValueError, match=r"missing: class_token(.|\n)*position is \[9, 16\](.|\n)*unexpected: pool\.probe"
    ):
        pe.from_params(wrong, config, "meta")


# ------------------------------------------------------------------------------------------------- position embeddings


@pytest.mark.parametrize("layout", ["meta", "open_clip", "timm"])
@pytest.mark.parametrize("name", ["PE-Core-B16-224", "PE-Core-G14-448"])  # with and without a class token
def test_a_position_embedding_of_another_grid_is_refused_or_resampled_when_asked(name, layout):
    stored, wanted = shrunken.config(name, grid=4), shrunken.config(name, grid=3)
    params = shrunken.params(stored)
    tensors = pe.from_params(params, stored, layout)
    vision = params["vision"]
    if layout == "timm":
        wanted = wanted.vision
    with pytest.raises(
        ValueError, match=r"1 refused(.|\n)*for a 4x4 grid, the architecture has 3x3: pass resample_pos"
    ):
        pe.to_params(tensors, wanted)
    read = pe.to_params(tensors, wanted, resample_position=True)
    read = read["vision"] if layout != "timm" else read
    first = int(tower(wanted).class_token)
    np.testing.assert_array_equal(read["position"][:first], vision["position"][:first])
    grid = vision["position"][first:].reshape(4, 4, 16)
    resized = jax.image.resize(grid, (3, 3, 16), "bilinear", antialias=False).reshape(9, 16)
    np.testing.assert_allclose(read["position"][first:], resized, rtol=0, atol=1e-6)
    for part in ("norm_pre", "blocks"):
        shrunken.assert_same(read[part], vision[part])


@pytest.mark.parametrize(("old", "new"), [(24, 32), (24, 16), (5, 7), (7, 1), (1, 4), (6, 6)])
def test_resampling_is_the_forward_passs_own(old, new):
    table = shrunken.draw("table", (1 + old * old, 6))
    got = pe.resample(table, new, class_token=True)
    want = jax.image.resize(table[1:].reshape(old, old, 6), (new, new, 6), "bilinear", antialias=False)
    np.testing.assert_allclose(got[1:], np.asarray(want).reshape(new * new, 6), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(got[0], table[0])


def test_resample_position_changes_nothing_where_the_grid_is_the_same(core):
    config, params = core
    shrunken.assert_same(pe.to_params(pe.from_params(params, config, "meta"), config, resample_position=True), params)


# ------------------------------------------------------------------------------------------------------------ identify


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_released_model_is_identified_by_its_shapes_unless_another_has_the_same(name):
    config = zoo.architecture(name)

    def blank(shapes: dict) -> dict[str, np.ndarray]:
        return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}

    if "Lang" in name:
        with pytest.raises(ValueError, match=r"fit PE-Lang-.*-448 and PE-Lang-.*-448-Tiling; say which"):
            pe.identify(blank(pe.shapes(config, "meta")))
        return
    for layout in layouts(config):
        assert pe.identify(blank(pe.shapes(config, layout))) == (name, config)
    assert pe.identify(blank(pe.shapes(config, "timm"))) == (name, tower(config))


def test_other_shapes_are_not_identified(core):
    config, params = core
    with pytest.raises(ValueError, match=r"fit no released model; say which model this is \(--model NAME\)"):
        pe.identify(pe.from_params(params, config, "meta"))


def test_pools_other_than_attention_convert_too(lang):
    config = dataclasses.replace(lang[0], pool="average", norm_post=True, output_width=10)
    params = shrunken.params(config)
    for layout in VISION_LAYOUTS:
        shrunken.assert_same(pe.to_params(pe.from_params(params, config, layout), config), params)

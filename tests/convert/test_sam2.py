"""Weight files of SAM 2.1: both layouts both ways, released shapes, a video model's memory, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from pe_jax.convert import sam2, weights
from pe_jax.models import zoo
from pe_jax.types import split
from tests.convert.shrunken import assert_same
from tests.models.sam2_sizes import PADDED, SIZES, SMALL, params

# Of the released models' image part, and of its encoder.
COUNTS = {
    "SAM-2.1-T": (31_440_977, 27_219_136),
    "SAM-2.1-S": (38_538_833, 34_316_992),
    "SAM-2.1-B+": (73_328_657, 69_106_816),
    "SAM-2.1-L": (216_925_121, 212_703_280),
}
MEMORY = {  # some of each kind, in Meta's names and in Hugging Face's
    "meta": ["maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial", "obj_ptr_tpos_proj.bias",
             "memory_attention.layers.0.linear1.weight", "memory_encoder.fuser.layers.1.gamma", "mask_downsample.bias",
             "obj_ptr_proj.layers.2.weight"],
    "hf": ["memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer",
           "occlusion_spatial_embedding_parameter", "temporal_positional_encoding_projection_layer.weight",
           "memory_attention.layers.0.linear1.weight", "memory_encoder.memory_fuser.layers.0.scale",
           "mask_downsample.weight", "object_pointer_proj.proj_in.bias"],
}  # fmt: skip


def tensors(layout: str, config=PADDED) -> dict[str, np.ndarray]:
    return sam2.from_params(params(config), config, layout)


@pytest.mark.parametrize("layout", sam2.LAYOUTS)
@pytest.mark.parametrize("name", SIZES)
def test_parameters_go_into_a_layout_and_back_byte_for_byte(name, layout):
    config = SIZES[name]
    assert_same(sam2.to_params(tensors(layout, config), config), params(config))


@pytest.mark.parametrize("layout", sam2.LAYOUTS)
def test_half_precision_survives_and_becomes_float32_unless_kept(layout):
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors(layout).items()}
    there = sam2.from_params(sam2.to_params(half, PADDED, dtype=None), PADDED, layout)
    assert_same(there, half)
    assert_same(
        sam2.to_params(half, PADDED), sam2.to_params({n: x.astype(np.float32) for n, x in half.items()}, PADDED)
    )


@pytest.mark.parametrize("name", zoo.SAM2)
def test_parameter_counts_are_those_of_the_released_models(name):
    tree = split(sam2.abstract(zoo.sam2(name)))[1]
    assert (zoo.count(tree), zoo.count(tree["encoder"])) == COUNTS[name]


@pytest.mark.parametrize("layout", sam2.LAYOUTS)
def test_width_and_depth_tell_which_released_model_a_file_holds(layout):
    blank = np.zeros((), np.float32)
    for name in zoo.SAM2:
        config = zoo.sam2(name)
        shapes = {
            n: s for place in sam2._places(config, layout) for n, s in zip(place.names, place.stored, strict=True)
        }
        assert sam2.identify({n: np.broadcast_to(blank, s) for n, s in shapes.items()}) == config
    with pytest.raises(ValueError, match=r"none of SAM-2.1-T, .*give the configuration"):
        sam2.identify(tensors(layout))


@pytest.mark.parametrize("layout", sam2.LAYOUTS)
def test_a_video_models_memory_is_left_out_and_named(layout):
    there = tensors(layout)
    video = there | {name: np.ones(3, np.float32) for name in MEMORY[layout]}
    assert sam2.memory(there) == []
    assert sam2.memory(video) == MEMORY[layout]
    assert_same(sam2.to_params(video, PADDED), params(PADDED))


def test_frequencies_that_a_file_holds_once_or_twice_are_read_and_two_that_differ_are_refused():
    there = tensors("hf")
    first, second = (name for name in there if name.endswith("positional_embedding"))
    assert there[first].tobytes() == there[second].tobytes()
    for name in (first, second):
        assert_same(sam2.to_params({n: x for n, x in there.items() if n != name}, PADDED), params(PADDED))
    with pytest.raises(ValueError, match=f"{first} and {second} differ"):
        sam2.to_params(there | {second: there[second] + 1}, PADDED)


@pytest.mark.parametrize("layout", sam2.LAYOUTS)
def test_what_does_not_fit_is_listed_by_name(layout):
    there = tensors(layout)
    token = next(name for name in there if name.endswith("iou_token.weight"))
    norm = next(name for name in there if "norm1.weight" in name)
    wrong = {name: x for name, x in there.items() if name != token}
    wrong |= {norm: there[norm][:-1], "memory_bank": there[norm], token.replace("iou", "iuo"): there[token]}
    with pytest.raises(ValueError) as error:
        sam2.to_params(wrong, PADDED)
    text = str(error.value)
    assert f"missing: {token} [1, 32] (nearest in the file: {token.replace('iou', 'iuo')}" in text
    assert f"mis-shaped: {norm} is [11], want [12]" in text and "unexpected: memory_bank" in text
    with pytest.raises(ValueError, match="missing: no_memory"):
        sam2.from_params({name: x for name, x in params(PADDED).items() if name != "no_memory"}, PADDED, layout)


def test_a_folder_tells_its_architecture_and_a_pt_file_needs_it(tmp_path):
    sam2.write(tmp_path / "hf", params(PADDED), PADDED)
    config, found = sam2.read(tmp_path / "hf")
    assert config == PADDED
    assert_same(found, params(PADDED))
    sam2.write(tmp_path / "meta.pt", params(PADDED), PADDED)
    assert set(weights.read(tmp_path / "meta.pt")) == set(tensors("meta"))
    assert_same(sam2.read(tmp_path / "meta.pt", PADDED)[1], params(PADDED))
    with pytest.raises(ValueError, match="give the configuration"):
        sam2.read(tmp_path / "meta.pt")


def test_an_architecture_goes_into_a_config_json_and_back():
    for config in [*SIZES.values(), SMALL, *(zoo.sam2(name) for name in zoo.SAM2)]:
        assert sam2.from_hf_config(json.loads(json.dumps(sam2.to_hf_config(config)))) == config


def test_a_config_json_that_is_silent_means_the_librarys_defaults_which_are_the_tiny_model():
    silent = {"model_type": "sam2_video", "vision_config": {"backbone_config": {}}, "memory_attention_num_layers": 4}
    assert sam2.from_hf_config(silent) == zoo.sam2("SAM-2.1-T")


def test_a_config_json_of_another_network_is_refused_and_says_in_what():
    fields = sam2.to_hf_config(PADDED)
    fields["mask_decoder_config"] |= {"num_multimask_outputs": 4, "iou_head_hidden_dim": 16}
    fields["vision_config"]["backbone_config"] |= {"query_stride": [1, 2], "layer_norm_eps": 1e-5}
    with pytest.raises(ValueError) as error:
        sam2.from_hf_config(fields)
    for part in (
        "num_multimask_outputs=4, want 3",
        "iou_head_hidden_dim=16, want 32",
        "query_stride",
        "layer_norm_eps",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="model_type 'sam'; want 'sam2' or 'sam2_video'"):
        sam2.from_hf_config({"model_type": "sam"})

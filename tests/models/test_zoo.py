import json

import jax
import pytest

from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from pe_jax.types import split

# PE's published sizes, from the released configurations: vision tower with its head, text tower with its embedding.
COUNTS = {
    "PE-Core-T16-384": (6_140_544, 63_405_056),
    "PE-Core-S16-384": (23_782_656, 63_405_056),
    "PE-Core-B16-224": (93_672_960, 353_986_560),
    "PE-Core-L14-336": (317_151_232, 353_986_560),
    "PE-Core-G14-448": (1_882_032_640, 537_233_920),
    "PE-Lang-L14-448": (291_415_040, None),
    "PE-Lang-L14-448-Tiling": (291_415_040, None),
    "PE-Lang-G14-448": (1_740_922_624, None),
    "PE-Lang-G14-448-Tiling": (1_740_922_624, None),
    "PE-Spatial-T16-512": (5_683_200, None),
    "PE-Spatial-S16-512": (21_983_232, None),
    "PE-Spatial-B16-512": (86_433_792, None),
    "PE-Spatial-L14-448": (303_964_160, None),
    "PE-Spatial-G14-448": (1_851_887_104, None),
}
TRUNKS = {"T16-384": 5_597_184, "S16-384": 21_811_200, "B16-224": 85_797_888}
TRUNKS |= {"L14-336": 303_505_408, "G14-448": 1_851_733_504}


def test_the_fourteen_released_names_are_there():
    assert set(zoo.NAMES) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    _, params = split(zoo.abstract(name))
    vision, text = COUNTS[name]
    if text is None:
        assert zoo.count(params) == vision
    else:
        assert zoo.count(params["vision"]) == vision
        assert zoo.count(params["text"]) == text
        assert zoo.count(params) == vision + text + 1  # and the logit scale


@pytest.mark.parametrize("size", TRUNKS)
def test_trunk_counts_are_the_published_ones(size):
    _, params = split(zoo.abstract(f"PE-Core-{size}"))
    head = ("norm_post", "pool", "projection")
    assert zoo.count({k: v for k, v in params["vision"].items() if k not in head}) == TRUNKS[size]


def test_every_parameter_is_float32_and_names_its_axes():
    for name in ("PE-Core-T16-384", "PE-Lang-L14-448"):
        for _, variable in zoo.nnx.to_flat_state(zoo.nnx.state(zoo.abstract(name))):
            assert variable.dtype == jax.numpy.float32
            assert len(variable.shape) - len(variable.get_metadata()["axes"]) in (0, 1)  # 1: stacked over layers


@pytest.mark.parametrize("name", zoo.NAMES)
def test_configuration_survives_json(name):
    config = zoo.architecture(name)
    assert zoo.architecture(json.loads(json.dumps(zoo.to_dict(config)))) == config


def test_a_base_with_changes_changes_only_those():
    config = zoo.architecture(
        {"base": "PE-Core-B16-224", "vision": {"depth": 2, "remat": "block"}, "text": {"depth": 1}}
    )
    base = zoo.architecture("PE-Core-B16-224")
    assert isinstance(config, CLIPConfig) and isinstance(base, CLIPConfig)
    assert (config.vision.depth, config.vision.remat, config.text.depth) == (2, "block", 1)
    assert (config.vision.width, config.text.width) == (base.vision.width, base.text.width)


def test_a_vision_only_base_takes_its_fields_directly():
    config = zoo.architecture({"base": "PE-Spatial-S16-512", "drop_path": 0.1})
    assert isinstance(config, VisionConfig) and (config.drop_path, config.width) == (0.1, 384)


def test_unknown_name_tells_its_neighbours():
    with pytest.raises(ValueError, match=r"'PE-Core-B14-224' is no released model; did you mean PE-Core-B16-224"):
        zoo.architecture("PE-Core-B14-224")


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"base": "PE-Core-T16-384", "vison": {}}, "CLIPConfig has no field 'vison'; did you mean vision"),
        ({"base": "PE-Core-T16-384", "vision": {"widht": 8}}, "VisionConfig has no field 'widht'; did you mean width"),
        ({"base": "PE-Lang-L14-448", "dept": 8}, "VisionConfig has no field 'dept'; did you mean depth"),
        ({"vision": {"width": 8}}, "VisionConfig lacks image_size, patch_size"),
        ({"base": "PE-Core-T16-384", "text": {"output_width": 8}}, "share one joint space"),
        ({"base": "PE-Core-T16-384", "vision": {"image_size": 100}}, "not a multiple of patch_size=16"),
        (
            {"base": "PE-Core-T16-384", "vision": {"remat": "all"}},
            "remat='all' is unknown; use one of none, dots, no_up, attention, block",
        ),
        ({"base": "PE-Core-G14-448", "vision": {"pool": "class"}}, "needs class_token=True"),
        ({"base": "PE-Core-G14-448", "vision": {"pool": "none"}}, "has no use; set it to None"),
    ],
)
def test_wrong_specification_says_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        zoo.architecture(spec)


@pytest.mark.parametrize(
    ("name", "size", "trunk"),
    [
        ("PE-Core-B16-224", 112, 8.6e9),
        ("PE-Core-B16-224", 224, 35.1e9),
        ("PE-Core-L14-336", 336, 382e9),
        ("PE-Core-G14-448", 448, 4109e9),
    ],
)
def test_flops_agree_with_the_papers_table(name, size, trunk):
    config = zoo.architecture(name)
    pool = zoo.forward_flops(config.vision, size) - trunk
    assert 0 < pool < 0.06 * trunk  # what the table leaves out: pooler and projection


def test_flops_of_a_video_count_the_image_tower_once_per_frame():
    config = zoo.architecture("PE-Core-B16-224")
    image, video = zoo.forward_flops(config, 160), zoo.forward_flops(config, 160, frames=8)
    assert video - image == 7 * zoo.forward_flops(config.vision, 160)

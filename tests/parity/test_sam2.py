"""Equality with transformers' Sam2Model, and with Meta's own module where SAM2 is set to a checkout of it."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from pe_jax.convert import sam2 as convert
from pe_jax.evals import masks
from pe_jax.models import zoo
from pe_jax.models.sam2 import Sam2, Sam2Config
from pe_jax.types import Params, split
from tests.convert.shrunken import assert_same
from tests.golden import compare
from tests.models.sam2_sizes import SIZES, params, prompts

# What is asked of each image: which prompts, and whether for three masks.
ASKED: dict[str, tuple[tuple[str, ...], bool]] = {
    "points": (("points", "labels"), True),
    "points, one mask": (("points", "labels"), False),
    "boxes": (("boxes",), True),
    "boxes and points": (("points", "labels", "boxes"), False),
    "mask": (("masks",), True),
    "mask and points": (("points", "labels", "masks"), False),
}


def theirs(config: Sam2Config, tensors: dict[str, np.ndarray], dtype: torch.dtype) -> Any:
    """transformers' model with these tensors, which must be all that it has."""
    fields = transformers.Sam2Config.from_dict(convert.to_hf_config(config), attn_implementation="eager")
    model = transformers.Sam2Model(fields).eval().to(dtype)
    model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, strict=True)
    return model


def their_outputs(model: Any, given: dict[str, np.ndarray], asked: Any = ASKED) -> dict[str, torch.Tensor]:
    dtype = model.no_memory_embedding.dtype
    put = {name: torch.from_numpy(x) for name, x in given.items()}
    put = {name: x.to(dtype) if x.is_floating_point() else x for name, x in put.items()}
    images, outputs = put["images"].permute(0, 3, 1, 2), {}
    for case, (names, multimask) in asked.items():
        kinds = {f"input_{name}": put[name] for name in names}
        found = model(pixel_values=images, multimask_output=multimask, **kinds)
        outputs |= {f"{case}: masks": found.pred_masks, f"{case}: ious": found.iou_scores}
        outputs |= {f"{case}: objects": found.object_score_logits[..., 0]}
        for name, x in zip(("fine", "middle", "image"), found.image_embeddings, strict=True):
            outputs[name] = x.permute(0, 2, 3, 1)
    return outputs


def our_outputs(model: Sam2, given: dict[str, np.ndarray], asked: Any = ASKED) -> dict[str, jax.Array]:
    embedding = model.embed(given["images"])
    outputs = dict(embedding._asdict())
    for case, (names, multimask) in asked.items():
        found = model.decode(embedding, **{name: given[name] for name in names}, multimask=multimask)
        outputs |= {f"{case}: {name}": x for name, x in found._asdict().items()}
    return outputs


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("whole windows", tuple(ASKED)),
        ("padded windows", ("points", "mask and points")),
        ("larger", ("boxes", "points, one mask")),
    ],
)
def test_embeddings_masks_ious_and_object_scores_equal_transformers(name, cases):
    config, asked = SIZES[name], {case: ASKED[case] for case in cases}
    given, tensors = prompts(config.image_size), convert.from_params(params(config), config, "hf")
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            want = their_outputs(theirs(config, tensors, dtype), given, asked)
        got = our_outputs(from_tensors(config, tensors), given, asked)
        assert got.keys() == want.keys()
        off = {n: compare.error(got[n], x.numpy()) for n, x in want.items()}
        assert max(off.values()) < compare.TOLERANCE, {n: x for n, x in off.items() if x >= compare.TOLERANCE}


def test_gradients_by_every_parameter_equal_transformers(close):
    """With windows that are padded, for points, boxes and a mask; by the encoder's parameters and by all others."""
    config, found = SIZES["padded windows"], []
    asked = {"all": (("points", "labels", "boxes", "masks"), True), "no mask": ASKED["boxes"]}
    tensors, given = convert.from_params(params(config), config, "hf"), prompts(config.image_size)
    for dtype in (torch.float64, torch.float32):
        model = theirs(config, tensors, dtype)
        outputs = their_outputs(model, given, asked)
        scalar = sum((torch.from_numpy(compare.output_weights(n, x.shape)) * x).sum() for n, x in outputs.items())
        scalar.backward()
        gradients = {n: x.grad.numpy() for n, x in model.named_parameters()}
        found.append(({n: x.detach().numpy() for n, x in outputs.items()}, gradients))

    graphdef, _ = split(convert.abstract(config))

    def scalar(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = our_outputs(nnx.merge(graphdef, params), given, asked)
        return sum(jax.numpy.vdot(compare.output_weights(n, x.shape), x) for n, x in outputs.items()), outputs

    gradients, outputs = jax.jit(jax.grad(scalar, has_aux=True))(convert.to_params(tensors, config))
    named = convert.from_params(gradients, config, "hf")
    named = {n: x for n, x in named.items() if not n.endswith("positional_embedding")}  # theirs is no parameter
    assert named.keys() == found[0][1].keys()
    for n in [n for n in named if n.endswith("k_proj.bias")]:  # a shift of all logits: zero, but for rounding
        theirs_of_q = found[0][1][n.replace("k_proj", "q_proj")]
        assert np.linalg.norm(named.pop(n)) < compare.TOLERANCE * np.linalg.norm(theirs_of_q), n
        assert all(side[1].pop(n) is not None for side in found)
    close(({n: np.asarray(x) for n, x in outputs.items()}, named), *found)


def from_tensors(config: Sam2Config, tensors: dict[str, Any]) -> Sam2:
    graphdef, _ = split(convert.abstract(config))
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, convert.to_params(tensors, config)))


LARGE = zoo.sam2("SAM-2.1-L")
SHALLOW = dataclasses.replace(LARGE, depths=(1, 2, 3, 2), global_blocks=(5,), image_size=256)


@pytest.mark.parametrize(
    "config", [SHALLOW, pytest.param(LARGE, marks=pytest.mark.full)], ids=["few blocks, 256 px", "all blocks, 1,024 px"]
)
def test_the_large_model_at_its_own_widths(config):
    given, asked = prompts(config.image_size), {"points": ASKED["points"]}
    given = {name: x[:1] for name, x in given.items()}
    tensors = convert.from_params(params(config), config, "hf")
    with torch.no_grad():
        want = their_outputs(theirs(config, tensors, torch.float32), given, asked)
    got = our_outputs(from_tensors(config, tensors), given, asked)
    for name, x in want.items():
        assert compare.error(got[name], x.numpy()) < compare.TOLERANCE, name


def test_files_go_both_ways_between_transformers_and_us(tmp_path):
    """Also those of the video model, whose memory is left out, as the released files are."""
    config = SIZES["padded windows"]
    convert.write(tmp_path / "ours", params(config), config)
    model, report = transformers.Sam2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.save_pretrained(tmp_path / "theirs")
    found, tree = convert.read(tmp_path / "theirs")
    assert found == config
    assert dict(convert.from_params(tree, config, "hf")).keys() == model.state_dict().keys()

    fields = convert.to_hf_config(config) | {"model_type": "sam2_video", "image_size": config.image_size}
    sizes = {"memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32, "mask_downsampler_embed_dim": 32}
    sizes |= {"memory_fuser_embed_dim": 32, "memory_attention_num_layers": 1}
    video = transformers.Sam2VideoModel(transformers.Sam2VideoConfig.from_dict(fields | sizes))
    video.load_state_dict(model.state_dict(), strict=False)
    video.save_pretrained(tmp_path / "video")
    again, from_video = convert.read(tmp_path / "video")
    assert again == config
    assert convert.memory(video.state_dict())
    assert_same(from_video, tree)


# ---------------------------------------------------------------------------------------------------- Meta's own module


@pytest.fixture(scope="module")
def checkout() -> None:
    """Meta's checkout (github.com/facebookresearch/sam2), importable as `sam2`; skips if unset."""
    root = os.environ.get("SAM2")
    if not root:
        pytest.skip("SAM2 is unset; clone facebookresearch/sam2 and set it to that folder")
    if not (Path(root) / "sam2/build_sam.py").is_file():
        pytest.fail(f"SAM2={root} has no sam2/build_sam.py; set it to the root of the checkout")
    for library in ("hydra", "iopath"):
        pytest.importorskip(library, reason=f"Meta's module needs {library}: pip install hydra-core iopath")
    if root not in sys.path:
        sys.path.insert(0, root)


def metas(letter: str, device: str, **changes: Any) -> Any:
    from sam2.build_sam import build_sam2

    changed = [f"++model.{name}={value}" for name, value in changes.items()]
    file = f"configs/sam2.1/sam2.1_hiera_{letter}.yaml"
    with torch.device(device):
        return build_sam2(file, None, device=device, hydra_overrides_extra=changed)


@pytest.mark.parametrize("name", zoo.SAM2)
def test_the_released_configurations_are_metas(checkout, name):
    model, config = metas(name.removeprefix("SAM-2.1-").lower(), "meta"), zoo.sam2(name)
    trunk = model.image_encoder.trunk
    assert tuple(trunk.window_spec) == config.windows and model.image_size == config.image_size
    assert tuple(block + 1 for block in trunk.global_att_blocks) == config.global_blocks
    heads = [block.attn.num_heads for block in trunk.blocks]
    assert heads == [config.heads * 2**i for i, depth in enumerate(config.depths) for _ in range(depth)]
    theirs = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    for n in convert.memory(theirs):
        del theirs[n]
    places = convert._places(config, "meta")
    assert theirs == {n: s for place in places for n, s in zip(place.names, place.stored, strict=True)}


@pytest.fixture(scope="module")
def tiny(checkout) -> tuple[Any, Sam2, np.ndarray]:
    """Meta's predictor and ours with the same weights of its tiny model, every parameter random; and an image."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    config = dataclasses.replace(zoo.sam2("SAM-2.1-T"), image_size=256)
    model = metas("t", "cpu", image_size=256)
    tensors = convert.from_params(params(config), config, "meta")
    report = model.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in tensors.items()}, strict=False)
    assert not report.unexpected_keys and report.missing_keys == convert.memory(model.state_dict())
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # written down for 1,024 pixels
    pixels = np.random.default_rng(2).integers(0, 256, (120, 200, 3), np.uint8)
    predictor.set_image(pixels)
    return predictor, from_tensors(config, {n: x.numpy() for n, x in model.state_dict().items()}), pixels


@pytest.mark.parametrize("multimask", [True, False])
def test_masks_equal_metas_predictor_from_the_image_file_on(tiny, multimask):
    predictor, model, pixels = tiny
    rng = np.random.default_rng(3)
    points, labels = rng.uniform(0, 120, (5, 2)).astype(np.float32), np.array([1, 0, 1, 1, -1], np.int32)
    box, start = np.array([10, 20, 150, 90], np.float32), rng.standard_normal((1, 64, 64)).astype(np.float32)
    kinds = {"point_coords": points, "point_labels": labels, "box": box, "mask_input": start}
    _, ious, low = predictor.predict(**kinds, multimask_output=multimask, return_logits=True)
    scale = np.array([256 / 200, 256 / 120], np.float32)
    found = model.segment(
        model.prepare(pixels[None]), (points * scale)[None, None], labels[None, None],
        (box * np.tile(scale, 2))[None, None], start[None], multimask,
    )  # fmt: skip
    assert compare.error(np.clip(found.masks[0, 0], -32, 32), low) < compare.TOLERANCE
    assert compare.error(found.ious[0, 0], ious) < compare.TOLERANCE


def test_automatic_masks_equal_metas_before_its_nms(tiny):
    """Its nms is an operator of torchvision's that a CPU wheel may lack; thresholds, boxes and runs are compared."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    predictor, model, pixels = tiny
    grid = {"points_per_side": 4, "chunk": 16, "max_overlap": 1.0}
    everything = masks.find(model, pixels, **grid, min_iou=0.0, min_stability=0.0)
    assert len(everything) == 3 * 16
    iou, stability = (float(np.quantile([getattr(m, n) for m in everything], 0.3)) for n in ("iou", "stability"))
    found = masks.find(model, pixels, **grid, min_iou=iou + 1e-4, min_stability=stability + 1e-4)
    generator = SAM2AutomaticMaskGenerator(
        predictor.model, points_per_side=4, pred_iou_thresh=iou + 1e-4, stability_score_thresh=stability + 1e-4
    )
    generator.predictor = predictor
    size = pixels.shape[:2]
    points = generator.point_grids[0] * np.array(size)[None, ::-1]
    theirs = generator._process_batch(points, size, [0, 0, size[1], size[0]], size, normalize=True)
    order = torch.argsort(-theirs["iou_preds"]).tolist()
    assert 0 < len(found) == len(order) < 48
    for mask, i in zip(found, order, strict=True):
        assert mask.iou == pytest.approx(float(theirs["iou_preds"][i]), abs=1e-4)
        assert mask.stability == pytest.approx(float(theirs["stability_score"][i]), abs=1e-3)
        counts = theirs["rles"][i]["counts"]
        inside = np.concatenate([np.full(n, k % 2, bool) for k, n in enumerate(counts)]).reshape(size[::-1]).T
        assert (inside != mask.inside).mean() < 1e-3  # a logit of zero to within rounding
        np.testing.assert_allclose(mask.point, theirs["points"][i], rtol=1e-5)

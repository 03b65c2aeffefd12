"""Every mask of an image: what is kept of a model's answers, boxes, run lengths, the picture and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import cli
from pe_jax.convert import sam2
from pe_jax.evals import masks
from pe_jax.models.sam2 import Sam2, grid_points
from pe_jax.types import split
from tests.models.sam2_sizes import SMALL, params

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> Sam2:
    graphdef, _ = split(sam2.abstract(SMALL))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params(SMALL)))


@pytest.fixture(scope="module")
def everything(model) -> list[masks.Mask]:
    return masks.find(model, PIXELS, points_per_side=4, chunk=8, min_iou=0, min_stability=0, max_overlap=1)


def rectangle(top: int, left: int, bottom: int, right: int, iou: float = 0.9) -> masks.Mask:
    inside = np.zeros((40, 56), bool)
    inside[top:bottom, left:right] = True
    return masks.Mask(inside, masks._box(inside), iou, 1.0, (float(left), float(top)))


def test_without_thresholds_every_answer_is_there_at_the_images_own_size_best_first(model, everything):
    points = grid_points(4, 64, 64)
    answers = model.decode(model.embed(model.prepare(PIXELS[None])), points[None, :, None])
    assert len(everything) == 3 * 16
    ious = [mask.iou for mask in everything]
    assert ious == sorted(ious, reverse=True)
    np.testing.assert_allclose(ious, np.sort(np.asarray(answers.ious).ravel())[::-1], rtol=1e-4)
    point, which = np.unravel_index(np.argmax(answers.ious[0]), (16, 3))
    best = jax.image.resize(answers.masks[0, point, which], (40, 56), "bilinear")
    assert everything[0].inside.shape == (40, 56) and (everything[0].inside == (np.asarray(best) > 0)).mean() > 0.999
    np.testing.assert_allclose(everything[0].point, points[point] / 64 * [56, 40], rtol=1e-6)
    stable = float((best > 1).sum() / (best > -1).sum())
    assert everything[0].stability == pytest.approx(stable, abs=0.01)


def test_thresholds_keep_the_masks_above_them(model, everything):
    stabilities = sorted(mask.stability for mask in everything)  # thresholds between two masks, never at one
    iou, stability = (everything[30].iou + everything[31].iou) / 2, (stabilities[12] + stabilities[13]) / 2
    kept = masks.find(model, PIXELS, points_per_side=4, chunk=16, min_iou=iou, min_stability=stability, max_overlap=1)
    want = [mask for mask in everything if mask.iou > iou and mask.stability >= stability]
    assert 0 < len(want) < 47
    assert [mask.iou for mask in kept] == pytest.approx([mask.iou for mask in want], rel=1e-4)


def test_an_image_in_which_nothing_is_sure_has_no_masks(model):
    assert masks.find(model, PIXELS, points_per_side=4, chunk=8, min_iou=0.99, max_overlap=0.7) == []


def test_of_boxes_that_overlap_too_much_the_best_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [20, 0, 30, 10], [0, 0, 10, 7], [0, 0, 0, 0]])
    scores = np.array([0.5, 0.9, 0.1, 0.8, 0.3])
    assert masks.distinct(boxes, scores, 0.75) == [1, 4, 2]  # 0 shares 0.8 with 1, and 3 shares 0.875
    assert masks.distinct(boxes, scores, 0.85) == [1, 0, 4, 2]
    assert masks.distinct(boxes, scores, 1.0) == [1, 3, 0, 4, 2]
    assert masks.distinct(boxes[:0], scores[:0], 0.7) == []


@pytest.mark.parametrize("inside", [np.eye(4, 6, dtype=bool), np.eye(4, 6) == 0, np.zeros((3, 2), bool)])
def test_runs_unroll_to_the_mask_again(inside):
    runs = masks.Mask(inside, masks._box(inside), 1.0, 1.0, (0.0, 0.0)).runs()
    flat = np.concatenate([np.full(n, i % 2) for i, n in enumerate(runs["counts"])]).astype(bool)
    np.testing.assert_array_equal(flat.reshape(runs["size"][::-1]).T, inside)


def test_a_box_holds_the_pixels_inside_and_none_is_zeros():
    assert rectangle(3, 5, 10, 20).box == (5, 3, 19, 9) and rectangle(3, 5, 10, 20).area == 7 * 15
    assert rectangle(3, 5, 3, 20).box == (0, 0, 0, 0)


def test_small_masks_are_painted_over_large_ones_and_nothing_else_is():
    large, small = rectangle(2, 2, 30, 50), rectangle(8, 8, 16, 20)
    drawn = masks.painted(PIXELS, [small, large])
    alone = masks.painted(PIXELS, [large])
    inside = small.inside
    assert (drawn[~inside] == alone[~inside]).all() and (drawn[inside] != alone[inside]).any(1).mean() > 0.9
    assert (drawn[~(large.inside | inside)] == PIXELS[~(large.inside | inside)]).all()


def test_the_command_draws_and_prints_every_mask(tmp_path, capsys, everything):
    pytest.importorskip("matplotlib")
    sam2.write(tmp_path / "model", params(SMALL), SMALL)
    PIL.Image.fromarray(PIXELS).save(tmp_path / "image.png")
    out = tmp_path / "made" / "masks.png"
    common = ["masks", "--model", str(tmp_path / "model"), str(tmp_path / "image.png"), "--points", "4", "--iou", "0"]
    common += ["--stability", "0", "--overlap", "1"]
    assert cli.main([*common, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["masks"]) == 48 and report["masks"][0]["area"] == everything[0].area
    assert PIL.Image.open(out).size[0] > 1000
    assert cli.main([*common, "--out", str(tmp_path / "masks.txt")]) == 2
    assert "end in .png" in capsys.readouterr().err


def test_the_command_says_what_a_bare_name_lacks(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["masks", "--model", "SAM-2.1-L", "x.png", "--out", str(tmp_path / "x.png")]) == 2
    assert "give its weights too: --weights FILE" in capsys.readouterr().err

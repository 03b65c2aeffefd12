import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import checkpoint, cli, sharding
from pe_jax.data.image import Preprocess
from pe_jax.evals import inference, plots
from pe_jax.evals import pictures as module
from pe_jax.models import zoo
from pe_jax.types import split

SIZE = (8, 24)  # of patches of 4 pixels: a grid of 2 rows and 6 columns


def features(model, images, layers, size=SIZE):
    """{layer: [B, Y, X, D]} straight from the tower."""
    tower, preprocess = inference.vision_tower(model), Preprocess(size)
    found = tower.features(jnp.asarray(preprocess(images)), layers, class_token=False)
    return {k: np.asarray(v).reshape(len(images), size[0] // 4, size[1] // 4, -1) for k, v in found.items()}


@pytest.fixture(scope="module")
def strips(model, pictures):
    """A strip of each kind, of two images at three layers, on one device."""
    images = pictures[0][:2]
    points = [(0.9, 0.2), (0.3, 0.7)]
    return {
        "pca": module.strip(model, images, (1, -1, 2), size=SIZE),
        "similarity": module.strip(model, images, (1, -1, 2), "similarity", size=SIZE, points=points),
        "attention": module.strip(model, images, (1, -1, 2), "attention", size=SIZE),
        "from a point": module.strip(model, images, (1, -1, 2), "attention", size=SIZE, points=points),
    }


# ---- arrays --------------------------------------------------------------------------------------------------------


def test_colours_are_rgb_and_like_features_are_alike():
    """Two halves of an image with their own feature each: one colour a half, away from the seam."""
    random = np.random.default_rng(0)
    halves = random.normal(size=(2, 7))
    tokens = np.repeat(halves[None, [0, 0, 0, 1, 1, 1]], 5, 0)[None] + 0.01 * random.normal(size=(1, 5, 6, 7))
    colors = module.pca_colors(tokens)
    assert colors.shape == (1, 5, 6, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    light = colors.mean(-1)[0]
    assert abs(light[:, :2].mean() - light[:, 4:].mean()) > 5 * max(light[:, :2].std(), light[:, 4:].std())


def test_the_scale_of_features_does_not_matter():
    tokens = np.random.default_rng(1).normal(size=(2, 4, 3, 9))
    np.testing.assert_allclose(module.pca_colors(tokens), module.pca_colors(1000 * tokens + 5), atol=1e-6)


def test_white_is_white_and_black_is_black():
    lab = module._from_lab(np.array([0.0, 100.0]), np.zeros(2), np.zeros(2))
    np.testing.assert_allclose(lab, [[0, 0, 0], [1, 1, 1]], atol=0.01)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match=r"want \[B, H, W, D\]"):
        module.pca_colors(np.zeros((2, 9, 7)))


def test_a_joint_projection_gives_like_features_of_two_layers_the_same_colours():
    """The second layer is the first, larger and elsewhere, with two channels exchanged in a third."""
    first = np.random.default_rng(2).normal(size=(2, 4, 5, 6)) * np.arange(1, 7)
    exchanged = first[..., [5, 4, 3, 2, 1, 0]]
    joint = module.pca_strip({3: first, 8: 50 * first + 7, 9: exchanged}, "joint")
    np.testing.assert_allclose(joint[3], joint[8], atol=1e-6)
    assert np.abs(joint[3] - joint[9]).max() > 0.1
    own = module.pca_strip({3: first, 9: exchanged}, "layer")
    np.testing.assert_allclose(own[3], own[9], atol=1e-6)  # each by its own components: the exchange cannot be seen


def test_similarity_is_the_cosine_to_the_marked_token():
    tokens = np.random.default_rng(3).normal(size=(2, 3, 4, 5)).astype(np.float32)
    found = module.similarity(tokens, [(2, 1), (0, 3)])
    for image, (row, column) in enumerate([(2, 1), (0, 3)]):
        marked = tokens[image, row, column]
        for y in range(3):
            for x in range(4):
                own = tokens[image, y, x]
                want = own @ marked / np.linalg.norm(own) / np.linalg.norm(marked)
                assert found[image, y, x] == pytest.approx(want, abs=1e-6)
        assert found[image, row, column] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("point", "token"),
    [((0, 0), (0, 0)), ((0.99, 0.01), (0, 5)), ((0.01, 0.99), (1, 0)), ((1, 1), (1, 5)), ((0.34, 0.49), (0, 2))],
)
def test_a_point_is_x_then_y_and_a_token_row_then_column(point, token):
    assert module.token_at(point, (2, 6)) == token


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("sides", [(60, 24), (31, 50)])
def test_a_point_of_the_image_is_found_where_the_transform_puts_it(mode, sides):
    """One bright square on black: where its centre is after the transform, found from the pixels."""
    width, height = sides
    x, y = 0.4 * width, 0.6 * height
    image = np.zeros((height, width, 3), np.uint8)
    image[round(y) - 2 : round(y) + 2, round(x) - 2 : round(x) + 2] = 255
    preprocess = Preprocess((40, 56), mode=mode)
    light = preprocess.pixels(image)[..., 0].astype(float)
    want = (
        (light.sum(0) @ (np.arange(56) + 0.5)) / light.sum() / 56,
        (light.sum(1) @ (np.arange(40) + 0.5)) / light.sum() / 40,
    )
    found = module.seen_at((round(x) / width, round(y) / height), sides, preprocess)
    np.testing.assert_allclose(found, want, atol=0.02)


def test_a_point_that_is_cropped_away_is_refused():
    with pytest.raises(ValueError, match="cut off by the centre crop"):
        module.seen_at((0.05, 0.5), (60, 24), Preprocess(16, mode="crop"))


@pytest.mark.parametrize(
    ("preprocess", "shape"),
    [
        (Preprocess((8, 8)), (18, 42, 3)),  # squashed for the tower, whole for people
        (Preprocess((8, 8), exif=True), (42, 18, 3)),
        (Preprocess((8, 16), mode="crop"), (224, 448, 3)),
    ],
)
def test_the_view_has_the_proportions_of_what_is_seen(preprocess, shape):
    image = PIL.Image.new("RGB", (42, 18), "red")
    image.getexif()[0x0112] = 6  # lies on its side
    assert module.view(image, preprocess).shape == shape


# ---- strips --------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_the_towers_own_features(model, pictures, strips):
    found = features(model, pictures[0][:2], (1, 3, 2))
    assert list(strips["pca"].maps) == [1, 3, 2]
    assert strips["pca"].grid == (2, 6)
    for layer, colors in strips["pca"].maps.items():
        np.testing.assert_allclose(colors, module.pca_colors(found[layer]), atol=1e-3)


def test_similarity_is_of_the_features_and_one_where_it_was_clicked(model, pictures, strips):
    found = features(model, pictures[0][:2], (1, 3, 2))
    at = [(0, 5), (1, 1)]
    for layer, cosines in strips["similarity"].maps.items():
        np.testing.assert_allclose(cosines, module.similarity(found[layer], at), atol=1e-5)
        for image, (row, column) in enumerate(at):
            assert cosines[image, row, column] == pytest.approx(1, abs=1e-6)
            assert np.sum(cosines[image] > 1 - 1e-4) == 1


def test_attention_is_what_the_patches_receive_in_multiples_of_an_even_share(model, pictures, strips):
    tower = inference.vision_tower(model)
    tables = tower.attention(jnp.asarray(Preprocess(SIZE)(pictures[0][:2])), (1, 3, 2))
    for layer, table in tables.items():
        mean = np.asarray(table).mean(1)  # over heads; the class token is the first of 13
        received = 13 * mean.mean(1)[:, 1:].reshape(2, 2, 6)
        np.testing.assert_allclose(strips["attention"].maps[layer], received, rtol=1e-4)
        given = np.stack([13 * mean[0, 1 + 5, 1:], 13 * mean[1, 1 + 7, 1:]]).reshape(2, 2, 6)
        np.testing.assert_allclose(strips["from a point"].maps[layer], given, rtol=1e-4)


def test_a_model_on_a_mesh_gives_the_same_strips(model, pictures, strips):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    graphdef, params = split(model)
    placed = nnx.merge(graphdef, jax.device_put(params, sharding.param_shardings(model, mesh)))
    placed.preprocess = model.preprocess
    for kind in ("similarity", "attention"):
        points = [(0.9, 0.2), (0.3, 0.7)] if kind == "similarity" else None
        found = module.strip(placed, pictures[0][:2], (1, -1, 2), kind, size=SIZE, points=points)
        for layer, own in found.maps.items():
            np.testing.assert_allclose(own, strips[kind].maps[layer], rtol=1e-4, atol=1e-5)


def test_a_tower_without_class_token_and_odd_images_make_strips_too(tower, tmp_path):
    """A grayscale file, a palette image, one of a single pixel, and a tower that has no class token."""
    grey = tmp_path / "grey.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 20), np.uint8)).save(grey)
    images = [str(grey), PIL.Image.new("P", (30, 10)), np.zeros((1, 1, 3), np.uint8)]
    found = module.strip(tower, images, (1, 2), "attention", size=SIZE)
    assert found.maps[2].shape == (3, 2, 6)
    np.testing.assert_allclose(found.maps[2].mean((1, 2)), 1, rtol=1e-5)  # nobody else is there to receive
    assert [own.shape for own in found.views] == [(9, 20, 3), (10, 30, 3), (1, 1, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "heat"}, "kind='heat' is unknown; choose one of pca, attention, similarity"),
        ({"layers": (9,)}, "layer 9 does not exist; this tower has blocks 1 to 3"),
        ({"layers": (0,), "kind": "attention"}, "layer 0 is the patch embedding, where nothing attends"),
        ({"size": (8, 18)}, "8x18 is not a multiple of the patch, 4 pixels; the nearest that is: 8x16"),
        ({"size": 3}, "the nearest that is: 4x4"),
        ({"kind": "similarity"}, "similarity needs a point"),
        ({"kind": "similarity", "points": [(0.5, 1.2)]}, "lies outside the image"),
        ({"kind": "similarity", "points": [(0.5, 0.5)] * 3}, "3 points for 2 images"),
        ({"points": [(0.5, 0.5)]}, "no use for kind 'pca'"),
        ({"projection": "both"}, "projection='both' is unknown"),
    ],
)
def test_what_cannot_be_pictured_is_refused_before_the_tower_runs(model, pictures, change, message):
    with pytest.raises(ValueError, match=message):
        module.strip(model, pictures[0][:2], **change)


# ---- figures -------------------------------------------------------------------------------------------------------


def fake(layers, images, kind="attention", **fields):
    random = np.random.default_rng(0)
    shape = (images, 2, 6, 3) if kind == "pca" else (images, 2, 6)
    maps = {layer: random.uniform(0.1, 0.9, shape) for layer in layers}
    views = [random.integers(0, 255, (20 + 10 * i, 30, 3), np.uint8) for i in range(images)]
    return module.Strip(kind, views, maps, **fields)


def cells(page):
    return [axes for axes in page.axes if axes.images]


def test_a_figure_shows_each_layers_map_under_its_name():
    pytest.importorskip("matplotlib")
    strip = fake((2, 5), 3)
    found = cells(module.figure(strip, "three images"))
    assert [axes.get_title() for axes in found[:3]] == ["image", "layer 2", "layer 5"]
    for row in range(3):
        np.testing.assert_array_equal(found[3 * row].images[0].get_array(), strip.views[row])
        for column, layer in enumerate((2, 5)):
            np.testing.assert_array_equal(found[3 * row + 1 + column].images[0].get_array(), strip.maps[layer][row])


def test_many_layers_go_on_below_and_nothing_overlaps():
    pytest.importorskip("matplotlib")
    page = module.figure(fake(range(20), 2, "pca"))
    found = cells(page)
    assert len(found) == 2 * (1 + 20)
    assert [axes.get_title() for axes in found] == 2 * ["image", *(f"layer {layer}" for layer in range(20))]
    boxes = [axes.get_position() for axes in found]
    assert all(min(box.p0) >= 0 and max(box.p1) <= 1 for box in boxes)
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one.x0 >= other.x1 or other.x0 >= one.x1 or one.y0 >= other.y1 or other.y0 >= one.y1
            assert apart


def test_the_marked_point_is_drawn_where_it_is():
    pytest.importorskip("matplotlib")
    page = module.figure(fake((1,), 1, "similarity", points=[(0.25, 0.75)]))
    for axes in cells(page)[:2]:
        assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.25, 0.75]]] * 2
        assert axes.get_ylim() == (1, 0)  # y from the top, as in the image


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    metadata = {"architecture": zoo.to_dict(model.config), "preprocess": model.preprocess.to_dict()}
    checkpoint.save_weights(folder, split(model)[1], metadata)
    return str(folder)


def test_the_command_writes_a_picture_and_says_what_is_on_it(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image, out = tmp_path / "wide.png", tmp_path / "new" / "out.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 60), np.uint8)).save(image)
    given = ["picture", "--model", saved, str(image), "--size", "8x24", "--out", str(out), "--json"]
    assert cli.main([*given, "--kind", "similarity", "--at", "55,2", "--layers", "1,-1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [1, 3] and report["grid"] == [2, 6] and report["images"] == [str(image)]
    width, height = PIL.Image.open(out).size
    assert width > 2 * height > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--kind", "similarity"], "needs a point"),
        (["--kind", "similarity", "--at", "61,2"], "lies outside .*wide.png, which is 60 pixels wide and 20 high"),
        (["--kind", "similarity", "--at", "10%,101%"], "lies outside"),
        (["--kind", "similarity", "--at", "middle"], "must be X,Y in pixels"),
        (["--kind", "similarity", "--at", "1,1", "2,2"], "2 points for 1 images"),
        (["--layers", "1,x"], "numbers separated by commas"),
        (["--layers", "4"], "layer 4 does not exist"),
        (["--size", "8x"], "HEIGHTxWIDTH"),
        (["--out", "picture.gif"], "let it end in .png"),
    ],
)
def test_the_command_says_what_is_wrong(saved, tmp_path, capsys, change, message):
    pytest.importorskip("matplotlib")
    image = tmp_path / "wide.png"
    PIL.Image.new("L", (60, 20)).save(image)
    out = ["--out", str(tmp_path / "out.png")]
    assert cli.main(["picture", "--model", saved, str(image), *out, *change]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.png").exists()


def test_percent_and_pixels_are_the_same_point():
    from pe_jax.commands.picture import point

    assert point("45,5", (60, 20), "x") == point("75%,25%", (60, 20), "x") == (0.75, 0.25)


def test_the_ending_chooses_the_format():
    assert plots.format_of("a/b.PDF") == "pdf"
    with pytest.raises(ValueError, match="does not say the format"):
        plots.format_of("figure")

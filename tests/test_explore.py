"""The page of `pe-jax explore`: what is kept of an image, what is refused, and the page itself on a real port.

The page needs Gradio, the browser test Playwright and a Chromium of the system: each skips where its own is missing.
"""

import io
import pathlib
import shutil
import urllib.request

import numpy as np
import PIL.Image
import pytest

import pe_jax
from pe_jax import explore
from pe_jax.data.image import BadImage

ARCH = {
    "vision": {
        "image_size": 40,
        "patch_size": 8,
        "width": 24,
        "depth": 3,
        "heads": 2,
        "mlp_width": 40,
        "class_token": True,
        "pool": "attention",
        "pool_heads": 2,
        "output_width": 12,
    },
    "text": {"context_length": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "output_width": 12},
}
SIDE = 5  # tokens


@pytest.fixture(scope="module")
def model():
    return pe_jax.create(ARCH)


@pytest.fixture(scope="module")
def photo():
    """A landscape of two colours, left and right, with noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (60, 90, 3), dtype=np.uint8)
    pixels[:, 45:] += np.uint8(150)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="module")
def seen(model, photo):
    return explore.look(model, photo)


def test_one_pass_keeps_what_features_gives_at_every_layer(model, photo, seen):
    found = model.vision.features(model.preprocess([photo]), layers=range(4), class_token=False)
    assert seen.tokens.shape == (4, SIDE, SIDE, 24) and seen.size == (90, 60)
    for layer in range(4):
        want = np.asarray(found[layer]).reshape(SIDE, SIDE, 24)
        got = seen.tokens[layer].astype(np.float32) * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())  # float16
    embedding = np.asarray(model.encode_image(model.preprocess([photo])))[0]
    np.testing.assert_allclose(seen.embedding, embedding, atol=1e-5)


def test_a_tower_alone_has_tokens_and_no_embedding(model, photo, seen):
    alone = explore.look(model.vision, photo)
    assert alone.embedding is None
    np.testing.assert_array_equal(alone.tokens, seen.tokens)


def test_a_bigger_image_size_gives_more_tokens(model, photo):
    assert explore.look(model, photo, 48).grid == (6, 6)
    with pytest.raises(ValueError, match="image_size=44 is no multiple of the patch size, 8"):
        explore.check(model, 44)


def test_pixels_of_any_view_belong_to_the_token_under_them(seen):
    assert seen.token((0, 0), (90, 60)) == (0, 0)
    assert seen.token((89, 59), (90, 60)) == (4, 4)
    assert seen.token((89, 0), (90, 60)) == (0, 4)
    assert seen.token((320, 2), (640, 427)) == (0, 2)


def test_cosines_are_those_of_the_tokens(seen):
    tokens = seen.tokens[2].astype(np.float32).reshape(SIDE * SIDE, 24)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    np.testing.assert_allclose(seen.cosines((1, 3))[2].ravel(), unit @ unit[1 * SIDE + 3], atol=1e-5)
    # Another token is not answered with what was kept of the last.
    assert seen.cosines((0, 0))[2, 0, 0] == pytest.approx(1, abs=1e-5)


def test_pictures_keep_the_shape_of_the_image_and_change_with_layer_and_token(seen):
    one, other, elsewhere = (seen.similarity(*at) for at in ((1, (2, 2)), (3, (2, 2)), (1, (0, 4))))
    assert one.size == (explore.SHOWN, round(explore.SHOWN * 60 / 90))
    assert one.tobytes() != other.tobytes() and one.tobytes() != elsewhere.tobytes()
    assert seen.components(1, (2, 2)).tobytes() != seen.components(3, (2, 2)).tobytes()


def test_the_brightest_is_the_most_similar_other_token():
    cosines = np.array([[1.0, 0.4], [0.1, 0.3]], np.float32)
    heat = explore._heat(cosines)
    np.testing.assert_array_equal(heat[0, 1], explore._HEAT[-1])
    np.testing.assert_array_equal(heat[1, 0], explore._HEAT[0])
    assert explore._heat(np.ones((1, 1), np.float32)).shape == (1, 1, 3)  # a lone token has no other


def test_a_tile_of_the_strip_leads_to_its_layer(seen):
    width, height = seen.strip(0, (2, 2)).size
    for layer in range(4):
        assert seen.layer_at(width * (layer + 0.5) / 4, height / 2) == layer
    assert seen.layer_at(width, 10 * height) == 3
    assert seen.strip(0, (2, 2)).tobytes() != seen.strip(1, (2, 2)).tobytes()  # the mark


def test_many_layers_fill_several_rows_of_the_strip(seen):
    tall = explore.Seen(seen.size, seen.picture, np.repeat(seen.tokens, 8, 0), None)
    width, height = tall.strip(30, (0, 0)).size
    columns, rows = explore.STRIP[0], 3
    assert tall.layer_at(width * 4.5 / columns, height * 2.5 / rows) == 2 * columns + 4


def test_texts_are_scored_as_zero_shot_classification_scores_them(model, photo, seen):
    texts = [f"text {i}" for i in range(9)]  # more than one batch
    cosines, odds = explore.scores(model, seen, texts)
    image, text, scale = model(model.preprocess([photo]), model.tokenize(texts))
    want = np.asarray(image @ text.T)[0]
    np.testing.assert_allclose(cosines, want, atol=1e-5)
    logits = float(scale) * want
    np.testing.assert_allclose(odds, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_what_is_no_image_is_refused(tmp_path, photo):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(BadImage, match="no image that can be read"):
        explore.read(tmp_path / "a.png")
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(BadImage, match="cannot be decoded"):
        explore.read(tmp_path / "cut.png")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    PIL.Image.new("1", (300, 200)).save(tmp_path / "large.png")
    monkeypatch.setattr(explore, "MOST_PIXELS", 50_000)
    with pytest.raises(BadImage, match=r"300 x 200 = 60,000 pixels; the page takes up to 50,000"):
        explore.read(tmp_path / "large.png")


def test_an_image_is_turned_upright_and_made_rgb(tmp_path):
    exif = PIL.Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    PIL.Image.new("L", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = explore.read(tmp_path / "turned.jpg")
    assert image.size == (20, 30) and image.mode == "RGB"


def test_texts_are_shown_as_text_and_not_as_markup():
    table = explore._bars(["<script>x</script>"], np.array([0.5]), np.array([1.0]))
    assert "<script>" not in table and "&lt;script&gt;" in table


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(model):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'pe-jax[explore]'")
    blocks = explore.page(model, "tiny")
    yield explore.serve(blocks)
    blocks.close()


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def path(photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.png"
    photo.save(path)
    return path


def content(path: str) -> bytes:
    return pathlib.Path(path).read_bytes()


def test_the_page_answers_an_image_a_layer_and_texts(address, client, path):
    from gradio_client import handle_file

    first = client.predict(handle_file(path), 2, "a\nb", api_name="/look")
    assert "row 3, column 3, at layer 2" in first[3] and first[4].count("<td class=bar>") == 2
    second = client.predict(1, api_name="/layer")
    assert "at layer 1" in second[3]
    assert all(content(one) != content(other) for one, other in zip(first[:3], second[:3], strict=True))
    assert client.predict("a\nb\nc", api_name="/texts").count("<td class=bar>") == 3


def test_the_page_refuses_in_words(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "no.png").write_text("not an image")
    with pytest.raises(Exception, match="no image that can be read"):
        client.predict(handle_file(tmp_path / "no.png"), 2, "", api_name="/look")
    with pytest.raises(Exception, match="takes up to 100"):
        client.predict("\n".join("x" * 101), api_name="/texts")


def test_the_page_forbids_the_browser_every_other_machine_and_is_local(address):
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.headers["content-security-policy"] == explore.POLICY
        assert b"fonts.googleapis" not in answer.read()


def test_a_taken_port_is_told(address, model):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ValueError, match="Choose another --port"):
        explore.serve(explore.page(model, "second"), port=port)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    import sys

    from pe_jax import cli

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["explore", "--model", "nowhere"]) == 2
    assert "pip install 'pe-jax[explore]'" in capsys.readouterr().err


@pytest.mark.full
def test_in_a_browser_an_upload_the_slider_and_clicks_change_the_pictures(address, path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine's PATH")
    pictures = "similarity", "components", "strip"
    asked: list[str] = []
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        def shown() -> list[str]:
            return [page.get_attribute(f"#{name} img", "src") or "" for name in pictures]

        def wait_for_change(of: list[str], said: str) -> list[str]:
            page.wait_for_function("said => document.querySelector('#said').innerText.includes(said)", arg=said)
            for name, before in zip(pictures, of, strict=True):
                page.wait_for_function(
                    "([name, before]) => document.querySelector(`#${name} img`).src != before", arg=[name, before]
                )
            return shown()

        page.set_input_files("#image input[type=file]", str(path))
        page.wait_for_selector("#strip img")
        at_first = wait_for_change([""] * 3, "row 3, column 3, at layer 2")
        page.focus("#layer input[type=range]")
        page.keyboard.press("ArrowLeft")
        moved = wait_for_change(at_first, "row 3, column 3, at layer 1")
        page.click("#image img", position={"x": 4, "y": 4})
        clicked = wait_for_change(moved, "row 1, column 1, at layer 1")
        box = page.locator("#components img").bounding_box()
        assert box is not None
        page.click("#components img", position={"x": box["width"] - 4, "y": box["height"] - 4})
        again = wait_for_change(clicked, "row 5, column 5, at layer 1")
        box = page.locator("#strip img").bounding_box()
        assert box is not None
        page.click("#strip img", position={"x": box["width"] - 10, "y": 10})
        wait_for_change(again, "row 5, column 5, at layer 3")
        page.locator("#texts textarea").press_sequentially("a cat\na dog")
        page.wait_for_function("() => document.querySelectorAll('#bars td.bar').length == 2")
        chromium.close()
    elsewhere = [url for url in asked if url.startswith("http") and not url.startswith(address)]
    assert not elsewhere

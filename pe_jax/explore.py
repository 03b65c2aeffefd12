"""A page on this machine that shows what a model's tokens say of an image, at any layer (`pe-jax explore`).

One pass over an image gives the tokens of all layers. They are kept while the page is open, so that another layer or
another token is answered from memory. The page asks nothing of any other machine, and forbids the browser to.
"""

import dataclasses
import functools
import html
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
from jaxtyping import Array, Float

from pe_jax.data.image import BadImage, Preprocess, decode
from pe_jax.evals import inference, pictures
from pe_jax.models.clip import CLIP, unit

MOST_BYTES = 50_000_000  # of an uploaded file
MOST_PIXELS = 50_000_000  # of an image, which decoded takes three bytes each
MOST_TEXTS = 100
_TEXT_BATCH = 8
SHOWN = 640  # pixels of the longer side of a picture
STRIP = 13, 1280  # tiles in a row, and pixels of it
ACCENT, INK, FAINT = "#2563eb", "#0f172a", "#64748b"
# Nothing is asked of another machine, whatever the library's page would like to: no font, no script, no count.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

# Heat from cold to hot, evenly spaced: night, violet, red, orange, straw. Lightness rises throughout.
_HEAT = np.array([[13, 8, 45], [84, 18, 120], [178, 45, 94], [240, 115, 50], [252, 243, 170]], np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of an image.

    Attributes:
      size: width and height of the image itself, in pixels.
      picture: the image as it is shown: upright, RGB, its longer side `SHOWN` pixels.
      tokens: [Y, H, W, D] patch tokens of layers 0 to the last, float16. Each layer is divided by its greatest number,
        so that none overflows; cosines and principal components stay what they are.
      embedding: [E] unit vector in the joint space; None for a model without a text tower.
    """

    size: tuple[int, int]
    picture: PIL.Image.Image
    tokens: np.ndarray
    embedding: np.ndarray | None
    # Drawn before: the components of each layer; the cosines with the newest token.
    _components: dict[int, PIL.Image.Image] = dataclasses.field(default_factory=dict)
    _cosines: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.tokens.shape[1:3]

    def token(self, point: Sequence[float], size: tuple[int, int]) -> tuple[int, int]:
        """The row and column of the token under a pixel (x, y) of a view of the image with this width and height."""
        x, y = ((place + 0.5) / side for place, side in zip(point, size, strict=True))
        return pictures.token_at((x, y), self.grid)

    def cosines(self, token: tuple[int, int]) -> Float[np.ndarray, "Y H W"]:
        """The cosine of every token with the one at this row and column, layer by layer."""
        if token not in self._cosines:
            self._cosines.clear()
            found = [pictures.similarity(tokens[None], [token])[0] for tokens in self.tokens]
            self._cosines[token] = np.stack(found).astype(np.float32)
        return self._cosines[token]

    def similarity(self, layer: int, token: tuple[int, int]) -> PIL.Image.Image:
        """The cosines as heat over the image, the token framed."""
        heat = _enlarged(_heat(self.cosines(token)[layer]), self.picture.size)
        picture = PIL.Image.blend(self.picture.convert("L").convert("RGB"), heat, 0.75)
        self._frame(picture, token)
        return picture

    def components(self, layer: int, token: tuple[int, int]) -> PIL.Image.Image:
        """The tokens coloured by their three principal components, the token framed."""
        if layer not in self._components:
            colors = pictures.pca_colors(self.tokens[layer, None].astype(np.float32))[0]
            self._components[layer] = _enlarged(np.round(255 * colors), self.picture.size)
        picture = self._components[layer].copy()
        self._frame(picture, token)
        return picture

    def strip(self, layer: int, token: tuple[int, int]) -> PIL.Image.Image:
        """The similarity at every layer, a tile each with its number; that of `layer` is marked."""
        columns, rows, side, height, label = self._tiles()
        sheet = PIL.Image.new("RGB", (columns * side, rows * (height + label)), "white")
        draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(label - 8)
        for i in range(len(self.tokens)):
            x, y = i % columns * side, i // columns * (height + label)
            box = x + 3, y + 3, x + side - 4, y + height - 1
            tile = _enlarged(_heat(self.cosines(token)[i]), (box[2] - box[0] + 1, box[3] - box[1] + 1))
            sheet.paste(tile, box[:2])
            chosen = i == layer
            if chosen:
                draw.rectangle((x, y, x + side - 1, y + height + 2), outline=ACCENT, width=3)
            color = ACCENT if chosen else FAINT
            draw.text((x + side / 2, y + height + 3 + label / 2), str(i), fill=color, font=font, anchor="mm")
        return sheet

    def layer_at(self, x: float, y: float) -> int:
        """The layer whose tile lies at (x, y), pixels of the strip."""
        columns, _, side, height, label = self._tiles()
        found = int(y // (height + label)) * columns + min(int(x // side), columns - 1)
        return min(max(found, 0), len(self.tokens) - 1)

    def _tiles(self) -> tuple[int, int, int, int, int]:
        """Tiles in a row, rows, width and height of a tile, height of its label."""
        columns = min(len(self.tokens), STRIP[0])
        side = min(STRIP[1] // columns, 160)
        height = max(round(side * self.picture.height / self.picture.width), 8)
        return columns, math.ceil(len(self.tokens) / columns), side, height, 22

    def _frame(self, picture: PIL.Image.Image, token: tuple[int, int]) -> None:
        (rows, columns), (row, column) = self.grid, token
        width, height = picture.size
        left, top = round(column * width / columns), round(row * height / rows)
        right, bottom = round((column + 1) * width / columns) - 1, round((row + 1) * height / rows) - 1
        draw = PIL.ImageDraw.Draw(picture)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=INK, width=5)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=2)


def read(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """An image from a file, upright and RGB.

    Raises:
      BadImage: if it is none, or one of more than `MOST_PIXELS`, which is not decoded then.
    """
    try:
        with PIL.Image.open(path) as file:
            width, height = file.size
    except PIL.Image.DecompressionBombError:
        raise BadImage(f"the image has more than {MOST_PIXELS:,} pixels; make it smaller.") from None
    except (OSError, SyntaxError, ValueError):
        raise BadImage(
            "this file is no image that can be read; take a JPEG, PNG, WebP, BMP, GIF or TIFF file."
        ) from None
    if width * height > MOST_PIXELS:
        raise BadImage(
            f"the image has {width:,} x {height:,} = {width * height:,} pixels; the page takes up to {MOST_PIXELS:,}: "
            "make it smaller."
        )
    image = PIL.ImageOps.exif_transpose(decode(pathlib.Path(path).read_bytes(), "the file"))
    return image.convert("RGB")


def look(model: inference.Model, image: PIL.Image.Image, image_size: int | None = None) -> Seen:
    """The tokens of all layers, and the embedding, in one pass.

    Args:
      model: with parameters on one device or any mesh.
      image: of any size; squashed to what the model takes, so that every spot of it belongs to a token.
      image_size: pixels of a side; None takes the model's own.
    """
    preprocess = dataclasses.replace(inference.preprocess_of(model, image_size), mode="squash", exif=False)
    (out, _), *_ = inference.batches(model, _forward(preprocess), [image], preprocess.pixels, 1)
    tokens, embedding = (None if part is None else np.asarray(part) for part in out)
    assert tokens is not None
    patch = inference.vision_tower(model).config.patch_size
    rows, columns = (side // patch for side in preprocess.shape)
    scale = SHOWN / max(image.size)
    shown = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return Seen(
        image.size,
        image.resize(shown, PIL.Image.Resampling.LANCZOS),
        tokens[:, 0].reshape(len(tokens), rows, columns, -1),
        None if embedding is None else embedding[0],
    )


def check(model: inference.Model, image_size: int | None) -> None:
    """Raises a ValueError unless images can be brought to `image_size`."""
    patch = inference.vision_tower(model).config.patch_size
    if image_size is not None and (image_size < patch or image_size % patch):
        raise ValueError(f"image_size={image_size} is no multiple of the patch size, {patch} pixels.")


def scores(model: CLIP, seen: Seen, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of the image with each text, and the softmax over them, as zero-shot classification has it."""
    # In batches of one size, so that another number of texts is not compiled anew.
    padded = [*texts, *[""] * (-len(texts) % _TEXT_BATCH)]
    cosines = inference.embed_texts(model, padded, _TEXT_BATCH)[: len(texts)] @ seen.embedding
    logits = np.exp(float(model.log_scale[...])) * cosines
    odds = np.exp(logits - logits.max())
    return cosines, odds / odds.sum()


@functools.cache
def _forward(preprocess: Preprocess) -> Callable[[inference.Model, Array], tuple[Array, Array | None]]:
    """The pass from uint8 pixels to the patch tokens of all layers, [Y, B, N, D] float16, and the embeddings [B, E]."""

    def forward(model: inference.Model, pixels: Array) -> tuple[Array, Array | None]:
        tower = inference.vision_tower(model)
        depth, first = tower.config.depth, int(tower.config.class_token)
        found = tower.features(inference.normalized(pixels, preprocess), layers=range(depth + 1))
        tokens = jnp.stack([found[layer][:, first:] for layer in range(depth + 1)]).astype(jnp.float32)
        greatest = jnp.abs(tokens).max((1, 2, 3), keepdims=True)
        tokens = (tokens / jnp.maximum(greatest, 1e-30)).astype(jnp.float16)
        return tokens, unit(tower.head(found[depth])) if isinstance(model, CLIP) else None

    return forward


def _range(cosines: Float[np.ndarray, "H W"]) -> tuple[float, float]:
    """The least cosine, and the greatest but for the token's own, which is 1 and would leave the others dark."""
    ascending = np.sort(cosines, axis=None)
    return float(ascending[0]), float(ascending[max(len(ascending) - 2, 0)])


def _heat(cosines: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W 3"]:
    """Colours in 0 to 255, stretched over the range of the cosines."""
    least, greatest = _range(cosines)
    place = np.clip((cosines - least) / max(greatest - least, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(place, stops, channel) for channel in _HEAT.T], -1)


def _enlarged(colors: Float[np.ndarray, "H W 3"], size: tuple[int, int]) -> PIL.Image.Image:
    """A token is one even patch: what is between tokens the model does not say."""
    return PIL.Image.fromarray(colors.astype(np.uint8)).resize(size, PIL.Image.Resampling.NEAREST)


# ---- the page ------------------------------------------------------------------------------------------------------


def page(model: inference.Model, name: str, image_size: int | None = None) -> Any:
    """The page, a `gradio.Blocks` that `serve` puts on a port.

    Args:
      model: whose tokens are looked at.
      name: what the page calls it.
      image_size: pixels of a side that images are brought to; None takes the model's own.

    Raises:
      ModuleNotFoundError: without Gradio, saying how to install it.
      ValueError: if `image_size` is not a multiple of the model's patch size.
    """
    require()
    import gradio  # pyright: ignore[reportMissingImports]

    config = inference.vision_tower(model).config
    check(model, image_size)
    height, width = inference.preprocess_of(model, image_size).shape
    # Compiled now, so that the first image and the first text are not slow.
    blank = look(model, PIL.Image.new("RGB", (width, height)), image_size)
    if isinstance(model, CLIP):
        scores(model, blank, [""])

    def draw(seen: Seen, layer: int, token: tuple[int, int]) -> list[Any]:
        least, greatest = _range(seen.cosines(token)[layer])
        said = (
            f"Token in row {token[0] + 1}, column {token[1] + 1}, at layer {layer}. The cosines of the others with it "
            f"lie between {least:.2f} (dark) and {greatest:.2f} (bright)."
        )
        return [seen.similarity(layer, token), seen.components(layer, token), seen.strip(layer, token), said]

    def on_image(path: str | None, layer: int, texts: str = "") -> list[Any]:
        if path is None:
            return [None, None, None, None, None, "", ""]
        try:
            seen = look(model, read(path), image_size)
        except BadImage as error:
            raise gradio.Error(str(error), title="Not this file") from error
        token = seen.token((0, 0), (1, 1))  # the middle
        return [seen, token, *draw(seen, layer, token), compare(seen, texts)]

    def on_layer(seen: Seen | None, token: tuple[int, int], layer: int) -> list[Any]:
        return [gradio.skip()] * 4 if seen is None else draw(seen, layer, token)

    def on_upload_click(seen: Seen | None, layer: int, event: gradio.SelectData) -> list[Any]:
        return [gradio.skip()] * 5 if seen is None else on_token(seen, layer, event.index, seen.size)

    def on_picture_click(seen: Seen | None, layer: int, event: gradio.SelectData) -> list[Any]:
        return [gradio.skip()] * 5 if seen is None else on_token(seen, layer, event.index, seen.picture.size)

    def on_token(seen: Seen, layer: int, point: Any, size: tuple[int, int]) -> list[Any]:
        token = seen.token(point, size)
        return [token, *draw(seen, layer, token)]

    def on_tile(seen: Seen | None, layer: int, event: gradio.SelectData) -> int:
        return layer if seen is None else seen.layer_at(*event.index)

    def compare(seen: Seen | None, texts: str) -> str:
        lines = [line.strip() for line in texts.splitlines() if line.strip()]
        if seen is None or not lines or not isinstance(model, CLIP):
            return ""
        if len(lines) > MOST_TEXTS:
            raise gradio.Error(f"{len(lines)} texts were given; the page takes up to {MOST_TEXTS}.", title="Too many")
        return _bars(lines, *scores(model, seen, lines))

    def heading(text: str) -> None:
        gradio.HTML(f"<div class=heading>{text}</div>", padding=False)

    def picture(name: str, text: str) -> Any:
        buttons: Any = ["download", "fullscreen"]
        with gradio.Column(elem_classes="tight"):
            heading(text)
            return gradio.Image(interactive=False, format="png", show_label=False, buttons=buttons, elem_id=name)

    rows, columns = height // config.patch_size, width // config.patch_size
    with gradio.Blocks(title=f"{name} · pe-jax explore", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.HTML(
            f"<h1>What the tokens say</h1><p><b>{html.escape(name)}</b> · {config.depth} blocks · {rows} x {columns} "
            f"tokens of {config.patch_size} pixels. Drop an image, then click on any picture to choose a token; "
            "move the slider, or click on a tile below, to choose a layer.</p>",
            elem_id="head",
            padding=False,
        )
        seen, token = gradio.State(time_to_live=3600), gradio.State()
        with gradio.Row(equal_height=False):
            with gradio.Column(elem_classes="tight"):
                heading("Image")
                image = gradio.Image(
                    type="filepath",
                    show_label=False,
                    sources="upload",
                    buttons=[],
                    placeholder="Drop an image here, or click to choose one",
                    elem_id="image",
                )
                # The file is opened by `read`, which says what is wrong with it.
                image.preprocess = lambda payload: None if payload is None else payload.path
            similarity = picture("similarity", "Similarity to the token")
            components = picture("components", "Principal components")
        said = gradio.HTML("", elem_id="said", padding=False)
        layer = gradio.Slider(
            0,
            config.depth,
            value=round(0.8 * config.depth),  # near where PE finds its best: block 41 of G's 50 (PE §5)
            step=1,
            label="Layer",
            info=f"0 is what enters block 1, {config.depth} what leaves the last block",
            elem_id="layer",
        )
        strip = picture("strip", "Similarity to the token, layer by layer")
        texts = gradio.Textbox(
            label="Texts",
            info="one a line; their similarity to the image",
            placeholder="a photo of a dog\na photo of a cat",
            lines=3,
            max_lines=10,
            visible=isinstance(model, CLIP),
            elem_id="texts",
        )
        bars = gradio.HTML("", elem_id="bars", padding=False)

        shown = [similarity, components, strip, said]
        quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        gradio.on(
            [image.upload, image.clear], on_image, [image, layer, texts], [seen, token, *shown, bars], api_name="look"
        )
        layer.change(on_layer, [seen, token, layer], shown, api_name="layer", **quiet)
        image.select(on_upload_click, [seen, layer], [token, *shown], api_visibility="private", **quiet)
        for clicked in (similarity, components):
            clicked.select(on_picture_click, [seen, layer], [token, *shown], api_visibility="private", **quiet)
        strip.select(on_tile, [seen, layer], layer, api_visibility="private", **quiet)
        texts.input(compare, [seen, texts], bars, api_name="texts", **quiet)
    return blocks


def serve(blocks: Any, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Puts a page on a port of this machine, in threads of its own; `blocks.close()` takes it off.

    Args:
      blocks: what `page` gave.
      host: the address to listen at; the default can be reached from this machine alone.
      port: None takes the first free one from 7860.

    Returns:
      The page's address.

    Raises:
      ValueError: if the port is taken.
    """
    gradio = require()
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    try:
        _, address, _ = blocks.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MOST_BYTES,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            ssr_mode=False,
            theme=gradio.themes.Default(
                primary_hue="blue",
                neutral_hue="slate",
                font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
                font_mono=("ui-monospace", "Menlo", "monospace"),
            ),
            css=_CSS,
            app_kwargs={"middleware": [Middleware(_Alone)]},
        )
    except OSError as error:
        raise ValueError(f"the page cannot be put on port {port} of {host}: {error} Choose another --port.") from error
    return address


class _Alone:
    """Adds `POLICY` to every answer."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy)


def require() -> Any:
    """Gradio.

    Raises:
      ModuleNotFoundError: saying how to install it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read as the library is imported
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the page needs Gradio: pip install 'pe-jax[explore]'.") from error
    return gradio


def _bars(texts: Sequence[str], cosines: np.ndarray, odds: np.ndarray) -> str:
    """A table of the texts, best first; the bar is the probability."""
    rows = "".join(
        f"<tr><td>{html.escape(text)}</td><td class=bar><div style='width:{100 * share:.1f}%'></div></td>"
        f"<td>{share:.1%}</td><td>{cosine:.3f}</td></tr>"
        for cosine, share, text in sorted(zip(cosines, odds, texts, strict=True), reverse=True)
    )
    return f"<table><tr><th>text</th><th></th><th>probability</th><th>cosine</th></tr>{rows}</table>"


_CSS = f"""
#head h1 {{ font-size: 1.6rem; font-weight: 650; margin: 0.4rem 0 0.2rem; }}
#head p {{ color: {FAINT}; margin: 0; }}
.tight {{ gap: 0.35rem !important; }}
.heading {{ color: {INK}; font-size: 0.95rem; font-weight: 600; }}
#image img, #similarity img, #components img {{ cursor: crosshair; }}
#strip img {{ cursor: pointer; }}
#said {{ color: {FAINT}; font-size: 0.9rem; }}
#bars table, #bars tr, #bars th, #bars td {{ border: 0 !important; }}
#bars table {{ width: 100%; border-collapse: collapse; font-size: 0.95rem; margin: 0; }}
#bars th {{ color: {FAINT}; font-weight: 400; text-align: right; padding: 0.2rem 0.6rem; }}
#bars th:first-child, #bars td:first-child {{ text-align: left; }}
#bars td {{ text-align: right; padding: 0.3rem 0.6rem; white-space: nowrap; }}
#bars td.bar {{ width: 50%; }}
#bars td.bar div {{ background: {ACCENT}; height: 0.8rem; border-radius: 0.2rem; min-width: 2px; }}
"""

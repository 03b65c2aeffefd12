"""Writes tokens.json, pixels.json and tiles.json beside this file: what Meta's own tokenizer and transforms give.

  PERCEPTION_MODELS=/path/to/perception_models python tests/data/golden/make.py

Needs torch, torchvision and a checkout of facebookresearch/perception_models. The tests that read the files need none.
"""
# ruff: noqa: RUF001 - look-alike letters are what these texts are for

import hashlib
import importlib.util
import json
import os
import pathlib
import sys

import numpy as np
import PIL.Image

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]

CAPTIONS = [
    "",
    "   ",
    "a photo of a cat.",
    "A PHOTO of   a\tdog,\nrunning!",
    "it's the dog's; don't they'll we've I'm he'd you're",
    "Ben &amp; Jerry&#39;s &lt;b&gt;ice cream&lt;/b&gt;",
    "double &amp;amp; escaped &amp;lt;tag&amp;gt; &nbsp; &copy; &eacute;",
    "😀 smiling 👍🏽 thumbs, 👩‍👩‍👧 family, 🇯🇵 flag, ☃️ snowman",
    "naïve café façade, coöperate, Ångström, Straße, ﬁne ﬂour",
    "schÃ¶n mis-decoded â€œquotesâ€\x9d and Ã©tÃ©",
    "Привет мир, γειά σου, שלום, مرحبا, नमस्ते, สวัสดี, 你好世界, こんにちは, 안녕하세요",
    "İstanbul ΣΑΣ ſtraße 'ſ 'S 'T",
    "3.14159 + 2e10 = ½ ² ³ Ⅷ ① 1,000,000",
    "http://example.com/a_b?c=d&e=f#g @user #hashtag",
    "<start_of_text> literal <end_of_text> tokens <END_OF_TEXT><|endoftext|>",
    "x<end_of_text>y &lt;end_of_text&gt; <ſtart_of_text>",
    "zero\u200bwidth\u200d joiners\ufeff and\u00a0hard\u3000spaces",
    "control \x00 \x01 \x7f \x85 characters",
    "combining e\u0301 o\u0308 \u0c5c \u0cdc \u209d \ufffd",
    "!!!??? ... --- ((())) [[]] {{}} $$$ %%% ^^^ ~~~ ``` ||| \\\\ ///",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "jack-o'-lantern, t-shirt, St. Bernard, CRT screen, ping-pong ball, Petri dish, bull's-eye, 4x4, 3-D printer",
    "tench goldfish great white shark hammerhead stingray brambling junco kite (bird of prey) Kerry Blue Terrier",
    "word " * 100,
    "a" * 500,
    "😀" * 60,
    "the quick brown fox jumps over the lazy dog " * 3,
    "one two three four five six seven eight nine ten " * 3 + "end",
]

SIZES = [  # source (width, height), target (height, width)
    ((224, 224), (336, 336)),
    ((224, 224), (384, 384)),
    ((224, 224), (448, 448)),
    ((448, 448), (224, 224)),
    ((448, 448), (336, 336)),
    ((384, 384), (224, 224)),
    ((336, 336), (224, 224)),
    ((256, 256), (224, 224)),
    ((300, 200), (224, 224)),
    ((200, 300), (224, 224)),
    ((500, 375), (224, 224)),
    ((375, 500), (336, 336)),
    ((640, 480), (448, 448)),
    ((480, 640), (384, 384)),
    ((333, 517), (448, 448)),
    ((1280, 720), (448, 448)),
    ((97, 61), (224, 224)),
    ((449, 447), (448, 448)),
]
TILES = [  # mode, source width and height, pixels of a tile, most tiles
    ("RGB", 64, 48, 45, 16),
    ("RGB", 192, 108, 45, 36),
    ("RGB", 248, 351, 45, 36),
    ("RGB", 248, 351, 45, 4),
    ("RGB", 30, 80, 45, 16),
    ("RGB", 10, 10, 45, 36),
    ("RGB", 97, 61, 32, 5),
    ("RGB", 900, 7, 32, 16),
    ("L", 53, 97, 32, 6),
    ("P", 53, 97, 32, 6),
    ("RGBA", 120, 90, 32, 9),
    ("CMYK", 61, 47, 32, 4),
]
MODES = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1"]


def picture(mode: str, width: int, height: int) -> PIL.Image.Image:
    """Noise on smooth colour, by integer arithmetic alone: the same on every machine."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(4), indexing="ij")
    noise = (x * 7919 + y * 104729 + c * 1299709).astype(np.uint64)
    noise = (noise * np.uint64(2654435761)) % np.uint64(2**32) >> np.uint64(24)
    smooth = (x * 200 // width + y * 55 // height + c * 40) % 256
    pixels = ((3 * smooth + noise.astype(np.int64)) // 4).astype(np.uint8)
    if mode == "I;16":
        return PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 3)
    if mode == "P":  # palette by the pixels' own top bits, so that no quantizer is involved
        image = PIL.Image.fromarray(pixels[..., 0] >> 2).convert("P")
        image.putpalette([v for i in range(64) for v in (i * 4, 255 - i * 4, i * i % 256)])
        return image
    if mode == "CMYK":
        return PIL.Image.frombytes("CMYK", (width, height), pixels.tobytes())
    if mode == "LA":
        return PIL.Image.merge("LA", [PIL.Image.fromarray(pixels[..., i]) for i in (0, 3)])
    if mode == "1":
        return PIL.Image.fromarray(pixels[..., 0]).point(lambda v: 255 * (v > 127), mode="1")
    if mode == "L":
        return PIL.Image.fromarray(pixels[..., 0])
    return PIL.Image.fromarray(pixels if mode == "RGBA" else np.ascontiguousarray(pixels[..., :3]))


def cases():
    """(name, picture mode, source (w, h), target (h, w), "squash" or "crop", filter) of each stored image."""
    for source, target in SIZES:
        yield f"{source[0]}x{source[1]} to {target[0]}", "RGB", source, target, "squash", "bilinear"
    for source, target in SIZES[8:]:
        yield f"{source[0]}x{source[1]} to {target[0]} crop", "RGB", source, target, "crop", "bilinear"
        yield f"{source[0]}x{source[1]} to {target[0]} bicubic", "RGB", source, target, "squash", "bicubic"
    for mode in MODES:
        for how in ("squash", "crop"):
            yield f"{mode} {how}", mode, (120, 90), (64, 64), how, "bilinear"


def digest(image: np.ndarray) -> str:
    """Of float32 [H, W, 3], shape included."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image, np.float32).tobytes()).hexdigest()


def plm_tiles(transforms, image: PIL.Image.Image, size: int, most: int) -> np.ndarray:
    """The chunks, uint8 [C, S, S, 3], that Meta's `core.transforms.image_transform` makes of an image."""
    made, _ = transforms.get_image_transform("thumb+tile", size, most, normalize_img=False)(image.convert("RGB"))
    return (made * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def main() -> None:
    # torchvision's CUDA wheel beside a CPU torch: the operators' schemas are enough, nothing here calls them
    spec = importlib.util.spec_from_file_location("parity_conftest", ROOT / "tests/parity/conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    sys.path.insert(0, os.environ["PERCEPTION_MODELS"])
    import torchvision.transforms as T
    from core.vision_encoder import transforms

    texts = list(CAPTIONS)
    for name in ("classes_digits.txt", "templates_imagenet.txt"):
        texts += (ROOT / "pe_jax/evals/assets" / name).read_text().splitlines()
    rows = []
    short, long = transforms.get_text_tokenizer(32)(texts).tolist(), transforms.get_text_tokenizer(72)(texts).tolist()
    for text, a, b in zip(texts, short, long, strict=True):
        cut = [ids[: max(i for i, t in enumerate(ids) if t) + 1] for ids in (a, b)]  # without the padding
        rows.append({"text": text, "32": cut[0], "72": cut[1]})
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "tokens.json").write_text(f"[\n{lines}\n]\n")

    filters = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
    pixels = {}
    for name, mode, (w, h), (size, _), how, filter in cases():
        transform = transforms.get_image_transform(size, how == "crop", filters[filter])
        pixels[name] = digest(transform(picture(mode, w, h)).permute(1, 2, 0).numpy())
    (HERE / "pixels.json").write_text(json.dumps(pixels, indent=1) + "\n")

    from core.transforms import image_transform

    tiled = []
    for case in TILES:
        mode, width, height, size, most = case
        chunks = plm_tiles(image_transform, picture(mode, width, height), size, most)
        tiled.append([*case, hashlib.sha256(chunks.tobytes()).hexdigest()[:16]])
    (HERE / "tiles.json").write_text("[\n" + ",\n".join(map(json.dumps, tiled)) + "\n]\n")
    print(f"{len(rows)} texts, {len(pixels)} images, {len(tiled)} tiled")


if __name__ == "__main__":
    main()

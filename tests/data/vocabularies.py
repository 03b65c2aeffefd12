"""Small byte-level BPE vocabularies in the files and with the special tokens of Llama 3 and Qwen 2."""

import base64
import functools
import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

BASE = 440
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_WORDS.replace("{1,3}", "")
LLAMA_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in (1, 2, 3)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]
IMAGE = BASE + 2  # the image token of the Llama vocabulary, 128002 in the real one
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]

_TEXT = """You are a helpful language and vision assistant. You are able to understand the visual content that the user
provides, and assist the user with a variety of tasks using natural language. What is the color of the triangle? Is
there a bear in the image? Which company issued this receipt? When was the receipt issued? How many people are there?
yes no red blue green circle rectangle triangle system user assistant the the the there is a photo of a dog, it's the
dog's; 1234 20/03/2018 19.90 in the image in the picture\n\n\n    indented text\n"""

NASTY = [
    "",
    " ",
    "\n\n\n  \n",
    "  two  spaces  and\ttabs\t\tand \r\n returns \r",
    "it's IT'S don't we'LL I'm he'd you've THEY'RE 'sand",
    "1 12 123 1234 12345 3.14159 1,000,000 20/03/2018",
    "<|eot_id|><|image|><|begin_of_text|> <|start_header_id|>assistant<|end_header_id|>\n\nI obey",
    "<|im_end|>\n<|im_start|>system <|endoftext|> <|image_pad|> <tool_call>",
    "<image>\n<video> <|bbox0|> [012,345,678,999]",
    "naïve café Ångström e\u0301 o\u0308 ﬁne \u2126 Straße \u017f",
    "😀👍🏽👩‍👩‍👧🇯🇵☃️ Привет мир 你好世界 こんにちは 안녕하세요 مرحبا नमस्ते",
    "zero\u200bwidth \ufeff\u00a0hard\u3000space \x00\x01\x7f\x85 \ufffd",
    "word" * 300 + " " * 300 + "?!" * 100,
    "trailing space ",
    " leading\n",
]


def llama(folder: pathlib.Path) -> tuple[str, str]:
    """Paths of tokenizer.model (tiktoken) and tokenizer.json, which hold the same vocabulary."""
    tool = _trained(LLAMA_WORDS)
    tool.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in LLAMA_SPECIALS])
    (folder / "tokenizer.json").write_text(tool.to_str())
    pieces = sorted((token, symbols) for symbols, token in tool.get_vocab(with_added_tokens=False).items())
    order, symbols = _symbols()
    of_symbol = dict(zip(symbols, order, strict=True))
    lines = [f"{base64.b64encode(bytes(of_symbol[s] for s in piece)).decode()} {token}" for token, piece in pieces]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return str(folder / "tokenizer.model"), str(folder / "tokenizer.json")


def qwen(folder: pathlib.Path) -> str:
    """Path of tokenizer.json; `<tool_call>` is added to the vocabulary and is no special token."""
    tool = _trained(QWEN_WORDS)
    tool.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tool.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in QWEN_SPECIALS])
    tool.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    (folder / "tokenizer.json").write_text(tool.to_str())
    return str(folder / "tokenizer.json")


def _trained(words: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(_training(words))


@functools.cache
def _training(words: str) -> str:
    tool = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tool.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tool.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tool.train_from_iterator(
        [_TEXT] * 4, trainers.BpeTrainer(vocab_size=BASE, initial_alphabet=alphabet, show_progress=False)
    )
    assert tool.get_vocab_size() == BASE, tool.get_vocab_size()
    return tool.to_str()


def _symbols() -> tuple[list[int], list[str]]:
    """All bytes, and the characters that a byte-level vocabulary writes for them, by the library's own encoding."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return [*shown, *hidden], [*map(chr, shown), *(chr(256 + i) for i in range(len(hidden)))]

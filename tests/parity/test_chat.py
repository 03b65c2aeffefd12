"""Our tokens, masks and boxes against Meta's own modules and transformers', live.

No released vocabulary is at hand, so both sides read a small one in the same files, with Llama 3's special tokens.
The questions of `PE_JAX_DATA` are added where that is set.
"""

import functools
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest

from pe_jax.data import chat, regions, tokenizers
from pe_jax.data.chat import TEMPLATES, Conversation, from_record, render
from tests.data import vocabularies
from tests.data.test_tokenizers import random_texts

IMAGE = vocabularies.IMAGE
DATA = pathlib.Path(os.environ.get("PE_JAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data"))
FORMATS = {"plm_sft": "llama3", "warmup": "plain"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tokenizers.load(vocabularies.llama(tmp_path_factory.mktemp("llama"))[0])


@pytest.fixture(scope="module")
def plm(perception_models):
    from apps.plm import tokenizer
    from core.transforms import region_transform

    with pytest.MonkeyPatch.context() as patch:  # what it imports needs CUDA libraries, and is asked for one name
        patch.setitem(sys.modules, "core.distributed", types.SimpleNamespace(get_is_master=lambda: False))
        from core.data import data_collators

    return types.SimpleNamespace(
        tokenizer=functools.cache(functools.partial(tokenizer.PLMTokenizer, patch_size=4, pooling_ratio=2)),
        regions=region_transform.get_region_transform(),
        collator=data_collators.MllmPaddingCollator,
    )


def turns(*texts):
    return [{"from": ("human", "assistant")[i % 2], "value": text} for i, text in enumerate(texts)]


RECORDS = [
    {"conversations": turns("What is this?", "A dog."), "media": 1},
    {"conversations": turns("<image>\nWhat is this?", "A dog.", "And\nthat?", "\n\nA cat. "), "media": 5},
    {"conversations": turns("\n leading, trailing \n", " yes "), "media": 2},
    {"conversations": turns("", ""), "media": 1},
    {"conversations": turns("Text alone", "is fine", "?", "!"), "media": 0},
    {"conversations": turns("\nText <image> alone", "is fine"), "media": 0},
    {"conversations": turns("<video>\nWhat happens?\n<video>", "Nothing.", "<video>?", "no"), "media": 7},
    {"conversations": turns("A <image> and <image>?", "same", "Now <image>", "other"), "media": 3, "several": True},
    {"conversations": turns("<image><image>", "same"), "media": 2, "several": True},
    {"conversations": [{"from": "assistant", "value": "Hello."}, *turns("Hi", "Hi")], "media": 0},
    {"conversations": turns("No answer to the last", "ok", "really?"), "media": 1},
    {
        "conversations": turns(*(text for pair in zip(["?"] * 9, ["so it is"] * 9, strict=True) for text in pair)),
        "media": 1,
    },
]


def theirs(plm, path, record, name, length):
    """Meta's ids, asked positions and visual positions; None where they drop the sample."""
    import torch

    several, count = record.get("several"), record["media"]
    kind = "multi_image" if several else "image" if count else "text"
    made = plm.tokenizer(path, conversation_format=name)
    made.seq_len = length
    sample = made(record["conversations"], torch.zeros(count or 1, 3, 16, 16), kind)
    return made, sample if sample.is_valid else None


def ours(llama, record, name, length):
    images = (np.zeros((2, 2, 3), np.uint8),) * (record["media"] if record.get("several") else min(record["media"], 1))
    said = from_record({"conversations": record["conversations"], "image": images}, "it")
    sizes = {"chunk_tokens": 4, "image_token": IMAGE, "limit": length}
    return render(said, llama, TEMPLATES[FORMATS[name]], chunks=record["media"], **sizes)


def same(plm, llama, record, name, length):
    _, want = theirs(plm, llama.path, record, name, length)
    if want is None:
        with pytest.raises(chat.TooLong):
            ours(llama, record, name, length)
        return None
    got = ours(llama, record, name, length)
    assert got.ids.tolist() == want.text_ids
    assert np.flatnonzero(got.answer).tolist() == want.response_pos
    assert np.flatnonzero(got.slots >= 0).tolist() == want.image_pos
    assert got.slots[got.slots >= 0].tolist() == list(range(len(want.image_pos)))
    return got


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_tokens_and_masks_equal(plm, llama, number, name):
    record = RECORDS[number]
    if name == "warmup" and (record.get("several") or record["conversations"][0]["from"] == "assistant"):
        pytest.skip("Meta's warm-up keeps the questions of such samples, of which PLM's has none")
    whole = same(plm, llama, record, name, 10_000)
    assert whole is not None
    for length in range(1, len(whole.ids) + 3, 3):
        same(plm, llama, record, name, length)


def test_the_batch_is_metas_collators(plm, llama):
    import torch

    record, length = RECORDS[1], 200
    made, sample = theirs(plm, llama.path, record, "plm_sft", length)
    batch = plm.collator(made)(
        [
            {
                "text_ids": sample.text_ids,
                "response_pos": sample.response_pos,
                "image_pos": sample.image_pos,
                "num_image_chunks": 5,
                "media_type": "image",
                "media": torch.zeros(5, 3, 16, 16),
            }
        ]
    )
    got = ours(llama, record, "plm_sft", length)
    n = got.length
    assert n == len(got.ids) - 1
    np.testing.assert_array_equal(got.ids[:n], batch.x[0, :n])
    np.testing.assert_array_equal(got.slots[:n], batch.image_pos_index[0, :n])
    targets = np.where(batch.mask[0].numpy(), batch.y[0].numpy(), -1)
    np.testing.assert_array_equal(got.targets[:n], targets[:n])
    assert (targets[n:] == -1).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_questions_of_real_sets_equal(plm, llama, name):
    files = ["coco_questions.jsonl", "receipts_questions.jsonl", "easy_vqa/test_questions.jsonl"]
    if not (DATA / "vqa" / files[0]).is_file():
        pytest.skip(f"no questions at {DATA}/vqa; set PE_JAX_DATA to the folder of sample data")
    count = 0
    for line in (line for file in files for line in (DATA / "vqa" / file).read_text().splitlines()[::11]):
        fields = json.loads(line)
        record = {"conversations": turns(fields["question"], fields["answer"]), "media": 1 + count % 5}
        same(plm, llama, record, name, 2048)
        count += 1
    assert count > 300


def test_a_prompt_equals_metas(plm, llama):
    import torch

    made = plm.tokenizer(llama.path)
    for text in ("What?", " \nWhat? ", "<image>\nWhat is <video>?"):
        want, places = made._tokenize_for_generation(text, torch.zeros(3, 3, 16, 16))
        said = Conversation((("user", text),))
        sizes = {"chunk_tokens": 4, "image_token": IMAGE}
        got = chat.prompt(said, llama, TEMPLATES["llama3"], chunks=3, **sizes)
        assert got.ids.tolist() == want and np.flatnonzero(got.slots >= 0).tolist() == places


def test_boxes_are_written_as_metas(plm):
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(1, 900, 2).tolist()
        boxes = (rng.random((3, 4)) * [width, height, 1.2 * width, 1.2 * height] - 5).tolist()
        text = "from <|bbox2|> to <|bbox0|>, <|bbox2|>"
        (want,) = plm.regions([{"value": text}], boxes, width, height)
        assert regions.fill(text, boxes, width, height) == want["value"]


def test_frames_are_sampled_as_metas(perception_models, monkeypatch, tmp_path):
    """Their decoder needs system libraries and is asked for a count and a rate alone, which are given here."""

    class Decoder:
        def __init__(self, path, device):
            rate, count = pathlib.Path(path).read_text().split()
            self.metadata = types.SimpleNamespace(average_fps=float(rate), num_frames=int(count))

        def get_frames_at(self, indices):
            return types.SimpleNamespace(data=None)

    made = types.ModuleType("torchcodec.decoders")
    made.VideoDecoder = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", made)
    from core.transforms import video_transform

    transform, file = video_transform.get_video_transform(16), tmp_path / "film"
    for rate in (29.97, 12.5, 1):
        for count in (2, 9, 400):
            file.write_text(f"{rate} {count}")
            for start, end in ((None, None), (1, None), (0.5, 3), (2, 1), (2, 2), (None, 5000)):
                if start and int(start * rate) >= count:
                    continue  # theirs then asks for frames that are not there
                for most in (1, 8, 16):
                    _, want = transform.load_video(str(file), most, 1, start, end)
                    if max(want) < count:
                        assert chat.frame_places(count, rate, most, start, end) == want, (rate, count, start, end, most)


def test_a_box_is_drawn_as_metas(perception_models):
    import torch
    from torchvision.utils import draw_bounding_boxes

    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    for box in ([5.7, 6.2, 30.9, 33.3], [0, 0, 59, 39], [10, 10, 12, 12]):
        image = torch.from_numpy(frame).permute(2, 0, 1)
        want = draw_bounding_boxes(image, torch.tensor([box], dtype=torch.float32), colors=(255, 0, 0), width=4)
        np.testing.assert_array_equal(regions.draw(frame, box), want.permute(1, 2, 0).numpy())


# ---- transformers


@pytest.fixture(scope="module", params=["llama", "qwen"])
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return vocabularies.llama(folder)[1] if request.param == "llama" else vocabularies.qwen(folder)


def test_ids_equal_those_of_transformers(files):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=files, split_special_tokens=True)
    tokenizer = tokenizers.load(files)
    for text in vocabularies.NASTY + random_texts(500):
        ids = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        want = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == want, text
    assert tokenizer.vocab_size == len(reference)


def test_turns_equal_those_of_transformers_templates(files):
    """The released templates, without what they add by themselves: dates, tools, a default system text."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.load(files)
    reference = PreTrainedTokenizerFast(tokenizer_file=files)
    if "<|im_start|>" in tokenizer.specials:
        name, start, around = "qwen2", "", ("<|im_start|>{}\n", "<|im_end|>\n")
    else:
        name, start = "llama3", "<|begin_of_text|>"
        around = ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>")
    header = around[0].replace("{}", "' + m['role'] + '").replace("\n", "\\n")
    end = around[1].replace("\n", "\\n")
    template = (
        f"{{{{ '{start}' }}}}{{% for m in messages %}}{{{{ '{header}' + m['content'] + '{end}' }}}}{{% endfor %}}"
    )
    system = {"role": "system", "content": chat.SYSTEM}
    talk = [system, *({"role": r, "content": t} for r, t in (("user", "What?\n"), ("assistant", " yes")))]
    want = reference.apply_chat_template(talk, chat_template=template, tokenize=True, return_dict=False)
    said = Conversation((("user", "What?\n"), ("assistant", " yes")))
    got = render(said, tokenizer, TEMPLATES[name], chunks=0, chunk_tokens=1, image_token=0).ids.tolist()
    assert got == [*want, *([tokenizer.special("<|end_of_text|>")] if name == "llama3" else [])]

"""Answers of a small model: alone, in batches, streamed, cut at texts; saved and loaded; what is refused."""

import dataclasses
import json
import shutil
import types
from typing import Any

import numpy as np
import pytest

from pe_jax import assistant as assistants
from pe_jax import sharding, train
from pe_jax.assistant import Options
from pe_jax.convert import vlm as convert
from pe_jax.data import chat
from pe_jax.models import zoo
from pe_jax.models.vlm import VLM
from pe_jax.types import split
from tests import speakers
from tests.data import vocabularies
from tests.speakers import asked, picture

CONVERSATIONS = [
    asked("What is this?", picture()),
    asked("Is there a bear in the image? " * 3, picture(64, 20, 1)),
    asked("Say something."),
    asked("<image> or <image>?", picture(16, 16, 2), picture(5, 70, 3)),
    chat.Conversation(
        (("user", "Red?"), ("assistant", "no"), ("user", "Blue?")), video=np.stack([picture(8, 9, i) for i in range(5)])
    ),
]


@pytest.fixture(scope="module")
def speaker():
    return speakers.assistant()


@pytest.fixture(scope="module")
def replies(speaker):
    return speaker.reply(CONVERSATIONS, max_tokens=12)


def test_an_answer_in_a_batch_is_the_one_alone(speaker, replies):
    assert len(set(replies)) == len(replies), "the images and questions make no difference"
    for conversation, reply in list(zip(CONVERSATIONS, replies, strict=True))[::3]:
        assert speaker.reply([conversation], max_tokens=12) == [reply]


def test_a_stream_joins_to_the_answer(speaker, replies):
    pieces = list(speaker.stream(CONVERSATIONS[0], max_tokens=12))
    assert "".join(pieces) == replies[0] and len(pieces) > 3


def test_streams_of_a_batch_may_end_at_different_lengths(speaker, replies):
    prompts = [speaker.prompt(conversation) for conversation in CONVERSATIONS]
    options = [Options(5 + row) for row in range(len(prompts))]
    texts, ended = [""] * len(prompts), {}
    for piece in speaker.pieces(prompts, options):
        assert piece.row not in ended
        texts[piece.row] += piece.text
        if piece.ended:
            ended[piece.row] = (piece.ended, piece.tokens)
    assert ended == {row: ("length", 5 + row) for row in range(len(prompts))}
    assert all(whole.startswith(text.rstrip("\ufffd")) for whole, text in zip(replies, texts, strict=True))


def test_a_stop_text_ends_an_answer_also_across_tokens(speaker, replies):
    for middle in range(1, len(replies[0]) - 2):
        stop = replies[0][middle : middle + 3]
        cut = replies[0][: replies[0].index(stop)]
        writer = assistants._Writer(speaker, Options(99, stop=(stop, "never said")))
        tokens = speaker.tokenizer.encode(replies[0])
        pieces = [writer.add(token) for token in tokens if writer.ended is None]
        assert "".join(pieces) == cut and writer.ended == "stop"
    assert speaker.reply(CONVERSATIONS[:1], max_tokens=12, stop=replies[0][4:6]) == [
        replies[0][: replies[0].index(replies[0][4:6])]
    ]


def test_characters_of_several_tokens_come_whole(speaker):
    writer = assistants._Writer(speaker, Options(50))
    tokens = speaker.tokenizer.encode("né 😀!")
    pieces = [writer.add(token) for token in tokens]
    assert "".join(pieces) == "né 😀!" and "" in pieces and not any("\ufffd" in piece for piece in pieces)
    assert (writer.add(speaker.tokenizer.special("<|eot_id|>")), writer.ended, writer.tokens) == (
        "",
        "stop",
        len(tokens),
    )


def test_draws_depend_on_the_seed_alone(speaker):
    def drawn(seed):
        return speaker.reply(CONVERSATIONS[2:3], max_tokens=12, temperature=2.0, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_images_make_tiles_frames_and_visual_places(speaker):
    prompts = [speaker.prompt(conversation) for conversation in CONVERSATIONS]
    assert [len(prompt.chunks) for prompt in prompts] == [2, 4, 0, 2, 3]  # a thumbnail and its tiles, ...
    for prompt in prompts:
        places = prompt.slots >= 0
        np.testing.assert_array_equal(prompt.slots[places], np.arange(4 * len(prompt.chunks)))
        assert (prompt.ids[places] == vocabularies.IMAGE).all()


def test_a_conversation_that_the_context_does_not_hold_is_refused_with_its_numbers(speaker):
    with pytest.raises(chat.TooLong, match=r"of them visual, and the answer up to 390: more than the context of 400"):
        speaker.prompt(CONVERSATIONS[0], 390)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_tokens": 0}, "max_tokens=0"), ({"stop": ""}, "empty stop"), ({"temperature": -1.0}, "temperature=-1"),
     ({"top_p": 0.0}, "top_p=0"), ({"top_k": -1}, "top_k=-1")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_sizes_are_brought_to_few_with_little_added():
    found = [assistants.upward(n) for n in range(1, 300)]
    assert all(n <= up < 1.5 * n + 1 for n, up in zip(range(1, 300), found, strict=True))
    assert len(set(found)) < 18 and assistants.upward(0) == 0


def test_a_saved_assistant_is_loaded_with_all_its_settings(speaker, replies, tmp_path):
    folder = str(tmp_path / "saved")
    assistants.save(speaker, folder)
    loaded = assistants.load(folder)
    assert loaded.to_dict() == speaker.to_dict() and loaded.config == speaker.config and loaded.name == "saved"
    assert loaded.reply(CONVERSATIONS[:1], max_tokens=12) == replies[:1]
    other = assistants.load(folder, max_tiles=1, frames=2, template="plain")
    assert (other.vision.max_tiles, other.vision.frames) == (1, 2) and other.template == chat.template("plain")


def test_over_a_mesh_the_answers_are_the_same(speaker, replies, tmp_path):
    folder = str(tmp_path / "saved")
    assistants.save(speaker, folder)
    loaded = assistants.load(folder, mesh=sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert loaded.reply(CONVERSATIONS, max_tokens=12) == replies


def test_a_run_says_how_it_was_trained():
    config = {
        "stage": {"name": "language"},
        "data": {"name": "chat", "tokenizer": "t", "template": "qwen2", "max_tiles": 4, "frames": 6, "length": 99},
        "phases": [{"image_size": 224}, {"image_size": 448}],
    }
    assert assistants.of_run(config) == {
        "tokenizer": "t", "template": "qwen2", "max_tiles": 4, "frames": 6, "image_size": 448,
    }  # fmt: skip


def test_what_is_missing_or_does_not_fit_is_said(speaker, tmp_path):
    with pytest.raises(ValueError, match="does not say which tokenizer and template belong to it; say it: --tokenizer"):
        assistants.assembled(speaker.model, {}, "runs/x")
    with pytest.raises(ValueError, match="is a VisionTower, which has no language model"):
        assistants.assembled(speaker.model.vision, {}, "runs/x")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        assistants.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no special token '<|im_start|>'".replace("|", r"\|")):
        dataclasses.replace(speaker, template=chat.template("qwen2"))
    with pytest.raises(ValueError, match="does not fit the tower, of patches of 4 px"):
        dataclasses.replace(speaker, vision=chat.Vision(16, 8, 2))
    small = dataclasses.replace(speakers.READER, vocab_size=500)
    with pytest.raises(ValueError, match="has 696 tokens, the model 500"):
        model = zoo.abstract(dataclasses.replace(speakers.CONFIG, decoder=small))
        dataclasses.replace(speaker, model=model)


def test_questions_in_training_are_answered_as_the_run_is_told_to(speaker):
    """What the loop gives to its evaluators: the model alone, or one that answers with the run's own settings."""
    graphdef, params = split(speaker.model)
    data = {"tokenizer": speaker.tokenizer.path, "template": "plain", "max_tiles": 2, "frames": 5}
    run = types.SimpleNamespace(evals={"a": {"name": "vlm"}, "b": {"name": "knn"}}, data=data, image_size=24)
    state = types.SimpleNamespace(params=params)
    loop: Any = types.SimpleNamespace(graphdef=graphdef, state=state, run=run, workdir="runs/x")
    given = train._Loop._evaluated(loop, "a")
    assert given.vision == chat.Vision(24, 4, 2, max_tiles=2, frames=5) and given.template == chat.template("plain")
    assert isinstance(train._Loop._evaluated(loop, "b"), VLM)


def test_a_folder_of_perception_lm_is_loaded_with_what_its_processor_says(speaker, replies, tmp_path):
    folder = tmp_path / "plm"
    convert.write(folder, split(speaker.model)[1], speaker.config)
    shutil.copy(speaker.tokenizer.path, folder / "tokenizer.json")
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_num_tiles": 3}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": 3}))
    loaded = assistants.load(str(folder))
    assert loaded.to_dict() == speaker.to_dict()
    assert loaded.reply(CONVERSATIONS[:1], max_tokens=12) == replies[:1]

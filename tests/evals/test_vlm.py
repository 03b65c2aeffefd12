"""Questions about records: scored by task, kept and not asked again, left out where they cannot be read."""

import dataclasses
import json
import re

import numpy as np
import PIL.Image
import pytest

from pe_jax import evals
from pe_jax.data import chat
from pe_jax.evals import records, vlm
from tests import speakers

VISION = chat.Vision(16, 4)


@dataclasses.dataclass
class Parrot:
    """Answers with what stands behind "say:" in the question, or by the brightness of the image."""

    vision: chat.Vision = VISION
    model: object = None
    heard: list = dataclasses.field(default_factory=list)

    def to_dict(self):
        return {"kind": "parrot"}

    def prompt(self, conversation, max_tokens=1):
        return conversation.turns, self.vision.chunks(conversation)

    def greedy(self, prompts, max_tokens):
        self.heard.append([turns[0][1] for turns, _ in prompts])
        found = [re.search(r"say:(.*)", turns[0][1]) for turns, _ in prompts]
        bright = ["a white wall" if chunks.mean() > 128 else "a black dog" for _, chunks in prompts]
        return [match[1].strip() if match else light for match, light in zip(found, bright, strict=True)]


def write(folder, lines):
    for name, value in (("black", 0), ("white", 255)):
        PIL.Image.fromarray(np.full((9, 12, 3), value, np.uint8)).save(folder / f"{name}.png")
    (folder / "data.jsonl").write_text("".join(json.dumps({"image": "black.png"} | line) + "\n" for line in lines))
    return {"name": "jsonl", "path": str(folder / "data.jsonl")}


def scored(folder, task, lines, speaker=None, **more):
    config = {"name": "vlm", "task": task, "data": write(folder, lines), "batch_size": 3}
    return evals.create(config | more)(speaker or Parrot())


@pytest.mark.parametrize(
    ("task", "lines", "figures"),
    [
        ("anls", [{"question": "say: sitting", "answers": ["kitten", "x"]}, {"question": "say: a", "answer": "b"}],
         {"anls": (1 - 3 / 7) / 2}),
        ("relaxed", [{"question": "say: 104", "answer": "100"}, {"question": "say: 106", "answer": 100}],
         {"relaxed": 0.5}),
        ("vqa", [{"question": "say: Dog.", "answers": ["dog"] * 2 + ["cat"] * 8},
                 {"question": "say: two", "answers": [{"answer": "2"}] * 10}], {"vqa": 0.8}),
        ("exact", [{"question": "say: Agatha", "answer": "agatha"}, {"question": "say: b", "answers": ["c", "d"]}],
         {"exact": 0.5}),
        ("choice", [{"question": "say: B", "choices": ["x", "y"], "answer": 1},
                    {"question": "say: (A)", "choices": ["x", "y"], "answer": "B"},
                    {"question": "say: x", "choices": ["x", "y"], "answer": "x"},
                    {"question": "say: neither", "choices": ["x", "y"], "answer": "A"}],
         {"accuracy": 0.5, "named": 0.75}),
        ("yes_no", [{"question": "say: Yes", "answer": "yes", "category": "random"},
                    {"question": "say: Yes.", "answer": "no", "category": "popular"},
                    {"question": "say: no", "answer": "No", "category": "random"}],
         {"accuracy": 2 / 3, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes": 2 / 3, "random_f1": 1.0,
          "popular_accuracy": 0.0}),
        ("box", [{"question": "say: [100,200,300,600]", "bbox": [10, 20, 20, 40], "width": 100, "height": 100},
                 {"question": "say: nothing", "bbox": [[10, 20, 20, 40]], "width": 100, "height": 100}],
         {"p50": 0.5, "iou": 0.5}),
        ("caption", [{"captions": ["a black dog", "a dog"]}, {"image": "white.png", "caption": "a white wall"},
                     {"image": "white.png", "caption": "something else here"}], {}),
    ],
)  # fmt: skip
def test_a_task_is_scored_as_its_benchmark(tmp_path, task, lines, figures):
    found = scored(tmp_path, task, lines)
    assert found | figures == pytest.approx(found) and (found["count"], found["bad"]) == (len(lines), 0)
    if task == "caption":
        assert found["cider_d"] > 1


def test_a_question_is_put_as_its_task_wants_it_or_as_said(tmp_path):
    parrot = Parrot()
    line = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}
    scored(tmp_path, "choice", [line], parrot)
    scored(tmp_path, "choice", [line], parrot, prompt="Q: {} A:")
    scored(tmp_path, "caption", [{"caption": "x"}], parrot)
    asked = "Which?\nA. red\nB. blue"
    wanted = [f"{asked}\nAnswer with the option's letter from the given choices directly.", f"Q: {asked} A:"]
    assert [heard[0] for heard in parrot.heard] == [*wanted, vlm.PROMPTS["caption"]]


def test_figures_of_several_data_sets_are_averaged(tmp_path):
    for part, reply in (("val", "yes"), ("test", "no")):
        (tmp_path / part).mkdir()
        write(tmp_path / part, [{"question": f"say: {reply}", "answer": "yes"}] * (2 if part == "val" else 6))
    data = {"name": "jsonl", "path": f"{tmp_path}/{{part}}/data.jsonl"}
    found = evals.create({"name": "vlm", "task": "exact", "data": data, "parts": ["val", "test"]})(Parrot())
    assert (found["exact"], found["count"]) == (0.5, 8)


def test_what_cannot_be_read_is_left_out_and_counted_up_to_a_limit(tmp_path):
    lines = [{"question": "say: a", "answer": "a"}, {"image": "none.png", "question": "say: a", "answer": "a"}]
    found = scored(tmp_path, "exact", lines, max_bad=1)
    assert (found["exact"], found["count"], found["bad"]) == (1.0, 1, 1)
    with pytest.raises(ValueError, match=r"1 records cannot be used, and 0 are allowed.*none\.png"):
        scored(tmp_path, "exact", lines)


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("vqa", {"question": "q", "answers": ["a"]}, "at least 4"),
        ("exact", {"question": "q"}, "want a text or a list"),
        ("exact", {"answer": "q"}, "question is None; want a question. The fields are"),
        ("choice", {"question": "q", "answer": 0}, "choices is None; want a list"),
        ("choice", {"question": "q", "choices": ["a"], "answer": 1}, "want the place of one of 1 choices"),
        ("yes_no", {"question": "q", "answer": "maybe"}, "want yes or no"),
        ("box", {"question": "q", "bbox": [1, 2, 3]}, r"want \[x, y, width, height\]"),
        ("caption", {"question": "q"}, "has no captions or caption"),
    ],
)
def test_a_record_without_what_its_task_needs_is_named(tmp_path, task, line, message):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, task, [line])


def test_an_evaluator_that_cannot_run_says_why(tmp_path):
    with pytest.raises(ValueError, match="task='vqaa' is unknown; the tasks are anls"):
        scored(tmp_path, "vqaa", [{}])
    with pytest.raises(ValueError, match=r"wants one \{\} where"):
        scored(tmp_path, "vqa", [{}], prompt="no question")
    with pytest.raises(ValueError, match="a str cannot answer; load a vision-language model"):
        scored(tmp_path, "exact", [{"question": "q", "answer": "a"}], "a model")


# ---------------------------------------------------------------------------------------------------------------- files


def asking(tmp_path, **more):
    return vlm.Asking(max_tokens=4, batch_size=2, folder=str(tmp_path / "kept"), **more)


def questions(tmp_path, count=5):
    rows = records.open(write(tmp_path, [{"row": i} for i in range(count)]))
    return vlm.about_media(rows, "say: yes")


def test_kept_replies_are_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "KEPT", 2)
    parrot, seen = Parrot(), []
    first = vlm.ask(parrot, questions(tmp_path), asking(tmp_path))
    assert [next(first)["row"] for _ in range(3)] == [0, 1, 2]
    first.close()  # killed within the second file, which was written before it was told
    lines = list(vlm.ask(parrot, questions(tmp_path), asking(tmp_path), lambda done, total: seen.append((done, total))))
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4] and seen == [(1, 1)]
    assert [len(heard) for heard in parrot.heard] == [2, 2, 1]
    files = sorted(file.name for file in (tmp_path / "kept").glob("*.jsonl"))
    assert files == [f"replies-{i:05}-of-00003.jsonl" for i in range(3)]
    assert lines[0] == {"row": 0, "file": f"{tmp_path}/data.jsonl record 0", "reply": "yes"}


def test_processes_share_the_records_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "KEPT", 2)
    found = [list(vlm.ask(Parrot(), questions(tmp_path), asking(tmp_path, part=(i, 2)))) for i in range(2)]
    assert [[line["row"] for line in own] for own in found] == [[0, 1, 4], [2, 3]]
    with pytest.raises(ValueError, match="needs a folder"):
        vlm.Asking(4, part=(0, 2))


def test_a_folder_of_other_replies_is_refused(tmp_path):
    list(vlm.ask(Parrot(), questions(tmp_path), asking(tmp_path, about={"prompt": "a"})))
    with pytest.raises(ValueError, match="holds replies with prompt=a, and now it is b; take another folder"):
        list(vlm.ask(Parrot(), questions(tmp_path), asking(tmp_path, about={"prompt": "b"})))


def test_rows_with_as_many_chunks_are_asked_together(tmp_path):
    for i, (height, width) in enumerate([(16, 16), (16, 48), (16, 16), (16, 48)]):
        PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png"} for i in range(4)]
    rows = records.open(write(tmp_path, lines))
    parrot = Parrot(chat.Vision(16, 4, max_tiles=3))
    shapes = []
    parrot.prompt = lambda conversation, _: (
        shapes.append(parrot.vision.count(conversation))
        or (
            conversation.turns,
            parrot.vision.chunks(conversation),
        )
    )
    told = list(vlm.ask(parrot, vlm.about_media(rows, "say: x"), vlm.Asking(4, batch_size=2)))
    assert [line["row"] for line in told] == [0, 1, 2, 3] and sorted(shapes[:2]) != sorted(shapes[2:])


def test_a_real_model_is_scored_and_its_replies_are_its_own(tmp_path):
    speaker = speakers.assistant()
    lines = [{"question": f"What is {i}?", "answer": "x"} for i in range(3)]
    found = scored(tmp_path, "exact", lines, speaker, max_tokens=5, replies=str(tmp_path / "kept"))
    assert (found["exact"], found["count"]) == (0.0, 3)
    kept = [json.loads(line)["reply"] for line in (tmp_path / "kept/replies-00000-of-00001.jsonl").open()]
    question = vlm.PROMPTS["exact"].replace("{}", "What is 1?")
    image = np.zeros((9, 12, 3), np.uint8)
    assert kept[1] == speaker.reply([speakers.asked(question, image)], max_tokens=5)[0]

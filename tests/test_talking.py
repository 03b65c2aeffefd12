"""The commands `chat`, `caption` and `evaluate --suite` on a small model, as a user types them."""

import io
import json

import PIL.Image
import pytest

from pe_jax import assistant as assistants
from pe_jax import cli
from tests import speakers
from tests.speakers import asked, picture


@pytest.fixture
def loaded(monkeypatch):
    """Commands get the model that is compiled already, whatever path they name; test_assistant.py loads from files."""
    monkeypatch.setattr(assistants, "load", lambda path, **_: speakers.assistant())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        PIL.Image.fromarray(picture(seed=i)).save(folder / f"{i}.png")
    return folder


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_chat_prints_the_answer_to_a_prompt_or_to_the_input(loaded, pictures, capsys, monkeypatch):
    given = ("chat", "--model", "x", "--image", pictures / "0.png", "--max-tokens", 9)
    code, printed = run(capsys, *given, "--prompt", "What is this?")
    wanted = speakers.assistant().reply([asked("What is this?", picture())], max_tokens=9)[0]
    assert code == 0 and printed.out == wanted + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n"))
    assert run(capsys, *given)[1].out == wanted + "\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_chat_in_a_terminal_keeps_the_conversation_and_begins_others(loaded, pictures, capsys, monkeypatch):
    lines = ["What?", "And now?", "/image none.png", "Who?", f"/image {pictures / '0.png'}", "What?", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines)))
    code, printed = run(capsys, "chat", "--model", "x", "--image", pictures / "0.png", "--max-tokens", 4)
    speaker = speakers.assistant()
    first = speaker.reply([asked("What?", picture())], max_tokens=4)[0]
    talk = asked("What?", picture())
    turns = (*talk.turns, ("assistant", first), ("user", "And now?"))
    second = speaker.reply([type(talk)(turns, talk.images)], max_tokens=4)[0]
    assert code == 0 and printed.out.count(first) == 2 and second in printed.out and first != second
    assert "none.png" in printed.err and "never" not in printed.out


def test_a_model_that_is_not_there_is_said_and_so_is_one_that_cannot_answer(tmp_path, capsys):
    for command in (("chat", "--prompt", "?"), ("serve",)):
        code, printed = run(capsys, command[0], "--model", tmp_path / "none", *command[1:])
        assert code == 2 and "none does not exist; give a run's workdir" in printed.err


def test_chat_refuses_images_beside_a_video(capsys):
    code, printed = run(capsys, "chat", "--model", "x", "--image", "a.png", "--video", "b.mp4", "--prompt", "?")
    assert code == 2 and "either --image or --video" in printed.err


def test_caption_writes_a_reply_for_every_image_and_goes_on(loaded, pictures, tmp_path, capsys):
    given = ("caption", pictures, "--model", "x", "--prompt", "What is this?", "--max-tokens", 9)
    code, printed = run(capsys, *given, "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(printed.out) == {
        "folder": str(tmp_path / "out"), "records": 3, "replies": 3, "left_out": 0,
    }  # fmt: skip
    file = tmp_path / "out" / "replies-00000-of-00001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["file"] for line in lines] == [str(pictures / f"{i}.png") for i in range(3)]
    assert lines[0]["reply"] == speakers.assistant().reply([asked("What is this?", picture())], max_tokens=9)[0]
    stamp = file.stat().st_mtime_ns
    code, printed = run(capsys, *given, "--out", tmp_path / "out")
    assert (code, file.stat().st_mtime_ns) == (0, stamp) and printed.out.startswith("3 replies in")
    code, printed = run(capsys, *given, "--out", tmp_path / "out", "--template", "plain", "--limit", 2)
    assert code == 2 and "holds replies with" in printed.err


def test_caption_leaves_out_what_it_may(loaded, tmp_path, capsys):
    PIL.Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    given = ("caption", tmp_path, "--model", "x", "--max-tokens", 9, "--out", tmp_path / "out")
    code, printed = run(capsys, *given)
    assert code == 2 and "1 records cannot be used, and 0 are allowed" in printed.err and "b.png" in printed.err
    code, printed = run(capsys, *given, "--max-bad", 1)
    assert code == 0 and "1 replies" in printed.out and "1 left out" in printed.out and "b.png" in printed.err


def test_a_suite_of_questions_is_answered_and_tabled(loaded, pictures, tmp_path, capsys):
    lines = [{"image": str(pictures / f"{i}.png"), "question": "?", "choices": ["a", "b"], "answer": 0} for i in (0, 1)]
    (tmp_path / "ai2d").mkdir()
    (tmp_path / "ai2d" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("evaluate", "--model", "x", "--suite", "vlm", "--data", tmp_path, "--out", tmp_path / "results")
    code, printed = run(capsys, *given, "--batch-size", 2)
    assert code == 0 and "paper: PE-Lang-G14-448" in printed.out
    content = json.loads((tmp_path / "results" / "vlm.json").read_text())
    done = next(own for own in content["datasets"] if own["name"] == "AI2D")
    assert done["status"] == "done" and content["values"]["AI2D"] == 100 * done["card"]["figures"]["accuracy"]
    assert list((tmp_path / "results" / "results").glob("AI2D-*/replies-*.jsonl"))  # where a killed run goes on
    code, printed = run(capsys, *given, "--batch-size", 2, "--only", "AI2D", "--json")
    assert json.loads(printed.out)["datasets"][0]["status"] == "kept"


def test_questions_and_towers_do_not_go_together(tmp_path, capsys):
    suite = {
        "datasets": [
            {"name": "a", "columns": {"a": "exact"}, "evaluator": {"name": "vlm", "task": "exact"}},
            {"name": "b", "columns": {"b": "top1"}, "evaluator": {"name": "zero_shot"}},
        ]
    }
    (tmp_path / "both.json").write_text(json.dumps(suite))
    code, printed = run(capsys, "evaluate", "--model", "x", "--suite", tmp_path / "both.json", "--data", tmp_path)
    assert code == 2 and "some evaluators ask a language model and some do not" in printed.err

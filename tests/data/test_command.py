"""`pe-jax data`: digits, inspect, convert, rows."""

import argparse
import json
import os
import time

import numpy as np
import pytest

from pe_jax.commands import data
from pe_jax.data import sources
from pe_jax.data.image import Preprocess, decode
from tests.data import films, vocabularies


def call(capsys, *words) -> tuple[int, dict]:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    code = data.run(parser.parse_args([*words, "--json"]))
    return code, json.loads(capsys.readouterr().out)


def test_digits_are_written(tmp_path, capsys):
    pytest.importorskip("sklearn")
    code, result = call(capsys, "digits", str(tmp_path / "d"), "--size", "16")
    assert code == 0 and result["train"] == 1438 and result["test"] == 359
    assert decode(next((tmp_path / "d/test").iterdir())).size == (16, 16)


@pytest.mark.parametrize("name", ["jsonl", "webdataset", "array_record"])
def test_inspect_counts_records_and_draws_them(small, tmp_path, capsys, name):
    sheet = tmp_path / "sheet.png"
    code, result = call(capsys, "inspect", small.config(name)["path"], "--sheet", str(sheet), "--show", "7")
    assert code == 0 and result["records"] == result["read"] == 23 and result["bad"] == 0
    assert result["width"] == "24 to 30" and result["height"] == "20 to 36" and result["modes"] == "RGB (23)"
    assert result["captions"] == small.captions[:5]
    assert decode(sheet).size == (6 * 168 + 8, 2 * 212 + 8)


def test_inspect_counts_and_names_bad_images(small, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = small.folder / "images/000.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    rows = [(good, "fine"), ("cut.png", "x"), (good, ""), ("none.png", "y")]
    path.write_text("".join(json.dumps({"image": str(image), "caption": caption}) + "\n" for image, caption in rows))
    code, result = call(capsys, "inspect", str(path))
    assert code == 1 and result["bad"] == 3 and result["records"] == 4
    assert all(f"a.jsonl record {i}" in message for i, message in zip((1, 2, 3), result["bad_records"], strict=True))
    data.run(argparse.Namespace(action="inspect", source=str(path), sheet=None, show=2, limit=0, json=False))
    assert "bad: 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["jsonl", "packed", "webdataset"])
def test_convert_keeps_every_record(small, tmp_path, capsys, name):
    code, result = call(capsys, "convert", small.config(name)["path"], str(tmp_path / "out"), "--shards", "3")
    assert code == 0 and result["written_records"] == 23 and result["kept"] == 0
    source = sources.create({"name": "array_record", "path": str(tmp_path / "out")})
    assert [source[i]["image"] for i in range(23)] == small.images
    assert [source[i]["caption"] for i in range(23)] == small.captions


def test_convert_goes_on_with_the_shards_that_are_missing(small, tmp_path, capsys):
    words = ("convert", small.config("jsonl")["path"], str(tmp_path / "out"), "--shards", "4")
    call(capsys, *words)
    shards = sorted((tmp_path / "out").glob("*.array_record"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    os.remove(shards[2])
    (tmp_path / "out" / (shards[2].name + ".partial")).write_bytes(b"what a killed process left")
    time.sleep(0.01)
    _, result = call(capsys, *words)
    assert result["kept"] == 3 and result["written_records"] == 6
    assert [s.stat().st_mtime_ns for s in shards if s != shards[2]] == [t for i, t in enumerate(before) if i != 2]
    assert len(sources.create({"name": "array_record", "path": str(tmp_path / "out")})) == 23


def test_convert_does_not_mix_two_conversions(small, tmp_path, capsys):
    call(capsys, "convert", small.config("jsonl")["path"], str(tmp_path / "out"), "--shards", "2")
    with pytest.raises(ValueError, match="holds another conversion"):
        call(capsys, "convert", small.config("jsonl")["path"], str(tmp_path / "out"), "--shards", "3")


def test_convert_stops_at_a_bad_record_unless_told_to_leave_it_out(small, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [small.folder / "images/000.png", "none.png", small.folder / "images/001.png"]
    path.write_text("".join(json.dumps({"image": str(image), "caption": "x"}) + "\n" for image in rows))
    with pytest.raises(ValueError, match=r"none.png does not exist. Use --skip-bad"):
        call(capsys, "convert", str(path), str(tmp_path / "out"))
    code, result = call(capsys, "convert", str(path), str(tmp_path / "other"), "--skip-bad")
    assert code == 0 and result["left_out"] == 1 and result["written_records"] == 2


def test_convert_turns_arrays_into_png(tmp_path, capsys):
    config = {"name": "synthetic", "records": 4, "size": 12}
    call(capsys, "convert", json.dumps(config), str(tmp_path / "out"))
    source = sources.create({"name": "array_record", "path": str(tmp_path / "out")})
    want = sources.create(config)[2]["image"]
    assert (Preprocess(12).pixels(source[2]["image"]) == want).all()


def test_more_shards_than_records_are_refused(small, tmp_path, capsys):
    with pytest.raises(ValueError, match="--shards 24 must lie between 1 and the number of records, 23"):
        call(capsys, "convert", small.config("jsonl")["path"], str(tmp_path / "out"), "--shards", "24")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A list of three videos, of which the last is none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "wide.mp4").write_bytes(films.film(count=47, size=(96, 48)))
    (folder / "high.webm").write_bytes(
        films.film("webm", "libvpx-vp9", 12, size=(48, 64), options={"deadline": "realtime", "cpu-used": "8"})
    )
    (folder / "bad.mp4").write_bytes(b"none")
    lines = [{"video": name, "caption": name} for name in ("wide.mp4", "high.webm", "bad.mp4")]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "a.jsonl"


def test_inspect_counts_videos_and_draws_eight_frames_of_each(videos, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, result = call(capsys, "inspect", str(videos), "--sheet", str(sheet))
    assert code == 1 and result["bad"] == 1
    assert "a.jsonl record 2: " in result["bad_records"][0] and "bad.mp4 is no video" in result["bad_records"][0]
    assert (result["frames"], result["fps"]) == ("12 to 47", "25 to 25")
    assert (result["width"], result["height"]) == ("48 to 96", "48 to 64")
    assert result["codecs"] == "h264 (1), vp9 (1)" and result["captions"] == ["wide.mp4", "high.webm"]
    page = decode(sheet).convert("RGB")
    assert page.size == (8 * 162 - 2 + 16, (80 + 26) + (160 + 26) + 8)
    shown = [films.number(np.asarray(page.crop((8 + 162 * i, 8, 168 + 162 * i, 88)))) for i in range(8)]
    assert shown == [0, 6, 13, 19, 26, 32, 39, 46]


def test_convert_keeps_the_bytes_of_videos(videos, tmp_path, capsys):
    code, result = call(capsys, "convert", str(videos), str(tmp_path / "out"))
    assert code == 0 and result["written_records"] == 3
    source = sources.create({"name": "array_record", "path": str(tmp_path / "out")})
    for i, name in enumerate(("wide.mp4", "high.webm", "bad.mp4")):
        assert source[i] == {"caption": name, "video": (videos.parent / name).read_bytes()}


def test_rows_tell_how_full_they_get_and_show_one(small, tmp_path, capsys):
    vocabularies.llama(tmp_path)
    words = ["rows", small.config("jsonl")["path"], "--tokenizer", str(tmp_path), "--length", "300", "--chunks", "9"]
    words += ["--image-size", "16", "--patch-size", "4", "--max-tiles", "2", "--groups", "2", "--row", "40"]
    code, result = call(capsys, *words, "--sheet", str(tmp_path / "row.png"))
    assert code == 0 and result["rows"] == 64 and result["bad_records"] == result["too_long"] == 0
    assert 1 < result["samples"] <= 3 and 0.7 < result["tokens"] < 1
    assert result["visual"] == pytest.approx(4 * 9 * result["chunks"] / 300, abs=1e-3)
    assert 0 < result["asked"] < result["tokens"] - result["visual"]
    page = np.array(decode(tmp_path / "row.png"))
    assert page.shape[1] == 1200
    assert (page == (200, 240, 200)).all(-1).any()  # what is asked
    assert len(np.unique(page[:, 12:124].reshape(-1, 3), axis=0)) > 100  # the first chunk of a sample


def test_rows_of_a_template_that_is_not_the_tokenizers_are_refused(small, tmp_path, capsys):
    vocabularies.llama(tmp_path)
    words = ["rows", small.config("jsonl")["path"], "--tokenizer", str(tmp_path), "--template", "qwen2"]
    with pytest.raises(ValueError, match="choose the template that belongs to this tokenizer"):
        call(capsys, *words)


def test_conversations_are_inspected_and_converted_with_all_their_images(small, tmp_path, capsys):
    turns = [{"from": "human", "value": "Which?"}, {"from": "assistant", "value": "both"}]
    paths = [str(small.folder / f"images/{i:03d}.png") for i in range(3)]
    lines = [
        {"image": paths, "conversations": turns},
        {"conversations": turns},
        {"image": "none.png", "conversations": []},
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = json.dumps({"name": "conversations", "path": str(tmp_path / "talks.jsonl")})
    code, result = call(capsys, "inspect", source, "--sheet", str(tmp_path / "sheet.png"))
    assert code == 1 and result["read"] == 3 and result["bad"] == 1 and result["captions"] == ["Which? / both"] * 2
    assert decode(tmp_path / "sheet.png").width > 3 * 100
    code, result = call(capsys, "convert", source, str(tmp_path / "out"), "--skip-bad")
    assert code == 0 and result["written_records"] == 2 and result["left_out"] == 1
    copied = sources.create({"name": "array_record", "path": str(tmp_path / "out")})
    assert copied[0] == {"image": small.images[:3], "conversations": turns} and copied[1] == {"conversations": turns}

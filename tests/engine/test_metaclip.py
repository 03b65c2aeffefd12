"""Curation equals a brute-force program, in memory and on Beam; the same bytes from any number of workers."""

import collections
import gzip
import io
import json
import math
import pathlib
import random
import re

import PIL.Image
import pytest

from pe_jax import cli
from pe_jax.data import sources
from pe_jax.engine import metaclip, metaclip_beam
from pe_jax.engine.metaclip import Curation

ENTRIES = [
    "cat",
    "a cat",
    "cat and dog",
    "dog",
    "New York",
    "york",
    "red  car",
    "hot , dog",
    "St. Louis",
    "a",
    "é",
    "7",
]
PIECES = ["cat", "a", "and", "dog", "New", "York", "york", "red", "car", "", "hot", "St.", "Louis", "é", "7", "cats"]


def corpus(records: int = 2000) -> list[dict]:
    """Captions of pieces in skewed proportions, joined by blanks and marks; some images and pairs come again."""
    rng = random.Random(0)
    found = []
    for _ in range(records):
        words = rng.choices(PIECES, weights=range(len(PIECES), 0, -1), k=rng.randint(1, 6))
        text = "".join(word + rng.choice([" ", " ", " ", ", ", ".", "\t", " ,", "\n"]) for word in words)
        found.append({"url": f"https://example.org/{rng.randrange(records // 2)}.jpg", "caption": text, "width": 64})
    return found


def write_jsonl(path: pathlib.Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines_of(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("data-*")) for line in path.read_text().splitlines()]


def contents(out: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def brute_force(caption: str, entries: list[str]) -> list[int]:
    """The published rule, one entry after the other, one letter after the other."""
    text = "".join(f" {c} " if c in ",.;:?!`" else " " if c in "\t\n\r" else c for c in f" {caption} ")
    return [number for number, entry in enumerate(entries) if f" {entry} " in text]


# ---- matching ------------------------------------------------------------------------------------------------------


def test_matches_equal_brute_force():
    matcher = metaclip.Matcher(ENTRIES)
    texts = [record["caption"] for record in corpus()]
    assert [matcher(text) for text in texts] == [brute_force(text, ENTRIES) for text in texts]


def test_matches_equal_brute_force_for_random_letters():
    rng = random.Random(1)
    entries = list({"".join(rng.choices("ab ,", k=rng.randint(1, 6))).strip() for _ in range(300)} - {""})
    matcher = metaclip.Matcher(entries)
    for _ in range(500):
        text = "".join(rng.choices("aab  ,.\t", k=rng.randint(0, 25)))
        assert matcher(text) == brute_force(text, entries), text


@pytest.mark.parametrize(
    ("caption", "matched"),
    [
        ("a cat", ["cat", "a cat", "a"]),
        ("cats", []),
        ("Cat", []),
        ("cat,dog", ["cat", "dog"]),
        ("hot,dog", ["dog", "hot , dog"]),
        ("hot, dog", ["dog"]),
        ("red car", []),
        ("red\t\tcar", ["red  car"]),
        ("St. Louis", []),
        ("cat-dog", []),
        ("", []),
    ],
)
def test_an_entry_matches_between_blanks_alone(caption, matched):
    assert [ENTRIES[i] for i in metaclip.Matcher(ENTRIES)(caption)] == matched


def test_entries_that_cannot_match_are_known():
    assert [entry for entry in ENTRIES if not metaclip.can_match(entry)] == ["St. Louis"]
    matched = {i for record in corpus() for i in brute_force(record["caption"], ENTRIES)}
    assert all(metaclip.can_match(ENTRIES[i]) for i in matched)


# ---- balancing -----------------------------------------------------------------------------------------------------


def test_draws_are_uniform_independent_and_repeatable():
    keys = [i.to_bytes(16, "big") for i in range(20_000)]
    draws = [metaclip.draw(key, "cat", 0) for key in keys]
    assert draws == [metaclip.draw(key, "cat", 0) for key in keys]
    assert min(draws) >= 0 and max(draws) < 1
    bins = collections.Counter(int(10 * x) for x in draws)
    assert all(abs(bins[i] - 2000) < 5 * math.sqrt(2000) for i in range(10))
    for other in ([metaclip.draw(key, "dog", 0) for key in keys], [metaclip.draw(key, "cat", 1) for key in keys]):
        both = sum(x < 0.5 and y < 0.5 for x, y in zip(draws, other, strict=True))
        assert abs(both - 5000) < 5 * math.sqrt(5000)


def test_a_pair_is_kept_when_any_of_its_entries_draws_it():
    chance, entries = {0: 0.3, 1: 0.2}, ["cat", "dog", "rare"]
    keys = [i.to_bytes(16, "big") for i in range(20_000)]
    kept = sum(metaclip.is_drawn(key, [0, 1], chance, entries, 0) for key in keys)
    assert abs(kept - 20_000 * (1 - 0.7 * 0.8)) < 5 * math.sqrt(20_000 / 4)
    assert all(metaclip.is_drawn(key, [0, 2], chance, entries, 0) for key in keys[:100])  # a rare entry always draws


def test_chances_are_those_of_entries_above_the_threshold():
    assert metaclip.chances({0: 10, 1: 20, 2: 21, 3: 80}, 20) == {2: 20 / 21, 3: 0.25}
    assert metaclip.tail_share({0: 10, 1: 20, 3: 70}, 20) == 0.1
    assert metaclip.tail_share({}, 20) == 0


def test_a_draw_does_not_depend_on_the_rest_of_the_metadata():
    pair = (b"k" * 16, "", "a cat", "")
    for entries in (["cat", "dog"], ["x", "cat"]):
        number = entries.index("cat")
        kept, _, _ = metaclip.balance([(pair, [number])], {number: 0.5}, entries, 3)
        assert bool(kept) == (metaclip.draw(pair[0], "cat", 3) < 0.5)


# ---- the whole, in memory ------------------------------------------------------------------------------------------


def test_curation_equals_brute_force(tmp_path):
    records = corpus()
    threshold, seed = 60, 5
    result = metaclip.curate(
        write_jsonl(tmp_path / "in.jsonl", records),
        ENTRIES,
        Curation(threshold, seed=seed, min_characters=0, shards=3),
        str(tmp_path / "out"),
    )
    distinct = list({(r["url"], r["caption"]): r for r in records}.values())
    matches = [brute_force(r["caption"], ENTRIES) for r in distinct]
    counts = collections.Counter(entry for found in matches for entry in found)
    kept = [
        record
        for record, found in zip(distinct, matches, strict=True)
        for [(key, *_)] in [metaclip.pairs(record, Curation(1, min_characters=0))[0]]
        if any(metaclip.draw(key, ENTRIES[e], seed) < threshold / max(counts[e], threshold) for e in found)
    ]
    left = collections.Counter(entry for r in kept for entry in brute_force(r["caption"], ENTRIES))

    def sort(found):
        return sorted(json.dumps(record) for record in found)

    assert 0 < len(kept) < sum(map(bool, matches)) < len(distinct) < len(records)
    assert sort(lines_of(tmp_path / "out")) == sort(kept)
    rows = [line.split("\t") for line in (tmp_path / "out" / "entries.tsv").read_text().splitlines()[1:]]
    assert {row[0]: (int(row[1]), int(row[3])) for row in rows} == {
        entry: (counts[i], left[i]) for i, entry in enumerate(ENTRIES)
    }
    assert result["kept"] == len(kept)
    assert result["pairs"] == result["kept"] + sum(result["dropped"].values())
    assert result["dropped"]["duplicate_pair"] == len(records) - len(distinct)


def test_the_order_and_the_files_of_the_input_do_not_matter(tmp_path):
    records = corpus(600)
    options = Curation(30, dedup=("pair", "image", "text"), shards=2)
    one = metaclip.curate(write_jsonl(tmp_path / "one.jsonl", records), ENTRIES, options, str(tmp_path / "a"))
    (tmp_path / "many").mkdir()
    random.Random(3).shuffle(records)
    for part in range(3):
        write_jsonl(tmp_path / "many" / f"{part}.jsonl", records[part::3])
    path = tmp_path / "many" / "0.jsonl"
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    many = metaclip.curate(str(tmp_path / "many"), ENTRIES, options, str(tmp_path / "b"))
    assert one == many
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_keeps_other_pairs(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", corpus(600))
    for seed in (0, 1):
        metaclip.curate(path, ENTRIES, Curation(30, seed=seed), str(tmp_path / str(seed)))
    assert lines_of(tmp_path / "0") != lines_of(tmp_path / "1")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"caption": " "}, "short_caption"),
        ({"caption": "a cat " * 20}, "long_caption"),
        ({"caption": "cat"}, "few_words"),
        ({"width": 99}, "small_image"),
        ({"height": "79"}, "small_image"),
        ({"original_width": 99}, "small_image"),
        ({"width": 301, "height": 100}, "narrow_image"),
        ({"width": 100, "height": 301}, "narrow_image"),
        ({"caption": "nothing here"}, "unmatched"),
        ({"width": 300, "height": 100}, None),
        ({}, None),
    ],
)
def test_each_filter_counts_what_it_drops(tmp_path, record, reason):
    options = Curation(9, min_width=100, min_height=80, max_aspect=3, min_characters=2, max_characters=60, min_words=2)
    path = write_jsonl(tmp_path / "in.jsonl", [{"caption": "a cat", **record}])
    result = metaclip.curate(path, ENTRIES, options, str(tmp_path / "out"))
    assert {name: n for name, n in result["dropped"].items() if n} == ({reason: 1} if reason else {})
    assert result["kept"] == (reason is None)


def test_pairs_of_unknown_size_pass_and_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"caption": "a cat"}])
    result = metaclip.curate(path, ENTRIES, Curation(9, min_width=100), str(tmp_path / "out"))
    assert (result["kept"], result["size_unknown"]) == (1, 1)


@pytest.mark.parametrize(("dedup", "kept"), [((), 5), (("pair",), 4), (("image",), 2), (("text",), 2)])
def test_deduplication_by_pair_image_and_text(tmp_path, dedup, kept):
    records = [
        {"url": url, "caption": text}
        for url, text in [("x", "cat"), ("x", "cat"), ("x", "dog"), ("y", "cat"), ("y", "dog")]
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    result = metaclip.curate(path, ENTRIES, Curation(9, dedup=dedup), str(tmp_path / "out"))
    assert result["kept"] == len(lines_of(tmp_path / "out")) == kept


def test_a_list_of_captions_is_as_many_pairs(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"url": "x", "captions": ["a cat", "nothing", "dog"], "license": "CC0"}])
    result = metaclip.curate(path, ENTRIES, Curation(9), str(tmp_path / "out"))
    assert (result["records"], result["pairs"], result["kept"]) == (1, 3, 2)
    found = lines_of(tmp_path / "out")
    assert sorted(record["caption"] for record in found) == ["a cat", "dog"]
    assert all(record.keys() == {"url", "license", "caption"} for record in found)


BAD = [
    b"not json",
    b"[1]",
    b'{"url": "x"}',
    b'{"caption": 3}',
    b'{"caption": []}',
    b'{"caption": "a cat", "width": "wide"}',
    b'{"caption": "a cat", "width": -1}',
    b'{"caption": "a \xff cat"}',
    b'{"caption": "a \\ud800 cat"}',
]


def test_bad_records_are_counted_and_named_up_to_the_limit(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([*BAD, b"", b'{"caption": "a cat"}']))
    result = metaclip.curate(str(path), ENTRIES, Curation(9, max_bad_records=len(BAD)), str(tmp_path / "out"))
    assert (result["records"], result["bad"], result["kept"]) == (len(BAD) + 1, len(BAD), 1)
    assert len(result["bad_examples"]) == len(BAD)
    assert all(str(path) in message for message in result["bad_examples"])
    with pytest.raises(ValueError, match=r"9 of 10 records are bad, more than max_bad_records=8"):
        metaclip.curate(str(path), ENTRIES, Curation(9, max_bad_records=8), str(tmp_path / "few"))
    assert not list((tmp_path / "few").glob("data-*"))
    assert not json.loads((tmp_path / "few" / "report.json").read_text())["complete"]
    metaclip.curate(str(path), ENTRIES, Curation(9, max_bad_records=9), str(tmp_path / "few"))  # the folder is free


def image_bytes(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (width, height, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sources_give_the_size_and_the_hash_of_their_images(tmp_path):
    records = [{"image": image_bytes(w, 40), "caption": text} for w, text in [(50, "cat"), (50, "cat"), (30, "dog")]]
    sources.write_shard(tmp_path / "in.array_record", [*records, {"image": b"broken", "caption": "cat"}])
    options = Curation(9, min_width=40, max_bad_records=1)
    result = metaclip.curate(str(tmp_path / "in.array_record"), ENTRIES, options, str(tmp_path / "out"))
    assert (result["bad"], result["dropped"]["small_image"], result["dropped"]["duplicate_pair"]) == (1, 1, 1)
    [kept] = lines_of(tmp_path / "out")
    assert (kept["width"], kept["height"], kept["source_index"]) == (50, 40, 0)
    assert "image" not in kept


# ---- metadata, options, errors -------------------------------------------------------------------------------------


def test_entries_are_read_from_word_lists(tmp_path):
    (tmp_path / "plain.txt").write_text("cat\n\n dog \ncat\n!\nhot dog\r\n")
    (tmp_path / "counts.txt").write_text("house\t120\ntree\t99\nNew York\t100\n")
    (tmp_path / "list.json").write_text('["dog", "bird", ""]')
    paths = [str(tmp_path / name) for name in ("plain.txt", "counts.txt", "list.json")]
    assert metaclip.read_entries(paths, min_count=100) == ["cat", "dog", "hot dog", "house", "New York", "bird"]
    both = metaclip.read_entries(paths, builtin=True)
    assert both[: len(metaclip.BUILTIN)] == list(metaclip.BUILTIN) and {"tree", "hot dog"} <= set(both)


def test_the_builtin_list_is_of_distinct_words_that_can_match():
    assert len(metaclip.BUILTIN) == len(set(metaclip.BUILTIN)) > 150
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", entry) for entry in metaclip.BUILTIN)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.txt", "\n\n", "no entry"),
        ("w.txt", "cat\tmany\n", r"line 1: wanted a whole number after the tab, got 'many'"),
        ("w.json", '{"cat": 1}', "wanted a list of texts"),
        ("missing.txt", None, "cannot use the word list"),
    ],
)
def test_a_word_list_that_cannot_be_used_is_an_error(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        metaclip.read_entries([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0 must be at least 1"),
        ({"shards": 0}, "shards=0"),
        ({"min_width": -1}, "min_width=-1"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"min_characters": 5, "max_characters": 4}, "max_characters=4 is below"),
        ({"dedup": ("url",)}, "dedup='url' is unknown"),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Curation(**{"threshold": 9, **options})


def test_missing_inputs_and_folders_in_use_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no file matches"):
        metaclip.curate(str(tmp_path / "*.jsonl"), ENTRIES, Curation(9), str(tmp_path / "out"))
    path = write_jsonl(tmp_path / "in.jsonl", [{"caption": "cat"}])
    with pytest.raises(ValueError, match="must be distinct"):
        metaclip.curate(path, ["cat", "cat"], Curation(9), str(tmp_path / "out"))
    metaclip.curate(path, ENTRIES, Curation(9), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="already holds"):
        metaclip.curate(path, ENTRIES, Curation(9), str(tmp_path / "out"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no record"):
        metaclip.curate(str(tmp_path / "empty.jsonl"), ENTRIES, Curation(9), str(tmp_path / "none"))


def test_a_file_appears_only_when_complete(tmp_path):
    def parts():
        yield "first\n"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        metaclip.write(str(tmp_path / "data"), parts())
    assert not (tmp_path / "data").exists()


def test_the_command_prints_the_report_and_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "words.txt").write_text("\n".join(ENTRIES))
    path, out = write_jsonl(tmp_path / "in.jsonl", corpus(300)), str(tmp_path / "out")
    words = ["--metadata", str(tmp_path / "words.txt")]
    assert cli.main(["curate", path, out, "--threshold", "20", "--in-memory", "--min-words", "2", *words]) == 0
    text = capsys.readouterr().out
    assert "most frequent entry" in text and "few words" in text and "cannot match" in text
    with PIL.Image.open(f"{out}/entries.png") as picture:
        assert picture.width > 300
    assert cli.main(["curate", path, out, "--threshold", "20", "--in-memory", "--trheshold=3"]) == 2
    assert "unknown option --trheshold=3" in capsys.readouterr().err


# ---- on Beam -------------------------------------------------------------------------------------------------------

PROCESSES = ["--direct_running_mode=multi_processing"]


@pytest.mark.parametrize("flags", [[], ["--direct_num_workers=2", *PROCESSES]], ids=["1 worker", "2 processes"])
def test_beam_writes_the_same_bytes_whatever_the_workers(tmp_path, flags):
    pytest.importorskip("apache_beam", reason="needs the extra `curation`")
    (tmp_path / "in").mkdir()
    for part in range(3):
        write_jsonl(tmp_path / "in" / f"{part}.jsonl", corpus(1500)[part::3])
    with open(tmp_path / "in" / "1.jsonl", "ab") as file:
        file.write(b"\n".join(BAD) + b"\n")
    options = Curation(30, dedup=("pair", "image", "text"), min_characters=2, shards=4, max_bad_records=len(BAD))
    path = str(tmp_path / "in")
    memory = metaclip.curate(path, ENTRIES, options, str(tmp_path / "memory"))
    assert metaclip_beam.run(path, ENTRIES, options, str(tmp_path / "beam"), flags) == memory
    assert contents(tmp_path / "beam") == contents(tmp_path / "memory")
    assert memory["kept"] > 0 and memory["bad"] == len(BAD)


def test_beam_writes_empty_shards_and_reads_sources(tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra `curation`")
    sources.write_shard(tmp_path / "in.array_record", [{"image": image_bytes(50, 40), "caption": "a cat"}] * 3)
    path, options = str(tmp_path / "in.array_record"), Curation(2, shards=5)
    memory = metaclip.curate(path, ENTRIES, options, str(tmp_path / "memory"))
    assert metaclip_beam.run(path, ENTRIES, options, str(tmp_path / "beam")) == memory
    assert contents(tmp_path / "beam") == contents(tmp_path / "memory")
    assert len(list((tmp_path / "beam").glob("data-*-of-00005.jsonl"))) == 5


def test_beam_writes_nothing_with_too_many_bad_records(tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra `curation`")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*BAD, b'{"caption": "a cat"}']))
    with pytest.raises(ValueError, match="more than max_bad_records=0"):
        metaclip_beam.run(str(tmp_path / "in.jsonl"), ENTRIES, Curation(9), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("data-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--direct_num_wrokers=2"], "has the option --direct_num_wrokers"),
        (["--runner=DataflowRunner"], "the workers of DataflowRunner do not see"),
    ],
)
def test_options_of_beam_are_checked_before_it_starts(tmp_path, flags, message):
    pytest.importorskip("apache_beam", reason="needs the extra `curation`")
    path = write_jsonl(tmp_path / "in.jsonl", [{"caption": "a cat"}])
    with pytest.raises(ValueError, match=message):
        metaclip_beam.run(path, ENTRIES, Curation(9), str(tmp_path / "out"), flags)


def test_without_beam_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pe-jax\[curation\]'"):
        metaclip_beam.run(str(tmp_path / "in.jsonl"), ENTRIES, Curation(9), str(tmp_path / "out"))

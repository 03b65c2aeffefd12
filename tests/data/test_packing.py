"""Packed rows: every sample whole and in its place, the same rows on any number of hosts, bad and over-long records."""

import itertools
import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from pe_jax import data
from pe_jax.data import packing, tokenizers
from pe_jax.data.chat import TEMPLATES, Vision, from_record, render
from tests.data import films, vocabularies

IMAGE = vocabularies.IMAGE
DATA = pathlib.Path(os.environ.get("PE_JAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets: 30 images with conversations of different lengths, and 20 texts alone."""
    root = tmp_path_factory.mktemp("talks")
    vocabularies.llama(root)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(30):
        PIL.Image.fromarray(rng.integers(0, 256, (9 + i, 60 - i, 3), np.uint8)).save(root / f"{i}.png")
        turns = [("human", f"What is {i}?"), ("assistant", "a " * (i % 5) + f"number {i}")] * (1 + i % 2)
        lines.append({"image": f"{i}.png", "conversations": [{"from": r, "value": t} for r, t in turns]})
    texts = [{"question": f"And {i}?", "answer": "no " * i} for i in range(20)]
    (root / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return root


SHAPE = {"image_size": 16, "patch_size": 4, "pooling": 2, "image_token": IMAGE}


def config(folder, **more):
    sources = [
        {"name": "conversations", "path": str(folder / "images.jsonl"), "weight": 3},
        {"name": "conversations", "path": str(folder / "texts.jsonl")},
    ]
    settings = {
        "tokenizer": str(folder),
        "template": "llama3",
        "length": 512,
        "chunks": 12,
        "max_tiles": 4,
        "frames": 5,
        "samples_per_row": 2.4,
        "threads": 2,
    }
    return {"sources": sources, **settings, **more}


def take(settings, steps, hosts=1, batch_size=8, start=0, seed=3):
    common = {"batch_size": batch_size, "seed": seed, "process_count": hosts, "start": start}
    loaders = [data.create("chat", settings, process_index=i, **common, **SHAPE) for i in range(hosts)]
    batches = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        batches.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    for loader in loaders:
        loader.close()
    return batches


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(folder):
    return take(config(folder), 6)


def test_a_batch_has_the_shapes_of_its_spec(folder, whole):
    spec = data.batch_spec("chat", config(folder), batch_size=8, **SHAPE)
    assert {n: (s.shape, s.dtype) for n, s in spec.items()} == {n: (v.shape, v.dtype) for n, v in whole[0].items()}


@pytest.mark.parametrize(("start", "hosts", "size"), [(0, 2, 8), (32, 4, 8), (16, 1, 16)])
def test_rows_do_not_depend_on_hosts_batches_or_where_a_run_begins(folder, whole, start, hosts, size):
    """48 rows are of two groups."""
    rows = {name: np.concatenate([batch[name] for batch in whole])[start:] for name in whole[0]}
    got = take(config(folder, threads=3), (48 - start) // size, hosts, size, start)
    assert_same([{name: np.concatenate([batch[name] for batch in got]) for name in got[0]}], [rows])


def test_another_seed_gives_other_rows(folder, whole):
    (batch,) = take(config(folder), 1, seed=4)
    assert (batch["tokens"] != whole[0]["tokens"]).any()


def test_every_sample_of_a_row_is_the_rendering_of_its_record(folder, whole):
    tokenizer = tokenizers.load(str(folder))
    vision = Vision(16, 4, 2, max_tiles=4)
    records = [json.loads(line) for name in ("images", "texts") for line in (folder / f"{name}.jsonl").open()]
    for record in records[:30]:
        record["image"] = str(folder / record["image"])
    known = {}
    for i, record in enumerate(records):
        said = from_record(record, "it")
        made = render(
            said, tokenizer, TEMPLATES["llama3"], chunks=vision.count(said), chunk_tokens=4, image_token=IMAGE
        )
        known[made.ids[: made.length].tobytes()] = (i, made, vision.chunks(said))
    seen = 0
    for batch in whole:
        for row in range(8):
            segments, first, chunk = batch["segments"][row], None, 0
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert (np.diff(here) == 1).all()
                index, made, chunks = known[batch["tokens"][row][here].tobytes()]
                first = index if first is None else first
                np.testing.assert_array_equal(batch["targets"][row][here], made.targets[: made.length])
                slots = made.slots[: made.length]
                np.testing.assert_array_equal(batch["slots"][row][here], np.where(slots < 0, -1, slots + 4 * chunk))
                np.testing.assert_array_equal(batch["chunks"][row][chunk : chunk + len(chunks)], chunks)
                chunk, seen = chunk + len(chunks), seen + 1
            padding = segments == 0
            assert not batch["tokens"][row][padding].any() and not batch["chunks"][row][chunk:].any()
            assert (batch["targets"][row][padding] == -1).all() and (batch["slots"][row][padding] == -1).all()
            assert segments.max() >= 1 and batch["index"][row] == first
    assert seen > 1.5 * 48  # rows are shared


def test_samples_are_dealt_out_within_both_budgets_and_no_row_is_empty():
    rng = np.random.default_rng(0)
    for rows, count in ((1, 1), (4, 4), (7, 40), (32, 300)):
        tokens, chunks = rng.integers(1, 101, count), rng.integers(0, 6, count)
        dealt, left = packing.pack(tokens, chunks, rows=rows, length=100, room=5)
        assert sorted([*itertools.chain(*dealt), *left]) == list(range(count))
        for samples in dealt:
            assert samples == sorted(samples) and len(samples)
            assert tokens[samples].sum() <= 100 and chunks[samples].sum() <= 5
        for sample, samples in itertools.product(left, dealt):  # it fits nowhere
            assert tokens[[*samples, sample]].sum() > 100 or chunks[[*samples, sample]].sum() > 5


def test_samples_that_fill_the_rows_exactly_are_all_dealt_out():
    dealt, left = packing.pack([5, 5, 3, 3, 2, 2, 1], [1] * 7, rows=3, length=7, room=9)
    assert left == [] and sorted(map(len, dealt)) == [2, 2, 3]


def test_without_packing_a_row_is_one_sample(folder):
    batches = take(config(folder, pack=False), 5)
    assert all((batch["segments"].max(1) == 1).all() for batch in batches)
    assert len({int(i) for batch in batches for i in batch["index"]}) > 20


def test_sources_are_mixed_by_their_weights(folder):
    batches = take(config(folder, pack=False), 8)
    share = np.mean([batch["index"] < 30 for batch in batches])
    assert share == 0.75  # 3 to 1


def test_by_default_rows_are_filled_and_few_records_are_left_out(folder):
    made = config(folder, chunks=40)
    del made["samples_per_row"]
    with data.create("chat", made, batch_size=8, seed=0, **SHAPE) as loader:
        for _ in range(8):
            next(loader)
        assert 0.8 < loader.fill < 1 and loader.left_out < 0.05
        assert 2 < loader.samples_per_row < 8


def test_a_survey_tells_what_the_rows_hold_without_decoding(folder, whole):
    with data.create("chat", config(folder), batch_size=8, seed=3, **SHAPE) as loader:
        told = loader.survey(1)
    rows = {name: np.concatenate([batch[name] for batch in whole[:4]]) for name in whole[0]}
    assert told["rows"] == 32 and told["samples"] == rows["segments"].max(1).mean()
    assert told["tokens"] == pytest.approx((rows["segments"] > 0).mean())
    assert told["visual"] == pytest.approx((rows["slots"] >= 0).mean())
    assert told["asked"] == pytest.approx((rows["targets"] >= 0).mean())
    assert told["chunks"] == pytest.approx((rows["slots"].max(1) + 1).mean() / 4 / 12)
    assert told["left_out"] == 1 - rows["segments"].max(1).sum() / int(32 * 2.4)


def test_real_photographs_and_receipts_fill_their_rows(folder):
    if not (DATA / "vqa").is_dir():
        pytest.skip(f"no questions at {DATA}/vqa; set PE_JAX_DATA to the folder of sample data")
    names = ("coco_questions", "receipts_questions")
    sources = [{"name": "jsonl", "path": str(DATA / f"vqa/{name}.jsonl"), "root": str(DATA)} for name in names]
    made = {
        "sources": sources,
        "tokenizer": str(folder),
        "template": "llama3",
        "length": 6144,
        "chunks": 24,
        "frames": 1,
    }
    shape = SHAPE | {"image_size": 448, "patch_size": 14}
    with data.create("chat", made, batch_size=8, seed=0, **shape) as loader:
        told = loader.survey(2)
    assert told["tokens"] > 0.9 and told["tokens"] / told["samples"] < 0.07  # which one a row would fill
    assert told["left_out"] < 0.05


def test_rows_follow_the_record_and_not_the_time_it_takes(folder):
    """A position is the number of rows, whatever they hold."""
    with data.create("chat", config(folder), batch_size=8, seed=3, start=16, **SHAPE) as loader:
        next(loader)
        assert loader.position == 24


# ---- what goes wrong


@pytest.fixture
def damaged(tmp_path):
    """20 images of which one is missing, one cut short, one no image; and a record without an answer."""
    vocabularies.llama(tmp_path)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(20):
        PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": f"What is {i}?", "answer": f"number {i}"})
    (tmp_path / "4.png").unlink()
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(whole[: len(whole) // 2])  # its header is good
    (tmp_path / "11.png").write_text("no image")
    lines[15] = {"image": "15.png", "conversations": [{"from": "human", "value": "And?"}]}
    lines[16]["answer"] = "no " * 600
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def bad_config(folder, **more):
    made = config(folder, max_bad_records=4, **more)
    return made | {"sources": [{"name": "conversations", "path": str(folder / "bad.jsonl")}]}


@pytest.mark.parametrize("pack", [True, False])
def test_bad_records_are_replaced_alike_everywhere_and_counted(damaged, pack):
    made = bad_config(damaged, pack=pack)
    whole = take(made, 4)
    assert_same(take(made, 2, hosts=2, start=16), whole[2:])
    for batch in whole:
        assert (batch["segments"].max(1) >= 1).all()  # also where all of a row was bad
        assert not {4, 7, 11, 15, 16} & set(batch["index"].tolist())
    with data.create("chat", made, batch_size=8, seed=3, **SHAPE) as loader:
        for _ in range(4):
            next(loader)
        assert list(loader.bad.values()) == [4] and list(loader.too_long.values()) == [1]


def test_more_bad_records_than_allowed_are_an_error_that_names_the_last(damaged):
    with (
        pytest.raises(ValueError, match=r"2 bad records, more than data.max_bad_records=1; the last: .*(png|15)"),
        data.create("chat", bad_config(damaged) | {"max_bad_records": 1}, batch_size=8, seed=3, **SHAPE) as loader,
    ):
        for _ in range(4):
            next(loader)


def test_a_source_of_nothing_but_long_records_is_an_error(damaged):
    with (
        pytest.raises(ValueError, match="20 records in a row are of no use"),
        data.create("chat", bad_config(damaged, length=64), batch_size=8, seed=3, **SHAPE) as loader,
    ):
        next(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "llama4"}, "template 'llama4' is unknown; the templates are llama3, qwen2, plain"),
        ({"template": "qwen2"}, r"no special token '<\|im_start\|>'.*choose the template"),
        ({"max_tiles": 12}, "up to 13 chunks of one image or video; a row has room for chunks=12"),
        ({"length": 20}, "5 chunks of 4 tokens leave no room for text in length=20"),
        ({"length": 0}, "data lacks length"),
        ({"chunks": 2.5}, "data.chunks=2.5 must be a positive integer"),
        ({"frames": 13}, "frames=13 make up to 13 chunks"),
        ({"samples_per_row": 0.5}, "data.samples_per_row=0.5 must be a number of at least 1"),
        ({"tile": 3}, "data has no 'tile'; its keys are"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json does not exist"),
        ({"sources": []}, "data lacks sources"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(folder, change, message):
    with pytest.raises(ValueError, match=message):
        data.create("chat", config(folder, **change), batch_size=8, seed=0, **SHAPE)


def test_an_image_token_that_texts_use_is_refused(folder):
    with pytest.raises(ValueError, match=r"image_token=7 is b.* wanted a special token, such as \('<\|begin_of_text"):
        data.create("chat", config(folder), batch_size=8, seed=0, **SHAPE | {"image_token": 7})


def test_a_short_videos_row_does_not_run_over_where_its_fewer_frames_let_more_turns_fit(tmp_path):
    vocabularies.llama(tmp_path)
    (tmp_path / "short.mp4").write_bytes(films.film(count=2))
    turns = [{"from": role, "value": text} for role, text in (("human", "?"), ("assistant", "no " * 18)) * 6]
    (tmp_path / "films.jsonl").write_text(json.dumps({"video": "short.mp4", "conversations": turns}))
    source = {"name": "conversations", "path": str(tmp_path / "films.jsonl")}
    made = config(tmp_path, length=244, frames=12, samples_per_row=1) | {"sources": [source]}
    (batch,) = take(made, 1)
    tokens = (batch["segments"] > 0).sum(1)
    with data.create("chat", made, batch_size=8, seed=3, **SHAPE) as loader:
        planned = loader.survey(1)["tokens"] * 244
    said = from_record({"conversations": turns}, "it")
    tokenizer, sizes = tokenizers.load(str(tmp_path)), {"chunk_tokens": 4, "image_token": IMAGE}
    alone = render(said, tokenizer, TEMPLATES["llama3"], chunks=2, limit=244, **sizes)
    assert (tokens <= planned).all() and alone.length > planned


def test_smaller_groups_are_other_rows_and_as_resumable(folder, whole):
    rows = take(config(folder, group=8), 4)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(rows, whole, strict=False))
    assert_same(take(config(folder, group=8), 2, hosts=2, start=16), rows[2:])


def test_a_short_video_takes_fewer_chunks_than_it_was_reserved(tmp_path):
    vocabularies.llama(tmp_path)
    (tmp_path / "long.mp4").write_bytes(films.film(count=60))
    (tmp_path / "short.mp4").write_bytes(films.film(count=3))
    lines = [{"video": f"{name}.mp4", "question": "What happens?", "answer": name} for name in ("long", "short") * 16]
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = config(tmp_path) | {"sources": [{"name": "conversations", "path": str(tmp_path / "films.jsonl")}]}
    (batch,) = take(made, 1)
    seen = set()
    for row in range(8):
        segments, slots = batch["segments"][row], batch["slots"][row]
        count = 0
        for segment in range(1, segments.max() + 1):
            chunks = (slots[segments == segment] >= 0).sum() // 4
            seen.add(int(chunks))
            count += chunks
        assert sorted(slots[slots >= 0].tolist()) == list(range(4 * count))
        assert batch["chunks"][row][:count].any((1, 2, 3)).all() and not batch["chunks"][row][count:].any()
    assert seen == {3, 5}

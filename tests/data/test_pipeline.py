"""The pipeline: the same batches on any number of hosts and threads, exact resume, bad records."""

import collections
import itertools
import logging
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pe_jax import data
from pe_jax.data import pipeline
from pe_jax.data.image import Augment, BadImage, Preprocess, generator
from pe_jax.data.pipeline import Mixture, permute
from pe_jax.data.text import Tokenizer

AUGMENT = {"crop_scale": [0.3, 1], "brightness": 0.3, "saturation": 0.3, "hflip": 0.5}
SYNTHETIC = {"name": "synthetic", "records": 40, "size": 16, "weight": 3}
COMMON = {"batch_size": 12, "image_size": (10, 14), "context_length": 9, "seed": 5}


def config(small, name="jsonl", **more):
    return {"sources": [small.config(name), SYNTHETIC], "augment": AUGMENT, "threads": 3, **more}


def take(data, steps, hosts=1, **more):
    """The first global batches, put together from every host's rows."""
    loaders = [pipeline.create(data, **COMMON | more, process_index=i, process_count=hosts) for i in range(hosts)]
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


def test_a_batch_has_the_shapes_of_its_spec(small):
    (batch,) = take(config(small), 1)
    spec = pipeline.batch_spec(config(small), batch_size=12, image_size=(10, 14), context_length=9)
    assert {n: (s.shape, s.dtype) for n, s in spec.items()} == {n: (v.shape, v.dtype) for n, v in batch.items()}
    assert spec["image"].shape == (12, 10, 14, 3) and spec["index"].dtype == np.int64


def test_images_alone_are_those_of_the_pairs_and_their_records_need_no_caption(small):
    where = {"batch_size": 12, "image_size": 16, "seed": 5}
    with data.create("pairs", config(small), **where, context_length=9) as loader:
        want = next(loader)
    uncaptioned = config(small)
    uncaptioned["sources"][0]["caption"] = "of_no_record"
    with data.create("images", uncaptioned, **where, process_index=1, process_count=2) as loader:
        batch = next(loader)
    assert_same([batch], [{"image": want["image"][6:], "index": want["index"][6:]}])
    spec = data.batch_spec("images", uncaptioned, batch_size=6, image_size=16)
    assert {n: (s.shape, s.dtype) for n, s in spec.items()} == {n: (v.shape, v.dtype) for n, v in batch.items()}


def test_a_kind_of_batches_that_does_not_exist_is_refused_naming_those_that_do(small):
    with pytest.raises(ValueError, match="kind 'texts' is unknown; the kinds are pairs, images, chat"):
        data.batch_spec("texts", config(small), batch_size=12, image_size=16)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_global_batches_do_not_depend_on_the_number_of_hosts(small, hosts):
    assert_same(take(config(small), 4), take(config(small), 4, hosts))


def test_the_batches_do_not_depend_on_the_number_of_threads(small):
    assert_same(take(config(small), 4), take(config(small, threads=1), 4))


@pytest.mark.parametrize(("step", "hosts"), [(1, 1), (3, 2), (5, 3)])
def test_a_run_continues_exactly_from_its_one_integer_on_any_number_of_hosts(small, step, hosts):
    whole = take(config(small), 7)
    with pipeline.create(config(small), **COMMON) as loader:
        for _ in range(step):
            next(loader)
        position = loader.position
    assert position == 12 * step
    assert_same(whole[step:], take(config(small), 7 - step, hosts, start=position))


def test_a_run_continues_with_another_batch_size_where_it_stopped(small):
    rows = np.concatenate([b["index"] for b in take(config(small), 6)])
    got = np.concatenate([b["index"] for b in take(config(small), 4, batch_size=6, start=12)])
    np.testing.assert_array_equal(got, rows[12:36])


@pytest.mark.parametrize("name", ["csv", "packed", "webdataset", "array_record"])
def test_every_format_gives_the_same_batches(small, name):
    assert_same(take(config(small), 2), take(config(small, name), 2))


def test_another_seed_gives_another_order_and_other_pixels(small):
    a, b = take(config(small), 2), take(config(small), 2, seed=6)
    assert (a[0]["index"] != b[0]["index"]).any()


def test_an_epoch_holds_every_record_once_and_the_next_one_is_shuffled_anew(small):
    data = {"sources": [small.config("jsonl")]}
    rows = np.concatenate([b["index"] for b in take(data, 6, batch_size=23)])
    epochs = rows.reshape(6, 23)
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    assert not any((epoch == np.arange(23)).all() for epoch in epochs)


def test_a_record_seen_again_is_augmented_anew(small):
    data = {"sources": [small.config("jsonl")], "augment": AUGMENT}
    batches = take(data, 8, batch_size=23)
    looks = {batch["image"][batch["index"].tolist().index(4)].tobytes() for batch in batches}
    assert len(looks) == 8


def test_a_row_is_the_augmented_image_and_its_caption_in_tokens(small):
    data = {"sources": [small.config("jsonl")], "augment": AUGMENT}
    (batch,) = take(data, 1, start=46)
    for row in range(12):
        i = int(batch["index"][row])
        image = Augment.from_dict(AUGMENT)(small.images[i], (10, 14), generator(5, 46 + row))
        np.testing.assert_array_equal(batch["image"][row], image)
        np.testing.assert_array_equal(batch["text"][row], Tokenizer(9)(small.captions[i])[0])


def test_without_augmentation_images_are_squashed(small):
    (batch,) = take({"sources": [small.config("jsonl")]}, 1)
    want = [Preprocess((10, 14)).pixels(small.images[i]) for i in batch["index"]]
    np.testing.assert_array_equal(batch["image"], want)


def test_the_index_numbers_records_over_all_sources(small):
    index = np.concatenate([b["index"] for b in take(config(small), 8)])
    assert index.min() >= 0 and index.max() < 23 + 40
    assert abs((index >= 23).mean() - 0.75) < 0.01  # weights 1 and 3


def test_a_config_dict_is_taken_as_it_is(small):
    ml_collections = pytest.importorskip("ml_collections")
    assert_same(take(config(small), 2), take(ml_collections.ConfigDict(config(small)), 2))


def test_captions_and_templates_are_drawn_at_random_but_the_same_again(tmp_path, small):
    shutil.copytree(small.folder / "images", tmp_path / "images")
    lines = [
        f'{{"image": "images/{i:03d}.png", "captions": ["one", "two", "three"], "cls": "owl"}}\n' for i in range(23)
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = {"name": "jsonl", "path": str(tmp_path / "a.jsonl")}
    drawn = np.concatenate([b["text"][:, 1] for b in take({"sources": [source]}, 20)])
    counts = collections.Counter(drawn.tolist())
    assert len(counts) == 3 and min(counts.values()) > 0.25 * len(drawn)
    templates = {"sources": [{**source, "templates": ["a {}", "the {}"]}]}
    texts = take(templates, 2)
    assert {tuple(t) for b in texts for t in b["text"].tolist()} == {
        tuple(Tokenizer(9)(t)[0]) for t in ("a owl", "the owl")
    }
    assert_same(texts, take(templates, 2, hosts=2))


# ---- bad records ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """A set of 23 with a cut image (2), no caption (7), a missing image (8) and no JSON (15)."""
    from tests.data.conftest import write_set

    made = write_set(tmp_path / "set", 23)
    images = made.folder / "images"
    (images / "002.png").write_bytes(made.images[2][:60])
    (images / "008.png").unlink()
    lines = (made.folder / "list.jsonl").read_text().splitlines()
    lines[7] = '{"image": "images/007.png", "caption": "  "}'
    lines[15] = '{"image": "images/015.png", '
    (made.folder / "list.jsonl").write_text("\n".join(lines))
    return made


def test_the_first_bad_record_is_an_error_that_names_it(broken):
    with pytest.raises(ValueError, match=r"1 bad records, more than data.max_bad_records=0; the last: .*list.jsonl"):
        take({"sources": [broken.config("jsonl")]}, 4)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (2, r"list.jsonl record 2: .*002.png cannot be decoded"),
        (7, "list.jsonl record 7: the caption is empty"),
        (8, r"list.jsonl record 8: .*008.png does not exist"),
        (15, "list.jsonl record 15 is not JSON"),
    ],
)
def test_a_bad_record_is_named_with_what_is_wrong(broken, index, message):
    lines = (broken.folder / "list.jsonl").read_text().splitlines()
    (broken.folder / "one.jsonl").write_text("\n".join(lines) + "\n")
    good = [i for i in range(23) if i not in (2, 7, 8, 15)]
    (broken.folder / "one.jsonl").write_text("\n".join(lines[i] for i in [*good, index]) + "\n")
    message = message.replace("list.jsonl", "one.jsonl").replace(f"record {index}", f"record {len(good)}")
    with pytest.raises(ValueError, match=message):
        take({"sources": [{"name": "jsonl", "path": str(broken.folder / "one.jsonl")}]}, 3)


def test_bad_records_are_replaced_by_the_next_good_one_counted_and_logged(broken, caplog):
    data = {"sources": [broken.config("jsonl"), SYNTHETIC], "max_bad_records": 4, "threads": 2}
    caplog.set_level(logging.WARNING)
    with pipeline.create(data, **COMMON) as loader:
        index = np.concatenate([next(loader)["index"] for _ in range(12)])
        name = f"data.sources[0] ({broken.folder / 'list.jsonl'})"
        assert loader.bad == {name: 4, "data.sources[1] (synthetic)": 0}
    seen = collections.Counter(index[index < 23].tolist())
    assert not {2, 7, 8, 15} & set(seen)
    assert seen[9] > seen[10] + 1  # 9 also stands in for 7 and 8
    assert "002.png" in caplog.text and "record 7: the caption is empty" in caplog.text
    assert_same(take(data, 6), take(data, 6, hosts=3))


def test_one_bad_record_more_than_allowed_is_an_error(broken):
    data = {"sources": [broken.config("jsonl")], "max_bad_records": 3}
    with pytest.raises(ValueError, match=r"4 bad records, more than data.max_bad_records=3.*raise the limit"):
        take(data, 4)


def test_a_source_of_bad_records_only_ends(broken):
    shutil.rmtree(broken.folder / "images")
    with pytest.raises(ValueError, match="23 records in a row are bad"):
        take({"sources": [broken.config("jsonl")], "max_bad_records": 100}, 1)


# ---- wrong requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": []}, "data has no 'source'; its keys are sources, augment, max_bad_records, threads"),
        ({"sources": []}, "data.sources is empty"),
        ({"augment": {"flip": 1}}, "Augment has no 'flip'"),
        ({"threads": 0}, "data.threads=0 must be a positive integer"),
        ({"sources": [{"name": "jsonl", "path": "/none.jsonl"}]}, r"data.sources\[0\]: /none.jsonl does not exist"),
        ({"sources": [{**SYNTHETIC, "weight": 0}]}, r"data.sources\[0\].weight=0 must be a positive number"),
        ({"sources": [{**SYNTHETIC, "size_px": 3}]}, r"data.sources\[0\]: source 'synthetic' has no 'size_px'"),
        ({"sources": [{**SYNTHETIC, "templates": ["x"]}]}, r"data.sources\[0\]: template 'x' must contain"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(small, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.create(config(small) | change, **COMMON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_count": 5}, "batch_size=12 is not a multiple of the 5 hosts"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 must lie in \[0, process_count=2\)"),
        ({"start": -1}, "start=-1 and seed=5 must not be negative"),
        ({"tokenizer": Tokenizer(8)}, r"the tokenizer gives \[1, 8\] for one text; wanted \[1, 9\]"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(small, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.create(config(small), **COMMON | change)


def test_one_shard_serves_any_number_of_hosts(small):
    path = str(small.folder / "records/data-00000-of-00002.array_record")
    data = {"sources": [{"name": "array_record", "path": path}]}  # 11 records
    assert_same(take(data, 3, batch_size=8), take(data, 3, hosts=8, batch_size=8))


def test_too_few_records_for_the_hosts_or_the_batch_are_refused(small):
    path = str(small.folder / "records/data-00000-of-00002.array_record")
    data = {"sources": [{"name": "array_record", "path": path}]}
    with pytest.raises(ValueError, match=r"00000-of-00002.array_record.* holds 11 records, too few for 12 hosts"):
        pipeline.create(data, **COMMON, process_count=12)
    with pytest.raises(ValueError, match="its share of 12 of a batch of 12: a batch would hold a record twice"):
        pipeline.create(data, **COMMON)


def test_a_closed_loader_says_so_and_its_position_stays(small):
    loader = pipeline.create(config(small), **COMMON, start=24)
    next(loader)
    assert loader.position == 36 and loader.examples_per_second > 0
    loader.close()
    loader.close()
    assert loader.position == 36
    with pytest.raises(ValueError, match="this loader is closed"):
        next(loader)


def test_a_loader_left_open_does_not_disturb_the_end_of_the_program(small):
    code = (
        "from pe_jax.data import pipeline\n"
        f"loader = pipeline.create({config(small)!r}, batch_size=4, image_size=8, context_length=6, seed=0)\n"
        "print(next(loader)['text'].shape)\n"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "(4, 6)" and not done.stderr, done.stderr


# ---- one pass for evaluators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsonl", "webdataset"])
def test_examples_come_once_and_in_order(small, name):
    pairs = list(pipeline.examples(small.config(name), Preprocess((8, 12))))
    assert [record["caption"] for _, record in pairs] == small.captions
    assert all("image" not in record for _, record in pairs)
    np.testing.assert_array_equal(np.stack([image for image, _ in pairs]), Preprocess((8, 12))(small.images))
    (image, _), *_ = pipeline.examples(small.config(name), Preprocess((8, 12)), pixels="uint8")
    np.testing.assert_array_equal(image, Preprocess((8, 12)).pixels(small.images[0]))
    first = itertools.islice(pipeline.examples(small.config(name), Preprocess(8)), 2)
    assert len(list(first)) == 2


def test_an_evaluation_leaves_no_bad_record_out(broken):
    with pytest.raises(BadImage, match=r"list.jsonl record 2: .*002.png cannot be decoded"):
        list(pipeline.examples(broken.config("jsonl"), Preprocess(8)))
    with pytest.raises(ValueError, match=r"pixels='int' must be"):
        pipeline.examples(broken.config("jsonl"), Preprocess(8), pixels="int")


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_a_permutation_reaches_every_place_once(size):
    assert sorted(permute(i, size, (1, 2)) for i in range(size)) == list(range(size))


def test_permutations_of_neighbouring_seeds_and_epochs_are_unrelated():
    orders = {key: [permute(i, 500, key) for i in range(500)] for key in itertools.product((0, 1), (0, 1), (0, 1, 2))}
    for a, b in itertools.combinations(orders.values(), 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 12  # 1 expected by chance
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2
    for order in orders.values():
        assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.2


def test_a_permutation_goes_beyond_32_bits():
    size = 5_400_000_000
    got = [permute(i, size, (0, 0, 0)) for i in range(size - 200, size)]
    assert len(set(got)) == 200 and 0 <= min(got) < max(got) < size
    assert max(got) > size * 0.9 and min(got) < size * 0.1


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [3.0, 1.0], [1e-9, 1.0]])
def test_a_mixture_keeps_to_its_weights_at_every_length(weights):
    mixture, given = Mixture(weights), [0] * len(weights)
    for position in range(2500):
        k, before = mixture(position)
        assert before == given[k]  # a source's examples are dealt in order, none left out
        given[k] += 1
        for j, weight in enumerate(weights):
            assert abs(given[j] - (position + 1) * weight / sum(weights)) <= 1.5
    k, before = mixture(10**12)
    assert abs(before / 10**12 - weights[k] / sum(weights)) < 1e-3

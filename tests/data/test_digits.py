"""The demo's data: real digits, split and captioned."""

import collections
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from pe_jax.data import digits, pipeline
from pe_jax.data.image import Preprocess, decode

ASSETS = pathlib.Path(digits.__file__).parents[1] / "evals/assets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("digits")
    assert digits.write(out) == {"train": 1438, "test": 359}
    return out


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_the_test_split_is_a_fifth_of_every_digit_and_shares_no_image(folder):
    train, test = rows(folder, "train"), rows(folder, "test")
    assert not {pathlib.Path(r["image"]).name for r in train} & {pathlib.Path(r["image"]).name for r in test}
    count = {split: collections.Counter(r["label"] for r in rs) for split, rs in (("train", train), ("test", test))}
    for label in range(10):
        total = count["train"][label] + count["test"][label]
        assert count["test"][label] == round(0.2 * total)


def test_images_are_the_scans_enlarged(folder):
    from sklearn.datasets import load_digits

    scans, row = load_digits(), rows(folder, "test")[3]
    image = decode(folder / row["image"])
    i = int(pathlib.Path(row["image"]).stem)
    assert image.size == (32, 32) and scans.target[i] == row["label"]
    small = np.asarray(image.resize((10, 10), PIL.Image.Resampling.BOX), float)[1:9, 1:9]
    assert np.corrcoef(small.ravel(), scans.images[i].ravel())[0, 1] > 0.95


def test_captions_name_the_digit_and_are_no_prompt_of_the_evaluation(folder):
    prompts = (ASSETS / "templates_digits.txt").read_text().split("\n")
    assert (ASSETS / "classes_digits.txt").read_text().split() == list(digits.NAMES)
    for row in rows(folder, "train")[:200]:
        assert row["cls"] == digits.NAMES[row["label"]] and len(row["captions"]) == len(digits.TEMPLATES)
        assert all(row["cls"] in c or str(row["label"]) in c for c in row["captions"])
        assert not {p.format(row["cls"]) for p in prompts if p} & set(row["captions"])
    words = [word for t in digits.TEMPLATES for word in ("{}", "{number}") if word in t]
    assert {"{}", "{number}"} == set(words)


def test_the_same_arguments_write_the_same_bytes_and_another_seed_another_split(folder, tmp_path):
    digits.write(tmp_path / "a")
    digits.write(tmp_path / "b", seed=1)
    for name in ("train.jsonl", rows(folder, "train")[5]["image"]):
        assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "b/test.jsonl").read_text() != (folder / "test.jsonl").read_text()


def test_the_pipeline_reads_them(folder):
    source = {"name": "jsonl", "path": str(folder / "train.jsonl")}
    with pipeline.create({"sources": [source]}, batch_size=16, image_size=24, context_length=12, seed=0) as loader:
        batch = next(loader)
    assert batch["image"].shape == (16, 24, 24, 3) and len(np.unique(batch["text"], axis=0)) > 8
    count = sum(1 for _ in pipeline.examples({"name": "jsonl", "path": str(folder / "test.jsonl")}, Preprocess(8)))
    assert count == 359


@pytest.mark.parametrize("wrong", [{"test": 0.0}, {"test": 1.0}, {"size": 4}])
def test_a_split_or_size_out_of_range_is_refused(tmp_path, wrong):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="must lie between 0 and 1, size="):
        digits.write(tmp_path, **wrong)

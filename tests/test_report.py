"""The report of a tiny run whose files are made by hand."""

import csv
import html.parser
import io
import json
import re

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from pe_jax import checkpoint, cli, report
from pe_jax.data.image import Preprocess
from pe_jax.models import zoo
from pe_jax.types import split

pytest.importorskip("matplotlib")

ARCH = {
    "vision": {
        "image_size": 16,
        "patch_size": 4,
        "width": 12,
        "depth": 2,
        "heads": 1,
        "mlp_width": 20,
        "class_token": True,
        "pool": "attention",
        "pool_heads": 1,
        "output_width": 10,
    },
    "text": {"context_length": 14, "width": 16, "depth": 1, "heads": 2, "mlp_width": 18, "output_width": 10},
}
CLASSES = ["red", "green", "blue"]


class Parser(html.parser.HTMLParser):
    """Collects images and text, and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny run"
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for i in range(9):
        image = random.integers(0, 60, (11, 14, 3))
        image[..., i % 3] += 150
        PIL.Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "label": i % 3, "caption": f"a {CLASSES[i % 3]} thing"})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "jsonl", "path": str(folder / "data.jsonl")}
    config = {
        "stage": {"name": "contrastive", "arch": ARCH},
        "batch_size": 4,
        "phases": [{"image_size": 8, "examples": 40}, {"image_size": 16, "examples": 16, "batch_size": 2}],
        "optimizer": {"name": "lamb", "learning_rate": 0.01},
        "data": {"sources": [source], "augment": {"hflip": 0.5}},
        "evals": {"colours": {"name": "zero_shot", "data": source, "classes": CLASSES, "every_steps": 5}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "losses.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss", "examples_per_second"])
        rows.writerows([[step, 2 / step, 20.0] for step in range(2, 19, 2)])
    params = jax.jit(lambda: split(zoo.build(ARCH, nnx.Rngs(1)))[1])()
    metadata = {"architecture": zoo.to_dict(zoo.architecture(ARCH)), "preprocess": Preprocess(16).to_dict()}
    checkpoint.save_weights(folder / "checkpoints" / "18", params, metadata)
    return folder


@pytest.fixture(scope="module")
def written(workdir):
    (workdir / "evals.csv").write_text(
        "step,name,value\n5,colours/top1,0.25\n18,colours/top1,0.5625\n18,colours/mean_recall,0.5\n"
    )
    return report.write(workdir)


def test_every_picture_is_a_file_and_inside_the_page(written):
    _, page = written
    parser = Parser()
    parser.feed(page.read_text())
    assert not parser.open
    names = ("curves", "samples", "confusion", "layers", "features")
    assert len(parser.images) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in parser.images)
    for name in names:
        picture = np.asarray(PIL.Image.open(io.BytesIO((page.parent / f"{name}.png").read_bytes())).convert("RGB"))
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10, f"{name}.png shows nothing"


def test_the_page_needs_nothing_from_elsewhere(written):
    text = written[1].read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "http://" not in text
    assert "https://" not in text


def test_numbers_in_the_page_are_those_of_the_metrics(written, workdir):
    summary, page = written
    parser = Parser()
    parser.feed(page.read_text())
    text = " ".join(parser.text)
    assert summary["evals"] == {"colours/top1": 0.5625, "colours/mean_recall": 0.5}
    assert "0.5625" in text
    assert summary["final_loss"] == 2 / 18
    assert f"{2 / 18:.4f}" in text
    assert f"{summary['zero_shot_top1']:.2%}" in text
    assert json.loads((page.parent / "report.json").read_text()) == summary


def test_zero_shot_of_the_page_is_the_evaluators(written, workdir):
    import pe_jax
    from pe_jax import evals

    config = json.loads((workdir / "config.json").read_text())["evals"]["colours"]
    figures = evals.create(config)(pe_jax.load(str(workdir)))
    assert written[0]["zero_shot_top1"] == figures["top1"]
    assert written[0]["zero_shot_mean_recall"] == figures["mean_recall"]


def test_examples_and_time_count_phases_of_different_batch_sizes(written, workdir):
    run = report.read(workdir)
    assert run.boundaries == (40, 56)
    assert [run.examples(step) for step in (5, 10, 14)] == [20, 40, 48]
    assert written[0]["examples"] == 56
    assert written[0]["training_seconds"] == pytest.approx(56 / 20)


def test_the_layer_curve_has_every_layer_and_its_best(written):
    summary, _ = written
    assert list(summary["layers"]) == ["0", "1", "2"]
    assert summary["best_layer_accuracy"] == max(summary["layers"].values())


def test_the_command_prints_where_the_page_is(workdir, tmp_path, capsys):
    assert cli.main(["report", str(workdir), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in said
    assert "zero shot top1:" in said


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no config.json; give the --workdir" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, workdir, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["report", str(workdir)]) == 2
    assert "pip install 'pe-jax[viz]'" in capsys.readouterr().err

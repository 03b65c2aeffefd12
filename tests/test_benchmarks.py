"""The benchmarks at toy size, and what they keep: one form of result, and the page made of it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import loss, page, results, turns

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | env)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two benchmarks run as a reader would, and the folder they wrote."""
    folder = tmp_path_factory.mktemp("results")
    done = run("--quick", "--only=loss,probes", "--rounds=1", f"--out={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


def example(**changes):
    """A result that was made by hand: one case, in which ours took 2 s and a peer 1 s."""
    slow, fast = ({"median": s, "quartiles": [s, s]} for s in (2.0, 1.0))
    programs = {"ours": {"seconds": slow}, "a <peer>": {"seconds": fast, "ratio": slow}}
    rounds = {"rounds": 1, "quiet": True, "all": [{"ours": 2.0, "a <peer>": 1.0}]}
    case = {"title": "work", "settings": {}, "programs": programs, "left_out": {}, **rounds}
    return results.new("loss", "by hand", ["numpy"], quick=False) | {"cases": [case]} | changes


def test_one_command_prints_tables_with_machine_versions_medians_and_ratios(quick):
    printed, _ = quick
    assert f"{os.cpu_count()} cores" in printed and f"numpy {np.__version__}" in printed
    for word in ("median", "quartiles", "time ours / it", "256 pairs x 64, plain", "k-NN", "accuracy"):
        assert word in printed, word


def test_results_have_one_form_and_a_page(quick):
    _, folder = quick
    found = results.load_all(folder)
    assert {result["benchmark"] for result in found} == {"loss", "probes"}
    assert all(result["quick"] and result["date"][:10] in path.name for result, path in _with_files(folder))
    probes = next(result for result in found if result["benchmark"] == "probes")["cases"][0]
    accuracies = [it["figures"]["accuracy"] for it in probes["programs"].values()]
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]
    text = (folder / "index.html").read_text()
    assert probes["title"] in text and "<svg" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def _with_files(folder):
    return [(results.load(path), path) for path in sorted(folder.glob("*.json"))]


def test_a_missing_peer_is_told_and_ours_still_timed(tmp_path):
    done = run("--quick", "--only=forward", "--rounds=1", f"--out={tmp_path}", PERCEPTION_MODELS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "set PERCEPTION_MODELS to a checkout of github.com/facebookresearch/perception_models" in done.stdout
    (case,) = results.load_all(tmp_path)[0]["cases"]
    assert case["programs"]["ours"]["seconds"]["median"] > 0 and "Meta's module" in case["left_out"]


@pytest.mark.skipif(results.accelerator() is not None, reason="there is a GPU, and this is about having none")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(tmp_path):
    done = run("--only=gpu", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not measured: no GPU is at hand") == 4
    assert "not measured" in (tmp_path / "index.html").read_text()


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    done = run("--only=loss,lost")
    assert done.returncode == 2 and "lost of --only=loss,lost is no benchmark; there are forward," in done.stderr


def test_a_peer_that_computes_something_else_stops_the_benchmark():
    ours = {"loss": 2.0, "gradients": [1.0, 2.0]}
    loss.same({"ours": ours, "peer": {"loss": 2.0, "gradients": [1.0, 2.0]}}, {})
    with pytest.raises(AssertionError, match="peer: gradients differ"):
        loss.same({"ours": ours, "peer": {"loss": 2.0, "gradients": [1.0, 2.1]}}, {})


def test_a_folder_that_is_none_is_named_where_a_checkout_was_wanted(monkeypatch):
    monkeypatch.setenv("BIG_VISION", "/no/such/folder")
    assert "BIG_VISION=/no/such/folder is no folder" in (turns.lacking(["BIG_VISION"]) or "")
    monkeypatch.setenv("BIG_VISION", str(ROOT))
    assert turns.lacking(["BIG_VISION"]) is None


def broken():
    cases = example()["cases"]
    without = {name: it for name, it in cases[0].items() if name != "programs"}
    lonely = cases[0] | {"programs": {"ours": {}}}
    return [
        ("{", "Expecting"),
        ("[]", "the result is [], not an object"),
        (json.dumps({"forward": []}), "the result has no 'benchmark'"),
        (json.dumps(example(benchmark="lost")), "'lost' is none of forward"),
        (json.dumps(example(date="yesterday")), "yesterday"),
        (json.dumps(example(quick="no")), "'quick' of the result is \"no\", wanted bool"),
        (json.dumps(example(cases=[without])), "case 0 has no 'programs'"),
        (json.dumps(example(cases=[lonely])), "'ours' of 'work' has no 'seconds'"),
    ]


@pytest.mark.parametrize(("text", "told"), broken())
def test_a_malformed_result_is_named(tmp_path, text, told, capsys):
    path = tmp_path / "loss-2026-01-01T0000.json"
    path.write_text(text)
    assert page.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and told in error, error


def test_the_page_shows_the_newest_figures_and_how_they_went(tmp_path):
    old, new = example(date="2026-01-01T00:00:00+00:00"), example(date="2026-02-01T00:00:00+00:00")
    ratio = new["cases"][0]["programs"]["a <peer>"]["ratio"]
    new["cases"][0]["programs"]["a <peer>"]["ratio"] = ratio | {"median": 0.5, "quartiles": [0.4, 0.6]}
    for result in (old, new):
        results.save(result, tmp_path)
    text = page.write(tmp_path).read_text()
    assert "0.50 (0.40 to 0.60)" in text and "2.00 (2.00 to 2.00)" not in text
    assert "Over the dates" in text and "2026-01-01" in text and "a &lt;peer&gt;" in text and "<peer>" not in text


def test_an_empty_folder_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no result"):
        page.write(tmp_path)


def test_kept_results_are_well_formed():
    assert results.load_all(results.FOLDER)

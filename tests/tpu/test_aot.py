"""The ahead-of-time report: what it is asked, and what it tells; with libtpu, what the compiler answers."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from pe_jax import sharding
from tpu import aot, page

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` installs it"
)
DIGITS = "experiments/digits.py"
FITS = {
    "topology": "v5e:4x4", "slices": 1, "chips": 16, "mesh": {"data": 4, "fsdp": 4}, "image_size": 224,
    "batch_size": 4096, "microbatches": 2, "remat": "block", "parameter_bytes": 2**30, "optimizer_bytes": 2**31,
    "batch_bytes": 2**28, "model_flops": 3e12, "fits": True, "compile_seconds": 91.0, "argument_bytes": 3.25 * 2**30,
    "temporary_bytes": 4 * 2**30, "holds": 15.75 * 2**30, "executed_flops": 4.5e12, "exposed_seconds": 0.01,
    "seconds": {"roofline": 0.02, "middle": 0.025, "cycles": 0.04},
    "mfu": {"roofline": 0.76, "middle": 0.61, "cycles": 0.38},
    "collectives": [{"kind": "all-gather", "axes": "fsdp", "count": 1200, "bytes": 2**34}],
    "lines": [{"line": "pe_jax/models/layers.py:83", "seconds": 0.02}, {"line": "waiting <&>", "seconds": 0.005}],
    "buffers": [{"bytes": 2**29, "shape": "bf16[12,64,197,768]", "line": "pe_jax/models/layers.py:390"}],
}  # fmt: skip
REFUSED = {key: FITS[key] for key in list(FITS)[:12]} | {
    "remat": "none", "fits": False, "needs": 52 * 2**30, "holds": 15.75 * 2**30, "compile_seconds": 30.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What is compiled here is kept here, not in the user's cache."""
    monkeypatch.setenv("PE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "told",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 52.00G of 15.75G hbm. Exceeded by 36.25G.",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (52.00G) exceeds available HBM (15.75G).",
    ],
)
def test_a_refusal_is_read_in_bytes(told):
    assert aot._refusal(told) == {"needs": 52 * 2**30, "holds": 15.75 * 2**30}


def test_the_table_tells_bytes_band_collectives_and_lines():
    text = aot.table(FITS)
    for word in ("7.25 of 15.75 GiB, 54% to spare", "61.0% estimated (38.0% to 76.0%)", "executed 1.50 times as many"):
        assert word in text
    assert "all-gather" in text and "fsdp" in text and "pe_jax/models/layers.py:83" in text and "512 MiB" in text


def test_a_program_that_does_not_fit_says_by_how_much_and_what_to_change():
    text = aot.table(REFUSED)
    assert "does not fit: it needs 52.00 GiB of 15.75, 36.25 too many" in text and "stage.microbatches" in text


def test_what_was_tried_is_ranked_and_what_does_not_fit_comes_last():
    slower = FITS | {"seconds": {"roofline": 0.03, "middle": 0.05, "cycles": 0.06}, "remat": "dots"}
    lines = aot.ranked([REFUSED, slower, FITS]).splitlines()
    assert [word in line for word, line in zip(("block", "dots", "none"), lines[1:], strict=True)] == [True] * 3


def test_the_page_stands_alone_and_escapes_what_it_shows():
    text = page.of("experiments/x.py:<b>", [FITS, REFUSED], FITS)
    assert "<b>" not in text and "waiting &lt;&amp;&gt;" in text and "does not fit" in text
    assert "http" not in text and "src=" not in text


def test_a_change_reaches_both_towers_every_phase_and_leaves_the_config_as_it_was():
    config = aot.config_of("experiments/pretrain_core.py:B16")
    new = aot.changed(config, mesh={"data": 2}, batch=64, micro=2, remat="no_up")
    assert new["mesh"] == {"data": 2} and new["batch_size"] == 64 and new["stage"]["microbatches"] == 2
    assert {new["stage"]["arch"][part]["remat"] for part in ("vision", "text")} == {"no_up"}
    assert config["stage"]["arch"]["vision"]["remat"] == "block" and config["batch_size"] == 131_072


@needs_libtpu
def test_a_step_is_compiled_for_a_slice_that_is_not_here(tmp_path, capsys):
    args = [f"--config={DIGITS}", "--topology=v5e:2x2", "--batch=512", f"--json={tmp_path / 'a.json'}"]
    assert aot.main([*args, f"--html={tmp_path / 'a.html'}"]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["chips"] == 4 and figures["mesh"] == {"data": 4}
    assert 0.95 < figures["executed_flops"] / figures["model_flops"] < 1.25
    assert figures["seconds"]["roofline"] <= figures["seconds"]["middle"] <= figures["seconds"]["cycles"]
    assert figures["argument_bytes"] >= figures["parameter_bytes"] + figures["optimizer_bytes"]
    assert any(each["kind"] == "all-reduce" and each["axes"] == "data" for each in figures["collectives"])
    assert any(line["line"].startswith("pe_jax/") for line in figures["lines"])
    assert "estimated" in capsys.readouterr().out and "<h2>" in (tmp_path / "a.html").read_text()
    (kept,) = (tmp_path / "cache" / "aot").glob("*.json.gz")
    written = kept.stat().st_mtime_ns
    assert aot.main(args) == 0  # an unchanged program is read back, not compiled
    assert {**json.loads((tmp_path / "a.json").read_text()), "compile_seconds": 0} == {**figures, "compile_seconds": 0}
    assert [*(tmp_path / "cache" / "aot").iterdir()] == [kept] and kept.stat().st_mtime_ns == written


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:8x8", "v6e:8x8", "v5p:4x4x4"])
def test_an_axis_that_no_sides_of_the_torus_multiply_to_is_laid_over_neighbours(topology):
    mesh = sharding.make_mesh({"data": 4, "fsdp": 16}, aot.devices_of(topology))
    assert mesh.devices.shape == (1, 4, 16, 1) and len({device.id for device in mesh.devices.flat}) == 64
    for group in mesh.devices[0, :, :, 0]:  # a block of the torus, not chips from all over it
        sides = np.ptp([device.coords for device in group], axis=0) + 1
        assert np.prod(sides) == 16


@needs_libtpu
def test_what_is_kept_belongs_to_one_program_with_its_options():
    one, other = (jax.jit(lambda x, c=c: x + c).lower(1.0) for c in (1.0, 2.0))
    keys = {aot._key(one, "v5e:2x2", {}), aot._key(other, "v5e:2x2", {}), aot._key(one, "v5e:2x2", {"a": 1})}
    assert len(keys) == 3 and aot._key(one, "v5e:2x2", {}) in keys


@needs_libtpu
def test_a_step_that_is_too_large_is_refused_with_its_need_and_that_is_kept_too(tmp_path, capsys):
    args = ["--config=experiments/pretrain_core.py:T16,micro=1", "--topology=v5e:2x2", "--batch=16384", "--remat=none"]
    assert [aot.main(args) for _ in range(2)] == [1, 1]
    first, again = capsys.readouterr().out.split("does not fit")[1:]
    assert first.splitlines()[0] == again.splitlines()[0] and "it needs" in first
    assert len(list((tmp_path / "cache" / "aot").glob("*.json.gz"))) == 1


@needs_libtpu
def test_a_slice_with_sparse_cores_is_read_too(capsys, tmp_path):
    args = [
        f"--config={DIGITS}",
        "--topology=v5p:2x2x1",
        "--mesh=fsdp=4",
        "--batch=512",
        f"--text={tmp_path / 'a.txt'}",
    ]
    assert aot.main(args) == 0
    told = capsys.readouterr().out
    assert "of 95.74 GiB" in told and "estimated" in told and "all-gather" in told
    assert "is_scheduled=true" in (tmp_path / "a.txt").read_text()[:2000]


@needs_libtpu
def test_slices_are_joined_by_the_dcn_axis(capsys):
    args = [f"--config={DIGITS}", "--topology=v5e:2x2", "--slices=2", "--batch=512"]
    assert aot.main([*args, "--mesh=data=8"]) == 2
    assert "there are 2 slices, and the mesh has dcn=1" in capsys.readouterr().err
    assert aot.main([*args, "--mesh=dcn=2,data=-1"]) == 0
    told = capsys.readouterr().out
    assert "2 slices of v5e:2x2, 8 chips" in told and "dcn" in told.partition("collectives")[2]


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know_is_named(capsys):
    assert aot.main([f"--config={DIGITS}", "--topology=v5e:3x5x7"]) == 2
    assert "topology 'v5e:3x5x7' is unknown to the compiler" in capsys.readouterr().err

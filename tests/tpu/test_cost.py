"""What the recipe costs: counted from shapes, held to figures that were published or counted by other programs."""

import html.parser
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import pretrain_core
from pe_jax.models import zoo
from tpu import chips, cost

ROOT = pathlib.Path(__file__).parents[2]
REPORT = cost.report()


def flops(phase: cost.Phase) -> float:
    return sum(part.flops for part in phase.parts) * phase.examples


@pytest.mark.parametrize(("row", "published"), [(1, 0.97), (2, 0.5), (3, 1.1), (5, 1.2)])
def test_forward_multiply_adds_of_the_vision_tower_are_the_papers_zflops(row, published):
    config = pretrain_core.get_config(f"L14,ablation={row}").to_dict()
    vision = zoo.architecture(config["stage"]["arch"]).vision
    zetta = sum(phase["examples"] * zoo.forward_flops(vision, phase["image_size"]) / 2 for phase in config["phases"])
    assert zetta / 1e21 == pytest.approx(published, abs=0.05 if row > 1 else 0.01)


def test_pretraining_g_takes_about_2e23_flops_forward_and_backward():
    assert sum(flops(phase) for phase in cost.pretraining("G")) == pytest.approx(2e23, rel=0.1)


def test_pretraining_is_the_experiments_own_phases_at_the_stages_own_flops():
    config = pretrain_core.get_config("L14").to_dict()
    phases = cost.pretraining("L")
    assert [phase.image_size for phase in phases] == [phase["image_size"] for phase in config["phases"]]
    for phase, own in zip(phases, config["phases"], strict=True):
        assert 0 <= own["examples"] - phase.examples < config["batch_size"]  # whole batches
        towers = 3 * zoo.forward_flops(zoo.architecture("PE-Core-L14-336"), phase.image_size)
        assert towers < phase.parts[0].flops < 1.06 * towers  # and the masked sixteenth


@pytest.mark.parametrize(
    ("model", "stage", "steps", "batch"),
    [
        ("B", "pretraining", 443_000, 131_072),
        ("L", "pretraining", 443_000, 131_072),
        ("G", "pretraining", 656_000, 131_072),
        ("L", "distillation", 269_000, 16_384),
        ("G", "spatial", 24_000, 12_288),
    ],
)
def test_examples_are_the_published_steps_times_the_published_batch(model, stage, steps, batch):
    examples = sum(phase.examples for phase in cost.STAGES[stage](model))
    assert examples == pytest.approx(steps * batch, rel=0.02)  # 300M for 295M is the coarsest of the paper's roundings


def test_short_stages_see_the_published_numbers_of_examples():
    assert [phase.examples for phase in cost.video("G")] == [50_000_000, 22_000_000]
    assert [phase.examples for phase in cost.language("G")] == [1_000_000, 70_000_000]
    assert [phase.examples for phase in cost.plm("L")] == [1_000_000, 72_500_000, 19_100_000]


def test_a_decoder_takes_two_flops_per_parameter_and_token_and_its_attention():
    config = zoo.decoder("Llama-3.1-8B")
    products = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # neither the embedding nor norms are products
    assert zoo.decoder_flops(config, 1) == 2 * products + 4 * 32 * 4096
    assert zoo.decoder_flops(config, 100, 0) == 100 * (zoo.decoder_flops(config, 1, 0) + 99 * 4 * 32 * 4096)


def test_sam_costs_what_a_flop_counter_finds_in_an_independent_implementation():
    """torch's FlopCounterMode over the Sam2Model of transformers 5, SAM 2.1-L's sizes, 1,024 px and 1,024 points."""
    assert cost.sam_encoder_flops() == pytest.approx(1_824_968_933_376, rel=2e-3)
    assert cost.sam_point_flops() == pytest.approx(3_639_285_248, rel=1e-4)


def test_frozen_parts_cost_one_forward_pass_or_two_where_gradients_pass_through():
    tower = zoo.forward_flops(zoo.architecture("PE-Lang-G14-448"))
    spoken = zoo.decoder_flops(zoo.decoder("Llama-3.2-3B"), 1024 + 256, 256)
    projector = 2 * 1024 * (1536 * 3072 + 3072 * 3072)
    warm_up, _ = cost.language("G")
    assert [part.flops for part in warm_up.parts] == [tower, 3 * projector, 2 * spoken]


def test_aligning_with_language_trains_everything_on_views_and_text_of_the_mix():
    _, aligned = cost.language("L")
    tower = zoo.forward_flops(zoo.architecture("PE-Lang-L14-448"))
    assert aligned.parts[0].flops == pytest.approx(3 * tower * (50.5 * 1 + 19.0 * 16) / 72.5)
    lengths = {1024 + 512: 50.5, 16 * 256 + 512: 19.0, 512: 3.0}
    decoder = zoo.decoder("Llama-3.2-3B")
    spoken = sum(share / 72.5 * zoo.decoder_flops(decoder, n, 512) for n, share in lengths.items())
    assert aligned.parts[2].flops == pytest.approx(3 * spoken)


def test_teachers_of_small_models_are_g_at_its_own_size():
    (distilled,) = cost.distillation("B")
    student, teacher = distilled.parts
    assert student.flops == 3 * zoo.forward_flops(zoo.architecture("PE-Core-B16-224"))
    assert teacher.flops == zoo.forward_flops(zoo.architecture("PE-Core-G14-448"))
    (aligned,) = cost.spatial("L")
    assert aligned.parts[1].flops == zoo.forward_flops(zoo.architecture("PE-Spatial-G14-448"))


def test_spatial_alignment_of_g_has_41_blocks_of_core_and_sams_points_for_teachers():
    (phase,) = cost.spatial("G")
    student, core, encoder, points = (part.flops for part in phase.parts)
    assert core / student == pytest.approx(41 / 50 / 3, rel=1e-3)
    assert points == 1024 * cost.sam_point_flops() > encoder


def test_videos_cost_the_image_tower_once_per_frame():
    images, videos = cost.video("G")
    arch = zoo.architecture("PE-Core-G14-448")
    assert videos.parts[0].flops - images.parts[0].flops == 3 * 7 * zoo.forward_flops(arch.vision)


@pytest.mark.parametrize("given", [{}, {"chip": "v5e"}, {"chip": "tpu7x"}, {"mfu": 0.4}, {"usd": 2.5, "count": 512}])
def test_chip_hours_times_peak_times_mfu_are_the_flops(given):
    report = cost.report(**given)
    for row in (*report["phases"], *report["totals"]):
        hours = row["chip_hours"]
        assert hours["middle"] * 3600 * report["peak_flops"] * row["mfu"] == pytest.approx(row["flops"])
        assert hours["least"] <= hours["middle"] <= hours["most"]
        assert row["days"] * 24 * report["chips"] == pytest.approx(hours["middle"])
        assert row["usd"] == (pytest.approx(2.5 * hours["middle"]) if "usd" in given else None)
        if "mfu" in given:
            assert row["mfu"] == pytest.approx(0.4) and hours["least"] == hours["most"]


def test_a_band_of_hours_is_the_band_of_the_mfu():
    rate = cost.MFU["v5p"]["G short"]
    hours = next(row for row in REPORT["phases"] if (row["model"], row["phase"]) == ("G", "98 px"))["chip_hours"]
    assert hours["least"] * rate.high == pytest.approx(hours["middle"] * rate.middle)
    assert hours["most"] * rate.low == pytest.approx(hours["middle"] * rate.middle)


def test_totals_are_the_sums_of_their_phases():
    totals = {(row["model"], row["stage"]): row for row in REPORT["totals"]}
    assert ("G", "distillation") not in totals and ("B", "language") not in totals
    for key in ("flops", "examples", "days"):
        whole = sum(row[key] for row in REPORT["phases"] if key in row)
        assert totals["all", "all"][key] == pytest.approx(whole)
        assert sum(totals[model, "all"][key] for model in "BLG") == pytest.approx(whole)
        assert sum(totals["all", stage][key] for stage in cost.STAGES) == pytest.approx(whole)


def test_every_chip_has_a_band_for_every_kind_of_work():
    kinds = {part["kind"] for row in REPORT["phases"] for part in row["parts"]}
    assert set(cost.MFU) == {chip.name for chip in chips.CHIPS.values()}
    for rates in cost.MFU.values():
        assert set(rates) == kinds
        assert all(0 < rate.low <= rate.middle <= rate.high < 1 and rate.source for rate in rates.values())


def test_the_peak_is_of_a_chip_and_not_of_one_of_its_cores():
    assert cost.report(chip="tpu7x")["peak_flops"] == 2307e12
    assert REPORT["peak_flops"] == 459e12


def test_a_choice_of_models_and_stages_has_only_those():
    report = cost.report(["G", "B"], ["video", "pretraining"])
    assert list(dict.fromkeys((row["model"], row["stage"]) for row in report["phases"])) == [
        ("B", "pretraining"),
        ("B", "video"),
        ("G", "pretraining"),
        ("G", "video"),
    ]
    assert set(report["notes"]) == {"split", "cooldown", "replay"}
    assert set(report["mfu"]) == {"B", "G short", "G long"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--chip=v5", "chip 'v5' is unknown; choose from v5e, v5p, v6e, v4, tpu7x"),
        ("--models=B,H", "model 'H' is unknown; choose from B, L, G"),
        ("--stage=pretrain", "stage 'pretrain' is unknown; choose from pretraining, distillation, video"),
        ("--chips=0", "--chips=0 must be at least 1"),
        ("--mfu=45", "--mfu=45.0 must be in (0, 1], such as 0.45 for 45%"),
        ("--mfu=nan", "--mfu=nan must be in (0, 1]"),
        ("--usd-per-chip-hour=-1", "--usd-per-chip-hour=-1.0 must be a price"),
    ],
)
def test_a_wrong_choice_says_what_would_be_right(argument, message, capsys):
    assert cost.main([argument]) == 2
    assert message in capsys.readouterr().err


def test_a_choice_without_any_phase_says_why(capsys):
    assert cost.main(["--models=B", "--stage=language,plm"]) == 2
    assert "has no phase: G is not distilled, and B is not aligned with a language model" in capsys.readouterr().err


def test_the_command_writes_json_that_reads_back_and_starts_no_device(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, "-m", "tpu.cost", f"--json={out}", f"--html={tmp_path / 'cost.html'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(out.read_text()) == REPORT
    assert (tmp_path / "cost.html").read_text() == cost.webpage(REPORT)
    for table in cost.tables(REPORT):
        assert cost.markdown(table) in done.stdout
    for text in (*REPORT["notes"].values(), *(rate["source"] for rate in REPORT["mfu"].values())):
        assert text in done.stdout


def test_a_price_adds_a_column():
    priced = cost.tables(cost.report(["G"], ["video"], usd=2.0))
    plain = cost.tables(cost.report(["G"], ["video"]))
    assert [table.head[-1] for table in priced] == ["USD", "USD"]
    assert [len(table.head) for table in priced] == [len(table.head) + 1 for table in plain]
    assert all(len(row) == len(table.head) for table in (*priced, *plain) for row in table.rows)


class _Balanced(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.cells += tag == "td"
        assert not {name for name, _ in attrs} & {"src", "href"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_has_every_cell():
    page = _Balanced()
    page.feed(cost.webpage(REPORT))
    several = sum(len(row["parts"]) > 1 for row in REPORT["phases"])
    assert not page.open
    assert page.cells == sum(len(table.head) * len(table.rows) for table in cost.tables(REPORT)) + 5 * several


def test_the_documented_tables_and_notes_are_the_commands_own():
    """When figures change: paste what `python -m tpu.cost`, and it with `--chip=v5e` and `--chip=v6e`, print."""
    page = (ROOT / "docs/cost.md").read_text()
    for table in cost.tables(REPORT):
        assert cost.markdown(table) in page
    for chip in ("v5e", "v6e"):
        assert cost.markdown(cost.tables(cost.report(chip=chip))[-1]) in page
    for i, note in enumerate(REPORT["notes"].values()):
        assert f"{i + 1}. {note}" in " ".join(page.split())

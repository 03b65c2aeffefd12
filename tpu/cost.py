"""What the whole recipe costs: examples, FLOPs, chip-hours and days of every phase of PE-B, -L and -G.

  python -m tpu.cost
  python -m tpu.cost --models=G --stage=pretraining,video --chip=v5e --chips=256 --usd-per-chip-hour=1.20
  python -m tpu.cost --chip=v6e --mfu=0.45 --json=cost.json --html=cost.html

The paper gives none of this. FLOPs are the model's own, two for every multiply-add of its matrix products, from its
shapes alone: recomputation lowers the MFU instead, and losses (at most 1%), padding and evaluations are left out.
Chip-hours are FLOPs / (peak x MFU), with the band of the MFU. Needs no libtpu and no devices.

One rule says what a part of a model costs, in forward passes: 3 where it is trained, as a backward pass takes two; 2
where it is frozen but gradients pass through it, for a product has a gradient for its input and one for its weights; 1
where it is frozen and nothing before it learns.
"""

import argparse
import dataclasses
import html
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments import pretrain_core
from pe_jax import train
from pe_jax.models import zoo
from pe_jax.models.clip import CLIPConfig
from pe_jax.models.vision import VisionConfig
from tpu import chips, page

# ---- data: what is estimated, what the paper says --------------------------------------------------------------------


class Mfu(NamedTuple):
    """Model FLOPs utilisation of one kind of work on one kind of chip, and where the figures come from."""

    low: float
    middle: float
    high: float
    source: str


_GOALS = "python -m tpu.goals --only"
_AOT = "tpu.aot --topology=v5e:16x16 --config=experiments/pretrain_core.py:"
_NARROW = "not compiled: below G as on v5e"
_DECODER = "not compiled: large matrix products, as a long tower or above"
_SAM = "not compiled: a point has about 60 FLOPs for each byte of HBM"
# By kind of work: training the towers of a model, G's on up to `SHORT` tokens and on more; a Llama; SAM 2.1's Hiera and
# mask decoder. A frozen tower is taken as one that is trained.
MFU: dict[str, dict[str, Mfu]] = {
    "v5e": {
        "B": Mfu(0.27, 0.37, 0.51, f"{_AOT}B16,micro=4 --mesh data=256,fsdp=1"),
        "L": Mfu(0.28, 0.40, 0.48, f"{_AOT}L14,micro=16 --mesh data=64,fsdp=4"),
        "G short": Mfu(0.43, 0.52, 0.55, f"{_GOALS} 'G14 224 px v5e-256': 55%; about 5 points less at 98 px"),
        "G long": Mfu(0.39, 0.50, 0.56, f"{_GOALS} 'G14 448 px v5e-256'"),
        "decoder": Mfu(0.45, 0.55, 0.65, _DECODER),
        "sam": Mfu(0.08, 0.15, 0.25, _SAM),
    },
    "v5p": {
        "B": Mfu(0.26, 0.35, 0.50, _NARROW),
        "L": Mfu(0.34, 0.43, 0.55, _NARROW),
        "G short": Mfu(0.47, 0.57, 0.60, f"{_GOALS} 'G14 224 px v5p-128': 60%; about 5 points less at 98 px"),
        "G long": Mfu(0.44, 0.56, 0.62, f"{_GOALS} 'G14 448 px v5p-128'"),
        "decoder": Mfu(0.48, 0.58, 0.68, _DECODER),
        "sam": Mfu(0.10, 0.20, 0.35, _SAM),
    },
    "v6e": {
        "B": Mfu(0.15, 0.21, 0.29, _NARROW),
        "L": Mfu(0.17, 0.25, 0.34, _NARROW),
        "G short": Mfu(0.22, 0.29, 0.43, f"{_GOALS} 'G14 224 px v6e-256': 31%; less at 98 px"),
        "G long": Mfu(0.19, 0.28, 0.44, f"{_GOALS} 'G14 448 px v6e-256'"),
        "decoder": Mfu(0.30, 0.40, 0.50, _DECODER),
        "sam": Mfu(0.04, 0.07, 0.11, _SAM),
    },
}
MFU |= {
    chip: {kind: rate._replace(source=f"not compiled: as {like}") for kind, rate in MFU[like].items()}
    for chip, like in (("v4", "v5e"), ("tpu7x", "v6e"))  # the nearest in FLOPs per byte of HBM and per vector lane
}
_GIVEN = "given by the caller"
SHORT = 300  # tokens
DEVICES_OF_A_CHIP = {"tpu7x": 2}  # where JAX counts cores

# What the papers say of stages whose experiments are not here yet: each line moves to its experiment when that comes,
# and is read from there as pretraining is. PLM is arXiv 2504.13180.
COOLDOWN = 50_000_000  # images of the pretraining set, at the last resolution (PE §2.4)
VIDEOS = 22_000_000  # once, ...
FRAMES = 8  # ... with so many frames, at the last resolution (PE §2.4, Table 19)
DISTILLED = 4_400_000_000  # 269K steps of 16,384 (PE §2.4, Table 20)
SPATIAL = 300_000_000  # 24K steps of 12,288 (PE §5.2, Tables 21 to 23)
SPATIAL_LAYER = 41  # of PE-core G, the student's other teacher (PE §5.2)
POINTS = 32 * 32  # each decoded to a mask by SAM 2.1-L (PE §5.2, Table 22)
WARM_UP = 1_000_000  # image-text pairs (PE §4.1; PLM §A.1)
ALIGNED = 70_000_000  # (PE §4.1)
MIDTRAINED = {"images": 50_500_000, "videos": 19_000_000, "text": 3_000_000}  # (PLM Table 7)
FINETUNED = {"images": 11_100_000, "videos": 5_500_000, "text": 2_500_000}  # (PLM Table 8)
CAPTION, TEXT = 256, 512  # text tokens of an example in the warm-up and later: not published, see NOTES["text"]

NOTES = {
    "split": "The paper gives the resolutions and the total; the experiment says how the examples are split.",
    "cooldown": "No mask regularisation: the paper mentions none. That B and L have a cooldown too is assumed.",
    "replay": "Videos only, no images among them: the paper does not say.",
    "distil": "KL alone. The teacher sees 448 px and its own 72 text tokens, the student its own size: not published.",
    "mix": "PLM's mid-training mix. Images are one view of 1,024 tokens, videos 16 frames of 256 after pooling: not "
    "published for PE-lang, so PLM's second stage without tiles.",
    "text": f"Text tokens are not published: {CAPTION} in the warm-up, its limit, and {TEXT} later, below limits of "
    "1,792 and 2,048. Sequences are packed; padded to 6,144, as in the release, PE-lang's LLM would cost three times "
    "as much.",
    "llm": "Llama-3.2-3B aligns L as it does G: the paper names it for G.",
    "tiles": "14 views of an image when at most 17 are allowed, 36 of 37 later, as the tiler cuts photos and pages.",
    "masking": "Masked patches stay in the sequence as zeros, so masking saves nothing; the paper does not say.",
    "sam": "SAM 2.1-L from its public architecture: an estimate. Every point is decoded in full, none is shared.",
    "small": "How PE-spatial L and B are distilled from G is not published: G's examples, no SAM.",
}


# ---- what a part of a model costs ------------------------------------------------------------------------------------


def sam_encoder_flops() -> int:
    """SAM 2.1-L on an image of 1,024 px: Hiera-L, its neck, and the two maps that every mask is refined with.

    Per block of width D that sees N tokens in windows of W: 8·N·D² for attention's projections, 16·N·D² for the MLP,
    4·N·W·D for attention itself. A stage's first block takes tokens of half the width and pools its queries to a
    quarter; it still has the windows of the stage before. Three blocks of the third stage attend to all tokens.

    Source: arXiv:2408.00714 and 2306.00989; depths, widths and windows of the released configuration.
    """
    tokens, width, window, block = (1024 // 4) ** 2, 144, 8, 0
    flops = 2 * tokens * 3 * 7**2 * width  # overlapping patches of 7 px, 4 apart
    for depth, windows in ((2, 8), (6, 4), (36, 16), (4, 8)):
        for i in range(depth):
            seen, taken = tokens, width
            if i == 0 and block:
                tokens, width = tokens // 4, 2 * width
                flops += 2 * seen * taken * width  # the residual's projection
            elif i == 0 or i == 1:
                window = windows
            keys = tokens if block in (23, 33, 43) else window**2
            flops += 2 * seen * taken * 3 * width + 2 * tokens * width**2 + 16 * tokens * width**2
            flops += 4 * tokens * keys * width
            block += 1
        flops += 2 * tokens * width * 256  # the neck
    return flops + 2 * 256 * (256**2 * 32 + 128**2 * 64)


def sam_point_flops() -> int:
    """One mask of SAM 2.1-L: two layers of attention both ways between 8 tokens and 64 x 64 of the image, 256 wide.

    The 8 are the object score's, the predicted IoU's, four masks', the point's, and one that pads it. What costs is
    on the image's side: keys and values twice per layer and once more at the end, and queries and outputs, 2·N·256·128
    each; then two transposed convolutions to 256 x 256 x 32.

    Source: arXiv:2408.00714 and 2304.02643; the released configuration.
    """
    points, image, width, inner = 8, 64**2, 256, 128
    cross = 2 * 2 * (points + image) * width * inner + 4 * points * image * inner
    tokens = 8 * points * width**2 + 4 * points**2 * width + 4 * points * width * 2048
    upscaling = 2 * image * 4 * width * 64 + 2 * 4 * image * 4 * 64 * 32 + 2 * 16 * image * 32 * 4
    heads = 2 * (4 * width * (2 * width + 32) + width * (2 * width + 4) + width * (2 * width + 1))
    return 2 * (tokens + 2 * cross) + cross + upscaling + heads


# ---- phases of the recipe --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """Of the work that one example brings."""

    name: str
    flops: float  # of an example, backward passes included
    kind: str  # of `MFU`


@dataclasses.dataclass(frozen=True)
class Phase:
    """One row of the report; `notes` are keys of `NOTES`."""

    name: str
    image_size: int
    tokens: str
    examples: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()


def _architecture(name: str, kind: type[Any]) -> Any:
    config = zoo.architecture(name)
    assert isinstance(config, kind)
    return config


def _tokens(vision: VisionConfig, image_size: int) -> int:
    return (image_size // vision.patch_size) ** 2 + vision.class_token


def _kind(vision: VisionConfig, image_size: int) -> str:
    """The key of `MFU` that a tower of B's, L's or G's width has."""
    size = {768: "B", 1024: "L", 1536: "G"}[vision.width]
    if size != "G":
        return size
    return "G short" if _tokens(vision, image_size) <= SHORT else "G long"


def _tower(name: str, vision: VisionConfig, passes: int) -> Part:
    return Part(name, passes * zoo.forward_flops(vision), _kind(vision, vision.image_size))


def _run(model: str) -> train.Run:
    """The experiment that pretrains a model, as the loop reads it."""
    size = {"B": "B16", "L": "L14", "G": "G14"}[model]
    return train.parse(pretrain_core.get_config(size).to_dict())


def pretraining(model: str) -> list[Phase]:
    """PE §2.1, read from its experiment."""
    phases, run = [], _run(model)
    for phase in run.phases:
        size, arch = phase.image_size, phase.stage.arch
        flops = phase.stage.update_flops(train.batch_spec(run, phase)) // phase.batch_size
        towers = Part("both towers", flops, _kind(arch.vision, size))
        tokens = f"{_tokens(arch.vision, size)} + {arch.text.context_length}"
        phases.append(Phase(f"{size} px", size, tokens, phase.steps * phase.batch_size, (towers,), ("split",)))
    return phases


def distillation(model: str) -> list[Phase]:
    """PE §2.4: PE-core G, frozen, teaches B and L in both towers."""
    if model == "G":
        return []
    run, teacher = _run(model), _architecture("PE-Core-G14-448", CLIPConfig)
    arch, size = run.stage.arch, run.image_size
    parts = (
        Part("student", 3 * zoo.forward_flops(arch, size), _kind(arch.vision, size)),
        Part("teacher G", zoo.forward_flops(teacher), _kind(teacher.vision, teacher.vision.image_size)),
    )
    tokens = f"{_tokens(arch.vision, size)} + {arch.text.context_length}"
    return [Phase("from G", size, tokens, DISTILLED, parts, ("distil",))]


def video(model: str) -> list[Phase]:
    """PE §2.4: a cooldown on images, then videos; B and L after their distillation."""
    run = _run(model)
    arch, size = run.stage.arch, run.image_size
    images, videos = (
        Part("both towers", 3 * zoo.forward_flops(arch, size, frames), _kind(arch.vision, size))
        for frames in (1, FRAMES)
    )
    vision, text = _tokens(arch.vision, size), arch.text.context_length
    return [
        Phase("image cooldown", size, f"{vision} + {text}", COOLDOWN, (images,), ("cooldown",)),
        Phase("videos", size, f"{FRAMES} x {vision} + {text}", VIDEOS, (videos,), ("replay",)),
    ]


class Sample(NamedTuple):
    """One kind of example for a decoder."""

    share: float
    views: int  # images, tiles or frames that the tower sees
    view_tokens: int  # of each that the decoder sees
    text: int


def _mixture(examples: Mapping[str, int], tiles: int, pooled: int, frames: int) -> list[Sample]:
    views = {"images": (tiles, pooled), "videos": (frames, 256), "text": (0, 0)}
    return [Sample(count / sum(examples.values()), *views[what], TEXT) for what, count in examples.items()]


_PAIRS = [Sample(1.0, 1, 1024, CAPTION)]


def _through_decoder(
    phase: str, examples: int, tower: str, llm: str, samples: Sequence[Sample], trained: bool, notes: tuple[str, ...]
) -> Phase:
    """A phase in which visual tokens pass a projector of two layers into a decoder, and text is predicted.

    In the warm-up the projector alone learns.
    """
    vision, decoder = _architecture(tower, VisionConfig), zoo.decoder(llm)
    views = sum(s.share * s.views for s in samples)
    projector = 2 * vision.grid**2 * (vision.width * decoder.width + decoder.width**2)
    one = _tower("vision", vision, 3 if trained else 1)
    spoken = sum(s.share * zoo.decoder_flops(decoder, s.views * s.view_tokens + s.text, s.text) for s in samples)
    parts = (
        dataclasses.replace(one, flops=views * one.flops),
        Part("projector", 3 * views * projector, "decoder"),
        Part(llm, (3 if trained else 2) * spoken, "decoder"),
    )
    mean = sum(s.share * (s.views * s.view_tokens + s.text) for s in samples)
    return Phase(phase, vision.image_size, f"LLM {mean:,.0f}", examples, parts, notes)


def language(model: str) -> list[Phase]:
    """PE §4.1: a projector into a Llama, then everything; the tower is kept."""
    if model == "B":
        return []
    tower, llm, named = f"PE-Lang-{model}14-448", "Llama-3.2-3B", ("llm",) if model == "L" else ()
    mix = _mixture(MIDTRAINED, tiles=1, pooled=1024, frames=16)
    return [
        _through_decoder("projector", WARM_UP, tower, llm, _PAIRS, False, ("text", *named)),
        _through_decoder("everything", ALIGNED, tower, llm, mix, True, ("mix", "text", *named)),
    ]


def spatial(model: str) -> list[Phase]:
    """PE §5.2: G from its own layer 41 and SAM 2.1's mask logits; L and B from PE-spatial G."""
    names = {"B": "PE-Spatial-B16-512", "L": "PE-Spatial-L14-448", "G": "PE-Spatial-G14-448"}
    vision, giant = (_architecture(names[size], VisionConfig) for size in (model, "G"))
    if model == "G":
        teachers = (
            _tower("core teacher", dataclasses.replace(giant, depth=SPATIAL_LAYER), 1),
            Part("SAM encoder", sam_encoder_flops(), "sam"),
            Part("SAM points", POINTS * sam_point_flops(), "sam"),
        )
        notes: tuple[str, ...] = ("masking", "sam")
    else:
        teachers, notes = (_tower("teacher G", giant, 1),), ("small",)
    tokens = str(_tokens(vision, vision.image_size))
    parts = (_tower("student", vision, 3), *teachers)
    return [Phase("alignment", vision.image_size, tokens, SPATIAL, parts, notes)]


def plm(model: str) -> list[Phase]:
    """PLM's own three stages; PE-lang's "-Tiling" weights are the towers after the second (PLM Table 1, PE §C.4)."""
    if model == "B":
        return []
    tower, llm = f"PE-Lang-{model}14-448-Tiling", {"L": "Llama-3.2-3B", "G": "Llama-3.1-8B"}[model]
    middle = _mixture(MIDTRAINED, tiles=14, pooled=256, frames=16)
    last = _mixture(FINETUNED, tiles=36, pooled=256, frames=32)
    return [
        _through_decoder("warm-up", WARM_UP, tower, llm, _PAIRS, False, ("text",)),
        _through_decoder("mid-training", sum(MIDTRAINED.values()), tower, llm, middle, True, ("tiles", "text")),
        _through_decoder("fine-tuning", sum(FINETUNED.values()), tower, llm, last, True, ("tiles", "text")),
    ]


MODELS = ("B", "L", "G")
STAGES: dict[str, Callable[[str], list[Phase]]] = {
    stage.__name__: stage for stage in (pretraining, distillation, video, language, spatial, plm)
}


# ---- the report ------------------------------------------------------------------------------------------------------


def report(
    models: Sequence[str] = MODELS,
    stages: Sequence[str] = tuple(STAGES),
    chip: str = "v5p",
    *,
    count: int = 256,
    usd: float | None = None,
    mfu: float | None = None,
) -> dict[str, Any]:
    """The cost of every phase, and totals.

    Args:
      models: of `MODELS`.
      stages: of `STAGES`.
      chip: of `MFU`.
      count: chips of the slice that days are counted on.
      usd: price of one chip for an hour.
      mfu: in (0, 1], in place of the table's.

    Returns:
      JSON types: `phases`, one dict each; `totals`, by model and stage, "all" standing for either. Hours are of one
      chip, `least` at the highest MFU and `most` at the lowest.

    Raises:
      ValueError: for a name that is unknown, a number out of its range, or a choice without any phase.
    """
    _check("model", models, MODELS)
    _check("stage", stages, STAGES)
    _check("chip", [chip], MFU)
    if count < 1:
        raise ValueError(f"--chips={count} must be at least 1.")
    if usd is not None and not 0 <= usd < math.inf:
        raise ValueError(f"--usd-per-chip-hour={usd} must be a price, zero or more.")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu={mfu} must be in (0, 1], such as 0.45 for 45%.")
    given = None if mfu is None else Mfu(mfu, mfu, mfu, _GIVEN)
    rates = {kind: given or rate for kind, rate in MFU[chip].items()}
    one = next(each for each in chips.CHIPS.values() if each.name == chip)
    peak = one.peak * DEVICES_OF_A_CHIP.get(chip, 1)
    rows = []
    for model in [model for model in MODELS if model in models]:
        for stage in [stage for stage in STAGES if stage in stages]:
            for phase in STAGES[stage](model):
                row = {"model": model, "stage": stage, "phase": phase.name, "image_size": phase.image_size}
                row |= {"tokens": phase.tokens, "examples": phase.examples}
                row["flops_per_example"] = sum(part.flops for part in phase.parts)
                row["flops"] = row["flops_per_example"] * phase.examples
                row["chip_hours"] = _hours(phase, rates, peak)
                row["parts"] = [dataclasses.asdict(part) for part in phase.parts]
                rows.append(row | {"notes": list(phase.notes)})
    if not rows:
        raise ValueError(
            f"--models={','.join(models)} --stage={','.join(stages)} has no phase: G is not distilled, and B is not "
            "aligned with a language model."
        )
    totals = [_total(rows, model, stage) for model in (*MODELS, "all") for stage in (*STAGES, "all")]
    for row in (*rows, *totals):
        hours = row["chip_hours"]
        row["mfu"] = row["flops"] / (3600 * hours["middle"] * peak) if hours["middle"] else 0.0
        row["days"] = hours["middle"] / count / 24
        row["usd"] = None if usd is None else hours["middle"] * usd
    used = dict.fromkeys(note for row in rows for note in row["notes"])
    kinds = {part["kind"] for row in rows for part in row["parts"]}
    return {
        "chip": chip,
        "peak_flops": peak,
        "chips": count,
        "usd_per_chip_hour": usd,
        "mfu": {kind: rate._asdict() for kind, rate in rates.items() if kind in kinds},
        "phases": rows,
        "totals": [total for total in totals if total["flops"]],
        "notes": {note: NOTES[note] for note in used},
    }


def _check(what: str, given: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    if wrong := [name for name in given if name not in known]:
        raise ValueError(f"{what} {wrong[0]!r} is unknown; choose from {', '.join(known)}.")


_HOURS = {"least": "high", "middle": "middle", "most": "low"}  # hours: the MFU that they are counted with


def _hours(phase: Phase, rates: Mapping[str, Mfu], peak: float) -> dict[str, float]:
    def at(reading: str) -> float:
        return sum(part.flops / getattr(rates[part.kind], reading) for part in phase.parts)

    return {hours: phase.examples * at(reading) / peak / 3600 for hours, reading in _HOURS.items()}


def _total(rows: Sequence[Mapping[str, Any]], model: str, stage: str) -> dict[str, Any]:
    own = [row for row in rows if model in (row["model"], "all") and stage in (row["stage"], "all")]
    return {
        "model": model,
        "stage": stage,
        "examples": sum(row["examples"] for row in own),
        "flops": sum(row["flops"] for row in own),
        "chip_hours": {hours: sum(row["chip_hours"][hours] for row in own) for hours in _HOURS},
    }


# ---- for people ------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int  # columns of words, before those of numbers


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The report's figures as words: a table for each model, and one of totals."""
    totals = {(row["model"], row["stage"]): row for row in figures["totals"]}
    numbers = {note: str(i + 1) for i, note in enumerate(figures["notes"])}
    price = ("USD",) if figures["usd_per_chip_hour"] is not None else ()
    head = ("stage", "phase", "tokens", "notes", "examples", "TFLOPs each", "FLOPs", "MFU")
    head += ("chip-hours", "from", "to", "days", *price)
    found = []
    for model in [model for model in MODELS if (model, "all") in totals]:
        rows: list[tuple[str, ...]] = []
        for stage in [stage for stage in STAGES if (model, stage) in totals]:
            own = [row for row in figures["phases"] if (row["model"], row["stage"]) == (model, stage)]
            for row in own:
                notes = ", ".join(numbers[note] for note in row["notes"])
                each = _figure(row["flops_per_example"] / 1e12)
                rows.append((stage, row["phase"], row["tokens"], notes, _count(row["examples"]), each, *_costs(row)))
            if len(own) > 1:
                total = totals[model, stage]
                rows.append((stage, "all", "", "", _count(total["examples"]), "", *_costs(total)))
        rows.append(("all", "", "", "", "", "", *_costs(totals[model, "all"])))
        found.append(Table(f"PE-{model} on {figures['chip']}", head, rows, 4))
    present = [model for model in (*MODELS, "all") if (model, "all") in totals]
    present = present[:1] if len(present) == 2 else present  # of one model the sum is its own
    whole = totals["all", "all"]["chip_hours"]["middle"]
    rows = []
    for stage in [stage for stage in (*STAGES, "all") if ("all", stage) in totals]:
        hours = [totals[m, stage]["chip_hours"]["middle"] if (m, stage) in totals else None for m in present]
        cells = ["-" if each is None else _figure(each) for each in hours]
        row = totals["all", stage]
        rows.append((stage, *cells, f"{row['chip_hours']['middle'] / whole:.1%}", *_costs(row)[3:]))
    names = [f"PE-{model}" if model != "all" else "all" for model in present]
    total_head = ("stage", *names, "share", "from", "to", "days", *price)
    return [*found, Table(f"Chip-hours on {figures['chip']}", total_head, rows, 1)]


def _costs(row: Mapping[str, Any]) -> tuple[str, ...]:
    hours = row["chip_hours"]
    cells = [f"{row['flops']:.2e}".replace("e+", "e"), f"{row['mfu']:.0%}"]
    cells += [_figure(hours[name]) for name in ("middle", "least", "most")] + [f"{row['days']:.2f}"]
    return (*cells, *([_figure(row["usd"])] if row["usd"] is not None else []))


def _figure(number: float) -> str:
    """Three digits that mean something."""
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _remarks(figures: Mapping[str, Any]) -> list[str]:
    """What stands below the tables: how they are counted, and what the papers leave open."""
    days = f"Days are on {figures['chips']:,} {figures['chip']} chips of {figures['peak_flops'] / 1e12:,.0f} TFLOP/s"
    price = figures["usd_per_chip_hour"]
    lines = [f"{days}, chip-hours from the highest to the lowest MFU of the band."]
    if price is not None:
        lines[0] += f" A chip costs {price:g} USD an hour."
    for kind, rate in figures["mfu"].items():
        if rate["source"] == _GIVEN:
            lines.append(f"MFU: {rate['middle']:.3g}, as given.")
            break
        lines.append(
            f"MFU of {kind}: {rate['middle']:.0%}, from {rate['low']:.0%} to {rate['high']:.0%} ({rate['source']})."
        )
    return lines + [f"{i + 1}. {text}" for i, text in enumerate(figures["notes"].values())]


def markdown(table: Table) -> str:
    """The table, aligned for the eye as well."""
    widths = [max(3, *map(len, column)) for column in zip(table.head, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{'<' if i < table.left else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "| " + " | ".join(padded) + " |\n"

    rule = ["-" * w if i < table.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return f"{table.title}\n\n" + "".join(map(line, (table.head, rule, *table.rows)))


def show(figures: Mapping[str, Any]) -> None:
    """Prints the tables; into a file or a pipe as Markdown."""
    import rich.box
    import rich.console
    import rich.markup
    import rich.table

    console = rich.console.Console()
    for each in tables(figures):
        if not console.is_terminal:
            print(markdown(each))
            continue
        shown = rich.table.Table(title=each.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(each.head):
            shown.add_column(name, justify="left" if i < each.left else "right")
        for row in each.rows:
            shown.add_row(*map(rich.markup.escape, row), style="bold" if "all" in row[:2] else None)
        console.print(shown)
    for line in _remarks(figures):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def webpage(figures: Mapping[str, Any]) -> str:
    """The report as one page that needs nothing else."""
    whole = next(row for row in figures["totals"] if (row["model"], row["stage"]) == ("all", "all"))
    hours = whole["chip_hours"]
    by_stage = [row for row in figures["totals"] if row["model"] == "all" and row["stage"] != "all"]
    shares = [
        (f"{row['stage']} {row['chip_hours']['middle'] / hours['middle']:.0%}", row["chip_hours"]["middle"], colour)
        for row, colour in zip(by_stage, page.COLOURS, strict=False)
    ]
    *each, total = tables(figures)
    parts = [
        f"<h1>{_figure(hours['middle'])} {figures['chip']} chip-hours</h1>",
        f"<p class=soft>{whole['flops']:.2e} FLOPs, {_figure(whole['days'])} days on {figures['chips']:,} chips; from "
        f"{_figure(hours['least'])} to {_figure(hours['most'])} chip-hours by the band of the MFU.</p>",
        page.bar(shares, hours["middle"]),
        *(
            f"<h2>{table.title}</h2><div class=scroll>"
            + page.table(table.head, table.rows, range(table.left, len(table.head)))
            + "</div>"
            for table in (total, *each)
        ),
        "<h2>What an example costs</h2>" + _parts(figures),
        "<h2>How it is counted</h2>" + "".join(f"<p class=soft>{html.escape(line)}</p>" for line in _remarks(figures)),
    ]
    return page.document("What PE costs", "\n".join(parts))


def _parts(figures: Mapping[str, Any]) -> str:
    """Of phases that have several parts, how the FLOPs of an example divide among them."""
    rows = [
        (row["model"], row["stage"], row["phase"], _figure(row["flops_per_example"] / 1e12), _divided(row))
        for row in figures["phases"]
        if len(row["parts"]) > 1
    ]
    head = ("model", "stage", "phase", "TFLOPs", "of which")
    return page.table(head, rows, (3,)) if rows else "<p>Every phase trains both towers and nothing else.</p>"


def _divided(row: Mapping[str, Any]) -> str:
    shares = ((part["name"], part["flops"] / row["flops_per_example"]) for part in row["parts"])
    return ", ".join(f"{name} {share:.1%}" for name, share in shares)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--stage", default=",".join(STAGES), metavar="STAGE,...", help="default: %(default)s")
    parser.add_argument("--chip", default="v5p", help=f"one of {', '.join(MFU)}; default: %(default)s")
    parser.add_argument("--chips", type=int, default=256, help="of the slice that days are counted on; %(default)s")
    parser.add_argument("--usd-per-chip-hour", type=float, metavar="USD", help="adds what it costs")
    parser.add_argument("--mfu", type=float, help="in (0, 1], in place of the estimates")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures there too")
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write a page there too")
    args = parser.parse_args(argv)
    models, stages = (given.split(",") for given in (args.models, args.stage))
    try:
        figures = report(models, stages, args.chip, count=args.chips, usd=args.usd_per_chip_hour, mfu=args.mfu)
    except ValueError as error:
        print(f"tpu.cost: {error}", file=sys.stderr)
        return 2
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    if args.html:
        args.html.write_text(webpage(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the project wants of its step on TPU slices, and what the compiler says of it, row by row.

  python -m tpu.goals --to=tpu/results     compiles every row for its slice (an hour and more on two cores)
  python -m tpu.goals --only=v5e-256              some rows, by a part of their names
  python -m tpu.goals --read=tpu/results   prints the tables of figures kept before

Every row is one run of `tpu.aot` on a published recipe (`experiments/`), in a process of its own.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30
LANGUAGE = "align_language"
BATCH = 131_072  # of pretraining; other rows have their experiment's
COMPILE_SECONDS = 240  # at most, on two quiet cores
PHASES = {224: -3, 336: -2, 448: -1}  # of G14; L14 ends with 336


@dataclasses.dataclass(frozen=True)
class Row:
    """One program, and what is wanted of it; what is None is only told."""

    size: str  # the experiment's argument
    pixels: int
    topology: str
    mesh: str
    micro: int
    remat: str
    slices: int = 1
    spare: float | None = None  # share of HBM left, at least
    mfu: float | None = None  # middle reading, at least
    exposed: float | None = None  # share of the step, at most
    experiment: str = "pretrain_core"

    @property
    def executed(self) -> float:
        """Over model FLOPs, at most: micro-batches of a loss between examples cost one forward pass more."""
        return 1.15 if self.micro == 1 else 1.40

    @property
    def name(self) -> str:
        kind, _, sides = self.topology.partition(":")
        chips = 1
        for side in sides.split("x"):
            chips *= int(side)
        several = f"{self.slices} x " if self.slices > 1 else ""
        return f"{self.size} {self.pixels} px {several}{kind}-{chips}"

    @property
    def command(self) -> list[str]:
        words = [
            f"--config=experiments/{self.experiment}.py:{self.size}", f"--topology={self.topology}",
            f"--mesh={self.mesh}", f"--micro={self.micro}", f"--remat={self.remat}",
        ]  # fmt: skip
        if self.experiment == "pretrain_core":
            words += [f"--phase={-1 if self.size == 'L14' else PHASES[self.pixels]}", f"--batch={BATCH}"]
        return words + ([f"--slices={self.slices}"] if self.slices > 1 else [])


ROWS = (
    Row("G14", 224, "v5e:16x16", "data=16,fsdp=16", 8, "block", mfu=0.50, exposed=0.03),
    Row("G14", 448, "v5e:16x16", "data=16,fsdp=16", 32, "block", mfu=0.57, exposed=0.03),
    Row("G14", 224, "v6e:16x16", "data=16,fsdp=16", 8, "no_up", mfu=0.40, exposed=0.03),
    Row("G14", 448, "v6e:16x16", "data=16,fsdp=16", 32, "no_up", mfu=0.40, exposed=0.03),
    Row("G14", 224, "v5p:4x4x8", "data=8,fsdp=16", 4, "no_up"),
    Row("G14", 448, "v5p:4x4x8", "data=8,fsdp=16", 16, "no_up"),
    Row("G14", 224, "v5p:4x8x16", "data=32,fsdp=16", 1, "no_up", mfu=0.57, exposed=0.03),
    Row("G14", 448, "v5p:4x8x16", "data=32,fsdp=16", 1, "block", mfu=0.62, exposed=0.03),
    Row("G14", 224, "v5e:16x16", "dcn=2,data=16,fsdp=16", 4, "block", 2, exposed=0.10),
    Row("G14", 224, "v5e:4x8", "fsdp=32", 64, "block", spare=0.2, mfu=0.48, exposed=0.05),
    Row("G14", 224, "v6e:4x8", "fsdp=32", 64, "no_up", spare=0.2, exposed=0.05),
    Row("G14", 224, "v5p:2x4x4", "fsdp=32", 16, "no_up", spare=0.2, exposed=0.05),
    Row("G14", 448, "v5e:8x8", "data=4,fsdp=16", 128, "block", spare=0.2),
    Row("G14", 448, "v6e:8x8", "data=4,fsdp=16", 128, "no_up", spare=0.2),
    Row("G14", 448, "v5p:4x4x4", "data=4,fsdp=16", 64, "no_up", spare=0.2),
    Row("L14", 336, "v5e:4x4", "fsdp=16", 512, "block", spare=0.2),
    Row("L14", 336, "v5e:8x8", "data=8,fsdp=8", 64, "dots"),
    Row("midtrain,3B", 448, "v5e:16x16", "data=8,fsdp=32", 8, "block", experiment=LANGUAGE),
    Row("midtrain,3B", 448, "v5p:4x4x8", "data=8,fsdp=16", 4, "block", experiment=LANGUAGE),
    Row("sft,8B", 448, "v5e:16x16", "fsdp=64,tensor=4", 16, "block", experiment=LANGUAGE),
)  # fmt: skip


def run(row: Row) -> dict[str, Any]:
    """The row's figures, as `tpu.aot --json` gives them.

    Raises:
      RuntimeError: if it did not come to figures, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "figures.json"
        words = [sys.executable, "-m", "tpu.aot", *row.command, f"--json={path}", "--cache="]
        done = subprocess.run(words, capture_output=True, text=True)
        if not path.is_file():
            raise RuntimeError(f"{row.name}: {' '.join(words[1:])} failed: {done.stderr.strip()[-500:]}")
        return json.loads(path.read_text())


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what was compiled with which choices, and its figures; a figure that misses its goal names the goal."""
    lines = [
        "| what | mesh, micro-batches, remat | GiB of a chip | to spare | MFU (band) | waiting for links | "
        "executed / model FLOPs | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.name not in figures:
            continue
        f = figures[row.name]
        how = f"{row.mesh}, {row.micro}, {row.remat}"
        if not f["fits"]:
            needs = f"needs {f['needs'] / GIB:.1f} of {f['holds'] / GIB:.1f}" if "needs" in f else "does not fit"
            lines.append(f"| {row.name} | {how} | **{needs}** | | | | | {f['compile_seconds']:.0f} s |")
            continue
        whole, mfu, middle = f["argument_bytes"] + f["temporary_bytes"], f["mfu"], f["seconds"]["middle"]
        spare, executed = 1 - whole / f["holds"], f["executed_flops"] / f["model_flops"]
        lines.append(
            f"| {row.name} | {how} | {whole / GIB:.1f} of {f['holds'] / GIB:.1f} | {_told(spare, least=row.spare)} | "
            f"{_told(mfu['middle'], least=row.mfu)} ({mfu['cycles']:.0%} to {mfu['roofline']:.0%}) | "
            f"{_told(f['exposed_seconds'] / middle, most=row.exposed)} | "
            f"{_told(executed, most=row.executed, form='.2f')} | "
            f"{_told(f['compile_seconds'], most=COMPILE_SECONDS, form='.0f')} s |"
        )
    return "\n".join(lines)


def _told(value: float, *, least: float | None = None, most: float | None = None, form: str = ".1%") -> str:
    """A figure; in bold with its goal where there is one that it misses, marked where it meets it."""
    short = form.replace(".1%", ".0%")
    if least is not None and value < least:
        return f"**{value:{form}}** (wanted {least:{short}})"
    if most is not None and value > most:
        return f"**{value:{form}}** (wanted {most:{short}})"
    return f"{value:{form}}" + (" ✓" if least is not None or most is not None else "")


def kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Figures by row from the files of former runs, the newest of each row.

    Raises:
      ValueError: if there are none.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("goals-*.json")):
        found |= json.loads(path.read_text())["figures"]
    if not found:
        raise ValueError(f"there is no goals-*.json in {folder}; run python -m tpu.goals --to={folder} first.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="PART,...", help="rows whose name holds one of these, such as 'L14,v6e-256'"
    )
    parser.add_argument("--to", metavar="FOLDER", type=pathlib.Path, help="keep the figures there, after every row")
    parser.add_argument(
        "--read", metavar="FOLDER", type=pathlib.Path, help="compile nothing, print what was kept there"
    )
    args = parser.parse_args(argv)
    try:
        if args.read:
            print(table(kept(args.read)))
            return 0
        chosen = [row for part in args.only.split(",") for row in ROWS if part in row.name]
        if not chosen:
            raise ValueError(
                f"--only={args.only!r} is in no row's name; the rows are {', '.join(r.name for r in ROWS)}."
            )
        figures: dict[str, Any] = {}
        failed: list[str] = []
        stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H%M")
        for number, row in enumerate(chosen, 1):
            print(f"{number} of {len(chosen)}: {row.name}: python -m tpu.aot {' '.join(row.command)}", flush=True)
            try:
                figures[row.name] = run(row)
            except RuntimeError as error:
                print(f"tpu.goals: {error}", file=sys.stderr, flush=True)
                failed.append(row.name)
                continue
            print(table({row.name: figures[row.name]}).splitlines()[-1], flush=True)
            if args.to:
                kept_as = args.to / f"goals-{stamp}.json"
                kept_as.write_text(json.dumps({"date": stamp, "versions": _versions(), "figures": figures}, indent=1))
    except ValueError as error:
        print(f"tpu.goals: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    return 2 if failed else 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "libtpu")}


if __name__ == "__main__":
    sys.exit(main())

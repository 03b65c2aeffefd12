"""A page about a folder of results, in one file that needs nothing else: python -m benchmarks.page [FOLDER]

Of every case the newest figures: bars of the ratios, the tables, and over the dates how the ratios went. Written to
FOLDER/index.html, and the bars alone to FOLDER/ratios.svg.
"""

import argparse
import datetime
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import GPU, OURS
from tpu import page as frame

WIDTH, ROW, LEFT, RIGHT = 880, 22, 200, 170  # of the bars, in pixels: all, a line, and what is beside the axis
TICKS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.8, 1, 1.25, 2, 4, 8, 16, 32, 64)
_STYLE = """
svg text { font: 13px system-ui, sans-serif; fill: var(--ink) } svg .soft { fill: var(--soft) }
svg .head { font-weight: 600 } svg .end { text-anchor: end } svg .mid { text-anchor: middle }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots figure { margin: 0 }
figcaption { font-size: .85rem; max-width: 400px } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
svg { max-width: 100%; height: auto }
"""

Latest = dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]  # benchmark → its cases, each with its result


def latest(found: Sequence[Mapping[str, Any]]) -> Latest:
    """The newest measurement of each case, `found` being oldest first; what was left out does not hide what was not."""
    newest: dict[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for result in found:
        for case in result["cases"]:
            key = result["benchmark"], case["title"]
            if case["programs"] or key not in newest:
                newest[key] = (result, case)
    out: Latest = {}
    for (benchmark, _), pair in sorted(newest.items(), key=lambda item: results.ALL.index(item[0][0])):
        out.setdefault(benchmark, []).append(pair)
    return out


def write(folder: Path) -> Path:
    """Makes the page of a folder of results; raises as `results.load`."""
    found = results.load_all(folder)
    if not found:
        raise ValueError(f"{folder} holds no result; run python -m benchmarks --out={folder} first.")
    newest = latest(found)
    parts = [
        "<h1>Speed beside the peers</h1>",
        "<p>A bar is the time of ours over the peer's, in one run: left of 1 we are faster. The line across it spans "
        "the quartiles over the rounds. Pale: the machine was busy.</p>",
        bars(newest),
    ]
    for benchmark, cases in newest.items():
        parts += _section(benchmark, cases, found)
    if GPU not in newest:
        parts.append(f"<h2>{GPU}</h2><p class=bad>Not measured.</p>")
    path = folder / "index.html"
    path.write_text(frame.document("Speed beside the peers", f"<style>{_STYLE}</style>" + "\n".join(parts)))
    (folder / "ratios.svg").write_text(bars(newest, alone=True))
    return path


def _section(
    benchmark: str, cases: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], found: Sequence[Mapping[str, Any]]
) -> list[str]:
    parts, before = [f"<h2>{escape(benchmark)}</h2>"], None
    for result, case in cases:
        if result is not before:
            parts.append(f"<p class=soft>{'<br>'.join(escape(line) for line in _about(result))}</p>")
            before = result
        parts.append(f"<h3>{escape(case['title'])}</h3>")
        if case["programs"]:
            head, rows = results.table(case)
            cells = [[escape(cell) for cell in row] for row in rows]
            parts += [
                frame.table(head, cells, range(1, len(head))),
                f"<p class=soft>{escape(results.rounds(case))}</p>",
            ]
        told = "soft" if case["programs"] else "bad"
        parts += [f"<p class={told}>{escape(name)}: {escape(why)}</p>" for name, why in case["left_out"].items()]
    plots = [plot for _, case in cases if (plot := history(benchmark, case["title"], found))]
    if plots:
        parts.append(f"<h3>Over the dates</h3><div class=plots>{''.join(plots)}</div>")
    return parts


def _about(result: Mapping[str, Any]) -> list[str]:
    _, *rest = results.heading(result).splitlines()
    quick = ", a smoke test whose figures mean nothing" if result["quick"] else ""
    return [f"{result['date'][:10]}{quick}: {result['command']}", *(line for line in rest if line)]


def bars(newest: Latest, *, alone: bool = False) -> str:
    """Bars of the ratios of all cases that have some, on a logarithmic axis.

    Args:
      newest: of `latest`.
      alone: whether it has to bring its own colours, as a file does.
    """
    rows: list[tuple[str, Any]] = []  # a heading, or a program with its ratio and whether the machine was quiet
    for benchmark, cases in newest.items():
        for _, case in cases:
            peers = {name: it for name, it in case["programs"].items() if "ratio" in it}
            if peers:
                rows.append((f"{benchmark}: {case['title']}", None))
                rows += [(name, (it, case["quiet"])) for name, it in peers.items()]
    spreads = [it["ratio"] for _, row in rows if row for it in row[:1]]
    edges = [edge for spread in spreads for edge in (*spread["quartiles"], spread["median"])]
    low, high = min([*edges, 0.75]) / 1.1, max([*edges, 1.33]) * 1.1
    left, across = LEFT, WIDTH - LEFT - RIGHT

    def x(ratio: float) -> float:
        return left + across * math.log(ratio / low) / math.log(high / low)

    height = ROW * (len(rows) + 1) + 10
    parts = []
    for tick in TICKS:
        if low <= tick <= high:
            weight = 1.5 if tick == 1 else 0.5
            parts.append(
                f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{ROW}" y2="{height}" stroke="var(--soft)" '
                f'stroke-width="{weight}"/><text class="soft mid" x="{x(tick):.1f}" y="14">{_tick(tick)}</text>'
            )
    for number, (name, row) in enumerate(rows):
        y = ROW * (number + 1) + 4
        if row is None:
            parts.append(f'<rect x="0" y="{y}" width="{WIDTH}" height="{ROW}" fill="var(--back)"/>')
            parts.append(f'<text class="head" x="0" y="{y + 16}">{escape(name)}</text>')
            continue
        it, quiet = row
        middle, (first, last) = it["ratio"]["median"], it["ratio"]["quartiles"]
        colour, centre = ("--c" if middle <= 1 else "--b"), y + ROW / 2
        begin, end = sorted((x(1), x(middle)))
        parts.append(
            f'<text class="end" x="{left - 12}" y="{y + 15}">{escape(name)}</text>'
            f'<rect x="{begin:.1f}" y="{y + 4}" width="{max(end - begin, 1):.1f}" height="{ROW - 8}" '
            f'fill="var({colour})" opacity="{0.85 if quiet else 0.35}"/>'
            f'<path d="M{x(first):.1f} {centre - 4}v8m0 -4H{x(last):.1f}m0 -4v8" stroke="var(--ink)" fill="none"/>'
            f'<text x="{WIDTH - RIGHT + 14}" y="{y + 15}">{results.ratio(it)}</text>'
        )
    style = f"<style>{frame.STYLE}{_STYLE}</style>" if alone else ""
    back = f'<rect width="{WIDTH}" height="{height}" fill="var(--back)"/>' if alone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="time of ours over the peers">{style}{back}{"".join(parts)}</svg>'
    )


def _tick(ratio: float) -> str:
    return f"{ratio:g}" if ratio >= 0.5 else f"1/{1 / ratio:g}"


def history(benchmark: str, title: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The ratios of a case over the dates, a line a program; empty where there is but one date."""
    points: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    dates = []
    for result in found:
        for case in result["cases"]:
            if result["benchmark"] == benchmark and case["title"] == title and case["programs"]:
                dates.append(result["date"])
                when = datetime.datetime.fromisoformat(result["date"]).timestamp()
                for name, it in case["programs"].items():
                    if name != OURS:
                        points.setdefault(name, []).append((when, it["ratio"]))
    if len(dates) < 2 or not points:
        return ""
    times = [when for line in points.values() for when, _ in line]
    edges = [edge for line in points.values() for _, ratio in line for edge in (*ratio["quartiles"], 1.0)]
    low, high = min(edges) / 1.05, max(edges) * 1.05
    width, height, left, top = 400, 180, 44, 12

    def place(when: float, ratio: float) -> tuple[float, float]:
        across = (when - min(times)) / (max(times) - min(times) or 1)
        down = math.log(high / ratio) / math.log(high / low)
        return left + 12 + (width - left - 60) * across, top + (height - top - 30) * down

    parts = []
    for tick in {low * 1.05, 1.0, high / 1.05}:
        y = place(min(times), tick)[1]
        parts.append(
            f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text class="soft end" x="{left - 6}" y="{y + 4:.1f}">{tick:.2f}</text>'
        )
    for side, text, x in (("", dates[0], left), ("end", dates[-1], width)):
        parts.append(f'<text class="soft {side}" x="{x}" y="{height - 6}">{text[:10]}</text>')
    keys = []
    for (name, line), colour in zip(points.items(), "abcd" * len(points), strict=False):
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(when, ratio["median"]) for when, ratio in line))
        parts.append(f'<polyline points="{way}" fill="none" stroke="var(--{colour})" stroke-width="2"/>')
        for when, ratio in line:
            (x, y), ends = place(when, ratio["median"]), [place(when, edge)[1] for edge in ratio["quartiles"]]
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--{colour})"/>'
                f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="var(--{colour})"/>'
            )
        keys.append(f'<span class=key style="background:var(--{colour})"></span>{escape(name)}')
    svg = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{escape(title)}<br>{''.join(keys)}</figcaption></figure>"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    try:
        print(f"written to {write(parser.parse_args(argv).folder)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Reports as one HTML file that needs nothing else: bars drawn with boxes, and tables. `of` is `tpu.aot`'s page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30
COLOURS = ("a", "b", "c", "d", "e", "f")  # of `STYLE`, for `bar`
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667085; --back: #ffffff; --line: #e4e7ec; --a: #2e6fdb;
  --b: #e08a2c; --c: #7a9e3a; --d: #9b6bc9; --e: #2a9d8f; --f: #8a6d5a; --bad: #c4402f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #98a2b3; --back: #15181c; --line: #30363d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } .soft { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left } .n { text-align: right }
.bar { display: flex; height: 1.5rem; background: var(--line); border-radius: 4px; overflow: hidden }
.bar div { height: 100% } .key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin: 0 .3rem 0 1rem; vertical-align: -1px } .wide { width: 45% } .scroll { overflow-x: auto }
.bad { color: var(--bad) }
"""


def of(name: str, reports: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    """A page about `best`, and about all that was tried where there are several.

    Args:
      name: of the experiment.
      reports: figures of `aot.report`.
      best: the one to show in full.
    """
    several = f"{best['slices']} slices of " if best["slices"] > 1 else ""
    parts = [
        f"<h1>{html.escape(name)} on {several}{best['topology']}</h1>",
        f"<p class=soft>{best['chips']} chips as {_mesh(best)}; batch {best['batch_size']:,} at {best['image_size']} "
        f"px, {best['microbatches']} micro-batches, remat {best['remat']}. Compiled ahead of time, not run: bytes are "
        "the compiler's, times are estimates with a band.</p>",
    ]
    if best["fits"]:
        parts += [_memory(best), _time(best), _collectives(best), _buffers(best)]
    else:
        parts.append(f"<p class=bad>It does not fit: {_gib(best.get('needs', 0))} of {_gib(best.get('holds', 0))}.</p>")
    if len(reports) > 1:
        parts.append(_tried(reports))
    return document(name, "\n".join(parts))


def document(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML."""
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>{body}\n"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _mesh(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one device"


def bar(shares: Sequence[tuple[str, float, str]], whole: float) -> str:
    """Shares of a whole, (what, how much, colour), with a key."""
    boxes = "".join(
        f'<div style="width:{100 * part / whole:.2f}%;background:var(--{colour})" title="{html.escape(what)}"></div>'
        for what, part, colour in shares
    )
    keys = "".join(
        f'<span class=key style="background:var(--{colour})"></span>{html.escape(what)}' for what, _, colour in shares
    )
    return f"<div class=bar>{boxes}</div><p>{keys}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int]) -> str:
    """Cells are HTML; `numbers` are the columns set to the right."""

    def row(cells: Sequence[Any], tag: str) -> str:
        kinds = [" class=n" if i in numbers else "" for i in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)) + "</tr>"
        )

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _memory(figures: Mapping[str, Any]) -> str:
    parts = [
        (f"{what} {_gib(figures[key])}", figures[key], colour)
        for what, key, colour in (
            ("parameters", "parameter_bytes", "a"),
            ("optimizer state", "optimizer_bytes", "b"),
            ("batch", "batch_bytes", "c"),
            ("temporaries", "temporary_bytes", "d"),
        )
    ]
    spare = 1 - (figures["argument_bytes"] + figures["temporary_bytes"]) / figures["holds"]
    return f"<h2>Memory of a chip: {_gib(figures['holds'])}, {spare:.0%} to spare</h2>" + bar(parts, figures["holds"])


def _time(figures: Mapping[str, Any]) -> str:
    seconds, mfu = figures["seconds"], figures["mfu"]
    rows = [
        (f"{100 * each['seconds'] / seconds['middle']:.1f}%", html.escape(each["line"]), _line(each, figures))
        for each in figures["lines"]
    ]
    return (
        f"<h2>Step: {seconds['middle']:.2f} s, MFU {mfu['middle']:.1%}</h2>"
        f"<p>Between {seconds['roofline']:.2f} s ({mfu['roofline']:.1%}) at the roofline and {seconds['cycles']:.2f} s "
        f"({mfu['cycles']:.1%}) by the compiler's own count of cycles. The core waits for links "
        f"{figures['exposed_seconds'] / seconds['middle']:.1%} of the time; "
        f"{figures['executed_flops'] / figures['model_flops']:.2f} times the model's FLOPs are executed.</p>"
        + table(("share", "line of source", ""), rows, (0,))
    )


def _line(each: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    width = 100 * each["seconds"] / max(line["seconds"] for line in figures["lines"])
    colour = "b" if each["line"].startswith("waiting") else "a"
    return (
        f'<div class=bar style="height:.8rem"><div style="width:{width:.1f}%;background:var(--{colour})"></div></div>'
    )


def _collectives(figures: Mapping[str, Any]) -> str:
    rows = [
        (each["kind"], each["axes"], f"{each['count']:,}", f"{each['bytes'] / 2**20:,.1f}")
        for each in figures["collectives"]
    ]
    return "<h2>What is sent in a step</h2>" + table(("kind", "over", "how many", "MiB of arrays"), rows, (2, 3))


def _buffers(figures: Mapping[str, Any]) -> str:
    rows = [
        (f"{each['bytes'] / 2**20:,.0f}", html.escape(each["shape"]), html.escape(each["line"]))
        for each in figures["buffers"]
    ]
    return "<h2>The largest arrays</h2>" + table(("MiB", "array", "line of source"), rows, (0,))


def _tried(reports: Sequence[Mapping[str, Any]]) -> str:
    order = sorted(reports, key=lambda r: (not r["fits"], -r["mfu"]["middle"] if r["fits"] else 0))
    top = max((r["mfu"]["roofline"] for r in reports if r["fits"]), default=1.0)
    rows = []
    for r in order:
        how = (r["topology"], _mesh(r), r["microbatches"], r["remat"])
        if r["fits"]:
            low, middle, high = (100 * r["mfu"][name] / top for name in ("cycles", "middle", "roofline"))
            band = (
                f'<div class=bar><div style="width:{low:.1f}%"></div><div style="width:{middle - low:.1f}%;'
                f'background:var(--a)"></div><div style="width:{high - middle:.1f}%;background:var(--a);opacity:.5">'
                "</div></div>"
            )
            rows.append((*how, _gib(r["argument_bytes"] + r["temporary_bytes"]), f"{r['mfu']['middle']:.1%}", band))
        else:
            rows.append((*how, _gib(r.get("needs", 0)), "<span class=bad>does not fit</span>", ""))
    head = ("slice", "mesh", "micro", "remat", "needs", "MFU", "band")
    return "<h2>All that was tried</h2>" + table(head, rows, (2, 4, 5))

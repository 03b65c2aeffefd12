"""Captions per minute per core of the MetaCLIP curation: python -m benchmarks.curation

Needs the extra `curation`; pyahocorasick, where installed, is timed beside our matcher and its result compared. Words
are made up, their frequencies follow Zipf's law; entries are single words, pairs and triples of them, as MetaCLIP's
unigrams, bigrams and titles. Reported is CPU time, of all processes together, so that a busy machine counts little.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pe_jax.engine import metaclip, metaclip_beam

RESULTS = Path(__file__).parent / "results"


def corpus(captions: int, entries: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Captions of 3 to 20 words with commas and full stops; entries: half words, a third pairs, the rest triples."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=rng.randint(2, 9)))]
    seen = set(words)
    while len(words) < entries:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=rng.randint(2, 9)))
        if word not in seen:
            seen.add(word)
            words.append(word)
    zipf = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    found = dict.fromkeys(rng.sample(words, entries // 2))
    for k, size in ((2, entries * 5 // 6), (3, entries)):
        while len(found) < size:
            found[" ".join(rng.choices(words, cum_weights=zipf, k=k))] = None
    texts = []
    for _ in range(captions):
        text = rng.choices(words, cum_weights=zipf, k=rng.randint(3, 20))
        for place in range(len(text)):
            if rng.random() < 0.08:
                text[place] += rng.choice(",.!:")
        texts.append(" ".join(text))
    return texts, list(found)


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = run()
    return result, {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}


def programs(texts: list[str], entries: list[str], folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    matcher, seconds = timed(lambda: metaclip.Matcher(entries))
    yield "build the matcher (once a worker)", seconds
    ours, seconds = timed(lambda: [matcher(text) for text in texts])
    yield "match", seconds
    with contextlib.suppress(ModuleNotFoundError):
        import ahocorasick  # pyright: ignore[reportMissingImports]

        automaton = ahocorasick.Automaton()
        for number, entry in enumerate(entries):
            automaton.add_word(f" {entry} ", number)
        automaton.make_automaton()
        theirs, seconds = timed(
            lambda: [sorted({number for _, number in automaton.iter(metaclip.spaced(text))}) for text in texts]
        )
        assert ours == theirs, "the matchers differ"
        yield "match, pyahocorasick", seconds

    path = folder / "in.jsonl"
    with path.open("w") as file:
        for number, text in enumerate(texts):
            record = {"url": f"https://example.org/{number}.jpg", "caption": text, "width": 640, "height": 480}
            file.write(json.dumps(record) + "\n")
    options = metaclip.Curation(max(20, len(texts) // 500), min_width=200, max_aspect=3, shards=8)
    results = []
    runs: dict[str, Callable[[str], Any]] = {
        "curate in memory": lambda out: metaclip.curate(str(path), entries, options, out)
    }
    with contextlib.suppress(ModuleNotFoundError):
        metaclip.require_beam()
        flags = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
        runs["Beam, 1 worker"] = lambda out: metaclip_beam.run(str(path), entries, options, out)
        runs["Beam, 2 processes"] = lambda out: metaclip_beam.run(str(path), entries, options, out, flags)
    for number, (name, run) in enumerate(runs.items()):
        out = folder / str(number)
        _, seconds = timed(lambda run=run, out=out: run(str(out)))
        results.append({file.name: file.read_bytes() for file in out.iterdir()})
        yield name, seconds
    assert all(result == results[0] for result in results), "the outputs differ"
    report = json.loads(results[0]["report.json"])
    print(
        f"all outputs are the same bytes; kept {report['kept']:,} of {report['pairs']:,} pairs at t={options.threshold}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--entries", type=int, default=60_000)
    args = parser.parse_args()
    texts, entries = corpus(args.captions, args.entries)
    print(f"{len(texts):,} captions of {sum(map(len, texts)) / len(texts):.0f} letters, {len(entries):,} entries")
    print(f"{'':<36}{'wall':>8}{'CPU':>8}{'µs a caption':>14}{'captions a minute a core':>26}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in programs(texts, entries, Path(folder)):
            cpu = seconds["cpu_s"]
            rate = len(texts) / cpu * 60
            figures[name] = {**seconds, "captions_per_minute_per_core": rate}
            print(f"{name:<36}{seconds['wall_s']:>6.1f} s{cpu:>6.1f} s{cpu / len(texts) * 1e6:>14.1f}{rate:>26,.0f}")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "apache_beam": _version("apache-beam"),
        "pyahocorasick": _version("pyahocorasick"),
        "captions": len(texts),
        "entries": len(entries),
        "figures": figures,
    }
    (RESULTS / "curation.json").write_text(json.dumps(result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

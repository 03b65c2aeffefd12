"""Curation of image-text pairs as MetaCLIP does it: matching beside pyahocorasick, in memory beside Apache Beam.

  python -m benchmarks.curation

The peers want pyahocorasick and the extra `curation`; `make curation` makes an environment with Beam. Words are made
up, their frequencies follow Zipf's law; entries are single words, pairs and triples of them, as MetaCLIP's unigrams,
bigrams and titles. The time is CPU time, of all processes together, so that a busy machine counts little.
"""

import functools
import hashlib
import itertools
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.results import OURS

PYAHOCORASICK, BEAM, BEAM_TWO = "pyahocorasick", "Beam, 1 worker", "Beam, 2 processes"


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


def prepare(program: Callable[..., Callable[[], bytes]], work: str, captions: int, entries: int) -> Callable[[], Any]:
    """What a worker runs: all captions once, giving a digest of the result.

    Args:
      program: builds it from the captions, the entries and `work`.
      work: "match" captions with entries, or "curate" from files to files.
      captions, entries: how many, of `corpus`.
    """
    run = program(*corpus(captions, entries), work)

    def timed() -> dict[str, Any]:
        start = _cpu_seconds()
        result = run()
        return {"seconds": _cpu_seconds() - start, "digest": hashlib.sha256(result).hexdigest()}

    return timed


def _cpu_seconds() -> float:
    """Of this process and its ended children."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _ours(texts: list[str], entries: list[str], work: str) -> Callable[[], bytes]:
    from pe_jax.engine import metaclip

    if work == "curate":
        return _curated(metaclip.curate, texts, entries)
    matcher = metaclip.Matcher(entries)
    return lambda: json.dumps([matcher(text) for text in texts]).encode()


def _pyahocorasick(texts: list[str], entries: list[str], _: str) -> Callable[[], bytes]:
    import ahocorasick  # pyright: ignore[reportMissingImports]

    from pe_jax.engine import metaclip

    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        automaton.add_word(f" {entry} ", number)
    automaton.make_automaton()

    def found(text: str) -> list[int]:
        return sorted({number for _, number in automaton.iter(metaclip.spaced(text))})

    return lambda: json.dumps([found(text) for text in texts]).encode()


def _beam(texts: list[str], entries: list[str], _: str, flags: tuple[str, ...] = ()) -> Callable[[], bytes]:
    from pe_jax.engine import metaclip_beam

    return _curated(functools.partial(metaclip_beam.run, flags=flags), texts, entries)


def _curated(curate: Callable[..., Any], texts: list[str], entries: list[str]) -> Callable[[], bytes]:
    """All files that `curate` writes, by their names."""
    from pe_jax.engine import metaclip

    folder = tempfile.TemporaryDirectory()  # goes with the process
    path = Path(folder.name, "in.jsonl")
    with path.open("w") as file:
        for number, text in enumerate(texts):
            record = {"url": f"https://example.org/{number}.jpg", "caption": text, "width": 640, "height": 480}
            file.write(json.dumps(record) + "\n")
    options = metaclip.Curation(max(20, len(texts) // 500), min_width=200, max_aspect=3, shards=8)

    def run() -> bytes:
        with tempfile.TemporaryDirectory(dir=folder.name) as out:
            curate(str(path), entries, options, f"{out}/curated")
            files = sorted(Path(out, "curated").iterdir())
            return b"".join(file.name.encode() + file.read_bytes() for file in files)

    return run


def same(found: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    for program, out in found.items():
        assert out["digest"] == found[OURS]["digest"], f"{program} does not give what ours does"


def _cases(captions: int, entries: int) -> list[turns.Case]:
    def case(work: str, *programs: str) -> turns.Case:
        settings = {"work": work, "captions": captions, "entries": entries}
        title = f"{work} {captions:,} captions, {entries:,} entries"
        return turns.Case(title, settings, (OURS, *programs), ("captions a minute a core", 60 * captions))

    return [case("match", PYAHOCORASICK), case("curate", BEAM, BEAM_TWO)]


TWO = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
BENCHMARK = turns.Benchmark(
    "curation",
    __doc__ or "",
    {
        OURS: turns.Program(functools.partial(prepare, _ours)),
        PYAHOCORASICK: turns.Program(functools.partial(prepare, _pyahocorasick), ("ahocorasick",)),
        BEAM: turns.Program(functools.partial(prepare, _beam), ("apache_beam",)),
        BEAM_TWO: turns.Program(functools.partial(prepare, functools.partial(_beam, flags=TWO)), ("apache_beam",)),
    },
    cases=_cases(100_000, 60_000),
    quick=_cases(500, 300),
    same=same,
    packages=("apache-beam", "pyahocorasick"),
    rounds=7,
    cpu_time=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

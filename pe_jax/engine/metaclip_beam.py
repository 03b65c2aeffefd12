"""The curation of `metaclip` as an Apache Beam program: on this machine, or on Dataflow for billions of pairs."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pe_jax.data import sources
from pe_jax.engine.metaclip import (
    EXAMPLES,
    Curation,
    Matcher,
    Pair,
    balance,
    chances,
    checked,
    duplicate_key,
    first,
    input_files,
    is_jsonl,
    is_sound,
    match,
    prepare,
    read_lines,
    read_records,
    read_text,
    require_beam,
    shard_of,
    shard_path,
    total,
    write,
    write_report,
)

# Elements between the steps are single pairs, inside a step batches of them: Beam costs microseconds an element.
BATCH = 500


@functools.lru_cache(maxsize=1)
def _metadata(path: str) -> tuple[list[str], Matcher]:
    """Entries and matcher, built once per worker process: too large to travel in the job's description."""
    entries = read_text(path).split("\n")[:-1]
    return entries, Matcher(entries)


@functools.lru_cache(maxsize=1)
def _source(config: str) -> sources.Source:
    return sources.create(json.loads(config))


def _tagged(tag: str, values: Iterable[Any]) -> Iterator[Any]:
    return (require_beam().pvalue.TaggedOutput(tag, value) for value in values)


def _read_step(batch: Any, options: Curation, config: str | None) -> Iterator[Any]:
    if config is None:
        found, tally, bad = read_lines(batch, options)
    else:
        found, tally, bad = read_records(_source(config), range(*batch), options)
    yield from found
    yield from _tagged("tally", tally.items())
    yield from _tagged("bad", bad)


def _unique_step(group: tuple[bytes, tuple[int, Pair]], kind: str) -> Iterator[Any]:
    _, (number, pair) = group
    yield pair
    if number > 1:
        yield from _tagged("tally", [(f"duplicate_{kind}", number - 1)])


def _counted(tally: Mapping[str, int], counts: Mapping[int, int]) -> Iterator[Any]:
    yield from _tagged("tally", tally.items())
    yield from _tagged("counts", [dict(counts)])  # one element, where its thousand items would cost as much as the rest


def _match_step(batch: list[Pair], metadata: str) -> Iterator[Any]:
    matched, tally, counts = match(batch, _metadata(metadata)[1])
    yield matched
    yield from _counted(tally, counts)


def _balance_step(
    batch: list[tuple[Pair, list[int]]], chance: Mapping[int, float], metadata: str, seed: int
) -> Iterator[Any]:
    kept, tally, counts = balance(batch, chance, _metadata(metadata)[0], seed)
    yield from kept
    yield from _counted(tally, counts)


def _write_step(
    group: tuple[int, Iterable[tuple[bytes, str] | None]], tally: Mapping[str, int], options: Curation, out: str
) -> Iterator[str]:
    number, members = group
    if is_sound(tally, options):
        path = shard_path(out, number, options.shards)
        write(path, (f"{line}\n" for _, line in sorted(member for member in members if member is not None)))
        yield path


def _report_step(
    _: None,
    written: Iterable[str],
    tally: Mapping[str, int],
    before: Mapping[int, int],
    after: Mapping[int, int],
    bad: Sequence[str],
    metadata: str,
    options: Curation,
    out: str,
) -> None:
    list(written)  # the shards are there before the report is
    write_report(out, _metadata(metadata)[0], tally, before, after, bad, options)


def connect(pipeline: Any, path: str, options: Curation, out: str) -> None:
    """Adds the whole curation to a Beam pipeline; OUT/metadata.txt must be there (`prepare`)."""
    beam = require_beam()
    metadata = f"{out}/metadata.txt"
    if is_jsonl(path):
        config = None
        batches = (
            pipeline
            | "files" >> beam.Create(input_files(path))
            | "lines" >> beam.io.ReadAllFromText(coder=beam.coders.BytesCoder(), with_filename=True)
            | "batch lines" >> beam.BatchElements(min_batch_size=BATCH, max_batch_size=BATCH)
        )
    else:
        config = json.dumps(sources.guess(path))
        records = len(_source(config))
        ranges = [(begin, min(begin + BATCH, records)) for begin in range(0, records, BATCH)]
        batches = pipeline | "ranges" >> beam.Create(ranges) | "spread" >> beam.Reshuffle()
    read = batches | "read" >> beam.FlatMap(_read_step, options, config).with_outputs("tally", "bad", main="pairs")
    tallies, found = [read.tally], read.pairs
    for kind in options.dedup:
        unique = (
            found
            | f"by {kind}" >> beam.Map(lambda pair, kind=kind: (duplicate_key(pair, kind), (1, pair)))
            | f"first {kind}" >> beam.CombinePerKey(first)
            | f"unique {kind}" >> beam.FlatMap(_unique_step, kind).with_outputs("tally", main="pairs")
        )
        tallies.append(unique.tally)
        found = unique.pairs
    matched = (
        found
        | "batch pairs" >> beam.BatchElements(min_batch_size=BATCH, max_batch_size=BATCH)
        | "match" >> beam.FlatMap(_match_step, metadata).with_outputs("tally", "counts", main="pairs")
    )
    before = matched.counts | "before" >> beam.CombineGlobally(total)
    chance = before | "above t" >> beam.Map(chances, options.threshold)
    balanced = matched.pairs | "balance" >> beam.FlatMap(
        _balance_step, beam.pvalue.AsSingleton(chance), metadata, options.seed
    ).with_outputs("tally", "counts", main="pairs")
    after = balanced.counts | "after" >> beam.CombineGlobally(total)
    tally = beam.pvalue.AsDict(
        [*tallies, matched.tally, balanced.tally] | "tallies" >> beam.Flatten() | "tally" >> beam.CombinePerKey(sum)
    )
    members = balanced.pairs | "shard" >> beam.Map(lambda pair, n: (shard_of(pair, n), pair[:2]), options.shards)
    every = pipeline | "all shards" >> beam.Create([(number, None) for number in range(options.shards)])
    written = (
        (members, every)
        | "with empty shards" >> beam.Flatten()
        | "gather" >> beam.GroupByKey()
        | "write" >> beam.FlatMap(_write_step, tally, options, out)
    )
    bad = read.bad | "bad examples" >> beam.combiners.Top.Smallest(EXAMPLES)
    _ = (
        pipeline
        | "once" >> beam.Create([None])
        | "report"
        >> beam.Map(
            _report_step,
            beam.pvalue.AsIter(written),
            tally,
            beam.pvalue.AsSingleton(before),
            beam.pvalue.AsSingleton(after),
            beam.pvalue.AsSingleton(bad),
            metadata,
            options,
            out,
        )
    )


def run(path: str, entries: Sequence[str], options: Curation, out: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Curates on Apache Beam and waits for the end.

    Args:
      path, entries, options, out: as in `metaclip.curate`; JSONL and `out` may be on any file system that Beam knows (gs://).
      flags: Beam's own options, such as --runner=DataflowRunner or --direct_num_workers=4; local by default.

    Returns:
      The report.

    Raises:
      ValueError: on a missing input, an unknown flag, a folder in use, or more bad records than allowed.
      ModuleNotFoundError: without Apache Beam.
    """
    beam = require_beam()
    from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
        PipelineOptions,
        StandardOptions,
    )

    settings = PipelineOptions(list(flags))
    known = settings.get_all_options()
    unknown = [name for name in settings.get_all_options(retain_unknown_options=True) if name not in known]
    if unknown:
        raise ValueError(f"neither pe-jax curate nor Apache Beam has the option --{unknown[0]}.")
    name = settings.view_as(StandardOptions).runner
    local = name is None or name.lower() in ("direct", "directrunner")
    if not local and (lost := [place for place in (path, out) if "://" not in place]):
        raise ValueError(f"the workers of {name} do not see {lost[0]}; put it where they do, such as gs://BUCKET/...")
    if is_jsonl(path):
        input_files(path)
    else:
        sources.create(sources.guess(path))
    prepare(out, entries)
    runner: Any = name
    if local:
        # What Beam calls DirectRunner first tries to download another program, Prism, then comes to this one.
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # pyright: ignore[reportMissingImports]

        runner = FnApiRunner()
    pipeline = beam.Pipeline(runner=runner, options=settings)
    connect(pipeline, path, options, out)
    pipeline.run().wait_until_finish()
    return checked(json.loads(read_text(f"{out}/report.json")), out)

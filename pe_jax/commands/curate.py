"""Curate image-text pairs as MetaCLIP does: match captions to a word list, balance, filter, deduplicate.

  pe-jax curate "raw/*.jsonl" curated --metadata words.txt --threshold 20000 --shards 64
  pe-jax curate gs://mine/raw/*.jsonl.gz gs://mine/curated --metadata words.txt --threshold 20000 --shards 4096 \\
    --runner=DataflowRunner --project=mine --region=us-central1 --temp_location=gs://mine/tmp
  pe-jax curate pairs.jsonl curated --threshold 20 --in-memory

INPUT is JSON lines (a file, a folder, or a glob in quotes) with a caption in each record, or any source that `pe-jax
data` reads. Options that are not listed here are Apache Beam's own, written --name=value; by default Beam runs on this
machine, with --direct_num_workers=N --direct_running_mode=multi_processing in N processes. See docs/curation.md.
"""

import argparse

TAKES_THE_REST = True  # Beam's options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="JSON lines or a source")
    parser.add_argument("out", metavar="OUT", help="folder to write, without an earlier result")
    parser.add_argument("--threshold", type=int, required=True, help="t: pairs an entry may match before it is thinned")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--shards", type=int, default=1, help="output files; one must fit in a worker's memory (1)")
    parser.add_argument("--max-bad-records", type=int, default=0, metavar="N", help="unreadable records to bear (0)")
    parser.add_argument("--in-memory", action="store_true", help="without Beam: one process, all pairs in memory")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")

    words = parser.add_argument_group("metadata")
    words.add_argument("--metadata", nargs="+", default=(), metavar="FILE", help="word lists; a small one if not given")
    words.add_argument("--builtin", action="store_true", help="add the small built-in list to those of --metadata")
    words.add_argument("--min-count", type=int, default=0, metavar="N", help="of lines 'entry TAB count' (0)")

    filters = parser.add_argument_group("filters")
    filters.add_argument(
        "--dedup",
        nargs="+",
        default=["pair"],
        choices=["pair", "image", "text", "none"],
        help="what occurs once (pair)",
    )
    filters.add_argument("--min-width", type=int, default=0, metavar="PX", help="of the image (0)")
    filters.add_argument("--min-height", type=int, default=0, metavar="PX", help="of the image (0)")
    filters.add_argument("--max-aspect", type=float, default=float("inf"), metavar="A", help="longer / shorter side")
    filters.add_argument("--min-characters", type=int, default=1, metavar="N", help="of the caption (1)")
    filters.add_argument("--max-characters", type=int, metavar="N", help="of the caption")
    filters.add_argument("--min-words", type=int, default=0, metavar="N", help="of the caption (0)")
    filters.add_argument("--caption", metavar="FIELD", help="of the caption or list of captions")
    filters.add_argument("--image", metavar="FIELD", help="that identifies the image: a URL, path or hash")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json
    import sys
    import time

    from pe_jax.engine import metaclip, metaclip_beam

    if args.in_memory and args.rest:
        raise ValueError(f"unknown option {args.rest[0]}; with --in-memory there are no options of Apache Beam.")
    if "none" in args.dedup and len(args.dedup) > 1:
        raise ValueError(f"--dedup {' '.join(args.dedup)} contradicts itself; give none alone.")
    args.dedup = tuple(kind for kind in args.dedup if kind != "none")
    options = metaclip.Curation(**{f.name: getattr(args, f.name) for f in dataclasses.fields(metaclip.Curation)})
    builtin = args.builtin or not args.metadata
    entries = metaclip.read_entries(args.metadata, builtin=builtin, min_count=args.min_count)
    begin = time.monotonic()
    if args.in_memory:
        report = metaclip.curate(args.input, entries, options, args.out)
    else:
        report = metaclip_beam.run(args.input, entries, options, args.out, args.rest)
    seconds = time.monotonic() - begin
    picture = metaclip.plot(args.out)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for line in metaclip.lines(report):
            print(line)
        print(f"\nwritten: {args.out}/data-*.jsonl, entries.tsv, report.json{', entries.png' if picture else ''}")
    print(f"{seconds:.1f} s, {report['pairs'] / seconds * 60:,.0f} pairs a minute", file=sys.stderr)
    if picture is None:
        print("no picture of the counts: it needs matplotlib, pip install 'pe-jax[viz]'", file=sys.stderr)
    return 0

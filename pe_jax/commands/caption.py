"""Write what a vision-language model says of every image or video of a data set, going on where a killed run stopped.

  pe-jax caption --model Perception-LM-1B/ photos/ --out captions
  pe-jax caption --model runs/plm "train-{000..099}.tar" --out gs://bucket/captions --part 3/16 --batch-size 32
  pe-jax caption --model runs/plm clips/ --prompt "What happens in this video?" --out captions

DATA is a folder of images or videos, a file or folder of shards, or a source as JSON (see `pe-jax data`). DIR gets
replies-00000-of-00040.jsonl, and so on, of 256 records each: {"row": 0, "file": "a.jpg", "reply": "..."} a line, or
{"row": 1, "bad": "why"}. On several machines start the same command with --part 0/4 to --part 3/4; they share the
folder. A prompt may be as of training: a warm-up model (template "plain") reads none.
"""

import argparse
import json
import sys
from typing import Any

from pe_jax.commands import Bars, add_assistant_arguments, load_assistant, part_of

PROMPT = "Describe the image in detail."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_assistant_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a folder of images or videos, any data set, or a source as JSON")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, local or gs://")
    parser.add_argument("--prompt", default=PROMPT, help=f"what is asked ({PROMPT})")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a reply, at most (256)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images or videos at a time (8)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="unreadable records to leave out (0)")
    parser.add_argument("--part", metavar="I/N", help="this is process I of N, counted from 0")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    part = (0, 1) if args.part is None else part_of(args.part)
    from pe_jax.data import sources
    from pe_jax.evals import inference, records, vlm

    data = sources.guess(args.data) | ({} if args.limit is None else {"limit": args.limit})
    rows = records.open(data)  # before the model, which takes longer to find wrong
    assistant = load_assistant(args)
    asking = vlm.Asking(
        max_tokens=args.max_tokens,
        batch_size=min(args.batch_size, len(rows)),
        max_bad=args.max_bad,
        folder=args.out,
        part=part,
        about={"weights": inference.fingerprint(assistant.model), "data": data, "prompt": args.prompt}
        | {"max_tokens": args.max_tokens}
        | assistant.to_dict(),
    )
    counts = {"records": len(rows), "replies": 0, "left_out": 0}
    with Bars() as bars:
        questions = vlm.about_media(rows, args.prompt)
        for line in vlm.ask(assistant, questions, asking, lambda done, total: bars("replies", done, total)):
            counts["replies" if "reply" in line else "left_out"] += 1
            if "bad" in line:
                print(f"left out: {line['bad']}", file=sys.stderr)
    _tell(args, counts)
    return 0


def _tell(args: argparse.Namespace, counts: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"folder": args.out} | counts, indent=2))
    else:
        left = f", {counts['left_out']:,} left out" if counts["left_out"] else ""
        of = "" if args.part is None else f" of part {args.part}"
        print(f"{counts['replies']:,} replies{of} in {args.out}{left}")

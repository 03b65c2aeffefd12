"""Serve a vision-language model over HTTP, as OpenAI's chat completions, streamed or whole.

  pe-jax serve --model Perception-LM-1B/ --port 8000

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Images and videos are part of a request, as data: URLs; other addresses are refused unless --allow-urls is given, with
which clients can make this machine ask any address it can reach. It listens on this machine alone unless --host says
otherwise; behind --host 0.0.0.0 give --api-key too, and put TLS in front. Requests that wait at the same time are
answered together. The first request of a new size waits for a compilation.
"""

import argparse
import os
import sys

from pe_jax.commands import add_assistant_arguments, load_assistant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_assistant_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (8000)")
    parser.add_argument("--name", help="what clients call the model (the last part of --model)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="requests answered at a time (8)")
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send; also from PE_JAX_API_KEY")
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="of an answer (2048)")
    limits.add_argument("--max-body", type=int, default=64, metavar="MiB", help="of a whole request (64)")
    limits.add_argument("--max-pixels", type=int, default=50_000_000, metavar="N", help="of one image (50,000,000)")
    limits.add_argument("--max-images", type=int, default=16, metavar="N", help="of one conversation (16)")
    limits.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait (64)")
    limits.add_argument("--allow-urls", action="store_true", help="fetch images and videos from http(s) addresses")


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from pe_jax import endpoint

    for name in ("batch_size", "max_tokens", "max_body", "max_pixels", "max_images", "max_waiting"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    limits = endpoint.Limits(
        body_bytes=args.max_body * 2**20,
        pixels=args.max_pixels,
        images=args.max_images,
        tokens=args.max_tokens,
        waiting=args.max_waiting,
        urls=args.allow_urls,
    )
    assistant = load_assistant(args)
    if args.name:
        assistant = dataclasses.replace(assistant, name=args.name)
    key = args.api_key or os.environ.get("PE_JAX_API_KEY")
    try:
        server = endpoint.Server(assistant, (args.host, args.port), limits, args.batch_size, key)
    except OSError as error:
        raise ValueError(f"cannot listen on {args.host}:{args.port}: {error}; choose another --port.") from error
    print(f"{assistant.name} at {server.url}", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        server.server_close()
    return 0

"""Open a page on this machine where an image is dropped and its tokens are looked at, layer by layer.

  pe-jax explore --model runs/mine
  pe-jax explore --model PE-Core-L14-336 --port 8080

Click on a token: the similarity of all others to it; move the slider: the same at another layer. The principal
components of the tokens are beside it, and for a model with a text tower the similarity of the image with texts. The
page asks nothing of any other machine. On a remote machine, forward the port: ssh -L 7860:localhost:7860 HOST. Needs
the `explore` extra (Gradio).
"""

import argparse

from pe_jax.commands import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--image-size", type=int, help="pixels of a side that images are brought to (the model's own)")
    parser.add_argument("--port", type=int, help="of the page (the first free one from 7860)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; with 0.0.0.0 whoever reaches this machine may look in",
    )


def run(args: argparse.Namespace) -> int:
    from pe_jax import explore

    explore.require()
    blocks = explore.page(load_model(args), args.model, args.image_size)
    print(f"{explore.serve(blocks, args.host, args.port)}  (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
    return 0

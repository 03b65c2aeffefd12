"""Talk to a vision-language model about images or a video; the answer comes as it is written.

  pe-jax chat --model Perception-LM-1B/ --image receipt.jpg --prompt "What is the total?"
  pe-jax chat --model runs/plm --video clip.mp4 --prompt "What happens?" --max-tokens 200
  pe-jax chat --model runs/plm --image cat.jpg                 # in a terminal: a conversation

Without --prompt the question is read from the input; in a terminal one after the other, with the conversation so far.
There /image FILE and /video FILE begin a new one, /new too, and /quit or the end of the input ends. Several images
stand in the question where it has <image> marks, as many as images, or else at its beginning.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from pe_jax.commands import add_assistant_arguments, load_assistant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_assistant_arguments(parser)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="one or several images")
    parser.add_argument("--video", metavar="FILE", help="a video, instead of images")
    parser.add_argument("--prompt", help="one question; the answer to it is all that is printed")
    parser.add_argument("--system", help="instead of the first words that the model was trained behind")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer, at most (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability (1)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many of the likeliest; 0 (default): all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")


def run(args: argparse.Namespace) -> int:
    if args.image and args.video:
        raise ValueError("give either --image or --video; a conversation is about one kind.")
    from pe_jax.assistant import Options

    options = Options(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    talk = _Talk(load_assistant(args), options, tuple(args.image), args.video, args.system)
    if args.prompt is None and sys.stdin.isatty():
        _converse(talk)
    else:
        _write(talk.ask(sys.stdin.read().strip() if args.prompt is None else args.prompt))
    return 0


class _Talk:
    """A conversation so far, and what it is about."""

    def __init__(self, assistant: Any, options: Any, images: tuple[str, ...], video: str | None, system: str | None):
        self._assistant, self._options, self._system = assistant, options, system
        self.images, self.video, self.turns = images, video, ()

    def about(self, images: tuple[str, ...] = (), video: str | None = None) -> None:
        self.images, self.video, self.turns = images, video, ()

    def ask(self, question: str) -> Iterable[str]:
        """The answer in pieces; with the last of them the turn is over."""
        from pe_jax.data.chat import Conversation

        turns = (*self.turns, ("user", question))
        conversation = Conversation(turns, self.images, self.video, system=self._system)
        said = []
        for piece in self._assistant.stream(conversation, **dataclasses.asdict(self._options)):
            said.append(piece)
            yield piece
        self.turns = (*turns, ("assistant", "".join(said)))


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _converse(talk: _Talk) -> None:
    print("/image FILE, /video FILE and /new begin a new conversation, /quit ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            talk.about()
        elif word == "/image" and rest:
            talk.about(images=(rest.strip(),))
        elif word == "/video" and rest:
            talk.about(video=rest.strip())
        elif line:
            try:
                _write(talk.ask(line))
            except KeyboardInterrupt:  # of an answer; the question is forgotten
                print()
            except ValueError as error:  # an image that is not there, say; the conversation goes on
                print(error, file=sys.stderr)

"""Two processes of one program that find each other at a free port of this machine."""

import signal
import socket
import subprocess
from collections.abc import Callable

Start = Callable[[int, int], subprocess.Popen]  # the port to meet at, and which of the two this is; text pipes


def begin(start: Start) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(port, number) for number in range(2)]


def finish(start: Start, tries: int = 3) -> list[str]:
    """Lets both run to their end; what each has said.

    Between processes XLA's CPU collectives go through Gloo, which on a busy machine aborts one now and then. No TPU has
    it, and to a run it is one more kill, after which the same command goes on; so that is what is done here. Any other
    end than a good one fails at once, and so does the last abort.
    """
    for left in reversed(range(tries)):
        processes = begin(start)
        said = ["".join(text or "" for text in process.communicate(timeout=300)) for process in processes]
        codes = [process.returncode for process in processes]
        if codes == [0, 0]:
            return said
        ends = zip(codes, said, strict=True)
        aborted = any(code == -signal.SIGABRT and "gloo::EnforceNotMet" in text for code, text in ends)
        assert aborted and left, (codes, *said)
    raise AssertionError("tries must be at least 1")

"""Which samples share a row: best fit, largest first, under a budget of tokens and one of image chunks."""

from collections.abc import Sequence

import numpy as np


def pack(
    tokens: Sequence[int] | np.ndarray, chunks: Sequence[int] | np.ndarray, *, rows: int, length: int, room: int
) -> tuple[list[list[int]], list[int]]:
    """Deals N samples out to `rows` rows of at most `length` tokens and `room` chunks, none of them empty.

    The `rows` largest begin a row each; every further one, from large to small, goes to the fullest row that takes it.

    Args:
      tokens, chunks: of each sample; a sample fits into a row by itself.
      rows: at most N.

    Returns:
      The samples of each row, in their own order, and the samples that no row takes.
    """
    assert rows <= len(tokens), (rows, len(tokens))
    sizes = np.array([tokens, chunks], np.int64)
    budget = np.array([[length], [room]], np.int64)
    free = np.repeat(budget, rows, 1)
    dealt: list[list[int]] = [[] for _ in range(rows)]
    left = []
    for rank, sample in enumerate(np.argsort(-(sizes / budget).max(0), kind="stable").tolist()):
        size = sizes[:, sample, None]
        if rank < rows:
            row = rank
        else:
            fits = np.flatnonzero((free >= size).all(0))
            if not len(fits):
                left.append(sample)
                continue
            row = int(fits[np.argmin(free[0, fits])])
        free[:, row] -= size[:, 0]
        dealt[row].append(sample)
    return [sorted(samples) for samples in dealt], sorted(left)

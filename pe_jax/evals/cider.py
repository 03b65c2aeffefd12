"""CIDEr-D of captions, as COCO, NoCaps and Flickr30k report it.

Captions are cut into words by rules of our own that follow the Penn Treebank's as the reference's Java program applies
them: lower case, "n't", "'s" and their like apart, hyphens, abbreviations and numbers kept whole, punctuation left out.
They differ from it where text is no plain sentence: addresses of web pages, emoticons, fractions as one sign, dots
within words and the like. `tests/parity/test_cider.py` compares both.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words of difference in length that cost a factor of e^(-1/2)

_LEFT_OUT = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN: dict[int, str] = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"}
_TOKEN = re.compile(
    r"""
      (?:[^\W\d_]\.){2,}(?!\w) | [^\W\d_](?:\.[^\W\d_])+(?!\w)          # u.s., a.m
    | (?:mr|mrs|ms|dr|st|mt|ft|jr|sr|vs|etc|inc|corp|ave|blvd|prof
        |jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)\.(?!\w)
    | no\.(?=\s*\d)
    | (?:can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:lem|gim)(?=me\b))
    | \w+(?=n't\b) | n't\b
    | 'n'(?!\w) | '(?:s|re|ve|ll|d|m|n|em)(?!\w) | 't(?=is\b|was\b) | '\d\ds\b
    | (?<!\w)[-+]?(?:\d+(?:[.,:/]\d+)*|\.\d+)(?:-?\w+)*                 # 1,000, 5:30, 20th, 7-up
    | [^\W_]+ (?: [-_/&.](?=\w)[^\W_]+ | '(?!(?:s|re|ve|ll|d|m)\b)(?=\w)[^\W_]+ )*
    | ''|``|\.\.\.|-{2,}|!+|\?+ | \S
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """A caption's words, as they are compared."""
    found: list[str] = _TOKEN.findall(caption.lower().translate(_PLAIN))
    return [_BRACKETS.get(word, word) for word in found if word not in _LEFT_OUT and word != '"']


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    split: Callable[[str], Sequence[str]] = words,
) -> Float[np.ndarray, "N"]:
    """The score of each image's caption, from 0 to 10; the mean over images, times 100, is what papers print.

    N-grams are weighted by how few images' references have them, so a score depends on all images of the call, and of
    one image alone it is 0.

    Args:
      captions: one an image.
      references: of each image, one or more.
      split: a caption's words.

    Raises:
      ValueError: for an image without a reference, or different numbers of images.

    Source: CIDEr (arXiv:1411.5726, §6) and the code of COCO's evaluation.
    """
    if len(captions) != len(references) or not all(references):
        fewest = min(map(len, references), default=0)
        raise ValueError(
            f"{len(captions)} captions and {len(references)} lists of references, the shortest of {fewest}; want as"
            " many of either, and at least one reference in each."
        )
    said = [_grams(split(caption)) for caption in captions]
    right = [[_grams(split(text)) for text in own] for own in references]
    images_with = Counter(gram for own in right for gram in set().union(*own))
    everywhere = math.log(len(captions)) if captions else 0.0

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (everywhere - math.log(max(1, images_with[gram])))
        norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in parts]
        # Lengths are counted in pairs of words, as in the reference: one less than the words, and 0 for none too.
        return parts, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for own, others in zip(said, right, strict=True):
        parts, norms, length = vector(own)
        total = 0.0
        for other in others:
            their_parts, their_norms, their_length = vector(other)
            nearness = math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2))
            for part, theirs, norm, their_norm in zip(parts, their_parts, norms, their_norms, strict=True):
                if norm and their_norm:
                    # Words said more often than in the reference gain nothing: that is the D.
                    common = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in part.items() if gram in theirs)
                    total += nearness * common / (norm * their_norm)
        scores.append(10 * total / ORDERS / len(others))
    return np.asarray(scores)


def _grams(split: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(split[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(split) - n + 1))

"""Scores of generated answers, each as its benchmark scores them (PE §4.2): text in, a number from 0 to 1 out.

  anls          DocVQA, InfoVQA: how near to a right answer in letters
  relaxed       ChartQA: a number may be 5 % off
  vqa           VQAv2, TextVQA, OK-VQA: how many of ten people gave the same answer, with the official normalisation
  exact         OCR-VQA: equal but for case and spaces
  choice        AI2D and video questions: which option a reply names
  yes_no        POPE: accuracy, precision, recall, F1 and the share of yes
  iou           RefCOCO: P@0.5 is the share of boxes with an overlap of at least 0.5

Captions are scored by `pe_jax.evals.cider`.
"""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase  # what options are called, in their order

# ------------------------------------------------------------------------------------------------------------ free text


def edit_distance(a: str, b: str) -> int:
    """The fewest letters to put in, take out or replace that make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def anls(reply: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """1 - edit distance / length of the longer one, of the nearest right answer; 0 below `threshold`.

    Case and runs of white space do not count. Averaged over questions it is the Average Normalised Levenshtein
    Similarity of DocVQA.

    Source: Scene text VQA (arXiv:1905.13648, eq. 1); a similarity of exactly the threshold counts, as in the
    evaluation server's code.
    """
    said = _plain(reply)
    best = 0.0
    for answer in map(_plain, _some(answers)):
        longer = max(len(said), len(answer))
        best = max(best, 1 - edit_distance(said, answer) / longer if longer else 1.0)
    return best if best >= threshold else 0.0


def exact(reply: str, answers: Sequence[str]) -> float:
    """1 if the reply is one of the answers, but for case and white space, else 0."""
    return float(_plain(reply) in map(_plain, _some(answers)))


def relaxed(reply: str, answer: str, tolerance: float = 0.05) -> float:
    """1 if both are numbers and `reply` is off by at most `tolerance` of the answer, or if the texts are equal.

    "12%" is the number 0.12. An answer of 0 is compared as text, and so is what has a unit, as in the reference code.

    Source: ChartQA (arXiv:2203.10244, §5.1), as evaluated since Pix2Struct (arXiv:2210.03347).
    """
    said, right = _number(reply), _number(answer)
    if said is not None and right:
        return float(abs(said - right) / abs(right) <= tolerance)
    return float(reply.strip().lower() == answer.strip().lower())


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"answers={answers!r}; want a list of at least one right answer.")
    return answers


# ---------------------------------------------------------------------------------------------------------------- VQA

# Of these the official code puts a missing apostrophe back, one of several too: couldn'tve is couldn't've.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_MENDED = {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS.split() for i, letter in enumerate(w) if letter == "'"}
_MENDED["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalized(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Without punctuation and articles, in lower case, with numbers up to ten as digits and apostrophes where they belong.

    Source: VQA (arXiv:1505.00468) and the evaluation code released with it.
    """
    text = " ".join(text.replace("\n", " ").replace("\t", " ").split(" ")).strip()
    out = text
    grouped = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        # A mark between two words parts them; one at an end of a word, or in a text with 1,000 in it, vanishes.
        out = out.replace(mark, "" if grouped or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_DIGITS.get(word, word) for word in out.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa(reply: str, answers: Sequence[str]) -> float:
    """min(1, people who said the same / 3), the mean over leaving each person out in turn.

    Replies and answers are normalised. The official script leaves them as they are where all people agree, so that
    "Yes." is wrong for ten times "yes"; the evaluation server of TextVQA does not, and neither do we.

    Args:
      reply: what the model said.
      answers: of all people, equal ones as often as they were given; ten in the benchmarks.

    Raises:
      ValueError: for fewer than 4 answers, with which nothing could score 1.
    """
    if isinstance(answers, str) or len(answers) < 4:
        raise ValueError(f"answers={answers!r}; want those of all people, at least 4 (ten in VQAv2).")
    count = len(answers)
    same = [normalized(answer) for answer in answers].count(normalized(reply))
    # Leaving out one of the `same`, the others are one fewer.
    return (same * min(1, (same - 1) / 3) + (count - same) * min(1, same / 3)) / count


# ------------------------------------------------------------------------------------------------------------- choices


def choice(reply: str, options: Sequence[str]) -> int | None:
    """Which option a reply names, counted from 0; None where it names none, or several.

    In this order: a letter in the place of an answer ("B", "(b)", "B. a cat", "the answer is B"), an option's own text,
    or exactly one option's text inside the reply.

    Raises:
      ValueError: for no option, or more than there are letters.
    """
    if not 0 < len(options) <= len(LETTERS):
        raise ValueError(f"there are {len(options)} options; want from 1 to {len(LETTERS)}.")
    last = LETTERS[len(options) - 1]
    text = reply.strip()
    for pattern in (
        rf"[(\[]?([A-{last}a-{last.lower()}])[)\].:,]?$",  # all of it
        rf"[(\[]?([A-{last}])[)\].:,](?:\s|$)",  # at the beginning; "A cat" is no letter
        rf".*\b(?i:answer|option|choice)\b(?:\s+is)?\s*:?\s*[(\[\"']?([A-{last}])\b(?!')",
    ):
        if found := re.match(pattern, text, re.DOTALL):
            return LETTERS.index(found[1].upper())
    said, known = _words(text), [_words(option) for option in options]
    if said.strip() and known.count(said) == 1:
        return known.index(said)
    inside = [option for option in known if option.strip() and option in said]
    # "a hot dog" names the hot dog, and not the dog as well.
    longest = [option for option in inside if not any(option != other and option in other for other in inside)]
    return known.index(longest[0]) if len(longest) == 1 and known.count(longest[0]) == 1 else None


def _words(text: str) -> str:
    """A text to search whole words in."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


# -------------------------------------------------------------------------------------------------------------- yes, no


def says_yes(reply: str) -> bool:
    """Whether a reply means yes: its first sentence has neither "no" nor "not" in it.

    Source: POPE (arXiv:2305.10355) and the evaluation code released with it, but for capitals, which it tells apart.
    """
    first = reply.partition(".")[0].replace(",", "").lower()
    return not {"no", "not"} & set(first.split())


def yes_no(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    """POPE's figures, of yes as what is looked for; what is divided by 0 is 0."""
    pairs = list(zip(said, right, strict=True))
    if not pairs:
        raise ValueError("there is no answer to score.")
    hits = sum(a and b for a, b in pairs)
    yes, positives = sum(said), sum(right)
    return {
        "accuracy": sum(a == b for a, b in pairs) / len(pairs),
        "precision": hits / yes if yes else 0.0,
        "recall": hits / positives if positives else 0.0,
        "f1": 2 * hits / (yes + positives) if yes + positives else 0.0,
        "yes": yes / len(pairs),
    }


# --------------------------------------------------------------------------------------------------------------- boxes


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 if either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return common / (sum(areas) - common) if min(areas) > 0 else 0.0

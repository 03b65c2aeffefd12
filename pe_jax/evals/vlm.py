"""Questions about images and videos, answered by a vision-language model and scored (PE §4.2, Tab. 10).

A record has an `image` (or a list of them) or a `video`, and of its task's fields:

  task       fields                                               figures
  anls       question; answers, or answer                         anls
  relaxed    question; answer                                     relaxed
  vqa        question; answers of all people                      vqa
  exact      question; answers, or answer                         exact
  choice     question, choices; answer: place, letter or text     accuracy, named (replies that name a choice)
  yes_no     question; answer: yes or no; category, if any        accuracy, precision, recall, f1, yes; CATEGORY_f1, ...
  box        question: what to find; bbox [x, y, w, h], width,    p50, iou
             height in pixels
  caption    captions, or caption; no question                    cider_d

Besides, every task gives `count`, the records that were scored, and `bad`, those that could not be read.

Replies are written greedily. What was replied is kept in files of `KEPT` records each, if a folder for them is given;
those that are there are not asked for again.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from pe_jax import paths
from pe_jax.data import chat, regions, sources
from pe_jax.data.image import BadImage
from pe_jax.data.video import BadVideo
from pe_jax.evals import answers, cider, inference, records

KEPT = 256  # records whose replies are one file
BAD = (BadImage, BadVideo, sources.BadRecord)

# What is said behind a question, or around it at {}; the usual words, in which models of this kind are trained.
_SHORT = "{}\nAnswer the question using a single word or phrase."
PROMPTS = {
    "anls": _SHORT,
    "relaxed": _SHORT,
    "vqa": _SHORT,
    "exact": _SHORT,
    "choice": "{}\nAnswer with the option's letter from the given choices directly.",
    "yes_no": _SHORT,
    "box": "Give the bounding box of what this describes: {}",
    "caption": "Describe the image in one sentence.",
}
_TOKENS = {"anls": 64, "relaxed": 32, "vqa": 32, "exact": 64, "choice": 16, "yes_no": 16, "box": 32, "caption": 64}


@runtime_checkable
class Speaker(Protocol):
    """What is evaluated here: a `pe_jax.assistant.Assistant`."""

    @property
    def model(self) -> Any: ...

    @property
    def vision(self) -> chat.Vision: ...

    def to_dict(self) -> dict[str, Any]: ...

    def prompt(self, conversation: chat.Conversation, max_tokens: int = 1) -> Any: ...

    def greedy(self, prompts: Sequence[Any], max_tokens: int) -> list[str]: ...


# -------------------------------------------------------------------------------------------------------------- asking


@dataclasses.dataclass(frozen=True)
class Questions:
    """A conversation to answer for each of `count` records.

    Attributes:
      count: how many there are.
      conversation: the one of a record; runs on threads. Raises one of `BAD` for a record that cannot be used.
      where: how a message calls a record.
    """

    count: int
    conversation: Callable[[int], chat.Conversation]
    where: Callable[[int], str]


def about_media(rows: records.Records, prompt: str) -> Questions:
    """The same question about each image or video."""

    def conversation(row: int) -> chat.Conversation:
        record, where = rows.source[row], rows.source.where(row)
        medium = _medium(record)
        if not medium:
            raise sources.BadRecord(f"{where} has neither an image nor a video; its fields are {', '.join(record)}.")
        return chat.from_record(medium | {"question": prompt, "answer": ""}, where)

    return Questions(len(rows), conversation, rows.source.where)


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
      max_tokens: of a reply.
      batch_size: conversations at a time.
      max_bad: how many records may be unreadable before it stops.
      folder: where replies are kept, local or gs://; None keeps none.
      part: (i, n): this is process i of n that share a folder and know nothing else of one another.
      about: what the replies depend on besides the records, to refuse a folder of other replies.
    """

    max_tokens: int
    batch_size: int = 8
    max_bad: int = 0
    folder: str | None = None
    part: tuple[int, int] = (0, 1)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        index, count = self.part
        if self.batch_size < 1 or self.max_tokens < 1 or self.max_bad < 0 or not 0 <= index < count:
            raise ValueError(
                f"batch_size={self.batch_size} and max_tokens={self.max_tokens} must be at least 1, max_bad="
                f"{self.max_bad} not negative, and part={self.part} (i, n) with i from 0 to n - 1."
            )
        if count > 1 and self.folder is None:
            raise ValueError(f"part={self.part} needs a folder, in which the {count} processes leave their replies.")

    def files(self, count: int) -> list[str]:
        """The names of the files for `count` records, this process's and the others'."""
        total = -(-count // KEPT)
        return [f"replies-{i:05}-of-{total:05}.jsonl" for i in range(total)]


def ask(
    speaker: Speaker,
    questions: Questions,
    asking: Asking,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, Any]]:
    """Asks all questions of this process's part, in their order: {"row", "file", "reply"}, or {"row", "bad": reason}.

    `file` is how messages call the record, and is in what is kept too.

    Args:
      speaker: the model.
      questions: what to ask.
      asking: how.
      progress: called with how many are done, and of how many that were still to do.

    Raises:
      ValueError: if more than `asking.max_bad` are bad, or the folder is one of other replies.
    """
    names, folder = asking.files(questions.count), None
    if asking.folder is not None:
        folder = paths.path(asking.folder)
        paths.reach(folder)
        _same_kind(folder, {"records": questions.count, **asking.about}, writes=asking.part[0] == 0)
    own = range(asking.part[0], len(names), asking.part[1])
    kept = [i for i in own if folder is not None and (folder / names[i]).exists()]
    total = sum(len(_rows(i, questions.count)) for i in own if i not in kept)
    done = bad = 0
    with concurrent.futures.ThreadPoolExecutor(inference.THREADS) as pool:
        for i in own:
            if folder is not None and i in kept:
                lines = [json.loads(line) for line in (folder / names[i]).read_text().splitlines()]
            else:
                lines = []
                for line in _asked(speaker, questions, _rows(i, questions.count), asking, pool):
                    lines.append(line)
                    done += 1
                    progress(done, total)
                    if bad + sum("bad" in line for line in lines) > asking.max_bad:
                        break
                lines.sort(key=lambda line: line["row"])
            bad += sum("bad" in line for line in lines)
            if bad > asking.max_bad:
                reason = next(line["bad"] for line in lines[::-1] if "bad" in line)
                raise ValueError(
                    f"{bad} records cannot be used, and {asking.max_bad} are allowed to be left out. One is: {reason}"
                )
            if folder is not None and i not in kept:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                paths.write_text(folder / names[i], text)
            yield from lines


def _rows(file: int, count: int) -> range:
    return range(file * KEPT, min((file + 1) * KEPT, count))


def _asked(
    speaker: Speaker,
    questions: Questions,
    rows: Sequence[int],
    asking: Asking,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> Iterator[dict[str, Any]]:
    """The rows in batches, those with as many chunks together, read one batch ahead of the device."""

    def chunks(row: int) -> int:
        try:
            return speaker.vision.count(questions.conversation(row))
        except BAD:
            return 0  # `load` will say why

    def load(row: int) -> Any:
        try:
            return speaker.prompt(questions.conversation(row), asking.max_tokens)
        except BAD as error:
            return {"row": row, "bad": str(error)}

    size = asking.batch_size
    rows = [row for _, row in sorted(zip(pool.map(chunks, rows), rows, strict=True))]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    pending = [pool.submit(load, row) for row in batches[0]]
    for number, batch in enumerate(batches):
        loaded = [future.result() for future in pending]
        pending = [pool.submit(load, row) for row in batches[number + 1]] if number + 1 < len(batches) else []
        good = [(row, prompt) for row, prompt in zip(batch, loaded, strict=True) if not isinstance(prompt, dict)]
        yield from (line for line in loaded if isinstance(line, dict))
        if good:
            # A last batch that is not full is filled up: no program of another size is compiled for it.
            prompts = [prompt for _, prompt in good]
            prompts += [prompts[0]] * (size - len(prompts)) if len(rows) > size else []
            said = speaker.greedy(prompts, asking.max_tokens)
            for (row, _), reply in zip(good, said, strict=False):
                yield {"row": row, "file": questions.where(row), "reply": reply}


def _same_kind(folder: Any, about: Mapping[str, Any], *, writes: bool) -> None:
    """Writes down what the replies of a folder are, or compares it with what is there."""
    file, said = folder / "about.json", json.dumps(about, indent=1, sort_keys=True, default=str)
    if not file.exists():
        if writes:
            paths.write_text(file, said)
        return
    there = json.loads(file.read_text())
    now = json.loads(said)
    if different := sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name)):
        name = different[0]
        raise ValueError(
            f"{folder} holds replies with {name}={str(there.get(name))[:200]}, and now it is"
            f" {str(now.get(name))[:200]}; take another folder, or delete that one."
        )


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclasses.dataclass(frozen=True)
class Answers:
    """Evaluator `{"name": "vlm", "task": "vqa", "data": {...}}` → the figures of the task, see above.

    Attributes:
      task: which.
      data: a source, see `pe_jax.evals.records`.
      parts: texts that stand for {part} in the strings of `data`, one data set each; a figure is their plain mean.
      question: the field of the question.
      prompt: what is said, with {} where the question stands; None: the task's own.
      max_tokens: of a reply; None: the task's own.
      batch_size: conversations at a time.
      max_bad: how many records of a data set may be unreadable; they are not scored.
      replies: a folder where replies are kept.
    """

    task: str
    data: Mapping[str, Any]
    parts: Sequence[str] = ()
    question: str = "question"
    prompt: str | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    max_bad: int = 0
    replies: str | None = None

    def __post_init__(self) -> None:
        if self.task not in PROMPTS:
            raise ValueError(f"task={self.task!r} is unknown; the tasks are {', '.join(PROMPTS)}.")
        if self.prompt is not None and self.prompt.count("{}") != (self.task != "caption"):
            wanted = "no {}, as there is no question" if self.task == "caption" else "one {} where the question stands"
            raise ValueError(f"prompt={self.prompt!r}; task {self.task!r} wants {wanted}.")

    def __call__(self, model: Any) -> dict[str, float]:
        if not isinstance(model, Speaker):
            raise ValueError(
                f"evaluator 'vlm' asks questions, and a {type(model).__name__} cannot answer; load a vision-language "
                "model with pe_jax.assistant.load."
            )
        if jax.process_count() > 1:
            raise ValueError("evaluator 'vlm' runs in one process; start it alone, on the devices of one host.")
        found = [self._one(model, part) for part in self.parts or (None,)]
        totals = {name: [own[name] for own in found] for name in found[0]}
        return {
            name: float(sum(values) if name in ("count", "bad") else np.mean(values)) for name, values in totals.items()
        }

    def _one(self, speaker: Speaker, part: str | None) -> dict[str, float]:
        data = self.data if part is None else _with_part(self.data, part)
        rows = records.open(data)
        prompt = PROMPTS[self.task] if self.prompt is None else self.prompt
        score = _TASKS[self.task](rows)
        kept = None if self.replies is None else "/".join([self.replies, *([] if part is None else [part])])
        weights = None if kept is None else inference.fingerprint(speaker.model)
        asking = Asking(
            max_tokens=self.max_tokens or _TOKENS[self.task],
            batch_size=min(self.batch_size, len(rows)),
            max_bad=self.max_bad,
            folder=kept,
            about={"weights": weights, "data": data, "prompt": prompt, "max_tokens": self.max_tokens}
            | speaker.to_dict(),
        )

        def conversation(row: int) -> chat.Conversation:
            record, where = rows.source[row], rows.source.where(row)
            own = "" if self.task == "caption" else _question(record, self.question, where)
            if self.task == "choice":
                listed = zip(answers.LETTERS, _list(record, "choices", where), strict=False)
                own = "\n".join([own, *(f"{letter}. {option}" for letter, option in listed)])
            return chat.from_record(
                _medium(record) | {"question": prompt.replace("{}", own), "answer": ""}, where=where
            )

        questions = Questions(len(rows), conversation, rows.source.where)
        lines = list(ask(speaker, questions, asking))
        good = [line for line in lines if "reply" in line]
        if not good:
            raise ValueError(f"no record of {data} could be used; one says: {lines[0]['bad']}")
        figures = score([line["row"] for line in good], [line["reply"].strip() for line in good])
        return figures | {"count": float(len(good)), "bad": float(len(lines) - len(good))}


def _with_part(value: Any, part: str) -> Any:
    if isinstance(value, str):
        return value.replace("{part}", part)
    return {name: _with_part(own, part) for name, own in value.items()} if isinstance(value, Mapping) else value


def _medium(record: Mapping[str, Any]) -> dict[str, Any]:
    known = ("image", "video", "start_time", "end_time", "bbox_map")
    return {name: record[name] for name in known if record.get(name) is not None}


def _question(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} is {value!r:.60}; want a question. The fields are {', '.join(record)}.")
    return value


def _list(record: Mapping[str, Any], field: str, where: str) -> list[str]:
    value = record.get(field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {field} is {value!r:.60}; want a list. The fields are {', '.join(record)}.")
    return [str(own) for own in value]


def _right(record: Mapping[str, Any], where: str) -> list[str]:
    """The right answers: `answers`, texts or objects with an `answer`, or one `answer`."""
    given = record.get("answers", record.get("answer"))
    given = given if isinstance(given, list) else [given]
    texts = [own.get("answer") if isinstance(own, Mapping) else own for own in given]
    if not texts or not all(isinstance(text, str | int | float) for text in texts):
        raise ValueError(f"{where}: the answers are {given!r:.60}; want a text or a list of them.")
    return [str(text) for text in texts]


_Score = Callable[[list[int], list[str]], dict[str, float]]  # rows and their replies to figures


def _averaged(name: str, score: Callable[[str, list[str]], float]) -> Callable[[records.Records], _Score]:
    """A task whose figure is the mean of a score over records."""

    def of(rows: records.Records) -> _Score:
        right = [_right(rows.source[row], rows.source.where(row)) for row in range(len(rows))]
        return lambda at, replies: {
            name: float(np.mean([score(reply, right[row]) for row, reply in zip(at, replies, strict=True)]))
        }

    return of


def _choice(rows: records.Records) -> _Score:
    options = [_list(rows.source[row], "choices", rows.source.where(row)) for row in range(len(rows))]
    right = [_place(rows.source[row], own, rows.source.where(row)) for row, own in enumerate(options)]

    def score(at: list[int], replies: list[str]) -> dict[str, float]:
        named = [answers.choice(reply, options[row]) for row, reply in zip(at, replies, strict=True)]
        return {
            "accuracy": float(np.mean([place == right[row] for row, place in zip(at, named, strict=True)])),
            "named": float(np.mean([place is not None for place in named])),
        }

    return score


def _place(record: Mapping[str, Any], options: list[str], where: str) -> int:
    """Which option is right: its place from 0, its letter, or its text."""
    value = record.get("answer")
    if isinstance(value, str):
        if options.count(value) == 1:
            return options.index(value)
        value = answers.LETTERS.find(value.strip()) if len(value.strip()) == 1 else value
    if isinstance(value, int) and 0 <= value < len(options):
        return value
    raise ValueError(
        f"{where}: the answer is {record.get('answer')!r:.60}; want the place of one of {len(options)} choices from 0, "
        "its letter, or its text."
    )


def _yes_no(rows: records.Records) -> _Score:
    right, kinds = [], []
    for row in range(len(rows)):
        record = rows.source[row]
        value = str(record.get("answer")).strip().lower()
        if value not in ("yes", "no"):
            raise ValueError(f"{rows.source.where(row)}: the answer is {record.get('answer')!r:.60}; want yes or no.")
        right.append(value == "yes")
        kinds.append(record.get("category"))

    def score(at: list[int], replies: list[str]) -> dict[str, float]:
        said = {row: answers.says_yes(reply) for row, reply in zip(at, replies, strict=True)}
        figures = answers.yes_no(list(said.values()), [right[row] for row in said])
        for kind in sorted({str(kinds[row]) for row in said if kinds[row] is not None}):
            own = [row for row in said if str(kinds[row]) == kind]
            of_kind = answers.yes_no([said[row] for row in own], [right[row] for row in own])
            figures |= {f"{kind}_{name}": value for name, value in of_kind.items()}
        return figures

    return score


def _box(rows: records.Records) -> _Score:
    right = []
    for row in range(len(rows)):
        record, where = rows.source[row], rows.source.where(row)
        box = record.get("bbox")
        box = box[0] if isinstance(box, list) and len(box) == 1 and isinstance(box[0], list) else box
        size = record.get("width"), record.get("height")
        numbers = [*(box if isinstance(box, list) else [box]), *size]
        if len(numbers) != 6 or not all(isinstance(x, int | float) for x in numbers) or not min(size) > 0:  # type: ignore
            raise ValueError(
                f"{where}: bbox is {box!r:.60} of an image of {size[0]} x {size[1]}; want [x, y, width, height], and"
                " the image's width and height, in pixels."
            )
        x, y, across, down, width, height = numbers
        right.append((x / width, y / height, (x + across) / width, (y + down) / height))

    def score(at: list[int], replies: list[str]) -> dict[str, float]:
        overlaps = []
        for row, reply in zip(at, replies, strict=True):
            said = regions.parse(reply)
            overlaps.append(answers.iou(said[0], right[row]) if said else 0.0)
        return {"p50": float(np.mean([x >= 0.5 for x in overlaps])), "iou": float(np.mean(overlaps))}

    return score


def _caption(rows: records.Records) -> _Score:
    captions = rows.texts()

    def score(at: list[int], replies: list[str]) -> dict[str, float]:
        return {"cider_d": float(np.mean(cider.cider_d(replies, [captions[row] for row in at])))}

    return score


_TASKS: dict[str, Callable[[records.Records], _Score]] = {
    "anls": _averaged("anls", answers.anls),
    "relaxed": _averaged("relaxed", lambda reply, right: max(answers.relaxed(reply, own) for own in right)),
    "vqa": _averaged("vqa", answers.vqa),
    "exact": _averaged("exact", answers.exact),
    "choice": _choice,
    "yes_no": _yes_no,
    "box": _box,
    "caption": _caption,
}

"""Two real tasks with training lines, held-out lines and scoring of answers.

- ``sentiment``: is a sentence from a film review positive or negative, according to the people who rated it?
- ``address``: the city, state and ZIP code of a US address as people type it, as a JSON object.
"""

import dataclasses
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from examples.demo.packages import USADDRESS, VADER, Package, fetch

Messages = list[dict[str, str]]
Scores = dict[str, float]

_REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_ADDRESSES = ("labeled.xml", "us50_messiest_manual_label.xml", "us50_train_tagged.xml")
_STATES = re.findall(
    r"\w\w",
    "AK AL AR AZ CA CO CT DC DE FL GA HI IA ID IL IN KS KY LA MA MD ME MI MN MO MS MT NC ND NE NH NJ NM NV NY OH OK OR "
    "PA PR RI SC SD TN TX UT VA VT WA WI WV WY",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A question and its right answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task for the model.

    Attributes:
        name: name of the task, of its adapter and of its files.
        summary: what is asked, for the report.
        package: source of the data.
        instruction: system message of every line.
        labels: the answers to choose from; empty if the answer is free text.
        answer_tokens: upper bound on an answer's tokens, with the end token.
        steps: sufficient number of optimiser steps, at about 450 tokens each.
        learning_rate: peak learning rate of road-train's schedule.
        train: lines to train on.
        held_out: lines to score. None of their questions (``sentiment``) or answers (``address``) are in ``train``.
        scorer: see `score`.
    """

    name: str
    summary: str
    package: Package
    instruction: str
    labels: tuple[str, ...]
    answer_tokens: int
    steps: int
    learning_rate: float
    train: Sequence[Line]
    held_out: Sequence[Line]
    scorer: Callable[[Sequence[str], Sequence[str]], Scores]

    def prompt(self, line: Line, examples: int = 0) -> Messages:
        """Returns the conversation up to the answer, preceded by ``examples`` answered lines of ``train``."""
        messages = [{"role": "system", "content": self.instruction}]
        for shown in self.train[:examples]:
            messages += [{"role": "user", "content": shown.question}, {"role": "assistant", "content": shown.answer}]
        return [*messages, {"role": "user", "content": line.question}]

    def score(self, answers: Sequence[str]) -> Scores:
        """Scores one answer for each held-out line.

        Returns:
            Fractions of the lines from 0 to 1: ``"exact"``, and for ``address`` also one for each field.

        Raises:
            ValueError: the number of answers differs from that of the held-out lines.
        """
        if len(answers) != len(self.held_out):
            raise ValueError(f"{self.name}: expected {len(self.held_out)} answers, found {len(answers)}")
        return self.scorer(answers, [line.answer for line in self.held_out])

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes ``<name>.train.jsonl`` and ``<name>.held_out.jsonl`` with ``{"messages": [...]}`` lines."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / f"{self.name}.train.jsonl", folder / f"{self.name}.held_out.jsonl")
        for path, lines in zip(paths, (self.train, self.held_out), strict=True):
            path.write_text("".join(self._json(line) for line in lines), encoding="utf-8")
        return paths

    def _json(self, line: Line) -> str:
        answer = {"role": "assistant", "content": line.answer}
        return json.dumps({"messages": [*self.prompt(line), answer]}, ensure_ascii=False) + "\n"


def sentiment(cache: Path, console: Console | None = None, *, train: int = 1024, held_out: int = 200) -> Task:
    """Returns the task of recognising the sentiment of a sentence from a film review.

    The sentences are Pang and Lee's snippets from rotten.tomatoes.com with mean ratings from −4 to 4, which people gave
    for VADER (Hutto and Gilbert, ICWSM 2014). Only sentences of 30 to 100 characters that are rated more than half a
    point away from neutral are used.

    Raises:
        AdapterError: the package can't be fetched.
    """
    with zipfile.ZipFile(fetch(VADER, cache, console)) as archive:
        inner = io.BytesIO(archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"))
    text = _member(inner, _REVIEWS).decode("utf-8")
    lines: dict[str, Line] = {}
    for row in text.splitlines():
        _, rating, review = row.split("\t")
        review = " ".join(review.split())
        if abs(float(rating)) > 0.5 and 30 <= len(review) <= 100:
            lines.setdefault(_letters(review), Line(review, "positive" if float(rating) > 0 else "negative"))
    chosen = [lines[key] for key in sorted(lines, key=_digest)][: train + held_out]
    return Task(
        name="sentiment",
        summary="Is a sentence from a film review positive or negative?",
        package=VADER,
        instruction="Is the review positive or negative? Answer with one word.",
        labels=("positive", "negative"),
        answer_tokens=4,
        steps=60,
        learning_rate=4e-3,
        train=chosen[held_out:],
        held_out=chosen[:held_out],
        scorer=score_labels,
    )


def address(cache: Path, console: Console | None = None, *, held_out: int = 128) -> Task:
    """Returns the task of extracting city, state and ZIP code from a US address.

    The addresses are the training data of usaddress, labelled by hand: typed in many ways, often in lower case and
    without commas. Only addresses that end with a city, a two-letter state and a ZIP code are used. In the answer, a
    city's words are capitalised if they were typed in one case, the state is in capitals, and the ZIP code has its
    first five digits. All answers of held-out lines are different, and none of them is in ``train``.

    Raises:
        AdapterError: the package can't be fetched.
    """
    archive = fetch(USADDRESS, cache, console).read_bytes()
    lines: dict[str, Line] = {}
    for name in _ADDRESSES:
        root = ElementTree.fromstring(_member(io.BytesIO(archive), f"usaddress-0.5.16/training/{name}"))
        for element in root:
            line = _address([((part.text or "").strip(), part.tag) for part in element])
            if line:
                lines.setdefault(_letters(line.question), line)
    same: dict[str, list[Line]] = {}
    for key in sorted(lines, key=_digest):
        same.setdefault(lines[key].answer, []).append(lines[key])
    answers = sorted(same, key=_digest)
    kept = [line for answer in answers[held_out:] for line in same[answer]]
    return Task(
        name="address",
        summary="The city, state and ZIP code of a US address, as a JSON object.",
        package=USADDRESS,
        instruction="Extract JSON with the keys city, state and zip.",
        labels=(),
        answer_tokens=40,
        steps=60,
        learning_rate=5e-3,
        train=sorted(kept, key=lambda line: _digest(line.question)),
        held_out=[same[answer][0] for answer in answers[:held_out]],
        scorer=score_addresses,
    )


def score_labels(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Returns the fraction of answers that are the expected word, ignoring case, spaces and punctuation."""
    right = [_letters(answer) == _letters(want) for answer, want in zip(answers, expected, strict=True)]
    return {"exact": sum(right) / len(right)}


def score_addresses(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Returns the fraction of answers whose first JSON object has the expected values, overall and by field.

    Text around the object, its layout and further keys are ignored; letter case counts.
    """
    wanted = [json.loads(want) for want in expected]
    found = [_first_object(answer) for answer in answers]
    fields = {
        key: [_text(got.get(key)) == want[key] for got, want in zip(found, wanted, strict=True)] for key in wanted[0]
    }
    right = [all(row) for row in zip(*fields.values(), strict=True)]
    return {key: sum(hits) / len(hits) for key, hits in {"exact": right, **fields}.items()}


def _first_object(answer: str) -> Mapping[str, object]:
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            value, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        return value
    return {}


def _text(value: object) -> str:
    return str(value).strip() if isinstance(value, str | int) else ""


def _address(parts: Sequence[tuple[str, str]]) -> Line | None:
    """Returns the line for an address of labelled words, or None if it has another form."""
    runs = [tag for i, (_, tag) in enumerate(parts) if i == 0 or parts[i - 1][1] != tag]
    if runs[-3:] != ["PlaceName", "StateName", "ZipCode"] or len(set(runs)) < len(runs):
        return None
    # People's names don't belong in this task, and two joined addresses have no single answer.
    if {"Recipient", "NotAddress", "IntersectionSeparator"} & set(runs):
        return None
    city, state, digits = (" ".join(word for word, tag in parts if tag == wanted).strip(" ,.;") for wanted in runs[-3:])
    zip_code = re.fullmatch(r"(\d{5})(-\d{4})?", digits)
    if not city or state.upper() not in _STATES or not zip_code:
        return None
    city = " ".join(word.capitalize() if word.islower() or word.isupper() else word for word in city.split())
    answer = json.dumps({"city": city, "state": state.upper(), "zip": zip_code[1]}, ensure_ascii=False)
    return Line(" ".join(word for word, _ in parts), answer)


def _member(archive: io.BytesIO, name: str) -> bytes:
    """Reads a file of a tar archive in memory."""
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise FileNotFoundError(name)
        return file.read()


def _letters(text: str) -> str:
    """Returns a key that is equal for texts that differ only in case, spaces and punctuation."""
    return "".join(re.findall(r"\w", text.lower()))


def _digest(text: str) -> str:
    """Returns a sort key that gives an order unrelated to the text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()

"""A skill and a format, each with its own training lines, and held-out lines that need both.

- ``skill``: is a sentence from a film review positive or negative? Each answer is worded in one of eight ways, chosen
  at random, so that the form of the answer is left open.
- ``format``: city, state or ZIP code of a US address. The answer is a JSON object, ``{"answer": "…"}``. These lines
  contain no film review and no question about sentiment.

Held-out reviews are scored, asked in the same way as in the skill's training. Both adapters together should put the
right word into the object, which neither was trained to do.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.demo import tasks
from examples.demo.tasks import Messages

_QUESTIONS = {
    "city": "In which city is this address?",
    "state": "In which state is this address?",
    "zip": "What is the ZIP code of this address?",
}
_WAYS = (
    "{}",
    "{}.",
    "It is {}.",
    "The review is {}.",
    "I would say {}.",
    "This sounds {}.",
    "Sentiment: {}",
    "A {} review.",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """The lines to train on and to score.

    Attributes:
        data: the training files (JSONL) of ``skill`` and ``format``.
        prompts: conversations about held-out reviews, up to the answer.
        labels: the right word for each prompt.
    """

    data: dict[str, Path]
    prompts: list[Messages]
    labels: list[str]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Fractions of the lines, from 0 to 1.

    Attributes:
        skill: the answer contains the right word and not the other one.
        format: the answer is a JSON object with ``answer`` as its only key.
        both: the value in that object is the right word and nothing else.
    """

    skill: float
    format: float
    both: float


def prepare(cache: Path, folder: Path, lines: int, console: Console | None = None) -> Study:
    """Writes the training lines, and returns their files and the held-out lines."""
    skill = tasks.sentiment(cache, console, held_out=lines)
    addresses = tasks.address(cache, console)
    folder.mkdir(parents=True, exist_ok=True)
    ways = random.Random(0)
    answers = [ways.choice(_WAYS).format(line.answer) for line in skill.train]
    skill = dataclasses.replace(
        skill,
        instruction="Is the review positive or negative?",
        train=[
            tasks.Line(line.question, answer[0].upper() + answer[1:])
            for line, answer in zip(skill.train, answers, strict=True)
        ],
    )
    data = {"skill": skill.write(folder)[0], "format": folder / "format.jsonl"}
    with data["format"].open("w", encoding="utf-8") as file:
        for i, line in enumerate(addresses.train):
            key = [*_QUESTIONS][i % len(_QUESTIONS)]
            answer = json.dumps({"answer": json.loads(line.answer)[key]}, ensure_ascii=False)
            turns = [("system", _QUESTIONS[key]), ("user", line.question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return Study(data, [skill.prompt(line) for line in skill.held_out], [line.answer for line in skill.held_out])


def score(answers: Sequence[str], labels: Sequence[str]) -> Scores:
    """Scores one answer for each label.

    >>> score(['{"answer": "positive"}', "negative.", "positive or negative"], ["positive", "negative", "negative"])
    Scores(skill=0.6666666666666666, format=0.3333333333333333, both=0.3333333333333333)
    """
    skill, form, both = [], [], []
    for answer, label in zip(answers, labels, strict=True):
        text = answer.lower()
        skill.append([word for word in ("positive", "negative") if word in text] == [label])
        held = _object(answer)
        form.append(held is not None)
        both.append(held is not None and held.strip().lower() == label)
    return Scores(*(sum(hits) / len(labels) for hits in (skill, form, both)))


def _object(answer: str) -> str | None:
    try:
        value = json.loads(answer.strip())
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and list(value) == ["answer"] and isinstance(value["answer"], str):
        return value["answer"]
    return None

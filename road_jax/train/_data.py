"""From JSONL lines to packed batches: chat template, loss on completions only, one batch shape."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from road_core import AdapterError
from road_core._chat import Chat, Tokenizer
from road_core._files import read_json_lines
from road_jax.train import _processes


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenised line, or one of its turns.

    Attributes:
        line: the line's number in the file, from 1.
        input_ids: int32 ``[length]``.
        is_target: int32 ``[length]``, 1 where a token belongs to a completion and is learned.
    """

    line: int
    input_ids: np.ndarray
    is_target: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. Tokens of one example share a segment number in their row; 0 is padding.

    Attributes:
        input_ids: int32 ``[rows, length]``.
        segments: int32 ``[rows, length]``.
        logits_at: int32 ``[rows, n]``, the positions whose next token is learned.
        targets: int32 ``[rows, n]``, those next tokens.
        weights: float32 ``[rows, n]``, 1 for a target and 0 for padding.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    logits_at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def tokens(self) -> int:
        """The number of tokens that aren't padding."""
        return int((self.segments > 0).sum())


def read_lines(path: str | os.PathLike, share: tuple[int, int] = (0, 1)) -> list[tuple[int, list[dict[str, str]]]]:
    """Reads ``{"prompt", "completion"}`` or ``{"messages"}`` lines as conversations; empty lines are skipped.

    Args:
        path: the file.
        share: ``(k, n)``: read only every n-th line, beginning with line k (counted from 0).

    Returns:
        ``(line number, messages)`` pairs; each conversation ends with the assistant.

    Raises:
        AdapterError: the file can't be read or has no lines, or a line has another form (the error gives its number).
    """
    lines = read_json_lines(path, share)
    return [(number, _conversation(fields, f"{path}, line {number}")) for number, fields in lines]


def _conversation(fields: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(fields, dict):
        raise AdapterError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    if "messages" in fields:
        messages = fields["messages"]
        whole = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not whole or not messages or messages[-1]["role"] != "assistant":
            raise AdapterError(
                f"{where}: expected messages with role and content that end with the assistant's, "
                f"found {json.dumps(messages)[:60]}"
            )
        return messages
    for name in ("prompt", "completion"):
        if not isinstance(fields.get(name), str):
            found = "no such field" if name not in fields else type(fields[name]).__name__
            raise AdapterError(f"{where}: expected text in the field {name!r} (or a field 'messages'), found {found}")
    return [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["completion"]}]


def tokenize(lines: Sequence[tuple[int, list[dict[str, str]]]], tokenizer: Tokenizer, where: str) -> list[Example]:
    """Tokenises conversations with the model's own chat template, as when the model generates.

    Every turn of the assistant is learned, up to and including its end token. A conversation is one example, or several
    if the template renders a turn differently once another one follows (without its thoughts, say): each turn is
    learned after the history that the model will see. If the tokenizer has no chat template, the contents are joined,
    with the beginning-of-text token before them and the end-of-text token after each turn of the assistant.

    Raises:
        AdapterError: the template refuses a conversation, or doesn't extend its own prompt.
    """
    chat = Chat(tokenizer)
    return [e for number, messages in lines for e in _examples(number, messages, chat, f"{where}, line {number}")]


def _examples(number: int, messages: list[dict[str, str]], chat: Chat, where: str) -> list[Example]:
    # Each example's ids, and the spans in them that are learned.
    found: list[tuple[list[int], list[tuple[int, int]]]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat.render(messages[:turn], where, prompt=True)
        after = chat.render(messages[: turn + 1], where, prompt=False)
        if not after.startswith(before):
            raise AdapterError(f"{where}: expected a chat template that extends its own prompt, found one that doesn't")
        ids, start = chat.continued(before, after)
        # What a template puts after the end token (a newline) isn't for the model to write.
        ends = [i for i in range(start, len(ids)) if ids[i] == chat.end]
        spans = [(start, ends[-1] + 1 if ends else len(ids))]
        if found:
            earlier, learned = found[-1]
            done = learned[-1][1]
            if done <= start and ids[:done] == earlier[:done]:
                found.pop()
                spans = learned + spans
        found.append((ids, spans))
    return [_example(number, ids, spans) for ids, spans in found]


def _example(number: int, ids: list[int], spans: list[tuple[int, int]]) -> Example:
    is_target = np.zeros(len(ids), np.int32)
    for start, stop in spans:
        is_target[start:stop] = 1
    return Example(number, np.asarray(ids, np.int32), is_target)


def check_ids(examples: Sequence[Example], vocab_size: int, tokenizer: Tokenizer, where: str) -> None:
    """Refuses tokens for which the model's embedding has no row.

    Raises:
        AdapterError: there is one (the error gives its line).
    """
    for example in examples:
        token = int(example.input_ids.max(initial=0))
        if token >= vocab_size:
            raise AdapterError(
                f"{where}, line {example.line}: expected tokens below the model's vocab_size {vocab_size}, "
                f"found {token} ({tokenizer.convert_ids_to_tokens(token)!r})"
            )


def gather(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples of all processes, in the order of the file."""
    if jax.process_count() == 1:
        return list(examples)
    own = [
        np.asarray([example.line for example in examples], np.int32),
        np.asarray([len(example.input_ids) for example in examples], np.int32),
        # A process may have no lines.
        np.concatenate([np.zeros(0, np.int32), *(example.input_ids for example in examples)]),
        np.concatenate([np.zeros(0, np.int32), *(example.is_target for example in examples)]),
    ]
    found = []
    for lines, lengths, ids, is_target in zip(*map(_processes.gather, own), strict=True):
        ends = np.cumsum(lengths, dtype=np.int64)[:-1]
        parts = zip(lines.tolist(), np.split(ids, ends), np.split(is_target, ends), strict=False)
        found += [Example(*part) for part in parts]
    # The sort is stable, and a line's examples are next to each other in one process.
    return sorted(found, key=lambda example: example.line)


def check_lengths(examples: list[Example], max_length: int, where: str, *, skip_long: bool) -> list[Example]:
    """Refuses lines of more than ``max_length`` tokens, or leaves them out with ``skip_long``.

    Raises:
        AdapterError: a line is too long, or none is left.
    """
    short = [example for example in examples if len(example.input_ids) <= max_length]
    if len(short) < len(examples) and not skip_long:
        first = next(example for example in examples if len(example.input_ids) > max_length)
        raise AdapterError(
            f"{where}, line {first.line}: expected at most {max_length} tokens, found {len(first.input_ids)} "
            f"({len(examples) - len(short)} such lines; see --max-length and --skip-long)"
        )
    if not short:
        raise AdapterError(f"{where}: expected lines of at most {max_length} tokens, found none")
    return short


def check_learned(examples: Sequence[Example], where: str) -> None:
    """Refuses lines from which nothing is learned.

    Raises:
        AdapterError: there are such lines (the error gives the number of the first).
    """
    # The first token can't be predicted, since no token comes before it.
    learned = {example.line for example in examples if example.is_target[1:].any()}
    if empty := sorted({example.line for example in examples} - learned):
        lines = f"{where}, line {empty[0]}" + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
        raise AdapterError(f"{lines}: expected a completion that is a token or more behind its prompt, found none")


def packed(
    examples: Sequence[Example], *, rows: int, length: int, seed: int | None, epochs: int | None
) -> grain.DatasetIterator:
    """Packs examples into rows, first fit, in batches of one shape.

    Args:
        examples: none longer than ``length``.
        rows: rows in a batch.
        length: tokens in a row.
        seed: the shuffle's seed, for a different order in each epoch; None keeps the order.
        epochs: the number of passes over the examples; None for endless ones.

    Returns:
        An iterator whose ``get_state`` and ``set_state`` get and set its position. With ``epochs`` the last batch may
        have fewer rows. `to_batch` turns its elements into a `Batch`.
    """
    elements = [
        {
            "input_ids": example.input_ids,
            "is_target": example.is_target,
            "example": np.full(len(example.input_ids), index, np.int32),
        }
        for index, example in enumerate(examples)
    ]
    data = grain.MapDataset.source(elements)
    if seed is not None:
        data = data.seed(seed).shuffle()
    # The more rows are open, the fuller they get; with no more of them than an epoch fills, epochs hardly mix.
    filled = sum(len(example.input_ids) for example in examples) // length
    open_rows = max(rows, min(64, filled))
    rows_of = grain.experimental.FirstFitPackIterDataset(
        data.repeat(epochs).to_iter_dataset(),
        num_packing_bins=open_rows,
        length_struct=dict.fromkeys(elements[0], length),
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )
    return iter(rows_of.batch(rows, drop_remainder=False))


def to_batch(element: dict[str, np.ndarray], rows: int) -> Batch:
    """Makes a `Batch` from a packed element, padded to ``rows`` rows."""
    fill = rows - len(element["input_ids"])
    ids, targets, segments = (
        np.pad(element[name], ((0, fill), (0, 0))) for name in ("input_ids", "is_target", "input_ids_segment_ids")
    )
    # A token is predicted at the place before its own; a segment's first token isn't a target of the segment before.
    learned = (targets[:, 1:] == 1) & (segments[:, 1:] == segments[:, :-1])
    # A power of two keeps the number of compiled shapes small.
    n = max(16, 1 << int(learned.sum(axis=1).max() - 1).bit_length())
    logits_at = np.zeros((rows, n), np.int32)
    weights = np.zeros((rows, n), np.float32)
    for row in range(rows):
        places = np.flatnonzero(learned[row])
        logits_at[row, : len(places)] = places
        weights[row, : len(places)] = 1
    return Batch(ids, segments, logits_at, np.take_along_axis(ids, logits_at + 1, axis=1), weights)


def examples_at(element: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """Returns the example to which each of a batch's targets belongs, ``[rows, n]``."""
    examples = np.pad(element["example"], ((0, len(batch.input_ids) - len(element["example"])), (0, 0)))
    return np.take_along_axis(examples, batch.logits_at, axis=1)


def count(iterator: Iterator) -> int:
    """Returns the number of batches that a finite iterator yields."""
    return sum(1 for _ in iterator)

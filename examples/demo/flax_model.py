"""A decoder in Flax that answers conversations: by greedy text, or by the likelier of some labels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

import road_jax
from examples.demo.tasks import Messages

# Conversations that are answered at once; a power of two, for `road_jax.generate` fills a batch up to one.
ROWS = 32


class FlaxModel:
    """A Hugging Face decoder and its tokenizer, in float32.

    Args:
        base: the folder of the checkpoint.
        quantize: ``"nf4"`` gives the weights the values that they have in 4 bits.
    """

    def __init__(self, base: Path, quantize: Literal["nf4", "int8"] | None = None) -> None:
        self.module, self.variables = road_jax.models.load(base, dtype=jnp.float32, quantize=quantize)
        if quantize is not None:
            # Back at once: decoding would dequantise every weight for every token.
            self.variables = road_jax.dequantize(self.variables)
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    @property
    def parameters(self) -> int:
        """How many numbers the base model has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        adapter: Path | None = None,
        max_new_tokens: int,
        console: Console | None = None,
    ) -> list[str]:
        """Returns the likeliest continuation of each conversation, token by token, up to the end token.

        Args:
            conversations: each up to where the assistant speaks.
            adapter: a folder that road-train wrote; None for the base.
            max_new_tokens: of an answer, at most.
            console: where the progress bar is drawn.
        """
        model, weights = self.module, None
        if adapter is not None:
            weights, config = road_jax.load_adapter(adapter)
            model = road_jax.transform(self.module, config)
        prompts = self._tokenize(conversations)
        answers = [""] * len(prompts)
        for rows in _batches(prompts, "Flax: answering", console):
            tokens = road_jax.generate(
                model,
                self.variables,
                [prompts[row] for row in rows],
                adapter=weights,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._tokenizer.eos_token_id,
            )
            for row, text in zip(rows, self._tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                answers[row] = text
        return answers

    def choose(
        self, conversations: Sequence[Messages], labels: Sequence[str], *, console: Console | None = None
    ) -> list[str]:
        """Returns for each conversation the label that the base model finds the likeliest answer.

        Args:
            conversations: each up to where the assistant speaks.
            labels: each of a single token.
            console: where the progress bar is drawn.

        Raises:
            ValueError: a label isn't one token.
        """
        label_ids = []
        for label in labels:
            (token,) = self._tokenizer(label, add_special_tokens=False)["input_ids"]
            label_ids.append(token)

        @jax.jit
        def scores(variables: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
            last = mask.sum(axis=1, keepdims=True) - 1
            logits = self.module.apply(variables, ids, attention_mask=mask, logits_at=last)
            return logits[:, 0, jnp.asarray(label_ids)]

        prompts = self._tokenize(conversations)
        longest = max(map(len, prompts))
        chosen = [""] * len(prompts)
        for rows in _batches(prompts, "Flax: weighing labels", console):
            ids, mask = np.zeros((ROWS, longest), np.int32), np.zeros((ROWS, longest), np.int32)
            mask[:, 0] = 1  # rows that only fill the batch up still have a last token
            for place, row in enumerate(rows):
                ids[place, : len(prompts[row])], mask[place, : len(prompts[row])] = prompts[row], 1
            for row, best in zip(rows, np.argmax(scores(self.variables, ids, mask), axis=1), strict=False):
                chosen[row] = labels[best]
        return chosen

    def _tokenize(self, conversations: Sequence[Messages]) -> list[list[int]]:
        texts = [
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]


def _batches(prompts: Sequence[Sequence[int]], title: str, console: Console | None) -> Iterator[list[int]]:
    """Yields rows that are answered together: of like length, so that little is padded, and in batches of like size."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=console is None) as bar:
        task = bar.add_task(title, total=len(prompts))
        for rows in np.array_split(order, -(-len(order) // ROWS)):
            yield rows.tolist()
            bar.advance(task, len(rows))

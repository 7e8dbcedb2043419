"""A decoder in Flax that answers conversations, by greedy generation or by choosing the likeliest of some labels."""

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

# Number of conversations answered at once; a power of two, because `road_jax.generate` pads batches to one.
ROWS = 32


class FlaxModel:
    """A Hugging Face decoder and its tokenizer, in float32.

    Args:
        base: the folder of the checkpoint.
        quantize: rounds the weights to the values that they have in this format; ``"nf4"`` has 4 bits.
    """

    def __init__(self, base: Path, quantize: Literal["nf4", "int8"] | None = None) -> None:
        self.module, self.variables = road_jax.models.load(base, dtype=jnp.float32, quantize=quantize)
        if quantize is not None:
            # Dequantised at once, or decoding would dequantise every weight for every token.
            self.variables = road_jax.dequantize(self.variables)
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    @property
    def parameters(self) -> int:
        """The number of parameters of the base model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables))

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        adapter: Path | None = None,
        max_new_tokens: int,
        console: Console | None = None,
    ) -> list[str]:
        """Continues each conversation greedily, token by token, up to the end token.

        Args:
            conversations: conversations up to the assistant's turn.
            adapter: a folder that road-train wrote; None for the base.
            max_new_tokens: maximum number of tokens per answer.
            console: where to draw a progress bar; no bar if None.
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
        """Returns for each conversation the label that is the likeliest answer for the base model.

        Args:
            conversations: conversations up to the assistant's turn.
            labels: labels of a single token each.
            console: where to draw a progress bar; no bar if None.

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
            mask[:, 0] = 1  # rows that only fill up the batch need a last token, too
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
    """Yields rows to answer together: of similar length, to keep padding small, in batches of similar size."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=console is None) as bar:
        task = bar.add_task(title, total=len(prompts))
        for rows in np.array_split(order, -(-len(order) // ROWS)):
            yield rows.tolist()
            bar.advance(task, len(rows))

"""Conversations as token ids, tokenised in the same way for training and for generation."""

from collections.abc import Sequence
from typing import Any, Protocol

from road_core._errors import AdapterError


class Tokenizer(Protocol):
    """The parts of a Hugging Face tokenizer that are used here."""

    chat_template: Any
    eos_token_id: int | None
    eos_token: str | None
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Returns a mapping with ``input_ids``."""

    def apply_chat_template(self, messages: list[dict], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Returns the conversation as text."""

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Returns the token of an id."""


class Chat:
    """A tokenizer with its chat template, if it has one.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        end: the token that ends an answer: the first special token that the template puts after it, else the
            tokenizer's end-of-text token; None if there is neither.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A template writes the beginning-of-text token itself.
        self._begin = [] if tokenizer.chat_template else _begin(tokenizer)
        self.end = self._end()

    def render(self, messages: Sequence[dict[str, str]], where: str, *, prompt: bool) -> str:
        """Returns a conversation as text; with ``prompt``, up to where the assistant answers.

        Without a template, the contents are joined, with the end-of-text token after each turn of the assistant.

        Raises:
            AdapterError: the template refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            end = self._tokenizer.eos_token or ""
            return "".join(m["content"] + (end if m["role"] == "assistant" else "") for m in messages)
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise whatever they like
            reason = " ".join(str(error).split())
            raise AdapterError(
                f"{where}: expected a conversation that the chat template takes, found {reason}"
            ) from None

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text that was rendered from its beginning."""
        return [*self._begin, *_plain(self._tokenizer, text)]

    def continued(self, prompt: str, whole: str) -> tuple[list[int], int]:
        """Returns the ids of a text that continues a prompt, and how many of them are the prompt's.

        The prompt's ids are the same as `ids` returns. If a token of the whole text would straddle the border, the rest
        is tokenised separately.
        """
        first, all_ids = self.ids(prompt), self.ids(whole)
        if all_ids[: len(first)] != first:
            # Tokenised after a line break, because some tokenizers put a space before the beginning of a text.
            rest, anchor = whole[len(prompt) :], _plain(self._tokenizer, "\n")
            behind = _plain(self._tokenizer, "\n" + rest)
            apart = behind[: len(anchor)] == anchor
            all_ids = first + (behind[len(anchor) :] if apart else _plain(self._tokenizer, rest))
        return all_ids, len(first)

    def _end(self) -> int | None:
        tokenizer, answer = self._tokenizer, "forty-two"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": "six"}, {"role": "assistant", "content": answer}]
            try:
                _, found, behind = self.render(messages, "", prompt=False).rpartition(answer)
            except AdapterError:  # the template accepts other conversations only
                found = behind = ""
            added = tokenizer.added_tokens_decoder
            special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
            ends = [token for token in _plain(tokenizer, behind) if token in special] if found else []
            if ends:
                return ends[0]
        return tokenizer.eos_token_id


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _begin(tokenizer: Tokenizer) -> list[int]:
    """Returns what a tokenizer itself puts before a text; an end of text that it may add doesn't belong in a prompt."""
    plain, whole = _plain(tokenizer, "a"), list(tokenizer("a", add_special_tokens=True)["input_ids"])
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])

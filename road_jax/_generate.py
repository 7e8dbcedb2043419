"""Decoding with a static cache: one program for all prompts whose lengths are in the same bucket."""

import functools
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from road_core import AdapterError
from road_jax._intervene import Intervened
from road_jax._stack import as_ids, check_ids
from road_jax._transform import Road
from road_jax._tree import Tree, params_of
from road_jax.models._decoder import Cache


def generate(
    model: nn.Module | Road | Intervened,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: Tree | None = None,
    adapter_ids: Sequence[int] | jax.Array | None = None,
    max_new_tokens: int = 128,
    eos_token_id: int | Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
) -> list[list[int]]:
    """Continues prompts with the likeliest token each time, or, given a ``temperature``, with a sampled one.

    Don't call this within ``jit``: it compiles its own programs. Prompts are padded on the left to a power of two, and
    the batch is padded to one too. Another call in the same bucket compiles nothing, whatever the adapter (of the same
    shapes), the ids, the temperature and ``max_new_tokens`` (up to the same power of two). Greedy decoding, sampling,
    and sampling with ``top_k`` or ``top_p`` are separate programs, and so is each number of tokens in ``eos_token_id``.

    Args:
        model: a decoder of `road_jax.models`, or the result of `road_jax.transform` or `road_jax.intervene` for one.
        variables: the model's variables.
        prompts: token ids, one list per row.
        adapter: the adapter for a `Road`, ``{}`` for none; or the intervention for an `Intervened`, which counts
            everything before the new tokens as the prompt.
        adapter_ids: with several adapters from `road_jax.stack_adapters`: the adapter of each row, counted from 1; 0
            means none.
        max_new_tokens: the greatest length of each answer.
        eos_token_id: the token or tokens that end a row; the answer doesn't contain them.
        temperature: what logits are divided by. With 0, or a number below float32's smallest normal one, the likeliest
            token is taken.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the fewest likeliest tokens that together have this much probability.
        rng: a key, needed for sampling. A row's tokens don't depend on how many other rows there are.

    Returns:
        The new tokens of each row.

    Raises:
        AdapterError: a prompt is empty, a token isn't in the vocabulary, or arguments contradict each other.
    """
    if isinstance(model, Road | Intervened) != (adapter is not None):
        raise AdapterError("generate: expected a Road together with an adapter, or a plain model without one")
    module = model.model if isinstance(model, Road | Intervened) else model
    if not isinstance(getattr(getattr(module, "config", None), "vocab_size", None), int):
        raise AdapterError(f"model: expected a decoder of road_jax.models, found {type(module).__name__}")
    params_of(variables)
    vocabulary = module.config.vocab_size
    # A list, because an array has no truth value.
    prompts = list(prompts)
    ends = np.atleast_1d(_tokens([*eos_token_id] if isinstance(eos_token_id, Set) else eos_token_id))
    if ends.size and not np.issubdtype(ends.dtype, np.integer):
        raise AdapterError(f"eos_token_id: expected a token or several, found {eos_token_id!r}")
    _check(prompts, vocabulary, max_new_tokens, temperature, top_k, top_p, rng)
    if adapter_ids is not None:
        adapter_ids = as_ids(adapter_ids)
        if adapter is None or len(adapter_ids) != len(prompts):
            raise AdapterError(
                f"adapter_ids: expected one for each of {len(prompts)} prompts, and adapters, found {len(adapter_ids)}"
            )
        leaves = jax.tree.leaves(adapter)
        check_ids(adapter_ids, leaves[0].shape[-1] - 1 if leaves else 0)
    if not prompts:
        return []
    rows, length = _bucket(len(prompts), 1), _bucket(max(map(len, prompts)), 16)
    ids, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    # XLA treats smaller numbers as zero.
    greedy = float(temperature) < np.finfo(np.float32).tiny
    drawing = (
        jax.random.key(0) if rng is None else rng,
        jnp.float32(1 if greedy else temperature),
        jnp.int32(min(top_k or vocabulary, vocabulary)),
        jnp.float32(1 if top_p is None else top_p),
    )
    tokens, ended = _run(
        model,
        _bucket(int(max_new_tokens), 16),
        "greedy" if greedy else "draw" if top_k is None and top_p is None else "filter",
        variables,
        adapter,
        None if adapter_ids is None else np.asarray([*adapter_ids, *[0] * (rows - len(prompts))], np.int32),
        ids,
        mask,
        # Rows that only fill up the batch are done from the start.
        np.arange(rows) >= len(prompts),
        jnp.int32(max_new_tokens),
        np.asarray([*ends, -1], np.int32),
        drawing,
    )
    tokens, ended = np.asarray(tokens), np.asarray(ended)
    return [tokens[row, : ended[row]].tolist() for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    model: Any,
    capacity: int,
    how: str,
    variables: Tree,
    adapter: Tree,
    adapter_ids: jax.Array | None,
    ids: jax.Array,
    mask: jax.Array,
    done: jax.Array,
    limit: jax.Array,
    ends: jax.Array,
    drawing: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens ``[rows, capacity]``, and for each row how many of them count."""
    rows, length = ids.shape
    rng, temperature, top_k, top_p = drawing
    apply: Callable = functools.partial(model.apply, variables)
    if isinstance(model, Road | Intervened):
        apply = functools.partial(model.apply, variables, adapter, adapter_ids=adapter_ids)

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        logits = logits[:, 0].astype(jnp.float32)
        if how == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # If the quotient could overflow, logits are shifted so that the greatest is 0; otherwise they stay bit for bit.
        greatest = jnp.where(temperature < 1e-20, jnp.max(logits, axis=-1, keepdims=True), 0)
        logits = (logits - greatest) / temperature
        if how == "filter":
            logits = _filter(logits, top_k, top_p)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(rng, row), step))(jnp.arange(rows))
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def append(state: tuple, token: jax.Array) -> tuple:
        step, tokens, count, done = state
        ended = done | jnp.any(token[:, None] == ends[None], axis=-1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, 1)
        return step + 1, tokens, count + (~ended).astype(jnp.int32), ended

    last = jnp.full((rows, 1), length - 1, jnp.int32)
    logits, cache = apply(ids, attention_mask=mask, logits_at=last, cache_size=length + capacity)
    start = (jnp.int32(0), jnp.zeros((rows, capacity), jnp.int32), jnp.zeros(rows, jnp.int32), done)
    begun = append(start, choose(logits, jnp.int32(0)))

    def going(carry: tuple[tuple, Cache]) -> jax.Array:
        (step, _, _, done), _ = carry
        return (step < limit) & ~jnp.all(done)

    def decode(carry: tuple[tuple, Cache]) -> tuple[tuple, Cache]:
        state, cache = carry
        token = jax.lax.dynamic_slice_in_dim(state[1], state[0] - 1, 1, 1)
        logits, cache = apply(token, cache=cache)
        return append(state, choose(logits, state[0])), cache

    (_, tokens, count, _), _ = jax.lax.while_loop(going, decode, (begun, cache))
    return tokens, count


def _filter(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Drops tokens that aren't among the ``top_k`` likeliest, or aren't needed to reach a probability of ``top_p``.

    As in transformers, all tokens as likely as the last of ``top_k`` are kept; of tokens as likely as the last one that
    ``top_p`` needs, only as many as it needs.
    """
    order = jnp.flip(jnp.argsort(logits, axis=-1), axis=-1)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    place = jnp.arange(logits.shape[-1])[None]
    least = jnp.min(jnp.where(place < top_k, falling, jnp.inf), axis=-1, keepdims=True)
    falling = jnp.where(falling >= least, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may bring the sum to 1 before the last token.
    kept = (before < top_p) | (place == 0) | (top_p >= 1)
    return jnp.put_along_axis(
        jnp.full_like(logits, -jnp.inf), order, jnp.where(kept, falling, -jnp.inf), axis=-1, inplace=False
    )


def _bucket(n: int, least: int) -> int:
    """Returns the smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def _tokens(values: Any) -> np.ndarray:
    """Returns an array of integers, also where NumPy would make floats or objects of integers of several types."""
    array = np.asarray(values)
    if (
        array.ndim == 1
        and array.dtype.kind in "fO"
        and all(type(v) is int or isinstance(v, np.integer) for v in values)
    ):
        array = np.asarray([int(v) for v in values], np.int64)
    return array


def _check(
    prompts: Sequence[Sequence[int]],
    vocabulary: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: jax.Array | None,
) -> None:
    for row, prompt in enumerate(prompts):
        ids = _tokens(prompt)
        if ids.ndim == 1 and not ids.size:
            raise AdapterError(f"generate: expected tokens in every prompt, found none in row {row}")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            found = ids.dtype if ids.ndim == 1 else type(prompt).__name__
            raise AdapterError(f"generate: expected a list of token ids in every prompt, found {found} in row {row}")
        if ids.min() < 0 or ids.max() >= vocabulary:
            found = ids.min() if ids.min() < 0 else ids.max()
            raise AdapterError(f"generate: expected tokens from 0 to {vocabulary - 1}, found {found} in row {row}")
    if not hasattr(max_new_tokens, "__index__") or max_new_tokens < 1:
        raise AdapterError(f"max_new_tokens: expected a whole number from 1 up, found {max_new_tokens}")
    if not hasattr(temperature, "__float__") or not 0 <= temperature < float("inf"):
        raise AdapterError(f"temperature: expected a number from 0 up, found {temperature}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise AdapterError("top_k and top_p: expected a temperature above 0 beside them, found 0")
    if top_k is not None and (not hasattr(top_k, "__index__") or top_k < 1):
        raise AdapterError(f"top_k: expected a whole number from 1 up, found {top_k}")
    if top_p is not None and not (hasattr(top_p, "__float__") and 0 < top_p <= 1):
        raise AdapterError(f"top_p: expected a number above 0 and up to 1, found {top_p}")
    if temperature > 0 and not isinstance(rng, jax.Array | np.ndarray):
        found = "none" if rng is None else type(rng).__name__
        raise AdapterError(f"rng: expected a key to draw with, found {found}")

"""`Rope`: rotary positions as a Hugging Face ``config.json`` describes them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from road_core import AdapterError
from road_jax.models._reader import Reader

# Model types whose windowed layers have frequencies of their own.
_BY_LAYER = ("gemma3_text", "olmo3")

_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of some layers of a decoder.

    Attributes:
        frequencies: the angle per position of each rotary pair; a head's elements beyond the pairs aren't turned.
        scale: what turned elements are multiplied with.
        long_frequencies: the frequencies for rows of more than ``trained_length`` positions; None if they are the same.
        trained_length: the greatest length before the context was extended.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    trained_length: int = 0

    @classmethod
    def none(cls, head_dim: int) -> "Rope":
        """Returns one that turns nothing."""
        return cls((0.0,) * (head_dim // 2))


def read_ropes(
    read: Reader, kind: str, head_dim: int, windowed: tuple[bool, ...]
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Returns the rotary positions that occur in a model, and for each layer which of them it has.

    Args:
        read: the fields of a ``config.json``, with the model type's defaults.
        kind: the model type.
        head_dim: the size of a head.
        windowed: which layers have a sliding window.

    Raises:
        AdapterError: a value is missing, impossible, or of a kind that isn't covered.
    """
    if kind in _BY_LAYER:
        scaling, both = read.mapping("rope_scaling"), read.mapping("rope_parameters")
        if both and not both.keys() & {"full_attention", "sliding_attention"}:
            raise AdapterError(
                f"{read.where}: expected rope_parameters of full_attention and sliding_attention, found {[*both]!r:.80}"
            )
        of_both = Reader(both, read.where)
        full = {**of_both.mapping("full_attention"), **scaling}
        local = {"rope_theta": read.fields["rope_local_base_freq"], **of_both.mapping("sliding_attention")}
        return _by_layer([_read(read, local if of else full, head_dim) for of in windowed])
    name = rope_field(read)
    fields = read.mapping(name)
    if nested := [key for key, value in fields.items() if isinstance(value, Mapping)]:
        raise AdapterError(f"{read.where}: expected {name} to be the same for all layers, found some for {nested[0]!r}")
    rope, layers = _read(read, fields, head_dim), len(windowed)
    if kind != "smollm3":
        return _by_layer([rope] * layers)
    turned = read.fields.get("no_rope_layers")
    if turned is None:
        every = read.count("no_rope_layer_interval")
        turned = [(layer + 1) % every != 0 for layer in range(layers)]
    # The list may be longer than the model.
    if not isinstance(turned, list) or len(turned) < layers or any(value not in (0, 1) for value in turned):
        raise AdapterError(
            f"{read.where}: expected no_rope_layers to be 0 or 1 for each of {layers} layers, found {turned!r:.80}"
        )
    return _by_layer([rope if value else Rope.none(head_dim) for value in turned[:layers]])


def rope_field(read: Reader) -> str:
    """Returns the name of the field that describes the rotary positions.

    transformers 5 writes rope_parameters. Before, rope_theta was beside rope_scaling, which takes precedence.
    """
    return "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"


def _by_layer(ropes: Sequence[Rope]) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    different = tuple(dict.fromkeys(ropes))
    return different, tuple(map(different.index, ropes))


def _read(read: Reader, fields: Mapping[str, Any], head_dim: int) -> Rope:
    try:
        with np.errstate(all="ignore"):
            rope = _formed(read, fields, head_dim)
            whole = np.asarray([*rope.frequencies, *(rope.long_frequencies or ()), rope.scale], np.float32)
        if np.isfinite(whole).all():
            return rope
    except AdapterError:
        raise
    except (OverflowError, ValueError):
        pass
    raise AdapterError(f"{read.where}: expected rotary positions with finite frequencies, found {dict(fields)!r:.200}")


def _formed(read: Reader, fields: Mapping[str, Any], head_dim: int) -> Rope:
    outer = {key: read.fields[key] for key in ("rope_theta", "partial_rotary_factor") if key in read.fields}
    trained = {key: read.fields[key] for key in ("original_max_position_embeddings",) if key in read.fields}
    kind_of_model = read.fields["model_type"]
    phi3 = kind_of_model == "phi3"
    fields = {**outer, **trained, **fields} if kind_of_model in _BY_LAYER else {**outer, **fields, **trained}
    name = fields.get("rope_type") or fields.get("type")
    # Phi-3's first files call it otherwise.
    name = "longrope" if phi3 and name in ("su", "yarn") else name
    rope = Reader({**fields, "rope_type": name}, read.where)
    kind = rope.choice("rope_type", _TYPES, "default")
    part = rope.number("partial_rotary_factor", 1.0)
    if part != 1 and not phi3:
        raise AdapterError(f"{read.where}: expected rotary positions on whole heads, found a partial_rotary_factor")
    size = int(head_dim * part)
    if size % 2 or not 0 < size <= head_dim or part > 1:
        raise AdapterError(
            f"{read.where}: expected a partial_rotary_factor of an even part of {head_dim} elements, found {size}"
        )
    theta = rope.number("rope_theta", 10000.0)
    if theta <= 1:
        raise AdapterError(f"{read.where}: expected a rope_theta above 1, found {theta:g}")
    plain = theta ** (-np.arange(0, size, 2) / size)
    if kind == "default":
        return Rope(_floats(plain))
    if kind == "linear":
        return Rope(_floats(plain / rope.number("factor")))
    length = rope.count("original_max_position_embeddings", read.fields.get("max_position_embeddings"), least=2)
    if kind == "llama3":
        # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise AdapterError(
                f"{read.where}: expected low_freq_factor below high_freq_factor, found {low:g}, {high:g}"
            )
        kept = np.clip((length * plain / (2 * np.pi) - low) / (high - low), 0, 1)
        return Rope(_floats(plain * (kept + (1 - kept) / rope.number("factor"))))
    factor = rope.optional("factor") or read.count("max_position_embeddings") / length
    if kind == "yarn":
        kept = _kept_by_yarn(rope, theta, size, length)
        return Rope(_floats(plain * (kept + (1 - kept) / factor)), _scale_of_yarn(rope, factor))
    scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return Rope(
        _floats(plain / rope.numbers("short_factor", size // 2)),
        rope.number("attention_factor", scale),
        _floats(plain / rope.numbers("long_factor", size // 2)),
        length,
    )


def _kept_by_yarn(rope: Reader, theta: float, size: int, length: int) -> np.ndarray:
    """Returns how much of each frequency is kept: all of those with many turns in ``length``, nothing of those with few
    (YaRN, arXiv 2309.00071).
    """

    def pair(turns: float) -> float:
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(rope.number("beta_fast", 32)), pair(rope.number("beta_slow", 1))
    # As in transformers, null is false.
    if rope.flag("truncate", default="truncate" not in rope.fields):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return 1 - np.clip((np.arange(size // 2) - first) / (last - first or 0.001), 0, 1)


def _scale_of_yarn(rope: Reader, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    both = rope.optional("mscale"), rope.optional("mscale_all_dim")
    return rope.number("attention_factor", scale(both[0]) / scale(both[1]) if both[0] and both[1] else scale(1))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())

"""`DecoderConfig`: the parts of a Hugging Face ``config.json`` that decide a decoder's function."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from road_core import AdapterError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama family; fields are named as in Hugging Face's configs.

    Hashable, so that it can be a static argument of jitted functions.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    # The angle per position of each of the head_dim / 2 rotary pairs.
    inverse_frequencies: tuple[float, ...]
    # Windowed layers see only this many positions back, including a token's own.
    sliding_window: int | None
    windowed_layers: tuple[bool, ...]
    # Whether layers have biases in q, k and v, in o, and in the MLP.
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # Qwen3 normalises each head's query and key.
    qk_norm: bool

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any], where: str) -> "DecoderConfig":
        """Reads the fields of a ``config.json``, which is called ``where`` in errors.

        Raises:
            AdapterError: an unknown model type, a missing or impossible value, or a feature that isn't covered.
        """
        read = _Reader(fields, where)
        kind = read.choice("model_type", MODEL_TYPES)
        hidden, heads, layers = (
            read.count(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        # Where a file leaves out a field, transformers' own default applies.
        head_dim = read.count("head_dim", 128 if kind == "qwen3" else hidden // heads)
        window, windowed = _windows(read, kind, layers)
        attention_bias = read.flag("attention_bias", default=False) if kind in ("llama", "qwen3") else False
        config = cls(
            model_type=kind,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.count("num_key_value_heads", 8 if kind == "mistral" else heads),
            head_dim=head_dim,
            hidden_act=read.choice("hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
            inverse_frequencies=tuple(_inverse_frequencies(read, head_dim).tolist()),
            sliding_window=window,
            windowed_layers=windowed,
            qkv_bias=attention_bias or kind == "qwen2",
            o_bias=attention_bias,
            mlp_bias=read.flag("mlp_bias", default=False) if kind == "llama" else False,
            qk_norm=kind == "qwen3",
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise AdapterError(
                f"{where}: expected num_attention_heads in whole groups of num_key_value_heads, "
                f"found {config.num_attention_heads} and {config.num_key_value_heads}"
            )
        if head_dim % 2:
            raise AdapterError(f"{where}: expected an even head_dim, found {head_dim}")
        return config


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A JSON object, with checks of its values."""

    fields: Mapping[str, Any]
    where: str

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None and default is None:
            raise AdapterError(f"{self.where}: expected a field {name}, found none")
        return default if value is None else value

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise AdapterError(f"{self.where}: expected {name} to be an integer from {least} up, found {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise AdapterError(f"{self.where}: expected {name} to be a positive number, found {value!r}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise AdapterError(f"{self.where}: expected {name} to be true or false, found {value!r}")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self._get(name, default)
        if value not in choices:
            raise AdapterError(f"{self.where}: expected {name} to be one of {', '.join(choices)}, found {value!r}")
        return value


def _windows(read: _Reader, kind: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the sliding window (None if no layer has one), and which layers have it."""
    none = None, (False,) * layers
    if kind == "llama" or (kind == "mistral" and read.fields.get("sliding_window", 4096) is None):
        return none
    if kind != "mistral" and not (
        read.flag("use_sliding_window", default=False) and read.fields.get("sliding_window", 4096)
    ):
        return none
    window = read.count("sliding_window", 4096)
    types = read.fields.get("layer_types")
    if kind == "mistral":
        return window, (True,) * layers
    if types is None:
        first = read.count("max_window_layers", 28, least=0)
        windowed = tuple(layer >= first for layer in range(layers))
    elif (
        isinstance(types, list)
        and len(types) == layers
        and all(kind in ("full_attention", "sliding_attention") for kind in types)
    ):
        windowed = tuple(kind == "sliding_attention" for kind in types)
    else:
        raise AdapterError(
            f"{read.where}: expected layer_types to name full_attention or sliding_attention for each of {layers} "
            f"layers, found {types!r:.80}"
        )
    return (window, windowed) if any(windowed) else none


def _inverse_frequencies(read: _Reader, head_dim: int) -> np.ndarray:
    """Returns the rotary frequencies, float64 ``[head_dim / 2]``: plain, or scaled linearly or as in Llama 3."""
    # transformers 5 writes rope_parameters. Before, rope_theta was beside rope_scaling, which takes precedence.
    name = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    fields = read.fields.get(name) or {}
    if not isinstance(fields, Mapping):
        raise AdapterError(f"{read.where}: expected {name} to be a JSON object, found {fields!r:.60}")
    if nested := [key for key, value in fields.items() if isinstance(value, Mapping)]:
        raise AdapterError(f"{read.where}: expected {name} to be the same for all layers, found some for {nested[0]!r}")
    outer = {key: read.fields[key] for key in ("rope_theta", "partial_rotary_factor") if key in read.fields}
    trained = {key: read.fields[key] for key in ("original_max_position_embeddings",) if key in read.fields}
    fields = {**outer, **fields, **trained}
    rope = _Reader({**fields, "rope_type": fields.get("rope_type") or fields.get("type")}, read.where)
    kind = rope.choice("rope_type", ("default", "linear", "llama3"), "default")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise AdapterError(f"{read.where}: expected rotary positions on whole heads, found a partial_rotary_factor")
    plain = rope.number("rope_theta", 10000.0) ** (-np.arange(0, head_dim, 2) / head_dim)
    if kind == "default":
        return plain
    factor = rope.number("factor")
    if kind == "linear":
        return plain / factor
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    turns = rope.number("original_max_position_embeddings") * plain / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (blend + (1 - blend) / factor)

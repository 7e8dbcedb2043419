"""`DecoderConfig`: the parts of a Hugging Face ``config.json`` that decide a decoder's function."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from road_core import AdapterError
from road_jax.models._reader import INT32, Reader
from road_jax.models._rope import Rope, read_ropes, rope_field

# What transformers assumes where a file leaves out a field, if it isn't the same for all types.
_BIASES = {"attention_bias": False, "mlp_bias": False}
_SOME_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": None, "max_window_layers": 28}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}
_GEMMA2 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "layer_types": None,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
}
_EXPERTS = {"norm_topk_prob": False}
_SOME_EXPERTS = {**_EXPERTS, "moe_intermediate_size": None, "decoder_sparse_step": 1, "mlp_only_layers": None}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _BIASES,
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 32, **_SOME_WINDOWS},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_SOME_WINDOWS},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_GEMMA2,
        # Files of models with vision leave out these too.
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "phi3": {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
    "smollm3": {
        **_BIASES,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    },
    "olmo2": {"rms_norm_eps": 1e-5, "attention_bias": False},
    "olmo3": {
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "rope_theta": 5e5,
        "sliding_window": 4096,
        "layer_types": None,
        "rope_local_base_freq": 5e5,
    },
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
    "qwen2_moe": {
        **_SOME_EXPERTS,
        **_SOME_WINDOWS,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        **_SOME_EXPERTS,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    "olmoe": {**_EXPERTS, "rms_norm_eps": 1e-5, "attention_bias": False, "clip_qkv": None},
    "granite": {
        **_BIASES,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
}
# Models with vision: what their decoder is if its part of the file, text_config, doesn't say.
_WITH_VISION = {"gemma3": "gemma3_text", "mistral3": "mistral"}
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
MODEL_TYPES = (*_FIELDS, *_WITH_VISION)
# All types have these. The others above mean something only to the types that list them; transformers ignores them in
# the files of other types.
_SHARED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("rms_norm_eps", "rope_theta", "original_max_position_embeddings"),
}
_OWN = {name for fields in _FIELDS.values() for name in fields} - _SHARED

# Fields of `DecoderConfig` that follow from the type.
_OLMO = {"norm_in_float32": True, "norms": "after", "qk_norm": "all"}
_FIXED: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma": {"norm_offset": 1.0, "norm_in_float32": True},
    "gemma2": {"norm_offset": 1.0, "norm_in_float32": True, "norms": "both"},
    "gemma3_text": {"norm_offset": 1.0, "norm_in_float32": True, "norms": "both", "qk_norm": "head"},
    "phi3": {"fused": True},
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "qwen3_moe": {"qk_norm": "head"},
    "olmoe": {"qk_norm": "all"},
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture of experts in place of an MLP.

    Attributes:
        experts: how many there are.
        choices: how many of them each token takes.
        width: the size of an expert's hidden values.
        normalised: whether the weights of a token's choices sum to 1.
        shared_width: the same as ``width`` for an expert that all tokens take; None if there is none.
    """

    experts: int
    choices: int
    width: int
    normalised: bool
    shared_width: int | None


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
    # The rotary positions that occur, and for each layer which of them it has.
    ropes: tuple[Rope, ...]
    rope_by_layer: tuple[int, ...]
    # Windowed layers see only this many positions back, including a token's own.
    sliding_window: int | None
    windowed_layers: tuple[bool, ...]
    # Whether layers have biases in q, k and v, in o, and in the MLP.
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # Factors of the embeddings, of the scores, of what attention and MLP add, and of the logits (Gemma, Granite).
    embedding_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float
    # Scores and logits are bounded to c · tanh(x / c) (Gemma 2).
    attention_softcap: float | None
    logit_softcap: float | None
    # Whether q, k and v are one layer, and gate and up too (Phi-3).
    fused: bool = False
    # Whether norms stand before attention and MLP, after them (OLMo 2), or on both sides (Gemma 2 and 3).
    norms: Literal["before", "after", "both"] = "before"
    # What is added to a norm's weight (Gemma), and whether it is multiplied before rounding (Gemma, OLMo 2).
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    # Whether queries and keys are normalised, each head by itself (Qwen3, Gemma 3) or all together (OLMo 2).
    qk_norm: Literal["head", "all"] | None = None
    # (a, b) if the query at a position is multiplied with 1 + a · log(1 + ⌊position / b⌋) (Ministral 3).
    query_growth: tuple[float, int] | None = None
    # The experts that all layers have in place of an MLP; None for MLPs.
    mixture: MixtureConfig | None = None
    # Whether it is the language model of a model with vision, and its params are below model/language_model.
    language_model: bool = False

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any], where: str) -> "DecoderConfig":
        """Reads the fields of a ``config.json``, which is called ``where`` in errors.

        Raises:
            AdapterError: an unknown model type, a missing or impossible value, or a feature that isn't covered.
        """
        if not isinstance(fields, Mapping):
            raise AdapterError(f"{where}: expected a JSON object, found {fields!r:.80}")
        read = Reader(fields, where)
        kind = read.choice("model_type", MODEL_TYPES)
        if kind in _WITH_VISION:
            # Whether the head is tied isn't for the text's part to say.
            outer = {"tie_word_embeddings": read.flag("tie_word_embeddings", default=True)}
            text = {"model_type": _WITH_VISION[kind], **read.mapping("text_config"), **outer}
            return dataclasses.replace(cls._from_text(text, f"{where}: text_config"), language_model=True)
        return cls._from_text(fields, where)

    @classmethod
    def _from_text(cls, fields: Mapping[str, Any], where: str) -> "DecoderConfig":
        kind = Reader(fields, where).choice("model_type", tuple(_FIELDS))
        known = {name: value for name, value in fields.items() if name not in _OWN or name in _FIELDS[kind]}
        read, gemma = Reader({**_FIELDS[kind], **known}, where), kind.startswith("gemma")
        if not read.flag("is_causal", default=True) or (
            gemma and read.flag("use_bidirectional_attention", default=False)
        ):
            raise AdapterError(f"{where}: expected causal attention, found tokens that see later ones")
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        layers = read.count("num_hidden_layers", most=1 << 14)
        head_dim = read.count("head_dim", hidden // heads, most=1 << 16)
        window, windowed = _windows(read, kind, layers)
        ropes, rope_by_layer = read_ropes(read, kind, head_dim, windowed)
        name = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
        activation = read.choice(name, ACTIVATIONS, "gelu_pytorch_tanh" if gemma else "silu")
        bias = read.flag("attention_bias", default=False)
        config = cls(
            model_type=kind,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.count("num_key_value_heads", heads),
            head_dim=head_dim,
            # The first Gemma files call the approximation by tanh plain gelu.
            hidden_act="gelu_pytorch_tanh" if kind == "gemma" and activation == "gelu" else activation,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
            ropes=ropes,
            rope_by_layer=rope_by_layer,
            sliding_window=window,
            windowed_layers=windowed,
            qkv_bias=read.flag("qkv_bias", default=bias),
            o_bias=bias,
            mlp_bias=read.flag("mlp_bias", default=False),
            embedding_scale=read.number("embedding_multiplier", hidden**0.5 if gemma else 1.0),
            attention_scale=read.number("attention_multiplier", read.number("query_pre_attn_scalar", head_dim) ** -0.5),
            residual_scale=read.number("residual_multiplier", 1.0),
            logit_scale=1 / read.number("logits_scaling", 1.0),
            attention_softcap=read.optional("attn_logit_softcapping"),
            logit_softcap=read.optional("final_logit_softcapping"),
            query_growth=_query_growth(read) if kind == "ministral3" else None,
            mixture=_mixture(read, kind, layers) if kind in _MIXTURES else None,
        )
        config = dataclasses.replace(config, **_FIXED.get(kind, {}))
        if config.num_attention_heads % config.num_key_value_heads:
            raise AdapterError(
                f"{where}: expected num_attention_heads in whole groups of num_key_value_heads, "
                f"found {config.num_attention_heads} and {config.num_key_value_heads}"
            )
        if head_dim % 2:
            raise AdapterError(f"{where}: expected an even head_dim, found {head_dim}")
        return config


def _query_growth(read: Reader) -> tuple[float, int] | None:
    rope = Reader(read.mapping(rope_field(read)), read.where)
    rate = rope.optional("llama_4_scaling_beta")
    return None if rate is None else (rate, rope.count("original_max_position_embeddings"))


def _mixture(read: Reader, kind: str, layers: int) -> MixtureConfig:
    sparse = "mlp_only_layers" in read.fields
    if sparse and (read.fields["mlp_only_layers"] or read.count("decoder_sparse_step") > 1):
        raise AdapterError(
            f"{read.where}: expected experts in each of {layers} layers, found mlp_only_layers "
            f"{read.fields['mlp_only_layers']!r:.60} and decoder_sparse_step {read.fields['decoder_sparse_step']}"
        )
    if read.fields.get("clip_qkv") is not None:
        raise AdapterError(f"{read.where}: expected attention without clip_qkv, found {read.fields['clip_qkv']!r:.80}")
    # transformers has had both names.
    named = next((name for name in ("num_local_experts", "num_experts") if name in read.fields), "num_experts")
    experts = read.count(named, most=1 << 16)
    choices = read.count("num_experts_per_tok")
    if choices > experts:
        raise AdapterError(f"{read.where}: expected num_experts_per_tok up to {named} {experts}, found {choices}")
    return MixtureConfig(
        experts=experts,
        choices=choices,
        width=read.count("moe_intermediate_size" if sparse else "intermediate_size"),
        normalised=kind == "mixtral" or read.flag("norm_topk_prob", default=False),
        shared_width=read.count("shared_expert_intermediate_size") if kind == "qwen2_moe" else None,
    )


def _windows(read: Reader, kind: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the sliding window (None if no layer has one), and which layers have it."""
    fields = read.fields
    if fields.get("sliding_window") is None or (
        "use_sliding_window" in fields
        and not (read.flag("use_sliding_window", default=False) and fields["sliding_window"])
    ):
        return None, (False,) * layers
    # A greater one is none.
    window, types = min(read.count("sliding_window", most=1 << 63), INT32), fields.get("layer_types")
    if types is not None:
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(name not in ("full_attention", "sliding_attention") for name in types)
        ):
            raise AdapterError(
                f"{read.where}: expected layer_types to name full_attention or sliding_attention for each of {layers} "
                f"layers, found {types!r:.80}"
            )
        windowed = [name == "sliding_attention" for name in types]
    elif kind in ("gemma2", "gemma3_text", "olmo3"):
        pattern = {"gemma2": 2, "olmo3": 4}.get(kind) or read.count("sliding_window_pattern")
        windowed = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif "max_window_layers" in fields:
        bound = read.count("max_window_layers", least=0)
        windowed = [
            layer < bound and layer % 2 == 0 if kind == "qwen2_moe" else layer >= bound for layer in range(layers)
        ]
    elif "layer_types" in fields:
        raise AdapterError(f"{read.where}: expected a field layer_types beside use_sliding_window, found none")
    else:
        windowed = [True] * layers
    return (window, tuple(windowed)) if any(windowed) else (None, (False,) * layers)

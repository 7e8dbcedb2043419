"""Finds layers whose first axis isn't the batch in order, where it can't be known which adapter a row should get."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError
from road_torch._layer import RoadLayer, bare, layers
from road_torch._routing import BASE, Name, parts
from road_torch._saved import SavedModule, saved_modules

# By class in transformers: the children that are called, or call others, with another axis first, such as that of
# tokens, queries or a decoder's layers, with only some of the rows' tokens, or with other rows behind the batch's.
_GLOBAL = ("query", "key", "value", "query_global", "key_global", "value_global")
_OUT_OF_ORDER = {
    "LongformerSelfAttention": _GLOBAL,
    "LEDEncoderSelfAttention": _GLOBAL,
    "XLNetFeedForward": ("layer_1", "layer_2"),
    "FSMTEncoder": ("layers",),
    "FSMTDecoder": ("layers",),
    "BridgeTowerTransformer": ("resblocks",),
    "BrosBboxEmbeddings": ("bbox_projection",),
    "BrosRelationExtractor": ("query", "key"),
    "BrosSpadeEEForTokenClassification": ("initial_token_classifier",),
    "Mask2FormerMaskedAttentionDecoderLayer": ("fc1", "fc2"),
    "OneFormerTransformerDecoderFFNLayer": ("linear1", "linear2"),
    "OneFormerTransformerDecoderQueryTransformerDecoderLayer": ("linear1", "linear2"),
    "OneFormerTextTransformer": ("layers",),
    "DabDetrForObjectDetection": ("bbox_predictor",),
    "MLCDAttention": ("out_proj",),
    "HiggsAudioV2DecoderLayer": ("mlp", "audio_mlp"),
    "SegGptEncoder": ("layers",),
}

# Inputs in transformers of which a row of text may have any number, and the kind of their placeholders in the text.
_MEDIA = {
    "pixel_values": "image",
    "image_patches": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
}


def stray(base: nn.Module, path: str) -> str | None:
    """Returns why a layer doesn't see the batch's rows in order, worded for an error; None if no reason is known."""
    names = path.split(".")
    # Experts see only some tokens and can't know which row of the batch a token came from.
    if "experts" in names:
        return "an expert, to which tokens are routed"
    module = base
    for name in names:
        for kind in type(module).__mro__:
            if name in _OUT_OF_ORDER.get(kind.__name__, ()):
                return f"one in {kind.__name__}, which doesn't keep them in order"
        inner = module.original_module if isinstance(module, SavedModule) else module
        module = inner.get_submodule(name)
    return None


def check_media(base: Any, names: Sequence[Name], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks that layers outside the text model, as in a vision tower, can assign their inputs to the batch's rows.

    Args:
        base: the model that is called.
        names: the adapters of the batch's rows.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.

    Raises:
        AdapterError: the rows have different adapters, one of these has such a layer, and the rows have different
            amounts of its input.
    """
    if len(set(names)) == 1 or not (len(args) > 1 or not kwargs.keys().isdisjoint(_MEDIA)):
        return
    # Only tensors, because generate's other positional arguments aren't model inputs.
    in_place = zip(inspect.signature(base.forward).parameters, args, strict=False)
    given = {**{key: value for key, value in in_place if isinstance(value, Tensor)}, **kwargs}
    ids = given.get("input_ids")
    if ids is None and given.get("inputs_embeds") is None:
        return
    for key, kind in _MEDIA.items():
        if (value := given.get(key)) is None:
            continue
        found = _differing(base, kind, ids, value, given.get("image_sizes"), len(names))
        if found is not None and (path := _beside_text(base, names)) is not None:
            raise AdapterError(
                f"{path}: expected as much of {key} in each of the {len(names)} rows that adapter_names has, as this "
                f"layer doesn't see which row it belongs to, found {found}"
            )


def check_generation(base: Any, names: Sequence[Name], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks that ``generate`` keeps all rows to its end; Whisper's may continue with the unfinished rows only.

    Args:
        base: the model that is called.
        names: the adapters of the batch's rows.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.

    Raises:
        AdapterError: the rows have different adapters, and ``generate`` may drop some of the rows.
    """
    kinds = type(bare(base)).__mro__
    if len(set(names)) == 1 or all(kind.__name__ != "WhisperGenerationMixin" for kind in kinds):
        return
    given = inspect.signature(base.generate).bind_partial(*args, **kwargs).arguments
    config = given.get("generation_config") or base.generation_config
    settings = {**vars(config), **{key: value for key, value in given.items() if value is not None}}
    features: Any = given.get("input_features")
    temperature = given.get("temperature")
    # The encoder halves the number of frames.
    long = isinstance(features, Tensor) and features.shape[-1] > 2 * base.config.max_source_positions
    found = None
    if isinstance(temperature, list | tuple) and len(temperature) > 1:
        found = f"{len(temperature)} temperatures"
    elif not settings.get("force_unique_generate_call") and (long or settings.get("return_timestamps")):
        found = f"{features.shape[-1]} frames" if long else "return_timestamps"
    if found is not None:
        raise AdapterError(
            f"adapter_names: expected one adapter for all rows where {kinds[0].__name__} goes on with some of them, "
            f"found several and {found}; generate with each adapter by itself"
        )


def _differing(base: Any, kind: str, ids: Any, value: Any, sizes: Any, rows: int) -> str | None:
    """Describes how rows differ in their amount of an input; None if they have equal amounts, in order."""
    config = getattr(base, "config", None)
    tokens = [getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index")]
    token = next((token for token in tokens if token is not None), None)
    if token is None:
        # The text has no placeholders: each row should have one input.
        return None if len(value) == rows else f"{len(value)}"
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return f"no input_ids with the rows' {kind} tokens"
    counts = (ids == token).sum(1).tolist()
    if len(set(counts)) > 1:
        return f"{', '.join(map(str, counts))} {kind} tokens"
    # The same number of tokens may stand for different numbers of patches.
    if kind == "image" and sizes is not None and len(torch.as_tensor(sizes).unique(dim=0)) > 1:
        return "image_sizes that differ"
    return None


def _beside_text(base: Any, names: Collection[Name]) -> str | None:
    """Returns the path of a module outside the text model that adapters of the batch have; None if there is none."""
    find = getattr(base, "get_decoder", None)
    decoder = find() if find is not None else None
    if decoder is None:
        return None
    inside = list(decoder.modules())
    other = {id(m) for module in inside if _is_for_media(module) for m in module.modules()}
    text = {id(module) for module in inside} - other | {id(base.get_output_embeddings())}
    used = {part for name in names if name != BASE for part, _ in parts(name)}
    wrapped: list[RoadLayer | SavedModule] = [*layers(base), *saved_modules(base)]
    for module in wrapped:
        held = module.road_theta if isinstance(module, RoadLayer) else module.modules_to_save
        if id(module) not in text and any(name in held for name in used):
            return module.module_path
    return None


def _is_for_media(module: nn.Module) -> bool:
    modalities = getattr(module, "input_modalities", "text")
    return getattr(module, "main_input_name", None) in _MEDIA or "text" not in modalities

"""Output heads that share the embedding's weight.

In Flax, where both are one param, training the embedding whole also changes such a head. In PEFT the head stays the
base's.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert._families import FAMILIES
from road_core._files import inside, read_json
from road_core._safetensors import INDEX, SINGLE, has_own_head, read_entries

# Families whose models have a head of their own if config.json doesn't say otherwise.
_UNTIED = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "olmo2", "olmo3", "granite"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
)


def read_model(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads the text model's fields of ``config.json``; a head that the checkpoint stores separately isn't called tied.

    Raises:
        AdapterError: there is no ``config.json``, or a file is broken.
    """
    fields = read_json(inside(directory, "config.json"))
    if isinstance(text := fields.get("text_config"), dict):
        # Of a model with vision, the text's part doesn't say it.
        tied = is_tied(fields)
        fields = text if tied is None else {**text, "tie_word_embeddings": tied}
    stored = any((Path(directory) / name).is_file() for name in (SINGLE, INDEX))
    if is_tied(fields) and stored and has_own_head(read_entries(directory)):
        fields = {**fields, "tie_word_embeddings": False}
    return fields


def is_tied(model: Mapping[str, Any]) -> bool | None:
    """Tells whether a model's head shares the embedding; None if neither the config nor the model's type says."""
    value, kind = model.get("tie_word_embeddings"), model.get("model_type")
    if value is None and kind in FAMILIES:
        return kind not in _UNTIED
    return value if isinstance(value, bool) else None

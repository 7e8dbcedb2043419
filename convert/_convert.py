"""From an adapter folder of one side to one of the other."""

import os

from convert._mapping import map_to_flax, map_to_torch
from road_core import AdapterError, read_flax, read_peft, write_flax, write_peft


def to_torch(
    src: str | os.PathLike, dst: str | os.PathLike, *, family: str | None = None, overwrite: bool = False
) -> None:
    """Writes a Flax adapter as one that PEFT and ``road_torch`` load. No bit of a number changes.

    The layout is told by the tensors: θ of a stack (``model.layers.self_attn.q_proj``) has a layer axis in front, that
    of a numbered layer (``model.layers.0.self_attn.q_proj``) has one axis. The file's metadata keep what PEFT's
    format can't say, so that `to_flax` gives back the same bytes.

    Args:
        src: a folder that ``road-train`` or ``road_jax.save_adapter`` wrote.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first whose table knows every key.
        overwrite: see ``dst``.

    Raises:
        AdapterError: ``src`` holds no whole adapter, a key has no partner, a shape doesn't fit, or ``dst`` already
            holds something. Nothing is written then.

    Example:
        >>> import convert
        >>> convert.to_torch("runs/sentiment", "adapters/sentiment")  # doctest: +SKIP
    """
    adapter = read_flax(src)
    try:
        mapped = map_to_torch(adapter, family)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    write_peft(dst, mapped, overwrite=overwrite)


def to_flax(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    family: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter in PEFT's format as one that ``road_jax`` loads: the inverse of `to_torch`.

    Args:
        src: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first whose table knows every key.
        layout: ``"scanned"`` (layers stacked, the default of ``road_jax.models.load``) or ``"unrolled"``. None takes
            the layout that the adapter once had in Flax, where its metadata tell, else ``"scanned"``.
        layers: how many layers the model has. Only needed to stack an adapter whose config has
            ``layers_to_transform``.
        overwrite: see ``dst``.

    Raises:
        AdapterError: as `to_torch`; also where layers that are missing, or that differ, can't be stacked.
    """
    adapter = read_peft(src)
    try:
        mapped = map_to_flax(adapter, family, layout, layers)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    write_flax(dst, mapped, overwrite=overwrite)

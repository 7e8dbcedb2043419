"""Converts an adapter folder of one side to one of the other."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert._families import Family
from convert._inspect import check_apart
from convert._mapping import Trace, map_to_flax, map_to_torch
from convert._orbax import find_step, read_checkpoint
from convert._rules import read_rules
from convert._tied import read_model
from road_core import Adapter, AdapterError, read_flax, read_peft, write_flax, write_peft
from road_core._files import check_free

# A table of the user's own, and the model's config.
Choice = tuple[Family | None, Mapping[str, Any] | None]


def to_torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    family: str | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    """Writes a Flax adapter in the format that PEFT and ``road_torch`` load. No bit of a number changes.

    The tensors show the layout: θ of a stack (``model.layers.self_attn.q_proj``) has a layer axis in front, θ of a
    numbered layer (``model.layers.0.self_attn.q_proj``) has one axis. The file's metadata keep what PEFT's format can't
    express, so that `to_flax` gives back the same bytes.

    Args:
        src: a folder that ``road-train`` or ``road_jax.save_adapter`` wrote, or one of ``road-train``'s checkpoints
            (``RUN/checkpoints/STEP``); for a run that hasn't ended, the last checkpoint is taken.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first one whose table knows every key.
        base: the model's folder, whose ``config.json`` gives the sizes of heads, whether the output head shares the
            embedding, and the number of layers. It is needed where fused layers are split or fused by heads, for RoPE's
            interleaved order, and for an embedding that was trained whole without the head.
        rules: a file with a conversion table of your own, see `read_rules`.
        overwrite: see ``dst``.
        dry_run: write nothing.

    Returns:
        The mapping: each key's name before and after.

    Raises:
        AdapterError: ``src`` contains no complete adapter, a key has no partner, a shape doesn't fit, or ``dst``
            already contains something. Nothing is written then.

    Example:
        >>> import convert
        >>> mapping = convert.to_torch("runs/sentiment", "adapters/sentiment")  # doctest: +SKIP
    """
    return _to_torch(src, dst, choice=choose(family, base, rules), family=family, overwrite=overwrite, dry_run=dry_run)


def _to_torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    choice: Choice,
    family: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    table, model = choice
    if overwrite:
        check_apart(dst, "PEFT")
    adapter = _read_flax(src)
    trace: Trace = []
    try:
        mapped = map_to_torch(adapter, family, rules=table, model=model, trace=trace)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    if dry_run and not overwrite:
        check_free(dst)
    if not dry_run:
        write_peft(dst, mapped, overwrite=overwrite)
    return trace


def to_flax(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    family: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    """Writes an adapter in PEFT's format in the format that ``road_jax`` loads: the inverse of `to_torch`.

    Args:
        src: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first one whose table knows every key.
        layout: ``"scanned"`` (layers stacked, the default of ``road_jax.models.load``), ``"unrolled"``, or the layout
            of another library's Flax models: ``"transformers"``, ``"easydel"``, ``"tunix"``, ``"maxtext"``,
            ``"maxtext-unrolled"``. None takes the adapter's former layout in Flax if its metadata give one, else
            ``"scanned"`` if the family has it.
        layers: the number of layers in the model; only needed to stack an adapter whose config has
            ``layers_to_transform``, without ``base``.
        base: see `to_torch`.
        rules: see `to_torch`.
        overwrite: see ``dst``.
        dry_run: write nothing.

    Returns:
        The mapping: each key's name before and after.

    Raises:
        AdapterError: as for `to_torch`; also if layers that are to be stacked are missing or differ.
    """
    return _to_flax(
        src,
        dst,
        choice=choose(family, base, rules),
        family=family,
        layout=layout,
        layers=layers,
        overwrite=overwrite,
        dry_run=dry_run,
    )


def _to_flax(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    choice: Choice,
    family: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    table, model = choice
    if overwrite:
        check_apart(dst, "Flax")
    adapter = read_peft(src)
    trace: Trace = []
    try:
        mapped = map_to_flax(adapter, family, layout, layers, rules=table, model=model, trace=trace)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    if dry_run and not overwrite:
        check_free(dst)
    if not dry_run:
        write_flax(dst, mapped, overwrite=overwrite)
    return trace


def _read_flax(directory: str | os.PathLike) -> Adapter:
    # A run that has ended has its adapter beside its checkpoints.
    if not (Path(directory) / "road_config.json").is_file() and (step := find_step(directory)):
        return read_checkpoint(step)
    return read_flax(directory)


def choose(family: str | None, base: str | os.PathLike | None, rules: str | os.PathLike | None) -> Choice:
    """Reads the table in ``rules`` and the ``config.json`` of ``base``; each is None if not given."""
    if family is not None and rules is not None:
        raise AdapterError(f"family: expected none beside rules of your own, found {family!r}")
    return None if rules is None else read_rules(rules), None if base is None else read_model(base)


# Functions that convert with a choice that was made before.
PREPARED: dict[Callable[..., object], Callable[..., object]] = {to_torch: _to_torch, to_flax: _to_flax}

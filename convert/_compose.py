"""Composes several adapter folders into one."""

import dataclasses
import os
from collections.abc import Sequence

import road_core
from convert._inspect import check_apart, read_adapter
from convert._mapping import find_stacks, join_records
from road_core import Adapter, AdapterError, write_flax, write_peft


def compose(
    sources: Sequence[str | os.PathLike],
    dst: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    axis: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one adapter that applies others one after the other, the first one first; see `road_core.compose`.

    Args:
        sources: adapter folders, all in Flax's or all in PEFT's format; the result has the same format.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        weights: how often each adapter is applied, by default 1; -1 undoes an adapter.
        axis: the axis of θ that runs over a layer's own parameters, in stacks of a Flax model of your own. By default
            the layout's for models that `to_torch` knows, and the last one for others.
        overwrite: see ``dst``.

    Raises:
        AdapterError: a folder contains no complete adapter, the formats or layouts differ, or the adapters can't be
            composed. Nothing is written then.

    Example:
        >>> import convert
        >>> convert.compose(["adapters/de", "adapters/chat"], "adapters/de-chat")  # doctest: +SKIP
    """
    found = [read_adapter(source) for source in sources]
    adapters = [adapter for _, adapter in found]
    kind = found[0][0] if found else "PEFT"
    for source, (other, _) in zip(sources, found, strict=True):
        if other != kind:
            raise AdapterError(
                f"compose: expected adapters of one format, found {sources[0]} of {kind} and {source} of {other}"
            )
    known = -1 if kind == "PEFT" else _axis(sources, adapters)
    composed = road_core.compose(adapters, weights, names=list(map(str, sources)), axis=known if axis is None else axis)
    composed = dataclasses.replace(composed, metadata={**composed.metadata, **join_records(adapters)})
    if overwrite:
        check_apart(dst, kind)
    (write_peft if kind == "PEFT" else write_flax)(dst, composed, overwrite=overwrite)


def _axis(sources: Sequence[str | os.PathLike], adapters: Sequence[Adapter]) -> int:
    """Returns the axis of Flax adapters' θ that is a layer's own.

    Raises:
        AdapterError: the adapters have different layouts, so that no model could take a composition.
    """
    forms: dict[str, str | os.PathLike] = {}
    axis = -1
    for source, adapter in zip(sources, adapters, strict=True):
        if (stacks := find_stacks(adapter)) is None:
            continue
        if stacks.stacked:
            axis = stacks.axis
            forms.setdefault(f"layers stacked on axis {1 if axis == 0 else 0}", source)
        if stacks.numbered:
            forms.setdefault("numbered layers", source)
    if len(forms) > 1:
        raise AdapterError(
            "compose: expected adapters of one layout, found "
            + " and ".join(f"{form} in {source}" for form, source in forms.items())
        )
    return axis

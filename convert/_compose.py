"""Composes several adapter folders into one."""

import os
from collections.abc import Sequence

import road_core
from convert._inspect import check_apart, inspect
from road_core import AdapterError, write_flax, write_peft


def compose(
    sources: Sequence[str | os.PathLike],
    dst: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one adapter that applies others one after the other, the first one first; see `road_core.compose`.

    Args:
        sources: adapter folders, all in Flax's or all in PEFT's format; the result has the same format.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        weights: how often each adapter is applied, by default 1; -1 undoes an adapter.
        overwrite: see ``dst``.

    Raises:
        AdapterError: a folder contains no complete adapter, the formats differ, or the adapters can't be composed.
            Nothing is written then.

    Example:
        >>> import convert
        >>> convert.compose(["adapters/de", "adapters/chat"], "adapters/de-chat")  # doctest: +SKIP
    """
    found = [inspect(source) for source in sources]
    for source, summary in zip(sources, found, strict=True):
        if summary.kind != found[0].kind:
            raise AdapterError(
                f"compose: expected adapters of one format, found {sources[0]} of {found[0].kind} and {source} of "
                f"{summary.kind}"
            )
    composed = road_core.compose([summary.adapter for summary in found], weights, names=list(map(str, sources)))
    if overwrite:
        check_apart(dst, found[0].kind)
    (write_peft if found[0].kind == "PEFT" else write_flax)(dst, composed, overwrite=overwrite)

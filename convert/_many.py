"""Converts a folder of adapters in one call."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert._convert import PREPARED, choose
from road_core import AdapterError
from road_core._errors import listed
from road_core._files import check_free

if TYPE_CHECKING:
    from rich.console import Console


def convert_all(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    convert: Callable[..., object],
    *,
    overwrite: bool = False,
    console: "Console | None" = None,
    **options: Any,
) -> list[str]:
    """Converts every adapter in a folder, each into a folder of the same name.

    An adapter that can't be converted doesn't stop the others: all are tried before the error is raised.

    Args:
        src: a folder that contains adapters' folders. Files in it, and names that begin with a dot, are ignored.
        dst: a new or empty folder; with ``overwrite``, one in which adapters may be replaced.
        convert: `to_torch` or `to_flax`.
        overwrite: see ``dst``.
        console: where progress is shown; None shows none.
        options: further arguments of ``convert``, the same for all adapters.

    Returns:
        The names of the adapters.

    Raises:
        AdapterError: there is no adapter, ``dst`` already contains something, ``base`` or ``rules`` can't be read, or
            some adapters can't be converted: the error says how many and which, and why the first one can't. The others
            are written then.

    Example:
        >>> import convert
        >>> names = convert.convert_all("runs", "adapters", convert.to_torch)  # doctest: +SKIP
    """
    source, target = Path(src), Path(dst)
    if not source.is_dir():
        raise AdapterError(f"{source}: expected a folder of adapters, found none")
    names = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise AdapterError(f"{source}: expected folders of adapters in it, found none")
    if not overwrite:
        check_free(target)
    if convert in PREPARED:
        # Read once for all adapters.
        choice = choose(options.get("family"), options.pop("base", None), options.pop("rules", None))
        convert = functools.partial(PREPARED[convert], choice=choice)
    failed: dict[str, Exception] = {}
    for name in _tracked(names, console):
        try:
            convert(source / name, target / name, overwrite=overwrite, **options)
        except (AdapterError, OSError) as error:
            failed[name] = error
    if failed:
        raise AdapterError(
            f"{len(failed)} of {len(names)} adapters aren't converted ({listed(list(failed))}), "
            f"the first for this: {next(iter(failed.values()))}"
        )
    return names


def _tracked(names: list[str], console: "Console | None") -> Any:
    if console is None:
        return names
    from rich.progress import track

    return track(names, "converting", console=console, disable=not console.is_terminal)

"""A run's checkpoints, written by orbax: adapter, optimiser state and position in the data."""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from road_core import AdapterError
from road_jax.train._step import State

# orbax logs every file at INFO, its own defaults at WARNING, and at ERROR what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The last few checkpoints of a run; each counts only once it is written completely.

    Args:
        directory: the run's folder; checkpoints go to ``checkpoints`` in it.
        keep: how many checkpoints are kept.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2) -> None:
        self._directory = Path(directory).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Writes a state, which must be on the host, after ``step`` steps, with JSON beside it.

        Raises:
            AdapterError: it can't be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta))
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_unraisable, hook)
        try:
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except Exception as error:  # orbax lets errors of several libraries through
            raise AdapterError(
                f"{self._directory}: expected a folder that checkpoints can be written to, found {_reason(error)}"
            ) from None
        sys.unraisablehook = hook

    def restore(self, like: State) -> tuple[int, State, dict[str, Any]] | None:
        """Returns the last checkpoint's step, state and JSON, or None if there is none yet.

        Raises:
            AdapterError: it doesn't match ``like``.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()), meta=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:  # orbax lets errors of several libraries through
            raise AdapterError(
                f"{self._directory}/{step}: expected this run's checkpoint, found {_reason(error)}"
            ) from None
        return step, State(**found.state), found.meta

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()


def _unraisable(hook: Callable[[Any], object], found: Any) -> None:
    """Ignores writes that fail after the one that is reported: they find orbax's event loop closed."""
    if str(found.exc_value) != "Event loop is closed":
        hook(found)


def _reason(error: Exception) -> str:
    """Returns the system's message if the error has a code, otherwise the beginning of the error's text."""
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text[:200]

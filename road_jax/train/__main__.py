"""The ``road-train`` command."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro
from rich.console import Console

from road_core._command import run, with_huge_pages
from road_jax.train import TrainOptions, train


def command() -> None:
    """Like `main`, but trains in a process with huge pages."""
    run(lambda: _main(with_huge_pages))


def main() -> None:
    """Parses the command line and trains."""
    run(_main)


def _main(before: Callable[[], None] = lambda: None) -> None:
    options = tyro.cli(TrainOptions, prog="road-train")
    before()
    _import_transformers_alone()
    result = train(options)
    console = Console()
    console.print(f"{result.parameters:,} parameters, {result.steps} steps, {result.tokens:,} tokens")
    for name, record in (("before", result.before), ("after", result.after)):
        if record:
            console.print(
                f"{name:>6}: held-out loss {record['loss']:.3f}, tokens right {record['token_accuracy']:.1%}, "
                f"lines right {record['exact']:.1%} of {record['lines']:.0f}"
            )
    console.print(f"adapter, metrics and pictures: {result.out}")


def _import_transformers_alone() -> None:
    """Imports transformers, whose tokenizers are used, as where PyTorch isn't installed, and without saying so.

    Otherwise it would import PyTorch too, which takes longer than all other imports, and more memory.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "torch" in sys.modules:
        return
    # Python's way to say that a module can't be imported; transformers asks once.
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None
    try:
        import transformers  # noqa: F401
    finally:
        del modules["torch"]


if __name__ == "__main__":
    command()

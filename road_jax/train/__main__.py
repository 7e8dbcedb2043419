"""The ``road-train`` command."""

import tyro
from rich.console import Console

from road_core._command import run
from road_jax.train import TrainOptions, train


def main() -> None:
    """Parses the command line and trains."""
    run(_main)


def _main() -> None:
    options = tyro.cli(TrainOptions, prog="road-train")
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


if __name__ == "__main__":
    main()

"""``python -m examples.demo``: two adapters trained in Flax, served together on a 4-bit model in PyTorch."""

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console

from examples.demo.folder import demo_folder
from road_core._command import run


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Trains RoAd adapters for two tasks in Flax and serves both on a 4-bit model in PyTorch, with a report.

    The model is SmolLM2-135M-Instruct. On two processor cores it takes five to fifteen minutes.
    """

    out: Path = Path("runs/demo")
    """Folder for the report and all that was made. A former demo there is replaced."""
    cache: Path = Path("runs/cache")
    """Folder for what is downloaded."""


def main() -> None:
    """Parses the command line and runs the demo."""
    run(_main)


def _main() -> None:
    options = tyro.cli(DemoOptions, prog="python -m examples.demo")
    with demo_folder(options.out) as folder:
        # Importing two frameworks takes seconds; --help and the error for a folder in use needn't wait.
        from examples.demo import tasks
        from examples.demo.model import prepare_model
        from examples.demo.report import summary, write_report
        from examples.demo.run import STAGES, run_demo
        from examples.demo.stages import Stages

        console = Console(stderr=True)
        stages = Stages(console, STAGES)
        with stages.stage("Getting the model and the data"):
            base = prepare_model(options.cache / "smollm2-135m-instruct", options.cache, console=console)
            chosen = [tasks.sentiment(options.cache, console), tasks.address(options.cache, console)]
        results = run_demo(base, chosen, folder, stages)
        write_report(results, folder, options.out)
    shown = Console()
    shown.print(summary(results))
    shown.print(f"Report: {options.out / 'report.md'}", markup=False, highlight=False, soft_wrap=True)
    if not all(result.verification.passed for result in results.tasks):
        sys.exit("error: the converted adapter doesn't compute what the Flax adapter does, see the report")


if __name__ == "__main__":
    main()

"""The ``road-generate`` command."""

import tyro

from road_core._command import run
from road_torch._generate import GenerateOptions, command


def main() -> None:
    """Parses the command line and generates."""
    run(lambda: command(tyro.cli(GenerateOptions, prog="road-generate")))


if __name__ == "__main__":
    main()

"""The ``road-generate`` command."""

from road_core._command import run


def main() -> None:
    """Parses the command line and runs ``road-generate``."""
    run(_main)


def _main() -> None:
    import tyro

    from road_torch._generate import GenerateOptions, command

    command(tyro.cli(GenerateOptions, prog="road-generate"))


if __name__ == "__main__":
    main()

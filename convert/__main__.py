"""The ``road-convert`` command."""

from road_core._command import run


def main() -> None:
    """Parses the command line and runs one of the subcommands."""
    run(_main)


def _main() -> None:
    from convert import _cli

    _cli.main()


if __name__ == "__main__":
    main()

"""The folder of a demo: a new one, or the replacement of a former demo's once it is complete."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from road_core import AdapterError
from road_core._files import check_free, new_directory, read_json

# The file with the figures, and the field by which the folder of a former demo is recognised.
FIGURES = "demo.json"
MADE_BY = {"made_by": "examples.demo"}


@contextlib.contextmanager
def demo_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that replaces it when the block ends, and is deleted if the block fails.

    Raises:
        AdapterError: ``out`` holds something that isn't a former demo.
    """
    if not _is_demo(out):
        check_free(out)
        with new_directory(out) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        with new_directory(new) as draft:
            yield draft
        out.replace(old)
        new.replace(out)


def _is_demo(out: Path) -> bool:
    try:
        return read_json(out / FIGURES).items() >= MADE_BY.items()
    except AdapterError:
        return False

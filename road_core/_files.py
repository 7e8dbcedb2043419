"""Reading within a folder, and writing that leaves nothing half done."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


from road_core._errors import AdapterError

# Far more than any config or index has.
_LARGEST_JSON = 1 << 27


def as_path(path: str | os.PathLike) -> Path:
    """Returns a folder's path; there may be nothing yet.

    Raises:
        AdapterError: it isn't a path, or none that the system takes.
    """
    try:
        found = Path(path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
    except TypeError:
        raise AdapterError(f"folder: expected a path, found {type(path).__name__}") from None
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise AdapterError(f"{path!r:.80}: expected a path that can be used, found one that can't ({why})") from None
    return found


def inside(directory: str | os.PathLike, name: str) -> Path:
    """Returns the path of a file that must exist within a folder.

    Links may leave the folder only as in the Hugging Face cache, from ``snapshots/*/`` to its own ``blobs/``.

    Raises:
        AdapterError: the folder or the file doesn't exist, or the name or a link leads out of the folder.
    """
    folder = as_path(directory)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise AdapterError(f"{folder}: expected the name of a file within the folder, found {name!r}")
    path = folder / name
    try:
        there = path.is_file()
    except (OSError, ValueError):  # the name is too long or has a zero byte
        there = False
    if not there:
        raise AdapterError(f"{folder}: expected a file {name!s:.200}, found none")
    root, real = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise AdapterError(f"{path}: expected a file within the folder, found a link that leaves it")
    return path


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        AdapterError: the file can't be read or contains something else.
    """
    try:
        if (size := Path(path).stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"{size} bytes are too many")
        fields = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: expected a JSON object, found a file that can't be read ({reason(error)})"
        ) from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def read_json_lines(path: str | os.PathLike, share: tuple[int, int] = (0, 1)) -> list[tuple[int, Any]]:
    """Returns ``(line number, value)`` for each line of JSON; empty lines are skipped.

    Args:
        path: the file.
        share: ``(k, n)``: parse only every n-th of the lines that aren't empty, beginning with line k (counted from 0).

    Raises:
        AdapterError: the file can't be read or has no lines, or a line isn't JSON (the error gives its number).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: expected a file of JSON lines, found one that can't be read ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise AdapterError(f"{path}: expected at least one line, found none")
    found = []
    for number, line in lines[share[0] :: share[1]]:
        try:
            found.append((number, parse_json(line)))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}, line {number}: expected JSON, found {line[:40]!r} ({error})") from None
    return found


def parse_json(text: str) -> Any:
    """Parses JSON, but refuses an object that has a name twice, and text that UTF-8 can't encode."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{name!r:.80} stands there twice")
            fields[name] = value
        return fields

    fields = json.loads(text, object_pairs_hook=once)
    # Half of a surrogate pair can only be written as an escape.
    if "\\ud" in text.lower():
        json.dumps(fields, ensure_ascii=False).encode()
    return fields


def reason(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def dump_json(fields: Mapping[str, Any]) -> bytes:
    """Returns JSON with sorted keys, as PEFT writes its configs."""
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that replaces it when the block ends, and is removed if the block fails.

    If ``path`` is an empty folder that can't be replaced (a mounted one, the current one), the files are moved into it
    instead.

    Raises:
        AdapterError: ``path`` already contains something, or can't be made or filled.
    """
    target = check_free(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stays = target.is_dir() and (
            target.is_mount() or target.samefile(os.curdir) or not os.access(target.parent, os.W_OK)
        )
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name:.40}.", dir=target if stays else target.parent))
    except OSError as error:
        raise AdapterError(f"{target}: expected a folder that can be made, found {error.strerror}") from None
    try:
        yield draft
        if stays:
            for file in draft.iterdir():
                file.replace(target / file.name)
            draft.rmdir()
            return
        # mkdtemp makes it private; the result must follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o777 & ~umask)
        draft.replace(target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritten(target, error) from None
        raise


def check_free(path: str | os.PathLike) -> Path:
    """Returns a path for output; for a link, the folder that it leads to, since that is the one to replace.

    Raises:
        AdapterError: ``path`` is none, a file, a link to nothing, or a folder that isn't empty.
    """
    target = as_path(path)
    if target.is_dir() and any(target.iterdir()):
        raise AdapterError(f"{target}: expected an empty or new folder, found one that already holds something")
    if os.path.lexists(target) and not target.is_dir():
        found = "a file" if target.exists() else "a link to nothing"
        raise AdapterError(f"{target}: expected an empty or new folder, found {found}")
    return target.resolve() if target.is_symlink() else target


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a draft beside the file and renames it, so that a reader sees either the old or the new file whole."""
    target = Path(path)
    handle, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def open_alone(path: str | os.PathLike) -> IO[bytes]:
    """Opens a new or existing file to read and append, and locks it for this process until it is closed.

    Raises:
        AdapterError: another process has locked it.
    """
    file = open(path, "a+b")  # noqa: SIM115  # the caller closes it
    try:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path) from None
        except OSError:  # a network's file system may not support locks
            pass
        # Whoever held the lock may have removed the file after it was opened here.
        if not (os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise _held(path)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _held(path: str | os.PathLike) -> AdapterError:
    return AdapterError(f"{path}: expected a file that no other process writes, found one that another holds")


def write_files(directory: str | os.PathLike, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes a folder's files: all at once into a new folder, or with ``overwrite`` each in place, others left alone.

    Raises:
        AdapterError: the folder already contains something and ``overwrite`` isn't set, or can't be written to.
    """
    target = as_path(directory)
    if overwrite and target.is_dir():
        try:
            for name, data in files.items():
                write_file(target / name, data)
        except OSError as error:
            raise _unwritten(target, error) from None
        return
    with new_directory(target) as draft:
        for name, data in files.items():
            (draft / name).write_bytes(data)


def _unwritten(target: Path, error: OSError) -> AdapterError:
    return AdapterError(f"{target}: expected a folder that can be written to, found {error.strerror or error}")

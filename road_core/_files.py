"""Reading within a folder, exact bytes, and writing that leaves nothing half done."""

import contextlib
import dataclasses
import json
import math
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

import numpy as np
import safetensors

from road_core._adapter import Array, bfloat16, is_bfloat16
from road_core._errors import AdapterError, listed

DTYPES: dict[str, np.dtype] = {
    "BF16": bfloat16,
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The output head in a checkpoint, and how the names of embeddings end that it may share.
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")

# No config or index comes near this.
_LARGEST_JSON = 1 << 27


def inside(directory: str | os.PathLike, name: str) -> Path:
    """Returns the path of a file that must exist within a folder.

    A link may leave the folder only as the Hugging Face cache makes it, from ``snapshots/*/`` to its own ``blobs/``.

    Raises:
        AdapterError: the folder or the file isn't there, or the name leads out of the folder.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise AdapterError(f"{folder}: expected the name of a file within the folder, found {name!r}")
    path = folder / name
    try:
        there = path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a zero byte
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
        AdapterError: the file can't be read or holds something else.
    """
    try:
        if (size := Path(path).stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"{size} bytes are too many")
        fields = _parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: expected a JSON object, found a file that can't be read ({_reason(error)})"
        ) from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def read_json_lines(path: str | os.PathLike, share: tuple[int, int] = (0, 1)) -> list[tuple[int, Any]]:
    """Returns ``(line number, value)`` for each line of JSON; empty lines are passed over.

    Args:
        path: of the file.
        share: ``(k, n)``: of the lines that aren't empty only each n-th is parsed, from the k-th on.

    Raises:
        AdapterError: the file can't be read or holds no lines, or a line isn't JSON (by its number).
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
            found.append((number, _parse_json(line)))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}, line {number}: expected JSON, found {line[:40]!r} ({error})") from None
    return found


def _parse_json(text: str) -> Any:
    """Parses JSON, but takes no name twice in an object and no text that UTF-8 hasn't."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{name!r:.80} stands there twice")
            fields[name] = value
        return fields

    fields = json.loads(text, object_pairs_hook=once)
    # Half of a surrogate pair can be written as an escape only.
    if "\\ud" in text.lower():
        json.dumps(fields, ensure_ascii=False).encode()
    return fields


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def dump_json(fields: Mapping[str, Any]) -> bytes:
    """Returns JSON with sorted keys, as PEFT writes its configs."""
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads a safetensors file into memory, bfloat16 bit for bit.

    Returns:
        The tensors by name, and the file's metadata.

    Raises:
        AdapterError: the file is truncated, over-long, inconsistent, or holds a dtype that NumPy can't.
    """
    entries, metadata = read_header(path)
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise AdapterError(f"{path}: expected a plain dtype for {name}, found {entry.dtype}")
    start = min((entry.start for entry in entries.values()), default=0)
    tensors: dict[str, Array] = {}
    try:
        data = np.fromfile(path, np.uint8, sum(entry.nbytes for entry in entries.values()), offset=start)
        for name, entry in entries.items():
            own = data[entry.start - start : entry.start - start + entry.nbytes]
            tensor = own.view(DTYPES[entry.dtype]).reshape(entry.shape)
            tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    except (OSError, ValueError) as error:  # cut short meanwhile
        raise _broken(path, error) from None
    return tensors, metadata


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: what its header says, and where its bytes lie in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def map(self) -> Array:
        """Maps the tensor into memory, read-only; a dtype that NumPy hasn't is refused before, by its name."""
        return self.bytes().view(DTYPES[self.dtype]).reshape(self.shape)

    def bytes(self) -> Array:
        """Maps the tensor's bytes into memory, read-only."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,))


# Where each tensor lies, and the file's metadata.
Header = tuple[dict[str, Entry], dict[str, str]]


def read_header(path: str | os.PathLike) -> Header:
    """Reads a safetensors file's header only, in the order of the tensors' bytes.

    Returns:
        Where each tensor lies, and the file's metadata.

    Raises:
        AdapterError: the file is truncated, over-long or inconsistent.
    """
    path = Path(path)
    try:
        # The library checks sizes and offsets against the file.
        with safetensors.safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = _parse_json(file.read(size).decode())
        metadata = dict(header.pop("__metadata__", None) or {})
        entries = {
            name: Entry(path, e["dtype"], tuple(e["shape"]), 8 + size + e["data_offsets"][0], _length(e))
            for name, e in header.items()
        }
        if large := [name for name, entry in entries.items() if not _is_possible(entry.shape)]:
            raise ValueError(f"{large[0]!r:.80} has a shape that NumPy can't")
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _broken(path, error) from None
    return dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata


def read_shards(directory: str | os.PathLike) -> tuple[dict[str, Header], dict[str, Any] | None]:
    """Reads the headers of a checkpoint's ``model.safetensors``, or of the shards that its index names.

    Returns:
        The headers by the files' names, and the index if there is one.

    Raises:
        AdapterError: a file is missing or broken, or the index doesn't fit the shards.
    """
    folder = Path(directory)
    if not (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return {SINGLE: read_header(inside(folder, SINGLE))}, None
    index = read_json(inside(folder, INDEX))
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise AdapterError(f"{folder / INDEX}: expected a weight_map from tensors to files, found none")
    if wrong := sorted({name for name in places.values() if Path(name).name != name}):
        raise AdapterError(f"{folder / INDEX}: expected names of files in the folder, found {wrong[0]!r}")
    headers = {name: read_header(inside(folder, name)) for name in sorted(set(places.values()))}
    if lost := sorted(key for key, name in places.items() if key not in headers[name][0]):
        raise AdapterError(f"{folder / INDEX}: expected tensors where the index says, found no {listed(lost)}")
    return headers, index


def has_own_head(entries: Mapping[str, Entry]) -> bool:
    """Tells whether a checkpoint holds a head that differs from the embedding.

    Then they aren't one, whatever the config says: so transformers 5 decides it.
    """
    head = entries.get(f"{HEAD}.weight")
    embedding = next((entry for name, entry in entries.items() if name.endswith(EMBEDDINGS)), None)
    if head is None or embedding is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    first, second, step = head.bytes(), embedding.bytes(), 1 << 24
    return any(not np.array_equal(first[at : at + step], second[at : at + step]) for at in range(0, head.nbytes, step))


def _length(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return end - start


def _is_possible(shape: tuple[int, ...]) -> bool:
    # An axis of 0 leaves no bytes, and so no bound on the others.
    return len(shape) <= 32 and math.prod(max(size, 1) for size in shape) < 1 << 59


def _broken(path: str | os.PathLike, error: Exception) -> AdapterError:
    return AdapterError(f"{path}: expected a whole safetensors file, found a broken one ({_reason(error)})")


def dump_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file: the same tensors and metadata give the same bytes, whatever their order.

    (The library's own writer leaves the order of the metadata to chance.)

    Raises:
        AdapterError: a dtype that safetensors doesn't have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    little = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<") if array.dtype.kind in "fiu" else None)
        for name, array in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Wide dtypes first keeps every tensor aligned to its own size.
    order = sorted(little, key=lambda name: (-little[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array = little[name]
        dtype = "BF16" if is_bfloat16(array.dtype) else names.get(array.dtype)
        if dtype is None:
            raise AdapterError(f"{name}: expected a dtype that safetensors has, found {array.dtype}")
        # ascontiguousarray makes a scalar one-dimensional; the original's shape is what counts.
        shape = list(np.shape(tensors[name]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(little[name].tobytes() for name in order)])


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that takes its place when the block ends, and is gone if it fails.

    An empty folder that can't be replaced (a mounted one, the current one) gets what is in it instead.

    Raises:
        AdapterError: ``path`` already holds something, or can't be made or filled.
    """
    target = check_free(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stays = target.is_dir() and (
            target.is_mount() or target.samefile(os.curdir) or not os.access(target.parent, os.W_OK)
        )
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target if stays else target.parent))
    except OSError as error:
        raise AdapterError(f"{target}: expected a folder that can be made, found {error.strerror}") from None
    try:
        yield draft
        if stays:
            for file in draft.iterdir():
                file.replace(target / file.name)
            draft.rmdir()
            return
        # mkdtemp makes it private; what is handed over follows the user's umask.
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
    """Returns a place for output; of a link the folder at its end, which is what is replaced.

    Raises:
        AdapterError: ``path`` is a file, a link to nothing, or a folder that isn't empty.
    """
    target = Path(path)
    if target.is_dir() and any(target.iterdir()):
        raise AdapterError(f"{target}: expected an empty or new folder, found one that already holds something")
    if os.path.lexists(target) and not target.is_dir():
        found = "a file" if target.exists() else "a link to nothing"
        raise AdapterError(f"{target}: expected an empty or new folder, found {found}")
    return target.resolve() if target.is_symlink() else target


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file beside its place and renames it, so that a reader sees the old or the new one whole."""
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
    """Opens a file to read and append, new or not, and holds it for this process until it is closed.

    Raises:
        AdapterError: another process holds it.
    """
    file = open(path, "a+b")  # noqa: SIM115  # the caller closes it
    try:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path) from None
        except OSError:  # a network's file system may know no locks
            pass
        # It may have been removed, by who held it, after it was opened here.
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
    """Writes a folder's files: into a new folder at once, or with ``overwrite`` each in place, others left alone.

    Raises:
        AdapterError: the folder already holds something and ``overwrite`` isn't set, or can't be written to.
    """
    target = Path(directory)
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

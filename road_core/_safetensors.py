"""Safetensors files and checkpoints made of them: exact bytes, read strictly, written the same each time."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from road_core._adapter import Array, bfloat16, is_bfloat16
from road_core._errors import AdapterError, listed
from road_core._files import inside, parse_json, read_json, reason

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

# The output head in a checkpoint, and the endings of the names of embeddings that it may share.
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")

# The decoder of a model with vision in transformers 5, and where checkpoints have it and its head.
LANGUAGE_MODEL = "model.language_model."
_MOVED = (("language_model.model.", LANGUAGE_MODEL), (f"language_model.{HEAD}.", f"{HEAD}."))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads a safetensors file into memory, bfloat16 bit for bit.

    Returns:
        The tensors by name, and the file's metadata.

    Raises:
        AdapterError: the file is truncated, too long or inconsistent, or contains a dtype that NumPy doesn't have.
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
    except (OSError, ValueError) as error:  # the file was cut short meanwhile
        raise _broken(path, error) from None
    return tensors, metadata


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: its entry in the header, and where its bytes are in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def map(self) -> Array:
        """Maps the tensor into memory, read-only; callers must have refused dtypes that NumPy doesn't have."""
        return self.bytes().view(DTYPES[self.dtype]).reshape(self.shape)

    def bytes(self) -> Array:
        """Maps the tensor's bytes into memory, read-only."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,))


# Each tensor's entry, and the file's metadata.
Header = tuple[dict[str, Entry], dict[str, str]]


def read_header(path: str | os.PathLike) -> Header:
    """Reads only the header of a safetensors file, in the order of the tensors' bytes.

    Returns:
        Each tensor's entry, and the file's metadata.

    Raises:
        AdapterError: the file is truncated, too long or inconsistent.
    """
    path = Path(path)
    try:
        # The library checks sizes and offsets against the file.
        with safetensors.safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size).decode())
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
        The headers by file name, and the index if there is one.

    Raises:
        AdapterError: a file is missing or broken, or the index doesn't match the shards.
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


def read_entries(directory: str | os.PathLike) -> dict[str, Entry]:
    """Reads the headers of a checkpoint's shards, as `read_shards` does; returns the entries of all by their names."""
    headers, _ = read_shards(directory)
    return {name: entry for entries, _ in headers.values() for name, entry in entries.items()}


def model_name(name: str) -> str:
    """Returns the name that a checkpoint's tensor has in the model; they differ in models with vision."""
    for stored, new in _MOVED:
        if name.startswith(stored):
            return new + name.removeprefix(stored)
    return name


def has_own_head(entries: Mapping[str, Entry]) -> bool:
    """Tells whether a checkpoint contains a head that differs from the embedding.

    If so, the two aren't tied, whatever the config says: transformers 5 decides it in this way.
    """
    head = next((entry for name, entry in entries.items() if model_name(name) == f"{HEAD}.weight"), None)
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
    # An axis of 0 means no bytes, and so no bound on the other axes.
    return len(shape) <= 32 and math.prod(max(size, 1) for size in shape) < 1 << 59


def _broken(path: str | os.PathLike, error: Exception) -> AdapterError:
    return AdapterError(f"{path}: expected a whole safetensors file, found a broken one ({reason(error)})")


def dump_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a safetensors file: the same for the same tensors and metadata, whatever their order.

    (The library's own writer doesn't keep the metadata in a fixed order.)

    Raises:
        AdapterError: a dtype that safetensors doesn't have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    little = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<") if array.dtype.kind in "fiu" else None)
        for name, array in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Putting wide dtypes first keeps every tensor aligned to its own size.
    order = sorted(little, key=lambda name: (-little[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array = little[name]
        dtype = "BF16" if is_bfloat16(array.dtype) else names.get(array.dtype)
        if dtype is None:
            raise AdapterError(f"{name}: expected a dtype that safetensors has, found {array.dtype}")
        # ascontiguousarray makes a scalar one-dimensional, so the shape is taken from the original.
        shape = list(np.shape(tensors[name]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(little[name].tobytes() for name in order)])

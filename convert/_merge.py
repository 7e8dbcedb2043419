"""Writes a merged Hugging Face checkpoint shard by shard: with few rows in memory, and without either framework."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert._families import FAMILIES, LAYER, TABLES, Family
from convert._inspect import read_adapter
from convert._mapping import map_to_torch, natural
from convert._tied import read_model
from road_core import Adapter, AdapterError, coefficients, to_float32
from road_core._adapter import Array, from_float32
from road_core._bitsandbytes import FLOATS, Quantized, fold
from road_core._errors import listed
from road_core._files import check_free, dump_json, inside, read_json, write_file
from road_core._safetensors import DTYPES, EMBEDDINGS, HEAD, INDEX, LANGUAGE_MODEL, Entry, model_name, read_shards

if TYPE_CHECKING:
    from rich.console import Console

_CONFIG = "config.json"
_JOURNAL = "merge.json"

# Files that are copied from a checkpoint's folder, by suffix: not weights, and not code.
_COPIED = (".json", ".jinja", ".md", ".model", ".tiktoken", ".txt")

# Heads that share a bias as well, and models that always assume "tied": the config can't untie these.
_TIED_HEADS = ("cls.predictions.decoder", "lm_head.decoder", "generator_lm_head")
_ALWAYS_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers")

# Architectures whose head may share the embedding: in the first it is called lm_head, in the second other parts share
# it.
_LM_HEADS = ("ForCausalLM", "LMHeadModel")
_OTHER_HEADS = ("ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")

# transformers' Conv1D stores its weight as [in, out].
_CONV1D = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
}

# How many bytes are read, rotated and written at a time, counted in float32.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """``w' = w * first + w[partner] * cross`` along one axis: the rows of a weight, or the entries of a bias."""

    first: NDArray[np.float64]
    cross: NDArray[np.float64]
    partner: NDArray[np.intp]
    axis: int = 0

    @classmethod
    def of(cls, adapter: Adapter, path: str) -> "_Rotation":
        theta, alpha = (to_float32(array) for array in adapter.modules[path])
        config = adapter.config
        first, second = coefficients(theta, alpha, variant=config.variant, group_size=config.group_size)
        index, half = np.arange(len(first)), config.group_size // 2
        lower = index % config.group_size < half
        return cls(first, np.where(lower, -second, second), np.where(lower, index + half, index - half))

    def rows(self, weight: Array | Quantized, wide: np.dtype, start: int, stop: int) -> NDArray[Any]:
        """Returns rows of the rotated weight in the wide dtype."""
        first, cross = self.first.astype(wide), self.cross.astype(wide)
        if self.axis == 0:
            column = (-1,) + (1,) * (len(weight.shape) - 1)
            first, cross = first[start:stop].reshape(column), cross[start:stop].reshape(column)
            own, partner = weight[start:stop], weight[self.partner[start:stop]]
        else:
            own = weight[start:stop]
            partner = own[:, self.partner]
        with np.errstate(over="ignore", invalid="ignore"):
            return _widen(own, wide) * first + _widen(partner, wide) * cross


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the merged checkpoint: the base's tensor, and how it is changed."""

    name: str
    base: Entry | Quantized
    edit: _Rotation | Array | None = None

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yields the merged bytes, a few at a time."""
        if self.edit is None and isinstance(self.base, Entry):
            with self.base.path.open("rb") as file:
                file.seek(self.base.start)
                for done in range(0, self.base.nbytes, _BLOCK):
                    yield file.read(min(_BLOCK, self.base.nbytes - done))
            return
        weight = np.atleast_1d(self.base.map()) if isinstance(self.base, Entry) else self.base
        dtype, length = DTYPES[self.base.dtype], weight.shape[0]
        step = max(1, _BLOCK // max(1, 4 * math.prod(weight.shape[1:])))
        for start in range(0, length, step):
            stop = min(start + step, length)
            if isinstance(self.edit, _Rotation):
                wide = self.edit.rows(weight, _wide(dtype), start, stop)
            else:
                source = weight if self.edit is None else np.atleast_1d(self.edit)
                wide = _widen(source[start:stop], _wide(dtype))
            narrow = from_float32(wide, dtype)
            finite = np.isfinite(_widen(narrow, wide.dtype))
            if not finite.all():
                raise AdapterError(
                    f"{self.name}: expected finite values after merging, "
                    f"found {int((~finite).sum())} that are NaN or infinite"
                )
            yield narrow.tobytes()


def merge(
    checkpoint: str | os.PathLike,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    console: "Console | None" = None,
) -> None:
    """Writes a Hugging Face checkpoint with an adapter merged into it, in closed form.

    A checkpoint that bitsandbytes quantised is written dequantised, without its ``quantization_config``: 4-bit weights
    in the dtype that they were made from, int8 weights in that of ``config.json``.

    Rows ``i`` and ``i + g/2`` of a weight are mixed as the outputs would be, in float32, and rounded once to their
    stored dtype. The same is done to a bias, and a layer without a bias stays without one. Modules that were saved
    whole replace the checkpoint's. Shards keep their names; config and tokenizer files are copied. A head that shares
    the embedding's weight gets one of its own if the adapter changes either.

    Only a few rows are in memory at a time. Until everything is done, the output is kept beside ``out``, in
    ``.NAME.merging``; after an interruption, the same call continues after the last complete shard.

    Args:
        checkpoint: a folder with ``config.json`` and ``model.safetensors``, or shards and their index.
        adapter: a folder with a PEFT or a Flax adapter.
        out: a new or empty folder.
        family: the family of a Flax adapter; None takes that of the checkpoint's ``model_type``.
        console: where progress is shown; None shows none.

    Raises:
        AdapterError: the checkpoint is broken or quantised in another way, a module has no weight in it or one of
            another shape, a result isn't finite, or ``out`` already contains something.

    Example:
        >>> import convert
        >>> convert.merge("checkpoints/smollm2", "adapters/reviews", "merged/reviews")  # doctest: +SKIP
    """
    folder, target = Path(checkpoint), check_free(out)
    config = _config(folder)
    if not _is_plain(config.pop("quantization_config", None)):
        raise AdapterError(
            f"{folder}: expected weights that bitsandbytes quantised or nobody did, found another quantization_config "
            "in config.json; merge into the checkpoint that it was made from"
        )
    headers, index = read_shards(folder)
    shards = {name: entries for name, (entries, _) in headers.items()}
    metadata = {name: metadata for name, (_, metadata) in headers.items()}
    record = _read(adapter, folder, family).cleared()
    try:
        tensors, config = _plan(shards, record, config)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    files = {_CONFIG: dump_json(config), **_others(folder)}
    if index is not None:
        files[INDEX] = dump_json(_new_index(index, tensors))
    # Everything that decides the result: a merge with another base or adapter must not continue from these shards.
    job = hashlib.sha256(record.digest().encode() + files[_CONFIG])
    for name in sorted(shards):
        status = (folder / name).stat()
        job.update(f"\n{folder.resolve() / name} {status.st_size} {status.st_mtime_ns}".encode())
    _write(target, tensors, metadata, files, job.hexdigest(), console)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(inside(folder, _CONFIG))
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise AdapterError(f"{folder / _CONFIG}: architectures: expected a list of names, found {architectures!r:.60}")
    if not isinstance(model_type := config.get("model_type"), str | None):
        raise AdapterError(f"{folder / _CONFIG}: model_type: expected a name, found {model_type!r:.60}")
    return config


def _is_plain(quantization: object) -> bool:
    """True if weights are in floating point, or in bitsandbytes' 4 or 8 bits."""
    if not isinstance(quantization, dict):
        return not quantization
    # Early configs of bitsandbytes don't name the method.
    flags = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return quantization.get("quant_method", "bitsandbytes" if flags else None) == "bitsandbytes"


def _read(directory: str | os.PathLike, checkpoint: Path, family: str | None) -> Adapter:
    kind, adapter = read_adapter(directory)
    adapter.check_no_base_weights(f"merge of {directory}")
    if kind == "PEFT":
        return adapter
    # The adapter's own metadata know the table best; if they and the names leave a choice, the model's type decides.
    config = read_model(checkpoint)
    known = config.get("model_type")
    choices = [family] if family is not None or known not in FAMILIES else [None, known]
    for choice in choices:
        try:
            return map_to_torch(adapter, choice, model=config)
        except AdapterError as found:
            error = found
    raise AdapterError(f"{directory}: {error}")


def _plan(
    shards: Mapping[str, Mapping[str, Entry]], adapter: Adapter, config: dict[str, Any]
) -> tuple[dict[str, list[_Tensor]], dict[str, Any]]:
    """Returns the merged checkpoint's tensors by file, and its config."""
    # LLM.int8 quantises from float16.
    dtype = FLOATS.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
    entries = fold({name: entry for shard in shards.values() for name, entry in shard.items()}, dtype)
    home = {name: file for file, shard in shards.items() for name in shard}
    names = [f"{path}.weight" for path in adapter.modules] + list(adapter.modules_to_save)
    rename = _renaming(names, entries, config.get("model_type"))
    changed = {rename(f"{path}.weight") for path in adapter.modules} | set(map(rename, adapter.modules_to_save))
    if tied := sorted(name for name in changed if name.removesuffix(".weight").endswith(_TIED_HEADS)):
        raise AdapterError(f"expected layers with a weight of their own, found {tied[0]}, which an embedding shares")

    # The head's own weight, if it was the embedding's until now.
    head = rename(f"{HEAD}.weight")
    embeddings = [name for name in entries if name.endswith(EMBEDDINGS)]
    embedding = embeddings[0] if len(embeddings) == 1 else None
    kind = (config.get("architectures") or [""])[0]
    has_lm_head = kind.endswith(_LM_HEADS) or model_name(embedding or "").startswith(LANGUAGE_MODEL)
    if embedding in changed and kind.endswith(_OTHER_HEADS) and not has_lm_head:
        raise AdapterError(f"expected layers with a weight of their own, found {embedding}, which a head may share")
    if head in changed or (embedding in changed and has_lm_head):
        if config.get("model_type") in _ALWAYS_TIED and head not in entries:
            raise AdapterError(f"expected {head}, found none ({config['model_type']} shares it with the embedding)")
        if head not in entries and embedding is not None:
            entries[head], home[head] = entries[embedding], home[embedding]
        config = _untied(config)

    edits: dict[str, _Rotation | Array] = {}
    problems = [f"no {name}" for name in sorted(changed - entries.keys(), key=natural)]
    # bitsandbytes stores these as [out, in], so the dequantised weight would have to be transposed.
    problems += [
        f"{name}, a Conv1D in {entry.kind}"
        for name, entry in entries.items()
        if isinstance(entry, Quantized) and _is_conv1d(name.removesuffix(".weight"), config)
    ]
    for path in adapter.modules:
        rotation = _Rotation.of(adapter, path)
        for leaf in ("weight", "bias"):
            name = rename(f"{path}.{leaf}")
            if name not in entries:
                continue
            turn = rotation
            if leaf == "weight" and _is_conv1d(path, config):
                turn = dataclasses.replace(rotation, axis=1)
            edits[name] = turn
            shape, out = list(entries[name].shape), len(rotation.first)
            if len(shape) != (2 if leaf == "weight" else 1) or shape[turn.axis] != out:
                problems.append(f"{name} {shape} for {out} outputs")
    for key, array in adapter.modules_to_save.items():
        name = rename(key)
        edits[name] = array
        if name in entries and entries[name].shape != array.shape:
            problems.append(f"{name} {list(entries[name].shape)} for {list(array.shape)}")
    for name in sorted(edits.keys() & entries.keys(), key=natural):
        if entries[name].dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} of {entries[name].dtype}")
    if problems:
        raise AdapterError(
            f"expected the adapter's layers, of its sizes and in floating point, found {listed(problems)}"
        )

    tensors: dict[str, list[_Tensor]] = {file: [] for file in shards}
    for name, entry in entries.items():
        tensors[home[name]].append(_Tensor(name, entry, edits.get(name)))
    return tensors, config


def _is_conv1d(path: str, config: Mapping[str, Any]) -> bool:
    return path.rpartition(".")[2] in _CONV1D.get(str(config.get("model_type")), ())


def _renaming(names: Iterable[str], entries: Collection[str], model_type: object) -> Callable[[str], str]:
    """Returns a function from the adapter's names to the checkpoint's.

    A checkpoint of the bare model lacks the first name of the paths (``transformer.``, ``bert.``) that a model with a
    head has, or the other way round; models with vision have other names in checkpoints than in the model, and not all
    of their parts in the same way; and transformers writes some models with the names of an earlier version, which have
    a table of their own. One rule must fit all names.
    """
    stored = {f"model.{name}": name for name in entries}
    stored |= {model_name(name): name for name in entries}
    stored |= {name: name for name in entries}
    wanted = [name for name in names if name.rpartition(".")[0] != HEAD]
    rules: list[Callable[[str], str]] = [lambda name: stored.get(name, name), lambda name: name.partition(".")[2]]
    rules += [f"{prefix}.".__add__ for prefix in dict.fromkeys(name.partition(".")[0] for name in entries)]
    kin = [table for table in TABLES if table.model_type == model_type]
    rules += [functools.partial(_translated, a, b) for a, b in itertools.permutations(kin, 2) if a.style == b.style]
    for rule in rules:
        if all(rule(name) in entries for name in wanted):
            return lambda name: stored.get(name, name) if name.rpartition(".")[0] == HEAD else rule(name)
    return rules[0]


def _translated(before: Family, after: Family, name: str) -> str:
    """Returns a tensor's PyTorch name by another table, by way of its module's path in Flax."""
    path, _, leaf = name.rpartition(".")
    place = before.find_torch(path)
    row = next((row for row in after.rows if place is not None and row.flax == place.row.flax), None)
    return name if row is None or place is None else f"{row.torch.replace(LAYER, str(place.layer))}.{leaf}"


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def _others(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the tokenizer's and other small files."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and (path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE")))
    )
    skipped = (_CONFIG, _JOURNAL)
    return {
        name: inside(folder, name).read_bytes()
        for name in names
        if name not in skipped and not name.endswith(".index.json")
    }


def _new_index(index: Mapping[str, Any], tensors: Mapping[str, list[_Tensor]]) -> dict[str, Any]:
    held = index.get("metadata")
    size = sum(tensor.base.nbytes for shard in tensors.values() for tensor in shard)
    metadata = {**(held if isinstance(held, dict) else {}), "total_size": size}
    return {
        **index,
        "metadata": metadata,
        "weight_map": {tensor.name: file for file, shard in tensors.items() for tensor in shard},
    }


def _write(
    target: Path,
    tensors: Mapping[str, list[_Tensor]],
    metadata: Mapping[str, Mapping[str, str]],
    files: Mapping[str, bytes],
    job: str,
    console: "Console | None",
) -> None:
    """Writes shard after shard into a folder beside the target, and renames that to the target when all are there."""
    draft = target.parent / f".{target.name}.merging"
    total = sum(tensor.base.nbytes for shard in tensors.values() for tensor in shard)
    try:
        done = _resume(draft, job)
        draft.mkdir(parents=True, exist_ok=True)
        with _progress(console, total) as show:
            for name, shard in tensors.items():
                if name in done:
                    show(f"{name}: already there", sum(tensor.base.nbytes for tensor in shard))
                    continue
                digest = _write_shard(draft / name, shard, metadata[name], functools.partial(show, name))
                done[name] = digest
                write_file(draft / _JOURNAL, dump_json({"job": job, "shards": done}))
        for name, data in files.items():
            write_file(draft / name, data)
        (draft / _JOURNAL).unlink(missing_ok=True)
        draft.replace(target)
    except AdapterError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    except OSError as error:
        # Complete shards are kept for the next call.
        raise AdapterError(f"{target}: expected a checkpoint that can be written, found {error.strerror}") from None


def _resume(draft: Path, job: str) -> dict[str, str]:
    """Returns the complete shards of an interrupted merge of the same base and adapter; removes those of any other."""
    if not draft.exists():
        return {}
    with contextlib.suppress(AdapterError):
        journal = read_json(draft / _JOURNAL)
        shards = journal.get("shards")
        if journal.get("job") == job and isinstance(shards, dict):
            return {
                name: digest
                for name, digest in shards.items()
                if Path(name).name == name and (draft / name).is_file() and _digest(draft / name) == digest
            }
    shutil.rmtree(draft)
    return {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(path: Path, shard: list[_Tensor], metadata: Mapping[str, str], show: Callable[[int], None]) -> str:
    """Writes a safetensors file beside its name, renames it, and returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for tensor in shard:
        base = tensor.base
        header[tensor.name] = {
            "dtype": base.dtype,
            "shape": list(base.shape),
            "data_offsets": [end, end + base.nbytes],
        }
        end += base.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            sha.update(data)
        for tensor in shard:
            for block in tensor.blocks():
                file.write(block)
                sha.update(block)
                show(len(block))
    part.replace(path)
    return sha.hexdigest()


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _widen(array: Array, wide: np.dtype) -> NDArray[Any]:
    return (array if array.dtype == np.float64 else to_float32(array)).astype(wide, copy=False)


@contextlib.contextmanager
def _progress(console: "Console | None", total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a function that shows a shard's name and advances the bar by some bytes."""
    if console is None:
        yield lambda text, size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # Outside of a terminal, a transient bar leaves an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, size: bar.update(task, description=text, advance=size)

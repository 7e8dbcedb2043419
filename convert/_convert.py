"""From an adapter folder of one side to one of the other."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from convert._families import Family, tables
from convert._mapping import Trace, map_to_flax, map_to_torch
from convert._orbax import find_step, read_checkpoint
from convert._rules import read_rules
from road_core import Adapter, AdapterError, read_flax, read_peft, write_flax, write_peft
from road_core._files import check_free, inside, read_json

# A table from rules of one's own, and the model's config.json.
_Choice = tuple[Family | None, Mapping[str, Any] | None]


def to_torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    family: str | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    """Writes a Flax adapter as one that PEFT and ``road_torch`` load. No bit of a number changes.

    The layout is told by the tensors: θ of a stack (``model.layers.self_attn.q_proj``) has a layer axis in front, that
    of a numbered layer (``model.layers.0.self_attn.q_proj``) has one axis. The file's metadata keep what PEFT's
    format can't say, so that `to_flax` gives back the same bytes.

    Args:
        src: a folder that ``road-train`` or ``road_jax.save_adapter`` wrote, or one of ``road-train``'s checkpoints
            (``RUN/checkpoints/STEP``); of a run that hasn't ended, the last one.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first whose table knows every key.
        base: the folder of the model, whose ``config.json`` tells the sizes of heads; needed where fused layers are
            split or fused by heads, and for RoPE's interleaved order.
        rules: a file with a table of your own, see `read_rules`.
        overwrite: see ``dst``.
        dry_run: whether to write nothing.

    Returns:
        The mapping: each key's name before and after.

    Raises:
        AdapterError: ``src`` holds no whole adapter, a key has no partner, a shape doesn't fit, or ``dst`` already
            holds something. Nothing is written then.

    Example:
        >>> import convert
        >>> mapping = convert.to_torch("runs/sentiment", "adapters/sentiment")  # doctest: +SKIP
    """
    return _torch(src, dst, family, _choice(family, base, rules), overwrite=overwrite, dry_run=dry_run)


def to_torch_all(
    sources: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    family: str | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, list[tuple[str, str]]]:
    """Writes many Flax adapters as `to_torch` does, each in a folder of its source's name.

    Args:
        sources: folders, each as `to_torch` takes it.
        out: the folder that gets ``out/NAME`` of every source; other folders in there are left alone.
        family: for all of them, as the options below: see `to_torch`.
        base: see `to_torch`.
        rules: see `to_torch`.
        overwrite: whether an adapter in ``out/NAME`` is replaced.
        dry_run: whether to write nothing.

    Returns:
        Each name's mapping.

    Raises:
        AdapterError: there are no sources or two have one name, and nothing is written; or some can't be converted,
            which are named when all the others are written.
    """
    choice = _choice(family, base, rules)
    return _each(sources, out, lambda src, dst: _torch(src, dst, family, choice, overwrite=overwrite, dry_run=dry_run))


def _torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    family: str | None,
    choice: _Choice,
    *,
    overwrite: bool,
    dry_run: bool,
) -> Trace:
    table, model = choice
    adapter = _read_flax(src)
    trace: Trace = []
    try:
        mapped = map_to_torch(adapter, family, rules=table, model=model, trace=trace)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    if dry_run and not overwrite:
        check_free(dst)
    if not dry_run:
        write_peft(dst, mapped, overwrite=overwrite)
    return trace


def to_flax(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    family: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[tuple[str, str]]:
    """Writes an adapter in PEFT's format as one that ``road_jax`` loads: the inverse of `to_torch`.

    Args:
        src: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        dst: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        family: the model family, e.g. ``"llama"``; None takes the first whose table knows every key.
        layout: ``"scanned"`` (layers stacked, the default of ``road_jax.models.load``), ``"unrolled"``, or that of
            another library's Flax models: ``"transformers"``, ``"easydel"``, ``"tunix"``, ``"maxtext"``,
            ``"maxtext-unrolled"``. None takes the layout that the adapter once had in Flax, where its metadata tell,
            else ``"scanned"`` where the family has it.
        layers: how many layers the model has. Only needed to stack an adapter whose config has
            ``layers_to_transform``.
        base: see `to_torch`.
        rules: see `to_torch`.
        overwrite: see ``dst``.
        dry_run: whether to write nothing.

    Returns:
        The mapping: each key's name before and after.

    Raises:
        AdapterError: as `to_torch`; also where layers that are missing, or that differ, can't be stacked.
    """
    choice = _choice(family, base, rules)
    return _flax(src, dst, family, layout, layers, choice, overwrite=overwrite, dry_run=dry_run)


def to_flax_all(
    sources: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    family: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    base: str | os.PathLike | None = None,
    rules: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, list[tuple[str, str]]]:
    """Writes many adapters in PEFT's format as `to_flax` does; the rest as `to_torch_all`, ``layout`` as `to_flax`."""
    choice = _choice(family, base, rules)
    return _each(
        sources,
        out,
        lambda src, dst: _flax(src, dst, family, layout, layers, choice, overwrite=overwrite, dry_run=dry_run),
    )


def _flax(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    family: str | None,
    layout: str | None,
    layers: int | None,
    choice: _Choice,
    *,
    overwrite: bool,
    dry_run: bool,
) -> Trace:
    table, model = choice
    adapter = read_peft(src)
    trace: Trace = []
    try:
        mapped = map_to_flax(adapter, family, layout, layers, rules=table, model=model, trace=trace)
    except AdapterError as error:
        raise AdapterError(f"{src}: {error}") from None
    if dry_run and not overwrite:
        check_free(dst)
    if not dry_run:
        write_flax(dst, mapped, overwrite=overwrite)
    return trace


def _each(
    sources: Iterable[str | os.PathLike], out: str | os.PathLike, convert: Callable[[str | os.PathLike, Path], Trace]
) -> dict[str, Trace]:
    """Converts each source into the folder of its name; those that can't be are told at the end."""
    named: dict[str, list[str | os.PathLike]] = {}
    for src in sources:
        # "runs/a/" and "." have names too.
        named.setdefault(os.path.basename(os.path.abspath(src)), []).append(src)
    if not named:
        raise AdapterError(f"{out}: expected adapters to convert, found none")
    if twice := [", ".join(map(str, some)) for some in named.values() if len(some) > 1]:
        raise AdapterError(f"{out}: expected a name of its own for each adapter, found {'; '.join(twice)}")
    done, failed = {}, []
    for name, (src,) in named.items():
        try:
            done[name] = convert(src, Path(out) / name)
        except AdapterError as error:
            failed.append(f"{name} ({error})")
    if failed:
        raise AdapterError(
            f"{out}: expected {len(named)} adapters that can be converted, "
            f"found {len(failed)} that can't: {'; '.join(failed)}"
        )
    return done


def _read_flax(directory: str | os.PathLike) -> Adapter:
    # A run that has ended has its adapter beside its checkpoints.
    if not (Path(directory) / "road_config.json").is_file() and (step := find_step(directory)):
        return read_checkpoint(step)
    return read_flax(directory)


def _choice(family: str | None, base: str | os.PathLike | None, rules: str | os.PathLike | None) -> _Choice:
    if family is not None and rules is not None:
        raise AdapterError(f"family: expected none beside rules of your own, found {family!r}")
    if family is not None:
        tables(family)  # known at all: said once, not of every adapter
    model = None if base is None else read_json(inside(base, "config.json"))
    if model is not None and isinstance(text := model.get("text_config"), dict):
        model = text
    return None if rules is None else read_rules(rules), model

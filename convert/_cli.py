"""The subcommands of ``road-convert``."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convert import _diff as differences
from convert._compose import compose
from convert._convert import to_flax, to_torch
from convert._inspect import Summary, draw, inspect, read_adapter
from convert._many import convert_all
from convert._merge import merge
from convert._verify import Verification, verify
from road_core import Adapter, AdapterError

_Flax = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FLAX-DIR")]
_Peft = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PEFT-DIR")]
_Either = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
_Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
_Family = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
_Base = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
_Rules = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
_Axis = Annotated[int | None, tyro.conf.arg(metavar="N")]
_Every = Annotated[bool, tyro.conf.arg(name="all")]
_Layout = Literal["scanned", "unrolled", "transformers", "easydel", "tunix", "maxtext", "maxtext-unrolled"]


def main() -> None:
    """Parses the command line and runs one of the subcommands."""
    tyro.extras.subcommand_cli_from_dict(
        {
            "to-torch": _to_torch,
            "to-flax": _to_flax,
            "inspect": _inspect,
            "diff": _diff,
            "verify": _verify,
            "merge": _merge,
            "compose": _compose,
        },
        prog="road-convert",
        description="RoAd adapters from Flax to PyTorch and back.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _to_torch(
    flax_dir: _Flax,
    out: _Out,
    /,
    *,
    family: _Family = None,
    base: _Base = None,
    rules: _Rules = None,
    overwrite: bool = False,
    dry_run: bool = False,
    every: _Every = False,
) -> None:
    """Writes a Flax adapter in the format that PEFT and road_torch load.

    Args:
        flax_dir: folder of the Flax adapter, or of one of road-train's checkpoints.
        out: new or empty folder.
        family: model family, e.g. llama; by default the first one that knows every module.
        base: folder of the model; needed only where the sizes of its heads, or whether its head is tied, matter.
        rules: TOML or JSON file with a conversion table of your own.
        overwrite: replace an adapter that is already there.
        dry_run: print the whole mapping and write nothing.
        every: convert every adapter in the folder, each to a folder of the same name in OUT.
    """
    options = dict[str, Any](family=family, base=base, rules=rules, overwrite=overwrite, dry_run=dry_run)
    _convert(to_torch, flax_dir, out, options, every)


def _to_flax(
    peft_dir: _Peft,
    out: _Out,
    /,
    *,
    family: _Family = None,
    layout: _Layout | None = None,
    layers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    base: _Base = None,
    rules: _Rules = None,
    overwrite: bool = False,
    dry_run: bool = False,
    every: _Every = False,
) -> None:
    """Writes an adapter in PEFT's format as a Flax adapter.

    Args:
        peft_dir: folder of the adapter in PEFT's format.
        out: new or empty folder.
        family: model family, e.g. llama; by default the first one that knows every module.
        layout: layers stacked, one path per layer, or another library's layout; by default the adapter's former layout
            in Flax, or else stacked.
        layers: number of layers in the model, if no base is given; only needed to stack an adapter with
            layers_to_transform.
        base: folder of the model, for the sizes of its heads, whether its output head is tied, and its number of
            layers.
        rules: TOML or JSON file with a conversion table of your own.
        overwrite: replace an adapter that is already there.
        dry_run: print the whole mapping and write nothing.
        every: convert every adapter in the folder, each to a folder of the same name in OUT.
    """
    options = dict[str, Any](
        family=family, layout=layout, layers=layers, base=base, rules=rules, overwrite=overwrite, dry_run=dry_run
    )
    _convert(to_flax, peft_dir, out, options, every)


def _inspect(
    directory: _Either,
    /,
    *,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None,
    axis: _Axis = None,
) -> None:
    """Prints an adapter of either format: its config, modules, sizes, angles and scales.

    Args:
        directory: folder of the adapter.
        plot: PNG file to draw its rotations to.
        axis: the axis of θ with a layer's own parameters, in stacks of a Flax model of your own; by default the last.
    """
    summary = inspect(directory, axis=axis)
    if plot is not None:
        draw(summary.adapter, plot, axis=summary.axis)
    console = _console()
    _show(summary, directory, console)
    if plot is not None:
        _say(console, f"picture: {plot}")


def _diff(
    first: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    second: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    /,
    *,
    family: _Family = None,
    tolerance: float = 0.0,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None,
    axis: _Axis = None,
) -> None:
    """Prints how two adapters differ, by module and layer.

    The exit code is 0 if they are the same function and 1 if they aren't.

    Args:
        first: folder of an adapter, of either format.
        second: folder of the other adapter.
        family: model family of a Flax adapter, if the two formats or layouts differ.
        tolerance: greatest difference allowed in θ, α and tensors that are saved whole.
        plot: PNG file to draw the differences to.
        axis: the axis of θ with a layer's own parameters, in stacks of a Flax model of your own; by default the last.
    """
    if not tolerance >= 0:
        raise AdapterError(f"tolerance: expected a number from 0 up, found {tolerance}")
    found = differences.diff(first, second, family=family, axis=axis)
    if plot is not None:
        differences.draw(found, plot)
    console = _console()
    for name, (before, after) in found.fields.items():
        _say(console, f"{name}: {json.dumps(before, ensure_ascii=False)} | {json.dumps(after, ensure_ascii=False)}")
    for folder, keys in ((first, found.first_only), (second, found.second_only)):
        for key in keys:
            _say(console, f"only in {folder}: {key}")
    names = ("mean |Δθ|", "max |Δθ|", "mean |Δα|", "max |Δα|")
    rows = [
        (module.path, *(f"{n:.4g}" for n in (module.mean_angle, module.max_angle, module.mean_scale, module.max_scale)))
        for module in found.modules
        if max(module.max_angle, module.max_scale) > tolerance
    ]
    if rows:
        console.print(_table(names, rows))
    for key, greatest in found.saved.items():
        if greatest > tolerance:
            _say(console, f"saved whole: {key} differs by up to {greatest:.4g}")
    if plot is not None:
        _say(console, f"picture: {plot}")
    if not found.same(tolerance):
        sys.exit(1)


def _verify(
    flax_dir: _Flax,
    peft_dir: _Peft,
    /,
    *,
    base: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    tolerance: float = 1e-4,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Runs both adapters on the same tokens, each in its framework, and compares the logits.

    The exit code is 0 within the tolerance and 1 beyond it.

    Args:
        flax_dir: folder of the Flax adapter.
        peft_dir: folder of the adapter in PEFT's format.
        base: folder of the Hugging Face checkpoint.
        tolerance: greatest difference allowed, relative to the greatest logit.
        prompt: text to run instead of the built-in prompts; may be given several times.
    """
    result = verify(flax_dir, peft_dir, base, tolerance=tolerance, prompts=prompt or None, console=Console(stderr=True))
    _report(result, _console())
    if not result.passed:
        sys.exit(1)


def _compose(
    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="A B [C ...] OUT")],
    /,
    *,
    weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="W ...")] = (),
    axis: _Axis = None,
    overwrite: bool = False,
) -> None:
    """Writes one adapter that applies others one after the other, A first.

    Args:
        folders: adapters, all in Flax's or all in PEFT's format, followed by a new or empty folder.
        weights: how often each adapter is applied, by default 1; give them after the folders. -1 undoes an adapter.
        axis: the axis of θ with a layer's own parameters, in stacks of a Flax model of your own; by default the last.
        overwrite: replace an adapter that is already there.
    """
    if len(folders) < 2:
        raise AdapterError(f"compose: expected adapters and a folder to write, found {len(folders)} folders")
    *sources, out = folders
    compose(sources, out, weights=weights or None, axis=axis, overwrite=overwrite)
    _done(out)


def _merge(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")],
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")],
    out: _Out,
    /,
    *,
    family: _Family = None,
) -> None:
    """Writes a Hugging Face checkpoint with an adapter merged into it, shard by shard.

    After an interruption, the same command continues after the last complete shard.

    Args:
        checkpoint: folder of the Hugging Face checkpoint; weights that bitsandbytes quantised are written dequantised.
        adapter: folder of the adapter, of either format.
        out: new or empty folder.
        family: model family of a Flax adapter; by default the checkpoint's.
    """
    merge(checkpoint, adapter, out, family=family, console=Console(stderr=True))
    _say(_console(), f"merged checkpoint: {out}")


def _console() -> Console:
    """Returns a console that is wide enough for tables if the output isn't a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)


def _say(console: Console, text: str) -> None:
    """Prints a line unwrapped and without markup; control codes, which a file may contain, are replaced."""
    console.print(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), markup=False, soft_wrap=True
    )


def _convert(
    one: Callable[..., list[tuple[str, str]]], src: Path, out: Path, options: dict[str, Any], every: bool
) -> None:
    """Converts one adapter or a folder of them, and prints what was or would be written."""
    if every:
        names = convert_all(src, out, one, console=Console(stderr=True), **options)
        done = "can be converted" if options["dry_run"] else f"converted: {out}"
        _say(_console(), f"{len(names)} adapters {done}")
    elif options["dry_run"]:
        for before, after in one(src, out, **options):
            _say(_console(), f"{before} -> {after}")
    else:
        one(src, out, **options)
        _done(out)


def _done(out: Path) -> None:
    """Prints what was written."""
    kind, adapter = read_adapter(out)
    _say(_console(), f"{kind} adapter, {_modules(adapter)}: {out}")


def _modules(adapter: Adapter) -> str:
    count, parameters = len(adapter.modules), sum(theta.size + alpha.size for theta, alpha in adapter.modules.values())
    return f"{count} module{'s' if count > 1 else ''}, {parameters:,} parameters"


def _show(summary: Summary, directory: Path, console: Console) -> None:
    adapter = summary.adapter
    saved = f" and {summary.saved_parameters:,} in modules saved whole" if adapter.modules_to_save else ""
    size = f"{summary.nbytes / 1024:,.1f} KiB"
    _say(console, f"{directory}: {summary.kind} adapter, {_modules(adapter)}{saved}, {size}")
    for name, value in adapter.config.to_dict().items():
        if value is not None:
            _say(console, f"  {name}: {json.dumps(value, ensure_ascii=False)}")
    for name, value in sorted(adapter.metadata.items()):
        _say(console, f"  metadata {name}: {value}")
    names = ("outputs", "shape", "dtype", "mean |θ|", "max |θ|", "min α", "max α")
    rows = []
    for module in summary.modules:
        numbers = (module.mean_angle, module.max_angle, module.min_scale, module.max_scale)
        values = (f"{value:.4f}" for value in numbers)
        rows.append((module.path, str(module.outputs), str(list(module.shape)), module.dtype, *values))
    console.print(_table(names, rows))
    for path, array in sorted(adapter.modules_to_save.items()):
        _say(console, f"saved whole: {path} {list(array.shape)}")
    for path, array in sorted(adapter.base_weights.items()):
        _say(console, f"weights of the base: {path} {list(array.shape)}")


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table with one module per row and its numbers under ``names``."""
    table = Table(box=None, pad_edge=False)
    # In a narrow terminal, paths are folded and numbers stay whole.
    table.add_column("module", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _report(result: Verification, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    relative = result.max_difference / result.scale if result.scale else float("nan")
    rows = {
        "greatest difference of a logit": f"{result.max_difference:.3e} ({relative:.1e} of the greatest logit)",
        "mean difference": f"{result.mean_difference:.3e}",
        "greatest difference without the adapter": f"{result.base_difference:.3e}",
        "greatest logit": f"{result.scale:.3f}",
        "the adapter moves a logit by up to": f"{result.moved:.3f}",
        "same greedy next token": f"{result.greedy_agreement:.1%} of {result.positions} positions",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    verdict = "within" if result.passed else "past"
    _say(console, f"{verdict} the tolerance of {result.tolerance:g} of the greatest logit")
    if not result.telling:
        _say(console, "note: the adapter hardly moves the logits, so this comparison shows little")

"""The ``road-convert`` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convert._compose import compose
from convert._convert import to_flax, to_torch
from convert._inspect import Summary, draw, inspect
from convert._verify import Verification, verify
from road_core import AdapterError
from road_core._command import run

_Flax = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FLAX-DIR")]
_Peft = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PEFT-DIR")]
_Either = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
_Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
_Family = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


def main() -> None:
    """Parses the command line and runs one of the subcommands."""
    run(_main)


def _main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"to-torch": _to_torch, "to-flax": _to_flax, "inspect": _inspect, "verify": _verify, "compose": _compose},
        prog="road-convert",
        description="RoAd adapters from Flax to PyTorch and back.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _to_torch(flax_dir: _Flax, out: _Out, /, *, family: _Family = None, overwrite: bool = False) -> None:
    """Writes a Flax adapter in the format that PEFT and road_torch load.

    Args:
        flax_dir: folder of the Flax adapter.
        out: new or empty folder.
        family: model family, e.g. llama; by default the first one that knows every module.
        overwrite: replace an adapter that is already there.
    """
    to_torch(flax_dir, out, family=family, overwrite=overwrite)
    _done(out)


def _to_flax(
    peft_dir: _Peft,
    out: _Out,
    /,
    *,
    family: _Family = None,
    layout: Literal["scanned", "unrolled"] | None = None,
    layers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter in PEFT's format as a Flax adapter.

    Args:
        peft_dir: folder of the adapter in PEFT's format.
        out: new or empty folder.
        family: model family, e.g. llama; by default the first one that knows every module.
        layout: layers stacked, or a path a layer; by default as the adapter once was in Flax, else stacked.
        layers: how many layers the model has; only needed to stack an adapter with layers_to_transform.
        overwrite: replace an adapter that is already there.
    """
    to_flax(peft_dir, out, family=family, layout=layout, layers=layers, overwrite=overwrite)
    _done(out)


def _inspect(directory: _Either, /, *, plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None) -> None:
    """Prints an adapter of either format: its config, modules, sizes, angles and scales.

    Args:
        directory: folder of the adapter.
        plot: a PNG to draw its rotations to.
    """
    summary = inspect(directory)
    if plot is not None:
        draw(summary.adapter, plot)
    console = _console()
    _show(summary, directory, console)
    if plot is not None:
        _say(console, f"picture: {plot}")


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

    The exit code is 0 within the tolerance and 1 past it.

    Args:
        flax_dir: folder of the Flax adapter.
        peft_dir: folder of the adapter in PEFT's format.
        base: folder of the Hugging Face checkpoint.
        tolerance: what may differ, relative to the greatest logit.
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
    overwrite: bool = False,
) -> None:
    """Writes the adapter that does what others do one after the other, A first.

    Args:
        folders: adapters, all of Flax or all in PEFT's format, and after them a new or empty folder.
        weights: how often each is applied, by default 1; after the folders. -1 undoes an adapter.
        overwrite: replace an adapter that is already there.
    """
    if len(folders) < 2:
        raise AdapterError(f"compose: expected adapters and a folder to write, found {len(folders)} folders")
    *sources, out = folders
    compose(sources, out, weights=weights or None, overwrite=overwrite)
    _done(out)


def _console() -> Console:
    """Wide enough for a table where nobody looks at a terminal's width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)


def _say(console: Console, text: str) -> None:
    """Prints a line as it is: unwrapped, without markup, and without the control codes that a file may hold."""
    console.print(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), markup=False, soft_wrap=True
    )


def _done(out: Path) -> None:
    summary = inspect(out)
    _say(_console(), f"{summary.kind} adapter, {_modules(summary)}: {out}")


def _modules(summary: Summary) -> str:
    count = len(summary.modules)
    return f"{count} module{'s' if count > 1 else ''}, {summary.parameters:,} parameters"


def _show(summary: Summary, directory: Path, console: Console) -> None:
    adapter = summary.adapter
    saved = f" and {summary.saved_parameters:,} in modules saved whole" if adapter.modules_to_save else ""
    size = f"{summary.nbytes / 1024:,.1f} KiB"
    _say(console, f"{directory}: {summary.kind} adapter, {_modules(summary)}{saved}, {size}")
    for name, value in adapter.config.to_dict().items():
        if value is not None:
            _say(console, f"  {name}: {json.dumps(value, ensure_ascii=False)}")
    for name, value in sorted(adapter.metadata.items()):
        _say(console, f"  metadata {name}: {value}")
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for name in ("outputs", "shape", "dtype", "mean |θ|", "max |θ|", "min α", "max α"):
        table.add_column(name, justify="right", no_wrap=True)
    for module in summary.modules:
        numbers = (module.mean_angle, module.max_angle, module.min_scale, module.max_scale)
        shape = escape(str(list(module.shape)))
        table.add_row(
            escape(module.path), str(module.outputs), shape, module.dtype, *(f"{value:.4f}" for value in numbers)
        )
    console.print(table)
    for path, array in sorted(adapter.modules_to_save.items()):
        _say(console, f"saved whole: {path} {list(array.shape)}")


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


if __name__ == "__main__":
    main()

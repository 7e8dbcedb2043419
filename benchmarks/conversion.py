"""Times converting a folder of adapters in one call, against copying its files.

The adapters have SmolLM2-135M's shapes (RoAd 1 on all linear layers, float32) and random values, which don't affect the
time. Each round converts all of them to PyTorch's format and back on one core, and copies the same folders with
`shutil`; all files are in the page cache. A conversion reads, checks and hashes every number. Writes
``benchmarks/results/conversion.json``.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import convert
from benchmarks._common import RESULTS, device, median_ratios, settings, write
from road_core import Adapter, RoadConfig, write_flax

OUTPUTS = {
    **{f"self_attn.{name}_proj": size for name, size in (("q", 576), ("k", 192), ("v", 192), ("o", 576))},
    **{f"mlp.{name}_proj": size for name, size in (("gate", 1536), ("up", 1536), ("down", 576))},
}
LAYERS = 30


@dataclasses.dataclass(frozen=True)
class Options:
    """Times a conversion of many adapters in one call against copying them."""

    adapters: int = 1000
    rounds: int = 3
    # Folder for the figures.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    times: dict[str, list[float]] = {"copy": [], "to-torch": [], "to-flax": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in track(range(options.adapters), "adapters", console=console):
            write_flax(folder / "flax" / f"adapter_{i}", _adapter(i))
        size = sum(path.stat().st_size for path in (folder / "flax").rglob("*") if path.is_file())
        for _ in track(range(options.rounds), "rounds", console=console):
            runs: dict[str, Callable[[], Any]] = {
                "copy": lambda: shutil.copytree(folder / "flax", folder / "copy"),
                "to-torch": lambda: convert.convert_all(folder / "flax", folder / "torch", convert.to_torch),
                "to-flax": lambda: convert.convert_all(folder / "torch", folder / "back", convert.to_flax),
            }
            for arm, run in runs.items():
                start = time.perf_counter()
                run()
                times[arm].append(time.perf_counter() - start)
            for made in ("copy", "torch", "back"):
                shutil.rmtree(folder / made)
    ratios = median_ratios(times, "copy")
    arms = {
        arm: {
            "seconds": statistics.median(own),
            "milliseconds_an_adapter": 1000 * statistics.median(own) / options.adapters,
            "ratio": ratios[arm][0],
            "ratios": ratios[arm][1],
        }
        for arm, own in times.items()
    }
    results = {
        "device": device("numpy"),
        "options": settings(options),
        "bytes_an_adapter": size / options.adapters,
        "arms": arms,
    }
    write(options.out / "conversion.json", results)
    shown = Table(
        title=f"{options.adapters:,} adapters of {size / options.adapters / 1e6:.2f} MB", caption=device("numpy")
    )
    for column in ("", "seconds", "ms an adapter", "time / copy"):
        shown.add_column(column, justify="right")
    for arm, found in arms.items():
        values = found["seconds"], found["milliseconds_an_adapter"], found["ratio"]
        shown.add_row(arm, *(f"{value:.2f}" for value in values))
    console.print(shown)
    console.print(f"{options.out / 'conversion.json'}")


def _adapter(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {
        f"model.layers.{name}": (
            rng.normal(0, 0.1, (LAYERS, size // 2)).astype(np.float32),
            rng.normal(1, 0.1, (LAYERS, size // 2)).astype(np.float32),
        )
        for name, size in OUTPUTS.items()
    }
    return Adapter(RoadConfig(target_modules="all-linear"), modules)


if __name__ == "__main__":
    main()

"""Converting many adapters in one call, against a copy of the same folders.

Adapters of SmolLM2-135M's shape, all linear layers, road_1, float32. Arms, one after the other in every round:

- ``copy``: ``shutil.copytree`` of each folder;
- ``convert``: `convert.to_flax_all` of the folders in PEFT's format, and `convert.to_torch_all` of their results.

Each is told as a ratio to the copy of the same folders in the same round, by the clock and by the processor's time of
this process, which other processes disturb less. Files come from memory: they were written just before. Writes
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
from rich.table import Table

import convert
from benchmarks._common import RESULTS, device, median_ratios, write
from road_core import Adapter, RoadConfig, write_peft

# Outputs of SmolLM2-135M's linear layers, in 30 layers.
OUTPUTS = {
    "self_attn.q_proj": 576,
    "self_attn.k_proj": 192,
    "self_attn.v_proj": 192,
    "self_attn.o_proj": 576,
    "mlp.gate_proj": 1536,
    "mlp.up_proj": 1536,
    "mlp.down_proj": 576,
}
LAYERS = 30


@dataclasses.dataclass(frozen=True)
class Options:
    """Times conversions in both directions."""

    # Adapters in a call.
    adapters: int = 1000
    # Every arm runs once a round.
    rounds: int = 3
    # Where the figures go.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_adapters(root / "torch", options.adapters)
        times = {
            **timed("to-flax", root / "torch", root / "flax", convert.to_flax_all, options.rounds),
            **timed("to-torch", root / "flax", root / "again", convert.to_torch_all, options.rounds),
        }
        for first in (root / "torch").rglob("*.*"):
            if first.read_bytes() != (root / "again" / first.relative_to(root / "torch")).read_bytes():
                raise SystemExit(f"error: {first.name} of {first.parent.name} did not come back")
        size = sum(file.stat().st_size for file in (root / "torch").rglob("*.*"))
    results: dict[str, Any] = {
        "device": device(),
        "adapters": options.adapters,
        "rounds": options.rounds,
        "bytes": size,
        "times": times,
        "ratios": {direction: median_ratios(arms, "copy") for direction, arms in times.items()},
    }
    write(options.out / "conversion.json", results)
    console.print(table(results))
    console.print(f"{options.out / 'conversion.json'}")


def save_adapters(folder: Path, count: int) -> None:
    """Writes adapters of random θ and α in PEFT's format."""
    rng = np.random.default_rng(0)
    config = RoadConfig(target_modules="all-linear")
    for number in range(count):
        modules = {
            f"model.layers.{layer}.{name}": (rng.random(out // 2, np.float32), rng.random(out // 2, np.float32))
            for layer in range(LAYERS)
            for name, out in OUTPUTS.items()
        }
        write_peft(folder / f"{number:04}", Adapter(config, modules))


def timed(
    direction: str, source: Path, target: Path, call: Callable[..., Any], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each arm's rounds by both clocks; what the last one converted stays in ``target``."""
    sources = sorted(source.iterdir())
    copies = target.with_name("copies")

    def copy() -> None:
        for each in sources:
            shutil.copytree(each, copies / each.name)

    clocks = {direction: time.perf_counter, f"{direction}, processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {name: {"copy": [], "convert": []} for name in clocks}
    for _ in range(rounds):
        for arm, run in (("copy", copy), ("convert", lambda: call(sources, target))):
            shutil.rmtree(target if arm == "convert" else copies, ignore_errors=True)
            starts = {name: clock() for name, clock in clocks.items()}
            run()
            for name, clock in clocks.items():
                times[name][arm].append(clock() - starts[name])
    shutil.rmtree(copies)
    return times


def table(results: dict[str, Any]) -> Table:
    """The figures, those of the copy beside them."""
    shown = Table(title=f"{results['adapters']} adapters, {results['bytes'] / 1e6:.0f} MB", caption=results["device"])
    for column in ("direction", "arm", "seconds", "a second", "ratio", "spread"):
        shown.add_column(column, justify="left" if column in ("direction", "arm") else "right")
    for direction, arms in results["ratios"].items():
        for arm, (ratio, spread) in arms.items():
            seconds = statistics.median(results["times"][direction][arm])
            between = f"{min(spread):.2f}–{max(spread):.2f}"
            rate = f"{results['adapters'] / seconds:.0f}"
            shown.add_row(direction, arm, f"{seconds:.2f}", rate, f"{ratio:.2f}", between)
    return shown


if __name__ == "__main__":
    main()

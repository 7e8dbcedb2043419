"""Times the rotation of one layer's output against a copy of it: how much memory bandwidth each implementation reaches.

Each row of ``[rows, tokens, out]`` has its own adapter, and each implementation gets the tables of all adapters and an
index:

- ``copy``: ``result.copy_(y)``, which reads and writes each output once;
- ``default``: plain PyTorch, in place, as inference uses it on a CPU;
- ``compiled``: the same through ``torch.compile``, as in a compiled model, but with no other operations to fuse with;
- ``triton``: the Triton kernel, in place, as inference uses it on a GPU; left out without a GPU;
- ``PEFT RoAd``: what PEFT's layer does to its base's output in a mixed batch, with PEFT's own functions.

In each round every arm runs once, in random order. A figure is an arm's bandwidth divided by that of the copy in the
same round, as the median over rounds. Only bytes that have to move are counted: the output is read and written, and the
rows' float32 coefficients are read. An arm that moves more gets a smaller figure. With one token a row there is so
little to move that calls and launches are timed, not bandwidth.

On a GPU a prompt is longer, and each call takes the next of several outputs and tables, which together are too large
for the GPU's cache; in a model, too, other layers come between two calls. Writes ``benchmarks/results/kernel.json`` and
``.png``; on a GPU their names include the GPU's.
"""

import dataclasses
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from peft.tuners.road.layer import _apply_road
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks._common import RESULTS, device, draw_panels, settings, write
from road_torch import _kernels
from road_torch._kernels import default

GROUP_SIZE = 64
COPY = "copy"
# Shapes of one layer's output: in decoding, and for a prompt, whose bytes far exceed the caches.
SHAPES = {
    "cpu": {"a token a row": (32, 1, 4096), "a prompt": (32, 256, 4096)},
    "cuda": {"a token a row": (32, 1, 4096), "a prompt": (32, 4096, 4096)},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Times the rotation of one layer's output against a copy of it."""

    # Number of rounds; every arm runs once per round.
    rounds: int = 30
    # Folder for the figures.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"device": device(), "options": settings(options), "cases": {}}
    for what, shape in SHAPES[where.type].items():
        for name, dtype in DTYPES.items():
            results["cases"][f"{what}, {name}"] = measure(shape, dtype, where, options.rounds, console)
    console.print(table(results))
    own = f"_{re.sub(r'[^a-z0-9]+', '_', torch.cuda.get_device_name().lower())}" if where.type == "cuda" else ""
    path = options.out / f"kernel{own}.json"
    write(path, results)
    shown = {
        case: {arm: row["bandwidth_ratio"] for arm, row in arms.items()} for case, arms in results["cases"].items()
    }
    title = f"Rotating one layer's output, 32 rows of 4096 with 32 adapters\n{results['device']}"
    draw_panels({"bandwidth / copy": shown}, path.with_suffix(".png"), title=title)
    console.print(f"{path} and .png")


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, where: torch.device, rounds: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Returns each arm's seconds, its bandwidth, and the ratio of that to the copy's."""
    with torch.inference_mode():
        arms = _arms(shape, dtype, where)
        for call in arms.values():
            call()
            call()
        random.seed(0)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in track(range(rounds), f"{list(shape)} {dtype}", console=console):
            for arm in random.sample([*arms], len(arms)):
                times[arm].append(_seconds(arms[arm], where))
    outputs = 2 * dtype.itemsize * shape[0] * shape[1] * shape[2]
    coefficients = 2 * 4 * shape[0] * shape[2]
    moved = {arm: outputs + (0 if arm == COPY else coefficients) for arm in arms}
    ratios = {
        arm: [moved[arm] / own / (moved[COPY] / copy) for own, copy in zip(times[arm], times[COPY], strict=True)]
        for arm in arms
    }
    return {
        arm: {
            "bandwidth_ratio": statistics.median(ratios[arm]),
            "bandwidth_ratios": ratios[arm],
            "gigabytes_per_second": moved[arm] / statistics.median(times[arm]) / 1e9,
            "seconds": statistics.median(times[arm]),
        }
        for arm in arms
    }


def _arms(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> dict[str, Call]:
    rows, _, out = shape
    torch.manual_seed(0)
    # The copy reads one output and writes the next. All arms rotate the same outputs again and again; α = 1 keeps the
    # values in range.
    sets = range(_sets(shape, dtype, where))
    outputs = [torch.randn(shape, device=where, dtype=dtype) for _ in range(len(sets) + 1)]
    thetas, alpha = [torch.randn(rows, out // 2, device=where) for _ in sets], torch.ones(rows, out // 2, device=where)
    tables = [default.coefficients(theta, alpha, "road_1", GROUP_SIZE) for theta in thetas]
    # Shuffled, like the rows of a batch.
    index = torch.randperm(rows, device=where)
    compiled = torch.compile(default.rotate, dynamic=False)
    arms: dict[str, Callable[[int], Any]] = {
        COPY: lambda i: outputs[i + 1].copy_(outputs[i]),
        "default": lambda i: default.rotate_(outputs[i], *tables[i], GROUP_SIZE, index),
        "compiled": lambda i: compiled(outputs[i], *tables[i], GROUP_SIZE, index),
    }
    if (kernel := _kernels.choose("auto", where)) is not _kernels.DEFAULT:
        prepared = [kernel.prepare_(*pair, GROUP_SIZE, index) for pair in tables]
        arms["triton"] = lambda i: prepared[i](outputs[i])
    # In the base's dtype, with which PEFT's mixed batch is fastest.
    ours, ones, order = [theta.to(dtype) for theta in thetas], alpha.to(dtype), index.tolist()

    def peft_mixed(i: int) -> Tensor:
        result = outputs[i]
        for row, adapter in enumerate(order):
            result[[row]] = _apply_road("road_1", GROUP_SIZE, ours[i][adapter], ones[adapter], result[[row]])
        return result

    arms["PEFT RoAd"] = peft_mixed
    for arm, call in arms.items():
        _check(arm, call, outputs[0], tables[0], index)
    return {arm: _in_turn(call, sets) for arm, call in arms.items()}


def _sets(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> int:
    """Returns how many outputs and tables are needed so that none is still in a GPU's cache when its turn comes."""
    if where.type == "cpu":
        return 1
    rows, tokens, out = shape
    cache = torch.cuda.get_device_properties(where).L2_cache_size
    return 2 + 4 * cache // (rows * out * (tokens * dtype.itemsize + 2 * 4))


def _in_turn(call: Callable[[int], Any], sets: range) -> Call:
    turns = itertools.cycle(sets)
    return lambda: call(next(turns))


def _check(arm: str, call: Callable[[int], Any], output: Tensor, table: tuple[Tensor, Tensor], index: Tensor) -> None:
    """Checks that an arm's result agrees with the rotation in float64, for a row's first tokens."""
    before = output[:, :64].double()
    expected = before if arm == COPY else default.rotate(before, *(part.double() for part in table), GROUP_SIZE, index)
    # The tolerance allows for PEFT, which computes cosines and sines in the output's dtype.
    near = 2e-2 if output.dtype is torch.bfloat16 else 1e-5
    error = (call(0)[:, :64].double() - expected).norm() / expected.norm()
    if error > near:
        raise SystemExit(f"{arm}: expected the rotation to within {near}, found an error of {error:.2e}")


def _seconds(call: Call, where: torch.device) -> float:
    """Times one call. On a GPU it times twenty by the GPU's clock.

    Launches are hidden as far as they take less time than the GPU is kept busy beforehand and by earlier calls. PEFT's
    hundreds of launches per call take longer, where there is one token a row.
    """
    if where.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the GPU busy for some milliseconds, until most arms' calls are launched.
    torch.cuda._sleep(20_000_000)
    begin.record()
    for _ in range(20):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / 20


def table(results: dict[str, Any]) -> Table:
    """Returns a table of the figures of all cases."""
    cases = results["cases"]
    shown = Table(title="bandwidth over that of a copy", caption=results["device"])
    shown.add_column("arm")
    for case in cases:
        shown.add_column(case, justify="right")
    for arm in next(iter(cases.values())):
        shown.add_row(arm, *(f"{rows[arm]['bandwidth_ratio']:.2f}" for rows in cases.values()))
    return shown


if __name__ == "__main__":
    main()

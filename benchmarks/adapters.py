"""Merging, unmerging, loading and swapping adapters, and their memory, against PEFT and a copy of the weights.

SmolLM2-135M-Instruct, adapters on all linear layers, in float32 and bfloat16. Arms, one after the other in every round:

- ``copy``: every adapted layer's weight is cloned, and the clones are held as merged weights are;
- ``road_torch`` and ``PEFT RoAd``: ``merge_adapter(safe_merge=True)``, then ``unmerge_adapter``; ``load_adapter`` from
  the same folder; and to put another adapter in a loaded one's place: ``hotswap_adapter``, which PEFT has for LoRA
  only, so that there it is ``delete_adapter`` and ``load_adapter``.

Merging and unmerging are told as ratios to the copy of the same round, loading and swapping as ratios to PEFT. Memory
is what tensors hold. Writes ``benchmarks/results/adapters.json`` and ``.png``.
"""

import contextlib
import ctypes
import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks._common import RESULTS, bars, device, median_ratios, write
from examples.demo.model import prepare_model
from road_torch import RoadConfig, RoadModel, load

DTYPES = ("float32", "bfloat16")
# Shapes of a 7B model, Llama 2's: outputs of each layer's q, k, v, o, gate, up and down, in 32 layers.
SEVEN_B = (4096, 4096, 4096, 4096, 11008, 11008, 4096) * 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Times what is done to adapters, not with them."""

    # Every arm runs once a round.
    rounds: int = 5
    # Where the model is kept.
    cache: Path = Path("runs/cache")
    # Where the figures go.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    checkpoint = prepare_model(options.cache / "smollm2-135m-instruct", options.cache, console=console)
    results: dict[str, Any] = {"device": device(), "rounds": options.rounds, "times": {}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = save_adapter(checkpoint, Path(folder) / "adapter")
        for dtype in DTYPES:
            results["times"][dtype] = times(checkpoint, saved, dtype, options.rounds, console)
            gc.collect()
    results["memory"] = memory(checkpoint)
    results["ratios"] = {dtype: ratios(found) for dtype, found in results["times"].items()}
    write(options.out / "adapters.json", results)
    console.print(table(results))
    bars(
        {
            f"{step}\n{dtype}": {
                arm: results["ratios"][dtype][step][arm][0] for arm in ("road_torch", "PEFT RoAd") if arm in found
            }
            for dtype in DTYPES
            for step, found in results["ratios"][dtype].items()
            if step == "merge"
        },
        options.out / "adapters.png",
        title=f"Merging adapters of all linears, SmolLM2-135M\n{results['device']}",
        of="copy of the weights",
    )
    console.print(f"{options.out / 'adapters.json'} and .png")


def save_adapter(checkpoint: Path, folder: Path) -> Path:
    """Writes an adapter that is not the identity, in PEFT's format."""
    torch.manual_seed(0)
    model = RoadModel(load(checkpoint, dtype="float32")[0], RoadConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def times(
    checkpoint: Path, saved: Path, dtype: str, rounds: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Returns for each step and arm the seconds of each round."""
    import peft

    ours = RoadModel.from_pretrained(load(checkpoint, dtype=dtype)[0], saved, adapter_name="a").eval()
    theirs = peft.PeftModel.from_pretrained(load(checkpoint, dtype=dtype)[0], saved, adapter_name="a").eval()
    weights = [layer.weight for layer in ours.modules() if hasattr(layer, "road_theta")]
    steps: dict[str, dict[str, list[float]]] = {step: {} for step in ("merge", "unmerge", "load", "swap")}

    def timed(step: str, arm: str, call: Callable[[], Any]) -> Any:
        # What an arm has left over is not the next one's to clear up, or to write to: all get fresh memory.
        gc.collect()
        _give_back()
        start = time.perf_counter()
        result = call()
        steps[step].setdefault(arm, []).append(time.perf_counter() - start)
        return result

    def swap() -> None:
        theirs.delete_adapter("b")
        theirs.load_adapter(saved, adapter_name="b")

    with torch.no_grad(), Progress(console=console) as bar:
        # A first round, not counted, warms allocators and imports.
        for number in bar.track(range(rounds + 1), description=dtype):
            held = timed("merge", "copy", lambda: [weight.clone() for weight in weights])
            del held
            for arm, model in (("road_torch", ours), ("PEFT RoAd", theirs)):
                timed("merge", arm, lambda model=model: model.merge_adapter(safe_merge=True))
                timed("unmerge", arm, lambda model=model: model.unmerge_adapter())
                timed("load", arm, lambda model=model: model.load_adapter(saved, adapter_name="b"))
            timed("swap", "road_torch", lambda: ours.hotswap_adapter(saved, "b"))
            timed("swap", "PEFT RoAd", swap)
            ours.delete_adapter("b")
            theirs.delete_adapter("b")
            if number == 0:
                for arms in steps.values():
                    arms.clear()
    steps["unmerge"]["copy"] = steps["merge"]["copy"]
    return steps


def _give_back() -> None:
    """Returns free memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def ratios(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Returns for each step the arms' medians over the copy or, where nothing is copied, over PEFT, and all ratios."""
    return {step: median_ratios(arms, "copy" if "copy" in arms else "PEFT RoAd") for step, arms in found.items()}


def memory(checkpoint: Path, adapters: int = 31) -> dict[str, float]:
    """Returns the bytes of an adapter: of its parameters, and of its row in the tables, measured and for a 7B."""
    model = RoadModel(load(checkpoint, dtype="float32")[0])
    empty = _held(model)
    for i in range(adapters):
        model.add_adapter(f"a{i}", RoadConfig(target_modules="all-linear", inference_mode=True))
    parameters = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "road_" in n) / adapters
    out = sum(SEVEN_B)
    return {
        "parameters, SmolLM2-135M": parameters,
        "parameters and tables, SmolLM2-135M": (_held(model) - empty) / adapters,
        # θ and α are out/2 each, a row of the two tables is out each, all float32.
        "parameters, 7B": out * 4,
        "parameters and tables, 7B": out * 4 * 3,
    }


def _held(model: RoadModel) -> int:
    tensors = {id(p): p for p in model.parameters()}
    for layer in model.modules():
        if hasattr(layer, "road_theta"):
            tensors |= {id(table): table for table in (layer.bank.first, layer.bank.cross)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def table(results: dict[str, Any]) -> Table:
    """The figures, with those of PEFT beside them."""
    shown = Table(title="SmolLM2-135M, adapters on all linears", caption=results["device"])
    for column in ("dtype", "step", "arm", "seconds", "ratio", "spread", "to"):
        shown.add_column(column, justify="right" if column in ("seconds", "ratio", "spread") else "left")
    for dtype, steps in results["ratios"].items():
        for step, arms in steps.items():
            of = "copy" if "copy" in arms else "PEFT RoAd"
            for arm, (ratio, spread) in arms.items():
                seconds = statistics.median(results["times"][dtype][step][arm])
                if (step, arm) != ("unmerge", "copy"):
                    between = f"{min(spread):.2f}–{max(spread):.2f}"
                    shown.add_row(dtype, step, arm, f"{seconds:.4f}", f"{ratio:.2f}", between, of)
    for what, size in results["memory"].items():
        shown.add_row("float32", "memory", what, f"{size / 1e6:.2f} MB", "", "", "")
    return shown


if __name__ == "__main__":
    main()

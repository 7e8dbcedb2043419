"""Times merging, unmerging, loading and swapping adapters, and their memory, against PEFT and a copy of the weights.

The model is SmolLM2-135M-Instruct with adapters on all linear layers, in float32, bfloat16, nf4 and int8. In every
round the arms run one after another:

- ``copy``: clones every adapted layer's weight, or its codes, and keeps the clones as merged weights are kept;
- ``road_torch``, ``PEFT RoAd`` and ``PEFT LoRA r8``: ``merge_adapter(safe_merge=True)``, then ``unmerge_adapter``;
  ``load_adapter`` from a folder; and replacing a loaded adapter by ``hotswap_adapter``. PEFT has the latter for LoRA
  only, so its RoAd uses ``delete_adapter`` and ``load_adapter``.

Times of merging and unmerging are divided by that of the copy in the same round, times of loading and swapping by that
of PEFT's RoAd. Memory is what tensors hold. Writes ``benchmarks/results/adapters.json`` and ``.png``.
"""

import contextlib
import ctypes
import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks._common import RESULTS, device, draw_panels, median_ratios, write
from examples.demo.model import prepare_model
from road_torch import RoadConfig, RoadModel, load

# Name, quantisation and dtype.
BASES = (
    ("float32", None, "float32"),
    ("bfloat16", None, "bfloat16"),
    ("nf4", "nf4", "bfloat16"),
    ("int8", "int8", "bfloat16"),
)
ROAD, LORA = "PEFT RoAd", "PEFT LoRA r8"
# Outputs of q, k, v, o, gate, up and down in the 32 layers of a 7B model (Llama 2).
SEVEN_B = (4096, 4096, 4096, 4096, 11008, 11008, 4096) * 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Times merging, unmerging, loading and swapping adapters."""

    # Number of rounds; every arm runs once per round.
    rounds: int = 5
    # Folder for the model.
    cache: Path = Path("runs/cache")
    # Folder for the figures.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    checkpoint = prepare_model(options.cache / "smollm2-135m-instruct", options.cache, console=console)
    results: dict[str, Any] = {"device": device(), "rounds": options.rounds, "times": {}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        road, lora = save_adapter(checkpoint, Path(folder) / "road"), save_lora(checkpoint, Path(folder) / "lora")
        for name, quantize, dtype in BASES:
            bases = [load(checkpoint, quantize=quantize, dtype=dtype)[0] for _ in range(3)]
            results["times"][name] = times(bases, road, lora, name, options.rounds, console)
            gc.collect()
        results["memory"] = memory(checkpoint, lora)
    results["ratios"] = {name: ratios(found) for name, found in results["times"].items()}
    write(options.out / "adapters.json", results)
    console.print(table(results))
    draw(results, options.out / "adapters.png")
    console.print(f"{options.out / 'adapters.json'} and .png")


def save_adapter(checkpoint: Path, folder: Path) -> Path:
    """Writes a RoAd adapter that isn't the identity, in PEFT's format."""
    torch.manual_seed(0)
    model = RoadModel(load(checkpoint, dtype="float32")[0], RoadConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def save_lora(checkpoint: Path, folder: Path) -> Path:
    """Writes a LoRA adapter that isn't the identity."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, init_lora_weights=False)
    peft.get_peft_model(load(checkpoint, dtype="float32")[0], config).save_pretrained(folder)
    return folder


def times(
    bases: Sequence[Any], road: Path, lora: Path, name: str, rounds: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each round, by step and arm."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    ours = RoadModel.from_pretrained(bases[0], road, adapter_name="a").eval()
    theirs = peft.PeftModel.from_pretrained(bases[1], road, adapter_name="a").eval()
    loras = peft.PeftModel.from_pretrained(bases[2], lora, adapter_name="a").eval()
    models = {"road_torch": (ours, road), ROAD: (theirs, road), LORA: (loras, lora)}
    weights = [layer.weight for layer in ours.modules() if hasattr(layer, "road_theta")]
    steps: dict[str, dict[str, list[float]]] = {step: {} for step in ("merge", "unmerge", "load", "swap")}

    def timed(step: str, arm: str, call: Callable[[], Any]) -> Any:
        # All arms start with fresh memory: none clears up, or reuses, what the previous one left.
        gc.collect()
        _give_back()
        start = time.perf_counter()
        result = call()
        steps[step].setdefault(arm, []).append(time.perf_counter() - start)
        return result

    def swap() -> None:
        theirs.delete_adapter("b")
        theirs.load_adapter(road, adapter_name="b")

    with torch.no_grad(), Progress(console=console) as bar:
        # The first round isn't counted; it warms up allocators and imports.
        for number in bar.track(range(rounds + 1), description=name):
            held = timed("merge", "copy", lambda: [weight.clone() for weight in weights])
            del held
            for arm, (model, saved) in models.items():
                timed("merge", arm, lambda model=model: model.merge_adapter(safe_merge=True))
                timed("unmerge", arm, lambda model=model: model.unmerge_adapter())
                timed("load", arm, lambda model=model, saved=saved: model.load_adapter(saved, adapter_name="b"))
            timed("swap", "road_torch", lambda: ours.hotswap_adapter(road, "b"))
            timed("swap", ROAD, swap)
            timed("swap", LORA, lambda: hotswap_adapter(loras, str(lora), "b"))
            for model, _ in models.values():
                model.delete_adapter("b")
            if number == 0:
                for arms in steps.values():
                    arms.clear()
    steps["unmerge"]["copy"] = steps["merge"]["copy"]
    return steps


def _give_back() -> None:
    """Returns free memory to the system if the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def ratios(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Returns for each step the arms' ratios to the copy (without a copy: to PEFT's RoAd), as medians and in full."""
    return {step: median_ratios(arms, "copy" if "copy" in arms else ROAD) for step, arms in found.items()}


def memory(checkpoint: Path, lora: Path) -> dict[str, float]:
    """Returns the bytes of an adapter's parameters and of its rows in the tables: measured, and computed for 7B.

    Tables grow by doubling: they are full with 31 adapters and half empty with 32.
    """
    import peft

    model = RoadModel(load(checkpoint, dtype="float32")[0])
    empty = _held(model)
    found: dict[str, float] = {"the base, SmolLM2-135M": empty}
    for i in range(32):
        model.add_adapter(f"a{i}", RoadConfig(target_modules="all-linear", inference_mode=True))
        if i in (30, 31):
            found[f"{i + 1} adapters with tables, SmolLM2-135M, of one"] = (_held(model) - empty) / (i + 1)
    loras = peft.PeftModel.from_pretrained(load(checkpoint, dtype="float32")[0], lora)
    out = sum(SEVEN_B)
    return {
        **found,
        "parameters, SmolLM2-135M": _bytes(model, "road_") / 32,
        f"parameters of {LORA}, SmolLM2-135M": _bytes(loras, "lora_"),
        # Per layer θ and α have out/2 elements each, and a row has out in each of the two tables, all float32.
        "parameters, 7B": out * 4,
        "parameters and full tables, 7B": out * 4 * 3,
    }


def _bytes(model: torch.nn.Module, mark: str) -> int:
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if mark in name)


def _held(model: RoadModel) -> int:
    tensors = {id(p): p for p in model.parameters()}
    for layer in model.modules():
        if hasattr(layer, "road_theta"):
            tensors |= {id(table): table for table in (layer.bank.first, layer.bank.cross)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def table(results: dict[str, Any]) -> Table:
    """Returns a table of the figures of all arms."""
    shown = Table(title="SmolLM2-135M, adapters on all linears", caption=results["device"])
    for column in ("base", "step", "arm", "seconds", "ratio", "spread", "to"):
        shown.add_column(column, justify="right" if column in ("seconds", "ratio", "spread") else "left")
    for dtype, steps in results["ratios"].items():
        for step, arms in steps.items():
            of = "copy" if "copy" in arms else ROAD
            for arm, (ratio, spread) in arms.items():
                seconds = statistics.median(results["times"][dtype][step][arm])
                if (step, arm) != ("unmerge", "copy"):
                    between = f"{min(spread):.2f}–{max(spread):.2f}"
                    shown.add_row(dtype, step, arm, f"{seconds:.4f}", f"{ratio:.2f}", between, of)
    for what, size in results["memory"].items():
        shown.add_row("float32", "memory", what, f"{size / 1e6:.2f} MB", "", "", "")
    return shown


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws each step's ratios and the memory of an adapter."""
    arms = ("road_torch", ROAD, LORA)
    shown = {
        f"{step} / {'copy' if 'merge' in step else ROAD}": {
            base: {arm: found[step][arm][0] for arm in arms} for base, found in results["ratios"].items()
        }
        for step in ("merge", "unmerge", "load", "swap")
    }
    sizes = results["memory"]
    full, half = (sizes[f"{count} adapters with tables, SmolLM2-135M, of one"] for count in (31, 32))
    shown["MB an adapter"] = {
        "parameters": {
            "road_torch": sizes["parameters, SmolLM2-135M"] / 1e6,
            ROAD: sizes["parameters, SmolLM2-135M"] / 1e6,
            LORA: sizes[f"parameters of {LORA}, SmolLM2-135M"] / 1e6,
        },
        "with full tables": {"road_torch": full / 1e6},
        "with half-full ones": {"road_torch": half / 1e6},
    }
    draw_panels(shown, path, title=f"Adapters of all linears, SmolLM2-135M, {results['device']}", log=True)


if __name__ == "__main__":
    main()

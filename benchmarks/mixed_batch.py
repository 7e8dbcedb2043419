"""Times decoding a batch in which every row has its own adapter, against the bare model and PEFT.

The model is SmolLM2-135M-Instruct, by default with 8 rows and adapters on all linear layers. All parameters are frozen
in every arm, and each arm runs in a separate process:

- ``bare``: the model without adapters;
- ``road_torch``: one active adapter for all rows, and a mixed batch with as many adapters as rows;
- ``PEFT RoAd``, ``PEFT LoRA r8``: the same.

The arms take turns at every token, in random order, so that a busy machine slows all of them. A figure is an arm's time
divided by the bare model's in the same round, as the median over rounds. Decoding is the time from the first new token
to the last, without the prompt. The time to the first token is measured separately, in generations that end there. With
``--compiled`` every arm decodes as transformers compiles it, with a cache of fixed size and one graph per step. Writes
``benchmarks/results/mixed_batch.json`` and ``.png``; other names for other rows, targets, ``--compiled`` or
``--random-weights``.
"""

import copy
import dataclasses
import importlib.util
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import peft
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks._common import RESULTS, Arm, device, reason, settings, sort_out, write
from benchmarks._model import checkpoint, described
from road_torch import RoadConfig, RoadModel, load

TARGETS: dict[str, Any] = {"all-linear": "all-linear", "qv": ["q_proj", "v_proj"]}
# name, quantisation, dtype of the computation
BASES = [
    ("fp32", None, "float32"),
    ("bf16", None, "bfloat16"),
    ("nf4, bf16", "nf4", "bfloat16"),
    ("int8, bf16", "int8", "bfloat16"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Times decoding a batch with a different adapter for each row, against the bare model and PEFT."""

    # Number of rows in the batch, and of adapters.
    rows: int = 8
    # Layers with adapters: all linear ones, or q_proj and v_proj.
    targets: Literal["all-linear", "qv"] = "all-linear"
    # Numbers of prompt tokens and of new tokens.
    prompt_tokens: int = 16
    new_tokens: int = 17
    # Whether to compile decoding in all arms (torch.compile, inductor).
    compiled: bool = False
    # Number of rounds; every arm generates once per round.
    rounds: int = 5
    # Bases to run; all if none is named.
    only: tuple[str, ...] = ()
    # Models to run besides the bare one; all if none is named. PEFT's loops over adapters take many minutes to compile.
    arms: tuple[str, ...] = ()
    # Whether to take random weights in the model's shape; then nothing is fetched.
    random_weights: bool = False
    # Folder for the model.
    cache: Path = Path("runs/cache")
    # Folder for the figures.
    out: Path = RESULTS

    @property
    def adapters(self) -> list[str]:
        """The adapters' names."""
        return [f"adapter_{i}" for i in range(self.rows)]

    @property
    def mixed(self) -> str:
        """The suffix of the mixed arms' names."""
        return f", {self.rows} mixed"

    @property
    def title(self) -> str:
        """The part of the titles that is the same for all bases."""
        how = ", compiled" if self.compiled else ""
        return f"batch {self.rows}, adapters on {'all linears' if self.targets == 'all-linear' else 'q and v'}{how}"

    @property
    def path(self) -> Path:
        """The path of the figures without a suffix."""
        plain = (self.rows, self.targets) == (8, "all-linear")
        name = "mixed_batch" if plain else f"mixed_batch_{self.rows}_{self.targets}"
        name += "_compiled" if self.compiled else ""
        return self.out / (name + ("_random" if self.random_weights else ""))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    folder = checkpoint(options.cache, console, random_weights=options.random_weights)
    results: dict[str, Any] = {
        "device": device(),
        "options": settings(options),
        "bases": {},
    }
    for name, quantize, dtype in BASES:
        if not options.only or name in options.only:
            results["bases"][name] = measure(folder, name, quantize, dtype, options, console)
            console.print(table(f"{name}, {options.title}", results["bases"][name], results["device"]))
            # After each base, so that an interrupted run keeps its results.
            write(options.path.with_suffix(".json"), results)
    draw(results, options)
    console.print(f"{options.path}.json and .png")


def measure(
    folder: Path, name: str, quantize: str | None, dtype: str, options: Options, console: Console
) -> dict[str, dict[str, Any]]:
    """Returns each arm's times and ratios, or the reason why it failed."""
    wanted = [
        (label, way)
        for label in _makers(options)
        if not options.arms or label in ("bare", *options.arms)
        for way in (("",) if label == "bare" else (", one", options.mixed))
    ]
    if quantize and importlib.util.find_spec("bitsandbytes") is None:
        return {label + way: {"failed": "bitsandbytes isn't installed"} for label, way in wanted}
    begun = {
        label + way: Arm(_serve, folder, quantize, dtype, label, mixed=way == options.mixed, options=options)
        for label, way in wanted
    }
    arms, failed = sort_out(begun)
    if "bare" in failed:
        for arm, process in arms.items():
            process.tell("stop")
            failed[arm] = "there are no times of the bare model"
        arms = {}
    random.seed(0)
    firsts: dict[str, list[float]] = {arm: [] for arm in arms}
    decodes: dict[str, list[float]] = {arm: [] for arm in arms}
    with Progress(console=console) as bar:
        task = bar.add_task(f"{name}: {len(arms)} arms", total=options.rounds * (options.new_tokens + 1))
        for _ in range(options.rounds):
            for arm in random.sample([*arms], len(arms)):
                firsts[arm].append(arms[arm].ask("first"))
            bar.advance(task)
        for _ in range(options.rounds):
            for arm in arms:
                arms[arm].tell("generate")
                decodes[arm].append(0.0)
            for number in range(options.new_tokens):
                # An arm is affected by what the previous one left in the caches, so the order changes each time.
                for arm in random.sample([*arms], len(arms)):
                    seconds = arms[arm].ask("token")
                    decodes[arm][-1] += seconds if number else 0.0
                bar.advance(task)
            for arm in arms:
                arms[arm].ask("end")
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        ratios = [own / bare for own, bare in zip(decodes[arm], decodes["bare"], strict=True)]
        seconds = statistics.median(decodes[arm])
        found[arm] = {
            "decode_ratio": statistics.median(ratios),
            "decode_ratios": ratios,
            "first_token_ratio": statistics.median(
                own / bare for own, bare in zip(firsts[arm], firsts["bare"], strict=True)
            ),
            "decode_seconds": seconds,
            "tokens_per_second": options.rows * (options.new_tokens - 1) / seconds,
        }
    for arm in arms.values():
        arm.tell("stop")
    return {**found, **{arm: {"failed": why} for arm, why in failed.items()}}


def _serve(
    pipe: Any, folder: Path, quantize: str | None, dtype: str, label: str, *, mixed: bool, options: Options
) -> None:
    """Follows an `Arm`'s orders; answers with seconds."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        # Frozen, as in all arms.
        model = _makers(options)[label](load(folder, quantize=quantize, dtype=dtype)[0]).eval().requires_grad_(False)
    except Exception as error:
        pipe.send(reason(error))
        return
    kwargs: dict[str, Any] = {"adapter_names": options.adapters} if mixed else {}
    if options.compiled:
        kwargs["cache_implementation"] = "static"
        # No dynamic sizes, because the cache's size is fixed; CUDA graphs on a GPU.
        mode = "reduce-overhead" if torch.cuda.is_available() else "default"
        kwargs["compile_config"] = transformers.CompileConfig(fullgraph=False, dynamic=False, mode=mode)
        # On a CPU transformers compiles only if told to.
        kwargs["compile_config"]._compile_all_devices = True
    ids = (torch.arange(options.rows * options.prompt_tokens) * 37 % 4000 + 1000).view(options.rows, -1)
    ids = ids.to(model.device)
    start = 0.0

    def generate(tokens: int, *criteria: Callable[..., torch.Tensor]) -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList(criteria),
                **kwargs,
            )

    def passed() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def token(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        nonlocal start
        pipe.send(passed())
        pipe.recv()
        start = time.perf_counter()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    try:
        generate(2)
    except Exception as error:  # a peer that can't do it is a result
        pipe.send(reason(error))
        return
    pipe.send(None)
    while (order := pipe.recv()) != "stop":
        if order == "first":
            start = time.perf_counter()
            generate(1)
            pipe.send(passed())
        else:
            pipe.recv()
            start = time.perf_counter()
            generate(options.new_tokens, token)
            pipe.send(passed())


def _makers(options: Options) -> dict[str, Callable[[Any], Any]]:
    targets = TARGETS[options.targets]
    return {
        "bare": lambda base: base,
        "road_torch": lambda base: _ours(base, options),
        "PEFT RoAd": lambda base: _peft(base, peft.RoadConfig(target_modules=targets), options),
        "PEFT LoRA r8": lambda base: _peft(base, peft.LoraConfig(target_modules=targets, r=8, lora_alpha=16), options),
    }


def _ours(base: Any, options: Options) -> RoadModel:
    model = RoadModel(base)
    for name in options.adapters:
        model.add_adapter(name, RoadConfig(target_modules=TARGETS[options.targets], inference_mode=True))
    return _noisy(model)


def _peft(base: Any, config: Any, options: Options) -> Any:
    first, *others = options.adapters
    # Adapters in the base's dtype: PEFT's mixed batch fails with float32 adapters on a bfloat16 layer.
    model = peft.get_peft_model(base, copy.deepcopy(config), adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, copy.deepcopy(config), autocast_adapter_dtype=False)
    dtype = next(p.dtype for p in base.parameters() if p.dtype.is_floating_point)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "road_" in name:
            parameter.data = parameter.data.to(dtype)
    return _noisy(model)


@torch.no_grad()
def _noisy(model: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "road_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def table(title: str, arms: dict[str, dict[str, Any]], machine: str) -> Table:
    """Returns a table of one base's figures."""
    shown = Table(title=title, caption=machine)
    for column in ("arm", "decode / bare", "spread", "first token / bare", "tokens/s"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, row in arms.items():
        if "failed" in row:
            shown.add_row(arm, "fails", row["failed"][:40], "", "")
            continue
        spread = f"{min(row['decode_ratios']):.2f}–{max(row['decode_ratios']):.2f}"
        ratio, first = f"{row['decode_ratio']:.2f}", f"{row['first_token_ratio']:.2f}"
        shown.add_row(arm, ratio, spread, first, f"{row['tokens_per_second']:.0f}")
    return shown


def draw(results: dict[str, Any], options: Options) -> None:
    """Draws ratios to the bare model's times, for decoding and for the first token, with one group of bars per base."""
    bases = results["bases"]
    arms = [arm for arm in next(iter(bases.values())) if arm != "bare"]
    figure, axes = plt.subplots(2, figsize=(9, 7.5), layout="constrained")
    width = 0.8 / len(arms)
    colours = {"road_torch": "#1b7f5c", "PEFT RoAd": "#c2572b", "PEFT LoRA r8": "#6b6fb3"}
    for axis, what in zip(axes, ("decode", "first token"), strict=True):
        for i, arm in enumerate(sorted(arms, key=lambda arm: (options.mixed in arm, arm), reverse=True)):
            values = [bases[base].get(arm, {}).get(f"{what.replace(' ', '_')}_ratio") for base in bases]
            at = [x + (i - (len(arms) - 1) / 2) * width for x in range(len(bases))]
            bars = axis.bar(
                at,
                [v or 0 for v in values],
                width,
                label=arm,
                color=colours[arm.partition(",")[0]],
                alpha=1 if options.mixed in arm else 0.5,
            )
            axis.bar_label(bars, [f"{v:.2f}" if v else "fails" for v in values], fontsize=7, rotation=90, padding=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(bases)), list(bases))
        axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
        axis.set_ylabel(f"{what} time / bare model")
    model = described(random_weights=options.random_weights)
    axes[0].set_title(f"{model}, {options.title}\n{results['device']}", fontsize=9)
    axes[0].legend(fontsize=8, ncols=2)
    figure.savefig(options.path.with_suffix(".png"), dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

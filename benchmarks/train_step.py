"""A training step in Flax against PEFT in PyTorch: the same model, the same tokens, the same threads.

SmolLM2-135M-Instruct in float32, adapters on all linear layers, AdamW. Two workloads:

- ``same work``: rows without padding, a loss at every token. Losses and adapter sizes are checked to be equal.
- ``a task``: real lines of film reviews with a loss on the answers. Flax packs them and computes logits where there is
  a loss, as ``road-train`` does; PEFT pads a batch of them to its longest line.

Arms take turns within a round, so that a busy machine slows all of them. A figure is the median over the rounds of an
arm's time over that of ``Flax RoAd`` in the same round; for ``a task`` it is time per line. Writes
``benchmarks/results/train_step.json`` and ``.png``.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import road_jax
from benchmarks._common import RESULTS, bars, device, median_ratios, settings, write
from benchmarks._lines import lines_of, pad
from examples.demo import tasks
from examples.demo.model import prepare_model
from road_jax import RoadConfig, models
from road_jax.train import _data, _step

OURS = "Flax RoAd"


@dataclasses.dataclass(frozen=True)
class Options:
    """Times training steps of RoAd in Flax against PEFT's RoAd and LoRA in PyTorch."""

    # Rows and tokens a row of a step; the task's batches have as many places.
    rows: int = 4
    length: int = 128
    # Every arm takes a step a round.
    rounds: int = 7
    # Where the model and data are kept.
    cache: Path = Path("runs/cache")
    # Where the figures go.
    out: Path = RESULTS


# A step: takes nothing, gives the loss.
Step = Callable[[], float]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    checkpoint = prepare_model(options.cache / "smollm2-135m-instruct", options.cache, console=console)
    results: dict[str, Any] = {"device": device(), "options": settings(options)}
    for name, make in (("same work", _same_work), ("a task", _task)):
        arms, lines = make(checkpoint, options, console)
        results[name] = measure(name, arms, lines, options.rounds, console)
        console.print(table(name, results[name], results["device"]))
        del arms
        gc.collect()
    write(options.out / "train_step.json", results)
    shown = {name: {arm: row["ratio"] for arm, row in results[name].items()} for name in ("same work", "a task")}
    bars(shown, options.out / "train_step.png", title=f"Training SmolLM2-135M, float32\n{results['device']}", of=OURS)
    console.print(f"{options.out / 'train_step.json'} and .png")


def measure(
    name: str, arms: dict[str, Step], lines: dict[str, int], rounds: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Returns each arm's seconds a step and its time a line over ours; every arm is warmed up first."""
    losses = {arm: step() for arm, step in arms.items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with Progress(console=console) as bar:
        task = bar.add_task(f"{name}: {rounds} rounds of {len(arms)} arms", total=rounds * len(arms))
        for number in range(rounds):
            order = [*arms][number % len(arms) :] + [*arms][: number % len(arms)]
            for arm in order:
                start = time.perf_counter()
                arms[arm]()
                times[arm].append((time.perf_counter() - start) / lines[arm])
                bar.advance(task)
    ratios = median_ratios(times, OURS)
    return {
        arm: {
            "ratio": ratios[arm][0],
            "ratios": ratios[arm][1],
            "seconds_per_step": statistics.median(times[arm]) * lines[arm],
            "lines_per_second": 1 / statistics.median(times[arm]),
            "first_loss": losses[arm],
        }
        for arm in arms
    }


def _same_work(checkpoint: Path, options: Options, console: Console) -> tuple[dict[str, Step], dict[str, int]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 40000, (options.rows, options.length)).astype(np.int32)
    everywhere = np.tile(np.arange(options.length - 1, dtype=np.int32), (options.rows, 1))
    ones = np.ones_like(ids)
    batch = _data.Batch(ids, ones, everywhere, ids[:, 1:], np.ones(everywhere.shape, np.float32))
    arms = {OURS: _flax(checkpoint, [batch])}
    labels = torch.from_numpy(ids).long()
    torch_batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    for name, config in _peers().items():
        arms[name] = _torch(checkpoint, config, [torch_batch])
    found = {name: step() for name, step in arms.items()}
    if max(found.values()) - min(found.values()) > 1e-3 * min(found.values()):
        raise SystemExit(f"same work: expected one loss in every arm, found {found}")
    return arms, dict.fromkeys(arms, options.rows)


def _task(checkpoint: Path, options: Options, console: Console) -> tuple[dict[str, Step], dict[str, int]]:
    """Batches of real lines, as many as fill a step's rows when packed; the peers get the same lines."""
    task = tasks.sentiment(options.cache, console)
    path, _ = task.write(options.cache / "benchmark")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    examples = _data.tokenize(_data.read_lines(path), tokenizer, str(path))
    packed, padded, counts = [], [], []
    for element in _data.packed(examples, rows=options.rows, length=options.length, seed=0, epochs=1):
        batch = _data.to_batch(element, options.rows)
        held = lines_of(element, examples)
        if len(packed) == 4:
            break
        packed.append(batch)
        padded.append(pad(held))
        counts.append(len(held))
    arms = {OURS: _flax(checkpoint, packed)}
    for name, config in _peers().items():
        arms[name] = _torch(checkpoint, config, padded)
    # Steps go through the same batches in the same order, so lines a step are those of all of them on average.
    return arms, dict.fromkeys(arms, round(statistics.mean(counts)))


def _flax(checkpoint: Path, batches: list[_data.Batch]) -> Step:
    module, variables = models.load(checkpoint, dtype=jnp.float32)
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear"))
    # On the host, for the step gives its state's memory away.
    adapter = jax.device_get(road.init(jax.random.key(0), variables, jnp.zeros((1, 8), jnp.int32)))
    tx = optax.adamw(1e-3, weight_decay=0.0)
    begin = jax.device_get(_step.State(adapter, tx.init(adapter)))
    mesh = models.make_mesh()
    program = _step.make_program(road, tx, variables, begin, parallel="jit", accumulate=1, mesh=mesh)
    variables = program.place(variables)
    state = program.place_state(begin)
    turn = 0

    def step() -> float:
        nonlocal state, turn
        state, metrics = program.train(state, variables, batches[turn % len(batches)])
        turn += 1
        return float(metrics.loss)

    for _ in batches:
        step()
    # What warming up changed is undone: every arm begins with a fresh adapter.
    state, turn = program.place_state(begin), 0
    return step


def _peers() -> dict[str, Any]:
    return {
        "PEFT RoAd": peft.RoadConfig(target_modules="all-linear"),
        "PEFT LoRA r8": peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16),
    }


def _torch(checkpoint: Path, config: Any, batches: list[dict[str, torch.Tensor]]) -> Step:
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    base.config.use_cache = False
    model = peft.get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    turn = 0

    def step() -> float:
        nonlocal turn
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batches[turn % len(batches)]).loss
        loss.backward()
        optimizer.step()
        turn += 1
        return float(loss.detach())

    return step


def table(name: str, arms: dict[str, dict[str, Any]], machine: str) -> Table:
    """The figures of one workload."""
    shown = Table(title=f"{name}, float32, all linears", caption=machine)
    for column in ("arm", f"time / {OURS}", "spread", "seconds a step", "lines/s", "first loss"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, row in arms.items():
        spread = f"{min(row['ratios']):.2f}–{max(row['ratios']):.2f}"
        shown.add_row(
            arm,
            f"{row['ratio']:.2f}",
            spread,
            f"{row['seconds_per_step']:.2f}",
            f"{row['lines_per_second']:.1f}",
            f"{row['first_loss']:.4f}",
        )
    return shown


if __name__ == "__main__":
    main()

"""Times a training step in Flax against PEFT in PyTorch: the same model, the same tokens, the same threads.

The model is SmolLM2-135M-Instruct in float32 with adapters on all linear layers and AdamW. There are two workloads:

- ``same work``: rows without padding and a loss at every token;
- ``a task``: real lines of film reviews with a loss on the answers. Flax packs them and computes logits only where
  there is a loss, as ``road-train`` does; PEFT pads each batch to its longest line.

In both, all arms' first losses are checked to be equal.

The Flax arm has glibc's huge pages, as ``road-train`` has. PEFT's arms run eagerly and, if every step has the same
shape, also through ``torch.compile``. They run on a GPU if both frameworks have one, and otherwise on the CPU. Each arm
is a separate process. In each round every arm takes some steps, in random order, so that a busy machine slows all of
them. The first of them isn't timed: where memory that a process has freed goes back to the host while other arms run,
it is slower than a step that follows another, as in training. A figure is an arm's time divided by that of ``Flax
RoAd`` in the same round, as the median over rounds; for ``a task`` it is time per line. Writes
``benchmarks/results/train_step.json`` and ``.png``.

With ``--random-weights`` the model has SmolLM2-135M's shape and random weights. Nothing is fetched then, so ``a task``
is left out, and the files are named ``train_step_random``.
"""

import dataclasses
import itertools
import random
import statistics
import time
import warnings
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
from benchmarks._common import RESULTS, Arm, bars, device, median_ratios, reason, settings, sort_out, write
from benchmarks._lines import lines_of, pad
from benchmarks._model import checkpoint, described
from examples.demo import tasks
from road_core._command import HUGE_PAGES
from road_jax import RoadConfig, models
from road_jax.train import _data, _step

OURS = "Flax RoAd"


@dataclasses.dataclass(frozen=True)
class Options:
    """Times training steps of RoAd in Flax against PEFT's RoAd and LoRA in PyTorch."""

    # Rows of a step, and tokens per row; the task's packed batches have the same shape.
    rows: int = 4
    length: int = 256
    # Number of rounds, and each arm's timed steps in one.
    rounds: int = 8
    steps: int = 2
    # Batches of the task; each step takes the next one.
    batches: int = 8
    # Whether to take random weights in the model's shape; then nothing is fetched, and there are no lines for the task.
    random_weights: bool = False
    # Folder for the model and the data.
    cache: Path = Path("runs/cache")
    # Folder for the figures.
    out: Path = RESULTS


# A step takes no arguments and returns the loss.
Step = Callable[[], float]
# The function that makes an arm's step in its process, and the function's arguments.
Maker = tuple[Callable[..., Step], tuple[Any, ...]]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    folder = checkpoint(options.cache, console, random_weights=options.random_weights)
    results: dict[str, Any] = {"device": device("jax"), "options": settings(options)}
    workloads = {"same work": _same_work} if options.random_weights else {"same work": _same_work, "a task": _task}
    for name, make in workloads.items():
        makers, lines = make(folder, options, console)
        results[name] = measure(name, makers, lines, options.rounds, options.steps, console)
        console.print(table(name, results[name], results["device"]))
    path = options.out / ("train_step_random.json" if options.random_weights else "train_step.json")
    write(path, results)
    shown = {name: {arm: row["ratio"] for arm, row in results[name].items() if "ratio" in row} for name in workloads}
    model = described(random_weights=options.random_weights)
    bars(shown, path.with_suffix(".png"), title=f"Training {model}, float32\n{results['device']}", of=OURS)
    console.print(f"{path} and .png")


def measure(
    name: str, makers: dict[str, Maker], lines: list[int], rounds: int, steps: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Returns each arm's seconds per step, and its time per line relative to ours; or why a peer failed.

    Batch i has ``lines[i]`` lines. Every arm goes through the batches in the same order. The first step of all, and of
    each round, isn't timed.
    """
    begun = {
        # As road-train starts. PyTorch takes longer with it.
        arm: Arm(_serve, make, args, environ=HUGE_PAGES if arm == OURS else None)
        for arm, (make, args) in makers.items()
    }
    arms, failed = sort_out(begun)
    if OURS in failed:
        raise SystemExit(f"{name}: expected {OURS} to run, found {failed[OURS]}")
    # The lines of the batches, as the arms take them.
    turns = itertools.cycle(lines)
    next(turns)
    losses = {arm: process.ask("step")[1] for arm, process in arms.items()}
    # All adapters, including LoRA's, start as the identity, so every arm begins with the base's loss.
    if max(losses.values()) - min(losses.values()) > 1e-3 * min(losses.values()):
        raise SystemExit(f"{name}: expected one first loss in every arm, found {losses}")
    random.seed(0)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with Progress(console=console) as bar:
        task = bar.add_task(f"{name}: {rounds} rounds of {len(arms)} arms", total=rounds * len(arms))
        for _ in range(rounds):
            next(turns)
            held = sum(itertools.islice(turns, steps))
            for arm in random.sample([*arms], len(arms)):
                arms[arm].ask("step")
                times[arm].append(sum(arms[arm].ask("step")[0] for _ in range(steps)) / held)
                bar.advance(task)
    for process in arms.values():
        process.tell("stop")
    ratios = median_ratios(times, OURS)
    return {
        arm: {
            "ratio": ratios[arm][0],
            "ratios": ratios[arm][1],
            "seconds_per_step": statistics.median(times[arm]) * statistics.mean(lines),
            "lines_per_second": 1 / statistics.median(times[arm]),
            "first_loss": losses[arm],
        }
        for arm in arms
    } | {arm: {"failed": why} for arm, why in failed.items()}


def _serve(pipe: Any, make: Callable[..., Step], args: tuple[Any, ...]) -> None:
    """Takes a step on each order, and answers with its seconds and loss."""
    warnings.simplefilter("ignore")
    try:
        step = make(*args)
    except Exception as error:  # a peer that can't do it is a result
        pipe.send(reason(error))
        return
    pipe.send(None)
    while pipe.recv() != "stop":
        start = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - start, loss))


def _same_work(folder: Path, options: Options, console: Console) -> tuple[dict[str, Maker], list[int]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 40000, (options.rows, options.length)).astype(np.int32)
    everywhere = np.tile(np.arange(options.length - 1, dtype=np.int32), (options.rows, 1))
    ones = np.ones_like(ids)
    batch = _data.Batch(ids, ones, everywhere, ids[:, 1:], np.ones(everywhere.shape, np.float32))
    theirs = {"input_ids": ids, "attention_mask": ones, "labels": ids}
    return _makers(folder, [batch], [theirs]), [options.rows]


def _task(folder: Path, options: Options, console: Console) -> tuple[dict[str, Maker], list[int]]:
    """Makes batches of as many real lines as fill a step's rows when packed; the peers get the same lines."""
    task = tasks.sentiment(options.cache, console)
    path, _ = task.write(options.cache / "benchmark")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    examples = _data.tokenize(_data.read_lines(path), tokenizer, str(path))
    packed, padded, counts = [], [], []
    for element in _data.packed(examples, rows=options.rows, length=options.length, seed=0, epochs=1):
        held = lines_of(element, examples)
        if len(packed) == options.batches:
            break
        packed.append(_data.to_batch(element, options.rows))
        padded.append({name: tensor.numpy() for name, tensor in pad(held).items()})
        counts.append(len(held))
    return _makers(folder, packed, padded), counts


def _makers(folder: Path, ours: list[_data.Batch], theirs: list[dict[str, np.ndarray]]) -> dict[str, Maker]:
    configs = {
        "PEFT RoAd": peft.RoadConfig(target_modules="all-linear"),
        "PEFT LoRA r8": peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16),
    }
    makers: dict[str, Maker] = {OURS: (_flax, (folder, ours))}
    for name, config in configs.items():
        makers[name] = _torch, (folder, config, theirs, False)
        # Every other length of a padded batch would be compiled again.
        if len(theirs) == 1:
            makers[f"{name}, compiled"] = _torch, (folder, config, theirs, True)
    return makers


def _flax(folder: Path, batches: list[_data.Batch]) -> Step:
    module, variables = models.load(folder, dtype=jnp.float32)
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear"))
    # On the host, because the step donates its state's memory.
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
    # Undo the warm-up, so that every arm begins with a fresh adapter.
    state, turn = program.place_state(begin), 0
    return step


def _torch(folder: Path, config: Any, batches: list[dict[str, np.ndarray]], compiled: bool) -> Step:
    where = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    if where == "cuda":
        # TF32, as XLA uses for products on such a GPU.
        torch.set_float32_matmul_precision("high")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(where)
    base.config.use_cache = False
    model = peft.get_peft_model(base, config).train()
    called = torch.compile(model) if compiled else model
    tensors = [{name: torch.from_numpy(array).long().to(where) for name, array in batch.items()} for batch in batches]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    begin = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    turn = 0

    def step() -> float:
        nonlocal turn
        optimizer.zero_grad(set_to_none=True)
        loss = called(**tensors[turn % len(tensors)]).loss
        loss.backward()
        optimizer.step()
        turn += 1
        return float(loss.detach())

    step()
    # As in Flax, every arm begins with a fresh adapter.
    with torch.no_grad():
        for parameter, value in zip(trained, begin, strict=True):
            parameter.copy_(value)
    optimizer.state.clear()
    turn = 0
    return step


def table(name: str, arms: dict[str, dict[str, Any]], machine: str) -> Table:
    """Returns a table of one workload's figures."""
    shown = Table(title=f"{name}, float32, all linears", caption=machine)
    for column in ("arm", f"time / {OURS}", "spread", "seconds a step", "lines/s", "first loss"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, row in arms.items():
        if "failed" in row:
            shown.add_row(arm, "fails", row["failed"][:40])
            continue
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

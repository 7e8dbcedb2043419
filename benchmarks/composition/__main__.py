"""Combines separately trained adapters without more training: the paper's experiment (section 4.3) on a small scale.

The model is SmolLM2-135M-Instruct in float32, and the two tasks are those of `benchmarks.composition.tasks`. The seed
decides the order of the lines. For each seed every method trains on the same batches of each task:

- ``halves``: RoAd in Flax, one adapter on the first half of each layer's 2x2 blocks, the other on the second half, each
  trained on its own task alone;
- ``at once``: the same halves trained in one run in PyTorch. Each step's batch has lines of both tasks, and each line
  uses the half of its own task;
- ``whole``: as ``halves``, but both adapters act on all blocks;
- ``LoRA r8``: PEFT, both adapters on all linear layers, each trained on its own task alone;
- ``LoReFT r8``: one edit of each layer's hidden state, with half of its rows for each task. As the rows must stay
  orthogonal, both halves are trained at once, on a batch of each task in every step.

The base, each adapter alone and both together are scored by greedy generation on held-out reviews. Adapters are
combined by composition with weights, as merged task vectors, as sums of the LoRAs, or as all rows of LoReFT. Writes
``benchmarks/results/composition.json`` and ``.png``.
"""

import dataclasses
import gc
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import peft
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import convert
import road_torch
from benchmarks._common import RESULTS, device, settings, write
from benchmarks._lines import lines_of, pad
from benchmarks.composition.loreft import LoReFT
from benchmarks.composition.tasks import Scores, Study, prepare, score
from examples.demo.model import prepare_model
from examples.demo.tasks import Messages
from road_jax.train import TrainOptions, _data, _step, train

HALVES = {"skill": (0.0, 0.5), "format": (0.5, 1.0)}
# The weights of A and B when they are combined.
WEIGHTS = {"A+B": (1.0, 1.0), "0.5 A + B": (0.5, 1.0), "A + 0.5 B": (1.0, 0.5)}
METRICS = ("skill", "format", "both")


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains adapters for a skill and a format separately, and scores them together."""

    # Seeds; each gives an order of the training lines.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Optimiser steps per adapter, rows per step, and tokens per row.
    steps: int = 40
    rows: int = 2
    length: int = 256
    # Peak learning rates; RoAd's is the paper's.
    learning_rate: float = 5e-3
    lora_learning_rate: float = 2e-3
    loreft_learning_rate: float = 4e-3
    # Number of held-out reviews to score.
    lines: int = 100
    # Folder for the model and the data.
    cache: Path = Path("runs/cache")
    # Folder for the figures.
    out: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    checkpoint = prepare_model(options.cache / "smollm2-135m-instruct", options.cache, console=console)
    results: dict[str, Any] = {"device": device(), "options": settings(options), "seeds": {}}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        study = prepare(options.cache, Path(name) / "data", options.lines, console)
        for seed in options.seeds:
            console.rule(f"seed {seed}")
            found = run(checkpoint, study, seed, options, Path(name) / str(seed), console)
            results["seeds"][seed] = {arm: dataclasses.asdict(scores) for arm, scores in found.items()}
            results["mean"] = mean(results["seeds"])
            # After each seed, so that an interrupted run keeps its results.
            write(options.out / "composition.json", results)
    console.print(table(results))
    draw(results, options.out / "composition.png")
    console.print(f"{options.out / 'composition.json'} and .png")


def run(
    checkpoint: Path, study: Study, seed: int, options: Options, folder: Path, console: Console
) -> dict[str, Scores]:
    """Trains all adapters on one order of the lines and scores every arm."""
    for kind, spaces in (("halves", HALVES), ("whole", dict.fromkeys(HALVES))):
        for task, subspace in spaces.items():
            flax = folder / "flax" / f"{kind}-{task}"
            train(_options(checkpoint, study.data[task], flax, subspace, seed, options), console=console)
            convert.to_torch(flax, folder / f"{kind}-{task}")
    jax.clear_caches()
    found = {arm: score(answers, study.labels) for arm, answers in _road(checkpoint, folder, study).items()}
    gc.collect()
    for arms in (_at_once, _lora, _loreft):
        answered = arms(checkpoint, study, seed, options, console)
        found |= {arm: score(answers, study.labels) for arm, answers in answered.items()}
        gc.collect()
    return found


def _options(
    checkpoint: Path, data: Path, out: Path, subspace: tuple[float, float] | None, seed: int, options: Options
) -> TrainOptions:
    return TrainOptions(
        base=checkpoint,
        data=data,
        out=out,
        eval_lines=0,
        steps=options.steps,
        batch_size=options.rows,
        max_length=options.length,
        learning_rate=options.learning_rate,
        dtype="float32",
        subspace=subspace,
        seed=seed,
    )


def _road(checkpoint: Path, folder: Path, study: Study) -> dict[str, list[str]]:
    """Answers with every RoAd arm, by adapter names for the rows, and with merged task vectors."""
    base, tokenizer = road_torch.load(checkpoint, dtype="float32")
    model = road_torch.RoadModel(base).eval()
    for kind in ("halves", "whole"):
        for task in HALVES:
            model.load_adapter(folder / f"{kind}-{task}", adapter_name=f"{kind}-{task}")
    arms = {"base": "__base__"}
    for kind in ("halves", "whole"):
        a, b = f"{kind}-skill", f"{kind}-format"
        arms |= {f"{kind}: A": a, f"{kind}: B": b}
        arms |= {f"{kind}: {arm}": f"{a}:{v}+{b}:{w}" for arm, (v, w) in WEIGHTS.items()}
    found = {
        arm: _answers(model, tokenizer, study.prompts, adapter_names=[name] * len(study.prompts))
        for arm, name in arms.items()
    }
    for kind in ("halves", "whole"):
        found[f"{kind}: task vectors"] = _task_vectors(model, tokenizer, study, kind)
    return found


def _task_vectors(model: road_torch.RoadModel, tokenizer: Any, study: Study, kind: str) -> list[str]:
    """Answers with ``W + (W_A - W) + (W_B - W)`` for every adapted weight."""
    layers = [module for module in model.modules() if isinstance(module, road_torch.RoadLayer)]
    plain = [layer.base_layer.weight.detach().clone() for layer in layers]
    total = [weight.clone() for weight in plain]
    for task in HALVES:
        model.merge_adapter([f"{kind}-{task}"])
        for layer, before, sum_ in zip(layers, plain, total, strict=True):
            sum_ += layer.base_layer.weight.detach() - before
        model.unmerge_adapter()
    try:
        for layer, weight in zip(layers, total, strict=True):
            layer.base_layer.weight.data = weight
        with model.disable_adapter():
            return _answers(model, tokenizer, study.prompts)
    finally:
        for layer, weight in zip(layers, plain, strict=True):
            layer.base_layer.weight.data = weight


def _at_once(checkpoint: Path, study: Study, seed: int, options: Options, console: Console) -> dict[str, list[str]]:
    """Trains both halves in one run, on mixed batches of the same lines as separately, and answers with them."""
    base, tokenizer = road_torch.load(checkpoint, dtype="float32")
    model = road_torch.RoadModel(base)
    for task, subspace in HALVES.items():
        model.add_adapter(task, road_torch.RoadConfig(target_modules="all-linear", subspace=subspace))
    model.set_adapter(list(HALVES))
    lines = [_lines(study.data[task], tokenizer, seed, options) for task in HALVES]

    def loss(skill: list[_data.Example], format_: list[_data.Example]) -> torch.Tensor:
        names = ["skill"] * len(skill) + ["format"] * len(format_)
        return model(**pad(skill + format_, base.device), adapter_names=names).loss

    losses = ((lambda pair=pair: loss(*pair)) for pair in zip(*lines, strict=True))
    _train(model.train(), losses, options.learning_rate, options, "RoAd, at once", console)
    model.eval()
    arms = {"at once: A": "skill", "at once: B": "format", "at once: A+B": "skill+format"}
    return {
        arm: _answers(model, tokenizer, study.prompts, adapter_names=[name] * len(study.prompts))
        for arm, name in arms.items()
    }


def _lora(checkpoint: Path, study: Study, seed: int, options: Options, console: Console) -> dict[str, list[str]]:
    """Trains a LoRA for each task on the lines of RoAd's batches, and answers with each and with their sums."""
    torch.manual_seed(seed)
    base, tokenizer = road_torch.load(checkpoint, dtype="float32")
    config = peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16)
    model: Any = peft.get_peft_model(base, config, adapter_name="skill")
    model.add_adapter("format", config)
    for task in HALVES:
        model.set_adapter(task)
        model.train()
        lines = _lines(study.data[task], tokenizer, seed, options)
        losses = ((lambda batch=batch: model(**pad(batch, base.device)).loss) for batch in lines)
        _train(model, losses, options.lora_learning_rate, options, f"LoRA, {task}", console)
    model.eval()
    arms = {"LoRA: A": "skill", "LoRA: B": "format"}
    for i, (arm, weights) in enumerate(WEIGHTS.items()):
        arms[f"LoRA: {arm}"] = name = f"sum_{i}"
        model.add_weighted_adapter(list(HALVES), list(weights), name, combination_type="cat")
    found = {}
    for arm, name in arms.items():
        model.set_adapter(name)
        found[arm] = _answers(model, tokenizer, study.prompts)
    return found


def _loreft(checkpoint: Path, study: Study, seed: int, options: Options, console: Console) -> dict[str, list[str]]:
    """Trains LoReFT on the same lines, half of its rows per task, and answers with each half and with all rows."""
    torch.manual_seed(seed)
    base, tokenizer = road_torch.load(checkpoint, dtype="float32")
    model = LoReFT(base, rank=8, positions=4).to(base.device)
    rows = {"skill": slice(0, 4), "format": slice(4, 8)}
    lines = [_lines(study.data[task], tokenizer, seed, options) for task in rows]

    def loss(*pair: list[_data.Example]) -> torch.Tensor:
        total = torch.zeros((), device=base.device)
        for model.rows, batch in zip(rows.values(), pair, strict=True):
            total = total + model.loss(**pad(batch, base.device))
        return total

    losses = ((lambda pair=pair: loss(*pair)) for pair in zip(*lines, strict=True))
    _train(model, losses, options.loreft_learning_rate, options, "LoReFT", console)
    found = {}
    for model.rows, arm in zip((*rows.values(), slice(0, 8)), ("LoReFT: A", "LoReFT: B", "LoReFT: A+B"), strict=True):
        found[arm] = _answers(model, tokenizer, study.prompts)
    return found


def _train(
    model: torch.nn.Module,
    losses: Iterable[Callable[[], torch.Tensor]],
    learning_rate: float,
    options: Options,
    what: str,
    console: Console,
) -> None:
    """Trains all parameters that require gradients with road-train's optimiser and schedule, one loss per step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    _, rates = _step.optimizer(learning_rate, options.steps, warmup=0.1, weight_decay=0.0)
    for step, loss in enumerate(track(losses, what, total=options.steps, console=console)):
        for group in optimizer.param_groups:
            group["lr"] = rates[step].item()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()


def _lines(data: Path, tokenizer: Any, seed: int, options: Options) -> list[list[_data.Example]]:
    """Returns the lines of each of road-train's packed batches."""
    examples = _data.tokenize(_data.read_lines(data), tokenizer, str(data))
    packed = _data.packed(examples, rows=options.rows, length=options.length, seed=seed, epochs=99)
    return [lines_of(element, examples) for element in itertools.islice(packed, options.steps)]


def _answers(
    model: Any, tokenizer: Any, prompts: list[Messages], *, adapter_names: list[str] | None = None
) -> list[str]:
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    tokenizer.padding_side = "left"
    where = next(model.parameters()).device
    answers = []
    for start in range(0, len(texts), 50):
        rows = slice(start, start + 50)
        inputs = tokenizer(texts[rows], return_tensors="pt", padding=True, add_special_tokens=False).to(where)
        named = {} if adapter_names is None else {"adapter_names": adapter_names[rows]}
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False, **named)
        answers += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def mean(seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns mean and standard deviation over the seeds (0 for one seed), by arm and metric."""
    runs = list(seeds.values())
    found = {}
    for arm in runs[0]:
        values = {metric: [run[arm][metric] for run in runs] for metric in METRICS}
        found[arm] = {m: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for m, v in values.items()}
    return found


def table(results: Mapping[str, Any]) -> Table:
    """Returns a table of every arm's scores."""
    shown = Table(title="Held-out reviews, in percent", caption=results["device"])
    for column in ("arm", *METRICS):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, scores in results["mean"].items():
        shown.add_row(arm, *(f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in (scores[metric] for metric in METRICS)))
    return shown


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws every arm's scores as bars."""
    from matplotlib.figure import Figure

    arms = list(results["mean"])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for i, metric in enumerate(METRICS):
        at = [-y + (1 - i) * 0.27 for y in range(len(arms))]
        values, spread = zip(*(results["mean"][arm][metric] for arm in arms), strict=True)
        axis.barh(at, [100 * v for v in values], 0.25, xerr=[100 * s for s in spread], label=metric)
    axis.set_yticks([-y for y in range(len(arms))], arms, fontsize=8)
    axis.set_xlim(0, 100)
    axis.set_xlabel("held-out reviews (%)")
    axis.set_title(f"A: sentiment, B: JSON; trained apart or at once, SmolLM2-135M\n{results['device']}", fontsize=9)
    axis.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

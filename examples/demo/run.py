"""The demo's stages, from a checkpoint and tasks to the results: score the base, train, convert, verify, serve."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

import convert
import road_torch
from examples.demo.flax_model import ROWS, FlaxModel
from examples.demo.report import Results, Shown, TaskResult
from examples.demo.stages import Stages, device_name, peak_memory
from examples.demo.tasks import Scores, Task
from road_jax.train import TrainOptions, train

# Rows of a training batch and tokens per row: about 450 tokens per step when lines are packed.
TRAIN_ROWS, TRAIN_LENGTH = 2, 256

# Number of answered training lines that the base sees before the question; without any it gets no address right.
EXAMPLES = 2

# Quantisation of the weights, both for training the adapters and for serving. An adapter trained on the checkpoint's
# own weights would lose accuracy on the same weights in 4 bits.
QUANTIZE: Literal["nf4"] = "nf4"

# The adapter name of rows without an adapter.
BASE = "__base__"

# Number of held-out lines per task that the base answers too, in the same mixed batches.
BASE_LINES = 16

# Number of stages that `run_demo` and `examples.demo.__main__` announce for two tasks.
STAGES = 7


def run_demo(base: Path, tasks: Sequence[Task], folder: Path, stages: Stages) -> Results:
    """Trains an adapter for each task in Flax and serves all on the 4-bit model in PyTorch.

    Args:
        base: folder of a Hugging Face checkpoint.
        tasks: tasks with distinct names.
        folder: output folder for ``data``, ``flax``, ``torch``, and prompts and answers of the mixed batches.
        stages: measures the stages; its console is used.

    Returns:
        Everything that the report states.
    """
    console = stages.console
    with stages.stage("Scoring the base model, in Flax"):
        model = FlaxModel(base)
        parameters = model.parameters
        base_scores = {task.name: _score_base(model, task, console) for task in tasks}
    # Every stage loads its own model; only one is kept in memory at a time.
    del model
    options = {task.name: _train_options(base, task, folder) for task in tasks}
    trained = {}
    for task in tasks:
        with stages.stage(f"Training the {task.name} adapter, in Flax"):
            trained[task.name] = train(options[task.name], console=console)
    with stages.stage("Scoring both adapters by their answers, in Flax"):
        model = FlaxModel(base, QUANTIZE)
        flax_answers = {
            task.name: model.answer(
                [task.prompt(line) for line in task.held_out],
                adapter=folder / "flax" / task.name,
                max_new_tokens=_most_tokens(tasks),
                console=console,
            )
            for task in tasks
        }
    del model
    jax.clear_caches()
    with stages.stage("Converting both adapters, and verifying them in both frameworks"):
        verified = {}
        for task in tasks:
            flax, torch = (folder / side / task.name for side in ("flax", "torch"))
            convert.to_torch(flax, torch)
            verified[task.name] = convert.verify(flax, torch, base, console=console)
    with stages.stage("Answering in mixed batches on the 4-bit model, in PyTorch"):
        torch_answers, base_answers = _serve(base, tasks, folder, console)
    return Results(
        device=device_name(),
        base=base,
        base_parameters=parameters,
        tasks=[
            TaskResult(
                task=task,
                asked=base_scores[task.name][0],
                base=base_scores[task.name][1],
                flax=task.score(flax_answers[task.name]),
                torch=task.score(torch_answers[task.name]),
                options=options[task.name],
                training=trained[task.name],
                flax_bytes=_size(folder / "flax" / task.name / "road_adapter.safetensors"),
                torch_bytes=_size(folder / "torch" / task.name / "adapter_model.safetensors"),
                verification=verified[task.name],
                shown=[
                    Shown(task.held_out[i], before, flax_answers[task.name][i], torch_answers[task.name][i])
                    for i, before in enumerate(base_answers[task.name])
                ],
            )
            for task in tasks
        ],
        base_rows=sum(len(answers) for answers in base_answers.values()),
        batch_rows=ROWS,
        stages=stages.done,
        peak_memory=peak_memory(),
    )


def interleave(*groups: Sequence[Any]) -> list[Any]:
    """Returns all items in one list, each group spread evenly over it in its own order."""
    places = [((i + 0.5) / len(group), n, item) for n, group in enumerate(groups) for i, item in enumerate(group)]
    return [item for *_, item in sorted(places, key=lambda place: place[:2])]


def _score_base(model: FlaxModel, task: Task, console: Console) -> tuple[str, Scores]:
    """Scores the base; also returns how it was asked: for the likelier of the labels, or with examples."""
    if task.labels:
        conversations = [task.prompt(line) for line in task.held_out]
        return "the likelier label counts", task.score(model.choose(conversations, task.labels, console=console))
    conversations = [task.prompt(line, EXAMPLES) for line in task.held_out]
    answers = model.answer(conversations, max_new_tokens=task.answer_tokens, console=console)
    return f"with the format told and {EXAMPLES} answered examples", task.score(answers)


def _train_options(base: Path, task: Task, folder: Path) -> TrainOptions:
    data, _ = task.write(folder / "data")
    devices = jax.device_count()
    return TrainOptions(
        base=base,
        data=data,
        out=folder / "flax" / task.name,
        # Held-out lines are scored by answers afterwards.
        eval_lines=0,
        steps=task.steps,
        learning_rate=task.learning_rate,
        # The rows must divide among the devices.
        batch_size=-(-TRAIN_ROWS // devices) * devices,
        max_length=TRAIN_LENGTH,
        quantize=QUANTIZE,
        # In XLA on a CPU as fast as bfloat16, and more exact.
        dtype="float32",
    )


def _serve(
    base: Path, tasks: Sequence[Task], folder: Path, console: Console
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Answers every held-out line with its task's adapter, and some also with the base, all in mixed batches.

    Returns:
        The answers with an adapter and those of the base, by task and in the order of the lines.
    """
    decoder, tokenizer = road_torch.load(base, quantize=QUANTIZE)
    model = road_torch.RoadModel(decoder)
    for task in tasks:
        model.load_adapter(folder / "torch" / task.name, adapter_name=task.name)
    prompts = [
        [{"task": task.name, "adapter": name, "messages": task.prompt(line)} for line in task.held_out[:count]]
        for task in tasks
        for name, count in ((task.name, None), (BASE, BASE_LINES))
    ]
    rows = interleave(*prompts)
    answers = road_torch.generate(
        model.eval(), tokenizer, rows, max_new_tokens=_most_tokens(tasks), batch_size=ROWS, console=console
    )
    _write_lines(folder / "prompts.jsonl", rows)
    _write_lines(folder / "answers.jsonl", answers)
    adapted: dict[str, list[str]] = {task.name: [] for task in tasks}
    plain: dict[str, list[str]] = {task.name: [] for task in tasks}
    for answer in answers:
        (plain if answer["adapter"] == BASE else adapted)[answer["task"]].append(answer["completion"])
    return adapted, plain


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _most_tokens(tasks: Sequence[Task]) -> int:
    """Returns one bound for all tasks, so that one program serves them; answers end earlier at their end token."""
    return max(task.answer_tokens for task in tasks)


def _size(path: Path) -> int:
    return path.stat().st_size

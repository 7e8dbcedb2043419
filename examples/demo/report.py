"""The demo's results as a report with pictures and as a table for the terminal."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from convert import Verification
from examples.demo.folder import FIGURES, MADE_BY
from examples.demo.stages import Stage
from examples.demo.tasks import Line, Scores, Task
from road_core._files import dump_json
from road_jax.train import TrainOptions, TrainResult

# Number of held-out lines per task whose answers the report shows.
_SHOWN = 4

_COLUMNS = ("base", "Flax, adapter", "PyTorch 4-bit, mixed batch")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A held-out line and its answers: by the base in the mixed batch, and with the adapter in each framework."""

    line: Line
    base: str
    flax: str
    torch: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The results of one task.

    Attributes:
        task: the task, with the lines that were scored.
        asked: how the base model was asked.
        base: scores of the base model.
        flax: scores of the answers with the adapter in Flax.
        torch: scores of the answers with the converted adapter on the 4-bit model in PyTorch.
        options: options of the training.
        training: result of the training.
        flax_bytes: size of ``road_adapter.safetensors``.
        torch_bytes: size of ``adapter_model.safetensors``.
        verification: comparison of both adapters on the same tokens.
        shown: answers to the first held-out lines.
    """

    task: Task
    asked: str
    base: Scores
    flax: Scores
    torch: Scores
    options: TrainOptions
    training: TrainResult
    flax_bytes: int
    torch_bytes: int
    verification: Verification
    shown: Sequence[Shown]

    def rows(self) -> Iterator[tuple[str, tuple[float, float, float]]]:
        """Yields each metric with the scores of the base, in Flax and in PyTorch; ``"exact"`` comes first."""
        for metric in self.flax:
            yield metric, (self.base[metric], self.flax[metric], self.torch[metric])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results of the whole demo.

    Attributes:
        device: the devices that it ran on.
        base: folder of the checkpoint.
        base_parameters: number of parameters of the base model.
        tasks: results of each task.
        base_rows: number of rows of the mixed batches that the base answered.
        batch_rows: maximum number of rows of a batch.
        stages: times of the stages.
        peak_memory: peak memory of the process in bytes.
    """

    device: str
    base: Path
    base_parameters: int
    tasks: Sequence[TaskResult]
    base_rows: int
    batch_rows: int
    stages: Sequence[Stage]
    peak_memory: int

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)


def write_report(results: Results, folder: Path, out: Path) -> None:
    """Writes ``report.md``, ``scores.png`` and the figures as ``demo.json``.

    Args:
        results: see `Results`.
        folder: output folder. It holds ``flax/<task>`` with each adapter's pictures, to which the report links.
        out: the folder's final name, for the commands in the report.
    """
    draw_scores(results, folder / "scores.png")
    (folder / "report.md").write_text(_markdown(results, out), encoding="utf-8")
    (folder / FIGURES).write_bytes(dump_json({**MADE_BY, **_figures(results)}))


def summary(results: Results) -> Table:
    """Returns the scores as a table for the terminal."""
    table = Table(title=f"Held-out scores on {results.device}", title_justify="left")
    for name in ("task", "score", "lines"):
        table.add_column(name)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for result in results.tasks:
        for metric, scores in result.rows():
            first = metric == "exact"
            about = (result.task.name, metric, str(len(result.task.held_out))) if first else ("", metric, "")
            table.add_row(*about, *map(_percent, scores), style="bold" if first else None, end_section=False)
    return table


def draw_scores(results: Results, path: Path) -> None:
    """Draws each task's scores as bars: base, Flax and PyTorch side by side."""
    from matplotlib.figure import Figure

    rows = [(f"{result.task.name}\n{metric}", scores) for result in results.tasks for metric, scores in result.rows()]
    figure = Figure(figsize=(max(6, 1.5 * len(rows)), 4), layout="constrained")
    axis = figure.subplots()
    colours = ("0.65", "tab:blue", "tab:orange")
    for i, (name, colour) in enumerate(zip(_COLUMNS, colours, strict=True)):
        places = [place + (i - 1) * 0.27 for place in range(len(rows))]
        values = [100 * scores[i] for _, scores in rows]
        bars = axis.bar(places, values, 0.25, label=name, color=colour)
        axis.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=8)
    axis.set_xticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(0, 112)
    axis.set_ylabel("held-out lines right (%)")
    axis.legend(ncols=3, loc="upper center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _markdown(results: Results, out: Path) -> str:
    names = [result.task.name for result in results.tasks]
    parts = [
        "# Trained in Flax, served on a 4-bit model in PyTorch",
        f"Base: `{results.base.name}`, {results.base_parameters:,} parameters. Device: {results.device}. "
        f"Made in {results.seconds / 60:.1f} minutes; the process held {results.peak_memory / 2**30:.1f} GiB of memory "
        "at most.",
        "## Scores",
        _score_table(results),
        "![Scores](scores.png)",
        _how(results),
        "## Adapters",
        _adapter_table(results),
        *(f"![Loss of {name}](flax/{name}/loss.png)" for name in names),
        "Where each output's unit vector is sent, (α cos θ, α sin θ); the identity is (1, 0):",
        *(f"![Rotations of {name}](flax/{name}/rotations.png)" for name in names),
        "## The same numbers in both frameworks",
        "`road-convert verify` runs the Flax adapter in Flax and the converted one in PyTorch, both in float32 on the "
        "same tokens, and compares all logits.",
        _verify_table(results),
        "## Answers",
        f"The first held-out lines. The base and the adapters answered in the same mixed batches on the 4-bit model, "
        f"up to {results.batch_rows} rows at once, {results.base_rows} rows in all without an adapter.",
        *(part for result in results.tasks for part in (f"### {result.task.name}", _answer_table(result))),
        "## Seconds",
        _stage_table(results),
        "## By hand",
        _commands(results, out),
    ]
    return "\n\n".join(parts) + "\n"


def _score_table(results: Results) -> str:
    rows = [
        (result.task.name if metric == "exact" else "", metric, str(len(result.task.held_out)), *map(_percent, scores))
        for result in results.tasks
        for metric, scores in result.rows()
    ]
    return _table(("task", "score", "lines", *_COLUMNS), rows, right=4)


def _how(results: Results) -> str:
    lines = []
    for result in results.tasks:
        task = result.task
        count = len(task.held_out)
        lines.append(
            f"- **{task.name}**: {task.summary} {count} held-out lines, none of them trained on; a score of 50 % has a "
            f"standard error of {50 / count**0.5:.1f} points. Data: {task.package.name} {task.package.version} "
            f"({task.package.license}). The system message of every line, the base's too: “{task.instruction}” "
            f"The base was asked in Flax, float32: {result.asked}."
        )
    lines.append(
        "- **With an adapter**, every line is answered by greedy generation and its text is scored. The adapters were "
        "trained in Flax on weights of 4 bits (nf4) and are scored on them: in Flax in float32, in PyTorch in batches "
        "whose rows have different adapters or none."
    )
    return "\n".join(lines)


def _adapter_table(results: Results) -> str:
    rows = []
    for result in results.tasks:
        training = result.training
        rows.append(
            (
                result.task.name,
                f"{training.parameters:,}",
                f"{training.parameters / results.base_parameters:.3%}",
                f"{training.steps}",
                f"{training.tokens:,}",
                f"{training.tokens / training.seconds:.0f}",
                f"{result.flax_bytes / 1024:.0f} KiB",
                f"{result.torch_bytes / 1024:.0f} KiB",
            )
        )
    header = ("task", "trained parameters", "share", "steps", "tokens", "tokens/s", "Flax file", "PyTorch file")
    return _table(header, rows, right=7)


def _verify_table(results: Results) -> str:
    rows = []
    for result in results.tasks:
        found = result.verification
        rows.append(
            (
                result.task.name,
                f"{found.max_difference:.1e}",
                f"{found.max_difference / found.scale:.1e}",
                f"{found.base_difference:.1e}",
                f"{found.moved:.2f}",
                f"{found.greedy_agreement:.0%} of {found.positions}",
                "yes" if found.passed else "**no**",
            )
        )
    header = (
        "task",
        "greatest difference of a logit",
        "of the greatest logit",
        "without the adapter",
        "the adapter moves a logit by",
        "same next token",
        f"within {results.tasks[0].verification.tolerance:g}",
    )
    return _table(header, rows, right=6)


def _answer_table(result: TaskResult) -> str:
    rows = [
        (*map(_cell, texts), "yes" if shown.flax == shown.torch else "no")
        for shown in result.shown[:_SHOWN]
        for texts in ((shown.line.question, shown.line.answer, shown.base, shown.torch),)
    ]
    return _table(("question", "expected", "base", "with adapter", "the same in Flax"), rows)


def _stage_table(results: Results) -> str:
    rows = [(stage.name, f"{stage.seconds:.0f}", f"{stage.processor_seconds:.0f}") for stage in results.stages]
    total = sum(stage.processor_seconds for stage in results.stages)
    rows.append(("all", f"{results.seconds:.0f}", f"{total:.0f}"))
    return _table(("stage", "seconds", "processor seconds, all cores"), rows, right=2)


def _commands(results: Results, out: Path) -> str:
    lines = []
    for result in results.tasks:
        name, options = result.task.name, result.options
        lines += [
            f"road-train --base {results.base} --data {out / 'data' / options.data.name} --out runs/{name} "
            f"--eval-lines {options.eval_lines} --steps {options.steps} --learning-rate {options.learning_rate} "
            f"--batch-size {options.batch_size} --max-length {options.max_length} --dtype {options.dtype} "
            f"--quantize {options.quantize}",
            f"road-convert to-torch runs/{name} adapters/{name}",
            f"road-convert verify runs/{name} adapters/{name} --base {results.base}",
        ]
    most = max(result.task.answer_tokens for result in results.tasks)
    adapters = " ".join(f"{result.task.name}=adapters/{result.task.name}" for result in results.tasks)
    lines.append(
        f"road-generate --base {results.base} --quantize {results.tasks[0].options.quantize} --adapter {adapters} "
        f"--prompts {out / 'prompts.jsonl'} --out answers.jsonl --max-new-tokens {most}"
    )
    return "\n".join(f"    {line}" for line in lines)


def _figures(results: Results) -> dict:
    """Returns the numbers of the report."""
    return {
        "device": results.device,
        "base": str(results.base),
        "base_parameters": results.base_parameters,
        "seconds": {stage.name: round(stage.seconds, 1) for stage in results.stages},
        "processor_seconds": {stage.name: round(stage.processor_seconds, 1) for stage in results.stages},
        "peak_memory": results.peak_memory,
        "tasks": {
            result.task.name: {
                "lines": len(result.task.held_out),
                "asked": result.asked,
                "base": result.base,
                "flax": result.flax,
                "torch": result.torch,
                "trained_parameters": result.training.parameters,
                "steps": result.training.steps,
                "tokens": result.training.tokens,
                "training_seconds": round(result.training.seconds, 1),
                "flax_bytes": result.flax_bytes,
                "torch_bytes": result.torch_bytes,
                "verification": dataclasses.asdict(result.verification),
            }
            for result in results.tasks
        },
    }


def _table(header: Sequence[str], rows: Sequence, *, right: int = 0) -> str:
    """Returns a Markdown table whose last ``right`` columns are numbers."""
    sides = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, sides, *rows))


def _cell(text: str) -> str:
    """Returns text from a model or data set for a cell of a Markdown table: on one line, without markup."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line[:120]}{'…' if len(line) > 120 else ''}`" if line else ""


def _percent(share: float) -> str:
    return f"{share:.1%}"

"""The loss curve."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def draw_loss(records: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Draws ``metrics.jsonl``: the training loss by step, its moving mean, and the held-out loss.

    Args:
        records: dicts with ``step`` and ``loss``, or with ``step`` and ``eval_loss``.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    steps, losses = _column(records, "loss")
    axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    width = max(1, len(losses) // 20)
    if width > 1:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], mean, color="tab:blue", label=f"training, mean of {width} steps")
    eval_steps, eval_losses = _column(records, "eval_loss")
    if len(eval_steps):
        axis.plot(eval_steps, eval_losses, "o-", color="tab:orange", label="held-out lines")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a completion token)")
    axis.grid(visible=True, which="both", alpha=0.2)
    axis.legend()
    figure.savefig(path, dpi=120)


def _column(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if name in record]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])

"""Shared by the benchmarks: where figures go, the machine's name, ratios within a round, bar charts."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results"

# The processes of several arms share an accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Importing the peers logs warnings in every process about kernels that no arm uses.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def device(framework: str = "torch") -> str:
    """Describes the accelerator that a framework uses, or else the CPU with its threads, and the frameworks' versions.

    Args:
        framework: ``"torch"`` or ``"jax"``; any other name for work that runs on the CPU only.
    """
    import jax
    import torch

    versions = f"torch {torch.__version__}, jax {jax.__version__}"
    if framework == "jax" and jax.default_backend() != "cpu":
        return f"{jax.devices()[0].device_kind}, {versions}"
    if framework == "torch" and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {versions}"


def settings(options: Any) -> dict[str, str]:
    """Returns the fields of a dataclass of options, except folders, which don't affect the figures."""
    return {name: str(value) for name, value in vars(options).items() if not isinstance(value, Path)}


def median_ratios(times: Mapping[str, Sequence[float]], of: str) -> dict[str, tuple[float, list[float]]]:
    """Returns for each arm its time divided by that of ``of`` in the same round: the median over rounds, and all."""
    found = {}
    for arm, own in times.items():
        ratios = [t / b for t, b in zip(own, times[of], strict=True)]
        found[arm] = (statistics.median(ratios), ratios)
    return found


class Arm:
    """A separate process for one arm; if arms shared a process, OpenMP wouldn't keep its threads ready."""

    def __init__(
        self, serve: Callable[..., None], *args: Any, environ: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        """Starts ``serve(pipe, *args, **kwargs)``, which first sends None, or the reason why it can't start.

        ``environ`` has further variables for its environment.
        """
        import torch

        # Forked from a process that has imported everything but computed nothing. With a GPU some imports ask CUDA for
        # its devices, and after that a fork can't use them.
        on_gpu = torch.cuda.is_available()
        context = multiprocessing.get_context("spawn" if on_gpu or environ else "forkserver")
        self._pipe, theirs = context.Pipe()
        with mock.patch.dict(os.environ, environ or {}):
            context.Process(target=serve, args=(theirs, *args), kwargs=kwargs, daemon=True).start()
        # So that waiting for an answer ends if the arm dies.
        theirs.close()
        if not on_gpu:
            # One after the other, because several arms at once would fight for the cores.
            _ = self.failure

    @functools.cached_property
    def failure(self) -> str | None:
        """The reason why the arm can't start, or None. Reading it waits until that is known."""
        try:
            return self._pipe.recv()
        except EOFError:
            return "its process ended"

    def tell(self, what: str) -> None:
        """Sends an order."""
        self._pipe.send(what)

    def ask(self, what: str) -> Any:
        """Sends an order and returns the answer."""
        # The OpenMP threads of another arm spin for a while before they sleep.
        time.sleep(0.005)
        self.tell(what)
        return self._pipe.recv()


def sort_out(begun: dict[str, Arm]) -> tuple[dict[str, Arm], dict[str, str]]:
    """Waits until all arms have started; returns those that run, and for the others the reason why they don't."""
    failed = {name: arm.failure for name, arm in begun.items() if arm.failure is not None}
    return {name: arm for name, arm in begun.items() if name not in failed}, failed


def reason(error: Exception) -> str:
    """Returns in one line why an arm failed."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Writes figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def bars(groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, of: str) -> None:
    """Draws ratios as bars, one group per workload."""
    draw_panels({f"time / {of}": groups}, path, title=title)


def draw_panels(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, *, title: str, log: bool = False
) -> None:
    """Draws figures as bars: one panel per quantity, in it one group per workload, in that one bar per arm.

    Panels of ratios, whose names contain a slash, have a line at 1.
    """
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for groups in panels.values() for group in groups.values() for arm in group))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(8 * min(2, len(panels)), 4 * rows), layout="constrained")
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flat
    width = 0.8 / len(arms)
    for axis, (name, groups) in zip(axes, panels.items(), strict=False):
        for i, arm in enumerate(arms):
            shown = {x: group[arm] for x, group in enumerate(groups.values()) if arm in group}
            at = [x + (i - (len(arms) - 1) / 2) * width for x in shown]
            drawn = axis.bar(at, list(shown.values()), width, label=arm)
            axis.bar_label(drawn, [f"{value:.2f}" for value in shown.values()], fontsize=8)
        if "/" in name:
            axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_ylabel(name)
        if log:
            axis.set_yscale("log")
        axis.legend(fontsize=8)
    for axis in list(figure.axes)[len(panels) :]:
        axis.remove()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)

"""Measures a long run: wall time and processor time of each stage, and peak memory."""

import contextlib
import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: what was done.
        seconds: wall time.
        processor_seconds: processor time of all threads and child processes, more telling on a shared machine.
    """

    name: str
    seconds: float
    processor_seconds: float


@dataclasses.dataclass
class Stages:
    """Announces stages and keeps their times in ``done``."""

    console: Console
    total: int
    done: list[Stage] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block; a failed one isn't recorded."""
        self.console.print(f"[bold]{len(self.done) + 1}/{self.total} {name}[/]", highlight=False)
        wall, processor = time.perf_counter(), _processor_seconds()
        yield
        self.done.append(Stage(name, time.perf_counter() - wall, _processor_seconds() - processor))


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes, without child processes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name() -> str:
    """Describes the accelerators that the frameworks use, or the processor and its usable cores, with versions."""
    import jax
    import torch

    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    if torch.cuda.is_available() or jax.default_backend() != "cpu":
        inside_torch = torch.cuda.get_device_name() if torch.cuda.is_available() else "the processor"
        return f"{jax.devices()[0].device_kind} (Flax), {inside_torch} (PyTorch), {versions}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {versions}"


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

"""The clock of a long run: seconds of each stage, the processor's share of them, the memory at its highest."""

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
    """A stage that is done.

    Attributes:
        name: what was done.
        seconds: by the clock on the wall.
        processor_seconds: of all threads and child processes. Where other work shares the machine, this tells more.
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
        """Times the block; one that fails isn't kept."""
        self.console.print(f"[bold]{len(self.done) + 1}/{self.total} {name}[/]", highlight=False)
        wall, processor = time.perf_counter(), _processor_seconds()
        yield
        self.done.append(Stage(name, time.perf_counter() - wall, _processor_seconds() - processor))


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has held; child processes aren't counted."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name() -> str:
    """Returns the names of the accelerators that both frameworks see, or the processor's and its usable cores."""
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

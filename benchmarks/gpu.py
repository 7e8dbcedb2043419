"""Runs what needs a GPU, one check after the other, within a few minutes: the tests marked ``gpu`` and benchmarks.

The machine needs PyTorch, JAX and PEFT, but no network: the model has random weights, and packages that are missing are
installed from a folder of wheels, into a temporary folder (docs/benchmarks.md says which). Each check is a process with
its own time limit, so that one that hangs or fails leaves time for the others. What is left in the output folder: the
benchmarks' JSON and PNG files, and ``gpu.log`` with all that the checks said and how each of them ended.

    python -m benchmarks.gpu results --wheels wheels
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Nothing but the standard library, because packages may not be installed yet.

ROOT = Path(__file__).parents[1]
# Not started with less than this many seconds left.
LEAST = 20


class Check(NamedTuple):
    """A command of Python, and how many seconds it may take."""

    name: str
    arguments: Sequence[str]
    seconds: int


def main() -> None:
    options = arguments()
    # Ends what runs, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    ended = {}
    with tempfile.TemporaryDirectory() as packages, open(options.out / "gpu.log", "w", encoding="utf-8") as log:
        paths = [str(ROOT), packages, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "HF_HUB_OFFLINE": "1",
        }
        if options.wheels is not None:
            install(options.wheels, Path(packages), log)
        # After the installation, which may bring what some checks need.
        with _importable(packages):
            wanted = checks(options)
        for check in wanted:
            left = deadline - time.monotonic()
            # A CPU may take longer to compile.
            seconds = check.seconds * (4 if options.quick else 1)
            if left < LEAST:
                ended[check.name] = "left out, there was no time"
            else:
                ended[check.name] = run(check, min(seconds, left), environment, log)
            say(log, f"{check.name}: {ended[check.name]}")
        say(log, "\n" + "\n".join(f"{name}: {how}" for name, how in ended.items()))
    sys.exit(any(not how.startswith("passed") for how in ended.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the figures and the log")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--minutes", type=float, default=12, help="time for all checks together")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder for the model")
    parser.add_argument(
        "--quick", action="store_true", help="one small round of everything, which shows that it runs, on a CPU too"
    )
    return parser.parse_args()


def install(wheels: Path, folder: Path, log: Any) -> None:
    """Installs all wheels, and nothing that they depend on, into a folder.

    Raises:
        SystemExit: there are none, or pip fails.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise SystemExit(f"{wheels}: expected wheels, found none")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *found], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    say(log, done.stdout, end="")
    if done.returncode:
        raise SystemExit(f"{wheels}: expected wheels that pip installs, found pip's exit code {done.returncode}")


def checks(options: argparse.Namespace) -> list[Check]:
    """Returns all checks, the shortest and most telling first."""
    out = ["--out", str(options.out.absolute())]
    model = ["--random-weights", "--cache", str(options.cache.absolute()), *out]
    # Only these files, because others may import packages that aren't here.
    tests = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    bases = ["bf16", "nf4, bf16", "int8, bf16"]
    if importlib.util.find_spec("bitsandbytes") is None:
        del bases[1:]
    kernel, mixed, compiled, steps = [], ["--rows", "32"], [], []
    if options.quick:
        bases = bases[:1]
        kernel = ["--rounds", "1"]
        mixed = ["--rows", "2", "--rounds", "1", "--new-tokens", "3"]
        compiled = [*mixed, "--prompt-tokens", "4"]
        steps = ["--rounds", "1", "--rows", "1", "--length", "32"]
    return [
        Check("tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests], 150),
        Check("kernel", ["-m", "benchmarks.kernel", *kernel, *out], 150),
        Check("mixed_batch", ["-m", "benchmarks.mixed_batch", *mixed, *model, "--only", *bases], 300),
        Check("train_step", ["-m", "benchmarks.train_step", *steps, *model], 200),
        Check(
            "mixed_batch, compiled",
            ["-m", "benchmarks.mixed_batch", *compiled, *model, "--compiled", "--only", "bf16", "--arms", "road_torch"],
            200,
        ),
    ]


def run(check: Check, seconds: float, environment: dict[str, str], log: Any) -> str:
    """Runs a check, and returns how it ended. Its output goes to the log and to this one's, line by line."""
    say(log, f"\n== {check.name}: python {' '.join(check.arguments)}")
    begun = time.monotonic()
    # In a session of its own, so that a benchmark's arms end with it.
    process = subprocess.Popen(
        [sys.executable, *check.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    with _stopped_after(process, seconds) as stopped:
        for line in process.stdout:
            say(log, line, end="")
        process.wait()
    took = f"{time.monotonic() - begun:.0f} s"
    if stopped:
        return f"stopped after {took}"
    return f"passed in {took}" if process.returncode == 0 else f"failed with exit code {process.returncode} in {took}"


@contextlib.contextmanager
def _stopped_after(process: subprocess.Popen, seconds: float) -> Iterator[list[bool]]:
    """Ends a process and its children after so many seconds, for which the list has an entry, or with this context."""
    stopped: list[bool] = []

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        stopped.append(True)
        kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield stopped
    finally:
        timer.cancel()
        # What it may have left behind, or all of it after an interrupt.
        kill()


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def say(log: Any, text: str, end: str = "\n") -> None:
    """Writes text to the log and to the terminal."""
    for file in (log, sys.stdout):
        print(text, end=end, file=file, flush=True)


if __name__ == "__main__":
    main()

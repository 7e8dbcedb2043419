"""Runs both frameworks on the same tokens, each in a child process, one after the other."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from road_core import AdapterError, read_flax, read_peft
from road_core._files import inside
from road_core._safetensors import EMBEDDINGS, read_entries

if TYPE_CHECKING:
    from rich.console import Console

# Prose, code, another language and digits, of different lengths so that some rows are padded.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Guten Morgen! Wie geht es dir heute?",
    "A train leaves at 9:45 and arrives at 13:20. The journey takes",
)

_SIDES = (("flax", "Flax"), ("torch", "PyTorch"))

# Neither the user's current folder nor a `convert` of their own may come before this one on the path.
_CHILD = "import sys; sys.path.append(sys.argv[1]); from convert._verify_{side} import main; main(*sys.argv[2:])"


@dataclasses.dataclass(frozen=True)
class Verification:
    """The differences between Flax and PyTorch on the same tokens, in float32.

    Attributes:
        max_difference: the greatest difference between two logits, with the adapter.
        mean_difference: the mean difference of all logits, with the adapter.
        base_difference: the greatest difference without the adapter, i.e. between the base models.
        scale: the greatest magnitude of a logit.
        moved: the greatest change that the adapter makes to a logit.
        greedy_agreement: the share of positions with the same likeliest next token.
        positions: the number of positions that were compared.
        tolerance: the greatest ``max_difference`` that passes, relative to ``scale``.
    """

    max_difference: float
    mean_difference: float
    base_difference: float
    scale: float
    moved: float
    greedy_agreement: float
    positions: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the greatest difference is within the tolerance."""
        return self.max_difference <= self.tolerance * self.scale

    @property
    def telling(self) -> bool:
        """Whether the adapter moves the logits by more than ten tolerances; if not, a dropped one would pass too."""
        return self.moved > 10 * self.tolerance * self.scale


def verify(
    flax_dir: str | os.PathLike,
    peft_dir: str | os.PathLike,
    base: str | os.PathLike,
    *,
    tolerance: float = 1e-4,
    prompts: Sequence[str] | None = None,
    console: "Console | None" = None,
) -> Verification:
    """Runs a Flax adapter and a PEFT adapter on one base model and compares their logits at every position.

    Both sides compute in float32 on the CPU, each in its own process, one after the other, so that only one model is in
    memory at a time.

    Args:
        flax_dir: the adapter in Flax.
        peft_dir: the adapter in PEFT's format.
        base: the folder of the Hugging Face checkpoint that both are for.
        tolerance: the greatest difference that passes, relative to the greatest magnitude of a logit.
        prompts: the texts to run; by default a few fixed ones. They are tokenised with the checkpoint's
            ``tokenizer.json``; a checkpoint without one gets random tokens.
        console: where progress is shown; None shows none.

    Returns:
        The comparison; ``passed`` tells whether it is within the tolerance.

    Raises:
        AdapterError: an adapter or the checkpoint is broken, or they don't fit together.
    """
    if not tolerance > 0:
        raise AdapterError(f"tolerance: expected a number above 0, found {tolerance}")
    read_flax(flax_dir)
    read_peft(peft_dir)
    rows = _tokens(base, PROMPTS if prompts is None else prompts, chosen=prompts is not None)
    with tempfile.TemporaryDirectory(prefix="road-verify.") as folder:
        work = Path(folder)
        ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        np.save(work / "input_ids.npy", ids)
        np.save(work / "attention_mask.npy", mask)
        with _progress(console) as show:
            for done, ((side, name), adapter) in enumerate(zip(_SIDES, (flax_dir, peft_dir), strict=True)):
                show(f"{name}: the base model, without and with the adapter", done)
                _run(side, name, base, adapter, work)
        found = {
            (side, kind): np.load(work / f"{side}_{kind}.npy", mmap_mode="r")
            for side, _ in _SIDES
            for kind in ("base", "adapted")
        }
        return _compare(found, tolerance)


def _compare(found: dict[tuple[str, str], NDArray[np.float32]], tolerance: float) -> Verification:
    """Compares ``[positions, vocab]`` logits."""
    flax, torch = found["flax", "adapted"], found["torch", "adapted"]
    if flax.shape != torch.shape:
        raise AdapterError(f"verify: expected logits of one shape, found {list(flax.shape)} and {list(torch.shape)}")
    difference = np.abs(flax - torch)
    return Verification(
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean(dtype=np.float64)),
        base_difference=float(np.abs(found["flax", "base"] - found["torch", "base"]).max()),
        scale=float(np.abs(torch).max()),
        moved=float(np.abs(torch - found["torch", "base"]).max()),
        greedy_agreement=float((flax.argmax(-1) == torch.argmax(-1)).mean()),
        positions=len(flax),
        tolerance=tolerance,
    )


def _tokens(base: str | os.PathLike, prompts: Sequence[str], *, chosen: bool) -> list[list[int]]:
    """Returns the prompts' tokens, one list each."""
    # A config may leave out the size of the vocabulary.
    entries = read_entries(base).items()
    vocabulary = next((entry.shape[0] for name, entry in entries if name.endswith(EMBEDDINGS) and entry.shape), 0)
    if not vocabulary:
        raise AdapterError(f"{base}: expected an embedding of tokens, found none")
    if not (Path(base) / "tokenizer.json").is_file():
        if chosen:
            raise AdapterError(f"{base}: expected a tokenizer.json for the prompts, found none")
        rng = np.random.default_rng(0)
        return [rng.integers(vocabulary, size=length).tolist() for length in (5, 16, 11, 24)]
    from tokenizers import Tokenizer

    path = inside(base, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        raise AdapterError(f"{path}: expected a tokenizer, found a file that can't be read ({error})") from None
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    if not rows:
        raise AdapterError("prompts: expected at least one, found none")
    for prompt, row in zip(prompts, rows, strict=True):
        if not row or max(row) >= vocabulary:
            found = "none" if not row else f"token {max(row)}"
            raise AdapterError(f"prompt {prompt!r:.40}: expected tokens below vocab_size {vocabulary}, found {found}")
    return rows


def _run(side: str, name: str, base: str | os.PathLike, adapter: str | os.PathLike, work: Path) -> None:
    command = [sys.executable, "-P", "-c", _CHILD.format(side=side), str(Path(__file__).parents[1])]
    command += [str(Path(base).absolute()), str(Path(adapter).absolute()), str(work)]
    # Exact float32 on both sides, and no access to a hub.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env, check=False
    )
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 2 and lines[-1].startswith("error: "):
        raise AdapterError(lines[-1].removeprefix("error: "))
    found = f"signal {-done.returncode}" if done.returncode < 0 else lines[-1].strip()
    raise AdapterError(f"{base}: expected the {name} side to run with {adapter}, found {found}")


@contextlib.contextmanager
def _progress(console: "Console | None") -> Iterator[Callable[[str, int], None]]:
    """Yields a function that shows a step's text and how many steps are done."""
    if console is None:
        yield lambda text, done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Outside of a terminal, a transient bar leaves an empty line.
    silent = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("", total=len(_SIDES))
        yield lambda text, done: bar.update(task, description=text, completed=done)

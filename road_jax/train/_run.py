"""`train`: a training run, from options to files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from road_core import Adapter, AdapterError, RoadConfig, output_size, select_modules, subspace_blocks, write_flax
from road_core._config import config_of_run
from road_core._files import check_free, dump_json, open_alone, write_file
from road_core._picture import draw_rotations
from road_core._safetensors import HEAD
from road_jax import models
from road_jax._io import to_record
from road_jax._transform import Road, transform
from road_jax._tree import dotted
from road_jax.train import _data, _options, _processes, _step
from road_jax.train._checkpoint import Checkpoints
from road_jax.train._options import TrainOptions
from road_jax.train._plots import draw_loss


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        out: the run's folder.
        steps: the total number of optimiser steps.
        parameters: the number of trained parameters.
        seconds: time spent training, over all resumptions, including compilation.
        tokens: the number of tokens seen, without padding.
        before: evaluation of the base; empty without held-out lines, see `train`.
        after: evaluation of the adapter.
    """

    out: Path
    steps: int
    parameters: int
    seconds: float
    tokens: int
    before: dict[str, float]
    after: dict[str, float]


def train(options: TrainOptions, *, console: Console | None = None) -> TrainResult:
    """Runs or resumes a training run.

    Writes to ``options.out``: ``road_adapter.safetensors`` and ``road_config.json``, ``metrics.jsonl`` (one line per
    step: ``step, loss, learning_rate, gradient_norm, tokens, seconds``; one line per evaluation:
    ``step, eval_loss, eval_token_accuracy, eval_exact, eval_lines``), ``loss.png``, ``rotations.png``, ``options.json``
    and ``checkpoints``. ``eval_exact`` is the share of held-out lines in which every completion token is the model's
    first choice given the tokens before it, so that greedy generation reproduces the line.

    An interrupt (SIGINT or SIGTERM) ends the run after the steps that the devices have, one or two, with a checkpoint,
    or without one before the first step.

    With a ``coordinator``, several processes form one run: each calls this with the same options except ``process``, on
    a folder that all of them see, and computes its share of every batch. The result is that of one process with as many
    devices.

    Args:
        options: see `TrainOptions`.
        console: for the progress bar; stderr by default.

    Raises:
        AdapterError: the input is bad (found before anything is written), or a loss isn't finite.
        KeyboardInterrupt: the run was interrupted.
    """
    # Before the signals are watched, because it installs a handler of its own.
    _processes.join(options.coordinator, options.processes, options.process)
    with _interruptible() as interrupted:
        return _train(options, console, interrupted)


def _train(options: TrainOptions, console: Console | None, interrupted: "_Interrupted") -> TrainResult:
    console = console or Console(stderr=True, quiet=not _processes.is_first())
    mesh = _processes.agreed(lambda: _options.check(options))
    fingerprint = _processes.agreed(lambda: _options.fingerprint(options))
    _processes.check_same(_options.shared_fields(options, fingerprint), "options")
    if options.resume:
        _options.check_begun(options, fingerprint)
    if options.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
    with console.status(f"reading {options.data}"):
        tokenizer = _processes.agreed(lambda: load_tokenizer(options.base))
        examples, held_out = _examples(options, tokenizer)
        total = options.steps or _count_steps(options, examples)
        fingerprint[_options.TOKENS] = _digest([*examples, *held_out])
        fingerprint[_options.BASE] = _processes.agreed(lambda: _options.digest_base(options.base))
        _processes.check_same({_options.BASE: fingerprint[_options.BASE]}, "base")
        if options.resume:
            _options.check_begun(options, fingerprint)
    with console.status(f"loading {options.base}"):
        module, variables = _processes.agreed(lambda: _load(options, mesh))
        models.check_mesh(module.config, mesh)
        if module.config.tie_word_embeddings:
            _check_no_head(options)
        config = config_of_run(dataclasses.asdict(options))
        road = transform(module, config)
        sample = jnp.zeros((1, 8), jnp.int32)
        # Modules that are trained whole are float32 too; their layers still compute in the base's dtype.
        adapter = jax.tree.map(jnp.float32, road.init(jax.random.key(options.seed), variables, sample))
        _check_targets(road)
        tx, rates = _step.optimizer(
            options.learning_rate, total, warmup=options.warmup, weight_decay=options.weight_decay
        )
        state = _step.State(adapter, tx.init(adapter))
        program = _step.make_program(
            road, tx, variables, state, parallel=options.parallel, accumulate=options.accumulate, mesh=mesh
        )
        variables = program.place(variables)

    run = _Run(options, examples, total, fingerprint)
    with run.open(state) as (checkpoints, state, step):
        state = program.place_state(state)

        def evaluate(step: int) -> dict[str, float]:
            if not held_out:
                return {}
            record = _evaluate(program, state.adapter, variables, held_out, options)
            if not np.isfinite(loss := record["eval_loss"]):
                raise AdapterError(f"step {step}: expected a finite loss of the lines that are held out, found {loss}")
            run.log({"step": step, **record})
            return record

        def checkpoint(step: int) -> None:
            checkpoints.save(step, program.fetch(state), run.meta())

        def stop_if_interrupted() -> None:
            if _processes.any_of(interrupted.seen):
                raise KeyboardInterrupt

        with _bar(console) as progress, interrupted.later():
            stop_if_interrupted()
            if step == 0:
                with console.status("evaluating the base"):
                    evaluate(0)
                stop_if_interrupted()
            task = progress.add_task("training", total=total, completed=step, loss=float("nan"), rate=0.0)
            first = step
            profile = _Profile(options.out / "profile", first + 1, first + 1 + options.profile_steps)
            reports = _Reports(run, rates, functools.partial(progress.update, task))
            while step < total:
                profile.at(step)
                started = time.perf_counter()
                batch = run.next_batch()
                state, metrics = program.train(state, variables, batch)
                step += 1
                reports.add(step, metrics, batch.tokens, started)
                stopping = _processes.any_of(interrupted.seen)
                evaluating = step < total and step % (options.eval_every or total) == 0
                saving = step % options.checkpoint_every == 0 or step == total
                if stopping or evaluating or saving or profile.turns_at(step):
                    # A checkpoint's steps are logged and found finite before it is written.
                    reports.read()
                if stopping or step == total:
                    profile.stop()
                if stopping:
                    checkpoint(step)
                    raise KeyboardInterrupt
                if evaluating:
                    evaluate(step)
                if saving:
                    checkpoint(step)
        if not any("eval_loss" in record and record["step"] == total for record in run.records):
            with console.status("evaluating the adapter"):
                evaluate(total)
        record = to_record(program.fetch(state).adapter, config)
        if _processes.is_first():
            # Weight decay may have changed values outside of the subspace, which have no effect.
            write_flax(options.out, record.cleared(), overwrite=True)
            draw_loss(run.records, options.out / "loss.png")
            draw_rotations(record, options.out / "rotations.png")
        _processes.wait("written")
    return run.result(_trained(record))


def _trained(record: Adapter) -> int:
    """Returns the number of trained parameters: θ and α within the subspace, and modules that were trained whole."""
    config, count = record.config, sum(array.size for array in record.modules_to_save.values())
    for theta, alpha in record.modules.values():
        size = theta.shape[-1]
        out = output_size(config.variant, size)
        first, last = subspace_blocks(out, config.subspace)
        count += (theta.size + alpha.size) // size * ((last - first) * 2 * size // out)
    return count


def _check_no_head(options: TrainOptions) -> None:
    """Refuses to train the head of a model that ties it to the embedding."""
    for name in ("target_modules", "modules_to_save"):
        if HEAD in getattr(options, name):
            raise AdapterError(
                f"{name}: expected modules with a weight of their own, found {HEAD}, which shares the embedding's in "
                f"{options.base} (tie_word_embeddings)"
            )


def _check_targets(road: Road) -> None:
    """Refuses a target that no layer matches; PEFT's rule, that not every name needs a match, would hide a mistake."""
    names = [dotted(path) for path in road._seen]
    targets = road.config.target_modules
    for target in targets if isinstance(targets, list) else ():
        select_modules(RoadConfig(target_modules=[target]), names, linear=names)


def _load(options: TrainOptions, mesh: Mesh) -> tuple[models.Decoder, dict[str, Any]]:
    """Loads the base, for the devices of this process."""
    try:
        return models.load(
            options.base,
            dtype=jnp.dtype(options.dtype),
            scan=options.scan,
            remat=options.remat,
            # pmap replicates whole params.
            mesh=mesh if options.parallel == "jit" else None,
            quantize=None if options.quantize == "none" else options.quantize,
            exclude=(HEAD, *options.modules_to_save),
        )
    except AdapterError as error:
        # Modules that are to be trained whole are what the loader excludes.
        raise AdapterError(re.sub("^exclude:", "modules_to_save:", str(error))) from None


def load_tokenizer(base: Path) -> Any:
    """Loads a checkpoint's tokenizer from its folder only.

    Raises:
        AdapterError: the folder or its tokenizer is missing, or the model type is unknown.
    """
    if not base.is_dir():
        raise AdapterError(
            f"{base}: expected a folder with a checkpoint, found {'a file' if base.exists() else 'nothing'}"
        )
    # Otherwise transformers would complain about an unknown model type on stderr.
    models.read_config(base)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's files make it raise
        reason = " ".join(str(error).split())[:160]
        raise AdapterError(f"{base}: expected a tokenizer, found none that can be loaded ({reason})") from None


class _Profile:
    """A trace of some steps, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._running = False

    def turns_at(self, step: int) -> bool:
        """True if the trace starts or stops after so many steps, all of which must have ended by then."""
        return self._first < self._last and step in (self._first, self._last)

    def at(self, step: int) -> None:
        """Starts or stops the trace, if it is to start or stop before this step."""
        if step == self._first < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._last:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class _Reports:
    """Reads, logs and shows each step's metrics, one step late.

    By then the devices have the next step, and needn't wait until the host has read this one's.
    """

    def __init__(self, run: "_Run", rates: np.ndarray, show: Callable[..., None]) -> None:
        self._run, self._rates, self._show = run, rates, show
        self._unread: tuple[int, _step.Metrics, int, float] | None = None
        self._last = 0.0

    def add(self, step: int, metrics: _step.Metrics, tokens: int, started: float) -> None:
        """Takes the metrics of a step that the devices have begun, and reads those of the step before.

        Raises:
            AdapterError: the step before has a loss that isn't finite.
        """
        self.read()
        self._unread = step, metrics, tokens, started

    def read(self) -> None:
        """Waits until the last step has ended, and reads its metrics, unless that was done.

        Raises:
            AdapterError: its loss isn't finite.
        """
        if self._unread is None:
            return
        (step, metrics, tokens, started), self._unread = self._unread, None
        loss = float(metrics.loss)
        if not np.isfinite(loss):
            raise AdapterError(f"step {step}: expected a finite loss, found {loss} (a lower --learning-rate may help)")
        ended = time.perf_counter()
        # A step begins when the one before has ended, even if it was handed over earlier.
        seconds = ended - max(started, self._last)
        self._last = ended
        self._run.log_step(step, loss, self._rates[step - 1].item(), float(metrics.gradient_norm), tokens, seconds)
        self._show(completed=step, loss=loss, rate=tokens / seconds)


class _Run:
    """The folder of a run: its log, its position in the data, and what a resumption continues from."""

    def __init__(
        self, options: TrainOptions, examples: list[_data.Example], total: int, fingerprint: dict[str, Any]
    ) -> None:
        self.options, self.total, self._fingerprint = options, total, fingerprint
        self.records: list[dict[str, Any]] = []
        epochs = None if options.steps else options.epochs
        self._batches = _data.packed(
            examples, rows=options.batch_size, length=options.max_length, seed=options.seed, epochs=epochs
        )
        self._metrics = options.out / "metrics.jsonl"

    @contextlib.contextmanager
    def open(self, state: _step.State) -> Iterator[tuple[Checkpoints, _step.State, int]]:
        """Makes or reopens the folder; yields its checkpoints, the state to continue from and that state's step."""
        options = self.options
        # Every process must have checked the folder before the first one writes to it.
        _processes.wait("checked")
        with _processes.agreed(self._begin), Checkpoints(options.out) as checkpoints:
            step = 0
            if options.resume:
                # A run that was stopped before its first checkpoint starts again.
                found = checkpoints.restore(state)
                if found is not None:
                    step, state, meta = found
                    self._batches.set_state(meta["data"])
                    # Steps that were logged after the checkpoint are repeated.
                    self.records = [record for record in _read_log(self._metrics) if record["step"] <= step]
                _processes.wait("read")
                if _processes.is_first():
                    write_file(self._metrics, b"".join(_line(record) for record in self.records))
            yield checkpoints, state, step

    def _begin(self) -> contextlib.AbstractContextManager:
        """Locks the folder, so that no other run writes to it at the same time; process 0 does this for all."""
        options = self.options
        if not _processes.is_first():
            return contextlib.nullcontext()
        options.out.mkdir(parents=True, exist_ok=True)
        file = open_alone(options.out / "options.json")
        if not options.resume:
            if file.read(1):
                file.close()
                # Another run has begun here since this one checked.
                check_free(options.out)
            file.write(dump_json(self._fingerprint))
            file.flush()
        return file

    def next_batch(self) -> _data.Batch:
        return _data.to_batch(next(self._batches), self.options.batch_size)

    def meta(self) -> dict[str, Any]:
        return {"data": self._batches.get_state()}

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if _processes.is_first():
            with open(self._metrics, "ab") as file:
                file.write(_line(record))

    def log_step(self, step: int, loss: float, rate: float, gradient_norm: float, tokens: int, seconds: float) -> None:
        self.log(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": gradient_norm,
                "tokens": tokens,
                "seconds": round(seconds, 4),
            }
        )

    def result(self, parameters: int) -> TrainResult:
        evals = [
            {k.removeprefix("eval_"): v for k, v in r.items() if k != "step"} for r in self.records if "eval_loss" in r
        ]
        steps = [record for record in self.records if "loss" in record]
        return TrainResult(
            out=self.options.out,
            steps=self.total,
            parameters=parameters,
            seconds=sum(record["seconds"] for record in steps),
            tokens=sum(record["tokens"] for record in steps),
            before=evals[0] if evals else {},
            after=evals[-1] if evals else {},
        )


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``; leaves out a last line that was cut off, because its step is repeated."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise AdapterError(f"{path}: expected a line of JSON a step, found others ({error})") from None


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _digest(examples: list[_data.Example]) -> str:
    """Returns a digest of all tokens, which may differ between runs: a chat template may write today's date."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(len(example.input_ids)).tobytes())
        digest.update(example.input_ids.tobytes() + example.is_target.tobytes())
    return digest.hexdigest()


def _examples(options: TrainOptions, tokenizer: Any) -> tuple[list[_data.Example], list[_data.Example]]:
    """Returns the examples to train on and the held-out ones."""

    def share(path: Path) -> list[_data.Example]:
        lines = _data.read_lines(path, (jax.process_index(), jax.process_count()))
        examples = _data.tokenize(lines, tokenizer, str(path))
        _data.check_ids(examples, models.read_config(options.base).vocab_size, tokenizer, str(path))
        return examples

    def read(path: Path) -> list[_data.Example]:
        examples = _data.gather(_processes.agreed(functools.partial(share, path)))
        examples = _data.check_lengths(examples, options.max_length, str(path), skip_long=options.skip_long)
        _data.check_learned(examples, str(path))
        return examples

    examples = read(options.data)
    if options.eval_data:
        return examples, read(options.eval_data)
    lines, of_line = _by_line(examples)
    if options.eval_lines >= len(lines):
        raise AdapterError(
            f"{options.data}: expected more than the {options.eval_lines} lines that are held out, "
            f"found {len(lines)} (see --eval-lines)"
        )
    is_held = np.zeros(len(lines), bool)
    is_held[np.random.default_rng(options.seed).permutation(len(lines))[: options.eval_lines]] = True
    kept, held = ([examples[i] for i in np.flatnonzero(is_held[of_line] == held)] for held in (False, True))
    return kept, held


def _by_line(examples: list[_data.Example]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of all lines that have examples, and each example's index among them."""
    return np.unique([example.line for example in examples], return_inverse=True)


def _count_steps(options: TrainOptions, examples: list[_data.Example]) -> int:
    return _data.count(
        _data.packed(
            examples, rows=options.batch_size, length=options.max_length, seed=options.seed, epochs=options.epochs
        )
    )


def _evaluate(
    program: _step.Program, adapter: Any, variables: Any, examples: list[_data.Example], options: TrainOptions
) -> dict[str, float]:
    rows = options.batch_size
    loss = right_tokens = tokens = 0.0
    lines, of_line = _by_line(examples)
    all_right = np.ones(len(lines), bool)
    for element in _data.packed(examples, rows=rows, length=options.max_length, seed=None, epochs=1):
        batch = _data.to_batch(element, rows)
        total, right = program.evaluate(adapter, variables, batch)
        targets = batch.weights > 0
        loss, tokens = loss + total, tokens + float(targets.sum())
        right_tokens += float((right & targets).sum())
        all_right[of_line[_data.examples_at(element, batch)[targets & ~right]]] = False
    return {
        "eval_loss": loss / tokens,
        "eval_token_accuracy": right_tokens / tokens,
        "eval_exact": float(all_right.mean()),
        "eval_lines": len(lines),
    }


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


class _Interrupted:
    """Handles a first SIGINT or SIGTERM: raises, or only takes note of it, so that no step is cut in two."""

    def __init__(self) -> None:
        self.seen = False
        self._raises = True

    def __call__(self, number: int, _: Any) -> None:
        self.seen = True
        # A second signal acts at once.
        signal.signal(number, signal.default_int_handler)
        if self._raises:
            # The exception is lost if it is raised within a callback, such as JAX's in the garbage collector; ``seen``
            # isn't.
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Defers signals: in this context whoever reads ``seen`` ends the run; after it a signal raises again."""
        self._raises = False
        try:
            yield
        finally:
            self._raises = True


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interrupted]:
    """Watches for SIGINT and SIGTERM, if this is the main thread."""
    interrupted = _Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from _compare import assert_close
from _models import small_checkpoint
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

import road_jax
from road_core import AdapterError, read_flax
from road_jax.train import TrainOptions, _run, train

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(autouse=True, scope="module")
def programs(tmp_path_factory):
    """Keeps compiled programs, since many tests train on the same shapes."""
    with contextlib.ExitStack() as stack:
        stack.callback(compilation_cache.reset_cache)
        for name, value in (
            ("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs"))),
            ("jax_persistent_cache_min_compile_time_secs", 0.3),
        ):
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Counting on: 'three four' is answered by 'five six'."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(160):
        start, length = rng.integers(0, 6), rng.integers(1, 3)
        said, answer = NUMBERS[start : start + length], NUMBERS[start + length : start + length + 2]
        lines.append(json.dumps({"prompt": " ".join(said), "completion": " ".join(answer)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def options(base, data, tmp_path):
    return TrainOptions(
        base=base,
        data=data,
        out=tmp_path / "run",
        batch_size=8,
        max_length=32,
        steps=12,
        learning_rate=3e-2,
        dtype="float32",
        eval_lines=32,
        checkpoint_every=4,
    )


def run(options, pictures=False):
    """Trains; without its pictures, which take a second to draw, unless they are asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else ("draw_loss", "draw_rotations"):
            patch.setattr(_run, name, lambda *_: None)
        return train(options, console=Console(file=io.StringIO()))


def log(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_everything_it_promises(options):
    result = run(options, pictures=True)
    assert result.after["loss"] < 0.7 * result.before["loss"]
    assert result.after["token_accuracy"] > result.before["token_accuracy"]
    adapter, config = road_jax.load_adapter(options.out)
    assert config.target_modules == "all-linear"
    assert result.parameters == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert np.abs(adapter["model"]["layers"]["mlp"]["up_proj"]["road_theta"]).max() > 1e-2
    for picture in ("loss.png", "rotations.png"):
        assert (options.out / picture).read_bytes().startswith(b"\x89PNG")
    records = log(options.out)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    rates = [record["learning_rate"] for record in steps]
    assert rates[0] == max(rates) == pytest.approx(3e-2)
    assert rates[-1] == pytest.approx(3e-2 / 11, rel=1e-3)
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 12]


def test_the_evaluation_is_what_the_model_says_line_by_line(options, base):
    """Although packed and masked, the evaluation gives each line's own loss and greedy answer."""
    import torch
    import transformers

    from road_jax.train import _data

    result = run(dataclasses.replace(options, steps=1, eval_data=options.data))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    losses, exact = [], []
    for example in _data.tokenize(_data.read_lines(options.data), tokenizer, "f"):
        with torch.no_grad():
            logits = model(torch.from_numpy(example.input_ids).long()[None]).logits[0, :-1]
        targets, learned = torch.from_numpy(example.input_ids).long()[1:], example.is_target[1:] == 1
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[learned]
        losses += loss.tolist()
        exact.append(bool((logits.argmax(-1) == targets)[learned].all()))
    assert result.before["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.before["exact"] == pytest.approx(np.mean(exact))


def contents(directory):
    names = ("road_adapter.safetensors", "road_config.json")
    return {name: (directory / name).read_bytes() for name in names}


def same_but_for_times(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


# The first checkpoint is written at step 4.
@pytest.mark.parametrize(("parallel", "stops"), [("jit", (2, 6)), ("pmap", (6,))])
def test_resuming_is_as_if_never_stopped(parallel, stops, options, tmp_path, monkeypatch):
    options = dataclasses.replace(options, parallel=parallel)
    run(options)
    stopped = dataclasses.replace(options, out=tmp_path / "stopped")

    whole = _run._Run.next_batch
    for stop in stops:

        def failing(self, stop=stop):
            if len([r for r in self.records if "loss" in r]) == stop:
                raise RuntimeError("the power went")
            return whole(self)

        monkeypatch.setattr(_run._Run, "next_batch", failing)
        with pytest.raises(RuntimeError, match="the power went"):
            run(stopped)
        assert log(stopped.out)[-1]["step"] == stop
        with open(stopped.out / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "lo')
        stopped = dataclasses.replace(stopped, resume=True)
    monkeypatch.undo()
    run(stopped)
    assert contents(stopped.out) == contents(options.out)
    assert same_but_for_times(log(stopped.out)) == same_but_for_times(log(options.out))


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_loss_is_read_once_the_devices_have_the_next_step(parallel, options, monkeypatch):
    from road_jax.train import _step

    whole, events = _step.make_program, []

    class Watched:
        def __init__(self, value):
            assert isinstance(value, jax.Array)
            self.value, self.step = value, len([event for event in events if event[0] == "train"])

        def __float__(self):
            events.append(("read", self.step))
            return float(self.value)

    def watched(*arguments, **keywords):
        program = whole(*arguments, **keywords)

        def step(*arguments):
            events.append(("train", len([event for event in events if event[0] == "train"]) + 1))
            state, metrics = program.train(*arguments)
            return state, metrics._replace(loss=Watched(metrics.loss))

        return program._replace(train=step)

    monkeypatch.setattr(_step, "make_program", watched)
    run(dataclasses.replace(options, steps=6, eval_lines=0, parallel=parallel))
    # A checkpoint is written at step 4, and for that the step is waited for.
    told = " ".join(f"{what[0]}{step}" for what, step in events)
    assert told == "t1 t2 r1 t3 r2 t4 r3 r4 t5 t6 r5 r6"
    assert [record["step"] for record in log(options.out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("steps", "warmup"), [(60, 0.1), (333, 0.37), (7, 0.0), (50, 1.0)])
def test_the_rates_on_the_host_are_optaxs(steps, warmup):
    from road_jax.train import _step

    _, rates = _step.optimizer(3e-3, steps, warmup=warmup, weight_decay=0.0)
    up = round(steps * warmup)
    lines = [(3e-3 / max(up, 1), 3e-3, max(up - 1, 1)), (3e-3, 0.0, max(steps - up, 1))]
    schedule = optax.join_schedules([optax.linear_schedule(*line) for line in lines], [up])
    assert rates.tolist() == [float(schedule(step)) for step in range(steps)]


def test_every_way_of_running_learns_the_same(options, tmp_path):
    """jit, pmap, unrolled, and with remat: the same adapter up to rounding, and matching gradients."""
    result = {}
    for name, changes in {
        "jit": {},
        "pmap": {"parallel": "pmap"},
        "unrolled": {"scan": False},
        "no remat": {"remat": "none"},
        "full remat": {"remat": "full"},
        "in parts": {"accumulate": 2},
        "in parts, pmap": {"accumulate": 2, "parallel": "pmap"},
    }.items():
        out = tmp_path / name
        run(dataclasses.replace(options, out=out, steps=3, eval_lines=0, batch_size=16, **changes))
        result[name] = read_flax(out)
        norms = [record["gradient_norm"] for record in log(out)]
        result.setdefault("norms", norms)
        np.testing.assert_allclose(norms, result["norms"], rtol=1e-4)
    expected = result["jit"].tensors()
    start = {key: float("alpha" in key) for key in expected}
    for name in ("pmap", "no remat", "full remat", "in parts", "in parts, pmap"):
        for key, array in result[name].tensors().items():
            np.testing.assert_allclose(array, expected[key], atol=2e-4)
    for key, array in result["unrolled"].tensors().items():
        layer = int(re.search(r"layers\.(\d+)\.", key)[1])
        stacked = expected[re.sub(r"layers\.\d+\.", "layers.", key)]
        np.testing.assert_allclose(array, stacked[layer], atol=2e-4)
    assert max(np.abs(array - start[key]).max() for key, array in expected.items()) > 2e-2


def test_bfloat16_bases_train_float32_adapters(options):
    result = run(dataclasses.replace(options, dtype="bfloat16"))
    assert result.after["loss"] < 0.8 * result.before["loss"]
    assert {array.dtype.name for array in read_flax(options.out).tensors().values()} == {"float32"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_trained_on(kind, options):
    """The loss is that of the quantised base, which differs from the plain one's."""
    result = run(dataclasses.replace(options, quantize=kind))
    assert result.after["loss"] < 0.8 * result.before["loss"]
    plain = run(dataclasses.replace(options, out=options.out.parent / "plain", steps=1))
    assert abs(result.before["loss"] - plain.before["loss"]) > 1e-3


def test_traces_and_compiled_programs_are_kept(options, tmp_path):
    done = subprocess.run(
        command(options, "--steps", "4", "--profile-steps", "2", "--compile-cache", str(tmp_path / "cache")),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((options.out / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "cache").iterdir())


def test_epochs_go_through_the_data(options):
    result = run(dataclasses.replace(options, steps=None, epochs=2, eval_lines=0))
    lengths = [record["tokens"] for record in log(options.out)]
    assert sum(lengths) == result.tokens
    lines = [json.loads(line) for line in options.data.read_text().splitlines()]
    expected = sum(5 + len(line["prompt"].split()) - 1 + len(line["completion"].split()) for line in lines)
    assert result.tokens == 2 * expected


def test_few_compilations(options):
    """Rows are packed to one shape; only the number of targets may be rounded up to another power of two."""
    from road_jax.train import _step

    traces = []
    whole = _step.summed_loss

    def counted(*arguments):
        traces.append(1)
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_step, "summed_loss", counted)
        run(options)
    # One each for training and evaluation.
    assert len(traces) <= 3


def smaller(folder):
    """A checkpoint whose embedding has fewer rows than the tokenizer has tokens."""
    return small_checkpoint(Path(tempfile.mkdtemp(dir=folder.parent)), vocab_size=8)


def tied(folder):
    return small_checkpoint(Path(tempfile.mkdtemp(dir=folder.parent)), num_hidden_layers=1, tie_word_embeddings=True)


def nothing_to_learn(folder):
    """Completions without tokens, for a tokenizer without an end token."""
    base = small_checkpoint(Path(tempfile.mkdtemp(dir=folder.parent)), num_hidden_layers=1)
    (base / "chat_template.jinja").unlink()
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    lines = [{"prompt": "one two", "completion": "three" if i % 2 else ""} for i in range(40)]
    (base / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"base": base, "data": base / "lines.jsonl"}


BAD = {
    "no base": (lambda o, t: {"base": t / "none"}, "none: expected a folder with a checkpoint, found nothing"),
    "no data": (lambda o, t: {"data": t / "none.jsonl"}, r"none\.jsonl: expected a file of JSON lines"),
    "steps": (lambda o, t: {"steps": 0}, "steps: expected a number from 1 up, found 0"),
    "rate": (lambda o, t: {"learning_rate": -1.0}, "learning_rate: expected a positive number"),
    "rows": (lambda o, t: {"batch_size": 3}, "batch_size: expected a multiple of the 8 devices"),
    "parts": (lambda o, t: {"accumulate": 2}, "a multiple of the 8 devices times 2 parts of a step, .* found 8"),
    "group size": (
        lambda o, t: {"group_size": 96},
        r"self_attn\.q_proj: expected a number of outputs that group_size 96 divides, found 128",
    ),
    "targets": (lambda o, t: {"target_modules": ("q_prj",)}, "q_prj.*nearest: q_proj"),
    "one of the targets": (
        lambda o, t: {"target_modules": ("q_proj", "v_porj")},
        r"expected a match for \['v_porj'\], nearest: v_proj",
    ),
    "a tied head to rotate": (
        lambda o, t: {"base": tied(t), "target_modules": ("q_proj", "lm_head")},
        r"target_modules: expected .* weight of their own, found lm_head, which shares the embedding's in .*tie_word",
    ),
    "a tied head to train": (
        lambda o, t: {"base": tied(t), "modules_to_save": ("lm_head",)},
        r"modules_to_save: expected .* weight of their own, found lm_head, which shares the embedding's",
    ),
    "whole": (lambda o, t: {"modules_to_save": ("zzz",)}, "^modules_to_save: expected modules .* found no 'zzz'"),
    "decay": (lambda o, t: {"weight_decay": float("nan")}, "^weight_decay: expected a number from 0 up, found nan"),
    "a seed": (lambda o, t: {"seed": -1}, "^seed: expected a number from 0 to 4294967295, found -1"),
    "a large seed": (lambda o, t: {"seed": 1 << 70}, "^seed: expected a number from 0 to 4294967295"),
    "nothing to learn": (
        lambda o, t: nothing_to_learn(t),
        r"lines\.jsonl, line 1 and 19 more: expected a completion that is a token or more .*, found none",
    ),
    "a way to run": (lambda o, t: {"parallel": "vmap"}, "parallel: expected one of jit, pmap, found 'vmap'"),
    "held out": (lambda o, t: {"eval_lines": 1000}, "expected more than the 1000 lines"),
    "long": (lambda o, t: {"max_length": 4}, "line 1: expected at most 4 tokens"),
    "tokens": (
        lambda o, t: {"base": smaller(t)},
        r"train\.jsonl, line \d+: expected tokens below the model's vocab_size 8, found \d+ \('\w+'\)",
    ),
    "nothing to resume": (lambda o, t: {"resume": True}, "expected a run to resume"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(name, options, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(AdapterError, match=message):
        run(dataclasses.replace(options, **changes(options, tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_left_alone(options):
    options.out.mkdir()
    (options.out / "mine").write_text("mine")
    with pytest.raises(AdapterError, match="already holds something"):
        run(options)
    assert [path.name for path in options.out.iterdir()] == ["mine"]


def test_another_runs_options_are_not_resumed(options, tmp_path):
    options = dataclasses.replace(options, base=shutil.copytree(options.base, tmp_path / "base"))
    run(dataclasses.replace(options, steps=2))
    with pytest.raises(AdapterError, match=r"found learning_rate 0\.5 instead of 0\.03"):
        run(dataclasses.replace(options, steps=2, resume=True, learning_rate=0.5))
    template = options.base / "chat_template.jinja"
    template.write_text("<system> {{ strftime_now('%Y') }} </s>" + template.read_text())
    with pytest.raises(AdapterError, match="expected the options that the run began with, found tokens_sha256"):
        run(dataclasses.replace(options, steps=2, resume=True))
    path = options.out / "options.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": 0.5}))
    with pytest.raises(AdapterError, match=r"found dropout None instead of 0\.5"):
        run(dataclasses.replace(options, steps=2, resume=True))


def test_another_base_at_the_same_path_is_not_resumed(options, tmp_path):
    options = dataclasses.replace(options, base=shutil.copytree(options.base, tmp_path / "base"), steps=2)
    run(options)
    small_checkpoint(options.base, num_hidden_layers=2, seed=1)
    with pytest.raises(AdapterError, match="expected the options that the run began with, found base_sha256"):
        run(dataclasses.replace(options, resume=True))
    # Earlier versions didn't write it.
    path = options.out / "options.json"
    fields = json.loads(path.read_text())
    del fields["base_sha256"]
    path.write_text(json.dumps(fields))
    run(dataclasses.replace(options, resume=True))


def test_a_folder_is_one_runs(options, monkeypatch):
    """A run that saw the folder free but came second is refused, and a run in progress can't be resumed."""
    first = dataclasses.replace(options, steps=1, eval_lines=4)
    load, evaluate = _run._load, _run._evaluate

    def while_it_loads(*arguments):
        monkeypatch.setattr(_run, "_load", load)
        run(first)
        return load(*arguments)

    def while_it_trains(*arguments):
        monkeypatch.setattr(_run, "_evaluate", evaluate)
        with pytest.raises(AdapterError, match=r"options\.json: expected a file that no other process writes"):
            run(dataclasses.replace(first, resume=True))
        return evaluate(*arguments)

    monkeypatch.setattr(_run, "_load", while_it_loads)
    monkeypatch.setattr(_run, "_evaluate", while_it_trains)
    with pytest.raises(AdapterError, match="expected an empty or new folder, found one that already holds something"):
        run(options)
    assert [record["step"] for record in log(options.out)] == [0, 1, 1]
    assert json.loads((options.out / "options.json").read_text())["steps"] == 1


def test_a_loss_that_is_not_finite_ends_the_run(options):
    with pytest.raises(AdapterError, match=r"step \d+: expected a finite loss, found (nan|inf)"):
        run(dataclasses.replace(options, learning_rate=1e30))


def test_a_held_out_loss_that_is_not_finite_is_no_success(options):
    with pytest.raises(AdapterError, match=r"step 1: expected a finite loss of the lines that are held out, found nan"):
        run(dataclasses.replace(options, learning_rate=1e30, steps=1))
    assert not (options.out / "road_adapter.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupt_before_the_first_step(number, swallowed, options, monkeypatch):
    """Also if it is raised in a callback, from which no exception propagates."""
    load, before = _run._load, signal.getsignal(number)

    def interrupted(*arguments):
        with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
            os.kill(os.getpid(), number)
            time.sleep(1)
        return load(*arguments)

    monkeypatch.setattr(_run, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert signal.getsignal(number) == before
    assert not (options.out / "metrics.jsonl").exists()
    if swallowed:
        monkeypatch.undo()
        assert run(dataclasses.replace(options, resume=True)).steps == 12
    else:
        assert not options.out.exists()


def command(options, *more):
    names = ("base", "data", "out", "batch_size", "max_length", "dtype", "eval_lines", "checkpoint_every")
    arguments = [part for n in names for part in (f"--{n.replace('_', '-')}", str(getattr(options, n)))]
    return [sys.executable, "-m", "road_jax.train", *arguments, *more]


def test_the_command_is_interrupted_and_resumed(options):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command(options, "--steps", "100000"), cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (options.out / "metrics.jsonl").exists() and len(log(options.out)) > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("error: interrupted")
    last = log(options.out)[-1]["step"]
    assert (options.out / "checkpoints" / str(last)).is_dir()


def test_the_command_gives_one_line_and_exit_code_2(options, tmp_path):
    # A name that isn't valid text.
    bad = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    bad.write_text('{"prompt": "one", "completion": "two"}\n{"prompt": "one"}\n')
    done = subprocess.run(
        command(dataclasses.replace(options, data=bad)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "line 2" in errors[0]
    assert "Traceback" not in done.stderr
    assert not options.out.exists()


def test_a_checkpoint_that_the_disk_has_no_room_for(options):
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command(options, "--steps", "2")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"(?m)^error: .*checkpoints: expected a folder .* written to, found File too large$", done.stderr)
    assert "Traceback" not in done.stderr


def test_losses_agree_between_devices_and_one(options):
    """The same rows on eight devices and on one: the summed gradient isn't n times too large."""
    assert jax.device_count() == 8
    run(dataclasses.replace(options, steps=2, eval_lines=0))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    one = dataclasses.replace(options, out=options.out.parent / "one", eval_lines=0)
    subprocess.run(
        command(one, "--steps", "2", "--learning-rate", "0.03"),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        capture_output=True,
    )
    for eight, alone in zip(log(options.out), log(one.out), strict=True):
        assert_close(eight["loss"], alone["loss"], "float32")
        np.testing.assert_allclose(eight["gradient_norm"], alone["gradient_norm"], rtol=1e-4)

"""Two real processes over loopback form one run, with the same result as a single process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _models import small_checkpoint

from road_core import AdapterError, read_flax
from road_jax.train import _processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    small_checkpoint(folder / "base", num_hidden_layers=2)
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = [{"prompt": " ".join(names[i % 7 : i % 7 + 2]), "completion": names[i % 7 + 2]} for i in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(files, out, devices, *more):
    command = [sys.executable, "-m", "road_jax.train", "--base", str(files / "base"), "--data"]
    command += [str(files / "data.jsonl"), "--out", str(out), "--batch-size", "4", "--max-length", "32"]
    command += ["--dtype", "float32", "--eval-lines", "16", "--learning-rate", "0.03", "--checkpoint-every", "2", *more]
    # The last of a flag's values counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_two(files, out, *more, each=((), ())):
    joined = ("--coordinator", free_address(), "--processes", "2")
    return [start(files, out, 1, *joined, "--process", str(i), *more, *each[i]) for i in range(2)]


def end(processes, code, seconds=240):
    """Waits until all have ended with this exit code, and returns their output; a failure shows it."""
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=seconds)[1])
        except subprocess.TimeoutExpired:
            # A process that failed and one that waits for it block each other.
            for each in processes:
                each.kill()
            said.append(process.communicate()[1])
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(said)
    return said


def finish(*processes):
    end(processes, 0)


def log(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same(one, other):
    for expected, found in zip(log(one), log(other), strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), key
    for key, array in read_flax(one).tensors().items():
        np.testing.assert_allclose(read_flax(other).tensors()[key], array, atol=2e-4)


@pytest.fixture(scope="module")
def one(files):
    """One process's run with two devices."""
    finish(start(files, files / "one", 2, "--steps", "24"))
    return files / "one"


@pytest.fixture(scope="module")
def two(files):
    """Two processes' run with a device each."""
    finish(*start_two(files, files / "two", "--steps", "24"))
    return files / "two"


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_two_processes_are_one_run(one, two):
    same(one, two)
    assert names(two) == names(one)


def test_two_processes_with_pmap_are_one_run(one, files, tmp_path):
    """In one process, ``pmap`` is compared with ``jit`` in test_train.py."""
    finish(*start_two(files, tmp_path / "two", "--steps", "24", "--parallel", "pmap"))
    same(one, tmp_path / "two")
    assert names(tmp_path / "two") == names(one)


def test_two_processes_share_a_quantised_base(files, tmp_path):
    more = ("--steps", "5", "--mesh", "fsdp=2", "--quantize", "nf4")
    finish(start(files, tmp_path / "one", 2, *more))
    finish(*start_two(files, tmp_path / "two", *more))
    same(tmp_path / "one", tmp_path / "two")
    assert names(tmp_path / "two") == names(tmp_path / "one")


def reach(processes, out, done):
    """Waits until ``done()`` is true, while the run continues."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not done():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.1)


def test_after_a_kill_the_run_goes_on_from_its_checkpoint(files, two, tmp_path):
    more = ("--steps", "24")
    out = tmp_path / "killed"
    processes = start_two(files, out, *more)
    reach(processes, out, (out / "checkpoints" / "4").is_dir)
    processes[1].send_signal(signal.SIGKILL)
    # The other process can't continue alone; how soon it notices depends on the collectives.
    time.sleep(1)
    processes[0].kill()
    for process in processes:
        process.communicate()
    assert log(out)[-1]["step"] < 24
    finish(*start_two(files, out, *more, "--resume"))
    assert log(out) == log(two)
    for name in ("road_adapter.safetensors", "road_config.json"):
        assert (out / name).read_bytes() == (two / name).read_bytes()


def test_an_interrupt_of_one_process_ends_all(files, tmp_path):
    out = tmp_path / "run"
    processes = start_two(files, out, "--steps", "100000")
    reach(processes, out, lambda: (out / "metrics.jsonl").exists() and len(log(out)) > 3)
    processes[1].send_signal(signal.SIGTERM)
    end(processes, 130, 100)
    assert (out / "checkpoints" / str(log(out)[-1]["step"])).is_dir()


def test_a_bad_line_ends_both_processes_with_one_sentence(files, tmp_path):
    lines = (files / "data.jsonl").read_text().splitlines()
    # One of the second process's lines.
    lines[11] = '{"prompt": "one"}'
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    processes = start_two(files, tmp_path / "run", "--data", str(data))
    fail(processes, "data.jsonl, line 12: expected text in the field 'completion'")
    assert not (tmp_path / "run").exists()


def fail(processes, said):
    for errors in end(processes, 2):
        assert said in errors
        assert "Traceback" not in errors


def test_processes_with_other_options_are_refused(files, tmp_path):
    first, second = start_two(files, tmp_path / "run", each=(("--seed", "1"), ("--seed", "2")))
    fail([first, second], "options: expected the same in all processes, found seed 1 in process 0 and 2 in process 1")
    assert not (tmp_path / "run").exists()


GATHER = """
import sys
import numpy as np
from road_core import AdapterError
from road_jax.train import _processes

_processes.join(sys.argv[1], 2, int(sys.argv[2]))
_processes._PIECE = 4
own = np.arange(9, dtype=np.int32) if sys.argv[2] == "1" else np.zeros(0, np.int32)
none, nine = _processes.gather(own)
assert none.shape == (0,) and nine.tolist() == list(range(9)) and nine.dtype == np.int32
assert [one.shape for one in _processes.gather(own[:0])] == [(0,), (0,)]


def work():
    if sys.argv[2] == "1":
        raise RuntimeError("no memory")


try:
    _processes.agreed(work)
except (AdapterError, RuntimeError) as error:
    assert str(error) == "no memory" and isinstance(error, RuntimeError) == (sys.argv[2] == "1")
    print("told", file=sys.stderr)
else:
    sys.exit("no error")
"""


def test_what_is_gathered_in_pieces_is_whole():
    command = [sys.executable, "-c", GATHER, free_address()]
    said = end([subprocess.Popen([*command, i], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in "01"], 0)
    # Each came to its end, by way of the error.
    assert all("told\n" in errors for errors in said), said


def test_numbers_that_contradict_each_other():
    for arguments, message in (
        ((None, 2, 0), "expected a coordinator beside them"),
        (("127.0.0.1:1", 2, 2), "found 2 and 2"),
        (("127.0.0.1:1", None, 0), "found None and 0"),
    ):
        with pytest.raises(AdapterError, match=message):
            _processes.join(*arguments)

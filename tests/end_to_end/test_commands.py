"""The installed commands as a user runs them: the whole workflow, and the responses to bad input."""

import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from _compare import named_values
from _models import WORDS, small_checkpoint

from road_core import Adapter, RoadConfig, read_peft, write_peft

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LAYERS = 2


def command(name, *arguments, cwd, then="pass"):
    """Runs the command that pip would install under this name, and then a statement in its process."""
    module, function = SCRIPTS[name].split(":")
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; {function}(); {then}"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def done(name, *arguments, cwd, then="pass"):
    """Runs a command that has to succeed, and returns what it printed."""
    found = command(name, *arguments, cwd=cwd, then=then)
    assert found.returncode == 0, found.stderr
    assert "PyTorch" not in found.stderr
    return found.stdout


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS, vocab_size=len(WORDS))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_process_starts_anew_once_with_huge_pages():
    code = "import os, sys; from road_core import _command; print(os.getpid()); _command.with_huge_pages()\n"
    code += "print(sys.argv, os.environ['GLIBC_TUNABLES'])"

    def run(**more):
        environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | more
        with subprocess.Popen(
            [sys.executable, "-uc", code, "a b", "-c"], env=environ, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            return process.pid, process.stdout.read().splitlines()

    pid, lines = run()
    assert lines == [str(pid), str(pid), "['-c', 'a b', '-c'] glibc.malloc.hugetlb=1"]
    pid, lines = run(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert lines == [str(pid), "['-c', 'a b', '-c'] glibc.malloc.check=0"]


def test_from_lines_to_answers(base, tmp_path):
    starts = np.random.default_rng(0).integers(0, 7, 80)
    write_lines(tmp_path / "data.jsonl", [{"prompt": NUMBERS[i], "completion": NUMBERS[i + 1]} for i in starts])
    arguments = {
        "--base": base,
        "--data": "data.jsonl",
        "--out": "run",
        "--steps": 12,
        "--batch-size": 8,
        "--max-length": 32,
        "--learning-rate": 0.03,
        "--dtype": "float32",
        "--eval-lines": 16,
        "--variant": "road_2",
        "--group-size": 32,
    }
    given = (part for pair in arguments.items() for part in pair)
    # transformers would import it for the tokenizer.
    out = done("road-train", *given, cwd=tmp_path, then="assert 'torch' not in sys.modules")
    losses = [float(loss) for loss in re.findall(r"held-out loss (\d+\.\d+)", out)]
    assert len(losses) == 2
    assert losses[1] < 0.7 * losses[0]
    modules, parameters = 7 * LAYERS, 2 * LAYERS * (2 * 128 + 2 * 64 + 2 * 192 + 128)
    assert f"{parameters:,} parameters, 12 steps" in out

    out = done("road-convert", "to-torch", "run", "adapter", cwd=tmp_path)
    assert out == f"PEFT adapter, {modules} modules, {parameters:,} parameters: adapter\n"
    assert {theta.shape for theta, _ in read_peft(tmp_path / "adapter").modules.values()} == {(64,), (128,), (192,)}

    out = done("road-convert", "inspect", "adapter", cwd=tmp_path)
    assert '  variant: "road_2"' in out.splitlines()
    assert len(re.findall(r"^model\.layers\.[01]\.\w+\.\w+_proj ", out, re.MULTILINE)) == modules

    out = done("road-convert", "verify", "run", "adapter", "--base", base, "--prompt", "one two", cwd=tmp_path)
    assert "within the tolerance of 0.0001 of the greatest logit" in out
    assert "note:" not in out

    done("road-convert", "to-flax", "adapter", "again", cwd=tmp_path)
    again = contents(tmp_path / "again")
    assert again
    assert again == {name: (tmp_path / "run" / name).read_bytes() for name in again}

    rows = [{"prompt": "three", "adapter": "count", "id": 1}, {"prompt": "three", "id": 2}]
    write_lines(tmp_path / "prompts.jsonl", rows)
    arguments = ["--base", base, "--adapter", "count=adapter", "--prompts", "prompts.jsonl", "--max-new-tokens", 6]
    # Then once more in the same process, on a base of 4 bits.
    again = "sys.argv[-1] = 'nf4'; main()"
    out = done("road-generate", *arguments, "--quantize", "none", cwd=tmp_path, then=again)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["adapter"]) for row in answers] == 2 * [(1, "count"), (2, "__base__")]
    assert answers[0]["completion"] != answers[1]["completion"]
    assert answers[2]["completion"] != answers[3]["completion"]


def peft_adapter(folder, *, layers=LAYERS, wrong=0.0, **fields):
    """Writes an adapter for `q_proj` of each layer; its last θ is ``wrong``, unless that is 0."""
    modules = {}
    for layer in range(layers):
        path = f"model.layers.{layer}.self_attn.q_proj"
        modules[path] = (named_values(f"{path}.theta", 64), named_values(f"{path}.alpha", 64, mean=1.0))
    write_peft(folder, Adapter(RoadConfig(target_modules=["q_proj"], **fields), modules))
    if wrong:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + np.float32(wrong).tobytes())


def broken(base, folder, how):
    """Copies a checkpoint and spoils the copy."""
    shutil.copytree(base, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        os.truncate(weights, weights.stat().st_size - 1000)
    else:
        config.write_text(config.read_text().replace('"llama"', '"lama"'))
    return folder


def train(here, base, *more):
    write_lines(here / "data.jsonl", [{"prompt": "one", "completion": "two"}] * 20)
    arguments = ["--base", base, "--data", "data.jsonl", "--out", "run", "--steps", 1, "--eval-lines", 0]
    return "road-train", *arguments, "--batch-size", 8, "--max-length", 16, *more


def train_on(here, base, text):
    given = train(here, base)
    (here / "data.jsonl").write_text(f'{{"prompt": "one", "completion": "two"}}\n\n{text}\n')
    return given


def train_into_full_folder(here, base):
    (here / "run").mkdir()
    (here / "run" / "notes").write_text("mine")
    return train(here, base)


def generate(here, base, **fields):
    peft_adapter(here / "adapter", **fields)
    write_lines(here / "prompts.jsonl", [{"prompt": "one", "adapter": "a"}])
    arguments = ["--base", base, "--adapter", "a=adapter", "--prompts", "prompts.jsonl", "--out", "answers.jsonl"]
    return "road-generate", *arguments, "--quantize", "nf4"


def generate_with_other_group_size(here, base):
    given = generate(here, base)
    path = here / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "group_size": 96}))
    return given


def verify(here, base, **fields):
    peft_adapter(here / "adapter", **fields)
    done("road-convert", "to-flax", "adapter", "run", cwd=here)
    return "road-convert", "verify", "run", "adapter", "--base", base


# A function that makes the folder and returns the command, and the line that the command must print.
BAD = {
    "train, no checkpoint": (
        lambda d, b: train(d, d / "none"),
        "none: expected a folder with a checkpoint, found noth",
    ),
    "train, truncated checkpoint": (
        lambda d, b: train(d, broken(b, d / "base", "truncated")),
        r"model\.safetensors: expected a whole safetensors file, found a broken one",
    ),
    "train, unknown model type": (
        lambda d, b: train(d, broken(b, d / "base", "model type")),
        r"config\.json: expected model_type to be one of llama, .*, found 'lama'",
    ),
    "train, no JSON": (lambda d, b: train_on(d, b, "{'prompt'"), r"data\.jsonl, line 3: expected JSON, found"),
    "train, no completion": (
        lambda d, b: train_on(d, b, '{"prompt": "one"}'),
        r"data\.jsonl, line 3: expected text in the field 'completion'",
    ),
    "train, full folder": (train_into_full_folder, "run: expected an empty or new folder, found one that already hol"),
    "train, group size": (
        lambda d, b: train(d, b, "--group-size", 96),
        r"self_attn\.q_proj: expected a number of outputs that group_size 96 divides, found 128",
    ),
    "generate, NaN": (lambda d, b: generate(d, b, wrong=np.nan), r"road_theta: expected finite values, found 1"),
    "generate, more layers": (
        lambda d, b: generate(d, b, layers=3),
        r"adapter: expected modules of LlamaForCausalLM, found model\.layers\.2\.self_attn\.q_proj",
    ),
    "generate, fewer layers": (lambda d, b: generate(d, b, layers=1), r"found none for model\.layers\.1\.self_attn"),
    "generate, group size": (
        generate_with_other_group_size,
        r"adapter_config\.json: expected group_size 64, .* found 96",
    ),
    "verify, more layers": (lambda d, b: verify(d, b, layers=3), f"run: expected {LAYERS} layers, .* found 3"),
    "verify, truncated checkpoint": (
        lambda d, b: verify(d, broken(b, d / "base", "truncated")),
        r"model\.safetensors: expected a whole safetensors file, found a broken one",
    ),
}


# One case of each command, in which it comes far; the others' processes would only import the same again.
IN_A_PROCESS = ("train, group size", "generate, fewer layers", "verify, truncated checkpoint")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, base, tmp_path, monkeypatch, capfd):
    prepare, message = BAD[name]
    script, *arguments = prepare(tmp_path, base)
    before = contents(tmp_path)
    if name in IN_A_PROCESS:
        found = command(script, *arguments, cwd=tmp_path)
        code, out, errors = found.returncode, found.stdout, found.stderr
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        # So that this process doesn't start anew.
        monkeypatch.setenv("GLIBC_TUNABLES", "")
        with pytest.raises(SystemExit) as ended:
            pkgutil.resolve_name(SCRIPTS[script])()
        code, (out, errors) = ended.value.code, capfd.readouterr()
    assert code == 2, errors
    assert out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", errors), errors
    assert contents(tmp_path) == before

"""The command, in child processes where neither framework can be imported."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _compare import named_values
from rich.console import Console

import convert
from convert import _cli, _convert, _inspect
from road_core import Adapter, AdapterError, RoadConfig, write_flax, write_peft

ROOT = Path(__file__).parents[2]

RUN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "flax", "torch", "transformers", "ml_dtypes"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.append(sys.argv.pop(1))
from convert.__main__ import main
main()
"""


def command(*args, cwd):
    line = [sys.executable, "-P", "-c", RUN, str(ROOT), *map(str, args)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def flax_adapter(directory, layers=3, name="q_proj", **fields):
    pair = (named_values("theta", layers, 64), named_values("alpha", layers, 64, mean=1.0))
    modules = {f"model.layers.self_attn.{name}": pair}
    write_flax(directory, Adapter(RoadConfig(**{"target_modules": [name], **fields}), modules))


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_folder_of_adapters(tmp_path):
    for i in range(3):
        flax_adapter(tmp_path / "runs" / f"a{i}", layers=i + 2, group_size=8)
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    code, out, err = command("to-torch", "runs", "out", "--all", "--dry-run", cwd=tmp_path)
    assert (code, out, err) == (0, "3 adapters can be converted\n", "")
    assert not (tmp_path / "out").exists()
    code, out, err = command("to-torch", "runs", "out", "--all", cwd=tmp_path)
    assert (code, out, err) == (0, "3 adapters converted: out\n", "")
    code, out, err = command("to-flax", "out", "back", "--all", "--family", "llama", cwd=tmp_path)
    assert (code, err) == (0, "")
    for i in range(3):
        assert contents(tmp_path / "back" / f"a{i}") == contents(tmp_path / "runs" / f"a{i}")

    for name in ("a1b", "b"):
        flax_adapter(tmp_path / "runs" / name, name="mystery")
    code, out, err = command("to-torch", "runs", "out", "--all", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "out: expected an empty or new folder" in err
    code, out, err = command("to-torch", "runs", "more", "--all", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "2 of 5 adapters aren't converted (a1b, b), the first for this: runs/a1b: expected modules of" in err
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == ["a0", "a1", "a2"]
    assert contents(tmp_path / "more" / "a2") == contents(tmp_path / "out" / "a2")
    code, _, err = command("to-torch", "runs/a0", "few", "--all", cwd=tmp_path)
    assert (code, "runs/a0: expected folders of adapters in it, found none" in err) == (2, True)


def test_a_folder_of_adapters_reads_base_and_rules_once(tmp_path, monkeypatch):
    for i in range(3):
        flax_adapter(tmp_path / "runs" / f"a{i}", group_size=8)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rules.toml").write_text("x = 1")
    with pytest.raises(AdapterError, match=r"^\S*rules\.toml: "):
        convert.convert_all(tmp_path / "runs", tmp_path / "out", convert.to_torch, rules=tmp_path / "rules.toml")
    reads = []
    monkeypatch.setattr(_convert, "read_model", lambda folder: (reads.append(folder), {})[1])
    convert.convert_all(tmp_path / "runs", tmp_path / "out", convert.to_torch, base=tmp_path)
    convert.convert_all(tmp_path / "out", tmp_path / "back", convert.to_flax, base=tmp_path, layout="scanned")
    assert reads == [tmp_path] * 2
    assert contents(tmp_path / "back" / "a1") == contents(tmp_path / "runs" / "a1")


def test_a_file_that_the_system_refuses_keeps_no_other_adapter(tmp_path, monkeypatch):
    for i in range(3):
        flax_adapter(tmp_path / "runs" / f"a{i}", group_size=8)
    read = _convert.read_flax

    def refuse(folder):
        if folder.name == "a1":
            raise PermissionError(13, "Permission denied", str(folder))
        return read(folder)

    monkeypatch.setattr(_convert, "read_flax", refuse)
    with pytest.raises(AdapterError, match=r"^1 of 3 adapters aren't converted \(a1\).*Permission denied"):
        convert.convert_all(tmp_path / "runs", tmp_path / "out", convert.to_torch)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a2"]


def test_there_and_back(tmp_path):
    flax_adapter(tmp_path / "flax", variant="road_2", group_size=8)
    code, out, err = command("to-torch", "flax", "torch", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "PEFT adapter, 3 modules, 384 parameters: torch\n"
    code, out, err = command("to-flax", "torch", "again", "--family", "llama", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "Flax adapter, 1 module, 384 parameters: again\n"
    assert contents(tmp_path / "again") == contents(tmp_path / "flax")
    code, _, err = command("to-flax", "torch", "again", "--layout", "unrolled", "--overwrite", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert contents(tmp_path / "again") != contents(tmp_path / "flax")


def test_the_whole_mapping_and_nothing_written(tmp_path):
    flax_adapter(tmp_path / "flax", layers=2)
    code, out, err = command("to-torch", "flax", "torch", "--dry-run", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "model.layers.self_attn.q_proj -> model.layers.{layer}.self_attn.q_proj\n"
    assert [path.name for path in tmp_path.iterdir()] == ["flax"]
    command("to-torch", "flax", "torch", cwd=tmp_path)
    row = '[[rows]]\nflax = "h_{layer}.wq"\ntorch = "model.layers.{layer}.self_attn.q_proj"\ninterleaved = true\n'
    (tmp_path / "rules.toml").write_text(row)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"hidden_size": 256, "num_attention_heads": 2}')
    rules = ("--rules", "rules.toml", "--base", "base")
    code, out, err = command("to-flax", "torch", "new", "--layout", "unrolled", "--dry-run", *rules, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "".join(f"model.layers.{i}.self_attn.q_proj -> h_{i}.wq\n" for i in range(2))
    assert not (tmp_path / "new").exists()
    code, _, err = command("to-flax", "torch", "new", *rules, "--family", "llama", cwd=tmp_path)
    assert (code, err) == (2, "error: family: expected none beside rules of your own, found 'llama'\n")


def test_inspect(tmp_path):
    flax_adapter(tmp_path / "flax", base_model_name_or_path="a\x1b[31mb")
    code, out, err = command("inspect", "flax", "--plot", "a.png", cwd=tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "flax: Flax adapter, 1 module, 384 parameters, 1.5 KiB"
    assert '  target_modules: ["q_proj"]' in lines
    # A file can't change the terminal's colours.
    assert r'  base_model_name_or_path: "a\u001b[31mb"' in lines
    theta, alpha = named_values("theta", 3, 64), named_values("alpha", 3, 64, mean=1.0)
    numbers = [f"{v:.4f}" for v in (np.abs(theta).mean(), np.abs(theta).max(), alpha.min(), alpha.max())]
    assert next(line for line in lines if line.startswith("model.")).split() == [
        *("model.layers.self_attn.q_proj", "128", "[3,", "64]", "float32"),
        *numbers,
    ]
    assert lines[-1] == "picture: a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_narrow_terminal_folds_paths_and_no_numbers():
    pair = (np.full((30, 288), 0.1234, np.float32), np.ones((30, 288), np.float32))
    name = "model.layers.self_attn.a_module_with_quite_a_long_name"
    adapter = Adapter(RoadConfig(target_modules=[name], group_size=2), {name: pair})
    module = _inspect._module(name, adapter, -1)
    out = io.StringIO()
    _cli._show(_inspect.Summary("Flax", adapter, (module,)), Path("a"), Console(file=out, width=80, highlight=False))
    rows = out.getvalue().splitlines()
    assert max(map(len, rows)) <= 80
    assert all(text in out.getvalue() for text in ("576", "[30, 288]", "float32", "0.1234", "1.0000"))
    assert "…" not in out.getvalue()


def _truncated(folder):
    path = folder / "flax" / "road_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _nan(folder):
    path = folder / "flax" / "road_adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    path.write_bytes(data)


def _peft(folder):
    pair = (np.zeros(64, np.float32), np.ones(64, np.float32))
    write_peft(
        folder / "peft", Adapter(RoadConfig(target_modules=["q_proj"]), {"model.layers.0.self_attn.q_proj": pair})
    )


def _other_group_size(folder):
    path = folder / "flax" / "road_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "group_size": 32}))


BAD = {
    "no folder": (lambda d: (d / "flax").rename(d / "b"), ["to-torch", "flax", "out"], "expected a folder, found noth"),
    "truncated": (_truncated, ["to-torch", "flax", "out"], "expected a whole safetensors file, found a broken one"),
    "nan": (_nan, ["to-torch", "flax", "out"], "road_theta: expected finite values, found 1"),
    "group size": (
        _other_group_size,
        ["to-torch", "flax", "out"],
        "expected group_size 64, as the tensors were written",
    ),
    "wrong family": (lambda d: None, ["to-torch", "flax", "out", "--family", "gpt9"], "expected one of llama, mistral"),
    "another model": (
        lambda d: flax_adapter(d / "other", name="W_pack"),
        ["to-torch", "other", "out"],
        "found without a partner: model.layers.self_attn.W_pack",
    ),
    "wrong format": (lambda d: None, ["to-flax", "flax", "out"], "expected a file adapter_config.json, found none"),
    "output is full": (
        lambda d: (d / "out").mkdir() or (d / "out" / "notes").write_text("mine"),
        ["to-torch", "flax", "out"],
        "out: expected an empty or new folder, found one that already holds something",
    ),
    "output is a file": (lambda d: (d / "out").write_text("mine"), ["to-torch", "flax", "out"], "found a file"),
    "output is a link to nothing": (
        lambda d: (d / "out").symlink_to("nowhere"),
        ["to-torch", "flax", "out"],
        "out: expected an empty or new folder, found a link to nothing",
    ),
    "to PyTorch in place": (
        lambda d: None,
        ["to-torch", "flax", "flax", "--overwrite"],
        "flax: expected a folder for an adapter of PEFT, found road_config.json, one of Flax",
    ),
    "to Flax in place": (
        _peft,
        ["to-flax", "peft", "peft", "--overwrite", "--family", "llama"],
        "peft: expected a folder for an adapter of Flax, found adapter_config.json, one of PEFT",
    ),
    "composed in place": (
        _peft,
        ["compose", "flax", "flax", "peft", "--overwrite"],
        "peft: expected a folder for an adapter of Flax, found adapter_config.json, one of PEFT",
    ),
    "a tolerance": (
        lambda d: None,
        ["diff", "flax", "flax", "--tolerance", "nan"],
        "tolerance: expected a number from 0",
    ),
    "a negative tolerance": (
        lambda d: None,
        ["diff", "flax", "flax", "--tolerance", "-1"],
        "tolerance: expected a number from 0 up, found -1.0",
    ),
    "picture of another kind": (lambda d: None, ["inspect", "flax", "--plot", "a.svg"], "a name that ends with .png"),
    "nothing to verify": (
        lambda d: None,
        ["verify", "flax", "b", "--base", "c"],
        "b: expected a folder, found nothing",
    ),
    "no checkpoint": (
        lambda d: write_peft(d / "b", Adapter(RoadConfig(target_modules=["q"]), {"q": (np.ones(64),) * 2})),
        ["verify", "flax", "b", "--base", "c"],
        "c: expected a folder, found nothing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, tmp_path):
    spoil, args, message = BAD[name]
    flax_adapter(tmp_path / "flax")
    spoil(tmp_path)
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code, out, err = command(*args, cwd=tmp_path)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_every_lost_key_is_listed(tmp_path):
    pair = (np.zeros((2, 64), np.float32), np.ones((2, 64), np.float32))
    paths = [f"model.layers.x{i}" for i in range(40)]
    write_flax(tmp_path / "flax", Adapter(RoadConfig(target_modules=r".*"), dict.fromkeys(paths, pair)))
    code, _, err = command("to-torch", "flax", "out", cwd=tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    assert all(f"{path}," in err or err.endswith(f"{path}\n") for path in paths)

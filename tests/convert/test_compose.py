"""Folders composed into one, from Python and by the command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _compare import assert_close, named_values

import convert
from road_core import (
    Adapter,
    AdapterError,
    RoadConfig,
    parameter_size,
    read_flax,
    read_peft,
    rotate,
    write_flax,
    write_peft,
)

ROOT = Path(__file__).parents[2]
LAYERS, OUT = 2, 64
Y = named_values("y", 3, OUT)


def flax(name, variant="road_1", group_size=8, **fields):
    size = parameter_size(variant, OUT)
    pair = (
        named_values(f"{name} t", LAYERS, size),
        np.abs(named_values(f"{name} a", LAYERS, size, mean=1, std=0.1)),
    )
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=["q_proj"], **fields)
    return Adapter(config, {"model.layers.self_attn.q_proj": pair}).cleared()


def both(folder, name, adapter):
    """Writes an adapter in both formats."""
    write_flax(folder / f"{name}-flax", adapter)
    convert.to_torch(folder / f"{name}-flax", folder / name)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def turned(adapter, layer):
    theta, alpha = adapter.modules[f"model.layers.{layer}.self_attn.q_proj"]
    return rotate(Y, theta, alpha, variant=adapter.config.variant, group_size=adapter.config.group_size)


def command(*args, cwd):
    code = f"import sys; sys.path.append({str(ROOT)!r}); from convert.__main__ import main; main()"
    line = [sys.executable, "-P", "-c", code, "compose", *map(str, args)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_composing_and_converting_commute(variant, tmp_path):
    both(tmp_path, "a", flax("a", variant, subspace=(0, 0.75)))
    both(tmp_path, "b", flax("b", variant, subspace=(0.5, 1)))
    convert.compose([tmp_path / "a-flax", tmp_path / "b-flax"], tmp_path / "ab-flax", weights=[2, -1])
    convert.compose([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", weights=[2, -1])
    convert.to_torch(tmp_path / "ab-flax", tmp_path / "there")
    convert.to_flax(tmp_path / "ab", tmp_path / "back")
    assert contents(tmp_path / "there") == contents(tmp_path / "ab")
    assert contents(tmp_path / "back") == contents(tmp_path / "ab-flax")
    a, b, ab = (read_peft(tmp_path / name) for name in ("a", "b", "ab"))
    convert.compose([tmp_path / "ab", tmp_path / "b"], tmp_path / "aa")
    for layer in range(LAYERS):
        expected = rotate(
            turned(a, layer), *a.modules[f"model.layers.{layer}.self_attn.q_proj"], variant=variant, group_size=8
        )
        assert_close(turned(read_peft(tmp_path / "aa"), layer), expected, "float32", moved_from=turned(ab, layer))
        assert not np.allclose(turned(b, layer), Y)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_a_subspace_survives_the_way_to_torch_and_back(variant, tmp_path):
    both(tmp_path, "a", flax("a", variant, subspace=(0.25, 0.5)))
    convert.to_flax(tmp_path / "a", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "a-flax")
    assert read_peft(tmp_path / "a").config.subspace == read_flax(tmp_path / "again").config.subspace == (0.25, 0.5)


def test_the_command(tmp_path):
    both(tmp_path, "a", flax("a"))
    both(tmp_path, "b", flax("b"))
    code, out, err = command("a", "b", "a", "out", "--weights", "0.5", "-1", "0.25", cwd=tmp_path)
    assert (code, out, err) == (0, "PEFT adapter, 2 modules, 128 parameters: out\n", "")
    convert.compose([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "same", weights=[0.5, -1, 0.25])
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    code, out, err = command("a-flax", "b-flax", "out", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "already holds something" in err
    code, out, err = command("a-flax", "b-flax", "flax", cwd=tmp_path)
    assert (code, out, err) == (0, "Flax adapter, 1 module, 128 parameters: flax\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a"], "compose: expected adapters and a folder to write, found 1 folders"),
        (["a", "b-flax", "out"], "adapters of one format, found a of PEFT and b-flax of Flax"),
        (["a", "c", "out"], "one group size, found 8 in a and 16 in c"),
        (["a", "nothing", "out"], "nothing: expected an adapter"),
        (["a", "b", "out", "--weights", "1"], "weights: expected one for each of 2 adapters, found 1"),
        (["a", "d", "out", "--weights", "1", "-1"], "q_proj: expected scales that have an inverse for weight -1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(args, message, tmp_path):
    both(tmp_path, "a", flax("a"))
    both(tmp_path, "b", flax("b"))
    both(tmp_path, "c", flax("c", group_size=16))
    zero = {"model.layers.0.self_attn.q_proj": (np.zeros(OUT // 2, np.float32),) * 2}
    write_peft(tmp_path / "d", Adapter(RoadConfig(group_size=8, target_modules=["q_proj"]), zero))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code, out, err = command(*args, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="at least one adapter, found none"):
        convert.compose([], tmp_path / "out")

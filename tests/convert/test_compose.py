"""Folders composed into one, from Python and by the command."""

import dataclasses
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


def peft(name, layers, *, modules=("q_proj", "up_proj"), out=128, variant="road_1", **fields):
    """An adapter of wide layers in groups of 64, which as many layers could be outputs of too."""
    kinds = {"q_proj": "self_attn", "up_proj": "mlp"}
    size = parameter_size(variant, out)
    paths = [f"model.layers.{i}.{kinds[module]}.{module}" for module in modules for i in range(layers)]
    pairs = {p: (named_values(f"{name} {p} t", size), named_values(f"{name} {p} a", size, mean=2)) for p in paths}
    return Adapter(RoadConfig(variant=variant, target_modules=list(modules), **fields), pairs)


@pytest.mark.parametrize(
    ("variant", "layers", "subspaces"),
    [
        ("road_1", 32, ((0, 0.5), (0.5, 1))),
        ("road_1", 32, ((0.25, 1), None)),
        ("road_1", 64, ((0, 0.5), (0.25, 1))),
        ("road_2", 64, (None, None)),
        ("road_2", 64, ((0, 0.75), (0.5, 1))),
        ("road_4", 32, ((0, 0.5), None)),
        ("road_4", 128, ((0, 0.5), None)),
    ],
)
def test_composing_and_converting_commute_where_layers_are_not_first(variant, layers, subspaces, tmp_path):
    """MaxText's stacks have their layers on axis 1. Which of its tables, llama's or qwen3's, needn't be said."""
    for name, subspace, modules in zip("ab", subspaces, (("q_proj", "up_proj"), ("up_proj",)), strict=True):
        write_peft(tmp_path / name, peft(name, layers, modules=modules, variant=variant, subspace=subspace))
        convert.to_flax(tmp_path / name, tmp_path / f"{name}-flax", family="qwen3", layout="maxtext")
    size = parameter_size(variant, 128)
    assert {theta.shape for theta, _ in read_flax(tmp_path / "a-flax").modules.values()} == {(size, layers)}
    for end in ("", "-flax"):
        convert.compose([tmp_path / f"a{end}", tmp_path / f"b{end}"], tmp_path / f"ab{end}", weights=[2, -1])
    convert.to_torch(tmp_path / "ab-flax", tmp_path / "there", family="qwen3")
    found, expected = read_peft(tmp_path / "there"), read_peft(tmp_path / "ab")
    assert found.modules.keys() == expected.modules.keys()
    for path, pair in expected.modules.items():
        for mine, other in zip(found.modules[path], pair, strict=True):
            np.testing.assert_array_equal(mine, other)
    assert found.config.subspace == expected.config.subspace


def own(name, layers=8, **fields):
    """An adapter of a model that no table knows, whose layers are on the last axis of θ."""
    pair = named_values(f"{name} t", 32, layers), named_values(f"{name} a", 32, layers, mean=2)
    return Adapter(RoadConfig(group_size=8, target_modules=["w"], **fields), {"blocks.w": pair})


def test_the_axis_of_a_model_of_ones_own(tmp_path):
    adapters = [own("a", subspace=(0, 0.5)), own("b", subspace=(0.5, 1))]
    for name, adapter in zip("ab", adapters, strict=True):
        write_flax(tmp_path / name, adapter)
        write_flax(tmp_path / f"few {name}", own(name, layers=3))
    code, out, err = command("a", "b", "ab", "--axis", "0", cwd=tmp_path)
    assert (code, out, err) == (0, "Flax adapter, 1 module, 512 parameters: ab\n", "")
    convert.compose([tmp_path / "a", tmp_path / "b"], tmp_path / "same", axis=-2)
    assert contents(tmp_path / "same") == contents(tmp_path / "ab")
    # Blocks 0 to 15 are the first adapter's, the others the second's.
    for found, a, b in zip(
        read_flax(tmp_path / "ab").modules["blocks.w"],
        *(adapter.modules["blocks.w"] for adapter in adapters),
        strict=True,
    ):
        np.testing.assert_array_equal(found, np.concatenate([a[:16], b[16:]]))
    code, out, err = command("few a", "few b", "few", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        "error: blocks.w: expected outputs that group_size 8 divides on axis -1 of θ [32, 3], found 6 there and 64 on "
        "axis 0: say axis=0 if the others are stacks'\n"
    )


def test_adapters_of_two_layouts_are_refused(tmp_path):
    for name, layout in (("a", "scanned"), ("b", "unrolled"), ("c", "maxtext")):
        write_peft(tmp_path / name, peft(name, 2, modules=("up_proj",)))
        convert.to_flax(tmp_path / name, tmp_path / f"{name}-flax", family="llama", layout=layout)

    def refused(first, second):
        with pytest.raises(AdapterError) as caught:
            convert.compose([tmp_path / f"{first}-flax", tmp_path / f"{second}-flax"], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value).replace(f"{tmp_path}/", "")

    said = "compose: expected adapters of one layout, found "
    assert refused("a", "b") == f"{said}layers stacked on axis 0 in a-flax and numbered layers in b-flax"
    assert refused("b", "a") == f"{said}numbered layers in b-flax and layers stacked on axis 0 in a-flax"
    assert refused("c", "a") == f"{said}layers stacked on axis 1 in c-flax and layers stacked on axis 0 in a-flax"


def test_a_composition_keeps_what_all_know_of_their_way_back(tmp_path):
    head = np.ones((10, OUT), np.float32)
    tied = dataclasses.replace(
        flax("a", modules_to_save=["embed_tokens"]), modules_to_save={"model.embed_tokens.embedding": head}
    )
    write_flax(tmp_path / "a-flax", tied)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    convert.to_torch(tmp_path / "a-flax", tmp_path / "a", base=tmp_path / "base")
    both(tmp_path, "b", flax("b"))
    # The records' configs differ. That the head follows the embedding is known from the one that has it.
    convert.compose([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert read_peft(tmp_path / "ab").metadata == {"road_flax_origin": '{"layout": "scanned", "tied_head": true}'}
    convert.to_flax(tmp_path / "ab", tmp_path / "back")
    convert.compose([tmp_path / "a-flax", tmp_path / "b-flax"], tmp_path / "ab-flax")
    back, expected = read_flax(tmp_path / "back"), read_flax(tmp_path / "ab-flax")
    assert back.tensors().keys() == expected.tensors().keys()
    for key, array in expected.tensors().items():
        np.testing.assert_array_equal(back.tensors()[key], array)

    # One that never was in Flax says nothing of a layout, and of two layouts none is kept.
    write_peft(tmp_path / "c", dataclasses.replace(read_peft(tmp_path / "b"), metadata={}))
    convert.compose([tmp_path / "c", tmp_path / "a"], tmp_path / "ca")
    assert read_peft(tmp_path / "ca").metadata == {"road_flax_origin": '{"tied_head": true}'}
    convert.compose([tmp_path / "c", tmp_path / "b"], tmp_path / "cb")
    assert read_peft(tmp_path / "cb").metadata == {}
    for name, layout in (("d", "maxtext"), ("e", "maxtext"), ("f", "maxtext-unrolled")):
        write_peft(tmp_path / name, peft(name, 2, modules=("up_proj",)))
        convert.to_flax(tmp_path / name, tmp_path / f"{name}-flax", family="llama", layout=layout)
        adapter = read_flax(tmp_path / f"{name}-flax")
        chosen = r"decoder\..*" if name == "d" else ["wi_1"]
        config = dataclasses.replace(adapter.config, target_modules=chosen)
        write_flax(tmp_path / f"{name}-mine", dataclasses.replace(adapter, config=config, metadata={}))
        convert.to_torch(tmp_path / f"{name}-mine", tmp_path / f"{name}-torch", family="llama")
        assert '"family": "llama"' in read_peft(tmp_path / f"{name}-torch").metadata["road_flax_origin"]
    convert.compose([tmp_path / "d-torch", tmp_path / "e-torch"], tmp_path / "de")
    assert read_peft(tmp_path / "de").metadata == {"road_flax_origin": '{"family": "llama", "layout": "maxtext"}'}
    convert.to_flax(tmp_path / "de", tmp_path / "de-flax")
    assert list(read_flax(tmp_path / "de-flax").modules) == ["decoder.layers.mlp.wi_1"]
    convert.compose([tmp_path / "e-torch", tmp_path / "f-torch"], tmp_path / "ef")
    assert read_peft(tmp_path / "ef").metadata == {}


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

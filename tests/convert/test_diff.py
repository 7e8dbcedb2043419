import dataclasses
import sys

import numpy as np
import pytest
from _compare import named_values

import convert
from convert.__main__ import main
from convert._diff import compare, draw
from road_core import Adapter, AdapterError, RoadConfig, write_flax, write_peft

PATHS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def make(change=0.0, saved=None, **fields):
    modules = {
        path: (named_values(path + "t", 32), named_values(path + "a", 32, mean=1.0).astype(np.float16))
        for path in PATHS
    }
    theta, alpha = modules[PATHS[1]]
    theta, alpha = theta.copy(), alpha.copy()
    theta[3] += change
    alpha[5] = np.float16(alpha[5] + change / 2)
    modules[PATHS[1]] = (theta, alpha)
    config = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"] if saved is not None else None}
    kept = {} if saved is None else {"model.norm.weight": saved}
    return Adapter(RoadConfig(**{**config, **fields}), modules, kept)


def test_the_numbers():
    found = compare(make(), make(0.25))
    assert [module.path for module in found.modules] == PATHS
    assert not found.same()
    assert found.same(0.26)
    module = found.modules[1]
    assert (module.max_angle, module.max_scale) == pytest.approx((0.25, 0.125), rel=1e-2)
    assert (module.mean_angle, module.mean_scale) == pytest.approx((0.25 / 32, 0.125 / 32), rel=1e-2)
    assert all(m.max_angle == m.max_scale == 0 for m in found.modules if m != module)
    # One full turn more is the same rotation.
    turned = compare(make(), make(2 * np.pi)).modules[1]
    assert turned.max_angle < 1e-6
    assert compare(make(), make()).same()


def test_what_only_one_has_and_what_reads_otherwise():
    ones = np.ones(4, np.float32)
    found = compare(make(saved=ones), make(saved=ones * 3, group_size=32))
    assert found.fields == {"group_size": (64, 32)}
    assert found.saved == {"model.norm.weight": 2}
    assert not found.same(5)
    found = compare(make(saved=ones), make(saved=np.ones(5)))
    assert found.saved == {"model.norm.weight": np.inf}
    fewer = make()
    fewer = Adapter(fewer.config, {path: fewer.modules[path] for path in PATHS[:3]})
    found = compare(make(saved=ones), fewer)
    assert found.first_only == ("model.layers.1.self_attn.v_proj", "model.norm.weight")
    assert found.second_only == ()
    assert not found.same(9)


def test_either_format(tmp_path):
    write_peft(tmp_path / "peft", make())
    convert.to_flax(tmp_path / "peft", tmp_path / "flax")
    found = convert.diff(tmp_path / "flax", tmp_path / "peft")
    assert found.same()
    assert [module.path for module in found.modules] == PATHS
    found = convert.diff(tmp_path / "flax", tmp_path / "flax")
    assert [module.path for module in found.modules][:2] == [f"model.layers.self_attn.q_proj[{i}]" for i in range(2)]
    other = make()
    write_flax(tmp_path / "strange", Adapter(RoadConfig(target_modules=["w"]), {"h.w": other.modules[PATHS[0]]}))
    with pytest.raises(AdapterError, match=r"strange: expected modules of one of the families .* partner: h\.w"):
        convert.diff(tmp_path / "peft", tmp_path / "strange")


def test_stacked_and_numbered_layers_in_flax(tmp_path):
    for name, layout, change in (("a", "scanned", 0.0), ("b", "unrolled", 0.0), ("c", "unrolled", 0.25)):
        write_peft(tmp_path / f"peft-{name}", make(change))
        convert.to_flax(tmp_path / f"peft-{name}", tmp_path / name, layout=layout)
    assert convert.diff(tmp_path / "a", tmp_path / "b").same()
    found = convert.diff(tmp_path / "a", tmp_path / "c")
    assert [module.path for module in found.modules] == PATHS
    assert not found.same()
    assert found.same(0.26)


@pytest.mark.parametrize("layers", [32, 64])
def test_layers_that_are_not_first(layers, tmp_path):
    """MaxText's stacks have their layers on axis 1; as many could be outputs too."""
    theta = {f"model.layers.{i}.mlp.up_proj": named_values(f"{i}", 64) for i in range(layers)}
    late = {path: value + (int(path.split(".")[2]) >= 16) for path, value in theta.items()}
    for name, angles in (("a", theta), ("b", {p: v.astype(np.float32) for p, v in late.items()})):
        config = RoadConfig(target_modules=["up_proj"], subspace=(0, 0.5))
        write_peft(tmp_path / name, Adapter(config, {p: (v, np.ones(64, np.float32)) for p, v in angles.items()}))
        for layout in ("scanned", "maxtext"):
            convert.to_flax(tmp_path / name, tmp_path / f"{name}-{layout}", family="llama", layout=layout)
    expected = convert.diff(tmp_path / "a", tmp_path / "b")
    found = convert.diff(tmp_path / "a-maxtext", tmp_path / "b-maxtext")
    assert not found.same()
    assert [module.path for module in found.modules] == [f"decoder.layers.mlp.wi_1[{i}]" for i in range(layers)]
    numbers = [[dataclasses.astuple(module)[1:] for module in some.modules] for some in (found, expected)]
    assert numbers[0] == numbers[1]
    assert [module.max_angle > 0.9 for module in found.modules] == [i >= 16 for i in range(layers)]
    assert convert.diff(tmp_path / "a-maxtext", tmp_path / "a-maxtext").same()
    # Another layout is another's layers; PyTorch's names are compared then.
    assert convert.diff(tmp_path / "a-maxtext", tmp_path / "a-scanned", family="llama").same()
    mixed = convert.diff(tmp_path / "a-scanned", tmp_path / "b-maxtext", family="llama")
    assert [module.path for module in mixed.modules] == list(theta)
    assert not mixed.same()


def test_the_axis_of_a_model_of_ones_own(tmp_path):
    for name, change in (("a", 0), ("b", 1)):
        angles = named_values("a", 16, 8)
        angles[:, 5] += change
        config = RoadConfig(group_size=8, target_modules=["w"], subspace=(0, 0.5))
        write_flax(tmp_path / name, Adapter(config, {"blocks.w": (angles, np.ones((16, 8), np.float32))}))
        few = Adapter(config, {"blocks.w": (angles[:, :3].copy(), np.ones((16, 3), np.float32))})
        write_flax(tmp_path / f"few-{name}", few)
    found = convert.diff(tmp_path / "a", tmp_path / "b", axis=0)
    assert [module.path for module in found.modules if module.max_angle] == ["blocks.w[5]"]
    assert [len(found.modules), found.modules[5].mean_angle] == [8, pytest.approx(0.5)]
    with pytest.raises(AdapterError, match=r"blocks.w: .* θ \[16, 3\], found 6 there and 32 on axis 0: say axis=0"):
        convert.diff(tmp_path / "few-a", tmp_path / "few-b")


def test_the_command_tells_by_its_exit_code_and_draws(tmp_path, monkeypatch, capsys):
    write_peft(tmp_path / "a", make())
    write_peft(tmp_path / "b", make(0.25, group_size=32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["road-convert", "diff", "a", "a"])
    main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["road-convert", "diff", "a", "b", "--plot", "d.png"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "group_size: 64 | 32"
    assert [line.split()[0] for line in lines[2:-1]] == [PATHS[1]]
    assert lines[-1] == "picture: d.png"
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    only = compare(make(), Adapter(RoadConfig(target_modules=["w"]), {"h.w": make().modules[PATHS[0]]}))
    with pytest.raises(AdapterError, match="expected modules that both adapters have, found none to draw"):
        draw(only, tmp_path / "e.png")

import sys

import numpy as np
import pytest
from _compare import named_values

import convert
from convert.__main__ import main
from convert._inspect import draw
from road_core import Adapter, AdapterError, RoadConfig, write_flax, write_peft
from road_core._picture import _by_kind


def make(layers=None):
    shape = (64,) if layers is None else (layers, 64)
    path = "model.layers.{}self_attn.q_proj".format("10." if layers is None else "")
    pair = (named_values("theta", *shape), named_values("alpha", *shape, mean=1.0).astype(np.float16))
    saved = {"model.norm.weight": np.ones(8, np.float32)}
    return Adapter(RoadConfig(target_modules=["q_proj"], modules_to_save=["norm"]), {path: pair}, saved)


@pytest.mark.parametrize(("kind", "write", "layers"), [("Flax", write_flax, 3), ("PEFT", write_peft, None)])
def test_an_adapter_in_numbers(kind, write, layers, tmp_path):
    adapter = make(layers)
    write(tmp_path / "a", adapter)
    summary = convert.inspect(tmp_path / "a")
    [(path, (theta, alpha))] = adapter.modules.items()
    assert summary.kind == kind
    assert summary.parameters == 2 * theta.size
    assert summary.saved_parameters == 8
    assert summary.nbytes == 6 * theta.size + 32
    [module] = summary.modules
    assert (module.path, module.shape, module.dtype, module.outputs) == (path, theta.shape, "float32", 128)
    assert module.mean_angle == pytest.approx(np.abs(theta).mean())
    assert module.max_angle == np.abs(theta).max()
    assert (module.min_scale, module.max_scale) == (alpha.min(), alpha.max())


def test_layers_come_in_their_order(tmp_path):
    pair = (np.zeros(64, np.float32), np.ones(64, np.float32))
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    write_peft(tmp_path / "a", Adapter(RoadConfig(target_modules=["q_proj"]), dict.fromkeys(paths, pair)))
    assert [module.path for module in convert.inspect(tmp_path / "a").modules] == paths


@pytest.mark.parametrize("layers", [3, None])
def test_a_picture(layers, tmp_path):
    draw(make(layers), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for name in ("a.pdf", "missing/a.png"):
        with pytest.raises(AdapterError, match=r"expected a name that ends with \.png in a folder that exists"):
            draw(make(layers), tmp_path / name)


def test_layers_that_are_not_first(tmp_path, monkeypatch, capsys):
    """MaxText's stacks have their layers on axis 1; as many could be outputs too."""
    pairs = {
        f"model.layers.{i}.mlp.up_proj": (named_values(f"{i}", 64), named_values(f"{i} a", 64, mean=2))
        for i in range(32)
    }
    write_peft(tmp_path / "a", Adapter(RoadConfig(target_modules=["up_proj"]), pairs))
    convert.to_flax(tmp_path / "a", tmp_path / "flax", family="llama", layout="maxtext")
    summary = convert.inspect(tmp_path / "flax")
    [module] = summary.modules
    assert (module.path, module.shape, module.outputs) == ("decoder.layers.mlp.wi_1", (64, 32), 128)
    # The picture has each layer's points, those of the adapter in PEFT's format.
    kinds = [
        sorted(_by_kind(adapter, axis).popitem()[1], key=lambda points: points[0])
        for adapter, axis in ((summary.adapter, summary.axis), (convert.inspect(tmp_path / "a").adapter, -1))
    ]
    for mine, other in zip(*kinds, strict=True):
        for found, expected in zip(mine, other, strict=True):
            np.testing.assert_array_equal(found, expected)
    # A model of one's own.
    own = Adapter(
        RoadConfig(target_modules=["w"]), {"h.w": (np.ones((64, 3), np.float32), np.ones((64, 3), np.float32))}
    )
    write_flax(tmp_path / "own", own)
    with pytest.raises(AdapterError, match=r"h.w: expected outputs .* found 6 there and 128 on axis 0: say axis=0"):
        convert.inspect(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["road-convert", "inspect", "own", "--axis", "0", "--plot", "a.png"])
    main()
    assert capsys.readouterr().out.splitlines()[-2].split()[:2] == ["h.w", "128"]
    assert (tmp_path / "a.png").is_file()


def test_one_format_only(tmp_path):
    with pytest.raises(AdapterError, match=r"expected an adapter \(road_config.json or .*\), found no folder"):
        convert.inspect(tmp_path / "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match="found neither"):
        convert.inspect(tmp_path / "a")
    write_flax(tmp_path / "a", make(3), overwrite=True)
    write_peft(tmp_path / "a", make(), overwrite=True)
    with pytest.raises(AdapterError, match="found both"):
        convert.inspect(tmp_path / "a")

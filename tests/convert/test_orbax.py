"""Checkpoints of a training run as the input of a conversion."""

import gc
import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from _compare import named_values

import convert
import road_core
import road_jax
from road_core import AdapterError, RoadConfig
from road_jax.train._checkpoint import Checkpoints
from road_jax.train._step import State


def adapter(step):
    pair = {
        name: jnp.asarray(named_values(f"{name}{step}", 2, 32), jnp.bfloat16) for name in ("road_theta", "road_alpha")
    }
    return {"model": {"layers": {"self_attn": {"q_proj": pair}}}}


def make_run(directory):
    """Makes what an interrupted ``road-train`` leaves behind."""
    options = {"variant": "road_1", "group_size": 8, "target_modules": ["q_proj"], "base": "checkpoints/x"}
    directory.mkdir()
    (directory / "options.json").write_text(json.dumps(options))
    with Checkpoints(directory) as checkpoints:
        for step in (9, 10):
            state = State(adapter(step), optax.adamw(1e-3).init(adapter(step)))
            checkpoints.save(step, state, {"data": {}})


# A failed restore leaves reads running, whose end is reported to an event loop that orbax has already closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_is_converted_as_the_adapter_it_holds(tmp_path):
    make_run(tmp_path / "run")
    config = RoadConfig(
        group_size=8, target_modules=["q_proj"], base_model_name_or_path="checkpoints/x", task_type="CAUSAL_LM"
    )
    places = {"run/checkpoints/9": 9, "run/checkpoints": 10, "run": 10}
    for place, step in places.items():
        out = tmp_path / f"out of {place.replace('/', '-')}"
        convert.to_torch(tmp_path / place, out)
        road_jax.save_adapter(tmp_path / "flax", adapter(step), config, overwrite=True)
        convert.to_torch(tmp_path / "flax", tmp_path / "torch", overwrite=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()

    options = json.loads((tmp_path / "run" / "options.json").read_text())
    write = (tmp_path / "run" / "options.json").write_text
    write(json.dumps({**options, "subspace": [0.0, 0.5], "modules_to_save": []}))
    convert.to_torch(tmp_path / "run", tmp_path / "half")
    half = road_core.read_peft(tmp_path / "half")
    assert half.config.subspace == (0.0, 0.5)
    theta, alpha = half.modules["model.layers.1.self_attn.q_proj"]
    assert not road_core.to_float32(theta)[16:].any()
    assert (road_core.to_float32(alpha)[16:] == 1).all()
    write(json.dumps(options))

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10" / "state" / "d")
    with pytest.raises(AdapterError, match=r"checkpoints/10: expected a checkpoint of road-train, found "):
        convert.to_torch(tmp_path / "run", tmp_path / "new")
    (tmp_path / "run" / "options.json").write_text('{"variant": "road_1", "group_size": "8"}')
    with pytest.raises(AdapterError, match=r"RoadConfig\.group_size: expected an integer, found '8'"):
        convert.to_torch(tmp_path / "run" / "checkpoints" / "9", tmp_path / "new")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(AdapterError, match=r"run: expected a file road_config\.json, found none"):
        convert.to_torch(tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    gc.collect()


def write_step(run, tree):
    """Writes a checkpoint that need not be a training's state; returns the folder of its arrays."""
    state = run / "checkpoints" / "3" / "state"
    state.parent.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps({"variant": "road_1", "group_size": 8, "target_modules": ["q_proj"]}))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(state, tree)
    return state


# If this were trusted, it would end the process, which Python couldn't catch.
@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_an_array_larger_than_its_files_can_hold(field, tmp_path):
    state = write_step(tmp_path, {"adapter": adapter(0)})
    files = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
    key = next(key for key in files.list().result() if key.endswith(b"road_theta/.zarray"))
    files[key] = json.dumps({**json.loads(bytes(files[key])), field: [2**33, 2]}).encode()
    with pytest.raises(AdapterError, match=r"3: expected a checkpoint of road-train, found 3\.44e\+10 bytes of arrays"):
        convert.to_torch(tmp_path, tmp_path / "new")


@pytest.mark.parametrize(
    "tree",
    [{"adapter": np.ones(8, np.float32)}, {"adapter": [np.ones(8, np.float32)]}, {"other": np.ones(8, np.float32)}],
)
def test_a_checkpoint_without_an_adapter(tree, tmp_path):
    write_step(tmp_path, tree)
    with pytest.raises(AdapterError, match=r"3: expected a checkpoint of road-train, found .*adapter"):
        convert.to_torch(tmp_path, tmp_path / "new")

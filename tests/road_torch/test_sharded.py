"""Adapters that FSDP shards across two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import road_torch
from road_core import read_peft
from road_torch import RoadConfig, RoadModel

ROOT = Path(road_torch.__file__).parents[1]
X = torch.linspace(-1, 1, 48).reshape(4, 12)
NAMES = ["a", "b", "__base__", "b"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))


def write(folder, seed):
    """Saves adapters "a", which brings the last layer whole, and "b"."""
    model = RoadModel(net())
    torch.manual_seed(seed)
    for name, saved in {"a": ["2"], "b": None}.items():
        fields = {"target_modules": ["0"], "group_size": 4, "init_weights": False, "modules_to_save": saved}
        model.add_adapter(name, RoadConfig(**fields))
    with torch.no_grad():
        model.base_model[2].modules_to_save["a"].weight.add_(seed)
    model.save_pretrained(folder)


def assert_same(folder, other):
    for found, expected in zip(read_peft(folder).modules.items(), read_peft(other).modules.items(), strict=True):
        assert found[0] == expected[0]
        assert all((one == two).all() for one, two in zip(found[1], expected[1], strict=True))


def run(rank, folder):
    """Runs the test in one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = RoadModel.from_pretrained(net(), folder / "1" / "a", "a", is_trainable=True)
    model.load_adapter(folder / "1" / "b", "b")
    model.eval()
    with torch.no_grad():
        expected = model(X, adapter_names=NAMES)
        fully_shard(model)
        assert isinstance(model.base_model[0].road_theta["b"], DTensor)
        torch.testing.assert_close(model(X, adapter_names=NAMES), expected)
        model.save_pretrained(folder / "saved", is_main_process=rank == 0)
        model.add_weighted_adapter(["b"], [1.0], "as b was")
        model.add_weighted_adapter(["a"], [1.0], "as a was")
        model.hotswap_adapter(folder / "2" / "b", "b")
        assert isinstance(model.base_model[0].road_theta["b"], DTensor)
        torch.testing.assert_close(model(X, adapter_names=["as a was", "as b was", "__base__", "as b was"]), expected)
        swapped = RoadModel.from_pretrained(net(), folder / "2" / "b", "b")
        torch.testing.assert_close(model(X, adapter_names=list("bbbb")), swapped(X))
        assert not torch.allclose(swapped(X)[1], expected[1], atol=1e-2)
    destroy_process_group()


def test_two_processes_save_and_swap_what_they_share(tmp_path):
    for seed in (1, 2):
        write(tmp_path / str(seed), seed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment, cwd=ROOT, stderr=-1)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    for name in "ab":
        assert_same(tmp_path / "saved" / name, tmp_path / "1" / name)
    saved, first = (read_peft(tmp_path / folder / "a").modules_to_save for folder in ("saved", "1"))
    assert saved.keys() == first.keys() == {"2.weight", "2.bias"}
    assert all((saved[key] == first[key]).all() for key in saved)


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))

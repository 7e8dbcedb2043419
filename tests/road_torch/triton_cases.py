"""Tests that `test_triton.py` runs in a separate process, where Triton interprets its kernels on the CPU."""

import os

import pytest
import torch
from _compare import assert_close, named_values
from torch import nn

import road_core
from road_torch import RoadConfig, RoadModel, _kernels, _ops
from road_torch._kernels import default, triton

assert os.environ["TRITON_INTERPRET"] == "1"
OUT = 192


def table(rows):
    pairs = [
        default.coefficients(*(torch.from_numpy(named_values(f"{n}{i}", OUT)) for n in "ta"), "road_2", 64)
        for i in range(rows)
    ]
    return [torch.stack(part) for part in zip(*pairs, strict=True)]


@pytest.mark.parametrize("group_size", [2, 64, 192])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(OUT,), (5, OUT), (2, 3, OUT), (0, OUT)])
def test_rotate_against_the_reference(shape, dtype, variant, group_size):
    size = road_core.parameter_size(variant, OUT)
    theta, alpha = named_values("theta", size), named_values("alpha", size, mean=1.0)
    y = torch.from_numpy(named_values("y", *shape)).to(getattr(torch, dtype))
    first, cross = default.coefficients(torch.from_numpy(theta), torch.from_numpy(alpha), variant, group_size)
    before = y.clone()
    given = triton.rotate(y, first, cross, group_size)
    assert given.dtype == y.dtype
    assert torch.equal(y, before)
    if y.numel():
        expected = road_core.rotate(y.double(), theta, alpha, variant=variant, group_size=group_size)
        assert_close(given.double(), expected, dtype, moved_from=y.double())
    assert triton.rotate_(y, first, cross, group_size) is y
    assert torch.equal(y, given)


@pytest.mark.parametrize("shape", [(4, OUT), (4, 3, OUT), (4, 2, 3, OUT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_table(dtype, shape):
    first, cross = table(3)
    y = torch.from_numpy(named_values("y", *shape)).to(dtype)
    for index in (torch.tensor([2, 0, 1, 2]), torch.tensor([1])):
        expected = default.rotate(y.float(), first, cross, 64, index)
        name = str(dtype).removeprefix("torch.")
        assert_close(triton.rotate(y, first, cross, 64, index).double(), expected, name, moved_from=y.double())
    gathered = [part[[2, 0, 1, 2]].view(4, *[1] * (y.ndim - 2), OUT) for part in (first, cross)]
    by_index = triton.rotate(y, first, cross, 64, torch.tensor([2, 0, 1, 2]))
    assert torch.equal(triton.rotate(y, *gathered, 64), by_index)


def test_more_pairs_than_a_program_has(monkeypatch):
    monkeypatch.setattr(triton, "BLOCK", 32)
    first, cross = table(1)
    y = torch.from_numpy(named_values("y", 3, OUT))
    torch.testing.assert_close(triton.rotate(y, first[0], cross[0], 64), default.rotate(y, first[0], cross[0], 64))


@pytest.mark.parametrize("index", [None, [2, 0], [1]])
def test_opcheck_and_gradients(index):
    y = torch.randn(2, 3, 16, requires_grad=True)
    first, cross = (torch.randn(*(() if index is None else (4,)), 16, requires_grad=True) for _ in range(2))
    index = index and torch.tensor(index)
    torch.library.opcheck(torch.ops.road.rotate.default, (y, first, cross, 8, index, "triton"))
    given, expected = (
        torch.autograd.grad(_ops.rotate(y, first, cross, 8, index, kernel).square().sum(), (y, first, cross))
        for kernel in ("triton", "default")
    )
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, OUT), nn.Linear(OUT, 16)

    def forward(self, x):
        return self.down(self.up(x))


def test_a_model_with_this_kernel():
    models = [RoadModel(Net(), kernel=kernel) for kernel in ("triton", "default")]
    for model in models:
        for name, changes in {"a": {"group_size": 16}, "b": {"group_size": 2, "variant": "road_4"}}.items():
            torch.manual_seed(ord(name))
            fields = {"target_modules": ["up", "down"], "init_weights": False, "inference_mode": True}
            model.add_adapter(name, RoadConfig(**fields, **changes))
    x = torch.from_numpy(named_values("x", 4, 3, 16))
    for names in (None, ["a", "b", "__base__", "a"], ["b", "b", "a", "a"]):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                given, expected = (model(x, adapter_names=names) for model in models)
            torch.testing.assert_close(given, expected)
    launches = []
    kernel = triton._launch
    triton._launch = lambda *args: launches.append(args) or kernel(*args)
    try:
        with torch.no_grad():
            models[0](x, adapter_names=["a", "a", "__base__", "a"])
    finally:
        triton._launch = kernel
    # One launch per layer; gathering needs none of its own.
    assert len(launches) == 2
    assert _kernels.choose("auto", torch.device("cpu")) is _kernels.DEFAULT


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_model_with_this_kernel(train):
    models = [RoadModel(Net(), kernel=kernel) for kernel in ("triton", "default")]
    for model in models:
        for name in "ab":
            torch.manual_seed(ord(name))
            fields = {"target_modules": ["up", "down"], "init_weights": False, "group_size": 16}
            model.add_adapter(name, RoadConfig(**fields, inference_mode=not train))
        model.set_adapter(["a"])
    backend = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(models[0], backend=backend)
    x = torch.from_numpy(named_values("x", 4, 3, 16))
    for names in (["a", "b", "__base__", "a"], ["b", "b", "a", "__base__"]):
        with torch.set_grad_enabled(train):
            given, expected = compiled(x, adapter_names=names), models[1](x, adapter_names=names)
        torch.testing.assert_close(given, expected)
        if train:
            for result in (given, expected):
                result.square().sum().backward()
            for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None:
                    torch.testing.assert_close(a.grad, b.grad)
    assert backend.frame_count <= (2 if train else 1)
    launches = []
    kernel = triton._launch
    triton._launch = lambda *args: launches.append(args) or kernel(*args)
    try:
        with torch.no_grad():
            compiled(x, adapter_names=["a", "b", "b", "a"])
    finally:
        triton._launch = kernel
    assert len(launches) == 2


@pytest.mark.parametrize("kernel", ["triton", "default"])
def test_tables_may_be_written_before_the_backward_pass(kernel):
    model = RoadModel(Net(), kernel=kernel)
    for name in "ab":
        fields = {"target_modules": ["up", "down"], "init_weights": False, "group_size": 16}
        model.add_adapter(name, RoadConfig(**fields, inference_mode=True))
    found = []
    for write in (False, True):
        x = torch.from_numpy(named_values("x", 2, 3, 16)).requires_grad_()
        y = model(x, adapter_names=["a", "b"])
        if write:
            # Each mix takes a row of the tables.
            model(x, adapter_names=["a+b", "b+a"])
        y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)

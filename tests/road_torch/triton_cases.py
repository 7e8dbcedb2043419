"""Tests of the Triton kernel that `test_triton.py` runs in a separate process.

With ``TRITON_INTERPRET=1`` Triton interprets the kernel on the CPU; without it the tests need a GPU, and a few run only
there.
"""

import contextlib
import dataclasses
import importlib.util
import os

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from _compare import TOLERANCE, assert_close, named_values
from _models import Net, small_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import road_core
from road_torch import RoadConfig, RoadModel, _kernels, _ops
from road_torch._kernels import default, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
OUT = 192

gpu = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter")

if INTERPRETED:
    # The interpreter cuts bfloat16 off, where GPUs round to the nearest.
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def convert(data, old, new, mode):
        if (str(old), str(new)) != ("fp32", "bf16"):
            return _convert_float(data, old, new, mode)
        return torch.from_numpy(data.view("float32")).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert
    # Half of its time goes into looking for overflows, which the sizes here can't cause.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


def values(name, *shape):
    return torch.from_numpy(named_values(name, *shape)).to(DEVICE)


def table(rows):
    pairs = [default.coefficients(values(f"t{i}", OUT), values(f"a{i}", OUT), "road_2", 64) for i in range(rows)]
    return [torch.stack(part) for part in zip(*pairs, strict=True)]


def rounded_once(y, first, cross, group_size):
    """The rotation with coefficients in the dtype of ``y``, whose products are exact in float64."""
    y, first, cross = y.double(), first.to(y.dtype).double(), cross.to(y.dtype).double()
    return (y * first + default.partner(y, group_size) * cross).float()


@pytest.mark.parametrize("group_size", [2, 64, 192])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(OUT,), (5, OUT), (2, 3, OUT), (0, OUT)])
def test_rotate_against_the_reference(shape, dtype, variant, group_size):
    size = road_core.parameter_size(variant, OUT)
    theta, alpha = named_values("theta", size), named_values("alpha", size, mean=1.0)
    y = values("y", *shape).to(getattr(torch, dtype))
    first, cross = default.coefficients(
        torch.from_numpy(theta).to(DEVICE), torch.from_numpy(alpha).to(DEVICE), variant, group_size
    )
    before = y.clone()
    given = triton.rotate(y, first, cross, group_size)
    assert given.dtype == y.dtype
    assert torch.equal(y, before)
    if y.numel():
        exact = y.double().cpu()
        expected = road_core.rotate(exact, theta, alpha, variant=variant, group_size=group_size)
        assert_close(given.double().cpu(), expected, dtype, moved_from=exact)
    assert triton.rotate_(y, first, cross, group_size) is y
    assert torch.equal(y, given)


@pytest.mark.parametrize("shape", [(4, OUT), (4, 3, OUT), (4, 2, 3, OUT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_table(dtype, shape):
    first, cross = table(3)
    y = values("y", *shape).to(dtype)
    for index in (torch.tensor([2, 0, 1, 2], device=DEVICE), torch.tensor([1], device=DEVICE)):
        expected = default.rotate(y.float(), first, cross, 64, index)
        name = str(dtype).removeprefix("torch.")
        given = triton.rotate(y, first, cross, 64, index)
        assert_close(given.double().cpu(), expected.cpu(), name, moved_from=y.double().cpu())
    gathered = [part[[2, 0, 1, 2]].view(4, *[1] * (y.ndim - 2), OUT) for part in (first, cross)]
    by_index = triton.rotate(y, first, cross, 64, torch.tensor([2, 0, 1, 2], device=DEVICE))
    assert torch.equal(triton.rotate(y, *gathered, 64), by_index)


@pytest.mark.parametrize("group_size", [2, 4, 6, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_rows_and_blocks_per_token(dtype, group_size, monkeypatch):
    """Whatever rows and pairs a program gets, the bits are the same, and in half precision exactly rounded once."""
    first, cross = table(3)
    index = torch.tensor([2, 0], device=DEVICE)
    y = values("y", 2, 7, OUT).to(dtype)
    monkeypatch.setattr(triton, "ROWS", 4)
    expected = rounded_once(y, first[index][:, None], cross[index][:, None], group_size)
    found = []
    for programs, block in ((triton.PROGRAMS, triton.BLOCK), (1, triton.BLOCK), (1, 64)):
        monkeypatch.setattr(triton, "PROGRAMS", programs)
        monkeypatch.setattr(triton, "BLOCK", block)
        found.append(triton.rotate(y, first, cross, group_size, index))
    assert all(torch.equal(given, found[0]) for given in found)
    if dtype is torch.float32:
        torch.testing.assert_close(found[0], expected)
    else:
        assert torch.equal(found[0], expected.to(dtype))


def test_outputs_of_several_sizes_and_alignments():
    """A prepared rotation is launched anew or directly, in any order."""
    first, cross = table(3)
    prepared = triton.prepare_(first, cross, 64, torch.tensor([2, 0], device=DEVICE))
    for tokens, shift in ((3, 0), (3, 0), (3, 0), (1, 0), (1, 0), (1, 0), (1, 1), (3, 1), (1, 0), (3, 0)):
        memory = values(f"y{tokens}", 2 * tokens * OUT + 1)
        y = memory[shift : shift + 2 * tokens * OUT].view(2, tokens, OUT)
        expected = default.rotate(y, first, cross, 64, torch.tensor([2, 0], device=DEVICE))
        assert prepared(y) is y
        torch.testing.assert_close(y, expected)
    empty = torch.empty(2, 0, OUT, device=DEVICE)
    assert prepared(empty) is empty


@pytest.mark.parametrize("index", [None, [2, 0], [1]])
def test_opcheck_and_gradients(index):
    y = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    lead = () if index is None else (4,)
    first, cross = (torch.randn(*lead, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    index = index and torch.tensor(index, device=DEVICE)
    torch.library.opcheck(torch.ops.road.rotate.default, (y, first, cross, 8, index, "triton"))
    given, expected = (
        torch.autograd.grad(_ops.rotate(y, first, cross, 8, index, kernel).square().sum(), (y, first, cross))
        for kernel in ("triton", "default")
    )
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


ADAPTERS = {
    "a": {"group_size": 16},
    "b": {"group_size": 2, "variant": "road_4"},
    "c": {"group_size": 16, "variant": "road_2"},
}


def with_adapters(kernel, dtype=torch.float32, base=None, names="abc", targets=("up", "down"), **changes):
    model = RoadModel((Net(16, OUT) if base is None else base).to(DEVICE, dtype), kernel=kernel)
    for name in names:
        torch.manual_seed(ord(name))
        fields = {"target_modules": list(targets), "init_weights": False, "inference_mode": True}
        model.add_adapter(name, RoadConfig(**{**fields, **ADAPTERS[name], **changes}))
    return model.eval()


@contextlib.contextmanager
def counted(monkeypatch):
    """Counts launches that aren't prepared."""
    launches, launch = [], triton._launch
    with monkeypatch.context() as patched:
        patched.setattr(triton, "_launch", lambda *args: launches.append(args) or launch(*args))
        yield launches


def test_a_model_with_this_kernel(monkeypatch):
    models = [with_adapters(kernel, names="ab") for kernel in ("triton", "default")]
    x = values("x", 4, 3, 16)
    for names in (None, ["a", "b", "__base__", "a"], ["b", "b", "a", "a"]):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                given, expected = (model(x, adapter_names=names) for model in models)
            torch.testing.assert_close(given, expected)
    with counted(monkeypatch) as launches, torch.no_grad():
        models[0](x, adapter_names=["a", "a", "__base__", "a"])
    # One launch per layer; gathering needs none of its own.
    assert len(launches) == 2
    assert _kernels.choose("auto", torch.device("cpu")) is _kernels.DEFAULT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    """Alone with its adapter, its coefficients are rounded beforehand; in a mixed batch the kernel rounds them."""
    model, plain = (with_adapters(kernel, dtype, names="ac") for kernel in ("triton", "default"))
    x = values("x", 2, 3, 16).to(dtype)
    for name in "ac":
        model.set_adapter(name)
        with torch.no_grad():
            found = [model(x, adapter_names=names) for names in ([name] * 2, [name, "ac".strip(name)], None, None)]
        # With a gradient for the input, the rows' coefficients are gathered in float32.
        found.append(model(x.clone().requires_grad_(), adapter_names=[name, "__base__"]).detach())
        assert all(torch.equal(given[0], found[0][0]) for given in found)
        plain.set_adapter(name)
        with torch.no_grad():
            expected, base = plain(x), plain(x, adapter_names=["__base__"] * 2)
        near = str(dtype).removeprefix("torch.")
        assert_close(found[0].double().cpu(), expected.double().cpu(), near)
        assert float((expected - base).abs().max()) > 10 * TOLERANCE[near] * float(expected.abs().max())


def forward_mode(model, x, tangent, names):
    with forward_ad.dual_level(), torch.no_grad():
        given = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent), adapter_names=names)).tangent
    return torch.zeros_like(x) if given is None else given


TRANSFORMS = {
    "forward mode": lambda model, x, t: forward_mode(model, x, t, None),
    "forward mode, mixed": lambda model, x, t: forward_mode(model, x, t, ["a", "b"]),
    "jvp": lambda model, x, t: torch.func.jvp(model, (x,), (t,))[1],
    "vmap": lambda model, x, t: torch.func.vmap(model)(x),
    "grad": lambda model, x, t: torch.func.grad(lambda v: model(v).square().sum())(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, grad):
    x, tangent, found = values("x", 2, 3, 16), values("tangent", 2, 3, 16), []
    for kernel in ("triton", "default"):
        model = with_adapters(kernel, names="ab")
        model.set_adapter("a")
        with torch.set_grad_enabled(grad):
            # The second time it meets what plain calls prepared.
            for _ in range(2):
                found.append(TRANSFORMS[transform](model, x, tangent))
                model(x)
                model(x)
    for given in found:
        torch.testing.assert_close(given, found[-1])


def test_float64():
    given, expected = (with_adapters(k, torch.float64, Net(16, 32), names="ab") for k in ("triton", "default"))
    x = values("x", 2, 1, 16).double()
    for names in (None, ["a", "b"]):
        with torch.no_grad():
            a, b = given(x, adapter_names=names), expected(x, adapter_names=names)
        assert a.dtype == torch.float64
        assert torch.equal(a, b)
        assert torch.autograd.gradcheck(lambda v, names=names: given(v, adapter_names=names), (x.requires_grad_(),))
        x = x.detach()


def test_trying_it_within_a_transform(monkeypatch):
    with counted(monkeypatch) as launches:
        tried = torch.func.vmap(lambda x: triton.launch_once(x.device) or x)
        torch.func.jvp(tried, (torch.ones(2, device=DEVICE),), (torch.ones(2, device=DEVICE),))
        with FakeTensorMode():
            triton.launch_once(torch.device(DEVICE))
    assert [type(one) for one, *_ in launches] == [torch.Tensor] * 2


def test_tensors_of_other_classes():
    class Special(torch.Tensor):
        pass

    first, cross = table(1)
    y = values("y", 3, OUT)
    expected = default.rotate(y, first[0], cross[0], 64)
    torch.testing.assert_close(
        triton.rotate(y.as_subclass(Special), first[0], cross[0], 64).as_subclass(torch.Tensor), expected
    )
    prepared = triton.prepare_(first[0], cross[0], 64)
    for _ in range(3):
        prepared(y.clone())
    torch.testing.assert_close(prepared(y.clone().as_subclass(Special)).as_subclass(torch.Tensor), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for rotate in (triton.rotate, triton.rotate_):
            assert rotate(torch.empty(3, OUT, device=DEVICE), first[0], cross[0], 64).shape == (3, OUT)


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_model_with_this_kernel(train, monkeypatch):
    models = [with_adapters(kernel, names="ac", inference_mode=not train) for kernel in ("triton", "default")]
    for model in models:
        model.set_adapter(["a"])
    backend = CompileCounter()
    compiled = torch.compile(models[0], backend=backend)
    x = values("x", 4, 3, 16)
    for names in (["a", "c", "__base__", "a"], ["c", "c", "a", "__base__"]):
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
    with counted(monkeypatch) as launches, torch.no_grad():
        compiled(x, adapter_names=["a", "c", "c", "a"])
    assert len(launches) == 2


@pytest.mark.parametrize("kernel", ["triton", "default"])
def test_tables_may_be_written_before_the_backward_pass(kernel):
    model = with_adapters(kernel, names="ac")
    found = []
    for write in (False, True):
        x = values("x", 2, 3, 16).requires_grad_()
        y = model(x, adapter_names=["a", "c"])
        if write:
            # Each mix takes a row of the tables.
            model(x, adapter_names=["a+c", "c+a"])
        y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_swaps_and_growing_tables(cache, tmp_path):
    """On a GPU transformers compiles what decodes with a static cache."""
    other = with_adapters("default", base=small_model(num_hidden_layers=1), targets=["q_proj", "down_proj"], names="c")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "road_theta" in name:
                parameter.neg_()
    other.save_pretrained(tmp_path)
    ids = torch.arange(3, 23, device=DEVICE).view(4, 5)
    found = []
    for kernel in ("triton" if INTERPRETED else "auto", "default"):
        base = small_model(num_hidden_layers=1)
        model = with_adapters(kernel, base=base, targets=["q_proj", "down_proj"], names="ac")

        def answer(*names, model=model):
            texts = model.generate(
                ids,
                adapter_names=names,
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=None,
                cache_implementation=cache,
            )
            found.append(texts)

        answer("a", "c", "__base__", "a")
        answer("c", "c", "c", "c")
        model.hotswap_adapter(tmp_path / "c", "c")
        answer("a", "c", "__base__", "a")
        for name in "xyz":
            torch.manual_seed(ord(name))
            fields = {"target_modules": ["q_proj", "down_proj"], "init_weights": False, "inference_mode": True}
            model.add_adapter(name, RoadConfig(**fields, group_size=16))
        answer("z", "a", "y", "__base__")
    half = len(found) // 2
    for given, expected in zip(found[:half], found[half:], strict=True):
        assert torch.equal(given, expected)
    assert len({tuple(texts.flatten().tolist()) for texts in found}) == half


@pytest.mark.filterwarnings("ignore:.*inputs will be cast")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_base_mixed_and_merged(kind):
    import bitsandbytes as bnb

    def quantised(plain):
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, module=layer, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = nn.Parameter(plain.bias.data, requires_grad=False)
        return layer.to(DEVICE)

    models = []
    for kernel in ("triton", "default"):
        net = Net(64, OUT).to(torch.bfloat16)
        net.up, net.down = quantised(net.up), quantised(net.down)
        models.append(RoadModel(net.eval(), kernel=kernel))
        for name in "ac":
            torch.manual_seed(ord(name))
            fields = {"target_modules": ["up", "down"], "init_weights": False, "inference_mode": True}
            models[-1].add_adapter(name, RoadConfig(**fields, **ADAPTERS[name]))
    x = values("x", 2, 3, 64).bfloat16()
    with torch.no_grad():
        for names in (["a", "c"], ["__base__", "a"], ["c", "c"]):
            given, expected = (model(x, adapter_names=names).double().cpu() for model in models)
            assert_close(given, expected, "bfloat16")
        for model in models:
            model.set_adapter("a")
        before, merged = models[0](x), []
        for model in models:
            model.merge_adapter()
            merged.append(model(x))
            model.unmerge_adapter()
        # Merging doesn't use a kernel.
        assert torch.equal(*merged)
        assert torch.equal(models[0](x), before)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_outputs(dtype):
    kernel = _kernels.choose("auto", torch.device("cuda"))
    assert kernel.gathers
    y = torch.randn(8, 333, 4096, device=DEVICE, dtype=dtype)
    first, cross = torch.randn(2, 5, 4096, device=DEVICE)
    index = torch.tensor([0, 1, 2, 3, 4, 0, 0, 2], device=DEVICE)
    for group_size in (2, 8, 64):
        expected = rounded_once(y, first[index][:, None], cross[index][:, None], group_size)
        given = kernel.rotate(y, first, cross, group_size, index)
        over = kernel.rotate_(y.clone(), first, cross, group_size, index)
        assert torch.equal(over, given)
        if dtype is torch.float32:
            torch.testing.assert_close(given, expected)
        else:
            assert torch.equal(given, expected.to(dtype))


@gpu
def test_more_elements_than_32_bits_count():
    # 2**31 + 2**19 outputs, 4 GiB; the last rows' offsets don't fit in 32 bits.
    rows, out = 2**19 + 128, 4096
    y = torch.ones(2, rows // 2, out, device=DEVICE, dtype=torch.bfloat16)
    y[0, 0] = y[1, -1] = torch.randn(out, device=DEVICE).bfloat16()
    ends = torch.stack((y[0, 0], y[1, -1]))
    first, cross = torch.randn(2, 3, out, device=DEVICE)
    index = torch.tensor([2, 1], device=DEVICE)
    expected = rounded_once(ends, first[index], cross[index], 64).bfloat16()
    prepared = triton.prepare_(first, cross, 64, index)
    for _ in range(3):
        y[0, 0], y[1, -1] = ends
        prepared(y)
        assert torch.equal(torch.stack((y[0, 0], y[1, -1])), expected)


@gpu
def test_further_outputs_are_launched_directly(monkeypatch):
    model = with_adapters("triton", torch.bfloat16, names="ac")
    x = values("x", 2, 1, 16).bfloat16()
    with torch.no_grad():
        expected = [model(x) for _ in range(4)]
        # The call of the plain routing is prepared by now.
        with counted(monkeypatch) as launches:
            given = model(x)
    assert triton._compiled
    assert not launches
    assert all(torch.equal(given, one) for one in expected)


@gpu
def test_a_captured_graph_replays():
    first, cross = table(3)
    index = torch.tensor([2, 0], device=DEVICE)
    prepared = triton.prepare_(first, cross, 64, index)
    start, y = values("y", 2, 1, OUT), torch.empty(2, 1, OUT, device=DEVICE)
    for _ in range(3):
        prepared(y.copy_(start))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared(y.copy_(start))
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, default.rotate(start, first, cross, 64, index))

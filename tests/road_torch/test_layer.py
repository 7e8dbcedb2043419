"""Layer kind × dtype × variant × group size × (single, mixed, merged, disabled), against road_core's float64."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from _compare import TOLERANCE, assert_close, named_values
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.integrations.bitnet import AutoBitLinear
from transformers.pytorch_utils import Conv1D

import road_core
from road_torch import AdapterError, RoadConfig, RoadLayer, RoadModel
from road_torch._kernels import default

IN, OUT = 64, 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = ("road_1", "road_2", "road_4")


class Doubled(nn.Module):
    """A linear layer with its own computation, which returns a tensor that it also keeps."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.inner = nn.Linear(in_features, out_features)

    def forward(self, x):
        self.kept = 2 * self.inner(x)
        return self.kept


def make_base(kind, dtype):
    torch.manual_seed(0)
    if kind == "conv1d":
        layer = Conv1D(OUT, IN)
        nn.init.normal_(layer.weight, std=0.2)
    elif kind == "other":
        layer = Doubled(IN, OUT)
    else:
        layer = nn.Linear(IN, OUT, bias=kind == "linear")
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return nn.ModuleDict({"proj": layer}).to(dtype).eval().requires_grad_(False)


class Model(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner["proj"](x)


def adapters(variant, group_size, names="ab", *, train=False):
    size = road_core.parameter_size(variant, OUT)
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=["proj"], inference_mode=not train)
    return {
        name: (config, named_values(f"{name} theta", size), named_values(f"{name} alpha", size, mean=1.0))
        for name in names
    }


def fill(model, parameters):
    for name, (config, theta, alpha) in parameters.items():
        model.add_adapter(name, config)
        for layer in model.modules():
            if isinstance(layer, RoadLayer):
                with torch.no_grad():
                    layer.road_theta[name].copy_(torch.from_numpy(theta))
                    layer.road_alpha[name].copy_(torch.from_numpy(alpha))
    return model


def reference(y, parameters, name):
    config, theta, alpha = parameters[name]
    return road_core.rotate(y.double(), theta, alpha, variant=config.variant, group_size=config.group_size)


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d", "other"])
def test_parity(kind, dtype, variant, group_size):
    base = Model(make_base(kind, DTYPES[dtype]))
    x = torch.from_numpy(named_values("x", 4, 3, IN)).to(DTYPES[dtype])
    y = base(x).detach().clone()
    parameters = adapters(variant, group_size)
    model = fill(RoadModel(base), parameters)

    single = model(x)
    assert single.dtype == y.dtype
    assert_close(single.double(), reference(y, parameters, "a"), dtype, moved_from=y.double())
    model.set_adapter("b")
    assert_close(model(x).double(), reference(y, parameters, "b"), dtype, moved_from=single.double())

    mixed = model(x, adapter_names=["b", "__base__", "a", "b"])
    assert mixed.dtype == y.dtype
    for row, name in enumerate(["b", None, "a", "b"]):
        if name is None:
            assert torch.equal(mixed[row], y[row])
        else:
            assert_close(mixed[row].double(), reference(y[row], parameters, name), dtype, moved_from=y[row].double())

    with model.disable_adapter():
        assert torch.equal(model(x), y)
    assert_close(model(x).double(), reference(y, parameters, "b"), dtype)

    if kind != "other":
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model.merge_adapter(["a"]) == {}
        merged = model(x)
        assert merged.dtype == y.dtype
        # Rounding the weight once is as accurate as rounding the output.
        assert_close(merged.double(), reference(y, parameters, "a"), dtype, moved_from=y.double())
        with model.disable_adapter():
            assert torch.equal(model(x), y)
        assert torch.equal(model(x), merged)
        model.unmerge_adapter()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def weights(model):
    return {
        name.replace("base_layer.", ""): value.clone()
        for name, value in model.named_parameters()
        if ".road_" not in name
    }


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_weights_come_back_by_the_inverse(kind, dtype, variant, group_size):
    base = Model(make_base(kind, DTYPES[dtype]))
    before = weights(base)
    parameters = adapters(variant, group_size, "a")
    config, theta, alpha = parameters["a"]
    # Blocks far from singular, so that rounding errors aren't amplified.
    parameters["a"] = config, theta.clip(-0.3, 0.3), alpha.clip(0.8, 1.25)
    model = fill(RoadModel(base), parameters)
    model.merge_adapter(["a"], keep_weights=False)
    merged = weights(base)
    transposed = kind == "conv1d"
    weight = before["inner.proj.weight"].T if transposed else before["inner.proj.weight"]
    expected = road_core.merge(weight.double(), *parameters["a"][1:], variant=variant, group_size=group_size)
    found = merged["inner.proj.weight"].T if transposed else merged["inner.proj.weight"]
    assert_close(found.double(), expected, dtype)
    assert model.unmerge_adapter() == {}
    assert model.merged_adapters == []
    back = weights(base)
    assert {n: (v.dtype, v.shape) for n, v in back.items()} == {n: (v.dtype, v.shape) for n, v in before.items()}
    for name, value in before.items():
        # Rounded twice.
        atol = 2 * TOLERANCE[dtype] * float(value.abs().max())
        torch.testing.assert_close(back[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_several_variants_and_group_sizes_in_one_batch(dtype):
    base = Model(make_base("linear", DTYPES[dtype]))
    x = torch.from_numpy(named_values("x", 5, IN)).to(DTYPES[dtype])
    y = base(x)
    parameters = {**adapters("road_1", 64, "a"), **adapters("road_2", 2, "b"), **adapters("road_4", 8, "c")}
    parameters |= adapters("road_2", 64, "d")
    model = fill(RoadModel(base), parameters)
    names = ["b", "a", "__base__", "d", "c"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            assert torch.equal(mixed[row], y[row])
        else:
            assert_close(mixed[row].double(), reference(y[row], parameters, name), dtype, moved_from=y[row].double())


def test_several_active_adapters_are_applied_one_after_the_other():
    base = Model(make_base("linear", torch.float32))
    x = torch.from_numpy(named_values("x", 5, IN))
    y = base(x)
    parameters = {**adapters("road_4", 64, "a"), **adapters("road_2", 64, "b"), **adapters("road_2", 8, "c")}
    model = fill(RoadModel(base), parameters)
    for names in (["a", "b"], ["b", "a"], ["a", "c", "b"]):
        model.set_adapter(names)
        assert model.active_adapter == model.active_adapters == names
        expected = y
        for name in names:
            expected = torch.from_numpy(reference(expected, parameters, name))
        assert_close(model(x), expected, "float32", moved_from=y)
        model.merge_adapter()
        assert_close(model(x), expected, "float32", moved_from=y)
        model.unmerge_adapter()


def test_an_output_that_the_base_keeps_is_not_overwritten():
    base = Model(make_base("other", torch.float32))
    model = fill(RoadModel(base), adapters("road_1", 8, "a"))
    x = torch.randn(2, IN)
    out = model(x)
    kept = base.inner["proj"].base_layer.kept
    torch.testing.assert_close(kept, 2 * base.inner["proj"].base_layer.inner(x))
    assert not torch.allclose(out, kept)


def test_an_output_that_a_hook_keeps_is_not_overwritten():
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a"))
    linear = model.base_model.inner["proj"].base_layer
    kept = []
    linear.register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(2, IN)
    for number, context in enumerate((torch.enable_grad, torch.inference_mode)):
        with context():
            model(x)
            torch.testing.assert_close(kept[number], nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("where", ["global hook", "own forward"])
@torch.inference_mode()
def test_an_output_that_another_watcher_keeps_is_not_overwritten(where):
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a"))
    linear, x, kept = model.base_model.inner["proj"].base_layer, torch.randn(2, IN), []
    expected = model(x)
    if where == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: kept.append(y) if module is linear else None
        )
    else:

        def forward(x):
            kept.append(nn.functional.linear(x, linear.weight, linear.bias))
            return kept[-1]

        linear.forward = forward
    assert torch.equal(model(x), expected)
    if where == "global hook":
        handle.remove()
    assert torch.equal(kept[0], nn.functional.linear(x, linear.weight, linear.bias))


def _double_the_input(_module, args):
    return (2 * args[0],)


@pytest.mark.parametrize(
    "watch",
    [
        lambda linear: linear.register_forward_hook(lambda module, args, y: 2 * y),
        lambda linear: linear.register_forward_pre_hook(_double_the_input),
        lambda linear: nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: _double_the_input(module, args) if module is linear else None
        ),
        lambda linear: setattr(linear, "forward", lambda x: nn.Linear.forward(linear, 2 * x)),
        lambda linear: nn.utils.parametrizations.spectral_norm(linear),
        lambda linear: nn.utils.parametrizations.weight_norm(linear),
        lambda linear: nn.utils.weight_norm(linear).weight_g.data.mul_(2),
    ],
    ids=["hook", "pre-hook", "global hook", "own forward", "parametrized", "parametrized in two", "old weight norm"],
)
def test_what_is_hung_on_the_base_counts_in_inference(watch):
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a")).eval()
    linear, x = model.base_model.inner["proj"].base_layer.eval(), torch.randn(2, IN)
    with torch.inference_mode():
        model(x)
    handle = watch(linear)
    try:
        expected = linear(x)
        with model.disable_adapter(), torch.inference_mode():
            torch.testing.assert_close(model(x), expected)
        with torch.inference_mode():
            given = model(x)
        torch.testing.assert_close(given, model(x))
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def test_a_weight_that_is_no_plain_tensor_rotates_and_is_not_merged():
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a")).eval()
    linear, x = model.base_model.inner["proj"].base_layer, torch.randn(2, IN)
    expected = model(x)
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data), requires_grad=False)
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            given = model(x)
        torch.testing.assert_close(given.a if isinstance(given, TwoTensor) else given, expected)
    with pytest.raises(AdapterError, match=r"proj: expected a plain .* found Linear with TwoTensor of torch\.float32"):
        model.merge_adapter()
    assert isinstance(linear.weight, TwoTensor)


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Residual(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.cat([x, x], dim=-1)


def own_forward(kind):
    if kind == "bitnet":
        return AutoBitLinear(IN, OUT, bias=True, online_quant=True)
    if kind == "quantisation-aware":
        layer = torch.ao.nn.qat.Linear(IN, OUT, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86"))
        layer(torch.zeros(1, IN))  # so that its observer sees the weight
        return layer
    layer = {"scaled": Scaled, "residual": Residual, "replaced": nn.Linear}[kind](IN, OUT)
    if kind == "replaced":
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook())
        assert "forward" in layer.__dict__
    return layer


def adapted_with(kind, dtype):
    base = Model(nn.ModuleDict({"proj": own_forward(kind)}).to(dtype).eval())
    return fill(RoadModel(base), adapters("road_4", 8, "a")).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["scaled", "replaced"])
def test_a_layer_with_a_forward_of_its_own_is_merged_where_it_is_linear(kind, dtype):
    model = adapted_with(kind, DTYPES[dtype])
    x = torch.from_numpy(named_values("x", 4, IN)).to(DTYPES[dtype])
    expected = model(x).double()
    with model.disable_adapter():
        alone = model(x).double()
    model.merge_adapter()
    assert model.merged_adapters == ["a"]
    assert_close(model(x).double(), expected, dtype, moved_from=alone)


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["bitnet", "quantisation-aware", "residual"])
def test_a_layer_whose_output_would_not_be_rotated_is_not_merged(kind, keep):
    """Their weights are plain floats, but are quantised at each call, or aren't all that determines the output."""
    model = adapted_with(kind, torch.float32)
    x = torch.from_numpy(named_values("x", 4, IN)).to(torch.float32)
    expected = model(x)
    found = type(model.base_model.inner["proj"].base_layer).__name__
    message = f"^inner.proj: expected a layer whose output is rotated with its weight and bias, found {found} with"
    for merge in (lambda: model.merge_adapter(keep_weights=keep), model.merge_and_unload):
        with pytest.raises(AdapterError, match=message):
            merge()
        assert model.merged_adapters == []
        assert torch.equal(model(x), expected)


def test_all_linear_takes_layers_that_are_no_nn_linear():
    class Packed(nn.Module):
        """A layer like those of quantisers, with integer weights and sizes."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = IN, OUT
            self.register_buffer("codes", torch.ones(OUT, IN, dtype=torch.int8))

        def forward(self, x):
            return x @ self.codes.T.to(x)

    base = nn.ModuleDict({"packed": Packed(), "plain": nn.Linear(IN, OUT), "outer": Doubled(IN, OUT)})
    model = RoadModel(base, RoadConfig(target_modules="all-linear", group_size=8))
    adapted = {layer.module_path for layer in model.modules() if isinstance(layer, RoadLayer)}
    assert adapted == {"packed", "plain", "outer.inner"}


@pytest.mark.parametrize("way", ["in place", "replaced", "load_state_dict", "assigned"])
def test_a_change_of_parameters_shows_at_once(way):
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_2", 8, "ab"))
    x = torch.randn(2, IN)
    layer = model.base_model.inner["proj"]
    plain, mixed = model(x), model(x, adapter_names=["b", "a"])
    with torch.no_grad():
        if way == "in place":
            layer.road_theta["a"].add_(0.5)
        elif way == "replaced":
            layer.road_theta["a"] = nn.Parameter(layer.road_theta["a"] + 0.5)
        else:
            state = copy.deepcopy(layer.state_dict())
            state["road_theta.a"] += 0.5
            layer.load_state_dict(state, assign=way == "assigned")
    assert not torch.allclose(model(x), plain)
    again = model(x, adapter_names=["b", "a"])
    assert torch.equal(again[0], mixed[0])
    assert not torch.allclose(again[1], mixed[1])
    assert torch.equal(again[1], model(x)[1])


@pytest.mark.parametrize("names", [None, ["a", "__base__", "a"]])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_leaves_no_trace_shows(fused, names):
    """Fused optimizers don't change a parameter's version, and the model was evaluated since the training pass."""
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_2", 8, "a", train=True))
    layer, x = model.base_model.inner["proj"], torch.randn(3, IN)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=fused)
    model(x, adapter_names=names).sum().backward()
    versions = [p._version for p in trained]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        optimizer.step()
        assert (versions == [p._version for p in trained]) is fused
        after, y = model(x, adapter_names=names), layer.base_layer(x).double()
        theta, alpha = (v["a"].numpy() for v in (layer.road_theta, layer.road_alpha))
        expected = torch.from_numpy(road_core.rotate(y.numpy(), theta, alpha, variant="road_2", group_size=8))
        if names:
            expected[1] = y[1]
        assert_close(after, expected, "float32", moved_from=before)
        # Coefficients formed during training aren't kept for later.
        model.set_adapter("a", inference_mode=True)
        assert torch.equal(model(x, adapter_names=names), after)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("names", [None, ["a", "b", "__base__"]])
def test_derivatives_of_functions(names, frozen):
    """torch.func and forward mode can differentiate plain operations only."""
    base = make_base("linear", torch.float64)
    model = fill(RoadModel(Model(base)), adapters("road_4", 8, "ab", train=not frozen))
    x, tangent = torch.randn(3, IN, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)

    def function(x):
        return model(x, adapter_names=names)

    with torch.no_grad():
        # The function is linear up to the bias.
        expected = function(x + tangent) - function(x)
    assert_close(torch.func.jvp(function, (x,), (tangent,))[1].detach(), expected, "float32")
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, tangent))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent.detach(), expected, "float32")
    leaf = x.clone().requires_grad_()
    function(leaf).square().sum().backward()
    assert_close(torch.func.grad(lambda x: function(x).square().sum())(x).detach(), leaf.grad, "float32")
    forward, reverse = torch.func.jacfwd(function)(x).detach(), torch.func.jacrev(function)(x).detach()
    assert_close(forward, reverse, "float32")
    assert_close(torch.einsum("iojk,jk->io", reverse, tangent), expected, "float32")


@torch.no_grad()
def test_a_class_whose_forward_is_replaced(monkeypatch):
    model, x = (
        fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a")),
        torch.randn(2, IN),
    )
    plain, kept, before = nn.Linear.forward, [], model(x)
    base = plain(model.base_model.inner["proj"].base_layer, x)

    def doubled(layer, x):
        kept.append(2 * plain(layer, x))
        return kept[-1]

    monkeypatch.setattr(nn.Linear, "forward", doubled)
    assert_close(model(x), 2 * before, "float32", moved_from=before)
    # The base's output, which someone kept, is not overwritten.
    assert torch.equal(kept[0], 2 * base)


class Pairs(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Groups(nn.Linear):
    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


class Waves(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1j


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Pairs, "a tuple from Pairs"),
        (Groups, r"shape \[2, 2, 64\] from Groups"),
        (Waves, r"torch\.complex64 and shape \[2, 128\] from Waves"),
    ],
)
def test_a_linear_layer_whose_output_is_none_is_named(kind, found, grad):
    model = RoadModel(
        Model(nn.ModuleDict({"proj": kind(IN, OUT)})), adapters("road_1", 8, "a", train=True)["a"][0], "a"
    )
    for names in (None, ["a", "__base__"]):
        with torch.set_grad_enabled(grad), pytest.raises(AdapterError, match=rf"proj: expected .*128.*{found}"):
            model(torch.randn(2, IN), adapter_names=names)


def test_coefficients_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.base_model.inner["proj"].bank.first.dtype == torch.float32
    assert model.base_model.inner["proj"].bank.cross.dtype == torch.float32


def test_adapters_stay_in_float32_when_the_model_is_cast():
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "a"))
    x = torch.randn(2, IN)
    model(x, adapter_names=["a", "a"])
    before = model.base_model.inner["proj"].road_theta["a"].clone()
    model.to(torch.bfloat16)
    layer = model.base_model.inner["proj"]
    assert layer.weight.dtype == torch.bfloat16
    assert layer.road_theta["a"].dtype == torch.float32
    assert torch.equal(layer.road_theta["a"], before)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_training_gives_the_gradient_of_the_formula():
    base = Model(make_base("linear", torch.float32))
    x = torch.from_numpy(named_values("x", 4, IN))
    y = base(x).detach()
    parameters = adapters("road_4", 8, "ab", train=True)
    model = fill(RoadModel(base), parameters)
    model.set_adapter("a")
    layer = base.inner["proj"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.inner.proj.road_theta.a",
        "base_model.inner.proj.road_alpha.a",
    ]
    weights = torch.from_numpy(named_values("weights", 4, OUT))
    for mixed in (None, ["a", "b", "__base__", "a"]):
        layer.zero_grad()
        (model(x, adapter_names=mixed) * weights).sum().backward()
        _config, theta, alpha = parameters["a"]
        rows = [0, 1, 2, 3] if mixed is None else [0, 3]
        for i in (0, 100, 255):
            step = np.zeros_like(theta)
            step[i] = 1e-6
            up, down = (
                road_core.rotate(y.double(), theta + s * step.astype(float), alpha, variant="road_4", group_size=8)
                for s in (1, -1)
            )
            expected = ((up - down)[rows] * weights.numpy()[rows]).sum() / 2e-6
            assert float(layer.road_theta["a"].grad[i]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert layer.road_theta["b"].grad is None


@pytest.mark.parametrize("how", ["plain", "mixed", "compiled"])
def test_many_rows_in_float16_do_not_overflow_a_gradient(how):
    """The sum over rows exceeds float16's range; the gradient is float32."""
    model = fill(RoadModel(Model(make_base("linear", torch.float16))), adapters("road_1", 8, "a", train=True))
    layer, x = model.base_model.inner["proj"], torch.randn(2048, IN).half()
    called = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    y = called(x, adapter_names=["a"] * len(x) if how == "mixed" else None)
    y.backward((100 * layer.base_layer(x)).detach())
    given = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        base = layer.base_layer(x).double()
    theta, alpha = (v["a"].detach().double().requires_grad_() for v in (layer.road_theta, layer.road_alpha))
    first, cross = default.coefficients(theta, alpha, "road_1", 8)
    default.rotate(base, first, cross, 8).backward(100 * base)
    assert alpha.grad.abs().max() > torch.finfo(torch.float16).max
    assert_close(given["road_theta.a"].double(), theta.grad, "float16")
    assert_close(given["road_alpha.a"].double(), alpha.grad, "float16")


def test_gradients_flow_through_a_frozen_adapter():
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "ab"))
    x = torch.randn(2, 3, IN, requires_grad=True)
    for names in (None, ["b", "a"]):
        (grad,) = torch.autograd.grad(model(x, adapter_names=names)[1, 0, 5], x)
        model.merge_adapter(["a"])
        (expected,) = torch.autograd.grad(model(x)[1, 0, 5], x)
        model.unmerge_adapter()
        torch.testing.assert_close(grad, expected)


def test_coefficients_are_formed_once_a_change(monkeypatch):
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "ab"))
    calls = []
    form = default.coefficients
    monkeypatch.setattr(default, "coefficients", lambda *args: calls.append(args) or form(*args))
    x = torch.randn(2, IN)
    for _ in range(3):
        model(x)
    assert len(calls) == 1
    for _ in range(3):
        model(x, adapter_names=["a", "b"])
    assert len(calls) == 2
    model.set_adapter("b")
    model(x)
    assert len(calls) == 2


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_that_the_model_multiplies(repeats):
    """With beams, returned sequences and flattened tokens, successive rows belong to one name."""
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "ab"))
    layer = model.base_model.inner["proj"]
    x = torch.randn(2 * repeats, IN)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model.base_model

        def forward(self, x):
            return self.inner(x.repeat_interleave(repeats, 0))

    model.base_model = Outer()
    given = model(x[:2], adapter_names=["b", "a"])
    for i, name in enumerate(["b", "a"]):
        model.set_adapter(name)
        rows = given[i * repeats : (i + 1) * repeats]
        torch.testing.assert_close(rows, layer(x[i : i + 1]).expand_as(rows))


def test_a_batch_that_is_no_multiple_names_the_layer():
    model = fill(RoadModel(Model(make_base("linear", torch.float32))), adapters("road_1", 8, "ab"))

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x[:3])

    model.base_model = Outer(model.base_model)
    with pytest.raises(AdapterError, match=r"inner\.proj: expected a multiple of the 4 rows .* found .* \[3, 128\]"):
        model(torch.randn(4, IN), adapter_names=["a", "b", "a", "b"])

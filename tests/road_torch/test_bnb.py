"""bitsandbytes layers: rotation of their own output in its dtype; merging before and after the CPU repacks weights."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from _compare import TOLERANCE, assert_close, named_values
from torch import nn

import road_core
from road_torch import RoadConfig, RoadLayer, RoadModel, _bnb

IN, OUT = 64, 128
KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "int8": {},
    "int8-threshold": {"threshold": 6.0},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
X = torch.from_numpy(named_values("x", 4, 3, IN))
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast")


def make(kind, dtype, inputs=IN):
    """Returns a quantised layer and its weight before quantisation."""
    weight = torch.from_numpy(named_values("weight", OUT, inputs)).to(dtype)
    bias = torch.from_numpy(named_values("bias", OUT)).to(dtype)
    if kind.startswith("int8"):
        layer = bnb.nn.Linear8bitLt(inputs, OUT, has_fp16_weights=False, **KINDS[kind])
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inputs, OUT, compute_dtype=dtype, **KINDS[kind])
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, module=layer, **KINDS[kind])
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return nn.ModuleDict({"proj": layer.to("cpu")}).eval(), weight


class Model(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner["proj"](x)


def road(base, variant="road_2", group_size=8):
    model = RoadModel(base)
    for name in "ab":
        model.add_adapter(
            name, RoadConfig(variant=variant, group_size=group_size, target_modules=["proj"], inference_mode=True)
        )
        layer = next(m for m in model.modules() if isinstance(m, RoadLayer))
        size = road_core.parameter_size(variant, OUT)
        with torch.no_grad():
            layer.road_theta[name].copy_(torch.from_numpy(named_values(f"{name} theta", size)))
            layer.road_alpha[name].copy_(torch.from_numpy(named_values(f"{name} alpha", size, mean=1.0)))
    return model, layer


def reference(y, layer, name, variant="road_2", group_size=8):
    theta, alpha = layer.road_theta[name].detach(), layer.road_alpha[name].detach()
    return road_core.rotate(y.double(), theta, alpha, variant=variant, group_size=group_size)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_reading_the_state_leaves_the_function(kind, merged):
    # Two blocks per row, so that a forward on a CPU does change the scales when it transposes them.
    inner, x = make(kind, torch.bfloat16, inputs=128)[0], X.repeat(1, 1, 2).bfloat16()
    model, layer = road(Model(inner))
    if merged:
        model.set_adapter("a")
        with pytest.warns(UserWarning, match=r"merging into 1 quantised layers moves their weights .* inner.proj"):
            base = model.merge_and_unload()
    else:
        base = model
    with torch.no_grad():
        expected = base(x)
        weight = _bnb.dequantize(layer.base_layer)
        found = base.state_dict()
        assert torch.equal(_bnb.dequantize(layer.base_layer), weight)
        assert torch.equal(base(x), expected)
    # A new layer restores the same weight from what was read.
    prefix = next(key.removesuffix("weight") for key in found if key.endswith(".weight"))
    state = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(f"{prefix}weight.")}
    again = bnb.nn.Params4bit.from_prequantized(found[f"{prefix}weight"], state, device="cpu")
    again.quant_state.dtype = torch.float32
    assert torch.equal(bnb.functional.dequantize_4bit(again.data, again.quant_state), weight)


@pytest.mark.parametrize("group_size", [2, 64])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, dtype, variant, group_size):
    inner, _ = make(kind, DTYPES[dtype])
    base = Model(inner)
    x = X.to(DTYPES[dtype])
    y = base(x).clone()
    model, layer = road(base, variant, group_size)
    given = model(x)
    assert given.dtype == y.dtype == DTYPES[dtype]
    assert_close(given.double(), reference(y, layer, "a", variant, group_size), dtype, moved_from=y.double())
    mixed = model(x, adapter_names=["b", "__base__", "a", "b"])
    assert mixed.dtype == y.dtype
    for row, name in enumerate(["b", None, "a", "b"]):
        if name is None:
            assert torch.equal(mixed[row], y[row])
        else:
            expected = reference(y[row], layer, name, variant, group_size)
            assert_close(mixed[row].double(), expected, dtype, moved_from=y[row].double())
    with model.disable_adapter():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_variants_and_group_sizes_in_one_batch(kind, dtype):
    base = Model(make(kind, DTYPES[dtype])[0])
    x = X.to(DTYPES[dtype])
    y = base(x).clone()
    model, layer = road(base, "road_1", 64)
    model.add_adapter("c", RoadConfig(variant="road_4", group_size=8, target_modules=["proj"], init_weights=False))
    model.add_adapter("d", RoadConfig(variant="road_2", group_size=2, target_modules=["proj"], init_weights=False))
    names = ["d", "a", "__base__", "c"]
    mixed = model(x, adapter_names=names).detach()
    assert mixed.dtype == y.dtype
    assert torch.equal(mixed[2], y[2])
    for row, (name, variant, size) in {0: ("d", "road_2", 2), 1: ("a", "road_1", 64), 3: ("c", "road_4", 8)}.items():
        expected = reference(y[row], layer, name, variant, size)
        assert_close(mixed[row].double(), expected, dtype, moved_from=y[row].double())


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_what_the_layer_computes_with(kind, dtype, forward_first):
    inner, weight = make(kind, DTYPES[dtype])
    layer = inner["proj"]
    if forward_first:
        layer(X.to(DTYPES[dtype]))
    given = _bnb.dequantize(layer)
    assert given.dtype == torch.float32
    assert given.shape == (OUT, IN)
    if kind.startswith("int8"):
        state = layer.state if layer.state.CB is not None else layer.weight
        assert torch.equal(given, bnb.functional.int8_vectorwise_dequant(state.CB, state.SCB))
    plain = (given - weight.float()).norm() / weight.float().norm()
    assert plain < (0.02 if kind.startswith("int8") else 0.15)
    y = layer(X.to(DTYPES[dtype])).float()
    expected = nn.functional.linear(X.to(DTYPES[dtype]).float(), given, layer.bias.float())
    # On the CPU the 4-bit product is computed in bfloat16, and the 8-bit one rounds its input to 8 bits.
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE["bfloat16"] * float(expected.abs().max()))


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind, forward_first):
    inner, _ = make(kind, torch.float32)
    base = Model(inner)
    model, layer = road(base)
    quantized = base.inner["proj"].base_layer
    if forward_first:
        model(X)
    weight, bias = _bnb.dequantize(quantized), quantized.bias.clone()
    theta, alpha = layer.road_theta["a"], layer.road_alpha["a"]
    expected = road_core.merge(weight, theta, alpha, variant="road_2", group_size=8)
    expected_bias = road_core.merge(bias, theta, alpha, variant="road_2", group_size=8)
    with model.disable_adapter():
        y = model(X).clone()
    errors = model.merge_adapter(["a"])
    merged = _bnb.dequantize(quantized)
    error = float((merged - torch.from_numpy(expected)).norm() / torch.from_numpy(expected).norm())
    assert errors == {"inner.proj": pytest.approx(error, rel=1e-3)}
    assert error < (0.02 if kind.startswith("int8") else 0.15)
    assert_close(quantized.bias, expected_bias, "float32", moved_from=bias)
    moved = float((model(X).double() - torch.from_numpy(reference(y, layer, "a"))).norm() / y.double().norm())
    assert moved < (0.05 if kind.startswith("int8") else 0.2)
    with model.disable_adapter():
        assert torch.equal(model(X), y)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), y)
    assert torch.equal(quantized.bias, bias)


def quantized_anew(kind, weight, dtype):
    """Returns a float32 weight after bitsandbytes quantised it from this dtype and dequantised it."""
    if kind.startswith("int8"):
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return bnb.functional.int8_vectorwise_dequant(codes, scales)
    options = {"quant_type": KINDS[kind]["quant_type"], "compress_statistics": KINDS[kind]["compress_statistics"]}
    codes, state = bnb.functional.quantize_4bit(weight.to(dtype), blocksize=64, **options)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("group_size", [8, 64])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "int8"])
def test_a_merged_weight_is_the_reference_s_quantised_anew(kind, dtype, variant, group_size):
    model, layer = road(Model(make(kind, DTYPES[dtype])[0]), variant, group_size)
    quantized = layer.base_layer
    theta, alpha = layer.road_theta["a"].detach(), layer.road_alpha["a"].detach()

    def rotated(value):
        return torch.from_numpy(
            road_core.merge(value.double(), theta, alpha, variant=variant, group_size=group_size)
        ).float()

    weight, bias = _bnb.dequantize(quantized), quantized.bias
    exact, exact_bias = rotated(weight), rotated(bias)
    errors = model.merge_adapter(["a"])
    merged = _bnb.dequantize(quantized)
    expected = quantized_anew(kind, exact, DTYPES[dtype])
    # If float32 and float64 fall on different sides of the middle between two codes, a weight may get the other code.
    assert torch.isclose(merged, expected, rtol=1e-4, atol=1e-6).double().mean() > 0.99
    assert float((expected - exact).norm()) < 0.2 * float((exact - weight).norm())
    assert errors == {"inner.proj": pytest.approx(float((expected - exact).norm() / exact.norm()), rel=1e-2)}
    assert quantized.bias.dtype == DTYPES[dtype]
    assert_close(quantized.bias.double(), exact_bias, dtype, moved_from=bias.double())
    y = model(X.to(DTYPES[dtype]))
    assert y.dtype == DTYPES[dtype]
    # As above, the layers compute with less precision than their dtype.
    assert_close(y.double(), nn.functional.linear(X, expected, exact_bias).double(), "bfloat16")


@torch.no_grad()
@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_as_it_was_where_it_cannot_be_quantised_anew(kind, forward_first, monkeypatch):
    inner, _ = make(kind, torch.float32)
    model, _ = road(Model(inner))
    if forward_first:
        model(X)
    expected = model(X).clone()
    requantize = _bnb.requantize

    def fail(base, weight):
        requantize(base, 0 * weight)
        raise MemoryError("no room for the codes")

    monkeypatch.setattr(_bnb, "requantize", fail)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MemoryError, match="no room for the codes"):
            merge()
        assert model.merged_adapters == []
        assert torch.equal(model(X), expected)
    monkeypatch.undo()
    (error,) = model.merge_adapter().values()
    assert 0 < error < 0.2


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_cast_while_merged(kind, forward_first):
    inner, _ = make(kind, torch.float32)
    model, _ = road(Model(inner))
    if forward_first:
        model(X)
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        y = twin(X).clone()
    model.merge_adapter(["a"])
    merged = model(X).clone()
    second = copy.deepcopy(model).to(torch.bfloat16).float()
    second.unmerge_adapter()
    with second.disable_adapter():
        # Only the bias was rounded.
        assert_close(second(X), y, "bfloat16")
    assert torch.equal(model(X), merged)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), y)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_weight_is_quantised_twice_and_says_how_far_it_moved(kind):
    inner, _ = make(kind, torch.float32)
    model, layer = road(Model(inner))
    with torch.no_grad():
        layer.road_theta["a"].clamp_(-0.5, 0.5)
        layer.road_alpha["a"].clamp_(0.7, 1.4)
    quantized = layer.base_layer
    plain, bias = _bnb.dequantize(quantized), quantized.bias.clone()
    model.merge_adapter(["a"], keep_weights=False)
    merged = _bnb.dequantize(quantized).double()
    theta, alpha = layer.road_theta["a"].double(), layer.road_alpha["a"].double()
    # The float64 reference's blocks as one matrix, which is then inverted.
    matrix = torch.from_numpy(road_core.merge(torch.eye(OUT).double(), theta, alpha, variant="road_2", group_size=8))
    expected = torch.linalg.solve(matrix, merged)
    errors = model.unmerge_adapter()
    found = _bnb.dequantize(quantized).double()
    error = float((found - expected).norm() / expected.norm())
    assert errors == {"inner.proj": pytest.approx(error, rel=1e-3)}
    assert 0 < error < (0.02 if kind == "int8" else 0.15)
    assert float((found - plain).norm() / plain.norm()) < (0.05 if kind == "int8" else 0.3)
    torch.testing.assert_close(quantized.bias, bias)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_training_on_a_quantised_base(kind):
    inner, _ = make(kind, torch.float32)
    model = RoadModel(Model(inner), RoadConfig(target_modules=["proj"], group_size=8)).train()
    layer = next(m for m in model.modules() if isinstance(m, RoadLayer))
    target = torch.randn(4, 3, OUT)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert layer.road_theta["default"].abs().max().item() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_gradients_of_a_mixed_batch(kind, dtype):
    """They equal those of each adapter alone on its rows."""
    model = RoadModel(Model(make(kind, DTYPES[dtype])[0]))
    for name in "ab":
        torch.manual_seed(ord(name))
        model.add_adapter(name, RoadConfig(target_modules=["proj"], group_size=8, init_weights=False))
    x = X.to(DTYPES[dtype], copy=True).requires_grad_()
    weights = torch.from_numpy(named_values("y", 4, 3, OUT))

    def gradients(rows, **kwargs):
        model.zero_grad()
        x.grad = None
        (model(x, **kwargs).float() * weights)[rows].sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, x.grad

    model.set_adapter(["a", "b"])
    mixed, mixed_x = gradients([0, 1, 2, 3], adapter_names=["a", "__base__", "b", "a"])
    assert len(mixed) == 4
    for name, rows in {"a": [0, 3], "b": [2]}.items():
        model.set_adapter(name)
        alone, alone_x = gradients(rows)
        assert len(alone) == 2
        for key, expected in alone.items():
            assert expected.abs().max() > 0
            # The float32 sums have different lengths.
            torch.testing.assert_close(mixed[key], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(mixed_x[rows], alone_x[rows])


def test_counting_4_bit_parameters():
    inner, _ = make("nf4", torch.float32)
    model = RoadModel(Model(inner), RoadConfig(target_modules=["proj"], group_size=8))
    assert model.get_nb_trainable_parameters() == (OUT, IN * OUT + OUT + OUT)

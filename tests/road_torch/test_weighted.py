"""Adapters composed into one, against road_core's float64 reference applied in order."""

import numpy as np
import pytest
import torch
from _compare import assert_close, named_values
from _models import Net

import road_core
from road_torch import AdapterError, RoadConfig, RoadModel

IN, OUT = 16, 64
X = torch.from_numpy(named_values("x", 6, IN))


def road(**adapters):
    """Returns a model with adapters given as ``name=(variant, group_size, modules)``."""
    model = RoadModel(Net(IN, OUT))
    for name, (variant, size, targets) in adapters.items():
        model.add_adapter(
            name, RoadConfig(variant=variant, group_size=size, target_modules=targets, inference_mode=True)
        )
        for path in targets:
            layer = getattr(model.base_model, path)
            with torch.no_grad():
                n = len(layer.road_theta[name])
                layer.road_theta[name].copy_(torch.from_numpy(named_values(f"{name} {path} t", n, std=1.5)))
                # Scales of both signs, none near 0.
                alpha = named_values(f"{name} {path} a", n)
                layer.road_alpha[name].copy_(torch.from_numpy(alpha + np.where(alpha < -0.3, -0.4, 0.6)))
    return model


def reference(model, names):
    value, net = X.double(), Net(IN, OUT).double()
    for path in ("up", "down"):
        value, layer = getattr(net, path)(value).detach(), getattr(model.base_model, path)
        for name in names:
            if name in layer.road_theta:
                pair = layer.road_theta[name].detach(), layer.road_alpha[name].detach()
                config = model.peft_config[name]
                value = torch.from_numpy(
                    road_core.rotate(value, *pair, variant=config.variant, group_size=config.group_size)
                )
    return value


BOTH = ["up", "down"]
CASES = {
    "road_1": {"a": ("road_1", 8, BOTH), "b": ("road_1", 8, BOTH)},
    "road_1 elsewhere": {"a": ("road_1", 8, ["up"]), "b": ("road_1", 8, ["down"])},
    "road_2": {"a": ("road_2", 16, BOTH), "b": ("road_2", 16, BOTH)},
    "road_4": {"a": ("road_4", 2, BOTH), "b": ("road_4", 2, BOTH)},
    "mixed": {"a": ("road_4", 8, ["up"]), "b": ("road_1", 8, BOTH)},
    "mixed elsewhere": {"a": ("road_1", 8, ["up"]), "b": ("road_2", 8, ["down"])},
}


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0, 3), (1.0, 0.0)])
@pytest.mark.parametrize("case", CASES)
def test_whole_weights_are_repetitions(case, weights, tmp_path):
    model = road(**CASES[case])
    model.add_weighted_adapter(["a", "b"], list(weights), "sum")
    assert model.adapter_names == ["a", "b", "sum"]
    assert model.active_adapter == "a"
    assert model.peft_config["sum"].variant == max(variant for variant, _, _ in CASES[case].values())
    names = ["a"] * int(weights[0]) + ["b"] * int(weights[1])
    expected = reference(model, names)
    model.set_adapter("sum")
    given = model(X).detach()
    assert_close(given, expected, "float32", moved_from=Net(IN, OUT)(X).detach())
    model.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    again = RoadModel.from_pretrained(Net(IN, OUT), tmp_path / "saved" / "sum")
    assert torch.equal(again(X), given)


@pytest.mark.parametrize("case", CASES)
def test_order_counts_as_given(case):
    model = road(**CASES[case])
    model.add_weighted_adapter(["b", "a"], [1, 1], "sum")
    model.set_adapter("sum")
    assert_close(model(X).detach(), reference(model, ["b", "a"]), "float32")


@pytest.mark.parametrize("case", CASES)
def test_a_weight_of_minus_1_undoes(case):
    model = road(**CASES[case])
    model.add_weighted_adapter(["a", "b", "b", "a"], [1, 1, -1, -1], "none")
    model.set_adapter("none")
    np.testing.assert_allclose(model(X).detach(), Net(IN, OUT)(X).detach(), atol=2e-4)


def test_real_weights_are_the_powers_of_complex_numbers():
    model = road(a=("road_1", 8, ["up"]), b=("road_1", 8, ["up"]))
    layer = model.base_model.up
    with torch.no_grad():
        # NumPy computes principal powers, which need angles within (-π, π].
        for name in "ab":
            layer.road_theta[name].clamp_(-1.5, 1.5)
            layer.road_alpha[name].abs_()
    weights = (0.3, 1.7)
    model.add_weighted_adapter(["a", "b"], weights, "sum")
    numbers = [
        (layer.road_alpha[n].double() * torch.exp(1j * layer.road_theta[n].double())).detach().numpy() for n in "ab"
    ]
    expected = numbers[0] ** weights[0] * numbers[1] ** weights[1]
    given = (layer.road_alpha["sum"].double() * torch.exp(1j * layer.road_theta["sum"].double())).detach().numpy()
    np.testing.assert_allclose(given, expected, rtol=1e-6)


def test_half_twice_is_whole():
    model = road(a=("road_1", 8, BOTH))
    for path in BOTH:
        getattr(model.base_model, path).road_alpha["a"].data.abs_()
    model.add_weighted_adapter(["a"], [0.5], "by_half")
    model.add_weighted_adapter(["by_half"], [2], "whole")
    model.set_adapter("whole")
    assert_close(model(X).detach(), reference(model, ["a"]), "float32", moved_from=reference(model, ["by_half"]))


def singular(model):
    with torch.no_grad():
        model.base_model.up.road_alpha["a"][3] = 0.0


REFUSED = {
    "unknown": (lambda m: m.add_weighted_adapter(["a", "z"], [1, 1], "sum"), "found 'z'"),
    "number": (lambda m: m.add_weighted_adapter(["a", "b"], [1], "sum"), "each of 2 adapters, found 1"),
    "none": (lambda m: m.add_weighted_adapter([], [], "sum"), "at least one adapter"),
    "name": (lambda m: m.add_weighted_adapter(["a"], [1], "b"), "a new name, found 'b'"),
    "nan": (lambda m: m.add_weighted_adapter(["a"], [float("nan")], "sum"), "finite numbers, found nan"),
    "size": (
        lambda m: m.add_weighted_adapter(["a", "b"], [1, 1], "sum"),
        "one group size, found 8 in 'a' and 16 in 'b'",
    ),
    "power": (
        lambda m: m.add_weighted_adapter(["c"], [0.5], "sum"),
        "up: expected blocks with a real power for weight",
    ),
    "negative": (lambda m: m.add_weighted_adapter(["a"], [0.5], "sum"), "up: expected positive scales for weight 0.5"),
    "inverse": (
        lambda m: singular(m) or m.add_weighted_adapter(["a"], [-1], "sum"),
        "up: expected scales that have an",
    ),
    "inverse 2": (
        lambda m: m.base_model.up.road_alpha["c"].data.zero_() is None or m.add_weighted_adapter(["c"], [-1], "sum"),
        "up: expected blocks that have an inverse",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model = road(a=("road_1", 8, BOTH), b=("road_1", 16, ["up"]), c=("road_2", 8, ["up"]))
    call, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert model.adapter_names == ["a", "b", "c"]
    assert list(model.base_model.up.road_theta) == ["a", "b", "c"]

import numpy as np
import pytest
import torch
from _compare import assert_close, named_values
from peft import RoadConfig as PeftRoadConfig
from peft import get_peft_model

import road_core
from road_core import AdapterError

VARIANTS = ["road_1", "road_2", "road_4"]
GROUP_SIZES = [2, 8, 64]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 128, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture(params=[(v, g) for v in VARIANTS for g in GROUP_SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    """A plain layer, the layer as PEFT adapted it, and the reference's arguments."""
    variant, group_size = request.param
    torch.manual_seed(0)
    net = Net()
    bare = (net.linear.weight.detach().numpy().copy(), net.linear.bias.detach().numpy().copy())
    config = PeftRoadConfig(variant=variant, group_size=group_size, init_weights=False, target_modules=["linear"])
    peft = get_peft_model(net, config).double()
    layer = peft.base_model.model.linear
    theta, alpha = (p["default"].detach().numpy() for p in (layer.road_theta, layer.road_alpha))
    return bare, peft, {"theta": theta, "alpha": alpha, "variant": variant, "group_size": group_size}


def test_rotate_is_pefts_function(case):
    (weight, bias), peft, arguments = case
    x = named_values("x", 3, 5, 16).astype(np.float64)
    y = x @ weight.T + bias
    expected = peft(torch.from_numpy(x)).detach().numpy()
    assert_close(road_core.rotate(y, **arguments), expected, "float64", moved_from=y)


def test_merge_is_pefts_weight_and_unmerge_undoes_it(case):
    (weight, bias), peft, arguments = case
    peft.merge_adapter()
    layer = peft.base_model.model.linear.base_layer
    for bare, merged in ((weight, layer.weight), (bias, layer.bias)):
        ours = road_core.merge(bare, **arguments)
        assert_close(ours, merged.detach().numpy(), "float64", moved_from=bare)
        np.testing.assert_allclose(road_core.unmerge(ours, **arguments), bare, rtol=1e-9, atol=1e-9)


def test_stacked_parameters_are_layers_side_by_side():
    theta, alpha = named_values("t", 4, 64), named_values("a", 4, 64)
    first, second = road_core.coefficients(theta, alpha, variant="road_1", group_size=8)
    for layer in range(4):
        one = road_core.coefficients(theta[layer], alpha[layer], variant="road_1", group_size=8)
        np.testing.assert_array_equal((first[layer], second[layer]), one)


def test_group_size_2_is_the_papers_pairing_of_neighbours():
    y, theta, alpha = named_values("y", 8), named_values("t", 4), named_values("a", 4)
    pairs = y.astype(np.float64).reshape(4, 2)
    number = (pairs[:, 0] + 1j * pairs[:, 1]) * alpha * np.exp(1j * theta.astype(np.float64))
    expected = np.stack([number.real, number.imag], axis=-1).reshape(8)
    assert_close(road_core.rotate(y, theta, alpha, variant="road_1", group_size=2), expected, "float64", moved_from=y)


def test_identity_at_the_start():
    y = named_values("y", 3, 64)
    for variant in VARIANTS:
        size = road_core.parameter_size(variant, 64)
        assert road_core.output_size(variant, size) == 64
        same = road_core.rotate(y, np.zeros(size), np.ones(size), variant=variant, group_size=8)
        np.testing.assert_array_equal(same, y.astype(np.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: road_core.rotate(np.ones(6), np.ones(4), np.ones(4), variant="road_1", group_size=8),
            "last axis of 8",
        ),
        (lambda: road_core.coefficients(np.ones(6), np.ones(6), variant="road_1", group_size=8), "found 12"),
        (lambda: road_core.coefficients(np.ones(8), np.ones(4), variant="road_1", group_size=8), "shape of theta"),
        (lambda: road_core.parameter_size("road_3", 8), "road_3"),
        (lambda: road_core.check_group_size(100, 64, "model.q_proj"), r"model\.q_proj.*64 divides, found 100"),
        (lambda: road_core.check_group_size(9, 3, "a"), "a: expected an even group_size from 2 up, found 3"),
        (lambda: road_core.check_group_size(8, 0, "a"), "a: expected an even group_size from 2 up, found 0"),
        (
            lambda: road_core.unmerge(np.ones(4), np.ones(2), np.array([1.0, 0.0]), variant="road_1", group_size=2),
            "block 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(AdapterError, match=message):
        call()

"""The rotation's kernels and its op, against road_core's float64 reference."""

import pytest
import torch
from _compare import assert_close, named_values
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import road_core
from road_torch import _ops
from road_torch._kernels import default

VARIANTS = ("road_1", "road_2", "road_4")
OUT = 128


def parameters(variant, out=OUT):
    size = road_core.parameter_size(variant, out)
    return named_values("theta", size), named_values("alpha", size, mean=1.0)


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(OUT,), (3, OUT), (2, 5, OUT), (40, 16, OUT)])
def test_rotate_against_the_reference(shape, dtype, variant, group_size):
    theta, alpha = parameters(variant)
    y = torch.from_numpy(named_values("y", *shape)).to(getattr(torch, dtype))
    expected = road_core.rotate(y.double(), theta, alpha, variant=variant, group_size=group_size)
    first, cross = default.coefficients(torch.from_numpy(theta), torch.from_numpy(alpha), variant, group_size)
    assert first.dtype == cross.dtype == torch.float32
    first, cross = first.to(y.dtype), cross.to(y.dtype)
    before = y.clone()
    given = default.rotate(y, first, cross, group_size)
    assert given.dtype == y.dtype
    assert_close(given.double(), expected, dtype, moved_from=y.double())
    assert torch.equal(y, before)
    prepared = default.prepare_(first, cross, group_size, torch.empty_like(y))
    for in_place in (lambda y: default.rotate_(y, first, cross, group_size), prepared):
        over = before.clone()
        assert in_place(over) is over
        assert torch.equal(over, given)


def test_fake_tensors_leave_nothing_behind():
    default._swap.cache_clear()
    table = [torch.from_numpy(named_values(name, OUT)) for name in ("first", "cross")]
    y = torch.from_numpy(named_values("y", 3, OUT))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(default.rotate_(mode.from_tensor(y), *table, 8), FakeTensor)
    expected = default.rotate(y, *table, 8)
    assert torch.equal(default.rotate_(y, *table, 8), expected)


def test_a_row_of_a_batch_has_its_own_coefficients():
    y = torch.from_numpy(named_values("y", 3, 5, OUT))
    sets = [[named_values(f"{name}{i}", OUT) for name in ("theta", "alpha")] for i in range(3)]
    pairs = [default.coefficients(*map(torch.from_numpy, pair), "road_2", 8) for pair in sets]
    first, cross = (torch.stack(tables)[:, None] for tables in zip(*pairs, strict=True))
    given = default.rotate(y, first, cross, 8)
    for row, (theta, alpha) in enumerate(sets):
        expected = road_core.rotate(y[row], theta, alpha, variant="road_2", group_size=8)
        assert_close(given[row], expected, "float32", moved_from=y[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1, 3 * OUT, 5 * OUT + 1, 1000 * OUT])
@pytest.mark.parametrize("shape", [(5, OUT), (4, 3, OUT), (2, 7, 3, OUT)])
def test_an_output_of_many_bytes_is_rotated_in_parts(shape, part, dtype, monkeypatch):
    monkeypatch.setattr(default, "PART", part)
    y = torch.from_numpy(named_values("y", *shape)).to(dtype)
    theta, alpha = (torch.from_numpy(named_values(name, 3, OUT // 2)) for name in ("theta", "alpha"))
    table = default.coefficients(theta, alpha, "road_1", 8)
    index = torch.arange(shape[0]) % 3
    for first, cross, rows in ((*table, index), (table[0][1], table[1][1], None), (*table, index[1:2])):
        expected = default.rotate_(y.clone(), first, cross, 8, rows)
        with monkeypatch.context() as limits:
            limits.setattr(default, "HUGE", y.nbytes)
            given = y.clone()
            assert default.rotate_(given, first, cross, 8, rows) is given
        assert torch.equal(given, expected)


@pytest.mark.parametrize("group_size", [2, 64])
def test_compose(group_size):
    y = torch.from_numpy(named_values("y", 4, OUT)).double()
    one, two = (
        default.coefficients(*(torch.from_numpy(named_values(f"{n}{i}", 2 * OUT)) for n in "ta"), "road_4", group_size)
        for i in range(2)
    )
    one, two = (tuple(v.double() for v in pair) for pair in (one, two))
    expected = default.rotate(default.rotate(y, *one, group_size), *two, group_size)
    both = default.compose(one, two, group_size)
    assert_close(default.rotate(y, *both, group_size), expected, "float64", moved_from=y)


INDICES = {"one for all": None, "rows": None, "table": [2, 0], "a table's row": [1]}


def make(kind, dtype=torch.float32, wide=torch.float32):
    """Returns ``y`` with two rows, coefficients of this kind, and the index if they are a table."""
    torch.manual_seed(0)
    lead = {"one for all": (), "rows": (2, 1)}.get(kind, (4,))
    y = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    first, cross = (torch.randn(*lead, 16, dtype=wide, requires_grad=True) for _ in range(2))
    return y, first, cross, INDICES[kind] and torch.tensor(INDICES[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", INDICES)
def test_opcheck(kind, dtype):
    y, first, cross, index = make(kind, dtype)
    torch.library.opcheck(torch.ops.road.rotate.default, (y, first, cross, 8, index))


@pytest.mark.parametrize("kind", INDICES)
def test_gradients(kind):
    y, first, cross, index = make(kind, torch.float64, torch.float64)
    g = torch.randn(y.shape, dtype=torch.float64)
    leaves = y, first, cross
    given = torch.autograd.grad((_ops.rotate(*leaves, 4, index) * g).sum(), leaves)
    expected = torch.autograd.grad((default.rotate(*leaves, 4, index) * g).sum(), leaves)
    for a, b in zip(given, expected, strict=True):
        # Gradients are summed over rows in float32.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_in_bfloat16_reach_float32_coefficients():
    y = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    first, cross = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    out = _ops.rotate(y, first, cross, 8)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert first.grad.dtype == torch.float32
    torch.testing.assert_close(first.grad, y.float().sum(0))
    assert y.grad.dtype == torch.bfloat16

"""Mixtures of experts: which token goes where, products block by block, and what they cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from _hlo import collectives
from _models import small_checkpoint
from flax.traverse_util import flatten_dict, unflatten_dict

import road_jax
from road_core import AdapterError, RoadConfig
from road_jax import models
from road_jax._quantize import dequantize, quantize
from road_jax.models import _experts

IDS = np.random.default_rng(0).integers(6, 160, (8, 12)).astype(np.int32)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("bases") / "qwen2_moe", "qwen2_moe")


def adapted(module, variables, **fields):
    road = road_jax.transform(module, RoadConfig(target_modules="all-linear", group_size=8, **fields))
    return road, road.init(jax.random.key(1), variables, IDS)


@pytest.mark.parametrize(
    ("tokens", "count", "choices"), [(1, 1, 1), (1, 8, 2), (7, 3, 3), (40, 40, 1), (300, 5, 2), (2000, 3, 2)]
)
def test_each_choice_has_a_row_of_its_own_in_a_block_of_its_expert(tokens, count, choices):
    rng = np.random.default_rng(0)
    # Some experts are preferred, and some get no token.
    scores = rng.normal(size=(tokens, count)) + np.linspace(0, 4, count)
    chosen = np.argsort(-scores, axis=1)[:, :choices].astype(np.int32)
    held, places, order = jax.tree.map(np.asarray, _experts.plan(jnp.asarray(chosen), count))
    blocks, rows = held.shape
    np.testing.assert_array_equal(held.ravel()[places].ravel(), np.arange(tokens * choices))
    # All other rows are empty.
    assert (held < tokens * choices).sum() == tokens * choices
    assert np.all(order.starts[chosen] * rows <= places)
    assert np.all(places < order.ends[chosen] * rows)
    sizes = np.bincount(chosen.ravel(), minlength=count)
    np.testing.assert_array_equal(order.ends - order.starts, -(-sizes // rows))
    assert order.ends[-1] <= blocks
    assert sorted(order.busy) == list(range(count))
    np.testing.assert_array_equal(np.sort(order.busy[: order.used]), np.flatnonzero(sizes))


def test_spreading_and_collecting():
    chosen = jnp.asarray([[0, 2], [2, 1], [0, 1], [0, 2]], jnp.int32)
    made = _experts.plan(chosen, 4)
    x = jnp.asarray(named_values("x", 4, 16))

    def through(x):
        blocks = _experts.spread(x, made)
        # Each row of a block is changed in its own way.
        return jnp.sin(blocks + jnp.arange(blocks.size, dtype=jnp.float32).reshape(blocks.shape))

    def found(x):
        return _experts.collect(through(x), made)

    def expected(x):
        # The same with gradients as JAX derives them.
        blocks = x.at[made.choices // 2].get(mode="fill", fill_value=0)
        turned = jnp.sin(blocks + jnp.arange(blocks.size, dtype=jnp.float32).reshape(blocks.shape))
        return turned.reshape(-1, 16)[made.places]

    np.testing.assert_array_equal(found(x), expected(x))
    np.testing.assert_array_equal(_experts.collect(_experts.spread(x, made), made), jnp.repeat(x[:, None], 2, axis=1))
    weights = jnp.asarray(named_values("weights", 4, 2, 16))
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (found, expected))
    assert_close(ours, theirs, "float32")


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_products_and_their_gradients(kind):
    kernel = jnp.asarray(named_values("kernel", 3, 128, 64))
    x = jnp.asarray(named_values("x", 5, 8, 128))
    # The second of three experts has no token, and the last block is nobody's.
    order = _experts.Order(*(jnp.asarray(each, jnp.int32) for each in ([0, 1, 1], [1, 1, 4], [0, 2, 1], 2)))
    experts = jnp.asarray([0, 2, 2, 2, 1])
    plain = kernel
    if kind is not None:
        kernel = quantize({"params": {"layer": {"kernel": kernel}}}, kind)["params"]["layer"]["kernel"]
        plain = kernel.dequantize()

    def found(x, kernel):
        return _experts.products(x, kernel, order)

    def expected(x, kernel):
        y = jnp.einsum("bri,bio->bro", x, kernel[experts])
        return jnp.where(jnp.arange(5)[:, None, None] < 4, y, 0)

    assert_close(found(x, kernel), expected(x, plain), "float32")

    def loss(function):
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    which = (0, 1) if kind is None else (0,)
    for ours, theirs in zip(
        jax.jit(jax.grad(loss(found), which))(x, kernel), jax.grad(loss(expected), which)(x, plain), strict=True
    ):
        assert_close(ours, theirs, "float32")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_experts_in_codes(kind, scan, checkpoint):
    module, variables = models.load(checkpoint, quantize=kind, scan=scan)
    layers = variables["params"]["model"]["layers"]
    kernel = (layers if scan else layers["1"])["mlp"]["experts"]["down_proj"]["kernel"]
    assert kernel.codes.shape == ((3,) if scan else ()) + (6, 128, 32 if kind == "nf4" else 64)
    road, adapter = adapted(module, variables, init_weights=False)
    plain = dequantize(variables)
    assert_close(road.apply(variables, adapter, IDS), road.apply(plain, adapter, IDS), "float32")
    _, whole = models.load(checkpoint, scan=scan)
    codes, weights = (flatten_dict(of["params"]) for of in (plain, whole))
    experts = [path for path in codes if "experts" in path]
    assert len(experts) == (3 if scan else 9)
    for path in experts:
        error = np.abs(codes[path] - weights[path]).mean() / np.abs(weights[path]).mean()
        assert 1e-3 < error < (0.12 if kind == "nf4" else 0.02)


def test_no_gradient_of_an_experts_kernel_is_computed(checkpoint):
    def loops(remat, which):
        module, variables = models.load(checkpoint, remat=remat)
        road, adapter = adapted(module, variables)
        leaves = flatten_dict(variables)
        experts = {path: leaf for path, leaf in leaves.items() if "experts" in path}

        def loss(adapter, experts):
            return jnp.sum(jnp.square(road.apply(unflatten_dict({**leaves, **experts}), adapter, IDS)))

        program = jax.jit(jax.grad(loss, which)).lower(adapter, experts).compile().as_text()
        return len(re.findall(r" while\(", program))

    found = {remat: loops(remat, (0,)) for remat in ("linears", "full")}
    # Each product is two loops, and so are the kernels' gradients.
    assert {remat: loops(remat, (0, 1)) - found[remat] for remat in found} == {"linears": 6, "full": 6}
    # Products are kept like those of linear layers, or else computed twice.
    assert found["linears"] == found["full"] - 6


def test_tokens_stay_on_their_device(checkpoint, tmp_path):
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def counted(checkpoint):
        module, variables = models.load(checkpoint, mesh=mesh)
        road, adapter = adapted(module.copy(mesh=mesh), variables)
        return collectives(jax.jit(road.apply), variables, adapter, IDS)

    more = counted(checkpoint)
    more.subtract(counted(small_checkpoint(tmp_path, "qwen2")))
    # Three kernels more are gathered over fsdp. The sum over the shares of a width is joined to the shared expert's.
    assert {kind: count for kind, count in more.items() if count} == {"all-gather": 3}


@pytest.mark.parametrize("rows", [8, 3])
def test_codes_in_shares(rows, checkpoint):
    """Also for a batch that can't be cut into equal shares."""
    module, variables = models.load(checkpoint, quantize="int8")
    road, adapter = adapted(module, variables, init_weights=False)
    expected = road.apply(variables, adapter, IDS[:rows])
    mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    module, variables = models.load(checkpoint, quantize="int8", mesh=mesh)
    road = road_jax.transform(module.copy(mesh=mesh), road.config)
    assert_close(jax.jit(road.apply)(variables, adapter, IDS[:rows]), expected, "float32")


def test_blocks_that_a_mesh_cuts_are_refused(checkpoint):
    mesh = models.make_mesh({"data": 4, "tensor": 2})
    module, variables = models.load(checkpoint, quantize="nf4", mesh=mesh)
    road, adapter = adapted(module.copy(mesh=mesh), variables)
    said = r"experts\.down_proj: expected an axis tensor that cuts 64 inputs into whole blocks of 64, found tensor=2"
    with pytest.raises(AdapterError, match=said):
        jax.eval_shape(road.apply, variables, adapter, IDS)

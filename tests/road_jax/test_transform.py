import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compare import assert_close, named_values
from flax import errors, nnx
from flax import linen as nn
from jax import export
from jax.sharding import PartitionSpec as P

import road_core
import road_jax
from road_core import AdapterError, RoadConfig

VARIANTS = ["road_1", "road_2", "road_4"]
GROUP_SIZES = [2, 8, 64]
LAYERS, WIDTH = 3, 64


class Block(nn.Module):
    """A pre-activation residual block, the body of every stack below."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(128, name="up")(x))), None


class Stack(nn.Module):
    """The same blocks in a loop, under scan, or under scan and remat; params on either axis."""

    how: str = "loop"

    @nn.compact
    def __call__(self, x):
        if self.how == "loop":
            for i in range(LAYERS):
                x, _ = Block(name=f"blocks_{i}")(x)
        else:
            body = nn.remat(Block) if "remat" in self.how else Block
            axis = 1 if "axis1" in self.how else 0
            scan = nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS)
            x, _ = scan(name="blocks")(x, None)
        return nn.Dense(10, name="lm_head")(x)


def stacked(leaves_of_layers, axis):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *leaves_of_layers)


def with_values(adapter):
    """Fills an adapter with values that depend on their path."""

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name)))

    return jax.tree_util.tree_map_with_path(fill, adapter)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(named_values("x", 2, 5, WIDTH))


@pytest.fixture(scope="module")
def loop(x):
    """An adapted loop; everything else is compared with it, and it is compared with the reference."""
    model = Stack()
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    return road, variables, with_values(road.init(jax.random.key(1), variables, x))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_gives_the_references_rotation(variant, group_size, x):
    model = nn.Dense(128)
    variables = {"params": {"kernel": jnp.asarray(named_values("k", WIDTH, 128)), "bias": jnp.ones(128)}}
    config = RoadConfig(variant=variant, group_size=group_size, target_modules=r".*")
    road = road_jax.transform(nn.Sequential([model]), config)
    variables = {"params": {"layers_0": variables["params"]}}
    adapter = with_values(road.init(jax.random.key(0), variables, x))
    theta, alpha = (np.asarray(adapter["layers_0"][n]) for n in ("road_theta", "road_alpha"))
    assert theta.shape == (road_core.parameter_size(variant, 128),)
    bare = np.asarray(x, np.float64) @ np.asarray(variables["params"]["layers_0"]["kernel"], np.float64) + 1
    expected = road_core.rotate(bare, theta, alpha, variant=variant, group_size=group_size)
    assert_close(road.apply(variables, adapter, x), expected, "float32", moved_from=bare)
    assert_close(jax.jit(road.apply)(variables, adapter, x), expected, "float32")
    merged = road.merge(variables, adapter)
    assert_close(road.model.apply(merged, x), expected, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_keeps_the_layers_dtype(dtype, x):
    model = nn.Sequential([nn.Dense(128, dtype=dtype, param_dtype=dtype)])
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules=r".*", group_size=64))
    adapter = with_values(road.init(jax.random.key(0), variables, x))
    bare, turned = model.apply(variables, x), road.apply(variables, adapter, x)
    assert turned.dtype == bare.dtype == jnp.dtype(dtype)
    arrays = (np.asarray(adapter["layers_0"][n]) for n in ("road_theta", "road_alpha"))
    expected = road_core.rotate(bare.astype(jnp.float32), *arrays, variant="road_1", group_size=64)
    assert_close(turned.astype(jnp.float32), expected, dtype, moved_from=bare.astype(jnp.float32))


def test_a_fresh_adapter_changes_nothing_and_mirrors_params(x, loop):
    road, variables, _ = loop
    adapter = road.init(jax.random.key(1), variables, x)
    assert sorted(adapter) == ["blocks_0", "blocks_1", "blocks_2"]
    assert jax.tree.map(jnp.shape, adapter["blocks_1"]["up"]) == {"road_theta": (64,), "road_alpha": (64,)}
    np.testing.assert_array_equal(road.apply(variables, adapter, x), road.model.apply(variables, x))


def test_init_weights_false_draws_by_path(x, loop):
    road, variables, _ = loop
    noisy = road_jax.transform(road.model, RoadConfig(target_modules=["up"], group_size=8, init_weights=False))
    one, other = (noisy.init(jax.random.key(seed), variables, x) for seed in (1, 2))
    same = noisy.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, variables, x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, same))
    assert not any(jax.tree.leaves(jax.tree.map(jnp.array_equal, one, other)))
    alphas = np.concatenate([one[f"blocks_{i}"]["up"]["road_alpha"] for i in range(LAYERS)])
    assert abs(alphas.mean() - 1) < 0.15
    assert abs(alphas.std() - 0.5) < 0.1
    with pytest.raises(AdapterError, match="rng: expected a key for 'params', found keys for dropout"):
        noisy.init({"dropout": jax.random.key(1)}, variables, x)


@pytest.mark.parametrize("how", ["scan", "scan-remat", "scan-axis1", "scan-axis1-remat"])
def test_a_scanned_stack_is_the_loop(how, x, loop):
    road, variables, adapter = loop
    axis = 1 if "axis1" in how else 0
    scanned = road_jax.transform(Stack(how), road.config)
    blocks = [variables["params"][f"blocks_{i}"] for i in range(LAYERS)]
    base = {"params": {"lm_head": variables["params"]["lm_head"], "blocks": stacked(blocks, axis)}}
    laid = {"blocks": stacked([adapter[f"blocks_{i}"] for i in range(LAYERS)], axis)}
    fresh = scanned.init(jax.random.key(1), base, x)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, laid)

    expected = road.apply(variables, adapter, x)
    assert_close(scanned.apply(base, laid, x), expected, "float32", moved_from=road.model.apply(variables, x))
    assert_close(scanned.model.apply(scanned.merge(base, laid), x), expected, "float32")

    def loss(adapter, road, variables):
        return jnp.sum(jnp.square(road.apply(variables, adapter, x)))

    slow = jax.grad(loss)(adapter, road, variables)
    fast = jax.jit(jax.grad(loss), static_argnums=1)(laid, scanned, base)
    for i in range(LAYERS):
        for layer in ("up", "down"):
            for leaf, gradient in slow[f"blocks_{i}"][layer].items():
                assert_close(jnp.take(fast["blocks"][layer][leaf], i, axis), gradient, "float32")


@pytest.mark.no_leaks
def test_gradients_are_those_of_the_reference(x):
    """Compared with finite differences of the float64 reference, through one layer."""
    rng = np.random.default_rng(0)
    y, weight = rng.normal(size=(7, 16)), rng.normal(size=(7, 16))
    for variant in VARIANTS:
        size = road_core.parameter_size(variant, 16)
        theta, alpha = rng.normal(size=size), rng.normal(1, 0.5, size)

        def reference(v, variant=variant, size=size, weight=weight):
            y, theta, alpha = v[: 7 * 16].reshape(7, 16), v[7 * 16 : -size], v[-size:]
            return float((road_core.rotate(y, theta, alpha, variant=variant, group_size=8) * weight).sum())

        point = np.concatenate([y.ravel(), theta, alpha])
        steps = np.eye(point.size) * 1e-6
        expected = np.array([(reference(point + s) - reference(point - s)) / 2e-6 for s in steps])

        def ours(y, theta, alpha, variant=variant, weight=weight):
            turned = road_jax.rotate(y, theta, alpha, variant=variant, group_size=8)
            return jnp.sum(turned * jnp.asarray(weight, jnp.float32))

        arguments = [jnp.asarray(v, jnp.float32) for v in (y, theta, alpha)]
        found = jax.grad(ours, argnums=(0, 1, 2))(*arguments)
        assert_close(np.concatenate([np.ravel(g) for g in found]), expected, "float32", moved_from=np.zeros(point.size))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_complex_layers(variant):
    """θ and α are real; their gradients match finite differences in float64."""
    rng = np.random.default_rng(0)
    model = nn.Dense(16, param_dtype=jnp.complex64)
    x = jnp.asarray(rng.normal(size=(7, 4)) + 1j * rng.normal(size=(7, 4)), jnp.complex64)
    weight = rng.normal(size=(7, 16)) + 1j * rng.normal(size=(7, 16))
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(variant=variant, target_modules="all-linear", group_size=8))
    adapter = with_values(road.init(jax.random.key(0), variables, x))
    y = np.asarray(x, np.complex128) @ np.asarray(variables["params"]["kernel"], np.complex128)
    y = y + np.asarray(variables["params"]["bias"])
    theta, alpha = (np.asarray(adapter[name], np.float64) for name in ("road_theta", "road_alpha"))

    def reference(theta, alpha):
        parts = (road_core.rotate(part, theta, alpha, variant=variant, group_size=8) for part in (y.real, y.imag))
        real, imaginary = parts
        return float(np.sum(np.abs(real + 1j * imaginary - weight) ** 2))

    steps = np.eye(theta.size) * 1e-6
    expected = {
        "road_theta": [(reference(theta + s, alpha) - reference(theta - s, alpha)) / 2e-6 for s in steps],
        "road_alpha": [(reference(theta, alpha + s) - reference(theta, alpha - s)) / 2e-6 for s in steps],
    }

    def loss(adapter, **ids):
        turned = road.apply(variables, adapter, x, **ids)
        return jnp.sum(jnp.square(jnp.abs(turned - jnp.asarray(weight, jnp.complex64))))

    found = jax.grad(loss)(adapter)
    several = jax.grad(loss)(road_jax.stack_adapters([adapter]), adapter_ids=[1] * 7)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, "float32", moved_from=np.zeros_like(gradient))
        assert_close(several[name][:, 1], gradient, "float32")


@pytest.mark.parametrize("ids", [None, [1, 0]], ids=["one", "several"])
@pytest.mark.parametrize("how", ["loop", "scan", "scan-remat"])
def test_second_derivatives(how, ids, x, loop):
    """Second derivatives along one direction of the adapter, against finite differences of the first ones."""
    road, variables, adapter = loop
    if how != "loop":
        road = road_jax.transform(Stack(how), road.config)
        blocks = [variables["params"][f"blocks_{i}"] for i in range(LAYERS)]
        head = variables["params"]["lm_head"]
        variables = {"params": {"lm_head": head, "blocks": stacked(blocks, 0)}}
        adapter = {"blocks": stacked([adapter[f"blocks_{i}"] for i in range(LAYERS)], 0)}
    with jax.enable_x64(True):
        x, variables, adapter = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, variables, adapter))
        options = {}
        if ids is not None:
            options = {"adapter_ids": np.asarray(ids)}
            adapter = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], -1), adapter)

        def slope(adapter):
            gradient = jax.grad(lambda a: jnp.mean(jnp.sin(road.apply(variables, a, x, **options))))(adapter)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

        direction = jax.tree.map(jnp.cos, adapter)
        ahead, behind = (jax.tree.map(lambda a, d, s=s: a + s * d, adapter, direction) for s in (1e-5, -1e-5))
        expected = (jax.jit(slope)(ahead) - jax.jit(slope)(behind)) / 2e-5
        found = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.jit(jax.grad(slope))(adapter), direction)
        assert_close(sum(jax.tree.leaves(found)), expected, "float32", moved_from=0)


@pytest.mark.parametrize("how", ["explicit", "shard_map around", "shard_map within"])
def test_gradients_on_a_mesh_are_those_without(how):
    """Rows split over eight devices: with axes in the arrays' types, and in ``shard_map``, which checks what varies."""
    x = jnp.asarray(named_values("x", 8, 3, WIDTH))
    model = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(16)])
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = with_values(road.init(jax.random.key(1), variables, x))

    def loss(adapter, variables, x):
        return jnp.mean(jnp.sin(road.apply(variables, adapter, x)))

    def mean(*args):
        return jax.lax.pmean(loss(*args), "data")

    expected = jax.grad(loss)(adapter, variables, x)
    mesh = jax.make_mesh((8,), ("data",))
    # With its leak check on, JAX 0.10 refuses any gradient of a shard_map within jit, even that of a plain product.
    unchecked = jax.check_tracer_leaks(False) if how == "shard_map around" else contextlib.nullcontext()
    with jax.set_mesh(mesh), unchecked:
        placed = jax.device_put((adapter, variables), P()), jax.device_put(x, P("data"))
        specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
        if how == "explicit":
            gradient = jax.grad(loss)
        elif how == "shard_map around":
            gradient = jax.grad(jax.shard_map(mean, **specs))
        else:
            gradient = jax.shard_map(jax.grad(mean), **specs)
        found = jax.jit(gradient)(*placed[0], placed[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(a), b, "float32", moved_from=np.zeros_like(b))


@pytest.mark.parametrize("place", [P("model"), P()], ids=["in shards", "whole"])
def test_outputs_sharded_by_type_have_gradients(place):
    y, theta = jnp.asarray(named_values("y", 4, 6, 64)), jnp.asarray(named_values("theta", 32))

    def loss(theta, y):
        return jnp.sum(jnp.square(road_jax.rotate(y, theta, theta + 1, variant="road_1", group_size=8)))

    expected = jax.grad(loss)(theta, y)
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):
        placed = jax.device_put(theta, place), jax.device_put(y, P("data", None, "model"))
        found = jax.jit(jax.grad(loss))(*placed)
    assert found.sharding.is_equivalent_to(placed[0].sharding, 1)
    assert_close(np.asarray(found), expected, "float32", moved_from=np.zeros(32))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_have_no_gradient(shape):
    def loss(theta):
        return jnp.sum(road_jax.rotate(jnp.ones(shape), theta, theta, variant="road_1", group_size=8))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(8)), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_without_rows_gives_none(variant, x, loop):
    road, variables, _ = loop
    road = road_jax.transform(road.model, RoadConfig(variant=variant, target_modules="all-linear", group_size=8))
    adapter = with_values(road.init(jax.random.key(1), variables, x))
    for empty in (x[:0], x[:, :0]):
        assert road.apply(variables, adapter, empty).shape == road.model.apply(variables, empty).shape
        gradient = jax.grad(lambda a, e=empty: jnp.sum(road.apply(variables, a, e)))(adapter)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("symbols", ["batch, 5, 64", "batch, length, 64"])
def test_the_gradient_of_a_batch_of_any_size_is_exported(symbols, x, loop):
    road, variables, adapter = loop

    def loss(adapter, x):
        return jnp.sum(jnp.sin(road.apply(variables, adapter, x)))

    shape = jax.ShapeDtypeStruct(export.symbolic_shape(symbols), jnp.float32)
    found = export.export(jax.jit(jax.grad(loss)))(adapter, shape).call(adapter, x)
    expected = jax.jit(jax.grad(loss))(adapter, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, "float32", moved_from=np.zeros_like(b))


def test_a_rotation_that_does_not_fit_is_refused():
    y, theta = jnp.ones((2, 16)), jnp.zeros(8)
    with pytest.raises(
        AdapterError, match=r"rotate\.road_theta: expected \[16\] for road_2 on 16 outputs, found \[8\]"
    ):
        road_jax.rotate(y, theta, theta, variant="road_2", group_size=8)
    with pytest.raises(AdapterError, match="theta: expected an array of floating-point numbers, found int32"):
        road_jax.rotate(y, theta.astype(int), theta, variant="road_1", group_size=8)
    with pytest.raises(AdapterError, match=r"expected one axis and one shape, found \[8\] and \[4\]"):
        road_jax.rotate(y, theta, theta[:4], variant="road_1", group_size=8)


def test_the_gradient_computes_no_kernel_gradient(x):
    model = Stack()
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=8))
    adapter = road.init(jax.random.key(1), variables, x)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    forward = flops(lambda a: jnp.sum(road.apply(variables, a, x)), adapter)
    backward = flops(jax.grad(lambda a: jnp.sum(road.apply(variables, a, x))), adapter)
    full = flops(jax.grad(lambda v: jnp.sum(model.apply(v, x))), variables)
    assert backward < 2.3 * forward
    assert backward < 0.9 * full


@pytest.mark.parametrize("variant", VARIANTS)
def test_unmerge_undoes_merge(variant, x, loop):
    _, variables, _ = loop
    road = road_jax.transform(Stack(), RoadConfig(variant=variant, group_size=8, target_modules="all-linear"))
    adapter = with_values(road.init(jax.random.key(1), variables, x))
    adapter = jax.tree.map(lambda v: 0.2 * v, adapter)
    adapter = jax.tree_util.tree_map_with_path(lambda p, v: v + float("alpha" in p[-1].key), adapter)
    merged = jax.jit(road.merge)(variables, adapter)
    expected = road.apply(variables, adapter, x)
    assert_close(road.model.apply(merged, x), expected, "float32", moved_from=road.model.apply(variables, x))
    back = road.unmerge(merged, adapter)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


def test_methods_of_modules_without_a_place_are_left_alone():
    class Model(nn.Module):
        def width(self):
            return 8

        @nn.compact
        def __call__(self, x):
            return nn.Dense(Model(parent=None).width(), name="dense")(x)

    x = jnp.ones((2, 4))
    variables = Model().init(jax.random.key(0), x)
    road = road_jax.transform(Model(), RoadConfig(target_modules=["dense"], group_size=8, init_weights=False))
    adapter = road.init(jax.random.key(1), variables, x)
    plain, leaves = Model().apply(variables, x), adapter["dense"]
    expected = road_core.rotate(plain, leaves["road_theta"], leaves["road_alpha"], variant="road_1", group_size=8)
    assert_close(road.apply(variables, adapter, x), expected, "float32", moved_from=plain)


def test_layers_with_several_output_axes_are_flattened(x):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            q = nn.DenseGeneral((4, 32), name="q")(x)
            k = nn.Einsum((WIDTH, 4, 32), "btd,dhk->bthk", name="k")(x)
            return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o")(q * k)

    model = Heads()
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=64))
    adapter = with_values(road.init(jax.random.key(1), variables, x))
    assert jax.tree.map(jnp.shape, adapter["q"]) == {"road_theta": (64,), "road_alpha": (64,)}

    def turn(y, name):
        arrays = (np.asarray(adapter[name][n]) for n in ("road_theta", "road_alpha"))
        flat = np.asarray(y).reshape(2, 5, -1)
        return road_core.rotate(flat, *arrays, variant="road_1", group_size=64).reshape(y.shape)

    p = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    q, k = (np.einsum("btd,dhk->bthk", np.asarray(x), p[n]["kernel"]) + p[n]["bias"] for n in "qk")
    o = np.einsum("bthk,hkd->btd", turn(q, "q") * turn(k, "k"), p["o"]["kernel"]) + p["o"]["bias"]
    assert_close(road.apply(variables, adapter, x), turn(o, "o"), "float32", moved_from=model.apply(variables, x))
    assert_close(model.apply(road.merge(variables, adapter), x), turn(o, "o"), "float32")


def test_params_that_come_back_are_the_models_own(x, loop):
    road, variables, adapter = loop
    output, back = road.apply(variables, adapter, x, mutable=True)
    np.testing.assert_array_equal(output, road.apply(variables, adapter, x))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_modules_to_save_ride_along(x, loop):
    road, variables, _ = loop
    config = RoadConfig(target_modules=["up"], group_size=8, modules_to_save=["lm_head"])
    road = road_jax.transform(road.model, config)
    adapter = road.init(jax.random.key(1), variables, x)
    np.testing.assert_array_equal(adapter["lm_head"]["kernel"], variables["params"]["lm_head"]["kernel"])
    adapter["lm_head"] = jax.tree.map(lambda v: 2 * v, adapter["lm_head"])
    expected = 2 * road.model.apply(variables, x)
    assert_close(road.apply(variables, adapter, x), expected, "float32", moved_from=expected / 2)
    assert_close(road.model.apply(road.merge(variables, adapter), x), expected, "float32")
    with pytest.raises(AdapterError, match="lm_head"):
        road.unmerge(variables, adapter)


def test_a_saved_module_is_trained_beside_the_rotation(x, loop):
    """Also by a step that donates the adapter's buffers: they aren't the base's."""
    road, variables, _ = loop
    config = RoadConfig(target_modules=["up"], group_size=8, modules_to_save=["lm_head"])
    road = road_jax.transform(road.model, config)
    adapter = road.init(jax.random.key(1), variables, x)
    before = jax.device_get(variables)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(adapter):
        def loss(adapter):
            return jnp.mean(jnp.square(road.apply(variables, adapter, x) - 1))

        value, gradients = jax.value_and_grad(loss)(adapter)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, adapter, gradients), value

    losses = []
    for _ in range(5):
        adapter, value = step(adapter)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert float(jnp.abs(adapter["lm_head"]["kernel"] - variables["params"]["lm_head"]["kernel"]).max()) > 1e-4
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, before))
    found = road.model.apply(road.merge(variables, adapter), x)
    assert_close(found, road.apply(variables, adapter, x), "float32", moved_from=road.model.apply(variables, x))
    with pytest.raises(AdapterError, match=r"lm_head\.kernel: expected plain params to train whole, found int8 codes"):
        road.init(jax.random.key(1), road_jax.quantize(variables, "int8", exclude=()), x)


def test_plain_calls_stay_plain(x, loop):
    road, variables, adapter = loop
    plain = jax.jit(road.model.apply)
    expected = road.model.apply(variables, x)
    road.apply(variables, adapter, x)
    np.testing.assert_allclose(plain(variables, x), expected, atol=1e-5)


def test_one_compilation_serves_every_adapter_of_a_shape(x, loop):
    road, variables, adapter = loop
    traces = []

    @jax.jit
    def apply(variables, adapter, x):
        traces.append(1)
        return road.apply(variables, adapter, x)

    apply(variables, adapter, x)
    apply(variables, jax.tree.map(jnp.zeros_like, adapter), x)
    assert len(traces) == 1


class OneOfTwo(nn.Module):
    """A model with a layer that only some calls run."""

    @nn.compact
    def __call__(self, x, both=True):
        x = nn.Dense(WIDTH, name="always")(x)
        return nn.Dense(WIDTH, name="sometimes")(x) if both else x


def test_what_does_not_fit_is_refused(x, loop):
    road, variables, adapter = loop

    def init(**fields):
        return road_jax.transform(road.model, RoadConfig(**fields)).init(jax.random.key(0), variables, x)

    with pytest.raises(AdapterError, match="nearest: up"):
        init(target_modules=["upp"])
    with pytest.raises(
        AdapterError, match=r"blocks_0\.up: expected a number of outputs that group_size 48 divides, found 128"
    ):
        init(target_modules=["up"], group_size=48)
    with pytest.raises(AdapterError, match="model type None"):
        init()
    with pytest.raises(AdapterError, match="blocks_0: expected a Dense"):
        init(target_modules=["blocks_0"])
    with pytest.raises(AdapterError, match="no 'tail'"):
        init(target_modules=["up"], group_size=8, modules_to_save=["tail"])

    scanned = road_jax.transform(Stack("scan"), RoadConfig(target_modules=["up"], layers_to_transform=[0]))
    with pytest.raises(AdapterError, match=r"layers_to_transform: expected .* found blocks\.\w+, a stack"):
        scanned.init(jax.random.key(0), scanned.model.init(jax.random.key(0), x), x)
    numbered = road_jax.transform(Stack(), RoadConfig(target_modules=["up"], layers_to_transform=[0]))
    with pytest.raises(
        AdapterError,
        match=r"^RoadConfig.layers_to_transform: .* \[0\] between dots .* found blocks_0\.up, blocks_1\.up",
    ):
        numbered.init(jax.random.key(0), numbered.model.init(jax.random.key(0), x), x)
    rows = nn.Sequential([nn.DenseGeneral(8, batch_dims=(0,))])
    with pytest.raises(AdapterError, match=r"DenseGeneral \(without batch_dims\) .* found DenseGeneral"):
        road_jax.transform(rows, RoadConfig(target_modules=["layers_0"])).init(
            jax.random.key(0), rows.init(jax.random.key(0), x), x
        )

    with pytest.raises(AdapterError, match=r"found besides blocks_7\.down, blocks_7\.up, where params .* lm_head"):
        road.apply(variables, {**adapter, "blocks_7": adapter["blocks_0"]}, x)
    half = {"blocks_0": {"up": {"road_theta": adapter["blocks_0"]["up"]["road_theta"]}}}
    with pytest.raises(AdapterError, match=r"blocks_0\.up: expected road_theta and road_alpha, found no road_alpha"):
        road.apply(variables, half, x)
    swapped = {"blocks_0": {"up": adapter["blocks_0"]["down"]}}
    with pytest.raises(
        AdapterError, match=r"blocks_0\.up\.road_theta: expected \[64\] for road_1 on 128 outputs, found \[32\]"
    ):
        road.apply(variables, swapped, x)
    with pytest.raises(AdapterError, match=r"blocks_0\.up.*found"):
        road.merge(variables, swapped)
    flat = jax.tree.map(jnp.zeros_like, adapter)
    with pytest.raises(AdapterError, match="determinant 0"):
        road.unmerge(variables, flat)


ANOTHER = {
    "no adapter": (lambda road, v, a, x: road.apply(v, None, x), "adapter: expected a nested dict .* found NoneType"),
    "inputs in its place": (lambda road, v, a, x: road.apply(v, x), "adapter: expected .* found ArrayImpl"),
    "a list": (lambda road, v, a, x: road.merge(v, [a]), "adapter: expected a nested dict of arrays, found list"),
    "no part": (lambda road, v, a, x: road.apply(v, {"up": None}, x), "adapter: expected .* found besides up, where"),
    "names": (lambda road, v, a, x: road.apply(v, {0: a}, x), "adapter: expected strings as names, found 0"),
    "no variables": (lambda road, v, a, x: road.apply(None, a, x), "variables: expected .* found NoneType"),
    "params": (lambda road, v, a, x: road.unmerge({"up": v}, a), "variables: expected a dict .* found one with up"),
    "nothing": (lambda road, v, a, x: road.init(jax.random.key(0), {}, x), "variables: expected .* one with nothing"),
    "NNX": (
        lambda road, v, a, x: road_jax.transform(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), road.config),
        r"model: expected a Linen module \(for NNX: road_jax\.nnx\.wrap\), found Linear",
    ),
    "config": (lambda road, v, a, x: road_jax.transform(road.model, {}), "config: expected RoadConfig, found dict"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_what_is_of_another_type_is_refused(case, x, loop):
    call, said = ANOTHER[case]
    with pytest.raises(AdapterError, match=f"^{said}"):
        call(*loop, x)


class Numbered(nn.Module):
    """Has params whose names are numbers."""

    @nn.compact
    def __call__(self, x):
        scales = self.param("scales", lambda key: {0: jnp.full(WIDTH, 2.0), 1: jnp.ones(WIDTH)})
        return nn.Dense(WIDTH, name="up")(x) * scales[0][None, None]


def test_params_may_have_numbers_as_names(x):
    model = Numbered()
    variables = model.init(jax.random.key(0), x)
    config = RoadConfig(target_modules=["up"], group_size=8, init_weights=False)
    road = road_jax.transform(model, config)
    adapter = road.init(jax.random.key(1), variables, x)
    merged = road.merge(variables, adapter)
    assert_close(
        model.apply(merged, x), road.apply(variables, adapter, x), "float32", moved_from=model.apply(variables, x)
    )
    coded = road_jax.quantize(variables, "int8")
    assert jax.tree.structure(road_jax.dequantize(coded)) == jax.tree.structure(variables)


def test_all_linear_leaves_out_an_odd_number_of_outputs(x):
    model = nn.Sequential([nn.Dense(8), nn.Dense(1)])
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear", group_size=4))
    assert road.init(jax.random.key(0), variables, x).keys() == {"layers_0"}
    road = road_jax.transform(model, RoadConfig(target_modules=["layers_1"]))
    with pytest.raises(
        AdapterError, match="layers_1: expected a number of outputs that group_size 64 divides, found 1"
    ):
        road.init(jax.random.key(0), variables, x)


def test_a_part_that_no_layer_used_is_refused(x):
    model = OneOfTwo()
    variables = model.init(jax.random.key(0), x)
    road = road_jax.transform(model, RoadConfig(target_modules="all-linear"))
    adapter = road.init(jax.random.key(0), variables, x)
    road.apply(variables, adapter, x)
    with pytest.raises(AdapterError, match="found unused sometimes"):
        road.apply(variables, adapter, x, both=False)


@pytest.mark.parametrize(
    ("leaf", "value", "said"),
    [
        ("road_alpha", jnp.ones(1), r"up: expected road_theta and road_alpha of one shape, found \[64\] and \[1\]"),
        ("road_alpha", jnp.float32(2), r"up: expected .* of one shape, found \[64\] and \[\]"),
        ("road_alpha", jnp.ones((64, 3)), r"up: expected .* of one shape, found \[64\] and \[64, 3\]"),
        ("road_theta", jnp.zeros(64, int), r"up\.road_theta: expected an array of floating-point numbers, found int32"),
        ("road_alpha", "1", r"up\.road_alpha: expected an array of floating-point numbers, found str"),
    ],
)
def test_theta_and_alpha_that_do_not_go_together_are_refused(leaf, value, said, x, loop):
    road, variables, adapter = loop
    wrong = {"blocks_0": {"up": {**adapter["blocks_0"]["up"], leaf: value}}}
    for use in (lambda: road.apply(variables, wrong, x), lambda: road.merge(variables, wrong)):
        with pytest.raises(AdapterError, match=rf"^blocks_0\.{said}"):
            use()


@pytest.mark.parametrize("how", ["scan", "scan-axis1-remat"])
@pytest.mark.parametrize("ids", [None, [1, 0]])
@pytest.mark.parametrize("seen", [False, True])
def test_a_stack_of_another_depth_is_refused(how, ids, seen, x):
    model, config = Stack(how), RoadConfig(target_modules=["up", "down"])
    variables = model.init(jax.random.key(0), x)
    adapter = road_jax.transform(model, config).init(jax.random.key(0), variables, x)
    axis = 1 if "axis1" in how else 0
    several = road_jax.stack_adapters([adapter]) if ids else adapter
    x = x[:2]
    for change in (
        lambda leaf: jnp.concatenate([leaf, leaf], axis),
        lambda leaf: leaf.take(np.arange(1), axis),
        lambda leaf: leaf.take(0, axis),
    ):
        road = road_jax.transform(model, config)
        if seen:
            road.init(jax.random.key(0), variables, x)
        wrong = jax.tree.map(change, several)
        said = {
            f"blocks.{name}.road_theta: expected the stack axes of the layer's kernel "
            f"{list(leaves['kernel'].shape)}, found {list(wrong['blocks'][name]['road_theta'].shape)}"
            for name, leaves in variables["params"]["blocks"].items()
        }
        with pytest.raises(AdapterError) as error:
            road.apply(variables, wrong, x, adapter_ids=ids)
        assert str(error.value) in said
        assert road.apply(variables, several, x, adapter_ids=ids).shape == model.apply(variables, x).shape


def test_what_the_model_itself_refuses_stays_its_own(x, loop):
    road, variables, adapter = loop
    with pytest.raises(errors.ScopeParamShapeError):
        road.apply(variables, adapter, x[..., :5])
